"""Filling masks: texts with [MASK] in, the likeliest tokens out."""

import numpy as np
import torch

from lib.embed import batches


def encode_masked(text, tok, longest=None):
    """Text with [MASK] -> ids between two end-of-document marks, as in training, a list.

    The space before a [MASK] is left out, because the token of a word includes the space before it.
    Raises ValueError for a text without [MASK], or with more than `longest` ids.
    """
    pieces = text.split("[MASK]")
    if len(pieces) == 1:
        raise ValueError(f"no [MASK] in {text!r}; mark what to fill in, as in "
                         "'The capital of France is [MASK].'")
    if tok.name != "byte":
        pieces[:-1] = [piece.removesuffix(" ") for piece in pieces[:-1]]
    ids = [tok.eot_id]
    for part in tok.encode(pieces):
        ids += [*part.tolist(), tok.mask_id]
    ids[-1] = tok.eot_id  # no mask follows the last piece
    if longest and len(ids) > longest:
        raise ValueError(f"{text[:40]!r}... has {len(ids)} tokens, the model reads {longest}; "
                         "shorten it")
    return ids


@torch.inference_mode()
def fill_rows(model, tok, ids, top):
    """ids (B, T) -> for each row (filled text, for each mask `top` pairs of (token text, p))."""
    is_mask = ids == tok.mask_id
    n_masks = is_mask.sum(1).tolist()
    # Masked positions first, in their order; rows with fewer masks also decode other positions.
    positions = is_mask.int().argsort(dim=1, descending=True, stable=True)[:, :max(n_masks)]
    concepts, tokens = model.encode(ids)
    states = model.decode(concepts, tokens, positions, model.documents(ids))
    logits = model.logits(states).float()
    ordinary = torch.from_numpy((~tok.is_special).nonzero()[0]).to(ids.device)
    p_BKN, index = logits[..., ordinary].softmax(-1).topk(min(top, len(ordinary)), dim=-1)

    results = []
    for row, n, places, best, p_row in zip(
            ids.cpu(), n_masks, positions.cpu(), ordinary[index].cpu(), p_BKN.tolist()):
        row[places[:n]] = best[:n, 0]
        masks = []
        for candidates, p_mask in zip(best[:n].tolist(), p_row):
            masks.append([(tok.decode([i]), p) for i, p in zip(candidates, p_mask)])
        results.append((tok.decode(row[1:-1].tolist()).strip(), masks))
    return results


def fill_texts(model, tok, texts, top, batch_tokens, device):
    """Fills the [MASK]s of texts -> for each dict(text, filled, masks).

    masks: for each mask the `top` likeliest tokens, as a list of dict(token, p). All masks of a
    text are filled from one forward pass, independently of each other. Raises ValueError as
    encode_masked does, and for a `top` below 1.
    """
    if top < 1:
        raise ValueError(f"top={top}: expected 1 or more")
    rows = [np.array(encode_masked(text, tok, model.cfg.longest)) for text in texts]
    results = [None] * len(texts)
    for index in batches(model, rows, batch_tokens):
        ids = torch.from_numpy(np.stack([rows[i] for i in index])).to(device)
        for i, (filled, masks) in zip(index, fill_rows(model, tok, ids, top)):
            results[i] = dict(text=texts[i], filled=filled, masks=[
                [dict(token=token, p=round(p, 5)) for token, p in mask] for mask in masks])
    return results
