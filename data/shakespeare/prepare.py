"""Tiny Shakespeare: 1.1 MB of plays, one token per byte. The smallest text worth training on.

    python data/shakespeare/prepare.py [--input=input.txt]

Source: karpathy/char-rnn on GitHub, data/tinyshakespeare/input.txt. Licence: public domain.
Download 1.1 MB, disk 2.2 MB, 1.1 M tokens, a few seconds. A document is about 4,000 characters of
consecutive speeches. val is a tenth of them, chosen by hash; nanoGPT takes the last tenth instead,
so losses are near its losses but not equal.
"""

import json
import os
import sys
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

input = ""  # a local copy of input.txt; empty: download it
out_dir = "data/shakespeare"  # folder to write
tokenizer = "byte"  # byte, bpe:N, gpt2, cl100k_base, o200k_base, or a tokenizer folder
max_tokens = 0  # stop after this many tokens; 0: all
num_proc = 1  # tokenising processes
val_fraction = 0.1  # share of the documents that goes to val.bin
config = configure(globals())

from data.bins import DataError
from data.documents import from_texts, one_message, write_dataset
from data.texts import Reader
from data.workers import cut

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def documents():
    """-> iterable of (text, None): pieces that join to the file and end after a speech."""
    if input and not os.path.isfile(input):
        raise DataError(f"--input={input}: no such file")
    try:
        if input:
            text = "".join(Reader().texts(input, ".txt"))
        else:
            with urllib.request.urlopen(URL, timeout=30) as file:
                text = file.read().decode("utf-8")
    except OSError as error:  # urllib's errors are OSErrors too
        raise DataError(f"{input or URL}: {error}. Copy input.txt of karpathy/char-rnn here by "
                        "hand, then give --input=input.txt") from None
    return ((piece, None) for piece in cut(text, 4000))


with one_message():
    # A local copy that changed is another data set; its size is enough to tell.
    settings = {"input": f"{os.path.getsize(input)} bytes"} if os.path.isfile(input) else {}
    print(json.dumps(write_dataset(
        from_texts(documents), out_dir, tokenizer, val_fraction, max_tokens, num_proc, settings,
        input_bytes=1_115_394, source=URL, licence="public domain")))
