"""The table and the picture of runs.json: arms against uniform masks, with standard errors.

    python records/importance/verdict.py
    python records/importance/verdict.py OUT/curriculum_s1 OUT/reversed_s1 OUT/model_weighted_s1

With runs, also their curves with the ends of the stages (curves.png) and, of the last run, the
scores against the frequency of the ids and a paragraph coloured by them (scores.png).
"""
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BASE = "uniform"


def differences(runs, arm):
    """-> (mean difference to uniform over the seeds of both, standard error or nan)."""
    seeds = [seed for seed in runs[arm] if seed in runs[BASE]]
    found = np.array([runs[arm][seed] - runs[BASE][seed] for seed in seeds])
    error = found.std(ddof=1) / len(found) ** 0.5 if len(found) > 1 else float("nan")
    return found.mean(), error


def draw_verdict(sets, judged_on):
    """sets: {data: {arm: {seed: loss}}} for each kind of masks that judge."""
    figure, panels = plt.subplots(1, len(sets[0]), figsize=(5.5 * len(sets[0]), 4.5), dpi=130)
    for axes, name in zip(panels, sets[0]):
        arms = [arm for arm in sets[0][name] if arm != BASE]
        arms.sort(key=lambda arm: -differences(sets[0][name], arm)[0])
        for i, (runs, masks) in enumerate(zip(sets, judged_on)):
            means, errors = np.array([differences(runs[name], arm) for arm in arms]).T
            axes.errorbar(means, np.arange(len(arms)) + 0.2 * i, xerr=2 * np.nan_to_num(errors),
                          fmt="o", ms=4, lw=1, label=f"judged on masks of {masks}")
        axes.set_yticks(range(len(arms)), [arm.replace("_", " ") for arm in arms])
        axes.axvline(0, color="0.7", lw=0.8)
        axes.set(title=name, xlabel="nats above uniform masks, two standard errors")
        axes.locator_params(axis="x", nbins=6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncol=2, frameon=False)
    figure.savefig(os.path.join(HERE, "verdict.png"))


def draw_curves(folders):
    figure, axes = plt.subplots(figsize=(6.5, 4), dpi=130)
    for folder in folders:
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        steps, losses = zip(*((line["step"], line["val_loss"]) for line in lines
                              if "val_loss" in line and line["step"]))
        axes.plot(steps, losses, ".-", lw=1, label=os.path.basename(folder.rstrip("/")))
    for end in (0.33, 0.66):
        axes.axvline(end * steps[-1], color="0.7", lw=0.8, ls="--")
    axes.set(xlabel="step; dashed: ends of the stages", ylabel="validation loss, nats a token")
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(os.path.join(HERE, "curves.png"))


def draw_scores(folder):
    from data.reader import TokenData
    from lib.health import probe_rows
    from lib.importance import Importance
    from lib.machine import find_machine
    from lib.run import load_run

    _, tok, loaded = load_run(folder, "cpu")
    settings = loaded["settings"]
    T, name = settings["block_size"], settings["data_dir"]
    state = loaded["importance"]
    scorer = Importance(state["kind"], TokenData(name, "train", T, 0), tok,
                        settings["mlm_probability"], find_machine("cpu"))
    scorer.load(state)
    ids, _ = probe_rows(TokenData(name, "val", T, 0), tok, 256)
    scores = scorer.of_rows(ids)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), dpi=130,
                                         gridspec_kw=dict(width_ratios=[1, 1.3]))
    found, means, counts = scorer.by_id(ids, scores)
    prior = scorer.prior_V.cpu()[found].numpy()
    left.scatter(prior, means, s=3 + np.sqrt(counts.numpy()), alpha=0.3, lw=0)
    left.set(xlabel="-log of the share of the id in the training text, nats",
             ylabel="mean score of the id: nats it is expected to cost")
    left.spines[["top", "right"]].set_visible(False)
    # named: what is much easier or harder than its frequency says
    above = means.numpy() - np.polyval(np.polyfit(prior, means, 1), prior)
    above[counts.numpy() < 4] = 0
    for i in [*above.argsort()[:10], *above.argsort()[-6:]]:
        left.annotate(scorer.word(int(found[i])), (prior[i], means[i]), fontsize=6,
                      xytext=(3, 3), textcoords="offset points")

    row, x, y = ids[0].tolist(), 0.0, 0.95
    ranks = scores[0].argsort().argsort().double() / len(row)
    right.axis("off")
    for i, rank in zip(row, ranks.tolist()):
        text = tok.decode([i]).replace("\n", " ").replace("$", r"\$")
        width = 0.0135 * max(1, len(text))
        if x + width > 1:
            x, y = 0.0, y - 0.075
        right.text(x, y, text, fontsize=8, family="monospace", transform=right.transAxes,
                   bbox=dict(facecolor=plt.cm.YlOrRd(0.75 * rank), lw=0, pad=0.8))
        x += width
    right.set_title("darker: masked more often", fontsize=8)
    figure.tight_layout()
    figure.savefig(os.path.join(HERE, "scores.png"))


def main(folders):
    with open(os.path.join(HERE, "runs.json"), encoding="utf-8") as file:
        nats = json.load(file)["nats"]
    for masks, sets in nats.items():
        for name, runs in sets.items():
            print(f"\n| {name}, masks of {masks} | seeds | mean | above uniform |")
            print("|---|---|---:|---:|")
            for arm in sorted(runs, key=lambda arm: np.mean(list(runs[arm].values()))):
                losses = list(runs[arm].values())
                mean, error = differences(runs, arm)
                print(f"| {arm} | {', '.join(f'{x:.3f}' for x in losses)} | {np.mean(losses):.3f} "
                      + ("|" if arm == BASE else f"| {mean:+.3f} +- {error:.3f}") + " |")
    draw_verdict(list(nats.values()), list(nats))
    if folders:
        draw_curves(folders)
        draw_scores(folders[-1])


main(sys.argv[1:])
