"""Files that survive a crash: replaced whole or not at all, and folders with one writer at a time."""

import contextlib
import fcntl
import hashlib
import json
import os


def replace_file(path, write, keep=""):
    """write(binary file), fsync, rename: `path` is always the old file or the whole new one, whatever happens.

    keep: a name under which the old file stays. A failed write (a full disk) leaves everything as it was.
    """
    path = str(path)
    try:
        with open(path + ".tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        remove_file(path + ".tmp")
        raise
    if keep and os.path.exists(path):
        remove_file(keep)
        os.link(path, keep)  # a second name for the old file: no moment is without a `path`
    os.replace(path + ".tmp", path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def remove_file(path):
    """Removes `path` if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def write_json(path, value):
    """Replaces `path` by `value` as JSON, on disk when it returns."""
    replace_file(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def file_hash(path):
    """sha256 (hex) of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            sha256.update(block)
    return sha256.hexdigest()


class FolderLock:
    """Makes this process the only writer of `folder` until close(), the end of a `with`, or the end of the process.

    Raises BlockingIOError when another process has it. The kernel keeps the lock: a killed process leaves none behind.
    """
    def __init__(self, folder):
        os.makedirs(folder, exist_ok=True)
        self.descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise

    def close(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    __del__ = close
