"""tools/export.py: an exported run gives the ids and logits of the repository, in other libraries.

On the CPU, without network, with tiny models of random weights.
"""

import ast
import copy
import functools
import gc
import json
import os
import pickle
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
from lib.decoding import continue_rows, prompt_ids
from lib.fill import encode_masked
from lib.heads import Classifier, encode_texts, keep_concepts, padded, predict
from lib.run import model_state, save_checkpoint
from lib.sampling import Sampling
from lib.settings import build_model

sys.path.append(str(ROOT / "tests/data"))  # pytest adds only the folder of this file
from test_tokenizer import ODD, needs_gpt2, random_texts, read_texts

transformers = pytest.importorskip("transformers")
from tools import hub_files, hub_tokenizer

pytestmark = pytest.mark.long

LOCAL = dict(trust_remote_code=True, local_files_only=True)
SHAPE = dict(block_size=48, n_layer=2, n_head=4, token_dim=64, ffn_dim=64)
CONCEPT = dict(arch="concept", n_concept=8, concept_dim=64) | SHAPE
TRANSFORMER = dict(arch="transformer") | SHAPE
KINDS = {
    "open": CONCEPT,
    "strict": CONCEPT | dict(bottleneck="strict", bias=True, concept_dim=96),
    "open anchored": CONCEPT | dict(anchored=True, self_attention=True),
    "isolated strict": CONCEPT | dict(bottleneck="strict", isolate_documents=True),
    "sinusoidal": CONCEPT | dict(position="sinusoidal", max_length=96, hide_masked=True,
                                 n_concept=7),
    "narrow table": CONCEPT | dict(token_dim=4, n_mixer=1, n_decoder=2, self_attention=True),
    "isolated": CONCEPT | dict(isolate_documents=True),
    "transformer": TRANSFORMER | dict(bias=True),
    "mixers": TRANSFORMER | dict(n_layer=0),
    "registers": TRANSFORMER | dict(n_register=64),
    "copy": TRANSFORMER | dict(copy_head=True),
    "isolated transformer": TRANSFORMER | dict(isolate_documents=True),
    "ettin": TRANSFORMER | dict(n_mixer=0, local_window=8, global_every=2, qk_norm=False,
                                bert_head=True),
    "resonance": TRANSFORMER | dict(arch="resonance", n_frequency=4, mixers="ra"),
}
CAUSAL = {"decoder": TRANSFORMER | dict(causal=True),
          "resonance decoder": KINDS["resonance"] | dict(causal=True)}


@pytest.fixture(scope="module", autouse=True)
def code_copies(tmp_path_factory):
    """Keeps the code that transformers copies out of the user's cache, and parses it once."""
    # call() collects garbage each time. Freezing what the libraries hold makes that fast.
    gc.freeze()
    folder = str(tmp_path_factory.mktemp("code"))
    with pytest.MonkeyPatch.context() as patch:
        modules = transformers.dynamic_module_utils
        patch.setattr(modules, "HF_MODULES_CACHE", folder)
        # transformers adds the folder to the path, which new processes get from this one.
        patch.setattr(sys, "path", sys.path.copy())
        # Both parse whole files, the first of them at each load: here once for each text.
        real_imports, of_text = modules.get_imports, {}

        def get_imports(path):
            with open(path, encoding="utf-8") as file:
                text = file.read()
            if text not in of_text:
                of_text[text] = real_imports(path)
            return of_text[text]

        patch.setattr(modules, "get_imports", get_imports)
        patch.setattr(hub_files, "import_copies", functools.cache(hub_files.import_copies))
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


def make_task(folder, model, tok, labels, n_texts=1, older=False, **more):
    """A model.pt as finetune_glue.py leaves it, with half the concepts -> its Classifier.

    older: as when models without anchors did not align texts, which the file does not say.
    """
    torch.manual_seed(1)
    settings = dict(arch=model.arch) | vars(model.cfg)
    settings, weights = keep_concepts(settings, model.state_dict(), 4)
    classifier = Classifier(build_model(settings), max(1, len(labels)), n_texts,
                            aligned=not older)
    classifier.eval().encoder.load_state_dict(weights)
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
        tokenizer_fingerprint=tok.fingerprint) | more
        | ({} if older else dict(aligned=classifier.aligned)), folder / "model.pt")
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


ONE = KINDS["open"] | dict(n_layer=1, n_mixer=1)


@pytest.fixture
def one(tmp_path, bpe):
    """-> (a run, its model, where to export it)."""
    return tmp_path / "run", make_run(tmp_path / "run", bpe, ONE), tmp_path / "to" / "hub"


@pytest.fixture(scope="module")
def export_of_one(tmp_path_factory, bpe):
    """The folder that the run of `one` is exported to."""
    folder = tmp_path_factory.mktemp("one")
    make_run(folder / "run", bpe, ONE)
    export(folder / "run", folder / "hub")
    return folder / "hub"


@pytest.fixture
def earlier(one, export_of_one):
    """`one`, and at the end of it lies an earlier export."""
    shutil.copytree(export_of_one, one[2])
    return one


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
    if model.arch != "concept":
        return tokens[0].mean(0)
    standing = concepts[model.standing(row)]
    return standing.mean(0) if model.cfg.bottleneck == "strict" else standing.amax(0)


def assert_same(found, wanted, limit=1e-5):
    gap = (found - wanted).abs().max()
    assert gap <= limit * max(1, wanted.abs().max()), gap


# ---- the model -----------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_decoder_generates_in_transformers_what_it_generates_here(kind, tmp_path, bpe):
    """AutoModelForCausalLM, prompts of two lengths at once; its loss is that of next tokens."""
    model = make_run(tmp_path / "run", bpe, CAUSAL[kind])
    export(tmp_path / "run", tmp_path / "hub")
    hub = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", **LOCAL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub", **LOCAL)
    texts = ["one", "a longer text before it"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    found = hub.generate(**batch, max_new_tokens=8, do_sample=False)
    found = found[:, batch["input_ids"].shape[1]:].tolist()
    prompts = [prompt_ids(text, bpe) for text in texts]
    assert [ids[len(ids) - len(prompt):].tolist()
            for ids, prompt in zip(batch["input_ids"], prompts)] == prompts
    wanted = continue_rows(model, bpe, prompts, [0, 1], 8, Sampling(temperature=0), "cpu")
    # transformers may draw special ids, of which it knows nothing: up to there they are the same
    for ids, expected in zip(found, wanted):
        n = next((i for i, id in enumerate(ids) if id >= bpe.n_vocab or bpe.is_special[id]), 8)
        assert ids[:n] == expected[:n]
    row = torch.tensor([prompts[1]])
    loss = F.cross_entropy(logits_of(model, row)[:-1], row[0, 1:])
    assert abs(hub(row, labels=row).loss - loss) < 1e-5
    extras = hub(**batch, output_hidden_states=True, output_attentions=True)
    assert len(extras.hidden_states) == 3
    assert len(extras.attentions) == (2 if kind == "decoder" else 1)
    later = torch.ones(batch["input_ids"].shape[1:] * 2).triu(1).bool()
    assert all(weights[1, :, later].max() < 1e-6 for weights in extras.attentions)


def test_what_uses_fourier_transforms_has_no_onnx(tmp_path, bpe):
    make_run(tmp_path / "run", bpe, KINDS["resonance"])
    refused(export(tmp_path / "run", tmp_path / "hub", "--onnx=1", ok=False),
            "onnxruntime has no complex numbers")


def test_what_reads_padding_as_text_is_refused(tmp_path, bpe):
    make_run(tmp_path / "run", bpe, KINDS["resonance"] | dict(mixer="fnet", causal=False))
    refused(export(tmp_path / "run", tmp_path / "hub", ok=False),
            "mixer=fnet reads padding as if it were text")


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
    place, run = tmp_path / "copy", tmp_path / "run"
    place.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "LICENSE", ROOT / "README.md"]:
        shutil.copy(path, place)
    for name in ("lib", "tools", "data"):
        shutil.copytree(ROOT / name, place / name,
                        ignore=lambda folder, names: [n for n in names if not n.endswith(".py")])
    for name, text in NEW_MODULES.items():
        (place / name).write_text(text)
    with open(place / "model.py", "a") as file:
        file.write(EDIT_OF_MODEL)
    model = make_run(run, bpe, KINDS["open"])
    torch.save(dict(arch="concept") | vars(model.cfg), run / "settings.pt")
    made = run_script(["-c", USE_OF_MODEL, str(run)], place)
    assert made.returncode == 0, made.stderr
    command = ["tools/export.py", f"--out_dir={run}", f"--to={run / 'hub'}"]
    done = run_script(command, place, env=env)
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


# ---- what users of transformers expect of a model -------------------------------------

HEADS = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification",
         "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
FEW_KINDS = ("open", "strict", "narrow table", "isolated", "registers")


def load(folder, auto="AutoModelForMaskedLM", **more):
    return getattr(transformers, auto).from_pretrained(folder, **more, **LOCAL)


def padded_left(ids, real):
    """The same rows with their padding on the left."""
    n_pad = (real == 0).sum(1).tolist()
    return [torch.stack([row.roll(n) for row, n in zip(t, n_pad)]) for t in (ids, real)]


@torch.no_grad()
@pytest.mark.parametrize("kind", FEW_KINDS)
def test_padding_on_the_left_changes_nothing(kind, exported, bpe):
    _, ids, real = random_rows(bpe, (48, 20, 9, 1))
    left_ids, left = padded_left(ids, real)
    for auto in HEADS:
        hub = load(exported(kind)[1], auto, output_hidden_states=True, output_attentions=True)
        torch.manual_seed(0)  # heads are random, but the same for both
        wanted, found = hub(ids, real), hub(left_ids, left)
        for name, a in wanted.items():
            b = found[name]
            pairs = zip(a, b) if isinstance(a, tuple) else [(a, b)]
            for u, v in pairs:
                if u.shape[:2] == ids.shape:  # something for each token
                    assert torch.equal(u[real.bool()], v[left.bool()]), (auto, name)
                elif name == "attentions":  # of concepts, or of registers and tokens, to tokens
                    T = ids.shape[1]
                    for i, n in enumerate(real.sum(1)):
                        a_n, b_n = u[i, ..., -T:][..., :n], v[i, ..., -T:][..., T - n:]
                        if kind == "registers":
                            first = a_n.shape[1] - T  # 0 in the last layer
                            a_n = a_n[:, :first + n]
                            b_n = b_n[:, [*range(first), *range(-n, 0)]]
                        assert torch.equal(a_n, b_n)
                else:
                    assert torch.equal(u, v), (auto, name)
    nothing = load(exported(kind)[1], "AutoModel")(ids, real * 0)
    assert nothing.pooler_output.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", FEW_KINDS)
def test_embeddings_of_the_ids_in_place_of_the_ids(kind, exported, bpe):
    _, ids, real = random_rows(bpe, (48, 20, 9, 1))
    for auto in HEADS:
        hub = load(exported(kind)[1], auto)
        embeds = hub.get_input_embeddings()(ids)
        found = hub(inputs_embeds=embeds, attention_mask=real)[0]
        wanted = hub(ids, real)[0]
        if found.shape[:2] == ids.shape:
            found, wanted = found[real.bool()], wanted[real.bool()]
        assert torch.equal(found, wanted)
        for given in (dict(), dict(input_ids=ids, inputs_embeds=embeds)):
            with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
                hub(**given)
        with pytest.raises(ValueError, match=r"expected that of the tokens, \(4, 48\)"):
            hub(ids, real[:, :9])


def test_soft_prompts_get_gradients(exported, bpe):
    hub = load(exported("open")[1])
    table = hub.get_input_embeddings()
    assert table.weight is hub.encoder.embeddings.weight
    embeds = torch.nn.Parameter(torch.cat((torch.randn(1, 3, 64), table(torch.arange(9)[None])), 1))
    labels = torch.tensor([[-100] * 11 + [5]])
    hub(inputs_embeds=embeds, labels=labels).loss.backward()
    assert embeds.grad.abs().sum(-1).min() > 0


def test_a_copy_head_keeps_its_ids(bpe, tmp_path):
    make_run(tmp_path / "run", bpe, dict(arch="transformer", copy_head=True))
    export(tmp_path / "run", tmp_path / "hub")
    with pytest.raises(ValueError, match="the copy head scores the .* ids it was trained with"):
        load(tmp_path / "hub").resize_token_embeddings(740)


@torch.no_grad()
@pytest.mark.parametrize("kind", FEW_KINDS)
def test_a_resized_vocabulary_keeps_the_logits_and_is_saved(kind, exported, bpe, tmp_path):
    _, ids, real = random_rows(bpe, (48, 20))
    hub = load(exported(kind)[1])
    before = hub(ids, real).logits
    hub.resize_token_embeddings()
    assert torch.equal(hub(ids, real).logits, before)
    # cut to the tokenizer's ids, as users do; then added tokens; then fewer again; then padded
    for n, more in ((bpe.n_vocab, {}), (760, {}), (740, {}),
                    (None, dict(pad_to_multiple_of=64, mean_resizing=False))):
        table = hub.resize_token_embeddings(n, **more)
        n = n or 768
        assert hub.config.vocab_size == len(table.weight) == table.num_embeddings == n
        logits = hub(ids, real).logits
        assert logits.shape[-1] == n and torch.equal(logits[..., :bpe.n_vocab],
                                                     before[..., :bpe.n_vocab])
        if n >= 740:  # a new token is read and predicted
            assert torch.isfinite(hub(torch.full((1, 4), n - 1)).logits).all()
    assert 0.5 < table.weight[740:].std() / table.weight[:740].std() < 2
    hub.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True, **LOCAL)
    assert not any(report.values()) and again.config.vocab_size == 768
    assert torch.equal(again(ids, real).logits, logits)
    hub.set_input_embeddings(torch.nn.Embedding(720, table.weight.shape[1]))
    assert hub.config.vocab_size == hub(ids, real).logits.shape[-1] == 720


def test_parameters_are_counted_with_and_without_the_table(exported):
    for kind in ("open", "narrow table", "transformer"):
        model, folder = exported(kind)
        hub = load(folder)
        assert hub.num_parameters() == model.num_params()
        assert hub.num_parameters(exclude_embeddings=True) == model.num_params() - model.wte.numel()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["open", "strict", "open anchored", "isolated strict",
                                  "sinusoidal", "transformer", "registers"])
def test_hidden_states_and_attentions_of_each_layer(kind, exported, bpe):
    model, folder = exported(kind)
    _, ids, real = random_rows(bpe, (48, 20))
    hub = load(folder, "AutoModel")
    found = hub(ids, real, output_hidden_states=True, output_attentions=True)
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    layers = list(model.layers)
    assert len(found.hidden_states) == len(layers) + 1 and len(found.attentions) == len(layers)
    assert all(state.shape == found.last_hidden_state.shape for state in found.hidden_states)
    # The weights are those with which the layer has read: they give what it has read.
    given = []
    hooks = [layer.read.register_forward_hook(lambda *call: given.append(call))
             for layer in layers]
    model.encode(ids, real.bool())
    for hook in hooks:
        hook.remove()

    def values_of(read, tokens):
        return read.kv(tokens).chunk(2, -1)[1].unflatten(-1, (read.n_head, -1)).transpose(1, 2)

    for (read, args, out), weights in zip(given, found.attentions):
        total = weights.sum(-1)
        assert ((total - 1).abs() < 1e-5)[:, :read.n_head - read.n_owned_head].all()
        assert ((total - 1).abs().minimum(total) < 1e-5).all()  # or 0: a query that owns nothing
        values, n = values_of(read, args[1]), read.n_owned_head
        if n:  # these heads read the words themselves
            values = torch.cat((values[:, :-n], values_of(read, args[3])[:, -n:]), dim=1)
        what = weights @ values
        if read.normalize:
            what = F.rms_norm(what, what.shape[-1:])
        assert_same(read.out(what.transpose(1, 2).flatten(2)), out)
    # Of concepts behind the end of a short text nothing is computed: there they are zeros.
    short = hub(ids[1:, :20], output_hidden_states=True, output_attentions=True)
    assert all(state.shape == short.last_hidden_state.shape for state in short.hidden_states)
    assert all(weights.shape[1:3] == found.attentions[0].shape[1:3] for weights in short.attentions
               if model.arch == "concept")
    masked_lm = load(folder, output_hidden_states=True, return_dict=False)(ids, real)
    assert isinstance(masked_lm, tuple) and masked_lm[0].shape[:2] == ids.shape
    has_last = model.arch == "transformer"  # the decoder of a Transformer is its last layer
    assert len(masked_lm[1]) == len(layers) + 1 + has_last
    assert len(load(folder)(ids, real, output_attentions=True).attentions) == len(layers) + has_last


@pytest.mark.parametrize("kind, reentrant", [("open", False), ("strict", True),
                                             ("transformer", False)])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant, exported):
    _, folder = exported(kind)
    ids, found = torch.arange(60).view(2, 30), []
    for is_on in (False, True):
        hub = load(folder).train()
        if is_on:
            hub.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        assert hub.is_gradient_checkpointing == is_on
        calls = []
        read = hub.encoder.layers[0].read
        read.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        hub(ids, labels=ids).loss.backward()
        assert len(calls) == 1 + is_on
        found.append({name: p.grad for name, p in hub.named_parameters()})
    assert all(torch.allclose(found[0][name], g, atol=1e-6) for name, g in found[1].items())
    hub(ids, labels=ids, output_hidden_states=True, output_attentions=True).loss.backward()
    hub.gradient_checkpointing_disable()
    assert not hub.is_gradient_checkpointing


def test_labels_of_tokens_and_places_of_answers_give_losses(exported, bpe):
    _, ids, real = random_rows(bpe, (30, 12))
    tagger = load(exported("open")[1], "AutoModelForTokenClassification", num_labels=3)
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[1, 5] = 2, 0
    found = tagger(ids, real, labels=labels)
    assert found.logits.shape == (2, 30, 3)
    wanted = (F.cross_entropy(found.logits[0, 3], torch.tensor(2))
              + F.cross_entropy(found.logits[1, 5], torch.tensor(0))) / 2
    assert_same(found.loss, wanted)
    answers = load(exported("open")[1], "AutoModelForQuestionAnswering")
    start, end = torch.tensor([3, 5]), torch.tensor([[4], [99]])  # 99 is outside the row
    found = answers(ids, real, start_positions=start, end_positions=end)
    assert found.start_logits.shape == found.end_logits.shape == (2, 30)
    wanted = (F.cross_entropy(found.start_logits, start)
              + F.cross_entropy(found.end_logits[:1], torch.tensor([4]))) / 2
    assert_same(found.loss, wanted)
    # a batch in which nothing is labelled teaches nothing, and spoils nothing
    nothing = torch.full_like(ids, -100)
    for model in (tagger, load(exported("open")[1])):
        loss = model(ids, real, labels=nothing).loss
        loss.backward()
        assert loss == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters()
                                 if p.grad is not None)


@torch.no_grad()
def test_two_texts_of_a_row_see_each_other_in_a_model_that_isolates_documents(exported, bpe):
    tok = transformers.AutoTokenizer.from_pretrained(exported("isolated")[1], **LOCAL)
    a, b = (tok("What is it?", text, return_tensors="pt") for text in ("a b c", "d e f"))
    question = slice(1, len(tok("What is it?").input_ids) - 1)
    for auto, sees in (("AutoModelForMaskedLM", False), ("AutoModelForTokenClassification", True)):
        hub = load(exported("isolated")[1], auto)
        assert torch.equal(hub(**a)[0][:, question], hub(**b)[0][:, question]) != sees


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["narrow table", "isolated", "transformer"])
def test_every_class_runs_in_half_precision(kind, dtype, exported, bpe):
    _, ids, real = random_rows(bpe, (48, 20, 9, 1))
    for auto in HEADS:
        torch.manual_seed(0)
        loaded = load(exported(kind)[1], auto, dtype=dtype)
        assert torch.isfinite(loaded(ids, real)[0]).all()
        cast = load(exported(kind)[1], auto).to(dtype)
        assert torch.isfinite(cast(ids[:1], real[:1])[0]).all()
    pairs = load(exported(kind)[1], HEADS[2], n_texts=2, dtype=dtype)
    kinds = ((torch.arange(48) > 4).long() + 1).expand(ids.shape)
    assert torch.isfinite(pairs(ids, real, kinds).logits).all()


@torch.no_grad()
def test_all_concepts_as_unit_vectors_for_search(exported, bpe):
    for kind in ("open", "transformer"):
        model, folder = exported(kind)
        hub = load(folder, "AutoModel")
        rows, ids, real = random_rows(bpe, (48, 20, 1))
        vectors = hub.multi_vectors(ids, real)
        if kind == "open":
            assert vectors.shape == (3, 8, 64)  # however long the text is
        else:
            assert not vectors[real == 0].any()
            vectors = vectors[real == 1]
        assert (vectors.norm(dim=-1) - 1).abs().max() < 1e-5
        alone = hub.multi_vectors(rows[1])[0]
        assert_same(vectors[1] if kind == "open" else vectors[48:68], alone)


def test_snippets_of_the_model_card_run(exported, monkeypatch):
    pytest.importorskip("sentence_transformers")
    _, folder = exported("open")
    text = (folder / "README.md").read_text()
    [snippet] = regex.findall(r"```python\n(.*?)```", text, regex.DOTALL)
    monkeypatch.chdir(folder.parent)  # the card calls the folder by its name
    names = {}
    exec(snippet, names)
    assert names["scores"].shape == (1, 2) and names["vectors"](["", "a b"]).shape == (2, 8, 64)


@pytest.mark.parametrize("kind, pooled", [
    ("open", "maximum over the concepts"), ("strict", "mean over the concepts")])
def test_the_model_card_says_what_an_embedding_is(exported, kind, pooled):
    assert pooled in (exported(kind)[1] / "README.md").read_text()


def test_a_copied_or_pickled_model_is_independent(exported):
    hub = load(exported("open")[1])
    other = pickle.loads(pickle.dumps(copy.deepcopy(hub)))
    other.resize_token_embeddings(800)
    assert len(hub.encoder.wte) == hub.config.vocab_size == 704


# Trainer needs accelerate. Training with these arguments is a few seconds.
def trained(model, data, collator, folder, **more):
    args = transformers.TrainingArguments(
        str(folder), max_steps=5, per_device_train_batch_size=4, learning_rate=3e-3, report_to=[],
        logging_steps=1, use_cpu=True, disable_tqdm=True, save_steps=5, **more)
    trainer = transformers.Trainer(model, args, train_dataset=data, data_collator=collator)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 5 and losses[-1] < losses[0]
    return folder / "checkpoint-5"


def test_trainer_fine_tunes_a_tagger_for_5_steps(exported, tmp_path):
    pytest.importorskip("accelerate")
    _, folder = exported("open")
    tok = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
    words = ["The", "concepts", "of", "transformers", "are", "[MASK]", "."]
    row = tok(words, is_split_into_words=True)
    row["labels"] = [-100 if word is None else word % 3 for word in row.word_ids()]
    model = load(folder, HEADS[3], num_labels=3, id2label=dict(enumerate("ABC")))
    collator = transformers.DataCollatorForTokenClassification(tok, pad_to_multiple_of=8)
    saved = trained(model, [dict(row)] * 8, collator, tmp_path, gradient_checkpointing=True,
                    neftune_noise_alpha=0.1)
    tok.save_pretrained(saved)
    tag = transformers.pipeline("token-classification", str(saved), trust_remote_code=True,
                                device="cpu", aggregation_strategy="first")
    text = " ".join(words)
    found = tag([text, ""], batch_size=2)
    assert found[1] == [] and all(text[r["start"]:r["end"]] in text for r in found[0])
    assert {r["entity_group"] for r in found[0]} <= set("ABC")
    again = load(saved, HEADS[3])
    batch = tok(text, return_tensors="pt")
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_trainer_trains_a_masked_model_on_for_5_steps(exported, tmp_path):
    pytest.importorskip("accelerate")
    _, folder = exported("transformer")
    tok = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
    data = [tok("The loss of the model is in the file", return_offsets_mapping=True,
                return_special_tokens_mask=True) for _ in range(8)]
    collator = transformers.DataCollatorForLanguageModeling(tok, whole_word_mask=True,
                                                            mlm_probability=0.5)
    # offsets are for the collator alone
    trained(load(folder), data, collator, tmp_path, remove_unused_columns=False)


# ---- the tokenizer ---------------------------------------------------------------

@functools.cache
def gpt2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tokenizers/tiktoken_cache"))
        return Tokenizer.load("gpt2")


@pytest.fixture(params=["byte", "bpe", "cl100k", pytest.param("gpt2", marks=needs_gpt2)])
def tok(request, bpe, monkeypatch):
    """cl100k: its pattern and the gaps between its special ids, and words that no merges make."""
    if request.param == "bpe":
        return bpe
    if request.param == "gpt2":
        return gpt2()
    if request.param == "byte":
        return Tokenizer.load("byte")
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
    for name in ("finetune_glue.py", "model.py"):
        texts += (ROOT / name).read_text().splitlines()
    texts += ODD + random_texts(800, 0)
    texts += ["a zebra and Concepts zebras", "  x\n\n  y \t\n", "I'M 'LL 12345 1 234"]
    characters = [chr(c) for c in range(0, 0x30000, 37) if not 0xd800 <= c < 0xe000]
    texts += [f"a{c}b 1{c} {c}{c}x" for c in characters]
    if SHARED.is_dir():
        texts += "\n".join(read_texts("wikipedia_en.valid", 200_000)).split("\n")[:1000]
    return texts


HUBS = {}  # one of gpt2 takes seconds to make


def hub_of(tok, is_classifier=False):
    key = tok.fingerprint, is_classifier
    if key not in HUBS:
        HUBS[key] = hub_files.hub_tokenizer(tok, is_classifier)
    return HUBS[key]


def test_ids_are_those_of_our_tokenizer(tok, lines):
    hub = hub_of(tok)
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
    monkeypatch.setattr(sys.modules[__name__], "HUBS", {})
    with pytest.raises(AssertionError):
        test_ids_are_those_of_our_tokenizer(bpe, lines[:500])  # sources, which hold many


def test_texts_with_masks_get_the_ids_that_sample_py_gives_them(tok):
    hub = hub_of(tok)
    for text in ("The capital of France is [MASK].", "[MASK]", "a [MASK] [MASK] b",
                 "a  [MASK]\n[MASK] [MASK]b", "x[MASK]y", "[MASK] \u65e5[MASK]"):
        assert hub.encode(text).ids == encode_masked(text, tok, 100), text


def test_offsets_tell_where_each_word_stands(tok):
    """Without the space before it, also for [MASK]: transformers finds words by the gaps."""
    for is_classifier in (False, True):
        hub = hub_of(tok, is_classifier)
        text = "The capital of [MASK], it's\n[MASK] \u65e5\u672c  x"
        if is_classifier:  # the names of special ids are no part of its texts
            text = " The capital of France, it's \u65e5\u672c  x "
        found = hub.encode(text)
        parts = {}
        for token, word, (start, end) in zip(found.tokens, found.word_ids, found.offsets):
            if word is not None:
                part = text[start:end]
                assert part.strip() == part or part == "\n", (token, part)
                assert token != "[MASK]" or part == "[MASK]"
                first, _ = parts.get(word, (start, end))
                parts[word] = first, end
        words = [text[start:end] for start, end in parts.values()]
        assert "".join(words).replace(" ", "") == text.replace(" ", "")
        if tok.name != "byte":
            fourth = "France" if is_classifier else "[MASK]"
            assert words[:5] == ["The", "capital", "of", fourth, ","]
        else:
            assert words[:2] == ["The", "capital"]


def test_the_whole_word_collator_sees_words(tok, tmp_path):
    text = "The concepts and the transformers are in the configuration of experiments"
    hub = as_exported(tok, tmp_path)
    collator = transformers.DataCollatorForLanguageModeling(hub, whole_word_mask=True)
    row = hub(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    [of_token], _ = collator._calc_word_ids_and_prob_mask(
        np.array([row["offset_mapping"]]), np.array([row["special_tokens_mask"]]))
    words = {}
    for word, i in zip(of_token, row.input_ids):
        words.setdefault(word, []).append(i)
    del words[-1]  # special tokens
    assert [hub.decode(ids).strip() for ids in words.values()] == text.split()


@pytest.mark.parametrize("is_classifier", [False, True])
def test_words_given_one_by_one_are_read_as_the_text_they_make(is_classifier, tok, tmp_path):
    hub = as_exported(tok, tmp_path, is_classifier)
    if is_classifier and tok.name == "byte":
        with pytest.raises(ValueError, match=r"cannot read words one by one; give .*join\(words\)"):
            hub(["two", "words"], is_split_into_words=True)
        return
    cases = [["The", "capital", "of", "France", ",", "is", "\u65e5\u672c", "x"], ["one"], []]
    if not is_classifier:  # which strips each word, and knows no names of special ids
        cases += [["The", "[MASK]", "of", "[MASK]"], ["[MASK]"], ["a", " b", "", "c\n"]]
    for words in cases:
        found = hub(words, is_split_into_words=True, return_offsets_mapping=True)
        assert found.input_ids == hub(" ".join(words)).input_ids, words
        pieces = dict.fromkeys(range(len(words)), "")
        for word, (start, end) in zip(found.word_ids(), found["offset_mapping"]):
            if word is not None and not pieces[word].endswith(words[word][start:end]):
                pieces[word] += words[word][start:end]
        assert [piece.strip() for piece in pieces.values()] == [word.strip() for word in words]
    batch = [["a", "b", "c"], ["d"]]
    for kind in ("pt", "np"):
        found = hub(batch, is_split_into_words=True, return_offsets_mapping=True, padding=True,
                    return_tensors=kind)
        wanted = [hub(words, is_split_into_words=True, return_offsets_mapping=True).offset_mapping
                  for words in batch]
        assert found["offset_mapping"][0].tolist() == [list(pair) for pair in wanted[0]]
    pair = hub(["a", "b"], ["c", "d"], is_split_into_words=True)
    assert pair.input_ids == hub("a b", "c d").input_ids
    assert pair.input_ids == hub([(["a", "b"], ["c", "d"])], is_split_into_words=True).input_ids[0]


def as_exported(tok, folder, is_classifier=False):
    """The tokenizer as export.py writes it, loaded again."""
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * is_classifier
    known = {(tok, is_classifier, True): hub_of(tok, is_classifier)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_files, "hub_tokenizer", lambda *key: known[key])
        hub_files.write_tokenizer(folder, tok, 48, inputs)
    return hub_tokenizer.EncoderTokenizer.from_pretrained(folder)


def test_the_tokenizer_is_saved_and_loaded_with_its_code(exported, tmp_path):
    hub = transformers.AutoTokenizer.from_pretrained(exported("open")[1], **LOCAL)
    hub.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, **LOCAL)
    words = ["The", "capital"]
    for tok in (hub, again):
        assert tok(words, is_split_into_words=True).input_ids == hub("The capital").input_ids
    plain = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert plain("The [MASK] capital").input_ids == hub("The [MASK] capital").input_ids
    assert hub("").input_ids == [hub.bos_token_id, hub.eos_token_id]


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
    ("open", ["no", "yes"], 2), ("small", ["no", "yes"], 2),
    ("transformer", [], 2), ("older transformer", [], 2), ("older open", ["no", "yes"], 2),
    ("isolated", list("012"), 1), ("isolated", ["a", "b"], 2)])
def test_a_fine_tuned_model_answers_as_it_did(kind, labels, n_texts, tmp_path, bpe):
    # small: an onnx file takes time for each operation in it
    small = KINDS["strict"] | dict(n_layer=1, bias=False, n_mixer=0)
    settings = small if kind == "small" else KINDS[kind.removeprefix("older ")]
    model = make_run(tmp_path / "run", bpe, settings)
    classifier = make_task(tmp_path / "task", model, bpe, labels, n_texts, "older" in kind)
    done = result(export(tmp_path / "run", tmp_path / "hub", f"--task_dir={tmp_path / 'task'}",
                         f"--onnx={int(kind == 'small')}"))
    assert kind != "small" or 0 < done["differences"]["padded onnx logits"] < 1e-4
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

@pytest.mark.parametrize("kind", ["open", "strict", "transformer"])
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
@pytest.mark.parametrize("settings", [ONE, KINDS["strict"] | dict(n_layer=1)],
                         ids=["open", "strict"])
def test_onnxruntime_gives_our_logits_for_other_numbers_and_lengths_of_rows(settings, tmp_path,
                                                                            bpe):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run, to = tmp_path / "run", tmp_path / "hub"
    model = make_run(run, bpe, settings)
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


def test_an_earlier_export_is_replaced_whole_once_the_new_one_is_checked(earlier, monkeypatch):
    run, _, to = earlier
    (to / "model.onnx").write_text("of an older model")
    before = {name: (to / name).read_bytes() for name in os.listdir(to)}
    with monkeypatch.context() as patch:
        tampered_weight(patch)
        refused(export(run, to, ok=False), "logits differ")
    assert {name: (to / name).read_bytes() for name in os.listdir(to)} == before
    assert os.listdir(to.parent) == ["hub"]
    export(run, to)
    assert not (to / "model.onnx").exists() and os.listdir(to.parent) == ["hub"]


def test_other_files_are_never_overwritten(earlier, tmp_path):
    run, _, to = earlier
    refused(export(run, run, ok=False), f"--to={run} is not empty and not an earlier export")
    assert (run / "best.pt").exists()
    refused(export(run, run / "best.pt", ok=False), "is a file")
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
    message = f"to = {to!r}: expected a path" if to == way else "not an earlier"
    refused(export(run, to, ok=False), message)
    assert (tmp_path / "notes/notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == before


def test_a_link_to_an_earlier_export_stays_a_link(one, export_of_one, tmp_path):
    run, _, _ = one
    shutil.copytree(export_of_one, tmp_path / "hub")
    (tmp_path / "link").symlink_to("hub")
    export(run, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "hub/config.json").exists()
    assert {"hub", "link"} <= set(os.listdir(tmp_path)) and not list(tmp_path.glob("*.tmp"))


def test_a_file_put_into_the_folder_during_an_export_survives(
        one, export_of_one, tmp_path, monkeypatch):
    run, _, _ = one
    to = tmp_path / "hub"
    shutil.copytree(export_of_one, to)
    real = hub_files.code_files

    def somebody_writes(encoder):
        (to / "notes.txt").write_text("mine")
        return real(encoder)
    monkeypatch.setattr(hub_files, "code_files", somebody_writes)
    refused(export(run, to, ok=False), "not an earlier export")
    assert (to / "notes.txt").read_text() == "mine" and not list(tmp_path.glob("*.tmp"))


# ---- mistakes --------------------------------------------------------------------------

def test_files_of_an_export_have_the_usual_mode(one):
    run, _, to = one
    before = os.umask(0o027)
    try:
        export(run, to)
    finally:
        os.umask(before)
    modes = {name: (to / name).stat().st_mode & 0o777 for name in os.listdir(to)}
    assert set(modes.values()) == {0o640} and to.stat().st_mode & 0o777 == 0o750


def test_a_setting_that_is_newer_than_a_run_and_its_task_takes_its_default(one, bpe, tmp_path):
    run, model, to = one
    make_task(tmp_path / "task", model, bpe, ["0", "1"])
    for path in (run / "best.pt", tmp_path / "task/model.pt"):
        saved = torch.load(path, weights_only=True)
        for name in ("hide_masked", "max_length", "concept_std", "arch"):
            del saved["model_settings"][name]
        torch.save(saved, path)
    export(run, to)
    export(run, to, f"--task_dir={tmp_path / 'task'}")
    hub = load(to, "AutoModelForSequenceClassification")
    assert hub.config.model_settings["concept_std"] == 1.0


@pytest.mark.parametrize("name, text, parts", [
    ("config.json", "{", ["remove it; the model card then"]),
    ("config.json", "[1]", ["remove it"]),
    ("eval.json", "", ["remove it or measure again: python tools/eval.py --out_dir="]),
    ("eval.json", '{"data": {"d": {"token": {"loss": "low"}}}}', ["measure again"]),
    ("eval.json", '{"data": 3}', ["measure again"]),
    ("glue.json", '{"rte": {"median": {"accuracy": 0.5}}}', ["fine-tune again", "'min'"]),
    ("glue.json", "\x00\xff", ["fine-tune again: python finetune_glue.py --out_dir="])])
def test_a_damaged_file_beside_a_run_is_named_before_the_work(name, text, parts, one, monkeypatch):
    run, _, to = one
    (run / name).write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(hub_files, "code_files", None)  # the work would need it
    refused(export(run, to, ok=False), f"{run}/{name} is damaged", "then export again", *parts)
    assert not to.parent.exists()


def test_numbers_that_are_missing_are_unknown(one):
    run, _, to = one
    saved = torch.load(run / "best.pt", weights_only=True)
    torch.save(saved | dict(best_loss=float("inf")), run / "best.pt")  # stopped before it was known
    (run / "eval.json").write_text(json.dumps(dict(data=dict(d=dict(
        token=dict(loss=None, accuracy=0.1))))))
    (run / "log.jsonl").write_text('{"step": 1, "unigram_entropy": null}\n5\n[]\n')
    export(run, to)
    card = (to / "README.md").read_text()
    for part in ("| best validation loss | unknown a masked token |",
                 "| unigram entropy | unknown |", "| token masks, d | unknown, accuracy 10.0% |"):
        assert part in card, part


def test_what_transformers_has_saved_again_is_never_replaced(earlier, tmp_path):
    run, _, to = earlier
    tuned = load(to)
    tuned.save_pretrained(tmp_path / "tuned")
    transformers.AutoTokenizer.from_pretrained(to, **LOCAL).save_pretrained(tmp_path / "tuned")
    refused(export(run, tmp_path / "tuned", ok=False), "not an earlier export")
    tuned.save_pretrained(to)
    refused(export(run, to, ok=False), "not an earlier export")
    (to / "config.json").write_text("{")
    refused(export(run, to, ok=False), "not an earlier export")


@pytest.mark.parametrize("damage, message", [
    (lambda task: task["head"].pop("out.bias"), "KeyError: 'out.bias'"),
    (lambda task: task["head"].update({"out.bias": torch.zeros(7)}), "size mismatch"),
    (lambda task: task.update(scale=None), "TypeError"),
    (lambda task: task["model_settings"].update(n_concept=0), "n_concept=0: expected 1 or more"),
    (lambda task: task["model_settings"].update(mixer="conv"), "argument 'mixer'"),
    (lambda task: task["model_settings"].update(concept_std=2.0), "another model")])
def test_a_damaged_task_is_named(damage, message, one, bpe, tmp_path):
    run, model, to = one
    make_task(tmp_path / "task", model, bpe, ["0", "1"])
    task = torch.load(tmp_path / "task/model.pt", weights_only=True)
    damage(task)
    torch.save(task, tmp_path / "task/model.pt")
    refused(export(run, to, f"--task_dir={tmp_path / 'task'}", ok=False),
            "task/model.pt cannot be exported", message, "fine-tune again")


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
    # What was measured before the run trained on is not of these weights.
    write("eval.json", dict(step=20, data={"data/mine": masks}))
    write("glue.json", dict(rte=dict(
        tokens=5, median=dict(accuracy=0.61), min=dict(accuracy=0.52), max=dict(accuracy=0.63),
        majority=dict(accuracy=0.53), runs=[1, 2])))
    shutil.rmtree(to)
    export(run, to)
    card = (to / "README.md").read_text()
    assert "5.4321" not in card and "0.6100" not in card


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
