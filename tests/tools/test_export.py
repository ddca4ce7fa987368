"""Promises of export.py and hub_model.py. CPU, no network, tiny models with random weights."""

import ast
import gc
import json
import os
import sys

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, call, refused, result
from test_tokenizer import ODD, needs_gpt2, random_texts, read_texts

from data.tokenizer import Tokenizer, with_specials
from lib.heads import Classifier, encode_texts, keep_concepts, padded, predict
from lib.run import build_model, model_state, save_checkpoint

transformers = pytest.importorskip("transformers")
hub_model = pytest.importorskip("hub_model")
LOCAL = dict(trust_remote_code=True, local_files_only=True)
SHAPE = dict(block_size=48, n_layer=2, n_head=4, token_dim=64, ffn_dim=64)
CONCEPT = dict(arch="concept", n_concept=8, concept_dim=64) | SHAPE
TRANSFORMER = dict(arch="transformer") | SHAPE
KINDS = {
    "open": CONCEPT,
    "strict": CONCEPT | dict(bottleneck="strict", bias=True, concept_dim=96),
    "sinusoidal": CONCEPT | dict(position="sinusoidal", max_length=96, hide_masked=True, n_concept=7),
    "narrow table": CONCEPT | dict(token_dim=4, n_mixer=1, n_decoder=2, self_attention=True),
    "isolated": CONCEPT | dict(isolate_documents=True),
    "transformer": TRANSFORMER | dict(bias=True),
    "mixers": TRANSFORMER | dict(n_layer=0),
    "registers": TRANSFORMER | dict(n_register=64),
    "isolated transformer": TRANSFORMER | dict(isolate_documents=True),
}


@pytest.fixture(scope="module", autouse=True)
def code_copies(tmp_path_factory):
    """Not in the user's cache."""
    gc.freeze()  # call() collects garbage each time; what the libraries hold is none and takes long to walk through
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("code")))
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train([(ROOT / "README.md").read_text(), (ROOT / "model.py").read_text()] * 2, 700)


def make_run(folder, tok, settings, seed=0, **more):
    """A folder as train.py leaves it, with weights that make a difference everywhere. -> its model."""
    torch.manual_seed(seed)
    model = build_model(settings | dict(vocab_size=tok.vocab_size, mask_id=tok.mask_id, eot_id=tok.eot_id)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    described, weights = model_state(model)
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder, dict(
        model_settings=described, model=weights, step=30, tokens=7680, best_loss=4.5678,
        settings=dict(seed=1, data_dir="/home/someone/data"), tokenizer_fingerprint=tok.fingerprint,
        data_sha256="") | more, "best.pt")
    tok.save(folder / "tokenizer")
    return model


def make_task(folder, model, tok, labels, n_texts=1, **more):
    """A model.pt as finetune_glue.py leaves it, with half the concepts -> its Classifier."""
    torch.manual_seed(1)
    settings, weights = keep_concepts(dict(arch=model.arch) | vars(model.cfg), model.state_dict(), 4)
    classifier = Classifier(build_model(settings), max(1, len(labels)), n_texts).eval()
    classifier.encoder.load_state_dict(weights)
    with torch.no_grad():
        classifier.segments.normal_()
        classifier.out.weight.normal_()
        classifier.out.bias.normal_()
    folder.mkdir(exist_ok=True)
    torch.save(dict(
        model_settings=settings, model=weights,
        head={name: t for name, t in classifier.state_dict().items() if not name.startswith("encoder.")},
        task="mine", labels=labels, n_texts=n_texts, scale=[0.0, 1.0] if labels else [2.5, 1.5],
        tokenizer_fingerprint=tok.fingerprint) | more,
        folder / "model.pt")
    return classifier


def export(run, to, *args, ok=True):
    return call("tools/export.py", f"--out_dir={run}", f"--to={to}", *args, ok=ok)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, bpe):
    """-> function: one of KINDS -> (its model, the folder it is exported to); each is made once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("exported")
            made[kind] = make_run(folder / "run", bpe, KINDS[kind]), folder / "hub"
            assert result(export(folder / "run", folder / "hub"))["arch"] == made[kind][0].arch
        return made[kind]

    return get


@pytest.fixture
def one(tmp_path, bpe):
    """-> (a run, its model, where to export it)."""
    model = make_run(tmp_path / "run", bpe, KINDS["open"] | dict(n_layer=1, n_mixer=1))
    return tmp_path / "run", model, tmp_path / "to" / "hub"


def random_rows(tok, lengths):
    """Rows with masks and marks between documents; the padding is no [PAD] but whatever."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, tok.n_vocab - 5, n) for n in lengths]
    for row in rows:
        row[rng.random(len(row)) < 0.2], row[len(row) // 3] = tok.mask_id, tok.eot_id
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
    assert (found - wanted).abs().max() <= limit * max(1, wanted.abs().max()), (found - wanted).abs().max()


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
def test_the_code_file_needs_nothing_of_the_repository(arch):
    nodes = ast.walk(ast.parse(hub_model.modeling_source(arch)))
    modules = {name.split(".")[0] for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)
               for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
    assert modules == {"math", "dataclasses", "torch", "transformers"}


def test_the_tied_head_is_stored_once(exported):
    from safetensors import safe_open
    model, folder = exported("open")
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}
    assert sum(sizes.values()) == model.num_params() and "encoder.wte" in sizes


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


def test_fill_mask_proposes_what_the_model_holds_likeliest(exported, bpe):
    model, folder = exported("open")
    text = "The loss of the [MASK] is in the file."
    fill = transformers.pipeline("fill-mask", str(folder), device="cpu", trust_remote_code=True)
    found = fill(text, top_k=3)
    before, after = (ids.tolist() for ids in bpe.encode(["The loss of the", " is in the file."]))
    row = torch.tensor([[bpe.eot_id, *before, bpe.mask_id, *after, bpe.eot_id]])
    with torch.no_grad():
        share, best = logits_of(model, row)[(row[0] == bpe.mask_id).nonzero()[0, 0]].softmax(-1).topk(3)
    assert [r["token"] for r in found] == best.tolist() and np.allclose([r["score"] for r in found], share, atol=1e-5)
    assert len(fill([text, "[MASK]"], batch_size=2)) == 2


def test_the_loss_is_the_mean_over_labelled_positions(exported, bpe):
    model, folder = exported("open")
    hub = transformers.AutoModelForMaskedLM.from_pretrained(folder, **LOCAL)
    _, ids, real = random_rows(bpe, (30, 12))
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[1, 5], labels[1, 6] = 65, 66, 67
    positions, targets, weights = torch.tensor([[3, 0], [5, 6]]), torch.tensor([[65, 0], [66, 67]]), torch.tensor(
        [[1.0, 0.0], [1.0, 1.0]])
    assert_same(hub(ids, real, labels=labels).loss, model(ids, positions, targets, weights, attention_mask=real))


# ---- the tokenizer ---------------------------------------------------------------

@pytest.fixture(params=["byte", "bpe", "cl100k", pytest.param("gpt2", marks=needs_gpt2)])
def tok(request, bpe, monkeypatch):
    """cl100k: its pattern and the gaps between its special ids, with some words that no merges lead to."""
    if request.param == "bpe":
        return bpe
    if request.param == "gpt2":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tokenizers/tiktoken_cache"))
    if request.param != "cl100k":
        return Tokenizer.load(request.param)
    from tiktoken_ext import openai_public
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    ranks = bpe.ranks | {f" {word}".encode(): len(bpe.ranks) + i for i, word in enumerate(("zebra", "Concepts"))}
    specials = {"<|endoftext|>": len(ranks) + 1, "<|fim|>": len(ranks) + 9}
    return Tokenizer("cl100k_base", openai_public.cl100k_base()["pat_str"], ranks,
                     with_specials(specials, len(ranks) + 10))


@pytest.fixture(scope="module")
def lines():
    """A few thousand lines: sources, odd and random Unicode, and real text where it is."""
    texts = [line for path in sorted(ROOT.glob("*.py"))[:8] for line in path.read_text().splitlines()]
    texts += ODD + random_texts(1500, 0) + ["a zebra and Concepts zebras", "  x\n\n  y \t\n", "I'M 'LL 12345 1 234"]
    texts += [f"a{chr(c)}b 1{chr(c)} {chr(c)}{chr(c)}x" for c in range(0, 0x30000, 37) if not 0xd800 <= c < 0xe000]
    if SHARED.is_dir():
        texts += [line for text in read_texts("wikipedia_en.valid", 600_000) for line in text.split("\n")][:3000]
    return texts


def test_ids_are_those_of_our_tokenizer(tok, lines):
    hub = hub_model.hub_tokenizer(tok)
    names = regex.compile("|".join(map(regex.escape, tok.specials)))
    texts = [text for text in lines if not names.search(text)]
    for text, ids, found in zip(texts, tok.encode(texts), hub.encode_batch(texts, add_special_tokens=False)):
        assert found.ids == ids.tolist(), text[:80]
    assert all(hub.token_to_id(name) == i for name, i in tok.specials.items())
    assert hub.decode(hub.encode("na\u00efve \u65e5\u672c  x").ids) == "na\u00efve \u65e5\u672c  x"


def test_a_lost_merge_is_noticed_by_the_test_above(bpe, lines, monkeypatch):
    merge = hub_model.last_merge
    monkeypatch.setattr(hub_model, "last_merge", lambda token, ranks: None if token == b" th" else merge(token, ranks))
    with pytest.raises(AssertionError):
        test_ids_are_those_of_our_tokenizer(bpe, lines)


def test_texts_with_masks_get_the_ids_that_sample_py_gives_them(tok):
    body = ast.parse((ROOT / "tools/sample.py").read_text()).body
    [function] = [node for node in body if getattr(node, "name", "") == "encode_masked"]
    exec(compile(ast.Module([function], []), "tools/sample.py", "exec"), ours := {})
    hub = hub_model.hub_tokenizer(tok)
    for text in ("The capital of France is [MASK].", "[MASK]", "a [MASK] [MASK] b", "a  [MASK]\n[MASK] [MASK]b",
                 "x[MASK]y", "[MASK] \u65e5[MASK]"):
        assert hub.encode(text).ids == ours["encode_masked"](text, tok, 100), text


def test_transformers_keeps_all_of_it(exported, bpe):
    hub = transformers.AutoTokenizer.from_pretrained(exported("open")[1], **LOCAL)
    assert hub("a [MASK]\n[MASK] b").input_ids == hub_model.hub_tokenizer(bpe).encode("a [MASK]\n[MASK] b").ids
    assert (hub.pad_token_id, hub.mask_token_id, hub.cls_token_id, hub.sep_token_id, hub.eos_token_id) == (
        bpe.pad_id, bpe.mask_id, bpe.cls_id, bpe.sep_id, bpe.eot_id)
    batch = hub(["one", "a much longer row " * 30], padding=True, truncation=True, return_tensors="pt")
    assert batch.input_ids.shape == (2, 48) and batch.attention_mask[0].sum() == len(hub("one").input_ids)
    assert set(batch) == {"input_ids", "attention_mask"}


# ---- a classifier ------------------------------------------------------------------

@pytest.mark.parametrize("kind, labels, n_texts", [
    ("open", ["no", "yes"], 2), ("transformer", [], 2), ("isolated", list("012"), 1), ("isolated", ["a", "b"], 2)])
def test_a_fine_tuned_model_answers_as_it_did(kind, labels, n_texts, tmp_path, bpe):
    model = make_run(tmp_path / "run", bpe, KINDS[kind])
    classifier = make_task(tmp_path / "task", model, bpe, labels, n_texts)
    done = result(export(tmp_path / "run", tmp_path / "hub", f"--task_dir={tmp_path / 'task'}",
                         f"--onnx={int(kind == 'open')}"))
    assert kind != "open" or 0 < done["differences"]["padded onnx logits"] < 1e-4
    hub = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hub", **LOCAL)
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub", **LOCAL)
    pairs = [("  The loss is low.\n", "It is "), ("a", "b " * 60), ("x y z " * 40, " tail "), ("one", "two, three")]
    for case in (pairs, [pair[:1] for pair in pairs]):
        rows, segments, _ = encode_texts(case, bpe, 48)
        batch = tok(*map(list, zip(*case)), padding=True, truncation=True, return_tensors="pt")
        assert [ids[:n].tolist() for ids, n in zip(batch.input_ids, map(len, rows))] == [row.tolist() for row in rows]
        machine = type("cpu", (), dict(take=staticmethod(lambda parts: parts), device=torch.device("cpu")))
        wanted = torch.from_numpy(predict(classifier, (rows, segments), bpe.pad_id, machine, "fp32")).float()
        with torch.no_grad():
            assert_same(hub(**batch).logits, wanted if labels else wanted * 1.5 + 2.5)
    assert hub.config.problem_type == ("single_label_classification" if labels else "regression")
    assert list(hub.config.id2label.values()) == (labels or ["score"])
    classify = transformers.pipeline("text-classification", str(tmp_path / "hub"), device="cpu", trust_remote_code=True)
    assert classify(dict(text="one", text_pair="two"))["label"] in (labels or ["score"])


def test_a_fresh_head_learns_and_is_saved_and_loaded(exported, tmp_path):
    _, to = exported("open")
    auto = transformers.AutoModelForSequenceClassification
    assert auto.from_pretrained(to, n_texts=2, **LOCAL).out.in_features == 2 * 64
    model = auto.from_pretrained(to, num_labels=3, **LOCAL)
    tok = transformers.AutoTokenizer.from_pretrained(to, **LOCAL)
    assert 0.01 < model.out.weight.std() < 0.03 and not model.out.bias.any() and not model.segments.any()
    batch, labels = tok(["good", "bad", "so so and so on"], padding=True, return_tensors="pt"), torch.tensor([0, 1, 2])
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
    for kind, n, labels in (("regression", 1, torch.rand(3)), ("multi_label_classification", 4, torch.ones(3, 4))):
        model = auto.from_pretrained(to, num_labels=n, problem_type=kind, **LOCAL).eval()
        logits, loss = model(**batch).logits, model(**batch, labels=labels).loss
        assert_same(loss, F.mse_loss(logits[:, 0], labels) if n == 1 else F.softplus(-logits).mean())


# ---- other libraries ----------------------------------------------------------------

@pytest.mark.parametrize("kind", ["open", "transformer"])
def test_sentence_transformers_gives_our_embeddings(kind, exported, bpe):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, folder = exported(kind)
    texts = ["one text", "another one, of which there is more", "a b c d"]  # one of them has as many ids as concepts
    found = sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", **LOCAL).encode(texts)
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
    assert {(i.name, i.type) for i in session.get_inputs()} == {(name, "tensor(int64)") for name in (
        "input_ids", "attention_mask")}
    for lengths in ((48, 1, 17), (3,), (5, 30, 30, 30, 29)):
        rows, ids, real = random_rows(bpe, lengths)
        [logits] = session.run(None, dict(input_ids=ids.numpy(), attention_mask=real.numpy()))
        for found, row in zip(logits, rows):
            assert_same(torch.from_numpy(found[:row.shape[1]]), logits_of(model, row), 1e-4)


# ---- nothing but what was checked ------------------------------------------------------

def tampered_weight(monkeypatch):
    import safetensors.torch
    save = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, *args, **kwargs: save(
        tensors | {"encoder.norm.weight": tensors["encoder.norm.weight"] + 1e-3}, *args, **kwargs))


def lost_weight(monkeypatch):
    import safetensors.torch
    save = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, *args, **kwargs: save(
        {name: t for name, t in tensors.items() if name != "encoder.norm.weight"}, *args, **kwargs))


def lost_merge(monkeypatch):
    merge = hub_model.last_merge
    monkeypatch.setattr(hub_model, "last_merge", lambda token, ranks: None if token == b" th" else merge(token, ranks))


def other_code(monkeypatch):
    source = hub_model.modeling_source
    monkeypatch.setattr(hub_model, "modeling_source", lambda arch: source(arch).replace("F.gelu(a)", "F.relu(a)"))


def broken_code(monkeypatch):
    source = hub_model.modeling_source
    monkeypatch.setattr(hub_model, "modeling_source", lambda arch: source(arch) + "\n1 / 0\n")


@pytest.mark.parametrize("damage, message", [
    (tampered_weight, "logits differ from the run's by"), (lost_weight, "did not find the weights"),
    (lost_merge, "tokenizer differs"), (other_code, "logits differ from the run's by"), (broken_code, "ZeroDivision")])
def test_what_differs_is_refused_and_leaves_nothing_behind(damage, message, one, monkeypatch):
    run, _, to = one
    damage(monkeypatch)
    refused(export(run, to, ok=False), "error", message)
    assert not to.exists() and not os.listdir(to.parent)


def test_an_earlier_export_stays_until_the_new_one_is_checked_and_is_then_replaced_whole(one, monkeypatch):
    run, _, to = one
    export(run, to)
    (to / "model.onnx").write_text("of an older model")
    before = {name: (to / name).read_bytes() for name in os.listdir(to)}
    with monkeypatch.context() as patch:
        tampered_weight(patch)
        refused(export(run, to, ok=False), "logits differ")
    assert {name: (to / name).read_bytes() for name in os.listdir(to)} == before and os.listdir(to.parent) == ["hub"]
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


# ---- mistakes --------------------------------------------------------------------------

def test_mistakes_end_in_one_message(one, tmp_path, bpe, monkeypatch):
    run, model, to = one
    refused(export(tmp_path / "none", to, ok=False), "holds no checkpoint; train first")
    refused(export(run, to, f"--task_dir={tmp_path / 'none'}", ok=False), "holds no model.pt", "finetune_glue.py")
    make_task(tmp_path / "task", model, bpe, ["0", "1"], tokenizer_fingerprint="another")
    refused(export(run, to, f"--task_dir={tmp_path / 'task'}", ok=False), "another model or tokenizer")
    torch.save(dict(model={}), tmp_path / "task/model.pt")
    refused(export(run, to, f"--task_dir={tmp_path / 'task'}", ok=False), "was not written by finetune_glue.py")
    (tmp_path / "task/model.pt").write_bytes((run / "best.pt").read_bytes()[:5000])
    refused(export(run, to, f"--task_dir={tmp_path / 'task'}", ok=False), "cannot be read as a checkpoint")
    refused(export(run, to, "--push=me", ok=False), "expected --push=USER/REPO")
    refused(export(run, to, "--private=1", ok=False), "expected --push=USER/REPO")
    (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:5000])
    refused(export(run, to, ok=False), "best.pt", "holds no checkpoint")
    make_run(run, bpe, KINDS["mixers"])
    (run / "tokenizer/tokenizer.tiktoken").unlink()
    refused(export(run, to, ok=False), "tokenizer.tiktoken is missing or damaged")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(export(run, to, ok=False), "safetensors.torch is not installed; pip install -r", "requirements-extra.txt")
    assert not to.parent.exists()


# ---- card and hub -----------------------------------------------------------------------

def test_the_model_card_holds_the_numbers_of_the_run_and_no_paths(one):
    run, model, to = one
    (run / "config.json").write_text(json.dumps(dict(git="abc1234", torch="2.13.0")))
    (run / "log.jsonl").write_text(json.dumps(dict(step=30, val_loss=4.6, unigram_entropy=6.4321)) + "\n")
    (run / "eval.json").write_text(json.dumps(dict(step=30, data={"data/mine": {
        "unigram_entropy": 6.4, "span": dict(loss=5.4321, accuracy=0.125)}})))
    (run / "glue.json").write_text(json.dumps(dict(rte=dict(
        median=dict(accuracy=0.61), min=dict(accuracy=0.52), max=dict(accuracy=0.63), majority=dict(accuracy=0.53),
        runs=[1, 2]))))
    export(run, to)
    card = (to / "README.md").read_text()
    for part in (f"{model.num_params():,}", "7,680 tokens in 30 steps", "4.5678", "6.4321", "git abc1234", "5.4321",
                 "12.5%", "0.6100 [0.5200, 0.6300]", 'pipeline("fill-mask", "hub", trust_remote_code=True)'):
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
    assert result(done)["pushed"] == "https://hub/me/mine?private=True" and "secret" not in done.stdout
    assert pushed == [("me/mine", sorted(os.listdir(to)))] and "me/mine" in (to / "README.md").read_text()

    def no_network(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Hub, "upload_folder", no_network)
    refused(export(run, to, "--push=me/mine", ok=False), "is written and checked, but not pushed", "no route to host")
    assert (to / "model.safetensors").exists()
