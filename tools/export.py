"""A training run as a folder that `transformers`, its pipelines and `sentence_transformers` load.

    python tools/export.py --out_dir=out/demo --to=exported
    python tools/export.py --out_dir=out/demo --to=exported --task_dir=out/demo/glue/mrpc
    python tools/export.py --out_dir=out/demo --to=exported --onnx=1 --push=USER/REPO --private=1

The folder holds config.json, model.safetensors, the tokenizer, a model card, and Python files with
the model's code, copied from this repository. With --task_dir it is the classifier that
finetune_glue.py has made. Before the folder appears, it is loaded again and compared with the
run: ids of texts, and logits of padded, masked and single rows. A difference is an error, and
then nothing is written. Takes seconds, with onnx half a minute; needs requirements-extra.txt.
The last line on stdout is JSON.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt) and tokenizer/
checkpoint = "auto"  # auto | best | last | PATH; auto: the best, or a newer one not yet evaluated
to = "exported"  # folder to write; an earlier export is replaced, anything else there is an error
task_dir = ""  # folder with a fine-tuned model.pt, such as out/demo/glue/mrpc; empty: pretrained
onnx = False  # also model.onnx, for any number and length of rows
push = ""  # USER/REPO on the Hugging Face Hub; the token is from HF_TOKEN or `hf auth login`
private = False  # a repository that --push makes is private
# -----------------------------------------------------------------------------
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import configure

config = configure(globals())

import contextlib
import json
import logging
import math
import re
import shutil
import tempfile
import warnings

import numpy as np
import torch

from lib.files import print_result, read_json, remove_file, write_json
from lib.fill import encode_masked
from lib.heads import Classifier, encode_texts, padded
from lib.log import read_log
from lib.resonance import Fourier, Resonance
from lib.run import load_run, read_checkpoint, run_folder, user_mistakes
from lib.settings import build_model, is_causal, settings_of
from tools.measures import KINDS

# transformers copies the code of a folder to its cache and runs it there. The copies of a check
# must not stay in the user's cache. It has to be set before the import.
code_copies = tempfile.TemporaryDirectory()
os.environ.setdefault("HF_MODULES_CACHE", code_copies.name)
try:
    import huggingface_hub
    import transformers
    from safetensors.torch import save

    from tools.hub_files import (
        MODELING,
        code_files,
        copy_name,
        special_ids,
        write_onnx,
        write_tokenizer,
    )
    from tools.hub_model import EncoderConfig
    if onnx:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch.onnx needs it
except ImportError as error:
    requirements = os.path.join(ROOT, "requirements-extra.txt")
    sys.exit(f"error: {error.name} is not installed; pip install -r {requirements}")

CODE = copy_name(MODELING)  # the Python file of the classes below
AUTO_CLASSES = {
    "AutoConfig": "EncoderConfig",
    "AutoModel": "EncoderModel",
    "AutoModelForMaskedLM": "EncoderForMaskedLM",
    "AutoModelForSequenceClassification": "EncoderForSequenceClassification",
    "AutoModelForTokenClassification": "EncoderForTokenClassification",
    "AutoModelForQuestionAnswering": "EncoderForQuestionAnswering",
}
# A decoder has this class instead of the one for masks.
CAUSAL = {"AutoModelForCausalLM": "EncoderForCausalLM"}
INPUTS = ["input_ids", "attention_mask"]
if task_dir:
    INPUTS.append("token_type_ids")
LOCAL = dict(trust_remote_code=True, local_files_only=True)
# Largest difference in fp32, relative to the largest logit where that is above 1.
TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-4
# All files that an export may hold, beside the code that its config.json names. A folder with any
# other file is never replaced.
FILES = {
    "README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json",
    f"{CODE}.py", "sentence_bert_config.json", "model.safetensors", "model.onnx", "model.onnx.data",
}
# What finetune_glue.py has written into model.pt.
TASK_FIELDS = {"model_settings", "model", "head", "labels", "n_texts", "scale",
               "tokenizer_fingerprint"}
CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [concept-encoder]
---
# {name}

{what}. AutoModel and {auto}, AutoModelForSequenceClassification, -TokenClassification and
-QuestionAnswering load it too; the Python files hold the code.

| | |
|---|---|
{rows}

```python
from transformers import pipeline

{use}
```

Limits: padding, on either side, changes nothing if the attention_mask tells where it is. Names of
special tokens such as [MASK] or [SEP] in a text are read as these tokens. `trust_remote_code=True`
runs the Python files in this folder: read them first. AutoTokenizer needs it to put spaces between
words that are given one by one. The model can repeat sentences and errors of its training text.

Settings of the training run: `{settings}`
"""

SEARCH = """

# for search by late interaction: all concepts of a text, as many for a long text as for a short one
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)

def vectors(texts):  # -> (texts, concepts, width), of length 1
    return model.multi_vectors(
        **tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))

scores = (vectors(["a query"])[:, None] @ vectors(["one text", "another"]).mT).amax(-1).sum(-1)"""


# ---- the folder ----------------------------------------------------------------


def read_task(encoder, tok):
    """task_dir -> the Classifier with the fine-tuned weights, and its labels (none for a score).

    Raises ValueError where model.pt is missing, damaged, or not a fine-tuned copy of the encoder.
    """
    path = os.path.join(task_dir, "model.pt")
    if not os.path.isfile(path):
        raise ValueError(f"{task_dir} holds no model.pt; expected a folder that "
                         f"python finetune_glue.py --out_dir={out_dir} has written, such as "
                         f"{out_dir}/glue/mrpc")
    task = read_checkpoint(path)
    missing = TASK_FIELDS - set(task if isinstance(task, dict) else ())
    if missing:
        raise ValueError(f"{path} was not written by finetune_glue.py: it has no "
                         f"{', '.join(sorted(missing))}")
    try:
        model = classifier_of(task)
        # Fine-tuning keeps only some of the concepts, and has a dropout of its own.
        found, of_run = settings_of(model.encoder), settings_of(encoder)
        differing = {name for name in found | of_run if found.get(name) != of_run.get(name)}
        if differing - {"n_concept", "dropout"} or task["tokenizer_fingerprint"] != tok.fingerprint:
            raise ValueError(f"it was fine-tuned from another model or tokenizer than that of "
                             f"{out_dir}; give the --out_dir it was fine-tuned with")
        return model, task["labels"]
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
        # RuntimeError: model.py was edited after the fine-tuning; others: damaged by hand
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path} cannot be exported: {kind}{error}; or fine-tune again: python "
                         f"finetune_glue.py --out_dir={out_dir}") from None


def classifier_of(task):
    """What finetune_glue.py has saved -> Classifier in eval mode."""
    head = task["head"]
    encoder = build_model(task["model_settings"])
    # Older files do not say whether texts are aligned: with anchors alone they were.
    aligned = task.get("aligned", getattr(encoder.cfg, "anchored", False))
    model = Classifier(encoder, len(head["out.bias"]), task["n_texts"], aligned=aligned)
    weights = {f"encoder.{name}": t for name, t in task["model"].items()} | head
    # A score was learned in standard units; the exported model gives it as the data set has it.
    mean, spread = task["scale"]
    weights["out.weight"] = head["out.weight"] * spread
    weights["out.bias"] = head["out.bias"] * spread + mean
    model.load_state_dict(weights)
    return model.eval()


def pretrained_class(encoder):
    """The class of `transformers` for what the run was trained to do."""
    return "AutoModelForCausalLM" if is_causal(encoder) else "AutoModelForMaskedLM"


def hub_config(model, labels, encoder, tok):
    """-> config.json."""
    auto, classes = pretrained_class(encoder), AUTO_CLASSES
    if is_causal(encoder):
        classes = {name: kind for name, kind in classes.items() if name != "AutoModelForMaskedLM"}
        classes |= CAUSAL
    if task_dir:
        auto = "AutoModelForSequenceClassification"
    values = dict(
        model_type=EncoderConfig.model_type,
        model_settings=dict(arch=encoder.arch) | vars(encoder.cfg),
        architectures=[classes[auto]],
        dtype="float32",
        auto_map={auto: f"{CODE}.{name}" for auto, name in classes.items()})
    for role, i in special_ids(tok).items():
        values[f"{role}_token_id"] = i
    if task_dir:
        names = labels or ["score"]
        values |= dict(
            n_texts=model.n_texts, aligned=model.aligned,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type="single_label_classification" if labels else "regression")
    return values


def uses_transforms(encoder):
    return any(isinstance(module, (Resonance, Fourier)) for module in encoder.modules())


def write_folder(folder, model, labels, encoder, tok):
    """Writes all but the model card. model: the Classifier with its labels, or the encoder."""
    def write(name, value):
        write_json(os.path.join(folder, name), value)

    code = code_files(encoder)
    write("config.json", hub_config(model, labels, encoder, tok) | dict(code_files=sorted(code)))
    # An encoder is part of EncoderForMaskedLM; a Classifier's parts have their own names there.
    prefix = "" if task_dir else "encoder."
    weights = {}
    for name, t in model.state_dict().items():
        name = re.sub(r"\bwte$", "embeddings.weight", name)  # there the table is an nn.Embedding
        weights[prefix + name] = t.contiguous()
    # Not save_file: its files can be read by their owner only.
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(save(weights, metadata=dict(format="pt")))
    for name, text in code.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
    write_tokenizer(folder, tok, encoder.cfg.longest, INPUTS, is_causal(encoder))
    if not task_dir:  # for sentence_transformers: the embedding of a text is pooler_output
        module = "sentence_transformers.models.Transformer"
        write("modules.json", [dict(idx=0, name="0", path="", type=module)])
        text = dict(method="forward", method_output_name="pooler_output")
        write("sentence_bert_config.json", dict(
            transformer_task="feature-extraction", module_output_name="sentence_embedding",
            modality_config=dict(text=text)))


# ---- the check -----------------------------------------------------------------


def sample_texts(folder, tok):
    """Lines of the README and of the folder's code, odd Unicode, every entry of the vocabulary.

    Without the names of special ids: these the exported tokenizer reads in another way.
    """
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as readme:
        texts = list(readme)
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                texts += file.read().splitlines()
    texts += ["x" * 2500, " " * 2500 + "!", "a\t\r\n b\x85\0",
              "don\u2019t I'M 3.14 123456 \u65e5\u672c \ud55c\uad6d \u0645 e\u0301\u0301 "
              "\U0001f469\u200d\U0001f467"]
    order = np.random.default_rng(0).permutation(np.flatnonzero(~tok.is_special))
    texts += [tok.decode(order[i:i + 50]) for i in range(0, len(order), 50)]
    names = re.compile("|".join(map(re.escape, tok.specials)))
    parts = [part for text in texts for part in names.split(text) if part.strip()]
    return list(dict.fromkeys(parts))  # sources repeat many lines, the license above all


def check_tokenizer(folder, encoder, tok):
    """Compares the ids of texts with and without masks. -> how many texts.

    With task_dir: of texts and of pairs, cut to the longest row of the model. Raises ValueError
    with the first text whose ids differ.
    """
    hub = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
    texts = sample_texts(folder, tok)
    if task_dir:
        wanted, found = [], []
        # Pairs show what is put around texts and where they are cut: some are enough.
        pairs = [texts[::4], texts[2::4]]
        for columns in ([texts], pairs):
            rows, kinds, _ = encode_texts(list(zip(*columns)), tok, encoder.cfg.longest)
            wanted += [(row.tolist(), kind.tolist()) for row, kind in zip(rows, kinds)]
            batch = hub(*(column[:len(rows)] for column in columns), truncation=True)
            found += zip(batch["input_ids"], batch["token_type_ids"])
        texts += pairs[0]
    else:
        ends = [] if is_causal(encoder) else [tok.eot_id]
        wanted = [[tok.eot_id, *ids.tolist(), *ends] for ids in tok.encode(texts)]
        masked = [] if is_causal(encoder) else [
            f"{a} [MASK]{b}\n[MASK]  [MASK] [MASK]" for a, b in zip(texts[::7], texts[3::7])]
        wanted += [encode_masked(text, tok) for text in masked]
        texts += masked
        found = hub(texts)["input_ids"]
    for text, a, b in zip(texts, wanted, found):
        if a != b:
            raise ValueError(f"the exported tokenizer differs from {tok.name} on {text[:60]!r}")
    return len(found)


def sample_rows(encoder, tok):
    """Rows of several lengths, with masks and marks between documents. -> their ids and types."""
    rng = np.random.default_rng(0)
    ordinary = np.flatnonzero(~tok.is_special)
    longest = min(encoder.cfg.longest, 128)
    rows = [rng.choice(ordinary, n) for n in (longest, longest // 3 + 1, min(longest, 7), 1)]
    for row in rows:
        row[rng.random(len(row)) < 0.15] = tok.mask_id
        row[len(row) // 2] = tok.eot_id
        row[0] = tok.cls_id if task_dir else tok.eot_id
    places = [np.arange(len(row)) for row in rows]
    # token types: 0 for the first token, then 1 for the first text and 2 for the second
    return rows, [np.minimum(place, 1) + (place > 5) for place in places]


def answers(model, encoder, row, kind):
    """What the repository's model says to one row (T,) alone.

    -> {"logits": (T,V), "embeddings": (D,)}, or of a classifier {"logits": (n_out,)}.
    """
    ids, kinds = torch.from_numpy(row)[None], torch.from_numpy(kind)[None]
    real = torch.ones_like(ids, dtype=torch.bool)
    if task_dir:
        return dict(logits=model(ids, kinds, real)[0])
    concepts, tokens = encoder.encode(ids, real)
    positions = torch.arange(ids.shape[1])[None]
    states = encoder.decode(concepts, tokens, positions, encoder.documents(ids, real), real)
    if encoder.arch == "concept":
        embedding = encoder.pooled(concepts, ids)
    else:
        embedding = tokens.mean(1)
    return dict(logits=encoder.logits(states)[0], embeddings=embedding[0])


def compare(what, run, batch, wanted, tolerance):
    """Runs each row of a batch alone, and all rows padded to the longest.

    wanted: the answer to each row. -> {what: largest difference, the same for "padded"}. Raises
    ValueError for a difference above the tolerance.
    """
    lengths = batch[1].sum(1)  # attention_mask
    together = run(*batch)[-1]
    gaps = {what: 0.0, f"padded {what}": 0.0}
    for i, want in enumerate(wanted):
        alone = run(*(part[i:i + 1, :lengths[i]] for part in batch))[-1][0]
        most = tolerance * max(1, want.abs().max().item())
        for name, t in ((what, alone), (f"padded {what}", together[i][:len(want)])):
            gap = (t - want).abs().max().item()
            if not gap <= most:  # also true of NaN
                raise ValueError(f"{name} differ from the run's by {gap:.2g}, more than {most:.2g}")
            gaps[name] = max(gap, gaps[name])
    return gaps


@torch.inference_mode()
def check_model(folder, model, encoder, tok):
    """Compares the folder's model, and model.onnx, with the repository's.

    -> {what was compared: largest difference}. With --onnx, this also writes model.onnx.
    """
    rows, kinds = sample_rows(encoder, tok)
    wanted = [answers(model, encoder, row, kind) for row, kind in zip(rows, kinds)]
    ids, kinds, real = padded(rows, kinds, tok.pad_id)
    batch = (ids, real.long(), kinds)
    if task_dir:
        classes = {"logits": "AutoModelForSequenceClassification"}
    else:
        classes = {"logits": pretrained_class(encoder), "embeddings": "AutoModel"}
    found = {}
    for what, auto in classes.items():
        want = [answer[what] for answer in wanted]
        hub, report = getattr(transformers, auto).from_pretrained(
            folder, output_loading_info=True, **LOCAL)
        if any(report.values()):
            raise ValueError(f"transformers did not find the weights it expected: {report}")
        found |= compare(what, hub, batch, want, TOLERANCE)
        if onnx and what == "logits":
            path = os.path.join(folder, "model.onnx")
            run = write_onnx(path, hub, encoder.cfg.longest, INPUTS)
            found |= compare("onnx logits", run, batch, want, ONNX_TOLERANCE)
    return found


# ---- the model card ------------------------------------------------------------


@contextlib.contextmanager
def file_of_run(name, remedy):
    """Yields what a JSON file of the run holds, {} where it is missing.

    Whatever goes wrong with its content becomes a ValueError that names the file and the remedy.
    """
    path = os.path.join(run_folder(out_dir), name)
    try:
        found = {}
        if os.path.exists(path):
            found = read_json(path)
        yield found
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); remove it{remedy}, "
                         "then export again") from None


def nats(loss):
    return "unknown" if loss is None or not math.isfinite(loss) else f"{loss:.4f} nats"


def facts(model, encoder, checkpoint, tok):
    """Where the model comes from, as rows of a table: {title: text}."""
    with file_of_run("config.json", "; the model card then does not name the code") as made_by:
        code = f"git {made_by.get('git') or 'unknown'}, torch {made_by.get('torch') or 'unknown'}"
    entropies = [record["unigram_entropy"] for record in read_log(run_folder(out_dir))
                 if isinstance(record, dict) and record.get("unigram_entropy")]
    entropy = "unknown"
    if entropies:
        entropy = f"{entropies[-1]:.4f} nats, the loss without any context"
    n_params = sum(p.numel() for p in model.parameters())
    return {
        "architecture": f"{encoder.arch} {getattr(encoder.cfg, 'bottleneck', '')}",
        "parameters": f"{n_params:,}",
        "pretraining": f"{checkpoint['tokens']:,} tokens in {checkpoint['step']:,} steps",
        "best validation loss": f"{nats(checkpoint['best_loss'])} a "
                                f"{'token' if is_causal(encoder) else 'masked token'}",
        "unigram entropy": entropy,
        "longest row": f"{encoder.cfg.longest:,} tokens of {tok.name}, {tok.n_vocab:,} ids",
        "code": code,
    }


def measurements(checkpoint):
    """What eval.py and finetune_glue.py have measured of these weights, as rows of a table."""
    rows = {}
    remedy = f" or measure again: python tools/eval.py --out_dir={out_dir}"
    with file_of_run("eval.json", remedy) as measured:
        if measured.get("step", checkpoint["step"]) != checkpoint["step"]:
            measured = {}  # of the same run, before it trained on
        share, n_rows = measured.get("mlm_probability"), measured.get("rows", {})
        for data, results in measured.get("data", {}).items():
            for masks in KINDS:
                if results.get(masks):
                    loss, accuracy = results[masks]["loss"], results[masks]["accuracy"]
                    kind = "next tokens" if masks == "clm" else f"{masks} masks"
                    title = f"{kind}, {os.path.basename(data)}"
                    if share and masks not in ("clm", "diffusion"):
                        title += f", {share:.0%} hidden"
                    if data in n_rows:
                        title += f", {n_rows[data]:,} rows"
                    rows[title] = f"{nats(loss)}, accuracy {accuracy:.1%}"
    remedy = f" or fine-tune again: python finetune_glue.py --out_dir={out_dir}"
    with file_of_run("glue.json", remedy) as tasks:
        for task, r in tasks.items():
            if r.get("tokens", checkpoint["tokens"]) != checkpoint["tokens"]:
                continue  # of other weights
            for metric, middle in r["median"].items():
                rows[f"{task}, {metric}"] = (
                    f"{middle:.4f} [{r['min'][metric]:.4f}, {r['max'][metric]:.4f}], median of "
                    f"{len(r['runs'])} seeds; majority answer {r['majority'][metric]:.4f}")
    return rows


def card(model, encoder, checkpoint, tok, n_texts, found):
    """-> README.md: the model's origin, measurements, how to load it, and its limits."""
    name = push or os.path.basename(os.path.abspath(to))
    same = f"ids of {n_texts:,} texts"
    for what, gap in found.items():
        same += f", {what} to {gap:.1g}"
    rows = facts(model, encoder, checkpoint, tok) | {"equal to the run": same} | measurements(
        checkpoint)
    if task_dir:
        task = "text-classification"
        what = f"Fine-tuned on {os.path.basename(os.path.abspath(task_dir))}"
        text = '"one text"'
        if model.n_texts == 2:
            text = 'dict(text="one text", text_pair="and the second of a pair")'
            what += (". Scores of tasks in which the order of two texts has no meaning (MRPC, "
                     "STS-B, QQP) are of the mean answer to both orders, within the task's limits; "
                     "this model answers the order it is given")
        use = f"""classify = pipeline("text-classification", "{name}", trust_remote_code=True)
print(classify({text}))"""
    elif is_causal(encoder):
        task, what = "text-generation", "A language model that predicts every next token"
        use = f"""write = pipeline("text-generation", "{name}", trust_remote_code=True)
print(write("Once upon a time", max_new_tokens=40, do_sample=True))"""
    else:
        task, what = "fill-mask", "A masked language model"
        pooled, search = "mean over the tokens", ""
        if encoder.arch == "concept":
            kind = "mean" if encoder.cfg.bottleneck == "strict" else "maximum"
            pooled, search = f"{kind} over the concepts", SEARCH.format(name=name)
        use = f"""fill = pipeline("fill-mask", "{name}", trust_remote_code=True)
print(fill("The capital of France is [MASK]."))

# the {pooled}; last_hidden_state of AutoModel has all of them
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{name}", trust_remote_code=True)
print(model.encode(["one text", "another"]))""" + search
    # Settings that are paths stay out: they tell about this machine and help nobody elsewhere.
    settings = {k: v for k, v in checkpoint["settings"].items() if os.sep not in str(v)}
    lines = "\n".join(f"| {title} | {text} |" for title, text in rows.items())
    return CARD.format(name=name, task=task, what=what, use=use, auto=pretrained_class(encoder),
                       settings=json.dumps(settings), rows=lines)


# ---- export ----------------------------------------------------------------------


def is_earlier_export(folder):
    """Whether a folder holds files of an export and nothing else."""
    files = files_of_export(folder)
    return bool(files) and set(os.listdir(folder)) <= files


def files_of_export(folder):
    """Names of the files that an export to this folder has written or may have; none: no export."""
    try:
        found = read_json(os.path.join(folder, "config.json"))
        # A model that transformers has saved again may be fine-tuned: it is no export any more.
        if found["model_type"] != EncoderConfig.model_type or "transformers_version" in found:
            return set()
        return FILES | set(found.get("code_files", []))
    except (OSError, ValueError, LookupError, TypeError):  # missing, damaged, or of something else
        return set()


def check_target(folder):
    """Raises ValueError unless `folder` (a real path) is missing, empty or an earlier export."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--to={to} is a file; give a folder")
    if os.path.isdir(folder) and os.listdir(folder) and not is_earlier_export(folder):
        raise ValueError(f"--to={to} is not empty and not an earlier export; give another folder")


def check_settings(folder):
    """Raises ValueError for what would fail only after the work is done."""
    if not to.strip():
        raise ValueError(f"--to={to!r} is empty; give a folder, as --to=export/my_model")
    check_target(folder)
    if push and push.count("/") != 1 or private and not push:
        raise ValueError(f"--push={push!r} --private={private}: expected --push=USER/REPO")
    if push and not huggingface_hub.get_token():
        raise ValueError("--push needs a token with write access: set HF_TOKEN, or run "
                         "hf auth login")


def export(folder, model, labels, encoder, tok, checkpoint):
    """Writes and checks a folder under a temporary name, then renames it.

    An earlier export is replaced only by one that was checked. -> number of texts whose ids are
    the same, {what was compared: largest difference}.
    """
    new, old = f"{folder}.{os.getpid()}.tmp", f"{folder}.{os.getpid()}.old.tmp"
    # The libraries' warnings and progress bars say nothing about the export; errors are reported.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    os.makedirs(new)
    try:
        write_folder(new, model, labels, encoder, tok)
        n_texts = check_tokenizer(new, encoder, tok)
        found = check_model(new, model, encoder, tok)
        with open(os.path.join(new, "README.md"), "w", encoding="utf-8") as file:
            file.write(card(model, encoder, checkpoint, tok, n_texts, found))
        if os.path.exists(folder):
            os.rename(folder, old)
        # Somebody may have put a file into the folder since it was checked at the start.
        if os.path.exists(old):
            check_target(old)
        os.rename(new, folder)
        remove_export(old)
        return n_texts, found
    finally:
        if os.path.exists(old) and not os.path.exists(folder):
            os.rename(old, folder)
        shutil.rmtree(new, ignore_errors=True)
        logging.disable(logging.NOTSET)


def remove_export(folder):
    """Removes the files of an export and its folder, but no file of another name."""
    for name in files_of_export(folder):
        remove_file(os.path.join(folder, name))
    with contextlib.suppress(OSError):  # there is none, or it holds something else
        os.rmdir(folder)


def upload(folder):
    """Pushes the folder that was checked. -> address of the repository on the hub."""
    api = huggingface_hub.HfApi()
    address = api.create_repo(push, private=private, exist_ok=True)
    api.upload_folder(repo_id=push, folder_path=folder, commit_message="Export",
                      delete_patterns=[*sorted(FILES), "concept_encoders_*.py"])
    return str(address)


def main():
    # The real path is what is checked, renamed and replaced: "missing/../notes" is the folder
    # notes, and a link stands for the folder it points to.
    folder = os.path.realpath(to)
    with user_mistakes():
        check_settings(folder)
        encoder, tok, loaded = load_run(out_dir, "cpu", checkpoint)
        model, labels = encoder, None
        if task_dir:
            model, labels = read_task(encoder, tok)
            encoder = model.encoder
        if getattr(encoder.cfg, "mixer", "") == "fnet":
            raise ValueError(f"{out_dir}: mixer=fnet reads padding as if it were text, and an "
                             "exported model gets padded rows; train one with mixer=resonance")
        if onnx and uses_transforms(encoder):
            raise ValueError(f"{out_dir} mixes tokens by Fourier transforms, for which "
                             "onnxruntime has no complex numbers; leave out --onnx")
        # They end in the model card. What is wrong with the files is said before the work.
        facts(model, encoder, loaded, tok), measurements(loaded)
    try:
        with user_mistakes():
            n_texts, found = export(folder, model, labels, encoder, tok, loaded)
    except Exception as error:  # transformers, safetensors and onnx each raise their own
        sys.exit("error: the export does not work, nothing was written: "
                 f"{type(error).__name__}: {error}")
    gaps = ", ".join(f"{what} {gap:.1g}" for what, gap in found.items())
    print(f"{folder}: {', '.join(sorted(os.listdir(folder)))}\n"
          f"same ids for {n_texts:,} texts; largest differences: {gaps}")
    result = dict(to=folder, arch=encoder.arch, texts=n_texts, differences=found)
    if push:
        try:
            result["pushed"] = upload(folder)
        except Exception as error:  # of the network, of the hub, or of its library
            sys.exit(f"error: {folder} is written and checked, but not pushed to {push}: "
                     f"{type(error).__name__}: {error}\n"
                     "check the network, the name and the token's rights; the same command tries "
                     "again")
    print_result(result)


if __name__ == "__main__":
    main()
