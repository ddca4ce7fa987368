"""Fill in masks.

    python sample.py --out_dir=out/demo --text="The capital of France is [MASK]."
    python sample.py --out_dir=out/demo < sentences.txt        one text a line

Each [MASK] stands for one token. Prints the text with the likeliest tokens in place and the candidates for each mask
with their probabilities. The masks of a text are filled independently of each other, from one pass.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt) and tokenizer/
text = ""  # text with one or more [MASK]; empty: one text a line from standard input
top = 5  # candidates to show for each mask
batch_tokens = 4096  # tokens that are read at once; only texts of equal length share a batch, so nothing is padded
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
# -----------------------------------------------------------------------------
from configurator import configure

config = configure(globals())

import json
import sys

import numpy as np
import torch

from common import load_run, user_mistakes
from hardware import DTYPES, choose_dtype, find_machine


def encode_masked(text, tok, longest):
    """Text with [MASK] -> list of ids between end-of-document marks, as rows look in training. Raises ValueError.

    The space before a [MASK] belongs to the hidden token, because a word's token carries the space before it.
    """
    pieces = text.split("[MASK]")
    if len(pieces) == 1:
        raise ValueError(f"no [MASK] in {text!r}; mark what to fill in, as in 'The capital of France is [MASK].'")
    pieces[:-1] = [piece.removesuffix(" ") if tok.name != "byte" else piece for piece in pieces[:-1]]
    ids = [tok.eot_id]
    for i, part in enumerate(tok.encode(pieces)):
        ids += ([tok.mask_id] if i else []) + part.tolist()
    ids.append(tok.eot_id)
    if len(ids) > longest:
        raise ValueError(f"{text[:40]!r}... has {len(ids)} tokens, the model reads {longest}; shorten it")
    return ids


@torch.inference_mode()
def fill(model, tok, ids):
    """ids (B, T) -> for each row (filled text, for each mask a list of (token text, probability))."""
    is_mask = ids == tok.mask_id
    n_masks = is_mask.sum(1).tolist()
    positions = is_mask.int().argsort(dim=1, descending=True, stable=True)[:, :max(n_masks)]
    concepts, tokens = model.encode(ids)
    logits = model.logits(model.decode(concepts, tokens, positions, model.documents(ids))).float()
    ordinary = torch.from_numpy((~tok.is_special).nonzero()[0]).to(ids.device)
    probability, index = logits[..., ordinary].softmax(-1).topk(min(top, len(ordinary)), dim=-1)
    candidate, results = ordinary[index].cpu(), []
    for row, n, places, best, p in zip(ids.cpu(), n_masks, positions.cpu(), candidate, probability.tolist()):
        row[places[:n]] = best[:n, 0]
        masks = [[(tok.decode([i]), q) for i, q in zip(*pair)] for pair in zip(best[:n].tolist(), p)]
        results.append((tok.decode(row[1:-1].tolist()).strip(), masks))
    return results


def batches(rows):
    """Indices of rows, those of equal length together, in batches of up to batch_tokens tokens."""
    lengths = np.array([len(row) for row in rows])
    for T in np.unique(lengths):
        same, B = np.flatnonzero(lengths == T), max(1, batch_tokens // T)
        yield from (same[i:i + B].tolist() for i in range(0, len(same), B))


with user_mistakes():
    machine = find_machine(device)
    dtype, _ = choose_dtype(dtype, machine.device)
    if min(top, batch_tokens) < 1:
        raise ValueError(f"top={top}, batch_tokens={batch_tokens}: expected 1 or more")
    model, tok, checkpoint = load_run(out_dir, machine.device)
    model.freeze(DTYPES[dtype])
    if not text and sys.stdin.isatty():
        print("one text with [MASK] a line, end with Ctrl-D", file=sys.stderr)
    texts = [text] if text else [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("no text; give --text='... [MASK] ...' or lines on standard input")
    rows = [encode_masked(line, tok, model.cfg.longest) for line in texts]

filled = {}
for index in batches(rows):
    filled |= zip(index, fill(model, tok, torch.tensor([rows[i] for i in index], device=machine.device)))
results = []
for i, line in enumerate(texts):
    whole, candidates = filled[i]
    print(f"{line}\n  {whole}")
    for row in candidates:
        print("    " + "  ".join(f"{token.strip() or token!r} {p:.1%}" for token, p in row))
    results.append(dict(text=line, filled=whole, masks=[[dict(token=t, p=round(p, 5)) for t, p in row]
                                                        for row in candidates]))
print(json.dumps(results if not text else results[0]))
