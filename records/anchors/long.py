"""Time and memory of a training step in long rows, one concept for every 64 tokens.

    OMP_NUM_THREADS=1 python records/anchors/long.py

Strict, 2 layers of width 128, bf16, one row, all anchors local | three quarters | no anchors. Each
measurement is a process of its own; the least of 3 steps after a first one.
"""
import os
import resource
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import torch

from model import ConceptConfig, ConceptEncoder

KINDS = {"all local": dict(local_heads=1.0), "3/4 local": {}, "no anchors": dict(anchored=False)}


def measure(T, kind):
    """-> seconds a step."""
    model = ConceptEncoder(ConceptConfig(
        vocab_size=16_000, block_size=T, n_concept=T // 64, n_layer=2, n_head=8, concept_dim=128,
        token_dim=128, ffn_dim=352, bottleneck="strict", **KINDS[kind]))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids, positions = torch.randint(16_000, (1, T)), torch.rand(1, T).topk(int(0.3 * T)).indices
    positions, times = positions.sort().values, []
    for _ in range(4):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, positions, ids.gather(1, positions), torch.ones(positions.shape))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return min(times[1:])


if len(sys.argv) > 1:
    T, kind = int(sys.argv[1]), sys.argv[2]
    seconds = measure(T, kind)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {T:,} | {kind} | {seconds / T * 1e6:.0f} | {peak:,.0f} |")
else:
    print("| tokens | heads | ms for 1,000 tokens | peak memory, MB |\n|---|---|---:|---:|")
    for T in (2048, 8192, 32768, 131072):
        for kind in KINDS:
            subprocess.run([sys.executable, __file__, str(T), kind], check=True)
