"""What at least two commands need: checkpoints, evaluation, the log.

Nothing here knows about settings files; commands pass plain values in.
"""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import traceback
import zipfile
from dataclasses import asdict, fields

import torch
import torch.nn.functional as F

from data.tokenizer import Tokenizer
from lib.baselines import Transformer, TransformerConfig
from lib.files import replace_file
from lib.machine import autocast, is_out_of_memory
from masking import mask_batch
from model import ConceptConfig, ConceptEncoder

ARCHS = {"concept": (ConceptConfig, ConceptEncoder), "transformer": (TransformerConfig, Transformer)}
MOST_LOGITS = 2**27  # an evaluation holds no more at once
EVAL_SEED = 1234  # evaluation masks depend on this and the row's number in the data set, on nothing else


@contextlib.contextmanager
def user_mistakes():
    """Around set-up: what the modules refuse ends the program with their one message instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def git_state():
    """What the code is: `git describe` of this folder, "-dirty" behind it where files have changed; "" without git."""
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                          cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()


# ---- checkpoints ------------------------------------------------------------

def save_checkpoint(out_dir, checkpoint, name="ckpt.pt"):
    """Writes out_dir/name; the file it replaces stays as ckpt_prev.pt. Refuses weights that are not finite."""
    tensors = [t for t in checkpoint["model"].values() if t.is_floating_point()]
    if not all(torch.isfinite(t).all() for t in tensors):
        raise FloatingPointError("the weights are not finite; nothing was written")
    keep = os.path.join(out_dir, "ckpt_prev.pt") if name == "ckpt.pt" else ""
    replace_file(os.path.join(out_dir, name), lambda file: torch.save(checkpoint, file), keep)


def save_or_warn(out_dir, checkpoint, name):
    """save_checkpoint, but a full disk ends the program only when there is no checkpoint to go on from yet."""
    try:
        save_checkpoint(out_dir, checkpoint, name)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        free = f"{error}; {shutil.disk_usage(out_dir).free / 2**20:,.0f} MiB free"
        if not os.path.exists(os.path.join(out_dir, "ckpt.pt")):
            sys.exit(f"error: cannot write a first checkpoint to {out_dir}: {free}")
        print(f"WARNING: {name} was not written ({free}); the previous one stays", flush=True)


def read_checkpoint(path):
    """Tensors and plain Python; raises ValueError for a file that is cut short or has a flipped bit."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums that the file carries
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{path} is damaged: the checksum of {damaged} does not fit")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib, pickle and torch each have their own word for a damaged file
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from None


def latest_checkpoint(out_dir, say=print):
    """The newest checkpoint that is whole, or None if there never was one. Falls back to the previous one, loudly."""
    found = [path for name in ("ckpt.pt", "ckpt_prev.pt") if os.path.exists(path := os.path.join(out_dir, name))]
    for path in found:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            say(f"WARNING: {error}")
    if found:
        raise ValueError(f"no checkpoint in {out_dir} can be read; restore one or start afresh in another --out_dir")
    return None


def build_model(model_settings):
    """Model settings as a checkpoint stores them ("arch" and the fields of its config) -> model with fresh weights."""
    settings = {"arch": "concept"} | model_settings
    config_class, model_class = ARCHS[settings.pop("arch")]
    return model_class(config_class(**settings))


def fields_of(arch):
    """Names of the settings of an architecture."""
    return {field.name for field in fields(ARCHS[arch][0])}


def differences(checkpoint, model, tok, data_sha256, settings):
    """Why a run with these settings is not the one of the checkpoint -> list of messages, empty if it is."""
    (now, weights), before = model_state(model), dict(checkpoint["model_settings"])
    old = dict(data_weights="", rows="block", block_schedule="") | checkpoint["settings"]  # older runs had no others
    for n in ("seed", "batch_size", "optimizer", "data_weights", "rows", "block_schedule"):
        now[n], before[n] = settings[n], old[n]
    found = [f"{k}: {before.get(k)} in the checkpoint, {v} here" for k, v in now.items() if before.get(k) != v]
    if not found and {k: p.shape for k, p in weights.items()} != {k: p.shape for k, p in checkpoint["model"].items()}:
        found.append("model.py: it has other weights than the checkpoint")
    if checkpoint["tokenizer_fingerprint"] != tok.fingerprint:
        found.append(f"the tokenizer of {settings['data_dir']} is not the one of the checkpoint")
    if checkpoint["data_sha256"] != data_sha256:
        found.append(f"{settings['data_dir']} holds other tokens than {checkpoint['settings']['data_dir']} did")
    return found


def load_run(out_dir, device):
    """For commands that start from a training run -> (model in eval mode on device, tokenizer, checkpoint).

    Takes best.pt, else the newest ckpt.pt. Raises ValueError or FileNotFoundError saying what is missing.
    """
    best = os.path.join(out_dir, "best.pt")
    checkpoint = None
    if os.path.exists(best):
        try:
            checkpoint = read_checkpoint(best)
        except ValueError as error:
            print(f"WARNING: {error}; trying ckpt.pt", file=sys.stderr)
    checkpoint = checkpoint or latest_checkpoint(out_dir)
    if checkpoint is None:
        raise FileNotFoundError(f"{out_dir} holds no checkpoint; train first: python train.py --out_dir={out_dir}")
    tok = Tokenizer.load(os.path.join(out_dir, "tokenizer"))
    if tok.fingerprint != checkpoint["tokenizer_fingerprint"]:
        raise ValueError(f"{out_dir}/tokenizer is not the one its checkpoint was trained with "
                         f"({tok.fingerprint[:12]} against {checkpoint['tokenizer_fingerprint'][:12]})")
    try:
        model = build_model(checkpoint["model_settings"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError) as error:  # people edit model.py
        raise ValueError(f"{out_dir} was trained with another model.py, see git in its config.json: {error}") from None
    return model.to(device).eval(), tok, checkpoint


def take_weights(model, out_dir, tok, data_dir):
    """Loads the weights of another run into `model`; ValueError if they do not fit it, or the tokens of data_dir."""
    other, other_tok, _ = load_run(out_dir, "cpu")
    if other_tok.fingerprint != tok.fingerprint:
        raise ValueError(f"{out_dir} was trained with another tokenizer than that of {data_dir}")
    try:
        model.load_state_dict(other.state_dict())
    except RuntimeError as error:
        raise ValueError(f"the weights of {out_dir} do not fit this model: {error}") from None


def model_state(model):
    """(settings as a dict, weights on the CPU) of an uncompiled, unwrapped model."""
    settings = dict(arch=model.arch) | asdict(model.cfg)
    return settings, {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}


def does_not_fit(error, model, batch, machine, dtype, rows, setting, loss_of=None, unit=1):
    """Memory ran out in a step -> what to do: the largest half, quarter, ... of `rows` that is found to fit.

    loss_of(*tensors) is the loss of a part of `batch`, whose first tensor is (B,T): that of the model, if not told.
    setting is what the user lowers, and counts `unit` rows of this batch as one.
    Raises the error if it was another one.
    """
    if not is_out_of_memory(error):
        raise error
    traceback.clear_frames(error.__traceback__)  # they hold what the failed step had computed
    found = f"error: {rows * unit} rows of {batch[0].shape[1]} tokens do not fit into memory"
    fewer = rows // 2
    while fewer:
        model.zero_grad(set_to_none=True)
        try:
            with autocast(machine.device, dtype):
                loss = (loss_of or model)(*(t[: fewer * unit] for t in batch))
            loss.backward()
            return f"{found}; --{setting}={fewer} does" + ", and the result is the same" * (setting == "micro_batch")
        except RuntimeError as again:
            if not is_out_of_memory(again):
                raise
        fewer //= 2
    return f"{found}, nor does a single row; shorten the rows or take a smaller model"


# ---- evaluation -------------------------------------------------------------

@torch.no_grad()
def evaluate(model, data, tok, machine, dtype, masking_type="token", mlm_probability=0.15, rows=256, micro_batch=32,
             frequency=None):
    """Loss on fixed masks of the first `rows` rows of `data`, the same for every model, batch size and device.

    -> {"loss" (nats a predicted token), "accuracy", "perplexity", "bits_per_byte" (of the predicted tokens' text; None
    when only ids are known), "predicted" (tokens)}. All [MASK], no other replacement. Every rank takes part.
    frequency: share of each id in the training text, float (V,); adds "splits": {name: {"loss", "share"}}, the loss
    where the predicted token stands elsewhere in the row or does not, by distance to its nearest copy, by frequency.
    """
    was_training = model.training
    model.eval()
    n_bytes = torch.from_numpy(tok.n_bytes).to(machine.device)
    sums = torch.zeros(4 + 2 * len(SPLITS), dtype=torch.float64)
    mine = torch.arange(machine.rank, min(rows, data.n_blocks), machine.world_size)
    for index in mine.split(micro_batch):
        ids = torch.as_tensor(data.block(index.numpy()))
        batch = mask_batch(ids, index, masking_type, mlm_probability, tok, seed=EVAL_SEED)
        inputs, positions, targets, weights = machine.take(batch)
        with autocast(machine.device, dtype):
            is_real = inputs != tok.pad_id if getattr(data, "padded", False) else None
            concepts, tokens = model.encode(inputs, is_real)
            nats, hits, at_once = [], [], max(1, MOST_LOGITS // (len(inputs) * tok.vocab_size))
            for place, target in zip(positions.split(at_once, 1), targets.split(at_once, 1)):
                logits = model.logits(model.decode(concepts, tokens, place, model.documents(inputs), is_real)).float()
                nats.append(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target))
                hits.append(logits.argmax(-1) == target)
        nats, hits = (torch.cat(parts, dim=1) * weights for parts in (nats, hits))
        counts = [nats, weights, hits, n_bytes[targets] * weights]
        if frequency is not None:
            for part in split_masks(inputs, positions, targets, frequency.to(machine.device)):
                counts += [nats * part, weights * part]
        sums[:len(counts)] += torch.stack([c.sum() for c in counts]).double().cpu()
    model.train(was_training)
    nats, predicted, hits, text_bytes, *parts = machine.all_sum(*sums)
    if not predicted:
        raise ValueError("no token of the evaluation rows can be masked: they hold special tokens only")
    loss = nats / predicted
    result = dict(loss=loss, accuracy=hits / predicted, perplexity=math.exp(min(loss, 100)), predicted=int(predicted),
                  bits_per_byte=nats / math.log(2) / max(text_bytes, 1) if tok.has_text else None)
    if frequency is not None:
        result["splits"] = {name: {"loss": parts[2 * i] / parts[2 * i + 1] if parts[2 * i + 1] else None,
                                   "share": parts[2 * i + 1] / predicted} for i, name in enumerate(SPLITS)}
    return result


def evaluate_all(model, sets, shares, *args, **settings):
    """`evaluate` of several data sets -> (loss, accuracy and bits_per_byte of their mixture, {name: loss} of each)."""
    each = {name: evaluate(model, data, *args, **settings) for name, data in sets.items()}
    mean = {}
    for key in ("loss", "accuracy", "bits_per_byte"):
        values = [r[key] for r in each.values()]
        mean[key] = None if None in values else sum(share * value for share, value in zip(shares, values))
    return mean, {name: r["loss"] for name, r in each.items()}


SPLITS = ("copy in the row", "no copy", "copy 1-8 away", "copy 9-32 away", "copy 33-128 away", "copy over 128 away",
          "frequent, over 1e-3", "medium, 1e-4 to 1e-3", "rare, under 1e-4", "not frequent, with copy",
          "not frequent, no copy")


def split_masks(inputs, positions, targets, frequency):
    """Which predicted tokens (B,K) belong to each of SPLITS. A copy is the same id, visible in the same row."""
    place = torch.arange(inputs.shape[1], device=inputs.device)
    same = inputs[:, None] == targets[..., None]  # (B,K,T)
    near = (place - positions[..., None]).abs().masked_fill(~same, 2**30).amin(-1)
    share, copy = frequency[targets], near < 2**30
    frequent, rare = share > 1e-3, share < 1e-4
    return (copy, ~copy, near <= 8, (near > 8) & (near <= 32), (near > 32) & (near <= 128), (near > 128) & copy,
            frequent, ~frequent & ~rare, rare, ~frequent & copy, ~frequent & ~copy)


def token_frequency(data, tok, rows=4096):
    """Share of each id in up to `rows` rows, spread over all of `data` -> float32 (V,)."""
    n = min(rows, data.n_blocks)
    counts = torch.zeros(tok.vocab_size)
    for index in (torch.arange(n) * data.n_blocks // n).split(256):
        counts += torch.bincount(torch.as_tensor(data.block(index.numpy())).flatten(), minlength=tok.vocab_size)
    return counts / counts.sum()


# ---- log --------------------------------------------------------------------

def append_log(out_dir, record):
    """One JSON object a line; what is not a finite number becomes null, which JSON has a word for."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with open(os.path.join(out_dir, "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_log(out_dir):
    """Records of log.jsonl; a line cut short or garbled by a crash is left out."""
    path, records = os.path.join(out_dir, "log.jsonl"), []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
    return records


def rewind_log(out_dir, step):
    """Drops what a crashed run logged after the checkpoint that is being resumed."""
    kept = "".join(json.dumps(r) + "\n" for r in read_log(out_dir) if r["step"] <= step)
    replace_file(os.path.join(out_dir, "log.jsonl"), lambda file: file.write(kept.encode()))
