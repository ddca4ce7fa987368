"""MiniPile: a million documents of the Pile, chosen by clustering to keep all kinds (Kaddour 2023).

    python data/minipile/prepare.py

Source: JeanKaddour/minipile on the Hugging Face hub. Licence: MIT for the collection; the texts
belong to their authors. Download 3.2 GB; text 5.9 GB, 1.00 M documents, 1.6 B tokens (bpe:16000);
disk 3.2 GB; 1 minute on 8 cores, or the time of the download. The official validation part, 500
documents, is val; the test part is left out. Tokens are estimated at 3.7 bytes each.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

hub = "JeanKaddour/minipile"  # repository of the hub, or a folder with a copy of it
revision = ""  # commit, branch or tag; empty: the newest commit; a run that goes on keeps its own
out_dir = "data/minipile"  # folder to write
tokenizer = "bpe:16000"  # byte, bpe:N (of the first 500 MB), gpt2, cl100k_base, o200k_base, folder
max_tokens = 0  # budgets, 0 for none: stop after the document that reaches so many tokens
max_bytes = 0  # stop after the document that reaches so many bytes of text
max_disk_gb = 0.0  # stop before the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents, by hash: 0.01 is a subset of 0.1; all is downloaded
num_proc = 0  # tokenising processes; 0: one per core, at most 8
on_bad_file = "refuse"  # a damaged file: refuse, or skip the rest of it (counted)
config = configure(globals())

from data.hub import prepare

parts = {"val": "validation", "train": "train"}
prepare(config, parts, text_bytes=5_908_887_896, licence="MIT")
