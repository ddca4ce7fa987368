"""Divides files of token ids, or the bins of a prepared folder, into train and val without copying
a token: `python prepare.py split`.

The new folder holds meta.json, the tokenizer and, for each split, a list of ranges of tokens in
those files (data/bins.py says how it is stored). TokenData reads it like a folder with bins.

    by sequence   rows, or `sequence_length` tokens where there are no rows. Exactly
                  round(val_ratio * n) of them go to val; `seed` chooses which.
    by file       the same with whole files
    by document   a hash of its ids decides, as when text is prepared, so the same document is never
                  in both splits. One longer than LONGEST is cut and counts as several.

Files are taken in the order of their names, so that the same files always give the same split.
"""

import hashlib
import json
import os
import shlex
import sys

import numpy as np

from data import bins, writer
from data.bins import SPLITS, DataError, load_meta
from data.documents import call_tokenizer, digest, in_val, progress, save_tokenizer, writing
from data.ids import (
    BLOCK,
    ID_SUFFIXES,
    Input,
    Source,
    cut_documents,
    cut_rows,
    files_of_ids,
    links_stay,
    open_input,
    read_blocks,
    without_markers,
)
from data.reader import mix, permute
from data.tokenizer import Tokenizer
from lib.files import replace_file, write_json


def make_split(data_dir, out_dir, options, follow_links=0, val_ratio=0.01, by="", seed=0,
               symlink=0):
    """Writes meta.json and two lists of ranges to out_dir; returns a summary.

    options: of open_input, for a folder that is not prepared; and sequence_length. by: "sequence",
    "document" or "file"; "" is sequence where there are rows, else document. symlink=1: by file,
    and folders train/ and val/ with relative links to the files. Raises DataError, OSError.
    """
    found = find_input(data_dir, options, follow_links)
    names = [os.path.relpath(source.path, data_dir) for source in found.sources]
    sequence_length = options.get("sequence_length", 0)
    if not by and symlink:
        by = "file"
    elif not by:
        by = "sequence" if any(source.width for source in found.sources) else "document"
    check_settings(data_dir, out_dir, found.sources, sequence_length, val_ratio, by, symlink)
    # What decides the split. A folder made with the same settings is left as it is.
    sizes = [os.path.getsize(source.path) for source in found.sources]
    files = hashlib.sha256(json.dumps([names, sizes]).encode()).hexdigest()[:16]
    width = found.sources[0].width or sequence_length if by == "sequence" else 0
    settings = {"split": f"{len(names)} files, names and sizes {files}", "by": by, "width": width,
                "val_ratio": val_ratio, "seed": seed, "symlink": symlink,
                "tokenizer": found.tok.fingerprint, "pad_id": found.pad_id, "packed": found.packed}
    with writer.locked(out_dir) as out_dir:
        if not is_done(out_dir, settings):
            divided = divide(settings, found, names)
            write_split(out_dir, settings, found, names, data_dir, *divided)
    meta = load_meta(out_dir)
    counts = {f"{split}_{what}": meta["splits"][split][what] for split in SPLITS
              for what in ("tokens", "documents", "units")}
    return {"out_dir": out_dir, "by": by, "files": len(names), **counts,
            "unigram_entropy": meta["unigram_entropy"]}


# -----------------------------------------------------------------------------
# what to divide, and whether that is possible


def find_input(data_dir, options, follow_links):
    """Files of token ids in a folder, or both bins of a prepared one -> Input."""
    if not writer.is_begun(data_dir):
        paths = files_of_ids(data_dir)
        if not paths:
            raise DataError(f"--data_dir={data_dir}: neither meta.json nor "
                            f"{', '.join(ID_SUFFIXES)} there; make bins of texts first, "
                            f"python prepare.py --input={data_dir} --out_dir=DIR")
        return open_input(links_stay(data_dir, paths, follow_links), **options)
    ignored = " ".join(f"--{name}" for name in options if name != "sequence_length")
    if ignored:
        raise DataError(f"{ignored}: no effect on a prepared folder, {data_dir}/meta.json says it")
    # The old train and val are put together and divided anew.
    meta, folder = load_meta(data_dir), os.path.join(data_dir, "tokenizer")
    tok = call_tokenizer(Tokenizer.load, folder)
    sources = [Source(path, np.dtype(meta["dtype"]), 0, n_tokens) for split in SPLITS
               for path, n_tokens in bins.check_files(data_dir, meta, split)]
    return Input(sources, tok, folder, tok.pad_id, False)


def check_settings(data_dir, out_dir, sources, sequence_length, val_ratio, by, symlink):
    """DataError with everything that is wrong with the settings of a split."""
    has_rows = any(source.width for source in sources)
    inner, outer = os.path.realpath(out_dir), os.path.realpath(data_dir)
    problems = []
    if by not in ("sequence", "document", "file"):
        problems.append(f"--by={by}: expected sequence, document or file")
    if not 0 < val_ratio < 1:
        problems.append(f"--val_ratio={val_ratio}: expected more than 0 and less than 1")
    if symlink and by != "file":
        problems.append(f"--symlink=1 links whole files and --by={by} cuts them: leave one of "
                        "them out")
    if by == "sequence" and not all(source.width or sequence_length for source in sources):
        problems.append(f"{data_dir} holds a file without rows: --sequence_length=N says how many "
                        "tokens make a sequence")
    if sequence_length and not has_rows and by != "sequence":
        problems.append(f"--sequence_length={sequence_length} has no effect: no file has rows, and "
                        "--by is not sequence")
    if any(source.column for source in sources):
        problems.append("the lists of Arrow files have no fixed place to refer to; "
                        f"python prepare.py --input={data_dir} makes bins of them")
    # The lists of ranges are .npy files: the next split would take them for token ids.
    if os.path.commonpath([inner, outer]) == outer:
        problems.append(f"--out_dir={out_dir} lies in --data_dir={data_dir}: expected another "
                        "folder")
    if problems:
        raise DataError("; ".join(problems))


def is_done(out_dir, settings):
    """Whether out_dir holds this split already; DataError when it holds anything but what this
    command writes."""
    if os.path.exists(os.path.join(out_dir, "meta.json")):
        if load_meta(out_dir)["settings"] == settings:
            print(f"{out_dir} is already complete, made with the same settings", flush=True)
            return True
        raise DataError(f"{out_dir} holds another data set or another split: use another --out_dir")
    ours = {"meta.json", "tokenizer", *SPLITS, *(f"{split}_ranges.npy" for split in SPLITS)}
    # A killed command leaves any of these, or one of them half written with .tmp after its name.
    foreign = [os.path.join(out_dir, name) for name in os.listdir(out_dir)
               if name.removesuffix(".tmp") not in ours]
    if foreign:
        raise DataError(f"{foreign[0]} was not made by this command: use another --out_dir")
    return False


# -----------------------------------------------------------------------------
# which tokens go to val


def divide(settings, found, names):
    """Reads all files and decides what goes to val.

    -> is_val bool (n_units,), empty for documents; [ranges of train, ranges of val], each int64
    (n, 2) in tokens from the beginning of the first file; occurrences of each id in train and in
    val, int64 (2, n_vocab); what meta.json says of the files.
    """
    by, ratio, seed = settings["by"], settings["val_ratio"], settings["seed"]
    units = [units_of(source, by, settings["width"]) for source in found.sources]
    is_val = choose(sum(n for _, n in units), ratio, seed)
    counts, ranges, files = np.zeros((2, found.tok.n_vocab), np.int64), ([], []), []
    show = progress(sum(source.tokens for source in found.sources), 0, "tokens")
    n_units = n_tokens = 0  # of the files before this one
    for source, name, (width, n) in zip(found.sources, names, units):
        stat = os.stat(source.path)  # before reading, so that a change meanwhile is noticed later
        of_file = is_val[n_units : n_units + n]
        file_ranges, to_val = divide_file(source, found, width, of_file, ratio, seed, counts)
        for k in (0, 1):
            ranges[k].append(file_ranges[to_val == k] + n_tokens)
        files.append({"name": name, "dtype": source.dtype.str, "offset": source.offset,
                      "tokens": source.tokens, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
                      "sha256": bins.sha256_of(source.path)})
        n_units, n_tokens = n_units + n, n_tokens + source.tokens
        show(n_tokens)
    ranges = [np.concatenate(parts) for parts in ranges]
    empty = [split for split, part in zip(SPLITS, ranges) if not len(part)]
    if empty:
        raise DataError(f"{' and '.join(empty)} would hold nothing with val_ratio = {ratio} of "
                        f"{len(is_val) or 'these'} {by}s: choose another --val_ratio or --by")
    return is_val, ranges, counts, files


def units_of(source, by, width):
    """(tokens of a unit, number of units) of a file; (0, 0) for documents, which vary in length."""
    if by == "document":
        return 0, 0
    if by == "file":
        return max(source.tokens, 1), 1
    return width, -(-source.tokens // width)


def choose(n, ratio, seed):
    """Which of n units go to val: bool (n,) of which exactly round(ratio * n) are True."""
    # A random permutation, of which the first places are val. In blocks, to bound memory.
    key, is_val = mix(np.array([seed % 2**64], np.uint64)), np.zeros(n, bool)
    for start in range(0, n, BLOCK):
        index = np.arange(start, min(start + BLOCK, n), dtype=np.uint64)
        places = permute(index, n, key.repeat(len(index)))
        is_val[start : start + BLOCK] = places < np.uint64(round(ratio * n))
    return is_val


def choose_documents(documents, found, ratio, seed, before):
    """Ids of consecutive documents -> bool (n,), True for val, by a hash of the ids.

    What is empty or padding alone goes where the document before it went; `before` is where the
    last one before these went.
    """
    texts = [without_markers(ids, found.tok.eot_id, found.pad_id)[0] for ids in documents]
    digests = np.frombuffer(b"".join(digest(ids.tobytes()) for ids in texts), "<u8").reshape(-1, 2)
    if seed:  # with seed 0 documents go where prepare.py puts them
        digests = mix(digests ^ np.uint64(seed % 2**64))
    to_val = in_val(digests, ratio)
    for i, ids in enumerate(texts):
        if not len(ids):
            to_val[i] = to_val[i - 1] if i else before
    return to_val


def divide_file(source, found, width, is_val, ratio, seed, counts):
    """Reads a file -> (ranges int64 (n, 2), whether each goes to val bool (n,)).

    width: tokens of a unit, and is_val says where each goes; 0: documents, whose ids decide.
    Adds the occurrences of each id to counts[0] (train) and counts[1] (val).
    """
    blocks = read_blocks(source, 0, found.tok, found.packed)
    if width:
        pieces = cut_rows(blocks, width)
    else:
        pieces = cut_documents(blocks, found.tok.eot_id, found.pad_id)
    ends, to_val = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    before = False
    for arrays, stops in in_groups(pieces):
        if width:
            votes = is_val[(np.array(stops) - 1) // width]
        else:
            votes = choose_documents(arrays, found, ratio, seed, before)
        before = votes[-1]
        ids, id_votes = np.concatenate(arrays), np.repeat(votes, [len(array) for array in arrays])
        for k in (0, 1):
            counts[k] += np.bincount(ids[id_votes == k], minlength=counts.shape[1])
        ends.append(np.array(stops))
        to_val.append(votes)
    ends, to_val = np.concatenate(ends), np.concatenate(to_val)
    # Neighbours with the same destination become one range. The last piece always ends one, if any.
    is_last = np.append(to_val[1:] != to_val[:-1], True)[: len(to_val)]
    ends, to_val = ends[is_last], to_val[is_last]
    return np.stack([np.append(0, ends)[:-1], ends], axis=1), to_val


def in_groups(pieces):
    """Pieces -> (list of their ids, list of where they end), about BLOCK tokens at a time.

    Many short documents are then handled by one call of numpy.
    """
    arrays, ends, size = [], [], 0
    for ids, end in pieces:
        arrays.append(ids)
        ends.append(end)
        size += len(ids)
        if size >= BLOCK:
            yield arrays, ends
            arrays, ends, size = [], [], 0
    if arrays:
        yield arrays, ends


# -----------------------------------------------------------------------------
# writing


def write_split(out_dir, settings, found, names, data_dir, is_val, ranges, counts, files):
    """Writes what `divide` found. meta.json comes last: it makes the folder complete."""
    tok, links = found.tok, {}
    if settings["symlink"]:
        for source, name, to_val in zip(found.sources, names, is_val):
            links |= links_to(source, os.path.join(out_dir, SPLITS[int(to_val)], name))
    refuse_other_links(out_dir, links)
    meta = {"format": bins.FORMAT, "dtype": "uint16" if tok.n_vocab <= 65536 else "uint32",
            "n_vocab": tok.n_vocab, "vocab_size": tok.vocab_size, "eot_id": int(tok.eot_id),
            "pad_id": found.pad_id, "tokenizer": "tokenizer", "fingerprint": tok.fingerprint,
            "unigram_entropy": bins.unigram_entropy(counts[0], tok.eot_id, found.pad_id),
            "splits": {}}
    save_tokenizer(tok, found.spec, out_dir, {})
    with writing(out_dir):  # a full disk becomes one message
        for k, split in enumerate(SPLITS):
            name = f"{split}_ranges.npy"
            path = os.path.join(out_dir, name)
            replace_file(path, lambda file, k=k: np.save(file, ranges[k], allow_pickle=False))
            n_tokens = int((ranges[k][:, 1] - ranges[k][:, 0]).sum())
            n_documents = n_units = int(counts[k, tok.eot_id])
            if settings["by"] != "document":
                n_units = int((is_val == k).sum())
            sha256 = bins.ranges_hash(path, files)
            meta["splits"][split] = {
                "tokens": n_tokens, "documents": n_documents,
                "bytes": int(counts[k] @ tok.n_bytes[: tok.n_vocab]), "units": n_units,
                "files": [{"name": name, "tokens": n_tokens, "sha256": sha256}]}
        for path, target in links.items():
            if not os.path.islink(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.symlink(target, path)
        # Relative, so that both folders may move together.
        folder = os.path.relpath(os.path.realpath(data_dir), os.path.realpath(out_dir))
        meta |= {"sources": {"folder": folder, "width": settings["width"], "files": files},
                 "settings": settings, "source": data_dir,
                 "command": shlex.join(["python", *sys.argv])}
        write_json(os.path.join(out_dir, "meta.json"), meta)


def links_to(source, path):
    """{path: target} of a relative link to a file; of Megatron-LM also of one to its index."""
    target = os.path.relpath(os.path.realpath(source.path), os.path.realpath(os.path.dirname(path)))
    links = {path: target}
    if source.ends is not None:
        links[os.path.splitext(path)[0] + ".idx"] = os.path.splitext(target)[0] + ".idx"
    return links


def refuse_other_links(out_dir, links):
    """DataError when train/ or val/ hold anything but these links, {path: target}.

    A killed command with the same settings leaves some of them.
    """
    for split in SPLITS:
        for folder, _, names in os.walk(os.path.join(out_dir, split)):
            for path in (os.path.join(folder, name) for name in names):
                if not os.path.islink(path) or os.readlink(path) != links.get(path):
                    raise DataError(f"{path} was not made by this command, or with other "
                                    "settings: use another --out_dir")
