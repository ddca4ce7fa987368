"""Docstrings of the Python standard library and the installed packages. Needs no network.

    python data/pydocs/prepare.py

Source: .py files of this Python and its site-packages (parsed, never run) and the language
reference in pydoc_data. Licence: that of each package (PSF-2.0, BSD, MIT, Apache-2.0): fine to
train on here, not to publish as a data set. Download nothing, disk 3 MB, about 1.2 M tokens, under
a minute on one core. The amount depends on what is installed. A document is one module: those
paragraphs of its docstrings that read like English, each once.
"""

import ast
import collections
import functools
import glob
import inspect
import json
import os
import re
import sys
import sysconfig

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

out_dir = "data/pydocs"  # folder to write
tokenizer = "bpe:8000"  # byte, bpe:N (trained here), gpt2, cl100k_base, o200k_base, or a folder
max_tokens = 0  # stop after this many tokens; 0: all
max_bytes = 12_000_000  # stop after about this many bytes of text
num_proc = 0  # tokenising processes; 0: one per core, at most 8
val_fraction = 0.02  # share of the documents that goes to val.bin
config = configure(globals())

from data.documents import from_texts, one_message, write_dataset

MARKUP = (
    (re.compile(r":[\w:+-]+:`~?([^`<]+?)(?: <[^`]*>)?`"), r"\1"),  # :class:`~io.Text` -> io.Text
    (re.compile(r"`+([^`]*?)(?: <[^`]*>)?`+_*"), r"\1"),  # ``code``, `link <url>`_ -> their words
    (re.compile(r"\*+([^\s*](?:[^*]*[^\s*])?)\*+"), r"\1"),  # *emphasis* -> emphasis
    (re.compile(r"\s+"), " "),
)
# A paragraph must end like a sentence: "as in the following ::" introduces what is left out.
SENTENCE = re.compile(r"[A-Z\"'(].*[.!?][\"')]?$")
HEADING = re.compile(r"^.*\n[-=~^\"]{3,} *\n", re.MULTILINE)  # a line and its underline
SKIP = re.compile(r"/(site-packages|dist-packages|tests?|testing|_?vendor(ed)?|idlelib|lib2to3|"
                  r"turtledemo|encodings)/")
# Left out, although `make test` installs it: hundreds of models with nearly the same docstrings,
# which take half of the time.
BIG = "transformers"
SHORTEST = 120  # characters of prose in a docstring; shorter ones make no text


def prose(text):
    """Yields the paragraphs of a docstring that read like English, as one line without markup."""
    for paragraph in re.split(r"\n\s*\n", HEADING.sub("\n", inspect.cleandoc(text))):
        lines = paragraph.split("\n")
        starts = (" ", "\t", "..", "|", "+-", "#")  # a directive, a table, a list of parameters
        if ">>>" in paragraph or any(line.startswith(starts) for line in lines):
            continue
        for pattern, replacement in MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        words = paragraph.split()
        plain = sum(word.strip("\"'(),.:;!?-").isalpha() for word in words)
        if len(words) >= 8 and plain > 0.85 * len(words) and SENTENCE.match(paragraph):
            yield paragraph


def docstrings(source):
    """Source of a module -> its docstrings; none when it does not parse or all are short."""
    if not any(len(text) >= SHORTEST for text in source.split('"""')[1::2]):
        return  # parsing is what takes the time
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    # ast.walk, without the expressions: most nodes are, and no docstring is in one
    todo = collections.deque([tree])
    while todo:
        node = todo.popleft()
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            todo.extend(getattr(node, block, ()))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node, clean=False) or ""


def modules():
    """Yields iterables of docstrings: first one pydoc topic each, then one module each."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield [topics[name]]
    paths = sysconfig.get_paths()
    for folder in (paths["stdlib"], paths["purelib"]):
        pattern = os.path.join(glob.escape(folder), "**", "*.py")
        for path in sorted(glob.glob(pattern, recursive=True)):
            inside = path.removeprefix(folder)
            if not SKIP.search(inside) and not inside.startswith(f"/{BIG}/"):
                with open(path, encoding="utf-8", errors="replace") as file:
                    yield docstrings(file.read())


@functools.cache
def documents():
    """[(document, None)] of about max_bytes; each paragraph occurs once.

    Cached, because the vocabulary is trained on the same documents before they are tokenised.
    """
    seen, found, n_bytes = set(), [], 0
    for parts in modules():
        kept = []
        for docstring in parts:
            new = [paragraph for paragraph in prose(docstring) if paragraph not in seen]
            if sum(map(len, new)) >= SHORTEST:
                kept += new
                seen.update(new)
        text = "\n\n".join(kept)
        if len(text) >= 200:
            found.append((text, None))
            n_bytes += len(text.encode())
        if n_bytes >= max_bytes:
            break
    return found


with one_message():
    # Another Python has other docstrings: a folder begun with it is refused.
    settings = {"max_bytes": max_bytes, "python": sys.version}
    print(json.dumps(write_dataset(
        from_texts(documents), out_dir, tokenizer, val_fraction, max_tokens, num_proc, settings,
        input_bytes=max_bytes, source="docstrings of the installed Python",
        licence="of each package")))
