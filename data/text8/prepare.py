"""text8: 100 million characters of Wikipedia in 2006, a to z and single spaces (Mahoney 2011).

    python data/text8/prepare.py

Source: afmck/text8 on the Hugging Face hub, which is http://mattmahoney.net/dc/text8.zip in the
usual parts. Licence: CC BY-SA 3.0 and GFDL. Download 52 MB; text 95 MB, 9.5 k documents, 95 M
tokens (byte); disk 190 MB; 1 minute. One token is one character. The first 90 million characters
are train, the next 5 million val; the last 5 million, test, are left out. A part is one long line:
it is cut into documents of at most 10,000 characters, which join to it.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

hub = "afmck/text8"  # repository of the hub, or a folder with a copy of it
revision = ""  # commit, branch or tag; empty: the newest commit; a run that goes on keeps its own
out_dir = "data/text8"  # folder to write
tokenizer = "byte"  # byte, bpe:N (of the first 500 MB), gpt2, cl100k_base, o200k_base, folder
max_tokens = 0  # budgets, 0 for none: stop after the document that reaches so many tokens
max_bytes = 0  # stop after the document that reaches so many bytes of text
max_disk_gb = 0.0  # stop before the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents, by hash: 0.01 is a subset of 0.1; all is downloaded
num_proc = 0  # tokenising processes; 0: one per core, at most 8
on_bad_file = "refuse"  # a damaged file: refuse, or skip the rest of it (counted)
config = configure(globals())

from data.hub import pieces, prepare

parts = {"val": "validation", "train": "train"}
prepare(config, parts, make_documents=pieces, text_bytes=95_000_000,
        licence="CC BY-SA 3.0, GFDL")
