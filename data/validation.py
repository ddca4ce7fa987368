"""What a set of token ids holds, whether it is what it should be, and which models it is enough for.

A prepared folder is read again from end to end and compared with its meta.json, files of token ids with what their
headers and the tokenizer say. Then: counts, lengths, duplicates, what train and val share, and commands to go on with.
"""

import glob
import json
import os
import re
import shlex
from array import array

import numpy as np

from configurator import configure
from data.bins import SPLITS, DataError, check_sources, load_meta, load_ranges, ranges_hash, sha256_of, unigram_entropy
from data.documents import call_tokenizer, digest, progress
from data.ids import BLOCK, blocks, content, n_ids, pieces, raw_rows, row_ends
from data.reader import Tokens
from data.tokenizer import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOKENS_A_PARAMETER = 20  # compute-optimal for causal language models (Hoffmann et al. 2022, 2203.15556)
EPOCHS = 4  # repeated so often, a token is worth nearly as much as a new one (Muennighoff et al. 2023, 2305.16264)
LEARNED = 4096  # longest rows for which positions are learned; few data hold enough longer ones
BAR = 40  # characters of the longest bar of a histogram


# ---------------------------------------------------------------------------------------------------------------------
# reading everything


def stored_blocks(tokens):
    """Tokens of a split -> blocks as pretokenised.blocks yields them."""
    for at in range(0, tokens.n_tokens, BLOCK):
        ids = np.empty(min(BLOCK, tokens.n_tokens - at), "<u4")
        tokens.read(at, ids)
        yield at, ids, np.zeros(0, np.int64)


def measure(some_blocks, tok, pad_id):
    """Blocks -> {counts int64 (n_vocab + 1,), the last those of ids out of range; lengths int64 and digests uint64, one
    for each document that is not empty, without eot_id and padding; padding}."""
    counts, lengths, digests, padding = np.zeros(tok.n_vocab + 1, np.int64), array("q"), bytearray(), 0

    def counted():
        for block in some_blocks:
            np.add(counts, np.bincount(np.minimum(block[1], tok.n_vocab), minlength=len(counts)), out=counts)
            yield block

    for ids, _ in pieces(counted(), tok.eot_id, pad_id):
        kept, left_out = content(ids, tok.eot_id, pad_id)
        padding += left_out.get("padding_tokens", 0)
        if len(kept):
            lengths.append(len(kept))
            digests += digest(kept.astype("<u4").tobytes())[:8]
    return {"counts": counts, "lengths": np.array(lengths, np.int64), "digests": np.frombuffer(digests, "<u8"),
            "padding": padding}


def row_digests(some_blocks, width):
    """Blocks -> digests uint64 of the rows of `width` tokens."""
    cut = ((at, ids, row_ends(at, len(ids), width)) for at, ids, _ in some_blocks)
    return np.frombuffer(b"".join(digest(ids.astype("<u4").tobytes())[:8] for ids, _ in pieces(cut, -1, -1)), "<u8")


def watched(some_blocks, show, before):
    """The same blocks; moves the bar."""
    for at, ids, ends in some_blocks:
        yield at, ids, ends
        show(before + at + len(ids))


def together(parts):
    """Measurements of several files -> one."""
    return {name: sum(part[name] for part in parts) if name in ("counts", "padding")
            else np.concatenate([part[name] for part in parts]) for name in parts[0]}


# ---------------------------------------------------------------------------------------------------------------------
# what was found


def numbers(found, tok, n_files, width=0):
    """A measurement -> the report's numbers; lengths of documents are without eot_id and padding."""
    counts, lengths = found["counts"][:-1], found["lengths"]
    n_tokens, rows = max(int(counts.sum()), 1), found.get("rows", found["digests"])
    length = dict.fromkeys(("min", "median", "mean", "p90", "max"), 0)
    if len(lengths):
        length = dict(zip(length, np.percentile(lengths, (0, 50, 0, 90, 100), method="higher").tolist()))
        length["mean"] = float(lengths.mean())
    return {"files": n_files, "tokens": int(counts.sum()), "vocabulary": n_ids(tok),
            "unique_ids": int(np.count_nonzero(counts)), "mean_id": float(counts @ np.arange(len(counts)) / n_tokens),
            "sequences": len(rows), "sequence_length": width or None,
            "duplicate_sequences": len(rows) - len(np.unique(rows)),
            "documents": len(lengths), "document_length": length,
            "duplicate_documents": len(lengths) - len(np.unique(found["digests"])),
            "eot_share": float(counts[tok.eot_id] / n_tokens), "padding_share": found["padding"] / n_tokens}


def bars(title, labels, counts):
    """Prints a histogram."""
    print(f"\n{title}")
    for label, n in zip(labels, counts):
        bar = "#" * round(BAR * n / max(*counts, 1))
        print(f"  {label:>19} {n:>15,} {n / max(sum(counts), 1):>6.1%} {bar}".rstrip())


def show(columns, found, tok):
    """Prints the report: `columns` {name: numbers}, histograms over all of them."""
    def cell(value):
        if isinstance(value, dict):
            return " ".join(f"{part:,.0f}" for part in value.values())
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"

    titles = {"document_length": "min, median, mean, 90 %, max tokens", "sequence_length": "tokens each"}
    print(f"{'':<36}" + "".join(f"{name:>28}" for name in columns))
    for key in next(iter(columns.values())):
        print(f"{titles.get(key, key.replace('_', ' ')):<36}"
              + "".join(f"{cell(column[key]):>28}" for column in columns.values()))
    edges = np.linspace(0, tok.n_vocab, 17).astype(int).tolist()
    bars("ids", [f"{low:,} - {high - 1:,}" for low, high in zip(edges, edges[1:])],
         [int(found["counts"][low:high].sum()) for low, high in zip(edges, edges[1:])])
    powers = np.bincount(np.frexp(found["lengths"])[1], minlength=1)
    used = np.flatnonzero(powers).tolist()
    bars("tokens a document", [f"{2**k // 2:,} - {2**k - 1:,}" for k in used], powers[used].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# what to do with it


def presets(vocab_size, block_size):
    """[(parameters, name, settings)] of config/*.py whose head states a size, smallest first, for such data."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(ROOT), "config", "*.py"))):
        with open(path, encoding="utf-8") as file:
            head = re.search(r"([\d,]+) parameters with a 30,522-word vocabulary", file.read())
        if head:
            settings = configure({"__file__": os.path.join(ROOT, "train.py")}, [path])
            positions = block_size * (block_size <= LEARNED) - settings["block_size"]
            rows = vocab_size - 30522 + positions  # of the tables of tokens and of positions, more than in the head
            n_params = int(head[1].replace(",", "")) + rows * settings["token_dim"]
            found.setdefault(n_params, (os.path.basename(path), settings))
    return [(n_params, *found[n_params]) for n_params in sorted(found)]


def measured_rate(run, given):
    """-> (tokens/s or 0, where it was measured)."""
    if not run:
        return given, "as given"
    try:
        with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as file:
            rates = [record["tokens_per_s"] for record in map(json.loads, file) if record.get("tokens_per_s")]
    except (OSError, ValueError) as error:
        raise DataError(f"--out_dir={run}: no log of a training run there ({error})") from None
    return float(np.median(rates)) if rates else 0.0, f"as in {run}"


def plan(n_params, preset, train_tokens, block_size, has_text):
    """{setting: value} for the tokens there are: batches of as many tokens as the preset's, its rate and its masks."""
    tokens = min(n_params * TOKENS_A_PARAMETER, train_tokens * EPOCHS)
    batch_size = max(1, min(preset["batch_size"] * preset["block_size"], train_tokens) // block_size)
    most, max_steps = preset["micro_batch"] * preset["block_size"] // block_size, tokens // (batch_size * block_size)
    return {"block_size": block_size, "batch_size": batch_size,
            "micro_batch": next(n for n in range(max(1, min(most, batch_size)), 0, -1) if batch_size % n == 0),
            "max_steps": max(1, max_steps), "warmup_steps": min(preset["warmup_steps"], -(-max_steps // 10)),
            "eval_interval": min(preset["eval_interval"], -(-max_steps // 10)),
            "position": preset["position"] if block_size <= LEARNED else "sinusoidal",
            "masking_type": preset["masking_type"] if has_text else "token"}


def recommend(data_dir, tok, train, val_tokens, width, rate, where):
    """Prints which presets the tokens are enough for, with commands that train them; returns the commands."""
    enough = train["tokens"] * EPOCHS // TOKENS_A_PARAMETER
    block_size = width or 2 ** max(6, min(11, (train["document_length"]["p90"] - 1).bit_length()))
    if min(val_tokens, train["tokens"]) < block_size:
        print(f"\ntoo few tokens to train and validate on rows of {block_size:,}")
        return []
    print(f"\n{train['tokens']:,} tokens are enough for {enough:,} parameters: {TOKENS_A_PARAMETER} tokens a parameter "
          f"(2203.15556, of causal models), each token up to {EPOCHS} times (2305.16264)")
    all_presets, commands = presets(tok.vocab_size, block_size), []
    for n_params, name, preset in [p for p in all_presets if p[0] <= enough][-2:] or all_presets[:1]:
        settings = plan(n_params, preset, train["tokens"], block_size, tok.has_text)
        tokens = settings["max_steps"] * settings["batch_size"] * block_size
        commands.append(shlex.join(["python", "train.py", f"config/{name}", f"--data_dir={data_dir}", *(
            f"--{key}={value}" for key, value in settings.items() if value != preset[key])]))
        more = f", {tokens / rate / 3600:,.1f} h at {rate:,.0f} tokens/s {where}" if rate else ""
        if n_params > enough:
            more += f"; the smallest there is, it wants {n_params / max(enough, 1):,.1f} times as much"
        print(f"  {n_params:,} parameters, {tokens:,} tokens{more}\n    {commands[-1]}")
    if not rate:
        print("  how long: --tokens_per_s=RATE, or --out_dir=RUN with the log of a run of that size on that machine")
    return commands


# ---------------------------------------------------------------------------------------------------------------------
# commands


def compare(data_dir, meta, split, found, tok):
    """What of a split is not as meta.json says, as a list of sentences."""
    about, counts, problems = meta["splits"][split], found["counts"], []
    for file in about["files"]:
        path = os.path.join(data_dir, file["name"])
        sha256 = ranges_hash(path, meta["sources"]["files"]) if "sources" in meta else sha256_of(path)
        if sha256 != file["sha256"]:
            problems.append(f"{path}: sha256 {sha256[:16]}..., written as {file['sha256'][:16]}...: changed since")
    for what, n, expected in (("ids outside the vocabulary", int(counts[-1]), 0),
                              ("documents", int(counts[tok.eot_id]), about["documents"]),
                              ("bytes of text", int(counts[:-1] @ tok.n_bytes[:tok.n_vocab]), about["bytes"])):
        if n != expected:
            problems.append(f"{split}: {n:,} {what}, expected {expected:,}")
    entropy = unigram_entropy(counts[:-1], tok.eot_id)
    if split == "train" and abs(entropy - meta["unigram_entropy"]) > 1e-6:
        problems.append(f"unigram entropy {entropy:.6f} nats, meta.json says {meta['unigram_entropy']:.6f}")
    return problems


def in_order(data_dir, meta):
    """Whether the ranges of train and val together are all tokens of the files, each once."""
    ranges = np.concatenate([load_ranges(data_dir, meta, split) for split in SPLITS])
    ranges = ranges[ranges[:, 0].argsort()]
    n_tokens = sum(file["tokens"] for file in meta["sources"]["files"])
    return np.array_equal(np.append(ranges[:, 0], n_tokens), np.append(0, ranges[:, 1]))


def validate_folder(data_dir, run="", tokens_per_s=0.0):
    """Reads all of a prepared folder or a split again, prints a report -> dict; DataError for what is not as it was."""
    rate, meta, problems, width = measured_rate(run, tokens_per_s), load_meta(data_dir), [], 0
    measured, columns = {}, {}
    tok = call_tokenizer(Tokenizer.load, os.path.join(data_dir, meta["tokenizer"]))
    if "sources" in meta:
        check_sources(data_dir, meta, thoroughly=True)
        width = meta["sources"]["width"]
        problems += ["train and val have tokens in common, or leave some out"] * (not in_order(data_dir, meta))
    tell, before = progress(sum(meta["splits"][split]["tokens"] for split in SPLITS), 0, "tokens"), 0
    for split in SPLITS:
        tokens = Tokens(data_dir, meta, split)
        measured[split] = measure(watched(stored_blocks(tokens), tell, before), tok, meta.get("pad_id", tok.pad_id))
        before += tokens.n_tokens
        if width:
            measured[split]["rows"] = row_digests(stored_blocks(tokens), width)
        columns[split] = numbers(measured[split], tok, len(np.unique(tokens.number)), width)
        problems += compare(data_dir, meta, split, measured[split], tok)
    if problems:
        raise DataError("\n".join([*problems, f"made by: {meta['command']}"]))
    show(columns, together(list(measured.values())), tok)
    shared = len(np.intersect1d(*(found.get("rows", found["digests"]) for found in measured.values())))
    print(f"\nin train and in val: {shared:,} {'rows' if width else 'documents'}"
          + ": the validation loss will look better than it is" * (shared > 0))
    commands = recommend(data_dir, tok, columns["train"], columns["val"]["tokens"], width, *rate)
    tokens = {f"{split}_tokens": columns[split]["tokens"] for split in SPLITS}
    return {"data_dir": data_dir, "valid": True, **tokens, "unigram_entropy": meta["unigram_entropy"],
            "in_train_and_val": shared, **columns, "commands": commands}


def validate_input(pattern, found, options, run="", tokens_per_s=0.0):
    """Reads files of token ids, prints a report and what to do next -> dict; DataError for the first that is none."""
    rate, parts, rows, before = measured_rate(run, tokens_per_s), [], [], 0
    tell = progress(sum(source.tokens for source in found.sources), 0, "tokens")
    for source in found.sources:
        some_blocks = watched(blocks(source, 0, found.tok, found.packed), tell, before)
        parts.append(measure(some_blocks, found.tok, found.pad_id))
        before += source.tokens
        if source.width and not source.column:
            rows.append(row_digests(raw_rows(source, 0), source.width))
    everything, width = together(parts), max(source.width for source in found.sources)
    if rows:
        everything["rows"] = np.concatenate(rows)
    column = numbers(everything, found.tok, len(found.sources), width)
    show({"input": column}, everything, found.tok)
    fraction = f"{min(0.2, max(0.005, 20 / max(column['documents'], 1))):.3g}"  # 20 documents to validate on
    options = [f"--{key}={value}" for key, value in options.items()]
    ways = {"bins: small, duplicates dropped, split by document": [
        f"--input={pattern}", "--out_dir=data/mine", *options, f"--val_fraction={fraction}"]}
    folders = [os.path.dirname(os.path.abspath(source.path)) for source in found.sources]
    if not any(source.column for source in found.sources):
        ways["or a split that copies nothing"] = [
            "split", f"--data_dir={os.path.relpath(os.path.commonpath(folders))}", "--out_dir=data/mine", *options,
            f"--val_ratio={fraction}"]
    commands = [shlex.join(["python", "prepare.py", *words]) for words in ways.values()]
    for what, command in zip(ways, commands):
        print(f"\n{what}\n    {command}")
    commands += recommend("data/mine", found.tok, column, int(float(fraction) * column["tokens"]), width, *rate)
    return {"input": pattern, "valid": True, **column, "commands": commands}
