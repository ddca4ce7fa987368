"""StableAdamW: AdamW where updates are of normal size, smaller steps where they are not."""

import pytest
import torch

from lib.optimizers import StableAdamW


def minimise(optimizer_class, gradients, **settings):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optimizer_class([p], lr=0.1, betas=(0.9, 0.98), eps=1e-6, **settings)
    for gradient in gradients:
        p.grad = torch.tensor(gradient)
        optimizer.step()
    return p.detach()


def test_steady_gradients_give_the_updates_of_adamw():
    """With one size of gradient its ratio to the second moment is 1: nothing is clipped."""
    steady = [[0.5, -0.25]] * 10
    ours = minimise(StableAdamW, steady, weight_decay=0.1)
    theirs = minimise(torch.optim.AdamW, steady, weight_decay=0.1)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_sudden_gradient_is_clipped_by_its_ratio_to_the_second_moment():
    gradients = [[0.01, 0.01]] * 20 + [[1.0, 1.0]]
    before = minimise(StableAdamW, gradients[:-1])
    update = minimise(StableAdamW, gradients) - before
    # by hand: moments of 20 small gradients and a large one, debiased
    weights = torch.tensor([0.9 ** (20 - i) for i in range(21)])
    first = (weights * torch.tensor([g[0] for g in gradients])).sum() / weights.sum()
    weights = torch.tensor([0.98 ** (20 - i) for i in range(21)])
    second = (weights * torch.tensor([g[0] ** 2 for g in gradients])).sum() / weights.sum()
    rms = 1 / second.sqrt()
    assert rms > 3
    assert update[0].item() == pytest.approx((-0.1 / rms * first / second.sqrt()).item(), rel=1e-3)


def test_its_state_is_saved_and_loaded():
    p = torch.nn.Parameter(torch.ones(3))
    one, other = StableAdamW([p], lr=0.1), StableAdamW([p], lr=0.1)
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    one.step()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.state[p]["exp_avg"], one.state[p]["exp_avg"])
    assert other.state[p]["step"] == 1
