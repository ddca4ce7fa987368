"""The head and the loss: states at the predicted positions -> logits over the vocabulary -> cross-entropy.

A vocabulary is the widest thing in a small model. Its logits are therefore never held for all predicted positions at
once, in no precision: the loss goes through them a chunk at a time and leaves the gradients behind as it goes.

Shapes: B rows, K predicted positions, V vocabulary, d token width, n positions of a chunk.
"""

import torch
import torch.nn.functional as F

CHUNK = {"cpu": 2**20, "cuda": 2**27}  # logits at a time: what a core's caches hold; what a GPU is busy with


def logits(states_BKd, table_Vd, said_BV=None, gate_BK=None):
    """-> (B,K,V), by the token table itself (tied). said_BV are words of the whole row, gate_BK how much they count."""
    logits_BKV = F.linear(states_BKd, table_Vd)
    return logits_BKV if said_BV is None else logits_BKV + gate_BK[..., None] * said_BV[:, None]


def cross_entropy(states_BKd, table_Vd, targets_BK, weights_BK, said_BV=None, gate_BK=None):
    """Sum over all positions of weight x nats of predicting the target, equal to that of `logits`. -> scalar, fp32.

    Matrix products run in the autocast dtype, everything else in fp32. weights_BK gets no gradient.
    """
    device = states_BKd.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_BKd.dtype
    if said_BV is None:  # rows mean nothing then: one long row makes full chunks
        states_BKd, targets_BK, weights_BK = (t.flatten(0, 1)[None] for t in (states_BKd, targets_BK, weights_BK))
    return ChunkedCrossEntropy.apply(states_BKd, table_Vd, targets_BK, weights_BK, said_BV, gate_BK, dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states_BKd, table_Vd, targets_BK, weights_BK, said_BV, gate_BK, dtype):
        device, wanted = states_BKd.device.type, any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            table, total = table_Vd.to(dtype), torch.zeros((), device=states_BKd.device)
            full = torch.promote_types(dtype, torch.float32)
            n = max(1, CHUNK.get(device, 2**24) // len(table))
            if wanted:
                d_states = torch.empty_like(states_BKd, dtype=full)
                d_table = torch.zeros_like(table_Vd, dtype=full)
                d_said = None if said_BV is None else torch.zeros_like(said_BV, dtype=full)
                d_gate = None if said_BV is None else torch.empty_like(gate_BK, dtype=full)
                kept_nV = table.new_empty(min(16 * n, targets_BK.numel() + n), len(table))
                kept_nd, filled = table.new_empty(len(kept_nV), table.shape[1]), 0
            total = total.to(full)
            for b in range(len(states_BKd)):
                for k in range(0, states_BKd.shape[1], n):
                    x, target, weight = states_BKd[b, k:k + n].to(dtype), targets_BK[b, k:k + n], weights_BK[b, k:k + n]
                    z = (x @ table.T).to(full)
                    if said_BV is not None:
                        z = z.addcmul_(gate_BK[b, k:k + n, None].to(full), said_BV[b].to(full))
                    log_p = F.log_softmax(z, dim=-1)
                    total = total - log_p.gather(1, target[:, None])[:, 0] @ weight.to(full)
                    if not wanted:
                        continue
                    d_z = log_p.exp_()  # softmax - one-hot, to be weighted
                    d_z.scatter_add_(1, target[:, None], torch.full_like(d_z[:, :1], -1.0))
                    if said_BV is not None:
                        d_gate[b, k:k + n] = (d_z @ said_BV[b].to(full)) * weight
                        d_said[b] += (gate_BK[b, k:k + n].to(full) * weight) @ d_z
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
            ctx.dtypes = [t if t is None else t.dtype for t in (states_BKd, table_Vd, said_BV, gate_BK)]
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_states, d_table, d_said, d_gate = (None if d is None else (d * d_total).to(dtype)
                                             for d, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return d_states, d_table, None, None, d_said, d_gate, None
