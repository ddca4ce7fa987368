"""Files, folders and standard input -> texts -> a data set, as the settings of prepare.py say.

A damaged file ends the run with its name, or with on_bad_file=skip the rest of it is skipped and
counted; what was read before stays. How a file is read: data/texts.py.
"""

import glob
import hashlib
import itertools
import os
import re
import sys
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np

from data.bins import DataError
from data.documents import check_numbers, digest, in_val, smallest, utf8, write_dataset
from data.filters import Filters
from data.ids import ID_SUFFIXES, links_stay
from data.texts import MOST_CUT, STDIN, SUFFIXES, TABLES, Reader, head_of_stdin, kind
from data.workers import Ids
from data.writer import begun_settings
from lib.files import read_json

# usual bytes of text per byte, an estimate
UNPACKED = {".gz": 2.6, ".zst": 3.0, ".parquet": 2.0}
# These settings decide the text of a file, so they are kept with the data set. on_bad_line and
# on_bad_file are not: after a refusal, the same folder may go on with skip.
DECIDES = ("text_key", "cut_chars", "on_bad_utf8")
NUMBERS = ("val_fraction", "fraction", "max_tokens", "max_bytes", "max_disk_gb", "num_proc")
AUTO = {"cut_chars": 0, "val_fraction": 0, "tokenizer": "bpe"}  # values that leave the choice to us


# --------------------------------------------------------------------------------------------------
# which files there are


class Files(NamedTuple):
    """The input files."""
    paths: list  # sorted
    sizes: np.ndarray  # int64 (n,), bytes
    named: str  # their number and a hash of names and sizes, to recognise other input


def is_input(name):
    """Whether a file of this name may hold texts or token ids."""
    return bool(kind(name)) or name.lower().endswith(ID_SUFFIXES)


def rank(path):
    """What to take of a folder: 0 texts; 1 tables and ids, if it has no texts; 2 .json, if neither.

    Beside texts, .json files are descriptions more often than texts; packed ones are texts.
    """
    if kind(path) in (".arrow", ".feather", ""):
        return 1
    return 2 if path.lower().endswith(".json") else 0


def best_of(folder, there):
    """{path: size} of the files in a folder -> those of the best rank; says what it leaves out."""
    best = min(map(rank, there))
    left_out = Counter(os.path.splitext(path)[1] for path in there if rank(path) > best)
    if left_out:
        counts = ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(left_out.items()))
        print(f"{folder}: left out beside {'texts' if best == 0 else 'tables and ids'}: {counts}; "
              f"to read them, name them, such as --input='{folder}/*{min(left_out)}'",
              file=sys.stderr, flush=True)
    return {path: size for path, size in there.items() if rank(path) == best}


def walk(folder, follow_links):
    """Yields (path, size) of the texts and files of ids below a folder; no hidden ones.

    A link may not lead out of the folder unless follow_links: a data set from elsewhere could read
    any file of this disk otherwise. Each file is looked up once, because network disks are slow.
    """
    pending, visited = [folder], set()
    while pending:
        here = pending.pop()
        with os.scandir(here) as entries:
            entries = list(entries)
        listed = listed_files(here) if any(entry.name == "state.json" for entry in entries) else ()
        for entry in entries:
            is_file = is_input(entry.name) and (not listed or entry.name in listed)
            if entry.name.startswith(".") or not is_file and not entry.is_dir():
                continue
            if entry.is_symlink():
                links_stay(folder, [entry.path], follow_links)
            if entry.is_dir(follow_symlinks=bool(follow_links)):
                key = (entry.stat().st_dev, entry.stat().st_ino)
                if key not in visited:  # links can form a cycle
                    pending.append(entry.path)
                visited.add(key)
            elif is_file and entry.is_file():
                yield entry.path, entry.stat().st_size


def listed_files(folder):
    """Names of the files of a data set that `datasets` saved to disk, () for any other folder.

    Beside them it keeps the results of earlier calls of map and filter.
    """
    try:
        found = read_json(os.path.join(folder, "state.json"))
        return [part["filename"] for part in found["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):
        return ()


def find_inputs(patterns, follow_links=0):
    """Comma-separated files, globs and folders -> Files.

    Of a folder the texts are taken, or its files of token ids if it has no text. Raises DataError
    for a pattern that finds nothing usable, and when all files are empty.
    """
    expected = (f"expected {', '.join(SUFFIXES)} (also .gz, .zst), {', '.join(TABLES)}, or token "
                f"ids: {', '.join(ID_SUFFIXES)}")
    found = {}  # path: size
    for pattern in filter(None, patterns.split(",")):
        is_glob = not os.path.exists(pattern)
        paths = glob.glob(pattern, recursive=True) if is_glob else [pattern]
        if not paths:
            raise DataError(f"--input={pattern}: no such file or folder, and as a glob it matches "
                            "nothing")
        base = pattern
        if is_glob:  # the folder before the first wildcard
            base = os.path.dirname(re.split(r"[*?\[]", pattern)[0]) or "."
        for path in links_stay(base, paths, follow_links):
            if os.path.isdir(path):
                there = dict(walk(path, follow_links))
                if not there:
                    raise DataError(f"--input={path}: no text in this folder, {expected}")
                found.update(best_of(path, there))
            elif path.lower().endswith(".idx"):
                pass  # of Megatron-LM, read with its .bin
            elif is_input(path):
                found[path] = os.path.getsize(path)
            else:
                raise DataError(f"{path}: unknown kind of file, {expected}")
    if not any(found.values()):
        what = "the file is" if len(found) == 1 else "all files are"
        raise DataError(f"--input={patterns}: {what} empty")
    paths, names = sorted(found), hashlib.sha256()
    for path in paths:
        name = os.path.normpath(path)  # ./a.txt is a.txt
        names.update(f"{name}\0{found[path]}\0".encode("utf-8", "surrogateescape"))
    return Files(paths, np.array([found[path] for path in paths], np.int64),
                 f"{len(paths)} files, names and sizes {names.hexdigest()[:16]}")


def part_of(sizes, shard):
    """Sizes of the files, "i/n" -> (first, last + 1), the consecutive files of shard i.

    Shards are about equal in bytes, and each has at least one file. Raises DataError.
    """
    i, slash, n = shard.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise DataError(f"--shard={shard}: expected i/n with 0 <= i < n, such as 0/4, 1/4, 2/4 and "
                        "3/4")
    i, n = int(i), int(n)
    if n > len(sizes):
        raise DataError(f"--shard={shard}: {n} shards of {len(sizes)} files, and a file belongs to "
                        f"one shard: give at most {len(sizes)}, or cut the files first (split -l "
                        "for .jsonl)")
    wanted = np.searchsorted(np.cumsum(sizes), sizes.sum() * np.arange(1, n) / n) + 1
    ends = [0]
    for number, end in enumerate([*wanted.tolist(), len(sizes)], 1):
        files_left = len(sizes) - (n - number)  # the shards after this one need a file each
        ends.append(min(max(end, ends[-1] + 1), files_left))
    return ends[i], ends[i + 1]


# --------------------------------------------------------------------------------------------------
# texts -> documents -> a data set


def from_files(reader, paths, first, last):
    """Files first..last-1 -> `documents` for write_dataset.

    A position is [number of the file, documents read of it].
    """
    def documents(position):
        start, done = position or (first, 0)
        for number in range(start, last):
            path = paths[number]
            for n, text in enumerate(reader.texts(path, kind(path)), 1):
                if number > start or n > done:
                    yield text, None, [number, n]

    return documents


def from_stream(reader, suffix):
    """Standard input -> `documents` for write_dataset.

    A position is [documents read, a checksum of them]. On a resume the checksum tells whether the
    same text was piped again; if not, DataError.
    """
    def documents(position):
        done, expected = position or (0, 0)
        n = found = 0
        for n, text in enumerate(reader.texts(STDIN, suffix), 1):
            found = zlib.crc32(utf8(text) if isinstance(text, str) else b"\0", found)
            if n == done and found != expected:
                break
            if n > done:
                yield text, None, [n, found]
        if n < done or n == done and found != expected:
            raise DataError(f"standard input is not what it was when {done:,} documents of it were "
                            "committed. Pipe the same text again, or use another --out_dir")

    return documents


def prepare_text(settings, files):
    """Settings of prepare.py, Files (None for standard input) -> the data set or shard in out_dir.

    Returns the summary. Raises DataError.
    """
    check_numbers(**{name: settings[name] for name in NUMBERS})
    filters, shard = Filters(settings), settings["shard"]
    if files is None:
        form = settings["input_format"]
        if form not in ("text", "jsonl"):
            raise DataError(f"--input_format={form}: expected text or jsonl")
        head, is_whole = (b"", False) if shard else head_of_stdin()
        if shard or not is_whole and settings["tokenizer"].startswith("bpe"):
            raise DataError("standard input can be read once, so --tokenizer=bpe:N and --shard=i/n "
                            "need files: write it to a file first, or train a tokenizer on some of "
                            "it and give --tokenizer=DIR/tokenizer")
        begins = hashlib.sha256(head).hexdigest()[:16]  # another text would pass for this one
        named, sizes = f"standard input, {form}, that begins with {begins}", np.array([len(head)])
        first, last = 0, 1

        def reading(reader):
            return from_stream(reader, ".jsonl" if form == "jsonl" else ".txt")
    else:
        named, paths, is_whole = files.named, files.paths, True
        first, last = part_of(files.sizes, shard) if shard else (0, len(paths))
        sizes = np.array([size * UNPACKED.get(os.path.splitext(path)[1].lower(), 1)
                          for path, size in zip(paths, files.sizes.tolist())])

        def reading(reader):  # of every shard: all shards train the same tokenizer
            return from_files(reader, paths, 0, len(paths))

    size = len(sizes), int(sizes.sum())
    chosen, notes = choose(settings, named, size, reading, filters, is_whole)
    settings = {**settings, **chosen}
    reader = Reader(settings)
    everything = reading(reader)
    documents = from_files(reader, paths, first, last) if shard else everything
    decides = {"input": named, **{name: settings[name] for name in DECIDES}}
    decides |= {name: settings[name] for name in ("shard", "cut_all") if settings.get(name)}
    asked = {name: settings[name] for name in (
        "out_dir", "tokenizer", "val_fraction", "max_tokens", "max_bytes", "max_disk_gb",
        "fraction", "num_proc", "licence")}
    done = write_dataset(
        documents, settings=decides, filters=filters,
        source=settings["source"] or settings["input"],
        input_bytes=int(sizes[first:last].sum()) if is_whole else 0,
        sample=(everything, int(sizes.sum())), **asked)
    print(*notes, sep="\n", end="\n" * bool(notes), flush=True)
    return done


# --------------------------------------------------------------------------------------------------
# what the settings leave to us: how long a document is, which share goes to val, which vocabulary
#
# A single text must give train and val, whatever its size. So val gets about VAL_BYTES of a text,
# at least 0.5 % and at most 10 % of it, and few documents are cut into so many pieces that 20 of
# them make up val. A small input is read once more, to see that both splits get text.

VAL_BYTES = 500_000
LEAST_VAL, MOST_VAL = 0.005, 0.1
SMALL_BYTES = 50_000_000  # of text
FEW = 20  # documents; fewer are cut, also those of .jsonl and of tables
VOCABULARIES = (16000, 8000, 4000, 2000, 1000, 512)  # an id for each BYTES_AN_ID bytes of text
BYTES_AN_ID = 1000
LEAST_BPE = 20_000  # bytes of text; less is taken byte by byte


def choose(settings, named, size, reading, filters, is_whole):
    """-> {setting: value} for those that are left to us, as AUTO says; lines that say how.

    size: files and bytes of text of the input, the latter an estimate. reading: function, Reader ->
    `documents` of all of the input. is_whole: False for a pipe of unknown length.
    """
    n_files, n_bytes = size
    left = [name for name, auto in AUTO.items() if settings[name] == auto]
    begun = begun_settings(settings["out_dir"])
    if begun.get("input") == named:  # a folder keeps what was chosen when it was begun
        return {name: begun[name] for name in (*left, "cut_all") if name in begun}, []
    tokens = smallest(settings["max_tokens"], settings["max_disk_gb"] * 1e9 / 2)
    # A token is rarely fewer bytes of text, so all that is looked at here is within the budget.
    budget = smallest(settings["max_bytes"], tokens * (1 if settings["tokenizer"] == "byte" else 2))
    amount = smallest(n_bytes * settings["fraction"], budget) if is_whole else SMALL_BYTES
    share = settings["val_fraction"] or share_of_val(amount)
    piece = max(100, min(1000, amount // 10), min(MOST_CUT, amount * share // FEW))
    pieces = {"cut_chars": settings["cut_chars"] or int(piece), "cut_all": True}
    chosen = {"val_fraction": settings["val_fraction"] or round(share, 4),
              "cut_chars": settings["cut_chars"] or MOST_CUT}
    notes = []
    if is_whole and 0 < amount <= SMALL_BYTES:
        now = {**settings, **chosen}
        found, amount, notes = divide(now, left, pieces, budget, reading, filters)
        chosen |= found
    elif is_whole and is_few(reading(Reader({**settings, **chosen}))):
        chosen |= pieces
    elif n_files * share < FEW:  # of text files; lines of JSON and rows of tables are many
        chosen["cut_chars"] = pieces["cut_chars"]
    if "tokenizer" in left:
        sizes = [size for size in VOCABULARIES if size * BYTES_AN_ID <= amount] or VOCABULARIES[-1:]
        is_bpe = amount >= LEAST_BPE
        chosen["tokenizer"] = f"bpe:<={sizes[0]}" if is_bpe else "byte"
        notes.append(f"vocabulary for {amount:,.0f} bytes of text: "
                     f"{f'up to {sizes[0]:,} ids' if is_bpe else 'bytes'}; --tokenizer=bpe:N "
                     "for another")
    return chosen, notes


def is_few(documents):
    """Whether there are fewer than FEW `documents`; reads no more of them."""
    return len(list(itertools.islice(documents(None), FEW))) < FEW


def share_of_val(n_bytes):
    """Which share of a text goes to val."""
    return max(LEAST_VAL, min(MOST_VAL, VAL_BYTES / max(n_bytes, 1)))


def divide(settings, left, pieces, budget, reading, filters):
    """Reads a small input -> {setting: value} with which both splits get text; bytes of text; lines
    that say what was chosen.

    left: the settings that may be chosen. pieces: settings that cut documents, used where there are
    few. A val_fraction that was given is kept if it can be.
    """
    def measure(**changed):
        documents = reading(Reader({**settings, **changed}))
        return measure_documents(documents, budget or SMALL_BYTES, settings["fraction"], filters)

    chosen, (digests, sizes) = {}, measure()
    n_val, fits = in_val(digests, settings["val_fraction"]).sum(), "val_fraction" not in left
    if fits and 0 < n_val < len(sizes):
        return chosen, int(sizes.sum()), []
    notes = []
    if len(sizes) < FEW:
        chosen |= pieces
        digests, sizes = measure(**pieces)
    if len(sizes) > 1:
        share = share_of_val(sizes.sum()) if "val_fraction" in left else settings["val_fraction"]
        at = f"{pieces['cut_chars']:,} characters"
        how = f" bytes of text, pieces of up to {at}" if chosen.get("cut_all") else " bytes of text"
        chosen["val_fraction"], note = fraction_that_gives(share, digests, sizes, how)
        notes = [note]
    return chosen, int(sizes.sum()), notes


def val_fraction_of_ids(documents, n_tokens, out_dir, named):
    """The val_fraction for documents of token ids, where it is left to us; a line that says why."""
    begun = begun_settings(out_dir)
    if begun.get("input") == named:
        return begun["val_fraction"], ""
    itemsize = np.dtype("<u4").itemsize
    if n_tokens * itemsize <= SMALL_BYTES:
        digests, sizes = measure_documents(documents, SMALL_BYTES, 1.0)
        if len(sizes) > 1:
            share = share_of_val(sizes.sum())
            return fraction_that_gives(share, digests, sizes // itemsize, " tokens")
    return LEAST_VAL, ""


def measure_documents(documents, most, fraction, filters=None):
    """What will be kept of `documents`, up to `most` bytes -> digests uint64 (n, 2), bytes (n,)."""
    found, total = {}, 0
    for text, _, _ in documents(None):
        data = utf8(text) if isinstance(text, (str, Ids)) else b""
        key = digest(data)
        is_outside = int.from_bytes(key[:8], "little") > fraction * 2**64
        if not data or key in found or is_outside or isinstance(text, str) and text.isspace():
            continue
        if filters and filters.judge(data.decode())[0]:
            continue
        found[key] = len(data)
        total += len(data)
        if total >= most:
            break
    digests = np.frombuffer(b"".join(found), "<u8").reshape(-1, 2)
    return digests, np.array(list(found.values()), np.int64)


def fraction_that_gives(share, digests, sizes, what):
    """The val_fraction whose val holds nearly `share` of the sizes, and at least one document;
    a line that says so. what: the sizes are of.
    """
    order = np.argsort(digests[:, 1])
    hashes, ends = digests[order, 1].tolist(), np.cumsum(sizes[order]) / sizes.sum()
    k = 1 + int(np.abs(ends[:-1] - share).argmin())  # documents in val
    for digits in range(3, 20):  # as few as tell the last document of val from the first of train
        fraction = round((hashes[k - 1] + hashes[k]) / 2 / 2**64, digits)
        if hashes[k - 1] < int(fraction * 2**64) <= hashes[k] and 0 < fraction < 1:
            break
    note = (f"{sizes.sum():,}{what}, {len(sizes):,} documents: val got {k:,} of them, "
            f"{ends[k - 1]:.1%}, chosen by a hash (--val_fraction={fraction})")
    return fraction, note
