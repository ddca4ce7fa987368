"""ConceptEncoder: a small fixed set of learned concept vectors reads a token sequence, thinks, and is decoded back.

    tokens (B,T) --embed--> x_BTd --[local mixers]--> x_BTd         open bottleneck only: tokens see their neighbours
    concepts c_CD --n_layer x [ read x | self-attention if strict | gated FFN ]--> c_BCD     O(T * C), never O(T^2)
    masked positions (B,K) --decoder reads c--> y_BKD --tied head--> logits_BKV      only where something is predicted
    concepts c_BCD --lexicon--> said_BV, which words stand in the row --> + gate_BKC said_BV to the logits   open only

bottleneck="strict" is the pure hypothesis: token states never change and a decoder query is a position and nothing
else, so whatever is predicted went through the concepts. bottleneck="open" lets tokens see their neighbours by a
depthwise convolution and decodes from the token's own state: better losses; the concepts carry what is not local.
There concepts do not read each other: averaging what they have in common makes them alike (records/architecture, 5).
And each owns a share of the vocabulary: half of its heads read its own words only, and which of them it has read is
added to the predictions of the row, the more the better their contexts match (Lexicon; records/architecture, 7 and 9).

Choices that decide whether it trains (each has a test in tests/test_model.py):
- the decoder query holds the position; without it all masked tokens of a row get the same prediction
- concepts start at std 1: near-zero concepts all read the same average and stay copies of each other
- tokens are normalised before they are read, queries and keys are normalised per head, and so is what a head has read

Shapes: B rows, T tokens, K predicted positions, C concepts, D concept_dim, d token width, V vocabulary, H heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.layers import (
    Attention,
    GatedFFN,
    LocalMixer,
    MaskedEncoder,
    OwnWordReading,
    attend,
    attention_weights,
    gain,
    gather_rows,
    init_matrix,
    norm,
    or_else,
    sinusoids,
    table_std,
    too_small,
)

EXPAND_BELOW = 64  # a narrower token table is expanded: its products would have rank token_dim, too few for a softmax


@dataclass(frozen=True)
class ConceptConfig:
    """Shape of a ConceptEncoder. Impossible combinations raise ValueError, all of them at once."""
    vocab_size: int = 30522  # rows of the token table; 30,522 is BERT's
    block_size: int = 512  # longest row, in tokens
    n_layer: int = 4  # concept layers
    n_head: int = 8  # attention heads; concept_dim is divided among them
    n_concept: int = 64  # concept vectors
    concept_dim: int = 512  # width of a concept, D
    token_dim: int = 512  # width of the token table, from 4
    ffn_dim: int = 2048  # hidden width of the gated feed-forward layers
    bottleneck: str = "open"  # "open" or "strict"
    position: str = "learned"  # "learned" table or "sinusoidal" (no parameters)
    max_length: int = 0  # sinusoidal: rows may be this long; training shifts them to reach it; 0: block_size
    bias: bool = False  # biases in linear layers and norms; the micro presets count with them
    dropout: float = 0.0  # on residual branches; 0 for pretraining
    hide_masked: bool = False  # concepts do not read [MASK] tokens (as MAE); needs mask_id
    isolate_documents: bool = False  # documents packed into one row do not see each other; needs eot_id
    n_mixer: int = 2  # local mixer blocks (open)
    mixer_kernel: int = 7  # tokens a mixer sees, odd (open)
    n_decoder: int = 1  # decoder blocks (open)
    self_attention: bool = False  # concepts also read each other, which makes them alike (open; strict always does)
    lexicon: bool = True  # each concept owns words, reads and says them (open, unless documents are isolated)
    concept_std: float = 1.0  # standard deviation of the concepts at the start
    mask_id: int = -1  # id of [MASK]
    eot_id: int = -1  # id that ends a document

    def __post_init__(self):
        wrong = too_small(self, vocab_size=2, block_size=1, n_layer=1, n_head=1, n_concept=1, concept_dim=2,
                          token_dim=4, ffn_dim=1, n_mixer=0, mixer_kernel=1, n_decoder=1)
        if not wrong and self.concept_dim % self.n_head:
            divisors = [n for n in range(1, 65) if self.concept_dim % n == 0]
            wrong.append(f"n_head={self.n_head} does not divide concept_dim={self.concept_dim}; these do: {divisors}")
        if self.bottleneck not in ("open", "strict"):
            wrong.append(f"bottleneck={self.bottleneck!r}: expected 'open' or 'strict'")
        if self.position not in ("learned", "sinusoidal"):
            wrong.append(f"position={self.position!r}: expected 'learned' or 'sinusoidal'")
        if self.position == "sinusoidal" and self.token_width % 2:
            wrong.append(f"position='sinusoidal' needs an even token width, not {self.token_width}")
        if self.max_length and (self.position != "sinusoidal" or self.max_length < self.block_size):
            wrong.append(f"max_length={self.max_length}: expected block_size={self.block_size} or more, with "
                         "position='sinusoidal'; a learned table has no positions beyond block_size")
        if self.mixer_kernel % 2 == 0:
            wrong.append(f"mixer_kernel={self.mixer_kernel}: expected an odd number of tokens")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout={self.dropout}: expected 0 or more and below 1")
        for flag, name in (("hide_masked", "mask_id"), ("isolate_documents", "eot_id")):
            if getattr(self, flag) and not 0 <= getattr(self, name) < self.vocab_size:
                wrong.append(f"{flag}=True needs {name}, an id of the tokenizer below vocab_size")
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def longest(self):
        """The longest row the model reads, in tokens."""
        return self.max_length or self.block_size

    @property
    def talks(self):
        """Whether concepts read each other."""
        return self.self_attention or self.bottleneck == "strict"

    @property
    def speaks(self):
        """Whether concepts own words. What they say goes to the whole row, so not when its documents are isolated."""
        return self.lexicon and self.bottleneck == "open" and not self.isolate_documents

    @property
    def context_dim(self):
        """How many numbers of a concept are its memory of contexts."""
        return max(1, self.concept_dim // 4) if self.speaks else 0

    @property
    def content_dim(self):
        """How many are what it has read: the decoder reads these."""
        return self.concept_dim - self.context_dim

    @property
    def token_width(self):
        """d, the width in which tokens are mixed and read: token_dim, or that of the expanded table."""
        return self.token_dim if self.token_dim >= EXPAND_BELOW else min(256, self.concept_dim)


class ConceptLayer(nn.Module):
    """Concepts read the tokens, talk to each other if they may, think. c_BCD, x_BTd -> c_BCD; pre-norm."""
    def __init__(self, cfg, owns_words=False):
        super().__init__()
        D, reading = cfg.concept_dim, OwnWordReading if owns_words else Attention
        self.read_norm, self.read = norm(D, cfg), reading(D, cfg.token_width, cfg, gain(cfg, 2.0), normalize=True)
        if cfg.talks:
            self.self_norm, self.self_attention = norm(D, cfg), Attention(D, D, cfg, gain(cfg, 1.0))
        self.ffn_norm, self.ffn = norm(D, cfg), GatedFFN(D, cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, c_BCD, x_BTd, read_mask=None, self_mask=None, *own_words):
        c_BCD = c_BCD + self.drop(self.read(self.read_norm(c_BCD), x_BTd, read_mask, *own_words))
        if hasattr(self, "self_attention"):
            h_BCD = self.self_norm(c_BCD)
            c_BCD = c_BCD + self.drop(self.self_attention(h_BCD, h_BCD, self_mask))
        return c_BCD + self.drop(self.ffn(self.ffn_norm(c_BCD)))


class StrictDecoder(nn.Module):
    """Positions read concepts: one attention, concepts are the values. (B,K,d) -> (B,K,D)."""
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.k = nn.Linear(cfg.concept_dim, cfg.concept_dim, bias=cfg.bias)
        self.norm = norm(cfg.concept_dim, cfg)

    def forward(self, query_BKD, c_BCD, mask=None):
        return self.norm(attend(query_BKD, self.k(c_BCD), c_BCD, self.n_head, mask))

    def weights(self, query_BKD, c_BCD, mask=None):
        return attention_weights(query_BKD, self.k(c_BCD), self.n_head, mask)


class OpenDecoder(nn.Module):
    """n_decoder blocks in which masked tokens read the concepts' content and think. (B,K,D) -> (B,K,D); pre-norm."""
    def __init__(self, cfg):
        super().__init__()
        D, E = cfg.concept_dim, cfg.content_dim
        self.blocks = nn.ModuleList(
            nn.ModuleDict(dict(read_norm=norm(D, cfg), read=Attention(D, E, cfg, gain(cfg, 2.0), normalize=True),
                               ffn_norm=norm(D, cfg), ffn=GatedFFN(D, cfg))) for _ in range(cfg.n_decoder))
        self.drop, self.norm = nn.Dropout(cfg.dropout), norm(D, cfg)

    def forward(self, y_BKD, c_BCE, mask=None):
        for block in self.blocks:
            y_BKD = y_BKD + self.drop(block["read"](block["read_norm"](y_BKD), c_BCE, mask))
            y_BKD = y_BKD + self.drop(block["ffn"](block["ffn_norm"](y_BKD)))
        return self.norm(y_BKD)


class Lexicon(nn.Module):
    """Every concept owns every n_concept-th word: it reads its own in the row, says which, and in what context.

    Words that repeat in a row are worth 0.17 nats to a model that knows them one by one; summed up in vectors of the
    model's width they drown in each other (records/architecture, 3 and 7). Dealt out, each concept tells only V / C
    words apart, and asking it costs a C-th of asking all about all. What it says rises in the predictions of the row:
    everywhere by a gate of the position from 0 to 2, and more where the position's own context is that in which the
    concept met its words (records/architecture, 9).

    The last context_dim numbers of a concept are that memory; the others, its content, are what the decoder reads.
    """
    def __init__(self, cfg):
        super().__init__()
        self.words = nn.Linear(cfg.content_dim, cfg.token_width, bias=False)
        self.scale, self.threshold = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(1.0))
        self.gate = nn.Parameter(torch.zeros(cfg.concept_dim))
        self.context = nn.Linear(cfg.token_width, cfg.context_dim, bias=False)
        self.salience = nn.Parameter(torch.zeros(cfg.token_width))
        self.loudness, self.sharpness = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(8.0))
        self.dealt = None  # own_rows, while the model is frozen
        rank_V = torch.arange(2.0, cfg.vocab_size + 2)  # ids come in order of frequency: a rare word is news, of mean 1
        self.register_buffer("news", rank_V.log() / rank_V.log().mean(), persistent=False)

    def remember(self, x_BTd, owner_BT, n_concept, mask=None):
        """The mean context of the words each concept owns, by learned salience. -> (B,C,context_dim) float32.

        Contexts are unit vectors, so their mean is the shorter the less they agree, and zero where nothing is owned.
        """
        context_BTr = F.normalize(self.context(x_BTd).float(), dim=-1)
        share_BT1 = (x_BTd.float() @ self.salience.float())[..., None].clamp(-30, 30).exp()
        if mask is not None:
            share_BT1 = share_BT1 * mask[:, 0].mT
        share_BTr = torch.cat((share_BT1 * context_BTr, share_BT1), dim=-1)
        sums = torch.zeros(x_BTd.shape[0], n_concept, share_BTr.shape[-1], device=x_BTd.device)
        sums = sums.scatter_add(1, owner_BT[..., None].expand_as(share_BTr), share_BTr)
        return sums[..., :-1] / sums[..., -1:].clamp(min=1e-20)

    def listen(self, memory_BCr, states_BKD, x_BKd):
        """How much each position listens to each concept. -> (B,K,C) float32."""
        cosine_BKC = (F.normalize(self.context(x_BKd).float(), dim=-1) @ memory_BCr.float().mT).float()
        gate_BK1 = 2 * torch.sigmoid(states_BKD.float() @ self.gate.float())[..., None]
        match_BKC = self.loudness + self.sharpness * (cosine_BKC - 1)
        return gate_BK1 + match_BKC.clamp(max=5).exp()  # beyond that, these two numbers have gone astray

    def own_rows(self, table_Vd, C):
        """The table as it is dealt out: row i of concept c is word C i + c, zeros where there is none. -> (C,n,d).

        A copy: in bf16 on a CPU, products of the view take ten times as long.
        """
        if self.dealt is not None:
            return self.dealt
        V, d = table_Vd.shape
        return F.pad(table_Vd.detach(), (0, 0, 0, -V % C)).view(-1, C, d).transpose(0, 1).contiguous()

    def say(self, content_BCE, table_Vd):
        """Which of its words each concept has read. -> (B,V) float32, the words of all concepts."""
        C, (V, d) = content_BCE.shape[1], table_Vd.shape
        spoken_BCd = F.layer_norm(self.words(content_BCE), (d,)) * self.scale
        heard_CBn = (spoken_BCd.transpose(0, 1) @ self.own_rows(table_Vd, C).mT).float()
        heard_CBn = heard_CBn - heard_CBn.mean(-1, keepdim=True)  # centred: all words of a table are a little alike
        heard_BV = heard_CBn.permute(1, 2, 0).flatten(1)[:, :V]
        return F.softplus(heard_BV - self.threshold) * self.news


class TableExpansion(nn.Module):
    """token_dim numbers a token -> a table of width d: fixed random Fourier features, then a two-layer MLP.

    Both the encoder and the tied head use the expanded table, so its rank is d and not token_dim. (V,t) -> (V,d).
    """
    def __init__(self, cfg):
        super().__init__()
        d = cfg.token_width
        waves = torch.randn(cfg.token_dim, d // 2, generator=torch.Generator().manual_seed(0))
        self.register_buffer("waves", waves)  # fixed: 2006.10739, scale 1
        self.wi = nn.Linear(2 * (d // 2), d, bias=cfg.bias)
        self.out = nn.Linear(d, d, bias=cfg.bias)

    def forward(self, table_Vt):
        angles = table_Vt @ self.waves
        return self.out(F.gelu(self.wi(torch.cat((angles.sin(), angles.cos()), dim=-1))))


class ConceptEncoder(MaskedEncoder):
    arch = "concept"

    def __init__(self, cfg):
        super().__init__()
        self.cfg, d, D, self.frozen_table = cfg, cfg.token_width, cfg.concept_dim, None
        self.wte = nn.Parameter(torch.empty(cfg.vocab_size, cfg.token_dim))
        self.expansion = TableExpansion(cfg) if d != cfg.token_dim or cfg.token_dim < EXPAND_BELOW else None
        self.wpe = nn.Parameter(torch.empty(cfg.block_size, d)) if cfg.position == "learned" else None
        self.concepts = nn.Parameter(torch.empty(cfg.n_concept, D))
        self.mixers = nn.ModuleList(LocalMixer(cfg) for _ in range(cfg.n_mixer * (cfg.bottleneck == "open")))
        self.layers = nn.ModuleList(ConceptLayer(cfg, cfg.speaks and i == 0) for i in range(cfg.n_layer))
        self.norm = norm(D, cfg)
        self.query = nn.Identity() if d == D else nn.Linear(d, D, bias=cfg.bias)
        self.decoder = (StrictDecoder if cfg.bottleneck == "strict" else OpenDecoder)(cfg)
        self.lexicon = Lexicon(cfg) if cfg.speaks else None
        self.to_table = nn.Identity() if d == D else nn.Linear(D, d, bias=cfg.bias)
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
                if name.endswith("read.out.weight"):
                    p.normal_(0, p.shape[1] ** -0.5)  # it carries what is new: it must not start as a small branch
        if self.expansion:  # the expanded table starts as large as a plain one would
            self.expansion.out.weight *= table_std(self.cfg.token_width) * 2

    def table(self):
        if self.frozen_table is not None:
            return self.frozen_table
        return self.expansion(self.wte) if self.expansion else self.wte

    @torch.no_grad()
    def freeze(self, dtype=torch.float32):
        super().freeze(dtype)
        self.frozen_table = self.table().detach()
        if self.lexicon:
            self.lexicon.dealt = self.lexicon.own_rows(self.frozen_table, self.cfg.n_concept)
        return self

    def train(self, mode=True):
        self.frozen_table = None
        if self.lexicon:
            self.lexicon.dealt = None
        return super().train(mode)

    def narrow(self, states):
        return self.to_table(states)

    def place(self, positions):
        """Positions (...) int64 -> their codes (..., d). Sinusoids are computed, not kept: no table grows with T."""
        if self.wpe is not None:
            return F.embedding(positions, self.wpe)
        code = sinusoids(positions, self.cfg.token_width, max(10_000.0, 8.0 * self.cfg.longest))
        return (code * (table_std(self.cfg.token_width) * math.sqrt(2))).to(self.wte.dtype)

    def shift(self, T):
        """Where rows of T tokens begin: in training anywhere up to max_length, so that far places are learned too."""
        if not self.training or self.cfg.longest == T or self.wpe is not None:
            return 0
        return torch.randint(self.cfg.longest - T + 1, (1,), device=self.wte.device)

    def head(self, states, heard, table_Vd):
        if not self.lexicon:
            return self.to_table(states), None, None
        if heard is None:
            raise ValueError("the states have lost what the lexicon hears: pass them just as decode returned them")
        content_BCE, gate_BKC = heard
        return self.to_table(states), self.lexicon.say(content_BCE, table_Vd), gate_BKC

    def content(self, concepts):
        """A concept without its memory."""
        return concepts[..., :self.cfg.content_dim]

    def _encode(self, ids, attention_mask, table_Vd, documents_BT, start=0, added_BTd=None):
        B, T = ids.shape
        real_BT = None if attention_mask is None else attention_mask.bool()
        read_mask, self_mask = self.masks(ids, real_BT, documents_BT)
        x_BTd = F.embedding(ids, table_Vd) + self.place(torch.arange(T, device=ids.device) + start)
        x_BTd = x_BTd if added_BTd is None else x_BTd + added_BTd
        x_BTd = F.layer_norm(x_BTd, x_BTd.shape[-1:])
        for mixer in self.mixers:
            x_BTd = mixer(x_BTd, real_BT, documents_BT)
        c_BCD = self.concepts.expand(B, -1, -1)
        read_BTd = F.layer_norm(x_BTd, x_BTd.shape[-1:]) if self.mixers else x_BTd
        own_words = ()
        if self.lexicon:
            own_words = F.layer_norm(F.embedding(ids, table_Vd), x_BTd.shape[-1:]), ids % self.cfg.n_concept
        for i, layer in enumerate(self.layers):
            c_BCD = layer(c_BCD, read_BTd, read_mask, self_mask, *(() if i else own_words))
        c_BCD = self.norm(c_BCD)
        if self.lexicon:
            memory_BCr = self.lexicon.remember(read_BTd, own_words[1], self.cfg.n_concept, read_mask)
            memory_BCr = (memory_BCr * self.cfg.context_dim**0.5).to(c_BCD.dtype)
            c_BCD = torch.cat((self.content(c_BCD), memory_BCr), dim=-1)
        return c_BCD, x_BTd

    def _decode(self, concepts, tokens, positions, documents, attention_mask, start=0):
        """Concepts (B,C,D), tokens (B,T,d), positions (B,K) int64 -> states (B,K,D), what the lexicon hears or None.

        The strict decoder never looks at `tokens`. attention_mask has no effect: concepts have read real tokens only.
        """
        query_BKd = self.place(positions + start) if self.cfg.bottleneck == "strict" else gather_rows(tokens, positions)
        mask = None
        if documents is not None:
            mask = self.serves(documents, documents.gather(1, positions)).transpose(1, 2)[:, None]
        states_BKD = self.decoder(self.query(query_BKd), self.content(concepts), mask)
        if not self.lexicon:
            return states_BKD, None
        x_BKd = F.layer_norm(query_BKd, query_BKd.shape[-1:])
        memory_BCr = concepts[..., self.cfg.content_dim:] * self.cfg.context_dim**-0.5
        return states_BKD, (self.content(concepts), self.lexicon.listen(memory_BCr, states_BKD, x_BKd))

    # ---- who may read whom --------------------------------------------------

    def serves(self, documents_BT, wanted_BN):
        """Concepts are dealt out to the documents of a row like cards. -> (B,C,N) bool: concept c serves document n.

        Exact isolation up to n_concept documents a row; beyond that, documents that share a concept see each other.
        """
        n_B11 = (documents_BT[:, -1:, None] + 1).clamp(max=self.cfg.n_concept)
        concept_C1 = torch.arange(self.cfg.n_concept, device=wanted_BN.device)[:, None]
        return concept_C1 % n_B11 == wanted_BN[:, None] % n_B11

    def masks(self, ids, real_BT, documents_BT):
        """Masks for concepts reading tokens, (B,1,1 or C,T), and reading each other, (B,1,C,C); None where all may.

        No query is ever left without a key (its softmax would be NaN on some back-ends): a row in which everything is
        hidden is read as it is, without its padding.
        """
        visible_BT = real_BT
        if self.cfg.hide_masked:
            shown_BT = ids != self.cfg.mask_id
            visible_BT = shown_BT if real_BT is None else or_else(shown_BT & real_BT, real_BT)
        if visible_BT is not None:
            visible_BT = visible_BT | ~visible_BT.any(1, keepdim=True)
        if documents_BT is None:
            return None if visible_BT is None else visible_BT[:, None, None], None
        read_BCT = own_BCT = self.serves(documents_BT, documents_BT)
        if visible_BT is not None:
            present_BCT = own_BCT if real_BT is None else own_BCT & real_BT[:, None]
            read_BCT = or_else(or_else(own_BCT & visible_BT[:, None], present_BCT), own_BCT)
        number_C = torch.arange(self.cfg.n_concept, device=ids.device).expand(ids.shape[0], -1)
        return read_BCT[:, None], self.serves(documents_BT, number_C)[:, None]

    def readers(self):
        """The modules in which concepts read tokens, in order; health.py looks at their weights."""
        return [layer.read for layer in self.layers]

    def decode_readers(self):
        """The modules in which predicted positions read concepts."""
        return [self.decoder] if self.cfg.bottleneck == "strict" else [b["read"] for b in self.decoder.blocks]

    # ---- cost ---------------------------------------------------------------

    def flops_per_token(self, T, K, B=1):
        """Training FLOPs (forward + backward, three times the forward) an input token, rows of T tokens, K predicted.

        Matrix products, attention and convolutions; checked against torch.utils.flop_counter. B matters only for
        tables that are expanded once for all rows of a batch.
        """
        cfg, d, D, C = self.cfg, self.cfg.token_width, self.cfg.concept_dim, self.cfg.n_concept
        ffn, E, r = 3 * D * cfg.ffn_dim, cfg.content_dim, cfg.context_dim
        layer = C * (2 * D * D + 2 * T * D + (4 * D * D + 2 * C * D) * cfg.talks + ffn) + T * 2 * d * D
        own = C * 2 * T * D * self.layers[0].read.own / cfg.n_head  # what reading own words saves the first layer
        mixer = T * 2 * d * (2 * d + d + cfg.mixer_kernel)
        block = K * (2 * D * D + 2 * C * D + ffn) + C * 2 * D * E
        decoder = C * D * D + K * 2 * C * D if cfg.bottleneck == "strict" else cfg.n_decoder * block
        head = K * (d * cfg.vocab_size + (2 * d * D if d != D else 0))
        say, listen = d * (C * E + cfg.vocab_size + -cfg.vocab_size % C), K * (D + r * (d + C))
        head += say + listen + T * d * (r + 1) - own if cfg.speaks else 0
        table = sum(p.numel() for p in self.expansion.parameters() if p.ndim == 2) if self.expansion else 0
        table = (table + self.expansion.waves.numel() if self.expansion else 0) * cfg.vocab_size / B
        return 6 * (cfg.n_layer * layer + len(self.mixers) * mixer + decoder + head + table) / T
