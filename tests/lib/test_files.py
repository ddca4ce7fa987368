"""Promises of lib/files.py: a crash at any moment leaves the old file or the new one."""

import os

from lib.files import replace_file


def test_a_file_is_on_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    path, events, rename = tmp_path / "a", [], os.replace
    path.write_text("old")

    def note(what):
        events.append((what, path.read_text()))

    monkeypatch.setattr(os, "fsync", lambda _: note("on disk"))
    monkeypatch.setattr(os, "replace", lambda *names: (note("rename"), rename(*names)))
    replace_file(path, lambda file: file.write(b"new"), keep=str(tmp_path / "kept"))
    assert events == [("on disk", "old"), ("rename", "old"), ("on disk", "new")]
    assert (tmp_path / "kept").read_text() == "old" and len(os.listdir(tmp_path)) == 2


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def write(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    try:
        replace_file(path, write)
    except OSError:
        pass
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
