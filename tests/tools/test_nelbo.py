"""tools/nelbo.py and eval.py --nelbo=1: the bound is the right number, and so is its error."""

import itertools
import json
import math
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused, result, run
from test_eval import make_run

from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib import evaluation
from lib.machine import Machine, find_machine
from lib.run import load_run
from lib.settings import build_model
from masking import mask_batch
from tools.nelbo import likelihood_bound

CPU = find_machine("cpu")
FLAGS = ["--nelbo=1", "--rows=5", "--health_rows=0", "--dtype=fp32"]


class Rows:
    """In place of a TokenData: rows ids (n, T)."""

    def __init__(self, ids, padded=False):
        self.ids, self.n_blocks, self.padded = ids, len(ids), padded

    def block(self, index):
        return self.ids[index]


class Stub:
    """In place of a model: logits_of(inputs (B,T)) -> (B,T,V)."""

    def __init__(self, logits_of):
        self.logits_of, self.inputs, self.is_real = logits_of, [], None

    def encode(self, inputs, is_real):
        self.inputs.append(inputs)
        self.is_real = is_real
        return self.logits_of(inputs), None

    def documents(self, inputs, is_real=None):
        return None

    def decode(self, concepts, tokens, positions, documents, is_real):
        return concepts.gather(1, positions[..., None].expand(-1, -1, concepts.shape[-1]))

    def logits(self, states):
        return states


# ---- a toy of which the true value is known -------------------------------------------------

T, N_IDS, EOT = 4, 4, 3  # rows of ids 0 to 2, and EOT, which ends a document
TOY = Tokenizer.of_ids(N_IDS, EOT)
CHANCES = torch.tensor([0.5, 0.2, 0.1, 0.2])  # of the four ids
TABLE = 1.5 * torch.randn(5**T, T, TOY.vocab_size, generator=torch.Generator().manual_seed(0))


def toy_logits(inputs):
    """Any function of all that is visible: a row of TABLE for each of the 5**T inputs."""
    digits = torch.where(inputs == TOY.mask_id, 4, inputs)
    return TABLE[(digits * 5 ** torch.arange(T)).sum(1)]


def toy_rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(CHANCES, n * T, replacement=True, generator=generator).view(n, T)


@cache
def enumerated():
    """The bound in nats a token over all rows, all numbers k and all masks of k tokens."""
    nats = tokens = 0.0
    for row in itertools.product(range(N_IDS), repeat=T):
        ids, chance = torch.tensor(row), math.prod(CHANCES[list(row)].tolist())
        places = [i for i in range(T) if row[i] != EOT]
        tokens += chance * len(places)
        for k in range(1, len(places) + 1):
            masks = list(itertools.combinations(places, k))
            inputs = ids.repeat(len(masks), 1)
            for mask, visible in zip(masks, inputs):
                visible[list(mask)] = TOY.mask_id
            cost = -toy_logits(inputs).log_softmax(-1)[:, range(T), ids]
            of_masks = [c[list(mask)].mean().item() for c, mask in zip(cost, masks)]
            nats += chance * sum(of_masks) / len(masks)  # N / N: k is uniform in 1..N
    return nats / tokens


def test_the_bound_of_an_enumerable_toy_is_the_enumerated_one():
    found = likelihood_bound(Stub(toy_logits), Rows(toy_rows(3000, 0)), TOY, CPU, "fp32", 3000, 8,
                             500)
    assert abs(found["nats"] - enumerated()) < 3 * found["se"] < 0.1
    assert found["ppl"] == pytest.approx(math.exp(found["nats"]))


def test_the_standard_error_is_the_error():
    """Over repetitions with other rows and masks, errors are as large as it says, and unbiased."""
    exact, scores, n = enumerated(), [], 60
    for seed in range(n):
        found = likelihood_bound(Stub(toy_logits), Rows(toy_rows(100, seed)), TOY, CPU, "fp32", 100,
                                 8, 100, seed=seed)
        scores.append((found["nats"] - exact) / found["se"])
    assert abs(np.mean(scores)) < 3 / n**0.5
    assert abs(np.std(scores) - 1) < 3 / (2 * n) ** 0.5


def test_special_tokens_are_never_hidden_and_not_counted():
    ids, model = toy_rows(40, 0), Stub(toy_logits)
    found = likelihood_bound(model, Rows(ids), TOY, CPU, "fp32", 30, 8, 40)
    assert found["tokens"] == (ids[:30] != EOT).sum() and found["rows"] == 30
    for inputs in model.inputs:
        assert ((inputs == EOT) == (ids[:30] == EOT)).all()
    # A row of special tokens alone changes nothing.
    with_empty = Rows(torch.cat((ids[:30], torch.full((5, T), EOT))))
    assert likelihood_bound(model, with_empty, TOY, CPU, "fp32", 99, 8, 40) == found
    padded = ids[:30].clone()
    padded[:, 2:] = TOY.pad_id
    found = likelihood_bound(model, Rows(padded, padded=True), TOY, CPU, "fp32", 30, 8, 40)
    assert found["tokens"] == (ids[:30, :2] != EOT).sum()
    assert (model.is_real == (padded != TOY.pad_id)).all(), "the model is told"
    with pytest.raises(ValueError, match="special tokens only"):
        likelihood_bound(model, Rows(torch.full((5, T), EOT)), TOY, CPU, "fp32")


def test_every_row_sees_few_and_many_masks():
    ids, model = torch.zeros(6, 64, dtype=torch.int64), Stub(lambda x: torch.zeros(len(x), 64, 4))
    likelihood_bound(model, Rows(ids), Tokenizer.of_ids(4), CPU, "fp32", 6, 8, 6)
    hidden = torch.stack([(inputs != 0).sum(1) for inputs in model.inputs])  # (draws, rows)
    for draw, counts in enumerate(hidden):
        assert ((counts >= 8 * draw + 1) & (counts <= 8 * draw + 8)).all(), "an eighth of 1..64"
    assert len(hidden[0].unique()) > 3, "each row at a place of its own"
    pairs = hidden[0::2] + hidden[1::2] - 16 * torch.arange(4)[:, None] * 2
    assert ((pairs - 17).abs() <= 1).all(), "the second of two draws is the mirror of the first"


# ---- data without anything to learn ---------------------------------------------------------

def uniform_rows(n, seed):
    return torch.randint(31, (n, 16), generator=torch.Generator().manual_seed(seed))


def test_a_uniform_model_has_the_logarithm_of_the_number_of_symbols():
    model = Stub(lambda x: torch.zeros(*x.shape, 31))
    found = likelihood_bound(model, Rows(uniform_rows(99, 0)), Tokenizer.of_ids(31), CPU, "fp32",
                             99, 8, 32)
    assert found["nats"] == pytest.approx(math.log(31), abs=1e-6) and found["se"] < 1e-6
    assert found["ppl"] == pytest.approx(31, abs=1e-3)
    alone = likelihood_bound(model, Rows(uniform_rows(1, 0)), Tokenizer.of_ids(31), CPU, "fp32")
    assert alone["se"] is None, "one row says nothing about others"


def test_a_model_trained_on_uniform_noise_does_not_go_below_its_entropy():
    """ln 31 = 3.434 nats a symbol: lower, and hidden tokens would reach the model."""
    tok = Tokenizer.of_ids(31)
    torch.manual_seed(0)
    model = build_model(dict(
        arch="concept", bottleneck="strict", vocab_size=tok.vocab_size, block_size=16, n_layer=1,
        n_head=2, n_concept=8, concept_dim=32, token_dim=32, ffn_dim=32, mask_id=tok.mask_id,
        eot_id=tok.eot_id))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    n_steps = 120
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / n_steps)
        numbers = torch.arange(64) + 64 * step
        batch = mask_batch(uniform_rows(64, step), numbers, "diffusion", 1.0, tok)
        model(batch.inputs, batch.positions, batch.targets, batch.weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = likelihood_bound(model.eval(), Rows(uniform_rows(200, n_steps)), tok, CPU, "fp32", 200,
                             8, 100)
    assert abs(found["nats"] - math.log(31)) < 3 * found["se"] < 0.01
    assert found["bpb"] is None and found["word_ppl"] is None and found["bytes"] is None


# ---- any model, any number of processes -----------------------------------------------------

@pytest.fixture(scope="module")
def bytes_of(data_dir):
    """-> tokenizer, rows of 64 bytes of the val split."""
    return Tokenizer.load(str(data_dir / "tokenizer")), TokenData(str(data_dir), "val", 64)


@pytest.mark.parametrize("shape", [dict(bottleneck="open"), dict(bottleneck="strict"),
                                   dict(arch="transformer")])
def test_batches_and_memory_do_not_change_the_result(shape, bytes_of, tmp_path, monkeypatch):
    tok, data = bytes_of
    model, *_ = load_run(make_run(tmp_path / "run", tok, **shape), "cpu")
    found = likelihood_bound(model, data, tok, CPU, "fp32", 7, 8, micro_batch=7)
    assert found["rows"] == 7 and 0 < found["nats"] < 20
    monkeypatch.setattr(evaluation, "MOST_LOGITS", 5 * tok.vocab_size)
    one_by_one = likelihood_bound(model, data, tok, CPU, "fp32", 7, 8, micro_batch=2)
    assert one_by_one == pytest.approx(found, rel=1e-5)


class Part(Machine):
    """One of several processes, which keeps its sums to itself."""

    def all_sum(self, *values):
        return [float(value) for value in values]


@pytest.mark.parametrize("world_size", [1, 3])
def test_words_and_bytes_are_those_of_the_text(world_size, bytes_of):
    """Words are cut by the ends of rows, and each counts once."""
    tok, _ = bytes_of
    texts = ["A model, it says,  reads\n12,345 words.", "Zürich (1848)", "x" * 70, "the end"]
    for T in (5, 16, 1000):
        stream = [i for ids in tok.encode(texts) for i in (*ids.tolist(), tok.eot_id)]
        stream += [tok.eot_id] * (-len(stream) % T)
        model = Stub(lambda x: torch.zeros(*x.shape, tok.vocab_size))
        rows = Rows(torch.tensor(stream).view(-1, T))
        parts = [likelihood_bound(model, rows, tok, Part(CPU.device, rank, world_size), "fp32", 99,
                                  8, 4) for rank in range(min(world_size, rows.n_blocks))]
        text_bytes = sum(len(text.encode()) for text in texts)
        assert sum(part["bytes"] for part in parts) == text_bytes
        assert sum(part["tokens"] for part in parts) == text_bytes
        assert sum(part["words"] for part in parts) == 7 + 2 + 1 + 2
        if world_size == 1:
            [part] = parts
            bits = math.log2(tok.vocab_size)  # of a byte
            assert part["bpb"] == pytest.approx(bits, rel=1e-6)
            expected = text_bytes * bits * math.log(2) / 12
            assert math.log(part["word_ppl"]) == pytest.approx(min(expected, 100), rel=1e-6)


# ---- the command ----------------------------------------------------------------------------

def words_of(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def measured(data_dir, tmp_path_factory):
    """eval.py --nelbo=1 on two data sets -> (folder of the run, second data set, what it printed).
    """
    folder = tmp_path_factory.mktemp("nelbo")
    second = shutil.copytree(data_dir, folder / "second")
    out = make_run(folder / "run", Tokenizer.load(str(data_dir / "tokenizer")), data_dir)
    return Path(out), second, call("tools/eval.py", f"--out_dir={out}", *FLAGS,
                                   f"--data_dir={data_dir},{second}")


def test_several_data_sets_are_one_table_and_one_key(measured, data_dir):
    out, second, done = measured
    found = result(done)["nelbo"]
    assert list(found) == [str(data_dir), str(second)]
    first, again = found.values()
    assert first == again, "the same bins under another name"
    assert set(first) >= {"nats", "se", "ppl", "bpb", "word_ppl", "tokens", "rows", "draws"}
    assert first["rows"] == 5 and first["draws"] == 8 and first["se"] > 0
    assert first["bpb"] == pytest.approx(first["nats"] / math.log(2)), "a token is a byte here"
    _, table = done.stdout.split("\nlikelihood bound")
    for name in found:
        line = table.split(f"\n{name} ")[1].split("\n")[0]
        names = ("nats", "se", "ppl", "bpb", "word_ppl")
        shown = [float(cell.replace(",", "")) for cell in line.split()]
        assert shown[:5] == pytest.approx([first[name] for name in names], rel=1e-3)
        assert shown[5:] == [5, first["tokens"]]
    # The one draw of each row that the losses of the masks have is the same number, less exactly.
    one = result(done)["data"][str(data_dir)]["diffusion"]["loss"]
    assert abs(first["nats"] - one) < 0.3
    fields = json.loads((out / "metrics.json").read_text())
    assert fields["nelbo_nats"] == first["nats"] and fields["nelbo_draws"] == 8
    assert "| nelbo_se |" in (out / "summary.md").read_text()


def test_the_head_of_the_table_says_what_is_counted(measured, data_dir, tmp_path):
    text = words_of(measured[2].stdout)
    for part in ("Special tokens (end of document, padding) are never hidden and not counted",
                 "MDLM counts them", "packed rows of 64 tokens", "Words are separated by white",
                 "Trained with masking_type=span and mlm_probability=0.3",
                 "the bound holds, but is loose"):
        assert part in text, part
    out = shutil.copytree(measured[0], tmp_path / "run")
    checkpoint = torch.load(out / "best.pt", weights_only=True)
    checkpoint["settings"] |= dict(masking_type="diffusion", mlm_probability=1.0)
    torch.save(checkpoint, out / "best.pt")
    assert "is loose" not in call("tools/eval.py", f"--out_dir={out}", *FLAGS).stdout


def test_two_processes_find_what_one_finds(measured, data_dir, tmp_path):
    out = shutil.copytree(measured[0], tmp_path / "run")
    done = run("tools/eval.py", f"--out_dir={out}", *FLAGS, nproc=2, timeout=60)
    [found] = result(done)["nelbo"].values()
    assert found == pytest.approx(result(measured[2])["nelbo"][str(data_dir)], rel=1e-5)


def test_ids_without_text_have_nats_and_perplexity(tmp_path):
    ids = np.random.default_rng(0).integers(0, 31, (100, 40))
    ids[:, -1] = 31
    np.save(tmp_path / "ids.npy", ids.ravel())
    call("prepare.py", f"--input={tmp_path}/ids.npy", f"--out_dir={tmp_path}/bins",
         "--vocab_size=32", "--eot_id=31", "--val_fraction=0.5")
    out = make_run(tmp_path / "run", Tokenizer.load(str(tmp_path / "bins/tokenizer")),
                   tmp_path / "bins")
    done = call("tools/eval.py", f"--out_dir={out}", *FLAGS)
    [found] = result(done)["nelbo"].values()
    assert found["bpb"] is None and found["word_ppl"] is None and found["ppl"] > 20
    assert found["tokens"] < 5 * 64, "31 ends a document"


def test_compared_runs_have_their_bounds_side_by_side(measured, tmp_path):
    runs = [shutil.copytree(measured[0], tmp_path / name) for name in "ab"]
    for path in runs:
        with open(path / "log.jsonl", "a") as file:
            file.write('{"step": 5, "tokens": 2560, "val_loss": 6.5}\n')  # a curve to draw
    done = call("tools/eval.py", f"--compare={runs[0]},{runs[1]}", *FLAGS)
    [found] = [r["nelbo"] for r in result(done)["runs"].values()][:1]
    [bound] = found.values()
    assert "likelihood bound of this text, 8 masks a row" in done.stdout
    line = done.stdout.split("likelihood bound of")[1].split("nats/token")[1].split("\n")[0]
    assert line.split() == [f"{bound['nats']:.4f}*"] * 2


@pytest.mark.parametrize("flags, parts", [
    (["--nelbo=1", "--nelbo_draws=0"], ["nelbo_draws=0: expected 8 or more", "fewer --rows"]),
    (["--nelbo=1", "--nelbo_draws=7"], ["nelbo_draws=7"]),
    (["--nelbo_draws=16"], ["nelbo_draws=16 is of the bound; add --nelbo=1"]),
    (["--nelbo=2"], ["nelbo = '2'", "true or false"])])
def test_mistakes_end_in_one_message(measured, flags, parts):
    done = call("tools/eval.py", f"--out_dir={measured[0]}", *flags, ok=False)
    refused(done, *parts)


def test_data_of_another_tokenizer_is_refused(measured, tmp_path):
    (tmp_path / "text.txt").write_text((ROOT / "masking.py").read_text())
    call("prepare.py", f"--input={tmp_path}/text.txt", f"--out_dir={tmp_path}/bins",
         "--tokenizer=bpe:512", "--num_proc=1")
    done = call("tools/eval.py", f"--out_dir={measured[0]}", "--nelbo=1",
                f"--data_dir={tmp_path}/bins", ok=False)
    refused(done, "was prepared with another tokenizer")
