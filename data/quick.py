"""From any data to a trained and evaluated model, by the commands you could type yourself; each is printed as it runs.

    make train DATA=texts/ SIZE=micro                     the same as: python data/quick.py --data=texts/ --size=micro
    make train DATA='a.jsonl,b/*.txt' SIZE=tiny NPROC=4 ARGS="--max_steps=1000 --batch_size=64"

DATA is a prepared folder, text (files, globs, folders, as prepare.py takes them) or a folder of token files (.npy, .pt,
.bin and others that prepare.py validate knows). Text is prepared, token files and bins are validated, what has no val
split gets one, then train.py and eval.py run. Stopped or killed, the same command goes on where it was.
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
prepare_args = ""  # of prepare.py, for text; of its validate and split, for token files: --tokenizer=gpt2
eval_args = ""  # of eval.py
config = configure(globals())

from data.bins import DataError, load_meta
from data.documents import one_message

TOKEN_FILES = (".npy", ".pt", ".bin", ".idx", ".arrow")
TEXT_FILES = (".txt", ".md", ".jsonl", ".gz", ".zst", ".parquet")
FINISHED = ("max_steps", "max_minutes", "patience", "overfit")  # how train.py says that a run is whole


def do(*command, launcher=()):
    """Prints and runs `python command...` -> its last line; ends this program with its exit code if it fails."""
    shown = ["torchrun", *launcher] if launcher else ["python"]
    print("\n$ " + shlex.join([*shown, *command]), flush=True)
    process = subprocess.Popen([sys.executable, *(("-m", "torch.distributed.run", *launcher) if launcher else ()),
                                *command], stdout=subprocess.PIPE, text=True, errors="replace")
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the command as well, which ends in order
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line
    if code := process.wait():
        sys.exit(code if code > 0 else 128 - code)
    return last


def find_preset():
    """The config file of `size`."""
    preset = f"config/{'micro_balanced' if size == 'micro' else size}.py"
    if not os.path.isfile(os.path.join(ROOT, preset)) or size.startswith("sweep"):
        raise DataError(f"size={size}: expected micro, tiny, small, base, large, xlarge or another preset in config/")
    return preset


def find_name():
    """A name for bins and run: the last part of the first path of `data` that is no pattern."""
    path = data.split(",")[0]
    parts = [part for part in os.path.abspath(path).split(os.sep) if not glob.has_magic(part)]
    return name or (parts[-1].split(".")[0] if os.path.isfile(path) else parts[-1]) or "mine"


def has_val(folder):
    """Whether a folder is prepared (None if not) and has a val split."""
    return load_meta(folder)["splits"].get("val") is not None if os.path.isfile(f"{folder}/meta.json") else None


def is_tokens(folder):
    """Whether a folder holds token files and no text."""
    inside = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)
    return any(path.endswith(TOKEN_FILES) for path in inside) and not any(path.endswith(TEXT_FILES) for path in inside)


def main():
    preset, folder, bins = find_preset(), data.rstrip("/"), f"data/{find_name()}"
    if not data or nproc < 1:
        raise DataError("expected: make train DATA=texts/ SIZE=micro; python data/quick.py --help lists all settings")
    if os.path.realpath(bins) == os.path.realpath(folder):
        bins += "_bins"
    whole = has_val(folder)
    if whole is None and not is_tokens(folder):
        do("prepare.py", f"--input={data}", f"--out_dir={bins}", *shlex.split(prepare_args))
        folder, whole = bins, True
    of_ids = shlex.split(prepare_args) if whole is None else []
    do("prepare.py", "validate", f"--data_dir={folder}", *of_ids)
    if not whole:
        do("prepare.py", "split", f"--data_dir={folder}", f"--out_dir={bins}", "--val_ratio=0.01", *of_ids)
        folder = bins
    out_dir = f"out/{os.path.basename(bins)}_{size}"
    launcher = ("--standalone", f"--nproc_per_node={nproc}") if nproc > 1 else ()
    last = do("train.py", preset, f"--data_dir={folder}", f"--out_dir={out_dir}", *shlex.split(args), launcher=launcher)
    if (stopped := json.loads(last)["stopped"]) not in FINISHED:
        sys.exit(f"training was stopped ({stopped}) and saved; the same command goes on from there")
    do("tools/eval.py", f"--out_dir={out_dir}", *shlex.split(eval_args))


with one_message():
    main()
