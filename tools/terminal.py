"""Tables for a terminal."""

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
