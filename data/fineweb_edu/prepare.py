"""FineWeb-Edu: web pages that a classifier finds educational (Penedo et al. 2024), a random sample of 10 B tokens.

    python data/fineweb_edu/prepare.py --max_disk_gb=6                   # 3.0 B tokens
    python data/fineweb_edu/prepare.py --name=sample-100BT --fraction=0.1

Source: HuggingFaceFW/fineweb-edu on the Hugging Face hub. Licence: ODC-By 1.0. Download 28 GB; text 47 GB, 9.67 M
documents, 9.95 B tokens (gpt2); disk 20.0 GB; 10 minutes on 8 cores, or what the download takes. sample-100BT and
sample-350BT are 10 and 35 times as large, default is all of it, 1.3 T tokens. There is no official validation part.
Sizes are those of the set's card, or estimated from them.
"""

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

hub = "HuggingFaceFW/fineweb-edu"  # repository of the hub, or a folder with a copy of it
revision = ""  # commit, branch or tag of it; empty: the newest commit, which a run that goes on keeps
name = "sample-10BT"  # its configuration: sample-10BT, sample-100BT, sample-350BT, default, or one crawl
out_dir = "data/fineweb_edu"  # folder to write
tokenizer = "gpt2"  # byte, bpe:N (trained on the first 500 MB), gpt2, cl100k_base, o200k_base, or a folder
val_fraction = 0.0005  # share of the documents that goes to val.bin, chosen by a hash of their text
max_tokens = 0  # budgets, 0 for none: stop with the document that reaches so many tokens,
max_bytes = 0  # with the one that reaches so many bytes of text,
max_disk_gb = 0.0  # or before the one with which the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents, by hash: 0.01 is within 0.1. All is read; the budgets spare the download
num_proc = 0  # tokenising processes; 0: one per core, at most 8
on_bad_file = "refuse"  # a damaged file: refuse, or skip the rest of it (counted)
config = configure(globals())

from data.documents import one_message
from data.hub import prepare

with one_message():
    sizes = {"sample-10BT": 47e9, "sample-100BT": 470e9, "sample-350BT": 1650e9}  # bytes of text
    print(json.dumps(prepare(hub, {"train": "train"}, out_dir, tokenizer, max_tokens, max_bytes, fraction, max_disk_gb,
                             num_proc, on_bad_file, revision, val_fraction, name, text_bytes=sizes.get(name, 0),
                             licence="ODC-By 1.0")))
