"""What both architectures are made of: attention, gated FFN, local mixer, and the loss at the predicted positions.

Shapes: B rows, T tokens, K predicted positions, Q queries, N keys, D width, d token width, V vocabulary, H heads,
e = D / H.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib import loss


class MaskedEncoder(nn.Module):
    """What every architecture shares: loss at the predicted positions only, head tied to the token table, documents.

    A subclass brings `arch` (its name in settings), `cfg`, `wte`, `_encode`, `_decode` and `flops_per_token`.
    """
    def table(self):
        """The token table in the width tokens are read in, shared by embedding and head. -> (V,d)."""
        return self.wte

    @torch.no_grad()
    def start_table(self, vectors_Vt):
        """Replaces the random start of the token table by vectors of standard deviation 1, made as small as it was."""
        self.wte.copy_(vectors_Vt * self.wte.std())

    def freeze(self, dtype=torch.float32):
        """Makes ready for use without gradients: eval(), weights in dtype, what follows from weights alone kept.

        Until train() or eval() is called the weights must not change, nor the device. -> self
        """
        return self.to(dtype).eval()

    def narrow(self, states):
        """States -> the width of the token table."""
        return states

    def encode(self, ids, attention_mask=None, added=None):
        """ids (B,T) int64, attention_mask (B,T) True or 1 = real token -> concepts (B,C,D), tokens (B,T,d).

        added (B,T,d) goes on top of the tokens' embeddings before anything reads them: segments, soft prompts.
        """
        self.check_length(ids)
        return self._encode(ids, attention_mask, self.table(), self.documents(ids), added_BTd=added)

    def decode(self, concepts, tokens, positions, documents=None, attention_mask=None):
        """What `encode` returned and positions (B,K) int64 -> states (B,K,D) at these positions.

        Pass the attention_mask that `encode` got, and with isolate_documents documents=model.documents(ids). The
        states bring along what else `logits` and `nats` need to know of the row.
        """
        if self.cfg.isolate_documents and documents is None:
            raise ValueError("isolate_documents=True: decode needs documents=model.documents(ids)")
        states, states.heard = self._decode(concepts, tokens, positions, documents, attention_mask)
        return states

    def head(self, states, heard, table_Vd):
        """What loss.py makes logits of: states in the table's width, words said to the row, how much they count."""
        return self.narrow(states), None, None

    def logits(self, states):
        """States (B,K,D) just as `decode` returned them -> (B,K,V), by the token table itself (tied)."""
        table_Vd = self.table()
        narrow_BKd, said_BV, gate_BKC = self.head(states, getattr(states, "heard", None), table_Vd)
        return loss.logits(narrow_BKd, table_Vd, said_BV, gate_BKC)

    def forward(self, ids, positions, targets, weights, total_weight=None, attention_mask=None):
        """Mean loss in nats of predicting targets (B,K) at positions (B,K) of the masked rows ids (B,T).

        weights (B,K) float, 0 for unused slots. The sum is divided by total_weight, or by the sum of the weights: pass
        the weight of the whole batch when this is one micro-batch or one rank of it, and add the results up.
        """
        self.check_length(ids)
        table_Vd, documents_BT, start = self.table(), self.documents(ids), self.shift(ids.shape[1])
        concepts, tokens = self._encode(ids, attention_mask, table_Vd, documents_BT, start)
        states_BKD, heard = self._decode(concepts, tokens, positions, documents_BT, attention_mask, start)
        nats = self._nats(states_BKD, heard, targets, weights, table_Vd)
        return nats / (weights.sum().clamp(min=1e-9) if total_weight is None else total_weight)

    def nats(self, states, targets, weights):
        """Sum of weights (B,K) x nats of predicting targets (B,K) from states as `decode` returned them. -> scalar."""
        return self._nats(states, getattr(states, "heard", None), targets, weights, self.table())

    def _nats(self, states, heard, targets, weights, table_Vd):
        narrow_BKd, said_BV, gate_BKC = self.head(states, heard, table_Vd)
        return loss.cross_entropy(narrow_BKd, table_Vd, targets, weights, said_BV, gate_BKC)

    def documents(self, ids):
        """Number of the document each token belongs to, from 0; None unless isolate_documents. EOT ends a document."""
        if not self.cfg.isolate_documents:
            return None
        is_eot = ids == self.cfg.eot_id
        return (F.pad(is_eot, (1, -1)) & ~is_eot).cumsum(1)  # a run of EOT ends one document

    def shift(self, T):
        """Where rows of T tokens begin, if an architecture learns absolute positions."""
        return 0

    def check_length(self, ids):
        T, longest = ids.shape[1], self.cfg.longest
        if T > longest:
            name = "max_length" if getattr(self.cfg, "max_length", 0) else "block_size"
            raise ValueError(f"a row of {T} tokens is longer than {name}={longest}: cut it shorter, or train a concept "
                             f"model with position=sinusoidal and max_length={T} or more")

    def num_params(self):
        return sum(p.numel() for p in self.parameters())


class Attention(nn.Module):
    """Multi-head attention of width D. x_BQD reads y_BNE under mask (broadcastable to B,H,Q,N; True = may read).

    Queries and keys are RMS-normalised per head (2302.05442), so scores stay within +-gain * sqrt(D/H) at any depth;
    gain is learned, one number a head, and 0 leaves it out. normalize: what a head has read is RMS-normalised too. The
    mean of n unlike tokens is sqrt(n) times shorter than one of them, so a head that reads widely would not be heard.
    turns: (cosines, sines) for the queries and for the keys when positions are rotary. -> (B,Q,D).
    """
    own = 0  # heads that do not read everything

    def __init__(self, D, E, cfg, gain=0.0, normalize=False):
        super().__init__()
        self.n_head, self.normalize = cfg.n_head, normalize
        self.q = nn.Linear(D, D, bias=cfg.bias)
        self.kv = nn.Linear(E, 2 * D, bias=cfg.bias)
        self.out = nn.Linear(D, D, bias=cfg.bias)
        self.gain = nn.Parameter(torch.full((cfg.n_head,), gain)) if gain else None

    def forward(self, x_BQD, y_BNE, mask=None, turns=None):
        k, v = self.kv(y_BNE).chunk(2, dim=-1)
        return self.out(attend(self.q(x_BQD), k, v, self.n_head, mask, turns, self.gain, self.normalize))

    def weights(self, x_BQD, y_BNE, mask=None, turns=None):
        """What forward's softmax computes. -> (B,H,Q,N), rows sum to 1; for looking, not for training."""
        k = self.kv(y_BNE).chunk(2, dim=-1)[0]
        return attention_weights(self.q(x_BQD), k, self.n_head, mask, turns, self.gain)


class OwnWordReading(Attention):
    """A reading of tokens, half of whose heads share the words out: each word is read by the one query that owns it.

    owner_BN in [0, Q) says which. These heads take the words themselves (words_BNE) as values, without what the tokens
    y_BNE know of their neighbours, and cost O(N), not O(Q N). A query that owns no word of the row reads zero there.
    mask here is of the shape (B,1,1,N).
    """
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = self.n_head // 2  # the last heads

    def forward(self, x_BQD, y_BNE, mask=None, words_BNE=None, owner_BN=None):
        D, e, own = x_BQD.shape[-1], x_BQD.shape[-1] // self.n_head, self.own
        rows, free = [2 * D - own * e, own * e], self.n_head - own  # keys, then values; own heads come last
        biases = (None, None) if self.kv.bias is None else self.kv.bias.split(rows)
        kv = [F.linear(*part) for part in zip((y_BNE, words_BNE), self.kv.weight.split(rows), biases)]
        k, v = torch.cat(kv, dim=-1).chunk(2, dim=-1)
        v = v.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        q, k = (t.to(v.dtype) for t in split_heads(self.n_head, self.q(x_BQD), k, None, self.gain))
        read_BHQe = torch.cat((dot_product_attention(q[:, :free], k[:, :free], v[:, :free], mask),
                               read_own(q[:, free:], k[:, free:], v[:, free:], owner_BN, mask).to(v.dtype)), dim=1)
        return self.out(F.rms_norm(read_BHQe, (e,)).transpose(1, 2).flatten(2))

    def weights(self, x_BQD, y_BNE, mask=None, words_BNE=None, owner_BN=None):
        """As Attention.weights; the rows of a query that owns nothing are zero in its own heads."""
        owned = owner_BN[:, None, None] == torch.arange(x_BQD.shape[1], device=owner_BN.device)[:, None]
        is_own = torch.arange(self.n_head, device=owner_BN.device) >= self.n_head - self.own
        may = owned | ~is_own[:, None, None]
        return super().weights(x_BQD, y_BNE, may if mask is None else may & mask).nan_to_num()


def read_own(q_BHQe, k_BHNe, v_BHNe, owner_BN, mask=None):
    """Softmax attention in which token n is seen by query owner_BN[:, n] alone: sums over tokens, no Q x N. fp32."""
    owner_B1N1, (H, e) = owner_BN[:, None, :, None], (q_BHQe.shape[1], q_BHQe.shape[3])
    score = (q_BHQe.float().gather(2, owner_B1N1.expand(-1, H, -1, e)) * k_BHNe.float()).sum(-1, keepdim=True) * e**-0.5
    share = score.clamp(-30, 30).exp()  # normalised queries and keys: beyond that, gains have gone astray
    if mask is not None:
        share = share * mask.transpose(2, 3)
    sums = torch.zeros(*q_BHQe.shape[:3], e + 1, device=q_BHQe.device)
    sums = sums.scatter_add(2, owner_B1N1.expand(-1, H, -1, e + 1),
                            torch.cat((share * v_BHNe.float(), share), dim=-1))
    return sums[..., :-1] / sums[..., -1:].clamp(min=1e-20)


def split_heads(n_head, q, k, turns=None, gain_H=None):
    """q (B,Q,D), k (B,N,D) -> (B,H,Q,e), (B,H,N,e), normalised, scaled and rotated."""
    q, k = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in (q, k))
    q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))
    q = q if gain_H is None else q * gain_H[:, None, None]
    return [rotate(t, *turn) for t, turn in zip((q, k), turns)] if turns else (q, k)


def attend(q, k, v, n_head, mask=None, turns=None, gain_H=None, normalize=False):
    """Scaled dot-product attention with QK-norm. q (B,Q,D), k and v (B,N,D) -> (B,Q,D)."""
    v = v.unflatten(-1, (n_head, -1)).transpose(1, 2)
    q, k = (t.to(v.dtype) for t in split_heads(n_head, q, k, turns, gain_H))
    read_BHQe = dot_product_attention(q, k, v, mask)
    if normalize:
        read_BHQe = F.rms_norm(read_BHQe, read_BHQe.shape[-1:])
    return read_BHQe.transpose(1, 2).flatten(2)


def dot_product_attention(q_BHQe, k_BHNe, v_BHNe, mask=None):
    """softmax(q k / sqrt(e)) v under mask (True = may read). -> (B,H,Q,e)."""
    q, k, v = q_BHQe, k_BHNe, v_BHNe
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or min(q.shape[2], k.shape[2]) > 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # torch's own kernel takes twice as long on a CPU in bf16 (records/speed); where one side is short, memory stays
    # linear in the other
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def attention_weights(q, k, n_head, mask=None, turns=None, gain_H=None):
    """The weights of `attend`, materialised. -> (B,H,Q,N)."""
    q, k = split_heads(n_head, q, k, turns, gain_H)
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1)


def rotate(x_BHNe, cos, sin):
    """Rotary positions (2104.09864): pairs (j, j + e/2) turn by an angle that grows with the position."""
    a, b = x_BHNe.chunk(2, dim=-1)
    cos, sin = cos.to(x_BHNe.dtype), sin.to(x_BHNe.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def sinusoids(positions, width, base):
    """Fixed position codes (1706.03762, section 3.5). Positions (...) -> (..., width), entries in [-1, 1]."""
    wave = torch.exp(torch.arange(0, width, 2, device=positions.device) * (-math.log(base) / width))
    angle = positions[..., None] * wave
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class GatedFFN(nn.Module):
    """GELU(a) * b with one input matrix for both (GEGLU, 2002.05202). (..., width) -> (..., width)."""
    def __init__(self, width, cfg):
        super().__init__()
        self.wi = nn.Linear(width, 2 * cfg.ffn_dim, bias=cfg.bias)
        self.out = nn.Linear(cfg.ffn_dim, width, bias=cfg.bias)

    def forward(self, x):
        a, b = self.wi(x).chunk(2, dim=-1)
        return self.out(F.gelu(a) * b)


class LocalMixer(nn.Module):
    """Gated depthwise convolution: each token sees its neighbours, O(T). x_BTd -> x_BTd; pre-norm, residual."""
    def __init__(self, cfg):
        super().__init__()
        d, self.kernel = cfg.token_width, cfg.mixer_kernel
        self.norm = norm(d, cfg)
        self.wi = nn.Linear(d, 4 * d, bias=cfg.bias)
        self.taps = nn.Parameter(torch.empty(2 * d, self.kernel))
        self.out = nn.Linear(2 * d, d, bias=cfg.bias)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x_BTd, real_BT=None, documents_BT=None):
        u, gate = self.wi(self.norm(x_BTd)).chunk(2, dim=-1)
        if real_BT is not None:
            u = u * real_BT[..., None]  # padding must look like the end of the row
        return x_BTd + self.drop(self.out(self.convolve(u, documents_BT) * F.silu(gate)))

    def convolve(self, u_BTm, documents_BT):
        """Every channel with its own taps; taps that reach into another document count as zero."""
        taps, half, T = self.taps.to(u_BTm.dtype), self.kernel // 2, u_BTm.shape[1]
        if documents_BT is None:
            return DepthwiseConvolution.apply(u_BTm, taps)
        padded, docs = F.pad(u_BTm, (0, 0, half, half)), F.pad(documents_BT, (half, half), value=-1)
        same = [docs[:, j:j + T] == documents_BT for j in range(self.kernel)]
        return sum(padded[:, j:j + T] * taps[:, j] * same[j][..., None] for j in range(self.kernel))


class DepthwiseConvolution(torch.autograd.Function):
    """u_BTm, taps (m, odd number) -> (B,T,m), ends padded with zeros. torch's gradient of the taps takes 2 to 7 times
    as long on a CPU, the more the longer the row (records/speed).
    """
    @staticmethod
    def forward(ctx, u_BTm, taps):
        ctx.save_for_backward(u_BTm, taps)
        return depthwise(u_BTm, taps)

    @staticmethod
    def backward(ctx, d_BTm):
        (u_BTm, taps), (B, T, m) = ctx.saved_tensors, d_BTm.shape
        padded = F.pad(u_BTm, (0, 0, taps.shape[1] // 2, taps.shape[1] // 2))
        d_taps = torch.zeros_like(taps, dtype=torch.promote_types(taps.dtype, torch.float32))
        step = T if d_BTm.is_cuda else max(1, 2**18 // (B * m))  # what a core's cache holds
        for t in range(0, T, step):
            d = d_BTm[:, t:t + step]
            for j in range(taps.shape[1]):
                d_taps[:, j] += (padded[:, t + j:t + j + d.shape[1]] * d).sum((0, 1), dtype=d_taps.dtype)
        return depthwise(d_BTm, taps.flip(1)), d_taps.to(taps.dtype)


def depthwise(u_BTm, taps):
    """As a 1 x T image in channels-last layout: no copy, and twice as fast as conv1d on a CPU."""
    y = F.conv2d(u_BTm[:, None].permute(0, 3, 1, 2), taps[:, None, None], padding=(0, taps.shape[1] // 2),
                 groups=len(taps))
    return y.permute(0, 2, 3, 1)[:, 0]


@torch.no_grad()
def init_matrix(name, p, n_layer):
    """Keeps the variance; branches that are added up start smaller, but never at zero. Norms stay at 1."""
    if name.endswith("taps"):
        p.normal_(0, p.shape[1] ** -0.5)
    elif p.ndim == 2:
        branch = name.endswith("out.weight") and not name.startswith("expansion")
        p.normal_(0, p.shape[1] ** -0.5 * ((2 * n_layer) ** -0.5 if branch else 1))
    elif name.endswith("bias"):
        p.zero_()


def or_else(mask, wider):
    """Bool (..., T) both: rows of `mask` that show nothing show what `wider` does."""
    return mask | (wider & ~mask.any(-1, keepdim=True))


def gather_rows(x_BTd, positions_BK):
    """-> (B,K,d), the rows of x at the positions."""
    return x_BTd.gather(1, positions_BK[..., None].expand(-1, -1, x_BTd.shape[-1]))


def too_small(cfg, **at_least):
    """Messages for the fields of a config that are below their smallest value."""
    return [f"{name}={getattr(cfg, name)}: expected {low} or more"
            for name, low in at_least.items() if getattr(cfg, name) < low]


def gain(cfg, start):
    """Learned gains of attention are for the open model: the strict presets promise a number of parameters."""
    return start if cfg.bottleneck == "open" else 0.0


def norm(width, cfg):
    return nn.LayerNorm(width, bias=cfg.bias)


def table_std(width):
    """Against a normalised state this gives logits of std 1/2: the first loss is close to ln(V)."""
    return 0.5 * width**-0.5
