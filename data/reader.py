"""Token bins as batches: `TokenData.batch(step)` is a pure function of (seed, step), with no loader state to save.

bins.py says what the files are and how they are written.
"""

import copy
import math
import os
from fractions import Fraction

import numpy as np

from data.bins import DataError, load_meta
from data.manifest import Tokens
from data.rows import DocumentRows
from data.tokenizer import Tokenizer

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
