"""How much faster generation is with what was computed before kept than with reading anew.

    python records/causal/cache.py
"""
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch

from lib.baselines import ResonanceConfig, ResonanceLM, Transformer, TransformerConfig

N = 512
shape = dict(vocab_size=16000, block_size=N, n_layer=6, n_head=8, token_dim=256, ffn_dim=1024,
             n_mixer=0, causal=True)
models = {"attention": Transformer(TransformerConfig(**shape)),
          "resonance": ResonanceLM(ResonanceConfig(**shape))}


@torch.inference_mode()
def with_cache(model, prompt, n):
    past, ids = model.start(1, N), prompt
    new = prompt
    for _ in range(n):
        new = model.logits(model.extend(new, past)[:, -1:]).argmax(-1)
        ids = torch.cat((ids, new), dim=1)
    return ids


@torch.inference_mode()
def anew(model, prompt, n):
    ids = prompt
    for _ in range(n):
        last = torch.full((1, 1), ids.shape[1] - 1)
        new = model.logits(model.decode(*model.encode(ids), last)).argmax(-1)
        ids = torch.cat((ids, new), dim=1)
    return ids


def seconds(call, *arguments):
    """-> what the call returns, and how long it took."""
    begin = time.perf_counter()
    return call(*arguments), time.perf_counter() - begin


@torch.inference_mode()
def last_token(model):
    """Median seconds of one token in a row of N: from what is kept, and from reading anew."""
    ids, kept, fresh = torch.randint(0, 16000, (1, N - 1)), [], []
    for _ in range(9):
        past = model.start(1, N)
        model.extend(ids[:, :-1], past)
        kept.append(seconds(lambda: model.logits(model.extend(ids[:, -1:], past)))[1])
        fresh.append(seconds(anew, model, ids, 1)[1])
    return statistics.median(kept), statistics.median(fresh)


for name, model in models.items():
    torch.manual_seed(0)
    model.freeze()
    short = torch.randint(0, 16000, (1, 8))
    with_cache(model, short, 4), anew(model, short, 4)
    kept, fast = seconds(with_cache, model, short, N - 8)
    again, slow = seconds(anew, model, short, N - 8)
    one, one_anew = last_token(model)
    print(f"{name}: {N - 8} tokens in {fast:.2f} s with a cache, {slow:.2f} s without, "
          f"{slow / fast:.1f} times; token {N} in {1e3 * one:.1f} and {1e3 * one_anew:.1f} ms, "
          f"{one_anew / one:.1f} times; the same tokens: {torch.equal(kept, again)}")
