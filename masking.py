"""Which tokens are hidden and predicted. Token ids in, MaskedBatch out.

Every strategy is one idea: cut the row into GROUPS, lay the groups in random order on a circle as long as all of them
together, and mask the groups that start inside an arc drawn at a random place. Only the grouping differs:

    token        each token is a group
    whole_word   each word is a group
    concepts     runs of 2 * concept_window + 1 neighbouring words, a word apart
    span         runs of words with lengths drawn from span_length_distribution, a word apart

A group is masked with probability arc / circle whatever its length, so every word of every row is masked with
probability mlm_probability exactly, long or short, first or last; and the number of masked tokens in a row differs from
mlm_probability * maskable tokens by less than one group. (BERT's and SpanBERT's loops favour short words; T5's favours
the end of the row.) Words are never cut, special tokens never masked, and a span ends where its document ends.

Randomness is an integer hash of (seed, epoch, stream, sample id, index): no generator, nothing to checkpoint, and the
same sample gets the same mask in any batch, on any device, at any world size.

Shapes: B rows, T tokens a row, K slots for predicted tokens, G groups.
"""

import math
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

MASKING_TYPES = ("token", "whole_word", "concepts", "span")
ROW, ORDER, LENGTH, REPLACE, RANDOM_ID = range(5)  # one independent hash stream for each kind of draw
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit number, which is what torch multiplies
SPACER_MAX_RATE = 0.5  # above it, a free word between neighbouring spans would leave too few words to choose from


class MaskedBatch(NamedTuple):
    inputs: torch.Tensor  # (B, T) int64, what the encoder sees
    positions: torch.Tensor  # (B, K) int64, where to predict; unused slots point to 0
    targets: torch.Tensor  # (B, K) int64, the original ids there
    weights: torch.Tensor  # (B, K) float32, 1 for a used slot, 0 for an unused one


def mask_batch(ids, sample_ids, masking_type, mlm_probability, tok, seed=0, epoch=0, *, concept_window=3,
               span_length_distribution="poisson(3)", mask_replace="100"):
    """Draws the masks of a batch. ids (B, T) int64, sample_ids (B,) int64 -> MaskedBatch.

    mlm_probability: expected share of maskable tokens that is predicted, in (0, 1), the same for every strategy.
    mask_replace: "100" (all predicted tokens become [MASK]) or "80/10/10" ([MASK] / random id / kept; one draw for a
    whole group, as in SpanBERT). Raises ValueError for settings out of range.
    """
    check_masking(masking_type, mlm_probability, concept_window, span_length_distribution, mask_replace, tok)
    ids, sample_ids = (torch.as_tensor(x, dtype=torch.int64) for x in (ids, sample_ids))
    B, T = ids.shape
    n_slots = slots(T, masking_type, mlm_probability)

    def bits(stream, n):
        return random_bits(sample_ids, seed, epoch, stream, n)

    phase_B1, rounding_B1, rotation_B1 = to_unit(bits(ROW, 3)).split(1, dim=1)
    flags_BT = word_flags(tok, ids.device).index_select(0, ids.reshape(-1)).view(B, T)
    maskable_BT = flags_BT & SPECIAL == 0
    G = T
    if masking_type == "token":
        group_BT, member_BT = torch.arange(T, device=ids.device).expand(B, T), maskable_BT
        n_words_B1 = n_candidate_B1 = maskable_BT.sum(1, keepdim=True)
    else:
        word_BT = (word_starts(flags_BT) & maskable_BT).cumsum(1)
        n_words_B1 = word_BT[:, -1:].clone()
        word_BT.sub_(1).clamp_(min=0)
        if masking_type == "whole_word":
            group_BT, member_BT, n_candidate_B1 = word_BT, maskable_BT, n_words_B1
        else:
            spacer = int(mlm_probability <= SPACER_MAX_RATE)
            G = 2 * T // 3 + 3 if spacer else T  # spans take two words or more; ends of documents add pieces
            n_spans = T // (1 + spacer) + 1
            if masking_type == "concepts":
                length_BG = torch.full((B, n_spans), 2 * concept_window + 1, device=ids.device)
            else:
                law = span_law(span_length_distribution).to(ids.device)
                draw_BG = bits(LENGTH, n_spans) >> 48 & 0xFFFF
                length_BG = law.index_select(0, draw_BG.view(-1)).view(B, n_spans).long()
            group_BT, member_BT, n_candidate_B1 = group_spans(
                word_BT, maskable_BT, n_words_B1, length_BG, spacer, (rotation_B1 * n_words_B1).long())

    length_BG = torch.zeros_like(ids[:, :1]).repeat(1, G).scatter_add_(1, group_BT, member_BT.long())
    circle_B1 = length_BG.sum(1, keepdim=True)
    # candidates cover n_candidate of n_words words: choosing among them is raised by the ratio (1 but for spans)
    wanted_B1 = mlm_probability * circle_B1 * n_words_B1 / n_candidate_B1.clamp(min=1)
    budget_B1 = (wanted_B1 + rounding_B1).long().clamp(max=n_slots)
    chosen_BG = choose_groups(length_BG, circle_B1, budget_B1, n_slots, bits(ORDER, G), phase_B1)
    masked_BT = chosen_BG.gather(1, group_BT) & member_BT

    inputs = torch.where(masked_BT, tok.mask_id, ids)
    if mask_replace == "80/10/10":
        draw_BT = to_unit(bits(REPLACE, G)).gather(1, group_BT)
        ordinary = ordinary_ids(tok, ids.device)
        random_BT = ordinary.take((to_unit(bits(RANDOM_ID, T)) * len(ordinary)).long())
        inputs = torch.where(masked_BT & (draw_BT >= 0.8), torch.where(draw_BT < 0.9, random_BT, ids), inputs)
    return gather_slots(ids, inputs, masked_BT, n_slots)


def check_masking(masking_type, mlm_probability, concept_window=3, span_length_distribution="poisson(3)",
                  mask_replace="100", tok=None):
    """Raises ValueError, naming what is allowed, for settings that no mask can be drawn from, or not with `tok`."""
    if masking_type in MASKING_TYPES and tok and masking_type not in masking_types(tok):
        raise ValueError(f"masking_type={masking_type!r} hides words, and tokenizer {tok.name} knows ids only, not "
                         "where words begin: use --masking_type=token, or prepare the data with its own --tokenizer")
    if masking_type not in MASKING_TYPES:
        raise ValueError(f"masking_type={masking_type!r}: expected one of {', '.join(MASKING_TYPES)}")
    if not 0 < mlm_probability < 1:
        raise ValueError(f"mlm_probability={mlm_probability}: expected a fraction above 0 and below 1, such as 0.15")
    if concept_window < 1:
        raise ValueError(f"concept_window={concept_window}: expected 1 or more neighbours on each side")
    if mask_replace not in ("100", "80/10/10"):
        raise ValueError(f"mask_replace={mask_replace!r}: expected '100' or '80/10/10'")
    span_law(span_length_distribution)


def masking_types(tok):
    """The strategies that a tokenizer allows: without text there are no words."""
    return MASKING_TYPES if getattr(tok, "has_text", True) else MASKING_TYPES[:1]


def slots(T, masking_type, mlm_probability):
    """Static number of predicted positions K a row of T tokens needs: the budget, its rounding, one group, up to 8s."""
    overhang = {"token": 0, "whole_word": 7, "concepts": 23, "span": 23}[masking_type]
    return min(T, -(-(math.ceil(T * mlm_probability) + overhang) // 8) * 8)


# ---- words ------------------------------------------------------------------

SPECIAL, STARTS_WORD, STARTS_PUNCT, ENDS_PUNCT = 1, 2, 4, 8


@lru_cache(maxsize=8)
def word_flags(tok, device):
    """(vocab_size,) uint8: what the tokenizer knows about each id, one bit each."""
    flags = tok.is_special * SPECIAL + tok.starts_word * STARTS_WORD
    flags = flags + tok.starts_punct * STARTS_PUNCT + tok.ends_punct * ENDS_PUNCT
    return torch.from_numpy(flags).to(device, torch.uint8)


def word_starts(flags_BT):
    """(B, T) uint8 -> bool. A word begins where the id says so, after a special token and at the start of the row;
    a punctuation mark that follows another one belongs to the same word."""
    starts_BT = flags_BT & STARTS_WORD != 0
    after_BT = flags_BT[:, :-1]
    starts_BT[:, 1:] &= (flags_BT[:, 1:] & STARTS_PUNCT == 0) | (after_BT & ENDS_PUNCT == 0)
    starts_BT[:, 1:] |= after_BT & SPECIAL != 0
    starts_BT[:, 0] = True
    return starts_BT


@lru_cache(maxsize=8)
def ordinary_ids(tok, device):
    return torch.from_numpy(~tok.is_special).nonzero()[:, 0].to(device)


# ---- groups -----------------------------------------------------------------

def group_spans(word_BT, maskable_BT, n_words_B1, length_BG, spacer, rotation_B1):
    """Cuts the words of each row, seen as a circle turned by rotation_B1, into spans of length_BG words and spacers.

    Returns (group_BT, member_BT bool: in a span that may be masked, n_candidate_B1 words in such spans). The span that
    the end of the circle would cut is no candidate, so the length law holds; turning makes every word equally likely.
    A span that meets the end of a document or of the row becomes two groups, masked independently of each other.
    """
    B, T = word_BT.shape
    length_BG = torch.minimum(length_BG, (n_words_B1 - spacer).clamp_(min=1))
    end_BG = (length_BG + spacer).cumsum(1)
    last = torch.where(n_words_B1 > 1, n_words_B1, 1 + spacer) if spacer else torch.full_like(n_words_B1, 2 * T)
    edges = torch.zeros(B, T + 1, dtype=word_BT.dtype, device=word_BT.device)
    span_of_word_BT = edges.scatter_add_(1, end_BG.clamp(max=T), torch.ones_like(end_BG)).cumsum(1)
    turned_BT = word_BT + rotation_B1
    turned_BT -= n_words_B1 * (turned_BT >= n_words_B1)
    span_BT = span_of_word_BT.gather(1, turned_BT)
    new_BT = maskable_BT.clone()  # a group begins with a span and, within a span, after the end of a document
    new_BT[:, 1:] &= (span_BT[:, 1:] != span_BT[:, :-1]) | ~maskable_BT[:, :-1]
    group_BT = new_BT.cumsum(1).sub_(1).clamp_(min=0)
    end_BT = end_BG.gather(1, span_BT)
    member_BT = maskable_BT & (turned_BT < end_BT - spacer) & (end_BT <= last)
    n_candidate_B1 = torch.where(end_BG <= last, length_BG, 0).sum(1, keepdim=True) if spacer else n_words_B1
    return group_BT, member_BT, n_candidate_B1


def choose_groups(length_BG, circle_B1, budget_B1, n_slots, order_bits_BG, phase_B1):
    """Groups in random order on a circle; those that start in [phase, phase + budget) are chosen. -> bool (B, G).

    P(chosen) = budget / circle for every group, whatever its length (systematic sampling, Madow 1949). A last group
    that would need more than n_slots slots is left out.
    """
    G = length_BG.shape[1]
    index = torch.arange(G, device=length_BG.device)
    low = G.bit_length()  # the low bits carry the index through the sort, so ties cannot happen
    order_BG = sort_rows((order_bits_BG >> low << low) | index) & ((1 << low) - 1)
    length_BG = length_BG.gather(1, order_BG)
    start_BG = length_BG.cumsum(1).sub_(length_BG).sub_((phase_B1 * circle_B1).long())
    start_BG += circle_B1 * (start_BG < 0)
    chosen_BG = (start_BG < budget_B1) & (start_BG + length_BG <= n_slots)
    return torch.zeros_like(chosen_BG).scatter_(1, order_BG, chosen_BG)


def sort_rows(x):
    return torch.from_numpy(np.sort(x.numpy(), axis=1)) if x.device.type == "cpu" else x.sort(dim=1).values  # 3x faster


def gather_slots(ids, inputs, masked_BT, n_slots):
    """The masked positions of each row, in order, in K static slots."""
    B, T = ids.shape
    slot_BT = torch.where(masked_BT, masked_BT.cumsum(1) - 1, n_slots)
    position_BT = torch.arange(T, device=ids.device).expand(B, T)
    positions = torch.zeros(B, n_slots + 1, dtype=ids.dtype, device=ids.device).scatter_(1, slot_BT, position_BT)
    positions = positions[:, :n_slots]
    used = torch.arange(n_slots, device=ids.device) < masked_BT.sum(1, keepdim=True)
    return MaskedBatch(inputs, positions, ids.gather(1, positions), used.float())


@lru_cache(maxsize=16)
def span_law(text):
    """ "poisson(3)" (at least 1) or "geometric(0.2,10)" (p, longest) -> (65536,) uint8 lengths, its inverse CDF."""
    match = re.fullmatch(r"(poisson|geometric)\((?:lambda=)?([\d.]+)(?:,\s*(\d+))?\)", text.replace(" ", ""))
    name, value, longest = match.groups() if match else (None, "0", None)
    value, longest = float(value), int(longest or 20)
    if name == "poisson" and 0 < value <= 10:
        p = [math.exp(-value) * value**n / math.factorial(n) for n in range(1, longest + 1)]
    elif name == "geometric" and 0 < value < 1 and 1 <= longest <= 100:
        p = [value * (1 - value) ** (n - 1) for n in range(1, longest + 1)]
    else:
        raise ValueError(f"span_length_distribution={text!r}: expected poisson(MEAN up to 10) or geometric(P,LONGEST)")
    cdf = torch.tensor(p, dtype=torch.float64).cumsum(0)
    lengths = torch.searchsorted(cdf / cdf[-1], (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536) + 1
    return lengths.to(torch.uint8)  # small enough for the cache


# ---- hash -------------------------------------------------------------------

def mix(x):
    """The splitmix64 finaliser (Steele et al. 2014) on int64, in place; multiplication wraps."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 0)):
        x ^= (x >> shift).bitwise_and_((1 << 64 - shift) - 1)  # a logical shift
        if factor:
            x *= factor
    return x


def random_bits(sample_ids, seed, epoch, stream, n):
    """(B,) sample ids -> (B, n) int64 hashed bits, a function of (seed, epoch, stream, sample id, index) alone."""
    salt = (seed * 0x632BE59BD9B4E019 + epoch * 0xD1342543DE82EF95 + stream * 0x8CB92BA72F3D8DD7 + 1) % 2**64
    key_B1 = mix(mix(sample_ids[:, None] * GOLDEN + (salt - 2**64 if salt >= 2**63 else salt)))
    return mix(key_B1 + (torch.arange(1, n + 1, device=sample_ids.device) * GOLDEN))


def to_unit(bits):
    """int64 bits -> float64 in [0, 1)."""
    return (bits >> 11 & (1 << 53) - 1).double() * 2.0**-53
