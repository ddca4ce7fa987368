"""Files, folders and standard input -> documents, and the settings of prepare.py -> a data set.

A damaged file ends the run with its name, or is skipped from the damage on, named and counted (on_bad_file=skip); what
was read before stays. Text is kept as it is: NUL bytes, Windows line ends, decomposed accents. Only a byte
order mark goes.
"""

import codecs
import collections
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib

import numpy as np

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

from data.bins import DataError
from data.documents import BAD_FILE, utf8, write_dataset
from data.filters import Filters
from data.ids import ID_SUFFIXES, links_stay
from data.workers import cut

SUFFIXES = (".txt", ".md", ".jsonl")
UNPACKED = {".gz": 2.6, ".zst": 3.0, ".parquet": 2.0}  # usual bytes of text per byte, for the bar and the disk check
MAX_LINE = 32_000_000  # bytes; a longer .jsonl line is a bad line: it would not fit the memory promise
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}  # first bytes
STDIN = "standard input"  # in place of a path
DECIDES = ("text_key", "cut_chars", "on_bad_utf8")  # the bytes; after a refusal the others may be changed to skip


# ---------------------------------------------------------------------------------------------------------------------
# what there is

Files = collections.namedtuple("Files", "paths sizes named")  # sorted; int64 (n,) bytes; what tells other files


def kind(path):
    """Suffix of a path without .gz or .zst, "" when it is no text."""
    stem = path.lower().removesuffix(".gz").removesuffix(".zst")
    return ".parquet" if path.lower().endswith(".parquet") else next((s for s in SUFFIXES if stem.endswith(s)), "")


def walk(folder, follow_links):
    """Yields (path, size) of the texts and token ids in a folder and its folders, hidden ones left out; one stat each.

    A link is followed inside the folder only: a data set from elsewhere must not read the rest of the disk.
    """
    pending, visited = [folder], set()
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                is_input = kind(entry.name) or entry.name.lower().endswith(ID_SUFFIXES)
                if entry.name.startswith(".") or not is_input and not entry.is_dir():
                    continue
                if entry.is_symlink():
                    links_stay(folder, [entry.path], follow_links)
                if entry.is_dir(follow_symlinks=bool(follow_links)):
                    if (key := (entry.stat().st_dev, entry.stat().st_ino)) not in visited:  # links can go in circles
                        pending.append(entry.path)
                    visited.add(key)
                elif is_input and entry.is_file():
                    yield entry.path, entry.stat().st_size


def find_inputs(patterns, follow_links=0):
    """Comma-separated files, globs and folders -> Files; of a folder the texts, or its token ids where it has no text.

    DataError for a pattern that finds nothing usable, and for empty files only.
    """
    found, expected = {}, (f"expected {', '.join(SUFFIXES)} (also .gz, .zst), .parquet, or token ids: "
                           f"{', '.join(ID_SUFFIXES)}")
    for pattern in filter(None, patterns.split(",")):
        paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not paths:
            raise DataError(f"--input={pattern}: no such file or folder, and as a glob it matches nothing")
        base = pattern if os.path.exists(pattern) else os.path.dirname(re.split(r"[*?\[]", pattern)[0]) or "."
        for path in links_stay(base, paths, follow_links):
            if os.path.isdir(path):
                there = dict(walk(path, follow_links))
                if not there:
                    raise DataError(f"--input={path}: no text in this folder, {expected}")
                found.update({name: size for name, size in there.items() if kind(name)} or there)
            elif not kind(path) and not path.lower().endswith((*ID_SUFFIXES, ".idx")):
                raise DataError(f"{path}: unknown kind of file, {expected}")
            elif not path.lower().endswith(".idx"):  # of Megatron-LM, read with its .bin
                found[path] = os.path.getsize(path)
    if not any(found.values()):
        raise DataError(f"--input={patterns}: {'the file is' if len(found) == 1 else 'all files are'} empty")
    paths, names = sorted(found), hashlib.sha256()
    for path in paths:
        names.update(f"{path}\0{found[path]}\0".encode("utf-8", "surrogateescape"))
    return Files(paths, np.fromiter(map(found.__getitem__, paths), np.int64, len(paths)),
                 f"{len(paths)} files, names and sizes {names.hexdigest()[:16]}")


def part_of(sizes, shard):
    """Sizes of the files, "i/n" -> (first, last + 1) of shard i: consecutive files, of about equal size together."""
    i, slash, n = shard.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise DataError(f"--shard={shard}: expected i/n with 0 <= i < n, such as 0/4, 1/4, 2/4 and 3/4")
    if int(n) > len(sizes):
        raise DataError(f"--shard={shard}: {n} shards of {len(sizes)} files, and a file belongs to one shard: give at "
                        f"most {len(sizes)}, or cut the files first (split -l for .jsonl)")
    wanted = np.searchsorted(np.cumsum(sizes), sizes.sum() * np.arange(1, int(n)) / int(n)) + 1
    ends = [0]
    for number, end in enumerate([*wanted.tolist(), len(sizes)], 1):  # at least one file for each
        ends.append(min(max(end, ends[-1] + 1), len(sizes) - int(n) + number))
    return ends[int(i)], ends[int(i) + 1]


# ---------------------------------------------------------------------------------------------------------------------
# a file -> texts


class BadFile(DataError):
    """Damage in a file, which on_bad_file may skip."""


def open_binary(path):
    """A file, or STDIN, unpacked while it is read."""
    if path == STDIN:
        start = sys.stdin.buffer.peek(4)
        if packed := next((name for magic, name in PACKED.items() if start.startswith(magic)), ""):
            raise DataError(f"{STDIN} is {packed}, expected text: unpack it on the way (zcat, zstdcat), or give "
                            "--input=FILE")
        return sys.stdin.buffer
    if path.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path), 2**20)
    if path.lower().endswith(".zst"):
        return io.BufferedReader(zstd.open(path), 2**20)
    return open(path, "rb")


class Reader:
    """Reads texts as the settings (those of prepare.py) say."""

    def __init__(self, settings):
        self.text_key, self.cut_chars, self.bad_utf8, self.bad_line, self.bad_file = map(
            settings.get, (*DECIDES, "on_bad_line", "on_bad_file"))
        if (self.bad_utf8 not in ("replace", "refuse") or self.bad_line not in ("refuse", "skip")
                or self.bad_file not in ("refuse", "skip") or self.cut_chars < 100):
            raise DataError("expected --on_bad_utf8=replace or refuse, --on_bad_line and --on_bad_file=refuse or skip, "
                            f"--cut_chars=100 or more; there is: {self.bad_utf8}, {self.bad_line}, {self.bad_file}, "
                            f"{self.cut_chars}")
        self.errors = "strict" if self.bad_utf8 == "refuse" else "replace"

    def texts(self, path, suffix):
        """Yields the texts of a file, None for a bad line; ends with BAD_FILE if it is damaged and to be skipped."""
        read = {".jsonl": self.jsonl, ".parquet": self.parquet}.get(suffix, self.plain)
        try:
            yield from read(path)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError, OSError, BadFile) as error:
            what = str(error) if isinstance(error, BadFile) else f"{path}: damaged or cut short ({error}); get it again"
            if self.bad_file == "refuse":
                raise DataError(f"{what}, or go on without the rest of it by --on_bad_file=skip") from None
            print(f"{what}. The rest of it is skipped", file=sys.stderr, flush=True)
            yield BAD_FILE

    def not_utf8(self, path, offset):
        return DataError(f"{path}: not UTF-8 at byte {offset:,}; convert the file, or give --on_bad_utf8=replace")

    def start_of(self, path, data, offset):
        """Refuses UTF-16, which would pass as UTF-8 with many errors."""
        if not offset and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadFile(f"{path}: UTF-16, expected UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
        return data

    def plain(self, path):
        """Yields the documents of a text file: the whole file, or pieces of at most cut_chars that join to it."""
        decoder, rest, offset, block = codecs.getincrementaldecoder("utf-8")(self.errors), "", 0, b"\0"
        with open_binary(path) as file:
            while block:
                block, pending = self.start_of(path, file.read(2**20), offset), len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise self.not_utf8(path, offset - pending + error.start) from None
                rest += text if offset else text.removeprefix("\ufeff")  # a byte order mark is no text
                offset += len(block)
                *pieces, rest = cut(rest, self.cut_chars)
                yield from pieces
        yield rest

    def jsonl(self, path):
        """Yields the text of each line that is not blank, None for a bad line that is to be skipped."""
        offset, going_on = 0, False
        with open_binary(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
                try:
                    text = self.start_of(path, line, offset).decode("utf-8", self.errors).removeprefix("\ufeff")
                except UnicodeDecodeError as error:
                    raise self.not_utf8(f"{path}:{number}", offset + error.start) from None
                offset += len(line)
                rest_of_a_giant, going_on = going_on, len(line) == MAX_LINE and not line.endswith(b"\n")
                if not text.isspace() and not rest_of_a_giant:
                    try:
                        yield self.json_text(text, going_on)
                    except ValueError as error:
                        if self.bad_line == "refuse":
                            raise DataError(f"{path}:{number}: {error}; mend it, or give --on_bad_line=skip") from None
                        yield None

    def json_text(self, line, is_cut):
        """A .jsonl line -> its text; ValueError says what is wrong."""
        if is_cut:
            raise ValueError(f"a line of more than {MAX_LINE:,} bytes")
        try:
            value = json.loads(line)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"no JSON ({error})") from None
        if not isinstance(value, dict) or not isinstance(value.get(self.text_key), str):
            there = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"no text under {self.text_key!r} (there is: {there[:200]}), set --text_key")
        return value[self.text_key]

    def parquet(self, path):
        """Yields the strings of the text_key column, None for a missing one; UTF-8 is checked by the file format."""
        import pyarrow  # half a second, and only this kind of file needs it
        import pyarrow.parquet

        try:
            by_pages = {"pre_buffer": False, "buffer_size": 2**20}  # else a row group, often 1 GB, is read at once
            with pyarrow.parquet.ParquetFile(path, **by_pages) as file:
                columns = {field.name: field.type for field in file.schema_arrow}
                if str(columns.get(self.text_key)) not in ("string", "large_string"):
                    there = ", ".join(f"{name} ({type})" for name, type in columns.items())
                    raise DataError(f"{path}: no column of strings {self.text_key!r} (there is: {there}), set "
                                    "--text_key")
                for batch in file.iter_batches(64, columns=[self.text_key], use_threads=False):
                    yield from (value.as_py() for value in batch.column(0))
        except (pyarrow.ArrowException, OSError) as error:
            raise EOFError(f"not a whole .parquet file: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# texts -> documents -> a data set


def from_files(reader, paths, first, last):
    """Files first..last-1 -> `documents` for write_dataset; a position is [number of the file, documents read]."""
    def documents(position):
        start, skip = position or (first, 0)
        for number in range(start, last):
            for n, text in enumerate(reader.texts(paths[number], kind(paths[number])), 1):
                if number > start or n > skip:
                    yield text, None, [number, n]

    return documents


def from_stream(reader, suffix):
    """Standard input -> `documents`; a position is [documents read, a checksum that tells another stream]."""
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
            raise DataError(f"standard input is not what it was when {done:,} documents of it were committed. Pipe the "
                            "same text again, or use another --out_dir")

    return documents


def prepare_text(settings, files):
    """Settings of prepare.py, Files (None for standard input) -> the data set in out_dir, or the shard of one.

    Returns the summary.
    """
    reader, filters, shard = Reader(settings), Filters(settings), settings["shard"]
    decides = {name: settings[name] for name in DECIDES} | ({"shard": shard} if shard else {})
    about = {name: settings[name] for name in ("tokenizer", "val_fraction", "max_tokens", "max_bytes", "max_disk_gb",
                                               "fraction", "num_proc", "licence")}
    about |= {"out_dir": settings["out_dir"], "source": settings["source"] or settings["input"], "filters": filters}
    if settings["input"] == "-":
        if shard or settings["tokenizer"].startswith("bpe:"):
            raise DataError("standard input can be read once, so --tokenizer=bpe:N and --shard=i/n need files: write "
                            "it to a file first, or train a tokenizer on some of it and give --tokenizer=DIR/tokenizer")
        if settings["input_format"] not in ("text", "jsonl"):
            raise DataError(f"--input_format={settings['input_format']}: expected text or jsonl")
        decides |= {"input": f"standard input, {settings['input_format']}"}
        return write_dataset(from_stream(reader, "." + settings["input_format"]), settings=decides, **about)
    first, last = part_of(files.sizes, shard) if shard else (0, len(files.paths))
    texts = np.array([size * UNPACKED.get(os.path.splitext(path)[1].lower(), 1)
                      for path, size in zip(files.paths, files.sizes.tolist())])
    return write_dataset(from_files(reader, files.paths, first, last), settings=decides | {"input": files.named},
                         input_bytes=int(texts[first:last].sum()),
                         sample=(from_files(reader, files.paths, 0, len(files.paths)), int(texts.sum())), **about)
