"""tools/bench.py runs at a tiny size and names mistakes. Speeds are in records/speed."""

import json
import runpy

import pytest
import torch
from conftest import ROOT, call, refused, run

from tools.peers import OURS, PEERS

TINY = ["--lengths=32", "--tokens=32", "--repeats=1"]


def test_all_models_have_the_parameters_of_strict():
    n = {}
    with torch.device("meta"):
        for name, build in (OURS | PEERS).items():
            n[name] = sum(p.numel() for p in build(512).parameters())
    assert n["strict"] == 37_205_504
    for name in n:
        assert abs(n[name] / n["strict"] - 1) < (0.1 if name == "open" else 0.03), n


def test_a_table_a_picture_and_json(data_dir, tmp_path):
    done = run("tools/bench.py", *TINY, "--peers=1", "--models=strict,hf_perceiver",
               f"--data_dir={data_dir}", f"--out_dir={tmp_path}")
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report["32"]) == ["strict", "hf_perceiver"]
    assert "hf_whole_word_collator_mtok_per_s" in report["data"]
    for figures in report["32"].values():
        for name in ("tokens_per_s", "peak_mb", "gemm_share", "fill_ms", "embed_tokens_per_s"):
            assert figures[name] > 0
    assert report["ratios"]["32: strict / hf_perceiver, fill_ms"] > 0
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_profile_writes_a_trace(data_dir, tmp_path):
    done = run("tools/bench.py", *TINY, "--models=strict", "--profile=1",
               f"--data_dir={data_dir}", f"--out_dir={tmp_path}")
    assert "aten::" in done.stdout
    assert json.loads((tmp_path / "trace_strict_32.json").read_text())["traceEvents"]


@pytest.mark.parametrize("wrong, message", [
    (["--models=strict,bert"], "expected some of strict, open, transformer"),
    (["--models=hf_bert"], "need --peers=1"),
    (["--lengths=128,x"], "such as --lengths=128,512"),
    (["--repeats=0"], "expected numbers above 0")])
def test_mistakes_are_named(wrong, message, data_dir):
    refused(call("tools/bench.py", *wrong, f"--data_dir={data_dir}", ok=False), message)


def test_without_transformers_the_rest_still_runs(data_dir, tmp_path):
    # Python runs this file at the start of every process.
    hidden = "import sys; sys.modules['transformers'] = None"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    done = run("tools/bench.py", *TINY, "--peers=1", "--models=strict,hf_bert",
               f"--data_dir={data_dir}", f"--out_dir={tmp_path}",
               env={"PYTHONPATH": str(tmp_path)})
    assert "transformers is not installed, so its models are left out" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report["32"]) == ["strict"] and "token_mtok_per_s" in report["data"]


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
