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

In the order of the work: tools/arms.py makes the arms, sweep_plan.py what train.py would do with
them (shapes.py: the models of a budget), sweep_run.py one run, ranking.py says who goes on,
sweep_table.py writes the files.
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
import math
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure, read_settings

# the word that prepare.py calls a mode: what is done with --dir instead of a sweep
is_report = sys.argv[1:2] == ["report"]
config = configure(globals(), sys.argv[2:] if is_report else None)

import contextlib
import re
import signal
import statistics
from concurrent.futures import ThreadPoolExecutor, as_completed

from lib.files import check_outputs, print_result, say
from lib.jobs import stop_all
from lib.log import read_log
from lib.run import lock_folder, user_mistakes
from tools.arms import SOLVED, all_arms, chosen_by_tpe, load_optuna, read_ranges, split
from tools.live import live_table
from tools.ranking import curve_of, is_hopeless, promoted
from tools.shapes import print_shape
from tools.sweep_plan import (
    check_run,
    check_twins,
    folder_of,
    held_against,
    plan,
    read_budgets,
    read_rungs,
    read_seeds,
)
from tools.sweep_report import write_report
from tools.sweep_run import progress, run, status_of
from tools.sweep_table import (
    MARKS,
    draw_curves,
    group,
    losses_of,
    median_loss,
    table,
    write_law,
    write_results,
)

stopped = ""  # the signal that ends the sweep; empty while it goes on


def stop(number, _frame):
    """SIGTERM for the runs: train.py saves and ends. No further run starts."""
    global stopped
    stopped = signal.Signals(number).name
    stop_all()


# ---- before anything runs: everything that can fail because of a setting ----------


def check_choices():
    """Raises ValueError for settings of the sweep itself that make no sense together."""
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: expected 1 or more")
    if not 0 <= kill_margin < math.inf or not 0 < kill_window < math.inf or promote < 1:
        raise ValueError(f"kill_margin={kill_margin}, kill_window={kill_window}, "
                         f"promote={promote}: expected 0 or more, more than 0, 1 or more")
    if kill_unit not in ("nats", "ppl"):
        raise ValueError(f"kill_unit={kill_unit!r}: expected nats or ppl")
    defaults = {name: default for name, (default, _) in read_settings(__file__).items()}
    for owner, names in (("rungs", ["promote"]),
                         ("kill_margin", ["kill_unit", "kill_window", "reference"]),
                         ("ranges", ["trials", "search"]),
                         *([] if has_solved_axes() else [
                             ("solve", ["budget", "embed_share", "glu"])]),
                         ("solve", ["arch", "vocab_size"]), ("report", ["dir"])):
        unread = [name for name in names if config[name] != defaults[name]]
        if unread and not config.get(owner):
            found = ", ".join(f"{name}={config[name]}" for name in unread)
            off = " ".join(f"--{name}={defaults[name]}" for name in unread)
            if "arch" in unread:
                off += f'; for all arms of the sweep, --base="{base} --arch={arch}"'
            raise ValueError(f"{found}: of {owner} only; give {owner} too, or {off}")
    if search not in ("random", "tpe"):
        raise ValueError(f"search={search!r}: expected random or tpe")
    if search == "tpe":
        if rungs or budgets or arms.strip() or grid.strip():
            raise ValueError("search=tpe chooses all arms from ranges; leave out arms, grid, rungs "
                             "and budgets")
        load_optuna()
        read_ranges(ranges, trials)


def has_solved_axes():
    """Whether an arm leaves its shape to the solver."""
    return any(re.search(rf"\b{name}\b", text) for name in SOLVED
               for text in (arms, grid, ranges, base))


def plan_of(name, arm, arguments, amount, generated):
    """The plan of a run: an arm with a budget of `amount` FLOPs, 0 for that of its arguments."""
    return plan(name, [*split("base", base), *arguments], read_seeds(seeds), amount,
                read_rungs(rungs, flops, budgets), (budget, embed_share, glu)) | dict(
                    arm=arm, budget=amount, generated=generated)


def start():
    """-> plans by name, seeds, lock of out_dir. Raises ValueError."""
    check_choices()
    seed_list, amounts, plans = read_seeds(seeds), read_budgets(budgets, flops), {}
    if search == "random":  # tpe chooses its arms later
        found = all_arms(arms, grid, ranges, trials, out_dir)
        if not found:
            raise ValueError("there are no arms, no grid and no ranges: name a config, for example "
                             "python tools/sweep.py config/sweeps/dims.py")
        for text, amount in amounts:
            for arm, (arguments, generated) in found.items():
                name = f"{arm} {text}".strip()
                plans[name] = plan_of(name, arm, arguments, amount, generated)
    check_twins(plans)
    if reference and reference not in {arm["arm"] for arm in plans.values()}:
        raise ValueError(f"reference={reference!r} is no arm; these are: {', '.join(plans)}")
    check_outputs(out_dir, MARKS)
    for name, seed in runs_of(plans, seed_list):
        check_run(name, seed, plans[name], folder_of(out_dir, name, seed, plans[name]))
    return plans, seed_list, lock_folder(out_dir)


# ---- the runs ---------------------------------------------------------------------


def runs_of(plans, seed_list):
    """-> [(name, seed)], seed by seed, so that a sweep that is stopped has something to say about
    every arm; the reference comes first.
    """
    names = sorted(plans, key=lambda name: held_against(name, plans, reference) is not None)
    return [(name, seed) for seed in seed_list for name in names]


def run_all(todo, plans, results, until):
    """Runs [(name, seed)], at most `jobs` at a time -> {(name, seed): result}.

    results: those of earlier rungs, for the table. until: {name: step of a rung}, {} for the end.
    """
    def folder(name, seed):
        return folder_of(out_dir, name, seed, plans[name])

    def watch_for(name, seed):
        other = held_against(name, plans, reference)
        if not kill_margin or other is None:
            return None

        def watch():
            mine, its = (curve_of(read_log(folder(one, seed))) for one in (name, other))
            if is_hopeless(mine, its, kill_margin, kill_unit, kill_window):
                return (f"worse than {other} by {kill_margin} {kill_unit} over {kill_window:,.0f} "
                        "tokens")
        return watch

    def rows():
        return [progress(name, seed, plans[name], folder(name, seed)) for name, seed in todo]

    done, minutes = {}, []
    with live_table(rows), ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(run, name, seed, plans[name], folder(name, seed), (number, jobs),
                               until.get(name, 0), watch_for(name, seed), evaluate)
                   for number, (name, seed) in enumerate(todo)]
        for n_done, one in enumerate(as_completed(started), 1):
            found, took = one.result()
            if took:
                minutes.append(took)
            if found:
                done[found["arm"], found["seed"]] = found
                with contextlib.suppress(OSError):  # a full disk: said below, if it still is full
                    by_arm = group((results | done).values(), plans)
                    write_results(out_dir, by_arm, plans, config, evaluate)
            if minutes and not stopped and n_done < len(todo):
                left = statistics.mean(minutes) * (len(todo) - n_done) / jobs
                say(f"  {n_done} of {len(todo)} runs, about {left:.1f} min left")
    return done


def run_rungs(plans, seed_list):
    """All arms, after each rung the best of them -> {(name, seed): result}."""
    todo, results = runs_of(plans, seed_list), {}
    say(f"{len(todo)} runs: {len(plans)} arms x {len(seed_list)} seeds, {jobs} at a time; "
        "after the first one the time left is known")
    for number, tokens in enumerate(read_rungs(rungs, flops, budgets)[:-1]):
        done = run_all(todo, plans, results, {name: plans[name]["rungs"][number] for name in plans})
        results |= done
        if stopped:
            return results
        going_on = promoted(losses_of(group(done.values(), plans)), promote)
        say(f"after {tokens:,.0f} tokens these go on: {', '.join(going_on)}")
        todo = [(name, seed) for name, seed in todo if name in going_on]
    return results | run_all(todo, plans, results, {})


def search_by_tpe(plans, seed_list):
    """Arms of `ranges` as they are chosen -> {(name, seed): result}. plans: gets theirs."""
    results = {}

    def losses(asked):
        if stopped:
            return None
        new = [name for name in asked if name not in plans]
        plans.update({name: plan_of(name, name, asked[name], flops, True) for name in new})
        todo = [(name, seed) for name in new for seed in seed_list]
        results.update(run_all(todo, plans, results, {}))
        by_arm = group(results.values(), plans)
        return {name: median_loss(by_arm[name]) for name in asked if name in by_arm}

    chosen_by_tpe(read_ranges(ranges, trials), trials, jobs, losses)
    return results


# ---- the command ------------------------------------------------------------------


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


def sweep():
    """All arms, their files and the table -> exit code."""
    with user_mistakes():
        plans, seed_list, lock = start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup: go on without a terminal
            signal.signal(number, stop)
    with user_mistakes():
        results = (search_by_tpe if search == "tpe" else run_rungs)(plans, seed_list)
        by_arm = group(results.values(), plans)
        if results:
            write_results(out_dir, by_arm, plans, config, evaluate)
            draw_curves(out_dir, by_arm, plans)
            write_law(out_dir, by_arm, plans)
            say("\n" + table(by_arm, plans, evaluate))
            say(f"\n{out_dir}/table.md, curves.png, results.json")
    asked = runs_of(plans, seed_list)
    if stopped:
        sys.exit(f"error: stopped by {stopped}, {len(results)} of {len(asked)} runs are finished; "
                 "the same command again goes on")
    if not results:
        sys.exit("error: every run failed; the reasons are above")
    # A run that failed or was given up behind a rung still has the result of that rung.
    statuses = [status_of(folder_of(out_dir, name, seed, plans[name])) for name, seed in asked]
    failed, killed = statuses.count("failed"), statuses.count("killed")
    print_result(dict(out_dir=out_dir, runs=len(results), failed=failed, killed=killed,
                      loss=losses_of(by_arm)))
    lock.close()
    return bool(failed)


def main():
    if not is_report and not solve:
        sys.exit(sweep())
    with user_mistakes():
        if is_report:
            report()
        else:
            print_shape(arch, base, vocab_size, budget, embed_share, glu)


if __name__ == "__main__":
    main()
