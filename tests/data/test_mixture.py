"""Promises of data/reader.py: how often each data set is read, where rows by document begin, and
that the step alone decides it.
"""

import collections
import json
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, refused, result
from test_reader import all_ids, texts, write
from test_train import losses, train

from data import bins
from data.bins import DataError
from data.reader import WINDOW, Batches, DocumentRows, Mixture, TokenData
from data.tokenizer import Tokenizer
from lib.baselines import Transformer, TransformerConfig
from lib.log import read_log
from lib.run import read_checkpoint
from masking import mask_batch
from model import ConceptConfig, ConceptEncoder

QUICK = ["--save_minutes=60", "--eval_interval=50", "--health_rows=0"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of three data sets with one tokenizer, 17,000, 6,000 and 3,000 tokens or so."""
    folder = tmp_path_factory.mktemp("sources")
    for name, n, seed in (("a", 60, 1), ("b", 25, 2), ("c", 12, 3)):
        write(folder / name, texts(n, seed), val_fraction=0.3)
    return [str(folder / name) for name in "abc"]


def batches(data_dir, weights="", rows="block", T=64, schedule="", steps=100, batch_size=16,
            max_tokens=0):
    return Batches(data_dir, weights, rows, T, schedule, 5, batch_size, steps, max_tokens)


# ---- rows by document -----------------------------------------------------------------------


def plain_rows(ids, eot, T):
    """The rows of DocumentRows by a loop over the tokens."""
    found, begin = [], 0
    while begin < len(ids):
        if ids[begin] == eot:
            begin += 1
            continue
        end = next((i for i in range(begin, len(ids)) if ids[i] == eot), len(ids))
        next_begin = next((i for i in range(end, len(ids)) if ids[i] != eot), len(ids))
        found += [ids[at : min(at + T, next_begin)] for at in range(begin, end, T)]
        begin = next_begin
    return found


def test_rows_by_document_are_those_of_a_plain_loop(monkeypatch):
    rng, n_compared = np.random.default_rng(0), 0
    for _ in range(200):
        ids = rng.integers(0, rng.integers(2, 60), rng.integers(1, 300)).astype("<u2")
        T = int(rng.integers(1, 20))
        monkeypatch.setattr(bins, "SCAN_TOKENS", int(rng.integers(1, 60)))
        data = SimpleNamespace(n_tokens=len(ids), eot_id=0, stored_pad=0, dtype=ids.dtype,
                               split="train", data_dir="a")
        data.read = lambda at, out, ids=ids: out.__setitem__(slice(None), ids[at : at + len(out)])
        expected = plain_rows(ids.tolist(), 0, T)
        if not expected or 0 not in ids:
            with pytest.raises(DataError, match="ends of document.*--rows=block"):
                DocumentRows(data, T)
            continue
        index = DocumentRows(data, T)
        starts, lengths = index.at(np.arange(index.n_rows))
        assert [ids[at : at + n].tolist() for at, n in zip(starts, lengths)] == expected
        assert index.n_tokens == sum(map(len, expected))
        n_compared += 1
    assert n_compared > 150


@pytest.mark.parametrize("T", [16, 300])
def test_every_document_begins_a_row_and_every_token_comes_once_an_epoch(T, sources):
    data = TokenData(sources[0], "train", T, 5, "document")
    tok = Tokenizer.load(sources[0] + "/tokenizer")
    ids, _ = data.batch(1, data.n_blocks)
    in_order = data.block(np.arange(data.n_blocks))
    assert sorted(ids.tolist()) == sorted(in_order.tolist()) and not torch.equal(ids, in_order)
    real = in_order != tok.pad_id
    assert (real.long().diff(dim=1) <= 0).all(), "padding comes after the text of a row"
    truth = all_ids(Path(sources[0]), "train")
    documents = np.split(truth, np.flatnonzero(truth == tok.eot_id) + 1)[:-1]
    expected = [document[at : at + T].tolist()
                for document in documents for at in range(0, len(document) - 1, T)]
    assert [row[mask].tolist() for row, mask in zip(in_order, real)] == expected
    kept = np.concatenate(expected)
    assert kept[kept != tok.eot_id].tolist() == truth[truth != tok.eot_id].tolist()


def test_a_large_index_is_kept_beside_the_bins_and_found_anew_when_it_does_not_fit(
        sources, tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "KEPT_TOKENS", 1)
    folder, scans = shutil.copytree(sources[0], tmp_path / "a"), []
    scan = bins.distances
    monkeypatch.setattr(bins, "distances", lambda data, T: scans.append(T) or scan(data, T))

    def blocks(T=16):
        data = TokenData(str(folder), "train", T, 5, "document")
        return data.block(range(data.n_blocks))

    expected = blocks()
    [kept] = folder.glob("train.bin.rows_16_*.npy")
    assert torch.equal(blocks(), expected) and scans == [16], "the second time it is read"
    cut, empty = (lambda data: data[: len(data) // 2]), (lambda data: b"")
    for damage in (cut, empty, lambda data: data[:-1] + bytes([data[-1] ^ 1])):
        kept.write_bytes(damage(kept.read_bytes()))
        assert torch.equal(blocks(), expected)
    blocks(24)
    assert scans == [16] * 4 + [24] and len(list(folder.glob("*.npy"))) == 2
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train"]["files"][0]["sha256"] = ""
    (folder / "meta.json").write_text(json.dumps(meta))
    assert torch.equal(blocks(), expected)
    assert not kept.exists() and len(list(folder.glob("*.npy"))) == 2

    def read_only(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(bins, "FolderLock", read_only)
    plain = TokenData(sources[0], "train", 8, 5, "document")
    assert torch.equal(blocks(8), plain.block(range(len(blocks(8)))))
    assert not list(folder.glob("train.bin.rows_8_*"))


@pytest.mark.parametrize("arch", ["strict", "open", "transformer"])
def test_padding_is_neither_read_nor_predicted(arch, sources):
    """The loss of a padded row is that of the same row alone, whatever stands in the padding."""
    tok, T = Tokenizer.load(sources[0] + "/tokenizer"), 48
    shape = dict(vocab_size=tok.vocab_size, block_size=T, n_layer=1, n_head=2, token_dim=64,
                 ffn_dim=32, mask_id=tok.mask_id, eot_id=tok.eot_id)
    torch.manual_seed(0)
    if arch == "transformer":
        model = Transformer(TransformerConfig(**shape))
    else:
        model = ConceptEncoder(ConceptConfig(**shape, n_concept=4, concept_dim=32, bottleneck=arch,
                                             hide_masked=True))
    ids = TokenData(sources[0], "train", T, 5, "document").block(range(40))
    lengths = (ids != tok.pad_id).sum(1)
    assert lengths.min() < T - 8, "some rows must be padded for this test"
    batch = mask_batch(ids, torch.arange(len(ids)), "whole_word", 0.3, tok)
    predicted = batch.targets[batch.used]
    assert not torch.from_numpy(tok.is_special)[predicted].any()
    for row in lengths.argsort()[:3].tolist():
        n = lengths[row]
        inputs, positions, targets, weights, _ = (t[row : row + 1] for t in batch)
        alone = model(inputs[:, :n], positions, targets, weights)
        for filler in (tok.pad_id, 65):
            padded = torch.where(torch.arange(T) < n, inputs, filler)
            loss = model(padded, positions, targets, weights, None, inputs != tok.pad_id)
            assert loss.item() == pytest.approx(alone.item(), abs=2e-5)


@pytest.mark.parametrize("kind", ["block", "document"])
def test_rows_that_others_padded_train_as_if_they_were_not(kind, tmp_path):
    """Whatever id they are padded with, 0 or 90 here, and however much of it follows."""
    rng, seen = np.random.default_rng(0), {}
    lengths = rng.integers(20, 62, 200)
    for pad in (0, 90):
        ids = np.full((200, 64), pad, np.uint16)
        for row, n in zip(ids, lengths):
            text = np.random.default_rng(n).integers(0, 88, n - 1)
            row[:n] = np.append(1 + text, 89)  # 89 ends a document
        (tmp_path / f"ids{pad}").mkdir()
        np.save(tmp_path / f"ids{pad}/rows.npy", ids)
        call("prepare.py", "split", f"--data_dir={tmp_path}/ids{pad}",
             f"--out_dir={tmp_path}/split{pad}", "--val_ratio=0.2", "--vocab_size=91",
             "--eot_id=89", f"--pad_id={pad}")
        data = TokenData(str(tmp_path / f"split{pad}"), "train", 64, 5, kind)
        rows = data.block(range(data.n_blocks))
        assert data.padded and ((rows == data.pad_id).sum(1) > 0).all()
        assert pad not in rows and data.n_blocks == 160
        run = tmp_path / f"run{pad}"
        train(tmp_path / f"split{pad}", run, f"--rows={kind}", "--masking_type=token",
              "--max_steps=6", "--init_table=random", *QUICK)
        seen[pad] = rows, [r.get("loss", r.get("val_loss")) for r in read_log(run)]
    assert torch.equal(seen[0][0], seen[90][0]) and seen[0][1] == seen[90][1]


# ---- shares ---------------------------------------------------------------------------------


def stub(n_blocks, T=64):
    return SimpleNamespace(n_blocks=n_blocks, row_tokens=Fraction(T))


@pytest.mark.parametrize("weights", ["0.7 0.3", "1 1 1", "1000000 1 1", "0.05 0.1 0.4 0.45",
                                     "1e-9 1", "1 " * 64])
def test_shares_are_met_in_every_window_and_sources_are_read_in_order(weights):
    weights = [Fraction(w) for w in weights.split()]
    mixed = Mixture([stub(10)] * len(weights), weights, seed=3)
    seen = np.zeros(len(weights), int)
    for number in range(12):
        source, index = mixed.window(number)
        for k in range(len(weights)):
            mine = index[source == k]
            came_before = list(range(seen[k], seen[k] + len(mine)))
            assert mine.tolist() == came_before, "how many came before"
            seen[k] += len(mine)
        assert seen.tolist() == mixed.drawn((number + 1) * WINDOW).tolist()
        error = seen - [float(w / sum(weights)) * (number + 1) * WINDOW for w in weights]
        assert np.delete(abs(error), mixed.largest).max() <= 0.5
        assert abs(error[mixed.largest]) <= len(weights) / 2
        assert mixed.drawn(number * WINDOW + 777).sum() == number * WINDOW + 777
    other_seed = Mixture(mixed.sources, weights, 4)
    orders = {tuple(some.window(n)[0]) for some, n in ((mixed, 0), (mixed, 1), (other_seed, 0))}
    assert len(orders) == 3 or min(weights) < sum(weights) / 1000, (
        "the order changes with the window and the seed")


def test_far_into_a_run_shares_are_still_exact():
    mixed = Mixture([stub(10), stub(10)], [Fraction("0.7"), Fraction("0.3")], seed=3)
    n = 10**15 * WINDOW
    assert mixed.before(n).tolist() == [7 * n // 10, 3 * n // 10]
    assert mixed.window(10**15)[1][mixed.window(10**15)[0] == 1].min() == 3 * n // 10


@pytest.mark.parametrize("kind", ["block", "document"])
def test_each_source_is_read_in_epochs_of_its_own(kind, sources):
    data = batches(",".join(sources), "0.5,0.3,0.2", kind, batch_size=WINDOW)
    tokens, n_steps = {}, 3
    parts = data.phases[0].mixture.sources
    known = {row.tobytes(): name for name, part in zip(sources, parts)
             for row in part.block(range(part.n_blocks)).numpy()}
    read = [row.tobytes() for step in range(n_steps) for row in data.batch(step)[0].numpy()]
    for name, part in zip(sources, parts):
        counts = collections.Counter(row for row in read if known[row] == name)
        assert len(counts) == part.n_blocks and max(counts.values()) - min(counts.values()) <= 1
        tokens[name] = counts.total() * float(part.row_tokens)
        epochs = counts.total() / part.n_blocks
        assert data.progress(n_steps)[name]["epochs"] == pytest.approx(epochs)
    for (name, n), share in zip(tokens.items(), (0.5, 0.3, 0.2)):
        assert n / sum(tokens.values()) == pytest.approx(share, abs=1e-3), "of tokens, not of rows"
        assert data.progress(n_steps)[name]["share"] == pytest.approx(n / sum(tokens.values()))


@pytest.mark.parametrize("kind", ["block", "document"])
def test_without_weights_all_sources_are_through_at_the_same_time(kind, sources):
    data = batches(",".join(sources), "", kind, batch_size=1)
    total = sum(source.n_blocks for source in data.phases[0].mixture.sources)
    epochs = [r["epochs"] for r in data.progress(total * WINDOW).values()]
    assert epochs == pytest.approx([WINDOW] * 3, rel=1e-4)
    text = sum(source.n_blocks * source.row_tokens for source in data.phases[0].mixture.sources)
    assert data.tokens(total) == text, "tokens are counted without padding"
    assert data.n_blocks == sum(TokenData(name, "train", 64).n_blocks for name in sources)
    if kind == "block":
        alone = [TokenData(name, "train", 64) for name in sources]
        packed = torch.cat([part.block(range(part.n_blocks)) for part in alone])
        assert torch.equal(data.block(range(data.n_blocks)), packed)


def test_one_source_gives_the_batches_it_always_gave(sources):
    """So that runs begun before there were mixtures go on with the batches they would have had."""
    data, alone = batches(sources[0]), TokenData(sources[0], "train", 64, 5)
    for step in (0, 1, 50, 1000):
        for rank in range(2):
            for now, before in zip(data.batch(step, rank, 2), alone.batch(step, 16, rank, 2)):
                assert torch.equal(now, before)
    assert data.sha256 == [alone.meta["splits"]["train"]["files"][0]["sha256"]]
    assert data.tokens(7) == 7 * 16 * 64
    assert torch.equal(data.block([0, 3]), alone.block([0, 3]))


# ---- rows that grow -------------------------------------------------------------------------


def test_phases_hold_the_same_tokens_a_step_and_no_sample_id_twice(sources):
    def made():
        return batches(",".join(sources[:2]), "0.7,0.3", schedule="16:0.5,32:0.25,64:0.25",
                       steps=40, batch_size=8)

    data = made()
    seen, shapes = [], []
    for step in range(40):
        ids, sample_ids = data.batch(step)
        seen, shapes = seen + sample_ids.tolist(), [*shapes, ids.shape[1]]
        assert ids.numel() == 8 * 64
        if step in (0, 19, 20, 39):
            parts = zip(*(data.batch(step, rank, 4) for rank in range(4)))
            for whole, part in zip((ids, sample_ids), parts):
                assert torch.equal(whole, torch.cat(part))
    assert shapes == [16] * 20 + [32] * 10 + [64] * 10
    assert seen == list(range(20 * 32 + 10 * 16 + 10 * 8))
    assert torch.equal(data.batch(25)[0], made().batch(25)[0])
    ids = torch.cat([data.batch(step)[0] for step in range(20, 30)])
    fresh = batches(",".join(sources[:2]), "0.7,0.3", T=32, steps=10)
    of_fresh = torch.cat([fresh.batch(step)[0] for step in range(10)])
    assert torch.equal(ids, of_fresh), "a phase walks its own epochs"


def test_batches_grow_and_read_on_where_the_smaller_ones_ended(sources):
    """The rows are those of constant batches, in the same order; none comes twice."""
    def made(schedule, steps, batch_size=8):
        return Batches(",".join(sources[:2]), "0.7,0.3", "block", 64, "", 5, batch_size, steps, 0,
                       schedule)

    data, seen, rows = made("2:0.25,0.5:0.25,8:0.5", 40), [], []
    for step in range(40):
        ids, sample_ids = data.batch(step)
        assert len(ids) == (2 if step < 10 else 4 if step < 20 else 8)
        seen, rows = seen + sample_ids.tolist(), [*rows, ids]
        parts = zip(*(data.batch(step, rank, 2) for rank in range(2)))
        assert all(torch.equal(whole, torch.cat(part))
                   for whole, part in zip((ids, sample_ids), parts))
    assert seen == list(range(len(seen))) and len(seen) == 10 * 2 + 10 * 4 + 20 * 8
    plain = made("", 28)
    assert torch.equal(torch.cat(rows)[:216], torch.cat([plain.batch(i)[0] for i in range(27)]))
    assert data.tokens(40) == 220 * 64 and data.tokens(12) == (20 + 8) * 64
    share = data.progress(40)[sources[0]]["share"]
    assert abs(share - 0.7) < 0.1 and sum(p["share"] for p in data.progress(15).values()) == 1


def test_max_tokens_with_growing_batches_are_the_mean_of_the_run(sources):
    data = Batches(sources[0], "", "block", 64, "", 5, 8, 10**6, 50_000, "2:0.5,8:0.5")
    assert data.tokens(data.n_steps - 1) < 50_000 <= data.tokens(data.n_steps) < 51_000


def test_max_tokens_count_without_padding(sources):
    padded = batches(sources[0], rows="document", T=300, max_tokens=50_000, steps=10**6)
    packed = batches(sources[0], T=300, max_tokens=50_000, steps=10**6)
    assert packed.n_steps == -(-50_000 // (16 * 300)) < padded.n_steps
    assert padded.tokens(padded.n_steps - 1) < 50_000 <= padded.tokens(padded.n_steps)


@pytest.mark.parametrize("settings, message", [
    (dict(weights="0.7"), "expected numbers above 0.*one for each of.*, "),
    (dict(weights="0.7,x"), "expected numbers"),
    (dict(weights="0.7,-1"), "above 0"), (dict(weights="1,1/0"), "above 0"),
    (dict(weights="nan,1"), "above 0"),
    (dict(schedule="64"), "expected LENGTH:SHARE.*such as 16:0.9,64:0.1"),
    (dict(schedule="a:1"), "LENGTH:SHARE"),
    (dict(schedule="20:0.5,64:0.5"), "rows of 20 tokens do not divide block_size=64.*16 and 32 do"),
    (dict(schedule="0:0.5,64:0.5"), "1 and 2 do"), (dict(schedule="-4:1"), "1 and 2 do"),
    (dict(schedule="16:0.9,64:0.2"), r"add up to 1.1; expected"),
    (dict(schedule="16:1.5,64:-0.5"), "above 0"),
    (dict(schedule="64:0.5,16:0.5"), "lengths that grow and end at block_size=64"),
    (dict(schedule="16:0.5,32:0.5"), "end at block_size=64"),
    (dict(schedule="16:0.99,64:0.01", steps=20),
     "none of 20 steps is left for rows of 64 tokens; expected 100 steps")])
def test_impossible_settings_are_refused_with_what_is_expected(settings, message, sources):
    with pytest.raises(DataError, match=message):
        batches(",".join(sources[:2]), **settings)


def test_sources_that_do_not_go_together_are_refused(sources, tmp_path):
    with pytest.raises(DataError, match="different folders"):
        batches(f"{sources[0]},{sources[0]}/")
    with pytest.raises(DataError, match="at most 64 folders"):
        batches(",".join(f"folder{i}" for i in range(65)))
    byte = Tokenizer.load("byte")
    specials = {name: i + 1 for name, i in byte.specials.items()}
    Tokenizer("other", byte.pattern, byte.ranks, specials).save(tmp_path / "t")
    write(tmp_path / "other", texts(20, 4), tokenizer=str(tmp_path / "t"), val_fraction=0.3)
    message = f"another tokenizer than {sources[0]}.*--tokenizer={sources[0]}/tokenizer"
    with pytest.raises(DataError, match=message):
        batches(f"{sources[0]},{tmp_path}/other")


# ---- train.py -------------------------------------------------------------------------------

MIXED = ["--data_weights=0.6,0.4", "--rows=document", "--block_schedule=16:0.5,64:0.5", *QUICK]


@pytest.fixture(scope="module")
def mixed(sources, tmp_path_factory):
    """An uninterrupted run with everything on, the shapes its model saw, and its output."""
    out, shapes = tmp_path_factory.mktemp("mixed") / "whole", []

    def compiled(model, **settings):
        def forward(ids, *rest):
            shapes.append(tuple(ids.shape))
            return model(ids, *rest)
        assert settings == dict(fullgraph=True, dynamic=False)
        return forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compiled)
        done = train(",".join(sources[:2]), out, *MIXED, "--compile=true")
    return out, shapes, done


def test_a_compiled_model_sees_one_shape_a_phase_and_the_log_says_what_was_read(mixed, sources):
    out, shapes, done = mixed
    assert shapes == [(32, 16)] * 10 + [(8, 64)] * 10
    assert "step 10: 8 rows of 64 tokens a step from here on" in done.stdout
    record = [r for r in read_log(out) if "loss" in r][-1]
    assert list(record["sources"]) == sources[:2] and record["block_size"] == 64
    assert record["tokens"] < 20 * 8 * 64
    assert sum(r["share"] for r in record["sources"].values()) == pytest.approx(1)
    assert all(0 < r["epochs"] < 5 for r in record["sources"].values())
    share = record["sources"][sources[0]]["share"]
    assert f"| {sources[0]} {share:.1%}, " in done.stdout
    assert result(done)["tokens"] == record["tokens"]
    validation = [r for r in read_log(out) if "val_loss" in r][-1]
    losses_of = list(validation["val_losses"].values())
    assert validation["val_loss"] == pytest.approx(np.dot([0.6, 0.4], losses_of))


def test_a_run_resumes_bit_for_bit_across_a_phase(mixed, sources, tmp_path):
    for stop in ("--stop_at_step=10", "--stop_at_step=12", "--seed=1337"):
        train(",".join(sources[:2]), tmp_path, *MIXED, stop)
    assert losses(tmp_path) == losses(mixed[0])
    a, b = (read_checkpoint(folder / "ckpt.pt")["model"] for folder in (mixed[0], tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_older_run_resumes_and_other_rows_do_not(sources, tmp_path):
    train(sources[0], tmp_path, "--max_steps=4", "--stop_at_step=2", "--init_table=random", *QUICK)
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    for name in ("data_weights", "rows", "block_schedule"):
        del checkpoint["settings"][name]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    refused(train(sources[0], tmp_path, "--rows=document", "--block_schedule=16:0.5,64:0.5",
                  ok=False), "rows: block in the checkpoint, document here", "block_schedule")
    refused(train(",".join(sources[:2]), tmp_path, "--init_table=random", ok=False),
            "holds other tokens")
    done = train(sources[0], tmp_path, "--max_steps=4", "--init_table=random", *QUICK)
    assert result(done)["step"] == 4 and "changed since: stop_at_step=2 -> 0\n" in done.stdout


def test_settings_without_effect_are_refused(sources, tmp_path):
    refused(train(sources[0], tmp_path, "--rows=document", "--isolate_documents=true", ok=False),
            "isolate_documents=True has no effect")
    refused(train(sources[0], tmp_path, "--rows=line", ok=False),
            "rows='line': expected block, document")
    refused(train(sources[0], tmp_path, "--block_schedule=16:0.5,64:0.5", "--max_minutes=1",
                  ok=False), "give max_steps, not max_minutes")


def test_eval_measures_every_source_of_a_run(mixed, sources):
    summary = result(call("tools/eval.py", f"--out_dir={mixed[0]}", "--rows=8", "--health_rows=0",
                          "--dtype=fp32"))
    assert list(summary["data"]) == sources[:2]
    fields = json.loads((mixed[0] / "metrics.json").read_text())
    train_tokens = sum(TokenData(name, "train", 64).n_tokens for name in sources[:2])
    assert fields["total_epochs"] == pytest.approx(fields["total_tokens"] / train_tokens)
