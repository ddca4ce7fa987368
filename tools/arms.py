"""The arms of a sweep: named ones, combinations, random draws, and such as a search chooses.

Used by tools/sweep.py. An arm is a name and arguments of train.py; an axis is one of its settings,
or of SOLVED.
"""

import difflib
import itertools
import math
import os
import shlex
from functools import cache

import numpy as np

from configurator import ROOT, configure, read_settings

TRAIN = os.path.join(ROOT, "train.py")
SOLVED = ("embed_share", "glu")  # axes that are no settings of train.py: they decide a shape


@cache
def train_defaults():
    """{name: default} of train.py's settings."""
    return {name: default for name, (default, _) in read_settings(TRAIN).items()}


def resolve(arguments):
    """Arguments of train.py -> all its settings. Raises ValueError for those it would refuse."""
    given = [word for word in arguments
             if word.startswith("-") and word.strip("-").partition("=")[0] in ("seed", "out_dir")]
    if given:
        raise ValueError(f"{given[0]}: the sweep gives each run its seed and folder; use --seeds "
                         "and --out_dir of the sweep")
    try:
        return configure(dict(__file__=TRAIN, __doc__="", __name__="__main__"), arguments)
    except SystemExit as refusal:
        raise ValueError(refusal) from None


def all_arms(arms, grid, ranges, trials, out_dir):
    """These settings of a sweep -> {name: (arguments, whether they were generated)}.

    Raises ValueError for a name that comes twice.
    """
    found = {name: (own, False) for name, own in named(arms, out_dir).items()}
    for name, arguments in combinations(grid) + draws(read_ranges(ranges, trials), trials):
        if name in found:
            raise ValueError(f"arm {name} comes twice, from arms, grid or ranges")
        found[name] = arguments, True
    return found


def split(setting, text, comments=False):
    """The words of a setting, as in a shell. Raises ValueError for a quotation that does not end.
    """
    try:
        return shlex.split(text, comments)
    except ValueError as error:
        raise ValueError(f"{setting}: {text.strip()!r}: {error}") from None


def named(text, out_dir):
    """One arm a line, NAME and its arguments -> {name: arguments}. Raises ValueError for others."""
    found = {}
    for line in text.splitlines():
        words = split("arms", line, comments=True)
        if not words:
            continue
        name, *arguments = words
        if name in found or name.startswith("-"):
            raise ValueError(f"arms: {line.strip()!r}: expected a name used once, then arguments "
                             "of train.py")
        # The name is part of the name of a folder in out_dir.
        if not name.isprintable() or set(name) & set("/\\") or name[:1] in ("", "."):
            raise ValueError(f"arms: {name!r} cannot be the name of a folder in {out_dir}; "
                             "expected letters, digits and signs, but no slash and no dot at the "
                             "start")
        found[name] = arguments
    return found


def read_axes(text, setting, expected):
    """Lines "NAME VALUE VALUE ..." -> {name: [values]}. Raises ValueError."""
    axes, known = {}, {*train_defaults(), *SOLVED}
    for line in text.splitlines():
        name, *values = line.partition("#")[0].split() or [""]
        if not name:
            continue
        if name in axes or not values:
            raise ValueError(f"{setting}: {line.strip()!r}: expected {expected}, each once")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise ValueError(f"{setting}: {name} is no setting of train.py{hint}")
        axes[name] = values
    return axes


def combinations(text):
    """The setting `grid` -> [(name, arguments)], every combination of the axes' values."""
    axes = read_axes(text, "grid", "SETTING VALUE VALUE ...")
    for name, values in axes.items():
        if len(set(values)) < len(values):
            raise ValueError(f"grid: {name} has a value twice: {' '.join(values)}")
    if axes and all(len(values) == 1 for values in axes.values()):
        raise ValueError("grid varies nothing: each of its settings has one value; give more, or "
                         "put them into base")
    found = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return [arm_of(values) for values in found if values]


def read_ranges(text, trials):
    """The setting `ranges` -> {name: (low, high, whether it is logarithmic)}. Raises ValueError."""
    axes, expected = {}, "SETTING LOW HIGH, with log behind for an even spread of the logarithm"
    for name, words in read_axes(text, "ranges", expected).items():
        try:
            low, high = map(float, words[:2])
            least = 0.0 if words[2:] else -math.inf
            if not least < low < high < math.inf or words[2:] not in ([], ["log"]):
                raise ValueError
        except ValueError:
            raise ValueError(f"ranges: {name} {' '.join(words)}: expected {expected}") from None
        axes[name] = low, high, bool(words[2:])
    if bool(axes) != (trials > 0):
        raise ValueError(f"trials={trials} with {len(axes)} ranges: give both or none")
    return axes


def draws(axes, trials):
    """`trials` random arms of what read_ranges gives -> [(name, arguments)], always the same."""
    random, found = np.random.default_rng(0), {}
    for _ in range(100 * trials):
        if len(found) == trials:
            break
        values = {}
        for name, (low, high, is_log) in axes.items():
            spot = random.random()
            value = low * (high / low) ** spot if is_log else low + (high - low) * spot
            values[name] = as_text(name, value)
        name, arguments = arm_of(values)
        found[name] = arguments  # a setting that is a whole number may be drawn twice
    if len(found) < trials:
        raise ValueError(f"trials={trials}: the ranges hold {len(found)} different arms, as far as "
                         f"{100 * trials} draws show; --trials={len(found)}")
    return list(found.items())


def load_optuna():
    try:
        import optuna
    except ImportError:
        raise ValueError("search=tpe needs optuna: pip install -r requirements-extra.txt") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def chosen_by_tpe(axes, trials, at_once, losses):
    """Arms chosen after what the earlier ones have come to, `at_once` at a time, `trials` in all.

    losses: a function that runs {name: arguments} and gives {name: loss} of those that have one, or
    None to end the search. The sampler has a seed, and losses are told in order: the same search
    again asks for the same arms.
    """
    optuna = load_optuna()
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    for n_asked in range(0, trials, at_once):
        asked = []
        for _ in range(min(at_once, trials - n_asked)):
            trial = study.ask()
            values = {name: as_text(name, trial.suggest_float(name, low, high, log=is_log))
                      for name, (low, high, is_log) in axes.items()}
            asked.append((trial, *arm_of(values)))
        found = losses({name: arguments for _, name, arguments in asked})
        if found is None:
            return
        for trial, name, _ in asked:
            if name in found:
                study.tell(trial, found[name])
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)


def as_text(name, value):
    """A number as the value of a setting, whole where the setting is."""
    is_whole = isinstance(train_defaults().get(name), int)
    return str(round(value)) if is_whole else f"{value:.4g}"


def arm_of(values):
    """{setting: value} -> (name, arguments)."""
    name = " ".join(f"{key}={value}" for key, value in values.items())
    return name.replace("/", "_"), [f"--{key}={value}" for key, value in values.items()]
