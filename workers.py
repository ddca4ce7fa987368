"""Texts -> token ids in several processes.

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

from bins import DataError

PIECE_CHARS = 1_000_000  # longer documents are tokenised in pieces, so that memory is bounded
ROOT = os.path.dirname(os.path.abspath(__file__))


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


def encode_texts(tokenizer, dtype, texts):
    """Texts or Ids -> (number of ids of each, all ids one after the other in `dtype`); each text ends in eot_id."""
    lengths, parts = [], [np.zeros(0, dtype)]
    for text in texts:
        parts_of = [text.ids] if isinstance(text, Ids) else tokenizer.encode(cut(text, PIECE_CHARS))
        ids = [*parts_of, np.array([tokenizer.eot_id])]
        lengths.append(sum(map(len, ids)))
        parts += [part.astype(dtype) for part in ids]
    return np.array(lengths, np.int64), np.concatenate(parts)


def worker():
    """A tokenising process: lists of texts in on stdin, ids out on stdout, until the parent closes the pipe or dies."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
        tokenizer, dtype = pickle.load(sys.stdin.buffer)
        while True:
            send(sys.stdout.buffer, encode_texts(tokenizer, dtype, pickle.load(sys.stdin.buffer)))


def send(pipe, message):
    """Pickles `message` into a pipe, at once."""
    pickle.dump(message, pipe, protocol=5)
    pipe.flush()


def start_process(message):
    """Starts a worker, out of reach of the terminal's Ctrl-C, and sends it `message`."""
    code = f"import sys; sys.path.insert(0, {ROOT!r}); import workers; workers.worker()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    send(process.stdin, message)
    return process


def encode_chunks(chunks, tokenizer, dtype, num_proc):
    """Yields (chunk without its texts, lengths, ids) in input order; a process holds one chunk at a time."""
    if num_proc == 1:
        for chunk in chunks:
            yield chunk._replace(texts=None), *encode_texts(tokenizer, dtype, chunk.texts)
        return
    processes, busy = [], collections.deque()  # busy: (chunk, process), the oldest first
    try:
        for chunk in chunks:
            done = None
            if len(processes) < num_proc:  # started when there is work for them
                processes.append(start_process((tokenizer, dtype)))
                busy.append((chunk._replace(texts=None), processes[-1]))
            else:
                oldest, process = busy.popleft()
                done = (oldest, *pickle.load(process.stdout))
                busy.append((chunk._replace(texts=None), process))
            send(busy[-1][1].stdin, chunk.texts)  # before the caller writes `done`, so that no process waits
            if done:
                yield done
        while busy:
            oldest, process = busy.popleft()
            yield (oldest, *pickle.load(process.stdout))
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):
        raise DataError("a tokenising process died; --num_proc=1 goes on from here with the least memory") from None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
