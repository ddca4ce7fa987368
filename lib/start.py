"""Initial token embeddings from co-occurrence counts of the training text.

    count neighbours within WINDOW tokens -> positive pointwise mutual information (PPMI)
    -> low-rank factorisation -> token vectors (V, width)

Much of what an embedding table learns first is which tokens occur in the same contexts. Counting
finds that in seconds, so a short run need not spend its first steps on it. Factorised PMI is close
to what word2vec learns (Levy and Goldberg, Neural word embedding as implicit matrix factorization,
2014). It works for any architecture: --init_table=cooccurrence.
"""

import math

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix

MOST_TOKENS = 20_000_000  # read at most; a quarter of a minute for a vocabulary of 16,000
PART_TOKENS = 2_000_000  # counted at once, which bounds the memory
WINDOW = 6  # neighbours up to so many tokens away count, at distance n by n ** -0.6
# Power of the context frequencies, as in word2vec's negative sampling (1310.4546, section 2.2).
# Without it the largest PMI values would belong to rare neighbours.
SMOOTHING = 0.75


def count_neighbours(data, vocab_size):
    """How often ids occur within WINDOW tokens of each other -> symmetric sparse (V,V) float32.

    A pair counts by its distance. Rows are spread evenly over `data`, no pair joins two rows.
    """
    n_rows = max(1, min(data.n_blocks, MOST_TOKENS // data.block_size))
    chosen = np.arange(n_rows) * data.n_blocks // n_rows
    counts = csr_matrix((vocab_size, vocab_size), dtype=np.float32)
    for rows in np.array_split(chosen, math.ceil(n_rows * data.block_size / PART_TOKENS)):
        ids = np.asarray(data.block(rows)).astype(np.int32)
        distances = range(1, min(WINDOW + 1, ids.shape[1]))
        if distances:  # rows of one token have no neighbours
            left = np.concatenate([ids[:, :-n].ravel() for n in distances])
            right = np.concatenate([ids[:, n:].ravel() for n in distances])
            weight = np.concatenate([np.full(ids[:, n:].size, n**-0.6, np.float32)
                                     for n in distances])
            counts = counts + coo_matrix((weight, (left, right)), counts.shape).tocsr()
    return counts + counts.T


def positive_pmi(counts):
    """Counts -> pointwise mutual information in nats where it is positive, else 0; sparse (V,V).

    PMI(a, b) = log(P(a, b) / (P(a) P'(b))): how much more often a and b are neighbours than by
    chance. P' is the frequency smoothed by SMOOTHING. Averaged over (a, b) and (b, a), because
    the smoothing makes it asymmetric.
    """
    counts = counts.tocoo()
    if not counts.nnz:
        return counts
    total = counts.sum(dtype=np.float64)
    share = np.asarray(counts.sum(1), dtype=np.float64).ravel() / total
    context = share**SMOOTHING / (share**SMOOTHING).sum()
    # float32, because these arrays have an entry for every pair that occurs.
    pmi = np.log(counts.data / np.float32(counts.data.sum(dtype=np.float64)))
    with np.errstate(divide="ignore"):  # log(0) for ids that never occur, which have no pairs
        pmi -= np.log(share).astype(np.float32)[counts.row]
        pmi -= np.log(context).astype(np.float32)[counts.col]
    kept = pmi > 0
    positive = csr_matrix((pmi[kept], (counts.row[kept], counts.col[kept])), counts.shape)
    return (positive + positive.T) / 2


def token_vectors(data, vocab_size, width, seed=0):
    """Vectors of all ids from the training rows `data` -> float32 (V,width), standard deviation 1.

    They come from the `width` leading eigenvectors of the PPMI matrix. Ids that never occur get
    zeros, which training then changes.
    """
    pmi = positive_pmi(count_neighbours(data, vocab_size))
    rank = min(width, vocab_size)
    # Randomised subspace iteration (0909.4061, algorithm 4.4): q converges to an orthonormal basis
    # of the leading eigenvectors. 32 more columns than needed make five rounds enough.
    shape = vocab_size, min(rank + 32, vocab_size)
    q = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    for _ in range(5):
        q, _ = np.linalg.qr(pmi @ q)
    values, rotation = np.linalg.eigh(q.T @ (pmi @ q))
    largest = np.argsort(-np.abs(values))[:rank]
    # With the square root of the eigenvalues, products of two vectors approximate their PPMI.
    vectors = np.zeros((vocab_size, width), np.float32)
    vectors[:, :rank] = q @ rotation[:, largest] * np.abs(values[largest]) ** 0.5
    # Each vector's length becomes its square root, so that a few long vectors do not dominate the
    # table. The floor keeps the rounding noise of nearly empty rows from being scaled up.
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.maximum(length, 1e-3 * max(length.max(), 1e-9)) ** 0.5
    return torch.from_numpy(vectors / max(vectors.std(), 1e-9))
