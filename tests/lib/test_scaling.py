"""lib/scaling.py: exponents and crossings that were put in come out."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from lib import scaling

BUDGETS = [1e13, 3.8e13, 1.1e14, 3.4e14]


def points(a, alpha, noise=0.0, seeds=1, budgets=BUDGETS):
    random = np.random.default_rng(3)
    return [(flops, a * flops**-alpha + noise * random.standard_normal())
            for flops in budgets for _ in range(seeds)]


def test_the_exponent_and_the_crossing_that_were_put_in():
    fast, slow = points(25.0, 0.055), points(13.0, 0.035)
    found = scaling.law(dict(fast=fast, slow=slow))
    assert found["arms"]["fast"]["alpha"] == pytest.approx(0.055)
    assert found["arms"]["slow"]["a"] == pytest.approx(13.0)
    assert found["noise"] == scaling.NOISE
    [crossing] = found["crossings"]
    where = (25 / 13) ** (1 / 0.02)  # 25 F**-0.055 = 13 F**-0.035
    assert crossing["arms"] == ["slow", "fast"]
    assert crossing["flops"] == pytest.approx(where, rel=1e-3)
    low, high = crossing["flops_90"]
    assert low < where < high


def test_laws_that_do_not_meet_within_the_budgets_do_not_cross():
    found = scaling.law(dict(a=points(25.0, 0.055), b=points(20.0, 0.055), c=points(9.0, 0.02)))
    assert not found["crossings"]


def test_the_interval_holds_the_exponent_as_often_as_it_says():
    """With noise, 90 % intervals: 200 sets of runs."""
    random, held = np.random.default_rng(5), 0
    for _ in range(200):
        runs = [(flops, 25 * flops**-0.055 + 0.015 * random.standard_normal()) for flops in BUDGETS]
        low, high = scaling.law(dict(arm=runs))["arms"]["arm"]["alpha_90"]
        held += low <= 0.055 <= high
    assert 0.85 < held / 200 < 0.95


def test_noise_is_that_of_the_seeds():
    runs = dict(arm=points(25.0, 0.055, noise=0.1, seeds=50))
    assert scaling.law(runs)["noise"] == pytest.approx(0.1, rel=0.15)


def test_budgets_above_fit_to_do_not_bend_the_law(tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *args: drawn.append(args[0]) or savefig(*args))
    runs = dict(arm=points(25.0, 0.055) + [(1e15, 4.0)])
    assert scaling.law(runs)["arms"]["arm"]["alpha"] < 0.054
    assert scaling.law(runs, fit_to=3.4e14)["arms"]["arm"]["alpha"] == pytest.approx(0.055)
    scaling.draw(runs, tmp_path / "law.png", fit_to=3.4e14)
    line, dots = drawn[0].axes[0].get_lines()
    assert line.get_xdata().max() == pytest.approx(3.4e14)
    assert dots.get_xdata().max() == 1e15


@pytest.mark.parametrize("budgets, found", [([1e13, 1e15], 1), ([1e15], 0)])
def test_a_law_needs_two_budgets(budgets, found):
    with pytest.raises(ValueError, match=f"arm few: a law needs two budgets .*found {found}"):
        scaling.law(dict(few=points(25.0, 0.055, budgets=budgets)), fit_to=3.4e14)


def test_the_picture_has_a_line_for_each_arm(tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *args: drawn.append(args[0]) or savefig(*args))
    scaling.draw(dict(first=points(25.0, 0.055), second=points(13.0, 0.035)), tmp_path / "law.png")
    left, right = drawn[0].axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "first  0.055", "second  0.035"]
    assert right.get_lines()[2].get_ydata() == pytest.approx(np.zeros(50), abs=1e-9)
    assert (tmp_path / "law.png").stat().st_size > 5000
