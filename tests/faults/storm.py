"""Hundreds of faults at random moments: the long form of test_faults.py, 25 minutes on two cores.

    make faults

Writes the table of records/faults.md: fault, times tried, parts of results lost, seconds to
recover. Outcomes are kept in `folder`; the same command goes on there. It ends with an error if
anything was lost. Faults of disks need a system on which this user may mount one.
"""

# ---- settings -----------------------------------------------------------------------------------
folder = "out/faults"  # runs, and the outcomes so far
minutes = 25.0  # no further scenario begins after so many
seed = 1  # of the moments
only = ""  # scenarios whose name begins so; empty: all
page = "records/faults.md"  # the table goes here
# -------------------------------------------------------------------------------------------------
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/faults")]

from configurator import configure

config = configure(globals())

import json
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import time

import torch
from conftest import call
from scenarios import (
    FINETUNE,
    PREPARE,
    SWEEP,
    TRAIN,
    World,
    bit_flip,
    clock_jumps,
    data_deleted,
    full_disk,
    hanging,
    killed,
    micro_recovers,
    nan_gradients,
    nan_weights,
    older_checkpoint,
    read_only,
    signalled,
    two_runs,
    under_torchrun,
)

from lib.files import print_result, replace_file, write_json
from lib.run import git_state

# name: (how often, function, its arguments after world and rng)
SCENARIOS = {
    "train: kill -9": (9, killed, (TRAIN, 8)),
    "prepare: kill -9": (6, killed, (PREPARE, 5)),
    "fine-tune: kill -9": (5, killed, (FINETUNE, 4)),
    "sweep: kill -9": (2, killed, (SWEEP, 2)),
    "train: SIGTERM": (4, signalled, (TRAIN, signal.SIGTERM)),
    "train: SIGINT": (4, signalled, (TRAIN, signal.SIGINT)),
    "train: SIGUSR1": (4, signalled, (TRAIN, signal.SIGUSR1)),
    "train: SIGTERM twice": (4, signalled, (TRAIN, signal.SIGTERM, True)),
    "train: SIGINT twice": (4, signalled, (TRAIN, signal.SIGINT, True)),
    "prepare: SIGTERM": (4, signalled, (PREPARE, signal.SIGTERM)),
    "prepare: SIGINT": (4, signalled, (PREPARE, signal.SIGINT)),
    "fine-tune: SIGTERM": (3, signalled, (FINETUNE, signal.SIGTERM)),
    "fine-tune: SIGINT": (3, signalled, (FINETUNE, signal.SIGINT)),
    "sweep: SIGTERM": (1, signalled, (SWEEP, signal.SIGTERM)),
    "torchrun, 2 processes: SIGTERM to the launcher": (2, under_torchrun, (signal.SIGTERM,)),
    "torchrun: SIGTERM to the launcher twice": (
        1, under_torchrun, (signal.SIGTERM, "launcher", True)),
    "torchrun: SIGINT to the launcher": (1, under_torchrun, (signal.SIGINT,)),
    "torchrun: SIGUSR1 to the launcher": (1, under_torchrun, (signal.SIGUSR1,)),
    "torchrun: kill -9 of the launcher": (2, under_torchrun, (signal.SIGKILL,)),
    "torchrun: kill -9 of one process": (2, under_torchrun, (signal.SIGKILL, "rank")),
    "torchrun: SIGTERM to one process": (1, under_torchrun, (signal.SIGTERM, "rank")),
    "torchrun: SIGUSR1 to one process": (1, under_torchrun, (signal.SIGUSR1, "rank")),
    "train: a step hangs": (2, hanging, ()),
    "torchrun: a step of one process hangs": (2, hanging, (1, 2)),
    "train: disk full": (12, full_disk, (TRAIN,)),
    "prepare: disk full": (8, full_disk, (PREPARE,)),
    "fine-tune: disk full": (6, full_disk, (FINETUNE,)),
    "train: disk read-only": (6, read_only, ()),
    "train: gradients NaN": (4, nan_gradients, ()),
    "train: weights of a checkpoint NaN or infinite": (6, nan_weights, ()),
    "train: bit flip in ckpt.pt": (12, bit_flip, ("out/ckpt.pt",)),
    "train: bit flip in ckpt_prev.pt": (3, bit_flip, ("out/ckpt_prev.pt",)),
    "train: bit flip in config.json": (3, bit_flip, ("out/config.json",)),
    "train: bit flip in a bin": (8, bit_flip, ("data/train.bin",)),
    "train: bit flip in the validation bin": (4, bit_flip, ("data/val.bin",)),
    "train: bit flip in meta.json": (12, bit_flip, ("data/meta.json",)),
    "train: bit flip in the tokenizer": (6, bit_flip, ("data/tokenizer/tokenizer.tiktoken",)),
    "train: bit flip in tokenizer_meta.json": (
        6, bit_flip, ("data/tokenizer/tokenizer_meta.json",)),
    "train: checkpoint of another version": (6, older_checkpoint, ()),
    "train: data deleted or cut meanwhile": (8, data_deleted, ()),
    "train: two runs in one folder": (4, two_runs, ()),
    "fine-tune: two runs in one folder": (2, two_runs, (FINETUNE,)),
    "train: the clock jumps": (4, clock_jumps, ()),
    "micro_balanced, 37 M parameters: kill -9": (1, micro_recovers, ()),
}


def replace_section(path, heading, text):
    """Replaces the section of a page below `heading`, or adds it at the end; the rest stays."""
    path = Path(path)
    old = path.read_text() if path.exists() else "# Faults and damaged files\n"
    new = f"{heading}\n\n{text.strip()}\n"
    pattern = rf"^{re.escape(heading)}\n.*?(?=^## |\Z)"
    if re.search(pattern, old, re.M | re.S):
        old = re.sub(pattern, lambda _: new + "\n", old, flags=re.M | re.S).rstrip() + "\n"
    else:
        old = f"{old.rstrip()}\n\n{new}"
    replace_file(path, lambda file: file.write(old.encode()))


def command_line(script):
    """The command as it was typed, without the places of its files."""
    typed = [word for word in sys.argv[1:] if not word.startswith(("--folder=", "--page="))]
    return shlex.join(["python", script, *typed])


def versions():
    return (f"git {git_state()}, torch {torch.__version__}, Python {platform.python_version()}, "
            f"Linux {platform.release()}, {os.cpu_count()} cores")


def table(outcomes):
    """Markdown: fault, times, lost, seconds to recover."""
    lines = ["| fault | times | lost | seconds to recover: median | worst |",
             "|---|---:|---:|---:|---:|"]
    for name in SCENARIOS:
        rows = [row for row in outcomes if row["name"] == name]
        if rows:
            seconds = [value for row in rows for value in row["seconds"]]
            lost = sum(len(row["lost"]) for row in rows)
            cells = ["-", "-"]
            if seconds:
                cells = [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"]
            lines.append(f"| {name} | {sum(row['times'] for row in rows)} | {lost} | "
                         f"{' | '.join(cells)} |")
    return "\n".join(lines)


def prose(path):
    """Made-up documents, prepared byte by byte -> the folder."""
    rng, texts_dir = random.Random(0), path.parent / "texts"
    texts_dir.mkdir(exist_ok=True)
    for n in range(40):
        words = [rng.choice(["cat", "river", "model", "sees", "keeps", "the"]) for _ in range(300)]
        (texts_dir / f"{n:02}.txt").write_text(" ".join(words))
    call("prepare.py", f"--input={texts_dir}/*.txt", f"--out_dir={path}", "--tokenizer=byte",
         "--val_fraction=0.2", "--num_proc=1")
    return path


def main():
    begin = time.monotonic()
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    kept = place / "outcomes.json"
    outcomes, failed = json.loads(kept.read_text()) if kept.exists() else [], []
    shutil.rmtree(place / "runs", ignore_errors=True)  # results of undisturbed runs are made anew
    world = World(place / "runs", prose((place / "data").resolve()))
    world.folder = world.folder.resolve()
    # by turns, so that each kind has been tried when the time is over
    rounds = max(times for times, *_ in SCENARIOS.values())
    todo = [(name, number) for number in range(rounds) for name in SCENARIOS
            if number < SCENARIOS[name][0] and name.startswith(only)]
    done = {(row["name"], row["number"]) for row in outcomes}
    for name, number in todo:
        if (name, number) in done or time.monotonic() - begin > 60 * minutes:
            continue
        _, function, arguments = SCENARIOS[name]
        try:
            outcome = function(world, random.Random(f"{seed} {name} {number}"), *arguments)
        except (AssertionError, OSError) as error:
            # not kept: the same command tries it again
            failed.append(dict(name=name, number=number, times=1, seconds=[],
                               lost=["it did not go on"]))
            print(f"{name} {number} FAILED\n{error}", flush=True)
            continue
        outcomes.append(dict(name=name, number=number, times=outcome.times, lost=outcome.lost,
                             seconds=outcome.seconds))
        write_json(kept, outcomes)
        print(f"{name} {number}: {outcome.times} times, lost {outcome.lost}, seconds "
              f"{[round(value, 1) for value in outcome.seconds]}", flush=True)
    outcomes += failed
    times = sum(row["times"] for row in outcomes)
    lost = sum(len(row["lost"]) for row in outcomes)
    missing = len(set(todo) - {(row["name"], row["number"]) for row in outcomes})
    command = command_line("tests/faults/storm.py")
    replace_section(page, "## Faults", f"""{times} faults, {lost} parts of results lost.
`{command}` ({versions()})

{table(outcomes)}
""")
    print_result(dict(faults=times, lost=lost, missing=missing))
    sys.exit(bool(lost or missing))


if __name__ == "__main__":
    main()
