"""Where a command runs: device, processes, dtype, memory, signals."""

import builtins
import contextlib
import ctypes
import faulthandler
import gc
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from lib.files import say

JOIN_MINUTES = 10.0  # that the processes of a run wait for each other at the start
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---- device and processes -----------------------------------------------------------------------

@dataclass
class Machine:
    """The device of this process, and its place among the processes that torchrun started."""
    device: torch.device
    rank: int
    world_size: int

    @property
    def is_main(self):
        return self.rank == 0

    def say(self, *words):
        """Prints once, not once per process."""
        if self.is_main:
            say(*words)

    def take(self, tensors):
        """CPU tensors -> the same on this device; a GPU goes on computing during the copy."""
        if self.device.type == "cuda":
            tensors = [t.pin_memory() for t in tensors]
        return [t.to(self.device, non_blocking=True) for t in tensors]

    def all_sum(self, *values):
        """Sums numbers or scalar tensors over all processes -> list of float."""
        # on the CPU, by gloo: a CUDA tensor would have the host wait for the GPU
        total = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def close(self):
        """Ends the process group; its threads must not outlive the interpreter.

        Drop references to a DistributedDataParallel before the call: it holds on to the group.
        """
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()
            gc.collect()


def find_machine(device="auto", row=0, parallel=False, hang_minutes=0.0):
    """Device and process group -> Machine. row: tokens in the longest row, for the memory settings.

    parallel: whether the command shares its work between the processes that torchrun started. They
    talk by nccl between GPUs and by gloo between CPUs. hang_minutes: of end_if_it_hangs; 0: not
    used. Raises ValueError for a device that is not there.
    """
    keep_freed_memory(long_rows=row > 8192)
    stop_with_parent()
    rank, world_size = 0, 1
    # Only for commands that can use them: the variables stay behind in the shells of some pods.
    if parallel:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
        else:
            device = "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no usable GPU here; use --device=cpu or "
                         "--device=auto")
    if device not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device={device!r}: expected auto, cuda, mps or cpu")
    # gloo beside nccl: all_sum sums on the CPU
    if world_size > 1:
        if rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:
            say(f"waiting for {world_size} processes, because RANK and WORLD_SIZE are set here; "
                "without torchrun, unset them")
        join("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", rank, world_size, hang_minutes)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    return Machine(torch.device(device), rank, world_size)


def join(backend, rank, world_size, hang_minutes):
    """Makes this process one of a group. ValueError if the others do not come in JOIN_MINUTES."""
    # Later than end_if_it_hangs, which says where the hanging process is: those that wait for it
    # must not end before it has.
    timeout = timedelta(minutes=2 * hang_minutes) if hang_minutes else None
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        # by hand, because the time to wait for the others is not that for a message from them
        store, _, _ = next(rendezvous("env://", rank, world_size,
                                      timeout=timedelta(minutes=JOIN_MINUTES)))
        store.set_timeout(default_pg_timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=timeout)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"process {rank} of {world_size} waited {JOIN_MINUTES:g} minutes at "
                         f"{place}: {reason} Start the same command on every machine, and see that "
                         "all of them reach this address and port") from None


# ---- dtype --------------------------------------------------------------------------------------

def choose_dtype(name, device):
    """"auto", "bf16", "fp16" or "fp32" -> (one of the last three, the reason, to be printed).

    torch's own names bfloat16, float16 and float32 are taken too. Raises ValueError for a name that
    does not exist or that the device cannot compute.
    """
    names_of_torch = {str(dtype).removeprefix("torch."): ours for ours, dtype in DTYPES.items()}
    name = names_of_torch.get(name, name)
    has_bf16 = False
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r}: expected auto, {', '.join(DTYPES)}")
        if name == "fp16" and device.type != "cuda":
            raise ValueError("dtype=fp16 needs a CUDA GPU; use --dtype=bf16 or --dtype=fp32")
        if name == "bf16" and device.type == "cuda" and not has_bf16:
            raise ValueError(f"dtype=bf16, but {torch.cuda.get_device_name()} has no bf16; "
                             "use --dtype=fp16")
        return name, "as asked"
    # auto: bf16 where the hardware multiplies it. fp16 is as fast but needs loss scaling.
    if device.type == "cuda":
        if has_bf16:
            return "bf16", f"{torch.cuda.get_device_name()} has it"
        return "fp16", f"{torch.cuda.get_device_name()} has no bf16; with loss scaling"
    # without these instructions a CPU emulates bf16 and is slower than with fp32
    if device.type == "cpu":
        flags = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return "bf16", "this CPU multiplies bf16 matrices four times as fast as fp32"
        return "fp32", "this CPU has no bf16 instructions"
    return "fp32", f"safe choice on {device.type}"


def autocast(device, dtype):
    """Context in which matrix products run in `dtype` ("bf16", "fp16"); "fp32" changes nothing."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


def be_deterministic(wanted):
    """Only operations whose result is the same bits at each run; others raise an error."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


# ---- speed and memory ---------------------------------------------------------------------------

def matmul_peak(device, dtype, n=1024, seconds=0.1):
    """FLOP/s of n x n matrix products, the best of `seconds`: 100 % when MFU is computed.

    Measured, because data-sheet numbers exist for GPUs only and few machines reach them.
    """
    # no random numbers: drawing them would change those that training draws
    a = torch.full((n, n), 0.5, device=device, dtype=DTYPES[dtype])
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        wait_for(device)
        start = time.perf_counter()
        a @ a
        wait_for(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def wait_for(device):
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def keep_freed_memory(long_rows):
    """Sets glibc to keep up to 1 GiB of freed memory instead of returning it after each step.

    Getting it back from the kernel, page by page, took a sixth of a step (records/speed). Rows of
    more than 8,192 tokens need far more than 1 GiB, so torch takes huge pages there, of which there
    are 512 times fewer. For short rows huge pages bring nothing and cost a tenth more memory.
    """
    if long_rows:
        # torch reads it at its first allocation
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        # M_MMAP_THRESHOLD, at its largest. glibc adapts it only until a threshold is set by hand.
        mallopt(-3, 2**25)


def memory_gib(device):
    """Peak memory of this process in GiB: of the GPU, on a CPU resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resident_gib(peak=True)


def resident_gib(peak=False):
    """Resident memory of this process in GiB, now or at its peak. Always the peak outside Linux."""
    # not getrusage on Linux: there the peak of a child process starts at that of its parent
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
        kib = int(status["VmHWM" if peak else "VmRSS"].split()[0])
        return kib / 2**20
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, else KiB


def is_out_of_memory(error):
    """Whether a RuntimeError says that memory ran out, of a GPU or of this machine."""
    # on a CPU torch raises a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


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


# ---- signals ------------------------------------------------------------------------------------

PARENT = "STOPS_WITH_PARENT"  # environment variable: the process that lib/jobs.py started this from


def stop_with_parent():
    """SIGTERM for this process when torchrun or the command that started it is gone. Linux only.

    A launcher that was killed would leave processes behind that nobody waits for and that keep the
    folder of their run locked.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(PARENT) == str(os.getppid()):
        with contextlib.suppress(OSError, AttributeError):  # no glibc
            ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_if_it_hangs(minutes):
    """Ends the process unless this is called again within `minutes`; 0 takes that back.

    A collective operation, a disk or a driver may never answer, and nobody looks at a run at night.
    The stacks of all threads go to stderr first; they say where it was.
    """
    faulthandler.cancel_dump_traceback_later()
    if minutes and not hasattr(builtins, "__IPYTHON__"):  # a notebook would end with it
        faulthandler.dump_traceback_later(60 * minutes, exit=True, file=2)


class StopSignals:
    """Notes a signal in `name`, "" before; the training loop reads it each step.

    SIGTERM and SIGUSR1 come from schedulers, SIGINT from Ctrl-C, SIGHUP from a terminal or
    connection that is gone. Stopping in the middle of a step would leave the processes waiting for
    each other. torchrun passes a signal on and kills 30 s later. A second SIGINT, or a signal
    before the first step, ends the program at once.
    """

    def __init__(self):
        self.name = ""
        self.is_training = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            # nohup starts programs with SIGHUP ignored: they are to go on without a terminal
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.note)

    def wait_for_step(self):
        """From now on a signal waits for the end of the step."""
        self.is_training = True

    def note(self, number, _frame):
        name = signal.Signals(number).name
        if not self.is_training:
            sys.exit(f"stopped by {name} before the first step: nothing has changed")
        if self.name and number == signal.SIGINT:
            sys.exit("stopped by a second SIGINT, without saving: the same command goes on from "
                     "the latest checkpoint")
        self.name = name
