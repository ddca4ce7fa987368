"""A run in numbers: what eval.py measures as one flat metrics.json, and summary.md, the same for people to read.

metrics.json has the same fields for every run, so that a hundred of them make a table: a number or a string, null for
what was not measured. Nothing is filled in. Field names are those of other projects where they have one (total_params,
embedding_ratio, val_perplexity, latency_batch1_seq128_ms), a unit at the end where the name leaves it open.
Losses are nats a predicted token on fixed masks; the fields without a masking in their name are of single-token masks,
on the first data set evaluated.

Pseudo-log-likelihood of texts, comparable between vocabularies: PLL-word-l2r (Kauf and Ivanova 2023, 2305.10588).

A masked model has no likelihood of a text. Its stand-in is the sum of what each token costs where it alone is masked
(1910.14659), but that flatters vocabularies that cut words up: the rest of a word gives a token away. So the later
tokens of its word are masked with it (section 3 of the paper), and the sum is divided by words and bytes, not tokens:

    text               the  mer|maid  sings
    row for "mer"      the  [M] [M]   sings
    row for "maid"     the  mer [M]   sings

One row for each token, framed by end-of-document marks as rows look in training.
"""

import copy
import datetime
import itertools
import json
import math
import os
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

from lib.embed import batches, choose_pooling, read_texts, rows_at_once
from lib.files import replace_file
from lib.machine import DTYPES, autocast, memory_gib
from masking import MASKING_TYPES, word_flags, word_starts

LATENCY_LENGTHS = (128, 512)  # tokens a row at batch size 1
SPLIT_FIELDS = {"loss": "nats", "accuracy": "share of predicted tokens", "perplexity": "", "bits_per_byte": "bits"}
GLUE_FIELDS = ("cola_mcc", "sst2_accuracy", "mrpc_f1", "mrpc_accuracy", "stsb_pearson", "stsb_spearman", "qqp_f1",
               "qqp_accuracy", "mnli_accuracy", "qnli_accuracy", "rte_accuracy", "wnli_accuracy", "boolq_accuracy")
SMALLBENCH = {"sentiment": "sst2", "nli": "rte", "qa": "boolq", "paraphrase": "mrpc"}

FIELDS = {  # section: {field: unit}
    "model": dict(
        experiment_name="", arch="", bottleneck="", total_params="parameters", embedding_params="parameters",
        embedding_ratio="share of the parameters", non_embedding_params="parameters", vocab_size="rows of the table",
        block_size="tokens a row", n_layers="", n_heads="", n_concepts="", d_model="numbers a concept or state",
        d_token="numbers a row of the table", d_ff="", glu_expansion="d_ff / d_model",
        flops_per_token="FLOP, training, an input token", tokenizer=""),
    "training": dict(
        total_steps="steps", total_tokens="input tokens", total_epochs="passes over the data", total_flops="FLOP",
        training_time_seconds="s", train_tokens_per_sec="tokens/s, median", train_mfu="share of measured peak",
        train_data="", masking_type="", train_mlm_probability="", optimizer="", learning_rate="", batch_size="rows",
        seed="", train_loss="nats, last logged", train_perplexity="", best_train_loss="nats", best_val_loss="nats",
        git_commit="", train_torch=""),
    "evaluation": dict(
        timestamp="", eval_data="", eval_split="", eval_rows="rows", eval_block_size="tokens a row",
        eval_mlm_probability="", unigram_entropy="nats")
    | {f"{split}_{name}": unit for split in ("val", "test") for name, unit in SPLIT_FIELDS.items()}
    | {f"loss_{name}": "nats" for name in MASKING_TYPES}
    | dict(loss_copy_in_row="nats", loss_no_copy="nats", loss_frequent="nats", loss_rare="nats"),
    "concepts": dict(
        concept_rank="directions", concept_rank_share="of n_concepts", concept_duplicates="share of pairs",
        concept_cosine="mean, absolute", concept_input_dependence="share of the variance",
        concepts_unused="share of concepts", concepts_zeroed="nats, rise", concepts_shuffled="nats, rise",
        concepts_averaged="nats, rise"),
    "pseudo-log-likelihood": dict(
        pll_method="", pll_file="", pll_texts="texts", pll_left_out="texts too long", pll_nats="nats in all",
        pll_nats_per_word="nats", pll_perplexity_per_word="", pll_bits_per_byte="bits"),
    "similarity, zero-shot": dict(
        sts_file="", sts_pooling="", sts_pearson="", sts_spearman="", sts_token_mean_pearson="",
        sts_token_mean_spearman=""),
    "speed": {f"latency_batch1_seq{T}{part}_ms": f"ms, {what}" for T in LATENCY_LENGTHS
              for part, what in (("", "median"), ("_iqr", "interquartile range"))}
    | dict(throughput_tokens_per_sec="tokens/s, median", throughput_iqr_tokens_per_sec="tokens/s, interquartile range",
           throughput_batch_size="rows", throughput_seq_length="tokens a row", memory_peak_mb="MiB",
           device="", device_name="", num_gpus="", num_threads="", dtype="", torch=""),
    "fine-tuning": {f"glue_{name}": "median over seeds" for name in GLUE_FIELDS}
    | {f"smallbench_{name}_acc": "median over seeds" for name in (*SMALLBENCH, "avg")},
}
ALSO = {  # what measures a section
    "concepts": "python tools/eval.py --out_dir={} with health_rows above 0, for a model with concepts",
    "pseudo-log-likelihood": "python tools/eval.py --out_dir={} --pll=FILE",
    "similarity, zero-shot": "python tools/eval.py --out_dir={} --sts=1",
    "fine-tuning": "python finetune_glue.py --out_dir={}",
}


# ---- speed -------------------------------------------------------------------

def timed(call, device, warm_up=3, most=30, seconds=10.0):
    """Seconds of up to `most` calls after warm_up others, at least 5, no new one after `seconds` -> list of float."""
    wait, times = torch.cuda.synchronize if device.type == "cuda" else lambda: None, []
    for _ in range(warm_up):
        call()
    while len(times) < 5 or len(times) < most and sum(times) < seconds:
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return times


def middle(values):
    """-> median, interquartile range."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, high - low


@torch.inference_mode()
def measure_speed(model, tok, machine, dtype, T, batch_size):
    """Latency of filling one mask of one row, throughput of reading rows of T tokens, memory -> fields of "speed".

    As sample.py runs it: weights in the dtype itself, not compiled. memory_peak_mb: on a GPU what tensors needed for
    these measurements; on a CPU the most this process had until then, Python and libraries included.
    """
    fast = copy.deepcopy(model).freeze(DTYPES[dtype])
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ordinary = torch.from_numpy((~tok.is_special).nonzero()[0])

    def rows(B, T):
        ids = ordinary[torch.randint(len(ordinary), (B, T), generator=torch.Generator().manual_seed(0))]
        ids[:, T // 2] = tok.mask_id
        return machine.take([ids, torch.full((B, 1), T // 2)])

    def fill(ids, place):
        return fast.logits(fast.decode(*fast.encode(ids), place, fast.documents(ids)))

    found = {}
    for length in LATENCY_LENGTHS:
        if length <= model.cfg.longest:
            ids, place = rows(1, length)
            median, iqr = middle(timed(lambda: fill(ids, place), machine.device))  # noqa: B023
            found |= {f"latency_batch1_seq{length}_ms": 1e3 * median, f"latency_batch1_seq{length}_iqr_ms": 1e3 * iqr}
    ids, _ = rows(batch_size, T)
    median, iqr = middle([batch_size * T / seconds for seconds in timed(lambda: fast.encode(ids), machine.device)])
    return found | dict(throughput_tokens_per_sec=median, throughput_iqr_tokens_per_sec=iqr,
                        throughput_batch_size=batch_size, throughput_seq_length=T,
                        memory_peak_mb=1024 * memory_gib(machine.device))


# ---- fields ------------------------------------------------------------------

def model_fields(model, tok, settings):
    """What the network is, counted from the network. settings: of its training."""
    cfg, total = model.cfg, model.num_params()
    expansion = getattr(model, "expansion", None)  # of a narrow table
    embedding = model.wte.numel() + sum(p.numel() for p in expansion.parameters()) if expansion else model.wte.numel()
    d_model, T = getattr(cfg, "concept_dim", cfg.token_dim), cfg.block_size
    predicted = math.ceil(settings.get("mlm_probability", 0.15) * T)
    return dict(arch=model.arch, bottleneck=getattr(cfg, "bottleneck", None), total_params=total,
                embedding_params=embedding, embedding_ratio=embedding / total, non_embedding_params=total - embedding,
                vocab_size=cfg.vocab_size, block_size=cfg.block_size, n_layers=cfg.n_layer, n_heads=cfg.n_head,
                n_concepts=getattr(cfg, "n_concept", None), d_model=d_model, d_token=cfg.token_dim, d_ff=cfg.ffn_dim,
                glu_expansion=cfg.ffn_dim / d_model, tokenizer=tok.name,
                flops_per_token=model.flops_per_token(T, predicted, settings.get("micro_batch", 1)))


def read_object(path):
    """The JSON object in a file, {} where there is no file; ValueError naming the file that holds something else."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found {str(found)[:60]!r}, expected a JSON object; remove it, or run again what "
                         "wrote it")
    return found


def training_fields(out_dir, checkpoint, log, train_tokens):
    """What config.json, the log up to the checkpoint and the checkpoint say. train_tokens: of the data, or None."""
    config = read_object(os.path.join(out_dir, "config.json"))
    settings, tokens = checkpoint["settings"], checkpoint["tokens"]
    logged = [r for r in log if r.get("loss") is not None and r["step"] <= checkpoint["step"]]
    last = logged[-1] if logged else {}
    loss = last.get("loss")
    rates = [r["tokens_per_s"] for r in logged if r.get("tokens_per_s")]
    return dict(total_steps=checkpoint["step"], total_tokens=tokens,
                total_epochs=tokens / train_tokens if train_tokens else None,
                training_time_seconds=60 * last["minutes"] if "minutes" in last else None,
                train_tokens_per_sec=statistics.median(rates) if rates else None, train_mfu=last.get("mfu"),
                train_data=settings.get("data_dir"), train_mlm_probability=settings.get("mlm_probability"),
                train_loss=loss, train_perplexity=None if loss is None else math.exp(min(loss, 100)),
                best_train_loss=min((r["loss"] for r in logged), default=None), best_val_loss=checkpoint["best_loss"],
                git_commit=config.get("git"), train_torch=config.get("torch")) | {
        key: settings.get(key) for key in ("masking_type", "optimizer", "learning_rate", "batch_size", "seed")}


def evaluation_fields(summary, arch):
    """What eval.py's summary, as in eval.json, says; losses are of its first data set."""
    (name, result), split = next(iter(summary["data"].items())), summary["split"]
    token, parts = result["token"], result["token"]["splits"]
    found = dict(eval_data=name, eval_split=split, eval_rows=summary["rows"][name],
                 eval_block_size=summary["block_size"], eval_mlm_probability=summary["mlm_probability"],
                 unigram_entropy=result["unigram_entropy"],
                 loss_copy_in_row=parts["copy in the row"]["loss"], loss_no_copy=parts["no copy"]["loss"],
                 loss_frequent=parts["frequent, over 1e-3"]["loss"], loss_rare=parts["rare, under 1e-4"]["loss"])
    found |= {f"loss_{masking}": result[masking]["loss"] for masking in filter(result.get, MASKING_TYPES)}
    if split in ("val", "test"):
        found |= {f"{split}_{key}": token[key] for key in SPLIT_FIELDS}
    health = summary.get("health", {}).get("trained", {})
    if "shuffled" in health:  # else they are a Transformer's token states
        found |= {f"concept_{key}": health[key]
                  for key in ("rank", "rank_share", "duplicates", "cosine", "input_dependence")}
        found |= {f"concepts_{key}": health[key] for key in ("unused", "zeroed", "shuffled", "averaged")}
    found |= {f"pll_{key}": summary["pll"][key] for key in (
        "method", "file", "texts", "left_out", "nats", "nats_per_word", "perplexity_per_word", "bits_per_byte")
        if "pll" in summary}
    if "sts" in summary:
        pooling, pooled = choose_pooling("auto", arch)
        found |= dict(sts_file=summary["sts_file"], sts_pooling=pooling)
        for prefix, embedding in (("sts", pooled), ("sts_token_mean", "tokens")):
            found |= {f"{prefix}_{key}": value for key, value in summary["sts"]["trained"][embedding].items()}
    return found


def read_glue(out_dir):
    """out_dir/glue.json, {task: {"median": {metric: value}}}; {} where there is none. Raises ValueError."""
    path = os.path.join(out_dir, "glue.json")
    glue = read_object(path)
    wrong = [task for task, r in glue.items() if not isinstance(r, dict) or not isinstance(r.get("median"), dict)]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} has no medians; remove it, or run finetune_glue.py again")
    return glue


def glue_fields(glue):
    """Medians of what read_glue gives, and their average over SmallBench where all of it is there."""
    found = {}
    for field in GLUE_FIELDS:
        task, _, metric = field.partition("_")
        found[f"glue_{field}"] = glue[task]["median"].get(metric) if task in glue else None
    small = {f"smallbench_{name}_acc": found[f"glue_{task}_accuracy"] for name, task in SMALLBENCH.items()}
    whole = all(value is not None for value in small.values())
    return found | small | dict(smallbench_avg_acc=sum(small.values()) / len(small) if whole else None)


def machine_fields(machine, dtype):
    """Where and when this was measured."""
    cuda = machine.device.type == "cuda"
    now = datetime.datetime.now().astimezone()
    return dict(timestamp=now.isoformat(timespec="seconds"), device=machine.device.type,
                device_name=torch.cuda.get_device_name() if cuda else None, num_gpus=machine.world_size if cuda else 0,
                num_threads=torch.get_num_threads(), dtype=dtype, torch=torch.__version__)


def collect(out_dir, model, tok, checkpoint, log, summary, glue, machine, dtype, train_tokens):
    """All fields of a run, in order; None for what is missing or not finite. train_tokens: of its data, or None."""
    found = model_fields(model, tok, checkpoint["settings"])
    found |= training_fields(out_dir, checkpoint, log, train_tokens) | evaluation_fields(summary, model.arch)
    found |= glue_fields(glue) | machine_fields(machine, dtype) | summary.get("speed", {})
    found |= dict(experiment_name=os.path.basename(os.path.normpath(out_dir)),
                  total_flops=found["flops_per_token"] * found["total_tokens"])
    known = [name for section in FIELDS.values() for name in section]
    assert set(found) <= set(known), f"fields without a unit: {sorted(set(found) - set(known))}"
    return {name: None if isinstance(found.get(name), float) and not math.isfinite(found[name]) else found.get(name)
            for name in known}


# ---- the page ----------------------------------------------------------------

def shown(value):
    """A field as the page shows it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def table(head, align, rows):
    """Lines of Markdown; align: l or r for each column."""
    lines = [head, [{"l": "---", "r": "---:"}[side] for side in align], *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def page(out_dir, fields, summary, glue):
    """summary.md: every field with its unit, every data set under every masking, every fine-tuned task."""
    lines = [f"# {out_dir}", "", f"{fields['total_params']:,} parameters after {fields['total_tokens']:,} tokens; "
             f"measured {fields['timestamp']}. Losses are nats a predicted token, on the same masks for every model; a "
             "dash is what was not measured.", "", "## data sets", ""]
    rows = [[name, masking, *(shown(r[masking][key]) for key in SPLIT_FIELDS), shown(r["unigram_entropy"])]
            for name, r in summary["data"].items() for masking in filter(r.get, MASKING_TYPES)]
    lines += table([f"{summary['split']} split", "masking", "loss, nats", "accuracy", "perplexity", "bits a byte",
                    "unigram entropy, nats"], "llrrrrr", rows)
    for section, units in FIELDS.items():
        lines += [f"## {section}", ""]
        if section in ALSO and all(fields[name] is None for name in units):
            lines += [f"Not measured: `{ALSO[section].format(out_dir)}`.", ""]
            continue
        if section == "speed" and fields["throughput_tokens_per_sec"] is None:
            lines += [f"Not timed: `python tools/eval.py --out_dir={out_dir} --profile=1`.", ""]
        lines += table(["", "", "unit"], "lrl", [[name, shown(fields[name]), unit] for name, unit in units.items()
                                                 if section != "fine-tuning" or fields[name] is not None])
    if glue:
        lines += table(["task", "metric", "median", "smallest", "largest", "majority answer"], "llrrrr", [
            [task, metric, *(shown(r.get(which, {}).get(metric)) for which in ("median", "min", "max", "majority"))]
            for task, r in glue.items() for metric in r["median"]])
    return "\n".join(lines)


def write_page(path, text):
    replace_file(path, lambda file: file.write(text.encode()))


@torch.no_grad()
def score(model, rows, tok, machine, dtype, batch_tokens):
    """Rows of ids between end-of-document marks, of any lengths -> nats of each text, float64 (N,).

    Words are masking.py's, those of whole-word masking, in which "...)" is one.
    """
    nats = torch.zeros(len(rows), dtype=torch.float64)
    for index in batches(model, rows, batch_tokens):  # texts of one length
        ids_BT = torch.from_numpy(np.stack([rows[i] for i in index]))
        word_BT = word_starts(word_flags(tok, "cpu")[ids_BT]).cumsum(1)
        (B, T), place_T = ids_BT.shape, torch.arange(ids_BT.shape[1])
        for part in torch.arange(B * (T - 2)).split(rows_at_once(model, T, batch_tokens)):
            text, position = part // (T - 2), part % (T - 2) + 1
            same_word = word_BT[text] == word_BT[text, position][:, None]
            masked = torch.where(same_word & (place_T >= position[:, None]), tok.mask_id, ids_BT[text])
            masked, place, target = machine.take([masked, position[:, None], ids_BT[text, position]])
            with autocast(machine.device, dtype):
                states = model.decode(*model.encode(masked), place, model.documents(masked))
                cost = F.cross_entropy(model.logits(states)[:, 0].float(), target, reduction="none")
            nats.index_add_(0, torch.tensor(index)[text], cost.double().cpu())
    return nats


def pseudo_log_likelihood(model, path, tok, machine, dtype, most_texts, longest, batch_tokens):
    """Scores the first texts of a file (one a line, or .jsonl) that are not empty -> dict of numbers.

    texts: how many were scored; left_out: how many of most_texts were longer than `longest` tokens with their marks.
    nats: minus the sum of PLL-word-l2r. words: what white space separates; bytes: of UTF-8; neither depends on a
    vocabulary. perplexity_per_word: exp(nats / words). Every process of a group takes part. Raises ValueError.
    """
    texts = (text.strip() for text, *_ in read_texts(path))
    texts = list(itertools.islice(filter(None, texts), most_texts))
    rows = [np.array([tok.eot_id, *ids, tok.eot_id], dtype=np.int64) for ids in tok.encode(texts)]
    kept = [i for i, row in enumerate(rows) if len(row) <= longest]
    if not kept:
        raise ValueError(f"pll={path}: found {len(texts)} texts, none of up to {longest - 2} tokens; expected a text a "
                         "line")
    mine = kept[machine.rank::machine.world_size]
    nats, = machine.all_sum(score(model, [rows[i] for i in mine], tok, machine, dtype, batch_tokens).sum())
    words = sum(len(texts[i].split()) for i in kept)
    n_bytes = sum(len(texts[i].encode("utf-8", "replace")) for i in kept)
    return dict(method="PLL-word-l2r", file=path, texts=len(kept), left_out=len(rows) - len(kept),
                tokens=sum(len(rows[i]) - 2 for i in kept), words=words, bytes=n_bytes, nats=nats,
                nats_per_word=nats / words, nats_per_byte=nats / n_bytes, bits_per_byte=nats / n_bytes / math.log(2),
                perplexity_per_word=math.exp(min(nats / words, 100)))
