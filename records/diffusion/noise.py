"""How noisy the likelihood bound is: standard deviation of the mean over 1,000 rows.

    python records/diffusion/noise.py RUN --rows=512 --repeats=10

One draw a row with levels spread over the rows of a batch, one draw with independent levels, and
eight stratified draws a row, as tools/eval.py --nelbo=1 takes them. The rows stay the same; what
varies between repeats is the seed of the masks. With spread levels rows depend on each other, so
their means are compared; 8 draws and independent levels follow from the same.
"""

import os
import statistics
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from data.reader import TokenData
from lib.machine import autocast, choose_dtype, find_machine
from lib.run import data_of, load_run, predict
from masking import mask_batch
from tools.nelbo import draw_nats

out_dir, *rest = sys.argv[1:]
given = dict(word.removeprefix("--").split("=") for word in rest)
n_rows, repeats = int(given.get("rows", 512)), int(given.get("repeats", 10))
BATCH = 128
torch.set_num_threads(1)
machine = find_machine("cpu")
dtype, _ = choose_dtype("auto", machine.device)
model, tok, checkpoint = load_run(out_dir, machine.device)
data = TokenData(data_of(checkpoint).split(",")[0], "val", model.cfg.block_size, 0)
n_rows = min(n_rows, data.n_blocks) // BATCH * BATCH


@torch.no_grad()
def one_draw(ids, index, seed, level):
    """A draw of each row -> nats (B,)."""
    inputs, positions, targets, weights, _ = mask_batch(
        ids, index, "diffusion", 1.0, tok, seed=seed, level=level)
    with autocast(machine.device, dtype):
        nats, _ = predict(model, inputs, positions, targets, None, tok.vocab_size)
    return (nats.double() * weights).sum(1)


def mean(seed, kind):
    """Mean nats a token over the rows with the masks of a seed."""
    total = tokens = 0
    for index in torch.arange(n_rows).split(BATCH):
        ids = torch.as_tensor(data.block(index.numpy()))
        tokens += int((~torch.from_numpy(tok.is_special)[ids]).sum())
        if kind == "eight draws":
            with torch.no_grad():
                total += float(sum(draw_nats(model, ids, index, draw, 8, False, tok, machine,
                                             dtype, seed) for draw in range(8)).sum()) / 8
        else:
            level = None
            if kind == "independent":
                level = torch.rand(BATCH, generator=torch.Generator().manual_seed(
                    seed * 1000 + int(index[0])))
            total += float(one_draw(ids, index, seed, level).sum())
    return total / tokens


print(f"{out_dir}, {n_rows} rows of {model.cfg.block_size} tokens, batches of {BATCH}, "
      f"{repeats} seeds")
for kind in ("spread", "independent", "eight draws"):
    means = [mean(seed, kind) for seed in range(repeats)]
    deviation = statistics.stdev(means) * (n_rows / 1000) ** 0.5
    print(f"{kind:<12} mean {statistics.mean(means):.4f} nats a token, standard deviation of the "
          f"mean of 1,000 rows {deviation:.4f}", flush=True)
