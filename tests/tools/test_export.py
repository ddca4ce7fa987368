"""tools/export.py: an exported run gives the ids and logits of the repository, in other libraries.

On the CPU, without network, with tiny models of random weights.
"""

import ast
import gc
import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, call, refused, result, run_script

from data.tokenizer import Tokenizer, with_specials
from lib.heads import Classifier, encode_texts, keep_concepts, padded, predict
from lib.run import build_model, model_state, save_checkpoint

sys.path.append(str(ROOT / "tests/data"))  # pytest adds only the folder of this file
from test_tokenizer import ODD, needs_gpt2, random_texts, read_texts

transformers = pytest.importorskip("transformers")
from tools import hub_files

LOCAL = dict(trust_remote_code=True, local_files_only=True)
SHAPE = dict(block_size=48, n_layer=2, n_head=4, token_dim=64, ffn_dim=64)
CONCEPT = dict(arch="concept", n_concept=8, concept_dim=64) | SHAPE
TRANSFORMER = dict(arch="transformer") | SHAPE
KINDS = {
    "open": CONCEPT,
    "strict": CONCEPT | dict(bottleneck="strict", bias=True, concept_dim=96),
    "sinusoidal": CONCEPT | dict(position="sinusoidal", max_length=96, hide_masked=True,
                                 n_concept=7),
    "narrow table": CONCEPT | dict(token_dim=4, n_mixer=1, n_decoder=2, self_attention=True),
    "isolated": CONCEPT | dict(isolate_documents=True),
    "transformer": TRANSFORMER | dict(bias=True),
    "mixers": TRANSFORMER | dict(n_layer=0),
    "registers": TRANSFORMER | dict(n_register=64),
    "isolated transformer": TRANSFORMER | dict(isolate_documents=True),
}


@pytest.fixture(scope="module", autouse=True)
def code_copies(tmp_path_factory):
    """Keeps the code that transformers copies out of the user's cache."""
    # call() collects garbage each time. Freezing what the libraries hold makes that fast.
    gc.freeze()
    folder = str(tmp_path_factory.mktemp("code"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        yield folder
    gc.unfreeze()


@pytest.fixture(scope="module")
def bpe():
    texts = [(ROOT / name).read_text() for name in ("README.md", "model.py")]
    return Tokenizer.train(texts * 2, 700)


def make_run(folder, tok, settings, seed=0, **more):
    """A folder as train.py leaves it, with every weight away from its start. -> its model."""
    torch.manual_seed(seed)
    ids = dict(vocab_size=tok.vocab_size, mask_id=tok.mask_id, eot_id=tok.eot_id)
    model = build_model(settings | ids).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    described, weights = model_state(model)
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder, dict(
        model_settings=described, model=weights, step=30, tokens=7680, best_loss=4.5678,
        settings=dict(seed=1, data_dir="/home/someone/data"),
        tokenizer_fingerprint=tok.fingerprint, data_sha256="") | more, "best.pt")
    tok.save(folder / "tokenizer")
    return model


def make_task(folder, model, tok, labels, n_texts=1, **more):
    """A model.pt as finetune_glue.py leaves it, with half the concepts -> its Classifier."""
    torch.manual_seed(1)
    settings = dict(arch=model.arch) | vars(model.cfg)
    settings, weights = keep_concepts(settings, model.state_dict(), 4)
    classifier = Classifier(build_model(settings), max(1, len(labels)), n_texts).eval()
    classifier.encoder.load_state_dict(weights)
    with torch.no_grad():
        classifier.segments.normal_()
        classifier.out.weight.normal_()
        classifier.out.bias.normal_()
    head = {name: t for name, t in classifier.state_dict().items()
            if not name.startswith("encoder.")}
    folder.mkdir(exist_ok=True)
    torch.save(dict(
        model_settings=settings, model=weights, head=head, task="mine", labels=labels,
        n_texts=n_texts, scale=[0.0, 1.0] if labels else [2.5, 1.5],
        tokenizer_fingerprint=tok.fingerprint) | more, folder / "model.pt")
    return classifier


def export(run, to, *args, ok=True):
    return call("tools/export.py", f"--out_dir={run}", f"--to={to}", *args, ok=ok)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, bpe):
    """-> function: one of KINDS -> (its model, the folder it is exported to); each made once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("exported")
            model = make_run(folder / "run", bpe, KINDS[kind])
            assert result(export(folder / "run", folder / "hub"))["arch"] == model.arch
            made[kind] = model, folder / "hub"
        return made[kind]

    return get


@pytest.fixture
def one(tmp_path, bpe):
    """-> (a run, its model, where to export it)."""
    model = make_run(tmp_path / "run", bpe, KINDS["open"] | dict(n_layer=1, n_mixer=1))
    return tmp_path / "run", model, tmp_path / "to" / "hub"


def random_rows(tok, lengths):
    """Rows with masks and marks between documents. Padding holds random ids and not [PAD]."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, tok.n_vocab - 5, n) for n in lengths]
    for row in rows:
        row[rng.random(len(row)) < 0.2] = tok.mask_id
        row[len(row) // 3] = tok.eot_id
    ids, _, real = padded(rows, rows, tok.pad_id)
    ids = torch.where(real, ids, torch.from_numpy(rng.integers(0, tok.n_vocab, ids.shape)))
    return [torch.from_numpy(row)[None] for row in rows], ids, real.long()


def logits_of(model, row):
    """The repository's logits at every position of a row (1,T) -> (T,V)."""
    concepts, tokens = model.encode(row)
    places = torch.arange(row.shape[1])[None]
    return model.logits(model.decode(concepts, tokens, places, model.documents(row)))[0]


def embedding_of(model, row):
    concepts, tokens = model.encode(row)
    return (concepts.amax(1) if model.arch == "concept" else tokens.mean(1))[0]


def assert_same(found, wanted, limit=1e-5):
    gap = (found - wanted).abs().max()
    assert gap <= limit * max(1, wanted.abs().max()), gap


# ---- the model -----------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_what_the_repository_computes_padded_or_not(kind, exported, bpe):
    model, folder = exported(kind)
    hub = transformers.AutoModelForMaskedLM.from_pretrained(folder, **LOCAL)
    base = transformers.AutoModel.from_pretrained(folder, **LOCAL)
    rows, ids, real = random_rows(bpe, (48, 20, 9, 1))
    together, pooled = hub(ids, real).logits, base(ids, real).pooler_output
    for i, row in enumerate(rows):
        assert_same(hub(row).logits[0], logits_of(model, row))
        assert_same(together[i, :row.shape[1]], logits_of(model, row))
        assert_same(pooled[i], embedding_of(model, row))
    assert hub.num_parameters() == model.num_params()


@pytest.mark.parametrize("arch", ["concept", "transformer"])
def test_the_code_needs_nothing_of_the_repository(arch):
    files = hub_files.code_files(build_model(dict(arch=arch, n_layer=1)))
    others = set()
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert {f"{name}.py" for name in names} <= set(files)
            elif isinstance(node, ast.ImportFrom):
                others.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                others.update(alias.name.split(".")[0] for alias in node.names)
    assert others - sys.stdlib_module_names == {"torch", "transformers"}
    # packages that an exported model would need on any system, Windows too
    assert not others & {"fcntl", "resource", "ctypes"}


# Edits that a user might make: blocks in modules of their own, imported in many ways, variables
# called loss and scale, and names that mean another thing in another module.
NEW_MODULES = {
    "lib/extra.py": """
import math as mathematics

import torch.nn as nn

from .more import *
from . import more as others

FACTOR = mathematics.exp(0.1)
CHUNK = "not the one of kernels.py"


def attend(x):  # model.py has another one
    return others.larger(x) * FACTOR + twice(0)


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.taps = nn.Parameter(nn.init.uniform_(nn.Linear(width, 1).weight[0].detach()))

    def forward(self, x):
        loss = attend(x)
        return loss * self.taps
""",
    "lib/more.py": """
from __future__ import annotations


def larger(x: Tensor):
    import block
    return block.same(x) * 1.5


def twice(scale):
    return scale * 2
""",
    "block.py": "def same(x):\n    return x\n",
}
EDIT_OF_MODEL = """

import block as blocks; from lib import extra
from lib.extra import (
    Scale,  # a comment
    attend as multiplied,
)


class ConceptEncoder(ConceptEncoder):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.scale = Scale(cfg.vocab_size)

    def logits(self, states):
        loss = super().logits(states)
        normalize = extra.attend(multiplied(self.scale(blocks.same(loss))))
        return normalize + loss.amin(-1, keepdim=True)
"""
USE_OF_MODEL = """
import sys, torch
from lib.run import build_model, model_state, save_checkpoint

folder, settings = sys.argv[1], torch.load(sys.argv[1] + "/settings.pt", weights_only=True)
model = build_model(settings).eval()
described, weights = model_state(model)
old = torch.load(folder + "/best.pt", weights_only=True)
save_checkpoint(folder, old | dict(model_settings=described, model=weights), "best.pt")
ids = torch.arange(40)[None]
with torch.no_grad():
    states = model.decode(*model.encode(ids), ids, model.documents(ids))
    torch.save(model.logits(states), folder + "/logits.pt")
"""
# In a process of its own, which has never seen the repository.
USE_OF_EXPORT = """
import sys, torch, transformers
folder = sys.argv[1]
hub = transformers.AutoModelForMaskedLM.from_pretrained(folder + "/hub", trust_remote_code=True)
assert hub.encoder.scale.taps.std() > 0
assert not {"model", "lib", "tools", "block"} & set(sys.modules)
with torch.no_grad():
    torch.save(hub(torch.arange(40)[None]).logits, folder + "/of_hub.pt")
"""


def test_an_edited_model_is_exported_with_its_new_modules(tmp_path, bpe, code_copies):
    env = dict(HF_MODULES_CACHE=code_copies)  # on the path that new processes get from this one
    copy, run = tmp_path / "copy", tmp_path / "run"
    copy.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "LICENSE", ROOT / "README.md"]:
        shutil.copy(path, copy)
    for name in ("lib", "tools", "data"):
        shutil.copytree(ROOT / name, copy / name,
                        ignore=lambda folder, names: [n for n in names if not n.endswith(".py")])
    for name, text in NEW_MODULES.items():
        (copy / name).write_text(text)
    with open(copy / "model.py", "a") as file:
        file.write(EDIT_OF_MODEL)
    model = make_run(run, bpe, KINDS["open"])
    torch.save(dict(arch="concept") | vars(model.cfg), run / "settings.pt")
    made = run_script(["-c", USE_OF_MODEL, str(run)], copy)
    assert made.returncode == 0, made.stderr
    done = run_script(["tools/export.py", f"--out_dir={run}", f"--to={run / 'hub'}"], copy, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    used = run_script(["-c", USE_OF_EXPORT, str(run)], tmp_path, env=env)
    assert used.returncode == 0, used.stderr
    wanted, found = (torch.load(run / name, weights_only=True)
                     for name in ("logits.pt", "of_hub.pt"))
    assert torch.equal(found, wanted)
    with torch.no_grad():
        assert (logits_of(model, torch.arange(40)[None]) - wanted[0]).abs().max() > 0.1


@pytest.mark.parametrize("text", [
    "import lib.extra\n", "import lib\n", "from lib import CONSTANT\n",
    "def forward():\n    import torch, lib.extra\n"])
def test_an_import_that_cannot_be_copied_is_refused(text, tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/__init__.py").write_text("CONSTANT = 1\n")
    (tmp_path / "lib/extra.py").write_text("")
    monkeypatch.setattr(hub_files, "ROOT", str(tmp_path))
    with pytest.raises(ValueError, match=r"lib/edited.py, line \d: the export cannot copy "
                                         r"'.*lib.*'; expected from MODULE import NAME"):
        hub_files.import_copies("lib.edited", text)


def test_only_imports_of_our_own_modules_change():
    text = ("# \u65e5\u672c\nx = '\u65e5'; import torch, masking, os; import model as m\n"
            "from torch import nn\n")
    found, needed = hub_files.import_copies("lib.edited", text)
    assert needed == {"masking", "model"}
    assert found == text.replace(
        "import torch, masking, os",
        "from . import concept_encoders_masking as masking; import torch, os").replace(
        "import model as m", "from . import concept_encoders_model as m")


def test_the_tied_head_is_stored_once(exported):
    from safetensors import safe_open
    model, folder = exported("open")
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}
    assert sum(sizes.values()) == model.num_params() and "encoder.embeddings.weight" in sizes


@torch.no_grad()
@pytest.mark.parametrize("kind", ["transformer", "narrow table"])
def test_in_bf16_what_is_computed_and_not_loaded_stays_exact(kind, exported, bpe):
    model, folder = exported(kind)
    hub = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16, **LOCAL)
    assert {p.dtype for p in hub.parameters()} == {torch.bfloat16}
    ours = {name: t for name, t in model.named_buffers() if name not in model.state_dict()}
    assert all(torch.equal(hub.encoder.get_buffer(name), t) for name, t in ours.items())
    [row], _, _ = random_rows(bpe, (48,))
    assert F.cosine_similarity(hub(row).logits[0].float(), logits_of(model, row)).min() > 0.98


def test_fill_mask_proposes_the_likeliest_ids(exported, bpe):
    model, folder = exported("open")
    text = "The loss of the [MASK] is in the file."
    fill = transformers.pipeline("fill-mask", str(folder), device="cpu", trust_remote_code=True)
    found = fill(text, top_k=3)
    before, after = (ids.tolist() for ids in bpe.encode(["The loss of the", " is in the file."]))
    row = torch.tensor([[bpe.eot_id, *before, bpe.mask_id, *after, bpe.eot_id]])
    place = (row[0] == bpe.mask_id).nonzero()[0, 0]
    with torch.no_grad():
        share, best = logits_of(model, row)[place].softmax(-1).topk(3)
    assert [r["token"] for r in found] == best.tolist()
    assert np.allclose([r["score"] for r in found], share, atol=1e-5)
    assert len(fill([text, "[MASK]"], batch_size=2)) == 2


def test_the_loss_is_the_mean_over_labelled_positions(exported, bpe):
    model, folder = exported("open")
    hub = transformers.AutoModelForMaskedLM.from_pretrained(folder, **LOCAL)
    _, ids, real = random_rows(bpe, (30, 12))
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[1, 5], labels[1, 6] = 65, 66, 67
    positions = torch.tensor([[3, 0], [5, 6]])
    targets = torch.tensor([[65, 0], [66, 67]])
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    wanted = model(ids, positions, targets, weights, attention_mask=real)
    assert_same(hub(ids, real, labels=labels).loss, wanted)


# ---- the tokenizer ---------------------------------------------------------------

@pytest.fixture(params=["byte", "bpe", "cl100k", pytest.param("gpt2", marks=needs_gpt2)])
def tok(request, bpe, monkeypatch):
    """cl100k: its pattern and the gaps between its special ids, and words that no merges make."""
    if request.param == "bpe":
        return bpe
    if request.param == "gpt2":
        cache = SHARED / "tokenizers/tiktoken_cache"
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    if request.param != "cl100k":
        return Tokenizer.load(request.param)
    from tiktoken_ext import openai_public
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    n = len(bpe.ranks)
    ranks = bpe.ranks | {b" zebra": n, b" Concepts": n + 1}
    specials = {"<|endoftext|>": len(ranks) + 1, "<|fim|>": len(ranks) + 9}
    pattern = openai_public.cl100k_base()["pat_str"]
    return Tokenizer("cl100k_base", pattern, ranks, with_specials(specials, len(ranks) + 10))


@pytest.fixture(scope="module")
def lines():
    """A few thousand lines: sources, odd and random Unicode, and real text where there is some."""
    texts = []
    for path in sorted(ROOT.glob("*.py")):
        texts += path.read_text().splitlines()
    texts += ODD + random_texts(1500, 0)
    texts += ["a zebra and Concepts zebras", "  x\n\n  y \t\n", "I'M 'LL 12345 1 234"]
    characters = [chr(c) for c in range(0, 0x30000, 37) if not 0xd800 <= c < 0xe000]
    texts += [f"a{c}b 1{c} {c}{c}x" for c in characters]
    if SHARED.is_dir():
        texts += "\n".join(read_texts("wikipedia_en.valid", 600_000)).split("\n")[:3000]
    return texts


def test_ids_are_those_of_our_tokenizer(tok, lines):
    hub = hub_files.hub_tokenizer(tok)
    names = regex.compile("|".join(map(regex.escape, tok.specials)))
    texts = [text for text in lines if not names.search(text)]
    found_all = hub.encode_batch(texts, add_special_tokens=False)
    for text, ids, found in zip(texts, tok.encode(texts), found_all):
        assert found.ids == ids.tolist(), text[:80]
    assert all(hub.token_to_id(name) == i for name, i in tok.specials.items())
    assert hub.decode(hub.encode("na\u00efve \u65e5\u672c  x").ids) == "na\u00efve \u65e5\u672c  x"


def lost_merge(monkeypatch):
    merge = hub_files.last_merge

    def without_th(token, ranks):
        return None if token == b" th" else merge(token, ranks)

    monkeypatch.setattr(hub_files, "last_merge", without_th)


def test_a_lost_merge_is_noticed_by_the_test_above(bpe, lines, monkeypatch):
    lost_merge(monkeypatch)
    with pytest.raises(AssertionError):
        test_ids_are_those_of_our_tokenizer(bpe, lines)


def test_texts_with_masks_get_the_ids_that_sample_py_gives_them(tok):
    body = ast.parse((ROOT / "tools/sample.py").read_text()).body
    [function] = [node for node in body if getattr(node, "name", "") == "encode_masked"]
    exec(compile(ast.Module([function], []), "tools/sample.py", "exec"), ours := {})
    hub = hub_files.hub_tokenizer(tok)
    for text in ("The capital of France is [MASK].", "[MASK]", "a [MASK] [MASK] b",
                 "a  [MASK]\n[MASK] [MASK]b", "x[MASK]y", "[MASK] \u65e5[MASK]"):
        assert hub.encode(text).ids == ours["encode_masked"](text, tok, 100), text


def test_transformers_keeps_all_of_it(exported, bpe):
    hub = transformers.AutoTokenizer.from_pretrained(exported("open")[1], **LOCAL)
    text = "a [MASK]\n[MASK] b"
    assert hub(text).input_ids == hub_files.hub_tokenizer(bpe).encode(text).ids
    found = (hub.pad_token_id, hub.mask_token_id, hub.cls_token_id, hub.sep_token_id,
             hub.eos_token_id)
    assert found == (bpe.pad_id, bpe.mask_id, bpe.cls_id, bpe.sep_id, bpe.eot_id)
    texts = ["one", "a much longer row " * 30]
    batch = hub(texts, padding=True, truncation=True, return_tensors="pt")
    assert batch.input_ids.shape == (2, 48)
    assert batch.attention_mask[0].sum() == len(hub("one").input_ids)
    assert set(batch) == {"input_ids", "attention_mask"}


# ---- a classifier ------------------------------------------------------------------

@pytest.mark.parametrize("kind, labels, n_texts", [
    ("open", ["no", "yes"], 2), ("transformer", [], 2), ("isolated", list("012"), 1),
    ("isolated", ["a", "b"], 2)])
def test_a_fine_tuned_model_answers_as_it_did(kind, labels, n_texts, tmp_path, bpe):
    model = make_run(tmp_path / "run", bpe, KINDS[kind])
    classifier = make_task(tmp_path / "task", model, bpe, labels, n_texts)
    done = result(export(tmp_path / "run", tmp_path / "hub", f"--task_dir={tmp_path / 'task'}",
                         f"--onnx={int(kind == 'open')}"))
    assert kind != "open" or 0 < done["differences"]["padded onnx logits"] < 1e-4
    auto = transformers.AutoModelForSequenceClassification
    hub = auto.from_pretrained(tmp_path / "hub", **LOCAL)
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub", **LOCAL)
    pairs = [("  The loss is low.\n", "It is "), ("a", "b " * 60), ("x y z " * 40, " tail "),
             ("one", "two, three")]
    machine = SimpleNamespace(take=lambda parts: parts, device=torch.device("cpu"))
    for case in (pairs, [pair[:1] for pair in pairs]):
        rows, segments, _ = encode_texts(case, bpe, 48)
        columns = map(list, zip(*case))
        batch = tok(*columns, padding=True, truncation=True, return_tensors="pt")
        for ids, row in zip(batch.input_ids, rows):
            assert ids[:len(row)].tolist() == row.tolist()
        wanted = predict(classifier, (rows, segments), bpe.pad_id, machine, "fp32")
        wanted = torch.from_numpy(wanted).float()
        with torch.no_grad():
            assert_same(hub(**batch).logits, wanted if labels else wanted * 1.5 + 2.5)
    kind_of_problem = "single_label_classification" if labels else "regression"
    assert hub.config.problem_type == kind_of_problem
    assert list(hub.config.id2label.values()) == (labels or ["score"])
    classify = transformers.pipeline("text-classification", str(tmp_path / "hub"), device="cpu",
                                     trust_remote_code=True)
    assert classify(dict(text="one", text_pair="two"))["label"] in (labels or ["score"])


def test_a_fresh_head_learns_and_is_saved_and_loaded(exported, tmp_path):
    _, to = exported("open")
    auto = transformers.AutoModelForSequenceClassification
    assert auto.from_pretrained(to, n_texts=2, **LOCAL).out.in_features == 2 * 64
    model = auto.from_pretrained(to, num_labels=3, **LOCAL)
    tok = transformers.AutoTokenizer.from_pretrained(to, **LOCAL)
    assert 0.01 < model.out.weight.std() < 0.03
    assert not model.out.bias.any() and not model.segments.any()
    batch = tok(["good", "bad", "so so and so on"], padding=True, return_tensors="pt")
    labels = torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(20):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.3
    model.eval().save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again", **LOCAL)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    for kind, n, labels in (("regression", 1, torch.rand(3)),
                            ("multi_label_classification", 4, torch.ones(3, 4))):
        model = auto.from_pretrained(to, num_labels=n, problem_type=kind, **LOCAL).eval()
        logits, loss = model(**batch).logits, model(**batch, labels=labels).loss
        wanted = F.mse_loss(logits[:, 0], labels) if n == 1 else F.softplus(-logits).mean()
        assert_same(loss, wanted)


# ---- other libraries ----------------------------------------------------------------

@pytest.mark.parametrize("kind", ["open", "transformer"])
def test_sentence_transformers_gives_our_embeddings(kind, exported, bpe):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, folder = exported(kind)
    # One of them has as many ids as there are concepts.
    texts = ["one text", "another one, of which there is more", "a b c d"]
    hub = sentence_transformers.SentenceTransformer(str(folder), device="cpu", **LOCAL)
    found = hub.encode(texts)
    for text, vector in zip(texts, found):
        row = torch.tensor([[bpe.eot_id, *bpe.encode([text])[0].tolist(), bpe.eot_id]])
        with torch.no_grad():
            assert_same(torch.from_numpy(vector), embedding_of(model, row))


@torch.no_grad()
def test_onnxruntime_gives_our_logits_for_other_numbers_and_lengths_of_rows(one, bpe):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run, model, to = one
    assert result(export(run, to, "--onnx=1"))["differences"]["onnx logits"] < 1e-3
    session = onnxruntime.InferenceSession(to / "model.onnx")
    inputs = {(i.name, i.type) for i in session.get_inputs()}
    assert inputs == {("input_ids", "tensor(int64)"), ("attention_mask", "tensor(int64)")}
    for lengths in ((48, 1, 17), (3,), (5, 30, 30, 30, 29)):
        rows, ids, real = random_rows(bpe, lengths)
        [logits] = session.run(None, dict(input_ids=ids.numpy(), attention_mask=real.numpy()))
        for found, row in zip(logits, rows):
            assert_same(torch.from_numpy(found[:row.shape[1]]), logits_of(model, row), 1e-4)


# ---- nothing but what was checked ------------------------------------------------------

def edited_weights(monkeypatch, edit):
    """Weights go through edit() on their way into the file."""
    import safetensors.torch
    save = safetensors.torch.save
    monkeypatch.setattr(safetensors.torch, "save",
                        lambda tensors, *args, **kwargs: save(edit(tensors), *args, **kwargs))


def tampered_weight(monkeypatch):
    name = "encoder.norm.weight"
    edited_weights(monkeypatch, lambda tensors: tensors | {name: tensors[name] + 1e-3})


def lost_weight(monkeypatch):
    name = "encoder.norm.weight"
    edited_weights(monkeypatch, lambda tensors: {k: t for k, t in tensors.items() if k != name})


def with_code(monkeypatch, code):
    """The exported file of the classes ends in this code."""
    files, name = hub_files.code_files, "modeling_concept_encoders.py"
    monkeypatch.setattr(hub_files, "code_files",
                        lambda model: files(model) | {name: files(model)[name] + code})


def other_code(monkeypatch):
    with_code(monkeypatch, "\nright = Encoder.logits\n"
                           "Encoder.logits = lambda self, states: right(self, states) * 1.001\n")


def broken_code(monkeypatch):
    with_code(monkeypatch, "\n1 / 0\n")


@pytest.mark.parametrize("damage, message", [
    (tampered_weight, "logits differ from the run's by"),
    (lost_weight, "did not find the weights"),
    (lost_merge, "tokenizer differs"),
    (other_code, "logits differ from the run's by"),
    (broken_code, "ZeroDivision")])
def test_what_differs_is_refused_and_leaves_nothing_behind(damage, message, one, monkeypatch):
    run, _, to = one
    damage(monkeypatch)
    refused(export(run, to, ok=False), "error", message)
    assert not to.exists() and not os.listdir(to.parent)


def test_an_earlier_export_is_replaced_whole_once_the_new_one_is_checked(one, monkeypatch):
    run, _, to = one
    export(run, to)
    (to / "model.onnx").write_text("of an older model")
    before = {name: (to / name).read_bytes() for name in os.listdir(to)}
    with monkeypatch.context() as patch:
        tampered_weight(patch)
        refused(export(run, to, ok=False), "logits differ")
    assert {name: (to / name).read_bytes() for name in os.listdir(to)} == before
    assert os.listdir(to.parent) == ["hub"]
    export(run, to)
    assert not (to / "model.onnx").exists() and os.listdir(to.parent) == ["hub"]


def test_other_files_are_never_overwritten(one, tmp_path):
    run, _, to = one
    refused(export(run, run, ok=False), f"--to={run} is not empty and not an earlier export")
    assert (run / "best.pt").exists()
    refused(export(run, run / "best.pt", ok=False), "is a file")
    export(run, to)
    (to / "notes.txt").write_text("mine")
    refused(export(run, to, ok=False), "not an earlier export")
    assert (to / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")


@pytest.mark.parametrize("way", ["", " ", "missing/../notes", "link", "notes/.."])
def test_no_folder_is_replaced_by_another_name_for_it(way, one, tmp_path, monkeypatch):
    """--to=$UNSET, a path through a folder that is missing, a link: the real folder counts."""
    run, _, _ = one
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("notes")
    before = sorted(os.listdir(tmp_path))
    to = f"{tmp_path}/{way}" if way.strip() else way
    refused(export(run, to, ok=False), f"--to={to!r} is empty" if to == way else "not an earlier")
    assert (tmp_path / "notes/notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == before


def test_a_link_to_an_earlier_export_stays_a_link(one, tmp_path):
    run, _, _ = one
    export(run, tmp_path / "hub")
    (tmp_path / "link").symlink_to("hub")
    export(run, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "hub/config.json").exists()
    assert {"hub", "link"} <= set(os.listdir(tmp_path)) and not list(tmp_path.glob("*.tmp"))


def test_a_file_put_into_the_folder_during_an_export_survives(one, tmp_path, monkeypatch):
    run, _, _ = one
    to = tmp_path / "hub"
    export(run, to)
    real = hub_files.code_files

    def somebody_writes(encoder):
        (to / "notes.txt").write_text("mine")
        return real(encoder)
    monkeypatch.setattr(hub_files, "code_files", somebody_writes)
    refused(export(run, to, ok=False), "not an earlier export")
    assert (to / "notes.txt").read_text() == "mine" and not list(tmp_path.glob("*.tmp"))


# ---- mistakes --------------------------------------------------------------------------

def test_mistakes_end_in_one_message(one, tmp_path, bpe, monkeypatch):
    run, model, to = one
    refused(export(tmp_path / "none", to, ok=False), "holds no checkpoint; train first")
    task = tmp_path / "task"
    of_task = f"--task_dir={task}"
    refused(export(run, to, of_task, ok=False), "holds no model.pt", "finetune_glue.py")
    make_task(task, model, bpe, ["0", "1"], tokenizer_fingerprint="another")
    refused(export(run, to, of_task, ok=False), "another model or tokenizer")
    torch.save(dict(model={}), task / "model.pt")
    refused(export(run, to, of_task, ok=False), "was not written by finetune_glue.py")
    (task / "model.pt").write_bytes((run / "best.pt").read_bytes()[:5000])
    refused(export(run, to, of_task, ok=False), "cannot be read as a checkpoint")
    refused(export(run, to, "--push=me", ok=False), "expected --push=USER/REPO")
    refused(export(run, to, "--private=1", ok=False), "expected --push=USER/REPO")
    (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:5000])
    refused(export(run, to, ok=False), "best.pt", "no checkpoint in", "can be read")
    make_run(run, bpe, KINDS["mixers"])
    (run / "tokenizer/tokenizer.tiktoken").unlink()
    refused(export(run, to, ok=False), "tokenizer.tiktoken is missing or damaged")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(export(run, to, ok=False), "safetensors.torch is not installed; pip install -r",
            "requirements-extra.txt")
    assert not to.parent.exists()


# ---- card and hub -----------------------------------------------------------------------

def test_the_model_card_holds_the_numbers_of_the_run_and_no_paths(one):
    run, model, to = one
    def write(name, value):
        (run / name).write_text(json.dumps(value) + "\n")

    write("config.json", dict(git="abc1234", torch="2.13.0"))
    write("log.jsonl", dict(step=30, val_loss=4.6, unigram_entropy=6.4321))
    masks = dict(unigram_entropy=6.4, span=dict(loss=5.4321, accuracy=0.125))
    write("eval.json", dict(step=30, data={"data/mine": masks}))
    write("glue.json", dict(rte=dict(
        median=dict(accuracy=0.61), min=dict(accuracy=0.52), max=dict(accuracy=0.63),
        majority=dict(accuracy=0.53), runs=[1, 2])))
    export(run, to)
    card = (to / "README.md").read_text()
    for part in (f"{model.num_params():,}", "7,680 tokens in 30 steps", "4.5678", "6.4321",
                 "git abc1234", "5.4321", "12.5%", "0.6100 [0.5200, 0.6300]",
                 'pipeline("fill-mask", "hub", trust_remote_code=True)'):
        assert part in card, part
    assert "/home/someone" not in card and str(run) not in card


def test_only_what_was_checked_is_pushed(one, monkeypatch):
    run, _, to = one
    pushed = []

    class Hub:
        """Stands in for huggingface_hub.HfApi: keeps what it is given."""
        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            return f"https://hub/{repo_id}?private={private}"

        def upload_folder(self, repo_id, folder_path, **others):
            pushed.append((repo_id, sorted(os.listdir(folder_path))))

    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused(export(run, to, "--push=me/mine", ok=False), "HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    with monkeypatch.context() as patch:
        tampered_weight(patch)
        refused(export(run, to, "--push=me/mine", ok=False), "logits differ")
    assert not pushed and not to.exists()
    done = export(run, to, "--push=me/mine", "--private=1")
    assert result(done)["pushed"] == "https://hub/me/mine?private=True"
    assert "secret" not in done.stdout
    assert pushed == [("me/mine", sorted(os.listdir(to)))]
    assert "me/mine" in (to / "README.md").read_text()

    def no_network(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Hub, "upload_folder", no_network)
    refused(export(run, to, "--push=me/mine", ok=False), "is written and checked, but not pushed",
            "no route to host")
    assert (to / "model.safetensors").exists()
