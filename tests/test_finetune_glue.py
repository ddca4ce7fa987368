"""finetune_glue.py: files are read as they are, scores can be recomputed, no run is lost."""

import csv
import json
import math
import random
import resource
import shutil
import zipfile

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from conftest import SHARED, call, refused, result, run

from data.tokenizer import Tokenizer
from lib import glue
from lib.files import FolderLock
from lib.heads import (
    Classifier,
    cut_lengths,
    encode_texts,
    in_batches,
    keep_concepts,
    padded,
    predict,
)
from lib.leaderboard import cell, markdown, write_submission
from lib.machine import find_machine
from lib.run import build_model

MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
SMALL = ["--dtype=fp32", "--device=cpu", "--epochs=8", "--batch_size=8", "--max_tokens=48",
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
            lines.append(f"{a}\t{b}\t{10 * (a_mood == b_mood) + rng.random():.2f}")
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
                   '{"text": ["a"], "label": "b", "labels": [1, 1]}', "[]"):
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
    transformer = dict(arch="transformer")
    assert keep_concepts(transformer, weights, 2) == (transformer, weights)


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
    call(*args, f"--task={own_task}/alike", "--seeds=1")
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


def test_a_killed_run_goes_on_and_nothing_finished_is_run_again(tuned):
    out, args, before = tuned
    kept, lost = (out / f"glue/mood/pretrained_lr0.003_seed{seed}.json" for seed in (1, 2))
    content, time = lost.read_bytes(), kept.stat().st_mtime
    lost.write_bytes(content[:100])  # as a kill leaves it at worst
    again = result(run(*args, "--jobs=2"))  # in processes of their own this time
    assert again["mood"]["median"] == before["mood"]["median"] and kept.stat().st_mtime == time
    fresh, old = json.loads(lost.read_text()), json.loads(content)
    assert fresh["history"] == old["history"], "the same seed gives the same run"


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
    done = result(finetune(out, tmp_path / "mood", *args))
    assert done["mood"]["median"]["accuracy"] < 0.5, "results of other data are not reused"


def test_another_task_starts_from_the_weights_of_the_first(tuned, own_task):
    out, _, _ = tuned
    saved = torch.load(out / "glue/mood/model.pt", weights_only=True)
    assert saved["labels"] == ["bad", "good"] and saved["task"] == "mood"
    done = result(finetune(out, own_task / "mood", "--seeds=1", "--lrs=1e-3", "--epochs=1",
                           f"--init_from_task={out}/glue/mood"))
    assert done["mood_from_mood"]["median"]["accuracy"] > 0.9, "one epoch is enough"
    assert "mood" in done, "and what was measured without it is still there"


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
    (["--task=mrpc", "--init_from_task=nowhere"], ("no model.pt there", "--task=mnli")),
    (["--task=mrpc", "--learning_rate=1"], ("unknown setting 'learning_rate'",)),
])
def test_bad_settings_are_refused(arguments, parts, trained):
    refused(call("finetune_glue.py", f"--out_dir={trained}", *arguments, ok=False), *parts)


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
