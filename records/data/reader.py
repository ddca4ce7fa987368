"""How fast batches come off the disk, and what they cost in memory: an epoch of a synthetic bin, in order and shuffled.

    python records/data/reader.py --dir=/tmp/reader --gb=2          four epochs, each in a process of its own; one thread

Each epoch starts cold: the pages of the bin are dropped from the page cache first. Tokens are those of the text, without
padding; memory is the most that the process grew by from before the bin was opened, everything but torch included.
The last line is JSON. The folder is made when it is not there, and left for the next time.
"""

import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

dir = "/tmp/reader"  # where the bin is, or goes
gb = 2.0  # its size
block_size = 512  # tokens a row
batch_size = 64  # rows a batch
document_tokens = 400  # mean length of a document
epoch = ""  # of the processes that this one starts: block or document, then in_order or shuffled, a comma between
config = configure(globals())

import numpy as np

from documents import from_texts, write_dataset
from files import write_json


def make():
    """Bytes as tokens, documents of random length."""
    units = from_texts(lambda: ((f"{i} some text", None) for i in range(200)))
    write_dataset(units, dir, "byte", val_fraction=0.2, num_proc=1)
    with open(os.path.join(dir, "meta.json")) as file:
        meta = json.load(file)
    rng, left, n_documents = np.random.default_rng(0), int(gb * 5e8), 0
    with open(os.path.join(dir, "train.bin"), "wb") as file:
        n_tokens = left
        while left:
            ids = rng.integers(0, 256, min(left, 10_000_000)).astype("<u2")
            ends = np.cumsum(rng.exponential(document_tokens, len(ids) * 2 // document_tokens).astype(int) + 2)
            ids[ends[ends < len(ids)]], ids[-1] = meta["eot_id"], meta["eot_id"]
            file.write(ids.data)
            left, n_documents = left - len(ids), n_documents + int((ids == meta["eot_id"]).sum())
    meta["splits"]["train"].update(tokens=n_tokens, documents=n_documents,
                                   files=[{"name": "train.bin", "tokens": n_tokens, "sha256": ""}])
    write_json(os.path.join(dir, "meta.json"), meta)
    write_json(os.path.join(dir, "made.json"), [gb, document_tokens])


def resident_mb():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmRSS")).split()[1]) / 1000


def drop_pages():
    for name in os.listdir(dir):
        if os.path.isfile(path := os.path.join(dir, name)):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(rows, order):
    """One epoch -> dict."""
    import torch

    from shards import TokenData

    torch.set_num_threads(1)
    drop_pages()
    torch.from_numpy(np.zeros(10_000_000, np.int64)).clone()  # what the first tensor brings with it
    before, begun = resident_mb(), time.perf_counter()
    data = TokenData(dir, "train", block_size, 0, rows)
    opened, cpu, most, n_batches = time.perf_counter(), time.process_time(), 0.0, data.n_blocks // batch_size
    drop_pages()

    def read(step):
        if order == "shuffled":
            data.batch(step, batch_size)
        else:
            data.block(range(step * batch_size, (step + 1) * batch_size))

    for step in range(n_batches):
        read(step)
        if step % 100 == 0:
            most = max(most, resident_mb())
    seconds, cpu = time.perf_counter() - opened, time.process_time() - cpu
    again, n_again = time.perf_counter(), min(n_batches, 5000)
    for step in range(n_again):
        read(step)
    again, tokens = time.perf_counter() - again, batch_size * float(data.row_tokens)
    rates = {"cold": n_batches / seconds, "warm": n_again / again, "a_cpu_second": n_batches / cpu}
    return dict(rows=rows, order=order, tokens=round(n_batches * tokens), seconds=round(seconds, 2),
                **{f"mtok_per_s_{name}": round(rate * tokens / 1e6, 1) for name, rate in rates.items()},
                opening_s=round(opened - begun, 2), grown_mb=round(most - before, 1))


if epoch:
    print(json.dumps(measure(*epoch.split(","))))
    sys.exit()
made = os.path.join(dir, "made.json")
if not os.path.exists(made) or json.load(open(made)) != [gb, document_tokens]:
    os.makedirs(dir, exist_ok=True)
    if os.listdir(dir):
        sys.exit(f"{dir} holds something else; remove it, or give another --dir")
    make()
found = []
print(f"{'rows':<10}{'order':<10}{'M tokens':>10}{'seconds':>9}{'M tokens/s, cold':>18}{'warm':>8}{'a CPU second':>14}"
      f"{'opening, s':>12}{'grown, MB':>11}")
for rows in ("block", "document"):
    for order in ("in_order", "shuffled"):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--epoch={rows},{order}"], text=True,
                              stdout=subprocess.PIPE, check=True)
        r = json.loads(done.stdout.splitlines()[-1])
        found.append(r)
        print(f"{rows:<10}{order:<10}{r['tokens'] / 1e6:>10,.1f}{r['seconds']:>9.2f}{r['mtok_per_s_cold']:>18.1f}"
              f"{r['mtok_per_s_warm']:>8.1f}{r['mtok_per_s_a_cpu_second']:>14.1f}{r['opening_s']:>12.2f}"
              f"{r['grown_mb']:>11.1f}", flush=True)
print(json.dumps(found))
