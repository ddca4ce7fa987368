"""Training end to end, by the commands a user types: exact, resumable, hard to break."""

import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, call, fork, refused, result, run, start, wait_for

from configurator import read_settings
from lib import optimizers
from lib.log import describe_first_loss, read_log, why_not_overfit
from lib.run import RENAMED, load_run, read_checkpoint, save_checkpoint

pytestmark = pytest.mark.long

TINY = ["--block_size=64", "--n_layer=1", "--n_head=2", "--n_concept=8", "--concept_dim=32",
        "--token_dim=32", "--ffn_dim=64", "--n_mixer=1", "--batch_size=8", "--micro_batch=8",
        "--max_steps=20", "--warmup_steps=5", "--eval_interval=10", "--eval_rows=16",
        "--log_interval=1", "--dtype=fp32", "--learning_rate=3e-3", "--health_rows=8"]


def tiny(data_dir, out_dir, *args):
    """Arguments of train.py for the tiny model."""
    return [f"--data_dir={data_dir}", f"--out_dir={out_dir}", *TINY, *args]


def train(data_dir, out_dir, *args, ok=True, nproc=1, fresh=False):
    """Runs train.py on the tiny model, in a new process if `fresh` or if there are several."""
    args = tiny(data_dir, out_dir, *args)
    if fresh or nproc > 1:
        return run("train.py", *args, ok=ok, nproc=nproc)
    return call("train.py", *args, ok=ok)


def start_long(data_dir, out_dir, *args):
    """Starts a run that lasts until it is stopped -> process."""
    return start("train.py", *tiny(data_dir, out_dir, "--max_steps=100000", *args))


def losses(out_dir):
    return {r["step"]: r["loss"] for r in read_log(out_dir) if "loss" in r}


def evaluations(out_dir):
    return [r for r in read_log(out_dir) if "val_loss" in r]


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """The out_dir of an uninterrupted run of 20 steps with dropout, and its losses."""
    out = tmp_path_factory.mktemp("run") / "whole"
    summary = result(train(data_dir, out, "--dropout=0.1"))
    assert summary["step"] == 20 and summary["stopped"] == "max_steps" and summary["val_loss"] < 5.8
    return out


@pytest.mark.parametrize("stop", [7, 10])
def test_resume_is_bitwise(stop, trained, data_dir, tmp_path):
    """20 steps == 7, stop as a pre-emption would, 13 more: all losses and weights, dropout on.

    Step 10 is due for an evaluation: the pre-empted run leaves it out, the resumed run does it.
    """
    first = result(train(data_dir, tmp_path, "--dropout=0.1", f"--stop_at_step={stop}", fresh=True))
    assert first["step"] == stop and first["stopped"] == "stop_at_step"
    second = result(train(data_dir, tmp_path, "--dropout=0.1", fresh=True))
    assert second["step"] == 20
    assert losses(tmp_path) == losses(trained)
    a, b = (read_checkpoint(d / "ckpt.pt") for d in (trained, tmp_path))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert evaluations(trained) == evaluations(tmp_path)


IMPORTANCE = ("--masking_type=importance --importance=model --curriculum=easy_to_hard "
              "--mlm_probability=0.3 --eval_interval=6")


@pytest.mark.parametrize("args", [
    "--optimizer=muon", "--masking_type=diffusion --mlm_probability=1 --diffusion_schedule=bell",
    IMPORTANCE, IMPORTANCE.replace("model", "ema")],
    ids=["muon", "diffusion", "importance model", "importance ema"])
def test_resume_is_bitwise_with(args, data_dir, tmp_path):
    """The state of an importance estimator included; evaluations in between change nothing."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(data_dir, whole, *args.split())
    train(data_dir, halves, *args.split(), "--stop_at_step=12")
    train(data_dir, halves, *args.split())
    assert losses(whole) == losses(halves)
    assert evaluations(whole) == evaluations(halves)


def test_logging_and_evaluation_do_not_change_training(trained, data_dir, tmp_path):
    train(data_dir, tmp_path, "--dropout=0.1", "--eval_interval=3", "--log_interval=4")
    assert losses(tmp_path).items() <= losses(trained).items() and len(losses(tmp_path)) == 5


@pytest.mark.parametrize("masking", [
    "", "--masking_type=diffusion --mlm_probability=1", IMPORTANCE],
    ids=["words", "diffusion", "importance"])
def test_micro_batches_and_processes_give_the_same_losses(masking, data_dir, tmp_path):
    """1 x 8 == 4 micro-batches x 2 == 2 processes x 2 x 2, to 1e-5, with padding, as rows grow."""
    expected = None
    grow = ["--rows=document", "--block_schedule=16:0.5,64:0.5", "--max_steps=8", *masking.split()]
    cuts = [("one", 8, 1), ("ddp", 2, 2)]
    for name, size, nproc in cuts if masking else [*cuts, ("micro", 2, 1)]:
        train(data_dir, tmp_path / name, f"--micro_batch={size}", *grow, nproc=nproc)
        now = losses(tmp_path / name)
        expected = expected or now
        assert now == pytest.approx(expected, abs=1e-5)
    evals = [[r["val_loss"] for r in evaluations(tmp_path / name)] for name in ("one", "ddp")]
    assert evals[0] == pytest.approx(evals[1], abs=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_save_and_stop(number, data_dir, tmp_path):
    process = start_long(data_dir, tmp_path)
    wait_for(process, "step 5/")
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    summary = json.loads(rest.strip().splitlines()[-1])
    assert process.returncode == 0 and summary["stopped"] == number.name
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == summary["step"]


def test_a_signal_reaches_all_processes_under_torchrun(data_dir, tmp_path):
    """SIGHUP, of a connection that is lost; torchrun passes SIGTERM on by the same code."""
    process = start("-c", "from torch.distributed.run import main; main()", "--nproc_per_node=2",
                    "--master_port=29511", "train.py",
                    *tiny(data_dir, tmp_path, "--max_steps=100000"))
    wait_for(process, "step 5/")
    process.send_signal(signal.SIGHUP)
    rest, _ = process.communicate(timeout=60)
    assert '"stopped": "SIGHUP"' in rest
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] >= 5


def test_a_run_started_by_nohup_goes_on_without_its_terminal(data_dir, tmp_path):
    ignore = "import runpy, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); " \
             "sys.argv[:1] = ['train.py']; runpy.run_path('train.py', run_name='__main__')"
    process = start("-c", ignore, *tiny(data_dir, tmp_path))
    wait_for(process, "step 2/")
    process.send_signal(signal.SIGHUP)
    rest, _ = process.communicate(timeout=60)
    assert '"stopped": "max_steps"' in rest


@pytest.mark.parametrize("reader", ["head", "full disk"])
def test_a_stdout_that_goes_away_does_not_end_the_run(reader, data_dir, tmp_path):
    if reader == "head":  # it reads a few lines and ends
        process = start("train.py", *tiny(data_dir, tmp_path))
        wait_for(process, "step 2/")
        process.stdout.close()
        process = process.process
    else:
        errors = tmp_path / "errors"
        errors.touch()
        process = fork(ROOT, ["train.py", *tiny(data_dir, tmp_path)], "/dev/full", errors)
    process.join(60)
    assert process.exitcode == 0
    assert list(losses(tmp_path)) == list(range(1, 21))
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 20


def test_kill_never_loses_the_checkpoint(data_dir, tmp_path):
    """kill -9 while checkpoints are being written all the time: the folder always resumes."""
    reached = 0
    for wait in (2, 3, 8):
        process = start_long(data_dir, tmp_path, "--save_minutes=0")
        wait_for(process, f"step {reached + wait}/")
        process.kill()
        process.communicate()
        step = read_checkpoint(tmp_path / "ckpt.pt")["step"]
        assert step >= reached
        reached = step
    with open(tmp_path / "log.jsonl", "ab") as log:
        log.write(b"\x00\xff\x89")  # what a machine that loses power can leave behind
    done = train(data_dir, tmp_path, f"--max_steps={reached + 3}")
    changed = f"changed since: max_steps=100000 -> {reached + 3}"
    assert f"resuming at step {reached}, {changed}" in done.stdout
    steps = [r["step"] for r in read_log(tmp_path) if "loss" in r]
    assert steps == sorted(set(steps)), "what a killed run logged beyond its checkpoint is dropped"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(damage, trained, data_dir, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    path = out / "ckpt.pt"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    half = data[:len(data) // 2]
    path.write_bytes({"cut": half, "flip": data, "empty": b"", "foreign": b"hello"}[damage])
    done = train(data_dir, out, "--dropout=0.1")
    assert "WARNING" in done.stdout and "ckpt.pt" in done.stdout
    assert "resuming at step 10" in done.stdout
    assert losses(out) == losses(trained)
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (out / name).write_bytes(b"")
    refused(train(data_dir, out, "--dropout=0.1", ok=False), "no checkpoint in", "can be read")


def test_a_full_disk_keeps_the_last_checkpoint(data_dir, tmp_path):
    """A limit on file sizes stands in for a full disk: writes fail half way."""
    train(data_dir, tmp_path, "--stop_at_step=5")
    before = (tmp_path / "ckpt.pt").read_bytes()
    code = "import resource, runpy, sys, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
           "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); " \
           "sys.argv = ['train.py', *sys.argv[1:]]; " \
           "runpy.run_path('train.py', run_name='__main__')"

    def limited(size, out_dir):
        process = start("-c", code.format(size), *tiny(data_dir, out_dir))
        output, _ = process.communicate()
        return subprocess.CompletedProcess([], process.returncode, output, "")

    done = limited(len(before) // 2, tmp_path)
    refused(done, "WARNING: ckpt.pt was not written",
            "error: the last checkpoint, of step 20, could not be written")
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    for size, message in ((20_000, "cannot write a first checkpoint"), (1_000, "File too large")):
        refused(limited(size, tmp_path / "new"), message)


NAN_AT = """
import math, runpy, sys, torch
real, calls = torch.nn.utils.clip_grad_norm_, [0]
def spoiled(parameters, *rest):
    calls[0] += 1
    norm = real(parameters, *rest)
    return norm * math.nan if calls[0] in {steps} else norm
torch.nn.utils.clip_grad_norm_ = spoiled
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_non_finite_gradient_is_skipped_and_ten_in_a_row_stop(data_dir, tmp_path):
    done = run("-c", NAN_AT.format(steps={4, 5}), *tiny(data_dir, tmp_path / "a"))
    assert result(done)["skipped"] == 2 and "update skipped (2 in a row)" in done.stdout
    always = NAN_AT.format(steps=set(range(8, 99)))
    done = run("-c", always, *tiny(data_dir, tmp_path / "b"), ok=False)
    refused(done, "10 updates in a row", "the last good checkpoint is in")
    assert read_checkpoint(tmp_path / "b" / "ckpt.pt")["step"] == 10


FITS = """
import runpy, sys, model
real = model.ConceptEncoder.forward
def forward(self, ids, *rest):
    if len(ids) > {rows}:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    return real(self, ids, *rest)
model.ConceptEncoder.forward = forward
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("rows, message", [
    (3, "8 rows of 64 tokens do not fit into memory; --micro_batch=2 does"),
    (0, "nor does a single row")])
def test_a_batch_that_does_not_fit_names_one_that_does(rows, message, data_dir, tmp_path):
    refused(run("-c", FITS.format(rows=rows), *tiny(data_dir, tmp_path), ok=False), message)


def test_exploding_weights_are_never_saved_as_nan(data_dir, tmp_path):
    done = train(data_dir, tmp_path, "--learning_rate=1e30", "--min_lr=1e30", "--max_steps=60",
                 ok=False)
    refused(done, "lower --learning_rate")
    for path in tmp_path.glob("*.pt"):
        assert all(t.isfinite().all() for t in read_checkpoint(path)["model"].values())
    with pytest.raises(FloatingPointError, match="nothing was written"):
        save_checkpoint(tmp_path, dict(model=dict(a=torch.tensor([1.0, math.nan]))),
                                   "new.pt")
    assert not (tmp_path / "new.pt").exists()


def test_a_run_whose_validation_loss_is_not_finite_ends_and_its_checkpoint_can_go_on(
        data_dir, tmp_path):
    args = ["--max_steps=20", "--eval_interval=5"]
    done = train(data_dir, tmp_path, *args, "--learning_rate=1e30", "--min_lr=1e30", ok=False)
    refused(done, "the validation loss is not finite after 5 steps", f"is in {tmp_path}; resume it")
    assert result(train(data_dir, tmp_path, *args, "--learning_rate=1e-3"))["val_loss"] < 10


def test_the_range_test_suggests_a_rate_and_keeps_nothing(data_dir, tmp_path):
    found = result(train(data_dir, tmp_path / "run", "--lr_find=true"))
    assert 1e-5 < found["suggested"] < 0.1 and "the loss falls fastest at" in found["why"]
    assert (tmp_path / "run" / "lr_find.png").stat().st_size > 5000
    held = json.loads((tmp_path / "run" / "lr_find.json").read_text())
    assert held["rates"][0] == 1e-6 and len(held["rates"]) == len(held["losses"])
    assert not (tmp_path / "run" / "ckpt.pt").exists()
    assert result(train(data_dir, tmp_path / "run"))["step"] == 20, "the folder is still free"
    refused(train(data_dir, tmp_path / "run", "--lr_find=true", ok=False), "starts from fresh")


def test_the_range_test_finds_the_steepest_rate_of_a_known_curve():
    """A loss that falls around 1e-3 and diverges above 3e-2."""
    def step(rate, number):
        return 5 - 3 / (1 + (1e-3 / rate) ** 2) + (1e3 * (rate - 3e-2) if rate > 3e-2 else 0)

    found = optimizers.range_test(step)
    assert 5e-4 < found["suggested"] < 4e-3 < found["lowest"] < 4e-2
    # One lucky batch at the start is no reason.
    noisy = optimizers.range_test(lambda rate, number: step(rate, number) + 3 * (number == 0))
    assert 5e-4 < noisy["suggested"] < 4e-3
    assert found["rates"][-1] < 0.1, "it ends where the loss is twice the lowest"
    with pytest.raises(ValueError, match="not finite after 3 updates"):
        optimizers.range_test(lambda rate, number: 5.0 if number < 3 else float("nan"))
    flat = optimizers.range_test(lambda rate, number: 5.0 + rate)
    assert "never falls" in flat["why"]


def test_a_number_of_tokens_is_learned_by_heart(data_dir, tmp_path):
    done = train(data_dir, tmp_path, "--overfit_tokens=256", "--max_steps=600", "--warmup_steps=5",
                 "--learning_rate=2e-2", "--concept_dim=64", "--ffn_dim=128")
    summary = result(done)
    assert summary["stopped"] == "overfit" and summary["tokens"] == summary["step"] * 256
    assert "first loss" in done.stdout and "WARNING: first loss" not in done.stdout
    refused(train(data_dir, tmp_path / "odd", "--overfit_tokens=100", ok=False),
            "expected whole rows of block_size=64 tokens; --overfit_tokens=128")


@pytest.mark.parametrize("loss, reason", [
    (float("nan"), "not a number: lower --learning_rate"), (5.5, "nothing was learned"),
    (4.0, "has not even learned word frequencies"), (1.0, "not by heart: raise --max_steps")])
def test_a_run_that_does_not_overfit_says_what_is_wrong(loss, reason):
    assert reason in why_not_overfit(loss, 20, 256, unigram_entropy=3.0)


def test_a_first_loss_far_from_even_odds_is_a_warning():
    assert "WARNING" in describe_first_loss(8.0, 256)
    assert "WARNING" not in describe_first_loss(5.6, 256)


def test_deterministic_runs_are_the_same(data_dir, tmp_path):
    try:
        for name in ("one", "two"):
            train(data_dir, tmp_path / name, "--deterministic=true", "--max_steps=5")
            assert torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


@pytest.mark.parametrize("optimizer", ["adamw", "stable_adamw", "muon"])
def test_only_matrices_decay(optimizer, data_dir, tmp_path):
    train(data_dir, tmp_path, f"--optimizer={optimizer}", "--bias=true", "--weight_decay=0.3",
          "--max_steps=1")
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    n_decay = n_still = 0
    for state in checkpoint["optimizers"]:
        for group in state["param_groups"]:
            for number in group["params"]:
                moments = [t for key, t in state["state"][number].items() if key != "step"]
                is_matrix = moments[0].ndim > 1
                assert group["weight_decay"] == (0.3 if is_matrix else 0.0), moments[0].shape
                n_decay, n_still = n_decay + is_matrix, n_still + (not is_matrix)
    assert n_decay > 5 and n_still > 5


def test_overfit_batch_reaches_zero(data_dir, tmp_path):
    done = train(data_dir, tmp_path, "--overfit_batch=true", "--max_steps=600",
                 "--eval_interval=600", "--log_interval=100", "--concept_dim=64", "--block_size=32",
                 "--batch_size=1", "--micro_batch=1", "--learning_rate=1e-2")
    assert result(done)["stopped"] == "overfit" and result(done)["loss"] < 0.05
    refused(train(data_dir, tmp_path / "short", "--overfit_batch=true", ok=False),
            "overfit_batch reached a loss of")


def test_texts_are_filled_alike_alone_and_in_batches(trained, monkeypatch):
    """Of all lengths, with one mask and with several, in the order they came."""
    texts = ["A [MASK].", "The [MASK] of the word [MASK] is [MASK].", "One [MASK].", "B [MASK].",
             "[MASK] \u00fc [MASK]"]
    args = ["tools/sample.py", f"--out_dir={trained}", "--dtype=fp32"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts)))
    together = json.loads(call(*args, "--batch_tokens=40").stdout.splitlines()[-1])
    for text, filled in zip(texts, together, strict=True):
        alone = json.loads(call(*args, f"--text={text}").stdout.splitlines()[-1])
        assert alone["text"] == filled["text"] == text and alone["filled"] == filled["filled"]
        assert len(filled["masks"]) == text.count("[MASK]")
        for a, b in zip(alone["masks"], filled["masks"], strict=True):
            assert [x["token"] for x in a] == [x["token"] for x in b]
            assert [x["p"] for x in a] == pytest.approx([x["p"] for x in b], abs=2e-5)


def test_patience_stops_early(data_dir, tmp_path):
    summary = result(train(data_dir, tmp_path, "--patience=2", "--eval_interval=1",
                           "--learning_rate=1e-30", "--min_lr=0", "--max_steps=50"))
    assert summary["stopped"] == "patience" and summary["step"] < 50


def test_max_tokens_and_max_minutes_end_the_schedule(data_dir, tmp_path, monkeypatch):
    assert result(train(data_dir, tmp_path / "a", "--max_tokens=5000"))["step"] == 10
    # A clock on which a look takes a tenth of a second: the same run on any machine.
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) / 10)
    summary = result(train(data_dir, tmp_path / "b", "--max_steps=1000000", "--max_minutes=0.2",
                           "--log_interval=1"))
    rates = [r["lr"] for r in read_log(tmp_path / "b") if "lr" in r]
    assert summary["stopped"] == "max_minutes" and rates[-1] < 0.2 * 3e-3
    assert len(rates) >= 20 and rates[6:] == sorted(rates[6:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_warm_up_and_end_where_they_should(schedule, data_dir, tmp_path):
    extra = [] if schedule == "constant" else ["--min_lr=1e-5"]
    train(data_dir, tmp_path, f"--lr_schedule={schedule}", *extra, "--eval_interval=100")
    lr = [r["lr"] for r in read_log(tmp_path) if "lr" in r]
    assert lr[:5] == pytest.approx([3e-3 * i / 6 for i in range(1, 6)])
    assert max(lr) == pytest.approx(3e-3)
    if schedule == "constant":
        assert lr[5:] == [3e-3] * 15
    else:
        assert lr[5:] == sorted(lr[5:], reverse=True)
        end = 1e-5 + (3e-3 - 1e-5) / 15 if schedule == "linear" else 1.1e-3
        assert lr[-1] <= end * 1.001
    if schedule == "wsd":
        assert lr[15] == pytest.approx(3e-3)
        assert lr[18] == pytest.approx(1e-5 + (3e-3 - 1e-5) * (1 - 0.5**0.5))


def test_a_cosine_begins_again_as_often_as_asked_for(data_dir, tmp_path):
    train(data_dir, tmp_path, "--lr_restarts=2", "--min_lr=1e-5", "--eval_interval=100",
          "--warmup_steps=2", "--max_steps=20")
    lr = [r["lr"] for r in read_log(tmp_path) if "lr" in r]
    peaks = [i for i in range(1, 19) if lr[i - 1] < lr[i] >= lr[i + 1]]
    assert len(peaks) == 3 and lr[-1] < 3e-4, "two warm restarts after the warm-up's own peak"


def test_what_is_learned_by_heart_keeps_its_masks_under_a_curriculum(data_dir, tmp_path):
    done = train(data_dir, tmp_path, "--masking_type=importance", "--importance=ema",
                 "--curriculum=easy_to_hard", "--overfit_tokens=64", "--max_steps=45",
                 "--learning_rate=4e-3", "--warmup_steps=2", "--log_interval=1", ok=False)
    lost = [r["loss"] for r in read_log(tmp_path) if "loss" in r]
    assert max(b - a for a, b in zip(lost[10:], lost[11:])) < 1.0, done.stdout


def test_weights_of_another_run_start_a_new_one(trained, data_dir, tmp_path):
    done = train(data_dir, tmp_path, f"--init_from={trained}", "--dropout=0.1", "--max_steps=1")
    assert result(done)["step"] == 1
    first = evaluations(tmp_path)[0]["val_loss"]
    assert first == min(r["val_loss"] for r in evaluations(trained))
    other = train(data_dir, tmp_path / "x", f"--init_from={trained}", "--n_concept=4", ok=False)
    refused(other, "do not fit")


@pytest.mark.parametrize("args, parts", [
    (["--n_head=3"], ["n_head=3 does not divide concept_dim=32"]),
    (["--micro_batch=3"], ["micro_batch=3 does not divide", "--micro_batch=2"]),
    (["--mlm_probability=0"], ["mlm_probability=0.0"]),
    (["--mlm_probability=1"], ["mlm_probability=1.0"]),
    (["--mlm_probability=nan"], ["mlm_probability=nan"]),
    (["--optimizer=sgd", "--lr_schedule=step"], ["optimizer='sgd'", "lr_schedule='step'"]),
    (["--concept_window=5"], ["concept_window=5 has no effect"]),
    (["--importance=model", "--diffusion_schedule=bell", "--curriculum=hard_to_easy"],
     ["importance=model has no", "diffusion_schedule=bell has no", "curriculum=hard_to_easy has"]),
    (["--masking_type=importance", "--stage_1_end=0.2"], ["stage_1_end=0.2 has no effect"]),
    (["--masking_type=importance", "--curriculum=easy_to_hard", "--stage_1_end=0.7"],
     ["stage_1_end=0.7, stage_2_end=0.66: expected"]),
    (["--masking_type=importance", "--importance=loss", "--curriculum=on"],
     ["importance='loss'", "curriculum='on'"]),
    (["--masking_type=diffusion", "--mlm_probability=1", "--mask_replace=80/10/10"],
     ["every hidden token is [MASK]"]),
    (["--bottleneck=open", "--anchor_slope=8"], ["anchor_slope=8.0 has no effect"]),
    (["--bottleneck=strict", "--anchored=false", "--local_heads=1"], ["local_heads=1.0 has no"]),
    (["--block_size=1e6"], ["block_size", "largest usable"]),
    (["--dtype=fp16"], ["dtype=fp16 needs a CUDA GPU"]),
    (["--device=tpu"], ["device='tpu'"]),
    (["--vocab_size=100"], ["vocab_size=100", "--vocab_size=0"]),
    (["--beta1=1", "--weight_decay=-1", "--grad_clip=-1"],
     ["beta1=1.0", "weight_decay=-1.0", "grad_clip=-1.0"]),
    (["--mlm_probability=0", "--concept_window=5", "--patience=-1", "--arch=bert"],
     ["mlm_probability=0.0", "concept_window=5 has no effect", "patience=-1", "arch='bert'"]),
    (["--batch_size=0"], ["batch_size=0"]), (["--max_steps=0"], ["max_steps=0"]),
    (["--data_dir=nowhere"], ["nowhere"]), (["--init_from=nowhere"], ["nowhere"])])
def test_mistakes_end_in_one_message(args, parts, data_dir, tmp_path):
    refused(train(data_dir, tmp_path / "new", *args, ok=False), *parts)
    assert not (tmp_path / "new" / "ckpt.pt").exists()


def test_resuming_with_other_settings_is_refused(trained, data_dir, tmp_path):
    refused(train(data_dir, trained, "--dropout=0.1", "--concept_dim=64", ok=False),
            "cannot be resumed", "concept_dim: 32")
    refused(train(data_dir, trained, "--dropout=0.1", "--seed=5", "--batch_size=16", ok=False),
            "seed: 1337", "batch_size: 8")
    other = shutil.copytree(data_dir, tmp_path / "data")
    (other / "train.bin").rename(other / "old")
    (other / "val.bin").rename(other / "train.bin")
    (other / "old").rename(other / "val.bin")
    meta = json.loads((other / "meta.json").read_text())
    meta["splits"]["train"], meta["splits"]["val"] = meta["splits"]["val"], meta["splits"]["train"]
    for split in ("train", "val"):
        meta["splits"][split]["files"][0]["name"] = f"{split}.bin"
    (other / "meta.json").write_text(json.dumps(meta))
    refused(train(other, trained, "--dropout=0.1", ok=False), "holds other tokens")
    refused(train(data_dir, trained, "--init_from=scratch", ok=False), "already holds a run")


def test_two_runs_cannot_share_a_folder(data_dir, tmp_path):
    process = start_long(data_dir, tmp_path)
    try:
        wait_for(process, "step 1/")
        refused(train(data_dir, tmp_path, ok=False), "another run is writing")
    finally:
        process.kill()
        process.communicate()


def test_config_json_and_log_describe_the_run(trained):
    config = json.loads((trained / "config.json").read_text())
    assert set(read_settings(ROOT / "train.py")) <= set(config) and config["dropout"] == 0.1
    record = next(r for r in read_log(trained) if "loss" in r)
    expected = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "memory_gib"}
    assert expected <= set(record)
    files = ["best.pt", "ckpt.pt", "ckpt_prev.pt", "config.json", "log.jsonl", "tokenizer"]
    of_other_tests = {"eval.json", "metrics.json", "summary.md", "curves.png"}
    assert set(os.listdir(trained)) - of_other_tests == set(files)


# ---- the commands that start from a run --------------------------------------------

def test_eval_is_the_same_whatever_the_batch_and_draws_curves(trained):
    args = ["tools/eval.py", f"--out_dir={trained}", "--rows=24", "--dtype=fp32"]
    a, b = result(call(*args)), result(call(*args, "--micro_batch=5"))
    name = next(iter(a["data"]))
    for masking_type in ("token", "whole_word", "concepts", "span"):
        r, other = a["data"][name][masking_type], b["data"][name][masking_type]
        for part, split in r.pop("splits", {}).items():
            expected = other["splits"][part]
            assert split["share"] == expected["share"]
            assert (split["loss"] or 0) == pytest.approx(expected["loss"] or 0, rel=1e-5)
        other.pop("splits", None)
        assert r == pytest.approx(other, rel=1e-5)
        assert r["perplexity"] == pytest.approx(2.718281828459045 ** r["loss"])
        bits = r["loss"] / 0.6931471805599453
        assert r["bits_per_byte"] == pytest.approx(bits), "a byte-level token is a byte"
    assert (trained / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (trained / "eval.json").exists()


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Bins of this repository's sources with a vocabulary of their own."""
    folder = tmp_path_factory.mktemp("other")
    sources = [path.read_text() for path in sorted(ROOT.glob("*.py"))]
    (folder / "a.txt").write_text("\n\n".join(sources))
    call("prepare.py", f"--input={folder}/a.txt", f"--out_dir={folder}/bins", "--tokenizer=bpe:600",
         "--val_fraction=0.3", "--cut_chars=4000", "--num_proc=1")
    return folder / "bins"


def test_data_of_another_tokenizer_is_refused(trained, other_data, data_dir, tmp_path):
    both = f"--data_dir={data_dir},{other_data}"
    refused(call("tools/eval.py", f"--out_dir={trained}", both, ok=False),
            "another tokenizer", "--tokenizer=")
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    refused(train(other_data, out, "--dropout=0.1", "--vocab_size=320", ok=False), "vocab_size=320")
    refused(train(other_data, out, "--dropout=0.1", ok=False),
            "the tokenizer of", "is not the one of the checkpoint")
    refused(train(other_data, tmp_path / "new", f"--init_from={trained}", ok=False),
            "another tokenizer")
    shutil.rmtree(out / "tokenizer")
    shutil.copytree(other_data / "tokenizer", out / "tokenizer")
    refused(call("tools/sample.py", f"--out_dir={out}", "--text=a [MASK]", ok=False),
            "is not the one its checkpoint")


def test_commands_without_a_run_name_the_command_that_makes_one(tmp_path):
    for script, extra in (("tools/eval.py", []), ("tools/sample.py", ["--text=a [MASK]"])):
        refused(call(script, f"--out_dir={tmp_path}/none", *extra, ok=False),
                "holds no checkpoint", "python train.py")


def test_sample_fills_masks(trained, tmp_path):
    args = ["tools/sample.py", f"--out_dir={trained}"]
    out = result(call(*args, "--text=The c[MASK]t reads the [MASK]iver.", "--top=3"))
    assert len(out["masks"]) == 2 and len(out["masks"][0]) == 3 and "[MASK]" not in out["filled"]
    assert sum(c["p"] for c in out["masks"][0]) <= 1.0001
    refused(call(*args, "--text=no mask", ok=False), "no [MASK]")
    refused(call(*args, "--text=" + "[MASK]" * 100, ok=False), "the model reads 64")


def test_sample_reads_standard_input(trained, monkeypatch):
    def sample(text):
        command = [sys.executable, "tools/sample.py", f"--out_dir={trained}"]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, input=text)
    assert len(result(sample("The c[MASK]t.\n\nA m\u00f6del \U0001f600 [MASK]\n"))) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    refused(call("tools/sample.py", f"--out_dir={trained}", ok=False), "no text")


def test_the_transformer_trains_in_the_same_loop_and_says_what_it_does_not_use(data_dir, tmp_path):
    args = ["--arch=transformer", "--n_register=3", "--max_steps=4"]
    done = train(data_dir, tmp_path, *args, fresh=True)
    assert "arch transformer, which does not use concept_dim, n_concept" in done.stdout
    assert "concepts" not in done.stdout.split("starting at step 0")[1], "it has none to measure"
    assert "\n\n" not in done.stdout
    run = result(done)
    resumed = result(train(data_dir, tmp_path, *args))
    assert run["step"] == resumed["step"] == 4 and run["val_loss"] == resumed["val_loss"]
    refused(train(data_dir, tmp_path, "--max_steps=4", ok=False),
            "arch: transformer in the checkpoint, concept here")
    refused(train(data_dir, tmp_path, "--arch=bert", ok=False), "expected concept, transformer")


@pytest.mark.parametrize("arch", ["concept", "transformer"])
def test_a_table_from_word_statistics_learns_faster_and_reaches_every_process(
        arch, data_dir, tmp_path):
    final = {}
    for name, table, nproc in (("random", "random", 1), ("one", "cooccurrence", 1),
                               ("two", "cooccurrence", 2 if arch == "concept" else 1)):
        args = [f"--arch={arch}", f"--init_table={table}"]
        final[name] = result(train(data_dir, tmp_path / name, *args, nproc=nproc))["val_loss"]
    assert final["one"] < final["random"] - 0.02
    assert final["two"] == pytest.approx(final["one"], abs=1e-4)


def test_weights_of_an_edited_model_are_refused_in_one_message(trained, data_dir, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "best.pt").unlink()
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    checkpoint["model"]["layers.0.extra.weight"] = torch.zeros(2)
    torch.save(checkpoint, tmp_path / "run" / "ckpt.pt")
    sampled = call("tools/sample.py", f"--out_dir={tmp_path / 'run'}", "--text=a [MASK]", ok=False)
    refused(sampled, "another model.py", "layers.0.extra.weight")
    refused(train(data_dir, tmp_path / "run", "--dropout=0.1", ok=False),
            "model.py: it has other weights")


def test_checkpoints_with_older_names_of_parameters_load_and_resume(data_dir, tmp_path):
    """The lexicon's parameters were renamed: a run saved before goes on as if nothing happened.

    So does one that was saved with another default of a setting that its model does not read.
    """
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    train(data_dir, whole)
    train(data_dir, stopped, "--stop_at_step=12")
    older = {new: old for old, new in RENAMED.items()}
    for name in ("ckpt.pt", "best.pt"):
        checkpoint = read_checkpoint(stopped / name)
        assert older.keys() <= checkpoint["model"].keys()
        weights = checkpoint["model"].items()
        checkpoint["model"] = {older.get(key, key): tensor for key, tensor in weights}
        checkpoint["model_settings"]["local_heads"] = 0.5
        torch.save(checkpoint, stopped / name)
    model, _, _ = load_run(str(stopped), "cpu", "best")
    assert torch.equal(model.lexicon.match_bias, checkpoint["model"]["lexicon.loudness"])
    train(data_dir, stopped)
    after = read_checkpoint(stopped / "ckpt.pt")["model"]
    for key, tensor in read_checkpoint(whole / "ckpt.pt")["model"].items():
        assert torch.equal(tensor, after[key]), key
