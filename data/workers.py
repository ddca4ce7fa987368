"""Documents -> token ids, verdicts of the filters and MinHash bands, in several processes.

The processes are started with subprocess instead of multiprocessing. So a script needs no
`if __name__ == "__main__"`, and the workers of a killed parent end by themselves, because their
pipe closes. A worker must load no torch: data/bins.py and data/tokenizer.py do without it.
"""

import collections
import contextlib
import os
import pickle
import subprocess
import sys
from typing import NamedTuple

import numpy as np

from data.bins import DataError
from data.writer import KEPT, KINDS, N_SAMPLES

EXCERPT_CHARS = 500  # of a dropped document, to show in dropped.jsonl
PIECE_CHARS = 1_000_000  # longer documents are tokenised in pieces, so that memory is bounded
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Ids(NamedTuple):
    """A document that comes as token ids, not as text.

    Without ids it is no document: only what was left out of the input counts.
    """
    ids: np.ndarray  # uint32 (n,), without eot_id
    n_bytes: int  # of its text; 0: unknown
    left_out: dict  # {what: how much}, tokens and the like that came before or in it


class Judged(NamedTuple):
    """What became of n documents, of which m were kept."""
    kinds: np.ndarray  # int64 (n,), index in KINDS + filters.names
    tokens: np.ndarray  # int64 (n,), with eot_id; 0 unless kept
    bytes: np.ndarray  # int64 (n,), text in the tokens (some tokenizers put it into NFC first)
    ids: np.ndarray  # of the kept documents, one after the other; each ends in eot_id
    bands: np.ndarray  # uint64 (m, bands), MinHash; bands is 0 without that filter
    samples: list  # [(number of the document, what to show of it)] of dropped ones


def cut(text, size):
    """Text -> pieces of at most `size` characters, which join to it.

    A piece ends after the last blank line in its second half, else after the last line there, else
    before the last space there.
    """
    pieces, start = [], 0
    while len(text) - start > size:
        low, high = start + size // 2, start + size
        end = high
        for mark, kept in (("\n\n", 2), ("\n", 1), (" ", 0)):
            at = text.rfind(mark, low, high)
            if at > start:
                end = at + kept
                break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def judge_texts(tokenizer, dtype, filters, texts):
    """Applies the filters to each document and tokenises it. texts: UTF-8 bytes or Ids -> Judged.

    dtype: of the ids. filters: data/filters.py, or None.
    """
    counts = []  # (kind, tokens, bytes) of each document
    parts = [np.zeros(0, dtype)]
    bands, samples = [], []
    eot = np.array([tokenizer.eot_id], dtype)
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
            if n_shown[rule] < 2 * N_SAMPLES:  # no more can be needed, see writer.take_samples
                shown = {"rule": rule, "reason": reason[:EXCERPT_CHARS],
                         "text": text[:EXCERPT_CHARS]}
                samples.append((number, shown))
                n_shown[rule] += 1
            continue
        ids = [tokenizer.encode([piece])[0].astype(dtype) for piece in cut(text, PIECE_CHARS)]
        ids.append(eot)
        n_bytes = sum(int(tokenizer.n_bytes[part].sum()) for part in ids)
        counts.append((KEPT, sum(map(len, ids)), n_bytes))
        parts += ids
        if of_text is not None:
            bands.append(of_text)
    kinds, tokens, n_bytes = np.array(counts, np.int64).reshape(-1, 3).T
    n_bands = len(bands[0]) if bands else 0
    bands = np.array(bands, np.uint64).reshape((tokens > 0).sum(), n_bands)
    return Judged(kinds, tokens, n_bytes, np.concatenate(parts), bands, samples)


# --------------------------------------------------------------------------------------------------
# processes


def worker():
    """The program of a process: reads lists of documents on stdin, writes Judged on stdout.

    It ends when the parent closes the pipe or dies.
    """
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
        tools = pickle.load(sys.stdin.buffer)
        while True:
            send(sys.stdout.buffer, judge_texts(*tools, pickle.load(sys.stdin.buffer)))


def send(pipe, message):
    """Pickles `message` into a pipe, at once."""
    pickle.dump(message, pipe, protocol=5)
    pipe.flush()


def start_process(tools):
    """Starts a worker and sends it its tools.

    It has a session of its own: Ctrl-C on the terminal goes to the parent alone.
    """
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from data import workers; workers.worker()"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    send(process.stdin, tools)
    return process


def judge_chunks(chunks, tools, num_proc):
    """Yields (chunk without its texts, Judged) in the order of the input.

    tools: (tokenizer, dtype, filters). A process holds one chunk at a time. num_proc=1 works in
    this process. Raises DataError when a process died.
    """
    if num_proc == 1:
        for chunk in chunks:
            yield chunk._replace(texts=None), judge_texts(*tools, chunk.texts)
        return
    processes, busy = [], collections.deque()  # busy: (chunk, its process), the oldest first
    try:
        for chunk in chunks:
            done = None
            if len(processes) < num_proc:  # a process is started when there is work for it
                process = start_process(tools)
                processes.append(process)
            else:
                oldest, process = busy.popleft()
                done = oldest, pickle.load(process.stdout)
            busy.append((chunk._replace(texts=None), process))
            # The process gets its next chunk before the caller writes `done`, so that it need not
            # wait for the disk.
            send(process.stdin, chunk.texts)
            if done:
                yield done
        while busy:
            oldest, process = busy.popleft()
            yield oldest, pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):
        raise DataError("a tokenising process died; --num_proc=1 goes on from here with the least "
                        "memory") from None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
