"""Initial token vectors: tokens that occur in the same contexts get similar ones."""

import numpy as np
import pytest
import torch

from lib import start


class Rows:
    """Stands in for TokenData: rows in memory."""
    def __init__(self, ids):
        self.ids, (self.n_blocks, self.block_size) = ids, ids.shape

    def block(self, index):
        return self.ids[index]


def language(rows=200, T=32, topics=4, words=20, seed=0):
    """Each row holds words of one topic; ids topics * words and above never occur."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, words, (rows, T)) + words * rng.integers(0, topics, (rows, 1))


def test_counts_and_pmi_agree_with_a_plain_loop():
    ids, V = language(rows=3, T=12), 90
    counts, window = np.zeros((V, V)), start.WINDOW
    for row in ids:
        for i in range(len(row)):
            for j in range(max(0, i - window), min(len(row), i + window + 1)):
                if i != j:
                    counts[row[i], row[j]] += abs(i - j) ** -0.6
    found = start.count_neighbours(Rows(ids), V)
    assert np.allclose(found.toarray(), counts, rtol=1e-5)
    share = counts.sum(1) / counts.sum()
    context = share**0.75 / (share**0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.nan_to_num(np.maximum(np.log(counts / counts.sum() / np.outer(share, context)), 0))
    assert np.allclose(start.positive_pmi(found).toarray(), (pmi + pmi.T) / 2, atol=1e-4)


def test_words_of_a_topic_are_close_and_others_are_not():
    vectors = start.token_vectors(Rows(language()), vocab_size=90, width=8)
    assert vectors.shape == (90, 8) and vectors.dtype == torch.float32
    assert abs(vectors.std() - 1) < 1e-3
    v = torch.nn.functional.normalize(vectors[:80], dim=-1)
    same = torch.arange(80)[:, None] // 20 == torch.arange(80) // 20
    near = v @ v.T
    assert near[same].mean() > 0.8 and near[~same].mean() < 0.2
    assert (vectors[80:] == 0).all(), "ids that never occur have no neighbours"


def test_the_same_bins_give_the_same_vectors():
    again = [start.token_vectors(Rows(language()), 90, 8, seed=1) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize(
    "ids", [np.zeros((1, 1), int), np.zeros((1, 2), int), np.arange(6).reshape(1, 6)], ids=str)
def test_next_to_no_text_gives_finite_vectors(ids):
    vectors = start.token_vectors(Rows(ids), vocab_size=10, width=16)
    assert vectors.shape == (10, 16) and torch.isfinite(vectors).all()
