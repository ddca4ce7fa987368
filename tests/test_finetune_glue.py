"""finetune_glue.py: files are read as they are, scores can be recomputed, no run is lost."""

import csv
import dataclasses
import json
import math
import os
import random
import resource
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from conftest import ROOT, SHARED, Fork, call, fork, refused, result

from data.tokenizer import Tokenizer
from lib import glue
from lib.classifier import alike
from lib.files import FolderLock, file_hash
from lib.finetune import Recipe, make_classifier, take_task_weights
from lib.heads import (
    Classifier,
    cut_lengths,
    encode_texts,
    in_batches,
    keep_concepts,
    padded,
    predict,
)
from lib.jobs import run_python
from lib.leaderboard import cell, markdown, write_submission
from lib.machine import find_machine
from lib.run import load_run
from lib.settings import build_model
from model import ConceptConfig

pytestmark = pytest.mark.long

MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
SMALL = ["--dtype=fp32", "--device=cpu", "--epochs=4", "--batch_size=8", "--max_tokens=48",
         "--grid_seeds=0", "--n_concept=2"]


def finetune(out, task, *arguments, ok=True):
    """finetune_glue.py on a tiny model -> what call() returns."""
    return call("finetune_glue.py", f"--out_dir={out}", f"--task={task}", *SMALL, *arguments, ok=ok)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read_tsv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture(scope="module")
def own_task(tmp_path_factory):
    """A folder with three tasks: mood (one text, two labels), alike (two texts, a score), same.

    "same" has one label in its training set, so that a model learns a constant answer.
    """
    rng, root = random.Random(0), tmp_path_factory.mktemp("tasks")
    words = {"good": ("fine", "warm"), "bad": ("cold", "dull")}

    def rows(n):
        for _ in range(n):
            verdict = rng.choice(list(words))
            yield f"the {rng.choice(['cat', 'stone'])} is {rng.choice(words[verdict])}", verdict

    for split, n in (("train", 96), ("dev", 40), ("test", 7)):
        if split == "test":  # without labels
            lines = ["line", *(text for text, _ in rows(n))]
        else:
            lines = ["line\tverdict", *(f"{text}\t{verdict}" for text, verdict in rows(n))]
        write(root / "mood" / f"{split}.tsv", "\n".join(lines) + "\n")
        lines = ["a\tb\tscore"]
        for (a, a_mood), (b, b_mood) in zip(rows(n), rows(n)):
            lines.append(f"{a}\t{b}\t{4.5 if a_mood == b_mood else 1.5}")
        if split != "test":
            write(root / "alike" / f"{split}.tsv", "\n".join(lines) + "\n")
    for split in ("train", "dev"):
        lines = ["line\tverdict", *(f"{text}\tgood" for text, _ in rows(16))]
        if split == "dev":
            lines.append("odd\tbad")
        write(root / "same" / f"{split}.tsv", "\n".join(lines) + "\n")
    mood = json.dumps(dict(text=["line"], label="verdict", labels=["bad", "good"]))
    write(root / "same" / "task.json", mood)
    write(root / "mood" / "task.json", mood)
    alike = json.dumps(dict(text=["a", "b"], label="score", limits=[1.5, 4.5]))
    write(root / "alike" / "task.json", alike)
    return root


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A tiny pretrained run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    call("train.py", f"--data_dir={data_dir}", f"--out_dir={out}", "--dtype=fp32", "--device=cpu",
         "--block_size=64", "--n_layer=1", "--n_head=2", "--n_concept=4", "--concept_dim=32",
         "--token_dim=64", "--ffn_dim=32", "--batch_size=8", "--micro_batch=8", "--max_steps=20",
         "--warmup_steps=2", "--eval_interval=20", "--eval_rows=8", "--health_rows=0",
         "--masking_type=token", "--init_table=random")
    return out


# ---- files ---------------------------------------------------------------------

@pytest.mark.skipif(not (SHARED / "glue").is_dir(), reason="needs GLUE's files")
@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "rte"])
def test_official_files_have_the_official_number_of_examples(name):
    task = glue.TASKS[name]
    splits, notes = glue.read_task(task, str(SHARED / "glue"))
    assert {split: len(texts) for split, (texts, _) in splits.items()} == task.sizes and notes == []
    assert splits["test"][1] is None
    assert all(text.strip() for texts, _ in splits.values() for row in texts for text in row)


def test_quotes_byte_order_marks_and_windows_line_ends_are_text_and_nothing_more(tmp_path):
    task = glue.TASKS["mrpc"]
    write(tmp_path / "MRPC/train.tsv", b"\xef\xbb\xbf" + MRPC.replace("\n", "\r\n").encode()
          + b'1\t1\t2\tHe said " yes\tShe said no\r\n0\t3\t4\tb\t"c\r\n')
    # no newline at the end, and inside a text a character at which str.splitlines would cut
    write(tmp_path / "MRPC/dev.tsv", MRPC + "1\t1\t2\ta\u2028b\tc")
    splits, notes = glue.read_task(task, str(tmp_path))
    assert splits["train"][0] == [('He said " yes', "She said no"), ("b", '"c')]
    assert splits["train"][1].tolist() == [1, 0] and splits["dev"][0] == [("a\u2028b", "c")]
    assert len(notes) == 2 and "the official file has 3,668" in notes[0]


def test_a_cut_row_is_counted_and_an_empty_sentence_kept(tmp_path):
    write(tmp_path / "MRPC/train.tsv", MRPC + "1\t1\t2\ta\tb\n0\t1\t2\t\tb\n1\t1\t2\tcut")
    write(tmp_path / "MRPC/dev.tsv", MRPC + "1\t1\t2\ta\tb\n")
    splits, notes = glue.read_task(glue.TASKS["mrpc"], str(tmp_path))
    assert len(splits["train"][0]) == 2
    assert any("1 rows left out" in note and "line 4" in note for note in notes)
    assert any("1 rows with an empty sentence" in note for note in notes)


@pytest.mark.parametrize("split,text,parts", [
    ("train", MRPC + "2\t1\t2\ta\tb\n", ("line 2", "'2'", "expected one of 0, 1")),
    ("train", "Quality\tother\n1\ta\n", ("found the columns Quality, other", "#1 String")),
    ("train", "", ("0 lines", "expected a header")),
    ("train", b"\xff\xfe\x00\x01", ("not UTF-8",)),
    ("test", MRPC.replace("Quality", "index") + "0\t1\t2\ta\tb\n1\t1\t2\ta\n",
     ("line 3", "must be whole")),
])
def test_a_file_that_cannot_be_right_is_refused(split, text, parts, tmp_path):
    for name in ("train", "dev"):
        write(tmp_path / f"MRPC/{name}.tsv", MRPC + "1\t1\t2\ta\tb\n")
    write(tmp_path / f"MRPC/{split}.tsv", text)
    with pytest.raises(ValueError) as error:
        glue.read_task(glue.TASKS["mrpc"], str(tmp_path))
    assert all(part in str(error.value) for part in parts), error.value


# ---- a folder of one's own -----------------------------------------------------------

def own_folder(folder, train, ending="tsv", dev=None, **fields):
    """A task folder with the columns text and label; dev is as train unless it is given."""
    fields = dict(text=["text"], label="label", labels=["bad", "good"]) | fields
    write(folder / f"train.{ending}", train)
    write(folder / f"dev.{ending}", train if dev is None else dev)
    write(folder / "task.json", json.dumps(fields))
    return folder


def read_own(folder, split="train"):
    return glue.read_task(glue.find_task(str(folder)), "")[0][split]


@pytest.mark.parametrize("line,parts", [
    ('{"text": null, "label": "bad"}', ("text: found null",)),
    ('{"text": ["a"], "label": "bad"}', ('text: found ["a"]',)),
    ('{"text": {"de": "a"}, "label": "bad"}', ("text: found {",)),
    ('{"text": NaN, "label": "bad"}', ("text: found NaN",)),
    ('{"text": "a", "label": null}', ("label: found null",)),
    ('{"text": "a"}', ("found the columns text; expected text, label",)),
    ('{"text": "a", "label": "bad", "text": "b"}', ("'text' is there twice",)),
    ('["a", "bad"]', ("expected an object",)),
    ('{"text": "a", "lab', ("expected an object",)),
])
def test_a_json_line_without_its_values_is_refused_by_its_number(line, parts, tmp_path):
    good = '{"text": "a", "label": "good"}\n'
    own_folder(tmp_path, good + line + "\n" + good, "jsonl")
    with pytest.raises(ValueError) as error:
        read_own(tmp_path)
    assert all(part in str(error.value) for part in ("train.jsonl, line 2", *parts)), error.value


def test_json_numbers_and_booleans_are_read_as_json_spells_them(tmp_path):
    lines = ['{"text": 5, "label": true, "extra": null}', '{"label": false, "text": "b"}', "", ""]
    own_folder(tmp_path, "\ufeff" + "\r\n".join(lines), "jsonl", labels=[False, True])
    texts, labels = read_own(tmp_path)
    assert texts == [("5",), ("b",)] and labels.tolist() == [1, 0]


def test_a_csv_is_read_with_its_quotes_and_a_tsv_without(tmp_path):
    rows = '\ufeffid, text ,label\r\n1,"a, ""b""\r\nc",good\r\n\r\n2,d\te, bad\r\n'
    texts, labels = read_own(own_folder(tmp_path / "a", rows, "csv"))
    assert texts == [('a, "b"\nc',), ("d\te",)] and labels.tolist() == [1, 0]
    texts, _ = read_own(own_folder(tmp_path / "b", 'text\tlabel\n"a ""b"""\tgood\n\n'))
    assert texts == [('"a ""b"""',)], "and an empty line at the end is no example"


@pytest.mark.parametrize("ending,text,parts", [
    ("tsv", 'text\tlabel\n"a\nb"\tgood\n', ("line 2: found 1 columns", "line breaks")),
    ("tsv", "text\tlabel\na\tb\tgood\n", ("line 2: found 3 columns", "tabs")),
    ("tsv", "text\tlabel\ttext\na\tgood\tb\n", ("two columns called text",)),
    ("csv", "text,label,label\na,good,bad\n", ("two columns called label",)),
    ("csv", 'text,label\n"a,good\n', ("is a quote missing?",)),
    ("tsv", "text,label\na,good\n", ("text,label; expected", "is it tab-separated?")),
    ("tsv", "text\tlabel\na\t\n", ("line 2: found the label ''",)),
    ("tsv", "text\nlabel\n", ("found the columns text; expected",)),
    ("jsonl", "", ("0 lines",)),
])
def test_rows_are_refused_and_never_left_out(ending, text, parts, tmp_path):
    own_folder(tmp_path, text, ending)
    with pytest.raises(ValueError) as error:
        read_own(tmp_path)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_score_outside_the_limits_is_refused_by_its_line(tmp_path):
    own_folder(tmp_path, "text\tlabel\na\t5\nb\t5.5\n", labels=[], limits=[0, 5])
    with pytest.raises(ValueError, match=r"line 3: found the score 5.5, expected 0 to 5"):
        read_own(tmp_path)
    own_folder(tmp_path, "text\tlabel\na\tgood\n", labels=[])
    with pytest.raises(ValueError, match='found the score \'good\'.* without "labels"'):
        read_own(tmp_path)


def test_labels_may_hold_spaces_and_accents_in_either_spelling(tmp_path):
    rows = "text\tlabel\na\t tre\u0300s bon \nb\tpas bon\n"
    _, labels = read_own(own_folder(tmp_path, rows, labels=["pas bon", "tr\u00e8s bon "]))
    assert labels.tolist() == [1, 0]


def test_a_message_about_a_label_does_not_list_thousands(tmp_path):
    own_folder(tmp_path, "text\tlabel\na\tx\n", labels=[f"label {i}" for i in range(5000)])
    with pytest.raises(ValueError, match="'x'") as error:
        read_own(tmp_path)
    assert len(str(error.value)) < 400 and "5,000" in str(error.value)


def test_a_split_is_one_file_and_a_missing_one_is_named_without_glue(tmp_path):
    folder = own_folder(tmp_path / "mrpc", "text\tlabel\na\tgood\n")
    write(folder / "dev.csv", "text,label\na,good\n")
    with pytest.raises(ValueError, match=r"found .*dev\.tsv and .*dev\.csv"):
        read_own(folder)
    (folder / "dev.csv").unlink()
    (folder / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError) as error:
        read_own(folder)
    assert f"{folder} holds no dev.tsv" in str(error.value) and "GLUE" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"SST-2/train\.tsv is missing"):
        glue.read_task(glue.TASKS["sst2"], str(tmp_path))


def test_the_hub_gives_the_same_examples_as_the_files(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pairs = [("a b", "c", 1), ('say "x', "d", 0), ("e", "f", 1)]
    configs = []
    for name, folder, words in (("mrpc", "MRPC", ("0", "1")),
                                ("rte", "RTE", ("entailment", "not_entailment"))):
        for split, stem in (("train", "train"), ("validation", "dev"), ("test", "test")):
            hidden = split == "test"
            (tmp_path / "hub" / name).mkdir(parents=True, exist_ok=True)
            table = dict(sentence1=[p[0] for p in pairs], sentence2=[p[1] for p in pairs],
                         idx=[0, 1, 2], label=[-1 if hidden else p[2] for p in pairs])
            parquet.write_table(pyarrow.table(table), tmp_path / f"hub/{name}/{split}.parquet")
            if name == "mrpc":
                lines = [f"{words[p[2]]}\t1\t2\t{p[0]}\t{p[1]}" for p in pairs]
                header = MRPC.replace("Quality", "index") if hidden else MRPC
            elif hidden:
                lines = [f"0\t{p[0]}\t{p[1]}" for p in pairs]
                header = "index\tsentence1\tsentence2\n"
            else:
                lines = [f"0\t{p[0]}\t{p[1]}\t{words[p[2]]}" for p in pairs]
                header = "index\tsentence1\tsentence2\tlabel\n"
            write(tmp_path / f"files/{folder}/{stem}.tsv", header + "\n".join(lines) + "\n")
        configs.append(f"- config_name: {name}\n  data_files:\n" + "".join(
            f"  - split: {split}\n    path: {name}/{split}.parquet\n"
            for split in ("train", "validation", "test")))
    write(tmp_path / "hub/README.md", "---\nconfigs:\n" + "".join(configs) + "---\n")
    for name in ("mrpc", "rte"):
        of_hub, _ = glue.load_hub(glue.TASKS[name], str(tmp_path / "hub"))
        of_files, _ = glue.read_task(glue.TASKS[name], str(tmp_path / "files"))
        assert list(of_hub) == list(of_files) == ["train", "dev", "test"]
        for split in of_files:
            assert of_hub[split][0] == of_files[split][0]
            assert (of_hub[split][1] is None) == (split == "test")
            assert split == "test" or of_hub[split][1].tolist() == of_files[split][1].tolist()


def test_a_task_of_ones_own_must_make_sense(tmp_path):
    for broken in ("{", '{"text": ["a"]}', '{"text": [], "label": "b"}',
                   '{"text": ["a"], "label": "b", "labels": ["x"]}',
                   '{"text": ["a"], "label": "b", "metrics": ["f1"]}',
                   '{"text": ["a"], "label": "b", "typo": 1}',
                   '{"text": ["a"], "label": "b", "limits": [5, 0]}',
                   '{"text": ["a"], "label": "b", "limits": 5}',
                   '{"text": ["a"], "label": "b", "epochs": 0}',
                   '{"text": ["a"], "label": "b", "lrs": ["x"]}',
                   '{"text": ["a"], "label": "b", "lrs": [5]}',
                   '{"text": ["a"], "label": "b", "labels": [1, 1]}',
                   '{"text": ["a"], "label": "b", "labels": ["x ", "x"]}',
                   '{"text": ["a"], "label": "b", "labels": [null, "x"]}',
                   '{"text": ["a"], "label": "b", "labels": ["a\\tb", "x"]}',
                   '{"text": ["a"], "label": "a"}', '{"text": ["a", "a"], "label": "b"}',
                   '{"text": ["a"], "text": ["c"], "label": "b"}', "[]"):
        write(tmp_path / "task.json", broken)
        with pytest.raises(ValueError, match="task.json"):
            glue.find_task(str(tmp_path))
    with pytest.raises(ValueError, match="expected one of cola, sst2"):
        glue.find_task("mrcp")


# ---- scores ---------------------------------------------------------------------

def test_scores_are_those_of_sklearn_and_scipy():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 200).astype(float), rng.integers(0, 2, 200).astype(float)
    found = glue.score(glue.TASKS["mrpc"], y, p)
    assert found == dict(accuracy=np.mean(y == p), mcc=sklearn.metrics.matthews_corrcoef(y, p),
                         f1=sklearn.metrics.f1_score(y, p))
    y, p = rng.normal(size=50), rng.normal(size=50)
    found = glue.score(glue.TASKS["stsb"], y, p)
    assert found["pearson"] == pytest.approx(np.corrcoef(y, p)[0, 1])
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(y, p)[0])
    assert glue.score(glue.TASKS["stsb"], y, np.ones(50)) == dict(pearson=0.0, spearman=0.0)


@pytest.mark.parametrize("kind,task", [("accuracy", "sst2"), ("f1", "mrpc"), ("mcc", "cola"),
                                       ("pearson", "stsb")])
def test_many_samples_at_once_score_as_one_by_one(kind, task):
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, (2, 5, 40)).astype(float)
    one_by_one = [glue.score(glue.TASKS[task], *pair)[kind] for pair in zip(y, p)]
    np.testing.assert_allclose(glue.score_samples(kind, y, p), one_by_one, atol=1e-12)


@pytest.mark.skipif(not (SHARED / "glue").is_dir(), reason="needs GLUE's files")
def test_the_majority_answer_to_mrpc_scores_what_everyone_reports():
    task = glue.TASKS["mrpc"]
    splits, _ = glue.read_task(task, str(SHARED / "glue"))
    labels = splits["dev"][1]
    found = glue.score(task, labels, np.full(len(labels), glue.majority(task, splits["train"][1])))
    assert round(found["accuracy"], 4) == 0.6838 and round(found["f1"], 4) == 0.8122
    assert found["mcc"] == 0


def test_the_bootstrap_is_the_same_in_parts_and_with_many_labels():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 50, (2, 60_000)).astype(float)
    many = dataclasses.replace(glue.TASKS["sst2"], labels=tuple(map(str, range(50))))
    draws = np.random.default_rng(0).integers(0, 60_000, (200, 60_000))
    expected = np.percentile((y[draws] == p[draws]).mean(1), (2.5, 97.5))
    assert glue.bootstrap(many, y, p, n=200) == expected.tolist()  # computed in two parts


def test_the_bootstrap_interval_is_as_wide_as_the_binomial():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400).astype(float)
    p = np.where(rng.random(400) < 0.8, y, 1 - y)
    low, high = glue.bootstrap(glue.TASKS["sst2"], y, p)
    assert high - low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 400) ** 0.5, rel=0.15)


# ---- rows and the head -------------------------------------------------------------

def test_pairs_are_framed_with_their_segments_and_the_longer_text_is_cut_first():
    tok = Tokenizer.load("byte")
    [row], [segment], cut = encode_texts([("abc", "de")], tok, 64)
    assert row.tolist() == [tok.cls_id, *b"abc", tok.sep_id, *b"de", tok.sep_id]
    assert segment.tolist() == [0, 1, 1, 1, 1, 2, 2, 2] and cut == 0
    [row], [segment], cut = encode_texts([("abcdefgh", "xy")], tok, 9)
    assert row.tolist() == [tok.cls_id, *b"abcd", tok.sep_id, *b"xy", tok.sep_id] and cut == 1
    for lengths, room in (([9, 2], 6), ([2, 9], 6), ([9, 9], 7), ([9, 8], 16), ([0, 9], 4),
                          ([50], 7)):
        kept = cut_lengths(lengths, room)
        assert sum(kept) == room and all(k <= n for k, n in zip(kept, lengths))
        assert all(k == n or k >= max(kept) - 1 for k, n in zip(kept, lengths)), (
            "only the longest is cut")


@pytest.mark.parametrize("n_texts", [1, 2])
@pytest.mark.parametrize("arch", ["open", "strict", "transformer"])
def test_padding_and_batch_do_not_change_an_answer(arch, n_texts):
    tok = Tokenizer.load("byte")
    torch.manual_seed(0)
    settings = dict(vocab_size=tok.vocab_size, block_size=64, n_layer=2, n_head=2, ffn_dim=32,
                    token_dim=64, mask_id=tok.mask_id)
    if arch == "transformer":
        settings |= dict(arch="transformer")
    else:
        settings |= dict(bottleneck=arch, n_concept=4, concept_dim=32, hide_masked=True)
    model = Classifier(build_model(settings), 2, n_texts)
    model.init_special_tokens(tok)
    torch.nn.init.normal_(model.segments)
    texts = [texts[:n_texts] for texts in (("a", "b"), ("longer " * 4, "c"), ("", "x"))]
    rows, segments, _ = encode_texts(texts, tok, 64)
    together = predict(model, (rows, segments), tok.pad_id, find_machine("cpu"), "fp32")
    for i in range(3):
        alone = model(*padded(rows[i:i + 1], segments[i:i + 1], tok.pad_id)).detach().numpy()
        np.testing.assert_allclose(alone[0], together[i], atol=2e-5)
    assert np.ptp(together[:, 0]) > 0
    ids, kinds, real = padded(rows, segments, 0)
    without = model(ids, 0 * kinds, real)
    assert not np.allclose(without.detach().numpy(), together, atol=1e-4), "segments matter"


def test_kept_concepts_keep_their_words_and_take_over_those_of_the_others():
    settings = dict(vocab_size=64, block_size=16, n_layer=2, n_head=2, ffn_dim=32, token_dim=64,
                    n_concept=4, concept_dim=32, n_mixer=0)
    torch.manual_seed(0)
    whole = build_model(settings)
    part_settings, weights = keep_concepts(settings, whole.state_dict(), 2)
    part = build_model(part_settings)
    part.load_state_dict(weights)
    of_kept = torch.tensor([[0, 1, 4, 5, 20, 21, 40, 41]])  # ids of concepts 0 and 1 alone
    of_others = 2 * torch.arange(8)[None]  # even ids, half of which were concept 2's
    for ids, same in ((of_kept, True), (of_others, False)):
        assert torch.allclose(whole.encode(ids)[0][:, :2], part.encode(ids)[0], atol=1e-6) == same
    for n in (0, 9):
        assert keep_concepts(settings, weights, n)[0] == settings
    for all_kept in (dict(arch="transformer"), settings | dict(anchored=True)):
        assert keep_concepts(all_kept, weights, 2) == (all_kept, weights)


def test_a_number_of_concepts_is_refused_where_they_have_places(own_task, data_dir, tmp_path):
    call("train.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--bottleneck=strict",
         "--block_size=64", "--n_layer=1", "--n_concept=4", "--concept_dim=32", "--token_dim=64",
         "--ffn_dim=32", "--batch_size=2", "--micro_batch=2", "--max_steps=1", "--eval_rows=2",
         "--health_rows=0", "--init_table=random")
    done = call("finetune_glue.py", f"--out_dir={tmp_path}", f"--task={own_task / 'alike'}",
                "--n_concept=2", ok=False)
    refused(done, "n_concept=2 has no effect here", "leave it at 0")


def test_more_concepts_than_there_are_are_refused(trained, own_task):
    done = finetune(trained, own_task / "alike", "--n_concept=999", ok=False)
    refused(done, "n_concept=999 has no effect here", "concepts; leave it at 0")


def test_scores_of_other_weights_leave_the_table(trained, own_task, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("glue*"))
    args = ["--seeds=1", "--epochs=1", "--lrs=1e-3"]
    finetune(out, own_task / "mood", *args)
    path, name = out / "best.pt", "mood"
    saved = torch.load(path, weights_only=True)
    saved["model"]["wte"] += 0.01  # as if it had been trained on
    torch.save(saved, path)
    done = finetune(out, own_task / "alike", *args)
    assert f"{name} is left out of glue.json: its scores are of other weights" in done.stdout
    assert list(json.loads((out / "glue.json").read_text())) == ["alike"]
    assert list((out / "glue/mood").glob("*.json")), "its runs stay"


def test_runs_of_pairs_with_an_earlier_head_do_not_count(own_task, data_dir, tmp_path):
    """A Transformer once compared the means of token states, and the run does not say so."""
    call("train.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--arch=transformer",
         "--block_size=64", "--n_layer=1", "--n_head=2", "--token_dim=64", "--ffn_dim=32",
         "--batch_size=2", "--micro_batch=2", "--max_steps=1", "--eval_rows=2",
         "--init_table=random")
    args = ["--seeds=1", "--epochs=1", "--lrs=1e-3"]
    for name, again in (("alike", True), ("mood", False)):
        finetune(tmp_path, own_task / name, "--n_concept=0", *args)
        path = next((tmp_path / "glue" / name).glob("pretrained*.json"))
        report = json.loads(path.read_text())
        assert report.pop("aligned") == again
        path.write_text(json.dumps(report))
        finetune(tmp_path, own_task / name, "--n_concept=0", *args)
        assert ("aligned" in json.loads(path.read_text())) == again


def test_runs_from_before_freeze_table_count_and_damaged_ones_run_again(
        trained, own_task, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("glue*"))
    args = [out, own_task / "mood", "--seeds=1", "--epochs=1", "--lrs=1e-3", "--n_concept=2"]
    finetune(*args)
    path = next((out / "glue" / "mood").glob("pretrained*.json"))
    report = json.loads(path.read_text())
    assert report["recipe"].pop("freeze_table") is False
    for change, again in (({}, False), (dict(recipe=None), True), (dict(recipe=[1]), True)):
        path.write_text(json.dumps(report | change))
        finetune(*args)
        assert ("freeze_table" in json.loads(path.read_text())["recipe"]) == again
    finetune(*args, "--freeze_table=1")
    assert json.loads(path.read_text())["recipe"]["freeze_table"] is True


@torch.no_grad()
def test_texts_are_compared_by_what_is_alike_and_in_no_order():
    """Each concept with those of the other text that stand in it, wherever they stand."""
    torch.manual_seed(0)
    encoder = build_model(dict(vocab_size=64, block_size=16, n_layer=1, n_head=2, ffn_dim=32,
                               token_dim=32, n_concept=8, concept_dim=32, bottleneck="strict"))
    model = Classifier(encoder, 2, 2).eval()
    u, v = torch.randn(2, 3, 8, 32)
    counts = torch.arange(8)[:, None] < torch.tensor([3, 5, 8])[:, None, None]
    found = alike(u, v, counts)
    for b, n in enumerate((3, 5, 8)):
        weights = (u[b] @ v[b, :n].T / 32**0.5).softmax(-1)
        assert torch.allclose(found[b], weights @ v[b, :n], atol=1e-5)
    turned = v.flip(1)
    assert torch.allclose(alike(u, turned, counts.flip(1)), found, atol=1e-5)
    first = model.comparison(u[:1, :3], found[:1, :3], counts[:1, :3])
    assert torch.allclose(model.comparison(u, found, counts)[:1], first, atol=1e-6)


def test_batches_hold_every_row_once_and_little_padding():
    rng = np.random.default_rng(0)
    rows = [np.zeros(n, dtype=int) for n in rng.integers(5, 100, 1000)]
    batches = in_batches(rows, 16, rng)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    filled = sum(map(len, rows)) / sum(len(b) * max(len(rows[i]) for i in b) for b in batches)
    assert filled > 0.95


# ---- the command -----------------------------------------------------------------------

@pytest.fixture(scope="module")
def tuned(trained, own_task):
    """finetune_glue.py on both tasks of one's own, with the untrained control."""
    args = ["finetune_glue.py", f"--out_dir={trained}", "--lrs=3e-3", *SMALL]
    call(*args, f"--task={own_task}/alike", "--seeds=1", "--epochs=10")
    args += [f"--task={own_task}/mood", "--seeds=2"]
    return trained, args, result(call(*args, "--controls=untrained"))


def test_written_predictions_give_the_reported_scores(tuned):
    out, _, _ = tuned
    found = json.loads((out / "glue.json").read_text())
    mood, alike = found["mood"], found["alike"]
    for run_ in mood["runs"]:
        rows = read_tsv(out / f"glue/mood/pretrained_lr0.003_seed{run_['seed']}.dev.tsv")
        y, p = ([row[name] for row in rows] for name in ("label", "prediction"))
        assert len(rows) == 40
        assert sklearn.metrics.accuracy_score(y, p) == run_["metrics"]["accuracy"]
        assert sklearn.metrics.f1_score(y, p, pos_label="good") == run_["metrics"]["f1"]
    for run_ in alike["runs"]:
        rows = read_tsv(out / f"glue/alike/pretrained_lr0.003_seed{run_['seed']}.dev.tsv")
        y, p = ([float(row[name]) for row in rows] for name in ("label", "prediction"))
        assert scipy.stats.pearsonr(y, p)[0] == run_["metrics"]["pearson"]
        assert min(p) == 1.5 and max(p) == 4.5, "scores are clipped to the task's limits"
    assert mood["median"]["accuracy"] > 0.9 > mood["majority"]["accuracy"], "the task is learned"
    assert mood["min"]["accuracy"] <= mood["median"]["accuracy"] <= mood["max"]["accuracy"]
    assert set(mood["controls"]) == {"untrained"}
    assert len(mood["controls"]["untrained"]["runs"]) == 2
    assert len(read_tsv(out / "glue/mood/pretrained_lr0.003_seed1.test.tsv")) == 7
    table = (out / "glue.md").read_text()
    assert "majority answer" in table and "untrained" in table and "95 %" in table


def test_a_killed_run_goes_on_and_nothing_finished_is_run_again(tuned, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Fork)
    Fork.started.clear()
    out, args, before = tuned
    kept, lost = (out / f"glue/mood/pretrained_lr0.003_seed{seed}.json" for seed in (1, 2))
    content, time = lost.read_bytes(), kept.stat().st_mtime
    lost.write_bytes(content[:100])  # as a kill leaves it at worst
    again = result(call(*args, "--jobs=2"))  # in processes of their own this time
    assert len(Fork.started) == 1
    assert again["mood"]["median"] == before["mood"]["median"] and kept.stat().st_mtime == time
    fresh, old = json.loads(lost.read_text()), json.loads(content)
    assert fresh["history"] == old["history"], "the same seed gives the same run"


def test_the_weights_that_are_kept_are_those_of_the_best_run_of_the_table(
        trained, own_task, tmp_path):
    out, model = tmp_path / "run", tmp_path / "run/glue/mood/model.pt"
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("glue*"))
    args = ["--seeds=1", "--epochs=1"]
    finetune(out, own_task / "mood", *args, "--lrs=1e-3")
    first = file_hash(model)
    finetune(out, own_task / "mood", *args, "--lrs=3e-3")
    assert file_hash(model) != first
    finetune(out, own_task / "mood", *args, "--lrs=1e-3")
    assert file_hash(model) == first, "made again: those of another rate had replaced them"
    model.unlink()
    finetune(out, own_task / "mood", *args, "--lrs=1e-3")
    assert file_hash(model) == first


def test_a_full_disk_is_one_message_and_the_same_command_goes_on(trained, own_task, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("glue*"))
    args = ["--seeds=1", "--lrs=3e-3"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # stands in for the disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        done = finetune(out, own_task / "mood", *args, ok=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(done, "could not be written", "the same command goes on")
    assert not list(out.rglob("*.tmp"))
    done = result(finetune(out, own_task / "mood", *args))
    assert done["mood"]["median"]["accuracy"] > 0.9
    shutil.copytree(own_task / "mood", tmp_path / "mood")
    dev = tmp_path / "mood" / "dev.tsv"
    dev.write_text(dev.read_text().replace("bad", "?").replace("good", "bad").replace("?", "good"))
    other = result(finetune(out, tmp_path / "mood", *args))
    assert other["mood"] == done["mood"], "a folder that ends alike leaves them as they are"
    (name,) = other.keys() - {"mood"}
    assert name.endswith("_mood") and other[name]["median"]["accuracy"] < 0.5
    changed = own_task / "mood" / "dev.tsv"
    original = changed.read_text()
    changed.write_text(dev.read_text())
    done = result(finetune(out, own_task / "mood", *args))
    changed.write_text(original)
    assert done["mood"]["median"]["accuracy"] < 0.5, "results of other data are not reused"


def test_another_task_starts_from_the_weights_of_the_first(tuned, own_task):
    out, _, _ = tuned
    saved = torch.load(out / "glue/mood/model.pt", weights_only=True)
    assert saved["labels"] == ["bad", "good"] and saved["task"] == "mood"
    done = result(finetune(out, own_task / "mood", "--seeds=1", "--lrs=1e-3", "--epochs=1",
                           f"--init_from_task={out}/glue/mood"))
    assert done["mood_from_mood"]["median"]["accuracy"] > 0.9, "one epoch is enough"
    assert "mood" in done, "and what was measured without it is still there"
    again = torch.load(out / "glue/mood/model.pt", weights_only=True)
    assert all(torch.equal(again["model"][name], t) for name, t in saved["model"].items())
    assert (out / "glue/mood_from_mood/model.pt").exists(), "each has a folder of its own"


def test_a_constant_answer_is_called_one(trained, own_task):
    finetune(trained, own_task / "same", "--seeds=1", "--lrs=3e-3")
    found = json.loads((trained / "glue.json").read_text())["same"]
    assert found["degenerate"] == 1 and found["median"]["mcc"] == 0
    assert "constant answers 1" in (trained / "glue.md").read_text()


def test_a_loss_that_is_not_a_number_stops_the_run_and_is_counted(trained, own_task, monkeypatch):
    forward, calls = Classifier.forward, []

    def breaks(self, *batch):
        calls.append(self.training)
        in_second_epoch = self.training and sum(calls) == 15
        return forward(self, *batch) * (math.nan if in_second_epoch else 1)
    monkeypatch.setattr(Classifier, "forward", breaks)
    finetune(trained, own_task / "mood", "--seeds=1", "--lrs=2e-3")
    (run_,) = json.loads((trained / "glue.json").read_text())["mood"]["runs"]
    assert run_["diverged"] and run_["epochs"] == 2
    assert "diverged 1" in (trained / "glue.md").read_text()
    assert 0 <= run_["metrics"]["accuracy"] <= 1 and run_["interval"][0] <= run_["interval"][1]
    model = torch.load(trained / "glue/mood/model.pt", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in model.values()), "the update was left out"


def test_memory_that_runs_out_names_a_batch_size_that_fits(trained, own_task, monkeypatch):
    forward = Classifier.forward

    def little_memory(self, ids, *others):
        if len(ids) > 3:
            raise RuntimeError("can't allocate memory: you tried to allocate too much")
        return forward(self, ids, *others)
    monkeypatch.setattr(Classifier, "forward", little_memory)
    done = finetune(trained, own_task / "mood", "--seeds=1", "--lrs=1e-5", ok=False)
    refused(done, "error: 8 rows of", "do not fit into memory; --batch_size=2 does")


@pytest.mark.parametrize("arguments,parts", [
    (["--task=mrcp"], ("'mrcp'", "expected one of cola")),
    (["--task=mrpc", "--glue_dir=nowhere"], ("nowhere/MRPC/train.tsv is missing",)),
    (["--task=mrpc", "--glue_dir=nowhere", "--seeds=0"], ("seeds",)),
    (["--task=mrpc", "--glue_dir=nowhere", "--lrs=fast"], ("lrs='fast'", "1e-4,3e-4")),
    (["--task=mrpc", "--glue_dir=nowhere", "--lrs=-1e-3"], ("lrs='-1e-3'",)),
    (["--task=mrpc", "--glue_dir=nowhere", "--lrs=1-4"], ("lrs='1-4'",)),
    (["--task=mrpc", "--glue_dir=nowhere", "--dropout=1"], ("dropout=1",)),
    (["--task=mrpc", "--glue_dir=nowhere", "--weight_decay=nan"], ("weight_decay=nan",)),
    (["--task=mrpc", "--glue_dir=nowhere", "--dtype=int8"], ("dtype='int8'",)),
    (["--task=mrpc", "--init_from_task=nowhere"], ("no model.pt there", "--task=mnli")),
    (["--task=mrpc", "--learning_rate=1"], ("unknown setting 'learning_rate'",)),
])
def test_bad_settings_are_refused(arguments, parts, trained):
    refused(call("finetune_glue.py", f"--out_dir={trained}", *arguments, ok=False), *parts)


@pytest.fixture(scope="module")
def alike_names(trained, own_task, tmp_path_factory):
    """One command on three tasks and two controls of which several end alike -> its folders."""
    root = tmp_path_factory.mktemp("names")
    for folder in ("o/run", "o/c1/run", "o/c2/run"):
        shutil.copytree(trained, root / folder, ignore=shutil.ignore_patterns("glue*"))
    tasks = [root / "a/mood", root / "b/mood", root / "x/mrpc"]
    for number, folder in enumerate(tasks):
        shutil.copytree(own_task / "mood", folder)
        write(folder / "dev.tsv", f"line\tverdict\n{number} warm\tgood\n{number} dull\tbad\n")
    args = ["finetune_glue.py", f"--out_dir={root}/o/run", *SMALL, "--epochs=1", "--seeds=1",
            f"--task={','.join(map(str, tasks))}", f"--controls={root}/o/c1/run,{root}/o/c2/run"]
    return root, args, call(*args).stdout


def test_tasks_and_controls_that_end_alike_keep_their_own_results(alike_names):
    root, args, said = alike_names
    found = json.loads((root / "o/run/glue.json").read_text())
    folders = {name: entry["folder"] for name, entry in found.items()}
    assert folders == {"mood": f"{root}/a/mood", "b_mood": f"{root}/b/mood",
                       "x_mrpc": f"{root}/x/mrpc"}
    assert f"{root}/b/mood is called b_mood" in said
    for name, entry in found.items():
        assert set(entry["controls"]) == {"run", "c2_run"}
        predicted = sorted(path.name for path in (root / "o/run/glue" / name).glob("*.dev.tsv"))
        assert [path.split("_lr")[0] for path in predicted] == ["c2_run", "pretrained", "run"]
    # another command, with the second ones alone, knows them again and repeats nothing
    table = (root / "o/run/glue.md").read_text()
    args = [arg.replace(f"{root}/a/mood,", "").replace(f"{root}/o/c1/run,", "") for arg in args]
    assert "after epoch" not in call(*args).stdout
    assert "c2_run" in (root / "o/run/glue.md").read_text() and "c2_run" in table


def test_a_folder_of_ones_own_is_never_compared_or_submitted_as_glue(alike_names):
    root, args, said = alike_names
    table = (root / "o/run/glue.md").read_text()
    assert not any(word in said + table for word in ("GLUE", "BERT", "submission", "mcc", "MCC"))
    assert not (root / "o/run/glue_submission.zip").exists()
    last = json.loads(said.splitlines()[-1])
    assert list(last["x_mrpc"]["median"]) == ["accuracy"]


def test_a_folder_of_ones_own_is_three_runs_unless_more_are_asked_for(trained, own_task):
    done = call("finetune_glue.py", f"--out_dir={trained}", f"--task={own_task}/same", "--epochs=1",
                "--device=cpu")
    assert "same: 3 runs of up to 1 epochs on 16 examples" in done.stdout
    found = json.loads((trained / "glue.json").read_text())["same"]
    assert len(found["runs"]) == 3 and found["lr"] == 3e-4 and "--grid_seeds=3" in done.stdout
    assert {(task.seeds, task.grid_seeds) for task in glue.TASKS.values()} == {(5, 3)}


def test_a_missing_run_is_named_before_anything_else(tmp_path):
    for more in ((), ("--task=typo",), ("--lrs=fast",), ("--init_from_task=nowhere",)):
        done = call("finetune_glue.py", f"--out_dir={tmp_path}/typo", *more, ok=False)
        refused(done, "typo holds no checkpoint")
    assert not list(tmp_path.iterdir())


def test_a_run_given_by_its_checkpoint_has_its_results_beside_it(trained, own_task, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("glue*"))
    args = ["--seeds=1", "--epochs=1", "--lrs=1e-3", f"--controls={out}/ckpt.pt, untrained"]
    done = result(finetune(out / "best.pt", own_task / "mood", *args))
    found = json.loads((out / "glue.json").read_text())
    assert list(found) == list(done) == ["mood"]
    assert set(found["mood"]["controls"]) == {"ckpt.pt", "untrained"}


def test_a_task_without_training_data_is_refused_by_itself(trained, tmp_path):
    write(tmp_path / "AX/test.tsv", "index\tsentence1\tsentence2\n0\ta\tb\n")
    refused(finetune(trained, "ax", f"--glue_dir={tmp_path}", ok=False), "--task=mnli answers it")


@pytest.mark.parametrize("name,content", [
    ("glue.md", "my notes"), ("glue_submission.zip", "mine"), ("glue.json", '{"mine": 1}'),
    ("glue.json", '{"mine": {"median": {"accuracy": 1}}}'), ("glue/mood/model.pt", "mine"),
    ("glue/names.json", "[]")])
def test_files_that_are_not_of_this_command_stay(name, content, trained, own_task, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("glue*"))
    write(out / name, content)
    refused(finetune(out, own_task / "mood", "--seeds=1", ok=False), name)
    assert (out / name).read_text() == content
    assert not list(out.rglob("*_seed1*")), "before any work"


def test_equal_rates_and_tasks_run_once_and_near_ones_apart(trained, own_task, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("glue*"))
    args = ["--seeds=1", "--grid_seeds=1", "--epochs=1", "--lrs=1e-3,1e-3,0.00100000001"]
    done = finetune(out, f"{own_task}/mood,{own_task}/mood/", *args)
    assert done.stdout.count("after epoch") == 3, "two of the grid, one that is reported"
    assert len(list(out.rglob("*_seed101.json"))) == 2


def test_an_output_that_is_gone_does_not_end_it(tuned, tmp_path):
    out, args, _ = tuned
    (out / "glue.md").unlink()
    errors = write(tmp_path / "errors", "")
    process = fork(ROOT, args, "/dev/full", errors)
    process.join(60)
    assert process.exitcode == 0, errors.read_text()
    assert "majority answer" in (out / "glue.md").read_text(), "it went on to its end"


def test_processes_of_a_killed_command_hold_its_lock(tmp_path):
    with FolderLock(tmp_path / "out") as lock:
        os.set_inheritable(lock.descriptor, True)
        code = f"import os; os.fstat({lock.descriptor})"  # fails where it is closed
        assert run_python(["-c", code], tmp_path / "log", 0, 2) == 0
    assert "os.set_inheritable(lock.descriptor, True)" in (ROOT / "finetune_glue.py").read_text()


def test_ctrl_c_says_that_the_same_command_goes_on(trained, own_task, monkeypatch):
    def stops(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(Classifier, "forward", stops)
    done = finetune(trained, own_task / "mood", "--seeds=1", "--lrs=1e-5", ok=False)
    refused(done, "stopped; what was finished is kept")


def test_weights_of_a_task_from_before_a_setting_was_there_still_start_another(tuned, own_task,
                                                                                tmp_path):
    out, _, _ = tuned
    saved = torch.load(out / "glue/mood/model.pt", weights_only=True)
    model, tok, _ = load_run(str(out), "cpu")
    classifier = make_classifier(model, tok, glue.find_task(str(own_task / "mood")),
                                 Recipe(2, 1, 8, 48), seed=0)
    added_since = [field.name for field in dataclasses.fields(ConceptConfig)
                   if saved["model_settings"][field.name] == field.default]
    assert len(added_since) > 3
    for name in added_since:
        del saved["model_settings"][name]
    torch.save(saved, tmp_path / "model.pt")
    take_task_weights(classifier, str(tmp_path), tok)
    assert torch.equal(classifier.encoder.concepts, saved["model"]["concepts"])
    settings = saved["model_settings"]
    for broken, part in ((dict(model_settings=settings | dict(n_concept=4)), "n_concept: 4 there"),
                         (dict(model_settings=settings | dict(new=1)), "new: 1 there, None here"),
                         (dict(model_settings=settings | dict(arch="old")), "arch='old'"),
                         (dict(tokenizer_fingerprint="other"), "the tokenizer"),
                         (dict(model={}), "written with another model.py"),
                         (None, "was not written by fine-tuning: it has no head")):
        torch.save(saved | broken if broken else dict(model={}), tmp_path / "model.pt")
        with pytest.raises(ValueError, match=part):
            take_task_weights(classifier, str(tmp_path), tok)


def test_two_runs_in_one_folder_are_refused(trained, own_task):
    with FolderLock(trained / "glue"):  # each would write its own glue.json over the other's
        refused(finetune(trained, own_task / "mood", ok=False), "another run is fine-tuning in",
                "--jobs")


def test_a_damaged_table_is_named_and_its_runs_are_kept(tuned):
    out, args, _ = tuned
    before = (out / "glue.json").read_text()
    for damage in (before[:100], "[1]", ""):
        (out / "glue.json").write_text(damage)
        refused(call(*args, ok=False), "glue.json is damaged", "rm ")
    (out / "glue.json").write_text(before)


def test_a_folder_without_a_model_is_refused(tmp_path, own_task):
    refused(finetune(tmp_path, own_task / "mood", ok=False), "no checkpoint", "train.py")


# ---- what comes out ----------------------------------------------------------------------

def test_the_submission_has_eleven_files_as_the_server_wants_them(tmp_path):
    runs = {}
    for name, task in glue.TASKS.items():
        runs[name] = str(tmp_path / name)
        for split in task.test + (("ax",) if name == "mnli" else ()):
            values = [0.0, 1.0] if task.labels else [0.0, 4.125]
            glue.write_predictions(f"{runs[name]}.{split}.tsv", task, dict(prediction=values))
    without_rte = {name: path for name, path in runs.items() if name != "rte"}
    assert write_submission(str(tmp_path / "s.zip"), without_rte) == ["RTE.tsv"]
    assert not (tmp_path / "s.zip").exists(), "never an incomplete one"
    assert write_submission(str(tmp_path / "s.zip"), runs) == []
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        files = {name: archive.read(name).decode().splitlines() for name in archive.namelist()}
    assert sorted(files) == sorted(f"{name}.tsv" for name in (
        "CoLA SST-2 MRPC STS-B QQP MNLI-m MNLI-mm QNLI RTE WNLI AX").split())
    assert all(lines[0] == "index\tprediction" for lines in files.values())
    assert files["STS-B.tsv"][1:] == ["0\t0.0", "1\t4.125"]
    assert files["CoLA.tsv"][1:] == ["0\t0", "1\t1"]
    assert files["RTE.tsv"][1:] == ["0\tentailment", "1\tnot_entailment"]
    assert files["MNLI-mm.tsv"][1:] == files["AX.tsv"][1:] == ["0\tentailment", "1\tneutral"]


def test_the_name_of_a_folder_does_not_make_it_a_task_of_glue():
    part = dict(median=dict(accuracy=0.7, mcc=0.2, f1=0.8), params="3.0M",
                majority=dict(accuracy=0.6, mcc=0, f1=0),
                controls={}, runs=[{}], min=dict(accuracy=0.6, mcc=0.1, f1=0.7),
                max=dict(accuracy=0.7, mcc=0.3, f1=0.9), interval_of_median=[0, 1],
                last_median=dict(accuracy=0.7, mcc=0.2, f1=0.7), lr=1e-3, metric="f1",
                degenerate=0, diverged=0, cut={}, notes=[])
    own = markdown(dict(cola_from_mnli=part | dict(official="")), "a model")
    assert "cola_from_mnli f1" in own and "80.0 [70.0-90.0]" in own and "BERT" not in own
    barred = markdown({"a|b": part | dict(official="", controls={"c|d": part})}, "a model")
    assert "| a\\|b f1 |" in barred and "| c\\|d |" in barred
    own = markdown(dict(mrpc=part | dict(official="")), "a model")  # from before names were kept
    assert "mrpc f1" in own and "BERT" not in own and "mcc" not in own
    official = markdown(dict(cola_from_mnli=part | dict(official="cola")), "a model")
    assert "CoLA MCC (cola_from_mnli)" in official and "20.0 [10.0-30.0]" in official
    assert "BERT" not in official


def test_the_table_says_f1_before_accuracy_and_names_its_sources():
    part = dict(median=dict(accuracy=0.7, f1=0.8), majority=dict(accuracy=0.68, f1=0.81),
                params="3.0M", controls={}, runs=[{}],
                min=dict(accuracy=0.6, f1=0.75), max=dict(accuracy=0.71, f1=0.82),
                interval_of_median=[0.6, 0.8], last_median=dict(accuracy=0.69, f1=0.79), lr=1e-3,
                metric="accuracy and f1", degenerate=0, diverged=0, cut={}, notes=["a note"])
    assert cell("mrpc", part) == "80.0 [75.0-82.0]/70.0 [60.0-71.0]"
    table = markdown(dict(mrpc=part), "a model")
    assert "| BERT-small | 29.1M | test | 83.4/76.2 |" in table and "google-research/bert" in table
    assert "a note" in table
