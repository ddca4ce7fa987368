"""Which tokens are hidden and predicted: token ids in, MaskedBatch out.

Masked-language modelling hides some tokens of a row behind [MASK] and trains the model to predict
them. A masking strategy says which tokens are hidden together: it cuts the row into GROUPS of
tokens, and a group is masked as a whole or not at all. Every batch goes through four steps:

    1. group     the strategy numbers the groups of each row        the functions in STRATEGIES
    2. choose    groups are chosen at random, up to a budget        choose_groups
    3. replace   chosen tokens become [MASK], or BERT's mixture     replace_tokens
    4. gather    their positions and original ids fill K slots      gather_slots

Strategies differ in step 1, importance in step 2, too:

    token        each token is a group
    whole_word   the tokens of a word are a group
    concepts     2 * concept_window + 1 neighbouring words are a group, one free word between groups
    span         as concepts, but the number of words is drawn from span_length_distribution
    diffusion    each token is a group, and each row hides another number of them, from one to all
    importance   the tokens of a word are a group, and words with high scores are chosen more often

To add a strategy, write its grouping function and add one entry to STRATEGIES. Only rules that one
strategy has for itself name it elsewhere: WORDLESS, predicted_share and check_masking.

In every strategy but diffusion the number of masked tokens in a row differs from mlm_probability *
maskable tokens, the row's budget, by less than one group. In the first four every maskable token
is masked with probability mlm_probability, in long and short words and at any place in the row. The
loops of BERT and SpanBERT mask short words more often, T5's masks the end of the row more often.
Only `token` and `diffusion` cut words. Special tokens are never masked, and no group spans two
documents.

A group of words that is longer than the budget is masked in part: as many of its neighbouring words
as the budget has room for. If it were masked as a whole or not at all, most rows would have nothing
to predict. So a row is empty only if its budget is below one token or below one word.

`diffusion` is the objective of masked diffusion models: of N maskable tokens k are hidden, k drawn
from 1..N, and each of them counts N / k. The expected sum is a bound on the negative log-likelihood
of the row (2406.07524; with an exact k: 2502.09992). mlm_probability is the largest share that is
hidden, 1 for all.

`importance` takes scores of the tokens (lib/importance.py makes them). A prediction counts
mlm_probability / (how probable its choice was), so that the weighted mean loss is the mean over all
tokens, as with uniform masks: what differs is which tokens are predicted more often.

Random numbers are hashes of (seed, epoch, kind of draw, sample id, index). There is no generator
state to save, and a sample gets the same mask in any batch, on any device, at any world size.

Shapes, also as suffixes of names: B rows, T tokens a row, G groups a row, K slots for predictions.
"""

import math
import re
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch

# Each kind of draw hashes its own number, so that the draws are independent of each other. ROW has
# three draws for each row: where the arc begins, the rounding, where to start counting words.
ROW, ORDER, LENGTH, REPLACE, RANDOM_ID, LEVEL, SHUFFLE = range(7)

# Above this rate, a free word between neighbouring spans would leave too few words to mask.
SPACER_MAX_RATE = 0.5

# diffusion predicts at most this share of a row. Where more is hidden, a random part of that is
# predicted and counts for all: a bound with the same mean at half the cost.
DIFFUSION_MAX_PREDICTED = 0.5

# importance chooses a word with a probability within these multiples of mlm_probability. Half of it
# does not depend on the score, so that tokens of every score are seen and weights stay below 2.
LEAST_CHANCE, MOST_CHANCE, UNIFORM_SHARE = 0.5, 3.0, 0.5


class MaskedBatch(NamedTuple):
    """What the model is trained on."""
    inputs: torch.Tensor  # (B, T) int64, what the encoder sees
    positions: torch.Tensor  # (B, K) int64, where to predict; unused slots point to 0
    targets: torch.Tensor  # (B, K) int64, the original ids there
    weights: torch.Tensor  # (B, K) float32, what each prediction counts in the loss; unused: 0
    used: torch.Tensor  # (B, K) bool, which slots hold a prediction: for all counts and shares


class Groups(NamedTuple):
    """What a grouping function returns."""
    group_BT: torch.Tensor  # (B, T) int64, number of the token's group, from 0 in each row
    member_BT: torch.Tensor  # (B, T) bool, True: masked when its group is; False: never masked
    n_words_B1: torch.Tensor  # (B, 1) int64, words in the row (for `token`: maskable tokens)
    n_candidates_B1: torch.Tensor  # (B, 1) int64, those of them in groups that can be chosen
    overhang: int  # tokens by which a row may exceed its budget: K has room for them
    word_BT: torch.Tensor | None = None  # (B, T) number of the token's word; None: never cut groups
    hidden_B1: torch.Tensor | None = None  # (B, 1) tokens to hide; None: those to predict
    chance_BG: torch.Tensor | None = None  # (B, G) how probable each choice is; None: all alike
    weight_BT: torch.Tensor | None = None  # (B, T) what predicting the token counts; None: 1


def mask_batch(ids, sample_ids, masking_type, mlm_probability, tok, seed=0, epoch=0, *,
               concept_window=3, span_length_distribution="poisson(3)", mask_replace="100",
               diffusion_schedule="linear", level=None, scores=None, shuffle_scores=False,
               importance_weights=True, band=None):
    """Draws the masks of a batch. ids (B, T) int64, sample_ids (B,) int64 -> MaskedBatch.

    sample_ids      number of each row in the data set: the same number gets the same mask
    mlm_probability expected fraction of maskable tokens that is predicted, between 0 and 1; in
                    diffusion the largest fraction that is hidden, up to 1
    concept_window  words on each side of a word that are masked with it (concepts)
    span_length_distribution   "poisson(MEAN)" or "geometric(P,LONGEST)", in words (span)
    mask_replace    "100": every predicted token becomes [MASK]; "80/10/10": see replace_tokens
    diffusion_schedule   how often each rate is drawn, see SCHEDULES (diffusion)
    level           (B,) in [0, 1), where in the range of rates each row is (diffusion); None:
                    spread evenly over rows whose sample ids follow each other
    scores          (B, T) float, how important each token is (importance); only their order and
                    relative distances within a row count. None: all alike
    shuffle_scores  the words of a row get each other's scores: a control (importance)
    importance_weights   False: predictions count alike, however probable their choice was
    band            choose scores around this quantile of the row, see curriculum_band; None: high
                    ones

    Raises ValueError for settings out of range.
    """
    check_masking(masking_type, mlm_probability, concept_window, span_length_distribution,
                  mask_replace, diffusion_schedule, tok)
    ids = torch.as_tensor(ids, dtype=torch.int64)
    sample_ids = torch.as_tensor(sample_ids, dtype=torch.int64)
    if level is None:
        level = spread_levels(sample_ids, seed, epoch)
    settings = dict(mlm_probability=mlm_probability, concept_window=concept_window,
                    span_length_distribution=span_length_distribution, tok=tok,
                    diffusion_schedule=diffusion_schedule, level=level, scores=scores,
                    shuffle_scores=shuffle_scores, importance_weights=importance_weights,
                    band=band)
    bits = partial(random_bits, sample_ids, seed, epoch)  # bits(kind of draw, n) -> (B, n) int64

    # index_select on a flat index is faster than flags[ids].
    flags_BT = word_flags(tok, ids.device).index_select(0, ids.reshape(-1)).view(ids.shape)
    groups = STRATEGIES[masking_type](flags_BT, bits, settings)
    n_slots = slots(ids.shape[1], predicted_share(masking_type, mlm_probability), groups.overhang)
    hidden_BT, predicted_BT = choose_groups(groups, bits, mlm_probability, n_slots)
    inputs = torch.where(hidden_BT, tok.mask_id, ids)
    if mask_replace == "80/10/10":
        inputs = replace_tokens(inputs, ids, hidden_BT, groups, tok, bits)
    return gather_slots(ids, inputs, predicted_BT, n_slots, groups.weight_BT)


def next_tokens(ids, tok):
    """The objective of a decoder: every token of ids (B,T) but the first is predicted from those
    before it. -> MaskedBatch of T - 1 slots; nothing is hidden, and padding counts nothing.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    positions = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)
    targets = ids[:, 1:]
    used = targets != tok.pad_id
    return MaskedBatch(ids, positions, targets, used.float(), used)


# ---- words: which tokens belong together --------------------------------------

# What the tokenizer knows about an id, one bit each.
SPECIAL, STARTS_WORD, STARTS_PUNCT, ENDS_PUNCT = 1, 2, 4, 8


@lru_cache(maxsize=8)
def word_flags(tok, device):
    """(vocab_size,) uint8: for each id the sum of the flags above that hold."""
    flags = np.zeros(len(tok.is_special), np.uint8)
    flags[tok.is_special] |= SPECIAL
    flags[tok.starts_word] |= STARTS_WORD
    flags[tok.starts_punct] |= STARTS_PUNCT
    flags[tok.ends_punct] |= ENDS_PUNCT
    return torch.from_numpy(flags).to(device)


def word_starts(flags_BT):
    """Flags (B, T) uint8 -> (B, T) bool, True where a token begins a word.

    A word begins where the tokenizer says that the id begins one, after a special token and at the
    start of the row. Punctuation after punctuation continues the word, so "...)" is one word.
    """
    starts_BT = flags_BT & STARTS_WORD != 0
    before_BT = flags_BT[:, :-1]
    starts_BT[:, 1:] &= (flags_BT[:, 1:] & STARTS_PUNCT == 0) | (before_BT & ENDS_PUNCT == 0)
    starts_BT[:, 1:] |= before_BT & SPECIAL != 0
    starts_BT[:, 0] = True
    return starts_BT


def number_words(flags_BT):
    """Flags (B, T) -> word_BT int64 (the number of each token's word), maskable_BT, n_words_B1.

    A special token gets the number of the word before it; maskable_BT is False there.
    """
    maskable_BT = flags_BT & SPECIAL == 0
    word_BT = (word_starts(flags_BT) & maskable_BT).cumsum(1)
    n_words_B1 = word_BT[:, -1:].clone()  # a copy: the next line changes word_BT in place
    word_BT.sub_(1).clamp_(min=0)  # count from 0; special tokens before the first word also get 0
    return word_BT, maskable_BT, n_words_B1


WORD_BYTES = 5.6  # mean bytes of a word and the space before it, in English text


@lru_cache(maxsize=64)
def long_words(n, tok):
    """Tokens that n neighbouring words of a text hardly ever exceed, int."""
    mean_bytes = 4.0
    if hasattr(tok, "n_bytes"):
        mean_bytes = max(1.0, float(tok.n_bytes[~tok.is_special].mean()))
    # Long words are cut into more tokens than their bytes tell, so the mean is never below 1.4.
    tokens_a_word = max(1.4, WORD_BYTES / mean_bytes)
    # The standard deviation of a length is half its mean, so this is 6 of them above the mean, and
    # one word more: for a single word 28 bytes, which few words of a language exceed.
    return math.ceil(tokens_a_word * (n + 3 * math.sqrt(n) + 1))


# ---- step 1: the strategies, one grouping function each -----------------------
# Each takes the flags of all tokens (B, T), bits(kind of draw, n) for random numbers, and the
# settings of mask_batch that concern grouping, as a dict; it returns Groups. `overhang` must depend
# on T and the settings alone, because every batch of a run has the same shape.

def group_tokens(flags_BT, bits, settings):
    """token: each token is a group."""
    B, T = flags_BT.shape
    maskable_BT = flags_BT & SPECIAL == 0
    n_maskable_B1 = maskable_BT.sum(1, keepdim=True)
    group_BT = torch.arange(T, device=flags_BT.device).expand(B, T)
    return Groups(group_BT, maskable_BT, n_maskable_B1, n_maskable_B1, overhang=0)


def group_words(flags_BT, bits, settings):
    """whole_word: the tokens of a word are a group."""
    word_BT, maskable_BT, n_words_B1 = number_words(flags_BT)
    overhang = long_words(1, settings["tok"])
    return Groups(word_BT, maskable_BT, n_words_B1, n_words_B1, overhang)


def group_neighbours(flags_BT, bits, settings):
    """concepts: 2 * concept_window + 1 neighbouring words are a group."""
    length = 2 * settings["concept_window"] + 1

    def draw_lengths(n):
        return torch.full((len(flags_BT), n), length, device=flags_BT.device)
    return group_spans(flags_BT, bits, settings, draw_lengths, length)


def group_random_spans(flags_BT, bits, settings):
    """span: groups of neighbouring words, their number drawn from span_length_distribution."""
    law = span_law(settings["span_length_distribution"]).to(flags_BT.device)

    def draw_lengths(n):
        quantile_BG = bits(LENGTH, n) >> 48 & 0xFFFF  # 16 bits: an index into the table
        return law.index_select(0, quantile_BG.view(-1)).view(-1, n).long()
    long_span = int(law[int(0.98 * len(law))])  # 1 in 50 is longer
    return group_spans(flags_BT, bits, settings, draw_lengths, long_span)


# Up to SPACER_MAX_RATE, one free word (a spacer, never masked) follows each span: without it, two
# neighbouring spans that are both chosen would be one long span. Words are counted from a random
# place on (rotated), or the first word would always begin a span and the last ones rarely be in
# one. Nine words counted from the last one on, and spans a, b, c of 2, 3 and 4 words:
#
#     word           0 1 2 3 4 5 6 7 8
#     rotated word   1 2 3 4 5 6 7 8 0
#     span           a x b b b x - - a
#
# x are spacers. c (-) is never masked, because the end cuts it to 2 words, and its length would not
# follow the distribution. a reaches around the end of the row, so it becomes two groups: word 0 and
# word 8. That leaves 5 candidates of 9 words, so each is chosen with 9/5 * mlm_probability.

def group_spans(flags_BT, bits, settings, draw_lengths, long_span):
    """Cuts the words of each row into spans -> Groups.

    draw_lengths(n) -> (B, n) int64, words. long_span: words of a long span, for the overhang.
    """
    B, T = flags_BT.shape
    word_BT, maskable_BT, n_words_B1 = number_words(flags_BT)
    spacer = 1 if settings["mlm_probability"] <= SPACER_MAX_RATE else 0
    # Spans longer than the budget are cut between words, see choose_groups.
    budget, tok = math.ceil(T * settings["mlm_probability"]), settings["tok"]
    overhang = min(long_words(long_span, tok), budget + long_words(1, tok))

    # 1. Lay spans and spacers end to end. end_BG: the first word after a span and its spacer.
    length_BG = draw_lengths(T // (1 + spacer) + 1)  # enough for T words in spans of one word
    length_BG = torch.minimum(length_BG, (n_words_B1 - spacer).clamp(min=1))
    end_BG = (length_BG + spacer).cumsum(1)

    # 2. The span of the w-th word is the number of spans that have ended at or before w.
    ends_at = torch.zeros(B, T + 1, dtype=torch.int64, device=flags_BT.device)
    ends_at.scatter_add_(1, end_BG.clamp(max=T), torch.ones_like(end_BG))
    span_of_word = ends_at.cumsum(1)

    # 3. Count the words from a random place on, and look up the span of each token.
    rotation_B1 = (to_unit(bits(ROW, 3)[:, 2:]) * n_words_B1).long()
    rotated_BT = word_BT + rotation_B1
    rotated_BT -= n_words_B1 * (rotated_BT >= n_words_B1)
    span_BT = span_of_word.gather(1, rotated_BT)

    # 4. A group begins where the span changes and after a special token: a span that reaches
    # into the next document becomes two groups, which are chosen independently of each other.
    begins_BT = maskable_BT.clone()
    begins_BT[:, 1:] &= (span_BT[:, 1:] != span_BT[:, :-1]) | ~maskable_BT[:, :-1]
    group_BT = begins_BT.cumsum(1).sub_(1).clamp_(min=0)

    # Without spacers the span that the end cuts stays a candidate: high rates need every word.
    if not spacer:
        return Groups(group_BT, maskable_BT, n_words_B1, n_words_B1, overhang, word_BT)

    # 5. Leave out the spacers and the span that the end cuts (but a row of one word is one span).
    limit_B1 = torch.where(n_words_B1 > 1, n_words_B1, 1 + spacer)
    n_candidates_B1 = torch.where(end_BG <= limit_B1, length_BG, 0).sum(1, keepdim=True)
    too_few_B1 = n_candidates_B1 < settings["mlm_probability"] * n_words_B1
    if too_few_B1.any():  # short rows of long spans: there the cut span stays, without its end
        end_BG = torch.where(too_few_B1, end_BG.clamp(max=limit_B1), end_BG)
        length_BG = (end_BG.diff(dim=1, prepend=torch.zeros_like(end_BG[:, :1])) - spacer).clamp(0)
        n_candidates_B1 = torch.where(end_BG <= limit_B1, length_BG, 0).sum(1, keepdim=True)
    end_BT = end_BG.gather(1, span_BT)
    member_BT = maskable_BT & (rotated_BT < end_BT - spacer) & (end_BT <= limit_B1)
    return Groups(group_BT, member_BT, n_words_B1, n_candidates_B1, overhang, word_BT)


def group_any_number(flags_BT, bits, settings):
    """diffusion: each token is a group; a row hides k of its N tokens, k from 1 to N."""
    groups = group_tokens(flags_BT, bits, settings)
    T, n_B1 = flags_BT.shape[1], groups.n_words_B1
    # With mlm_probability below 1, k goes up to that share of N.
    largest_B1 = (settings["mlm_probability"] * n_B1).long().clamp(min=1)
    level_B1 = torch.as_tensor(settings["level"], dtype=torch.float64)[:, None]
    rate_B1 = SCHEDULES[settings["diffusion_schedule"]](level_B1)
    hidden_B1 = (rate_B1.to(n_B1.device) * largest_B1).long() + 1
    hidden_B1 = hidden_B1.clamp(max=largest_B1).clamp(max=n_B1)  # N is 0 where all is special
    n_slots = slots(T, predicted_share("diffusion", settings["mlm_probability"]))
    # N / k, and where only some of the k hidden tokens are predicted, these count for the others.
    weight_B1 = n_B1 / hidden_B1.clamp(min=1, max=n_slots)
    return groups._replace(hidden_B1=hidden_B1, weight_BT=weight_B1.expand(-1, T))


def group_important(flags_BT, bits, settings):
    """importance: words are groups, or tokens where words are not known, with unequal chances."""
    has_words = getattr(settings["tok"], "has_text", True)
    groups = (group_words if has_words else group_tokens)(flags_BT, bits, settings)
    scores_BT = checked_scores(settings["scores"], flags_BT)
    rate, length_BG = settings["mlm_probability"], group_lengths(groups)
    sum_BG = torch.zeros(length_BG.shape, dtype=torch.float64, device=flags_BT.device)
    sum_BG.scatter_add_(1, groups.group_BT, scores_BT * groups.member_BT)
    score_BG = sum_BG / length_BG.clamp(min=1)  # the mean of a word's tokens
    if settings["shuffle_scores"]:
        score_BG = shuffled(score_BG, length_BG > 0, bits)
    chance_BG = chances(score_BG, length_BG, rate, settings["band"])
    weight_BT = None
    if settings["importance_weights"]:
        weight_BT = rate / chance_BG.clamp(min=1e-9).gather(1, groups.group_BT)
    return groups._replace(chance_BG=chance_BG, weight_BT=weight_BT)


def checked_scores(scores, flags_BT):
    """-> scores (B, T) float64. Raises ValueError for another shape and for NaN."""
    if scores is None:
        return torch.zeros(flags_BT.shape, dtype=torch.float64, device=flags_BT.device)
    scores = torch.as_tensor(scores, dtype=torch.float64, device=flags_BT.device)
    if scores.shape != flags_BT.shape:
        raise ValueError(f"scores have the shape {tuple(scores.shape)}; expected one for each "
                         f"token, {tuple(flags_BT.shape)}")
    if not scores.isfinite().all():
        raise ValueError("scores hold NaN or infinite numbers; expected a finite one for each "
                         "token")
    return scores


def shuffled(score_BG, exists_BG, bits):
    """The scores of the groups that exist, in random order."""
    n_groups = score_BG.shape[1]
    key_BG = to_unit(bits(SHUFFLE, n_groups))
    index_BG = torch.arange(n_groups, device=key_BG.device).expand_as(key_BG)
    from_BG = (key_BG + ~exists_BG).argsort(1)  # those that exist first, in random order
    to_BG = (index_BG + n_groups * ~exists_BG).argsort(1)  # and in their own order
    return torch.zeros_like(score_BG).scatter_(1, to_BG, score_BG.gather(1, from_BG))


def chances(score_BG, length_BG, rate, band):
    """How probable the choice of each group is, (B, G) float64; a row's mean over tokens is rate.

    Between LEAST_CHANCE and MOST_CHANCE times rate, and at most 1. Equal scores: rate for all.
    """
    exists_BG = (length_BG > 0).double()
    n_B1 = exists_BG.sum(1, keepdim=True).clamp(min=1)
    if band is None:
        away_BG = (score_BG - (score_BG * exists_BG).sum(1, keepdim=True) / n_B1) * exists_BG
        deviation_B1 = (away_BG.square().sum(1, keepdim=True) / n_B1).sqrt()
        tilt_BG = (away_BG / deviation_B1.clamp(min=1e-12)).clamp(-4, 4).exp()
    else:
        # Equal scores share their mean rank: an order among them would depend on the batch.
        score_BG = score_BG.masked_fill(length_BG == 0, math.inf).contiguous()
        sorted_BG = score_BG.sort(1).values
        rank_BG = (torch.searchsorted(sorted_BG, score_BG)
                   + torch.searchsorted(sorted_BG, score_BG, right=True)) / 2
        tilt_BG = torch.exp(-0.5 * ((rank_BG / n_B1 - band) / BAND_WIDTH).square())
    tilt_BG = tilt_BG * exists_BG
    tilt_BG = tilt_BG / (tilt_BG.sum(1, keepdim=True) / n_B1).clamp(min=1e-12)
    chance_BG = rate * (UNIFORM_SHARE + (1 - UNIFORM_SHARE) * tilt_BG)
    # Limits and budget by turns; each turn comes closer to both.
    length_BG = length_BG.double()
    budget_B1 = rate * length_BG.sum(1, keepdim=True)
    for _ in range(8):
        chance_BG.clamp_(LEAST_CHANCE * rate, min(MOST_CHANCE * rate, 1.0))
        expected_B1 = torch.linalg.vecdot(chance_BG, length_BG)[:, None].clamp(min=1e-12)
        chance_BG *= budget_B1 / expected_B1
    return chance_BG.clamp_(max=1.0).mul_(exists_BG)


SCORES = ("ema", "frequency", "model", "shuffled")  # the kinds of scores, see lib/importance.py
CURRICULA = {"off": None, "easy_to_hard": (0.2, 0.5, 0.8), "hard_to_easy": (0.8, 0.5, 0.2)}
BAND_WIDTH = 0.2  # standard deviation of a band, in quantiles of a row's scores


def curriculum_band(curriculum, progress, stage_1_end, stage_2_end):
    """The quantile of the scores around which words are chosen at this share of the run, or None.

    Three stages: low, medium and high scores, or the other way round.
    """
    bands = CURRICULA[curriculum]
    return bands and bands[(progress >= stage_1_end) + (progress >= stage_2_end)]


# A level, uniform in [0, 1) -> the rate at which a row is masked, of which mlm_probability is the
# unit. `linear` draws all rates equally often, and its mean loss is the bound. The others draw some
# rates more often, and their rows count as much as all: a training loss with other weights, which
# is compared by the bound of tools/eval.py --nelbo=1.
SCHEDULES = {
    "linear": lambda level: level,
    # more rows with few masks, as in MDLM's cosine schedule (2406.07524)
    "cosine": lambda level: 1 - torch.cos(math.pi / 2 * level),
    # rarely nearly none or nearly all (2605.13026); the curve is logit-normal (2403.03206)
    "bell": lambda level: torch.sigmoid(torch.special.ndtri(level)),
}

STRATEGIES = {
    "token": group_tokens,
    "whole_word": group_words,
    "concepts": group_neighbours,
    "span": group_random_spans,
    "diffusion": group_any_number,
    "importance": group_important,
}
MASKING_TYPES = tuple(STRATEGIES)
WORDLESS = ("token", "diffusion", "importance")  # those that need not know where words begin


@lru_cache(maxsize=16)
def span_law(text):
    """A distribution of span lengths as a table of its quantiles: (65536,) uint8, ascending.

    text: "poisson(MEAN)" (BART: 3) or "geometric(P,LONGEST)" (SpanBERT: 0.2,10), limited to lengths
    of 1 to LONGEST, 20 if not given. Raises ValueError for anything else.
    """
    pattern = r"(poisson|geometric)\((?:lambda=)?([\d.]+)(?:,\s*(\d+))?\)"
    match = re.fullmatch(pattern, text.replace(" ", ""))
    name, value, longest = match.groups() if match else (None, "0", None)
    value, longest = float(value), int(longest or 20)
    if name == "poisson" and 0 < value <= 10:
        p = [math.exp(-value) * value**n / math.factorial(n) for n in range(1, longest + 1)]
    elif name == "geometric" and 0 < value < 1 and 1 <= longest <= 100:
        p = [value * (1 - value) ** (n - 1) for n in range(1, longest + 1)]
    else:
        raise ValueError(f"span_length_distribution={text!r}: expected poisson(MEAN up to 10) or "
                         "geometric(P,LONGEST)")
    cdf = torch.tensor(p, dtype=torch.float64).cumsum(0)
    quantile = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    lengths = torch.searchsorted(cdf / cdf[-1], quantile) + 1
    return lengths.to(torch.uint8)  # 64 KiB, which stays in the processor's cache


# ---- step 2: choose groups ----------------------------------------------------

# Lay the groups of a row in random order around a circle, as long as all of them together. Draw an
# arc as long as the budget, from a random place on. Choose the groups whose first token is in the
# arc. For groups a, b, c, d of 2, 3, 1 and 4 tokens, a budget of 2 tokens and the arc from place 5:
#
#     place   0 1 2 3 4 5 6 7 8 9
#     group   a a b b b c d d d d
#     arc               ^ ^            c and d begin here: both are chosen, 5 tokens
#
# Of the 10 places where the arc can begin, 2 choose a given group, whatever its length. So every
# group and every token is chosen with probability budget / circle = 2/10, and the average is 2
# tokens a row. This is systematic sampling (Madow 1949).
#
# An arc within a group that is longer than the budget, such as d with the arc from place 7, would
# choose nothing. Such a group is cut between its words: those whose first token is in the arc are
# chosen, each again with probability budget / circle.

def group_lengths(groups):
    """Tokens of each group, (B, G) int64; 0 for those of special tokens only."""
    group_BT = groups.group_BT
    n_groups = int(group_BT.max()) + 1 if len(group_BT) else 1  # a batch may hold no row
    length_BG = group_BT.new_zeros(len(group_BT), n_groups)
    return length_BG.scatter_add_(1, group_BT, groups.member_BT.long())


def choose_groups(groups, bits, mlm_probability, n_slots):
    """Chooses groups at random, as explained above -> (B, T) bool, True for tokens to hide; the
    same for tokens to predict.

    What would need more than n_slots slots is left out.
    """
    group_BT, length_BG = groups.group_BT, group_lengths(groups)
    if groups.chance_BG is not None:
        chosen_BG = choose_by_chance(groups.chance_BG, length_BG, bits, n_slots)
        predicted_BT = chosen_BG.gather(1, group_BT) & groups.member_BT
        return predicted_BT, predicted_BT
    n_groups = length_BG.shape[1]
    circle_B1 = length_BG.sum(1, keepdim=True)

    # Where some words are no candidates, the others are chosen more often to make up for them.
    budget_B1 = mlm_probability * circle_B1 * groups.n_words_B1
    budget_B1 = budget_B1 / groups.n_candidates_B1.clamp(min=1)
    # Random rounding: 19.2 tokens become 20 in one row of five and 19 in the others.
    arc_begins_B1, rounding_B1 = to_unit(bits(ROW, 2)).split(1, dim=1)
    budget_B1 = (budget_B1 + rounding_B1).long()
    if groups.hidden_B1 is not None:
        budget_B1 = groups.hidden_B1
    budget_B1 = budget_B1.clamp(max=n_slots)

    # Random order: sort random bits. Their low bits are replaced by the number of the group, which
    # makes them distinct and saves an argsort: the sorted values contain the order.
    n_low = group_BT.shape[1].bit_length()
    index = torch.arange(n_groups, device=group_BT.device)
    order_BG = sort_rows(bits(ORDER, n_groups).bitwise_and_(-1 << n_low).bitwise_or_(index))
    order_BG &= (1 << n_low) - 1

    # start_BG: how far beyond the beginning of the arc each group starts, going around the circle.
    ordered_BG = length_BG.gather(1, order_BG)
    start_BG = ordered_BG.cumsum(1).sub_(ordered_BG).sub_((arc_begins_B1 * circle_B1).long())
    start_BG += circle_B1 * (start_BG < 0)
    chosen_BG = in_arc(start_BG, ordered_BG, budget_B1, n_slots)
    chosen_BG = torch.zeros_like(chosen_BG).scatter_(1, order_BG, chosen_BG)  # the row's order
    chosen_BT = chosen_BG.gather(1, group_BT)

    if groups.word_BT is not None:
        limit_B1 = budget_B1.clamp(min=1)
        rows = (length_BG.amax(1) > limit_B1[:, 0]).nonzero()[:, 0]
        if len(rows):
            start_RG = torch.empty_like(start_BG[rows]).scatter_(1, order_BG[rows], start_BG[rows])
            start_RT, length_RT = cut_groups(
                group_BT[rows], groups.member_BT[rows], groups.word_BT[rows], start_RG,
                length_BG[rows] > limit_B1[rows], circle_B1[rows])
            chosen_BT[rows] = in_arc(start_RT, length_RT, budget_B1[rows], n_slots)
    predicted_BT = chosen_BT & groups.member_BT
    if groups.hidden_B1 is None:
        return predicted_BT, predicted_BT
    # An arc of all that is hidden begins with the arc of what is predicted.
    hidden_BG = torch.empty_like(chosen_BG).scatter_(1, order_BG, start_BG < groups.hidden_B1)
    return hidden_BG.gather(1, group_BT) & groups.member_BT, predicted_BT


# With unequal chances, groups lie end to end in order of their length, those of equal length in
# random order, each taking up as much room as its chance. Of the points s, s + 1, s + 2, ... with a
# random s in [0, 1), each chooses the group it falls into. So a group is chosen with its chance, as
# in Madow's sampling, and because lengths ascend, the number of tokens is within one group of what
# is expected.

def choose_by_chance(chance_BG, length_BG, bits, n_slots):
    """Chooses groups with the given chances, as explained above -> (B, G) bool.

    What would need more than n_slots slots is left out.
    """
    n_groups = length_BG.shape[1]
    index = torch.arange(n_groups, device=length_BG.device)
    n_low = n_groups.bit_length()
    # sorted by length, then by 24 random bits; the lowest bits are the number of the group
    random_BG = bits(ORDER, n_groups).bitwise_and_((1 << 24) - 1)
    key_BG = (length_BG << 24 | random_BG) << n_low | index
    order_BG = sort_rows(key_BG) & (1 << n_low) - 1
    # in steps of 2**-40, so that sums are exact and the same on every device
    room_BG = (chance_BG.gather(1, order_BG) * 2**40).round().long()
    start_B1 = (to_unit(bits(ROW, 1)) * 2**40).long()
    end_BG = room_BG.cumsum(1) + start_B1
    chosen_BG = end_BG >> 40 > end_BG - room_BG >> 40
    n_tokens_BG = (chosen_BG * length_BG.gather(1, order_BG)).cumsum(1)
    chosen_BG &= n_tokens_BG <= n_slots
    return torch.zeros_like(chosen_BG).scatter_(1, order_BG, chosen_BG)


def in_arc(start, length, budget_B1, n_slots):
    """Which parts of rows begin in the arc, and still fit into n_slots: (B, n) int64 -> bool."""
    chosen = start < budget_B1
    # The last part may end beyond the arc, by less than its length. Most batches have room for it.
    if (budget_B1[:, 0] + length.amax(1) > n_slots).any():
        first_B1 = start.amin(1)[:, None]  # the arc may begin within a part, which is not chosen
        chosen &= start + length <= first_B1 + n_slots
    return chosen


def cut_groups(group_BT, member_BT, word_BT, start_BG, too_long_BG, circle_B1):
    """Cuts the groups that are too_long (B, G) into words, in place on the circle.

    -> start and length (B, T) int64 of the word or group that each token belongs to; start as
    start_BG, how far its first token is beyond the beginning of the arc.
    """
    begins_group_BT = torch.ones_like(member_BT)
    begins_group_BT[:, 1:] = group_BT[:, 1:] != group_BT[:, :-1]
    begins_BT = begins_group_BT.clone()
    begins_BT[:, 1:] |= (word_BT[:, 1:] != word_BT[:, :-1]) & too_long_BG.gather(1, group_BT)[:, 1:]

    member_BT = member_BT.long()
    n_before_BT = member_BT.cumsum(1) - member_BT  # members before the token, in the row
    offset_BT = torch.where(begins_BT, n_before_BT, 0).cummax(1).values
    offset_BT -= torch.where(begins_group_BT, n_before_BT, 0).cummax(1).values
    start_BT = start_BG.gather(1, group_BT) + offset_BT
    start_BT -= circle_B1 * (start_BT >= circle_B1)

    part_BT = begins_BT.cumsum(1) - 1
    length_BT = torch.zeros_like(part_BT).scatter_add_(1, part_BT, member_BT)
    return start_BT, length_BT.gather(1, part_BT)


def sort_rows(x):
    """Each row of x in ascending order. On a CPU numpy sorts three times as fast as torch."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=1))
    return x.sort(dim=1).values


# ---- steps 3 and 4: replace and gather ----------------------------------------

@lru_cache(maxsize=8)
def ordinary_ids(tok, device):
    """The ids that stand for text, int64: what a random replacement is drawn from."""
    return torch.from_numpy(~tok.is_special).nonzero()[:, 0].to(device)


def replace_tokens(inputs, ids, masked_BT, groups, tok, bits):
    """BERT's mixture: inputs (B, T) with [MASK] -> inputs (B, T).

    Of the predicted groups, 80 % stay [MASK], 10 % become random ids and 10 % keep their own ids.
    One draw decides for a whole group, as in SpanBERT; else the visible half of a word would tell
    the other half.
    """
    draw_BT = to_unit(bits(REPLACE, ids.shape[1])).gather(1, groups.group_BT)
    ordinary = ordinary_ids(tok, ids.device)
    index_BT = (to_unit(bits(RANDOM_ID, ids.shape[1])) * len(ordinary)).long()
    replaced_BT = torch.where(draw_BT < 0.9, ordinary.take(index_BT), ids)
    return torch.where(masked_BT & (draw_BT >= 0.8), replaced_BT, inputs)


def gather_slots(ids, inputs, predicted_BT, n_slots, weight_BT=None):
    """The predicted positions of each row, in ascending order, in K = n_slots slots -> MaskedBatch.

    weight_BT (B, T): what predicting each token counts; None: 1.
    """
    B, T = ids.shape
    # The i-th of them goes to slot i; all others to one extra slot, which is cut off.
    count_BT = predicted_BT.cumsum(1)
    used = torch.arange(n_slots, device=ids.device) < count_BT[:, -1:]
    slot_BT = torch.where(predicted_BT, count_BT.sub_(1), n_slots)
    position_BT = torch.arange(T, device=ids.device).expand(B, T)
    positions = torch.zeros(B, n_slots + 1, dtype=ids.dtype, device=ids.device)
    positions = positions.scatter_(1, slot_BT, position_BT)[:, :n_slots]
    weights = used.float()
    if weight_BT is not None:
        weights = torch.where(used, weight_BT.gather(1, positions).float(), 0.0)
    return MaskedBatch(inputs, positions, ids.gather(1, positions), weights, used)


def predicted_share(masking_type, mlm_probability, objective="mlm"):
    """The share of a row that is decoded, for K and for FLOPs; overhangs are left out."""
    if objective == "clm":  # see next_tokens
        return 1.0
    if masking_type == "diffusion":
        return min(mlm_probability, DIFFUSION_MAX_PREDICTED)
    return mlm_probability


def slots(T, share, overhang=0):
    """K, how many predicted tokens a row of T tokens has room for; share: predicted_share.

    It is the same for all rows, so that every batch has the same shape: the expected number of
    predicted tokens and the overhang of the strategy's Groups, rounded up to a multiple of 8.
    """
    needed = math.ceil(T * share) + overhang
    return min(T, math.ceil(needed / 8) * 8)


# ---- settings -----------------------------------------------------------------

def masking_types(tok):
    """The strategies that work with this tokenizer: one that knows no text knows no words."""
    return tuple(STRATEGIES) if getattr(tok, "has_text", True) else WORDLESS


def check_masking(masking_type, mlm_probability, concept_window=3,
                  span_length_distribution="poisson(3)", mask_replace="100",
                  diffusion_schedule="linear", tok=None, block_size=None):
    """Raises ValueError, naming what is allowed, for a setting that is out of range, that needs
    more than the tokenizer `tok` (if given) knows, or that leaves nothing to predict in rows of
    block_size tokens (if given)."""
    if masking_type not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise ValueError(f"masking_type={masking_type!r}: expected one of {known}")
    if tok and masking_type not in masking_types(tok):
        raise ValueError(f"masking_type={masking_type!r} hides words, and tokenizer {tok.name} "
                         f"knows ids only, not where words begin: use --masking_type="
                         f"{' or '.join(WORDLESS)}, or prepare the data with its own --tokenizer")
    if masking_type == "diffusion" and not 0 < mlm_probability <= 1:
        raise ValueError(f"mlm_probability={mlm_probability}: expected the largest share that "
                         "diffusion hides, above 0 and up to 1; 1 for a likelihood")
    if masking_type != "diffusion" and not 0 < mlm_probability < 1:
        raise ValueError(f"mlm_probability={mlm_probability}: expected a fraction above 0 and "
                         "below 1, such as 0.15")
    if concept_window < 1:
        raise ValueError(f"concept_window={concept_window}: expected 1 or more neighbours on each "
                         "side")
    if mask_replace not in ("100", "80/10/10"):
        raise ValueError(f"mask_replace={mask_replace!r}: expected '100' or '80/10/10'")
    if masking_type == "diffusion" and mask_replace != "100":
        raise ValueError(f"mask_replace={mask_replace}: in diffusion every hidden token is [MASK]; "
                         "expected 100")
    if diffusion_schedule not in SCHEDULES:
        raise ValueError(f"diffusion_schedule={diffusion_schedule!r}: expected one of "
                         f"{', '.join(SCHEDULES)}")
    span_law(span_length_distribution)
    if block_size:
        check_row(block_size, masking_type, mlm_probability, concept_window)


def check_row(block_size, masking_type, mlm_probability, concept_window):
    """Raises ValueError for settings of which rows of block_size tokens are too short."""
    if block_size * mlm_probability < 1:
        enough = math.ceil(1000 / block_size) / 1000
        raise ValueError(f"mlm_probability={mlm_probability}: of a row of block_size={block_size} "
                         "tokens that is less than one predicted token, so some rows would have "
                         f"nothing to predict; expected {enough} or more, or longer rows")
    # a word is at least one token, and up to SPACER_MAX_RATE one word of the row stays free
    longest = block_size - (mlm_probability <= SPACER_MAX_RATE)
    if masking_type == "concepts" and 2 * concept_window + 1 > longest:
        largest = (longest - 1) // 2
        advice = f"expected at most {largest}" if largest else "use --masking_type=whole_word"
        raise ValueError(f"concept_window={concept_window}: a group of {2 * concept_window + 1} "
                         f"words is longer than a row of block_size={block_size} tokens; {advice}, "
                         "or longer rows")


# ---- random numbers: a hash instead of a generator ----------------------------

def signed(x):
    """A 64-bit pattern (0 to 2**64 - 1) as the int64 with the same bits, which torch needs."""
    return x - 2**64 if x >= 2**63 else x


GOLDEN = signed(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, splitmix64's step between two states


def mix(x):
    """Mixes the bits of x int64, in place: the finaliser of splitmix64 (Steele et al. 2014).

    data/reader.py has the same function on numpy's uint64; this file does not import data/.
    """
    x ^= shifted_right(x, 30)
    x *= signed(0xBF58476D1CE4E5B9)  # int64 products wrap modulo 2**64, as the hash wants
    x ^= shifted_right(x, 27)
    x *= signed(0x94D049BB133111EB)
    x ^= shifted_right(x, 31)
    return x


def shifted_right(x, n):
    """x int64 shifted right by n bits, with zeros from the left; torch's >> repeats the sign."""
    return (x >> n).bitwise_and_((1 << 64 - n) - 1)


def random_bits(sample_ids, seed, epoch, stream, n):
    """n random int64 for each sample: (B,) ids -> (B, n). stream: the kind of draw, as ROW.

    Index i of a sample depends on (seed, epoch, stream, sample id, i) alone: n only cuts the list.
    """
    # The factors are large odd numbers, so that small seeds, epochs and streams differ in all bits.
    salt = seed * 0x632BE59BD9B4E019 + epoch * 0xD1342543DE82EF95 + stream * 0x8CB92BA72F3D8DD7
    salt = signed((salt + 1) % 2**64)
    key_B1 = mix(mix(sample_ids[:, None] * GOLDEN + salt))  # one stream of numbers for each sample
    return mix(key_B1 + torch.arange(1, n + 1, device=sample_ids.device) * GOLDEN)


def spread_levels(sample_ids, seed, epoch):
    """(B,) int64 -> (B,) float64 in [0, 1); n sample ids in a row are spread over it evenly.

    Multiples of the golden ratio, modulo 1 and shifted at random: a sequence in which any n
    neighbours are about 1 / n apart. It takes the place of strata of a batch (2107.00630), of which
    a sample would have to know the size; so a batch of any size draws all rates.
    """
    shift = random_bits(torch.zeros_like(sample_ids[:1]), seed, epoch, LEVEL, 1)
    return to_unit(sample_ids * GOLDEN + shift.flatten())


def to_unit(bits):
    """int64 bits -> float64 in [0, 1): the upper 53 bits, as many as a float64 holds."""
    return (bits >> 11 & (1 << 53) - 1).double() * 2.0**-53
