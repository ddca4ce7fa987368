"""Fine-tune a pretrained model on GLUE, BoolQ or a data set of your own, over several seeds.

    python finetune_glue.py --out_dir=out/demo --task=mrpc --glue_dir=glue  folders of GLUE's files
    python finetune_glue.py --out_dir=out/demo --task=smallbench  SST-2, RTE, BoolQ, MRPC of the hub
    python finetune_glue.py --out_dir=out/demo --task=cola,rte --controls=untrained,out/transformer
    python finetune_glue.py --out_dir=out/demo --task=rte --init_from_task=out/demo/glue/mnli
    python finetune_glue.py --out_dir=out/demo --task=my_folder  a task.json describes its columns

For each task, learning rates are compared by the median of `grid_seeds` runs each. The best one is
run with `seeds` other seeds. Their median [smallest-largest] score is reported, beside the majority
baseline and the same procedure for the controls.

Writes out_dir/glue.json and the table out_dir/glue.md; under out_dir/glue/TASK the predictions of
each run and the weights of the best one, model.pt. Finished runs are not repeated: give the same
command again to continue. Once all tasks have test predictions, out_dir/glue_submission.zip is a
submission for GLUE's server.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt) and tokenizer/; results go there too
task = "mrpc"  # cola sst2 mrpc stsb qqp mnli qnli rte wnli ax boolq smallbench all FOLDER; commas
glue_dir = ""  # folders of GLUE's official files; empty: from the hub
hub = "nyu-mll/glue"  # where the `datasets` library finds GLUE, or a folder laid out like it
controls = ""  # also fine-tune: "untrained" (fresh weights), folders of other runs; with commas
init_from_task = ""  # start from weights of another task, such as out/demo/glue/mnli; fresh head
seeds = 5  # runs that are reported
grid_seeds = 3  # runs to choose each learning rate by, with other seeds; 0: take the middle one
lrs = ""  # learning rates to choose from, with commas; empty: the task's own
n_concept = 0  # keep the first n pretrained concepts; 0: all for one text, 16 for pairs
epochs = 0  # passes over the training set; 0: the task's own
batch_size = 0  # examples an update; 0: the task's own
max_tokens = 0  # tokens a row, longer ones are cut; 0: the task's own, and what the model reads
warmup = 0.06  # share of the updates from 0 to the peak learning rate, then linearly to 0
weight_decay = 0.01  # decoupled, on matrices only
dropout = 0.1  # on residual branches and before the head
patience = 3  # stop after so many epochs without a better score; 0: off
jobs = 1  # runs at a time; over 1: each in its own process, on the next GPU if there are several
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
one_run = ""  # set by this command when it starts a run as a process: INIT|LEARNING RATE|SEED
# -----------------------------------------------------------------------------
from configurator import configure

config = configure(globals())

import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib import glue
from lib.files import FolderLock, remove_file, replace_file, write_json
from lib.heads import Classifier, encode_texts, in_batches, keep_concepts, padded, predict
from lib.jobs import last_line, run_python
from lib.leaderboard import markdown, summary_of, write_submission
from lib.machine import autocast, choose_dtype, find_machine
from lib.run import build_model, does_not_fit, load_run, model_state, read_checkpoint, user_mistakes

# Two words that are used throughout:
#   init  what a run starts from: "pretrained" (the weights in out_dir), "untrained" (the same
#         network with fresh weights) or the folder of another training run
#   run   one fine-tuning, given by (init, learning rate, seed)
# Inside functions `task` is a glue.Task; the setting of that name goes to read_tasks() only.
INITS = ["pretrained"] + [init for init in controls.split(",") if init]
# Runs from the weights of another task are kept apart from those without, in names everywhere.
FROM_TASK = f"_from_{os.path.basename(os.path.abspath(init_from_task))}" if init_from_task else ""


# ---- load the pretrained model ------------------------------------------------

def recipe_of(task):
    """Hyperparameters of a run except its learning rate: the settings, or if 0 the task's own."""
    of_task = ("n_concept", "epochs", "batch_size", "max_tokens")
    of_all = ("warmup", "weight_decay", "dropout", "patience")
    recipe = {name: config[name] or getattr(task, name) for name in of_task}
    return recipe | {name: config[name] for name in of_all}


def folder_of(init):
    """Folder of the training run that an init refers to."""
    return out_dir if init in ("pretrained", "untrained") else init


def load_classifier(task, init, seed):
    """-> (Classifier with its weights at the start, tokenizer, machine). Raises ValueError."""
    machine = find_machine(device)
    # best.pt if there is one: the weights with the lowest validation loss of pretraining
    pretrained, tok, checkpoint = load_run(folder_of(init), "cpu")
    tok.encode([])  # raises for a run whose data came as token ids: there is no way to encode texts
    # A sentence has fewer words than the model has concepts: a part of them is enough for pairs.
    settings, weights = keep_concepts(checkpoint["model_settings"], pretrained.state_dict(),
                                      recipe_of(task)["n_concept"])
    torch.manual_seed(seed)  # for the fresh weights now, and for dropout later
    encoder = build_model(settings | dict(dropout=dropout))
    if init != "untrained":
        encoder.load_state_dict(weights)
    n_out = max(1, len(task.labels))  # a regression has no labels and one output
    model = Classifier(encoder, n_out, len(task.text), dropout)
    model.init_special_tokens(tok)
    if init_from_task and init == "pretrained":
        load_weights_of_task(model, tok, settings, task)
    return model.to(machine.device), tok, machine


def load_weights_of_task(model, tok, settings, task):
    """Weights that were fine-tuned on another task -> `model`, but for the head: labels differ."""
    saved = read_checkpoint(os.path.join(init_from_task, "model.pt"))
    # model.pt is stored without dropout, since tools/export.py and others do not train it
    same_model = saved["model_settings"] == settings | dict(dropout=0.0)
    if not same_model or saved["tokenizer_fingerprint"] != tok.fingerprint:
        raise ValueError(f"{init_from_task} was fine-tuned from another model or tokenizer than "
                         f"that of {out_dir}, or with another --n_concept than "
                         f"{recipe_of(task)['n_concept']}")
    model.encoder.load_state_dict(saved["model"])
    model.segments.data.copy_(saved["head"]["segments"])


# ---- the fine-tuning loop -------------------------------------------------------
# The recipe is BERT's: AdamW, a short warm-up, linear decay to 0, the dev set scored once an epoch.
# The weights of the best epoch are kept, as is usual for GLUE, where test labels are not public.
# A dev score is then the best of several and a little too good; the score of the last epoch, which
# is not chosen, is stored beside it (last_median in glue.json) and shown below the table.

def encode_splits(task, splits, tok, longest):
    """Texts of all splits -> ({split: [(rows, segments)]}, {split: number of rows cut}).

    Each list has one entry. Where the order of the two texts has no meaning (is a a paraphrase of
    b?), it has a second one with the texts swapped.
    """
    encoded, n_cut = {}, {}
    for split, (texts, _) in splits.items():
        orders = [texts, [pair[::-1] for pair in texts]] if task.swap else [texts]
        encoded[split] = []
        for ordered in orders:
            rows, segments, n_cut[split] = encode_texts(ordered, tok, longest)
            encoded[split].append((rows, segments))
    return encoded, n_cut


def training_targets(task, labels):
    """-> (targets as a tensor, (mean, spread) of the scores).

    A regression learns scores of mean 0 and spread 1, whatever their unit: the learning rate then
    need not depend on it. Predictions are scaled back.
    """
    if task.labels:
        return torch.as_tensor(labels, dtype=torch.int64), (0.0, 1.0)
    mean, spread = float(labels.mean()), float(labels.std()) or 1.0  # 1.0: all scores are equal
    return torch.as_tensor((labels - mean) / spread, dtype=torch.float32), (mean, spread)


def lr_of_update(update, n_updates, peak):
    """Learning rate of an update, counted from 0: linear warm-up to `peak`, linear decay to 0."""
    n_warmup = max(1, round(warmup * n_updates))  # the first update moves the weights, too
    rising = (update + 1) / n_warmup
    falling = (n_updates - update) / max(1, n_updates - n_warmup)
    return peak * min(rising, falling)


def make_optimizer(model):
    """AdamW; weight decay for matrices only, as usual: not for biases and gains of norms."""
    # betas and eps are RoBERTa's (1907.11692, section 3.1). There is no learning rate here: the
    # loop sets it before each update.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)


def train_step(model, task, optimizer, scaler, batch, machine, precision):
    """One update on a batch (ids, segments, real, targets) -> its mean loss."""

    def loss_of(ids, segments, real, targets):
        with autocast(machine.device, precision):
            outputs = model(ids, segments, real)
        if task.labels:
            return F.cross_entropy(outputs, targets)
        return F.mse_loss(outputs[:, 0], targets)

    try:
        loss = loss_of(*batch)
        scaler.scale(loss).backward()
    except RuntimeError as error:  # out of memory: look for a batch size that fits, and say it
        sys.exit(does_not_fit(error, model, batch, machine, precision, len(batch[0]),
                              "batch_size", loss_of))
    # Clipping at norm 1 is BERT's. The gradients must have their own scale for it, so GradScaler
    # (which multiplies the loss in fp16 and does nothing otherwise) undoes its factor first.
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not scaler.is_enabled():
        # Fused AdamW leaves all weights as they are when found_inf is 1. GradScaler sets it in
        # fp16; here we do, so that no dtype ever writes a NaN into the weights.
        optimizer.found_inf = (~norm.isfinite()).float()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def answers_of(model, task, orders, scale, tok, machine, precision):
    """Predictions for one encoded split -> (N,) float64: indices of labels, or scores."""
    outputs = sum(predict(model, encoded, tok.pad_id, machine, precision) for encoded in orders)
    if task.labels:
        return outputs.argmax(1).astype(float)
    mean, spread = scale
    # nan_to_num: a model that diverged gives a bad score, and not a program that ends
    scores = np.nan_to_num(outputs[:, 0] / len(orders)) * spread + mean
    if task.limits:  # also in the files that are written, so that both score the same
        scores = np.clip(scores, *task.limits)
    return scores


def rows_of_epoch(orders, epoch):
    """[(rows, segments)] with one or two orders of the texts -> rows, segments of this epoch.

    With two, half of the examples are read in each order; the halves change places every epoch.
    """
    n = len(orders[0][0])
    order_of = [orders[(i + epoch) % len(orders)] for i in range(n)]
    return [order_of[i][0][i] for i in range(n)], [order_of[i][1][i] for i in range(n)]


def tune(model, tok, machine, task, splits, lr, seed):
    """Trains `model` and leaves it with the weights of its best epoch on the first dev split.

    splits: {split: (texts, labels)} as lib/glue.py reads them.
    -> (what happened, for the run's .json; {split: predictions (N,) float64} for all splits but
    train; (mean, spread) to scale a regression's outputs with).
    """
    recipe, (precision, _) = recipe_of(task), choose_dtype(dtype, machine.device)
    longest = min(recipe["max_tokens"], model.encoder.cfg.longest)
    encoded, n_cut = encode_splits(task, splits, tok, longest)
    targets, scale = training_targets(task, splits["train"][1])
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=precision == "fp16")
    n_updates = recipe["epochs"] * math.ceil(len(targets) / recipe["batch_size"])
    rng = np.random.default_rng(seed)  # order of the examples; dropout uses torch's generator
    first, update, seconds, history, best = task.dev[0], 0, 0.0, [], None

    def predictions_of(split):
        return answers_of(model, task, encoded[split], scale, tok, machine, precision)

    for epoch in range(1, recipe["epochs"] + 1):
        began, loss_sum = time.monotonic(), 0.0
        model.train()
        rows, segments = rows_of_epoch(encoded["train"], epoch)
        for index in in_batches(rows, recipe["batch_size"], rng):
            for group in optimizer.param_groups:
                group["lr"] = lr_of_update(update, n_updates, lr)
            tensors = padded([rows[i] for i in index], [segments[i] for i in index], tok.pad_id)
            batch = machine.take([*tensors, targets[index]])
            loss = train_step(model, task, optimizer, scaler, batch, machine, precision)
            loss_sum += loss * len(index)  # the last batch may be smaller
            update += 1
        seconds += time.monotonic() - began  # without evaluation

        predictions = {split: predictions_of(split) for split in task.dev if split in splits}
        scores = {split: glue.score(task, splits[split][1], found)
                  for split, found in predictions.items()}
        main_score = glue.main_score(task, scores[first])
        diverged = not math.isfinite(loss_sum)
        mean_loss = None if diverged else loss_sum / len(targets)  # JSON has no NaN
        history.append(dict(epoch=epoch, loss=mean_loss, scores=scores))
        print(json.dumps(history[-1]), flush=True)
        if best is None or main_score > best["score"]:
            best = dict(score=main_score, best_epoch=epoch, metrics=scores)
            best_predictions, best_weights = predictions, copy.deepcopy(model.state_dict())
        if diverged or 0 < patience <= epoch - best["best_epoch"]:
            break

    model.load_state_dict(best_weights)
    dev_predictions = best_predictions[first]
    report = best | dict(
        last=scores, last_score=main_score, epochs=len(history), history=history,
        diverged=diverged, cut=n_cut,
        # how much of the score is due to the choice of examples: some dev sets have 277 rows
        interval=glue.bootstrap(task, splits[first][1], dev_predictions),
        degenerate=bool(np.ptp(dev_predictions) == 0),  # one answer to everything
        examples_per_s=len(history) * len(targets) / seconds)
    # test splits are read once, with the best weights; the dev splits were already
    others = [split for split in splits if split != "train" and split not in best_predictions]
    return report, best_predictions | {split: predictions_of(split) for split in others}, scale


# ---- one run and its files --------------------------------------------------------

def name_of(init):
    """What an init is called in tables and file names."""
    if init == "pretrained":
        return init + FROM_TASK
    return init if init == "untrained" else os.path.basename(os.path.abspath(init))


def run_path(task, init, lr, seed):
    """Path of a run's files without their endings: .log .json .SPLIT.tsv .pt"""
    return os.path.join(out_dir, "glue", task.name, f"{name_of(init)}_lr{lr:g}_seed{seed}")


def run_one(task, splits, init, lr, seed):
    """Fine-tunes once and writes the run's files."""
    model, tok, machine = load_classifier(task, init, seed)
    report, predictions, scale = tune(model, tok, machine, task, splits, lr, seed)
    path = run_path(task, init, lr, seed)
    for split, values in predictions.items():
        columns, labels = dict(prediction=values), splits[split][1]
        if labels is not None:
            columns["label"] = labels
        glue.write_predictions(f"{path}.{split}.tsv", task, columns)
    save_model(f"{path}.pt", model, task, tok, scale)
    # last, because a run counts as finished once this file is there
    write_json(f"{path}.json", dict(seed=seed, lr=lr) | report | dict(
        recipe=recipe_of(task), started_from=hash_of_weights(init),
        data=glue.fingerprint(task, splits)))


def save_model(path, model, task, tok, scale):
    """The fine-tuned weights with what tools/export.py and --init_from_task need to know."""
    settings, weights = model_state(model.encoder)
    head = {name: tensor.cpu() for name, tensor in model.state_dict().items()
            if not name.startswith("encoder.")}
    saved = dict(model_settings=settings | dict(dropout=0.0), model=weights, head=head,
                 n_texts=model.n_texts, task=task.name, labels=list(task.labels),
                 scale=list(scale), tokenizer_fingerprint=tok.fingerprint)
    try:
        replace_file(path, lambda file: torch.save(saved, file))
    except RuntimeError as error:  # what torch raises when the disk is full
        raise OSError(f"{path} could not be written: {error}") from None


@functools.cache
def hash_of_weights(init):
    """Hash of the files a run starts from, so that results of an older checkpoint are not reused.

    16 hex digits. "untrained" counts as well: its network is that of the checkpoint.
    """
    paths = [os.path.join(folder_of(init), name) for name in ("best.pt", "ckpt.pt")]
    paths = [path for path in paths if os.path.exists(path)][:1]
    if init_from_task and init == "pretrained":
        paths.append(os.path.join(init_from_task, "model.pt"))
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:16]


def finished(task, data, init, lr, seed):
    """Result of a run if it is there, with the same recipe, weights and data; otherwise None."""
    try:
        with open(run_path(task, init, lr, seed) + ".json", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):  # not run yet, or damaged: it is run again
        return None
    # a result of another recipe, checkpoint or data set has the same name and does not count
    wanted = dict(recipe=recipe_of(task), started_from=hash_of_weights(init), data=data)
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
            name = task.folder if os.path.isabs(task.folder) else task.name
            settings = config | dict(task=name, one_run=f"{init}|{lr}|{seed}")
            arguments = [f"--{key}={value}" for key, value in settings.items()]
            exit_code = run_python([os.path.abspath(__file__), *arguments], f"{path}.log",
                                   number, jobs)
        found = None if exit_code else finished(task, data, init, lr, seed)
        if not found:
            failures.append(f"{path}.log ends with: {last_line(path + '.log')}")
            return
        tqdm.write(
            f"{task.name} {name_of(init)} lr {lr:g} seed {seed}: "
            f"{json.dumps(found['metrics'][task.dev[0]])} after epoch {found['best_epoch']} of "
            f"{found['epochs']}, {found['examples_per_s']:.0f} examples/s"
            f"{', constant answer' if found['degenerate'] else ''}"
            f"{', diverged' if found['diverged'] else ''}", file=sys.stdout)
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
    candidates = [float(lr) for lr in lrs.split(",")] if lrs else list(task.lrs)
    if not grid_seeds or len(candidates) == 1:
        return candidates[len(candidates) // 2], {}
    # Seeds 101, 102, ... are never reported: the best of several on the same seeds looks too good.
    runs = [(init, lr, 100 + seed) for lr in candidates for seed in range(1, grid_seeds + 1)]
    results = run_all(task, splits, runs)
    medians = {lr: statistics.median(found["score"] for found in results if found["lr"] == lr)
               for lr in candidates}
    for run in runs:  # their weights are of no use
        remove_file(run_path(task, *run) + ".pt")
    # keys as text: glue.json has no others
    return max(candidates, key=medians.get), {f"{lr:g}": score for lr, score in medians.items()}


def tune_with_seeds(task, splits, init):
    """Chooses a learning rate and runs all seeds -> (summary for glue.json, path of the best run).

    Of the weights, only those of the best pretrained run stay: out_dir/glue/TASK/model.pt.
    """
    lr, compared = choose_lr(task, splits, init)
    runs = [(init, lr, seed) for seed in range(1, seeds + 1)]
    results = run_all(task, splits, runs)
    paths = [run_path(task, *run) for run in runs]
    scores = [found["score"] for found in results]
    best = paths[scores.index(max(scores))]
    # no .pt: an earlier command has made these runs and moved or removed their weights
    if init == "pretrained" and os.path.exists(f"{best}.pt"):
        os.replace(f"{best}.pt", os.path.join(out_dir, "glue", task.name, "model.pt"))
    for path in paths:
        remove_file(f"{path}.pt")
    return summary_of(results, task) | dict(lr=lr, learning_rates=compared), best


def fine_tune(task, splits, notes):
    """One task: the pretrained model and its controls -> the task's entry in glue.json."""
    os.makedirs(os.path.join(out_dir, "glue", task.name), exist_ok=True)
    labels = splits[task.dev[0]][1]
    # what is reached without reading the texts; a useful model is above it
    majority = np.full(len(labels), glue.majority(task, splits["train"][1]))
    entry = dict(notes=notes, recipe=recipe_of(task), metric=" and ".join(task.metrics),
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
    zero_or_more = (grid_seeds, n_concept, epochs, batch_size, max_tokens, patience, weight_decay)
    if min(seeds, jobs) < 1 or min(zero_or_more) < 0:
        raise ValueError("expected seeds and jobs of 1 or more, all other numbers of 0 or more")
    if not 0 <= warmup < 1 or not 0 <= dropout < 1:
        raise ValueError(f"warmup={warmup}, dropout={dropout}: expected 0 or more and below 1")
    try:
        good_lrs = not lrs or all(0 < float(lr) < 1 for lr in lrs.split(","))
    except ValueError:
        good_lrs = False
    if not good_lrs:
        raise ValueError(f"lrs={lrs!r}: expected learning rates with commas between, such as "
                         "1e-4,3e-4")
    if 0 < max_tokens < 8:
        raise ValueError(f"max_tokens={max_tokens}: expected 8 or more")
    if init_from_task and not os.path.exists(os.path.join(init_from_task, "model.pt")):
        raise ValueError(f"init_from_task={init_from_task}: no model.pt there; fine-tune first, "
                         "for example "
                         f"python finetune_glue.py --out_dir={out_dir} --task=mnli")


def read_tasks(setting):
    """The setting `task` -> [(task, splits, notes)]. Raises ValueError and FileNotFoundError."""
    found, given = [], setting.split(",")
    for name in [name for part in given for name in glue.GROUPS.get(part, (part,))]:
        task = glue.find_task(name)
        # All files are read before the first run, so that a damaged one shows at once.
        try:
            if glue_dir or os.path.isabs(task.folder):  # absolute: a folder of the user's own
                splits, notes = glue.read_task(task, glue_dir)
            else:
                splits, notes = glue.load_hub(task, hub)
        except FileNotFoundError as error:
            if name in given:
                raise
            print(f"{name} is left out: {error}", flush=True)  # a part of a group
            continue
        if name == "mnli" and glue_dir:  # AX has no training data: the MNLI model answers it
            for test in glue.read_task(glue.TASKS["ax"], glue_dir)[0].values():
                splits["ax"] = test
        found.append((task, splits, notes))
    if not found:
        raise ValueError(f"none of the files of {setting} is in {glue_dir or hub}")
    return found


# ---- all tasks ------------------------------------------------------------------------

def fine_tune_all(found):
    """Fine-tunes on all tasks, writes glue.json, glue.md and the submission, prints the table."""
    path, results = os.path.join(out_dir, "glue.json"), {}
    if os.path.exists(path):  # results of other tasks stay
        try:
            with open(path, encoding="utf-8") as file:
                results = dict(json.load(file))
        except (ValueError, TypeError) as error:
            sys.exit(f"error: {path} is damaged: {error}; rm {path}, and give its tasks again: "
                     "finished runs are kept")
    encoder, _, checkpoint = load_run(out_dir, "cpu")
    for task, splits, notes in found:
        if not task.dev:
            print(f"{task.name} has no training data of its own: --task=mnli answers it",
                  flush=True)
            continue
        for note in notes:
            print(note, flush=True)
        params = dict(params=f"{encoder.num_params() / 1e6:.1f}M")
        results[task.name + FROM_TASK] = params | fine_tune(task, splits, notes)
        write_json(path, results)  # after each task: a run of all of GLUE takes long
    table = markdown(results, f"{out_dir} after {checkpoint['tokens']:,} tokens of pretraining")
    replace_file(os.path.join(out_dir, "glue.md"), lambda file: file.write(table.encode()))
    print("\n" + table)
    best_runs = {name: entry["best_run"] for name, entry in results.items()}
    missing = write_submission(os.path.join(out_dir, "glue_submission.zip"), best_runs)
    if missing:
        print(f"no submission yet, test predictions are missing for: {', '.join(missing)}")
    else:
        print(f"submission for GLUE's server: {out_dir}/glue_submission.zip")
    shown = ("median", "min", "max", "majority", "lr")
    print(json.dumps({name: {key: entry[key] for key in shown}
                      for name, entry in results.items()}))


if __name__ == "__main__":
    with user_mistakes():
        check_settings()
        found = read_tasks(task)
        for init in INITS:  # loads each once, so that a mistake shows before hours of work
            load_classifier(found[0][0], init, seed=0)
    try:
        if one_run:
            init, lr, seed = one_run.split("|")
            run_one(*found[0][:2], init, float(lr), int(seed))
        else:
            with FolderLock(os.path.join(out_dir, "glue")):
                fine_tune_all(found)
    except BlockingIOError:
        sys.exit(f"error: another run is fine-tuning in {out_dir}; wait for it: --task takes "
                 "several tasks, --jobs runs several at a time")
    except OSError as error:
        sys.exit(f"error: {error}; what was finished is kept, and the same command goes on")
