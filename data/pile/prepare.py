"""The Pile: 22 sources from papers to code to chat (Gao et al. 2020), less five withdrawn ones.

    python data/pile/prepare.py --max_bytes=20e9  # 5.9 B tokens, 12 GB of disk, 7 GB of download

Source: monology/pile-uncopyrighted on the Hugging Face hub. Licence: MIT for the collection; the
texts belong to their authors. Download 325 GB; text 970 GB, 177 M documents, 285 B tokens (gpt2);
disk 571 GB; 200 minutes on 8 cores, or the time of the download. Estimates: from the size of its
validation file against that of the whole Pile, and the paper's 0.293 tokens a byte. The official
validation part is val (at most a tenth of a budget); the test part is left out. A file is 11 GB and
cannot be entered in the middle: a run that goes on downloads the current one from its start again.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

hub = "monology/pile-uncopyrighted"  # repository of the hub, or a folder with a copy of it
revision = ""  # commit, branch or tag; empty: the newest commit; a run that goes on keeps its own
out_dir = "data/pile"  # folder to write
tokenizer = "gpt2"  # byte, bpe:N (of the first 500 MB), gpt2, cl100k_base, o200k_base, folder
max_tokens = 0  # budgets, 0 for none: stop after the document that reaches so many tokens
max_bytes = 0  # stop after the document that reaches so many bytes of text
max_disk_gb = 0.0  # stop before the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents, by hash: 0.01 is a subset of 0.1; all is downloaded
num_proc = 0  # tokenising processes; 0: one per core, at most 8
on_bad_file = "refuse"  # a damaged file: refuse, or skip the rest of it (counted)
config = configure(globals())

from data.hub import prepare

parts = {"val": "validation", "train": "train"}
files = {"validation": "val.jsonl.zst", "train": "train/*.jsonl.zst"}  # not in its README.md
prepare(config, parts, patterns=files, text_bytes=970e9, licence="MIT")
