"""Train several arms with several seeds under one budget and put them side by side.

    python tools/sweep.py config/sweeps/dims.py                         a table and curves of one of the questions in config/
    python tools/sweep.py config/sweeps/architecture.py --jobs=4        four runs at a time, each on its own GPU if there are

Every run is `python train.py BASE ARM --seed=N --out_dir=OUT/ARM_sN` in a process of its own, so the same command again
continues where it was stopped and finished runs cost seconds. With flops=X every arm trains for as many tokens as X
training FLOPs buy it: equal compute. Writes out_dir/{table.md,results.json,curves.png}; the last line is JSON.
"""

# ---- settings ---------------------------------------------------------------
base = ""  # arguments of train.py for every run: config files and --key=value, spaces between
arms = ""  # one arm a line: NAME and its own arguments; # starts a comment
seeds = "1,2,3"  # seeds of each arm, with commas between
flops = 0.0  # training FLOPs of a run, by the model's own formula; 0: the budget in base
out_dir = "out/sweep"  # runs go to folders in here
evaluate = 0  # 1: eval.py on each run, its losses under every masking as further columns
jobs = 1  # runs at a time; each gets its share of the CPU threads, and a GPU of its own where there are any
# -----------------------------------------------------------------------------
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure

config = configure(globals())

import json
import shlex
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from data.reader import Batches, folders
from data.tokenizer import Tokenizer
from lib.files import replace_file, write_json
from lib.run import build_model, fields_of, read_log, user_mistakes
from masking import MASKING_TYPES

FINISHED = ("max_steps", "max_minutes", "patience", "overfit")  # how train.py says that a run is whole
HEALTH = ("concept_rank", "input_dependence", "duplicates", "shuffled")  # as train.py logs them


def read_arms():
    """{name: arguments} from the setting; raises ValueError for a line that is no arm."""
    found = {}
    for line in arms.splitlines():
        try:
            name, *arguments = shlex.split(line, comments=True) or [""]
        except ValueError as error:
            raise ValueError(f"arms: {line.strip()!r}: {error}") from None
        if name in found or name.startswith("-"):
            raise ValueError(f"arms: {line.strip()!r}: expected a name used once, then arguments of train.py")
        if name:
            found[name] = arguments
    if not found:
        raise ValueError("arms is empty: name a config, for example python tools/sweep.py config/sweeps/dims.py")
    return found


def plan(name, arguments):
    """What train.py would make of an arm -> its arguments with the budget, parameters and FLOPs a token."""
    arguments = [*shlex.split(base), *arguments]
    settings = configure(dict(__file__=os.path.join(ROOT, "train.py"), __doc__=""), arguments)
    for folder in folders(settings["data_dir"]):
        if not os.path.exists(os.path.join(folder, "meta.json")):
            raise ValueError(f"arm {name}: {folder} holds no prepared data; make it with python prepare.py "
                             f"--input=GLOB --out_dir={folder} --tokenizer=bpe:16000")
    batches = Batches(*(settings[key] for key in "data_dir data_weights rows block_size block_schedule seed batch_size "
                        "max_steps max_tokens".split()))
    tok = Tokenizer.load(os.path.join(batches.names[0], "tokenizer"))
    model_settings = {key: settings[key] for key in fields_of(settings["arch"]) if key in settings} | dict(
        arch=settings["arch"], vocab_size=settings["vocab_size"] or tok.vocab_size, mask_id=tok.mask_id,
        eot_id=tok.eot_id)
    with torch.device("meta"):
        model = build_model(model_settings)
    per_token = batches.flops_per_token(model, settings["mlm_probability"], settings["micro_batch"])
    a_step = settings["batch_size"] * settings["block_size"] * sum(
        float(share) * per_token[T] for T, share in batches.lengths)
    if flops:
        steps = max(1, round(flops / a_step))
        arguments += [f"--max_steps={steps}", "--max_tokens=0", "--max_minutes=0"]
    return dict(arguments=arguments, params=model.num_params(),
                mflop_per_token=a_step / float(batches.tokens_a_step) / 1e6)


def run(job):
    """One training run in a process of its own -> its summary; its output is in out_dir/NAME_sSEED/output.txt."""
    number, name, seed = job
    folder = os.path.join(out_dir, f"{name}_s{seed}")
    os.makedirs(folder, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if torch.cuda.device_count() > 1:
        env["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    command = [sys.executable, "train.py", *plans[name]["arguments"], f"--seed={seed}",
               f"--out_dir={os.path.abspath(folder)}"]
    start = time.monotonic()
    def last_line(command):
        """Runs it and appends to output.txt -> exit code, its last line."""
        path = os.path.join(folder, "output.txt")
        with open(path, "a") as output:
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT).returncode
        with open(path, errors="replace") as output:
            return code, (output.read().strip().splitlines() or [""])[-1]

    code, line = last_line(command)
    if not code and json.loads(line)["stopped"] not in FINISHED:
        code, line = 1, f"stopped early ({json.loads(line)['stopped']}); the same sweep again goes on"
    if evaluate and not code:
        command = [sys.executable, "tools/eval.py", f"--out_dir={os.path.abspath(folder)}", "--health_rows=0"]
        code, line = last_line(command)
    if code:
        print(f"{name} seed {seed} failed: {line}\n    {shlex.join(command)}", flush=True)
        return None
    records = [r for r in read_log(folder) if r.get("val_loss") is not None]
    print(f"{name} seed {seed}: {records[-1]['val_loss']:.4f} nats after {records[-1]['tokens']:,} tokens, "
          f"{(time.monotonic() - start) / 60:.1f} min", flush=True)
    losses = next(iter(json.loads(line)["data"].values())) if evaluate else {}
    return dict(arm=name, seed=seed, tokens=records[-1]["tokens"], loss=records[-1]["val_loss"],
                bits_per_byte=records[-1]["val_bits_per_byte"],
                maskings={key: r["loss"] for key, r in losses.items() if key in MASKING_TYPES},
                health={key: records[-1].get(key) for key in HEALTH},
                curve=[(r["tokens"], r["val_loss"]) for r in records])


def spread(values, digits):
    """Median [smallest, largest]; - where there is nothing."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def table():
    """Markdown: an arm a row, best median first; losses are nats a predicted token on the fixed masks."""
    columns = ["validation loss", "bits a byte", *(f"{m} masks" for m in MASKING_TYPES if evaluate), "rank",
               "input dependence", "duplicates", "shuffled"]
    lines = ["| arm | parameters | MFLOP a token | tokens | training FLOPs | " + " | ".join(columns) + " |",
             "|---" + "|---:" * (len(columns) + 4) + "|"]
    for name in ranked:
        mine, arm = by_arm[name], plans[name]
        total = mine[0]["tokens"] * arm["mflop_per_token"] * 1e6
        cells = [name, f"{arm['params']:,}", f"{arm['mflop_per_token']:.2f}", f"{mine[0]['tokens']:,}", f"{total:.2e}",
                 spread([r["loss"] for r in mine], 3), spread([r["bits_per_byte"] for r in mine], 3)]
        cells += [spread([r["maskings"].get(m) for r in mine], 3) for m in MASKING_TYPES if evaluate]
        cells += [spread([r["health"][key] for r in mine], 1 if key == "concept_rank" else 3) for key in HEALTH]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path):
    """Validation loss of every run against tokens and against training FLOPs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), dpi=130, sharey=True)
    for axes, label in zip(panels, ("tokens seen (millions)", "training FLOPs")):
        for number, name in enumerate(ranked):
            scale = 1e-6 if "tokens" in label else plans[name]["mflop_per_token"] * 1e6
            for i, r in enumerate(by_arm[name]):
                axes.plot([t * scale for t, _ in r["curve"] if t], [loss for t, loss in r["curve"] if t],
                          color=f"C{number % 10}", ls="-" if number < 10 else "--", lw=1.2, label=None if i else name)
        axes.set(xlabel=label, xscale="log")
        if "tokens" in label:
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss, nats a predicted token")
    panels[1].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


with user_mistakes():
    if not all(seed.strip().isdigit() for seed in seeds.split(",")):
        raise ValueError(f"seeds={seeds!r}: expected whole numbers with commas between, such as 1,2,3")
    seed_list = [int(seed) for seed in seeds.split(",")]
    plans = {name: plan(name, arguments) for name, arguments in read_arms().items()}
    if jobs < 1 or flops < 0:
        raise ValueError(f"jobs={jobs}, flops={flops}: expected jobs of 1 or more, flops of 0 or more")
    os.makedirs(out_dir, exist_ok=True)
todo = [(number, name, seed) for number, (seed, name) in enumerate((s, n) for s in seed_list for n in plans)]
with ThreadPoolExecutor(jobs) as pool:
    results = [r for r in pool.map(run, todo) if r]
by_arm = {name: [r for r in results if r["arm"] == name] for name in plans}
ranked = sorted((name for name in plans if by_arm[name]),
                key=lambda name: statistics.median(r["loss"] for r in by_arm[name]))
if not results:
    sys.exit("error: every run failed; the reasons are above")
print("\n" + table())
replace_file(os.path.join(out_dir, "table.md"), lambda file: file.write((table() + "\n").encode()))
write_json(os.path.join(out_dir, "results.json"), dict(settings=config, plans=plans, results=results))
draw(os.path.join(out_dir, "curves.png"))
failed = len(todo) - len(results)
print(json.dumps(dict(out_dir=out_dir, runs=len(results), failed=failed,
                      loss={name: [r["loss"] for r in by_arm[name]] for name in ranked})))
sys.exit(bool(failed))
