"""Data sets of the Hugging Face hub as documents, streamed by `datasets`: raw text never lies on disk.

`prepare` is all that data/NAME/prepare.py call. A repository is read at one commit, which meta.json names and a resumed
run keeps. A position is [part, [file, state, row], documents, bytes]: `state` is what IterableDataset.state_dict() gave
before a batch of rows; then come the rows of that batch and the documents made of later rows that are already done, and
the bytes of val so far. A run that goes on passes over the current file up to there, and opens none of those before it.
A connection that breaks is taken up again for some minutes; for a network that is away for longer:

    until python data/owt/prepare.py --max_disk_gb=4; do sleep 60; done

WikiText for data/wikitext2 and data/wikitext103: lines, from the hub or from a folder, -> articles.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import time

from data.bins import DataError
from data.documents import BAD_FILE, smallest, utf8, write_dataset
from data.workers import cut

READ_ROWS = 256  # rows taken from `datasets` at a time; positions count in them
READERS = {"parquet": {"batch_size": READ_ROWS}, "json": {"chunksize": 2**22}, "text": {"keep_linebreaks": True}}
RETRIES = 6  # a stream that breaks is taken up again after 1, 2, 4 ... 32 s; huggingface_hub has tried 5 times before
SAMPLE_FROM = 500_000_000  # bytes of text that a bpe:N vocabulary is made from: they are downloaded twice
VAL_SHARE = 0.1  # of a budget, at most, goes to an official validation part, which is read first


# ---------------------------------------------------------------------------------------------------------------------
# rows -> documents: (text, place before it, place after it) -> (document, place, documents made since that place)


def whole(rows):
    """A row is a document."""
    for text, _, after in rows:
        yield text, after, 0


def pieces(rows, size=10_000):
    """A row is cut into documents of at most `size` characters, which join to it."""
    for text, before, after in rows:
        parts = cut(text, size) if isinstance(text, str) else [text]
        for n, part in enumerate(parts, 1):
            yield (part, before, n) if n < len(parts) else (part, after, 0)


# ---------------------------------------------------------------------------------------------------------------------
# the hub, or a folder laid out like it


@functools.cache
def library():
    """The datasets library, quiet and without what would lose text or time."""
    import datasets  # a second; a folder that is complete needs none of it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.config.TORCH_AVAILABLE = False  # else it loads torch: seconds, and 200 MB
    # Its own retries repeat a read of the *unpacked* file, after which text is missing; ours start from a known place.
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
    return datasets


def find_files(hub, name, commit, patterns):
    """-> (kind of file, {split: paths or URLs}) of a data set; Unavailable when it cannot be had."""
    try:
        builder = library().load_dataset_builder(hub, name, revision=commit, data_files=patterns)
        if builder.name not in READERS:
            raise ValueError(f"{builder.name} files, expected one of {', '.join(READERS)}")
        return builder.name, {str(split): list(files) for split, files in builder.config.data_files.items()}
    except Exception as error:  # whatever the library, the connection or a README raises
        raise unavailable(hub, error) from None


class Unavailable(DataError):
    """A data set that is not there, or not for us."""


def unavailable(hub, error):
    """An error while looking for a data set -> Unavailable with what helps."""
    there = f" (there is: {', '.join(sorted(os.listdir(hub))[:20])})" if os.path.isdir(hub) else ""
    return Unavailable(f"--hub={hub} cannot be read{there}: {described(error)}. Give --hub=FOLDER with a local copy "
                       "laid out like the repository, README.md included, or --hub=OWNER/NAME with another on the hub")


def described(error):
    """Kind and text of an error in one line."""
    error = error.__cause__ if type(error) is ConnectionError and error.__cause__ else error  # "Server Disconnected"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def pinned(hub, revision, out_dir):
    """Settings that say which bytes are read of a repository. A run that goes on keeps its commit and asks nobody."""
    asked = {"hub": hub, "revision": revision}
    for begun in ("meta.json", "progress.json"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            with open(os.path.join(out_dir, begun), encoding="utf-8") as file:
                settings = json.load(file)["settings"]
            if asked == {name: settings[name] for name in asked}:
                return {**asked, "commit": settings["commit"]}
    try:
        from huggingface_hub import HfApi

        return {**asked, "commit": HfApi().dataset_info(hub, revision=revision or None, timeout=30).sha}
    except Exception as error:  # not found, gated, offline, no such revision, no such host
        raise unavailable(hub, error) from None


def open_stream(path, kind):
    """A file -> IterableDataset of its column `text`, as Arrow tables; DataError without such a column.

    Not reshard()ed: with a row group a shard, each is opened anew, which doubles what is downloaded (measured).
    """
    stream = library().load_dataset(kind, data_files=[path], split="train", streaming=True, **READERS[kind])
    features = stream.features  # unknown for text, and for JSON that is damaged: reading it will tell
    if features and getattr(features.get("text"), "dtype", "") not in ("string", "large_string"):
        there = ", ".join(f"{name} ({getattr(value, 'dtype', 'nested')})" for name, value in features.items())
        raise DataError(f"{path}: no column of strings 'text' (there is: {there}): not this data set")
    return stream.select_columns(["text"]).with_format("arrow")


def read_rows(files, place, open_file, on_bad_file):
    """Yields (text, place before it, place after it) of the files from `place` on, BAD_FILE for the rest of a bad one.

    Stops with DataError when a stream stays broken, or at a damaged file unless on_bad_file is skip.
    """
    first, state, done = place or [0, None, 0]
    for number in range(first, len(files)):
        failures, finished = 0, False
        while not finished:
            try:
                stream = open_file(files[number])
                if state:
                    stream.load_state_dict(state)
                for batch in stream.iter(READ_ROWS):
                    texts = batch.column(0).to_pylist()
                    for row in range(done, len(texts)):
                        yield texts[row], [number, state, row], [number, state, row + 1]
                    state, done, failures = stream.state_dict(), 0, 0
                finished = True
            except DataError:
                raise
            except Exception as error:  # whatever the connection, an unpacker or a parser raises
                failures += 1
                finished = failed(files[number], error, failures, on_bad_file)
                if finished:
                    yield BAD_FILE, [number, state, done], [number + 1, None, 0]
        state, done = None, 0


def failed(path, error, failures, on_bad_file):
    """Waits before the next attempt -> False, or says that a file is skipped -> True, or raises DataError."""
    message, remote = f"{path}: {described(error)}", "://" in path
    if remote and failures <= RETRIES:
        print(f"{message}; going on in {2 ** (failures - 1)} s", file=sys.stderr, flush=True)
        time.sleep(2 ** (failures - 1))
        return False
    # Connections raise kinds of OSError. ArrowInvalid, UnicodeDecodeError and what JSON parsers raise are ValueErrors;
    # a damaged page of a .parquet file is an OSError without a number.
    damaged = isinstance(error, (ValueError, EOFError)) or "zstd" in type(error).__module__ or (
        type(error) is OSError and error.errno is None)
    if remote and not damaged:
        raise DataError(f"{message}. {RETRIES} attempts to go on failed; what was finished is kept, the same command "
                        "goes on from there")
    if on_bad_file != "skip":
        raise DataError(f"{message}: damaged or cut short; get it again, or go on without the rest of it by "
                        "--on_bad_file=skip")
    print(f"{message}; the rest of this file is skipped", file=sys.stderr, flush=True)
    return True


def read_parts(splits, position, open_file, on_bad_file, make_documents, val_limit):
    """`documents` of write_dataset from [("val", "train" or None, files)]; of val about val_limit bytes, 0: all."""
    first, place, skip, n_val = position or [0, None, 0, 0]
    for number in range(first, len(splits)):
        part, files = splits[number]
        made = make_documents(read_rows(files, place, open_file, on_bad_file))
        made = itertools.islice(made, skip, None)
        while not (part == "val" and val_limit and n_val >= val_limit) and (document := next(made, None)):
            text, place, n = document
            n_val += len(utf8(text)) if part == "val" and isinstance(text, str) else 0
            yield text, part, [number, place, n, n_val]
        place, skip = None, 0


# ---------------------------------------------------------------------------------------------------------------------
# what the scripts call


def prepare(hub, parts, out_dir, tokenizer, max_tokens, max_bytes, fraction, max_disk_gb, num_proc, on_bad_file,
            revision="", val_fraction=0.0, name=None, patterns=None, lines=None, make_documents=whole, text_bytes=0,
            licence=""):
    """Prepares a data set of the hub, or of a folder laid out like it -> summary. DataError, OSError.

    hub to val_fraction are settings of the scripts. parts: {"val": its split there, "train": its split}, read in this
    order; a single part is split by hash. name: the configuration on the hub; patterns: {split: files} where it has
    none; lines: {split: [path]} of text files to read line by line instead. text_bytes: UTF-8 in all, for the bar.
    """
    if on_bad_file not in ("refuse", "skip"):
        raise DataError(f"--on_bad_file={on_bad_file}: expected refuse or skip")

    @functools.cache
    def listing(commit=None):
        kind, found = ("text", lines) if lines else find_files(hub, name, commit, patterns)
        if missing := [split for split in parts.values() if not found.get(split)]:
            raise DataError(f"--hub={hub}: no split {' or '.join(missing)}; there is: {', '.join(found)}")
        return kind, [(part if len(parts) > 1 else None, found[split]) for part, split in parts.items()]

    if os.path.isdir(hub):
        paths = [path for _, files in listing()[1] for path in files]
        sizes = {os.path.relpath(path, os.path.realpath(hub)): os.path.getsize(path) for path in paths}
        if outside := [path for path in sizes if path.startswith("..")]:
            raise DataError(f"--hub={hub}: its README.md names {outside[0]}, which is not in that folder")
        names = hashlib.sha256(json.dumps(sorted(sizes.items())).encode()).hexdigest()[:16]
        decides, text_bytes = {"hub": f"{len(sizes)} files, names and sizes {names}"}, 2 * sum(sizes.values())
    else:
        decides = pinned(hub, revision, out_dir)
    budgets = smallest(max_tokens, max_bytes, max_disk_gb * 1e9 / 2)  # a token is a byte at least, two on disk

    def documents(position):
        kind, splits = listing(decides.get("commit"))
        open_file = functools.partial(open_stream, kind=kind)
        yield from read_parts(splits, position, open_file, on_bad_file, make_documents, budgets * VAL_SHARE / fraction)

    return write_dataset(
        documents, out_dir, tokenizer, val_fraction, max_tokens, num_proc,
        {**decides, "name": name}, text_bytes, f"{hub} {name or ''}".strip(), licence,
        max_bytes=max_bytes, fraction=fraction, max_disk_gb=max_disk_gb, sample_bytes=smallest(SAMPLE_FROM, max_bytes))


TITLE = re.compile(r" = [^=\n]+ = *\n")  # == is a section, ` = = Section = = ` in this data
OLD_FILES = {split: (f"{name}.txt", f"wiki.{name}.raw", f"wiki.{name}.tokens")  # as in the original archives
             for split, name in (("validation", "valid"), ("train", "train"))}


def articles(rows):
    """A row is a line of WikiText: a document is an article, from its ` = Title = ` to the next one."""
    lines, end = [], None
    for text, before, after in rows:
        if text is BAD_FILE or TITLE.match(text or ""):
            if lines:
                yield "".join(lines), before, 0
            lines = []
        if text is BAD_FILE:
            yield text, after, 0
        elif lines or TITLE.match(text or ""):
            lines.append(text or "")
        end = after
    if lines:
        yield "".join(lines), end, 0


def old_files(folder):
    """{split: [path]} of the text files in `folder`, {} when there are none; DataError unless there is one a split."""
    found = {split: [path for name in names if os.path.isfile(path := os.path.join(os.path.realpath(folder), name))]
             for split, names in OLD_FILES.items()}
    if any(found.values()) and [len(paths) for paths in found.values()] != [1, 1]:
        raise DataError(f"{folder}: expected one of {', '.join(OLD_FILES['train'])}, and one of "
                        f"{', '.join(OLD_FILES['validation'])}; there is: {', '.join(sorted(os.listdir(folder))[:20])}")
    return found if any(found.values()) else {}


def prepare_wikitext(name, text_bytes, input, hub, *settings):
    """hub.prepare with the official validation part as val, read first: it keeps an article that both parts have.

    name: configuration on the hub. settings: those of hub.prepare from out_dir to revision.
    """
    if input and hub != "Salesforce/wikitext":
        raise DataError(f"--input={input} --hub={hub}: expected one of them")
    try:
        return prepare(input or hub, {"val": "validation", "train": "train"}, *settings, name=name,
                       lines=old_files(input or hub), make_documents=articles, text_bytes=text_bytes,
                       licence="CC BY-SA 3.0, GFDL")
    except Unavailable as error:
        raise DataError(f"{error}; or --input=FOLDER with train.txt and valid.txt") from None
