"""Which data type a machine gets and why; processes that hang, or that nobody waits for."""

import builtins
import faulthandler
import io
import socket
import sys
import time

import pytest
import torch
from conftest import run

from lib import machine
from lib.machine import choose_dtype, end_if_it_hangs, find_machine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("flags, dtype, why", [
    ("flags : avx2 avx512f", "fp32", "no bf16 instructions"),
    ("flags : avx512_bf16", "bf16", "four times as fast")])
def test_a_cpu_without_bf16_instructions_gets_fp32(flags, dtype, why, monkeypatch):
    monkeypatch.setattr("os.path.exists", lambda path: True)
    monkeypatch.setattr(builtins, "open", lambda path: io.StringIO(flags))
    name, reason = choose_dtype("auto", CPU)
    assert name == dtype and why in reason


def test_a_gpu_without_bf16_gets_fp16_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    name, reason = choose_dtype("auto", CUDA)
    assert name == "fp16" and "Tesla T4 has no bf16" in reason and "loss scaling" in reason
    with pytest.raises(ValueError, match="Tesla T4 has no bf16; use --dtype=fp16"):
        choose_dtype("bf16", CUDA)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype("auto", CUDA)[0] == choose_dtype("bf16", CUDA)[0] == "bf16"


def test_a_data_type_that_is_none_or_needs_a_gpu_is_refused():
    with pytest.raises(ValueError, match="expected auto, bf16, fp16, fp32"):
        choose_dtype("float8", CPU)
    with pytest.raises(ValueError, match="needs a CUDA GPU; use --dtype=bf16"):
        choose_dtype("fp16", CPU)


def test_the_names_of_torch_are_taken_too():
    for ours, torchs in (("bf16", "bfloat16"), ("fp32", "float32")):
        assert choose_dtype(torchs, CPU) == choose_dtype(ours, CPU) == (ours, "as asked")
    with pytest.raises(ValueError, match="dtype=fp16 needs a CUDA GPU"):
        choose_dtype("float16", CPU)


ORPHAN = """
import os, signal, sys, time
from lib.machine import PARENT, stop_with_parent
parent = os.getpid()
if os.fork() == 0:
    os.environ[PARENT] = str(parent)
    stop_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(not open(sys.argv[1], "w").write("yes")))
    open(sys.argv[2], "w")
    time.sleep(60)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
os.kill(parent, signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process")
def test_a_process_stops_when_the_one_that_started_it_is_killed(tmp_path):
    run("-c", ORPHAN, tmp_path / "stopped", tmp_path / "ready", ok=False)
    end = time.monotonic() + 30
    while not (tmp_path / "stopped").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / "stopped").exists()


def test_a_hang_is_watched_until_it_is_taken_back(monkeypatch):
    calls = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later",
                        lambda seconds, **how: calls.append((seconds, how["exit"])))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("back"))
    end_if_it_hangs(2)
    end_if_it_hangs(0)
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    end_if_it_hangs(2)  # a notebook lives on
    assert calls == ["back", (120, True), "back", "back"]
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_never_comes_ends_in_one_message(rank, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(machine, "JOIN_MINUTES", 0.5 / 60)
    for name, value in dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=f"process {rank} of 2 waited .* at 127.0.0.1:{port}"):
        find_machine("cpu", parallel=True)
