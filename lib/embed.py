"""Text embeddings: pool a model's states into one vector per text, and embed a file into a matrix.

tools/sample.py --embed writes embeddings, tools/eval.py --sts measures their quality; both use
this module. The poolings:

    max           largest value of each number over the concepts (transformer: over the tokens);
                  the default of an open model
    concept_mean  mean concept; the default of a strict model
    concepts      all concepts side by side, n_concept times as wide; 0 for those that do not count
    mean          mean token state; the default of a transformer

The defaults correlate best with human scores on STS-B without fine-tuning, for their width; see
ConceptEncoder.pooled. Of anchored concepts only those that stand in the text count.

A row holds the tokens of its text and nothing else: end-of-document marks around it lower the
STS-B correlation of mean token states by 0.03. Only rows of equal length share a batch, so nothing
is padded.

Shapes: B rows, T tokens, C concepts, D width, d token width, N texts.
"""

import fcntl
import hashlib
import io
import itertools
import os
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.texts import read_lines
from data.tokenizer import MAX_PRETOKEN
from lib.files import file_hash, read_json, write_json
from lib.health import check_finite

# A file is embedded in chunks. One chunk is in memory at a time, and a kill loses at most one.
CHUNK_TEXTS = 4096  # most texts
CHUNK_CHARS = 1_000_000  # most characters, but for the last text
CHUNK_NUMBERS = 2**25  # most numbers in their vectors
SAY_EVERY = 10  # seconds between lines of progress where there is no terminal for a bar

# ---- states to vectors --------------------------------------------------------

POOL = {  # ids (B,T), concepts (B,C,D), tokens (B,T,d) -> (B, width)
    "table": lambda model, ids, concepts, tokens: F.embedding(ids, model.table()).mean(1),
    "tokens": lambda model, ids, concepts, tokens: tokens.mean(1),
    "tokens, max": lambda model, ids, concepts, tokens: tokens.amax(1),
    "concepts": lambda model, ids, concepts, tokens: model.pooled(concepts, ids, how="mean"),
    "concepts, max": lambda model, ids, concepts, tokens: model.pooled(concepts, ids, how="max"),
    "all concepts": lambda model, ids, concepts, tokens: (
        concepts * model.standing(ids)[..., None]).flatten(1),
}
NAMES = {"concept": list(POOL), "transformer": ["table", "tokens", "tokens, max"]}
NAMES["resonance"] = NAMES["transformer"]
POOLINGS = {  # arch -> {value of --pooling: key of POOL}
    "concept": {"max": "concepts, max", "concept_mean": "concepts", "concepts": "all concepts",
                "mean": "tokens"},
    "transformer": {"mean": "tokens", "max": "tokens, max"},
}
POOLINGS["resonance"] = POOLINGS["transformer"]


def choose_pooling(pooling, model):
    """ "auto" or a key of POOLINGS -> (that key, key of POOL). Raises ValueError for others.

    auto: as ConceptEncoder.pooled; of other models the mean token state.
    """
    known = POOLINGS[model.arch]
    if pooling == "auto":
        defaults = dict(open="max", strict="concept_mean")
        pooling = defaults.get(getattr(model.cfg, "bottleneck", None), "mean")
    if pooling not in known:
        raise ValueError(f"pooling={pooling!r}: expected auto or, for arch={model.arch}, "
                         f"{', '.join(known)}")
    return pooling, known[pooling]


def rows_of(texts, tok, longest):
    """Texts -> (rows of ids, number of texts cut to `longest` ids). No tokens: the row [eot]."""
    # Long texts are cut before they are tokenised, at a length that holds `longest` tokens surely.
    reach = longest * int(tok.n_bytes.max()) + 2 * MAX_PRETOKEN
    rows, cut = [], 0
    for row in tok.encode([text[:reach] for text in texts]):
        cut += len(row) > longest
        rows.append(row[:longest].astype(np.int64) if len(row) else np.array([tok.eot_id]))
    return rows, cut


def rows_at_once(model, T, batch_tokens):
    """Rows of T tokens in a batch of batch_tokens tokens.

    A concept costs what a token costs, so a row counts its concepts where those are more.
    """
    return max(1, batch_tokens // max(T, getattr(model.cfg, "n_concept", 1)))


def batches(model, rows, batch_tokens):
    """Yields lists of indices of rows of equal length, up to batch_tokens tokens together."""
    lengths = np.array([len(row) for row in rows])
    for T in np.unique(lengths):
        same = np.flatnonzero(lengths == T)
        B = rows_at_once(model, T, batch_tokens)
        for i in range(0, len(same), B):
            yield same[i:i + B].tolist()


@torch.no_grad()
def embed_rows(model, rows, names, batch_tokens, device):
    """Rows of ids -> {name of POOL: float32 (N, width) on the CPU}.

    Raises ValueError where a number is NaN or infinite.
    """
    found = {}
    for index in batches(model, rows, batch_tokens):
        ids = torch.from_numpy(np.stack([rows[i] for i in index])).to(device)
        concepts, tokens = model.encode(ids)
        for name in names:
            vectors = POOL[name](model, ids, concepts, tokens).float().cpu()
            if name not in found:
                found[name] = torch.empty(len(rows), vectors.shape[1])
            found[name][index] = vectors
    check_finite(found.values())
    return found


# ---- texts from a file --------------------------------------------------------

def read_texts(path):
    """Yields (text, whether bytes that are not UTF-8 became U+FFFD) of a file; see data/texts.py.

    A text is a line, or the field "text" of .jsonl, .parquet and the like. Raises ValueError.
    """
    return read_lines(path)


def survey(path):
    """Reads all of a file -> (number of texts, sha256 of the file). ValueError if it is unfit."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; expected one with a text a line, or .jsonl or "
                         '.parquet with a field "text"')
    n = sum(1 for _ in read_texts(path))  # finds a line without a text now, not after hours
    if not n:
        raise ValueError(f"{path} is empty; expected a text a line")
    return n, file_hash(path)


def sha256_of(weights):
    """{name: tensor} -> sha256 of names and bytes, which identifies a checkpoint's weights."""
    sha256 = hashlib.sha256()
    for name, tensor in weights.items():
        sha256.update(name.encode())
        sha256.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def chunks(texts, most_texts):
    """Cuts what read_texts yields into lists, by number and size of the texts.

    A list never depends on the ones before it, so a run that starts in the middle cuts the rest at
    the same places. Batches are then the same too, and so are the bits of the results.
    """
    part, size = [], 0
    for item in texts:
        part.append(item)
        size += len(item[0])
        if len(part) >= most_texts or size >= CHUNK_CHARS:
            yield part
            part, size = [], 0
    if part:
        yield part


# ---- vectors to a file --------------------------------------------------------

# While it works, embed_file keeps two files beside its result X.npy:
#     X.npy.tmp    the matrix so far, which becomes X.npy when it is complete
#     X.npy.json   what decides the result (`identity`) and how far the work is (`done` texts)
# Each chunk is on disk in the first before the second counts it. So whenever the program is killed,
# the .json never counts a row that is not there: the next run cuts .tmp back to `done` rows and
# continues, and the bytes come out the same.
#
# Plain writes, not a memory map: with a memory map, a full disk kills the process without a
# message, and all written rows count as its memory.

def embed_file(path, to, embed, identity):
    """Embeds the texts of a file into `to`, a .npy of float32 (N, width) -> its state, a dict.

    embed(texts) -> (float32 (n, width), number of texts cut); it must depend on these texts alone.
    identity: all settings that decide its result, as a dict that JSON can hold. The state, also
    written to `to`.json: identity, done, cut, replaced. Raises ValueError where `to` was begun from
    another input or identity.
    """
    check_place(to)
    to = os.path.realpath(to) if os.path.islink(to) else to  # a link stays, its file is written
    n, sha256 = survey(path)
    width = embed([""])[0].shape[1]
    identity = identity | dict(texts=n, input_sha256=sha256, width=width)
    header = npy_header(n, width)
    fresh = dict(identity=identity, done=0, cut=0, replaced=0)
    state = load_state(to, identity) or fresh
    if state["done"] == n and os.path.exists(to):
        print(f"{to} is complete: {n:,} texts", flush=True)
        return state

    with open(to + ".tmp", "ab") as file:
        done_bytes = len(header) + 4 * width * state["done"] if state["done"] else 0
        cut_back(file, to, done_bytes, len(header) + 4 * width * n)
        if state["done"]:
            print(f"going on after {state['done']:,} of {n:,} texts", flush=True)
        else:
            file.write(header)
            write_json(to + ".json", state)
        show = progress(n, state["done"])
        most_texts = min(CHUNK_TEXTS, max(1, CHUNK_NUMBERS // width))
        rest = itertools.islice(read_texts(path), state["done"], None)
        for chunk in chunks(rest, most_texts):
            texts, replaced = zip(*chunk)
            vectors, cut = embed(list(texts))
            file.write(np.ascontiguousarray(vectors, "<f4").data)
            file.flush()
            os.fsync(file.fileno())
            state["done"] += len(chunk)
            state["cut"] += cut
            state["replaced"] += sum(replaced)
            write_json(to + ".json", state)
            show(state["done"])
        if state["done"] != n:
            raise ValueError(f"{path} changed while it was read: {state['done']:,} texts now, "
                             f"{n:,} before. Run it again after rm {to}.tmp {to}.json")
        os.replace(to + ".tmp", to)
    return state


def check_place(to):
    """Raises ValueError where no result can be written, before hours of work."""
    if not to:
        raise ValueError("to is empty; expected the name of a file, such as --to=embeddings.npy")
    if os.path.isdir(to):
        raise ValueError(f"{to} is a folder; expected the name of a file, such as "
                         f"--to={os.path.join(to, 'embeddings.npy')}")


def npy_header(n, width):
    """The first bytes of a .npy file of float32 (n, width)."""
    header = io.BytesIO()
    layout = dict(descr="<f4", fortran_order=False, shape=(n, width))
    np.lib.format.write_array_header_1_0(header, layout)
    return header.getvalue()


def load_state(to, identity):
    """The state of an earlier run from `to`.json, or None where no text has been embedded yet.

    Raises ValueError where the files come from another input or identity, so that no result is
    overwritten or mixed.
    """
    found = [path for path in (to + ".tmp", to) if os.path.exists(path) and os.path.getsize(path)]
    if not found and not os.path.exists(to + ".json"):
        return None
    made = (*found, to + ".json")[0]
    ways = f"give another --to, or remove it: rm {made} {to}.json"
    try:
        state = read_json(to + ".json")
        before, done = state["identity"], state["done"]
    except (OSError, ValueError, LookupError, TypeError):
        there = f"{to}.json exists and is of something else"
        if found:
            there = f"{made} exists, and no {to}.json says what it is"
        raise ValueError(f"{there}; {ways if found else 'give another --to'}") from None
    if not done:
        return None
    changed = [f"{key} is {before.get(key)} there and {value} now"
               for key, value in identity.items() if before.get(key) != value]
    if changed:
        raise ValueError(f"{made} was made from something else: {'; '.join(changed)}; {ways}")
    return state


def cut_back(file, to, done_bytes, all_bytes):
    """Locks `to`.tmp, open as `file`, and cuts it to the done_bytes that `to`.json counts.

    Raises ValueError where another process holds the lock, the file is too short, or the disk has
    no room for all_bytes. The kernel drops the lock when the process ends, however it ends.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing {to}; wait for it, or give "
                         "another --to") from None
    if file.tell() < done_bytes:
        raise ValueError(f"{file.name} holds {file.tell():,} bytes, {to}.json says "
                         f"{done_bytes:,}: damaged. Start over after rm {file.name} {to}.json")
    file.truncate(done_bytes)
    needed = all_bytes - done_bytes
    free = shutil.disk_usage(os.path.dirname(to) or ".").free
    if free < needed:
        raise ValueError(f"{to} needs {needed / 2**20:,.0f} MiB more, {free / 2**20:,.0f} MiB are "
                         "free there; give another --to")


def progress(total, start):
    """-> a function to call with the number of texts done.

    It moves a bar on a terminal, else it prints a line every SAY_EVERY seconds.
    """
    bar = tqdm(total=total, initial=start, unit=" texts", disable=None)
    began = last = time.monotonic()

    def show(done):
        nonlocal last
        now = time.monotonic()
        bar.update(done - bar.n)
        if bar.disable and (now - last > SAY_EVERY or done == total):
            last = now
            rate = (done - start) / (now - began)
            print(f"{done:,} of {total:,} texts, {rate:,.0f} a second", flush=True)
        if done == total:
            bar.close()
    return show
