"""Trains and evaluates a model on any data. Runs the commands one could type, and prints each.

    make train DATA=texts/ SIZE=micro
    make train DATA='a.jsonl,b/*.txt' SIZE=tiny NPROC=4 ARGS="--max_steps=1000 --batch_size=64"
    python data/quick.py --data=texts/ --size=micro           # the same as the first line

`data` is text (files, globs and folders that prepare.py takes), a folder of token files (.npy, .pt,
.bin and others that prepare.py validate takes), or a prepared folder. Text is prepared; token files
and bins are validated; what has no val split gets one; then train.py and eval.py run. When it was
stopped or killed, the same command goes on where it was.
"""

import glob
import json
import os
import shlex
import signal
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure

data = ""  # prepared folder, text or token files
size = "micro"  # micro | tiny | small | base | large | xlarge, or another name in config/
name = ""  # of the bins, data/NAME, and of the run, out/NAME_SIZE; empty: from data
nproc = 1  # processes that train, one a GPU
args = ""  # further settings of train.py, spaces between
prepare_args = ""  # of prepare.py for text, of validate and split for token files: --tokenizer=gpt2
eval_args = ""  # of eval.py
config = configure(globals())

from data.bins import DataError, load_meta
from data.documents import one_message
from data.ids import holds_ids
from data.inputs import find_inputs

FINISHED = ("max_steps", "max_minutes", "patience", "overfit")  # why a run of train.py is complete


def main():
    preset, folder, bins = find_preset(), data.rstrip("/") or data, f"data/{find_name()}"
    if not data or nproc < 1:
        raise DataError("expected: make train DATA=texts/ SIZE=micro; python data/quick.py --help "
                        "lists all settings")
    if os.path.realpath(bins) == os.path.realpath(folder):
        bins += "_bins"
    ids_args = []
    if os.path.isfile(f"{folder}/meta.json"):
        if prepare_args:
            raise DataError(f"--prepare_args: {folder} is prepared already; leave them out")
        needs_split = load_meta(folder)["splits"].get("val") is None
    elif holds_only_tokens(folder):
        needs_split, ids_args = True, shlex.split(prepare_args)
    else:
        run("prepare.py", f"--input={data}", f"--out_dir={bins}", *shlex.split(prepare_args))
        needs_split, folder = False, bins
    run("prepare.py", "validate", f"--data_dir={folder}", *ids_args)
    if needs_split:
        run("prepare.py", "split", f"--data_dir={folder}", f"--out_dir={bins}", "--val_ratio=0.01",
            *ids_args)
        folder = bins
    out_dir = f"out/{os.path.basename(bins)}_{size}"
    launcher = ["--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    last_line = run("train.py", preset, f"--data_dir={folder}", f"--out_dir={out_dir}",
                    *shlex.split(args), launcher=launcher)
    trained = json.loads(last_line)
    if trained["stopped"] not in FINISHED:
        sys.exit(f"training was stopped ({trained['stopped']}) and saved; the same command goes on "
                 "from there")
    # not out_dir: `args` may have named another
    run("tools/eval.py", f"--out_dir={trained['out_dir']}", *shlex.split(eval_args))


def find_preset():
    """The config file of `size`."""
    preset = f"config/{'micro_balanced' if size == 'micro' else size}.py"
    if not os.path.isfile(os.path.join(ROOT, preset)) or size.startswith("sweep"):
        raise DataError(f"size={size}: expected micro, tiny, small, base, large, xlarge or another "
                        "preset in config/")
    return preset


def find_name():
    """A name for bins and run: `name`, else the last part of the first path that is no pattern."""
    path = data.split(",")[0]
    parts = [part for part in os.path.abspath(path).split(os.sep) if not glob.has_magic(part)]
    from_data = parts[-1].split(".")[0] if os.path.isfile(path) else parts[-1]
    return name or from_data or "mine"


def holds_only_tokens(folder):
    """Whether a folder holds token files and no text."""
    if not os.path.isdir(folder):
        return False
    return all(holds_ids(path, "", "text") for path in find_inputs(folder, 1).paths)


def run(*command, launcher=()):
    """Prints and runs `python command...` -> the last line that it printed.

    launcher: arguments of torchrun, which then starts the command. Ends this program with the exit
    code of a command that fails.
    """
    shown = ["torchrun", *launcher] if launcher else ["python"]
    # The scripts and presets of this repository, from whatever folder this is run in.
    command = [os.path.relpath(os.path.join(ROOT, word)) if word.endswith(".py") else word
               for word in command]
    print("\n$ " + shlex.join([*shown, *command]), flush=True)
    torchrun = ["-m", "torch.distributed.run", *launcher] if launcher else []
    process = subprocess.Popen([sys.executable, *torchrun, *command], stdout=subprocess.PIPE,
                               text=True, errors="replace")
    # Ctrl-C on a terminal goes to the command too, which saves and ends: wait for it. SIGTERM goes
    # to this process alone, so it is passed on.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    last_line = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last_line = line
    code = process.wait()
    if code:
        sys.exit(code if code > 0 else 128 - code)  # killed by signal n: 128 + n, as a shell says
    return last_line


with one_message():
    main()
