"""WikiText for data/wikitext2 and data/wikitext103: lines, from the hub or from a folder, -> articles."""

import os
import re

from data.bins import DataError
from data.documents import BAD_FILE
from data.hub import Unavailable, prepare

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
