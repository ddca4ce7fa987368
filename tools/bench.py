"""Speed and memory, side by side in one run on one machine.

    python tools/bench.py                   ours: strict and open, and our Transformer of equal parameters
    python tools/bench.py --peers=1         and transformers' BERT, ModernBERT (sparse prediction) and Perceiver
    python tools/bench.py --lengths=512 --models=strict,hf_bert --peers=1
    python tools/bench.py --lengths=512 --profile=1       where the time goes: ten operations, and a trace to look at

Timed are a training step at the shape of micro_balanced (forward, backward, clipping, AdamW), `tokens` tokens a step,
and without gradients the filling of one mask and the reading of rows. All models have the parameters of strict, its
vocabulary, row length and dtype. Each is a process of its own, so that its peak memory is its own; one works at a time,
in turns, so that a busy machine slows all alike. Medians are reported. Writes out_dir/{bench.json, bench.png}; the last
line on stdout is JSON: {"512": {"strict": {"tokens_per_s", "peak_mb", ...}, "open": ...}, ..., "ratios", "data"}.
"""

# ---- settings ---------------------------------------------------------------
peers = 0  # 1: also transformers' models, and its whole-word collator beside our masking
models = ""  # some of strict, open, transformer, hf_bert, hf_modernbert, hf_perceiver, commas between; empty: all
lengths = "128,512,2048,8192,32768"  # tokens a row, T, several with commas between
tokens = 4096  # tokens a training step; longer rows than this come one at a time
mlm_probability = 0.15  # share of tokens that is predicted
repeats = 3  # timed repeats of each model, after one to warm up; until they have taken 8 seconds
longest_step = 60.0  # seconds; a model whose step would take longer at some length is left out from there on, and named
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
compile = "false"  # true: torch.compile
profile = 0  # 1: instead, the ten most expensive operations at the first length, and out_dir/trace_*.json
data_dir = "data/pydocs"  # prepared data for the batch and masking figures
out_dir = "out/bench"  # bench.json, bench.png and traces go here
# -----------------------------------------------------------------------------
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure

config = configure(globals())

import importlib.util
import json
import multiprocessing
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib.files import write_json
from lib.machine import DTYPES, autocast, choose_dtype, find_machine, matmul_peak, resident_gib
from lib.run import user_mistakes
from masking import slots
from tools.peers import OURS, PEERS, VOCABULARY, bench_data

MASK_ID = 103

# ---- one model, in a process of its own --------------------------------------------


class Bench:
    """A model and what is timed of it. Each method does it once."""
    def __init__(self, name, T):
        self.name, self.T, self.machine = name, T, find_machine(device, T)
        self.dtype, self.before = choose_dtype(dtype, self.machine.device)[0], resident_gib()
        torch.manual_seed(0)
        self.model = (OURS | PEERS)[name](T).to(self.machine.device).train()
        self.ours = name in OURS
        self.run = torch.compile(self.model) if compile == "true" else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        B, K = max(1, tokens // T), slots(T, "token", mlm_probability)
        ids = torch.randint(999, VOCABULARY, (B, T))
        positions = torch.rand(B, T).argsort(1)[:, :K].sort(1).values
        targets, weights = ids.gather(1, positions), torch.ones(B, K)
        labels = torch.full_like(ids, -100).scatter_(1, positions, targets)
        ids = ids.scatter(1, positions, MASK_ID)
        self.ids, self.labels, *self.batch = self.machine.take([ids, labels, positions, targets, weights])
        self.n_slots = K

    def step(self):
        with autocast(self.machine.device, self.dtype):
            loss = self.run(self.ids, *self.batch) if self.ours else self.run(
                input_ids=self.ids, labels=self.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def freeze(self):
        """From here on without gradients, the weights in the dtype itself."""
        if self.ours:
            self.model.freeze(DTYPES[self.dtype])
        else:
            self.model.to(DTYPES[self.dtype]).eval()

    @torch.inference_mode()
    def fill(self):
        """One row, one mask -> its logits."""
        ids, place = self.ids[:1], self.batch[0][:1, :1]
        if self.ours:
            return self.model.logits(self.model.decode(*self.model.encode(ids), place))
        return self.model(input_ids=ids).logits[:, place]

    @torch.inference_mode()
    def embed(self):
        """All rows through the encoder."""
        return self.model.encode(self.ids) if self.ours else getattr(self.model, self.model.base_model_prefix)(self.ids)

    def timed(self, what, times):
        """Seconds of one of `times` goes; short ones after one to warm up, for machines that take idle memory away."""
        wait = torch.cuda.synchronize if self.machine.device.type == "cuda" else lambda: None
        once = getattr(self, what)
        if self.T <= 2048:
            once()
        wait()
        start = time.perf_counter()
        for _ in range(times):
            once()
        wait()
        return (time.perf_counter() - start) / times

    def facts(self):
        """A first step -> parameters, FLOPs of a training step an input token."""
        def attention(q, k, v, *_, **__):
            return sdpa_flop_count(q, k, v)

        def attention_backward(d, q, k, v, *_, **__):
            return sdpa_backward_flop_count(d, q, k, v)
        aten, n_tokens = torch.ops.aten, self.ids.numel()
        params = sum(p.numel() for p in self.model.parameters())
        if self.ours:
            self.step()
            flops = self.model.flops_per_token(self.T, self.n_slots, len(self.ids))
        else:
            with FlopCounterMode(display=False, custom_mapping={
                    aten._scaled_dot_product_flash_attention_for_cpu: attention,
                    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward}) as counter:
                self.step()
            flops = counter.get_total_flops() / n_tokens
        return dict(params=params, mflop_per_token=round(flops / 1e6, 1))

    def peak_mb(self):
        if self.machine.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return (resident_gib(peak=True) - self.before) * 1024

    def profiled(self):
        """Trace of a step in out_dir -> its ten most expensive operations as a table."""
        self.step()
        with torch.profiler.profile() as seen:
            self.step()
        seen.export_chrome_trace(os.path.join(out_dir, f"trace_{self.name}_{self.T}.json"))
        by = "self_cuda_time_total" if self.machine.device.type == "cuda" else "self_cpu_time_total"
        return seen.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=48)


def serve(pipe, name, T):
    """The process: builds the model, then does what it is told until told nothing."""
    try:
        bench = Bench(name, T)
        for what, *args in iter(pipe.recv, None):
            pipe.send(getattr(bench, what)(*args))
    except Exception as error:
        pipe.send(error if isinstance(error, (RuntimeError, ValueError)) else RuntimeError(repr(error)))


class Worker:
    """A Bench in another process. Raises RuntimeError when that fails or dies."""
    processes = multiprocessing.get_context("forkserver")  # one that has loaded what takes seconds to load
    processes.set_forkserver_preload(["peers", *(f"transformers.models.{name[3:]}.modeling_{name[3:]}" for name in PEERS
                                                 if peers and (not models or name in models.split(",")))])

    def __init__(self, name, T):
        self.pipe, other = self.processes.Pipe()
        self.process = self.processes.Process(target=serve, args=(other, name, T), daemon=True)
        self.process.start()
        other.close()

    def ask(self, what, *args):
        try:
            self.pipe.send((what, *args))
            answer = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            raise RuntimeError(f"its process died with code {self.process.exitcode}; -9 is out of memory") from None
        if isinstance(answer, Exception):
            raise RuntimeError(str(answer).split("\n")[0]) from None
        return answer

    def stop(self):
        self.process.kill()
        self.process.join()


# ---- lengths, one after the other -------------------------------------------------


def medians(workers, left_out, what, repeats, times=1):
    """{name: Worker} -> {name: median seconds}, in turns of so many times each; who fails goes to left_out."""
    seconds = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in list(workers.items()):
            try:
                if sum(seconds[name]) < 8:
                    seconds[name].append(worker.ask("timed", what, times))
            except RuntimeError as error:
                workers.pop(name).stop()
                left_out[name] = str(error)
    return {name: statistics.median(seconds[name]) for name in workers}


def bench_length(T, names, expected, peak):
    """Training steps of rows of T tokens; up to 512 also filling and embedding. -> {name: figures}, {name: why not}."""
    workers, result, left_out, n_tokens = {}, {}, {}, max(1, tokens // T) * T
    for name in names:
        if expected.get(name, 0) > longest_step:
            left_out[name] = f"a step would take about {expected[name]:,.0f} s (--longest_step)"
            continue
        worker = Worker(name, T)
        try:
            result[name], workers[name] = worker.ask("facts"), worker
        except RuntimeError as error:
            worker.stop()
            left_out[name] = str(error)
    for name, seconds in medians(workers, left_out, "step", repeats).items():
        flops = result[name]["mflop_per_token"] * 1e6 * n_tokens
        result[name] |= dict(tokens_per_s=round(n_tokens / seconds), step_ms=round(seconds * 1e3, 1),
                             peak_mb=round(workers[name].ask("peak_mb")), gemm_share=round(flops / seconds / peak, 3))
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


# ---- the table, the picture, the run --------------------------------------------


def compare(report):
    """What is claimed elsewhere, as ratios of this run."""
    ratios = {}
    for T, result in report.items():
        for ours in ("strict", "open", "transformer"):
            for figure in ("tokens_per_s", "peak_mb", "fill_ms"):
                ratios |= {f"{T}: {ours} / {peer}, {figure}": round(result[ours][figure] / result[peer][figure], 2)
                           for peer in PEERS if ours in result and peer in result and figure in result[peer]}
    for name in OURS:
        at = {int(T): result[name]["tokens_per_s"] for T, result in report.items() if name in result}
        ratios |= {f"{name}: time a token at {T} / at 2048": round(at[2048] / at[T], 2)
                   for T in at if T > 2048 and 2048 in at}
    return ratios


def draw(report, path):
    """Tokens a second and peak memory against the length of a row, log-log."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), dpi=130, layout="constrained")
    for panel, key, label in zip(panels, ("tokens_per_s", "peak_mb"), ("tokens a second", "peak memory, MB")):
        for name in OURS | PEERS:
            points = [(int(T), result[name][key]) for T, result in report.items() if name in result]
            if points:
                panel.plot(*zip(*points), marker="o", markersize=4, label=name,
                           linestyle="-" if name in OURS else "--")
        panel.set(xscale="log", yscale="log", xlabel="tokens a row", ylabel=label)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.suptitle(f"training step, {tokens} tokens or one row, equal parameters", fontsize=10)
    figure.savefig(path)


def main():
    with user_mistakes():
        machine = find_machine(device)
        name, reason = choose_dtype(dtype, machine.device)
        if not all(T.isdigit() and int(T) for T in lengths.split(",")) or min(tokens, repeats) < 1:
            raise ValueError(f"lengths={lengths!r}, tokens={tokens}, repeats={repeats}: expected numbers above 0, "
                             "lengths with commas between, such as --lengths=128,512")
        names = [*OURS, *PEERS] if peers else list(OURS)
        wanted = models.split(",") if models else names
        if not set(wanted) <= set(names):
            raise ValueError(f"models={models!r}: expected some of {', '.join(names)}"
                             + ("" if peers else "; transformers' models need --peers=1"))
        if peers and importlib.util.find_spec("transformers") is None:
            print("transformers is not installed, so its models are left out: pip install -r requirements-extra.txt")
            names = list(OURS)
        names = [n for n in names if n in wanted]
        data, tok = TokenData(data_dir, "train", 512, 0), Tokenizer.load(os.path.join(data_dir, "tokenizer"))
        os.makedirs(out_dir, exist_ok=True)
    peak = matmul_peak(machine.device, name, seconds=2)
    print(f"torch {torch.__version__}, {machine.device}, {torch.get_num_threads()} threads, {name} ({reason}), "
          f"matmul peak {peak / 1e12:.2f} TFLOP/s, compile {compile}\n", flush=True)
    if profile:
        for model in names:
            worker = Worker(model, int(lengths.split(",")[0]))
            print(f"{model}\n{worker.ask('profiled')}", flush=True)
            worker.stop()
        return
    report, seconds = {}, {}  # seconds: {model: [(T, seconds a token)]}
    for T in map(int, lengths.split(",")):
        n_tokens = max(1, tokens // T) * T
        expected = {model: n_tokens * extrapolate(known, T) for model, known in seconds.items()}
        peak = max(peak, matmul_peak(machine.device, name, seconds=2))  # a busy machine has less now and then
        result, left_out = bench_length(T, names, expected, peak)
        report[str(T)] = result
        print(f"training step, {n_tokens // T} rows of {T} tokens, {mlm_probability:.0%} predicted")
        for model, r in result.items():
            seconds.setdefault(model, []).append((T, 1 / r["tokens_per_s"]))
            more = f"{r['fill_ms']:9,.1f} ms to fill a mask" if "fill_ms" in r else ""
            print(f"  {model:<14}{r['params']:>12,} parameters{r['tokens_per_s']:>9,} tokens/s{r['step_ms']:>10,.0f} ms"
                  f"{r['peak_mb']:>8,} MB   {r['gemm_share']:.0%} of peak{more}", flush=True)
        for model, why in left_out.items():
            print(f"  {model:<14}left out from here on: {why}", flush=True)
        names = [model for model in names if model in result]
    ratios = compare(report)
    draw(report, os.path.join(out_dir, "bench.png"))
    report["data"] = rates = bench_data(data, tok, mlm_probability, peers, 10 * repeats)
    print("\nbatches and masks, 64 rows of 512 tokens, one thread, million tokens/s")
    for what, rate in rates.items():
        print(f"  {what.removesuffix('_mtok_per_s'):<24}{rate:>10,.1f}")
    if "hf_whole_word_collator_mtok_per_s" in rates:
        ratios["whole_word / hf collator"] = round(
            rates["whole_word_mtok_per_s"] / rates["hf_whole_word_collator_mtok_per_s"], 1)
    report["ratios"] = ratios
    write_json(os.path.join(out_dir, "bench.json"), report)
    print("\n" + "\n".join(f"{value:>10}  {what}" for what, value in ratios.items()))
    print(json.dumps(report))


def extrapolate(known, T):
    """[(length, seconds a token)] -> seconds a token at T, on the line through the last two."""
    (before, slow), (last, now) = known[-2:] if len(known) > 1 else known * 2
    return now + max(0.0, now - slow) / max(1, last - before) * (T - last)


if __name__ == "__main__":
    main()
