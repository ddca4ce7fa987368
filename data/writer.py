"""Writes token bins (data/bins.py) so that nothing is lost when the process is killed.

Writing may be killed at any moment; the same command then goes on and writes the same bytes:

    load_state   reads progress.json: tokens committed so far, and where the input goes on.
    open_bins    cuts every file back to the length in progress.json. That removes a chunk of which
                 only a part was written.
    commit       appends the ids of one chunk of text to train_00000.bin.tmp and so on, waits until
                 they are on disk (fsync), then replaces progress.json in one step. The chunk counts
                 from that replacement on.
    finish       renames *.bin.tmp to *.bin, writes meta.json, removes progress.json. After a kill
                 before meta.json is there, open_bins takes the renames back.

Two logs are kept beside the bins while they are written. rows.bin has one ROW for each document of
the input, also for dropped ones; bands.bin has the MinHash bands (data/filters.py) of those kept
and of near duplicates. A resume needs them, and so does `prepare.py merge`: a folder made with
--shard=i/n keeps both logs and gets shard.json in place of meta.json.

data/documents.py turns text into the chunks of ids that are written.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil

import numpy as np

from data.bins import (
    FORMAT,
    OURS,
    SPLITS,
    DataError,
    check_files,
    load_meta,
    removal,
    unigram_entropy,
)
from lib.files import (
    FolderLock,
    file_hash,
    read_json,
    write_json,
)

# What became of a document: an index into KINDS, then into the names of the filter rules.
KINDS = ("kept", "empty", "bad_lines", "bad_files", "outside_fraction", "duplicates")
KEPT, EMPTY, BAD_LINE, BAD_FILE, OUTSIDE, DUPLICATE = range(len(KINDS))
NEAR = "near_duplicates"  # the one rule that compares documents; the others judge a text alone
DROPPED = (*KINDS[1:], "replacement_characters")  # counted in meta.json
ROW = np.dtype([
    ("digest", "<u8"),  # hash of the text
    ("tokens", "<u4"), ("bytes", "<u4"),  # length; 0 unless kept, as is the next field
    ("replaced", "<u4"),  # U+FFFD in the text: bytes that were no valid UTF-8
    ("kind", "u1"), ("is_val", "?")])
DROPPED_LOG = "dropped.jsonl"
LOGS = ("rows.bin", "bands.bin", DROPPED_LOG)
N_SAMPLES = 20  # documents of each rule in dropped.jsonl
SHOWN_BYTES = 8000  # that one of them takes at most
BUDGETS = ("val_fraction", "max_tokens", "max_bytes", "fraction", "max_disk_gb")
SMALL_FILES = 50_000  # bytes that max_disk_gb sets aside for meta.json and progress.json


# ---- begin ----------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(out_dir):
    """Makes this process the only writer of a folder -> its path, to use from here on.

    The kernel frees it when the process ends.
    """
    if not out_dir:
        raise DataError("--out_dir is empty, an unset variable perhaps: expected a folder to write")
    # Of a/../b the system would make a first; a link in b/.. leads elsewhere than the text says.
    place = os.path.realpath(out_dir) if os.pardir in out_dir.split(os.sep) else out_dir
    try:
        lock = FolderLock(place)
    except BlockingIOError:
        raise DataError(f"{out_dir}: another prepare is writing there; wait for it, or use another "
                        "--out_dir") from None
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"--out_dir={out_dir} is a file, or lies in one: expected a folder to "
                        "write") from None
    with lock:
        yield place


def load_state(out_dir, settings, rules=()):
    """State of the writing in `out_dir`: a dict, kept as progress.json. None when all is done.

    A folder without a state gets a new one. rules: names of the filter rules that may drop a
    document. DataError when the folder was begun with other settings or by another program.
    """
    path = os.path.join(out_dir, "progress.json")
    is_part = os.path.exists(os.path.join(out_dir, "shard.json"))
    last_file = "shard.json" if is_part else "meta.json"
    is_done = os.path.exists(os.path.join(out_dir, last_file))
    if is_done:
        state = load_meta(out_dir, last_file)
        is_new = False
    elif os.path.exists(path):
        state = load_progress(out_dir, path)
        # Until the first chunk is committed the settings may still change, so that a mistyped one
        # can be corrected without removing the folder.
        is_new = state["position"] is None and state["settings"] != settings
    else:
        refuse_foreign_files(out_dir)
        is_new = True
    if is_new:
        shutil.rmtree(os.path.join(out_dir, "tokenizer"), ignore_errors=True)
        state = new_state(settings, rules)
        write_json(path, state)
    refuse_other_settings(out_dir, state["settings"], settings, is_done)
    if not is_done:
        return state
    for split in SPLITS:
        check_files(out_dir, state, split)
    clean(out_dir)
    return None


def is_begun(folder):
    """Whether a folder holds a data set or a shard, whole or not yet. load_meta says more."""
    return any(os.path.exists(os.path.join(folder, name))
               for name in ("meta.json", "shard.json", "progress.json"))


def begun_settings(out_dir, before_text=False):
    """Settings with which a folder was made, or begun so that text of it is committed; else {}.

    before_text: also those of a folder without any text so far, where they may still change.
    """
    for name in ("meta.json", "shard.json", "progress.json"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            state = read_json(os.path.join(out_dir, name))
            if name != "progress.json" or before_text or state["position"] is not None:
                return dict(state["settings"])
    return {}


def new_state(settings, rules):
    """The state before the first chunk."""
    return {
        "settings": settings,
        "position": None,  # in the input, of what follows the last chunk committed
        "full": "",  # name of the budget that is used up
        "n_rows": 0,  # documents seen
        "dropped": dict.fromkeys(DROPPED, 0),
        "rules": dict.fromkeys(rules, 0),  # documents that each rule dropped
        "samples": dict.fromkeys(rules, 0),  # of them, those in dropped.jsonl
        "logs": dict.fromkeys(LOGS, 0),  # bytes
        "tokens": dict.fromkeys(SPLITS, 0),
        "documents": dict.fromkeys(SPLITS, 0),
        "bytes": dict.fromkeys(SPLITS, 0),  # of text
    }


def load_progress(out_dir, path):
    """progress.json -> the state; DataError where it is damaged or of another program."""
    try:
        state = read_json(path)
        missing = new_state({}, ()).keys() - state.keys()
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}), or of another program: use another "
                        f"--out_dir, or start over after {removal(out_dir)}") from None
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}: not made by this command. Use "
                        "another --out_dir")
    return state


def refuse_foreign_files(out_dir):
    """DataError when a folder without progress.json and meta.json holds files of our names.

    Only what a crash in the first write leaves may be there: progress.json.tmp.
    """
    foreign = [name for name in os.listdir(out_dir)
               if OURS.fullmatch(name) and name != "progress.json.tmp"]
    if foreign:
        raise DataError(f"{out_dir} holds {', '.join(sorted(foreign))} but neither meta.json nor "
                        "progress.json: not made by this command. Use another --out_dir")


def refuse_other_settings(out_dir, old, new, is_done):
    """DataError that names each setting that differs from those the folder was begun with."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if "input" in names:  # of another input, most of what was chosen differs too
        names = ["input"]
    differ = [f"{name} is {old.get(name)!r} there and {new.get(name)!r} now" for name in names]
    if differ:
        raise DataError(f"{out_dir} was {'made' if is_done else 'begun'} with other settings: "
                        f"{'; '.join(differ)}. Give the same settings, use another --out_dir, or "
                        f"start over after {removal(out_dir)}")


def shard_sizes(n_tokens, shard_tokens):
    """Number of tokens of each bin of a split."""
    return [min(shard_tokens, n_tokens - start) for start in range(0, n_tokens, shard_tokens)]


def temporary(out_dir, split, shard):
    """Path of a bin until meta.json is there."""
    return os.path.join(out_dir, f"{split}_{shard:05d}.bin.tmp")


def open_bins(out_dir, state, dtype):
    """Takes the files of `out_dir` back to what was committed."""
    # A kill in finish() leaves some files with their final names. That of a bin is train.bin or
    # train_00003.bin, its temporary one always has a number.
    for name in LOGS:
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(out_dir, name), os.path.join(out_dir, f"{name}.tmp"))
    for name in filter(OURS.fullmatch, os.listdir(out_dir)):
        found = re.fullmatch(r"(train|val)(?:_(\d{5}))?\.bin", name)
        if found:
            path = os.path.join(out_dir, name)
            tmp = temporary(out_dir, found[1], int(found[2] or 0))
            if os.path.exists(tmp):  # finish() renames, so it never leaves both
                raise DataError(f"{path} was not made by this command, which is writing {tmp}: "
                                "move it away, or use another --out_dir")
            os.replace(path, tmp)

    sizes = {os.path.join(out_dir, f"{name}.tmp"): size for name, size in state["logs"].items()}
    for split in SPLITS:
        shards = shard_sizes(state["tokens"][split], state["settings"]["shard_tokens"])
        for shard, n in enumerate(shards):
            sizes[temporary(out_dir, split, shard)] = n * dtype.itemsize
    for name in filter(OURS.fullmatch, glob.glob("*.bin.tmp", root_dir=out_dir)):
        sizes.setdefault(os.path.join(out_dir, name), 0)  # begun by a chunk that does not count
    for path, size in sizes.items():
        with open(path, "ab") as file:
            if file.tell() < size:
                raise DataError(f"{path} holds {file.tell():,} bytes, progress.json says {size:,}: "
                                f"damaged. Start over after {removal(out_dir)}")
            file.truncate(size)


# ---- a chunk --------------------------------------------------------------------------------


def commit(out_dir, state, chunk, ids, bands):
    """Appends a chunk to the bins and the logs, then replaces progress.json, so that it counts.

    chunk.rows: ROW (n,). ids: those of its kept documents, one after the other. bands: uint64
    (m, bands), for the log. Of a chunk that exceeds a budget only the first documents are taken,
    and state["full"] becomes the name of the budget.
    """
    n, state["full"] = within_budget(out_dir, state, chunk.rows, ids.itemsize, bands.shape[1:])
    rows = chunk.rows[:n]
    append_ids(out_dir, state, rows, ids)
    append_logs(out_dir, state, rows, bands, take_samples(state, chunk.samples, n))
    count_dropped(state, rows, chunk.left_out, n == len(chunk.rows))
    state.update(position=chunk.position, n_rows=state["n_rows"] + n)
    write_json(os.path.join(out_dir, "progress.json"), state)


def append_ids(out_dir, state, rows, ids):
    """Appends ids of documents to the last bin of their split, or to a new one if that is full."""
    shard_tokens, lengths = state["settings"]["shard_tokens"], rows["tokens"]
    ids = ids[: lengths.sum()]
    is_kept = rows["kind"] == KEPT  # all others have a length of 0
    for split, chosen in zip(SPLITS, (is_kept & ~rows["is_val"], is_kept & rows["is_val"])):
        left = ids[np.repeat(chosen, lengths)]
        while len(left):
            shard, used = divmod(state["tokens"][split], shard_tokens)
            part, left = np.split(left, [shard_tokens - used])
            append(temporary(out_dir, split, shard), part)
            state["tokens"][split] += len(part)
        state["documents"][split] += int(chosen.sum())
        state["bytes"][split] += int(rows["bytes"][chosen].sum())


def append_logs(out_dir, state, rows, bands, samples):
    """Appends to the files in LOGS. bands has a row for each kept document and near duplicate."""
    has_bands = rows["kind"] == KEPT
    if NEAR in state["rules"]:
        has_bands |= rows["kind"] == kinds_of(state).index(NEAR)
    bands = bands[: has_bands.sum()]
    for name, data in zip(LOGS, (rows, bands, np.frombuffer(samples.encode(), np.uint8))):
        if data.nbytes:
            append(os.path.join(out_dir, f"{name}.tmp"), data)
            state["logs"][name] += data.nbytes


def kinds_of(state):
    """Names of the values of ROW's field `kind`."""
    return [*KINDS, *state["rules"]]


def count_dropped(state, rows, left_out, is_whole):
    """Adds what was dropped to the counts of the state.

    left_out: [(row, {name: count})] of parts of documents; is_whole: all rows of the chunk count.
    """
    def add(name, count):
        counts = state["rules"] if name in state["rules"] else state["dropped"]
        counts[name] = counts.get(name, 0) + count

    kinds = kinds_of(state)
    counts = np.bincount(rows["kind"], minlength=len(kinds)).tolist()
    for name, count in list(zip(kinds, counts))[KEPT + 1 :]:
        add(name, count)
    add("replacement_characters", int(rows["replaced"].sum()))
    for row, parts in left_out:
        if row < len(rows) or is_whole:
            for name, count in parts.items():
                add(name, count)


def take_samples(state, samples, n_rows):
    """Dropped documents [(row, {"rule": ...})] -> lines of dropped.jsonl, for the first of a rule.

    A shard of an input keeps nearly twice as many: when shards are merged, up to N_SAMPLES - 1 of
    them may turn out to repeat those of earlier shards.
    """
    limit = 2 * N_SAMPLES - 1 if "shard" in state["settings"] else N_SAMPLES
    lines = []
    for row, sample in samples:
        if row < n_rows and state["samples"][sample["rule"]] < limit:
            state["samples"][sample["rule"]] += 1
            line = {"document": state["n_rows"] + row, **sample}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def within_budget(out_dir, state, rows, itemsize, n_bands=()):
    """How many of the next ROWs the budgets allow, and the name of the budget that ends them or "".

    max_tokens and max_bytes take whole documents up to the one that reaches them. max_disk_gb stops
    before the document with which all files in out_dir would be larger. Shards of an input have no
    budgets, because merge has to stop where a single machine would.
    """
    settings = state["settings"]
    if "shard" in settings:
        return len(rows), ""
    ends = [(len(rows) + 1, "")]
    for name, field in (("max_tokens", "tokens"), ("max_bytes", "bytes")):
        if settings.get(name):
            room = settings[name] - sum(state[field].values())
            sizes = np.cumsum(rows[field], dtype=np.int64)
            ends.append((int(np.searchsorted(sizes, room)) + 1, name))
    if settings.get("max_disk_gb"):
        n = rows_that_fit_on_disk(out_dir, state, rows, itemsize, n_bands)
        if n < len(rows):
            ends.append((n, "max_disk_gb"))
    n, name = min(ends)
    return (n, name) if n <= len(rows) else (len(rows), "")


def rows_that_fit_on_disk(out_dir, state, rows, itemsize, n_bands):
    """How many of the next ROWs there is room for under max_disk_gb."""
    used = written_bytes(state, itemsize) + SMALL_FILES
    used += N_SAMPLES * SHOWN_BYTES * len(state["rules"])
    used += sum(file.stat().st_size for file in os.scandir(os.path.join(out_dir, "tokenizer")))
    # Looking for near duplicates sorts the bands in files of its own (data/duplicates.py), which at
    # worst hold each band twice: with the log, three numbers of 8 bytes.
    used += 2 * state["logs"]["bands.bin"]
    row_bytes = ROW.itemsize + 3 * 8 * sum(n_bands)
    sizes = np.cumsum(rows["tokens"].astype(np.int64) * itemsize + row_bytes)
    room = int(state["settings"]["max_disk_gb"] * 1e9) - used
    return int(np.searchsorted(sizes, room, side="right"))


def written_bytes(state, itemsize):
    """Bytes committed so far of the bins and of the logs that a resume needs."""
    bins = sum(state["tokens"].values()) * itemsize
    return bins + state["logs"]["rows.bin"] + state["logs"]["bands.bin"]


def append(path, array):
    """Adds `array` to the end of a file, on disk when it returns."""
    with open(path, "ab") as file:
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())


# ---- the end --------------------------------------------------------------------------------


def finish(out_dir, state, tok, dtype, about):
    """Gives the bins their names and writes meta.json, or shard.json, which completes the folder.

    about: more fields of meta.json. DataError when a split would be empty.
    """
    is_part = "shard" in state["settings"]
    if not is_part:
        refuse_empty_splits(out_dir, state)
    meta = {"format": FORMAT, "dtype": dtype.name, "n_vocab": tok.n_vocab,
            "vocab_size": tok.vocab_size, "eot_id": int(tok.eot_id), "tokenizer": "tokenizer",
            "fingerprint": tok.fingerprint, "splits": {}}
    for split in SPLITS:
        files, counts = name_bins(out_dir, state, split, dtype, tok.n_vocab)
        totals = {name: state[name][split] for name in ("tokens", "documents", "bytes")}
        meta["splits"][split] = {**totals, "files": files}
        if split == "train":
            meta["unigram_entropy"] = unigram_entropy(counts, tok.eot_id)
    meta |= {**state["dropped"], "stopped_by": state["full"] or "the end of the text",
             "settings": state["settings"]}
    if state["rules"]:
        meta["dropped"] = state["rules"]

    if is_part:
        meta["logs"] = {name: [size, file_hash(os.path.join(out_dir, f"{name}.tmp"))]
                        for name, size in state["logs"].items()}
    for name in LOGS:
        if is_part or name == DROPPED_LOG and state["logs"][name]:
            os.replace(os.path.join(out_dir, f"{name}.tmp"), os.path.join(out_dir, name))
    last_file = "shard.json" if is_part else "meta.json"
    write_json(os.path.join(out_dir, last_file), {**meta, **about})
    clean(out_dir)


def refuse_empty_splits(out_dir, state):
    """DataError when a split got no document. A resume cannot change that, so all is removed."""
    empty = [split for split in SPLITS if not state["documents"][split]]
    if not empty:
        return
    shutil.rmtree(os.path.join(out_dir, "tokenizer"))
    clean(out_dir)
    given = {name: state["settings"].get(name) for name in BUDGETS}
    given = [f"{name} = {value}" for name, value in given.items() if value]
    counts = {**state["dropped"], **state["rules"]}.items()
    dropped = ", ".join(f"{count:,} {name}" for name, count in counts if count)
    dropped = f"; dropped: {dropped}" if dropped else ""
    raise DataError(
        f"none of {sum(state['documents'].values())} documents fell into {' and '.join(empty)} "
        f"with {', '.join(given) or 'val_fraction = 0.0'}{dropped}; nothing was written. Give more "
        "text, smaller documents, a larger budget, other rules, or a val_fraction that leaves both "
        "splits at least five documents")


def name_bins(out_dir, state, split, dtype, n_vocab):
    """Renames the bins of a split -> [{"name", "tokens", "sha256"}], occurrences of each id."""
    files, total = [], np.zeros(n_vocab + 1, np.int64)
    sizes = shard_sizes(state["tokens"][split], state["settings"]["shard_tokens"])
    for shard, n in enumerate(sizes):
        name = f"{split}.bin" if len(sizes) == 1 else f"{split}_{shard:05d}.bin"
        if os.path.lexists(os.path.join(out_dir, name)):
            raise DataError(f"{os.path.join(out_dir, name)} appeared while this command was "
                            "writing: move it away, and the same command finishes")
        os.replace(temporary(out_dir, split, shard), os.path.join(out_dir, name))
        sha256, counts = scan(os.path.join(out_dir, name), dtype, n_vocab)
        assert counts[-1] == 0, f"{name}: {counts[-1]} ids >= n_vocab = {n_vocab}: wrong tokenizer"
        total += counts
        files.append({"name": name, "tokens": n, "sha256": sha256})
    return files, total


def clean(out_dir):
    """Removes what only a resume needs; progress.json last, so that a kill here does no harm."""
    for pattern in ("*.bin.tmp", f"{DROPPED_LOG}.tmp", "seen_*.tmp", "progress.json"):
        for name in filter(OURS.fullmatch, glob.glob(pattern, root_dir=out_dir)):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(out_dir, name))


def scan(path, dtype, n_vocab):
    """A bin -> (sha256 hex, occurrences of each id, int64 (n_vocab + 1,)).

    The last entry counts the ids >= n_vocab.
    """
    sha256, counts = hashlib.sha256(), np.zeros(n_vocab + 1, np.int64)
    with open(path, "rb") as file:
        while block := file.read(2**22):
            sha256.update(block)
            whole = len(block) // dtype.itemsize * dtype.itemsize
            ids = np.frombuffer(block[:whole], dtype)
            counts += np.bincount(np.minimum(ids, n_vocab), minlength=n_vocab + 1)
    return sha256.hexdigest(), counts
