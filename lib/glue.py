"""The tasks of GLUE, BoolQ, and tables of your own: where their files are and how they are scored.

    task = find_task("mrpc")
    splits, notes = read_task(task, "glue")   from a folder of GLUE's official files
    splits, notes = load_hub(task, hub)       the same examples through the `datasets` library

A folder of your own is a task too. It holds train and dev (and test if you have one), each as .tsv,
.csv (both with a header) or .jsonl, and a task.json:
    {"text": ["question", "reply"], "label": "verdict", "labels": ["no", "yes"],
     "metrics": ["accuracy"]}
"text" and "label" are names of columns. Without "labels" it is a regression; "limits": [0, 5] are
then its smallest and largest possible score. It may also set epochs, batch_size, max_tokens, lrs
and swap, see Task. In a .tsv, quotes are characters like any others; in a .csv they enclose fields.
"""

import csv
import hashlib
import io
import json
import os
import unicodedata
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lib.files import parse_json, read_json, replace_file


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
    seeds: int = 5  # runs that are reported
    grid_seeds: int = 3  # runs to choose each learning rate by

    @property
    def is_own(self):
        """Whether it is a folder of the user's own, whatever its name is."""
        return os.path.isabs(self.folder)

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
METRICS = {"accuracy": accuracy_score, "f1": partial(f1_score, zero_division=0),
           "mcc": matthews_corrcoef,
           "pearson": lambda y, p: pearsonr(y, p)[0],
           "spearman": lambda y, p: spearmanr(y, p)[0]}
ENDINGS = (".tsv", ".jsonl", ".csv")
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
                         "labels and metrics (see lib/glue.py)")
    given = read_task_json(path)
    # labels are compared with the text in the files: [0, 1] means "0" and "1"
    given["labels"] = tuple(spelled(json_text(label, path)) for label in given.get("labels", ()))
    given.setdefault("metrics", ("accuracy",) if given["labels"] else ("pearson",))
    # a first result in minutes: one learning rate and few seeds, unless the settings say otherwise
    task = Task(os.path.basename(os.path.abspath(name)), os.path.abspath(name), seeds=3,
                grid_seeds=0, **given)
    check_own_task(task, path)
    return task


def read_task_json(path):
    """-> the fields of a task.json, each of the right type, lists as tuples. Raises ValueError."""
    try:
        given = read_json(path, "utf-8-sig", object_pairs_hook=unique_fields)
        wrong = []
        for key, value in given.items():
            # type(), since isinstance would take true for an int
            smallest = 8 if key == "max_tokens" else 1
            if type(value) is not JSON_FIELDS.get(key) or type(value) is int and value < smallest:
                wrong.append(f"{key}={value!r}")
    except (ValueError, AttributeError) as error:  # no JSON, or no object
        raise ValueError(f"{path}: {error}; expected an object such as the one lib/glue.py "
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
    columns = [*task.text, task.label]
    good_text = len(task.text) in (1, 2) and all(isinstance(name, str) for name in columns)
    # one column as text and label would show the model the answer
    good_text = good_text and len(set(columns)) == len(columns)
    good_labels = len(set(task.labels)) == len(task.labels) != 1
    good_metrics = task.metrics and set(map(str, task.metrics)) <= set(possible)
    if not (good_text and good_labels and good_metrics):
        raise ValueError(f"{path}: found text={list(task.text)}, label={task.label!r}, "
                         f"labels={listed(task.labels)}, metrics={list(task.metrics)}; expected "
                         "one or two text columns and another one for the label, no or several "
                         f"different labels, metrics out of {', '.join(possible)}")
    for label in task.labels:
        if set(label) & set("\t\n\r"):  # the files of predictions are tab-separated
            raise ValueError(f"{path}: found the label {label!r}, expected labels without tabs "
                             "and line breaks")
    good = all(type(number) in (int, float) for number in task.limits + task.lrs)
    if good and task.limits:
        good = not task.labels and len(task.limits) == 2 and task.limits[0] < task.limits[1]
    if not good or not task.lrs or not all(0 < lr < 1 for lr in task.lrs):
        raise ValueError(f"{path}: found limits={list(task.limits)}, lrs={list(task.lrs)}; "
                         "expected the smallest and largest answer of a regression, such as "
                         "[0, 5], and learning rates, such as [1e-4, 3e-4]")


def unique_fields(pairs):
    """Names and values of a JSON object -> dict. ValueError for a name that occurs twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice!r} is there twice")
    return fields


def json_text(value, where):
    """A JSON value as text: a string as it is, numbers, true and false as JSON spells them.

    ValueError for null, lists and objects.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)) and value == value:  # nan is a missing value
        return json.dumps(value)
    found = json.dumps(value, default=str)[:50]  # default: dates and bytes of a hub's tables
    raise ValueError(f"{where}: found {found}, expected text or a number")


def spelled(label):
    """A label as it is compared: without spaces around it, accents composed."""
    return unicodedata.normalize("NFC", label.strip())


def listed(labels):
    """Labels for a message, the first ten of many."""
    return ", ".join(labels[:10]) + (f", ... ({len(labels):,})" if len(labels) > 10 else "")


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
    if task.is_own:  # whatever its name: no other folder is looked into
        places = [(task.folder, split, "")]
    for folder, stem, remark in places:
        paths = [os.path.join(glue_dir, folder, stem + ending) for ending in ENDINGS]
        paths = [path for path in paths if os.path.isfile(path)]
        if len(paths) > 1 and task.is_own:
            raise ValueError(f"found {' and '.join(paths)}; expected one of them")
        if paths:
            return paths[0], remark
    return None, ""


def read_lines(path):
    """Lines of a text file, without a byte order mark. Raises ValueError if it is not UTF-8.

    Lines end in \\n or \\r\\n and nowhere else: str.splitlines would also cut at characters that
    occur inside sentences.
    """
    try:
        # utf-8-sig: some copies of GLUE start with a mark, which is no part of a column name
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = file.read().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    if lines[-1] == "":
        lines.pop()
    return lines


def table_rows(path):
    """.tsv or .csv -> [(line number, fields)], the header first if there is one.

    Lines without anything are left out, except in a table of one column. Raises ValueError.
    """
    lines = read_lines(path)
    if path.endswith(".csv"):
        csv.field_size_limit(2**31 - 1)  # texts may be longer than csv's 128 kB
        reader = csv.reader(io.StringIO("\n".join(lines), newline=""), strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}; is a quote missing?"
                             ) from None
        return [(number, row) for number, row in rows if row]
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1)]
    return [row for row, line in zip(rows, lines) if line.strip(" ") or len(rows[0][1]) == 1]


def json_rows(path, names):
    """.jsonl -> [(line number, the fields of these names as text)], after their names as a header.

    Raises ValueError for a line that is no object, or has not each of them once with a value.
    """
    rows = [(0, list(names))]
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line, object_pairs_hook=unique_fields)
            missing = [name for name in names if name not in row.keys()]
        except (ValueError, AttributeError) as error:  # AttributeError: a list or a number
            raise ValueError(f"{where}: {error}; expected an object such as "
                             f'{{"{names[0]}": "..."}}') from None
        if missing:
            raise ValueError(f"{where}: found the columns {', '.join(row)[:200]}; expected "
                             f"{', '.join(names)}")
        rows.append((number, [json_text(row[name], f"{where}, {name}") for name in names]))
    return rows if len(rows) > 1 else []


def find_columns(task, path, header, wanted):
    """-> (places of the wanted columns, whether the first line is a header). Raises ValueError."""
    # by name, since copies of GLUE's files differ in which columns they have
    names = [name.strip() for name in header]
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: found two columns called {twice[0]}, expected one")
    if set(wanted) <= set(names):
        return [names.index(name) for name in wanted], True
    if task.columns and len(header) > max(task.columns) and task.label in wanted:
        return list(task.columns), False  # CoLA: no header
    hint = "; is it tab-separated?" if len(header) == 1 and path.endswith(".tsv") else ""
    raise ValueError(f"{path}: found the columns {', '.join(names)[:200]}; expected "
                     f"{', '.join(wanted)}{hint}")


def read_split(task, path, split):
    """A split's file -> ([(text,) or (text, text)], labels float64 or None, notes).

    In an official train or dev file, rows with another number of columns than the first line (a
    cut line) are left out and counted. Everywhere else they are an error: a submission needs every
    row, and a file of one's own can be mended. Raises ValueError and OSError.
    """
    has_label = split not in task.test
    wanted = [*task.text, task.label] if has_label else [*task.text]
    rows = json_rows(path, wanted) if path.endswith(".jsonl") else table_rows(path)
    if len(rows) < 2:
        raise ValueError(f"{path}: found {len(rows)} lines, expected a header and examples; "
                         "fetch it again")
    header = rows[0][1]
    width = len(header)
    columns, has_header = find_columns(task, path, header, wanted)
    texts, labels, bad_lines = [], [], []
    for number, row in rows[1:] if has_header else rows:
        where = f"{path}, line {number}"
        if len(row) != width and task.is_own:
            raise ValueError(f"{where}: found {len(row)} columns, expected {width} as in the "
                             "header; texts with tabs or line breaks go into a .csv or .jsonl file")
        if len(row) != width:
            bad_lines.append(number)
            continue
        fields = [row[column] for column in columns]
        texts.append(tuple(fields[:len(task.text)]))
        if has_label:
            labels.append(read_label(task, spelled(fields[-1]), where))
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
                             f"{listed(task.labels)}")
        return float(task.labels.index(text))
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        hint = '; without "labels" in its task.json it is a regression' if task.is_own else ""
        raise ValueError(f"{where}: found the score {text!r}, expected a number{hint}")
    if task.limits and not task.limits[0] <= value <= task.limits[1]:
        raise ValueError(f"{where}: found the score {text}, expected {task.limits[0]:g} to "
                         f"{task.limits[1]:g}, the limits of the task")
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
        elif split in needed and task.is_own:
            raise FileNotFoundError(f"{task.folder} holds no {split}.tsv, .csv or .jsonl; a task "
                                    "needs examples in train and in dev")
        elif split in needed:
            raise FileNotFoundError(
                f"{os.path.join(glue_dir, task.folder, split)}.tsv is missing; unpack GLUE's files "
                "there, or leave --glue_dir empty to load them through `datasets`")
    return splits, notes + [f"{task.name}: {remark}" for remark in sorted(remarks) if remark]


def load_hub(task, hub):
    """The same as read_task through the `datasets` library. Raises ValueError.

    hub: the GLUE repository on the hub, or a folder laid out like it.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("GLUE comes from the hub through the `datasets` library, which is not "
                         "installed: pip install datasets, or give --glue_dir=FOLDER of GLUE's "
                         "files") from None

    repository, config = hub, task.name
    if not os.path.isdir(hub):
        repository, config = HUB.get(task.name, (hub, task.name))
    where = f"{repository} {config or ''}"
    try:
        found = load_dataset(repository, config)
    except Exception as error:  # network, hub and file formats each have their own
        raise ValueError(f"{where} cannot be loaded: {error}; try again with a network, or give "
                         "--glue_dir=FOLDER of GLUE's files") from None
    splits = {}
    text_names = task.hub_text or task.text
    label_name = "answer" if task.name == "boolq" else "label"
    for split in ("train", *task.dev, *task.test):
        # on the hub, dev is called validation, and hidden labels of a test split are -1
        rows = found.get(split.replace("dev", "validation"))
        if rows is None:
            continue
        missing = {*text_names, label_name} - set(rows.column_names)
        if missing:
            raise ValueError(f"{where} {split}: found the columns {', '.join(rows.column_names)}; "
                             f"{', '.join(sorted(missing))} is missing")
        columns = [[json_text(value, f"{where} {split}, row {i}, {name}")
                    for i, value in enumerate(rows[name])] for name in text_names]
        labels = None
        if split not in task.test:
            labels = np.array([np.nan if value is None else float(value)
                               for value in rows[label_name]])
            low, high = (0, len(task.labels) - 1) if task.labels else task.limits
            if not ((low <= labels) & (labels <= high)).all():  # nan neither
                raise ValueError(f"{where} {split}: found labels from {labels.min():g} to "
                                 f"{labels.max():g}, expected {low:g} to {high:g}")
        splits[split] = list(zip(*columns)), labels
    missing = {"train", *task.dev[:1]} - set(splits) if task.dev else set()
    if missing:
        raise ValueError(f"{where}: found the splits {', '.join(found)}, {', '.join(missing)} is "
                         "missing")
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

def score(task, labels, predictions, names=None):
    """Labels and predictions, both as indices or scores (N,) -> {metric: value}.

    names: which metrics, all possible ones by default. The correlation with a constant, which is
    undefined, counts as 0.
    """
    names = names or task.possible_metrics
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
    rng, scores = np.random.default_rng(seed), []
    at_once = max(1, 10**7 // len(labels))  # a large dev set a thousand times is gigabytes
    for begin in range(0, n, at_once):
        draws = rng.integers(0, len(labels), (min(at_once, n - begin), len(labels)))
        y, p = labels[draws], predictions[draws]
        of_metrics = []
        for name in task.metrics:
            # Spearman needs ranks; with three labels, Matthews' correlation has another formula
            if name == "accuracy" or name != "spearman" and len(task.labels) <= 2:
                of_metrics.append(score_samples(name, y, p))
            else:
                of_metrics.append(np.array([score(task, *pair, [name])[name]
                                            for pair in zip(y, p)]))
        scores.append(np.mean(of_metrics, axis=0))
    return [float(x) for x in np.percentile(np.concatenate(scores), (2.5, 97.5))]


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
