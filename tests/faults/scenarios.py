"""Faults: each function causes one for real, runs the same command again and compares the results.

    outcome = killed(World(folder, data_dir), random.Random(0), TRAIN, times=3)

A job is a command with a small model, and how to read what it came to: losses, weights, bins,
tables, bit for bit. `lost` lists the parts that differ from those of an undisturbed run; a fault
from which the command does not go on by itself raises AssertionError with what it printed.

test_faults.py runs each kind once, storm.py (make faults) hundreds of times at random moments.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import start
from test_prepare import texts, write_jsonl
from test_train import TINY

from configurator import read_settings
from lib.log import read_log
from lib.run import read_checkpoint

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    """What one scenario came to."""
    times: int  # faults that were caused
    lost: list = field(default_factory=list)  # parts of the result that differ
    seconds: list = field(default_factory=list)  # from each restart to the first new work


# ---- commands -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """A command, and what it comes to."""
    name: str
    arguments: Callable  # (world, out) -> arguments of python
    parts: Callable  # out -> {name: value} of the result
    progress: str  # regular expression of a line that shows new work


class World:
    """A folder for runs, and the results of undisturbed ones, each made when it is first needed.

    steps: of training, a multiple of 20.
    """

    def __init__(self, folder, data_dir, steps=40):
        self.folder, self.data_dir, self.steps = Path(folder), Path(data_dir), steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results, self.n = {}, 0

    def new(self):
        """A new path for the out_dir of a run."""
        self.n += 1
        return self.folder / f"{self.n:04}"

    def whole(self, job):
        """The parts of an undisturbed run of `job`."""
        if job.name not in self.results:
            out = self.folder / f"whole_{job.name.replace(' ', '_')}"
            go_on(self, job, out)
            self.results[job.name] = job.parts(out)
        return self.results[job.name]

    def whole_folder(self, job):
        self.whole(job)
        return self.folder / f"whole_{job.name.replace(' ', '_')}"

    @property
    def corpus(self):
        """A file of 3,000 documents."""
        path = self.folder / "corpus.jsonl"
        return path if path.exists() else write_jsonl(path, texts(3000))

    @property
    def task(self):
        """A folder with a task of two labels for finetune_glue.py."""
        folder = self.folder / "mood"
        if not folder.exists():
            rng = random.Random(0)
            folder.mkdir()
            for split, n in (("train", 64), ("dev", 32)):
                rows = [(rng.choice(["fine", "warm", "cold", "dull"])) for _ in range(n)]
                lines = [f"the stone is {word}\t{'good' if word in 'fine warm' else 'bad'}"
                         for word in rows]
                (folder / f"{split}.tsv").write_text("\n".join(["line\tverdict", *lines]) + "\n")
            (folder / "task.json").write_text(json.dumps(dict(
                text=["line"], label="verdict", labels=["bad", "good"])))
        return folder


def digest(value):
    """sha256 of tensors, and of all that is in dicts and lists of them."""
    sha256 = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sha256.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                sha256.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            sha256.update(repr(value).encode())
    add(value)
    return sha256.hexdigest()


def train_parts(out):
    """Loss of every step, every evaluation, weights and optimizer, the best weights."""
    parts = {}
    for record in read_log(out):
        if "loss" in record:
            parts[f"step {record['step']}"] = record["loss"]
        if "val_loss" in record:
            losses = list(record["val_losses"].values())  # without the names of the folders
            parts[f"evaluation {record['step']}"] = record | dict(val_losses=losses)
    if not (out / "best.pt").exists():
        return parts
    last, best = read_checkpoint(out / "ckpt.pt"), read_checkpoint(out / "best.pt")
    return parts | {"weights": digest(last["model"]), "optimizer": digest(last["optimizers"]),
                    "step": last["step"], "best": (digest(best["model"]), best["step"])}


def prepare_parts(out):
    """Every file; of meta.json not the command line."""
    parts = {str(path.relative_to(out)): path.read_bytes()
             for path in out.rglob("*") if path.is_file()}
    parts["meta.json"] = json.loads(parts["meta.json"]) | {"command": ""}
    return parts


def finetune_parts(out):
    """Scores, losses and predictions of every run."""
    found = json.loads((out / "glue.json").read_text())["mood"]
    parts = {f"seed {run['seed']}": run["metrics"] for run in found["runs"]}
    for path in (out / "glue" / "mood").glob("*.tsv"):
        parts[path.name] = path.read_bytes()
    return parts | dict(median=found["median"])


def sweep_parts(out):
    """The table, and each run."""
    parts = {"table": (out / "table.md").read_text()}
    for path in out.glob("*/ckpt.pt"):
        for name, value in train_parts(path.parent).items():
            parts[f"{path.parent.name} {name}"] = value
    return parts


TRAIN_ARGS = [*TINY, "--dropout=0.1", "--save_minutes=0", "--eval_rows=8"]
SWEEP_ARGS = ("--dtype=fp32 --block_size=32 --n_layer=1 --n_head=2 --concept_dim=32 --token_dim=64 "
              "--ffn_dim=32 --batch_size=4 --max_steps=60 --eval_interval=20 --eval_rows=8 "
              "--health_rows=0 --init_table=random --n_concept=4 --log_interval=1 "
              "--save_minutes=0")
TORCHRUN = ["-c", "from torch.distributed.run import main; main()", "--nproc_per_node=2"]


def train_arguments(world, out):
    return ["train.py", f"--data_dir={world.data_dir}", f"--out_dir={out}", *TRAIN_ARGS,
            f"--max_steps={world.steps}"]


def finetune_arguments(world, out):
    if not out.exists():  # it starts from a trained run
        ignored = shutil.ignore_patterns("glue*")
        shutil.copytree(world.whole_folder(TRAIN), out, ignore=ignored)
    return ["finetune_glue.py", f"--out_dir={out}", f"--task={world.task}", "--seeds=3",
            "--lrs=3e-3", "--grid_seeds=0", "--epochs=2", "--batch_size=8", "--max_tokens=48",
            "--dtype=fp32", "--device=cpu"]


TRAIN = Job("train", train_arguments, train_parts, r"^step \d+/")
TORCHRUN_TRAIN = Job(
    "train under torchrun",
    lambda world, out: [*TORCHRUN, f"--master_port={random.randint(20000, 60000)}",
                        *train_arguments(world, out), "--max_steps=200", "--save_minutes=60"],
    train_parts, r"^step \d+/")
PREPARE = Job(
    "prepare", lambda world, out: [
        "-c", "import runpy; from data import documents; documents.CHUNK_BYTES = 10_000; "
              "runpy.run_path('prepare.py', run_name='__main__')",
        f"--input={world.corpus}", f"--out_dir={out}", "--tokenizer=byte", "--num_proc=2",
        "--val_fraction=0.05"],
    prepare_parts, r"^\{")
FINETUNE = Job("fine-tune", finetune_arguments, finetune_parts, r"lr 0.003 seed|^\{")
SWEEP = Job(
    "sweep", lambda world, out: [
        "tools/sweep.py", f"--base=--data_dir={world.data_dir} {SWEEP_ARGS}",
        "--arms=small --n_concept=4\nplain --arch=transformer", "--seeds=1", f"--out_dir={out}",
        "--evaluate=false"],
    sweep_parts, r"seed 1: |^\{")


# ---- running and comparing ----------------------------------------------------------------------

def read_until(process, pattern):
    """Reads a process's output to a line with `pattern` -> (what came, whether the line did)."""
    seen = ""
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            return seen, True
    return seen, False


def end_of(process):
    """Waits for the end, 2 minutes at most -> (exit code, rest of the output)."""
    timer = threading.Timer(120, process.kill)
    timer.start()
    rest, _ = process.communicate()
    timer.cancel()
    return process.returncode, rest


def go_on(world, job, out, arguments=None):
    """Runs the command to its good end -> (seconds to its first new work, what it printed)."""
    begin = time.monotonic()
    process = start(*(arguments or job.arguments(world, out)))
    text, _ = read_until(process, job.progress)
    seconds = time.monotonic() - begin
    code, rest = end_of(process)
    assert code == 0 and "Traceback" not in text + rest, f"exit code {code}:\n{text}{rest}"
    return seconds, text + rest


def differences(world, job, out):
    """Names of the parts of the result that differ from those of an undisturbed run."""
    whole, now = world.whole(job), job.parts(out)
    return [name for name in whole | now if whole.get(name) != now.get(name)]


def finish(world, job, out, times, seconds=()):
    """The same command to its end -> Outcome. The folder is removed when nothing is lost."""
    last, _ = go_on(world, job, out)
    outcome = Outcome(times, differences(world, job, out), [*seconds, last])
    leftovers = [path.name for path in out.rglob("*.tmp")]
    outcome.lost += [f"{name} was left behind" for name in leftovers]
    if not outcome.lost:
        shutil.rmtree(out)
    return outcome


def is_whole(world, job, out, text):
    """Asserts that a command with exit code 0 has come to the whole result."""
    missing = differences(world, job, out)
    assert not missing, f"exit code 0, but not the same: {missing}\n{text[-3000:]}"


def is_one_message(code, text):
    """Asserts that a command was refused in order."""
    assert code not in (0, -signal.SIGKILL), f"it ended with {code}:\n{text}"
    assert "Traceback" not in text and text.strip(), text


# ---- kill -9 and signals ------------------------------------------------------------------------

def killed(world, rng, job, times=1):
    """kill -9 at random moments, a fifth of them while the command is starting."""
    world.whole(job)
    out, seconds, caused, lost = world.new(), [], 0, []
    for _ in range(times):
        begin = time.monotonic()
        process = start(*job.arguments(world, out))
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, 0.8))
        elif job is PREPARE:
            time.sleep(rng.uniform(0.2, 1.2))
        else:
            read_until(process, job.progress)
            seconds.append(time.monotonic() - begin)
            time.sleep(rng.choice([rng.uniform(0, 0.02), rng.uniform(0, 0.25)]))
        before = saved_step(out)
        process.kill()
        process.communicate()
        caused += process.returncode == -signal.SIGKILL
        if saved_step(out) < before:
            lost.append(f"the checkpoint of step {before}")
        if process.returncode == 0:  # it has ended before the kill: begin another run
            lost += differences(world, job, out)
            shutil.rmtree(out)
    outcome = finish(world, job, out, caused, seconds)
    outcome.lost += lost
    return outcome


def saved_step(out):
    """Step of the newest checkpoint in out that can be read, -1 without one."""
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        with contextlib.suppress(OSError, ValueError):
            return read_checkpoint(out / name)["step"]
    return -1


def signalled(world, rng, job, number, twice=False):
    """A signal at a random moment of the work, perhaps a second one right behind it."""
    world.whole(job)
    out = world.new()
    process = start(*job.arguments(world, out))
    if job in (TRAIN, FINETUNE, SWEEP):
        read_until(process, job.progress)
        time.sleep(rng.uniform(0, 0.2))
    else:
        time.sleep(rng.uniform(0.3, 1))
    with contextlib.suppress(ProcessLookupError):  # it has ended
        process.send_signal(number)
        if twice:
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(number)
    begin = time.monotonic()
    code, rest = end_of(process)
    assert time.monotonic() - begin < 30, "it did not end within 30 s"
    assert "Traceback" not in rest, rest
    return finish(world, job, out, 1)


# ---- several processes --------------------------------------------------------------------------

def children(pid):
    """Processes that process `pid` has started."""
    with contextlib.suppress(OSError):
        return [int(child) for child in
                Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_running(pid):
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def under_torchrun(world, rng, number, to="launcher", twice=False):
    """A signal to the launcher, or to one of its two processes, which must all be gone in 45 s."""
    job = TORCHRUN_TRAIN
    world.whole(job)
    out = world.new()
    process = start(*job.arguments(world, out))
    read_until(process, job.progress)
    ranks = children(process.process.pid)
    assert len(ranks) == 2
    time.sleep(rng.uniform(0, 0.15))
    target = process.process.pid if to == "launcher" else rng.choice(ranks)
    os.kill(target, number)
    if twice:
        time.sleep(rng.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, number)
    begin = time.monotonic()
    while any(map(is_running, [process.process.pid, *ranks])):
        if time.monotonic() - begin > 45:
            for pid in [process.process.pid, *ranks]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{signal.Signals(number).name} to the {to}: not gone in 45 s")
        time.sleep(0.05)
    process.communicate()
    assert saved_step(out) < 200, "they went on to their end as if nothing had happened"
    return finish(world, job, out, 1)


HANGS = """
import os, runpy, sys, time
sys.path.insert(0, os.getcwd())
from data.reader import Batches
real = Batches.batch
def batch_that_never_comes(self, step, *rest):
    if step == {step} and int(os.environ.get("RANK", 0)) == {rank}:
        time.sleep(1e6)
    return real(self, step, *rest)
Batches.batch = batch_that_never_comes
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def hanging(world, rng, rank=0, nproc=1):
    """A process that hangs in the middle of a step says where, and all end within a minute."""
    job = TORCHRUN_TRAIN if nproc > 1 else TRAIN
    world.whole(job)
    out = world.new()
    script = world.folder / "hangs.py"
    script.write_text(HANGS.format(step=rng.randint(3, world.steps - 5), rank=rank))
    arguments = [str(script) if argument == "train.py" else argument
                 for argument in job.arguments(world, out)]
    process = start(*arguments, "--hang_minutes=0.1")
    text, _ = read_until(process, job.progress)
    begin = time.monotonic()
    code, rest = end_of(process)
    text += rest
    assert code not in (0, -signal.SIGKILL) and time.monotonic() - begin < 60, text
    assert "Timeout (0:00:06)!" in text and "batch_that_never_comes" in text, text
    return finish(world, job, out, 1)


# ---- disks --------------------------------------------------------------------------------------

@contextlib.contextmanager
def disk(folder, size):
    """A disk of `size` bytes at `folder`. RuntimeError where nothing can be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def size_of(folder):
    """Bytes that the files of a folder take on a disk, in blocks of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))


def full_disk(world, rng, job):
    """A disk that is full after a random part of what the command writes; later it has space."""
    world.whole(job)
    before = size_of(world.whole_folder(TRAIN)) if job is FINETUNE else 0  # the run it starts from
    written = size_of(world.whole_folder(job)) - before
    with disk(world.new(), before + max(8192, int(written * rng.uniform(0.02, 1.1)))) as folder:
        out = folder / "run"
        process = start(*job.arguments(world, out))
        code, text = end_of(process)
        if code:
            is_one_message(code, text)
        else:
            is_whole(world, job, out, text)
        remount(folder, "size=64m")
        return finish(world, job, out, 1)


def read_only(world, rng, job=None):
    """out_dir can no longer be written, at the start or in the middle of the run."""
    job = job or TRAIN
    world.whole(job)
    with disk(world.new(), 2**26) as folder:
        out = folder / "run"
        if rng.random() < 0.5:
            remount(folder, "ro")
            is_one_message(*end_of(start(*job.arguments(world, out))))
        else:
            process = start(*job.arguments(world, out))
            read_until(process, rf"^step {rng.randint(1, world.steps // 2)}/")
            for _ in range(1000):  # while a file is being written the kernel refuses
                done = subprocess.run(["mount", "-o", "remount,ro", folder], capture_output=True)
                if not done.returncode:
                    break
            code, text = end_of(process)
            if code:
                is_one_message(code, text)
            else:
                is_whole(world, job, out, text)
        remount(folder, "rw")
        return finish(world, job, out, 1)


# ---- wrong numbers and files --------------------------------------------------------------------

NAN_FROM = """
import math, runpy, sys, torch
real, calls = torch.nn.utils.clip_grad_norm_, [0]
def spoiled(parameters, *rest):
    calls[0] += 1
    return real(parameters, *rest) * (math.nan if calls[0] > {steps} else 1)
torch.nn.utils.clip_grad_norm_ = spoiled
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def nan_gradients(world, rng):
    """Gradients that are not finite from a random step on: the run stops and saves none of them."""
    world.whole(TRAIN)
    out = world.new()
    # checkpoints at evaluations only: skipped updates of one that is saved would be part of the run
    arguments = TRAIN.arguments(world, out)
    arguments[arguments.index("--save_minutes=0")] = "--save_minutes=60"
    script = NAN_FROM.format(steps=10 * rng.randint(0, world.steps // 10 - 2))
    code, text = end_of(start("-c", script, *arguments[1:]))
    is_one_message(code, text)
    assert "10 updates in a row had a non-finite gradient" in text
    return finish(world, TRAIN, out, 1)


def stopped_run(world, rng):
    """A folder with a run that was stopped at a random step -> (its path, the step)."""
    out, step = world.new(), rng.randint(2, world.steps - 2)
    go_on(world, TRAIN, out, [*TRAIN.arguments(world, out), f"--stop_at_step={step}"])
    return out, step


def nan_weights(world, rng):
    """A newest checkpoint with a weight that is not finite: the one before it is taken."""
    out, _ = stopped_run(world, rng)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    name = rng.choice([name for name, t in checkpoint["model"].items() if t.is_floating_point()])
    checkpoint["model"][name].flatten()[0] = rng.choice([float("nan"), float("inf")])
    torch.save(checkpoint, out / "ckpt.pt")
    return finish(world, TRAIN, out, 1)


def older_checkpoint(world, rng):
    """A checkpoint without settings that are at their defaults, and with one that is unknown."""
    out, _ = stopped_run(world, rng)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    defaults = read_settings(ROOT / "train.py")
    for settings in (checkpoint["settings"], checkpoint["model_settings"]):
        same = [name for name, value in settings.items()
                if name in defaults and defaults[name][0] == value and name != "arch"]
        for name in rng.sample(same, min(5, len(same))):
            del settings[name]
    checkpoint["settings"]["setting_of_another_version"] = 1
    for name in rng.sample(["loss", "stopped", "tokens_before", "data_paths", "importance"], 2):
        checkpoint.pop(name, None)
    torch.save(checkpoint, out / "ckpt.pt")
    return finish(world, TRAIN, out, 1)


def flip_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def bit_flip(world, rng, name):
    """One bit of a file of the run (out/...) or of its data (data/...) has changed.

    The run either comes to the same result, or it is refused in one message and goes on when the
    file is back.
    """
    out, _ = stopped_run(world, rng)
    place, _, file = name.partition("/")
    data_dir = world.data_dir
    if place == "data":
        data_dir = shutil.copytree(world.data_dir, world.new())
    path = (out if place == "out" else data_dir) / file
    before = path.read_bytes()
    flip_bit(path, rng)
    arguments = [f"--data_dir={data_dir}" if argument.startswith("--data_dir=") else argument
                 for argument in TRAIN.arguments(world, out)]
    begin = time.monotonic()
    process = start(*arguments)
    text, _ = read_until(process, TRAIN.progress)
    seconds = time.monotonic() - begin
    code, rest = end_of(process)
    if code:
        is_one_message(code, text + rest)
        path.write_bytes(before)
        seconds, _ = go_on(world, TRAIN, out, arguments)
    outcome = Outcome(1, differences(world, TRAIN, out), [seconds])
    if not outcome.lost:
        shutil.rmtree(out)
    return outcome


# ---- what others do meanwhile -------------------------------------------------------------------

def data_deleted(world, rng):
    """The data is deleted while a run reads it, and restored afterwards."""
    world.whole(TRAIN)
    out, data_dir = world.new(), shutil.copytree(world.data_dir, world.new())
    arguments = [f"--data_dir={data_dir}" if argument.startswith("--data_dir=") else argument
                 for argument in TRAIN.arguments(world, out)]
    process = start(*arguments)
    read_until(process, rf"^step {rng.randint(1, world.steps // 2)}/")
    if rng.random() < 0.5:
        shutil.rmtree(data_dir)
    else:  # or cut, which a reader meets in the middle of a file
        for path in data_dir.glob("*.bin"):
            os.truncate(path, 100)
    code, text = end_of(process)
    if code:
        is_one_message(code, text)
    else:
        is_whole(world, TRAIN, out, text)
    shutil.rmtree(data_dir, ignore_errors=True)
    shutil.copytree(world.data_dir, data_dir)
    seconds, _ = go_on(world, TRAIN, out, arguments)
    return Outcome(1, differences(world, TRAIN, out), [seconds])


def two_runs(world, rng, job=None):
    """A second run in the same folder is refused, and the first one does not notice."""
    job = job or TRAIN
    world.whole(job)
    out = world.new()
    first = start(*job.arguments(world, out))
    read_until(first, job.progress)
    begin = time.monotonic()
    code, text = end_of(start(*job.arguments(world, out)))
    seconds = time.monotonic() - begin
    if code:
        is_one_message(code, text)
    else:  # the first had ended
        assert "finished" in text, text
    code, text = end_of(first)
    assert code == 0, text
    return Outcome(1, differences(world, job, out), [seconds])


CLOCK = """
import random, runpy, sys, time
rng, now = random.Random({seed}), [time.time()]
def jumping():
    now[0] += rng.choice([0.001, 3600.0, -3600.0, 1e6, -1e6])
    return now[0]
time.time = jumping
time.time_ns = lambda: int(jumping() * 1e9)
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def clock_jumps(world, rng):
    """The clock of the day jumps by hours and days, forwards and backwards, between any two looks.

    A limit of minutes must not notice.
    """
    world.whole(TRAIN)
    out = world.new()
    code = CLOCK.format(seed=rng.randrange(10**6))
    arguments = TRAIN.arguments(world, out)[1:]
    seconds, text = go_on(world, TRAIN, out, ["-c", code, *arguments, "--max_minutes=60",
                                              f"--stop_at_step={world.steps // 2}"])
    assert '"stopped": "stop_at_step"' in text
    return finish(world, TRAIN, out, 1, [seconds])


# ---- a model of a real size ---------------------------------------------------------------------

def micro_recovers(world, rng):
    """kill -9 of a run of 37 million parameters -> the seconds from the restart to the next step.

    Weights are those of the checkpoint that the kill left, not compared with an undisturbed run.
    """
    out = world.new()
    arguments = ["train.py", "config/micro_balanced.py", f"--data_dir={world.data_dir}",
                 f"--out_dir={out}", "--vocab_size=30522", "--batch_size=2", "--micro_batch=2",
                 "--log_interval=1", "--eval_rows=2", "--health_rows=0", "--init_table=random",
                 "--save_minutes=0"]
    process = start(*arguments)
    read_until(process, r"^step 2/")
    process.kill()
    process.communicate()
    saved, begin = saved_step(out), time.monotonic()
    process = start(*arguments)
    text, _ = read_until(process, TRAIN.progress)
    outcome = Outcome(1, [], [time.monotonic() - begin])
    process.kill()
    process.communicate()
    if saved < 1 or f"resuming at step {saved}" not in text:
        outcome.lost.append("the checkpoint")
    shutil.rmtree(out)
    return outcome
