"""tools/sweep.py: equal conditions for every arm, equal compute if asked for, exact restarts."""

import json
import subprocess

import pytest
from conftest import call, refused, result, run_script

BASE = ("--dtype=fp32 --block_size=32 --n_layer=1 --n_head=2 --concept_dim=32 --token_dim=64 "
        "--ffn_dim=32 --batch_size=4 --max_steps=3 --eval_interval=2 --eval_rows=8 "
        "--health_rows=4")
ARMS = """
strict   --bottleneck=strict --n_concept=6   # the arm's own settings win over the base
plain    --arch=transformer
"""


@pytest.fixture(autouse=True)
def arms_start_at_once(monkeypatch):
    """Each in a fork: the start of a new Python would take longer than such an arm."""
    def run(command, cwd, env, stdout, stderr):
        done = run_script(command[1:], cwd)
        stdout.write(done.stdout + done.stderr)
        return done
    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture(scope="module")
def sweep(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")

    def run(*more, ok=True):
        return call("tools/sweep.py", f"--base=--data_dir={data_dir} {BASE}", f"--arms={ARMS}",
                    "--seeds=1,2", f"--out_dir={out}", *more, ok=ok)
    return out, run


def test_every_arm_and_seed_is_in_the_table_and_a_repeat_trains_nothing(sweep):
    out, run = sweep
    first = result(run())
    assert first["runs"] == 4 and first["failed"] == 0
    assert set(first["loss"]) == {"strict", "plain"}
    table = (out / "table.md").read_text()
    assert table.count("\n") == 4 and "[" in table
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((out / "results.json").read_text())
    found = {(r["arm"], r["seed"]) for r in saved["results"]}
    assert found == {(arm, seed) for arm in first["loss"] for seed in (1, 2)}
    assert saved["results"][0]["health"]["concept_rank"] > 0
    assert first["loss"]["strict"][0] != first["loss"]["strict"][1], "seeds differ"
    before = (out / "strict_s1" / "ckpt.pt").stat().st_mtime
    again = result(run("--seeds=1"))
    assert again["loss"]["strict"] == first["loss"]["strict"][:1]
    assert (out / "strict_s1" / "ckpt.pt").stat().st_mtime == before


def test_equal_flops_buy_fewer_tokens_where_a_token_costs_more(sweep):
    out, run = sweep
    # Padding costs FLOPs and counts as no token.
    padded = "padded --arch=transformer --rows=document --block_schedule=8:0.5,32:0.5"
    run(f"--out_dir={out}/flops", "--flops=1.5e9", "--seeds=1", "--evaluate=1",
        f"--arms={ARMS}{padded}")
    saved = json.loads((out / "flops" / "results.json").read_text())
    plans = saved["plans"]
    assert plans["padded"]["mflop_per_token"] > 1.005 * plans["plain"]["mflop_per_token"]
    for r in saved["results"]:
        plan = plans[r["arm"]]
        assert r["tokens"] * plan["mflop_per_token"] * 1e6 == pytest.approx(1.5e9, rel=0.05)
        assert set(r["maskings"]) == {"token", "whole_word", "concepts", "span"}
    assert "whole_word masks" in (out / "flops" / "table.md").read_text()


def test_an_arm_that_fails_is_named_and_the_others_are_kept(sweep, tmp_path):
    _, run = sweep
    arms = "--arms=good\nbad --learning_rate=-1"
    done = run(f"--out_dir={tmp_path}", "--seeds=1", arms, ok=False)
    assert done.returncode == 1
    assert "bad seed 1 failed" in done.stdout and "learning_rate=-1" in done.stdout
    assert result(done)["runs"] == 1 and result(done)["failed"] == 1


def test_a_run_that_was_stopped_is_no_result(sweep, tmp_path):
    """SIGTERM and stop_at_step end a run in order, with exit code 0.

    Half a run must not stand beside whole ones.
    """
    _, run = sweep
    arms = "--arms=good\nhalf --stop_at_step=2"
    done = run(f"--out_dir={tmp_path}", "--seeds=1", arms, ok=False)
    assert done.returncode == 1
    assert "half seed 1 failed: stopped early (stop_at_step)" in done.stdout
    assert result(done)["runs"] == 1 and set(result(done)["loss"]) == {"good"}


def test_bad_arms_are_refused_before_anything_runs(sweep, tmp_path):
    _, run = sweep
    where = f"--out_dir={tmp_path}/none"
    refused(run(where, "--arms=", ok=False), "arms is empty", "config/sweeps/dims.py")
    refused(run(where, "--arms=--n_layer=2", ok=False), "expected a name")
    refused(run(where, "--arms=a\na", ok=False), "used once")
    refused(run(where, "--arms=a --n_layr=2", ok=False), "did you mean 'n_layer'")
    refused(run(where, "--arms=a --n_head=3", ok=False), "does not divide")
    refused(run(where, '--arms=a --x "', ok=False), "No closing quotation", "arms:")
    refused(run(where, "--seeds=1,x", ok=False), "seeds='1,x'", "1,2,3")
    nothing = f"--arms=a --data_dir={tmp_path}/nothing"
    refused(run(where, nothing, ok=False), "holds no prepared data", "prepare.py")
    assert not (tmp_path / "none").exists()
