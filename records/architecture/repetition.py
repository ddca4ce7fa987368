"""What is a neighbour that comes back worth? Mix in the words that stood beside the same neighbour elsewhere in the row.

    python records/architecture/repetition.py out/sweep_efficiency/open_s1 data/mine

p = (1 - share) x the model's probability + share x the frequency among the words that follow (or precede) the same
visible neighbour in the row; one share for each band of the neighbour's frequency rank, fitted on the same 128 rows.
"""
import sys

sys.path.insert(0, ".")
import torch
import torch.nn.functional as F

import common
from masking import mask_batch
from shards import TokenData

ROWS, BANDS, SHARES = 128, (0, 30, 100, 300, 1000, 3000, 10**6), (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)

out_dir, data_dir = sys.argv[1:]
model, tok, _ = common.load_run(out_dir, "cpu")
data = TokenData(data_dir, "val", 512, 0)
index = torch.arange(ROWS)
batch = mask_batch(torch.as_tensor(data.block(index.numpy())), index, "token", 0.15, tok, seed=common.EVAL_SEED)
p, beside, rank = [], {-1: [], 1: []}, {-1: [], 1: []}
for ids, positions, targets, weights in zip(*(t.split(8) for t in batch)):
    with torch.no_grad():
        states = model.decode(*model.encode(ids), positions)
        right = F.softmax(model.logits(states).float(), -1).gather(2, targets[..., None])[..., 0]
    for r, k in weights.nonzero().tolist():
        p.append(right[r, k].item())
        for side in (-1, 1):
            at = positions[r, k].item() + side
            known = 0 <= at < 512 and ids[r, at] != tok.mask_id
            at = at if known else 0
            words = ids[r, [i - side for i in (ids[r] == ids[r, at]).nonzero()[:, 0].tolist() if 0 <= i - side < 512]]
            words = words[words != tok.mask_id] if known else words[:0]
            beside[side].append((words == targets[r, k]).float().mean().item() if len(words) else -1)
            rank[side].append(ids[r, at].item() if known else 0)
p = torch.tensor(p)
print(f"{out_dir}: {-p.log().mean():.4f} nats on {len(p)} hidden tokens")
for side, name in ((-1, "left"), (1, "right")):
    share_of, at = torch.tensor(beside[side]), torch.tensor(rank[side])
    for low, high in zip(BANDS, BANDS[1:]):
        band = (share_of >= 0) & (at >= low) & (at < high)
        best = max(SHARES, key=lambda s: ((1 - s) * p[band] + s * share_of[band]).log().sum())
        before = p[band].log().sum()
        p[band] = (1 - best) * p[band] + best * share_of[band]
        print(f"{name} neighbour of rank {low} to {high}: {band.sum()} tokens, share {best}, "
              f"gain {(p[band].log().sum() - before) / len(p):.4f}")
    print(f"with the {name} neighbour: {-p.log().mean():.4f}")
