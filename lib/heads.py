"""What fine-tuning and export need beside the Classifier: rows of ids from texts, and its answers.

Two texts become the row [CLS] a [SEP] b [SEP], one text becomes [CLS] a [SEP]. lib/classifier.py
says what the head makes of them.
"""

import numpy as np
import torch

from lib.classifier import Classifier  # noqa: F401  most who need the rows need it too
from lib.machine import autocast


def keep_concepts(settings, weights, n):
    """Settings and weights of an encoder -> the same with its first n concepts only; 0: with all.

    Nothing changes where it has no more than n, or where they are anchored: those that stand behind
    a text do not count anyway (ConceptEncoder.standing). Words are assigned by id % n_concept, so
    where n divides the old number, each concept keeps its words and takes over some dropped ones.
    """
    keeps_all = settings.get("arch", "concept") != "concept" or settings.get("anchored")
    if keeps_all or not 0 < n < settings["n_concept"]:
        return settings, weights
    return settings | dict(n_concept=n), weights | dict(concepts=weights["concepts"][:n])


# ---- texts to batches --------------------------------------------------------

def encode_texts(texts, tok, longest):
    """[(a,) or (a, b)] -> (rows, segments of each row, how many rows were cut), int64 arrays.

    A row has `longest` ids at most; the longer text of a pair is cut first.
    """
    # Inside a text a word has a space before it, and most tokenizers give it another id without.
    # Pretraining has mostly seen the one with it. Bytes are the same in both places.
    space = "" if tok.name == "byte" else " "
    columns = [tok.encode([space + text.strip() for text in column]) for column in zip(*texts)]
    rows, segments, n_cut = [], [], 0
    for parts in zip(*columns):
        # a row is [CLS], then each part with a [SEP] behind it that counts to its segment
        lengths = [len(part) for part in parts]
        kept = cut_lengths(lengths, longest - 1 - len(parts))  # [CLS], and a [SEP] for each text
        n_cut += kept != lengths
        row, segment = [np.array([tok.cls_id])], [np.array([0])]
        for number, (part, n) in enumerate(zip(parts, kept), 1):
            row += [part[:n].astype(np.int64), [tok.sep_id]]
            segment.append(np.full(n + 1, number))
        rows.append(np.concatenate(row))
        segments.append(np.concatenate(segment))
    return rows, segments, n_cut


def cut_lengths(lengths, room):
    """Lengths of one or two texts -> the same cut to `room` tokens together, the longest first."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    short = min(min(lengths), room // 2)
    return [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]


def padded(rows, segments, pad_id):
    """Rows of any lengths -> ids, segments, real: (B,T) tensors, T the longest of them."""
    ids = torch.full((len(rows), max(map(len, rows))), pad_id)
    padded_segments = torch.zeros_like(ids)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, segment) in enumerate(zip(rows, segments)):
        ids[i, :len(row)] = torch.from_numpy(row)
        padded_segments[i, :len(row)] = torch.from_numpy(segment)
        real[i, :len(row)] = True
    return ids, padded_segments, real


def in_batches(rows, size, rng):
    """Splits rows into batches of `size` for one epoch -> list of index arrays, in random order.

    Rows of similar length share a batch, so that there is little padding. To keep batches random,
    rows are sorted by length inside pools of 64 batches only, and the pools are drawn anew.
    """
    lengths = np.array([len(row) for row in rows])
    order = rng.permutation(len(rows))
    pools = np.split(order, range(64 * size, len(order), 64 * size))
    pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
    batches = np.split(np.concatenate(pools), range(size, len(order), size))
    return [batches[i] for i in rng.permutation(len(batches))]


@torch.no_grad()
def predict(model, encoded, pad_id, machine, dtype, eval_tokens=16384):
    """Outputs of a Classifier for (rows, segments) -> (N,n_out) float64, in the order of the rows.

    A batch holds rows of similar length: up to 256 of them and eval_tokens tokens.
    """
    rows, segments = encoded
    model.eval()
    # Sorted by length, a batch has little padding, and padding does not change an answer.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    outputs = [None] * len(rows)
    while order:
        longest = len(rows[order[:256][-1]])
        size = min(256, max(1, eval_tokens // longest))
        part, order = order[:size], order[size:]
        batch = padded([rows[i] for i in part], [segments[i] for i in part], pad_id)
        batch = machine.take(batch)
        with autocast(machine.device, dtype):
            found = model(*batch).double().cpu().numpy()
        for i, output in zip(part, found):
            outputs[i] = output
    return np.array(outputs)
