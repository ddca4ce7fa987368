"""data/stats.py: its numbers are those of a plain count, and its advice follows from its table.
data/quick.py runs the commands that it prints."""

import json
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, call, refused, result

from data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Bins of this repository's sources with a vocabulary of 600, in documents of up to 2,000
    characters."""
    folder = tmp_path_factory.mktemp("stats")
    (folder / "texts").mkdir()
    for path in sorted(ROOT.glob("*.py"))[:12]:
        (folder / "texts" / f"{path.stem}.txt").write_text(path.read_text())
    call("prepare.py", f"--input={folder}/texts", f"--out_dir={folder}/bins",
         "--tokenizer=bpe:600", "--cut_chars=2000",
         "--val_fraction=0.2", "--num_proc=1")
    return folder


@pytest.fixture(scope="module")
def stats(made):
    return result(call("data/stats.py", f"--data_dir={made}/bins", "--sample_mb=10",
                       "--vocabularies=1024,512,200000", f"--out_dir={made}/out"))


def test_the_numbers_are_those_of_a_plain_count(made, stats):
    tok = Tokenizer.load(str(made / "bins/tokenizer"))
    ids = np.fromfile(made / "bins/train.bin", "<u2")
    documents = [d[:-1] for d in np.split(ids, np.flatnonzero(ids == tok.eot_id) + 1)[:-1]]
    meta, found = json.loads((made / "bins/meta.json").read_text()), stats["data"][f"{made}/bins"]
    train = meta["splits"]["train"]
    assert (found["documents"], found["bytes"]) == (train["documents"], train["bytes"])
    assert found["tokens"] == train["tokens"] - train["documents"]
    for what, values in (("tokens", [len(d) for d in documents]),
                         ("bytes", [tok.n_bytes[d].sum() for d in documents])):
        expected = np.quantile(values, (0.05, 0.5, 0.95, 1))
        assert list(found[f"document_{what}"].values()) == pytest.approx(expected)
    for T in (128, 512, 2048):
        rows = sum(-(-len(d) // T) for d in documents)
        alone = sum(len(d) % T == 0 for d in documents)  # ends of document that get no row
        share = 1 - (len(ids) - alone) / rows / T
        assert found["padding_of_document_rows"][str(T)] == pytest.approx(share)
    counts = np.bincount(np.concatenate(documents), minlength=600)
    assert found["ids_seen"] == (counts > 0).sum()
    assert found["ids_seen_often"] == (counts >= 100).sum()
    top = np.sort(counts)[::-1][:100].sum()
    assert found["covered_by"] == {"100": pytest.approx(top / counts.sum())}
    assert (made / "out/stats.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((made / "out/stats.json").read_text()) == stats


def functions_of_stats(made, monkeypatch):
    """Runs data/stats.py without vocabularies -> its globals."""
    monkeypatch.setattr("sys.argv", ["stats.py", f"--data_dir={made}/bins", "--vocabularies=",
                                     f"--out_dir={made}/no"])
    return runpy.run_path(str(ROOT / "data/stats.py"), run_name="__main__")


def test_a_chunk_may_end_anywhere(made, stats, monkeypatch):
    """The same documents when 97 tokens are read at a time; the last one may lack its end."""
    scan = functions_of_stats(made, monkeypatch)["scan"]
    tok = Tokenizer.load(str(made / "bins/tokenizer"))
    ids = np.fromfile(made / "bins/train.bin", "<u2")[:5001]
    ids = ids[: -1 - (ids[-2] == tok.eot_id)]  # ends in text
    whole, counts = scan(array_as_data(ids, tok), tok)
    scan.__globals__["CHUNK"] = 97
    for again, n in zip(scan(array_as_data(ids, tok), tok), (whole, counts)):
        assert np.array_equal(again, n)
    documents = np.split(ids, np.flatnonzero(ids == tok.eot_id) + 1)
    documents = [d[d != tok.eot_id] for d in documents if len(d)]
    assert whole[1].tolist() == [len(d) for d in documents] and whole[1, -1] > 0
    assert whole[2].tolist() == [tok.n_bytes[d].sum() for d in documents]
    assert all(np.array_equal(ids[at : at + len(d)], d) for at, d in zip(whole[0], documents))


def array_as_data(ids, tok):
    def read(at, out):
        out[:] = ids[at : at + len(out)]
    return SimpleNamespace(n_tokens=len(ids), dtype=ids.dtype, eot_id=tok.eot_id,
                           stored_pad=tok.eot_id, read=read)


def test_ids_without_text_have_lengths_and_no_vocabularies(tmp_path):
    """Token files padded with 0: what stands between padding and an end is a document."""
    (tmp_path / "ids").mkdir()
    rows = np.zeros((50, 32), np.uint16)
    for n, row in enumerate(rows, 4):
        row[: n % 20 + 2] = [*range(1, n % 20 + 2), 98]
    np.save(tmp_path / "ids/rows.npy", rows)
    call("prepare.py", "split", f"--data_dir={tmp_path}/ids", f"--out_dir={tmp_path}/split",
         "--val_ratio=0.2", "--vocab_size=99", "--eot_id=98", "--pad_id=0")
    done = call("data/stats.py", f"--data_dir={tmp_path}/split", f"--out_dir={tmp_path}/out")
    [found] = result(done)["data"].values()
    tokens = found["document_tokens"]
    assert found["documents"] == 40 and 1 <= tokens["p5"] < tokens["longest"] <= 20
    assert found["ids_seen"] == tokens["longest"]
    assert "only ids of this data are known" in done.stdout


def test_vocabularies_are_those_that_prepare_would_train(made, stats):
    """The same bytes a token as when each is trained by itself; too large a one is left out."""
    tok, texts = Tokenizer.load(str(made / "bins/tokenizer")), {}
    for split in ("train", "val"):
        ids = np.fromfile(made / f"bins/{split}.bin", "<u2")
        texts[split] = tok.decode(ids).split("<|endoftext|>")[:-1]
    small, large, too_large = stats["vocabularies"]
    for found, size in ((small, 512), (large, 1024)):
        trained = Tokenizer.train(texts["train"], size)
        n = {split: sum(map(len, trained.encode(some))) for split, some in texts.items()}
        n_bytes = {split: len("".join(some).encode()) for split, some in texts.items()}
        assert found["bytes_per_token"] == pytest.approx(n_bytes["val"] / n["val"])
        assert found["train_bytes_per_token"] == pytest.approx(n_bytes["train"] / n["train"])
        counts = np.bincount(np.concatenate(trained.encode(texts["train"])), minlength=size)[256:-5]
        assert found["vocabulary"] == size
        assert found["ids_seen_often"] == pytest.approx((counts >= 100).mean())
    assert large["table_parameters"] == {"64": 1024 * 64, "512": 1024 * 512}
    assert too_large == dict(vocabulary=200000, bytes_per_token=None)


def test_the_advice_follows_from_the_table(made, monkeypatch):
    advice = functions_of_stats(made, monkeypatch)["advice"]

    def row(size, often, bytes_per_token=3.0):
        return dict(vocabulary=size, ids_seen_often=often, bytes_per_token=bytes_per_token)

    nothing = dict(vocabulary=64000, bytes_per_token=None)
    line = advice([row(8000, 0.99), row(16000, 0.96), row(32000, 0.5, 3.3), nothing], 1e6)
    assert line.startswith("--tokenizer=bpe:16000: the largest of these of which 95% of the ids "
                           "come 100 times or more")
    assert line.endswith("bpe:32000 would make rows 9.1% shorter, with 50% of its ids seldom "
                         "trained")
    line = advice([row(8000, 0.6), row(16000, 0.2)], 1e6)
    assert "the smallest of these, and yet only 60%" in line
    assert "a larger one may pay" in advice([row(8000, 0.99), row(16000, 0.99)], 1e9)
    assert "not enough for any" in advice([nothing], 1e3)


@pytest.mark.parametrize("setting, message", [
    ("--vocabularies=8000,x", "expected sizes from 512 to 262,144"),
    ("--vocabularies=100", "expected sizes from 512"),
    ("--sample_mb=0", "expected more than 0"),
    ("--data_dir=nowhere", "no prepared data set there")])
def test_stats_of_nothing_are_refused(setting, message, made):
    refused(call("data/stats.py", f"--data_dir={made}/bins", f"--out_dir={made}/no", setting,
                 ok=False), message)


# -----------------------------------------------------------------------------
# make train


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """data/quick.py in a folder of its own, where the commands it runs run in this process ->
    function that runs it, list of its commands, {script: answer that replaces running it}."""
    for path in [*ROOT.glob("*.py"), ROOT / "config", ROOT / "tools"]:
        os.symlink(path, tmp_path / path.name)
    commands, answers, real = [], {}, subprocess.Popen

    class Process:
        def __init__(self, command, **_):
            commands.append(command[1:])
            with mock.patch.object(subprocess, "Popen", real):  # which they use too
                done = answers.get(command[1]) or call(*command[1:], ok=False, cwd=tmp_path)
            self.stdout, self.returncode = done.stdout.splitlines(keepends=True), done.returncode
            sys.stderr.write(getattr(done, "stderr", ""))

        def wait(self):
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Process)
    return lambda *args, ok=True: call("data/quick.py", *args, ok=ok), commands, answers


SMALL = ("--max_steps=2 --n_layer=1 --batch_size=2 --micro_batch=2 --warmup_steps=1 --eval_rows=2 "
         "--health_rows=2 --init_table=random")


def test_text_becomes_an_evaluated_model_in_one_command(made, quick, tmp_path):
    run, commands, _ = quick
    args = [f"--data={made}/texts/*.txt", "--size=mini", f"--args={SMALL}",
            "--eval_args=--rows=16 --health_rows=0",
            "--prepare_args=--tokenizer=byte --val_fraction=0.2 --cut_chars=2000 --num_proc=1"]
    done = run(*args)
    assert [command[0] for command in commands] == [
        "prepare.py", "prepare.py", "train.py", "tools/eval.py"]
    assert commands[1] == ["prepare.py", "validate", "--data_dir=data/texts"]
    assert ("$ python train.py config/mini.py --data_dir=data/texts --out_dir=out/texts_mini "
            f"{SMALL}") in done.stdout
    assert '"stopped": "max_steps"' in done.stdout and result(done)["rows"] == {"data/texts": 16}
    assert (tmp_path / "out/texts_mini/summary.md").exists()


def answer(code=0, **line):
    return SimpleNamespace(stdout=json.dumps(line) + "\n", returncode=code)


def test_a_missing_val_split_is_made_and_a_stopped_run_is_not_evaluated(quick, tmp_path):
    run, commands, answers = quick
    (tmp_path / "ids").mkdir()
    np.save(tmp_path / "ids/rows.npy", np.zeros((4, 8), np.uint16))
    answers |= {"prepare.py": answer(valid=True), "train.py": answer(stopped="SIGINT")}
    of_ids = ["--vocab_size=9", "--eot_id=8"]
    done = run(f"--data={tmp_path}/ids/", "--size=tiny", f"--prepare_args={' '.join(of_ids)}",
               ok=False)
    refused(done, "training was stopped (SIGINT) and saved")
    assert commands == [["prepare.py", "validate", f"--data_dir={tmp_path}/ids", *of_ids],
                        ["prepare.py", "split", f"--data_dir={tmp_path}/ids", "--out_dir=data/ids",
                         "--val_ratio=0.01", *of_ids],
                        ["train.py", "config/tiny.py", "--data_dir=data/ids",
                         "--out_dir=out/ids_tiny"]]


def test_prepared_data_is_used_as_it_is_and_the_first_failure_ends_it(made, quick):
    run, commands, answers = quick
    answers["train.py"] = answer(code=3)
    assert run(f"--data={made}/bins", ok=False).returncode == 3
    assert [command[0] for command in commands] == ["prepare.py", "train.py"]
    assert commands[1][1:] == ["config/micro_balanced.py", f"--data_dir={made}/bins",
                               "--out_dir=out/bins_micro"]


def test_the_folder_that_was_trained_is_the_one_that_is_evaluated(made, quick):
    run, commands, answers = quick
    answers |= {"train.py": answer(stopped="max_steps", out_dir="out/mine"),
                "prepare.py": answer(), "tools/eval.py": answer()}
    run(f"--data={made}/bins", "--size=mini", "--args=--out_dir=out/mine")
    assert commands[-1] == ["tools/eval.py", "--out_dir=out/mine"]


def test_make_train_runs_the_commands_of_this_repository_from_any_folder(
        made, quick, tmp_path, monkeypatch):
    _, commands, answers = quick
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quick.py", f"--data={made}/bins", "--size=mini"])
    names = ["prepare.py", "train.py", "config/mini.py", "tools/eval.py"]
    prepare, train, preset, evaluate = (os.path.relpath(ROOT / name) for name in names)
    answers |= {name: answer(stopped="max_steps", out_dir="out/bins_mini")
                for name in (prepare, train, evaluate)}
    runpy.run_path(str(ROOT / "data/quick.py"), run_name="__main__")
    assert [command[0] for command in commands] == [prepare, train, evaluate]
    assert commands[1][1:] == [preset, f"--data_dir={made}/bins", "--out_dir=out/bins_mini"]


def test_mistakes_name_what_is_expected(quick, tmp_path):
    run, commands, _ = quick
    refused(run(ok=False), "make train DATA=texts/ SIZE=micro")
    refused(run("--data=texts", "--size=huge", ok=False), "size=huge: expected micro, tiny, small")
    refused(run(f"--data={tmp_path}/none", "--size=mini", ok=False), "no such file or folder")
    assert len(commands) == 1


def test_make_train_passes_everything_on():
    lines = subprocess.run(["make", "-n", "train", "DATA=my texts/*.txt", "SIZE=tiny",
                            "ARGS=--max_steps=10 --seed=2"],
                           cwd=ROOT, capture_output=True, text=True).stdout
    assert ("data/quick.py '--data=my texts/*.txt' --size=tiny --nproc=1 "
            "'--args=--max_steps=10 --seed=2'") in lines
