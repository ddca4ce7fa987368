"""Shards of a data set -> the data set that one machine would have made, byte for byte.

`prepare.py --shard=i/n` writes shard i: its bins, and a row and the MinHash bands of each of its documents (bins.py).
It drops what the text alone condemns and its own exact duplicates. `merge` reads the rows of all shards in order, drops
texts and near-duplicates of earlier shards, and commits the rest as documents.py does, so a killed merge goes on.
"""

import glob
import json
import os
import time

import numpy as np

from data import bins
from data.bins import KEPT, ROW, SPLITS, DataError, check_files, load_meta, load_state, locked, open_bins
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
from lib.files import file_hash

MERGE_ROWS, MERGE_TOKENS = 50_000, 4_000_000  # of one commit, whichever comes first


def read_parts(patterns):
    """Comma-separated globs of shard folders -> [(folder, its shard.json)] in order: all shards of one data set."""
    folders = {folder for pattern in filter(None, patterns.split(",")) for folder in glob.glob(pattern)}
    parts = [(folder, load_part(folder)) for folder in sorted(folders) if os.path.isdir(folder)]
    if not parts:
        raise DataError(f"--input={patterns}: no folder there; expected those that prepare.py --shard=i/n wrote")
    wanted = parts[0][1]
    for folder, meta in parts:
        for name in sorted({"fingerprint", *wanted["settings"], *meta["settings"]} - {"shard"}):
            found, expected = (about["settings"].get(name, about.get(name)) for about in (meta, wanted))
            if found != expected:
                raise DataError(f"{folder} is of another data set than {parts[0][0]}: {name} is {found!r} there and "
                                f"{expected!r} here. Give the shards of one prepare.py command")
    n = wanted["settings"]["shard"].split("/")[1]
    by_number = {}
    for folder, meta in parts:
        by_number.setdefault(meta["settings"]["shard"], []).append(folder)
    names = [f"{i}/{n}" for i in range(int(n))]
    if missing := [name for name in names if name not in by_number]:
        raise DataError(f"--input={patterns}: missing shards: {', '.join(missing)}; make them with --shard=i/{n}")
    if len(parts) > len(names):
        there = "; ".join(f"{name} is {' and '.join(by_number[name])}" for name in names if len(by_number[name]) > 1)
        raise DataError(f"--input={patterns}: a shard twice: {there}. Leave one of them out")
    return sorted(parts, key=lambda part: int(part[1]["settings"]["shard"].split("/")[0]))


def load_part(folder):
    """shard.json of a folder; DataError if it is none or its files are not as long as it says."""
    if os.path.exists(os.path.join(folder, "meta.json")):
        raise DataError(f"{folder} is a whole data set, not a shard: made without --shard=i/n")
    meta = load_meta(folder, "shard.json")
    for name, (size, _) in meta["logs"].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            raise DataError(f"{path} is missing or not of {size:,} bytes, as shard.json says: copy the shard again")
    for split in SPLITS:
        check_files(folder, meta, split)
    return meta


def check_hashes(parts):
    """DataError for the first file that is not what its shard.json says."""
    for folder, meta in parts:
        files = {file["name"]: file["sha256"] for split in SPLITS for file in meta["splits"][split]["files"]}
        for name, sha256 in (files | {name: sha256 for name, (_, sha256) in meta["logs"].items()}).items():
            if file_hash(os.path.join(folder, name)) != sha256:
                raise DataError(f"{os.path.join(folder, name)} has changed since it was written: copy the shard again, "
                                f"or make it again: {meta['command']}")


def part_chunks(parts, position, seen, dtype, n_bands):
    """Yields (Chunk, ids of its kept rows, their bands) from `position` on; texts of earlier shards are dropped."""
    first, done = position or (0, 0)
    for number in range(first, len(parts)):
        folder, meta = parts[number]
        with open(os.path.join(folder, "dropped.jsonl"), encoding="utf-8") as file:
            samples = {sample.pop("document"): sample for sample in map(json.loads, file)}
        files = {split: check_files(folder, meta, split) for split in SPLITS}
        n_rows, start, n_kept, at = meta["logs"]["rows.bin"][0] // ROW.itemsize, 0, 0, dict.fromkeys(SPLITS, 0)
        while start < n_rows:
            wanted = MERGE_ROWS if number > first or start >= done else min(MERGE_ROWS, done - start)
            rows = np.fromfile(os.path.join(folder, "rows.bin"), ROW, wanted, offset=start * ROW.itemsize)
            rows = rows[: int(np.searchsorted(np.cumsum(rows["tokens"], dtype=np.int64), MERGE_TOKENS)) + 1]
            kept = rows["kind"] == KEPT
            lengths, is_val = rows["tokens"][kept], rows["is_val"][kept]
            if number > first or start >= done:
                ids = np.empty(lengths.sum(), dtype)
                for split, chosen in zip(SPLITS, (~is_val, is_val)):
                    ids[np.repeat(chosen, lengths)] = read_ids(files[split], at[split], lengths[chosen].sum(), dtype)
                bands = np.fromfile(os.path.join(folder, "bands.bin"), "<u8", int(kept.sum()) * n_bands,
                                    offset=8 * n_bands * n_kept).reshape(int(kept.sum()), n_bands)
                with_text = np.flatnonzero(kept | (rows["kind"] > bins.DUPLICATE))
                again = np.zeros(len(rows), bool)
                again[with_text] = ~seen.add(rows["digest"][with_text])
                ids, bands = drop(rows, again[kept], bins.DUPLICATE, ids, bands)
                rows["kind"][again] = bins.DUPLICATE
                shown = [(row, samples[start + row]) for row in np.flatnonzero(rows["kind"] != KEPT).tolist()
                         if start + row in samples and not again[row]]
                yield Chunk(rows, [], [number, start + len(rows)], shown, []), ids, bands
            for split, chosen in zip(SPLITS, (~is_val, is_val)):
                at[split] += int(lengths[chosen].sum())
            n_kept += int(kept.sum())
            start += len(rows)


def merge_parts(patterns, out_dir):
    """The shards -> one data set in out_dir; returns the summary. Raises DataError."""
    start_s = time.perf_counter()
    parts = read_parts(patterns)
    meta = parts[0][1]
    settings = {name: value for name, value in meta["settings"].items() if name != "shard"}
    with locked(out_dir):
        with writing(out_dir):
            state = load_state(out_dir, settings, meta.get("dropped", ()))
        if state is None:
            print(f"{out_dir} is already complete, made with the same settings", flush=True)
            return summary(out_dir, time.perf_counter() - start_s)
        if state["position"] is None:
            check_disk(out_dir, sum(os.path.getsize(path) for folder, meta in parts for split in SPLITS
                                    for path, _ in check_files(folder, meta, split)))
            check_hashes(parts)
        folder = os.path.join(parts[0][0], meta["tokenizer"])
        tok = call_tokenizer(Tokenizer.load, folder)
        if tok.fingerprint != meta["fingerprint"]:
            raise DataError(f"{folder} is another tokenizer than its shard.json says: copy the shard again")
        tok = save_tokenizer(tok, folder, out_dir, state)
        dtype, before = dtype_of(tok), sum(state["bytes"].values())
        with writing(out_dir):
            open_bins(out_dir, state, dtype)
            seen = seen_texts(out_dir, state)
        chunks = part_chunks(parts, state["position"], seen, dtype, settings.get("minhash", [0])[0])
        total = sum(meta["splits"][split]["bytes"] for _, meta in parts for split in SPLITS)
        write_chunks(out_dir, state, chunks, tok, dtype, progress(total, before, "bytes"), "bytes",
                     {name: meta[name] for name in ("source", "licence")})
        return summary(out_dir, time.perf_counter() - start_s, 0.0, sum(state["bytes"].values()) - before)
