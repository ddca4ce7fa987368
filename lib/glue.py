"""The tasks of GLUE, BoolQ, and tables of your own: where their files are and how they are scored.

    task = find_task("mrpc")
    splits, notes = read_task(task, "glue")   from a folder of GLUE's official files
    splits, notes = load_hub(task, hub)       the same examples through the `datasets` library

A folder of your own is a task too. It holds train.tsv and dev.tsv (and test.tsv if you have one),
tab-separated with a header, and a task.json:
    {"text": ["question", "reply"], "label": "verdict", "labels": ["no", "yes"],
     "metrics": ["accuracy"]}
"text" and "label" are names of columns. Without "labels" it is a regression; "limits": [0, 5] are
then its smallest and largest possible score. It may also set epochs, batch_size, max_tokens, lrs
and swap, see Task. Quotes have no special meaning in any of these files.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lib.files import replace_file


@dataclass(frozen=True)
class Task:
    """One data set: rows of one or two texts, each with one of `labels` or (regression) a score.

    Labels are kept as their index in `labels`, scores as they are, both as float64.
    """
    name: str
    folder: str  # where its files are in a GLUE folder
    text: tuple  # column names in the files
    label: str = "label"
    labels: tuple = ("0", "1")  # () in a regression; GLUE's labels in the order of the hub
    metrics: tuple = ("accuracy",)  # their mean chooses the best epoch and learning rate
    sizes: dict = field(default_factory=dict)  # official number of examples in each split
    columns: tuple = ()  # for files without a header: numbers of the text and label columns
    swap: bool = False  # the order of the texts has no meaning: train on both, average answers
    dev: tuple = ("dev",)  # splits that are scored; the first one chooses
    test: tuple = ("test",)  # splits without labels
    hub_text: tuple = ()  # column names on the hub where they differ
    submission: tuple = ()  # file names in a GLUE submission, one for each test split
    limits: tuple = ()  # smallest and largest score of a regression; predictions are clipped
    epochs: int = 10
    batch_size: int = 32
    max_tokens: int = 128
    lrs: tuple = (1e-4, 3e-4, 1e-3)

    @property
    def n_concept(self):
        """Concepts that fine-tuning keeps; 0: all. Pairs do better with fewer (records/glue)."""
        return 16 if len(self.text) == 2 else 0

    @property
    def possible_metrics(self):
        """Names of all metrics that can be computed for this kind of labels."""
        if not self.labels:
            return ("pearson", "spearman")
        return ("accuracy", "mcc", "f1") if len(self.labels) == 2 else ("accuracy", "mcc")


# Epochs and lengths that differ from the defaults are chosen by the size and the texts of a data
# set: few epochs where there are many examples, long rows where a text is a paragraph.
SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
THREE_WAY = ("entailment", "neutral", "contradiction")
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", ("sentence",), metrics=("mcc",), submission=("CoLA",), columns=(3, 1),
         sizes=dict(train=8551, dev=1043, test=1063), max_tokens=64),
    Task("sst2", "SST-2", ("sentence",), submission=("SST-2",), epochs=2,
         sizes=dict(train=67349, dev=872, test=1821)),
    Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", metrics=("accuracy", "f1"),
         hub_text=SENTENCES, submission=("MRPC",), swap=True,
         sizes=dict(train=3668, dev=408, test=1725)),
    Task("stsb", "STS-B", SENTENCES, "score", (), metrics=("pearson", "spearman"),
         limits=(0.0, 5.0), submission=("STS-B",), swap=True,
         sizes=dict(train=5749, dev=1500, test=1379)),
    Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", metrics=("accuracy", "f1"),
         submission=("QQP",), swap=True, epochs=3,
         sizes=dict(train=363846, dev=40430, test=390965)),
    Task("mnli", "MNLI", SENTENCES, "gold_label", THREE_WAY, epochs=3,
         dev=("dev_matched", "dev_mismatched"), test=("test_matched", "test_mismatched"),
         submission=("MNLI-m", "MNLI-mm"),
         sizes=dict(train=392702, dev_matched=9815, dev_mismatched=9832, test_matched=9796,
                    test_mismatched=9847)),
    Task("qnli", "QNLI", ("question", "sentence"), labels=ENTAILMENT, submission=("QNLI",),
         sizes=dict(train=104743, dev=5463, test=5463), epochs=3, max_tokens=256),
    Task("rte", "RTE", SENTENCES, labels=ENTAILMENT, submission=("RTE",),
         sizes=dict(train=2490, dev=277, test=3000), epochs=6, max_tokens=256),
    Task("wnli", "WNLI", SENTENCES, submission=("WNLI",),
         sizes=dict(train=635, dev=71, test=146), epochs=5),
    Task("ax", "AX", SENTENCES, labels=THREE_WAY, dev=(), submission=("AX",),
         sizes=dict(test=1104)),
    Task("boolq", "BoolQ", ("question", "passage"), "answer", ("false", "true"), test=(),
         sizes=dict(train=9427, dev=3270), epochs=3, max_tokens=256),
)}
GROUPS = {"smallbench": ("sst2", "rte", "boolq", "mrpc"),
          "all": tuple(name for name in TASKS if name != "boolq")}
HUB = {"boolq": ("google/boolq", None)}  # all others are in the GLUE repository
METRICS = {"accuracy": accuracy_score, "f1": f1_score, "mcc": matthews_corrcoef,
           "pearson": lambda y, p: pearsonr(y, p)[0],
           "spearman": lambda y, p: spearmanr(y, p)[0]}
# A task.json may set these fields of Task and no others.
JSON_FIELDS = dict(text=list, label=str, labels=list, metrics=list, limits=list, swap=bool,
                   epochs=int, batch_size=int, max_tokens=int, lrs=list)


# ---- which task ----------------------------------------------------------------

def find_task(name):
    """Name of a task, or a folder with a task.json -> Task. Raises ValueError."""
    if name in TASKS:
        return TASKS[name]
    path = os.path.join(name, "task.json")
    if not os.path.isfile(path):
        raise ValueError(f"task {name!r}: expected one of {', '.join([*TASKS, *GROUPS])}, or a "
                         "folder with train.tsv, dev.tsv and a task.json that names columns, "
                         "labels and metrics (see glue.py)")
    given = read_task_json(path)
    # labels are compared with what is in the .tsv, which is text: [0, 1] means ["0", "1"]
    given["labels"] = tuple(map(str, given.get("labels", ())))
    given.setdefault("metrics", ("accuracy",) if given["labels"] else ("pearson",))
    task = Task(os.path.basename(os.path.abspath(name)), os.path.abspath(name), **given)
    check_own_task(task, path)
    return task


def read_task_json(path):
    """-> the fields of a task.json, each of the right type, lists as tuples. Raises ValueError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            given = json.load(file)
        wrong = []
        for key, value in given.items():
            # type(), since isinstance would take true for an int
            smallest = 8 if key == "max_tokens" else 1
            if type(value) is not JSON_FIELDS.get(key) or type(value) is int and value < smallest:
                wrong.append(f"{key}={value!r}")
    except (ValueError, AttributeError) as error:  # no JSON, or no object
        raise ValueError(f"{path}: {error}; expected an object such as the one glue.py "
                         "shows") from None
    wrong += [f"no {key}" for key in ("text", "label") if key not in given]
    if wrong:
        known = ", ".join(f"{key} ({kind.__name__})" for key, kind in JSON_FIELDS.items())
        raise ValueError(f"{path}: found {', '.join(wrong)}; expected text and label, and of these "
                         f"what is needed: {known}")
    return {key: tuple(value) if isinstance(value, list) else value
            for key, value in given.items()}


def check_own_task(task, path):
    """Raises ValueError for fields of a task.json that do not fit together."""
    possible = task.possible_metrics
    good_text = len(task.text) in (1, 2) and all(isinstance(name, str) for name in task.text)
    good_labels = len(set(task.labels)) == len(task.labels) != 1
    good_metrics = task.metrics and set(map(str, task.metrics)) <= set(possible)
    if not (good_text and good_labels and good_metrics):
        raise ValueError(f"{path}: found text={list(task.text)}, labels={list(task.labels)}, "
                         f"metrics={list(task.metrics)}; expected one or two text columns, no or "
                         f"several different labels, metrics out of {', '.join(possible)}")
    good = all(type(number) in (int, float) for number in task.limits + task.lrs)
    if good and task.limits:
        good = not task.labels and len(task.limits) == 2 and task.limits[0] < task.limits[1]
    if not good or not task.lrs or not min(task.lrs) > 0:
        raise ValueError(f"{path}: found limits={list(task.limits)}, lrs={list(task.lrs)}; "
                         "expected the smallest and largest answer of a regression, such as "
                         "[0, 5], and learning rates, such as [1e-4, 3e-4]")


# ---- files -------------------------------------------------------------------

def split_file(task, glue_dir, split):
    """-> (path of a split's file or None, a remark if it is not the official split)."""
    # GLUE is also handed around cut down, in folders that say so: MNLI-subset, QQP-subset
    subset = "a subset, not the official split"
    places = [(task.folder, split, ""), (f"{task.folder}-subset", split, subset)]
    if task.name == "ax":
        places += [("", "AX", ""), ("diagnostic", "diagnostic", "")]
    if split.endswith("_matched"):
        places.append((f"{task.folder}-subset", split.removesuffix("_matched"), subset))
    if task.name == "boolq":
        # BoolQ has no public test labels, so some cut its dev set into devsplit.dev and
        # devsplit.test. dev.jsonl is the official dev set only where train.jsonl is there too.
        folders = ("BoolQ", "boolq", os.path.join("..", "boolq"))
        places = [(folder, split, "") for folder in folders
                  if os.path.isfile(os.path.join(glue_dir, folder, "train.jsonl"))]
        places += [(folder, f"devsplit.{split}",
                    "the official dev set cut in two, not the official split")
                   for folder in folders]
    for folder, stem, remark in places:
        for ending in (".tsv", ".jsonl"):
            path = os.path.join(glue_dir, folder, stem + ending)
            if os.path.isfile(path):
                return path, remark
    return None, ""


def read_rows(path):
    """.tsv or .jsonl -> rows as lists of str. The first one is the header, if there is one.

    Lines end in \\n or \\r\\n and nowhere else: str.splitlines would also cut at characters that
    occur inside sentences. A line that is no JSON becomes an empty row.
    """
    # utf-8-sig: some copies of GLUE start with a byte order mark, which is no part of a column name
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = file.read().replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if not path.endswith(".jsonl"):
        return [line.split("\t") for line in lines]
    rows = []
    for line in lines:
        try:
            row = json.loads(line).items()
            rows.append({k: v if isinstance(v, str) else json.dumps(v) for k, v in row})
        except (ValueError, AttributeError):
            rows.append({})
    header = list(next((row for row in rows if row), {}))
    return [header] + [[row[name] for name in header if name in row] for row in rows]


def read_split(task, path, split):
    """A split's file -> ([(text,) or (text, text)], labels float64 or None, notes).

    Rows with another number of columns than the first line (a cut line) are left out and counted.
    In a test file they are an error, since a submission needs every row. Raises ValueError and
    OSError.
    """
    try:
        rows = read_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    if len(rows) < 2:
        raise ValueError(f"{path}: found {len(rows)} lines, expected a header and examples; "
                         "fetch it again")
    # columns are found by name, since copies of GLUE's files differ in which ones they have
    header, width, has_label, first_line = rows[0], len(rows[0]), split not in task.test, 2
    wanted = [*task.text, task.label] if has_label else [*task.text]
    if set(wanted) <= set(header):
        columns = [header.index(name) for name in wanted]
        rows = rows[1:]
    elif task.columns and width > max(task.columns) and has_label:
        columns, first_line = list(task.columns), 1  # CoLA: no header
    else:
        raise ValueError(f"{path}: found the columns {', '.join(header)[:200]}; expected "
                         f"{', '.join(wanted)}")
    texts, labels, bad_lines = [], [], []
    for number, row in enumerate(rows, first_line):
        if len(row) != width:
            bad_lines.append(number)
            continue
        fields = [row[column] for column in columns]
        texts.append(tuple(fields[:len(task.text)]))
        if has_label:
            labels.append(read_label(task, fields[-1].strip(), f"{path}, line {number}"))
    if bad_lines and not has_label:
        raise ValueError(f"{path}: line {bad_lines[0]} has not {width} columns; a test file must "
                         "be whole, fetch it again")
    if not texts:
        raise ValueError(f"{path}: no row has {width} columns as its first line has; is it "
                         "tab-separated?")
    notes = notes_on(texts, bad_lines, width, task.sizes.get(split))
    return texts, np.array(labels) if has_label else None, [f"{path}: {note}" for note in notes]


def notes_on(texts, bad_lines, width, official_size):
    """What a user should know about a file that was read -> list of str."""
    notes = []
    if bad_lines:
        notes.append(f"{len(bad_lines)} rows left out, they have not {width} columns "
                     f"(first: line {bad_lines[0]})")
    n_empty = sum(not all(text.strip() for text in row) for row in texts)
    if n_empty:
        notes.append(f"{n_empty} rows with an empty sentence, kept")
    if official_size and official_size != len(texts):
        notes.append(f"{len(texts):,} examples, the official file has {official_size:,}")
    return notes


def read_label(task, text, where):
    """-> index of the label, or the score itself in a regression. Raises ValueError."""
    if task.labels:
        if text not in task.labels:
            raise ValueError(f"{where}: found the label {text!r}, expected one of "
                             f"{', '.join(task.labels)}")
        return float(task.labels.index(text))
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"{where}: found the score {text!r}, expected a number")
    return value


def read_task(task, glue_dir):
    """-> ({split: (texts, labels or None)}, notes).

    train and the first dev split must be there, the others may be missing. Raises
    FileNotFoundError that says what is missing and how to get it.
    """
    splits, notes, remarks = {}, [], set()
    needed = ("train", *task.dev[:1]) if task.dev else ()
    for split in ("train", *task.dev, *task.test):
        path, remark = split_file(task, glue_dir, split)
        if path:
            texts, labels, found = read_split(task, path, split)
            splits[split] = texts, labels
            notes += found
            remarks.add(remark)
        elif split in needed:
            raise FileNotFoundError(
                f"{os.path.join(glue_dir, task.folder, split)}.tsv is missing; unpack GLUE's files "
                "there, or leave --glue_dir empty to load them through `datasets`")
    return splits, notes + [f"{task.name}: {remark}" for remark in sorted(remarks) if remark]


def load_hub(task, hub):
    """The same as read_task through the `datasets` library. Raises ValueError.

    hub: the GLUE repository on the hub, or a folder laid out like it.
    """
    from datasets import load_dataset

    repository, config = hub, task.name
    if not os.path.isdir(hub):
        repository, config = HUB.get(task.name, (hub, task.name))
    try:
        found = load_dataset(repository, config)
    except Exception as error:  # network, hub and file formats each have their own
        raise ValueError(f"{repository} {config or ''} cannot be loaded: {error}; try again with a "
                         "network, or give --glue_dir=FOLDER of GLUE's files") from None
    splits = {}
    for split in ("train", *task.dev, *task.test):
        rows = found.get(split.replace("dev", "validation"))
        if rows is None:
            continue
        # on the hub, dev is called validation, and hidden labels of a test split are -1
        texts = list(zip(*(map(str, rows[name]) for name in task.hub_text or task.text)))
        labels = None
        if split not in task.test:
            column = rows["answer" if task.name == "boolq" else "label"]
            labels = np.array([float(value) for value in column])
            values = set(labels.tolist())
            if task.labels and not values <= set(range(len(task.labels))):
                raise ValueError(f"{repository} {config} {split}: labels {sorted(values)}, "
                                 f"expected 0 to {len(task.labels) - 1}")
        splits[split] = texts, labels
    missing = {"train", *task.dev[:1]} - set(splits) if task.dev else set()
    if missing:
        raise ValueError(f"{repository} {config}: found the splits {', '.join(found)}, "
                         f"{', '.join(missing)} is missing")
    return splits, []


def fingerprint(task, splits):
    """16 hex digits that change with any example, label, metric or limit.

    Stored with each result, so that a result on other data is never taken for one on these.
    """
    fields = (task.labels, task.metrics, task.limits, task.swap)
    digest = hashlib.sha256(repr(fields).encode())
    for split, (texts, labels) in sorted(splits.items()):
        values = None if labels is None else labels.tolist()
        digest.update(repr((split, list(map(tuple, texts)), values)).encode())
    return digest.hexdigest()[:16]


# ---- metrics -----------------------------------------------------------------

def score(task, labels, predictions):
    """Labels and predictions, both as indices or scores (N,) -> {metric: value}.

    The correlation with a constant, which is undefined, counts as 0.
    """
    names = task.possible_metrics
    if not task.labels and (np.ptp(predictions) == 0 or np.ptp(labels) == 0):
        return dict.fromkeys(names, 0.0)
    return {name: float(METRICS[name](labels, predictions)) for name in names}


def main_score(task, metrics):
    """Mean of the task's official metrics: chooses epochs, learning rates and the median run."""
    return float(np.mean([metrics[name] for name in task.metrics]))


def majority(task, train_labels):
    """The baseline that ignores the text: the most frequent label, or the mean score."""
    if not task.labels:
        return float(np.mean(train_labels))
    return float(np.bincount(train_labels.astype(int)).argmax())


def bootstrap(task, labels, predictions, n=1000, seed=0):
    """95 % confidence interval of the main score: percentiles over n resamplings -> [low, high]."""
    # the same draws for every run: intervals of two models differ by their answers alone
    draws = np.random.default_rng(seed).integers(0, len(labels), (n, len(labels)))
    y, p = labels[draws], predictions[draws]
    scores = []
    for name in task.metrics:
        if name != "spearman" and len(task.labels) <= 2:
            scores.append(score_samples(name, y, p))
        else:  # Spearman needs ranks, three labels another formula
            scores.append(np.array([score(task, *pair)[name] for pair in zip(y, p)]))
    return [float(x) for x in np.percentile(np.mean(scores, axis=0), (2.5, 97.5))]


def score_samples(name, y, p):
    """One metric of n samples, y and p (n,N) -> (n,). sklearn would take a millisecond for each.

    For F1 and Matthews' correlation the labels must be 0 and 1; the latter is then Pearson's.
    """
    if name == "accuracy":
        return (y == p).mean(1)
    if name == "f1":
        return 2 * (y * p).sum(1) / np.maximum(1, (y + p).sum(1))
    y = y - y.mean(1, keepdims=True)
    p = p - p.mean(1, keepdims=True)
    spread = np.sqrt((y * y).sum(1) * (p * p).sum(1))
    return (y * p).sum(1) / np.maximum(1e-12, spread)


# ---- predictions ---------------------------------------------------------------

def write_predictions(path, task, columns):
    """Writes {"prediction": (N,), "label": (N,)} as tab-separated text, with an index column.

    Labels are spelled as in the task's files, which is also how GLUE's server wants them.
    """
    lines = ["\t".join(["index", *columns])]
    for i, values in enumerate(zip(*columns.values())):
        texts = [task.labels[int(value)] if task.labels else repr(float(value)) for value in values]
        lines.append("\t".join([str(i), *texts]))
    replace_file(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))
