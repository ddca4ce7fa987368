"""Any text -> token bins that train.py reads.

    python prepare.py --input='texts/*.txt' --out_dir=data/mine                   # a vocabulary of 16,000, trained
    python prepare.py --input=a.jsonl.gz,folder --out_dir=data/mine --tokenizer=byte
    python prepare.py validate --data_dir=data/mine                               # reads everything again

Input: files, globs and folders (searched through) of .txt .md .jsonl, each also as .gz or .zst, and .parquet. A line of
.jsonl and a row of .parquet is one document under `text_key`; a text file is one document, cut near every `cut_chars`
characters at a blank line (else a line, else a space). Exact duplicates and empty documents are dropped and counted.
Tokenising runs at several MB of text per second and core. Stopped or killed, the same command goes on where it was;
the bins are the same for any number of processes. A finished folder is left alone.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import sys
import zlib

from configurator import configure, read_settings

input = ""  # files, globs or folders, separated by commas
out_dir = ""  # folder to write: train.bin, val.bin, meta.json, tokenizer/
tokenizer = "bpe:16000"  # byte, bpe:N (trained on this text), gpt2, cl100k_base, o200k_base, or a tokenizer folder
max_tokens = 0  # stop after this many tokens, at the end of a document; 0: all
num_proc = 0  # tokenising processes; 0: one per core, at most 8
val_fraction = 0.005  # share of the documents that goes to val.bin, chosen by a hash of their text
text_key = "text"  # field of a .jsonl line, column of a .parquet file
cut_chars = 1_000_000  # characters of a text file that make one document at most
on_bad_utf8 = "replace"  # bytes that are not UTF-8: replace (by U+FFFD, counted) or refuse
on_bad_line = "refuse"  # a .jsonl line that is no JSON or lacks text_key: refuse or skip (counted)
source = ""  # where the text comes from, for meta.json
licence = ""  # its licence, for meta.json
data_dir = ""  # validate: the folder to check
validating = sys.argv[1:2] == ["validate"]
config = configure(globals(), sys.argv[1 + validating :])

import numpy as np
import zstandard

from bins import SPLITS, DataError, check_files, load_meta, scan, unigram_entropy
from documents import one_message, write_dataset
from shards import TokenData
from tokenizer import Tokenizer
from workers import cut

SUFFIXES = (".txt", ".md", ".jsonl")
UNPACKED = {".gz": 2.6, ".zst": 3.0, ".parquet": 2.0}  # usual bytes of text per byte, for the bar and the disk check
MAX_LINE = 64_000_000  # bytes; a longer .jsonl line is a bad line: it would not fit the memory promise


# ---------------------------------------------------------------------------------------------------------------------
# files -> documents


def kind(path):
    """Suffix of a path without .gz or .zst, "" when it is not an input."""
    stem = path.lower().removesuffix(".gz").removesuffix(".zst")
    return ".parquet" if path.lower().endswith(".parquet") else next((s for s in SUFFIXES if stem.endswith(s)), "")


def find_inputs(patterns):
    """Comma-separated files, globs and folders -> sorted paths; DataError for a pattern that finds nothing usable."""
    paths, expected = set(), f"expected {', '.join(SUFFIXES)} (also .gz, .zst) or .parquet"
    for pattern in filter(None, patterns.split(",")):
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not found:
            raise DataError(f"--input={pattern}: no such file or folder, and as a glob it matches nothing")
        for path in found:
            if os.path.isdir(path):
                inside = [p for p in glob.glob(os.path.join(glob.escape(path), "**"), recursive=True) if kind(p)]
                if not any(map(os.path.isfile, inside)):
                    raise DataError(f"--input={path}: no text in this folder, {expected}")
                paths.update(filter(os.path.isfile, inside))
            elif not kind(path):
                raise DataError(f"{path}: unknown kind of file, {expected}")
            else:
                paths.add(path)
    return sorted(paths)


def open_binary(path):
    """A file, unpacked while it is read."""
    if path.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path), 2**20)
    if path.lower().endswith(".zst"):
        reader = zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(reader, 2**20)
    return open(path, "rb")


def not_utf8(path, offset):
    return DataError(f"{path}: not UTF-8 at byte {offset:,}; convert the file, or give --on_bad_utf8=replace")


def read_text(path, errors):
    """Yields the documents of a text file: the whole file, or pieces of at most cut_chars that join to it."""
    decoder, rest, offset, block = codecs.getincrementaldecoder("utf-8")(errors), "", 0, b"\0"
    with open_binary(path) as file:
        while block:
            block, pending = file.read(2**20), len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise not_utf8(path, offset - pending + error.start) from None
            rest += text if offset else text.removeprefix("\ufeff")  # a byte order mark is no text
            offset += len(block)
            *pieces, rest = cut(rest, cut_chars)
            yield from pieces
    yield rest


def read_jsonl(path, errors):
    """Yields the text of each line that is not blank, None for a bad line that is to be skipped."""
    offset = 0
    with open_binary(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            try:
                text = line.decode("utf-8", errors).removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}:{number}", offset + error.start) from None
            offset += len(line)
            if not text.isspace():
                try:
                    yield json_text(text)
                except ValueError as error:
                    if on_bad_line == "refuse":
                        raise DataError(f"{path}:{number}: {error}; mend it, or give --on_bad_line=skip") from None
                    yield None


def json_text(line):
    """A .jsonl line -> its text; ValueError says what is wrong."""
    if len(line) >= MAX_LINE // 4 and not line.endswith("\n"):
        raise ValueError(f"a line of more than {MAX_LINE // 4:,} characters")
    try:
        value = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
        there = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"no text under {text_key!r} (there is: {there[:200]}), set --text_key")
    return value[text_key]


def read_parquet(path, errors):
    """Yields the strings of the text_key column, None for a missing one; UTF-8 is checked by the file format."""
    import pyarrow  # half a second, and only this kind of file needs it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = {field.name: field.type for field in file.schema_arrow}
            if not (text_key in columns and str(columns[text_key]) in ("string", "large_string")):
                there = ", ".join(f"{name} ({type})" for name, type in columns.items())
                raise DataError(f"{path}: no column of strings {text_key!r} (there is: {there}), set --text_key")
            for batch in file.iter_batches(256, columns=[text_key], use_threads=False):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole .parquet file ({error})") from None


def read_files(paths):
    """Paths -> `documents` for write_dataset; a position is [number of the file, documents read from it]."""
    errors = "strict" if on_bad_utf8 == "refuse" else "replace"
    readers = {".jsonl": read_jsonl, ".parquet": read_parquet, ".txt": read_text, ".md": read_text}

    def documents(position):
        first, skip = position or (0, 0)
        for number in range(first, len(paths)):
            path = paths[number]
            try:
                for n, text in enumerate(readers[kind(path)](path, errors), 1):
                    if number > first or n > skip:
                        yield text, None, [number, n]
            except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
                raise DataError(f"{path}: damaged or cut short ({error}); get it again") from None

    return documents


# ---------------------------------------------------------------------------------------------------------------------
# commands


def prepare():
    """Text -> bins; returns the summary."""
    if not input or not out_dir or data_dir:
        raise DataError("expected: python prepare.py --input=GLOB[,GLOB] --out_dir=DIR, or: python prepare.py validate "
                        "--data_dir=DIR; --help lists all settings")
    if on_bad_utf8 not in ("replace", "refuse") or on_bad_line not in ("refuse", "skip") or cut_chars < 100:
        raise DataError(f"--on_bad_utf8={on_bad_utf8} --on_bad_line={on_bad_line} --cut_chars={cut_chars}: expected "
                        "replace or refuse, refuse or skip, at least 100")
    paths = find_inputs(input)
    sizes = [os.path.getsize(path) for path in paths]
    if not any(sizes):
        raise DataError(f"--input={input}: {'the file is' if len(paths) == 1 else 'all files are'} empty")
    names = hashlib.sha256(json.dumps([paths, sizes]).encode()).hexdigest()[:16]
    decides = {"input": f"{len(paths)} files, names and sizes {names}", "text_key": text_key, "cut_chars": cut_chars,
               "on_bad_utf8": on_bad_utf8, "on_bad_line": on_bad_line}
    input_bytes = sum(size * UNPACKED.get(os.path.splitext(path)[1].lower(), 1) for path, size in zip(paths, sizes))
    return write_dataset(read_files(paths), out_dir, tokenizer, val_fraction, max_tokens, num_proc, decides,
                         int(input_bytes), source or input, licence)


def validate():
    """Reads all of `data_dir` again and compares it with its meta.json; prints a report, returns it as a dict."""
    defaults = {name: default for name, (default, _) in read_settings(__file__).items()}
    if not data_dir or config != {**defaults, "data_dir": data_dir}:
        raise DataError("expected: python prepare.py validate --data_dir=DIR, and no other setting")
    meta, problems, counts = load_meta(data_dir), [], {}
    try:
        n_bytes = Tokenizer.load(os.path.join(data_dir, meta["tokenizer"])).n_bytes
    except ValueError as error:
        raise DataError(str(error)) from None
    for split in SPLITS:
        counts[split] = np.zeros(meta["n_vocab"] + 1, np.int64)
        for (path, _), file in zip(check_files(data_dir, meta, split), meta["splits"][split]["files"]):
            sha256, found = scan(path, np.dtype(meta["dtype"]), meta["n_vocab"])
            counts[split] += found
            if sha256 != file["sha256"]:
                problems.append(f"{path}: sha256 {sha256[:16]}..., written as {file['sha256'][:16]}...: changed since")
        about, ids = meta["splits"][split], counts[split][:-1]
        for what, found, expected in (("ids outside the vocabulary", int(counts[split][-1]), 0),
                                      ("documents", int(ids[meta["eot_id"]]), about["documents"]),
                                      ("bytes of text", int(ids @ n_bytes[: len(ids)]), about["bytes"])):
            print(f"{split}: {found:,} {what}")
            if found != expected:
                problems.append(f"{split}: {found:,} {what}, expected {expected:,}")
    entropy = unigram_entropy(counts["train"][:-1], meta["eot_id"])
    if abs(entropy - meta["unigram_entropy"]) > 1e-6:
        problems.append(f"unigram entropy {entropy:.6f} nats, meta.json says {meta['unigram_entropy']:.6f}")
    if problems:
        raise DataError("\n".join([*problems, f"made by: {meta['command']}"]))
    tokens = {f"{split}_tokens": TokenData(data_dir, split, 1).n_tokens for split in SPLITS}
    return {"data_dir": data_dir, "valid": True, **tokens, "unigram_entropy": entropy}


with one_message():
    print(json.dumps(validate() if validating else prepare()))
