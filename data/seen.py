"""A set of 64-bit hashes that takes 100 MB of memory, however many there are.

Sorted arrays, each over twice as long as the next (a log-structured merge tree: O'Neil et al. 1996). What does not fit
IN_MEMORY goes to files, of which every PAGE-th hash stays in memory (1/64 byte a hash): a look-up reads one page of
each file, from the page cache while the machine can hold them there. The files are scratch: bins.py keeps the hashes in
the order they came, and a resume sorts them again. 100 M hashes: two different texts share one with p = 3e-4.
"""

import itertools
import mmap
import os

import numpy as np

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
