"""tools/sweep.py: equal conditions for every arm, equal compute if asked for, exact restarts, and
never the number of other settings."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from random import Random
from unittest import mock

import pytest
from conftest import ROOT, Fork, call, fork, refused, result, run

from configurator import configure
from lib import files as files_of_lib
from lib import jobs
from lib.files import FolderLock
from tools import arms, sweep_run
from tools.sweep_plan import check_twins, held_against

pytestmark = pytest.mark.long

BASE = ("--dtype=fp32 --block_size=32 --n_layer=1 --n_head=2 --concept_dim=32 --token_dim=64 "
        "--ffn_dim=32 --batch_size=4 --max_steps=3 --eval_interval=2 --eval_rows=8 "
        "--health_rows=4 --init_table=random")
ARMS = """
strict   --bottleneck=strict --n_concept=6   # the arm's own settings win over the base
plain    --arch=transformer
"""
SWEEP = str(ROOT / "tools/sweep.py")


@pytest.fixture(autouse=True)
def arms_start_at_once(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Fork)
    monkeypatch.setattr(jobs, "stopping", False)
    Fork.started.clear()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture
def sweep(out, data_dir):
    """A function that runs the sweep of ARMS in `out`, with more arguments."""
    def run(*more, ok=True, picture=False):
        # picture: whether curves.png is drawn, half a second
        with contextlib.nullcontext() if picture else mock.patch("tools.sweep_table.draw_losses"):
            return call(SWEEP, f"--base=--data_dir={data_dir} {BASE}", f"--arms={ARMS}",
                        "--seeds=1", f"--out_dir={out}", *more, ok=ok)
    return run


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("table.md", "results.json")}


def trained():
    return [args for args in Fork.started if args[0].endswith("train.py")]


# ---- results ---------------------------------------------------------------------


def test_every_arm_and_seed_is_in_the_table(sweep, out):
    first = result(sweep("--seeds=1,2", picture=True))
    assert first["runs"] == 4 and first["failed"] == 0
    assert set(first["loss"]) == {"strict", "plain"}
    table = (out / "table.md").read_text()
    assert table.count("\n") == 4 and "[" in table
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((out / "results.json").read_text())
    found = {(r["arm"], r["seed"]) for r in saved["results"]}
    assert found == {(arm, seed) for arm in first["loss"] for seed in (1, 2)}
    ranks = {r["arm"]: r["health"]["concept_rank"] for r in saved["results"]}
    assert ranks["strict"] > 0 and ranks["plain"] is None
    assert first["loss"]["strict"][0] != first["loss"]["strict"][1], "seeds differ"


def test_a_sweep_run_twice_starts_nothing_and_its_table_stays(sweep, out):
    sweep("--seeds=1,2")
    before = files(out)
    Fork.started.clear()
    assert "min left" not in sweep("--seeds=1,2").stdout
    assert not Fork.started and files(out) == before
    sweep("--seeds=2,1")
    assert not Fork.started and (out / "table.md").read_bytes() == before["table.md"]


def test_early_stopping_is_not_forgotten_by_the_same_sweep_again(sweep, tmp_path):
    early = [f"--out_dir={tmp_path}",
             "--arms=a --patience=1 --max_steps=40 --eval_interval=1 --learning_rate=2"]
    sweep(*early)
    before = files(tmp_path)
    assert json.loads(before["results.json"])["results"][0]["tokens"] < 40 * 4 * 32
    sweep(*early)
    assert files(tmp_path) == before and len(Fork.started) == 1


def test_equal_flops_buy_fewer_tokens_where_a_token_costs_more(sweep, tmp_path):
    # Padding costs FLOPs and counts as no token.
    padded = "padded --arch=transformer --rows=document --block_schedule=8:0.5,32:0.5"
    command = [f"--out_dir={tmp_path}", "--flops=5e8",
               f"--arms=plain --arch=transformer\n{padded}"]
    sweep(*command)
    saved = json.loads((tmp_path / "results.json").read_text())
    plans = saved["plans"]
    assert plans["padded"]["mflop_per_token"] > 1.005 * plans["plain"]["mflop_per_token"]
    for r in saved["results"]:
        plan = plans[r["arm"]]
        assert r["tokens"] * plan["mflop_per_token"] * 1e6 == pytest.approx(5e8, rel=0.05)
    refused(sweep(command[0], command[2], "--flops=7e8", ok=False), "max_steps:", "there,")


def test_a_run_made_before_hide_masked_could_be_auto_is_the_same_run(sweep, out):
    sweep()
    path = sorted(out.glob("*_s1/result.json"))[0]
    before = path.read_bytes()
    found = json.loads(before)
    found["settings"]["hide_masked"] = True
    path.write_text(json.dumps(found))
    Fork.started.clear()
    sweep()
    assert not Fork.started
    path.write_bytes(before)


def test_several_budgets_give_a_law_for_each_arm(sweep, tmp_path):
    arms = "--arms=plain --arch=transformer\nmixers --arch=transformer --n_layer=0"
    done = sweep(f"--out_dir={tmp_path}", "--budgets=2e8,6e8", arms)
    saved = json.loads((tmp_path / "results.json").read_text())
    losses = {r["arm"]: r["loss"] for r in saved["results"]}
    assert set(losses) == {"plain 2e8", "plain 6e8", "mixers 2e8", "mixers 6e8"}
    assert (tmp_path / "plain_2e8_s1" / "result.json").exists()  # commands need no quotes
    found = json.loads((tmp_path / "law.json").read_text())["arms"]
    for arm, of in found.items():
        for budget in ("2e8", "6e8"):  # through two points the law goes exactly
            law = of["a"] * float(budget) ** -of["alpha"]
            assert law == pytest.approx(losses[f"{arm} {budget}"], rel=1e-6)
        assert f"{arm}: loss = " in done.stdout
    assert (tmp_path / "law.png").stat().st_size > 5000


@pytest.mark.parametrize("budgets", ["1e8,1e8", "0,1e8", "1e8,x", "-1", "inf"])
def test_budgets_that_are_none_are_refused(sweep, tmp_path, budgets):
    refused(sweep(f"--out_dir={tmp_path}", f"--budgets={budgets}", ok=False), f"budgets={budgets}")


def test_the_other_maskings_can_be_asked_for_later(sweep, out):
    sweep()
    Fork.started.clear()
    sweep("--evaluate=1", "--arms=plain --arch=transformer")
    assert [args[0].split("/")[-1] for args in Fork.started] == ["eval.py"]
    [found] = json.loads((out / "results.json").read_text())["results"]
    assert {"token", "whole_word", "diffusion"} < set(found["maskings"])
    assert "whole_word masks" in (out / "table.md").read_text()


def test_the_plan_is_what_train_makes_of_the_arm(sweep, out):
    sweep()
    plans = json.loads((out / "results.json").read_text())["plans"]
    for name, arm in plans.items():
        done = json.loads((out / f"{name}_s1" / "output.txt").read_text().splitlines()[-1])
        assert arm["params"] == done["params"]
        config = json.loads((out / f"{name}_s1" / "config.json").read_text())
        own = dict(seed=1, out_dir=config["out_dir"])
        assert arm["settings"] | own == {key: config[key] for key in arm["settings"]}


# ---- never the number of other settings --------------------------------------------


def test_an_edited_arm_is_refused_and_the_difference_named(sweep, out):
    sweep()
    before = files(out)
    edited = "--arms=plain --arch=transformer --learning_rate=2e-2"
    done = sweep(edited, ok=False)
    refused(done, "arm plain", "plain_s1 holds a run of other settings",
            "learning_rate: 0.001 there, 0.02 here", "rm -r")
    assert files(out) == before and (out / "plain_s1" / "ckpt.pt").exists()
    # what decides how a run is done, and not what it learns, may change
    sweep("--arms=plain --arch=transformer --log_interval=1 --save_minutes=1 --micro_batch=2")


def test_an_edited_arm_is_refused_also_where_only_a_checkpoint_tells(sweep, tmp_path):
    """A run that was stopped, or one of a sweep from before result.json."""
    command = [f"--out_dir={tmp_path}", "--arms=a --stop_at_step=2"]
    sweep(*command, ok=False)
    assert not (tmp_path / "a_s1" / "result.json").exists()
    refused(sweep(command[0], "--arms=a --n_layer=2", ok=False), "n_layer: 1 there, 2 here")
    done = sweep(command[0], "--arms=a")
    assert result(done)["runs"] == 1, "the same arm goes on"
    (tmp_path / "a_s1" / "result.json").unlink()
    refused(sweep(command[0], "--arms=a --n_layer=2", ok=False), "n_layer: 1 there, 2 here")


def test_a_folder_of_runs_may_move_but_not_to_other_data(sweep, data_dir, tmp_path):
    arms = "--arms=a"
    sweep(f"--out_dir={tmp_path}/old", arms)
    os.rename(tmp_path / "old", tmp_path / "new")
    shutil.copytree(data_dir, tmp_path / "copy")
    Fork.started.clear()
    sweep(f"--out_dir={tmp_path}/new", arms, f"--base=--data_dir={tmp_path}/copy {BASE}")
    assert not Fork.started, "the data is compared by content"
    shutil.rmtree(tmp_path / "copy")
    call("prepare.py", f"--input={data_dir.parent}/0*.txt", f"--out_dir={tmp_path}/copy",
        "--tokenizer=byte", "--num_proc=1", "--val_fraction=0.2")
    refused(sweep(f"--out_dir={tmp_path}/new", arms, f"--base=--data_dir={tmp_path}/copy {BASE}",
                  ok=False), "a_s1 holds a run of other settings", "tokens_of_data_dir")
    # a run under the name of another seed
    os.rename(tmp_path / "new" / "a_s1", tmp_path / "new" / "a_s7")
    refused(sweep(f"--out_dir={tmp_path}/new", arms, "--seeds=7", ok=False), "seed: 1 there, 7")


def test_two_arms_of_the_same_settings_or_name_and_a_seed_twice_are_refused(sweep, tmp_path):
    where = f"--out_dir={tmp_path}/none"
    refused(sweep(where, "--arms=a --n_layer=2\nb\nc --n_layer=1", ok=False),
            "arms b and c have the same settings")
    refused(sweep(where, "--arms=a\na --n_layer=2", ok=False), "used once")
    for seeds in ("1,1", "1,01", "1,", "", "1,x", "-1", "\u00b2"):
        refused(sweep(where, f"--seeds={seeds}", ok=False), f"seeds={seeds!r}", "1,2,3")
    refused(sweep(where, "--arms=a --seed=5", ok=False), "arm a: --seed=5", "use --seeds")
    refused(sweep(where, "--arms=a --out_dir=x", ok=False), "arm a: --out_dir=x")
    refused(sweep(where, "--arms=a --seed 5", ok=False), "arm a: --seed", "use --seeds")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["../esc", "/abs", "a/b", "..", ".hidden", "''", "a\\\\b", "a\tb"])
def test_an_arm_writes_into_the_folder_of_the_sweep_only(sweep, tmp_path, name):
    word = name if name != "a\tb" else '"a\tb"'
    done = sweep(f"--out_dir={tmp_path}/out", f"--arms={word} --n_layer=1", ok=False)
    refused(done, "cannot be the name of a folder")
    assert not list(tmp_path.iterdir())


def test_a_name_with_a_bar_or_other_signs_keeps_the_table_whole(sweep, tmp_path):
    names = ["a|b", "\u00fc =1"]
    arms = "\n".join(f'"{name}" --n_layer={n}' for n, name in enumerate(names, 1))
    assert set(result(sweep(f"--out_dir={tmp_path}", f"--arms={arms}"))["loss"]) == set(names)
    lines = (tmp_path / "table.md").read_text().splitlines()
    bars = {line.replace("\\|", "").count("|") for line in lines}
    assert len(lines) == 4 and len(bars) == 1 and any("a\\|b" in line for line in lines)


# ---- another folder ------------------------------------------------------------------


def test_relative_paths_mean_the_folder_where_the_sweep_was_started(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data" / "mine")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "base.py").write_text('data_dir = "data/mine"\nn_layer = 3\n')
    done = call(SWEEP, f"--base={BASE} conf/base.py", "--arms=a --n_head=4", "--seeds=1",
                "--out_dir=o", cwd=tmp_path)
    assert result(done)["runs"] == 1
    config = json.loads((tmp_path / "o/a_s1/config.json").read_text())
    assert config["data_dir"] == "data/mine" and config["n_layer"] == 3
    assert (tmp_path / "o/table.md").exists()


# ---- what goes wrong -----------------------------------------------------------------


def test_an_arm_that_fails_is_named_and_the_others_are_kept(sweep, data_dir, tmp_path):
    arms = "--arms=good\nbad --overfit_batch=true"
    done = sweep(f"--out_dir={tmp_path}", arms, ok=False)
    assert done.returncode == 1
    assert "bad seed 1 failed: error: overfit_batch reached" in done.stdout
    assert f"train.py --data_dir={data_dir}" in done.stdout, "the command, to try it alone"
    assert result(done)["runs"] == 1 and result(done)["failed"] == 1


def test_a_run_that_was_stopped_is_no_result(sweep, tmp_path):
    """SIGTERM and stop_at_step end a run in order, with exit code 0.

    Half a run must not stand beside whole ones.
    """
    arms = "--arms=good\nhalf --stop_at_step=2 --n_layer=2"
    done = sweep(f"--out_dir={tmp_path}", arms, ok=False)
    assert done.returncode == 1
    assert "half seed 1 failed: stopped early (stop_at_step)" in done.stdout
    assert result(done)["runs"] == 1 and set(result(done)["loss"]) == {"good"}


def test_a_run_without_a_last_loss_never_gets_an_earlier_one(sweep, tmp_path):
    """A loss that is not finite is null in the log."""
    sweep(f"--out_dir={tmp_path}", "--arms=a")
    (tmp_path / "a_s1" / "result.json").unlink()
    with open(tmp_path / "a_s1" / "log.jsonl", "a") as file:
        file.write('{"step": 3, "tokens": 384, "val_loss": null}\n')
    done = sweep(f"--out_dir={tmp_path}", "--arms=a", ok=False)
    refused(done, "a seed 1 failed", "log.jsonl is not a number", "every run failed")


def test_a_run_that_crashed_in_the_middle_goes_on(sweep, tmp_path):
    command = [f"--out_dir={tmp_path}", "--arms=a"]
    sweep(*command)
    whole = files(tmp_path)
    folder = tmp_path / "a_s1"
    (folder / "result.json").unlink()
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    done = sweep(*command, ok=False)
    refused(done, "a seed 1 failed", "no checkpoint in", "can be read")
    shutil.rmtree(folder)
    sweep(*command)
    assert files(tmp_path) == whole


def test_bad_arms_are_refused_before_anything_runs(sweep, tmp_path):
    where = f"--out_dir={tmp_path}/none"
    refused(sweep(where, "--arms=", ok=False), "there are no arms", "config/sweeps/dims.py")
    refused(sweep(where, "--arms=--n_layer=2", ok=False), "expected a name")
    refused(sweep(where, "--arms=a --n_layr=2", ok=False), "arm a:", "did you mean 'n_layer'")
    refused(sweep(where, "--arms=ok\na --n_head=3", ok=False), "arm a:", "does not divide")
    refused(sweep(where, "--arms=ok\na --learning_rate=-1", ok=False), "arm a:", "learning_rate=-1")
    refused(sweep(where, '--arms=a --x "', ok=False), "No closing quotation", "arms:")
    refused(sweep(where, "--arms=a no/such.py", ok=False), "arm a:", "no/such.py: no such config")
    refused(sweep(where, "--jobs=0", ok=False), "jobs=0")
    refused(sweep(where, "--flops=nan", ok=False), "flops=nan")
    nothing = f"--arms=a --data_dir={tmp_path}/nothing"
    refused(sweep(where, nothing, ok=False), "holds no prepared data", "prepare.py")
    assert not (tmp_path / "none").exists()


def test_two_sweeps_do_not_write_into_one_folder(sweep, tmp_path):
    with FolderLock(tmp_path):
        refused(sweep(f"--out_dir={tmp_path}", "--arms=a", ok=False), "is writing to", "--out_dir")


def test_a_disk_that_is_full_is_named_and_the_results_stay(sweep, tmp_path, monkeypatch):
    def full(path, *rest, real=files_of_lib.replace_file):
        if str(path).endswith("results.json"):
            raise OSError(28, "No space left on device")
        return real(path, *rest)
    monkeypatch.setattr(files_of_lib, "replace_file", full)
    done = sweep(f"--out_dir={tmp_path}", "--arms=a", ok=False)
    refused(done, "error: [Errno 28] No space left on device")
    assert (tmp_path / "a_s1" / "result.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is started again
    assert result(sweep(f"--out_dir={tmp_path}", "--arms=a"))["runs"] == 1


@pytest.mark.parametrize("name, text", [
    ("table.md", "my own table\n"), ("curves.png", "mine"), ("results.json", "[1]"),
    ("results.json", '{"mine": 1}'), ("a_s1/result.json", "mine"),
    ("a_s1/result.json", '{"settings": {')])
def test_a_file_that_no_sweep_wrote_is_never_replaced(sweep, tmp_path, name, text):
    (tmp_path / "a_s1").mkdir()
    (tmp_path / name).write_text(text)
    refused(sweep(f"--out_dir={tmp_path}", "--arms=a", ok=False), name, "move it away")
    assert (tmp_path / name).read_text() == text and not Fork.started


def test_a_stdout_that_goes_away_loses_no_result(sweep, data_dir, tmp_path):
    sweep(f"--out_dir={tmp_path}", "--arms=a")
    whole = files(tmp_path)
    for name in whole:
        (tmp_path / name).unlink()
    code = ("import sys, runpy; sys.argv = sys.argv[:]; sys.argv[0] = 'tools/sweep.py'; "
            "sys.stdout = open('/dev/full', 'w'); "
            "runpy.run_path('tools/sweep.py', run_name='__main__')")
    run("-c", code, f"--base=--data_dir={data_dir} {BASE}", "--seeds=1", "--arms=a",
        f"--out_dir={tmp_path}")
    assert files(tmp_path) == whole and (tmp_path / "curves.png").exists()


def test_a_signal_saves_the_runs_writes_the_table_and_the_same_sweep_goes_on(sweep, tmp_path):
    """SIGHUP, of a terminal that closes; SIGTERM and Ctrl-C take the same way."""
    arms = "--arms=short\nlong --max_steps=200000 --n_layer=2"
    command = [f"--out_dir={tmp_path}", "--seeds=1,2"]

    def signal_soon():
        log = tmp_path / "long_s1" / "log.jsonl"
        while not (log.exists() and '"loss"' in log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGHUP)

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup runs the tests
    threading.Thread(target=signal_soon).start()
    done = sweep(*command, arms, ok=False)
    refused(done, "stopped by SIGHUP, 1 of 4 runs", "the same command again goes on")
    assert len(trained()) == 2, "no further run is started"
    assert (tmp_path / "table.md").read_text().count("short") == 1
    assert (tmp_path / "long_s1" / "ckpt.pt").exists(), "the run has saved"
    jobs.stopping = False
    Fork.started.clear()
    assert result(sweep(f"--out_dir={tmp_path}", "--arms=short", "--seeds=1,2"))["runs"] == 2
    assert len(Fork.started) == 1, "short with seed 2; that with seed 1 was finished"


# A sweep as a process group: its runs join it, as children of a command do. argv: its arguments.
GROUP = """
import multiprocessing.forkserver, os, runpy, subprocess, sys, conftest
os.setpgrp()
# forks of the server that this is a fork of; a server of its own would have to import torch
multiprocessing.forkserver._forkserver.ensure_running = lambda: None
JOIN = f'''
import os, runpy, sys, conftest
os.setpgid(0, {os.getpid()})
conftest.shorten_train()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
'''

class Joined(conftest.Fork):
    def __init__(self, command, **rest):
        super().__init__([command[0], "-c", JOIN, *command[1:]], **rest)

subprocess.Popen = Joined
sys.argv = ["tools/sweep.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_sweep_killed_five_times_with_all_its_runs_ends_as_an_undisturbed_one(data_dir, tmp_path):
    """kill -9 of the process group at random moments, of a fixed seed; runs save every step."""
    def start_in(out):
        base = f"--data_dir={data_dir} {BASE} --max_steps=9 --log_interval=1 --save_minutes=0"
        return fork(ROOT, ["-c", GROUP, f"--base={base}", f"--arms={ARMS}", "--seeds=1",
                           f"--out_dir={out}"], tmp_path / "output", tmp_path / "output")

    def n_records(out):
        return sum(len(path.read_bytes().splitlines()) for path in out.glob("*/log.jsonl"))

    (tmp_path / "output").touch()
    whole, out, random = tmp_path / "whole", tmp_path / "killed", Random(0)
    undisturbed = start_in(whole)
    undisturbed.join()
    assert undisturbed.exitcode == 0, (tmp_path / "output").read_text()
    codes = []
    for n in sorted(random.sample(range(1, n_records(whole) - 2), 5)):
        process = start_in(out)
        while process.exitcode is None and n_records(out) < n:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            while True:  # until all of them are gone
                os.killpg(process.pid, signal.SIGKILL)
                time.sleep(0.01)
        process.join()
        codes.append(process.exitcode)
    assert set(codes) <= {0, -signal.SIGKILL} and codes[0] == -signal.SIGKILL
    last = start_in(out)
    last.join()
    assert last.exitcode == 0, (tmp_path / "output").read_text()
    for name in ("results.csv", "table.md", "top1.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("last, message", [
    ("print('all is well')", "it has printed no result"),
    ("print('{half of it')", "it has printed no result"),
    ("", "it has printed no result"),
    ("raise SystemExit('the reason')", "a seed 1 failed: the reason")])
def test_a_run_that_prints_no_json_has_failed(sweep, tmp_path, monkeypatch, last, message):
    """Whatever its exit code. The command and the file with its output are named."""
    script = tmp_path / "other_train.py"
    script.write_text(last)
    monkeypatch.setattr(sweep_run, "TRAIN", str(script))
    done = sweep(f"--out_dir={tmp_path}/out", "--arms=a", ok=False)
    refused(done, message, "other_train.py --data_dir=", "every run failed")
    assert status_of(tmp_path / "out" / "a_s1") == "failed"


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/sweeps/*.py")), ids=lambda p: p.stem)
def test_the_sweeps_in_config_have_arms_that_differ(path, monkeypatch):
    """Not their plans: those need the data."""
    monkeypatch.chdir(ROOT)
    sweep = configure(dict(__file__=SWEEP, __doc__="", __name__="__main__"), [str(path)])
    texts = [sweep[name] for name in ("arms", "grid", "ranges", "trials", "out_dir")]
    plans = {}
    for name, (own, _) in arms.all_arms(*texts).items():
        shares = [word for word in own if word.startswith(("--embed_share=", "--glu="))]
        settings = arms.resolve([*sweep["base"].split(),
                                 *(word for word in own if word not in shares)])
        settings["shares"] = shares
        plans[name] = dict(settings=settings, data_sha256=settings["data_dir"])
    assert len(plans) > 1
    check_twins(plans)


# ---- arms from axes ----------------------------------------------------------------


def test_every_combination_of_a_grid_is_an_arm_in_a_folder_of_its_own(sweep, data_dir, tmp_path):
    axes = "--grid=n_concept 4 6\nffn_dim 16 32  # widths"
    done = result(sweep(f"--out_dir={tmp_path}", "--arms=", axes))
    names = [f"n_concept={n} ffn_dim={f}" for n in (4, 6) for f in (16, 32)]
    assert sorted(done["loss"]) == sorted(names)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    expected = {f"{name}_s1".replace(" ", "_") for name in names}
    assert {name.rpartition("_")[0] for name in folders} == expected
    Fork.started.clear()
    sweep(f"--out_dir={tmp_path}", "--arms=", axes)
    assert not trained(), "nothing is run twice"
    # other settings are other folders, and what was there stays
    base = f"--base=--data_dir={data_dir} {BASE} --dropout=0.1"
    sweep(f"--out_dir={tmp_path}", "--arms=", "--grid=n_concept 4 6", base)
    now = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert now > folders and len(now) == 6


def test_random_arms_are_the_same_at_each_call(sweep, tmp_path):
    args = [f"--out_dir={tmp_path}", "--arms=", "--trials=3",
            "--ranges=learning_rate 1e-4 1e-2 log\nn_concept 2 9"]
    losses = result(sweep(*args))["loss"]
    assert len(losses) == 3
    for name in losses:
        rate, n = (part.partition("=")[2] for part in name.split())
        assert 1e-4 <= float(rate) <= 1e-2 and 2 <= int(n) <= 9
    Fork.started.clear()
    assert result(sweep(*args))["loss"] == losses and not trained()


def test_random_arms_of_a_whole_number_are_drawn_until_they_differ(sweep, tmp_path):
    args = [f"--out_dir={tmp_path}", "--arms=", "--ranges=n_concept 2 4"]
    assert len(result(sweep(*args, "--trials=3"))["loss"]) == 3
    refused(sweep(*args, "--trials=4", ok=False), "the ranges hold 3 different arms")


def test_shares_of_a_budget_are_axes_whose_shapes_the_solver_finds(sweep, data_dir, tmp_path):
    base = ("--arch=transformer --n_mixer=0 --dtype=fp32 --block_size=32 --batch_size=4 "
            "--max_steps=3 --eval_rows=8 --init_table=random")
    # width 32: 4 layers of 96 and 3 of 144 have this many parameters
    done = result(sweep(f"--out_dir={tmp_path}", "--arms=", "--budget=64000",
                        "--embed_share=0.16", f"--base=--data_dir={data_dir} {base}",
                        "--grid=glu 3 4.5"))
    assert len(done["loss"]) == 2
    plans = json.loads((tmp_path / "results.json").read_text())["plans"]
    for factor, n_layer in ((3, 4), (4.5, 3)):
        plan = plans[f"glu={factor}"]
        settings = plan["settings"]
        assert abs(plan["params"] / 64_000 - 1) < 0.005
        assert settings["ffn_dim"] == factor * settings["token_dim"] == factor * 32
        assert settings["n_layer"] == n_layer and plan["shape"]["glu"] == factor
    refused(sweep(f"--out_dir={tmp_path}/twins", "--arms=", "--budget=64000", "--embed_share=0.16",
                  f"--base=--data_dir={data_dir} {base}", "--grid=glu 3 3.01", ok=False),
            "arms glu=3 and glu=3.01 have the same settings", "another budget may tell them apart")


@pytest.mark.parametrize("args, message", [
    (["--grid=n_concep 4 6"], "n_concep is no setting of train.py, did you mean n_concept?"),
    (["--grid=n_concept 4"], "grid varies nothing"),
    (["--grid=n_concept 4 4"], "n_concept has a value twice"),
    (["--grid=n_concept"], "expected SETTING VALUE VALUE"),
    (["--grid=n_concept 4 many"], "expected a whole number"),
    (["--grid=learning_rate 1e-3 fast"], "learning_rate = 'fast': expected a number"),
    (["--grid=bias true maybe"], "bias = 'maybe': expected true or false"),
    (["--grid=masking_type token nothing"], "masking_type='nothing': expected"),
    (["--grid=glu wide 2"], "arm glu=wide: glu=wide: expected a number"),
    (["--ranges=n_concept two 8", "--trials=2"], "expected SETTING LOW HIGH"),
    (["--ranges=n_concept 2 inf", "--trials=2"], "expected SETTING LOW HIGH"),
    (["--ranges=masking_type 1 2", "--trials=2"], "expected"),
    (["--ranges=n_concept 4 8"], "trials=0 with 1 ranges: give both or none"),
    (["--ranges=n_concept 8 4", "--trials=2"], "expected SETTING LOW HIGH"),
    (["--ranges=learning_rate 0 1 log", "--trials=2"], "expected SETTING LOW HIGH"),
    (["--grid=glu 2 3", "--budget=500"], "below the smallest token table"),
])
def test_axes_that_are_none_are_refused_before_anything_runs(args, message, sweep, tmp_path):
    done = sweep(f"--out_dir={tmp_path / 'new'}", "--arms=", *args, ok=False)
    refused(done, message)
    assert not trained() and not (tmp_path / "new").exists()


def test_a_shape_is_printed_as_a_config_and_as_json(tmp_path):
    done = call(SWEEP, "--solve=1", "--budget=10e6", "--embed_share=0.35", "--glu=2.66")
    shape = result(done)
    assert list(shape)[:7] == ["params", "embed_share", "glu", "n_layer", "dim", "ffn_dim",
                               "n_head"]
    assert abs(shape["params"] / 10e6 - 1) < 0.005 and shape["dim"] == shape["token_dim"]
    lines = done.stdout.splitlines()[:-1]
    assert lines[0].startswith(f"# {shape['params']:,} parameters")
    (tmp_path / "shape.py").write_text("\n".join(lines))
    settings = configure(dict(__file__=str(ROOT / "train.py"), __doc__="", __name__="__main__"),
                         [str(tmp_path / "shape.py")])
    assert settings["ffn_dim"] == shape["ffn_dim"] and settings["n_mixer"] == 0
    refused(call(SWEEP, "--solve=1", "--base=--ffn_dim=100", ok=False), "the solver finds these")
    refused(call(SWEEP, "--solve=1", "--budget=60000", ok=False), "below the smallest token table")
    for args, message in ((["--base=--arch=concept"], "arch=concept: give it to this command"),
                          (["--base=--vocab_size=8000"], "give it to this command, --vocab_size"),
                          (["--arch=foo"], "arch='foo'"), (["--vocab_size=0"], "vocab_size=0")):
        refused(call(SWEEP, "--solve=1", *args, ok=False), message)
    mixed = call(SWEEP, "--solve=1", "--base=--n_mixer=2").stdout
    assert "n_mixer = 0" not in mixed, "what is asked for is kept, be it the default"


# ---- rungs -------------------------------------------------------------------------

RANKED = (BASE.replace("--max_steps=3 --eval_interval=2", "")
          + " --lr_schedule=wsd --warmup_steps=2 --log_interval=5")
# tokens: 128 a step; the second arm's learning rate is far too small
TWO = "--arms=good --learning_rate=1e-2\nbad --learning_rate=1e-6 --min_lr=1e-7"


@pytest.fixture
def ranked(sweep, data_dir, tmp_path):
    def run(*more, ok=True):
        return sweep(f"--out_dir={tmp_path}", f"--base=--data_dir={data_dir} {RANKED}", TWO, *more,
                     ok=ok)
    return run


def status_of(folder):
    return json.loads((folder / "status.json").read_text())["status"]


def test_only_the_best_arms_train_on_and_they_do_not_begin_again(ranked, tmp_path):
    done = ranked("--rungs=2560,7680", "--promote=1")
    assert "after 2,560 tokens these go on: good" in done.stdout
    assert status_of(tmp_path / "good_s1") == "done" and status_of(tmp_path / "bad_s1") == "ranked"
    assert len(trained()) == 3
    logs = {name: [json.loads(line) for line in (tmp_path / f"{name}_s1/log.jsonl").open()]
            for name in ("good", "bad")}
    assert [r["step"] for r in logs["good"] if "val_loss" in r] == [*range(0, 61, 2)]
    assert max(r["step"] for r in logs["bad"]) <= 21
    best = json.loads((tmp_path / "top1.json").read_text())
    assert best["arm"] == "good" and best["tokens"] == 7680
    assert best["settings"]["learning_rate"] == 1e-2
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert rows[0].startswith("arm,seed,loss,bits_per_byte,tokens,params,flops")
    assert "learning_rate" in rows[0] and len(rows) == 3
    # an uninterrupted run of the whole length comes to the same loss
    Fork.started.clear()
    again = ranked("--rungs=2560,7680", "--promote=1")
    assert not trained() and result(again)["loss"] == result(done)["loss"]


def test_a_promoted_run_is_trained_on_and_evaluated_at_its_end(ranked, tmp_path):
    done = ranked("--rungs=2560,5120", "--promote=1", "--evaluate=1")
    found = {name: json.loads((tmp_path / f"{name}_s1/result.json").read_text())
             for name in ("good",)}
    assert found["good"]["tokens"] == 5120 and found["good"]["maskings"]["token"] > 0
    assert not (tmp_path / "bad_s1/result.json").exists() and result(done)["failed"] == 0


def test_a_run_that_fails_behind_a_rung_is_counted(ranked, monkeypatch):
    real = sweep_run.train

    def train(folder, seed, arm, slot, until=0, watch=None):
        if not until:
            raise ValueError("ended by SIGKILL")
        return real(folder, seed, arm, slot, until, watch)
    monkeypatch.setattr(sweep_run, "train", train)
    done = ranked("--rungs=2560,5120", "--promote=1", ok=False)
    assert done.returncode == 1 and result(done)["failed"] == 1 and result(done)["runs"] == 2


def test_a_run_that_was_killed_says_so(tmp_path):
    with pytest.raises(ValueError, match="ended by SIGKILL; the last line of .*: busy"):
        sweep_run.finish(["-c", "import os; print('busy', flush=True); os.kill(os.getpid(), 9)"],
                         str(tmp_path), (0, 1))


def test_a_promoted_run_is_the_run_that_was_never_stopped(ranked, sweep, data_dir, tmp_path):
    ranked("--rungs=2560,5120", "--promote=1")
    whole = run("train.py", f"--data_dir={data_dir}", *RANKED.split(), "--learning_rate=1e-2",
                "--max_steps=40", "--eval_interval=2", "--seed=1", f"--out_dir={tmp_path}/whole")
    found = json.loads((tmp_path / "good_s1" / "result.json").read_text())["loss"]
    assert found == result(whole)["val_loss"]


def test_a_hopeless_arm_is_given_up_for_good(ranked, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "WATCH_SECONDS", 0.05)
    args = ["--rungs=16000", "--kill_margin=0.2", "--kill_window=3750"]
    done = ranked(*args, ok=False)
    assert "bad seed 1 is given up: worse than good by 0.2 nats over 3,750 tokens" in done.stdout
    summary = result(done)
    assert summary["killed"] == 1 and summary["failed"] == 0 and list(summary["loss"]) == ["good"]
    assert status_of(tmp_path / "bad_s1") == "killed"
    Fork.started.clear()
    assert "bad seed 1 was given up earlier" in ranked(*args).stdout and not trained()


def test_an_arm_is_held_against_the_reference_with_its_own_budget():
    plans = {f"{arm} {budget}": dict(arm=arm, budget=budget) for budget in (1, 2) for arm in "ab"}
    assert [held_against(name, plans, "") for name in plans] == [None, "a 1", None, "a 2"]
    assert [held_against(name, plans, "b") for name in plans] == ["b 1", None, "b 2", None]


def test_what_does_not_fit_into_memory_runs_again_with_smaller_micro_batches(
        tmp_path, monkeypatch):
    calls = []

    def finish(command, folder, slot, watch=None):
        calls.append(command)
        if len(calls) == 1:
            raise ValueError("error: 8 rows of 32 tokens do not fit into memory; --micro_batch=2 "
                             "does, and the result is the same")
        return dict(stopped="max_steps")

    monkeypatch.setattr(sweep_run, "finish", finish)
    monkeypatch.setattr(sweep_run, "outcome", lambda *_: dict(loss=1.0))
    plan = dict(arguments=["--a=1"])
    assert sweep_run.train(str(tmp_path), 1, plan, (0, 1)) == dict(loss=1.0)
    assert calls[1] == [*calls[0], "--micro_batch=2"]


@pytest.mark.parametrize("args, message", [
    (["--rungs=5,4"], "expected numbers of tokens that grow"),
    (["--rungs=nan"], "expected numbers of tokens that grow"),
    (["--rungs=many"], "expected numbers of tokens that grow"),
    (["--rungs=100,200", "--flops=1e9"], "rungs count tokens"),
    (["--rungs=100,200", "--base="], "lr_schedule=cosine: with rungs expected wsd"),
    (["--promote=1"], "promote=1: of rungs only"),
    (["--reference=good"], "reference=good: of kill_margin only"),
    (["--kill_margin=0.1", "--reference=other"], "reference='other' is no arm"),
    (["--kill_margin=0.1", "--kill_unit=bits"], "expected nats or ppl"),
    (["--kill_margin=-1"], "expected 0 or more"),
    (["--arch=concept"], "arch=concept: of solve only"),
    (["--vocab_size=8000"], "vocab_size=8000: of solve only"),
    (["--budget=5e6"], "of solve only"),
    (["--dir=out"], "dir=out: of report only"),
])
def test_settings_of_rungs_that_make_no_sense_are_refused(args, message, ranked, data_dir):
    if "--base=" in args:
        args = [args[0], f"--base=--data_dir={data_dir} {BASE}"]
    refused(ranked(*args, ok=False), message)
    assert not trained()


# ---- search ------------------------------------------------------------------------


def test_tpe_asks_for_the_same_arms_again_and_reads_what_is_finished(sweep, data_dir, tmp_path):
    pytest.importorskip("optuna")
    args = [f"--out_dir={tmp_path}", "--arms=", "--search=tpe", "--trials=4",
            "--ranges=learning_rate 1e-4 1e-1 log\nn_concept 2 9"]
    first = result(sweep(*args))
    assert len(first["loss"]) == 4 and first["failed"] == 0
    Fork.started.clear()
    assert result(sweep(*args))["loss"] == first["loss"] and not trained()
    # more trials go on from these
    more = result(sweep(*args, "--trials=5"))
    assert len(trained()) == 1 and set(first["loss"]) < set(more["loss"])
    refused(sweep(*args, "--grid=ffn_dim 16 32", ok=False), "search=tpe chooses all arms")
    refused(sweep(*args, "--search=grid", ok=False), "expected random or tpe")


def test_the_live_table_says_what_is_done_and_how_long_the_rest_takes():
    live = pytest.importorskip("rich") and __import__("tools.live").live
    rows = [("a [x] s1", "done", 1000, 1.0, 3.0), ("b s1", "running", 500, 0.5, None),
            ("c s1", "waiting", 0, 0.0, None)]
    assert live.time_left(rows, 60) == "50% done, about 1.0 min left"
    assert live.time_left(rows, 0) == "" and live.time_left([], 60) == ""
    from rich.console import Console
    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(live.table(rows, 60))
    text = console.export_text()
    assert "a [x] s1" in text and "3.0000" in text and "running" in text
