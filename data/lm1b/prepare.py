"""One Billion Word Benchmark: shuffled sentences of news (Chelba et al. 2013).

    python data/lm1b/prepare.py

Source: billion-word-benchmark/lm1b on the Hugging Face hub, in the .parquet files that the hub made
of it. Licence: Apache-2.0 for the benchmark; the news belong to their publishers. Download 3.0 GB;
text 4.2 GB, 30.6 M documents, 1.03 B tokens (bpe:16000); disk 2.3 GB; 1 minute on 8 cores, or the
time of the download. A document is a sentence, with spaces between words and punctuation. There is
no official validation part: val is the official held-out part, on which published numbers are.
Estimates: the download from the held-out part's files, the tokens at 4.2 bytes each.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

hub = "billion-word-benchmark/lm1b"  # repository of the hub, or a folder with a copy of it
revision = "refs/convert/parquet"  # commit, branch or tag; a run that goes on keeps its commit
out_dir = "data/lm1b"  # folder to write
tokenizer = "bpe:16000"  # byte, bpe:N (of the first 500 MB), gpt2, cl100k_base, o200k_base, folder
max_tokens = 0  # budgets, 0 for none: stop after the document that reaches so many tokens
max_bytes = 0  # stop after the document that reaches so many bytes of text
max_disk_gb = 0.0  # stop before the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents, by hash: 0.01 is a subset of 0.1; all is downloaded
num_proc = 0  # tokenising processes; 0: one per core, at most 8
on_bad_file = "refuse"  # a damaged file: refuse, or skip the rest of it (counted)
config = configure(globals())

from data.hub import prepare

parts = {"val": "test", "train": "train"}
prepare(config, parts, text_bytes=4_158_718_000, licence="Apache-2.0")
