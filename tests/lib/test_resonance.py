"""Promises of lib/resonance.py: exact convolutions, no look ahead, padding that is not there, and a
recurrence that says the same."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib import kernels
from lib.resonance import Fourier, Resonance

T, D = 37, 6


def resonance(causal, m=5):
    torch.manual_seed(0)
    mixer = Resonance(D, m, causal, bias=True).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return mixer


def row(seed=0, B=2, T=T):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("T", [1, 2, 13, 16])
def test_the_transform_is_the_convolution_written_out(sides, T):
    """Values and gradients, for lengths that are no power of two as well."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, T, D), *(torch.randn(T, D) for _ in range(sides))]
    tensors = [t.double().requires_grad_() for t in tensors]
    assert torch.allclose(kernels.long_convolution(*tensors),
                          kernels.long_convolution_reference(*tensors), atol=1e-13)
    assert torch.autograd.gradcheck(kernels.long_convolution, tensors)


def test_bf16_is_transformed_in_fp32():
    u, kernel = row(T=12)[:, :, :3].bfloat16(), torch.randn(12, 3)
    exact = kernels.long_convolution_reference(u.float(), kernel)
    assert torch.allclose(kernels.long_convolution(u, kernel), exact, atol=1e-5)


def test_the_kernel_is_a_sum_of_damped_oscillators():
    mixer = resonance(causal=False)
    mixer.requires_grad_(False)
    before, behind = mixer.kernel(T)
    decay, size = mixer.decay()
    for t in (0, 1, 20):
        for kernel, (a, b) in zip((before, behind), mixer.amplitude):
            waves = [size[m] * math.exp(-decay[m] * t)
                     * (a[m] * math.cos(mixer.frequency[m] * t) - b[m] * math.sin(
                         mixer.frequency[m] * t)) for m in range(5)]
            expected = 0 if kernel is behind and t == 0 else sum(waves)
            assert torch.allclose(kernel[t], torch.as_tensor(expected).double(), atol=1e-12)


def test_a_causal_mixer_never_sees_a_later_token():
    mixer, x = resonance(causal=True), row()
    changed = x.clone()
    changed[:, 20] += 1
    difference = (mixer(x) - mixer(changed)).abs().amax((0, 2))
    assert difference[:20].max() <= 1e-12 < 1e-3 < difference[20:].min()


def test_a_bidirectional_mixer_sees_both_sides():
    mixer, x = resonance(causal=False), row()
    changed = x.clone()
    changed[:, 20] += 1
    assert (mixer(x) - mixer(changed)).abs().amax((0, 2)).min() > 1e-4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("left", [0, 4])
def test_padding_changes_nothing(causal, left):
    mixer, x = resonance(causal), row()
    noise = row(seed=1)
    padded = torch.cat((noise[:, :left], x, noise[:, :7]), dim=1)
    real = torch.zeros(2, padded.shape[1], dtype=torch.bool)
    real[:, left:left + T] = True
    found = mixer(padded, real)
    assert (found[:, left:left + T] - mixer(x)).abs().max() <= 1e-12


@pytest.mark.parametrize("pieces", [[T], [1] * T, [10, 1, 1, 25]])
def test_the_recurrence_is_the_convolution(pieces):
    mixer, x = resonance(causal=True), row()
    past = mixer.start(2)
    found = torch.cat([mixer.extend(part, past) for part in x.split(pieces, dim=1)], dim=1)
    assert (found - mixer(x)).abs().max() <= 1e-12


def test_rows_may_begin_with_padding_in_the_recurrence():
    mixer, x, noise = resonance(causal=True), row(), row(seed=1)
    real = torch.cat((torch.zeros(2, 4), torch.ones(2, T)), dim=1).bool()
    past, padded = mixer.start(2), torch.cat((noise[:, :4], x), dim=1)
    found = [mixer.extend(padded[:, :9], past, real[:, :9])]
    found += [mixer.extend(padded[:, i:i + 1], past, real[:, i:i + 1]) for i in range(9, T + 4)]
    assert (torch.cat(found, dim=1)[:, 4:] - mixer(x)).abs().max() <= 1e-12


def test_the_kernel_does_not_grow_with_the_row():
    """The first numbers of a kernel are the same for every length."""
    mixer = resonance(causal=False)
    for short, long in zip(mixer.kernel(10), mixer.kernel(1000)):
        assert torch.allclose(short, long[:10], atol=1e-14)


class Numbers(TorchDispatchMode):
    """Counts the numbers that all operations write."""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            self.total += t.numel() if isinstance(t, torch.Tensor) else 0
        return result


def test_memory_and_work_are_linear_in_the_row():
    mixer, totals = resonance(causal=False), []
    for n in (512, 4096):
        with Numbers() as numbers, torch.no_grad():
            mixer(row(T=n))
        totals.append(numbers.total)
    assert totals[1] / totals[0] == pytest.approx(8, rel=0.1)


def test_all_oscillators_start_with_the_same_energy():
    decay, size = Resonance(D, 8, causal=True).double().decay()
    t = torch.arange(20_000).double()[:, None]
    energy = (size * torch.exp(-decay * t)).square().sum(0)
    assert torch.allclose(energy, torch.ones(8).double(), atol=1e-6)


def test_fnet_is_the_real_part_of_a_two_dimensional_transform():
    x = row()
    expected = torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real / math.sqrt(T * D) * math.sqrt(2)
    assert torch.allclose(Fourier()(x), expected, atol=1e-12)
