"""Fits and draws the losses of law.json: law_128.png, law_512.png, and the fits on the screen.

    python records/anchors/law.py
"""
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from lib.scaling import draw, law

with open(os.path.join(HERE, "law.json"), encoding="utf-8") as file:
    points = json.load(file)
for length in ("128", "512"):
    runs = {arm: [(float(flops), loss) for flops, loss in losses.items()]
            for arm, losses in points[length].items()}
    found = law(runs)
    print(f"rows of {length} tokens")
    for arm, fitted in found["arms"].items():
        print(f"  {arm:<12} loss = {fitted['a']:.3g} x FLOPs ** -{fitted['alpha']:.4f} "
              f"[{fitted['alpha_90'][0]:.4f}, {fitted['alpha_90'][1]:.4f}]")
    for crossing in found["crossings"]:
        low, high = crossing["flops_90"]
        print(f"  {crossing['arms'][1]} passes {crossing['arms'][0]} at {crossing['flops']:.2g} "
              f"[{low:.2g}, {high:.2g}]")
    draw(runs, os.path.join(HERE, f"law_{length}.png"))
