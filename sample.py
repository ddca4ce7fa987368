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
device = "auto"  # auto | cuda | mps | cpu
# -----------------------------------------------------------------------------
from configurator import configure

config = configure(globals())

import json
import sys

import torch

from common import find_machine, load_run, user_mistakes


def encode_masked(text, tok, longest):
    """Text with [MASK] -> ids (1, T) between end-of-document marks, as rows look in training. Raises ValueError.

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
    return torch.tensor([ids])


@torch.no_grad()
def fill(model, tok, ids):
    """ids (1, T) -> (filled text, for each mask a list of (token text, probability))."""
    positions = (ids == tok.mask_id).nonzero()[:, 1][None]
    concepts, tokens = model.encode(ids)
    logits = model.logits(model.decode(concepts, tokens, positions, model.documents(ids)))[0].float()
    ordinary = torch.from_numpy((~tok.is_special).nonzero()[0]).to(ids.device)
    probability, index = logits[:, ordinary].softmax(-1).topk(min(top, len(ordinary)), dim=-1)
    candidate = ordinary[index]
    candidates = [[(tok.decode([i]), p) for i, p in zip(row_ids, row_p)]
                  for row_ids, row_p in zip(candidate.tolist(), probability.tolist())]
    filled = ids[0].clone()
    filled[positions[0]] = candidate[:, 0]
    return tok.decode(filled[1:-1].tolist()).strip(), candidates


with user_mistakes():
    machine = find_machine(device)
    if top < 1:
        raise ValueError(f"top={top}: expected 1 or more candidates")
    model, tok, checkpoint = load_run(out_dir, machine.device)
    if not text and sys.stdin.isatty():
        print("one text with [MASK] a line, end with Ctrl-D", file=sys.stderr)
    texts = [text] if text else [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("no text; give --text='... [MASK] ...' or lines on standard input")
    rows = [encode_masked(line, tok, model.cfg.longest).to(machine.device) for line in texts]

results = []
for line, ids in zip(texts, rows):
    filled, candidates = fill(model, tok, ids)
    print(f"{line}\n  {filled}")
    for row in candidates:
        print("    " + "  ".join(f"{token.strip() or token!r} {p:.1%}" for token, p in row))
    results.append(dict(text=line, filled=filled, masks=[[dict(token=t, p=round(p, 5)) for t, p in row]
                                                         for row in candidates]))
print(json.dumps(results if not text else results[0]))
