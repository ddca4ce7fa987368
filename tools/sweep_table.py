"""What a sweep writes about its runs: results.json, results.csv, top1.json, table.md, law.json.

Used by tools/sweep.py. `results` are those of tools/sweep_run.py, each with "arm" and "seed";
by_arm is what group() makes of them; plans as in tools/sweep_plan.py.
"""

import os
import statistics

from lib import scaling
from lib.files import replace_file, say, write_json
from masking import MASKING_TYPES
from tools.compare import draw_losses
from tools.ranking import write_csv
from tools.sweep_run import HEALTH

# What each file holds if a sweep has written it, for lib.files.check_outputs.
MARKS = {"results.json": '"plans":', "table.md": "| MFLOP a token |",
         "results.csv": "arm,seed,loss", "top1.json": '"arguments":', "curves.png": "Matplotlib",
         "law.json": '"crossings":', "law.png": "Matplotlib"}


def group(results, plans):
    """-> {arm: its results by seed}, the best median loss first; arms without results are left out.
    """
    by_arm = {name: sorted((r for r in results if r["arm"] == name), key=lambda r: r["seed"])
              for name in plans}
    return dict(sorted(((name, runs) for name, runs in by_arm.items() if runs),
                       key=lambda item: median_loss(item[1])))


def median_loss(runs):
    return statistics.median(r["loss"] for r in runs)


def losses_of(by_arm):
    """-> {arm: [loss of each seed]}."""
    return {name: [r["loss"] for r in runs] for name, runs in by_arm.items()}


def spread(values, digits=3):
    """Median [smallest, largest]; "-" where nothing was measured."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    middle, low, high = (f"{function(values):.{digits}f}"
                         for function in (statistics.median, min, max))
    return middle if len(values) == 1 else f"{middle} [{low}, {high}]"


def table(by_arm, plans, evaluate):
    """Markdown with a row for each arm, in the order of by_arm. evaluate: with every masking.

    Losses are nats a predicted token, on the fixed masks of the evaluation.
    """
    maskings = MASKING_TYPES if evaluate else ()
    titles = ["arm", "parameters", "MFLOP a token", "tokens", "training FLOPs", "validation loss",
              "bits a byte", *(f"{masking} masks" for masking in maskings), *HEALTH]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for name, runs in by_arm.items():
        arm, n_tokens = plans[name], runs[0]["tokens"]
        cells = [name.replace("|", "\\|"), f"{arm['params']:,}", f"{arm['mflop_per_token']:.2f}",
                 f"{n_tokens:,}", f"{n_tokens * arm['mflop_per_token'] * 1e6:.2e}"]
        cells += [spread([r[key] for r in runs]) for key in ("loss", "bits_per_byte")]
        cells += [spread([r["maskings"].get(masking) for r in runs]) for masking in maskings]
        for key in HEALTH.values():
            digits = 1 if key == "concept_rank" else 3
            cells.append(spread([r["health"][key] for r in runs], digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(out_dir, by_arm, plans, config, evaluate):
    """results.json, table.md, results.csv and top1.json. config: the settings of the sweep."""
    in_order = [r for runs in by_arm.values() for r in runs]
    write_json(os.path.join(out_dir, "results.json"),
               dict(settings=config, plans=plans, results=in_order))
    text = table(by_arm, plans, evaluate) + "\n"
    replace_file(os.path.join(out_dir, "table.md"), lambda file: file.write(text.encode()))
    varied = {}
    for plan in plans.values():
        for key, value in plan["settings"].items():
            varied.setdefault(key, set()).add(str(value))
    names = [key for key, values in varied.items() if len(values) > 1]
    write_csv(os.path.join(out_dir, "results.csv"), [row_of(r, plans[r["arm"]], names)
                                                     for r in in_order])
    # arms that went on are ahead of those that stayed
    furthest = max(r["tokens"] for r in in_order)
    best = next(name for name, runs in by_arm.items() if runs[0]["tokens"] > 0.9 * furthest)
    plan, runs = plans[best], by_arm[best]
    write_json(os.path.join(out_dir, "top1.json"), dict(
        arm=best, loss=median_loss(runs), tokens=runs[0]["tokens"], params=plan["params"],
        shape=plan["shape"], arguments=plan["arguments"],
        settings={name: plan["settings"][name] for name in names}))


def row_of(r, plan, names):
    """A run's row of results.csv. names: of the settings in which arms differ."""
    return dict(arm=r["arm"], seed=r["seed"], loss=r["loss"], bits_per_byte=r["bits_per_byte"],
                tokens=r["tokens"], params=plan["params"],
                flops=r["tokens"] * plan["mflop_per_token"] * 1e6) | plan["shape"] | {
                    name: r["settings"].get(name) for name in names} | r["health"]


def draw_curves(out_dir, by_arm, plans):
    """curves.png."""
    draw_losses([(name, plans[name]["mflop_per_token"] * 1e6, [r["curve"] for r in runs])
                 for name, runs in by_arm.items()], os.path.join(out_dir, "curves.png"))


def write_law(out_dir, by_arm, plans):
    """law.json and law.png, of the arms that have finished two budgets."""
    runs = {}
    for name, found in by_arm.items():
        points = runs.setdefault(plans[name]["arm"], [])
        points += [(plans[name]["budget"], r["loss"]) for r in found]
    runs = {arm: runs[arm] for arm in dict.fromkeys(plan["arm"] for plan in plans.values())
            if len({budget for budget, _ in runs.get(arm, [])}) > 1}
    if not runs:
        return
    found = scaling.law(runs)
    write_json(os.path.join(out_dir, "law.json"), found)
    scaling.draw(runs, os.path.join(out_dir, "law.png"))
    for arm, of in found["arms"].items():
        low, high = of["alpha_90"]
        say(f"{arm}: loss = {of['a']:.3g} x FLOPs ** -{of['alpha']:.4f}, 90 % [{low:.4f}, "
            f"{high:.4f}], within {of['residual']:.3f} nats of its runs")
    for crossing in found["crossings"]:
        low, high = crossing["flops_90"]
        say(f"{' is better before, '.join(crossing['arms'])} after {crossing['flops']:.1e} FLOPs, "
            f"90 % [{low:.1e}, {high:.1e}]")
