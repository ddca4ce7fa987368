"""Shards of a data set -> the data set that one machine would have made, byte for byte.

`prepare.py --shard=i/n` writes shard i: its bins, and for each document a row and its MinHash bands
(data/writer.py). It drops what the filters drop for the text alone, and its own exact duplicates.
`merge_parts` reads the rows of all shards in order, drops duplicates and near-duplicates of earlier
shards, and commits the rest as data/documents.py does. So a killed merge goes on where it was.
"""

import glob
import json
import os
import time

import numpy as np

from data import bins, writer
from data.bins import SPLITS, DataError, check_files
from data.documents import (
    Chunk,
    call_tokenizer,
    check_disk,
    dtype_of,
    progress,
    save_tokenizer,
    summary,
    write_chunks,
    writing,
)
from data.duplicates import drop, read_ids, seen_texts
from data.tokenizer import Tokenizer
from data.writer import DUPLICATE, KEPT, ROW
from lib.files import file_hash

# A commit holds at most so many rows, and ends with the row that reaches so many tokens.
MERGE_ROWS, MERGE_TOKENS = 50_000, 4_000_000


# --------------------------------------------------------------------------------------------------
# the shards


def read_parts(patterns):
    """Comma-separated globs of shard folders -> [(folder, its shard.json)] in order.

    Raises DataError unless they are all shards of one data set, each once.
    """
    folders = set()
    for pattern in filter(None, patterns.split(",")):
        folders.update(filter(os.path.isdir, glob.glob(pattern)))
    parts = [(folder, load_part(folder)) for folder in sorted(folders)]
    if not parts:
        raise DataError(f"--input={patterns}: no folder there; expected those that prepare.py "
                        "--shard=i/n wrote")
    for part in parts:
        check_same(part, parts[0])
    n = parts[0][1]["settings"]["shard"].split("/")[1]
    names = [f"{i}/{n}" for i in range(int(n))]
    folders_of = {}
    for folder, meta in parts:
        folders_of.setdefault(meta["settings"]["shard"], []).append(folder)
    if missing := [name for name in names if name not in folders_of]:
        raise DataError(f"--input={patterns}: missing shards: {', '.join(missing)}; make them with "
                        f"--shard=i/{n}")
    if len(parts) > len(names):
        twice = "; ".join(f"{name} is {' and '.join(folders_of[name])}" for name in names
                          if len(folders_of[name]) > 1)
        raise DataError(f"--input={patterns}: a shard twice: {twice}. Leave one of them out")
    return sorted(parts, key=lambda part: names.index(part[1]["settings"]["shard"]))


def load_part(folder):
    """shard.json of a folder; DataError if it has none or its files are not as long as it says."""
    if os.path.exists(os.path.join(folder, "meta.json")):
        raise DataError(f"{folder} is a whole data set, not a shard: made without --shard=i/n")
    meta = bins.load_meta(folder, "shard.json")
    for name, (size, _) in meta["logs"].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            raise DataError(f"{path} is missing or not of {size:,} bytes, as shard.json says: copy "
                            "the shard again")
    for split in SPLITS:
        check_files(folder, meta, split)
    return meta


def check_same(part, other):
    """Raises DataError for two shards whose settings or tokenizers differ."""
    settings, expected = ({**meta["settings"], "fingerprint": meta["fingerprint"]}
                          for _, meta in (part, other))
    for name in sorted({*settings, *expected} - {"shard"}):
        if settings.get(name) != expected.get(name):
            raise DataError(f"{part[0]} is of another data set than {other[0]}: {name} is "
                            f"{settings.get(name)!r} there and {expected.get(name)!r} here. Give "
                            "the shards of one prepare.py command")


def check_hashes(parts):
    """Raises DataError for the first file that is not what its shard.json says."""
    for folder, meta in parts:
        hashes = {file["name"]: file["sha256"]
                  for split in SPLITS for file in meta["splits"][split]["files"]}
        hashes |= {name: sha256 for name, (_, sha256) in meta["logs"].items()}
        for name, sha256 in hashes.items():
            path = os.path.join(folder, name)
            if file_hash(path) != sha256:
                raise DataError(f"{path} has changed since it was written: copy the shard again, "
                                f"or make it again: {meta['command']}")


# --------------------------------------------------------------------------------------------------
# their documents


def read_part(folder, meta, skip, dtype, n_bands):
    """Yields (number of the first row, rows, ids of the kept ones, their bands) of a shard.

    It starts after `skip` rows. Of these only the rows are read, to find where the ids of the
    others begin.
    """
    files = {split: check_files(folder, meta, split) for split in SPLITS}
    n_rows = meta["logs"]["rows.bin"][0] // ROW.itemsize
    start, n_kept, n_tokens = 0, 0, dict.fromkeys(SPLITS, 0)  # read so far
    while start < n_rows:
        # Of the skipped rows, no block goes beyond `skip`: what comes after it was not merged yet.
        wanted = MERGE_ROWS if start >= skip else min(MERGE_ROWS, skip - start)
        rows = np.fromfile(os.path.join(folder, "rows.bin"), ROW, wanted,
                           offset=start * ROW.itemsize)
        ends = np.cumsum(rows["tokens"], dtype=np.int64)
        rows = rows[: int(np.searchsorted(ends, MERGE_TOKENS)) + 1]
        kept = rows["kind"] == KEPT
        n_here, lengths, is_val = int(kept.sum()), rows["tokens"][kept], rows["is_val"][kept]
        # Train and val are apart in the bins: bring their ids back into the order of the rows.
        ids = np.empty(lengths.sum(), dtype)
        for split, chosen in zip(SPLITS, (~is_val, is_val)):
            n = int(lengths[chosen].sum())
            if start >= skip:
                found = read_ids(files[split], n_tokens[split], n, dtype)
                ids[np.repeat(chosen, lengths)] = found
            n_tokens[split] += n
        if start >= skip:
            bands = np.fromfile(os.path.join(folder, "bands.bin"), "<u8", n_here * n_bands,
                                offset=8 * n_bands * n_kept)
            yield start, rows, ids, bands.reshape(n_here, n_bands)
        n_kept += n_here
        start += len(rows)


def part_chunks(parts, position, seen, dtype, n_bands):
    """Yields (Chunk, ids of its kept rows, their bands) of all shards, from `position` on.

    A position is [number of the shard, rows read of it]. Texts in `seen`, those of earlier shards,
    are dropped.
    """
    first, done = position or (0, 0)
    for number in range(first, len(parts)):
        folder, meta = parts[number]
        with open(os.path.join(folder, "dropped.jsonl"), encoding="utf-8") as file:
            samples = {sample.pop("document"): sample for sample in map(json.loads, file)}
        skip = done if number == first else 0
        for start, rows, ids, bands in read_part(folder, meta, skip, dtype, n_bands):
            kept = rows["kind"] == KEPT
            # One machine looks for copies before it applies the filters. So a text that a filter
            # dropped here is a duplicate if an earlier shard has it.
            has_text = np.flatnonzero(kept | (rows["kind"] > DUPLICATE))
            again = np.zeros(len(rows), bool)
            again[has_text] = ~seen.add(rows["digest"][has_text])
            ids, bands = drop(rows, again[kept], DUPLICATE, ids, bands)
            rows["kind"][again] = DUPLICATE
            dropped = np.flatnonzero((rows["kind"] != KEPT) & ~again).tolist()
            shown = [(row, samples[start + row]) for row in dropped if start + row in samples]
            yield Chunk(rows, [], [number, start + len(rows)], shown, []), ids, bands


def merge_parts(patterns, out_dir):
    """The shards -> one data set in out_dir; returns the summary. Raises DataError."""
    start_s = time.perf_counter()
    parts = read_parts(patterns)
    meta = parts[0][1]
    settings = {name: value for name, value in meta["settings"].items() if name != "shard"}
    with writer.locked(out_dir) as out_dir:
        with writing(out_dir):
            state = writer.load_state(out_dir, settings, meta.get("dropped", ()))
        if state is None:
            print(f"{out_dir} is already complete, made with the same settings", flush=True)
            return summary(out_dir, time.perf_counter() - start_s)
        if state["position"] is None:  # hashing takes long; a merge that goes on has done it
            check_disk(out_dir, sum(
                os.path.getsize(path) for folder, meta in parts for split in SPLITS
                for path, _ in check_files(folder, meta, split)))
            check_hashes(parts)
        folder = os.path.join(parts[0][0], meta["tokenizer"])
        tok = call_tokenizer(Tokenizer.load, folder)
        if tok.fingerprint != meta["fingerprint"]:
            raise DataError(f"{folder} is another tokenizer than its shard.json says: copy the "
                            "shard again")
        tok = save_tokenizer(tok, folder, out_dir, state)
        dtype, before = dtype_of(tok), sum(state["bytes"].values())
        with writing(out_dir):
            writer.open_bins(out_dir, state, dtype)
            seen = seen_texts(out_dir, state)
        n_bands = settings.get("minhash", [0])[0]
        chunks = part_chunks(parts, state["position"], seen, dtype, n_bands)
        total = sum(meta["splits"][split]["bytes"] for _, meta in parts for split in SPLITS)
        write_chunks(out_dir, state, chunks, tok, dtype, progress(total, before, "bytes"), "bytes",
                     {name: meta[name] for name in ("source", "licence")})
        n_bytes = sum(state["bytes"].values()) - before
        return summary(out_dir, time.perf_counter() - start_s, 0.0, n_bytes)
