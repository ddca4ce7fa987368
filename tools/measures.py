"""The measures of tools/eval.py: one table for screen, metrics.json, summary.md and report.

A new measure of a loss (returned by lib/evaluation.py) or of the concepts (lib/health.py) needs
one line in LOSSES or CONCEPTS; then it appears everywhere. Any other new number needs a field and
its unit in FIELDS, and the function in tools/metrics.py that fills it.
"""

from typing import NamedTuple

from masking import MASKING_TYPES

# What losses are of: masked tokens under each masking, or every next token (of a decoder only).
KINDS = (*MASKING_TYPES, "clm")
LATENCY_LENGTHS = (128, 512)  # tokens of the single row whose latency is measured
GLUE_FIELDS = (
    "cola_mcc", "sst2_accuracy", "mrpc_f1", "mrpc_accuracy", "stsb_pearson", "stsb_spearman",
    "qqp_f1", "qqp_accuracy", "mnli_accuracy", "qnli_accuracy", "rte_accuracy", "wnli_accuracy",
    "boolq_accuracy")
# SmallBench, the average of four small tasks: its name for each, and the task in glue.json
SMALLBENCH = {"sentiment": "sst2", "nli": "rte", "qa": "boolq", "paraphrase": "mrpc"}


class Measure(NamedTuple):
    """One measure: how it is named in each place, and how a reader understands it."""
    name: str  # in eval.json
    heading: str  # on the screen and in the report
    unit: str = ""
    how: str = ""  # what it is, or what its extremes mean
    good: str = ""  # the values of a healthy model, where that is known
    field: str = ""  # name in metrics.json; empty: not there
    curve: str = ""  # name in log.jsonl, drawn by the report; empty: not logged
    form: str = ".4g"  # Python format of a value on the screen

    @property
    def reading(self):
        """How to read it, and what is good."""
        return f"{self.how}; good: {self.good}" if self.good else self.how


# ---- losses: measured for each data set and each masking ---------------------------

# In metrics.json a field is preceded by the split: val_loss, test_loss.
LOSSES = [
    Measure("loss", "loss", "nats", field="loss", form=".4f"),
    Measure("accuracy", "accuracy", "share of predicted tokens", field="accuracy", form=".1%"),
    Measure("perplexity", "perplexity", field="perplexity", form=".2f"),
    Measure("bits_per_byte", "bits/byte", "bits", field="bits_per_byte", form=".4f"),
    Measure("predicted", "predicted", "tokens", form=","),
]
LOSS_FIELDS = [measure for measure in LOSSES if measure.field]

# ---- the likelihood bound: measured for each data set, see tools/nelbo.py ------------------

# In metrics.json preceded by nelbo_.
BOUND = [
    Measure("nats", "nats/token", "nats a token", form=".4f"),
    Measure("se", "se", "nats, standard error over rows", form=".4f"),
    Measure("ppl", "perplexity", form=".2f"),
    Measure("bpb", "bits/byte", "bits", form=".4f"),
    Measure("word_ppl", "word perplexity", "white space between", form=",.5g"),
    Measure("rows", "rows", "rows", form=","),
    Measure("tokens", "text tokens", "tokens, special ones left out", form=","),
]

# ---- health of the concepts: see lib/health.py for how each is computed ----------------

CONCEPTS = [
    Measure("rank", "effective rank", "directions",
            "directions that the concepts of a row span, up to n_concept - 1; 0: all are equal",
            field="concept_rank", curve="concept_rank"),
    Measure("rank_share", "effective rank / n_concept", "of n_concepts",
            "the same as a share of n_concept", "half or more", field="concept_rank_share"),
    Measure("participation", "participation ratio", "directions",
            "an effective rank that gives more weight to strong directions"),
    Measure("duplicates", "duplicate pairs", "share of pairs",
            "share of the pairs of concepts of a row with a centred cosine above 0.95", "0",
            field="concept_duplicates", curve="duplicates"),
    Measure("cosine", "mean |cosine|", "mean, absolute",
            "mean absolute centred cosine of the pairs of concepts of a row",
            field="concept_cosine"),
    Measure("input_dependence", "input dependence", "share of the variance",
            "share of the variance of the concepts that the text causes; near 0: constants",
            field="concept_input_dependence", curve="input_dependence"),
    Measure("rankme", "RankMe of the mean", "directions",
            "directions in which rows differ, by their mean concept"),
    Measure("rankme_slot", "RankMe of a concept", "directions",
            "directions in which rows differ, by a single concept"),
    Measure("entropy", "reading entropy / log T", "",
            "1: a concept attends to all tokens alike; 0: to one token"),
    Measure("divergence", "reading divergence / log C", "",
            "0: all concepts attend to the same tokens; 1: each to tokens of its own"),
    Measure("position", "reading by position", "share of the variance",
            "share of the variance of attention to tokens that position alone explains"),
    Measure("usage_entropy", "usage entropy / log C", "",
            "1: the decoder attends to all concepts alike; 0: to one of them"),
    Measure("unused", "unused concepts", "share of concepts",
            "share that gets less than a tenth of an equal share of the decoder's attention",
            field="concepts_unused"),
    Measure("loss", "loss, nats", "nats",
            "on the rows of this table; the next five are by how much it rises"),
    Measure("zeroed", "concepts zeroed", "nats, rise",
            "rise of the loss without concepts, all zero; near 0: the decoder does not need them",
            field="concepts_zeroed", curve="zeroed"),
    Measure("shuffled", "concepts shuffled", "nats, rise",
            "rise of the loss with the concepts of another row; near 0: the decoder ignores them",
            field="concepts_shuffled", curve="shuffled"),
    Measure("averaged", "concepts averaged", "nats, rise",
            "rise of the loss with the mean of the concepts over the rows, a constant",
            field="concepts_averaged"),
    Measure("strongest", "strongest single concept", "nats, rise",
            "largest rise of the loss when one concept alone is zeroed"),
    Measure("median_single", "median single concept", "nats, rise",
            "median rise of the loss when one concept alone is zeroed"),
]

# ---- fields of metrics.json ----------------------------------------------------------

FIELDS = {  # section of summary.md: {field: unit}
    "model": dict(
        experiment_name="", arch="", bottleneck="", total_params="parameters",
        embedding_params="parameters", embedding_ratio="share of the parameters",
        non_embedding_params="parameters", vocab_size="rows of the table",
        block_size="tokens a row", n_layers="", n_heads="", n_concepts="",
        d_model="numbers a concept or state", d_token="numbers a row of the table", d_ff="",
        glu_expansion="d_ff / d_model", flops_per_token="FLOP, training, an input token",
        tokenizer=""),
    "training": dict(
        total_steps="steps", total_tokens="input tokens", total_epochs="passes over the data",
        total_flops="FLOP", training_time_seconds="s", train_tokens_per_sec="tokens/s, median",
        train_mfu="share of measured peak", train_data="", masking_type="",
        train_mlm_probability="", optimizer="", learning_rate="", batch_size="rows", seed="",
        train_loss="nats, last logged", train_perplexity="", best_train_loss="nats",
        best_val_loss="nats", git_commit="", train_torch=""),
    "evaluation": dict(
        timestamp="", eval_data="", eval_split="", eval_rows="rows",
        eval_block_size="tokens a row", eval_mlm_probability="", unigram_entropy="nats")
    | {f"val_{measure.field}": measure.unit for measure in LOSS_FIELDS}
    | {f"test_{measure.field}": measure.unit for measure in LOSS_FIELDS}
    | {f"loss_{masking}": "nats" for masking in MASKING_TYPES}
    | dict(loss_copy_in_row="nats", loss_no_copy="nats", loss_frequent="nats", loss_rare="nats")
    | {f"clm_{measure.field}": measure.unit for measure in LOSS_FIELDS},  # of a decoder
    "concepts": {measure.field: measure.unit for measure in CONCEPTS if measure.field},
    "likelihood bound": {f"nelbo_{measure.name}": measure.unit for measure in BOUND}
    | dict(nelbo_draws="masks a row"),
    "pseudo-log-likelihood": dict(  # the names of tools/pll.py after "pll_"
        pll_method="", pll_file="", pll_texts="texts", pll_left_out="texts too long",
        pll_nats="nats in all", pll_nats_per_word="nats", pll_perplexity_per_word="",
        pll_bits_per_byte="bits"),
    "similarity, zero-shot": dict(
        sts_file="", sts_pooling="", sts_pearson="", sts_spearman="", sts_token_mean_pearson="",
        sts_token_mean_spearman=""),
    "speed": {f"latency_batch1_seq{T}{part}_ms": f"ms, {what}" for T in LATENCY_LENGTHS
              for part, what in (("", "median"), ("_iqr", "interquartile range"))}
    | dict(throughput_tokens_per_sec="tokens/s, median",
           throughput_iqr_tokens_per_sec="tokens/s, interquartile range",
           throughput_batch_size="rows", throughput_seq_length="tokens a row",
           memory_peak_mb="MiB", device="", device_name="", num_gpus="", num_threads="", dtype="",
           torch=""),
    "fine-tuning": {f"glue_{name}": "median over seeds" for name in GLUE_FIELDS}
    | {f"smallbench_{name}_acc": "median over seeds" for name in (*SMALLBENCH, "avg")},
}
COMMANDS = {  # section: what measures it, where that is not a plain run of eval.py
    "concepts": "python tools/eval.py --out_dir={} with health_rows above 0, for a model with "
                "concepts",
    "likelihood bound": "python tools/eval.py --out_dir={} --nelbo=1",
    "pseudo-log-likelihood": "python tools/eval.py --out_dir={} --pll=FILE",
    "similarity, zero-shot": "python tools/eval.py --out_dir={} --sts=1",
    "fine-tuning": "python finetune_glue.py --out_dir={}",
}


def shown(value, form=".4g"):
    """A value of a measure as text; a dash for None, which is what could not be measured."""
    return "-" if value is None else format(value, form)
