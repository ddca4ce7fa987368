"""Damaged and random files end in success or in one message, in every reader: the short form."""

import pytest

pytest.importorskip("hypothesis", reason="pip install -r requirements-extra.txt")

from fuzz import TARGETS, Fuzz

EXAMPLES = {"validate": 3, "checkpoint": 15, "tokenizer.json": 10, "bins and meta.json": 20}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_end_in_one_message(name, tmp_path):
    fuzz = Fuzz(name, tmp_path / "files" / "run")
    fuzz.round(0, EXAMPLES.get(name, 30), derandomize=True)
    assert fuzz.tried and not fuzz.findings, "\n".join(fuzz.findings.values())
