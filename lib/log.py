"""What a run says of itself: log.jsonl, wandb, tensorboard, curves.png, a line about its loss."""

import contextlib
import json
import math
import os
import secrets

from lib.files import parse_json, replace_file, to_json
from lib.machine import say
from masking import CURRICULA

# ---- log.jsonl ----------------------------------------------------------------------------------

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


# ---- wandb, tensorboard -------------------------------------------------------------------------

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


# ---- curves.png ---------------------------------------------------------------------------------

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


# ---- is the loss what it should be? -------------------------------------------------------------

def describe_first_loss(loss, vocab_size):
    """One line: is the first loss that of a model that finds all words equally likely?"""
    even = math.log(vocab_size)
    line = f"first loss {loss:.3f} nats, ln({vocab_size:,}) is {even:.3f}"
    # A table that starts from co-occurrences of few words is up to a quarter away.
    if abs(loss / even - 1) <= 0.3:
        return line
    return (f"WARNING: {line}: far apart; fresh weights should find all words about equally "
            "likely, so something is scaled wrongly")


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
