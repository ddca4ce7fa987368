"""What a run reads, step by step: several data sets in given shares, in rows that may grow longer.

    batches = Batches("data/wiki,data/web", "0.7,0.3", "block", 512, "128:0.9,512:0.1", seed, batch_size, max_steps)
    ids, sample_ids = batches.batch(step)

Everything follows from the settings and the step: there is no state to save, any number of processes sees the same
batches, and shares are met window by window, not just on average.
"""

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from data.bins import DataError
from data.reader import TokenData, folders, mix, permute

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
