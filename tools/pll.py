"""Pseudo-log-likelihood of texts, comparable between vocabularies: PLL-word-l2r (Kauf and Ivanova 2023, 2305.10588).

A masked model has no likelihood of a text. Its stand-in is the sum of what each token costs where it alone is masked
(1910.14659), but that flatters vocabularies that cut words up: the rest of a word gives a token away. So the later
tokens of its word are masked with it (section 3 of the paper), and the sum is divided by words and bytes, not tokens:

    text               the  mer|maid  sings
    row for "mer"      the  [M] [M]   sings
    row for "maid"     the  mer [M]   sings

One row for each token, framed by end-of-document marks as rows look in training.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from lib.embed import batches, read_texts, rows_at_once
from lib.machine import autocast
from masking import word_flags, word_starts


@torch.no_grad()
def score(model, rows, tok, machine, dtype, batch_tokens):
    """Rows of ids between end-of-document marks, of any lengths -> nats of each text, float64 (N,).

    Words are masking.py's, those of whole-word masking, in which "...)" is one.
    """
    nats = torch.zeros(len(rows), dtype=torch.float64)
    for index in batches(model, rows, batch_tokens):  # texts of one length
        ids_BT = torch.from_numpy(np.stack([rows[i] for i in index]))
        word_BT = word_starts(word_flags(tok, "cpu")[ids_BT]).cumsum(1)
        (B, T), place_T = ids_BT.shape, torch.arange(ids_BT.shape[1])
        for part in torch.arange(B * (T - 2)).split(rows_at_once(model, T, batch_tokens)):
            text, position = part // (T - 2), part % (T - 2) + 1
            same_word = word_BT[text] == word_BT[text, position][:, None]
            masked = torch.where(same_word & (place_T >= position[:, None]), tok.mask_id, ids_BT[text])
            masked, place, target = machine.take([masked, position[:, None], ids_BT[text, position]])
            with autocast(machine.device, dtype):
                states = model.decode(*model.encode(masked), place, model.documents(masked))
                cost = F.cross_entropy(model.logits(states)[:, 0].float(), target, reduction="none")
            nats.index_add_(0, torch.tensor(index)[text], cost.double().cpu())
    return nats


def pseudo_log_likelihood(model, path, tok, machine, dtype, most_texts, longest, batch_tokens):
    """Scores the first texts of a file (one a line, or .jsonl) that are not empty -> dict of numbers.

    texts: how many were scored; left_out: how many of most_texts were longer than `longest` tokens with their marks.
    nats: minus the sum of PLL-word-l2r. words: what white space separates; bytes: of UTF-8; neither depends on a
    vocabulary. perplexity_per_word: exp(nats / words). Every process of a group takes part. Raises ValueError.
    """
    texts = (text.strip() for text, *_ in read_texts(path))
    texts = list(itertools.islice(filter(None, texts), most_texts))
    rows = [np.array([tok.eot_id, *ids, tok.eot_id], dtype=np.int64) for ids in tok.encode(texts)]
    kept = [i for i, row in enumerate(rows) if len(row) <= longest]
    if not kept:
        raise ValueError(f"pll={path}: found {len(texts)} texts, none of up to {longest - 2} tokens; expected a text a "
                         "line")
    mine = kept[machine.rank::machine.world_size]
    nats, = machine.all_sum(score(model, [rows[i] for i in mine], tok, machine, dtype, batch_tokens).sum())
    words = sum(len(texts[i].split()) for i in kept)
    n_bytes = sum(len(texts[i].encode("utf-8", "replace")) for i in kept)
    return dict(method="PLL-word-l2r", file=path, texts=len(kept), left_out=len(rows) - len(kept),
                tokens=sum(len(rows[i]) - 2 for i in kept), words=words, bytes=n_bytes, nats=nats,
                nats_per_word=nats / words, nats_per_byte=nats / n_bytes, bits_per_byte=nats / n_bytes / math.log(2),
                perplexity_per_word=math.exp(min(nats / words, 100)))
