"""FineWeb-Edu: web pages that a classifier finds educational (Penedo et al. 2024), 10 B tokens.

    python data/fineweb_edu/prepare.py --max_disk_gb=6                   # 3.0 B tokens
    python data/fineweb_edu/prepare.py --name=sample-100BT --fraction=0.1

Source: HuggingFaceFW/fineweb-edu on the Hugging Face hub, a random sample. Licence: ODC-By 1.0.
Download 28 GB; text 47 GB, 9.67 M documents, 9.95 B tokens (gpt2); disk 20.0 GB; 10 minutes on 8
cores, or the time of the download. sample-100BT and sample-350BT are 10 and 35 times as large,
default is all of it, 1.3 T tokens. There is no official validation part. The sizes are those of the
set's card, or estimated from them.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

hub = "HuggingFaceFW/fineweb-edu"  # repository of the hub, or a folder with a copy of it
revision = ""  # commit, branch or tag; empty: the newest commit; a run that goes on keeps its own
name = "sample-10BT"  # sample-10BT, sample-100BT, sample-350BT, default, or one crawl
out_dir = "data/fineweb_edu"  # folder to write
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

sizes = {"sample-10BT": 47e9, "sample-100BT": 470e9, "sample-350BT": 1650e9}  # bytes of text
prepare(config, {"train": "train"}, name=name, text_bytes=sizes.get(name, 0), licence="ODC-By 1.0")
