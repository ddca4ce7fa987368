"""ConceptEncoder and Transformer: sizes, the bottleneck, no leaks, known killers."""

import math
from dataclasses import fields
from pathlib import Path
from runpy import run_path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configurator import read_settings
from lib.baselines import TransformerConfig
from lib.health import attention_weights
from lib.kernels import HIDDEN
from lib.resonance import Resonance
from lib.settings import ARCHS
from model import Anchors, Attention, ConceptConfig, ConceptEncoder, OwnedAttention, attend

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
MASK, EOT, V = 90, 91, 92


def small(arch="concept", **changes):
    cfg = dict(
        vocab_size=V,
        block_size=32,
        n_layer=2,
        n_head=4,
        token_dim=64,
        ffn_dim=96,
        mask_id=MASK,
        eot_id=EOT,
    )
    torch.manual_seed(0)
    if arch != "concept":
        config_class, model_class = ARCHS[arch]
        return model_class(config_class(**{**cfg, **changes})).eval()
    return ConceptEncoder(
        ConceptConfig(**{**cfg, "n_concept": 8, "concept_dim": 64, **changes})
    ).eval()


def batch(B=3, T=24, K=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, MASK, (B, T), generator=g)
    positions = torch.rand(B, T, generator=g).argsort(1)[:, :K].sort(1).values
    return ids.scatter(1, positions, MASK), positions, ids.gather(1, positions), torch.ones(B, K)


VARIANTS = [
    dict(bottleneck="strict"),
    dict(bottleneck="open"),
    dict(bottleneck="strict", token_dim=4),
    dict(bottleneck="open", token_dim=4, concept_dim=128),
    dict(bottleneck="open", token_dim=128),
    dict(bottleneck="strict", position="sinusoidal", token_dim=96),
    dict(bottleneck="open", hide_masked=True),
    dict(bottleneck="open", isolate_documents=True),
    dict(bottleneck="strict", isolate_documents=True),
    dict(bottleneck="strict", anchored=False),
    dict(bottleneck="open", anchored=True),
    dict(bottleneck="open", bias=True, n_decoder=2, n_mixer=1, mixer_kernel=3),
    dict(bottleneck="open", lexicon=False),
    dict(bottleneck="open", self_attention=True, n_concept=7),
    dict(bottleneck="open", n_head=1, hide_masked=True, n_layer=1),
    dict(arch="transformer"),
    dict(arch="transformer", n_register=5, bias=True),
    dict(arch="transformer", isolate_documents=True, n_mixer=0),
    dict(arch="transformer", n_layer=1),
    dict(arch="transformer", copy_head=True, n_register=2),
    dict(bottleneck="open", time_input=True),
    dict(arch="transformer", time_input=True, n_layer=1),
    dict(arch="transformer", local_window=4, global_every=2, qk_norm=False, bert_head=True),
    dict(arch="transformer", mntp=True, n_layer=1),
    dict(arch="resonance", n_frequency=4, n_mixer=0),
    dict(arch="resonance", n_frequency=4, mixers="ra", n_layer=3),
    dict(bottleneck="open", resonant_mixers=True, n_frequency=4),
]
variants = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items())
)
both = pytest.mark.parametrize("bottleneck", ["strict", "open"])


# ---- sizes --------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, n_params",
    [
        ("micro_balanced", 37_205_504),
        ("micro_concept_focused", 33_666_720),
        ("micro_efficient", 30_228_800),
        ("micro_wide", 44_956_160),
    ],
)
def test_micro_presets_have_the_protocols_parameter_counts(preset, n_params):
    settings = run_path(ROOT / "config" / f"{preset}.py")
    settings = {f.name: settings[f.name] for f in fields(ConceptConfig) if f.name in settings}
    with torch.device("meta"):
        model = ConceptEncoder(ConceptConfig(**settings))
    assert model.num_params() == n_params


@pytest.mark.parametrize(
    "token_dim, concept_dim", [(4, 1024), (16, 256), (64, 128), (1024, 256), (256, 256), (6, 8)]
)
def test_any_token_and_concept_width_trains(token_dim, concept_dim):
    model = small(token_dim=token_dim, concept_dim=concept_dim, n_layer=1, ffn_dim=32)
    loss = model(*batch())
    loss.backward()
    assert math.isfinite(loss.item()) and model.wte.grad.abs().sum() > 0


@variants
def test_a_model_converted_to_bfloat16_gives_the_same_loss(variant):
    full, half = small(**variant)(*batch()), small(**variant).bfloat16()(*batch())
    assert abs(half / full - 1) < 0.02


@variants
def test_first_loss_is_ln_vocabulary(variant):
    loss = small(**variant)(*batch(B=32))
    assert abs(loss / math.log(V) - 1) < 0.1


@variants
def test_every_parameter_gets_a_gradient(variant):
    model = small(**variant)
    model(*batch()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


LONG = [dict(bottleneck=bottleneck, anchored=True, self_attention=bottleneck == "open",
             n_concept=132, block_size=330) for bottleneck in ("strict", "open")]


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if "isolate_documents" not in v] + LONG, ids=str)
def test_flops_agree_with_the_flop_counter(variant):
    """Forward, attention as matrix products; within 1 %. isolate_documents masks them."""
    wide = dict(token_dim=128) if "arch" in variant else dict(concept_dim=128, token_dim=128)
    model = small(**{**wide, **variant})
    B, T, K = 2, model.cfg.block_size, 8
    model.requires_grad_(False)  # the loss computes its gradients as it goes
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*batch(B, T, K))
    transforms = sum(2 * B * module.transform_flops(T, B) for module in model.modules()
                     if isinstance(module, Resonance))  # which the counter does not know
    counted = counter.get_total_flops() + transforms
    assert abs(3 * counted / (model.flops_per_token(T, K, B) * B * T) - 1) < 0.01


# ---- places of concepts ---------------------------------------------------------


def test_scores_of_local_heads_fall_with_the_distance():
    """Anchor of concept c at (c + 1/2) T / C, distances in strides T / C; written with loops."""
    cfg = dict(bottleneck="strict", block_size=24, n_concept=8, n_head=8, local_heads=0.75)
    model, ids = small(**cfg), torch.zeros(2, 24).long()
    anchors, everywhere = model.anchors(ids, None, None), torch.arange(24)[None]
    reading, decoding = anchors.reading(24, None), anchors.decoding(everywhere, None)
    among = anchors.among_concepts(None).bias(8)[0]
    slopes, offsets = (4, 4, 4, 2, 2, 4 / 3, 0, 0), (0, -0.5, 0.5, -1, 1, -1.5, 0, 0)
    for head, (slope, offset) in enumerate(zip(slopes, offsets)):
        for c in range(8):
            for t in range(24):
                far = abs((c + 0.5 + offset) * 3 - t) / 3
                wanted = HIDDEN if far > 6 and slope else -slope * far
                assert reading.bias(8)[0][0, head, c, t].item() == pytest.approx(wanted, abs=1e-5)
                far = abs((c + 0.5) * 3 - t) / 3  # in decoding all heads look straight ahead
                wanted = 0 if not slope else HIDDEN if far > 6 else -4 * far
                assert decoding.bias(8)[0][0, head, t, c].item() == pytest.approx(wanted, abs=1e-5)
            for other in range(8):
                far = abs(c + offset - other)
                wanted = HIDDEN if far > 6 and slope else -slope * far
                assert among[0, head, c, other].item() == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("n_concept, padded", [(160, False), (160, True), (149, True)])
@both
def test_windows_change_nothing(bottleneck, n_concept, padded, monkeypatch):
    """Local heads of long rows go through windows; reading all tokens at once gives the same."""
    model = small(bottleneck=bottleneck, n_concept=n_concept, anchored=True, hide_masked=padded,
                  self_attention=bottleneck == "open", position="sinusoidal", block_size=300,
                  max_length=640)
    ids, positions, _, _ = batch(B=2, T=640, K=9)
    real = torch.arange(640) < torch.tensor([[600], [200]]) if padded else None
    if padded:
        ids[:, 100:160] = MASK  # some concepts see nothing in their local heads
    assert Anchors.window(model.cfg, 640 / n_concept, 640, 1.0)
    assert Anchors.window(model.cfg, 640 / n_concept, n_concept, 640 / n_concept, True)
    found = logits(model, ids, positions, real)
    monkeypatch.setattr(Anchors, "window", classmethod(lambda *args, **kwargs: None))
    wanted = logits(model, ids, positions, real)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_short_rows_keep_the_stride_and_long_rows_stretch_it():
    model = small(anchored=True, position="sinusoidal", max_length=100)  # 8 concepts, 32 tokens
    ids = torch.zeros(2, 10).long()
    assert model.anchors(ids, None, None).stride_BC.tolist() == [[4.0]]
    ids = torch.zeros(2, 80).long()
    assert model.anchors(ids, None, None).stride_BC.tolist() == [[10.0]]
    real = torch.arange(80) < torch.tensor([[64], [16]])
    assert model.anchors(ids, real, None).stride_BC.tolist() == [[8.0], [4.0]]


def test_padding_of_a_row_beyond_block_size_changes_nothing():
    model = small(anchored=True, position="sinusoidal", max_length=100)
    ids, positions, _, _ = batch(T=40)
    real = torch.arange(60).expand(3, -1) < 40
    padded = logits(model, F.pad(ids, (0, 20), value=7), positions, real)
    assert torch.allclose(logits(model, ids, positions), padded, atol=1e-5)


def test_concepts_of_an_isolated_document_stand_in_it():
    model = small(bottleneck="strict", isolate_documents=True, n_concept=7)
    ids = torch.zeros(1, 30).long().index_fill_(1, torch.tensor([9, 19]), EOT)
    place = model.anchors(ids, None, model.documents(ids)).place_BC[0]
    for c in range(7):
        assert 10 * (c % 3) < place[c] < 10 * (c % 3) + 10 + 32 / 7


@pytest.mark.parametrize("variant", [
    dict(bottleneck="strict"), dict(anchored=True, self_attention=True),
    dict(anchored=True, lexicon=False), dict(bottleneck="strict", isolate_documents=True)], ids=str)
def test_concepts_behind_the_end_of_a_text_are_read_by_nobody(variant):
    """8 concepts, 4 tokens apart, texts of 10 tokens and of 5, padded or not."""
    model = small(n_concept=8, **variant)
    ids, positions, targets, weights = batch(B=2, T=10, K=3)
    real = torch.arange(32) < torch.tensor([[10], [5]])
    for row, mask, n in ((ids, None, 3), (F.pad(ids, (0, 22)), real, 3), (ids[:, :5], None, 2)):
        model.zero_grad()
        model(row, positions % row.shape[1], targets, weights, attention_mask=mask).backward()
        moved = model.concepts.grad.abs().sum(1) > 0
        owns = model.lexicon is not None  # words, of which the logits are made
        assert moved[:n].all() and moved[n:].all() == owns and moved[n:].any() == owns
        standing = model.standing(row, mask).sum(1).tolist()
        assert standing == [n, n if mask is None else 2]


def test_short_rows_cost_less():
    """Concepts that cannot stand in rows of their length are not computed."""
    model = small(bottleneck="strict", n_concept=16, concept_dim=128, token_dim=128)
    model.requires_grad_(False)
    for T in (5, 32):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(*batch(2, T, 4))
        wanted = model.flops_per_token(T, 4, 2) * 2 * T
        assert 3 * counter.get_total_flops() == pytest.approx(wanted, rel=0.01)
    assert model.n_standing(5) == 3 and model.n_standing(32) == model.n_standing(40) == 16


@torch.no_grad()
def test_concepts_behind_the_end_of_a_text_do_not_count():
    """8 concepts, 4 tokens apart: in a text of 10 tokens three of them stand."""
    model, (ids, *_) = small(bottleneck="strict", n_concept=8), batch(B=2, T=10, K=1)
    standing = model.standing(ids)
    assert standing.tolist() == [[True] * 3 + [False] * 5] * 2
    concepts = model.encode(ids)[0]
    wanted = concepts[:, :3].mean(1)
    assert torch.allclose(model.pooled(concepts, ids), wanted, atol=1e-6)
    padded, real = F.pad(ids, (0, 20), value=7), (torch.arange(30) < 10).expand(2, -1)
    assert torch.equal(model.standing(padded, real), standing)
    found = model.pooled(model.encode(padded, real)[0], padded, real)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert model.standing(ids, torch.zeros(2, 10)).tolist() == [[True] + [False] * 7] * 2
    model = small(bottleneck="open")
    concepts = model.encode(ids)[0]
    assert model.standing(ids).all() and torch.equal(model.pooled(concepts, ids), concepts.amax(1))


@pytest.mark.parametrize("n_concept", [64, 5, 1])
@both
def test_any_number_of_concepts_and_length_of_rows_has_anchors(bottleneck, n_concept):
    """More concepts than tokens, one, an odd stride; rows shorter than a stride; all padding."""
    model = small(bottleneck=bottleneck, anchored=True, n_concept=n_concept)
    for T in (1, 2, 32):
        ids, positions, _, _ = batch(T=T, K=1)
        real = torch.arange(T).expand(3, -1) < torch.tensor([[T], [0], [1]])
        assert logits(model, ids, positions).isfinite().all()
        assert logits(model, ids, positions, real).isfinite().all()


@pytest.mark.parametrize("wrong, word", [
    (dict(anchor_slope=0.0), "anchor_slope"), (dict(local_heads=0.0), "local_heads"),
    (dict(local_heads=1.5), "local_heads")])
def test_impossible_anchors_are_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        small(**wrong)


# ---- what may reach what --------------------------------------------------------


def logits(model, ids, positions, attention_mask=None):
    concepts, tokens = model.encode(ids, attention_mask)
    documents = model.documents(ids, attention_mask)
    return model.logits(model.decode(concepts, tokens, positions, documents, attention_mask))


@variants
def test_masks_of_a_row_get_different_predictions(variant):
    """The decode query holds the position: without it all masks of a row get one prediction."""
    model = small(**variant)
    ids = torch.arange(16)[None].index_fill(1, torch.tensor([3, 11]), MASK)
    out = logits(model, ids, torch.tensor([[3, 11]]))[0]
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_strict_decodes_from_concepts_alone():
    """Everything a token says about another position goes through the concepts."""
    model, (ids, positions, _, _) = small(bottleneck="strict"), batch()
    concepts, tokens = model.encode(ids)
    assert torch.equal(
        model.decode(concepts, tokens, positions), model.decode(concepts, tokens * 0, positions)
    )
    other, _ = model.encode(ids.roll(1, 0))
    assert not torch.allclose(
        model.decode(concepts, tokens, positions), model.decode(other, tokens, positions)
    )


def test_open_sees_distant_tokens_only_through_concepts():
    model, (ids, *_) = small(bottleneck="open"), batch(T=32)
    changed = ids.clone()
    changed[:, 31] = (changed[:, 31] + 1) % MASK
    (c1, t1), (c2, t2) = model.encode(ids), model.encode(changed)
    reach = 2 * (model.cfg.mixer_kernel // 2)
    assert torch.equal(t1[:, : 31 - reach], t2[:, : 31 - reach])
    assert not torch.equal(t1[:, 31 - reach :], t2[:, 31 - reach :])
    near_start = torch.zeros(len(ids), 1, dtype=torch.long)
    assert torch.equal(model.decode(c1, t1, near_start), model.decode(c1, t2, near_start))
    assert not torch.equal(model.decode(c1, t1, near_start), model.decode(c2, t2, near_start))


@variants
def test_the_answer_does_not_leak_into_the_encoder(variant):
    """Targets enter the loss and nothing else."""
    model, (ids, positions, targets, weights) = small(**variant), batch(B=1, K=1)
    a = logits(model, ids, positions)
    b = logits(model, ids, positions)
    assert torch.equal(a, b)
    spoiled = ids.clone().scatter(1, positions, targets)
    assert not torch.allclose(a, logits(model, spoiled, positions)), (
        "the test would not notice a leak"
    )
    loss = [model(ids, positions, torch.full_like(targets, t), weights).item() for t in (1, 2)]
    by_hand = [F.cross_entropy(a[0], torch.tensor([t])).item() for t in (1, 2)]
    assert loss == pytest.approx(by_hand, abs=1e-5), "the targets enter the loss and nothing else"


@variants
def test_padding_changes_nothing(variant):
    model, (ids, positions, _, _) = small(**variant), batch(T=16)
    padded = F.pad(ids, (0, 9), value=7)
    real = torch.arange(25).expand(3, -1) < 16
    assert torch.allclose(
        logits(model, ids, positions), logits(model, padded, positions, real), atol=1e-5
    )
    assert torch.allclose(
        logits(model, ids, positions), logits(model, padded, positions, real.long()), atol=1e-5
    )
    assert not torch.allclose(
        logits(model, ids, positions), logits(model, padded, positions), atol=1e-3
    )
    ids, padded = ids.fill_(MASK), padded.index_fill_(1, torch.arange(16), MASK)
    hidden = logits(model, ids, positions)
    assert torch.allclose(hidden, logits(model, padded, positions, real), atol=1e-5), (
        "nor where all else is hidden"
    )


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "isolate_documents" in v], ids=str)
def test_padding_behind_the_end_of_a_document_is_no_document(variant):
    model, (ids, positions, _, _) = small(**variant), batch(T=16)
    ids[:, -1] = EOT
    padded, real = F.pad(ids, (0, 9), value=7), torch.arange(25).expand(3, -1) < 16
    assert torch.allclose(
        logits(model, ids, positions), logits(model, padded, positions, real), atol=1e-5
    )


@variants
def test_rows_do_not_see_each_other(variant):
    model, (ids, positions, _, _) = small(**variant), batch()
    alone = torch.cat([logits(model, ids[i : i + 1], positions[i : i + 1]) for i in range(3)])
    assert torch.allclose(logits(model, ids, positions), alone, atol=1e-5)


@variants
def test_hidden_and_padded_rows_stay_finite(variant):
    model = small(**variant)
    for ids in (torch.full((2, 8), MASK), torch.full((2, 8), EOT)):
        for real in (None, torch.zeros(2, 8, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)):
            out = logits(model, ids, torch.tensor([[0, 7]] * 2), real)
            out.sum().backward()
            assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "kind",
    [VARIANTS[0], dict(bottleneck="open", lexicon=False), dict(arch="transformer", n_mixer=1)],
    ids=str,
)
def test_isolated_documents_do_not_see_each_other(kind):
    model = small(**kind, isolate_documents=True)
    ids = torch.randint(0, MASK, (2, 32), generator=torch.Generator().manual_seed(0))
    ids[:, [9, 20, 31]] = EOT
    positions = torch.tensor([[12, 15, 19]] * 2)
    before = logits(model, ids, positions)
    for other in (slice(0, 9), slice(21, 31)):
        changed = ids.clone()
        changed[:, other] = (changed[:, other] + 1) % MASK
        assert torch.allclose(before, logits(model, changed, positions), atol=1e-6)
    changed = ids.clone()
    changed[:, 11] = (changed[:, 11] + 1) % MASK
    assert not torch.allclose(before, logits(model, changed, positions), atol=1e-4)
    open_model = small(**kind)
    open_model.load_state_dict(model.state_dict())
    changed[:, 0] = (ids[:, 0] + 1) % MASK
    assert not torch.equal(
        logits(open_model, ids, positions), logits(open_model, changed, positions)
    )


def test_isolation_cannot_be_forgotten_when_decoding():
    model, (ids, positions, _, _) = small(isolate_documents=True), batch()
    with pytest.raises(ValueError, match="decode needs documents"):
        model.decode(*model.encode(ids), positions)


@both
def test_hide_masked_makes_masked_tokens_unreadable(bottleneck):
    """Changing the embedding of [MASK] changes no concept."""
    model = (
        small(bottleneck=bottleneck, hide_masked=True, n_mixer=0)
        if bottleneck == "open"
        else small(bottleneck=bottleneck, hide_masked=True)
    )
    ids, *_ = batch()
    read_mask, _ = model.masks(ids, None, None)
    assert torch.equal(read_mask[:, 0, 0], ids != MASK)
    with torch.no_grad():
        concepts, _ = model.encode(ids)
        model.wte[MASK] += 1
        assert torch.allclose(concepts, model.encode(ids)[0], atol=1e-6)


def test_defaults_of_train_are_those_of_the_models():
    """Each default has one value, so that a model made in Python is the one train.py makes."""
    settings = {name: default for name, (default, _) in read_settings(ROOT / "train.py").items()}
    made = small(mask_id=MASK).cfg
    # "auto" in train.py
    anchored = small(bottleneck="strict").cfg
    assert made.hide_masked and not made.anchored and not ConceptConfig().hide_masked
    assert anchored.anchored and not anchored.hide_masked
    assert settings["anchored"] == settings["hide_masked"] == "auto"
    # taken from the data or explained above
    recipe = {"vocab_size", "block_size", "hide_masked", "anchored"}
    for config in (ConceptConfig, TransformerConfig):
        shape = {f.name: f.default for f in fields(config) if f.name in settings.keys() - recipe}
        differ = {n: (v, settings[n]) for n, v in shape.items() if v != settings[n]}
        assert not differ


# ---- arithmetic -------------------------------------------------------------------


def test_attention_agrees_with_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, generator=g) for n in (3, 5, 5))
    mask = torch.rand(2, 1, 3, 5, generator=g) < 0.7
    mask[..., 0] = True
    out = attend(q, k, v, 3, mask)
    for b in range(2):
        for head in range(3):
            s = slice(4 * head, 4 * head + 4)
            for i in range(3):
                a, keys = q[b, i, s], k[b, :, s]
                a, keys = (
                    a / a.pow(2).mean().sqrt(),
                    keys / keys.pow(2).mean(-1, keepdim=True).sqrt(),
                )
                score = (keys @ a / 2).masked_fill(~mask[b, 0, i], -math.inf)
                assert torch.allclose(out[b, i, s], score.softmax(0) @ v[b, :, s], atol=1e-5)


@both
def test_loss_is_the_weighted_mean_and_adds_up_over_micro_batches(bottleneck):
    model, (ids, positions, targets, weights) = small(bottleneck=bottleneck), batch(B=4)
    weights[0, 3:] = 0
    weights[2] = 0
    logp = logits(model, ids, positions).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    whole = model(ids, positions, targets, weights)
    assert torch.allclose(whole, -(logp * weights).sum() / weights.sum(), atol=1e-6)
    parts = [
        model(*(t[i : i + 1] for t in (ids, positions, targets, weights)), weights.sum())
        for i in range(4)
    ]
    assert torch.allclose(whole, sum(parts), atol=1e-6)
    assert model(ids, positions, targets, weights * 0) == 0, (
        "nothing to predict is a loss of zero, not NaN"
    )


@pytest.mark.parametrize("variant", [
    VARIANTS[0], dict(bottleneck="open", isolate_documents=True),
    dict(bottleneck="open", token_dim=4, concept_dim=128, bias=True, n_decoder=2, n_mixer=1,
         mixer_kernel=3, self_attention=True, n_concept=7)], ids=str)
def test_compiles_as_one_graph(variant):
    # aot_eager also traces the backward pass, which takes far longer: one layer of one variant is
    # enough
    backend, n_layer = ("aot_eager", 1) if variant == VARIANTS[0] else ("eager", 2)
    model, args = small(**variant, n_layer=n_layer), batch()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.allclose(model(*args), compiled(*args), atol=1e-5)


def test_concepts_start_apart():
    concepts = small(n_concept=16).concepts
    cosine = F.cosine_similarity(concepts[:, None], concepts[None], dim=-1)[
        ~torch.eye(16, dtype=torch.bool)
    ]
    assert cosine.abs().max() < 0.6 and 0.9 < concepts.std() < 1.1


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(n_head=5), "does not divide"),
        (dict(bottleneck="wide"), "'open' or 'strict'"),
        (dict(token_dim=3), "4 or more"),
        (dict(mixer_kernel=4), "odd"),
        (dict(dropout=1.0), "below 1"),
        (dict(position="rope"), "learned"),
        (dict(hide_masked=True, mask_id=-1), "mask_id"),
        (dict(isolate_documents=True, eot_id=V), "eot_id"),
        (dict(n_layer=0), "1 or more"),
        (dict(position="sinusoidal", token_dim=65), "even"),
        (dict(max_length=64), "position='sinusoidal'"),
        (dict(position="sinusoidal", max_length=31), "max_length=31"),
    ],
)
def test_impossible_shapes_are_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        small(**wrong)


@both
def test_rows_longer_than_block_size_are_refused(bottleneck):
    with pytest.raises(ValueError, match="33 tokens is longer than block_size=32"):
        small(bottleneck=bottleneck).encode(torch.zeros(1, 33, dtype=torch.long))


@both
def test_sinusoidal_rows_reach_max_length_and_training_shifts_them(bottleneck):
    model, (ids, *others) = (
        small(bottleneck=bottleneck, position="sinusoidal", max_length=200),
        batch(),
    )
    assert "wpe" not in model.state_dict()
    longer = torch.cat([ids] * 8, dim=1)
    assert torch.isfinite(model(longer, *others))
    with pytest.raises(ValueError, match="201 tokens is longer than max_length=200"):
        model.encode(torch.zeros(1, 201, dtype=torch.long))
    assert model(ids, *others) == model(ids, *others), "no shifts outside training"
    torch.manual_seed(0)
    model.train().requires_grad_(False)
    starts = {int(model.random_offset(24)) for _ in range(2000)}
    assert min(starts) == 0 and max(starts) == 176 and model.random_offset(200) == 0
    assert len({model(ids, *others).item() for _ in range(8)}) > 1
    # the codes of far positions are the sines and cosines of the formula
    d, far = 64, torch.tensor([5, 150])
    angle = far[:, None] * 10_000.0 ** (-torch.arange(0, d, 2) / d)
    code = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
    assert torch.allclose(F.normalize(model.position_codes(far)), F.normalize(code), atol=1e-5)


@both
def test_a_row_of_131072_tokens_trains(bottleneck):
    T = 131072
    model = small(
        bottleneck=bottleneck, position="sinusoidal", block_size=T, n_layer=1, n_head=1
    ).train()
    g = torch.Generator().manual_seed(0)
    ids, positions = torch.randint(0, MASK, (1, T), generator=g), torch.arange(0, T, 2048)[None]
    with torch.autocast("cpu", torch.bfloat16):
        model(
            ids.scatter(1, positions, MASK), positions, ids.gather(1, positions), torch.ones(1, 64)
        ).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", [VARIANTS[0], VARIANTS[1], dict(arch="transformer")], ids=str)
def test_learns_a_repeated_token_from_afar(kind):
    """The masked copy is far from all others, so the concepts must carry the word."""
    model = small(**kind, block_size=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        word = torch.randint(0, 40, (16, 1), generator=g)
        ids = torch.full((16, 32), 50).scatter(
            1, torch.tensor([[0, 2, 5]]).expand(16, -1), word.expand(-1, 3)
        )
        ids[:, 30] = MASK
        loss = model(ids, torch.full((16, 1), 30), word, torch.ones(16, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 < math.log(40)


def test_lexicon_logits_agree_with_the_formulas_word_by_word():
    """Word v belongs to concept v % C; its weight grows with its rank."""
    model, (ids, positions, *_) = small(hide_masked=True), batch()
    table, C, lexicon = model.wte.detach(), 8, model.lexicon
    with torch.no_grad():
        lexicon.gate.normal_(), lexicon.token_weight.normal_()
        concepts, tokens = model.encode(ids)
        states = model.decode(concepts, tokens, positions)
        whole, x = model.logits(states), F.layer_norm(tokens, (64,))
        context = F.normalize(x @ lexicon.context.weight.T, dim=-1)
        for b, k, word in ((0, 0, 5), (2, 4, 90), (1, 3, 17)):
            concept, own = concepts[b, word % C], (ids[b] % C == word % C) & (ids[b] != MASK)
            share = torch.where(own, (x[b] @ lexicon.token_weight).exp(), 0)
            memory = share @ context[b] / share.sum() if own.any() else torch.zeros(16)
            assert torch.allclose(concept[48:], 4 * memory, atol=1e-5)
            query = F.layer_norm(lexicon.to_words.weight @ concept[:48], (64,)) * 2
            score = table[word] @ query - (table[word % C :: C] @ query).sum() / math.ceil(V / C)
            id_weight = math.log(word + 2) / (sum(math.log(v + 2) for v in range(V)) / V)
            gate = 2 / (1 + math.exp(-float(states[b, k] @ lexicon.gate)))
            gate += math.exp(8 * (float(context[b, positions[b, k]] @ memory) - 1))
            added = gate * math.log1p(math.exp(float(score) - 1)) * id_weight
            assert whole[b, k, word].item() == pytest.approx(
                float(states[b, k] @ table[word]) + added, abs=1e-4
            )


def test_the_gate_is_largest_for_the_concept_whose_context_matches():
    """Untrained: a hidden word has the neighbours of a visible one, whose owner gains."""
    model = small(n_concept=32, hide_masked=True)
    ids = torch.randint(0, 60, (1, 32), generator=torch.Generator().manual_seed(1))
    ids[0, 5:10] = torch.tensor([61, 62, 63, 64, 65])
    ids[0, 20:25] = torch.tensor([61, 62, MASK, 64, 65])
    concepts, tokens = model.encode(ids)
    _, gate_11C = model.decode(concepts, tokens, torch.tensor([[22]])).lexicon_state
    assert gate_11C[0, 0].argmax() == 63 % 32


def test_logits_of_a_lexicon_never_forget_the_concepts():
    """States that lost what the lexicon knows of the row are refused."""
    model, (ids, positions, *_) = small(), batch()
    states = model.decode(*model.encode(ids), positions)
    assert model.logits(states).shape == (3, 5, V)
    for lost in (states * 1, torch.zeros(3, 5, 64), torch.cat((states, states))):
        with pytest.raises(ValueError, match="as decode returned them"):
            model.logits(lost)
    for part in (states[..., :8], states[0, 0, 0], states.split(8, -1)[0]):
        assert type(part) is torch.Tensor, "parts of a state are no states"


@pytest.mark.parametrize("variant", [dict(bottleneck="open"), dict(bottleneck="strict"),
                                     dict(arch="transformer")], ids=str)
@pytest.mark.parametrize("select", [
    lambda t: t[:, :1], lambda t: t[1:], lambda t: t[2], lambda t: t[1, 3], lambda t: t[:, -1],
    lambda t: t[[2, 0]][:, [4, 1]], lambda t: t[torch.arange(15).view(3, 5) % 2 > 0],
    lambda t: t[:, :0], lambda t: t[None], lambda t: t.split(2, 1)[2], lambda t: t.chunk(2)[1],
    lambda t: t.index_select(1, torch.tensor([3, 3])), lambda t: t.flatten(0, 1)])
def test_logits_of_selected_states_are_the_selected_logits(variant, select):
    model, (ids, positions, *_) = small(**variant), batch()
    states = model.decode(*model.encode(ids), positions)
    logits = model.logits(states)
    assert torch.allclose(model.logits(select(states)), select(logits), atol=1e-5)


def test_cast_and_detached_states_keep_their_logits_and_selected_ones_their_loss():
    model, (ids, positions, targets, weights) = small(), batch()
    states = model.decode(*model.encode(ids), positions)
    logits = model.logits(states)
    for same in (states.double().float(), states.to("cpu"), states.detach().clone(),
                 states[:, :].to(torch.float64).to(torch.float32)):
        assert torch.allclose(model.logits(same), logits, atol=1e-5)
    part = model.nats(states[:, 1:3], targets[:, 1:3], weights[:, 1:3])
    weights[:, [0, 3, 4]] = 0
    assert part.item() == pytest.approx(model.nats(states, targets, weights).item(), rel=1e-5)
    part.backward()
    assert model.lexicon.gate.grad.any() and model.concepts.grad.any()


def test_owned_heads_read_owned_words_only():
    """Agrees with dense attention under a mask; values do not depend on the neighbours."""
    read = OwnedAttention(32, 24, small().cfg, gain=2.0, normalize=True)
    x, y, words = torch.randn(2, 5, 32), torch.randn(2, 40, 24), torch.randn(2, 40, 24)
    owner, mask = (
        torch.randint(0, 4, (2, 40)),
        torch.rand(2, 1, 1, 40) < 0.8,
    )  # the fifth query owns nothing
    with torch.no_grad():
        weights, w = attention_weights(read, x, y, mask, words, owner, mask), read.kv.weight
        assert (
            torch.allclose(weights[:, :, :4].sum(-1), torch.ones(2, 4, 4))
            and (weights[:, 2:, 4] == 0).all()
        )
        owned = owner[:, None, None] == torch.arange(5)[:, None]
        assert (weights[:, 2:][~(owned & mask).expand(-1, 2, -1, -1)] == 0).all()
        assert torch.allclose(weights[:, :2].sum(-1), torch.ones(2, 2, 5))
        values = (
            torch.cat((y @ w[32:48].T, words @ w[48:].T), -1).unflatten(-1, (4, 8)).transpose(1, 2)
        )
        dense = F.rms_norm(weights @ values, (8,)).transpose(1, 2).flatten(2) @ read.out.weight.T
        assert torch.allclose(read(x, y, mask, words, owner, mask), dense, atol=1e-5)


def test_what_a_head_reads_has_the_same_size_from_many_tokens_as_from_one():
    """The mean of n unlike tokens is sqrt(n) times shorter than one; normalised it is not."""
    read = Attention(32, 32, small().cfg, gain=1.0, normalize=True)
    torch.nn.init.eye_(read.out.weight)
    x, y = torch.randn(2, 5, 32), torch.randn(2, 64, 32)
    for tokens in (y, y[:, :1]):
        size = read(x, tokens).unflatten(-1, (4, -1)).square().mean(-1)
        assert torch.allclose(size, torch.ones_like(size), atol=1e-3)


def test_a_gain_sharpens_its_own_head():
    read = Attention(32, 32, small().cfg, gain=1.0)
    with torch.no_grad():
        read.gain.copy_(torch.tensor([0.0, 1.0, 4.0, 1.0]))
    weights = attention_weights(read, torch.randn(2, 5, 32), torch.randn(2, 16, 32))
    assert torch.allclose(weights[:, 0], torch.full((2, 5, 16), 1 / 16), atol=1e-6)
    assert weights[:, 2].amax(-1).mean() > 2 * weights[:, 1].amax(-1).mean()


@pytest.mark.parametrize("reads", [False, True])
def test_concepts_see_each_other_only_by_self_attention(reads):
    model, (ids, *_) = small(self_attention=reads), batch()
    before, _ = model.encode(ids)
    with torch.no_grad():
        model.concepts[0] = torch.randn(64, generator=torch.Generator().manual_seed(5))
    changed = (model.encode(ids)[0] - before).abs().amax((0, 2)) > 1e-6
    assert changed[0] and changed[1:].all() == reads and changed[1:].any() == reads


@pytest.mark.parametrize("token_dim", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_frozen_model_says_the_same_and_forgets_it_when_trained(token_dim, dtype):
    cfg = ConceptConfig(
        vocab_size=203,
        block_size=16,
        n_layer=1,
        n_head=2,
        n_concept=4,
        concept_dim=128,
        token_dim=token_dim,
    )
    torch.manual_seed(0)
    model, ids, place = (
        ConceptEncoder(cfg).to(dtype).eval(),
        torch.arange(16)[None],
        torch.tensor([[3]]),
    )

    def logits():
        return model.logits(model.decode(*model.encode(ids), place))

    before, names = logits(), list(model.state_dict())
    assert torch.equal(model.freeze(dtype).wte, model.wte) and torch.equal(logits(), before)
    assert list(model.state_dict()) == names and model.table_cache is not None
    for thaw in (model.train, model.eval):
        model.freeze(dtype)
        thaw()
        model.wte[5:9] += 1.0
        now = logits()
        assert not torch.equal(now, before)
        model.freeze(dtype)
        assert torch.equal(logits(), now)
        before = now
