"""One fine-tuning run: AdamW with warm-up and linear decay, an evaluation each epoch, the best one kept."""

import copy
import json
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from lib import glue
from lib.heads import encode_texts, padded
from lib.machine import autocast
from lib.run import does_not_fit


def in_batches(rows, size, rng):
    """Indices of rows in batches of equal number and similar length, so that little is padded; in random order."""
    order = rng.permutation(len(rows))
    pools = np.split(order, range(64 * size, len(order), 64 * size))
    lengths = np.array([len(row) for row in rows])
    sorted_ = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = np.split(sorted_, range(size, len(order), size))
    return [batches[i] for i in rng.permutation(len(batches))]


@torch.no_grad()
def predict(model, encoded, pad_id, machine, dtype, eval_tokens=16384):
    """(rows, segments) -> outputs (N, n_out) float64; rows of similar length together, up to eval_tokens at once."""
    rows, segments = encoded
    model.eval()
    order, outputs = sorted(range(len(rows)), key=lambda i: len(rows[i])), {}
    while order:
        size = max(1, eval_tokens // len(rows[order[min(len(order), 256) - 1]]))
        part, order = order[:min(size, 256)], order[min(size, 256):]
        batch = machine.take(padded([rows[i] for i in part], [segments[i] for i in part], pad_id))
        with autocast(machine.device, dtype):
            outputs |= zip(part, model(*batch).double().cpu().numpy())
    return np.array([outputs[i] for i in range(len(rows))])


def tune(model, tok, machine, dtype, job, splits, recipe, lr, seed):
    """Trains `model` on splits["train"] and leaves it at the weights of its best epoch on the first dev split.

    recipe: epochs, batch_size, max_tokens, warmup (share), weight_decay, patience (epochs, 0: off). Where the order of
    two texts means nothing, every other epoch reads them the other way round, and answers are averaged over both.
    -> (dict of scores of the best and the last epoch and what is needed to doubt them; {split: answers (N,) float64},
    labels as indices; (mean, spread) that a regression's outputs are multiplied with and added to).
    """
    longest = min(recipe["max_tokens"], model.encoder.cfg.longest)
    orders, encoded, cut = (False, True)[:1 + job.swap], {}, {}
    for split, (texts, _) in splits.items():
        for turned in orders:
            ordered = [pair[::-1] for pair in texts] if turned else texts
            *encoded[split, turned], cut[split] = encode_texts(ordered, tok, longest)
    targets, first = splits["train"][1], job.dev[0]
    mean, spread = (0.0, 1.0) if job.labels else (float(targets.mean()), float(targets.std()) or 1.0)
    answers = torch.as_tensor((targets - mean) / spread, dtype=torch.int64 if job.labels else torch.float32)

    def loss_of(ids, segments, real, wanted):
        with autocast(machine.device, dtype):
            outputs = model(ids, segments, real)
        return F.cross_entropy(outputs, wanted) if job.labels else F.mse_loss(outputs[:, 0], wanted)

    def answer(split):
        outputs = sum(predict(model, encoded[split, turned], tok.pad_id, machine, dtype) for turned in orders)
        if job.labels:
            return outputs.argmax(1).astype(float)
        found = np.nan_to_num(outputs[:, 0] / len(orders)) * spread + mean
        return np.clip(found, *job.limits) if job.limits else found  # scored as they are written

    groups = [dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=recipe["weight_decay"]),
              dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=dtype == "fp16")
    n_updates = recipe["epochs"] * math.ceil(len(targets) / recipe["batch_size"])
    warm = max(1, round(recipe["warmup"] * n_updates))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warm, (n_updates - step) / max(1, n_updates - warm)))
    rng, history, best, diverged, seconds = np.random.default_rng(seed), [], None, False, 0.0
    for epoch in range(1, recipe["epochs"] + 1):
        began, total = time.monotonic(), 0.0
        model.train()
        turns = (np.arange(len(targets)) + epoch) % 2 * job.swap
        rows, segments = ([encoded["train", bool(turn)][part][i] for i, turn in enumerate(turns)] for part in (0, 1))
        for index in in_batches(rows, recipe["batch_size"], rng):
            batch = padded([rows[i] for i in index], [segments[i] for i in index], tok.pad_id)
            batch = machine.take([*batch, answers[index]])
            try:
                loss = loss_of(*batch)
                scaler.scale(loss).backward()
            except RuntimeError as error:
                sys.exit(does_not_fit(error, model, batch, machine, dtype, len(index), "batch_size", loss_of))
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not scaler.is_enabled():
                optimizer.found_inf = (~norm.isfinite()).float()  # fused AdamW then leaves all as it is
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item() * len(index)
        seconds += time.monotonic() - began
        diverged = not math.isfinite(total)
        found = {split: answer(split) for split in job.dev if split in splits}
        scores = {split: glue.score(job, splits[split][1], values) for split, values in found.items()}
        history.append(dict(epoch=epoch, loss=None if diverged else total / len(targets), scores=scores))
        print(json.dumps(history[-1]), flush=True)
        main = glue.main_score(job, scores[first])
        if best is None or main > best["score"]:
            best = dict(score=main, best_epoch=epoch, metrics=scores)
            predictions, weights = found, copy.deepcopy(model.state_dict())
        if diverged or 0 < recipe["patience"] <= epoch - best["best_epoch"]:
            break
    model.load_state_dict(weights)
    return best | dict(
        last=scores, last_score=main, epochs=len(history), history=history, diverged=diverged, cut=cut,
        interval=glue.bootstrap(job, splits[first][1], predictions[first]),
        degenerate=bool(np.ptp(predictions[first]) == 0), examples_per_s=len(history) * len(targets) / seconds,
    ), predictions | {split: answer(split) for split in set(splits) - {"train", *predictions}}, (mean, spread)
