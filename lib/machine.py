"""Where a command runs: device, processes, dtype, memory, signals."""

import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Machine:
    """Where a command runs: this process's device and its place among the processes torchrun started."""
    device: torch.device
    rank: int
    world_size: int

    @property
    def is_main(self):
        return self.rank == 0

    def say(self, *words):
        if self.is_main:
            print(*words, flush=True)

    def take(self, tensors):
        """CPU tensors -> the same on this device, copied while it works."""
        if self.device.type == "cuda":
            tensors = [t.pin_memory() for t in tensors]
        return [t.to(self.device, non_blocking=True) for t in tensors]

    def all_sum(self, *values):
        """Sums numbers or scalar tensors over all processes -> list of float."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)  # on the CPU: no GPU is waited for
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def close(self):
        """Ends the process group, whose threads must not outlive the interpreter: let go of what holds it before."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()
            gc.collect()


def keep_freed_memory(long_rows):
    """Has glibc keep up to 1 GiB that it hands back after each step: to get it again is a sixth of the next.

    Long rows need far more, but as large pages a five-hundredth as many; short rows a tenth more memory, for nothing.
    """
    if long_rows:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks when it needs memory for the first time
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its largest; setting the other fixes it where it is


def find_machine(device="auto", row=0):
    """Device and process group, for rows of so many tokens. Under torchrun: nccl between GPUs, gloo between CPUs."""
    keep_freed_memory(long_rows=row > 8192)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no usable GPU here; use --device=cpu or --device=auto")
    if device not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device={device!r}: expected auto, cuda, mps or cpu")
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return Machine(torch.device(device), rank, world_size)


def choose_dtype(name, device):
    """ "auto" | bf16 | fp16 | fp32 -> (name, why), which a command prints."""
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r}: expected auto, {', '.join(DTYPES)}")
        if name == "fp16" and device.type != "cuda":
            raise ValueError("dtype=fp16 needs a CUDA GPU; use --dtype=bf16 or --dtype=fp32")
        if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"dtype=bf16, but {torch.cuda.get_device_name()} has no bf16; use --dtype=fp16")
        return name, "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{torch.cuda.get_device_name()} has it"
        return "fp16", f"{torch.cuda.get_device_name()} has no bf16; with loss scaling"
    if device.type == "cpu":
        flags = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return "bf16", "this CPU multiplies bf16 matrices four times as fast as fp32"
        return "fp32", "this CPU has no bf16 instructions"
    return "fp32", f"safe choice on {device.type}"


def autocast(device, dtype):
    return torch.autocast(device.type, DTYPES[dtype]) if dtype != "fp32" else contextlib.nullcontext()


def matmul_peak(device, dtype, n=2048, seconds=0.3):
    """Measured FLOP/s of n x n matrix products, the yardstick for MFU: no table of data-sheet numbers to maintain."""
    a = torch.full((n, n), 0.5, device=device, dtype=DTYPES[dtype])  # no random numbers: training draws them
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        wait()
        start = time.perf_counter()
        a @ a
        wait()
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def memory_gib(device):
    """Peak memory of this process: GPU memory there, resident memory on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else resident_gib(peak=True)


def resident_gib(peak=False):
    """Memory of this process, or the most it ever had. Linux tells both; elsewhere the most stands for both."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:  # not getrusage: it starts at the most the parent process had
            status = dict(line.split(":", 1) for line in file)
        return int(status["VmHWM" if peak else "VmRSS"].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


def is_out_of_memory(error):
    """Whether a RuntimeError says that memory ran out, of a GPU or of this machine."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


# ---- signals ----------------------------------------------------------------

class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 set a flag; the loop looks at it once a step, when all processes agree.

    torchrun passes a signal on and kills 30 s later; a second SIGINT ends at once, as users expect.
    """
    def __init__(self):
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.note)

    def note(self, number, _frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
