"""The runs of a sweep as a table that changes in place on a terminal."""

import contextlib
import statistics
import sys
import threading
import time

EVERY_SECONDS = 2.0


@contextlib.contextmanager
def live_table(rows):
    """While it is open, a terminal shows rows() -> [(arm, status, tokens, share done, loss)] and
    how long the rest takes. Elsewhere, and without rich, nothing: the sweep's lines say as much.
    """
    try:
        from rich.live import Live
    except ImportError:
        yield
        return
    if not sys.stdout.isatty():
        yield
        return
    started, ended = time.monotonic(), threading.Event()
    with Live(table(rows(), 0.0), auto_refresh=False, transient=True) as live:
        def refresh():
            while not ended.wait(EVERY_SECONDS):
                live.update(table(rows(), time.monotonic() - started), refresh=True)
        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def table(rows, seconds):
    """-> rich.table.Table."""
    from rich.table import Table

    made = Table(box=None, caption=time_left(rows, seconds), caption_justify="left")
    made.add_column("arm")
    for name in ("status", "tokens", "done", "loss"):
        made.add_column(name, justify="right")
    for arm, status, tokens, share, loss in rows:
        made.add_row(arm.replace("[", r"\["), status, f"{tokens:,}" if tokens else "",
                     f"{share:.0%}" if share else "", "" if loss is None else f"{loss:.4f}")
    return made


def time_left(rows, seconds):
    """How long the rest takes at the mean speed so far, as text."""
    share = statistics.mean(share for *_, share, _ in rows) if rows else 0
    if share <= 0 or share >= 1 or seconds < EVERY_SECONDS:
        return ""
    return f"{share:.0%} done, about {seconds / share * (1 - share) / 60:.1f} min left"
