"""Tokens a second of one process and of two, each on a core of its own; alternating rounds.

    python records/scale/throughput.py data/pydocs 4
"""

import json
import os
import subprocess
import sys
import tempfile

DATA, ROUNDS = sys.argv[1], int(sys.argv[2])
ARGS = ["train.py", "config/mini.py", f"--data_dir={DATA}", "--batch_size=64", "--micro_batch=16",
        "--max_steps=13", "--log_interval=2", "--eval_interval=1000", "--eval_rows=16",
        "--health_rows=0", "--init_table=random", "--warmup_steps=1"]
KINDS = {"one": (1, []), "ddp": (2, []), "fsdp": (2, ["--parallel=fsdp"]),
         "fsdp, every block recomputed": (2, ["--parallel=fsdp", "--checkpoint_every=1"])}
best = {}
for _ in range(ROUNDS):
    for kind, (n, more) in KINDS.items():
        with tempfile.TemporaryDirectory() as out:
            command = ["bash", "-c", 'exec taskset -c $LOCAL_RANK "$@"', "pinned", sys.executable,
                       *ARGS, *more, f"--out_dir={out}"]
            subprocess.run([os.path.join(os.path.dirname(sys.executable), "torchrun"), "--no-python",
                            "--standalone", f"--nproc_per_node={n}", *command], check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
            records = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]
        speed = max(r["tokens_per_s"] for r in records if "tokens_per_s" in r)
        best[kind] = max(best.get(kind, 0), speed)
        print(kind, round(speed), flush=True)
print(json.dumps({kind: round(speed) for kind, speed in best.items()}
                 | {"ddp over one": round(best["ddp"] / best["one"], 3),
                    "fsdp over ddp": round(best["fsdp"] / best["ddp"], 3)}))
