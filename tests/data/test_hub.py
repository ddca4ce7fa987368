"""Promises of data/hub.py, data/NAME/prepare.py and the budgets.

The data sets are stand-ins with the files and columns of the real ones.
"""

import functools
import gc
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import time
from types import SimpleNamespace
from unittest import mock

import fsspec.implementations.local
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, call, crashed, refused, result, zstd
from datasets.packaged_modules.parquet import parquet as parquet_module

from data import bins, documents, hub, writer
from data.tokenizer import Tokenizer

pytestmark = pytest.mark.long

SETS = ("wikitext2", "wikitext103", "text8", "lm1b", "owt", "fineweb_edu", "pile", "minipile")


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """conftest.call() collects garbage after every script: it need not look at the libraries."""
    hub.library()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The library works offline, and any attempt to reach another machine fails the test."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tried, connect = [], socket.socket.connect

    def refuse(sock, address):
        if sock.family == socket.AF_UNIX:
            return connect(sock, address)
        tried.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: tried.append(address))
    yield
    assert not tried


@pytest.fixture
def waits(monkeypatch):
    """The seconds that hub.py would have waited."""
    waited = []
    monkeypatch.setattr(time, "sleep", lambda seconds: seconds and waited.append(seconds))
    return waited


# --------------------------------------------------------------------------------------------------
# stand-ins


def texts(n, kind):
    """n different documents of 3 to 60 words."""
    rng = np.random.default_rng(len(kind))
    words = "the a concept reads long sequence of naïve tokens 漢字 and\nthinks"
    words = np.array(words.split(" "))
    return [f"{kind} {i} " + " ".join(rng.choice(words, rng.integers(3, 60))) for i in range(n)]


def parquet(path, some_texts, **columns):
    """Row groups of 7 rows, so that a place within a file is no border of anything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": some_texts, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def jsonl_zst(path, some_texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": "Pile-CC"}}) + "\n"
             for text in some_texts]
    half = "".join(lines[: len(lines) // 2]).encode(), "".join(lines[len(lines) // 2:]).encode()
    path.write_bytes(zstd.compress(half[0]) + zstd.compress(half[1]))  # two frames are legal


def readme(folder, *configs):
    lines = ["---", "license: other", "configs:"] if configs else ["---", "license: other"]
    for name, files in configs:
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in files.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# a stand-in"]))


def article(i, kind):
    text = f" {texts(40, kind)[i]}".replace("\n", " ") + " \n"
    return [f" = Title {i} of {kind} = \n", " \n", text, " = = Section = = \n", " more \n",
            " = Played , W = \n", " \n"]  # of a table


def wikitext_standin(folder, name):
    lines = {kind: [line for i in range(n) for line in article(i, kind)] for kind, n in (
        ("train", 24), ("validation", 5), ("test", 3))}
    cut = len(lines["train"]) // 2 + 1  # in the middle of an article
    parquet(folder / name / "train-00000-of-00002.parquet", lines["train"][:cut])
    parquet(folder / name / "train-00001-of-00002.parquet", lines["train"][cut:])
    for split in ("validation", "test"):
        parquet(folder / name / f"{split}-00000-of-00001.parquet", lines[split])
    splits, names = ("test", "train", "validation"), ("wikitext-2-raw-v1", "wikitext-103-raw-v1")
    readme(folder, *((n, {split: f"{n}/{split}-*" for split in splits}) for n in names))
    other = "wikitext-103-raw-v1" if "2-" in name else "wikitext-2-raw-v1"
    for split in splits:
        parquet(folder / other / f"{split}-00000-of-00001.parquet", ["another data set\n"])
    train = ["".join(article(i, "train")) for i in range(24)]
    return train, ["".join(article(i, "validation")) for i in range(5)]


def standin(name, folder):
    """Writes what the real repository holds, in small -> (train, val), lists of documents.

    val is None where it is chosen by hash.
    """
    train, val = texts(60, "train"), texts(9, "val")
    third = {"test": texts(5, "test")}
    if name.startswith("wikitext"):
        return wikitext_standin(folder, f"wikitext-{name.removeprefix('wikitext')}-raw-v1")
    if name == "text8":
        letters = "".join(np.random.default_rng(0).choice(list("abcdefg    "), 70_000))
        parts = {"train": letters[:50_000], "validation": letters[50_000:65_000],
                 "test": letters[65_000:]}
        for split, text in parts.items():
            parquet(folder / "data" / f"{split}-00000-of-00001.parquet", [text])
        readme(folder, ("default", {split: f"data/{split}-*" for split in parts}))
        return parts["train"], parts["validation"]
    if name == "lm1b":  # the branch that the hub makes has no README.md
        for n in range(2):
            parquet(folder / f"plain_text/train/{n:04}.parquet", train[30 * n: 30 * n + 30])
        parquet(folder / "plain_text/test/0000.parquet", val)
    elif name == "owt":
        for n in range(3):
            parquet(folder / f"plain_text/train-{n:05}-of-00003.parquet",
                    train[20 * n: 20 * n + 20])
        readme(folder, ("plain_text", {"train": "plain_text/train-*"}))
        val = None
    elif name == "fineweb_edu":
        for n in range(3):
            rows = train[20 * n: 20 * n + 20]
            parquet(folder / f"sample/10BT/{n:03}_00000.parquet", rows,
                    id=[f"<urn:{i}>" for i in range(20)], dump=["CC-MAIN-2013-20"] * 20,
                    language_score=[0.9] * 20, int_score=[3] * 20)
        parquet(folder / "data/CC-MAIN-2013-20/train-00000-of-00014.parquet", ["another sample"])
        readme(folder, ("default", {"train": "data/*/*"}),
               ("sample-10BT", {"train": "sample/10BT/*"}))
        val = None
    elif name == "pile":  # its README.md has no configs
        for n in range(2):
            jsonl_zst(folder / f"train/{n:02}.jsonl.zst", train[30 * n: 30 * n + 30])
        jsonl_zst(folder / "val.jsonl.zst", val)
        jsonl_zst(folder / "test.jsonl.zst", third["test"])
        readme(folder)
    elif name == "minipile":
        for n, key in enumerate(("6fbcb5acda05b3c0", "2bb9d088068a84c9")):
            parquet(folder / f"data/train-{n:05}-of-00002-{key}.parquet",
                    train[30 * n: 30 * n + 30])
        for split, some in (("validation", val), *third.items()):
            parquet(folder / f"data/{split}-00000-of-00001-a2192e61a091cecb.parquet", some)
        readme(folder)
    return train, val


def arguments(name, folder, out, *more):
    return [f"data/{name}/prepare.py", f"--hub={folder}", f"--out_dir={out}", "--tokenizer=byte",
            "--num_proc=1", *more]


def decoded(out, split):
    """The documents of a split, in order."""
    meta, tok = json.loads((out / "meta.json").read_text()), Tokenizer.load(str(out / "tokenizer"))
    ids = np.fromfile(out / f"{split}.bin", meta["dtype"])
    ends = np.flatnonzero(ids == meta["eot_id"]) + 1
    return [tok.decode(part[:-1]) for part in np.split(ids, ends)[:-1]]


def contents(out):
    """sha256 of every file but meta.json, of which the command is left out."""
    about = json.loads((out / "meta.json").read_text())
    about.pop("command")
    files = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in out.rglob("*") if path.is_file() and path.name != "meta.json"}
    return {**files, "meta": about}


@pytest.mark.parametrize("name", SETS)
def test_every_script_end_to_end_against_its_stand_in(name, tmp_path):
    train, val = standin(name, tmp_path / "hub")
    more = ["--val_fraction=0.2"] if val is None else []
    done = result(call(*arguments(name, tmp_path / "hub", tmp_path / "out", *more)))
    found = {split: decoded(tmp_path / "out", split) for split in ("train", "val")}
    assert done["stopped_by"] == "the end of the text"
    assert done["bad_files"] == done["bad_lines"] == 0
    if name == "text8":
        assert ("".join(found["train"]), "".join(found["val"])) == (train, val)
        assert max(map(len, found["train"])) <= 10_000
    elif val is None:
        assert sorted(found["train"] + found["val"]) == sorted(train) and 3 < len(found["val"]) < 30
    else:
        assert (found["train"], found["val"]) == (train, val)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["licence"] and str(tmp_path / "hub") in meta["source"]
    assert "files" in meta["settings"]["hub"]
    assert result(call("prepare.py", "validate", f"--data_dir={tmp_path / 'out'}"))["valid"]


# --------------------------------------------------------------------------------------------------
# places


def kinds(folder):
    """{kind: (splits of read_parts, its make_documents, kind of file)}, several files each."""
    standin("owt", folder / "owt")
    standin("pile", folder / "pile")
    standin("wikitext2", folder / "wikitext2")
    standin("text8", folder / "text8")
    owt, pile, wiki, text8 = (sorted(map(str, folder.glob(pattern))) for pattern in (
        "owt/plain_text/*", "pile/train/*", "wikitext2/wikitext-2-raw-v1/train*", "text8/data/*"))
    lines = folder / "lines.txt"
    lines.write_text("".join(line for i in range(9) for line in article(i, "train")))
    return {"parquet": ([(None, owt)], hub.whole, "parquet"),
            "jsonl.zst": ([(None, pile)], hub.whole, "json"),
            "parts": ([("val", owt[:1]), ("train", owt[1:])], hub.whole, "parquet"),
            "articles": ([("val", wiki[:1]), ("train", wiki)], hub.articles, "parquet"),
            "pieces": ([("val", text8[2:]), ("train", text8[:2])], hub.pieces, "parquet"),
            "lines": ([(None, [str(lines)])], hub.articles, "text")}


@pytest.mark.parametrize("kind,val_limit", [
    ("parquet", 0), ("jsonl.zst", 0), ("parts", 0), ("parts", 700), ("articles", 0),
    ("articles", 700), ("pieces", 0), ("lines", 0)])
def test_stopped_after_any_document_it_goes_on_with_the_next(
        kind, val_limit, tmp_path, monkeypatch):
    """Every document is read by a run of its own, from the position that the run before gave."""
    monkeypatch.setattr(hub, "READ_ROWS", 4)
    splits, make_documents, reader = kinds(tmp_path)[kind]
    read = functools.partial(
        hub.read_parts, splits, open_file=functools.partial(hub.open_stream, kind=reader),
        on_bad_file="refuse", make_documents=make_documents, val_limit=val_limit)
    expected, found, position = list(read(position=None)), [], None
    n_val = sum(len(text.encode()) for text, part, _ in expected if part == "val")
    assert len(expected) > 6 and (not val_limit or 700 <= n_val < 1200)
    while len(found) <= len(expected):
        step = next(read(position=json.loads(json.dumps(position))), None)
        if step is None:
            break
        found.append(step)
        position = step[2]
    assert [step[:2] for step in found] == [step[:2] for step in expected]
    for start in (0, len(expected) // 2):  # and to the end in one run, over all borders
        rest = [step[:2] for step in read(position=found[start][2])]
        assert rest == [step[:2] for step in expected[start + 1:]]


def test_a_resumed_run_does_not_read_the_files_before_it(tmp_path, monkeypatch):
    standin("owt", tmp_path)
    files, opened = sorted(map(str, (tmp_path / "plain_text").glob("*"))), []

    def open_file(path):
        opened.append(path)
        return hub.open_stream(path, "parquet")

    read = functools.partial(hub.read_parts, [(None, files)], open_file=open_file,
                             on_bad_file="refuse", make_documents=hub.whole, val_limit=0)
    position = [position for _, _, position in read(position=None)][45]
    opened.clear()
    assert len(list(read(position=position))) == 60 - 46
    assert opened == files[2:]


# --------------------------------------------------------------------------------------------------
# kill -9


def killed_at(goal, early, args):
    """Runs a script in a fork of this process, which kills itself once `goal` documents are in."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        documents.CHUNK_BYTES = 1500
        real, n_rows = writer.write_json, 0

        def write_json(path, state):
            nonlocal n_rows
            if early and n_rows >= goal:  # a chunk is in the bins, and nothing vouches for it
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, state)
            n_rows = state.get("n_rows", 0)
            if not early and n_rows >= goal:
                os.kill(os.getpid(), signal.SIGKILL)

        writer.write_json, sys.argv = write_json, args
        runpy.run_path(str(ROOT / args[0]), run_name="__main__")
    finally:
        os._exit(0)


def committed(out):
    """Documents that progress.json vouches for, -1 without one."""
    try:
        return json.loads((out / "progress.json").read_text())["n_rows"]
    except FileNotFoundError:
        return -1


def test_kill_9_at_random_commits_then_the_same_bytes(tmp_path, monkeypatch):
    name = "pile"
    many = functools.partial(lambda real, n, kind: real(10 * n, kind), texts)
    monkeypatch.setitem(globals(), "texts", many)
    standin(name, tmp_path / "hub")
    call(*arguments(name, tmp_path / "hub", tmp_path / "whole"))
    out, rng, kills = tmp_path / "out", np.random.default_rng(), [0]
    for last in (False, False, True):
        goal = 10**9 if last else kills[-1] + int(rng.integers(1, 40))
        killed_at(goal, rng.random() < 0.5, arguments(name, tmp_path / "hub", out))
        kills.append(committed(out))
    assert 0 < kills[1] < kills[2] and kills[3] == -1, kills
    assert contents(out) == contents(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------
# the network


@pytest.fixture
def remote(tmp_path, monkeypatch, waits):
    """A stand-in at OWNER/NAME, behind file://.

    -> .n reads so far, .broken numbers of those that fail, .asked what the hub was asked.
    """
    net = SimpleNamespace(n=0, broken=(), asked=[])
    find_files, opener, room = hub.find_files, fsspec.implementations.local.LocalFileOpener, 10**14
    packed_read = opener.read

    def found(repository, name, commit, patterns):
        assert (repository, commit) == ("OWNER/NAME", "a" * 40)
        kind, files = find_files(str(tmp_path / "hub"), name, None, patterns)
        return kind, {split: [f"file://{path}" for path in paths] for split, paths in files.items()}

    def dataset_info(self, repository, revision=None, timeout=None):
        net.asked.append((repository, revision))
        return SimpleNamespace(sha="a" * 40)

    def count():
        net.n += 1
        if net.n in net.broken:
            raise TimeoutError(f"read {net.n} took too long")

    def read_packed(self, *args):
        count()
        return packed_read(self, *args)

    class File(io.BufferedReader):
        def read(self, *args):
            count()
            return super().read(*args)

    hub.library()
    usage = shutil._ntuple_diskusage(room, 0, room)  # the sizes in the scripts are the real ones
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(hub, "find_files", found)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(opener, "read", read_packed)
    monkeypatch.setattr(parquet_module, "open", lambda path, mode: File(io.FileIO(path)),
                        raising=False)
    # else the library replaces `open` by its own
    monkeypatch.setattr(parquet_module, "_patched_for_streaming", True, raising=False)
    return net


ALL = range(10**9)


@pytest.mark.parametrize("name", ["owt", "pile"])
def test_a_stream_that_breaks_is_taken_up_where_it_was(name, tmp_path, remote, waits, monkeypatch):
    monkeypatch.setattr(hub, "READ_ROWS", 4)
    standin(name, tmp_path / "hub")
    more = ["--val_fraction=0.2"] if name == "owt" else []
    args = arguments(name, "OWNER/NAME", tmp_path / "whole", *more)
    assert call(*args).stdout.count("going on") == 0 and not waits
    for n, breaks in enumerate(((3, 4, 5), range(7, 1000, 13), range(5, 1000, 11))):
        waits.clear()
        remote.n, remote.broken = 0, breaks
        done = call(*arguments(name, "OWNER/NAME", tmp_path / f"{n}", *more))
        assert waits[:3] == [1, 2, 4] if n == 0 else waits, breaks
        assert done.stdout.count("took too long; going on in") == len(waits)
        assert contents(tmp_path / f"{n}") == contents(tmp_path / "whole")


def test_a_packed_file_that_breaks_in_the_middle_loses_and_repeats_nothing(
        tmp_path, remote, waits, monkeypatch):
    """The library's own retries would: they read on behind what was lost with the failed read."""
    monkeypatch.setitem(hub.READERS, "json", {"chunksize": 5000})
    rng = np.random.default_rng(0)
    expected = [f"{i} {rng.bytes(200).hex()}" for i in range(1500)]
    jsonl_zst(tmp_path / "a.jsonl.zst", expected)
    path, found = f"file://{tmp_path}/a.jsonl.zst", []
    read = functools.partial(hub.read_rows, [path], None,
                             functools.partial(hub.open_stream, kind="json"), "refuse")
    assert [text for text, _, _ in read()] == expected
    n, remote.n = remote.n, 0  # reads of a whole run
    remote.broken = (n // 2, n // 2 + n - 1)
    for text, _, _ in read():
        found.append(text)
        assert len(found) > 200 or not waits, "it must break after some rows"
    assert found == expected and waits == [1, 1], "two breaks, with progress between them"


def test_a_stream_that_stays_broken_ends_in_one_message_and_the_same_command_goes_on(
        tmp_path, remote, waits, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1500)
    standin("minipile", tmp_path / "hub")
    call(*arguments("minipile", "OWNER/NAME", tmp_path / "whole"))
    out, real = tmp_path / "out", writer.commit

    def commit(*args):
        real(*args)
        remote.broken = ALL if committed(out) > 30 else ()

    monkeypatch.setattr(documents, "commit", commit)
    done = call(*arguments("minipile", "OWNER/NAME", out), ok=False)
    assert waits == [1, 2, 4, 8, 16, 32] and 30 < committed(out) < 69
    refused(done, "file://", "TimeoutError", "6 attempts to go on failed",
            "the same command goes on from there")
    monkeypatch.setattr(documents, "commit", real)
    remote.broken = ()
    remote.asked.clear()
    assert result(call(*arguments("minipile", "OWNER/NAME", out)))["documents"] == 69
    assert contents(out) == contents(tmp_path / "whole")
    remote.broken = ALL
    assert "already complete" in call(*arguments("minipile", "OWNER/NAME", out)).stdout
    assert not remote.asked, "a run that goes on keeps its commit, whatever the branch is by now"
    assert json.loads((out / "meta.json").read_text())["settings"]["commit"] == "a" * 40


def hub_errors():
    import httpx
    from huggingface_hub import errors

    url = "https://huggingface.co/api/datasets/OWNER/NAME"
    response = httpx.Response(404, request=httpx.Request("GET", url))
    said = {"not found": errors.RepositoryNotFoundError, "gated": errors.GatedRepoError,
            "no revision": errors.RevisionNotFoundError}
    return {**{case: functools.partial(kind, f"404 or 403: {case}", response=response)
               for case, kind in said.items()},
            "offline": lambda: errors.OfflineModeIsEnabled("Cannot reach the hub: it is offline"),
            "no host": lambda: OSError(-3, "Temporary failure in name resolution")}


@pytest.mark.parametrize("case", ["not found", "gated", "offline", "no revision", "no host"])
def test_a_data_set_that_cannot_be_had_is_one_message_that_names_a_local_copy(
        case, tmp_path, monkeypatch):
    def dataset_info(*_, **__):
        raise hub_errors()[case]()

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    for name in ("owt", "wikitext2") if case == "offline" else ("owt",):
        done = call(f"data/{name}/prepare.py", f"--out_dir={tmp_path}", "--tokenizer=byte",
                    ok=False)
        refused(done, str(hub_errors()[case]())[:30],
                "Give --hub=FOLDER with a local copy laid out like the reposi")
        assert len(done.stdout.splitlines()) == 1
        assert ("--input=FOLDER" in done.stdout) == (name == "wikitext2")


def test_a_commit_is_kept_by_the_folder_that_began_with_it(tmp_path, monkeypatch):
    class Info:
        sha = "a" * 40

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, *_, **__: Info)
    first = hub.pinned("OWNER/NAME", "", str(tmp_path))
    (tmp_path / "progress.json").write_text(json.dumps({"settings": first}))
    Info.sha = "b" * 40
    assert first == {"hub": "OWNER/NAME", "revision": "", "commit": "a" * 40}
    assert hub.pinned("OWNER/NAME", "", str(tmp_path)) == first
    assert hub.pinned("OWNER/OTHER", "", str(tmp_path))["commit"] == "b" * 40
    assert hub.pinned("OWNER/NAME", "v2", str(tmp_path))["commit"] == "b" * 40
    (tmp_path / "progress.json").write_text("{")
    assert hub.pinned("OWNER/NAME", "", str(tmp_path))["commit"] == "b" * 40


# --------------------------------------------------------------------------------------------------
# damage


def cut_parquet(path):
    path.write_bytes(path.read_bytes()[:-20])


def damage_page(path, group=2):
    """The footer is whole, the pages of a row group are not."""
    meta = pyarrow.parquet.ParquetFile(path).metadata
    column, data = meta.row_group(group).column(0), bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start: start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)


def cut_zst(path):
    path.write_bytes(path.read_bytes()[:-30])


def flip_zst(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def bad_json(path):
    lines = zstd.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(zstd.compress(b"".join([*lines[:20], b'{"text": "half a li\n', *lines[20:]])))


DAMAGE = {"parquet cut": ("owt", "plain_text/train-00001-of-00003.parquet", cut_parquet),
          "parquet page": ("owt", "plain_text/train-00001-of-00003.parquet", damage_page),
          "parquet empty": ("owt", "plain_text/train-00001-of-00003.parquet",
                            lambda path: path.write_bytes(b"")),
          "zst cut": ("pile", "train/00.jsonl.zst", cut_zst),
          "zst flipped": ("pile", "train/00.jsonl.zst", flip_zst),
          "zst empty": ("pile", "train/00.jsonl.zst", lambda path: path.write_bytes(b"")),
          "json": ("pile", "train/00.jsonl.zst", bad_json)}


@pytest.mark.parametrize("case,where", [
    *((case, "here") for case in DAMAGE), ("parquet page", "there"), ("zst flipped", "there")])
def test_a_damaged_file_is_named_and_refused_or_skipped_and_counted(
        case, where, tmp_path, waits, request):
    name, file, damage = DAMAGE[case]
    train, val = standin(name, tmp_path / "hub")
    damage(tmp_path / "hub" / file)
    more = ["--val_fraction=0.3"] * (val is None)
    repository = tmp_path / "hub"
    if where == "there":
        request.getfixturevalue("remote")
        repository = "OWNER/NAME"
    done = call(*arguments(name, repository, tmp_path / "out", *more), ok=False)
    refused(done, file, "damaged or cut short", "--on_bad_file=skip")
    assert len(waits) == (6 if where == "there" else 0)
    done = call(*arguments(name, repository, tmp_path / "out", *more, "--on_bad_file=skip"))
    assert f"{file}: " in done.stdout and "the rest of this file is skipped" in done.stdout
    assert result(done)["bad_files"] == 1
    found = decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")
    others = set(train[:20] + train[40:] if name == "owt" else train[30:] + val)
    assert others <= set(found) <= set(train + (val or [])) and len(set(found)) == len(found)


def test_what_comes_before_a_damage_is_kept_but_for_what_is_read_ahead(tmp_path, capsys):
    expected = texts(3000, "before")
    table, path = pyarrow.table({"text": expected}), tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=200)
    damage_page(path, 10)
    open_file = functools.partial(hub.open_stream, kind="parquet")
    rows = hub.read_rows([str(path)] * 2, [1, None, 0], open_file, "skip")
    *found, last = [text for text, _, _ in rows]
    assert last is documents.BAD_FILE and found == expected[: len(found)] and len(found) > 1000
    assert capsys.readouterr().err.count("the rest of this file is skipped") == 1


@pytest.mark.parametrize("case", ["cut.parquet", "cut.jsonl.zst", "cut.txt.gz"])
def test_prepare_py_can_skip_a_damaged_file_too(case, tmp_path):
    import gzip

    (tmp_path / "in").mkdir()
    path, good = tmp_path / "in" / f"b_{case}", texts(40, "good")
    parquet(tmp_path / "in/a.parquet", good[:20])
    parquet(tmp_path / "in/c.parquet", good[20:])
    if case == "cut.parquet":
        parquet(path, texts(40, "bad"))
    elif case == "cut.txt.gz":
        path.write_bytes(gzip.compress("\n".join(texts(9, "bad")).encode()))
    else:
        jsonl_zst(path, texts(40, "bad"))
    path.write_bytes(path.read_bytes()[:-9])
    args = ["prepare.py", f"--input={tmp_path / 'in'}", f"--out_dir={tmp_path / 'out'}",
            "--tokenizer=byte", "--num_proc=1", "--val_fraction=0.2"]
    refused(call(*args, ok=False), path.name, "damaged or cut short", "--on_bad_file=skip")
    done = call(*args, "--on_bad_file=skip")
    assert path.name in done.stdout and result(done)["bad_files"] == 1
    assert set(good) <= set(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val"))


def test_odd_rows_and_files(tmp_path):
    """A missing text is a bad line; empty texts and files without rows do no harm."""
    odd, name = "\u2028 é\0 \r\n", "hub/plain_text/train-0000{}-of-00003.parquet"
    parquet(tmp_path / name.format(0), [None, *texts(20, "train"), "", " \n"])
    parquet(tmp_path / name.format(1), pyarrow.array([], pyarrow.string()))
    parquet(tmp_path / name.format(2), pyarrow.array([odd]))
    readme(tmp_path / "hub", ("plain_text", {"train": "plain_text/train-*"}))
    done = result(call(*arguments("owt", tmp_path / "hub", tmp_path / "out", "--val_fraction=0.2")))
    assert (done["documents"], done["bad_lines"], done["empty"]) == (21, 1, 2)
    assert odd in decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")


def test_another_data_set_is_refused(tmp_path):
    folder, args = tmp_path / "hub", arguments("owt", tmp_path / "hub", tmp_path / "out")
    folder.mkdir()
    refused(call(*args, ok=False), f"--hub={folder} cannot be read", "laid out like the repository")
    (folder / "train.csv").write_text("text\na document\n")
    refused(call(*args, ok=False), f"--hub={folder} cannot be read",
            "csv files, expected one of parquet, json, text")
    (folder / "train.csv").unlink()
    parquet(folder / "plain_text/train-00000-of-00001.parquet", [1, 2], body=["a", "b"])
    refused(call(*args, ok=False),
            "no column of strings 'text' (there is: text (int64), body (string))")
    for name, *parts in (("minipile", "no split validation; there is: train"),
                         ("fineweb_edu", "sample-10BT", "not found")):
        refused(call(*arguments(name, folder, tmp_path / "out"), ok=False), *parts)
    readme(folder, ("plain_text", {"train": "../secret.parquet"}))
    parquet(tmp_path / "secret.parquet", ["a secret"])
    refused(call(*args, ok=False), "README.md names ../secret.parquet, which is not in that folder")
    refused(call(*args, "--on_bad_file=ignore", ok=False), "expected refuse or skip")
    done = call("data/wikitext2/prepare.py", f"--input={folder}", "--hub=OWNER/NAME", ok=False)
    refused(done, "expected one of them")


def test_a_local_copy_that_changed_is_not_mixed_with_what_was_begun(tmp_path, monkeypatch):
    standin("owt", tmp_path / "hub")
    args = arguments("owt", tmp_path / "hub", tmp_path / "out", "--val_fraction=0.2")
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1500)
    with monkeypatch.context() as patch:
        patch.setattr(documents, "finish", mock.Mock(side_effect=bins.DataError("stopped")))
        refused(call(*args, ok=False), "stopped")
    (tmp_path / "hub").rename(tmp_path / "moved")
    args[1] = f"--hub={tmp_path / 'moved'}"
    parquet(tmp_path / "moved/plain_text/train-00001-of-00003.parquet", texts(3, "another"))
    refused(call(*args, ok=False), "begun with other settings: hub is '3 files, names and sizes ")
    standin("owt", tmp_path / "moved")
    # the same files in another place are the same data
    assert result(call(*args))["documents"] == 60


def test_wikitext_in_its_old_files_is_the_same(tmp_path):
    train, val = standin("wikitext103", tmp_path / "hub")
    for kind in ("{}.txt", "wiki.{}.raw", "wiki.{}.tokens"):
        out, folder = tmp_path / f"out {kind}", tmp_path / kind
        folder.mkdir()
        for name, articles in (("train", train), ("valid", val)):
            (folder / kind.format(name)).write_text(" \n" + "".join(articles))
        call("data/wikitext103/prepare.py", f"--input={folder}", f"--out_dir={out}",
             "--tokenizer=byte", "--num_proc=1")
        assert (decoded(out, "train"), decoded(out, "val")) == (train, val)
    (folder / "wiki.valid.tokens").unlink()
    done = call("data/wikitext103/prepare.py", f"--input={folder}", f"--out_dir={tmp_path / 'x'}",
                ok=False)
    refused(done, "expected one of train.txt, wiki.train.raw, wiki.train.tokens",
            "there is: wiki.train.tokens")


# --------------------------------------------------------------------------------------------------
# budgets


def write(out, some_texts, **settings):
    settings = {"tokenizer": "byte", "val_fraction": 0.2, "num_proc": 1, **settings}
    units = documents.from_texts(lambda: ((text, None) for text in some_texts))
    return documents.write_dataset(units, str(out), **settings)


def kept(out):
    return {split: set(decoded(out, split)) for split in ("train", "val")}


def test_a_fraction_is_within_every_larger_one_whatever_the_order(tmp_path):
    some, shares = texts(2000, "fraction"), (0.05, 0.2, 1.0)
    for share in shares:
        write(tmp_path / f"{share}", some + some[:50], fraction=share)
    write(tmp_path / "reversed", some[::-1], fraction=0.2)
    small, middle, whole = (kept(tmp_path / f"{share}") for share in shares)
    assert kept(tmp_path / "reversed") == middle
    for split, expected in (("train", 1600), ("val", 400)):
        assert small[split] < middle[split] < whole[split], "and the same documents are val in each"
        assert abs(len(middle[split]) - 0.2 * expected) < 5 * (0.16 * expected) ** 0.5
    meta = json.loads((tmp_path / "0.2/meta.json").read_text())
    n = sum(map(len, middle.values()))
    again = len([text for text in some[:50] if text in middle["train"] | middle["val"]])
    assert (meta["outside_fraction"], meta["duplicates"]) == (2050 - n - again, again)
    assert meta["settings"]["fraction"] == 0.2 and meta["stopped_by"] == "the end of the text"


def test_the_vocabulary_does_not_depend_on_the_fraction(tmp_path):
    some = [f"{text} {hashlib.sha256(text.encode()).hexdigest()}"
            for text in texts(1500, "vocabulary")]
    for share in (0.5, 1.0):
        write(tmp_path / f"{share}", some, fraction=share, tokenizer="bpe:512")
    metas = [json.loads((tmp_path / f"{share}/meta.json").read_text()) for share in (0.5, 1.0)]
    assert metas[0]["fingerprint"] == metas[1]["fingerprint"]


def folder_bytes(out):
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


BUDGETS = {"max_tokens": {"max_tokens": 20_000}, "max_bytes": {"max_bytes": 20_000},
           "max_disk_gb": {"max_disk_gb": (writer.SMALL_FILES + 40_000) / 1e9},
           "all": {"max_tokens": 50_000, "max_bytes": 20_000, "max_disk_gb": 0.001,
                   "fraction": 0.8}}


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_end_exactly_and_resume_to_the_same_bytes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 5000)
    some, budgets, largest, real = texts(400, "budget"), BUDGETS[name], 0, writer.commit

    def commit(out_dir, *args):
        nonlocal largest
        real(out_dir, *args)
        if (tmp_path / "whole").exists():
            largest = max(largest, folder_bytes(tmp_path / "whole"))

    monkeypatch.setattr(documents, "commit", commit)
    done = write(tmp_path / "whole", some, **budgets)
    sizes = [len(text.encode()) for text in some]
    n = done["documents"]
    if name in ("max_tokens", "max_bytes"):
        eot = 1 if name == "max_tokens" else 0
        total = np.cumsum([size + eot for size in sizes])
        assert total[n - 2] < 20_000 <= total[n - 1]
    elif name == "max_disk_gb":  # a row for each document; the tokenizer's files: some 100 bytes
        total = np.cumsum([2 * (size + 1) + 8 for size in sizes])
        assert 40_000 - 2 * 300 - 6000 < total[n - 1] < 40_000
    assert done["stopped_by"] == ("max_bytes" if name == "all" else name)
    if budgets.get("max_disk_gb"):
        assert max(largest, folder_bytes(tmp_path / "whole")) <= budgets["max_disk_gb"] * 1e9
    assert result(call("prepare.py", "validate", f"--data_dir={tmp_path / 'whole'}"))["valid"]

    outs = list(crashed(lambda out: write(out, some, **budgets), tmp_path, (documents, "commit"),
                        moments=["after"]))
    assert len(outs) >= 3
    for out in outs:
        assert contents(out) == contents(tmp_path / "whole"), out.name


def test_disk_is_counted_with_the_width_of_the_ids():
    """What 0.8 GB hold of OpenWebText: documents of 1,128 tokens, and a row for each."""
    a_row = writer.ROW.itemsize
    state = {"settings": {"max_disk_gb": 0.8}, "tokens": {"train": 10**8, "val": 0}, "bytes": {},
             "rules": {},
             "logs": {"rows.bin": a_row * 10**5, "bands.bin": 0}}
    rows = np.zeros(800_000, writer.ROW)
    rows["bytes"], rows["tokens"] = 4963, 1128
    for itemsize in (2, 4):
        with mock.patch("os.scandir", return_value=[]):
            n, name = writer.within_budget("", state, rows, itemsize)
        left = 8 * 10**8 - writer.SMALL_FILES - 10**8 * itemsize - a_row * 10**5
        assert name == "max_disk_gb" and n == left // (1128 * itemsize + a_row)


def test_a_budget_too_small_for_both_splits_is_one_message(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(40, "small"))
    (tmp_path / "a.jsonl").write_text(lines)
    for budget in ("--max_bytes=1", "--max_disk_gb=0.00001", "--fraction=0.0001"):
        done = call("prepare.py", f"--input={tmp_path}/a.jsonl", f"--out_dir={tmp_path / 'out'}",
                    "--tokenizer=byte", "--num_proc=1", budget, ok=False)
        refused(done, "documents fell into", budget[2:].split("=")[0] + " = ", "a larger budget")
        assert len(done.stdout.splitlines()) == 1 and not list((tmp_path / "out").iterdir())
    for wrong in ({"fraction": 0.0}, {"fraction": 1.5}, {"max_bytes": -1}, {"max_disk_gb": -1.0},
                  {"fraction": float("nan")}, {"max_disk_gb": float("nan")},
                  {"max_disk_gb": float("inf")}):
        with pytest.raises(bins.DataError, match="0 < fraction <= 1 and no negative number"):
            write(tmp_path / "out", texts(40, "small"), **wrong)


def test_an_official_validation_part_takes_a_tenth_of_a_budget_at_most(tmp_path):
    train, val = standin("pile", tmp_path / "hub")
    budgets = ("--max_bytes=6000", "--max_tokens=6000", f"--max_disk_gb={62_000 / 1e9}")
    for n, budget in enumerate(budgets):
        done = result(call(*arguments("pile", tmp_path / "hub", tmp_path / f"{n}", budget)))
        assert done["stopped_by"] == budget[2:].split("=")[0] and done["train_tokens"] > 1000
        assert done["val_tokens"] < {"max_disk_gb": 3100}.get(done["stopped_by"], 600) + 300
        found = decoded(tmp_path / f"{n}", "val")
        assert found == val[: len(found)] and decoded(tmp_path / f"{n}", "train")[0] == train[0]
    call(*arguments("pile", tmp_path / "hub", tmp_path / "half", "--fraction=0.5"))
    found = decoded(tmp_path / "half", "val")
    assert set(found) < set(val) and 0 < len(found)


def test_what_lies_there_already_counts_for_the_disk(tmp_path, monkeypatch):
    """A laptop with 10 GB free: 8 GB are begun, 7 GB are there, 3 GB are left; it must go on."""
    some, crash = texts(400, "disk"), mock.Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(documents, "finish", crash)
        write(tmp_path, some, input_bytes=60_000)
    free = shutil._ntuple_diskusage(10**9, 10**9, 50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    message = "GB of token ids to write.*--max_disk_gb, --max_bytes or --max_tokens"
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "fresh", some, input_bytes=60_000)
    assert write(tmp_path, some, input_bytes=60_000)["documents"] == 400
    for budget in ({"max_bytes": 9000}, {"max_tokens": 9000}, {"fraction": 0.3}):
        assert write(tmp_path / f"{budget}", some, input_bytes=60_000, **budget)["documents"] > 20
    with pytest.raises(ValueError, match="about 0.00 GB of token ids to write"):
        write(tmp_path / "more than is free", some, input_bytes=60_000, max_disk_gb=90_000 / 1e9)


def test_a_vocabulary_is_made_from_the_beginning_of_a_stream(tmp_path, monkeypatch):
    """The network is asked for that part twice, not for all of it."""
    monkeypatch.setattr(hub, "SAMPLE_FROM", 4000)
    monkeypatch.setattr(hub, "READ_ROWS", 4)
    train, val = standin("lm1b", tmp_path / "hub")
    read, real = [], documents.training_sample

    def training_sample(*args):
        sample = list(real(*args))
        read.append(sample)
        return sample

    monkeypatch.setattr(documents, "training_sample", training_sample)
    monkeypatch.setattr(documents, "call_tokenizer", lambda function, *args: Tokenizer.load("byte"))
    args = [*arguments("lm1b", tmp_path / "hub", tmp_path / "out"), "--tokenizer=bpe:600"]
    done = call(*args)
    assert "on the first 4,000 bytes of the text" in done.stdout
    n = next(n for n in range(60) if sum(len(text.encode()) for text in train[:n]) >= 4000)
    assert sorted(read[0]) == sorted(train[:n])
    call(*arguments("lm1b", tmp_path / "hub", tmp_path / "small"), "--tokenizer=bpe:600",
         "--max_bytes=3000")
    assert sum(len(text.encode()) for text in read[1]) < 3200


UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "MB": 1e6, "GB": 1e9}


@pytest.mark.parametrize("name", SETS)
def test_heads_state_sizes_that_fit_together(name):
    """Disk: 2 bytes a token, and 8 a document on the way. Time: 8 cores, 10 MB/s of text each."""
    head = re.sub(r"\s+", " ", (ROOT / "data" / name / "prepare.py").read_text().split('"""')[1])
    found = re.search(r"Download ([\d.]+ \w+); text ([\d.]+ \w+), ([\d.]+ \w+) documents, "
                      r"([\d.]+ \w+) tokens \(([\w:]+)\); disk ([\d.]+ \w+); (\d+) minute", head)
    download, text, n_documents, tokens, disk = (
        float(found[i].split()[0]) * UNITS[found[i].split()[1]] for i in (1, 2, 3, 4, 6))
    assert "Source: " in head and "Licence: " in head
    assert disk == pytest.approx(2 * tokens + 8 * n_documents, rel=0.03)
    assert int(found[7]) == pytest.approx(max(1, text / (8 * 10e6) / 60), rel=0.25)
    assert download < text and (tokens == text if found[5] == "byte" else 3.3 < text / tokens < 4.8)
    script = (ROOT / "data" / name / "prepare.py").read_text()
    assert f'tokenizer = "{found[5]}"' in script and 20 <= len(script.splitlines()) <= 60


def test_the_examples_for_a_laptop_are_true():
    """data/owt/prepare.py: 10 GB free, a subset of 4 GB."""
    tokens_per_byte, per_document, documents_in_all = 9.04e9 / 39.8e9, 9.04e9 / 8.01e6, 8.01e6
    head = (ROOT / "data/owt/prepare.py").read_text()
    disk = 4e9 * tokens_per_byte * 2 + 8 * documents_in_all / 10
    assert "--max_bytes=4e9 " in head and f"{disk / 1e9:.1f} GB of disk" in head
    n = 8e9 // (2 * per_document + 8)
    assert "--max_disk_gb=8 " in head and f"{n * per_document / 1e9:.1f} B tokens" in head
