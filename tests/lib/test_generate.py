"""lib/generate.py: texts follow the model's own distribution, and only masks are filled."""

import math
from types import SimpleNamespace

import pytest
import scipy.stats
import torch

from data.tokenizer import Tokenizer
from lib.generate import Sampling, draw, entropy, generate, plan_text
from lib.settings import build_model

THREE = Tokenizer.of_ids(3)  # ids 0, 1, 2, then the special ones
BYTE = Tokenizer.load("byte")


class Stub:
    """A model that predicts `p(ids, positions)`, probabilities (B,K,n) of the first n ids.

    The special ids that may not be drawn would be likelier than all of these; other ids and, unless
    p names it, the end-of-document mark never come.
    """

    def __init__(self, p, longest, tok=THREE):
        self.cfg, self.p, self.tok, self.rows = SimpleNamespace(longest=longest), p, tok, []

    def encode(self, ids):
        self.rows.append(ids.clone())
        return ids, ids

    def documents(self, ids):
        return None

    def decode(self, ids, tokens, positions, documents):
        p = self.p(ids, positions)
        never = torch.full((self.tok.vocab_size,), -1e9)
        never[self.tok.is_special] = 99.0
        never[self.tok.eot_id] = -1e9
        logits = never.repeat(*positions.shape, 1)
        logits[..., :p.shape[-1]] = p.log().clamp(min=-1e9)
        return logits

    def logits(self, states):
        return states


def always(*p):
    """The same probabilities everywhere."""
    return lambda ids, positions: torch.tensor(p).expand(*positions.shape, -1)


def drawn(model, n_samples, tok=THREE, length=0, **settings):
    """-> ids (n_samples, N) that were drawn, and those of all rows after each step."""
    steps = []
    found = list(generate(model, tok, "", n_samples, length, batch_tokens=10**9,
                          sampling=Sampling(**settings),
                          watch=lambda ids: steps.append(ids[:, 1:].clone())))
    return torch.tensor([sample.ids for sample in found]), steps


# ---- which distribution is drawn from ------------------------------------------------

TEXTS = torch.cartesian_prod(*[torch.arange(3)] * 3)  # all 27 texts of three tokens
JOINT = torch.rand(27, generator=torch.Generator().manual_seed(0)).double() ** 3
JOINT[[0, 13, 26]] += 1  # equal tokens like to stand together
JOINT /= JOINT.sum()
IS = torch.nn.functional.one_hot(TEXTS, 3).double()  # (27 texts, 3 places, 3 ids)


def conditionals(ids, positions):
    """What JOINT says of each position, given the tokens that are there."""
    row = ids[:, None, 1:]
    fits = ((row == THREE.mask_id) | (row == TEXTS)).all(-1)
    p = torch.einsum("bt,tpv->bpv", fits * JOINT, IS)
    p = p / p.sum(-1, keepdim=True)
    places = (positions - 1).clamp(min=0)  # the mark at the beginning may be asked for, too
    return p.gather(1, places[..., None].expand(-1, -1, 3))


def p_value(ids, expected):
    """Chi-square: how probable so different counts are if texts are drawn from `expected`."""
    counts = torch.bincount(ids @ torch.tensor([9, 3, 1]), minlength=27)
    return scipy.stats.chisquare(counts, expected * len(ids)).pvalue


def test_as_many_steps_as_tokens_draw_from_the_joint_distribution():
    ids, _ = drawn(Stub(conditionals, 4), 20_000, steps=3)
    assert p_value(ids, JOINT) > 0.001


def test_one_step_draws_each_token_from_its_own_distribution():
    ids, _ = drawn(Stub(conditionals, 4), 20_000, steps=1)
    first, second, third = torch.einsum("t,tpv->pv", JOINT, IS)
    assert p_value(ids, torch.einsum("a,b,c->abc", first, second, third).flatten()) > 0.001
    assert p_value(ids, JOINT) < 1e-9, "the test would see the difference"


def test_every_step_fills_its_share_and_all_steps_fill_all_tokens():
    """With 10 tokens in 4 steps 2 or 3 a step, 2.5 on average, at places chosen at random."""
    for sampler in ("ancestral", "confidence"):
        _, rows = drawn(Stub(always(0.2, 0.3, 0.5), 11), 4000, steps=4, sampler=sampler)
        left = torch.stack([(row == THREE.mask_id).sum(1) for row in rows])
        filled = left[:-1] - left[1:]
        assert len(filled) == 4 and not left[-1].any()
        assert set(filled.unique().tolist()) == {2, 3}
        if sampler == "ancestral":
            assert (filled.double().mean(1) - 2.5).abs().max() < 4 * 0.5 / 4000**0.5
            for before, after in zip(rows, rows[1:]):
                new = (before != after).sum(0).double()
                assert scipy.stats.chisquare(new).pvalue > 0.001


@pytest.mark.parametrize("temperature, top_p, expected", [
    (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]), (0.5, 1.0, [0.25, 0.09, 0.0225, 0.0025]),
    (1.0, 0.7, [0.5, 0.3, 0, 0]), (1.0, 0.81, [0.5, 0.3, 0.15, 0]), (1.0, 0.1, [1, 0, 0, 0]),
    (1e-300, 1.0, [1, 0, 0, 0]), (0.0, 1.0, [1, 0, 0, 0]), (1e300, 1.0, [1, 1, 1, 1])])
def test_temperature_and_top_p_change_the_distribution_as_they_say(temperature, top_p, expected):
    order = torch.tensor([2, 0, 3, 1])  # not sorted
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log()[order]
    uniform = (torch.arange(10_000) + 0.5).double() / 10_000
    index, p = draw(logits.expand(10_000, 4), uniform, temperature, top_p)
    share = torch.bincount(index, minlength=4)[order.argsort()] / 10_000
    expected = torch.tensor(expected).double()
    assert torch.allclose(share.double(), expected / expected.sum(), atol=2e-4)
    assert torch.allclose(p, logits.exp()[index]), "confidence is that of the model"


def test_tokens_rarer_than_float32_can_tell_are_drawn(monkeypatch):
    logits = torch.tensor([0.0, math.log(1e-12)], dtype=torch.float64).expand(2, 2)
    index, _ = draw(logits, torch.tensor([1 - 2e-12, 1 - 5e-13], dtype=torch.float64))
    assert index.tolist() == [0, 1]
    given = []
    monkeypatch.setattr("lib.generate.draw", lambda *args: given.append(args) or draw(*args))
    drawn(Stub(always(0.5, 0.5), 3), 1)
    assert {t.dtype for args in given for t in args[:2]} == {torch.float64}


def test_every_pass_draws_anew():
    """Not the same number for a place of the row in every block, or in every step."""
    ids, _ = drawn(Stub(always(0.2, 0.3, 0.5), 4), 2000, steps=1, block_tokens=1, length=4)
    pairs = torch.bincount(ids[:, 2] * 3 + ids[:, 3], minlength=9)
    p = torch.tensor([0.2, 0.3, 0.5])
    assert scipy.stats.chisquare(pairs, 2000 * torch.outer(p, p).flatten()).pvalue > 0.001
    ids, _ = drawn(Stub(always(0.2, 0.3, 0.5), 11), 200, steps=10, sampler="confidence")
    assert (ids == 2).float().mean() > 0.9, "what was not kept may be the likeliest next time"


def test_confidence_keeps_the_likeliest_tokens_first():
    best = torch.tensor([0.5, 0.9, 0.6, 0.8, 0.7])

    def p(ids, positions):
        sure = best[positions - 1]
        return torch.stack((sure, 1 - sure), dim=-1)
    _, rows = drawn(Stub(p, 6), 2, steps=5, sampler="confidence", temperature=0)
    order = [int((before != after)[0].nonzero()) for before, after in zip(rows, rows[1:])]
    assert order == [1, 3, 4, 2, 0]


def test_temperature_0_is_the_same_for_every_seed():
    model = Stub(conditionals, 4)
    texts = [drawn(model, 2, steps=2, sampler="confidence", temperature=0, seed=seed)[0]
             for seed in range(3)]
    assert all(text.equal(texts[0]) for text in texts) and texts[0][0].equal(texts[0][1])


# ---- prompts, marks, blocks -------------------------------------------------------------

MODELS = {
    "strict": dict(arch="concept", bottleneck="strict", n_concept=8, concept_dim=32),
    "open": dict(arch="concept", n_concept=8, concept_dim=32),
    "documents": dict(arch="concept", n_concept=8, concept_dim=32, isolate_documents=True),
    "transformer": dict(arch="transformer", copy_head=True, n_register=2),
}


def small(name):
    torch.manual_seed(0)
    shape = dict(vocab_size=BYTE.vocab_size, block_size=32, n_layer=1, n_head=2, token_dim=32,
                 ffn_dim=32, mask_id=BYTE.mask_id, eot_id=BYTE.eot_id)
    return build_model(shape | MODELS[name]).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampling", [
    Sampling(steps=7, top_p=0.9), Sampling(steps=7, sampler="confidence"),
    Sampling(steps=3, block_tokens=6)], ids=str)
def test_a_prompt_stays_and_no_special_id_is_drawn(name, sampling):
    prompt = "Z\u00fcrich \U0001f600 [MASK]\u0301 "
    first, last = prompt.encode().split(b"[MASK]")
    for sample in generate(small(name), BYTE, prompt, 5, 10, sampling):
        ids = sample.text.encode("utf-8", "surrogatepass")
        assert ids.startswith(first) and last in ids
        assert len(sample.ids) <= 11 and not BYTE.is_special[sample.ids].any()


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_is_the_same_in_any_batch(name):
    model = small(name)
    for sampler in ("ancestral", "confidence"):
        sampling = Sampling(sampler, steps=9, seed=3)
        alone = list(generate(model, BYTE, "The", 3, sampling=sampling, batch_tokens=1))
        together = list(generate(model, BYTE, "The", 7, sampling=sampling))
        assert together[:3] == alone and len({sample.text for sample in together}) == 7
        other, = generate(model, BYTE, "The", sampling=Sampling(sampler, steps=9, seed=4))
        assert other.text != alone[0].text


def ending(ids, positions):
    """Id 0 everywhere, and 259, the mark of BYTE, at place 5."""
    p = torch.zeros(*positions.shape, BYTE.vocab_size)
    p[..., 48] = 1.0
    return torch.where((positions == 5)[..., None], p.roll(BYTE.eot_id - 48, -1), p)


def test_a_text_ends_where_the_mark_is_drawn_and_never_in_the_prompt():
    model = Stub(ending, 20, BYTE)
    sample, = generate(model, BYTE)
    assert (sample.text, sample.ids) == ("0000", [48] * 4)
    sample, = generate(model, BYTE, sampling=Sampling(steps=3, block_tokens=3))
    assert (sample.text, sample.steps) == ("0000", 6), "the blocks behind it are not generated"
    sample, = generate(model, BYTE, "ab[MASK]d[MASK]f")
    assert sample.text[:4] == "ab0d" and sample.text[5:] == "f" and len(sample.ids) == 2
    assert sample.ids[1] not in (48, BYTE.eot_id), "something else at place 5"
    sample, = generate(model, BYTE, "abcd")
    assert (sample.text, sample.ids) == ("abcd", []), "a text may end at once"


def test_masks_of_a_prompt_are_filled_in_the_row_of_fill_and_continued_on_request():
    model = Stub(always(*[1 / 256] * 256), 20, BYTE)
    sample, = generate(model, BYTE, "a[MASK]c")
    assert model.rows[0].tolist() == [[BYTE.eot_id, 97, BYTE.mask_id, 99, BYTE.eot_id]]
    assert len(sample.ids) == 1
    sample, = generate(model, BYTE, "a[MASK]c", length=4)
    assert len(sample.ids) == 5 and model.rows[-1].shape[1] == 8


def test_blocks_are_filled_from_left_to_right_and_the_row_slides():
    model = Stub(always(*[1 / 256] * 256), 12, BYTE)
    rows = []
    sample, = generate(model, BYTE, "ab[MASK]", length=21, watch=lambda x: rows.append(x[0] + 0),
                       sampling=Sampling(steps=3, block_tokens=5))
    assert len(sample.ids) == 22
    ends = [4, 9, 14, 19, 24, 25]  # of the prompt with its mark, then of each block
    for row in rows:
        masked = (row == BYTE.mask_id).nonzero()[:, 0]
        if len(masked):
            block = next(end for end in ends if masked[0] < end)
            assert (row[block:] == BYTE.mask_id).all(), "nothing beyond the first block with masks"
    assert [row.shape[1] for row in model.rows] == [4] + [9] * 3 + [12] * 10
    last = model.rows[-1][0]
    assert last.tolist() == [*rows[-1].tolist()[13:24], BYTE.mask_id], "what precedes the token"


def test_more_steps_than_tokens_are_one_a_token():
    model = Stub(always(0.5, 0.5), 6)
    sample, = generate(model, THREE, sampling=Sampling(steps=99))
    assert sample.steps == len(model.rows) == len(sample.ids) == 5


def test_entropy_of_ids():
    assert entropy([]) == entropy([7] * 9) == 0
    assert entropy([1, 2, 3, 4] * 5) == pytest.approx(math.log(4))


# ---- mistakes ---------------------------------------------------------------------------

@pytest.mark.parametrize("settings, message", [
    (dict(steps=0), "steps=0: expected 1 forward pass"), (dict(top_p=0.0), "top_p=0.0: expected"),
    (dict(top_p=1.01), "top_p=1.01"), (dict(top_p=math.nan), "top_p=nan"),
    (dict(temperature=-0.1), "temperature=-0.1: expected 0"),
    (dict(temperature=math.nan), "temperature=nan"), (dict(temperature=math.inf), "inf"),
    (dict(temperature=0, top_p=0.5), "top_p=0.5 has no effect"),
    (dict(sampler="gumbel"), "sampler='gumbel': expected ancestral or confidence"),
    (dict(block_tokens=-1), "block_tokens=-1")])
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ValueError, match="sampler='x'.*steps=-3.*temperature=-1.*top_p=2"):
        Sampling("x", -3, -1, 2)


@pytest.mark.parametrize("text, length, block_tokens, message", [
    ("", 12, 0, "0 tokens of prompt the model's row of 12 has room for 11; --length=11, or "
                "--block_tokens=3"),
    ("ab", 10, 0, "2 tokens of prompt .* room for 9"), ("", -1, 0, "length=-1: expected"),
    ("", 10**9, 4, "up to 1,048,576"), ("a" * 12, 0, 0, "has 12 tokens"),
    ("a" * 11, 0, 0, "row of 12 has to hold them, a mark before them and what follows; shorten"),
    ("a" * 11, 0, 4, "has 11 tokens"), ("a" * 12, 5, 4, "has 12 tokens"),
    ("[MASK]" * 11, 0, 0, "has 11 tokens"), ("", 5, 12, "block_tokens=12: .* --block_tokens=3"),
    ("a[MASK]", 0, 4, "block_tokens=4 has no effect .* --length=N continues it")])
def test_what_does_not_fit_into_the_row_is_refused(text, length, block_tokens, message):
    with pytest.raises(ValueError, match=message):
        plan_text(text, length, BYTE, 12, block_tokens)


def test_what_just_fits_is_generated():
    assert len(plan_text("a" * 10, 0, BYTE, 12).row) == 12
    assert len(plan_text("[MASK]" * 10, 0, BYTE, 12).row) == 12
    assert plan_text("a" * 11, 5, BYTE, 12, 4).ends == [16, 17]


def test_broken_weights_are_named():
    with pytest.raises(ValueError, match="NaN or infinity"):
        list(generate(Stub(always(math.nan, 1.0), 4), THREE))
