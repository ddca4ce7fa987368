"""One model trained by several processes: copied to each (ddp) or cut into shards (fsdp).

ddp    Each process holds all weights, gradients and moments. Gradients are summed over processes
       once an update (DistributedDataParallel).
fsdp   Each process holds one of n equal parts of all three (ZeRO-3, 1910.02054, as torch's
       fully_shard). The weights of a block are gathered before it computes and dropped behind it.

Under fsdp a checkpoint is a folder, out_dir/step-N/. Every process writes its own part into it, as
safetensors, which cannot run code: torch's other format is a pickle. state.json holds all that is
no tensor, manifest.json the sha256 of each file. The files are written by a thread while training
goes on, into step-N.tmp/, which is renamed when all are there. read_folder puts the parts together
again, for any number of processes or for one: all commands read such a folder as they do ckpt.pt.
"""

import contextlib
import copy
import json
import os
import re
import shutil
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import escape, glob

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from lib.files import file_hash, read_json, sync_folder, write_json
from lib.resonance import Resonance

KEEP = 2  # complete checkpoints that stay

# ---- before the first step ----------------------------------------------------------------------


def check_same_everywhere(machine, **facts):
    """ValueError, in every process, if one of these facts is not the same in all of them."""
    if machine.world_size == 1:
        return
    of_all = [None] * machine.world_size
    mine = {name: str(value) for name, value in facts.items()}
    try:
        dist.all_gather_object(of_all, (mine, socket.gethostname()))
    except RuntimeError as error:
        raise ValueError("another process ended before the start, its message says why "
                         f"({str(error).splitlines()[0]})") from None
    (first, host), problems = of_all[0], []
    for rank, (found, other_host) in enumerate(of_all):
        problems += [f"{name}: {first[name]} in process 0 on {host}, {found[name]} in process "
                     f"{rank} on {other_host}" for name in first if found[name] != first[name]]
    if problems:
        raise ValueError("\n       ".join([
            "the processes of a run must agree; start all machines with the same code, packages, "
            "settings and data, and an out_dir that all of them see:", *problems[:8]]))


def recompute(model, every):
    """Has every n-th block compute its activations again in the backward pass (1604.06174).

    every=0: none does. The result is the same, bit for bit; a step takes less memory and up to a
    third more time. Raises ValueError if there are fewer blocks.
    """
    blocks = model.blocks()
    if not 0 <= every <= len(blocks):
        raise ValueError(f"checkpoint_every={every}: this model has {len(blocks)} blocks; 0 for "
                         f"none, 1 for all, up to {len(blocks)} for one of them")
    for block in blocks[every - 1::every] if every else []:
        block.forward = recomputing(block.forward)


def recomputing(forward):
    def run(*args):
        return recomputed(forward, *args, use_reentrant=False)
    return run


def in_dtype_of_input(norm):
    """The forward of an nn.LayerNorm with weights of another dtype than what it reads."""
    def run(x):
        weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
    return run


# ---- training -----------------------------------------------------------------------------------


class Distributed:
    """A model and `net`, which shares its weights and is called in training steps.

    how: "ddp" or "fsdp". use_compile: by torch.compile, as a whole or, where something happens
    between the blocks, each block. recompute_every: see `recompute`, which may raise a ValueError.
    """

    def __init__(self, model, how, machine, dtype, use_compile=False, recompute_every=0):
        self.model, self.machine = model, machine
        self.is_sharded = how == "fsdp"
        self.saving = None  # the checkpoint that a thread is writing
        if self.is_sharded:
            # The model without its weights: whole_model gathers them into it.
            empty = {id(p): torch.nn.Parameter(p.new_empty(0)) for p in model.parameters()}
            self.twin = copy.deepcopy(model, empty).to(machine.device)
        compiled = partial(torch.compile, fullgraph=True, dynamic=False)
        if use_compile and (self.is_sharded or recompute_every):
            for block in model.blocks():
                block.forward = compiled(block.forward)
            use_compile = False
        recompute(model, recompute_every)
        if self.is_sharded:
            self.net = model
            self.shard(dtype)
            return
        model.to(machine.device)
        self.net = compiled(model) if use_compile else model
        if machine.world_size > 1:
            device_ids = [machine.device.index] if machine.device.type == "cuda" else None
            # views: gradients are not kept a second time for sending them
            self.net = DistributedDataParallel(self.net, device_ids=device_ids,
                                               gradient_as_bucket_view=True)

    def shard(self, dtype):
        # imported here: they take seconds, which runs without fsdp need not wait for
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # The weights of process 0 go to all, as under ddp.
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, 0)
        device = self.machine.device
        mesh = init_device_mesh(device.type, (self.machine.world_size,))
        # Single numbers have no parts; clip_gradients adds up their gradients.
        self.scalars = [p for p in self.model.parameters() if p.ndim == 0]
        for p in self.scalars:
            p.data = p.data.to(device)
        # Blocks are gathered in the dtype that autocast multiplies in, which halves the traffic.
        # What they read, add up and hand on stays fp32, as do the tables and the loss, which belong
        # to the model itself. Oscillators must not be rounded, so blocks with such are left alone.
        in_fp32 = MixedPrecisionPolicy(cast_forward_inputs=False)
        in_bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in self.model.blocks():
            has_oscillators = any(isinstance(part, Resonance) for part in block.modules())
            as_sent = in_bf16 if dtype == "bf16" and not has_oscillators else in_fp32
            for part in block.modules():
                if as_sent is in_bf16 and isinstance(part, torch.nn.LayerNorm):
                    part.forward = in_dtype_of_input(part)
            fully_shard(block, mesh=mesh, mp_policy=as_sent)
        fully_shard(self.model, mesh=mesh, ignored_params=set(self.scalars))
        # Checkpoints are written beside training, so they need a group of their own.
        self.group = dist.new_group(backend="gloo")
        self.writer = ThreadPoolExecutor(1)

    def accumulate(self, is_last):
        """Context of a forward and backward pass. Under ddp gradients are summed at the last only;
        fsdp sums each time, because a process has no room for the gradients of all weights.
        """
        if self.net is self.model or is_last:
            return contextlib.nullcontext()
        return self.net.no_sync()

    def clip_gradients(self, max_norm):
        """As torch.nn.utils.clip_grad_norm_ -> the norm over all weights before, a tensor."""
        if not self.is_sharded:
            return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        with_gradient = [p for p in self.model.parameters() if p.grad is not None]
        shards = [p.grad.to_local() for p in with_gradient if p.ndim]
        square = torch.stack(torch._foreach_norm(shards)).square().sum()
        dist.all_reduce(square)
        whole = [p.grad for p in with_gradient if not p.ndim]
        if whole:
            mean = torch.stack(whole)  # fsdp averages over processes, and so do we
            dist.all_reduce(mean)
            mean /= self.machine.world_size
            torch._foreach_copy_(whole, list(mean.unbind()))
            square += mean.square().sum()
        norm = square.sqrt()
        torch._foreach_mul_(shards + whole, (max_norm / (norm + 1e-6)).clamp(max=1))
        return norm

    @contextlib.contextmanager
    def whole_model(self):
        """The model with all weights in this process, for evaluations; all processes enter it."""
        if not self.is_sharded:
            yield self.model
            return
        for p, part in zip(self.twin.parameters(), self.model.parameters()):
            p.data = in_one_piece(part)
        yield self.twin
        for p in self.twin.parameters():
            p.data = p.data.new_empty(0)

    # ---- checkpoints ---------------------------------------------------------------------------

    def checkpoint_name(self, step):
        return f"step-{step:09d}" if self.is_sharded else "ckpt.pt"

    def weights(self, whole=False):
        """{name: weight} for a checkpoint: copies on the CPU or, under fsdp, shards.

        whole: no shards, but all of fsdp's weights in the main process, {} in the others.
        """
        state = self.model.state_dict()
        if self.is_sharded and not whole:
            return state
        found = {}
        for name, tensor in state.items():
            tensor = in_one_piece(tensor)  # one after another: a GPU need not hold all
            if self.machine.is_main:
                found[name] = tensor.cpu().clone()
        return found

    def take(self, checkpoint, optimizers):
        """What read_folder(load=False) or a ckpt.pt gave -> the same with shards for fsdp.

        Each process reads its own part of a folder only. Without fsdp it is returned as it is.
        """
        if not self.is_sharded:
            return checkpoint
        from torch.distributed.tensor import DTensor, distribute_tensor

        folder = checkpoint.get("folder")
        tensors, rest = take_out(checkpoint)
        # the weights, and for each moment the weight that it belongs to
        parts = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        for i, opt in enumerate(optimizers):
            of_group = [p for group in opt.param_groups for p in group["params"]]
            for n, p in enumerate(of_group):
                for key in checkpoint["optimizers"][i]["state"].get(n, {}):
                    parts[f"optimizers/{i}/state/{n}/{key}"] = p
        for path, t in tensors.items():
            part = parts.get(path)
            is_part = isinstance(part, DTensor) and part.shape == t.shape
            if folder:
                t = torch.empty_like(part) if is_part else torch.empty_like(t, device="cpu")
            elif is_part:  # each process cuts out its own part: all have read the same file
                t = distribute_tensor(t, part.device_mesh, part.placements, src_data_rank=None)
            tensors[path] = t.detach()
        if folder:
            fill(tensors, folder, process_group=self.group)
        return put_back(rest, tensors)

    def save(self, out_dir, checkpoint, name):
        """Starts writing a checkpoint whose weights and moments are shards into out_dir/name/.

        It returns when the tensors have been copied. The first one of a folder is waited for, so
        that a disk that is full or not writable shows at once. Raises FloatingPointError, and
        writes nothing, when weights are not finite, and OSError.
        """
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

        try:
            self.wait()
        except OSError as error:
            self.machine.say(f"WARNING: {error}; the previous checkpoint stays")
        local = [local_part(t) for t in checkpoint["model"].values() if t.is_floating_point()]
        bad = [not bool(norm.isfinite()) for norm in torch._foreach_norm(local)]
        if self.machine.all_sum(any(bad))[0]:
            raise FloatingPointError("the weights are not finite; nothing was written")
        tensors, rest = take_out(checkpoint)
        folder = os.path.join(out_dir, name)
        problem = 0
        if self.machine.is_main:
            try:
                for left in glob(os.path.join(escape(out_dir), "step-*.tmp")):
                    shutil.rmtree(left)  # of a process that was killed
                os.makedirs(folder + ".tmp")
                with open(os.path.join(folder + ".tmp", "state.json"), "w") as file:
                    json.dump(rest, file)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                problem = error
        if self.machine.all_sum(bool(problem))[0]:  # all wait for the folder, and know if it failed
            raise problem or OSError("process 0 could not write")
        writer = HuggingFaceStorageWriter(folder + ".tmp", save_distributed=True)
        written = async_save(tensors, storage_writer=writer, process_group=self.group)
        self.saving = self.writer.submit(self.finish, written, folder)
        if not folders(out_dir):
            self.wait()

    def finish(self, written, folder):
        """Run by the thread: waits until all have written, then the manifest and the rename."""
        try:
            written.result()
            mine = f"shard-{self.machine.rank + 1:05d}-"
            hashes = {name: file_hash(os.path.join(folder + ".tmp", name))
                      for name in os.listdir(folder + ".tmp")
                      if name.startswith(mine) or (self.machine.is_main and name == "state.json")}
            problem = ""
        except BaseException as error:  # torch's own is no Exception
            hashes, problem = {}, f"{os.path.basename(folder)} was not written ({error})"
        of_all = [None] * self.machine.world_size
        dist.all_gather_object(of_all, (hashes, problem), group=self.group)
        for found, others_problem in of_all:
            hashes, problem = hashes | found, problem or others_problem
        if problem:
            if self.machine.is_main:
                shutil.rmtree(folder + ".tmp", ignore_errors=True)
            raise OSError(problem)
        if self.machine.is_main:
            try:
                put_in_place(folder, hashes)
            except OSError as error:
                problem = f"{os.path.basename(folder)} was not written ({error})"
        # The others wait for the folder, and know if it failed.
        dist.all_gather_object(of_all, problem, group=self.group)
        if any(of_all):
            raise OSError("".join(of_all))

    def close(self):
        """Waits for the latest checkpoint, and lets go of the process group. -> whether it is
        written.
        """
        self.net = None  # DistributedDataParallel holds on to the group
        try:
            self.wait()
        except OSError as error:
            self.machine.say(f"WARNING: {error}; the previous checkpoint stays")
            return False
        return True

    def wait(self):
        """Returns when the latest checkpoint is on disk. Raises OSError if it cannot be written."""
        saving, self.saving = self.saving, None
        if saving:
            saving.result()


def in_one_piece(tensor):
    """A weight in one piece, without gradient; all processes call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_part(tensor):
    """What this process holds of a weight."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- a checkpoint as a folder -------------------------------------------------------------------


def step_of(path):
    """The step of a folder step-N/; None for anything else. Half a step less for step-N.old/, which
    is there while step-N/ is replaced.
    """
    match = re.fullmatch(r"step-(\d+)(\.old)?", os.path.basename(os.path.normpath(path)))
    if not match or not os.path.isdir(path):
        return None
    return int(match[1]) - (0.5 if match[2] else 0)


def folders(out_dir):
    """Complete checkpoints step-N/ of a run -> list of paths, the newest first."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    steps = {path: step_of(path) for path in (os.path.join(out_dir, name) for name in names)}
    return sorted((path for path in steps if steps[path] is not None), key=steps.get, reverse=True)


def put_in_place(folder, hashes):
    """Makes folder.tmp, whose files are written, the run's newest checkpoint. Raises OSError."""
    write_json(os.path.join(folder + ".tmp", "manifest.json"), hashes)
    # of a step that is saved again, after an evaluation, the old one goes last
    if os.path.exists(folder):
        os.rename(folder, folder + ".old")
    os.rename(folder + ".tmp", folder)
    out_dir = os.path.dirname(folder)
    sync_folder(out_dir)
    shutil.rmtree(folder + ".old", ignore_errors=True)
    for old in folders(out_dir)[KEEP:]:
        shutil.rmtree(old)


def read_folder(folder, load=True):
    """-> the checkpoint that was saved, with whole tensors. ValueError if a file is not as written.

    load=False: tensors without content on the device "meta", and the folder's name as "folder",
    for Distributed.take.
    """
    try:
        manifest = read_json(os.path.join(folder, "manifest.json"))
        for name, written in manifest.items():
            if file_hash(os.path.join(folder, name)) != written:
                raise ValueError(f"the checksum of {name} does not fit")
        # the keys of an optimizer's state are numbers, which JSON does not have as keys
        rest = read_json(os.path.join(folder, "state.json"), object_hook=lambda found: {
            int(key) if key.isdigit() else key: value for key, value in found.items()})
    except FileNotFoundError as error:
        name = os.path.basename(error.filename)
        raise ValueError(f"{folder} is damaged: {name} is missing") from None
    except (ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    tensors = {}

    def make(path, entry):
        tensors[path] = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]),
                                    device="cpu" if load else "meta")
        return tensors[path]
    checkpoint = replace(rest, is_entry, make)
    if not load:
        return checkpoint | dict(folder=folder)
    fill(tensors, folder, no_dist=True)
    return checkpoint


def fill(tensors, folder, **how):
    """Reads the content of these tensors, {name: whole or shard}, from a folder, in place."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    with warnings.catch_warnings():  # that no_dist=True means no processes
        warnings.simplefilter("ignore")
        load(tensors, storage_reader=HuggingFaceStorageReader(folder), **how)


def take_out(tree):
    """Nested dicts and lists -> {path: tensor}, the same with dtype and shape for each tensor."""
    tensors = {}

    def describe(path, tensor):
        tensors[path] = tensor.detach()
        dtype = str(tensor.dtype).removeprefix("torch.")
        return dict(dtype=dtype, shape=list(tensor.shape))
    return tensors, replace(tree, torch.is_tensor, describe)


def put_back(tree, tensors):
    """The opposite of take_out."""
    return replace(tree, is_entry, lambda path, _: tensors[path])


def is_entry(value):
    return isinstance(value, dict) and set(value) == {"dtype", "shape"}


def replace(tree, is_leaf, new, path=""):
    """The same nested dicts and lists with new(path, leaf) in place of each leaf."""
    if is_leaf(tree):
        return new(path[:-1], tree)
    if isinstance(tree, dict):
        return {key: replace(value, is_leaf, new, f"{path}{key}/") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [replace(value, is_leaf, new, f"{path}{i}/") for i, value in enumerate(tree)]
    return tree
