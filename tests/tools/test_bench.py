"""tools/bench.py runs at a tiny size and names mistakes. Speeds are in records/speed."""

import json
import math
import multiprocessing
import runpy
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, call, refused

from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib import machine
from tools import peers
from tools.peers import LONG, OURS, PEERS, fitted_exponents

pytestmark = pytest.mark.long

TINY = ["--lengths=32", "--tokens=32", "--repeats=1"]


def test_all_models_have_the_parameters_of_strict():
    n = {}
    with torch.device("meta"):
        for name, build in (OURS | PEERS).items():
            n[name] = sum(p.numel() for p in build(512).parameters())
    assert n["strict"] == 37_205_504
    for name in n:
        assert abs(n[name] / n["strict"] - 1) < (0.1 if name == "open" else 0.03), n


@pytest.fixture
def bench(monkeypatch, data_dir, tmp_path):
    """Runs the command in this process. Its workers are forks of it, which start soon."""
    monkeypatch.setattr(multiprocessing, "get_context",
                        lambda method, real=multiprocessing.get_context: real("fork"))
    monkeypatch.setattr(machine, "matmul_peak", lambda *_, **__: 1e12)
    monkeypatch.setattr(peers, "bench_data", partial(peers.bench_data, B=2, T=64))

    def bench(*more, ok=True):
        return call("tools/bench.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}",
                    *more, ok=ok)
    return bench


def test_a_table_a_picture_and_json(bench, tmp_path):
    done = bench("--peers=1", "--models=strict,hf_perceiver", "--tokens=64")
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report["32"]) == ["strict", "hf_perceiver"]
    assert "training step, 2 rows of 32 tokens" in done.stdout
    assert "hf_whole_word_collator_mtok_per_s" in report["data"]
    for figures in report["32"].values():
        for name in ("tokens_per_s", "peak_mb", "gemm_share", "fill_ms", "embed_tokens_per_s"):
            assert figures[name] > 0
    assert report["ratios"]["32: strict / hf_perceiver, fill_ms"] > 0
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_profile_writes_a_trace(bench, tmp_path):
    assert "aten::" in bench("--models=strict", "--profile=1").stdout
    assert json.loads((tmp_path / "trace_strict_32.json").read_text())["traceEvents"]


def test_a_picture_that_bench_did_not_make_is_kept(bench, tmp_path):
    (tmp_path / "bench.png").write_text("mine")
    refused(bench(ok=False), "bench.png", "move it away")
    assert (tmp_path / "bench.png").read_text() == "mine"


@pytest.mark.parametrize("wrong, message", [
    (["--models=strict,bert"], "expected some of strict, strict_many, open"),
    (["--models=hf_bert"], "need --peers=1"),
    (["--lengths=128,x"], "such as --lengths=128,512"),
    (["--repeats=0"], "expected numbers above 0")])
def test_mistakes_are_named(wrong, message, data_dir):
    refused(call("tools/bench.py", *wrong, f"--data_dir={data_dir}", ok=False), message)


def test_without_transformers_the_rest_still_runs(bench, data_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("sys.argv", ["tools/bench.py"])
    code = runpy.run_path(str(ROOT / "tools/bench.py"))["chosen_models"]
    code.__globals__.update(peers=1, models="strict,hf_bert")
    assert code() == ["strict"]
    assert "transformers is not installed, so its models are left out" in capsys.readouterr().out
    data, tok = TokenData(str(data_dir), "train", 64), Tokenizer.load(str(data_dir / "tokenizer"))
    rates = peers.bench_data(data, tok, 0.15, 1, 1)
    assert "token_mtok_per_s" in rates and "hf_whole_word_collator_mtok_per_s" not in rates


class Stub:
    """A Worker whose model takes `seconds`, one after the other, and then dies."""
    def __init__(self, seconds):
        self.seconds, self.asked, self.stopped = seconds, 0, False

    def ask(self, *_):
        self.asked += 1
        if self.asked > len(self.seconds):
            raise RuntimeError("its process died with code -9; -9 is out of memory")
        return self.seconds[self.asked - 1]

    def stop(self):
        self.stopped = True


def test_a_model_that_does_not_fit_is_named_and_the_others_are_timed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tools/bench.py"])
    medians = runpy.run_path(str(ROOT / "tools/bench.py"))["medians"]
    b = Stub([1])
    workers, left_out = {"a": Stub([3, 1, 2]), "b": b, "slow": Stub([9])}, {}
    found = medians(workers, left_out, "step", 3)
    assert found == {"a": 2, "slow": 9}, "8 seconds of one model are enough"
    assert set(workers) == {"a", "slow"} and b.stopped and "out of memory" in left_out["b"]


def test_length_compares_ways_to_mix_tokens(bench, tmp_path, monkeypatch):
    done = bench("--length=1", "--lengths=32,64")
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["64"]) == set(LONG) == set(report["exponents"])
    assert report["exponents"]["resonance"] == dict(time=None, memory=None)  # no long rows here
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    refused(bench("--length=1", "--peers=1", ok=False), "leave out peers, profile and race")


def test_exponents_are_those_of_powers_of_the_length():
    """Times of T^1.1 and memory of T^0.5, left out of the fit below 4,096 and above 65,536."""
    report = {str(T): {name: dict(step_ms=T**1.1 if 4096 <= T <= 65536 else 1e9, peak_mb=T**0.5)
                       for name in LONG} for T in (512, 4096, 8192, 16384, 65536, 131072)}
    assert fitted_exponents(report)["concept"] == dict(time=1.1, memory=0.5)


@pytest.mark.parametrize("name", ["decoder", "plain_decoder", "hf_gpt2"])
def test_decoders_are_timed_on_the_loss_of_next_tokens(name):
    """All three give the loss of the same tokens: near ln(V) before training."""
    if name == "hf_gpt2":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = (OURS | PEERS)[name](16)
    ids = torch.randint(0, peers.VOCABULARY, (1, 16))
    if name == "decoder":
        loss = model(ids, torch.arange(15)[None], ids[:, 1:], torch.ones(1, 15))
    else:
        loss = model(input_ids=ids, labels=ids).loss
    assert abs(loss.item() / math.log(peers.VOCABULARY) - 1) < 0.1
