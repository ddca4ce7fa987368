"""Any text -> token bins that train.py reads.

    python prepare.py --input='texts/*.txt' --out_dir=data/mine                   # a vocabulary of 16,000, trained
    python prepare.py --input=a.jsonl.gz,folder --out_dir=data/mine --tokenizer=byte
    zstdcat big.jsonl.zst | python prepare.py --input=- --input_format=jsonl --tokenizer=gpt2 --out_dir=data/mine
    python prepare.py validate --data_dir=data/mine                               # reads everything again

Input: files, globs and folders (searched through) of .txt .md .jsonl, each also as .gz or .zst, and .parquet. A line of
.jsonl and a row of .parquet is one document under `text_key`; a text file is one document, cut near every `cut_chars`
characters at a blank line (else a line, else a space). Exact duplicates and empty documents are dropped and counted.
Tokenising runs at several MB of text per second and core. Stopped or killed, the same command goes on where it was, as
does a pipe that is given the same text again; the bins are the same for any number of processes. A finished folder is
left alone.

Filters, off by default: --quality=gopher or c4 with their published numbers, --language=en, --decontaminate=GLUE_FOLDER
and --minhash_bands=14 (near-duplicates). Each counts what it dropped in meta.json and shows the first 20 documents in
dropped.jsonl.

Many machines: each takes consecutive files of the input, and `merge` makes of the shards what one machine would have
made, byte for byte. --tokenizer=bpe:N trains on the same sample of the whole input in each; a tokenizer folder made
before saves that time. A file belongs to one shard. As a SLURM array:

    sbatch --array=0-7 --wrap='python prepare.py --input=texts --tokenizer=tok --shard=$SLURM_ARRAY_TASK_ID/8 \
        --out_dir=parts/$SLURM_ARRAY_TASK_ID'
    python prepare.py merge --input='parts/*' --out_dir=data/mine
"""

import json
import os
import sys

from configurator import configure, read_settings

input = ""  # files, globs or folders, separated by commas; - for standard input
input_format = "text"  # of standard input: text or jsonl
out_dir = ""  # folder to write: train.bin, val.bin, meta.json, tokenizer/
tokenizer = "bpe:16000"  # byte, bpe:N (trained on this text), gpt2, cl100k_base, o200k_base, folder or tokenizer.json
max_tokens = 0  # stop after this many tokens, at the end of a document; 0: all
num_proc = 0  # tokenising processes; 0: one per core, at most 8
val_fraction = 0.005  # share of the documents that goes to val.bin, chosen by a hash of their text
text_key = "text"  # field of a .jsonl line, column of a .parquet file
cut_chars = 1_000_000  # characters of a text file that make one document at most
on_bad_utf8 = "replace"  # bytes that are not UTF-8: replace (by U+FFFD, counted) or refuse
on_bad_line = "refuse"  # a .jsonl line that is no JSON or lacks text_key: refuse or skip (counted)
on_bad_file = "refuse"  # a damaged file: refuse, or skip from the damage on (counted, named)
shard = ""  # i/n, 0 <= i < n: make part i of n of the data set, for merge
quality = ""  # rules that drop documents: gopher (Rae et al. 2021), c4 (Raffel et al. 2020), gopher,c4
min_words = -1  # numbers of single rules; -1 or "": what --quality says, else off. Gopher: 50
max_words = -1  # Gopher: 100,000; of a document's first 1,000,000 characters, as all rules
min_word_length = -1.0  # mean, characters. Gopher: 3
max_word_length = -1.0  # Gopher: 10
max_symbols = -1.0  # hash signs, or ellipses, per word. Gopher: 0.1
max_bullets = -1.0  # share of lines that begin with a bullet. Gopher: 0.9
max_ellipses = -1.0  # share of lines that end with an ellipsis. Gopher: 0.3
min_alphabetic = -1.0  # share of words with a letter. Gopher: 0.8
min_stop_words = -1  # of the, be, to, of, and, that, have, with. Gopher: 2; other languages than English: 0
max_duplicate_lines = -1.0  # share of lines that repeat an earlier one. Gopher: 0.3
max_duplicate_line_chars = -1.0  # the same in characters. Gopher: 0.2
max_duplicate_paragraphs = -1.0  # Gopher: 0.3
max_duplicate_paragraph_chars = -1.0  # Gopher: 0.2
max_top_ngrams = ""  # share of characters in the most frequent 2-, 3-, 4-gram of words. Gopher: 0.20,0.18,0.16
max_duplicate_ngrams = ""  # in repeated 5- to 10-grams. Gopher: 0.15,0.14,0.13,0.12,0.11,0.10
max_curly_brackets = -1  # C4: 0
max_lorem_ipsum = -1  # C4: 0
min_sentences = -1  # in lines of five words or more that end like a sentence. C4: 3
language = ""  # keep these only, such as en or en,de (ISO 639-1, found by py3langid)
min_language_p = 0.5  # least probability of that language
decontaminate = ""  # files or folders of test data (GLUE): drop documents that share a run of words with them
decontaminate_words = 13  # length of such a run (Brown et al. 2020, appendix C)
minhash_bands = 0  # drop near-duplicates: bands of the MinHash signature. FineWeb: 14; 0: off
minhash_rows = 8  # hashes of a band; similarity s is found with probability 1 - (1 - s**rows)**bands
minhash_words = 5  # words of a shingle
source = ""  # where the text comes from, for meta.json
licence = ""  # its licence, for meta.json
data_dir = ""  # validate: the folder to check
verb = next(iter(sys.argv[1:2]), "") if sys.argv[1:2] in (["validate"], ["merge"]) else ""
config = configure(globals(), sys.argv[1 + bool(verb) :])

import numpy as np

from bins import SPLITS, DataError, check_files, load_meta, scan, unigram_entropy
from documents import one_message
from inputs import prepare_text
from parts import merge_parts
from shards import TokenData
from tokenizer import Tokenizer

DEFAULTS = {name: default for name, (default, _) in read_settings(__file__).items()}


def prepare():
    """Text -> bins; returns the summary."""
    if not input or not out_dir or data_dir:
        raise DataError("expected: python prepare.py --input=GLOB[,GLOB] --out_dir=DIR, or: python prepare.py validate "
                        "--data_dir=DIR; --help lists all settings")
    return prepare_text(config)


def merge():
    """Shards -> bins; returns the summary."""
    if not input or not out_dir or config != {**DEFAULTS, "input": input, "out_dir": out_dir}:
        raise DataError("expected: python prepare.py merge --input='parts/*' --out_dir=DIR, and no other setting: the "
                        "shards know theirs")
    return merge_parts(input, out_dir)


def validate():
    """Reads all of `data_dir` again and compares it with its meta.json; prints a report, returns it as a dict."""
    if not data_dir or config != {**DEFAULTS, "data_dir": data_dir}:
        raise DataError("expected: python prepare.py validate --data_dir=DIR, and no other setting")
    meta, problems, counts = load_meta(data_dir), [], {}
    try:
        n_bytes = Tokenizer.load(os.path.join(data_dir, meta["tokenizer"])).n_bytes
    except ValueError as error:
        raise DataError(str(error)) from None
    for split in SPLITS:
        counts[split] = np.zeros(meta["n_vocab"] + 1, np.int64)
        for (path, _), file in zip(check_files(data_dir, meta, split), meta["splits"][split]["files"]):
            sha256, found = scan(path, np.dtype(meta["dtype"]), meta["n_vocab"])
            counts[split] += found
            if sha256 != file["sha256"]:
                problems.append(f"{path}: sha256 {sha256[:16]}..., written as {file['sha256'][:16]}...: changed since")
        about, ids = meta["splits"][split], counts[split][:-1]
        for what, found, expected in (("ids outside the vocabulary", int(counts[split][-1]), 0),
                                      ("documents", int(ids[meta["eot_id"]]), about["documents"]),
                                      ("bytes of text", int(ids @ n_bytes[: len(ids)]), about["bytes"])):
            print(f"{split}: {found:,} {what}")
            if found != expected:
                problems.append(f"{split}: {found:,} {what}, expected {expected:,}")
    entropy = unigram_entropy(counts["train"][:-1], meta["eot_id"])
    if abs(entropy - meta["unigram_entropy"]) > 1e-6:
        problems.append(f"unigram entropy {entropy:.6f} nats, meta.json says {meta['unigram_entropy']:.6f}")
    if problems:
        raise DataError("\n".join([*problems, f"made by: {meta['command']}"]))
    tokens = {f"{split}_tokens": TokenData(data_dir, split, 1).n_tokens for split in SPLITS}
    return {"data_dir": data_dir, "valid": True, **tokens, "unigram_entropy": entropy}


with one_message():
    print(json.dumps({"validate": validate, "merge": merge}.get(verb, prepare)()))
