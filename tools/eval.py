"""Measure a trained model: losses on fixed masks, where the loss is, health of the concepts.

    python tools/eval.py --out_dir=out/demo                on the data it was trained on
    python tools/eval.py --out_dir=out/demo --data_dir=data/owt,data/wikitext2
                                                           on any data with the same tokenizer
    python tools/eval.py --out_dir=out/demo --report=1     and a page to look at, report.html
    python tools/eval.py --out_dir=out/demo --control_dir=out/transformer
                                                           beside a Transformer's token states
    python tools/eval.py --out_dir=out/demo --sts=1        sentence similarity, not fine-tuned
    python tools/eval.py --out_dir=out/demo --nelbo=1      a bound on the likelihood: perplexity
    python tools/eval.py --out_dir=out/demo --pll=sentences.txt
                                                           pseudo-log-likelihood, any vocabulary
    python tools/eval.py --out_dir=out/demo --profile=1    latency, throughput, memory
    python tools/eval.py --compare=out/demo,out/other,out/transformer --profile=1
                                                           runs of any architecture side by side

Prints loss, accuracy, perplexity and bits per byte for each masking strategy, splits the loss by
copies in the row and by frequency, and compares the concepts with those of the same network
untrained; after masking_type=importance, says how well the scores tell what is hard. Writes into
out_dir: eval.json, everything measured; metrics.json, the same fields for every run; summary.md, a
page of them; curves.png. With compare: compare.json, compare.md and compare.png, into the folder of
the first run.

The masks depend on the number of a row in the data set and on nothing else, so all models predict
the same tokens from the same rest. Numbers of two models can be compared if tokenizer, split, rows,
block_size and mlm_probability are the same. They are about predicted tokens only: bits per byte is
the cost of the masked text given the visible text. Of a decoder (objective=clm) they are those of
every next token, and stand apart. Those of --nelbo are of the text itself, and
compare models with different tokenizers where rows is the whole split; so does --pll.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt), tokenizer/, log.jsonl
checkpoint = "auto"  # auto | best | last | PATH; auto: the best, or a newer one not yet evaluated
compare = ""  # runs with commas between: losses, curves, concepts and settings side by side
data_dir = ""  # prepared data, several with commas between; empty: what the run was trained on
split = "val"  # val | train | test where the data set has one
rows = 512  # rows of block_size tokens to measure on
block_size = 0  # tokens a row, up to what the model reads; 0: as in training
mlm_probability = 0.15  # share of tokens that is predicted; 0.15 is what published numbers use
health_rows = 256  # rows of the first data set to measure the concepts on; 0: losses only
control_dir = ""  # a run with arch=transformer, same tokenizer: its token states as a control
sts = ""  # STS-B's dev.tsv or test.tsv; 1: glue/STS-B/dev.tsv; empty: no similarity
nelbo = False  # bound on the likelihood of these rows: perplexity, bits per byte (see nelbo.py)
nelbo_draws = 8  # masks of each row for it, 8 or more; its error shrinks faster with more rows
pll = ""  # texts to score, one a line or .jsonl with a field "text" (see pll.py); empty: none
pll_texts = 200  # how many of these, from the first on
profile = False  # latency at batch size 1, throughput and memory of this machine
report = False  # write out_dir/report.html, one page to look at
micro_batch = 32  # rows a forward pass
dtype = "auto"  # auto | bf16 | fp16 | fp32
device = "auto"  # auto | cuda | mps | cpu
# -----------------------------------------------------------------------------
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import as_bool, configure, read_settings

config = configure(globals())

import contextlib
import csv
import io
import signal
from typing import NamedTuple

import scipy.stats
import torch
import torch.nn.functional as F

from data.reader import TokenData, folders
from data.tokenizer import Tokenizer
from lib import health
from lib.embed import NAMES, choose_pooling, embed_rows, rows_of
from lib.evaluation import evaluate, token_frequency
from lib.files import check_outputs, print_result, read_object, say, write_json
from lib.importance import Importance, describe_importance
from lib.log import draw_curves, read_log
from lib.machine import Machine, autocast, choose_dtype, find_machine
from lib.run import checkpoint_paths, data_of, load_run, user_mistakes
from lib.settings import build_model, is_causal
from masking import check_masking, mask_batch, masking_types
from tools.compare import as_text, check_comparable, runs_to_compare, write_comparison
from tools.measures import BOUND, CONCEPTS, LATENCY_LENGTHS, LOSS_FIELDS, LOSSES, shown
from tools.metrics import collect, measure_speed, of_weights, page, read_glue, write_page
from tools.nelbo import LEAST_DRAWS, likelihood_bound
from tools.pll import pseudo_log_likelihood
from tools.report import write_report

# Files that are replaced, with what each holds if it is from this command.
OUTPUTS = {"eval.json": '"unigram_entropy":', "metrics.json": '"experiment_name":',
           "summary.md": "Losses and entropies are nats a predicted token",
           "report.html": "tools/report.py fills", "curves.png": "Matplotlib"}
HEAT_MAPS, HEAT_MAP_TOKENS = 6, 96  # rows drawn in the report, and how many tokens of each
SCORED_TOKENS = 256  # tokens of a row that the report colours by their importance
SCORE_BARS = 40  # of the histogram of scores in the report


class Run(NamedTuple):
    """A training run that has been loaded, and what to measure it on."""
    path: str  # its folder, or a checkpoint in it
    model: torch.nn.Module
    tok: Tokenizer
    checkpoint: dict
    machine: Machine
    dtype: str
    T: int  # tokens a row
    sets: dict  # folder: TokenData of the split
    sts_file: str = ""  # STS-B; empty: not measured
    pairs: list | None = None  # its sentences, sentences, scores
    glue: dict = {}  # medians of fine-tuned tasks; empty: none yet
    control: torch.nn.Module | None = None  # a Transformer
    scorer: Importance | None = None  # the scores of masking_type=importance

    @property
    def folder(self):
        return checkpoint_paths(self.path)[0]

    def say(self, *words):
        """Prints once, not once per process."""
        self.machine.say(*words)


# ---- settings, load the run ---------------------------------------------------

def check_settings():
    """Raises ValueError for numbers out of range and for settings that would be ignored."""
    check_masking("token", mlm_probability)
    if rows < 1 or micro_batch < 1 or health_rows < 0 or pll_texts < 1:
        raise ValueError(f"rows={rows}, micro_batch={micro_batch}, health_rows={health_rows}, "
                         f"pll_texts={pll_texts}: expected more than 0")
    if compare:
        alone = [name for name in ("report", "control_dir", "sts", "pll") if config[name]]
        if alone:
            raise ValueError(f"compare={compare} measures losses and concepts; {', '.join(alone)} "
                             "is of one run: leave out compare")
    if report and not health_rows:
        raise ValueError("report=true draws the concepts; it needs health_rows above 0")
    if control_dir and not health_rows and not sts:
        raise ValueError(f"control_dir={control_dir} is a control for health_rows and sts; one of "
                         "them has to be on")
    if pll_texts != read_settings(__file__)["pll_texts"][0] and not pll:
        raise ValueError(f"pll_texts={pll_texts} is of a file of texts; name it with --pll=FILE")
    if nelbo_draws < LEAST_DRAWS:
        raise ValueError(f"nelbo_draws={nelbo_draws}: expected {LEAST_DRAWS} or more, so that each "
                         "row sees few and many masks; what makes it faster is fewer --rows")
    if nelbo_draws != read_settings(__file__)["nelbo_draws"][0] and not nelbo:
        raise ValueError(f"nelbo_draws={nelbo_draws} is of the bound; add --nelbo=1")
    if pll and not os.path.isfile(pll):
        raise ValueError(f"pll={pll}: no such file; expected one with a text a line, or .jsonl "
                         "with a field \"text\"")


def load():
    """Everything that can fail because of a setting, before hours of work. -> Run."""
    machine = find_machine(device, parallel=True)
    precision, reason = choose_dtype(dtype, machine.device)
    model, tok, loaded = load_run(out_dir, machine.device, checkpoint)
    folder, *_ = checkpoint_paths(out_dir)
    check_outputs(folder, OUTPUTS)
    read_object(os.path.join(folder, "config.json"))  # as long as a damaged one costs nothing
    T = row_length({out_dir: model.cfg})
    names = folders(data_dir or data_of(loaded))
    sets = load_sets(names, T, tok, out_dir)
    refuse_decoder(model, out_dir)
    sts_file = find_sts() if sts else ""
    pairs = read_sts(sts_file) if sts else None
    glue = of_weights(read_glue(folder), loaded)
    control = load_control(tok, T, machine) if control_dir else None
    scorer = load_scorer(loaded, names[0], tok, T, machine)
    run = Run(out_dir, model, tok, loaded, machine, precision, T, sets, sts_file, pairs, glue,
              control, scorer)
    run.say(f"{out_dir} after {loaded['tokens']:,} tokens, {model.num_params():,} "
            f"parameters, {precision} ({reason})")
    return run


def refuse_decoder(model, path):
    """Raises ValueError for what only masked models have."""
    asked = [f"--{name}" for name in ("nelbo", "pll") if config[name]]
    if is_causal(model) and asked:
        raise ValueError(f"{path} was trained with objective=clm: {', '.join(asked)} is of masked "
                         "models. A decoder's own perplexity and bits per byte are exact; "
                         "eval.py prints them without any of these")


def row_length(configs):
    """Tokens a row that all models read: {run: its config} -> the setting, or as in training."""
    T = block_size or min(cfg.block_size for cfg in configs.values())
    for path, cfg in configs.items():
        if not 0 < T <= cfg.longest:
            raise ValueError(f"block_size={block_size}: {path} reads rows of 1 to {cfg.longest} "
                             "tokens")
    return T


def load_sets(names, T, tok, path):
    """Prepared folders -> {name: TokenData}. Raises ValueError for one of another tokenizer."""
    sets = {name: TokenData(name, split, T, 0) for name in names}
    for name, data in sets.items():
        if data.meta["fingerprint"] != tok.fingerprint:
            raise ValueError(
                f"{name} was prepared with another tokenizer than {path} was trained with; prepare "
                f"it again with --tokenizer={checkpoint_paths(path)[0]}/tokenizer")
    return sets


def load_control(tok, T, machine):
    """The Transformer in control_dir. Raises ValueError if it cannot read the same rows."""
    control, control_tok, _ = load_run(control_dir, machine.device)
    same_tokenizer = control_tok.fingerprint == tok.fingerprint
    if control.arch == "concept" or not same_tokenizer or control.cfg.longest < T:
        raise ValueError(f"control_dir={control_dir}: expected a run with arch=transformer, the "
                         f"same tokenizer as {out_dir} and block_size {T} or more")
    return control


def load_scorer(loaded, name, tok, T, machine):
    """The scores in a checkpoint -> Importance; None where masks were drawn without.

    name: the data whose training text says how frequent ids are. Raises ValueError for scores that
    do not fit.
    """
    state = loaded.get("importance")
    if not state:
        return None
    scorer = Importance(state["kind"], TokenData(name, "train", T, 0), tok,
                        loaded["settings"]["mlm_probability"], machine)
    try:
        scorer.load(state)
    except ValueError as error:
        raise ValueError(f"{out_dir}: {error}") from None
    except (KeyError, RuntimeError) as error:  # lib/importance.py was edited since
        raise ValueError(f"{out_dir}: its scores were learned with another lib/importance.py, see "
                         f"git in its config.json: {error}") from None
    return scorer


def find_sts():
    """The setting sts -> path; 1, or true, looks where GLUE's files usually lie."""
    if not as_bool(sts):
        return os.path.normpath(sts)
    places = [os.path.join(folder, "glue", "STS-B", "dev.tsv")
              for folder in (".", ROOT, os.path.join(ROOT, "data"))]
    for place in places:
        if os.path.isfile(place):
            return os.path.normpath(place)
    looked_at = dict.fromkeys(map(os.path.relpath, places))  # "." and ROOT are often the same
    raise ValueError(f"sts=1: there is no {' and no '.join(looked_at)}; give the path of GLUE's "
                     "file: --sts=FOLDER/STS-B/dev.tsv")


def read_sts(path):
    """STS-B as GLUE has it -> [sentences, sentences, scores from 0 to 5]. Raises ValueError.

    The file is tab-separated with a header; quotation marks have no special meaning.
    """
    expected = ("expected GLUE's STS-B: tab-separated UTF-8 with the columns sentence1, sentence2 "
                "and score (0 to 5)")
    wanted = ("sentence1", "sentence2", "score")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            found = [(reader.line_num, *(line.get(name) for name in wanted)) for line in reader]
        if any((reader.fieldnames or []).count(name) != 1 for name in wanted):
            raise ValueError(f"found the columns {', '.join(reader.fieldnames or [])}")
        pairs = []
        for number, first, second, score in found:
            if not (first and second and score):
                raise ValueError(f"line {number} has no sentence or no score")
            if not 0 <= float(score) <= 5:  # false for nan
                raise ValueError(f"line {number}: the score is {score}")
            pairs.append((first, second, float(score)))
    except (ValueError, csv.Error) as error:  # not UTF-8, or a score that is not a number
        raise ValueError(f"sts={path}: {error}; {expected}") from None
    if len(pairs) < 3:  # fewer have no correlation
        raise ValueError(f"sts={path}: found {len(pairs)} scored pairs; {expected}")
    if len({score for _, _, score in pairs}) == 1:
        raise ValueError(f"sts={path}: all {len(pairs)} scores are {pairs[0][2]:g}, and nothing "
                         f"correlates with a constant; {expected}")
    return [list(column) for column in zip(*pairs)]


# ---- speed ----------------------------------------------------------------------

def profile_speed(run):
    """Latency, throughput and memory -> fields of the section "speed"."""
    say = run.say
    speed = measure_speed(run.model, run.tok, run.machine, run.dtype, run.T, micro_batch)
    title = (f"{run.dtype} on {run.machine.device}, {torch.get_num_threads()} threads, "
             "not compiled")
    say(f"\n{title:<42}{'median':>12}{'between quartiles':>20}")
    for length in LATENCY_LENGTHS:
        if length <= run.model.cfg.longest:
            what, field = f"one row of {length} tokens, one mask, ms", f"latency_batch1_seq{length}"
            median, iqr = speed[f"{field}_ms"], speed[f"{field}_iqr_ms"]
            say(f"  {what:<40}{median:>12.2f}{iqr:>20.2f}")
    what = f"reading {micro_batch} rows of {run.T}, tokens/s"
    median, iqr = speed["throughput_tokens_per_sec"], speed["throughput_iqr_tokens_per_sec"]
    say(f"  {what:<40}{median:>12,.0f}{iqr:>20,.0f}")
    say(f"  {'peak memory, MiB':<40}{speed['memory_peak_mb']:>12,.0f}")
    return speed


# ---- losses ----------------------------------------------------------------------

def loss_cells(result, measures):
    """Values of a result of evaluate() in columns of the screen, under loss_heads()."""
    return "".join(f"{shown(result[m.name], m.form):>{width_of(m)}}" for m in measures)


def loss_heads(measures):
    """The line above loss_cells()."""
    return "".join(f"{m.heading:>{width_of(m)}}" for m in measures)


def width_of(measure):
    """Characters of a column: the heading and two spaces, at least a number of four decimals."""
    return max(8, len(measure.heading) + 2)


def measure_losses(run, name, data, say):
    """Every masking on one data set -> {masking: result of evaluate(), "unigram_entropy"}.

    say: prints a part of the table as soon as it is known.
    """
    n_rows = min(rows, data.n_blocks)
    results = {"unigram_entropy": data.meta["unigram_entropy"]}
    predicted = "all" if is_causal(run.model) else f"{mlm_probability:.0%}"
    say(f"\n{name} {split}, {n_rows} rows of {run.T} tokens, {predicted} predicted, "
        f"unigram entropy {results['unigram_entropy']:.3f} nats\n"
        f"  {'masking':<12}{loss_heads(LOSSES)}")
    # Frequent and rare are meant in the training text, whatever split is measured.
    frequency = token_frequency(TokenData(name, "train", run.T, 0), run.tok)
    rarity = -frequency.clamp(min=1e-7).log()  # rare words are the important ones, for all models
    if is_causal(run.model):  # every token is predicted from those before it: no masks to choose
        results["clm"] = evaluate(run.model, data, run.tok, run.machine, run.dtype, rows=rows,
                                  micro_batch=micro_batch)
        say(f"  {'next tokens':<12}{loss_cells(results['clm'], LOSSES)}")
        return results
    for masking in masking_types(run.tok):
        share = 1.0 if masking == "diffusion" else mlm_probability  # of all rates, or of one
        results[masking] = evaluate(
            run.model, data, run.tok, run.machine, run.dtype, masking, share, rows, micro_batch,
            frequency if masking == "token" else None, rarity if masking == "importance" else None)
        say(f"  {masking:<12}{loss_cells(results[masking], LOSSES)}")
    say(f"  {'token masks, where the token':<30}{'loss':>8}{'share':>8}")
    for part, r in results["token"]["splits"].items():
        say(f"  {part:<30}{shown(r['loss'], '.4f'):>8}{r['share']:>8.1%}")
    return results


def print_all_sets(results, say):
    """Several data sets below each other, for single-token masks or next tokens."""
    width = max(len(name) for name in [*results, "token masks"]) + 2
    kind = "clm" if "clm" in next(iter(results.values())) else "token"
    title = "next tokens" if kind == "clm" else "token masks"
    say(f"\n{title:<{width}}{loss_heads(LOSS_FIELDS)}{'unigram':>9}")
    for name, r in results.items():
        say(f"{name:<{width}}{loss_cells(r[kind], LOSS_FIELDS)}{r['unigram_entropy']:>9.3f}")


# ---- likelihood -----------------------------------------------------------------------

def measure_nelbo(run, say):
    """The bound on every data set -> {folder: result of likelihood_bound()}. Prints one table."""
    width = max(len(name) for name in [*run.sets, split]) + 2
    say(f"\nlikelihood bound, {nelbo_draws} masks a row; up to {rows:,} packed rows of {run.T} "
        "tokens, each read by itself\n"
        "  Special tokens (end of document, padding) are never hidden and not counted; MDLM counts "
        "them.\n"
        "  Words are separated by white space, and a line's end is none. se: standard error, over "
        f"rows.\n{split:<{width}}{loss_heads(BOUND)}")
    found = {}
    for name, data in run.sets.items():
        found[name] = likelihood_bound(run.model, data, run.tok, run.machine, run.dtype, rows,
                                       nelbo_draws, micro_batch)
        say(f"{name:<{width}}{loss_cells(found[name], BOUND)}")
    settings = run.checkpoint["settings"]
    masking, share = settings.get("masking_type"), settings.get("mlm_probability")
    if (masking, share) != ("diffusion", 1):
        say(f"  Trained with masking_type={masking} and mlm_probability={share}, this model has "
            "not learned\n  all shares of hidden tokens: the bound holds, but is loose.")
    return found


def measure_pll(run):
    """Scores the texts of the setting pll -> dict, see tools/pll.py."""
    r = pseudo_log_likelihood(run.model, pll, run.tok, run.machine, run.dtype, pll_texts,
                              run.model.cfg.longest, micro_batch * run.T)
    run.say(
        f"\n{r['method']} of {r['texts']:,} texts of {pll}, {r['left_out']:,} too long: "
        f"{r['nats']:,.1f} nats over {r['words']:,} words, {r['bytes']:,} bytes\n"
        f"  {r['nats_per_word']:.4f} nats a word, perplexity {r['perplexity_per_word']:,.2f} a "
        f"word, {r['bits_per_byte']:.4f} bits a byte")
    return r


# ---- health of the concepts, and the controls ----------------------------------------

def measure_concepts(run, model, ids, batch, pad_id):
    """All of lib/health.py for one model -> dict. pad_id: health.padding_of the rows.

    A Transformer has no concepts: as many token states, evenly spaced, take their place.
    """
    concepts, tokens = health.encode_rows(model, ids, run.machine, run.dtype, micro_batch, pad_id)
    if model.arch != "concept":
        return health.geometry(health.evenly_spaced(tokens, n_vectors(run)))
    use = health.channel_use(model, batch, run.machine, run.dtype, micro_batch, True, pad_id)
    few = slice(0, 2 * micro_batch)  # attention weights are large, and a few rows are enough
    read, decode = health.attention(model, batch.inputs[few], batch.positions[few], run.machine,
                                    run.dtype, pad_id)
    singles = torch.tensor(use["one_by_one"])
    return (health.geometry(concepts) | use | health.attention_use(read, decode)
            | dict(strongest=singles.max().item(), median_single=singles.median().item()))


def n_vectors(run):
    """How many vectors of a row are measured: the concepts, or 64 token states."""
    return getattr(run.model.cfg, "n_concept", 64)


def measure_health(run):
    """The concepts beside their controls. -> {column: measures}, the ids they were measured on.

    Without a control a number cannot be judged. Controls are the same network with fresh weights
    and, with control_dir, a trained Transformer.
    """
    first_name, first = next(iter(run.sets.items()))
    torch.manual_seed(run.checkpoint["settings"].get("seed", 0))  # the same control each time
    untrained = build_model(run.checkpoint["model_settings"]).to(run.machine.device).eval()
    models = {"trained": run.model, "untrained": untrained}
    if run.control:
        models["Transformer tokens"] = run.control
    ids, batch = health.probe_rows(first, run.tok, health_rows, mlm_probability)
    pad_id = health.padding_of(first, run.tok)
    columns = {name: measure_concepts(run, model, ids, batch, pad_id)
               for name, model in models.items()}
    what = "concepts"
    if run.model.arch != "concept":
        what = f"{n_vectors(run)} evenly spaced token states"
    note = "" if len(ids) == health_rows else f" (all there are; health_rows={health_rows})"
    heads = "".join(f"{name:>20}" for name in columns)
    run.say(f"\nhealth of the {what} on {len(ids)} rows of {first_name}{note}\n"
            f"  {'':<28}{heads}")
    for measure, values in health_table(columns):
        cells = "".join(f"{shown(value, measure.form):>20}" for value in values)
        run.say(f"  {measure.heading:<28}{cells}")
    return columns, ids


def health_table(columns):
    """[(measure, its value in each column)], without the measures that no column has."""
    table = [(m, [column.get(m.name) for column in columns.values()]) for m in CONCEPTS]
    return [(m, values) for m, values in table if any(value is not None for value in values)]


# ---- importance ------------------------------------------------------------------------

def importance_rows():
    """How many rows of the first data set are scored."""
    return health_rows or rows


def measure_importance(run):
    """Of a run with masking_type=importance: do the scores tell what is hard? -> dict."""
    name, data = next(iter(run.sets.items()))
    found = run.scorer.measure(run.model, data, run.dtype, importance_rows(), micro_batch)
    n_rows = min(importance_rows(), data.n_blocks)
    run.say(f"\nscores of importance={run.scorer.kind} on {n_rows} rows of {name}")
    if found:  # nothing where losses are not finite
        run.say(describe_importance(found))
    return dict(kind=run.scorer.kind, rows=n_rows) | found


def importance_pictures(run):
    """Of the report: a row with its scores, the ids of all rows, a histogram -> plain lists."""
    data, scorer, tok = next(iter(run.sets.values())), run.scorer, run.tok
    ids, _ = health.probe_rows(data, tok, importance_rows())
    scores = scorer.of_rows(ids, micro_batch)
    ordinary = ~torch.from_numpy(tok.is_special)[ids]
    # Of each token, which share of its row has lower scores; special tokens have none.
    quantiles = torch.full_like(scores[0], float("nan"))
    ranks = scipy.stats.rankdata(scores[0, ordinary[0]])
    quantiles[ordinary[0]] = torch.from_numpy((ranks - 0.5) / max(1, len(ranks)))
    first = slice(SCORED_TOKENS)
    row = dict(tokens=[tok.decode([i]) for i in ids[0, first].tolist()],
               scores=scores[0, first].tolist(), quantiles=quantiles[first].tolist())
    columns = zip(*(column.tolist() for column in scorer.by_id(ids, scores)))
    words = [[tok.decode([i]), scorer.prior_V[i].item(), score, count]
             for i, score, count in columns]
    histogram = None
    if words:
        found = scores[ordinary]
        histogram = dict(low=found.min().item(), high=found.max().item(),
                         counts=torch.histc(found, SCORE_BARS).long().tolist())
    return dict(row=row, words=words, histogram=histogram)


# ---- similarity of sentences -----------------------------------------------------------

def zero_shot_sts(run, model):
    """Correlation of the cosine of two sentences' embeddings with human scores, not fine-tuned.

    -> {embedding: {"pearson", "spearman"}}. Embeddings are those of lib/embed.py: table (mean of
    the token table: no order, no context), tokens and concepts (mean state), max (the largest of
    each number instead of the mean), all concepts (side by side). Each comes a second time
    centred: minus its mean over these sentences (1702.01417), a part that all sentences share and
    that dominates concepts which own no word of a short row. Scores play no part in centring.
    """
    first, second, scores = run.pairs
    with autocast(run.machine.device, run.dtype):
        texts, _ = rows_of(first + second, run.tok, run.T)
        vectors = embed_rows(model, texts, NAMES[model.arch], micro_batch * run.T,
                             run.machine.device)
    result = {}
    for name, vector in vectors.items():
        for kind, embedding in ((name, vector), (f"{name}, centred", vector - vector.mean(0))):
            cosine = F.cosine_similarity(*embedding.chunk(2)).double().numpy()
            result[kind] = dict(pearson=correlation(scipy.stats.pearsonr, cosine, scores),
                                spearman=correlation(scipy.stats.spearmanr, cosine, scores))
    return result


def correlation(measure, cosine, scores):
    """-> float, or None where there is none because all cosines are the same."""
    if cosine.min() == cosine.max():
        return None
    return float(measure(cosine, scores)[0])


def measure_sts(run):
    """All embeddings of the model and of the control -> {model: result of zero_shot_sts()}."""
    say, found = run.say, {"trained": zero_shot_sts(run, run.model)}
    if run.control:
        found["Transformer"] = zero_shot_sts(run, run.control)
    say(f"\nzero-shot similarity of {len(run.pairs[0]):,} pairs of {run.sts_file}, cosine "
        f"of embeddings against human scores\n  {'':<28}{'Pearson':>10}{'Spearman':>10}")
    for who, embeddings in found.items():
        for name, r in embeddings.items():
            why = "" if r["pearson"] is not None else "  all cosines are the same"
            say(f"  {who + ', ' + name:<28}{shown(r['pearson'], '.4f'):>10}"
                f"{shown(r['spearman'], '.4f'):>10}{why}")
    _, written = choose_pooling("auto", run.model)
    if written != "tokens":
        of_written, of_tokens = (shown(found["trained"][name]["spearman"], ".4f")
                                 for name in (written, "tokens"))
        say(f"  what sample.py --embed writes, {written}: {of_written}; mean token state: "
            f"{of_tokens}")
    return found


# ---- writing ------------------------------------------------------------------------------

def write_metrics(run, summary, records):
    """metrics.json and summary.md."""
    trained_on = {name.strip() for name in data_of(run.checkpoint).split(",")}
    train_tokens = None  # unknown unless the training data is among what was measured
    if trained_on <= set(run.sets):
        train_tokens = sum(run.sets[name].meta["splits"]["train"]["tokens"]
                           for name in trained_on)
    fields = collect(run.folder, run.model, run.tok, run.checkpoint, records, summary, run.glue,
                     run.machine, run.dtype, train_tokens)
    write_json(os.path.join(run.folder, "metrics.json"), fields)
    write_page(os.path.join(run.folder, "summary.md"),
               page(run.folder, fields, summary, run.glue))


def heat_map(run, row):
    """What the concepts read in one row of ids (T,), and what the model predicts -> plain lists."""
    model, tok, machine = run.model, run.tok, run.machine
    batch = mask_batch(row[None], torch.zeros(1), "token", mlm_probability, tok)
    weights, _ = health.attention(model, batch.inputs, batch.positions, machine, run.dtype)
    with torch.no_grad():
        inputs, positions = machine.take([batch.inputs, batch.positions])
        concepts, tokens = model.encode(inputs)
        states = model.decode(concepts, tokens, positions, model.documents(inputs))
        # n_vocab: the table is larger than the vocabulary, and ids beyond it have no text
        best = model.logits(states)[0, :, :tok.n_vocab].argmax(-1).tolist()
    guesses = {int(place): tok.decode([id])
               for place, id, used in zip(batch.positions[0], best, batch.used[0]) if used}
    last_layer = weights[-1].mean(1)[0]  # mean over heads, (C, T)
    return dict(tokens=[tok.decode([int(id)]) for id in row],
                masked=[place in guesses for place in range(len(row))],
                guess=[guesses.get(place) for place in range(len(row))],
                weights=[[round(w, 4) for w in concept] for concept in last_layer.tolist()])


def concept_pictures(run, ids):
    """Of the report: heat maps, the tokens each concept reads, similarity -> plain lists."""
    n = min(HEAT_MAPS, len(ids))
    spread = torch.arange(n) * len(ids) // n
    sentences = [heat_map(run, row[:HEAT_MAP_TOKENS]) for row in ids[spread]]
    few = ids[:2 * micro_batch]
    nowhere = torch.zeros(len(few), 1, dtype=torch.int64)  # what is decoded does not matter here
    pad_id = health.padding_of(next(iter(run.sets.values())), run.tok)
    read, _ = health.attention(run.model, few, nowhere, run.machine, run.dtype, pad_id)
    # The last heads of a reader are restricted to the words that a concept owns, and read them
    # whatever they are. Only the other heads show what it has learned to look for.
    n_free = read[-1].shape[1] - health.readers(run.model)[-1].n_owned_head
    top_tokens = health.top_tokens(read[-1][:, :n_free].mean(1), few, run.tok)
    concepts, _ = health.encode_rows(run.model, ids, run.machine, run.dtype, micro_batch, pad_id)
    centred = F.normalize(concepts - concepts.mean(1, keepdim=True), dim=-1)
    cosine = (centred @ centred.mT).mean(0)
    return dict(sentences=sentences, concepts=top_tokens,
                similarity=[[round(x, 3) for x in row] for row in cosine.tolist()])


def draw_report(run, summary, records, ids):
    """report.html."""
    first, columns = next(iter(summary["data"].values())), summary["health"]
    lines = [[measure.heading, measure.reading, *values]
             for measure, values in health_table(columns)]
    data = dict(
        title=out_dir, arch=run.model.arch, step=summary["step"], tokens=summary["tokens"],
        params=summary["params"], settings=run.checkpoint["settings"],
        unigram_entropy=first["unigram_entropy"], log=records, losses=summary["data"],
        splits=first.get("token", {}).get("splits"), health=dict(columns=list(columns), rows=lines),
        one_by_one=columns["trained"].get("one_by_one"), usage=columns["trained"].get("usage"))
    if run.model.arch == "concept":
        data |= concept_pictures(run, ids)
    if run.scorer:
        data["importance"] = summary["importance"] | importance_pictures(run)
    write_report(os.path.join(run.folder, "report.html"), data)


def write_all(run, summary, ids):
    """eval.json, metrics.json, summary.md and the pictures. ids: rows the concepts were seen on."""
    folder, records = run.folder, read_log(run.folder)
    write_json(os.path.join(folder, "eval.json"), summary)
    write_metrics(run, summary, records)
    written = ["eval.json", "metrics.json", "summary.md"]
    if any(record.get("val_loss") is not None for record in records):
        entropy = next(iter(summary["data"].values()))["unigram_entropy"]
        draw_curves(os.path.join(folder, "curves.png"), records, entropy, out_dir,
                    is_causal(run.model))
        written.append("curves.png")
    if report:
        draw_report(run, summary, records, ids)
        written.append("report.html")
    run.say(f"\nwritten into {folder}: {', '.join(written)}; to read: {folder}/summary.md")
    print_result(summary)


# ---- one run, or several ------------------------------------------------------------------

def begin_summary(run):
    """The head of eval.json."""
    return dict(out_dir=run.path, step=run.checkpoint["step"], tokens=run.checkpoint["tokens"],
                params=run.model.num_params(), split=split, mlm_probability=mlm_probability,
                block_size=run.T,
                rows={name: min(rows, data.n_blocks) for name, data in run.sets.items()}, data={})


def measure_run():
    """The run out_dir: everything that is asked for."""
    run = load()
    is_main = run.machine.is_main
    summary = begin_summary(run)
    # Speed comes first: the peak of memory must be that of reading and filling, not of the rest.
    if profile:
        if is_main:
            summary["speed"] = profile_speed(run)
        run.machine.all_sum(0)  # the other processes wait
    # All processes share the work of these two, so they come before what the main one does alone:
    # the others would wait for it, and give up after some minutes.
    for name, data in run.sets.items():
        summary["data"][name] = measure_losses(run, name, data, run.say)
    if len(run.sets) > 1:
        print_all_sets(summary["data"], run.say)
    if nelbo:
        summary["nelbo"] = measure_nelbo(run, run.say)
    if pll:
        summary["pll"] = measure_pll(run)
    if is_main:
        ids = None
        if health_rows:
            summary["health"], ids = measure_health(run)
        if run.scorer:
            summary["importance"] = measure_importance(run)
        if sts:
            summary |= dict(sts_file=run.sts_file, sts=measure_sts(run))
        write_all(run, summary, ids)
    run.machine.close()


def load_runs(paths):
    """Whether these runs can be compared, before they are measured. Raises ValueError if not.

    -> {folder: TokenData} of rows that all of them read.
    """
    # One model at a time is in memory, so each is loaded a second time to be measured.
    runs = []
    for path in paths:
        model, tok, loaded = load_run(path, "cpu", checkpoint)
        refuse_decoder(model, path)
        read_object(os.path.join(checkpoint_paths(path)[0], "config.json"))
        runs.append((model.cfg, tok, loaded["data_sha256"], data_of(loaded)))
    configs, toks, data_hashes, data_dirs = zip(*runs)
    check_comparable(paths, [tok.fingerprint for tok in toks], data_hashes, data_dirs, data_dir)
    T = row_length(dict(zip(paths, configs)))
    return load_sets(folders(data_dir or data_dirs[0]), T, toks[0], paths[0])


def compare_runs():
    """All runs in the setting compare, on the same rows and masks."""
    named = out_dir if out_dir != read_settings(__file__)["out_dir"][0] else ""
    paths = runs_to_compare(compare, named)
    machine = find_machine(device, parallel=True)
    precision, reason = choose_dtype(dtype, machine.device)
    sets = load_runs(paths)
    folder, *_ = checkpoint_paths(paths[0])
    check_outputs(folder, {"compare.json": '"runs":', "compare.md": "# Runs side by side",
                           "compare.png": "Matplotlib"})
    machine.say(f"{len(paths)} runs, {precision} ({reason})")
    T = next(iter(sets.values())).block_size
    found = []
    for number, path in enumerate(paths, 1):
        with contextlib.redirect_stderr(io.StringIO()):  # said when it was loaded before
            model, tok, loaded = load_run(path, machine.device, checkpoint)
        run = Run(path, model, tok, loaded, machine, precision, T, sets)
        run.say(f"{number} of {len(paths)}: {path} after {loaded['tokens']:,} tokens")
        found.append(measure_beside(run))
    if machine.is_main:
        defaults = {name: default for name, (default, _)
                    in read_settings(os.path.join(ROOT, "train.py")).items()}
        result = write_comparison(found, defaults, folder)
        say(f"\n{as_text(found, defaults)}\n\n{folder}/compare.md to read, {folder}/compare.png "
            "the curves")
        print_result(result)
    machine.close()


def measure_beside(run):
    """One of several runs -> what tools/compare.py shows of it, in the main process, else None."""
    summary = begin_summary(run)
    if profile and run.machine.is_main:
        speed = measure_speed(run.model, run.tok, run.machine, run.dtype, run.T, micro_batch)
        weights = sum(p.numel() * p.element_size() for p in run.model.parameters()) / 2**20
        on_gpu = run.machine.device.type == "cuda"
        summary["speed"] = speed | dict(
            weights_mb=weights, gpu_memory_mb=speed["memory_peak_mb"] if on_gpu else None)
    for name, data in run.sets.items():
        summary["data"][name] = measure_losses(run, name, data, lambda *_: None)
    if nelbo:
        summary["nelbo"] = measure_nelbo(run, lambda *_: None)
    if not run.machine.is_main:
        return None
    if health_rows:
        first = next(iter(run.sets.values()))
        ids, batch = health.probe_rows(first, run.tok, health_rows, mlm_probability)
        summary["health"] = dict(trained=measure_concepts(
            run, run.model, ids, batch, health.padding_of(first, run.tok)))
    records = read_log(run.folder)
    fields = collect(run.folder, run.model, run.tok, run.checkpoint, records,
                     summary | dict(speed={}), {}, run.machine, run.dtype, None)
    curve = [(record["tokens"], record["val_loss"]) for record in records
             if record.get("val_loss") is not None]
    return dict(path=run.path, summary=summary, fields=fields, curve=curve,
                settings=run.checkpoint["settings"])


def main():
    check_settings()
    # A terminal that closes would end the work; what it finds is in the files.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if compare:
        compare_runs()
    else:
        measure_run()


if __name__ == "__main__":
    with user_mistakes():
        main()
