"""One run of a sweep: train.py as a process, what it has come to, and its status.

Used by tools/sweep.py. A run has a folder of its own with result.json (once it is finished),
status.json and output.txt, beside what train.py writes. `slot` is (number of the run in the sweep,
runs at a time), by which lib/jobs.py chooses its GPU and its share of the CPU threads.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import time

from configurator import ROOT
from lib import jobs
from lib.files import read_object, say, write_json
from lib.log import read_log
from masking import MASKING_TYPES
from tools.arms import TRAIN
from tools.ranking import curve_of, loss_at
from tools.sweep_plan import read_result

EVAL = os.path.join(ROOT, "tools", "eval.py")
# What train.py gives as "stopped" for a run that has used its whole budget.
FINISHED = ("max_steps", "max_minutes", "patience", "overfit")
# Measures of the concepts in train.py's log that a result holds: {title of a column: name}.
HEALTH = {"rank": "concept_rank", "input dependence": "input_dependence",
          "duplicates": "duplicates", "shuffled": "shuffled"}
TOO_LARGE = re.compile(r"do not fit into memory; --micro_batch=(\d+) does")  # of train.py


class GivenUp(Exception):
    """A run was ended because it was worse than the reference for too long."""


def run(name, seed, arm, folder, slot, until=0, watch=None, evaluate=False):
    """One arm with one seed -> (its results, or None if there are none; minutes of training now).

    arm: its plan (tools/sweep_plan.py). until: the step of a rung, behind which it stops; 0: to the
    end. watch: a function that gives the reason why the run is hopeless, or "". evaluate: add
    losses under every masking, at the end.
    """
    minutes = 0.0
    if jobs.stopping:
        return None, minutes
    path = os.path.join(folder, "result.json")
    try:
        # Behind a rung a run is not finished, whatever an earlier version has left there.
        found = None if status_of(folder) == "ranked" else read_result(folder)
        if status_of(folder) == "killed":
            say(f"{name} seed {seed} was given up earlier")
            return None, minutes
        if not found and until and loss_at(read_log(folder), until):
            found = outcome(folder, seed, arm, until)
        if not found:
            start = time.monotonic()
            os.makedirs(folder, exist_ok=True)
            set_status(folder, "running", name, seed)
            found = train(folder, seed, arm, slot, until, watch)
            if not until:
                write_json(path, found)
            set_status(folder, "ranked" if until else "done", name, seed, loss=found["loss"],
                       tokens=found["tokens"])
            minutes = (time.monotonic() - start) / 60
        if evaluate and not until and not found["maskings"]:
            found["maskings"] = losses_by_masking(folder, slot)
            write_json(path, found)
    except GivenUp as reason:
        say(f"{name} seed {seed} is given up: {reason}")
        with contextlib.suppress(OSError):  # the disk is full, perhaps
            set_status(folder, "killed", name, seed)
    except (ValueError, OSError) as error:
        if not jobs.stopping:
            say(f"{name} seed {seed} failed: {error}")
            with contextlib.suppress(OSError):
                set_status(folder, "failed", name, seed, error=str(error))
    else:
        say(f"{name} seed {seed}: {found['loss']:.4f} nats after {found['tokens']:,} tokens")
        return dict(arm=name, seed=seed) | found, minutes
    return None, minutes


def set_status(folder, status, name, seed, **more):
    """Replaces status.json of a run."""
    write_json(os.path.join(folder, "status.json"),
               dict(status=status, arm=name, seed=seed, time=time.time()) | more)


def status_of(folder):
    """-> running, ranked, done, killed or failed; None where no sweep has started a run."""
    return read_object(os.path.join(folder, "status.json")).get("status")


def progress(name, seed, arm, folder):
    """A run as tools/live.py shows it -> (name, status, tokens, share done, last loss)."""
    status = status_of(folder)
    records = read_log(folder) if status else []
    last = records[-1] if records else {}
    losses = [loss for _, loss in curve_of(records)]
    share = 1.0 if status in ("done", "killed", "failed", "ranked") else min(
        1.0, last.get("step", 0) / arm["settings"]["max_steps"])
    return (f"{name} s{seed}", status or "waiting", last.get("tokens", 0), share,
            losses[-1] if losses else None)


def train(folder, seed, arm, slot, until=0, watch=None):
    """train.py to the end of its budget, or to a rung -> the content of result.json.

    Raises GivenUp, and ValueError for a run that failed or was stopped.
    """
    command = [TRAIN, *arm["arguments"], f"--seed={seed}", f"--out_dir={os.path.abspath(folder)}"]
    if until:
        command.append(f"--stop_at_step={until + 1}")  # behind the evaluation of the rung
    reason = ""

    def look():
        nonlocal reason
        reason = watch()
        return bool(reason)

    def ending(*more):
        return finish([*command, *more], folder, slot, watch and look).get("stopped")

    try:
        stopped = ending()
    except ValueError as error:
        fits = TOO_LARGE.search(str(error))
        if not fits:
            raise
        say(f"{folder}: too large for the memory, again with --micro_batch={fits[1]}, which gives "
            "the same result")
        stopped = ending(f"--micro_batch={fits[1]}")
    if reason:
        raise GivenUp(reason)
    if stopped not in (*FINISHED, *(["stop_at_step"] if until else [])):
        # half a run must not stand beside whole ones
        raise ValueError(f"stopped early ({stopped}); the same sweep again goes on")
    return outcome(folder, seed, arm, until)


def outcome(folder, seed, arm, until=0):
    """What a run has logged, to its end or to the step of a rung -> the content of result.json."""
    records = [r for r in read_log(folder) if "val_loss" in r]
    if until:
        records = [r for r in records if r["step"] <= until]
    if not records or records[-1]["val_loss"] is None:
        raise ValueError(f"the last validation loss in {folder}/log.jsonl is not a number")
    final = records[-1]
    return dict(settings=arm["settings"] | dict(seed=seed), data_sha256=arm["data_sha256"],
                tokens=final["tokens"], loss=final["val_loss"],
                bits_per_byte=final["val_bits_per_byte"], maskings={},
                health={key: final.get(key) for key in HEALTH.values()},
                curve=[(r["tokens"], r["val_loss"]) for r in records])


def losses_by_masking(folder, slot):
    """eval.py -> {masking: loss}."""
    # Of the last step, as the loss beside them is.
    summary = finish([EVAL, f"--out_dir={os.path.abspath(folder)}", "--checkpoint=last",
                      "--health_rows=0"], folder, slot)
    [losses, *_] = summary["data"].values()
    return {key: r["loss"] for key, r in losses.items() if key in MASKING_TYPES}


def finish(command, folder, slot, watch=None):
    """Runs a Python command, with its output in folder/output.txt -> the JSON that it prints last.

    Raises ValueError with its last line if it fails or prints no JSON.
    """
    path = os.path.join(folder, "output.txt")
    code = jobs.run_python(command, path, *slot, watch)
    with open(path, encoding="utf-8", errors="replace") as output:
        lines = output.read().splitlines()
    # Not simply the last line: a library may complain on stderr while Python ends.
    answer = next((line for line in reversed(lines) if line.startswith("{")), "")
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    if code or found is None:
        said = jobs.last_line(path) if code else f"it has printed no result, see {path}"
        if code < 0:  # kill -9, or the system had no memory left
            said = f"ended by {signal.Signals(-code).name}; the last line of {path}: {said}"
        raise ValueError(f"{said}\n    {shlex.join([sys.executable, *command])}")
    return found
