"""One Billion Word Benchmark: sentences of news, shuffled (Chelba et al. 2013). A document is a sentence.

    python data/lm1b/prepare.py

Source: billion-word-benchmark/lm1b on the Hugging Face hub, in the .parquet files that the hub made of it. Licence:
Apache-2.0 for the benchmark, the news belong to their publishers. Download 3.0 GB; text 4.2 GB, 30.6 M documents, 1.03
B tokens (bpe:16000); disk 2.3 GB; 1 minute on 8 cores, or what the download takes. There is no official validation
part: the official held-out part, on which published numbers are, is val. Words and punctuation are set apart by spaces.
Estimates: the download from the held-out part's files, the tokens at 4.2 bytes each.
"""

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

hub = "billion-word-benchmark/lm1b"  # repository of the hub, or a folder with a copy of it
revision = "refs/convert/parquet"  # commit, branch or tag of it; a run that goes on keeps its commit
out_dir = "data/lm1b"  # folder to write
tokenizer = "bpe:16000"  # byte, bpe:N (trained on the first 500 MB), gpt2, cl100k_base, o200k_base, or a folder
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
    parts = {"val": "test", "train": "train"}
    print(json.dumps(prepare(hub, parts, out_dir, tokenizer, max_tokens, max_bytes, fraction, max_disk_gb,
                             num_proc, on_bad_file, revision, text_bytes=4_158_718_000, licence="Apache-2.0")))
