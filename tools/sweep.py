"""Train several arms with several seeds under one budget and put them side by side.

    python tools/sweep.py config/sweeps/dims.py                      one of the questions there
    python tools/sweep.py config/sweeps/architecture.py --jobs=4     four runs at a time

An arm is a name and arguments of train.py. Every run is a process of its own,
`python train.py BASE ARM --seed=N --out_dir=OUT/ARM_sN`. So the same command again continues
where the sweep was stopped, and finished runs cost seconds. With flops=X, every arm trains for
as many tokens as X training FLOPs buy it: equal compute.

Writes out_dir/{table.md, results.json, curves.png}. The last line on stdout is JSON.
"""

# ---- settings ---------------------------------------------------------------
base = ""  # arguments of train.py for every run: config files and --key=value, spaces between
arms = ""  # one arm a line: NAME and its own arguments; # starts a comment
seeds = "1,2,3"  # seeds of each arm, with commas between
flops = 0.0  # training FLOPs of a run, by the model's own formula; 0: the budget in base
out_dir = "out/sweep"  # runs go to folders in here
evaluate = False  # eval.py on each run, its losses under every masking as further columns
jobs = 1  # runs at a time; each gets its share of the CPU threads, and a GPU where there are any
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

# What train.py gives as "stopped" for a run that has used its whole budget.
FINISHED = ("max_steps", "max_minutes", "patience", "overfit")
# Columns of the table with measures of the concepts: {title: name in train.py's log}.
HEALTH = {"rank": "concept_rank", "input dependence": "input_dependence",
          "duplicates": "duplicates", "shuffled": "shuffled"}


# ---- the plan: everything a user can get wrong is refused here ------------------


def read_seeds():
    if not all(seed.strip().isdigit() for seed in seeds.split(",")):
        raise ValueError(f"seeds={seeds!r}: expected whole numbers with commas between, such as "
                         "1,2,3")
    return [int(seed) for seed in seeds.split(",")]


def read_arms():
    """The setting `arms` -> {name: arguments}. Raises ValueError for a line that is no arm."""
    found = {}
    for line in arms.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:  # a quotation that does not end
            raise ValueError(f"arms: {line.strip()!r}: {error}") from None
        if not words:
            continue
        name, *arguments = words
        if name in found or name.startswith("-"):
            raise ValueError(f"arms: {line.strip()!r}: expected a name used once, then arguments "
                             "of train.py")
        found[name] = arguments
    if not found:
        raise ValueError("arms is empty: name a config, for example "
                         "python tools/sweep.py config/sweeps/dims.py")
    return found


def plan(name, arguments):
    """What train.py would make of an arm, without its weights.

    -> {"arguments" (with the budget), "params", "mflop_per_token"}. Raises ValueError for
    settings that train.py would refuse and for data that is not there.
    """
    arguments = [*shlex.split(base), *arguments]
    train = dict(__file__=os.path.join(ROOT, "train.py"), __doc__="")
    settings = configure(train, arguments)
    for folder in folders(settings["data_dir"]):
        if not os.path.exists(os.path.join(folder, "meta.json")):
            raise ValueError(f"arm {name}: {folder} holds no prepared data; make it with "
                             f"python prepare.py --input=GLOB --out_dir={folder} "
                             "--tokenizer=bpe:16000")
    names = ("data_dir", "data_weights", "rows", "block_size", "block_schedule", "seed",
             "batch_size", "max_steps", "max_tokens")
    batches = Batches(*(settings[key] for key in names))
    tok = Tokenizer.load(os.path.join(batches.names[0], "tokenizer"))
    shape = {key: settings[key] for key in fields_of(settings["arch"]) if key in settings}
    shape |= dict(arch=settings["arch"], vocab_size=settings["vocab_size"] or tok.vocab_size,
                  mask_id=tok.mask_id, eot_id=tok.eot_id)
    with torch.device("meta"):  # only counted
        model = build_model(shape)
    a_step = flops_per_step(batches, model, settings)
    if flops:
        steps = max(1, round(flops / a_step))
        arguments += [f"--max_steps={steps}", "--max_tokens=0", "--max_minutes=0"]
    return dict(arguments=arguments, params=model.num_params(),
                mflop_per_token=a_step / float(batches.tokens_a_step) / 1e6)


def flops_per_step(batches, model, settings):
    """Training FLOPs of a step, the mean over a block_schedule. Padding costs FLOPs too."""
    per_position = batches.flops_per_token(
        model, settings["mlm_probability"], settings["micro_batch"])
    mean = sum(float(share) * per_position[T] for T, share in batches.lengths)
    return settings["batch_size"] * settings["block_size"] * mean


# ---- one run ---------------------------------------------------------------------


def run_logged(command, path, env):
    """Runs a command and appends its output to a file. -> its exit code and last line."""
    with open(path, "a") as output:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
    with open(path, errors="replace") as output:
        lines = output.read().strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


def train(folder, arguments, seed, env):
    """train.py, and eval.py if asked for. -> error (None if all went well), JSON of the last."""
    path = os.path.abspath(folder)
    command = [sys.executable, "train.py", *arguments, f"--seed={seed}", f"--out_dir={path}"]
    output = os.path.join(folder, "output.txt")
    code, line = run_logged(command, output, env)
    if not code:
        stopped = json.loads(line)["stopped"]
        if stopped not in FINISHED:  # half a run must not stand beside whole ones
            code, line = 1, f"stopped early ({stopped}); the same sweep again goes on"
    if evaluate and not code:
        command = [sys.executable, "tools/eval.py", f"--out_dir={path}", "--health_rows=0"]
        code, line = run_logged(command, output, env)
    if code:
        return f"{line}\n    {shlex.join(command)}", None
    return None, json.loads(line)


def run(number, name, seed, arguments):
    """Trains one arm with one seed, in a folder of its own. -> its results; None if it failed.

    number: that of the run in the sweep, which decides the GPU.
    """
    folder = os.path.join(out_dir, f"{name}_s{seed}")
    os.makedirs(folder, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    env = {"OMP_NUM_THREADS": str(threads)} | os.environ
    if torch.cuda.device_count() > 1:
        env["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    start = time.monotonic()
    error, last = train(folder, arguments, seed, env)
    if error:
        print(f"{name} seed {seed} failed: {error}", flush=True)
        return None
    records = [r for r in read_log(folder) if r.get("val_loss") is not None]
    final = records[-1]
    print(f"{name} seed {seed}: {final['val_loss']:.4f} nats after {final['tokens']:,} tokens, "
          f"{(time.monotonic() - start) / 60:.1f} min", flush=True)
    maskings = {}
    if evaluate:
        [losses, *_] = last["data"].values()
        maskings = {key: r["loss"] for key, r in losses.items() if key in MASKING_TYPES}
    return dict(arm=name, seed=seed, tokens=final["tokens"], loss=final["val_loss"],
                bits_per_byte=final["val_bits_per_byte"], maskings=maskings,
                health={key: final.get(key) for key in HEALTH.values()},
                curve=[(r["tokens"], r["val_loss"]) for r in records])


# ---- the table and the picture -----------------------------------------------------


def spread(values, digits=3):
    """Median [smallest, largest]; "-" where nothing was measured."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    middle, low, high = (f"{function(values):.{digits}f}"
                         for function in (statistics.median, min, max))
    return middle if len(values) == 1 else f"{middle} [{low}, {high}]"


def table(by_arm, plans):
    """Markdown with a row for each arm, in the order of by_arm: {name: results of its runs}.

    Losses are nats a predicted token, on the fixed masks of the evaluation.
    """
    maskings = MASKING_TYPES if evaluate else ()
    titles = ["arm", "parameters", "MFLOP a token", "tokens", "training FLOPs", "validation loss",
              "bits a byte", *(f"{masking} masks" for masking in maskings), *HEALTH]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for name, runs in by_arm.items():
        arm, n_tokens = plans[name], runs[0]["tokens"]
        cells = [name, f"{arm['params']:,}", f"{arm['mflop_per_token']:.2f}", f"{n_tokens:,}",
                 f"{n_tokens * arm['mflop_per_token'] * 1e6:.2e}"]
        cells += [spread([r[key] for r in runs]) for key in ("loss", "bits_per_byte")]
        cells += [spread([r["maskings"].get(masking) for r in runs]) for masking in maskings]
        for key in HEALTH.values():
            digits = 1 if key == "concept_rank" else 3
            cells.append(spread([r["health"][key] for r in runs], digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(by_arm, plans, path):
    """Validation loss of every run against tokens and against training FLOPs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), dpi=130, sharey=True)
    for number, (name, runs) in enumerate(by_arm.items()):
        flops_per_token = plans[name]["mflop_per_token"] * 1e6
        for axes, scale in ((left, 1e-6), (right, flops_per_token)):
            for i, r in enumerate(runs):
                points = [(n_tokens * scale, loss) for n_tokens, loss in r["curve"] if n_tokens]
                axes.plot([x for x, _ in points], [loss for _, loss in points],
                          color=f"C{number % 10}", ls="-" if number < 10 else "--", lw=1.2,
                          label=None if i else name)  # one label for all runs of an arm
    left.set(xlabel="tokens seen (millions)", xscale="log",
             ylabel="validation loss, nats a predicted token")
    right.set(xlabel="training FLOPs", xscale="log")
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter("{x:g}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main():
    with user_mistakes():
        seed_list = read_seeds()
        plans = {name: plan(name, arguments) for name, arguments in read_arms().items()}
        if jobs < 1 or flops < 0:
            raise ValueError(f"jobs={jobs}, flops={flops}: expected jobs of 1 or more, flops of "
                             "0 or more")
        os.makedirs(out_dir, exist_ok=True)
    # Seed by seed, so that a sweep that is stopped has something to say about every arm.
    todo = [(name, seed, plans[name]["arguments"]) for seed in seed_list for name in plans]
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(run, number, *job) for number, job in enumerate(todo)]
    results = [done.result() for done in runs if done.result()]
    if not results:
        sys.exit("error: every run failed; the reasons are above")
    by_arm = {}
    for r in results:
        by_arm.setdefault(r["arm"], []).append(r)
    order = sorted((name for name in plans if name in by_arm),
                   key=lambda name: statistics.median(r["loss"] for r in by_arm[name]))
    by_arm = {name: by_arm[name] for name in order}  # the best median first
    text = table(by_arm, plans)
    print("\n" + text)
    table_path = os.path.join(out_dir, "table.md")
    replace_file(table_path, lambda file: file.write((text + "\n").encode()))
    write_json(os.path.join(out_dir, "results.json"),
               dict(settings=config, plans=plans, results=results))
    draw(by_arm, plans, os.path.join(out_dir, "curves.png"))
    failed = len(todo) - len(results)
    losses = {name: [r["loss"] for r in runs] for name, runs in by_arm.items()}
    print(json.dumps(dict(out_dir=out_dir, runs=len(results), failed=failed, loss=losses)))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
