"""Masks: exact budgets, whole words, equal probabilities, the same result on every machine."""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import masking
from data.tokenizer import Tokenizer
from masking import (
    MASKING_TYPES,
    check_masking,
    mask_batch,
    masking_types,
    span_law,
    word_flags,
    word_starts,
)

EOT, MASK, V = 99, 98, 100
# those that predict mlm_probability of each row, wherever it is; the others are tested below
ONE_RATE = ["token", "whole_word", "concepts", "span"]


class Toy(SimpleNamespace):
    """A stand-in for a tokenizer: ids 0-9 start a word and are punctuation, 10-49 start a word,
    50-94 continue one, 95-99 are special."""
    __hash__ = object.__hash__


@pytest.fixture(scope="module")
def tok():
    ids = np.arange(V)
    return Toy(vocab_size=V, mask_id=MASK, eot_id=EOT, is_special=ids >= 95,
               starts_word=(ids < 50) | (ids >= 95), starts_punct=ids < 10, ends_punct=ids < 10)


def rows(B, T, seed=0, eot=0.01, starts=0.7):
    """Random rows. starts, eot: fractions of tokens that begin a word, that end a document."""
    rng = np.random.default_rng(seed)
    begins = rng.random((B, T)) < starts
    ids = np.where(begins, rng.integers(0, 50, (B, T)), rng.integers(50, 95, (B, T)))
    return torch.from_numpy(np.where(rng.random((B, T)) < eot, EOT, ids))


def masked(batch, T):
    """(B, T) bool of predicted positions; also checks that no position is predicted twice."""
    hit = torch.zeros(len(batch.positions), T, dtype=torch.int64)
    hit.scatter_add_(1, batch.positions, batch.used.long())
    assert hit.max() <= 1
    return hit.bool()


def words(ids, tok):
    """(B, T) number of the word of each token, by a plain loop; -1 for special tokens."""
    out = np.full(ids.shape, -1)
    for row, result in zip(ids.numpy(), out):
        word = -1
        for i, t in enumerate(row):
            if tok.is_special[t]:
                continue
            before = row[i - 1]
            joins = tok.starts_punct[t] and tok.ends_punct[before]
            if i == 0 or tok.is_special[before] or (tok.starts_word[t] and not joins):
                word += 1
            result[i] = word
    return out


@pytest.mark.parametrize("masking_type", ONE_RATE)
@pytest.mark.parametrize("p", [0.15, 0.5, 0.8])
def test_the_budget_is_met(tok, masking_type, p):
    B, T = 4000, 128
    ids = rows(B, T)
    hit = masked(mask_batch(ids, torch.arange(B), masking_type, p, tok), T)
    maskable = torch.from_numpy(~tok.is_special)[ids]
    count, budget = hit.sum(1).double(), p * maskable.sum(1)
    assert abs((count - budget).mean()) < 4 * (count - budget).std() / math.sqrt(B)
    assert abs(count.sum() / maskable.sum() - p) < 0.01 * p
    if masking_type == "token":
        assert (count - budget).abs().max() < 1


@pytest.mark.parametrize("masking_type", MASKING_TYPES)
def test_inputs_targets_and_weights_fit_together(tok, masking_type):
    ids = rows(64, 200)
    batch = mask_batch(ids, torch.arange(64), masking_type, 0.3, tok)
    inputs, positions, targets, weights, used = batch
    hit = masked(batch, 200)
    assert positions.shape == targets.shape == weights.shape == used.shape
    assert used.dtype == torch.bool and weights.dtype == torch.float32
    if masking_type in ONE_RATE:
        assert torch.equal(weights, used.float()), "these strategies weigh all predictions alike"
    assert (inputs[hit] == MASK).all(), "predicted tokens are hidden"
    assert (inputs[~hit] == ids[~hit]).all(), "other tokens are not"
    assert (targets == ids.gather(1, positions)).all()
    assert not torch.from_numpy(tok.is_special)[ids[hit]].any()


@pytest.mark.parametrize("masking_type", ["whole_word", "concepts", "span"])
def test_words_are_never_cut(tok, masking_type):
    ids = rows(500, 128, starts=0.5)
    hit = masked(mask_batch(ids, torch.arange(500), masking_type, 0.2, tok), 128).numpy()
    for word, h in zip(words(ids, tok), hit):
        for w in range(word.max() + 1):
            assert h[word == w].all() or not h[word == w].any()


def test_words_of_the_fast_path_equal_a_plain_loop(tok):
    ids = rows(200, 64, eot=0.1)
    special = torch.from_numpy(tok.is_special)[ids]
    starts = word_starts(word_flags(tok, torch.device("cpu"))[ids]) & ~special
    fast = torch.where(special, -1, starts.cumsum(1) - 1)
    assert (fast.numpy() == words(ids, tok)).all()


@pytest.mark.parametrize("masking_type", ONE_RATE)
def test_no_position_is_favoured(tok, masking_type):
    """The masking loops of BERT, SpanBERT and T5 all fail this."""
    B, T = 20000, 48
    ids = rows(1, T, seed=3, eot=0).repeat(B, 1)
    maskable = torch.from_numpy(~tok.is_special)[ids[0]]
    hit = masked(mask_batch(ids, torch.arange(B), masking_type, 0.2, tok), T)
    standard_error = math.sqrt(0.2 * 0.8 / B)
    assert (hit.double().mean(0)[maskable] - 0.2).abs().max() < 5 * standard_error


def test_long_words_are_masked_as_often_as_short_ones(tok):
    B, T = 20000, 60
    ids = rows(1, T, seed=5, eot=0, starts=0.4).repeat(B, 1)
    hit = masked(mask_batch(ids, torch.arange(B), "whole_word", 0.15, tok), T).double().mean(0)
    word = torch.from_numpy(words(ids[:1], tok)[0])
    lengths = torch.bincount(word)[word]
    assert lengths.max() >= 4
    for length in lengths.unique():
        assert abs(hit[lengths == length].mean() - 0.15) < 4 * math.sqrt(0.15 * 0.85 / B)


def inner_runs(batch, T):
    """Lengths of the runs of masked tokens that touch neither end of their row."""
    edge = torch.nn.functional.pad(masked(batch, T).int(), (1, 1)).diff(dim=1)
    start, stop = (edge == 1).nonzero(), (edge == -1).nonzero()
    inner = (start[:, 1] > 0) & (stop[:, 1] < T)
    return (stop - start)[inner, 1]


@pytest.mark.parametrize("law", ["poisson(3)", "geometric(0.2,10)", "poisson(lambda=3)"])
def test_span_lengths_follow_their_law(tok, law):
    """Runs of masked words inside the row have the distribution asked for, by chi-square."""
    B, T = 3000, 512
    ids = torch.randint(10, 50, (B, T), generator=torch.Generator().manual_seed(0))  # words of 1
    lengths = inner_runs(mask_batch(ids, torch.arange(B), "span", 0.15, tok,
                                    span_length_distribution=law), T)
    p = torch.bincount(span_law(law)).double() / 65536
    expected = p * len(lengths)
    seen = torch.bincount(lengths, minlength=len(p))[:len(p)].double()
    use = expected > 20
    chi2 = ((seen - expected) ** 2 / expected)[use].sum()
    dof = int(use.sum()) - 1
    message = f"chi2 {chi2:.0f} at {dof} degrees: {seen / len(lengths)}"
    assert chi2 < dof + 5 * math.sqrt(2 * dof) + 20, message
    assert abs(lengths.double().mean() / (torch.arange(len(p)) * p).sum() - 1) < 0.02


def test_concepts_mask_runs_of_neighbouring_words(tok):
    """concept_window=3 hides 7 neighbours at a time, and still only the fraction asked for.

    Choosing 15 % of the words and hiding all their neighbours too would hide 68 %.
    """
    B, T = 500, 256
    ids = torch.randint(10, 50, (B, T), generator=torch.Generator().manual_seed(1))
    batch = mask_batch(ids, torch.arange(B), "concepts", 0.15, tok, concept_window=3)
    assert (inner_runs(batch, T) == 7).all()
    assert abs(masked(batch, T).double().mean() - 0.15) < 0.003


@pytest.mark.parametrize("masking_type", ["span", "concepts"])
def test_spans_do_not_cross_documents(tok, masking_type):
    """Words on both sides of an end of document, and at both ends of a row, are masked
    independently of each other."""
    B, T, p = 20000, 129, 0.15
    ids = torch.full((B, T), 20)
    ids[:, 64] = EOT
    batch = mask_batch(ids, torch.arange(B), masking_type, p, tok)
    assert (batch.inputs[:, 64] == EOT).all()
    hit = masked(batch, T).double()
    for a, b in ((63, 65), (0, 128)):
        assert abs((hit[:, a] * hit[:, b]).mean() - p * p) < 0.01
    assert (hit[:, 20] * hit[:, 21]).mean() > 0.07, "neighbours within a document do share a span"


@pytest.mark.parametrize("masking_type", MASKING_TYPES)
def test_masks_depend_on_nothing_but_seed_epoch_and_sample(tok, masking_type):
    ids, sample = rows(32, 100), torch.arange(1000, 1032)
    whole = mask_batch(ids, sample, masking_type, 0.2, tok, seed=3, epoch=1)
    order = torch.randperm(32)
    shuffled = mask_batch(ids[order], sample[order], masking_type, 0.2, tok, seed=3, epoch=1)
    for a, b in zip(whole, shuffled):
        assert torch.equal(a[order], b)
    torch.manual_seed(1)
    single = mask_batch(ids[5:6], sample[5:6], masking_type, 0.2, tok, seed=3, epoch=1)
    assert torch.equal(whole.inputs[5:6], single.inputs)
    for change in (dict(seed=4, epoch=1), dict(seed=3, epoch=2)):
        other = mask_batch(ids, sample, masking_type, 0.2, tok, **change)
        a, b = masked(whole, 100).double(), masked(other, 100).double()
        assert (a * b).sum() / a.sum() < 0.35, "other seeds and epochs draw other masks"


def test_pairs_of_tokens_are_masked_independently(tok):
    """P(i and j are masked) is the same for neighbours and for distant tokens."""
    B, T = 20000, 32
    ids = torch.full((B, T), 20)
    hit = masked(mask_batch(ids, torch.arange(B), "token", 0.25, tok), T).double()
    both = (hit.T @ hit / B)[~torch.eye(T, dtype=torch.bool)]
    expected = 8 * 7 / (32 * 31)
    assert (both - expected).abs().max() < 5.5 * math.sqrt(expected / B)


def test_mixture_replaces_whole_words_80_10_10(tok):
    ids = rows(3000, 100, starts=0.5, eot=0)
    batch = mask_batch(ids, torch.arange(3000), "whole_word", 0.3, tok, mask_replace="80/10/10")
    hit = masked(batch, 100)
    n = hit.sum().item()
    kept, hidden = (batch.inputs == ids) & hit, (batch.inputs == MASK) & hit
    assert abs(hidden.sum() / n - 0.8) < 5 * math.sqrt(2 * 0.16 / n)
    random_rate = 1 - (hidden.sum() + kept.sum()) / n
    assert abs(random_rate - 0.1 * (1 - 1 / 95)) < 5 * math.sqrt(2 * 0.09 / n)
    assert (batch.inputs[~hit] == ids[~hit]).all()
    special = torch.from_numpy(tok.is_special)
    assert not special[batch.inputs[hit & ~hidden]].any(), "random ids are never special"
    for word, h in zip(words(ids[:200], tok), hidden[:200].numpy()):
        for w in range(word.max() + 1):
            assert h[word == w].all() or not h[word == w].any()


@pytest.mark.parametrize("masking_type", MASKING_TYPES)
@pytest.mark.parametrize(
    "row", [[EOT] * 16, [20], [60] * 3, [20] + [60] * 63, [EOT, 20, EOT, EOT, 30, EOT]],
    ids=["specials", "one token", "one word", "giant word", "tiny documents"])
def test_odd_rows_are_masked_or_left_alone(tok, masking_type, row):
    ids = torch.tensor([row, row])
    for p in (0.01, 0.5, 0.99):
        hit = masked(mask_batch(ids, torch.arange(len(ids)), masking_type, p, tok), ids.shape[1])
        assert not torch.from_numpy(tok.is_special)[ids[hit]].any()


@pytest.mark.parametrize("wrong", [
    dict(masking_type="words"), dict(mlm_probability=0), dict(mlm_probability=1.0),
    dict(mlm_probability=math.nan), dict(mlm_probability=-0.1), dict(concept_window=0),
    dict(span_length_distribution="poisson(0)"), dict(span_length_distribution="exp(3)"),
    dict(span_length_distribution="geometric(2,10)"), dict(mask_replace="90/10")])
def test_impossible_settings_are_refused_with_what_is_allowed(tok, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected"):
        settings = {"masking_type": "span", "mlm_probability": 0.15, **wrong}
        mask_batch(rows(2, 8), torch.arange(2), tok=tok, **settings)


def test_words_are_not_hidden_where_only_ids_are_known():
    tok, ids = Tokenizer.load("ids:50:7"), rows(2, 16) % 50
    assert mask_batch(ids, torch.arange(2), "token", 0.3, tok).weights.sum() > 0
    assert mask_batch(ids, torch.arange(2), "diffusion", 1.0, tok).weights.sum() > 0
    assert mask_batch(ids, torch.arange(2), "importance", 0.3, tok).weights.sum() > 0
    assert masking_types(tok) == masking.WORDLESS
    for masking_type in ("whole_word", "concepts", "span"):
        with pytest.raises(ValueError, match="knows ids only.*--masking_type=token or diffusion"):
            mask_batch(ids, torch.arange(2), masking_type, 0.3, tok)


# ---- wide groups, long words, short rows ----------------------------------------


class Letters(Toy):
    """A stand-in for a byte tokenizer: as Toy, with one byte a token."""
    n_bytes = np.where(np.arange(V) < 95, 1, 0)


@pytest.fixture(scope="module")
def letters(tok):
    return Letters(**vars(tok))


def rows_of_words(B, T, shortest, longest, eot=0.0, seed=0):
    """Rows of words of shortest to longest tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, B * T)
    starts = np.zeros(B * T + longest, bool)
    starts[np.cumsum(lengths)[np.cumsum(lengths) < B * T]] = True
    starts = starts[:B * T].reshape(B, T)
    ids = np.where(starts, rng.integers(10, 50, (B, T)), rng.integers(50, 95, (B, T)))
    return torch.from_numpy(np.where(rng.random((B, T)) < eot, EOT, ids))


WIDE = [("concepts", dict(concept_window=window)) for window in (1, 3, 10, 15, 20)] + [
    ("span", dict(span_length_distribution=law))
    for law in ("poisson(3)", "poisson(10)", "geometric(.05,100)", "geometric(0.2,10)")]
wide = pytest.mark.parametrize("masking_type, settings", WIDE,
                               ids=[f"{m} {next(iter(s.values()))}" for m, s in WIDE])


def check_share(ids, masking_type, p, tok, settings, tolerance=0.02):
    """The share of the maskable tokens that is predicted is p; no row goes without. -> batch."""
    batch = mask_batch(ids, torch.arange(len(ids)), masking_type, p, tok, **settings)
    maskable = torch.from_numpy(~tok.is_special)[ids]
    count = batch.used.sum(1).double()
    share, error = count.sum() / maskable.sum(), count.std() * len(ids)**0.5 / maskable.sum()
    # the tolerance, and the chance of the draw on top of it
    assert abs(share - p) < tolerance * p + 3 * error, f"share {share:.4f}, expected {p}"
    assert (batch.inputs.eq(tok.mask_id).sum(1) - ids.eq(tok.mask_id).sum(1) == count).all()
    return batch


@wide
def test_wide_groups_reach_their_share_and_leave_no_row_empty(tok, masking_type, settings):
    for starts in (0.7, 1.0):
        batch = check_share(rows(4000, 128, starts=starts), masking_type, 0.15, tok, settings, 0.01)
        assert batch.used.any(1).all()


@wide
@pytest.mark.parametrize("T", [16, 64, 512, 2048])
def test_every_rate_and_row_length_reaches_its_share(tok, masking_type, settings, T):
    for p in (0.05, 0.15, 0.3, 0.5, 0.8):
        check_share(rows(2**16 // T, T), masking_type, p, tok, settings)


@pytest.mark.parametrize("masking_type, settings", [("whole_word", {}), *WIDE[1::2]], ids=str)
def test_long_words_of_a_byte_tokenizer_reach_their_share(letters, masking_type, settings):
    for words_of, T in (((20, 23), 128), ((2, 9), 128), ((20, 23), 512), ((1, 25), 1024)):
        ids = rows_of_words(2**18 // T, T, *words_of)
        batch = check_share(ids, masking_type, 0.15, letters, settings)
        if words_of[1] <= 0.15 * T:
            assert batch.used.any(1).all(), "a row is empty only if no word fits its budget"


def test_words_of_the_real_byte_tokenizer_reach_their_share():
    tok = Tokenizer.load("byte")
    text = " ".join("abcdefghijklmnopqrstuvw"[:n] for n in (22, 20, 19, 21) * 4000)
    ids = torch.from_numpy(tok.encode([text])[0].astype(np.int64))
    ids = ids[:len(ids) // 128 * 128].view(-1, 128)
    for masking_type in ONE_RATE:
        check_share(ids, masking_type, 0.15, tok, {})


@wide
def test_rows_of_many_documents_reach_their_share(tok, masking_type, settings):
    check_share(rows(2000, 128, eot=0.2), masking_type, 0.15, tok, settings)


def test_groups_longer_than_the_budget_are_cut_between_words(tok):
    """Of 41 neighbouring words about as many as the budget are hidden, side by side."""
    ids = rows(1000, 128, starts=0.5)
    batch = mask_batch(ids, torch.arange(1000), "concepts", 0.15, tok, concept_window=20)
    hit = masked(batch, 128).numpy()
    runs = 0
    for word, h in zip(words(ids, tok), hit):
        runs += (np.diff(h.astype(int), prepend=0) == 1).sum()
        for w in range(word.max() + 1):
            assert h[word == w].all() or not h[word == w].any()
    assert hit.sum() / runs > 8, "neighbours are hidden together"


def test_wide_groups_favour_no_position(tok):
    B, T = 20000, 48
    ids = rows(1, T, seed=3, eot=0).repeat(B, 1)
    for settings in (dict(concept_window=10), dict(concept_window=22)):
        hit = masked(mask_batch(ids, torch.arange(B), "concepts", 0.2, tok, **settings), T)
        assert (hit.double().mean(0) - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / B)


# Sums over positions and targets before strategies named their own number of slots.
KNOWN = {
    ("token", 128): (1222, 2535541),
    ("token", 512): (4873, 40886177),
    ("whole_word", 128): (1214, 2442435),
    ("whole_word", 512): (4872, 40756572),
    ("concepts", 128): (1193, 2233818),
    ("concepts", 512): (4864, 42016961),
    ("span", 128): (1237, 2641901),
    ("span", 512): (4847, 39376891),
}


@pytest.mark.parametrize("masking_type, T", list(KNOWN), ids=str)
def test_masks_of_a_seed_and_sample_stay_what_they_were(tok, masking_type, T):
    """Evaluations of older versions compare with those of this one."""
    ids = rows(64, T, seed=11)
    batch = mask_batch(ids, torch.arange(100, 164), masking_type, 0.15, tok, seed=1234)
    hit = masked(batch, T)
    place = torch.arange(1, T + 1) * torch.arange(1, 65)[:, None]
    assert (int(hit.sum()), int((hit * place).sum())) == KNOWN[masking_type, T]


def test_the_same_settings_have_the_same_number_of_slots_in_every_batch(tok):
    for masking_type, settings in [("token", {}), ("whole_word", {}), *WIDE]:
        shapes = {mask_batch(rows(n, 128, seed=n, starts=starts), torch.arange(n), masking_type,
                             0.15, tok, **settings).used.shape[1]
                  for n in (1, 5, 40) for starts in (0.3, 1.0)}
        assert len(shapes) == 1


@pytest.mark.parametrize("T, p, most", [(128, 0.15, 48), (512, 0.15, 104), (2048, 0.15, 336),
                                        (512, 0.3, 184)])
def test_usual_settings_need_few_slots(tok, T, p, most):
    """Slots cost FLOPs of the decoder."""
    for masking_type in MASKING_TYPES:
        batch = mask_batch(rows(2, T), torch.arange(2), masking_type, p, tok)
        assert batch.used.shape[1] <= most


@pytest.mark.parametrize("masking_type, settings", [("token", {}), ("whole_word", {}), *WIDE[1:]],
                         ids=str)
def test_rows_of_any_kind_are_masked_or_left_alone(tok, letters, masking_type, settings):
    kinds = [[EOT] * 16, [20], [60], [20] + [60] * 200, [60] * 200, [EOT, 20] * 30, [20] * 2,
             [20, 60, 60, EOT], [5] * 40]
    for kind in kinds:
        ids, special = torch.tensor([kind] * 3), torch.tensor(kind) >= 95
        for p in (1e-9, 0.01, 0.5, 0.99, 1 - 1e-9):
            for tokenizer in (tok, letters):
                batch = mask_batch(ids, torch.arange(3), masking_type, p, tokenizer, **settings)
                hit = masked(batch, len(kind))
                assert not hit[:, special].any()
                assert (batch.inputs[~hit] == ids[~hit]).all() and (batch.inputs[hit] == MASK).all()
    empty = mask_batch(ids[:0], torch.arange(0), masking_type, 0.15, tok, **settings)
    assert empty.inputs.shape == (0, 40) and empty.used.shape[0] == 0, "a batch without rows"


@pytest.mark.parametrize("wrong, advice", [
    (dict(masking_type="concepts", concept_window=16, block_size=32), "at most 15"),
    (dict(masking_type="concepts", concept_window=16, mlm_probability=0.6, block_size=32),
     "at most 15"),
    (dict(masking_type="concepts", concept_window=1, mlm_probability=0.4, block_size=3),
     "masking_type=whole_word"),
    (dict(masking_type="token", mlm_probability=0.01, block_size=64), "expected 0.016 or more")])
def test_settings_that_rows_are_too_short_for_are_refused_before_training(wrong, advice):
    settings = dict(mlm_probability=0.15) | wrong
    with pytest.raises(ValueError, match=advice):
        check_masking(**settings)
    if advice == "at most 15":
        check_masking(**settings | dict(concept_window=15))


# ---- adding a strategy ------------------------------------------------------------


def test_a_strategy_is_one_function_and_one_entry_and_may_weigh_its_predictions(tok, monkeypatch):
    """K follows from what it returns, and weights change neither masks nor counts."""
    def group_pairs(flags_BT, bits, settings):
        groups = masking.group_tokens(flags_BT, bits, settings)
        weight_BT = torch.arange(1.0, flags_BT.shape[1] + 1).expand(flags_BT.shape)
        return groups._replace(group_BT=groups.group_BT // 2, weight_BT=weight_BT, overhang=9)

    monkeypatch.setitem(masking.STRATEGIES, "pairs", group_pairs)
    ids = rows(500, 128, eot=0)
    batch = check_share(ids, "pairs", 0.15, tok, {}, 0.01)
    assert batch.used.shape[1] == 32
    expected = torch.where(batch.used, batch.positions + 1.0, 0.0)
    assert torch.equal(batch.weights, expected)
    with pytest.raises(ValueError, match="pairs"):
        check_masking("pears", 0.15)


# ---- diffusion ------------------------------------------------------------------------------


def hidden_counts(ids, batch):
    return (batch.inputs != ids).sum(1)


def test_diffusion_hides_every_number_of_tokens_equally_often(tok):
    ids, T = rows(4000, 24, eot=0.1), 24
    batch = mask_batch(ids, torch.randperm(4000), "diffusion", 1.0, tok)
    n = (~torch.from_numpy(tok.is_special)[ids]).sum(1)
    k = hidden_counts(ids, batch)
    assert (batch.inputs[batch.inputs != ids] == MASK).all()
    assert ((k >= 1) & (k <= n)).all()
    full = k[n == n.mode().values]  # rows with the commonest number of maskable tokens
    counts = torch.bincount(full, minlength=T + 1)[1:int(n.mode().values) + 1].double()
    expected = len(full) / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < len(counts) + 4 * (2 * len(counts)) ** 0.5


def test_diffusion_hides_every_position_equally_often(tok):
    ids = rows(20000, 16, eot=0)
    batch = mask_batch(ids, torch.arange(20000), "diffusion", 1.0, tok)
    share = (batch.inputs != ids).double().mean(0)
    # k has mean 17/2 of 16
    assert (share - 17 / 32).abs().max() < 4 * (0.25 / 20000) ** 0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "bell"])
def test_weights_of_a_diffusion_row_sum_to_its_maskable_tokens(tok, schedule):
    ids = rows(64, 40, eot=0.1)
    batch = mask_batch(ids, torch.arange(64), "diffusion", 1.0, tok, diffusion_schedule=schedule)
    n = (~torch.from_numpy(tok.is_special)[ids]).sum(1)
    assert torch.allclose(batch.weights.sum(1), n.float())
    k = hidden_counts(ids, batch).clamp(max=batch.positions.shape[1])
    expected = n / k  # N / k, where as many are predicted as are hidden
    assert torch.allclose(batch.weights[:, 0], expected.float())


def test_diffusion_predicts_a_random_half_of_what_it_hides_at_most(tok):
    """At most half of a row is decoded, whichever of the hidden tokens that is."""
    B, T = 4000, 32
    ids = rows(B, T, eot=0)
    batch = mask_batch(ids, torch.arange(B), "diffusion", 1.0, tok,
                       level=torch.full((B,), 0.999))
    assert batch.positions.shape[1] == T // 2
    assert (batch.inputs == MASK).all()
    share = masked(batch, T).double().mean(0)
    assert (share - 0.5).abs().max() < 4 * (0.25 / B) ** 0.5


def test_the_largest_share_that_diffusion_hides_can_be_set(tok):
    ids = rows(500, 40, eot=0)
    batch = mask_batch(ids, torch.arange(500), "diffusion", 0.25, tok)
    k = hidden_counts(ids, batch)
    assert sorted(k.unique().tolist()) == list(range(1, 11))
    assert batch.positions.shape[1] == 16  # 10, rounded up to a multiple of 8


def test_schedules_draw_the_shares_they_say(tok):
    B, T = 4000, 100
    ids = rows(B, T, eot=0)
    share = {}
    for schedule in ("linear", "cosine", "bell"):
        batch = mask_batch(ids, torch.arange(B), "diffusion", 1.0, tok,
                           diffusion_schedule=schedule)
        share[schedule] = hidden_counts(ids, batch) / T
    assert abs(share["linear"].mean() - 0.505) < 0.005
    assert abs(share["cosine"].mean() - (1 - 2 / math.pi)) < 0.01
    assert abs(share["bell"].mean() - 0.5) < 0.01
    extreme = {name: ((s < 0.1) | (s > 0.9)).float().mean() for name, s in share.items()}
    assert extreme["linear"] > 0.15 and extreme["bell"] < 0.05


@pytest.mark.parametrize("B", [8, 13, 64, 128])
def test_levels_of_a_batch_are_spread_evenly(tok, B):
    """The mean of any batch's levels is 1/2, far closer than that of independent draws."""
    gaps, first = [], []
    for step in range(50):
        level = masking.spread_levels(torch.arange(step * B, (step + 1) * B), seed=3, epoch=0)
        ordered = level.sort().values
        gaps.append(torch.cat((ordered.diff(), ordered[:1] + 1 - ordered[-1:])).max() * B)
        first.append(level[0])
    assert max(gaps) < 3  # independent draws: about log(B) + 1 at the median, and up to 10
    assert 0.2 < torch.stack(first).mean() < 0.8  # every place in the batch sees all levels


def test_a_row_of_special_tokens_hides_nothing(tok):
    ids = torch.full((2, 16), EOT)
    batch = mask_batch(ids, torch.arange(2), "diffusion", 1.0, tok)
    assert not batch.used.any() and (batch.weights == 0).all() and (batch.inputs == ids).all()


def enumerated_bound(table_nats, ids, T):
    """N E_k [1/k E_M sum_{i in M} CE_i] of one row, over all masks. -> nats a row."""
    total = 0.0
    for mask in itertools.product((0, 1), repeat=T):
        k = sum(mask)
        if k:
            nats = sum(table_nats(ids, mask, i) for i in range(T) if mask[i])
            total += nats / k / math.comb(T, k)
    return total


def table_nats(ids, mask, i):
    """A model that sees its neighbours: its nats depend on the mask, so wrong rates show."""
    seen = sum(not mask[j] for j in (i - 1, i + 1) if 0 <= j < len(ids))
    return (1.0 + 0.1 * int(ids[i])) * (3 - seen)


@pytest.mark.parametrize("level", ["spread", "independent"])
def test_diffusion_estimates_the_enumerated_bound(tok, level):
    T, B = 6, 12000
    row = torch.tensor([3, 11, 25, 7, 42, 18])
    ids, exact = row.expand(B, T), enumerated_bound(table_nats, row, T)
    levels = None
    if level == "independent":
        levels = torch.rand(B, generator=torch.Generator().manual_seed(0))
    batch = mask_batch(ids, torch.arange(B), "diffusion", 1.0, tok, level=levels)
    hidden = (batch.inputs == MASK).int().tolist()
    nats = torch.tensor([[table_nats(row, mask, p) for p in positions]
                         for mask, positions in zip(hidden, batch.positions.tolist())])
    estimates = (nats * batch.weights).sum(1)
    error = estimates.std() / B**0.5
    assert abs(estimates.mean() - exact) < 3 * error
    # the mean over all masked tokens of a batch, as some trainers have it, is no estimate of it
    naive = (nats * batch.used).sum() / batch.used.sum() * T
    assert abs(naive - exact) > 10 * error


@pytest.mark.parametrize("settings,words", [
    (dict(mlm_probability=0.0), "up to 1"), (dict(mlm_probability=1.5), "up to 1"),
    (dict(mask_replace="80/10/10"), "every hidden token is [MASK]"),
    (dict(diffusion_schedule="sigmoid"), "linear, cosine, bell")])
def test_impossible_diffusion_is_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_masking("diffusion", **(dict(mlm_probability=1.0) | settings))


# ---- importance -----------------------------------------------------------------------------


def by_word(ids, tok, values_BT):
    """For each word of each row the mean of values_BT and its number of tokens; two lists."""
    means, lengths = [], []
    for row, value in zip(words(ids, tok), values_BT.numpy()):
        for word in range(row.max() + 1):
            means.append(value[row == word].mean())
            lengths.append((row == word).sum())
    return np.array(means), np.array(lengths)


def test_important_words_are_chosen_with_their_chances(tok):
    """Drawn often, each word is masked as often as its weight says, and never in part."""
    ids, n_draws = rows(40, 60, eot=0.02), 600
    scores = torch.from_numpy(np.random.default_rng(1).normal(size=ids.shape))
    hit, weight = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for draw in range(n_draws):
        batch = mask_batch(ids, torch.arange(40), "importance", 0.2, tok, epoch=draw, scores=scores)
        hit += masked(batch, 60)
        weight.scatter_reduce_(1, batch.positions, batch.weights, "amax")
    share, lengths = by_word(ids, tok, hit / n_draws)
    weight, _ = by_word(ids, tok, weight)
    chance = 0.2 / weight
    assert (chance > 0.1 - 1e-6).all() and (chance < 0.6 + 1e-6).all()
    assert chance.max() > 0.4 and chance.min() < 0.12, "scores make a difference"
    z = (share - chance) / np.sqrt(chance * (1 - chance) / n_draws)
    assert abs(z).max() < 5 and 0.8 < z.std() < 1.2
    assert set(np.round(by_word(ids, tok, (hit > 0).double())[0], 6)) <= {0.0, 1.0}


def test_important_words_keep_the_budget_within_a_word(tok):
    ids = rows(2000, 128)
    scores = torch.from_numpy(np.random.default_rng(1).normal(size=ids.shape))
    for band in (None, 0.8):
        batch = mask_batch(ids, torch.arange(2000), "importance", 0.15, tok, scores=scores,
                           band=band)
        hit = masked(batch, 128)
        _, lengths = by_word(ids, tok, hit.double())
        maskable = torch.from_numpy(~tok.is_special)[ids].sum(1)
        off = hit.sum(1) - 0.15 * maskable
        assert off.abs().max() < lengths.max() and abs(off.mean()) < 0.1


def test_the_weighted_mean_under_importance_masks_is_the_uniform_mean(tok):
    """Within 0.1 %, although the tokens with high values are chosen three times as often."""
    ids = rows(20000, 128)
    value = torch.from_numpy(np.random.default_rng(1).gamma(2, size=V))[ids]
    batch = mask_batch(ids, torch.arange(20000), "importance", 0.15, tok, scores=value)
    found = value.gather(1, batch.positions)
    weighted = (found * batch.weights).sum() / batch.weights.sum()
    plain = (found * batch.used).sum() / batch.used.sum()
    maskable = torch.from_numpy(~tok.is_special)[ids]
    exact = (value * maskable).sum() / maskable.sum()
    assert abs(weighted / exact - 1) < 1e-3 and plain / exact > 1.1
    unweighted = mask_batch(ids[:9], torch.arange(9), "importance", 0.15, tok, scores=value[:9],
                            importance_weights=False)
    assert torch.equal(unweighted.weights, unweighted.used.float())


def test_equal_scores_mask_uniformly(tok):
    ids = rows(500, 64)
    batch = mask_batch(ids, torch.arange(500), "importance", 0.3, tok,
                       scores=torch.full(ids.shape, 7.0))
    assert torch.allclose(batch.weights[batch.used], torch.ones(()), atol=1e-6)


def test_bands_choose_low_medium_or_high_scores(tok):
    ids = rows(500, 128)
    scores = torch.from_numpy(np.random.default_rng(1).random(ids.shape))
    mean = {}
    for band in (0.2, 0.5, 0.8, None):
        batch = mask_batch(ids, torch.arange(500), "importance", 0.15, tok, scores=scores,
                           band=band)
        mean[band] = scores.gather(1, batch.positions)[batch.used].mean()
    assert mean[0.2] < 0.45 < 0.48 < mean[0.5] < 0.52 < 0.55 < mean[0.8] and mean[None] > 0.55


@pytest.mark.parametrize("band", [None, 0.2, 0.5, 0.8])
def test_equal_scores_make_no_row_depend_on_the_others(tok, band):
    """A repeated word has the same score each time."""
    ids = rows(32, 128)
    scores = (ids % 5).double()
    whole = mask_batch(ids, torch.arange(32), "importance", 0.3, tok, scores=scores, band=band)
    for i in range(32):
        alone = mask_batch(ids[i:i + 1], torch.tensor([i]), "importance", 0.3, tok,
                           scores=scores[i:i + 1], band=band)
        assert torch.equal(whole.inputs[i], alone.inputs[0]), i


@pytest.mark.parametrize("curriculum,bands", [
    ("off", [None] * 5), ("easy_to_hard", [0.2, 0.2, 0.5, 0.8, 0.8]),
    ("hard_to_easy", [0.8, 0.8, 0.5, 0.2, 0.2])])
def test_the_stage_of_a_curriculum_follows_from_the_progress(curriculum, bands):
    found = [masking.curriculum_band(curriculum, progress, 0.33, 0.66)
             for progress in (0, 0.32, 0.33, 0.66, 1.0)]
    assert found == bands


def test_shuffled_scores_keep_their_chances_but_not_their_words(tok):
    ids = rows(300, 64, starts=1.0)
    scores = torch.from_numpy(np.random.default_rng(1).normal(size=ids.shape))
    plain, other = (mask_batch(ids, torch.arange(300), "importance", 0.3, tok, scores=scores,
                               shuffle_scores=shuffle) for shuffle in (False, True))
    mean = [scores.gather(1, b.positions)[b.used].mean() for b in (plain, other)]
    assert mean[0] > 0.25 and abs(mean[1]) < 0.05
    assert abs(plain.weights.std() / other.weights.std() - 1) < 0.1


def test_importance_masks_do_not_depend_on_the_batch(tok):
    ids, scores = rows(40, 64), torch.rand(40, 64)
    whole = mask_batch(ids, torch.arange(40), "importance", 0.2, tok, scores=scores)
    parts = [mask_batch(ids[i:i + 8], torch.arange(i, i + 8), "importance", 0.2, tok,
                        scores=scores[i:i + 8]) for i in range(0, 40, 8)]
    for a, b in zip(whole, zip(*parts)):
        assert torch.equal(a, torch.cat(b))


@pytest.mark.parametrize("scores,words", [
    (torch.zeros(2, 5), "(2, 5)"),
    (torch.full((2, 32), math.nan), "NaN"), (torch.full((2, 32), math.inf), "infinite")])
def test_scores_that_are_none_are_refused(tok, scores, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        mask_batch(rows(2, 32), torch.arange(2), "importance", 0.15, tok, scores=scores)


@pytest.mark.parametrize("row", [
    torch.full((1, 32), EOT), torch.full((1, 32), 60), torch.tensor([[5] + [60] * 31]),
    torch.tensor([[EOT, 5] * 16]), torch.tensor([[3]])], ids=range(5))
def test_odd_rows_have_importance_masks_too(tok, row):
    """All special, one giant word, one token a document, one token: never more than K slots."""
    for epoch in range(20):
        batch = mask_batch(row, torch.zeros(1, dtype=torch.int64), "importance", 0.3, tok,
                           epoch=epoch, scores=torch.rand(row.shape))
        assert torch.equal(batch.inputs != row, masked(batch, row.shape[1]))
        assert batch.weights.isfinite().all()
