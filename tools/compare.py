"""Trained runs side by side: tables, one picture of their losses, the settings that differ.

tools/eval.py measures the runs and gives what it found to this file, as a list of dicts with
path         folder or checkpoint of the run
summary      what eval.json holds of a run
fields       what metrics.json holds of a run
settings     of its training
curve        [(tokens seen, validation loss)], as logged in training
"""

import os

from lib.files import replace_file, write_json
from tools.measures import BOUND, CONCEPTS, KINDS, LATENCY_LENGTHS, LOSSES, shown
from tools.metrics import cell, markdown
from tools.terminal import columns

FACTS = ("arch", "bottleneck", "total_params", "embedding_params", "flops_per_token",
         "total_steps", "total_tokens", "total_flops", "training_time_seconds", "git_commit")
# Field: heading and format. On a CPU memory is that of the whole process, so it is left out.
SPEED = {"throughput_tokens_per_sec": ("reading rows, tokens/s", ",.0f"),
         **{f"latency_batch1_seq{T}_ms": (f"one row of {T} tokens, one mask, ms", ".2f")
            for T in LATENCY_LENGTHS},
         "gpu_memory_mb": ("peak memory of the GPU, MiB", ",.0f"),
         "weights_mb": ("weights, MiB", ",.1f")}
# Settings of the validation losses that training logs.
OF_CURVES = ("data_dir", "data_weights", "block_size", "eval_rows")


# ---- what may be compared ---------------------------------------------------------


def runs_to_compare(compare, first=""):
    """The setting `compare`, and a run before it -> paths. Raises ValueError for less than two."""
    paths = [path.strip() for path in [first, *compare.split(",")] if path.strip()]
    if len(paths) < 2:
        raise ValueError(f"compare={compare!r} is one run; expected two or more with commas "
                         "between, such as --compare=out/a,out/b")
    seen = {}
    for path in paths:
        place = os.path.realpath(path)
        if place in seen:
            raise ValueError(f"compare: {seen[place]} and {path} are the same run; name each once")
        seen[place] = path
    return paths


def check_comparable(paths, fingerprints, data_hashes, data_dirs, data_dir):
    """Raises ValueError if losses of these runs would not be of the same tokens."""
    first, *others = zip(paths, fingerprints, data_hashes, data_dirs)
    for path, fingerprint, data_hash, trained_on in others:
        if fingerprint != first[1]:
            raise ValueError(
                f"{first[0]} and {path} have different tokenizers, so their losses are about "
                "different tokens; what compares them is python tools/eval.py --pll=FILE on each")
        if data_hash != first[2] and not data_dir:
            raise ValueError(
                f"{first[0]} was trained on {first[3]}, {path} on other data, {trained_on}; say on "
                f"which text all of them are measured, for example --data_dir={first[3]}")


# ---- tables -----------------------------------------------------------------------


def heads_of(runs):
    """A short name for each run: its number, and its path below the folder they share."""
    places = [os.path.abspath(run["path"]) for run in runs]
    shared = os.path.commonpath([os.path.dirname(place) for place in places])
    return [f"{n} {os.path.relpath(place, shared)}" for n, place in enumerate(places, 1)]


def settings_that_differ(runs, defaults):
    """-> {name: [value in each run]}. defaults: of settings that older runs did not have."""
    settings = [defaults | run["settings"] for run in runs]
    names = dict.fromkeys(name for values in settings for name in values if name != "out_dir")
    found = {name: [values.get(name) for values in settings] for name in names}
    return {name: values for name, values in found.items()
            if any(value != values[0] for value in values)}


def loss_cells(losses):
    """Losses as cells; the lowest has a star."""
    known = [loss for loss in losses if loss is not None]
    return [shown(loss, ".4f") + ("*" if known and loss == min(known) else " ") for loss in losses]


def loss_sections(runs):
    """Tables of each data set: every masking, and single tokens by kind."""
    summary = runs[0]["summary"]
    for name, first in summary["data"].items():
        data = [run["summary"]["data"][name] for run in runs]
        kinds = [kind for kind in KINDS if any(kind in r for r in data)]
        title = (f"{name} {summary['split']}, {summary['rows'][name]} rows of "
                 f"{summary['block_size']} tokens, {summary['mlm_probability']:.0%} predicted, "
                 f"unigram entropy {first['unigram_entropy']:.3f} nats")
        # A decoder predicts from one side and encoders from both: never in one line of a table.
        named = {kind: "next tokens" if kind == "clm" else f"{kind} masks" for kind in kinds}
        rows = [(f"loss, {named[kind]}", loss_cells([r.get(kind, {}).get("loss") for r in data]))
                for kind in kinds]
        for measure in LOSSES:
            if measure.name in ("accuracy", "bits_per_byte"):
                rows += [(f"{measure.heading}, {named[kind]}",
                          [shown(r.get(kind, {}).get(measure.name), measure.form) + " "
                           for r in data]) for kind in kinds]
        yield title, rows
        # The masks are the same for all runs, and so is the share of each kind.
        masked = [r["token"] for r in data if "token" in r]
        if masked:
            yield "loss of token masks, by where the token stands, and the share of these tokens", [
                (f"{part}, {r['share']:.1%}",
                 loss_cells([other.get("token", {}).get("splits", {}).get(part, {}).get("loss")
                             for other in data]))
                for part, r in masked[0]["splits"].items()]
        if "nelbo" in summary:
            bounds = [run["summary"]["nelbo"][name] for run in runs]
            yield f"likelihood bound of this text, {bounds[0]['draws']} masks a row", [
                (m.heading, loss_cells([r[m.name] for r in bounds]) if m.name == "nats" else
                 [shown(r[m.name], m.form) + " " for r in bounds]) for m in BOUND]


def sections(runs, defaults):
    """Everything as tables -> [(title, [(label, [text for each run])])]."""
    found = [("runs", [(name, [cell(run["fields"][name]) for run in runs]) for name in FACTS])]
    found += loss_sections(runs)
    if any("speed" in run["summary"] for run in runs):
        found.append((f"speed, {runs[0]['fields']['dtype']} on {runs[0]['fields']['device']}, "
                      f"{runs[0]['fields']['num_threads']} threads", [
            (heading, [shown(run["summary"].get("speed", {}).get(name), form) for run in runs])
            for name, (heading, form) in SPEED.items()]))
    health = [run["summary"].get("health", {}).get("trained", {}) for run in runs]
    rows = [(measure.heading, [shown(column.get(measure.name), measure.form) for column in health])
            for measure in CONCEPTS if any(measure.name in column for column in health)]
    if rows:
        found.append(("health of the concepts; of a Transformer, of evenly spaced token states",
                      rows))
    differ = settings_that_differ(runs, defaults)
    rows = [(name, [str(value) for value in values]) for name, values in differ.items()]
    found.append(("settings that differ", rows or [("none", ["" for _ in runs])]))
    return found


def as_text(runs, defaults):
    """All tables for a terminal."""
    heads = heads_of(runs)
    parts = [f"{head}: {run['path']}" for head, run in zip(heads, runs)]
    for title, rows in sections(runs, defaults):
        parts.append(f"\n{title}\n{columns(heads, rows).rstrip()}")
    return "\n".join(parts) + "\n\n* the lowest loss"


def as_page(runs, defaults):
    """All tables in Markdown, with the picture."""
    heads, lines = heads_of(runs), ["# Runs side by side", ""]
    lines += [f"- {head}: `{run['path']}`" for head, run in zip(heads, runs)]
    lines += ["", "![validation loss](compare.png)", "", note_on_curves(runs, defaults), ""]
    for title, rows in sections(runs, defaults):
        table = [[text.strip().replace("|", "\\|") for text in (label, *cells)]
                 for label, cells in rows]
        head = ["", *(text.replace("|", "\\|") for text in heads)]
        lines += [f"## {title}", "", *markdown(head, "l" + "r" * len(runs), table)]
    return "\n".join(lines) + "\nA star marks the lowest loss; a dash is what was not measured.\n"


def note_on_curves(runs, defaults):
    """What the curves are of, and whether they are of the same rows."""
    differ = [name for name in OF_CURVES if name in settings_that_differ(runs, defaults)]
    note = "Curves: validation losses that each run logged in training"
    objectives = {run["settings"].get("objective", "mlm") == "clm" for run in runs}
    if len(objectives) > 1:
        note += " (dashed: of a decoder, every next token, not to be compared with masked ones)"
    if differ:
        return f"{note}, not on the same rows: {', '.join(differ)} differ."
    return f"{note}, on the same rows."


# ---- the picture --------------------------------------------------------------------


def draw_losses(groups, path, dashed=()):
    """Validation losses against tokens and against training FLOPs.

    groups: [(name, training FLOPs a token, [curve of each run])], a curve [(tokens, loss)]. Curves
    of a group have one colour. dashed: names of groups whose losses are of something else.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=130)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, flops_per_token, curves) in enumerate(groups):
        for axes, scale in ((left, 1e-6), (right, flops_per_token)):
            for i, curve in enumerate(curves):
                points = [(n_tokens * scale, loss) for n_tokens, loss in curve if n_tokens]
                axes.plot([x for x, _ in points], [loss for _, loss in points],
                          color=f"C{number % 10}", lw=1.2,
                          ls="--" if name in dashed else "-" if number < 10 else "-.",
                          marker="." if len(points) < 2 else "",
                          label=None if i else name.replace("$", r"\$"))
    # runs that were stopped before their first evaluation have no points, which no log scale shows
    has_points = any(n_tokens for *_, curves in groups for curve in curves for n_tokens, _ in curve)
    xscale = "log" if has_points else "linear"
    left.set(xlabel="tokens seen (millions)", xscale=xscale,
             ylabel="validation loss, nats a predicted token")
    right.set(xlabel="training FLOPs", xscale=xscale)
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter("{x:g}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def write_comparison(runs, defaults, folder):
    """folder/compare.json, compare.md and compare.png. -> the content of compare.json."""
    found = dict(
        page=os.path.join(folder, "compare.md"), picture=os.path.join(folder, "compare.png"),
        runs={run["path"]: run["summary"] | dict(fields={
            name: value for name, value in run["fields"].items() if value is not None})
            for run in runs},
        settings=settings_that_differ(runs, defaults))
    write_json(os.path.join(folder, "compare.json"), found)
    page = as_page(runs, defaults).encode("utf-8", "replace")
    replace_file(os.path.join(folder, "compare.md"), lambda file: file.write(page))
    heads = heads_of(runs)
    draw_losses([(head, run["fields"]["flops_per_token"], [run["curve"]])
                 for head, run in zip(heads, runs)], os.path.join(folder, "compare.png"),
                dashed=[head for head, run in zip(heads, runs)
                        if run["settings"].get("objective") == "clm"])
    return found
