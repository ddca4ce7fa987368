"""Promises of prepare.py and data/NAME/prepare.py: kills, full disks and every kind of input."""

import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from conftest import call, crashed, zstd

from configurator import read_settings
from data import documents, inputs, workers, writer
from data import reader as shards
from data.bins import DataError
from data.merge import merge_parts
from data.tokenizer import Tokenizer

pytestmark = pytest.mark.long

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATA = os.path.join(ROOT, "..", "shared", "data")
# prepare.py with chunks of 20 kB instead of 4 MB: a small input can be killed at many moments
SMALL_CHUNKS = f"""
import runpy, sys
sys.path.insert(0, {ROOT!r})
from data import documents
documents.CHUNK_BYTES = 20_000
runpy.run_path({ROOT!r} + "/prepare.py", run_name="__main__")
"""


def all_settings(**changes):
    """The settings of prepare.py with their defaults, but for `changes`."""
    known = read_settings(os.path.join(ROOT, "prepare.py"))
    return {**{name: default for name, (default, _) in known.items()}, **changes}


def texts(n=60):
    """n different documents of 50 to 300 words, partly made up: a BPE has something to learn."""
    rng = np.random.default_rng(1)
    made_up = ["".join(map(chr, rng.integers(0x61, 0x7B, 6))) for _ in range(200)]
    known = "the a concept reads long sequence of naïve tokens 漢字 and thinks\n\n".split(" ")
    words = np.array(known + made_up)
    return [f"{i} " + " ".join(rng.choice(words, rng.integers(50, 300))) for i in range(n)]


def write_jsonl(path, some_texts):
    rows = [{"id": i, "text": text} for i, text in enumerate(some_texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(*args, code=SMALL_CHUNKS, **popen):
    """Starts a new python -c `code` with `args`: for kills, and for what a process owns."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], **pipes, **popen)


def finished(process):
    """(exit code, stdout, stderr); no program of ours may show a traceback."""
    out, err = process.communicate()
    assert "Traceback" not in err, err
    return process.returncode, out, err


def prepare(*args, script="prepare.py", chunk_bytes=documents.CHUNK_BYTES):
    """Runs a script to its good end, in this process -> its JSON line."""
    with mock.patch.object(documents, "CHUNK_BYTES", chunk_bytes):
        done = call(os.path.join(ROOT, script), *args, cwd=os.getcwd())
    return json.loads(done.stdout.splitlines()[-1])


def refusal(*args):
    """Runs prepare.py to its bad end, in this process -> what it said."""
    done = call(os.path.join(ROOT, "prepare.py"), *args, ok=False, cwd=os.getcwd())
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
    return done.stdout


def small(folder, some_texts, **settings):
    """write_dataset in this process, chunks of 20 kB."""
    settings = {"tokenizer": "byte", "val_fraction": 0.1, "num_proc": 1, **settings}
    units = documents.from_texts(lambda: ((text, None) for text in some_texts))
    return documents.write_dataset(units, str(folder), **settings)


def contents(folder, meta=True):
    """{name: bytes} of all files; the command line in meta.json is left out."""
    found = {str(path.relative_to(folder)): path.read_bytes()
             for path in folder.rglob("*") if path.is_file()}
    about = json.loads(found.pop("meta.json"))
    about.pop("command")
    return {**found, "meta": about} if meta else found


def decoded(folder):
    """Sorted documents of both splits."""
    meta = json.loads((folder / "meta.json").read_text())
    tok, found = Tokenizer.load(str(folder / "tokenizer")), []
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}.bin", meta["dtype"])
        ends = np.flatnonzero(ids == meta["eot_id"]) + 1
        found += [tok.decode(part[:-1]) for part in np.split(ids, ends)[:-1]]
    return sorted(found)


# --------------------------------------------------------------------------------------------------
# killed, stopped, full


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1,500 documents, 1.4 MB, and what an undisturbed run makes of them; it trains a BPE."""
    folder = tmp_path_factory.mktemp("corpus")
    path = write_jsonl(folder / "in.jsonl", texts(1500))
    args = [f"--input={path}", "--tokenizer=bpe:600", "--val_fraction=0.05"]
    prepare(*args, f"--out_dir={folder / 'whole'}", "--num_proc=1", chunk_bytes=20_000)
    return args, folder / "whole"


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The same with the vocabulary of `corpus`, so that not every run trains one."""
    folder, ([given, _, share], whole) = tmp_path_factory.mktemp("trained"), corpus
    args = [given, f"--tokenizer={whole / 'tokenizer'}", share]
    prepare(*args, f"--out_dir={folder / 'whole'}", "--num_proc=1", chunk_bytes=20_000)
    return args, folder / "whole"


def committed(folder):
    """Number of documents that progress.json vouches for, -1 without one."""
    try:
        return json.loads((folder / "progress.json").read_text())["n_rows"]
    except FileNotFoundError:
        return -1


def wait_for_commit(process, folder, beyond):
    while committed(folder) <= beyond and process.poll() is None:
        time.sleep(0.001)
    assert process.poll() is None, "it finished before it could be disturbed"


def test_bytes_do_not_depend_on_num_proc(trained, tmp_path):
    args, whole = trained
    prepare(*args, f"--out_dir={tmp_path}", "--num_proc=3", chunk_bytes=20_000)
    assert contents(tmp_path) == contents(whole)


def test_kill_9_at_any_moment_then_the_same_bytes(corpus, tmp_path):
    args, whole = corpus
    rng, kills = np.random.default_rng(), []
    # the first kill comes while the vocabulary is made
    process = start(*args, f"--out_dir={tmp_path}", "--num_proc=2")
    time.sleep(rng.uniform(0.2, 0.6))
    process.kill()
    for num_proc in (1, 2, 1, 2):
        process = start(*args, f"--out_dir={tmp_path}", f"--num_proc={num_proc}")
        wait_for_commit(process, tmp_path, max(0, committed(tmp_path)))
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.wait()
        kills.append(committed(tmp_path))
    assert 0 < kills[0] < kills[-1], kills
    with pytest.raises(ValueError, match="interrupted"):
        shards.TokenData(str(tmp_path), "train", 8)
    message = refusal(*args[:2], f"--out_dir={tmp_path}", "--val_fraction=0.1")
    assert "val_fraction is 0.05 there and 0.1 now" in message and "rm -rf" in message
    prepare(*args, f"--out_dir={tmp_path}", chunk_bytes=20_000)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("where", ["append", "write_json", "scan", "os.replace", "os.remove"])
def test_a_crash_before_or_after_any_step_then_the_same_bytes(where, tmp_path, monkeypatch):
    """Every single call of the functions that touch the disk, the last renames included."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 20_000)
    settings, some = {"shard_tokens": 15_000, "val_fraction": 0.3}, texts() + texts()[:20]
    assert small(tmp_path / "whole", some, **settings)["duplicates"] == 20
    step = (os, where[3:]) if where.startswith("os.") else (writer, where)
    outs = list(crashed(lambda out: small(out, some, **settings), tmp_path, step))
    assert len(outs) >= 2
    for out in outs:
        assert contents(out) == contents(tmp_path / "whole"), out.name


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly_and_the_same_command_goes_on(stop, trained, tmp_path):
    args, whole = trained
    process = start(*args, f"--out_dir={tmp_path}", "--num_proc=2")
    wait_for_commit(process, tmp_path, 0)
    process.send_signal(stop)
    rc, _, err = finished(process)
    assert rc == 1 and "the same command goes on" in err
    prepare(*args, f"--out_dir={tmp_path}", "--num_proc=1", chunk_bytes=20_000)
    assert contents(tmp_path) == contents(whole)


def test_a_full_disk_is_one_message_and_the_same_command_goes_on(trained, tmp_path):
    args, whole = trained

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    rc, _, message = finished(start(*args, f"--out_dir={tmp_path}", "--num_proc=2",
                                    preexec_fn=limit))
    assert rc == 1
    assert "while writing" in message and "goes on" in message and committed(tmp_path) > 0
    prepare(*args, f"--out_dir={tmp_path}", "--num_proc=1", chunk_bytes=20_000)
    assert contents(tmp_path) == contents(whole)


def test_a_killed_tokenising_process_is_one_message(trained, tmp_path):
    args, whole = trained
    process = start(*args, f"--out_dir={tmp_path}", "--num_proc=2")
    wait_for_commit(process, tmp_path, 0)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        os.kill(int(file.read().split()[0]), signal.SIGKILL)
    rc, _, err = finished(process)
    assert rc == 1 and "--num_proc=1" in err
    prepare(*args, f"--out_dir={tmp_path}", "--num_proc=1", chunk_bytes=20_000)
    assert contents(tmp_path) == contents(whole)


def test_tokenising_processes_end_with_a_killed_parent(trained, tmp_path):
    process = start(*trained[0], f"--out_dir={tmp_path}", "--num_proc=2")
    wait_for_commit(process, tmp_path, 0)
    process.kill()
    # Every worker inherited stderr, so this returns when none of them is left.
    process.communicate(timeout=20)


def test_the_vocabulary_is_trained_on_a_bounded_sample_without_val(monkeypatch):
    monkeypatch.setattr(documents, "SAMPLE_BYTES", 50_000)
    some = texts(300)
    orders = [documents.from_texts(lambda order=order: ((text, None) for text in order))
              for order in (some, some[::-1] + some)]
    samples = [list(documents.training_sample(order, 0.3)) for order in orders]
    assert samples[0] == samples[1]
    assert 20_000 < sum(len(text.encode()) for text in samples[0]) <= 50_000
    keys = b"".join(documents.digest(text.encode()) for text in some)
    keys = np.frombuffer(keys, "<u8").reshape(-1, 2)
    is_val = dict(zip(some, documents.in_val(keys, 0.3)))
    assert 50 < sum(is_val.values()) < 150 and not any(is_val[text] for text in samples[0])
    forced = documents.from_texts(
        lambda: ((text, "val" if "7" in text[:2] else "train") for text in some[:40]))
    assert list(documents.training_sample(forced, 0.3)) and not any(
        "7" in text[:2] for text in documents.training_sample(forced, 0.3))


def test_two_prepares_do_not_mix(tmp_path):
    refused = pytest.raises(ValueError, match="another prepare is writing there")
    with writer.locked(str(tmp_path)), refused:
        small(tmp_path, texts())


def test_a_finished_folder_is_left_alone(corpus):
    args, whole = corpus
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    result = prepare(*args, f"--out_dir={whole}")
    assert result["documents"] == 1500 and result["mb_per_s"] is None
    message = refusal(args[0], f"--out_dir={whole}", "--tokenizer=byte")
    assert "tokenizer is 'bpe:600' there and 'byte' now" in message
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_a_mistyped_tokenizer_does_not_bind_the_folder(corpus, tmp_path):
    args, _ = corpus
    assert "gpt22" in refusal(args[0], f"--out_dir={tmp_path}", "--tokenizer=gpt22")
    assert "bpe:16000" in refusal(args[0], f"--out_dir={tmp_path}", "--tokenizer=bpe:many")
    # not enough text for this vocabulary
    message = refusal(args[0], f"--out_dir={tmp_path}", "--tokenizer=bpe:16000")
    assert "16,000 were asked for" in message
    assert prepare(args[0], f"--out_dir={tmp_path}", "--tokenizer=byte")["n_vocab"] == 261


def test_bins_of_others_are_not_touched(corpus, tmp_path):
    (tmp_path / "train.bin").write_bytes(b"precious")
    assert "not made by this command" in refusal(corpus[0][0], f"--out_dir={tmp_path}")
    assert (tmp_path / "train.bin").read_bytes() == b"precious"


def test_validate_finds_one_flipped_bit(corpus, tmp_path):
    args, _ = corpus
    prepare(args[0], f"--out_dir={tmp_path}", "--tokenizer=byte")
    assert prepare("validate", f"--data_dir={tmp_path}")["valid"] is True
    data = bytearray((tmp_path / "train.bin").read_bytes())
    data[1000] ^= 1
    (tmp_path / "train.bin").write_bytes(data)
    assert "sha256" in refusal("validate", f"--data_dir={tmp_path}")


def test_validate_compares_counts_and_entropy(tmp_path):
    small(tmp_path, texts())
    meta = json.loads((tmp_path / "meta.json").read_text())
    for name, change in (("documents", {"documents": 7}), ("bytes of text", {"bytes": 7})):
        train = {**meta["splits"]["train"], **change}
        changed = {**meta, "splits": {**meta["splits"], "train": train}}
        (tmp_path / "meta.json").write_text(json.dumps(changed))
        assert f"{name}, expected 7" in refusal("validate", f"--data_dir={tmp_path}")
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "unigram_entropy": 1.0}))
    assert "meta.json says 1.0" in refusal("validate", f"--data_dir={tmp_path}")
    assert "no other setting" in refusal("validate", f"--data_dir={tmp_path}", "--num_proc=2")


# --------------------------------------------------------------------------------------------------
# kinds of input


@pytest.fixture(scope="module")
def from_jsonl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jsonl")
    path = write_jsonl(folder / "in.jsonl", texts())
    prepare(f"--input={path}", f"--out_dir={folder / 'out'}", "--tokenizer=byte",
            "--val_fraction=0.1")
    return folder


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_packed_inputs_equal_jsonl(suffix, from_jsonl, tmp_path):
    plain, path = (from_jsonl / "in.jsonl").read_bytes(), tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"text": texts(), "n": range(60)})
        parquet.write_table(table, path, row_group_size=7)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(plain))
    else:
        path.write_bytes(zstd.compress(plain[:5000]) + zstd.compress(plain[5000:]))  # two frames
    prepare(f"--input={path}", f"--out_dir={tmp_path / 'out'}", "--tokenizer=byte",
            "--val_fraction=0.1")
    assert contents(tmp_path / "out", meta=False) == contents(from_jsonl / "out", meta=False)


def test_text_files_come_back_whole(tmp_path):
    """Folders, globs, .md, a byte order mark, Windows line ends; pieces of one file join to it."""
    long = "\n\n".join(texts(40))
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "in/deep/b.md").write_text(long)
    (tmp_path / "in/ignored.csv").write_text("1,2")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    result = prepare(f"--input={tmp_path}/in,{tmp_path}/*.gz", f"--out_dir={tmp_path / 'out'}",
                     "--tokenizer=byte", "--cut_chars=2000", "--val_fraction=0.2")
    assert result["bytes"] == len(long.encode()) + len("one\r\ntwo") + len("packed")
    found = decoded(tmp_path / "out")
    assert {"one\r\ntwo", "packed"} <= set(found) and max(map(len, found)) <= 2000
    pieces = workers.cut(long, 2000)
    assert "".join(pieces) == long and set(pieces) == set(found) - {"one\r\ntwo", "packed"}
    assert sum(piece.endswith("\n\n") for piece in pieces) > len(pieces) / 2


def test_bytes_that_are_not_utf8_are_replaced_or_refused(tmp_path):
    good = b"x" * 1_048_575 + "é".encode()  # a character over the border of two reads is fine
    (tmp_path / "a.txt").write_bytes(good + b"\n\n" + b"caf\xe9 " * 3 + b"\n" + b"y" * 3000)
    args = [f"--input={tmp_path}/a.txt", f"--out_dir={tmp_path}/out", "--tokenizer=byte",
            "--cut_chars=1000"]
    message = refusal(*args, "--on_bad_utf8=refuse")
    assert f"a.txt: not UTF-8 at byte {len(good) + 2 + 3:,};" in message
    result = prepare(*args, "--val_fraction=0.1")
    assert result["replacement_characters"] == 3
    assert any("caf\ufffd caf\ufffd" in text for text in decoded(tmp_path / "out"))


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "left \\ud800 right"}\n' + "".join(
        json.dumps({"text": text}) + "\n" for text in texts()))
    args = [f"--out_dir={tmp_path}/out", "--tokenizer=byte", "--val_fraction=0.1"]
    assert prepare(f"--input={tmp_path}/a.jsonl", *args)["replacement_characters"] == 1
    assert "left \ufffd right" in decoded(tmp_path / "out")
    assert prepare("validate", f"--data_dir={tmp_path}/out")["valid"]


BAD_INPUT = {
    "no such file": (None, "", "matches nothing"),
    "unknown suffix": ("a.csv", b"1,2", "a.csv: unknown kind of file.*parquet"),
    "empty file": ("a.txt", b"", "the file is empty"),
    "no JSON": ("a.jsonl", b'{"text": "x"}\n\n{"text": oops}\n',
                r"a.jsonl:3: no JSON.*--on_bad_line=skip"),
    "no text_key": ("a.jsonl", b'{"text": "x"}\n{"txt": "y", "n": 1}\n',
                    r"a.jsonl:2: no text under 'text' .*txt, n"),
    "text is a number": ("a.jsonl", b'{"text": 5}\n', r"a.jsonl:1: no text under 'text'"),
    "line is a list": ("a.jsonl", b'["x"]\n',
                       r"a.jsonl:1: no text under 'text' \(there is: list\)"),
    "nested too deeply": ("a.jsonl", b"[" * 200_000 + b"\n", r"a.jsonl:1: nested too deeply"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-20],
                 "a.jsonl.gz: damaged or cut short"),
    "no gzip": ("a.txt.gz", b"plain text", "a.txt.gz: damaged or cut short"),
    "no zstd": ("a.txt.zst", b"plain text", "a.txt.zst: damaged or cut short"),
    "cut zstd": ("a.txt.zst", zstd.compress(b"some text " * 999)[:-5],
                 "a.txt.zst: damaged or cut short"),
    "no parquet": ("a.parquet", b"plain text",
                   "a.parquet: damaged or cut short .not a whole .parquet file"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_message(name, tmp_path):
    file, data, message = BAD_INPUT[name]
    if file:
        (tmp_path / file).write_bytes(data)
    error = refusal(f"--input={tmp_path / (file or '*.txt')}", f"--out_dir={tmp_path}/out",
                    "--tokenizer=byte")
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error), error


def test_a_number_out_of_range_or_a_setting_without_effect_is_one_message(tmp_path):
    path, ids = write_jsonl(tmp_path / "a.jsonl", texts()), tmp_path / "a.npy"
    np.save(ids, np.arange(1000, dtype=np.int32) % 200)
    np.save(tmp_path / "b.npy", np.arange(9, dtype=np.int32))
    of_ids = [f"--input={ids}", "--tokenizer=byte"]
    for args, message in (
            ([f"--input={path}", "--val_fraction=1"], "expected 0 <= val_fraction < 1"),
            ([f"--input={path}", "--val_fraction=-0.1"], "expected 0 <= val_fraction < 1"),
            ([f"--input={path}", "--minhash_rows=3"], "--minhash_rows: no effect without "
                                                      "--minhash_bands"),
            ([f"--input={path}", "--min_language_p=0.9"], "no effect without --language"),
            ([*of_ids, "--sequence_length=-1"], "--sequence_length=-1: expected a number"),
            ([f"--input={tmp_path}/x.bin", "--tokenizer=byte", "--token_dtype=i4,,"],
             "--token_dtype=i4,,: expected uint16")):
        (tmp_path / "x.bin").write_bytes(bytes(100))
        assert message in refusal(*args, f"--out_dir={tmp_path}/out")
    said = finished(start("validate", f"--input={ids}", "--tokenizer=byte"))[1]
    assert "--input=" in said and "prepare.py split" not in said  # it would take b.npy, too


def test_a_shard_is_known_as_one(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts())
    prepare(f"--input={path}", f"--out_dir={tmp_path}/0", "--shard=0/1", "--tokenizer=byte",
            "--val_fraction=0.1")
    for mode in ("validate", "split"):
        args = [f"--out_dir={tmp_path}/x"] if mode == "split" else []
        assert "is one shard of a data set" in refusal(mode, f"--data_dir={tmp_path}/0", *args)


def test_a_data_set_can_stand_for_its_tokenizer(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts())
    args = [f"--input={path}", "--val_fraction=0.1"]
    one = prepare(*args, f"--out_dir={tmp_path}/1", "--tokenizer=bpe:512")
    two = prepare(*args, f"--out_dir={tmp_path}/2", f"--tokenizer={tmp_path}/1")
    assert one["train_tokens"] == two["train_tokens"] and two["n_vocab"] == 512


def test_parquet_without_the_column_names_those_it_has(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"], "text": [1]}), tmp_path / "a.parquet")
    args = [f"--input={tmp_path}/a.parquet", f"--out_dir={tmp_path}/out", "--tokenizer=byte"]
    for key in ("text", "nothing"):
        message = refusal(*args, f"--text_key={key}")
        assert f"no column of strings '{key}' (there is: body (string), text (int64))" in message


def test_bad_lines_can_be_skipped_and_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts())
    path.write_text(path.read_text() + "oops\n{}\n")
    result = prepare(f"--input={path}", f"--out_dir={tmp_path}/out", "--tokenizer=byte",
                     "--val_fraction=0.1", "--on_bad_line=skip")
    assert (result["documents"], result["bad_lines"]) == (60, 2)


def test_50_mb_on_one_line_in_bounded_memory(tmp_path):
    rng = np.random.default_rng(0)
    line = "".join(map(chr, rng.integers(0x61, 0x7B, 1_000_000))) + "é"  # no space anywhere
    with open(tmp_path / "a.txt", "w", encoding="utf-8") as file:
        for i in range(50):
            file.write(f"{i}{line}")
    # ru_maxrss of a new process would be that of pytest, which it was forked from
    own = "int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    children = "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss"
    code = SMALL_CHUNKS.replace(
        "documents.CHUNK_BYTES = 20_000", "import atexit, re, resource; atexit.register(lambda: "
        f"print({own} // 1024, {children} // 1024, file=sys.stderr))")
    rc, out, err = finished(start(
        f"--input={tmp_path}/a.txt", f"--out_dir={tmp_path}/out", "--tokenizer=byte",
        "--num_proc=2", "--val_fraction=0.1", code=code))
    assert rc == 0, err
    assert json.loads(out.splitlines()[-1])["bytes"] == (tmp_path / "a.txt").stat().st_size
    parent, child = map(int, err.splitlines()[-1].split())
    assert parent + 2 * child < 1000, f"{parent} MiB and twice {child} MiB"
    data = b"".join((tmp_path / f"out/{split}.bin").read_bytes()[::2] for split in ("train", "val"))
    n_documents = json.loads(out)["documents"]  # each ends in eot_id, 260, whose low byte is 4
    text = (tmp_path / "a.txt").read_bytes()
    total, expected = (np.frombuffer(part, np.uint8).sum(dtype=np.int64) for part in (data, text))
    assert total == expected + 4 * n_documents


# --------------------------------------------------------------------------------------------------
# one text is enough

def prepared(tmp_path, name, data, **changes):
    """What prepare.py makes of one file, in this process -> (its summary, the splits)."""
    (tmp_path / name).write_bytes(data)
    asked = all_settings(out_dir=str(tmp_path / "out"), num_proc=1, **changes)
    done = inputs.prepare_text({**asked, "input": str(tmp_path / name)},
                               inputs.find_inputs(str(tmp_path / name)))
    return done, json.loads((tmp_path / "out/meta.json").read_text())


@pytest.mark.parametrize("size", [300, 2000, 20_000, 1_000_000])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", " ", ""])
def test_one_text_file_of_any_size_gives_train_and_val(size, line_end, tmp_path, capsys):
    some = texts(1 + size // 300)
    text = (line_end * 2).join(some)[:size]
    done, meta = prepared(tmp_path, "input.txt", text.encode())
    assert sum(map(len, decoded(tmp_path / "out"))) == len(text)
    share = meta["splits"]["val"]["bytes"] / done["bytes"]
    assert share == pytest.approx(0.1, abs=0.06 if size > 10_000 else 0.3)
    said = capsys.readouterr().out
    assert "pieces of up to" in said and "val got " in said and "--tokenizer=" in said
    again = inputs.prepare_text(
        all_settings(out_dir=str(tmp_path / "out"), input=str(tmp_path / "input.txt")),
        inputs.find_inputs(str(tmp_path / "input.txt")))
    assert again["val_tokens"] == done["val_tokens"], "the same command finds it complete"


def test_the_vocabulary_follows_the_size_of_the_text(tmp_path):
    # The last has so few different words that it is not enough for all of the ids.
    for size, expected in ((10_000, ["byte", 261]), (30_000, ["bpe:<=512", 512]),
                           (1_200_000, ["bpe:<=1000", 1000]), (2_100_000, ["bpe:<=2000", None])):
        text = " ".join(texts(size // 900))[:size]
        _, meta = prepared(tmp_path, f"{size}.txt", text.encode())
        n_vocab = meta["n_vocab"] if expected[1] else None
        assert [meta["settings"]["tokenizer"], n_vocab] == expected
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("n", [1, 2, 5, 30])
@pytest.mark.parametrize("kind", ["jsonl", "json.gz", "parquet"])
def test_few_documents_are_cut_and_many_are_kept(n, kind, tmp_path):
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts(n)}), tmp_path / "table")
        data = (tmp_path / "table").read_bytes()
    else:
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts(n)).encode()
        data = gzip.compress(data) if kind == "json.gz" else data
    done, meta = prepared(tmp_path, f"a.{kind}", data)
    assert meta["splits"]["val"]["documents"] > 0 < meta["splits"]["train"]["documents"]
    assert (done["documents"] == n) == (n == 30)
    assert sorted("".join(decoded(tmp_path / "out"))) == sorted("".join(texts(n)))


def test_a_val_fraction_that_was_given_is_kept_if_both_splits_get_text(tmp_path):
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts(60)).encode()
    _, meta = prepared(tmp_path, "a.jsonl", data, val_fraction=0.3)
    assert meta["settings"]["val_fraction"] == 0.3
    shutil.rmtree(tmp_path / "out")
    done, meta = prepared(tmp_path, "b.jsonl", data, val_fraction=1e-6)
    assert done["documents"] == 60 and meta["splits"]["val"]["documents"] == 1


def test_a_folder_made_with_other_defaults_is_left_as_it_is(tmp_path):
    """Of 60 files of one document each, as an earlier version prepared them."""
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts(60)).encode()
    done, _ = prepared(tmp_path, "a.jsonl", data, val_fraction=0.2, cut_chars=1_000_000,
                       tokenizer="bpe:600")
    again, _ = prepared(tmp_path, "a.jsonl", data)
    assert {**again, "seconds": 0} == {**done, "seconds": 0, "tokenizer_seconds": 0.0,
                                       "mb_per_s": None}


def test_shards_choose_what_one_machine_chooses(tmp_path):
    for i, text in enumerate(texts(8)):
        (tmp_path / f"{i}.txt").write_text(text)
    files = inputs.find_inputs(str(tmp_path))
    for name, shard in (("one", ""), ("parts/0", "0/2"), ("parts/1", "1/2")):
        inputs.prepare_text(all_settings(input=str(tmp_path), out_dir=str(tmp_path / name),
                                         shard=shard, num_proc=1, tokenizer="byte"), files)
    merge_parts(str(tmp_path / "parts/*"), str(tmp_path / "both"))
    assert contents(tmp_path / "both") == contents(tmp_path / "one")
    assert "cut_all" in json.loads((tmp_path / "one/meta.json").read_text())["settings"]


def test_few_documents_of_token_ids_give_train_and_val(tmp_path):
    ids = np.random.default_rng(0).integers(0, 900, (30, 50)).astype(np.uint16)
    np.save(tmp_path / "a.npy", ids)
    args = [f"--input={tmp_path}/a.npy", f"--out_dir={tmp_path}/out", "--vocab_size=1000",
            "--eot_id=999"]
    done = prepare(*args)
    assert (done["documents"], done["val_tokens"]) == (30, 3 * 51)
    assert prepare(*args)["val_tokens"] == done["val_tokens"]


def test_a_short_pipe_is_enough_too(tmp_path):
    text = "\n\n".join(texts(60))
    done = subprocess.run([sys.executable, f"{ROOT}/prepare.py", "--input=-", "--num_proc=1"],
                          input=text.encode(), cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["out_dir"] == "data/mine"
    assert sum(map(len, decoded(tmp_path / "data/mine"))) == len(text)


# --------------------------------------------------------------------------------------------------
# nothing is removed or replaced that prepare.py did not write


FOREIGN = ["train.bin", "val_00003.bin", "rows.bin.tmp", "dropped.jsonl", "tokenizer.tmp/a",
           "tokenizer/tokenizer.json", "seen_texts_1.tmp", "meta.json.tmp", "progress.json",
           "meta.json", "shard.json"]


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_with_our_names_are_refused_and_kept(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for content in ("{}", "precious"):
        (tmp_path / name).write_text(content)
        with pytest.raises((DataError, FileNotFoundError), match=re.escape(name.split("/")[0])):
            small(tmp_path, texts())
        assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("name", ["notes.txt", "model.bin", "model.bin.tmp", "trainer.bin",
                                  "seen_films.tmp", "train.binary", "val/cat.jpg", "best.tmp"])
def test_files_of_others_beside_ours_stay_as_they_are(name, tmp_path, monkeypatch):
    """Also when a killed command goes on, and when a budget leaves a split empty."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 20_000)
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(DataError, match="none of"):
        small(tmp_path / "out", texts(), max_bytes=1)
    real, calls = documents.commit, iter(range(9))

    def commit(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path / "out", texts())
    (tmp_path / "out/train.bin").write_text("of another program")
    with pytest.raises(DataError, match="train.bin was not made by this command"):
        small(tmp_path / "out", texts())
    assert (tmp_path / "out/train.bin").read_text() == "of another program"
    (tmp_path / "out/train.bin").unlink()
    small(tmp_path / "out", texts())
    small(tmp_path / "whole", texts())
    (tmp_path / "whole" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "whole" / name).write_text("precious")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_empty_out_dir_a_file_and_a_way_back_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="out_dir is empty"):
        small("", texts())
    (tmp_path / "input.txt").write_text("some text")
    assert "expected a path" in refusal("--input=input.txt", "--out_dir=")
    (tmp_path / "input.txt").unlink()
    (tmp_path / "file").write_text("precious")
    for out_dir in ("file", "file/deeper"):
        with pytest.raises(DataError, match="is a file, or lies in one"):
            small(out_dir, texts())
    small("missing/../bins", texts())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bins", "file"]
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    small("link/../here", texts())
    small("link", texts())
    assert (tmp_path / "deep/here/meta.json").exists() and (tmp_path / "link").is_symlink()
    assert (tmp_path / "deep/er/train.bin").exists()


# --------------------------------------------------------------------------------------------------
# data/NAME/prepare.py

def data_script(name):
    return f"import runpy; runpy.run_path('{ROOT}/data/{name}/prepare.py', run_name='__main__')"


def run_data(name, *args):
    return prepare(*args, "--num_proc=1", script=f"data/{name}/prepare.py")


def test_pydocs_is_english_and_the_same_each_time(tmp_path):
    args = ["--max_bytes=300000", "--tokenizer=byte"]
    # In a new process too, which has other hashes of strings.
    rc, _, err = finished(start(*args, f"--out_dir={tmp_path}/b", code=data_script("pydocs")))
    assert rc == 0, err
    result = run_data("pydocs", *args, f"--out_dir={tmp_path}/a")
    assert 300_000 <= result["bytes"] < 400_000
    assert contents(tmp_path / "a", meta=False) == contents(tmp_path / "b", meta=False)
    words = " ".join(decoded(tmp_path / "a")).split()
    assert 0.03 < words.count("the") / len(words) < 0.12  # about 6 % of English prose
    assert not any(mark in " ".join(words) for mark in (">>>", ":class:", "``"))


def test_shakespeare_from_a_local_copy(tmp_path):
    text = "\n\n".join(f"SPEAKER {i}:\n{text}" for i, text in enumerate(texts(100)))
    (tmp_path / "input.txt").write_text(text)
    result = run_data("shakespeare", f"--input={tmp_path}/input.txt", f"--out_dir={tmp_path}/out")
    assert result["bytes"] == len(text.encode()) and result["val_tokens"] > 0


def test_wikitext_keeps_the_official_split_and_cuts_at_articles(tmp_path):
    def article(i):
        section = " = = Section = = \n more \n = Played , W = \n \n"  # ends in a line of a table
        return f" = Title {i} = \n \n {texts()[i]} \n{section}"

    (tmp_path / "train.txt").write_text(" \n" + "".join(map(article, range(9))))
    (tmp_path / "valid.txt").write_text("".join(map(article, range(8, 11))))
    result = run_data("wikitext2", f"--input={tmp_path}", f"--out_dir={tmp_path}/out",
                      "--tokenizer=byte")
    assert (result["documents"], result["duplicates"]) == (11, 1)
    assert decoded(tmp_path / "out") == sorted(map(article, range(11)))
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["splits"]["val"]["documents"] == 3, "the article in both stays in val"


def test_no_network_names_input(tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("shakespeare", "wikitext2"):
        rc, _, err = finished(start(f"--out_dir={tmp_path / name}", code=data_script(name)))
        assert rc == 1 and "--input=" in err


@pytest.mark.skipif(not os.path.isdir(DATA), reason="real data is not part of the repository")
def test_real_wikitext_2(tmp_path):
    result = run_data("wikitext2", f"--input={DATA}/wikitext-2", f"--out_dir={tmp_path}/out",
                      "--tokenizer=byte")
    # WikiText-2 has 600 articles for training and 60 for validation (1609.07843, table 1).
    assert result["bytes"] > 11_000_000 and result["documents"] == 600 + 60


@pytest.mark.parametrize("tokenizer", ["bpe:400", "bpe:many", "bpe:<=1000000"])
def test_an_impossible_vocabulary_leaves_no_folder_behind(tokenizer, tmp_path):
    """Training on that folder would say that its preparation was interrupted."""
    (tmp_path / "text.txt").write_text("some text\n\n" * 100)
    done = call("prepare.py", f"--input={tmp_path}/text.txt", f"--out_dir={tmp_path}/out",
                f"--tokenizer={tokenizer}", ok=False)
    assert done.returncode and "expected" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("done, said", [(0, False), (100, False), (5_000_000, True)])
def test_the_time_left_is_said_once_it_can_be_told(done, said, monkeypatch, capsys):
    """A slow start, of nothing in ten seconds, must not end in a division by zero."""
    clock = iter([0.0, 11.0])
    monkeypatch.setattr(documents.time, "monotonic", lambda: next(clock, 11.0))
    documents.progress(10_000_000, 0, "bytes")(done)
    assert ("min left" in capsys.readouterr().err) == said
