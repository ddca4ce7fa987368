"""Documents -> token bins: drops exact duplicates, splits train and val, tokenises, commits.

`write_dataset` is what prepare.py and data/NAME/prepare.py call. In order:

    documents       texts or ids with a position each, from inputs.py, hub.py or ids.py
    read_chunks     drops texts seen before, chooses train or val by a hash of the text
    judge_chunks    filters and tokenises in several processes (data/workers.py)
    NearDuplicates  drops a text that shares a MinHash band with an earlier one (data/duplicates.py)
    commit          appends the ids to the bins (data/writer.py)

A document's split depends on its text alone, not on the order or the number of processes. Results
are written in the order of the input. Memory does not grow with the input: data/duplicates.py.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import bins, writer
from data.bins import DataError
from data.duplicates import NearDuplicates, seen_texts
from data.tokenizer import Tokenizer, check_vocab_size, mended
from data.workers import Ids, judge_chunks
from data.writer import commit, finish

CHUNK_BYTES = 4_000_000  # UTF-8 text tokenised at a time by a process; a kill loses one such chunk
CHUNK_ROWS = 50_000  # documents in a chunk at most
SAMPLE_BYTES = 64_000_000  # of text that a bpe:N vocabulary is trained on
BAD_FILE = object()  # in place of a text: the rest of a damaged file was skipped
LEFT_OUT = ("padding_tokens", "documents_cut")  # counts that only documents made of ids have


def utf8(text):
    """A document -> the bytes that its hash is made of: UTF-8 of a text, 4 bytes for each of Ids.

    Half a surrogate pair, which JSON can hold, becomes U+FFFD.
    """
    return text.ids.tobytes() if isinstance(text, Ids) else mended(text).encode()


def digest(data):
    """Bytes of a document -> 16 bytes: the first 8 identify the text, the last 8 the split."""
    return hashlib.blake2b(data, digest_size=16).digest()


def in_val(digests, val_fraction):
    """uint64 (n, 2) digests -> bool (n,). The same text is in the same split in every data set."""
    return digests[:, 1] < np.uint64(int(val_fraction * 2**64))


def from_texts(make_texts):
    """`documents` for write_dataset from a function that returns an iterable of (text, split).

    A position is the number of documents read. A resume calls the function again and skips those.
    """
    def documents(position):
        done = position or 0
        for n, (text, split) in enumerate(make_texts(), 1):
            if n > done:
                yield text, split, n

    return documents


# --------------------------------------------------------------------------------------------------
# documents -> chunks


class Entry(NamedTuple):
    """A document of the input on its way into a chunk."""
    data: object  # its bytes, or None for a bad line, or BAD_FILE
    split: str  # "train", "val", or None: by hash
    for_worker: object  # what a worker gets: the UTF-8 bytes, or Ids


class Chunk(NamedTuple):
    """Consecutive documents, which are tokenised and committed together."""
    rows: np.ndarray  # writer.ROW, one for each document; KEPT is what a filter may still drop
    texts: list  # of the KEPT rows, for the workers
    position: object  # where the documents after this chunk begin
    samples: list  # [(row, what to show of a dropped document)]
    left_out: list  # [(row, {what: how much}) of Ids before or in that row]


def read_chunks(documents, position, seen, val_fraction, fraction=1.0):
    """Yields the documents from `position` on as Chunks. seen: the Seen texts before `position`.

    Only the sizes of the documents decide where a chunk ends, so a resumed run makes the same ones.
    """
    entries, left_out, size = [], [], 0
    for text, split, position in documents(position):  # noqa: B020
        if isinstance(text, Ids) and text.left_out:
            left_out.append((len(entries), text.left_out))
        if isinstance(text, Ids) and not len(text.ids):
            continue
        if isinstance(text, str) and text.isspace():
            text = ""
        if text is None or text is BAD_FILE:
            entries.append(Entry(text, split, None))
        else:
            data = utf8(text)
            entries.append(Entry(data, split, text if isinstance(text, Ids) else data))
            size += len(data)
        if size >= CHUNK_BYTES or len(entries) >= CHUNK_ROWS:
            yield make_chunk(entries, left_out, position, seen, val_fraction, fraction)
            entries, left_out, size = [], [], 0
    yield make_chunk(entries, left_out, position, seen, val_fraction, fraction)


def kind_of(data):
    """What an entry holds -> its kind (writer.KINDS) before anything is known about its text."""
    if data is None:
        return writer.BAD_LINE
    if data is BAD_FILE:
        return writer.BAD_FILE
    return writer.KEPT if data else writer.EMPTY


def make_chunk(entries, left_out, position, seen, val_fraction, fraction):
    """Entries -> Chunk whose texts are those inside `fraction` and not seen before."""
    rows = np.zeros(len(entries), writer.ROW)
    rows["kind"] = [kind_of(entry.data) for entry in entries]
    there = np.flatnonzero(rows["kind"] == writer.KEPT)
    digests = b"".join(digest(entries[row].data) for row in there)
    digests = np.frombuffer(digests, "<u8").reshape(-1, 2)
    rows["digest"][there] = digests[:, 0]
    for row, by_hash in zip(there, in_val(digests, val_fraction)):
        split = entries[row].split
        rows["is_val"][row] = split == "val" if split else by_hash
    # The other half of the digest chooses the split, so each split keeps the same fraction. A hash
    # inside 1 % is inside 5 % too.
    outside = digests[:, 0] > np.uint64(int(fraction * 2**64) - 1)
    rows["kind"][there[outside]] = writer.OUTSIDE
    there = there[~outside]
    fresh = seen.add(digests[~outside, 0])
    rows["kind"][there[~fresh]] = writer.DUPLICATE
    texts = [entries[row].for_worker for row in there[fresh]]
    for row, text in zip(there[fresh], texts):
        if not isinstance(text, Ids):
            rows["replaced"][row] = text.count("\ufffd".encode())
    return Chunk(rows, texts, position, [], left_out)


def settle(chunk, judged):
    """Enters what became of a chunk's texts (workers.Judged) into its rows -> what commit() takes.

    That is (Chunk with its samples, ids of the kept rows, their bands).
    """
    at = np.flatnonzero(chunk.rows["kind"] == writer.KEPT)
    chunk.rows["kind"][at] = judged.kinds
    chunk.rows["tokens"][at] = judged.tokens
    chunk.rows["bytes"][at] = judged.bytes
    chunk.rows["replaced"][chunk.rows["kind"] != writer.KEPT] = 0
    samples = [(int(at[number]), sample) for number, sample in judged.samples]
    return chunk._replace(samples=samples), judged.ids, judged.bands


# --------------------------------------------------------------------------------------------------
# the tokenizer


def training_sample(documents, val_fraction, first_bytes=0, filters=None,
                    show=lambda n_bytes: None):
    """Documents -> iterator over a sample of distinct texts, about SAMPLE_BYTES, to train a BPE on.

    Neither val documents nor those that the filters drop are in it. The sample is every text whose
    hash is below a limit. The limit is halved whenever the sample is too large, so the order of the
    input does not matter. first_bytes: read no more train text than this (where reading is a
    download); 0: all. show: is called with the bytes read so far.
    """
    limit = 2**64
    kept = {}  # hash: UTF-8
    n_bytes = n_read = 0
    for text, split, _ in documents(None):
        if first_bytes and n_read >= first_bytes:
            break
        data = utf8(text) if isinstance(text, str) else b""
        if split != "val":
            n_read += len(data)
        show(n_read)
        key = np.frombuffer(digest(data), "<u8")[None]
        rank = int(key[0, 0])
        if not data.strip() or rank >= limit or rank in kept:
            continue
        if split == "val" or split is None and in_val(key, val_fraction)[0]:
            continue
        if filters and filters.judge(data.decode())[0]:
            continue
        kept[rank] = data
        n_bytes += len(data)
        while n_bytes > SAMPLE_BYTES and len(kept) > 1:
            limit //= 2
            kept = {rank: data for rank, data in kept.items() if rank < limit}
            n_bytes = sum(map(len, kept.values()))
    return (kept[rank].decode() for rank in sorted(kept))


def asked_vocabulary(spec):
    """"bpe:N" -> (N, False), "bpe:<=N" -> (N, True), any other tokenizer -> (0, False)."""
    if not spec.startswith("bpe:"):
        return 0, False
    size = spec.removeprefix("bpe:").removeprefix("<=")
    if not size.isdecimal():
        raise DataError(f"tokenizer {spec}: expected bpe:N with the size of the vocabulary, such "
                        "as bpe:16000")
    call_tokenizer(check_vocab_size, int(size))
    return int(size), spec.startswith("bpe:<=")


def make_tokenizer(spec, sample, out_dir, val_fraction, state, sample_bytes=0, filters=None):
    """The tokenizer of `out_dir`: the first call loads or trains it and saves it there.

    sample: (documents, bytes of them, for the bar) to train on. sample_bytes: as first_bytes of
    training_sample.
    """
    vocab_size, at_most = asked_vocabulary(spec)
    if not vocab_size:
        return save_tokenizer(call_tokenizer(Tokenizer.load, spec), spec, out_dir, state)
    if os.path.isdir(os.path.join(out_dir, "tokenizer")):
        return save_tokenizer(None, spec, out_dir, state)
    part = f"the first {sample_bytes:,} bytes" if sample_bytes else "a sample"
    size = f"up to {vocab_size}" if at_most else vocab_size
    print(f"training a vocabulary of {size} on {part} of the text", flush=True)
    show = progress(int(sample[1]), 0, "bytes", "looking for a sample: ")
    texts = training_sample(sample[0], val_fraction, sample_bytes, filters, show)
    try:
        tok = call_tokenizer(Tokenizer.train, texts, vocab_size, at_most)
    except DataError as error:
        kept_by = filters.names if filters else ()
        rules = f". It is what these rules keep: {', '.join(kept_by)}" if kept_by else ""
        raise DataError(f"{error}{rules}") from None
    return save_tokenizer(tok, spec, out_dir, state)


def save_tokenizer(tok, spec, out_dir, state):
    """Saves `tok` as out_dir/tokenizer if there is none -> the saved one, for all that follows.

    tok None: it was trained and saved by an earlier call. DataError if the saved one is another.
    """
    folder = os.path.join(out_dir, "tokenizer")
    if not os.path.isdir(folder):
        with writing(out_dir):
            shutil.rmtree(folder + ".tmp", ignore_errors=True)
            tok.save(folder + ".tmp")
            os.replace(folder + ".tmp", folder)
    saved = call_tokenizer(Tokenizer.load, folder)
    begun_with = state.setdefault("fingerprint", saved.fingerprint)
    if saved.fingerprint != begun_with or tok and tok.fingerprint != saved.fingerprint:
        raise DataError(f"{out_dir} was begun with another tokenizer than {spec} is now: use "
                        "another --out_dir, or start over after " + bins.removal(out_dir))
    return saved


def call_tokenizer(function, *args):
    """function(*args); a ValueError or OSError of data/tokenizer.py becomes a DataError."""
    try:
        return function(*args)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from None


def dtype_of(tok):
    """numpy dtype of the bins for a tokenizer."""
    return np.dtype("<u2" if tok.n_vocab <= 65536 else "<u4")


# --------------------------------------------------------------------------------------------------
# documents in, bins out


def write_dataset(documents, out_dir, tokenizer, val_fraction=0.005, max_tokens=0, num_proc=0,
                  settings=None, input_bytes=0, source="", licence="", shard_tokens=2**31,
                  input_tokens=0, max_bytes=0, fraction=1.0, max_disk_gb=0.0, sample_bytes=0,
                  filters=None, sample=None):
    """Writes or completes the bins of `documents` in `out_dir`; returns a summary dict.

    documents(position) yields (document, split, position after it), from the start for None. A
    document is a text or Ids, None for a line skipped as bad, BAD_FILE for the rest of a damaged
    file. split is "train", "val" or None (by hash). A position is any JSON value.

    tokenizer: "byte", "bpe:N", "bpe:<=N" (as many ids as the text is enough for), a published name
    or a folder. num_proc=0: all cores up to 8.
    settings: whatever else decides the documents; a folder begun with other settings is refused.
    With "shard" among them the folder becomes one part for data/merge.py. input_bytes: expected
    text, for the bar and the disk check; input_tokens: the same where documents are Ids. filters:
    which documents are dropped (data/filters.py). sample: (documents, bytes) that a bpe:N
    vocabulary is trained on, if not `documents`; sample_bytes: only on the first so many bytes of
    train text, 0: on all.

    Budgets, 0 for none: max_tokens, max_bytes of UTF-8 text, max_disk_gb of out_dir; see
    writer.within_budget. fraction keeps the documents whose hash is below it: all is read, a small
    fraction is a subset of a larger one, and the vocabulary is the same for all of them.

    Raises DataError, OSError.
    """
    start_s = time.perf_counter()
    check_numbers(val_fraction, fraction, max_tokens, max_bytes, max_disk_gb, num_proc)
    asked_vocabulary(tokenizer)  # refused before the folder is made
    settings = {**(settings or {}), "tokenizer": tokenizer, "val_fraction": val_fraction,
                "max_tokens": max_tokens, "shard_tokens": shard_tokens}
    budgets = {"max_bytes": max_bytes, "fraction": fraction if fraction < 1 else 0,
               "max_disk_gb": max_disk_gb}
    settings |= {name: value for name, value in budgets.items() if value}
    settings |= filters.settings if filters else {}
    with writer.locked(out_dir) as out_dir:
        with writing(out_dir):
            as_json = json.loads(json.dumps(settings))  # how they come back from progress.json
            state = writer.load_state(out_dir, as_json, filters.names if filters else ())
        if state is None:
            kept = [bins.load_finished(out_dir).get(name) for name in ("source", "licence")]
            note = "" if kept == [source, licence] else (
                f"; its source stays {kept[0]!r} and its licence {kept[1]!r}")
            print(f"{out_dir} is already complete, made with the same settings{note}", flush=True)
            return summary(out_dir, time.perf_counter() - start_s)
        sample = sample or (documents, sample_bytes or input_bytes)
        tok = make_tokenizer(tokenizer, sample, out_dir, val_fraction, state, sample_bytes, filters)
        dtype, unit = dtype_of(tok), "tokens" if input_tokens else "bytes"

        # How much will be written. A token is usually 4 bytes of text, and hardly ever less than 3.
        budget_tokens = smallest(max_tokens, max_disk_gb * 1e9 / dtype.itemsize)
        usual, least = (1, 1) if tokenizer == "byte" or input_tokens else (4, 3)
        expected = smallest((input_tokens or input_bytes) * fraction, max_bytes,
                            budget_tokens * usual)
        check_disk(out_dir, smallest(budget_tokens, expected / least) * dtype.itemsize
                   - writer.written_bytes(state, dtype.itemsize))

        with writing(out_dir):
            writer.open_bins(out_dir, state, dtype)
            seen = seen_texts(out_dir, state)
        before = sum(state[unit].values())
        tokenizer_s = time.perf_counter() - start_s
        chunks = read_chunks(documents, state["position"], seen, val_fraction, fraction)
        judged = judge_chunks(chunks, (tok, dtype, filters), num_proc or min(8, os.cpu_count()))
        write_chunks(out_dir, state, (settle(*result) for result in judged), tok, dtype,
                     progress(int(expected), before, unit), unit,
                     {"source": source, "licence": licence})
        n_bytes = 0 if input_tokens else sum(state["bytes"].values()) - before
        return summary(out_dir, time.perf_counter() - start_s, tokenizer_s, n_bytes)


def write_chunks(out_dir, state, settled, tok, dtype, show, unit, about):
    """Commits (Chunk, ids of its kept rows, their bands) in the order of the input, then finishes.

    show: progress(), in `unit` (bytes or tokens). about: source and licence, for meta.json.
    """
    n_bands, near = state["settings"].get("minhash", [0])[0], None
    if n_bands and "shard" not in state["settings"]:  # of shards, only merge sees all documents
        with writing(out_dir):
            near = NearDuplicates(out_dir, state, tok, dtype, n_bands)
    while not state["full"]:
        result = next(settled, None)
        if result is None:
            break
        with writing(out_dir):
            commit(out_dir, state, *(near(*result) if near else result))
        show(sum(state[unit].values()))
    settled.close()  # ends the workers when a budget stopped the loop
    command = shlex.join(["python", *sys.argv])
    with writing(out_dir):
        finish(out_dir, state, tok, dtype, {**about, "command": command})


# --------------------------------------------------------------------------------------------------
# checks, progress and messages


def check_numbers(val_fraction, fraction, max_tokens, max_bytes, max_disk_gb, num_proc):
    """Raises DataError for a number outside its range; NaN and infinity are outside too."""
    limits = (max_tokens, max_bytes, max_disk_gb, num_proc)
    fine = all(0 <= limit < 2**53 for limit in limits)
    if not fine or not 0 <= val_fraction < 1 or not 1e-9 <= fraction <= 1:
        raise DataError(f"val_fraction = {val_fraction}, fraction = {fraction}, max_tokens = "
                        f"{max_tokens}, max_bytes = {max_bytes}, max_disk_gb = {max_disk_gb}, "
                        f"num_proc = {num_proc}: expected 0 <= val_fraction < 1, 0 < fraction <= 1 "
                        "and no negative number")


def smallest(*limits):
    """The smallest of some limits, where 0 means no limit; 0 if there is none."""
    return min(filter(None, limits), default=0)


def check_disk(out_dir, need):
    """Raises DataError when the disk of `out_dir` has less room than `need` bytes."""
    free = shutil.disk_usage(out_dir).free
    if need > free:
        raise DataError(f"{out_dir}: about {need / 1e9:.2f} GB of token ids to write and "
                        f"{free / 1e9:.2f} GB free. Make room, use another --out_dir, or write "
                        "less with --max_disk_gb, --max_bytes or --max_tokens")


@contextlib.contextmanager
def writing(out_dir):
    """A full disk, or any other OSError while writing, becomes one message (DataError)."""
    try:
        yield
    except OSError as error:
        what = error.strerror or f"no space left ({error})"  # numpy's has no number and no reason
        raise DataError(f"{out_dir}: {what} while writing. What was committed is kept: make room, "
                        "and the same command goes on from there") from None


def progress(total, start, unit, what_for=""):
    """-> show(done): moves a bar on a terminal, else prints a line every 10 s.

    total, start, done: bytes of text or tokens, as `unit` says; total 0: unknown.
    """
    short, what = {"bytes": ("B", "B of text"), "tokens": ("tok", " tokens")}[unit]
    bar = tqdm(desc=what_for or None, total=total or None, initial=start, unit=short,
               unit_scale=True, disable=None)  # None: disabled where stderr is no terminal
    began = last = time.monotonic()

    def show(done):
        nonlocal last
        now = time.monotonic()
        bar.update(done - bar.n)
        if bar.disable and now - last > 10:
            rate, last = (done - start) / (now - began), now
            left = ""
            if total and done - start > 0.01 * (total - start):  # too early to tell before
                left = f", about {max(0, total - done) / rate / 60:.0f} min left"
            print(f"{what_for}{done / 1e6:,.0f} M{what}, {rate / 1e6:.1f} M{short}/s{left}",
                  file=sys.stderr, flush=True)

    return show


def summary(out_dir, seconds, tokenizer_s=0.0, n_bytes=0):
    """The JSON line of a prepare. mb_per_s: UTF-8 text, without the time to make the tokenizer."""
    meta = bins.load_finished(out_dir)
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    rate = n_bytes / 1e6 / (seconds - tokenizer_s)
    return {"out_dir": out_dir, "train_tokens": train["tokens"], "val_tokens": val["tokens"],
            "documents": train["documents"] + val["documents"],
            "bytes": train["bytes"] + val["bytes"],
            **{name: meta.get(name, 0) for name in writer.DROPPED},
            **{name: meta[name] for name in (*LEFT_OUT, "dropped") if name in meta},
            "n_vocab": meta["n_vocab"], "unigram_entropy": meta["unigram_entropy"],
            "stopped_by": meta.get("stopped_by"), "seconds": round(seconds, 2),
            "tokenizer_seconds": round(tokenizer_s, 2),
            "mb_per_s": round(rate, 2) if n_bytes else None}


@contextlib.contextmanager
def one_message():
    """For commands: DataError, OSError, Ctrl-C and SIGTERM become one message and exit code 1."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):  # a background job starts with SIGINT ignored
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("stopped by a signal: what was finished is kept, the same command goes on from "
                 "there")
    except (DataError, OSError) as error:
        sys.exit(str(error))
