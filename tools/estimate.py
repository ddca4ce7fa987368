"""What a run needs before it is started: memory, time, money, disk. For bench.py --estimate=1.

One step of the model runs on tensors without contents (torch's FakeTensorMode), with 1 row and with
4. Two libraries of torch look on: MemTracker says what is in memory at the fullest moment,
flop_counter what each operation computes. All grows evenly with the rows, and with the layers.

    time = sum over operations of max(FLOPs / (GEMM_SHARE x peak), bytes / (BYTE_SHARE x bandwidth))

(the roofline model, Williams et al. 2009), then what the processes tell each other about gradients.
On a GPU torch.compile fuses operations: those that are no matrix product then move FUSED of their
bytes. The shares are assumptions for GPUs and were fitted on a CPU (records/scale).
"""

import contextlib
import math
import os
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from data.reader import parse_batch_schedule
from data.tokenizer import Tokenizer
from lib import kernels
from lib.files import say
from lib.machine import autocast, matmul_peak, memory_gib, resident_gib, wait_for
from lib.parallel import recompute
from lib.settings import build_model, check_settings, model_settings
from masking import predicted_share, slots

GIB, BERT_VOCABULARY = 2**30, 30522


@dataclass
class Gpu:
    """A card: memory in GiB, dense bf16 products with fp32 sums in TFLOP/s, memory bandwidth and
    that between cards in GB/s, and what renting one costs in USD an hour.
    """
    title: str
    memory: float
    tflops: float
    bandwidth: float
    link: float
    usd: float


# From NVIDIA's data sheets and architecture papers. The links are PCIe or NVLink, the prices those
# of rented pods, roughly: --usd_per_hour gives yours.
GPUS = {
    "rtx3070": Gpu("RTX 3070", 8, 40.6, 448, 10, 0.13),
    "rtx3090": Gpu("RTX 3090", 24, 71.2, 936, 10, 0.22),
    "rtx4090": Gpu("RTX 4090", 24, 165.2, 1008, 20, 0.34),
    "a100": Gpu("A100 80 GB", 80, 312, 2039, 250, 1.19),
    "l40s": Gpu("L40S", 48, 362, 864, 20, 0.79),
    "h100": Gpu("H100 SXM", 80, 989, 3350, 350, 2.39),
    "h200": Gpu("H200 SXM", 141, 989, 4800, 350, 3.29),
}
GEMM_SHARE = {"cuda": 0.6, "cpu": 0.76}  # of the peak that matrix products reach
BYTE_SHARE = {"cuda": 0.75, "cpu": 0.38}  # of the bandwidth that other operations reach
FUSED = {"cuda": 0.5, "cpu": 1.0}  # bytes that are left to move after torch.compile
LAUNCH = {"cuda": 4e-6, "cpu": 1e-6}  # seconds that an operation takes at least
# GiB that a process needs beside its tensors: CUDA and its libraries; on a CPU torch's own, and
# what oneDNN and the allocator hold.
BESIDE = {"cuda": 1.0, "cpu": 0.03}
FRAGMENTS = 1.1  # memory that allocators hold, over what tensors need
ERROR = {"cuda": 0.5, "cpu": 0.15}  # stated, of tokens_per_s
ERROR_OF_MEMORY = 0.15
NO_WORK = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "lift_fresh"}


class Operations(TorchDispatchMode):
    """Lists the operations that run -> self.found [(FLOPs, bytes read and written)]."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_work = func.namespace == "aten" and not func.is_view
        if is_work and func._schema.name.split("::")[1] not in NO_WORK:
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            moved = sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out))
                        if isinstance(t, torch.Tensor))
            self.found.append((flops, moved))
        return out


# ---- one step ---------------------------------------------------------------------


class Step:
    """A training step of the model that settings of train.py describe, on ids that say nothing.

    tok: its vocabulary; rows: of a micro-batch.
    """

    def __init__(self, settings, tok, rows, device="cpu"):
        self.dtype = "bf16" if settings["dtype"] == "auto" else settings["dtype"]
        self.device, self.settings = torch.device(device), settings
        with self.device:
            self.model = build_model(model_settings(settings["arch"], settings, tok)).train()
            recompute(self.model, settings["checkpoint_every"])
            self.optimizer = self.make_optimizer()
            T = settings["block_size"]
            self.K = n_predicted(settings)
            ids = torch.randint(2, tok.n_vocab, (rows, T))
            positions = torch.arange(self.K).expand(rows, -1)
            self.batch = (ids, positions, ids[:, :self.K], torch.ones(rows, self.K),
                          torch.tensor(float(rows * self.K)))

    def make_optimizer(self):
        """Moments as train.py has them: two for AdamW, one for matrices under Muon."""
        matrices = [p for name, p in self.model.named_parameters()
                    if p.ndim == 2 and name.endswith(".weight")]
        if self.settings["optimizer"] != "muon":
            return torch.optim.AdamW(self.model.parameters(), fused=True)
        return torch.optim.SGD(matrices, lr=0.01, momentum=0.9)

    def run(self):
        self.add_gradients()
        self.update()

    def make_moments(self):
        """The optimizer's state, which its first update makes."""
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.update()

    def add_gradients(self):
        """One micro-batch."""
        with autocast(self.device, self.dtype):
            loss = self.model(*self.batch)
        loss.backward()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def n_predicted(settings):
    """Predicted tokens of a row."""
    share = predicted_share(*(settings[key] for key in (
        "masking_type", "mlm_probability", "objective")))
    T = settings["block_size"]
    return T - 1 if settings["objective"] == "clm" else slots(T, share)


@contextlib.contextmanager
def chunks_of(kind):
    """Logits in chunks of the size that a GPU gets, on tensors that say they are on a CPU."""
    before = kernels.CHUNK["cpu"], kernels.BLOCK["cpu"]
    if kind == "cuda":
        kernels.CHUNK["cpu"], kernels.BLOCK["cpu"] = kernels.CHUNK["cuda"], 1
    try:
        yield
    finally:
        kernels.CHUNK["cpu"], kernels.BLOCK["cpu"] = before


def watched(settings, tok, rows, n_micro, kind):
    """One step -> ({part: bytes at the fullest moment}, [(FLOPs, bytes, times)] of operations).

    Of a deep model follow 2 and 4 layers: all grows evenly with the layers, too, where they are
    alike.
    """
    L = settings["n_layer"]
    alike = settings["checkpoint_every"] < 2 and not settings["local_window"]
    if L <= 6 or not alike or len(settings["mixers"]) > 1:
        parts, operations = followed(settings, tok, rows, n_micro, kind)
        return parts, [(*operation, 1) for operation in operations]
    (two, ops_two), (four, ops_four) = (
        followed(settings | dict(n_layer=n), tok, rows, n_micro, kind) for n in (2, 4))
    more = (L - 2) / 2
    return ({name: two[name] + more * (four[name] - two[name]) for name in two},
            [(*found, 1 - more) for found in ops_two] + [(*found, more) for found in ops_four])


def followed(settings, tok, rows, n_micro, kind):
    """One step without contents -> ({part: bytes at the fullest moment}, [(FLOPs, bytes)])."""
    with FakeTensorMode(), chunks_of(kind):
        step = Step(settings, tok, rows)
        step.make_moments()
        tracker, operations = MemTracker(), Operations()
        # Operations are those of one micro-batch and the update. The fullest moment is in the last
        # micro-batch: of several, the gradients of those before it are there, too.
        if n_micro > 1:
            with operations:
                step.add_gradients()
        tracker.track_external(step.model, step.optimizer)
        with tracker:
            with operations if n_micro == 1 else contextlib.nullcontext():
                step.add_gradients()
            with operations:
                step.update()
    [found] = tracker.get_tracker_snapshot("peak").values()
    named = {str(key).rpartition(".")[2]: size for key, size in found.items()}
    return dict(weights=named["PARAM"] + named["BUFFER"], gradients=named["GRAD"],
                optimizer=named["OPT"],
                activations=named["ACT"] + named["TEMP"] + named["OTH"]), operations.found


def logits_bytes(rows, K, V, kind, row_by_row):
    """Logits that exist at once: of a block in the dtype of products, of a chunk twice in fp32.

    row_by_row: each row has logits of its own (lexicon, copy head), so a chunk is of one row.
    """
    chunk = kernels.CHUNK[kind]
    block = chunk * kernels.BLOCK.get(kind, 1)
    if row_by_row:
        chunk = min(chunk, K * V)
    return 2 * min(rows * K * V, block) + 8 * min(rows * K * V, chunk)


# ---- any number of rows --------------------------------------------------------------


class Forecast:
    """Memory and time of a step for any micro-batch, from steps of 1 and 4 rows.

    settings: of train.py. tok: vocabulary. kind: "cuda" or "cpu". n_micro: micro-batches of a step,
    2 for more. Units: bytes, seconds, FLOP/s, bytes a second.
    """

    def __init__(self, settings, tok, kind, n_micro):
        self.settings, self.kind = settings, kind
        with torch.device("meta"):
            model = build_model(model_settings(settings["arch"], settings, tok))
        self.params, self.V = model.num_params(), model.cfg.vocab_size
        cfg = model.cfg
        self.row_by_row = getattr(cfg, "has_lexicon", False) or getattr(cfg, "copy_head", False)
        self.T, self.K = settings["block_size"], n_predicted(settings)
        self.flops_per_token = model.flops_per_token
        self.one, self.four = (watched(settings, tok, rows, n_micro, kind) for rows in (1, 4))

    def memory(self, rows, n_shards=1):
        """Bytes by part, of one process. n_shards: processes that share weights and moments."""
        parts = {}
        for name, at_one in self.one[0].items():
            at_four = self.four[0][name]
            if name == "activations":
                at_one, at_four = (max(0, found - self.logits(n)) for n, found in (
                    (1, at_one), (4, at_four)))
                parts[name] = at_one + (rows - 1) * (at_four - at_one) / 3
            else:
                parts[name] = at_four / n_shards
        return parts | dict(logits=self.logits(rows))

    def logits(self, rows):
        return logits_bytes(rows, self.K, self.V, self.kind, self.row_by_row)

    def total(self, rows, n_shards=1):
        """GiB of a process."""
        found = sum(self.memory(rows, n_shards).values())
        return found * FRAGMENTS / GIB + BESIDE[self.kind]

    def largest(self, gib, most, n_shards=1):
        """The most rows, dividing `most`, that fit into so many GiB; 0: not one."""
        fits = [n for n in range(1, most + 1) if most % n == 0 and self.total(n, n_shards) <= gib]
        return max(fits, default=0)

    def seconds(self, rows, peak, bandwidth):
        """Of one micro-batch."""
        at_one, at_four = (self.seconds_of(found, peak, bandwidth)
                           for _, found in (self.one, self.four))
        # what the model counts and no operation shows: attention kernels and Fourier transforms
        shown = sum(flops * times for flops, _, times in self.four[1])
        hidden = max(0, 4 * self.T * self.flops_per_token(self.T, self.K, 4) - shown) / 4
        return (at_one + (rows - 1) * (at_four - at_one) / 3
                + rows * hidden / (GEMM_SHARE[self.kind] * peak))

    def seconds_of(self, operations, peak, bandwidth):
        gemm, byte = GEMM_SHARE[self.kind] * peak, BYTE_SHARE[self.kind] * bandwidth
        return sum(times * max(flops / gemm, moved * (1 if flops else FUSED[self.kind]) / byte,
                               LAUNCH[self.kind]) for flops, moved, times in operations)


# ---- a whole run ---------------------------------------------------------------------


def tokenizer_of(settings):
    """-> the data's tokenizer, or a stand-in of BERT's size, and which of the two, in words."""
    path = os.path.join(settings["data_dir"].split(",")[0], "tokenizer")
    if os.path.isdir(path):
        return Tokenizer.load(path), f"vocabulary of {settings['data_dir']}"
    size = settings["vocab_size"] or BERT_VOCABULARY
    return (SimpleNamespace(vocab_size=size, n_vocab=size, mask_id=0, eot_id=1),
            f"{size:,}-word vocabulary, as {settings['data_dir']} is not prepared")


def tokens_of(settings):
    """Input tokens of the whole run, if max_minutes does not end it earlier."""
    rows = settings["batch_size"]
    if settings["batch_schedule"]:
        rows = float(sum(n * share for n, share in parse_batch_schedule(
            settings["batch_schedule"], rows)))
    tokens = round(settings["max_steps"] * rows * settings["block_size"])
    return min(tokens, settings["max_tokens"] or tokens)


def hours_at(tokens_per_s, settings):
    """How long the run takes at this rate."""
    hours = tokens_of(settings) / tokens_per_s / 3600
    return min(hours, settings["max_minutes"] / 60) if settings["max_minutes"] else hours


def run_on(forecast, gpu, n_gpu, usd_per_hour=0.0):
    """What the run needs on n_gpu of these cards -> {"micro_batch", "memory_gib", ...}.

    micro_batch 0: not even one row fits, and the rest is None.
    """
    settings, kind = forecast.settings, forecast.kind
    n_shards = n_gpu if settings["parallel"] == "fsdp" else 1
    rows = settings["batch_size"] // n_gpu
    usable = gpu.memory * (0.95 if kind == "cuda" else 1.0)
    micro = forecast.largest(usable, rows, n_shards)
    if not micro:
        return dict(micro_batch=0, memory_gib=round(forecast.total(1, n_shards), 2),
                    tokens_per_s=None, hours=None, usd=None)
    n_micro = rows // micro
    seconds = n_micro * forecast.seconds(micro, gpu.tflops * 1e12, gpu.bandwidth * 1e9)
    # One byte of each weight from card to card. What is sent while a card computes costs nothing.
    byte = forecast.params * (n_gpu - 1) / n_gpu / (gpu.link * 1e9)
    if n_shards > 1:  # weights in bf16, forwards and backwards, and gradients: each micro-batch
        seconds = max(seconds, n_micro * (2 + 2 + 4) * byte)
    else:  # gradients, nearly twice, during the last backward pass: two thirds of a micro-batch
        seconds += max(0.0, 2 * 4 * byte - seconds / n_micro * 2 / 3)
    # the optimizer reads and writes weights, gradients and two moments
    seconds += 28 * forecast.params / n_shards / (BYTE_SHARE[kind] * gpu.bandwidth * 1e9)
    rate = settings["batch_size"] * settings["block_size"] / seconds
    hours = hours_at(rate, settings)
    return dict(micro_batch=micro, memory_gib=round(forecast.total(micro, n_shards), 2),
                tokens_per_s=round(rate), hours=round(hours, 2),
                usd=round(hours * n_gpu * (usd_per_hour or gpu.usd), 2))


def this_cpu(dtype):
    """This machine's CPU as a Gpu: peak and bandwidth are measured, the memory is what is there."""
    device = torch.device("cpu")
    peak = matmul_peak(device, dtype, seconds=1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Gpu("this CPU", memory, peak / 1e12, elementwise_rate() / 1e9, 1e3, 0.0)


def elementwise_rate(n=2**21, seconds=0.5):
    """Bytes a second that an operation without matrix products moves, on tensors of 8 MiB."""
    a, b, out = (torch.ones(n) for _ in range(3))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mul(a, b, out=out)
        best = max(best, 3 * 4 * n / (time.perf_counter() - start))
    return best


def measured(settings, tok, rows, device, n_steps=20):
    """Real steps here -> {"tokens_per_s", "memory_gib"} of one process."""
    before = 0.0 if device.type == "cuda" else resident_gib()
    step = Step(settings, tok, rows, device)
    for _ in range(2):
        step.run()
    wait_for(device)
    start = time.perf_counter()
    for _ in range(n_steps):
        step.run()
    wait_for(device)
    seconds = (time.perf_counter() - start) / n_steps
    return dict(tokens_per_s=round(rows * settings["block_size"] / seconds),
                memory_gib=round(memory_gib(device) - before, 2))


# ---- the answer ----------------------------------------------------------------------


def disk_gib(settings, params):
    """Checkpoints (two, one being written and the best weights) and bins of all tokens."""
    bins = [os.path.join(folder, name) for folder in settings["data_dir"].split(",")
            for name in ("train.bin", "val.bin")]
    there = [os.path.getsize(path) for path in bins if os.path.exists(path)]
    return (3 * 12 * params + 4 * params + (sum(there) or 2 * tokens_of(settings))) / GIB


def estimate(settings, defaults, gpu, n_gpu, usd_per_hour, measure, device):
    """Prints tables -> the numbers for `gpu`, as one JSON object. Raises ValueError.

    settings, defaults: of train.py. gpu: a name in GPUS, or cpu. measure: 20 real steps on `device`
    stand beside the estimate, and in its place where that is the machine asked about.
    """
    if gpu not in (*GPUS, "cpu"):
        raise ValueError(f"gpu={gpu!r}: expected {', '.join(GPUS)} or cpu, this machine's")
    if n_gpu < 1 or usd_per_hour < 0:
        raise ValueError(f"n_gpu={n_gpu}, usd_per_hour={usd_per_hour}: expected 1 or more, and 0 "
                         "or more")
    check_settings(settings | dict(micro_batch=1), defaults, n_gpu)
    tok, which = tokenizer_of(settings)
    kind = "cpu" if gpu == "cpu" else "cuda"
    dtype = "bf16" if settings["dtype"] == "auto" else settings["dtype"]
    n_micro = min(2, max(1, settings["batch_size"] // n_gpu // settings["micro_batch"]))
    say("following one step on tensors without contents: some 20 seconds")
    forecast = Forecast(settings, tok, kind, n_micro)
    cards = {"cpu": this_cpu(dtype)} if kind == "cpu" else GPUS
    if kind == "cuda" and dtype in ("fp32", "float32"):  # TF32, at half the rate of bf16
        cards = {name: replace(card, tflops=card.tflops / 2) for name, card in GPUS.items()}
    found = {name: run_on(forecast, card, n_gpu, usd_per_hour if name == gpu else 0.0)
             for name, card in cards.items()}
    chosen = found[gpu] | dict(params=forecast.params,
                               disk_gib=round(disk_gib(settings, forecast.params), 2))
    n_shards = n_gpu if settings["parallel"] == "fsdp" else 1
    parts = forecast.memory(max(1, chosen["micro_batch"]), n_shards)
    T = settings["block_size"]
    share = predicted_share(*(settings[name] for name in (
        "masking_type", "mlm_probability", "objective")))
    say(f"{forecast.params:,} parameters ({which}), "
        f"{forecast.flops_per_token(T, math.ceil(share * T), 1) / 1e6:,.1f} MFLOP a token, "
        f"{tokens_of(settings):,} tokens in rows of {T:,}, {dtype}"
        + (f", ended after {settings['max_minutes']:g} minutes" if settings["max_minutes"] else "")
        + "\n")
    say(f"| {n_gpu} x | GiB of each | of these needed | micro-batch | tokens/s | hours | USD |\n"
        "|---|---:|---:|---:|---:|---:|---:|")
    for name, card in cards.items():
        row = found[name]
        shown = [f"{row[key]:,}" if row[key] is not None else "does not fit"
                 for key in ("tokens_per_s", "hours", "usd")]
        say(f"| {card.title} | {card.memory:.0f} | {row['memory_gib']:.2f} | "
            f"{row['micro_batch'] or '-'} | {' | '.join(shown)} |")
    say(f"\nmemory of one {cards[gpu].title} at its fullest moment, GiB: " + ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in parts.items())
        + f", beside them {BESIDE[kind]:.2f}")
    say(f"disk: {chosen['disk_gib']:.1f} GiB for checkpoints and bins")
    say(f"memory within {ERROR_OF_MEMORY:.0%}; tokens/s within {ERROR[kind]:.0%}"
        + (", assumed and not measured on GPUs" if kind == "cuda" else ""))
    result = chosen | dict(parts={name: round(size / GIB, 3) for name, size in parts.items()},
                           error=dict(memory_gib=ERROR_OF_MEMORY, tokens_per_s=ERROR[kind]),
                           gpus=found)
    if measure:
        rows = min(settings["micro_batch"], settings["batch_size"])
        real = measured(settings, tok, rows, device)
        say(f"20 real steps of {rows} rows on {device}: {real['tokens_per_s']:,} tokens/s, "
            f"{real['memory_gib']:.2f} GiB")
        result |= dict(measured=real | dict(micro_batch=rows, device=str(device)))
        if device.type == kind:
            hours = hours_at(n_gpu * real["tokens_per_s"], settings)
            price = usd_per_hour or cards[gpu].usd
            result |= dict(tokens_per_s=n_gpu * real["tokens_per_s"], hours=round(hours, 2),
                           usd=round(hours * n_gpu * price, 2))
    return result
