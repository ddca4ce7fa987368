"""data/splitting.py and data/validation.py: a split copies, loses and shares no token, and what the
report says of the tokens is so."""

import json
import os
import re
import resource
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import call, crashed, refused, result
from test_ids import (
    EOT,
    IDS,
    PAD,
    N,
    padded,
    some_documents,
    stream,
    write_arrow,
    write_llm_c,
    write_megatron,
    write_npy,
)

from data import ids as id_files
from data import validation
from data.bins import DataError
from data.documents import digest
from data.reader import TokenData
from data.splitting import make_split
from data.tokenizer import Tokenizer
from data.validation import plan, presets, validate_folder
from model import ConceptConfig, ConceptEncoder

OPTIONS = {"vocab_size": N, "eot_id": EOT}


def rows_of(width, n, seed=0):
    """A stream of documents cut into n rows."""
    ids = np.array(stream(some_documents(n * width // 20, seed)))
    return ids[:n * width].reshape(n, width)


@pytest.fixture
def raw(tmp_path):
    """Three files with rows of 64 tokens and of different types -> folder, all rows in order."""
    folder, rows = tmp_path / "raw", rows_of(64, 100)
    (folder / "deep").mkdir(parents=True)
    write_npy(folder / "a.npy", rows[:37])
    torch.save(torch.tensor(rows[37:60], dtype=torch.int32), folder / "b.pt")
    write_npy(folder / "deep/c.npy", rows[60:], "<u2")
    return folder, rows


def read_all(folder, split, block_size=1):
    """The tokens of a split through TokenData, in blocks."""
    data = TokenData(str(folder), split, block_size)
    return data.block(range(data.n_blocks)).numpy()


def as_set(rows):
    return set(map(bytes, np.array(rows, "<u4")))


def size_on_disk(folder):
    return sum(path.lstat().st_size for path in folder.rglob("*") if "tokenizer" not in path.parts)


# -----------------------------------------------------------------------------
# split


def test_rows_are_split_exactly_and_none_is_copied_shared_or_lost(raw, tmp_path):
    folder, rows = raw
    done = make_split(str(folder), str(tmp_path / "out"), OPTIONS, val_ratio=0.13)
    train, val = (read_all(tmp_path / "out", split, 64) for split in ("train", "val"))
    assert len(val) == done["val_units"] == 13 and len(train) == done["train_units"] == 87
    is_val = np.array([bytes(row) in as_set(val) for row in rows.astype("<u4")])
    assert np.array_equal(train, rows[~is_val]) and np.array_equal(val, rows[is_val])
    assert size_on_disk(tmp_path / "out") < size_on_disk(folder) / 5
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    counts = np.bincount(rows[~is_val].ravel(), minlength=N)
    p = np.delete(counts, EOT)[np.delete(counts, EOT) > 0]
    assert meta["splits"]["train"]["documents"] == counts[EOT]
    assert meta["splits"]["val"]["bytes"] == 0
    entropy = -(p / p.sum() * np.log(p / p.sum())).sum()
    assert meta["unigram_entropy"] == pytest.approx(entropy, abs=1e-9)


def test_batches_of_a_split_are_batches_of_the_same_tokens_in_bins(raw, tmp_path):
    """Whatever the length of a row, across files and ranges, with few files open."""
    folder, _ = raw
    make_split(str(folder), str(tmp_path / "out"), OPTIONS, val_ratio=0.3)
    ids = read_all(tmp_path / "out", "train").ravel()
    shutil.copytree(tmp_path / "out", tmp_path / "bins")
    ids.astype("<u2").tofile(tmp_path / "bins/train.bin")
    meta = json.loads((tmp_path / "bins/meta.json").read_text())
    del meta["sources"]
    meta["splits"]["train"]["files"] = [{"name": "train.bin", "tokens": len(ids), "sha256": ""}]
    (tmp_path / "bins/meta.json").write_text(json.dumps(meta))
    for T in (7, 64, 1000):
        split, bins = (TokenData(str(tmp_path / name), "train", T, seed=3)
                       for name in ("out", "bins"))
        for step in (0, 5):
            assert torch.equal(split.batch(step, 4)[0], bins.batch(step, 4)[0])


def test_thousands_of_files_do_not_need_thousands_of_descriptors(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    monkeypatch.setattr("data.bins.MOST_OPEN", 3)
    rows = rows_of(16, 40)
    for i, row in enumerate(rows):
        write_npy(tmp_path / f"raw/{i:03}.npy", [row])
    make_split(str(tmp_path / "raw"), str(tmp_path / "out"), OPTIONS, val_ratio=0.1)
    data = TokenData(str(tmp_path / "out"), "train", 16)
    train, val = data.block(range(36)).numpy(), read_all(tmp_path / "out", "val", 16)
    assert as_set(train) | as_set(val) == as_set(rows)
    assert len(data.tokens.open) == 3


def test_the_same_split_whatever_order_the_files_are_listed_in(raw, tmp_path, monkeypatch):
    real, found = id_files.glob.glob, []
    for n, step in enumerate((1, -1)):
        monkeypatch.setattr(id_files.glob, "glob",
                            lambda *args, step=step, **more: real(*args, **more)[::step])
        make_split(str(raw[0]), str(tmp_path / f"out{n}"), OPTIONS, val_ratio=0.3)
        paths = (tmp_path / f"out{n}").glob("*.npy")
        found.append({path.name: path.read_bytes() for path in paths})
    assert found[0] == found[1] and len(found[0]) == 2


def test_another_seed_is_another_split_and_the_same_seed_the_same(raw, tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        make_split(str(raw[0]), str(tmp_path / name), OPTIONS, val_ratio=0.3, seed=seed)
    a, b, c = (read_all(tmp_path / name, "val", 64) for name in "abc")
    assert np.array_equal(a, c) and len(a) == len(b) and not np.array_equal(a, b)


@pytest.mark.parametrize("seed", [0, 5])
def test_documents_go_where_the_hash_of_their_ids_says(raw, tmp_path, seed):
    done = make_split(str(raw[0]), str(tmp_path / "out"), OPTIONS, val_ratio=0.3, by="document",
                      seed=seed)
    ids = {split: read_all(tmp_path / "out", split).ravel() for split in ("train", "val")}
    parts = {split: np.split(part, np.flatnonzero(part == EOT) + 1) for split, part in ids.items()}
    train, val = ({bytes(d[:-1].astype("<u4")) for d in parts[split] if EOT in d}
                  for split in parts)
    whole = {bytes(np.array(d, "<u4")) for d in some_documents(320)}
    assert not train & val and len(whole & (train | val)) > 130
    assert 0.15 < len(val) / len(train | val) < 0.45
    assert sum(map(len, ids.values())) == 6400 == done["train_tokens"] + done["val_tokens"]
    if seed == 0:  # as prepare.py decides
        for d in whole & (train | val):
            assert (int.from_bytes(digest(d)[8:], "little") < 0.3 * 2**64) == (d in val)


def test_padding_stays_with_its_document(tmp_path):
    (tmp_path / "raw").mkdir()
    rows = padded(some_documents())
    write_npy(tmp_path / "raw/a.npy", rows)
    make_split(str(tmp_path / "raw"), str(tmp_path / "out"), OPTIONS | {"pad_id": PAD},
               val_ratio=0.4, by="document")
    train, val = (read_all(tmp_path / "out", split, 100) for split in ("train", "val"))
    assert 15 < len(val) < 60 and len(train) + len(val) == 80
    pad_id = TokenData(str(tmp_path / "out"), "val", 100).pad_id
    assert as_set(train) | as_set(val) == as_set(np.where(np.array(rows) == PAD, pad_id, rows))


def test_flat_files_llm_c_and_megatron_are_split_where_they_lie(tmp_path):
    (tmp_path / "raw").mkdir()
    some = some_documents(200)
    write_llm_c(tmp_path / "raw/a.bin", stream(some[:90]), 20240520, 1, "<u2")
    write_megatron(tmp_path / "raw/b.bin", [[*d, EOT] for d in some[90:150]], 4, "<i4")
    np.array(stream(some[150:]), "<u2").tofile(tmp_path / "raw/c.bin")
    everything = stream(some)
    for by, more in (("document", {}), ("sequence", {"sequence_length": 50}), ("file", {})):
        out = tmp_path / by
        done = make_split(str(tmp_path / "raw"), str(out), OPTIONS | more, val_ratio=0.2, by=by)
        ids = [read_all(out, split).ravel().tolist() for split in ("train", "val")]
        assert sorted(ids[0] + ids[1]) == sorted(everything)
        assert 0 < len(ids[1]) < len(everything) / 2
        if by == "document":
            assert ids[0].count(EOT) + ids[1].count(EOT) == 200 and ids[0][-1] == ids[1][-1] == EOT
        if by == "sequence":
            n = sum(-(-len(stream(part)) // 50) for part in (some[:90], some[90:150], some[150:]))
            assert done["val_units"] == round(0.2 * n)
            assert done["train_units"] == n - done["val_units"]
        assert validate_folder(str(out))["valid"]


def test_a_prepared_folder_can_be_split_again(data_dir, tmp_path):
    done = make_split(str(data_dir), str(tmp_path / "out"), {}, val_ratio=0.4)
    texts = []
    for folder in (data_dir, tmp_path / "out"):
        ids = np.concatenate([read_all(folder, split).ravel() for split in ("train", "val")])
        texts.append({bytes(part) for part in np.split(ids, np.flatnonzero(ids == 260) + 1)})
    assert texts[0] == texts[1] and done["train_documents"] + done["val_documents"] == 40
    assert not list((tmp_path / "out").glob("*.bin"))
    assert json.loads((tmp_path / "out/meta.json").read_text())["splits"]["val"]["bytes"] > 1000
    with pytest.raises(DataError, match="holds no tokens of its own, it is a split of"):
        make_split(str(tmp_path / "out"), str(tmp_path / "again"), {})
    with pytest.raises(DataError, match="--eot_id: no effect"):
        make_split(str(data_dir), str(tmp_path / "x"), {"eot_id": 1})


def test_links_are_relative_and_whole_files_go_one_way(tmp_path):
    (tmp_path / "raw/deep").mkdir(parents=True)
    for i, name in enumerate(("a.npy", "b.npy", "deep/c.npy", "deep/d.npy")):
        write_npy(tmp_path / "raw" / name, rows_of(16, 5, seed=i))
    write_megatron(tmp_path / "raw/e.bin", some_documents(), 8, "<u2")
    done = make_split(str(tmp_path / "raw"), str(tmp_path / "out"), OPTIONS, val_ratio=0.4,
                      symlink=1)
    assert (done["by"], done["val_units"], done["train_units"]) == ("file", 2, 3)
    os.rename(tmp_path / "out", tmp_path / "moved_out")  # both may move together
    (tmp_path / "there").mkdir()
    for name in ("raw", "moved_out"):
        os.rename(tmp_path / name, tmp_path / "there" / name)
    links = [path for path in (tmp_path / "there/moved_out").rglob("*") if path.is_symlink()]
    assert len(links) == 6
    assert all(not os.readlink(link).startswith("/") and link.is_file() for link in links)
    for split in ("train", "val"):
        sizes = [link.stat().st_size for link in links
                 if split in link.parts and link.suffix == ".npy"]
        assert len(sizes) == sum("npy" in path for path in map(str, links) if f"/{split}/" in path)
    assert validate_folder(str(tmp_path / "there/moved_out"))["valid"]


CHANGES = {
    "deleted": (lambda path: path.unlink(), "a.npy is gone"),
    "cut": (lambda path: os.truncate(path, 5000), "a.npy has changed"),
    "rewritten": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"),
                  "a.npy has changed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_changed_are_noticed(name, raw, tmp_path):
    make_split(str(raw[0]), str(tmp_path / "out"), OPTIONS, val_ratio=0.3)
    change, message = CHANGES[name]
    change(raw[0] / "a.npy")
    os.utime(raw[0], (1, 1))
    message += ".*restore it, or split again"
    with pytest.raises((DataError, FileNotFoundError), match=message):
        TokenData(str(tmp_path / "out"), "train", 64)


def test_files_that_were_copied_are_as_good(raw, tmp_path):
    make_split(str(raw[0]), str(tmp_path / "out"), OPTIONS, val_ratio=0.3)
    before = read_all(tmp_path / "out", "val")
    os.utime(raw[0] / "a.npy", (1, 1))
    assert np.array_equal(read_all(tmp_path / "out", "val"), before)


def edit(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def edit_source(folder, **changes):
    edit(folder, lambda meta: meta["sources"]["files"][0].update(changes))


def link_out(folder):
    (folder / "../raw/a.npy").unlink()
    (folder / "../raw/a.npy").symlink_to("/etc/passwd")


def shift(folder):
    ranges = np.load(folder / "val_ranges.npy")
    ranges[0] += 1
    np.save(folder / "val_ranges.npy", ranges)


DAMAGE = {
    "a name that leads out": (lambda d: edit_source(d, name="../secret.npy"),
                              "leads out of"),
    "an absolute name": (lambda d: edit_source(d, name="/etc/passwd"), "leads out of"),
    "a link that leads out": (link_out, "leads out of"),
    "ranges that lead out": (
        lambda d: edit(d, lambda m: m["splits"]["train"]["files"][0].update(name="../r.npy")),
        "leads out of"),
    "a tokenizer that leads out": (
        lambda d: edit(d, lambda m: m.update(tokenizer="../../tokenizer")), "leads out of"),
    "ranges pickled": (
        lambda d: np.save(d / "train_ranges.npy", np.array([{}], object), allow_pickle=True),
        "damaged"),
    "ranges cut": (lambda d: os.truncate(d / "train_ranges.npy", 150), "damaged"),
    "ranges gone": (lambda d: (d / "train_ranges.npy").unlink(), "missing or damaged"),
    "ranges beyond the files": (lambda d: edit(d, lambda m: m["sources"]["files"].pop()),
                                "do not fit"),
    "ranges of another split": (
        lambda d: shutil.copy(d / "val_ranges.npy", d / "train_ranges.npy"), "damaged"),
    "numbers that are none": (lambda d: edit_source(d, tokens="many"), "damaged"),
    "no type": (lambda d: edit_source(d, dtype="none"), "damaged"),
    "a type of objects": (lambda d: edit_source(d, dtype="|O"), "do not fit"),
    "no files": (lambda d: edit(d, lambda m: m["sources"].pop("files")), "damaged"),
    "no such split": (lambda d: edit(d, lambda m: m["splits"].pop("train")), "expected one of val"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_split_is_refused(name, raw, tmp_path):
    make_split(str(raw[0]), str(tmp_path / "out"), OPTIONS, val_ratio=0.3)
    damage, message = DAMAGE[name]
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        TokenData(str(tmp_path / "out"), "train", 64)


def test_linked_bins_are_read_if_they_hold_what_was_prepared(data_dir, tmp_path):
    folder = shutil.copytree(data_dir, tmp_path / "bins")
    for name in ("train.bin", "tokenizer"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    expected = TokenData(str(data_dir), "train", 64).block([3, 5])
    assert (TokenData(str(folder), "train", 64).block([3, 5]) == expected).all()
    assert result(call("prepare.py", "validate", f"--data_dir={folder}"))["valid"]
    # Any other file is refused, also one of the same size, and so is a name that leads out.
    data = bytearray((tmp_path / "train.bin").read_bytes())
    data[10] ^= 1
    (tmp_path / "other.bin").write_bytes(data)
    (folder / "train.bin").unlink()
    (folder / "train.bin").symlink_to(tmp_path / "other.bin")
    with pytest.raises(DataError, match="is a link to .*other.bin, which is not what meta.json"):
        TokenData(str(folder), "train", 64)
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train"]["files"][0]["name"] = "../train.bin"
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="leads out of"):
        TokenData(str(folder), "train", 64)


def test_a_split_removes_no_links_and_no_tokenizer_that_it_did_not_write(raw, tmp_path):
    (tmp_path / "photos.jpg").write_text("x")
    for place in ("links/train/cat.jpg", "tok/tokenizer/tokenizer.json"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).symlink_to(tmp_path / "photos.jpg")
        for symlink in (0, 1):
            with pytest.raises(DataError, match="not made by this|begun with another|damaged|json"):
                make_split(str(raw[0]), str(tmp_path / place.split("/")[0]), OPTIONS,
                           val_ratio=0.4, symlink=symlink)
        assert (tmp_path / place).is_symlink() and (tmp_path / place).read_text() == "x"


def test_validate_finds_tokens_in_both_splits_and_other_bytes(raw, tmp_path):
    make_split(str(raw[0]), str(tmp_path / "out"), OPTIONS, val_ratio=0.3)
    shift(tmp_path / "out")
    with pytest.raises(DataError, match="(?s)tokens in common.*sha256"):
        validate_folder(str(tmp_path / "out"))
    make_split(str(raw[0]), str(tmp_path / "other"), OPTIONS, val_ratio=0.3)
    before = (raw[0] / "a.npy").stat()
    data = bytearray((raw[0] / "a.npy").read_bytes())
    data[1000] ^= 1
    (raw[0] / "a.npy").write_bytes(data)
    # Bytes change but the time does not: training cannot notice it.
    os.utime(raw[0] / "a.npy", ns=(before.st_mtime_ns, before.st_mtime_ns))
    TokenData(str(tmp_path / "other"), "train", 64)
    with pytest.raises(DataError, match="a.npy has changed"):
        validate_folder(str(tmp_path / "other"))


REFUSED = {
    "no ratio": ({"val_ratio": 1.0}, {}, "val_ratio=1.0"),
    "nothing for val": ({"val_ratio": 0.001}, {},
                        "val would hold nothing with val_ratio = 0.001 of 100 sequences"),
    "no way": ({"by": "line"}, {}, "expected sequence, document or file"),
    "links of parts": ({"by": "document", "symlink": 1}, {}, "links whole files"),
    "another length": ({}, {"sequence_length": 65}, "rows of 64 tokens, expected 65"),
    "no tokenizer": ({}, {"vocab_size": 0, "eot_id": -1}, "--vocab_size=N"),
    "an id out of range": ({}, {"vocab_size": 500, "eot_id": 3}, "expected 0 to 499"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_and_leaves_nothing(name, raw, tmp_path):
    settings, options, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        make_split(str(raw[0]), str(tmp_path / "out"), OPTIONS | options, **settings)
    assert not list(tmp_path.glob("out/*"))


def test_folders_that_cannot_be_split_say_what_to_do(raw, tmp_path):
    write_npy(tmp_path / "flat.npy", [1, 2, 3])
    write_arrow((tmp_path / "lists").with_suffix(".arrow"), some_documents())
    for file, more, message in (("flat.npy", {"by": "sequence"}, "--sequence_length=N"),
                                ("lists.arrow", {}, "--input="),
                                (None, {}, "neither meta.json nor .npy")):
        folder = tmp_path / f"of_{file}"
        folder.mkdir()
        if file:
            shutil.copy(tmp_path / file, folder)
        with pytest.raises(DataError, match=message):
            make_split(str(folder), str(tmp_path / "out"), OPTIONS, **more)
    with pytest.raises(DataError, match="lies in --data_dir"):
        make_split(str(raw[0]), str(raw[0] / "out"), OPTIONS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(DataError, match="notes.txt was not made by this command"):
        make_split(str(raw[0]), str(tmp_path / "mine"), OPTIONS)
    make_split(str(raw[0]), str(tmp_path / "out"), OPTIONS, val_ratio=0.3)
    with pytest.raises(DataError, match="another split"):
        make_split(str(raw[0]), str(tmp_path / "out"), OPTIONS, val_ratio=0.2)


def test_killed_at_any_step_then_the_same_split(raw, tmp_path, monkeypatch):
    def contents(folder):
        return {str(path.relative_to(folder)):
                os.readlink(path) if path.is_symlink() else path.read_bytes()
                for path in folder.rglob("*") if path.is_symlink() or path.is_file()}

    settings = dict(val_ratio=0.4, symlink=1)
    make_split(str(raw[0]), str(tmp_path / "whole"), OPTIONS, **settings)
    def split(out):
        make_split(str(raw[0]), str(out), OPTIONS, **settings)

    outs = list(crashed(split, tmp_path, (os, "replace"), (os, "symlink"), moments=["before"]))
    for out in outs:
        assert contents(out) == contents(tmp_path / "whole"), out.name
    assert len(outs) == 9  # the tokenizer, its two files, two lists, three links, meta.json


def test_a_full_disk_is_one_message(raw, tmp_path):
    reader, writer = os.pipe()
    if not os.fork():  # a process of its own, because the limit is for all that it writes
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        try:
            make_split(str(raw[0]), str(tmp_path / "out"), OPTIONS)
        except DataError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.wait()
    assert "File too large while writing" in os.read(reader, 9999).decode()
    assert not (tmp_path / "out/meta.json").exists()
    make_split(str(raw[0]), str(tmp_path / "out"), OPTIONS)


# -----------------------------------------------------------------------------
# validate


def test_the_report_of_files_is_what_numpy_counts(tmp_path):
    rows = rows_of(50, 40)
    rows[13] = rows[3] = [EOT, *range(20), EOT, *range(100, 127), EOT]
    rows[30, -5:] = EOT, PAD, PAD, PAD, PAD
    write_npy(tmp_path / "a.npy", rows[:10])
    write_npy(tmp_path / "b.npy", rows[10:], "<u2")
    done = result(call("prepare.py", "validate", f"--input={tmp_path}/*.npy", *IDS,
                       f"--pad_id={PAD}"))
    parts = [part.tolist() for half in (rows[:10], rows[10:]) for part in np.split(
        half.ravel(), np.flatnonzero(half.ravel() == EOT) + 1)]
    parts = [part for part in ([i for i in part if i not in (EOT, PAD)] for part in parts) if part]
    lengths = list(map(len, parts))
    assert (done["files"], done["sequences"], done["sequence_length"]) == (2, 40, 50)
    assert done["duplicate_sequences"] == 1
    assert (done["tokens"], done["unique_ids"]) == (2000, len(np.unique(rows)))
    assert done["mean_id"] == pytest.approx(rows.mean())
    assert done["eot_share"] == pytest.approx((rows == EOT).mean())
    assert done["padding_share"] == pytest.approx(4 / 2000) and done["documents"] == len(lengths)
    assert done["duplicate_documents"] == len(parts) - len(set(map(tuple, parts))) > 0
    assert done["document_length"] == {
        "min": min(lengths), "median": sorted(lengths)[len(lengths) // 2],
        "mean": pytest.approx(np.mean(lengths)),
        "p90": np.percentile(lengths, 90, method="higher"), "max": max(lengths)}


def test_what_train_and_val_share_is_counted(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    rows = rows_of(32, 40)
    write_npy(tmp_path / "raw/a.npy", np.concatenate([rows, rows[:20]]))
    make_split(str(tmp_path / "raw"), str(tmp_path / "out"), OPTIONS, val_ratio=0.5)
    train, val = (as_set(read_all(tmp_path / "out", split, 32)) for split in ("train", "val"))
    assert validate_folder(str(tmp_path / "out"))["in_train_and_val"] == len(train & val) > 0
    assert "will look better than it is" in capsys.readouterr().out


def test_time_comes_from_a_measured_rate_alone(data_dir, tmp_path, capsys):
    def said_with(*args):
        validate_folder(str(data_dir), *args)
        return capsys.readouterr().out

    assert " h at" not in said_with()
    said = said_with("", 1000.0)
    [n] = {int(line.split(", ")[1].split()[0].replace(",", "")) for line in said.splitlines()
           if " h at" in line}
    assert f"{n / 1000 / 3600:,.1f} h at 1,000 tokens/s as given" in said
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "tokens_per_s": 500}\n{"step": 1, "val_loss": 5}\n')
    assert f"at 500 tokens/s as in {tmp_path}" in said_with(str(tmp_path))
    with pytest.raises(DataError, match="no log of a training run"):
        said_with(str(tmp_path / "nothing"))


@pytest.mark.parametrize("n_tokens, gpu, expected", [
    (400_000, False, ["mini.py"]), (8000, True, ["mini.py"]), (4 * 10**8, False, ["mini.py"]),
    (4 * 10**8, True, ["micro_anchored.py", "micro_wide.py"])])
def test_what_is_recommended_fits_the_data_and_the_machine(n_tokens, gpu, expected, monkeypatch,
                                                           capsys):
    """Rows of the preset, many in a step; no month on a laptop; no run of a few steps."""
    monkeypatch.setattr(validation, "has_gpu", lambda: gpu)
    train = {"tokens": n_tokens, "document_length": {"p90": 3000}}
    commands = validation.recommend("data/mine", Tokenizer.load("byte"), train, 5000, 0, 0, "")
    assert [re.search(r"config/(\S+)", command)[1] for command in commands] == expected
    for command in commands:
        given = dict(re.findall(r"--(\w+)=(\S+)", command))
        assert "block_size" not in given and int(given.get("batch_size", 16)) >= 16, command
        assert int(given["max_steps"]) >= 200
    said = capsys.readouterr().out
    assert ("days without a GPU" in said) == (n_tokens > 10**8 and not gpu)


def test_sizes_of_presets_are_those_of_the_models():
    """For any vocabulary and length, from the head of a file; test_readme.py checks the heads."""
    [(n, settings)] = [(n, settings) for n, name, settings, _ in presets(512, 2048, 2048)
                       if name == "mini.py"]
    names = settings.keys() & ConceptConfig.__dataclass_fields__.keys()
    fields = {key: settings[key] for key in names}
    fields |= {"vocab_size": 512, "block_size": 2048, "mask_id": 1, "eot_id": 0}
    with torch.device("meta"):
        assert ConceptEncoder(ConceptConfig(**fields)).num_params() == n
    # Beyond 4,096 positions are sinusoidal, so there is no table of them.
    [long] = [n for n, name, *_ in presets(512, 8192, 8192) if name == "mini.py"]
    assert long == n - 2048 * settings["token_dim"]
    assert plan(n, settings, 9**9, 8192, 1)["position"] == "sinusoidal"


# -----------------------------------------------------------------------------
# from one end to the other

QUICK = ["--max_steps=3", "--n_layer=1", "--batch_size=2", "--micro_batch=2", "--eval_rows=4",
         "--health_rows=0", "--log_interval=1", "--warmup_steps=1", "--init_table=random"]


def test_text_to_bins_to_split_to_training_to_evaluation(data_dir, tmp_path):
    """The README's way, each command as it is printed by the one before."""
    assert result(call("prepare.py", "validate", f"--data_dir={data_dir}"))["valid"]
    call("prepare.py", "split", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/split",
         "--val_ratio=0.2")
    done = result(call("prepare.py", "validate", f"--data_dir={tmp_path}/split"))
    python, script, *args = done["commands"][0].split()
    assert (python, script) == ("python", "train.py")
    trained = result(call(script, *args, *QUICK, f"--out_dir={tmp_path}/run"))
    assert trained["step"] == 3
    evaluated = result(call("tools/eval.py", f"--out_dir={tmp_path}/run", "--rows=4",
                           "--health_rows=0"))
    assert evaluated["data"][f"{tmp_path}/split"]["whole_word"]["bits_per_byte"] > 0


def test_ids_without_a_tokenizer_train_on_single_tokens_only(tmp_path):
    (tmp_path / "raw").mkdir()
    write_npy(tmp_path / "raw/a.npy", rows_of(64, 60))
    done = result(call("prepare.py", "validate", f"--data_dir={tmp_path}/raw", *IDS))
    to_bins, to_split, train = (shlex.split(command.replace("data/mine", f"{tmp_path}/out"))[1:]
                                for command in done["commands"])
    assert result(call(*to_split))["by"] == "sequence"
    shutil.rmtree(tmp_path / "out")
    assert result(call(*to_bins))["documents"] > 80
    args = [*train, *QUICK, f"--out_dir={tmp_path}/run"]
    refused(call(*args, "--masking_type=whole_word", ok=False), "knows ids only",
            "--masking_type=token")
    assert result(call(*args))["step"] == 3
    done = call("tools/eval.py", f"--out_dir={tmp_path}/run", "--rows=4", "--health_rows=4")
    [found] = result(done)["data"].values()
    assert set(found) >= {"token"} and "span" not in found
    assert found["token"]["bits_per_byte"] is None
