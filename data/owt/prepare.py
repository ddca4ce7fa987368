"""OpenWebText: web pages that Reddit links to, as GPT-2 was trained on (Gokaslan and Cohen 2019).

    python data/owt/prepare.py --max_bytes=4e9  # a tenth, in order: download 2.4 GB, 1.8 GB of disk
    python data/owt/prepare.py --fraction=0.1   # a tenth by hash, from all of it: download 24 GB
    python data/owt/prepare.py --max_disk_gb=8  # for a laptop with 10 GB free: 4.0 B tokens

Source: Skylion007/openwebtext on the Hugging Face hub. Licence: CC0 for the collection; the pages
belong to their authors. Download 24 GB; text 39.8 GB, 8.01 M documents, 9.04 B tokens (gpt2); disk
18.1 GB; 8 minutes on 8 cores, or the time of the download. There is no official validation part:
val is 0.05 % of the documents as in nanoGPT, but chosen by hash.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

hub = "Skylion007/openwebtext"  # repository of the hub, or a folder with a copy of it
revision = ""  # commit, branch or tag; empty: the newest commit; a run that goes on keeps its own
out_dir = "data/owt"  # folder to write
tokenizer = "gpt2"  # byte, bpe:N (of the first 500 MB), gpt2, cl100k_base, o200k_base, folder
val_fraction = 0.0005  # share of the documents that goes to val.bin, by a hash of their text
max_tokens = 0  # budgets, 0 for none: stop after the document that reaches so many tokens
max_bytes = 0  # stop after the document that reaches so many bytes of text
max_disk_gb = 0.0  # stop before the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents, by hash: 0.01 is a subset of 0.1; all is downloaded
num_proc = 0  # tokenising processes; 0: one per core, at most 8
on_bad_file = "refuse"  # a damaged file: refuse, or skip the rest of it (counted)
config = configure(globals())

from data.hub import prepare

prepare(config, {"train": "train"}, text_bytes=39_769_491_688, licence="CC0-1.0")
