"""What tools/bench.py compares: our models, those of transformers, and ways to mask.

All models have about as many parameters as strict: one width or depth of each is set for that. The
models of --length are small, of one width, and differ in how they mix tokens.
"""

import importlib.util
import os
import runpy
import statistics
import time
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.baselines import ResonanceConfig, ResonanceLM, Transformer, TransformerConfig
from masking import MASKING_TYPES, mask_batch, word_flags, word_starts
from model import ConceptConfig, ConceptEncoder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRESET = os.path.join(ROOT, "config", "micro_balanced.py")
VOCABULARY = 30522  # of BERT


# ---- models --------------------------------------------------------------------


def concept(bottleneck, T, **more):
    """The shape of micro_balanced, with a bottleneck and with positions for rows of T tokens.

    more: other settings of ConceptConfig.
    """
    names = {f.name for f in fields(ConceptConfig)}
    settings = {k: v for k, v in runpy.run_path(PRESET).items() if k in names}
    settings |= dict(vocab_size=VOCABULARY, block_size=max(512, T), bottleneck=bottleneck,
                     position="learned" if T <= 512 else "sinusoidal") | more
    return ConceptEncoder(ConceptConfig(**settings))


def fit(build, T, unit=8):
    """build(size) with the multiple of `unit` whose parameters come closest to those of strict."""
    def n_params(model):
        return sum(p.numel() for p in model.parameters())

    with torch.device("meta"):  # counts without taking memory
        wanted = n_params(concept("strict", T))
        small, large = n_params(build(unit)), n_params(build(2 * unit))
    # The number of parameters is linear in the size.
    steps = round((wanted - small) / (large - small))
    return build(unit * max(1, 1 + steps))


def strict_many(T):
    """micro_anchored: strict with a concept for every two tokens, feed-forward width to fit."""
    return fit(lambda width: concept("strict", T, n_concept=max(512, T) // 2, local_heads=0.875,
                                     ffn_dim=width), T)


def transformer(T):
    """Our Transformer without mixers: width 512, 8 heads, 6 layers, feed-forward width to fit."""
    return fit(lambda width: Transformer(TransformerConfig(
        vocab_size=VOCABULARY, block_size=max(512, T), n_layer=6, n_head=8, token_dim=512,
        ffn_dim=width, n_mixer=0)), T)


def decoder(T):
    """Our causal Transformer of the same shape. It predicts every next token."""
    return fit(lambda width: Transformer(TransformerConfig(
        vocab_size=VOCABULARY, block_size=max(512, T), n_layer=6, n_head=8, token_dim=512,
        ffn_dim=width, n_mixer=0, causal=True)), T)


class PlainDecoder(nn.Module):
    """The usual small GPT, written as one would without this repository: learned positions, layers
    of fused causal attention and a GELU FFN, logits at all positions at once.
    """
    base_model_prefix = "body"

    def __init__(self, T, width, d=512, n_head=8, n_layer=6):
        super().__init__()
        self.n_head = n_head
        self.words, self.places = nn.Embedding(VOCABULARY, d), nn.Embedding(T, d)
        nn.init.normal_(self.words.weight, 0, 0.02)
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(d), qkv=nn.Linear(d, 3 * d), out=nn.Linear(d, d),
            norm2=nn.LayerNorm(d), up=nn.Linear(d, width), down=nn.Linear(width, d)))
            for _ in range(n_layer))
        self.norm = nn.LayerNorm(d)

    def body(self, ids):
        B, T = ids.shape
        x = self.words(ids) + self.places(torch.arange(T, device=ids.device))
        for layer in self.layers:
            q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2)
                       for t in layer["qkv"](layer["norm1"](x)).chunk(3, dim=-1))
            read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["out"](read.transpose(1, 2).flatten(2))
            x = x + layer["down"](F.gelu(layer["up"](layer["norm2"](x))))
        return self.norm(x)

    def forward(self, input_ids, labels=None):
        logits = self.body(input_ids) @ self.words.weight.T
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def plain_decoder(T):
    """PlainDecoder, feed-forward width to fit."""
    return fit(lambda width: PlainDecoder(max(512, T), width), T)


def hf_gpt2(T):
    """GPT2LMHeadModel: width 512, 8 heads, 6 layers, feed-forward width to fit."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return fit(lambda width: GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_embd=512, n_layer=6, n_head=8, n_inner=width,
        n_positions=max(512, T), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=2, use_cache=False)), T)


def hf_bert(T):
    """BertForMaskedLM: width 512, 8 heads, 6 layers, feed-forward width to fit.

    It computes logits at all positions.
    """
    from transformers import BertConfig, BertForMaskedLM
    return fit(lambda width: BertForMaskedLM(BertConfig(
        vocab_size=VOCABULARY, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
        intermediate_size=width, max_position_embeddings=max(512, T), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)), T)


def hf_modernbert(T):
    """ModernBertForMaskedLM of the same shape.

    In training it computes logits at the predicted positions only (sparse_prediction).
    """
    from transformers import ModernBertConfig, ModernBertForMaskedLM
    return fit(lambda width: ModernBertForMaskedLM(ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
        intermediate_size=width, max_position_embeddings=max(512, T), sparse_prediction=True,
        pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2)), T)


def hf_perceiver(T):
    """PerceiverForMaskedLM: 64 latents of width 512, as many layers as fit.

    It decodes all positions and computes logits at all of them.
    """
    from transformers import PerceiverConfig, PerceiverForMaskedLM
    return fit(lambda layers: PerceiverForMaskedLM(PerceiverConfig(
        vocab_size=VOCABULARY, d_model=512, d_latents=512, num_latents=64,
        num_self_attends_per_block=layers, num_self_attention_heads=8,
        num_cross_attention_heads=8, qk_channels=512, v_channels=512,
        self_attention_widening_factor=4, attention_probs_dropout_prob=0.0,
        max_position_embeddings=T)), T, unit=1)


# {name: function of T that builds the model}
OURS = dict(strict=lambda T: concept("strict", T), strict_many=strict_many,
            open=lambda T: concept("open", T), transformer=transformer, decoder=decoder)
PEERS = dict(hf_bert=hf_bert, hf_modernbert=hf_modernbert, hf_perceiver=hf_perceiver,
             plain_decoder=plain_decoder, hf_gpt2=hf_gpt2)
CAUSAL = ("decoder", "plain_decoder", "hf_gpt2")  # they predict every next token

# Of --length: two layers of width 128, a small vocabulary, so that mixing tokens is most of the
# work in long rows.
SMALL = dict(vocab_size=1024, n_layer=2, n_head=4, ffn_dim=256, token_dim=128)


def long_concept(T):
    return ConceptEncoder(ConceptConfig(
        **SMALL, block_size=T, concept_dim=128, n_concept=64, position="sinusoidal", n_mixer=1))


def long_resonance(mixer):
    return lambda T: ResonanceLM(ResonanceConfig(
        **SMALL, block_size=T, n_mixer=0, mixer=mixer, n_frequency=32))


LONG = dict(
    concept=long_concept, resonance=long_resonance("resonance"), fnet=long_resonance("fnet"),
    transformer=lambda T: Transformer(TransformerConfig(**SMALL, block_size=T, n_mixer=0)))


def fitted_exponents(report):
    """How time and memory of a step grow with the length: {name: {"time", "memory"}}, the exponent
    of T fitted to the lengths from 4,096 to 65,536; None with less than three of them.
    """
    found = {}
    for name in LONG:
        at = {int(T): result[name] for T, result in report.items() if name in result}
        Ts = [T for T in at if 4096 <= T <= 65536]
        slopes = dict(time=None, memory=None)
        if len(Ts) > 2:
            logs = np.log(Ts), np.log([[at[T]["step_ms"], at[T]["peak_mb"]] for T in Ts])
            slopes = dict(zip(slopes, np.polyfit(*logs, 1)[0].round(2).tolist()))
        found[name] = slopes
    return found


# ---- batches and masks ------------------------------------------------------------


def hf_collator(ids, tok, mlm_probability):
    """-> a function that masks the rows `ids` with transformers' whole-word collator.

    The collator finds words by gaps between character offsets. Ours are turned into such offsets:
    each token is one character long, with a gap of one before each word.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    words = FastTokenizer(WordLevel({"[UNK]": 0}))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    fast.add_special_tokens(dict(mask_token="[MASK]", pad_token="[PAD]"))
    collate = DataCollatorForLanguageModeling(
        fast, whole_word_mask=True, mlm_probability=mlm_probability, mask_replace_prob=1.0,
        random_replace_prob=0.0)
    starts = word_starts(word_flags(tok, "cpu")[ids])
    begin = torch.arange(ids.shape[1]) + starts.cumsum(1)
    offsets = torch.stack((begin, begin + 1), -1).tolist()
    examples = [
        dict(input_ids=row, special_tokens_mask=[0] * len(row), attention_mask=[1] * len(row),
             offset_mapping=offset)
        for row, offset in zip(ids.tolist(), offsets)]
    return lambda: collate([dict(example) for example in examples])  # it changes what it gets


def bench_data(data, tok, mlm_probability, peers, repeats, B=64, T=512):
    """Times batch(), every masking strategy and, with peers, the collator of transformers.

    One thread, B rows of T tokens. -> {"NAME_mtok_per_s": million tokens a second}.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ids, sample_ids = data.batch(0, B, 0, 1)
    calls = {"batch": lambda: data.batch(np.random.randint(10**6), B, 0, 1)}
    for masking_type in MASKING_TYPES:
        calls[masking_type] = lambda m=masking_type: mask_batch(
            ids, sample_ids, m, mlm_probability, tok)
    if peers and importlib.util.find_spec("transformers"):
        calls["hf_whole_word_collator"] = hf_collator(ids, tok, mlm_probability)
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return {f"{name}_mtok_per_s": round(B * T / statistics.median(seconds) / 1e6, 2)
            for name, seconds in times.items()}
