"""The head and the loss: states at the predicted positions -> logits over the vocabulary -> cross-entropy.

A vocabulary is the widest thing in a small model. Its logits are therefore never held for all predicted positions at
once, in no precision: the loss goes through them a chunk at a time and leaves the gradients behind as it goes.

Shapes: B rows, K predicted positions, V vocabulary, d token width, n positions of a chunk.
"""

import torch
import torch.nn.functional as F

CHUNK = {"cpu": 2**20, "cuda": 2**27}  # logits at a time: what a core's caches hold; what a GPU is busy with


def logits(states_BKd, table_Vd, said_BV=None, gate_BKC=None):
    """-> (B,K,V), by the token table itself (tied), plus what is said to the row: word v counts gate v % C times."""
    logits_BKV = F.linear(states_BKd, table_Vd)
    if said_BV is None:
        return logits_BKV
    owner_V = torch.arange(len(table_Vd), device=gate_BKC.device) % gate_BKC.shape[-1]
    return logits_BKV + gate_BKC[..., owner_V] * said_BV[:, None]


def dealt(t_V, C):
    """(..., V) -> views (..., V // C, C) and (..., 1, V % C): the words as they are dealt out to C owners."""
    whole = t_V.shape[-1] // C * C
    return t_V[..., :whole].unflatten(-1, (whole // C, C)), t_V[..., None, whole:]


def cross_entropy(states_BKd, table_Vd, targets_BK, weights_BK, said_BV=None, gate_BKC=None):
    """Sum over all positions of weight x nats of predicting the target, equal to that of `logits`. -> scalar, fp32.

    Matrix products run in the autocast dtype, everything else in fp32. weights_BK gets no gradient.
    """
    device = states_BKd.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_BKd.dtype
    if said_BV is None:  # rows mean nothing then: one long row makes full chunks
        states_BKd, targets_BK, weights_BK = (t.flatten(0, 1)[None] for t in (states_BKd, targets_BK, weights_BK))
    return ChunkedCrossEntropy.apply(states_BKd, table_Vd, targets_BK, weights_BK, said_BV, gate_BKC, dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states_BKd, table_Vd, targets_BK, weights_BK, said_BV, gate_BKC, dtype):
        device, wanted = states_BKd.device.type, any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            table, total = table_Vd.to(dtype), torch.zeros((), device=states_BKd.device)
            full = torch.promote_types(dtype, torch.float32)
            C = 0 if said_BV is None else gate_BKC.shape[-1]
            n = max(1, CHUNK.get(device, 2**24) // len(table))
            if wanted:
                d_states = torch.empty_like(states_BKd, dtype=full)
                d_table = torch.zeros_like(table_Vd, dtype=full)
                d_said = None if said_BV is None else torch.zeros_like(said_BV, dtype=full)
                d_gate = None if said_BV is None else torch.zeros_like(gate_BKC, dtype=full)
                kept_nV = table.new_empty(min(16 * n, targets_BK.numel() + n), len(table))
                kept_nd, filled = table.new_empty(len(kept_nV), table.shape[1]), 0
            total = total.to(full)
            for b in range(len(states_BKd)):
                for k in range(0, states_BKd.shape[1], n):
                    x, target, weight = states_BKd[b, k:k + n].to(dtype), targets_BK[b, k:k + n], weights_BK[b, k:k + n]
                    z = (x @ table.T).to(full)
                    if said_BV is not None:
                        gate_n1C = gate_BKC[b, k:k + n, None].to(full)
                        for part, said in zip(dealt(z, C), dealt(said_BV[b].to(full), C)):
                            part.addcmul_(gate_n1C[..., :part.shape[-1]], said)
                    log_p = F.log_softmax(z, dim=-1)
                    total = total - log_p.gather(1, target[:, None])[:, 0] @ weight.to(full)
                    if not wanted:
                        continue
                    d_z = log_p.exp_()  # softmax - one-hot, to be weighted
                    d_z.scatter_add_(1, target[:, None], torch.full_like(d_z[:, :1], -1.0))
                    if said_BV is not None:
                        parts = (dealt(t, C) for t in (d_z, said_BV[b].to(full), d_said[b]))
                        for part, said, d_part in zip(*parts):
                            own = slice(part.shape[-1])
                            d_gate[b, k:k + n, own] += (part * said).sum(1) * weight[:, None]
                            d_part += (part * (gate_n1C[..., own] * weight[:, None, None])).sum(0)
                    kept_nV[filled:filled + len(x)] = d_z
                    kept_nd[filled:filled + len(x)] = x * weight[:, None].to(dtype)
                    d_states[b, k:k + n] = (kept_nV[filled:filled + len(x)] @ table) * weight[:, None]
                    filled += len(x)
                    if filled > len(kept_nV) - n:
                        d_table += kept_nV[:filled].T @ kept_nd[:filled]
                        filled = 0
        if wanted:
            if filled:
                d_table += kept_nV[:filled].T @ kept_nd[:filled]
            ctx.save_for_backward(d_states, d_table, d_said, d_gate)
            ctx.dtypes = [t if t is None else t.dtype for t in (states_BKd, table_Vd, said_BV, gate_BKC)]
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_states, d_table, d_said, d_gate = (None if d is None else (d * d_total).to(dtype)
                                             for d, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return d_states, d_table, None, None, d_said, d_gate, None
