"""Text to token bins: MB of text a second of prepare.py and of datasets.map, the same tokenizer and processes, one run.

    python records/data/prepare_speed.py --input='../shared/data/corpus/*.jsonl.gz' --dir=/tmp/prepare_speed

The peer is nanoGPT's recipe for OpenWebText: load_dataset, one document a call of `map`, then batches of the result
appended to a memory map; and the same with lists of documents (batched=True), which is faster. Both sides read the same
.jsonl files and write train.bin and val.bin. prepare.py also drops duplicates, hashes the split, fsyncs and can be killed;
its vocabulary is trained before the clock starts. The sides take turns. The last line is JSON.
"""

import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

input = ""  # .jsonl files, a glob
dir = "/tmp/prepare_speed"  # what is written goes here
num_proc = 2
rounds = 3
side = ""  # of the processes that this one starts: prepare, map or batched
config = configure(globals())

import numpy as np

from tokenizer import Tokenizer


def with_datasets(tok, batched):
    """.jsonl -> bins by datasets.map."""
    from datasets import load_dataset

    data = load_dataset("json", data_files=sorted(glob.glob(input)), split="train", cache_dir=f"{dir}/cache")
    data = data.train_test_split(test_size=0.005, seed=0)
    encode, eot = tok.bpe.encode_ordinary, tok.eot_id

    def one(row):
        ids = [*encode(row["text"]), eot]
        return {"ids": ids, "len": len(ids)}

    def many(rows):
        ids = [[*encode(text), eot] for text in rows["text"]]
        return {"ids": ids, "len": list(map(len, ids))}

    data = data.map(many if batched else one, batched=batched, remove_columns=data["train"].column_names,
                    num_proc=num_proc)
    for split, part in data.items():
        out = np.memmap(f"{dir}/{split}.bin", "<u2", "w+", shape=(sum(part["len"]),))
        at, n = 0, min(1024, len(part))
        for i in range(n):
            ids = np.concatenate(part.shard(num_shards=n, index=i, contiguous=True).with_format("numpy")["ids"])
            out[at : at + len(ids)] = ids
            at += len(ids)
        out.flush()


def main():
    os.makedirs(dir, exist_ok=True)
    if not os.path.isdir(f"{dir}/tokenizer"):
        prepare = [sys.executable, f"{ROOT}/prepare.py", f"--input={input}", f"--out_dir={dir}/first",
                   "--tokenizer=bpe:16000", "--max_tokens=1000000", "--val_fraction=0.1"]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
        shutil.copytree(f"{dir}/first/tokenizer", f"{dir}/tokenizer")
    seconds = {"prepare": [], "map": [], "batched": []}
    for _ in range(rounds):
        for name in seconds:
            for left in ("cache", "out"):
                shutil.rmtree(f"{dir}/{left}", ignore_errors=True)
            command = [sys.executable, __file__, *sys.argv[1:], f"--side={name}"]
            if name == "prepare":
                command = [sys.executable, f"{ROOT}/prepare.py", f"--input={input}", f"--out_dir={dir}/out",
                           f"--tokenizer={dir}/tokenizer", f"--num_proc={num_proc}"]
            start = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
            if name == "prepare":
                mb = json.loads(done.stdout.splitlines()[-1])["bytes"] / 1e6
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: round(mb / value, 2) for name, value in medians.items()}
    print(json.dumps({"mb": round(mb, 1), "mb_per_s": rates, "seconds": {k: [round(s, 1) for s in v]
                      for k, v in seconds.items()}, "ratio_to_map": round(medians["map"] / medians["prepare"], 2),
                      "ratio_to_batched": round(medians["batched"] / medians["prepare"], 2), "num_proc": num_proc}))


if side:
    with_datasets(Tokenizer.load(f"{dir}/tokenizer"), side == "batched")
else:
    main()
