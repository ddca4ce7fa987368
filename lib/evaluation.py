"""The loss of a model on the first rows of a data set, with the same masks for all models."""

import math

import torch
import torch.nn.functional as F

from lib.machine import autocast
from lib.settings import is_causal
from masking import mask_batch, next_tokens

MOST_LOGITS = 2**27  # logits that an evaluation holds at once: 512 MiB in fp32
# Evaluation masks depend on this and the row's number in the data set only, so that losses of
# different models, batch sizes and training seeds compare.
EVAL_SEED = 1234


@torch.no_grad()
def evaluate(model, data, tok, machine, dtype, masking_type="token", mlm_probability=0.15,
             rows=256, micro_batch=32, frequency=None, scores=None):
    """Loss of the first `rows` rows of `data` on fixed masks. Every process takes part.

    Rows and masks are the same for every model, batch size and device; all masked tokens become
    [MASK]. A decoder predicts every token of the rows but the first, whatever masking_type is.
    -> {"loss" (nats a predicted token), "accuracy", "perplexity", "bits_per_byte" (of the text of
    the predicted tokens; None when only ids are known), "predicted" (tokens)}.
    frequency: share of each id in the training text, float (V,); adds "splits":
    {name of SPLITS: {"loss", "share" of the predicted tokens}}.
    scores: of each id, float (V,), for masking_type="importance"; all predictions count alike.
    """
    was_training = model.training
    model.eval()
    n_bytes = torch.from_numpy(tok.n_bytes).to(machine.device)
    # sums over predicted tokens: weighted nats, weights, nats, tokens, hits, bytes; then weighted
    # nats, weights and tokens of each split
    sums = torch.zeros(6 + 3 * len(SPLITS), dtype=torch.float64)
    # process r of n takes rows r, r + n, r + 2n, ...
    my_rows = torch.arange(min(rows, data.n_blocks))[machine.rank::machine.world_size]
    for index in my_rows.split(micro_batch):
        if not len(index):  # fewer rows than processes: split() gives one part without rows
            break
        ids = torch.as_tensor(data.block(index.numpy()))
        if is_causal(model):
            batch = next_tokens(ids, tok)
        else:
            batch = mask_batch(ids, index, masking_type, mlm_probability, tok, seed=EVAL_SEED,
                               scores=None if scores is None else scores[ids],
                               importance_weights=False)
        inputs, positions, targets, weights, used = machine.take(batch)
        is_real = inputs != tok.pad_id if data.padded else None
        with autocast(machine.device, dtype):
            nats, hits = predict(model, inputs, positions, targets, is_real, tok.vocab_size)
        # Losses are weighted; counts, accuracy and bits per byte are about the predicted tokens.
        terms = [nats * weights, weights, nats * used, used, hits & used, n_bytes[targets] * used]
        if frequency is not None:
            for part in split_masks(inputs, positions, targets, frequency.to(machine.device)):
                terms += [nats * weights * part, weights * part, used & part]
        sums[:len(terms)] += torch.stack([term.sum() for term in terms]).cpu().double()
    model.train(was_training)
    weighted, weight, nats, predicted, hits, text_bytes, *of_splits = machine.all_sum(*sums)
    if not predicted:
        raise ValueError("no token of the evaluation rows can be masked: they hold special "
                         "tokens only")
    # the only division, after all sums: no mean of means, which would weigh rows unequally
    loss = weighted / weight
    bits_per_byte = nats / math.log(2) / max(text_bytes, 1) if tok.has_text else None
    result = dict(loss=loss, accuracy=hits / predicted, perplexity=math.exp(min(loss, 100)),
                  predicted=int(predicted), bits_per_byte=bits_per_byte)
    if frequency is not None:
        result["splits"] = {}
        parts = zip(SPLITS, of_splits[::3], of_splits[1::3], of_splits[2::3])
        for name, weighted, weight, tokens in parts:
            loss = weighted / weight if weight else None
            result["splits"][name] = dict(loss=loss, share=tokens / predicted)
    return result


def predict(model, inputs, positions, targets, is_real, vocab_size):
    """Cross-entropy (nats) of each predicted token, and whether its largest logit is right: (B,K).

    A few positions at a time, so that no more than MOST_LOGITS logits are in memory.
    """
    concepts, tokens = model.encode(inputs, is_real)
    documents = model.documents(inputs, is_real)
    at_once = max(1, MOST_LOGITS // (len(inputs) * vocab_size))
    # Logits are (B, positions, V): with large vocabularies more than everything else together.
    nats, hits = [], []
    for place, target in zip(positions.split(at_once, 1), targets.split(at_once, 1)):
        states = model.decode(concepts, tokens, place, documents, is_real)
        logits = model.logits(states).float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        nats.append(loss.view_as(target))
        hits.append(logits.argmax(-1) == target)
    return torch.cat(nats, dim=1), torch.cat(hits, dim=1)


def evaluate_all(model, sets, shares, tok, machine, dtype, rows, micro_batch):
    """`evaluate` of several data sets, {name: data} with the share of each in their mixture.

    -> ({"loss", "accuracy", "bits_per_byte"} of the mixture, {name: loss}).
    """
    results = {name: evaluate(model, data, tok, machine, dtype, rows=rows, micro_batch=micro_batch)
               for name, data in sets.items()}
    mean = {}
    for key in ("loss", "accuracy", "bits_per_byte"):
        values = [result[key] for result in results.values()]
        mean[key] = None
        if None not in values:
            mean[key] = sum(share * value for share, value in zip(shares, values))
    return mean, {name: result["loss"] for name, result in results.items()}


# Groups of predicted tokens that `evaluate` can report apart. A copy is the same id elsewhere in
# the row, not masked. Distances are in tokens, to the nearest copy; frequencies are of the id.
SPLITS = (
    "copy in the row", "no copy",
    "copy 1-8 away", "copy 9-32 away", "copy 33-128 away", "copy over 128 away",
    "frequent, over 1e-3", "medium, 1e-4 to 1e-3", "rare, under 1e-4",
    "not frequent, with copy", "not frequent, no copy",
)


def split_masks(inputs, positions, targets, frequency):
    """Which predicted tokens belong to each of SPLITS -> tuple of bool (B,K), in that order."""
    place = torch.arange(inputs.shape[1], device=inputs.device)
    is_copy = inputs[:, None] == targets[..., None]  # (B,K,T)
    none = 2**30  # stands for "no copy", larger than every distance
    distance = (place - positions[..., None]).abs().masked_fill(~is_copy, none).amin(-1)
    has_copy = distance < none
    share = frequency[targets]
    frequent, rare = share > 1e-3, share < 1e-4
    return (has_copy, ~has_copy,
            distance <= 8, (distance > 8) & (distance <= 32), (distance > 32) & (distance <= 128),
            (distance > 128) & has_copy,
            frequent, ~frequent & ~rare, rare,
            ~frequent & has_copy, ~frequent & ~has_copy)


def token_frequency(data, tok, rows=4096):
    """Share of each id in up to `rows` rows, spread evenly over `data` -> float32 (V,)."""
    n = min(rows, data.n_blocks)
    index = torch.arange(n) * data.n_blocks // n  # evenly spread over all rows
    counts = torch.zeros(tok.vocab_size)
    for part in index.split(256):
        ids = torch.as_tensor(data.block(part.numpy()))
        counts += torch.bincount(ids.flatten(), minlength=tok.vocab_size)
    return counts / counts.sum()
