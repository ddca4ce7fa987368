"""Scores of tokens: learned from losses, the same for any order and number of processes."""

import numpy as np
import pytest
import torch

from lib import importance as module
from lib.importance import Importance
from lib.machine import Machine
from masking import SCORES, MaskedBatch

V = 60


class Tok:
    vocab_size, pad_id = V, 0
    is_special = np.arange(V) >= 58

    def decode(self, ids):
        return f" {ids[0]}"


class Data:
    """Rows in which low ids are frequent."""
    n_blocks, padded = 40, False

    def block(self, index):
        rng = np.random.default_rng(0)
        ids = np.minimum(rng.geometric(0.08, (self.n_blocks, 32)), 57)
        return torch.from_numpy(ids[index])


CPU = Machine(torch.device("cpu"), 0, 1)


def scorer(kind="ema", machine=CPU):
    return Importance(kind, Data(), Tok(), 0.3, machine)


def predictions(ids, seed=0, K=10):
    g = torch.Generator().manual_seed(seed)
    positions = torch.rand(ids.shape, generator=g).argsort(1)[:, :K]
    weights = 0.5 + torch.rand(len(ids), K, generator=g)
    return MaskedBatch(ids, positions, ids.gather(1, positions), weights,
                       torch.ones(len(ids), K, dtype=torch.bool))


def by_id(batch):
    """Losses that depend on the id alone, and not as its frequency does."""
    return (batch.targets * 37 % 11).float()


@pytest.mark.parametrize("kind", SCORES)
def test_before_anything_is_learned_rare_tokens_score_high(kind):
    ids = Data().block(np.arange(40))
    scores = scorer(kind).scores(ids)
    count = torch.bincount(ids.flatten(), minlength=V)[ids]
    assert scores.shape == ids.shape and not scores.requires_grad
    assert torch.allclose(scores.float(), -(count / ids.numel() + module.NEW_IDS).log(), atol=1e-4)


def test_a_running_mean_comes_to_the_loss_of_each_id():
    ema, ids = scorer(), Data().block(np.arange(40))
    for step in range(200):
        batch = predictions(ids, step)
        ema.learn(batch, by_id(batch))
    often = torch.bincount(ids.flatten(), minlength=V)[ids] > 20
    assert torch.allclose(ema.scores(ids)[often], (ids * 37 % 11).double()[often], atol=0.01)


def test_frequencies_never_change():
    fixed, ids = scorer("frequency"), Data().block(np.arange(40))
    before = fixed.scores(ids)
    batch = predictions(ids)
    fixed.learn(batch, by_id(batch))
    assert torch.equal(fixed.scores(ids), before)


def test_running_means_do_not_depend_on_the_order_bit_for_bit():
    ids = Data().block(np.arange(40))
    batch, nats = predictions(ids), torch.rand(40, 10) * 9
    order = torch.randperm(40)
    one, other = scorer(), scorer()
    one.learn(batch, nats)
    other.learn(MaskedBatch(*(tensor[order] for tensor in batch)), nats[order])
    assert torch.equal(one.mean_V, other.mean_V)


def test_a_loss_that_is_not_finite_is_left_out():
    ids = Data().block(np.arange(40))
    for kind in ("ema", "model"):
        ours = scorer(kind)
        ours.scores(ids)
        batch = predictions(ids)
        nats = by_id(batch)
        nats[::2] = float("nan")
        ours.learn(batch, nats)
        assert ours.scores(ids).isfinite().all()


def test_the_estimator_learns_what_no_frequency_tells():
    """The loss of a token depends on the token before it."""
    model, ids = scorer("model"), Data().block(np.arange(40))
    cost_BT = (ids.roll(1, 1) % 2 * 4).float()
    for step in range(150):
        model.scores(ids)
        batch = predictions(ids, step)
        model.learn(batch, cost_BT.gather(1, batch.positions))
    found, inner = model.scores(ids), slice(2, -2)
    corr = torch.corrcoef(torch.stack((found[:, inner].flatten(), cost_BT[:, inner].flatten())))
    assert corr[0, 1] > 0.8


def test_learning_is_about_the_training_rows_even_if_others_are_scored_between():
    ids, others = Data().block(np.arange(20)), Data().block(np.arange(20, 40))
    batch, states = predictions(ids), []
    for between in (False, True):
        model = scorer("model")
        model.scores(ids)
        if between:
            model.of(others)
        model.learn(batch, by_id(batch))
        states.append(model.estimator.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_no_gradient_flows_between_losses_and_scores():
    model, ids = scorer("model"), Data().block(np.arange(40))
    weight = torch.ones((), requires_grad=True)
    scores = model.scores(ids)
    batch = predictions(ids)
    model.learn(batch, (by_id(batch) * weight).detach())
    assert not scores.requires_grad and weight.grad is None
    assert all(p.grad is not None for p in model.estimator.parameters())


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_what_was_learned_can_be_saved_and_loaded(kind, tmp_path):
    first, ids = scorer(kind), Data().block(np.arange(40))
    for step in range(3):
        first.scores(ids)
        batch = predictions(ids, step)
        first.learn(batch, by_id(batch))
    torch.save(first.state(), tmp_path / "state.pt")
    second = scorer(kind)
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    for ours in (first, second):
        ours.scores(ids)
        batch = predictions(ids, 7)
        ours.learn(batch, by_id(batch))
    assert torch.equal(first.scores(ids), second.scores(ids))


def test_scores_of_another_kind_or_vocabulary_are_refused():
    with pytest.raises(ValueError, match="importance=model, but the checkpoint.*importance=ema"):
        scorer("model").load(scorer("ema").state())
    state = scorer().state() | dict(mean_V=torch.zeros(7))
    with pytest.raises(ValueError, match="7 token ids.*60.*another vocabulary"):
        scorer().load(state)
