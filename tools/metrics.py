"""A run in numbers: metrics.json, flat fields for programs, and summary.md, a page for people.

metrics.json has the same fields for every run, so that many runs make a table: a number or a
string, or null for what was not measured. No value is ever filled in. Field names are those of
other projects where they have one (total_params, embedding_ratio, val_perplexity,
latency_batch1_seq128_ms), and end with a unit where the name does not settle it. tools/measures.py
lists them all with their units.

Losses are nats a predicted token, on fixed masks. Fields without a masking in their name are of
single-token masks. All are of the first data set evaluated.
"""

import copy
import datetime
import math
import os
import statistics
import time

import torch

from lib.allocation import embedding_params
from lib.embed import choose_pooling
from lib.files import read_object, replace_file
from lib.machine import DTYPES, memory_gib
from masking import predicted_share
from tools.measures import (
    COMMANDS,
    CONCEPTS,
    FIELDS,
    GLUE_FIELDS,
    KINDS,
    LATENCY_LENGTHS,
    LOSS_FIELDS,
    SMALLBENCH,
)

# ---- speed -------------------------------------------------------------------

def timed(call, device, warm_up=3, most=30, seconds=10.0):
    """Times a function. -> list of seconds, one number a call.

    First come `warm_up` calls that are not timed, then 5 to `most`; beyond the fifth, none begins
    after they have taken `seconds` together.
    """
    # A GPU works on after a call has returned: the clock must wait for it.
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(warm_up):
        call()
    times = []
    while len(times) < 5 or (len(times) < most and sum(times) < seconds):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return times


def median_and_iqr(values):
    """-> median, interquartile range."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, high - low


@torch.inference_mode()
def measure_speed(model, tok, machine, dtype, T, batch_size):
    """Latency, throughput and memory. -> fields of the section "speed".

    Latency is of filling one mask in a single row, throughput of encoding `batch_size` rows of T
    tokens. The model runs as in sample.py: weights stored in the dtype itself, not compiled.
    memory_peak_mb: on a GPU the most that tensors needed for these measurements; on a CPU the most
    that this process has needed since it began, Python and libraries included.
    """
    # A copy: freeze() changes the weights for good, and the losses need them in float32.
    fast = copy.deepcopy(model).freeze(DTYPES[dtype])
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # Special tokens would split a row into documents, which changes the work.
    ordinary = torch.from_numpy((~tok.is_special).nonzero()[0])

    def random_rows(B, T):
        """B rows of T random ordinary tokens, with one [MASK] in the middle."""
        generator = torch.Generator().manual_seed(0)
        ids = ordinary[torch.randint(len(ordinary), (B, T), generator=generator)]
        ids[:, T // 2] = tok.mask_id
        return machine.take([ids, torch.full((B, 1), T // 2)])

    def fill(ids, place):
        return fast.logits(fast.decode(*fast.encode(ids), place, fast.documents(ids)))

    found = {}
    for length in LATENCY_LENGTHS:
        if length <= model.cfg.longest:
            ids, place = random_rows(1, length)
            times = timed(lambda: fill(ids, place), machine.device)  # noqa: B023
            median, iqr = median_and_iqr(times)
            found[f"latency_batch1_seq{length}_ms"] = 1e3 * median
            found[f"latency_batch1_seq{length}_iqr_ms"] = 1e3 * iqr
    ids, _ = random_rows(batch_size, T)
    # With every seventh token decoded: of a Transformer, encode alone leaves the last layer out.
    places = torch.arange(0, T, 7, device=ids.device).expand(batch_size, -1)
    times = timed(lambda: fast.decode(*fast.encode(ids), places, fast.documents(ids)),
                  machine.device)
    median, iqr = median_and_iqr([batch_size * T / seconds for seconds in times])
    return found | dict(
        throughput_tokens_per_sec=median, throughput_iqr_tokens_per_sec=iqr,
        throughput_batch_size=batch_size, throughput_seq_length=T,
        memory_peak_mb=1024 * memory_gib(machine.device))


# ---- fields ------------------------------------------------------------------

def model_fields(model, tok, settings):
    """Shape and size of the network, counted from the network. settings: those of its training."""
    cfg, total = model.cfg, model.num_params()
    # A Transformer has no concepts, no bottleneck and no narrow table: None, or the token's width.
    d_model = getattr(cfg, "concept_dim", cfg.token_dim)
    embedding = embedding_params(model)
    # FLOPs of training depend on how many tokens of a row were predicted, and on rows a pass.
    n_predicted = math.ceil(cfg.block_size * predicted_share(
        settings.get("masking_type"), settings.get("mlm_probability", 0.15),
        settings.get("objective", "mlm")))
    micro_batch = settings.get("micro_batch", 1)
    return dict(
        arch=model.arch, bottleneck=getattr(cfg, "bottleneck", None), total_params=total,
        embedding_params=embedding, embedding_ratio=embedding / total,
        non_embedding_params=total - embedding, vocab_size=cfg.vocab_size,
        block_size=cfg.block_size, n_layers=cfg.n_layer, n_heads=cfg.n_head,
        n_concepts=getattr(cfg, "n_concept", None), d_model=d_model, d_token=cfg.token_dim,
        d_ff=cfg.ffn_dim, glu_expansion=cfg.ffn_dim / d_model, tokenizer=tok.name,
        flops_per_token=model.flops_per_token(cfg.block_size, n_predicted, micro_batch))


def training_fields(out_dir, checkpoint, log, train_tokens):
    """How the network was trained: from config.json, the checkpoint, and the log up to it.

    train_tokens: number of tokens in the training data; None if it is not known.
    """
    config = read_object(os.path.join(out_dir, "config.json"))
    settings, tokens = checkpoint["settings"], checkpoint["tokens"]
    # The checkpoint may be older than the end of the log: best.pt, or a run that was stopped.
    logged = [record for record in log
              if record.get("loss") is not None and record["step"] <= checkpoint["step"]]
    last = logged[-1] if logged else {}
    loss = last.get("loss")
    speeds = [record["tokens_per_s"] for record in logged if record.get("tokens_per_s")]
    same_name = ("masking_type", "optimizer", "learning_rate", "batch_size", "seed")
    return {name: settings.get(name) for name in same_name} | dict(
        total_steps=checkpoint["step"], total_tokens=tokens,
        total_epochs=tokens / train_tokens if train_tokens else None,
        training_time_seconds=60 * last["minutes"] if "minutes" in last else None,
        train_tokens_per_sec=statistics.median(speeds) if speeds else None,
        train_mfu=last.get("mfu"), train_data=settings.get("data_dir"),
        train_mlm_probability=settings.get("mlm_probability"), train_loss=loss,
        # 100: exp must not overflow
        train_perplexity=None if loss is None else math.exp(min(loss, 100)),
        best_train_loss=min((record["loss"] for record in logged), default=None),
        best_val_loss=checkpoint["best_loss"], git_commit=config.get("git"),
        train_torch=config.get("torch"))


def evaluation_fields(summary, model):
    """What eval.py measured. summary: the content of eval.json; losses of its first data set."""
    (name, result), split = next(iter(summary["data"].items())), summary["split"]
    # The keys of the splits are those of SPLITS in lib/evaluation.py.
    token = result.get("token")  # None: a decoder, whose losses are of other tokens
    found = dict(
        eval_data=name, eval_split=split, eval_rows=summary["rows"][name],
        eval_block_size=summary["block_size"], unigram_entropy=result["unigram_entropy"])
    if token:
        parts = token["splits"]
        found |= dict(
            eval_mlm_probability=summary["mlm_probability"],
            loss_copy_in_row=parts["copy in the row"]["loss"],
            loss_no_copy=parts["no copy"]["loss"],
            loss_frequent=parts["frequent, over 1e-3"]["loss"],
            loss_rare=parts["rare, under 1e-4"]["loss"])
    else:
        found |= {f"clm_{m.field}": result["clm"][m.name] for m in LOSS_FIELDS}
    for masking in set(KINDS) - {"clm"}:
        if masking in result:
            found[f"loss_{masking}"] = result[masking]["loss"]
    if token and split in ("val", "test"):  # the training split has no fields
        found |= {f"{split}_{m.field}": token[m.name] for m in LOSS_FIELDS}
    health = summary.get("health", {}).get("trained", {})
    if "shuffled" in health:  # else it is of a Transformer's token states, not of concepts
        found |= {m.field: health[m.name] for m in CONCEPTS if m.field}
    if "nelbo" in summary:
        fields = FIELDS["likelihood bound"]
        found |= {field: summary["nelbo"][name][field.removeprefix("nelbo_")] for field in fields}
    if "pll" in summary:
        fields = FIELDS["pseudo-log-likelihood"]
        found |= {field: summary["pll"][field.removeprefix("pll_")] for field in fields}
    if "sts" in summary:
        # Of all embeddings, the one that sample.py writes, and the mean token state beside it.
        pooling, pooled = choose_pooling("auto", model)
        found |= dict(sts_file=summary["sts_file"], sts_pooling=pooling)
        for prefix, embedding in (("sts", pooled), ("sts_token_mean", "tokens")):
            for key, value in summary["sts"]["trained"][embedding].items():
                found[f"{prefix}_{key}"] = value
    return found


def read_glue(out_dir):
    """out_dir/glue.json: {task: {"median": {metric: value}, ...}}; {} where there is none.

    Raises ValueError.
    """
    path = os.path.join(out_dir, "glue.json")
    glue = read_object(path)
    wrong = [task for task, r in glue.items()
             if not isinstance(r, dict) or not isinstance(r.get("median"), dict)]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} has no medians; remove it, or run "
                         "finetune_glue.py again")
    return glue


def of_weights(glue, checkpoint):
    """What read_glue gives, without scores of other weights of the run."""
    return {task: r for task, r in glue.items()
            if r.get("tokens", checkpoint["tokens"]) == checkpoint["tokens"]}


def glue_fields(glue):
    """Medians of the fine-tuned tasks, and their average over SmallBench if all four are there."""
    found = {}
    for field in GLUE_FIELDS:
        task, _, metric = field.partition("_")
        found[f"glue_{field}"] = glue[task]["median"].get(metric) if task in glue else None
    # An average over some of the four would not be comparable: all of them, or null.
    small = {f"smallbench_{name}_acc": found[f"glue_{task}_accuracy"]
             for name, task in SMALLBENCH.items()}
    average = None if None in small.values() else sum(small.values()) / len(small)
    return found | small | dict(smallbench_avg_acc=average)


def machine_fields(machine, dtype):
    """Where and when this was measured."""
    cuda = machine.device.type == "cuda"
    now = datetime.datetime.now().astimezone()
    return dict(timestamp=now.isoformat(timespec="seconds"), device=machine.device.type,
                device_name=torch.cuda.get_device_name() if cuda else None,
                num_gpus=machine.world_size if cuda else 0, num_threads=torch.get_num_threads(),
                dtype=dtype, torch=torch.__version__)


def collect(out_dir, model, tok, checkpoint, log, summary, glue, machine, dtype, train_tokens):
    """All fields of a run in the order of FIELDS -> {field: number, string or None}.

    train_tokens: number of tokens in its training data; None if it is not known.
    """
    found = model_fields(model, tok, checkpoint["settings"])
    found |= training_fields(out_dir, checkpoint, log, train_tokens)
    found |= evaluation_fields(summary, model) | summary.get("speed", {})
    found |= glue_fields(glue) | machine_fields(machine, dtype)
    found["experiment_name"] = os.path.basename(os.path.normpath(out_dir))
    found["total_flops"] = found["flops_per_token"] * found["total_tokens"]
    # Without this check a new number would be left out silently.
    known = [name for section in FIELDS.values() for name in section]
    assert set(found) <= set(known), f"fields without a unit: {sorted(set(found) - set(known))}"
    for name, value in found.items():
        if isinstance(value, float) and not math.isfinite(value):
            found[name] = None  # JSON has no NaN and no infinity
    return {name: found.get(name) for name in known}


# ---- the page ----------------------------------------------------------------

def cell(value):
    """A field as text of a table."""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(head, align, rows):
    """Lines of a table in Markdown. align: l or r for each column."""
    sides = {"l": "---", "r": "---:"}
    lines = [head, [sides[side] for side in align], *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def losses_table(summary):
    """Every data set under every masking."""
    rows = []
    for name, result in summary["data"].items():
        for masking in KINDS:
            if masking in result:
                values = [cell(result[masking][m.name]) for m in LOSS_FIELDS]
                rows.append([name, masking, *values, cell(result["unigram_entropy"])])
    head = [f"{summary['split']} split", "masking", *(m.heading for m in LOSS_FIELDS),
            "unigram entropy"]
    return markdown(head, "ll" + "r" * len(LOSS_FIELDS) + "r", rows)


def tasks_table(glue):
    """Every fine-tuned task, those of the user included, which have no field in metrics.json."""
    rows = []
    for task, result in glue.items():
        for metric in result["median"]:
            values = [cell(result.get(which, {}).get(metric))
                      for which in ("median", "min", "max", "majority")]
            rows.append([task, metric, *values])
    head = ["task", "metric", "median", "smallest", "largest", "majority answer"]
    return markdown(head, "llrrrr", rows)


def section_lines(out_dir, section, fields, has_more=False):
    """A section of FIELDS as a table, or the command that measures it. has_more: another table,
    of what has no field, follows.
    """
    values = {name: fields[name] for name in FIELDS[section]}
    lines = [f"## {section}", ""]
    if section in COMMANDS and all(value is None for value in values.values()):
        command = f"Not measured: `{COMMANDS[section].format(out_dir)}`."
        return lines if has_more else [*lines, command, ""]
    if section == "speed" and fields["throughput_tokens_per_sec"] is None:
        # Its other fields say what machine this is; they are always known.
        lines += [f"Not timed: `python tools/eval.py --out_dir={out_dir} --profile=1`.", ""]
    if section == "fine-tuning":  # few runs have all tasks
        values = {name: value for name, value in values.items() if value is not None}
    rows = [[name, cell(value), FIELDS[section][name]] for name, value in values.items()]
    return lines + markdown(["", "", "unit"], "lrl", rows)


def page(out_dir, fields, summary, glue):
    """summary.md as a string: the losses, every field with its unit, every fine-tuned task."""
    lines = [
        f"# {out_dir}", "",
        f"{fields['total_params']:,} parameters after {fields['total_tokens']:,} tokens; measured "
        f"{fields['timestamp']}. Losses and entropies are nats a predicted token, on the same "
        "masks for every model; a dash is what was not measured.", "",
        "## data sets", "", *losses_table(summary)]
    for section in FIELDS:
        lines += section_lines(out_dir, section, fields, section == "fine-tuning" and bool(glue))
    if glue:
        lines += tasks_table(glue)
    return "\n".join(lines)


def write_page(path, text):
    """Replaces the file `path` by `text`, whole or not at all."""
    replace_file(path, lambda file: file.write(text.encode()))
