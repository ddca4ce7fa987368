"""Texts -> token ids, verdicts of the filters and MinHash bands, in several processes.

Our own processes, not multiprocessing: scripts need no main guard, and the children of a killed parent end by
themselves because their pipe closes.
"""

import collections
import contextlib
import os
import pickle
import subprocess
import sys
from typing import NamedTuple

import numpy as np

from data.bins import KEPT, KINDS, N_SAMPLES, DataError

EXCERPT_CHARS = 500  # of a dropped document, to show
PIECE_CHARS = 1_000_000  # longer documents are tokenised in pieces, so that memory is bounded
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Ids(NamedTuple):
    """A document that comes as token ids, uint32 (n,), without eot_id; of none, only what was left out counts."""
    ids: np.ndarray
    n_bytes: int  # of its text; 0 when unknown
    left_out: dict  # {what: how much} that came before or in it


def cut(text, size):
    """Text -> pieces of at most `size` characters that end after a blank line, else a line, else before a space."""
    pieces, start = [], 0
    while len(text) - start > size:
        low, high = start + size // 2, start + size
        ends = ((text.rfind(mark, low, high), keep) for mark, keep in (("\n\n", 2), ("\n", 1), (" ", 0)))
        end = next((at + keep for at, keep in ends if at > start), high)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


Judged = collections.namedtuple("Judged", "kinds tokens bytes ids bands samples")


def judge_texts(tokenizer, dtype, filters, texts):
    """UTF-8 texts or Ids -> Judged: of each what becomes of it (index in KINDS + filters.names), tokens, bytes of text
    (as in the tokens: some tokenizers put text into NFC first).

    ids: of the kept ones one after the other, `dtype`; each ends in eot_id. bands: of the kept ones, uint64 (m, bands).
    samples: [(number of the text, what to show of it)] of dropped ones.
    """
    counts, parts, bands, samples, eot = [], [np.zeros(0, dtype)], [], [], np.array([tokenizer.eot_id], dtype)
    n_shown, names = collections.Counter(), filters.names if filters else []
    for number, text in enumerate(texts):
        if isinstance(text, Ids):
            counts.append((KEPT, len(text.ids) + 1, text.n_bytes))
            parts += [text.ids.astype(dtype), eot]
            continue
        text = text.decode()
        rule, reason, of_text = filters.judge(text) if filters else ("", "", None)
        if rule:
            counts.append((len(KINDS) + names.index(rule), 0, 0))
            if n_shown[rule] < 2 * N_SAMPLES:
                shown = {"rule": rule, "reason": reason[:EXCERPT_CHARS], "text": text[:EXCERPT_CHARS]}
                samples.append((number, shown))
                n_shown[rule] += 1
            continue
        ids = [*(tokenizer.encode([piece])[0].astype(dtype) for piece in cut(text, PIECE_CHARS)), eot]
        counts.append((KEPT, sum(map(len, ids)), sum(int(tokenizer.n_bytes[part].sum()) for part in ids)))
        parts += ids
        if of_text is not None:
            bands.append(of_text)
    kinds, tokens, n_bytes = np.array(counts, np.int64).reshape(-1, 3).T
    bands = np.array(bands, np.uint64).reshape((tokens > 0).sum(), len(bands[0]) if bands else 0)
    return Judged(kinds, tokens, n_bytes, np.concatenate(parts), bands, samples)


def worker():
    """A process: lists of texts in on stdin, Judged out on stdout, until the parent closes the pipe or dies."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
        tools = pickle.load(sys.stdin.buffer)
        while True:
            send(sys.stdout.buffer, judge_texts(*tools, pickle.load(sys.stdin.buffer)))


def send(pipe, message):
    """Pickles `message` into a pipe, at once."""
    pickle.dump(message, pipe, protocol=5)
    pipe.flush()


def start_process(message):
    """Starts a worker, out of reach of the terminal's Ctrl-C, and sends it `message`."""
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from data import workers; workers.worker()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    send(process.stdin, message)
    return process


def judge_chunks(chunks, tools, num_proc):
    """Yields (chunk without its texts, Judged) in input order; a process holds one chunk at a time.

    tools: (tokenizer, dtype, filters).
    """
    if num_proc == 1:
        for chunk in chunks:
            yield chunk._replace(texts=None), judge_texts(*tools, chunk.texts)
        return
    processes, busy = [], collections.deque()  # busy: (chunk, process), the oldest first
    try:
        for chunk in chunks:
            done = None
            if len(processes) < num_proc:  # started when there is work for them
                processes.append(start_process(tools))
                busy.append((chunk._replace(texts=None), processes[-1]))
            else:
                oldest, process = busy.popleft()
                done = oldest, pickle.load(process.stdout)
                busy.append((chunk._replace(texts=None), process))
            send(busy[-1][1].stdin, chunk.texts)  # before the caller writes `done`, so that no process waits
            if done:
                yield done
        while busy:
            oldest, process = busy.popleft()
            yield oldest, pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):
        raise DataError("a tokenising process died; --num_proc=1 goes on from here with the least memory") from None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
