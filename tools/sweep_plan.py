"""What a sweep is about to do, before anything runs: budgets, rungs, plans, the folders of runs.

Used by tools/sweep.py. A plan is what train.py would make of an arm, as plan() describes it; a
sweep has them by name, {name: plan}.
"""

import hashlib
import json
import math
import os
import shlex

import torch

from data.reader import Batches, folders
from data.tokenizer import Tokenizer
from lib.files import read_object
from lib.run import first_readable
from lib.settings import build_model, check_settings, model_settings
from masking import predicted_share
from tools.arms import resolve, train_defaults
from tools.shapes import with_shape

# Settings of train.py that decide how a run is done and not what it learns. A run may have others
# than its arm. Its data is compared by content, not by path.
NOT_COMPARED = ("out_dir", "data_dir", "device", "compile", "micro_batch", "log_interval",
                "save_minutes", "stop_at_step", "wandb", "log_to")


# ---- settings that are lists of numbers -------------------------------------------


def numbers(text, kind):
    """Numbers with commas between -> [kind]; [] if one of them is none."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        return []


def read_seeds(seeds):
    """-> [int]. Raises ValueError."""
    found = numbers(seeds, int)
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(f"seeds={seeds!r}: expected different whole numbers with commas between, "
                         "such as 1,2,3")
    return found


def read_budgets(budgets, flops):
    """-> [(text, training FLOPs or 0)], at least one. Raises ValueError."""
    if not 0 <= flops < math.inf:
        raise ValueError(f"flops={flops}: expected 0 or more")
    if not budgets:
        return [("", flops)]
    found = numbers(budgets, float)
    is_good = found and all(0 < amount < math.inf for amount in found)
    if not is_good or len(set(found)) < len(found) or flops:
        raise ValueError(f"budgets={budgets}: expected different numbers of FLOPs with commas "
                         "between, such as 1e13,1e14, and --flops=0")
    return list(zip(map(str.strip, budgets.split(",")), found))


def read_rungs(rungs, flops, budgets):
    """-> [tokens], [] for none. Raises ValueError."""
    if not rungs:
        return []
    found = numbers(rungs, float)
    is_good = found and all(1 <= n < math.inf for n in found)
    if not is_good or found != sorted(set(found)):
        raise ValueError(f"rungs={rungs!r}: expected numbers of tokens that grow, as 5e6,50e6")
    if flops or budgets:
        raise ValueError("rungs count tokens; leave out flops and budgets")
    return found


# ---- plans: everything a user can get wrong is refused here -----------------------


def plan(name, arguments, seeds, flops, rungs, shares):
    """What train.py would make of an arm, without its weights.

    flops: its budget, 0 for the one in its arguments. rungs: in tokens. shares: (parameters,
    embed_share, glu) for arguments that leave the shape to lib/allocation.py.
    -> {"arguments" (with the budget), "settings", "data_sha256", "params", "shape" (its shares),
    "rungs" (steps), "mflop_per_token"}.
    Raises ValueError for settings that train.py would refuse and for data that is not there.
    """
    try:
        arguments, shape = with_shape(arguments, *shares)
        settings = resolve(arguments)
        for seed in seeds:
            check_settings(settings | dict(seed=seed), train_defaults(), world_size=1)
        batches, model = prepare(settings)
        tokens_a_step = float(batches.tokens_a_step)
        a_step = flops_per_step(batches, model, settings)
        steps, rung_steps = 0, []
        if flops:
            steps = max(1, round(flops / a_step))
        if rungs:
            if settings["lr_schedule"] not in ("wsd", "constant"):
                raise ValueError(f"lr_schedule={settings['lr_schedule']}: with rungs expected wsd "
                                 "or constant, under which arms can be ranked before the end")
            rung_steps, every = steps_of_rungs(rungs, tokens_a_step)
            steps = rung_steps[-1]
            arguments.append(f"--eval_interval={every}")
        if steps:
            arguments += [f"--max_steps={steps}", "--max_tokens=0", "--max_minutes=0"]
            settings = resolve(arguments)
    except (ValueError, OSError) as error:
        raise ValueError(f"arm {name}: {error}") from None
    return dict(arguments=arguments, settings=settings, data_sha256=batches.sha256,
                params=model.num_params(), shape=shape, rungs=rung_steps,
                mflop_per_token=a_step / tokens_a_step / 1e6)


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


def steps_of_rungs(rungs, tokens_a_step):
    """-> the step of each rung, all of them at evaluations, and the steps between evaluations."""
    every = max(1, round(rungs[0] / tokens_a_step / 10))
    return [max(1, round(n / tokens_a_step / every)) * every for n in rungs], every


def held_against(name, plans, reference):
    """-> the name of the reference with the same budget; None for the reference itself.

    reference: the arm; "" is the first.
    """
    arm = reference or next(iter(plans.values()))["arm"]
    if plans[name]["arm"] == arm:
        return None
    return next(other for other, one in plans.items()
                if one["arm"] == arm and one["budget"] == plans[name]["budget"])


# ---- the folders of runs: never the number of other settings ----------------------


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
            # a small model has few possible shapes
            hint = ": one shape is the nearest to both, another budget may tell them apart"
            raise ValueError(f"arms {seen[key]} and {name} have the same settings"
                             f"{hint if arm['shape'] else ''}; change or remove one of them")
        seen[key] = name


def folder_of(out_dir, name, seed, arm):
    """Where a run of a plan goes. That of a generated arm ends with a hash of its settings: edited
    axes make other folders, and those of before stay what they are.
    """
    name, suffix = name.replace(" ", "_"), ""  # commands need no quotes
    if arm["generated"]:
        about = json.dumps(compared(arm["settings"], arm["data_sha256"]), sort_keys=True)
        suffix = "_" + hashlib.sha256(about.encode()).hexdigest()[:8]
    return os.path.join(out_dir, f"{name}_s{seed}{suffix}")


def read_result(folder):
    """result.json of a finished run; {} where there is none. Raises ValueError for others' files.
    """
    return read_object(os.path.join(folder, "result.json"), ("settings", "loss", "curve"))


def check_run(name, seed, arm, folder):
    """Raises ValueError if the folder holds a run of other settings, naming what differs.

    Its numbers would otherwise stand in the table as those of the arm.
    """
    found = read_result(folder)
    if not found:
        # Without a result the run was stopped. Damaged checkpoints are left to train.py.
        paths = [os.path.join(folder, file) for file in ("ckpt.pt", "ckpt_prev.pt")]
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
