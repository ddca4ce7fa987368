"""Each kernel against its reference: values, gradients, and the memory that the loss promises."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lib import kernels


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
    chunked, nats = kernels.cross_entropy(states, table, targets, weights, *words)
    whole, expected = kernels.cross_entropy_reference(states, table, targets, weights, *words)
    assert not nats.requires_grad and torch.allclose(nats, expected)
    return chunked, whole


@pytest.mark.parametrize("chunk", [1, 150, 10**6], ids=lambda n: f"chunk={n}")
@pytest.mark.parametrize("lexicon", [False, True])
def test_value_and_gradients_are_those_of_torch(lexicon, chunk, monkeypatch):
    monkeypatch.setitem(kernels.CHUNK, "cpu", chunk)
    inputs, targets, weights = batch(lexicon)
    chunked, whole = both(inputs, targets, weights)
    assert abs(chunked - whole) < 1e-12
    for ours, theirs in zip(
        torch.autograd.grad(3 * chunked, inputs), torch.autograd.grad(3 * whole, inputs)
    ):
        assert (ours - theirs).abs().max() < 1e-12
    with torch.no_grad():
        assert (
            kernels.cross_entropy(inputs[0], inputs[1], targets, weights, *inputs[2:])[0]
            == chunked.detach()
        )


@pytest.mark.parametrize("lexicon", [False, True])
def test_under_autocast_only_the_products_lose_precision(lexicon):
    inputs, targets, weights = batch(lexicon, dtype=torch.float32)
    exact = both(inputs, targets, weights)[1]
    exact_grads = torch.autograd.grad(exact, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = kernels.cross_entropy(inputs[0], inputs[1], targets, weights, *inputs[2:])
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

    monkeypatch.setitem(kernels.CHUNK, "cpu", 2048)
    inputs, targets, weights = batch(True, B=4, K=64, V=512, dtype=torch.float32)  # 131,072 logits
    with torch.autocast("cpu", torch.bfloat16), Largest() as largest:
        kernels.cross_entropy(inputs[0], inputs[1], targets, weights, *inputs[2:])[0].backward()
    assert largest.numel <= 512 * 8  # the table's gradient


@pytest.mark.parametrize("mask", [None, "keys", "pairs"])
@pytest.mark.parametrize("n_query", [3, 600])
def test_bf16_attention_on_a_cpu_is_that_of_torch(n_query, mask):
    g = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 3, n, 16, generator=g).bfloat16().requires_grad_() for n in (n_query, 40, 40)
    ]
    if mask:
        mask = torch.rand(2, 1, n_query if mask == "pairs" else 1, 40, generator=g) < 0.7
        mask[..., 0] = True
    with torch.autocast("cpu", torch.bfloat16):
        ours = kernels.attention(*inputs, mask)
    theirs = kernels.attention_reference(*(t.float() for t in inputs), mask)
    assert ours.dtype == torch.bfloat16 and torch.allclose(ours.float(), theirs, atol=0.03)
    weight = torch.randn(ours.shape, generator=g)
    for a, b in zip(
        *(torch.autograd.grad((out.float() * weight).sum(), inputs) for out in (ours, theirs))
    ):
        assert F.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0) > 0.9995


@pytest.mark.parametrize("T", [3, 40])
def test_convolution_agrees_with_torch(T):
    g = torch.Generator().manual_seed(0)
    u, taps = (
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((2, T, 6), (6, 5))
    )
    ours = kernels.depthwise_convolution(u, taps)
    theirs = kernels.depthwise_convolution_reference(u, taps)
    assert torch.allclose(ours, theirs)
    weight = torch.randn(ours.shape, generator=g, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad((out * weight).sum(), (u, taps)) for out in (ours, theirs))
    ):
        assert torch.allclose(a, b)


# ---- attention in one direction, within a window, within a document --------------------


def visibles(T=37):
    """Every combination of direction, window, documents and padding. -> [(name, Visible)]."""
    documents = torch.arange(T).div(9, rounding_mode="floor").expand(2, -1)
    real = torch.ones(2, T, dtype=torch.bool)
    real[1, 30:] = False
    return [(f"causal={causal} window={window} documents={isolated} padding={padded}",
             kernels.Visible(T, "cpu", real if padded else None,
                             (documents, documents) if isolated else None, causal, window))
            for causal in (False, True) for window in (0, 4, 7)
            for isolated in (False, True) for padded in (False, True)]


@pytest.mark.parametrize("visible", [v for _, v in visibles()], ids=[n for n, _ in visibles()])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_all_ways_to_attend_agree_with_the_mask_written_out(visible):
    """Blocks, fused causal attention and FlexAttention; values, and gradients of what is real."""
    T, g = 37, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 8, generator=g).double().requires_grad_() for _ in range(3))
    allowed = torch.ones(2, T, T, dtype=torch.bool)
    for b in range(2):
        for i in range(T):
            for j in range(T):
                documents = visible.documents
                allowed[b, i, j] &= not visible.causal or j <= i
                allowed[b, i, j] &= not visible.window or abs(i - j) <= visible.window
                allowed[b, i, j] &= documents is None or bool(
                    documents[0][b, i] == documents[1][b, j])
                allowed[b, i, j] &= visible.real_BN is None or bool(visible.real_BN[b, j])
    real = torch.ones(2, T, dtype=torch.bool) if visible.real_BN is None else visible.real_BN
    weight = real[:, None, :, None].double()
    mask = allowed | ~allowed.any(-1, keepdim=True)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]) * weight
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    found = kernels.attention(q, k, v, visible) * weight
    assert torch.allclose(found, expected, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found.square().sum(), (q, k, v)), gradients):
        assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        flex = kernels.flex_attention(*(t.detach() for t in (q, k, v)), visible) * weight
        assert torch.allclose(flex, expected, atol=1e-12)
        weights = kernels.softmax_weights(q @ k.mT * 8**-0.5, visible)
        assert torch.allclose(weights @ v * weight, expected, atol=1e-12)


def test_a_window_costs_no_scores_of_the_whole_row():
    """In a row of 4,096 tokens nothing is as large as the scores of one head."""
    q, k, v = (torch.randn(1, 2, 4096, 8) for _ in range(3))
    with LargestTensor() as largest, torch.no_grad():
        kernels.attention(q, k, v, kernels.Visible(4096, "cpu", window=32))
    assert largest.numbers < 4096 * 4096 / 8


class LargestTensor(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result
