"""text8: 100 million characters of Wikipedia in 2006, a to z and single spaces (Mahoney 2011), one token a character.

    python data/text8/prepare.py

Source: afmck/text8 on the Hugging Face hub, which is http://mattmahoney.net/dc/text8.zip in the usual parts. Licence:
CC BY-SA 3.0 and GFDL. Download 52 MB; text 95 MB, 9.5 k documents, 95 M tokens (byte); disk 190 MB; 1 minute. The first
90 million characters are train, the next 5 million val; the last 5 million, test, are left out. All is one line: a
document is a piece of at most 10,000 characters, the pieces of a part join to it.
"""

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

hub = "afmck/text8"  # repository of the hub, or a folder with a copy of it
revision = ""  # commit, branch or tag of it; empty: the newest commit, which a run that goes on keeps
out_dir = "data/text8"  # folder to write
tokenizer = "byte"  # byte, bpe:N (trained on the first 500 MB), gpt2, cl100k_base, o200k_base, or a folder
max_tokens = 0  # budgets, 0 for none: stop with the document that reaches so many tokens,
max_bytes = 0  # with the one that reaches so many bytes of text,
max_disk_gb = 0.0  # or before the one with which the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents, by hash: 0.01 is within 0.1. All is read; the budgets spare the download
num_proc = 0  # tokenising processes; 0: one per core, at most 8
on_bad_file = "refuse"  # a damaged file: refuse, or skip the rest of it (counted)
config = configure(globals())

from data.documents import one_message
from data.hub import pieces, prepare

with one_message():
    parts = {"val": "validation", "train": "train"}
    print(json.dumps(prepare(hub, parts, out_dir, tokenizer, max_tokens, max_bytes, fraction, max_disk_gb,
                             num_proc, on_bad_file, revision, make_documents=pieces, text_bytes=95_000_000,
                             licence="CC BY-SA 3.0, GFDL")))
