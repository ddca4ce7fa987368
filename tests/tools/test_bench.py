"""tools/bench.py runs at a tiny size and says what is wrong. Speeds are not looked at: see records/speed."""

import json
import runpy

import pytest
import torch
from conftest import ROOT, call, refused, run

from tools.peers import OURS, PEERS

TINY = ["--lengths=32", "--tokens=32", "--repeats=1"]


def test_all_models_have_the_parameters_of_strict():
    with torch.device("meta"):
        n = {name: sum(p.numel() for p in build(512).parameters()) for name, build in (OURS | PEERS).items()}
    assert n["strict"] == 37_205_504
    assert all(abs(n[name] / n["strict"] - 1) < (0.1 if name == "open" else 0.03) for name in n), n


def test_a_table_a_picture_and_json(data_dir, tmp_path):
    report = json.loads(run("tools/bench.py", *TINY, "--peers=1", "--models=strict,hf_perceiver", f"--data_dir={data_dir}",
                            f"--out_dir={tmp_path}").stdout.splitlines()[-1])
    assert list(report["32"]) == ["strict", "hf_perceiver"] and "hf_whole_word_collator_mtok_per_s" in report["data"]
    for result in report["32"].values():
        assert all(result[k] > 0 for k in ("tokens_per_s", "peak_mb", "gemm_share", "fill_ms", "embed_tokens_per_s"))
    assert report["ratios"]["32: strict / hf_perceiver, fill_ms"] > 0
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_profile_writes_a_trace(data_dir, tmp_path):
    done = run("tools/bench.py", *TINY, "--models=strict", "--profile=1", f"--data_dir={data_dir}", f"--out_dir={tmp_path}")
    assert "aten::" in done.stdout and json.loads((tmp_path / "trace_strict_32.json").read_text())["traceEvents"]


@pytest.mark.parametrize("wrong, message", [
    (["--models=strict,bert"], "expected some of strict, open, transformer"), (["--models=hf_bert"], "need --peers=1"),
    (["--lengths=128,x"], "such as --lengths=128,512"), (["--repeats=0"], "expected numbers above 0")])
def test_mistakes_are_named(wrong, message, data_dir):
    refused(call("tools/bench.py", *wrong, f"--data_dir={data_dir}", ok=False), message)


def test_without_transformers_the_rest_still_runs(data_dir, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['transformers'] = None")  # in every process
    done = run("tools/bench.py", *TINY, "--peers=1", "--models=strict,hf_bert", f"--data_dir={data_dir}",
               f"--out_dir={tmp_path}", env={"PYTHONPATH": str(tmp_path)})
    assert "transformers is not installed, so its models are left out" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report["32"]) == ["strict"] and "token_mtok_per_s" in report["data"]


class Stub:
    """A Worker whose model takes `seconds`, or does not fit."""
    def __init__(self, seconds):
        self.seconds, self.asked, self.stopped = seconds, 0, False

    def ask(self, *_):
        self.asked += 1
        if self.asked > len(self.seconds):
            raise RuntimeError("its process died with code -9; -9 is out of memory")
        return self.seconds[self.asked - 1]

    def stop(self):
        self.stopped = True


def test_a_model_that_does_not_fit_is_left_out_by_name_and_the_others_are_timed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tools/bench.py"])
    medians = runpy.run_path(str(ROOT / "tools/bench.py"))["medians"]
    workers, left_out = {"a": Stub([3, 1, 2]), "b": Stub([1]), "slow": Stub([9])}, {}
    b = workers["b"]
    assert medians(workers, left_out, "step", 3) == {"a": 2, "slow": 9}, "8 seconds of one model are enough"
    assert set(workers) == {"a", "slow"} and b.stopped and "out of memory" in left_out["b"]
