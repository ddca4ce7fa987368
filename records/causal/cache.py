"""How much faster generation is with what was computed before kept than with reading anew.

    python records/causal/cache.py
"""
import os
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


def seconds(way, model, prompt, n):
    begin = time.perf_counter()
    return way(model, prompt, n), time.perf_counter() - begin


for name, model in models.items():
    torch.manual_seed(0)
    model.freeze()
    short = torch.randint(0, 16000, (1, 8))
    with_cache(model, short, 4), anew(model, short, 4)
    kept, fast = seconds(with_cache, model, short, N - 8)
    again, slow = seconds(anew, model, short, N - 8)
    # the last 16 tokens: the difference to a text that is 16 tokens shorter
    _, slow_before = seconds(anew, model, short, N - 24)
    print(f"{name}: {N - 8} tokens in {fast:.2f} s with a cache, {slow:.2f} s without, "
          f"{slow / fast:.1f} times; the last 16 alone {slow - slow_before:.2f} s without, "
          f"{16 * fast / (N - 8):.2f} s with, {(slow - slow_before) * (N - 8) / 16 / fast:.1f} "
          f"times; the same tokens: {torch.equal(kept, again)}")
