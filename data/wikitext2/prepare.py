"""WikiText-2: 600 good Wikipedia articles for training and 60 for validation, 2 million words (Merity et al. 2016).

    python data/wikitext2/prepare.py [--input=FOLDER]

Source: Salesforce/wikitext on the Hugging Face hub, wikitext-2-raw-v1. Licence: CC BY-SA 3.0 and GFDL. Download 8 MB;
text 12 MB, 0.66 k documents, 3.0 M tokens (bpe:8000); disk 6 MB; 1 minute.
The official validation part is val (a tenth of a budget at most) and read first; the test part is left out. A document
is an article: the lines are cut at ` = Title = `. `input` is a folder with train.txt and valid.txt, or wiki.train.raw /
.tokens and wiki.valid.raw / .tokens as in the original archives. The .tokens and most .txt copies hold <unk> for rare
words; the raw ones, as on the hub, do not.
"""

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

input = ""  # folder with a local copy as text files; empty: hub
hub = "Salesforce/wikitext"  # repository of the hub, or a folder with a copy of it
revision = ""  # commit, branch or tag of it; empty: the newest commit, which a run that goes on keeps
out_dir = "data/wikitext2"  # folder to write
tokenizer = "bpe:8000"  # byte, bpe:N (trained on the first 500 MB), gpt2, cl100k_base, o200k_base, or a folder
max_tokens = 0  # budgets, 0 for none: stop with the document that reaches so many tokens,
max_bytes = 0  # with the one that reaches so many bytes of text,
max_disk_gb = 0.0  # or before the one with which the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents, by hash: 0.01 is within 0.1. All is read; the budgets spare the download
num_proc = 0  # tokenising processes; 0: one per core, at most 8
on_bad_file = "refuse"  # a damaged file: refuse, or skip the rest of it (counted)
config = configure(globals())

from data.documents import one_message
from data.hub import prepare_wikitext

with one_message():
    print(json.dumps(prepare_wikitext(
        "wikitext-2-raw-v1", 12_000_000, input, hub, out_dir, tokenizer, max_tokens, max_bytes, fraction,
        max_disk_gb, num_proc, on_bad_file, revision)))
