"""Variants of the open model that are not in it, each a patch of model.py, trained by train.py with the given settings.

    python records/architecture/variants.py position_query config/mini.py --block_size=512 ... --out_dir=out/position_query

Run from the repository's folder. FLOPs that train.py prints are those of the unpatched model. Variants that change how
concepts read are for --lexicon=false: competition, anchored, no_residual, quiet_reads, no_qk_norm.
"""
import runpy
import sys

sys.path.insert(0, ".")
import torch
import torch.nn as nn
import torch.nn.functional as F

import layers
import model
from layers import Attention, norm
from model import ConceptEncoder, ConceptLayer, OpenDecoder

init, encode, layer_forward = ConceptEncoder.__init__, ConceptEncoder._encode, ConceptLayer.forward
forward, masks, decode = ConceptEncoder.forward, ConceptEncoder.masks, ConceptEncoder._decode


def position_query():
    """A predicted position asks with its position alone, as in strict."""
    def ask(self, concepts, tokens, *others):
        place_Td = F.layer_norm(self.wpe[:tokens.shape[1]], self.wpe.shape[-1:])
        return decode(self, concepts, place_Td.expand_as(tokens), *others)
    ConceptEncoder._decode = ask


def half_queries():
    """Half of the queries of a training batch are their position alone."""
    def ask(self, concepts, tokens, *others):
        place_Td = F.layer_norm(self.wpe[:tokens.shape[1]], self.wpe.shape[-1:])
        hidden_BT1 = torch.rand(*tokens.shape[:2], 1) < 0.5 * self.training
        return decode(self, concepts, torch.where(hidden_BT1, place_Td, tokens), *others)
    ConceptEncoder._decode = ask


def no_contexts():
    """Positions listen to all concepts alike, whatever their contexts."""
    def listen(self, memory_BCr, states_BKD, x_BKd):
        return 2 * torch.sigmoid(states_BKD.float() @ self.gate)[..., None].expand(-1, -1, memory_BCr.shape[1])
    model.Lexicon.listen = listen


def orthogonal():
    """Concepts start orthogonal instead of normal, the same size."""
    def start(self):
        weights(self)
        with torch.no_grad():
            nn.init.orthogonal_(self.concepts).mul_(self.cfg.concept_std * self.cfg.concept_dim**0.5)
    weights = ConceptEncoder.init_weights
    ConceptEncoder.init_weights = start


def identities():
    """What concepts read goes in and out as it is at first: values, output and lexicon start near the identity."""
    def start(self):
        weights(self)
        with torch.no_grad():
            for layer in self.layers:
                for w in (layer.read.kv.weight[self.cfg.concept_dim:], layer.read.out.weight):
                    w.mul_(0.3).add_(torch.eye(*w.shape))
            if self.lexicon:
                self.lexicon.words.weight.mul_(0.3).add_(torch.eye(*self.lexicon.words.weight.shape))
    weights = ConceptEncoder.init_weights
    ConceptEncoder.init_weights = start


def token_update():
    """After the concepts have thought, every token reads them."""
    def build(self, cfg):
        init(self, cfg)
        self.update_norm, self.update = norm(cfg.token_width, cfg), Attention(cfg.token_width, cfg.concept_dim, cfg, 1.0)

    def encode_and_update(self, *arguments, **named):
        concepts, x = encode(self, *arguments, **named)
        return concepts, x + self.update(self.update_norm(x), concepts)
    ConceptEncoder.__init__, ConceptEncoder._encode = build, encode_and_update


def window_attention(reach=8):
    """Attention over 8 tokens on each side and a gated FFN of the mixer's size in place of the depthwise convolution."""
    class Window(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            d = cfg.token_width
            self.read_norm, self.read = norm(d, cfg), Attention(d, d, cfg, 1.0)
            self.ffn_norm, self.wi, self.out = norm(d, cfg), nn.Linear(d, 2 * d, bias=False), nn.Linear(d, d, bias=False)

        def forward(self, x, real_BT=None, documents_BT=None):
            place = torch.arange(x.shape[1])
            angles = place[:, None] * 10_000.0 ** (-torch.arange(0, 16, 2) / 16)  # heads of 16
            turn = angles.cos(), angles.sin()
            h = self.read_norm(x)
            x = x + self.read(h, h, (place[:, None] - place).abs() <= reach, (turn, turn))
            a, b = self.wi(self.ffn_norm(x)).chunk(2, -1)
            return x + self.out(F.gelu(a) * b)
    model.LocalMixer = Window


def competition():
    """Concepts compete for tokens: softmax over concepts, then a weighted mean over tokens (slot attention, 2006.15055)."""
    def read(self, x_BQD, y_BNE, mask=None, turns=None):
        k, v = self.kv(y_BNE).chunk(2, dim=-1)
        q, k = layers.split_heads(self.n_head, self.q(x_BQD), k, turns, self.gain)
        share = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-2)
        share = share if mask is None else share * mask
        out = (share / share.sum(-1, keepdim=True).clamp(min=1e-6)).to(v.dtype) @ v.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        return self.out(F.rms_norm(out, out.shape[-1:]).transpose(1, 2).flatten(2))

    def build(self, cfg):
        init(self, cfg)
        for layer in self.layers:
            layer.read.forward = read.__get__(layer.read)
    ConceptEncoder.__init__ = build


def anchored():
    """Concept j reads near (j + 1/2) T / C: four heads of eight with slopes, four without."""
    def anchored_masks(self, ids, real_BT, documents_BT):
        read_mask, self_mask = masks(self, ids, real_BT, documents_BT)
        C, T = self.cfg.n_concept, ids.shape[1]
        far = ((torch.arange(C)[:, None] + 0.5) * T / C - torch.arange(T)).abs() / (T / C)
        slopes = torch.tensor([4, 2, 1, 0.5, 0, 0, 0, 0])[:, None, None]
        bias = -(slopes * far)[None]
        return (bias if read_mask is None else bias.masked_fill(~read_mask, -1e4)), self_mask
    ConceptEncoder.masks = anchored_masks
    layers.dot_product_attention = F.scaled_dot_product_attention  # this mask is a bias


def no_residual():
    """What the first layer has read replaces the learned concepts instead of being added to them."""
    def first(self, c_BCD, x_BTd, read_mask=None, self_mask=None, *own_words):
        c_BCD = self.read(self.read_norm(c_BCD), x_BTd, read_mask)
        return c_BCD + self.ffn(self.ffn_norm(c_BCD))
    ConceptLayer.forward = first


def quiet_reads():
    """What is read is not normalised, by concepts or by positions."""
    def build(self, cfg):
        init(self, cfg)
        for module in self.modules():
            if isinstance(module, Attention):
                module.normalize = False
    ConceptEncoder.__init__ = build


def no_qk_norm():
    """Queries and keys as they are."""
    def plain(n_head, q, k, turns=None, gain_H=None):
        return [t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in (q, k)]
    layers.split_heads = plain


def no_think():
    """Concept layers only read."""
    ConceptLayer.forward = lambda self, c, x, mask=None, self_mask=None, *words: c + self.read(
        self.read_norm(c), x, mask, *words)


def deaf_decoder():
    """Predicted positions do not read concepts; only the lexicon speaks to them."""
    def think(self, y, c, mask=None):
        for block in self.blocks:
            y = y + block["ffn"](block["ffn_norm"](y))
        return self.norm(y)
    OpenDecoder.forward = think


def other_half():
    """Training: concepts read one half of the row, and masked tokens of the other half are predicted (prefix, suffix)."""
    def half_forward(self, ids, positions, targets, weights, total_weight=None, attention_mask=None):
        if not self.training:
            return forward(self, ids, positions, targets, weights, total_weight, attention_mask)
        first = torch.rand(len(ids), 1) < 0.5
        self.reads_half = (torch.arange(ids.shape[1]) < ids.shape[1] // 2) == first
        weights = weights * ((positions < ids.shape[1] // 2) != first)
        try:
            return forward(self, ids, positions, targets, weights, weights.sum().clamp(min=1), attention_mask)
        finally:
            self.reads_half = None

    def half_masks(self, ids, real_BT, documents_BT):
        read_mask, self_mask = masks(self, ids, real_BT, documents_BT)
        half = getattr(self, "reads_half", None)
        return (read_mask if half is None else read_mask & half[:, None, None]), self_mask
    ConceptEncoder.forward, ConceptEncoder.masks = half_forward, half_masks


name, sys.argv = sys.argv[1], ["train.py", *sys.argv[2:]]
globals()[name]()
runpy.run_path("train.py", run_name="__main__")
