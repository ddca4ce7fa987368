"""Results of fine-tuning: medians over seeds, a table beside published ones, a GLUE submission."""

import os
import statistics
import zipfile

from lib import glue
from lib.files import replace_file

COLUMNS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
HEADINGS = dict(cola="CoLA MCC", sst2="SST-2 acc", mrpc="MRPC F1/acc", stsb="STS-B Pearson",
                qqp="QQP F1/acc", mnli="MNLI-m acc", qnli="QNLI acc", rte="RTE acc",
                boolq="BoolQ acc", wnli="WNLI acc")
SHOWN_METRICS = dict(mrpc=("f1", "accuracy"), qqp=("f1", "accuracy"), cola=("mcc",))

BERT = "google-research/bert README"
# What others have published, in percent as they print it: name, parameters, split, source, scores
# in the order of COLUMNS. F1/accuracy where both are known, since papers report one or the other
# and the two must not be compared.
PUBLISHED = (
    ("BERT-tiny", "4.4M", "test", BERT, "0.0 83.2 81.1/71.1 74.3 62.2/83.4 70.2 81.5 57.2"),
    ("BERT-mini", "11.3M", "test", BERT, "0.0 85.9 81.1/71.8 75.4 66.4/86.2 74.8 84.1 57.9"),
    ("BERT-small", "29.1M", "test", BERT, "27.8 89.7 83.4/76.2 78.8 68.1/87.0 77.6 86.4 61.8"),
    ("BERT-medium", "41.7M", "test", BERT, "38.0 89.6 86.6/81.6 80.4 69.6/87.9 80.0 87.7 62.2"),
    ("BERT-base, cased", "108M", "dev", "README of run_glue.py, transformers",
     "56.5 92.3 88.9/84.1 88.6 87.5/90.7 83.9 90.7 65.7"),
    ("DistilBERT", "66M", "dev", "its README (MRPC: F1 or accuracy not said)",
     "51.3 91.3 87.5 86.9 -/88.5 82.2 89.2 59.9"),
    ("TinyBERT-4", "14.5M", "test", "huawei-noah/Pretrained-Language-Model",
     "- - 86.4/- - - - - -"),
    ("crammed BERT, 24 h on one A6000", "120M", "dev, median of 5", "its model card",
     "53.3 92.0 88.9/- 87.4 87.5 84.1 90.2 58.5"),
    ("ModernBERT-base", "149M", "dev; MRPC, STS-B, RTE from MNLI", "2412.13663",
     "65.1 96.0 -/92.2 91.8 -/92.1 89.1 93.9 87.4"),
    ("Ettin 17M", "16.9M", "dev", "2507.11412", "- 91.2 - - - 79.5 - -"),
    ("Ettin 68M", "68.5M", "dev", "2507.11412", "- 94.4 - - - 87.0 - -"),
    ("Perceiver IO Base, SentencePiece", "223M", "dev", "2107.14795, appendix",
     "47.1 94.4 -/87.25 88.2 -/90.2 84.5 92.1 65.2"),
    ("MrCogito, concept encoders, best run a task", "61M", "dev", "ksopyla/MrCogito",
     "13 77.8 82.7/73.3 65.0 73.4/- 59.8 - -"),
)


def summary_of(runs, task):
    """Results of the seeds of one start -> median, min and max of each metric on the first dev
    split, how many runs failed, and the runs themselves: a part of glue.json."""
    first = task.dev[0]
    kept = ("seed", "lr", "best_epoch", "epochs", "degenerate", "diverged", "interval",
            "examples_per_s")
    shown = []
    for run in runs:
        others = {split: metrics for split, metrics in run["metrics"].items() if split != first}
        shown.append({key: run[key] for key in kept} | dict(
            metrics=run["metrics"][first], last=run["last"][first], other_splits=others))

    def over_runs(compute, which):
        """One number of each metric: compute([its value in each run]); which: metrics or last."""
        return {name: compute([run[which][name] for run in shown]) for name in shown[0]["metrics"]}

    # the run whose interval stands for the median: of an even number, the better of the middle two
    middle = sorted(runs, key=lambda run: run["score"])[len(runs) // 2]
    return dict(
        median=over_runs(statistics.median, "metrics"), min=over_runs(min, "metrics"),
        max=over_runs(max, "metrics"), runs=shown,
        last_median=over_runs(statistics.median, "last"), interval_of_median=middle["interval"],
        degenerate=sum(run["degenerate"] for run in runs),  # one answer to every example
        diverged=sum(run["diverged"] for run in runs),  # stopped by a loss that is not finite
        cut=runs[0]["cut"])  # texts longer than max_tokens in each split


def official_name(name, entry):
    """Entry of glue.json -> which of the tasks of lib/glue.py it is of; "" for a user's own.

    Its name does not tell: own folders may be called mrpc or cola_from_mnli.
    """
    return entry.get("official", name if name in glue.TASKS else "")


def shown_metrics(name, entry):
    """Metrics of an entry of glue.json that a table shows: as papers do, or an own task's."""
    official = official_name(name, entry)
    if not official:
        return entry["metric"].split(" and ")
    return SHOWN_METRICS.get(official, ("pearson",) if official == "stsb" else ("accuracy",))


def cell(name, part, entry=None):
    """Summary -> a cell of the table, in percent: 82.1 [81.0-83.3], F1 before accuracy.

    entry: that of the task in glue.json, where `part` is only a part of it. Without runs (the
    majority baseline) there is a median alone.
    """
    shown = []
    for metric in shown_metrics(name, entry or part):
        text = f"{100 * part['median'][metric]:.1f}"
        if "runs" in part:
            text += f" [{100 * part['min'][metric]:.1f}-{100 * part['max'][metric]:.1f}]"
        shown.append(text)
    return "/".join(shown)


def heading(name, entry):
    """Head of a task's column: CoLA MCC, and for others than GLUE's their name and metrics."""
    official = official_name(name, entry)
    if official == name:
        return HEADINGS[name]
    if official:  # from the weights of another task
        return f"{HEADINGS[official]} ({name})"
    return f"{name} {'/'.join(shown_metrics(name, entry))}"


def markdown(results, title):
    """glue.json -> a Markdown table: this model, controls, majority baseline, published scores."""
    # a bar would end the cell of a folder's name that holds one
    columns = {name: heading(name, entry).replace("|", "\\|") for name, entry in results.items()}
    is_glue = any(name in COLUMNS and official_name(name, entry) == name
                  for name, entry in results.items())
    if is_glue:  # all columns of the published results
        columns |= {name: HEADINGS[name] for name in COLUMNS}
    order = "; F1 before accuracy where there are two" if is_glue else ""
    # cells are empty where a task was not run or a paper does not give its score
    lines = [f"# {title}", "",
             "Dev sets. Median [smallest-largest] over seeds, of the best epoch by dev score"
             f"{order}.", "",
             f"| | parameters | split | {' | '.join(columns.values())} | source |",
             "|---|---:|---" + "|---:" * len(columns) + "|---|"]

    def add_row(name, size, split, cells, source=""):
        texts = " | ".join(cells.get(column, "") for column in columns)
        lines.append(f"| {name} | {size} | {split} | {texts} | {source} |")

    add_row("**this model**", next(iter(results.values()))["params"], "dev",
            {name: cell(name, entry) for name, entry in results.items()})
    controls = [control for entry in results.values() for control in entry["controls"]]
    for control in dict.fromkeys(controls):  # each once, in this order
        cells = {name: cell(name, entry["controls"][control], entry)
                 for name, entry in results.items() if control in entry["controls"]}
        add_row(control.replace("|", "\\|"), "", "dev", cells)
    add_row("majority answer", "", "dev",
            {name: cell(name, dict(median=entry["majority"]), entry)
             for name, entry in results.items()})
    if is_glue:
        for name, size, split, source, scores in PUBLISHED:
            add_row(name, size, split, dict(zip(COLUMNS, scores.split())), source)
    lines.append("")
    for name, entry in results.items():
        lines.append(details(name, entry))
        lines += [f"  - {note}" for note in entry["notes"]]
    return "\n".join(lines) + "\n"


def details(name, entry):
    """One line below the table: what a reader needs to judge the numbers of a task."""
    low, high = (100 * value for value in entry["interval_of_median"])
    last = {metric: round(100 * value, 1) for metric, value in entry["last_median"].items()
            if official_name(name, entry) or metric in shown_metrics(name, entry)}
    return (f"- {name}: learning rate {entry['lr']:g}, {len(entry['runs'])} seeds; "
            f"{entry['metric']} of the median run, 95 % by bootstrap over examples: {low:.1f} to "
            f"{high:.1f}; last epoch instead of the best: {last}; constant answers "
            f"{entry['degenerate']}, diverged {entry['diverged']}, rows cut {entry['cut']}")


def write_submission(path, best_runs):
    """Writes the zip that GLUE's server takes -> names of missing files; [] if it was written.

    best_runs: {task name: path of its best run's files without endings}. The zip holds 11 files
    with the header index<tab>prediction, labels spelled as the server does. Nothing is written
    while a file is missing.
    """
    found, missing = {}, []
    for task in glue.TASKS.values():
        # AX has no training data: the best MNLI run has answered it
        run = best_runs.get("mnli" if task.name == "ax" else task.name)
        splits = ("ax",) if task.name == "ax" else task.test
        for name, split in zip(task.submission, splits):
            predictions = f"{run}.{split}.tsv"
            if run and os.path.exists(predictions):
                with open(predictions, encoding="utf-8") as file:
                    found[f"{name}.tsv"] = file.read()
            else:
                missing.append(f"{name}.tsv")
    if missing:
        return missing

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in found.items():
                archive.writestr(name, text)

    replace_file(path, write)
    return []
