"""WikiText-103: 28,475 good Wikipedia articles and 60 for validation (Merity et al. 2016).

    python data/wikitext103/prepare.py [--input=FOLDER]

Source: Salesforce/wikitext on the Hugging Face hub, wikitext-103-raw-v1. Licence: CC BY-SA 3.0 and
GFDL. Download 315 MB; text 540 MB, 28.5 k documents, 131 M tokens (bpe:16000); disk 262 MB; 1
minute on 8 cores, or the time of the download. It has 103 million words. Tokens are estimated at
4.1 bytes each.

The official validation part is val (at most a tenth of a budget) and is read first; the test part
is left out. A document is an article: the lines are cut at ` = Title = `. `input` is a folder with
train.txt and valid.txt, or with wiki.train.raw / .tokens and wiki.valid.raw / .tokens as in the
original archives. The .tokens and most .txt copies hold <unk> for rare words; the raw ones, as on
the hub, do not.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

input = ""  # folder with a local copy as text files; empty: hub
hub = "Salesforce/wikitext"  # repository of the hub, or a folder with a copy of it
revision = ""  # commit, branch or tag; empty: the newest commit; a run that goes on keeps its own
out_dir = "data/wikitext103"  # folder to write
tokenizer = "bpe:16000"  # byte, bpe:N (of the first 500 MB), gpt2, cl100k_base, o200k_base, folder
max_tokens = 0  # budgets, 0 for none: stop after the document that reaches so many tokens
max_bytes = 0  # stop after the document that reaches so many bytes of text
max_disk_gb = 0.0  # stop before the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents, by hash: 0.01 is a subset of 0.1; all is downloaded
num_proc = 0  # tokenising processes; 0: one per core, at most 8
on_bad_file = "refuse"  # a damaged file: refuse, or skip the rest of it (counted)
config = configure(globals())

from data.hub import prepare_wikitext

prepare_wikitext(config, "wikitext-103-raw-v1", text_bytes=540_000_000)
