r"""Text -> token bins that train.py reads. Also: check a data set, split one, merge its shards.

    python prepare.py --input=input.txt             # one text or many: bins in data/mine
    python prepare.py --input=a.jsonl.gz,folder --out_dir=data/other --tokenizer=byte
    zstdcat big.jsonl.zst | python prepare.py --input=- --input_format=jsonl --tokenizer=gpt2
    python prepare.py --input='tokens/*.npy' --tokenizer=gpt2      # ids, not text
    python prepare.py merge --input='parts/*'       # shards, see below
    python prepare.py validate --data_dir=data/mine                # reads all, prints a report
    python prepare.py split --data_dir=tokens --tokenizer=gpt2     # copies nothing

How text becomes bins, one file a step:

    data/inputs.py      finds the files, chooses what the settings leave to it
    data/texts.py       reads the texts in a file
    data/documents.py   drops exact duplicates, chooses train or val, cuts the rest into chunks
    data/workers.py     in several processes: applies data/filters.py, then tokenises
    data/duplicates.py  drops near-duplicates (--minhash_bands)
    data/writer.py      appends the ids to train.bin and val.bin; writes meta.json last

Input: files, globs and folders (searched recursively) of .txt .md .jsonl .ndjson .json, each also
as .gz or .zst, of .parquet .arrow .feather, and folders that `datasets` saved to disk. A line of
JSON, an item of a JSON list or a row of a table is one document, read from `text_key`. A text file
is one document; a long one is cut near every `cut_chars` characters, at a blank line if possible,
else at a line end, else at a space. Exact duplicates and empty documents are dropped and counted. A
budget (max_tokens and the like) stops at the end of a document and gives a normal, complete data
set; `stopped_by` in meta.json names it.

One text is enough. What is left to prepare.py depends on the size of the input: val gets 0.5 % of
the documents, of less than 100 MB about 500 kB and at most 10 %; few documents are cut into so many
pieces that 20 of them make up val; the vocabulary has one id for each 1,000 bytes, 512 to 16,000
(below 20 kB: bytes). It prints what it chose.

Tokenising runs at several MB of text per second and core. After a stop or a kill, the same command
continues where it was; a pipe must be given the same text again. The bins are the same for any
number of processes. A complete folder is left as it is.

Filters, off by default: --quality=gopher or c4 with their published numbers, --language=en,
--decontaminate=GLUE_FOLDER and --minhash_bands=14 (near-duplicates). meta.json counts what each
dropped; dropped.jsonl shows the first 20 documents of each.

Token ids instead of text: .npy .pt .bin, and tables with lists of ids and without a text column;
data/ids.py describes them. Name their tokenizer, or else how many ids there are and which one ends
a document: --vocab_size=50257 --eot_id=50256.

Many machines: each prepares one shard, which is a run of consecutive input files, and `merge` makes
the data set that one machine would have made, byte for byte. --tokenizer=bpe:N trains on the same
sample of the whole input in every shard; a tokenizer folder made beforehand saves that time. A file
belongs to one shard. As a SLURM array:

    sbatch --array=0-7 --wrap='python prepare.py --input=texts --tokenizer=tok \
        --shard=$SLURM_ARRAY_TASK_ID/8 --out_dir=parts/$SLURM_ARRAY_TASK_ID'
    python prepare.py merge --input='parts/*' --out_dir=data/mine
"""

import json
import sys

from configurator import configure, read_settings

# ---- input and output
input = ""  # files, globs or folders, separated by commas; - for standard input
input_format = "text"  # of standard input: text or jsonl
out_dir = "data/mine"  # folder to write: train.bin, val.bin, meta.json, tokenizer/
tokenizer = "bpe"  # bpe (trained, up to 16,000 ids), bpe:N, byte, a published name, or a path
val_fraction = 0.0  # share of the documents for val, by a hash; 0: 0.005, more of a small input
num_proc = 0  # tokenising processes; 0: one per core, at most 8
source = ""  # where the text comes from, for meta.json
licence = ""  # its licence, for meta.json
# ---- budgets, 0 for none
max_tokens = 0  # stop after the document that reaches this many tokens
max_bytes = 0  # stop after the document that reaches this many bytes of text
max_disk_gb = 0.0  # stop before the folder would hold more than so many GB (1e9 bytes)
fraction = 1.0  # share of the documents to keep, by hash: 0.01 is a subset of 0.1; all is read
# ---- how files are read
text_key = "text"  # field of JSON, column of a table; meta.text: the field text of the field meta
cut_chars = 0  # largest document that a text file is cut into, characters; 0: by the input
on_bad_utf8 = "replace"  # bytes that are not UTF-8: replace (by U+FFFD, counted) or refuse
on_bad_line = "refuse"  # a line of JSON or row of a table without a text: refuse or skip (counted)
on_bad_file = "refuse"  # a damaged or cut file: refuse, or skip the rest of it (counted)
follow_links = False  # links found in a folder or by a glob may lead out of it
shard = ""  # i/n, 0 <= i < n: make part i of n of the data set, for merge
# ---- rules that drop documents
quality = ""  # gopher (Rae et al. 2021), c4 (Raffel et al. 2020), or gopher,c4; "": none
min_words = -1  # single limits; -1 or "": what --quality says, else off. Gopher: 50
max_words = -1  # Gopher: 100,000. All rules look at a document's first 1,000,000 characters
min_word_length = -1.0  # mean, characters. Gopher: 3
max_word_length = -1.0  # mean, characters. Gopher: 10
max_symbols = -1.0  # hash signs, or ellipses, per word. Gopher: 0.1
max_bullets = -1.0  # share of lines that begin with a bullet. Gopher: 0.9
max_ellipses = -1.0  # share of lines that end with an ellipsis. Gopher: 0.3
min_alphabetic = -1.0  # share of words with a letter. Gopher: 0.8
min_stop_words = -1  # of the, be, to, of, and, that, have, with. Gopher: 2; not English: set 0
max_duplicate_lines = -1.0  # share of lines that repeat an earlier one. Gopher: 0.3
max_duplicate_line_chars = -1.0  # the same in characters. Gopher: 0.2
max_duplicate_paragraphs = -1.0  # share of paragraphs that repeat an earlier one. Gopher: 0.3
max_duplicate_paragraph_chars = -1.0  # the same in characters. Gopher: 0.2
max_top_ngrams = ""  # share of characters in the top 2-, 3-, 4-gram. Gopher: 0.20,0.18,0.16
max_duplicate_ngrams = ""  # in repeated 5- to 10-grams. Gopher: 0.15,0.14,0.13,0.12,0.11,0.10
max_curly_brackets = -1  # number of {. C4: 0
max_lorem_ipsum = -1  # number of "lorem ipsum". C4: 0
min_sentences = -1  # in lines of five words or more that end like a sentence. C4: 3
language = ""  # keep only these, such as en or en,de (ISO 639-1, found by py3langid)
min_language_p = 0.5  # least probability of that language
decontaminate = ""  # test data (GLUE): drop documents that share a run of words with these files
decontaminate_words = 13  # length of such a run, words (Brown et al. 2020, appendix C)
minhash_bands = 0  # drop near-duplicates: bands of the MinHash signature. FineWeb: 14; 0: off
minhash_rows = 8  # hashes per band; similarity s is found with p = 1 - (1 - s**rows)**bands
minhash_words = 5  # words of a shingle
# ---- token ids as input
vocab_size = 0  # how many ids there are, if their tokenizer is not at hand
eot_id = -1  # with vocab_size: the id that ends a document; -1: none does
pad_id = -1  # the id that fills up rows, left out of the bins; -1: that of the tokenizer
rows = "auto"  # documents, packed (rows cut one stream) or auto: packed if eot_id lies inside rows
sequence_length = 0  # tokens that a row must have, 0: any; split: tokens a sequence, without rows
token_dtype = ""  # type of the ids in .bin files without a header; empty: uint16
token_key = ""  # column of ids in .arrow, .feather, .parquet; empty: input_ids
# ---- validate and split
data_dir = ""  # a prepared folder, or one with files of token ids
tokens_per_s = 0.0  # validate: a measured rate, to estimate training time; or --out_dir=RUN
val_ratio = 0.01  # split: share that goes to val
by = ""  # split: sequence, document or file; empty: sequence where there are rows, else document
seed = 0  # split: another seed makes another choice
symlink = False  # split: by file, with folders train/ and val/ of relative links

# The first word may name another mode; the rest are settings, of all modes in one list.
MODES = ("validate", "split", "merge")
mode = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in MODES else "prepare"
config = configure(globals(), sys.argv[1:] if mode == "prepare" else sys.argv[2:])
defaults = {name: value for name, (value, _) in read_settings(__file__).items()}

from data.bins import DataError
from data.documents import one_message, write_dataset
from data.ids import files_of_ids, holds_ids, open_input, read_documents
from data.inputs import find_inputs, prepare_text, val_fraction_of_ids
from data.merge import merge_parts
from data.splitting import make_split
from data.validation import validate_folder, validate_input
from data.writer import is_begun

# Settings that describe files of token ids, and those that only validate and split use.
OF_IDS = ("tokenizer", "vocab_size", "eot_id", "pad_id", "rows", "sequence_length", "token_dtype",
          "token_key")
OF_SPLIT = ("data_dir", "tokens_per_s", "val_ratio", "by", "seed", "symlink")
# Settings that do something only with another one.
ONLY_WITH = {"language": ("min_language_p",), "decontaminate": ("decontaminate_words",),
             "minhash_bands": ("minhash_rows", "minhash_words")}
# What prepare uses where the input is token ids.
WITH_IDS = (*OF_IDS, "input", "out_dir", "max_tokens", "max_disk_gb", "fraction", "val_fraction",
            "source", "licence", "follow_links")


# --------------------------------------------------------------------------------------------------
# A setting that the chosen mode would ignore is refused: otherwise the user believes that it works.


def changed(names):
    """Those of the settings `names` that differ from their defaults, {name: value}."""
    return {name: config[name] for name in names if config[name] != defaults[name]}


def as_options(names):
    """Names of settings -> how they are written on the command line."""
    return " ".join(f"--{name}" for name in names)


def only(*names):
    """Raises DataError if a setting other than `names` was changed."""
    if ignored := [name for name in changed(config) if name not in names]:
        takes = as_options(name for name in config if name in names)
        raise DataError(f"{as_options(ignored)}: {mode} takes {takes} and no other setting")


# --------------------------------------------------------------------------------------------------
# the modes: each reads the settings above and returns what the last line prints as JSON


def prepare():
    """Text or token ids -> bins; returns the summary."""
    if not input or data_dir:
        raise DataError("expected: python prepare.py --input=GLOB[,GLOB] --out_dir=DIR, or: python "
                        "prepare.py validate --data_dir=DIR; --help lists all settings")
    if not out_dir:
        raise DataError("--out_dir is empty, an unset variable perhaps: expected a folder to write")
    only(*(name for name in config if name not in OF_SPLIT))
    for name, others in ONLY_WITH.items():
        if not config[name] and changed(others):
            raise DataError(f"{as_options(changed(others))}: no effect without --{name}")
    files = None  # standard input
    if input != "-":
        if "input_format" in changed(config):
            raise DataError(f"--input_format={input_format} is of standard input (--input=-); "
                            "files tell by their names")
        files = find_inputs(input, follow_links)
        if of_ids := [path for path in files.paths if holds_ids(path, token_key, text_key)]:
            return prepare_ids(files, of_ids)
    if ignored := [name for name in changed(OF_IDS) if name != "tokenizer"]:
        raise DataError(f"{as_options(ignored)}: only token ids have such a thing, and "
                        f"{files.paths[0] if files else input} is text")
    return prepare_text(config, files)


def prepare_ids(files, of_ids):
    """Files of token ids -> bins; returns the summary. of_ids: those of `files` that hold ids."""
    if texts := sorted(set(files.paths) - set(of_ids)):
        raise DataError(f"{of_ids[0]} holds token ids, {texts[0]} text: prepare them apart")
    if ignored := [name for name in changed(config) if name not in WITH_IDS]:
        raise DataError(f"{as_options(ignored)}: only texts have such a thing, and {of_ids[0]} "
                        "holds token ids")
    found = open_input(of_ids, **{name: config[name] for name in OF_IDS})
    # These decide the bytes, so a folder that was begun with others is refused.
    decides = {"input": files.named, "pad_id": found.pad_id, "packed": found.packed,
               "token_dtype": token_dtype, "token_key": token_key}
    documents = read_documents(found.sources, found.tok, found.pad_id, found.packed)
    n_tokens, share, note = sum(part.tokens for part in found.sources), val_fraction, ""
    if not share:
        share, note = val_fraction_of_ids(documents, n_tokens, out_dir, files.named)
    done = write_dataset(
        documents, out_dir, found.spec, share, max_tokens, num_proc=1, settings=decides,
        source=source or input, licence=licence, fraction=fraction, max_disk_gb=max_disk_gb,
        input_tokens=n_tokens)
    print(note, end="\n" * bool(note), flush=True)
    return done


def merge():
    """Shards made with --shard=i/n -> bins; returns the summary."""
    if not input:
        raise DataError("expected: python prepare.py merge --input='parts/*' --out_dir=DIR")
    only("input", "out_dir")
    return merge_parts(input, out_dir)


def validate():
    """Prints a report of a prepared folder, or of files of token ids; returns it as a dict."""
    run = out_dir if "out_dir" in changed(config) else ""  # here it names a training run
    if bool(data_dir) == bool(input):
        raise DataError("expected: python prepare.py validate --data_dir=DIR, or, for files of "
                        "token ids, python prepare.py validate --input=GLOB --tokenizer=...")
    if data_dir and (is_begun(data_dir) or not files_of_ids(data_dir)):
        only("data_dir", "out_dir", "tokens_per_s")
        return validate_folder(data_dir, run, tokens_per_s)
    only("data_dir", "input", "out_dir", "tokens_per_s", "follow_links", *OF_IDS)
    paths = find_inputs(input or data_dir, follow_links).paths
    if texts := [path for path in paths if not holds_ids(path, token_key, text_key)]:
        raise DataError(f"{texts[0]} is text: make bins of it with python prepare.py "
                        f"--input={texts[0]} --out_dir=DIR")
    found = open_input(paths, **{name: config[name] for name in OF_IDS})
    return validate_input(input or data_dir, found, changed(OF_IDS), run, tokens_per_s)


def split():
    """Train and val lists over a prepared folder or files of token ids; returns the summary.

    Nothing is copied: the lists say which ranges of the old files belong to which split.
    """
    if not data_dir:
        raise DataError("expected: python prepare.py split --data_dir=DIR --out_dir=DIR "
                        "--val_ratio=0.01")
    only("data_dir", "out_dir", "val_ratio", "by", "seed", "symlink", "follow_links", *OF_IDS)
    return make_split(data_dir, out_dir, changed(OF_IDS), follow_links, val_ratio, by, seed,
                      symlink)


with one_message():  # a mistake of the user, Ctrl-C and SIGTERM end in one message, not a traceback
    run = {"prepare": prepare, "validate": validate, "split": split, "merge": merge}[mode]
    print(json.dumps(run()))
