"""Documents -> token bins: duplicates, the train/val split, the vocabulary, tokenising in several processes.

`write_dataset` is what prepare.py and data/NAME/prepare.py call; workers.py judges and tokenises, bins.py puts the ids
on disk. A text seen before is dropped, and one that shares a MinHash band with an earlier one; a hash of the text
chooses train or val, so the split knows neither order nor processes. Order in is order out.
Memory does not grow with the input: seen.py.
"""

import collections
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import time

import numpy as np
from tqdm import tqdm

from data import bins
from data.bins import (
    DROPPED,
    DataError,
    commit,
    finish,
    load_meta,
    load_state,
    locked,
    open_bins,
    removal,
    written_bytes,
)
from data.duplicates import NearDuplicates, seen_texts
from data.tokenizer import Tokenizer
from data.workers import Ids, judge_chunks

CHUNK_BYTES = 4_000_000  # of UTF-8 text: what one process tokenises at a time; a kill loses one such chunk a process
LEFT_OUT = ("padding_tokens", "documents_cut")  # of documents that come as Ids
CHUNK_ROWS = 50_000  # documents in a chunk at most
SAMPLE_BYTES = 64_000_000  # of text that a bpe:N vocabulary is trained on
BAD_FILE = object()  # in place of a text: the rest of a damaged file, skipped


def utf8(text):
    """Text -> its UTF-8 bytes; half a surrogate pair, which JSON can hold, becomes U+FFFD as in tokenizer.py.

    Ids -> four bytes each, whatever file they come from.
    """
    if isinstance(text, Ids):
        return text.ids.tobytes()
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def digest(data):
    """UTF-8 bytes of a document -> 16 bytes: the first 8 tell texts apart, the last 8 choose the split."""
    return hashlib.blake2b(data, digest_size=16).digest()


def in_val(digests, val_fraction):
    """uint64 (n, 2) digests -> bool (n,): the same share `val_fraction` of all possible texts for ever."""
    return digests[:, 1] < np.uint64(int(val_fraction * 2**64))


def from_texts(make_texts):
    """`documents` for write_dataset from a function that returns an iterable of (text, split or None) each time."""
    return lambda start: ((*unit, n) for n, unit in enumerate(make_texts(), 1) if n > (start or 0))


def training_sample(documents, val_fraction, first_bytes=0, filters=None, show=lambda n_bytes: None):
    """Up to SAMPLE_BYTES of distinct train documents, chosen by hash over the whole input -> iterator of texts.

    A share 2**-k of all texts is kept, and k rises whenever that is too much, so the order of the input is irrelevant.
    first_bytes: read no more than so many bytes of train text (where reading is a download); 0: all. show: is told the
    bytes read so far.
    """
    limit, kept, n_bytes, n_read = 2**64, {}, 0, 0
    for text, split, _ in documents(None):
        if first_bytes and n_read >= first_bytes:
            break
        data = utf8(text) if isinstance(text, str) else b""
        n_read += len(data) * (split != "val")
        show(n_read)
        key = np.frombuffer(digest(data), "<u8")[None]
        rank = int(key[0, 0])
        if not data.strip() or rank >= limit or rank in kept:
            continue
        if split == "val" or split is None and in_val(key, val_fraction)[0]:
            continue  # the vocabulary knows nothing of val either
        if filters and filters.judge(data.decode())[0]:
            continue  # nor of what is dropped
        kept[rank] = data
        n_bytes += len(data)
        while n_bytes > SAMPLE_BYTES and len(kept) > 1:
            limit //= 2
            kept = {rank: data for rank, data in kept.items() if rank < limit}
            n_bytes = sum(map(len, kept.values()))
    return (kept[rank].decode() for rank in sorted(kept))


# ---------------------------------------------------------------------------------------------------------------------
# chunks

Chunk = collections.namedtuple("Chunk", "rows texts position samples left_out")


def read_chunks(documents, position, seen, val_fraction, fraction=1.0):
    """Documents from `position` on -> Chunks, cut by size alone, so always at the same places."""
    entries, left_out, size = [], [], 0
    for text, split, position in documents(position):  # noqa: B020
        if isinstance(text, Ids):
            left_out += [(len(entries), text.left_out)] if text.left_out else []
            if not len(text.ids):
                continue
        elif isinstance(text, str) and text.isspace():
            text = ""
        data = text if text is None or text is BAD_FILE else utf8(text)
        entries.append((data, split, text if isinstance(text, Ids) else data))
        size += len(data) if isinstance(data, bytes) else 0
        if size >= CHUNK_BYTES or len(entries) >= CHUNK_ROWS:
            yield make_chunk(entries, left_out, position, seen, val_fraction, fraction)
            entries, left_out, size = [], [], 0
    yield make_chunk(entries, left_out, position, seen, val_fraction, fraction)


def make_chunk(entries, left_out, position, seen, val_fraction, fraction):
    """[(UTF-8, None or BAD_FILE; split; what a worker gets)] -> Chunk whose texts are those not seen before.

    rows: ROW, one for each entry; KEPT is what a filter may still drop.
    """
    rows, kind_of = np.zeros(len(entries), bins.ROW), {None: bins.BAD_LINE, BAD_FILE: bins.BAD_FILE, b"": bins.EMPTY}
    rows["kind"] = [bins.KEPT if isinstance(data, bytes) and data else kind_of[data] for data, _, _ in entries]
    there = np.flatnonzero(rows["kind"] == bins.KEPT)
    digests = np.frombuffer(b"".join(digest(entries[row][0]) for row in there), "<u8").reshape(-1, 2)
    rows["digest"][there] = digests[:, 0]
    rows["is_val"][there] = [entries[row][1] == "val" if entries[row][1] else hashed
                             for row, hashed in zip(there, in_val(digests, val_fraction))]
    outside = digests[:, 0] > np.uint64(int(fraction * 2**64) - 1)  # 1 % is within 5 %, in any order, in both splits
    rows["kind"][there[outside]] = bins.OUTSIDE
    there = there[~outside]
    fresh = seen.add(digests[~outside, 0])
    rows["kind"][there[~fresh]] = bins.DUPLICATE
    texts = [entries[row][2] for row in there[fresh]]
    rows["replaced"][there[fresh]] = [0 if isinstance(text, Ids) else text.count("\ufffd".encode()) for text in texts]
    return Chunk(rows, texts, position, [], left_out)


def settle(chunk, judged):
    """A Chunk and what became of its texts -> (the Chunk with all of it in its rows and samples, ids, bands)."""
    at = np.flatnonzero(chunk.rows["kind"] == bins.KEPT)
    for name, values in (("kind", judged.kinds), ("tokens", judged.tokens), ("bytes", judged.bytes)):
        chunk.rows[name][at] = values
    chunk.rows["replaced"][chunk.rows["kind"] != bins.KEPT] = 0
    samples = [(int(at[number]), sample) for number, sample in judged.samples]
    return chunk._replace(samples=samples), judged.ids, judged.bands


# ---------------------------------------------------------------------------------------------------------------------
# text in, bins out


def write_dataset(documents, out_dir, tokenizer, val_fraction=0.005, max_tokens=0, num_proc=0, settings=None,
                  input_bytes=0, source="", licence="", shard_tokens=2**31, input_tokens=0, max_bytes=0, fraction=1.0,
                  max_disk_gb=0.0, sample_bytes=0, filters=None, sample=None):
    """Writes or completes the bins of `documents` in `out_dir`; returns a summary dict. Raises DataError, OSError.

    documents(position) yields (text or Ids, split, position after it), from the start for None; None for a line
    skipped as bad, BAD_FILE for the rest of a damaged file, split is "train", "val" or None (by hash), position a JSON
    value. tokenizer: "byte", "bpe:N", a published name or a folder. num_proc=0: all cores up to 8. `settings`: whatever
    else decides the documents; a folder begun with other settings is refused; with "shard" among them it is made a part
    for parts.py. input_bytes: expected text, for the bar and the disk; input_tokens: the same for documents that are
    Ids. filters: which documents are dropped (filters.py). sample: (documents, bytes) that a bpe:N vocabulary is
    trained on, if not `documents`; sample_bytes: on the first so many bytes of train text; 0: on all.

    Budgets, 0 for none: max_tokens, max_bytes of UTF-8 text, max_disk_gb of out_dir; bins.within_budget says where they
    stop. fraction keeps the documents whose hash is below it: all is read, a small fraction is within a larger one,
    whatever the order, and the vocabulary is the same for all of them.
    """
    start_s = time.perf_counter()
    limits = (max_tokens, max_bytes, max_disk_gb, num_proc)
    if not 0 <= val_fraction < 1 or not 1e-9 <= fraction <= 1 or not all(0 <= limit < 2**53 for limit in limits):
        raise DataError(f"val_fraction = {val_fraction}, fraction = {fraction}, max_tokens = {max_tokens}, max_bytes = "
                        f"{max_bytes}, max_disk_gb = {max_disk_gb}, num_proc = {num_proc}: expected 0 <= val_fraction "
                        "< 1, 0 < fraction <= 1 and no negative number")
    budgets = {"max_bytes": max_bytes, "fraction": fraction if fraction < 1 else 0, "max_disk_gb": max_disk_gb}
    settings = dict(settings or {}, tokenizer=tokenizer, val_fraction=val_fraction, max_tokens=max_tokens,
                    shard_tokens=shard_tokens, **{name: value for name, value in budgets.items() if value},
                    **(filters.settings if filters else {}))
    with locked(out_dir):
        with writing(out_dir):
            state = load_state(out_dir, json.loads(json.dumps(settings)), filters.names if filters else ())
        if state is None:
            print(f"{out_dir} is already complete, made with the same settings", flush=True)
            return summary(out_dir, time.perf_counter() - start_s)
        sample = sample or (documents, sample_bytes or input_bytes)
        tok = make_tokenizer(tokenizer, sample, out_dir, val_fraction, state, sample_bytes, filters)
        dtype, unit = dtype_of(tok), "tokens" if input_tokens else "bytes"
        before, budget = sum(state[unit].values()), smallest(max_tokens, max_disk_gb * 1e9 / dtype.itemsize)  # tokens
        usual, least = (1, 1) if tokenizer == "byte" or input_tokens else (4, 3)  # bytes of text a token
        expected = smallest((input_tokens or input_bytes) * fraction, max_bytes, budget * usual)
        check_disk(out_dir, smallest(budget, expected / least) * dtype.itemsize - written_bytes(state, dtype.itemsize))
        with writing(out_dir):
            open_bins(out_dir, state, dtype)
            chunks = read_chunks(documents, state["position"], seen_texts(out_dir, state), val_fraction, fraction)
        tokenizer_s = time.perf_counter() - start_s
        judged = judge_chunks(chunks, (tok, dtype, filters), num_proc or min(8, os.cpu_count()))
        write_chunks(out_dir, state, (settle(*result) for result in judged), tok, dtype,
                     progress(int(expected), before, unit), unit, {"source": source, "licence": licence})
        n_bytes = 0 if input_tokens else sum(state["bytes"].values()) - before
        return summary(out_dir, time.perf_counter() - start_s, tokenizer_s, n_bytes)


def write_chunks(out_dir, state, settled, tok, dtype, show, unit, about):
    """Commits what comes of (Chunk, ids of its kept rows, their bands), in the order of the input; then finishes."""
    n_bands, near = state["settings"].get("minhash", [0])[0], None
    if n_bands and "shard" not in state["settings"]:
        with writing(out_dir):
            near = NearDuplicates(out_dir, state, tok, dtype, n_bands)
    while not state["full"] and (result := next(settled, None)):
        with writing(out_dir):
            commit(out_dir, state, *(near(*result) if near else result))
        show(sum(state[unit].values()))
    settled.close()
    with writing(out_dir):
        finish(out_dir, state, tok, dtype, {**about, "command": shlex.join(["python", *sys.argv])})


def dtype_of(tok):
    """numpy dtype of the bins for a tokenizer."""
    return np.dtype("<u2" if tok.n_vocab <= 65536 else "<u4")


def smallest(*limits):
    """The smallest of some limits of which 0 stands for none; 0 where there is none."""
    return min(filter(None, limits), default=0)


@contextlib.contextmanager
def writing(out_dir):
    """A full disk, or any other refusal to write, becomes one message."""
    try:
        yield
    except OSError as error:
        what = error.strerror or f"no space left ({error})"  # numpy gives no number
        raise DataError(f"{out_dir}: {what} while writing. What was committed is kept: make room, and the same command "
                        "goes on from there") from None


def make_tokenizer(spec, sample, out_dir, val_fraction, state, sample_bytes=0, filters=None):
    """The tokenizer of `out_dir`, which the first call trains or loads and saves there."""
    folder = os.path.join(out_dir, "tokenizer")
    vocab_size = spec.removeprefix("bpe:")
    if vocab_size != spec and not vocab_size.isdigit():
        raise DataError(f"tokenizer {spec}: expected bpe:N with the size of the vocabulary, such as bpe:16000")
    if vocab_size == spec:
        tok = call_tokenizer(Tokenizer.load, spec)
    elif not os.path.isdir(folder):
        part = f"the first {sample_bytes:,} bytes" if sample_bytes else "a sample"
        print(f"training a vocabulary of {vocab_size} on {part} of the text", flush=True)
        show = progress(int(sample[1]), 0, "bytes", "looking for a sample: ")
        sample = training_sample(sample[0], val_fraction, sample_bytes, filters, show)
        try:
            tok = call_tokenizer(Tokenizer.train, sample, int(vocab_size))
        except DataError as error:
            rules = f". It is what these rules keep: {', '.join(filters.names)}" if filters and filters.names else ""
            raise DataError(f"{error}{rules}") from None
    return save_tokenizer(tok if vocab_size == spec or not os.path.isdir(folder) else None, spec, out_dir, state)


def save_tokenizer(tok, spec, out_dir, state):
    """The tokenizer in `out_dir`, which is `tok` if it is not None."""
    folder = os.path.join(out_dir, "tokenizer")
    if not os.path.isdir(folder):
        with writing(out_dir):
            shutil.rmtree(folder + ".tmp", ignore_errors=True)
            tok.save(folder + ".tmp")
            os.replace(folder + ".tmp", folder)
    saved = call_tokenizer(Tokenizer.load, folder)
    if len({saved.fingerprint, state.setdefault("fingerprint", saved.fingerprint), (tok or saved).fingerprint}) > 1:
        raise DataError(f"{out_dir} was begun with another tokenizer than {spec} is now: use another --out_dir, or "
                        f"start over after {removal(out_dir)}")
    return saved


def call_tokenizer(function, *args):
    """function(*args); what tokenizer.py finds wrong with a name, folder or vocabulary size becomes a DataError."""
    try:
        return function(*args)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from None


def check_disk(out_dir, need):
    """DataError when the disk of `out_dir` has less room than `need` bytes."""
    free = shutil.disk_usage(out_dir).free
    if need > free:
        raise DataError(f"{out_dir}: about {need / 1e9:.2f} GB of token ids to write and {free / 1e9:.2f} GB free. "
                        "Make room, use another --out_dir, or write less with --max_disk_gb, --max_bytes or "
                        "--max_tokens")


def progress(total, start, unit, what_for=""):
    """A function to call with the bytes of text or tokens done: moves a bar on a terminal, else prints every 10 s."""
    short, what = {"bytes": ("B", "B of text"), "tokens": ("tok", " tokens")}[unit]
    bar = tqdm(desc=what_for or None, total=total or None, initial=start, unit=short, unit_scale=True, disable=None)
    began = last = time.monotonic()

    def show(done):
        nonlocal last
        now = time.monotonic()
        bar.update(done - bar.n)
        if bar.disable and now - last > 10:
            rate, last = (done - start) / (now - began), now
            left = f", about {max(0, total - done) / rate / 60:.0f} min left" if total else ""
            print(f"{what_for}{done / 1e6:,.0f} M{what}, {rate / 1e6:.1f} M{short}/s{left}", file=sys.stderr,
                  flush=True)

    return show


def summary(out_dir, seconds, tokenizer_s=0.0, n_bytes=0):
    """The JSON line of a prepare; mb_per_s counts UTF-8 text, without the time to make the tokenizer."""
    meta = load_meta(out_dir, "meta.json" if os.path.exists(os.path.join(out_dir, "meta.json")) else "shard.json")
    splits, rate = meta["splits"], n_bytes / 1e6 / (seconds - tokenizer_s)
    both = {name: splits["train"][name] + splits["val"][name] for name in ("documents", "bytes")}
    counts = {name: meta.get(name, 0) for name in DROPPED}
    counts |= {name: meta[name] for name in (*LEFT_OUT, "dropped") if name in meta}
    return {"out_dir": out_dir, "train_tokens": splits["train"]["tokens"], "val_tokens": splits["val"]["tokens"],
            **both, **counts, "n_vocab": meta["n_vocab"], "unigram_entropy": meta["unigram_entropy"],
            "stopped_by": meta.get("stopped_by"), "seconds": round(seconds, 2),
            "tokenizer_seconds": round(tokenizer_s, 2),
            "mb_per_s": round(rate, 2) if n_bytes else None}


@contextlib.contextmanager
def one_message():
    """For scripts: a user's mistake, Ctrl-C and SIGTERM end in one message on stderr and exit code 1."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: a background job starts with it ignored
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("stopped by a signal: what was finished is kept, the same command goes on from there")
    except (DataError, OSError) as error:
        sys.exit(str(error))
