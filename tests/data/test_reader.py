"""Promises of data/reader.py: which folders are opened, and which tokens a batch holds."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from data import documents
from data.reader import TokenData, permute
from data.tokenizer import Tokenizer


def texts(n=60, seed=0):
    """n different documents of 5 to 300 words."""
    rng = np.random.default_rng(seed)
    words = "the a concept reads long sequence of na\u00efve tokens \u6f22\u5b57 and thinks\n\n"
    words = np.array(words.split(" "))
    return [f"{i} " + " ".join(rng.choice(words, rng.integers(5, 300))) for i in range(n)]


def write(folder, some_texts, **settings):
    settings = {"tokenizer": "byte", "val_fraction": 0.2, "num_proc": 1, **settings}
    units = documents.from_texts(lambda: ((text, None) for text in some_texts))
    return documents.write_dataset(units, str(folder), **settings)


def all_ids(folder, split):
    """The tokens of a split, read with numpy alone."""
    meta = json.loads((folder / "meta.json").read_text())
    files = meta["splits"][split]["files"]
    return np.concatenate([np.fromfile(folder / file["name"], meta["dtype"]) for file in files])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished folder; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("made")
    write(folder, texts())
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The same documents in bins of 5,000 tokens."""
    folder = tmp_path_factory.mktemp("sharded")
    write(folder, texts(), shard_tokens=5000)
    return folder


# ---- batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1000, 65_537])
def test_permute_is_a_bijection_that_the_key_changes(n):
    index = np.arange(n, dtype=np.uint64)
    orders = [permute(index, n, np.full(n, key, np.uint64)) for key in (1, 2)]
    for order in orders:
        assert np.array_equal(np.sort(order), index)
    if n >= 100:
        assert (orders[0] == orders[1]).sum() < 20  # two random ones agree at one place on average
        assert abs(np.corrcoef(index.astype(float), orders[0].astype(float))[0, 1]) < 0.4


@pytest.mark.parametrize("kind", ["made", "sharded"])
def test_every_token_exactly_once_per_epoch(kind, request):
    folder = request.getfixturevalue(kind)
    data, truth = TokenData(str(folder), "train", 64, seed=5), all_ids(folder, "train")
    assert data.n_tokens == len(truth)
    assert len(truth) % 64, "the last block must be a partial one for this test"
    padded = np.concatenate([truth, np.full(-len(truth) % 64, data.eot_id)]).reshape(-1, 64)
    assert data.n_blocks == len(padded)
    assert np.array_equal(data.block(range(data.n_blocks)), padded)
    blocks, orders = list(map(tuple, padded.tolist())), []
    for epoch, some in ((0, data), (1, data), (0, TokenData(str(folder), "train", 64, seed=6))):
        ids = [some.batch(epoch * data.n_blocks + i, 1)[0][0] for i in range(data.n_blocks)]
        orders.append([blocks.index(tuple(row.tolist())) for row in ids])
        assert sorted(orders[-1]) == list(range(data.n_blocks)) != orders[-1]
    assert orders[0] != orders[1] != orders[2] != orders[0], "it changes with epoch and seed"


def test_bins_of_any_size_give_the_same_blocks(made, sharded):
    one, many = (TokenData(str(folder), "train", 64, seed=5) for folder in (made, sharded))
    assert len(many.files) > 2 and len(one.files) == 1
    for step in (0, 3, 50):
        assert torch.equal(one.batch(step, 16)[0], many.batch(step, 16)[0])


def test_batch_is_a_pure_function_of_the_step(made):
    a, b = (TokenData(str(made), "train", 64, seed=5) for _ in range(2))
    forward = [a.batch(step, 8) for step in range(6)]
    for step in (5, 0, 3, 3):
        for left, right in zip(forward[step], b.batch(step, 8)):
            assert torch.equal(left, right)
    ids, sample_ids = forward[2]
    assert sample_ids.tolist() == list(range(16, 24))
    assert ids.dtype == sample_ids.dtype == torch.int64


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batch_of_one_rank(made, world_size):
    data = TokenData(str(made), "train", 64, seed=5)
    for step in (0, 7, 40):  # step 40 of 8 crosses an epoch
        parts = [data.batch(step, 8, rank, world_size) for rank in range(world_size)]
        for whole, pieces in zip(data.batch(step, 8), zip(*parts)):
            assert torch.equal(whole, torch.cat(pieces))
    with pytest.raises(ValueError, match="multiple of 3"):
        data.batch(0, 8, 0, 3)
    with pytest.raises(ValueError, match="rank 2"):
        data.batch(0, 8, 2, 2)


# ---- what the writer writes -----------------------------------------------------------------


def test_decoded_bins_are_the_documents(made):
    tok = Tokenizer.load(str(made / "tokenizer"))
    found = []
    for split in ("train", "val"):
        ids = all_ids(made, split)
        assert ids[-1] == tok.eot_id
        ends = np.flatnonzero(ids == tok.eot_id) + 1
        found += [tok.decode(part) for part in np.split(ids, ends)[:-1]]
    assert sorted(text.removesuffix("<|endoftext|>") for text in found) == sorted(texts())


def test_meta_counts_what_is_there(made):
    meta, train = json.loads((made / "meta.json").read_text()), all_ids(made, "train")
    assert meta["splits"]["train"]["documents"] + meta["splits"]["val"]["documents"] == 60
    n_bytes = sum(meta["splits"][split]["bytes"] for split in ("train", "val"))
    assert n_bytes == sum(len(text.encode()) for text in texts())
    p = np.bincount(train[train != meta["eot_id"]])
    p = p[p > 0] / p.sum()
    assert meta["unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-9)
    assert sorted(os.listdir(made)) == ["meta.json", "tokenizer", "train.bin", "val.bin"]


def test_many_ids_are_stored_in_32_bits(tmp_path):
    """A made-up vocabulary of 70,000 ids, 300 of them used: ids beyond 65,535 must come back."""
    byte = Tokenizer.load("byte")
    ranks = {bytes([i]): i for i in range(256)} | {b"\0%d" % i: i for i in range(256, 69_995)}
    ranks[b" the"] = 69_995
    specials = {name: 69_996 + i for i, name in enumerate(byte.specials)}
    wide = Tokenizer("wide", r" ?\w+|\s|[^\w\s]+", ranks, specials)
    wide.save(str(tmp_path / "wide"))
    write(tmp_path / "out", [f"{i} the the" for i in range(100)], tokenizer=str(tmp_path / "wide"))
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    ids = all_ids(tmp_path / "out", "train")
    assert meta["dtype"] == "uint32" and ids.max() == wide.eot_id > 65_535
    assert (ids == 69_995).sum() > 100
    data = TokenData(str(tmp_path / "out"), "train", 8)
    assert data.block([0])[0].tolist() == ids[:8].tolist()


def test_split_depends_on_the_text_alone(tmp_path):
    some = texts()
    write(tmp_path / "a", some)
    write(tmp_path / "b", some[::-1] + ["one more document, which moves no other one"])
    tok = Tokenizer.load("byte")

    def val(folder):
        return set(tok.decode(all_ids(folder, "val")).split("<|endoftext|>"))

    assert len(val(tmp_path / "a")) > 3 and val(tmp_path / "a") <= val(tmp_path / "b")


def test_duplicates_are_dropped_and_counted_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)
    result = write(tmp_path / "a", texts() + ["", "  \n"] + texts() + texts()[:5])
    assert (result["documents"], result["duplicates"], result["empty"]) == (60, 65, 2)
    write(tmp_path / "b", texts())
    assert (tmp_path / "a/train.bin").read_bytes() == (tmp_path / "b/train.bin").read_bytes()


def test_max_tokens_ends_after_the_document_that_reaches_it(tmp_path):
    result = write(tmp_path / "a", texts(), max_tokens=30_000)
    n = next(n for n in range(60) if sum(len(t.encode()) + 1 for t in texts()[:n]) >= 30_000)
    assert result["documents"] == n
    n_tokens = sum(len(text.encode()) + 1 for text in texts()[:n])
    assert result["train_tokens"] + result["val_tokens"] == n_tokens


def test_an_empty_split_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="none of 3 documents fell into val.*val_fraction"):
        write(tmp_path / "a", texts(3), val_fraction=0.0)
    assert os.listdir(tmp_path / "a") == []
    write(tmp_path / "a", texts(60))  # so the next command needs no clean-up


def test_a_full_disk_is_refused_before_the_start(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="GB of token ids to write.*--max_tokens"):
        write(tmp_path / "a", texts(), input_bytes=10_000_000)


# ---- refusals -------------------------------------------------------------------------------


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def flip_bin(folder):
    content = bytearray((folder / "train.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "train.bin").write_bytes(content)


def cut_bin(folder, n_bytes):
    data = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(data[:n_bytes])


def foreign_id(folder):
    ids = np.fromfile(folder / "train.bin", "<u2")
    ids[len(ids) // 2] = 50_000
    ids.tofile(folder / "train.bin")


def wrong_sum(folder):
    train = json.loads((folder / "meta.json").read_text())["splits"]["train"]
    edit_meta(folder, splits={"train": {**train, "tokens": 5}})


DAMAGE = {
    "folder missing": (lambda d: shutil.rmtree(d), "no prepared data set.*prepare.py --input"),
    "meta missing": (lambda d: (d / "meta.json").unlink(),
                     "meta.json is missing.*prepare.py --input"),
    "meta cut": (lambda d: (d / "meta.json").write_text('{"format": 1, '), "meta.json is damaged"),
    "meta a list": (lambda d: (d / "meta.json").write_text("[1]"), "meta.json is damaged"),
    "meta of another version": (lambda d: edit_meta(d, format=99), "format 99.*expected format 1"),
    "eot_id beyond the bins": (lambda d: edit_meta(d, eot_id=70_000), "meta.json is damaged .eot"),
    "no tokenizer file": (lambda d: (d / "tokenizer/tokenizer.tiktoken").unlink(), "tokenizer"),
    "meta without a key": (lambda d: (d / "meta.json").write_text('{"format": 1}'),
                           "lacks .*'eot_id'"),
    "bin missing": (lambda d: (d / "train.bin").unlink(), "train.bin is missing"),
    "bin empty": (lambda d: cut_bin(d, 0), r"0 bytes \(empty\)"),
    "bin truncated": (lambda d: cut_bin(d, 1000), "holds 1,000 bytes.*truncated"),
    "bin of odd size": (lambda d: cut_bin(d, 1001), "holds 1,001 bytes"),
    "bit flipped": (flip_bin, "train.bin is damaged or another file: its sha256"),
    "dtype wrong": (lambda d: edit_meta(d, dtype="uint32"), "dtype uint32 for 261 ids"),
    "tokens do not add up": (wrong_sum, "disagrees with itself about the tokens of train"),
    "vocabulary wrong": (lambda d: edit_meta(d, n_vocab=100), "contains id 260.*100 ids"),
    "foreign id": (foreign_id, "contains id 50,000.*validate"),
    "other tokenizer": (lambda d: edit_meta(d, fingerprint="0" * 64),
                        "fingerprint.*another tokenizer"),
    "tokenizer missing": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer"),
    "interrupted": (lambda d: (d / "meta.json").rename(d / "progress.json"), "interrupted"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(name, copy):
    TokenData(str(copy), "train", 64)
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TokenData(str(copy), "train", 64)


def test_unusable_requests_name_what_is_usable(made):
    with pytest.raises(ValueError, match="expected one of train, val"):
        TokenData(str(made), "test", 64)
    n = TokenData(str(made), "val", 64).n_tokens
    with pytest.raises(ValueError, match=f"largest usable block_size is {n}"):
        TokenData(str(made), "val", n + 1)
    assert TokenData(str(made), "val", n).n_blocks == 1


def test_reading_an_epoch_does_not_grow_the_memory(tmp_path):
    """120 MB of tokens read in random order: a memory map would show them in the resident size."""
    code = f"""
import resource, sys, numpy as np
sys.path.insert(0, {str(ROOT)!r})
import torch
from data import bins, documents, reader as shards
out = {str(tmp_path)!r}
texts = documents.from_texts(lambda: ((f"{{i}} some text", None) for i in range(200)))
documents.write_dataset(texts, out, "byte", val_fraction=.2, num_proc=1)
import json
meta = json.load(open(out + "/meta.json"))
ids = np.full(60_000_000, 65, "<u2")
ids.tofile(out + "/train.bin")
files = [{{"name": "train.bin", "tokens": len(ids), "sha256": bins.file_hash(out + "/train.bin")}}]
meta["splits"]["train"].update(tokens=len(ids), files=files)
json.dump(meta, open(out + "/meta.json", "w"))
del ids
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
data = shards.TokenData(out, "train", 4096)
for step in range(data.n_blocks // 64):
    data.batch(step, 64)
print((resident() - before) / 1e6)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert grown.returncode == 0, grown.stderr
    assert float(grown.stdout.split()[-1]) < 60
