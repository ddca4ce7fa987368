"""Fine-tuning a pretrained encoder: one run of finetune_glue.py, or finetune() for your own lists.

    from lib.finetune import finetune
    mood = finetune("out/demo", ["so warm", "so cold", ...], ["good", "bad", ...])
    mood.predict(["warm and fine"])  ->  ["good"]

The recipe is BERT's: AdamW, a short warm-up, linear decay to 0, the dev set scored once an epoch.
The weights of the best epoch are kept, as is usual for GLUE, where test labels are not public. A
dev score is then the best of several and a little too good; the score of the last epoch, which is
not chosen, is reported beside it.
"""

import copy
import json
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lib import glue
from lib.files import replace_file
from lib.heads import Classifier, encode_texts, in_batches, keep_concepts, padded, predict
from lib.machine import Machine, autocast, choose_dtype, does_not_fit, find_machine
from lib.run import load_run, model_state, read_checkpoint
from lib.settings import build_model, settings_of, with_defaults


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a run except its learning rate; finetune_glue.py says what each means."""
    n_concept: int
    epochs: int
    batch_size: int
    max_tokens: int
    warmup: float = 0.06
    weight_decay: float = 0.01
    dropout: float = 0.1
    freeze_table: bool = False
    patience: int = 3


# ---- lists in Python ------------------------------------------------------------

@dataclass
class FineTuned:
    """A fine-tuned model with what it needs to answer."""
    model: Classifier
    tok: object
    machine: Machine
    precision: str  # bf16, fp16 or fp32
    task: glue.Task
    recipe: Recipe
    scale: tuple  # (mean, spread) of the training scores; a regression learns them without
    report: dict  # what happened, see `tune`

    @property
    def scores(self):
        """{metric: value} on the dev set after the epoch that was kept; {} without a dev set.

        f1 of two classes is that of the second one in alphabetical order.
        """
        return self.report["metrics"].get("dev", {})

    @property
    def history(self):
        """A dict for each epoch: its training loss, and the scores on the dev set."""
        return self.report["history"]

    def predict(self, texts):
        """Texts or pairs of texts -> list of labels, or of scores. Raises ValueError."""
        rows = check_texts(texts, "texts", len(self.task.text))
        if not rows:
            return []
        longest = longest_row(self.model, self.recipe)
        orders = [encode_texts(rows, self.tok, longest)[:2]]
        answers = answers_of(self.model, self.task, orders, self.scale, self.tok, self.machine,
                             self.precision).tolist()
        labels = self.task.labels
        return [labels[int(answer)] for answer in answers] if labels else answers

    def save(self, path):
        """Writes a model.pt such as finetune_glue.py's; tools/export.py takes its folder."""
        save_model(path, self.model, self.task, self.tok, self.scale)


def finetune(run, texts, labels, dev_texts=None, dev_labels=None, *, epochs=10, lr=3e-4, seed=1,
             batch_size=32, max_tokens=128, n_concept=0, freeze_table=False, device="auto",
             dtype="auto"):
    """Fine-tunes a pretrained encoder on lists -> FineTuned, with .predict(texts) and .scores.

    run: the folder of a training run, or (model, tokenizer), which stay as they are. texts: strings
    or pairs of strings. labels: strings, ints or bools name classes; numbers with a float among
    them are scores. With a dev set, the weights of its best epoch are kept and training stops
    after 3 epochs without a better score; without, those of the last epoch. n_concept: 0 keeps all
    concepts for single texts and 16 for pairs. freeze_table: the token table is not trained. Raises
    ValueError and FileNotFoundError.
    """
    texts, n_texts = check_texts(texts, "texts"), 1
    if texts:
        n_texts = len(texts[0])
    labels = check_labels(labels, "labels", len(texts))
    if (dev_texts is None) != (dev_labels is None):
        raise ValueError("found a dev set with texts or labels alone, expected both or neither")
    names = class_names(labels)
    splits, dev = {"train": (texts, label_indices(names, labels, "labels"))}, ()
    if dev_texts is not None:
        dev_texts, dev = check_texts(dev_texts, "dev_texts", n_texts), ("dev",)
        dev_labels = check_labels(dev_labels, "dev_labels", len(dev_texts))
        splits["dev"] = dev_texts, label_indices(names, dev_labels, "dev_labels")
    task = glue.Task("lists", "", ("first", "second")[:n_texts], labels=names, dev=dev, test=(),
                     metrics=("accuracy",) if names else ("pearson",))
    recipe = Recipe(n_concept or task.n_concept, epochs, batch_size, max_tokens,
                    freeze_table=freeze_table)
    check_recipe(recipe, lr)
    machine = find_machine(device)
    precision, _ = choose_dtype(dtype, machine.device)
    if isinstance(run, (str, os.PathLike)):
        run = load_run(os.path.expanduser(run), "cpu")
    if not isinstance(run, (tuple, list)):
        raise ValueError(f"run: found {type(run).__name__}, expected the folder of a training run "
                         "or (model, tokenizer)")
    model, tok = run[:2]
    # the generators of the notebook that calls this go on as if nothing had been drawn
    gpus = [machine.device] if machine.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        classifier = make_classifier(model, tok, task, recipe, seed).to(machine.device)
        report, _, scale = tune(classifier, tok, machine, task, splits, recipe, lr, seed, precision)
    return FineTuned(classifier.eval(), tok, machine, precision, task, recipe, scale, report)


def check_texts(texts, name, n_texts=None):
    """Texts or pairs -> [(text,) or (text, text)]. ValueError names the first one that is neither.

    n_texts: 1 or 2 if it is known; otherwise all are as the first.
    """
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"{name}: found one string, expected a list of texts")
    rows = []
    for i, text in enumerate(texts):
        text = text.tolist() if hasattr(text, "tolist") else text  # a pair as a row of an array
        row = (text,) if isinstance(text, str) else text
        good = isinstance(row, (tuple, list)) and all(isinstance(part, str) for part in row)
        n_texts = n_texts or (len(row) if good else 1)
        if not good or len(row) != n_texts or n_texts > 2:
            expected = "a text" if n_texts == 1 else "a pair of texts"
            raise ValueError(f"{name}[{i}]: found {str(text)[:50]!r} ({type(text).__name__}), "
                             f"expected {expected}")
        rows.append(tuple(row))
    return rows


def check_labels(labels, name, n_texts):
    """Labels as plain Python values, one for each text. Raises ValueError."""
    if isinstance(labels, (str, bytes)):
        raise ValueError(f"{name}: found one string, expected a list of labels")
    # numbers of numpy and torch -> int, float, bool
    labels = [label.item() if hasattr(label, "item") else label for label in labels]
    if len(labels) != n_texts or not labels:
        raise ValueError(f"found {n_texts} texts and {len(labels)} {name}, expected as many, and "
                         "at least one")
    for i, label in enumerate(labels):
        is_number = isinstance(label, (int, float)) and math.isfinite(label)
        if not is_number and not isinstance(label, str):
            raise ValueError(f"{name}[{i}]: found {label!r}, expected a string, an int, a bool or "
                             "a finite number")
    return labels


def class_names(labels):
    """Training labels -> their different values in order, () if they are scores."""
    kinds = {type(label) for label in labels}
    if float in kinds and kinds <= {float, int}:
        return ()
    if len(kinds) > 1:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"labels: found a mixture of {found}; expected one kind")
    names = tuple(sorted(set(labels)))
    if len(names) == 1:
        raise ValueError(f"labels: found {names[0]!r} alone, expected two or more different ones")
    return names


def label_indices(names, labels, what):
    """Labels -> float64 (N,): their places in `names`, or the scores themselves."""
    index = {name: i for i, name in enumerate(names)}
    for i, label in enumerate(labels):
        known = label in index if names else not isinstance(label, (str, bool))
        if not known or names and type(label) is not type(names[0]):  # True == 1, but is no 1
            expected = "one of the training labels" if names else "a number"
            raise ValueError(f"{what}[{i}]: found {label!r}, expected {expected}")
    return np.array([index[label] if names else label for label in labels], dtype=float)


def check_recipe(recipe, lr):
    """Raises ValueError for hyperparameters that nothing can be done with."""
    least = dict(n_concept=0, epochs=1, batch_size=1, max_tokens=8, weight_decay=0, patience=0)
    wrong = [f"{name}={getattr(recipe, name)} (expected {n} or more)"
             for name, n in least.items() if not n <= getattr(recipe, name) < math.inf]
    wrong += [f"{name}={getattr(recipe, name)} (expected 0 or more and below 1)"
              for name in ("warmup", "dropout") if not 0 <= getattr(recipe, name) < 1]
    if not 0 < lr < 1:
        wrong.append(f"lr={lr} (expected more than 0 and below 1, such as 3e-4)")
    if wrong:
        raise ValueError(", ".join(wrong))


# ---- the model that is fine-tuned -------------------------------------------------

def make_classifier(model, tok, task, recipe, seed, fresh=False):
    """A pretrained encoder on the CPU, which is copied -> Classifier with its weights at the start.

    fresh: with new weights in the encoder, too. Sets torch's random generators, for them and for
    dropout later. Raises ValueError if the tokenizer cannot encode text, or padding would count.
    """
    tok.encode([])  # raises for a run whose data came as token ids
    if getattr(model.cfg, "mixer", "") == "fnet":
        raise ValueError("mixer=fnet reads padding as if it were text, and fine-tuning fills rows "
                         "up with it; train one with mixer=resonance")
    # A sentence has fewer words than the model has concepts: a part of them is enough for pairs.
    settings, weights = keep_concepts(settings_of(model), model.state_dict(), recipe.n_concept)
    torch.manual_seed(seed)
    encoder = build_model(settings | dict(dropout=recipe.dropout))
    if not fresh:
        encoder.load_state_dict(weights)
    n_out = max(1, len(task.labels))  # a regression has no labels and one output
    classifier = Classifier(encoder, n_out, len(task.text), recipe.dropout)
    classifier.init_special_tokens(tok)
    encoder.wte.requires_grad_(not recipe.freeze_table)
    return classifier


def take_task_weights(classifier, folder, tok):
    """Weights fine-tuned on another task -> `classifier`, but not the head, whose labels differ.

    folder: holds that task's model.pt. Raises ValueError if it is of another model or tokenizer.
    """
    path = os.path.join(folder, "model.pt")
    saved = read_checkpoint(path)
    missing = {"model_settings", "model", "head", "tokenizer_fingerprint"} - set(saved)
    if missing:
        raise ValueError(f"{path} was not written by fine-tuning: it has no "
                         f"{', '.join(sorted(missing))}")
    # a setting that is newer than the file has its default
    before = with_defaults(saved["model_settings"])
    # model.pt is stored without dropout, since tools/export.py and others do not train it
    now = settings_of(classifier.encoder) | dict(dropout=0.0)
    names = before.keys() | now.keys()
    differ = [f"{name}: {before.get(name)} there, {now.get(name)} here"
              for name in sorted(names) if before.get(name) != now.get(name)]
    if saved["tokenizer_fingerprint"] != tok.fingerprint:
        differ.append("the tokenizer")
    if differ:
        raise ValueError(f"{folder} was fine-tuned from another model or tokenizer, or with "
                         f"another --n_concept ({'; '.join(differ)})")
    try:
        classifier.encoder.load_state_dict(saved["model"])
        classifier.segments.data.copy_(saved["head"]["segments"])
    except RuntimeError as error:  # other weights or shapes
        raise ValueError(f"{path} was written with another model.py: {error}") from None


def save_model(path, model, task, tok, scale):
    """The fine-tuned weights with what tools/export.py and take_task_weights need to know."""
    settings, weights = model_state(model.encoder)
    head = {name: tensor.cpu() for name, tensor in model.state_dict().items()
            if not name.startswith("encoder.")}
    saved = dict(model_settings=settings | dict(dropout=0.0), model=weights, head=head,
                 n_texts=model.n_texts, aligned=model.aligned, task=task.name,
                 labels=list(task.labels), scale=list(scale),
                 tokenizer_fingerprint=tok.fingerprint)
    try:
        replace_file(path, lambda file: torch.save(saved, file))
    except RuntimeError as error:  # what torch raises when the disk is full
        raise OSError(f"{path} could not be written: {error}") from None


# ---- the loop -----------------------------------------------------------------------

def longest_row(model, recipe):
    """Tokens in the longest row: what is asked for, and what the encoder reads."""
    return min(recipe.max_tokens, model.encoder.cfg.longest)


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


def lr_of_update(update, n_updates, peak, warmup):
    """Learning rate of an update, counted from 0: linear warm-up to `peak`, linear decay to 0."""
    n_warmup = max(1, round(warmup * n_updates))  # the first update moves the weights, too
    rising = (update + 1) / n_warmup
    falling = (n_updates - update) / max(1, n_updates - n_warmup)
    return peak * min(rising, falling)


def make_optimizer(model, weight_decay):
    """AdamW; weight decay for matrices only, as usual: not for biases and gains of norms."""
    # betas and eps are RoBERTa's (1907.11692, section 3.1). There is no learning rate here: the
    # loop sets it before each update.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)


def train_step(model, task, optimizer, scaler, batch, machine, precision):
    """One update on a batch (ids, segments, real, targets) -> its mean loss. Raises MemoryError."""

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
        message = does_not_fit(error, model, batch, machine, precision, len(batch[0]),
                               "batch_size", loss_of)
        raise MemoryError(message.removeprefix("error: ")) from None
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


def tune(model, tok, machine, task, splits, recipe, lr, seed, precision):
    """Trains `model` and leaves it with the weights of its best epoch on the first dev split.

    splits: {split: (texts, labels)} as lib/glue.py reads them. Without a dev split the weights of
    the last epoch stay. Prints a line of JSON after each epoch.
    -> (what happened, for the run's .json; {split: predictions (N,) float64} for all splits but
    train; (mean, spread) to scale a regression's outputs with).
    """
    encoded, n_cut = encode_splits(task, splits, tok, longest_row(model, recipe))
    targets, scale = training_targets(task, splits["train"][1])
    optimizer = make_optimizer(model, recipe.weight_decay)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=precision == "fp16")
    n_updates = recipe.epochs * math.ceil(len(targets) / recipe.batch_size)
    rng = np.random.default_rng(seed)  # order of the examples; dropout uses torch's generator
    update, seconds, history, best = 0, 0.0, [], None

    def predictions_of(split):
        return answers_of(model, task, encoded[split], scale, tok, machine, precision)

    for epoch in range(1, recipe.epochs + 1):
        began, loss_sum = time.monotonic(), 0.0
        model.train()
        rows, segments = rows_of_epoch(encoded["train"], epoch)
        for index in in_batches(rows, recipe.batch_size, rng):
            for group in optimizer.param_groups:
                group["lr"] = lr_of_update(update, n_updates, lr, recipe.warmup)
            tensors = padded([rows[i] for i in index], [segments[i] for i in index], tok.pad_id)
            batch = machine.take([*tensors, targets[index]])
            loss = train_step(model, task, optimizer, scaler, batch, machine, precision)
            loss_sum += loss * len(index)  # the last batch may be smaller
            update += 1
        seconds += time.monotonic() - began  # without evaluation

        predictions = {split: predictions_of(split) for split in task.dev if split in splits}
        scores = {split: glue.score(task, splits[split][1], found)
                  for split, found in predictions.items()}
        # without a dev set each epoch counts as better than the one before: the last one is kept
        main_score = glue.main_score(task, scores[task.dev[0]]) if task.dev else epoch
        diverged = not math.isfinite(loss_sum)
        mean_loss = None if diverged else loss_sum / len(targets)  # JSON has no NaN
        history.append(dict(epoch=epoch, loss=mean_loss, scores=scores))
        print(json.dumps(history[-1]), flush=True)
        if best is None or main_score > best["score"]:
            best = dict(score=main_score, best_epoch=epoch, metrics=scores)
            best_predictions, best_weights = predictions, copy.deepcopy(model.state_dict())
        if diverged or 0 < recipe.patience <= epoch - best["best_epoch"]:
            break

    model.load_state_dict(best_weights)
    report = best | dict(
        last=scores, last_score=main_score, epochs=len(history), history=history,
        diverged=diverged, cut=n_cut, examples_per_s=len(history) * len(targets) / seconds)
    if task.dev:
        dev_labels, answers = splits[task.dev[0]][1], best_predictions[task.dev[0]]
        report |= dict(
            # how much of the score is due to the choice of examples: some dev sets have 277 rows
            interval=glue.bootstrap(task, dev_labels, answers),
            degenerate=bool(np.ptp(answers) == 0))  # one answer to everything
    # test splits are read once, with the best weights; the dev splits were already
    others = [split for split in splits if split != "train" and split not in best_predictions]
    return report, best_predictions | {split: predictions_of(split) for split in others}, scale
