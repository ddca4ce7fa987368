"""A set of 64-bit hashes that takes 100 MB of memory, however many there are.

Sorted arrays, each over twice as long as the next (a log-structured merge tree: O'Neil et al. 1996). What does not fit
IN_MEMORY goes to files, of which every PAGE-th hash stays in memory (1/64 byte a hash): a look-up reads one page of
each file, from the page cache while the machine can hold them there. The files are scratch: bins.py keeps the hashes in
the order they came, and a resume sorts them again. 100 M hashes: two different texts share one with p = 3e-4.

Dropping what was seen before in the rows of a chunk: exact copies of a text, and near-duplicates by MinHash bands.

A document is a near-duplicate if one of its bands occurred in an earlier document, kept or dropped as a near-duplicate
itself. So the outcome depends on the order of the input alone, not on processes, chunks, shards or kills.
"""

import itertools
import mmap
import os

import numpy as np

from data.bins import DUPLICATE, KEPT, KINDS, N_SAMPLES, NEAR, ROW, SPLITS, shard_sizes, temporary
from data.workers import EXCERPT_CHARS

IN_MEMORY = 2**22  # hashes in arrays; up to three times that while they are merged
PAGE = 512  # hashes in 4 KiB
BLOCK = 2**18  # hashes that merging holds at once
AT_ONCE = 2048  # hashes looked up before the pages read for them are let go: the kernel maps up to 64 KiB for each


class Level:
    """Sorted distinct hashes in a file."""

    def __init__(self, path, blocks):
        """Writes the sorted arrays `blocks`, one after the other."""
        fences, n = [], 0
        with open(path, "w+b") as file:
            for block in blocks:
                fences.append(block[-n % PAGE :: PAGE].copy())
                block.tofile(file)
                n += len(block)
            file.flush()
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        os.remove(path)  # the kernel frees the room when the map is closed, however the process ends
        self.map.madvise(mmap.MADV_RANDOM)
        self.hashes, self.fences = np.frombuffer(self.map, "<u8"), np.concatenate(fences)

    def blocks(self):
        """Yields the hashes in order."""
        for start in range(0, len(self.hashes), BLOCK):
            yield self.hashes[start : start + BLOCK].copy()
            self.map.madvise(mmap.MADV_DONTNEED)

    def has(self, keys):
        """uint64 (n,) -> bool (n,)."""
        found, last = np.zeros(len(keys), bool), len(self.hashes) - 1
        for start in range(0, len(keys), AT_ONCE):
            part = keys[start : start + AT_ONCE]
            at, step = np.maximum(np.searchsorted(self.fences, part, "right") - 1, 0) * PAGE, PAGE // 2
            while step:  # binary search in all pages at the same time
                middle = np.minimum(at + step, last)
                at, step = np.where(self.hashes[middle] <= part, middle, at), step // 2
            found[start : start + AT_ONCE] = self.hashes[at] == part
            self.map.madvise(mmap.MADV_DONTNEED)
        return found


def merged(one, other):
    """Two iterators of sorted arrays -> sorted arrays that hold all of both."""
    left, right = next(one, None), next(other, None)
    while left is not None and right is not None:
        bound = min(left[-1], right[-1])
        i, j = np.searchsorted(left, bound, "right"), np.searchsorted(right, bound, "right")
        both = np.concatenate([left[:i], right[:j]])
        both.sort(kind="stable")
        yield both
        left = left[i:] if i < len(left) else next(one, None)
        right = right[j:] if j < len(right) else next(other, None)
    yield from (block for block in (left, right) if block is not None)
    yield from itertools.chain(one, other)


class Seen:
    """Set of hashes, empty at first; `path` names its files."""

    def __init__(self, path):
        self.path, self.arrays, self.levels, self.n_files = path, [], [], 0

    def add(self, keys):
        """uint64 (n,) -> bool (n,), True where a hash occurs for the first time."""
        unique, first = np.unique(keys, return_index=True)  # sorted, which the searches below like
        new = np.ones(len(unique), bool)
        for array in self.arrays:
            new &= array[np.minimum(np.searchsorted(array, unique), len(array) - 1)] != unique
        for level in self.levels:
            new[new] = ~level.has(unique[new])
        fresh = np.zeros(len(keys), bool)
        fresh[first[new]] = True
        if new.any():
            self.arrays.append(unique[new])
        while len(self.arrays) > 1 and len(self.arrays[-2]) < 2 * len(self.arrays[-1]):
            self.arrays.append(np.concatenate([self.arrays.pop(), self.arrays.pop()]))
            self.arrays[-1].sort(kind="stable")  # two runs, which are merged
        if sum(map(len, self.arrays)) >= IN_MEMORY:
            self.spill()
        return fresh

    def spill(self):
        """Moves the arrays to a file, and merges files as long as one is not over twice as long as the next."""
        hashes, self.arrays = np.concatenate(self.arrays), []
        hashes.sort(kind="stable")
        self.write(hashes[start : start + BLOCK] for start in range(0, len(hashes), BLOCK))
        while len(self.levels) > 1 and len(self.levels[-2].hashes) < 2 * len(self.levels[-1].hashes):
            self.write(merged(self.levels.pop().blocks(), self.levels.pop().blocks()))

    def write(self, blocks):
        self.n_files += 1
        self.levels.append(Level(f"{self.path}_{self.n_files}.tmp", blocks))


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
