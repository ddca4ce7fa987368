"""The arms of a sweep, from the texts of its settings: named ones, combinations, random draws.

Used by tools/sweep.py. An arm is a name and arguments of train.py. `defaults` are its settings,
{name: default}; an axis is one of them, or of SOLVED.
"""

import difflib
import itertools
import shlex

import numpy as np

SOLVED = ("embed_share", "glu")  # axes that are no settings of train.py: they decide a shape


def named(text, out_dir):
    """One arm a line, NAME and its arguments -> {name: arguments}. Raises ValueError for others."""
    found = {}
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:  # a quotation that does not end
            raise ValueError(f"arms: {line.strip()!r}: {error}") from None
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


def read_axes(text, setting, expected, defaults):
    """Lines "NAME VALUE VALUE ..." -> {name: [values]}. Raises ValueError."""
    axes, known = {}, set(defaults) | set(SOLVED)
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


def combinations(text, defaults):
    """The setting `grid` -> [(name, arguments)], every combination of the axes' values."""
    axes = read_axes(text, "grid", "SETTING VALUE VALUE ...", defaults)
    for name, values in axes.items():
        if len(set(values)) < len(values):
            raise ValueError(f"grid: {name} has a value twice: {' '.join(values)}")
    if axes and all(len(values) == 1 for values in axes.values()):
        raise ValueError("grid varies nothing: each of its settings has one value; give more, or "
                         "put them into base")
    found = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return [arm_of(values) for values in found if values]


def read_ranges(text, trials, defaults):
    """The setting `ranges` -> {name: (low, high, whether it is logarithmic)}. Raises ValueError."""
    axes, expected = {}, "SETTING LOW HIGH, with log behind for an even spread of the logarithm"
    for name, words in read_axes(text, "ranges", expected, defaults).items():
        try:
            low, high = map(float, words[:2])
            if not low < high or words[2:] not in ([], ["log"]) or words[2:] and low <= 0:
                raise ValueError
        except ValueError:
            raise ValueError(f"ranges: {name} {' '.join(words)}: expected {expected}") from None
        axes[name] = low, high, bool(words[2:])
    if bool(axes) != (trials > 0):
        raise ValueError(f"trials={trials} with {len(axes)} ranges: give both or none")
    return axes


def draws(axes, trials, defaults):
    """`trials` random arms of what read_ranges gives -> [(name, arguments)], always the same."""
    random, found = np.random.default_rng(0), []
    for _ in range(trials):
        values = {}
        for name, (low, high, is_log) in axes.items():
            spot = random.random()
            value = low * (high / low) ** spot if is_log else low + (high - low) * spot
            values[name] = as_text(name, value, defaults)
        found.append(arm_of(values))
    return found


def as_text(name, value, defaults):
    """A number as the value of a setting, whole where the setting is."""
    is_whole = isinstance(defaults.get(name), int)
    return str(round(value)) if is_whole else f"{value:.4g}"


def arm_of(values):
    """{setting: value} -> (name, arguments)."""
    name = " ".join(f"{key}={value}" for key, value in values.items())
    return name.replace("/", "_"), [f"--{key}={value}" for key, value in values.items()]
