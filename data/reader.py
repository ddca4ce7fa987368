"""What a batch is: token files -> rows of T tokens -> a random order -> several data sets mixed.

    Tokens       token 0, 1, 2, ... n_tokens - 1 of a split, read from its files (data/bins.py)
                   |  cut into rows of T tokens
    TokenData    row 0, 1, 2, ... n_blocks - 1
                   |  permute: a new order in each epoch, from (seed, epoch) alone
                 sample 0, 1, 2, ..., epoch after epoch, without end
                   |  the same for each folder in data_dir
    Mixture      rows in given shares, such as 70 % of the tokens from one folder, 30 % from another
                   |  block_schedule: T may grow during the run
    Batches      batch(step) -> ids (B, T), sample_ids (B,)

    batches = Batches("data/wiki,data/web", "0.7,0.3", "block", 512, "128:0.9,512:0.1",
                      seed, batch_size, max_steps)
    ids, sample_ids = batches.batch(step)

Everything is a pure function of the settings and the step: there is no state of a loader to save, a
resumed run gets the batches it would have had, and any number of processes sees the same ones.

Where to look: TokenData.ids_of_rows for how tokens become rows, permute for the order,
Mixture.window for the shares, Batches.batch for the whole. All is numpy until `tensor` makes torch
tensors at the very end, because the processes that prepare data do without torch.
"""

import copy
import math
import os
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.bins import DataError, Tokens, check_ids, kept_distances, load_meta
from data.tokenizer import Tokenizer

WINDOW = 4096  # rows within which the order of the sources is random
MOST_SOURCES = 64  # WINDOW ** 0.5, so that the rounding of all others fits into the largest source
GROUP = 64  # rows by document that share one known beginning


def tensor(array):
    """numpy array of integers -> torch tensor, int64."""
    import torch  # not above: preparing data imports this file and needs no torch (1.5 s, 200 MB)

    return torch.from_numpy(array.astype(np.int64, copy=False))


# ---- rows of T tokens -----------------------------------------------------------------------


class TokenData:
    """One split of a prepared folder as `n_blocks` rows of `block_size` tokens (T).

    rows="block": the documents follow one another and are cut every T tokens; the last row is
    filled up with eot_id. rows="document": a row begins where a document begins, or continues one
    that is longer than T, and is filled up with pad_id.

    seed: of the order in which an epoch visits the rows. padded: whether rows may hold pad_id,
    which no model may read. row_tokens: mean number of tokens in a row without padding, a Fraction.
    DataError or FileNotFoundError when the folder is incomplete or damaged.
    """

    def __init__(self, data_dir, split, block_size, seed=0, rows="block"):
        self.data_dir, self.split, self.seed = data_dir, split, seed
        self.meta = load_meta(data_dir)
        self.tokens = Tokens(data_dir, self.meta, split)
        self.files, self.n_tokens = self.tokens.paths, self.tokens.n_tokens
        self.dtype, self.eot_id = np.dtype(self.meta["dtype"]), self.meta["eot_id"]
        # Files that others made may hold padding, under any id; ids_of_rows turns it into pad_id.
        self.stored_pad = self.meta.get("pad_id", self.eot_id)
        if not 1 <= block_size <= self.n_tokens:
            raise DataError(f"block_size = {block_size}, but the {split} split of {data_dir} holds "
                            f"{self.n_tokens:,} tokens: the largest usable block_size is "
                            f"{self.n_tokens}")
        self.pad_id = load_tokenizer(data_dir, self.meta).pad_id
        if "sources" not in self.meta:  # files of others were checked when they were split
            check_ids(data_dir, self.meta, split, self.files)
        self.set_rows(block_size, rows)

    def set_rows(self, block_size, rows):
        self.block_size = block_size
        if rows == "document":
            self.documents = DocumentRows(self, block_size)
            longest = self.documents.longest
            if longest < block_size:
                raise DataError(
                    f"block_size={block_size}: no document of {self.data_dir} has more than "
                    f"{longest} tokens, so that much of every row would be padding; "
                    f"--block_size={longest}, or --rows=block")
            self.n_blocks = self.documents.n_rows
            self.row_tokens = Fraction(self.documents.n_tokens, self.n_blocks)
        else:
            self.documents = None
            self.n_blocks = -(-self.n_tokens // block_size)  # rounded up
            self.row_tokens = Fraction(block_size)
        self.padded = rows == "document" or self.stored_pad != self.eot_id

    def in_rows(self, block_size, rows="block"):
        """The same split in other rows; its files are neither opened nor checked again."""
        other = copy.copy(self)
        other.set_rows(block_size, rows)
        return other

    def read(self, start, out):
        """Fills `out` with the tokens from number `start` on, as far as there are any."""
        self.tokens.read(start, out)

    def ids_of_rows(self, indices):
        """Rows by their number in file order, int64 (B,) -> ids (B, T), dtype of the bins."""
        T = self.block_size
        if self.documents:
            starts, lengths = self.documents.at(indices)
            filler = self.pad_id
        else:
            starts, lengths = indices * T, np.full(len(indices), T)
            filler = self.eot_id
        ids = np.full((len(indices), T), filler, self.dtype)
        self.tokens.read_rows(starts, lengths, ids)
        if self.stored_pad not in (self.eot_id, self.pad_id):
            ids[ids == self.stored_pad] = self.pad_id
        return ids

    def ids_of_samples(self, n):
        """Sample numbers, uint64 (B,) -> ids (B, T), dtype of the bins.

        Epoch n // n_blocks visits each row once, in an order that (seed, epoch) determines.
        """
        epoch, index = np.divmod(n, np.uint64(self.n_blocks))
        # Hashed twice, so that (seed, epoch + 1) and (seed + 1, epoch) give unrelated orders.
        key = mix(epoch + mix(np.array([self.seed % 2**64], np.uint64)))
        return self.ids_of_rows(permute(index, self.n_blocks, key).astype(np.int64))

    def block(self, indices):
        """Rows by their number in file order, for evaluation -> ids int64 tensor (B, T)."""
        return tensor(self.ids_of_rows(np.asarray(indices, dtype=np.int64)))

    def samples(self, n):
        """Sample numbers, uint64 (B,) -> ids int64 tensor (B, T)."""
        return tensor(self.ids_of_samples(n))

    def batch(self, step, batch_size, rank=0, world_size=1):
        """The rows of `rank` in global batch number `step` -> ids (B, T), sample_ids (B,).

        Both int64 tensors, B = batch_size / world_size. The rows of all ranks, one after the other,
        are the global batch: samples number step * batch_size and following.
        """
        if batch_size % world_size or not 0 <= rank < world_size:
            possible = math.ceil(batch_size / world_size) * world_size
            raise DataError(f"batch_size = {batch_size} sequences for rank {rank} of {world_size}: "
                            f"expected a multiple of {world_size}, such as {possible}")
        B = batch_size // world_size
        n = np.arange(B, dtype=np.uint64) + np.uint64(step * batch_size + rank * B)
        return self.samples(n), tensor(n)


class DocumentRows:
    """Where the rows of a TokenData begin when each begins with a document.

    A document of more than T tokens continues in further rows, so each token of text is in exactly
    one row. An end of document, or padding, that would stand alone in a row is left out: a model
    could learn nothing from it.

    Kept in memory are the distances from row to row, 1 or 2 bytes each, and where every 64th row
    begins. n_rows; n_tokens: in all rows together. DataError when the split has no documents.
    """

    def __init__(self, data, T):
        self.T, self.distances = T, kept_distances(data, T)
        self.n_rows = len(self.distances) - 1  # the first distance is that to row 0
        sums = np.add.reduceat(self.distances, range(0, self.n_rows + 1, GROUP), dtype=np.int64)
        self.groups = np.cumsum([0, *sums])
        to_next = self.distances[1:]
        self.longest = int(min(T, to_next.max()))
        left_out = to_next[to_next > T].astype(np.int64) - T
        self.n_tokens = data.n_tokens - int(self.distances[0]) - int(left_out.sum())

    def at(self, rows):
        """Numbers of rows, int64 (B,) -> number of their first token, their length: int64 (B,)."""
        # A row begins where its group begins plus the distances of the rows in between.
        group, place_B1 = rows // GROUP, rows[:, None] % GROUP
        near = group[:, None] * GROUP + np.arange(GROUP + 1)
        distances = self.distances[np.minimum(near, self.n_rows)].astype(np.int64)
        begins = np.take_along_axis(np.cumsum(distances, axis=1), place_B1, axis=1)[:, 0]
        to_next = np.take_along_axis(distances, place_B1 + 1, axis=1)[:, 0]
        return self.groups[group] + begins, np.minimum(to_next, self.T)


def load_tokenizer(data_dir, meta):
    """The tokenizer beside the bins; DataError when it is not the one that wrote them."""
    folder = os.path.join(data_dir, meta["tokenizer"])
    try:
        tok = Tokenizer.load(folder)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from None
    if tok.fingerprint != meta["fingerprint"]:
        raise DataError(f"{folder} has fingerprint {tok.fingerprint[:12]}, the bins were written "
                        f"with {meta['fingerprint'][:12]}: another tokenizer. Restore the folder "
                        "or prepare again")
    return tok


# ---- order ----------------------------------------------------------------------------------
# A shuffled list of all rows would take 8 bytes a row and would have to be made anew in each epoch.
# Instead a formula says which row comes at a given place of the order. It needs no memory, and a
# run that is resumed in the middle of an epoch computes the same rows.


def mix(x):
    """splitmix64 (Steele et al. 2014), a bijection that scrambles all bits: uint64 -> uint64 array.

    masking.mix scrambles torch tensors in the same way.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index, n, key):
    """A permutation of 0..n-1 chosen by `key`, at places `index`: uint64 (B,), both -> uint64 (B,).

    A number below side**2 is read as a pair (left, right). Each round of a Feistel network adds a
    hash of one half to the other, which can be undone, so the rounds together permute 0..side**2-1.
    A result >= n is put through the network again until it is below n (cycle walking); that ends,
    because repeating a permutation leads back to `index` at the latest.
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


# ---- several data sets ----------------------------------------------------------------------


class Mixture:
    """Sources (TokenData, rows of one length) in fixed shares of the tokens, each in own epochs.

    weights: one for each source, of any scale; None: by size. The rows come in windows of WINDOW.
    After any number of windows, n rows in all, source k has given round(n * rates[k]) of them, and
    the largest source the rest: the shares hold in each window and not just on average. Within a
    window a permutation decides the order. A source gives its samples 0, 1, 2, ... in turn.

    rates: shares of the rows, as Fractions: exact. row_tokens: mean tokens a row without padding.
    """

    def __init__(self, sources, weights, seed):
        if weights:
            rows = [weight / source.row_tokens for source, weight in zip(sources, weights)]
        else:
            rows = [Fraction(source.n_blocks) for source in sources]
        self.sources, self.seed = sources, seed
        self.rates = [part / sum(rows) for part in rows]
        self.row_tokens = sum(rate * source.row_tokens for rate, source in zip(self.rates, sources))
        self.largest = self.rates.index(max(self.rates))
        self.window = lru_cache(maxsize=4)(self.window)  # successive batches share windows

    def before(self, n):
        """Rows of each source among the first n, a multiple of WINDOW -> int64 (sources,)."""
        counts = [round(n * rate) for rate in self.rates]
        counts[self.largest] += n - sum(counts)
        return np.array(counts)

    def window(self, number):
        """-> (source of each row of a window, its sample number there), int64 (WINDOW,)."""
        begin, end = self.before(WINDOW * number), self.before(WINDOW * (number + 1))
        # ~seed, because seed itself chooses the order of the epochs.
        key = mix(np.array([number], np.uint64) + mix(np.array([~self.seed % 2**64], np.uint64)))
        places = permute(np.arange(WINDOW, dtype=np.uint64), WINDOW, np.repeat(key, WINDOW))
        # The lowest numbers that come out belong to the first source, the next ones to the second.
        source = np.searchsorted(np.cumsum(end - begin), places.astype(np.int64), side="right")
        sample = np.empty(WINDOW, np.int64)
        for k in range(len(self.sources)):
            sample[source == k] = np.arange(begin[k], end[k])
        return source, sample

    def drawn(self, n):
        """Rows of each source among the first n, any number -> int64 (sources,)."""
        number, rest = divmod(n, WINDOW)
        source, _ = self.window(number)
        counts = np.bincount(source[:rest], minlength=len(self.sources))
        return self.before(number * WINDOW) + counts

    def ids_of_rows(self, first, count):
        """Rows first, first + 1, ... of the mixture -> ids int64 (count, T)."""
        number, skipped = divmod(first, WINDOW)
        last = (first + count - 1) // WINDOW
        windows = [self.window(i) for i in range(number, last + 1)]
        source, sample = np.concatenate(windows, axis=1)[:, skipped : skipped + count]

        def read(k, mine):
            return self.sources[k].ids_of_samples(mine.astype(np.uint64))

        return gather(source, sample, read, self.sources[0].block_size)


def gather(source, numbers, read, T):
    """Rows of several sources in the given order -> ids int64 (B, T).

    source, numbers: int64 (B,). read(k, numbers) gives those of source k.
    """
    ids = np.empty((len(source), T), np.int64)
    for k in np.unique(source):
        ids[source == k] = read(k, numbers[source == k])
    return ids


# ---- batches --------------------------------------------------------------------------------


class Phase(NamedTuple):
    """Steps with as many rows, all of one length."""
    mixture: Mixture
    T: int  # tokens in a row
    rows: int  # in a step
    begin: int  # its first step
    end: float  # the first step after it; infinity for the last phase
    first_sample: int  # sample id of its first row
    first_row: int  # in the mixture: what other phases have read of it before


class Batches:
    """The training rows of a run of `n_steps`: max_steps, or fewer when max_tokens need no more.

    data_dir: folders with commas between. data_weights: "0.7,0.3", the share of the tokens that
    comes from each; "": by size, so that all of them end an epoch together. rows: as in TokenData.
    block_schedule: "128:0.9,512:0.1" spends nine tenths of the steps on rows of 128 tokens, of
    which a step then has four times as many; "": all rows have block_size tokens. batch_schedule:
    "64:0.1,256:0.9" gives the first tenth of the steps 64 rows each and the others 256; "": all
    steps have batch_size rows.

    names: the folders. shares: of the tokens, for each of them. padded: rows may hold pad_id.
    block(), n_blocks and block_size are those of a TokenData, for statistics: packed rows of all
    sources in proportion to their shares. DataError or FileNotFoundError with what to do.
    """

    def __init__(self, data_dir, data_weights, rows, block_size, block_schedule, seed, batch_size,
                 max_steps, max_tokens=0, batch_schedule=""):
        self.names, self.block_size = folders(data_dir), block_size
        # (tokens a row, rows a step, share of the steps). Shorter rows are more in number, so that
        # with block_schedule all steps have the same number of places for tokens.
        self.parts = [(T, batch_size * block_size // T, share)
                      for T, share in parse_schedule(block_schedule, block_size)]
        if batch_schedule:
            if block_schedule:
                raise DataError("batch_schedule and block_schedule: one of them at a time")
            sizes = parse_batch_schedule(batch_schedule, batch_size)
            self.parts = [(block_size, rows_a_step, share) for rows_a_step, share in sizes]
        weights = parse_weights(data_weights, self.names)
        if len(self.names) > MOST_SOURCES:
            raise DataError(f"data_dir: expected at most {MOST_SOURCES} folders, there are "
                            f"{len(self.names)}")
        self.packed = [TokenData(name, "train", block_size, seed) for name in self.names]
        self.refuse_other_tokenizers()

        # One mixture for each row length.
        mixtures = {}
        for T in dict.fromkeys(T for T, *_ in self.parts):
            sources = [source.in_rows(T, rows) for source in self.packed]
            mixtures[T] = Mixture(sources, weights, seed)
        # the mean of the run
        self.tokens_a_step = sum(share * n * mixtures[T].row_tokens for T, n, share in self.parts)
        self.n_steps = max_steps
        if max_tokens:
            self.n_steps = min(max_steps, math.ceil(max_tokens / self.tokens_a_step))
        self.phases = self.make_phases(mixtures, block_schedule, batch_schedule)

        final = mixtures[block_size]
        self.shares = [float(rate * source.row_tokens / final.row_tokens)
                       for rate, source in zip(final.rates, final.sources)]
        self.padded = any(source.padded for source in final.sources)
        self.unigram_entropy = sum(share * source.meta["unigram_entropy"]
                                   for share, source in zip(self.shares, self.packed))
        self.sha256 = [file["sha256"] for source in self.packed
                       for file in source.meta["splits"]["train"]["files"]]
        # block() numbers the rows of the first source first, in proportion to its share, and so on.
        self.n_blocks = sum(source.n_blocks for source in self.packed)
        self.bounds = np.rint(np.cumsum([0, *self.shares]) * self.n_blocks).astype(np.int64)

    def refuse_other_tokenizers(self):
        """DataError unless all folders were prepared with the same tokenizer."""
        first = self.names[0]
        for name, source in zip(self.names, self.packed):
            if source.meta["fingerprint"] != self.packed[0].meta["fingerprint"]:
                raise DataError(f"{name} was prepared with another tokenizer than {first}: prepare "
                                f"it again as {source.meta['command']}, with "
                                f"--tokenizer={first}/tokenizer and another --out_dir")

    def make_phases(self, mixtures, block_schedule, batch_schedule):
        """-> [Phase]: the steps of the run divided in the proportions of the schedule."""
        phases, begin, first_sample, share_before = [], 0, 0, 0
        rows_of = dict.fromkeys(mixtures, 0)  # {T: rows of this length so far}
        for T, n, share in self.parts:
            share_before += share
            end = round(share_before * self.n_steps)
            if begin == end:
                setting, part = f"block_schedule={block_schedule}", f"rows of {T} tokens"
                if batch_schedule:
                    setting, part = f"batch_schedule={batch_schedule}", f"batches of {n} rows"
                raise DataError(f"{setting}: none of {self.n_steps} steps is left for {part}; "
                                f"expected {math.ceil(1 / share)} steps or more")
            phases.append(Phase(mixtures[T], T, n, begin, end, first_sample, rows_of[T]))
            first_sample += n * (end - begin)
            rows_of[T] += n * (end - begin)
            begin = end
        phases[-1] = phases[-1]._replace(end=math.inf)  # a run may be continued beyond n_steps
        return phases

    def phase(self, step):
        """The Phase that a step belongs to."""
        return next(phase for phase in self.phases if step < phase.end)

    def batch(self, step, rank=0, world_size=1):
        """The rows of `rank` in the global batch of a step -> ids (B, T), sample_ids (B,).

        Both int64 tensors; the ranks are combined as in TokenData.batch. No sample id comes twice.
        """
        phase = self.phase(step)
        B = phase.rows // world_size
        first = (step - phase.begin) * phase.rows + rank * B  # counted from the phase's first row
        sample_ids = phase.first_sample + np.arange(first, first + B)
        return tensor(phase.mixture.ids_of_rows(phase.first_row + first, B)), tensor(sample_ids)

    def block(self, indices):
        """Packed rows, spread over all sources by their shares -> ids int64 tensor (B, T)."""
        indices = np.asarray(indices, dtype=np.int64)
        source = np.searchsorted(self.bounds, indices, side="right") - 1

        def read(k, mine):
            data, (low, high) = self.packed[k], self.bounds[k : k + 2]
            return data.ids_of_rows((mine - low) * data.n_blocks // (high - low))

        return tensor(gather(source, indices, read, self.block_size))

    # What a run has read or will read: for its log, its checkpoints and its plan.

    def rows_read(self, step):
        """[(phase, its rows in the first `step` steps)] of the phases that have begun."""
        return [(phase, (min(step, phase.end) - phase.begin) * phase.rows)
                for phase in self.phases if phase.begin < step]

    def tokens(self, step):
        """Tokens in the first `step` steps without padding, from the mean length of the rows."""
        return round(sum(n * phase.mixture.row_tokens for phase, n in self.rows_read(step)))

    def flops_per_token(self, model, predicted_share, micro_batch):
        """-> {T: training FLOPs a position, be it text or padding}, for each row length T."""
        return {T: model.flops_per_token(T, math.ceil(predicted_share * T),
                                         micro_batch * self.block_size // T)
                for T, *_ in self.parts}

    def progress(self, step):
        """-> {name: {"share": of the tokens of the first `step` steps, "epochs": times read}}."""
        tokens, epochs = np.zeros((2, len(self.names)))
        for phase, n in self.rows_read(step):
            sources, first = phase.mixture.sources, phase.first_row
            drawn = phase.mixture.drawn(first + n) - phase.mixture.drawn(first)
            tokens += drawn * [float(source.row_tokens) for source in sources]
            epochs += drawn / [source.n_blocks for source in sources]
        shares = tokens / max(tokens.sum(), 1)
        return {name: {"share": share, "epochs": n}
                for name, share, n in zip(self.names, shares.tolist(), epochs.tolist())}

    def shares_so_far(self, step):
        """For the log line: where the tokens came from; "" when there is one source."""
        if len(self.names) == 1:
            return ""
        return "".join(f" | {name} {part['share']:.1%}, {part['epochs']:.2f} epochs"
                       for name, part in self.progress(step).items())

    def plan(self):
        """What the run will read, as text."""
        lines = []
        for source, (name, part) in zip(self.packed, self.progress(self.n_steps).items()):
            lines.append(f"data: {name}, {source.n_tokens:,} tokens: {part['share']:.1%} of the "
                         f"run, {part['epochs']:,.2f} epochs")
        for phase in self.phases:
            full, end = phase.mixture.row_tokens / phase.T, min(phase.end, self.n_steps)
            if len(self.phases) > 1 or full < 1:
                lines.append(f"steps {phase.begin:,} to {end:,}: {phase.rows:,} rows of {phase.T} "
                             f"tokens, {1 - float(full):.1%} of that padding")
        return "\n".join(lines)


# ---- settings: what the user may write ------------------------------------------------------


def folders(data_dir):
    """ "data/a,data/b" -> ["data/a", "data/b"]; DataError unless they are different."""
    names = [name.strip() for name in data_dir.split(",")]
    if not all(names) or len({os.path.realpath(name) for name in names}) < len(names):
        raise DataError(f"data_dir={data_dir!r}: expected different folders with commas between")
    return names


def parse_weights(text, names):
    """ "0.7,0.3" -> [Fraction], one for each of `names`; "" -> None. DataError if unusable."""
    if not text:
        return None
    try:
        weights = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        weights = []
    if len(weights) != len(names) or min(weights) <= 0:
        raise DataError(f"data_weights={text!r}: expected numbers above 0 with commas between, one "
                        f"for each of {', '.join(names)}")
    return weights


def parse_schedule(text, block_size):
    """ "128:0.9,512:0.1" -> [(128, Fraction), (512, Fraction)]; "" -> all of block_size."""
    if not text:
        return [(block_size, Fraction(1))]
    wrong = f"block_schedule={text!r}: "
    try:
        pairs = [part.split(":") for part in text.split(",")]
        pairs = [(int(T), Fraction(share.strip())) for T, share in pairs]
    except (ValueError, ZeroDivisionError):
        raise DataError(f"{wrong}expected LENGTH:SHARE with commas between, such as "
                        f"{max(1, block_size // 4)}:0.9,{block_size}:0.1") from None
    lengths, shares = zip(*pairs)
    for T in lengths:
        if T < 1 or block_size % T:
            near = " and ".join(map(str, nearest_divisors(block_size, T)))
            raise DataError(f"{wrong}rows of {T} tokens do not divide block_size={block_size}, and "
                            f"a step holds the same tokens throughout; {near} do")
    if list(lengths) != sorted(set(lengths)) or lengths[-1] != block_size:
        raise DataError(f"{wrong}expected lengths that grow and end at block_size={block_size}")
    if min(shares) <= 0 or sum(shares) != 1:
        raise DataError(f"{wrong}the shares of the tokens add up to {float(sum(shares)):g}; "
                        "expected numbers above 0 that add up to 1")
    return pairs


def parse_batch_schedule(text, batch_size):
    """ "64:0.1,256:0.9" -> [(64, Fraction), (256, Fraction)]; "0.25:0.1,1.0:0.9", with points, are
    shares of batch_size rows.
    """
    wrong = f"batch_schedule={text!r}: "
    try:
        pairs = [part.split(":") for part in text.split(",")]
        pairs = [(Fraction(size.strip()) * (batch_size if "." in size else 1),
                  Fraction(share.strip())) for size, share in pairs]
    except (ValueError, ZeroDivisionError):
        raise DataError(f"{wrong}expected ROWS:SHARE with commas between, such as "
                        f"{max(1, batch_size // 4)}:0.1,{batch_size}:0.9") from None
    sizes, shares = zip(*pairs)
    if any(size < 1 or size.denominator > 1 for size in sizes) or sizes[-1] != batch_size:
        raise DataError(f"{wrong}expected whole numbers of rows, the last of them "
                        f"batch_size={batch_size}; here they are {', '.join(map(str, sizes))}")
    if list(sizes) != sorted(set(sizes)):
        raise DataError(f"{wrong}expected numbers of rows that grow")
    if min(shares) <= 0 or sum(shares) != 1:
        raise DataError(f"{wrong}the shares of the steps add up to {float(sum(shares)):g}; "
                        "expected numbers above 0 that add up to 1")
    return [(int(size), share) for size, share in pairs]


def nearest_divisors(n, T):
    """The two divisors of n whose ratio to T is nearest to 1, in order."""
    divisors = [i for i in range(1, n + 1) if n % i == 0]
    return sorted(sorted(divisors, key=lambda i: abs(math.log(i / max(T, 1))))[:2])
