"""ConceptEncoder: a fixed number of learned concept vectors reads a token sequence by
cross-attention, and a small decoder predicts the masked tokens from them.

    ids (B,T) -> token table + positions -> x_BTd
                 -> local mixers                           open only: tokens see their neighbours
    concepts (C,D) -> n_layer x [ cross-attention to x_BTd | gated FFN ] -> c_BCD
                 strict: concepts also read each other in every layer (self-attention)
    masked positions (B,K) -> decoder: read c_BCD by cross-attention -> states y_BKD
                 -> logits (B,K,V) by the token table (tied) + lexicon (open)  -> cross-entropy

Cost is O(T * C), and O(C^2) where concepts read each other: linear in T for a fixed C, or with
local heads alone. Decoder and vocabulary run at the predicted positions only.

bottleneck="strict" tests whether concepts can carry a text: token states never change and a decoder
query is a position and nothing else, so everything that is predicted has gone through the concepts.
"open" is for quality: tokens see their neighbours through a depthwise convolution, the decoder
starts from the masked token's own state, and the lexicon copies words of the row.

Four choices decide whether it trains at all; each has a test in tests/test_model.py or test_learns:
- The concepts of a strict model have places in the row (Anchors). Without, it learns little more
  than word frequencies.
- The decoder query holds the position. Without it all masks of a row get the same prediction.
- Concepts without places start far from zero (concept_std). Near zero they all read the same
  average of the tokens and stay copies of each other.
- Tokens, queries, keys and what a head has read are normalised.

The file goes in the order in which data flows: config, attention, tokens, concepts, decoders,
lexicon, and ConceptEncoder, which puts them together.

Shapes: B rows, T tokens, K predicted positions, C concepts, D concept_dim, d token width,
E width of what is read, V vocabulary, H heads, e = D / H width of a head, Q queries, N keys.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib import kernels
from lib.resonance import ResonantMixer

# A token table narrower than this is expanded: logits from it would have rank token_dim, which is
# too low for a softmax over a whole vocabulary (softmax bottleneck, 1711.03953).
EXPAND_BELOW = 64

# ---- config -------------------------------------------------------------------

@dataclass(frozen=True)
class ConceptConfig:
    """Shape of a ConceptEncoder. Impossible combinations raise ValueError, all of them at once."""
    vocab_size: int = 30522  # rows of the token table; 30,522 is BERT's
    block_size: int = 512  # longest row, in tokens
    n_layer: int = 4  # concept layers
    n_head: int = 8  # attention heads; concept_dim is divided among them
    n_concept: int = 64  # concept vectors, C
    concept_dim: int = 512  # width of a concept, D
    token_dim: int = 512  # width of the token table, 4 or more
    ffn_dim: int = 2048  # hidden width of the gated feed-forward layers
    bottleneck: str = "open"  # "open" or "strict"
    position: str = "learned"  # "learned" table or "sinusoidal" (no parameters)
    max_length: int = 0  # sinusoidal: longest row the model learns to read; 0: block_size
    bias: bool = False  # biases in linear layers and norms; the micro presets have them
    dropout: float = 0.0  # on residual branches; 0 for pretraining
    hide_masked: bool | None = None  # concepts do not read [MASK] (MAE, 2111.06377); see below
    isolate_documents: bool = False  # documents packed into one row do not see each other
    n_mixer: int = 2  # local mixer blocks (open)
    mixer_kernel: int = 7  # tokens a mixer sees, odd (open)
    resonant_mixers: bool = False  # mixers see the whole row: lib/resonance.py (open)
    n_frequency: int = 64  # oscillators of a resonant mixer
    n_decoder: int = 1  # decoder blocks (open)
    self_attention: bool = False  # concepts also read each other (open; strict always does)
    lexicon: bool = True  # concepts add logits for the words they have read (open)
    concept_std: float = 1.0  # standard deviation of the concepts at the start
    anchored: bool | None = None  # concepts have places in the row, see Anchors; None: strict only
    anchor_slope: float = 4.0  # Anchors: how local the most local head is
    local_heads: float = 0.75  # Anchors: share of the heads that are local
    time_input: bool = False  # tokens know which share of the row is [MASK], see TimeInput
    mask_id: int = -1  # id of [MASK]; needed by hide_masked and time_input
    eot_id: int = -1  # id that ends a document; needed by isolate_documents

    def __post_init__(self):
        problems = below(
            self, vocab_size=2, block_size=1, n_layer=1, n_head=1, n_concept=1, concept_dim=2,
            token_dim=4, ffn_dim=1, n_mixer=0, mixer_kernel=1, n_decoder=1, n_frequency=1)
        if not problems and self.concept_dim % self.n_head:
            divisors = [n for n in range(1, 65) if self.concept_dim % n == 0]
            problems.append(f"n_head={self.n_head} does not divide concept_dim={self.concept_dim}; "
                            f"these do: {divisors}")
        if self.bottleneck not in ("open", "strict"):
            problems.append(f"bottleneck={self.bottleneck!r}: expected 'open' or 'strict'")
        if self.position not in ("learned", "sinusoidal"):
            problems.append(f"position={self.position!r}: expected 'learned' or 'sinusoidal'")
        if self.position == "sinusoidal" and self.token_width % 2:
            problems.append("position='sinusoidal' needs an even token width, "
                            f"not {self.token_width}")
        too_short = self.max_length < self.block_size
        if self.max_length and (self.position != "sinusoidal" or too_short):
            problems.append(
                f"max_length={self.max_length}: expected block_size={self.block_size} or more, "
                "with position='sinusoidal'; a learned table has no positions beyond block_size")
        if self.mixer_kernel % 2 == 0:
            problems.append(f"mixer_kernel={self.mixer_kernel}: expected an odd number of tokens")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout}: expected 0 or more and below 1")
        if self.anchored is None:
            object.__setattr__(self, "anchored", self.bottleneck == "strict")
        if not self.anchor_slope > 0:
            problems.append(f"anchor_slope={self.anchor_slope}: expected a number above 0")
        if not 0 < self.local_heads <= 1:
            problems.append(f"local_heads={self.local_heads}: expected a share of the heads above "
                            "0, up to 1")
        if self.hide_masked is None:
            # A concept with a place reads [MASK], because it must know where something is missing.
            object.__setattr__(self, "hide_masked", self.mask_id >= 0 and not self.anchored)
        if self.resonant_mixers and self.isolate_documents:
            problems.append("resonant_mixers=True reads across documents; isolate_documents=False")
        for name in ("hide_masked", "time_input"):
            if getattr(self, name) and not 0 <= self.mask_id < self.vocab_size:
                problems.append(f"{name}=True needs mask_id, an id of the tokenizer below "
                                "vocab_size")
        if self.isolate_documents and not 0 <= self.eot_id < self.vocab_size:
            problems.append("isolate_documents=True needs eot_id, an id of the tokenizer below "
                            "vocab_size")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def longest(self):
        """The longest row the model reads, in tokens."""
        return self.max_length or self.block_size

    @property
    def token_width(self):
        """d, the width in which tokens are mixed and read: token_dim, or the expanded table's."""
        if self.token_dim < EXPAND_BELOW:
            return min(256, self.concept_dim)
        return self.token_dim

    @property
    def has_self_attention(self):
        # In the open model it made concepts more alike (records/architecture, 5).
        return self.self_attention or self.bottleneck == "strict"

    @property
    def has_lexicon(self):
        # Its logits are the same for all positions of a row, so they would cross documents.
        return self.lexicon and self.bottleneck == "open" and not self.isolate_documents

    @property
    def context_dim(self):
        """The last context_dim numbers of a concept are the lexicon's memory of contexts."""
        return max(1, self.concept_dim // 4) if self.has_lexicon else 0

    @property
    def content_dim(self):
        """The others are what the concept has read; the decoder reads only these."""
        return self.concept_dim - self.context_dim

    def gain(self, start):
        """Start of an attention's learned gain, None for no gain."""
        # Only the open model has gains: the published parameter counts of strict include none.
        return start if self.bottleneck == "open" else None


def below(cfg, **lowest):
    """Messages for the fields of a config that are below their lowest allowed value."""
    return [f"{name}={getattr(cfg, name)}: expected {low} or more"
            for name, low in lowest.items() if getattr(cfg, name) < low]


# ---- small pieces ---------------------------------------------------------------

def norm(width, cfg):
    return nn.LayerNorm(width, bias=cfg.bias)


def normalize(x):
    """LayerNorm without parameters over the last axis."""
    return F.layer_norm(x, x.shape[-1:])


def gather_rows(x_BTd, positions_BK):
    """-> (B,K,d), the rows of x at the positions."""
    return x_BTd.gather(1, positions_BK[..., None].expand(-1, -1, x_BTd.shape[-1]))


def table_std(width):
    """Against a normalised state this gives logits of std 1/2: the first loss is close to ln(V)."""
    return 0.5 * width**-0.5


@torch.no_grad()
def init_matrix(name, p, n_layer):
    """Standard start of a parameter by its name; norms keep their ones."""
    if name.endswith("taps"):
        p.normal_(0, p.shape[1] ** -0.5)
    elif p.ndim == 2:
        # Keeps the variance. The last matrix of a residual branch starts smaller, because
        # 2 * n_layer branches are added up (GPT-2), but not at zero.
        is_branch_end = name.endswith("out.weight") and not name.startswith("expansion")
        p.normal_(0, p.shape[1] ** -0.5 * ((2 * n_layer) ** -0.5 if is_branch_end else 1))
    elif name.endswith("bias"):
        p.zero_()


def check_length(ids, cfg):
    """ValueError for rows (B,T) longer than the model reads."""
    T = ids.shape[1]
    if T > cfg.longest:
        name = "max_length" if getattr(cfg, "max_length", 0) else "block_size"
        raise ValueError(
            f"a row of {T} tokens is longer than {name}={cfg.longest}: cut it shorter, or train a "
            f"concept model with position=sinusoidal and max_length={T} or more")


def number_documents(ids, eot_id, real_BT=None):
    """Number of the document each token belongs to, from 0. ids (B,T) -> (B,T) int64.

    real_BT: False for padding, which belongs to the document before it; None where all are tokens.
    """
    is_eot = ids == eot_id
    # A document begins at a token that is no EOT and follows one; a run of EOT ends one document.
    begins = F.pad(is_eot, (1, -1)) & ~is_eot
    if real_BT is not None:
        begins = begins & real_BT
    return begins.cumsum(1)


# ---- attention --------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention of width D: x_BQD reads y_BNE. -> (B,Q,D).

    gain: start of a learned factor on the scores, one number a head; None: no factor.
    normalize: RMS-normalise what each head has read.
    """
    # Queries and keys are RMS-normalised per head (2302.05442): scores stay within +-gain * sqrt(e)
    # at any depth. What a head has read is normalised because the mean of n unlike tokens is
    # sqrt(n) times shorter than one token: a head that reads widely would hardly contribute.
    n_owned_head = 0  # heads in which each token is read by one query only, see OwnedAttention

    def __init__(self, D, E, cfg, gain=None, normalize=False):
        super().__init__()
        self.n_head, self.normalize = cfg.n_head, normalize
        self.qk_norm = getattr(cfg, "qk_norm", True)  # False: a setting of the baselines
        self.q = nn.Linear(D, D, bias=cfg.bias)
        self.kv = nn.Linear(E, 2 * D, bias=cfg.bias)
        self.out = nn.Linear(D, D, bias=cfg.bias)
        self.gain = None if gain is None else nn.Parameter(torch.full((cfg.n_head,), gain))

    def forward(self, x_BQD, y_BNE, mask=None, rotary=None):
        """mask, broadcastable to (B,H,Q,N): bool, True = may read; Near, from Anchors; or Visible.
        rotary: (cos, sin) for the queries and for the keys, see rotate; None: no rotary positions.
        """
        k, v = self.kv(y_BNE).chunk(2, dim=-1)
        read_BQD = attend(self.q(x_BQD), k, v, self.n_head, mask, rotary, self.gain, self.normalize,
                          self.qk_norm)
        return self.out(read_BQD)


def attend(q, k, v, n_head, mask=None, rotary=None, gain_H=None, normalize=False, qk_norm=True):
    """Attention with normalised queries and keys. q (B,Q,D), k and v (B,N,D) -> (B,Q,D)."""
    v = v.unflatten(-1, (n_head, -1)).transpose(1, 2)
    q, k = split_heads(q, k, n_head, rotary, gain_H, qk_norm)
    read_BHQe = kernels.attention(q.to(v.dtype), k.to(v.dtype), v, mask)
    if normalize:
        read_BHQe = F.rms_norm(read_BHQe, read_BHQe.shape[-1:])
    return read_BHQe.transpose(1, 2).flatten(2)


def split_heads(q, k, n_head, rotary=None, gain_H=None, qk_norm=True):
    """q (B,Q,D), k (B,N,D) -> (B,H,Q,e), (B,H,N,e), normalised, scaled and rotated."""
    q, k = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in (q, k))
    if qk_norm:
        q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))
    if gain_H is not None:
        q = q * gain_H[:, None, None]
    if rotary is not None:
        q, k = rotate(q, *rotary[0]), rotate(k, *rotary[1])
    return q, k


def rotate(x_BHNe, cos, sin):
    """Rotary positions (2104.09864), for the baselines: scores depend on distances only."""
    # The pair (j, j + e/2) turns by an angle that grows with the position.
    a, b = x_BHNe.chunk(2, dim=-1)
    cos, sin = cos.to(x_BHNe.dtype), sin.to(x_BHNe.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class OwnedAttention(Attention):
    """The first reading of a model with a lexicon. In half of its heads each token is read by one
    query only, the concept that owns the token's id (see Lexicon); the other heads are as usual.
    """
    # The owned heads take the word itself as value (words_BNE), not the token state, which already
    # mixes in the neighbours. They cost O(N), not O(Q N). A query that owns nothing reads zero.
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.n_owned_head = self.n_head // 2  # the last heads

    def forward(self, x_BQD, y_BNE, mask, words_BNE, owner_BN, visible=None):
        """owner (B,N) int64 in [0, Q): the query that owns each token. mask as in Attention, for
        the other heads; visible (B,1,1,N) bool, for the owned ones: True = may read.
        """
        D = x_BQD.shape[-1]
        e, n_free = D // self.n_head, self.n_head - self.n_owned_head
        # The rows of kv are all keys, then all values. The owned heads come last, so the last rows
        # are their values: these are applied to the words, all other rows to the token states.
        n_word_rows = self.n_owned_head * e
        rows = [2 * D - n_word_rows, n_word_rows]
        state_weight, word_weight = self.kv.weight.split(rows)
        biases = (None, None) if self.kv.bias is None else self.kv.bias.split(rows)
        of_states = F.linear(y_BNE, state_weight, biases[0])
        of_words = F.linear(words_BNE, word_weight, biases[1])
        k, v = torch.cat((of_states, of_words), dim=-1).chunk(2, dim=-1)
        v = v.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        q, k = split_heads(self.q(x_BQD), k, self.n_head, None, self.gain)
        q, k = q.to(v.dtype), k.to(v.dtype)
        free = kernels.attention(q[:, :n_free], k[:, :n_free], v[:, :n_free], mask)
        owned = attention_by_owner(q[:, n_free:], k[:, n_free:], v[:, n_free:], owner_BN, visible)
        read_BHQe = torch.cat((free, owned.to(v.dtype)), dim=1)
        return self.out(F.rms_norm(read_BHQe, (e,)).transpose(1, 2).flatten(2))


def attention_by_owner(q_BHQe, k_BHNe, v_BHNe, owner_BN, mask=None):
    """Attention in which token n is read by query owner[n] alone. -> (B,H,Q,e) float32."""
    # One score a token, then sums over the tokens of each owner: no Q x N scores.
    H, e = q_BHQe.shape[1], q_BHQe.shape[3]
    owner_B1N1 = owner_BN[:, None, :, None]
    q_BHNe = q_BHQe.float().gather(2, owner_B1N1.expand(-1, H, -1, e))
    score_BHN1 = (q_BHNe * k_BHNe.float()).sum(-1, keepdim=True) * e**-0.5
    # Normalised queries and keys keep scores small, so no maximum is subtracted before exp. The
    # clamp is for numerical safety.
    share_BHN1 = score_BHN1.clamp(-30, 30).exp()
    if mask is not None:
        share_BHN1 = share_BHN1 * mask.transpose(2, 3)
    terms = torch.cat((share_BHN1 * v_BHNe.float(), share_BHN1), dim=-1)
    sums = torch.zeros(*q_BHQe.shape[:3], e + 1, device=q_BHQe.device)
    sums = sums.scatter_add(2, owner_B1N1.expand(-1, H, -1, e + 1), terms)
    return sums[..., :-1] / sums[..., -1:].clamp(min=1e-20)


class GatedFFN(nn.Module):
    """GELU(a) * b with one input matrix for both (GEGLU, 2002.05202). (..., width) -> same."""
    def __init__(self, width, cfg):
        super().__init__()
        self.wi = nn.Linear(width, 2 * cfg.ffn_dim, bias=cfg.bias)
        self.out = nn.Linear(cfg.ffn_dim, width, bias=cfg.bias)

    def forward(self, x):
        a, b = self.wi(x).chunk(2, dim=-1)
        return self.out(F.gelu(a) * b)


# ---- tokens -----------------------------------------------------------------------

class TableExpansion(nn.Module):
    """Makes a table of width d from token_dim numbers a token: (V,token_dim) -> (V,d)."""
    # Encoder and tied head both use the expanded table, so its rank is d and not token_dim.
    def __init__(self, cfg):
        super().__init__()
        d = cfg.token_width
        generator = torch.Generator().manual_seed(0)
        # Fixed random Fourier features (2006.10739), then two linear layers with a GELU between.
        self.register_buffer("waves", torch.randn(cfg.token_dim, d // 2, generator=generator))
        self.wi = nn.Linear(2 * (d // 2), d, bias=cfg.bias)
        self.out = nn.Linear(d, d, bias=cfg.bias)

    def forward(self, table_Vt):
        angles = table_Vt @ self.waves
        return self.out(F.gelu(self.wi(torch.cat((angles.sin(), angles.cos()), dim=-1))))


def sinusoids(positions, width, base):
    """Fixed position codes (1706.03762, section 3.5). (...) -> (..., width) in [-1, 1]."""
    steps = torch.arange(0, width, 2, device=positions.device)
    frequency = torch.exp(steps * (-math.log(base) / width))
    angle = positions[..., None] * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class TimeInput(nn.Module):
    """A vector for the share of the row that is [MASK], the time of a diffusion model. -> (B,1,d).
    """
    # Optional, because a model can tell by itself how much is masked (2409.02908).
    WIDTH = 64  # of the sinusoids

    def __init__(self, cfg):
        super().__init__()
        self.mask_id, self.scale = cfg.mask_id, table_std(cfg.token_width)
        self.out = nn.Linear(self.WIDTH, cfg.token_width, bias=cfg.bias)

    def forward(self, ids, real_BT=None):
        real_BT = torch.ones_like(ids) if real_BT is None else real_BT
        n_masked_B = (ids == self.mask_id).sum(1)
        share_B1 = (n_masked_B / real_BT.sum(1).clamp(min=1))[:, None]
        code_B1w = sinusoids(1000 * share_B1, self.WIDTH, 10_000.0)
        # At most the size of a token.
        return self.out(code_B1w.to(self.out.weight.dtype)) * self.scale


class LocalMixer(nn.Module):
    """Gated depthwise convolution: each token sees its neighbours, O(T). x_BTd -> x_BTd."""
    def __init__(self, cfg):
        super().__init__()
        d, self.kernel = cfg.token_width, cfg.mixer_kernel
        self.norm = norm(d, cfg)
        self.wi = nn.Linear(d, 4 * d, bias=cfg.bias)
        self.taps = nn.Parameter(torch.empty(2 * d, self.kernel))  # one filter a channel
        self.out = nn.Linear(2 * d, d, bias=cfg.bias)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x_BTd, real_BT=None, documents_BT=None):
        u, gate = self.wi(self.norm(x_BTd)).chunk(2, dim=-1)
        if real_BT is not None:
            u = u * real_BT[..., None]  # padding must look like the end of the row
        return x_BTd + self.drop(self.out(self.convolve(u, documents_BT) * F.silu(gate)))

    def convolve(self, u_BTm, documents_BT):
        """Depthwise convolution. Taps that reach into another document count as zero."""
        taps = self.taps.to(u_BTm.dtype)
        if documents_BT is None:
            return kernels.depthwise_convolution(u_BTm, taps)
        half, T = self.kernel // 2, u_BTm.shape[1]
        padded = F.pad(u_BTm, (0, 0, half, half))
        documents = F.pad(documents_BT, (half, half), value=-1)
        total = 0
        for j in range(self.kernel):
            same_document = (documents[:, j:j + T] == documents_BT)[..., None]
            total = total + padded[:, j:j + T] * taps[:, j] * same_document
        return total


# ---- concepts ---------------------------------------------------------------------

class ConceptLayer(nn.Module):
    """Concepts read the tokens, read each other if they may, and pass a gated FFN. Pre-norm."""
    def __init__(self, cfg, owned_heads=False):
        super().__init__()
        D = cfg.concept_dim
        reading = OwnedAttention if owned_heads else Attention
        self.read_norm = norm(D, cfg)
        self.read = reading(D, cfg.token_width, cfg, cfg.gain(2.0), normalize=True)
        self.self_attention = None
        if cfg.has_self_attention:
            self.self_norm = norm(D, cfg)
            self.self_attention = Attention(D, D, cfg, cfg.gain(1.0))
        self.ffn_norm, self.ffn = norm(D, cfg), GatedFFN(D, cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, c_BCD, x_BTd, read_mask=None, self_mask=None, *owned):
        """owned: words, owner and visible, for a layer with OwnedAttention. -> (B,C,D)."""
        read_BCD = self.read(self.read_norm(c_BCD), x_BTd, read_mask, *owned)
        c_BCD = c_BCD + self.drop(read_BCD)
        if self.self_attention is not None:
            h_BCD = self.self_norm(c_BCD)
            c_BCD = c_BCD + self.drop(self.self_attention(h_BCD, h_BCD, self_mask))
        return c_BCD + self.drop(self.ffn(self.ffn_norm(c_BCD)))


# ---- places of concepts ---------------------------------------------------------------

class Anchors:
    """Places of the concepts in the row: concept c stands at (c + 1/2) x stride tokens.

    In the first heads, the local ones, what stands far from a concept scores lower: for reading,
    self-attention and decoding, score - slope x distance / stride, as in ALiBi (2108.12409). The
    other heads are global. There are no parameters. Of a layer with owned heads (OwnedAttention)
    only the first half of the heads has anchors.

    Each local head looks at another place: the first at the concept's own, the next half a stride
    to the left and to the right, then a whole stride, and so on. So a concept knows the order of
    the tokens around it, which are all alike to one head. Slopes fall as heads look farther. Only
    in decoding all local heads look at the position's own place, so that a concept can hand on all
    that it knows of it. A local head reads nothing beyond REACH strides, so that many concepts,
    too, cost O(T).

    In a row shorter than block_size the last concepts stand behind its end. No attention reads
    those.
    """
    REACH = 6.0
    BLOCK = 16  # concepts that read from one window, see kernels.Near

    # One object serves a batch. place_BC and stride_BC are in tokens; B is 1 where all rows agree.
    # span: the longest stride, a number; None where it is not known or concepts do not stand in
    # order. standing_BC: False for concepts behind the end of their text; None: there are none.
    def __init__(self, cfg, place_BC, stride_BC, span=None, standing_BC=None):
        self.cfg, self.place_BC, self.span, self.standing_BC = cfg, place_BC, span, standing_BC
        # With more concepts than tokens hardly a token would be within reach of a true stride.
        self.stride_BC = stride_BC.clamp(min=1)

    @staticmethod
    def heads(cfg, decoding=False):
        """-> the slope and the offset in strides of each head, two lists. Global heads: slope 0."""
        n_local = max(1, round(cfg.local_heads * cfg.n_head))
        offsets = [(h + 1) // 2 * (0.5 - h % 2) for h in range(n_local)]  # 0, -1/2, 1/2, -1, 1, ...
        if decoding:
            offsets = [0.0] * n_local
        slopes = [cfg.anchor_slope / max(1.0, 2 * abs(offset)) for offset in offsets]
        n_global = cfg.n_head - n_local
        return slopes + [0.0] * n_global, offsets + [0.0] * n_global

    @classmethod
    def window(cls, cfg, span, n_key, key_span, decoding=False):
        """How many of n_key keys, which stand key_span tokens apart, some queries read together.

        -> (number of queries, of keys); None where that would not be cheaper than reading all.
        """
        if span is None:
            return None
        n_query = 1 if decoding else cls.BLOCK  # positions stand at any distance of each other
        reach = (cls.REACH + max(map(abs, cls.heads(cfg, decoding)[1]))) * max(1.0, span)
        window = int(((n_query - 1) * span + 2 * reach) / key_span) + 2
        worth = 8 if decoding else 4  # windows are copied; measured on a CPU
        return (n_query, window) if worth * window <= n_key else None

    def reading(self, n_token, visible):
        """For concepts that read tokens. visible, bool (B,1,1 or C,T): True = may read. -> Near."""
        place_1T = torch.arange(n_token, device=self.place_BC.device)[None]
        window = self.window(self.cfg, self.span, n_token, 1.0)
        return self.near(self.place_BC, place_1T, self.stride_BC[..., None], visible, window)

    def among_concepts(self, visible):
        """For concepts that read each other. visible (B,1,C,C). -> Near."""
        window = self.window(self.cfg, self.span, self.place_BC.shape[1], self.span)
        return self.near(self.place_BC, self.place_BC, self.stride_BC[..., None],
                         self.if_standing(visible), window)

    def decoding(self, positions_BK, visible):
        """For positions that read concepts. visible (B,1,K,C). -> Near."""
        window = self.window(self.cfg, self.span, self.place_BC.shape[1], self.span, decoding=True)
        return self.near(positions_BK, self.place_BC, self.stride_BC[:, None],
                         self.if_standing(visible), window, decoding=True)

    def if_standing(self, visible):
        """visible (B,1,1 or Q,C), None for all, without the concepts that do not stand."""
        if self.standing_BC is None:
            return visible
        standing_B11C = self.standing_BC[:, None, None]
        return standing_B11C if visible is None else visible & standing_B11C

    def near(self, place_BQ, place_BN, stride, visible, window, decoding=False):
        slopes, offsets = self.heads(self.cfg, decoding)
        return kernels.Near(slopes, offsets, self.REACH, place_BQ, place_BN, stride, visible,
                            window)


# ---- decoders -----------------------------------------------------------------------

class StrictDecoder(nn.Module):
    """One cross-attention: positions (B,K,D) read concepts (B,C,D). -> (B,K,D)."""
    # The values are the concepts themselves. No gated FFN follows: what is predicted at a position
    # must be there in the concepts.
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.k = nn.Linear(cfg.concept_dim, cfg.concept_dim, bias=cfg.bias)
        self.norm = norm(cfg.concept_dim, cfg)

    def forward(self, query_BKD, c_BCD, mask=None):
        return self.norm(attend(query_BKD, self.k(c_BCD), c_BCD, self.n_head, mask))


class OpenDecoder(nn.Module):
    """n_decoder blocks: masked tokens (B,K,D) read the concepts' content (B,C,E). -> (B,K,D)."""
    def __init__(self, cfg):
        super().__init__()
        D, E = cfg.concept_dim, cfg.content_dim
        self.blocks = nn.ModuleList()
        for _ in range(cfg.n_decoder):
            read = Attention(D, E, cfg, cfg.gain(2.0), normalize=True)
            self.blocks.append(nn.ModuleDict(dict(
                read_norm=norm(D, cfg), read=read, ffn_norm=norm(D, cfg), ffn=GatedFFN(D, cfg))))
        self.drop, self.norm = nn.Dropout(cfg.dropout), norm(D, cfg)

    def forward(self, y_BKD, content_BCE, mask=None):
        for block in self.blocks:
            y_BKD = y_BKD + self.drop(block["read"](block["read_norm"](y_BKD), content_BCE, mask))
            y_BKD = y_BKD + self.drop(block["ffn"](block["ffn_norm"](y_BKD)))
        return self.norm(y_BKD)


# ---- lexicon ------------------------------------------------------------------------

class Lexicon(nn.Module):
    """Adds logits for the words that occur in the row: a copy mechanism through the concepts.

    Concept c owns the ids v with v % n_concept == c (hash ownership).
    1. Reading: half of the first layer's heads read owned tokens only (OwnedAttention), so that a
       concept knows which of its V / C words the row holds.
    2. row_logits (B,V): each concept scores its own words, "does the row hold this word?".
    3. gate (B,K,C): how much the scores of each concept count at each predicted position: more
       where the position's context is like the one in which the concept met its words.
    logits[k, v] = state[k] . table[v] + gate[k, v % C] * row_logits[v]          (lib/kernels.py)
    """
    # Why: words that repeat within a row are worth 0.17 nats to a model that knows them one by one.
    # Summed up in vectors of the model's width they can no longer be told apart; with ownership
    # each concept has only V / C words to tell apart (records/architecture, 3, 7 and 9).
    # The last context_dim numbers of a concept are its context memory, the mean context of its
    # words; the others, its content, are what the decoder reads and row_logits come from.
    def __init__(self, cfg):
        super().__init__()
        self.to_words = nn.Linear(cfg.content_dim, cfg.token_width, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.threshold = nn.Parameter(torch.tensor(1.0))
        self.gate = nn.Parameter(torch.zeros(cfg.concept_dim))
        self.context = nn.Linear(cfg.token_width, cfg.context_dim, bias=False)
        self.token_weight = nn.Parameter(torch.zeros(cfg.token_width))
        self.match_bias = nn.Parameter(torch.tensor(0.0))
        self.match_scale = nn.Parameter(torch.tensor(8.0))
        self.owned_table_cache = None  # owned_table while the model is frozen
        # Rare words are worth more: log of the rank, scaled to mean 1. This takes ids to be sorted
        # by frequency, which is only roughly true for BPE.
        rank_V = torch.arange(2.0, cfg.vocab_size + 2)
        weight_V = rank_V.log() / rank_V.log().mean()
        self.register_buffer("id_weight", weight_V, persistent=False)

    def context_memory(self, x_BTd, owner_BT, n_concept, mask=None):
        """Weighted mean context of the tokens each concept owns. -> (B,C,context_dim) float32."""
        # Contexts are unit vectors: the less they agree, the shorter is their mean.
        context_BTr = F.normalize(self.context(x_BTd).float(), dim=-1)
        weight_BT1 = (x_BTd.float() @ self.token_weight.float())[..., None].clamp(-30, 30).exp()
        if mask is not None:
            weight_BT1 = weight_BT1 * mask[:, 0].mT
        terms = torch.cat((weight_BT1 * context_BTr, weight_BT1), dim=-1)
        sums = torch.zeros(x_BTd.shape[0], n_concept, terms.shape[-1], device=x_BTd.device)
        sums = sums.scatter_add(1, owner_BT[..., None].expand_as(terms), terms)
        return sums[..., :-1] / sums[..., -1:].clamp(min=1e-20)

    def gate_per_concept(self, memory_BCr, states_BKD, x_BKd):
        """How much the row logits of each concept count at each position. -> (B,K,C) float32."""
        # A gate from 0 to 2 for the whole position, plus how well its context matches the memory.
        context_BKr = F.normalize(self.context(x_BKd).float(), dim=-1)
        cosine_BKC = (context_BKr @ memory_BCr.float().mT).float()
        gate_BK1 = 2 * torch.sigmoid(states_BKD.float() @ self.gate.float())[..., None]
        match_BKC = self.match_bias + self.match_scale * (cosine_BKC - 1)
        return gate_BK1 + match_BKC.clamp(max=5).exp()  # the clamp is for numerical safety

    def row_logits(self, content_BCE, table_Vd):
        """Score of each word for being in the row, by its owner. -> (B,V) float32."""
        C, (V, d) = content_BCE.shape[1], table_Vd.shape
        query_BCd = F.layer_norm(self.to_words(content_BCE), (d,)) * self.scale
        score_CBn = (query_BCd.transpose(0, 1) @ self.owned_table(table_Vd, C).mT).float()
        # Centred, because all words of a table have a common direction.
        score_CBn = score_CBn - score_CBn.mean(-1, keepdim=True)
        score_BV = score_CBn.permute(1, 2, 0).flatten(1)[:, :V]
        return F.softplus(score_BV - self.threshold) * self.id_weight

    def owned_table(self, table_Vd, C):
        """The table by owner: row i of concept c is word C i + c. -> (C, ceil(V / C), d)."""
        # Zeros where there is no such word. No gradient. A copy, because bf16 products with the
        # strided view take ten times as long on a CPU.
        if self.owned_table_cache is not None:
            return self.owned_table_cache
        V, d = table_Vd.shape
        padded = F.pad(table_Vd.detach(), (0, 0, 0, -V % C))
        return padded.view(-1, C, d).transpose(0, 1).contiguous()


# ---- the model ------------------------------------------------------------------------

class ConceptEncoder(nn.Module):
    arch = "concept"  # its name in settings and checkpoints

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        d, D = cfg.token_width, cfg.concept_dim
        is_strict = cfg.bottleneck == "strict"
        self.wte = nn.Parameter(torch.empty(cfg.vocab_size, cfg.token_dim))
        self.expansion = TableExpansion(cfg) if cfg.token_dim < EXPAND_BELOW else None
        learned = cfg.position == "learned"
        self.wpe = nn.Parameter(torch.empty(cfg.block_size, d)) if learned else None
        self.time = TimeInput(cfg) if cfg.time_input else None
        self.concepts = nn.Parameter(torch.empty(cfg.n_concept, D))
        n_mixer = 0 if is_strict else cfg.n_mixer
        mixer = ResonantMixer if cfg.resonant_mixers else LocalMixer
        self.mixers = nn.ModuleList(mixer(cfg) for _ in range(n_mixer))
        self.layers = nn.ModuleList(
            ConceptLayer(cfg, owned_heads=cfg.has_lexicon and i == 0) for i in range(cfg.n_layer))
        self.norm = norm(D, cfg)
        self.query = nn.Identity() if d == D else nn.Linear(d, D, bias=cfg.bias)
        self.decoder = StrictDecoder(cfg) if is_strict else OpenDecoder(cfg)
        self.lexicon = Lexicon(cfg) if cfg.has_lexicon else None
        self.to_table = nn.Identity() if d == D else nn.Linear(D, d, bias=cfg.bias)
        self.table_cache = None  # the expanded table while the model is frozen
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        for name, p in self.named_parameters():
            if name == "wte":
                p.normal_(0, 1.0 if self.expansion else table_std(p.shape[1]))
            elif name == "wpe":
                p.normal_(0, table_std(p.shape[1]))
            elif name == "concepts":
                p.normal_(0, self.cfg.concept_std)
            else:
                init_matrix(name, p, self.cfg.n_layer)
                # What concepts and predicted positions read is new to them. With the usual smaller
                # start of a residual branch, learning stops at word frequencies.
                if name.endswith("read.out.weight"):
                    p.normal_(0, p.shape[1] ** -0.5)
        if self.cfg.anchored:
            # Places tell concepts apart, so they start nearly alike: what one learns of the text
            # around it holds for the others, too. So do the decoder queries of a strict model;
            # smaller than tokens, because they are also added to those.
            alike = [(self.concepts, self.cfg.concept_std)]
            if self.cfg.bottleneck == "strict" and self.wpe is not None:
                alike.append((self.wpe, 0.3 * table_std(self.wpe.shape[1])))
            for p, std in alike:
                p.copy_(std * (torch.randn_like(p[:1]) + 0.1 * torch.randn_like(p)))
        if self.expansion:  # the expanded table starts as large as a plain one would
            self.expansion.out.weight *= table_std(self.cfg.token_width) * 2

    @torch.no_grad()
    def start_table(self, vectors_Vt):
        """Starts the token table from vectors of standard deviation 1, scaled to its own size."""
        self.wte.copy_(vectors_Vt * self.wte.std())

    def blocks(self):
        """The parts that compute one after another, for lib/parallel.py."""
        return [*self.mixers, *self.layers, self.decoder]

    # ---- forward ------------------------------------------------------------------

    def forward(self, ids, positions, targets, weights, total_weight=None, attention_mask=None,
                with_nats=False):
        """The loss: mean nats of predicting targets (B,K) at positions (B,K) of masked rows (B,T).

        weights (B,K) float: what each prediction counts, 0 for unused slots. The sum is divided by
        total_weight or, without it, by the sum of the weights. When this is one micro-batch of a
        step, or one process of several, pass the weight of the whole step and add the results up.
        with_nats: also returns the nats of each prediction (B,K), without gradient.
        """
        table_Vd, start = self.table(), self.random_offset(ids.shape[1])
        concepts, tokens = self.encode(ids, attention_mask, table_Vd=table_Vd, start=start)
        states, *lexicon_state = self.read_concepts(
            concepts, tokens, positions, self.documents(ids, attention_mask), attention_mask, start)
        head = self.head(states, table_Vd, lexicon_state)
        total, nats_BK = self.cross_entropy(head, targets, weights)
        if total_weight is None:
            total_weight = weights.sum().clamp(min=1e-9)  # nothing to predict: a loss of 0, not NaN
        loss = total / total_weight
        return (loss, nats_BK) if with_nats else loss

    def encode(self, ids, attention_mask=None, added=None, table_Vd=None, start=0,
               vectors_BTd=None):
        """ids (B,T) int64 -> concepts (B,C,D), tokens (B,T,d). ValueError for rows too long.

        attention_mask (B,T): True or 1 = real token. added (B,T,d) is added to the token embeddings
        (segments, soft prompts). table_Vd: self.table() if it is there already. start: position of
        the first token. vectors_BTd: token embeddings that are read instead of the table's.
        Concepts that do not stand in the row (see `standing`) are zero or mean nothing.
        """
        check_length(ids, self.cfg)
        B, T = ids.shape
        if vectors_BTd is None:
            vectors_BTd = F.embedding(ids, self.table() if table_Vd is None else table_Vd)
        real_BT = None if attention_mask is None else attention_mask.bool()
        documents_BT = self.documents(ids, real_BT)
        visible, self_mask = self.masks(ids, real_BT, documents_BT)
        places_T = torch.arange(T, device=ids.device)
        read_mask = visible
        if self.cfg.anchored:
            anchors = self.anchors(ids, real_BT, documents_BT)
            read_mask = anchors.reading(T, visible)
            if self.cfg.has_self_attention:
                self_mask = anchors.among_concepts(self_mask)

        # Tokens: embedding and position, then their neighbours.
        x_BTd = vectors_BTd + self.position_codes(places_T + start)
        if self.time is not None:
            x_BTd = x_BTd + self.time(ids, real_BT)
        if added is not None:
            x_BTd = x_BTd + added
        x_BTd = normalize(x_BTd)
        for mixer in self.mixers:
            x_BTd = mixer(x_BTd, real_BT, documents_BT)
        read_BTd = normalize(x_BTd) if self.mixers else x_BTd

        # Concepts: they start the same for every row and read its tokens once a layer.
        owned = ()
        if self.lexicon:
            owner_BT = ids % self.cfg.n_concept
            owned = normalize(vectors_BTd), owner_BT, visible
        n_standing = self.n_standing(T)
        c_BCD = self.concepts[:n_standing].expand(B, -1, -1)
        for layer in self.layers:
            c_BCD = layer(c_BCD, read_BTd, read_mask, self_mask, *owned)
            owned = ()  # only the first layer has owned heads
        c_BCD = self.norm(c_BCD)

        # The lexicon's memory takes the place of the last numbers of each concept.
        if self.lexicon:
            memory_BCr = self.lexicon.context_memory(
                read_BTd, owner_BT, self.cfg.n_concept, visible)
            # Scaled to the size of the other numbers; decode undoes it.
            memory_BCr = (memory_BCr * self.cfg.context_dim**0.5).to(c_BCD.dtype)
            c_BCD = torch.cat((c_BCD[..., :self.cfg.content_dim], memory_BCr), dim=-1)
        if n_standing < self.cfg.n_concept:
            c_BCD = F.pad(c_BCD, (0, 0, 0, self.cfg.n_concept - n_standing))
        return c_BCD, x_BTd

    def decode(self, concepts, tokens, positions, documents=None, attention_mask=None, start=0):
        """What `encode` returned, and positions (B,K) int64 -> states (B,K,D) there.

        With isolate_documents pass documents=model.documents(ids, attention_mask). Which concepts
        stand in the row, and where, depends on the attention_mask. With a lexicon the states are
        kernels.States, which carry what it knows of the row, for `logits`.
        """
        states_BKD, *lexicon_state = self.read_concepts(
            concepts, tokens, positions, documents, attention_mask, start)
        return kernels.States.of(states_BKD, lexicon_state) if lexicon_state else states_BKD

    def read_concepts(self, concepts, tokens, positions, documents=None, attention_mask=None,
                      start=0):
        """As decode -> plain states (B,K,D); with a lexicon also content (B,C,E), gate (B,K,C)."""
        if self.cfg.isolate_documents and documents is None:
            raise ValueError("isolate_documents=True: decode needs documents=model.documents(ids, "
                             "attention_mask)")
        if self.cfg.bottleneck == "strict":
            query_BKd = self.position_codes(positions + start)  # the tokens are not looked at
        else:
            query_BKd = gather_rows(tokens, positions)
        mask = None
        if documents is not None:
            mask_BCK = self.serves(documents, documents.gather(1, positions))
            mask = mask_BCK.transpose(1, 2)[:, None]
        if self.cfg.anchored:
            real_BT = None if attention_mask is None else attention_mask.bool()
            anchors = self.anchors(tokens[..., 0], real_BT, documents)
            mask = anchors.decoding(positions, mask)
        content_BCE = concepts[:, :self.n_standing(tokens.shape[1]), :self.cfg.content_dim]
        states_BKD = self.decoder(self.query(query_BKd), content_BCE, mask)
        if not self.lexicon:
            return (states_BKD,)
        memory_BCr = concepts[..., self.cfg.content_dim:] * self.cfg.context_dim**-0.5
        gate_BKC = self.lexicon.gate_per_concept(memory_BCr, states_BKD, normalize(query_BKd))
        return states_BKD, content_BCE, gate_BKC

    def logits(self, states):
        """States (...,D) that `decode` returned, or a selection of them -> (...,V)."""
        logits = kernels.logits(*self.head_of(states))
        return logits.reshape(*states.shape[:-1], logits.shape[-1])

    def nats(self, states, targets, weights):
        """Sum of weights (B,K) x nats of predicting targets (B,K) from `decode`'s states."""
        return self.cross_entropy(self.head_of(states), targets, weights)[0]

    def cross_entropy(self, head, targets, weights):
        """As nats, and the nats of each prediction (B,K). head: what `head` returns."""
        narrow_BKd, table_Vd, *lexicon = head
        B_K = narrow_BKd.shape[:2]
        return kernels.cross_entropy(
            narrow_BKd, table_Vd, targets.reshape(B_K), weights.reshape(B_K), *lexicon)

    def head_of(self, states):
        """head, for what `decode` returned or a selection of it. Raises ValueError for others."""
        if not self.lexicon:
            return self.head(states, self.table())
        return self.head(states, self.table(), *kernels.lexicon_of(states))

    def head(self, states, table_Vd, lexicon_state=(), row=None):
        """What logits are made of: states (B,K,d), table (V,d) and, with a lexicon, its row_logits
        (B,V) and gate (B,K,C). With row, which States explain, all N states become (N,1,d).
        """
        narrow_BKd = self.to_table(states)
        if not self.lexicon:
            return narrow_BKd, table_Vd
        content_RCE, gate_BKC = lexicon_state
        row_logits_RV = self.lexicon.row_logits(content_RCE, table_Vd)
        return kernels.one_by_one(narrow_BKd, table_Vd, row_logits_RV, gate_BKC, row)

    # ---- what encode and decode use -------------------------------------------------

    def table(self):
        """The token table in the width tokens are read in, shared by embedding and head. (V,d)."""
        if self.table_cache is not None:
            return self.table_cache
        return self.expansion(self.wte) if self.expansion else self.wte

    def position_codes(self, positions):
        """Positions (...) int64 -> (..., d)."""
        if self.wpe is not None:
            return F.embedding(positions, self.wpe)
        # Computed at each call: a table of them would grow with the longest row.
        code = sinusoids(positions, self.cfg.token_width, max(10_000.0, 8.0 * self.cfg.longest))
        return (code * (table_std(self.cfg.token_width) * math.sqrt(2))).to(self.wte.dtype)

    def random_offset(self, T):
        """Position of the first of T tokens: in training random up to max_length, the same for the
        rows of a micro-batch, so that far positions are learned from short rows; otherwise 0.
        """
        if not self.training or self.cfg.longest == T or self.wpe is not None:
            return 0
        return torch.randint(self.cfg.longest - T + 1, (1,), device=self.wte.device)

    def documents(self, ids, attention_mask=None):
        """Number of each token's document (B,T), or None unless isolate_documents."""
        if not self.cfg.isolate_documents:
            return None
        real_BT = None if attention_mask is None else attention_mask.bool()
        return number_documents(ids, self.cfg.eot_id, real_BT)

    def standing(self, ids, attention_mask=None):
        """Which concepts stand in the row, (B,C) bool; without anchors all. In a row shorter than
        block_size the others stand behind its end, where no attention reads them.
        """
        B, C = ids.shape[0], self.cfg.n_concept  # len(ids) would fix B in exported graphs
        if not self.cfg.anchored:
            return torch.ones(B, C, dtype=torch.bool, device=ids.device)
        real_BT = torch.ones_like(ids) if attention_mask is None else attention_mask
        anchors = self.anchors(ids, real_BT.bool(), self.documents(ids, attention_mask))
        return F.pad(anchors.standing_BC, (0, C - anchors.standing_BC.shape[1]))

    def pooled(self, concepts, ids, attention_mask=None, how=None):
        """One vector for each row, (B,D), to compare texts with. concepts: what encode returned.

        how: "mean" of the concepts that stand in the row, or "max", the largest value of each
        number over them; None: mean if strict, else max.
        """
        # On STS-B each is the best for its bottleneck (records/anchors, records/efficiency): most
        # concepts of an open model own no word of a short text and would dominate a mean.
        standing_BC1 = self.standing(ids, attention_mask)[..., None]
        if (how or ("mean" if self.cfg.bottleneck == "strict" else "max")) == "mean":
            return (concepts * standing_BC1).sum(1) / standing_BC1.sum(1)
        return concepts.masked_fill(~standing_BC1, -math.inf).amax(1)

    # ---- who may read whom ------------------------------------------------------------

    def serves(self, documents_BT, wanted_BN):
        """Whether concept c serves document wanted[n]. -> (B,C,N) bool."""
        # With n documents in a row, concept c serves document c % n. Up to n_concept documents are
        # kept apart exactly; beyond that, documents that share a concept see each other.
        n_document_B11 = (documents_BT[:, -1:, None] + 1).clamp(max=self.cfg.n_concept)
        concept_C1 = torch.arange(self.cfg.n_concept, device=wanted_BN.device)[:, None]
        return concept_C1 % n_document_B11 == wanted_BN[:, None] % n_document_B11

    def n_standing(self, T):
        """How many concepts can stand in a row of T tokens. Only these are computed."""
        cfg, C = self.cfg, self.cfg.n_concept
        # In a lexicon each concept owns words, and those of isolated documents stand anywhere.
        if not cfg.anchored or cfg.has_lexicon or cfg.isolate_documents:
            return C
        # In exported graphs T is not known.
        return C if torch.compiler.is_exporting() else min(C, -(-T * C // cfg.block_size))

    def anchors(self, row_BT, real_BT, documents_BT):
        """Where the concepts stand in rows of the shape of row_BT. -> Anchors."""
        C, T, block_size = self.cfg.n_concept, row_BT.shape[1], self.cfg.block_size
        number_1C = torch.arange(self.n_standing(T), device=row_BT.device)[None]
        # The stride is the same in all rows up to block_size, so that a short text is read as a
        # piece of a longer one is. In longer rows the concepts move apart.
        shortest, span = block_size / C, None
        if documents_BT is None:
            first_BC, rank_BC = 0, number_1C
            length_BC = torch.full((1, 1), T, device=row_BT.device)
            if real_BT is not None:
                length_BC = real_BT.sum(1, keepdim=True)
            stride_BC = (length_BC / C).clamp(min=shortest)
            if not torch.compiler.is_exporting():
                span = max(block_size, T) / C
        else:  # the concepts that serve a document (see serves) are spread over it evenly
            served_BCT = self.serves(documents_BT, documents_BT)
            if real_BT is not None:
                served_BCT = served_BCT & real_BT[:, None]
            n_document_B1 = (documents_BT[:, -1:] + 1).clamp(max=C)
            n_serving_BC = (C - 1 - number_1C % n_document_B1) // n_document_B1 + 1
            first_BC, rank_BC = served_BCT.int().argmax(-1), number_1C // n_document_B1
            length_BC = served_BCT.sum(-1)
            stride_BC = (length_BC / n_serving_BC).clamp(min=shortest)
        standing_BC = None  # in whole rows of one document all of them stand
        if real_BT is not None or span is None or T < block_size:
            # A concept stands if its stride begins before the text ends. The first one always
            # does, for rows of padding.
            standing_BC = rank_BC * block_size < length_BC.clamp(min=1) * C
        return Anchors(self.cfg, first_BC + (rank_BC + 0.5) * stride_BC, stride_BC, span,
                       standing_BC)

    def masks(self, ids, real_BT, documents_BT):
        """Masks for concepts reading tokens (B,1,1 or C,T) and reading each other (B,1,C,C).

        True = may read; None where all may read all.
        """
        # No query is left without a key, because a softmax over nothing is NaN on some back-ends:
        # where all tokens are hidden, all real tokens are read, and in a row of padding all tokens.
        visible_BT = real_BT
        if self.cfg.hide_masked:
            visible_BT = ids != self.cfg.mask_id
            if real_BT is not None:
                visible_BT = or_else(visible_BT & real_BT, real_BT)
        if visible_BT is not None:
            visible_BT = visible_BT | ~visible_BT.any(1, keepdim=True)
        if documents_BT is None:
            return None if visible_BT is None else visible_BT[:, None, None], None
        read_BCT = own_BCT = self.serves(documents_BT, documents_BT)
        if visible_BT is not None:
            present_BCT = own_BCT if real_BT is None else own_BCT & real_BT[:, None]
            read_BCT = or_else(or_else(own_BCT & visible_BT[:, None], present_BCT), own_BCT)
        number_BC = torch.arange(self.cfg.n_concept, device=ids.device).expand(ids.shape[0], -1)
        return read_BCT[:, None], self.serves(documents_BT, number_BC)[:, None]

    # ---- use without training -----------------------------------------------------------

    @torch.no_grad()
    def freeze(self, dtype=torch.float32):
        """For use without gradients: eval(), weights in dtype, and tables computed once. -> self.

        Weights and device must not change until train() or eval() is called again.
        """
        self.to(dtype).eval()
        self.table_cache = self.table().detach()
        if self.lexicon:
            table = self.lexicon.owned_table(self.table_cache, self.cfg.n_concept)
            self.lexicon.owned_table_cache = table
        return self

    def train(self, mode=True):
        self.table_cache = None
        if self.lexicon:
            self.lexicon.owned_table_cache = None
        return super().train(mode)

    # ---- size and cost ------------------------------------------------------------------

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def pairs(self, T, K, n_head):
        """How many queries and keys are scored in a row by the first n_head heads, as a multiple of
        n_head of all: by reading, self-attention and decoding. -> three numbers.
        """
        cfg, C = self.cfg, self.n_standing(T)
        all_pairs, n_local = [C * T, C * C, K * C], 0
        near_pairs = all_pairs.copy()
        if cfg.anchored and not cfg.isolate_documents:
            n_local = min(n_head, sum(slope > 0 for slope in Anchors.heads(cfg)[0]))
            span = max(cfg.block_size, T) / cfg.n_concept
            windows = [Anchors.window(cfg, span, T, 1.0), Anchors.window(cfg, span, C, span),
                       Anchors.window(cfg, span, C, span, decoding=True)]
            near_pairs = [-(-n_query // window[0]) * window[0] * window[1] if window else n_pair
                          for n_query, window, n_pair in zip((C, C, K), windows, all_pairs)]
        return [(n_local * near + (n_head - n_local) * far) / cfg.n_head
                for near, far in zip(near_pairs, all_pairs)]

    def flops_per_token(self, T, K, B=1):
        """Training FLOPs an input token, in batches of B rows of T tokens with K predicted ones."""
        # Matrix products, attention and convolutions; tests/test_model.py compares the sum with
        # torch.utils.flop_counter. Each term counts multiply-adds of one row, forward only.
        cfg, d, D, C = self.cfg, self.cfg.token_width, self.cfg.concept_dim, self.n_standing(T)
        E, r, V = cfg.content_dim, cfg.context_dim, cfg.vocab_size
        reads, among, decodes = self.pairs(T, K, cfg.n_head)
        ffn = 3 * D * cfg.ffn_dim  # for one vector
        mixer = T * 2 * d * (2 * d + d + cfg.mixer_kernel)
        if cfg.resonant_mixers and self.mixers:
            mixer = self.mixers[0].flops(T, B)
        read = C * 2 * D * D + 2 * D * reads + T * 2 * d * D
        self_attention = C * 4 * D * D + 2 * D * among if cfg.has_self_attention else 0
        layer = read + self_attention + C * ffn
        if cfg.bottleneck == "strict":
            decoder = C * D * D + 2 * D * decodes
        else:
            decoder = cfg.n_decoder * (K * (2 * D * D + ffn) + 2 * D * decodes + C * 2 * D * E)
        head = K * (d * V + (2 * d * D if d != D else 0))
        lexicon = 0
        if cfg.has_lexicon:
            row_logits = d * (C * E + V + -V % C)
            gate = K * (D + r * (d + C))
            memory = T * d * (r + 1)
            n_free = cfg.n_head - self.layers[0].read.n_owned_head
            saved = 2 * D * (reads - self.pairs(T, K, n_free)[0])  # by owned heads
            lexicon = row_logits + gate + memory - saved
        time = TimeInput.WIDTH * d if self.time else 0
        expansion = 0
        if self.expansion:  # once for all rows of a batch
            matrices = [p for p in self.expansion.parameters() if p.ndim == 2]
            expansion = sum(p.numel() for p in [*matrices, self.expansion.waves]) * V / B
        mixers, layers = len(self.mixers) * mixer, cfg.n_layer * layer
        # Two operations for a multiply-add, and a backward pass of twice the forward.
        return 6 * (mixers + layers + decoder + head + lexicon + time + expansion) / T


def or_else(mask, wider):
    """Bool (..., T) both: a row of `mask` that allows nothing is replaced by that of `wider`."""
    return mask | (wider & ~mask.any(-1, keepdim=True))
