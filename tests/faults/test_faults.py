"""Some kinds of fault once: the short form of `make faults`. After it, the same command goes on and
comes to the result of an undisturbed run, bit for bit.

What other files try is not here: kills and full disks of prepare.py (tests/test_prepare.py) and of
fine-tuning (tests/test_finetune_glue.py), signals to one process and to torchrun, a damaged
checkpoint, gradients that are not finite (tests/test_train.py), sweeps (tests/tools/test_sweep.py).
"""

import io
import random
import signal

import pytest
import scenarios
import torch
from conftest import call, refused, result, run
from scenarios import FINETUNE, TRAIN, World
from test_train import tiny, train

from lib.log import append_log, read_log, write_log
from lib.run import read_checkpoint

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def world(data_dir, tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults") / "runs", data_dir, steps=20)


FAULTS = {
    "kill -9 of training": lambda w, rng: scenarios.killed(w, rng, TRAIN),
    "kill -9 of fine-tuning": lambda w, rng: scenarios.killed(w, rng, FINETUNE),
    "SIGINT twice": lambda w, rng: scenarios.signalled(w, rng, TRAIN, signal.SIGINT, True),
    "a step hangs": scenarios.hanging,
    "weights of a checkpoint NaN": scenarios.nan_weights,
    "data deleted meanwhile": scenarios.data_deleted,
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_same_command_goes_on_after(name, world):
    outcome = FAULTS[name](world, random.Random(0))
    assert not outcome.lost


def test_the_same_command_goes_on_after_a_disk_was_full(world):
    try:
        assert not scenarios.full_disk(world, random.Random(1), TRAIN).lost
    except RuntimeError as error:  # not on Linux, or not as root
        pytest.skip(str(error))


CRASH = """
import os, runpy, sys
import lib.run
real = lib.run.save_or_warn
def crash(out_dir, checkpoint, name):
    if (checkpoint["step"], name) == (10, "ckpt.pt"):
        os.kill(os.getpid(), 9)
    return real(out_dir, checkpoint, name)
lib.run.save_or_warn = crash
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_kill_between_best_pt_and_ckpt_pt_loses_neither(world, tmp_path):
    """ckpt.pt is written last: the resumed run evaluates once more and finds the same best."""
    arguments = TRAIN.arguments(world, tmp_path)[1:]
    done = run("-c", CRASH, *arguments, "--save_minutes=60", ok=False)
    assert done.returncode == -signal.SIGKILL
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 10
    call("train.py", *arguments)
    assert not scenarios.differences(world, TRAIN, tmp_path)


def test_a_run_that_began_from_weights_may_be_killed_before_its_first_checkpoint(world, tmp_path):
    """best.pt of step 0 alone does not make the folder somebody else's."""
    args = [f"--init_from={world.whole_folder(TRAIN)}", "--max_steps=2"]
    train(world.data_dir, tmp_path, *args)
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / name).unlink(missing_ok=True)
    checkpoint = torch.load(tmp_path / "best.pt", weights_only=True)
    torch.save(checkpoint | dict(step=0), tmp_path / "best.pt")
    first, *_ = (tmp_path / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text(first + "\n")
    assert result(train(world.data_dir, tmp_path, *args))["step"] == 2


def test_lines_that_a_full_disk_did_not_take_are_written_later(tmp_path, monkeypatch, capfd):
    class Full(io.FileIO):
        def write(self, data):
            return super().write(data[:len(data) // 2])
    real = open
    append_log(str(tmp_path), dict(step=1), {})
    monkeypatch.setattr("builtins.open", lambda path, mode="r", **how: Full(path, "a")
                        if str(path).endswith("log.jsonl") else real(path, mode, **how))
    append_log(str(tmp_path), dict(step=2), {})
    monkeypatch.undo()
    assert "log.jsonl was not written" in capfd.readouterr().out
    assert [record["step"] for record in read_log(tmp_path)] == [1]
    append_log(str(tmp_path), dict(step=3), {})
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3]
    assert write_log(str(tmp_path))


def test_a_checkpoint_of_another_program_is_named(world, tmp_path):
    """nanoGPT writes a ckpt.pt too."""
    torch.save(dict(model={}, model_args={}, iter_num=5), tmp_path / "ckpt.pt")
    done = call("train.py", *tiny(world.data_dir, tmp_path), ok=False)
    refused(done, "ckpt.pt is not a checkpoint of train.py: its model_settings, step",
            "no checkpoint in")
