"""Token bins on disk: DIR/{train,val}.bin + meta.json + tokenizer/. Linux and macOS.

A bin is raw little-endian token ids, uint16, or uint32 when there are more than 65,536 ids; each document ends in
eot_id. nanoGPT reads these files. A split of more than 2**31 tokens is train_00000.bin and so on. meta.json is written
last: a folder that has it is complete. Until then, after every chunk of text the new ids are fsynced and progress.json
is replaced (`commit`): killed at any moment, the same command goes on from there and gives the same bytes.
documents.py turns text into chunks of ids and writes them with this file; shards.py reads what is complete.

rows.bin.tmp has one ROW for each document of the input, also for those that were dropped, and bands.bin.tmp the MinHash
bands of those that were not (filters.py). A resume needs them, and so does `prepare.py merge`: a folder made with
--shard=i/n keeps them and has shard.json in place of meta.json. dropped.jsonl shows the first documents that each rule
dropped.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shlex
import shutil

import numpy as np

from lib.files import FolderLock, file_hash, write_json

FORMAT, SPLITS = 1, ("train", "val")
META_KEYS = set("dtype n_vocab vocab_size eot_id tokenizer fingerprint splits unigram_entropy settings command".split())
KINDS = ("kept", "empty", "bad_lines", "bad_files", "outside_fraction", "duplicates")  # then come the rules of filters
KEPT, EMPTY, BAD_LINE, BAD_FILE, OUTSIDE, DUPLICATE = range(len(KINDS))
ROW = np.dtype([("digest", "<u8"), ("tokens", "<u4"), ("bytes", "<u4"), ("replaced", "<u4"), ("kind", "u1"),
                ("is_val", "?")])  # tokens, bytes of text and U+FFFD in it: 0 unless kept
LOGS = ("rows.bin", "bands.bin", "dropped.jsonl")
N_SAMPLES, SHOWN_BYTES = 20, 8000  # dropped documents of each rule in dropped.jsonl, and what one takes at most
NEAR = "near_duplicates"  # the one rule that is not of a text alone
BUDGETS = ("val_fraction", "max_tokens", "max_bytes", "fraction", "max_disk_gb")
DROPPED = (*KINDS[1:], "replacement_characters")  # counted
SMALL_FILES = 50_000  # bytes kept free under max_disk_gb for meta.json and progress.json


class DataError(ValueError):
    """A mistake or damage that the user can mend: what was found, what was expected, what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# writing


@contextlib.contextmanager
def locked(out_dir):
    """One writer a folder; the kernel drops the lock when the process ends, however it ends."""
    try:
        lock = FolderLock(out_dir)
    except BlockingIOError:
        raise DataError(f"{out_dir}: another prepare is writing there; wait for it, or use another --out_dir") from None
    with lock:
        yield


def load_state(out_dir, settings, rules=()):
    """What was committed in `out_dir` so far, as a new state if nothing was, None if all is done with `settings`.

    rules: what may drop a document, beside KINDS.
    """
    path, there = os.path.join(out_dir, "progress.json"), None
    name = "shard.json" if os.path.exists(os.path.join(out_dir, "shard.json")) else "meta.json"
    done = os.path.exists(os.path.join(out_dir, name))
    if done:
        there = load_meta(out_dir, name)
    elif os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            there = json.load(file)
    elif foreign := [name for name in os.listdir(out_dir) if name.endswith(".bin") or name == "tokenizer"]:
        raise DataError(f"{out_dir} holds {', '.join(sorted(foreign))} but neither meta.json nor progress.json: "
                        "not made by this command. Use another --out_dir")
    if there is None or there["settings"] != settings and not done and there["position"] is None:
        shutil.rmtree(os.path.join(out_dir, "tokenizer"), ignore_errors=True)  # a mistyped setting binds nobody
        counts = dict.fromkeys(DROPPED, 0)
        zero = {name: dict.fromkeys(SPLITS, 0) for name in ("tokens", "documents", "bytes")}
        there = {"settings": settings, "position": None, "full": "", "n_rows": 0, "dropped": counts,
                 "rules": dict.fromkeys(rules, 0), "samples": dict.fromkeys(rules, 0), "logs": dict.fromkeys(LOGS, 0),
                 **zero}
        write_json(path, there)
    old = there["settings"]
    if differ := [f"{name} is {old.get(name)!r} there and {settings.get(name)!r} now"
                  for name in sorted({*old, *settings}) if old.get(name) != settings.get(name)]:
        raise DataError(f"{out_dir} was {'made' if done else 'begun'} with other settings: {'; '.join(differ)}. Give "
                        f"the same settings, use another --out_dir, or start over after {removal(out_dir)}")
    if not done:
        return there
    for split in SPLITS:
        check_files(out_dir, there, split)
    clean(out_dir)


def removal(out_dir):
    """The command that removes what a prepare writes, and not the prepare.py that may lie there too."""
    return f"(cd {shlex.quote(out_dir)} && rm -rf *.bin* *.tmp {{meta,shard,progress}}.json dropped.jsonl tokenizer)"


def shard_sizes(n_tokens, shard_tokens):
    """Number of tokens of each bin of a split."""
    return [min(shard_tokens, n_tokens - start) for start in range(0, n_tokens, shard_tokens)]


def temporary(out_dir, split, shard):
    """Path of a bin until meta.json is there."""
    return os.path.join(out_dir, f"{split}_{shard:05d}.bin.tmp")


def open_bins(out_dir, state, dtype):
    """Cuts the files of `out_dir` back to what was committed."""
    files = {os.path.join(out_dir, f"{name}.tmp"): size for name, size in state["logs"].items()}
    for name in LOGS:  # a kill while finishing: undo it
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(out_dir, name), os.path.join(out_dir, f"{name}.tmp"))
    for split in SPLITS:
        for name in glob.glob(f"{split}*.bin", root_dir=out_dir):
            shard = int("0" + "".join(re.findall(r"_(\d+)", name)))
            os.replace(os.path.join(out_dir, name), temporary(out_dir, split, shard))
        for shard, n in enumerate(shard_sizes(state["tokens"][split], state["settings"]["shard_tokens"])):
            files[temporary(out_dir, split, shard)] = n * dtype.itemsize
    for name in glob.glob("*.bin.tmp", root_dir=out_dir):
        files.setdefault(os.path.join(out_dir, name), 0)
    for path, size in files.items():
        with open(path, "ab") as file:
            if file.tell() < size:
                raise DataError(f"{path} holds {file.tell():,} bytes, progress.json says {size:,}: damaged. "
                                f"Start over after {removal(out_dir)}")
            file.truncate(size)


def commit(out_dir, state, chunk, ids, bands):
    """Appends a chunk to the bins, then replaces progress.json: the moment from which it counts.

    chunk.rows: ROW (n,); ids: those of its kept rows, one after the other; bands: uint64 (m, bands) for the log.
    """
    n, state["full"] = within_budget(out_dir, state, chunk.rows, ids.itemsize, bands.shape[1:])
    rows, kinds = chunk.rows[:n], [*KINDS, *state["rules"]]
    kept, lengths = rows["kind"] == KEPT, rows["tokens"]
    for split, chosen in zip(SPLITS, (kept & ~rows["is_val"], kept & rows["is_val"])):
        part = ids[: lengths.sum()][np.repeat(chosen, lengths)]
        while len(part):
            shard, used = divmod(state["tokens"][split], state["settings"]["shard_tokens"])
            now, part = np.split(part, [state["settings"]["shard_tokens"] - used])
            append(temporary(out_dir, split, shard), now)
            state["tokens"][split] += len(now)
        state["documents"][split] += int(chosen.sum())
        state["bytes"][split] += int(rows["bytes"][chosen].sum())
    samples = take_samples(state, chunk.samples, n)
    bands = bands[: kept.sum() + (rows["kind"] == (kinds.index(NEAR) if NEAR in kinds else 255)).sum()]
    for name, data in zip(LOGS, (rows, bands, np.frombuffer(samples.encode(), np.uint8))):
        if data.nbytes:
            append(os.path.join(out_dir, f"{name}.tmp"), data)
            state["logs"][name] += data.nbytes
    counts = dict(zip(kinds, np.bincount(rows["kind"], minlength=len(kinds)).tolist()))
    counts["replacement_characters"] = int(rows["replaced"].sum())
    for row, left_out in chunk.left_out:
        if row < n or n == len(chunk.rows):
            counts |= {name: counts.get(name, 0) + count for name, count in left_out.items()}
    for name, count in counts.items():
        if name in state["rules"]:
            state["rules"][name] += count
        elif name != KINDS[KEPT]:
            state["dropped"][name] = state["dropped"].get(name, 0) + count
    state.update(position=chunk.position, n_rows=state["n_rows"] + n)
    write_json(os.path.join(out_dir, "progress.json"), state)


def take_samples(state, samples, n_rows):
    """[(row, {"rule": ...})] of dropped documents -> .jsonl lines of those that are among the first of their rule.

    A shard keeps more than N_SAMPLES of each: N_SAMPLES - 1 of them may turn out to repeat those of earlier shards.
    """
    limit, lines = N_SAMPLES if "shard" not in state["settings"] else 2 * N_SAMPLES - 1, []
    for row, sample in samples:
        if row < n_rows and state["samples"][sample["rule"]] < limit:
            state["samples"][sample["rule"]] += 1
            lines.append(json.dumps({"document": state["n_rows"] + row, **sample}, ensure_ascii=False) + "\n")
    return "".join(lines)


def within_budget(out_dir, state, rows, itemsize, n_bands=()):
    """How many of the next ROWs the budgets allow, and the name of the budget that ends with them or "".

    max_tokens and max_bytes take whole documents up to the one that reaches them; max_disk_gb stops before the
    document with which all files in out_dir would be larger. Shards take everything: merge stops where one machine
    does.
    """
    settings, ends = state["settings"], [(len(rows) + 1, "")]
    for name, done in (("max_tokens", state["tokens"]), ("max_bytes", state["bytes"])):
        if settings.get(name) and "shard" not in settings:
            room = settings[name] - sum(done.values())
            sizes = np.cumsum(rows[name.removeprefix("max_")], dtype=np.int64)
            ends.append((int(np.searchsorted(sizes, room)) + 1, name))
    if settings.get("max_disk_gb") and "shard" not in settings:
        used = written_bytes(state, itemsize) + SMALL_FILES + N_SAMPLES * SHOWN_BYTES * len(state["rules"]) + sum(
            entry.stat().st_size for entry in os.scandir(os.path.join(out_dir, "tokenizer")))
        room = int(settings["max_disk_gb"] * 1e9) - used - 2 * state["logs"]["bands.bin"]
        a_row = ROW.itemsize + 3 * 8 * sum(n_bands)  # seen.py sorts them in files of its own, two copies at most
        sizes = np.cumsum(rows["tokens"].astype(np.int64) * itemsize + a_row)
        n = int(np.searchsorted(sizes, room, side="right"))
        ends.append((n if n < len(rows) else n + 1, "max_disk_gb"))
    n, name = min(ends)
    return (n, name) if n <= len(rows) else (len(rows), "")


def written_bytes(state, itemsize):
    """Bytes of the bins and of what a resume needs that were committed."""
    return sum(state["tokens"].values()) * itemsize + state["logs"]["rows.bin"] + state["logs"]["bands.bin"]


def append(path, array):
    """Adds `array` to the end of a file, on disk when it returns."""
    with open(path, "ab") as file:
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())


def finish(out_dir, state, tok, dtype, about):
    """Gives the bins their names and writes meta.json, or shard.json, which makes the folder complete."""
    is_part = "shard" in state["settings"]
    empty = [split for split in SPLITS if not state["documents"][split]]
    if empty and not is_part:  # no resume can mend this, so the folder is left as it was found
        shutil.rmtree(os.path.join(out_dir, "tokenizer"))
        clean(out_dir)
        given = [f"{name} = {value}" for name in BUDGETS if (value := state["settings"].get(name))]
        counts = [f"{count:,} {name}" for name, count in {**state["dropped"], **state["rules"]}.items() if count]
        raise DataError(f"none of {sum(state['documents'].values())} documents fell into {' and '.join(empty)} with "
                        f"{', '.join(given) or 'val_fraction = 0.0'}{'; dropped: ' * bool(counts)}{', '.join(counts)}; "
                        "nothing was written. Give more text, smaller documents, a larger budget, other rules, or a "
                        "val_fraction that leaves both splits at least five documents")
    meta = {"format": FORMAT, "dtype": dtype.name, "n_vocab": tok.n_vocab, "vocab_size": tok.vocab_size,
            "eot_id": int(tok.eot_id), "tokenizer": "tokenizer", "fingerprint": tok.fingerprint, "splits": {}}
    for split in SPLITS:
        counts, files = np.zeros(tok.n_vocab + 1, np.int64), []
        sizes = shard_sizes(state["tokens"][split], state["settings"]["shard_tokens"])
        for shard, n in enumerate(sizes):
            name = f"{split}.bin" if len(sizes) == 1 else f"{split}_{shard:05d}.bin"
            os.replace(temporary(out_dir, split, shard), os.path.join(out_dir, name))
            sha256, of_file = scan(os.path.join(out_dir, name), dtype, tok.n_vocab)
            assert of_file[-1] == 0, f"{name}: {of_file[-1]} ids >= n_vocab = {tok.n_vocab}: the tokenizer is wrong"
            counts += of_file
            files.append({"name": name, "tokens": n, "sha256": sha256})
        meta["splits"][split] = {name: state[name][split] for name in ("tokens", "documents", "bytes")}
        meta["splits"][split]["files"] = files
        if split == "train":  # in nats; the end of a document is no word, so eot_id is left out
            meta["unigram_entropy"] = unigram_entropy(counts, tok.eot_id)
    meta |= {**state["dropped"], "stopped_by": state["full"] or "the end of the text", "settings": state["settings"]}
    if state["rules"]:
        meta["dropped"] = state["rules"]
    if is_part:
        meta["logs"] = {name: [size, file_hash(os.path.join(out_dir, f"{name}.tmp"))]
                        for name, size in state["logs"].items()}
    for name in LOGS if is_part else [name for name in LOGS[2:] if state["logs"][name]]:
        os.replace(os.path.join(out_dir, f"{name}.tmp"), os.path.join(out_dir, name))
    write_json(os.path.join(out_dir, "shard.json" if is_part else "meta.json"), {**meta, **about})
    clean(out_dir)


def clean(out_dir):
    """Removes what only a resume needs; progress.json last."""
    patterns = ("*.bin.tmp", "dropped.jsonl.tmp", "seen_*.tmp", "progress.json")
    for name in (name for pattern in patterns for name in glob.glob(pattern, root_dir=out_dir)):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out_dir, name))


def scan(path, dtype, n_vocab):
    """A bin -> (sha256 hex, int64 (n_vocab + 1,) occurrences of each id, the last entry counts ids >= n_vocab)."""
    sha256, counts = hashlib.sha256(), np.zeros(n_vocab + 1, np.int64)
    with open(path, "rb") as file:
        while block := file.read(2**22):
            sha256.update(block)
            ids = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype)
            counts += np.bincount(np.minimum(ids, n_vocab), minlength=n_vocab + 1)
    return sha256.hexdigest(), counts


def unigram_entropy(counts, eot_id):
    """Occurrences of each id -> nats per token of a model that knows only these frequencies; eot_id is left out."""
    p = np.delete(counts, eot_id)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


# ---------------------------------------------------------------------------------------------------------------------
# what is complete


def inside(folder, name):
    """Path of `name` in `folder`; DataError when the name, or a link on the way, leads out of it."""
    path, root = os.path.join(folder, name), os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise DataError(f"{name!r} leads out of {folder}, to {os.path.realpath(path)}: refused, because data from "
                        "elsewhere must not choose which files are read. Put the file itself into the folder")
    return path


def load_meta(data_dir, name="meta.json"):
    """meta.json of a prepared folder. FileNotFoundError or DataError says what is wrong and the command that helps."""
    path, script = os.path.join(data_dir, name), os.path.join(data_dir, "prepare.py")
    cure = f"python {script}" if os.path.isfile(script) else f"python prepare.py --input=... --out_dir={data_dir}"
    if os.path.exists(os.path.join(data_dir, "progress.json")) and not os.path.exists(path):
        raise DataError(f"{data_dir}: its preparation was interrupted; run the command that began it again: {cure}")
    if not os.path.isfile(path) and os.path.isfile(os.path.join(data_dir, "shard.json")):
        raise DataError(f"{data_dir} is one shard of a data set: python prepare.py merge --input=DIR,DIR --out_dir=DIR "
                        "makes one of all its shards")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: no prepared data set there; make one with {cure}")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        missing, version = META_KEYS - meta.keys(), meta.get("format")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): {removal(data_dir)}, then {cure}") from None
    if missing or version != FORMAT:
        raise DataError(f"{path} has format {version!r} and lacks {sorted(missing) or 'nothing'}, expected format "
                        f"{FORMAT}: another program or version wrote it. {removal(data_dir)}, then {cure}")
    inside(data_dir, meta["tokenizer"])
    return meta


def check_files(data_dir, meta, split):
    """[(path, tokens)] of a split after comparing the sizes with meta.json; DataError or FileNotFoundError."""
    if split not in meta["splits"]:
        raise DataError(f"split {split!r} of {data_dir}: expected one of {', '.join(meta['splits'])}")
    cure = f"{removal(data_dir)}, then {meta['command']}"
    if "sources" in meta:
        raise DataError(f"{data_dir} holds no tokens of its own, it is a split of {meta['sources']['folder']}: train "
                        "and evaluate on it, but give that folder to this command")
    if meta["dtype"] != ("uint16" if meta["n_vocab"] <= 65536 else "uint32"):
        raise DataError(f"{data_dir}/meta.json: dtype {meta['dtype']} for {meta['n_vocab']:,} ids; {cure}")
    itemsize, files = np.dtype(meta["dtype"]).itemsize, []
    for file in meta["splits"][split]["files"]:
        path, n = inside(data_dir, file["name"]), file["tokens"]
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is missing, meta.json lists it with {n:,} tokens; {cure}")
        if (size := os.path.getsize(path)) != n * itemsize:
            raise DataError(f"{path} holds {size:,} bytes{' (empty)' if not size else ''}, meta.json says {n:,} tokens "
                            f"of {itemsize} bytes = {n * itemsize:,}: truncated, or another file; {cure}")
        files.append((path, n))
    if sum(n for _, n in files) != meta["splits"][split]["tokens"]:
        raise DataError(f"{data_dir}/meta.json disagrees with itself about the tokens of {split}; {cure}")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# a split of files that lie elsewhere


@functools.cache
def hash_of(path, _size, _mtime_ns):
    """sha256 (hex) of a file as it is at this size and time."""
    return file_hash(path)


def sha256_of(path):
    """sha256 (hex) of a file, read once by a process as long as it does not change."""
    stat = os.stat(path)
    return hash_of(path, stat.st_size, stat.st_mtime_ns)


def ranges_hash(path, files):
    """sha256 (hex) that changes with the ranges of a split and with the files they are of."""
    return hashlib.sha256("\n".join([sha256_of(path), *(file["sha256"] for file in files)]).encode()).hexdigest()


def check_sources(data_dir, meta, thoroughly=False):
    """Paths of the files that a split refers to; DataError or FileNotFoundError when one is not what it was."""
    folder, paths = os.path.join(data_dir, meta["sources"]["folder"]), []
    for file in meta["sources"]["files"]:
        path = inside(folder, file["name"])
        cure = f"{data_dir} refers to it and holds no copy: restore it, or split again into another --out_dir"
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is gone; {cure}")
        stat = os.stat(path)
        known = stat.st_mtime_ns == file["mtime_ns"] and not thoroughly
        if stat.st_size != file["size"] or not known and sha256_of(path) != file["sha256"]:
            raise DataError(f"{path} has changed since it was split ({stat.st_size:,} bytes, {file['size']:,} then); "
                            f"{cure}")
        paths.append(path)
    return paths


def load_ranges(data_dir, meta, split):
    """Numbers of the first token and of the one after the last of each run of a split, int64 (n, 2); DataError."""
    if split not in meta["splits"]:
        raise DataError(f"split {split!r} of {data_dir}: expected one of {', '.join(meta['splits'])}")
    about = meta["splits"][split]
    path = inside(data_dir, about["files"][0]["name"])
    try:
        ranges = np.load(path, allow_pickle=False)
        whole = ranges.dtype == np.int64 and ranges.ndim == 2 and (ranges[:, 0] < ranges[:, 1]).all() and (
            ranges[1:, 0] >= ranges[:-1, 1]).all() and (ranges[:1, 0] >= 0).all()
        if not whole or (ranges[:, 1] - ranges[:, 0]).sum() != about["tokens"]:
            raise ValueError(f"its ranges are not the {about['tokens']:,} tokens of {split}")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is missing or damaged ({error}): split {meta['sources']['folder']} again into another "
                        "--out_dir") from None
    return ranges

