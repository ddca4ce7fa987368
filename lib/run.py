"""A run and its folder: checkpoints, going on with a run, starting from one."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import torch

from data.tokenizer import Tokenizer
from lib.files import FolderLock, replace_file, write_json, wrong_fields
from lib.log import read_log
from lib.machine import say
from lib.parallel import folders, read_folder, step_of
from lib.settings import build_model, settings_of, unread_settings, with_defaults


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


# ---- the folder ---------------------------------------------------------------------------------

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


def where_to_go_on(out_dir):
    """What to do with a run whose numbers are not finite any more."""
    if not resumable(out_dir):
        return "nothing was saved before; lower --learning_rate"
    return f"the last good checkpoint is in {out_dir}; resume it with a lower --learning_rate"


# ---- starting from a run ------------------------------------------------------------------------

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


def model_state(model):
    """(settings, copy of the weights on the CPU) of an uncompiled, unwrapped model."""
    weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    return settings_of(model), weights
