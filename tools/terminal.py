"""Output to a terminal or a pipe that may go away before the work is done."""

import contextlib
import os
import sys


def say(*words):
    """Prints. Where stdout takes nothing any more (`| head`, a full disk), the work goes on."""
    try:
        print(*words, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):  # a stdout without a descriptor
            os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
