"""The report of a folder of runs: one table, pictures, and a page that holds both.

    python tools/sweep.py report --dir=out/sweep_demo

Every training run below the folder takes part, whether a sweep has made it or not. Runs that differ
in their seed alone are one point with an error bar. Files, in the folder: report.csv (a row for
each run), report.md, report_*.png and report.html, which needs no other file.
"""

import base64
import glob
import html
import json
import math
import os
import re
import statistics

import numpy as np
import torch

from data.tokenizer import Tokenizer
from lib.files import read_object, replace_file
from lib.log import read_log
from lib.run import FIXED, checkpoint_paths, first_readable
from lib.scaling import noise_of
from lib.settings import build_model
from tools.measures import SMALLBENCH
from tools.metrics import glue_fields, markdown, model_fields, of_weights, read_glue
from tools.ranking import curve_of, write_csv
from tools.sweep_run import status_of

# What a loss is drawn against: {column: (heading, logarithmic)}
AXES = {"embed_share": ("share of the token table in all parameters", False),
        "glu": ("ffn_dim over the width of a layer", False),
        "params": ("parameters", True), "tokens": ("tokens", True),
        "flops": ("training FLOPs", True), "seconds": ("seconds of training", True)}
# What a front is drawn over: less of it and a lower loss are both better.
COSTS = {"params": "parameters", "flops": "training FLOPs",
         "latency_ms": "ms to fill a mask in a row of 128 tokens"}
BENCH = [f"smallbench_{name}_acc" for name in (*SMALLBENCH, "avg")]
# Settings that say where and how a run was made, and nothing of what it has learned.
UNTOLD = ("out_dir", "device", "compile", "log_interval", "save_minutes", "stop_at_step", "wandb",
          "log_to", "git", "torch", "data_dir")
ALIKE = ("auto", "scratch", "resume")  # values of init_from with which a run begins by itself


# ---- the runs ---------------------------------------------------------------------


def find_runs(folder):
    """-> [run], each a dict of columns, "settings" and "curve"; [folder of a run that cannot take
    part, for want of an evaluation or a readable checkpoint]. Raises ValueError if there is none.
    """
    runs, left_out = [], []
    for log in sorted(glob.glob(os.path.join(glob.escape(folder), "**", "log.jsonl"),
                                recursive=True)):
        path = os.path.dirname(log)
        run = read_run(path, folder)
        if run:
            runs.append(run)
        elif os.path.exists(os.path.join(path, "config.json")):
            left_out.append(os.path.relpath(path, folder))
    if not runs:
        raise ValueError(f"{folder} holds no run with an evaluation and a checkpoint; train first: "
                         "python train.py, or python tools/sweep.py")
    return runs, left_out


def read_run(path, folder):
    """A run's folder -> its columns; None without an evaluation or a readable checkpoint."""
    records = read_log(path)
    curve = curve_of(records)
    try:
        _, paths, _ = checkpoint_paths(path)
        _, checkpoint = first_readable(paths, say=lambda _: None)
        tok = Tokenizer.load(os.path.join(path, "tokenizer"))
    except (OSError, ValueError):
        return None
    if not curve:
        return None
    settings = checkpoint["settings"]
    with torch.device("meta"):
        shape = model_fields(build_model(checkpoint["model_settings"]), tok, settings)
    metrics, tuned = read_object(os.path.join(path, "metrics.json")), glue_fields(
        of_weights(read_glue(path), checkpoint))
    minutes = [r["minutes"] for r in records if r.get("minutes")]
    tokens, loss = curve[-1]
    return dict(
        run=os.path.relpath(path, folder), status=status_of(path) or ending_of(path),
        arch=shape["arch"], seed=settings.get("seed"), loss=loss,
        best_loss=min(loss for _, loss in curve), tokens=tokens, params=shape["total_params"],
        embed_share=shape["embedding_ratio"],
        glu=shape["glu_expansion"], n_layer=shape["n_layers"], width=shape["d_model"],
        n_concept=shape["n_concepts"], flops=shape["flops_per_token"] * tokens,
        seconds=60 * minutes[-1] if minutes else None,
        latency_ms=metrics.get("latency_batch1_seq128_ms"),
        **{name: tuned[name] for name in BENCH},
        settings=settings, curve=curve, data=checkpoint["data_sha256"])


def ending_of(path):
    """Why a run without status.json ended: "max_steps", ...; "unfinished" where it goes on."""
    try:
        checkpoint = torch.load(os.path.join(path, "ckpt.pt"), weights_only=True, mmap=True)
        return checkpoint["stopped"] or "unfinished"
    except Exception:  # missing, damaged, or older than this field
        return "unknown"


def is_whole(run):
    """Whether a run has used its budget, so that its loss may stand beside others."""
    return run["status"] in ("done", "ranked", "unknown", "max_steps", "max_minutes", "patience",
                             "overfit")


def at_equal_tokens(runs):
    """Runs of a sweep with rungs, each as it was after the first of them, where all were ranked;
    other runs as they are -> runs, sentences on those that trained on.
    """
    ends, found, notes = {}, [], []  # {folder of a sweep: tokens of its first rung}
    for run in runs:
        if run["status"] == "ranked":
            sweep = os.path.dirname(run["run"])
            ends[sweep] = min(run["tokens"], ends.get(sweep, math.inf))
    for run in runs:
        end = ends.get(os.path.dirname(run["run"]), 0) if run["status"] in ("ranked", "done") else 0
        points = [point for point in run["curve"] if 0 < point[0] <= end]
        if points and points[-1][0] < run["tokens"]:
            tokens, loss = points[-1]
            part = tokens / run["tokens"]
            notes.append(f"{run['run']} is shown after {tokens:,} tokens, where the arms were "
                         f"ranked; it trained on, to {run['loss']:.4f} nats after "
                         f"{run['tokens']:,} tokens.")
            run = run | dict(loss=loss, tokens=tokens, flops=run["flops"] * part,
                             seconds=run["seconds"] and run["seconds"] * part)
        found.append(run)
    return found, notes


def arms_of(runs):
    """Runs that differ in their seed alone -> [[run, ...]], the lowest median loss first."""
    groups = {}
    for run in runs:
        told = {name: value for name, value in run["settings"].items()
                if name not in UNTOLD and name != "seed"
                and not (name == "init_from" and value in ALIKE)}
        groups.setdefault(json.dumps([told, run["data"]], sort_keys=True), []).append(run)
    return sorted(groups.values(), key=lambda arm: median(arm, "loss"))


def median(arm, name):
    values = [run[name] for run in arm if run[name] is not None]
    if not values:
        return None
    # of a count one that occurs; of two losses not the lower one
    middle = statistics.median if isinstance(values[0], float) else statistics.median_low
    return middle(values)


def varied(runs):
    """Settings in which the runs differ, but for the seed."""
    names = dict.fromkeys(name for run in runs for name in run["settings"])
    def value_of(run, name):
        value = str(run["settings"].get(name))
        return "" if name == "init_from" and value in ALIKE else value

    return [name for name in names if name not in (*UNTOLD, "seed")
            and len({value_of(run, name) for run in runs}) > 1]


def name_of(arm):
    """The name of an arm: that of its folder, without seed and hash."""
    return re.sub(r"_s\d+(_[0-9a-f]{8})?$", "", arm[0]["run"])


# ---- fronts and fits ---------------------------------------------------------------


def front(points):
    """[(cost, loss)] -> the indices of those that no other one beats in both, cheapest first."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    best, found = math.inf, []
    for i in order:
        if points[i][1] < best:
            best = points[i][1]
            found.append(i)
    return found


def iso_flop(arms, draws=500):
    """Arms with equal FLOPs and three sizes or more -> the size with the lowest loss by a parabola
    in the logarithm, {"flops", "params", "params_90", "loss"}; None where there is no minimum.
    """
    points = [(median(arm, "params"), median(arm, "loss"), median(arm, "flops")) for arm in arms]
    middle = statistics.median(flops for *_, flops in points)
    points = [(params, loss) for params, loss, flops in points if abs(flops / middle - 1) < 0.05]
    if len({params for params, _ in points}) < 3:
        return None
    noise = noise_of({i: [(run["flops"], run["loss"]) for run in arm]
                      for i, arm in enumerate(arms)})
    x, losses = np.log([p for p, _ in points]), np.array([loss for _, loss in points])

    def lowest(losses):
        a, b, c = np.polyfit(x, losses, 2)
        return (-b / 2 / a, c - b * b / 4 / a) if a > 0 else (math.nan, math.nan)
    at, loss = lowest(losses)
    if not x.min() <= at <= x.max():
        return None
    random = np.random.default_rng(0)
    again = [lowest(losses + noise * random.standard_normal(len(losses)))[0] for _ in range(draws)]
    low, high = np.nanquantile(again, [0.05, 0.95])
    return dict(flops=middle, params=math.exp(at), loss=float(loss),
                params_90=[math.exp(low), math.exp(high)])


# ---- pictures ------------------------------------------------------------------------


def new_axes(**labels):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(**labels)
    return figure, axes


def draw_against(arms, column):
    """Losses against a column, the seeds of an arm as an error bar -> Figure, None if it does not
    vary.
    """
    points = [(median(arm, column), sorted(run["loss"] for run in arm), name_of(arm))
              for arm in arms if median(arm, column) is not None]
    values = {x for x, *_ in points}
    if len(values) < 2:
        return None
    heading, is_log = AXES[column]
    figure, axes = new_axes(xlabel=heading, ylabel="validation loss, nats",
                            xscale=scale_of(values) if is_log else "linear")
    for x, losses, name in points:
        middle = statistics.median(losses)
        axes.errorbar(x, middle, [[middle - losses[0]], [losses[-1] - middle]], fmt="o", ms=4,
                      color="C0", capsize=3)
        if len(points) <= 16:
            label(axes, name, x, middle)
    return figure


def scale_of(values):
    """A logarithmic axis for values that differ by more than a factor of three."""
    return "log" if max(values) > 3 * min(values) else "linear"


def label(axes, name, x, y):
    axes.annotate(name.replace("$", r"\$"), (x, y), (5, 3), textcoords="offset points", fontsize=7,
                  color="0.35")


def draw_fronts(arms):
    """Losses over each cost, those that nothing beats in both joined by a line -> Figure."""
    from matplotlib.figure import Figure

    known = [cost for cost in COSTS
             if len({median(arm, cost) for arm in arms if median(arm, cost)}) > 1]
    if not known:
        return None, {}
    figure = Figure(figsize=(5 * len(known), 4), dpi=110, layout="constrained")
    fronts = {}
    for number, cost in enumerate(known, 1):
        axes = figure.add_subplot(1, len(known), number)
        chosen = [arm for arm in arms if median(arm, cost) is not None]
        points = [(median(arm, cost), median(arm, "loss")) for arm in chosen]
        best = front(points)
        fronts[cost] = [name_of(chosen[i]) for i in best]
        axes.plot(*zip(*points), "o", ms=4, color="0.6")
        axes.plot(*zip(*(points[i] for i in best)), "o-", ms=5, color="C3")
        for i in best:
            label(axes, name_of(chosen[i]), *points[i])
        axes.set(xscale=scale_of({x for x, _ in points}), xlabel=COSTS[cost],
                 ylabel="validation loss, nats")
        axes.spines[["top", "right"]].set_visible(False)
    return figure, fronts


def draw_curves(arms):
    figure, axes = new_axes(
        xlabel="tokens", ylabel="validation loss, nats", xscale=scale_of(
            {tokens for arm in arms for run in arm for tokens, _ in run["curve"] if tokens} or {1}))
    for number, arm in enumerate(arms[:10]):
        for i, run in enumerate(arm):
            points = [(tokens, loss) for tokens, loss in run["curve"] if tokens]
            axes.plot(*zip(*points or [(1, math.nan)]), color=f"C{number}", lw=1.1,
                      label=None if i else name_of(arm).replace("$", r"\$"))
    axes.legend(frameon=False, fontsize=7)
    return figure


def draw_smallbench(arms):
    """Accuracies on the four small tasks, of arms with results of finetune_glue.py -> Figure."""
    shown = [arm for arm in arms if any(median(arm, name) is not None for name in BENCH)]
    if not shown:
        return None
    figure, axes = new_axes(ylabel="accuracy, median over seeds")
    width = 0.8 / len(shown)
    for number, arm in enumerate(shown):
        values = np.array([median(arm, name) for name in BENCH], float)  # None becomes nan: no bar
        bars = axes.bar(np.arange(len(BENCH)) + number * width, values, width,
                        label=name_of(arm).replace("$", r"\$"))
        if len(shown) <= 4:
            axes.bar_label(bars, fmt="%.3f", fontsize=6, color="0.35")
    axes.set_xticks(np.arange(len(BENCH)) + 0.4 - width / 2, [*SMALLBENCH, "average"])
    figure.legend(frameon=False, fontsize=7, loc="outside upper center", ncols=3)
    return figure


# ---- the report ------------------------------------------------------------------------


def tell(value):
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.2e}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def table_of(arms, names):
    """-> head, rows of text: an arm a row."""
    columns = [name for name in ("params", "embed_share", "glu", "tokens", "flops", "seconds",
                                 "latency_ms", BENCH[-1])
               if any(median(arm, name) is not None for arm in arms)]
    head = ["arm", "seeds", "loss", *columns, *names]
    rows = []
    for arm in arms:
        losses = sorted(run["loss"] for run in arm)
        spread = "" if len(losses) < 2 else f" [{losses[0]:.3f}, {losses[-1]:.3f}]"
        rows.append([name_of(arm), str(len(arm)), f"{median(arm, 'loss'):.4f}{spread}",
                     *(tell(median(arm, column)) for column in columns),
                     *(tell(arm[0]["settings"].get(name)) for name in names)])
    return head, rows


def notes_on(arms, fronts):
    """What the numbers say, in sentences."""
    spread = [max(r["loss"] for r in arm) - min(r["loss"] for r in arm) for arm in arms
              if len(arm) > 1]
    notes = [f"{sum(map(len, arms))} runs, {len(arms)} arms; the lowest loss is "
             f"{median(arms[0], 'loss'):.4f} nats, of {name_of(arms[0])}."]
    if spread:
        notes.append(f"Seeds of one arm differ by up to {max(spread):.3f} nats: differences below "
                     "that decide nothing.")
    else:
        notes.append("Every arm has one seed: how far seeds differ is not known.")
    different = [name for name in ("eval_rows", "block_size", *FIXED)
                 if name != "seed" and len({str(run["settings"].get(name)) for arm in arms
                                            for run in arm}) > 1]
    if len({json.dumps(run["data"]) for arm in arms for run in arm}) > 1:
        notes.append("The runs were trained on different data; their losses do not compare.")
    elif {"eval_rows", "block_size"} & set(different):
        notes.append("Losses are of different validation rows: eval_rows or block_size differ.")
    if len({run["settings"].get("objective", "mlm") == "clm" for arm in arms for run in arm}) > 1:
        notes.append("Losses of decoders are of every next token and do not compare with those of "
                     "masked tokens.")
    for cost, names in fronts.items():
        notes.append(f"Front over {COSTS[cost]}: {', '.join(names)}.")
    fit = iso_flop(arms)
    if fit:
        low, high = fit["params_90"]
        notes.append(f"At {fit['flops']:.2g} FLOPs a parabola has its minimum at "
                     f"{fit['params']:,.0f} parameters, 90 % [{low:,.0f}, {high:,.0f}].")
    return notes


PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto;
padding: 0 1rem; color: #1f2024; background: #fcfbf8; }}
h1, h2 {{ font-weight: 500; }} .scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }}
th, td {{ text-align: right; white-space: nowrap; padding: .3rem .7rem;
border-bottom: 1px solid #e3e1da; }}
th:first-child, td:first-child {{ text-align: left; }} tr:nth-child(2) td {{ font-weight: 600; }}
img {{ max-width: 100%; height: auto; }} .pictures {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
.pictures figure {{ margin: 0; max-width: 560px; }} .wide {{ max-width: 100% !important; }}
</style><h1>{title}</h1>{notes}<h2>Arms</h2><div class="scroll">{table}</div>
<h2>Pictures</h2><div class="pictures">{pictures}</div></html>
"""


def write_report(folder):
    """report.csv, report.md, report_*.png and report.html of a folder -> a summary."""
    runs, left_out = find_runs(folder)
    whole = [run for run in runs if is_whole(run)]
    if not whole:
        raise ValueError(f"{folder}: none of its {len(runs)} runs has used its budget; the command "
                         "that has started them goes on with them")
    equal, about_rungs = at_equal_tokens(whole)
    arms, names = arms_of(equal), varied(whole)
    hidden = ("settings", "curve", "data")
    write_csv(os.path.join(folder, "report.csv"), [
        {key: value for key, value in run.items() if key not in hidden}
        | {name: run["settings"].get(name) for name in names} for run in runs])
    figures = {"curves": draw_curves(arms)} | {
        column: draw_against(arms, column) for column in AXES}
    figures["fronts"], fronts = draw_fronts(arms)
    figures["smallbench"] = draw_smallbench(arms)
    figures = {name: figure for name, figure in figures.items() if figure}
    for name, figure in figures.items():
        replace_file(os.path.join(folder, f"report_{name}.png"),
                     lambda file, figure=figure: figure.savefig(file, format="png"))
    notes, (head, rows) = notes_on(arms, fronts), table_of(arms, names)
    notes += about_rungs
    notes += [f"{run['run']} is left out here, but in report.csv: {run['status']} at "
              f"{run['tokens']:,} tokens, {run['loss']:.4f} nats."
              for run in runs if not is_whole(run)]
    notes += [f"{name} is left out: its log holds no evaluation, or its checkpoint cannot be read."
              for name in left_out]
    title = os.path.basename(os.path.abspath(folder))
    text = [f"# {title}", "", *notes, "", *markdown(head, "l" + "r" * (len(head) - 1), [
        [cell.replace("|", "\\|") for cell in row] for row in rows])]
    text += [f"![{name}](report_{name}.png)" for name in figures]
    replace_file(os.path.join(folder, "report.md"),
                 lambda file: file.write("\n".join(text).encode("utf-8", "replace")))
    page = PAGE.format(title=html.escape(title),
                       notes="".join(f"<p>{html.escape(note)}</p>" for note in notes),
                       table=html_table(head, rows),
                       pictures="".join(html_picture(folder, name) for name in figures))
    replace_file(os.path.join(folder, "report.html"),
                 lambda file: file.write(page.encode("utf-8", "replace")))
    return dict(dir=folder, runs=len(runs), arms=len(arms), best=name_of(arms[0]),
                loss=median(arms[0], "loss"), fronts=fronts,
                page=os.path.join(folder, "report.html"))


def html_table(head, rows):
    def cells(kind, row):
        return "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)
    lines = [cells("th", head), *(cells("td", row) for row in rows)]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def html_picture(folder, name):
    with open(os.path.join(folder, f"report_{name}.png"), "rb") as file:
        data = base64.b64encode(file.read()).decode()
    kind = ' class="wide"' if name == "fronts" else ""
    return f'<figure{kind}><img alt="{name}" src="data:image/png;base64,{data}"></figure>'
