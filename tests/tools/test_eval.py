"""tools/eval.py beyond the losses: pseudo-log-likelihood, several data sets, speed, and the files
that it writes."""

import json
import math
import os
import shutil
from collections import Counter
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused, result, run
from scipy.stats import percentileofscore

from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib.evaluation import SPLITS
from lib.files import write_json
from lib.log import curriculum_stages, draw_curves, read_log
from lib.machine import find_machine
from lib.run import load_run, lock_folder, model_state, save_checkpoint
from lib.settings import build_model
from tools import measures, metrics
from tools.compare import draw_losses
from tools.pll import pseudo_log_likelihood
from tools.terminal import columns

CPU = find_machine("cpu")
TEXTS = ["The unhappiness of Zürich (1848)...", "", "Don't!", "a  b\u2003c",
         "A model reads 12,345 words; \U0001f600\U0001f600 it says."]


def make_run(folder, tok, data_dir="", arch="concept", **changes):
    """The folder of a training run with random weights."""
    shape = dict(vocab_size=tok.vocab_size, block_size=64, n_layer=1, n_head=2, token_dim=64,
                 ffn_dim=32, mask_id=tok.mask_id, eot_id=tok.eot_id)
    shape |= dict(n_concept=6, concept_dim=32) if arch == "concept" else {}
    torch.manual_seed(0)
    model = build_model(dict(arch=arch) | shape | changes)
    with torch.no_grad():
        for p in model.parameters():  # predictions of a fresh model hardly depend on what it reads
            p *= 1.5
    settings, weights = model_state(model)
    os.makedirs(folder, exist_ok=True)
    trained = dict(data_dir=str(data_dir), seed=3, learning_rate=1e-3, batch_size=8, micro_batch=4,
                   optimizer="adamw", masking_type="span", mlm_probability=0.3)
    checkpoint = dict(model_settings=settings, model=weights, settings=trained, step=7, tokens=3584,
                      best_loss=5.5, data_sha256="", tokenizer_fingerprint=tok.fingerprint)
    save_checkpoint(folder, checkpoint, "best.pt")
    tok.save(os.path.join(folder, "tokenizer"))
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(dict(git="abc1234", torch="2.13.0"), file)
    with open(os.path.join(folder, "log.jsonl"), "w") as file:
        for step in range(1, 10):  # the checkpoint is of step 7
            record = dict(step=step, loss=9.0 - step, tokens=512 * step, tokens_per_s=100.0 * step,
                          mfu=0.25, minutes=0.5 * step)
            file.write(json.dumps(record) + "\n")
    return str(folder)


@pytest.fixture(scope="session")
def bpe():
    return Tokenizer.train([path.read_text() for path in sorted(ROOT.glob("*.py"))], 700)


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """Random models on the bytes of data_dir: concept and transformer."""
    folder, tok = tmp_path_factory.mktemp("runs"), Tokenizer.load(str(data_dir / "tokenizer"))
    return {arch: make_run(folder / arch, tok, data_dir, arch)
            for arch in ("concept", "transformer")}


# ---- pseudo-log-likelihood ------------------------------------------------------

def word_of(tok, ids, i):
    """Number of the word token i stands in, by the sentence in Tokenizer's docstring."""
    starts = [j for j in range(1, i + 1) if tok.starts_word[ids[j]] and not (
        tok.starts_punct[ids[j]] and tok.ends_punct[ids[j - 1]])]
    return len(starts)


@torch.no_grad()
def plain_loop(model, tok, text, later=True):
    """Nats of a text, one forward pass a token.

    later=False is the PLL of Salazar et al., which masks token i alone.
    """
    ids, nats = [tok.eot_id, *tok.encode([text])[0].tolist(), tok.eot_id], 0.0
    for i in range(1, len(ids) - 1):
        masked = list(ids)
        masked[i] = tok.mask_id
        for j in range(i + 1, len(ids) - 1):
            if later and word_of(tok, ids, j) == word_of(tok, ids, i):
                masked[j] = tok.mask_id
        masked = torch.tensor([masked])
        states = model.decode(*model.encode(masked), torch.tensor([[i]]), model.documents(masked))
        nats -= model.logits(states)[0, 0].log_softmax(-1)[ids[i]].item()
    return nats


@pytest.mark.parametrize("name, shape", [
    ("byte", dict(bottleneck="open")), ("bpe", dict(bottleneck="strict", hide_masked=True)),
    ("bpe", dict(bottleneck="open", isolate_documents=True)), ("bpe", dict(arch="transformer"))])
def test_pll_word_l2r_is_what_a_plain_loop_gives(name, shape, bpe, tmp_path):
    tok = Tokenizer.load("byte") if name == "byte" else bpe
    model, *_ = load_run(make_run(tmp_path / "run", tok, **shape), "cpu")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    found = pseudo_log_likelihood(model, str(tmp_path / "texts.txt"), tok, CPU, "fp32", 99, 64,
                                  batch_tokens=200)
    kept = [text for text in TEXTS if text]
    assert found["texts"] == 4 and found["left_out"] == 0
    expected = sum(plain_loop(model, tok, text) for text in kept)
    assert found["nats"] == pytest.approx(expected, rel=1e-5)
    alone = sum(plain_loop(model, tok, text, later=False) for text in kept)
    later_too = "the later tokens of a word are masked too"
    assert found["nats"] != pytest.approx(alone, rel=2e-5), later_too


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_pll_of_uniform_predictions_is_known_and_its_units_ignore_the_vocabulary(
        name, bpe, tmp_path):
    tok = Tokenizer.load("byte") if name == "byte" else bpe
    model, *_ = load_run(make_run(tmp_path / "run", tok, arch="transformer"), "cpu")
    with torch.no_grad():
        model.wte.zero_()  # tied: all logits are 0
    # 70 words are too many for a row of 64 tokens, whatever the vocabulary has learned
    texts = [*TEXTS, "word " * 70, "beyond the fifth"]
    lines = [json.dumps(dict(text=text)) + "\n" for text in texts]
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    found = pseudo_log_likelihood(model, str(tmp_path / "texts.jsonl"), tok, CPU, "fp32", 5, 64,
                                  batch_tokens=99)
    # five that are not empty, one of them too long
    assert found["texts"] == 4 and found["left_out"] == 1
    assert found["nats"] == pytest.approx(found["tokens"] * math.log(tok.vocab_size), rel=1e-6)
    assert found["tokens"] == sum(len(ids) for ids in tok.encode(TEXTS))
    assert found["words"] == 5 + 1 + 3 + 8
    assert found["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert found["nats_per_word"] == pytest.approx(math.log(found["perplexity_per_word"]))
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / found["bytes"] / math.log(2))


# ---- one command, everything it writes ---------------------------------------------

@pytest.fixture(scope="module")
def evaluated(runs, data_dir, tmp_path_factory):
    """tools/eval.py with everything on, two data sets -> (out_dir, what it printed)."""
    folder = tmp_path_factory.mktemp("everything")
    shutil.copytree(data_dir, folder / "second")
    (folder / "texts.txt").write_text("The cat sees the river.\nA stone keeps the reader.\n")
    pairs = [("cat", "cat", 5), ("cat", "stone", 2), ("river", "x", 1)]
    (folder / "dev.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(
        f"The {a} sees it.\tThe {b} sees it.\t{score}\n" for a, b, score in pairs))
    out = shutil.copytree(runs["concept"], folder / "run")
    others = dict(min=dict(accuracy=0.5), max=dict(accuracy=0.9), majority=dict(accuracy=0.6))
    scores = dict(sst2=0.8, rte=0.6, boolq=0.7, mrpc=0.7, mine=0.65)
    glue = {name: others | dict(median=dict(accuracy=score)) for name, score in scores.items()}
    (out / "glue.json").write_text(json.dumps(glue))
    return out, call(
        "tools/eval.py", f"--out_dir={out}", f"--data_dir={data_dir},{folder}/second", "--rows=4",
        "--health_rows=4", "--profile=1", f"--pll={folder}/texts.txt", f"--sts={folder}/dev.tsv",
        "--nelbo=1", "--dtype=fp32", "--micro_batch=4")


def test_several_data_sets_end_in_one_table(evaluated, data_dir):
    out, done = evaluated
    found = result(done)
    assert json.loads((out / "eval.json").read_text()) == found
    first, second = found["data"].values()
    assert first == second, "the same bins under another name, so the same masks and losses"
    overview = done.stdout.split("token masks  ")[-1].splitlines()
    for line, name in zip(overview[1:3], found["data"]):
        loss, accuracy, perplexity, bits, entropy = line.removeprefix(name).split()
        r = found["data"][name]
        assert float(loss) == pytest.approx(r["token"]["loss"], abs=1e-4)
        assert float(perplexity) == pytest.approx(r["token"]["perplexity"], abs=0.01)
        assert float(bits) == pytest.approx(r["token"]["bits_per_byte"], abs=1e-4)
        assert float(entropy) == pytest.approx(r["unigram_entropy"], abs=1e-3)


def test_metrics_are_flat_named_alike_for_every_run_and_true(evaluated, runs, data_dir):
    out, done = evaluated
    found, fields = result(done), json.loads((out / "metrics.json").read_text())
    assert len(fields) >= 40
    assert list(fields) == [name for section in measures.FIELDS.values() for name in section]
    assert all(value is None or isinstance(value, (int, float, str)) for value in fields.values())
    model, tok, _ = load_run(str(out), "cpu")
    token = next(iter(found["data"].values()))["token"]
    expected = dict(
        arch="concept", total_params=model.num_params(), embedding_params=tok.vocab_size * 64,
        n_concepts=6, d_model=32, glu_expansion=1.0, total_steps=7, total_tokens=3584, seed=3,
        git_commit="abc1234", train_loss=2.0, best_train_loss=2.0, best_val_loss=5.5,
        training_time_seconds=210.0, train_tokens_per_sec=400.0, val_loss=token["loss"],
        val_perplexity=token["perplexity"], val_bits_per_byte=token["bits_per_byte"],
        test_loss=None, concept_rank=found["health"]["trained"]["rank"],
        pll_nats=found["pll"]["nats"], sts_pooling="max",
        sts_spearman=found["sts"]["trained"]["concepts, max"]["spearman"], dtype="fp32",
        eval_rows=4, glue_sst2_accuracy=0.8, glue_cola_mcc=None, smallbench_paraphrase_acc=0.7)
    assert {name: fields[name] for name in expected} == expected
    assert fields["smallbench_avg_acc"] == pytest.approx(0.7)
    ratio = fields["embedding_params"] / fields["total_params"]
    assert fields["embedding_ratio"] == pytest.approx(ratio)
    assert fields["total_flops"] == pytest.approx(3584 * model.flops_per_token(64, 20, 4))
    train = json.loads((data_dir / "meta.json").read_text())["splits"]["train"]["tokens"]
    assert fields["total_epochs"] == pytest.approx(3584 / train)


def test_speed_is_measured_where_the_model_reads_that_far(evaluated, data_dir, monkeypatch):
    """Not how fast: that depends on the machine."""
    fields = json.loads((evaluated[0] / "metrics.json").read_text())
    assert fields["latency_batch1_seq128_ms"] is None, "this model reads 64 tokens"
    for name in ("throughput_tokens_per_sec", "throughput_iqr_tokens_per_sec", "memory_peak_mb"):
        assert fields[name] > 0
    tok = Tokenizer.load(str(data_dir / "tokenizer"))
    monkeypatch.setattr(metrics, "timed", partial(metrics.timed, most=5))
    concept = dict(arch="concept", position="sinusoidal", block_size=64, max_length=512,
                   concept_dim=32)
    for shape in (concept, dict(arch="transformer", block_size=512)):
        shape |= dict(vocab_size=tok.vocab_size, n_layer=1, n_head=2, token_dim=64, ffn_dim=32)
        found = metrics.measure_speed(build_model(shape), tok, CPU, "fp32", 64, 2)
        for T in (128, 512):
            assert found[f"latency_batch1_seq{T}_ms"] > 0
            assert found[f"latency_batch1_seq{T}_iqr_ms"] > 0
        assert found["throughput_batch_size"] == 2 and found["throughput_seq_length"] == 64


def test_the_page_shows_every_section_with_units(evaluated):
    text = (evaluated[0] / "summary.md").read_text()
    for section in measures.FIELDS:
        assert f"## {section}\n" in text
    fields = json.loads((evaluated[0] / "metrics.json").read_text())
    assert f"| total_params | {fields['total_params']:,} | parameters |" in text
    assert f"| val_loss | {fields['val_loss']:.4g} | nats |" in text
    assert "| test_loss | - | nats |" in text
    assert "| mine | accuracy | 0.65 | 0.5 | 0.9 | 0.6 |" in text and "Not measured" not in text


def test_what_was_not_measured_is_null_and_the_page_says_how_to_measure_it(runs, tmp_path):
    out = shutil.copytree(runs["transformer"], tmp_path / "run")
    for name in ("config.json", "log.jsonl"):
        (out / name).unlink()
    call("tools/eval.py", f"--out_dir={out}", "--rows=4", "--health_rows=4")
    fields, text = json.loads((out / "metrics.json").read_text()), (out / "summary.md").read_text()
    for name in ("concept_rank", "concepts_shuffled", "n_concepts", "nelbo_nats", "pll_nats",
                 "sts_pearson", "git_commit", "train_loss", "latency_batch1_seq512_ms",
                 "throughput_tokens_per_sec", "glue_mrpc_f1"):
        assert fields[name] is None, name
    assert fields["val_loss"] > 0 and fields["total_params"] > 0
    for flag in ("--nelbo=1", "--pll=FILE", "--sts=1", "--profile=1", "finetune_glue.py"):
        assert flag in text


def test_mistakes_end_in_one_message(runs, data_dir, tmp_path):
    out = shutil.copytree(runs["concept"], tmp_path / "run")
    command = ["tools/eval.py", f"--out_dir={out}", "--rows=4"]
    for args, parts in (
            (["--pll=no/such.txt"], ["no/such.txt", "a text a line"]),
            (["--pll_texts=5"], ["name it with --pll=FILE"]),
            (["--profile=2"], ["profile = '2'", "true or false"]),
            ([f"--data_dir={data_dir},{data_dir}"], ["different folders"]),
            (["--data_dir=a,"], ["different folders"]),
            (["--split=test"], ["'test'", "expected one of train, val"]),
            ([f"--control_dir={runs['transformer']}", "--health_rows=0"],
             ["is a control for health_rows and sts"])):
        refused(call(*command, *args, ok=False), *parts)
    (tmp_path / "empty.txt").write_text("\n \n")
    refused(call(*command, "--health_rows=0", f"--pll={tmp_path}/empty.txt", ok=False),
            "found 0 texts")
    for broken, message in (("{", "expected a JSON object"),
                            ('{"rte": 0.5}', "rte has no medians")):
        (out / "glue.json").write_text(broken)
        refused(call(*command, ok=False), "glue.json", message)


def test_sts_1_finds_glue_or_says_which_path_to_give(evaluated, runs, tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/eval.py", tmp_path / "tools")
    command = ["tools/eval.py", f"--out_dir={runs['concept']}", "--rows=2", "--health_rows=0",
               "--sts=1", "--dtype=fp32"]
    refused(call(*command, ok=False, cwd=tmp_path), "there is no glue/STS-B/dev.tsv",
            "--sts=FOLDER/STS-B/dev.tsv")
    (tmp_path / "glue" / "STS-B").mkdir(parents=True)
    shutil.copy(evaluated[0].parent / "dev.tsv", tmp_path / "glue" / "STS-B")
    done = call(*command, cwd=tmp_path)
    expected = result(evaluated[1])["sts"]["trained"]["concepts, max"]
    assert result(done)["sts"]["trained"]["concepts, max"] == pytest.approx(expected, abs=1e-4)
    assert "what sample.py --embed writes, concepts, max" in done.stdout
    assert "mean token state:" in done.stdout


# ---- importance ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def important(data_dir, tmp_path_factory):
    """A run of six steps with importance and a curriculum -> (out_dir, what eval.py printed)."""
    out = tmp_path_factory.mktemp("importance") / "run"
    run("train.py", f"--data_dir={data_dir}", f"--out_dir={out}", "--masking_type=importance",
        "--importance=model", "--curriculum=easy_to_hard", "--mlm_probability=0.3",
        "--block_size=64", "--n_layer=1", "--n_head=2", "--n_concept=8", "--concept_dim=32",
        "--token_dim=32", "--ffn_dim=64", "--batch_size=8", "--micro_batch=8", "--max_steps=6",
        "--warmup_steps=2", "--eval_interval=2", "--eval_rows=8", "--health_rows=8",
        "--dtype=fp32", "--init_table=random")
    return out, run("tools/eval.py", f"--out_dir={out}", "--report=1", "--rows=8",
                    "--health_rows=8", "--micro_batch=3", "--dtype=fp32")


def test_importance_is_measured_as_in_training(important):
    out, done = important
    found = result(done)
    logged = next(r for r in read_log(out) if r["step"] == found["step"] and "val_loss" in r)
    assert found["importance"].pop("kind") == "model" and found["importance"].pop("rows") == 8
    assert len(found["importance"]) == 4
    for name, value in found["importance"].items():
        exact = name == "importance_examples"
        assert logged[name] == (value if exact else pytest.approx(value, abs=2e-3)), name
    assert "scores of importance=model on 8 rows" in done.stdout
    assert "importance: rank correlation with the losses of uniformly masked" in done.stdout


def test_the_report_shows_the_scores_of_the_text_that_was_measured(important, data_dir):
    page = (important[0] / "report.html").read_text()
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    tok, found = Tokenizer.load(str(data_dir / "tokenizer")), data["importance"]
    ids = TokenData(str(data_dir), "val", 64).block(np.arange(8))
    ordinary, row = ~tok.is_special[ids], found["row"]
    assert row["tokens"] == [tok.decode([i]) for i in ids[0]]
    scores = np.array(row["scores"])[ordinary[0]]
    for score, share, is_text in zip(row["scores"], row["quantiles"], ordinary[0]):
        expected = percentileofscore(scores, score, "mean") / 100 if is_text else None
        # scores that differ in the seventh digit are the same in the page
        assert share == pytest.approx(expected, abs=0.02)
    counts = Counter(tok.decode([i]) for i in ids[ordinary])
    assert {text: count for text, _, _, count in found["words"]} == counts
    assert len(found["words"]) == len(counts), "a dot for each id"
    assert sum(found["histogram"]["counts"]) == ordinary.sum()
    assert len(data["log"]["importance_rank_correlation"]) == 4


def test_stages_of_a_curriculum_are_marked_in_the_curves(important, tmp_path):
    records = read_log(important[0])
    tokens = {r["step"]: r["tokens"] for r in records}
    assert curriculum_stages(records) == [(0, "easy"), (tokens[2], "medium"), (tokens[4], "hard")]
    with mock.patch("matplotlib.axes.Axes.axvline") as line:
        draw_curves(tmp_path / "curves.png", records, 5.0, "run")
    assert [call.args[0] for call in line.mock_calls] == [tokens[2] / 1e6, tokens[4] / 1e6]
    for one_stage in (records[:1], [r | dict(importance_band=None) for r in records]):
        assert curriculum_stages(one_stage) == []


def test_scores_that_do_not_fit_end_in_one_message(important, tmp_path):
    out = shutil.copytree(important[0], tmp_path / "run")
    (out / "eval.json").unlink()
    checkpoint = torch.load(out / "best.pt", weights_only=True)
    state = checkpoint["importance"]
    table = {**state["estimator"], "table": torch.zeros(7, 32)}
    for changes, message in ((dict(mean_V=torch.zeros(7)), "it is another vocabulary"),
                             (dict(estimator=table), "learned with another lib/importance.py")):
        torch.save(checkpoint | dict(importance=state | changes), out / "best.pt")
        done = call("tools/eval.py", f"--out_dir={out}", "--rows=2", "--checkpoint=best", ok=False)
        refused(done, f"error: {out}: ", message)
        assert not (out / "eval.json").exists(), "before anything is measured"


def test_a_run_without_scores_has_no_importance(evaluated):
    assert "importance" not in result(evaluated[1])
    assert "scores of importance" not in evaluated[1].stdout


# ---- bad scores, bad files, a stdout that goes away --------------------------------------

def sts_file(path, scores, header="sentence1\tsentence2\tscore"):
    lines = [f"The cat {i}.\tA stone {i}.\t{score}" for i, score in enumerate(scores)]
    path.write_text("\n".join([header, *lines]) + "\n")
    return f"--sts={path}"


@pytest.mark.parametrize("scores, message", [
    ((1, "nan", 3), "line 3: the score is nan"), ((1, 2, "inf"), "line 4: the score is inf"),
    ((1, 2, -1), "the score is -1"), ((1, 2, 7), "the score is 7"),
    ((1, 2, "high"), "could not convert string to float: 'high'"),
    ((1, 2, ""), "line 4 has no sentence or no score"), ((2, 2, 2), "all 3 scores are 2"),
    ((1, 2), "found 2 scored pairs"), ((), "found 0 scored pairs")])
def test_scores_of_pairs_that_no_correlation_can_use_are_refused(runs, tmp_path, scores, message):
    file = sts_file(tmp_path / "dev.tsv", scores)
    done = call("tools/eval.py", f"--out_dir={runs['concept']}", "--rows=2", file, ok=False)
    refused(done, "dev.tsv", message)
    assert "nats" not in done.stdout, "before anything is measured"


@pytest.mark.parametrize("header", ["", "sentence1\tsentence2", "a\tb\tc",
                                    "sentence1\tsentence1\tsentence2\tscore"])
def test_a_file_of_pairs_with_other_columns_is_refused(runs, tmp_path, header):
    file = sts_file(tmp_path / "dev.tsv", (1, 2, 3), header)
    refused(call("tools/eval.py", f"--out_dir={runs['concept']}", "--rows=2", file, ok=False),
            "dev.tsv: found the columns", "sentence1, sentence2 and score")


def only_json(text):
    """Parses JSON that any program can read: without NaN and Infinity."""
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")
    return json.loads(text, parse_constant=refuse)


def test_similarity_that_is_the_same_for_all_pairs_is_null_with_the_reason(runs, tmp_path):
    (tmp_path / "dev.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(
        f"The cat.\tThe cat.\t{score}\n" for score in (1, 2, 3)))
    out = shutil.copytree(runs["concept"], tmp_path / "run")
    done = call("tools/eval.py", f"--out_dir={out}", "--rows=2", "--health_rows=0", "--dtype=fp32",
                f"--sts={tmp_path}/dev.tsv")
    assert "all cosines are the same" in done.stdout
    found = only_json((out / "eval.json").read_text())
    assert found["sts"]["trained"]["concepts, max"] == dict(pearson=None, spearman=None)
    assert only_json((out / "metrics.json").read_text())["sts_spearman"] is None
    only_json(done.stdout.splitlines()[-1])


def test_json_of_the_tools_never_holds_nan(tmp_path):
    write_json(tmp_path / "a.json", dict(a=[math.nan, (math.inf, 1.5)], b={"c": -math.inf}))
    found = only_json((tmp_path / "a.json").read_text())
    assert found == dict(a=[None, [None, 1.5]], b={"c": None})


@pytest.mark.parametrize("name, text", [
    ("summary.md", "my notes"), ("metrics.json", "{}"), ("report.html", "mine"),
    ("curves.png", "my picture"),
    ("eval.json", "[1]"), ("eval.json", '{"step": 1, "dat'), ("eval.json", "{}"),
    ("config.json", "{"), ("config.json", "null")])
def test_a_file_that_eval_did_not_write_is_kept_and_a_damaged_one_named(
        runs, tmp_path, name, text):
    out = shutil.copytree(runs["concept"], tmp_path / "run")
    (out / name).write_text(text)
    done = call("tools/eval.py", f"--out_dir={out}", "--rows=2", ok=False)
    refused(done, f"{out}/{name}", "move it away")
    assert (out / name).read_text() == text and "nats" not in done.stdout


def test_what_eval_wrote_is_replaced_by_the_next_eval(runs, tmp_path):
    out = shutil.copytree(runs["concept"], tmp_path / "run")
    for split in ("val", "train"):
        call("tools/eval.py", f"--out_dir={out}", "--rows=4", "--health_rows=2", "--report=1",
             f"--split={split}")
    assert json.loads((out / "eval.json").read_text())["split"] == "train"


def test_a_checkpoint_alone_is_measured(runs, tmp_path):
    """best.pt and its tokenizer, without log and config; by the path of the folder or the file."""
    found = []
    for name, path in (("a", "a"), ("b", "b/best.pt")):
        (tmp_path / name).mkdir()
        shutil.copy(f"{runs['concept']}/best.pt", tmp_path / name)
        shutil.copytree(f"{runs['concept']}/tokenizer", tmp_path / name / "tokenizer")
        done = call("tools/eval.py", f"--out_dir={tmp_path}/{path}", "--rows=2",
                    "--health_rows=2")
        assert json.loads((tmp_path / name / "eval.json").read_text()) == result(done)
        found.append(result(done)["data"])
    assert found[0] == found[1]


def test_a_stdout_that_goes_away_loses_no_file(runs, tmp_path):
    out = shutil.copytree(runs["concept"], tmp_path / "run")
    code = ("import sys, runpy; sys.path.insert(0, 'tools'); "
            "sys.argv = ['tools/eval.py', *sys.argv[1:]]; "
            "sys.stdout = open('/dev/full', 'w'); runpy.run_path('tools/eval.py', "
            "run_name='__main__')")
    run("-c", code, f"--out_dir={out}", "--rows=2", "--health_rows=2", "--report=1")
    for name in ("eval.json", "metrics.json", "summary.md", "report.html"):
        assert (out / name).exists(), name


def test_fewer_rows_and_texts_than_processes(data_dir, tmp_path):
    tok = Tokenizer.load(str(data_dir / "tokenizer"))
    (tmp_path / "text.txt").write_text("The cat sees the river.\n")
    args = ["--rows=1", "--health_rows=1", f"--pll={tmp_path}/text.txt", "--dtype=fp32"]
    found = []
    for nproc in (1, 2):
        out = make_run(tmp_path / f"run{nproc}", tok, data_dir, block_size=256)
        done = run("tools/eval.py", f"--out_dir={out}", *args, nproc=nproc, timeout=60)
        found.append(result(done))
    for key in ("token", "span"):
        one, two = (next(iter(r["data"].values()))[key]["loss"] for r in found)
        assert two == pytest.approx(one, rel=1e-5)
    assert found[1]["pll"]["nats"] == pytest.approx(found[0]["pll"]["nats"], rel=1e-5)


# ---- runs side by side ------------------------------------------------------------------

FEW = ["--rows=4", "--health_rows=4", "--micro_batch=4", "--dtype=fp32"]


@pytest.fixture(scope="module")
def several(data_dir, tmp_path_factory):
    """Random runs: open, strict, transformer, and one with longer rows; in one folder."""
    folder, tok = tmp_path_factory.mktemp("several"), Tokenizer.load(str(data_dir / "tokenizer"))
    make_run(folder / "open", tok, data_dir)
    make_run(folder / "strict|x", tok, data_dir, bottleneck="strict", n_concept=4)
    make_run(folder / "plain", tok, data_dir, "transformer")
    make_run(folder / "long", tok, data_dir, block_size=128)
    for name in ("open", "strict|x", "plain"):
        with open(folder / name / "log.jsonl", "a") as file:
            for step in (5, 9):
                file.write(json.dumps(dict(step=step, tokens=512 * step, val_loss=6.5)) + "\n")
    return folder


@pytest.fixture(scope="module")
def compared(several):
    """-> what eval.py printed about the four of them"""
    paths = ",".join(f"{several}/{name}" for name in ("open", "strict|x", "plain", "long/best.pt"))
    return call("tools/eval.py", f"--compare={paths}", *FEW)


def test_compared_runs_of_any_architecture_predict_the_same_tokens(several, compared):
    found = result(compared)
    assert found == only_json((several / "open" / "compare.json").read_text())
    assert len(found["runs"]) == 4
    counts = set()
    for r in found["runs"].values():
        [losses] = r["data"].values()
        assert r["block_size"] == 64, "rows that all of them read"
        counts.add(tuple(losses[masking]["predicted"] for masking in
                         ("token", "whole_word", "concepts", "span")))
        assert set(losses["token"]["splits"]) == set(SPLITS)
    assert len(counts) == 1
    alone = result(call("tools/eval.py", f"--out_dir={several}/plain", *FEW))
    assert found["runs"][f"{several}/plain"]["data"] == alone["data"]
    assert found["runs"][f"{several}/open"]["health"]["trained"]["shuffled"] is not None


def test_the_comparison_is_readable_at_100_columns_and_names_its_files(
        several, compared, data_dir):
    *lines, last = compared.stdout.splitlines()
    for line in lines:
        assert len(line.replace(str(several), "out").replace(str(data_dir), "data")) <= 100, line
    text = "\n".join(lines)
    for part in ("1 open", "3 plain", "loss, span masks", "copy in the row", "effective rank",
                 "concepts shuffled", f"{several}/open/compare.md", f"{several}/open/compare.png"):
        assert part in text, part
    assert (several / "open" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    page = (several / "open" / "compare.md").read_text()
    assert "compare.png" in page and "2 strict\\|x" in page
    for table in page.split("\n## ")[1:]:
        bars = {line.replace("\\|", "").count("|") for line in table.splitlines()
                if line.startswith("|")}
        assert len(bars) == 1, table


def test_the_settings_that_differ_are_named(several, tmp_path):
    for name, rate in (("a", 1e-3), ("b", 2e-3)):
        shutil.copytree(several / "open", tmp_path / name)
        path = tmp_path / name / "best.pt"
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["settings"] |= dict(learning_rate=rate, out_dir=str(tmp_path / name))
        torch.save(checkpoint, path)
        for file in ("compare.json", "compare.md", "compare.png"):
            (tmp_path / name / file).unlink(missing_ok=True)
    done = call("tools/eval.py", f"--out_dir={tmp_path}/a", f"--compare={tmp_path}/b", "--rows=2",
                "--health_rows=0")
    assert result(done)["settings"] == dict(learning_rate=[0.001, 0.002])
    assert "out_dir" not in done.stdout.split("settings that differ")[1].split("* the")[0]
    assert "effective rank" not in done.stdout


def test_ten_runs_stay_within_100_columns():
    heads = [f"{n} a_rather_long_name_of_a_run_{n}" for n in range(1, 11)]
    text = columns(heads, [("x" * 50, ["1.2345*"] * 10), ("y", ["z" * 90] * 10)])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for n in range(1, 11):
        assert any(f" {n} a_" in line for line in lines), "each has a head"


def test_runs_that_cannot_be_compared_are_refused_with_one_message(
        several, data_dir, bpe, tmp_path):
    first = several / "open"

    def refuse(others, *parts, more=()):
        done = call("tools/eval.py", f"--compare={first},{others}", *FEW, *more, ok=False)
        refused(done, *parts)
        assert "1 of 2" not in done.stdout and not (tmp_path / "compare.json").exists()

    refuse("", "is one run", "--compare=out/a,out/b")
    refuse(first, "are the same run")
    refuse(f"{several}/../{several.name}/open/", "are the same run")
    (tmp_path / "link").symlink_to(first)
    refuse(tmp_path / "link", "are the same run")
    refuse(tmp_path / "none", "holds no checkpoint")
    other = make_run(tmp_path / "bpe", bpe, data_dir)
    refuse(other, "different tokenizers", "--pll=FILE")
    refuse(f"{several}/plain", "64 tokens", more=["--block_size=65"])
    refuse(f"{several}/plain", "report", "leave out compare", more=["--report=1"])
    refuse(f"{several}/plain", "pll", "leave out compare", more=[f"--pll={__file__}"])
    tok = Tokenizer.load(str(data_dir / "tokenizer"))
    other = make_run(tmp_path / "other", tok, data_dir)
    checkpoint = torch.load(tmp_path / "other/best.pt", weights_only=True)
    torch.save(checkpoint | dict(data_sha256="abc"), tmp_path / "other/best.pt")
    refuse(other, "on other data", f"--data_dir={data_dir}")
    done = call("tools/eval.py", f"--compare={other},{first}", *FEW, f"--data_dir={data_dir}")
    assert len(result(done)["runs"]) == 2, "the same text for both"
    (tmp_path / "other" / "compare.json").write_text("mine")
    refused(call("tools/eval.py", f"--compare={other},{first}", *FEW, f"--data_dir={data_dir}",
                 ok=False), "compare.json", "move it away")


def test_a_run_that_is_still_training_is_compared_at_its_checkpoint(several, tmp_path):
    other = shutil.copytree(several / "plain", tmp_path / "run")
    with lock_folder(other):
        with open(other / "log.jsonl", "a") as file:
            file.write('{"step": 12, "tokens": 9000, "lo')  # the line that is being written
        done = call("tools/eval.py", f"--compare={several}/open,{other}", *FEW)
    assert result(done)["runs"][str(other)]["step"] == 7


def test_runs_without_an_evaluation_can_be_compared(tmp_path):
    """Their losses are measured all the same; the picture of curves is empty."""
    draw_losses([("one", 1e6, [[(0, 9.0)]]), ("two", 1e6, [[]])], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
