"""The chunked cross-entropy against torch's own, and what it promises about memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lib import loss


def batch(lexicon, B=3, K=7, d=8, V=50, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype, requires_grad=True)
    inputs = [draw(B, K, d), draw(V, d)] + ([draw(B, V), draw(B, K, 4)] if lexicon else [])
    weights = torch.rand(B, K, generator=g).to(dtype)
    weights[1, 3:] = 0
    return inputs, torch.randint(0, V, (B, K), generator=g), weights


def both(inputs, targets, weights):
    states, table, *words = inputs
    chunked = loss.cross_entropy(states, table, targets, weights, *words)
    logits = loss.logits(states, table, *words).flatten(0, 1)
    whole = (F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, targets.flatten(),
                             reduction="none") * weights.flatten()).sum()
    return chunked, whole


@pytest.mark.parametrize("chunk", [1, 150, 10**6], ids=lambda n: f"chunk={n}")
@pytest.mark.parametrize("lexicon", [False, True])
def test_value_and_gradients_are_those_of_torch(lexicon, chunk, monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", chunk)
    inputs, targets, weights = batch(lexicon)
    chunked, whole = both(inputs, targets, weights)
    assert abs(chunked - whole) < 1e-12
    for ours, theirs in zip(torch.autograd.grad(3 * chunked, inputs), torch.autograd.grad(3 * whole, inputs)):
        assert (ours - theirs).abs().max() < 1e-12
    with torch.no_grad():
        assert loss.cross_entropy(inputs[0], inputs[1], targets, weights, *inputs[2:]) == chunked.detach()


@pytest.mark.parametrize("lexicon", [False, True])
def test_under_autocast_only_the_products_lose_precision(lexicon):
    inputs, targets, weights = batch(lexicon, dtype=torch.float32)
    exact = both(inputs, targets, weights)[1]
    exact_grads = torch.autograd.grad(exact, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss.cross_entropy(inputs[0], inputs[1], targets, weights, *inputs[2:])
    assert rough.dtype == torch.float32 and abs(rough / exact - 1) < 5e-3
    for rough_grad, grad in zip(torch.autograd.grad(rough, inputs), exact_grads):
        assert rough_grad.dtype == torch.float32
        assert F.cosine_similarity(rough_grad.flatten(), grad.flatten(), dim=0) > 0.999


def test_no_more_than_a_chunk_of_fp32_logits_is_ever_held(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
                    self.numel = max(self.numel, t.numel())
            return out
    monkeypatch.setitem(loss.CHUNK, "cpu", 2048)
    inputs, targets, weights = batch(True, B=4, K=64, V=512, dtype=torch.float32)  # 131,072 logits
    with torch.autocast("cpu", torch.bfloat16), Largest() as largest:
        loss.cross_entropy(inputs[0], inputs[1], targets, weights, *inputs[2:]).backward()
    assert largest.numel <= 512 * 8  # the table's gradient
