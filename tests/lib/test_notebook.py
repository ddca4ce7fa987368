"""The functions for notebooks: the same results as the commands, and nothing starts at import."""

import json

import numpy as np
import pytest
from conftest import call, result, run_script
from test_train import train

from lib.notebook import Sampling, embed, evaluate, fill, finetune, generate, load


@pytest.fixture(scope="module")
def out(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook") / "run"
    train(data_dir, folder)
    return folder


@pytest.fixture(scope="module")
def run(out):
    return load(str(out), dtype="fp32")


def test_fill_answers_as_the_command_does(out, run):
    text = "The c[MASK]t reads the [MASK]iver."
    command = json.loads(call("tools/sample.py", f"--out_dir={out}", f"--text={text}", "--top=3",
                              "--dtype=fp32").stdout.splitlines()[-1])
    answer = fill(run, text, top=3)
    assert answer["filled"] == command["filled"] and len(answer["masks"]) == 2
    assert [c["token"] for c in answer["masks"][0]] == [c["token"] for c in command["masks"][0]]
    assert [a["text"] for a in fill(run, [text, "a [MASK]"])] == [text, "a [MASK]"]
    with pytest.raises(ValueError, match="mark what to fill in"):
        fill(run, "no mask")
    with pytest.raises(ValueError, match="top=0: expected 1 or more"):
        fill(run, text, top=0)


def test_generate_gives_the_texts_of_the_command(out, run):
    command = result(call("tools/sample.py", f"--out_dir={out}", "--generate=1", "--text=The c",
                          "--n_samples=2", "--length=9", "--seed=5", "--dtype=fp32"))
    sampling = Sampling(seed=5)
    assert generate(run, "The c", 2, 9, sampling) == command["texts"]
    with pytest.raises(ValueError, match="n_samples=0: expected 1 or more"):
        generate(run, n_samples=0)


def test_embed_gives_the_rows_of_the_command(out, run, tmp_path):
    texts = ["one text", "", "another"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    call("tools/sample.py", f"--out_dir={out}", f"--embed={tmp_path}/texts.txt",
         f"--to={tmp_path}/e.npy", "--dtype=fp32")
    assert np.allclose(embed(run, texts), np.load(tmp_path / "e.npy"), atol=1e-5)
    for wrong in ("one text", []):
        with pytest.raises(ValueError, match="a list of texts"):
            embed(run, wrong)


def test_evaluate_gives_the_losses_of_the_command(out, run, data_dir):
    command = result(call("tools/eval.py", f"--out_dir={out}", "--rows=16", "--dtype=fp32",
                          "--health_rows=0"))["data"][str(data_dir)]
    for masking_type in ("token", "span"):
        found = evaluate(run, str(data_dir), masking_type, rows=16)
        assert found["loss"] == pytest.approx(command[masking_type]["loss"], abs=1e-5)
    saved = json.loads((out / "eval.json").read_text())["data"][str(data_dir)]["token"]["splits"]
    assert {name: split["share"] for name, split in saved.items()} == {
        name: split["share"] for name, split in evaluate(run, str(data_dir), rows=16)[
            "splits"].items()}


def test_finetune_takes_a_loaded_run(run):
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    tuned = finetune(run, ["a cat", "a dog"] * 8, ["cat", "dog"] * 8, epochs=2, device="cpu")
    assert set(tuned.predict(["a cat", "a dog"])) <= {"cat", "dog"}
    assert all(t.equal(before[name]) for name, t in run.model.state_dict().items())


def test_importing_it_reads_no_command_line_and_starts_nothing():
    code = ("import sys; sys.argv = ['kernel', '-f', 'kernel.json', '--max_steps=1']; "
            "import lib.notebook; print(sorted(m for m in sys.modules if m in "
            "('train', 'finetune_glue', 'tools.sample')))")
    assert run_script(["-c", code]).stdout == "[]\n"
