"""Promises of `tools/sweep.py report`: every run once, seeds together, true fronts, a page that
needs nothing else."""

import csv
import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, call, refused, result
from test_train import train

from tools.sweep_report import (
    arms_of,
    at_equal_tokens,
    draw_smallbench,
    find_runs,
    front,
    iso_flop,
    name_of,
    varied,
    write_report,
)

SWEEP = str(ROOT / "tools/sweep.py")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    """Two arms, one of them with two seeds, and a run that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    for name, args in (("plain_s1", ["--seed=1"]), ("plain_s2", ["--seed=2"]),
                       ("more/wide <b>_s1", ["--ffn_dim=128", "--seed=1"]),
                       ("half_s1", ["--ffn_dim=32", "--stop_at_step=12"])):
        train(data_dir, folder / name, "--max_steps=20", *args)
    (folder / "more" / "notes").mkdir()
    (folder / "more" / "notes" / "log.jsonl").write_text("{}\n")  # no run
    return folder


def test_every_run_is_in_the_table_and_seeds_are_one_arm(folder):
    summary = result(call(SWEEP, "report", f"--dir={folder}"))
    assert summary["runs"] == 4 and summary["arms"] == 2
    rows = {row["run"]: row for row in csv.DictReader(open(folder / "report.csv"))}
    assert set(rows) == {"plain_s1", "plain_s2", "more/wide <b>_s1", "half_s1"}
    log = [json.loads(line) for line in open(folder / "plain_s1" / "log.jsonl")]
    last = [record for record in log if "val_loss" in record][-1]
    assert float(rows["plain_s1"]["loss"]) == last["val_loss"]
    assert int(rows["plain_s1"]["tokens"]) == last["tokens"]
    assert rows["half_s1"]["status"] == "stop_at_step"
    assert {row["ffn_dim"] for row in rows.values()} == {"64", "128"} | {"32"}
    text = (folder / "report.md").read_text()
    losses = sorted(float(rows[f"plain_s{n}"]["loss"]) for n in (1, 2))
    assert f"| plain | 2 | {sum(losses) / 2:.4f} [{losses[0]:.3f}, {losses[1]:.3f}] |" in text
    assert f"Seeds of one arm differ by up to {losses[1] - losses[0]:.3f} nats" in text
    assert "half_s1 is left out here, but in report.csv: stop_at_step at" in text
    assert (folder / "report_params.png").stat().st_size > 5000


def test_other_starting_weights_are_another_arm():
    runs = [dict(settings=dict(init_from=start, seed=1), data=[], loss=1.0)
            for start in ("auto", "scratch", "out/other")]
    assert sorted(map(len, arms_of(runs))) == [1, 2] and varied(runs) == ["init_from"]


def test_the_page_holds_everything_and_escapes_text(folder):
    call(SWEEP, "report", f"--dir={folder}")
    page = (folder / "report.html").read_text()
    assert "wide &lt;b&gt;" in page and "wide <b>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == len(list(folder.glob("report_*.png")))


def test_a_front_is_what_nothing_beats_in_both():
    random = np.random.default_rng(0)
    points = [tuple(pair) for pair in random.random((40, 2)).tolist()]
    expected = {i for i, (cost, loss) in enumerate(points)
                if not any(other != (cost, loss) and other[0] <= cost and other[1] <= loss
                           for other in points)}
    assert set(front(points)) == expected
    assert front([(1, 2), (1, 2), (2, 3)]) == [0]


def arm(params, loss, flops=1e13):
    return [dict(run=f"a{params}_s1", params=params, loss=loss, flops=flops)]


def test_equal_flops_have_a_best_size():
    """A parabola around three million parameters, and arms of other FLOPs that do not count."""
    arms = [arm(p, 4 + 0.1 * math.log(p / 3e6) ** 2) for p in (1e6, 2e6, 4e6, 8e6)]
    fit = iso_flop([*arms, arm(2.9e6, 1.0, flops=1e14)])
    assert fit["params"] == pytest.approx(3e6, rel=0.01) and fit["loss"] == pytest.approx(4)
    low, high = fit["params_90"]
    assert low < 3e6 < high
    assert iso_flop(arms[:2]) is None
    assert iso_flop([arm(p, 4 - p / 1e7) for p in (1e6, 2e6, 4e6)]) is None, "no minimum between"


def test_arms_that_ended_at_a_rung_are_compared_there():
    def run(name, status, curve):
        return dict(run=name, status=status, curve=curve, tokens=curve[-1][0], loss=curve[-1][1],
                    flops=10.0 * curve[-1][0], seconds=None)
    short = run("s/a", "ranked", [(50, 4.0), (100, 3.0)])
    long = run("s/b", "done", [(50, 3.9), (100, 2.9), (1000, 2.0)])
    others = [run("b", "done", long["curve"]), run("s/c", "max_steps", long["curve"]),
              run("s/d", "done", [(0, 9.0), (2000, 2.0)])]
    runs, notes = at_equal_tokens([short, long, *others])
    assert [(r["tokens"], r["loss"], r["flops"]) for r in runs[:2]] == [(100, 3.0, 1000.0),
                                                                        (100, 2.9, 1000.0)]
    assert runs[2:] == others and len(notes) == 1
    assert "s/b is shown after 100 tokens" in notes[0] and "to 2.0000 nats" in notes[0]


def test_fine_tuned_runs_are_bars_of_their_accuracies(folder, tmp_path):
    """Results of finetune_glue.py, whether eval.py has read them or not; one task is missing."""
    shutil.copytree(folder, tmp_path / "runs")
    scores = dict(sst2=0.81, rte=0.55, boolq=0.64, mrpc=0.7)
    for run, tasks in (("plain_s1", scores), ("plain_s2", scores | dict(rte=0.57)),
                       ("more/wide <b>_s1", dict(sst2=0.8, boolq=0.6))):
        (tmp_path / "runs" / run / "glue.json").write_text(json.dumps(
            {task: {"median": {"accuracy": score}} for task, score in tasks.items()}))
    runs = str(tmp_path / "runs")
    figure = draw_smallbench(arms_of(find_runs(runs)[0]))
    [axes] = figure.axes
    found = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert found["plain"] == pytest.approx([0.81, 0.56, 0.64, 0.7, 0.6775])
    assert found["more/wide <b>"] == pytest.approx([0.8, math.nan, 0.6, math.nan, math.nan],
                                                   nan_ok=True)
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks == ["sentiment", "nli", "qa", "paraphrase", "average"]
    write_report(runs)
    assert (tmp_path / "runs" / "report_smallbench.png").stat().st_size > 5000
    assert 'alt="smallbench"' in (tmp_path / "runs" / "report.html").read_text()
    (tmp_path / "runs" / "plain_s1" / "glue.json").write_text('{"sst2": 1}')
    with pytest.raises(ValueError, match="sst2 has no medians"):
        write_report(runs)


def test_a_folder_without_runs_and_a_file_of_others_are_refused(folder, tmp_path):
    refused(call(SWEEP, "report", f"--dir={tmp_path}", ok=False), "holds no run with an evaluation")
    refused(call(SWEEP, "report", f"--dir={tmp_path / 'none'}", ok=False), "is no folder")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "report.md").write_text("mine")
    refused(call(SWEEP, "report", f"--dir={other}", ok=False), "report.md")
    assert (other / "report.md").read_text() == "mine"
    for name in ("plain_s1", "plain_s2", "more"):
        shutil.rmtree(other / name)
    (other / "report.md").unlink()
    with pytest.raises(ValueError, match="none of its 1 runs has used its budget"):
        write_report(str(other))


def test_a_run_whose_log_is_gone_is_named_and_not_forgotten(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "runs")
    (tmp_path / "runs" / "plain_s2" / "log.jsonl").write_text("")
    summary = write_report(str(tmp_path / "runs"))
    text = (tmp_path / "runs" / "report.md").read_text()
    assert summary["runs"] == 3 and "plain_s2 is left out: its log holds no evaluation" in text
    assert "notes is left out" not in text


def test_an_arm_is_named_as_its_folder_without_seed_and_hash():
    assert name_of([dict(run="glu=2_s1_1a2b3c4d")]) == "glu=2"
    assert name_of([dict(run="embed_share=0.3 glu=2_s12_1a2b3c4d")]) == "embed_share=0.3 glu=2"
    assert name_of([dict(run="alone")]) == "alone"
