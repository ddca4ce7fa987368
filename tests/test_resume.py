"""A run and its folder: what is resumed, refused, finished, and which checkpoint is read."""

import itertools
import re
import shutil

import pytest
import torch
from conftest import call, refused, result, run
from test_train import evaluations, losses, tiny, train

from lib.log import read_log
from lib.machine import Machine, find_machine
from lib.run import checkpoint_paths, load_run, read_checkpoint
from lib.settings import ARCHS, OBJECTIVES, OPTIMIZERS
from masking import MASKING_TYPES

pytestmark = pytest.mark.long


def weights(out_dir, name="ckpt.pt"):
    return read_checkpoint(out_dir / name)["model"]


def same_weights(a, b, name="ckpt.pt"):
    a, b = weights(a, name), weights(b, name)
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def stopped(data_dir, tmp_path_factory):
    """A run of 20 steps that was stopped at step 4, before an evaluation after step 0."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    train(data_dir, out, "--stop_at_step=4")
    return out


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    train(data_dir, out)
    return out


# ---- which checkpoint a command reads --------------------------------------------------

def test_a_stopped_run_is_read_where_it_stopped(stopped):
    """Not at step 0: weights that have learned nothing are never the best."""
    assert not (stopped / "best.pt").exists()
    done = call("tools/sample.py", f"--out_dir={stopped}", "--text=a [MASK]")
    assert f"{stopped}/ckpt.pt: step 4" in done.stdout


def test_a_checkpoint_newer_than_the_latest_evaluation_is_read_and_named(data_dir, tmp_path, capfd):
    train(data_dir, tmp_path, "--stop_at_step=14")
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 10
    for checkpoint, step in (("auto", 14), ("best", 10), ("last", 14), (tmp_path / "best.pt", 10),
                             ("best.pt", 10), ("ckpt_prev.pt", 10)):
        _, _, loaded = load_run(str(tmp_path), "cpu", str(checkpoint))
        assert loaded["step"] == step
    _, _, loaded = load_run(str(tmp_path / "best.pt"), "cpu")  # the file itself
    assert loaded["step"] == 10
    said = capfd.readouterr().err
    assert "ckpt.pt: step 14, newer than the latest evaluation (step 10)" in said
    assert "best.pt: step 10\n" in said
    (tmp_path / "ckpt.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes()[:1000])
    assert load_run(str(tmp_path), "cpu")[2]["step"] == 10


def test_a_finished_run_is_read_at_its_best_step(finished):
    best = min(evaluations(finished), key=lambda record: record["val_loss"])["step"]
    assert load_run(str(finished), "cpu")[2]["step"] == best


def test_a_checkpoint_that_is_not_there_is_named(stopped, tmp_path):
    for checkpoint, part in (("best", "--checkpoint=last"), ("x.pt", "auto, best, last or a file")):
        with pytest.raises(FileNotFoundError, match=part):
            checkpoint_paths(str(stopped), checkpoint)
    with pytest.raises(FileNotFoundError, match="train first"):
        checkpoint_paths(str(tmp_path))


# ---- settings that change --------------------------------------------------------------

@pytest.mark.parametrize("change", ["--weight_decay=0.9", "--beta1=0.5", "--beta2=0.5",
                                    "--grad_clip=0.01", "--learning_rate=1e-3",
                                    "--mlm_probability=0.4", "--masking_type=token"])
def test_a_setting_changed_on_resume_is_used(change, stopped, finished, data_dir, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "run")
    train(data_dir, out, change)
    assert losses(out).keys() == losses(finished).keys() and not same_weights(out, finished)


@pytest.mark.parametrize("change, part", [
    ("--init_table=random", "init_table: cooccurrence"), ("--eval_rows=8", "eval_rows: 16"),
    ("--overfit_batch=true", "overfit_batch: False"), ("--dropout=0.5", "dropout: 0.0"),
    ("--init_from=elsewhere", "started with init_from=auto")])
def test_a_setting_that_cannot_change_is_refused(change, part, stopped, data_dir):
    refused(train(data_dir, stopped, change, ok=False), part, "choose another --out_dir")


def test_a_schedule_of_row_lengths_keeps_its_steps(data_dir, tmp_path):
    args = ["--block_schedule=16:0.5,64:0.5"]
    train(data_dir, tmp_path, *args, "--stop_at_step=12")
    refused(train(data_dir, tmp_path, *args, "--max_steps=40", ok=False), "max_steps: 20")
    train(data_dir, tmp_path, *args)


def test_a_run_begun_with_what_is_refused_by_now_goes_on_without_it(stopped, data_dir, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "run")
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    saved["settings"]["rope_theta"], saved["settings"]["local_window"] = 500.0, 8
    saved["model_settings"]["n_frequency"] = 7
    torch.save(saved, out / "ckpt.pt")
    assert result(train(data_dir, out))["stopped"] == "max_steps"


def test_a_curriculum_keeps_its_stages(data_dir, tmp_path):
    args = ["--masking_type=importance", "--importance=ema", "--curriculum=easy_to_hard"]
    train(data_dir, tmp_path, *args, "--stop_at_step=12")
    refused(train(data_dir, tmp_path, *args, "--max_steps=40", ok=False), "max_steps: 20")


def test_a_step_to_stop_at_that_has_passed_is_named(stopped, data_dir, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "run")
    done = train(data_dir, out, "--stop_at_step=3")
    assert "stop_at_step=3 has passed, it trains to its end" in done.stdout
    assert result(done)["stopped"] == "max_steps"


def test_a_setting_added_later_does_not_keep_a_run_from_going_on(stopped, finished, data_dir,
                                                                 tmp_path, monkeypatch):
    """Checkpoints without it take its default, when they resume and when they are read."""
    out = shutil.copytree(stopped, tmp_path / "run")
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    del checkpoint["model_settings"]["lexicon"], checkpoint["settings"]["eval_rows"]
    checkpoint["settings"]["gone"] = 1
    torch.save(checkpoint, out / "ckpt.pt")
    assert load_run(str(out), "cpu")[0].cfg.lexicon
    train(data_dir, out, "--eval_rows=256", "--health_rows=0")
    assert same_weights(out, finished)


# ---- the end of a run ------------------------------------------------------------------

def test_a_finished_run_says_so_and_changes_nothing(finished, data_dir):
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    done = train(data_dir, finished, "--log_interval=5")
    assert f"{finished} is finished (max_steps): 20 steps" in done.stdout
    assert result(done)["loss"] == losses(finished)[20]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("change, part", [
    ("--learning_rate=1e-2", "learning_rate: 0.003 in the run, 0.01 here"),
    ("--max_steps=10", "20 steps in the run, 10 here")])
def test_a_finished_run_with_other_settings_is_refused(change, part, finished, data_dir):
    before = (finished / "config.json").read_bytes()
    refused(train(data_dir, finished, change, ok=False), "is finished", part, "--out_dir")
    assert (finished / "config.json").read_bytes() == before


def test_a_finished_run_trains_on_with_more_steps(finished, data_dir, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    assert result(train(data_dir, out, "--max_steps=25"))["step"] == 25


@pytest.mark.parametrize("args, reason", [
    (["--patience=2", "--eval_interval=2", "--learning_rate=.5"], "patience"),
    (["--overfit_batch=true", "--concept_dim=64", "--block_size=32", "--batch_size=1",
      "--micro_batch=1", "--learning_rate=1e-2", "--max_steps=400", "--eval_interval=200"],
     "overfit")])
def test_an_early_stop_is_remembered(args, reason, data_dir, tmp_path):
    first = result(train(data_dir, tmp_path, *args))
    again = [result(train(data_dir, tmp_path, *args)) for _ in range(2)]
    assert first["stopped"] == reason and first["step"] < 400
    for summary in again:
        assert [summary[key] for key in ("stopped", "step", "loss", "best_val_loss")] == [
            first[key] for key in ("stopped", "step", "loss", "best_val_loss")]


def test_a_run_stopped_at_its_last_step_is_evaluated_when_it_is_started_again(data_dir, tmp_path):
    args = ["--max_steps=15"]
    train(data_dir, tmp_path, *args, "--stop_at_step=15")
    assert evaluations(tmp_path)[-1]["step"] == 10
    assert result(train(data_dir, tmp_path, *args))["val_loss"] == evaluations(tmp_path)[-1][
        "val_loss"]
    assert [record["step"] for record in evaluations(tmp_path)] == [0, 10, 15]


def test_patience_runs_out_at_the_same_step_after_a_pre_emption(data_dir, tmp_path):
    args = ["--patience=2", "--eval_interval=2", "--learning_rate=.5"]
    whole = result(train(data_dir, tmp_path / "whole", *args))
    assert whole["stopped"] == "patience"
    train(data_dir, tmp_path / "cut", *args, f"--stop_at_step={whole['step']}")
    again = result(train(data_dir, tmp_path / "cut", *args))
    assert (again["stopped"], again["step"]) == ("patience", whole["step"])
    said = train(data_dir, tmp_path / "cut", *args).stdout
    assert "A larger --patience trains on" in said


def test_a_stopped_run_says_what_is_saved_and_how_to_go_on(data_dir, tmp_path):
    done = train(data_dir, tmp_path, "--stop_at_step=3")
    assert (f"stopped by stop_at_step at step 3: {tmp_path}/ckpt.pt is saved, and the same command "
            "goes on from there") in done.stdout


# ---- every kind of run resumes ---------------------------------------------------------

EASY = ["--max_steps=2", "--warmup_steps=1", "--block_size=32", "--batch_size=4", "--eval_rows=4",
        "--micro_batch=2", "--health_rows=0", "--init_table=random", "--dropout=0.1"]


def kinds_of_runs():
    """All that may be combined -> [(arch, bottleneck, objective, masking, optimizer)]."""
    models = [("concept", "open"), ("concept", "strict"), *((a, "open") for a in ARCHS)]
    for model in dict.fromkeys(models):
        for objective, masking in itertools.product(OBJECTIVES, MASKING_TYPES):
            if model[0] == "concept" and objective != "mlm":
                continue
            if objective == "clm" and masking != "whole_word":  # nothing is masked
                continue
            for optimizer in OPTIMIZERS:
                yield (*model, objective, masking, optimizer)


def with_every_pair(kinds):
    """Few of them, in which any two values that occur together do so once at least."""
    def pairs(kind):
        return set(itertools.combinations(enumerate(kind), 2))
    left = set().union(*map(pairs, kinds))
    while left:
        best = max(kinds, key=lambda kind: len(left & pairs(kind)))
        left -= pairs(best)
        yield best


def check_resume(kind, data_dir, home):
    arch, bottleneck, objective, masking, optimizer = kind
    args = [*EASY, f"--arch={arch}", f"--objective={objective}", f"--optimizer={optimizer}",
            f"--masking_type={masking}", f"--bottleneck={bottleneck}"]
    if bottleneck == "strict":
        args += ["--n_mixer=2"]  # the default, because it has no mixers
    if masking == "importance":
        args += ["--importance=model"]
    train(data_dir, home / "whole", *args)
    train(data_dir, home / "halves", *args, "--stop_at_step=1")
    train(data_dir, home / "halves", *args)
    a, b = (read_checkpoint(home / name / "ckpt.pt") for name in ("whole", "halves"))
    assert losses(home / "whole") == losses(home / "halves") and a["step"] == b["step"] == 2
    for part in ("model", "optimizers", "importance"):
        assert same_tree(a[part], b[part]), part


def same_tree(a, b):
    """Whether nested dicts and lists hold the same, tensors to the bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return a == b


@pytest.mark.parametrize("kind", with_every_pair(list(kinds_of_runs())), ids="-".join)
def test_resume_is_bitwise_for(kind, data_dir, tmp_path):
    check_resume(kind, data_dir, tmp_path)


@pytest.mark.by_hand
@pytest.mark.parametrize("kind", kinds_of_runs(), ids="-".join)
def test_resume_is_bitwise_for_all(kind, data_dir, tmp_path):
    check_resume(kind, data_dir, tmp_path)


# ---- folders ---------------------------------------------------------------------------

@pytest.mark.parametrize("left", ["best.pt", "log.jsonl", "config.json", "tokenizer", "curves.png"])
@pytest.mark.parametrize("init_from", ["auto", "scratch"])
def test_a_new_run_does_not_mix_with_what_a_folder_holds(left, init_from, finished, data_dir,
                                                         tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    if left == "config.json":
        (out / left).write_text('{"model_type": "bert"}')
    elif left == "tokenizer":
        shutil.copytree(finished / left, out / left)
    elif left == "curves.png":
        (out / left).write_text("my picture")
    else:
        shutil.copy(finished / left, out / left)
    before = sorted(out.iterdir())
    refused(train(data_dir, out, f"--init_from={init_from}", ok=False), left, "something else")
    assert sorted(out.iterdir()) == before


def test_a_log_of_another_program_is_kept(data_dir, tmp_path):
    """Its lines have no step, so a new run would take it for an empty log and empty it."""
    (tmp_path / "log.jsonl").write_text('{"event": "mine"}\n')
    refused(train(data_dir, tmp_path, ok=False), "log.jsonl of something else")
    assert (tmp_path / "log.jsonl").read_text() == '{"event": "mine"}\n'


def test_a_run_that_ended_before_its_first_checkpoint_is_started_again(finished, data_dir,
                                                                       tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    for path in out.glob("*.pt"):
        path.unlink()
    first, *_ = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_text(first + "\n")
    train(data_dir, out)
    assert [record["step"] for record in evaluations(out)] == [0, 10, 20]


def test_init_from_means_what_it_does_in_nanogpt(finished, stopped, data_dir, tmp_path):
    refused(train(data_dir, tmp_path, "--init_from=resume", ok=False), "no checkpoint to resume")
    refused(train(data_dir, finished, "--init_from=scratch", ok=False), "already holds a run")
    out = shutil.copytree(stopped, tmp_path / "run")
    train(data_dir, out, "--init_from=resume")
    assert same_weights(out, finished)
    new = tmp_path / "new"
    train(data_dir, new, f"--init_from={finished}/ckpt.pt", "--stop_at_step=1")
    first = evaluations(new)[0]["val_loss"]
    assert first == pytest.approx(evaluations(finished)[-1]["val_loss"])
    assert (new / "best.pt").exists(), "these weights have learned something at step 0"
    train(data_dir, new, f"--init_from={finished}/ckpt.pt")  # the same command resumes it


def test_a_folder_that_cannot_be_written_is_named_without_a_traceback(data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    refused(train(data_dir, tmp_path / "file" / "run", ok=False), "file/run")


# ---- schedule --------------------------------------------------------------------------

def test_a_warm_up_longer_than_the_run_becomes_a_tenth_of_it(data_dir, tmp_path):
    done = train(data_dir, tmp_path, "--warmup_steps=500", "--min_lr=1e-5")
    assert "warmup_steps=500" in done.stdout and "2 are used" in done.stdout
    lr = [record["lr"] for record in read_log(tmp_path) if "lr" in record]
    assert max(lr) == pytest.approx(3e-3) and lr[-1] < 1e-4


def test_a_lowest_rate_above_the_peak_is_refused(data_dir, tmp_path):
    refused(train(data_dir, tmp_path, "--learning_rate=1e-6", ok=False),
            "min_lr=1e-05 is above learning_rate=1e-06", "--min_lr=1e-08")


# ---- several processes -----------------------------------------------------------------

def test_two_processes_with_dropout_and_a_time_limit_resume_bit_for_bit(data_dir, tmp_path):
    args = ["--dropout=0.2", "--max_minutes=60", "--max_steps=8"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(data_dir, whole, *args, nproc=2)
    train(data_dir, halves, *args, "--stop_at_step=3", nproc=2)
    train(data_dir, halves, *args, nproc=2)
    assert losses(whole) == losses(halves) and same_weights(whole, halves)


CLOCKS = """
import os, runpy, sys, time, torch
start, rank = time.monotonic(), int(os.environ["RANK"])
real = time.monotonic
time.monotonic = lambda: real() + 30 * rank * (real() - start)  # clocks that differ by far
sys.argv = ["train.py", *sys.argv[1:]]
names = runpy.run_path("train.py", run_name="__main__")
torch.save([p.detach() for p in names["model"].parameters()], f"{names['out_dir']}/{rank}.pt")
"""


def test_processes_stay_together_whatever_their_clocks_say(data_dir, tmp_path):
    """The learning rate under max_minutes and the dropout of each process."""
    run("-c", CLOCKS, *tiny(data_dir, tmp_path, "--max_minutes=1", "--dropout=0.1",
                            "--max_steps=8"), nproc=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_fewer_rows_than_processes_are_evaluated(data_dir, tmp_path):
    train(data_dir, tmp_path, "--eval_rows=1", "--max_steps=2", nproc=2)
    assert len(evaluations(tmp_path)) == 2
    call_two = run("tools/eval.py", f"--out_dir={tmp_path}", "--rows=1", nproc=2)
    assert result(call_two)["rows"] == {str(data_dir): 1}


def test_commands_for_one_process_ignore_what_torchrun_left_behind(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_machine("cpu") == Machine(torch.device("cpu"), 0, 1)


# ---- trackers --------------------------------------------------------------------------

def test_one_wandb_run_for_all_starts_and_tensorboard_beside_it(data_dir, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    args = ["--log_to=wandb,tensorboard", "--wandb=offline"]
    train(data_dir, tmp_path, *args, "--stop_at_step=3", fresh=True)
    run_id = (tmp_path / "wandb_id").read_text()
    train(data_dir, tmp_path, *args, "--max_steps=5", fresh=True)
    assert (tmp_path / "wandb_id").read_text() == run_id
    folders = [path.name for path in tmp_path.glob("wandb/offline-run-*")]
    assert {name.split("-")[-1] for name in folders} == {run_id}
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("broken", ["missing", "no key", "no network"])
def test_a_tracker_that_does_not_work_does_not_end_the_run(broken, data_dir, tmp_path, monkeypatch,
                                                           capfd):
    import sys
    from types import SimpleNamespace
    modes = []

    def init(mode, **_):
        modes.append(mode)
        if mode == "online":
            raise ConnectionError("no route to host")
    fake = SimpleNamespace(init=init, Settings=dict, log=lambda *_, **__: 1 / 0,
                           login=lambda prompt: broken != "no key", teardown=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "missing" else fake)
    done = train(data_dir, tmp_path, "--log_to=wandb", "--max_steps=3")
    assert result(done)["step"] == 3 and "WARNING: wandb" in done.stdout
    assert modes == {"missing": [], "no key": ["offline"],
                     "no network": ["online", "offline"]}[broken]
    if broken != "missing":
        assert "wandb failed, training goes on without it: division by zero" in done.stdout
        assert "wandb sync" in done.stdout


def test_an_unknown_tracker_is_refused(data_dir, tmp_path):
    refused(train(data_dir, tmp_path, "--log_to=mlflow", ok=False), "wandb or tensorboard")


# ---- curves and health -----------------------------------------------------------------

def test_evaluations_say_how_to_read_the_concepts_and_draw_the_curves(data_dir, tmp_path):
    done = call("train.py", *tiny(data_dir, tmp_path, "--max_steps=2", "--eval_interval=1"),
                picture=True)
    assert "concepts untrained: effective rank" in done.stdout
    assert re.search(r"concepts (good|watch|collapsed)", done.stdout)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_damaged_line_of_the_log_is_passed_over(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    with open(out / "log.jsonl", "a") as log:
        log.write('5\n{"loss": 1}\n[]\n{"step": 21, "lo')
    assert read_log(out) == read_log(finished)


