"""Speed and memory, side by side in one run on one machine.

    python tools/bench.py                   strict, open and our Transformer, of equal parameters
    python tools/bench.py --peers=1         and BERT, ModernBERT, Perceiver of transformers
    python tools/bench.py --lengths=512 --models=strict,hf_bert --peers=1
    python tools/bench.py --lengths=512 --profile=1     where the time goes: a table and a trace
    python tools/bench.py --length=1        how time and memory grow up to rows of 131,072 tokens
    python tools/bench.py --race=1          loss against minutes, beside the Trainer of transformers
    python tools/bench.py --estimate=1 config/small.py --gpu=rtx3090 --n_gpu=4     before training

The last two are tools/race.py and tools/estimate.py. Without them it times a training step at the
shape of micro_balanced (forward, backward, clipping, AdamW) with `tokens` tokens a step, and
without gradients the filling of one mask and the encoding of rows. All models have about as many
parameters as strict, and its vocabulary, row length and dtype. Each runs in a process of its own,
so that its peak memory is its own. The processes work one at a time, in turns, so that another load
on the machine slows all of them alike. Medians are reported.

Writes out_dir/{bench.json, bench.png}. The last line on stdout is JSON:
{"512": {"strict": {"tokens_per_s", "peak_mb", ...}, "open": ...}, ..., "ratios", "data"}.
"""

# ---- settings ---------------------------------------------------------------
peers = False  # also transformers' models, and its whole-word collator beside our masking
models = ""  # of those that tools/peers.py lists, with commas between; empty: all
lengths = "128,512,2048,8192,32768"  # tokens a row, T, several with commas between
length = False  # instead, small models that mix tokens in four ways, in rows of 512 to 131,072
tokens = 4096  # tokens a training step; rows longer than this come one at a time
mlm_probability = 0.15  # share of tokens that is predicted
repeats = 3  # timed repeats of each model, after one to warm up; until they have taken 8 seconds
longest_step = 60.0  # seconds; a model with a slower step is left out from that length on
race = False  # instead, train all for race_minutes each and compare their losses
race_minutes = 10.0  # of each model
estimate = False  # instead, what a run needs; words that are not these four are train.py's
gpu = "rtx3090"  # rtx3070 | rtx3090 | rtx4090 | a100 | l40s | h100 | h200 | cpu, this one
n_gpu = 1  # of them
usd_per_hour = 0.0  # what one costs; 0: a rough price of rented ones
measure = False  # also 20 real steps on this machine
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
compile = False  # torch.compile
profile = False  # instead, the ten slowest operations at the first length, and out_dir/trace_*.json
data_dir = "data/pydocs"  # prepared data for the batch and masking figures
out_dir = "out/bench"  # bench.json, bench.png and traces go here
# -----------------------------------------------------------------------------
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure, read_settings

OF_ESTIMATE = ("gpu", "n_gpu", "usd_per_hour", "measure")
own, of_training = sys.argv[1:], []
if any(word.partition("=")[0] == "--estimate" for word in own):
    names = ("--estimate", *(f"--{name}" for name in OF_ESTIMATE), "--help", "-h")
    of_training = [word for word in own if word.partition("=")[0] not in names]
    own = [word for word in own if word not in of_training]
config = configure(globals(), own)

import importlib.util
import math
import multiprocessing
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib.files import check_outputs, print_result, say, write_json
from lib.machine import (
    DTYPES,
    autocast,
    choose_dtype,
    find_machine,
    matmul_peak,
    resident_gib,
)
from lib.run import user_mistakes
from masking import check_masking, slots
from tools import estimate as estimates
from tools import race as races
from tools.peers import (
    CAUSAL,
    LONG,
    OURS,
    PEERS,
    SMALL,
    VOCABULARY,
    bench_data,
    fitted_exponents,
)

MASK_ID = 103  # [MASK] of BERT's vocabulary
ENOUGH_SECONDS = 8  # after so many, a model is not timed again


# ---- one model, in a process of its own --------------------------------------------


class Bench:
    """A model, a batch of random ids, and what is timed. Each method does its work once."""

    def __init__(self, name, T):
        self.name, self.T = name, T
        self.machine = find_machine(device, T)
        self.dtype, _ = choose_dtype(dtype, self.machine.device)
        self.memory_before = resident_gib()  # torch and the libraries, not the model
        torch.manual_seed(0)
        self.ours = length or name in OURS
        build = LONG if length else OURS | PEERS
        self.model = build[name](T).to(self.machine.device).train()
        self.run = torch.compile(self.model) if compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.make_batch(n_rows=max(1, tokens // T))

    def make_batch(self, n_rows):
        """Ours take the predicted positions and their targets, transformers' models labels."""
        # Random ids do: time and memory depend on shapes alone. Those below 999 are special ids
        # and placeholders in BERT's vocabulary.
        self.n_slots = slots(self.T, mlm_probability)
        vocabulary = SMALL["vocab_size"] if length else VOCABULARY
        ids = torch.randint(999, vocabulary, (n_rows, self.T))
        if self.name in CAUSAL:
            self.n_slots = self.T - 1
            positions = torch.arange(self.T - 1).expand(n_rows, -1)
            targets, labels = ids[:, 1:], ids
        else:
            positions = torch.rand(n_rows, self.T).argsort(1)[:, :self.n_slots].sort(1).values
            targets = ids.gather(1, positions)
            labels = torch.full_like(ids, -100).scatter_(1, positions, targets)
            ids = ids.scatter(1, positions, MASK_ID)
        weights = torch.ones(n_rows, self.n_slots)
        batch = self.machine.take([ids, labels, positions, targets, weights])
        self.ids, self.labels, *self.predicted = batch

    def step(self):
        """A training step."""
        with autocast(self.machine.device, self.dtype):
            if self.ours:
                loss = self.run(self.ids, *self.predicted)
            else:
                loss = self.run(input_ids=self.ids, labels=self.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def freeze(self):
        """From here on without gradients, with the weights in the dtype itself."""
        if self.ours:
            self.model.freeze(DTYPES[self.dtype])
        else:
            self.model.to(DTYPES[self.dtype]).eval()

    @torch.inference_mode()
    def fill(self):
        """One row with one mask -> its logits."""
        ids, place = self.ids[:1], self.predicted[0][:1, :1]
        if self.ours:
            return self.model.logits(self.model.decode(*self.model.encode(ids), place))
        return self.model(input_ids=ids).logits[:, place]

    @torch.inference_mode()
    def embed(self):
        """All rows through the encoder, without a head."""
        if self.ours:
            return self.model.encode(self.ids)
        return getattr(self.model, self.model.base_model_prefix)(self.ids)

    def wait(self):
        """Until the device has done all it was given."""
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, what, times):
        """Seconds that a method takes, the mean over `times` calls in a row.

        Short ones are called once before: some machines take memory from an idle process, and
        the first call after its turn has to get it back.
        """
        once = getattr(self, what)
        if self.T <= 2048:
            once()
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            once()
        self.wait()
        return (time.perf_counter() - start) / times

    def facts(self):
        """Does a first step. -> parameters, and training FLOPs an input token, in millions.

        FLOPs of ours are by their formula, which tests compare with the counter.
        """
        params = sum(p.numel() for p in self.model.parameters())
        if self.ours:
            self.step()
            flops = self.model.flops_per_token(self.T, self.n_slots, len(self.ids))
        else:
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                self.step()
            flops = counter.get_total_flops() / self.ids.numel()
        return dict(params=params, mflop_per_token=round(flops / 1e6, 1))

    def peak_mb(self):
        """Peak memory: of the GPU, or on a CPU above what the process held without a model."""
        if self.machine.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return (resident_gib(peak=True) - self.memory_before) * 1024

    def profiled(self):
        """Writes the trace of a step. -> a table of its ten slowest operations."""
        self.step()
        with torch.profiler.profile() as seen:
            self.step()
        seen.export_chrome_trace(os.path.join(out_dir, f"trace_{self.name}_{self.T}.json"))
        kind = "cuda" if self.machine.device.type == "cuda" else "cpu"
        return seen.key_averages().table(
            sort_by=f"self_{kind}_time_total", row_limit=10, max_name_column_width=48)


def attention_flops(q, k, v, *_, **__):
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(d, q, k, v, *_, **__):
    return sdpa_backward_flop_count(d, q, k, v)


# torch's counter knows the attention kernels of GPUs, but not those of CPUs.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def serve(pipe, settings, name, T):
    """What the process runs: builds the model and calls its methods, until it is stopped.

    settings: those of this command, which the process has not read from the command line.
    """
    globals().update(settings)
    try:
        bench = Bench(name, T)
        while True:
            what, *args = pipe.recv()
            pipe.send(getattr(bench, what)(*args))
    except EOFError:  # the command itself has ended
        return
    except (RuntimeError, ValueError) as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(RuntimeError(repr(error)))


class Worker:
    """A Bench in another process. Raises RuntimeError when it fails or when the process dies."""

    # Processes are forked from a server that has loaded what takes seconds to load.
    processes = multiprocessing.get_context("forkserver")

    def __init__(self, name, T):
        self.pipe, other = self.processes.Pipe()
        self.process = self.processes.Process(target=serve, args=(other, config, name, T),
                                              daemon=True)
        self.process.start()
        other.close()  # or the death of the process would not be noticed

    def ask(self, what, *args):
        """Calls a method of the Bench -> what it returns."""
        try:
            self.pipe.send((what, *args))
            answer = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            raise RuntimeError(f"its process died with code {self.process.exitcode}; "
                               "-9 is out of memory") from None
        if isinstance(answer, Exception):
            raise RuntimeError(str(answer).split("\n")[0]) from None
        return answer

    def stop(self):
        self.process.kill()
        self.process.join()


def load_in_server(names):
    """Names of models -> their modules are loaded once, before the first process is forked."""
    modules = ["tools.peers"]
    for name in names:
        if name.startswith("hf_"):
            family = name.removeprefix("hf_")
            modules.append(f"transformers.models.{family}.modeling_{family}")
    Worker.processes.set_forkserver_preload(modules)


# ---- lengths, one after the other -------------------------------------------------


def medians(workers, left_out, what, repeats, times=1):
    """{name: Worker} -> {name: median seconds of `times` calls in a row}.

    The workers take turns, `repeats` times. One that fails goes from workers to left_out.
    """
    seconds = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in list(workers.items()):
            if sum(seconds[name]) >= ENOUGH_SECONDS:
                continue
            try:
                seconds[name].append(worker.ask("timed", what, times))
            except RuntimeError as error:
                workers.pop(name).stop()
                left_out[name] = str(error)
    return {name: statistics.median(seconds[name]) for name in workers}


def start_workers(T, names, expected):
    """-> {name: Worker}, {name: its facts}, {name: why it is left out}."""
    workers, facts, left_out = {}, {}, {}
    for name in names:
        if expected.get(name, 0) > longest_step:
            left_out[name] = f"a step would take about {expected[name]:,.0f} s (--longest_step)"
            continue
        worker = Worker(name, T)
        try:  # the first step shows whether the model fits into memory
            facts[name], workers[name] = worker.ask("facts"), worker
        except RuntimeError as error:
            worker.stop()
            left_out[name] = str(error)
    return workers, facts, left_out


def bench_length(T, names, expected, peak):
    """Times training steps with rows of T tokens; up to 512 also filling and embedding.

    expected: {name: seconds a step, as far as known}. peak: FLOP/s of matrix products.
    -> {name: figures}, {name: why it is left out}.
    """
    n_tokens = max(1, tokens // T) * T
    workers, result, left_out = start_workers(T, names, expected)
    for name, seconds in medians(workers, left_out, "step", repeats).items():
        flops = result[name]["mflop_per_token"] * 1e6 * n_tokens
        result[name] |= dict(
            tokens_per_s=round(n_tokens / seconds), step_ms=round(seconds * 1e3, 1),
            peak_mb=round(workers[name].ask("peak_mb")),
            gemm_share=round(flops / seconds / peak, 3))
    # freeze() casts the weights, so the training steps have to be over by now.
    if T <= 512:
        for worker in workers.values():
            worker.ask("freeze")
        for name, seconds in medians(workers, left_out, "fill", 3 * repeats, 10).items():
            result[name]["fill_ms"] = round(seconds * 1e3, 2)
        for name, seconds in medians(workers, left_out, "embed", repeats).items():
            result[name]["embed_tokens_per_s"] = round(n_tokens / seconds)
    for worker in workers.values():
        worker.stop()
    return {name: result[name] for name in workers}, left_out


def extrapolate(known, T):
    """[(length, seconds a token)] -> seconds a token at T, on the line through the last two."""
    last, now = known[-1]
    if len(known) == 1:
        return now
    before, slow = known[-2]
    return now + max(0.0, now - slow) / max(1, last - before) * (T - last)


def bench_lengths(names, machine, dtype_name, peak):
    """Times all models at all lengths and prints a table. -> {str(T): {name: figures}}."""
    report = {}
    known = {}  # {name: [(T, seconds a token)]}
    for T in map(int, lengths.split(",")):
        n_rows = max(1, tokens // T)
        expected = {name: n_rows * T * extrapolate(points, T) for name, points in known.items()}
        # Measured again each time: a busy machine has less of it at one moment than at another.
        peak = max(peak, matmul_peak(machine.device, dtype_name, seconds=2))
        result, left_out = bench_length(T, names, expected, peak)
        report[str(T)] = result
        say(f"training step, {n_rows} rows of {T} tokens, {mlm_probability:.0%} predicted")
        for name, r in result.items():
            known.setdefault(name, []).append((T, 1 / r["tokens_per_s"]))
            fill = f"{r['fill_ms']:9,.1f} ms to fill a mask" if "fill_ms" in r else ""
            say(f"  {name:<14}{r['params']:>12,} parameters{r['tokens_per_s']:>9,} tokens/s"
                f"{r['step_ms']:>10,.0f} ms{r['peak_mb']:>8,} MB   {r['gemm_share']:.0%} of peak"
                f"{fill}")
        for name, why in left_out.items():
            say(f"  {name:<14}left out from here on: {why}")
        names = list(result)
    return report


# ---- the table, the picture, the run --------------------------------------------


def compare(report):
    """What is claimed elsewhere, as ratios of this run: {what: ratio}."""
    ratios = {}
    for T, result in report.items():
        for name in OURS:
            for figure in ("tokens_per_s", "peak_mb", "fill_ms"):
                for peer in PEERS:
                    if name in result and figure in result.get(peer, {}):
                        ratio = result[name][figure] / result[peer][figure]
                        ratios[f"{T}: {name} / {peer}, {figure}"] = round(ratio, 2)
    for name in OURS:
        at = {int(T): result[name]["tokens_per_s"] for T, result in report.items()
              if name in result}
        for T in at:
            if T > 2048 and 2048 in at:
                # 1: time is linear in the length of a row
                ratios[f"{name}: time a token at {T} / at 2048"] = round(at[2048] / at[T], 2)
    return ratios


def draw(report, path):
    """Tokens a second and peak memory against the length of a row, log-log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, label in zip(panels, ("tokens_per_s", "peak_mb"),
                                 ("tokens a second", "peak memory, MB")):
        for name in LONG if length else OURS | PEERS:
            points = [(int(T), r[name][key]) for T, r in report.items() if name in r]
            if points:
                panel.plot(*zip(*points), marker="o", markersize=4, label=name,
                           linestyle="--" if name in PEERS else "-")
        panel.set(xscale="log", yscale="log", xlabel="tokens a row", ylabel=label)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    title = "training step, one row, 2 layers of width 128" if length else (
        f"training step, {tokens} tokens or one row, equal parameters")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def chosen_models():
    """-> names of the models to time. Raises ValueError for settings that make no sense."""
    if length and (peers or profile or race):
        raise ValueError("length=true compares ways to mix tokens; leave out peers, profile and "
                         "race")
    numbers = lengths.split(",")
    if not all(T.isdecimal() and int(T) for T in numbers) or min(tokens, repeats) < 1:
        raise ValueError(f"lengths={lengths!r}, tokens={tokens}, repeats={repeats}: expected "
                         "numbers above 0, lengths with commas between, such as "
                         "--lengths=128,512")
    check_masking("token", mlm_probability)
    names = list(LONG) if length else [*OURS, *PEERS] if peers else list(OURS)
    if race:
        names = [*races.OURS, *races.TRAINER]
    wanted = models.split(",") if models else names
    if not set(wanted) <= set(names):
        hint = "" if peers or race else "; transformers' models need --peers=1"
        raise ValueError(f"models={models!r}: expected some of {', '.join(names)}{hint}")
    if (peers or race) and importlib.util.find_spec("transformers") is None:
        say("transformers is not installed, so its models are left out: "
            "pip install -r requirements-extra.txt")
        names = [name for name in names if not name.startswith("hf_")]
    return [name for name in names if name in wanted]


def check_modes():
    """Raises ValueError for settings that do nothing without the mode they belong to."""
    defaults = {name: default for name, (default, _) in read_settings(__file__).items()}
    for mode, names in (("estimate", OF_ESTIMATE), ("race", ("race_minutes",))):
        unread = [f"{name}={config[name]}" for name in names if config[name] != defaults[name]]
        if unread and not config[mode]:
            raise ValueError(f"{', '.join(unread)}: of {mode} only; give --{mode}=1 too")


def estimate_run():
    """What a run with the settings in `of_training` needs."""
    with user_mistakes():
        train = os.path.join(ROOT, "train.py")
        defaults = {name: default for name, (default, _) in read_settings(train).items()}
        settings = configure(dict(__file__=train, __name__="__main__"), of_training)
        machine = find_machine(device, settings["block_size"])
        print_result(estimates.estimate(settings, defaults, gpu, n_gpu, usd_per_hour, measure,
                                        machine.device))


def run_race():
    """Trains all for race_minutes -> out_dir/{race.json, race.png}."""
    with user_mistakes():
        names = chosen_models()
        if not 0 < race_minutes < math.inf:
            raise ValueError(f"race_minutes={race_minutes}: expected more than 0")
        TokenData(data_dir, "val", races.T, 0)  # raises if the data is not there
        check_outputs(out_dir, {"race.json": '"curve":', "race.png": "Matplotlib"})
        os.makedirs(out_dir, exist_ok=True)
        found = races.race(data_dir, out_dir, race_minutes, names, device, dtype)
        ratios = races.head_starts(found)
        races.draw(found, os.path.join(out_dir, "race.png"))
        write_json(os.path.join(out_dir, "race.json"), dict(models=found, ratios=ratios))
    for what, share in ratios.items():
        say(f"{share:>8.3f}  {what}")
    print_result(dict(out_dir=out_dir, ratios=ratios,
                      loss={name: result["curve"][-1][1] for name, result in found.items()}))


def main():
    global lengths
    with user_mistakes():
        check_modes()
    if estimate or race:
        return estimate_run() if estimate else run_race()
    if length and lengths == read_settings(__file__)["lengths"][0]:
        lengths = config["lengths"] = ",".join(str(512 << i) for i in range(9))
    with user_mistakes():
        machine = find_machine(device)
        dtype_name, reason = choose_dtype(dtype, machine.device)
        names = chosen_models()
        if not length:
            data = TokenData(data_dir, "train", 512, 0)
            tok = Tokenizer.load(os.path.join(data_dir, "tokenizer"))
        mark = '"exponents":' if length else '"ratios":'
        check_outputs(out_dir, {"bench.json": mark, "bench.png": "Matplotlib"})
        os.makedirs(out_dir, exist_ok=True)
    load_in_server(names)
    peak = matmul_peak(machine.device, dtype_name, seconds=2)
    say(f"torch {torch.__version__}, {machine.device}, {torch.get_num_threads()} threads, "
        f"{dtype_name} ({reason}), matmul peak {peak / 1e12:.2f} TFLOP/s, compile {compile}\n")
    if profile:
        for name in names:
            worker = Worker(name, int(lengths.split(",")[0]))
            say(f"{name}\n{worker.ask('profiled')}")
            worker.stop()
        print_result(dict(profiled=names, length=int(lengths.split(",")[0])))
        return
    report = bench_lengths(names, machine, dtype_name, peak)
    if length:
        report["exponents"] = fitted_exponents(report)
        draw({T: r for T, r in report.items() if T.isdigit()}, os.path.join(out_dir, "bench.png"))
        write_json(os.path.join(out_dir, "bench.json"), report)
        for name, slopes in report["exponents"].items():
            if slopes["time"] is not None:
                grows = "  ".join(f"{what} ~ T^{slope}" for what, slope in slopes.items())
                say(f"{name:<14}{grows}")
        print_result(report)
        return
    ratios = compare(report)
    draw(report, os.path.join(out_dir, "bench.png"))
    rates = bench_data(data, tok, mlm_probability, peers, 10 * repeats)
    say("\nbatches and masks, 64 rows of 512 tokens, one thread, million tokens/s")
    for what, rate in rates.items():
        say(f"  {what.removesuffix('_mtok_per_s'):<24}{rate:>10,.1f}")
    collator = rates.get("hf_whole_word_collator_mtok_per_s")
    if collator:
        ratio = rates["whole_word_mtok_per_s"] / collator
        ratios["whole_word / hf collator"] = round(ratio, 1)
    # Under names that are no lengths, beside the figures of each length.
    report |= dict(data=rates, ratios=ratios)
    write_json(os.path.join(out_dir, "bench.json"), report)
    say("\n" + "\n".join(f"{value:>10}  {what}" for what, value in ratios.items()))
    print_result(report)


if __name__ == "__main__":
    main()
