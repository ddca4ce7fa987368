"""Any text -> token bins that train.py reads.

    python prepare.py --input='texts/*.txt' --out_dir=data/mine                   # a vocabulary of 16,000, trained
    python prepare.py --input=a.jsonl.gz,folder --out_dir=data/mine --tokenizer=byte
    python prepare.py --input='tokens/*.npy' --out_dir=data/mine --tokenizer=gpt2 # ids that others made
    python prepare.py validate --data_dir=data/mine                               # reads everything again, a report
    python prepare.py split --data_dir=tokens --out_dir=data/mine --tokenizer=gpt2 # train and val, nothing copied

Input: files, globs and folders (searched through) of .txt .md .jsonl, each also as .gz or .zst, and .parquet. A line of
.jsonl and a row of .parquet is one document under `text_key`; a text file is one document, cut near every `cut_chars`
characters at a blank line (else a line, else a space). Exact duplicates and empty documents are dropped and counted.
Budgets end with a whole document and leave a data set like any other; `stopped_by` says which one it was.
Tokenising runs at several MB of text per second and core. Stopped or killed, the same command goes on where it was;
the bins are the same for any number of processes. A finished folder is left alone.
Token ids instead of text: .npy .pt .bin .arrow .feather, and .parquet without a text; formats.py says which. Their
tokenizer has to be named, or else their number and the one that ends a document: --vocab_size=50257 --eot_id=50256.
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

from configurator import configure, read_settings

input = ""  # files, globs or folders, separated by commas
out_dir = ""  # folder to write: train.bin, val.bin, meta.json, tokenizer/
tokenizer = "bpe:16000"  # byte, bpe:N (trained on this text), gpt2, cl100k_base, o200k_base, or a tokenizer folder
max_tokens = 0  # budgets, 0 for none: stop with the document that reaches so many tokens,
max_bytes = 0  # with the one that reaches so many bytes of text,
max_disk_gb = 0.0  # or before the one with which the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents to keep, by a hash of their text: 0.01 is within 0.1; all of it is read
num_proc = 0  # tokenising processes; 0: one per core, at most 8
val_fraction = 0.005  # share of the documents that goes to val.bin, chosen by a hash of their text
text_key = "text"  # field of a .jsonl line, column of a .parquet file
cut_chars = 1_000_000  # characters of a text file that make one document at most
on_bad_utf8 = "replace"  # bytes that are not UTF-8: replace (by U+FFFD, counted) or refuse
on_bad_line = "refuse"  # a .jsonl line that is no JSON or lacks text_key: refuse or skip (counted)
on_bad_file = "refuse"  # a file that is damaged or cut short: refuse, or skip the rest of it (counted)
source = ""  # where the text comes from, for meta.json
licence = ""  # its licence, for meta.json
follow_links = 0  # 1: links found in a folder or by a glob may lead out of it
# token ids
vocab_size = 0  # how many ids there are, where their tokenizer is not at hand
eot_id = -1  # with vocab_size: the id that ends a document; -1: none does
pad_id = -1  # the id that rows are filled up with, left out; -1: that of the tokenizer
rows = "auto"  # rows are documents, packed (one stream cut into rows), or auto: packed when eot_id lies inside them
sequence_length = 0  # tokens a row must have, 0: any; split: tokens of a sequence where there are no rows
token_dtype = ""  # type of the ids in .bin files without a header; empty: uint16
token_key = ""  # column of ids in .arrow, .feather, .parquet; empty: input_ids
# validate and split
data_dir = ""  # a prepared folder, or one with files of token ids
tokens_per_s = 0.0  # validate: a measured rate, for the time that training takes; or --out_dir=RUN, which logged one
val_ratio = 0.01  # split: share that goes to val
by = ""  # split: sequence, document or file; empty: sequence where there are rows, else document
seed = 0  # split: another one, another choice
symlink = 0  # split: 1 by file, with folders train/ and val/ of relative links
command = sys.argv[1] if sys.argv[1:2] in (["validate"], ["split"]) else "prepare"
config = configure(globals(), sys.argv[1 + (command != "prepare") :])
defaults = {name: value for name, (value, _) in read_settings(__file__).items()}

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

from bins import DataError
from documents import BAD_FILE, one_message, write_dataset
from formats import ID_SUFFIXES, files_of_ids, holds_ids, links_stay
from pretokenised import open_input, read_documents
from splitting import make_split
from validation import validate_folder, validate_input
from workers import cut

SUFFIXES = (".txt", ".md", ".jsonl")
UNPACKED = {".gz": 2.6, ".zst": 3.0, ".parquet": 2.0}  # usual bytes of text per byte, for the bar and the disk check
OF_IDS = ("tokenizer", "vocab_size", "eot_id", "pad_id", "rows", "sequence_length", "token_dtype", "token_key")
OF_TEXT = ("text_key", "cut_chars", "on_bad_utf8", "on_bad_line", "on_bad_file", "max_bytes", "num_proc")
MAX_LINE = 64_000_000  # bytes; a longer .jsonl line is a bad line: it would not fit the memory promise


# ---------------------------------------------------------------------------------------------------------------------
# files -> documents


def kind(path):
    """Suffix of a path without .gz or .zst, "" when it is not an input."""
    stem = path.lower().removesuffix(".gz").removesuffix(".zst")
    return ".parquet" if path.lower().endswith(".parquet") else next((s for s in SUFFIXES if stem.endswith(s)), "")


def find_inputs(patterns):
    """Comma-separated files, globs and folders -> sorted paths; DataError for a pattern that finds nothing usable."""
    expected = f"expected {', '.join(SUFFIXES)} (also .gz, .zst), .parquet, or token ids: {', '.join(ID_SUFFIXES)}"
    paths = set()
    for pattern in filter(None, patterns.split(",")):
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not found:
            raise DataError(f"--input={pattern}: no such file or folder, and as a glob it matches nothing")
        base = pattern if os.path.exists(pattern) else os.path.dirname(re.split(r"[*?\[]", pattern)[0]) or "."
        for path in found:
            if os.path.isdir(path):
                everything = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
                of_ids = [p for p in everything if p.lower().endswith(ID_SUFFIXES)]
                inside = [p for p in everything if kind(p)] or of_ids
                if not any(map(os.path.isfile, inside)):
                    raise DataError(f"--input={path}: no text in this folder, {expected}")
                paths.update(filter(os.path.isfile, links_stay(base, inside, follow_links)))
            elif not kind(path) and not path.lower().endswith((*ID_SUFFIXES, ".idx")):
                raise DataError(f"{path}: unknown kind of file, {expected}")
            elif not path.lower().endswith(".idx"):  # of Megatron-LM, read with its .bin
                paths.update(links_stay(base, [path], follow_links))
    return sorted(paths)


def open_binary(path):
    """A file, unpacked while it is read."""
    if path.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path), 2**20)
    if path.lower().endswith(".zst"):
        return io.BufferedReader(zstd.open(path), 2**20)
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
        raise EOFError(f"not a whole .parquet file: {error}") from None


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
            except (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
                if on_bad_file == "refuse":
                    raise DataError(f"{path}: damaged or cut short ({error}); get it again, or go on without the rest "
                                    "of it by --on_bad_file=skip") from None
                print(f"{path}: damaged or cut short ({error}); the rest of it is skipped", file=sys.stderr, flush=True)
                yield BAD_FILE, None, [number + 1, 0]

    return documents


# ---------------------------------------------------------------------------------------------------------------------
# commands


def prepare():
    """Text -> bins; returns the summary."""
    if not input or not out_dir or data_dir:
        raise DataError("expected: python prepare.py --input=GLOB[,GLOB] --out_dir=DIR, or: python prepare.py validate "
                        "--data_dir=DIR; --help lists all settings")
    only(*set(config) - {"data_dir", "tokens_per_s", "val_ratio", "by", "seed", "symlink"})
    if on_bad_utf8 not in ("replace", "refuse") or not {on_bad_line, on_bad_file} <= {"refuse", "skip"} or (
            cut_chars < 100):
        raise DataError(f"--on_bad_utf8={on_bad_utf8} --on_bad_line={on_bad_line} --on_bad_file={on_bad_file} "
                        f"--cut_chars={cut_chars}: expected replace or refuse, twice refuse or skip, at least 100")
    paths = find_inputs(input)
    sizes = [os.path.getsize(path) for path in paths]
    if not any(sizes):
        raise DataError(f"--input={input}: {'the file is' if len(paths) == 1 else 'all files are'} empty")
    names = hashlib.sha256(json.dumps([paths, sizes]).encode()).hexdigest()[:16]
    files = f"{len(paths)} files, names and sizes {names}"
    if ids := [path for path in paths if holds_ids(path, token_key, text_key)]:
        if texts := sorted({*paths} - {*ids}):
            raise DataError(f"{ids[0]} holds token ids, {texts[0]} text: prepare them apart")
        if ignored := " ".join(f"--{name}" for name in changed(OF_TEXT)):
            raise DataError(f"{ignored}: only texts have such a thing, and {ids[0]} holds token ids")
        found = open_input(paths, **{name: config[name] for name in OF_IDS})
        decides = {"input": files, "pad_id": found.pad_id, "packed": found.packed, "token_dtype": token_dtype,
                   "token_key": token_key}
        return write_dataset(read_documents(*found[:2], *found[3:5]), out_dir, found.spec, val_fraction, max_tokens, 1,
                             decides, 0, source or input, licence, input_tokens=sum(s.tokens for s in found.sources),
                             fraction=fraction, max_disk_gb=max_disk_gb)
    if of_ids := " ".join(f"--{name}" for name in changed(OF_IDS) if name != "tokenizer"):
        raise DataError(f"{of_ids}: only token ids have such a thing, and {paths[0]} holds text")
    decides = {"input": files, "text_key": text_key, "cut_chars": cut_chars, "on_bad_utf8": on_bad_utf8,
               "on_bad_line": on_bad_line}
    input_bytes = sum(size * UNPACKED.get(os.path.splitext(path)[1].lower(), 1) for path, size in zip(paths, sizes))
    return write_dataset(read_files(paths), out_dir, tokenizer, val_fraction, max_tokens, num_proc, decides,
                         int(input_bytes), source or input, licence, max_bytes=max_bytes, fraction=fraction,
                         max_disk_gb=max_disk_gb)


def changed(names):
    """Those of the settings `names` that are not the defaults, {name: value}."""
    return {name: config[name] for name in names if config[name] != defaults[name]}


def only(*names):
    """DataError for a setting that the command would ignore."""
    if ignored := " ".join(f"--{name}" for name in changed(config) if name not in names):
        takes = " ".join(f"--{name}" for name in config if name in names)
        raise DataError(f"{ignored}: {command} takes {takes} and no other setting")


def validate():
    """Prints a report of a prepared folder, or of files of token ids; returns it as a dict."""
    if bool(data_dir) == bool(input):
        raise DataError("expected: python prepare.py validate --data_dir=DIR, or, for files of token ids, "
                        "python prepare.py validate --input=GLOB --tokenizer=...")
    prepared = any(os.path.exists(os.path.join(data_dir, name)) for name in ("meta.json", "progress.json"))
    if data_dir and (prepared or not files_of_ids(data_dir)):
        only("data_dir", "out_dir", "tokens_per_s")
        return validate_folder(data_dir, out_dir, tokens_per_s)
    only("data_dir", "input", "out_dir", "tokens_per_s", "follow_links", *OF_IDS)
    paths = find_inputs(input or data_dir)
    if texts := [path for path in paths if not holds_ids(path, token_key, text_key)]:
        raise DataError(f"{texts[0]} is text: make bins of it with python prepare.py --input={texts[0]} --out_dir=DIR")
    found = open_input(paths, **{name: config[name] for name in OF_IDS})
    return validate_input(input or data_dir, found, changed(OF_IDS), out_dir, tokens_per_s)


def split():
    """Train and val of a prepared folder or of files of token ids, nothing copied; returns the summary."""
    if not data_dir or not out_dir:
        raise DataError("expected: python prepare.py split --data_dir=DIR --out_dir=DIR --val_ratio=0.01")
    only("data_dir", "out_dir", "val_ratio", "by", "seed", "symlink", "follow_links", *OF_IDS)
    return make_split(data_dir, out_dir, changed(OF_IDS), follow_links, val_ratio, by, seed, symlink)


with one_message():
    print(json.dumps({"validate": validate, "split": split, "prepare": prepare}[command]()))
