"""tools/sample.py: --generate prints what lib/generate.py draws; --embed writes vectors.

A file's vectors are the pooled states of its lines, in order. They are the same after a kill, and
broken input, other models and full disks are named.
"""

import fcntl
import io
import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, call, refused, result
from test_eval import make_run

from data.tokenizer import Tokenizer
from lib import embed
from lib.embed import POOL, choose_pooling
from lib.generate import Sampling, entropy, generate
from lib.machine import find_machine
from lib.run import load_run, read_checkpoint
from model import ConceptConfig, ConceptEncoder
from tools import terminal
from tools.pll import pseudo_log_likelihood, pseudo_perplexity

TEXTS = ["The cat sees the river.", "", "  ", "a\u2028b\x85c\x0bd",
         "Z\u00fcrich \U0001f600\u200d\U0001f469", "The cat sees the river.", "long " * 40, "x",
         "\x00"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, tok = tmp_path_factory.mktemp("runs"), Tokenizer.load("byte")
    return {arch: make_run(folder / arch, tok, arch=arch) for arch in ("concept", "transformer")}


def sample(run, path, to, *args, ok=True):
    return call("tools/sample.py", f"--out_dir={run}", f"--embed={path}", f"--to={to}",
                "--dtype=fp32", *args, ok=ok)


# ---- generated texts ---------------------------------------------------------------

def generated(run, *args, ok=True):
    return call("tools/sample.py", f"--out_dir={run}", "--generate=1", "--dtype=fp32", *args, ok=ok)


@pytest.mark.parametrize("arch", ["concept", "transformer"])
def test_generated_texts_are_those_of_lib_generate(arch, runs):
    model, tok, _ = load_run(runs[arch], "cpu")
    done = generated(runs[arch], "--text=The [MASK]at", "--length=12", "--n_samples=3", "--seed=5",
                     "--sampler=confidence", "--steps=4", "--top_p=0.9")
    expected = list(generate(model, tok, "The [MASK]at", 3, 12,
                             Sampling("confidence", 4, top_p=0.9, seed=5)))
    found = result(done)
    assert found == dict(texts=[sample.text for sample in expected], steps=4, tokens=39,
                         entropy=pytest.approx(sum(entropy(s.ids) for s in expected) / 3))
    assert "39 tokens, 4 steps a text, unigram entropy" in done.stdout
    assert all(text.startswith("The ") and text[5:7] == "at" for text in found["texts"])
    done = generated(runs[arch], "--length=6")
    assert "6 steps a text (one a token, so fewer than steps=64)" in done.stdout


def test_prompts_come_from_standard_input_and_longer_texts_in_blocks(runs, monkeypatch):
    prompts = "a\ud83d\ude00\u0301\n\udc00 \u202e[MASK]\nThe\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(prompts))
    args = ["--length=70", "--block_tokens=16", "--steps=2", "--n_samples=2"]
    found = result(generated(runs["concept"], "--text=-", *args))
    assert [text[:1] for text in found["texts"]] == ["a", "a", "\ufffd", "\ufffd", "T", "T"]
    assert found["texts"][4:] == result(generated(runs["concept"], "--text=The", *args))["texts"]
    for text, parts in (("a\n \nb\n", ["line 2 of standard input is an empty prompt"]),
                        ("", ["no prompt on standard input"])):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        refused(generated(runs["concept"], "--text=-", ok=False), *parts)


def test_another_run_judges_texts_and_entropy_stands_beside(runs, tmp_path):
    found = result(generated(runs["concept"], f"--judge={runs['transformer']}", "--n_samples=2"))
    model, tok, _ = load_run(runs["transformer"], "cpu")
    machine = find_machine("cpu")
    expected = pseudo_perplexity(model, tok, found["texts"], machine, "fp32", 4096)
    assert found["pseudo_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert found["judge"] == runs["transformer"] and found["entropy"] > 0
    # of a text that fits, what --pll measures; a longer one is cut into halves
    path = tmp_path / "texts.txt"
    path.write_text("The cat sees\nA river\n")
    scored = pseudo_log_likelihood(model, str(path), tok, machine, "fp32", 9, 64, 4096)
    short = pseudo_perplexity(model, tok, ["The cat sees", "", "A river"], machine, "fp32", 4096)
    assert short == pytest.approx(np.exp(scored["nats"] / 19), rel=1e-5)
    halves = pseudo_perplexity(model, tok, ["ab " * 12, "ab " * 12], machine, "fp32", 4096)
    whole = pseudo_perplexity(model, tok, ["ab " * 24], machine, "fp32", 4096)
    assert whole == pytest.approx(halves, rel=1e-5)
    assert pseudo_perplexity(model, tok, [""], machine, "fp32", 4096) is None
    ids = make_run(tmp_path / "ids", Tokenizer.of_ids(9))
    refused(generated(ids, f"--judge={runs['concept']}", ok=False),
            f"the tokenizer of {ids} knows ids only")
    assert "<" in result(generated(ids, "--length=5"))["texts"][0]


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_on_a_terminal_a_text_is_drawn_again_in_place(monkeypatch):
    monkeypatch.setattr(terminal, "FRAME_S", 0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "21")
    monkeypatch.setenv("LINES", "5")
    out, tok = Tty(), Tokenizer.load("byte")
    monkeypatch.setattr("sys.stdout", out)
    screen, mask = terminal.FillingText(tok), tok.mask_id

    def frame(ids):
        before = len(out.getvalue())
        screen(torch.tensor([[tok.eot_id, *ids]]))
        return out.getvalue()[before:]
    assert frame([97, mask, mask, 10]) == "a\x1b[0m\x1b[2m\u2591\u2591\x1b[0m \x1b[0m\n"
    second = frame([97, 27, mask, 10])
    assert second == ("\x1b[1F\x1b[J" "a\x1b[0m\x1b[7m \x1b[0m\x1b[2m\u2591\x1b[0m \x1b[0m\n")
    screen.clear()
    assert out.getvalue().endswith("\x1b[1F\x1b[J")
    wide = list("\u4e2d".encode() * 35)  # 70 columns in lines of 20, of which 3 are shown
    assert frame([*wide, mask]) == ("\u4e2d" * 10 + "\x1b[0m\n") * 3
    last = frame([*wide, 97])
    assert last.startswith("\x1b[3F\x1b[J") and last.count("\n") == 3 and "\x1b[7ma" in last


def test_without_a_terminal_three_moments_are_printed(runs):
    lines = generated(runs["concept"], "--show=1", "--length=8", "--n_samples=2").stdout
    left = [line for line in lines.splitlines() if " masked: " in line]
    assert [int(line.split()[0]) for line in left] == [6, 4, 2] * 2
    assert all(line.count("_") >= n for line, n in zip(left, [6, 4, 2] * 2))
    assert "\x1b" not in lines


def test_a_causal_run_continues_prompts_and_streams(tmp_path, monkeypatch):
    tok = Tokenizer.load("byte")
    run = make_run(tmp_path / "run", tok, arch="transformer", causal=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat\nA longer prompt\n"))
    done = generated(run, "--text=-", "--length=8", "--n_samples=2", "--top_k=20")
    texts = result(done)["texts"]
    assert [text.startswith(("The cat", "A longer")) for text in texts] == [True] * 4
    shown = generated(run, "--text=The cat", "--length=8", "--show=1", "--temperature=0")
    [text] = result(shown)["texts"]
    assert terminal.printable(text).rstrip("\ufffd") in shown.stdout
    refused(generated(run, "--text=The cat", "--sampler=confidence", ok=False),
            "sampler=confidence: of masked models only")
    refused(generated(run, "--text=The cat", "--length=500", ok=False), "has room for")
    refused(generated(run, "--text=The cat", f"--judge={run}", ok=False), "is a causal model")


def test_control_characters_do_not_reach_the_terminal():
    assert terminal.printable("a\x1b[2J\tb\n\x9b\r\u00a0\u4e2d") == (
        "a\ufffd[2J\tb\n\ufffd\ufffd\u00a0\u4e2d")


def test_mistakes_in_generating_end_in_one_message(runs, tmp_path):
    run = runs["concept"]
    for args, parts in (
            (["--steps=0", "--top_p=2"], ["steps=0: expected 1", "top_p=2.0: expected"]),
            (["--temperature=nan"], ["expected a number"]),
            (["--sampler=greedy"], ["expected ancestral or confidence"]),
            (["--length=64"], ["has room for 63; --length=63, or --block_tokens=16"]),
            (["--text= "], ["--text is an empty prompt"]),
            ([f"--text={'a' * 64}"], ["has 64 tokens", "shorten"]),
            (["--n_samples=0"], ["n_samples=0: expected 1 or more"]),
            (["--top=3"], ["top: filling masks only; leave out --generate"]),
            (["--pooling=mean"], ["pooling: embedding only; name a file"]),
            ([f"--embed={tmp_path}/a.txt"], ["two tasks; give one"]),
            ([f"--judge={tmp_path}/none"], ["none holds no checkpoint"])):
        refused(generated(run, *args, ok=False), *parts)
    for args in (["--steps=9"], [f"--embed={tmp_path}/a.txt", "--seed=2"], ["--show=1"]):
        refused(call("tools/sample.py", f"--out_dir={run}", *args, ok=False),
                f"{args[-1][2:].split('=')[0]}: generating only; add --generate=1")


# ---- what is in the file -----------------------------------------------------------

@pytest.mark.parametrize("arch, pooling, pooled", [
    ("concept", "auto", lambda c, x: c.amax(1)), ("concept", "max", lambda c, x: c.amax(1)),
    ("concept", "concept_mean", lambda c, x: c.mean(1)),
    ("concept", "concepts", lambda c, x: c.flatten(1)), ("concept", "mean", lambda c, x: x.mean(1)),
    ("transformer", "auto", lambda c, x: x.mean(1)),
    ("transformer", "max", lambda c, x: x.amax(1))])
def test_each_row_is_the_pooled_states_of_its_line(arch, pooling, pooled, runs, tmp_path):
    (tmp_path / "texts.txt").write_bytes("\n".join(TEXTS).encode())
    done = sample(runs[arch], tmp_path / "texts.txt", tmp_path / "e.npy", f"--pooling={pooling}",
                  "--batch_tokens=99")
    model, tok, _ = load_run(runs[arch], "cpu")
    found = np.load(tmp_path / "e.npy", mmap_mode="c")
    assert found.dtype == np.float32 and len(found) == len(TEXTS)
    for vector, text in zip(found, TEXTS):
        ids = tok.encode([text])[0][:64].tolist() or [tok.eot_id]
        with torch.no_grad():  # each line is read alone here
            expected = pooled(*model.encode(torch.tensor([ids])))[0]
        assert torch.allclose(torch.from_numpy(vector), expected, atol=1e-5)
    assert np.abs(found[0] - found[4]).max() > 0.01, "texts differ"
    if pooling == "auto":
        pooling = "max" if arch == "concept" else "mean"
    assert result(done) == dict(to=f"{tmp_path}/e.npy", texts=9, width=found.shape[1], cut=1,
                                replaced=0, pooling=pooling)
    assert "1 texts longer than 64 tokens were cut" in done.stdout


@torch.no_grad()
@pytest.mark.parametrize("bottleneck, default", [("open", "max"), ("strict", "concept_mean")])
def test_the_default_pooling_is_what_exports_pool_with(bottleneck, default):
    model = ConceptEncoder(ConceptConfig(
        vocab_size=64, block_size=16, n_layer=1, n_head=2, n_concept=8, concept_dim=16,
        token_dim=64, ffn_dim=16, bottleneck=bottleneck))
    setting, name = choose_pooling("auto", model)
    assert setting == default
    ids = torch.arange(10)[None]
    concepts, tokens = model.encode(ids)
    found = POOL[name](model, ids, concepts, tokens)
    assert torch.equal(found, model.pooled(concepts, ids))
    others = model.pooled(concepts, ids, how="max" if bottleneck == "strict" else "mean")
    assert not torch.allclose(found, others)


def test_lines_and_jsonl_give_the_same_and_broken_bytes_are_counted(runs, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode() + b"\r\n")
    lines = [json.dumps(dict(text=text, id=3)) + "\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    run = runs["concept"]
    first = result(sample(run, tmp_path / "a.txt", tmp_path / "a.npy"))
    sample(run, tmp_path / "a.jsonl", tmp_path / "b.npy")
    assert first["texts"] == 9 and first["replaced"] == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    last = "\ufffd is a character\n"
    (tmp_path / "broken.txt").write_bytes(
        b"caf\xe9 \xff\nwhole\n\xed\xa0\x80\n" + last.encode())
    (tmp_path / "mended.txt").write_text(
        "caf\ufffd \ufffd\nwhole\n\ufffd\ufffd\ufffd\n" + last)
    assert result(sample(run, tmp_path / "broken.txt", tmp_path / "c.npy"))["replaced"] == 2
    assert result(sample(run, tmp_path / "mended.txt", tmp_path / "d.npy"))["replaced"] == 0
    assert (tmp_path / "c.npy").read_bytes() == (tmp_path / "d.npy").read_bytes()
    (tmp_path / "broken.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "whole"}\n')
    assert result(sample(run, tmp_path / "broken.jsonl", tmp_path / "f.npy"))["replaced"] == 1


def test_what_eval_measures_is_what_sample_writes(runs, data_dir, tmp_path):
    pairs = [("The cat sees it.", "A cat sees it.", 5), ("A stone.", "The river runs.", 1),
             ("Reader", "reads", 3), ("The model keeps the stone.", "x", 0)]
    first_texts, second_texts, scores = zip(*pairs)
    lines = ["sentence1\tsentence2\tscore", *(f"{a}\t{b}\t{score}" for a, b, score in pairs)]
    (tmp_path / "dev.tsv").write_text("\n".join(lines))
    (tmp_path / "texts.txt").write_text("\n".join(first_texts + second_texts))
    for arch, name in (("concept", "concepts, max"), ("transformer", "tokens")):
        done = call("tools/eval.py", f"--out_dir={runs[arch]}", f"--data_dir={data_dir}",
                    f"--sts={tmp_path}/dev.tsv", "--rows=2", "--health_rows=0", "--dtype=fp32")
        found = result(done)["sts"]["trained"][name]
        sample(runs[arch], tmp_path / "texts.txt", tmp_path / f"{arch}.npy")
        first, second = np.split(np.load(tmp_path / f"{arch}.npy").astype(np.float64), 2)
        cosine = (first * second).sum(1)
        cosine /= np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        expected = scipy.stats.pearsonr(cosine, scores)[0]
        assert found["pearson"] == pytest.approx(expected, abs=1e-4)


def test_cutting_before_tokenising_changes_no_token(tmp_path):
    tok = Tokenizer.train([path.read_text() + 300 * "=" for path in sorted(ROOT.glob("*.py"))], 600)
    texts = ["word " * 9000, "=" * 30_000, " " * 30_000 + "x", "concept" * 5000, "the cat"]
    rows, cut = embed.rows_of(texts, tok, 32)
    assert cut == 4
    for row, text in zip(rows, texts):
        assert row.tolist() == tok.encode([text])[0][:32].tolist()


# ---- kills, other inputs, full disks ---------------------------------------------------

def numbers(texts):
    """A stand-in for a model: three numbers for each text, and how many texts are long."""
    vectors = [[len(text), sum(map(ord, text)) % 997, 1] for text in texts]
    return np.array(vectors, np.float32), sum(len(text) > 9 for text in texts)


def killed(work, to, owners, n):
    """work(to) in a fork that kills itself instead of the n-th call of any function in `owners`,
    [(owner, name)] -> whether there were so many calls."""
    child, calls = os.fork(), []
    if child:
        code = os.waitpid(child, 0)[1]
        assert code in (0, signal.SIGKILL), code
        return code == signal.SIGKILL

    def deadly(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    code = 1
    try:
        for owner, name in owners:
            setattr(owner, name, deadly(getattr(owner, name)))
        work(to)
        code = 0
    finally:
        os._exit(code)


def test_killed_at_any_moment_the_same_call_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    """While a chunk is embedded, between a chunk and its record, before the last rename."""
    texts = [f"text {i} a" * (i % 4) for i in range(20)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    monkeypatch.setattr(embed, "CHUNK_TEXTS", 8)
    monkeypatch.setattr(embed, "CHUNK_CHARS", 90)
    model = SimpleNamespace(numbers=numbers)

    def job(to):
        return embed.embed_file(f"{tmp_path}/texts.txt", str(to),
                                lambda texts: model.numbers(texts), dict(model="a"))

    owners = [(model, "numbers"), (embed, "write_json"), (os, "fsync"), (os, "replace")]
    whole, to, n = tmp_path / "whole.npy", tmp_path / "1.npy", 1
    expected = job(whole)
    while killed(job, to, owners, n):
        assert not to.exists(), "no half file under its name"
        killed(job, to, owners, 7)  # and once more while going on
        assert job(to) == expected
        assert to.read_bytes() == whole.read_bytes()
        assert not Path(f"{to}.tmp").exists()
        n += 1
        to = tmp_path / f"{n}.npy"
    assert n > 20, "so many moments were tried"
    assert np.array_equal(np.load(tmp_path / "whole.npy"), numbers(texts)[0])


def test_a_killed_command_goes_on_to_the_same_bytes(runs, tmp_path):
    path, to, n = tmp_path / "texts.txt", tmp_path / "e.npy", 3 * embed.CHUNK_TEXTS
    path.write_text("".join(f"{i % 31} reads {i % 7}\n" for i in range(n)))
    command = [f"--out_dir={runs['concept']}", f"--embed={path}", "--dtype=fp32"]
    # The first record of a chunk is written whole, the next never.
    assert killed(lambda to: call("tools/sample.py", *command, f"--to={to}"), to,
                  [(embed, "write_json")], 3)
    assert 0 < state_of(to)["done"] < n and not to.exists(), state_of(to)
    first = call("tools/sample.py", *command, f"--to={to}")
    assert "going on after" in first.stdout
    call("tools/sample.py", *command, f"--to={tmp_path}/whole.npy")
    assert to.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    again = call("tools/sample.py", *command, f"--to={to}")
    assert "is complete" in again.stdout and result(again) == result(first)


def state_of(to):
    try:
        return json.loads((to.parent / (to.name + ".json")).read_text())
    except FileNotFoundError:
        return {}


def stopped(tmp_path, done=2, size=None):
    """Leaves what a job over four texts leaves when it is killed after `done` of them -> input, to.

    size: bytes of the .tmp file, None for the right number.
    """
    path, to = tmp_path / "texts.txt", str(tmp_path / "e.npy")
    for old in tmp_path.glob("e.npy*"):
        old.unlink()
    path.write_text("a\nbb\nccc\ndddd\n")
    embed.embed_file(str(path), to, numbers, dict(model="a"))
    state = state_of(tmp_path / "e.npy")
    os.replace(to, to + ".tmp")
    os.truncate(to + ".tmp", len(embed.npy_header(4, 3)) + 12 * done if size is None else size)
    state |= dict(done=done, offset=sum(range(2, 2 + done)))
    (tmp_path / "e.npy.json").write_text(json.dumps(state))
    return str(path), to


def test_another_input_model_or_writer_is_refused_and_nothing_is_lost(tmp_path):
    path, to = stopped(tmp_path)
    before = (tmp_path / "e.npy.tmp").read_bytes()
    with pytest.raises(ValueError, match="made from something else: model is a there and b now; "
                                         "give another --to, or"):
        embed.embed_file(path, to, numbers, dict(model="b"))
    with open(path, "a") as file:
        file.write("more\n")
    with pytest.raises(ValueError, match="texts is 4 there and 5 now; input_sha256 is"):
        embed.embed_file(path, to, numbers, dict(model="a"))
    path, to = stopped(tmp_path)
    with open(to + ".tmp", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing"):
            embed.embed_file(path, to, numbers, dict(model="a"))
    assert (tmp_path / "e.npy.tmp").read_bytes() == before
    embed.embed_file(path, to, numbers, dict(model="a"))
    with pytest.raises(ValueError, match="e.npy was made from something else"):
        embed.embed_file(path, to, numbers, dict(model="b"))
    os.remove(to + ".json")
    with pytest.raises(ValueError, match="e.npy exists, and no"):
        embed.embed_file(path, to, numbers, dict(model="a"))
    assert np.array_equal(np.load(to)[:, 0], [1, 2, 3, 4])
    path, to = stopped(tmp_path, done=0)
    embed.embed_file(path, to, numbers, dict(model="b"))  # nothing was done, so nothing is lost


def test_a_damaged_or_full_disk_is_named(tmp_path, monkeypatch):
    path, to = stopped(tmp_path, size=len(embed.npy_header(4, 3)) + 13)
    with pytest.raises(ValueError, match="e.npy.tmp holds 141 bytes, .*e.npy.json says 152: "
                                         "damaged. Start"):
        embed.embed_file(path, to, numbers, dict(model="a"))
    path, to = stopped(tmp_path)
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3))
    with pytest.raises(ValueError, match="are free there; give another --to"):
        embed.embed_file(path, to, numbers, dict(model="a"))


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for n in (10_000, 40_000):
        path = tmp_path / f"{n}.txt"
        path.write_text("".join(f"text number {i}, {'x' * 80}\n" for i in range(n)))
        tracemalloc.start()
        embed.embed_file(str(path), str(tmp_path / f"{n}.npy"), numbers, {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_mistakes_end_in_one_message(runs, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    for args, parts in (
            ([f"--embed={tmp_path}/no.txt"], ["no.txt: no such file", "a text a line"]),
            ([f"--embed={tmp_path}/none.txt"], ["none.txt is empty"]),
            ([f"--embed={tmp_path}/bad.jsonl"],
             ["bad.jsonl:2: no text under 'text' (there is: body)"]),
            ([f"--embed={tmp_path}/a.txt", "--text=a [MASK]", "--top=3"],
             ["text, top: filling masks only"]),
            ([f"--to={tmp_path}/e.npy", "--text=a [MASK]"], ["to: embedding only", "--embed=FILE"]),
            ([f"--embed={tmp_path}/a.txt", "--pooling=cls"],
             ["auto or, for arch=concept, max, concept_mean, concepts, mean"]),
            ([f"--embed={tmp_path}/a.txt", "--to="], ["expected a path"]),
            ([f"--embed={tmp_path}/a.txt", f"--to={tmp_path}"], ["expected a file in a folder"]),
            ([f"--embed={tmp_path}/a.txt", f"--to={tmp_path}/no/e.npy"],
             ["no/e.npy': expected a file in a folder that exists"])):
        refused(call("tools/sample.py", f"--out_dir={runs['concept']}", *args, ok=False), *parts)
    done = sample(runs["transformer"], tmp_path / "a.txt", tmp_path / "e.npy",
                  "--pooling=concepts", ok=False)
    refused(done, "for arch=transformer, mean, max")
    assert not (tmp_path / "e.npy").exists()


def test_broken_weights_are_named_not_embedded(runs, tmp_path):
    run = shutil.copytree(runs["concept"], tmp_path / "run")
    checkpoint = read_checkpoint(run / "best.pt")
    checkpoint["model"]["layers.0.ffn.out.weight"][0, 0] = float("nan")
    torch.save(checkpoint, run / "best.pt")
    (tmp_path / "a.txt").write_text("one\n")
    refused(sample(run, tmp_path / "a.txt", tmp_path / "e.npy", ok=False), "NaN or infinity")
    assert not (tmp_path / "e.npy").exists()
