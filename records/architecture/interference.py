"""How well 64 vectors of a row can say which words stand in it: sums of 8 word codes each, added to a model's logits.

    python records/architecture/interference.py out/sweep_efficiency/mixers_s1 data/mine

Nothing is learned: codes are random or rows of the token table, rare words count more, and a word is boosted by
log(1 + a x estimate / 512 / its frequency in the language), or by a x sigmoid(12 (similarity - threshold)).
"""
import sys

sys.path.insert(0, ".")
import torch
import torch.nn.functional as F

import common
from masking import mask_batch
from shards import TokenData

run, data_dir = sys.argv[1:]
model, tok, _ = common.load_run(run, "cpu")
frequency = common.token_frequency(TokenData(data_dir, "train", 512, 0), tok, 2000) + 1e-7
rows = torch.arange(32)
ids = torch.as_tensor(TokenData(data_dir, "val", 512, 0).block(rows.numpy()))
batch = mask_batch(ids, rows, "token", 0.15, tok, seed=1234)
V, table = len(frequency), model.wte.detach()
draw = torch.Generator().manual_seed(0)
codes = {f"random codes of {m}": torch.randn(V, m, generator=draw) for m in (32, 64, 128)}
codes |= {"the token table": table, "the token table, whitened": torch.linalg.svd(table - table.mean(0), full_matrices=False)[0]}
totals = {}
with torch.no_grad():
    for part in range(0, len(rows), 8):
        inputs, positions, targets, weights = (t[part:part + 8] for t in batch)
        concepts, tokens = model.encode(inputs)
        local = model.logits(model.decode(concepts, tokens, positions), concepts).float()

        def add(name, said_BV):
            nats = F.cross_entropy((local + said_BV[:, None]).flatten(0, 1), targets.flatten(), reduction="none")
            total = totals.setdefault(name, [0, 0])
            total[0] += float((nats.view_as(weights) * weights).sum())
            total[1] += float(weights.sum())

        add("the model alone", torch.zeros(8, V))
        seen = inputs != tok.mask_id
        count = torch.zeros(8, V).scatter_add_(1, inputs, seen.float())
        for a in (0.1, 0.2, 0.4):
            add(f"exact counts, a={a}", torch.log1p(a * count / 512 / frequency))
        rare = ((1e-4 / frequency[inputs]) ** 0.5).clamp(max=1) * seen
        for name, code in codes.items():
            code = F.normalize(F.layer_norm(code, code.shape[1:]), dim=-1)
            sums = (code[inputs] * rare[..., None]).unflatten(1, (64, 8)).sum(2)
            similar = (sums @ code.T).amax(1)
            for threshold in (0.5, 0.7):
                for a in (0.1, 0.2):
                    estimate = (similar - threshold).clamp(min=0) / (1 - threshold)
                    add(f"{name}, above {threshold}, a={a}", torch.log1p(a * estimate / 512 / frequency))
                for a in (1, 2):
                    add(f"{name}, sigmoid at {threshold}, a={a}", a * torch.sigmoid((similar - threshold) * 12))
for name, (nats, n) in totals.items():
    print(f"{nats / n:.4f}  {name}")
