"""Token mixers without attention: long convolutions whose kernels are damped oscillators, and FNet.

    ids -> ... -> Resonance: each token reads all others of the row, O(T log T)

A Resonance mixes the tokens of a row by one long convolution a channel. Its kernel is a sum of
n_frequency learned oscillators that die away; channels share the oscillators and weigh each of them
with an amplitude and a phase of their own:

    k[t, c] = sum_m  g_m exp(-a_m t) (A_mc cos(w_m t) - B_mc sin(w_m t)),
    g_m = sqrt(1 - exp(-2 a_m))

These are the kernels of diagonal state spaces (S4D, 2206.11893) with Hyena's gates around them
(2302.10866). The number of parameters does not depend on the length of the rows. A causal model
also runs as a recurrence, `extend`, whose state is n_frequency x d complex numbers at any length.
What a kernel reads depends on distances alone, not on content; only the gates see content.

Shapes: B rows, T tokens, d width, m oscillators (n_frequency).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib import kernels

SHORT = 3  # tokens that the short convolution before the gates sees
# Memories of the oscillators at the start, in tokens: spread evenly in logarithm between the two.
SHORTEST, LONGEST = 2.0, 1000.0


class Resonance(nn.Module):
    """Long convolution between two gates: x (B,T,d) -> (B,T,d).

    causal: a token reads itself and those before it. Otherwise also those behind it, with
    amplitudes of their own. Tokens that are not real are neither read nor do they answer.
    """

    def __init__(self, d, n_frequency, causal, bias=False):
        super().__init__()
        self.causal = causal
        self.wi = nn.Linear(d, 3 * d, bias=bias)
        # three tokens for each channel, so that gates and values know the order of neighbours
        self.taps = nn.Parameter(torch.empty(3 * d, SHORT))
        # Decays, frequencies and amplitudes: tables, not matrices, whose start is set below.
        self.log_decay = nn.Parameter(torch.empty(n_frequency))
        self.frequency = nn.Parameter(torch.empty(n_frequency))
        n_side = 1 if causal else 2
        self.amplitude = nn.Parameter(torch.empty(n_side, 2, n_frequency, d))
        self.through = nn.Parameter(torch.ones(d))  # what a channel passes on of its own token
        self.out = nn.Linear(d, d, bias=bias)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        n = len(self.frequency)
        self.taps.normal_(0, SHORT ** -0.5)
        self.log_decay.copy_(torch.linspace(-math.log(LONGEST), -math.log(SHORTEST), n))
        # Frequencies evenly from slow to fast, in an order of their own, so that slow and fast
        # oscillators occur with long and short memories.
        golden = torch.arange(1, n + 1, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) % 1
        self.frequency.copy_(math.pi * golden)
        self.amplitude.normal_(0, (2 * n) ** -0.5)
        self.through.fill_(1.0)

    def forward(self, x_BTd, real_BT=None):
        q, u = self.gate(hide(self.wi(hide(x_BTd, real_BT)), real_BT), real_BT)
        kernel = self.kernel(x_BTd.shape[1])
        y_BTd = kernels.long_convolution(u, *kernel).to(u.dtype) + self.through * u
        return self.out(hide(q * y_BTd, real_BT))

    def gate(self, h_BTm, real_BT=None, before=None):
        """-> the gate q behind the convolution and what is convolved, u = k * v, both (B,T,d).

        before (B, SHORT - 1, 3 d): the inputs of the tokens before these; None: there are none.
        """
        q, k, v = self.short(h_BTm, before).chunk(3, dim=-1)
        return q, hide(k * v, real_BT)

    def short(self, h_BTm, before=None):
        """Depthwise convolution over SHORT tokens; causal: those before, otherwise both sides."""
        taps = self.taps.to(h_BTm.dtype)
        if not self.causal:
            return kernels.depthwise_convolution(h_BTm, taps)
        T = h_BTm.shape[1]
        if before is None:
            h_BTm = F.pad(h_BTm, (0, 0, SHORT // 2, 0))
            return kernels.depthwise_convolution(h_BTm, taps)[:, :T]
        # the first SHORT // 2 outputs would be of tokens that came earlier
        h_BTm = torch.cat((before.to(h_BTm.dtype), h_BTm), dim=1)
        return kernels.depthwise_convolution(h_BTm, taps)[:, SHORT // 2:][:, :T]

    def kernel(self, T):
        """-> kernel (T,d) of what a token reads before it and, unless causal, behind it (T,d).

        The first number is that of the token itself; behind it that is 0, or it would count twice.
        """
        # fp32 (or float64): a long memory has a decay close to 0, and angles grow with T.
        full = torch.promote_types(self.frequency.dtype, torch.float32)
        with torch.autocast(self.frequency.device.type, enabled=False):
            step_T = torch.arange(T, device=self.frequency.device, dtype=full)
            decay_m1, size_m1 = (x[:, None] for x in self.decay())
            wave_mT = torch.exp(-decay_m1 * step_T) * size_m1
            angle_mT = self.frequency.to(full)[:, None] * step_T
            basis = torch.cat((wave_mT * angle_mT.cos(), -wave_mT * angle_mT.sin()))
            # channels first, as the convolution wants them
            before, *behind = (x_nd.T @ basis for x_nd in self.amplitude.to(full).flatten(1, 2))
            if behind:
                behind = [behind[0] * (step_T > 0)]
        return before.T, *(x.T for x in behind)

    def decay(self):
        """a (m,) > 0, and the factor g that gives oscillators of all memories the same energy."""
        full = torch.promote_types(self.log_decay.dtype, torch.float32)
        decay_m = self.log_decay.to(full).exp()
        return decay_m, torch.sqrt(-torch.expm1(-2 * decay_m))

    # ---- one token after the other -----------------------------------------------------------

    def start(self, B):
        """-> the state before the first token: inputs of the short convolution, oscillators."""
        d, device = self.out.in_features, self.out.weight.device
        full = torch.promote_types(self.frequency.dtype, torch.float32)
        return [torch.zeros(B, SHORT - 1, 3 * d, device=device, dtype=self.out.weight.dtype),
                torch.zeros(B, 2, len(self.frequency), d, device=device, dtype=full)]

    def extend(self, x_BTd, past, real_BT=None):
        """forward for the tokens that follow those in `past`, which it brings up to date. (B,T,d)

        Causal only. Rows may begin with padding, which leaves the state at zero.
        """
        before, state = past
        h_BTm = hide(self.wi(hide(x_BTd, real_BT)), real_BT)
        past[0] = torch.cat((before.to(h_BTm.dtype), h_BTm), dim=1)[:, -(SHORT - 1):]
        q, u = self.gate(h_BTm, real_BT, before)
        T, full = u.shape[1], state.dtype
        decay_m, size_m = self.decay()
        step_t1 = torch.arange(T + 1, device=u.device, dtype=full)[:, None]
        wave_tm, angle_tm = torch.exp(-decay_m * step_t1), self.frequency.to(full) * step_t1
        cos_tm, sin_tm = wave_tm * angle_tm.cos(), wave_tm * angle_tm.sin()
        # What still rings of the past, and what the new tokens add to each other.
        a_md, b_md = self.amplitude[0].to(full) * size_m[:, None]
        real, imaginary = state.unbind(1)
        ringing_BTd = (cos_tm[1:] @ (a_md * real - b_md * imaginary)
                       - sin_tm[1:] @ (a_md * imaginary + b_md * real))
        y_BTd = kernels.long_convolution(u, *self.kernel(T)) + ringing_BTd
        # The state after the last token: the old one turned on, each new token from its own place.
        turn = cos_tm[T, :, None], sin_tm[T, :, None]
        new = cos_tm[:T].flip(0).T @ u.to(full), sin_tm[:T].flip(0).T @ u.to(full)
        past[1] = torch.stack((real * turn[0] - imaginary * turn[1] + new[0],
                               real * turn[1] + imaginary * turn[0] + new[1]), dim=1)
        return self.out(hide(q * (y_BTd.to(u.dtype) + self.through * u), real_BT))

    def flops(self, T, B=1):
        """Multiply-adds a row of T tokens in batches of B, forward, transforms included."""
        d, n_side = self.out.in_features, len(self.amplitude)
        kernel = n_side * T * 2 * len(self.frequency) * d / B  # once for all rows
        return T * d * (4 * d + 3 * SHORT) + kernel + self.transform_flops(T, B)

    def transform_flops(self, T, B=1):
        """The part that the Fourier transforms have in flops; 2.5 N log2 N operations each."""
        N = kernels.transform_length(T)
        n_transform = 2 + 1 / B  # inputs, result, and the kernel of both sides once for all rows
        return n_transform * self.out.in_features * 2.5 * N * math.log2(N) / 2


class ResonantMixer(Resonance):
    """In place of a LocalMixer: normalises, mixes the whole row, adds to the stream."""

    def __init__(self, cfg):
        super().__init__(cfg.token_width, cfg.n_frequency, causal=False, bias=cfg.bias)
        self.norm, self.drop = nn.LayerNorm(cfg.token_width, bias=cfg.bias), nn.Dropout(cfg.dropout)

    def forward(self, x_BTd, real_BT=None, documents_BT=None):
        return x_BTd + self.drop(super().forward(self.norm(x_BTd), real_BT))


class Fourier(nn.Module):
    """FNet's mixer: the real part of a Fourier transform over tokens and channels (2105.03824).

    No parameters. It is a control: neither causal nor right for rows with padding.
    """
    # Scaled so that numbers keep their size: the transform of n unit numbers has size sqrt(n).

    def forward(self, x_BTd, real_BT=None):
        full = torch.promote_types(x_BTd.dtype, torch.float32)
        with torch.autocast(x_BTd.device.type, enabled=False):
            mixed = torch.fft.fft2(x_BTd.to(full), dim=(1, 2), norm="ortho").real
        return mixed.to(x_BTd.dtype) * math.sqrt(2)

    def flops(self, T, d):
        """Multiply-adds of a row of T tokens of width d, forward: a complex transform."""
        return 5 * T * d * math.log2(max(2, T * d)) / 2


def hide(x_BTd, real_BT):
    """Zeros at tokens that are not real; None: all are."""
    return x_BTd if real_BT is None else x_BTd * real_BT[..., None]
