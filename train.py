"""Train a model on prepared token bins.

    python train.py config/demo.py                                          one process: laptop, one GPU
    torchrun --nproc_per_node=4 train.py config/micro_span.py               one box
    python train.py config/micro_span.py --data_dir=data/owt --max_steps=20 override anything

Writes out_dir/{ckpt.pt, ckpt_prev.pt, best.pt, config.json, log.jsonl, tokenizer/}. The same command again resumes,
bit for bit on the same machine: step and seed decide the batch, the masks and the learning rate.
SIGTERM, SIGINT and SIGUSR1 save and stop. The last line on stdout is a JSON summary.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # checkpoints, log and a copy of the tokenizer go here
data_dir = "data/pydocs"  # made by a prepare.py: train.bin, val.bin, meta.json, tokenizer/; several: commas between
data_weights = ""  # share of the tokens from each of several, such as 0.7,0.3; empty: by size, each once an epoch
rows = "block"  # block: packed, documents one after the other | document: each row begins one, and is padded
block_schedule = ""  # rows that grow, LENGTH:SHARE of the tokens, such as 128:0.9,512:0.1; empty: all of block_size
init_from = "auto"  # auto: resume out_dir if it can be | scratch: refuse to | DIR: weights of another run, step 0
# model: ConceptConfig in model.py and TransformerConfig in baselines.py explain each
arch = "concept"  # concept | transformer (the baseline, of width token_dim)
vocab_size = 0  # rows of the token table; 0: as many as the data's tokenizer asks for
block_size = 512  # tokens a row
n_layer = 4  # concept layers, or attention layers; a transformer with 0 is its local mixers alone
n_head = 8  # attention heads
n_concept = 64  # concept vectors
concept_dim = 512  # width of a concept
token_dim = 512  # width of the token table, from 4; of everything in a transformer
ffn_dim = 2048  # hidden width of the gated feed-forward layers
bottleneck = "open"  # open: tokens see neighbours, quality | strict: everything goes through the concepts
position = "learned"  # learned | sinusoidal (of no fixed length)
max_length = 0  # sinusoidal: rows may be this long; training shifts them by random offsets to reach it; 0: block_size
bias = False  # biases in linear layers and norms
dropout = 0.0  # keep 0 for pretraining
hide_masked = True  # concepts do not read [MASK] tokens
isolate_documents = False  # documents packed into one row do not see each other
n_mixer = 2  # local mixer blocks (open, transformer)
mixer_kernel = 7  # tokens a mixer sees (open, transformer)
n_decoder = 1  # decoder blocks (open)
self_attention = False  # concepts also read each other (open; strict always does)
lexicon = True  # each concept owns some words of the vocabulary, reads and says them (open)
concept_std = 1.0  # standard deviation of the concepts at the start
n_register = 0  # extra learned tokens in front of every row (transformer)
init_table = "cooccurrence"  # the token table starts from word statistics of the training bins | random
# masking: masking.py explains each
masking_type = "whole_word"  # token | whole_word | concepts | span
mlm_probability = 0.15  # share of tokens that is predicted
concept_window = 3  # words on each side that share a mask (concepts)
span_length_distribution = "poisson(3)"  # poisson(MEAN) | geometric(P,LONGEST), in words (span)
mask_replace = "100"  # 100: always [MASK] | 80/10/10: BERT's mixture
# optimization
batch_size = 256  # rows an optimizer step, over all processes and micro-batches
micro_batch = 32  # rows a forward pass of one process; lower it when memory runs out, the result is the same
optimizer = "adamw"  # adamw | muon (hidden matrices; adamw for the rest, same learning rate)
learning_rate = 1e-3  # peak
min_lr = 1e-5  # at the end of the schedule
warmup_steps = 500  # steps from 0 to the peak
lr_schedule = "cosine"  # cosine | linear | wsd (constant, then 1-sqrt over the last decay_fraction) | constant
decay_fraction = 0.2  # share of the steps that decays (wsd)
max_steps = 10000  # optimizer steps, the length of the schedule
max_tokens = 0  # stop after so many input tokens instead, 0: off; shortens the schedule
max_minutes = 0.0  # finish the schedule in so many minutes, 0: off; such a run depends on the machine's speed
stop_at_step = 0  # save and stop here as a pre-emption would, schedule unchanged; 0: off
patience = 0  # stop after so many evaluations without a better validation loss; 0: off
weight_decay = 0.05  # decoupled, on matrices only
beta1 = 0.9  # AdamW
beta2 = 0.98  # AdamW
grad_clip = 1.0  # largest gradient norm; 0: no clipping
# the rest
eval_interval = 500  # steps between evaluations (and checkpoints)
eval_rows = 256  # validation rows an evaluation reads
health_rows = 64  # of these, rows on which the concepts are measured: rank, input dependence, use; 0: not
log_interval = 10  # steps between log lines
save_minutes = 15.0  # a checkpoint at least this often
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
compile = "auto"  # auto: on CUDA only | true | false
seed = 1337  # of weights, batch order and masks
overfit_batch = False  # train on one batch with one mask only; fails unless the loss falls below 0.05
wandb = "off"  # online | offline | off
wandb_project = "concept-encoder"  # project name there
# -----------------------------------------------------------------------------
from configurator import configure, read_settings

config = configure(globals())
defaults = {name: value for name, (value, _) in read_settings(__file__).items()}

import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from data.reader import Batches, TokenData
from data.tokenizer import Tokenizer
from lib import health
from lib import machine as hardware
from lib import run as common
from lib.files import FolderLock, write_json
from lib.start import token_vectors
from masking import MaskedBatch, check_masking, mask_batch

MAX_SKIPPED = 10  # updates in a row with a non-finite gradient before the run gives up

# ---- set-up: everything a user can get wrong is refused here -----------------


def check_settings():
    """Raises ValueError for settings that contradict each other or would be ignored."""
    check_masking(masking_type, mlm_probability, concept_window, span_length_distribution, mask_replace)
    only_with = {  # a changed setting on the left means nothing unless the right holds
        ("concept_window",): masking_type == "concepts", ("span_length_distribution",): masking_type == "span",
        ("n_mixer", "mixer_kernel", "n_decoder", "self_attention",
         "lexicon"): arch != "concept" or bottleneck == "open", ("wandb_project",): wandb != "off",
        ("decay_fraction",): lr_schedule == "wsd", ("min_lr",): lr_schedule != "constant",
        ("isolate_documents",): rows == "block"}
    wrong = [f"{name}={config[name]} has no effect here; leave it at {defaults[name]}" for names, holds
             in only_with.items() for name in names if not holds and config[name] != defaults[name]]
    choices = dict(arch=common.ARCHS, init_table=("random", "cooccurrence"), optimizer=("adamw", "muon"), lr_schedule=(
        "cosine", "linear", "wsd", "constant"), wandb=("online", "offline", "off"), compile=("auto", "true", "false"),
        rows=("block", "document"))
    wrong += [f"{name}={config[name]!r}: expected {', '.join(allowed)}"
              for name, allowed in choices.items() if config[name] not in allowed]
    for names, low, high, expected in (
            ("batch_size micro_batch learning_rate max_steps eval_interval eval_rows log_interval", 1e-99, math.inf,
             "more than 0"),
            ("min_lr health_rows warmup_steps max_tokens max_minutes stop_at_step patience weight_decay grad_clip "
             "save_minutes", 0, math.inf, "0 or more"), ("beta1 beta2 decay_fraction", 0, 1, "from 0, below 1")):
        wrong += [f"{n}={config[n]}: expected {expected}" for n in names.split() if not low <= config[n] < high]
    if block_schedule and max_minutes:
        wrong.append("block_schedule: its shares are of a known number of steps; give max_steps, not max_minutes")
    per_process = batch_size // machine.world_size
    if batch_size % machine.world_size:
        wrong.append(f"batch_size={batch_size} does not divide among {machine.world_size} processes")
    elif not wrong and per_process % min(micro_batch, per_process):
        fits = [n for n in range(1, micro_batch + 1) if per_process % n == 0]
        wrong.append(f"micro_batch={micro_batch} does not divide the {per_process} rows of a process; "
                     f"--micro_batch={fits[-1]} does")
    if wrong:
        raise ValueError("\n       ".join(wrong))


def model_settings():
    """Fields of the architecture's config from the settings and the data's tokenizer."""
    settings = {name: config[name] for name in common.fields_of(arch) if name in config}
    settings["vocab_size"] = vocab_size or tok.vocab_size
    if settings["vocab_size"] < tok.n_vocab:
        raise ValueError(f"vocab_size={vocab_size}, but the tokenizer of {data_dir} has {tok.n_vocab} ids; "
                         f"use --vocab_size=0")
    return settings | dict(arch=arch, mask_id=tok.mask_id, eot_id=tok.eot_id)


with common.user_mistakes():
    machine = hardware.find_machine(device, block_size)
    check_settings()
    data = Batches(data_dir, data_weights, rows, block_size, block_schedule, seed, batch_size, max_steps, max_tokens)
    val_sets = {name: TokenData(name, "val", block_size, seed) for name in data.names}
    tok, max_steps = Tokenizer.load(os.path.join(data.names[0], "tokenizer")), data.n_steps
    check_masking(masking_type, mlm_probability, tok=tok)
    dtype, dtype_reason = hardware.choose_dtype(dtype, machine.device)
    torch.manual_seed(seed)
    model = common.build_model(model_settings())
    try:
        lock = FolderLock(out_dir) if machine.is_main else None
    except BlockingIOError:
        raise ValueError(f"another run is writing to {out_dir}; stop it or choose another --out_dir") from None
    resumed = common.latest_checkpoint(out_dir, machine.say) if init_from != "scratch" else None
    if init_from == "scratch" and os.path.exists(os.path.join(out_dir, "ckpt.pt")):
        raise ValueError(f"{out_dir} already holds a run; resume it with --init_from=auto or choose another --out_dir")
    if resumed and init_from not in ("auto", "scratch"):
        machine.say(f"{out_dir} holds a run: resuming it; --init_from={init_from} was for its first start")
    if resumed:
        changed = common.differences(resumed, model, tok, data.sha256, config)
        if changed:
            raise ValueError(f"{out_dir} cannot be resumed with other settings:\n       " + "\n       ".join(changed)
                             + "\n       choose another --out_dir, or go back to these settings")
        model.load_state_dict(resumed["model"])
    elif init_from in ("auto", "scratch"):
        if init_table == "cooccurrence" and machine.is_main:  # other processes get their weights from this one
            machine.say("token table: counting which tokens of the training bins keep company, up to a minute")
            model.start_table(token_vectors(data, model.cfg.vocab_size, token_dim, seed))
    else:
        common.take_weights(model, init_from, tok, data_dir)
    model.to(machine.device)

rows_per_process = batch_size // machine.world_size
micro_batch = min(micro_batch, rows_per_process)
use_compile = compile == "true" or (compile == "auto" and machine.device.type == "cuda")
entropy = data.unigram_entropy

# ---- optimizer and schedule -------------------------------------------------


def make_optimizers():
    """AdamW, decay on matrices only; with muon, the matrices of linear layers go to torch.optim.Muon instead."""
    hidden = {name: p for name, p in model.named_parameters()  # no tables, no mixer taps
              if optimizer == "muon" and p.ndim == 2 and name.endswith(".weight")}
    rest = [p for name, p in model.named_parameters() if name not in hidden]
    groups = [dict(params=[p for p in rest if p.ndim >= 2], weight_decay=weight_decay),
              dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0)]
    made = [torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(beta1, beta2), fused=True)]
    if hidden:
        made.append(torch.optim.Muon(hidden.values(), lr=learning_rate, weight_decay=weight_decay,
                                     adjust_lr_fn="match_rms_adamw"))
    return made


def learning_rate_at(step, progress):
    """Learning rate of the update that follows `step` updates; progress 0..1 is the share of the run behind it."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    if lr_schedule == "constant":
        return learning_rate
    start = warmup_steps / max(max_steps, warmup_steps + 1) if lr_schedule != "wsd" else 1 - decay_fraction
    x = min(1.0, max(0.0, (progress - start) / max(1 - start, 1e-9)))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * x)), "linear": 1 - x, "wsd": 1 - math.sqrt(x)}[lr_schedule]
    return min_lr + (learning_rate - min_lr) * fall


def minutes():
    return before_minutes + (time.monotonic() - started) / 60


def progress_at(step):
    return min(1.0, max(step / max_steps, minutes() / max_minutes if max_minutes else 0.0))


optimizers = make_optimizers()
scaler = torch.amp.GradScaler(machine.device.type, enabled=dtype == "fp16")
step, evaluated_at, best_loss, bad_evals, before_minutes = 0, -1, math.inf, 0, 0.0
skipped = torch.zeros(2, device=machine.device)  # updates in all, and in a row; read when a line is logged
if resumed:
    for opt, state in zip(optimizers, resumed["optimizers"]):
        opt.load_state_dict(state)
    scaler.load_state_dict(resumed["scaler"])
    step, evaluated_at, skipped[0] = resumed["step"], resumed["evaluated_at"], resumed["skipped"]
    best_loss, bad_evals, before_minutes = resumed["best_loss"], resumed["bad_evals"], resumed["minutes"]
    if machine.is_main:
        common.rewind_log(out_dir, step)
net = torch.compile(model, fullgraph=True, dynamic=False) if use_compile else model
if machine.world_size > 1:
    net = DistributedDataParallel(net, device_ids=[machine.device.index] if machine.device.type == "cuda" else None)

# ---- what the run is, on screen and in out_dir --------------------------------
flops_per_token = data.flops_per_token(model, mlm_probability, micro_batch)  # {row length: FLOPs}
peak, git = hardware.matmul_peak(machine.device, dtype), common.git_state()
changed = ", ".join(f"{name}={value}" for name, value in config.items() if value != defaults[name])
unused = ", ".join(sorted(set(config) & set().union(*map(common.fields_of, common.ARCHS)) - common.fields_of(arch)))
before = defaults | resumed["settings"] if resumed else config  # an older run had fewer settings
since = ", ".join(f"{name}={before[name]} -> {value}" for name, value in config.items() if value != before[name])
compile_reason = "on for CUDA only; a CPU gains a few percent for a 20 s start" if compile == "auto" else "as asked"
machine.say(
    f"torch {torch.__version__}, git {git or 'none'}, {machine.world_size} x {machine.device}, matmul peak "
    f"{peak / 1e12:.2f} TFLOP/s each\ndtype {dtype} ({dtype_reason}); compile {use_compile} ({compile_reason})\n"
    f"settings that differ from the defaults: {changed or 'none'}\n"
    f"arch {arch}, which does not use {unused}\n"
    f"model: {model.num_params():,} parameters, {flops_per_token[block_size] / 1e6:,.1f} MFLOP a token\n"
    f"step: {batch_size} rows x {block_size} tokens = {machine.world_size} processes x "
    f"{rows_per_process // micro_batch} micro-batches x {micro_batch} rows\n"
    f"{data.plan()}\n"
    f"unigram entropy {entropy:.3f} nats: a loss above it has not even learned word frequencies\n"
    + (f"resuming at step {step}, changed since: {since or 'nothing'}" if resumed else "starting at step 0"))
if machine.is_main:
    with common.user_mistakes():
        write_json(os.path.join(out_dir, "config.json"), config | dict(git=git, torch=torch.__version__))
        tok.save(os.path.join(out_dir, "tokenizer"))
    needed = 3.3 * 12 * model.num_params()  # ckpt.pt, ckpt_prev.pt and one being written: weights, two moments, fp32
    if shutil.disk_usage(out_dir).free < needed:
        print(f"WARNING: {out_dir} has {shutil.disk_usage(out_dir).free / 2**30:.1f} GiB free; "
              f"checkpoints of this run need {needed / 2**30:.1f}", flush=True)
tracker = None
if wandb != "off" and machine.is_main:
    import wandb as tracker
    tracker.init(project=wandb_project, name=os.path.basename(out_dir), dir=out_dir, mode=wandb, config=config)


def log(record):
    if machine.is_main:
        try:
            common.append_log(out_dir, record)
        except OSError as error:  # a full disk; the line is on the screen
            print(f"WARNING: log.jsonl was not written: {error}", flush=True)
        if tracker:
            tracker.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])


# ---- the pieces of a step ----------------------------------------------------


def masked_batch(step):
    """Masks of this process's rows of one step, and the number of predicted tokens over all processes."""
    ids, sample_ids = data.batch(0 if overfit_batch else step, machine.rank, machine.world_size)
    batch = mask_batch(ids, sample_ids, masking_type, mlm_probability, tok, seed, concept_window=concept_window,
                       span_length_distribution=span_length_distribution, mask_replace=mask_replace)
    batch = MaskedBatch(*machine.take(batch))
    total = batch.weights.sum()
    if machine.world_size > 1:
        torch.distributed.all_reduce(total)
    return batch, total.clamp(min=1)


def forward_backward(batch, total):
    """Adds up the gradients of all micro-batches. -> this process's share of the loss, a tensor."""
    loss = torch.zeros((), device=machine.device)
    parts = list(zip(*(t.split(micro_batch * block_size // batch.inputs.shape[1]) for t in batch)))
    for i, part in enumerate(parts):
        is_real = part[0] != tok.pad_id if data.padded else None
        with nullcontext() if i == len(parts) - 1 or machine.world_size == 1 else net.no_sync():
            with hardware.autocast(machine.device, dtype):
                share = net(*part, total, is_real)
            # DDP averages over processes, the loss is a sum over them
            scaler.scale(share * machine.world_size).backward()
        loss += share.detach()
    return loss


def update(lr):
    """One optimizer step unless the gradient is not finite; the host does not wait. -> gradient norm, a tensor."""
    for opt in optimizers:
        scaler.unscale_(opt)
        for group in opt.param_groups:
            group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    skip = (~norm.isfinite()).float()
    for opt in optimizers:
        if not scaler.is_enabled():  # the scaler sets this by itself and lowers its scale
            opt.found_inf = skip  # fused AdamW then leaves all as it is
        if not isinstance(opt, torch.optim.Muon) or not skip.item():
            scaler.step(opt)
        opt.zero_grad(set_to_none=True)
    scaler.update()
    skipped[0] += skip
    skipped[1] = (skipped[1] + 1) * skip
    return norm


def validate():
    """Validation loss on fixed masks (single tokens, 15 %) of packed rows, whatever this run trains on."""
    global best_loss, bad_evals, evaluated_at
    result, losses = common.evaluate_all(model, val_sets, data.shares, tok, machine, dtype, rows=eval_rows,
                                         micro_batch=micro_batch)
    better, evaluated_at = result["loss"] < best_loss, step
    best_loss, bad_evals = min(best_loss, result["loss"]), 0 if better else bad_evals + 1
    machine.say(f"step {step}: validation loss {result['loss']:.4f} nats (unigram entropy {entropy:.3f}), "
                f"accuracy {result['accuracy']:.1%}{', best so far' if better else ''}")
    if len(losses) > 1:
        machine.say(*(f" {name} {loss:.4f}" for name, loss in losses.items()))
    alive = {}
    if health_rows and machine.is_main:
        alive = health.summary(model, next(iter(val_sets.values())), tok, machine, dtype, health_rows, micro_batch)
        machine.say(*(f" {name} {'-' if value is None else format(value, '.3g')}" for name, value in alive.items()))
    log(dict(step=step, val_loss=result["loss"], val_accuracy=result["accuracy"], unigram_entropy=entropy,
             val_bits_per_byte=result["bits_per_byte"], tokens=data.tokens(step), val_losses=losses) | alive)
    return better


def save(best=False):
    """ckpt.pt with everything a resume needs; best.pt with the weights alone. A full disk does not end the run."""
    global last_save
    last_save = time.monotonic()
    if not machine.is_main:
        return
    settings, weights = common.model_state(model)
    small = dict(model_settings=settings, model=weights, settings=config, step=step, tokens=data.tokens(step),
                 best_loss=best_loss, tokenizer_fingerprint=tok.fingerprint, data_sha256=data.sha256)
    full = small | dict(optimizers=[opt.state_dict() for opt in optimizers], scaler=scaler.state_dict(),
                        rng=torch.get_rng_state(), skipped=int(skipped[0]), bad_evals=bad_evals, minutes=minutes(),
                        evaluated_at=evaluated_at)
    for name, checkpoint in [("ckpt.pt", full)] + [("best.pt", small)] * best:
        common.save_or_warn(out_dir, checkpoint, name)


# ---- the loop ----------------------------------------------------------------
started = last_save = time.monotonic()
signals = hardware.StopSignals()
stopped = "max_minutes" if max_minutes and minutes() >= max_minutes else ""
window_start, window_steps, tokens_per_s, loss_now = time.monotonic(), 0, 0.0, math.nan
model.train()
if resumed:
    torch.set_rng_state(resumed["rng"])
else:
    torch.manual_seed(seed + machine.rank)  # dropout differs between processes
if step % eval_interval == 0 and evaluated_at != step:  # at the start, or where a pre-emption left an evaluation out
    save(best=validate())
batch, total = masked_batch(step)
while not stopped and step < max_steps:
    lr, phase = learning_rate_at(step, progress_at(step)), data.phase(step)
    if step == phase.begin > 0:
        machine.say(f"step {step}: {phase.rows:,} rows of {phase.T} tokens a step from here on")
    try:
        loss = forward_backward(batch, total)
    except RuntimeError as error:
        unit = block_size // phase.T
        sys.exit(common.does_not_fit(error, model, batch, machine, dtype, micro_batch, "micro_batch", unit=unit))
    batch, total = masked_batch(step + 1)  # drawn while a GPU still works on the step
    norm = update(lr)
    step, window_steps = step + 1, window_steps + 1
    # every process must take the same branch: what any of them has seen counts for all
    is_due = time.monotonic() - last_save > 60 * save_minutes
    asked, due, out_of_time = machine.all_sum(bool(signals.name), is_due, max_minutes and minutes() >= max_minutes)
    stopped = ((asked and (signals.name or "signal")) or (out_of_time and "max_minutes")
               or (step == stop_at_step and "stop_at_step") or (step == max_steps and "max_steps") or "")

    if step % log_interval == 0 or stopped or overfit_batch:
        loss_now, = machine.all_sum(loss)
        skipped_total, in_a_row = map(int, skipped.tolist())
        if in_a_row:
            machine.say(f"step {step}: the gradient is not finite, update skipped ({in_a_row} in a row)")
        if in_a_row >= MAX_SKIPPED:
            sys.exit(f"error: {in_a_row} updates in a row had a non-finite gradient; the last good checkpoint is "
                     f"{out_dir}/ckpt.pt; resume it with a lower --learning_rate")
        seconds = time.monotonic() - window_start
        tokens_per_s = (data.tokens(step) - data.tokens(step - window_steps)) / seconds
        eta = min((max_steps - step) * seconds / window_steps, (max_minutes or math.inf) * 60 - minutes() * 60)
        positions_per_s = window_steps * batch_size * block_size / seconds  # padding included: it costs as much
        mfu = positions_per_s * flops_per_token[phase.T] / (peak * machine.world_size)
        if step % log_interval == 0 or stopped:
            machine.say(f"step {step}/{max_steps} loss {loss_now:.4f} norm {norm:.2f} lr {lr:.2e} "
                        f"{tokens_per_s:,.0f} tok/s mfu {mfu:.0%} {hardware.memory_gib(machine.device):.1f} GiB "
                        f"eta {max(eta, 0) / 60:.1f} min{data.shares_so_far(step)}")
            log(dict(step=step, loss=loss_now, grad_norm=norm.item(), lr=lr, tokens=data.tokens(step),
                     tokens_per_s=tokens_per_s, mfu=mfu, memory_gib=hardware.memory_gib(machine.device),
                     minutes=minutes(), skipped=skipped_total, block_size=phase.T,
                     sources=data.progress(step)))
        window_start, window_steps = time.monotonic(), 0
    stopped = "overfit" if overfit_batch and loss_now < 0.05 else stopped
    pre_empted = asked or stopped == "stop_at_step"
    if not pre_empted and (step % eval_interval == 0 or stopped):
        pause = time.monotonic()
        save(best=validate())
        stopped = stopped or ("patience" if patience and bad_evals >= patience else "")
        window_start += time.monotonic() - pause
    elif pre_empted or due:
        save()
net = None  # DistributedDataParallel holds on to the process group
machine.close()
if overfit_batch and loss_now >= 0.05:
    sys.exit(f"error: overfit_batch reached a loss of {loss_now:.3f} in {step} steps; one batch should fall below 0.05")
if machine.is_main:
    evaluations = [r["val_loss"] for r in common.read_log(out_dir) if "val_loss" in r]
    print(json.dumps(dict(
        out_dir=out_dir, step=step, tokens=data.tokens(step), stopped=stopped or "max_steps",
        loss=None if math.isnan(loss_now) else loss_now, val_loss=evaluations[-1] if evaluations else None,
        best_val_loss=best_loss, unigram_entropy=entropy, params=model.num_params(),
        tokens_per_s=round(tokens_per_s), minutes=round(minutes(), 2), skipped=int(skipped[0]))))
