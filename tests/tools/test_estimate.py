"""bench.py --estimate=1: what it says a run needs is what the run has."""

import pytest
import torch
from conftest import ROOT, call, refused, result

from configurator import configure
from tools.estimate import (
    GEMM_SHARE,
    GPUS,
    Forecast,
    Step,
    followed,
    hours_at,
    run_on,
    tokenizer_of,
    tokens_of,
    watched,
)

TINY = ["config/mini.py", "--data_dir=nowhere", "--vocab_size=500", "--block_size=32",
        "--token_dim=16", "--concept_dim=16", "--n_concept=4", "--n_head=2", "--ffn_dim=32",
        "--n_mixer=1"]


def settings(*words):
    found = configure(dict(__file__=str(ROOT / "train.py"), __name__="__main__"), [*TINY, *words])
    return found, tokenizer_of(found)[0]


@pytest.fixture(scope="module")
def forecast():
    return Forecast(*settings(), "cuda", n_micro=2)


def test_weights_gradients_and_moments_are_counted_exactly(forecast):
    parts = forecast.memory(4)
    assert parts["gradients"] == 4 * forecast.params
    # AdamW's moments, and a step counter for each tensor
    assert parts["optimizer"] == pytest.approx(8 * forecast.params, abs=2000)
    assert parts["weights"] == pytest.approx(4 * forecast.params, abs=4000)  # and buffers


def test_any_number_of_rows_follows_from_one_and_four(forecast):
    """9 rows, whose step is watched as well."""
    found, tok = settings()
    parts, operations = watched(found, tok, 9, 2, "cuda")
    forecast_parts = forecast.memory(9)
    assert forecast_parts["activations"] + forecast_parts["logits"] == pytest.approx(
        parts["activations"], rel=0.1)
    card = GPUS["rtx3070"]
    peak, bandwidth = card.tflops * 1e12, card.bandwidth * 1e9
    hidden = 9 * forecast.seconds(1, peak, bandwidth) - 9 * forecast.seconds_of(
        forecast.one[1], peak, bandwidth)
    assert forecast.seconds(9, peak, bandwidth) == pytest.approx(
        forecast.seconds_of(operations, peak, bandwidth) + hidden, rel=0.1)


def test_a_deep_model_follows_from_two_and_four_layers():
    """7 layers, against a step of all seven."""
    found, tok = settings("--n_layer=7", "--arch=transformer")
    parts, operations = watched(found, tok, 1, 1, "cpu")
    whole, all_operations = followed(found, tok, 1, 1, "cpu")
    for name, size in whole.items():
        assert parts[name] == pytest.approx(size, rel=0.02, abs=2000)
    for i in (0, 1):  # FLOPs, bytes
        total = sum(operation[i] * operation[2] for operation in operations)
        assert total == pytest.approx(sum(operation[i] for operation in all_operations), rel=0.01)


@pytest.mark.parametrize("words", [
    [], ["--bottleneck=strict"], ["--arch=resonance"],
    ["--arch=transformer", "--objective=clm", "--mlm_probability=0.15"],
])
def test_activations_are_at_least_what_autograd_keeps(words):
    """The independent count: bytes of the tensors that a real forward pass saves."""
    found, tok = settings(*words)
    parts, _ = watched(found, tok, 4, 1, "cpu")
    torch.manual_seed(0)
    step, kept = Step(found, tok, 4), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            loss = step.model(*step.batch)
    saved = sum(size for where, size in kept.items() if where not in weights)
    assert loss.isfinite() and 0.9 * saved < parts["activations"] < 4 * saved


def test_more_cards_are_faster_and_a_model_that_does_not_fit_says_so(forecast):
    card = GPUS["rtx3090"]
    one, four = (run_on(forecast, card, n) for n in (1, 4))
    assert one["tokens_per_s"] < four["tokens_per_s"] < 4 * one["tokens_per_s"] * 1.01
    assert one["hours"] * card.usd == pytest.approx(one["usd"], abs=0.02)
    too_small = run_on(forecast, type(card)("tiny", 0.5, 1, 1, 1, 1), 1)
    assert too_small["micro_batch"] == 0 and too_small["usd"] is None


def test_where_products_are_slow_they_are_all_that_takes_time(forecast):
    """A machine with endless bandwidth, on which the FLOPs of the model decide."""
    peak, rows = 1e9, 4
    flops = forecast.flops_per_token(forecast.T, forecast.K, rows) * forecast.T * rows
    seconds = forecast.seconds(rows, peak, 1e18)
    assert seconds == pytest.approx(flops / (GEMM_SHARE[forecast.kind] * peak), rel=0.3)


def test_schedules_and_a_time_limit_decide_how_long_a_run_is():
    settings = dict(batch_size=16, block_size=128, max_steps=500, max_tokens=0, max_minutes=0,
                    batch_schedule="4:0.5,16:0.5")
    assert tokens_of(settings) == 500 * 10 * 128
    assert tokens_of(settings | dict(max_tokens=1000)) == 1000
    assert hours_at(128, settings) == 500 * 10 / 3600
    assert hours_at(128, settings | dict(max_minutes=3)) == 0.05


def test_the_command_prints_a_table_and_one_json_line():
    done = call("tools/bench.py", "--estimate=1", *TINY, "--gpu=cpu", "--measure=1",
                "--usd_per_hour=2", "--max_steps=50")
    found = result(done)
    assert {"params", "memory_gib", "micro_batch", "tokens_per_s", "hours", "usd",
            "disk_gib"} <= set(found)
    assert found["measured"]["tokens_per_s"] == found["tokens_per_s"] > 0
    assert "| this CPU |" in done.stdout and "does not fit" not in done.stdout


@pytest.mark.parametrize("words, message", [
    (["--gpu=rtx9999"], "gpu='rtx9999': expected rtx3070, rtx3090"),
    (["--n_gpu=3"], "batch_size=16 does not divide among 3 processes"),
    (["--n_gpu=0"], "expected 1 or more"),
    (["--usd_per_hour=-1"], "usd_per_hour=-1.0: expected 1 or more, and 0 or more"),
    (["--n_layers=2"], "unknown setting 'n_layers'"),
    (["config/none.py"], "config/none.py"),
])
def test_bad_requests_are_refused(words, message):
    refused(call("tools/bench.py", "--estimate", *TINY, *words, ok=False), message)


@pytest.mark.parametrize("word", ["--gpu=a100", "--measure=1", "--race_minutes=3"])
def test_a_setting_without_its_mode_is_refused(word):
    refused(call("tools/bench.py", word, ok=False), f"{word[2:].replace('=1', '=True')}", "give --")
