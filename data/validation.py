"""Checks a set of token ids and reports what it holds: `python prepare.py validate`.

A prepared folder is read from end to end and compared with its meta.json; files of token ids are
compared with their headers and the tokenizer. The report gives counts, lengths, duplicates, what
train and val share, and commands to go on with: presets of config/ that the tokens are enough for.
"""

import glob
import os
import re
import shlex
import sys
from array import array
from functools import partial

import numpy as np

from configurator import configure
from data import bins
from data.bins import SPLITS, DataError
from data.documents import digest, progress
from data.ids import (
    BLOCK,
    cut_documents,
    cut_rows,
    files_of_ids,
    n_data_ids,
    read_blocks,
    without_markers,
)
from data.reader import Tokens, load_tokenizer
from lib.files import parse_json, wrong_fields

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Compute-optimal for causal language models (Hoffmann et al. 2022, 2203.15556).
TOKENS_A_PARAMETER = 20
# Up to this many epochs, a repeated token is worth nearly as much as a new one (Muennighoff et al.
# 2023, 2305.16264).
EPOCHS = 4
# Most data have too few longer rows to learn the positions beyond: those are sinusoidal.
MOST_LEARNED_POSITIONS = 4096
LEAST_STEPS = 200  # a shorter run learns nothing, however little text there is
CPU_FLOPS = 1e11  # of training on a laptop's processor, a second
PRESET_VOCABULARY = 30522  # words, for which the heads of config/*.py state their parameters
BAR = 40  # characters of the longest bar of a histogram


def validate_folder(data_dir, run="", tokens_per_s=0.0):
    """Reads all of a prepared folder or a split again and prints a report -> dict.

    run: a training run whose log gives a rate, or else tokens_per_s, for the time that training
    takes. DataError lists everything that is not as meta.json says.
    """
    rate, meta = measured_rate(run, tokens_per_s), bins.load_meta(data_dir)
    problems, measured, columns = [], {}, {}
    width = done = 0  # tokens a row, 0 without rows; tokens read so far
    tok = load_tokenizer(data_dir, meta)
    check_fields(data_dir, meta)
    if "sources" in meta:
        bins.check_sources(data_dir, meta, thoroughly=True)
        width = meta["sources"]["width"]
        if not is_partition(data_dir, meta):
            problems.append("train and val have tokens in common, or leave some out")
    show = progress(sum(meta["splits"][split]["tokens"] for split in SPLITS), 0, "tokens")
    for split in SPLITS:
        tokens = Tokens(data_dir, meta, split)
        blocks, pad_id = partial(split_blocks, tokens), meta.get("pad_id", tok.pad_id)
        found = measured[split] = measure(blocks, tok, pad_id, width, show, done)
        done += tokens.n_tokens
        n_files = len(np.unique(tokens.number))  # a split may refer to some of the files only
        columns[split] = numbers(found, tok, n_files, width)
        problems += differences(data_dir, meta, split, found["counts"], tok)
    if problems:
        raise DataError("\n".join([*problems, f"made by: {meta['command']}"]))
    print_report(columns, joined(list(measured.values())), tok)
    shared = len(np.intersect1d(sequences(measured["train"]), sequences(measured["val"])))
    warning = ": the validation loss will look better than it is" if shared else ""
    print(f"\nin train and in val: {shared:,} {'rows' if width else 'documents'}{warning}")
    tokens = {f"{split}_tokens": columns[split]["tokens"] for split in SPLITS}
    commands = recommend(data_dir, tok, columns["train"], tokens["val_tokens"], width, *rate)
    return {"data_dir": data_dir, "valid": True, **tokens,
            "unigram_entropy": meta["unigram_entropy"], "in_train_and_val": shared, **columns,
            "commands": commands}


def validate_input(pattern, found, options, run="", tokens_per_s=0.0):
    """Reads files of token ids, prints a report and what to do next -> dict.

    found: an Input; pattern and options: the --input and the other settings it was opened with.
    run, tokens_per_s: as above. DataError for the first id that cannot be one.
    """
    rate, parts, done = measured_rate(run, tokens_per_s), [], 0
    show = progress(sum(source.tokens for source in found.sources), 0, "tokens")
    for source in found.sources:
        blocks = partial(read_blocks, source, 0, found.tok, found.packed)
        # Blocks of lists hold eot_ids that were added, so they cannot be cut into rows.
        width = 0 if source.column else source.width
        parts.append(measure(blocks, found.tok, found.pad_id, width, show, done))
        done += source.tokens
    everything, width = joined(parts), max(source.width for source in found.sources)
    column = numbers(everything, found.tok, len(found.sources), width)
    print_report({"input": column}, everything, found.tok)
    # A val split of about 20 documents, but no more than a fifth of the tokens.
    fraction = f"{min(0.2, max(0.005, 20 / max(column['documents'], 1))):.3g}"
    settings = [f"--{key}={value}" for key, value in options.items()]
    ways = {"bins: small, duplicates dropped, split by document": [
        f"--input={pattern}", "--out_dir=data/mine", *settings, f"--val_fraction={fraction}"]}
    paths = {os.path.abspath(source.path) for source in found.sources}
    folder = os.path.relpath(os.path.commonpath(map(os.path.dirname, paths)))
    is_all = paths == set(map(os.path.abspath, files_of_ids(folder)))  # split takes all there are
    if is_all and not any(source.column for source in found.sources):
        ways["or a split that copies nothing"] = [
            "split", f"--data_dir={folder}", "--out_dir=data/mine", *settings,
            f"--val_ratio={fraction}"]
    commands = []
    for what, words in ways.items():
        commands.append(shlex.join(["python", "prepare.py", *words]))
        print(f"\n{what}\n    {commands[-1]}")
    n_val = int(float(fraction) * column["tokens"])
    commands += recommend("data/mine", found.tok, column, n_val, width, *rate)
    return {"input": pattern, "valid": True, **column, "commands": commands}


# -----------------------------------------------------------------------------
# reading everything


def split_blocks(tokens, size=BLOCK):
    """Tokens of a split -> blocks as ids.read_blocks yields them, of `size` tokens."""
    for at in range(0, tokens.n_tokens, size):
        ids = np.empty(min(size, tokens.n_tokens - at), "<u4")
        tokens.read(at, ids)
        yield at, ids, np.zeros(0, np.int64)  # eot_id alone ends documents


def measure(read, tok, pad_id, width, show, done):
    """Blocks, which each call of read() yields -> a dict of what they hold:

    counts: int64 (n_vocab + 1,), occurrences of each id; the last entry is for ids out of range
    lengths, digests: int64 and uint64 of each document, without eot_id and padding, if not empty
    rows: digests of the rows of `width` tokens; not there with width 0
    padding: tokens

    Moves the progress bar, which stands at `done` tokens.
    """
    counts, padding = np.zeros(tok.n_vocab + 1, np.int64), 0
    lengths, digests = array("q"), bytearray()  # 16 bytes a document; Python objects take 100

    def counted():
        for at, ids, ends in read():
            counts[:] += np.bincount(np.minimum(ids, tok.n_vocab), minlength=len(counts))
            yield at, ids, ends
            show(done + at + len(ids))

    for ids, _ in cut_documents(counted(), tok.eot_id, pad_id):
        text, left_out = without_markers(ids, tok.eot_id, pad_id)
        padding += left_out.get("padding_tokens", 0)
        if len(text):
            lengths.append(len(text))
            digests += digest(text.tobytes())[:8]
    found = {"counts": counts, "lengths": np.array(lengths, np.int64),
             "digests": np.frombuffer(digests, "<u8"), "padding": padding}
    if width:
        rows = b"".join(digest(ids.tobytes())[:8] for ids, _ in cut_rows(read(), width))
        found["rows"] = np.frombuffer(rows, "<u8")
    return found


def joined(parts):
    """Measurements of several files -> one."""
    found = {name: sum(part[name] for part in parts) for name in ("counts", "padding")}
    for name in ("lengths", "digests", "rows"):
        arrays = [part[name] for part in parts if name in part]
        if arrays:
            found[name] = np.concatenate(arrays)
    return found


def sequences(found):
    """Digests of what counts as one sequence: of rows where there are rows, else of documents."""
    return found.get("rows", found["digests"])


# -----------------------------------------------------------------------------
# comparing with meta.json


def check_fields(data_dir, meta):
    """DataError unless each split of meta.json says what will be compared."""
    of_split = dict(tokens=int, documents=int, bytes=int, files=list)
    for split in SPLITS:
        about = meta["splits"].get(split)
        wrong = wrong_fields(about, of_split) if isinstance(about, dict) else ["fields"]
        for file in [] if wrong else about["files"]:
            of_file = dict(name=str, sha256=str)
            wrong += wrong_fields(file, of_file) if isinstance(file, dict) else ["files"]
        if wrong:
            raise DataError(f"{data_dir}/meta.json is damaged: {', '.join(wrong)} of {split} are "
                            f"missing or of another type; made by: {meta['command']}")


def differences(data_dir, meta, split, counts, tok):
    """What of a split is not as meta.json says, as a list of sentences."""
    about, problems = meta["splits"][split], []
    for file in about["files"]:
        path = os.path.join(data_dir, file["name"])
        if "sources" in meta:
            sha256 = bins.ranges_hash(path, meta["sources"]["files"])
        else:
            sha256 = bins.sha256_of(path)
        if sha256 != file["sha256"]:
            problems.append(f"{path}: sha256 {sha256[:16]}..., written as "
                            f"{file['sha256'][:16]}...: changed since")
    n_bytes = int(counts[:-1] @ tok.n_bytes[: tok.n_vocab])
    for what, n, expected in (("ids outside the vocabulary", int(counts[-1]), 0),
                              ("documents", int(counts[tok.eot_id]), about["documents"]),
                              ("bytes of text", n_bytes, about["bytes"])):
        if n != expected:
            problems.append(f"{split}: {n:,} {what}, expected {expected:,}")
    entropy = bins.unigram_entropy(counts[:-1], tok.eot_id, meta.get("pad_id"))
    with_padding = bins.unigram_entropy(counts[:-1], tok.eot_id)  # as splits once counted it
    off = min(abs(found - meta["unigram_entropy"]) for found in (entropy, with_padding))
    if split == "train" and off > 1e-6:
        problems.append(f"unigram entropy {entropy:.6f} nats, meta.json says "
                        f"{meta['unigram_entropy']:.6f}")
    return problems


def is_partition(data_dir, meta):
    """Whether the ranges of train and val together are all tokens of the files, each once."""
    ranges = np.concatenate([bins.load_ranges(data_dir, meta, split) for split in SPLITS])
    ranges = ranges[ranges[:, 0].argsort()]
    n_tokens = sum(file["tokens"] for file in meta["sources"]["files"])
    # Each range must begin where the one before it ends: the first at 0, none after n_tokens.
    return np.array_equal(np.append(ranges[:, 0], n_tokens), np.append(0, ranges[:, 1]))


# -----------------------------------------------------------------------------
# the report


def numbers(found, tok, n_files, width=0):
    """A measurement -> the numbers of the report; documents without eot_id and padding."""
    counts, lengths, rows = found["counts"][:-1], found["lengths"], sequences(found)
    low = median = mean = p90 = high = 0
    if len(lengths):
        percents = (0, 50, 90, 100)
        low, median, p90, high = np.percentile(lengths, percents, method="higher").tolist()
        mean = float(lengths.mean())
    n_tokens = max(int(counts.sum()), 1)  # to divide by
    return {"files": n_files, "tokens": int(counts.sum()), "vocabulary": n_data_ids(tok),
            "unique_ids": int(np.count_nonzero(counts)),
            "mean_id": float(counts @ np.arange(len(counts)) / n_tokens),
            "sequences": len(rows), "sequence_length": width or None,
            "duplicate_sequences": len(rows) - len(np.unique(rows)),
            "documents": len(lengths),
            "document_length": {"min": low, "median": median, "mean": mean, "p90": p90,
                                "max": high},
            "duplicate_documents": len(lengths) - len(np.unique(found["digests"])),
            "eot_share": float(counts[tok.eot_id] / n_tokens),
            "padding_share": found["padding"] / n_tokens}


def print_report(columns, found, tok):
    """Prints a table with `columns` {name: numbers}, and histograms over all of them together."""
    titles = {"document_length": "min, median, mean, 90 %, max tokens",
              "sequence_length": "tokens each"}
    print(f"{'':<36}" + "".join(f"{name:>28}" for name in columns))
    for key in next(iter(columns.values())):
        cells = "".join(f"{cell(column[key]):>28}" for column in columns.values())
        print(f"{titles.get(key, key.replace('_', ' ')):<36}{cells}")
    edges = np.linspace(0, tok.n_vocab, 17).astype(int).tolist()
    pairs = list(zip(edges, edges[1:]))
    print_bars("ids", [f"{low:,} - {high - 1:,}" for low, high in pairs],
               [int(found["counts"][low:high].sum()) for low, high in pairs])
    # frexp gives the number of bits k of a length: 2**(k - 1) <= length < 2**k.
    n_documents = np.bincount(np.frexp(found["lengths"])[1], minlength=1)
    used = np.flatnonzero(n_documents).tolist()
    print_bars("tokens a document", [f"{2**k // 2:,} - {2**k - 1:,}" for k in used],
               n_documents[used].tolist())


def cell(value):
    """A number of the report as text."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return " ".join(f"{part:,.0f}" for part in value.values())
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def print_bars(title, labels, counts):
    """Prints a histogram."""
    print(f"\n{title}")
    for label, n in zip(labels, counts):
        bar = "#" * round(BAR * n / max(*counts, 1))
        print(f"  {label:>19} {n:>15,} {n / max(sum(counts), 1):>6.1%} {bar}".rstrip())


# -----------------------------------------------------------------------------
# which presets the tokens are enough for


def recommend(data_dir, tok, train, n_val, width, rate, rate_from):
    """Prints the two largest presets that the tokens are enough for, or the smallest of all, with
    commands that train them; returns the commands.

    train: numbers of the train split; n_val: tokens of val; width: tokens a row, 0 without rows;
    rate: tokens/s, 0 if not known, and where it was measured.
    """
    longest = width  # the power of 2 that holds 90 % of the documents, from 64 to 2048
    if not longest:
        longest = 2 ** max(6, min(11, (train["document_length"]["p90"] - 1).bit_length()))
    every, commands, large = presets(tok.vocab_size, longest, width), [], []
    block_size = every[0][3]
    if min(n_val, train["tokens"]) < block_size:
        print(f"\ntoo few tokens to train and validate on rows of {block_size:,}")
        return []
    enough_for = train["tokens"] * EPOCHS // TOKENS_A_PARAMETER
    print(f"\n{train['tokens']:,} tokens are enough for {enough_for:,} parameters: "
          f"{TOKENS_A_PARAMETER} tokens a parameter (2203.15556, of causal models), each token up "
          f"to {EPOCHS} times (2305.16264)")
    fitting = [preset for preset in every if preset[0] <= enough_for] or every[:1]
    if not rate and not has_gpu():  # without a measured rate, that of a usual processor
        slow = [preset for preset in fitting[1:] if cpu_days(preset[0], train["tokens"]) > 1]
        fitting, large = [preset for preset in fitting if preset not in slow], slow
    for n_params, name, preset, block_size in fitting[-2:]:
        settings = plan(n_params, preset, train["tokens"], block_size, tok.has_text)
        changed = [f"--{key}={value}" for key, value in settings.items() if value != preset[key]]
        commands.append(shlex.join(["python", "train.py", f"config/{name}",
                                    f"--data_dir={data_dir}", *changed]))
        n_tokens = settings["max_steps"] * settings["batch_size"] * block_size
        more = ""
        if rate:
            more += f", {n_tokens / rate / 3600:,.1f} h at {rate:,.0f} tokens/s {rate_from}"
        if n_params > enough_for:
            ratio = n_params / max(enough_for, 1)
            more += f"; the smallest there is, it wants {ratio:,.1f} times as much"
        print(f"  {n_params:,} parameters, {n_tokens:,} tokens{more}\n    {commands[-1]}")
    if large:
        n_params, name, *_ = large[-1]
        days = cpu_days(n_params, train["tokens"])
        print(f"  also enough for config/{name}, which takes about {days:,.0f} days without a GPU, "
              "and none is here")
    if not rate:
        print("  how long: --tokens_per_s=RATE, or --out_dir=RUN with the log of a run of that "
              "size on that machine")
    return commands


def measured_rate(run, given):
    """-> (tokens/s or 0, where it was measured)."""
    if not run:
        return given, "as given"
    try:
        with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as file:
            rates = [parse_json(line).get("tokens_per_s") for line in file]
    except (OSError, ValueError) as error:
        raise DataError(f"--out_dir={run}: no log of a training run there ({error})") from None
    rates = [rate for rate in rates if rate]  # lines of an evaluation have none
    return float(np.median(rates)) if rates else 0.0, f"as in {run}"


def has_gpu():
    """Whether this machine has a GPU; asked without torch, which takes seconds to load."""
    is_apple = sys.platform == "darwin" and os.uname().machine == "arm64"
    return is_apple or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd")))


def cpu_days(n_params, train_tokens):
    """Days that training takes on a processor of CPU_FLOPS: 6 FLOPs a parameter and token."""
    n_tokens = min(n_params * TOKENS_A_PARAMETER, train_tokens * EPOCHS)
    return 6 * n_params * n_tokens / CPU_FLOPS / 86400


def presets(vocab_size, longest, width):
    """[(parameters, name, settings, tokens a row)] of config/*.py whose head states a size,
    smallest first.

    Rows are of `width` tokens, or, with width 0, those of the preset where documents have up to
    `longest`. The parameters are those with tables for this vocabulary and for such positions.
    """
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(ROOT), "config", "*.py"))):
        with open(path, encoding="utf-8") as file:
            head = re.search(r"([\d,]+) parameters with a 30,522-word vocabulary", file.read())
        if not head:
            continue
        settings = configure({"__file__": os.path.join(ROOT, "train.py")}, [path])
        if settings["masking_type"] in ("diffusion", "importance"):
            continue  # presets for these questions, not for a size
        block_size = width or min(longest, settings["block_size"])
        n_positions = block_size if block_size <= MOST_LEARNED_POSITIONS else 0
        more_rows = vocab_size - PRESET_VOCABULARY + n_positions - settings["block_size"]
        n_params = int(head[1].replace(",", "")) + more_rows * settings["token_dim"]
        # Presets of one size differ in their masks only: the first by name stands for all.
        found.setdefault(n_params, (os.path.basename(path), settings, block_size))
    return [(n_params, *found[n_params]) for n_params in sorted(found)]


def plan(n_params, preset, train_tokens, block_size, has_text):
    """-> {setting: value} for a preset and the tokens there are, in rows of block_size.

    A step and a micro-batch hold as many tokens as those of the preset, or as there are.
    """
    n_tokens = min(n_params * TOKENS_A_PARAMETER, train_tokens * EPOCHS)
    step_tokens = min(preset["batch_size"] * preset["block_size"], train_tokens)
    batch_size = max(1, step_tokens // block_size)
    micro_batch = preset["micro_batch"] * preset["block_size"] // block_size
    micro_batch = max(1, min(micro_batch, batch_size))
    while batch_size % micro_batch:
        micro_batch -= 1
    # A tenth of a short run, at most, is warm-up, and it is evaluated ten times or more.
    max_steps = max(LEAST_STEPS, n_tokens // (batch_size * block_size))
    a_tenth = -(-max_steps // 10)
    is_learned = block_size <= MOST_LEARNED_POSITIONS
    return {"block_size": block_size, "batch_size": batch_size, "micro_batch": micro_batch,
            "max_steps": max_steps, "warmup_steps": min(preset["warmup_steps"], a_tenth),
            "eval_interval": min(preset["eval_interval"], a_tenth),
            "position": preset["position"] if is_learned else "sinusoidal",
            "masking_type": preset["masking_type"] if has_text else "token"}
