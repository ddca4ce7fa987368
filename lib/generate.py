"""Text from a masked model: [MASK]s are replaced by draws from its predictions, a few at a time.

    from lib.generate import Sampling, generate

    for sample in generate(model, tok, "Once upon a time", sampling=Sampling(top_p=0.9)):
        print(sample.text)

A text begins as a row of [MASK]s behind the prompt. Every step is one forward pass, which draws
tokens for some of the masks; the next step reads them. Two samplers choose which masks these are:

    ancestral    at random. This reverses masked diffusion with a linear schedule: from time t to s
                 a mask is filled with probability (t - s) / t (MDLM, 2406.07524). The number of
                 masks a step is not drawn, it is rounded at random.
    confidence   a token is drawn for every mask, and the tokens that the model finds likeliest are
                 kept (MaskGIT, 2202.04200; LLaDA, 2502.09992). More fluent, far less diverse.

Tokens of one step are drawn independently of each other. So the fewer steps, the less they fit
together: with one step every token is drawn from its own distribution, and with as many steps as
tokens each one is drawn given all those before it.

With block_tokens a text is filled block by block from left to right. A block does not read what
will follow it, and of what precedes it as many tokens as the model's row has room for. So a text
may be longer than the row.

Draws are made in float64. Random numbers in float32 are too coarse for the rare tokens of a large
vocabulary, which acts like a lower temperature (2409.02908). They are hashes, as in masking.py: of
the seed, the number of the sample, the forward pass and the place in the row.

Generation begins with hardly a token to read. A model that was trained with 15 % of the tokens
masked has never seen such rows; the more of all rates it has seen, the better its texts.

A text begins behind an end-of-document mark, as documents do in training. It ends where the model
draws this mark; what has been drawn behind it is not part of the text. No other special id is ever
drawn, and in place of a [MASK] of the prompt not the mark either.

Shapes: B samples, N tokens of a text, T of the row that the model reads, K positions, V ids that
may be drawn.
"""

import math
from collections import Counter
from typing import NamedTuple

import torch

from lib.decoding import continue_texts
from lib.embed import rows_at_once
from lib.fill import encode_masked
from lib.health import check_finite
from lib.sampling import Sample, Sampling, draw
from lib.settings import is_causal
from masking import ordinary_ids, random_bits, to_unit

MOST_PROBABILITIES = 2**24  # float64 in memory at once, several times: 128 MiB each
MOST_TOKENS = 2**20  # of a text
# Each kind of draw hashes its own number. Those of masking.py begin at 0.
ORDER, ROUNDING, TOKEN = range(100, 103)


class Plan(NamedTuple):
    """A text before it is generated."""
    row: list  # ids, [MASK] where a token is to be drawn
    n_prompt: int  # so many of them are the prompt, in which the text cannot end
    ends: list  # where each block ends


def generate(model, tok, text="", n_samples=1, length=0, sampling=None, batch_tokens=4096,
             device="cpu", watch=None):
    """Yields n_samples texts that begin with `text`, each a Sample.

    text      may hold [MASK]s, which are filled. Empty: the text begins as a document does.
    length    tokens behind the prompt. 0: as many as the model's row has room for; none where the
              prompt has masks to fill.
    sampling  a Sampling; None: its defaults
    watch     a function of all ids (B,N), called before the first step and after each one

    A causal model continues the text, see lib/decoding.py.

    Sample i is the same for any n_samples and batch_tokens, up to the rounding of the model. Raises
    ValueError where a text does not fit into the model's row, and where the weights are broken.
    """
    sampling = sampling or Sampling()
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: expected 1 or more")
    if is_causal(model):
        yield from continue_texts(model, tok, [text], n_samples, length, sampling, batch_tokens,
                                  device, watch)
        return
    plan = plan_text(text, length, tok, model.cfg.longest, sampling.block_tokens)
    at_once = rows_at_once(model, min(len(plan.row), model.cfg.longest), batch_tokens)
    for numbers_B in torch.arange(n_samples).split(at_once):
        yield from generate_batch(model, tok, plan, numbers_B, sampling, device, watch)


# ---- before the first step ----------------------------------------------------------

def plan_text(text, length, tok, longest, block_tokens=0):
    """-> Plan. Raises ValueError for a text that does not fit into rows of `longest` tokens."""
    if not 0 <= length <= MOST_TOKENS:
        raise ValueError(f"length={length}: expected tokens to generate, up to {MOST_TOKENS:,}, or "
                         "0 for as many as the model's row has room for")
    if block_tokens >= longest:
        raise ValueError(f"block_tokens={block_tokens}: a block reads what precedes it in the "
                         f"model's row of {longest} tokens; expected less, as --block_tokens="
                         f"{longest // 4}")
    prompt, has_masks = [tok.eot_id], "[MASK]" in text
    if text:
        # encoded as if one more mask followed: then the space before what is drawn is left out
        prompt = encode_masked(text + "[MASK]", tok)[:-2]
    room = longest - len(prompt)
    slides = block_tokens > 0 and length > 0
    if room < 0 or room == 0 and not slides:
        raise ValueError(f"{text[:40]!r}... has {len(prompt) - 1} tokens, and the model's row of "
                         f"{longest} has to hold them, a mark before them and what follows; "
                         "shorten the text")
    if has_masks and not length:  # the row in which masks are filled with the likeliest tokens
        if block_tokens:
            raise ValueError(f"block_tokens={block_tokens} has no effect where only the masks of "
                             "the prompt are filled; --length=N continues it")
        return Plan(prompt + [tok.eot_id], len(prompt), [len(prompt) + 1])
    length = length or room
    if length > room and not block_tokens:
        raise ValueError(f"length={length}: behind {len(prompt) - 1} tokens of prompt the model's "
                         f"row of {longest} has room for {room}; --length={room}, or "
                         f"--block_tokens={max(1, longest // 4)}, with which the row slides over "
                         "the text")
    row = prompt + [tok.mask_id] * length
    ends = [len(row)]
    if block_tokens:
        ends = [*range(len(prompt) + block_tokens, len(row), block_tokens), len(row)]
    if block_tokens and has_masks:
        # The masks of the prompt are a block of their own: the row might slide past them.
        ends.insert(0, len(prompt))
    return Plan(row, len(prompt), ends)


# ---- all steps ----------------------------------------------------------------------

@torch.inference_mode()
def generate_batch(model, tok, plan, numbers_B, sampling, device, watch=None):
    """The samples with these numbers -> list of Sample."""
    ids_BN = torch.tensor(plan.row).repeat(len(numbers_B), 1)
    may_end_N = torch.arange(len(plan.row)) >= plan.n_prompt
    n_pass = 0
    if watch:
        watch(ids_BN)
    for end in plan.ends:
        begin = max(0, end - model.cfg.longest)
        row_BT = ids_BN[:, begin:end]  # a view: what is written into it is in ids_BN
        for _ in fill_row(model, tok, row_BT, may_end_N[begin:end], numbers_B, n_pass, sampling,
                          device):
            n_pass += 1
            if watch:
                watch(ids_BN)
        is_end_BN = (ids_BN == tok.eot_id) & may_end_N
        if is_end_BN.any(1).all():  # no text would have a part in the other blocks
            break
    samples = []
    for ids, is_end in zip(ids_BN.tolist(), is_end_BN.tolist()):
        end = is_end.index(True) if True in is_end else len(ids)
        drawn = [i for i, before in zip(ids[:end], plan.row) if before == tok.mask_id]
        samples.append(Sample(tok.decode(ids[1:end]), drawn, n_pass))
    return samples


def fill_row(model, tok, ids_BT, may_end_T, numbers_B, n_pass, sampling, device):
    """Replaces all masks of ids (B,T), in place; yields after each step.

    The masks of all rows are at the same places. may_end (T,) bool: where the end-of-document mark
    may be drawn. numbers (B,): of the samples. n_pass: forward passes so far.
    """
    n_masks = int((ids_BT[0] == tok.mask_id).sum())
    n_steps = min(sampling.steps, n_masks)

    def uniform(kind, n_pass):
        """A number in [0,1) for each place, (B,T) float64."""
        bits = random_bits(numbers_B, sampling.seed, n_pass, kind, ids_BT.shape[1])
        return to_unit(bits)

    # One number rounds all steps of a sample, so that their counts add up to n_masks. With the
    # confidence sampler, temperature 0 gives the same text for all seeds.
    rounding_B = torch.full((len(ids_BT),), 0.5, dtype=torch.float64)
    if sampling.sampler == "ancestral":
        rounding_B = uniform(ROUNDING, n_pass)[:, 0]
    n_filled_B = torch.zeros(len(ids_BT), dtype=torch.int64)
    for step in range(1, n_steps + 1):
        target_B = (n_masks * step / n_steps + rounding_B).long().clamp(max=n_masks)
        n_new_B, n_filled_B = target_B - n_filled_B, target_B
        chosen_BT = ids_BT == tok.mask_id
        if sampling.sampler == "ancestral":  # chosen first: nothing else has to be predicted
            order_BT = uniform(ORDER, n_pass).masked_fill(~chosen_BT, -1)
            chosen_BT = largest(order_BT, n_new_B)
        # The chosen places of each row come first; in a row with fewer, others follow.
        most = int(chosen_BT.sum(1).max())
        places_BK = chosen_BT.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        is_new_BK = chosen_BT.gather(1, places_BK)
        drawn_BK, p_BK = draw_tokens(model, tok, ids_BT, places_BK, uniform(TOKEN, n_pass),
                                     may_end_T, sampling, device)
        if sampling.sampler == "confidence":
            is_new_BK = largest(p_BK.masked_fill(~is_new_BK, -1), n_new_B)
        before_BK = ids_BT.gather(1, places_BK)
        ids_BT.scatter_(1, places_BK, torch.where(is_new_BK, drawn_BK, before_BK))
        n_pass += 1
        yield


def largest(x_BN, n_B):
    """True at the n[b] largest numbers of row b; of equal ones the first count. -> (B,N) bool."""
    rank_BN = x_BN.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank_BN < n_B[:, None]


# ---- one step -----------------------------------------------------------------------

def draw_tokens(model, tok, ids_BT, places_BK, uniform_BT, may_end_T, sampling, device):
    """Draws a token for each place -> ids (B,K), their probabilities at temperature 1 (B,K)."""
    ids_BT = ids_BT.to(device)
    eot = torch.tensor([tok.eot_id], device=device)
    allowed_V = torch.cat((ordinary_ids(tok, ids_BT.device), eot))
    concepts, tokens = model.encode(ids_BT)
    documents = model.documents(ids_BT)
    at_once = max(1, MOST_PROBABILITIES // (len(ids_BT) * len(allowed_V)))
    drawn, p = [], []
    for place_BK in places_BK.split(at_once, dim=1):
        states = model.decode(concepts, tokens, place_BK.to(device), documents)
        logits = model.logits(states)[..., allowed_V]
        # Apple's GPUs have no float64.
        logits = (logits.cpu() if logits.device.type == "mps" else logits).double()
        check_finite([logits])
        may_end_BK = may_end_T[place_BK].to(logits.device)
        logits[..., -1] = logits[..., -1].masked_fill(~may_end_BK, -math.inf)
        uniform_BK = uniform_BT.gather(1, place_BK).to(logits.device)
        index, p_drawn = draw(logits, uniform_BK, sampling.temperature, sampling.top_p,
                              sampling.top_k)
        drawn.append(allowed_V[index.to(device)].cpu())
        p.append(p_drawn.cpu())
    return torch.cat(drawn, dim=1), torch.cat(p, dim=1)


# ---- after the last step ------------------------------------------------------------

def entropy(ids):
    """Unigram entropy of a list of ids, in nats: 0 where all are equal, at most ln(len(ids)).

    It is low where a text repeats itself, which gives a good perplexity (2409.02908).
    """
    n = len(ids)
    return sum(count / n * math.log(n / count) for count in Counter(ids).values())
