"""Pseudo-log-likelihood of texts: PLL-word-l2r (Kauf and Ivanova 2023, 2305.10588).

It compares models with different vocabularies, which losses on masked tokens cannot do.

A masked model gives no likelihood of a text. The usual substitute masks each token in turn, alone,
and adds up what predicting it costs (Salazar et al., 1910.14659). That favours vocabularies that
cut words into many tokens, since the rest of a word gives a masked piece away. So the later tokens
of its word are masked as well (section 3 of the paper), and the sum is divided by the number of
words or bytes, which do not depend on the vocabulary, and not by the number of tokens:

    text               the  mer|maid  sings
    row for "mer"      the  [M] [M]   sings
    row for "maid"     the  mer [M]   sings

There is one forward row for each token. A text stands between two end-of-document marks, as
documents do in the rows of training.

Shapes: B texts, T tokens, N masked rows of one forward pass.
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
    """Pseudo-log-likelihood of each text, negated. -> nats, float64, one number a text.

    rows: list of arrays of ids, of any lengths, each with an end-of-document mark at both ends.
    Words are those of whole-word masking (masking.py): punctuation in a row, as in "...)", is one.
    """
    nats = torch.zeros(len(rows), dtype=torch.float64)
    for index in batches(model, rows, batch_tokens):  # texts of one length: nothing is padded
        ids_BT = torch.from_numpy(np.stack([rows[i] for i in index]))
        B, T = ids_BT.shape
        # Number of the word that each token belongs to, counted from the start of its row.
        word_BT = word_starts(word_flags(tok, "cpu")[ids_BT]).cumsum(1)
        # Every token except the two marks is predicted once, in a masked row of its own.
        for part in torch.arange(B * (T - 2)).split(rows_at_once(model, T, batch_tokens)):
            text_N = part // (T - 2)
            position_N1 = (part % (T - 2) + 1)[:, None]  # + 1: the first mark is not predicted
            word_NT, ids_NT = word_BT[text_N], ids_BT[text_N]
            same_word = word_NT == word_NT.gather(1, position_N1)
            not_before = torch.arange(T) >= position_N1
            masked = torch.where(same_word & not_before, tok.mask_id, ids_NT)
            masked, place, target = machine.take(
                [masked, position_N1, ids_NT.gather(1, position_N1)[:, 0]])
            with autocast(machine.device, dtype):
                states = model.decode(*model.encode(masked), place, model.documents(masked))
                logits = model.logits(states)[:, 0].float()
                cost = F.cross_entropy(logits, target, reduction="none")
            nats.index_add_(0, torch.tensor(index)[text_N], cost.double().cpu())
    return nats


def pseudo_perplexity(model, tok, texts, machine, dtype, batch_tokens):
    """exp of the nats a token that texts cost a model, a number; None where no text has a token.

    For judging generated texts: a masked model has no generative perplexity. Tokens are those of
    the judge. A text that is longer than its row is cut into pieces of equal length.
    """
    rows, n_tokens = [], 0
    for ids in filter(len, tok.encode(texts)):
        n_tokens += len(ids)
        n_pieces = math.ceil(len(ids) / max(1, model.cfg.longest - 2))  # 2: the marks
        for piece in np.array_split(ids.astype(np.int64), n_pieces):
            rows.append(np.array([tok.eot_id, *piece, tok.eot_id]))
    if not rows:
        return None
    nats = score(model, rows, tok, machine, dtype, batch_tokens).sum().item()
    return math.exp(min(nats / n_tokens, 100))  # 100: exp must not overflow


def pseudo_log_likelihood(model, path, tok, machine, dtype, most_texts, longest, batch_tokens):
    """Scores the first `most_texts` texts of a file that are not empty -> dict of numbers.

    path: a file with a text a line, or .jsonl. longest: texts of more tokens, with their two marks,
    are left out. Of the result:
    texts, left_out      how many were scored, and how many were too long
    nats                 minus the sum of the PLL-word-l2r of all texts
    words, bytes         separated by white space; of UTF-8. Neither depends on the vocabulary.
    perplexity_per_word  exp(nats / words)
    Every process of a group must call it: each scores a part of the texts.
    Raises ValueError if no text can be scored.
    """
    texts = (text.strip() for text, *_ in read_texts(path))
    texts = list(itertools.islice(filter(None, texts), most_texts))
    rows = [np.array([tok.eot_id, *ids, tok.eot_id], dtype=np.int64) for ids in tok.encode(texts)]
    kept = [i for i, row in enumerate(rows) if len(row) <= longest]
    if not kept:
        raise ValueError(f"pll={path}: found {len(texts)} texts, none of up to {longest - 2} "
                         "tokens; expected a text a line")
    mine = [rows[i] for i in kept[machine.rank::machine.world_size]]
    nats, = machine.all_sum(score(model, mine, tok, machine, dtype, batch_tokens).sum())
    n_words = sum(len(texts[i].split()) for i in kept)
    # "replace": JSON can hold half a surrogate pair, which UTF-8 cannot
    n_bytes = sum(len(texts[i].encode("utf-8", "replace")) for i in kept)
    return dict(
        method="PLL-word-l2r", file=path, texts=len(kept), left_out=len(rows) - len(kept),
        tokens=sum(len(rows[i]) - 2 for i in kept), words=n_words, bytes=n_bytes, nats=nats,
        nats_per_word=nats / n_words, nats_per_byte=nats / n_bytes,
        bits_per_byte=nats / n_bytes / math.log(2),
        perplexity_per_word=math.exp(min(nats / n_words, 100)))  # 100: exp must not overflow
