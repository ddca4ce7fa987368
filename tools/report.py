"""One HTML page that shows a trained model: curves, losses, health, what each concept reads.

write_report(path, data) turns plain data (dicts, lists, numbers, text) into a file that needs
nothing else: no network, no font, no library. The page itself is report.html. Text of the data
never becomes markup: it travels as JSON, and the script puts it into the page as text. Where a key
of `data` is missing or empty, one sentence in its section says why there is nothing to see.
"""

import json
import math
import os

from lib.files import replace_file
from tools.measures import CONCEPTS, LOSSES

# Measures that training logs, drawn as small curves: [name in log.jsonl, heading, how to read it]
CURVES = [[m.curve, m.heading, m.reading] for m in CONCEPTS if m.curve]
# The other curves: losses, and how well scores and frequencies tell what is hard
OTHER_CURVES = ("loss", "val_loss", "importance_rank_correlation", "frequency_rank_correlation")
POINTS = 600  # most points of a curve; without a limit the page would grow with the run

HERE = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(HERE, "report.html"), encoding="utf-8") as file:
    PAGE = file.read()  # style, words and script; DATA in it stands for the data of a run


def write_report(path, data):
    """Replaces the file `path` by the page of `data`, whole or not at all."""
    replace_file(path, lambda file: file.write(page(data).encode()))


def page(data):
    """data -> HTML.

    Needed are title, arch, step, tokens, params, settings and unigram_entropy; other keys are
    optional: the calls of fill() in report.html show what each holds.
    """
    losses = [[m.name, m.heading, m.form] for m in LOSSES]
    data = {**data, "log": curves(data.get("log") or []), "measures": [CURVES, losses]}
    text = json.dumps(clean(data), allow_nan=False)
    # <, > and & could end the script element. json.dumps has escaped all that is not ASCII.
    text = text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})
    return PAGE.replace("DATA", text, 1)


def clean(value):
    """What JSON can hold: NaN and infinity become None.

    Floats keep 6 digits: weights of attention are most of the page.
    """
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def curves(log):
    """Records of a training log -> {name: [[tokens, value], ...]} of at most POINTS points each.

    A longer curve is averaged in groups of neighbouring points.
    """
    result = {}
    for key in (*OTHER_CURVES, *(name for name, _, _ in CURVES)):
        points = sorted((record["tokens"], record[key]) for record in log
                        if record.get(key) is not None and math.isfinite(record[key]))
        n = max(1, math.ceil(len(points) / POINTS))
        groups = [points[i:i + n] for i in range(0, len(points), n)]
        result[key] = [[sum(column) / len(group) for column in zip(*group)] for group in groups]
    return result
