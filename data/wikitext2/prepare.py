"""WikiText-2: 600 good Wikipedia articles for training and 60 for validation, 2 million words.

    python data/wikitext2/prepare.py [--input=FOLDER]

Source: Salesforce/wikitext on the Hugging Face hub, wikitext-2-raw-v1 (Merity et al. 2016). Licence: CC BY-SA 3.0 and
GFDL. Download 8 MB, disk 6 MB, 3.0 M tokens with the vocabulary of 8,000, a few seconds. The official validation part
is val; the test part is left out. A document is an article: the files are cut at their ` = Title = ` lines.
`input` is a folder with train.txt and valid.txt, or wiki.train.raw / .tokens and wiki.valid.raw / .tokens as in the
original archives. The .tokens and most .txt copies hold <unk> for rare words; the raw ones, as downloaded, do not.
"""

import json
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from configurator import configure

input = ""  # folder with a local copy; empty: download it
out_dir = "data/wikitext2"  # folder to write
tokenizer = "bpe:8000"  # byte, bpe:N (trained on the train part), gpt2, cl100k_base, o200k_base, or a tokenizer folder
max_tokens = 0  # stop after this many tokens, val first; 0: all
num_proc = 0  # tokenising processes; 0: one per core, at most 8
config = configure(globals())

from bins import DataError
from documents import from_texts, one_message, write_dataset

HEADING = re.compile(r"^ = [^=\n]+ = *\n", re.MULTILINE)  # == is a section, ` = = Section = = ` in this data
PARTS = {"val": ("valid", "validation"), "train": ("train", "train")}  # val first: it keeps a text that both have


def local_files(part):
    """Files of a part in the folder `input`; DataError when there is not exactly one."""
    found = [path for name in (f"{part}.txt", f"wiki.{part}.raw", f"wiki.{part}.tokens")
             if os.path.isfile(path := os.path.join(input, name))]
    if len(found) != 1:
        raise DataError(f"--input={input}: expected one of {part}.txt, wiki.{part}.raw, wiki.{part}.tokens; there is: "
                        f"{', '.join(sorted(os.listdir(input))[:20]) if os.path.isdir(input) else 'no such folder'}")
    return found[0]


def downloaded_lines(part):
    """Lines of a part from the hub."""
    try:
        import datasets  # half a second and 200 MB, needed for the download only

        return datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"]
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"no download of Salesforce/wikitext ({type(error).__name__}: {str(error)[:200]}). Get "
                        "wikitext-2 on a machine with network, then give --input=FOLDER") from None


def documents():
    """Yields (article, its split)."""
    for split, (local, remote) in PARTS.items():
        if input:
            with open(local_files(local), encoding="utf-8") as file:
                text = file.read()
        else:
            text = "".join(downloaded_lines(remote))
        starts = [match.start() for match in HEADING.finditer(text)]
        for start, end in zip(starts, [*starts[1:], len(text)]):
            yield text[start:end], split


with one_message():
    settings = {name: os.path.getsize(local_files(local)) for name, (local, _) in PARTS.items()} if input else {}
    print(json.dumps(write_dataset(from_texts(documents), out_dir, tokenizer, 0.0, max_tokens, num_proc, settings,
                                   12_000_000, "Salesforce/wikitext wikitext-2-raw-v1", "CC BY-SA 3.0, GFDL")))
