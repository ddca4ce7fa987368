"""A run and its folder: settings, model, checkpoints, evaluation, log.

Commands pass plain values in; nothing here reads a command's globals.
"""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import traceback
import zipfile
from dataclasses import asdict, fields
from functools import partial

import torch
import torch.nn.functional as F

from data.tokenizer import Tokenizer
from lib.baselines import Transformer, TransformerConfig
from lib.files import FolderLock, replace_file, write_json
from lib.machine import autocast, is_out_of_memory
from masking import check_masking, mask_batch
from model import ConceptConfig, ConceptEncoder

# value of the setting `arch` -> (its settings as a dataclass, its model)
ARCHS = {
    "concept": (ConceptConfig, ConceptEncoder),
    "transformer": (TransformerConfig, Transformer),
}
MOST_LOGITS = 2**27  # logits that an evaluation holds at once: 512 MiB in fp32
# Evaluation masks depend on this and the row's number in the data set only, so that losses of
# different models, batch sizes and training seeds compare.
EVAL_SEED = 1234


@contextlib.contextmanager
def user_mistakes():
    """Ends the program with the one message of a ValueError or OSError instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def git_state():
    """`git describe` of this repository, with "-dirty" if files have changed; "" without git."""
    if not shutil.which("git"):
        return ""
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                          text=True, cwd=here)
    return done.stdout.strip()


# ---- settings of a training run -----------------------------------------------------------------

def check_settings(config, defaults, world_size):
    """Raises ValueError naming all settings that are wrong, contradict each other or do nothing.

    config, defaults: {name: value} of train.py. world_size: number of processes.
    """
    problems = bad_values(config) + settings_without_effect(config, defaults)
    batch_size, micro_batch = config["batch_size"], config["micro_batch"]
    rows = batch_size // world_size
    # A run of so many minutes does not know its number of steps in advance.
    if config["block_schedule"] and config["max_minutes"]:
        problems.append("block_schedule: its shares are of a known number of steps; "
                        "give max_steps, not max_minutes")
    if batch_size % world_size:
        problems.append(f"batch_size={batch_size} does not divide among {world_size} processes")
    elif not problems and rows % min(micro_batch, rows):  # with a problem, these may be 0
        fits = [n for n in range(1, micro_batch + 1) if rows % n == 0]
        problems.append(f"micro_batch={micro_batch} does not divide the {rows} rows of a process; "
                        f"--micro_batch={fits[-1]} does")
    if problems:
        raise ValueError("\n       ".join(problems))


def bad_values(config):
    """Settings of train.py whose value nothing can be done with -> list of messages."""
    problems = []

    def one_of(name, *choices):
        if config[name] not in choices:
            problems.append(f"{name}={config[name]!r}: expected {', '.join(choices)}")

    masking = ("masking_type", "mlm_probability", "concept_window", "span_length_distribution",
               "mask_replace")
    try:
        check_masking(*(config[name] for name in masking), block_size=config["block_size"])
    except ValueError as error:
        problems.append(str(error))
    one_of("arch", *ARCHS)
    one_of("init_table", "random", "cooccurrence")
    one_of("optimizer", "adamw", "muon")
    one_of("lr_schedule", "cosine", "linear", "wsd", "constant")
    one_of("wandb", "online", "offline", "off")
    one_of("compile", "auto", "true", "false")
    one_of("rows", "block", "document")
    # each comparison is false for nan, which is refused too
    for name in ("batch_size", "micro_batch", "learning_rate", "max_steps", "eval_interval",
                 "eval_rows", "log_interval"):
        if not 0 < config[name] < math.inf:
            problems.append(f"{name}={config[name]}: expected more than 0")
    for name in ("min_lr", "health_rows", "warmup_steps", "max_tokens", "max_minutes",
                 "stop_at_step", "patience", "weight_decay", "grad_clip", "save_minutes"):
        if not 0 <= config[name] < math.inf:
            problems.append(f"{name}={config[name]}: expected 0 or more")
    for name in ("beta1", "beta2", "decay_fraction"):
        if not 0 <= config[name] < 1:
            problems.append(f"{name}={config[name]}: expected from 0, below 1")
    return problems


def settings_without_effect(config, defaults):
    """Settings of train.py that were changed, but nothing reads them here -> list of messages."""
    # A setting that silently does nothing would be believed in: an experiment with it says "no
    # difference". So it is refused.
    unread = []
    if config["masking_type"] != "concepts":
        unread += ["concept_window"]
    if config["masking_type"] != "span":
        unread += ["span_length_distribution"]
    # strict has no local path beside the concepts; a transformer may be given the settings of a
    # concept model, so that one command line compares the two
    if config["arch"] == "concept" and config["bottleneck"] != "open":
        unread += ["n_mixer", "mixer_kernel", "n_decoder", "self_attention", "lexicon"]
    if config["lr_schedule"] != "wsd":
        unread += ["decay_fraction"]
    if config["lr_schedule"] == "constant":
        unread += ["min_lr"]
    if config["rows"] != "block":
        unread += ["isolate_documents"]
    return [f"{name}={config[name]} has no effect here; leave it at {defaults[name]}"
            for name in unread if config[name] != defaults[name]]


def fields_of(arch):
    """Names of the settings of an architecture."""
    return {field.name for field in fields(ARCHS[arch][0])}


def model_settings(arch, config, tok):
    """Settings of train.py -> those of its model of this architecture, for build_model.

    Raises ValueError if vocab_size is smaller than the tokenizer's.
    """
    vocab_size = config["vocab_size"] or tok.vocab_size
    if vocab_size < tok.n_vocab:
        raise ValueError(f"vocab_size={vocab_size}, but the tokenizer of {config['data_dir']} has "
                         f"{tok.n_vocab} ids; use --vocab_size=0")
    settings = {name: config[name] for name in fields_of(arch) if name in config}
    return settings | dict(arch=arch, vocab_size=vocab_size, mask_id=tok.mask_id, eot_id=tok.eot_id)


def describe_settings(config, defaults):
    """Two lines: which settings differ from the defaults, which ones the architecture ignores."""
    changed = [f"{name}={value}" for name, value in config.items() if value != defaults[name]]
    of_any_arch = set().union(*map(fields_of, ARCHS))
    unused = sorted((of_any_arch & set(config)) - fields_of(config["arch"]))
    return (f"settings that differ from the defaults: {', '.join(changed) or 'none'}\n"
            f"arch {config['arch']}, which does not use {', '.join(unused)}")


def describe_start(resumed, config, defaults):
    """One line: at which step the run begins and which settings changed since its checkpoint."""
    if not resumed:
        return "starting at step 0"
    before = defaults | resumed["settings"]  # older runs had fewer settings
    changed = [f"{name}={before[name]} -> {value}"
               for name, value in config.items() if value != before[name]]
    return f"resuming at step {resumed['step']}, changed since: {', '.join(changed) or 'nothing'}"


# ---- model --------------------------------------------------------------------------------------

def build_model(model_settings):
    """Model settings of a checkpoint ("arch", fields of its config) -> model with fresh weights."""
    settings = {"arch": "concept"} | model_settings  # older checkpoints have no "arch"
    config_class, model_class = ARCHS[settings.pop("arch")]
    return model_class(config_class(**settings))


def settings_of(model):
    """The settings of an uncompiled, unwrapped model, from which build_model makes it again."""
    return dict(arch=model.arch) | asdict(model.cfg)


def model_state(model):
    """(settings, copy of the weights on the CPU) of an uncompiled, unwrapped model."""
    weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    return settings_of(model), weights


def load_run(out_dir, device):
    """For commands that start from a training run -> (model in eval mode, tokenizer, checkpoint).

    Takes best.pt, or ckpt.pt where that is damaged or missing. Raises ValueError or
    FileNotFoundError saying what is missing.
    """
    checkpoint = latest_checkpoint(out_dir, names=("best.pt", "ckpt.pt", "ckpt_prev.pt"))
    if checkpoint is None:
        raise FileNotFoundError(f"{out_dir} holds no checkpoint; train first: "
                                f"python train.py --out_dir={out_dir}")
    tok = Tokenizer.load(os.path.join(out_dir, "tokenizer"))
    trained_with = checkpoint["tokenizer_fingerprint"]
    if tok.fingerprint != trained_with:
        raise ValueError(f"{out_dir}/tokenizer is not the one its checkpoint was trained with "
                         f"({tok.fingerprint[:12]} against {trained_with[:12]})")
    # The model is built from the settings in the checkpoint; no setting has to be given again.
    try:
        model = build_model(checkpoint["model_settings"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError) as error:  # model.py was edited since
        raise ValueError(f"{out_dir} was trained with another model.py, see git in its "
                         f"config.json: {error}") from None
    return model.to(device).eval(), tok, checkpoint


def take_weights(model, out_dir, tok, data_dir):
    """Loads the weights of another run; ValueError if they or its tokenizer do not fit."""
    other, other_tok, _ = load_run(out_dir, "cpu")
    if other_tok.fingerprint != tok.fingerprint:
        raise ValueError(f"{out_dir} was trained with another tokenizer than that of {data_dir}")
    try:
        model.load_state_dict(other.state_dict())
    except RuntimeError as error:
        raise ValueError(f"the weights of {out_dir} do not fit this model: {error}") from None


def does_not_fit(error, model, batch, machine, dtype, rows, setting, loss_of=None, unit=1):
    """After a step ran out of memory: tries smaller ones -> a message with the size that fits.

    batch: tensors of the step, the first of them (B,T). rows: rows it had at once, of which half, a
    quarter, ... are tried. setting: what the user has to lower. unit: rows of this batch that the
    setting counts as one, more than 1 while block_schedule has short rows. loss_of(*tensors): loss
    of a part of the batch, by default the model's. Raises `error` if it is about something else.
    """
    if not is_out_of_memory(error):
        raise error
    traceback.clear_frames(error.__traceback__)  # frees what the failed step had computed
    loss_of = loss_of or model
    too_many = f"error: {rows * unit} rows of {batch[0].shape[1]} tokens do not fit into memory"
    fewer = rows // 2
    while fewer:
        model.zero_grad(set_to_none=True)
        try:
            with autocast(machine.device, dtype):
                loss = loss_of(*(tensor[: fewer * unit] for tensor in batch))
            loss.backward()
        except RuntimeError as again:
            if not is_out_of_memory(again):
                raise
            fewer //= 2
            continue
        message = f"{too_many}; --{setting}={fewer} does"
        if setting == "micro_batch":
            message += ", and the result is the same"
        return message
    return f"{too_many}, nor does a single row; shorten the rows or take a smaller model"


# ---- checkpoints --------------------------------------------------------------------------------

def save_checkpoint(out_dir, checkpoint, name="ckpt.pt"):
    """Writes out_dir/name; a ckpt.pt that it replaces stays as ckpt_prev.pt.

    Raises FloatingPointError, and writes nothing, when weights are not finite.
    """
    # NaN weights would replace the last good ones, and after two saves there are none left.
    for tensor in checkpoint["model"].values():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FloatingPointError("the weights are not finite; nothing was written")
    keep = os.path.join(out_dir, "ckpt_prev.pt") if name == "ckpt.pt" else ""
    replace_file(os.path.join(out_dir, name), lambda file: torch.save(checkpoint, file), keep)


def save_or_warn(out_dir, checkpoint, name):
    """save_checkpoint, but a full disk is only a warning as long as an older ckpt.pt is there.

    Training then goes on: space may be made before the next checkpoint is due.
    """
    try:
        save_checkpoint(out_dir, checkpoint, name)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        free = shutil.disk_usage(out_dir).free / 2**20
        reason = f"{error}; {free:,.0f} MiB free"
        if not os.path.exists(os.path.join(out_dir, "ckpt.pt")):
            sys.exit(f"error: cannot write a first checkpoint to {out_dir}: {reason}")
        print(f"WARNING: {name} was not written ({reason}); the previous one stays", flush=True)


# Parameters of the lexicon that had other names in older checkpoints.
RENAMED = {"lexicon.words.weight": "lexicon.to_words.weight",
           "lexicon.salience": "lexicon.token_weight",
           "lexicon.loudness": "lexicon.match_bias",
           "lexicon.sharpness": "lexicon.match_scale"}


def rename_old_keys(weights):
    """State dict of a model, also inside a fine-tuned one ("encoder."...) -> with today's names."""
    renamed = {}
    for name, tensor in weights.items():
        for old, new in RENAMED.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        renamed[name] = tensor
    return renamed


def read_checkpoint(path):
    """-> dict of tensors and plain Python. ValueError if the file is cut short or a bit flipped."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare the stored checksums
        if damaged:
            raise ValueError(f"{path} is damaged: the checksum of {damaged} does not fit")
        # weights_only: a checkpoint from somebody else cannot run code here
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file: zipfile, zlib, pickle and torch raise many kinds
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from None
    if "model" in checkpoint:
        checkpoint["model"] = rename_old_keys(checkpoint["model"])
    return checkpoint


def latest_checkpoint(out_dir, say=None, names=("ckpt.pt", "ckpt_prev.pt")):
    """The first of these files that can be read -> dict, or None if out_dir has none of them.

    say: prints a warning about each damaged one; by default on stderr. Raises ValueError if all
    are damaged.
    """
    say = say or partial(print, file=sys.stderr)
    paths = [os.path.join(out_dir, name) for name in names]
    paths = [path for path in paths if os.path.exists(path)]
    for path in paths:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            say(f"WARNING: {error}")
    if paths:
        raise ValueError(f"no checkpoint in {out_dir} can be read; restore one or start afresh in "
                         f"another --out_dir")
    return None


def checkpoint_to_resume(out_dir, init_from, say):
    """The checkpoint from which out_dir goes on -> dict, or None for a new run.

    init_from: "auto", "scratch" (ValueError if there is one), or the folder of another run, which
    matters to a new run only.
    """
    if init_from == "scratch":
        if os.path.exists(os.path.join(out_dir, "ckpt.pt")):
            raise ValueError(f"{out_dir} already holds a run; resume it with --init_from=auto or "
                             f"choose another --out_dir")
        return None
    checkpoint = latest_checkpoint(out_dir, say)
    if checkpoint and init_from != "auto":
        say(f"{out_dir} holds a run: resuming it; --init_from={init_from} was for its first start")
    return checkpoint


def check_same_run(checkpoint, model, tok, data_sha256, config):
    """ValueError, listing all differences, if `config` makes another run than the checkpoint's.

    Model, data and order of batches must be the same; learning rate, steps and others may change.
    """
    now, before = settings_of(model), dict(checkpoint["model_settings"])
    old = checkpoint["settings"]
    old = dict(data_weights="", rows="block", block_schedule="") | old  # older runs had no others
    for name in ("seed", "batch_size", "optimizer", "data_weights", "rows", "block_schedule"):
        now[name], before[name] = config[name], old[name]
    found = [f"{name}: {before.get(name)} in the checkpoint, {value} here"
             for name, value in now.items() if before.get(name) != value]
    if not found:
        shapes = {name: t.shape for name, t in model.state_dict().items()}
        if shapes != {name: t.shape for name, t in checkpoint["model"].items()}:
            found.append("model.py: it has other weights than the checkpoint")
    data_dir, out_dir = config["data_dir"], config["out_dir"]
    if checkpoint["tokenizer_fingerprint"] != tok.fingerprint:
        found.append(f"the tokenizer of {data_dir} is not the one of the checkpoint")
    if checkpoint["data_sha256"] != data_sha256:
        found.append(f"{data_dir} holds other tokens than {old['data_dir']} did")
    if found:
        raise ValueError("\n       ".join([
            f"{out_dir} cannot be resumed with other settings:", *found,
            "choose another --out_dir, or go back to these settings"]))


# ---- evaluation ---------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, data, tok, machine, dtype, masking_type="token", mlm_probability=0.15,
             rows=256, micro_batch=32, frequency=None):
    """Loss of the first `rows` rows of `data` on fixed masks. Every process takes part.

    Rows and masks are the same for every model, batch size and device; all masked tokens become
    [MASK]. -> {"loss" (nats a predicted token), "accuracy", "perplexity", "bits_per_byte" (of the
    text of the predicted tokens; None when only ids are known), "predicted" (tokens)}.
    frequency: share of each id in the training text, float (V,); adds "splits":
    {name of SPLITS: {"loss", "share" of the predicted tokens}}.
    """
    was_training = model.training
    model.eval()
    n_bytes = torch.from_numpy(tok.n_bytes).to(machine.device)
    # sums over predicted tokens: weighted nats, weights, nats, tokens, hits, bytes; then weighted
    # nats, weights and tokens of each split
    sums = torch.zeros(6 + 3 * len(SPLITS), dtype=torch.float64)
    # process r of n takes rows r, r + n, r + 2n, ...
    my_rows = torch.arange(machine.rank, min(rows, data.n_blocks), machine.world_size)
    for index in my_rows.split(micro_batch):
        ids = torch.as_tensor(data.block(index.numpy()))
        batch = mask_batch(ids, index, masking_type, mlm_probability, tok, seed=EVAL_SEED)
        inputs, positions, targets, weights, used = machine.take(batch)
        is_real = inputs != tok.pad_id if data.padded else None
        with autocast(machine.device, dtype):
            nats, hits = predict(model, inputs, positions, targets, is_real, tok.vocab_size)
        # Losses are weighted; counts, accuracy and bits per byte are about the predicted tokens.
        terms = [nats * weights, weights, nats * used, used, hits & used, n_bytes[targets] * used]
        if frequency is not None:
            for part in split_masks(inputs, positions, targets, frequency.to(machine.device)):
                terms += [nats * weights * part, weights * part, used & part]
        sums[:len(terms)] += torch.stack([term.sum() for term in terms]).double().cpu()
    model.train(was_training)
    weighted, weight, nats, predicted, hits, text_bytes, *of_splits = machine.all_sum(*sums)
    if not predicted:
        raise ValueError("no token of the evaluation rows can be masked: they hold special "
                         "tokens only")
    # the only division, after all sums: no mean of means, which would weigh rows unequally
    loss = weighted / weight
    bits_per_byte = nats / math.log(2) / max(text_bytes, 1) if tok.has_text else None
    result = dict(loss=loss, accuracy=hits / predicted, perplexity=math.exp(min(loss, 100)),
                  predicted=int(predicted), bits_per_byte=bits_per_byte)
    if frequency is not None:
        result["splits"] = {}
        parts = zip(SPLITS, of_splits[::3], of_splits[1::3], of_splits[2::3])
        for name, weighted, weight, tokens in parts:
            loss = weighted / weight if weight else None
            result["splits"][name] = dict(loss=loss, share=tokens / predicted)
    return result


def predict(model, inputs, positions, targets, is_real, vocab_size):
    """Cross-entropy (nats) of each predicted token, and whether its largest logit is right: (B,K).

    A few positions at a time, so that no more than MOST_LOGITS logits are in memory.
    """
    concepts, tokens = model.encode(inputs, is_real)
    documents = model.documents(inputs)
    at_once = max(1, MOST_LOGITS // (len(inputs) * vocab_size))
    # Logits are (B, positions, V): with large vocabularies more than everything else together.
    nats, hits = [], []
    for place, target in zip(positions.split(at_once, 1), targets.split(at_once, 1)):
        states = model.decode(concepts, tokens, place, documents, is_real)
        logits = model.logits(states).float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        nats.append(loss.view_as(target))
        hits.append(logits.argmax(-1) == target)
    return torch.cat(nats, dim=1), torch.cat(hits, dim=1)


def evaluate_all(model, sets, shares, tok, machine, dtype, rows, micro_batch):
    """`evaluate` of several data sets, {name: data} with the share of each in their mixture.

    -> ({"loss", "accuracy", "bits_per_byte"} of the mixture, {name: loss}).
    """
    results = {name: evaluate(model, data, tok, machine, dtype, rows=rows, micro_batch=micro_batch)
               for name, data in sets.items()}
    mean = {}
    for key in ("loss", "accuracy", "bits_per_byte"):
        values = [result[key] for result in results.values()]
        mean[key] = None
        if None not in values:
            mean[key] = sum(share * value for share, value in zip(shares, values))
    return mean, {name: result["loss"] for name, result in results.items()}


# Groups of predicted tokens that `evaluate` can report apart. A copy is the same id elsewhere in
# the row, not masked. Distances are in tokens, to the nearest copy; frequencies are of the id.
SPLITS = (
    "copy in the row", "no copy",
    "copy 1-8 away", "copy 9-32 away", "copy 33-128 away", "copy over 128 away",
    "frequent, over 1e-3", "medium, 1e-4 to 1e-3", "rare, under 1e-4",
    "not frequent, with copy", "not frequent, no copy",
)


def split_masks(inputs, positions, targets, frequency):
    """Which predicted tokens belong to each of SPLITS -> tuple of bool (B,K), in that order."""
    place = torch.arange(inputs.shape[1], device=inputs.device)
    is_copy = inputs[:, None] == targets[..., None]  # (B,K,T)
    none = 2**30  # stands for "no copy", larger than every distance
    distance = (place - positions[..., None]).abs().masked_fill(~is_copy, none).amin(-1)
    has_copy = distance < none
    share = frequency[targets]
    frequent, rare = share > 1e-3, share < 1e-4
    return (has_copy, ~has_copy,
            distance <= 8, (distance > 8) & (distance <= 32), (distance > 32) & (distance <= 128),
            (distance > 128) & has_copy,
            frequent, ~frequent & ~rare, rare,
            ~frequent & has_copy, ~frequent & ~has_copy)


def token_frequency(data, tok, rows=4096):
    """Share of each id in up to `rows` rows, spread evenly over `data` -> float32 (V,)."""
    n = min(rows, data.n_blocks)
    index = torch.arange(n) * data.n_blocks // n  # evenly spread over all rows
    counts = torch.zeros(tok.vocab_size)
    for part in index.split(256):
        ids = torch.as_tensor(data.block(part.numpy()))
        counts += torch.bincount(ids.flatten(), minlength=tok.vocab_size)
    return counts / counts.sum()


# ---- the folder of a run, log -------------------------------------------------------------------

def lock_folder(out_dir):
    """-> FolderLock of a run's folder; ValueError if another process writes to it."""
    try:
        return FolderLock(out_dir)
    except BlockingIOError:
        raise ValueError(f"another run is writing to {out_dir}; stop it or choose another "
                         f"--out_dir") from None


def write_config(out_dir, config, git, tok):
    """Writes config.json and tokenizer/. Ends the program if that fails."""
    with user_mistakes():
        versions = dict(git=git, torch=torch.__version__)
        write_json(os.path.join(out_dir, "config.json"), config | versions)
        tok.save(os.path.join(out_dir, "tokenizer"))


def warn_of_small_disk(out_dir, num_params):
    """Prints a warning if the checkpoints of a run do not fit onto the disk of out_dir."""
    # ckpt.pt, ckpt_prev.pt and one being written; each holds weights and two moments in fp32
    needed = 3.3 * 12 * num_params
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        print(f"WARNING: {out_dir} has {free / 2**30:.1f} GiB free; checkpoints of this run need "
              f"{needed / 2**30:.1f}", flush=True)


def start_tracker(mode, out_dir, config):
    """Starts wandb, mode "online" or "offline" -> its module, or None if mode is "off"."""
    if mode == "off":
        return None
    import wandb

    name = os.path.basename(out_dir)
    project = os.environ.get("WANDB_PROJECT", "concept-encoder")  # wandb's own variable
    wandb.init(project=project, name=name, dir=out_dir, mode=mode, config=config)
    return wandb


def append_log(out_dir, record, tracker=None):
    """Appends a record to log.jsonl as a line of JSON, and to wandb if that is the tracker.

    nan and infinity are written as null, because JSON has no such numbers.
    """
    clean = dict(record)
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            clean[key] = None
    try:
        with open(os.path.join(out_dir, "log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
    except OSError as error:  # a full disk does not end the run; the numbers are on the screen
        print(f"WARNING: log.jsonl was not written: {error}", flush=True)
    if tracker:
        tracker.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])


def read_log(out_dir):
    """Records of log.jsonl -> list of dict, without lines that a crash cut short or garbled."""
    path = os.path.join(out_dir, "log.jsonl")
    if not os.path.exists(path):
        return []
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def rewind_log(out_dir, step):
    """Drops the records after `step`, which a crashed run wrote after its last checkpoint."""
    # otherwise the steps that are trained again would be in the log twice
    lines = [json.dumps(record) + "\n" for record in read_log(out_dir) if record["step"] <= step]
    text = "".join(lines).encode()
    replace_file(os.path.join(out_dir, "log.jsonl"), lambda file: file.write(text))
