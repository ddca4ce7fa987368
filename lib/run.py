"""A run and its folder: settings, model, checkpoints, evaluation, log.

Commands pass plain values in; nothing here reads a command's globals.
"""

import contextlib
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import traceback
import zipfile
from dataclasses import MISSING, asdict, fields
from functools import partial

import torch
import torch.nn.functional as F

from data.reader import parse_batch_schedule
from data.tokenizer import Tokenizer
from lib import optimizers
from lib.baselines import ResonanceConfig, ResonanceLM, Transformer, TransformerConfig
from lib.files import (
    FolderLock,
    parse_json,
    print_result,
    replace_file,
    to_json,
    write_json,
    wrong_fields,
)
from lib.machine import autocast, is_out_of_memory, say
from lib.parallel import folders, read_folder, step_of
from masking import CURRICULA, SCORES, check_masking, mask_batch, next_tokens
from model import ConceptConfig, ConceptEncoder

# value of the setting `arch` -> (its settings as a dataclass, its model)
ARCHS = {
    "concept": (ConceptConfig, ConceptEncoder),
    "transformer": (TransformerConfig, Transformer),
    "resonance": (ResonanceConfig, ResonanceLM),
}
OBJECTIVES = ("mlm", "clm", "mntp")
OPTIMIZERS = ("adamw", "muon", "stable_adamw")
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
    for name in ("block_schedule", "batch_schedule"):
        # A run of so many minutes does not know its number of steps in advance.
        if config[name] and config["max_minutes"]:
            problems.append(f"{name}: its shares are of a known number of steps; give max_steps, "
                            "not max_minutes")
    if config["curriculum"] != "off" and config["max_minutes"]:
        problems.append(f"curriculum={config['curriculum']}: its stages are shares of a known "
                        "number of steps; give max_steps, not max_minutes")
    if config["batch_schedule"]:
        try:
            sizes = parse_batch_schedule(config["batch_schedule"], batch_size)
            problems += [f"batch_schedule: {n} rows do not divide among {world_size} processes"
                         for n, _ in sizes if n % world_size]
        except ValueError as error:
            problems.append(str(error))
    if config["parallel"] == "fsdp" and world_size == 1:
        problems.append("parallel=fsdp gives each process a part of the model, and there is one "
                        "process; start several by torchrun --nproc_per_node=N, or --parallel=ddp")
    if batch_size % world_size:
        problems.append(f"batch_size={batch_size} does not divide among {world_size} processes")
    elif not problems and rows % min(micro_batch, rows):  # with a problem, these may be 0
        fits = [n for n in range(1, micro_batch + 1) if rows % n == 0]
        problems.append(f"micro_batch={micro_batch} does not divide the {rows} rows of a process; "
                        f"--micro_batch={fits[-1]} does")
    if problems:
        raise ValueError("\n       ".join(problems))


def check_with_data(config, is_padded, dtype):
    """As check_settings, for what only data and machine tell: rows with padding, the dtype chosen.
    """
    if is_padded and config["arch"] == "resonance" and config["mixer"] == "fnet":
        raise ValueError("mixer=fnet reads padding as if it were text; data without padding and "
                         "rows=block, or mixer=resonance")
    if config["parallel"] == "fsdp" and dtype == "fp16":
        raise ValueError("parallel=fsdp with dtype=fp16: losses are not scaled there; "
                         "--dtype=bf16, --dtype=fp32 or --parallel=ddp")


def bad_values(config):
    """Settings of train.py whose value nothing can be done with -> list of messages."""
    problems = []

    def one_of(name, *choices):
        if config[name] not in choices:
            problems.append(f"{name}={config[name]!r}: expected {', '.join(choices)}")

    masking = ("masking_type", "mlm_probability", "concept_window", "span_length_distribution",
               "mask_replace", "diffusion_schedule")
    try:
        check_masking(*(config[name] for name in masking), block_size=config["block_size"])
    except ValueError as error:
        problems.append(str(error))
    one_of("parallel", "ddp", "fsdp")
    one_of("arch", *ARCHS)
    one_of("objective", *OBJECTIVES)
    if config["arch"] == "concept" and config["objective"] != "mlm":
        problems.append(f"objective={config['objective']}: concepts read the whole row before "
                        "anything is predicted, so every prediction would see its own answer or "
                        "its neighbours'; arch=transformer or arch=resonance")
    if config["carry_optimizer"] and config["init_from"] in ("auto", "scratch", "resume"):
        problems.append("carry_optimizer=True needs a run to carry it from: --init_from=DIR")
    one_of("importance", *SCORES)
    one_of("curriculum", *CURRICULA)
    first, second = config["stage_1_end"], config["stage_2_end"]
    if not 0 < first < second < 1:
        problems.append(f"stage_1_end={first}, stage_2_end={second}: expected shares of the run, "
                        "the first above 0 and below the second, the second below 1")
    one_of("init_table", "random", "cooccurrence")
    one_of("optimizer", *OPTIMIZERS)
    one_of("lr_schedule", "cosine", "linear", "wsd", "constant")
    one_of("wandb", "online", "offline", "off")
    for name in trackers_of(config["log_to"], config["wandb"]):
        if name not in TRACKERS:
            problems.append(f"log_to={config['log_to']!r}: expected {' or '.join(TRACKERS)}, or "
                            "both with a comma")
    one_of("compile", "auto", "true", "false")
    for name in ("anchored", "hide_masked"):
        one_of(name, "auto", "true", "false")
    one_of("rows", "block", "document")
    # each comparison is false for nan, which is refused too
    for name in ("batch_size", "micro_batch", "learning_rate", "max_steps", "eval_interval",
                 "eval_rows", "log_interval", "block_size", "concept_std"):
        if not 0 < config[name] < math.inf:
            problems.append(f"{name}={config[name]}: expected more than 0")
    for name in ("min_lr", "health_rows", "warmup_steps", "max_tokens", "max_minutes",
                 "overfit_tokens", "stop_at_step", "patience", "weight_decay", "grad_clip",
                 "save_minutes", "hang_minutes", "seed", "vocab_size", "max_length",
                 "checkpoint_every", "lr_restarts"):
        if not 0 <= config[name] < math.inf:
            problems.append(f"{name}={config[name]}: expected 0 or more")
    for name in ("beta1", "beta2", "dropout"):
        if not 0 <= config[name] < 1:
            problems.append(f"{name}={config[name]}: expected from 0, below 1")
    if not 0 < config["decay_fraction"] <= 1:
        problems.append(f"decay_fraction={config['decay_fraction']}: expected a share of the run, "
                        "above 0, up to 1")
    if config["lr_schedule"] != "constant" and config["min_lr"] > config["learning_rate"]:
        problems.append(f"min_lr={config['min_lr']} is above learning_rate="
                        f"{config['learning_rate']}, and the schedule goes down from one to the "
                        f"other; --min_lr={config['learning_rate'] / 100:g} does")
    # A zero too many ends here and not where memory or 64 bits do.
    if config["hang_minutes"] > 1e6:
        problems.append(f"hang_minutes={config['hang_minutes']}: expected at most 1,000,000")
    if config["max_steps"] > 2**31:
        problems.append(f"max_steps={config['max_steps']}: expected at most {2**31:,}")
    for name in ("batch_size", "micro_batch", "n_layer", "n_head", "n_concept", "concept_dim",
                 "token_dim", "ffn_dim", "n_mixer", "mixer_kernel", "n_decoder", "n_register",
                 "vocab_size", "n_frequency", "local_window", "global_every"):
        if config[name] > 2**24:
            problems.append(f"{name}={config[name]}: expected at most {2**24:,}")
    return problems


def settings_without_effect(config, defaults):
    """Settings of train.py that were changed, but nothing reads them here -> list of messages."""
    # A setting that silently does nothing would be believed in: an experiment with it says "no
    # difference". So it is refused.
    if config["objective"] == "clm":  # nothing is masked
        masks = ("masking_type", "mlm_probability", "concept_window", "span_length_distribution",
                 "mask_replace", "diffusion_schedule", "importance", "importance_weights",
                 "curriculum", "stage_1_end", "stage_2_end")
        given = [f"{name}={config[name]}" for name in masks if config[name] != defaults[name]]
        if given:
            return [f"{', '.join(given)}: nothing is masked with objective=clm, which predicts "
                    "every next token; leave masks out, or put config/decoder.py behind the preset"]
    return [f"{name}={config[name]} has no effect here; leave it at {defaults[name]}"
            for name in unread_settings(config) if config[name] != defaults[name]]


def unread_settings(config):
    """Names of settings that nothing reads, given the others."""
    unread = []
    if config["masking_type"] != "concepts":
        unread += ["concept_window"]
    if config["masking_type"] != "span":
        unread += ["span_length_distribution"]
    if config["masking_type"] != "diffusion":
        unread += ["diffusion_schedule"]
    if config["masking_type"] != "importance":
        unread += ["importance", "importance_weights", "curriculum"]
    if config["masking_type"] != "importance" or config["curriculum"] == "off":
        unread += ["stage_1_end", "stage_2_end"]
    # A transformer may be given the settings of a concept model, so that one command line compares
    # the two.
    if config["arch"] in ARCHS:
        unread += sorted(settings_of_others(config, but=("concept",)))
    if config["init_from"] not in ("auto", "scratch", "resume"):
        unread += ["init_table"]  # it comes with the weights
    if not config["n_mixer"]:
        unread += ["mixer_kernel", "resonant_mixers"]
    # strict has no local path beside the concepts
    if config["arch"] == "concept" and config["bottleneck"] != "open":
        unread += ["n_mixer", "mixer_kernel", "n_decoder", "self_attention", "lexicon",
                   "resonant_mixers"]
    if config["resonant_mixers"]:
        unread += ["mixer_kernel"]
    if config["arch"] == "concept" and not config["resonant_mixers"]:
        unread += ["n_frequency"]
    if not config["local_window"]:
        unread += ["global_every"]
    unread += unread_by_layers(config)
    has_anchors = {"auto": config["bottleneck"] == "strict", "false": False}
    if config["arch"] == "concept" and not has_anchors.get(config["anchored"], True):
        unread += ["anchor_slope", "local_heads"]
    if config["lr_schedule"] != "wsd":
        unread += ["decay_fraction"]
    if config["lr_schedule"] != "cosine":
        unread += ["lr_restarts"]
    if config["lr_schedule"] == "constant":
        unread += ["min_lr"]
    if config["rows"] != "block":
        unread += ["isolate_documents"]
    return [name for name in unread if name != "rope_theta"]  # the phases set it on any preset


def unread_by_layers(config):
    """Settings of attention and of resonance, where no layer of a baseline is of that kind."""
    if config["arch"] == "concept" or config["arch"] not in ARCHS:
        return []
    names, kinds = [], ["a"] * max(0, config["n_layer"])
    if config["arch"] == "resonance" and config["mixers"]:
        kinds = [config["mixers"][i % len(config["mixers"])] for i in range(len(kinds))]
    if "a" not in kinds:
        names += ["rope_theta", "qk_norm"]
    # Layer 0 and every global_every-th one see the whole row.
    if not any(kind == "a" and i % max(1, config["global_every"])
               for i, kind in enumerate(kinds)):
        names += ["local_window"]
    if config["arch"] == "resonance" and ("r" not in kinds or config["mixer"] == "fnet"):
        names += ["n_frequency"]
    return names


def settings_of_others(config, but=()):
    """Names of settings that only other architectures have. but: not counting these."""
    names = set().union(*(fields_of(arch) for arch in ARCHS)) & set(config)
    return names - fields_of(config["arch"]) - set().union(*map(fields_of, but))


def rows_to_overfit(n, T):
    """Rows of T tokens of a run on n tokens. Raises ValueError unless these are whole rows."""
    if T < 1:
        raise ValueError(f"block_size={T}: expected more than 0")
    if n < T or n % T:
        near = max(T, round(n / T) * T)
        raise ValueError(f"overfit_tokens={n}: expected whole rows of block_size={T} tokens; "
                         f"--overfit_tokens={near}, or another --block_size")
    return n // T


def be_deterministic(wanted):
    """Only operations whose result is the same bits at each run; others raise an error."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def describe_first_loss(loss, vocab_size):
    """One line: is the first loss that of a model that finds all words equally likely?"""
    even = math.log(vocab_size)
    line = f"first loss {loss:.3f} nats, ln({vocab_size:,}) is {even:.3f}"
    # A table that starts from co-occurrences of few words is up to a quarter away.
    if abs(loss / even - 1) <= 0.3:
        return line
    return (f"WARNING: {line}: far apart; fresh weights should find all words about equally "
            "likely, so something is scaled wrongly")


def where_to_go_on(out_dir):
    """What to do with a run whose numbers are not finite any more."""
    if not resumable(out_dir):
        return "nothing was saved before; lower --learning_rate"
    return f"the last good checkpoint is in {out_dir}; resume it with a lower --learning_rate"


def why_not_overfit(loss, step, vocab_size, unigram_entropy):
    """The message of a run that did not learn one batch by heart."""
    if not math.isfinite(loss):
        reason = "it is not a number: lower --learning_rate"
    elif loss > 0.97 * math.log(vocab_size):
        reason = ("nothing was learned, all words are still equally likely: raise --learning_rate, "
                  "and see whether every parameter gets a gradient")
    elif loss > unigram_entropy:
        reason = ("it has not even learned word frequencies: raise --learning_rate or --max_steps, "
                  "lower --warmup_steps")
    else:
        reason = ("it learns, but not by heart: raise --max_steps, or the width of the model, and "
                  "keep --dropout at 0")
    return (f"error: overfit_batch reached a loss of {loss:.3f} in {step} steps; one batch should "
            f"fall below 0.05. Here {reason}")


def find_learning_rate(masked_batch, forward_backward, update, machine, out_dir):
    """range_test of lib/optimizers.py with the parts of a step of train.py; prints its result."""
    def step(rate, number):
        loss = forward_backward(*masked_batch(number))
        update(rate)
        return machine.all_sum(loss)[0]

    found = optimizers.range_test(step)
    if machine.is_main:
        path = optimizers.write_test(found, out_dir)
        say(f"{path}: {found['why']}\ntry --learning_rate={found['suggested']:.1e}")
        print_result(dict(out_dir=out_dir, suggested=found["suggested"], lowest=found["lowest"],
                          why=found["why"], picture=path))
    machine.close()


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
    if arch != "concept":
        settings |= dict(causal=config["objective"] == "clm", mntp=config["objective"] == "mntp")
    for name in {"anchored", "hide_masked"} & set(settings):
        settings[name] = dict(auto=None, true=True, false=False)[config[name]]
    return settings | dict(arch=arch, vocab_size=vocab_size, mask_id=tok.mask_id, eot_id=tok.eot_id)


def describe_settings(config, defaults):
    """Lines of text: which settings differ from the defaults, which ones have no effect."""
    changed = [f"{name}={value}" for name, value in config.items() if value != defaults[name]]
    lines = [f"settings that differ from the defaults: {', '.join(changed) or 'none'}"]
    unused = sorted(name for name in settings_of_others(config) if config[name] != defaults[name])
    if unused:
        lines.append(f"arch {config['arch']}, which does not use {', '.join(unused)}")
    if config["masking_type"] == "diffusion" and config["mlm_probability"] < 1:
        lines.append(f"diffusion hides from one token to {config['mlm_probability']:.0%} of a row; "
                     "a likelihood needs --mlm_probability=1")
    return "\n".join(lines)


def warmup_within(warmup_steps, n_steps, say):
    """warmup_steps, or a tenth of the run where that is shorter than the warm-up; says so."""
    if warmup_steps < n_steps:
        return warmup_steps
    shorter = n_steps // 10
    say(f"warmup_steps={warmup_steps} is as long as the whole run of {n_steps} steps or longer: "
        f"{shorter} are used")
    return shorter


def describe_start(resumed, config, defaults):
    """One line: at which step the run begins and which settings changed since its checkpoint."""
    if not resumed:
        return "starting at step 0"
    before = defaults | resumed["settings"]  # older runs had fewer settings
    changed = [f"{name}={before[name]} -> {value}"
               for name, value in config.items() if value != before[name]]
    passed = ""
    if 0 < config["stop_at_step"] <= resumed["step"]:
        passed = f"; stop_at_step={config['stop_at_step']} has passed, it trains to its end"
    return (f"resuming at step {resumed['step']}, changed since: {', '.join(changed) or 'nothing'}"
            f"{passed}")


# ---- model --------------------------------------------------------------------------------------

def build_model(model_settings):
    """Model settings of a checkpoint ("arch", fields of its config) -> model with fresh weights."""
    settings = with_defaults(model_settings)
    config_class, model_class = ARCHS[settings.pop("arch")]
    return model_class(config_class(**settings))


def settings_of(model):
    """The settings of an uncompiled, unwrapped model, from which build_model makes it again."""
    return dict(arch=model.arch) | asdict(model.cfg)


def model_state(model):
    """(settings, copy of the weights on the CPU) of an uncompiled, unwrapped model."""
    weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    return settings_of(model), weights


def load_run(out_dir, device, checkpoint="auto"):
    """For commands that start from a training run -> (model in eval mode, tokenizer, checkpoint).

    checkpoint: "auto", "best", "last" or a path, see checkpoint_paths. Says on stderr which file
    and which step it reads. Raises ValueError or FileNotFoundError saying what is missing.
    """
    folder, paths, reason = checkpoint_paths(out_dir, checkpoint)
    path, loaded = first_readable(paths, partial(print, file=sys.stderr))
    print(f"{path}: step {loaded['step']:,}{reason}", file=sys.stderr)
    tok = Tokenizer.load(os.path.join(folder, "tokenizer"))
    trained_with = loaded["tokenizer_fingerprint"]
    if tok.fingerprint != trained_with:
        raise ValueError(f"{folder}/tokenizer is not the one its checkpoint was trained with "
                         f"({tok.fingerprint[:12]} against {trained_with[:12]})")
    # The model is built from the settings in the checkpoint; no setting has to be given again.
    try:
        model = build_model(loaded["model_settings"])
        model.load_state_dict(loaded["model"])
    except (ArithmeticError, MemoryError, RuntimeError, TypeError) as error:
        # model.py was edited since, or the settings are damaged
        raise ValueError(f"{out_dir} was trained with another model.py, see git in its "
                         f"config.json: {error}") from None
    return model.to(device).eval(), tok, loaded


def checkpoint_paths(out_dir, checkpoint="auto"):
    """Which file of a run a command reads -> (folder of the run, paths to try in order, reason).

    checkpoint   "best": best.pt; "last": ckpt.pt, or ckpt_prev.pt where that is damaged, or the
                 folder step-N/ of parallel=fsdp; a path, or a name in out_dir. "auto": best.pt,
                 but the last one while the run has trained on since its latest evaluation, because
                 then nobody knows yet which of the two is better.
    out_dir      a run's folder, or one of its checkpoints, which then is read.

    reason: "" or why "auto" took the last one, to be printed. Raises FileNotFoundError.
    """
    if is_checkpoint(out_dir) and checkpoint == "auto":
        out_dir, checkpoint = run_folder(out_dir), out_dir
    best, all_last = os.path.join(out_dir, "best.pt"), resumable(out_dir)
    paths, reason = [best, *all_last], ""
    if checkpoint == "best":
        paths = [best]
    elif checkpoint == "last":
        paths = all_last
    elif checkpoint != "auto":
        paths = [checkpoint, os.path.join(out_dir, checkpoint)]
        folder = os.path.dirname(checkpoint) or "."
        if is_checkpoint(checkpoint) and os.path.isdir(os.path.join(folder, "tokenizer")):
            out_dir = folder
    elif os.path.exists(best) and all_last:
        step, evaluated_at = latest_steps(all_last[0])
        if step > evaluated_at:
            paths = [all_last[0], best, *all_last[1:]]
            reason = (f", newer than the latest evaluation (step {evaluated_at:,}); "
                      "--checkpoint=best reads best.pt")
    paths = [path for path in paths if is_checkpoint(path)]
    if not paths and checkpoint in ("auto", "last"):
        raise FileNotFoundError(f"{out_dir} holds no checkpoint; train first: "
                                f"python train.py --out_dir={out_dir}")
    if not paths and checkpoint == "best":
        raise FileNotFoundError(f"{out_dir} holds no best.pt: no evaluation after its first steps; "
                                "--checkpoint=last reads ckpt.pt")
    if not paths:
        raise FileNotFoundError(f"checkpoint={checkpoint!r}: expected auto, best, last or a file")
    return out_dir, paths, reason


def is_checkpoint(path):
    """Whether it is there, and a file or a folder of parallel=fsdp."""
    return os.path.isfile(path) or step_of(path) is not None


def run_folder(out_dir):
    """The folder of a run, for its path or that of one of its checkpoints."""
    is_one = is_checkpoint(out_dir)
    return os.path.dirname(os.path.normpath(out_dir)) or "." if is_one else out_dir


def latest_steps(path, unknown=(0, 0)):
    """(step, step of the latest evaluation) of a ckpt.pt or a folder, without reading its tensors.
    """
    try:
        if os.path.isdir(path):
            with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
                checkpoint = json.load(file)
            return checkpoint["step"], checkpoint["evaluated_at"]
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return checkpoint["step"], checkpoint["evaluated_at"]
    except Exception:  # damaged, or older than evaluated_at: the caller takes best.pt
        return unknown


def data_of(checkpoint):
    """The folders of a run's data, as they were typed or, from elsewhere, absolute -> str."""
    typed = checkpoint["settings"]["data_dir"].split(",")
    absolute = checkpoint.get("data_paths", typed)  # older checkpoints have none
    return ",".join(name if os.path.exists(name.strip()) else path
                    for name, path in zip(typed, absolute))


def take_weights(model, out_dir, tok, config, carry_optimizer=False):
    """Loads the weights of another run -> its checkpoint. config: the settings of this run.

    carry_optimizer: its optimizer state is wanted, too, which only ckpt.pt holds. ValueError,
    naming all that differs, if weights, tokenizer or optimizer do not fit.
    """
    last = carry_optimizer and resumable(out_dir)
    other, other_tok, taken = load_run(out_dir, "cpu", "last" if last else "auto")
    if other_tok.fingerprint != tok.fingerprint:
        raise ValueError(f"{out_dir} was trained with another tokenizer than that of "
                         f"{config['data_dir']}; prepare the data with "
                         f"--tokenizer={out_dir}/tokenizer")
    found, wanted = ({name: tuple(t.shape) for name, t in one.state_dict().items()}
                     for one in (other, model))
    differ = [f"{name}: {found.get(name, 'none')} there, {wanted.get(name, 'none')} here"
              for name in found | wanted if found.get(name) != wanted.get(name)]
    if differ:
        raise ValueError("\n       ".join([
            f"the weights of {out_dir} do not fit this model:", *differ,
            "give the settings that run was trained with, see its config.json"]))
    before = taken["settings"]
    if carry_optimizer and "optimizers" not in taken:
        raise ValueError(f"carry_optimizer: {out_dir} holds no ckpt.pt, and only that has the "
                         "optimizer state; leave carry_optimizer out, and the state begins fresh")
    if carry_optimizer:
        differ = [f"{name}={before.get(name, default)} there, {config[name]} here"
                  for name, default in (("objective", "mlm"), ("optimizer", "adamw"))
                  if before.get(name, default) != config[name]]
        if differ:
            raise ValueError(f"carry_optimizer: the optimizer state of {out_dir} is of something "
                             f"else ({'; '.join(differ)}); leave carry_optimizer out, and the "
                             "state begins fresh")
    model.load_state_dict(other.state_dict())
    return taken


def describe_weights(taken, model, out_dir, objective, carry_optimizer):
    """One line on what `take_weights` has taken, and how this model is not the one they are of."""
    before = taken["settings"].get("objective", "mlm")
    there, here = taken["model_settings"], settings_of(model)
    differ = [f"{name} {there[name]} there, {here[name]} here" for name in sorted(here)
              if name in there and there[name] != here[name]]
    turn = f", trained as {before}, now {objective}" if before != objective else ""
    state = "with its optimizer state and token count" if carry_optimizer else (
        "the optimizer state is fresh, tokens count from 0")
    return "; ".join([f"weights of {out_dir} after {taken['tokens']:,} tokens{turn}", state,
                      *differ])


def is_causal(model):
    """Whether a model is a decoder: every token is predicted from those before it."""
    return getattr(model.cfg, "causal", False)


def does_not_fit(error, model, batch, machine, dtype, rows, setting, loss_of=None, unit=1,
                 can_try=True):
    """After a step ran out of memory: tries smaller ones -> a message with the size that fits.

    batch: tensors of the step, the first of them (B,T). rows: rows it had at once, of which half, a
    quarter, ... are tried. setting: what the user has to lower. unit: rows of this batch that the
    setting counts as one, more than 1 while block_schedule has short rows. loss_of(*tensors): loss
    of a part of the batch, by default the model's. can_try: whether this process alone can compute
    with the model. Raises `error` if it is about something else.
    """
    if not is_out_of_memory(error):
        raise error
    traceback.clear_frames(error.__traceback__)  # frees what the failed step had computed
    loss_of = loss_of or model
    too_many = f"error: {rows * unit} rows of {batch[0].shape[1]} tokens do not fit into memory"
    if not can_try:
        return f"{too_many}; lower {setting}, or take more processes; the result is the same"
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
    if not all_finite(checkpoint["model"]):
        raise FloatingPointError("the weights are not finite; nothing was written")
    keep = os.path.join(out_dir, "ckpt_prev.pt") if name == "ckpt.pt" else ""
    replace_file(os.path.join(out_dir, name), lambda file: torch.save(checkpoint, file), keep)


def all_finite(weights):
    """Whether a state dict holds tensors, and in them no NaN and no infinity."""
    return all(isinstance(t, torch.Tensor) and torch.isfinite(t).all() for t in weights.values())


def save_or_warn(out_dir, checkpoint, name, save=save_checkpoint):
    """save_checkpoint, but a full disk is only a warning as long as an older checkpoint is there.

    Training then goes on: space may be made before the next checkpoint is due. -> whether the file
    was written.
    """
    try:
        save(out_dir, checkpoint, name)
        return True
    except FloatingPointError as error:
        sys.exit(f"error: step {checkpoint['step']}: {error}; the last good checkpoint stays in "
                 f"{out_dir}; resume it with a lower --learning_rate")
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        free = shutil.disk_usage(out_dir).free / 2**20
        reason = f"{error}; {free:,.0f} MiB free"
        if not resumable(out_dir):
            sys.exit(f"error: cannot write a first checkpoint to {out_dir}: {reason}")
        say(f"WARNING: {name} was not written ({reason}); the previous one stays")
        return False


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


# What every command needs of a checkpoint of a training run, and a resume on top.
OF_A_RUN = dict(model=dict, model_settings=dict, step=int, tokenizer_fingerprint=str)
TO_RESUME = dict(settings=dict, data_sha256=list, optimizers=list, scaler=dict, evaluated_at=int,
                 best_loss=(int, float), bad_evals=int, minutes=(int, float), skipped=int)


def read_checkpoint(path, types=(), load=True):
    """-> dict of tensors and plain Python. ValueError if a file is cut short, a bit flipped, its
    weights are not finite, or it lacks one of `types`, {name: type}.

    path: a file or, of a run with parallel=fsdp, a folder; load is for these, see read_folder.
    """
    checkpoint = read_folder(path, load) if os.path.isdir(path) else read_file(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds {type(checkpoint).__name__}, expected a checkpoint")
    if wrong := wrong_fields(checkpoint, dict(types)):
        raise ValueError(f"{path} is not a checkpoint of train.py: its {', '.join(wrong)} are "
                         "missing or of another type")
    if "model" in checkpoint:
        if load and not all_finite(checkpoint["model"]):
            raise ValueError(f"{path} holds weights with NaN or infinity")
        checkpoint["model"] = rename_old_keys(checkpoint["model"])
    if "model_settings" in checkpoint:
        checkpoint["model_settings"] = with_defaults(checkpoint["model_settings"])
    return checkpoint


def read_file(path):
    """-> what a .pt holds. ValueError if the file is cut short or a bit flipped."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare the stored checksums
        if damaged:
            raise ValueError(f"{path} is damaged: the checksum of {damaged} does not fit")
        # weights_only: a checkpoint from somebody else cannot run code here
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file: zipfile, zlib, pickle and torch raise many kinds
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from None


def with_defaults(settings):
    """Model settings of a checkpoint, with the defaults of settings that it does not have.

    So a setting may be added to a config class without making older checkpoints unreadable. Its
    default must then be what models did before.
    """
    settings = {"arch": "concept"} | settings  # older checkpoints have no "arch"
    if str(settings["arch"]) not in ARCHS:  # str: a damaged one may have a type without a hash
        raise ValueError(f"arch={settings['arch']!r}: expected {', '.join(ARCHS)}")
    config_class, _ = ARCHS[settings["arch"]]
    defaults = {field.name: field.default for field in fields(config_class)
                if field.default is not MISSING}
    if "anchored" in defaults:
        defaults["anchored"] = False  # no model had anchors before there was this setting
    return defaults | settings


def first_readable(paths, say, types=(), load=True):
    """-> (path, checkpoint) of the first of these that can be read. load: see read_checkpoint.

    say: prints a warning about each damaged one. types: what they must hold on top of OF_A_RUN.
    Raises ValueError if all are damaged.
    """
    for path in paths:
        try:
            return path, read_checkpoint(path, OF_A_RUN | dict(types), load)
        except ValueError as error:
            say(f"WARNING: {error}")
    raise ValueError(f"no checkpoint in {os.path.dirname(paths[0])} can be read; restore one or "
                     "start afresh in another --out_dir")


# ---- going on with a run ------------------------------------------------------------------------

def resumable(out_dir):
    """Files and folders with all that a resume needs -> their paths, the newest first."""
    files = [os.path.join(out_dir, name) for name in ("ckpt.pt", "ckpt_prev.pt")]
    paths = [path for path in files if os.path.exists(path)]
    if not folders(out_dir):
        return paths
    # A run may change from one form to the other. What cannot be read comes first, to be named.
    steps = {path: latest_steps(path, (math.inf, 0))[0] for path in paths + folders(out_dir)}
    return sorted(steps, key=steps.get, reverse=True)


def checkpoint_to_resume(out_dir, init_from, say, load=True):
    """The checkpoint from which out_dir goes on -> dict, or None for a new run.

    init_from: "auto", "scratch" (ValueError if there is one), "resume" (ValueError if there is
    none) or another run, whose weights matter to a new run only. load: see read_checkpoint.
    """
    paths = resumable(out_dir)
    if init_from == "scratch" and paths:
        raise ValueError(f"{out_dir} already holds a run; resume it with --init_from=auto or "
                         f"choose another --out_dir")
    if init_from == "resume" and not paths:
        raise ValueError(f"{out_dir} holds no checkpoint to resume; --init_from=auto starts a run")
    if not paths:
        check_new_folder(out_dir)
        return None
    _, checkpoint = first_readable(paths, say, TO_RESUME, load)
    started_from = checkpoint["settings"].get("init_from", "auto")
    if init_from not in ("auto", "resume", started_from):
        raise ValueError(f"{out_dir} holds a run that was started with init_from={started_from}, "
                         f"not {init_from}; --init_from=resume goes on with it, or choose another "
                         "--out_dir")
    return checkpoint


def check_new_folder(out_dir):
    """ValueError if out_dir, without a checkpoint, holds files that a new run would spoil."""
    def there(*names):
        return [name for name in names if os.path.exists(os.path.join(out_dir, name))]

    made_by = ""
    if there("config.json"):
        with open(os.path.join(out_dir, "config.json"), encoding="utf-8", errors="replace") as file:
            made_by = file.read()
    if '"data_dir"' in made_by and '"mlm_probability"' in made_by:
        # A run that ended before its first checkpoint may be started again. With init_from=DIR it
        # may have written best.pt at step 0.
        found = [name for name in there("best.pt")
                 if read_checkpoint(os.path.join(out_dir, name))["step"] > 0]
        if any(record["step"] > 0 for record in read_log(out_dir)):
            found.append("log.jsonl")
    else:
        found = there("config.json", "best.pt", "log.jsonl", "curves.png", "tokenizer", "wandb_id")
    if found:
        raise ValueError(f"{out_dir} has no checkpoint to go on from, but holds {', '.join(found)} "
                         "of something else; choose another --out_dir, or remove them")


# Settings that decide the result and cannot change in the middle of a run. eval_rows: losses on
# other rows do not compare with the best one so far.
FIXED = ("seed", "batch_size", "optimizer", "data_weights", "rows", "block_schedule",
         "batch_schedule", "init_table", "overfit_batch", "eval_rows")
# Settings that do not change what a run has come to: a finished run may be given others.
WITHOUT_RESULT = ("out_dir", "data_dir", "init_from", "micro_batch", "max_steps", "max_tokens",
                  "max_minutes", "stop_at_step", "patience", "eval_interval", "health_rows",
                  "log_interval", "save_minutes", "hang_minutes", "wandb", "log_to", "device",
                  "compile", "parallel", "checkpoint_every")


def check_same_run(checkpoint, model, tok, data_sha256, config, defaults):
    """ValueError, listing all differences, if `config` makes another run than the checkpoint's.

    Model, data and order of batches must be the same; learning rate, steps and others may change.
    """
    now, before = settings_of(model), dict(checkpoint["model_settings"])
    old = defaults | checkpoint["settings"]  # older runs had fewer settings
    # row length, number of rows and band of scores of a step follow from its share of all steps
    has_schedule = (config["block_schedule"] or config["batch_schedule"]
                    or config["curriculum"] != "off")
    steps = ("max_steps", "max_tokens") if has_schedule else ()
    for name in (*FIXED, *steps):
        now[name], before[name] = config[name], old[name]
    # What nothing reads may differ: earlier versions took it, and now it is refused.
    unread = unread_settings(config)
    found = [f"{name}: {before.get(name)} in the checkpoint, {value} here"
             for name, value in now.items() if before.get(name) != value and name not in unread]
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


def check_finished(checkpoint, n_steps, config, defaults):
    """ValueError if a run that has nothing left to train is given settings that would be ignored.

    n_steps: length of the run that `config` asks for.
    """
    step, out_dir = checkpoint["step"], config["out_dir"]
    old = defaults | checkpoint["settings"]
    found = [f"{name}: {old[name]} in the run, {value} here" for name, value in config.items()
             if name not in WITHOUT_RESULT and old[name] != value]
    if step > n_steps:
        found.append(f"{step:,} steps in the run, {n_steps:,} here")
    if found:
        raise ValueError("\n       ".join([
            f"{out_dir} is finished, after {step:,} steps, with other settings:", *found,
            "choose another --out_dir, or train on with a larger --max_steps (--max_minutes, "
            "--patience), whichever ended it"]))


# ---- evaluation ---------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, data, tok, machine, dtype, masking_type="token", mlm_probability=0.15,
             rows=256, micro_batch=32, frequency=None, scores=None):
    """Loss of the first `rows` rows of `data` on fixed masks. Every process takes part.

    Rows and masks are the same for every model, batch size and device; all masked tokens become
    [MASK]. A decoder predicts every token of the rows but the first, whatever masking_type is.
    -> {"loss" (nats a predicted token), "accuracy", "perplexity", "bits_per_byte" (of the text of
    the predicted tokens; None when only ids are known), "predicted" (tokens)}.
    frequency: share of each id in the training text, float (V,); adds "splits":
    {name of SPLITS: {"loss", "share" of the predicted tokens}}.
    scores: of each id, float (V,), for masking_type="importance"; all predictions count alike.
    """
    was_training = model.training
    model.eval()
    n_bytes = torch.from_numpy(tok.n_bytes).to(machine.device)
    # sums over predicted tokens: weighted nats, weights, nats, tokens, hits, bytes; then weighted
    # nats, weights and tokens of each split
    sums = torch.zeros(6 + 3 * len(SPLITS), dtype=torch.float64)
    # process r of n takes rows r, r + n, r + 2n, ...
    my_rows = torch.arange(min(rows, data.n_blocks))[machine.rank::machine.world_size]
    for index in my_rows.split(micro_batch):
        if not len(index):  # fewer rows than processes: split() gives one part without rows
            break
        ids = torch.as_tensor(data.block(index.numpy()))
        if is_causal(model):
            batch = next_tokens(ids, tok)
        else:
            batch = mask_batch(ids, index, masking_type, mlm_probability, tok, seed=EVAL_SEED,
                               scores=None if scores is None else scores[ids],
                               importance_weights=False)
        inputs, positions, targets, weights, used = machine.take(batch)
        is_real = inputs != tok.pad_id if data.padded else None
        with autocast(machine.device, dtype):
            nats, hits = predict(model, inputs, positions, targets, is_real, tok.vocab_size)
        # Losses are weighted; counts, accuracy and bits per byte are about the predicted tokens.
        terms = [nats * weights, weights, nats * used, used, hits & used, n_bytes[targets] * used]
        if frequency is not None:
            for part in split_masks(inputs, positions, targets, frequency.to(machine.device)):
                terms += [nats * weights * part, weights * part, used & part]
        sums[:len(terms)] += torch.stack([term.sum() for term in terms]).cpu().double()
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
    documents = model.documents(inputs, is_real)
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
        say(f"WARNING: {out_dir} has {free / 2**30:.1f} GiB free; checkpoints of this run need "
            f"{needed / 2**30:.1f}")


def trackers_of(log_to, wandb):
    """Names of the trackers that these settings ask for -> list; wandb=online asks for wandb."""
    names = [name.strip() for name in log_to.split(",") if name.strip()]
    if wandb != "off" and "wandb" not in names:
        names.append("wandb")
    return names


def start_trackers(log_to, wandb, config, step):
    """Starts wandb and tensorboard where they are asked for -> {name: function of a record}.

    One that does not start is left out with a warning: log.jsonl has the same numbers, and a run
    must not depend on a server. step: where the run begins.
    """
    started = {}
    for name in trackers_of(log_to, wandb):
        try:
            started[name] = TRACKERS[name](config, step)
        except Exception as error:  # not installed, no network, no permission: each its own kind
            say(f"WARNING: {name} does not work here, training goes on without it: "
                f"{type(error).__name__}: {error}")
    return started


def start_wandb(config, step):
    """A run of wandb, the same one for all starts of out_dir -> function that logs a record."""
    # wandb looks for its folders below the home directory, which some containers do not have.
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        if "HOME" not in os.environ:
            os.environ.setdefault(name, os.path.join(os.path.abspath(config["out_dir"]), "wandb"))
    import wandb

    mode = config["wandb"]
    if mode == "off":  # log_to=wandb alone: wandb's own variable says how
        mode = os.environ.get("WANDB_MODE", "online")
    path = os.path.join(config["out_dir"], "wandb_id")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            run_id = file.read().strip()
    else:
        run_id = secrets.token_hex(4)
        replace_file(path, lambda file: file.write(run_id.encode()))
    arguments = dict(id=run_id, resume="allow", name=os.path.basename(config["out_dir"]),
                     project=os.environ.get("WANDB_PROJECT", "concept-encoder"),
                     dir=config["out_dir"], config=config)
    problem = ""
    if mode == "online":
        try:
            if wandb.login(prompt=False):
                wandb.init(mode=mode, settings=wandb.Settings(init_timeout=30), **arguments)
            else:
                problem = "has no key here (wandb login, or WANDB_API_KEY)"
        except Exception as error:
            problem = f"cannot be reached ({error})"
            wandb.teardown()  # of the failed attempt, which may hold the id
    if problem:
        say(f"WARNING: wandb {problem}; it records into {config['out_dir']}/wandb, and wandb sync "
            "uploads that")
    if problem or mode != "online":
        wandb.init(mode="offline", **arguments)

    def log(record):
        wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
    return log


def start_tensorboard(config, step):
    """Event files in out_dir/tensorboard -> function that logs a record."""
    from torch.utils.tensorboard import SummaryWriter

    # purge_step: what a crashed run wrote after its last checkpoint is not shown
    writer = SummaryWriter(os.path.join(config["out_dir"], "tensorboard"), purge_step=step + 1)

    def log(record):
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                writer.add_scalar(name, value, record["step"])
        writer.flush()
    return log


TRACKERS = {"wandb": start_wandb, "tensorboard": start_tensorboard}


unwritten = {}  # {out_dir: lines that log.jsonl lacks, because the disk was full}


def write_log(out_dir):
    """Writes the lines that log.jsonl lacks -> whether it has all of them now."""
    lines = "".join(unwritten.get(out_dir, [])).encode()
    try:
        with open(os.path.join(out_dir, "log.jsonl"), "ab", buffering=0) as file:
            size = file.tell()
            if file.write(lines) < len(lines):  # part of a line would spoil the next one
                file.truncate(size)
                raise OSError("no space left on the disk")
    except OSError as error:  # a full disk does not end the run
        say(f"WARNING: log.jsonl was not written: {error}")
        return False
    unwritten.pop(out_dir, None)
    return True


def append_log(out_dir, record, trackers):
    """Appends a record to log.jsonl as a line of JSON, and gives it to the trackers.

    nan and infinity are written as null, because JSON has no such numbers. A tracker that fails is
    dropped from `trackers` with a warning.
    """
    unwritten.setdefault(out_dir, []).append(to_json(record) + "\n")
    write_log(out_dir)
    for name, log in list(trackers.items()):
        try:
            log(record)
        except Exception as error:
            del trackers[name]
            say(f"WARNING: {name} failed, training goes on without it: {error}")


STAGES = dict(zip(CURRICULA["easy_to_hard"], ("easy", "medium", "hard")))  # names of the bands


def curriculum_stages(records):
    """The stages of a curriculum in log.jsonl -> [(tokens at its first evaluation, name)].

    Empty if there is one stage only, or no curriculum.
    """
    stages = []
    for record in records:
        name = STAGES.get(record.get("importance_band"))
        if name and (not stages or stages[-1][1] != name):
            stages.append((record["tokens"], name))
    return stages if len(stages) > 1 else []


def draw_curves(path, records, unigram_entropy, title, causal=False):
    """Training and validation loss against tokens seen, the unigram entropy as a line -> PNG.

    records: of log.jsonl. causal: they are of a decoder. Vertical lines are the stages of a
    curriculum, if there is one.
    """
    # without pyplot, which would choose a window system and keep every figure
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=110)
    axes = figure.add_axes((0.09, 0.12, 0.88, 0.8))  # a third of the time of a computed layout
    of_training, of_validation = "this run's masks", "fixed masks, 15 %"
    if causal:
        of_training = of_validation = "next tokens"
    styles = {"loss": dict(color="0.75", lw=0.8, label=f"training loss ({of_training})"),
              "val_loss": dict(color="C0", marker="o", ms=3,
                               label=f"validation loss ({of_validation})")}
    for key, style in styles.items():
        points = [(r["tokens"] / 1e6, r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points), **style)
    axes.axhline(unigram_entropy, color="C3", ls="--", lw=1,
                 label=f"unigram entropy {unigram_entropy:.2f}: word frequencies alone")
    stages = curriculum_stages(records)
    for number, (tokens, name) in enumerate(stages):
        if number:
            axes.axvline(tokens / 1e6, color="0.6", lw=0.6)
        axes.annotate(name, (tokens / 1e6, 0), (3, 3), xycoords=axes.get_xaxis_transform(),
                      textcoords="offset points", color="0.4", fontsize=8)
    axes.set(xlabel="tokens seen (millions)", ylabel="nats a predicted token", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    # with stages on white ground, which hides the vertical lines behind the words
    axes.legend(frameon=bool(stages), framealpha=1, edgecolor="none", fontsize=8)
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def read_log(out_dir):
    """Records of log.jsonl -> list of dict, without lines that a crash cut short or garbled."""
    path = os.path.join(out_dir, "log.jsonl")
    if not os.path.exists(path):
        return []
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = parse_json(line)
                if isinstance(record, dict) and "step" in record:
                    records.append(record)
    return records


def rewind_log(out_dir, step):
    """Drops the records after `step`, which a crashed run wrote after its last checkpoint.

    step=-1, for a new run, drops all.
    """
    unwritten.pop(out_dir, None)
    if not os.path.exists(os.path.join(out_dir, "log.jsonl")):
        return
    # otherwise the steps that are trained again would be in the log twice
    lines = [json.dumps(record) + "\n" for record in read_log(out_dir) if record["step"] <= step]
    text = "".join(lines).encode()
    replace_file(os.path.join(out_dir, "log.jsonl"), lambda file: file.write(text))
