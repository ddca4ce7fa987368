"""What importance masking costs of a training step: uniform words, ema and model in turns.

    python records/importance/cost.py data/train

Prints the seconds of a step as ratios to whole-word masks, and the speed of the masking alone.
"""

import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib.importance import Importance
from lib.machine import Machine
from masking import MASKING_TYPES, mask_batch
from model import ConceptConfig, ConceptEncoder

torch.set_num_threads(1)
B, T, RATE, TURNS = 16, 128, 0.3, 15
folder = sys.argv[1]
tok = Tokenizer.load(os.path.join(folder, "tokenizer"))
data = TokenData(folder, "train", T, 0)
machine = Machine(torch.device("cpu"), 0, 1)
model = ConceptEncoder(ConceptConfig(
    vocab_size=tok.vocab_size, block_size=T, n_layer=1, n_head=8, n_concept=16, concept_dim=128,
    token_dim=128, ffn_dim=592, mask_id=tok.mask_id))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
scorers = {kind: Importance(kind, data, tok, RATE, machine) for kind in ("ema", "model")}


def step(number, kind):
    """A training step as in train.py, from ids to the update."""
    ids, sample_ids = data.batch(number, B, 0, 1)
    scorer = scorers.get(kind)
    batch = mask_batch(ids, sample_ids, "importance" if scorer else "whole_word", RATE, tok,
                       scores=scorer.scores(ids) if scorer else None)
    inputs, positions, targets, weights, _ = batch
    with torch.autocast("cpu", torch.bfloat16):
        loss, nats = model(inputs, positions, targets, weights, with_nats=True)
    loss.backward()
    if scorer:
        scorer.learn(batch, nats)
    optimizer.step()
    optimizer.zero_grad()


seconds = {kind: [] for kind in ("whole_word", "ema", "model")}
for turn in range(TURNS):
    for kind, times in seconds.items():
        start = time.process_time()
        step(turn, kind)
        times.append(time.process_time() - start)
base = statistics.median(seconds["whole_word"])
for kind, times in seconds.items():
    print(f"{kind:<12}{statistics.median(times) / base:6.3f} x whole_word, {model.num_params():,} "
          f"parameters, {B} rows of {T}")

rows = TokenData(folder, "train", 512, 0)
ids, sample_ids = rows.batch(0, 64, 0, 1)
scores = torch.rand(ids.shape)
for masking_type in MASKING_TYPES:
    times = []
    for epoch in range(TURNS):
        start = time.process_time()
        mask_batch(ids, sample_ids, masking_type, 1.0 if masking_type == "diffusion" else 0.15,
                   tok, epoch=epoch, scores=scores)
        times.append(time.process_time() - start)
    print(f"{masking_type:<12}{ids.numel() / statistics.median(times) / 1e6:6.1f} M tokens/s")
