"""GLUE, BoolQ, and tables of the kind that users bring: where a task's files are, what is in them, how it is scored.

    task = find_task("mrpc"); splits, notes = read_task(task, "glue")      folders of official files
    splits, notes = load_hub(task)                                         the same examples through `datasets`

A folder of one's own is a task too: train.tsv and dev.tsv (test.tsv if there is one), tab-separated with a header, and
task.json: {"text": ["question", "reply"], "label": "verdict", "labels": ["no", "yes"], "metrics": ["accuracy"]}.
Without "labels" it is a regression, with "limits": [0, 5] if no answer lies beyond. It may also say epochs, batch_size,
max_tokens, lrs and swap, see Task. Quotes are plain characters in all of these files.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lib.files import replace_file

BINARY, ENTAILED = ("0", "1"), ("entailment", "not_entailment")
THREE_WAY = ("entailment", "neutral", "contradiction")  # hub order; files name them


@dataclass(frozen=True)
class Task:
    """One data set. Rows are text (one or two columns) and a label: one of `labels`, or a number if there are none."""
    name: str
    folder: str  # where its files are in a GLUE folder
    text: tuple  # column names in the files
    label: str = "label"
    labels: tuple = BINARY
    metrics: tuple = ("accuracy",)  # their mean chooses epochs and learning rates
    sizes: dict = field(default_factory=dict)  # official number of examples
    columns: tuple = ()  # in files without a header: where text and label are
    swap: bool = False  # the order of the two texts means nothing: both are trained and averaged
    dev: tuple = ("dev",)  # evaluated splits; the first one chooses
    test: tuple = ("test",)
    hub_text: tuple = ()  # column names on the hub where they differ
    submission: tuple = ()  # file names in the GLUE submission
    limits: tuple = ()  # of a regression: the smallest and largest answer there is; answers beyond count as these
    epochs: int = 10
    batch_size: int = 32
    max_tokens: int = 128
    lrs: tuple = (1e-4, 3e-4, 1e-3)

    @property
    def n_concept(self):
        """Concepts that fine-tuning keeps, 0: all. Two texts are compared better and faster by few (records/glue)."""
        return 16 if len(self.text) == 2 else 0


PAIR = ("sentence1", "sentence2")
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", ("sentence",), metrics=("mcc",), sizes=dict(train=8551, dev=1043, test=1063), columns=(3, 1),
         submission=("CoLA",), max_tokens=64),
    Task("sst2", "SST-2", ("sentence",), sizes=dict(train=67349, dev=872, test=1821), submission=("SST-2",), epochs=2,
         max_tokens=128),
    Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", metrics=("accuracy", "f1"), hub_text=PAIR, swap=True,
         sizes=dict(train=3668, dev=408, test=1725), submission=("MRPC",)),
    Task("stsb", "STS-B", PAIR, "score", (), ("pearson", "spearman"), dict(train=5749, dev=1500, test=1379), swap=True,
         submission=("STS-B",), limits=(0.0, 5.0)),
    Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", metrics=("accuracy", "f1"), swap=True, epochs=3,
         sizes=dict(train=363846, dev=40430, test=390965), submission=("QQP",)),
    Task("mnli", "MNLI", PAIR, "gold_label", THREE_WAY, dev=("dev_matched", "dev_mismatched"), epochs=3,
         test=("test_matched", "test_mismatched"), submission=("MNLI-m", "MNLI-mm"), sizes=dict(
             train=392702, dev_matched=9815, dev_mismatched=9832, test_matched=9796, test_mismatched=9847)),
    Task("qnli", "QNLI", ("question", "sentence"), labels=ENTAILED, sizes=dict(train=104743, dev=5463, test=5463),
         submission=("QNLI",), epochs=3, max_tokens=256),
    Task("rte", "RTE", PAIR, labels=ENTAILED, sizes=dict(train=2490, dev=277, test=3000), submission=("RTE",),
         epochs=6, max_tokens=256),
    Task("wnli", "WNLI", PAIR, sizes=dict(train=635, dev=71, test=146), submission=("WNLI",), epochs=5),
    Task("ax", "AX", PAIR, labels=THREE_WAY, sizes=dict(test=1104), dev=(), submission=("AX",)),
    Task("boolq", "BoolQ", ("question", "passage"), "answer", ("false", "true"), sizes=dict(train=9427, dev=3270),
         epochs=3, max_tokens=256, test=()),
)}
GROUPS = {"smallbench": ("sst2", "rte", "boolq", "mrpc"), "all": tuple(name for name in TASKS if name != "boolq")}
HUB = {"boolq": ("google/boolq", None)}  # all others are in the GLUE repository
METRICS = {"accuracy": accuracy_score, "f1": f1_score, "mcc": matthews_corrcoef,
           "pearson": lambda y, p: pearsonr(y, p)[0], "spearman": lambda y, p: spearmanr(y, p)[0]}
AT_ONCE = ("accuracy", "f1", "mcc", "pearson")
OWN = dict(text=list, label=str, labels=list, metrics=list, limits=list, swap=bool, epochs=int, batch_size=int,
           max_tokens=int, lrs=list)  # what a task.json may say, see Task


# ---- files -------------------------------------------------------------------

def find_task(name):
    """Name of a task, or a folder with a task.json -> Task. Raises ValueError."""
    if name in TASKS:
        return TASKS[name]
    path = os.path.join(name, "task.json")
    if not os.path.isfile(path):
        raise ValueError(f"task {name!r}: expected one of {', '.join([*TASKS, *GROUPS])}, or a folder with train.tsv, "
                         "dev.tsv and a task.json that names columns, labels and metrics (see glue.py)")
    try:
        with open(path, encoding="utf-8-sig") as file:
            given = json.load(file)
        wrong = [f"{key}={value!r}" for key, value in given.items() if type(value) is not OWN.get(key)
                 or type(value) is int and value < (8 if key == "max_tokens" else 1)]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; expected an object such as the one glue.py shows") from None
    wrong += [f"no {key}" for key in ("text", "label") if key not in given]
    if wrong:
        raise ValueError(f"{path}: found {', '.join(wrong)}; expected text and label, and of these what is needed: "
                         f"{', '.join(f'{key} ({kind.__name__})' for key, kind in OWN.items())}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    given["labels"] = labels = tuple(map(str, given.get("labels", ())))
    task = Task(os.path.basename(os.path.abspath(name)), os.path.abspath(name),
                **{"metrics": ("accuracy",) if labels else ("pearson",)} | given)
    may = ("accuracy", "mcc") + ("f1",) * (len(labels) == 2) if labels else ("pearson", "spearman")
    if not (0 < len(task.text) < 3 and all(isinstance(column, str) for column in task.text)
            and len(set(labels)) == len(labels) != 1 and task.metrics and set(map(str, task.metrics)) <= set(may)):
        raise ValueError(f"{path}: found text={list(task.text)}, labels={list(labels)}, metrics={list(task.metrics)}; "
                         "expected one or two text columns, no or several different labels, metrics out of "
                         f"{', '.join(may)}")
    numbers = [number for number in task.limits + task.lrs if type(number) in (int, float)]
    if len(numbers) < len(task.limits + task.lrs) or not task.lrs or not min(task.lrs) > 0 or task.limits and (
            labels or len(task.limits) != 2 or not task.limits[0] < task.limits[1]):
        raise ValueError(f"{path}: found limits={list(task.limits)}, lrs={list(task.lrs)}; expected the smallest and "
                         "largest answer of a regression, such as [0, 5], and learning rates, such as [1e-4, 3e-4]")
    return task


def split_file(task, glue_dir, split):
    """-> (path of a split's file or None, remark). Folders named -subset and BoolQ's devsplit.* are not official."""
    stand_ins = [(task.folder, split, ""), (f"{task.folder}-subset", split, "a subset, not the official split")]
    if task.name == "ax":
        stand_ins += [("", "AX", ""), ("diagnostic", "diagnostic", "")]
    if split.endswith("_matched"):
        stand_ins.append((f"{task.folder}-subset", split.removesuffix("_matched"), "a subset, not the official split"))
    if task.name == "boolq":  # official where the official training file is
        folders = ("BoolQ", "boolq", os.path.join("..", "boolq"))
        stand_ins = [(folder, split, "") for folder in folders
                     if os.path.isfile(os.path.join(glue_dir, folder, "train.jsonl"))]
        stand_ins += [(folder, f"devsplit.{split}", "the official dev set cut in two, not the official split")
                      for folder in folders]
    for folder, stem, remark in stand_ins:
        for ending in (".tsv", ".jsonl"):
            path = os.path.join(glue_dir, folder, stem + ending)
            if os.path.isfile(path):
                return path, remark
    return None, ""


def read_rows(path):
    """.tsv or .jsonl -> (rows as lists of str, header or None, line numbers). A header is whatever the first row is."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = file.read().replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if path.endswith(".jsonl"):
        rows = []
        for line in lines:
            try:
                rows.append({k: v if isinstance(v, str) else json.dumps(v) for k, v in json.loads(line).items()})
            except (ValueError, AttributeError):
                rows.append({})
        header = list(next((row for row in rows if row), {}))
        return [header] + [[row[name] for name in header if name in row] for row in rows]
    return [line.split("\t") for line in lines]


def read_split(task, path, split):
    """A split's file -> ([(text,) or (text, text)], labels float64 or None, notes). Raises ValueError and OSError.

    Rows with another number of columns than the rest (a cut line) are left out and counted; in a test file they are an
    error, since a submission needs every row.
    """
    try:
        rows = read_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    if len(rows) < 2:
        raise ValueError(f"{path}: found {len(rows)} lines, expected a header and examples; fetch it again")
    header, has_label, first = rows[0], split not in task.test, 2
    wanted = [*task.text, task.label] if has_label else [*task.text]
    if set(wanted) <= set(header):
        places = [header.index(name) for name in wanted]
        rows = rows[1:]
    elif task.columns and len(header) > max(task.columns) and has_label:
        places, first = list(task.columns), 1
    else:
        raise ValueError(f"{path}: found the columns {', '.join(header)[:200]}; expected {', '.join(wanted)}")
    width = len(header)
    texts, labels, bad, empty = [], [], [], 0
    for number, row in enumerate(rows, first):
        if len(row) != width:
            bad.append(number)
            continue
        fields = [row[place] for place in places]
        texts.append(tuple(fields[:len(task.text)]))
        empty += not all(text.strip() for text in texts[-1])
        if has_label:
            labels.append(read_label(task, fields[-1].strip(), f"{path}, line {number}"))
    notes = []
    if bad and not has_label:
        raise ValueError(f"{path}: line {bad[0]} has not {width} columns; a test file must be whole, fetch it again")
    if bad:
        notes.append(f"{path}: {len(bad)} rows left out, they have not {width} columns (first: line {bad[0]})")
    if empty:
        notes.append(f"{path}: {empty} rows with an empty sentence, kept")
    official = task.sizes.get(split)
    if official and official != len(texts):
        notes.append(f"{path}: {len(texts):,} examples, the official file has {official:,}")
    if not texts:
        raise ValueError(f"{path}: no row has {width} columns as its first line has; is it tab-separated?")
    return texts, np.array(labels) if has_label else None, notes


def read_label(task, text, where):
    """-> index of the label, or the number itself in a regression."""
    if task.labels:
        if text not in task.labels:
            raise ValueError(f"{where}: found the label {text!r}, expected one of {', '.join(task.labels)}")
        return float(task.labels.index(text))
    try:
        value = float(text)
        if not np.isfinite(value):
            raise ValueError
    except ValueError:
        raise ValueError(f"{where}: found the score {text!r}, expected a number") from None
    return value


def read_task(task, glue_dir):
    """-> ({split: (texts, labels or None)}, notes). train and the first dev split must be there, tests may be missing.

    Raises FileNotFoundError that says what is missing and how to get it.
    """
    splits, notes, remarks = {}, [], set()
    needed = ("train", *task.dev[:1]) if task.dev else ()
    for split in ("train", *task.dev, *task.test):
        path, remark = split_file(task, glue_dir, split)
        if path:
            texts, labels, found = read_split(task, path, split)
            splits[split], notes = (texts, labels), notes + found
            remarks |= {remark} - {""}
        elif split in needed:
            raise FileNotFoundError(f"{os.path.join(glue_dir, task.folder, split)}.tsv is missing; unpack GLUE's files "
                                    "there, or leave --glue_dir empty to load them through `datasets`")
    return splits, notes + [f"{task.name}: {remark}" for remark in sorted(remarks)]


def load_hub(task, hub):
    """The same examples through the `datasets` library; hub is the GLUE repository or a folder laid out like it."""
    from datasets import load_dataset

    repository, config = HUB.get(task.name, (hub, task.name)) if not os.path.isdir(hub) else (hub, task.name)
    try:
        found = load_dataset(repository, config)
    except Exception as error:  # network, hub and file formats each have their own
        raise ValueError(f"{repository} {config or ''} cannot be loaded: {error}; try again with a network, or "
                         "give --glue_dir=FOLDER of GLUE's files") from None
    splits = {}
    for split in ("train", *task.dev, *task.test):
        rows = found.get(split.replace("dev", "validation"))
        if rows is None:
            continue
        texts = list(zip(*(map(str, rows[name]) for name in task.hub_text or task.text)))
        column = "answer" if task.name == "boolq" else "label"
        labels = None if split in task.test else np.array([float(v) for v in rows[column]])
        if labels is not None and task.labels and not set(labels.tolist()) <= set(range(len(task.labels))):
            raise ValueError(f"{repository} {config} {split}: labels {sorted(set(labels.tolist()))}, expected 0 to "
                             f"{len(task.labels) - 1}")
        splits[split] = texts, labels
    missing = {"train", *task.dev[:1]} - set(splits) if task.dev else set()
    if missing:
        raise ValueError(f"{repository} {config}: found the splits {', '.join(found)}, {', '.join(missing)} is missing")
    return splits, []


def fingerprint(task, splits):
    """16 hex digits that change with any example, label, metric or limit: no results of other data are taken."""
    digest = hashlib.sha256(repr((task.labels, task.metrics, task.limits, task.swap)).encode())
    for split, (texts, labels) in sorted(splits.items()):
        digest.update(repr((split, list(map(tuple, texts)), None if labels is None else labels.tolist())).encode())
    return digest.hexdigest()[:16]


# ---- scores ------------------------------------------------------------------

def score(task, labels, predictions):
    """Labels and predictions, indices or numbers -> {metric: value}; what is constant correlates with nothing: 0."""
    kinds = ("accuracy", "mcc") + ("f1",) * (len(task.labels) == 2) if task.labels else ("pearson", "spearman")
    if not task.labels and (np.ptp(predictions) == 0 or np.ptp(labels) == 0):
        return dict.fromkeys(kinds, 0.0)
    return {kind: float(METRICS[kind](labels, predictions)) for kind in kinds}


def main_score(task, metrics):
    """What epochs, learning rates and medians are chosen by: the mean of the task's official metrics."""
    return float(np.mean([metrics[name] for name in task.metrics]))


def majority(task, train_labels):
    """The answer of someone who does not read: the most frequent label, or the mean."""
    if not task.labels:
        return float(np.mean(train_labels))
    return float(np.bincount(train_labels.astype(int)).argmax())


def bootstrap(task, labels, predictions, n=1000, seed=0):
    """95 % interval of the main score over resampled examples (percentiles) -> [low, high]."""
    draws = np.random.default_rng(seed).integers(0, len(labels), (n, len(labels)))
    y, p = labels[draws], predictions[draws]
    scores = [at_once(kind, y, p) if kind in AT_ONCE and len(task.labels) < 3 else
              np.array([score(task, *pair)[kind] for pair in zip(y, p)]) for kind in task.metrics]
    return [float(x) for x in np.percentile(np.mean(scores, axis=0), (2.5, 97.5))]


def at_once(kind, y, p):
    """One metric of many samples, y and p (n, N) -> (n,): sklearn takes a millisecond for each."""
    if kind == "accuracy":
        return (y == p).mean(1)
    if kind == "f1":
        return 2 * (y * p).sum(1) / np.maximum(1, (y + p).sum(1))
    y, p = (v - v.mean(1, keepdims=True) for v in (y, p))  # of two labels, MCC is Pearson's correlation
    return (y * p).sum(1) / np.maximum(1e-12, np.sqrt((y * y).sum(1) * (p * p).sum(1)))


def label_text(task, prediction):
    """A prediction as GLUE's server and the files write it."""
    if task.labels:
        return task.labels[int(prediction)]
    return repr(float(prediction))


def write_predictions(path, task, columns):
    """{"prediction": ..., "label": ...} of equal length -> tab-separated with index, in the task's own words."""
    names = list(columns)
    lines = ["\t".join(["index", *names])]
    for i, row in enumerate(zip(*columns.values())):
        lines.append("\t".join([str(i), *(label_text(task, value) for value in row)]))
    replace_file(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))
