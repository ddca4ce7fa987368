"""Fine-tune a pretrained model on GLUE, BoolQ or a data set of your own, over several seeds.

    python finetune_glue.py --out_dir=out/demo --task=mrpc --glue_dir=glue  folders of GLUE's files
    python finetune_glue.py --out_dir=out/demo --task=smallbench  SST-2, RTE, BoolQ, MRPC of the hub
    python finetune_glue.py --out_dir=out/demo --task=cola,rte --controls=untrained,out/transformer
    python finetune_glue.py --out_dir=out/demo --task=rte --init_from_task=out/demo/glue/mnli
    python finetune_glue.py --out_dir=out/demo --task=my_folder  a task.json describes its columns

For each task, learning rates are compared by the median of `grid_seeds` runs each. The best one is
run with `seeds` other seeds. Their median [smallest-largest] score is reported, beside the majority
baseline and the same procedure for the controls. A folder of your own is run three times with one
learning rate, for a result in minutes: --grid_seeds=3 compares learning rates there, too.

Writes out_dir/glue.json and the table out_dir/glue.md; under out_dir/glue/TASK the predictions of
each run and the weights of the best one, model.pt. Finished runs are not repeated: give the same
command again to continue. Once all of GLUE's tasks have test predictions,
out_dir/glue_submission.zip is a submission for its server. lib/finetune.py has one run by itself,
for lists of texts in Python.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt) and tokenizer/; results go there too
checkpoint = "auto"  # auto | best | last | PATH; auto: the best, or a newer one not yet evaluated
task = "mrpc"  # cola sst2 mrpc stsb qqp mnli qnli rte wnli ax boolq smallbench all FOLDER; commas
glue_dir = ""  # folders of GLUE's official files; empty: from the hub
hub = "nyu-mll/glue"  # where the `datasets` library finds GLUE, or a folder laid out like it
controls = ""  # also fine-tune: "untrained" (fresh weights), folders of other runs; with commas
init_from_task = ""  # start from weights of another task, such as out/demo/glue/mnli; fresh head
seeds = -1  # runs that are reported; -1: 5, for a folder of your own 3
grid_seeds = -1  # runs to choose each learning rate by, 0: take the middle one; -1: 3, for own 0
lrs = ""  # learning rates to choose from, with commas; empty: the task's own
n_concept = 0  # keep the first n concepts; 0: 16 for pairs, all for single texts or if anchored
epochs = 0  # passes over the training set; 0: the task's own
batch_size = 0  # examples an update; 0: the task's own
max_tokens = 0  # tokens a row, longer ones are cut; 0: the task's own, and what the model reads
warmup = 0.06  # share of the updates from 0 to the peak learning rate, then linearly to 0
weight_decay = 0.01  # decoupled, on matrices only
dropout = 0.1  # on residual branches and before the head
freeze_table = False  # the token table stays as pretraining left it
patience = 3  # stop after so many epochs without a better score; 0: off
jobs = 1  # runs at a time; over 1: each in its own process, on the next GPU if there are several
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
one_run = ""  # set by this command when it starts a run as a process: INIT|LEARNING RATE|SEED
# -----------------------------------------------------------------------------
from configurator import configure

config = configure(globals())

import contextlib
import functools
import hashlib
import json
import os
import statistics
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
from tqdm import tqdm

from lib import glue
from lib.files import (
    FolderLock,
    file_hash,
    print_result,
    read_json,
    read_object,
    remove_file,
    replace_file,
    write_json,
)
from lib.finetune import (
    Recipe,
    check_recipe,
    make_classifier,
    save_model,
    take_task_weights,
    tune,
)
from lib.jobs import last_line, run_python
from lib.leaderboard import markdown, official_name, shown_metrics, summary_of, write_submission
from lib.machine import choose_dtype, find_machine, say
from lib.run import load_run, read_checkpoint, run_folder, user_mistakes

# Two words that are used throughout:
#   init  what a run starts from: "pretrained" (the weights in out_dir), "untrained" (the same
#         network with fresh weights) or the folder of another training run
#   run   one fine-tuning, given by (init, learning rate, seed)
# Inside functions `task` is a glue.Task; the setting of that name goes to read_tasks() only.
INITS = ["pretrained"] + [init.strip() for init in controls.split(",") if init.strip()]


# ---- where a run starts -------------------------------------------------------------

def recipe_of(task):
    """Hyperparameters of a run except its learning rate: the settings, or if 0 the task's own."""
    of_task = ("n_concept", "epochs", "batch_size", "max_tokens")
    of_all = ("warmup", "weight_decay", "dropout", "freeze_table", "patience")
    recipe = {name: config[name] or getattr(task, name) for name in of_task}
    return Recipe(**recipe, **{name: config[name] for name in of_all})


def lrs_of(task):
    """Learning rates to choose from, each once."""
    return list(dict.fromkeys(map(float, lrs.split(",")) if lrs else task.lrs))


def seeds_of(task):
    """-> (how many runs are reported, how many each learning rate is chosen by)."""
    n_seeds = task.seeds if seeds < 0 else seeds
    n_grid = task.grid_seeds if grid_seeds < 0 else grid_seeds
    return n_seeds, n_grid if len(lrs_of(task)) > 1 else 0


@functools.cache
def loaded(init):
    """The training run that an init refers to -> (model on the CPU, tokenizer, its tokens)."""
    if init in ("pretrained", "untrained"):
        model, tok, found = load_run(out_dir, "cpu", checkpoint)
    else:
        model, tok, found = load_run(init, "cpu")
    return model, tok, found["tokens"]


@functools.cache
def hash_of_weights(init):
    """Hash of the weights a run starts from, so that results of others are not reused.

    16 hex digits. "untrained" counts as well: its network is that of the checkpoint.
    """
    digest = hashlib.sha256()
    for name, tensor in loaded(init)[0].state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    if init_from_task and init == "pretrained":
        digest.update(file_hash(os.path.join(init_from_task, "model.pt")).encode())
    return digest.hexdigest()[:16]


def starting_model(task, init, seed):
    """-> Classifier on the CPU, with its weights at the start. Raises ValueError."""
    model, tok, _ = loaded(init)
    classifier = make_classifier(model, tok, task, recipe_of(task), seed, init == "untrained")
    if init_from_task and init == "pretrained":
        take_task_weights(classifier, init_from_task, tok)
    return classifier


# ---- names --------------------------------------------------------------------------
# Folders of the user's own (tasks, controls) give their names to files and to lines of tables. Two
# may end alike (c1/run, c2/run), or as a task of GLUE: a longer end of the path then tells them
# apart. glue/names.json keeps which name is whose, so that no result replaces another's.

def home():
    """The folder of the results: out_dir, or the one around it where it is a checkpoint."""
    return run_folder(out_dir)


@functools.cache
def known_names():
    """{"tasks" or "inits": {name in small letters: which folder has it}}. Raises ValueError."""
    path = os.path.join(home(), "glue", "names.json")
    names = dict(tasks={}, inits={})
    if os.path.exists(path):
        try:
            found = read_json(path)
            names = {kind: dict(found[kind]) for kind in names}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}; rm {path}") from None
    names["tasks"] |= dict.fromkeys([*glue.TASKS, *glue.GROUPS], "GLUE")
    names["inits"] |= dict.fromkeys(["pretrained", "untrained"], "out_dir")
    return names


def name_for(kind, folder, before=""):
    """`before` and the shortest end of a folder's path that is no other folder's name."""
    names = known_names()[kind]
    # relative: out_dir and what lies beside it may be moved together
    owner = before + os.path.relpath(os.path.realpath(folder), os.path.realpath(home()))
    parts = os.path.abspath(folder).strip(os.sep).split(os.sep)
    for n in range(1, len(parts) + 1):
        name = before + "_".join(parts[-n:])
        # in small letters: some file systems do not tell a and A apart
        if names.setdefault(name.casefold(), owner) == owner:
            return name
    raise ValueError(f"{folder}: every name for it is taken; rename it")


def name_of(init):
    """What an init is called in tables and file names."""
    return init if init in ("pretrained", "untrained") else name_for("inits", init)


def key_of(task):
    """What a task is called in glue.json and in glue/: rte, or rte_from_mnli."""
    if init_from_task:
        return name_for("tasks", init_from_task, f"{task.name}_from_")
    return task.name


def task_folder(task, file=""):
    """Path of a file in a task's folder of results."""
    return os.path.join(home(), "glue", key_of(task), file)


def lr_text(lr):
    """A learning rate in names of files: different for different ones."""
    return f"{lr:g}" if float(f"{lr:g}") == lr else repr(lr)


def run_path(task, init, lr, seed):
    """Path of a run's files without their endings: .log .json .SPLIT.tsv .pt"""
    return task_folder(task, f"{name_of(init)}_lr{lr_text(lr)}_seed{seed}")


# ---- one run and its files ----------------------------------------------------------

def run_one(task, splits, init, lr, seed):
    """Fine-tunes once and writes the run's files."""
    machine = find_machine(device)
    precision, _ = choose_dtype(dtype, machine.device)
    model, tok = starting_model(task, init, seed).to(machine.device), loaded(init)[1]
    report, predictions, scale = tune(model, tok, machine, task, splits, recipe_of(task), lr, seed,
                                      precision)
    path = run_path(task, init, lr, seed)
    for split, values in predictions.items():
        columns, labels = dict(prediction=values), splits[split][1]
        if labels is not None:
            columns["label"] = labels
        glue.write_predictions(f"{path}.{split}.tsv", task, columns)
    save_model(f"{path}.pt", model, task, tok, scale)
    # last, because a run counts as finished once this file is there
    write_json(f"{path}.json", dict(seed=seed, lr=lr) | report | dict(
        recipe=asdict(recipe_of(task)), started_from=hash_of_weights(init),
        data=glue.fingerprint(task, splits), precision=precision,
        aligned=len(task.text) == 2,
        weights=file_hash(f"{path}.pt")))


def finished(task, data, init, lr, seed):
    """Result of a run if it is there, with the same recipe, weights and data; otherwise None."""
    try:
        found = read_object(run_path(task, init, lr, seed) + ".json", keys=("recipe",))
        recipe = dict(freeze_table=False) | dict(found["recipe"])  # older ones had no such setting
    except (OSError, ValueError, LookupError, TypeError):  # not run yet, or damaged: run again
        return None
    # A result of another recipe, checkpoint, data set, precision or head has the same name and does
    # not count. Older ones do not say their precision, and aligned texts with anchors only.
    precision, _ = choose_dtype(dtype, find_machine(device).device)
    is_pair, has_anchors = len(task.text) == 2, getattr(loaded(init)[0].cfg, "anchored", False)
    found = dict(precision=precision, aligned=is_pair and has_anchors) | found | dict(recipe=recipe)
    wanted = dict(recipe=asdict(recipe_of(task)), started_from=hash_of_weights(init), data=data,
                  precision=precision, aligned=is_pair)
    return found if all(found.get(key) == value for key, value in wanted.items()) else None


# ---- seeds, learning rates, controls ------------------------------------------------
# One fine-tuning says little: on small tasks, seeds differ by several points (2002.06305). So each
# number is a median over seeds, with its range. A control goes through the same procedure, choice
# of the learning rate included: "untrained" shows what pretraining adds, a Transformer that was
# pretrained on the same data shows what concepts add or cost.

def run_all(task, splits, runs):
    """[(init, lr, seed)] -> their results. Runs what is missing, `jobs` at a time.

    A failed run ends the program, when the other runs in progress have ended.
    """
    data = glue.fingerprint(task, splits)
    missing = [run for run in runs if not finished(task, data, *run)]
    bar = tqdm(total=len(missing), desc=task.name, unit="run", disable=not sys.stderr.isatty())
    failures = []

    def run_missing(number):
        if failures:  # start nothing more
            return
        init, lr, seed = missing[number]
        path, exit_code = run_path(task, init, lr, seed), 0
        if jobs == 1:
            # in this process, which spares the start of another one for each run
            with open(f"{path}.log", "w") as log, contextlib.redirect_stdout(log):
                run_one(task, splits, init, lr, seed)
        else:
            # this command again with the same settings, for this task and run alone: a process has
            # a GPU, random generators and a standard output of its own
            name = task.folder if task.is_own else task.name
            settings = config | dict(task=name, one_run=f"{init}|{lr}|{seed}")
            arguments = [f"--{key}={value}" for key, value in settings.items()]
            exit_code = run_python([os.path.abspath(__file__), *arguments], f"{path}.log",
                                   number, jobs)
        found = None if exit_code else finished(task, data, init, lr, seed)
        if not found:
            failures.append(f"{path}.log ends with: {last_line(path + '.log')}")
            return
        metrics = found["metrics"][task.dev[0]]
        if task.is_own:
            metrics = {name: metrics[name] for name in task.metrics}
        with tqdm.external_write_mode(sys.stdout):  # above the bar
            say(f"{key_of(task)} {name_of(init)} lr {lr_text(lr)} seed {seed}: "
                f"{json.dumps(metrics)} after epoch {found['best_epoch']} of {found['epochs']}, "
                f"{found['examples_per_s']:.0f} examples/s"
                f"{', constant answer' if found['degenerate'] else ''}"
                f"{', diverged' if found['diverged'] else ''}")
        bar.update()

    if jobs == 1:
        for number in range(len(missing)):
            run_missing(number)
    else:
        with ThreadPoolExecutor(jobs) as pool:  # threads that wait for processes
            list(pool.map(run_missing, range(len(missing))))
    bar.close()
    if failures:
        sys.exit("error: " + "\n       ".join(failures)
                 + "\n       what was finished is kept; the same command goes on")
    return [finished(task, data, *run) for run in runs]


def choose_lr(task, splits, init):
    """-> (the learning rate with the best median score, {learning rate: median score})."""
    candidates, (_, n_grid) = lrs_of(task), seeds_of(task)
    if not n_grid:
        return candidates[len(candidates) // 2], {}
    # Seeds 101, 102, ... are never reported: the best of several on the same seeds looks too good.
    runs = [(init, lr, 100 + seed) for lr in candidates for seed in range(1, n_grid + 1)]
    results = run_all(task, splits, runs)
    medians = {lr: statistics.median(found["score"] for found in results if found["lr"] == lr)
               for lr in candidates}
    for run in runs:  # their weights are of no use
        remove_file(run_path(task, *run) + ".pt")
    # keys as text: glue.json has no others
    return (max(candidates, key=medians.get),
            {lr_text(lr): score for lr, score in medians.items()})


def tune_with_seeds(task, splits, init):
    """Chooses a learning rate and runs all seeds -> (summary for glue.json, path of the best run).

    Of the weights, only those of the best pretrained run stay: out_dir/glue/TASK/model.pt.
    """
    lr, compared = choose_lr(task, splits, init)
    runs = [(init, lr, seed) for seed in range(1, seeds_of(task)[0] + 1)]
    results = run_all(task, splits, runs)
    paths = [run_path(task, *run) for run in runs]
    scores = [found["score"] for found in results]
    number = scores.index(max(scores))
    best, kept = paths[number], task_folder(task, "model.pt")
    if init == "pretrained":
        # no .pt: an earlier command has made this run, and kept its weights or those of another
        weights = results[number].get("weights")  # older results do not say
        is_kept = os.path.exists(kept) and weights in (None, file_hash(kept))
        if not is_kept and not os.path.exists(f"{best}.pt"):
            remove_file(f"{best}.json")
            results = run_all(task, splits, runs)
        if os.path.exists(f"{best}.pt"):
            os.replace(f"{best}.pt", kept)
    for path in paths:
        remove_file(f"{path}.pt")
    return summary_of(results, task) | dict(lr=lr, learning_rates=compared), best


def fine_tune(task, splits, notes):
    """One task: the pretrained model and its controls -> the task's entry in glue.json."""
    os.makedirs(task_folder(task), exist_ok=True)
    labels = splits[task.dev[0]][1]
    # what is reached without reading the texts; a useful model is above it
    majority = np.full(len(labels), glue.majority(task, splits["train"][1]))
    entry = dict(
        # whose results these are: a folder of the user's own may have the name of a task of GLUE
        official="" if task.is_own else task.name, folder=task.folder if task.is_own else "",
        notes=notes, recipe=asdict(recipe_of(task)), metric=" and ".join(task.metrics),
        controls={}, majority=glue.score(task, labels, majority))
    for init in INITS:
        summary, best_run = tune_with_seeds(task, splits, init)
        if init == "pretrained":
            entry |= summary | dict(best_run=best_run)
        else:
            entry["controls"][name_of(init)] = summary
    return entry


# ---- settings and data ----------------------------------------------------------------

def check_settings():
    """Raises ValueError for settings that cannot be right."""
    if jobs < 1 or seeds < -1 or seeds == 0 or grid_seeds < -1:
        raise ValueError(f"seeds={seeds}, grid_seeds={grid_seeds}, jobs={jobs}: expected 1 or "
                         "more; grid_seeds may be 0, and -1 stands for the task's own seeds")
    try:
        good_lrs = not lrs or all(0 < float(lr) < 1 for lr in lrs.split(","))
    except ValueError:
        good_lrs = False
    if not good_lrs:
        raise ValueError(f"lrs={lrs!r}: expected learning rates with commas between, such as "
                         "1e-4,3e-4")
    # what a setting of 0 takes from the task is right, whichever task it is
    check_recipe(recipe_of(glue.TASKS["mrpc"]), lr=1e-4)
    choose_dtype(dtype, find_machine(device).device)
    if init_from_task and not os.path.exists(os.path.join(init_from_task, "model.pt")):
        raise ValueError(f"init_from_task={init_from_task}: no model.pt there; fine-tune first, "
                         "for example "
                         f"python finetune_glue.py --out_dir={out_dir} --task=mnli")


def read_tasks(setting):
    """The setting `task` -> [(task, splits, notes)]. Raises ValueError and FileNotFoundError."""
    found, given = [], [part.strip() for part in setting.split(",")]
    names = [name for part in given for name in glue.GROUPS.get(part, (part,))]
    for name in dict.fromkeys(names):  # each once
        task = glue.find_task(name)
        # All files are read before the first run, so that a damaged one shows at once.
        try:
            if glue_dir or task.is_own:
                splits, notes = glue.read_task(task, glue_dir)
            else:
                splits, notes = glue.load_hub(task, hub)
        except FileNotFoundError as error:
            if name in given:
                raise
            say(f"{name} is left out: {error}")  # a part of a group
            continue
        if name == "mnli" and glue_dir:  # AX has no training data: the MNLI model answers it
            for test in glue.read_task(glue.TASKS["ax"], glue_dir)[0].values():
                splits["ax"] = test
        if task.is_own:
            task = replace(task, name=name_for("tasks", task.folder))
        found.append((task, splits, notes))
    if not found:
        raise ValueError(f"none of the files of {setting} is in {glue_dir or hub}")
    return found


def read_results():
    """glue.json of earlier commands -> {task: entry}, which stay; {} if there is none.

    Those of other weights, from before the run trained on, are left out, and named. Raises
    ValueError if it is damaged.
    """
    path = os.path.join(home(), "glue.json")
    if not os.path.exists(path):
        return {}
    try:
        results = dict(read_json(path))
        if results:
            markdown(results, "")  # does it have all that the table needs?
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; rm {path}, and give its tasks again: "
                         "finished runs are kept") from None
    weights = hash_of_weights("untrained")
    other = {name: entry for name, entry in results.items()
             if entry.get("weights", weights) != weights}
    for name, entry in other.items():
        say(f"{name} is left out of glue.json: its scores are of other weights, after "
            f"{entry['tokens']:,} tokens; its runs stay in glue/{name}")
    return {name: entry for name, entry in results.items() if name not in other}


def written_here(path):
    """Whether a file that has one of our names was written by this command."""
    try:
        if path.endswith(".md"):
            with open(path, encoding="utf-8") as file:
                return "majority answer" in file.read()
        if path.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:  # tables for GLUE's server and nothing else
                return all(name.endswith(".tsv") for name in archive.namelist())
        return "head" in read_checkpoint(path)
    except (ValueError, zipfile.BadZipFile):  # not even a file of this kind
        return False


def refuse_other_files(tasks):
    """ValueError if a file that would be replaced is the user's own."""
    paths = [os.path.join(home(), name) for name in ("glue.md", "glue_submission.zip")]
    paths += [task_folder(task, "model.pt") for task in tasks]
    others = [path for path in paths if os.path.exists(path) and not written_here(path)]
    if others:
        raise ValueError(f"{', '.join(others)}: not written by finetune_glue.py, which would "
                         "replace it; move it away")


def prepare():
    """Finds what is wrong before hours of work -> ([(task, splits, notes)], earlier results)."""
    found, results = read_tasks(task), read_results()
    if not any(task.dev for task, _, _ in found):
        raise ValueError("ax has no training data of its own: --task=mnli answers it")
    refuse_other_files([task for task, _, _ in found])
    cfg = loaded("pretrained")[0].cfg
    n_there = getattr(cfg, "n_concept", 0)
    if n_concept and getattr(cfg, "anchored", False):
        raise ValueError(f"n_concept={n_concept} has no effect here: the concepts of {out_dir} "
                         "have places in the row, and those behind a text do not count anyway; "
                         "leave it at 0")
    if n_concept > n_there:
        raise ValueError(f"n_concept={n_concept} has no effect here: {out_dir} has {n_there} "
                         "concepts; leave it at 0")
    # a model of each size and init is made once, so that a mistake shows now
    of_sizes = {recipe_of(task).n_concept: task for task, _, _ in found}
    for init in INITS:
        name_of(init)  # gives it its name
        for one_task in of_sizes.values():
            starting_model(one_task, init, seed=0)
    return found, results


# ---- all tasks ------------------------------------------------------------------------

def say_how_many(task, splits):
    """Prints which names differ from what was given, and how many runs there will be."""
    n_seeds, n_grid = seeds_of(task)
    candidates = lrs_of(task)
    n = len(INITS) * (n_seeds + n_grid * len(candidates))
    say(f"{key_of(task)}: {n} runs of up to {recipe_of(task).epochs} epochs on "
        f"{len(splits['train'][0]):,} examples")
    if len(candidates) > 1 and not n_grid:
        say(f"learning rate {candidates[len(candidates) // 2]:g}; --grid_seeds=3 chooses among "
            f"{', '.join(map(lr_text, candidates))}")
    if task.is_own and task.name != os.path.basename(task.folder):
        say(f"{task.folder} is called {task.name} in the results; "
            f"{os.path.basename(task.folder)} is another task there")


def fine_tune_all(found, results):
    """Fine-tunes on all tasks, writes glue.json, glue.md and the submission, prints the table."""
    model, _, tokens = loaded("pretrained")
    of_weights = dict(weights=hash_of_weights("untrained"), tokens=tokens)
    for task, splits, notes in found:
        if not task.dev:
            say(f"{task.name} has no training data of its own: --task=mnli answers it")
            continue
        say_how_many(task, splits)
        for note in notes:
            say(note)
        params = dict(params=f"{model.num_params() / 1e6:.1f}M")
        results[key_of(task)] = params | of_weights | fine_tune(task, splits, notes)
        # after each task: a run of all of GLUE takes long
        write_json(os.path.join(home(), "glue.json"), results)
    table = markdown(results, f"{out_dir} after {tokens:,} tokens of pretraining")
    replace_file(os.path.join(home(), "glue.md"), lambda file: file.write(table.encode()))
    say("\n" + table)
    if any(task.submission for task, _, _ in found):
        submit(results)
    print_result({name: shown(name, entry) for name, entry in results.items()})


def shown(name, entry):
    """Entry of glue.json -> what of it is printed: of a folder of one's own, its metrics alone."""
    metrics = entry["median"]
    if not official_name(name, entry):
        metrics = shown_metrics(name, entry)
    found = {key: {metric: entry[key][metric] for metric in metrics}
             for key in ("median", "min", "max", "majority")}
    return found | dict(lr=entry["lr"])


def submit(results):
    """Writes the submission for GLUE's server, or says what it still needs."""
    path = os.path.join(home(), "glue_submission.zip")
    # best_run may be relative to where another command ran, or out_dir may have been moved
    best_runs = {name: os.path.join(home(), "glue", name, os.path.basename(entry["best_run"]))
                 for name, entry in results.items() if official_name(name, entry) == name}
    missing = write_submission(path, best_runs)
    if missing:
        say(f"no submission yet, test predictions are missing for: {', '.join(missing)}")
    else:
        say(f"submission for GLUE's server: {path}")


def main():
    """Runs the command: one run if it is such a process, otherwise all tasks."""
    with user_mistakes():
        for init in INITS:  # first of all: without its run, nothing else has to be asked or fetched
            loaded(init)
        check_settings()
    try:
        if one_run:
            with user_mistakes():
                found = read_tasks(task)
            init, lr, seed = one_run.rsplit("|", 2)
            run_one(*found[0][:2], init, float(lr), int(seed))
            return
        with FolderLock(os.path.join(home(), "glue")) as lock:
            # Processes of `jobs` hold it, too: if this one is killed, no other starts beside them.
            os.set_inheritable(lock.descriptor, True)
            with user_mistakes():
                prepared = prepare()
            write_json(os.path.join(home(), "glue", "names.json"), known_names())
            fine_tune_all(*prepared)
    except BlockingIOError:
        sys.exit(f"error: another run is fine-tuning in {out_dir}; wait for it: --task takes "
                 "several tasks, --jobs runs several at a time")
    except (OSError, MemoryError) as error:
        sys.exit(f"error: {error}; what was finished is kept, and the same command goes on")
    except KeyboardInterrupt:
        sys.exit("stopped; what was finished is kept, and the same command goes on")


if __name__ == "__main__":
    main()
