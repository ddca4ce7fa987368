"""Promises of data/duplicates.py and data/merge.py: shards merge to the bytes of one machine."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from data import bins, documents, duplicates, inputs, writer
from data import merge as parts
from data.bins import DataError
from data.workers import EXCERPT_CHARS

from conftest import call, crashed, refused  # isort: skip
from test_filters import WORDS, decoded, prose, settings, write_jsonl  # isort: skip


def documents_of(n, seed):
    """n texts: new ones, exact copies, near-duplicates, too short ones, and copies of these."""
    rng, made = np.random.default_rng(seed), ["too short"]
    for i in range(n):
        kind = rng.choice(["new", "copy", "near", "short", "empty"],
                          p=[0.5, 0.15, 0.15, 0.15, 0.05])
        if kind == "new":
            made.append(f"{prose(int(rng.integers(30, 80)), 1000 * seed + i)} caf\u00e9 \ufffd")
        elif kind == "short":
            made.append(f"short {rng.integers(60)}")
        elif kind == "empty":
            made.append(" ")
        else:
            some = made[rng.integers(len(made))].split(" ")
            if kind == "near":
                some[rng.integers(len(some))] = str(WORDS[rng.integers(4000)])
            made.append(" ".join(some))
    return made[1:]


FILTERS = {"min_words": 10, "minhash_bands": 14, "on_bad_line": "skip", "on_bad_file": "skip",
           "val_fraction": 0.2, "tokenizer": "byte", "num_proc": 1}


def prepare(input, out_dir, **changes):
    asked = settings(**{**FILTERS, "input": str(input), "out_dir": str(out_dir), **changes})
    return inputs.prepare_text(asked, inputs.find_inputs(str(input)) if str(input) != "-" else None)


def shards(input, folder, n, **changes):
    for i in range(n):
        prepare(input, folder / f"{i}", shard=f"{i}/{n}", **changes)
    return f"{folder}/*"


def contents(folder):
    """{name: bytes} of all files; the command line in meta.json is left out."""
    found = {str(path.relative_to(folder)): path.read_bytes()
             for path in folder.rglob("*") if path.is_file()}
    about = json.loads(found.pop("meta.json"))
    about.pop("command")
    return {**found, "meta": about}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """7 files of texts that repeat each other, also across files; their bins from one machine."""
    folder, patch = tmp_path_factory.mktemp("corpus"), pytest.MonkeyPatch()
    patch.setattr(documents, "CHUNK_BYTES", 10_000)
    some = documents_of(220, 1)
    (folder / "in").mkdir()
    for i, start in enumerate((0, 10, 50, 51, 100, 150, 200)):
        end = (10, 50, 51, 100, 150, 200, 220)[i]
        lines = [json.dumps({"text": text}) for text in some[start:end]]
        (folder / f"in/{i}.jsonl").write_text("\n".join([*lines[:3], "oops", *lines[3:]]) + "\n")
    prepare(folder / "in", folder / "whole")
    yield folder
    patch.undo()


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --------------------------------------------------------------------------------------------------
# near-duplicates


def test_a_document_goes_if_and_only_if_it_shares_a_band_with_an_earlier_one(corpus):
    """Against a loop over sets: which documents stay, and the counts."""
    some = [json.loads(line)["text"] for path in sorted((corpus / "in").iterdir())
            for line in path.read_text().splitlines() if line != "oops"]
    judge = inputs.Filters(settings(**FILTERS)).judge
    seen_texts, seen_bands, kept, counts = set(), set(), [], {}
    for text in some:
        rule, _, bands = judge(text)
        what = ("empty" if not text.strip() else "duplicates" if text in seen_texts else rule
                or ("near_duplicates" if seen_bands & set(bands.tolist()) else ""))
        seen_texts.add(text)
        if what in ("", "near_duplicates"):
            seen_bands |= set(bands.tolist())
        counts[what] = counts.get(what, 0) + 1
        kept += [] if what else [text]
    meta = json.loads((corpus / "whole/meta.json").read_text())
    assert decoded(corpus / "whole") == sorted(kept) and len(kept) > 60
    for name in ("empty", "duplicates"):
        assert meta[name] == counts[name]
    near = counts["near_duplicates"]
    assert meta["dropped"] == {"words": counts["words"], "near_duplicates": near}
    assert min(counts.values()) > 5 and meta["bad_lines"] == 7


def test_dropped_jsonl_shows_the_first_of_each_rule_and_what_they_are_like(corpus):
    lines = [json.loads(line) for line in (corpus / "whole/dropped.jsonl").read_text().splitlines()]
    some = [line for path in sorted((corpus / "in").iterdir())
            for line in path.read_text().splitlines()]
    near = [line for line in lines if line["rule"] == "near_duplicates"]
    for line in lines:
        assert line["text"] == json.loads(some[line["document"]])["text"][:EXCERPT_CHARS]
    assert [line["rule"] for line in lines].count("words") == len(near) == writer.N_SAMPLES
    assert [line["document"] for line in lines if line["rule"] == "words"] == sorted(
        {text: i for i, text in reversed(list(enumerate(some))) if "oops" != text and
         0 < len(json.loads(text)["text"].split()) < 10}.values())[: writer.N_SAMPLES]
    assert sum(bool(line["match"]) for line in near) > 15
    for line in near:
        match = json.loads(some[int(line["reason"].split()[-1])])["text"][:EXCERPT_CHARS]
        assert line["match"] in ("", match)
        mine, other = set(line["text"].split()), set(match.split())
        assert len(mine & other) / len(mine | other) > 0.6


def test_processes_chunks_and_files_of_hashes_do_not_matter(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("data.duplicates.IN_MEMORY", 100)
    monkeypatch.setattr(duplicates, "LOG_ROWS", 7)
    prepare(corpus / "in", tmp_path / "spilled")
    monkeypatch.setattr(documents, "CHUNK_ROWS", 31)
    prepare(corpus / "in", tmp_path / "small", num_proc=2)
    assert contents(tmp_path / "spilled") == contents(corpus / "whole")
    assert contents(tmp_path / "small") == contents(corpus / "whole")


# --------------------------------------------------------------------------------------------------
# shards


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_merged_shards_are_what_one_machine_makes(n, corpus, tmp_path, monkeypatch):
    pattern = shards(corpus / "in", tmp_path / "parts", n)
    monkeypatch.setattr(parts, "MERGE_ROWS", 50)
    done = call("prepare.py", "merge", f"--input={pattern}", f"--out_dir={tmp_path / 'out'}")
    result = json.loads(done.stdout)
    assert contents(tmp_path / "out") == contents(corpus / "whole")
    assert result["dropped"] == json.loads((corpus / "whole/meta.json").read_text())["dropped"]


def test_a_budget_ends_the_merge_at_the_document_that_ends_one_machine(corpus, tmp_path):
    prepare(corpus / "in", tmp_path / "whole", max_tokens=20_000)
    pattern = shards(corpus / "in", tmp_path / "parts", 3, max_tokens=20_000)
    parts.merge_parts(pattern, str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert json.loads((tmp_path / "out/meta.json").read_text())["duplicates"] > 0


def test_samples_are_the_first_even_if_shards_drop_the_same_texts(tmp_path):
    (tmp_path / "in").mkdir()
    for i, (start, end) in enumerate(((0, 15), (0, 19), (5, 300))):
        short = [f"short {n}" for n in range(start, end)]
        write_jsonl(tmp_path / f"in/{i}.jsonl", short + [prose(40, 50 * i + n) for n in range(20)])
    prepare(tmp_path / "in", tmp_path / "whole")
    parts.merge_parts(shards(tmp_path / "in", tmp_path / "parts", 3), str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_every_shard_trains_the_vocabulary_of_the_whole_input(corpus, tmp_path):
    asked = {"tokenizer": "bpe:520"}
    prepare(corpus / "in", tmp_path / "whole", **asked)
    parts.merge_parts(shards(corpus / "in", tmp_path / "parts", 3, **asked), str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("where", ["append", "write_json", "os.replace", "os.remove"])
@pytest.mark.parametrize("what", ["shard", "merge"])
def test_a_crash_before_or_after_any_step_then_the_same_bytes(what, where, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MERGE_ROWS", 25)
    monkeypatch.setattr(documents, "CHUNK_ROWS", 25)
    (tmp_path / "in").mkdir()
    for i in range(2):
        write_jsonl(tmp_path / f"in/{i}.jsonl", documents_of(40, 2)[20 * i : 20 * i + 30])
    pattern = shards(tmp_path / "in", tmp_path / "parts", 2)

    def work(out):
        if what == "merge":
            return parts.merge_parts(pattern, str(out))
        return prepare(tmp_path / "in", out, shard="1/2")

    def found(out):
        files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        return {name: data for name, data in files.items() if not name.endswith(".json")}

    work(tmp_path / "undisturbed")
    step = (os, where[3:]) if where.startswith("os.") else (writer, where)
    outs = list(crashed(work, tmp_path / "crashed", step))
    assert len(outs) >= 2
    for out in outs:
        assert found(out) == found(tmp_path / "undisturbed"), out.name


def test_a_shard_without_val_documents_is_fine(tmp_path):
    (tmp_path / "in").mkdir()
    some = [prose(40, n) for n in range(60)]
    digests = b"".join(documents.digest(text.encode()) for text in some)
    digests = np.frombuffer(digests, "<u8").reshape(-1, 2)
    in_val = documents.in_val(digests, 0.2)
    for name, chosen in (("a", ~in_val), ("b", in_val)):
        texts = [text for text, is_chosen in zip(some, chosen) if is_chosen]
        write_jsonl(tmp_path / f"in/{name}.jsonl", texts)
    prepare(tmp_path / "in", tmp_path / "whole")
    parts.merge_parts(shards(tmp_path / "in", tmp_path / "parts", 2), str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    finished = prepare(tmp_path / "in", tmp_path / "parts/0", shard="0/2")  # left alone
    assert finished["val_tokens"] == 0


def test_files_are_shared_out_by_size_in_order_and_none_is_left_out():
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = rng.integers(0, 10 ** rng.integers(1, 6), rng.integers(1, 40))
        sizes[0] += 1
        n = int(rng.integers(1, len(sizes) + 1))
        cuts = [inputs.part_of(sizes, f"{i}/{n}") for i in range(n)]
        assert [cuts[0][0], cuts[-1][1]] == [0, len(sizes)]
        assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:]))
        assert all(first < last for first, last in cuts)
    thirds = [inputs.part_of(np.array([5] * 9), f"{i}/3") for i in range(3)]
    assert thirds == [(0, 3), (3, 6), (6, 9)]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def foreign(folder):
    meta = json.loads((folder / "1/shard.json").read_text())
    meta["settings"]["quality"]["words"][0] = 11
    (folder / "1/shard.json").write_text(json.dumps(meta))


WRONG = {
    "missing": (lambda folder: shutil.rmtree(folder / "1"), "missing shards: 1/3"),
    "twice": (lambda folder: shutil.copytree(folder / "1", folder / "one"),
              "a shard twice: 1/3 is .*one"),
    "foreign": (foreign, "of another data set than .*0: quality is .*11.* there"),
    "unfinished": (lambda folder: (folder / "1/shard.json").rename(folder / "1/progress.json"),
                   "interrupted"),
    "no shard": (lambda folder: (folder / "1/shard.json").unlink(), "shard.json is missing"),
    "whole": (lambda folder: shutil.copytree(folder.parent / "whole", folder / "x"),
              "whole data set, not a shard"),
    "cut": (lambda folder: os.truncate(folder / "1/rows.bin", 5), "rows.bin is missing or not of"),
    "changed rows": (lambda folder: flip(folder / "1/rows.bin"), "rows.bin has changed"),
    "changed ids": (lambda folder: flip(folder / "2/train.bin"), "train.bin has changed"),
    "changed tokenizer": (lambda folder: shutil.rmtree(folder / "0/tokenizer"), "tokenizer"),
    "nothing": (shutil.rmtree, "no folder there"),
}


@pytest.fixture(scope="module")
def three(corpus):
    shards(corpus / "in", corpus / "three", 3)
    return corpus / "three"


@pytest.mark.parametrize("name", WRONG)
def test_shards_that_are_not_all_of_one_data_set_are_one_message(name, corpus, three, tmp_path):
    (tmp_path / "whole").symlink_to(corpus / "whole")
    folder = shutil.copytree(three, tmp_path / "parts")
    damage, message = WRONG[name]
    damage(folder)
    done = call("prepare.py", "merge", f"--input={folder}/*", f"--out_dir={tmp_path / 'out'}",
                ok=False)
    refused(done)
    assert len(done.stdout.strip().splitlines()) == 1
    assert re.search(message, done.stdout), done.stdout


def test_what_cannot_be_sharded_is_one_message(corpus, tmp_path):
    mistakes = (({"shard": "3/3"}, "0 <= i < n"), ({"shard": "1"}, "expected i/n"),
                ({"shard": "0/8"}, "8 shards of 7 files"),
                ({"shard": "0/2", "input": "-"}, "need files"))
    for asked, message in mistakes:
        with pytest.raises(DataError, match=message):
            prepare(**{"input": corpus / "in", "out_dir": tmp_path / "out", **asked})
    with pytest.raises(DataError, match="is one shard of a data set"):
        bins.load_meta(str(shards(corpus / "in", tmp_path / "parts", 1)).replace("*", "0"))
    done = call("prepare.py", "merge", "--input=x", "--out_dir=y", "--num_proc=2", ok=False)
    refused(done, "no other setting")


def test_a_vocabulary_too_large_for_what_the_filters_keep_names_them(corpus, tmp_path):
    message = "give more text.*what these rules keep: words, near_duplicates"
    with pytest.raises(DataError, match=message):
        prepare(corpus / "in", tmp_path / "out", tokenizer="bpe:5000", min_words=75)


def test_a_disk_that_fills_up_while_hashes_are_sorted_is_one_message(corpus, tmp_path, monkeypatch):
    """numpy's error has no number and no reason."""
    def write(self, blocks):
        raise OSError("512 requested and 100 written")

    monkeypatch.setattr(duplicates, "IN_MEMORY", 100)
    with monkeypatch.context() as patch:
        patch.setattr(duplicates.Seen, "write", write)
        with pytest.raises(DataError, match="no space left.* while writing.*the same command"):
            prepare(corpus / "in", tmp_path / "out")
    prepare(corpus / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(corpus / "whole")
