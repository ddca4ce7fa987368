"""Encoders, decoders, and what one becomes when it goes on as the other, under one budget.

    python records/company/convert.py DATA OUT [SEEDS]

DATA: prepared text. Every run is `train.py` with the Transformer of config/sweeps/company.py; a run
that is finished is not started again. Prints a table of validation losses, mean over the seeds.
"""
import json
import os
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from data.tokenizer import Tokenizer
from lib.baselines import Transformer, TransformerConfig

data_dir, out_dir, *seeds = sys.argv[1:]
seeds = seeds[0].split(",") if seeds else ["1", "2", "3"]
SHAPE = dict(n_layer=1, n_head=8, token_dim=128, ffn_dim=1595)
T, ROWS, RATE = 128, 16, 0.3
# name: objective, FLOPs, and whose weights it starts from
RUNS = {
    "half of the budget as a decoder": ("clm", 5e12, ""),
    "clm, then mlm": ("mlm", 5e12, "half of the budget as a decoder"),
    "encoder": ("mlm", 1e13, ""),
    "decoder": ("clm", 1e13, ""),
    "decoder -> encoder": ("mlm", 2.5e12, "decoder"),
    "decoder -> encoder (mntp)": ("mntp", 2.5e12, "decoder"),
    "encoder -> decoder": ("clm", 2.5e12, "encoder"),
    "half of the budget as an encoder": ("mlm", 5e12, ""),
    "mlm, then clm": ("clm", 5e12, "half of the budget as an encoder"),
}
tok = Tokenizer.load(os.path.join(data_dir, "tokenizer"))


def n_steps(objective, flops):
    model = Transformer(TransformerConfig(vocab_size=tok.vocab_size, block_size=T,
                                          causal=objective == "clm", **SHAPE))
    n_predicted = T if objective == "clm" else -(-T * 3 // 10)
    return round(flops / (ROWS * T * model.flops_per_token(T, n_predicted, ROWS)))


def folder(name, seed):
    return os.path.join(out_dir, f"{name.replace(' ', '_').replace('>', '')}_s{seed}")


def train(name, seed):
    """-> the last validation loss."""
    objective, flops, start = RUNS[name]
    arguments = [f"--{key}={value}" for key, value in SHAPE.items()]
    if objective == "clm":
        arguments += ["--masking_type=whole_word", "--mlm_probability=0.15"]
    if start:
        arguments.append(f"--init_from={folder(start, seed)}")
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "train.py"), "config/mini.py", "--arch=transformer",
         f"--data_dir={data_dir}", f"--out_dir={folder(name, seed)}", f"--objective={objective}",
         *arguments, "--learning_rate=4e-3", "--min_lr=5e-5",
         f"--warmup_steps={50 if start else 200}", f"--max_steps={n_steps(objective, flops)}",
         "--eval_interval=500", "--log_interval=100", f"--seed={seed}"],
        stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["val_loss"]


losses = {name: [train(name, seed) for seed in seeds] for name in RUNS}
print("| | objective | loss | of each seed |\n|---|---|---:|---|")
for name, values in losses.items():
    print(f"| {name} | {RUNS[name][0]} | {statistics.mean(values):.3f} | "
          f"{', '.join(f'{loss:.4f}' for loss in values)} |")
