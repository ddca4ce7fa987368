"""What comes out of fine-tuning: medians over seeds, a table beside published results, a submission to GLUE."""

import io
import os
import statistics
import zipfile

from lib import glue
from lib.files import replace_file

# What others have published, in hundredths as they print it; (F1/accuracy) where both are known. Never compare one
# paper's accuracy with another's F1.
COLUMNS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
HEADINGS = dict(cola="CoLA MCC", sst2="SST-2 acc", mrpc="MRPC F1/acc", stsb="STS-B Pearson", qqp="QQP F1/acc",
                mnli="MNLI-m acc", qnli="QNLI acc", rte="RTE acc", boolq="BoolQ acc", wnli="WNLI acc")
# name | parameters | split | source | results in the order of COLUMNS
PUBLISHED = """
BERT-tiny | 4.4M | test | google-research/bert README | 0.0 83.2 81.1/71.1 74.3 62.2/83.4 70.2 81.5 57.2
BERT-mini | 11.3M | test | google-research/bert README | 0.0 85.9 81.1/71.8 75.4 66.4/86.2 74.8 84.1 57.9
BERT-small | 29.1M | test | google-research/bert README | 27.8 89.7 83.4/76.2 78.8 68.1/87.0 77.6 86.4 61.8
BERT-medium | 41.7M | test | google-research/bert README | 38.0 89.6 86.6/81.6 80.4 69.6/87.9 80.0 87.7 62.2
BERT-base, cased | 108M | dev | README of run_glue.py, transformers | 56.5 92.3 88.9/84.1 88.6 87.5/90.7 83.9 90.7 65.7
DistilBERT | 66M | dev | its README (MRPC: F1 or accuracy not said) | 51.3 91.3 87.5 86.9 -/88.5 82.2 89.2 59.9
TinyBERT-4 | 14.5M | test | huawei-noah/Pretrained-Language-Model | - - 86.4/- - - - - -
crammed BERT, 24 h on one A6000 | 120M | dev, median of 5 | its model card | 53.3 92.0 88.9/- 87.4 87.5 84.1 90.2 58.5
ModernBERT-base | 149M | dev; MRPC, STS-B, RTE from MNLI | 2412.13663 | 65.1 96.0 -/92.2 91.8 -/92.1 89.1 93.9 87.4
Ettin 17M | 16.9M | dev | 2507.11412 | - 91.2 - - - 79.5 - -
Ettin 68M | 68.5M | dev | 2507.11412 | - 94.4 - - - 87.0 - -
Perceiver IO Base, SentencePiece | 223M | dev | 2107.14795, appendix | 47.1 94.4 -/87.25 88.2 -/90.2 84.5 92.1 65.2
MrCogito, concept encoders, best run a task | 61M | dev | ksopyla/MrCogito | 13 77.8 82.7/73.3 65.0 73.4/- 59.8 - -
"""


def summary_of(runs, job):
    """Runs of one start -> median, min, max of each metric on the first dev split, and the runs themselves."""
    first = job.dev[0]
    kinds = list(runs[0]["metrics"][first])
    by = {name: {k: pick([r["metrics"][first][k] for r in runs]) for k in kinds}
          for name, pick in (("median", statistics.median), ("min", min), ("max", max))}
    middle = sorted(runs, key=lambda r: r["score"])[len(runs) // 2]
    kept = ("seed", "lr", "best_epoch", "epochs", "degenerate", "diverged", "interval", "examples_per_s")
    return by | dict(
        runs=[{k: r[k] for k in kept} | dict(metrics=r["metrics"][first], last=r["last"][first], other_splits={
            k: v for k, v in r["metrics"].items() if k != first}) for r in runs],
        last_median={k: statistics.median(r["last"][first][k] for r in runs) for k in kinds},
        interval_of_median=middle["interval"], degenerate=sum(r["degenerate"] for r in runs),
        diverged=sum(r["diverged"] for r in runs), cut=runs[0]["cut"])


def cell(task_name, part):
    """Medians of a summary as a table shows them, in hundredths: 82.1 [81.0-83.3]; F1 before accuracy."""
    names = {"mrpc": ("f1", "accuracy"), "qqp": ("f1", "accuracy"), "stsb": ("pearson",), "cola": ("mcc",)}.get(
        task_name, ("accuracy",) if "accuracy" in part["median"] else ("pearson",))
    middle, low, high = ([f"{100 * part.get(which, part['median'])[k]:.1f}" for k in names]
                         for which in ("median", "min", "max"))
    return "/".join(m if "runs" not in part else f"{m} [{a}-{b}]" for m, a, b in zip(middle, low, high))


def markdown(results, heading):
    """glue.json -> a Markdown table: this model, its controls, the majority answer, published results."""
    tasks = [name for name in results if results[name]]
    shown = [*tasks, *(name for name in COLUMNS if name not in tasks)] if set(tasks) & set(COLUMNS) else tasks
    controls = list(dict.fromkeys(name for name in tasks for name in results[name]["controls"]))
    lines = [f"# {heading}", "", "Dev sets. Median [smallest-largest] over seeds, of the best epoch by dev score; "
             "F1 before accuracy where there are two.", "",
             "| | parameters | split | " + " | ".join(HEADINGS.get(name, name) for name in shown) + " | source |",
             "|---|---:|---" + "|---:" * len(shown) + "|---|"]

    def row(name, size, split, cells, source=""):
        lines.append(f"| {name} | {size} | {split} | " + " | ".join(cells.get(t, "") for t in shown) + f" | {source} |")

    row("**this model**", results[tasks[0]]["params"], "dev", {t: cell(t, results[t]) for t in tasks})
    for control in controls:
        row(control, "", "dev", {t: cell(t, results[t]["controls"][control]) for t in tasks
                                 if control in results[t]["controls"]})
    row("majority answer", "", "dev", {t: cell(t, dict(median=results[t]["majority"])) for t in tasks})
    if set(tasks) & set(COLUMNS):
        for line in PUBLISHED.strip().splitlines():
            name, size, split, source, found = line.split(" | ")
            row(name, size, split, dict(zip(COLUMNS, found.split())), source)
    lines.append("")
    for name in tasks:
        r = results[name]
        low, high = (100 * x for x in r["interval_of_median"])
        last = {k: round(100 * v, 1) for k, v in r["last_median"].items()}
        lines.append(f"- {name}: learning rate {r['lr']:g}, {len(r['runs'])} seeds; {r['metric']} of the median "
                     f"run, 95 % by bootstrap over examples: {low:.1f} to {high:.1f}; last epoch instead of the "
                     f"best: {last}; constant answers {r['degenerate']}, diverged {r['diverged']}, rows cut {r['cut']}")
        lines += [f"  - {note}" for note in r["notes"]]
    return "\n".join(lines) + "\n"


def write_submission(path, best_runs):
    """{task name: path of its best run's files without endings} -> the zip GLUE's server takes, or what it lacks.

    11 files, header index<tab>prediction, labels as the server spells them, STS-B within 0 to 5.
    -> list of missing files, empty when the zip was written.
    """
    found, missing = {}, []
    for task in glue.TASKS.values():
        for name, split in zip(task.submission, task.test if task.name != "ax" else ("ax",)):
            run = best_runs.get("mnli" if task.name == "ax" else task.name)
            file = f"{run}.{split}.tsv"
            if run and os.path.exists(file):
                with open(file, encoding="utf-8") as predictions:
                    found[f"{name}.tsv"] = predictions.read()
            else:
                missing.append(f"{name}.tsv")
    if missing:
        return missing
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in found.items():
            archive.writestr(name, text)
    replace_file(path, lambda file: file.write(buffer.getvalue()))
    return []
