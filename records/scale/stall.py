"""How long a checkpoint holds training up: written beside it, at once, and as one file.

    torchrun --nproc_per_node=2 records/scale/stall.py

Two processes, the shape of config/micro_balanced.py with the open bottleneck, AdamW. Writes to a
temporary folder. Times in seconds, the smallest of three; "steps" is the time of STEPS steps.
"""

import json
import os
import shutil
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch
import torch.distributed as dist

from lib.machine import find_machine
from lib.parallel import Distributed
from lib.run import save_checkpoint
from model import ConceptConfig, ConceptEncoder

STEPS = 6
machine = find_machine("cpu", parallel=True)
torch.manual_seed(0)
model = ConceptEncoder(ConceptConfig(vocab_size=30528, block_size=128, n_layer=4, n_concept=64))
n_params = model.num_params()
distributed = Distributed(model, "fsdp", machine, "bf16", use_compile=False)
opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
ids = torch.randint(0, 30000, (16, 128), generator=torch.Generator().manual_seed(machine.rank))
positions = torch.arange(0, 128, 4).repeat(16, 1)
batch = ids, positions, ids.gather(1, positions), torch.ones(16, 32)


def steps(n=STEPS):
    dist.barrier()
    start = time.perf_counter()
    for _ in range(n):
        with torch.autocast("cpu", torch.bfloat16):
            loss = distributed.net(*batch)
        loss.backward()
        distributed.clip_gradients(1.0)
        opt.step()
        opt.zero_grad()
    dist.barrier()
    return time.perf_counter() - start


def content(step):
    return dict(model=distributed.weights(), optimizers=[opt.state_dict()], step=step)


folder = [tempfile.mkdtemp(dir=os.environ.get("TMPDIR")) if machine.is_main else ""]
dist.broadcast_object_list(folder, 0)
folder = folder[0]
steps(2)
distributed.save(folder, content(0), "step-000000000")
found = {name: [] for name in ("steps", "steps with a save", "save returns after",
                               "written after", "save that is waited for", "one file")}
for number in range(1, 4):
    found["steps"].append(steps())
    dist.barrier()
    start = time.perf_counter()
    distributed.save(folder, content(number), f"step-{number:09d}")
    found["save returns after"].append(time.perf_counter() - start)
    during = steps()
    distributed.wait()
    found["steps with a save"].append(found["save returns after"][-1] + during)
    found["written after"].append(time.perf_counter() - start)
    dist.barrier()
    start = time.perf_counter()
    distributed.save(folder, content(10 + number), f"step-{10 + number:09d}")
    distributed.wait()
    found["save that is waited for"].append(time.perf_counter() - start)
    with distributed.whole_model() as whole:
        weights = {name: t.clone() for name, t in whole.state_dict().items()}
    dist.barrier()
    if machine.is_main:
        state = {i: dict(exp_avg=t, exp_avg_sq=t.clone()) for i, t in enumerate(weights.values())}
        start = time.perf_counter()
        save_checkpoint(folder, dict(model=weights, optimizers=[state], step=number))
        found["one file"].append(time.perf_counter() - start)
    dist.barrier()
distributed.close()
if machine.is_main:
    shutil.rmtree(folder)
    best = {name: round(min(times), 2) for name, times in found.items()}
    step = best["steps"] / STEPS
    cost = best["steps with a save"] - best["steps"]
    print(json.dumps(best | dict(
        params=n_params, megabytes=round(n_params * 12 / 1e6), seconds_a_step=round(step, 3),
        share_of_1000_steps={"written beside training": round(cost / (1000 * step), 5),
                             "waited for": round(best["save that is waited for"] / (1000 * step), 5),
                             "one file": round(best["one file"] / (1000 * step), 5)})))
machine.close()
