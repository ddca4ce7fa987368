"""Which arms of a sweep go on: ranking at a number of tokens, and arms that are given up before.

Used by tools/sweep.py. A curve is [(tokens, validation loss)], as a run has logged it.
"""

import csv
import io
import math
import statistics

import numpy as np

from lib.files import replace_file


def curve_of(records):
    """Records of a run's log -> its curve."""
    return [(r["tokens"], r["val_loss"]) for r in records if r.get("val_loss") is not None]


def is_hopeless(curve, reference, margin, unit, window):
    """Whether a run has been worse than the reference by the margin for the last `window` tokens.

    At every evaluation in them, of which there must be two or more, at equal tokens; between the
    evaluations of the reference its loss is interpolated. unit: of the margin, "nats" or "ppl"
    (perplexity). False as long as the reference has not come so far.
    """
    if len(curve) < 2 or len(reference) < 2 or not margin:
        return False
    last = curve[-1][0]
    recent = [(tokens, loss) for tokens, loss in curve if tokens > last - window]
    if last < window or len(recent) < 2 or last > reference[-1][0]:
        return False
    at, losses = zip(*reference)

    def is_worse(tokens, loss):
        expected = float(np.interp(tokens, at, losses))
        if unit == "ppl":
            return math.exp(min(loss, 100)) >= math.exp(min(expected, 100)) + margin
        return loss >= expected + margin
    return all(is_worse(tokens, loss) for tokens, loss in recent)


def promoted(losses, n):
    """{arm: losses of its seeds} -> the n arms with the lowest medians, the best first."""
    return sorted(losses, key=lambda arm: statistics.median(losses[arm]))[:n]


def loss_at(records, step):
    """The validation loss that a run has logged at a step -> (loss, tokens), or None."""
    for record in records:
        if record["step"] == step and record.get("val_loss") is not None:
            return record["val_loss"], record["tokens"]
    return None


def write_csv(path, rows):
    """One row a run, whatever its columns: [{column: value}]."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, lambda file: file.write(text.getvalue().encode()))
