"""Rows that start at a document: where each begins, found from the end-of-document ids of a split.

A document is a row of up to T tokens; a longer one goes on in further rows, so every token of text is in exactly one
row. An end of document, or padding, that would stand alone in a row is left out: nothing can be learned from it.

Kept in memory are the distances from row to row, 1 or 2 bytes each, and where every 64th row begins: 6 MB for 2 GB of
tokens in documents of 500. They are found in half a second a GB, and as fast as the disk reads: those of a large split
are then left beside its bins, under a name that says of which tokens. A folder that cannot be written to is read again.
"""

import contextlib
import glob
import hashlib
import json
import os

import numpy as np

from data.bins import DataError
from lib.files import FolderLock, remove_file, replace_file

SCAN_TOKENS = 2**22  # read at a time
KEPT_TOKENS = 2**30  # a split of so many tokens or more gets a file of its distances
GROUP = 64  # rows that share one known beginning


class DocumentRows:
    """Rows of a TokenData: n_rows of up to T tokens, n_tokens in all of them together. DataError without documents."""

    def __init__(self, data, T):
        self.T, self.distances = T, kept_distances(data, T)
        self.n_rows, every = len(self.distances) - 1, range(0, len(self.distances), GROUP)
        self.groups = np.cumsum([0, *np.add.reduceat(self.distances, every, dtype=np.int64)])
        beyond = self.distances[1:][self.distances[1:] > T].astype(np.int64) - T  # ends of document that are left out
        self.n_tokens = data.n_tokens - int(self.distances[0]) - int(beyond.sum())

    def at(self, rows):
        """Numbers of rows, int64 (B,) -> (number of the first token, tokens of the row), both int64 (B,)."""
        group, place = rows[:, None] // GROUP, rows[:, None] % GROUP
        near = np.minimum(group * GROUP + np.arange(GROUP + 1), self.n_rows)
        steps = self.distances[near].astype(np.int64)
        starts = self.groups[group] + np.take_along_axis(np.cumsum(steps, axis=1), place, axis=1)
        return starts[:, 0], np.minimum(np.take_along_axis(steps, place + 1, axis=1)[:, 0], self.T)


def kept_distances(data, T):
    """`distances` from the file where they are kept, else found and, if they took long, written there."""
    if data.n_tokens < KEPT_TOKENS:
        return distances(data, T)
    about = json.dumps([data.meta["splits"][data.split], data.n_tokens, data.eot_id])
    name = os.path.join(data.data_dir, f"{data.split}.bin.rows_{T}_")  # goes where the bins go: rm *.bin*
    path = name + hashlib.sha256(about.encode()).hexdigest()[:16] + ".npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.ndim == 1 and found.dtype.kind == "u" and found.sum(dtype=np.int64) == data.n_tokens:
            return found
    found = distances(data, T)
    with contextlib.suppress(OSError), FolderLock(data.data_dir):  # read-only, full, or another process is writing it
        for old in glob.glob(glob.escape(name) + "*.npy"):
            remove_file(old)
        replace_file(path, lambda file: np.save(file, found, allow_pickle=False))
    return found


def distances(data, T):
    """Unsigned (n_rows + 1,): tokens before row 0, from the beginning of each row to that of the next, to the end."""
    parts, end, last, n_ends = [], -1, 0, 0
    for at in range(0, data.n_tokens, SCAN_TOKENS):
        ids = np.empty(min(SCAN_TOKENS, data.n_tokens - at), data.dtype)
        data.read(at, ids)
        is_end = ids == data.eot_id
        if data.stored_pad != data.eot_id:
            is_end |= ids == data.stored_pad  # rows that others padded: a row of nothing else must not come of it
        ends = np.concatenate([[end], np.flatnonzero(is_end) + at])
        n_ends += len(ends) - 1
        if at + len(ids) == data.n_tokens:
            ends = np.append(ends, data.n_tokens)
        begins, end = ends[:-1] + 1, int(ends[-1])
        n_rows = -(-(ends[1:] - begins) // T)  # 0 where one end follows another
        before = np.cumsum(n_rows) - n_rows
        starts = np.repeat(begins - before * T, n_rows) + np.arange(n_rows.sum()) * T
        parts.append(small(np.diff(starts, prepend=last)))
        last = starts[-1] if len(starts) else last
    if not n_ends or not any(map(len, parts)):
        raise DataError(f"rows=document: the {data.split} split of {data.data_dir} holds {n_ends:,} ends of document "
                        f"(id {data.eot_id}) in {data.n_tokens:,} tokens, so nothing says where one begins; use "
                        "--rows=block")
    return np.concatenate([*parts, small(np.array([data.n_tokens - last]))])


def small(numbers):
    """The same numbers in the narrowest unsigned type."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
