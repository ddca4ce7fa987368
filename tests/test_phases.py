"""Encoder and decoder in one loop: objectives, what one run hands to the next, three phases, and
rows of 32,768 tokens in one command."""

import json
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused, result, run, start
from test_train import evaluations, losses, train

from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib.baselines import Transformer, TransformerConfig
from lib.evaluation import evaluate
from lib.machine import Machine
from lib.run import load_run, read_checkpoint, take_weights
from masking import next_tokens

pytestmark = pytest.mark.long

DECODER = ["--arch=transformer", "--objective=clm"]
RESONANCE = ["--arch=resonance", "--objective=clm", "--n_frequency=8", "--mixers=ra"]


@pytest.fixture(scope="module")
def decoder(data_dir, tmp_path_factory):
    """The out_dir of a small causal Transformer."""
    out = tmp_path_factory.mktemp("runs") / "decoder"
    train(data_dir, out, *DECODER)
    return out


def test_every_token_but_the_first_is_a_target():
    tok = Tokenizer.load("byte")
    ids = torch.tensor([[5, 6, 7, tok.pad_id], [8, tok.eot_id, 9, 10]])
    batch = next_tokens(ids, tok)
    assert batch.positions.tolist() == [[0, 1, 2]] * 2
    assert batch.targets.tolist() == [[6, 7, tok.pad_id], [tok.eot_id, 9, 10]]
    assert batch.weights.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert torch.equal(batch.inputs, ids)


@pytest.mark.parametrize("args", [DECODER, RESONANCE], ids=["attention", "hybrid"])
def test_a_decoder_learns_and_resumes_bitwise(args, data_dir, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    schedule = "--batch_schedule=2:0.25,0.5:0.25,8:0.5"
    summary = result(train(data_dir, whole, *args, schedule, "--dropout=0.1"))
    assert summary["val_loss"] < evaluations(whole)[0]["val_loss"] - 0.5
    for more in (["--stop_at_step=7"], []):
        train(data_dir, halves, *args, schedule, "--dropout=0.1", *more)
    assert losses(whole) == losses(halves)


@pytest.mark.parametrize("args", [DECODER, RESONANCE], ids=["attention", "hybrid"])
def test_processes_and_micro_batches_give_a_decoder_the_same_losses(args, data_dir, tmp_path):
    more = [*args, "--batch_schedule=4:0.5,8:0.5", "--max_steps=6", "--rows=document"]
    train(data_dir, tmp_path / "one", *more)
    train(data_dir, tmp_path / "two", *more, "--micro_batch=2", nproc=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


def test_the_loss_of_a_decoder_is_that_of_its_logits(decoder, data_dir):
    """Nats and bits per byte against a sum over the logits of whole rows."""
    model, tok, _ = load_run(decoder, "cpu")
    data = TokenData(str(data_dir), "val", 64)
    found = evaluate(model, data, tok, Machine(torch.device("cpu"), 0, 1), "fp32", rows=8)
    ids = data.block(range(8))
    with torch.no_grad():
        where = torch.arange(64).expand(8, -1)
        logits = model.logits(model.decode(*model.encode(ids), where))[:, :-1]
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").double()
    used = (ids[:, 1:] != tok.pad_id).flatten()
    assert found["loss"] == pytest.approx(nats[used].mean().item(), abs=1e-6)
    n_bytes = torch.from_numpy(tok.n_bytes)[ids[:, 1:].flatten()][used].sum().item()
    assert found["bits_per_byte"] == pytest.approx(nats[used].sum().item() / math.log(2) / n_bytes)


def test_random_tokens_cost_a_decoder_their_entropy(tmp_path):
    """Independent tokens of 31 kinds: ln 31 is the floor, and nothing below it can be right."""
    ids = np.random.default_rng(0).integers(0, 31, (1000, 512)).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    call("prepare.py", f"--input={tmp_path}/ids.npy", f"--out_dir={tmp_path}/bins",
         "--vocab_size=32", "--eot_id=31", "--val_fraction=0.2")
    for name, args in (("attention", DECODER), ("resonance", RESONANCE)):
        done = result(train(tmp_path / "bins", tmp_path / name, *args, "--max_steps=150",
                            "--eval_interval=150", "--eval_rows=400", "--batch_size=32",
                            "--micro_batch=32", "--learning_rate=1e-2", "--n_mixer=0",
                            "--init_table=random"))
        assert done["val_loss"] == pytest.approx(math.log(31), abs=0.01)


# ---- from one objective to another ---------------------------------------------------------------


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
def test_a_decoder_goes_on_as_an_encoder(objective, decoder, data_dir, tmp_path):
    """At step 0 the weights are those of the decoder; only who sees whom has changed."""
    out = tmp_path / "encoder"
    args = ["--arch=transformer", f"--objective={objective}", f"--init_from={decoder}"]
    done = train(data_dir, out, *args, "--stop_at_step=1", "--max_steps=20")
    assert f"trained as clm, now {objective}; the optimizer state is fresh" in done.stdout
    train(data_dir, out, *args)
    first, *_, last = [r["val_loss"] for r in evaluations(out)]
    assert last < first - 0.3
    model, tok, taken = load_run(decoder, "cpu")
    encoder, _, _ = load_run(out, "cpu")
    config = dict(objective=objective, optimizer="adamw", data_dir="")
    take_weights(encoder, str(decoder), tok, config)
    weights = encoder.state_dict()
    assert all(torch.equal(weights[k], t) for k, t in model.state_dict().items())
    assert model.cfg.causal and not encoder.cfg.causal
    # one token more at the end: the encoder notices, the decoder does not
    ids = torch.tensor([list(b"The cat reads the ri")])
    changed = torch.cat((ids[:, :-1], ids[:, :1]), dim=1)
    where = torch.tensor([[10]])
    for one, sees in ((model.eval(), False), (encoder.eval(), True)):
        with torch.no_grad():
            a, b = (one.decode(*one.encode(row), where) for row in (ids, changed))
        assert torch.equal(a, b) != sees


def test_an_encoder_goes_on_as_a_decoder(data_dir, decoder, tmp_path):
    train(data_dir, tmp_path / "encoder", "--arch=transformer")
    done = train(data_dir, tmp_path / "decoder", *DECODER, f"--init_from={tmp_path}/encoder")
    assert "trained as mlm, now clm" in done.stdout
    first, *_, last = [r["val_loss"] for r in evaluations(tmp_path / "decoder")]
    assert last < first


def test_mntp_predicts_a_masked_token_from_the_state_before_it(data_dir, tmp_path):
    train(data_dir, tmp_path, "--arch=transformer", "--objective=mntp", "--max_steps=1")
    model, tok, _ = load_run(tmp_path, "cpu")
    ids = torch.arange(30)[None] + 60
    concepts, tokens = model.encode(ids)
    object.__setattr__(model.cfg, "mntp", False)
    plain = model.decode(concepts, tokens, torch.tensor([[7, 0]]))
    object.__setattr__(model.cfg, "mntp", True)
    assert torch.equal(model.decode(concepts, tokens, torch.tensor([[8, 0]])), plain)


def test_mntp_predicts_the_first_token_of_an_isolated_document_from_its_own_state():
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=64, token_dim=32, ffn_dim=32, n_layer=1, n_head=2,
                               n_mixer=1, mntp=True, isolate_documents=True, eot_id=63)
    model, ids = Transformer(config).eval(), torch.arange(20)[None].clone()
    ids[0, 9] = 63  # the second document begins at place 10
    place, other = torch.tensor([[10]]), ids.clone()
    other[0, :9] += 20

    def logits(ids):
        return model.logits(model.decode(*model.encode(ids), place, model.documents(ids)))
    assert torch.equal(logits(ids), logits(other))
    other = ids.clone()
    other[0, 15] = 50
    assert not torch.equal(logits(ids), logits(other))


def test_a_phase_takes_the_scores_of_the_phase_before(data_dir, tmp_path):
    args = ["--masking_type=importance", "--importance=ema", "--max_steps=4"]
    train(data_dir, tmp_path / "a", *args)
    new = [f"--init_from={tmp_path}/a", "--max_steps=1"]
    done = train(data_dir, tmp_path / "b", *args, *new)
    assert "scores of importance=ema go on from those of that run" in done.stdout
    before, after = (read_checkpoint(tmp_path / name / "ckpt.pt")["importance"]["mean_V"]
                     for name in "ab")
    assert (before != after).sum() < 0.7 * len(before), "one step later"
    done = train(data_dir, tmp_path / "c", *args, *new, "--importance=model")
    assert "scores of importance=model begin afresh: it has those of importance=ema" in done.stdout


# ---- phases --------------------------------------------------------------------------------------


TINY_17M = ["--n_layer=4", "--token_dim=32", "--n_head=2", "--ffn_dim=32", "--eval_rows=2",
            "--local_window=8", "--dtype=fp32", "--log_interval=1", "--vocab_size=0"]


def phase(name, data_dir, folder, *more, ok=True):
    return call("train.py", "config/ettin_17m.py", f"config/phase_{name}.py",
                "config/phase_small.py", f"--data_dir={data_dir}", f"--out_dir={folder}/{name}",
                *TINY_17M, *more, ok=ok)


def test_three_phases_hand_on_weights_optimizer_tokens_and_learning_rate(data_dir, tmp_path):
    few = "--max_steps=30", "--eval_interval=15"
    first = phase("pretrain", data_dir, tmp_path, *few, "--warmup_steps=3")
    assert "4 rows of 128" in first.stdout and "16 rows of 128" in first.stdout
    whole = read_checkpoint(tmp_path / "pretrain" / "ckpt.pt")
    phase("extend", data_dir, tmp_path, *few, f"--init_from={tmp_path}/pretrain",
          "--stop_at_step=1")
    one = read_checkpoint(tmp_path / "extend" / "ckpt.pt")
    moments = [one["optimizers"][0]["state"][0]["step"], whole["optimizers"][0]["state"][0]["step"]]
    assert moments[0] == moments[1] + 1, "the optimizer goes on"
    assert one["tokens"] == whole["tokens"] + 4 * 1024
    second = phase("extend", data_dir, tmp_path, *few, f"--init_from={tmp_path}/pretrain")
    assert "with its optimizer state and token count" not in second.stdout  # it resumes
    third = phase("decay", data_dir, tmp_path, *few, f"--init_from={tmp_path}/extend")
    assert result(third)["tokens"] > result(second)["tokens"] > result(first)["tokens"]
    rates = []
    for name in ("pretrain", "extend", "decay"):
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        rates.append([r["lr"] for r in map(json.loads, log) if "lr" in r])
    assert max(rates[0]) == rates[0][-1] == 3e-3, "constant after the warm-up"
    assert rates[1][0] == pytest.approx(3e-3) and 1.5e-3 < rates[1][-1] < 1.6e-3
    assert rates[2][0] == pytest.approx(1.5e-3) and 6e-5 < rates[2][-1] < 2e-4
    assert rates[1] == sorted(rates[1], reverse=True) and rates[2] == sorted(rates[2], reverse=True)
    models = [read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("pretrain", "extend")]
    assert [m["model_settings"]["rope_theta"] for m in models] == [1e4, 1.6e5]
    assert [m["model_settings"]["block_size"] for m in models] == [128, 1024]


def test_the_optimizer_of_another_objective_is_not_carried_on(decoder, data_dir, tmp_path):
    done = train(data_dir, tmp_path, "--arch=transformer", f"--init_from={decoder}",
                 "--carry_optimizer=true", ok=False)
    refused(done, "objective=clm there, mlm here", "leave carry_optimizer out")
    done = train(data_dir, tmp_path, "--carry_optimizer=true", ok=False)
    refused(done, "carry_optimizer=True needs a run to carry it from: --init_from=DIR")


def test_a_run_without_optimizer_state_cannot_hand_it_on(decoder, data_dir, tmp_path):
    shutil.copytree(decoder, tmp_path / "run")
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    done = train(data_dir, tmp_path / "new", *DECODER, f"--init_from={tmp_path}/run",
                 "--carry_optimizer=true", ok=False)
    refused(done, "holds no ckpt.pt, and only that has the optimizer state")
    done = train(data_dir, tmp_path / "new", *DECODER, f"--init_from={tmp_path}/run/best.pt",
                 "--carry_optimizer=true", ok=False)
    refused(done, "holds no ckpt.pt, and only that has the optimizer state")


def test_weights_that_do_not_fit_are_all_listed(decoder, data_dir, tmp_path):
    done = train(data_dir, tmp_path, "--arch=transformer", f"--init_from={decoder}",
                 "--ffn_dim=32", "--n_mixer=0", ok=False)
    refused(done, "the weights of", "mixers.0.taps: (64, 7) there, none here",
            "last.ffn.wi.weight: (128, 32) there, (64, 32) here", "see its config.json")


@pytest.mark.parametrize("args, message", [
    (["--objective=clm"], "arch=transformer or arch=resonance"),
    ([*DECODER, "--mlm_probability=0.3"], "mlm_probability=0.3: nothing is masked"),
    ([*DECODER, "--masking_type=span"], "put config/decoder.py behind the preset"),
    ([*DECODER, "--copy_head=true"], "copy_head reads the whole row"),
    (["--arch=resonance", "--mixer=fnet", "--objective=clm"], "mixer='fnet' sees the whole row"),
    (["--arch=resonance", "--isolate_documents=true"], "a convolution over the row cannot keep"),
    (["--arch=resonance", "--mixer=fnet", "--rows=document"], "mixer=fnet reads padding"),
    (["--arch=resonance", "--mixers=xyz"], "mixers='xyz': expected letters"),
    (["--arch=transformer", "--rope_theta=0"], "rope_theta=0.0: expected a number above 0"),
    (["--arch=transformer", "--token_dim=30"], "rotary positions need an even share"),
    (["--resonant_mixers=true", "--isolate_documents=true"], "resonant_mixers=True reads across"),
    (["--n_frequency=8"], "n_frequency=8 has no effect"),
    (["--copy_head=true"], "copy_head=True has no effect here"),
    (["--local_window=8"], "local_window=8 has no effect here"),
    (["--arch=transformer", "--mixers=rrra"], "mixers=rrra has no effect here"),
    (["--arch=transformer", "--n_layer=1", "--local_window=4"], "local_window=4 has no effect"),
    (["--arch=transformer", "--n_layer=0", "--qk_norm=false"], "qk_norm=False has no effect"),
    (["--arch=resonance", "--qk_norm=false"], "qk_norm=False has no effect here"),
    (["--arch=resonance", "--mixer=fnet", "--n_frequency=4"], "n_frequency=4 has no effect here"),
    (["--lr_schedule=linear", "--lr_restarts=2"], "lr_restarts=2 has no effect here"),
    (["--masking_type=importance", "--curriculum=easy_to_hard", "--max_minutes=1"],
     "curriculum=easy_to_hard: its stages are shares of a known number of steps"),
    (["--resonant_mixers=true", "--n_mixer=0"], "resonant_mixers=True has no effect here"),
    (["--init_from=elsewhere", "--init_table=random"], "init_table=random has no effect here"),
    (["--overfit_tokens=1024", "--block_size=0"], "block_size=0: expected more than 0"),
    (["--hang_minutes=1e12"], "expected at most 1,000,000"),
    (["--batch_schedule=3:0.5,8:0.4"], "the shares of the steps add up to 0.9"),
    (["--batch_schedule=8:1", "--block_schedule=32:0.5,64:0.5"], "one of them at a time"),
    (["--batch_schedule=0.3:0.5,1.0:0.5"], "expected whole numbers of rows"),
    (["--decay_fraction=1.5", "--lr_schedule=wsd"], "decay_fraction=1.5: expected a share"),
    (["--rows=document", "--block_size=4096"], "no document of", ),
])
def test_impossible_combinations_are_refused(args, message, data_dir, tmp_path):
    refused(train(data_dir, tmp_path, *args, ok=False), message)


def test_only_batch_sizes_that_divide_among_the_processes_are_taken(data_dir, tmp_path):
    done = train(data_dir, tmp_path, "--batch_schedule=3:0.5,8:0.5", nproc=2, ok=False)
    refused(done, "batch_schedule: 3 rows do not divide among 2 processes")


def test_what_only_masked_models_do_is_refused_for_a_decoder(decoder):
    refused(call("tools/eval.py", f"--out_dir={decoder}", "--nelbo=1", ok=False),
            "--nelbo is of masked models")
    refused(call("tools/sample.py", f"--out_dir={decoder}", "--text=a [MASK]", ok=False),
            "--generate=1 continues a text")


def test_eval_keeps_next_tokens_apart_from_masks(decoder, data_dir, tmp_path):
    train(data_dir, tmp_path / "encoder", "--arch=transformer")
    shutil.copytree(decoder, tmp_path / "decoder")
    few = ["--rows=8", "--health_rows=8"]
    found = result(call("tools/eval.py", f"--out_dir={tmp_path}/decoder", *few))
    [losses_of] = found["data"].values()
    assert set(losses_of) == {"unigram_entropy", "clm"} and losses_of["clm"]["bits_per_byte"] > 0
    metrics = json.loads((tmp_path / "decoder" / "metrics.json").read_text())
    assert metrics["clm_loss"] == losses_of["clm"]["loss"] and metrics["val_loss"] is None
    done = call("tools/eval.py", f"--compare={tmp_path}/decoder,{tmp_path}/encoder", *few,
                "--profile=1")
    page = (tmp_path / "decoder" / "compare.md").read_text()
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in page.splitlines()
            if line.count("|") == 4}
    dash = [[cell.strip() == "-" for cell in rows[name]]
            for name in ("loss, token masks", "loss, next tokens")]
    assert dash == [[True, False], [False, True]]
    assert "-" not in [cell.strip() for cell in rows["reading rows, tokens/s"]]
    assert "dashed: of a decoder" in page and result(done)["runs"]


# ---- rows of 32,768 tokens -----------------------------------------------------------------------


class Piped(start):
    """In place of subprocess.Popen with a pipe: a script that a command starts runs in a fork."""

    def __init__(self, command, **_):
        super().__init__(*command[1:])

    def wait(self):
        self.process.join()
        return self.process.exitcode


def test_rows_of_32k_train_and_generate_in_one_command(tmp_path, monkeypatch, request):
    """`make train DATA=shards SIZE=resonance_small`, with a smaller model, then a text.

    Two processes, as torchrun starts them, come to the same loss.
    """
    monkeypatch.chdir(tmp_path)
    bins = ROOT / "data" / "shards_of_test"
    request.addfinalizer(lambda: shutil.rmtree(bins, ignore_errors=True))
    (tmp_path / "shards").mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        ids = rng.integers(0, 60, (51, 32768), dtype=np.int64)
        ids[:, 1::2] = (7 * ids[:, ::2] + 3) % 60
        ids[:, ::5000] = 60
        np.save(tmp_path / "shards" / f"{number}.npy", ids)
    small = ("--n_layer=1 --token_dim=16 --n_head=2 --ffn_dim=16 --vocab_size=0 --batch_size=2 "
             "--max_steps=2 --warmup_steps=1 --eval_interval=2 --eval_rows=1 --n_frequency=4 "
             "--micro_batch=1 --dtype=fp32")
    lines = subprocess.run(
        ["make", "-n", "-C", ROOT, "train", "DATA=shards", "SIZE=resonance_small"],
        capture_output=True, text=True).stdout
    assert "data/quick.py '--data=shards' --size=resonance_small" in lines
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Piped)  # its commands start at once
        done = call("data/quick.py", f"--data={tmp_path}/shards", "--size=resonance_small",
                    f"--args={small} --out_dir={tmp_path}/out",
                    "--prepare_args=--vocab_size=61 --eot_id=60", "--name=shards_of_test",
                    "--eval_args=--rows=1 --health_rows=0")
    assert '"clm": {"loss"' in done.stdout
    done = call("tools/sample.py", f"--out_dir={tmp_path}/out", "--generate=1", "--length=6")
    assert result(done)["tokens"] <= 6
    run("train.py", "config/resonance_small.py", f"--data_dir={bins}", *small.split(),
        f"--out_dir={tmp_path}/two", nproc=2)
    one, two = (evaluations(tmp_path / name)[-1]["val_loss"] for name in ("out", "two"))
    assert one == pytest.approx(two, abs=1e-5)
