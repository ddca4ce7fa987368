"""A small prepared data set and a way to run the repository's commands."""

import os

# before torch is loaded; the models are so small that more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import faulthandler
import gc
import io
import itertools
import json
import multiprocessing
import multiprocessing.spawn
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

try:
    from compression import zstd  # noqa: F401, Python 3.14
except ImportError:
    from backports import zstd  # noqa: F401

# Without bytecode each of the many processes would compile all files, a quarter of a tiny run.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Nothing here loses its power, so nothing has to wait for the disk.
os.fsync = lambda descriptor: None
# Without a GPU, each torch.manual_seed would write down the stack for one that comes later. That
# is a tenth of the time of a tiny step.
if not torch.cuda.is_available():
    torch.cuda._lazy_call = torch.xpu._lazy_call = lambda *_, **__: None

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real data; tests that need it skip where it is not


# A process that has torch loaded. Forks of it run the scripts, without the seconds of the import.
# A fork loads this file, so what this file imports is there too. PIL: matplotlib writes with it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "scipy.stats", "tiktoken",
                               "matplotlib.figure", "sklearn.metrics", "pytest", "unittest.mock",
                               "tempfile", "backports.zstd", "regex", "tokenizers",
                               "torch.profiler", "PIL.JpegImagePlugin", "PIL.PpmImagePlugin",
                               "PIL.BmpImagePlugin", "PIL.GifImagePlugin",
                               "matplotlib.backends.backend_agg"])


def pytest_collection_modifyitems(items):
    """Puts the files that say `pytestmark = pytest.mark.long` first: workers end at one time then.

    test_readme, whose longest test takes a minute by itself, says long(0) and begins at once.
    """
    def place(item):
        mark = item.get_closest_marker("long")
        return (mark.args or (1,))[0] if mark else 2
    items.sort(key=place)


STARTING = threading.Lock()
preparation_data = multiprocessing.spawn.get_preparation_data


def without_main(name):
    """What a fork is told about this process, without its main module.

    call() makes a script the main module; the fork would import it, and so run it again.
    """
    data = preparation_data(name)
    return {key: value for key, value in data.items() if not key.startswith("init_main")}


def shorten_train():
    """Leaves out the parts of train.py that take as long as all else of a tiny run."""
    import lib.log
    import lib.machine

    lib.log.draw_curves = lambda *_: None
    lib.machine.matmul_peak = lambda *_: 1e11  # a tenth of a second


def forked(cwd, args, output, errors, env=()):
    """Runs `python args...` in a new fork of SERVER. output, errors: paths, or ends of a Pipe.

    STDIN in env: the path of what it reads.
    """
    gc.freeze()  # collecting would copy the pages of torch that forks share
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup runs the tests
    os.fsync = lambda descriptor: None
    os.environ.update(env)
    stdin = dict(env).get("STDIN", os.devnull)
    for number, place in ((0, stdin), (1, output), (2, errors)):
        is_pipe = hasattr(place, "fileno")
        os.dup2(place.fileno() if is_pipe else os.open(place, os.O_RDWR | os.O_APPEND), number)
    sys.stdin = open(0, buffering=1, closefd=False)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.chdir(cwd)
    sys.path[:1] = [str(cwd), *filter(None, dict(env).get("PYTHONPATH", "").split(os.pathsep))]
    if Path(args[0]).name == "train.py" and Path(cwd) == ROOT:
        shorten_train()
    if args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        exec(args[1], {"__name__": "__main__"})
    elif args[0] == "-m":
        sys.argv = args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(args)
        runpy.run_path(args[0], run_name="__main__")


def fork(*args):
    """Starts `forked(*args)` -> multiprocessing.Process."""
    process = SERVER.Process(target=forked, args=args)
    with STARTING, mock.patch("multiprocessing.spawn.get_preparation_data", without_main):
        process.start()
    return process


def run_script(args, cwd=ROOT, timeout=240, env=(), nproc=1):
    """subprocess.run([python, *args]) of a script or of -c, without the seconds of importing torch.

    nproc: number of processes; they find each other as those of torchrun do.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("out", "err")]
        for path in paths:
            path.touch()
        group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(random.randint(20000, 32000)),
                     WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc))
        processes = []
        for rank in range(nproc):
            settings = dict(env)
            if nproc > 1:
                settings |= group | dict(RANK=str(rank), LOCAL_RANK=str(rank))
            processes.append(fork(cwd, args, *paths, settings))
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
        if None in codes:
            for process in processes:
                process.kill()
            raise subprocess.TimeoutExpired(args, timeout)
        output, errors = (path.read_text() for path in paths)
        return subprocess.CompletedProcess(args, max(codes, key=abs), output, errors)


def run(*args, ok=True, env=None, nproc=1, timeout=240, fresh=False):
    """Runs `python args...` in the repository's folder -> CompletedProcess.

    nproc: number of processes, as torchrun starts them. fresh: by a new interpreter, whose outputs
    are pipes instead of files.
    """
    args = [str(arg) for arg in args]
    if args[0] != "tools/bench.py" and not fresh:
        done = run_script(args, timeout=timeout, env=env or {}, nproc=nproc)
    else:
        done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True,
                              timeout=timeout, env={**os.environ, **(env or {})})
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


TRAIN_MANY = """
import json, os, runpy, sys
import lib.log, lib.machine
lib.log.draw_curves = lambda *_: None
lib.machine.matmul_peak = lambda *_: 1e11
def after(names): pass
exec(sys.argv[2])
for number, args in enumerate(json.loads(sys.argv[1])):
    os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", 0)) + 1)
    sys.argv = ["train.py", *args]
    after(runpy.run_path("train.py", run_name="__main__"))
"""


def train_many(*runs, nproc=2, watch="", timeout=240):
    """Runs train.py with each of these lists of arguments, one after another in the same processes.

    watch: code that comes first, and may define after(names), called with the names of each run.
    """
    runs = json.dumps([list(map(str, args)) for args in runs])
    return run("-c", TRAIN_MANY, runs, watch, nproc=nproc, timeout=timeout)


def call(script, *args, ok=True, picture=False, cwd=ROOT):
    """Runs a script in this process, which spares the seconds of a new one -> like run().

    cwd: where it runs, and where its path starts. picture: whether train.py draws curves.png, which
    takes as long as all else of a tiny run.
    """
    out, code = io.StringIO(), 0
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    before = sys.argv, sys.path[:], os.getcwd(), torch.get_num_threads()
    sys.argv = [script, *map(str, args)]
    os.chdir(cwd)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(out))
            if script == "train.py" and not picture:
                stack.enter_context(mock.patch("lib.log.draw_curves"))
                # a tenth of a second, as long as a tiny run's steps
                stack.enter_context(mock.patch("lib.machine.matmul_peak", return_value=1e11))
            runpy.run_path(str(Path(cwd, script)), run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            out.write(stop.code + "\n")
    finally:
        sys.argv, sys.path[:], folder, threads = before
        os.chdir(folder)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()  # of a run that ended in the middle
        gc.collect()  # closes the lock of the run's folder
        gc.freeze()  # later collect() skip what is here now, torch above all: half a second less
    done = subprocess.CompletedProcess(sys.argv, code, out.getvalue(), "")
    assert not ok or code == 0, done.stdout
    return done


class start:
    """Starts `python args...`, both outputs in one; used like a subprocess.Popen."""

    def __init__(self, *args):
        receive, send = SERVER.Pipe(duplex=False)
        self.process = fork(ROOT, list(map(str, args)), send, send)
        send.close()
        self.stdout, self.kill = open(os.dup(receive.fileno())), self.process.kill

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def communicate(self, timeout=60):
        """-> (the rest of the output, None), when the process has ended."""
        rest = self.stdout.read()
        self.process.join(timeout)
        self.returncode = self.process.exitcode
        return rest, None


def wait_for(process, text):
    """Reads the output of a started process until a line holds `text`."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


def write_arrow_file(path, table, rows):
    """A pyarrow.Table as .parquet, .feather or else a stream; `rows` a batch of it."""
    import pyarrow.feather
    import pyarrow.parquet

    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, str(path))
    else:
        with pyarrow.OSFile(str(path), "wb") as file:
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, rows)


class Fork:
    """In place of subprocess.Popen: a Python script that a command starts runs in a fork."""
    started = []  # the scripts and arguments of all

    def __init__(self, command, env, stdout, **_):
        Fork.started.append(command[1:])
        self.process = fork(os.getcwd(), command[1:], stdout.name, stdout.name, env)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()


class Crash(BaseException):
    """Simulates the sudden end of the process."""


def crashed(work, folder, *steps, moments=("before", "after")):
    """Runs work(out) in new folders, each with a crash elsewhere, then again. Yields the folders.

    steps: (owner, name) of functions at whose calls it crashes: before the first call, before the
    second and so on, as long as there is one; then the same after a call.
    """
    for moment in moments:
        for at in itertools.count():
            out, calls = folder / f"{moment}_{at}", itertools.count()

            def breaking(real, moment=moment, at=at, calls=calls):
                def step(*args):
                    n = next(calls)
                    if n == at and moment == "before":
                        raise Crash
                    value = real(*args)
                    if n == at:
                        raise Crash
                    return value
                return step

            with pytest.MonkeyPatch.context() as patch:
                for owner, name in steps:
                    patch.setattr(owner, name, breaking(getattr(owner, name)))
                try:
                    work(out)
                    break
                except Crash:
                    pass
            work(out)
            yield out


def result(done):
    """The JSON object on the last line of stdout."""
    return json.loads(done.stdout.strip().splitlines()[-1])


def refused(done, *parts):
    """The command failed with one clear message that holds all parts, and without a traceback."""
    text = done.stdout + done.stderr
    assert done.returncode not in (0, -signal.SIGSEGV, -signal.SIGABRT), text
    assert "Traceback" not in text, text
    for part in parts:
        assert part in text, f"{part!r} missing in:\n{text}"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Byte-level bins of 60 kB of made-up prose; 40 documents."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    nouns = ["cat", "river", "model", "concept", "reader", "stone"]
    verbs = ["sees", "reads", "keeps", "follows"]
    for n in range(40):
        sentences = [f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}."
                     for _ in range(60)]
        (folder / f"{n:02}.txt").write_text(" ".join(sentences))
    call("prepare.py", f"--input={folder}/*.txt", f"--out_dir={folder}/bins", "--tokenizer=byte",
         "--val_fraction=0.2", "--num_proc=1")
    return folder / "bins"
