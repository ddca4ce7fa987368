"""Fits and draws the losses of law.json: law_128.png, law_512.png, law_2048.png, how far each arm
is from the Transformer in gap.png; the fits and a table on the screen.

    python records/anchors/law.py
"""
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lib.scaling import draw, law

BASE = "transformer"
FIT_TO = 3.4e14  # FLOPs. At 1e15 a run goes over the text five times, and the losses leave the power law
NAMES = dict(strict="strict", open="open", open_4="open, 1 concept for 4 tokens",
             look="open that also reads all tokens", mixers="local mixers alone",
             copy="Transformer with a copy head", transformer="Transformer")


def draw_gap(lengths):
    """lengths: {tokens a row: {arm: {FLOPs: {seed: loss}}}}. The dots are differences at equal seed."""
    figure, panels = plt.subplots(1, len(lengths), figsize=(4 * len(lengths), 4), dpi=130,
                                  sharex=True, sharey=True)
    for axes, (length, arms) in zip(panels, lengths.items()):
        axes.axhline(0, color="0.6", lw=1)
        for number, arm in enumerate(NAMES):
            if arm == BASE or arm not in arms:
                continue
            gaps = {float(flops): [loss - arms[BASE][flops][seed] for seed, loss in seeds.items()
                                   if seed in arms[BASE][flops]]
                    for flops, seeds in arms[arm].items() if flops in arms[BASE]}
            budgets = sorted(flops for flops in gaps if gaps[flops])
            axes.plot(budgets, [sum(gaps[x]) / len(gaps[x]) for x in budgets], color=f"C{number}", lw=1.2,
                      label=NAMES[arm])
            axes.plot([x for x in budgets for _ in gaps[x]], [y for x in budgets for y in gaps[x]], ".",
                      color=f"C{number}")
        axes.set(xscale="log", xlabel="training FLOPs", title=f"rows of {int(length):,} tokens")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nats above the Transformer")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    lines = {line.get_label(): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
    named = [name for name in NAMES.values() if name in lines]
    figure.legend([lines[name] for name in named], named, loc="lower center", ncol=3, frameon=False)
    figure.savefig(os.path.join(HERE, "gap.png"))


def print_table(lengths):
    """The mean over the seeds of each arm, with their number behind it if there are several."""
    print("| tokens a row, training FLOPs | " + " | ".join(NAMES.values()) + " |")
    print("|---|" + "---:|" * len(NAMES))
    for length, arms in lengths.items():
        for flops in sorted({flops for losses in arms.values() for flops in losses}, key=float):
            seeds = {arm: list(arms.get(arm, {}).get(flops, {}).values()) for arm in NAMES}
            means = {arm: sum(losses) / len(losses) for arm, losses in seeds.items() if losses}
            best = min(means.values())
            cells = [f"{means[arm]:.3f}" if arm in means else "-" for arm in NAMES]
            cells = [f"**{cell}**" if arm in means and means[arm] == best else cell
                     for arm, cell in zip(NAMES, cells)]
            cells = [f"{cell} ({len(seeds[arm])})" if len(seeds[arm]) > 1 else cell
                     for arm, cell in zip(NAMES, cells)]
            print(f"| {int(length):,}, {flops} | " + " | ".join(cells) + " |")


with open(os.path.join(HERE, "law.json"), encoding="utf-8") as file:
    lengths = json.load(file)
del lengths["what"]
draw_gap(lengths)
print_table(lengths)
for length, arms in lengths.items():
    runs = {arm: [(float(flops), loss) for flops, seeds in losses.items() for loss in seeds.values()]
            for arm, losses in arms.items() if len(losses) > 1}
    found = law(runs, FIT_TO)
    print(f"rows of {length} tokens")
    for arm, fitted in found["arms"].items():
        print(f"  {arm:<12} loss = {fitted['a']:.3g} x FLOPs ** -{fitted['alpha']:.4f} "
              f"[{fitted['alpha_90'][0]:.4f}, {fitted['alpha_90'][1]:.4f}]")
    for crossing in found["crossings"]:
        low, high = crossing["flops_90"]
        print(f"  {crossing['arms'][1]} passes {crossing['arms'][0]} at {crossing['flops']:.2g} "
              f"[{low:.2g}, {high:.2g}]")
    draw(runs, os.path.join(HERE, f"law_{length}.png"), FIT_TO)
