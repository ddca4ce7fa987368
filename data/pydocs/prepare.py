"""The prose in every Python installation: docstrings of the standard library and installed packages. No network.

    python data/pydocs/prepare.py

Source: .py files of this Python and its site-packages (parsed, never run) and the language reference in pydoc_data.
Licence: that of each package (PSF-2.0, BSD, MIT, Apache-2.0): fine to train on here, not to publish as a data set.
Download nothing, disk 3 MB, about 1.2 M tokens, under a minute on one core. The amount depends on what is installed.
A document is one module: those paragraphs of its docstrings that read like English, each once.
"""

import ast
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
tokenizer = "bpe:8000"  # byte, bpe:N (trained on this text), gpt2, cl100k_base, o200k_base, or a tokenizer folder
max_tokens = 0  # stop after this many tokens; 0: all
max_bytes = 12_000_000  # stop after about this many bytes of text
num_proc = 0  # tokenising processes; 0: one per core, at most 8
val_fraction = 0.02  # share of the documents that goes to val.bin
config = configure(globals())

from data.documents import from_texts, one_message, write_dataset

MARKUP = ((re.compile(r":[\w:+-]+:`~?([^`<]+?)(?: <[^`]*>)?`"), r"\1"),  # :class:`~io.Text` -> io.Text
          (re.compile(r"`+([^`]*?)(?: <[^`]*>)?`+_*"), r"\1"),  # ``code`` and `link <url>`_ -> their words
          (re.compile(r"\*+([^\s*](?:[^*]*[^\s*])?)\*+"), r"\1"),  # *emphasis*
          (re.compile(r"\s+"), " "))
SENTENCE = re.compile(r"[A-Z\"'(].*[.!?][\"')]?$")  # "as in the following ::" introduces something that is left out
HEADING = re.compile(r"^.*\n[-=~^\"]{3,} *\n", re.MULTILINE)  # a line underlined
SKIP = re.compile(r"/(site-packages|dist-packages|tests?|testing|_?vendor(ed)?|idlelib|lib2to3|turtledemo|encodings)/")
BIG = "transformers"  # hundreds of models with nearly the same docstrings, half of the time; make test installs it
SHORTEST = 120  # characters of prose in a docstring: one-liners do not make a text


def prose(text):
    """Docstring -> its paragraphs that read like English, one line each, without markup."""
    for paragraph in re.split(r"\n\s*\n", HEADING.sub("\n", inspect.cleandoc(text))):
        lines = paragraph.split("\n")
        if ">>>" in paragraph or any(line.startswith((" ", "\t", "..", "|", "+-", "#")) for line in lines):
            continue  # an example, a directive, a table, a list of parameters
        for pattern, replacement in MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        words = paragraph.split()
        plain = sum(word.strip("\"'(),.:;!?-").isalpha() for word in words)
        if len(words) >= 8 and plain > 0.85 * len(words) and SENTENCE.match(paragraph):
            yield paragraph


def docstrings(source):
    """Source of a module -> its docstrings of some length; none when it does not parse."""
    if not any(len(text) >= SHORTEST for text in source.split('"""')[1::2]):
        return  # parsing is what takes the time
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node, clean=False) or ""


def modules():
    """Yields lists of docstrings: one pydoc topic each, then one module each."""
    from pydoc_data.topics import topics

    yield from ([topics[name]] for name in sorted(topics))
    paths = sysconfig.get_paths()
    for folder in (paths["stdlib"], paths["purelib"]):
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.py"), recursive=True)):
            inside = path.removeprefix(folder)
            if not SKIP.search(inside) and not inside.startswith(f"/{BIG}/"):
                with open(path, encoding="utf-8", errors="replace") as file:
                    yield docstrings(file.read())


@functools.cache
def documents():
    """[(document, None)] of about max_bytes at most; each paragraph occurs once."""
    seen, found, n_bytes = set(), [], 0
    for parts in modules():
        kept = []
        for paragraphs in map(list, map(prose, parts)):
            new = [paragraph for paragraph in paragraphs if paragraph not in seen]
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
    print(json.dumps(write_dataset(from_texts(documents), out_dir, tokenizer, val_fraction, max_tokens, num_proc,
                                   {"max_bytes": max_bytes, "python": sys.version}, max_bytes,
                                   "docstrings of the installed Python", "of each package")))
