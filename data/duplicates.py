"""Dropping what was seen before in the rows of a chunk: exact copies of a text, and near-duplicates by MinHash bands.

A document is a near-duplicate if one of its bands occurred in an earlier document, kept or dropped as a near-duplicate
itself. So the outcome depends on the order of the input alone, not on processes, chunks, shards or kills.
"""

import os

import numpy as np

from data.bins import DUPLICATE, KEPT, KINDS, N_SAMPLES, NEAR, ROW, SPLITS, shard_sizes, temporary
from data.seen import Seen
from data.workers import EXCERPT_CHARS

LOG_ROWS = 2**16  # rows of a log in memory at once


def read_log(out_dir, state, name, dtype, n):
    """Yields what was committed to one of LOGS, `n` entries of `dtype` at a time."""
    with open(os.path.join(out_dir, f"{name}.tmp"), "rb") as file:
        for start in range(0, state["logs"][name] // dtype.itemsize, n):
            yield np.fromfile(file, dtype, min(n, state["logs"][name] // dtype.itemsize - start))


def read_ids(files, start, n, dtype):
    """[(path, tokens)] that follow one another -> `n` tokens from number `start` on."""
    parts = [np.zeros(0, dtype)]
    for path, size in files:
        if n and start < size:
            parts.append(np.fromfile(path, dtype, min(n, size - start), offset=start * dtype.itemsize))
            n -= len(parts[-1])
        start = max(0, start - size)
    return np.concatenate(parts)


def seen_texts(out_dir, state):
    """The texts of the rows committed so far -> Seen."""
    seen = Seen(os.path.join(out_dir, "seen_texts"))
    for rows in read_log(out_dir, state, "rows.bin", ROW, LOG_ROWS):
        seen.add(texts_of(rows))
    return seen


def texts_of(rows):
    """ROW (n,) -> digests of those that have a text."""
    return rows["digest"][(rows["kind"] == KEPT) | (rows["kind"] >= DUPLICATE)]


def drop(rows, chosen, kind, ids, bands):
    """Makes the kept rows `chosen` (bool, one for each kept row) of this kind -> ids, bands of the other kept rows."""
    kept = np.flatnonzero(rows["kind"] == KEPT)
    ids = ids[np.repeat(~chosen, rows["tokens"][kept])]
    rows["kind"][kept[chosen]] = kind
    for name in ("tokens", "bytes", "replaced"):
        rows[name][kept[chosen]] = 0
    return ids, bands[~chosen]


class NearDuplicates:
    """Drops near-duplicates from chunks that come in the order of the input."""

    def __init__(self, out_dir, state, tok, dtype, n_bands):
        self.out_dir, self.state, self.tok, self.dtype = out_dir, state, tok, dtype
        self.seen, self.n_bands = Seen(os.path.join(out_dir, "seen_bands")), n_bands
        self.kind = len(KINDS) + list(state["rules"]).index(NEAR)
        for bands in self.earlier_bands():
            self.seen.add(bands.reshape(-1))

    def earlier_bands(self):
        """Yields the committed bands in order, uint64 (n, n_bands)."""
        return read_log(self.out_dir, self.state, "bands.bin", np.dtype(("<u8", (self.n_bands,))), LOG_ROWS)

    def __call__(self, chunk, ids, bands):
        """Chunk, ids and bands of its kept rows -> what commit() takes; the bands are logged for dropped rows too."""
        near = ~self.seen.add(bands.reshape(-1)).reshape(bands.shape).all(1)
        kept, samples = np.flatnonzero(chunk.rows["kind"] == KEPT), []
        parts = np.split(ids, np.cumsum(chunk.rows["tokens"][kept], dtype=np.int64)[:-1])
        for number in np.flatnonzero(near)[: N_SAMPLES - self.state["samples"][NEAR]]:
            document, match = self.find(bands, number, kept, parts, near)
            samples.append((int(kept[number]), {"rule": NEAR, "reason": f"like document {document}",
                                                "text": self.excerpt(parts[number]), "match": match}))
        left, _ = drop(chunk.rows, near, self.kind, ids, bands)
        samples = sorted(chunk.samples + samples, key=lambda sample: sample[0])
        return chunk._replace(samples=samples), left, bands

    def excerpt(self, ids):
        """Ids of a document -> its first characters; one has 4 bytes at most, and so 4 tokens."""
        return self.tok.decode(ids[:-1][: 4 * EXCERPT_CHARS])[:EXCERPT_CHARS]

    def find(self, bands, number, kept, parts, near):
        """-> (number in the input of the first document that shares a band with this one, its text if it was kept)."""
        before = 0
        for block in self.earlier_bands():
            if (same := (block == bands[number]).any(1)).any():
                return self.committed(before + int(np.argmax(same)))
            before += len(block)
        first = int(np.argmax((bands[:number] == bands[number]).any(1)))
        return self.state["n_rows"] + int(kept[first]), "" if near[first] else self.excerpt(parts[first])

    def committed(self, number):
        """As find, for the committed document that has the bands of this number."""
        before, tokens = 0, dict.fromkeys(SPLITS, 0)
        for rows in read_log(self.out_dir, self.state, "rows.bin", ROW, LOG_ROWS):
            has_bands = np.flatnonzero((rows["kind"] == KEPT) | (rows["kind"] == self.kind))
            if number < len(has_bands):
                at = has_bands[number]
                split = SPLITS[int(rows["is_val"][at])]
                start = tokens[split] + int(rows["tokens"][:at][rows["is_val"][:at] == rows["is_val"][at]].sum())
                sizes = shard_sizes(self.state["tokens"][split], self.state["settings"]["shard_tokens"])
                files = [(temporary(self.out_dir, split, shard), n) for shard, n in enumerate(sizes)]
                text = self.excerpt(read_ids(files, start, int(rows["tokens"][at]), self.dtype))
                return before + int(at), text
            number -= len(has_bands)
            before += len(rows)
            for split, is_val in zip(SPLITS, (False, True)):
                tokens[split] += int(rows["tokens"][rows["is_val"] == is_val].sum())
        raise AssertionError("more bands than documents with bands")
