"""A range test for the learning rate: it rises step by step until the loss does (1506.01186, 3.3).

It brackets the learning rates worth trying and no more: a short test at the start of training says
nothing of the end. It takes as many updates as RATES, from fresh weights, and keeps nothing.
"""

import math
import os

import numpy as np

from lib.files import replace_file, write_json

RATES = np.geomspace(1e-6, 0.1, 120)
SMOOTH = 0.9  # of the running mean of the loss
LEAST = 10  # updates before the test may end


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
    at, lowest = int(slope.argmin()), int(np.argmin(smooth))
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
