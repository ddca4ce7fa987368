"""Time and memory a token of a small model as rows grow, at a fixed number of concepts. Microseconds, medians of 6 steps.

    python records/speed/long.py                2,048 8,192 32,768 131,072 tokens, a process each
"""
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.getcwd())
if len(sys.argv) == 1:
    for T in (2048, 8192, 32768, 131072):
        subprocess.run([sys.executable, __file__, str(T)], check=True)
    sys.exit()
T = int(sys.argv[1])
import torch

from hardware import autocast, choose_dtype, find_machine, resident_gib
from model import ConceptConfig, ConceptEncoder

machine = find_machine("cpu", T)
dtype, _ = choose_dtype("auto", machine.device)
torch.manual_seed(0)
model = ConceptEncoder(ConceptConfig(vocab_size=16000, block_size=T, n_layer=1, n_head=4, n_concept=32, concept_dim=256,
                                     token_dim=128, ffn_dim=512, position="sinusoidal", mask_id=3)).train()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
B, K, seconds, before = max(1, 4096 // T), int(0.15 * T), [], resident_gib()
ids = torch.randint(9, 16000, (B, T))
positions = torch.rand(B, T).argsort(1)[:, :K].sort(1).values
targets = ids.gather(1, positions)
for _ in range(8):
    start = time.perf_counter()
    with autocast(machine.device, dtype):
        loss = model(ids.scatter(1, positions, 3), positions, targets, torch.ones(B, K))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
print(f"T = {T:>7,}: {statistics.median(seconds[2:]) / (B * T) * 1e6:6.1f} us a token, {(resident_gib(peak=True) - before) * 1024:6,.0f} MB")
