"""Several processes: what each holds, and that the result is that of one process."""

import json
import os
import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import Crash, call, refused, result, train_many
from test_resume import same_tree
from test_train import evaluations, losses, tiny, train

from lib import parallel
from lib.machine import Machine
from lib.parallel import Distributed, check_same_everywhere, folders, read_folder, recompute
from lib.run import first_readable, read_checkpoint, resumable, save_checkpoint
from lib.settings import ARCHS, build_model, check_with_data

pytestmark = pytest.mark.long

ONE = Machine(torch.device("cpu"), 0, 1)
SMALL = dict(vocab_size=67, block_size=16, n_layer=2, n_head=2, token_dim=32, ffn_dim=48)
STEPS = ["--max_steps=4", "--eval_interval=4", "--micro_batch=2"]
OTHERS = {  # what else has to work in shards
    "muon": ["--arch=transformer", "--optimizer=muon", "--n_layer=2", "--checkpoint_every=2"],
    "stable_adamw": ["--arch=resonance", "--objective=clm", "--optimizer=stable_adamw"],
    "importance": ["--masking_type=importance", "--importance=model", "--bottleneck=strict",
                   "--n_mixer=2", "--n_concept=3", "--patience=5"],
}
SHORT = ["--max_steps=2", "--eval_interval=2", "--eval_rows=4", "--health_rows=0"]


def small_model(arch="concept", **settings):
    torch.manual_seed(0)
    if arch == "concept":
        settings = dict(concept_dim=32, n_concept=5) | settings
    return build_model(SMALL | settings | dict(arch=arch))


def small_batch():
    ids = torch.randint(0, 67, (4, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(0, 16, 4).repeat(4, 1)
    return ids, positions, ids.gather(1, positions), torch.ones(4, 4)


# ---- two processes ---------------------------------------------------------------------


def close(a, b, tolerance=1e-5):
    assert a and a.keys() == b.keys()
    return max(abs(a[step] - b[step]) for step in a) <= tolerance


# Writes what a process holds before an update: bytes of weights, gradients and moments, and memory.
WATCH = """
import ctypes, torch
from lib import machine, parallel
clip = parallel.Distributed.clip_gradients

def held(tensors):
    return sum(t.numel() * t.element_size() for t in map(parallel.local_part, tensors))

def watch(self, max_norm):
    self.gradients = held(p.grad for p in self.model.parameters() if p.grad is not None)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    self.resident = machine.resident_gib()
    return clip(self, max_norm)

def after(names):
    moments = [t for opt in names["optimizers"] for state in opt.state.values()
               for t in state.values() if torch.is_tensor(t) and t.ndim]
    found = dict(weights=held(names["model"].parameters()), moments=held(moments),
                 gradients=names["distributed"].gradients,
                 resident_gib=names["distributed"].resident)
    path = f"{names['out_dir']}/held_{names['machine'].rank}.json"
    json.dump(found, open(path, "w"))
    names.clear()

parallel.Distributed.clip_gradients = watch
"""


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """Folders of the same run, by name: by one process, by two, and handed from one to the other;
    and two for each of OTHERS.
    """
    home = tmp_path_factory.mktemp("runs")

    def args(name, *more):
        return tiny(data_dir, home / name, *STEPS, *more)

    fsdp = "--parallel=fsdp"
    call("train.py", *args("one"))
    call("train.py", *args("handed", "--stop_at_step=1"))
    for name, settings in OTHERS.items():
        call("train.py", *args(f"{name}_one", *settings, *SHORT))
    train_many(args("ddp"), args("fsdp", fsdp), args("halves", fsdp, "--stop_at_step=2"),
               args("halves", fsdp), args("handed", fsdp, "--stop_at_step=3"),
               *(args(name, *settings, *SHORT, fsdp) for name, settings in OTHERS.items()),
               watch=WATCH)
    call("train.py", *args("handed", "--micro_batch=8"))
    return home


def test_two_processes_train_as_one_does(runs):
    assert close(losses(runs / "one"), losses(runs / "ddp"))
    assert close(losses(runs / "one"), losses(runs / "fsdp"))
    for ours, theirs in zip(evaluations(runs / "fsdp"), evaluations(runs / "one"), strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)
        assert ours["concept_rank"] == pytest.approx(theirs["concept_rank"], rel=1e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_train_as_one_does_with(name, runs):
    assert close(losses(runs / name), losses(runs / f"{name}_one"))
    # Muon's matrix products are in bf16, which rounds their sums in another order.
    tolerance = 1e-4 if name == "muon" else 1e-5
    assert close({r["step"]: r["val_loss"] for r in evaluations(runs / name)},
                 {r["step"]: r["val_loss"] for r in evaluations(runs / f"{name}_one")}, tolerance)


def held(out_dir, rank):
    return json.loads((out_dir / f"held_{rank}.json").read_text())


def test_two_shards_hold_half_each(runs):
    """Weights, gradients and both moments. Single numbers are in each process."""
    scalars = 4 * 4 * 4  # four numbers of the lexicon, in fp32, of four kinds
    for rank in (0, 1):
        whole, half = held(runs / "ddp", rank), held(runs / "fsdp", rank)
        for kind in ("weights", "gradients", "moments"):
            assert abs(half[kind] - whole[kind] / 2) <= scalars + 0.01 * whole[kind], kind
    shards = [held(runs / "fsdp", rank)["weights"] for rank in (0, 1)]
    assert whole["weights"] == sum(shards) - scalars / 4, "no weight is missing, none is twice"



@pytest.mark.by_hand
@pytest.mark.parametrize("preset", ["base", "large", "xlarge"])
def test_large_presets_step_in_two_shards(preset, data_dir, tmp_path):
    """At their full widths with one layer, two steps, once on one process and once on two."""
    args = [f"config/{preset}.py", f"--data_dir={data_dir}", "--n_layer=1", "--n_mixer=1",
            "--batch_size=2", "--micro_batch=1", "--block_size=64", "--max_steps=2",
            "--eval_interval=100", "--eval_rows=2", "--health_rows=0", "--dtype=fp32",
            "--warmup_steps=1", "--init_table=random", "--log_interval=1", "--vocab_size=512"]
    train_many([*args, f"--out_dir={tmp_path}/two", "--parallel=fsdp"], watch=WATCH, timeout=900)
    train_many([*args, f"--out_dir={tmp_path}/one", "--parallel=ddp"], watch=WATCH, nproc=1,
               timeout=900)
    assert close(losses(tmp_path / "two"), losses(tmp_path / "one"))
    for rank in (0, 1):
        half, whole = held(tmp_path / "two", rank), held(tmp_path / "one", 0)
        print(preset, rank, half, whole)
        for kind in ("weights", "gradients", "moments"):
            assert half[kind] == pytest.approx(whole[kind] / 2, rel=0.01)


def test_a_sharded_run_resumes_bit_for_bit(runs):
    assert losses(runs / "halves") == losses(runs / "fsdp")
    a, b = (read_checkpoint(resumable(runs / name)[0]) for name in ("halves", "fsdp"))
    assert a["step"] == 4 and same_tree(a["model"], b["model"])
    assert same_tree(a["optimizers"][0]["state"], b["optimizers"][0]["state"])


def test_a_run_goes_on_with_another_number_of_processes(runs):
    """From one process to two shards and back, with other micro-batches."""
    assert close(losses(runs / "handed"), losses(runs / "one"))
    assert (runs / "handed" / "step-000000003").is_dir(), "of two processes"
    assert read_checkpoint(runs / "handed" / "ckpt.pt")["step"] == 4, "of one"


def test_all_commands_read_a_sharded_run_and_it_becomes_a_file(runs, data_dir, tmp_path):
    out = shutil.copytree(runs / "fsdp", tmp_path / "run")
    asked = [f"--out_dir={out}", "--rows=8", "--health_rows=0"]
    best = result(call("tools/eval.py", *asked, "--checkpoint=best"))["data"]
    last = result(call("tools/eval.py", *asked, "--checkpoint=last"))["data"]
    by_path = result(call("tools/eval.py", f"--out_dir={out}/step-000000004", *asked[1:]))["data"]
    save_checkpoint(out, read_checkpoint(out / "step-000000004"))
    for folder in folders(out):
        shutil.rmtree(folder)
    file = result(call("tools/eval.py", *asked, "--checkpoint=last"))["data"]
    assert best == last == by_path == file
    assert "step 4" in call("tools/sample.py", f"--out_dir={out}", "--checkpoint=last",
                            "--text=a [MASK]").stdout


# ---- damaged and missing parts ---------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "flipped", "no manifest", "no state"])
def test_a_damaged_sharded_checkpoint_falls_back_to_the_one_before(damage, runs, tmp_path):
    out = shutil.copytree(runs / "fsdp", tmp_path / "run")
    newest, older = folders(out)
    shard = sorted(name for name in os.listdir(newest) if name.startswith("shard-00002"))[0]
    path = os.path.join(newest, shard)
    if damage == "missing":
        os.remove(path)
        message = f"{newest} is damaged: {shard} is missing"
    elif damage == "flipped":
        content = bytearray(open(path, "rb").read())
        content[-5] ^= 1
        open(path, "wb").write(content)
        message = f"{newest} is damaged: the checksum of {shard} does not fit"
    else:
        name = {"no manifest": "manifest.json", "no state": "state.json"}[damage]
        os.remove(os.path.join(newest, name))
        message = f"{newest} is damaged: {name} is missing"
    said = []
    path, checkpoint = first_readable(resumable(out), said.append)
    assert path == older and checkpoint["step"] == 0 and said == [f"WARNING: {message}"]


def test_two_damaged_sharded_checkpoints_are_refused(runs, data_dir, tmp_path):
    out = shutil.copytree(runs / "fsdp", tmp_path / "run")
    for folder in folders(out):
        os.remove(os.path.join(folder, "manifest.json"))
    refused(train(data_dir, out, *STEPS, ok=False), "manifest.json is missing",
            "no checkpoint in", "can be read")


# ---- refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("args, parts", [
    (["--parallel=fsdp"], ["parallel=fsdp", "there is one process", "--parallel=ddp"]),
    (["--parallel=zero3"], ["parallel='zero3'", "expected ddp, fsdp"]),
    (["--checkpoint_every=-1"], ["checkpoint_every=-1", "0 or more"]),
    (["--checkpoint_every=4"], ["checkpoint_every=4: this model has 3 blocks"]),
])
def test_what_cannot_be_shared_out_is_refused(args, parts, data_dir, tmp_path):
    refused(train(data_dir, tmp_path / "run", *args, ok=False), *parts)


def test_shards_have_no_loss_scaling():
    """Only a GPU computes fp16, and one without bf16 is given it by dtype=auto."""
    with pytest.raises(ValueError, match="parallel=fsdp with dtype=fp16"):
        check_with_data(dict(parallel="fsdp", arch="concept"), False, "fp16")


def test_processes_that_differ_are_refused_with_what_differs(monkeypatch):
    def gather(of_all, mine):
        of_all[:] = [mine, (mine[0] | dict(torch="2.11.0", checkpoint="None"), "second")]
    monkeypatch.setattr(dist, "all_gather_object", gather)
    two = Machine(torch.device("cpu"), 0, 2)
    with pytest.raises(ValueError) as error:
        check_same_everywhere(two, torch="2.13.0", seed=1, checkpoint=20)
    assert "torch: 2.13.0 in process 0 on" in str(error.value)
    assert "2.11.0 in process 1 on second" in str(error.value)
    assert "checkpoint: 20 in process 0" in str(error.value) and "seed" not in str(error.value)

    def broken(*_):
        raise RuntimeError("Connection closed by peer\nstack")
    monkeypatch.setattr(dist, "all_gather_object", broken)
    with pytest.raises(ValueError, match="another process ended before the start"):
        check_same_everywhere(two, seed=1)


# ---- one process in a group of its own: the same code, without a second process -----------


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def sharded(model):
    return Distributed(model, "fsdp", ONE, "fp32"), adamw(model)


def content(distributed, opt, step):
    return dict(model=distributed.weights(), optimizers=[opt.state_dict()], step=step,
                evaluated_at=-1, best_loss=float("inf"), scaler={}, model_settings={},
                settings={}, tokens=0, tokenizer_fingerprint="", data_sha256=[])


def update(distributed, opt, poisoned=False):
    loss = distributed.net(*small_batch())
    (loss * (float("nan") if poisoned else 1)).backward()
    norm = distributed.clip_gradients(1.0)
    opt.found_inf = (~norm.isfinite()).float()
    opt.step()
    opt.zero_grad()
    return float(loss.detach()), float(norm)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_shard_of_one_is_the_model(arch, alone):
    """Losses, norms and skipped updates are those of a plain model, the norm that of torch."""
    plain, model = small_model(arch), small_model(arch)
    distributed, opt = sharded(model)
    theirs = Distributed(plain, "ddp", ONE, "fp32")
    other = adamw(plain)
    for poisoned in (False, True, False):
        ours, expected = (update(d, o, poisoned) for d, o in ((distributed, opt), (theirs, other)))
        assert ours == pytest.approx(expected, rel=1e-5, nan_ok=True)
    with distributed.whole_model() as gathered, torch.no_grad():
        assert float(gathered(*small_batch())) == pytest.approx(float(plain(*small_batch())))
    assert sum(p.numel() for p in distributed.twin.parameters()) == 0, "given back"
    assert same_tree(distributed.weights(whole=True).keys(), dict(plain.state_dict()).keys())


@pytest.mark.parametrize("arch, use_compile, how", [
    *((arch, False, "fsdp") for arch in ARCHS), ("transformer", True, "fsdp"),
    *(pytest.param(arch, True, how, marks=pytest.mark.by_hand)
      for arch in ARCHS for how in ("ddp", "fsdp"))])
def test_bf16_compiled_and_recomputed(arch, use_compile, how, alone, monkeypatch):
    """Weights stay fp32; blocks compute in bf16, as autocast has them; the loss is fp32."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    plain, model = small_model(arch), small_model(arch)
    distributed = Distributed(model, how, ONE, "bf16", use_compile, recompute_every=2)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = distributed.net(*small_batch()), plain(*small_batch())
    ours.backward(), theirs.backward()
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-3)
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    assert float(distributed.clip_gradients(1.0)) == pytest.approx(float(norm), rel=2e-2)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters()
               if p.grad is not None)


@pytest.mark.parametrize("moment", ["manifest", "rename", "second rename", "remove"])
def test_a_process_that_dies_while_saving_leaves_a_checkpoint(moment, alone, tmp_path, monkeypatch):
    distributed, opt = sharded(small_model())
    update(distributed, opt)
    for step in (1, 2):
        distributed.save(tmp_path, content(distributed, opt, step), f"step-{step:09d}")
    distributed.wait()
    before = read_folder(tmp_path / "step-000000002")
    update(distributed, opt)
    calls = []

    def dies(real, at):
        def step(*args, **kwargs):
            calls.append(args)
            if len(calls) == at:
                raise Crash
            return real(*args, **kwargs)
        return step
    name, owner, at = dict(manifest=("write_json", parallel, 1), rename=("rename", os, 1),
                           remove=("rmtree", shutil, 1)).get(moment, ("rename", os, 2))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies(getattr(owner, name), at))
        # the same step again, as after an evaluation: the folder is replaced
        distributed.save(tmp_path, content(distributed, opt, 2), "step-000000002")
        with pytest.raises(Crash):
            distributed.wait()
    said = []
    _, found = first_readable(resumable(tmp_path), said.append)
    assert found["step"] == 2 and not said
    is_new = moment == "remove"
    assert same_tree(found["model"], before["model"]) != is_new
    distributed.save(tmp_path, content(distributed, opt, 3), "step-000000003")
    distributed.wait()
    assert [os.path.basename(path) for path in folders(tmp_path)][0] == "step-000000003"
    assert len(os.listdir(tmp_path)) == parallel.KEEP, "nothing else is left behind"


@pytest.mark.parametrize("place", ["file_hash", "write_json"])
def test_a_full_disk_ends_the_first_checkpoint_and_is_a_warning_later(
        place, alone, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    distributed, opt = sharded(small_model())
    update(distributed, opt)
    said = []
    monkeypatch.setattr(Machine, "say", lambda _, *words: said.append(" ".join(words)))
    with monkeypatch.context() as patch:
        patch.setattr(parallel, place, full)
        with pytest.raises(OSError, match="step-000000001 was not written .*No space left"):
            distributed.save(tmp_path, content(distributed, opt, 1), "step-000000001")
    distributed.save(tmp_path, content(distributed, opt, 2), "step-000000002")
    gathered, gather = [], dist.all_gather_object
    with monkeypatch.context() as patch:
        patch.setattr(parallel, place, full)
        patch.setattr(dist, "all_gather_object", lambda of_all, mine, **how: (
            gathered.append(mine), gather(of_all, mine, **how)))
        distributed.save(tmp_path, content(distributed, opt, 3), "step-000000003")
        distributed.save(tmp_path, content(distributed, opt, 4), "step-000000004")
        distributed.close()
    assert len(said) == 2 and all("No space left" in line for line in said)
    assert [os.path.basename(path) for path in folders(tmp_path)] == ["step-000000002"]
    where = "in the second" if place == "write_json" else "in the first"
    assert len(gathered) == 2 * (1 + (place == "write_json")), (
        f"the processes that wait {where} exchange hear of it")


def test_what_is_saved_is_the_moment_of_the_call(alone, tmp_path):
    """Training goes on while the thread writes; that must not reach the files."""
    distributed, opt = sharded(small_model())
    update(distributed, opt)
    distributed.save(tmp_path, content(distributed, opt, 1), "step-000000001")
    now = {name: t.clone() for name, t in distributed.weights(whole=True).items()}
    moment = opt.state[distributed.model.wte]["exp_avg"].full_tensor().clone()
    distributed.save(tmp_path, content(distributed, opt, 2), "step-000000002")
    with torch.no_grad():
        for p in distributed.model.parameters():
            p.add_(1)
            opt.state[p]["exp_avg"].add_(1)
    distributed.wait()
    saved = read_folder(tmp_path / "step-000000002")
    assert same_tree(saved["model"], now) and saved["best_loss"] == float("inf")
    assert torch.equal(saved["optimizers"][0]["state"][0]["exp_avg"], moment)


def test_weights_that_are_not_finite_are_never_written(alone, tmp_path):
    distributed, opt = sharded(small_model())
    with torch.no_grad():
        distributed.model.wte[3, 3] = float("nan")
    with pytest.raises(FloatingPointError):
        distributed.save(tmp_path, content(distributed, opt, 1), "step-000000001")
    assert not os.listdir(tmp_path)


# ---- recomputed activations ------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_recomputed_activations_change_no_bit(arch):
    found = []
    for every in (0, 1, 2):
        model = small_model(arch, dropout=0.2)
        recompute(model, every)
        torch.manual_seed(1)
        loss = model(*small_batch())
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
