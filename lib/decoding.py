"""Text from a causal model (objective=clm): each token is drawn given all those before it.

    from lib.decoding import continue_texts

    for sample in continue_texts(model, tok, ["Once upon a time", "The end"], n_samples=2):
        print(sample.text)

The model keeps what it has computed of the tokens so far (`start` and `extend` in
lib/baselines.py), so a further token costs one pass of one token. The result is that of reading the
whole text anew for each token, up to rounding. Prompts of different lengths share a batch: the
shorter ones have padding before them, which no token sees.

A text begins behind an end-of-document mark, as documents do in training, and ends where the model
draws this mark or where `length` is reached. With isolate_documents the text does not see the mark:
only the first token of an empty prompt is drawn from it. Random numbers are hashes of the seed, the
number of the sample and the token's number, as in lib/generate.py.

Shapes: B texts, N tokens of a text with its prompt, V ids that may be drawn.
"""

import torch
import torch.nn.functional as F

from lib.health import check_finite
from lib.sampling import Sample, Sampling, draw
from masking import ordinary_ids, random_bits, to_unit

TOKEN = 103  # kind of draw; those of lib/generate.py are 100 to 102


def prompt_ids(text, tok):
    """A prompt -> ids behind an end-of-document mark. ValueError for a prompt with [MASK]."""
    if "[MASK]" in text:
        raise ValueError(f"{text[:40]!r}: a causal model has no [MASK]; it continues a text, and "
                         "only a model trained with objective=mlm fills masks")
    if tok.name != "byte":
        text = text.removesuffix(" ")  # the token of a word includes the space before it
    return [tok.eot_id, *(tok.encode([text])[0].tolist() if text else ())]


def room_behind(prompts, length, longest):
    """Tokens to draw. ValueError where prompt and length are more than the model's row."""
    most = max(map(len, prompts))
    room = longest - most
    if room < 1:
        raise ValueError(f"a prompt has {most - 1} tokens, and the model's row of {longest} has to "
                         "hold them, a mark before them and what follows; shorten it")
    if not 0 <= length <= room:
        raise ValueError(f"length={length}: behind {most - 1} tokens of prompt the model's row of "
                         f"{longest} has room for {room}; --length={room}, or train with a larger "
                         "block_size")
    return length or room


@torch.inference_mode()
def continue_rows(model, tok, prompts, numbers, length, sampling, device, watch=None):
    """Prompts, lists of ids, and the number of each sample -> for each the ids that were drawn.

    watch: a function of prompts and drawn ids (B,N), called after each token.
    """
    isolated = model.cfg.isolate_documents
    if isolated:
        prompts = [prompt[1:] or prompt for prompt in prompts]
    n_prompt = max(map(len, prompts))
    ids_BN = torch.full((len(prompts), n_prompt), tok.pad_id)
    real_BN = torch.zeros_like(ids_BN, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        ids_BN[i, n_prompt - len(prompt):] = torch.tensor(prompt)
        real_BN[i, n_prompt - len(prompt):] = True
    has_padding = not real_BN.all()
    eot = torch.tensor([tok.eot_id], device=device)
    allowed_V = torch.cat((ordinary_ids(tok, eot.device), eot))
    numbers_B = torch.as_tensor(numbers)
    past = model.start(len(prompts), n_prompt + length)
    new_BT, new_real_BT = ids_BN.to(device), real_BN.to(device) if has_padding else None
    has_ended_B = torch.zeros(len(prompts), dtype=torch.bool)
    for step in range(length):
        states_B1d = model.extend(new_BT, past, new_real_BT)[:, -1:]
        logits = model.logits(states_B1d)[:, 0, allowed_V]
        # Apple's GPUs have no float64.
        logits = (logits.cpu() if logits.device.type == "mps" else logits).double()
        check_finite([logits])
        uniform_B = to_unit(random_bits(numbers_B, sampling.seed, step, TOKEN, 1))[:, 0]
        index, _ = draw(logits, uniform_B.to(logits.device), sampling.temperature, sampling.top_p,
                        sampling.top_k)
        new_BT = allowed_V[index.to(device)][:, None]
        ids_BN = torch.cat((ids_BN, new_BT.cpu()), dim=1)
        new_real_BT = torch.ones_like(new_BT, dtype=torch.bool) if has_padding else None
        if isolated and step == 0 and any(prompt == [tok.eot_id] for prompt in prompts):
            # What comes now is read without the mark: from the beginning, with it as padding.
            has_padding, past = True, model.start(len(prompts), n_prompt + length)
            real_BN[ids_BN[:, :n_prompt] == tok.eot_id] = False
            new_BT, new_real_BT = ids_BN.to(device), F.pad(real_BN, (0, 1), value=True).to(device)
        has_ended_B |= ids_BN[:, -1] == tok.eot_id
        if watch:
            watch(ids_BN)
        if has_ended_B.all():
            break
    drawn = ids_BN[:, n_prompt:].tolist()
    return [row[:row.index(tok.eot_id)] if tok.eot_id in row else row for row in drawn]


def continue_texts(model, tok, texts, n_samples=1, length=0, sampling=None, batch_tokens=4096,
                   device="cpu", watch=None):
    """Yields n_samples continuations of each text, each a lib.sampling.Sample.

    length: tokens behind the longest prompt; 0: as many as the model's row has room for. ValueError
    where they do not fit, for [MASK], and for settings of masked models.
    """
    sampling = sampling or Sampling()
    wrong = [f"{name}={getattr(sampling, name)}" for name in ("sampler", "steps", "block_tokens")
             if getattr(sampling, name) != getattr(Sampling(), name)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: of masked models only; a causal model draws one "
                         "token after the other")
    prompts = [prompt_ids(text, tok) for text in texts]
    length = room_behind(prompts, length, model.cfg.longest)
    jobs = [(prompt, number) for prompt in prompts for number in range(n_samples)]
    at_once = max(1, batch_tokens // (max(map(len, prompts)) + length))
    for i in range(0, len(jobs), at_once):
        rows, numbers = zip(*jobs[i:i + at_once])
        drawn = continue_rows(model, tok, rows, numbers, length, sampling, device, watch)
        for prompt, ids in zip(rows, drawn):
            yield Sample(tok.decode(prompt[1:] + ids), ids, len(ids))
