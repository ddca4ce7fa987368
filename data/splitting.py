"""Train and val of files of token ids without copying one of them: `python prepare.py split`.

The result is a folder with meta.json, the tokenizer and two lists of ranges of tokens (manifest.py), which TokenData
reads like any other. Sequences (rows, or `sequence_length` tokens) and files go to val by a permutation that `seed`
chooses, exactly round(val_ratio * n) of them; documents by a hash of their ids, as when text is prepared, so that the
same document is never in both (one longer than pretokenised.LONGEST counts as several). Files are taken in the order
of their names, whatever order they are listed in.
"""

import hashlib
import json
import os
import shlex
import sys

import numpy as np

from data.bins import FORMAT, SPLITS, DataError, check_files, load_meta, locked, ranges_hash, sha256_of, unigram_entropy
from data.documents import call_tokenizer, digest, in_val, progress, writing
from data.ids import BLOCK, ID_SUFFIXES, Input, Source, blocks, content, files_of_ids, links_stay, open_input, pieces, row_ends
from data.reader import mix, permute
from data.tokenizer import Tokenizer
from lib.files import replace_file, write_json


def find_input(data_dir, options, follow_links):
    """The bins of a prepared folder, train and val together, or the files of token ids in any other -> Input."""
    if not os.path.exists(os.path.join(data_dir, "meta.json")):
        if not (paths := files_of_ids(data_dir)):
            raise DataError(f"--data_dir={data_dir}: neither meta.json nor {', '.join(ID_SUFFIXES)} there; make bins "
                            f"of texts first, python prepare.py --input={data_dir} --out_dir=DIR")
        return open_input(links_stay(data_dir, paths, follow_links), **options)
    if ignored := " ".join(f"--{name}" for name in options if name != "sequence_length"):
        raise DataError(f"{ignored}: no effect on a prepared folder, {data_dir}/meta.json says it")
    meta, sources, folder = load_meta(data_dir), [], os.path.join(data_dir, "tokenizer")
    tok = call_tokenizer(Tokenizer.load, folder)
    for split in SPLITS:
        sources += [Source(path, np.dtype(meta["dtype"]), 0, n) for path, n in check_files(data_dir, meta, split)]
    return Input(sources, tok, folder, tok.pad_id, False)


# ---------------------------------------------------------------------------------------------------------------------
# who goes where


def chosen(n, ratio, seed):
    """bool (n,): exactly round(ratio * n) of n, which ones seed decides."""
    key, parts = mix(np.array([seed % 2**64], np.uint64)), [np.zeros(0, bool)]
    for start in range(0, n, BLOCK):
        index = np.arange(start, min(start + BLOCK, n), dtype=np.uint64)
        parts.append(permute(index, n, key.repeat(len(index))) < np.uint64(round(ratio * n)))
    return np.concatenate(parts)


def by_hash(documents, found, ratio, seed, before):
    """Ids of documents -> bool (n,), True for val; what holds no ids goes where the one before it went."""
    kept = [content(ids, found.tok.eot_id, found.pad_id)[0] for ids in documents]
    keys = np.frombuffer(b"".join(digest(ids.tobytes()) for ids in kept), "<u8").reshape(-1, 2)
    votes = in_val(mix(keys ^ np.uint64(seed % 2**64)) if seed else keys, ratio)
    for i, ids in enumerate(kept):
        if not len(ids):
            votes[i] = votes[i - 1] if i else before
    return votes


def groups(some_pieces):
    """Pieces -> (list of their ids, list of where they end), about BLOCK tokens at a time."""
    arrays, ends, size = [], [], 0
    for ids, end in some_pieces:
        arrays.append(ids)
        ends.append(end)
        size += len(ids)
        if size >= BLOCK:
            yield arrays, ends
            arrays, ends, size = [], [], 0
    if arrays:
        yield arrays, ends


def runs(source, found, width, is_val, ratio, seed, counts):
    """Reads a file -> (ranges int64 (n, 2), whether each goes to val bool (n,)); adds to counts[is val, id].

    width: tokens of a sequence, of which is_val bool says where each goes; 0: documents, whose ids say it.
    """
    some_blocks, ends, votes = blocks(source, 0, found.tok, found.packed), [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    if width:
        some_blocks = ((at, ids, row_ends(at, len(ids), width)) for at, ids, _ in some_blocks)
    cut_at = (-1, -1) if width else (found.tok.eot_id, found.pad_id)
    for arrays, stops in groups(pieces(some_blocks, *cut_at)):
        before = len(votes[-1]) and votes[-1][-1]
        vote = is_val[(np.array(stops) - 1) // width] if width else by_hash(arrays, found, ratio, seed, before)
        ids, of_val = np.concatenate(arrays), np.repeat(vote, [len(array) for array in arrays])
        for k in (0, 1):
            counts[k] += np.bincount(ids[of_val == k], minlength=counts.shape[1])
        ends.append(np.array(stops))
        votes.append(vote)
    ends, votes = np.concatenate(ends), np.concatenate(votes)
    last = np.flatnonzero(np.append(votes[1:] != votes[:-1], True))[:len(votes)]
    return np.stack([np.append(0, ends[last])[:-1], ends[last]], axis=1), votes[last]


# ---------------------------------------------------------------------------------------------------------------------
# the command


def make_split(data_dir, out_dir, options, follow_links=0, val_ratio=0.01, by="", seed=0, symlink=0):
    """Writes meta.json and two lists of ranges to out_dir; returns a summary. DataError, OSError.

    options: what open_input takes, of files that are no prepared folder; and sequence_length.
    by: "sequence", "document" or "file"; "" is sequence where there are rows, else document. symlink=1: by file, with
    folders train/ and val/ of relative links.
    """
    found, sequence_length = find_input(data_dir, options, follow_links), options.get("sequence_length", 0)
    names = [os.path.relpath(source.path, data_dir) for source in found.sources]
    widths, has_rows = {s.width or sequence_length for s in found.sources}, any(s.width for s in found.sources)
    by = by or ("file" if symlink else "sequence" if has_rows else "document")
    inner, outer = os.path.realpath(out_dir), os.path.realpath(data_dir)
    problems = [text for is_wrong, text in (
        (by not in ("sequence", "document", "file"), f"--by={by}: expected sequence, document or file"),
        (not 0 < val_ratio < 1, f"--val_ratio={val_ratio}: expected more than 0 and less than 1"),
        (symlink not in (0, 1), f"--symlink={symlink}: expected 0 or 1"),
        (symlink and by != "file", f"--symlink=1 links whole files and --by={by} cuts them: leave one of them out"),
        (by == "sequence" and not min(widths), f"{data_dir} holds a file without rows: --sequence_length=N says how "
         "many tokens make a sequence"),
        (sequence_length and not has_rows and by != "sequence", f"--sequence_length={sequence_length} has no effect: "
         "no file has rows, and --by is not sequence"),
        (any(source.column for source in found.sources), "the lists of Arrow files have no fixed place to refer to; "
         f"python prepare.py --input={data_dir} makes bins of them"),
        (os.path.commonpath([inner, outer]) == outer, f"--out_dir={out_dir} lies in --data_dir={data_dir}: expected "
         "another folder")) if is_wrong]
    if problems:
        raise DataError("; ".join(problems))
    files = json.dumps([names, [os.path.getsize(source.path) for source in found.sources]]).encode()
    settings = {"split": f"{len(names)} files, names and sizes {hashlib.sha256(files).hexdigest()[:16]}", "by": by,
                "width": min(widths) if by == "sequence" else 0, "val_ratio": val_ratio, "seed": seed,
                "symlink": symlink, "tokenizer": found.tok.fingerprint, "pad_id": found.pad_id,
                "packed": found.packed}
    with locked(out_dir):
        if not is_done(out_dir, settings):
            write_split(out_dir, settings, found, names, data_dir, *read_split(settings, found, names))
    meta = load_meta(out_dir)
    counts = {f"{split}_{what}": meta["splits"][split][what] for split in SPLITS
              for what in ("tokens", "documents", "units")}
    return {"out_dir": out_dir, "by": by, "files": len(names), **counts, "unigram_entropy": meta["unigram_entropy"]}


def is_done(out_dir, settings):
    """Whether out_dir holds this split already; DataError when it holds anything but what a killed one left there."""
    if os.path.exists(os.path.join(out_dir, "meta.json")):
        if load_meta(out_dir)["settings"] == settings:
            print(f"{out_dir} is already complete, made with the same settings", flush=True)
            return True
        raise DataError(f"{out_dir} holds another data set or another split: use another --out_dir")
    ours = {"meta.json", "tokenizer", *SPLITS, *map("{}_ranges.npy".format, SPLITS)}
    links = [os.path.join(folder, name) for split in SPLITS
             for folder, _, there in os.walk(os.path.join(out_dir, split)) for name in there]
    foreign = [os.path.join(out_dir, name) for name in os.listdir(out_dir) if name.removesuffix(".tmp") not in ours]
    foreign += [path for path in links if not os.path.islink(path)]
    if foreign:
        raise DataError(f"{foreign[0]} was not made by this command: use another --out_dir")
    for path in links:
        os.remove(path)
    return False


def read_split(settings, found, names):
    """Reads all files -> (which units go to val bool, ranges of train and of val int64 (n, 2), occurrences of each id
    in both int64 (2, n_vocab), what meta.json says of the files)."""
    by, ratio, seed, sources = settings["by"], settings["val_ratio"], settings["seed"], found.sources
    units = {"document": lambda s: (0, 0), "file": lambda s: (max(s.tokens, 1), 1),
             "sequence": lambda s: (settings["width"], -(-s.tokens // settings["width"]))}  # tokens of one, how many
    units = [units[by](source) for source in sources]
    is_val, counts = chosen(sum(n for _, n in units), ratio, seed), np.zeros((2, found.tok.n_vocab), np.int64)
    show = progress(sum(source.tokens for source in sources), 0, "tokens")
    files, ranges, first, done = [], ([], []), 0, 0
    for source, name, (width, n) in zip(sources, names, units):
        stat = os.stat(source.path)
        found_runs, of_val = runs(source, found, width, is_val[first:first + n], ratio, seed, counts)
        for k in (0, 1):
            ranges[k].append(found_runs[of_val == k] + done)
        files.append({"name": name, "dtype": source.dtype.str, "offset": source.offset, "tokens": source.tokens,
                      "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(source.path)})
        first, done = first + n, done + source.tokens
        show(done)
    ranges = [np.concatenate(parts) for parts in ranges]
    if empty := [split for split, part in zip(SPLITS, ranges) if not len(part)]:
        raise DataError(f"{' and '.join(empty)} would hold nothing with val_ratio = {ratio} of {len(is_val) or 'these'}"
                        f" {by}s: choose another --val_ratio or --by")
    return is_val, ranges, counts, files


def write_split(out_dir, settings, found, names, data_dir, is_val, ranges, counts, files):
    """Writes what read_split found; meta.json last, which makes the folder complete."""
    tok, folder = found.tok, os.path.relpath(os.path.realpath(data_dir), os.path.realpath(out_dir))
    meta = {"format": FORMAT, "dtype": "uint16" if tok.n_vocab <= 65536 else "uint32", "n_vocab": tok.n_vocab,
            "vocab_size": tok.vocab_size, "eot_id": int(tok.eot_id), "pad_id": found.pad_id, "tokenizer": "tokenizer",
            "fingerprint": tok.fingerprint, "unigram_entropy": unigram_entropy(counts[0], tok.eot_id), "splits": {}}
    with writing(out_dir):
        tok.save(os.path.join(out_dir, "tokenizer"))
        for k, split in enumerate(SPLITS):
            path = os.path.join(out_dir, f"{split}_ranges.npy")
            replace_file(path, lambda file, k=k: np.save(file, ranges[k], allow_pickle=False))
            n_tokens, n_documents = int((ranges[k][:, 1] - ranges[k][:, 0]).sum()), int(counts[k, tok.eot_id])
            meta["splits"][split] = {
                "tokens": n_tokens, "documents": n_documents, "bytes": int(counts[k] @ tok.n_bytes[:tok.n_vocab]),
                "units": n_documents if settings["by"] == "document" else int((is_val == k).sum()),
                "files": [{"name": f"{split}_ranges.npy", "tokens": n_tokens, "sha256": ranges_hash(path, files)}]}
        if settings["symlink"]:
            for source, name, of_val in zip(found.sources, names, is_val):
                link(source, os.path.join(out_dir, SPLITS[int(of_val)], name))
        write_json(os.path.join(out_dir, "meta.json"), {
            **meta, "sources": {"folder": folder, "width": settings["width"], "files": files}, "settings": settings,
            "source": data_dir, "command": shlex.join(["python", *sys.argv])})


def link(source, path):
    """Makes `path` a relative link to a file, of Megatron-LM with its index."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    there = os.path.relpath(os.path.realpath(source.path), os.path.realpath(os.path.dirname(path)))
    os.symlink(there, path)
    if source.ends is not None:
        os.symlink(os.path.splitext(there)[0] + ".idx", os.path.splitext(path)[0] + ".idx")
