"""A start for the token table from word statistics, which a short run would otherwise spend its first tokens on.

    neighbours within WINDOW tokens --count--> positive pointwise mutual information --factorise--> vectors (V,d)

What a table learns first is which tokens keep the same company, and counting finds that in seconds: Levy and Goldberg,
Neural word embedding as implicit matrix factorization (2014). For any architecture: --init_table=cooccurrence.
"""

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix

MOST_TOKENS = 20_000_000  # read at most; a quarter of a minute for a 16k vocabulary
WINDOW = 6  # neighbours up to so many tokens away count, at distance n by n ** -0.6
SMOOTHING = 0.75  # power of the context frequencies, so that rare neighbours do not rule (1301.3781, section 2.2)


def count_neighbours(data, vocab_size):
    """Symmetric weighted counts of neighbours within rows spread over all of `data`. -> sparse (V,V) float32."""
    n_rows = max(1, min(data.n_blocks, MOST_TOKENS // data.block_size))
    counts = csr_matrix((vocab_size, vocab_size), dtype=np.float32)
    n_parts = -(-n_rows * data.block_size // 2_000_000)
    for rows in np.array_split(np.arange(n_rows) * data.n_blocks // n_rows, n_parts):
        ids = np.asarray(data.block(rows)).astype(np.int32)
        steps = range(1, min(WINDOW + 1, ids.shape[1]))
        if steps:
            left = np.concatenate([ids[:, :-n].ravel() for n in steps])
            right = np.concatenate([ids[:, n:].ravel() for n in steps])
            weight = np.concatenate([np.full(ids[:, n:].size, n**-0.6, np.float32) for n in steps])
            counts = counts + coo_matrix((weight, (left, right)), counts.shape).tocsr()
    return counts + counts.T


def positive_pmi(counts):
    """log of how much more often two tokens meet than chance would have it, where that is positive. -> sparse (V,V)."""
    counts = counts.tocoo()
    if not counts.nnz:
        return counts
    share = np.asarray(counts.sum(1), dtype=np.float64).ravel() / counts.sum(dtype=np.float64)
    context = share**SMOOTHING / (share**SMOOTHING).sum()
    excess = np.log(counts.data / np.float32(counts.data.sum(dtype=np.float64)))  # fp32: these arrays are large
    with np.errstate(divide="ignore"):  # ids that never occur have no counts either
        excess -= np.log(share).astype(np.float32)[counts.row]
        excess -= np.log(context).astype(np.float32)[counts.col]
    kept = excess > 0
    pmi = csr_matrix((excess[kept], (counts.row[kept], counts.col[kept])), counts.shape)
    return (pmi + pmi.T) / 2


def token_vectors(data, vocab_size, width, seed=0):
    """Vectors of all ids from the training rows `data` -> float32 (V,width) of standard deviation 1.

    The `width` leading eigenvectors, each times the fourth root of its eigenvalue: the square root shares an eigenvalue
    between both sides of the product, and half of that again keeps the few largest from drowning the rest. Ids that
    never occur are zero; their rows start to move with the first gradient.
    """
    pmi = positive_pmi(count_neighbours(data, vocab_size))
    rank = min(width, vocab_size)
    q = np.random.default_rng(seed).standard_normal((vocab_size, min(rank + 32, vocab_size)), dtype=np.float32)
    for _ in range(5):  # subspace iteration (0909.4061, algorithm 4.4)
        q, _ = np.linalg.qr(pmi @ q)
    values, turn = np.linalg.eigh(q.T @ (pmi @ q))
    largest = np.argsort(-np.abs(values))[:rank]
    vectors = np.zeros((vocab_size, width), np.float32)
    vectors[:, :rank] = q @ turn[:, largest] * np.abs(values[largest]) ** 0.5
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.maximum(length, 1e-3 * max(length.max(), 1e-9)) ** 0.5
    return torch.from_numpy(vectors / max(vectors.std(), 1e-9))
