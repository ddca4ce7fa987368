"""Texts as vectors: how what a model has read becomes one vector, and a file of texts becomes one matrix on disk.

sample.py --embed writes them, eval.py --sts measures what they are worth, both from here:

    max        largest of each number over the concepts (a Transformer's: over its tokens); the default with concepts
    concepts   all concepts side by side, concept c of one text beside concept c of another: n_concept times as wide
    mean       mean token state; a Transformer's default

Zero-shot on STS-B the maximum correlates with people best for its width, and a mean over the concepts loses what they
hold: most own no word of a short text, are constants, and outvote the others (records/efficiency). A row is the tokens
of a text and nothing else: marks of the document's end around it cost mean token states 0.03 there and gain nothing.
Only rows of equal length share a batch, so nothing is padded.

Shapes: B rows, T tokens, C concepts, D width, d token width, N texts.
"""

import codecs
import fcntl
import hashlib
import io
import json
import os
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.tokenizer import MAX_PRETOKEN
from lib.files import write_json

CHUNK_TEXTS, CHUNK_CHARS, CHUNK_NUMBERS = 4096, 1_000_000, 2**25  # what is in memory at once, and what a kill loses
SAY_EVERY = 10  # seconds between lines where there is no terminal to draw a bar on

# ---- states to vectors -------------------------------------------------------

POOL = {  # of ids (B,T), concepts (B,C,D), tokens (B,T,d) -> (B, width)
    "table": lambda model, ids, concepts, tokens: F.embedding(ids, model.table()).mean(1),
    "tokens": lambda model, ids, concepts, tokens: tokens.mean(1),
    "tokens, max": lambda model, ids, concepts, tokens: tokens.amax(1),
    "concepts": lambda model, ids, concepts, tokens: concepts.mean(1),
    "concepts, max": lambda model, ids, concepts, tokens: concepts.amax(1),
    "all concepts": lambda model, ids, concepts, tokens: concepts.flatten(1),
}
NAMES = {"concept": list(POOL), "transformer": ["table", "tokens", "tokens, max"]}
POOLINGS = {  # the ones worth writing to disk by their setting, the default first
    "concept": {"max": "concepts, max", "concepts": "all concepts", "mean": "tokens"},
    "transformer": {"mean": "tokens", "max": "tokens, max"},
}


def choose_pooling(pooling, arch):
    """ "auto" | max | concepts | mean -> (setting, key of POOL). Raises ValueError naming what there is."""
    known = POOLINGS[arch]
    if pooling != "auto" and pooling not in known:
        raise ValueError(f"pooling={pooling!r}: expected auto or, for arch={arch}, {', '.join(known)}")
    setting = next(iter(known)) if pooling == "auto" else pooling
    return setting, known[setting]


def rows_of(texts, tok, longest):
    """Texts -> (rows of up to `longest` ids, how many texts were cut). A text without a token is the row [eot]."""
    reach = longest * int(tok.n_bytes.max()) + 2 * MAX_PRETOKEN  # the tokens of a book are not needed to cut it
    rows = tok.encode([text[:reach] for text in texts])
    cut = sum(len(row) > longest for row in rows)
    return [row[:longest].astype(np.int64) if len(row) else np.array([tok.eot_id]) for row in rows], cut


def rows_at_once(model, T, batch_tokens):
    """Rows of T tokens in batch_tokens tokens, or concepts where a row has more: they cost what tokens cost."""
    return max(1, batch_tokens // max(T, getattr(model.cfg, "n_concept", 1)))


def batches(model, rows, batch_tokens):
    """Indices of rows, those of equal length together, in batches of up to batch_tokens tokens."""
    lengths = np.array([len(row) for row in rows])
    for T in np.unique(lengths):
        same, B = np.flatnonzero(lengths == T), rows_at_once(model, T, batch_tokens)
        yield from (same[i:i + B].tolist() for i in range(0, len(same), B))


@torch.no_grad()
def embed_rows(model, rows, names, batch_tokens, device):
    """Rows of ids -> {name of POOL: float32 (N, width) on the CPU}. Raises ValueError for what is not finite."""
    found = {}
    for index in batches(model, rows, batch_tokens):
        ids = torch.from_numpy(np.stack([rows[i] for i in index])).to(device)
        concepts, tokens = model.encode(ids)
        for name in names:
            vectors = POOL[name](model, ids, concepts, tokens).float().cpu()
            found.setdefault(name, torch.empty(len(rows), vectors.shape[1]))[index] = vectors
    if not all(torch.isfinite(vectors).all() for vectors in found.values()):
        raise ValueError("the encoder returns NaN or infinity: its weights are broken; train again or restore an "
                         "earlier checkpoint (ckpt_prev.pt)")
    return found


# ---- texts from a file -------------------------------------------------------

def read_texts(path, start=0):
    """Lines of a file, or the field "text" of each line of a .jsonl, from byte `start` on, one at a time.

    Yields (text, whether bytes were not UTF-8 and became U+FFFD, where the next line begins). Only \\n ends a line: the
    other characters at which str.splitlines cuts are text. Raises ValueError for a .jsonl line without a text.
    """
    with open(path, "rb") as file:
        file.seek(start)
        for number, line in enumerate(file, 1):
            data = line.rstrip(b"\r\n").removeprefix(b"" if start else codecs.BOM_UTF8)
            start += len(line)
            text = plain = data.decode("utf-8", "replace")
            if path.endswith(".jsonl"):
                try:
                    text = json.loads(plain)["text"]
                except (ValueError, LookupError, TypeError, RecursionError):
                    text = None
                if not isinstance(text, str):
                    raise ValueError(f"{path}, line {number}: found {plain[:60]!r}, expected a JSON object with a "
                                     'string in the field "text"; mend or remove the line')
            yield text, "\ufffd" in plain and plain.encode() != data, start


def survey(path):
    """(number of texts, sha256 of the file), after a first reading of all of it."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; expected one with a text a line, or .jsonl with a field \"text\"")
    sha256, n, last = hashlib.sha256(), 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
            n, last = n + block.count(b"\n"), block[-1:]
    n += last != b"\n"
    if not n:
        raise ValueError(f"{path} is empty; expected a text a line")
    if path.endswith(".jsonl"):
        for _ in read_texts(path):  # a bad line is named now, not after hours
            pass
    return n, sha256.hexdigest()


def sha256_of(weights):
    """{name: tensor} -> hex digest of names and bytes: which checkpoint it was."""
    sha256 = hashlib.sha256()
    for name, tensor in weights.items():
        sha256.update(name.encode())
        sha256.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def chunks(texts, most_texts):
    """Items of read_texts in lists, cut by their number and size alone: at the same places wherever reading began."""
    part, size = [], 0
    for item in texts:
        part.append(item)
        size += len(item[0])
        if len(part) >= most_texts or size >= CHUNK_CHARS:
            yield part
            part, size = [], 0
    if part:
        yield part


# ---- vectors to a file -------------------------------------------------------

def embed_file(path, to, embed, identity):
    """Embeds the texts of a file into `to`, a .npy of float32 (N, width) in their order -> what `to`.json says of it.

    embed(texts) -> (float32 (n, width), how many were cut), a function of these texts alone. identity: all that
    decides its result, as JSON. The matrix grows as `to`.tmp, each chunk on disk before `to`.json counts it, and gets
    its name when it is whole. Killed at any moment, the same call goes on and gives the same bytes; ValueError where
    the input or the identity is another one. Plain writes, no memory map: there a full disk is a crash, not an error,
    and all rows written count as this process's memory. np.load(to, mmap_mode="r") reads the result as a map.
    """
    n, sha256 = survey(path)
    width = embed([""])[0].shape[1]
    identity = identity | dict(texts=n, input_sha256=sha256, width=width)
    header = npy_header(n, width)
    state = load_state(to, identity) or dict(identity=identity, done=0, offset=0, cut=0, replaced=0)
    if state["done"] == n and os.path.exists(to):
        print(f"{to} is complete: {n:,} texts", flush=True)
        return state
    with open(to + ".tmp", "ab") as file:
        cut_back(file, to, len(header) + 4 * width * state["done"] if state["done"] else 0, len(header) + 4 * width * n)
        if state["done"]:
            print(f"going on after {state['done']:,} of {n:,} texts", flush=True)
        else:
            file.write(header)
            write_json(to + ".json", state)
        show, most_texts = progress(n, state["done"]), min(CHUNK_TEXTS, max(1, CHUNK_NUMBERS // width))
        for chunk in chunks(read_texts(path, state["offset"]), most_texts):
            vectors, cut = embed([text for text, *_ in chunk])
            file.write(np.ascontiguousarray(vectors, "<f4").data)
            file.flush()
            os.fsync(file.fileno())
            state |= dict(done=state["done"] + len(chunk), offset=chunk[-1][2], cut=state["cut"] + cut,
                          replaced=state["replaced"] + sum(replaced for _, replaced, _ in chunk))
            write_json(to + ".json", state)
            show(state["done"])
        if state["done"] != n:
            raise ValueError(f"{path} changed while it was read: {state['done']:,} texts now, {n:,} before. Run it "
                             f"again after rm {to}.tmp {to}.json")
        os.replace(to + ".tmp", to)
    return state


def npy_header(n, width):
    """What a .npy of float32 (n, width) begins with."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="<f4", fortran_order=False, shape=(n, width)))
    return header.getvalue()


def load_state(to, identity):
    """What `to`.json says of this job, None where nothing was done; ValueError where another job has done something."""
    made = next((path for path in (to + ".tmp", to) if os.path.exists(path) and os.path.getsize(path)), None)
    if not made:
        return None
    ways = f"give another --to, or remove it: rm {made} {to}.json"
    try:
        with open(to + ".json", encoding="utf-8") as file:
            state = json.load(file)
        before, done = state["identity"], state["done"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{made} exists, and no {to}.json says what it is; {ways}") from None
    if not done:
        return None
    changed = [f"{k} is {before.get(k)} there and {v} now" for k, v in identity.items() if before.get(k) != v]
    if changed:
        raise ValueError(f"{made} was made from something else: {'; '.join(changed)}; {ways}")
    return state


def cut_back(file, to, done_bytes, all_bytes):
    """Makes this process the only writer of `to`.tmp, cut to what `to`.json counts; ValueError where that cannot be.

    The kernel drops the lock when the process ends, however it ends.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing {to}; wait for it, or give another --to") from None
    if file.tell() < done_bytes:
        raise ValueError(f"{file.name} holds {file.tell():,} bytes, {to}.json says {done_bytes:,}: damaged. Start over "
                         f"after rm {file.name} {to}.json")
    file.truncate(done_bytes)
    free = shutil.disk_usage(os.path.dirname(to) or ".").free
    if free < all_bytes - done_bytes:
        raise ValueError(f"{to} needs {(all_bytes - done_bytes) / 2**20:,.0f} MiB more, {free / 2**20:,.0f} MiB are "
                         "free there; give another --to")


def progress(total, start):
    """A function to call with the texts done: moves a bar on a terminal, else prints a line every SAY_EVERY seconds."""
    bar, began = tqdm(total=total, initial=start, unit=" texts", disable=None), time.monotonic()
    last = began

    def show(done):
        nonlocal last
        now = time.monotonic()
        bar.update(done - bar.n)
        if bar.disable and (now - last > SAY_EVERY or done == total):
            rate, last = (done - start) / (now - began), now
            print(f"{done:,} of {total:,} texts, {rate:,.0f} a second", flush=True)
        if done == total:
            bar.close()
    return show
