"""The head and the loss: states at the predicted positions -> logits over the vocabulary -> cross-entropy.

A vocabulary is the widest thing in a small model. Its logits are therefore never held for all predicted positions at
once, in no precision: the loss goes through them a chunk at a time and leaves the gradients behind as it goes.

Shapes: B rows, K predicted positions, V vocabulary, d token width, n positions of a chunk.
"""

import torch
import torch.nn.functional as F

CHUNK = {"cpu": 2**20, "cuda": 2**27}  # logits at a time: what a core's caches hold; what a GPU is busy with
BLOCK = {"cpu": 24}  # chunks that share their matrix products, for which a CPU packs the table anew each time


def logits(states_BKd, table_Vd, said_BV=None, gate_BKC=None):
    """-> (B,K,V), by the token table itself (tied), plus what is said to the row: word v counts gate v % C times."""
    logits_BKV = F.linear(states_BKd, table_Vd)
    if said_BV is None:
        return logits_BKV
    gate_BK1C, C = gate_BKC[:, :, None], gate_BKC.shape[-1]
    return torch.cat([(z + gate_BK1C[..., :z.shape[-1]] * said).flatten(2) for z, said in zip(
        dealt(logits_BKV, C), dealt(said_BV[:, None], C))], dim=2)


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
    return ChunkedCrossEntropy.apply(states_BKd, table_Vd, targets_BK, weights_BK, said_BV, gate_BKC, dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states_BKd, table_Vd, targets_BK, weights_BK, said_BV, gate_BKC, dtype):
        (B, K, d), V, device, wanted = states_BKd.shape, len(table_Vd), states_BKd.device, any(ctx.needs_input_grad)
        full, C = torch.promote_types(dtype, torch.float32), 0 if said_BV is None else gate_BKC.shape[-1]
        chunk = max(1, CHUNK.get(device.type, 2**24) // V)
        block = max(1, min(B * K, BLOCK.get(device.type, 1) * chunk))
        with torch.autocast(device.type, enabled=False):
            table = table_Vd.to(dtype)
            states_Nd, targets_N, weights_N = (t.flatten(0, 1) for t in (states_BKd, targets_BK, weights_BK.to(full)))
            total, z_block = torch.zeros((), device=device, dtype=full), table.new_empty(block, V)
            if wanted:
                d_states, d_table = torch.empty_like(states_Nd, dtype=full), None
                d_said, d_gate = (None if t is None else torch.zeros_like(t, dtype=full) for t in (said_BV, gate_BKC))
            for start in range(0, B * K, block):
                x_nd, target_n, weight_n = (t[start:start + block] for t in (states_Nd, targets_N, weights_N))
                x_nd = x_nd.to(dtype)
                z_nV = torch.mm(x_nd, table.T, out=z_block[:len(x_nd)])
                for rows, b, k in chunks(start, len(x_nd), chunk, K if C else 0):
                    z, target, weight = z_nV[rows].to(full), target_n[rows, None], weight_n[rows]
                    if C:
                        gate_n1C = gate_BKC[b, k, None].to(full)
                        for part, said in zip(dealt(z, C), dealt(said_BV[b].to(full), C)):
                            part.addcmul_(gate_n1C[..., :part.shape[-1]], said)
                    d_z = torch.softmax(z, dim=-1)
                    log_sum = z.amax(-1) - d_z.amax(-1).log()  # of exp(z): the likeliest word is far from underflow
                    total += (log_sum - z.gather(1, target)[:, 0]) @ weight
                    if not wanted:
                        continue
                    d_z.scatter_add_(1, target, torch.full_like(d_z[:, :1], -1.0))  # softmax - one-hot, to be weighted
                    if C:
                        for part, said, d_part in zip(*(dealt(t, C) for t in (d_z, said_BV[b].to(full), d_said[b]))):
                            own = slice(part.shape[-1])
                            d_gate[b, k, own] += (part * said).sum(1) * weight[:, None]
                            d_part += (part * (gate_n1C[..., own] * weight[:, None, None])).sum(0)
                    z_nV[rows] = d_z
                if wanted:
                    d_states[start:start + block] = (z_nV @ table) * weight_n[:, None]
                    d_block = z_nV.T @ (x_nd * weight_n[:, None].to(dtype))
                    d_table = d_block.to(full) if d_table is None else d_table.add_(d_block)
        if wanted:
            d_table = torch.zeros_like(table_Vd, dtype=full) if d_table is None else d_table  # no position at all
            ctx.save_for_backward(d_states.view(B, K, d), d_table, d_said, d_gate)
            ctx.dtypes = [t if t is None else t.dtype for t in (states_BKd, table_Vd, said_BV, gate_BKC)]
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_states, d_table, d_said, d_gate = (None if d is None else (d * d_total).to(dtype)
                                             for d, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return d_states, d_table, None, None, d_said, d_gate, None


def chunks(start, n, size, K):
    """Cuts n positions from `start` on into slices of up to `size`, none across rows of K positions (0: no rows).

    -> slice relative to start, row, slice within the row.
    """
    done = 0
    while done < n:
        b, k = divmod(start + done, K) if K else (0, start + done)
        step = min(size, n - done, K - k if K else n)
        yield slice(done, done + step), b, slice(k, k + step)
        done += step
