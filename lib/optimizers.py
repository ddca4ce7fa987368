"""StableAdamW, and a test that finds a learning rate.

StableAdamW is AdamW that clips the update of each tensor, in place of clipping the gradient. Where
gradients grow suddenly, the second moment is too old for a while and AdamW's updates are far larger
than the learning rate. StableAdamW (2304.13013, algorithm 2) measures by how much, as the root mean
square of gradient / sqrt(second moment), and divides the learning rate by that where it is above 1.
ModernBERT and Ettin train with it and without gradient clipping.

In the range test the learning rate rises step by step until the loss does (1506.01186, 3.3). It
brackets the learning rates worth trying and no more: a short test at the start of training says
nothing of the end. It takes as many updates as RATES, from fresh weights, and keeps nothing.
"""

import math
import os

import numpy as np
import torch

from lib.files import print_result, replace_file, write_json
from lib.machine import say

RATES = np.geomspace(1e-6, 0.1, 120)
SMOOTH = 0.9  # of the running mean of the loss
LEAST = 10  # updates before the test may end


class StableAdamW(torch.optim.Optimizer):
    """Arguments as torch.optim.AdamW. Weight decay is decoupled and scaled by the learning rate."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def update(self, p, group):
        state, g, (beta1, beta2), eps = self.state[p], p.grad, group["betas"], group["eps"]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        # Means over the updates so far: with these betas there is no bias to correct.
        first = 1 - (1 - beta1) / (1 - beta1 ** state["step"])
        second = 1 - (1 - beta2) / (1 - beta2 ** state["step"])
        state["exp_avg"].lerp_(g, 1 - first)
        state["exp_avg_sq"].lerp_(g.square(), 1 - second)
        rms = (g.square() / state["exp_avg_sq"].clamp(min=eps**2)).mean().sqrt()
        lr = group["lr"] / rms.clamp(min=1)
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + eps))


# ---- range test ---------------------------------------------------------------------------------

def find_learning_rate(masked_batch, forward_backward, update, machine, out_dir):
    """range_test with the parts of a step of train.py; prints its result."""
    def step(rate, number):
        loss = forward_backward(*masked_batch(number))
        update(rate)
        return machine.all_sum(loss)[0]

    found = range_test(step)
    if machine.is_main:
        path = write_test(found, out_dir)
        say(f"{path}: {found['why']}\ntry --learning_rate={found['suggested']:.1e}")
        print_result(dict(out_dir=out_dir, suggested=found["suggested"], lowest=found["lowest"],
                          why=found["why"], picture=path))
    machine.close()


def range_test(step):
    """step(rate, number): one update -> its loss. -> {"rates", "losses", "smooth", "suggested",
    "lowest", "why"}, up to where the smoothed loss was twice the lowest, or not finite.
    """
    losses, smooth, mean = [], [], 0.0
    for number, rate in enumerate(RATES):
        loss = step(float(rate), number)
        if not math.isfinite(loss):
            break
        mean = SMOOTH * mean + (1 - SMOOTH) * loss
        losses.append(loss)
        smooth.append(mean / (1 - SMOOTH ** (number + 1)))  # without the bias of its start at 0
        if number >= LEAST and smooth[-1] > 2 * min(smooth):
            break
    if len(smooth) <= LEAST:
        raise ValueError(f"the loss is not finite after {len(smooth)} updates with learning rates "
                         f"below {RATES[len(smooth)]:.1e}: look at the data and at the model, "
                         "--overfit_tokens=1024 first")
    return suggest(RATES[:len(smooth)].tolist(), losses, smooth)


def suggest(rates, losses, smooth):
    """Where the smoothed loss falls fastest, and a tenth of where it is lowest."""
    slope = np.gradient(smooth, np.log(rates))
    # The mean of the first few losses moves with each of them.
    at, lowest = LEAST + int(slope[LEAST:].argmin()), int(np.argmin(smooth))
    why = (f"the loss falls fastest at {rates[at]:.1e} and is lowest at {rates[lowest]:.1e}, a "
           f"tenth of which is {rates[lowest] / 10:.1e}: the peak belongs between the two")
    if slope[at] >= 0:
        why = "the loss never falls: --overfit_tokens=1024 says whether the model learns at all"
    return dict(rates=rates, losses=losses, smooth=smooth, suggested=rates[at],
                lowest=rates[lowest], why=why)


def write_test(found, out_dir):
    """lr_find.json and lr_find.png. -> the path of the picture."""
    from matplotlib.figure import Figure

    os.makedirs(out_dir, exist_ok=True)
    write_json(os.path.join(out_dir, "lr_find.json"), found)
    figure = Figure(figsize=(7, 4.2), dpi=110)
    axes = figure.add_axes((0.09, 0.13, 0.88, 0.8))
    axes.plot(found["rates"], found["losses"], color="0.75", lw=0.8, label="loss of each update")
    axes.plot(found["rates"], found["smooth"], color="C0", label="smoothed")
    axes.axvspan(min(found["suggested"], found["lowest"] / 10),
                 max(found["suggested"], found["lowest"] / 10), color="C2", alpha=0.2,
                 label="worth trying as a peak")
    axes.set(xscale="log", xlabel="learning rate", ylabel="nats a predicted token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path = os.path.join(out_dir, "lr_find.png")
    replace_file(path, lambda file: figure.savefig(file, format="png"))
    return path
