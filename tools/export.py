"""A training run as a folder that `transformers`, its pipelines and `sentence_transformers` load.

    python tools/export.py --out_dir=out/demo --to=exported
    python tools/export.py --out_dir=out/demo --to=exported --task_dir=out/demo/glue/mrpc     what finetune_glue.py has made
    python tools/export.py --out_dir=out/demo --to=exported --onnx=1 --push=USER/REPO --private=1

The folder holds config.json, model.safetensors, the tokenizer, a model card and one Python file: this repository's own
sources, so nothing is translated. Before it appears it is loaded again and compared with the run: ids of texts, logits
of padded, masked and single rows. A difference is an error and leaves nothing behind. Seconds, with onnx half a minute;
needs requirements-extra.txt.
"""

# ---- settings ---------------------------------------------------------------
out_dir = "out/run"  # a training run: best.pt (else ckpt.pt) and tokenizer/
to = "exported"  # folder to write; an earlier export there is replaced, anything else is left alone
task_dir = ""  # folder with a fine-tuned model.pt, such as out/demo/glue/mrpc; empty: the pretrained model
onnx = 0  # 1: also model.onnx, for any number and length of rows
push = ""  # USER/REPO on the Hugging Face Hub; the token is taken from HF_TOKEN or `hf auth login`
private = 0  # 1: a repository that --push makes is private
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
import re
import shutil
import tempfile
import warnings

import numpy as np
import torch

from lib.files import write_json
from lib.heads import Classifier, encode_texts, padded
from lib.run import build_model, load_run, read_checkpoint, read_log, user_mistakes
from masking import MASKING_TYPES

code_copies = tempfile.TemporaryDirectory()  # transformers runs code from a copy
os.environ.setdefault("HF_MODULES_CACHE", code_copies.name)
try:
    import huggingface_hub
    import transformers
    from safetensors.torch import save_file

    from tools.hub_model import EncoderConfig, hub_tokenizer, modeling_source, write_onnx
    if onnx:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch.onnx needs it
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed; pip install -r {os.path.join(ROOT, 'requirements-extra.txt')}")

CODE = "modeling_concept_encoders"
AUTO = dict(AutoConfig="EncoderConfig", AutoModel="EncoderModel", AutoModelForMaskedLM="EncoderForMaskedLM",
            AutoModelForSequenceClassification="EncoderForSequenceClassification")
INPUTS = ["input_ids", "attention_mask"] + ["token_type_ids"] * bool(task_dir)
LOCAL = dict(trust_remote_code=True, local_files_only=True)
TOLERANCE, ONNX_TOLERANCE = 1e-5, 1e-4  # largest difference in fp32; times the largest logit where that is above 1
FILES = {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", f"{CODE}.py",
         "sentence_bert_config.json", "model.safetensors", "model.onnx", "model.onnx.data"}
CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [concept-encoder, masked-language-modeling]
---
# {name}

{what}. AutoModel, AutoModelForMaskedLM and AutoModelForSequenceClassification load it too; {code}.py holds the code.

| | |
|---|---|
{rows}

```python
from transformers import pipeline

{use}
```

Limits: padding goes to the right, where the tokenizer puts it, and changes nothing. Names of special tokens such as
[MASK] or [SEP] in a text are read as these tokens. `trust_remote_code=True` runs the Python file in this folder: read
it first. What the model has learned, and whose words it repeats, is up to its training text.

Settings of the training run: `{settings}`
"""


# ---- the folder ----------------------------------------------------------------

def read_task(encoder, tok):
    """task_dir -> (the repository's Classifier with the fine-tuned weights, its labels; none for a score)."""
    path = os.path.join(task_dir, "model.pt")
    if not os.path.isfile(path):
        raise ValueError(f"{task_dir} holds no model.pt; expected a folder that python finetune_glue.py "
                         f"--out_dir={out_dir} has written, such as {out_dir}/glue/mrpc")
    task = read_checkpoint(path)
    lacks = {"model_settings", "model", "head", "labels", "n_texts", "scale"} - set(task)
    if lacks:
        raise ValueError(f"{path} was not written by finetune_glue.py: it has no {', '.join(sorted(lacks))}")
    settings = dict(arch=encoder.arch) | vars(encoder.cfg) | dict(dropout=0.0)
    if encoder.arch == "concept":  # of which fine-tuning keeps a part
        settings["n_concept"] = task["model_settings"].get("n_concept")
    same = task["model_settings"] == settings
    if not same or task["tokenizer_fingerprint"] != tok.fingerprint:
        raise ValueError(f"{path} was fine-tuned from another model or tokenizer than that of {out_dir}; "
                         "give the --out_dir it was fine-tuned with")
    head = task["head"]
    model = Classifier(build_model(settings), len(head["out.bias"]), task["n_texts"])
    mean, spread = task["scale"]  # a score as the data set has it
    weights = {f"encoder.{name}": t for name, t in task["model"].items()} | head | {
        "out.weight": head["out.weight"] * spread, "out.bias": head["out.bias"] * spread + mean}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # people edit model.py
        raise ValueError(f"{path} was written with another model.py: {error}") from None
    return model.eval(), task["labels"]


def write_folder(folder, model, labels, encoder, tok):
    """All but the model card. model: the Classifier with its labels, or the encoder itself."""
    def write(name, value):
        write_json(os.path.join(folder, f"{name}.json"), value)

    ids = dict(pad=tok.pad_id, mask=tok.mask_id, cls=tok.cls_id, sep=tok.sep_id, bos=tok.eot_id, eos=tok.eot_id)
    described = dict(
        model_type=EncoderConfig.model_type, model_settings=dict(arch=encoder.arch) | vars(encoder.cfg),
        architectures=[AUTO["AutoModelForSequenceClassification" if task_dir else "AutoModelForMaskedLM"]],
        dtype="float32", auto_map={auto: f"{CODE}.{name}" for auto, name in AUTO.items()},
        **{f"{role}_token_id": i for role, i in ids.items()})
    if task_dir:
        described |= dict(n_texts=model.n_texts, id2label=dict(enumerate(labels or ["score"])),
                          label2id={name: i for i, name in enumerate(labels or ["score"])},
                          problem_type="single_label_classification" if labels else "regression")
    else:  # to sentence_transformers the embedding is what the model calls pooler_output
        write("modules", [dict(idx=0, name="0", path="", type="sentence_transformers.models.Transformer")])
        write("sentence_bert_config", dict(
            transformer_task="feature-extraction", module_output_name="sentence_embedding",
            modality_config=dict(text=dict(method="forward", method_output_name="pooler_output"))))
    write("config", described)
    weights = {("" if task_dir else "encoder.") + name: t.clone() for name, t in model.state_dict().items()}
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata=dict(format="pt"))
    with open(os.path.join(folder, f"{CODE}.py"), "w", encoding="utf-8") as file:
        file.write(modeling_source(encoder.arch))
    hub_tokenizer(tok, bool(task_dir)).save(os.path.join(folder, "tokenizer.json"))
    write("tokenizer_config", {f"{role}_token": tok.special_names[i] for role, i in ids.items()} | dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=encoder.cfg.longest, padding_side="right",
        model_input_names=INPUTS, clean_up_tokenization_spaces=False))


# ---- the check -----------------------------------------------------------------

def sample_texts(tok):
    """Prose and sources of this repository, odd Unicode, every entry of the vocabulary; no names of special ids."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as readme:
        texts = [*readme, *modeling_source("concept").splitlines(), "x" * 2500, " " * 2500 + "!", "a\t\r\n b\x85\0",
                 "don\u2019t I'M 3.14 123456 \u65e5\u672c \ud55c\uad6d \u0645 e\u0301\u0301 \U0001f469\u200d\U0001f467"]
    order = np.random.default_rng(0).permutation(np.flatnonzero(~tok.is_special))
    texts += [tok.decode(part) for part in np.array_split(order, -(-len(order) // 50))]
    names = re.compile("|".join(map(re.escape, tok.specials)))
    return [part for text in texts for part in names.split(text) if part.strip()]


def ids_with_masks(text, tok):
    """Ids of a text with [MASK] between end-of-document marks, as sample.py makes them."""
    pieces = text.split("[MASK]")
    pieces[:-1] = [piece.removesuffix(" ") if tok.name != "byte" else piece for piece in pieces[:-1]]
    first, *others = (ids.tolist() for ids in tok.encode(pieces))
    return [tok.eot_id, *first, *(i for ids in others for i in (tok.mask_id, *ids)), tok.eot_id]


def check_tokenizer(folder, tok, longest):
    """Compares ids of texts with and without masks, or of texts and pairs cut to what the model reads -> how many."""
    hub, texts = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL), sample_texts(tok)
    if task_dir:
        wanted, found = [], []
        for case in ([(text,) for text in texts], list(zip(texts, texts[7:]))):
            wanted += [(row.tolist(), kinds.tolist()) for row, kinds in zip(*encode_texts(case, tok, longest)[:2])]
            batch = hub(*map(list, zip(*case)), truncation=True)
            found += zip(batch["input_ids"], batch["token_type_ids"])
        texts += texts
    else:
        texts += [f"{a} [MASK]{b}\n[MASK]  [MASK] [MASK]" for a, b in zip(texts[::7], texts[3::7])]
        wanted, found = [ids_with_masks(text, tok) for text in texts], hub(texts)["input_ids"]
    for text, a, b in zip(texts, wanted, found):
        if a != b:
            raise ValueError(f"the exported tokenizer differs from {tok.name} on {text[:60]!r}")
    return len(found)


def answer(model, encoder, ids, kinds):
    """The repository's model on one row (T,) alone -> [logits (T,V), embedding (D,)], or [logits (n_out,)]."""
    ids, kinds, real = torch.from_numpy(ids)[None], torch.from_numpy(kinds)[None], torch.ones(1, len(ids)).bool()
    if task_dir:
        return [model(ids, kinds, real)[0]]
    concepts, tokens = encoder.encode(ids, real)
    states = encoder.decode(concepts, tokens, torch.arange(ids.shape[1])[None], encoder.documents(ids), real)
    return [encoder.logits(states)[0], (concepts.amax(1) if encoder.arch == "concept" else tokens.mean(1))[0]]


@torch.inference_mode()
def check_model(folder, model, encoder, tok):
    """The folder's model, and its model.onnx, against the repository's -> largest differences by what was compared.

    Rows of several lengths with masks and marks between documents: each alone, and all padded to the longest.
    """
    rng, ordinary, longest = np.random.default_rng(0), np.flatnonzero(~tok.is_special), min(encoder.cfg.longest, 128)
    rows = [rng.choice(ordinary, n) for n in (longest, longest // 3 + 1, min(longest, 7), 1)]
    for row in rows:
        row[rng.random(len(row)) < 0.15], row[len(row) // 2] = tok.mask_id, tok.eot_id
        row[0] = tok.cls_id if task_dir else tok.eot_id
    kinds = [np.minimum(np.arange(len(row)), 1) + (np.arange(len(row)) > 5) for row in rows]
    wanted, found = list(zip(*(answer(model, encoder, *row) for row in zip(rows, kinds)))), {}
    ids, kinds, real = padded(rows, kinds, tok.pad_id)
    batch = ids, real.long(), kinds

    def compare(what, run, wanted, limit):
        together = run(*batch)[-1]
        for i, want in enumerate(wanted):
            alone = run(*(part[i:i + 1, :len(rows[i])] for part in batch))[-1][0]
            most = limit * max(1, want.abs().max().item())
            for name, t in ((what, alone), (f"padded {what}", together[i][:len(want)])):
                gap = (t - want).abs().max().item()
                if not gap <= most:  # a NaN is not
                    raise ValueError(f"{name} differ from the run's by {gap:.2g}, more than {most:.2g}")
                found[name] = max(gap, found.get(name, 0.0))

    for auto, part in zip(("SequenceClassification",) if task_dir else ("MaskedLM", ""), wanted):
        hub, report = getattr(transformers, f"AutoModel{auto and 'For'}{auto}").from_pretrained(
            folder, output_loading_info=True, **LOCAL)
        if any(report.values()):
            raise ValueError(f"transformers did not find the weights it expected: {report}")
        compare("logits" if auto else "embeddings", hub, part, TOLERANCE)
        if onnx and auto:
            run = write_onnx(os.path.join(folder, "model.onnx"), hub, encoder.cfg.longest, INPUTS)
            compare("onnx logits", run, part, ONNX_TOLERANCE)
    return found


# ---- the model card ------------------------------------------------------------

def card(model, encoder, checkpoint, tok, n_texts, found):
    """-> README.md: where the model comes from, what was measured, how to load it, what it cannot do."""
    files = {}
    for name in ("config", "eval", "glue"):
        with contextlib.suppress(FileNotFoundError), open(f"{out_dir}/{name}.json", encoding="utf-8") as file:
            files[name] = json.load(file)
    run, name = files.get("config", {}), push or os.path.basename(os.path.abspath(to))
    entropy = [record["unigram_entropy"] for record in read_log(out_dir) if "unigram_entropy" in record]
    rows = {"architecture": f"{encoder.arch} {getattr(encoder.cfg, 'bottleneck', '')}",
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "pretraining": f"{checkpoint['tokens']:,} tokens in {checkpoint['step']:,} steps",
            "best validation loss": f"{checkpoint['best_loss']:.4f} nats a masked token",
            "unigram entropy": f"{entropy[-1]:.4f} nats, the loss without any context" if entropy else "unknown",
            "longest row": f"{encoder.cfg.longest:,} tokens of {tok.name}, {tok.n_vocab:,} ids",
            "code": f"git {run.get('git') or 'unknown'}, torch {run.get('torch', 'unknown')}",
            "equal to the run": f"ids of {n_texts:,} texts" + "".join(f", {k} to {v:.1g}" for k, v in found.items())}
    for data, results in files.get("eval", {}).get("data", {}).items():
        for masks in filter(results.get, MASKING_TYPES):
            loss, accuracy = results[masks]["loss"], results[masks]["accuracy"]
            rows[f"{masks} masks, {os.path.basename(data)}"] = f"{loss:.4f} nats, accuracy {accuracy:.1%}"
    for task, r in files.get("glue", {}).items():
        for metric, middle in r["median"].items():
            rows[f"{task}, {metric}"] = (f"{middle:.4f} [{r['min'][metric]:.4f}, {r['max'][metric]:.4f}], median of "
                                         f"{len(r['runs'])} seeds; majority answer {r['majority'][metric]:.4f}")
    if task_dir:
        task, what = "text-classification", f"Fine-tuned on {os.path.basename(os.path.abspath(task_dir))}"
        use = f"""classify = pipeline("text-classification", "{name}", trust_remote_code=True)
print(classify(dict(text="one text", text_pair="and the second of a pair")))"""
    else:
        pooled = "maximum over the concepts" if encoder.arch == "concept" else "mean over the tokens"
        task, what = "fill-mask", "A masked language model"
        use = f"""fill = pipeline("fill-mask", "{name}", trust_remote_code=True)
print(fill("The capital of France is [MASK]."))

from sentence_transformers import SentenceTransformer  # the {pooled}, last_hidden_state has all
print(SentenceTransformer("{name}", trust_remote_code=True).encode(["one text", "another"]))"""
    settings = {k: v for k, v in checkpoint["settings"].items() if os.sep not in str(v)}  # no paths of this machine
    return CARD.format(name=name, task=task, what=what, use=use, code=CODE, settings=json.dumps(settings),
                       rows="\n".join(f"| {k} | {v} |" for k, v in rows.items()))


# ---- export ----------------------------------------------------------------------

def check_settings():
    """Raises for what would fail only after the work is done."""
    if os.path.exists(to) and not os.path.isdir(to):
        raise ValueError(f"--to={to} is a file; give a folder")
    there = os.listdir(to) if os.path.exists(to) else []
    if there and (set(there) - FILES or "config.json" not in there or EncoderConfig.model_type not in open(
            os.path.join(to, "config.json")).read()):
        raise ValueError(f"--to={to} is not empty and not an earlier export; give another folder")
    if push and push.count("/") != 1 or private and not push:
        raise ValueError(f"--push={push!r} --private={private}: expected --push=USER/REPO")
    if push and not huggingface_hub.get_token():
        raise ValueError("--push needs a token with write access: set HF_TOKEN, or run hf auth login")


def upload():
    """The folder as it was checked -> address of the repository on the hub."""
    api = huggingface_hub.HfApi()
    address = api.create_repo(push, private=bool(private), exist_ok=True)
    api.upload_folder(repo_id=push, folder_path=to, delete_patterns=sorted(FILES), commit_message="Export")
    return str(address)


with user_mistakes():
    check_settings()
    encoder, tok, checkpoint = load_run(out_dir, "cpu")
    model, labels = encoder, None
    if task_dir:
        model, labels = read_task(encoder, tok)
        encoder = model.encoder
to = os.path.abspath(to)
new, old = f"{to}.{os.getpid()}.tmp", f"{to}.{os.getpid()}.old.tmp"
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
transformers.utils.logging.disable_progress_bar()
try:
    with user_mistakes():
        os.makedirs(new)
        write_folder(new, model, labels, encoder, tok)
        n_texts, found = check_tokenizer(new, tok, encoder.cfg.longest), check_model(new, model, encoder, tok)
        with open(os.path.join(new, "README.md"), "w", encoding="utf-8") as file:
            file.write(card(model, encoder, checkpoint, tok, n_texts, found))
        if os.path.exists(to):
            os.rename(to, old)
        os.rename(new, to)
except Exception as error:  # transformers, safetensors and onnx each have their own words for what does not load
    sys.exit(f"error: the export does not work, nothing was written: {type(error).__name__}: {error}")
finally:
    if os.path.exists(old) and not os.path.exists(to):
        os.rename(old, to)
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    logging.disable(logging.NOTSET)
print(f"{to}: {', '.join(sorted(os.listdir(to)))}\nsame ids for {n_texts:,} texts; largest differences: "
      + ", ".join(f"{what} {gap:.1g}" for what, gap in found.items()))
result = dict(to=to, arch=encoder.arch, texts=n_texts, differences=found)
if push:
    try:
        result["pushed"] = upload()
    except Exception as error:  # of the network, of the hub, of the library between
        sys.exit(f"error: {to} is written and checked, but not pushed to {push}: {type(error).__name__}: {error}\n"
                 "check the network, the name and the token's rights; the same command tries again")
print(json.dumps(result))
