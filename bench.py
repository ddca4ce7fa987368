"""Speed, as ratios within one run on one machine.

    python bench.py                   training step of micro_balanced, strict and open, against our own Transformer of
                                      equal parameters, vocabulary, row length and dtype, optimizer step included
    python bench.py --peers=1         and against transformers' BertForMaskedLM of equal parameters; masking against
                                      transformers' whole-word collator; batch and masking as a share of a step

Repeats are interleaved, so that a busy machine slows all candidates alike; medians are reported. The last line on
stdout is JSON: {"512": {"strict": {"tokens_per_s", ...}, "open": ..., "transformer": ...}, "ratios": ..., "data": ...}.
"""

# ---- settings ---------------------------------------------------------------
peers = 0  # 1: also time transformers' BertForMaskedLM and its whole-word collator
lengths = "512"  # row lengths T, several with commas between
rows = 8  # rows of a training step
mlm_probability = 0.15  # share of tokens that is predicted
repeats = 7  # timed repeats of each candidate, after one to warm up
dtype = "auto"  # auto | bf16 | fp16 | fp32
data_dir = "data/pydocs"  # prepared data for the batch and masking figures
device = "auto"  # auto | cuda | mps | cpu
compile = "false"  # true: torch.compile ours and the peers
# -----------------------------------------------------------------------------
from configurator import configure

config = configure(globals())

import importlib.util
import json
import os
import runpy
import statistics
import time
from dataclasses import fields

import numpy as np
import torch

from baselines import Transformer, TransformerConfig
from common import autocast, choose_dtype, find_machine, matmul_peak, user_mistakes
from masking import MASKING_TYPES, mask_batch, word_flags, word_starts
from model import ConceptConfig, ConceptEncoder
from shards import TokenData
from tokenizer import Tokenizer

PRESET = "config/micro_balanced.py"


def preset(**changes):
    """ConceptConfig of micro_balanced with some fields changed."""
    names = {f.name for f in fields(ConceptConfig)}
    return ConceptConfig(**{k: v for k, v in runpy.run_path(PRESET).items() if k in names} | changes)


def median_seconds(candidates, repeats=repeats):
    """{name: function} -> {name: median seconds of a call}, repeats interleaved."""
    times = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if machine.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


# ---- training step ------------------------------------------------------------


def training_step(model, loss_of):
    """A function that does forward, backward, clipping and an AdamW step."""
    model.to(machine.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model) if compile == "true" else model

    def step():
        with autocast(machine.device, dtype):
            loss = loss_of(run)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def fit_ffn(build, n_params):
    """build(ffn width) with the multiple of 8 whose parameters come closest to n_params."""
    with torch.device("meta"):
        small, large = (sum(p.numel() for p in build(width).parameters()) for width in (8, 16))
    return build(8 + 8 * max(0, round((n_params - small) / (large - small))))


def hf_bert(T, n_params, vocab_size):
    """BertForMaskedLM of n_params parameters: hidden 512, 8 heads, 6 layers, feed-forward width to fit."""
    from transformers import BertConfig, BertForMaskedLM

    return fit_ffn(lambda width: BertForMaskedLM(BertConfig(
        vocab_size=vocab_size, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=width,
        max_position_embeddings=max(512, T), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)), n_params)


def transformer(T, n_params, vocab_size):
    """Our Transformer of n_params parameters: width 512, 8 heads, 6 layers, feed-forward width to fit, no mixers."""
    return fit_ffn(lambda width: Transformer(TransformerConfig(
        vocab_size=vocab_size, block_size=max(512, T), n_layer=6, n_head=8, token_dim=512, ffn_dim=width, n_mixer=0)),
        n_params)


def bench_training(T):
    """Tokens a second of a training step at row length T, for ours and the peers."""
    B, torch_ids = rows, torch.randint(0, 30522, (rows, T))
    K = -(-int(mlm_probability * T + 1) // 8) * 8
    positions = torch.rand(B, T).argsort(1)[:, :K].sort(1).values
    targets, weights = torch_ids.gather(1, positions), torch.ones(B, K)
    ids, positions, targets, weights = (t.to(machine.device) for t in (torch_ids, positions, targets, weights))
    labels = torch.full_like(ids, -100).scatter_(1, positions, targets)
    models = {name: ConceptEncoder(preset(bottleneck=name, block_size=max(512, T))) for name in ("strict", "open")}
    models["transformer"] = transformer(T, models["strict"].num_params(), 30522)
    steps = {name: training_step(model, lambda m: m(ids, positions, targets, weights))
             for name, model in models.items()}
    if peers:
        models["hf_bert"] = hf_bert(T, models["strict"].num_params(), 30522)
        steps["hf_bert"] = training_step(models["hf_bert"], lambda m: m(input_ids=ids, labels=labels).loss)
    result = {}
    for name, seconds in median_seconds(steps).items():
        result[name] = dict(tokens_per_s=round(B * T / seconds), step_ms=round(seconds * 1e3, 1),
                            params=sum(p.numel() for p in models[name].parameters()))
        if name != "hf_bert":
            flops = models[name].flops_per_token(T, K, B) * B * T
            result[name]["mflop_per_token"] = round(flops / B / T / 1e6, 1)
            result[name]["gemm_share"] = round(flops / seconds / peak, 3)
    return result


# ---- masking and batches --------------------------------------------------------


def bench_data(data, tok, B=64, T=512):
    """Tokens a second on one thread of batch() and of every masking strategy, in millions; and of HF's collator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ids, sample_ids = data.batch(0, B, 0, 1)
    calls = {"batch": lambda: data.batch(np.random.randint(10**6), B, 0, 1)}
    for masking_type in MASKING_TYPES:
        calls[masking_type] = lambda m=masking_type: mask_batch(ids, sample_ids, m, mlm_probability, tok)
    if peers:
        calls["hf_whole_word_collator"] = hf_collator(ids, tok)
    rates = {name: round(B * T / seconds / 1e6, 2) for name, seconds in median_seconds(calls, repeats * 5).items()}
    torch.set_num_threads(threads)
    return {f"{name}_mtok_per_s": rate for name, rate in rates.items()}


def hf_collator(ids, tok):
    """transformers' whole-word collator on the same ids with the same words, given as character offsets."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(WordLevel({"[UNK]": 0})), unk_token="[UNK]")
    fast.add_special_tokens(dict(mask_token="[MASK]", pad_token="[PAD]"))
    collate = DataCollatorForLanguageModeling(fast, whole_word_mask=True, mlm_probability=mlm_probability,
                                              mask_replace_prob=1.0, random_replace_prob=0.0)
    starts = word_starts(word_flags(tok, "cpu")[ids])
    begin = torch.arange(ids.shape[1]) + starts.cumsum(1)  # a gap of one character before each word
    offsets = torch.stack((begin, begin + 1), -1).tolist()
    examples = [dict(input_ids=row, special_tokens_mask=[0] * len(row), attention_mask=[1] * len(row), offset_mapping=o)
                for row, o in zip(ids.tolist(), offsets)]
    return lambda: collate([dict(e) for e in examples])


# ---- the run ---------------------------------------------------------------------
with user_mistakes():
    machine = find_machine(device)
    dtype, reason = choose_dtype(dtype, machine.device)
    if not os.path.exists(PRESET):
        raise FileNotFoundError(f"{PRESET} not found; run bench.py from the repository's folder")
    if not all(T.isdigit() and int(T) for T in lengths.split(",")) or min(rows, repeats) < 1:
        raise ValueError(f"lengths={lengths!r}, rows={rows}, repeats={repeats}: expected numbers above 0, lengths with "
                         "commas between, such as --lengths=128,512")
    if peers and importlib.util.find_spec("transformers") is None:
        raise ValueError("--peers=1 needs transformers: pip install -r requirements-extra.txt")
    data, tok = TokenData(data_dir, "train", 512, 0), Tokenizer.load(os.path.join(data_dir, "tokenizer"))
torch.manual_seed(0)
peak = matmul_peak(machine.device, dtype)
print(f"torch {torch.__version__}, {machine.device}, {torch.get_num_threads()} threads, {dtype} ({reason}), "
      f"matmul peak {peak / 1e12:.2f} TFLOP/s, compile {compile}\n")
report, ratios = {}, {}
for T in map(int, lengths.split(",")):
    report[str(T)] = result = bench_training(T)
    print(f"training step, {rows} rows of {T} tokens, {mlm_probability:.0%} predicted")
    for name, r in result.items():
        ratio = f"{r['tokens_per_s'] / result['hf_bert']['tokens_per_s']:.2f} x hf_bert" if peers else ""
        share = f"{r['gemm_share']:.0%} of peak" if "gemm_share" in r else ""
        print(f"  {name:<10}{r['params']:>12,} parameters{r['tokens_per_s']:>10,} tokens/s{r['step_ms']:>10,.0f} ms   "
              f"{share:<12} {ratio}", flush=True)
        if peers and name != "hf_bert":
            ratios[f"{name}_vs_hf_bert_{T}"] = round(r["tokens_per_s"] / result["hf_bert"]["tokens_per_s"], 2)
report["data"] = rates = bench_data(data, tok)
print("\nbatches and masks, 64 rows of 512 tokens, one thread, million tokens/s")
for name, rate in rates.items():
    print(f"  {name.removesuffix('_mtok_per_s'):<24}{rate:>10,.1f}")
if peers:
    ours, theirs = rates["whole_word_mtok_per_s"], rates["hf_whole_word_collator_mtok_per_s"]
    ratios["whole_word_vs_hf_collator"] = round(ours / theirs, 1)
if "512" in report:
    per_token = 1e-6 / rates["batch_mtok_per_s"] + 1e-6 / min(rates[f"{m}_mtok_per_s"] for m in MASKING_TYPES)
    ratios["batch_and_mask_share_of_step"] = round(per_token * report["512"]["strict"]["tokens_per_s"], 4)
report["ratios"] = ratios
print(json.dumps(report))
