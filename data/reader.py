"""Where the tokens of a split lie: in bins beside meta.json, or in other files of which `prepare.py split` made a list.

Such a list is meta.json with "sources": {"folder": of the files, relative to meta.json, "files": [{"name", "dtype",
"offset" in bytes, "tokens", "size" in bytes, "mtime_ns", "sha256"}]}. The tokens of all files are numbered, one file
after the other; SPLIT_ranges.npy, int64 (n, 2), holds the first and the last + 1 of each run that belongs to a split.
Nothing is copied, so a file that is gone or another one is noticed: its size and time are compared, and its hash where
only the time differs.

Rows that start at a document: where each begins, found from the end-of-document ids of a split.

A document is a row of up to T tokens; a longer one goes on in further rows, so every token of text is in exactly one
row. An end of document, or padding, that would stand alone in a row is left out: nothing can be learned from it.

Kept in memory are the distances from row to row, 1 or 2 bytes each, and where every 64th row begins: 6 MB for 2 GB of
tokens in documents of 500. They are found in half a second a GB, and as fast as the disk reads: those of a large split
are then left beside its bins, under a name that says of which tokens. A folder that cannot be written to is read again.

Token bins as batches: `TokenData.batch(step)` is a pure function of (seed, step), with no loader state to save.

bins.py says what the files are and how they are written.

What a run reads, step by step: several data sets in given shares, in rows that may grow longer.

    batches = Batches("data/wiki,data/web", "0.7,0.3", "block", 512, "128:0.9,512:0.1", seed, batch_size, max_steps)
    ids, sample_ids = batches.batch(step)

Everything follows from the settings and the step: there is no state to save, any number of processes sees the same
batches, and shares are met window by window, not just on average.
"""

import bisect
import contextlib
import copy
import glob
import hashlib
import json
import math
import os
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.bins import DataError, check_files, check_sources, load_meta, load_ranges
from data.tokenizer import Tokenizer
from lib.files import FolderLock, remove_file, replace_file

MOST_OPEN = 64  # files at a time; a split may refer to thousands












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


FULL_SCAN_BYTES = 2 * 10**9  # a split larger than this is checked for foreign ids by sample when it is opened


def highest_id(path, dtype):
    """Largest id of a bin; of a large one, the largest of 256 evenly spread stretches."""
    size, part = os.path.getsize(path), 2**22
    step = part if size < FULL_SCAN_BYTES else size // 256 // part * part
    with open(path, "rb") as file:
        return max(int(np.frombuffer(os.pread(file.fileno(), part, at), dtype).max()) for at in range(0, size, step))


def mix(x):
    """splitmix64 (Steele et al. 2014): uint64 array -> uint64 array, a bijection that scrambles all bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index, n, key):
    """A permutation of 0..n-1 chosen by `key`, at `index`: uint64 (B,), both -> uint64 (B,). O(1) memory.

    A Feistel network on pairs of numbers below `side` permutes 0..side**2-1; a result >= n goes through it again until
    it is below n (cycle walking), which ends because the walk comes back to `index` at the latest.
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    left, right = index // side, index % side
    for number in range(4):
        round_key = key ^ np.uint64(number * 0x9E3779B97F4A7C15 % 2**64)
        left, right = right, (left + mix(right + round_key) % side) % side
    out = left * side + right
    again = out >= n
    if again.any():
        out[again] = permute(out[again], n, key[again])
    return out


def folders(data_dir):
    """ "data/a,data/b" -> ["data/a", "data/b"]; DataError unless they are different."""
    names = [name.strip() for name in data_dir.split(",")]
    if not all(names) or len({os.path.realpath(name) for name in names}) < len(names):
        raise DataError(f"data_dir={data_dir!r}: expected different folders with commas between")
    return names


class TokenData:
    """One split as `n_blocks` rows of `block_size` tokens (T).

    rows="block": packed, cut every T tokens, the last one filled up with eot_id. "document": each begins a document or
    goes on with one longer than T, and is filled up with pad_id (rows.py); padding that the files hold becomes pad_id
    in either. `padded`: rows may hold some, which no model is to read. Sample number n of a run is row
    n % batch_size of step n // batch_size. Epoch n // n_blocks visits each row once, in an order keyed by (seed,
    epoch). Files are read, not mapped: memory stays small, and a file that is cut while in use is an error instead of a
    crash. ValueError or FileNotFoundError when the folder is not whole.
    """

    def __init__(self, data_dir, split, block_size, seed=0, rows="block"):
        self.meta, self.data_dir, self.split = load_meta(data_dir), data_dir, split
        self.tokens = Tokens(data_dir, self.meta, split)
        self.dtype, self.eot_id, self.seed = np.dtype(self.meta["dtype"]), self.meta["eot_id"], seed
        self.n_tokens, self.files = self.tokens.n_tokens, self.tokens.paths
        if not 1 <= block_size <= self.n_tokens:
            raise DataError(f"block_size = {block_size}, but the {split} split of {data_dir} holds {self.n_tokens:,} "
                            f"tokens: the largest usable block_size is {self.n_tokens}")
        folder = os.path.join(data_dir, self.meta["tokenizer"])
        tok = Tokenizer.load(folder)
        self.pad_id, self.stored_pad = tok.pad_id, self.meta.get("pad_id", self.eot_id)  # of files that others made
        if tok.fingerprint != self.meta["fingerprint"]:
            raise DataError(f"{folder} has fingerprint {tok.fingerprint[:12]}, the bins were written with "
                            f"{self.meta['fingerprint'][:12]}: another tokenizer. Restore the folder or prepare again")
        for path in () if "sources" in self.meta else self.files:  # those of a split are as they were when it was made
            if (highest := highest_id(path, self.dtype)) >= self.meta["n_vocab"]:
                raise DataError(f"{path} contains id {highest:,}, meta.json says {self.meta['n_vocab']:,} ids: not the "
                                f"file it describes. python prepare.py validate --data_dir={data_dir} tells more")
        self.set_rows(block_size, rows)

    def set_rows(self, block_size, rows):
        self.block_size, self.documents = block_size, DocumentRows(self, block_size) if rows == "document" else None
        self.padded = rows == "document" or self.stored_pad != self.eot_id
        self.n_blocks = self.documents.n_rows if self.documents else -(-self.n_tokens // block_size)
        self.row_tokens = Fraction(self.documents.n_tokens, self.n_blocks) if self.documents else Fraction(block_size)

    def in_rows(self, block_size, rows="block"):
        """The same split in other rows; its files are neither opened nor checked again."""
        other = copy.copy(self)
        other.set_rows(block_size, rows)
        return other

    def read(self, start, out):
        """Fills `out` (dtype of the bins) with the tokens from number `start` on, as far as there are any."""
        self.tokens.read(start, out)

    def block(self, indices):
        """Rows by their number in file order, for evaluation -> ids int64 tensor (len(indices), T)."""
        import torch  # here, because preparing data does not need its 200 MB and 1.5 s

        T, indices = self.block_size, np.asarray(indices, dtype=np.int64)
        starts, lengths = self.documents.at(indices) if self.documents else (indices * T, np.full(len(indices), T))
        out = np.full((len(indices), T), self.pad_id if self.documents else self.eot_id, self.dtype)
        self.tokens.read_rows(starts, lengths, out)
        if self.stored_pad not in (self.eot_id, self.pad_id):
            out[out == self.stored_pad] = self.pad_id
        return torch.from_numpy(out.astype(np.int64))

    def samples(self, n):
        """Rows that samples number n, uint64 (B,), are of -> ids int64 tensor (B, T)."""
        epoch, index = n // np.uint64(self.n_blocks), n % np.uint64(self.n_blocks)
        key = mix(epoch + mix(np.array([self.seed % 2**64], np.uint64)))
        return self.block(permute(index, self.n_blocks, key))

    def batch(self, step, batch_size, rank=0, world_size=1):
        """Rows of `rank` in global batch number `step` of `batch_size` sequences -> ids (B, T), sample_ids (B,).

        Both int64 tensors, B = batch_size / world_size; the ranks' rows, one after the other, are the global batch.
        """
        import torch

        if batch_size % world_size or not 0 <= rank < world_size:
            raise DataError(f"batch_size = {batch_size} sequences for rank {rank} of {world_size}: expected a multiple "
                            f"of {world_size}, such as {-(-batch_size // world_size) * world_size}")
        rows = batch_size // world_size
        n = np.arange(rows, dtype=np.uint64) + np.uint64(step * batch_size + rank * rows)
        return self.samples(n), torch.from_numpy(n.astype(np.int64))


WINDOW = 4096  # rows within which the order of the sources is random
MOST_SOURCES = 64  # WINDOW ** 0.5: the largest source has room for the rounding of the others in every window


class Mixture:
    """Sources (TokenData, rows of one length) in fixed shares of the tokens, each in epochs of its own.

    weights: one a source, any scale; None: by size. Of the first n rows, n any number of windows, source k has
    round(n * rates[k]), and the largest source what is left. Within a window a permutation keyed by the seed deals the
    places. The number of a row within its source is how many of them came before it.
    """

    def __init__(self, sources, weights, seed):
        rows = [Fraction(source.n_blocks) for source in sources]  # fractions: a share is exact, however long the run
        if weights:
            rows = [weight / source.row_tokens for source, weight in zip(sources, weights)]
        self.sources, self.seed, self.rates = sources, seed, [part / sum(rows) for part in rows]
        self.row_tokens = sum(rate * source.row_tokens for rate, source in zip(self.rates, sources))
        self.largest, self.window = self.rates.index(max(self.rates)), lru_cache(maxsize=4)(self.window)

    def before(self, n):
        """Rows of each source among the first n, a multiple of WINDOW -> int64 (sources,)."""
        counts = [round(n * rate) for rate in self.rates]
        counts[self.largest] += n - sum(counts)
        return np.array(counts)

    def window(self, number):
        """-> (source of each row of a window, its number within that source), int64 (WINDOW,)."""
        begin, end = self.before(WINDOW * number), self.before(WINDOW * (number + 1))
        key = mix(np.array([number], np.uint64) + mix(np.array([~self.seed % 2**64], np.uint64)))
        places = permute(np.arange(WINDOW, dtype=np.uint64), WINDOW, np.repeat(key, WINDOW)).astype(np.int64)
        source, index = np.searchsorted(np.cumsum(end - begin), places, side="right"), np.empty(WINDOW, np.int64)
        index[np.argsort(source, kind="stable")] = np.concatenate([np.arange(*span) for span in zip(begin, end)])
        return source, index

    def drawn(self, n):
        """Rows of each source among the first n, any number -> int64 (sources,)."""
        source, _ = self.window(n // WINDOW)
        return self.before(n // WINDOW * WINDOW) + np.bincount(source[: n % WINDOW], minlength=len(self.sources))

    def samples(self, first, count):
        """Rows first, first + 1, ... -> ids int64 tensor (count, T)."""
        start = first // WINDOW
        windows = zip(*map(self.window, range(start, (first + count - 1) // WINDOW + 1)))
        source, index = (np.concatenate(parts)[first - start * WINDOW :][:count] for parts in windows)
        return gather(source, index, lambda k, numbers: self.sources[k].samples(numbers.astype(np.uint64)))


def gather(source, index, read):
    """read(k, index of the rows with source k) -> ids; for all rows in their order, int64 tensor (len(index), T)."""
    order = np.argsort(source, kind="stable")
    bounds = np.flatnonzero(np.diff(source[order], prepend=-1, append=-1))
    import torch

    parts = [read(int(source[mine[0]]), index[mine]) for mine in np.split(order, bounds[1:-1])]
    return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.from_numpy(np.argsort(order))]


class Phase(NamedTuple):
    """Steps with rows of one length."""
    mixture: Mixture
    T: int  # tokens a row
    rows: int  # a step
    begin: int  # its first step
    end: float  # the first step that is not in it; of the last phase infinity
    first_sample: int


class Batches:
    """The training rows of a run of `n_steps`: max_steps, or fewer when max_tokens need no more.

    data_dir: folders with commas between. data_weights: the share of the tokens that comes from each, "0.7,0.3"; "": by
    size, so that each row of each is read once, then all again. rows: as in TokenData. block_schedule:
    "128:0.9,512:0.1" takes nine tenths of the steps with rows of 128 tokens, four times as many as there are later; "":
    all of block_size. Raises ValueError or FileNotFoundError with what to do.

    padded: rows may hold padding. block, n_blocks and block_size are those of a TokenData: packed rows of all sources
    by weight, for statistics.
    """

    def __init__(self, data_dir, data_weights, rows, block_size, block_schedule, seed, batch_size, max_steps,
                 max_tokens=0):
        self.names, self.block_size = folders(data_dir), block_size
        self.lengths = lengths = parse_schedule(block_schedule, block_size)
        weights = parse_weights(data_weights, self.names)
        if len(self.names) > MOST_SOURCES:
            raise DataError(f"data_dir: expected at most {MOST_SOURCES} folders, there are {len(self.names)}")
        self.packed = [TokenData(name, "train", block_size, seed) for name in self.names]
        for name, source in zip(self.names, self.packed):
            if source.meta["fingerprint"] != self.packed[0].meta["fingerprint"]:
                raise DataError(f"{name} was prepared with another tokenizer than {self.names[0]}: prepare it again as "
                                f"{source.meta['command']}, with --tokenizer={self.names[0]}/tokenizer and another "
                                "--out_dir")
        mixtures = [Mixture([source.in_rows(T, rows) for source in self.packed], weights, seed) for T, _ in lengths]
        self.shares = [float(rate * source.row_tokens / mixtures[-1].row_tokens)
                       for rate, source in zip(mixtures[-1].rates, mixtures[-1].sources)]
        n_rows = [batch_size * block_size // T for T, _ in lengths]
        self.tokens_a_step = sum(share * n * part.row_tokens for (_, share), n, part in zip(lengths, n_rows, mixtures))
        self.n_steps = min(max_steps, math.ceil(max_tokens / self.tokens_a_step)) if max_tokens else max_steps
        self.phases, begin, share_before, first_sample = [], 0, 0, 0
        for (T, share), n, part in zip(lengths, n_rows, mixtures):
            share_before += share
            end = round(share_before * self.n_steps)
            if begin == end:
                raise DataError(f"block_schedule={block_schedule}: none of {self.n_steps} steps is left for rows of {T}"
                                f" tokens; expected {math.ceil(1 / share)} steps or more")
            self.phases.append(Phase(part, T, n, begin, end if share_before < 1 else math.inf, first_sample))
            begin, first_sample = end, first_sample + n * (end - begin)
        self.sha256 = [file["sha256"] for source in self.packed for file in source.meta["splits"]["train"]["files"]]
        self.unigram_entropy = sum(share * source.meta["unigram_entropy"]
                                   for share, source in zip(self.shares, self.packed))
        self.padded = any(source.padded for part in mixtures for source in part.sources)
        self.n_blocks = sum(source.n_blocks for source in self.packed)
        self.bounds = np.rint(np.cumsum([0, *self.shares]) * self.n_blocks).astype(np.int64)

    def phase(self, step):
        return next(phase for phase in self.phases if step < phase.end)

    def batch(self, step, rank=0, world_size=1):
        """Rows of `rank` in the global batch of a step -> ids (B, T), sample_ids (B,), int64 tensors.

        The ranks' rows, one after the other, are the global batch. No sample id comes twice in a run.
        """
        import torch

        phase = self.phase(step)
        rows = phase.rows // world_size
        first = (step - phase.begin) * phase.rows + rank * rows
        return phase.mixture.samples(first, rows), torch.arange(first, first + rows) + phase.first_sample

    def flops_per_token(self, model, mlm_probability, micro_batch):
        """-> {T: training FLOPs a position of rows of T tokens, text or padding}."""
        return {T: model.flops_per_token(T, math.ceil(mlm_probability * T), micro_batch * self.block_size // T)
                for T, _ in self.lengths}

    def rows_read(self, step):
        """[(phase, its rows in the first `step` steps)] of the phases that have begun."""
        begun = (phase for phase in self.phases if phase.begin < step)
        return [(phase, (min(step, phase.end) - phase.begin) * phase.rows) for phase in begun]

    def tokens(self, step):
        """Tokens in the first `step` steps, without padding: from the mean length of the rows, exact at an epoch."""
        return round(sum(n * phase.mixture.row_tokens for phase, n in self.rows_read(step)))

    def progress(self, step):
        """-> {name: {"share": of the tokens of the first `step` steps, "epochs": times it was read}}."""
        tokens, epochs = np.zeros((2, len(self.names)))
        for phase, n in self.rows_read(step):
            sources, drawn = phase.mixture.sources, phase.mixture.drawn(n)
            tokens += drawn * [float(source.row_tokens) for source in sources]
            epochs += drawn / [source.n_blocks for source in sources]
        shares = tokens / max(tokens.sum(), 1)
        return {name: dict(share=share, epochs=epoch)
                for name, share, epoch in zip(self.names, shares.tolist(), epochs.tolist())}

    def shares_so_far(self, step):
        """For the log line: where the tokens came from; nothing when there is one source."""
        if len(self.names) == 1:
            return ""
        return "".join(f" | {name} {r['share']:.1%}, {r['epochs']:.2f} epochs"
                       for name, r in self.progress(step).items())

    def plan(self):
        """What the run will read, as text."""
        lines = [f"data: {name}, {source.n_tokens:,} tokens: {r['share']:.1%} of the run, {r['epochs']:,.2f} epochs"
                 for source, (name, r) in zip(self.packed, self.progress(self.n_steps).items())]
        for phase in self.phases:
            full, end = phase.mixture.row_tokens / phase.T, min(phase.end, self.n_steps)
            if len(self.phases) > 1 or full < 1:
                lines.append(f"steps {phase.begin:,} to {end:,}: {phase.rows:,} rows of {phase.T} tokens, "
                             f"{1 - float(full):.1%} of that padding")
        return "\n".join(lines)

    def block(self, indices):
        """Packed rows evenly spread over all sources by weight -> ids int64 tensor (len(indices), block_size)."""
        indices = np.asarray(indices, dtype=np.int64)
        source = np.searchsorted(self.bounds, indices, side="right") - 1

        def read(k, numbers):
            low, high = self.bounds[k : k + 2]
            return self.packed[k].block((numbers - low) * self.packed[k].n_blocks // (high - low))

        return gather(source, indices, read)


# ---- settings ---------------------------------------------------------------


def parse_weights(text, names):
    """ "0.7,0.3" -> [Fraction], one for each of `names`; None for "". DataError names what is expected."""
    if not text:
        return None
    try:
        weights = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        weights = []
    if len(weights) != len(names) or min(weights) <= 0:
        raise DataError(f"data_weights={text!r}: expected numbers above 0 with commas between, one for each of "
                        f"{', '.join(names)}")
    return weights


def parse_schedule(text, block_size):
    """ "128:0.9,512:0.1" -> [(128, Fraction), (512, Fraction)]; all of block_size for "". DataError."""
    if not text:
        return [(block_size, Fraction(1))]
    try:
        pairs = [(int(T), Fraction(share.strip())) for T, share in (part.split(":") for part in text.split(","))]
    except (ValueError, ZeroDivisionError):
        raise DataError(f"block_schedule={text!r}: expected LENGTH:SHARE with commas between, such as "
                        f"{max(1, block_size // 4)}:0.9,{block_size}:0.1") from None
    lengths, shares = zip(*pairs)
    for T in lengths:
        if T < 1 or block_size % T:
            low = [n for n in range(1, math.isqrt(block_size) + 1) if block_size % n == 0]
            near = sorted({*low, *(block_size // n for n in low)}, key=lambda n, T=T: abs(math.log(n / max(T, 1))))[:2]
            raise DataError(f"block_schedule={text!r}: rows of {T} tokens do not divide block_size={block_size}, and a "
                            f"step holds the same tokens throughout; {' and '.join(map(str, sorted(near)))} do")
    if list(lengths) != sorted(set(lengths)) or lengths[-1] != block_size:
        raise DataError(f"block_schedule={text!r}: expected lengths that grow and end at block_size={block_size}")
    if min(shares) <= 0 or sum(shares) != 1:
        raise DataError(f"block_schedule={text!r}: the shares of the tokens add up to {float(sum(shares)):g}; expected "
                        "numbers above 0 that add up to 1")
    return pairs
