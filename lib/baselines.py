"""The baseline: a Transformer encoder with the same interface, head and loss as the ConceptEncoder.

    ids (B,T) -> token table -> local mixers -> n_layer x [ attention | gated FFN ]        O(T^2)
    the last layer runs at the predicted positions only -> logits (B,K,V) by the token table (tied)

Trained by the same loop with arch="transformer". It is meant to be hard to beat: pre-norm, rotary
positions (RoFormer, 2104.09864), GEGLU (2002.05202), normalised queries and keys, the concept
model's own local mixers, and no work at unmasked positions in the last layer. Three settings make
it a control:

    n_register=64   64 extra learned tokens (2309.16588): do extra slots help without a bottleneck?
    n_layer=0       local mixers and one FFN, no attention: how much can neighbours alone predict?
    copy_head=True  the open model's lexicon without its concepts: is that what makes it better?

Shapes: B rows, T tokens, K predicted positions, R registers, N = R + T, d width, V vocabulary,
H heads, e = d / H.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib import kernels
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
    table_std,
)


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a Transformer. Impossible combinations raise ValueError, all of them at once."""
    vocab_size: int = 30522  # rows of the token table
    block_size: int = 512  # longest row, in tokens
    n_layer: int = 4  # attention + FFN layers; 0: local mixers alone
    n_head: int = 8  # attention heads; token_dim is divided among them
    token_dim: int = 512  # width, d
    ffn_dim: int = 2048  # hidden width of the gated feed-forward layers
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
        problems = below(self, vocab_size=2, block_size=1, n_layer=0, n_head=1, token_dim=2,
                         ffn_dim=1, n_mixer=0, mixer_kernel=1, n_register=0)
        if not problems and self.token_dim % (2 * self.n_head):
            fits = [n for n in range(1, 65) if self.token_dim % (2 * n) == 0]
            problems.append(f"n_head={self.n_head}: rotary positions need an even share of "
                            f"token_dim={self.token_dim} for each head; these fit: {fits}")
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
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def token_width(self):
        return self.token_dim

    @property
    def longest(self):
        return self.block_size


class Layer(nn.Module):
    """Attention and gated FFN, pre-norm. x (B,Q,d) reads y (B,N,d) -> (B,Q,d)."""

    def __init__(self, cfg, has_attention=True):
        super().__init__()
        d = cfg.token_dim
        self.read = None
        if has_attention:
            self.read_norm, self.read = norm(d, cfg), Attention(d, d, cfg, gain=1.0)
        self.ffn_norm, self.ffn = norm(d, cfg), GatedFFN(d, cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x_BQd, y_BNd, mask=None, rotary=None):
        if self.read is not None:
            h_BNd = self.read_norm(y_BNd)
            h_BQd = h_BNd if x_BQd is y_BNd else self.read_norm(x_BQd)
            x_BQd = x_BQd + self.drop(self.read(h_BQd, h_BNd, mask, rotary))
        return x_BQd + self.drop(self.ffn(self.ffn_norm(x_BQd)))


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


class Transformer(nn.Module):
    arch = "transformer"  # its name in settings and checkpoints

    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.token_dim
        self.wte = nn.Parameter(torch.empty(cfg.vocab_size, d))
        self.time = TimeInput(cfg) if cfg.time_input else None
        has_registers = cfg.n_register > 0
        self.registers = nn.Parameter(torch.empty(cfg.n_register, d)) if has_registers else None
        self.mixers = nn.ModuleList(LocalMixer(cfg) for _ in range(cfg.n_mixer))
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer - 1))
        self.last = Layer(cfg, has_attention=cfg.n_layer > 0)
        self.norm = norm(d, cfg)
        self.copy_head = CopyHead(cfg) if cfg.copy_head else None
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

    # The methods below are those of ConceptEncoder, with the registers in place of concepts.

    def table(self):
        """The token table (V,d), shared by embedding and head."""
        return self.wte

    def forward(self, ids, positions, targets, weights, total_weight=None, attention_mask=None,
                with_nats=False):
        """The loss, as ConceptEncoder.forward."""
        documents = self.documents(ids)
        registers, tokens = self.encode(ids, attention_mask)
        states, *copies = self.read_tokens(registers, tokens, positions, documents, attention_mask)
        total, nats_BK = kernels.cross_entropy(states, self.wte, targets, weights, *copies)
        if total_weight is None:
            total_weight = weights.sum().clamp(min=1e-9)
        loss = total / total_weight
        return (loss, nats_BK) if with_nats else loss

    def encode(self, ids, attention_mask=None, added=None, vectors_BTd=None):
        """ids (B,T) int64 -> registers (B,R,d), tokens (B,T,d) before the last layer.

        With a copy head, what it remembers of the row comes as further registers.
        """
        check_length(ids, self.cfg)
        B, T = ids.shape
        R, documents_BT = self.cfg.n_register, self.documents(ids)
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
        mask = self.mask(real_BT, documents_BT, documents_BT)
        angles = self.rotary_angles(T)
        for layer in self.layers:
            x_BNd = layer(x_BNd, x_BNd, mask, (angles, angles))
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
        if self.cfg.isolate_documents and documents is None:
            raise ValueError("isolate_documents=True: decode needs documents=model.documents(ids)")
        x_BKd = gather_rows(tokens, positions)
        registers, remembered = (registers[:, :self.cfg.n_register],
                                 registers[:, self.cfg.n_register:])
        states_BKd = self.last_layer(x_BKd, registers, tokens, positions, documents, attention_mask)
        if not self.copy_head:
            return (states_BKd,)
        return states_BKd, *self.copy_head.recall(remembered, states_BKd, x_BKd)

    def last_layer(self, x_BKd, registers, tokens, positions, documents, attention_mask):
        if not self.cfg.n_layer:
            return self.norm(self.last(x_BKd, tokens))
        real_BT = None if attention_mask is None else attention_mask.bool()
        documents_BK = None if documents is None else documents.gather(1, positions)
        mask = self.mask(real_BT, documents_BK, documents)
        y_BNd = torch.cat((registers, tokens), dim=1) if self.cfg.n_register else tokens
        angles = self.rotary_angles(tokens.shape[1])
        places_BK = positions + self.cfg.n_register
        angles_BK = [part[0, 0][places_BK][:, None] for part in angles]
        return self.norm(self.last(x_BKd, y_BNd, mask, (angles_BK, angles)))

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
            return states, self.wte
        (row_logits_RV, gate), row = kernels.lexicon_of(states)
        return kernels.one_by_one(states, self.wte, row_logits_RV, gate, row)

    def documents(self, ids):
        """Number of each token's document (B,T), or None unless isolate_documents."""
        if not self.cfg.isolate_documents:
            return None
        return number_documents(ids, self.cfg.eot_id)

    def rotary_angles(self, T):
        """(cos, sin), both (1,1,N,e/2). Registers stand at position 0."""
        device, e = self.wte.device, self.cfg.token_dim // self.cfg.n_head
        places_N = torch.arange(-self.cfg.n_register, T, device=device).clamp(min=0)
        frequency = 10_000.0 ** (-torch.arange(0, e, 2, device=device) / e)
        angles = (places_N[:, None] * frequency)[None, None]
        return angles.cos(), angles.sin()

    def mask(self, real_BT, query_documents, documents_BT):
        """(B,1,1 or Q,N) bool, True = may read, or None. In a row without a real token all is read:
        no query is left without a key.
        """
        mask = None
        if real_BT is not None:
            real_BT = real_BT | ~real_BT.any(1, keepdim=True)
            mask = F.pad(real_BT, (self.cfg.n_register, 0), value=True)[:, None, None]
        if documents_BT is not None:
            same = query_documents[:, None, :, None] == documents_BT[:, None, None]
            mask = same if mask is None else same & (mask | ~(same & mask).any(-1, keepdim=True))
        return mask

    def freeze(self, dtype=torch.float32):
        """As ConceptEncoder.freeze; there is nothing to compute once here."""
        return self.to(dtype).eval()

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T, K, B=1):
        """Training FLOPs (three times the forward) an input token; as ConceptEncoder's."""
        cfg, d = self.cfg, self.cfg.token_dim
        N, ffn = T + cfg.n_register, 3 * d * cfg.ffn_dim
        layer = N * (4 * d * d + ffn) + 2 * N * N * d
        last = K * ffn
        if cfg.n_layer:
            last += K * 2 * d * d + N * 2 * d * d + 2 * K * N * d
        mixer = T * 2 * d * (2 * d + d + cfg.mixer_kernel)
        head = K * d * cfg.vocab_size + (TimeInput.WIDTH * d if self.time else 0)
        if self.copy_head:
            r, G = self.copy_head.context.out_features, self.copy_head.N_BUCKET
            head += T * d * (r + 1) + K * (d + r * (d + G))
        return 6 * (len(self.layers) * layer + last + len(self.mixers) * mixer + head) / T
