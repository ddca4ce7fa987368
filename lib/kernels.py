"""Computations that torch does slowly or with too much memory, each behind one function.

    attention               softmax attention; a faster path for bf16 on a CPU
    near_attention          the same where heads see only what is near; in windows, so O(T)
    block_attention         the same where tokens see those within a fixed distance, O(T)
    depthwise_convolution   one filter a channel; a faster gradient of the filters on a CPU
    long_convolution        filters as long as the row, by Fourier transforms, O(T log T)
    cross_entropy           loss over a large vocabulary without ever holding all logits

Each has a reference of a few lines beside it, `NAME_reference`: that is what it computes, and the
tests compare values and gradients with it. Read the references and skip the rest, unless you work
on speed (records/speed has the measurements). Beside them `States`, a tensor that keeps what the
lexicon knows when positions are selected from it.

Shapes: B rows, T tokens, K predicted positions, V vocabulary, d token width, C concepts, H heads,
Q queries, N keys, e width of a head, m channels, n positions of a chunk.
"""

import torch
import torch.nn.functional as F

# ---- attention ----------------------------------------------------------------


def attention_reference(q_BHQe, k_BHNe, v_BHNe, mask=None):
    """softmax(q k^T / sqrt(e)) v.

    mask, broadcastable to (B,H,Q,N): bool, True = may read, or float, added to the scores.
    """
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q_BHQe.dtype)
    return F.scaled_dot_product_attention(q_BHQe, k_BHNe, v_BHNe, attn_mask=mask)


def attention(q_BHQe, k_BHNe, v_BHNe, mask=None):
    """attention_reference -> (B,H,Q,e). mask: also a Near or a Visible."""
    q, k, v = q_BHQe, k_BHNe, v_BHNe
    if isinstance(mask, Near):
        return near_attention(q, k, v, mask)
    if isinstance(mask, Visible):
        return visible_attention(q, k, v, mask)
    if not is_slow_when_fused(q, k):
        return attention_reference(q, k, v, mask)
    return masked((q * q.shape[-1] ** -0.5) @ k.mT, mask).softmax(-1) @ v


def is_slow_when_fused(q, k):
    """On a CPU in bf16 torch's fused kernel takes twice as long as plain products (records/speed).

    Plain products hold Q x N scores, so they are used only where one of the two sides is short.
    """
    is_cpu_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return is_cpu_bf16 and min(q.shape[2], k.shape[2]) <= 512


def masked(scores, mask):
    """Scores (B,H,Q,N) with the mask of attention_reference applied."""
    if mask is None:
        return scores
    if mask.is_floating_point():
        return scores + mask.to(scores.dtype)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def softmax_weights(scores_BHQN, mask=None):
    """The weights with which attention reads, from scores in fp32; mask as there. -> (B,H,Q,N)."""
    if isinstance(mask, Visible):
        mask = mask.dense
    if not isinstance(mask, Near):
        return masked(scores_BHQN, mask).softmax(-1)
    bias_BHQN, reads_BHQ1 = mask.bias(scores_BHQN.shape[1])
    return masked(scores_BHQN, bias_BHQN).softmax(-1) * reads_BHQ1


def attention_weights(q_BHQe, k_BHNe, mask=None, n_owned=0, owner_BN=None, visible=None):
    """The weights of attention, which a fused kernel does not return. -> (B,H,Q,N) float32.

    mask as in `attention`. In the last n_owned heads, those of a model.OwnedAttention, token n is
    read by query owner[n] alone, if visible; a query that owns nothing has weights of 0 there.
    """
    scores = q_BHQe.float() @ k_BHNe.float().mT * q_BHQe.shape[-1] ** -0.5
    weights = softmax_weights(scores, mask)
    if not n_owned:
        return weights
    number_Q1 = torch.arange(scores.shape[2], device=scores.device)[:, None]
    owns = owner_BN[:, None, None] == number_Q1
    if visible is not None:
        owns = owns & visible
    owned = scores.masked_fill(~owns, torch.finfo(scores.dtype).min).softmax(-1) * owns
    return torch.cat((weights[:, :-n_owned], owned[:, -n_owned:]), dim=1)


# ---- attention in one direction, within a window, within a document ------------------


class Visible:
    """Which tokens of a row the queries may read; takes the place of a mask.

    real_BN      bool, True: a token, False: padding; None: all are tokens
    documents    numbers of the documents of queries (B,Q) and keys (B,N), which read their own
                 only; None: all read all
    causal       queries read no key that stands behind them
    window       they read keys up to so many tokens away; 0: at any distance
    place_BQ     where the queries stand among the keys, int64 (B or 1, Q); None: the queries are
                 the keys themselves, in order

    A query that may read nothing, which only padding does, reads everything.
    """

    def __init__(self, n_key, device, real_BN=None, documents=None, causal=False, window=0,
                 place_BQ=None):
        self.n_key, self.device, self.place_BQ = n_key, device, place_BQ
        self.real_BN, self.documents = real_BN, documents
        self.causal, self.window = causal, window
        self.of_itself = place_BQ is None
        self.made = {}  # masks, made when they are first needed

    @property
    def dense(self):
        """The mask (B or 1, 1, Q or 1, N) bool, True = may read; None: all may be read."""
        if "dense" not in self.made:
            self.made["dense"] = self.make_dense()
        return self.made["dense"]

    @property
    def flex(self):
        """The same as a BlockMask of FlexAttention, which skips blocks where nothing is read."""
        if "flex" not in self.made:
            self.made["flex"] = self.make_flex()
        return self.made["flex"]

    def make_dense(self):
        parts = []
        if self.causal or self.window:
            place_N = torch.arange(self.n_key, device=self.device)
            place_BQ = place_N[None] if self.of_itself else self.place_BQ
            parts = self.by_distance(place_N - place_BQ[..., None])
        if self.documents is not None:
            of_queries, of_keys = self.documents
            parts.append(of_queries[..., None] == of_keys[:, None])
        if self.real_BN is not None:
            parts.append(self.real_BN[:, None])
        if not parts:
            return None
        mask = parts[0]
        for part in parts[1:]:
            mask = mask & part
        if self.real_BN is not None:
            mask = mask | ~mask.any(-1, keepdim=True)
        return mask[:, None]

    def by_distance(self, away):
        """away: places of keys minus places of queries -> list of masks of its shape."""
        parts = [away <= 0] if self.causal else []
        return parts + ([away.abs() <= self.window] if self.window else [])

    def make_flex(self):
        from torch.nn.attention.flex_attention import create_block_mask

        real_BN, documents, place_BQ = self.real_BN, self.documents, self.place_BQ

        def may_read(b, h, q, k):
            place = q if place_BQ is None else place_BQ[b if len(place_BQ) > 1 else 0, q]
            allowed = k >= 0
            if self.causal:
                allowed = allowed & (k <= place)
            if self.window:
                allowed = allowed & (k - place <= self.window) & (place - k <= self.window)
            if documents is not None:
                allowed = allowed & (documents[0][b, q] == documents[1][b, k])
            if real_BN is not None:
                allowed = allowed & real_BN[b, k]
            return allowed

        batched = [t for t in (real_BN, documents and documents[0], place_BQ) if t is not None]
        B = max((len(t) for t in batched), default=1)
        Q = self.n_key if self.of_itself else place_BQ.shape[1]
        return create_block_mask(may_read, B, None, Q, self.n_key, device=self.device)


def visible_attention(q_BHQe, k_BHNe, v_BHNe, visible):
    """Attention under a Visible, by the way that costs least. -> (B,H,Q,e)."""
    q, k, v, is_plain = q_BHQe, k_BHNe, v_BHNe, visible.real_BN is None
    if visible.window or visible.documents is not None:
        # FlexAttention is a kernel in compiled models only; otherwise it would hold all scores.
        if q.is_cuda and torch.compiler.is_compiling():
            return flex_attention(q, k, v, visible)
    if visible.of_itself and visible.window and k.shape[2] >= 4 * visible.window:
        return block_attention(q, k, v, visible)
    is_only_causal = visible.causal and not visible.window and visible.documents is None
    if is_only_causal and visible.of_itself and is_plain and not is_slow_when_fused(q, k):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention(q, k, v, visible.dense)


def flex_attention(q_BHQe, k_BHNe, v_BHNe, visible):
    """visible_attention as one kernel; in eager mode it holds all scores."""
    from torch.nn.attention.flex_attention import flex_attention as attend

    return attend(q_BHQe, k_BHNe, v_BHNe, block_mask=visible.flex)


def block_attention_reference(q_BHTe, k_BHTe, v_BHTe, visible):
    """Attention under the mask `visible.dense`."""
    return attention_reference(q_BHTe, k_BHTe, v_BHTe, visible.dense)


def block_attention(q_BHTe, k_BHTe, v_BHTe, visible):
    """block_attention_reference where all tokens read within a window w: O(T w), not O(T^2).

    Blocks of w tokens read themselves and the blocks beside them.
    """
    (B, H, T, e), w = q_BHTe.shape, visible.window
    n, device = -(-T // w), q_BHTe.device
    n_beside = 2 if visible.causal else 3  # blocks that a block reads

    def in_blocks(t_BHTe):
        """(B,H,T,e) -> (B,H,n,n_beside w,e): each block with those beside it."""
        padded = F.pad(t_BHTe, (0, 0, w, n * w - T + w))
        blocks = padded.unflatten(2, (n + 2, w))
        return torch.cat([blocks[:, :, i:i + n] for i in range(n_beside)], dim=3)

    place_nq = torch.arange(n * w, device=device).view(n, w)
    place_nk = place_nq[:, :1] - w + torch.arange(n_beside * w, device=device)
    away = place_nk[:, None] - place_nq[..., None]
    mask = ((place_nk >= 0) & (place_nk < T))[:, None]
    for part in visible.by_distance(away):
        mask = mask & part
    mask = mask[None]  # (B or 1, n, w, n_beside w)
    index = place_nk.clamp(0, T - 1).flatten()
    if visible.documents is not None:
        documents_BT = visible.documents[1]
        of_keys = documents_BT[:, index].view(-1, n, 1, n_beside * w)
        of_queries = documents_BT[:, place_nq.clamp(max=T - 1).flatten()].view(-1, n, w, 1)
        mask = mask & (of_queries == of_keys)
    if visible.real_BN is not None:
        mask = mask & visible.real_BN[:, index].view(-1, n, 1, n_beside * w)
    mask = mask | ~mask.any(-1, keepdim=True)  # padding, whose answers nobody reads
    q = F.pad(q_BHTe, (0, 0, 0, n * w - T)).reshape(B, H * n, w, e)
    k, v = (in_blocks(t).reshape(B, H * n, n_beside * w, e) for t in (k_BHTe, v_BHTe))
    mask = mask[:, None].expand(-1, H, -1, -1, -1).flatten(1, 2)  # heads and blocks are one axis
    return attention(q, k, v, mask).view(B, H, n * w, e)[:, :, :T]


# ---- attention to what is near --------------------------------------------------

HIDDEN = -3e4  # as a score: nothing is left of it after a softmax, and it fits fp16


class Near:
    """Where the queries and keys of an attention stand in a row; takes the place of its mask.

    slopes, offsets: of each head, offsets in strides. Where a slope is above 0, the head is local:
    its scores get -slope x |distance / stride - offset|, and what is further than `reach` strides
    from the offset is not read. The local heads come first. The others read all that is visible.

    place_BQ, place_BN: of queries and keys, in tokens. stride (B,1,1), (B,Q,1) or (B,1,N), in
    tokens. B may be 1 in all three. Distances count from query to key. visible, bool (B,1,1 or
    Q,N): True = may be read; None: all may.

    window: (number of queries in a block, number of keys that a block may read), or None. With it
    near_attention goes through blocks, for which queries and keys must stand in order, with a
    stride (B,1,1) and visible (B,1,1,N).
    """

    def __init__(self, slopes, offsets, reach, place_BQ, place_BN, stride, visible=None,
                 window=None):
        self.n_local, self.reach = sum(slope > 0 for slope in slopes), reach
        device, self.farthest = place_BN.device, max(map(abs, offsets)) + reach
        self.slope_H, self.offset_H = (
            torch.tensor(numbers, device=device) for numbers in (slopes, offsets))
        self.place_BQ, self.place_BN, self.stride = place_BQ, place_BN, stride
        self.visible, self.window = visible, window
        # once for all layers
        if window is None:
            self.scores = self.of_places(place_BQ[:, None], place_BN[:, None], stride, visible)
        else:
            self.find_windows()

    def of_places(self, place_BnQ, place_BnN, stride, visible):
        """For n blocks of places and visible (B,n,1 or Q,N) -> what is added to their scores
        (B,H,n,Q,N), and (B,H,n,Q,1): 0 where a query has nothing to read, otherwise 1.
        """
        slope, offset = (t[:, None, None, None] for t in (self.slope_H, self.offset_H))
        away_BnQN = (place_BnN[..., None, :] - place_BnQ[..., None]) / stride[:, None]
        far = (away_BnQN[:, None] - offset).abs()
        hidden = (far > self.reach) & (slope > 0)
        if visible is not None:
            hidden = hidden | ~visible[:, None]
        reads = ~hidden.all(-1, keepdim=True)
        return (-slope * far).masked_fill(hidden, HIDDEN), reads

    def find_windows(self):
        """Sets scores as of_places gives them, and index (B,n*keys), the keys that each reads."""
        n_query, n_key = self.window
        Q, N, device = self.place_BQ.shape[1], self.place_BN.shape[1], self.place_BN.device
        n = -(-Q // n_query)
        query_n = torch.arange(n * n_query, device=device).clamp(max=Q - 1)
        place_Bnq = self.place_BQ[:, query_n].unflatten(1, (n, n_query))
        start_Bn = place_Bnq[..., 0] - self.farthest * self.stride[..., 0]
        place_BN = self.place_BN.expand(len(start_Bn), -1).to(start_Bn.dtype).contiguous()
        first_Bn = torch.searchsorted(place_BN, start_Bn.contiguous()).clamp(max=N - n_key)
        self.index = (first_Bn[..., None] + torch.arange(n_key, device=device)).flatten(1)
        seen = self.visible
        if seen is not None:
            seen, index = seen[:, 0, 0], self.index
            B = max(len(seen), len(index))
            seen = seen.expand(B, -1).gather(1, index.expand(B, -1)).view(B, n, 1, n_key)
        place_Bnk = place_BN.gather(1, self.index).unflatten(1, (n, n_key))
        self.scores = self.of_places(place_Bnq, place_Bnk, self.stride, seen)

    def bias(self, n_head):
        """All scores (B,H,Q,N) of the first heads, and whether they read, (B,H,Q,1)."""
        scores = self.scores
        if self.window:
            scores = self.of_places(
                self.place_BQ[:, None], self.place_BN[:, None], self.stride, self.visible)
        return [t[:, :n_head, 0] for t in scores]


def near_attention_reference(q_BHQe, k_BHNe, v_BHNe, near):
    """Attention with what `near` adds to the scores. What has nothing to read reads zero."""
    bias_BHQN, reads_BHQ1 = near.bias(q_BHQe.shape[1])
    return attention(q_BHQe, k_BHNe, v_BHNe, bias_BHQN) * reads_BHQ1


def near_attention(q_BHQe, k_BHNe, v_BHNe, near):
    """near_attention_reference -> (B,H,Q,e). With a window, local heads cost O(Q), not O(Q N)."""
    if near.window is None:
        return near_attention_reference(q_BHQe, k_BHNe, v_BHNe, near)
    n_local = min(near.n_local, q_BHQe.shape[1])
    local, others = zip(*(t.split((n_local, t.shape[1] - n_local), 1)
                          for t in (q_BHQe, k_BHNe, v_BHNe)))
    read_BHQe = window_attention(*local, near)
    if others[0].shape[1]:
        read_BHQe = torch.cat((read_BHQe, attention(*others, near.visible)), dim=1)
    return read_BHQe


def window_attention(q_BHQe, k_BHNe, v_BHNe, near):
    """near_attention of local heads. Heads and blocks become one axis of more heads."""
    (B, H, Q, e), (n_query, n_key) = q_BHQe.shape, near.window
    bias, reads = (t[:, :H].flatten(1, 2) for t in near.scores)
    q = F.pad(q_BHQe, (0, 0, 0, -Q % n_query)).reshape(B, -1, n_query, e)
    index = near.index[:, None, :, None].expand(B, H, -1, e)
    k, v = (t.gather(2, index).view(B, -1, n_key, e) for t in (k_BHNe, v_BHNe))
    read = attention(q, k, v, bias) * reads
    return read.view(B, H, -1, e)[:, :, :Q]


# ---- depthwise convolution ------------------------------------------------------


def depthwise_convolution_reference(u_BTm, taps):
    """taps (m, odd number of tokens): one filter a channel, zeros beyond both ends. -> (B,T,m)."""
    half = taps.shape[1] // 2
    return F.conv1d(u_BTm.mT, taps[:, None], padding=half, groups=len(taps)).mT


def depthwise_convolution(u_BTm, taps):
    """depthwise_convolution_reference -> (B,T,m)."""
    return DepthwiseConvolution.apply(u_BTm, taps)


class DepthwiseConvolution(torch.autograd.Function):
    """On a CPU torch's own gradient of the taps takes 2 to 7 times as long as this one."""

    @staticmethod
    def forward(ctx, u_BTm, taps):
        ctx.save_for_backward(u_BTm, taps)
        return convolve_channels_last(u_BTm, taps)

    @staticmethod
    def backward(ctx, d_BTm):
        (u_BTm, taps), (B, T, m) = ctx.saved_tensors, d_BTm.shape
        half = taps.shape[1] // 2
        padded = F.pad(u_BTm, (0, 0, half, half))
        d_taps = torch.zeros_like(taps, dtype=torch.promote_types(taps.dtype, torch.float32))
        # On a CPU go through the row in pieces that fit a core's cache.
        step = T if d_BTm.is_cuda else max(1, 2**18 // (B * m))
        for t in range(0, T, step):
            d = d_BTm[:, t:t + step]
            for j in range(taps.shape[1]):
                product = padded[:, t + j:t + j + d.shape[1]] * d
                d_taps[:, j] += product.sum((0, 1), dtype=d_taps.dtype)
        return convolve_channels_last(d_BTm, taps.flip(1)), d_taps.to(taps.dtype)


def convolve_channels_last(u_BTm, taps):
    """As a 1 x T image in channels-last layout: no copy, twice as fast as conv1d on a CPU."""
    image = u_BTm[:, None].permute(0, 3, 1, 2)
    half = taps.shape[1] // 2
    y = F.conv2d(image, taps[:, None, None], padding=(0, half), groups=len(taps))
    return y.permute(0, 2, 3, 1)[:, 0]


# ---- long convolution -------------------------------------------------------------


def long_convolution_reference(u_BTd, before_Td, behind_Td=None):
    """y[t] = sum_j before[j] u[t - j] + sum_j behind[j] u[t + j], zeros beyond the row. (B,T,d)."""
    T = u_BTd.shape[1]
    place = torch.arange(T, device=u_BTd.device)
    away = place[:, None] - place
    matrix_TTd = before_Td[away.clamp(min=0)] * (away >= 0)[..., None]
    if behind_Td is not None:
        matrix_TTd = matrix_TTd + behind_Td[(-away).clamp(min=0)] * (away <= 0)[..., None]
    return torch.einsum("tsd,bsd->btd", matrix_TTd, u_BTd)


def long_convolution(u_BTd, before_Td, behind_Td=None):
    """long_convolution_reference in fp32 (or float64), O(T log T)."""
    if u_BTd.shape[1] == 1:
        return u_BTd * (before_Td if behind_Td is None else before_Td + behind_Td)
    return LongConvolution.apply(u_BTd, before_Td, behind_Td)


def transform_length(T):
    """Numbers of a Fourier transform that convolves two rows of T without meeting itself."""
    # a power of two, the fastest length everywhere
    return 1 << (2 * T - 1).bit_length()


# Numbers in the transforms that are computed together, on a CPU: they stay in a core's cache.
GROUP = 2**20


class LongConvolution(torch.autograd.Function):
    """Saves its inputs and not their transforms, which are complex and twice as long.

    Works channels first and in groups of channels: that order is the faster one.
    """

    @staticmethod
    def forward(ctx, u_BTd, before_Td, behind_Td):
        ctx.save_for_backward(u_BTd, before_Td, behind_Td)
        N = transform_length(u_BTd.shape[1])
        u_BdT, k_dT, behind_dT = map(channels_first, (u_BTd, before_Td, behind_Td))
        y_BdT = empty_channels(u_BdT)
        for group in channel_groups(u_BdT, N):
            kernel = kernel_transform(k_dT, behind_dT, group, N)
            product = torch.fft.rfft(u_BdT[:, group], N) * kernel
            y_BdT[:, group] = torch.fft.irfft(product, N)[..., :u_BTd.shape[1]]
        return reorder(y_BdT.mT, torch.empty_like(u_BTd, dtype=y_BdT.dtype))

    @staticmethod
    def backward(ctx, d_BTd):
        inputs = ctx.saved_tensors
        T, N = d_BTd.shape[1], transform_length(d_BTd.shape[1])
        d_y_BdT, u_BdT, k_dT, behind_dT = map(channels_first, (d_BTd, *inputs))
        d_u_BdT, d_k_dT = empty_channels(u_BdT), empty_channels(k_dT)
        d_behind_dT = None if behind_dT is None else empty_channels(behind_dT)
        for group in channel_groups(u_BdT, N):
            d_y = torch.fft.rfft(d_y_BdT[:, group], N)
            kernel = kernel_transform(k_dT, behind_dT, group, N)
            d_u_BdT[:, group] = torch.fft.irfft(d_y * kernel.conj(), N)[..., :T]
            # lag j of a kernel: the sum of d_y[t] u[t - j] over all rows
            product = (d_y * torch.fft.rfft(u_BdT[:, group], N).conj()).sum(0)
            lags_dN = torch.fft.irfft(product, N)
            d_k_dT[group] = lags_dN[:, :T]
            if behind_dT is not None:  # lag -j
                d_behind_dT[group, 0] = lags_dN[:, 0]
                d_behind_dT[group, 1:] = lags_dN[:, N - T + 1:].flip(1)
        d_u_BTd = reorder(d_u_BdT.mT, torch.empty_like(inputs[0]))
        return d_u_BTd, *(None if x is None else d.mT.to(x.dtype)
                          for d, x in zip((d_k_dT, d_behind_dT), inputs[1:]))


def channels_first(x):
    """(..., T, d) -> (..., d, T) in fp32 (or float64); None stays None."""
    if x is None or (x.mT.is_contiguous() and x.dtype in (torch.float32, torch.float64)):
        return x if x is None else x.mT
    return reorder(x, empty_channels(x.mT).mT).mT


def reorder(x_BTd, out_BTd):
    """Copies between tokens first and channels first -> out."""
    # a few tokens at a time: a CPU's cache holds all their channels while they change places
    step = x_BTd.shape[-2] if x_BTd.is_cuda else 1024
    for start in range(0, x_BTd.shape[-2], step):
        tokens = slice(start, start + step)
        out_BTd[..., tokens, :] = x_BTd[..., tokens, :]
    return out_BTd


def empty_channels(x):
    """Of the shape of x (..., d, T), for channels first."""
    # Transforms in half precision fail on a CPU, and on a GPU at most lengths.
    full = torch.promote_types(x.dtype, torch.float32)
    # With a power of two from one channel to the next, all channels of a token would compete for
    # the same few places of a CPU's cache, and to reorder them would take five times as long.
    T = x.shape[-1]
    return torch.empty(*x.shape[:-1], T + 16, dtype=full, device=x.device)[..., :T]


def channel_groups(u_BdT, N):
    """-> slices of channels, each with at most GROUP numbers in its transforms; a GPU takes all."""
    B, d, _ = u_BdT.shape
    size = d if u_BdT.is_cuda else max(1, GROUP // (B * N))
    return [slice(start, start + size) for start in range(0, d, size)]


def kernel_transform(before_dT, behind_dT, group, N):
    """Of both kernels of a group of channels at once: lag -j of a circle of N stands at N - j."""
    if behind_dT is None:
        return torch.fft.rfft(before_dT[group], N)
    before, behind = before_dT[group], behind_dT[group]
    both = F.pad(before, (0, N - before.shape[1]))
    both[:, 0] += behind[:, 0]
    both[:, N - before.shape[1] + 1:] = behind[:, 1:].flip(1)
    return torch.fft.rfft(both)


# ---- logits and cross-entropy -----------------------------------------------------


def logits(states_BKd, table_Vd, row_logits_BV=None, gate_BKC=None):
    """Logits (B,K,V) of the tied head: states times the token table.

    row_logits (B,V) and gate (B,K,C), of the lexicon: gate[..., v % C] * row_logits[v] is added to
    the logit of word v. Row logits are the same at all positions of a row, the gate is not.
    """
    logits_BKV = F.linear(states_BKd, table_Vd)
    if row_logits_BV is None:
        return logits_BKV
    C = gate_BKC.shape[-1]
    owner_V = torch.arange(len(table_Vd), device=table_Vd.device) % C
    return logits_BKV + gate_BKC[..., owner_V] * row_logits_BV[:, None]


def cross_entropy_reference(states_BKd, table_Vd, targets_BK, weights_BK, *lexicon):
    """-> sum over all positions of weight x nats of predicting the target, and the nats (B,K)."""
    logits_NV = logits(states_BKd, table_Vd, *lexicon).flatten(0, 1)
    nats_N = F.cross_entropy(logits_NV, targets_BK.flatten(), reduction="none")
    nats_BK = nats_N.view(targets_BK.shape)
    return (nats_BK * weights_BK).sum(), nats_BK.detach()


def cross_entropy(states_BKd, table_Vd, targets_BK, weights_BK, row_logits_BV=None, gate_BKC=None):
    """cross_entropy_reference, in fp32. No gradient for weights_BK, none from the nats (B,K).

    Matrix products run in the autocast dtype, everything else in fp32.
    """
    device = states_BKd.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else states_BKd.dtype
    return ChunkedCrossEntropy.apply(
        states_BKd, table_Vd, targets_BK, weights_BK, row_logits_BV, gate_BKC, dtype)


# Logits in a chunk: on a CPU they fit the cache of a core, on a GPU they keep it busy.
CHUNK = {"cpu": 2**20, "cuda": 2**27}
# Chunks that share one matrix product: a CPU rearranges the whole table for each product.
BLOCK = {"cpu": 24}


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients together, a chunk of positions at a time.

    The logits of all positions would be the largest tensor of a small model by far. Here a chunk's
    logits are turned into their gradient (softmax minus one-hot) in place, and that at once into
    the gradients of states and table; backward only multiplies these by the incoming gradient.
    """

    @staticmethod
    def forward(ctx, states_BKd, table_Vd, targets_BK, weights_BK, row_logits_BV, gate_BKC, dtype):
        (B, K, d), V, device = states_BKd.shape, len(table_Vd), states_BKd.device
        wanted = any(ctx.needs_input_grad)
        has_lexicon = row_logits_BV is not None
        C = gate_BKC.shape[-1] if has_lexicon else 0
        full = torch.promote_types(dtype, torch.float32)
        chunk = max(1, CHUNK.get(device.type, 2**24) // V)
        block = max(1, min(B * K, BLOCK.get(device.type, 1) * chunk))
        with torch.autocast(device.type, enabled=False):
            table = table_Vd.to(dtype)
            states_Nd, targets_N = states_BKd.flatten(0, 1), targets_BK.flatten()
            weights_N = weights_BK.to(full).flatten()
            total = torch.zeros((), device=device, dtype=full)
            nats_N = torch.empty_like(weights_N)
            z_block = table.new_empty(block, V)
            d_table = d_row_logits = d_gate = None
            if wanted:
                d_states = torch.empty_like(states_Nd, dtype=full)
                if has_lexicon:
                    d_row_logits = torch.zeros_like(row_logits_BV, dtype=full)
                    d_gate = torch.zeros_like(gate_BKC, dtype=full)
            for start in range(0, B * K, block):
                in_block = slice(start, start + block)
                target_n, weight_n = targets_N[in_block], weights_N[in_block]
                x_nd = states_Nd[in_block].to(dtype)
                z_nV = torch.mm(x_nd, table.T, out=z_block[:len(x_nd)])
                # With a lexicon a chunk must not cross rows, because each row has its own logits.
                for rows, b, k in chunks(start, len(x_nd), chunk, K if has_lexicon else 0):
                    z, target, weight = z_nV[rows].to(full), target_n[rows, None], weight_n[rows]
                    if has_lexicon:
                        gate_n1C = gate_BKC[b, k, None].to(full)
                        row_logits = by_owner(row_logits_BV[b].to(full), C)
                        for part, added in zip(by_owner(z, C), row_logits):
                            part.addcmul_(gate_n1C[..., :part.shape[-1]], added)
                    d_z = torch.softmax(z, dim=-1)
                    # log of the sum of exp(z), from the likeliest word, which is far from underflow
                    log_sum = z.amax(-1) - d_z.amax(-1).log()
                    nats = log_sum - z.gather(1, target)[:, 0]
                    nats_N[in_block][rows] = nats
                    total += nats @ weight
                    if not wanted:
                        continue
                    d_z.scatter_add_(1, target, torch.full_like(d_z[:, :1], -1.0))
                    if has_lexicon:
                        weight_n11 = weight[:, None, None]
                        parts = zip(by_owner(d_z, C), row_logits, by_owner(d_row_logits[b], C))
                        for part, added, d_added in parts:
                            owners = slice(part.shape[-1])
                            d_gate[b, k, owners] += (part * added).sum(1) * weight[:, None]
                            d_added += (part * (gate_n1C[..., owners] * weight_n11)).sum(0)
                    z_nV[rows] = d_z
                if wanted:
                    d_states[in_block] = (z_nV @ table) * weight_n[:, None]
                    d_block = z_nV.T @ (x_nd * weight_n[:, None].to(dtype))
                    d_table = d_block.to(full) if d_table is None else d_table.add_(d_block)
        if wanted:
            if d_table is None:  # there was no position at all
                d_table = torch.zeros_like(table_Vd, dtype=full)
            ctx.save_for_backward(d_states.view(B, K, d), d_table, d_row_logits, d_gate)
            inputs = (states_BKd, table_Vd, row_logits_BV, gate_BKC)
            ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        nats_BK = nats_N.view(B, K)
        ctx.mark_non_differentiable(nats_BK)
        return total, nats_BK

    @staticmethod
    def backward(ctx, d_total, _):
        d_states, d_table, d_row_logits, d_gate = (
            None if d is None else (d * d_total).to(dtype)
            for d, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return d_states, d_table, None, None, d_row_logits, d_gate, None


def by_owner(t_V, C):
    """(..., V) -> two views in which the last axis is the owner v % C: (..., V // C, C) and the
    rest (..., 1, V % C), because V need not be a multiple of C."""
    whole = t_V.shape[-1] // C * C
    return t_V[..., :whole].unflatten(-1, (whole // C, C)), t_V[..., None, whole:]


def chunks(start, n, size, K):
    """Cuts n positions from `start` on into slices of up to `size`, none across rows of K positions
    (K = 0: there are no rows). -> slice relative to start, row, slice within the row.
    """
    done = 0
    while done < n:
        b, k = divmod(start + done, K) if K else (0, start + done)
        step = min(size, n - done, K - k if K else n)
        yield slice(done, done + step), b, slice(k, k + step)
        done += step


# ---- states that remember their row --------------------------------------------


class States(torch.Tensor):
    """The states (B,K,D) that `decode` returns with a lexicon, and what `logits` needs beside them.

    What selects rows or positions, and what changes dtype or device, gives States again. All else
    gives a plain tensor, which `logits` refuses.
    """
    # lexicon_state: (content of the concepts of R rows (R,C,E), gate of each state (...,C))
    # row: which of the R rows each state is from, int64 (...); None: states[b] are from row b
    lexicon_state = row = None

    SELECT = (torch.Tensor.__getitem__, torch.Tensor.split, torch.Tensor.chunk,
              torch.Tensor.index_select, torch.Tensor.flatten)
    CONVERT = (torch.Tensor.to, torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16,
               torch.Tensor.double, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.detach,
               torch.Tensor.clone, torch.Tensor.contiguous)

    @classmethod
    def of(cls, states, lexicon_state, row=None):
        if not torch.compiler.is_exporting():  # torch.export follows plain tensors only
            states = states.as_subclass(cls)
        states.lexicon_state, states.row = lexicon_state, row
        return states

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """What torch calls for every operation on States."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result, states = func(*args, **kwargs), args[0] if args else None
            if not isinstance(states, cls) or states.lexicon_state is None:
                return result
            (content_RCE, gate), row = states.lexicon_state, states.row
            if row is None:
                row = torch.arange(len(states), device=states.device)[:, None]
                row = row.expand(states.shape[:2])
            if func in cls.CONVERT:
                content_RCE, gate, row = (t.to(result.device) for t in (content_RCE, gate, row))
                return cls.of(result, (content_RCE, gate), None if states.row is None else row)
            if func not in cls.SELECT:
                return result
            parts = (result,) if isinstance(result, torch.Tensor) else result
            if any(part.shape[-1:] != states.shape[-1:] for part in parts):
                return result  # not whole states
            # the same selection of gates and rows
            gates, rows = (func(t, *args[1:], **kwargs) for t in (gate, row[..., None]))
            if isinstance(result, torch.Tensor):
                return cls.of(result, (content_RCE, gates), rows[..., 0])
            return tuple(cls.of(part, (content_RCE, g), r[..., 0])
                         for part, g, r in zip(parts, gates, rows))


def lexicon_of(states):
    """-> (lexicon_state, row) of States. Raises ValueError for tensors that are none."""
    if getattr(states, "lexicon_state", None) is None:
        raise ValueError("these states have lost what the lexicon knows of the row: pass them "
                         "as decode returned them, or rows and positions selected from them")
    return states.lexicon_state, states.row


def one_by_one(states, table_Vd, row_logits_RV, gate, row):
    """The arguments of logits for states (...,d) of which state n is from row[n] of R rows.

    N states become (N,1,d). With row None they are (R,K,d) and stay so.
    """
    if row is not None:
        row_logits_RV = row_logits_RV[row.flatten()]
        states, gate = (t.reshape(-1, 1, t.shape[-1]) for t in (states, gate))
    return states, table_Vd, row_logits_RV, gate
