"""Fill in masks, or turn texts into vectors.

    python tools/sample.py --out_dir=out/demo --text="The capital of France is [MASK]."
    python tools/sample.py --out_dir=out/demo < sentences.txt                                  one text a line
    python tools/sample.py --out_dir=out/demo --embed=sentences.txt --to=embeddings.npy        float32, a row for each line

Each [MASK] stands for one token. Prints the text with the likeliest tokens in place and the candidates for each mask
with their probabilities. The masks of a text are filled independently of each other, from one pass.

Embedding keeps the order of the lines and gives empty ones a row too; texts longer than the model reads are cut and
counted. Memory does not grow with the file; killed at any moment, the same command goes on and gives the same bytes.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt) and tokenizer/
text = ""  # text with one or more [MASK]; empty: one text a line from standard input
top = 5  # candidates to show for each mask
embed = ""  # a file with a text a line, or .jsonl with a field "text": its embeddings instead of filled masks
to = "embeddings.npy"  # where they go; np.load(to, mmap_mode="r") reads them
pooling = "auto"  # max (over concepts; transformer: over tokens) | concepts (all) | mean (over tokens) | auto
batch_tokens = 4096  # tokens (or concepts) at once; only texts of equal length share a batch, so nothing is padded
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
# -----------------------------------------------------------------------------
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure, read_settings

config = configure(globals())

import json

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # a GB, by default, for shapes of batches met once

import torch

from lib.embed import batches, choose_pooling, embed_file, embed_rows, rows_of, sha256_of
from lib.machine import DTYPES, choose_dtype, find_machine
from lib.run import load_run, user_mistakes


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


def check_settings():
    """Raises ValueError for numbers out of range and for settings that would be ignored."""
    if min(top, batch_tokens) < 1:
        raise ValueError(f"top={top}, batch_tokens={batch_tokens}: expected 1 or more")
    defaults = read_settings(__file__)
    given = [name for name in (("text", "top") if embed else ("to", "pooling")) if config[name] != defaults[name][0]]
    if given:
        raise ValueError(f"{', '.join(given)}: {'filling masks' if embed else 'embedding'} only; "
                         f"{'leave out --embed' if embed else 'name a file of texts with --embed=FILE'}")


def embed_texts():
    """The --embed half of this command -> its summary."""
    setting, name = choose_pooling(pooling, model.arch)

    def vectors(texts):
        rows, cut = rows_of(texts, tok, model.cfg.longest)
        return embed_rows(model, rows, [name], batch_tokens, machine.device)[name].numpy(), cut

    state = embed_file(embed, to, vectors, dict(
        weights_sha256=sha256_of(checkpoint["model"]), tokenizer=tok.fingerprint, pooling=setting, dtype=dtype,
        device=machine.device.type, batch_tokens=batch_tokens))  # the last three change the rounding
    made = state["identity"]
    print(f"{to}: {made['texts']:,} x {made['width']} float32, {setting} pooling; {state['cut']:,} texts longer than "
          f"{model.cfg.longest} tokens were cut, {state['replaced']:,} held bytes that are not UTF-8")
    return dict(to=to, texts=made["texts"], width=made["width"], pooling=setting, cut=state["cut"],
                replaced=state["replaced"])


with user_mistakes():
    check_settings()
    machine = find_machine(device)
    dtype, _ = choose_dtype(dtype, machine.device)
    model, tok, checkpoint = load_run(out_dir, machine.device)
    model.freeze(DTYPES[dtype])
    if embed:
        try:
            print(json.dumps(embed_texts()))
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on where it was")
        sys.exit()
    if not text and sys.stdin.isatty():
        print("one text with [MASK] a line, end with Ctrl-D", file=sys.stderr)
    texts = [text] if text else [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("no text; give --text='... [MASK] ...' or lines on standard input")
    rows = [encode_masked(line, tok, model.cfg.longest) for line in texts]

filled = {}
for index in batches(model, rows, batch_tokens):
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
