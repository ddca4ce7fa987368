"""lib/finetune.py: fine-tuning on lists of texts and labels."""

import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from conftest import ROOT

from configurator import read_settings
from data.tokenizer import Tokenizer
from lib.finetune import Recipe, finetune
from lib.run import read_checkpoint
from lib.settings import build_model

WORDS = {"good": ["fine", "warm"], "bad": ["cold", "dull"]}


@pytest.fixture(scope="module")
def run():
    """A tiny encoder with fresh weights, and its tokenizer."""
    tok = Tokenizer.load("byte")
    torch.manual_seed(0)
    model = build_model(dict(vocab_size=tok.vocab_size, block_size=64, n_layer=1, n_head=2,
                             ffn_dim=32, token_dim=64, n_concept=4, concept_dim=32,
                             mask_id=tok.mask_id, eot_id=tok.eot_id))
    return model, tok


def examples(n, seed=0):
    """n texts, and which of WORDS each holds."""
    rng = np.random.default_rng(seed)
    moods = [str(mood) for mood in rng.choice(list(WORDS), n)]
    return [f"the stone is {rng.choice(WORDS[mood])}" for mood in moods], moods


def tuned(run, texts, labels, *dev, **settings):
    """finetune() with settings for tiny models."""
    settings = dict(epochs=6, lr=3e-3, batch_size=8, max_tokens=48, device="cpu",
                    dtype="fp32") | settings
    return finetune(run, texts, labels, *dev, **settings)


def test_lists_are_learned_and_answered_in_their_own_labels(run, tmp_path):
    dev_texts, dev_labels = examples(20, seed=1)
    before = {name: tensor.clone() for name, tensor in run[0].state_dict().items()}
    torch.manual_seed(3)
    expected, was_training = torch.rand(1), run[0].training
    torch.manual_seed(3)
    mood = tuned(run, *examples(64), dev_texts, dev_labels)
    assert torch.equal(torch.rand(1), expected), "the caller's random numbers go on"
    assert run[0].training == was_training
    assert all(torch.equal(before[name], t) for name, t in run[0].state_dict().items())
    answers = mood.predict(dev_texts)
    assert set(answers) <= set(WORDS) and mood.scores["accuracy"] > 0.9
    assert mood.scores["accuracy"] == np.mean([a == b for a, b in zip(answers, dev_labels)])
    assert len(mood.history) <= 6 and mood.history[0]["scores"]["dev"].keys() == mood.scores.keys()
    assert mood.predict([]) == [] and mood.predict(dev_texts[:1]) == answers[:1]
    mood.save(tmp_path / "model.pt")
    saved = read_checkpoint(tmp_path / "model.pt")
    assert saved["labels"] == ["bad", "good"] and saved["n_texts"] == 1


@pytest.mark.parametrize("labels,kind", [
    ([False, True] * 8, bool), ([3, 7] * 8, int), (np.array([3, 7] * 8), int),
    (["a b", "\u00e9"] * 8, str), (np.array(["x", "y"] * 8), str), ([0, 0.5] * 8, float),
    (torch.tensor([1.5, 2.5] * 8), float), ([f"label {i}" for i in range(16)], str)])
def test_answers_are_of_the_kind_of_the_labels(labels, kind, run):
    texts = [("cold", "warm"), ("warm", "")] * 8  # pairs; an empty text is one, too
    answers = tuned(run, texts, labels, epochs=1).predict(texts)
    assert len(answers) == 16 and all(type(answer) is kind for answer in answers)
    if kind is not float:
        assert set(answers) <= set(np.asarray(labels).tolist())


def test_without_a_dev_set_the_last_epoch_is_kept_and_one_score_is_enough(run):
    found = tuned(run, ["one text"], [2.5], epochs=5)
    assert found.scores == {} and len(found.history) == 5
    assert found.predict(["one text", "\ud83d half a character"])[0] == pytest.approx(2.5, abs=1)


def test_the_same_seed_gives_the_same_model_and_another_does_not(run):
    texts, labels = examples(16)
    one, same, other = (tuned(run, texts, labels, epochs=2, seed=seed) for seed in (1, 1, 2))
    assert one.history == same.history != other.history


@pytest.mark.parametrize("texts,labels,dev,part", [
    ("a text", ["x", "y"], (), "texts: found one string"),
    (["a", "b"], "xy", (), "labels: found one string"),
    (["a", "b"], ["x"], (), "found 2 texts and 1 labels"),
    ([], [], (), "found 0 texts"),
    (["a", None], ["x", "y"], (), r"texts\[1\]: found 'None' \(NoneType\), expected a text"),
    (["a", ("b", "c")], ["x", "y"], (), r"texts\[1\]: found .* expected a text"),
    ([("a", "b"), ("a", math.nan)], ["x", "y"], (), r"texts\[1\]: .* expected a pair of texts"),
    ([("a", "b", "c")] * 2, ["x", "y"], (), r"texts\[0\]: .* expected a pair of texts"),
    (["a", "b"], ["x", "x"], (), "found 'x' alone"),
    (["a", "b"], ["x", 1], (), "a mixture of int, str"),
    (["a", "b"], [True, 1], (), "a mixture of bool, int"),
    (["a", "b"], ["x", None], (), r"labels\[1\]: found None"),
    (["a", "b"], [0.5, math.nan], (), r"labels\[1\]: found nan"),
    (["a", "b"], ["x", "y"], (["a"],), "expected both or neither"),
    (["a", "b"], ["x", "y"], (["a"], ["z"]), r"dev_labels\[0\]: found 'z'"),
    (["a", "b"], [1, 2], (["a"], [True]), r"dev_labels\[0\]: found True"),
    (["a", "b"], [1.0, 2], (["a"], ["x"]), r"dev_labels\[0\]: found 'x', expected a number"),
    (["a", "b"], ["x", "y"], ([("a", "b")], ["x"]), r"dev_texts\[0\]: .* expected a text"),
])
def test_lists_that_do_not_fit_are_refused_by_place(texts, labels, dev, part, run):
    with pytest.raises(ValueError, match=part):
        tuned(run, texts, labels, *dev)


@pytest.mark.parametrize("settings", [dict(epochs=0), dict(lr=0), dict(lr=math.nan),
                                      dict(batch_size=0), dict(max_tokens=3), dict(n_concept=-1),
                                      dict(dtype="int8")])
def test_settings_that_cannot_be_are_refused(settings, run):
    with pytest.raises(ValueError, match=next(iter(settings))):
        tuned(run, ["a", "b"], ["x", "y"], **settings)


def test_a_folder_without_a_run_is_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        tuned(tmp_path, ["a", "b"], ["x", "y"])
    with pytest.raises(ValueError, match="expected the folder of a training run"):
        tuned(run[0], ["a", "b"], ["x", "y"])
    with pytest.raises(ValueError, match=r"texts\[0\]"):
        tuned(run, ["a", "b"], ["x", "y"], epochs=1).predict([("a", "b")])


@pytest.mark.parametrize("freeze_table", [False, True])
def test_a_frozen_table_keeps_its_vectors_and_the_layers_learn(run, freeze_table):
    texts, moods = examples(64)
    mood = tuned(run, texts, moods, freeze_table=freeze_table)
    before, after = run[0].state_dict(), mood.model.encoder.state_dict()
    same = {name for name in after if torch.equal(after[name], before[name])}
    special = torch.tensor([run[1].cls_id, run[1].sep_id])  # these start as other tokens
    words = torch.ones(run[1].vocab_size, dtype=torch.bool).index_fill(0, special, False)
    assert torch.equal(after["wte"][words], before["wte"][words]) == freeze_table
    assert torch.equal(after["wte"][run[1].cls_id], before["wte"][run[1].mask_id]) == freeze_table
    assert not any(name.startswith("layers.") and name.endswith("weight") for name in same)
    assert set(mood.predict(["the stone is warm", "the stone is dull"])) == {"good", "bad"}


def test_the_command_has_the_same_defaults():
    settings = read_settings(ROOT / "finetune_glue.py")
    recipe = asdict(Recipe(0, 0, 0, 0))
    assert recipe == {field.name: settings[field.name][0] for field in fields(Recipe)}
