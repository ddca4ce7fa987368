"""Promises of data/inputs.py (standard input, damaged files, folders) and of data/pipeline.py."""

import codecs
import gzip
import io
import json
import os
import re
import runpy
import subprocess
import sys
import unicodedata

import pytest
from conftest import ROOT, refused, run, zstd
from test_filters import decoded, prose, settings, write_jsonl

from data import documents, inputs, texts
from data.bins import DataError

NO_DATATROVE = "datatrove is not installed: pip install -r requirements-extra.txt"
TEXTS = [prose(40, seed) for seed in range(60)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def prepare(out_dir, stdin=None, **changes):
    asked = {"tokenizer": "byte", "val_fraction": 0.2, "num_proc": 1, **changes}
    with pytest.MonkeyPatch.context() as patch:
        if stdin is not None:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin))))
            texts.read_head.cache_clear()
        asked = {name: value if isinstance(value, (int, float)) else str(value)
                 for name, value in asked.items()}
        files = inputs.find_inputs(asked["input"]) if stdin is None else None
        return inputs.prepare_text(settings(out_dir=str(out_dir), **asked), files)


def bins_of(folder):
    return [(folder / f"{split}.bin").read_bytes() for split in ("train", "val")]


# --------------------------------------------------------------------------------------------------
# standard input


def test_standard_input_gives_the_bytes_of_a_file_and_goes_on_when_piped_again(
        tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "HEAD_BYTES", 2000)  # the rest is read once
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    prepare(tmp_path / "file", input=tmp_path / "a.jsonl")
    real, calls = documents.commit, iter(range(1000))

    def commit(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        real(*args)

    asked = {"input": "-", "input_format": "jsonl"}
    with monkeypatch.context() as patch:
        patch.setattr(documents, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "pipe", JSONL, **asked)
    assert 0 < json.loads((tmp_path / "pipe/progress.json").read_text())["n_rows"] < 60
    later = JSONL[:2000] + JSONL[2000:].replace(b"of", b"fo")
    for other, message in ((later, "not what it was"), (JSONL[:3000], "not what it was|no JSON"),
                           (JSONL.replace(b"of", b"fo"), "other settings: input is"),
                           (b"", "other settings: input is")):
        with pytest.raises(DataError, match=message):
            prepare(tmp_path / "pipe", other, **asked)
    prepare(tmp_path / "pipe", JSONL, **asked)
    assert bins_of(tmp_path / "pipe") == bins_of(tmp_path / "file")
    with pytest.raises(DataError, match="made with other settings: input is"):
        prepare(tmp_path / "pipe", JSONL.replace(b"of", b"fo"), **asked)  # not "already complete"


def test_standard_input_of_plain_text_is_cut_like_a_file(tmp_path):
    text = "\n\n".join(TEXTS).encode()
    (tmp_path / "a.txt").write_bytes(text)
    prepare(tmp_path / "file", input=tmp_path / "a.txt", cut_chars=500)
    prepare(tmp_path / "pipe", text, input="-", cut_chars=500)
    assert bins_of(tmp_path / "pipe") == bins_of(tmp_path / "file")
    assert "".join(decoded(tmp_path / "pipe"))


def test_standard_input_of_a_real_pipe(tmp_path):
    command = [sys.executable, "prepare.py", "--input=-", "--input_format=jsonl",
               "--tokenizer=byte", f"--out_dir={tmp_path}", "--val_fraction=0.2", "--num_proc=1"]
    done = subprocess.run(command, input=JSONL, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path) == sorted(TEXTS)


def test_what_standard_input_cannot_be_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "HEAD_BYTES", 1000)  # a longer pipe can be read once
    cases = ((JSONL, {"tokenizer": "bpe:600"}, "a file first.*or train a tokenizer"),
             (JSONL, {"input_format": "csv"}, "text or jsonl"),
             (gzip.compress(JSONL), {}, "is gzip.*zcat"), (zstd.compress(JSONL), {}, "is zstd"),
             (b"", {}, "none of 0 documents"))
    for stdin, asked, message in cases:
        with pytest.raises(DataError, match=message):
            prepare(tmp_path / "out", stdin, input="-", **asked)


# --------------------------------------------------------------------------------------------------
# damage


def damaged(path, lines):
    """Writes `lines` as a file of the kind that `path` says, with the end of it destroyed."""
    data, text = b"".join(lines), [json.loads(line)["text"] for line in lines]
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data)[:-200])
    elif path.suffix == ".zst":
        path.write_bytes(zstd.compress(data[:4000]) + zstd.compress(data[4000:])[:-100])
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": text}), path, row_group_size=5)
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2 : len(whole) // 2 + 400] = bytes(400)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.jsonl.zst", "b.parquet"])
def test_a_damaged_file_in_the_middle_is_refused_or_skipped_named_and_counted(
        name, tmp_path, capsys):
    lines = JSONL.splitlines(keepends=True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(b"".join(lines[:20]))
    damaged(tmp_path / "in" / name, lines[20:40])
    (tmp_path / "in/c.jsonl").write_bytes(b"".join(lines[40:]))
    with pytest.raises(DataError, match=f"{name}.*--on_bad_file=skip"):
        prepare(tmp_path / "refused", input=tmp_path / "in")
    result = prepare(tmp_path / "out", input=tmp_path / "in", on_bad_file="skip")
    assert result["bad_files"] == 1
    assert re.search(f"in/{name}: .*The rest of it is skipped", capsys.readouterr().err)
    found = decoded(tmp_path / "out")
    # what was before the damage stays
    assert set(TEXTS[:20] + TEXTS[40:]) <= set(found) < set(TEXTS)


def test_a_cut_zst_file_is_noticed_wherever_it_is_cut(tmp_path):
    packed = zstd.compress(JSONL[:5000]) + zstd.compress(JSONL[5000:])
    reader, borders = inputs.Reader(settings()), {len(zstd.compress(JSONL[:5000])), len(packed)}
    path = tmp_path / "a.jsonl.zst"
    for end in {*range(1, len(packed), 211), *borders, len(packed) - 1}:
        path.write_bytes(packed[:end])
        try:
            list(reader.texts(str(path), ".txt"))
            assert end in borders
        except DataError as error:
            assert "cut short" in str(error) and end not in borders
    path.write_bytes(b"\x50\x2a\x4d\x18\x03\0\0\0abc" + packed)  # with a frame that holds no text
    assert list(reader.texts(str(path), ".jsonl")) == TEXTS


def test_utf_16_is_a_bad_file_and_not_thousands_of_replacement_characters(tmp_path):
    for encoding, bom in (("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE)):
        for name in ("a.txt", "a.jsonl"):
            (tmp_path / name).write_bytes(bom + JSONL.decode().encode(encoding))
            with pytest.raises(DataError, match=f"{name}: UTF-16.*iconv"):
                prepare(tmp_path / "out", input=tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
def test_all_that_stands_before_a_cut_is_kept(name, tmp_path, capsys):
    whole = JSONL if "jsonl" in name else "\n".join(TEXTS).encode()
    pack = gzip.compress if name.endswith("gz") else zstd.compress
    (tmp_path / name).write_bytes(pack(whole[:8000]) + pack(whole[8000:])[:-9])
    reader = inputs.Reader(settings(on_bad_file="skip", cut_chars=100))
    *found, last = reader.texts(str(tmp_path / name), texts.kind(name))
    assert last is documents.BAD_FILE and "cut short" in capsys.readouterr().err
    kept = "".join(found) if "txt" in name else "".join(
        json.dumps({"text": text}) + "\n" for text in found)
    assert len(kept) > 7800 - 200 and whole.startswith(kept.encode())


def test_lines_after_a_giant_one_keep_their_numbers_and_it_is_not_called_bad_utf8(
        tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_LINE", 1001)
    giant = json.dumps({"text": "\u00e9" * 3000}, ensure_ascii=False)  # cut inside a character
    (tmp_path / "a.jsonl").write_text(f'{{"text": "1"}}\n{giant}\n{{"text": "3"}}\n[4]\n')
    reader = inputs.Reader(settings(on_bad_utf8="refuse", on_bad_line="skip"))
    places = [where.split(":")[-1] for where, *_ in reader.values(str(tmp_path / "a.jsonl"))]
    assert places == ["1", "2", "3", "4"]


def test_a_packed_file_that_is_named_as_text_is_refused(tmp_path):
    for data, what in ((gzip.compress(JSONL), "gzip"), (zstd.compress(JSONL), "zstd")):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(DataError, match=f"a.txt is {what}, and its name says text: rename it"):
            prepare(tmp_path / "out", input=tmp_path / "a.txt")


def test_a_path_may_be_written_in_another_way_when_a_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    monkeypatch.chdir(tmp_path)
    named = {inputs.find_inputs(path).named for path in ("a.jsonl", "./a.jsonl", ".//a.jsonl")}
    assert len(named) == 1


def test_few_long_documents_of_a_large_jsonl_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "SMALL_BYTES", 1000)
    write_jsonl(tmp_path / "a.jsonl", [" ".join(TEXTS[i::6]) * 20 for i in range(6)])
    done = prepare(tmp_path / "out", input=tmp_path / "a.jsonl", val_fraction=0)
    assert done["val_tokens"] > 0 and done["documents"] > 20


def test_a_giant_line_is_one_bad_line(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_LINE", 1000)
    giant = json.dumps({"text": "x" * 5000}).encode()
    hidden = b" " * 1000 + b'{"text": "what looks like a line in the middle of one"}'
    good = JSONL[:4000].rpartition(b"\n")[0]
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + giant + hidden + b"\n" + giant)
    result = prepare(tmp_path / "out", input=tmp_path / "a.jsonl", on_bad_line="skip")
    assert result["bad_lines"] == 2
    assert decoded(tmp_path / "out") == sorted(TEXTS[: result["documents"]])
    with pytest.raises(DataError, match="a line of more than 1,000 bytes"):
        prepare(tmp_path / "refused", input=tmp_path / "a.jsonl")


def test_nul_bytes_line_ends_and_decomposed_accents_come_back(tmp_path):
    odd = ["a\0b\0\0c", "one\r\ntwo\rthree\n", unicodedata.normalize("NFD", "caf\u00e9 \u1ebf"),
           "caf\u00e9 \u1ebf", "\ufeffnot at the start", "\x85\u2028x\x0b\x1c", "tab\tand\x7f"]
    write_jsonl(tmp_path / "a.jsonl", [*odd, *TEXTS])
    prepare(tmp_path / "out", input=tmp_path / "a.jsonl")
    assert decoded(tmp_path / "out") == sorted([*odd, *TEXTS])


# --------------------------------------------------------------------------------------------------
# folders


def test_a_folder_is_listed_once_and_links_that_leave_it_are_refused(tmp_path, monkeypatch):
    (tmp_path / "in/deep/.hidden").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("in/b.txt", "in/deep/a.md", "in/deep/.hidden/c.txt", "in/.d.txt", "in/e.csv",
                 "elsewhere/f.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "in/link.txt").symlink_to("deep/a.md")
    (tmp_path / "in/again").symlink_to("deep")
    (tmp_path / "in/e.link").symlink_to(tmp_path / "elsewhere/f.txt")  # no input: not followed
    stats = []
    monkeypatch.setattr(os.path, "getsize", lambda path: stats.append(path))
    paths, sizes, _ = inputs.find_inputs(f"{tmp_path}/in,{tmp_path}/in")
    assert paths == [f"{tmp_path}/in/{name}" for name in ("b.txt", "deep/a.md", "link.txt")]
    assert sizes.tolist() == [8, 12, 12] and not stats
    for name, target in (("in/out.txt", "elsewhere/f.txt"), ("in/deep/out", "elsewhere")):
        (tmp_path / name).symlink_to(tmp_path / target)
        message = f"{name[3:]}.* leads out of .*in, to .*{target}.*--follow_links=1"
        with pytest.raises(DataError, match=message):
            inputs.find_inputs(f"{tmp_path}/in")
        (tmp_path / name).unlink()
    (tmp_path / "in/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "in")
    paths = inputs.find_inputs(f"{tmp_path}/in", follow_links=1).paths
    assert {f"{tmp_path}/in/{name}" for name in ("b.txt", "out/f.txt")} < set(paths)
    assert len(paths) < 12


# --------------------------------------------------------------------------------------------------
# data/pipeline.py


@pytest.fixture(scope="module")
def some_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for i in range(4):
        texts = TEXTS[10 * i : 10 * i + 20] + [TEXTS[i] + " more"]
        write_jsonl(folder / f"{i}.jsonl", texts)
    return folder


def test_the_datatrove_pipeline_gives_the_bytes_of_one_machine(some_files, tmp_path):
    pytest.importorskip("datatrove", reason=NO_DATATROVE)
    asked = [f"--input={some_files}", "--tokenizer=byte", "--val_fraction=0.2",
             "--minhash_bands=14", "--min_words=5"]
    run("prepare.py", *asked, f"--out_dir={tmp_path / 'one'}", "--num_proc=1")
    command = [sys.executable, "data/pipeline.py", *asked, f"--out_dir={tmp_path / 'many'}",
               "--tasks=3", "--workers=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bins_of(tmp_path / "many") == bins_of(tmp_path / "one")
    metas = [json.loads((tmp_path / name / "meta.json").read_text()) for name in ("one", "many")]
    for meta in metas:
        meta.pop("command")
    assert metas[0] == metas[1]
    assert metas[0]["dropped"]["near_duplicates"] > 0 < metas[0]["duplicates"]
    one, many = ((tmp_path / name / "dropped.jsonl").read_bytes() for name in ("one", "many"))
    assert one == many
    stats = json.loads((tmp_path / "many_parts/logs_shards/stats.json").read_text())
    assert stats[0]["stats"]["documents"]["total"] > metas[0]["splits"]["train"]["documents"]


def test_the_pipeline_can_be_sent_to_slurm_and_ray(tmp_path):
    dill = pytest.importorskip("dill")
    pytest.importorskip("datatrove", reason=NO_DATATROVE)
    pipeline = runpy.run_path(str(ROOT / "data/pipeline.py"), run_name="pipeline")
    asked = {name: default for name, (default, _) in pipeline["own"].items()} | {"tasks": 5}
    for name, kind in (("slurm", "SlurmPipelineExecutor"), ("ray", "RayPipelineExecutor")):
        asked_here = {**asked, "executor": name}
        executor = pipeline["make_executors"](settings(out_dir=str(tmp_path / "x")), asked_here)
        assert (type(executor).__name__, executor.tasks, executor.depends.tasks) == (kind, 1, 5)
        [step] = dill.loads(dill.dumps(executor.depends)).pipeline
        assert step.settings["num_proc"] == 1 and step.parts_dir == f"{tmp_path}/x_parts"
    with pytest.raises(DataError, match="local, slurm or ray"):
        pipeline["make_executors"](settings(out_dir="x"), {**asked, "executor": "dask"})


def test_a_mistake_in_the_pipeline_is_one_message_before_anything_starts(some_files, tmp_path):
    pytest.importorskip("datatrove", reason=NO_DATATROVE)
    where = [f"--input={some_files}", f"--out_dir={tmp_path / 'out'}"]
    mistakes = (("--quality=gofer", "gopher, c4"), ("--qualty=c4", "did you mean 'quality'"))
    for wrong, message in mistakes:
        refused(run("data/pipeline.py", *where, wrong, ok=False), message)
    check = runpy.run_path(str(ROOT / "data/pipeline.py"), run_name="pipeline")["check"]
    good = {"input": str(some_files), "out_dir": str(tmp_path / "out")}
    check(settings(**good), 4)
    mistakes = (({}, 9, "9 shards of 4 files"), ({"shard": "0/2"}, 2, "no --shard"),
                ({"input": "-"}, 2, "--input=GLOB"))
    for wrong, tasks, message in mistakes:
        with pytest.raises(DataError, match=message):
            check(settings(**{**good, **wrong}), tasks)
    assert not list(tmp_path.iterdir())
