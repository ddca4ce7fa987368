"""Any text -> token bins that train.py reads.

    python prepare.py --input='texts/*.txt' --out_dir=data/mine                   # a vocabulary of 16,000, trained
    python prepare.py --input=a.jsonl.gz,folder --out_dir=data/mine --tokenizer=byte
    zstdcat big.jsonl.zst | python prepare.py --input=- --input_format=jsonl --tokenizer=gpt2 --out_dir=data/mine
    python prepare.py --input='tokens/*.npy' --out_dir=data/mine --tokenizer=gpt2 # ids that others made
    python prepare.py merge --input='parts/*' --out_dir=data/mine                 # of many machines, see below
    python prepare.py validate --data_dir=data/mine                               # reads everything again, a report
    python prepare.py split --data_dir=tokens --out_dir=data/mine --tokenizer=gpt2 # train and val, nothing copied

Input: files, globs and folders (searched through) of .txt .md .jsonl, each also as .gz or .zst, and .parquet. A line of
.jsonl and a row of .parquet is one document under `text_key`; a text file is one document, cut near every `cut_chars`
characters at a blank line (else a line, else a space). Exact duplicates and empty documents are dropped and counted.
Budgets end with a whole document and leave a data set like any other; `stopped_by` says which one it was.
Tokenising runs at several MB of text per second and core. Stopped or killed, the same command goes on where it was, as
does a pipe that is given the same text again; the bins are the same for any number of processes. A finished folder is
left alone.

Filters, off by default: --quality=gopher or c4 with their published numbers, --language=en, --decontaminate=GLUE_FOLDER
and --minhash_bands=14 (near-duplicates). Each counts what it dropped in meta.json and shows the first 20 documents in
dropped.jsonl.

Token ids instead of text: .npy .pt .bin .arrow .feather, and .parquet without a text; formats.py says which. Their
tokenizer has to be named, or else their number and the one that ends a document: --vocab_size=50257 --eot_id=50256.

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
max_tokens = 0  # budgets, 0 for none: stop with the document that reaches so many tokens,
max_bytes = 0  # with the one that reaches so many bytes of text,
max_disk_gb = 0.0  # or before the one with which the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents to keep, by a hash of their text: 0.01 is within 0.1; all of it is read
num_proc = 0  # tokenising processes; 0: one per core, at most 8
val_fraction = 0.005  # share of the documents that goes to val.bin, chosen by a hash of their text
text_key = "text"  # field of a .jsonl line, column of a .parquet file
cut_chars = 1_000_000  # characters of a text file that make one document at most
on_bad_utf8 = "replace"  # bytes that are not UTF-8: replace (by U+FFFD, counted) or refuse
on_bad_line = "refuse"  # a .jsonl line that is no JSON or lacks text_key: refuse or skip (counted)
on_bad_file = "refuse"  # a file that is damaged or cut short: refuse, or skip the rest of it (counted)
shard = ""  # i/n, 0 <= i < n: make part i of n of the data set, for merge
source = ""  # where the text comes from, for meta.json
licence = ""  # its licence, for meta.json
follow_links = 0  # 1: links found in a folder or by a glob may lead out of it
# ---- which texts are dropped
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
# ---- token ids
vocab_size = 0  # how many ids there are, where their tokenizer is not at hand
eot_id = -1  # with vocab_size: the id that ends a document; -1: none does
pad_id = -1  # the id that rows are filled up with, left out; -1: that of the tokenizer
rows = "auto"  # rows are documents, packed (one stream cut into rows), or auto: packed when eot_id lies inside them
sequence_length = 0  # tokens a row must have, 0: any; split: tokens of a sequence where there are no rows
token_dtype = ""  # type of the ids in .bin files without a header; empty: uint16
token_key = ""  # column of ids in .arrow, .feather, .parquet; empty: input_ids
# ---- validate and split
data_dir = ""  # a prepared folder, or one with files of token ids
tokens_per_s = 0.0  # validate: a measured rate, for the time that training takes; or --out_dir=RUN, which logged one
val_ratio = 0.01  # split: share that goes to val
by = ""  # split: sequence, document or file; empty: sequence where there are rows, else document
seed = 0  # split: another one, another choice
symlink = 0  # split: 1 by file, with folders train/ and val/ of relative links
command = sys.argv[1] if sys.argv[1:2] in (["validate"], ["split"], ["merge"]) else "prepare"
config = configure(globals(), sys.argv[1 + (command != "prepare") :])
defaults = {name: value for name, (value, _) in read_settings(__file__).items()}

from data.bins import DataError
from data.documents import one_message, write_dataset
from data.ids import files_of_ids, holds_ids, open_input, read_documents
from data.inputs import find_inputs, prepare_text
from data.merge import merge_parts
from data.splitting import make_split
from data.validation import validate_folder, validate_input

OF_IDS = ("tokenizer", "vocab_size", "eot_id", "pad_id", "rows", "sequence_length", "token_dtype", "token_key")
OF_SPLIT = ("data_dir", "tokens_per_s", "val_ratio", "by", "seed", "symlink")


def prepare():
    """Text -> bins; returns the summary."""
    if not input or not out_dir or data_dir:
        raise DataError("expected: python prepare.py --input=GLOB[,GLOB] --out_dir=DIR, or: python prepare.py validate "
                        "--data_dir=DIR; --help lists all settings")
    only(*set(config) - {*OF_SPLIT})
    if input != "-" and input_format != defaults["input_format"]:
        raise DataError(f"--input_format={input_format} is of standard input (--input=-); files tell by their names")
    files = find_inputs(input, follow_links) if input != "-" else None
    if files and (ids := [path for path in files.paths if holds_ids(path, token_key, text_key)]):
        return prepare_ids(files, ids)
    if of_ids := " ".join(f"--{name}" for name in changed(OF_IDS) if name != "tokenizer"):
        raise DataError(f"{of_ids}: only token ids have such a thing, and {files.paths[0] if files else input} is text")
    return prepare_text(config, files)


def prepare_ids(files, ids):
    """Files of token ids -> bins; returns the summary."""
    if texts := sorted({*files.paths} - {*ids}):
        raise DataError(f"{ids[0]} holds token ids, {texts[0]} text: prepare them apart")
    of_both = {*OF_IDS, "input", "out_dir", "max_tokens", "max_disk_gb", "fraction", "val_fraction", "source",
               "licence", "follow_links"}
    if ignored := " ".join(f"--{name}" for name in changed(config) if name not in of_both):
        raise DataError(f"{ignored}: only texts have such a thing, and {ids[0]} holds token ids")
    found = open_input(ids, **{name: config[name] for name in OF_IDS})
    decides = {"input": files.named, "pad_id": found.pad_id, "packed": found.packed, "token_dtype": token_dtype,
               "token_key": token_key}
    return write_dataset(read_documents(*found[:2], *found[3:5]), out_dir, found.spec, val_fraction, max_tokens, 1,
                         decides, 0, source or input, licence, input_tokens=sum(s.tokens for s in found.sources),
                         fraction=fraction, max_disk_gb=max_disk_gb)


def merge():
    """Shards -> bins; returns the summary."""
    if not input or not out_dir:
        raise DataError("expected: python prepare.py merge --input='parts/*' --out_dir=DIR")
    only("input", "out_dir")
    return merge_parts(input, out_dir)


def changed(names):
    """Those of the settings `names` that are not the defaults, {name: value}."""
    return {name: config[name] for name in names if config[name] != defaults[name]}


def only(*names):
    """DataError for a setting that the command would ignore."""
    if ignored := " ".join(f"--{name}" for name in changed(config) if name not in names):
        takes = " ".join(f"--{name}" for name in config if name in names)
        raise DataError(f"{ignored}: {command} takes {takes} and no other setting")


def validate():
    """Prints a report of a prepared folder, or of files of token ids; returns it as a dict."""
    if bool(data_dir) == bool(input):
        raise DataError("expected: python prepare.py validate --data_dir=DIR, or, for files of token ids, "
                        "python prepare.py validate --input=GLOB --tokenizer=...")
    prepared = any(os.path.exists(os.path.join(data_dir, name)) for name in ("meta.json", "progress.json"))
    if data_dir and (prepared or not files_of_ids(data_dir)):
        only("data_dir", "out_dir", "tokens_per_s")
        return validate_folder(data_dir, out_dir, tokens_per_s)
    only("data_dir", "input", "out_dir", "tokens_per_s", "follow_links", *OF_IDS)
    paths = find_inputs(input or data_dir, follow_links).paths
    if texts := [path for path in paths if not holds_ids(path, token_key, text_key)]:
        raise DataError(f"{texts[0]} is text: make bins of it with python prepare.py --input={texts[0]} --out_dir=DIR")
    found = open_input(paths, **{name: config[name] for name in OF_IDS})
    return validate_input(input or data_dir, found, changed(OF_IDS), out_dir, tokens_per_s)


def split():
    """Train and val of a prepared folder or of files of token ids, nothing copied; returns the summary."""
    if not data_dir or not out_dir:
        raise DataError("expected: python prepare.py split --data_dir=DIR --out_dir=DIR --val_ratio=0.01")
    only("data_dir", "out_dir", "val_ratio", "by", "seed", "symlink", "follow_links", *OF_IDS)
    return make_split(data_dir, out_dir, changed(OF_IDS), follow_links, val_ratio, by, seed, symlink)


with one_message():
    print(json.dumps({"validate": validate, "split": split, "merge": merge, "prepare": prepare}[command]()))
