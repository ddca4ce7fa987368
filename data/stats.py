"""What prepared data is made of, and which vocabulary suits it: tables, out_dir/stats.png and stats.json.

    python data/stats.py --data_dir=data/mine
    python data/stats.py --data_dir=data/wiki,data/web --vocabularies=16000,32000,64000,128000

How long documents are, how much of a row they would leave empty, which ids occur and how often. Then vocabularies are
trained on a sample of the decoded train split and measured on the val split: bytes a token, what their table costs, and
how many of their ids the whole train split would show often enough to learn. Reads about 100 M tokens a second; half a
minute for three vocabularies.
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
vocabularies = "8000,16000,32000"  # sizes of the BPE vocabularies to try, 512 to 262144; empty: none
sample_mb = 16.0  # MB of text from the train splits that they are trained on
val_mb = 4.0  # MB of text from the val splits that they are measured on
out_dir = "out/stats"  # stats.png and stats.json go here
config = configure(globals())

import numpy as np

from data.bins import DataError
from data.documents import one_message
from data.reader import DocumentRows, TokenData, folders
from data.tokenizer import SPECIALS, VOCAB_SIZES, Tokenizer, with_specials
from lib.files import write_json

CHUNK = 2**22  # tokens read at a time
MOST_OF_A_DOCUMENT = 200_000  # tokens of one document in a sample: a book must not be all of it
ROW_LENGTHS = (128, 512, 2048)
ENOUGH, SHARE_OF_IDS = 100, 0.95  # 2004.02334: the largest vocabulary of which 95 % of the ids are seen 100 times
N_BYTES = 256  # ids of single bytes, which every vocabulary has and most text leaves unused: not counted for that
INK, MUTED, LINE = "#1c2430", "#6b7685", "#d9dee5"
COLOURS = ("#2a6f97", "#d1495b", "#3d8b6e", "#c98a1b", "#7b5ea7", "#5c6b73")


# ---- reading ----------------------------------------------------------------


def scan(data, tok):
    """A split -> (first token, tokens, bytes of every document, without its end and padding), counts of each id."""
    parts, counts = [], np.zeros(tok.n_vocab, np.int64)
    total = before = np.zeros((2, 1), np.int64)  # tokens and bytes of text so far, and until the last end of document
    for at in range(0, data.n_tokens, CHUNK):
        ids = np.empty(min(CHUNK, data.n_tokens - at), data.dtype)
        data.read(at, ids)
        counts += np.bincount(ids, minlength=tok.n_vocab)
        is_text = (ids != data.eot_id) & (ids != data.stored_pad)
        so_far = total + np.cumsum([is_text, tok.n_bytes[ids]], axis=1)
        ends = np.flatnonzero(ids == data.eot_id)
        if at + len(ids) == data.n_tokens and is_text[-1]:
            ends = np.append(ends, len(ids) - 1)  # the text goes on to the end of the split
        sizes = np.diff(so_far[:, ends], prepend=before)
        parts.append(np.concatenate([at + ends[None] + is_text[ends] - sizes[:1], sizes]))  # padding comes in front
        total, before = so_far[:, -1:], so_far[:, ends[-1:]] if len(ends) else before
    return np.concatenate(parts, axis=1), counts


def sample(data, tok, found, max_bytes):
    """Texts of documents in random order, about max_bytes of them together -> list of str."""
    texts, size = [], 0
    for i in np.random.default_rng(0).permutation(found.shape[1]):
        if size >= max_bytes:
            break
        start, length, n_bytes = found[:, i].tolist()
        ids = np.empty(min(length, MOST_OF_A_DOCUMENT), data.dtype)
        data.read(start, ids)
        texts.append(tok.decode(ids))
        size += n_bytes * len(ids) // max(1, length)
    return texts


def measure(name):
    """A prepared folder -> (its numbers, texts of train, texts of val, what is drawn of it)."""
    data = {split: TokenData(name, split, 1) for split in ("train", "val")}
    tok = Tokenizer.load(os.path.join(name, "tokenizer"))
    found, counts = scan(data["train"], tok)
    val_found, val_counts = scan(data["val"], tok)
    _, lengths, n_bytes = found
    words = np.delete(counts, [data["train"].eot_id, data["train"].stored_pad])
    rare = val_counts * (counts < ENOUGH)
    rare[[data["val"].eot_id, data["val"].stored_pad]] = 0
    covered = np.cumsum(np.sort(words)[::-1]) / max(1, words.sum())
    padding = {}
    for T in ROW_LENGTHS if counts[data["train"].eot_id] else ():
        rows = DocumentRows(data["train"], T)
        padding[str(T)] = 1 - rows.n_tokens / rows.n_rows / T
    quantiles = {what: dict(zip(("p5", "median", "p95", "longest"), np.quantile(values, (0.05, 0.5, 0.95, 1)).tolist()))
                 for what, values in (("tokens", lengths), ("bytes", n_bytes))}
    numbers = dict(
        tokenizer=tok.name, documents=len(lengths), tokens=int(lengths.sum()), bytes=int(n_bytes.sum()),
        bytes_per_token=n_bytes.sum() / max(1, lengths.sum()), document_tokens=quantiles["tokens"],
        document_bytes=quantiles["bytes"], padding_of_document_rows=padding, n_vocab=tok.n_vocab,
        ids_seen=int((words > 0).sum()), ids_seen_often=int((words >= ENOUGH).sum()),
        covered_by={str(k): float(covered[k - 1]) for k in (100, 1000, 4000, 16000) if k < len(words)},
        val_tokens_seldom_trained=float(rare.sum() / max(1, val_counts.sum())))
    share = {"train": sample_mb * 1e6 / len(names), "val": val_mb * 1e6 / len(names)}
    texts = [sample(data[split], tok, part, share[split]) if tok.has_text else []
             for split, part in (("train", found), ("val", val_found))]
    return numbers, *texts, (lengths[lengths > 0], n_bytes[n_bytes > 0], covered)


# ---- vocabularies -----------------------------------------------------------


def vocabularies_of(texts, sizes):
    """Trains the largest that the texts are enough for, of which smaller ones are the beginning.

    -> [(size, Tokenizer, or None where the texts are not enough)]
    """
    largest, found = None, []
    for size in sorted(sizes, reverse=True):
        if largest is None:
            try:
                largest = Tokenizer.train(texts, size)
            except ValueError as error:
                print(f"bpe:{size}: {error}", flush=True)
        n = size - len(SPECIALS)
        ranks = {token: i for token, i in largest.ranks.items() if i < n} if largest else {}
        tok = Tokenizer(f"bpe:{size}", largest.pattern, ranks, with_specials({}, n)) if largest else None
        found.append((size, tok))
    return found[::-1]


def try_vocabularies(sizes, train, val, total_bytes):
    """-> [numbers of each vocabulary]: compression of train and val, and ids that total_bytes of such text would show
    ENOUGH times."""
    rows, sizes_of = [], [sum(len(text.encode()) for text in texts) for texts in (train, val)]
    for size, tok in vocabularies_of(train, sizes):
        if tok is None:
            rows.append(dict(vocabulary=size, bytes_per_token=None))
            continue
        ids = np.concatenate(tok.encode(train))
        counts = np.bincount(ids, minlength=tok.n_vocab)[N_BYTES : size - len(SPECIALS)] * (total_bytes / sizes_of[0])
        rows.append(dict(
            vocabulary=size, bytes_per_token=sizes_of[1] / sum(map(len, tok.encode(val))),
            train_bytes_per_token=sizes_of[0] / len(ids), ids_seen_often=float((counts >= ENOUGH).mean()),
            table_parameters={str(width): tok.vocab_size * width for width in (64, 512)}))
    return rows


def advice(rows, total_bytes):
    """One line that follows from the table."""
    tried = [r for r in rows if r["bytes_per_token"]]
    if not tried:
        return "the text is not enough for any of these vocabularies: --tokenizer=byte, or more text"
    learned = [r for r in tried if r["ids_seen_often"] >= SHARE_OF_IDS]
    best = (learned or tried[:1])[-1]
    line = f"--tokenizer=bpe:{best['vocabulary']}: "
    if not learned:
        line += (f"the smallest of these, and yet only {best['ids_seen_often']:.0%} of its ids come {ENOUGH} times or "
                 f"more in {total_bytes / 1e6:,.1f} MB of text, so try a smaller one or find more text")
    else:
        line += (f"the largest of these of which {SHARE_OF_IDS:.0%} of the ids come {ENOUGH} times or more in "
                 f"{total_bytes / 1e6:,.1f} MB of text ({best['ids_seen_often']:.0%})")
    others = [r for r in tried if r["vocabulary"] > best["vocabulary"]]
    if others:
        gain = 1 - best["bytes_per_token"] / others[0]["bytes_per_token"]
        line += (f"; bpe:{others[0]['vocabulary']} would make rows {gain:.1%} shorter, with "
                 f"{1 - others[0]['ids_seen_often']:.0%} of its ids seldom trained")
    elif learned and best["vocabulary"] == max(r["vocabulary"] for r in rows):
        line += "; a larger one may pay as well: try it with --vocabularies"
    return line


# ---- tables and the picture ---------------------------------------------------


def tell(sets, rows, line):
    """Prints the tables."""
    for name, n in sets.items():
        print(f"\n{name}: {n['documents']:,} documents, {n['tokens']:,} tokens of {n['tokenizer']}, "
              + (f"{n['bytes'] / 1e6:,.1f} MB of text, {n['bytes_per_token']:.2f} bytes a token" if n["bytes"] else
                 "no text"))
        print(f"  {'length of a document':<28}{'5 %':>10}{'median':>10}{'95 %':>12}{'longest':>14}")
        for what in ("tokens", "bytes"):
            print(f"  {what:<28}" + "".join(f"{value:>{width},.0f}" for value, width in
                                            zip(n[f"document_{what}"].values(), (10, 10, 12, 14))))
        padding = ", ".join(f"{share:.0%} of rows of {T}" for T, share in n["padding_of_document_rows"].items())
        print(f"  padding with --rows=document: {padding or 'there are no ends of document'}")
        often = ", ".join(f"{k} cover {share:.1%}" for k, share in n["covered_by"].items())
        print(f"  of {n['n_vocab']:,} ids {n['ids_seen']:,} occur, {n['ids_seen_often']:,} of them {ENOUGH} times or "
              f"more; the most frequent {often}\n  {n['val_tokens_seldom_trained']:.2%} of the val tokens occur fewer "
              f"than {ENOUGH} times in train")
    if rows:
        print(f"\n{'vocabulary':<14}{'bytes a token':>14}{'of train':>10}{f'ids {ENOUGH} times':>16}"
              f"{'table at 64':>14}{'at 512':>12}")
    for r in rows:
        if r["bytes_per_token"]:
            print(f"bpe:{r['vocabulary']:<10}{r['bytes_per_token']:>14.3f}{r['train_bytes_per_token']:>10.3f}"
                  f"{r['ids_seen_often']:>16.1%}" + "".join(f"{n / 1e6:>{width}.1f} M" for n, width in zip(
                      r["table_parameters"].values(), (12, 10))))
        else:
            print(f"bpe:{r['vocabulary']:<10}{'-':>14}   the sample is not enough for it")
    if line:
        print(f"\n{line}")


def draw(path, drawn, rows, line):
    """stats.png: lengths in tokens and in bytes, coverage, and what each vocabulary gives and costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED,
                         "ytick.color": MUTED, "axes.edgecolor": LINE, "axes.titlelocation": "left", "grid.color": LINE,
                         "axes.titlesize": 11.5, "axes.titleweight": "bold"})
    figure, panels = plt.subplots(2, 2, figsize=(12, 8.6), dpi=130, layout="constrained")
    for panel in panels.flat:
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(which="both", length=0)
        panel.grid(axis="y", lw=0.8)
        panel.set_axisbelow(True)
    for panel, column, unit in ((panels[0, 0], 0, "tokens"), (panels[0, 1], 1, "bytes")):
        draw_lengths(panel, {name: curves[column] for name, curves in drawn.items() if len(curves[column])}, unit)
    draw_coverage(panels[1, 0], {name: curves[2] for name, curves in drawn.items()})
    draw_vocabularies(panels[1, 1], rows)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.14, wspace=0.04, hspace=0.05)
    if line:
        figure.suptitle("\n".join(textwrap.wrap(line, 140)), x=0.02, ha="left", fontsize=11)
    figure.savefig(path)


def draw_lengths(panel, lengths, unit):
    """Share of the documents by length, in bins of a quarter of an octave."""
    if not lengths:
        return nothing(panel, f"Documents by length in {unit}", "only ids are known")
    low, high = min(v.min() for v in lengths.values()), max(v.max() for v in lengths.values())
    edges = 2.0 ** np.arange(np.floor(np.log2(low) * 4) / 4, np.log2(high) + 0.5, 0.25)
    for colour, (name, values) in zip(itertools.cycle(COLOURS), lengths.items()):
        share = 100 * np.histogram(values, edges)[0] / len(values)
        panel.stairs(share, edges, fill=True, color=colour, alpha=0.18)
        panel.stairs(share, edges, color=colour, lw=1.6, label=f"{name}, median {np.median(values):,.0f}")
    panel.set(xscale="log", xlabel=f"{unit} a document", ylabel="% of documents")
    panel.set_ylim(0, panel.get_ylim()[1] * 1.08)
    panel.xaxis.set_major_formatter(lambda x, _: compact(x))
    for T in ROW_LENGTHS if unit == "tokens" else ():
        panel.axvline(T, color=MUTED, lw=0.8, ls=(0, (2, 3)))
        panel.annotate(f" {T}", (T, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8.5, color=MUTED)
    head(panel, f"Documents by length in {unit}", len(lengths))


def draw_coverage(panel, coverage):
    """Share of the tokens that the k most frequent ids make up."""
    for colour, (name, covered) in zip(itertools.cycle(COLOURS), coverage.items()):
        k = min(1000, len(covered))
        panel.plot(np.arange(1, len(covered) + 1), 100 * covered, color=colour, lw=2,
                   label=f"{name}, {100 * covered[k - 1]:.0f} % by {k:,} ids")
        panel.plot(k, 100 * covered[k - 1], "o", color=colour, ms=6, mec="white")
    panel.set(xscale="log", ylim=(0, 103), xlabel="ids, most frequent first", ylabel="% of the train tokens")
    panel.xaxis.set_major_formatter(lambda x, _: compact(x))
    head(panel, "Tokens covered by the most frequent ids", len(coverage))


def draw_vocabularies(panel, rows):
    """A bar each: bytes a token; in it, how many of its ids are seen often; under it, what its table costs."""
    tried = [r for r in rows if r["bytes_per_token"]]
    title = "Vocabularies: how much text a token of val holds"
    if not tried:
        return nothing(panel, title, "none tried")
    panel.set(ylabel="bytes a token")
    head(panel, title, note=f"in each: how many of its ids come {ENOUGH} times or more; dark: {SHARE_OF_IDS:.0%} do")
    for x, r in enumerate(tried):
        learned = r["ids_seen_often"] >= SHARE_OF_IDS
        bar = panel.bar(x, r["bytes_per_token"], width=0.7, color=COLOURS[0] if learned else "#b9c8d4")
        panel.bar_label(bar, [f"{r['bytes_per_token']:.2f}"], padding=3, fontsize=11, color=INK, fontweight="bold")
        panel.text(x, r["bytes_per_token"] / 2, f"{r['ids_seen_often']:.0%}", ha="center", va="center", fontsize=10,
                   color="white" if learned else INK)
    panel.set_xticks(range(len(tried)), [
        f"{compact(r['vocabulary'])} ids\n" + "\n".join(f"{n / 1e6:.1f} M" for n in r["table_parameters"].values())
        for r in tried])
    panel.set_xlabel("parameters of the token table with token_dim 64 and 512")
    panel.set_xlim(-0.6, max(2, len(tried)) - 0.4)
    panel.margins(y=0.14)


def head(panel, title, entries=0, note=""):
    """Title, and between it and the panel the legend, two entries a line, or a note: neither may narrow the panel."""
    panel.set_title(title, pad=10 + 15 * max(bool(note), -(-entries // 2)))
    panel.text(0, 1.025, note, transform=panel.transAxes, fontsize=9, color=MUTED, in_layout=False)
    if entries:
        legend = panel.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, fontsize=9, frameon=False)
        legend.set_in_layout(False)


def nothing(panel, title, why):
    """A panel without a picture."""
    head(panel, title)
    panel.set_axis_off()
    panel.text(0.5, 0.5, why, transform=panel.transAxes, ha="center", color=MUTED)


def compact(x):
    """1500 -> 1.5k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:g}{suffix}"
    return f"{x:g}"


def check_settings():
    """Sizes of the vocabularies; DataError for settings that make no sense."""
    if not all(size.strip().isdigit() and int(size) in VOCAB_SIZES for size in vocabularies.split(",") if vocabularies):
        raise DataError(f"vocabularies={vocabularies!r}: expected sizes from {VOCAB_SIZES[0]} to {VOCAB_SIZES[-1]:,} "
                        "with commas between, such as 8000,16000,32000; empty for none")
    if not (sample_mb > 0 and val_mb > 0):
        raise DataError(f"sample_mb={sample_mb}, val_mb={val_mb}: expected more than 0")
    return sorted({int(size) for size in vocabularies.split(",") if size})


with one_message():
    names, sizes = folders(data_dir), check_settings()
    os.makedirs(out_dir, exist_ok=True)
    sets, train, val, drawn, rows = {}, [], [], [], []
    for name in names:
        sets[name], some, others, curves = measure(name)
        train, val, drawn = train + some, val + others, [*drawn, curves]
    total_bytes = sum(n["bytes"] for n in sets.values())
    if sizes and not (train and val):
        print("no vocabulary is tried: only ids of this data are known, no text", flush=True)
    elif sizes:
        print(f"training vocabularies on {sum(map(len, train)) / 1e6:,.1f} M characters", flush=True)
        rows = try_vocabularies(sizes, train, val, total_bytes)
    line = advice(rows, total_bytes) if rows else ""
    tell(sets, rows, line)
    draw(os.path.join(out_dir, "stats.png"), dict(zip(names, drawn)), rows, line)
    summary = dict(data=sets, vocabularies=rows, advice=line, picture=os.path.join(out_dir, "stats.png"))
    write_json(os.path.join(out_dir, "stats.json"), summary)
    print(json.dumps(summary))
