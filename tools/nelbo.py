"""The likelihood of text under a masked model, as a bound: the NELBO of a masked diffusion model.

Predict a row of N tokens one at a time, in random order: when k of them are still hidden, the next
one costs the mean cross-entropy of these k. So the expected cost of the row is

    nats of the row = N E[ (1/k) sum of the cross-entropy of k hidden tokens ],  k uniform in 1..N

over k and over which k tokens are hidden (2110.02037; as an objective 2406.07524). The row has a
probability in each order, and its probability is the mean of these. The logarithm of a mean is at
least the mean of the logarithms (Jensen), so the expected cost is an upper bound of the row's
negative log-likelihood. It holds for every model, however that was trained; one that has seen few
rates has a loose bound.

What is counted:
- Rows are those of training: documents one after the other, cut every T tokens, each row read by
  itself, so that its first words have no context before them.
- Special tokens, which end a document or fill a row, are always visible and not counted: the bound
  is that of the text, given where documents end. MDLM (2406.07524) hides and counts them as well,
  and two more that it adds to each row.
- Bytes are those of the counted tokens. Words are separated by white space and belong to the row
  in which they begin. Published perplexities of WikiText count the end of each line as a word more.

The masks are its own, whatever masks the model was trained with: hashes of the row's number and of
the draw, so they are the same for every model.

Shapes: B rows, T tokens a row, K predicted tokens.
"""

import math

import numpy as np
import torch

from lib.evaluation import EVAL_SEED, predict
from lib.machine import autocast
from masking import mask_batch, spread_levels

LEAST_DRAWS = 8  # of a row; with fewer, a row would not see all rates


@torch.no_grad()
def likelihood_bound(model, data, tok, machine, dtype, rows=512, draws=8, micro_batch=32,
                     seed=EVAL_SEED):
    """NELBO of the first `rows` rows of a TokenData, from `draws` masks of each -> dict of numbers.

    nats, se     nats a token, and the standard error of this mean over rows. Rows are taken as
                 independent, which neighbouring rows of a long document are not quite.
    ppl          exp(nats)
    bpb          bits a byte of text
    word_ppl     exp(all nats / words)
    tokens, words, bytes, rows, draws    what these are of; rows: those that hold any text
    What needs bytes or words is None where the tokenizer knows ids only.

    Every process of a group must call it: each measures a part of the rows. Raises ValueError if
    there is nothing but special tokens.
    """
    n_bytes = torch.from_numpy(tok.n_bytes)
    sums = torch.zeros(8, dtype=torch.float64)
    # process r of n takes rows r, r + n, r + 2n, ...
    my_rows = torch.arange(min(rows, data.n_blocks))[machine.rank::machine.world_size]
    for index in my_rows.split(micro_batch):
        if not len(index):  # fewer rows than processes: split() gives one part without rows
            break
        ids = torch.as_tensor(data.block(index.numpy()))
        tokens = torch.from_numpy(~tok.is_special)[ids].sum(1).double()
        nats = sum(draw_nats(model, ids, index, draw, draws, data.padded, tok, machine, dtype, seed)
                   for draw in range(draws)) / draws
        words = words_begun(data, tok, ids, index) if tok.has_text else 0
        sums += torch.stack((
            (tokens > 0).sum(), tokens.sum(), nats.sum(), torch.tensor(words), n_bytes[ids].sum(),
            # for the variance of the ratio of two sums
            (nats * nats).sum(), (nats * tokens).sum(), (tokens * tokens).sum()))
    n, tokens, nats, words, text_bytes, *squares = machine.all_sum(*sums)
    if not tokens:
        raise ValueError("no token of these rows is masked: they hold special tokens only, or "
                         "mlm_probability is too small for one")
    mean = nats / tokens
    found = dict(nats=mean, se=standard_error(mean, n, tokens, *squares),
                 ppl=math.exp(min(mean, 100)),  # 100: exp must not overflow
                 bpb=None, word_ppl=None, tokens=int(tokens), words=None, bytes=None, rows=int(n),
                 draws=draws)
    if tok.has_text:
        found |= dict(bpb=nats / math.log(2) / text_bytes, words=int(words), bytes=int(text_bytes))
        if words:  # a text of white space has none
            found["word_ppl"] = math.exp(min(nats / words, 100))
    return found


def draw_nats(model, ids, index, draw, draws, padded, tok, machine, dtype, seed):
    """One of several draws of each row: ids (B,T), index (B,) row numbers -> nats (B,), float64."""
    # The draws of a row divide the range of rates among them, and each takes a random place in its
    # part. In every second one the place is mirrored: the cost rises almost linearly within a part,
    # so what one draw has too much the next has too little. Rows are spread over the places, too.
    place = spread_levels(index, seed, epoch=0)
    if draw % 2:
        place = 1 - place
    batch = mask_batch(ids, index, "diffusion", 1.0, tok, seed=seed, epoch=draw,
                       level=(draw + place) / draws)
    inputs, positions, targets, weights, _ = machine.take(batch)
    is_real = inputs != tok.pad_id if padded else None
    with autocast(machine.device, dtype):
        nats, _ = predict(model, inputs, positions, targets, is_real, tok.vocab_size)
    return (nats.cpu().double() * weights.cpu().double()).sum(1)


def standard_error(mean, n, tokens, nats_nats, nats_tokens, tokens_tokens):
    """Of the ratio of two sums over n rows, nats to tokens, from the sums of their products.

    The variance of nats - mean * tokens over rows (Cochran 1977, chapter 6). None for one row.
    """
    if n < 2:
        return None
    spread = nats_nats - 2 * mean * nats_tokens + mean**2 * tokens_tokens
    return math.sqrt(max(spread, 0) * n / (n - 1)) / tokens  # 0: a difference of rounded numbers


def words_begun(data, tok, ids, index):
    """Words that begin in the rows ids (B,T), number index (B,) of `data` -> int."""
    before = torch.as_tensor(data.block(index.sub(1).clamp(min=0).numpy()))[:, -1:]
    before[index == 0] = tok.eot_id  # nothing stands before the first row
    rows = torch.cat((before, ids), dim=1).numpy()
    return sum(count_words(tok, row) - count_words(tok, row[:1]) for row in rows)


def count_words(tok, ids):
    """Words in ids (n,), separated by white space or a special token."""
    texts = np.split(ids, np.flatnonzero(tok.is_special[ids]))
    return sum(len(tok.decode(text[~tok.is_special[text]]).split()) for text in texts)
