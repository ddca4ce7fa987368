"""Damaged and random files end in success or in one message, in every reader: the short form."""

import pytest
import torch

pytest.importorskip("hypothesis", reason="pip install -r requirements-extra.txt")

from fuzz import TARGETS, Fuzz, saved

EXAMPLES = {"validate": 3, "checkpoint": 15, "tokenizer.json": 10, "bins and meta.json": 20}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_end_in_one_message(name, tmp_path):
    fuzz = Fuzz(name, tmp_path / "files" / "run")
    fuzz.round(0, EXAMPLES.get(name, 30), derandomize=True)
    assert fuzz.tried and not fuzz.findings, "\n".join(fuzz.findings.values())


@pytest.mark.parametrize("name", TARGETS)
def test_json_nested_too_deeply_ends_in_one_message(name, tmp_path):
    fuzz = Fuzz(name, tmp_path / "files" / "run")
    for path in fuzz.files:
        if path.suffix in (".json", ".jsonl"):
            fuzz.example(path, b"[" * 200_000)
    assert not fuzz.findings, "\n".join(fuzz.findings.values())


def test_a_checkpoint_with_an_arch_of_another_type_ends_in_one_message(tmp_path):
    fuzz = Fuzz("checkpoint", tmp_path / "files" / "run")
    [path] = fuzz.files
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model_settings"]["arch"] = {}
    fuzz.example(path, saved(checkpoint))
    assert not fuzz.findings, "\n".join(fuzz.findings.values())
