"""Duplicates: a set of hashes that fits in memory however large, exact and near-duplicates.

    Seen            a set of 64-bit hashes
    seen_texts      the texts of a data set that was begun, as a Seen: a copy of one is dropped
    NearDuplicates  drops a document if one of its MinHash bands (data/filters.py) occurred in an
                    earlier one, kept or dropped as a near-duplicate itself

The outcome depends on the order of the input alone, not on processes, chunks, shards or kills:
after a kill the sets are built again from what was committed (writer.LOGS).
"""

import itertools
import mmap
import os

import numpy as np

from data import writer
from data.bins import SPLITS
from data.workers import EXCERPT_CHARS
from data.writer import DUPLICATE, KEPT, KINDS, NEAR, ROW

# --------------------------------------------------------------------------------------------------
# a set of hashes that takes 100 MB of memory, however many there are
#
# A log-structured merge tree (O'Neil et al. 1996): sorted arrays, each more than twice as long as
# the next. When the arrays in memory hold IN_MEMORY hashes, they go to a file. Of a file every
# PAGE-th hash stays in memory (1/64 byte a hash), so that a look-up reads one page of each file,
# from the page cache as long as the machine has room for it. The files are scratch: data/writer.py
# keeps the hashes in the order in which they came, and a resume sorts them again. Among 100 M
# hashes, two different texts share one with p = 3e-4.

IN_MEMORY = 2**22  # hashes in arrays; up to three times as many while they are merged
PAGE = 512  # hashes in 4 KiB
BLOCK = 2**18  # hashes that merging holds at a time
# Hashes looked up before the pages read for them are released. The kernel maps up to 64 KiB for
# each, which would count as memory of this process.
AT_ONCE = 2048


class Level:
    """Sorted distinct hashes in a file."""

    def __init__(self, path, blocks):
        """Writes the sorted arrays `blocks` one after the other."""
        fences, n = [], 0  # fences: the first hash of each page
        with open(path, "w+b") as file:
            for block in blocks:
                fences.append(block[-n % PAGE :: PAGE].copy())
                block.tofile(file)
                n += len(block)
            file.flush()
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        os.remove(path)  # the kernel frees the room when the process ends, however it ends
        self.map.madvise(mmap.MADV_RANDOM)
        self.hashes, self.fences = np.frombuffer(self.map, "<u8"), np.concatenate(fences)

    def blocks(self):
        """Yields the hashes in order, as arrays."""
        for start in range(0, len(self.hashes), BLOCK):
            yield self.hashes[start : start + BLOCK].copy()
            self.map.madvise(mmap.MADV_DONTNEED)

    def has(self, keys):
        """uint64 (n,) -> bool (n,)."""
        found, last = np.zeros(len(keys), bool), len(self.hashes) - 1
        for start in range(0, len(keys), AT_ONCE):
            part = keys[start : start + AT_ONCE]
            page = np.searchsorted(self.fences, part, "right") - 1
            at = np.maximum(page, 0) * PAGE
            step = PAGE // 2
            while step:  # a binary search for all keys at the same time
                middle = np.minimum(at + step, last)
                at = np.where(self.hashes[middle] <= part, middle, at)
                step //= 2
            found[start : start + AT_ONCE] = self.hashes[at] == part
            self.map.madvise(mmap.MADV_DONTNEED)
        return found


def merged(one, other):
    """Merges two iterators of sorted arrays, each sorted as a whole -> yields sorted arrays."""
    left, right = next(one, None), next(other, None)
    while left is not None and right is not None:
        bound = min(left[-1], right[-1])  # all up to here is in these two arrays
        i = np.searchsorted(left, bound, "right")
        j = np.searchsorted(right, bound, "right")
        both = np.concatenate([left[:i], right[:j]])
        both.sort(kind="stable")
        yield both
        left = left[i:] if i < len(left) else next(one, None)
        right = right[j:] if j < len(right) else next(other, None)
    yield from (block for block in (left, right) if block is not None)
    yield from itertools.chain(one, other)


class Seen:
    """A set of hashes, empty at first. Its files are named `path` and a number."""

    def __init__(self, path):
        self.path, self.n_files = path, 0
        self.arrays, self.levels = [], []  # sorted hashes in memory and in files, the longest first

    def add(self, keys):
        """uint64 (n,) -> bool (n,), True where a hash occurs for the first time."""
        unique, first = np.unique(keys, return_index=True)  # sorted keys are found faster
        new = np.ones(len(unique), bool)
        for array in self.arrays:
            at = np.minimum(np.searchsorted(array, unique), len(array) - 1)
            new &= array[at] != unique
        for level in self.levels:
            new[new] = ~level.has(unique[new])
        fresh = np.zeros(len(keys), bool)
        fresh[first[new]] = True
        if new.any():
            self.arrays.append(unique[new])
        while len(self.arrays) > 1 and len(self.arrays[-2]) < 2 * len(self.arrays[-1]):
            self.arrays.append(np.concatenate([self.arrays.pop(), self.arrays.pop()]))
            self.arrays[-1].sort(kind="stable")  # this sort merges two sorted runs in linear time
        if sum(map(len, self.arrays)) >= IN_MEMORY:
            self.spill()
        return fresh

    def spill(self):
        """Moves the arrays to a file; merges files until each is over twice as long as the next."""
        hashes, self.arrays = np.concatenate(self.arrays), []
        hashes.sort(kind="stable")
        self.write(hashes[start : start + BLOCK] for start in range(0, len(hashes), BLOCK))
        while (len(self.levels) > 1
               and len(self.levels[-2].hashes) < 2 * len(self.levels[-1].hashes)):
            self.write(merged(self.levels.pop().blocks(), self.levels.pop().blocks()))

    def write(self, blocks):
        self.n_files += 1
        self.levels.append(Level(f"{self.path}_{self.n_files}.tmp", blocks))


# --------------------------------------------------------------------------------------------------
# what was committed

LOG_ROWS = 2**16  # rows of a log that are in memory at a time


def read_log(out_dir, state, name, dtype, n):
    """Yields the committed entries of a log (writer.LOGS), `n` of them at a time."""
    n_entries = state["logs"][name] // dtype.itemsize
    with open(os.path.join(out_dir, f"{name}.tmp"), "rb") as file:
        for start in range(0, n_entries, n):
            yield np.fromfile(file, dtype, min(n, n_entries - start))


def read_ids(files, start, n, dtype):
    """[(path, tokens)] of consecutive bins -> `n` tokens from number `start` on."""
    parts = [np.zeros(0, dtype)]
    for path, size in files:
        if n and start < size:
            n_here = min(n, size - start)
            parts.append(np.fromfile(path, dtype, n_here, offset=start * dtype.itemsize))
            n -= len(parts[-1])
        start = max(0, start - size)
    return np.concatenate(parts)


# --------------------------------------------------------------------------------------------------
# exact duplicates


def seen_texts(out_dir, state):
    """The texts of the rows committed so far -> Seen."""
    seen = Seen(os.path.join(out_dir, "seen_texts"))
    for rows in read_log(out_dir, state, "rows.bin", ROW, LOG_ROWS):
        has_text = (rows["kind"] == KEPT) | (rows["kind"] >= DUPLICATE)
        seen.add(rows["digest"][has_text])
    return seen


def drop(rows, chosen, kind, ids, bands):
    """Makes some kept rows of a chunk dropped ones -> ids and bands of the rows still kept.

    chosen: bool, one for each kept row. kind: what they become. ids, bands: of the kept rows.
    """
    kept = np.flatnonzero(rows["kind"] == KEPT)
    ids = ids[np.repeat(~chosen, rows["tokens"][kept])]
    rows["kind"][kept[chosen]] = kind
    for name in ("tokens", "bytes", "replaced"):
        rows[name][kept[chosen]] = 0
    return ids, bands[~chosen]


# --------------------------------------------------------------------------------------------------
# near-duplicates


class NearDuplicates:
    """Drops near-duplicates from chunks, which must come in the order of the input."""

    def __init__(self, out_dir, state, tok, dtype, n_bands):
        self.out_dir, self.state, self.tok, self.dtype = out_dir, state, tok, dtype
        self.seen, self.n_bands = Seen(os.path.join(out_dir, "seen_bands")), n_bands
        self.kind = len(KINDS) + list(state["rules"]).index(NEAR)
        for bands in self.earlier_bands():
            self.seen.add(bands.reshape(-1))

    def earlier_bands(self):
        """Yields the committed bands in order, uint64 (n, n_bands)."""
        a_row = np.dtype(("<u8", (self.n_bands,)))
        return read_log(self.out_dir, self.state, "bands.bin", a_row, LOG_ROWS)

    def __call__(self, chunk, ids, bands):
        """Chunk, ids and bands of its kept rows -> (Chunk, ids, bands) for commit().

        The bands of the dropped rows stay: they are logged too, as later documents may share them.
        """
        near = ~self.seen.add(bands.reshape(-1)).reshape(bands.shape).all(1)
        kept = np.flatnonzero(chunk.rows["kind"] == KEPT)
        ends = np.cumsum(chunk.rows["tokens"][kept], dtype=np.int64)
        documents = np.split(ids, ends[:-1])
        samples = []
        n_wanted = writer.N_SAMPLES - self.state["samples"][NEAR]
        for number in np.flatnonzero(near)[:n_wanted]:
            earlier, match = self.find(bands, number, kept, documents, near)
            samples.append((int(kept[number]), {
                "rule": NEAR, "reason": f"like document {earlier}",
                "text": self.excerpt(documents[number]), "match": match}))
        left, _ = drop(chunk.rows, near, self.kind, ids, bands)
        samples = sorted(chunk.samples + samples, key=lambda sample: sample[0])
        return chunk._replace(samples=samples), left, bands

    def excerpt(self, ids):
        """Ids of a document -> its first EXCERPT_CHARS characters."""
        # A character has at most 4 bytes, so at most 4 tokens. The last id is eot_id.
        return self.tok.decode(ids[:-1][: 4 * EXCERPT_CHARS])[:EXCERPT_CHARS]

    def find(self, bands, number, kept, documents, near):
        """The first document that shares a band with the one of this number in the chunk.

        -> (its number in the input, the beginning of its text; "" if it was dropped itself).
        """
        before = 0
        for block in self.earlier_bands():
            same = (block == bands[number]).any(1)
            if same.any():
                return self.committed(before + int(np.argmax(same)))
            before += len(block)
        first = int(np.argmax((bands[:number] == bands[number]).any(1)))
        text = "" if near[first] else self.excerpt(documents[first])
        return self.state["n_rows"] + int(kept[first]), text

    def committed(self, number):
        """As find, for the committed document whose bands are entry `number` of their log."""
        n_before, n_tokens = 0, dict.fromkeys(SPLITS, 0)  # of the rows before this block
        for rows in read_log(self.out_dir, self.state, "rows.bin", ROW, LOG_ROWS):
            has_bands = np.flatnonzero((rows["kind"] == KEPT) | (rows["kind"] == self.kind))
            if number < len(has_bands):
                row = int(has_bands[number])
                is_val = rows["is_val"][row]
                split, earlier = SPLITS[int(is_val)], rows[:row]
                start = n_tokens[split] + int(earlier["tokens"][earlier["is_val"] == is_val].sum())
                sizes = writer.shard_sizes(self.state["tokens"][split],
                                         self.state["settings"]["shard_tokens"])
                files = [(writer.temporary(self.out_dir, split, shard), n)
                         for shard, n in enumerate(sizes)]
                ids = read_ids(files, start, int(rows["tokens"][row]), self.dtype)
                return n_before + row, self.excerpt(ids)
            number -= len(has_bands)
            n_before += len(rows)
            for split, is_val in zip(SPLITS, (False, True)):
                n_tokens[split] += int(rows["tokens"][rows["is_val"] == is_val].sum())
        raise AssertionError("more bands than documents with bands")
