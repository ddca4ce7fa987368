"""Measures prepared data and tries vocabularies on it: tables, out_dir/stats.png and stats.json.

    python data/stats.py --data_dir=data/mine
    python data/stats.py --data_dir=data/wiki,data/web --vocabularies=16000,32000,64000,128000

It measures how long documents are, how much padding rows that start at a document would hold, and
how often each id occurs. Then it trains vocabularies on a sample of the decoded train split and
measures on the val split: bytes a token, parameters of the token table, and how many of their ids
the whole train split would show often enough to learn. It reads about 100 M tokens a second; three
vocabularies take half a minute.
"""

import itertools
import json
import os
import sys
import textwrap

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure

data_dir = "data/pydocs"  # prepared data, several with commas between
vocabularies = "8000,16000,32000"  # sizes of BPE vocabularies to try, 512 to 262144; empty: none
sample_mb = 16.0  # MB of text from the train splits that they are trained on
val_mb = 4.0  # MB of text from the val splits that they are measured on
out_dir = "out/stats"  # stats.png and stats.json go here
config = configure(globals())

import numpy as np

from data.bins import SPLITS, DataError
from data.documents import one_message
from data.reader import DocumentRows, TokenData, folders
from data.tokenizer import SPECIALS, VOCAB_SIZES, Tokenizer, with_specials
from data.validation import split_blocks
from lib.files import write_json

CHUNK = 2**22  # tokens read at a time
MOST_OF_A_DOCUMENT = 200_000  # tokens of one document in a sample: a book must not be all of it
ROW_LENGTHS = (128, 512, 2048)  # tokens of the rows whose padding is reported
# Gowda and May 2020 (2004.02334) recommend the largest vocabulary of which 95 % of the ids occur
# 100 times or more in the training data.
ENOUGH, SHARE_OF_IDS = 100, 0.95
# Ids of single bytes. Every vocabulary has all of them and most text leaves many unused, so they do
# not count when a vocabulary is judged by the share of its ids that occur.
N_BYTES = 256
INK, MUTED, LINE = "#1c2430", "#6b7685", "#d9dee5"
COLOURS = ("#2a6f97", "#d1495b", "#3d8b6e", "#c98a1b", "#7b5ea7", "#5c6b73")


def main():
    names, sizes = folders(data_dir), check_settings()
    if not out_dir:
        raise DataError("--out_dir is empty: expected a folder for stats.png and stats.json")
    os.makedirs(out_dir, exist_ok=True)
    sets, curves, train, val, rows = {}, {}, [], [], []
    for name in names:
        sets[name], train_texts, val_texts, curves[name] = measure(name, len(names))
        train, val = train + train_texts, val + val_texts
    total_bytes = sum(numbers["bytes"] for numbers in sets.values())
    if sizes and not (train and val):
        print("no vocabulary is tried: only ids of this data are known, no text", flush=True)
    elif sizes:
        n_characters = sum(map(len, train))
        print(f"training vocabularies on {n_characters / 1e6:,.1f} M characters", flush=True)
        rows = try_vocabularies(sizes, train, val, total_bytes)
    line = advice(rows, total_bytes) if rows else ""
    print_tables(sets, rows, line)
    picture = os.path.join(out_dir, "stats.png")
    draw(picture, curves, rows, line)
    summary = dict(data=sets, vocabularies=rows, advice=line, picture=picture)
    write_json(os.path.join(out_dir, "stats.json"), summary)
    print(json.dumps(summary))


def check_settings():
    """Sizes of the vocabularies, sorted; DataError for settings that make no sense."""
    sizes = vocabularies.split(",") if vocabularies else []
    if not all(size.strip().isdecimal() and int(size) in VOCAB_SIZES for size in sizes):
        raise DataError(f"vocabularies={vocabularies!r}: expected sizes from {VOCAB_SIZES[0]} to "
                        f"{VOCAB_SIZES[-1]:,} with commas between, such as 8000,16000,32000; empty "
                        "for none")
    if not (sample_mb > 0 and val_mb > 0):
        raise DataError(f"sample_mb={sample_mb}, val_mb={val_mb}: expected more than 0")
    return sorted({int(size) for size in sizes})


# -----------------------------------------------------------------------------
# one prepared folder


def measure(name, n_folders):
    """A prepared folder -> (its numbers, texts of train, texts of val, what is drawn of it).

    The texts are a sample: each of n_folders gives its share of sample_mb and of val_mb.
    """
    train, val = (TokenData(name, split, 1) for split in SPLITS)
    tok = Tokenizer.load(os.path.join(name, "tokenizer"))
    documents, counts = scan(train, tok)
    val_documents, val_counts = scan(val, tok)
    _, lengths, n_bytes = documents
    # Ends of documents and padding are no words. What is left, sorted, gives the coverage.
    word_counts = np.delete(counts, [train.eot_id, train.stored_pad])
    covered = np.cumsum(np.sort(word_counts)[::-1]) / max(1, word_counts.sum())
    rare = np.where(counts < ENOUGH, val_counts, 0)
    rare[[val.eot_id, val.stored_pad]] = 0
    numbers = dict(
        tokenizer=tok.name, documents=len(lengths), tokens=int(lengths.sum()),
        bytes=int(n_bytes.sum()), bytes_per_token=n_bytes.sum() / max(1, lengths.sum()),
        document_tokens=quantiles(lengths), document_bytes=quantiles(n_bytes),
        padding_of_document_rows=padding_shares(train) if counts[train.eot_id] else {},
        n_vocab=tok.n_vocab, ids_seen=int((word_counts > 0).sum()),
        ids_seen_often=int((word_counts >= ENOUGH).sum()),
        covered_by={str(k): float(covered[k - 1])
                    for k in (100, 1000, 4000, 16000) if k < len(covered)},
        val_tokens_seldom_trained=float(rare.sum() / max(1, val_counts.sum())))
    train_texts, val_texts = [], []
    if tok.has_text:
        train_texts = sample(train, tok, documents, sample_mb * 1e6 / n_folders)
        val_texts = sample(val, tok, val_documents, val_mb * 1e6 / n_folders)
    # An empty document has no place on the logarithmic axis of the picture.
    curves = (lengths[lengths > 0], n_bytes[n_bytes > 0], covered)
    return numbers, train_texts, val_texts, curves


def scan(data, tok):
    """Reads a split -> int64 (3, n): first token, tokens, bytes of each document, without its end
    and padding; and int64 (n_vocab,), occurrences of each id.

    A running sum of tokens and one of bytes, looked up where documents end, give the sizes of all
    documents of a chunk as differences: no Python loop over documents.
    """
    parts, counts = [], np.zeros(tok.n_vocab, np.int64)
    total = at_last_end = np.zeros((2, 1), np.int64)  # tokens and bytes of text so far
    for at, ids, _ in split_blocks(data, CHUNK):
        counts += np.bincount(ids, minlength=tok.n_vocab)
        is_text = (ids != data.eot_id) & (ids != data.stored_pad)
        sums = total + np.cumsum([is_text, tok.n_bytes[ids]], axis=1)
        ends = np.flatnonzero(ids == data.eot_id)
        if at + len(ids) == data.n_tokens and is_text[-1]:
            ends = np.append(ends, len(ids) - 1)  # the last document has no eot_id
        sizes = np.diff(sums[:, ends], prepend=at_last_end)
        # Padding comes before the text of a document, so its tokens are the last before the end.
        starts = at + ends + is_text[ends] - sizes[0]
        parts.append(np.stack([starts, *sizes]))
        total = sums[:, -1:]
        if len(ends):
            at_last_end = sums[:, ends[-1:]]
    return np.concatenate(parts, axis=1), counts


def quantiles(values):
    found = np.quantile(values, (0.05, 0.5, 0.95, 1)).tolist()
    return dict(zip(("p5", "median", "p95", "longest"), found))


def padding_shares(data):
    """{row length: share of padding} when each row starts at a document."""
    shares = {}
    for T in ROW_LENGTHS:
        rows = DocumentRows(data, T)
        shares[str(T)] = 1 - rows.n_tokens / rows.n_rows / T
    return shares


def sample(data, tok, documents, max_bytes):
    """Texts of documents in random order, about max_bytes of them together -> list of str."""
    texts, size = [], 0  # the seed is fixed: the same data always give the same sample
    for i in np.random.default_rng(0).permutation(documents.shape[1]):
        if size >= max_bytes:
            break
        start, length, n_bytes = documents[:, i].tolist()
        ids = np.empty(min(length, MOST_OF_A_DOCUMENT), data.dtype)
        data.read(start, ids)
        texts.append(tok.decode(ids))
        size += n_bytes * len(ids) // max(1, length)
    return texts


# -----------------------------------------------------------------------------
# vocabularies


def try_vocabularies(sizes, train, val, total_bytes):
    """-> [numbers of each vocabulary]: bytes a token on train and val, and the share of its ids
    that would occur ENOUGH times in total_bytes of such text."""
    train_bytes, val_bytes = (sum(len(text.encode()) for text in texts) for texts in (train, val))
    rows = []
    for size, tok in train_vocabularies(train, sizes):
        if tok is None:
            rows.append(dict(vocabulary=size, bytes_per_token=None))
            continue
        ids = np.concatenate(tok.encode(train))
        # Bytes come first and special ids last. In between are the ids that BPE made; their
        # occurrences in the sample are scaled to all of the text.
        made = np.bincount(ids, minlength=tok.n_vocab)[N_BYTES : size - len(SPECIALS)]
        counts = made * (total_bytes / train_bytes)
        rows.append(dict(
            vocabulary=size, bytes_per_token=val_bytes / sum(map(len, tok.encode(val))),
            train_bytes_per_token=train_bytes / len(ids),
            ids_seen_often=float((counts >= ENOUGH).mean()),
            table_parameters={str(width): tok.vocab_size * width for width in (64, 512)}))
    return rows


def train_vocabularies(texts, sizes):
    """-> [(size, Tokenizer, or None where the texts are not enough)], smallest first.

    Only the largest is trained. BPE adds one merge after the other, so a smaller vocabulary is the
    beginning of a larger one.
    """
    largest, found = None, []
    for size in sorted(sizes, reverse=True):
        if largest is None:
            try:
                largest = Tokenizer.train(texts, size)
            except ValueError as error:
                print(f"bpe:{size}: {error}", flush=True)
                found.append((size, None))
                continue
        n = size - len(SPECIALS)
        ranks = {token: rank for token, rank in largest.ranks.items() if rank < n}
        tok = Tokenizer(f"bpe:{size}", largest.pattern, ranks, with_specials({}, n))
        found.append((size, tok))
    return found[::-1]


def advice(rows, total_bytes):
    """The rows of the vocabularies -> a line that recommends one of them and says why."""
    tried = [r for r in rows if r["bytes_per_token"]]
    if not tried:
        return ("the text is not enough for any of these vocabularies: --tokenizer=byte, or more "
                "text")
    learned = [r for r in tried if r["ids_seen_often"] >= SHARE_OF_IDS]
    best = learned[-1] if learned else tried[0]
    often = f"{best['ids_seen_often']:.0%}"
    line, text = f"--tokenizer=bpe:{best['vocabulary']}: ", f"{total_bytes / 1e6:,.1f} MB of text"
    if learned:
        line += (f"the largest of these of which {SHARE_OF_IDS:.0%} of the ids come {ENOUGH} times "
                 f"or more in {text} ({often})")
    else:
        line += (f"the smallest of these, and yet only {often} of its ids come {ENOUGH} times or "
                 f"more in {text}, so try a smaller one or find more text")
    larger = [r for r in tried if r["vocabulary"] > best["vocabulary"]]
    if larger:
        gain = 1 - best["bytes_per_token"] / larger[0]["bytes_per_token"]
        line += (f"; bpe:{larger[0]['vocabulary']} would make rows {gain:.1%} shorter, with "
                 f"{1 - larger[0]['ids_seen_often']:.0%} of its ids seldom trained")
    elif learned and best is rows[-1]:
        line += "; a larger one may pay as well: try it with --vocabularies"
    return line


# -----------------------------------------------------------------------------
# tables


def print_tables(sets, rows, line):
    """Prints {folder: numbers}, the rows of the vocabularies and the advice."""
    for name, numbers in sets.items():
        print_folder(name, numbers)
    if rows:
        print(f"\n{'vocabulary':<14}{'bytes a token':>14}{'of train':>10}"
              f"{f'ids {ENOUGH} times':>16}{'table at 64':>14}{'at 512':>12}")
    for r in rows:
        if r["bytes_per_token"]:
            small, large = (n / 1e6 for n in r["table_parameters"].values())
            print(f"bpe:{r['vocabulary']:<10}{r['bytes_per_token']:>14.3f}"
                  f"{r['train_bytes_per_token']:>10.3f}{r['ids_seen_often']:>16.1%}"
                  f"{small:>12.1f} M{large:>10.1f} M")
        else:
            print(f"bpe:{r['vocabulary']:<10}{'-':>14}   the sample is not enough for it")
    if line:
        print(f"\n{line}")


def print_folder(name, n):
    text = "no text"
    if n["bytes"]:
        text = f"{n['bytes'] / 1e6:,.1f} MB of text, {n['bytes_per_token']:.2f} bytes a token"
    print(f"\n{name}: {n['documents']:,} documents, {n['tokens']:,} tokens of {n['tokenizer']}, "
          f"{text}")
    print(f"  {'length of a document':<28}{'5 %':>10}{'median':>10}{'95 %':>12}{'longest':>14}")
    for what in ("tokens", "bytes"):
        p5, median, p95, longest = n[f"document_{what}"].values()
        print(f"  {what:<28}{p5:>10,.0f}{median:>10,.0f}{p95:>12,.0f}{longest:>14,.0f}")
    padding = ", ".join(f"{share:.0%} of rows of {T}"
                        for T, share in n["padding_of_document_rows"].items())
    print(f"  padding with --rows=document: {padding or 'there are no ends of document'}")
    often = ", ".join(f"{k} cover {share:.1%}" for k, share in n["covered_by"].items())
    print(f"  of {n['n_vocab']:,} ids {n['ids_seen']:,} occur, {n['ids_seen_often']:,} of them "
          f"{ENOUGH} times or more; the most frequent {often}")
    print(f"  {n['val_tokens_seldom_trained']:.2%} of the val tokens occur fewer than {ENOUGH} "
          "times in train")


# -----------------------------------------------------------------------------
# the picture


def draw(path, curves, rows, line):
    """stats.png: lengths in tokens and in bytes, coverage, gain and cost of each vocabulary.

    curves: {folder: (tokens of each document, bytes of each document, coverage)}.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({
            "font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": LINE,
            "xtick.color": MUTED, "ytick.color": MUTED, "grid.color": LINE,
            "axes.titlelocation": "left", "axes.titlesize": 11.5, "axes.titleweight": "bold"}):
        figure = Figure(figsize=(12, 8.6), dpi=130, layout="constrained")
        panels = figure.subplots(2, 2)
        for panel in panels.flat:
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.tick_params(which="both", length=0)
            panel.grid(axis="y", lw=0.8)
            panel.set_axisbelow(True)
        for column, unit in enumerate(("tokens", "bytes")):
            lengths = {name: each[column] for name, each in curves.items() if len(each[column])}
            draw_lengths(panels[0, column], lengths, unit)
        draw_coverage(panels[1, 0], {name: each[2] for name, each in curves.items()})
        draw_vocabularies(panels[1, 1], rows)
        # Room between the panels, in inches and in fractions of a panel.
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.14, wspace=0.04, hspace=0.05)
        if line:
            wrapped = "\n".join(textwrap.wrap(line, 140))
            figure.suptitle(wrapped, x=0.02, ha="left", fontsize=11)
        figure.savefig(path)


def draw_lengths(panel, lengths, unit):
    """Share of the documents by length, in bins of a quarter of an octave."""
    title = f"Documents by length in {unit}"
    if not lengths:
        return draw_nothing(panel, title, "only ids are known")
    low, high = min(v.min() for v in lengths.values()), max(v.max() for v in lengths.values())
    edges = 2.0 ** np.arange(np.floor(np.log2(low) * 4) / 4, np.log2(high) + 0.5, 0.25)
    for colour, (name, values) in zip(itertools.cycle(COLOURS), lengths.items()):
        share = 100 * np.histogram(values, edges)[0] / len(values)
        panel.stairs(share, edges, fill=True, color=colour, alpha=0.18)
        panel.stairs(share, edges, color=colour, lw=1.6,
                     label=f"{name}, median {np.median(values):,.0f}")
    panel.set(xscale="log", xlabel=f"{unit} a document", ylabel="% of documents")
    panel.set_ylim(0, panel.get_ylim()[1] * 1.08)  # room for the row lengths written at the top
    panel.xaxis.set_major_formatter(lambda x, _: compact(x))
    if unit == "tokens":
        for T in ROW_LENGTHS:
            panel.axvline(T, color=MUTED, lw=0.8, ls=(0, (2, 3)))
            panel.annotate(f" {T}", (T, 1), xycoords=("data", "axes fraction"), va="top",
                           fontsize=8.5, color=MUTED)
    set_head(panel, title, len(lengths))


def draw_coverage(panel, coverage):
    """Share of the tokens that the k most frequent ids make up, over k."""
    for colour, (name, covered) in zip(itertools.cycle(COLOURS), coverage.items()):
        k = min(1000, len(covered))
        percent = 100 * covered[k - 1]
        panel.plot(np.arange(1, len(covered) + 1), 100 * covered, color=colour, lw=2,
                   label=f"{name}, {percent:.0f} % by {k:,} ids")
        panel.plot(k, percent, "o", color=colour, ms=6, mec="white")
    panel.set(xscale="log", ylim=(0, 103), xlabel="ids, most frequent first",
              ylabel="% of the train tokens")
    panel.xaxis.set_major_formatter(lambda x, _: compact(x))
    set_head(panel, "Tokens covered by the most frequent ids", len(coverage))


def draw_vocabularies(panel, rows):
    """A bar for each vocabulary: its height is bytes a token, the number inside is the share of ids
    that are seen often, and below it stands the size of the token table."""
    tried = [r for r in rows if r["bytes_per_token"]]
    title = "Vocabularies: how much text a token of val holds"
    if not tried:
        return draw_nothing(panel, title, "none tried")
    panel.set(ylabel="bytes a token")
    set_head(panel, title, note=f"in each: how many of its ids come {ENOUGH} times or more; dark: "
                                f"{SHARE_OF_IDS:.0%} do")
    labels = []
    for x, r in enumerate(tried):
        learned, height = r["ids_seen_often"] >= SHARE_OF_IDS, r["bytes_per_token"]
        bar = panel.bar(x, height, width=0.7, color=COLOURS[0] if learned else "#b9c8d4")
        panel.bar_label(bar, [f"{height:.2f}"], padding=3, fontsize=11, color=INK,
                        fontweight="bold")
        panel.text(x, height / 2, f"{r['ids_seen_often']:.0%}", ha="center", va="center",
                   fontsize=10, color="white" if learned else INK)
        sizes = [f"{n / 1e6:.1f} M" for n in r["table_parameters"].values()]
        labels.append("\n".join([f"{compact(r['vocabulary'])} ids", *sizes]))
    panel.set_xticks(range(len(tried)), labels)
    panel.set_xlabel("parameters of the token table with token_dim 64 and 512")
    panel.set_xlim(-0.6, max(2, len(tried)) - 0.4)
    panel.margins(y=0.14)


def set_head(panel, title, entries=0, note=""):
    """Writes a title and, below it, a legend of `entries`, two a line, or a note.

    Both are kept out of the layout: they must not make the panel narrower.
    """
    n_lines = max(1 if note else 0, -(-entries // 2))
    panel.set_title(title, pad=10 + 15 * n_lines)
    panel.text(0, 1.025, note, transform=panel.transAxes, fontsize=9, color=MUTED, in_layout=False)
    if entries:
        legend = panel.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, fontsize=9,
                              frameon=False)
        legend.set_in_layout(False)


def draw_nothing(panel, title, why):
    set_head(panel, title)
    panel.set_axis_off()
    panel.text(0.5, 0.5, why, transform=panel.transAxes, ha="center", color=MUTED)


def compact(x):
    """1500 -> 1.5k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:g}{suffix}"
    return f"{x:g}"


with one_message():
    main()
