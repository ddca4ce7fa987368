"""Token bins on disk: DIR/{train,val}.bin + meta.json + tokenizer/. Linux and macOS.

A bin is raw little-endian token ids, uint16, or uint32 when there are more than 65,536 ids; each document ends in
eot_id. nanoGPT reads these files. A split of more than 2**31 tokens is train_00000.bin and so on. meta.json is written
last: a folder that has it is complete. Until then, after every chunk of text the new ids are fsynced and progress.json
is replaced (`commit`): killed at any moment, the same command goes on from there and gives the same bytes.
documents.py turns text into chunks of ids and writes them with this file; shards.py reads what is complete.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import shutil

import numpy as np

from files import FolderLock, write_json

FORMAT, SPLITS = 1, ("train", "val")
META_KEYS = set("dtype n_vocab vocab_size eot_id tokenizer fingerprint splits unigram_entropy settings command".split())
BUDGETS = ("val_fraction", "max_tokens", "max_bytes", "fraction", "max_disk_gb")
DROPPED = ("duplicates", "empty", "bad_lines", "bad_files", "outside_fraction", "replacement_characters")  # counted
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


def load_state(out_dir, settings):
    """What was committed in `out_dir` so far, as a new state if nothing was, None if all is done with `settings`."""
    path, done, there = os.path.join(out_dir, "progress.json"), os.path.exists(os.path.join(out_dir, "meta.json")), None
    if done:
        there = load_meta(out_dir)
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
        there = {"settings": settings, "position": None, "full": "", "n_digests": 0, "dropped": counts, **zero}
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
    return f"(cd {shlex.quote(out_dir)} && rm -rf *.bin* *.tmp meta.json progress.json tokenizer)"


def shard_sizes(n_tokens, shard_tokens):
    """Number of tokens of each bin of a split."""
    return [min(shard_tokens, n_tokens - start) for start in range(0, n_tokens, shard_tokens)]


def temporary(out_dir, split, shard):
    """Path of a bin until meta.json is there."""
    return os.path.join(out_dir, f"{split}_{shard:05d}.bin.tmp")


def open_bins(out_dir, state, dtype):
    """Cuts the files of `out_dir` back to what was committed; returns the digests of the documents, uint64 (n,)."""
    files = {os.path.join(out_dir, "digests.tmp"): 8 * state["n_digests"]}
    for split in SPLITS:
        for name in glob.glob(f"{split}*.bin", root_dir=out_dir):  # a kill while finishing: undo it
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
    return np.fromfile(os.path.join(out_dir, "digests.tmp"), "<u8")


def commit(out_dir, state, chunk, lengths, ids):
    """Appends the ids of a chunk to the bins, then replaces progress.json: the moment from which they count."""
    n, state["full"] = within_budget(out_dir, state, chunk, lengths, ids.itemsize)
    settings, lengths, is_val = state["settings"], lengths[:n], chunk.is_val[:n]
    for split, chosen in zip(SPLITS, (~is_val, is_val)):
        part = ids[: lengths.sum()][np.repeat(chosen, lengths)]
        while len(part):
            shard, used = divmod(state["tokens"][split], settings["shard_tokens"])
            now, part = np.split(part, [settings["shard_tokens"] - used])
            append(temporary(out_dir, split, shard), now)
            state["tokens"][split] += len(now)
        state["documents"][split] += int(chosen.sum())
        state["bytes"][split] += int(chunk.n_bytes[:n][chosen].sum())
    append(os.path.join(out_dir, "digests.tmp"), chunk.digests[:n])
    state.update(position=chunk.position, n_digests=state["n_digests"] + n)
    old, new = state["dropped"], chunk.counts
    state["dropped"] = {name: old.get(name, 0) + new.get(name, 0) for name in {**old, **new}}
    write_json(os.path.join(out_dir, "progress.json"), state)


def within_budget(out_dir, state, chunk, lengths, itemsize):
    """How many of the next documents the budgets allow, and the name of the budget that ends with them or "".

    max_tokens and max_bytes take whole documents up to the one that reaches them; max_disk_gb stops before the
    document with which bins, digests and tokenizer would be larger.
    """
    settings, ends = state["settings"], [(len(lengths) + 1, "")]
    for name, done, sizes in (("max_tokens", state["tokens"], lengths), ("max_bytes", state["bytes"], chunk.n_bytes)):
        if settings.get(name):
            room = settings[name] - sum(done.values())
            ends.append((int(np.searchsorted(np.cumsum(sizes), room)) + 1, name))
    if settings.get("max_disk_gb"):
        used = written_bytes(state, itemsize) + SMALL_FILES + sum(
            entry.stat().st_size for entry in os.scandir(os.path.join(out_dir, "tokenizer")))
        room = int(settings["max_disk_gb"] * 1e9) - used
        n = int(np.searchsorted(np.cumsum(lengths * itemsize + 8), room, side="right"))
        ends.append((n if n < len(lengths) else n + 1, "max_disk_gb"))
    n, name = min(ends)
    return (n, name) if n <= len(lengths) else (len(lengths), "")


def written_bytes(state, itemsize):
    """Bytes of the bins and the digests that were committed."""
    return sum(state["tokens"].values()) * itemsize + 8 * state["n_digests"]


def append(path, array):
    """Adds `array` to the end of a file, on disk when it returns."""
    with open(path, "ab") as file:
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())


def finish(out_dir, state, tok, dtype, about):
    """Gives the bins their names and writes meta.json, which makes the folder complete."""
    empty = [split for split in SPLITS if not state["documents"][split]]
    if empty:  # no resume can mend this, so the folder is left as it was found
        shutil.rmtree(os.path.join(out_dir, "tokenizer"))
        clean(out_dir)
        given = [f"{name} = {value}" for name in BUDGETS if (value := state["settings"].get(name))]
        raise DataError(f"none of {sum(state['documents'].values())} documents fell into {' and '.join(empty)} with "
                        f"{', '.join(given) or 'val_fraction = 0.0'}; nothing was written. Give more text, smaller "
                        "documents, a larger budget, or a val_fraction that leaves both splits at least five documents")
    meta = {"format": FORMAT, "dtype": dtype.name, "n_vocab": tok.n_vocab, "vocab_size": tok.vocab_size,
            "eot_id": int(tok.eot_id), "tokenizer": "tokenizer", "fingerprint": tok.fingerprint, "splits": {}}
    for split in SPLITS:
        counts, files = 0, []
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
    write_json(os.path.join(out_dir, "meta.json"), {**meta, **about})
    clean(out_dir)


def clean(out_dir):
    """Removes what only a resume needs; progress.json last."""
    for name in (*glob.glob("*.bin.tmp", root_dir=out_dir), "digests.tmp", "progress.json"):
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


def load_meta(data_dir):
    """meta.json of a prepared folder. FileNotFoundError or DataError says what is wrong and the command that helps."""
    path, script = os.path.join(data_dir, "meta.json"), os.path.join(data_dir, "prepare.py")
    cure = f"python {script}" if os.path.isfile(script) else f"python prepare.py --input=... --out_dir={data_dir}"
    if os.path.exists(os.path.join(data_dir, "progress.json")) and not os.path.exists(path):
        raise DataError(f"{data_dir}: its preparation was interrupted; run the command that began it again: {cure}")
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
