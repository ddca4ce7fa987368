"""Concept health: each measure where its value is known, and models that are not healthy."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import call, refused, result
from test_model import MASK, VARIANTS, batch, small

from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib import evaluation, health
from lib.evaluation import SPLITS, evaluate, split_masks
from lib.machine import find_machine
from masking import MaskedBatch, mask_batch
from model import OwnedAttention

CPU = find_machine("cpu")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- geometry at known values ---------------------------------------------------

def test_orthogonal_concepts_have_full_rank():
    z = torch.eye(16)[None].expand(4, -1, -1)
    found = health.geometry(z)
    assert found["rank"] == pytest.approx(15, rel=1e-3), "centring takes one direction"
    assert found["participation"] == pytest.approx(15, rel=1e-3)
    assert found["duplicates"] == 0 and found["input_dependence"] == pytest.approx(0, abs=1e-6)


def test_collapsed_concepts_are_seen():
    """One vector for all concepts of a row, another for each row."""
    z = noise(32, 1, 24).expand(-1, 8, -1)
    found = health.geometry(z)
    assert found["rank"] < 1e-3 and found["input_dependence"] == pytest.approx(1, abs=1e-3)
    assert found["rankme"] > 15, "the rows do differ"
    line = health.geometry(noise(32, 8, 1) * noise(32, 1, 24, seed=1))
    assert line["rank"] == pytest.approx(1, abs=0.01)
    assert line["participation"] == pytest.approx(1, abs=0.01)
    assert line["cosine"] == pytest.approx(1, abs=1e-3) and line["duplicates"] > 0.3


def test_constants_do_not_depend_on_the_input():
    constants, by_input = noise(1, 8, 24) * 10, noise(64, 8, 24, seed=1)
    low, equal, high = (health.geometry(constants + scale * by_input)["input_dependence"]
                        for scale in (0.1, 10, 1e4))
    assert low < 0.001 and 0.4 < equal < 0.6 and high > 0.98, "1 - 1/B for pure noise"


def test_rank_is_blind_to_scale_and_rotation():
    z, (turn, _) = noise(4, 8, 24), torch.linalg.qr(noise(24, 24, seed=3))
    a, b = health.geometry(z), health.geometry(z @ turn * 7 + 3)
    for name in ("rank", "participation", "cosine"):
        assert a[name] == pytest.approx(b[name], rel=1e-3)


def test_one_concept_and_one_row_have_no_spread():
    found = health.geometry(noise(5, 1, 8))
    assert found["rank"] is None and found["duplicates"] is None and found["rankme"] > 1
    assert health.geometry(noise(1, 4, 8))["input_dependence"] is None


# ---- attention --------------------------------------------------------------------

@pytest.mark.parametrize("variant", [v for v in VARIANTS if "arch" not in v], ids=str)
def test_looked_at_attention_is_what_the_model_used(variant):
    """The slow path returns the weights with which the fused path averaged the values."""
    model, (ids, positions, *_) = small(**variant), batch()
    outputs = []
    hooks = [m.register_forward_hook(lambda m, inputs, output: outputs.append((m, inputs, output)))
             for m in [*health.readers(model), *health.decode_readers(model)]]
    read, decode = health.attention(model, ids, positions, CPU, "fp32")
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(read) + len(decode) and len(read) == model.cfg.n_layer
    for weights, (module, (_, y, _, *own_words), output) in zip(read + decode, outputs):
        total = weights.sum(-1)
        value = y if hasattr(module, "norm") else module.kv(y).chunk(2, dim=-1)[1]
        if isinstance(module, OwnedAttention):
            free = value.shape[-1] - module.n_owned_head * value.shape[-1] // module.n_head
            own_value = module.kv(own_words[0]).chunk(2, dim=-1)[1]
            value = torch.cat((value[..., :free], own_value[..., free:]), dim=-1)
            total = total + (total == 0)  # a concept that owns no word of the row reads nothing
        assert torch.allclose(total, torch.ones(weights.shape[:-1]), atol=1e-5)
        mixed = weights @ value.unflatten(-1, (module.n_head, -1)).transpose(1, 2)
        if getattr(module, "normalize", False):
            mixed = torch.nn.functional.rms_norm(mixed, mixed.shape[-1:])
        mixed = mixed.transpose(1, 2).flatten(2)
        finish = module.norm if hasattr(module, "norm") else module.out
        assert torch.allclose(finish(mixed), output, atol=1e-5)


def test_attention_numbers_at_their_ends():
    uniform, own = torch.full((3, 2, 8, 8), 1 / 8), torch.eye(8).expand(3, 2, -1, -1)
    same = health.attention_use([uniform], [uniform])
    assert same["entropy"] == pytest.approx(1) and same["divergence"] == pytest.approx(0, abs=1e-6)
    assert same["usage_entropy"] == pytest.approx(1) and same["unused"] == 0
    one = F.one_hot(torch.zeros(3, 2, 8, dtype=torch.long), 8).float()
    apart = health.attention_use([own], [one])
    assert apart["entropy"] == pytest.approx(0, abs=1e-6)
    assert apart["divergence"] == pytest.approx(1, abs=1e-5)
    assert apart["position"] == pytest.approx(1)
    assert apart["usage_entropy"] == pytest.approx(0, abs=1e-6)
    assert apart["unused"] == pytest.approx(7 / 8)


def test_top_tokens_are_those_read_more_than_their_frequency():
    tok = SimpleNamespace(is_special=torch.arange(6).numpy() == 5,
                          decode=lambda ids: "abcdef"[ids[0]])
    ids = torch.tensor([[0] * 20 + [1] * 10 + [2] * 10 + [3] * 4 + [5] * 6])
    read = torch.full((1, 3, 50), 1.0)
    read[0, 1, 20:30] = 9.0  # concept 1 reads b
    read[0, 2, 40:44] = 9.0  # concept 2 reads d, which is too rare to say so
    read[0, 2, 30:40] = 2.0
    top = health.top_tokens(read / read.sum(-1, keepdim=True), ids, tok)
    assert top[1][0][0] == "b" and top[1][0][2] == 10 and top[2][0][0] == "c"
    assert top[1][0][1] == pytest.approx(math.log((90 / 130) / (10 / 50)))
    assert all("f" != text and "d" != text for concept in top for text, *_ in concept)


# ---- use by the decoder --------------------------------------------------------------

def test_channel_use_is_what_recomputing_the_loss_gives():
    model, (ids, positions, targets, weights) = small(n_concept=4), batch(B=6)
    masked = MaskedBatch(ids, positions, targets, weights * 0.01, weights > 0)  # scale: no matter
    use = health.channel_use(model, masked, CPU, "fp32", micro_batch=4, one_by_one=True)
    with torch.no_grad():
        concepts, tokens = model.encode(ids)

        def loss(c):
            logits = model.logits(model.decode(c, tokens, positions))
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
        base = loss(concepts)
        without = concepts.clone()
        without[:, 2] = 0
        mean = concepts.mean(0).expand_as(concepts)
        assert use["loss"] == pytest.approx(base, abs=1e-5)
        assert use["shuffled"] == pytest.approx(loss(concepts.roll(3, 0)) - base, abs=1e-5)
        assert use["averaged"] == pytest.approx(loss(mean) - base, abs=1e-5)
        assert use["one_by_one"][2] == pytest.approx(loss(without) - base, abs=1e-5)


def test_padding_is_no_text():
    model, (ids, positions, targets, weights) = small(n_concept=4), batch(B=6, T=16)
    ids = ids.masked_fill(ids == 7, 8)
    padded = F.pad(ids, (0, 9), value=7)
    rows = MaskedBatch(ids, positions, targets, weights, weights > 0)
    plain = health.channel_use(model, rows, CPU, "fp32")
    assert health.channel_use(model, rows._replace(inputs=padded), CPU, "fp32",
                              pad_id=7) == pytest.approx(plain, abs=1e-5)
    concepts, _ = health.encode_rows(model, ids, CPU, "fp32")
    again, _ = health.encode_rows(model, padded, CPU, "fp32", pad_id=7)
    assert torch.allclose(concepts, again, atol=1e-5)
    read, _ = health.attention(model, padded, positions, CPU, "fp32", 7)
    n_free = model.cfg.n_head - health.readers(model)[0].n_owned_head
    assert read[0][:, :n_free, :, -9:].abs().max() < 1e-6


def test_shuffling_one_row_is_impossible_not_zero():
    ids, positions, targets, weights = batch(B=1)
    masked = MaskedBatch(ids, positions, targets, weights, weights > 0)
    assert health.channel_use(small(), masked, CPU, "fp32")["shuffled"] is None


def test_weights_change_the_loss_and_no_count(data_dir, monkeypatch):
    """Accuracy, predicted tokens and bits per byte are about all predictions alike."""
    tok = Tokenizer.load(str(data_dir / "tokenizer"))
    model = small(vocab_size=tok.vocab_size, mask_id=tok.mask_id)
    data = TokenData(str(data_dir), "val", 32, 0)
    frequency = torch.full((tok.vocab_size,), 1 / tok.vocab_size)

    def measured(weigh):
        def weighed(*args, **kwargs):
            batch = mask_batch(*args, **kwargs)
            return batch._replace(weights=weigh(batch))
        monkeypatch.setattr(evaluation, "mask_batch", weighed)
        return evaluate(model, data, tok, CPU, "fp32", rows=8, micro_batch=3, frequency=frequency)

    plain, tiny = measured(lambda b: b.weights), measured(lambda b: b.weights * 1e-3)
    other = measured(lambda b: b.weights * (1 + b.positions % 7))
    assert tiny["loss"] == pytest.approx(plain["loss"], rel=1e-5), "only ratios of weights matter"
    assert other["loss"] != pytest.approx(plain["loss"], rel=1e-5)
    for found in (tiny, other):
        for key in ("accuracy", "predicted", "bits_per_byte"):
            assert found[key] == pytest.approx(plain[key], rel=1e-6)
        shares = [found["splits"][name]["share"] for name in SPLITS]
        assert shares == [plain["splits"][name]["share"] for name in SPLITS]


# ---- where the loss is -----------------------------------------------------------------

def test_splits_follow_a_plain_loop(data_dir):
    inputs, positions, targets, _ = batch(B=4, T=24, K=6, seed=1)
    inputs[:, ::3] = inputs[:, :1]
    inputs = inputs.scatter(1, positions, MASK)
    frequency = torch.logspace(-5, -1, 92)
    found = dict(zip(SPLITS, split_masks(inputs, positions, targets, frequency)))
    for b in range(4):
        for k in range(6):
            p, t = positions[b, k].item(), targets[b, k].item()
            near = min((abs(i - p) for i in range(24) if inputs[b, i] == t), default=None)
            share = frequency[t].item()
            expected = {"copy in the row": near is not None, "no copy": near is None,
                        "copy 1-8 away": near is not None and near <= 8,
                        "copy 9-32 away": near is not None and 8 < near <= 32,
                        "copy 33-128 away": False, "copy over 128 away": False,
                        "frequent, over 1e-3": share > 1e-3,
                        "medium, 1e-4 to 1e-3": 1e-4 <= share <= 1e-3,
                        "rare, under 1e-4": share < 1e-4,
                        "not frequent, with copy": share <= 1e-3 and near is not None,
                        "not frequent, no copy": share <= 1e-3 and near is None}
            assert {name: bool(part[b, k]) for name, part in found.items()} == expected


def test_splits_add_up_to_the_loss(data_dir):
    tok = Tokenizer.load(str(data_dir / "tokenizer"))
    model = small(vocab_size=tok.vocab_size, mask_id=tok.mask_id)
    frequency = torch.full((tok.vocab_size,), 1 / tok.vocab_size)
    data = TokenData(str(data_dir), "val", 32, 0)
    r = evaluate(model, data, tok, CPU, "fp32", rows=20, frequency=frequency)
    for group in (SPLITS[:2], SPLITS[1:6], SPLITS[6:9]):
        parts = [r["splits"][name] for name in group]
        assert sum(p["share"] for p in parts) == pytest.approx(1, abs=1e-4)
        total = sum(p["share"] * (p["loss"] or 0) for p in parts)
        assert total == pytest.approx(r["loss"], rel=1e-4)


# ---- the command -----------------------------------------------------------------------

TINY = ["--dtype=fp32", "--block_size=32", "--n_layer=1", "--n_head=2", "--n_concept=6",
        "--concept_dim=32", "--token_dim=64", "--ffn_dim=32", "--batch_size=4", "--max_steps=4",
        "--eval_interval=2", "--eval_rows=8", "--health_rows=6", "--save_minutes=99"]
TRANSFORMER = [*TINY, "--arch=transformer"]


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("health")
    call("train.py", f"--data_dir={data_dir}", f"--out_dir={folder}/concept", *TINY)
    call("train.py", f"--data_dir={data_dir}", f"--out_dir={folder}/transformer", *TRANSFORMER)
    return folder


def evaluate_run(out_dir, *args, ok=True):
    return call("tools/eval.py", f"--out_dir={out_dir}", *args, ok=ok)


def test_training_logs_the_concepts(runs):
    lines = (runs / "concept" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    evaluated = [r for r in records if "val_loss" in r]
    assert len(evaluated) == 3
    for r in evaluated:
        assert 1 < r["concept_rank"] <= 5 and 0 <= r["input_dependence"] <= 1
        assert {"duplicates", "shuffled", "zeroed"} <= set(r)
    assert "concept_rank" not in (runs / "transformer" / "log.jsonl").read_text()


def test_eval_compares_with_untrained_concepts_and_transformer_tokens(runs):
    done = evaluate_run(f"{runs}/concept", f"--control_dir={runs}/transformer", "--report=1",
                        "--rows=8", "--health_rows=9999", "--dtype=fp32")
    columns = result(done)["health"]
    assert list(columns) == ["trained", "untrained", "Transformer tokens"]
    assert len(columns["trained"]["one_by_one"]) == len(columns["trained"]["usage"]) == 6
    assert columns["trained"]["rank"] != columns["untrained"]["rank"]
    assert columns["Transformer tokens"]["rank"] > 1
    assert "shuffled" not in columns["Transformer tokens"]
    assert "all there are; health_rows=9999" in done.stdout and "effective rank" in done.stdout
    page = (runs / "concept" / "report.html").read_text()
    assert "<html" in page and not re.search(r"""(src|href|url)\s*[=(]\s*["']?https?:""", page)


def test_a_transformer_is_measured_by_its_token_states(runs):
    done = evaluate_run(f"{runs}/transformer", "--report=1", "--rows=8", "--health_rows=8")
    assert result(done)["health"]["trained"]["rank"] > 1
    assert (runs / "transformer" / "report.html").exists()


def test_controls_that_do_not_fit_are_refused(runs):
    done = evaluate_run(f"{runs}/concept", f"--control_dir={runs}/concept", ok=False)
    refused(done, "expected a run with arch=transformer")
    done = evaluate_run(f"{runs}/concept", "--report=1", "--health_rows=0", ok=False)
    refused(done, "health_rows")


def test_broken_weights_are_named_not_measured(runs, tmp_path):
    model = small()
    with torch.no_grad():
        model.layers[0].ffn.out.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        health.encode_rows(model, batch()[0], CPU, "fp32")


def test_one_concept_is_measured_as_far_as_it_goes(data_dir, tmp_path):
    call("train.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", *TINY, "--n_concept=1",
         "--max_steps=1")
    done = evaluate_run(tmp_path, "--rows=8", "--health_rows=8", "--report=1")
    assert result(done)["health"]["trained"]["rank"] is None


def test_a_run_without_evaluations_still_gets_its_report(runs, tmp_path):
    shutil.copytree(runs / "concept", tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").unlink()
    evaluate_run(f"{tmp_path}/run", "--rows=8", "--health_rows=8", "--report=1")
    assert (tmp_path / "run" / "report.html").exists()
    assert "no evaluations" in (tmp_path / "run" / "report.html").read_text()


def test_zero_shot_similarity_reads_glue_and_agrees_with_numpy(runs, tmp_path):
    lines = ["index\tsentence1\tsentence2\tscore"]
    pairs = [("cat", "cat", 5), ("cat", "stone", 2), ("river runs", "stone", 1),
             ("reader", "reader \U0001f600", 4)]
    for i, (a, b, score) in enumerate(pairs):
        lines.append(f"{i}\tThe {a} sees \"it.\tThe {b} sees it.\t{score}")
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n")
    sts = f"--sts={tmp_path}/dev.tsv"
    found = result(evaluate_run(f"{runs}/concept", f"--control_dir={runs}/transformer", "--rows=4",
                                "--health_rows=0", sts))["sts"]
    names = ["table", "tokens", "tokens, max", "concepts", "concepts, max", "all concepts"]
    kinds = ("", ", centred")
    assert set(found["trained"]) == {name + kind for name in names for kind in kinds}
    assert set(found["Transformer"]) == {name + kind for name in names[:3] for kind in kinds}
    assert found["trained"]["concepts, centred"] != found["trained"]["concepts"]
    assert found["trained"]["table"]["spearman"] > 0.5
    assert -1 <= found["trained"]["concepts"]["pearson"] <= 1
    (tmp_path / "dev.tsv").write_text("a\tb\n1\t2\n")
    refused(evaluate_run(f"{runs}/concept", sts, ok=False), "expected GLUE's STS-B")
    for broken in (b"\xff\xfe\x00", b"sentence1\tsentence2\tscore\na\tb\tx\n"):
        (tmp_path / "dev.tsv").write_bytes(broken)
        done = evaluate_run(f"{runs}/concept", sts, ok=False)
        refused(done, "dev.tsv:", "expected GLUE's STS-B")
    refused(evaluate_run(f"{runs}/concept", "--report=7", ok=False), "expected true or false")


@pytest.mark.parametrize("change, level, why", [
    ({}, "good", ""),
    ({"concept_rank": 1.1}, "collapsed", "resemble each other"),
    ({"concept_rank": 20}, "watch", "resemble each other"),
    ({"duplicates": 0.6}, "collapsed", "copies"),
    ({"input_dependence": 0.001}, "collapsed", "hardly depend on the text"),
    ({"shuffled": 0.001}, "watch", "the decoder hardly uses them"),
    ({"shuffled": None}, "good", ""),
    ({"concept_rank": None, "duplicates": None}, "good", "")])
def test_the_numbers_are_read_as_good_watch_or_collapsed(change, level, why):
    values = dict(concept_rank=50.0, duplicates=0.0, input_dependence=0.7, shuffled=0.3,
                  zeroed=0.5) | change
    found, reason = health.reading(values, n_concept=64)
    assert found == level and why in reason and bool(reason) == (level != "good")
    line = health.describe(values, n_concept=64)
    assert line.startswith(f"concepts {level}") and "nats" in line and "\n" not in line
