"""Train with one masking, judge on another: the table and the picture of matrix.json.

    python records/importance/matrix.py
"""
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    with open(os.path.join(HERE, "matrix.json"), encoding="utf-8") as file:
        runs = json.load(file)["nats"]
    trained, judged = list(runs), list(next(iter(runs.values()))["1"])
    means = np.array([[np.mean([losses[masks] for losses in runs[arm].values()])
                       for masks in judged] for arm in trained])
    best = means.min(0)
    print("| trained with | " + " | ".join(judged) + " |\n|---|" + "---:|" * len(judged))
    for arm, row in zip(trained, means):
        cells = [f"**{x:.3f}**" if x == low else f"{x:.3f}" for x, low in zip(row, best)]
        print(f"| {arm} | " + " | ".join(cells) + " |")

    figure, axes = plt.subplots(figsize=(6.2, 4.4), dpi=130)
    image = axes.imshow(means - best, cmap="YlOrRd", vmin=0, vmax=1.5)
    for (y, x), loss in np.ndenumerate(means):
        above = loss - best[x]
        axes.text(x, y, f"{loss:.2f}", ha="center", va="center", fontsize=8,
                  color="white" if above > 0.9 else "black")
    names = [name.replace("_", " ") for name in judged]
    axes.set_xticks(range(len(judged)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(trained)), [name.replace("_", " ") for name in trained])
    axes.set(xlabel="judged on the masks of", ylabel="trained with")
    figure.colorbar(image, label="nats above the best of the column")
    figure.tight_layout()
    figure.savefig(os.path.join(HERE, "matrix.png"))


main()
