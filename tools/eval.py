"""Measure a trained model: losses on fixed masks, where the loss is, and whether its concepts are alive.

    python tools/eval.py --out_dir=out/demo                                    on the data it was trained on
    python tools/eval.py --out_dir=out/demo --data_dir=data/owt,data/wikitext2 on any data with the same tokenizer
    python tools/eval.py --out_dir=out/demo --report=1                         and one page to look at: out/demo/report.html
    python tools/eval.py --out_dir=out/demo --control_dir=out/transformer      a Transformer's token states as a control
    python tools/eval.py --out_dir=out/demo --sts=1                            similarity of sentences without fine-tuning
    python tools/eval.py --out_dir=out/demo --pll=sentences.txt                pseudo-log-likelihood, for any vocabulary
    python tools/eval.py --out_dir=out/demo --profile=1                        latency, throughput, memory

Prints loss, accuracy, perplexity and bits per byte for every masking strategy, splits the loss by copies in the row and
by frequency, and compares the concepts with those of the same network untrained. Writes out_dir/eval.json, everything
measured; metrics.json, the same fields for every run; summary.md, a page of them; curves.png.
The masks depend on the row's number in the data set alone, so every model is asked exactly the same questions; the
numbers of two models compare when tokenizer, split, rows, block_size and mlm_probability are the same. They concern
predicted tokens only: bits per byte here is the cost of the hidden text, given what is left to see. For models with
different tokenizers there is --pll.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt), tokenizer/, log.jsonl
data_dir = ""  # prepared data, several with commas between; empty: what the run was trained on
split = "val"  # val | train | test where the data set has one
rows = 512  # rows of block_size tokens to measure on
block_size = 0  # tokens a row, up to what the model reads; 0: as in training
mlm_probability = 0.15  # share of tokens that is predicted; 0.15 is what published numbers use
health_rows = 256  # rows the concepts are measured on, from the first data set; 0: losses only
control_dir = ""  # a run with arch=transformer and the same tokenizer: its token states are a second control
sts = ""  # STS-B's dev.tsv or test.tsv: zero-shot correlation of embeddings; 1: glue/STS-B/dev.tsv; empty: not
pll = ""  # texts to score, one a line or .jsonl with a field "text": PLL-word-l2r, see pll.py; empty: not
pll_texts = 200  # of these, so many from the first on
profile = 0  # 1: latency at batch size 1, throughput and memory of this machine
report = 0  # 1: write out_dir/report.html, one page to look at
micro_batch = 32  # rows a forward pass
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
# -----------------------------------------------------------------------------
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure, read_settings

config = configure(globals())

import csv
import json
import math

import scipy.stats
import torch
import torch.nn.functional as F

from data.reader import TokenData, folders
from lib import health
from lib.embed import NAMES, choose_pooling, embed_rows, rows_of
from lib.files import write_json
from lib.machine import autocast, choose_dtype, find_machine
from lib.run import build_model, evaluate, load_run, read_log, token_frequency, user_mistakes
from masking import check_masking, masking_types
from tools.metrics import LATENCY_LENGTHS, collect, measure_speed, page, pseudo_log_likelihood, read_glue, write_page
from tools.report import write_report

SENTENCES, SENTENCE_TOKENS = 6, 96  # rows of the heat map in the report, and how much of each

# name in eval.json, heading, how to read it
MEASURES = [
    ("rank", "effective rank", "directions the concepts of one row span, of at most n_concept - 1; 1: all the same"),
    ("rank_share", "effective rank / n_concept", "half or more is healthy"),
    ("participation", "participation ratio", "the same, weighing strong directions more"),
    ("duplicates", "duplicate pairs", "share of pairs of concepts of a row with a centred cosine above 0.95"),
    ("cosine", "mean |cosine|", "of those pairs"),
    ("input_dependence", "input dependence", "share of the variance that the text causes; near 0: learned constants"),
    ("rankme", "RankMe of the mean", "directions in which rows differ, by their mean concept"),
    ("rankme_slot", "RankMe of a concept", "directions in which rows differ, by one concept"),
    ("entropy", "reading entropy / log T", "1: concepts read all tokens alike; 0: one token each"),
    ("divergence", "reading divergence / log C", "0: all concepts read the same tokens; 1: each its own"),
    ("position", "reading by position", "share of the reading that position alone explains"),
    ("usage_entropy", "usage entropy / log C", "1: the decoder reads all concepts alike; 0: one of them"),
    ("unused", "unused concepts", "share that gets less than a tenth of an equal share of the decoder's attention"),
    ("loss", "loss, nats", "on the rows of this table; the next five are rises of it"),
    ("zeroed", "concepts zeroed", "the decoder gets zeros"),
    ("shuffled", "concepts shuffled", "it gets those of another row; near 0: the concepts do not matter"),
    ("averaged", "concepts averaged", "it gets their mean over the rows, a constant"),
    ("strongest", "strongest single concept", "zeroed alone"),
    ("median_single", "median single concept", "zeroed alone"),
]


def draw_curves(records, entropy, path):
    """Training and validation loss against tokens seen, with the unigram entropy as the line to be under."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=130)
    for key, style in (("loss", dict(color="0.75", lw=0.8, label="training loss (this run's masks)")),
                       ("val_loss", dict(color="C0", marker="o", ms=3, label="validation loss (fixed masks, 15 %)"))):
        axes.plot(*zip(*[(r["tokens"] / 1e6, r[key]) for r in records if r.get(key) is not None]), **style)
    axes.axhline(entropy, color="C3", ls="--", lw=1, label=f"unigram entropy {entropy:.2f}: word frequencies alone")
    axes.set(xlabel="tokens seen (millions)", ylabel="nats a predicted token", title=out_dir)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def measure_concepts(model, ids, batch):
    """Everything of health.py about one model -> dict; a Transformer's token states stand in for its concepts."""
    concepts, tokens = health.encode_rows(model, ids, machine, dtype, micro_batch)
    if model.arch == "transformer":
        return health.geometry(health.evenly_spaced(tokens, n_control))
    use = health.channel_use(model, batch, machine, dtype, micro_batch, one_by_one=True)
    some = slice(0, 2 * micro_batch)
    read, decode = health.attention(model, batch.inputs[some], batch.positions[some], machine, dtype)
    singles = torch.tensor(use["one_by_one"])
    return (health.geometry(concepts) | use | health.attention_use(read, decode)
            | dict(strongest=singles.max().item(), median_single=singles.median().item()))


def find_sts():
    """The setting sts -> path; "1" looks where GLUE's files usually lie."""
    places = [os.path.join(folder, "glue", "STS-B", "dev.tsv") for folder in (".", ROOT, os.path.join(ROOT, "data"))]
    found = [place for place in places if os.path.isfile(place)] if sts == "1" else [sts]
    if not found:
        raise ValueError(f"sts=1: there is no {' and no '.join(dict.fromkeys(map(os.path.relpath, places)))}; give the "
                         "path of GLUE's file: --sts=FOLDER/STS-B/dev.tsv")
    return os.path.normpath(found[0])


def read_sts(path):
    """GLUE's STS-B, tab-separated with a header, quotes are plain text -> (sentences, sentences, scores 0..5)."""
    expected = "expected GLUE's STS-B: tab-separated UTF-8 with the columns sentence1, sentence2 and score (0 to 5)"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        rows = [(r["sentence1"], r["sentence2"], float(r["score"])) for r in lines
                if r.get("sentence1") and r.get("sentence2") and r.get("score")]
    except ValueError as error:  # not text, or not a number
        raise ValueError(f"sts={path}: {error}; {expected}") from None
    if len(rows) < 3:
        raise ValueError(f"sts={path}: found {len(rows)} scored pairs; {expected}")
    return [list(column) for column in zip(*rows)]


def zero_shot_sts(model, tok, pairs):
    """Correlation of the cosine of two sentences' embeddings with human scores -> {embedding: {"pearson", "spearman"}}.

    table: mean of the token table, which knows no order and no context; tokens, concepts: mean token state, mean
    concept; max: the largest of each number instead; all concepts: side by side. Each once more centred: without the
    mean over these sentences, which says nothing about any of them and in concepts that own none of a short row's
    words is all there is (1702.01417). No score is looked at for that.
    """
    first, second, scores = pairs
    with autocast(machine.device, dtype):
        rows, _ = rows_of(first + second, tok, T)
        vectors = embed_rows(model, rows, NAMES[model.arch], micro_batch * T, machine.device)
    result = {}
    for name, vector in vectors.items():
        for kind, embedding in ((name, vector), (f"{name}, centred", vector - vector.mean(0))):
            cosine = F.cosine_similarity(*embedding.chunk(2)).double().numpy()
            result[kind] = dict(pearson=float(scipy.stats.pearsonr(cosine, scores)[0]),
                                spearman=float(scipy.stats.spearmanr(cosine, scores)[0]))
    return result


def concept_pictures(model, ids, tok):
    """Heat maps, concept cards and the similarity matrix of the report -> dict of plain lists."""
    concepts, _ = health.encode_rows(model, ids, machine, dtype, micro_batch)
    centred = F.normalize(concepts - concepts.mean(1, keepdim=True), dim=-1)
    some = ids[:2 * micro_batch]
    read, _ = health.attention(model, some, torch.zeros(len(some), 1, dtype=torch.int64), machine, dtype)
    sentences = []
    for row in ids[torch.arange(min(SENTENCES, len(ids))) * len(ids) // min(SENTENCES, len(ids))]:
        batch = health.mask_batch(row[None, :SENTENCE_TOKENS], torch.zeros(1), "token", mlm_probability, tok)
        weights, _ = health.attention(model, batch.inputs, batch.positions, machine, dtype)
        with torch.no_grad():
            inputs, positions = machine.take([batch.inputs, batch.positions])
            concepts, tokens = model.encode(inputs)
            states = model.decode(concepts, tokens, positions, model.documents(inputs))
            guesses = model.logits(states)[0, :, :tok.n_vocab].argmax(-1).tolist()
        used = [(int(p), g) for p, g, w in zip(batch.positions[0], guesses, batch.weights[0]) if w]
        sentences.append(dict(
            tokens=[tok.decode([int(i)]) for i in row[:SENTENCE_TOKENS]],
            masked=[i in dict(used) for i in range(len(batch.inputs[0]))],
            guess=[tok.decode([dict(used)[i]]) if i in dict(used) else None for i in range(len(batch.inputs[0]))],
            weights=[[round(w, 4) for w in concept] for concept in weights[-1].mean(1)[0].tolist()]))
    free = read[-1].shape[1] - model.readers()[-1].n_owned_head  # what own words are is no news
    return dict(sentences=sentences, concepts=health.top_tokens(read[-1][:, :free].mean(1), some, tok),
                similarity=[[round(x, 3) for x in row] for row in (centred @ centred.mT).mean(0).tolist()])


def check_settings():
    """Raises ValueError for numbers out of range and for settings that would be ignored."""
    check_masking("token", mlm_probability)
    if rows < 1 or micro_batch < 1 or health_rows < 0 or pll_texts < 1:
        raise ValueError(f"rows={rows}, micro_batch={micro_batch}, health_rows={health_rows}, pll_texts={pll_texts}: "
                         "expected more than 0")
    for name in ("report", "profile"):
        if config[name] not in (0, 1):
            raise ValueError(f"{name}={config[name]}: expected 0 or 1")
    if report and not health_rows:
        raise ValueError("report=1 draws the concepts; it needs health_rows above 0")
    if control_dir and not health_rows and not sts:
        raise ValueError(f"control_dir={control_dir} is a control for health_rows and sts; one of them has to be on")
    if pll_texts != read_settings(__file__)["pll_texts"][0] and not pll:
        raise ValueError(f"pll_texts={pll_texts} is of a file of texts; name it with --pll=FILE")


with user_mistakes():
    machine = find_machine(device)
    check_settings()
    dtype, reason = choose_dtype(dtype, machine.device)
    model, tok, checkpoint = load_run(out_dir, machine.device)
    T = block_size or model.cfg.block_size
    if not 0 < T <= model.cfg.longest:
        raise ValueError(f"block_size={block_size}: {out_dir} reads rows of 1 to {model.cfg.longest} tokens")
    sets = {name: TokenData(name, split, T, 0) for name in folders(data_dir or checkpoint["settings"]["data_dir"])}
    for name, data in sets.items():
        if data.meta["fingerprint"] != tok.fingerprint:
            raise ValueError(f"{name} was prepared with another tokenizer than {out_dir} was trained with; prepare it "
                             f"again with --tokenizer={out_dir}/tokenizer")
    sts = find_sts() if sts else ""
    pairs = read_sts(sts) if sts else None
    if pll and not os.path.isfile(pll):
        raise ValueError(f"pll={pll}: no such file; expected one with a text a line, or .jsonl with a field \"text\"")
    glue = read_glue(out_dir)
    control = None
    if control_dir:
        control, control_tok, _ = load_run(control_dir, machine.device)
        if control.arch != "transformer" or control_tok.fingerprint != tok.fingerprint or control.cfg.longest < T:
            raise ValueError(f"control_dir={control_dir}: expected a run with arch=transformer, the same tokenizer as "
                             f"{out_dir} and block_size {T} or more")

say = machine.say
say(f"{out_dir} after {checkpoint['tokens']:,} tokens, {model.num_params():,} parameters, {dtype} ({reason})")
summary = dict(out_dir=out_dir, step=checkpoint["step"], tokens=checkpoint["tokens"], params=model.num_params(),
               split=split, mlm_probability=mlm_probability, block_size=T, rows={}, data={})
results, records = summary["data"], read_log(out_dir)
if profile:  # first: the peak of memory is that of reading and filling, not of what follows
    if machine.is_main:
        summary["speed"] = speed = measure_speed(model, tok, machine, dtype, T, micro_batch)
        what = f"{dtype} on {machine.device}, {torch.get_num_threads()} threads, not compiled"
        lines = [(f"one row of {length} tokens, one mask, ms", f"latency_batch1_seq{length}", "_ms", ".2f")
                 for length in LATENCY_LENGTHS if length <= model.cfg.longest]
        lines.append((f"reading {micro_batch} rows of {T}, tokens/s", "throughput", "_tokens_per_sec", ",.0f"))
        say(f"\n{what:<42}{'median':>12}{'between quartiles':>20}")
        for what, name, unit, form in lines:
            say(f"  {what:<40}{speed[name + unit]:>12{form}}{speed[name + '_iqr' + unit]:>20{form}}")
        say(f"  {'peak memory, MiB':<40}{speed['memory_peak_mb']:>12,.0f}")
    machine.all_sum(0)  # the other processes wait
for name, data in sets.items():
    entropy = data.meta["unigram_entropy"]
    say(f"\n{name} {split}, {min(rows, data.n_blocks)} rows of {T} tokens, {mlm_probability:.0%} "
        f"predicted, unigram entropy {entropy:.3f} nats\n"
        f"  {'masking':<12}{'loss':>8}{'accuracy':>10}{'perplexity':>12}{'bits/byte':>11}{'predicted':>11}")
    results[name], summary["rows"][name] = {"unigram_entropy": entropy}, min(rows, data.n_blocks)
    with user_mistakes():
        frequency = token_frequency(TokenData(name, "train", T, 0), tok)
        for masking_type in masking_types(tok):
            r = evaluate(model, data, tok, machine, dtype, masking_type, mlm_probability, rows, micro_batch,
                         frequency if masking_type == "token" else None)
            say(f"  {masking_type:<12}{r['loss']:>8.4f}{r['accuracy']:>10.1%}{r['perplexity']:>12.2f}"
                f"{r['bits_per_byte'] or math.nan:>11.4f}{r['predicted']:>11,}")
            results[name][masking_type] = r
    say(f"  {'token masks, where the token':<30}{'loss':>8}{'share':>8}")
    for part, r in results[name]["token"]["splits"].items():
        say(f"  {part:<30}{'-' if r['loss'] is None else format(r['loss'], '.4f'):>8}{r['share']:>8.1%}")
if len(sets) > 1:
    width = max(map(len, [*sets, "token masks"])) + 2
    say(f"\n{'token masks':<{width}}{'loss':>8}{'accuracy':>10}{'perplexity':>12}{'bits/byte':>11}{'unigram':>9}")
    for name, r in results.items():
        say(f"{name:<{width}}{r['token']['loss']:>8.4f}{r['token']['accuracy']:>10.1%}{r['token']['perplexity']:>12.2f}"
            f"{r['token']['bits_per_byte'] or math.nan:>11.4f}{r['unigram_entropy']:>9.3f}")

if pll:
    with user_mistakes():
        summary["pll"] = r = pseudo_log_likelihood(model, pll, tok, machine, dtype, pll_texts, model.cfg.longest,
                                                   micro_batch * T)
    say(f"\n{r['method']} of {r['texts']:,} texts of {pll}, {r['left_out']:,} too long: {r['nats']:,.1f} nats over "
        f"{r['words']:,} words, {r['bytes']:,} bytes\n  {r['nats_per_word']:.4f} nats a word, perplexity "
        f"{r['perplexity_per_word']:,.2f} a word, {r['bits_per_byte']:.4f} bits a byte")
if health_rows and machine.is_main:
    first_name, first = next(iter(sets.items()))
    n_control = getattr(model.cfg, "n_concept", 64)
    torch.manual_seed(checkpoint["settings"].get("seed", 0))
    untrained = build_model(checkpoint["model_settings"]).to(machine.device).eval()
    with user_mistakes():
        ids, batch = health.probe_rows(first, tok, health_rows, mlm_probability)
        columns = {"trained": measure_concepts(model, ids, batch), "untrained": measure_concepts(untrained, ids, batch)}
        if control:
            columns["Transformer tokens"] = measure_concepts(control, ids, batch)
    what = "concepts" if model.arch == "concept" else f"{n_control} evenly spaced token states"
    say(f"\nhealth of the {what} on {len(ids)} rows of {first_name}"
        f"{'' if len(ids) == health_rows else f' (all there are; health_rows={health_rows})'}\n"
        f"  {'':<28}" + "".join(f"{name:>20}" for name in columns))
    table = []
    for key, heading, meaning in MEASURES:
        values = [column.get(key) for column in columns.values()]
        if any(v is not None for v in values):
            table.append([heading, meaning, *values])
            say(f"  {heading:<28}" + "".join(f"{'-' if v is None else format(v, '.4g'):>20}" for v in values))
    summary["health"] = columns
if pairs and machine.is_main:
    with user_mistakes():
        summary |= dict(sts_file=sts, sts={"trained": zero_shot_sts(model, tok, pairs)})
        if control:
            summary["sts"]["Transformer"] = zero_shot_sts(control, tok, pairs)
    say(f"\nzero-shot similarity of {len(pairs[0]):,} pairs of {sts}, cosine of embeddings against human scores\n"
        f"  {'':<28}{'Pearson':>10}{'Spearman':>10}")
    for who, embeddings in summary["sts"].items():
        for name, r in embeddings.items():
            say(f"  {who + ', ' + name:<28}{r['pearson']:>10.4f}{r['spearman']:>10.4f}")
    pooling, best = choose_pooling("auto", model.arch)
    found, mean = (summary["sts"]["trained"][name]["spearman"] for name in (best, "tokens"))
    if best != "tokens":
        say(f"  what sample.py --embed writes, {best}: {found:.4f}; mean token state: {mean:.4f}")

if machine.is_main:
    write_json(os.path.join(out_dir, "eval.json"), summary)
    trained_on = {name.strip() for name in checkpoint["settings"].get("data_dir", "").split(",")}
    with user_mistakes():
        fields = collect(out_dir, model, tok, checkpoint, records, summary, glue, machine, dtype,
                         sum(sets[name].meta["splits"]["train"]["tokens"] for name in trained_on)
                         if trained_on <= set(sets) else None)
        write_json(os.path.join(out_dir, "metrics.json"), fields)
        write_page(os.path.join(out_dir, "summary.md"), page(out_dir, fields, summary, glue))
    say(f"\n{out_dir}/metrics.json and, to read, {out_dir}/summary.md")
    entropy = next(iter(results.values()))["unigram_entropy"]
    if any("val_loss" in r for r in records):
        draw_curves(records, entropy, os.path.join(out_dir, "curves.png"))
        say(f"loss curves: {out_dir}/curves.png")
    if report:
        pictures = concept_pictures(model, ids, tok) if model.arch == "concept" else {}
        write_report(os.path.join(out_dir, "report.html"), pictures | dict(
            title=out_dir, arch=model.arch, step=checkpoint["step"], tokens=checkpoint["tokens"],
            params=model.num_params(), settings=checkpoint["settings"], unigram_entropy=entropy, log=records,
            losses=results, splits=next(iter(results.values()))["token"]["splits"],
            health=dict(columns=list(columns), rows=table), one_by_one=columns["trained"].get("one_by_one"),
            usage=columns["trained"].get("usage")))
        say(f"report: {out_dir}/report.html")
    print(json.dumps(summary))
machine.close()
