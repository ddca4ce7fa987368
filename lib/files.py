"""Files that survive a crash: replaced whole or not at all, and folders with one writer at a time.

Free of torch: the workers that read data import it.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import sys


def replace_file(path, write, keep=""):
    """Replaces `path` by what write(binary file) writes; a crash leaves the old or the new file.

    keep: a name under which the old file stays. If write fails (a full disk), all is as before.
    """
    path = str(path)
    try:
        with open(path + ".tmp", "wb") as file:
            write(file)
            # on disk before the rename: otherwise the new name could point to an empty file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # KeyboardInterrupt too
        remove_file(path + ".tmp")
        raise
    if keep and os.path.exists(path):
        # a second name for the old file, not a rename, so that there is a `path` at every moment
        remove_file(keep)
        os.link(path, keep)
    os.replace(path + ".tmp", path)
    sync_folder(os.path.dirname(path) or ".")


def sync_folder(path):
    """Returns when a rename in this folder is on disk."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def remove_file(path):
    """Removes `path` if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def to_json(value, indent=None):
    """`value` as JSON text. NaN and infinity become null: JSON has no such numbers."""
    return json.dumps(without_nan(value), indent=indent, allow_nan=False)


def without_nan(value):
    """The same with None for each NaN and infinity, in dicts, lists and tuples at any depth."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path, value):
    """Replaces `path` by `value` as JSON, on disk when it returns."""
    text = to_json(value, indent=1) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def parse_json(text, **options):
    """json.loads, which raises ValueError also for what is nested too deeply."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path, encoding="utf-8", **options):
    """What a JSON file holds. Raises ValueError and OSError."""
    with open(path, encoding=encoding) as file:
        return parse_json(file.read(), **options)


def read_object(path, keys=()):
    """The JSON object in a file; {} where there is no file.

    Raises ValueError for other content, and for an object without one of the keys.
    """
    if not os.path.exists(path):
        return {}
    try:
        found = read_json(path)
    except ValueError as error:
        found = error
    if not isinstance(found, dict) or not set(keys) <= set(found):
        expected = f" with {', '.join(keys)}" if keys else ""
        raise ValueError(f"{path}: found {str(found)[:60]!r}, expected a JSON object{expected}; "
                         "move it away, or run again what wrote it")
    return found


def wrong_fields(found, types):
    """Names in `types`, {name: type or types}, that a dict lacks or has of another type -> list."""
    return [name for name, kind in types.items() if not isinstance(found.get(name), kind)]


def check_outputs(folder, marks):
    """Raises ValueError if a file that is about to be replaced is somebody else's.

    marks: {name of a file in `folder`: what each such file of this command holds, in ASCII}.
    """
    for name, mark in marks.items():
        path = os.path.join(folder, name)
        if os.path.exists(path):
            with open(path, "rb") as file:
                if mark.encode() not in file.read():
                    raise ValueError(f"{path} was not written by this command, or is damaged, and "
                                     "would be replaced; move it away")


def say(*words):
    """Prints a line at once; where stdout can no longer be written, goes on without.

    A run must not end because its output was piped into `head`, its disk is full or its terminal
    was closed: log.jsonl and the checkpoints have all that matters.
    """
    try:
        print(*words, flush=True)
    except OSError:
        # Python flushes what is left once more at the end, which must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_result(result):
    """Prints the result of a command as JSON on its last line, for programs that read it.

    On a terminal a long one is cut to the keys that hold a single value: a screen full of JSON
    helps nobody there, and what it says has been printed before.
    """
    text = to_json(result)
    if sys.stdout.isatty() and len(text) > 400:
        items = result.items() if isinstance(result, dict) else ()
        short = {key: value for key, value in items if not isinstance(value, (dict, list))}
        if not short:
            return
        text = to_json(short)
    say(text)


def file_hash(path):
    """sha256 (hex) of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        # in pieces of 1 MiB: bins can be larger than memory
        while block := file.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()


class FolderLock:
    """Makes this process the only writer of `folder`, until close() or the end of the process.

    A `with` block closes it too. Raises BlockingIOError when another process has it. The kernel
    holds the lock, not a file: a killed process leaves none behind.
    """

    def __init__(self, folder):
        self.descriptor = None  # close() runs even if the next line fails
        os.makedirs(folder, exist_ok=True)
        self.descriptor = os.open(folder, os.O_RDONLY)
        # the folder itself is locked, so there is no lock file to clean up
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise

    def close(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None  # a second close() must not close a file that has this number since

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    __del__ = close
