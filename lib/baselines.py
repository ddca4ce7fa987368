"""The baselines, with the same interface, head and loss as the ConceptEncoder: a Transformer, as
encoder or decoder, and ResonanceLM, which mixes tokens by long convolutions instead of attention.

    ids (B,T) -> token table -> local mixers -> n_layer x [ mix tokens | gated FFN ]
    the last layer runs at the predicted positions only -> logits (B,K,V) by the token table (tied)

Trained by the same loop with arch="transformer" or "resonance". The Transformer is meant to be hard
to beat: pre-norm, rotary positions (RoFormer, 2104.09864), GEGLU (2002.05202), normalised queries
and keys, the concept model's own local mixers, and no work at unmasked positions in the last layer.
Three settings make it a control:

    n_register=64   64 extra learned tokens (2309.16588): do extra slots help without a bottleneck?
    n_layer=0       local mixers and one FFN, no attention: how much can neighbours alone predict?
    copy_head=True  the open model's lexicon without its concepts: is that what makes it better?

objective="clm" in train.py makes a decoder of it (`causal`): no token sees a later one, and every
position predicts the next token. The weights are the same, so an encoder can go on as a decoder and
the other way round. `start` and `extend` are for generation: they keep what was computed of the
tokens so far. With local_window and global_every most layers see near tokens only, as in ModernBERT
(2412.13663) and Ettin (2507.11412).

Shapes: B rows, T tokens, K predicted positions, R registers, N = R + T, d width, V vocabulary,
H heads, e = d / H.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib import kernels
from lib.resonance import Fourier, Resonance
from model import (
    Attention,
    GatedFFN,
    Lexicon,
    LocalMixer,
    TimeInput,
    below,
    check_length,
    gather_rows,
    init_matrix,
    norm,
    normalize,
    number_documents,
    rotate,
    split_heads,
    table_std,
)

LOCAL_THETA = 10_000.0  # of layers with a window, whatever rope_theta is for those without


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a Transformer. Impossible combinations raise ValueError, all of them at once."""
    vocab_size: int = 30522  # rows of the token table
    block_size: int = 512  # longest row, in tokens
    n_layer: int = 4  # attention + FFN layers; 0: local mixers alone
    n_head: int = 8  # attention heads; token_dim is divided among them
    token_dim: int = 512  # width, d
    ffn_dim: int = 2048  # hidden width of the gated feed-forward layers
    causal: bool = False  # a decoder: no token sees a later one
    mntp: bool = False  # a masked token is predicted by the state before it (2404.05961, 2.2)
    rope_theta: float = 10_000.0  # base of the rotary positions; 160,000 for rows of 8,192
    local_window: int = 0  # tokens that a local layer sees to each side; 0: no layer is local
    global_every: int = 3  # layers 0, 3, 6, ... see the whole row, the others are local
    qk_norm: bool = True  # queries and keys are normalised
    bert_head: bool = False  # a dense layer before the logits and a bias for each word, as in BERT
    n_mixer: int = 2  # local mixer blocks before the first layer, as in the open ConceptEncoder
    mixer_kernel: int = 7  # tokens a mixer sees, odd
    n_register: int = 0  # extra learned tokens in front of every row
    copy_head: bool = False  # adds logits for the words of the row, see CopyHead
    bias: bool = False  # biases in linear layers and norms
    dropout: float = 0.0  # on residual branches; 0 for pretraining
    isolate_documents: bool = False  # documents packed into one row do not see each other
    time_input: bool = False  # tokens know which share of the row is [MASK], see model.TimeInput
    mask_id: int = -1  # id of [MASK]; needed by time_input
    eot_id: int = -1  # id that ends a document; needed by isolate_documents

    def __post_init__(self):
        problems = self.problems()
        if problems:
            raise ValueError("; ".join(problems))

    def problems(self):
        """Why this config is impossible -> list of messages."""
        problems = below(self, vocab_size=2, block_size=1, n_layer=0, n_head=1, token_dim=2,
                         ffn_dim=1, n_mixer=0, mixer_kernel=1, n_register=0, local_window=0,
                         global_every=1)
        if not problems and self.token_dim % (2 * self.n_head):
            fits = [n for n in range(1, 65) if self.token_dim % (2 * n) == 0]
            problems.append(f"n_head={self.n_head}: rotary positions need an even share of "
                            f"token_dim={self.token_dim} for each head; these fit: {fits}")
        if not 0 < self.rope_theta < float("inf"):
            problems.append(f"rope_theta={self.rope_theta}: expected a number above 0, as 10000")
        if self.mixer_kernel % 2 == 0:
            problems.append(f"mixer_kernel={self.mixer_kernel}: expected an odd number of tokens")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout}: expected 0 or more and below 1")
        if self.n_register and not self.n_layer:
            problems.append("n_register needs n_layer of 1 or more: nothing would read the "
                            "registers")
        if self.time_input and not 0 <= self.mask_id < self.vocab_size:
            problems.append("time_input=True needs mask_id, an id of the tokenizer below "
                            "vocab_size")
        if self.isolate_documents and not 0 <= self.eot_id < self.vocab_size:
            problems.append("isolate_documents=True needs eot_id, an id of the tokenizer below "
                            "vocab_size")
        if self.isolate_documents and self.n_register:
            problems.append("isolate_documents=True with n_register: documents would meet in the "
                            "registers")
        if self.isolate_documents and self.copy_head:
            problems.append("isolate_documents=True with copy_head: its logits are the same for "
                            "all documents of a row")
        if self.local_window and self.n_register:
            problems.append("local_window with n_register: registers stand at no distance")
        if self.causal:
            # Each of them would show a token what comes after it.
            problems += [f"{name} reads the whole row, and a decoder (objective=clm) must not see "
                         "later tokens" for name in ("n_register", "copy_head", "time_input")
                         if getattr(self, name)]
        return problems

    @property
    def token_width(self):
        return self.token_dim

    @property
    def longest(self):
        return self.block_size

    def mixing(self, number):
        """How layer `number` mixes tokens: "attention" or, in a ResonanceConfig, another way."""
        return "attention"

    def window(self, number):
        """Tokens that layer `number` sees to each side; 0: the whole row."""
        return 0 if number % self.global_every == 0 else self.local_window


@dataclass(frozen=True)
class ResonanceConfig(TransformerConfig):
    """Shape of a ResonanceLM. Impossible combinations raise ValueError, all of them at once."""
    mixer: str = "resonance"  # "resonance", or "fnet" as a control: lib/resonance.py
    mixers: str = "r"  # of the layers in turn: r, the mixer; a, attention. rrra: every fourth is a
    n_frequency: int = 64  # oscillators of a resonance

    def problems(self):
        problems = super().problems() + below(self, n_frequency=1)
        if self.mixer not in ("resonance", "fnet"):
            problems.append(f"mixer={self.mixer!r}: expected 'resonance' or 'fnet'")
        if not self.mixers or set(self.mixers) - set("ra"):
            problems.append(f"mixers={self.mixers!r}: expected letters r (mixer) and a (attention),"
                            " such as 'rrra'")
        if self.mixer == "fnet" and self.causal:
            problems.append("mixer='fnet' sees the whole row, and a decoder (objective=clm) must "
                            "not; mixer='resonance'")
        if self.isolate_documents:
            problems.append("isolate_documents=True: a convolution over the row cannot keep the "
                            "documents in it apart; rows=document gives each a row of its own")
        if self.n_register:
            problems.append("n_register: registers stand at no distance; leave it at 0")
        return problems

    def mixing(self, number):
        is_attention = self.mixers[number % len(self.mixers)] == "a"
        return "attention" if is_attention else self.mixer


# ---- layers -----------------------------------------------------------------------


class Row:
    """What the layers are told of the rows that they read; worked out once for all of them.

    real_BT: None where all are tokens. documents: numbers (B,T), or None. positions (B,K) int64:
    the tokens that read; None: all.
    """

    def __init__(self, cfg, T, device, real_BT=None, documents_BT=None, positions_BK=None):
        self.cfg, self.T, self.device, self.real_BT = cfg, T, device, real_BT
        self.places_BK = None if positions_BK is None else positions_BK + cfg.n_register
        self.documents = None
        if documents_BT is not None:
            asking = documents_BT if positions_BK is None else documents_BT.gather(1, positions_BK)
            self.documents = asking, documents_BT
        self.by_window, self.by_theta = {}, {}

    def select(self, x_BNd):
        """The tokens that read."""
        return x_BNd if self.places_BK is None else gather_rows(x_BNd, self.places_BK)

    def visible(self, window):
        """What they may read -> kernels.Visible, None for everything."""
        if window not in self.by_window:
            R, real_BN = self.cfg.n_register, self.real_BT
            if real_BN is not None and R:
                real_BN = F.pad(real_BN, (R, 0), value=True)
            is_free = not (window or self.cfg.causal) and self.documents is None
            self.by_window[window] = None if is_free and real_BN is None else kernels.Visible(
                R + self.T, self.device, real_BN, self.documents, self.cfg.causal, window,
                self.places_BK)
        return self.by_window[window]

    def rotary(self, theta):
        """(cos, sin) of those that read and of those that are read, see model.rotate."""
        if theta not in self.by_theta:
            # registers stand at position 0
            places_N = torch.arange(-self.cfg.n_register, self.T, device=self.device).clamp(min=0)
            of_keys = angles(places_N, theta, self.cfg)
            of_queries = of_keys
            if self.places_BK is not None:
                of_queries = [part[0, 0][self.places_BK][:, None] for part in of_keys]
            self.by_theta[theta] = of_queries, of_keys
        return self.by_theta[theta]


def angles(places_N, theta, cfg):
    """(cos, sin) of the rotary positions at these places, both (1,1,N,e/2)."""
    e = cfg.token_dim // cfg.n_head
    frequency = theta ** (-torch.arange(0, e, 2, device=places_N.device) / e)
    angle = (places_N[:, None] * frequency)[None, None]
    return angle.cos(), angle.sin()


class Layer(nn.Module):
    """Mixes the tokens of a row, then a gated FFN; pre-norm. number: of the layer, from 0."""

    def __init__(self, cfg, number):
        super().__init__()
        d = cfg.token_dim
        self.read, self.mixing = None, cfg.mixing(number)
        self.window, self.theta = cfg.window(number), cfg.rope_theta
        if self.window:
            self.theta = LOCAL_THETA
        if cfg.n_layer:
            self.read_norm = norm(d, cfg)
            if self.mixing == "attention":
                self.read = Attention(d, d, cfg, gain=1.0 if cfg.qk_norm else None)
            elif self.mixing == "resonance":
                self.read = Resonance(d, cfg.n_frequency, cfg.causal, cfg.bias)
            else:
                self.read = Fourier()
        self.ffn_norm, self.ffn = norm(d, cfg), GatedFFN(d, cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x_BNd, row):
        """x (B,N,d) -> (B,N,d), or (B,K,d) at the tokens that read by `row`."""
        x_BQd = row.select(x_BNd)
        if self.read is not None:
            h_BNd = self.read_norm(x_BNd)
            if self.mixing == "attention":
                read_BQd = self.read(row.select(h_BNd), h_BNd, row.visible(self.window),
                                     row.rotary(self.theta))
            else:
                read_BQd = row.select(self.read(h_BNd, row.real_BT))
            x_BQd = x_BQd + self.drop(read_BQd)
        return x_BQd + self.drop(self.ffn(self.ffn_norm(x_BQd)))

    # ---- for generation: the tokens that follow those of `past`

    def start(self, B, longest):
        """-> what the layer keeps of the tokens so far, for up to `longest` of them."""
        if self.read is None:
            return None
        if self.mixing == "resonance":
            return self.read.start(B)
        weight, H = self.read.q.weight, self.read.n_head
        return [weight.new_empty(B, H, longest, weight.shape[0] // H) for _ in range(2)]

    def extend(self, x_BTd, kept, past):
        """As forward for further tokens (B,T,d). kept: of `start`, is brought up to date."""
        if self.read is None:
            return x_BTd + self.ffn(self.ffn_norm(x_BTd))
        h_BTd = self.read_norm(x_BTd)
        if self.mixing == "resonance":
            read_BTd = self.read.extend(h_BTd, kept, past.new_real_BT)
        else:
            read_BTd = self.extend_attention(h_BTd, kept, past)
        x_BTd = x_BTd + read_BTd
        return x_BTd + self.ffn(self.ffn_norm(x_BTd))

    def extend_attention(self, h_BTd, kept, past):
        read = self.read
        k, v = read.kv(h_BTd).chunk(2, dim=-1)
        new = slice(past.n, past.n + h_BTd.shape[1])
        turned = past.angles(self.theta)
        q, k = split_heads(read.q(h_BTd), k, read.n_head, None, read.gain, read.qk_norm)
        v = v.unflatten(-1, (read.n_head, -1)).transpose(1, 2)
        q, k = rotate(q, *turned), rotate(k, *turned)
        for all_BHNe, new_BHTe in zip(kept, (k, v)):
            all_BHNe[:, :, new] = new_BHTe
        k, v = (t[:, :, :new.stop] for t in kept)
        read_BHTe = kernels.attention(q.to(v.dtype), k, v, past.visible(self.window))
        return read.out(read_BHTe.transpose(1, 2).flatten(2))


class CausalMixer(LocalMixer):
    """A LocalMixer whose tokens see those before them only, as many in all."""

    def convolve(self, u_BTm, documents_BT, before=None):
        """before (B, kernel - 1, m): what came before the row; None: nothing."""
        taps, T, reach = self.taps.to(u_BTm.dtype), u_BTm.shape[1], self.kernel - 1
        if before is None:
            padded = F.pad(u_BTm, (0, 0, reach, 0))
        else:
            padded = torch.cat((before.to(u_BTm.dtype), u_BTm), dim=1)
        if documents_BT is None:
            half = reach // 2  # the filter is centred: the last token it sees is the token itself
            return kernels.depthwise_convolution(padded, taps)[:, half:half + T]
        documents, total = F.pad(documents_BT, (reach, 0), value=-1), 0
        for j in range(self.kernel):
            same_document = (documents[:, j:j + T] == documents_BT)[..., None]
            total = total + padded[:, j:j + T] * taps[:, j] * same_document
        return total

    def start(self, B):
        return [self.taps.new_zeros(B, self.kernel - 1, len(self.taps))]

    def extend(self, x_BTd, kept, real_BT):
        """As forward for further tokens. kept: of `start`, is brought up to date."""
        u, gate = self.wi(self.norm(x_BTd)).chunk(2, dim=-1)
        if real_BT is not None:
            u = u * real_BT[..., None]
        y = self.convolve(u, None, kept[0])
        if self.kernel > 1:
            kept[0] = torch.cat((kept[0].to(u.dtype), u), dim=1)[:, 1 - self.kernel:]
        return x_BTd + self.out(y * F.silu(gate))


class Past:
    """What a causal model keeps of the tokens so far (`Transformer.start`), and what is new."""

    def __init__(self, model, B, longest):
        self.cfg, self.n, self.longest = model.cfg, 0, longest
        device = model.wte.device
        self.real_BN = torch.ones(B, longest, dtype=torch.bool, device=device)
        self.has_padding = False
        self.mixers = [mixer.start(B) for mixer in model.mixers]
        self.layers = [layer.start(B, longest) for layer in model.all_layers()]

    def take(self, T, real_BT):
        """T further tokens are to be read; real (B,T) bool, None: all are."""
        self.new_real_BT, self.by_window, self.by_theta = real_BT, {}, {}
        device = self.real_BN.device
        self.place_T = torch.arange(self.n, self.n + T, device=device)
        if real_BT is not None:
            self.real_BN[:, self.n:self.n + T] = real_BT
            self.has_padding = True

    def visible(self, window):
        if len(self.place_T) == 1 and not self.has_padding and not window:
            return None  # the newest token sees all
        if window not in self.by_window:
            n_key = self.n + len(self.place_T)
            self.by_window[window] = kernels.Visible(
                n_key, self.real_BN.device, self.real_BN[:, :n_key] if self.has_padding else None,
                None, True, window, self.place_T[None])
        return self.by_window[window]

    def angles(self, theta):
        if theta not in self.by_theta:
            self.by_theta[theta] = angles(self.place_T, theta, self.cfg)
        return self.by_theta[theta]


# ---- heads ------------------------------------------------------------------------


class BertHead(nn.Module):
    """The prediction head of BERT: a dense layer before the logits, and a bias for each word."""
    WIDER = 8  # further columns for the bias: products are fastest for multiples of 8

    def __init__(self, cfg):
        super().__init__()
        d = cfg.token_dim
        self.dense, self.norm = nn.Linear(d, d, bias=cfg.bias), norm(d, cfg)
        self.word_bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, states, table_Vd):
        """-> states and table for which states . table are the logits, bias included."""
        states = self.norm(F.gelu(self.dense(states)))
        states = F.pad(states, (0, self.WIDER), value=1.0)
        bias_V1 = self.word_bias[:, None].to(table_Vd.dtype)
        return states, torch.cat((table_Vd, F.pad(bias_V1, (0, self.WIDER - 1))), dim=1)


class CopyHead(Lexicon):
    """Adds logits for the words that occur in the row, as the Lexicon of a ConceptEncoder does.

    Two things differ. Which words occur is known exactly, as no concept stands between. And ids
    share N_BUCKET memories of contexts, not the concepts':
    logits[k, v] = state[k] . table[v] + gate[k, v % N_BUCKET] * (weight of v if it occurs, else 0)
    """
    N_BUCKET = 64

    def __init__(self, cfg):
        d = cfg.token_dim
        super().__init__(SimpleNamespace(
            content_dim=d, token_width=d, concept_dim=d, context_dim=max(1, d // 4),
            vocab_size=cfg.vocab_size))
        del self.to_words, self.scale  # what a concept needs to say which words it has read
        nn.init.constant_(self.threshold, -1.0)  # the words of the row start a little more likely
        self.mask_id, self.vocab_size, self.width = cfg.mask_id, cfg.vocab_size, d

    def remember(self, ids, x_BTd, real_BT):
        """What recall needs, as vectors (B, N_BUCKET + ceil(V/d), d) that go with the registers."""
        seen_BT = ids != self.mask_id
        if real_BT is not None:
            seen_BT = seen_BT & real_BT
        memory_BGr = self.context_memory(normalize(x_BTd), ids % self.N_BUCKET, self.N_BUCKET,
                                         seen_BT[:, None, None])
        occurs_BV = torch.zeros(len(ids), self.vocab_size + -self.vocab_size % self.width,
                                device=ids.device)
        # a token that is not seen writes zero; amax, because others of its id may be seen
        occurs_BV = occurs_BV.scatter_reduce(1, ids, seen_BT.float(), "amax")
        memory_BGd = F.pad(memory_BGr, (0, self.width - memory_BGr.shape[-1]))
        return torch.cat((memory_BGd, occurs_BV.unflatten(1, (-1, self.width))), dim=1)

    def recall(self, remembered, states_BKd, x_BKd):
        """-> logits of the row's words (B,V) and their gate at each position (B,K,N_BUCKET)."""
        memory_BGd, occurs = remembered.split(
            [self.N_BUCKET, remembered.shape[1] - self.N_BUCKET], dim=1)
        memory_BGr = memory_BGd[..., :self.context.out_features]
        gate_BKG = self.gate_per_concept(memory_BGr, states_BKd, normalize(x_BKd))
        occurs_BV = occurs.flatten(1)[:, :self.vocab_size]
        return occurs_BV * F.softplus(self.threshold) * self.id_weight, gate_BKG


# ---- the models -----------------------------------------------------------------------


class Transformer(nn.Module):
    arch = "transformer"  # its name in settings and checkpoints

    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.token_dim
        self.wte = nn.Parameter(torch.empty(cfg.vocab_size, d))
        self.time = TimeInput(cfg) if cfg.time_input else None
        has_registers = cfg.n_register > 0
        self.registers = nn.Parameter(torch.empty(cfg.n_register, d)) if has_registers else None
        mixer = CausalMixer if cfg.causal else LocalMixer
        self.mixers = nn.ModuleList(mixer(cfg) for _ in range(cfg.n_mixer))
        self.layers = nn.ModuleList(Layer(cfg, i) for i in range(cfg.n_layer - 1))
        self.last = Layer(cfg, max(0, cfg.n_layer - 1))
        self.norm = norm(d, cfg)
        self.copy_head = CopyHead(cfg) if cfg.copy_head else None
        self.bert_head = BertHead(cfg) if cfg.bert_head else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        for name, p in self.named_parameters():
            if name == "wte":
                p.normal_(0, table_std(p.shape[1]))
            elif name == "registers":
                p.normal_(0, 1.0)
            else:
                init_matrix(name, p, max(1, self.cfg.n_layer))

    @torch.no_grad()
    def start_table(self, vectors_Vd):
        """As ConceptEncoder.start_table."""
        self.wte.copy_(vectors_Vd * self.wte.std())

    def all_layers(self):
        return [*self.layers, self.last]

    def blocks(self):
        """As ConceptEncoder.blocks."""
        return [*self.mixers, *self.all_layers()]

    # The methods below are those of ConceptEncoder, with the registers in place of concepts.

    def table(self):
        """The token table (V,d), shared by embedding and head."""
        return self.wte

    def forward(self, ids, positions, targets, weights, total_weight=None, attention_mask=None,
                with_nats=False):
        """The loss, as ConceptEncoder.forward."""
        documents = self.documents(ids, attention_mask)
        registers, tokens = self.encode(ids, attention_mask)
        states, *copies = self.read_tokens(registers, tokens, positions, documents, attention_mask)
        states, table = self.before_logits(states)
        total, nats_BK = kernels.cross_entropy(states, table, targets, weights, *copies)
        if total_weight is None:
            total_weight = weights.sum().clamp(min=1e-9)
        loss = total / total_weight
        return (loss, nats_BK) if with_nats else loss

    def encode(self, ids, attention_mask=None, added=None, vectors_BTd=None):
        """ids (B,T) int64 -> registers (B,R,d), tokens (B,T,d) before the last layer; of a decoder,
        which predicts at every position, behind it.

        With a copy head, what it remembers of the row comes as further registers.
        """
        check_length(ids, self.cfg)
        B, T = ids.shape
        R, documents_BT = self.cfg.n_register, self.documents(ids, attention_mask)
        real_BT = None if attention_mask is None else attention_mask.bool()
        x_BTd = F.embedding(ids, self.wte) if vectors_BTd is None else vectors_BTd
        if self.time is not None:
            x_BTd = x_BTd + self.time(ids, real_BT)
        if added is not None:
            x_BTd = x_BTd + added
        x_BTd = normalize(x_BTd)
        for mixer in self.mixers:
            x_BTd = mixer(x_BTd, real_BT, documents_BT)
        x_BNd = torch.cat((self.registers.expand(B, -1, -1), x_BTd), dim=1) if R else x_BTd
        row = Row(self.cfg, T, ids.device, real_BT, documents_BT)
        for layer in self.layers:
            x_BNd = layer(x_BNd, row)
        if self.cfg.causal:
            x_BNd = self.norm(self.last(x_BNd, row))
        registers, tokens = x_BNd[:, :R], x_BNd[:, R:]
        if self.copy_head:
            remembered = self.copy_head.remember(ids, tokens, real_BT).to(tokens.dtype)
            registers = torch.cat((registers, remembered), dim=1)
        return registers, tokens

    def decode(self, registers, tokens, positions, documents=None, attention_mask=None):
        """The last layer, at positions (B,K) int64 only. -> states (B,K,d); with a copy head
        kernels.States, for `logits`.
        """
        states_BKd, *copies = self.read_tokens(
            registers, tokens, positions, documents, attention_mask)
        return kernels.States.of(states_BKd, copies) if copies else states_BKd

    def read_tokens(self, registers, tokens, positions, documents=None, attention_mask=None):
        """As decode -> plain states (B,K,d); with a copy head also what recall returns."""
        if self.cfg.causal:
            return (gather_rows(tokens, positions),)
        if self.cfg.isolate_documents and documents is None:
            raise ValueError("isolate_documents=True: decode needs documents=model.documents(ids, "
                             "attention_mask)")
        if self.cfg.mntp:  # the state before a masked token predicts it
            before = (positions - 1).clamp(min=0)
            if documents is not None:  # that of another document knows nothing of this one
                same = documents.gather(1, before) == documents.gather(1, positions)
                before = torch.where(same, before, positions)
            positions = before
        R = self.cfg.n_register
        registers, remembered = registers[:, :R], registers[:, R:]
        real_BT = None if attention_mask is None else attention_mask.bool()
        row = Row(self.cfg, tokens.shape[1], tokens.device, real_BT, documents, positions)
        x_BNd = torch.cat((registers, tokens), dim=1) if R else tokens
        states_BKd = self.norm(self.last(x_BNd, row))
        if not self.copy_head:
            return (states_BKd,)
        return states_BKd, *self.copy_head.recall(
            remembered, states_BKd, gather_rows(tokens, positions))

    def before_logits(self, states):
        """States (...,d) -> states and table for which states . table are the logits."""
        if self.bert_head is None:
            return states, self.wte
        return self.bert_head(states, self.wte)

    def logits(self, states):
        """States (...,d) that `decode` returned, or a selection of them -> (...,V)."""
        logits = kernels.logits(*self.head_of(states))
        return logits.reshape(*states.shape[:-1], len(self.wte))

    def nats(self, states, targets, weights):
        """Sum of weights (B,K) x nats of predicting targets (B,K) from states. -> scalar."""
        states, *others = self.head_of(states)
        B_K = states.shape[:2]
        return kernels.cross_entropy(
            states, others[0], targets.reshape(B_K), weights.reshape(B_K), *others[1:])[0]

    def head_of(self, states):
        """What logits are made of: states, the token table itself (tied), row logits and gate."""
        if not self.copy_head:
            return self.before_logits(states)
        (row_logits_RV, gate), row = kernels.lexicon_of(states)
        return kernels.one_by_one(*self.before_logits(states), row_logits_RV, gate, row)

    def documents(self, ids, attention_mask=None):
        """Number of each token's document (B,T), or None unless isolate_documents."""
        if not self.cfg.isolate_documents:
            return None
        real_BT = None if attention_mask is None else attention_mask.bool()
        return number_documents(ids, self.cfg.eot_id, real_BT)

    # ---- generation by a decoder -----------------------------------------------------

    def start(self, B, longest):
        """-> Past of B rows, for up to `longest` tokens, before the first one."""
        return Past(self, B, longest)

    def extend(self, ids, past, real_BT=None):
        """The tokens (B,T) that follow those in `past`, which it brings up to date -> their states
        (B,T,d), for `logits`. What `encode` and `decode` give for whole rows.

        real (B,T) bool: False for padding, with which rows may begin.
        """
        T = ids.shape[1]
        if past.n + T > past.longest:
            raise ValueError(f"{past.n + T} tokens, and there is room for {past.longest}")
        past.take(T, real_BT)
        x_BTd = normalize(F.embedding(ids, self.wte))
        for mixer, kept in zip(self.mixers, past.mixers):
            x_BTd = mixer.extend(x_BTd, kept, real_BT)
        for layer, kept in zip(self.all_layers(), past.layers):
            x_BTd = layer.extend(x_BTd, kept, past)
        past.n += T
        return self.norm(x_BTd)

    # ---- size and cost ---------------------------------------------------------------

    def freeze(self, dtype=torch.float32):
        """As ConceptEncoder.freeze; there is nothing to compute once here."""
        return self.to(dtype).eval()

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T, K, B=1):
        """Training FLOPs (three times the forward) an input token; as ConceptEncoder's."""
        cfg, d = self.cfg, self.cfg.token_dim
        N, ffn = T + cfg.n_register, 3 * d * cfg.ffn_dim
        layers = sum(self.mixing_flops(layer, N, N, B) + N * ffn for layer in self.layers)
        n_last = N if cfg.causal else K
        if cfg.n_layer:
            layers += self.mixing_flops(self.last, N, n_last, B)
        layers += n_last * ffn
        mixer = T * 2 * d * (2 * d + d + cfg.mixer_kernel)
        head = K * d * cfg.vocab_size + (TimeInput.WIDTH * d if self.time else 0)
        if self.bert_head:
            head += K * (d * d + BertHead.WIDER * cfg.vocab_size)
        if self.copy_head:
            r, G = self.copy_head.context.out_features, self.copy_head.N_BUCKET
            head += T * d * (r + 1) + K * (d + r * (d + G))
        return 6 * (layers + len(self.mixers) * mixer + head) / T

    def mixing_flops(self, layer, N, Q, B):
        """Multiply-adds with which Q of N tokens read the others in a layer, forward."""
        d, w = self.cfg.token_dim, layer.window
        if layer.mixing == "resonance":
            return layer.read.flops(N, B)
        if layer.mixing == "fnet":
            return layer.read.flops(N, d)
        pairs = Q * N
        if Q == N and w and N >= 4 * w:  # kernels.block_attention
            pairs = -(-N // w) * w * w * (2 if self.cfg.causal else 3)
        return Q * 2 * d * d + N * 2 * d * d + 2 * d * pairs


class ResonanceLM(Transformer):
    """A Transformer with other mixers in place of attention, in all or in some layers."""
    arch = "resonance"
