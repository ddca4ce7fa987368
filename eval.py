"""Measure a trained model on fixed masks and draw its loss curves.

    python eval.py --out_dir=out/demo                                    on the data it was trained on
    python eval.py --out_dir=out/demo --data_dir=data/owt,data/wikitext2 on any data with the same tokenizer

Prints loss, accuracy, perplexity and bits per byte for every masking strategy, writes out_dir/{eval.json,curves.png}.
The masks depend on the row's number in the data set alone, so every model is asked exactly the same questions; the
numbers of two models compare when tokenizer, split, rows, block_size and mlm_probability are the same. They concern
predicted tokens only: bits per byte here is the cost of the hidden text, given what is left to see.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt), tokenizer/, log.jsonl
data_dir = ""  # prepared data, several with commas between; empty: what the run was trained on
split = "val"  # val | train
rows = 512  # rows of block_size tokens to measure on
mlm_probability = 0.15  # share of tokens that is predicted; 0.15 is what published numbers use
micro_batch = 32  # rows a forward pass
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
# -----------------------------------------------------------------------------
from configurator import configure

config = configure(globals())

import json
import os

from common import choose_dtype, evaluate, find_machine, load_run, read_log, user_mistakes
from files import write_json
from masking import MASKING_TYPES, check_masking
from shards import TokenData


def draw_curves(records, entropy, path):
    """Training and validation loss against tokens seen, with the unigram entropy as the line to be under."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=130)
    for key, style in (("loss", dict(color="0.75", lw=0.8, label="training loss (this run's masks)")),
                       ("val_loss", dict(color="C0", marker="o", ms=3, label="validation loss (fixed masks, 15 %)"))):
        axes.plot(*zip(*[(r["tokens"] / 1e6, r[key]) for r in records if key in r]), **style)
    axes.axhline(entropy, color="C3", ls="--", lw=1, label=f"unigram entropy {entropy:.2f}: word frequencies alone")
    axes.set(xlabel="tokens seen (millions)", ylabel="nats a predicted token", title=out_dir)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


with user_mistakes():
    machine = find_machine(device)
    model, tok, checkpoint = load_run(out_dir, machine.device)
    dtype, reason = choose_dtype(dtype, machine.device)
    check_masking("token", mlm_probability)
    if rows < 1 or micro_batch < 1:
        raise ValueError(f"rows={rows}, micro_batch={micro_batch}: expected more than 0")
    sets = {name: TokenData(name, split, model.cfg.block_size, 0)
            for name in (data_dir or checkpoint["settings"]["data_dir"]).split(",")}
    for name, data in sets.items():
        if data.meta["fingerprint"] != tok.fingerprint:
            raise ValueError(f"{name} was prepared with another tokenizer than {out_dir} was trained with; prepare it "
                             f"again with --tokenizer={out_dir}/tokenizer")

print(f"{out_dir} after {checkpoint['tokens']:,} tokens, {model.num_params():,} parameters, {dtype} ({reason})")
results = {}
for name, data in sets.items():
    entropy = data.meta["unigram_entropy"]
    print(f"\n{name} {split}, {min(rows, data.n_blocks)} rows of {model.cfg.block_size} tokens, {mlm_probability:.0%} "
          f"predicted, unigram entropy {entropy:.3f} nats\n"
          f"  {'masking':<12}{'loss':>8}{'accuracy':>10}{'perplexity':>12}{'bits/byte':>11}{'predicted':>11}")
    results[name] = {"unigram_entropy": entropy}
    for masking_type in MASKING_TYPES:
        with user_mistakes():
            r = evaluate(model, data, tok, machine, dtype, masking_type, mlm_probability, rows, micro_batch)
        print(f"  {masking_type:<12}{r['loss']:>8.4f}{r['accuracy']:>10.1%}{r['perplexity']:>12.2f}"
              f"{r['bits_per_byte']:>11.4f}{r['predicted']:>11,}", flush=True)
        results[name][masking_type] = r
machine.close()

summary = dict(out_dir=out_dir, step=checkpoint["step"], tokens=checkpoint["tokens"], params=model.num_params(),
               split=split, mlm_probability=mlm_probability, data=results)
if machine.is_main:
    write_json(os.path.join(out_dir, "eval.json"), summary)
    records = read_log(out_dir)
    if any("val_loss" in r for r in records):
        first = next(iter(results.values()))
        draw_curves(records, first["unigram_entropy"], os.path.join(out_dir, "curves.png"))
        print(f"\nloss curves: {out_dir}/curves.png")
    print(json.dumps(summary))
