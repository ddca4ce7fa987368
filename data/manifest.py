"""Where the tokens of a split lie: in bins beside meta.json, or in other files of which `prepare.py split` made a list.

Such a list is meta.json with "sources": {"folder": of the files, relative to meta.json, "files": [{"name", "dtype",
"offset" in bytes, "tokens", "size" in bytes, "mtime_ns", "sha256"}]}. The tokens of all files are numbered, one file
after the other; SPLIT_ranges.npy, int64 (n, 2), holds the first and the last + 1 of each run that belongs to a split.
Nothing is copied, so a file that is gone or another one is noticed: its size and time are compared, and its hash where
only the time differs.
"""

import bisect
import functools
import hashlib
import os

import numpy as np

from data.bins import DataError, check_files, inside
from lib.files import file_hash

MOST_OPEN = 64  # files at a time; a split may refer to thousands


@functools.cache
def hash_of(path, _size, _mtime_ns):
    """sha256 (hex) of a file as it is at this size and time."""
    return file_hash(path)


def sha256_of(path):
    """sha256 (hex) of a file, read once by a process as long as it does not change."""
    stat = os.stat(path)
    return hash_of(path, stat.st_size, stat.st_mtime_ns)


def ranges_hash(path, files):
    """sha256 (hex) that changes with the ranges of a split and with the files they are of."""
    return hashlib.sha256("\n".join([sha256_of(path), *(file["sha256"] for file in files)]).encode()).hexdigest()


def check_sources(data_dir, meta, thoroughly=False):
    """Paths of the files that a split refers to; DataError or FileNotFoundError when one is not what it was."""
    folder, paths = os.path.join(data_dir, meta["sources"]["folder"]), []
    for file in meta["sources"]["files"]:
        path = inside(folder, file["name"])
        cure = f"{data_dir} refers to it and holds no copy: restore it, or split again into another --out_dir"
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is gone; {cure}")
        stat = os.stat(path)
        known = stat.st_mtime_ns == file["mtime_ns"] and not thoroughly
        if stat.st_size != file["size"] or not known and sha256_of(path) != file["sha256"]:
            raise DataError(f"{path} has changed since it was split ({stat.st_size:,} bytes, {file['size']:,} then); "
                            f"{cure}")
        paths.append(path)
    return paths


def load_ranges(data_dir, meta, split):
    """Numbers of the first token and of the one after the last of each run of a split, int64 (n, 2); DataError."""
    if split not in meta["splits"]:
        raise DataError(f"split {split!r} of {data_dir}: expected one of {', '.join(meta['splits'])}")
    about = meta["splits"][split]
    path = inside(data_dir, about["files"][0]["name"])
    try:
        ranges = np.load(path, allow_pickle=False)
        whole = ranges.dtype == np.int64 and ranges.ndim == 2 and (ranges[:, 0] < ranges[:, 1]).all() and (
            ranges[1:, 0] >= ranges[:-1, 1]).all() and (ranges[:1, 0] >= 0).all()
        if not whole or (ranges[:, 1] - ranges[:, 0]).sum() != about["tokens"]:
            raise ValueError(f"its ranges are not the {about['tokens']:,} tokens of {split}")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is missing or damaged ({error}): split {meta['sources']['folder']} again into another "
                        "--out_dir") from None
    return ranges


def stretches(data_dir, meta, split):
    """-> paths, their dtypes, and for each run of tokens int64 (n,): number of its file, first byte, tokens."""
    if "sources" not in meta:
        paths, tokens = zip(*check_files(data_dir, meta, split))
        number = np.arange(len(paths))
        return paths, [np.dtype(meta["dtype"])] * len(paths), number, 0 * number, tokens
    ranges, files = load_ranges(data_dir, meta, split), meta["sources"]["files"]
    paths, dtypes = check_sources(data_dir, meta), [np.dtype(file["dtype"]) for file in files]
    first, offsets = np.cumsum([0, *(file["tokens"] for file in files)]), np.array([file["offset"] for file in files])
    number = np.minimum(np.searchsorted(first, ranges[:, 0], "right"), len(files)) - 1
    if any(dtype.kind not in "iu" for dtype in dtypes) or (ranges[:, 1] > first[number + 1]).any():
        raise DataError(f"{data_dir}/meta.json and the ranges beside it do not fit: damaged, split again")
    itemsize = np.array([dtype.itemsize for dtype in dtypes])[number]
    begins = offsets[number] + (ranges[:, 0] - first[number]) * itemsize
    return paths, dtypes, number, begins, ranges[:, 1] - ranges[:, 0]


class Tokens:
    """The tokens of a split in order, wherever they lie. DataError or FileNotFoundError when its files are not whole.

    Files are read, not mapped: memory stays small, and a file that is cut while in use is an error instead of a crash.
    """

    def __init__(self, data_dir, meta, split):
        try:
            self.paths, self.dtypes, self.number, self.offset, lengths = stretches(data_dir, meta, split)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{data_dir}/meta.json is damaged ({type(error).__name__}: {error}); make it again with "
                            f"{meta['command']}") from None
        self.starts, self.open = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), {}
        self.n_tokens, self.itemsize = int(self.starts[-1]), np.array([dtype.itemsize for dtype in self.dtypes])

    def file(self, number):
        """An open file; the one opened first is closed when there are too many."""
        if number not in self.open:
            if len(self.open) == MOST_OPEN:
                self.open.pop(next(iter(self.open))).close()
            self.open[number] = open(self.paths[number], "rb", buffering=0)
        return self.open[number]

    def read_rows(self, starts, lengths, out):
        """Fills row i of `out` (B, T) with lengths[i] tokens from number starts[i] on; both int64 (B,).

        The disk is told of all rows before the first is read: rows from all over a file then wait for it together.
        """
        run = np.searchsorted(self.starts, starts, "right") - 1
        begins = self.offset[run] + (starts - self.starts[run]) * self.itemsize[self.number[run]]
        in_one = (starts + lengths <= self.starts[run + 1]).tolist()
        places = list(zip(self.number[run].tolist(), begins.tolist(), lengths.tolist()))
        for number, begin, n in places if hasattr(os, "posix_fadvise") else ():  # macOS has none
            os.posix_fadvise(self.file(number).fileno(), begin, n * out.itemsize, os.POSIX_FADV_WILLNEED)
        for row, start, simple, (number, begin, n) in zip(out, starts.tolist(), in_one, places):
            part = row[:n]
            if not simple or self.dtypes[number] != out.dtype:
                self.read(start, part)
            elif os.preadv(self.file(number).fileno(), [part], begin) != part.nbytes:
                raise self.was_cut(number)

    def was_cut(self, number):
        return DataError(f"{self.paths[number]} was cut while in use: prepare it again")

    def read(self, start, out):
        """Fills `out`, of any integer type, with the tokens from number `start` on, as far as there are any."""
        while len(out) and start < self.n_tokens:
            run = bisect.bisect_right(self.starts, start) - 1  # for one number faster than searchsorted
            number, n = int(self.number[run]), min(len(out), int(self.starts[run + 1]) - start)
            dtype, file = self.dtypes[number], self.file(number)
            offset = int(self.offset[run]) + (start - int(self.starts[run])) * dtype.itemsize
            part = out[:n] if out.dtype == dtype else np.empty(n, dtype)
            if os.preadv(file.fileno(), [part], offset) != part.nbytes:
                raise self.was_cut(number)
            if out.dtype != dtype:
                out[:n] = part
            out, start = out[n:], start + n
