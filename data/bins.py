"""Token bins: the files of a prepared data set, how they are checked and read.

    train.bin, val.bin    raw little-endian token ids, one document after the other, each ending in
                          eot_id: uint16, or uint32 above 65,536 ids. nanoGPT reads these files.
    train_00000.bin, ...  instead of train.bin, for a split of more than 2**31 tokens
    tokenizer/            what Tokenizer.save wrote
    dropped.jsonl         the first documents that each filter rule dropped
    meta.json             counts, sha256 of each bin, unigram entropy, settings, command. Written
                          last: a folder that has it is complete.

The folder that `prepare.py split` writes holds no tokens but refers to other files, see Tokens.

data/writer.py writes these files, data/reader.py turns complete folders into batches. Linux and
macOS.
"""

import bisect
import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shlex

import numpy as np

from lib.files import (
    FolderLock,
    file_hash,
    read_json,
    remove_file,
    replace_file,
    wrong_fields,
)

FORMAT = 1
SPLITS = ("train", "val")
META_TYPES = {"dtype": str, "n_vocab": int, "vocab_size": int, "eot_id": int, "tokenizer": str,
              "fingerprint": str, "splits": dict, "unigram_entropy": (int, float),
              "settings": dict, "command": str}
SOURCES_TYPES = {"folder": str, "width": int, "files": list}  # of a split of files elsewhere
SOURCE_TYPES = {"name": str, "dtype": str, "offset": int, "tokens": int, "size": int,
                "mtime_ns": int, "sha256": str}
MOST_OPEN = 64  # files at a time; a split may refer to thousands
FULL_SCAN_BYTES = 2 * 10**9  # larger bins are checked for wrong ids by sample, and not hashed
SCAN_TOKENS = 2**22  # read at a time when documents are looked for
KEPT_TOKENS = 2**30  # from this size of a split on, the distances between rows are kept in a file


class DataError(ValueError):
    """A mistake or damage that the user can repair: what was found and expected, what to do."""


# Every file that writing makes, replaces or removes, but for those in tokenizer/. `seen_` holds
# the hashes of data/duplicates.py.
OURS = re.compile(r"(train|val)(_\d{5})?\.bin(\.tmp)?|(rows|bands)\.bin(\.tmp)?|"
                  r"dropped\.jsonl(\.tmp)?|seen_(texts|bands)_\d+\.tmp|tokenizer(\.tmp)?|"
                  r"(meta|shard|progress)\.json(\.tmp)?")


def removal(out_dir):
    """Shell command that removes what a prepare wrote to a folder, and nothing else there."""
    names = [name for name in sorted(os.listdir(out_dir))
             if OURS.fullmatch(name) or re.match(r"(train|val)\.bin\.rows_", name)]
    return f"(cd {shlex.quote(out_dir)} && rm -rf {' '.join(names)})"


def unigram_entropy(counts, eot_id, pad_id=None):
    """Occurrences of each id -> nats per token of a model that knows only these frequencies.

    The end of a document is no word, nor is padding: eot_id and pad_id are left out.
    """
    p = np.delete(counts, [eot_id] if pad_id in (None, eot_id) else [eot_id, pad_id])
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


# ---- checking what is complete --------------------------------------------------------------


def inside(folder, name):
    """Path of `name` in `folder`; DataError when the name or a link on the way leads out of it."""
    path, root = os.path.join(folder, name), os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise DataError(f"{name!r} leads out of {folder}, to {os.path.realpath(path)}: refused, "
                        "because data from elsewhere must not choose which files are read. Put the "
                        "file itself into the folder")
    return path


def inside_or_linked(folder, name, is_right):
    """The same, but a link in the folder may lead out of it to a file for which is_right(path).

    So bins may lie on another disk: a link to anything but what was prepared is refused.
    """
    path = os.path.join(folder, name)
    if os.path.basename(name) == name and os.path.islink(path) and os.path.exists(path):
        if is_right(path):
            return path
        raise DataError(f"{path} is a link to {os.path.realpath(path)}, which is not what "
                        "meta.json describes: restore the file, or prepare again")
    return inside(folder, name)


def load_meta(data_dir, name="meta.json"):
    """meta.json of a prepared folder.

    FileNotFoundError or DataError says what is wrong and gives the command that helps.
    """
    path, script = os.path.join(data_dir, name), os.path.join(data_dir, "prepare.py")
    cure = f"python prepare.py --input=... --out_dir={data_dir}"
    if os.path.isfile(script):
        cure = f"python {script}"
    if not os.path.exists(path) and os.path.exists(os.path.join(data_dir, "progress.json")):
        raise DataError(f"{data_dir}: its preparation was interrupted; run the command that began "
                        f"it again: {cure}")
    if not os.path.isfile(path) and os.path.isfile(os.path.join(data_dir, "shard.json")):
        raise DataError(f"{data_dir} is one shard of a data set: python prepare.py merge "
                        "--input=DIR,DIR --out_dir=DIR makes one of all its shards")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: no prepared data set there; make one with "
                                f"{cure}")
    try:
        meta = read_json(path)
        missing, version = wrong_fields(meta, META_TYPES), meta.get("format")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): {removal(data_dir)}, then {cure}") from None
    if missing or version != FORMAT:
        raise DataError(f"{path} has format {version!r} and lacks {sorted(missing) or 'nothing'}, "
                        f"expected format {FORMAT}: another program or version wrote it. Use "
                        f"another folder: python prepare.py --input=... --out_dir=DIR")
    if not 0 <= meta["eot_id"] < 2**32 or meta["dtype"] == "uint16" and meta["eot_id"] > 65535:
        raise DataError(f"{path} is damaged (eot_id {meta['eot_id']}, dtype {meta['dtype']}): "
                        f"{removal(data_dir)}, then {cure}")
    # Where the tokenizer is read, its fingerprint is compared (data/reader.py).
    inside_or_linked(data_dir, meta["tokenizer"], os.path.isdir)
    return meta


def load_finished(folder):
    """meta.json of a finished data set, or shard.json of a finished shard."""
    is_whole = os.path.exists(os.path.join(folder, "meta.json"))
    return load_meta(folder, "meta.json" if is_whole else "shard.json")


def check_files(data_dir, meta, split):
    """[(path, tokens)] of the bins of a split.

    DataError or FileNotFoundError unless their sizes are those in meta.json.
    """
    check_split(data_dir, meta, split)
    cure = f"{removal(data_dir)}, then {meta['command']}"
    if "sources" in meta:
        raise DataError(f"{data_dir} holds no tokens of its own, it is a split of "
                        f"{meta['sources']['folder']}: train and evaluate on it, but give that "
                        "folder to this command")
    if meta["dtype"] != ("uint16" if meta["n_vocab"] <= 65536 else "uint32"):
        raise DataError(f"{data_dir}/meta.json: dtype {meta['dtype']} for {meta['n_vocab']:,} ids; "
                        f"{cure}")
    itemsize, files = np.dtype(meta["dtype"]).itemsize, []
    for file in meta["splits"][split]["files"]:
        n, sha256 = file["tokens"], file["sha256"]
        path = inside_or_linked(data_dir, file["name"],
                                lambda path, sha256=sha256: sha256_of(path) == sha256)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is missing, meta.json lists it with {n:,} tokens; "
                                    f"{cure}")
        size = os.path.getsize(path)
        if size != n * itemsize:
            raise DataError(f"{path} holds {size:,} bytes{'' if size else ' (empty)'}, meta.json "
                            f"says {n:,} tokens of {itemsize} bytes = {n * itemsize:,}: truncated, "
                            f"or another file; {cure}")
        files.append((path, n))
    if sum(n for _, n in files) != meta["splits"][split]["tokens"]:
        raise DataError(f"{data_dir}/meta.json disagrees with itself about the tokens of {split}; "
                        f"{cure}")
    return files


def check_split(data_dir, meta, split):
    if split not in meta["splits"]:
        names = ", ".join(meta["splits"])
        raise DataError(f"split {split!r} of {data_dir}: expected one of {names}")


def check_ids(data_dir, meta, split, paths):
    """DataError when a bin is not the one in meta.json, or has ids that the vocabulary lacks."""
    for path, file in zip(paths, meta["splits"][split]["files"]):
        highest = highest_id(path, np.dtype(meta["dtype"]))
        if highest >= meta["n_vocab"]:
            raise DataError(f"{path} contains id {highest:,}, meta.json says {meta['n_vocab']:,} "
                            "ids: not the file it describes. python prepare.py validate "
                            f"--data_dir={data_dir} tells more")
        # One wrong bit would be another token, and nobody would notice. "" is a hash not known.
        known = file["sha256"] if os.path.getsize(path) < FULL_SCAN_BYTES else ""
        if known and sha256_of(path) != known:
            raise DataError(f"{path} is damaged or another file: its sha256 is not that in "
                            f"meta.json. Restore it, or {removal(data_dir)}, then "
                            f"{meta['command']}")


def highest_id(path, dtype):
    """Largest id of a bin; of a large one, the largest of 256 evenly spread parts."""
    size, part = os.path.getsize(path), 2**22  # bytes
    step = part if size < FULL_SCAN_BYTES else size // 256 // part * part
    with open(path, "rb") as file:
        parts = (os.pread(file.fileno(), part, at) for at in range(0, size, step))
        return max(int(np.frombuffer(part, dtype).max()) for part in parts)


# ---- a split of files that lie elsewhere ----------------------------------------------------


#
# `prepare.py split` copies nothing. meta.json then has "sources": {"folder" (of the files, relative
# to meta.json), "files": [{"name", "dtype", "offset" (bytes before the first token), "tokens",
# "size" (bytes), "mtime_ns", "sha256"}]}. All tokens of these files are numbered, one file after
# the other, and SPLIT_ranges.npy, int64 (n, 2), holds the first and the last + 1 number of each run
# of tokens that belongs to the split.


@functools.cache
def hash_of(path, _size, _mtime_ns):
    """sha256 (hex) of a file. Size and time belong to the cache's key: a new file is read again."""
    return file_hash(path)


def sha256_of(path):
    """sha256 (hex) of a file; a process reads it once as long as it does not change."""
    stat = os.stat(path)
    return hash_of(path, stat.st_size, stat.st_mtime_ns)


def ranges_hash(path, files):
    """sha256 (hex) of the ranges of a split together with the files that they refer to."""
    hashes = [sha256_of(path), *(file["sha256"] for file in files)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def check_sources(data_dir, meta, thoroughly=False):
    """Paths of the files that a split refers to.

    DataError or FileNotFoundError when one has changed since the split was made: its size differs,
    or its time differs and its hash too. thoroughly: compares all hashes.
    """
    sources = meta["sources"]
    wrong = wrong_fields(sources, SOURCES_TYPES) if isinstance(sources, dict) else ["sources"]
    for file in [] if wrong else sources["files"]:
        wrong += wrong_fields(file, SOURCE_TYPES) if isinstance(file, dict) else ["files"]
    if wrong:
        raise DataError(f"{data_dir}/meta.json is damaged: {', '.join(wrong)} of its sources are "
                        f"missing or of another type; made by: {meta['command']}")
    folder, paths = os.path.join(data_dir, sources["folder"]), []
    for file in sources["files"]:
        path = inside(folder, file["name"])
        cure = (f"{data_dir} refers to it and holds no copy: restore it, or split again into "
                "another --out_dir")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is gone; {cure}")
        stat = os.stat(path)
        same = stat.st_size == file["size"]
        if same and (thoroughly or stat.st_mtime_ns != file["mtime_ns"]):
            same = sha256_of(path) == file["sha256"]
        if not same:
            raise DataError(f"{path} has changed since it was split ({stat.st_size:,} bytes, "
                            f"{file['size']:,} then); {cure}")
        paths.append(path)
    return paths


def load_ranges(data_dir, meta, split):
    """First token of each run of a split, and the one after its last, by number: int64 (n, 2).

    DataError when the file is missing or does not fit meta.json.
    """
    check_split(data_dir, meta, split)
    about = meta["splits"][split]
    path = inside(data_dir, about["files"][0]["name"])
    try:
        ranges = np.load(path, allow_pickle=False)
        if not are_ranges(ranges) or (ranges[:, 1] - ranges[:, 0]).sum() != about["tokens"]:
            raise ValueError(f"its ranges are not the {about['tokens']:,} tokens of {split}")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is missing or damaged ({error}): split "
                        f"{meta['sources']['folder']} again into another --out_dir") from None
    return ranges


def are_ranges(array):
    """Whether an array holds pairs begin < end, int64, in increasing order and without overlap."""
    if array.dtype != np.int64 or array.ndim != 2:
        return False
    begins, ends = array[:, 0], array[:, 1]
    return (begins < ends).all() and (begins[1:] >= ends[:-1]).all() and (begins[:1] >= 0).all()


# ---- reading --------------------------------------------------------------------------------


class Tokens:
    """The tokens of a split, numbered from 0, wherever they lie: in bins or in the files of others.

    They form runs: a bin is one run, and each range of a split of other files is one. Files are
    read, not mapped, so memory stays small, and a file that is cut while in use gives a message; a
    mapped one would crash the process. DataError or FileNotFoundError when a file is not whole.

    paths, dtypes: of each file. number, offset: of each run, its file and its first byte there.
    starts: number of the first token of each run, and at the end n_tokens.
    """

    def __init__(self, data_dir, meta, split):
        runs = runs_of_sources if "sources" in meta else runs_of_bins
        try:
            self.paths, self.dtypes, self.number, self.offset, lengths = runs(data_dir, meta, split)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{data_dir}/meta.json is damaged ({type(error).__name__}: {error}); "
                            f"make it again with {meta['command']}") from None
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.n_tokens = int(self.starts[-1])
        self.itemsize = np.array([dtype.itemsize for dtype in self.dtypes])
        self.open = {}  # number of a file: the open file

    def file(self, number):
        """An open file. When too many are open, the one that was opened first is closed."""
        if number not in self.open:
            if len(self.open) == MOST_OPEN:
                self.open.pop(next(iter(self.open))).close()
            self.open[number] = open(self.paths[number], "rb", buffering=0)
        return self.open[number]

    def read(self, start, out):
        """Fills `out`, of any integer type, with the tokens from number `start` to the last one."""
        while len(out) and start < self.n_tokens:
            run = bisect.bisect_right(self.starts, start) - 1  # for one number faster than numpy's
            number = int(self.number[run])
            dtype, n = self.dtypes[number], min(len(out), int(self.starts[run + 1]) - start)
            offset = int(self.offset[run]) + (start - int(self.starts[run])) * dtype.itemsize
            if out.dtype == dtype:
                self.read_bytes(number, offset, out[:n])
            else:
                part = np.empty(n, dtype)
                self.read_bytes(number, offset, part)
                out[:n] = part
            out, start = out[n:], start + n

    def read_bytes(self, number, offset, out):
        """Fills `out` from a file; DataError when that is too short."""
        if os.preadv(self.file(number).fileno(), [out], offset) != out.nbytes:
            raise DataError(f"{self.paths[number]} was cut while in use: prepare it again")

    def read_rows(self, starts, lengths, out):
        """Fills row i of `out` (B, T) with lengths[i] tokens from number starts[i] on.

        starts, lengths: int64 (B,).
        """
        run = np.searchsorted(self.starts, starts, "right") - 1
        numbers = self.number[run]
        offsets = self.offset[run] + (starts - self.starts[run]) * self.itemsize[numbers]
        in_one_run = starts + lengths <= self.starts[run + 1]
        rows = list(zip(numbers.tolist(), offsets.tolist(), lengths.tolist()))
        # The disk is told of all rows before the first is read, so that it can fetch them together
        # instead of one after the other. macOS does not have this call.
        if hasattr(os, "posix_fadvise"):
            for number, offset, n in rows:
                file = self.file(number).fileno()
                os.posix_fadvise(file, offset, n * out.itemsize, os.POSIX_FADV_WILLNEED)
        for row, (number, offset, n) in enumerate(rows):
            if in_one_run[row] and self.dtypes[number] == out.dtype:
                self.read_bytes(number, offset, out[row, :n])  # the usual case, without read's loop
            else:
                self.read(int(starts[row]), out[row, :n])


def runs_of_bins(data_dir, meta, split):
    """-> paths and dtypes of the bins; file, first byte and tokens of each run, int64 (n,) each."""
    paths, tokens = zip(*check_files(data_dir, meta, split))
    n = len(paths)
    return paths, [np.dtype(meta["dtype"])] * n, np.arange(n), np.zeros(n, np.int64), tokens


def runs_of_sources(data_dir, meta, split):
    """The same for a split of files that lie elsewhere, as the section above describes them."""
    ranges, files = load_ranges(data_dir, meta, split), meta["sources"]["files"]
    paths = check_sources(data_dir, meta)
    dtypes = [np.dtype(file["dtype"]) for file in files]
    offsets = np.array([file["offset"] for file in files])
    first = np.cumsum([0, *(file["tokens"] for file in files)])  # number of a file's first token
    begins, ends = ranges[:, 0], ranges[:, 1]
    number = np.minimum(np.searchsorted(first, begins, "right"), len(files)) - 1
    if any(dtype.kind not in "iu" for dtype in dtypes) or (ends > first[number + 1]).any():
        raise DataError(f"{data_dir}/meta.json and the ranges beside it do not fit: damaged, split "
                        "again")
    itemsize = np.array([dtype.itemsize for dtype in dtypes])[number]
    offset = offsets[number] + (begins - first[number]) * itemsize
    return paths, dtypes, number, offset, ends - begins


# ---- where documents begin ------------------------------------------------------------------


#
# A document becomes rows of up to T tokens (reader.DocumentRows). What is stored is the distance
# from the beginning of each row to that of the next: 1 or 2 bytes a row. Finding them takes half a
# second per GB of tokens if the disk is fast enough, so those of a large split are kept in a file.


def distances(data, T):
    """Scans a split (TokenData) for ends of documents -> unsigned int (n_rows + 1,).

    First the tokens before row 0, then the tokens from each row to the next, last those from the
    last row to the end. An end of document, or padding, that would be alone in a row begins none.
    DataError when no document ends anywhere.
    """
    parts, n_ends = [], 0
    end, last = -1, 0  # the last end of document and the last beginning of a row so far
    for at in range(0, data.n_tokens, SCAN_TOKENS):
        ids = np.empty(min(SCAN_TOKENS, data.n_tokens - at), data.dtype)
        data.read(at, ids)
        is_end = ids == data.eot_id
        if data.stored_pad != data.eot_id:
            is_end |= ids == data.stored_pad  # else padding in the files would make rows of its own
        ends = np.concatenate([[end], np.flatnonzero(is_end) + at])
        n_ends += len(ends) - 1
        if at + len(ids) == data.n_tokens:
            ends = np.append(ends, data.n_tokens)
        begins, end = ends[:-1] + 1, int(ends[-1])
        n_rows = -(-(ends[1:] - begins) // T)  # of each document; 0 where one end follows another
        before = np.cumsum(n_rows) - n_rows
        starts = np.repeat(begins - before * T, n_rows) + np.arange(n_rows.sum()) * T
        parts.append(narrow(np.diff(starts, prepend=last)))
        if len(starts):
            last = starts[-1]
    if n_ends == 0 or all(len(part) == 0 for part in parts):
        raise DataError(f"rows=document: the {data.split} split of {data.data_dir} holds "
                        f"{n_ends:,} ends of document (id {data.eot_id}) in {data.n_tokens:,} "
                        "tokens, so nothing says where one begins; use --rows=block")
    return np.concatenate([*parts, narrow(np.array([data.n_tokens - last]))])


def narrow(numbers):
    """The same numbers in the narrowest unsigned type."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))


def kept_distances(data, T):
    """`distances`, for a large split from a file beside its bins, which the first call writes."""
    if data.n_tokens < KEPT_TOKENS:
        return distances(data, T)
    # The name holds a hash of what the distances depend on, so that those of other tokens are not
    # taken for these. It begins like that of a bin, so that rm *.bin* removes it too.
    about = json.dumps([data.meta["splits"][data.split], data.n_tokens, data.eot_id])
    name = os.path.join(data.data_dir, f"{data.split}.bin.rows_{T}_")
    path = name + hashlib.sha256(about.encode()).hexdigest()[:16] + ".npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # missing, or damaged
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        fits = found.ndim == 1 and found.dtype.kind == "u"
        if fits and found.sum(dtype=np.int64) == data.n_tokens:
            return found
    found = distances(data, T)
    # A folder that is read-only, full, or being written by another process just gets no file.
    with contextlib.suppress(OSError), FolderLock(data.data_dir):
        for old in glob.glob(glob.escape(name) + "*.npy"):
            remove_file(old)
        replace_file(path, lambda file: np.save(file, found, allow_pickle=False))
    return found
