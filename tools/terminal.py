"""Tables for a terminal, and a text that is watched while it is generated."""

import itertools
import math
import os
import shutil
import sys
import time
import unicodedata

WIDTH = 100  # columns of a terminal that tables fit into


def elide(text, width):
    """Text of at most `width` characters; what is left out in the middle becomes three dots."""
    if len(text) <= width:
        return text
    begin = (width - 3) // 2
    return f"{text[:begin]}...{text[begin + 3 - width:]}"


def columns(heads, rows):
    """A table as text: [heads], [(label, [cell for each head])] -> lines of up to WIDTH characters.

    Long cells lose their middle. Columns that do not fit side by side follow below, under the same
    labels.
    """
    labels = [elide(label, 36) for label, _ in rows]
    margin = 2 + max(map(len, labels))
    widest = max(14, (WIDTH - margin) // len(heads) - 2)
    table = [[elide(cell, widest) for cell in cells] for cells in (heads, *(r[1] for r in rows))]
    width = 2 + max(len(cell) for cells in table for cell in cells)
    at_once = (WIDTH - margin) // width
    lines = []
    for i in range(0, len(heads), at_once):
        for label, cells in zip(["", *labels], table):
            line = "".join(f"{cell:>{width}}" for cell in cells[i:i + at_once])
            lines.append(f"  {label:<{margin - 2}}{line}".rstrip(" "))
        lines.append("")
    return "\n".join(lines)


# ---- a text while its masks are filled ------------------------------------------------

RESET = "\x1b[0m"
STYLES = {"masked": "\x1b[2m", "new": "\x1b[7m", "old": ""}  # faint; reverse
FRAME_S = 0.05  # a small model makes steps faster than one can follow


class FillingText:
    """Shows a text while its [MASK]s are filled; called with its ids (1,N) after each step.

    A terminal shows it in place: a mask as light blocks, what the last step has drawn in reverse.
    Elsewhere it is printed when 3/4, 1/2 and 1/4 of the masks are left.
    """

    def __init__(self, tok):
        self.tok = tok
        self.is_live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        shades = (sys.stdout.encoding or "").lower().startswith("utf")
        mark = "\u2591" if self.is_live and shades else "_"
        # about as wide as the token that will stand there
        self.mark = mark if tok.is_bytes else f" {mark * 3}"
        self.n_lines = 0  # of the text as it stands on the terminal
        self.clear()

    def clear(self):
        """Takes the text off the terminal; the next call begins another one."""
        self.erase()
        self.before, self.quarters = None, 4

    def erase(self):
        if self.n_lines:
            sys.stdout.write(f"\x1b[{self.n_lines}F\x1b[J")  # up to its first line, clear below
        self.n_lines = 0

    def __call__(self, ids):
        ids = ids[0].tolist()[1:]  # without the mark at the beginning
        parts = self.parts(ids, self.before or ids)
        if self.is_live:
            self.draw(parts)
            time.sleep(FRAME_S)
        else:
            self.print_at_quarters(parts, ids.count(self.tok.mask_id))
        self.before = ids

    def parts(self, ids, before):
        """-> [(text, "masked" | "new" | "old")] of neighbouring tokens of one kind."""
        mask_id = self.tok.mask_id
        kinds = ["masked" if now == mask_id else "new" if then == mask_id else "old"
                 for now, then in zip(ids, before)]
        parts = []
        for kind, group in itertools.groupby(zip(ids, kinds), key=lambda pair: pair[1]):
            run = [i for i, _ in group]
            text = self.mark * len(run) if kind == "masked" else self.tok.decode(run)
            # line breaks too: the text flows on as one paragraph
            parts.append(("".join(c if c.isprintable() else " " for c in text), kind))
        return parts

    def draw(self, parts):
        width, height = shutil.get_terminal_size()
        lines = wrap(parts, width - 1)
        # A text of more lines than the terminal shows scrolls to what is new.
        at_once = max(1, height - 2)
        new = [i for i, line in enumerate(lines) if any(kind == "new" for _, kind in line)]
        first = max(0, new[-1] + 1 - at_once) if new else 0
        lines = lines[first:first + at_once]
        self.erase()
        self.n_lines = len(lines)
        for line in lines:
            for kind, cells in itertools.groupby(line, key=lambda cell: cell[1]):
                sys.stdout.write(STYLES[kind] + "".join(c for c, _ in cells) + RESET)
            sys.stdout.write("\n")
        sys.stdout.flush()

    def print_at_quarters(self, parts, n_left):
        if self.before is None:
            self.n_masks = n_left
        quarters = math.ceil(4 * n_left / self.n_masks)
        if 0 < quarters < self.quarters:
            print(f"{n_left:5} masked: {''.join(text for text, _ in parts)}")
            self.quarters = quarters


def wrap(parts, width):
    """[(text, kind)] -> lines of up to `width` columns, each a list of (character, kind)."""
    lines, column = [[]], 0
    for text, kind in parts:
        for char in text:
            n_columns = 2 if unicodedata.east_asian_width(char) in "WF" else 1
            if column + n_columns > width:
                lines.append([])
                column = 0
            lines[-1].append((char, kind))
            column += n_columns
    return lines


def printable(text):
    """A text without control characters, which could do anything to a terminal."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
                   for c in text)


class StreamingText:
    """Prints a text while a causal model makes it; called with its ids (1,N) after each token."""

    def __init__(self, tok):
        self.tok, self.n_printed = tok, 0

    def __call__(self, ids):
        ids = ids[0].tolist()[1:]
        if self.tok.eot_id in ids:
            ids = ids[:ids.index(self.tok.eot_id)]
        # The last bytes may be the beginning of a character: they wait for the rest.
        text = printable(self.tok.decode(ids)).rstrip("\ufffd")
        sys.stdout.write(text[self.n_printed:])
        sys.stdout.flush()
        self.n_printed = max(self.n_printed, len(text))

    def clear(self):
        """Ends the line; the next call begins another text."""
        print()
        self.n_printed = 0
