"""Files from somebody else are data: nothing in them runs, leads elsewhere, or tells a secret.

What is read in one place has its tests there: token ids (tests/data/test_ids.py), splits and links
out of a folder (tests/data/test_splitting.py), reports (tests/tools/test_report.py,
test_sweep_report.py), names of arms (tests/tools/test_sweep.py), config files
(tests/test_configurator.py). Damaged and random files: tests/faults/test_fuzz.py.
"""

import ast
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused
from test_house import CODE
from test_train import tiny, train

from data import bins
from data.reader import TokenData
from lib.run import latest_steps, load_run, read_checkpoint
from tools.sweep_report import ending_of

# What may stand in the product, and why.
ALLOWED = {
    ("data/workers.py", "pickle.load"): "from processes that the command itself has started",
    ("tools/export.py", "trust_remote_code"): "the folder that the command has just written",
}
RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load",
             "pickle.loads", "pickle.Unpickler", "yaml.load", "marshal.loads", "joblib.load",
             "extractall", "extract", "shelve.open"}


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def called(node):
    """The name of what a Call calls: "eval", "torch.load", "archive.extractall" -> "extractall"."""
    if isinstance(node.func, ast.Name):
        return {node.func.id}
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        names = {f"{owner}.{node.func.attr}"}
        return names | ({node.func.attr} if node.func.attr.startswith("extract") else set())
    return set()


@pytest.mark.parametrize("name", CODE)
def test_nothing_that_is_read_can_run(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.ImportFrom):  # they are called by their full names only
            hidden = {f"{node.module}.{alias.name}" for alias in node.names} & RUNS_CODE
            assert not hidden, f"{name}:{node.lineno}: {hidden}"
        if not isinstance(node, ast.Call):
            continue
        names = called(node)
        found = names & RUNS_CODE
        given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if "torch.load" in names:
            assert given.get("weights_only") is True, f"{name}:{node.lineno}"
        found |= {word for word in ("allow_pickle", "shell", "trust_remote_code")
                  if given.get(word)}
        for one in found:
            assert (name, one) in ALLOWED, f"{name}:{node.lineno}: {one}"


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "inside"])
def test_a_checkpoint_that_runs_code_is_refused_and_runs_none(form, data_dir, tmp_path):
    out, mark = tmp_path / "run", tmp_path / "mark"
    train(data_dir, out, "--max_steps=2")
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    for path in (out / "ckpt.pt", out / "best.pt", out / "ckpt_prev.pt"):
        if form == "pickle":
            path.write_bytes(pickle.dumps(Payload(mark)))
        else:
            evil = checkpoint | dict(more=Payload(mark)) if form == "inside" else Payload(mark)
            torch.save(evil, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_checkpoint(out / "ckpt.pt")
    assert latest_steps(out / "ckpt.pt") == (0, 0)
    with pytest.raises(ValueError, match="can be read"):
        load_run(str(out), "cpu")
    assert ending_of(str(out)) == "unknown"
    refused(call("train.py", *tiny(data_dir, out), ok=False), "no checkpoint in", "can be read")
    refused(call("train.py", *tiny(data_dir, tmp_path / "new", f"--init_from={out}"), ok=False),
            "can be read")
    assert not mark.exists()


def test_a_kept_index_that_holds_objects_is_made_anew(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "KEPT_TOKENS", 1)
    folder, mark = shutil.copytree(data_dir, tmp_path / "data"), tmp_path / "mark"
    expected = TokenData(str(folder), "train", 16, rows="document").block([0, 1])
    [kept] = folder.glob("train.bin.rows_16_*.npy")
    np.save(kept, np.array([Payload(mark)], object), allow_pickle=True)
    found = TokenData(str(folder), "train", 16, rows="document").block([0, 1])
    assert torch.equal(found, expected) and not mark.exists()


def test_keys_are_written_nowhere(data_dir, tmp_path, monkeypatch):
    secret = "hf_0123456789abcdefSECRET"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, secret)
    done = train(data_dir, tmp_path / "run", "--max_steps=2")
    assert secret not in done.stdout
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
