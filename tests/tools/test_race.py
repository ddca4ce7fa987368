"""bench.py --race=1: our models and transformers' Trainer in the same seconds."""

import json
import subprocess

import pytest
import torch
from conftest import Fork, call, refused, result

from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib.evaluation import evaluate
from lib.machine import Machine
from tools.race import TRAINER, Interface, T, build_peer, head_starts

pytest.importorskip("transformers")
pytestmark = pytest.mark.long


def test_a_race_ends_with_losses_on_the_same_masks(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Fork)
    monkeypatch.setitem(TRAINER, "hf_bert", TRAINER["hf_bert"] | dict(layers=1, ffn_dim=64))
    done = call("tools/bench.py", "--race=1", "--race_minutes=0.03", "--models=open,hf_bert",
                f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--device=cpu", "--dtype=fp32")
    found = json.loads((tmp_path / "race.json").read_text())["models"]
    assert list(found) == ["open", "hf_bert"]
    for name in found:
        assert found[name]["tokens"] > 0 and 0 < found[name]["curve"][-1][1] < 12
    assert result(done)["loss"]["hf_bert"] == found["hf_bert"]["curve"][-1][1]
    assert (tmp_path / "race.png").stat().st_size > 10_000
    again = call("tools/bench.py", "--race=1", "--models=open", f"--data_dir={data_dir}",
                 f"--out_dir={tmp_path}", ok=False)
    refused(again, f"{tmp_path}/open is of an earlier race", "rm -r")


def test_a_peer_is_evaluated_as_a_loop_written_out_would(data_dir):
    """lib.evaluation.evaluate through Interface against cross-entropy of transformers' own loss."""
    from masking import mask_batch
    tok = Tokenizer.load(f"{data_dir}/tokenizer")
    val = TokenData(str(data_dir), "val", T, 0)
    torch.manual_seed(0)
    model = build_peer("hf_bert", tok, 1, 64).eval()
    machine = Machine(torch.device("cpu"), 0, 1)
    found = evaluate(Interface(model), val, tok, machine, "fp32", rows=4)["loss"]
    index = torch.arange(min(4, val.n_blocks))
    batch = mask_batch(torch.as_tensor(val.block(index.numpy())), index, "token", 0.15, tok,
                       seed=1234)
    inputs, positions, targets, _, used = batch
    labels = torch.full_like(inputs, -100, dtype=torch.long)
    for row, place, word, real in zip(labels, positions, targets, used):
        row[place[real]] = word[real].long()
    with torch.no_grad():
        assert model(input_ids=inputs.long(), labels=labels).loss.item() == pytest.approx(
            found, abs=1e-4)


def test_the_share_of_a_peers_time_is_between_two_evaluations():
    found = dict(open=dict(curve=[(10, 6.0), (20, 5.0)]), strict=dict(curve=[(50, 5.9)]),
                 hf_bert=dict(curve=[(100, 7.0), (200, 5.5)]))
    assert head_starts(found) == {
        "open reaches the last loss of hf_bert, share of its time": 15 / 200}


@pytest.mark.parametrize("words, message", [
    (["--models=open,hf_gpt9"], "expected some of open, strict, transformer, hf_bert"),
    (["--race_minutes=0"], "race_minutes=0.0: expected more than 0"),
    (["--data_dir=nowhere"], "nowhere"),
])
def test_bad_races_are_refused(words, message, data_dir, tmp_path):
    refused(call("tools/bench.py", "--race=1", f"--data_dir={data_dir}", f"--out_dir={tmp_path}",
                 *words, ok=False), message)
