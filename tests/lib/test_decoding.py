"""Promises of lib/decoding.py: a causal model continues texts, with a cache, as if it read them
anew for every token."""

import pytest
import torch

from data.tokenizer import Tokenizer
from lib.baselines import ResonanceConfig, ResonanceLM, Transformer, TransformerConfig
from lib.decoding import continue_rows, continue_texts
from lib.generate import generate
from lib.sampling import Sampling
from masking import ordinary_ids

SHAPE = dict(vocab_size=300, block_size=48, n_layer=2, n_head=2, token_dim=16, ffn_dim=24,
             n_mixer=1, causal=True)
MODELS = {
    "attention": lambda: Transformer(TransformerConfig(**SHAPE)),
    "window": lambda: Transformer(TransformerConfig(**SHAPE, local_window=3, global_every=2)),
    "resonance": lambda: ResonanceLM(ResonanceConfig(**SHAPE, n_frequency=4)),
    "hybrid": lambda: ResonanceLM(ResonanceConfig(**SHAPE, n_frequency=4, mixers="ra")),
}


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.load("byte")


def model_of(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        model.wte.mul_(6)  # certain enough that the likeliest token is the same up to rounding
    return model


def read_anew(model, tok, prompt, n):
    """The likeliest n tokens behind a prompt; the whole row is read for each."""
    ids = torch.tensor([prompt])
    allowed = torch.cat((ordinary_ids(tok, ids.device), torch.tensor([tok.eot_id])))
    for _ in range(n):
        last = torch.full((1, 1), ids.shape[1] - 1)
        with torch.no_grad():
            logits = model.logits(model.decode(*model.encode(ids), last))[0, 0]
        ids = torch.cat((ids, allowed[logits[allowed].argmax()].view(1, 1)), dim=1)
    return ids[0, len(prompt):].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_gives_what_reading_anew_gives(name, tok):
    model, greedy = model_of(name), Sampling(temperature=0)
    prompts = [[tok.eot_id, *b"one two"], [tok.eot_id, *b"a much longer prompt"]]
    alone = [read_anew(model, tok, prompt, 12) for prompt in prompts]
    alone = [ids[:ids.index(tok.eot_id)] if tok.eot_id in ids else ids for ids in alone]
    for prompt, expected in zip(prompts, alone):
        assert continue_rows(model, tok, [prompt], [0], 12, greedy, "cpu") == [expected]
    # prompts of different lengths in one batch, the shorter one behind padding
    assert continue_rows(model, tok, prompts, [0, 1], 12, greedy, "cpu") == alone


@pytest.mark.parametrize("prompts", [[b"one two", b""], [b""], [b"one", b"a longer prompt"]])
def test_isolated_documents_are_continued_as_they_were_trained(prompts, tok):
    """The mark before a text is of another document; only the first token is drawn from it."""
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(**SHAPE, isolate_documents=True, eot_id=tok.eot_id))
    with torch.no_grad():
        model.eval().wte.mul_(6)
    marked = [[tok.eot_id, *prompt] for prompt in prompts]

    def anew(prompt, n):
        """Rows with the mark, in which isolation is that of training."""
        ids = torch.tensor([prompt])
        allowed = torch.cat((ordinary_ids(tok, ids.device), torch.tensor([tok.eot_id])))
        for _ in range(n):
            last = torch.full((1, 1), ids.shape[1] - 1)
            with torch.no_grad():
                states = model.decode(*model.encode(ids), last, model.documents(ids))
                logits = model.logits(states)[0, 0]
            ids = torch.cat((ids, allowed[logits[allowed].argmax()].view(1, 1)), dim=1)
        drawn = ids[0, len(prompt):].tolist()
        return drawn[:drawn.index(tok.eot_id)] if tok.eot_id in drawn else drawn

    found = continue_rows(model, tok, marked, range(len(marked)), 10, Sampling(temperature=0),
                          "cpu")
    assert found == [anew(prompt, 10) for prompt in marked]


def test_local_mixers_alone_continue_texts(tok):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SHAPE | dict(n_layer=0))).eval()
    prompt = [tok.eot_id, *b"one"]
    [drawn] = continue_rows(model, tok, [prompt], [0], 6, Sampling(temperature=0), "cpu")
    expected = read_anew(model, tok, prompt, 6)
    assert drawn == expected[:len(drawn)]


def test_a_sample_depends_on_its_number_alone(tok):
    model = model_of("attention")
    many = [s.text for s in continue_texts(model, tok, ["ab", "xyz"], 4, 10,
                                           Sampling(seed=3, temperature=4.0))]
    assert len(set(many)) == 8
    few = [s.text for s in continue_texts(model, tok, ["ab", "xyz"], 4, 10,
                                          Sampling(seed=3, temperature=4.0), batch_tokens=1)]
    assert many == few
    assert many[:4] == [s.text for s in generate(model, tok, "ab", 4, 10,
                                                 Sampling(seed=3, temperature=4.0))]
    assert many != [s.text for s in continue_texts(model, tok, ["ab", "xyz"], 4, 10,
                                               Sampling(temperature=4.0))]
    assert all(text.startswith("ab") for text in many[:4])


def test_top_k_one_is_the_likeliest_token(tok):
    model = model_of("attention")
    [one] = continue_texts(model, tok, ["ab"], 1, 10, Sampling(top_k=1))
    [greedy] = continue_texts(model, tok, ["ab"], 1, 10, Sampling(temperature=0))
    assert one.ids == greedy.ids


def test_each_token_is_handed_on_as_it_comes(tok):
    seen = []
    [sample] = continue_texts(model_of("attention"), tok, ["ab"], 1, 6, Sampling(),
                              watch=lambda ids: seen.append(ids[0].tolist()))
    assert [len(ids) for ids in seen] == list(range(4, 4 + len(seen)))
    assert seen[-1][3:3 + len(sample.ids)] == sample.ids


@pytest.mark.parametrize("text, length, sampling, message", [
    ("a" * 60, 0, Sampling(), "60 tokens, and the model's row of 48"),
    ("abc", 100, Sampling(), "has room for 44; --length=44, or train with a larger block_size"),
    ("a [MASK]", 0, Sampling(), "a causal model has no .MASK."),
    ("abc", 0, Sampling(steps=3), "steps=3: of masked models only"),
    ("abc", 0, Sampling(block_tokens=3), "block_tokens=3: of masked models only"),
])
def test_what_a_causal_model_cannot_do_is_refused(text, length, sampling, message, tok):
    with pytest.raises(ValueError, match=message):
        list(continue_texts(model_of("attention"), tok, [text], 1, length, sampling))


def test_more_tokens_than_there_is_room_for_are_refused():
    model = model_of("attention")
    past = model.start(1, 4)
    with pytest.raises(ValueError, match="5 tokens, and there is room for 4"):
        model.extend(torch.zeros(1, 5, dtype=torch.int64), past)
