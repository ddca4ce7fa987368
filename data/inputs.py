"""Files, folders and standard input -> texts -> a data set, as the settings of prepare.py say.

A damaged file ends the run with its name, or with on_bad_file=skip the rest of it is skipped and
counted; what was read before stays. Text is kept as it is: NUL bytes, Windows line ends, decomposed
accents. Only a byte order mark is removed.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from typing import NamedTuple

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
UNPACKED = {".gz": 2.6, ".zst": 3.0, ".parquet": 2.0}  # usual bytes of text per byte, an estimate
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}  # first bytes
MAX_LINE = 32_000_000  # bytes; a longer .jsonl line is a bad line, because memory is bounded
STDIN = "standard input"  # in place of a path
# These settings decide the text of a file, so they are kept with the data set. on_bad_line and
# on_bad_file are not: after a refusal, the same folder may go on with skip.
DECIDES = ("text_key", "cut_chars", "on_bad_utf8")


# --------------------------------------------------------------------------------------------------
# which files there are


class Files(NamedTuple):
    """The input files."""
    paths: list  # sorted
    sizes: np.ndarray  # int64 (n,), bytes
    named: str  # their number and a hash of names and sizes, to recognise other input


def kind(path):
    """Suffix of a text file's path without .gz or .zst; "" when it is no text."""
    path = path.lower()
    if path.endswith(".parquet"):
        return ".parquet"
    stem = path.removesuffix(".gz").removesuffix(".zst")
    return next((suffix for suffix in SUFFIXES if stem.endswith(suffix)), "")


def walk(folder, follow_links):
    """Yields (path, size) of the texts and files of ids below a folder; no hidden ones.

    A link may not lead out of the folder unless follow_links: a data set from elsewhere could read
    any file of this disk otherwise. Each file is looked up once, because network disks are slow.
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
                    key = (entry.stat().st_dev, entry.stat().st_ino)
                    if key not in visited:  # links can form a cycle
                        pending.append(entry.path)
                    visited.add(key)
                elif is_input and entry.is_file():
                    yield entry.path, entry.stat().st_size


def find_inputs(patterns, follow_links=0):
    """Comma-separated files, globs and folders -> Files.

    Of a folder the texts are taken, or its files of token ids if it has no text. Raises DataError
    for a pattern that finds nothing usable, and when all files are empty.
    """
    expected = (f"expected {', '.join(SUFFIXES)} (also .gz, .zst), .parquet, or token ids: "
                f"{', '.join(ID_SUFFIXES)}")
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
                texts = {name: size for name, size in there.items() if kind(name)}
                found.update(texts or there)
            elif path.lower().endswith(".idx"):
                pass  # of Megatron-LM, read with its .bin
            elif kind(path) or path.lower().endswith(ID_SUFFIXES):
                found[path] = os.path.getsize(path)
            else:
                raise DataError(f"{path}: unknown kind of file, {expected}")
    if not any(found.values()):
        what = "the file is" if len(found) == 1 else "all files are"
        raise DataError(f"--input={patterns}: {what} empty")
    paths, names = sorted(found), hashlib.sha256()
    for path in paths:
        names.update(f"{path}\0{found[path]}\0".encode("utf-8", "surrogateescape"))
    return Files(paths, np.array([found[path] for path in paths], np.int64),
                 f"{len(paths)} files, names and sizes {names.hexdigest()[:16]}")


def part_of(sizes, shard):
    """Sizes of the files, "i/n" -> (first, last + 1), the consecutive files of shard i.

    Shards are about equal in bytes, and each has at least one file. Raises DataError.
    """
    i, slash, n = shard.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
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
# a file -> texts


class BadFile(DataError):
    """Damage in a file, which on_bad_file may skip."""


def open_binary(path):
    """A file, or STDIN, for reading; .gz and .zst are unpacked on the way."""
    if path == STDIN:
        start = sys.stdin.buffer.peek(4)
        for magic, packed in PACKED.items():
            if start.startswith(magic):
                raise DataError(f"{STDIN} is {packed}, expected text: unpack it on the way (zcat, "
                                "zstdcat), or give --input=FILE")
        return sys.stdin.buffer
    if path.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path), 2**20)
    if path.lower().endswith(".zst"):
        return io.BufferedReader(zstd.open(path), 2**20)
    return open(path, "rb")


class Reader:
    """Reads the texts of files as the settings of prepare.py say. Raises DataError for bad ones."""

    def __init__(self, settings):
        self.text_key, self.cut_chars = settings["text_key"], settings["cut_chars"]
        bad_utf8, self.bad_line = settings["on_bad_utf8"], settings["on_bad_line"]
        self.bad_file = settings["on_bad_file"]
        if (bad_utf8 not in ("replace", "refuse") or self.bad_line not in ("refuse", "skip")
                or self.bad_file not in ("refuse", "skip") or self.cut_chars < 100):
            raise DataError("expected --on_bad_utf8=replace or refuse, --on_bad_line and "
                            "--on_bad_file=refuse or skip, --cut_chars=100 or more; there is: "
                            f"{bad_utf8}, {self.bad_line}, {self.bad_file}, {self.cut_chars}")
        self.errors = "strict" if bad_utf8 == "refuse" else "replace"  # of Python's decoders

    def texts(self, path, suffix):
        """Yields the texts of a file, None for a bad line that is skipped.

        After damage that is skipped, BAD_FILE is the last.
        """
        read = {".jsonl": self.jsonl, ".parquet": self.parquet}.get(suffix, self.plain)
        try:
            yield from read(path)
        except (EOFError, zlib.error, zstd.ZstdError, OSError, BadFile) as error:
            what = f"{path}: damaged or cut short ({error}); get it again"
            what = str(error) if isinstance(error, BadFile) else what
            if self.bad_file == "refuse":
                raise DataError(f"{what}, or go on without the rest of it by "
                                "--on_bad_file=skip") from None
            print(f"{what}. The rest of it is skipped", file=sys.stderr, flush=True)
            yield BAD_FILE

    def plain(self, path):
        """Yields the documents of a text file: all of it, or pieces of at most cut_chars."""
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        rest, offset, block = "", 0, b"\0"
        with open_binary(path) as file:
            while block:
                block = file.read(2**20)
                refuse_utf16(path, block, offset)
                pending = len(decoder.getstate()[0])  # bytes of a character cut by the last block
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise not_utf8(path, offset - pending + error.start) from None
                if not offset:
                    text = text.removeprefix("\ufeff")  # a byte order mark is not text
                rest += text
                offset += len(block)
                *pieces, rest = cut(rest, self.cut_chars)
                yield from pieces
        yield rest

    def jsonl(self, path):
        """Yields the text of each line that is not blank, None for a bad line that is skipped."""
        offset = 0
        in_long_line = False  # a line of more than MAX_LINE comes in several reads, judged once
        with open_binary(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
                refuse_utf16(path, line, offset)
                try:
                    text = line.decode("utf-8", self.errors).removeprefix("\ufeff")
                except UnicodeDecodeError as error:
                    raise not_utf8(f"{path}:{number}", offset + error.start) from None
                offset += len(line)
                is_rest = in_long_line
                in_long_line = len(line) == MAX_LINE and not line.endswith(b"\n")
                if text.isspace() or is_rest:
                    continue
                try:
                    yield self.json_text(text, in_long_line)
                except ValueError as error:
                    if self.bad_line == "refuse":
                        raise DataError(f"{path}:{number}: {error}; mend it, or give "
                                        "--on_bad_line=skip") from None
                    yield None

    def json_text(self, line, is_cut):
        """A .jsonl line -> its text; ValueError says what is wrong. is_cut: above MAX_LINE."""
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
            raise ValueError(f"no text under {self.text_key!r} (there is: {there[:200]}), set "
                             "--text_key")
        return value[self.text_key]

    def parquet(self, path):
        """Yields the strings of the text_key column, None for a missing one.

        Strings in this format are always UTF-8.
        """
        import pyarrow  # half a second, and only this kind of file needs it
        import pyarrow.parquet

        # Read by pages: without these, a whole row group, often 1 GB, is read at once.
        by_pages = {"pre_buffer": False, "buffer_size": 2**20}
        try:
            with pyarrow.parquet.ParquetFile(path, **by_pages) as file:
                columns = {field.name: field.type for field in file.schema_arrow}
                if str(columns.get(self.text_key)) not in ("string", "large_string"):
                    there = ", ".join(f"{name} ({type})" for name, type in columns.items())
                    raise DataError(f"{path}: no column of strings {self.text_key!r} (there is: "
                                    f"{there}), set --text_key")
                for batch in file.iter_batches(64, columns=[self.text_key], use_threads=False):
                    yield from (value.as_py() for value in batch.column(0))
        except (pyarrow.ArrowException, OSError) as error:
            raise EOFError(f"not a whole .parquet file: {error}") from None


def not_utf8(path, offset):
    """The DataError for a byte that is no UTF-8."""
    return DataError(f"{path}: not UTF-8 at byte {offset:,}; convert the file, or give "
                     "--on_bad_utf8=replace")


def refuse_utf16(path, data, offset):
    """Raises BadFile for UTF-16: read as UTF-8 it would give thousands of U+FFFD."""
    if not offset and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadFile(f"{path}: UTF-16, expected UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")


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
    reader, filters, shard = Reader(settings), Filters(settings), settings["shard"]
    decides = {name: settings[name] for name in DECIDES}
    if shard:
        decides["shard"] = shard
    asked = {name: settings[name] for name in (
        "out_dir", "tokenizer", "val_fraction", "max_tokens", "max_bytes", "max_disk_gb",
        "fraction", "num_proc", "licence")}
    asked |= {"source": settings["source"] or settings["input"], "filters": filters}
    if files is None:
        if shard or settings["tokenizer"].startswith("bpe:"):
            raise DataError("standard input can be read once, so --tokenizer=bpe:N and --shard=i/n "
                            "need files: write it to a file first, or train a tokenizer on some of "
                            "it and give --tokenizer=DIR/tokenizer")
        form = settings["input_format"]
        if form not in ("text", "jsonl"):
            raise DataError(f"--input_format={form}: expected text or jsonl")
        decides["input"] = f"standard input, {form}"
        return write_dataset(from_stream(reader, f".{form}"), settings=decides, **asked)

    decides["input"] = files.named
    first, last = part_of(files.sizes, shard) if shard else (0, len(files.paths))
    text_bytes = np.array([size * UNPACKED.get(os.path.splitext(path)[1].lower(), 1)
                           for path, size in zip(files.paths, files.sizes.tolist())])
    # Every shard trains its tokenizer on a sample of all files, so that all get the same one.
    everything = from_files(reader, files.paths, 0, len(files.paths))
    return write_dataset(from_files(reader, files.paths, first, last), settings=decides,
                         input_bytes=int(text_bytes[first:last].sum()),
                         sample=(everything, int(text_bytes.sum())), **asked)
