"""What a ConceptEncoder has to beat: a Transformer encoder with the same interface, head and loss, and two controls.

    tokens (B,T) --embed--> x_BTd --[local mixers]--> x_BTd --n_layer x [ attention | gated FFN ]--> x_BTd      O(T^2)
    the last layer runs only at the predicted positions (its keys and values are all tokens)  --tied head--> logits_BKV

Trained by the same loop with arch="transformer". It is a strong one, on purpose: pre-norm, rotary positions
(RoFormer, 2104.09864), GEGLU (2002.05202), normalised queries and keys, the concept model's own local mixers, and no
work at unmasked positions in the last layer. The controls answer what the concepts are good for:

    n_register=64   64 extra learned tokens (2309.16588): do extra slots help, or does the bottleneck?
    n_layer=0       the local mixers alone, with one FFN at the predicted positions: what was local all along?

Shapes: B rows, T tokens, K predicted positions, R registers, N = R + T, d width, V vocabulary, H heads.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.layers import (
    Attention,
    GatedFFN,
    LocalMixer,
    MaskedEncoder,
    gather_rows,
    init_matrix,
    norm,
    table_std,
    too_small,
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
    bias: bool = False  # biases in linear layers and norms
    dropout: float = 0.0  # on residual branches; 0 for pretraining
    isolate_documents: bool = False  # documents packed into one row do not see each other; needs eot_id
    mask_id: int = -1  # id of [MASK]
    eot_id: int = -1  # id that ends a document

    def __post_init__(self):
        wrong = too_small(self, vocab_size=2, block_size=1, n_layer=0, n_head=1, token_dim=2, ffn_dim=1, n_mixer=0,
                          mixer_kernel=1, n_register=0)
        if not wrong and self.token_dim % (2 * self.n_head):
            fits = [n for n in range(1, 65) if self.token_dim % (2 * n) == 0]
            wrong.append(f"n_head={self.n_head}: rotary positions need an even share of token_dim={self.token_dim} "
                         f"for each head; these fit: {fits}")
        if self.mixer_kernel % 2 == 0:
            wrong.append(f"mixer_kernel={self.mixer_kernel}: expected an odd number of tokens")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout={self.dropout}: expected 0 or more and below 1")
        if self.n_register and not self.n_layer:
            wrong.append("n_register needs n_layer of 1 or more: nothing would read the registers")
        if self.isolate_documents and not 0 <= self.eot_id < self.vocab_size:
            wrong.append("isolate_documents=True needs eot_id, an id of the tokenizer below vocab_size")
        if self.isolate_documents and self.n_register:
            wrong.append("isolate_documents=True with n_register: documents would meet in the registers")
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def token_width(self):
        return self.token_dim

    @property
    def longest(self):
        return self.block_size


class Layer(nn.Module):
    """Attention and gated FFN, pre-norm. x_BQd reads y_BNd -> x_BQd; without attention, the FFN alone."""
    def __init__(self, cfg, attention=True):
        super().__init__()
        d = cfg.token_dim
        if attention:
            self.read_norm, self.read = norm(d, cfg), Attention(d, d, cfg, gain=1.0)
        self.ffn_norm, self.ffn = norm(d, cfg), GatedFFN(d, cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x_BQd, y_BNd, mask=None, turns=None):
        if hasattr(self, "read"):
            h_BNd = self.read_norm(y_BNd)
            h_BQd = h_BNd if x_BQd is y_BNd else self.read_norm(x_BQd)
            x_BQd = x_BQd + self.drop(self.read(h_BQd, h_BNd, mask, turns))
        return x_BQd + self.drop(self.ffn(self.ffn_norm(x_BQd)))


class Transformer(MaskedEncoder):
    arch = "transformer"

    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.token_dim
        self.wte = nn.Parameter(torch.empty(cfg.vocab_size, d))
        self.registers = nn.Parameter(torch.empty(cfg.n_register, d)) if cfg.n_register else None
        self.mixers = nn.ModuleList(LocalMixer(cfg) for _ in range(cfg.n_mixer))
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer - 1))
        self.last = Layer(cfg, attention=cfg.n_layer > 0)
        self.norm = norm(d, cfg)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        for name, p in self.named_parameters():
            if name in ("wte", "registers"):
                p.normal_(0, table_std(p.shape[1]) if name == "wte" else 1.0)
            else:
                init_matrix(name, p, max(1, self.cfg.n_layer))

    def _encode(self, ids, attention_mask, table_Vd, documents_BT, start=0, added_BTd=None):
        B, T = ids.shape
        real_BT = None if attention_mask is None else attention_mask.bool()
        x_BTd = F.embedding(ids, table_Vd)
        x_BTd = x_BTd if added_BTd is None else x_BTd + added_BTd
        x_BTd = F.layer_norm(x_BTd, x_BTd.shape[-1:])
        for mixer in self.mixers:
            x_BTd = mixer(x_BTd, real_BT, documents_BT)
        R = self.cfg.n_register
        x_BNd = torch.cat((self.registers.expand(B, -1, -1), x_BTd), dim=1) if R else x_BTd
        mask, turn = self.mask(real_BT, documents_BT, documents_BT), self.turn(T)
        for layer in self.layers:
            x_BNd = layer(x_BNd, x_BNd, mask, (turn, turn))
        return x_BNd[:, :R], x_BNd[:, R:]

    def _decode(self, registers, tokens, positions, documents, attention_mask, start=0):
        """The last layer, at positions (B,K) int64 alone. registers (B,R,d), tokens (B,T,d) -> states (B,K,d), None."""
        x_BKd = gather_rows(tokens, positions)
        if not self.cfg.n_layer:
            return self.norm(self.last(x_BKd, tokens)), None
        real_BT = None if attention_mask is None else attention_mask.bool()
        mine_BK = None if documents is None else documents.gather(1, positions)
        mask, turn = self.mask(real_BT, mine_BK, documents), self.turn(tokens.shape[1])
        y_BNd = torch.cat((registers, tokens), dim=1) if self.cfg.n_register else tokens
        turn_BK = [part[0, 0][positions + self.cfg.n_register][:, None] for part in turn]
        return self.norm(self.last(x_BKd, y_BNd, mask, (turn_BK, turn))), None

    def turn(self, T):
        """Cosines and sines (1,1,N,e/2) by which registers, which stand at 0, and T tokens are rotated."""
        places, e = torch.arange(-self.cfg.n_register, T, device=self.wte.device), self.cfg.token_dim // self.cfg.n_head
        frequency = 10_000.0 ** (-torch.arange(0, e, 2, device=self.wte.device) / e)
        angles = (places.clamp(min=0)[:, None] * frequency)[None, None]
        return angles.cos(), angles.sin()

    def mask(self, real_BT, query_documents, documents_BT):
        """Mask (B,1,1 or Q,N) or None. A row without a real token is read as it is: no query is left without a key."""
        mask = None
        if real_BT is not None:
            real_BT = real_BT | ~real_BT.any(1, keepdim=True)
            mask = F.pad(real_BT, (self.cfg.n_register, 0), value=True)[:, None, None]
        if documents_BT is not None:
            same = query_documents[:, None, :, None] == documents_BT[:, None, None]
            mask = same if mask is None else same & (mask | ~(same & mask).any(-1, keepdim=True))
        return mask

    def flops_per_token(self, T, K, B=1):
        """Training FLOPs (three times the forward) an input token; as ConceptEncoder.flops_per_token."""
        cfg, d = self.cfg, self.cfg.token_dim
        N, ffn = T + cfg.n_register, 3 * d * cfg.ffn_dim
        layer = N * (4 * d * d + ffn) + 2 * N * N * d
        last = K * ffn + (K * 2 * d * d + N * 2 * d * d + 2 * K * N * d) * (cfg.n_layer > 0)
        mixer = T * 2 * d * (2 * d + d + cfg.mixer_kernel)
        return 6 * (len(self.layers) * layer + last + len(self.mixers) * mixer + K * d * cfg.vocab_size) / T
