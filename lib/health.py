"""Are the concepts alive? Geometry, attention, use by the decoder, and the words each concept stands for.

A masked-language loss cannot see collapse: an open model loses a few hundredths of a nat while all its concepts become
one vector. So the concepts are measured themselves, on fixed rows with fixed masks, beside controls (the same network
untrained, the token states of a Transformer): a number without its control means nothing.

Shapes: B rows, C concepts, D width, T tokens, K predicted positions, H heads.
"""

import math

import torch
import torch.nn.functional as F

from lib.machine import autocast
from lib.run import EVAL_SEED
from masking import mask_batch

MIN_COUNT = 5  # a token type must be seen so often before its PMI with a concept is worth printing


# ---- the rows everything is measured on --------------------------------------

def probe_rows(data, tok, rows, mlm_probability=0.15):
    """The first `rows` rows (or all there are) and their fixed masks -> ids (B,T), MaskedBatch."""
    index = torch.arange(min(rows, data.n_blocks))
    ids = torch.as_tensor(data.block(index.numpy()))
    return ids, mask_batch(ids, index, "token", mlm_probability, tok, seed=EVAL_SEED)


@torch.no_grad()
def encode_rows(model, ids, machine, dtype, micro_batch=32):
    """Concepts (B,C,D) and token states (B,T,d) of rows ids (B,T) as float32 on the CPU; refuses what is not finite."""
    parts = []
    for part in ids.split(micro_batch):
        with autocast(machine.device, dtype):
            parts.append([t.float().cpu() for t in model.encode(*machine.take([part]))])
    concepts, tokens = (torch.cat(group) for group in zip(*parts))
    if not (torch.isfinite(concepts).all() and torch.isfinite(tokens).all()):
        raise ValueError("the encoder returns NaN or infinity: its weights are broken; train again or restore an "
                         "earlier checkpoint (ckpt_prev.pt)")
    return concepts, tokens


def evenly_spaced(tokens_BTd, n):
    """n token states of each row, the control for n concepts. -> (B,n,d)."""
    T = tokens_BTd.shape[1]
    return tokens_BTd[:, (torch.arange(min(n, T)) * T // min(n, T))]


# ---- geometry ----------------------------------------------------------------

def geometry(z_BCD):
    """Spread of concept vectors z (B,C,D) within and across rows -> dict of floats; None where one vector has none.

    rank                within a row: exp(entropy of the normalised singular values) of the centred concepts, 1..C-1
    rank_share          rank / C
    rankme, rankme_slot across rows (2210.02885): the same of the mean concept, and of single concepts (mean of 8);
                        at most min(B, D)
    participation       within a row: (sum of eigenvalues)^2 / sum of squares, of the centred concepts
    duplicates          share of pairs of concepts of a row whose centred cosine is above 0.95
    cosine              mean absolute centred cosine of such pairs
    input_dependence    share of the variance of the concepts that the input causes; the rest are constants
    """
    B, C, D = z_BCD.shape
    result = dict.fromkeys(("rank", "rank_share", "participation", "duplicates", "cosine"))
    if C > 1:
        centred = z_BCD - z_BCD.mean(1, keepdim=True)
        singular = torch.linalg.svdvals(centred)
        singular = singular * (singular > 1e-5 * z_BCD.norm(dim=(1, 2))[:, None])  # rounding is not a direction
        eigen = singular**2
        cosine = F.normalize(centred, dim=-1)
        pairs = torch.triu_indices(C, C, offset=1)
        cosine = (cosine @ cosine.mT)[:, pairs[0], pairs[1]]
        result["rank"] = effective_rank(singular).mean().item()
        result["rank_share"] = result["rank"] / C
        result["participation"] = (eigen.sum(-1)**2 / (eigen**2).sum(-1).clamp(min=1e-30)).mean().item()
        result["duplicates"] = (cosine > 0.95).float().mean().item()
        result["cosine"] = cosine.abs().mean().item()
    slots = z_BCD[:, torch.arange(min(8, C)) * C // min(8, C)].transpose(0, 1)
    result["rankme"] = effective_rank(torch.linalg.svdvals(z_BCD.mean(1))).item()
    result["rankme_slot"] = effective_rank(torch.linalg.svdvals(slots)).mean().item()
    by_input = z_BCD.var(0, correction=0).sum()
    constant = (z_BCD.mean(0) - z_BCD.mean((0, 1))).pow(2).sum()
    total = (by_input + constant).item()
    result["input_dependence"] = by_input.item() / total if total and B > 1 else None
    return result


def effective_rank(singular):
    """exp of the entropy of singular values (..., n) -> (...); 1 for a single direction, 0 for none."""
    share = singular / singular.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.exp(-(share * share.clamp(min=1e-30).log()).sum(-1)) * (singular.amax(-1) > 0)


# ---- does the decoder use them -----------------------------------------------

@torch.no_grad()
def channel_use(model, batch, machine, dtype, micro_batch=32, one_by_one=False):
    """Loss of a MaskedBatch, and by how much it rises when the decoder gets other concepts. -> dict of floats, nats.

    loss, zeroed, shuffled (those of another row, half the batch away), averaged (their mean over the batch);
    one_by_one: a list, the rise when concept c alone is zeroed, on the first 64 rows. shuffled: None for a single row.
    """
    encoded = []
    for part in zip(*(t.split(micro_batch) for t in batch)):
        with autocast(machine.device, dtype):
            encoded.append(model.encode(*machine.take(part[:1])))
    concepts, tokens = (torch.cat(group) for group in zip(*encoded))
    B, C, _ = concepts.shape

    def loss(concepts):
        nats = predicted = 0.0
        parts = [t[:len(concepts)].split(micro_batch) for t in (concepts, tokens, *machine.take(batch))]
        for c, x, inputs, positions, targets, weights in zip(*parts):
            with autocast(machine.device, dtype):
                states = model.decode(c, x, positions, model.documents(inputs))
                nats += model.nats(states, targets, weights).item()
            predicted += weights.sum().item()
        return nats / max(predicted, 1)

    base = loss(concepts)
    result = dict(loss=base, zeroed=loss(torch.zeros_like(concepts)) - base,
                  shuffled=loss(concepts.roll(max(1, B // 2), 0)) - base if B > 1 else None,
                  averaged=loss(concepts.mean(0, keepdim=True).expand_as(concepts)) - base)
    if one_by_one:
        concepts, keep = concepts[:64], 1 - torch.eye(C, device=concepts.device, dtype=concepts.dtype)
        base = loss(concepts)
        result["one_by_one"] = [loss(concepts * keep[c][:, None]) - base for c in range(C)]
    return result


def summary(model, data, tok, machine, dtype, rows=64, micro_batch=32):
    """The cheap subset that is logged during training -> {"concept_rank", ...}; {} for a model without concepts."""
    was_training = model.training
    model.eval()
    ids, batch = probe_rows(data, tok, rows)
    result = {}
    try:
        concepts, _ = encode_rows(model, ids, machine, dtype, micro_batch)
    except ValueError:  # broken weights; the training loop has its own way to say so
        concepts = torch.empty(0, 0)
    if concepts.shape[1]:
        z, use = geometry(concepts), channel_use(model, batch, machine, dtype, micro_batch)
        result = dict(concept_rank=z["rank"], input_dependence=z["input_dependence"], duplicates=z["duplicates"],
                      shuffled=use["shuffled"], zeroed=use["zeroed"])
    model.train(was_training)
    return result


# ---- what they read ----------------------------------------------------------

@torch.no_grad()
def attention(model, ids, positions, machine, dtype):
    """Attention weights of one forward pass of ids (B,T), decoded at positions (B,K).

    -> read: list over layers of (B,H,C,T), concepts reading tokens; decode: list over blocks of (B,H,K,C), float32 on
    the CPU. Recomputed from the inputs of the modules (fused attention returns no weights), equal to what they used.
    """
    caught = {"read": [], "decode": []}

    def catch(kind):
        return lambda module, inputs: caught[kind].append(module.weights(*inputs).float().cpu())

    hooks = [module.register_forward_pre_hook(catch("read")) for module in model.readers()]
    hooks += [module.register_forward_pre_hook(catch("decode")) for module in model.decode_readers()]
    try:
        with autocast(machine.device, dtype):
            ids, positions = machine.take([ids, positions])
            concepts, tokens = model.encode(ids)
            model.decode(concepts, tokens, positions, model.documents(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return caught["read"], caught["decode"]


def attention_use(read, decode):
    """Numbers of `attention`, over layers, heads and rows -> dict of floats.

    entropy       of a concept's reading, as a share of log T: 1 reads everything alike, 0 one token
    divergence    Jensen-Shannon divergence between the concepts of a row, as a share of log C: 0, all read the same
    position      share of the variation of the reading weights that the position alone explains
    usage_entropy of the share of decoder attention each concept gets, as a share of log C: 1, all are used alike
    unused        share of the concepts that get less than a tenth of an equal share
    """
    def entropy(p):
        return -(p * p.clamp(min=1e-12).log()).sum(-1)

    read = torch.stack([layer.mean(1) for layer in read])  # (layers, B, C, T): heads averaged
    read = read / read.sum(-1, keepdim=True).clamp(min=1e-12)  # own heads read nothing where no word is a concept's own
    n, B, C, T = read.shape
    result = dict(entropy=(entropy(read).mean() / math.log(max(T, 2))).item())
    result["divergence"] = result["usage_entropy"] = None
    if C > 1:
        gap = entropy(read.mean(2)) - entropy(read).mean(2)
        result["divergence"] = (gap.mean() / math.log(C)).item()
    by_position = read.mean(1).var(-1, correction=0).mean()
    result["position"] = (by_position / read.var(-1, correction=0).mean().clamp(min=1e-30)).item()
    usage = torch.stack([block.mean((0, 1, 2)) for block in decode]).mean(0)  # (C,)
    if C > 1:
        result["usage_entropy"] = (entropy(usage) / math.log(C)).item()
    result["unused"] = (usage < 0.1 / C).float().mean().item()
    result["usage"] = usage.tolist()
    return result


def top_tokens(read_BCT, ids_BT, tok, n=10):
    """The token types each concept reads more than it would by their frequency: pointwise mutual information in nats.

    read (B,C,T): attention of one layer, heads averaged. -> for each concept a list of (text, PMI, occurrences), types
    with MIN_COUNT occurrences or more, special tokens left out.
    """
    B, C, T = read_BCT.shape
    types, place = ids_BT.reshape(-1).unique(return_inverse=True)
    mass = torch.zeros(C, len(types)).index_add_(1, place, read_BCT.transpose(0, 1).reshape(C, B * T))
    count = torch.bincount(place, minlength=len(types))
    pmi = (mass / mass.sum(1, keepdim=True)).clamp(min=1e-12).log() - (count / count.sum()).log()
    special = torch.from_numpy(tok.is_special)[types]
    pmi[:, (count < MIN_COUNT) | special] = -math.inf
    score, best = pmi.topk(min(n, len(types)), dim=1)
    return [[(tok.decode([int(types[i])]), float(s), int(count[i])) for s, i in zip(*row) if s > -math.inf]
            for row in zip(score, best)]
