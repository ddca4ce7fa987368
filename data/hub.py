"""Data sets of the Hugging Face hub -> bins, streamed by `datasets`: raw text is never stored.

`prepare` and `prepare_wikitext` are all that data/NAME/prepare.py call. In order:

    find_files    which files a repository has, at one commit; meta.json names it, a resume keeps it
    read_rows     the column `text` of these files, row by row; a broken connection is retried
    whole, pieces, articles     rows -> documents
    read_parts    the official validation part as val, then train -> `documents` of write_dataset

To go on exactly where it was, a run remembers with each document the place of the rows that it came
from. A place is [file, state, row]: `state` is what IterableDataset.state_dict() gave before the
current batch of rows, `row` counts in that batch. A position is [part, place, documents, bytes]:
the documents already made from the rows after that place, and the bytes of val so far. A resumed
run reads the current file again up to its place, and none of the files before it.

For a network that is away for longer than the retries:

    until python data/owt/prepare.py --max_disk_gb=4; do sleep 60; done
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time

from data.bins import DataError
from data.documents import BAD_FILE, one_message, smallest, utf8, write_dataset
from data.workers import cut
from data.writer import begun_settings

READ_ROWS = 256  # rows taken from `datasets` at a time; states are taken between these batches
READERS = {  # kinds of files: options of `datasets`
    "parquet": {"batch_size": READ_ROWS},
    "json": {"chunksize": 2**22},
    "text": {"keep_linebreaks": True},
}
RETRIES = 6  # after 1, 2, 4 ... 32 s, in addition to the 5 attempts of huggingface_hub
SAMPLE_FROM = 500_000_000  # bytes of text to train a bpe:N vocabulary on; they are downloaded twice
VAL_SHARE = 0.1  # of a budget, at most, goes to an official validation part, which is read first


# --------------------------------------------------------------------------------------------------
# what there is on the hub, or in a folder laid out like it


class Unavailable(DataError):
    """A data set that does not exist, or that this user may not read."""


def unavailable(hub, error):
    """An error while looking for a data set -> Unavailable, with what the user can do."""
    there = ""
    if os.path.isdir(hub):
        there = f" (there is: {', '.join(sorted(os.listdir(hub))[:20])})"
    return Unavailable(f"--hub={hub} cannot be read{there}: {described(error)}. Give --hub=FOLDER "
                       "with a local copy laid out like the repository, README.md included, or "
                       "--hub=OWNER/NAME with another on the hub")


def described(error):
    """Kind and text of an error in one line."""
    if type(error) is ConnectionError and error.__cause__:
        error = error.__cause__  # else all that it says is "Server Disconnected"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@functools.cache
def library():
    """The datasets library, without its messages, torch and its own retries."""
    import datasets  # takes a second; a folder that is complete does not need it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    config = datasets.config
    config.TORCH_AVAILABLE = False  # else it loads torch: seconds, and 200 MB
    # Its retries read on in the *unpacked* file after a failed read, so text would be missing.
    # Ours start from a known place.
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    return datasets


def find_files(hub, name, commit, patterns):
    """-> (kind of file, {split: paths or URLs}) of a data set. Raises Unavailable.

    name: configuration, or None. patterns: {split: files} for a repository without configurations.
    """
    try:
        builder = library().load_dataset_builder(hub, name, revision=commit, data_files=patterns)
        if builder.name not in READERS:
            raise ValueError(f"{builder.name} files, expected one of {', '.join(READERS)}")
        found = {str(split): list(files) for split, files in builder.config.data_files.items()}
        return builder.name, found
    except Exception as error:  # the library, the connection and a README each raise their own kind
        raise unavailable(hub, error) from None


def pinned(hub, revision, out_dir):
    """-> {"hub", "revision", "commit"}: settings that say which bytes are read of a repository.

    A folder that was begun keeps its commit, and the hub is not asked again. Raises Unavailable.
    """
    asked = {"hub": hub, "revision": revision}
    begun = begun_settings(out_dir, before_text=True)
    if all(begun.get(name) == value for name, value in asked.items()) and "commit" in begun:
        return {**asked, "commit": begun["commit"]}
    try:
        from huggingface_hub import HfApi

        info = HfApi().dataset_info(hub, revision=revision or None, timeout=30)
        return {**asked, "commit": info.sha}
    except Exception as error:  # not found, gated, offline, no such revision, no such host
        raise unavailable(hub, error) from None


# --------------------------------------------------------------------------------------------------
# files -> rows


def open_stream(path, kind):
    """A file -> IterableDataset of its column `text`, as Arrow tables. DataError without one.

    It is not reshard()ed: that opens the file anew for each row group, which doubles what is
    downloaded (measured).
    """
    stream = library().load_dataset(kind, data_files=[path], split="train", streaming=True,
                                    **READERS[kind])
    features = stream.features  # None for text and for damaged JSON, where reading finds it out
    if features and getattr(features.get("text"), "dtype", "") == "null":
        raise ValueError("all its texts are null")
    if features and getattr(features.get("text"), "dtype", "") not in ("string", "large_string"):
        there = ", ".join(f"{name} ({getattr(value, 'dtype', 'nested')})"
                          for name, value in features.items())
        raise DataError(f"{path}: no column of strings 'text' (there is: {there}): not this data "
                        "set")
    return stream.select_columns(["text"]).with_format("arrow")


def read_rows(files, place, open_file, on_bad_file):
    """Yields (text, place before it, place after it) of the files from `place` on.

    BAD_FILE stands for the rest of a damaged file. Raises DataError when a stream stays broken, or
    at a damaged file unless on_bad_file is skip.
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
            except Exception as error:  # connections, unpackers and parsers raise their own kinds
                failures += 1
                finished = failed(files[number], error, failures, on_bad_file)
                if finished:
                    yield BAD_FILE, [number, state, done], [number + 1, None, 0]
        state, done = None, 0


def failed(path, error, failures, on_bad_file):
    """What to do after the nth failure in a row of reading a file.

    Waits and returns False for another attempt, returns True if the file is to be skipped, or
    raises DataError.
    """
    message = f"{path}: {described(error)}"
    is_remote = "://" in path
    if is_remote and failures <= RETRIES:
        wait_s = 2 ** (failures - 1)
        print(f"{message}; going on in {wait_s} s", file=sys.stderr, flush=True)
        time.sleep(wait_s)
        return False
    # Is the file damaged, or the connection? Connections raise kinds of OSError. ArrowInvalid,
    # UnicodeDecodeError and what JSON parsers raise are ValueErrors; a damaged page of a .parquet
    # file is an OSError without a number.
    is_damaged = (isinstance(error, (ValueError, EOFError)) or "zstd" in type(error).__module__
                  or type(error) is OSError and error.errno is None)
    if is_remote and not is_damaged:
        raise DataError(f"{message}. {RETRIES} attempts to go on failed; what was finished is "
                        "kept, the same command goes on from there")
    if on_bad_file != "skip":
        raise DataError(f"{message}: damaged or cut short; get it again, or go on without the rest "
                        "of it by --on_bad_file=skip")
    print(f"{message}; the rest of this file is skipped", file=sys.stderr, flush=True)
    return True


# --------------------------------------------------------------------------------------------------
# rows -> documents. Each function takes what read_rows yields and yields (document, place, n): to
# go on after it, read from `place` on and skip the first n documents.

# Of a WikiText article. A section is ` = = Section = = `, and a line of a table ` = Played , W = `
# may look the same, but does not stand between blank lines.
TITLE = re.compile(r" = [^=\n]+ = *\n")


def whole(rows):
    """A row is a document."""
    for text, _, after in rows:
        yield text, after, 0


def pieces(rows, size=10_000):
    """A row is cut into documents of at most `size` characters, which join to it."""
    for text, before, after in rows:
        parts = cut(text, size) if isinstance(text, str) else [text]
        for n, part in enumerate(parts, 1):
            if n < len(parts):
                yield part, before, n
            else:
                yield part, after, 0


def articles(rows):
    """A row is a line of WikiText. A document is an article, from ` = Title = ` to the next one."""
    lines, end, after_blank = [], None, True
    rows = itertools.pairwise(itertools.chain(rows, [(None, None, None)]))  # each with the next
    for (text, before, after), (following, *_) in rows:
        is_title = after_blank and is_blank(following) and not is_blank(text) and TITLE.match(text)
        after_blank = is_blank(text)
        if lines and (is_title or text is BAD_FILE):
            yield "".join(lines), before, 0
            lines = []
        if text is BAD_FILE:
            yield text, after, 0
        elif lines or is_title:
            lines.append(text or "")
        end = after
    if lines:
        yield "".join(lines), end, 0


def is_blank(text):
    return text in (None, BAD_FILE) or text.isspace() or not text


def read_parts(splits, position, open_file, on_bad_file, make_documents, val_limit):
    """Yields the `documents` of write_dataset from `position` on.

    splits: [("val" or "train" or None, files)], read in this order. val ends after about val_limit
    bytes; 0: all of it.
    """
    first, place, skip, n_val = position or [0, None, 0, 0]
    for number in range(first, len(splits)):
        part, files = splits[number]
        made = make_documents(read_rows(files, place, open_file, on_bad_file))
        made = itertools.islice(made, skip, None)
        limit = val_limit if part == "val" and val_limit else math.inf
        while n_val < limit:  # checked before another row is read
            document = next(made, None)
            if document is None:
                break
            text, place, n = document
            if part == "val" and isinstance(text, str):
                n_val += len(utf8(text))
            yield text, part, [number, place, n, n_val]
        place, skip = None, 0


# --------------------------------------------------------------------------------------------------
# what the scripts call


def prepare(settings, parts, **about):
    """Prepares a data set as data/NAME/prepare.py: prints the summary as JSON, or one message.

    settings: those of the script. parts, about: as for prepare_set.
    """
    with one_message():
        print(json.dumps(prepare_set(settings, settings["hub"], parts, **about)))


def prepare_set(settings, hub, parts, name=None, patterns=None, lines=None, make_documents=whole,
                text_bytes=0, licence=""):
    """A data set at `hub`, a repository or a folder laid out like one -> bins; returns the summary.

    parts: {"val": its split there, "train": its split}, read in this order; a single part is split
    by hash. name: the configuration on the hub. patterns: {split: files} where it has none. lines:
    {split: [path]} of local text files to read line by line instead. text_bytes: UTF-8 in all, for
    the bar. Raises DataError, OSError.
    """
    on_bad_file = settings["on_bad_file"]
    if on_bad_file not in ("refuse", "skip"):
        raise DataError(f"--on_bad_file={on_bad_file}: expected refuse or skip")

    @functools.cache
    def listing(commit=None):  # asked for late: a complete folder needs no network
        kind, found = ("text", lines) if lines else find_files(hub, name, commit, patterns)
        if missing := [split for split in parts.values() if not found.get(split)]:
            raise DataError(f"--hub={hub}: no split {' or '.join(missing)}; there is: "
                            f"{', '.join(found)}")
        return kind, [(part if len(parts) > 1 else None, found[split])
                      for part, split in parts.items()]

    if os.path.isdir(hub):
        sizes = local_sizes(hub, [path for _, files in listing()[1] for path in files])
        names = hashlib.sha256(json.dumps(sorted(sizes.items())).encode()).hexdigest()[:16]
        decides = {"hub": f"{len(sizes)} files, names and sizes {names}"}
        text_bytes = 2 * sum(sizes.values())  # packed text, an estimate
    else:
        decides = pinned(hub, settings["revision"], settings["out_dir"])
    # In bytes of text: a token is at least one byte, and takes at least two on disk.
    budget = smallest(settings["max_tokens"], settings["max_bytes"],
                      settings["max_disk_gb"] * 1e9 / 2)

    def documents(position):
        kind, splits = listing(decides.get("commit"))
        val_limit = budget * VAL_SHARE / settings["fraction"]
        open_file = functools.partial(open_stream, kind=kind)
        yield from read_parts(splits, position, open_file, on_bad_file, make_documents, val_limit)

    passed_on = ("out_dir", "tokenizer", "max_tokens", "max_bytes", "max_disk_gb", "fraction",
                 "num_proc")
    return write_dataset(
        documents, val_fraction=settings.get("val_fraction", 0.0),
        settings={**decides, "name": name}, input_bytes=text_bytes,
        source=f"{hub} {name or ''}".strip(), licence=licence,
        sample_bytes=smallest(SAMPLE_FROM, settings["max_bytes"]),
        **{setting: settings[setting] for setting in passed_on})


def local_sizes(hub, paths):
    """{path inside the folder `hub`: bytes}. Raises DataError for a path that is not inside."""
    sizes = {os.path.relpath(path, os.path.realpath(hub)): os.path.getsize(path) for path in paths}
    for path in sizes:
        if path.startswith(".."):
            raise DataError(f"--hub={hub}: its README.md names {path}, which is not in that folder")
    return sizes


def prepare_wikitext(settings, name, text_bytes):
    """As prepare, for a configuration of WikiText, or for text files in settings["input"].

    The official validation part is val and is read first: an article that both parts have stays
    in val.
    """
    folder, hub = settings["input"], settings["hub"]
    with one_message():
        if folder and hub != "Salesforce/wikitext":
            raise DataError(f"--input={folder} --hub={hub}: expected one of them")
        if folder and not os.path.isdir(folder):
            raise DataError(f"--input={folder}: no such folder")
        hub = folder or hub
        try:
            done = prepare_set(settings, hub, {"val": "validation", "train": "train"}, name=name,
                               lines=text_files(hub), make_documents=articles,
                               text_bytes=text_bytes, licence="CC BY-SA 3.0, GFDL")
        except Unavailable as error:
            raise DataError(f"{error}; or --input=FOLDER with train.txt and valid.txt") from None
        print(json.dumps(done))


def text_files(folder):
    """{split: [path]} of WikiText as text files, named as in the original archives; {} without any.

    Raises DataError unless there is exactly one for each split.
    """
    names, found = {}, {}
    for split, stem in (("validation", "valid"), ("train", "train")):
        names[split] = (f"{stem}.txt", f"wiki.{stem}.raw", f"wiki.{stem}.tokens")
        paths = [os.path.join(os.path.realpath(folder), name) for name in names[split]]
        found[split] = list(filter(os.path.isfile, paths))
    if not any(found.values()):
        return {}
    if any(len(of_split) != 1 for of_split in found.values()):
        there = ", ".join(sorted(os.listdir(folder))[:20])
        raise DataError(f"{folder}: expected one of {', '.join(names['train'])}, and one of "
                        f"{', '.join(names['validation'])}; there is: {there}")
    return found
