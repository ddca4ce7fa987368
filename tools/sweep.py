"""Train several arms with several seeds under one budget and put them side by side.

    python tools/sweep.py config/sweeps/dims.py                      one of the questions there
    python tools/sweep.py config/sweeps/architecture.py --jobs=4     four runs at a time

An arm is a name and arguments of train.py. `grid` makes arms of all combinations of some settings'
values, `ranges` of random ones. Every run is a process of its own,
`python train.py BASE ARM --seed=N --out_dir=OUT/ARM_sN`, in the folder where the sweep was started.
With flops=X, every arm trains for as many tokens as X training FLOPs buy it: equal compute. With
budgets=X,Y,... every arm runs at each of them, and the power law of its losses is fitted
(lib/scaling.py).

The same command again goes on where the sweep was stopped and starts no finished run again: each
has left its numbers in OUT/ARM_sN/result.json. A run of other settings than its arm has now is
refused. Ctrl-C and SIGTERM let the runs save; the table then holds what is finished.

    python tools/sweep.py report --dir=out/sweep_dims

writes a table, pictures and one page about all runs in a folder, whoever made them
(tools/sweep_report.py). --solve=1 runs nothing. It finds the shape of a model from a budget of
parameters, the share of its token table and the GLU factor of its layers (lib/allocation.py), and
prints it with a config:

    python tools/sweep.py --solve=1 --budget=10e6 --embed_share=0.35 --glu=2.66
    python tools/sweep.py --solve=1 --budget=10e6 --arch=concept --base="--n_concept=32"

With rungs=5e6,50e6 all arms train on 5 million tokens, and the `promote` best train on to 50
million. They continue and do not begin again, so lr_schedule must be wsd or constant: under another
schedule a loss in the middle of a run says little. With kill_margin an arm that is clearly worse
than the reference at equal tokens ends early, for good.

Writes out_dir/{results.json, results.csv, top1.json, table.md, curves.png}, all but the last after
every run, and with several budgets law.json and law.png. A run's folder holds status.json: running,
ranked, done, killed or failed. The last line on stdout is JSON.
"""

# ---- settings ---------------------------------------------------------------
base = ""  # arguments of train.py for every run: config files and --key=value, spaces between
arms = ""  # one arm a line: NAME and its own arguments; # starts a comment
grid = ""  # one setting a line and its values: SETTING VALUE VALUE ...; each combination is an arm
ranges = ""  # one setting a line: SETTING LOW HIGH, or SETTING LOW HIGH log; `trials` are drawn
trials = 0  # arms to draw from ranges
search = "random"  # how they are drawn: random | tpe (after what the earlier ones have shown)
seeds = "1,2,3"  # seeds of each arm, with commas between
flops = 0.0  # training FLOPs of a run, by the model's own formula; 0: the budget in base
budgets = ""  # several of them with commas between, such as 1e13,1e14: every arm at each
rungs = ""  # instead: tokens, as 5e6,50e6; after each number only the best arms go on to the next
promote = 2  # rungs: how many arms go on
kill_margin = 0.0  # an arm this much worse than the reference over kill_window ends; 0: none does
kill_unit = "nats"  # of kill_margin: nats | ppl (perplexity)
kill_window = 1e6  # tokens
reference = ""  # the arm that the others are held against; empty: the first
out_dir = "out/sweep"  # runs go to folders in here
evaluate = False  # eval.py on each run, its losses under every masking as further columns
dir = ""  # report: the folder whose runs are reported on
jobs = 1  # runs at a time; each gets its share of the CPU threads, and a GPU where there are any
solve = False  # find a shape and print it, nothing else
budget = 10e6  # parameters of a model, for solve and where embed_share or glu is an axis of grid
embed_share = 0.35  # the share of them that the token table has, unless it is an axis
glu = 2.66  # ffn_dim over the width of a layer, unless it is an axis
vocab_size = 16000  # solve: rows of the token table
arch = "transformer"  # solve: transformer | concept | resonance; base may hold further settings
# -----------------------------------------------------------------------------
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure, read_settings

# the word that prepare.py calls a mode: what is done with --dir instead of a sweep
is_report = sys.argv[1:2] == ["report"]
config = configure(globals(), sys.argv[2:] if is_report else None)

import contextlib
import hashlib
import json
import math
import re
import shlex
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from types import SimpleNamespace

import torch

from data.reader import Batches, folders
from data.tokenizer import Tokenizer
from lib import allocation, scaling
from lib.files import (
    check_outputs,
    print_result,
    read_object,
    replace_file,
    say,
    write_json,
)
from lib.jobs import last_line, run_python, stop_all
from lib.run import (
    build_model,
    check_settings,
    first_readable,
    lock_folder,
    model_settings,
    read_log,
    user_mistakes,
)
from masking import MASKING_TYPES, predicted_share
from tools import arms as named_arms
from tools.compare import draw_losses
from tools.live import live_table
from tools.ranking import is_hopeless, loss_at, promoted, write_csv
from tools.sweep_report import write_report

TRAIN, EVAL = os.path.join(ROOT, "train.py"), os.path.join(ROOT, "tools", "eval.py")
# What train.py gives as "stopped" for a run that has used its whole budget.
FINISHED = ("max_steps", "max_minutes", "patience", "overfit")
# Settings of train.py that decide how a run is done and not what it learns. A run may have others
# than its arm. Its data is compared by content, not by path.
NOT_COMPARED = ("out_dir", "data_dir", "device", "compile", "micro_batch", "log_interval",
                "save_minutes", "stop_at_step", "wandb", "log_to")
# Columns of the table with measures of the concepts: {title: name in train.py's log}.
HEALTH = {"rank": "concept_rank", "input dependence": "input_dependence",
          "duplicates": "duplicates", "shuffled": "shuffled"}
RUN_KEYS = ("settings", "loss", "curve")  # what a result.json must hold


# ---- the plan: everything a user can get wrong is refused here ------------------


def read_seeds():
    """The setting `seeds` -> [int]. Raises ValueError."""
    words = [seed.strip() for seed in seeds.split(",")]
    numbers = [int(word) for word in words if word.isdecimal()]
    if len(numbers) < len(words) or len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds={seeds!r}: expected different whole numbers with commas between, "
                         "such as 1,2,3")
    return numbers


def all_arms():
    """Those of arms, grid and ranges -> {name: (arguments, whether they were generated)}."""
    defaults = train_defaults()
    found = {name: (own, False) for name, own in named_arms.named(arms, out_dir).items()}
    axes = named_arms.read_ranges(ranges, trials, defaults)
    drawn = named_arms.draws(axes, trials if search == "random" else 0, defaults)
    for name, arguments in named_arms.combinations(grid, defaults) + drawn:
        if name in found:
            raise ValueError(f"arm {name} comes twice, from arms, grid or ranges")
        found[name] = arguments, True
    if not found and search == "random":
        raise ValueError("there are no arms, no grid and no ranges: name a config, for example "
                         "python tools/sweep.py config/sweeps/dims.py")
    return found


def read_budgets():
    """-> [(text, training FLOPs or 0)], at least one. Raises ValueError."""
    if not 0 <= flops < math.inf:
        raise ValueError(f"flops={flops}: expected 0 or more")
    if not budgets:
        return [("", flops)]
    try:
        found = [(text.strip(), float(text)) for text in budgets.split(",")]
    except ValueError:
        found = []
    amounts = [amount for _, amount in found]
    good = found and all(0 < amount < math.inf for amount in amounts)
    if not good or len(set(amounts)) < len(amounts) or flops:
        raise ValueError(f"budgets={budgets}: expected different numbers of FLOPs with commas "
                         "between, such as 1e13,1e14, and --flops=0")
    return found


def read_rungs():
    """The setting `rungs` -> [tokens], [] for none. Raises ValueError for it and its companions."""
    if not 0 <= kill_margin < math.inf or not 0 < kill_window < math.inf or promote < 1:
        raise ValueError(f"kill_margin={kill_margin}, kill_window={kill_window}, "
                         f"promote={promote}: expected 0 or more, more than 0, 1 or more")
    if kill_unit not in ("nats", "ppl"):
        raise ValueError(f"kill_unit={kill_unit!r}: expected nats or ppl")
    if not rungs:
        return []
    try:
        found = [float(text) for text in rungs.split(",")]
    except ValueError:
        found = []
    if not found or found != sorted(set(found)) or found[0] < 1 or found[-1] == math.inf:
        raise ValueError(f"rungs={rungs!r}: expected numbers of tokens that grow, as 5e6,50e6")
    if flops or budgets:
        raise ValueError("rungs count tokens; leave out flops and budgets")
    return found


def check_companions():
    """Raises ValueError for settings that belong to others that are not given."""
    defaults = {name: default for name, (default, _) in read_settings(__file__).items()}
    for owner, names in (("rungs", ["promote"]),
                         ("kill_margin", ["kill_unit", "kill_window", "reference"]),
                         ("ranges", ["trials", "search"])):
        unread = [f"{name}={config[name]}" for name in names if config[name] != defaults[name]]
        if unread and not config[owner]:
            raise ValueError(f"{', '.join(unread)}: of {owner} only; give {owner} too")


def resolve(arguments):
    """Arguments of train.py -> all its settings. Raises ValueError for those it would refuse."""
    given = [word for word in arguments
             if word.startswith("-") and word.strip("-").partition("=")[0] in ("seed", "out_dir")]
    if given:
        raise ValueError(f"{given[0]}: the sweep gives each run its seed and folder; use --seeds "
                         "and --out_dir of the sweep")
    try:
        return configure(dict(__file__=TRAIN, __doc__="", __name__="__main__"), arguments)
    except SystemExit as refusal:
        raise ValueError(refusal) from None


def plan(name, arguments, budget, seed_list):
    """What train.py would make of an arm with a budget in FLOPs, without its weights.

    -> {"arguments" (with the budget), "settings", "data_sha256", "params", "mflop_per_token"}.
    Raises ValueError for settings that train.py would refuse and for data that is not there.
    """
    try:
        arguments, shape = with_shape([*shlex.split(base), *arguments])
        settings = resolve(arguments)
        for seed in seed_list:
            check_settings(settings | dict(seed=seed), train_defaults(), world_size=1)
        batches, model = prepare(settings)
        a_step = flops_per_step(batches, model, settings)
        steps, rung_steps = 0, []
        if budget:
            steps = max(1, round(budget / a_step))
        if read_rungs():
            if settings["lr_schedule"] not in ("wsd", "constant"):
                raise ValueError(f"lr_schedule={settings['lr_schedule']}: with rungs expected wsd "
                                 "or constant, under which arms can be ranked before the end")
            rung_steps, every = steps_of_rungs(float(batches.tokens_a_step))
            steps = rung_steps[-1]
            arguments.append(f"--eval_interval={every}")
        if steps:
            arguments += [f"--max_steps={steps}", "--max_tokens=0", "--max_minutes=0"]
            settings = resolve(arguments)
    except (ValueError, OSError) as error:
        raise ValueError(f"arm {name}: {error}") from None
    return dict(arguments=arguments, settings=settings, data_sha256=batches.sha256,
                params=model.num_params(), shape=shape, rungs=rung_steps,
                mflop_per_token=a_step / float(batches.tokens_a_step) / 1e6)


def steps_of_rungs(tokens_a_step):
    """-> the step of each rung, all of them at evaluations, and the steps between evaluations."""
    tokens = read_rungs()
    every = max(1, round(tokens[0] / tokens_a_step / 10))
    return [max(1, round(n / tokens_a_step / every)) * every for n in tokens], every


@cache
def solved(share, factor, fixed):
    """-> the shape of lib/allocation.py; fixed: ((name, value), ...)."""
    return allocation.solve(budget, share, factor, dict(fixed))


def with_shape(arguments):
    """Arguments with --embed_share or --glu -> those of the shape in their place, and its shares;
    others -> the same and {}.
    """
    asked, others = {}, []
    for word in arguments:
        name, _, value = word.lstrip("-").partition("=")
        if name in named_arms.SOLVED:
            asked[name] = float(value)
        else:
            others.append(word)
    if not asked:
        return arguments, {}
    given = resolve(others)
    tok = Tokenizer.load(os.path.join(folders(given["data_dir"])[0], "tokenizer"))
    settings = model_settings(given["arch"], given, tok)
    chosen = {"n_layer", "n_head", "token_dim", "ffn_dim"}
    if given["concept_dim"] == train_defaults()["concept_dim"]:
        chosen.add("concept_dim")
    fixed = tuple(sorted((name, value) for name, value in settings.items() if name not in chosen))
    shape = solved(asked.get("embed_share", embed_share), asked.get("glu", glu), fixed)
    shares = {name: shape[name] for name in ("embed_share", "glu")}
    found = allocation.model_fields(shape)
    return others + [f"--{name}={value}" for name, value in found.items()], shares


@cache
def train_defaults():
    """{name: default} of train.py's settings."""
    return {name: default for name, (default, _) in read_settings(TRAIN).items()}


def prepare(settings):
    """Settings of train.py -> its Batches, and its model without weights."""
    for folder in folders(settings["data_dir"]):
        if not os.path.exists(os.path.join(folder, "meta.json")):
            raise ValueError(f"{folder} holds no prepared data; make it with "
                             f"python prepare.py --input=GLOB --out_dir={folder} "
                             "--tokenizer=bpe:16000")
    names = ("data_dir", "data_weights", "rows", "block_size", "block_schedule", "seed",
             "batch_size", "max_steps", "max_tokens", "batch_schedule")
    batches = Batches(*(settings[key] for key in names))
    tok = Tokenizer.load(os.path.join(batches.names[0], "tokenizer"))
    with torch.device("meta"):  # only counted
        return batches, build_model(model_settings(settings["arch"], settings, tok))


def flops_per_step(batches, model, settings):
    """Training FLOPs of a step, the mean over a schedule. Padding costs FLOPs too."""
    per_position = batches.flops_per_token(
        model, predicted_share(*(settings[key] for key in (
            "masking_type", "mlm_probability", "objective"))), settings["micro_batch"])
    return sum(float(share) * n_rows * T * per_position[T] for T, n_rows, share in batches.parts)


def compared(settings, data_sha256):
    """What makes two runs the same -> {name: value}."""
    kept = {key: value for key, value in settings.items() if key not in NOT_COMPARED}
    if kept["hide_masked"] == "auto":  # in older runs it is True or False
        anchored = dict(auto=kept["bottleneck"] == "strict", true=True, false=False)
        kept["hide_masked"] = not anchored[kept["anchored"]]
    kept["hide_masked"] = kept["hide_masked"] in (True, "true")
    return kept | dict(tokens_of_data_dir=data_sha256[:12])


def check_twins(plans):
    """Raises ValueError for two arms of the same settings: one of them was meant to differ."""
    seen = {}
    for name, arm in plans.items():
        key = json.dumps(compared(arm["settings"], arm["data_sha256"]))
        if key in seen:
            raise ValueError(f"arms {seen[key]} and {name} have the same settings; change or "
                             "remove one of them")
        seen[key] = name


def folder_of(name, seed, arm):
    """Where a run goes. That of a generated arm ends with a hash of its settings: edited axes make
    other folders, and those of before stay what they are.
    """
    suffix = ""
    if arm.get("generated"):
        about = json.dumps(compared(arm["settings"], arm["data_sha256"]), sort_keys=True)
        suffix = "_" + hashlib.sha256(about.encode()).hexdigest()[:8]
    return os.path.join(out_dir, f"{name}_s{seed}{suffix}")


def check_run(name, seed, arm):
    """Raises ValueError if the arm's folder holds a run of other settings, naming what differs.

    Its numbers would otherwise stand in the table as those of the arm.
    """
    folder = folder_of(name, seed, arm)
    found = read_object(os.path.join(folder, "result.json"), RUN_KEYS)
    if not found:
        # Without a result the run was stopped. Damaged checkpoints are left to train.py.
        paths = [os.path.join(folder, name) for name in ("ckpt.pt", "ckpt_prev.pt")]
        try:
            _, found = first_readable(list(filter(os.path.exists, paths)), say=lambda _: None)
        except (ValueError, IndexError):  # IndexError: there is none
            return
    # Older runs had fewer settings.
    before = compared(train_defaults() | found["settings"], found["data_sha256"])
    now = compared(arm["settings"] | dict(seed=seed), arm["data_sha256"])
    differ = [f"{key}: {before.get(key)} there, {value} here"
              for key, value in now.items() if before.get(key) != value]
    if differ:
        raise ValueError("\n       ".join([
            f"arm {name}: {folder} holds a run of other settings:", *differ,
            "give the arm another name, choose another --out_dir, or remove that run: rm -r "
            + shlex.quote(folder)]))


# ---- one run ---------------------------------------------------------------------

stopped = ""  # the signal that ends the sweep; empty while it goes on
minutes = []  # that the runs of this process have taken


def stop(number, _frame):
    """SIGTERM for the runs: train.py saves and ends. No further run starts."""
    global stopped
    stopped = signal.Signals(number).name
    stop_all()


def set_status(folder, status, name, seed, **more):
    """Replaces status.json of a run."""
    write_json(os.path.join(folder, "status.json"),
               dict(status=status, arm=name, seed=seed, time=time.time()) | more)


def run(number, name, seed, arm, until=0, watch=None):
    """One arm with one seed, in a folder of its own -> its results, or None if there are none.

    number: that of the run in the sweep, which decides the GPU. until: the step of a rung, behind
    which it stops; 0: to the end. watch: a function of the folder that ends a hopeless run.
    """
    if stopped:
        return None
    folder, start = folder_of(name, seed, arm), time.monotonic()
    try:
        path = os.path.join(folder, "result.json")
        found = read_object(path, RUN_KEYS)
        status = read_object(os.path.join(folder, "status.json")).get("status")
        if status == "killed":
            say(f"{name} seed {seed} was given up earlier")
            return None
        if not found and until and loss_at(read_log(folder), until):
            found = outcome(folder, seed, arm, until)
        if not found:
            os.makedirs(folder, exist_ok=True)
            set_status(folder, "running", name, seed)
            found = train(folder, number, seed, arm, until, watch)
            if not found:
                set_status(folder, "killed", name, seed)
                say(f"{name} seed {seed} is given up: worse than {reference_of()} by {kill_margin} "
                    f"{kill_unit} over {kill_window:,.0f} tokens")
                return None
            if not until:
                write_json(path, found)
            set_status(folder, "ranked" if until else "done", name, seed, loss=found["loss"],
                       tokens=found["tokens"])
            minutes.append((time.monotonic() - start) / 60)
        if evaluate and not found["maskings"]:
            found["maskings"] = losses_by_masking(folder, number)
            write_json(path, found)
    except (ValueError, OSError) as error:
        if not stopped:
            say(f"{name} seed {seed} failed: {error}")
            with contextlib.suppress(OSError):  # the disk is full, perhaps
                set_status(folder, "failed", name, seed, error=str(error))
        return None
    say(f"{name} seed {seed}: {found['loss']:.4f} nats after {found['tokens']:,} tokens")
    return dict(arm=name, seed=seed) | found


TOO_LARGE = re.compile(r"do not fit into memory; --micro_batch=(\d+) does")  # of train.py


def train(folder, number, seed, arm, until=0, watch=None):
    """train.py to the end of its budget, or to a rung -> the content of result.json; None if it was
    given up.
    """
    command = [TRAIN, *arm["arguments"], f"--seed={seed}", f"--out_dir={os.path.abspath(folder)}"]
    if until:
        command.append(f"--stop_at_step={until + 1}")  # behind the evaluation of the rung
    given_up = []

    def look():
        if not given_up and watch and watch(folder):
            given_up.append(True)
        return bool(given_up)

    try:
        ended = finish(command, folder, number, look if watch else None).get("stopped")
    except ValueError as error:
        fits = TOO_LARGE.search(str(error))
        if not fits:
            raise
        say(f"{folder}: too large for the memory, again with --micro_batch={fits[1]}, which gives "
            "the same result")
        ended = finish([*command, f"--micro_batch={fits[1]}"], folder, number,
                       look if watch else None).get("stopped")
    if given_up:
        return None
    if ended not in (*FINISHED, *(["stop_at_step"] if until else [])):
        # half a run must not stand beside whole ones
        raise ValueError(f"stopped early ({ended}); the same sweep again goes on")
    return outcome(folder, seed, arm, until)


def outcome(folder, seed, arm, until=0):
    """What a run has logged, to its end or to the step of a rung -> the content of result.json."""
    records = [r for r in read_log(folder) if "val_loss" in r]
    if until:
        records = [r for r in records if r["step"] <= until]
    if not records or records[-1]["val_loss"] is None:
        raise ValueError(f"the last validation loss in {folder}/log.jsonl is not a number")
    final = records[-1]
    return dict(settings=arm["settings"] | dict(seed=seed), data_sha256=arm["data_sha256"],
                tokens=final["tokens"], loss=final["val_loss"],
                bits_per_byte=final["val_bits_per_byte"], maskings={},
                health={key: final.get(key) for key in HEALTH.values()},
                curve=[(r["tokens"], r["val_loss"]) for r in records])


def losses_by_masking(folder, number):
    """eval.py -> {masking: loss}."""
    summary = finish([EVAL, f"--out_dir={os.path.abspath(folder)}", "--health_rows=0"], folder,
                     number)
    [losses, *_] = summary["data"].values()
    return {key: r["loss"] for key, r in losses.items() if key in MASKING_TYPES}


def finish(command, folder, number, watch=None):
    """Runs a Python command, with its output in folder/output.txt -> the JSON that it prints last.

    Raises ValueError with its last line if it fails.
    """
    path = os.path.join(folder, "output.txt")
    code = run_python(command, path, number, jobs, watch)
    with open(path, encoding="utf-8", errors="replace") as output:
        lines = output.read().splitlines()
    # Not simply the last line: a library may complain on stderr while Python ends.
    answer = next((line for line in reversed(lines) if line.startswith("{")), None)
    if code or answer is None:
        raise ValueError(f"{last_line(path)}\n    {shlex.join([sys.executable, *command])}")
    return json.loads(answer)


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
        cells = [name.replace("|", "\\|"), f"{arm['params']:,}", f"{arm['mflop_per_token']:.2f}",
                 f"{n_tokens:,}", f"{n_tokens * arm['mflop_per_token'] * 1e6:.2e}"]
        cells += [spread([r[key] for r in runs]) for key in ("loss", "bits_per_byte")]
        cells += [spread([r["maskings"].get(masking) for r in runs]) for masking in maskings]
        for key in HEALTH.values():
            digits = 1 if key == "concept_rank" else 3
            cells.append(spread([r["health"][key] for r in runs], digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def group(results, plans):
    """-> {arm: its results by seed}, the best median loss first; arms without results are left out.
    """
    by_arm = {name: sorted((r for r in results if r["arm"] == name), key=lambda r: r["seed"])
              for name in plans}
    order = sorted((name for name in plans if by_arm[name]),
                   key=lambda name: statistics.median(r["loss"] for r in by_arm[name]))
    return {name: by_arm[name] for name in order}


def write_results(by_arm, plans):
    """results.json and table.md."""
    in_order = [r for runs in by_arm.values() for r in runs]
    write_json(os.path.join(out_dir, "results.json"),
               dict(settings=config, plans=plans, results=in_order))
    text = table(by_arm, plans) + "\n"
    replace_file(os.path.join(out_dir, "table.md"), lambda file: file.write(text.encode()))
    write_tidy(in_order, plans)


def write_tidy(results, plans):
    """results.csv, a row for each run with the settings in which arms differ, and top1.json."""
    varied = {}
    for plan in plans.values():
        for key, value in plan["settings"].items():
            varied.setdefault(key, set()).add(str(value))
    names = [key for key, values in varied.items() if len(values) > 1]
    write_csv(os.path.join(out_dir, "results.csv"), [
        dict(arm=r["arm"], seed=r["seed"], loss=r["loss"], bits_per_byte=r["bits_per_byte"],
             tokens=r["tokens"], params=plans[r["arm"]]["params"],
             flops=r["tokens"] * plans[r["arm"]]["mflop_per_token"] * 1e6)
        | plans[r["arm"]]["shape"] | {name: r["settings"].get(name) for name in names}
        | r["health"] for r in results])
    by_arm = group(results, plans)
    furthest = max(r["tokens"] for r in results)  # arms that went on are ahead of those that stayed
    best = next(name for name, runs in by_arm.items() if runs[0]["tokens"] > 0.9 * furthest)
    write_json(os.path.join(out_dir, "top1.json"), dict(
        arm=best, loss=statistics.median(r["loss"] for r in by_arm[best]),
        tokens=by_arm[best][0]["tokens"], params=plans[best]["params"], shape=plans[best]["shape"],
        arguments=plans[best]["arguments"],
        settings={name: plans[best]["settings"][name] for name in names}))


def write_law(by_arm, plans):
    """law.json and law.png, of the arms that have finished two budgets."""
    runs = {}
    for name, found in by_arm.items():
        points = runs.setdefault(plans[name]["arm"], [])
        points += [(plans[name]["budget"], r["loss"]) for r in found]
    runs = {arm: runs[arm] for arm in dict.fromkeys(plan["arm"] for plan in plans.values())
            if len({budget for budget, _ in runs.get(arm, [])}) > 1}
    if not runs:
        return
    found = scaling.law(runs)
    write_json(os.path.join(out_dir, "law.json"), found)
    scaling.draw(runs, os.path.join(out_dir, "law.png"))
    for arm, of in found["arms"].items():
        low, high = of["alpha_90"]
        say(f"{arm}: loss = {of['a']:.3g} x FLOPs ** -{of['alpha']:.4f}, 90 % [{low:.4f}, "
            f"{high:.4f}], within {of['residual']:.3f} nats of its runs")
    for crossing in found["crossings"]:
        low, high = crossing["flops_90"]
        say(f"{' is better before, '.join(crossing['arms'])} after {crossing['flops']:.1e} FLOPs, "
            f"90 % [{low:.1e}, {high:.1e}]")


def start():
    """Everything that can fail because of a setting. -> plans by arm, seeds, lock of out_dir."""
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: expected 1 or more")
    check_companions()
    if search not in ("random", "tpe"):
        raise ValueError(f"search={search!r}: expected random or tpe")
    if search == "tpe":
        if rungs or budgets or arms.strip() or grid.strip():
            raise ValueError("search=tpe chooses all arms from ranges; leave out arms, grid, rungs "
                             "and budgets")
        load_optuna()
    seed_list, found, plans = read_seeds(), read_budgets(), {}
    for text, flops_of_run in found:
        for name, (arguments, is_generated) in all_arms().items():
            run_name = f"{name} {text}".strip()
            plans[run_name] = plan(run_name, arguments, flops_of_run, seed_list) | dict(
                arm=name, budget=flops_of_run, generated=is_generated)
    check_twins(plans)
    if reference and reference not in {plan["arm"] for plan in plans.values()}:
        raise ValueError(f"reference={reference!r} is no arm; these are: {', '.join(plans)}")
    check_outputs(out_dir, {"results.json": '"plans":', "table.md": "| MFLOP a token |",
                            "results.csv": "arm,seed,loss", "top1.json": '"arguments":',
                            "curves.png": "Matplotlib", "law.json": '"crossings":',
                            "law.png": "Matplotlib"})
    for name, arm in plans.items():
        for seed in seed_list:
            check_run(name, seed, arm)
    return plans, seed_list, lock_folder(out_dir)


# ---- a shape for a budget ----------------------------------------------------------

def solve_and_print():
    """The shape that the settings ask for, as a config and as JSON."""
    defaults, given = train_defaults(), resolve([f"--arch={arch}", *shlex.split(base)])
    # A plain Transformer, without the local mixers of this repository, unless base has any.
    if arch != "concept" and given["n_mixer"] == defaults["n_mixer"]:
        given["n_mixer"] = 0
    tok = SimpleNamespace(vocab_size=vocab_size, n_vocab=vocab_size, mask_id=0, eot_id=1)
    settings = model_settings(arch, given, tok)
    chosen = {"n_layer", "n_head", "token_dim", "ffn_dim"}  # by the solver
    if given["concept_dim"] == defaults["concept_dim"]:
        chosen.add("concept_dim")
    fixed = [f"--{name}={given[name]}" for name in sorted(chosen - {"concept_dim"})
             if given[name] != defaults[name]]
    if fixed:
        raise ValueError(f"base: {', '.join(fixed)}: the solver finds these; leave them out")
    settings = {name: value for name, value in settings.items() if name not in chosen}
    shape = allocation.solve(budget, embed_share, glu, settings)
    found = allocation.model_fields(shape)
    lines = {"arch": arch} | {name: value for name, value in given.items() if name != "arch"
                              and value != defaults[name] and name not in found} | found
    say(f"# {shape['params']:,} parameters with a {vocab_size:,}-word vocabulary, "
        f"{shape['embed_share']:.1%} of them the token table, ffn_dim {shape['glu']:.2f} x the "
        "width")
    say("\n".join(f"{name} = {value!r}" for name, value in lines.items()))
    width = found.get("concept_dim", found["token_dim"])
    print_result(dict(params=shape["params"], embed_share=round(shape["embed_share"], 4),
                      glu=round(shape["glu"], 4), n_layer=found["n_layer"], dim=width,
                      ffn_dim=found["ffn_dim"], n_head=found["n_head"])
                 | {name: found[name] for name in found
                    if name in ("token_dim", "concept_dim", "n_concept")})


def jobs_of(plans, seed_list):
    """-> [(name, seed, plan)], seed by seed, so that a sweep that is stopped has something to say
    about every arm; the reference comes first.
    """
    names = sorted(plans, key=lambda name: plans[name]["arm"] != reference_of(plans))
    return [(name, seed, plans[name]) for seed in seed_list for name in names]


def reference_of(plans=None):
    return reference or next(iter(plans or all_arms()))


def load_optuna():
    try:
        import optuna
    except ImportError:
        raise ValueError("search=tpe needs optuna: pip install -r requirements-extra.txt") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def search_by_tpe(plans, seed_list):
    """`trials` arms, `jobs` at a time, chosen after what the earlier ones have come to -> results.

    plans: gets those of the arms. The sampler has a seed, and its answers are told in order: the
    same sweep again asks for the same arms, and what is finished is read from its folders.
    """
    optuna, results, defaults = load_optuna(), [], train_defaults()
    axes = named_arms.read_ranges(ranges, trials, defaults)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    n_asked = 0
    while n_asked < trials and not stopped:
        asked, todo = [], []
        for _ in range(min(jobs, trials - n_asked)):
            trial = study.ask()
            values = {name: named_arms.as_text(
                name, trial.suggest_float(name, low, high, log=is_log), defaults)
                      for name, (low, high, is_log) in axes.items()}
            name, arguments = named_arms.arm_of(values)
            asked.append((trial, name))
            if name not in plans:
                plans[name] = plan(name, arguments, flops, seed_list) | dict(
                    arm=name, budget=flops, generated=True)
                todo += [(name, seed, plans[name]) for seed in seed_list]
        n_asked += len(asked)
        results += run_all(todo, plans, results, 0)
        for trial, name in asked:
            losses = [r["loss"] for r in results if r["arm"] == name]
            if losses:
                study.tell(trial, statistics.median(losses))
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return results


def progress_of(todo):
    """What tools/live.py shows of each run."""
    rows = []
    for name, seed, arm in todo:
        folder = folder_of(name, seed, arm)
        status = read_object(os.path.join(folder, "status.json")).get("status", "waiting")
        records = read_log(folder) if status != "waiting" else []
        losses = [r["val_loss"] for r in records if r.get("val_loss") is not None]
        step = records[-1]["step"] if records else 0
        rows.append((f"{name} s{seed}", status, records[-1].get("tokens", 0) if records else 0,
                     1.0 if status in ("done", "killed", "failed", "ranked") else min(
                         1.0, step / arm["settings"]["max_steps"]), losses[-1] if losses else None))
    return rows


def run_all(todo, plans, results, rung):
    """Runs all jobs, to the end of a rung if there are rungs -> their results. results: those of
    earlier rungs, for the table.
    """
    def curve(folder):
        return [(r["tokens"], r["val_loss"]) for r in read_log(folder)
                if r.get("val_loss") is not None]

    def watch_for(name, seed):
        first = next((n for n in plans if plans[n]["arm"] == reference_of(plans)), None)
        if not kill_margin or first is None or name == first:
            return None
        held_against = folder_of(first, seed, plans[first])
        return lambda folder: is_hopeless(curve(folder), curve(held_against), kill_margin,
                                          kill_unit, kill_window)

    done = []
    with live_table(lambda: progress_of(todo)), ThreadPoolExecutor(jobs) as pool:
        # to the step of this rung; of the last one, or without rungs, to the end
        runs = [pool.submit(run, number, name, seed, arm, [*arm["rungs"][:-1], 0][rung],
                            watch_for(name, seed))
                for number, (name, seed, arm) in enumerate(todo)]
        for n_done, one in enumerate(as_completed(runs), 1):
            if one.result():
                done.append(one.result())
                newer = {(r["arm"], r["seed"]) for r in done}
                with contextlib.suppress(OSError):  # a full disk: said below, if it still is full
                    write_results(group([r for r in results if (r["arm"], r["seed"]) not in newer]
                                        + done, plans), plans)
            if minutes and not stopped and n_done < len(todo):
                left = statistics.mean(minutes) * (len(todo) - n_done) / jobs
                say(f"  {n_done} of {len(todo)} runs, about {left:.1f} min left")
    return done


def report():
    """The report of the folder `dir`."""
    if not os.path.isdir(dir):
        raise ValueError(f"dir={dir!r} is no folder; expected one with runs, such as --dir=out")
    check_outputs(dir, {"report.csv": "run,status,arch", "report.md": "# ",
                        "report.html": "Pictures"})
    result = write_report(dir)
    say(f"{result['page']}: {result['runs']} runs, {result['arms']} arms; the lowest loss is "
        f"{result['loss']:.4f} nats, of {result['best']}")
    print_result(result)


def main():
    if is_report:
        with user_mistakes():
            report()
        return
    if solve:
        with user_mistakes():
            solve_and_print()
        return
    with user_mistakes():
        plans, seed_list, lock = start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup: go on without a terminal
            signal.signal(number, stop)
    results, todo = [], jobs_of(plans, seed_list)
    n_rungs = max(1, len(read_rungs()))
    if search == "tpe":
        with user_mistakes():
            results, n_rungs = search_by_tpe(plans, seed_list), 0
    else:
        say(f"{len(todo)} runs: {len(plans)} arms x {len(seed_list)} seeds, {jobs} at a time; "
            "after the first one the time left is known")
    for rung in range(n_rungs):
        done = run_all(todo, plans, results, rung)
        results = [r for r in results if (r["arm"], r["seed"]) not in
                   {(r["arm"], r["seed"]) for r in done}] + done
        if stopped or rung == n_rungs - 1:
            break
        losses = {name: [r["loss"] for r in runs] for name, runs in group(done, plans).items()}
        going_on = promoted(losses, promote)
        say(f"after {float(rungs.split(',')[rung]):,.0f} tokens these go on: {', '.join(going_on)}")
        todo = [job for job in todo if job[0] in going_on]
    by_arm = group(results, plans)
    if results:
        groups = [(name, plans[name]["mflop_per_token"] * 1e6, [r["curve"] for r in runs])
                  for name, runs in by_arm.items()]
        with user_mistakes():
            write_results(by_arm, plans)
            draw_losses(groups, os.path.join(out_dir, "curves.png"))
            write_law(by_arm, plans)
        say("\n" + table(by_arm, plans))
        say(f"\n{out_dir}/table.md, curves.png, results.json")
    if stopped:
        sys.exit(f"error: stopped by {stopped}, {len(results)} of {len(plans) * len(seed_list)} "
                 "runs are finished; the same command again goes on")
    if not results:
        sys.exit("error: every run failed; the reasons are above")
    n_killed = sum(1 for name, seed, arm in jobs_of(plans, seed_list) if read_object(os.path.join(
        folder_of(name, seed, arm), "status.json")).get("status") == "killed")
    failed = len(plans) * len(seed_list) - len(results) - n_killed
    losses = {name: [r["loss"] for r in runs] for name, runs in by_arm.items()}
    print_result(dict(out_dir=out_dir, runs=len(results), failed=failed, killed=n_killed,
                      loss=losses))
    lock.close()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
