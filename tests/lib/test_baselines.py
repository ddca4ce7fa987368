"""What is special to the Transformer; test_model.py tests what both models share."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_model import EOT, V, batch, logits, small

from lib.baselines import Transformer, TransformerConfig, angles
from lib.classifier import Classifier
from model import rotate


def naive(model, ids):
    """The network written out for every position, head by head, no masks. -> (B,T,d)."""
    cfg, T = model.cfg, ids.shape[1]
    e = cfg.token_dim // cfg.n_head
    x = F.layer_norm(model.wte[ids], (cfg.token_dim,))
    for mixer in model.mixers:
        x = mixer(x)
    if cfg.n_register:
        x = torch.cat((model.registers.expand(len(ids), -1, -1), x), dim=1)
    place = torch.cat((torch.zeros(cfg.n_register), torch.arange(T))).double()
    angle = place[:, None] * 10_000.0 ** (-torch.arange(e // 2).double() * 2 / e)
    turn = torch.polar(torch.ones_like(angle), angle)  # rotary positions as complex numbers
    for layer in [*model.layers, model.last]:
        h = layer.read_norm(x)
        q, (k, v) = layer.read.q(h), layer.read.kv(h).chunk(2, dim=-1)
        heads = []
        for head in range(cfg.n_head):
            part = slice(head * e, head * e + e)
            a, b = (
                (t[..., part].double() / t[..., part].double().pow(2).mean(-1, keepdim=True).sqrt())
                for t in (q, k)
            )
            a, b = (torch.complex(t[..., : e // 2], t[..., e // 2 :]) * turn for t in (a, b))
            scores = (a[:, :, None] * b[:, None].conj()).real.sum(-1) / math.sqrt(e)
            heads.append(scores.softmax(-1).float() @ v[..., part])
        x = x + layer.read.out(torch.cat(heads, dim=-1))
        gate, value = layer.ffn.wi(layer.ffn_norm(x)).chunk(2, dim=-1)
        x = x + layer.ffn.out(F.gelu(gate) * value)
    return model.norm(x)[:, cfg.n_register :]


@pytest.mark.parametrize("n_register", [0, 5])
def test_agrees_with_the_network_written_out(n_register):
    """The last layer at the predicted positions only gives what it gives when run everywhere."""
    model, (ids, positions, *_) = small("transformer", n_register=n_register, n_mixer=1), batch()
    states = model.decode(*model.encode(ids), positions)
    assert torch.allclose(
        states, naive(model, ids).gather(1, positions[..., None].expand(-1, -1, 64)), atol=1e-5
    )


def test_rotary_scores_depend_on_the_distance_alone():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16, generator=g), torch.randn(1, 1, 1, 16, generator=g)
    angle = torch.arange(40)[:, None] * 10_000.0 ** (-torch.arange(8) / 8)

    def score(i, j):
        return (
            rotate(q, angle[i].cos(), angle[i].sin()) * rotate(k, angle[j].cos(), angle[j].sin())
        ).sum()

    assert (
        score(5, 2) == pytest.approx(score(33, 30).item(), abs=1e-4)
        and abs(score(5, 2) - score(5, 4)) > 1e-3
    )


def test_mixers_alone_see_their_neighbours_and_nothing_else():
    model, (ids, *_) = small("transformer", n_layer=0, n_mixer=2, mixer_kernel=5), batch(T=32)
    changed = ids.clone()
    changed[:, 31] = (changed[:, 31] + 1) % 90
    where = torch.arange(32).expand(3, -1)
    same = (logits(model, ids, where) == logits(model, changed, where)).all(-1)
    assert same[:, :27].all() and not same[:, 27:].any()


def test_the_control_without_attention_trains_every_parameter():
    model = small("transformer", n_layer=0)
    model(*batch()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name, _ in model.named_parameters() if "read" in name]


def test_registers_are_all_that_is_added():
    plain, with_registers = small("transformer"), small("transformer", n_register=7)
    assert with_registers.num_params() - plain.num_params() == 7 * 64
    concepts, tokens = with_registers.encode(batch()[0])
    assert concepts.shape == (3, 7, 64) and tokens.shape == (3, 24, 64)
    assert plain.encode(batch()[0])[0].shape == (3, 0, 64)


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(n_head=5), "these fit"),
        (dict(n_head=64), "even share"),
        (dict(mixer_kernel=2), "odd"),
        (dict(dropout=-0.1), "below 1"),
        (dict(n_layer=-1), "0 or more"),
        (dict(n_layer=0, n_register=2), "nothing would"),
        (dict(isolate_documents=True, n_register=2, eot_id=EOT), "meet in the registers"),
        (dict(isolate_documents=True), "eot_id"),
    ],
)
def test_impossible_shapes_are_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        Transformer(
            TransformerConfig(
                **dict(vocab_size=V, block_size=32, n_layer=2, n_head=4, token_dim=64) | wrong
            )
        )


def test_rows_longer_than_block_size_are_refused():
    with pytest.raises(ValueError, match="33 tokens is longer than block_size=32"):
        small("transformer").encode(torch.zeros(1, 33, dtype=torch.long))


def test_isolation_cannot_be_forgotten_when_decoding():
    model, (ids, positions, *_) = small("transformer", isolate_documents=True), batch()
    with pytest.raises(ValueError, match="decode needs documents"):
        model.decode(*model.encode(ids), positions)


# ---- decoders, windows, resonance ---------------------------------------------------------

CAUSAL = {
    "attention": ("transformer", dict(n_mixer=1)),
    "windows": ("transformer", dict(local_window=3, global_every=2, n_mixer=0, bert_head=True)),
    "documents": ("transformer", dict(isolate_documents=True, local_window=4)),
    "resonance": ("resonance", dict(n_frequency=4)),
    "hybrid": ("resonance", dict(n_frequency=4, mixers="ra", n_mixer=1)),
}


@pytest.mark.parametrize("kind", CAUSAL)
def test_no_token_of_a_decoder_sees_a_later_one(kind):
    """In float64 nothing before token 20 moves when it changes, and what is behind it does."""
    arch, settings = CAUSAL[kind]
    model, (ids, *_) = small(arch, causal=True, **settings).double(), batch(T=32)
    ids[:, 5], ids[:, 20] = EOT, 7
    changed, where = ids.clone(), torch.arange(32).expand(3, -1)
    changed[:, 20] = 11
    difference = (logits(model, ids, where) - logits(model, changed, where)).abs().amax((0, 2))
    assert difference[:20].max() <= 1e-12 < 1e-6 < difference[20:24].min()


def test_a_decoder_with_documents_starts_each_of_them_anew():
    """With the documents apart, a document is predicted as if it stood alone."""
    model, (ids, *_) = small("transformer", causal=True, isolate_documents=True, n_mixer=2), batch()
    ids[:, 6] = EOT
    T = ids.shape[1]
    whole = logits(model, ids, torch.arange(7, T).expand(3, -1))
    alone = logits(model, ids[:, 7:], torch.arange(T - 7).expand(3, -1))
    assert torch.allclose(whole, alone, atol=1e-5)


def test_encoder_and_decoder_have_the_same_weights():
    for arch in ("transformer", "resonance"):
        shapes = [{name: t.shape for name, t in small(arch, causal=causal).state_dict().items()}
                  for causal in (False, True)]
        assert (shapes[0] == shapes[1]) == (arch == "transformer")  # resonance: two sides, one side


def test_local_layers_see_their_window_only():
    """Two layers of 3 tokens to each side and no mixers: 6 tokens away is the end of sight."""
    model = small("transformer", n_layer=3, n_mixer=0, local_window=3, global_every=99)
    object.__setattr__(model.layers[0], "window", 3)  # layer 0 would see the whole row
    ids = batch(T=32)[0]
    changed = ids.clone()
    changed[:, 16] = (changed[:, 16] + 1) % 90
    where = torch.arange(32).expand(3, -1)
    same = (logits(model, ids, where) == logits(model, changed, where)).all(-1).all(0)
    assert same[:7].all() and same[26:].all() and not same[8:25].any()


def test_the_bias_of_the_bert_head_is_added_to_the_logits():
    model, (ids, positions, *_) = small("transformer", bert_head=True), batch()
    before = logits(model, ids, positions)
    with torch.no_grad():
        model.bert_head.word_bias += torch.arange(V)
    added = logits(model, ids, positions) - before
    assert torch.allclose(added, torch.arange(V).float(), atol=1e-4)


@pytest.mark.parametrize("theta", [100.0, 160_000.0])
def test_theta_is_the_base_of_the_rotary_positions(theta):
    cos, sin = angles(torch.arange(9), theta, TransformerConfig(token_dim=64, n_head=4))
    expected = torch.arange(9)[:, None] * theta ** (-torch.arange(8) / 8)
    assert torch.allclose(cos[0, 0], expected.cos()) and torch.allclose(sin[0, 0], expected.sin())


def test_a_causal_classifier_answers_from_the_last_token():
    """The first token of a decoder has seen nothing of the text."""
    torch.manual_seed(0)
    head = Classifier(small("transformer", causal=True, mask_id=1), 2, 1).eval()
    ids, segments = batch(T=12)[0], torch.ones(3, 12, dtype=torch.int64)
    real = torch.arange(12) < torch.tensor([[12], [7], [12]])
    changed = ids.clone()
    changed[0, 11], changed[1, 7:] = (ids[0, 11] + 1) % 90, 3
    a, b = (head(row, segments, real) for row in (ids, changed))
    assert (a[0] - b[0]).abs().max() > 1e-6 and torch.equal(a[1:], b[1:])
