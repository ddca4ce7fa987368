"""Measures of concept health: have the concept vectors collapsed, and does the decoder use them?

The masked-language loss does not show collapse: all concepts of an open model can become one vector
and the loss rises by only a few hundredths of a nat. So the concepts are measured directly, on
fixed rows with fixed masks:

    geometry       how far the concept vectors of a row differ from each other, and between rows
    channel_use    by how many nats the loss rises when the decoder gets wrong concepts
    attention_use  how differently the concepts read, and how evenly the decoder reads them
    top_tokens     the tokens that each concept reads most

A value says little alone. Compare it with a control: the same network untrained, or the token
states of a Transformer.

Shapes: B rows, C concepts, D width, T tokens, K predicted positions, H heads.
"""

import math

import torch
import torch.nn.functional as F

from lib import kernels
from lib.evaluation import EVAL_SEED
from lib.machine import autocast
from masking import mask_batch
from model import StrictDecoder, split_heads

MIN_COUNT = 5  # occurrences of an id below which its PMI with a concept is mostly noise


# ---- the rows that are measured -----------------------------------------------

def probe_rows(data, tok, rows, mlm_probability=0.15):
    """The first `rows` rows (or all there are) and their fixed masks -> ids (B,T), MaskedBatch."""
    index = torch.arange(min(rows, data.n_blocks))
    ids = torch.as_tensor(data.block(index.numpy()))
    return ids, mask_batch(ids, index, "token", mlm_probability, tok, seed=EVAL_SEED)


def padding_of(data, tok):
    """The id of padding in the rows of a data set, None where they have none."""
    return tok.pad_id if data.padded else None


def is_real(ids, pad_id):
    """Which ids (B,T) are tokens, bool; None where all are, with pad_id=None."""
    return None if pad_id is None else ids != pad_id


@torch.no_grad()
def encode_rows(model, ids, machine, dtype, micro_batch=32, pad_id=None):
    """ids (B,T) -> concepts (B,C,D) and token states (B,T,d), float32 on the CPU.

    pad_id: see padding_of. Raises ValueError where a state is NaN or infinite.
    """
    parts = []
    for part in ids.split(micro_batch):
        [on_device] = machine.take([part])
        with autocast(machine.device, dtype):
            encoded = model.encode(on_device, is_real(on_device, pad_id))
            parts.append([t.float().cpu() for t in encoded])
    concepts, tokens = (torch.cat(group) for group in zip(*parts))
    check_finite([concepts, tokens])
    return concepts, tokens


def check_finite(tensors):
    """Raises ValueError if a number that the encoder has returned is NaN or infinite."""
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError("the encoder returns NaN or infinity: its weights are broken; train again "
                         "or restore an earlier checkpoint (ckpt_prev.pt)")


def evenly_spaced(x, n):
    """n (or all) vectors of each row at equal distances: x (B,T,d) -> (B,n,d).

    n token states are the control for n concepts.
    """
    T = x.shape[1]
    n = min(n, T)
    return x[:, torch.arange(n) * T // n]


# ---- geometry -----------------------------------------------------------------

def geometry(z_BCD):
    """How much concept vectors z (B,C,D) differ within and between rows -> dict of floats.

    Within a row, averaged over rows; None for a single concept:
    rank            effective rank of the centred concepts: exp of the entropy of the normalised
                    singular values. C - 1 is best; near 0, all concepts are one vector
    rank_share      rank / C
    participation   a second effective rank, which small directions raise less:
                    (sum of eigenvalues)^2 / sum of their squares; C - 1 is best
    duplicates      fraction of pairs of concepts with a centred cosine above 0.95; 0 is best
    cosine          mean absolute centred cosine of all pairs; low is good

    Between rows:
    rankme          effective rank over rows of the mean concept (RankMe, 2210.02885), at most
                    min(B, D); low means that all rows look alike
    rankme_slot     the same for single concepts, mean over 8 of them
    input_dependence  fraction of the concepts' variance that comes from the input, 0 to 1; near 0
                    the concepts are constants. None for a single row
    """
    B, C, D = z_BCD.shape
    result = dict.fromkeys(("rank", "rank_share", "participation", "duplicates", "cosine"))
    if C > 1:
        result |= geometry_within_rows(z_BCD)
    per_concept_CBD = evenly_spaced(z_BCD, 8).transpose(0, 1)
    result["rankme"] = effective_rank(torch.linalg.svdvals(z_BCD.mean(1))).item()
    result["rankme_slot"] = effective_rank(torch.linalg.svdvals(per_concept_CBD)).mean().item()

    by_input = z_BCD.var(0, correction=0).sum()  # how a concept varies over rows
    constant = (z_BCD.mean(0) - z_BCD.mean((0, 1))).pow(2).sum()  # how concepts differ on average
    total = (by_input + constant).item()
    result["input_dependence"] = by_input.item() / total if total and B > 1 else None
    return result


def geometry_within_rows(z_BCD):
    """The part of geometry that compares the concepts of a row; C > 1."""
    C = z_BCD.shape[1]
    # Without centring, a vector that all concepts share would dominate every number.
    centred = z_BCD - z_BCD.mean(1, keepdim=True)
    singular = torch.linalg.svdvals(centred)
    # Rounding errors of identical concepts would otherwise count as directions.
    singular = singular * (singular > 1e-5 * z_BCD.norm(dim=(1, 2))[:, None])
    eigen = singular**2
    participation = eigen.sum(-1) ** 2 / (eigen**2).sum(-1).clamp(min=1e-30)
    unit = F.normalize(centred, dim=-1)
    first, second = torch.triu_indices(C, C, offset=1)  # each pair once
    cosine = (unit @ unit.mT)[:, first, second]
    rank = effective_rank(singular).mean().item()
    return dict(rank=rank, rank_share=rank / C, participation=participation.mean().item(),
                duplicates=(cosine > 0.95).float().mean().item(),
                cosine=cosine.abs().mean().item())


def effective_rank(singular):
    """exp of the entropy of singular values (..., n) -> (...): 1 for one direction, 0 for none."""
    share = singular / singular.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.exp(entropy(share, 1e-30)) * (singular.amax(-1) > 0)


def entropy(p, smallest=1e-12):
    """Entropy in nats over the last axis; p below `smallest` is clamped in the logarithm."""
    return -(p * p.clamp(min=smallest).log()).sum(-1)


# ---- use by the decoder -------------------------------------------------------

@torch.no_grad()
def channel_use(model, batch, machine, dtype, micro_batch=32, one_by_one=False, pad_id=None):
    """Loss of a MaskedBatch, and its rise when the decoder gets other concepts -> dict, nats.

    loss        with the row's own concepts
    zeroed      rise when all concepts are 0
    shuffled    rise with the concepts of another row, half the batch away; None for a single row
    averaged    rise with the mean concepts of the batch
    one_by_one  if asked for: a list, the rise when concept c alone is 0, on the first 64 rows

    Near 0 nats: the decoder does not use what was replaced. Large is good. pad_id: see padding_of.
    """
    encoded = []
    for part in batch.inputs.split(micro_batch):
        [on_device] = machine.take([part])
        with autocast(machine.device, dtype):
            encoded.append(model.encode(on_device, is_real(on_device, pad_id)))
    concepts, tokens = (torch.cat(group) for group in zip(*encoded))
    B, C, _ = concepts.shape
    on_device = machine.take(batch)

    def loss(concepts):
        nats = total_weight = 0.0
        parts = [t[:len(concepts)].split(micro_batch) for t in (concepts, tokens, *on_device)]
        for c, x, inputs, positions, targets, weights, _ in zip(*parts):
            real = is_real(inputs, pad_id)
            with autocast(machine.device, dtype):
                states = model.decode(c, x, positions, model.documents(inputs, real), real)
                nats += model.nats(states, targets, weights).item()
            total_weight += weights.sum().item()
        return nats / max(total_weight, 1e-9)

    base = loss(concepts)
    result = dict(loss=base, zeroed=loss(torch.zeros_like(concepts)) - base, shuffled=None,
                  averaged=loss(concepts.mean(0, keepdim=True).expand_as(concepts)) - base)
    if B > 1:
        result["shuffled"] = loss(concepts.roll(B // 2, 0)) - base
    if one_by_one:
        concepts = concepts[:64]
        base = loss(concepts)
        # Row c of `others` is 1 for all concepts except c.
        others = 1 - torch.eye(C, device=concepts.device, dtype=concepts.dtype)
        result["one_by_one"] = [loss(concepts * keep[:, None]) - base for keep in others]
    return result


def summary(model, data, tok, machine, dtype, rows=64, micro_batch=32):
    """The cheap measures that training logs -> dict; {} for a model without concepts.

    concept_rank, input_dependence and duplicates are geometry's, shuffled and zeroed channel_use's.
    """
    was_training = model.training
    model.eval()
    (ids, batch), pad_id = probe_rows(data, tok, rows), padding_of(data, tok)
    result = {}
    try:
        concepts, _ = encode_rows(model, ids, machine, dtype, micro_batch, pad_id)
    except ValueError:  # NaN weights: the training loop reports them itself
        concepts = torch.empty(0, 0)
    if concepts.shape[1]:
        z = geometry(concepts)
        use = channel_use(model, batch, machine, dtype, micro_batch, pad_id=pad_id)
        result = dict(concept_rank=z["rank"], input_dependence=z["input_dependence"],
                      duplicates=z["duplicates"], shuffled=use["shuffled"], zeroed=use["zeroed"])
    model.train(was_training)
    return result


def reading(values, n_concept):
    """`summary` of a trained model -> ("good" | "watch" | "collapsed", why; "" for good).

    The bounds lie well below what trained open models reach (records/architecture, efficiency): two
    thirds of the directions, no copies, 0.6 of the variance from the text, shuffled 0.1 nats.
    """
    rank, duplicates = values["concept_rank"], values["duplicates"]  # None for a single concept
    checks = [  # value, collapsed below, good from, what is wrong
        (None if rank is None else rank / (n_concept - 1), 0.05, 0.4,
         "the concepts of a row resemble each other"),
        (None if duplicates is None else 1 - duplicates, 0.5, 0.95, "some concepts are copies"),
        (values["input_dependence"], 0.01, 0.2, "they hardly depend on the text"),
        (values["shuffled"], -math.inf, 0.03, "the decoder hardly uses them"),
    ]
    found = [(value < collapsed, why) for value, collapsed, good, why in checks
             if value is not None and value < good]
    if not found:
        return "good", ""
    level = "collapsed" if any(is_collapsed for is_collapsed, _ in found) else "watch"
    return level, ", ".join(why for _, why in found)


def describe(values, n_concept, is_trained=True):
    """`summary` as one line to print: how to read it, then the numbers with their units."""
    def number(name, form):
        return "-" if values[name] is None else format(values[name], form)

    level, why = reading(values, n_concept) if is_trained else ("untrained", "")
    return (f"concepts {level}{f' ({why})' if why else ''}: effective rank "
            f"{number('concept_rank', '.3g')} of at most {n_concept - 1}, "
            f"{number('duplicates', '.0%')} duplicate pairs, "
            f"{number('input_dependence', '.0%')} of the variance from the text, loss "
            f"{number('shuffled', '+.3f')} nats with another row's concepts, "
            f"{number('zeroed', '+.3f')} without")


# ---- attention ----------------------------------------------------------------

@torch.no_grad()
def attention(model, ids, positions, machine, dtype, pad_id=None):
    """Attention weights of one forward pass of ids (B,T), decoded at positions (B,K).

    pad_id: see padding_of.

    -> read: for each layer (B,H,C,T), concepts reading tokens; decode: for each decoder block
    (B,H,K,C), predicted positions reading concepts. float32 on the CPU. Fused attention returns no
    weights, so hooks compute them again from the inputs of the attention modules.
    """
    caught = {"read": [], "decode": []}

    def catch(kind):
        def hook(module, inputs):
            caught[kind].append(attention_weights(module, *inputs).float().cpu())
        return hook

    hooks = [module.register_forward_pre_hook(catch("read")) for module in readers(model)]
    hooks += [module.register_forward_pre_hook(catch("decode"))
              for module in decode_readers(model)]
    try:
        with autocast(machine.device, dtype):
            ids, positions = machine.take([ids, positions])
            real = is_real(ids, pad_id)
            concepts, tokens = model.encode(ids, real)
            model.decode(concepts, tokens, positions, model.documents(ids, real), real)
    finally:
        for hook in hooks:
            hook.remove()
    return caught["read"], caught["decode"]


def readers(model):
    """The modules in which the concepts of a ConceptEncoder read tokens, in order."""
    return [layer.read for layer in model.layers]


def decode_readers(model):
    """The modules in which predicted positions read concepts."""
    if isinstance(model.decoder, StrictDecoder):
        return [model.decoder]
    return [block["read"] for block in model.decoder.blocks]


def attention_weights(module, x_BQD, y_BNE, mask=None, words=None, owner_BN=None, visible=None):
    """The softmax of an attention module of model.py, from the inputs of its forward. (B,H,Q,N).

    Rows sum to 1, in a local head to 0 where nothing is near. In the heads of an OwnedAttention
    that read owned tokens only, the rows of a query that owns nothing are zero.
    """
    if isinstance(module, StrictDecoder):
        q, k, gain = x_BQD, module.k(y_BNE), None
    else:
        q, k, gain = module.q(x_BQD), module.kv(y_BNE).chunk(2, dim=-1)[0], module.gain
    q, k = split_heads(q, k, module.n_head, None, gain)
    n_owned = 0 if owner_BN is None else module.n_owned_head
    return kernels.attention_weights(q, k, mask, n_owned, owner_BN, visible)


def attention_use(read, decode):
    """Summary of `attention` over layers, heads and rows -> dict of floats and a list.

    entropy       of a concept's attention over tokens, divided by log T: 1 reads all tokens alike,
                  0 reads one token
    divergence    Jensen-Shannon divergence between the concepts of a row, divided by log C: 0, all
                  concepts read the same (collapse); 1, no two read the same token
    position      fraction of the variance of the weights that the position alone explains: near 1,
                  what a concept reads does not depend on the text
    usage         for each concept, the fraction of the decoder's attention that it gets
    usage_entropy of usage, divided by log C: 1, all concepts are used alike; 0, only one is
    unused        fraction of the concepts that get less than a tenth of 1/C; 0 is best

    divergence and usage_entropy are None for a single concept.
    """
    read = torch.stack([layer.mean(1) for layer in read])  # (layers, B, C, T), mean over heads
    # Heads restricted to owned words read nothing in rows without one: such sums are below 1.
    read = read / read.sum(-1, keepdim=True).clamp(min=1e-12)
    C, T = read.shape[2:]
    by_position = read.mean(1).var(-1, correction=0).mean()
    variance = read.var(-1, correction=0).mean().clamp(min=1e-30)
    usage = torch.stack([block.mean((0, 1, 2)) for block in decode]).mean(0)  # (C,)
    result = dict(entropy=(entropy(read).mean() / math.log(max(T, 2))).item(),
                  divergence=None, usage_entropy=None, position=(by_position / variance).item(),
                  unused=(usage < 0.1 / C).float().mean().item(), usage=usage.tolist())
    if C > 1:
        divergence = entropy(read.mean(2)) - entropy(read).mean(2)
        result["divergence"] = (divergence.mean() / math.log(C)).item()
        result["usage_entropy"] = (entropy(usage) / math.log(C)).item()
    return result


def top_tokens(read_BCT, ids_BT, tok, n=10):
    """For each concept the n ids with the largest pointwise mutual information (PMI, nats).

    PMI is log(the id's share of the concept's attention / its share of the tokens). read (B,C,T):
    attention of one layer, mean over heads. -> for each concept a list of (text, PMI, occurrences).
    Special tokens and ids with less than MIN_COUNT occurrences are left out.
    """
    B, C, T = read_BCT.shape
    types, place = ids_BT.reshape(-1).unique(return_inverse=True)
    mass = torch.zeros(C, len(types))
    mass.index_add_(1, place, read_BCT.transpose(0, 1).reshape(C, B * T))
    count = torch.bincount(place, minlength=len(types))
    attended = mass / mass.sum(1, keepdim=True)
    pmi = attended.clamp(min=1e-12).log() - (count / count.sum()).log()
    special = torch.from_numpy(tok.is_special)[types]
    pmi[:, (count < MIN_COUNT) | special] = -math.inf
    result = []
    for scores, best in zip(*pmi.topk(min(n, len(types)), dim=1)):
        kept = [(float(score), int(i)) for score, i in zip(scores, best) if score > -math.inf]
        result.append([(tok.decode([int(types[i])]), score, int(count[i])) for score, i in kept])
    return result
