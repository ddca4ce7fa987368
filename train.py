"""Train a model on prepared token bins.

    python train.py config/demo.py                                    one process: laptop or one GPU
    torchrun --nproc_per_node=4 train.py config/micro_span.py         four GPUs of one machine
    python train.py config/micro_span.py --data_dir=data/owt --max_steps=20         change settings

The file reads from top to bottom in the order in which things happen: settings, data, model,
optimizer, the parts of a step, and last the loop.

Writes out_dir/{ckpt.pt, ckpt_prev.pt, best.pt, config.json, log.jsonl, curves.png, tokenizer/}, or
step-N/ for the first two with parallel=fsdp. The same command again resumes the run, on a CPU bit
for bit: the batch, the masks, dropout and, without max_minutes, the learning rate depend on the
step and the seed alone. SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 save a checkpoint and stop.
The last line on stdout is a JSON summary.
"""

# ---- settings -----------------------------------------------------------------------------------

# what most runs change
out_dir = "out/run"  # checkpoints, log and a copy of the tokenizer go here
data_dir = "data/pydocs"  # made by prepare.py: bins, meta.json, tokenizer/; several: commas between
arch = "concept"  # concept | transformer, resonance (the baselines, of width token_dim)
objective = "mlm"  # mlm: hidden tokens | clm: the next token, a decoder | mntp (not of concept)
bottleneck = "open"  # open: tokens see neighbours, better loss | strict: all through the concepts
block_size = 512  # tokens a row
n_layer = 4  # concept layers, or attention layers; a transformer with 0 is its local mixers alone
n_head = 8  # attention heads
n_concept = 64  # concept vectors
concept_dim = 512  # width of a concept
token_dim = 512  # width of the token table, from 4; of everything in a transformer
ffn_dim = 2048  # hidden width of the gated feed-forward layers
masking_type = "whole_word"  # token | whole_word | concepts | span | diffusion | importance
mlm_probability = 0.15  # share of tokens that is predicted (diffusion: the largest share hidden)
batch_size = 256  # rows an optimizer step, over all processes and micro-batches
# The result is the same for any micro_batch, but for the random numbers of dropout and max_length.
micro_batch = 32  # rows a forward pass of one process; lower it if memory runs out
learning_rate = 1e-3  # peak
max_steps = 10000  # optimizer steps, the length of the schedule

# model: ConceptConfig in model.py and the configs in lib/baselines.py explain each
init_from = "auto"  # auto: resume out_dir or begin | scratch | resume | DIR: weights of that run
carry_optimizer = False  # with init_from=DIR: its optimizer state and token count, too
init_table = "cooccurrence"  # token table starts from word statistics of the training bins | random
vocab_size = 0  # rows of the token table; 0: as many as the data's tokenizer asks for
position = "learned"  # learned | sinusoidal (of no fixed length)
max_length = 0  # sinusoidal: longest row ever read, by random shifts in training; 0: block_size
bias = False  # biases in linear layers and norms
dropout = 0.0  # keep 0 for pretraining
hide_masked = "auto"  # concepts do not read [MASK]; auto: unless they are anchored | true | false
isolate_documents = False  # documents packed into one row do not see each other
n_mixer = 2  # local mixer blocks (open, transformer, resonance)
mixer_kernel = 7  # tokens a mixer sees (open, transformer, resonance)
resonant_mixers = False  # mixers see the whole row, by long convolutions (open)
n_decoder = 1  # decoder blocks (open)
self_attention = False  # concepts also read each other (open; strict always does)
time_input = False  # tokens know which share of the row is masked, for masking_type=diffusion
lexicon = True  # each concept owns some words of the vocabulary, reads and predicts them (open)
concept_std = 1.0  # standard deviation of the concepts at the start
anchored = "auto"  # concepts have places in the row; auto: strict only | true | false
anchor_slope = 4.0  # anchored: how fast scores fall with the distance, in the most local head
local_heads = 0.75  # anchored: share of the heads that are local
n_register = 0  # extra learned tokens in front of every row (transformer)
copy_head = False  # adds logits for words of the row, a lexicon without concepts (transformer)
rope_theta = 10000.0  # base of the rotary positions, larger for long rows (transformer)
local_window = 0  # tokens that local layers see to each side; 0: none is local (transformer)
global_every = 3  # with local_window: so many layers from one that sees all to the next
qk_norm = True  # queries and keys are normalised (transformer)
bert_head = False  # a dense layer before the logits and a bias for each word (transformer)
mixer = "resonance"  # resonance | fnet: in place of attention (resonance)
mixers = "r"  # of the layers in turn: r, the mixer; a, attention; as rrra (resonance)
n_frequency = 64  # oscillators of a mixer (resonance, resonant_mixers)

# masking: masking.py explains each
concept_window = 3  # words on each side that share a mask (concepts)
span_length_distribution = "poisson(3)"  # poisson(MEAN) | geometric(P,LONGEST), in words (span)
mask_replace = "100"  # 100: always [MASK] | 80/10/10: BERT's mixture
diffusion_schedule = "linear"  # linear | cosine | bell: which shares are drawn often (diffusion)
importance = "ema"  # which tokens are chosen more often: ema | frequency | model | shuffled
importance_weights = True  # predictions that were likelier to be chosen count less (importance)
curriculum = "off"  # off | easy_to_hard | hard_to_easy: which scores are chosen (importance)
stage_1_end = 0.33  # share of the run at which medium scores begin (curriculum)
stage_2_end = 0.66  # share of the run at which the last stage begins (curriculum)

# data: data/reader.py explains each
data_weights = ""  # share of the tokens from each folder, such as 0.7,0.3; empty: by size
rows = "block"  # block: documents packed one after another | document: one begins each row, padded
block_schedule = ""  # rows that grow, LENGTH:SHARE of the tokens, as 128:0.9,512:0.1; empty: off
batch_schedule = ""  # batches that grow, ROWS:SHARE of the steps, as 64:0.1,256:0.9; empty: off

# optimizer, schedule, when to stop
optimizer = "adamw"  # adamw | muon (hidden matrices; adamw for the rest) | stable_adamw
min_lr = 1e-5  # learning rate at the end of the schedule
warmup_steps = 500  # steps from 0 to the peak
lr_schedule = "cosine"  # cosine | linear | wsd (constant, then 1-sqrt at the end) | constant
decay_fraction = 0.2  # share of the steps that decays (wsd)
lr_restarts = 0  # times that the rate goes back to its peak (cosine; SGDR, 1608.03983)
weight_decay = 0.05  # decoupled, on matrices only
beta1 = 0.9  # AdamW
beta2 = 0.98  # AdamW
grad_clip = 1.0  # largest gradient norm; 0: no clipping
max_tokens = 0  # stop after so many input tokens instead, 0: off; shortens the schedule
max_minutes = 0.0  # finish the schedule in so many minutes, 0: off; depends on the machine's speed
stop_at_step = 0  # save and stop here as a pre-emption would, schedule unchanged; 0: off
patience = 0  # stop after so many evaluations without a better validation loss; 0: off

# evaluation, log, checkpoints
eval_interval = 500  # steps between evaluations (and checkpoints)
eval_rows = 256  # validation rows an evaluation reads
health_rows = 64  # of these, rows on which the concepts are measured: rank, use, ...; 0: not
log_interval = 10  # steps between log lines
save_minutes = 15.0  # a checkpoint at least this often
hang_minutes = 60.0  # a step that takes longer, evaluation included, ends the run; 0: off
log_to = ""  # beside log.jsonl: wandb, tensorboard, or both with a comma
wandb = "off"  # online | offline | off; the variable WANDB_PROJECT names the project

# machine, seed, debugging
parallel = "ddp"  # of several processes: ddp, each holds the model | fsdp, each holds a part of it
checkpoint_every = 0  # every n-th block computes its activations again, for memory: 1 all, 0 none
device = "auto"  # auto | cuda | mps | cpu
dtype = "auto"  # auto | bf16 | fp16 | fp32
compile = "auto"  # auto: on CUDA only | true | false
seed = 1337  # of weights, batch order and masks
deterministic = False  # only operations that give the same bits each time; slower on a GPU
overfit_batch = False  # train on one batch with one mask; fails unless the loss falls below 0.05
overfit_tokens = 0  # the same on a batch of so many tokens, such as 1024; 0: off
lr_find = False  # instead of training: try rising learning rates, draw lr_find.png and suggest one
# -------------------------------------------------------------------------------------------------
from configurator import configure, read_settings

# before torch is imported, which takes seconds: --help and a mistyped setting answer at once
config = configure(globals())
defaults = {name: default for name, (default, _) in read_settings(__file__).items()}

import math
import os
import sys
import time

import torch

from data.reader import Batches, TokenData
from data.tokenizer import Tokenizer
from lib import health, run, settings
from lib.evaluation import evaluate_all
from lib.files import print_result
from lib.importance import Importance, describe_importance
from lib.log import (
    append_log,
    describe_first_loss,
    draw_curves,
    read_log,
    rewind_log,
    start_trackers,
    why_not_overfit,
    write_log,
)
from lib.machine import (
    StopSignals,
    autocast,
    be_deterministic,
    choose_dtype,
    does_not_fit,
    end_if_it_hangs,
    find_machine,
    matmul_peak,
    memory_gib,
)
from lib.optimizers import StableAdamW, find_learning_rate
from lib.parallel import Distributed, check_same_everywhere
from lib.start import token_vectors
from masking import (
    MaskedBatch,
    check_masking,
    curriculum_band,
    mask_batch,
    next_tokens,
    predicted_share,
)

MAX_SKIPPED = 10  # updates in a row with a non-finite gradient before the run gives up

# ---- machine and data ---------------------------------------------------------------------------

# user_mistakes: what a user can get wrong ends in one message instead of a traceback
with run.user_mistakes():
    signals = StopSignals()
    machine = find_machine(device, block_size, parallel=True, hang_minutes=hang_minutes)
    if overfit_tokens:
        batch_size = micro_batch = settings.rows_to_overfit(overfit_tokens, block_size)
        overfit_batch = True
        config |= dict(batch_size=batch_size, micro_batch=micro_batch, overfit_batch=True)
    settings.check_settings(config, defaults, machine.world_size)
    be_deterministic(deterministic)
    data = Batches(data_dir, data_weights, rows, block_size, block_schedule, seed, batch_size,
                   max_steps, max_tokens, batch_schedule)
    val_sets = {name: TokenData(name, "val", block_size, seed) for name in data.names}
    tok = Tokenizer.load(os.path.join(data.names[0], "tokenizer"))  # the same in all folders
    if objective != "clm":
        check_masking(masking_type, mlm_probability, tok=tok)
    dtype, dtype_reason = choose_dtype(dtype, machine.device)  # resolves "auto"
    settings.check_with_data(config, data.padded, dtype)

n_steps = data.n_steps  # max_steps, or fewer where max_tokens ends the run earlier
warmup_steps = settings.warmup_within(warmup_steps, n_steps, machine.say)
unigram_entropy = data.unigram_entropy  # nats, the loss of a model that knows word frequencies only
rows_per_process = batch_size // machine.world_size
# With many processes the rows of one can be fewer than the micro_batch asked for.
micro_batch = min(micro_batch, rows_per_process)

# ---- model --------------------------------------------------------------------------------------

# The model, then its weights: those of a checkpoint of this run, of another run, or random ones.
with run.user_mistakes():
    torch.manual_seed(seed)  # the initial weights are the same in every process
    takes_weights = init_from not in ("auto", "scratch", "resume")
    model = settings.build_model(settings.model_settings(arch, config, tok))
    # kept until the process ends: a second run must not write to the same folder
    lock = run.lock_folder(out_dir) if machine.is_main else None
    # None: a new run. Of a sharded checkpoint each process reads its part, when it has a place.
    resumed = run.checkpoint_to_resume(out_dir, init_from, machine.say, load=parallel != "fsdp")
    git = run.git_state()
    check_same_everywhere(machine, torch=torch.__version__, git=git, data=data.sha256,
                          checkpoint=resumed and resumed["step"],
                          **{name: value for name, value in config.items() if name != "data_dir"})
    if resumed and lr_find:
        raise ValueError(f"lr_find starts from fresh weights, and {out_dir} holds a run; choose "
                         "another --out_dir")
    if resumed:
        run.check_same_run(resumed, model, tok, data.sha256, config, defaults)
    elif takes_weights:
        taken = run.take_weights(model, init_from, tok, config, carry_optimizer)
        machine.say(run.describe_weights(taken, model, init_from, objective, carry_optimizer))
    elif init_table == "cooccurrence" and machine.is_main:
        # only here: Distributed copies the weights of this process to the others
        machine.say("token table: counting which tokens occur near each other, up to a minute; "
                    "--init_table=random skips it")
        model.start_table(token_vectors(data, model.cfg.vocab_size, token_dim, seed))
    # distributed.net, for training steps, and model, for all else, share their weights
    use_compile = compile == "true" or (compile == "auto" and machine.device.type == "cuda")
    distributed = Distributed(model, parallel, machine, dtype, use_compile, checkpoint_every)

# ---- optimizer and schedule ---------------------------------------------------------------------


def make_optimizers():
    """-> [AdamW] or [StableAdamW], weight decay on matrices only; with muon -> [AdamW, Muon].

    Muon takes the weights of linear layers, AdamW the rest: tables, mixer taps, norms, biases.
    """
    for_muon = {}
    if optimizer == "muon":
        for_muon = {name: p for name, p in model.named_parameters()
                    if p.ndim == 2 and name.endswith(".weight")}
    for_adamw = [p for name, p in model.named_parameters() if name not in for_muon]
    groups = [dict(params=[p for p in for_adamw if p.ndim >= 2], weight_decay=weight_decay),
              dict(params=[p for p in for_adamw if p.ndim < 2], weight_decay=0.0)]
    groups = [group for group in groups if group["params"]]
    if optimizer == "stable_adamw":
        return [StableAdamW(groups, lr=learning_rate, betas=(beta1, beta2))]
    made = [torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)]
    if for_muon:
        # match_rms_adamw scales the update to the size of AdamW's: one learning rate fits both
        made.append(torch.optim.Muon(for_muon.values(), lr=learning_rate,
                                     weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return made


def learning_rate_at(step, progress):
    """Learning rate of the update after `step` updates; progress: share of the run done, 0 to 1."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    if lr_schedule == "constant":
        return learning_rate
    # progress at which the decay starts: after the warm-up, with wsd in the last part of the run
    if lr_schedule == "wsd":
        start = 1 - decay_fraction
    else:
        start = warmup_steps / max(n_steps, warmup_steps + 1)
    x = min(1.0, max(0.0, (progress - start) / max(1 - start, 1e-9)))
    if lr_schedule == "cosine":
        x = 1.0 if x == 1 else x * (lr_restarts + 1) % 1.0
        share = 0.5 * (1 + math.cos(math.pi * x))
    elif lr_schedule == "linear":
        share = 1 - x
    else:
        share = 1 - math.sqrt(x)
    return min_lr + (learning_rate - min_lr) * share


def minutes():
    """Minutes this run has trained, over all the times it was started."""
    return minutes_before + (time.monotonic() - started) / 60


def progress_at(step, clock):
    """Share of the run that is done after `step` updates, by steps or by time: the larger.

    clock: minutes trained, the same number in every process.
    """
    by_time = clock / max_minutes if max_minutes else 0.0
    return min(1.0, max(step / n_steps, by_time))


def load_optimizer(opt, state):
    """Takes the moments of a checkpoint. Weight decay and betas stay those of the settings."""
    groups = [{name: value for name, value in group.items() if name != "params"}
              for group in opt.param_groups]
    opt.load_state_dict(state)
    for group, hyperparameters in zip(opt.param_groups, groups):
        group.update(hyperparameters)


optimizers = make_optimizers()
scorer = None  # says which tokens are masked more often, and learns it
if masking_type == "importance":
    scorer = Importance(importance, data, tok, mlm_probability, machine)
scaler = torch.amp.GradScaler(machine.device.type, enabled=dtype == "fp16")

# What a run keeps beside weights and optimizers. All but the last is in the checkpoint.
step = 0  # updates so far
evaluated_at = -1  # step of the latest evaluation
best_loss = math.inf  # lowest validation loss so far
bad_evals = 0  # evaluations since then
minutes_before = 0.0  # minutes trained by earlier processes of this run
tokens_before = 0  # read by the run whose optimizer this one carries on
loss_now = math.nan  # training loss of the latest log line
stopped = ""  # why the run ends; empty while it goes on
is_saved = True  # the latest checkpoint could be written
skipped = torch.zeros((), device=machine.device)  # updates skipped: their gradient was not finite
skipped_in_a_row = torch.zeros((), device=machine.device)  # tensors: reading one waits for the GPU
if resumed:
    resumed = distributed.take(resumed, optimizers)
    model.load_state_dict(resumed["model"])
    for opt, state in zip(optimizers, resumed["optimizers"]):
        load_optimizer(opt, state)
    if scorer and resumed.get("importance"):
        with run.user_mistakes():
            scorer.load(resumed["importance"])
    if resumed["scaler"] and scaler.is_enabled():  # empty without fp16
        scaler.load_state_dict(resumed["scaler"])
    step = resumed["step"]
    evaluated_at = resumed["evaluated_at"]
    best_loss = resumed["best_loss"]
    bad_evals = resumed["bad_evals"]
    minutes_before = resumed["minutes"]
    tokens_before = resumed.get("tokens_before", 0)
    skipped.fill_(resumed["skipped"])
    loss_now = resumed.get("loss", math.nan)  # older checkpoints have no loss and no reason
    if step >= n_steps:
        stopped = "max_steps"
    elif max_minutes and minutes_before >= max_minutes:
        stopped = "max_minutes"
    elif patience and bad_evals >= patience:
        stopped = "patience"
    elif overfit_batch and resumed.get("stopped") == "overfit":
        stopped = "overfit"
elif takes_weights:
    if carry_optimizer:
        for opt, state in zip(optimizers, distributed.take(taken, optimizers)["optimizers"]):
            load_optimizer(opt, state)
        tokens_before = taken["tokens"]
    if scorer:
        machine.say(scorer.begin_with(taken.get("importance")))
is_finished = stopped and evaluated_at == step  # nothing to train, nothing to evaluate
with run.user_mistakes():
    if stopped:
        run.check_finished(resumed, n_steps, config, defaults)

# ---- what the run is, on screen and in out_dir --------------------------------------------------

flops_per_token = data.flops_per_token(  # {row length: FLOPs}
    model, predicted_share(masking_type, mlm_probability, objective), micro_batch)
peak = matmul_peak(machine.device, dtype)  # FLOP/s of matrix products here, 100 % for mfu
compile_reason = "as asked"
if compile == "auto":
    compile_reason = "on for CUDA only; a CPU gains a few percent for a 20 s start"
machine.say(
    f"torch {torch.__version__}, git {git or 'none'}, {machine.world_size} x {machine.device}, "
    f"matmul peak {peak / 1e12:.2f} TFLOP/s each\n"
    f"dtype {dtype} ({dtype_reason}); compile {use_compile} ({compile_reason})\n"
    f"{settings.describe_settings(config, defaults)}\n"
    f"model: {model.num_params():,} parameters, "
    f"{flops_per_token[block_size] / 1e6:,.1f} MFLOP a token\n"
    f"step: {batch_size} rows x {block_size} tokens; processes {machine.world_size}, "
    f"micro-batches {rows_per_process // micro_batch}, rows of a micro-batch {micro_batch}\n"
    f"{data.plan()}\n"
    f"unigram entropy {unigram_entropy:.3f} nats: a loss above it has not even learned word "
    f"frequencies\n"
    f"{run.describe_start(resumed, config, defaults)}")
trackers = {}  # wandb and tensorboard, if asked for
if is_finished:
    # with a schedule or curriculum, steps are shares of the whole and stay as they are
    more = f"A larger --{'max_tokens' if n_steps < max_steps else stopped} trains on; "
    if stopped == "overfit" or block_schedule or batch_schedule or curriculum != "off":
        more = ""
    machine.say(f"{out_dir} is finished ({stopped}): {step:,} steps, best validation loss "
                f"{best_loss:.4f}. {more}another --out_dir starts anew")
elif machine.is_main and not lr_find:
    rewind_log(out_dir, step if resumed else -1)
    run.write_config(out_dir, config, git, tok)
    run.warn_of_small_disk(out_dir, model.num_params())
    trackers = start_trackers(log_to, wandb, config, step)

# ---- the parts of a step ------------------------------------------------------------------------


def band(step):
    """Which scores are chosen at a step, by the curriculum."""
    return curriculum_band(curriculum, step / n_steps, stage_1_end, stage_2_end)


def masked_batch(step):
    """Rows of this process at a step, with masks -> MaskedBatch, sum of the predictions' weights.

    The sum is over all processes and micro-batches. The loss of each part is divided by it, so the
    result does not depend on how a batch is cut.
    """
    with run.user_mistakes():  # the files may be deleted or cut meanwhile
        ids, sample_ids = data.batch(0 if overfit_batch else step, machine.rank, machine.world_size)
    if objective == "clm":
        batch = next_tokens(ids, tok)
    else:
        batch = mask_batch(ids, sample_ids, masking_type, mlm_probability, tok, seed,
                           concept_window=concept_window, mask_replace=mask_replace,
                           span_length_distribution=span_length_distribution,
                           diffusion_schedule=diffusion_schedule,
                           scores=scorer.scores(ids) if scorer else None,
                           shuffle_scores=importance == "shuffled",
                           band=band(0 if overfit_batch else step),
                           importance_weights=importance_weights)
    batch = MaskedBatch(*machine.take(batch))
    total_weight = batch.weights.sum()
    if machine.world_size > 1:
        torch.distributed.all_reduce(total_weight)
    return batch, total_weight.clamp(min=1e-9)  # nothing to predict: a loss of 0, not NaN


def forward_backward(batch, total_weight):
    """Adds up the gradients of all micro-batches. -> this process's share of the loss, a tensor."""
    loss, nats = torch.zeros((), device=machine.device), []
    wanted = dict(with_nats=True) if scorer else {}
    # micro_batch counts rows of block_size; with block_schedule rows are shorter, so more fit
    rows_at_once = micro_batch * block_size // batch.inputs.shape[1]
    parts = list(zip(*(tensor.split(rows_at_once) for tensor in batch)))
    for i, part in enumerate(parts):
        inputs, positions, targets, weights, _ = part
        is_real = inputs != tok.pad_id if data.padded else None  # (B,T), False: padding
        with distributed.accumulate(is_last=i == len(parts) - 1):
            with autocast(machine.device, dtype):
                share = distributed.net(inputs, positions, targets, weights, total_weight, is_real,
                                        **wanted)
            if scorer:  # it learns from the loss of each prediction
                share, nats_BK = share
                nats.append(nats_BK)
            # gradients are averaged over processes, but the loss is a sum over them
            scaler.scale(share * machine.world_size).backward()
        loss += share.detach()
    # Before the next masks are drawn, because a resumed run draws them after this, too. In
    # overfit_batch the masks must stay the same, and so must the scores.
    if scorer and not overfit_batch:
        scorer.learn(batch, torch.cat(nats))
    return loss


def update(lr):
    """One optimizer step, skipped if the gradient is not finite. -> gradient norm, a tensor.

    The decision to skip stays on the GPU, so the host does not wait for it.
    """
    for opt in optimizers:
        scaler.unscale_(opt)
        for group in opt.param_groups:
            group["lr"] = lr
    norm = distributed.clip_gradients(grad_clip if grad_clip > 0 else math.inf)
    skip = (~norm.isfinite()).float()
    for opt in optimizers:
        # fused AdamW changes nothing where found_inf is 1; with fp16 the scaler sets it by itself
        if not scaler.is_enabled():
            opt.found_inf = skip
        # the others do not look at found_inf
        if isinstance(opt, torch.optim.AdamW) or not skip.item():
            scaler.step(opt)
        opt.zero_grad(set_to_none=True)
    scaler.update()
    skipped.add_(skip)
    skipped_in_a_row.add_(1).mul_(skip)
    return norm


# ---- evaluation, checkpoints, log ---------------------------------------------------------------


def validate():
    """Loss of packed validation rows, fixed masks (single tokens, 15 %) or, of a decoder, all
    tokens. -> whether it is the best. When patience has run out, `stopped` says so.

    The same rows and masks whatever this run trains on, so losses of different runs compare.
    """
    global best_loss, bad_evals, evaluated_at, stopped
    concepts, scores, first = {}, {}, val_sets[data.names[0]]
    with run.user_mistakes(), distributed.whole_model() as whole:
        result, losses = evaluate_all(whole, val_sets, data.shares, tok, machine, dtype,
                                      eval_rows, micro_batch)
        # All concepts can become one vector while the loss rises by a few hundredths.
        if health_rows and machine.is_main and arch == "concept":
            concepts = health.summary(whole, first, tok, machine, dtype, health_rows, micro_batch)
        if scorer and machine.is_main:
            scores = scorer.measure(whole, first, dtype, health_rows or eval_rows, micro_batch)
    evaluated_at = step
    # Random weights at step 0 are no result: best.pt would hold them, should the run stop early.
    has_learned = step > 0 or takes_weights
    is_best = has_learned and result["loss"] < best_loss
    if is_best:
        best_loss, bad_evals = result["loss"], 0
    elif has_learned:
        bad_evals += 1
        if patience and bad_evals >= patience:
            stopped = stopped or "patience"
    machine.say(f"step {step}: validation loss {result['loss']:.4f} nats (unigram entropy "
                f"{unigram_entropy:.3f}), accuracy {result['accuracy']:.1%}"
                f"{', best so far' if is_best and result['loss'] < unigram_entropy else ''}")
    if len(losses) > 1:
        machine.say(*(f" {name} {loss:.4f}" for name, loss in losses.items()))
    if concepts:  # none where the weights are not finite
        machine.say(health.describe(concepts, n_concept, has_learned))
    if scores:
        machine.say(describe_importance(scores))
    if scorer:
        scores["importance_band"] = band(step)
    log(dict(step=step, val_loss=result["loss"], val_accuracy=result["accuracy"],
             unigram_entropy=unigram_entropy, val_bits_per_byte=result["bits_per_byte"],
             tokens=tokens_seen(), val_losses=losses) | concepts | scores)
    if not math.isfinite(result["loss"]):  # not saved: a resumed run could not go on from here
        sys.exit(f"error: the validation loss is not finite after {step} steps; "
                 f"{run.where_to_go_on(out_dir)}")
    return is_best


def redraw_curves():
    """Replaces curves.png; a run does not end because of a picture."""
    try:
        path = os.path.join(out_dir, "curves.png")
        draw_curves(path, read_log(out_dir), unigram_entropy, out_dir, objective == "clm")
    except (OSError, ImportError) as error:
        machine.say(f"WARNING: curves.png was not drawn: {error}")


def save(is_best=False):
    """Writes ckpt.pt, all a resume needs; if is_best also best.pt, the weights alone."""
    global last_save, is_saved
    last_save = time.monotonic()
    if not (machine.is_main or distributed.is_sharded):
        return
    small = dict(
        model_settings=settings.settings_of(model), model=distributed.weights(), settings=config,
        step=step, tokens=tokens_seen(), best_loss=best_loss,
        tokenizer_fingerprint=tok.fingerprint, data_sha256=data.sha256,
        data_paths=[os.path.abspath(name) for name in data.names],
        importance=scorer.state() if scorer else None)
    full = small | dict(
        optimizers=[opt.state_dict() for opt in optimizers], scaler=scaler.state_dict(),
        skipped=int(skipped), bad_evals=bad_evals, minutes=minutes(), evaluated_at=evaluated_at,
        loss=loss_now, stopped=stopped, tokens_before=tokens_before)
    # the checkpoint last: a run that goes on from it finds the log and best.pt as far as it says
    is_saved = not machine.is_main or write_log(out_dir)
    if is_best:
        small["model"] = distributed.weights(whole=True)
        if machine.is_main:
            is_saved = run.save_or_warn(out_dir, small, "best.pt") and is_saved
    if distributed.is_sharded:  # a folder, into which each process writes its part
        name = distributed.checkpoint_name(step)
        is_saved = run.save_or_warn(out_dir, full, name, distributed.save) and is_saved
    else:
        is_saved = is_saved and run.save_or_warn(out_dir, full, "ckpt.pt")


def log(record):
    """Appends a record to log.jsonl, and gives it to wandb and tensorboard if asked for."""
    if machine.is_main:
        append_log(out_dir, record, trackers)


def tokens_seen():
    """Tokens that the weights have been trained on."""
    return tokens_before + data.tokens(step)


def log_step(loss, norm, lr, phase, tokens_per_s, seconds_per_step):
    """One line on screen and one record about the latest step and the speed since the last line."""
    # Padding counts here: it costs as much as text.
    positions_per_s = phase.rows * phase.T / seconds_per_step
    mfu = positions_per_s * flops_per_token[phase.T] / (peak * machine.world_size)
    eta = (n_steps - step) * seconds_per_step / 60
    if max_minutes:
        eta = min(eta, max_minutes - minutes())
    memory = memory_gib(machine.device)
    machine.say(f"step {step}/{n_steps} loss {loss:.4f} norm {norm:.2f} lr {lr:.2e} "
                f"{tokens_per_s:,.0f} tok/s mfu {mfu:.0%} {memory:.1f} GiB "
                f"eta {max(eta, 0):.1f} min{data.shares_so_far(step)}")
    log(dict(step=step, loss=loss, grad_norm=norm.item(), lr=lr, tokens=tokens_seen(),
             tokens_per_s=tokens_per_s, mfu=mfu, memory_gib=memory, minutes=minutes(),
             skipped=int(skipped), block_size=phase.T, sources=data.progress(step)))


def stop_if_diverged():
    """Ends the run after MAX_SKIPPED skipped updates in a row, without saving what it came to."""
    in_a_row = int(skipped_in_a_row)
    if in_a_row:
        machine.say(f"step {step}: the gradient is not finite, update skipped "
                    f"({in_a_row} in a row)")
    if in_a_row >= MAX_SKIPPED:
        sys.exit(f"error: {in_a_row} updates in a row had a non-finite gradient; "
                 f"{run.where_to_go_on(out_dir)}")


if lr_find:
    with run.user_mistakes():
        find_learning_rate(masked_batch, forward_backward, update, machine, out_dir)
    sys.exit()

# ---- the loop -----------------------------------------------------------------------------------

started = last_save = last_drawn = time.monotonic()
signals.wait_for_step()
end_if_it_hangs(hang_minutes)
model.train()
clock = minutes_before  # minutes trained, on the main process's clock
tokens_per_s = 0.0  # of the latest log line
window_start, window_steps = time.monotonic(), 0  # since the last log line

# Evaluate at the start, or where a pre-empted run left a due evaluation out.
if evaluated_at != step and (step % eval_interval == 0 or stopped):
    save(is_best=validate())

batch, total_weight = masked_batch(step)
while not stopped:
    end_if_it_hangs(hang_minutes)  # the time begins anew
    # the step itself
    lr = learning_rate_at(step, progress_at(step, clock))
    # Random numbers, of dropout, follow from these three: there is no state to save, and a resumed
    # run draws what an uninterrupted one does.
    torch.manual_seed((seed + 2**20 * (step + 1) + machine.rank) % 2**63)
    phase = data.phase(step)  # rows and their length, see block_schedule and batch_schedule
    if step == phase.begin and step > 0:
        machine.say(f"step {step}: {phase.rows:,} rows of {phase.T} tokens a step from here on")
    try:
        loss = forward_backward(batch, total_weight)
    except RuntimeError as error:
        sys.exit(does_not_fit(error, model, batch[:4], machine, dtype, micro_batch, "micro_batch",
                              unit=block_size // phase.T, can_try=not distributed.is_sharded))
    batch, total_weight = masked_batch(step + 1)  # drawn while a GPU still works on this step
    norm = update(lr)
    step += 1
    window_steps += 1

    if step == 1 and not takes_weights:
        machine.say(describe_first_loss(*machine.all_sum(loss), model.cfg.vocab_size))

    # Stop? Signals and clocks differ between processes, and all must take the same branch below
    # and the same learning rate: a signal to any of them counts, and the main one's clock.
    save_is_due = machine.is_main and time.monotonic() - last_save > 60 * save_minutes
    clock = minutes() if machine.is_main else 0.0
    asked, save_is_due, clock = machine.all_sum(bool(signals.name), save_is_due, clock)
    if asked:
        stopped = signals.name or "signal"
    elif max_minutes and clock >= max_minutes:
        stopped = "max_minutes"
    elif step == stop_at_step:
        stopped = "stop_at_step"
    elif step == n_steps:
        stopped = "max_steps"

    # log
    is_log_step = step % log_interval == 0 or stopped
    if is_log_step or overfit_batch:
        loss_now, = machine.all_sum(loss)
        stop_if_diverged()
        seconds = time.monotonic() - window_start
        tokens_per_s = (data.tokens(step) - data.tokens(step - window_steps)) / seconds
        if is_log_step:
            log_step(loss_now, norm, lr, phase, tokens_per_s, seconds / window_steps)
        window_start, window_steps = time.monotonic(), 0
    if overfit_batch and loss_now < 0.05:
        stopped = "overfit"

    # Evaluate and save. A pre-emption leaves seconds: it only saves, the resumed run evaluates.
    is_preempted = asked or stopped == "stop_at_step"
    if not is_preempted and (step % eval_interval == 0 or stopped):
        pause = time.monotonic()
        is_best = validate()
        save(is_best)
        # These take a third of a second: not after every step where evaluations are frequent.
        if machine.is_main and (stopped or time.monotonic() - last_drawn > 10):
            redraw_curves()
            last_drawn = time.monotonic()
            if not stopped:  # others may have used the CPU when it was measured at the start
                peak = max(peak, matmul_peak(machine.device, dtype))
        window_start += time.monotonic() - pause
    elif is_preempted or save_is_due:
        save()

# ---- the end ------------------------------------------------------------------------------------

is_saved = distributed.close() and is_saved
machine.close()
end_if_it_hangs(0)
if lock:
    lock.close()  # a notebook lives on
if not is_saved:
    sys.exit(f"error: the last checkpoint, of step {step}, could not be written; make room in "
             f"{out_dir}, and the same command goes on from the one before")
if overfit_batch and loss_now >= 0.05:
    sys.exit(why_not_overfit(loss_now, step, model.cfg.vocab_size, unigram_entropy))
if step < warmup_steps and stopped == "max_minutes":
    machine.say("WARNING: the time was over in the warm-up, the learning rate never reached its "
                f"peak; a --warmup_steps of {step // 10} would")
if stopped not in ("max_steps", "max_minutes", "patience", "overfit"):
    saved = os.path.join(out_dir, distributed.checkpoint_name(step))
    machine.say(f"stopped by {stopped} at step {step}: {saved} is saved, and the same command "
                "goes on from there")
if machine.is_main:
    evaluations = [r["val_loss"] for r in read_log(out_dir) if "val_loss" in r]
    print_result(dict(
        out_dir=out_dir, step=step, tokens=tokens_seen(), stopped=stopped,
        loss=None if math.isnan(loss_now) else loss_now,
        val_loss=evaluations[-1] if evaluations else None,
        best_val_loss=None if math.isinf(best_loss) else best_loss,
        unigram_entropy=unigram_entropy, params=model.num_params(),
        tokens_per_s=round(tokens_per_s), minutes=round(minutes(), 2), skipped=int(skipped)))
