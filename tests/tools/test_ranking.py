"""Promises of tools/ranking.py: who goes on, who is given up, and when that is not yet known."""

import csv

import pytest

from tools.ranking import is_hopeless, loss_at, promoted, write_csv

REFERENCE = [(n * 1e5, 8 - 0.1 * n) for n in range(1, 41)]  # 4 million tokens, to 4 nats


def curve(until, gap, since=0.0):
    """The reference's, worse by `gap` nats from `since` tokens on."""
    return [(n * 2.5e5, 8 - 0.25 * n + (gap if n * 2.5e5 > since else 0))
            for n in range(1, round(until / 2.5e5) + 1)]


@pytest.mark.parametrize("until, gap, since, hopeless", [
    (3e6, 0.2, 0, True),
    (3e6, 0.05, 0, False),  # not by the margin
    (3e6, 0.2, 2.6e6, False),  # not for long enough
    (3e6, 0.2, 1.9e6, True),  # for a million tokens
    (0.75e6, 0.2, 0, False),  # too early to say
    (5e6, 0.2, 0, False),  # the reference has not come so far
    (3e6, -0.2, 0, False),
])
def test_an_arm_is_given_up_after_a_window_of_worse_evaluations(until, gap, since, hopeless):
    assert is_hopeless(curve(until, gap, since), REFERENCE, 0.1, "nats", 1e6) == hopeless


def test_the_margin_may_be_of_the_perplexity():
    """0.1 nats at 5 nats are 15.6 of perplexity."""
    worse = curve(3e6, 0.1)
    assert is_hopeless(worse, REFERENCE, 15, "ppl", 2.6e5 * 2)
    assert not is_hopeless(worse, REFERENCE, 50, "ppl", 2.6e5 * 2)


def test_no_margin_and_no_curve_give_nobody_up():
    assert not is_hopeless(curve(3e6, 5), REFERENCE, 0, "nats", 1e6)
    assert not is_hopeless([], REFERENCE, 0.1, "nats", 1e6)
    assert not is_hopeless(curve(3e6, 5), [], 0.1, "nats", 1e6)


def test_the_lowest_medians_go_on():
    assert promoted({"a": [3.0, 9.0, 3.1], "b": [3.2], "c": [2.0, 4.0, 3.0]}, 2) == ["c", "a"]


def test_the_loss_of_a_rung_is_that_of_its_step():
    records = [dict(step=5, val_loss=3.0, tokens=50), dict(step=5, loss=1.0, tokens=50),
               dict(step=10, val_loss=None, tokens=100)]
    assert loss_at(records, 5) == (3.0, 50)
    assert loss_at(records, 10) is None and loss_at(records, 7) is None


def test_the_csv_has_every_column_of_every_run(tmp_path):
    write_csv(tmp_path / "a.csv", [dict(arm="a, b", loss=1.5), dict(arm="c", glu=2)])
    rows = list(csv.DictReader(open(tmp_path / "a.csv")))
    assert rows == [dict(arm="a, b", loss="1.5", glu=""), dict(arm="c", loss="", glu="2")]
