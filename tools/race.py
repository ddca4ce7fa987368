"""Loss against wall-clock: our models and the Trainer of transformers. Of tools/bench.py --race=1.

All have about as many parameters, read the same bins in rows of 128 tokens, get the same seconds,
one after the other, and are evaluated on the same fixed masks. The clock of each stands still while
its Trainer is evaluated; train.py's does not, which costs it about two seconds a minute.

Trainer gets the usual recipe: DataCollatorForLanguageModeling, linear warm-up and decay over the
steps that fit into its time, AdamW, bf16. Depth, learning rate and masking rate were tuned
(records/race), and so were those of our models.
"""

import json
import os
import shlex
import sys
import time
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch
import torch.nn as nn

from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib.evaluation import evaluate
from lib.files import say
from lib.jobs import last_line, run_python
from lib.log import read_log
from lib.machine import choose_dtype, find_machine

T, ROWS, EVALUATIONS = 128, 16, 8
SHAPE = "--token_dim=128 --concept_dim=128 --n_head=8 --concept_std=1.0 --min_lr=5e-5"
OURS = {  # arguments of train.py, of the shapes of config/sweeps/scaling.py
    "open": "--n_layer=1 --ffn_dim=592 --n_concept=16 --learning_rate=4e-3",
    "strict": "--bottleneck=strict --n_layer=3 --ffn_dim=352 --n_concept=64 --learning_rate=8e-3",
    "transformer": "--arch=transformer --n_layer=1 --ffn_dim=1595 --learning_rate=4e-3",
}
TRAINER = {  # settings of train_peer
    "hf_bert": dict(layers=4, ffn_dim=512, learning_rate=2e-3, mlm_probability=0.3),
    "hf_modernbert": dict(layers=3, ffn_dim=512, learning_rate=2e-3, mlm_probability=0.3),
}


def race(data_dir, out_dir, minutes, names, device, dtype):
    """Runs all of `names` -> {name: {"params", "tokens", "curve": [(seconds, loss)]}}.

    Raises ValueError with the last line of one that fails, and for a folder that holds a race.
    """
    found, folders = {}, {name: os.path.join(out_dir, name) for name in names}
    if held := list(filter(os.path.exists, folders.values())):
        raise ValueError(f"{held[0]} is of an earlier race, and a run there would go on where that "
                         f"one ended: rm -r {' '.join(held)}, or another --out_dir")
    for name, folder in folders.items():
        os.makedirs(folder)
        if name in OURS:
            found[name] = race_ours(name, data_dir, folder, minutes, device, dtype)
        else:
            words = [f"{key}={value}" for key, value in (TRAINER[name] | dict(
                model=name, data_dir=data_dir, out_dir=folder, minutes=minutes, device=device,
                dtype=dtype)).items()]
            start(["-m", "tools.race", *words], folder)
            with open(os.path.join(folder, "race.json")) as file:
                found[name] = json.load(file)
        say(f"{name:<14}{found[name]['params']:>12,} parameters "
            f"{found[name]['tokens']:>12,} tokens   {found[name]['curve'][-1][1]:.3f} nats")
    return found


def start(command, folder):
    log = os.path.join(folder, "output.txt")
    if run_python(command, log, 0, 1):
        raise ValueError(f"{last_line(log)}\n    {shlex.join(command)}; all it said: {log}")
    return log


def race_ours(name, data_dir, folder, minutes, device, dtype):
    arguments = [*shlex.split(SHAPE), *shlex.split(OURS[name]), f"--data_dir={data_dir}",
                 f"--out_dir={folder}", f"--max_minutes={minutes}", "--max_steps=1000000",
                 "--warmup_steps=100", "--eval_interval=100", "--log_interval=100",
                 "--eval_rows=256", "--health_rows=0", f"--device={device}", f"--dtype={dtype}"]
    log = start([os.path.join(ROOT, "train.py"), os.path.join(ROOT, "config", "mini.py"),
                 *arguments], folder)
    summary = json.loads(last_line(log))
    records, curve = read_log(folder), []
    for record in records:  # a step's own line comes before that of its evaluation
        if "minutes" in record:
            seconds = 60 * record["minutes"]
        elif record["step"] and record.get("val_loss") is not None:
            curve.append((round(seconds, 1), record["val_loss"]))
    return dict(params=summary["params"], tokens=summary["tokens"], curve=curve)


def head_starts(found):
    """The share of a peer's time in which each of ours has reached the peer's last loss.

    -> {"open reaches the last loss of hf_bert, share of its time": share}. Between two evaluations
    the loss is taken to fall evenly; those that never get there are left out.
    """
    shares = {}
    for peer in TRAINER:
        for ours in OURS:
            if ours not in found or peer not in found:
                continue
            end, goal = found[peer]["curve"][-1]
            before = None
            for seconds, loss in found[ours]["curve"]:
                if loss <= goal:
                    if before:
                        part = (before[1] - goal) / (before[1] - loss)
                        seconds = before[0] + part * (seconds - before[0])
                    shares[f"{ours} reaches the last loss of {peer}, share of its time"] = round(
                        seconds / end, 3)
                    break
                before = seconds, loss
    return shares


def draw(found, path):
    """Loss against minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, result in found.items():
        seconds, losses = zip(*result["curve"])
        axes.plot([s / 60 for s in seconds], losses, "-o" if name in OURS else "--s",
                  markersize=3, label=name.replace("hf_", "Trainer, "))
    axes.set(xlabel="minutes of training", ylabel="nats a masked token, fixed masks")
    figure.legend(loc="outside right upper")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# ---- transformers --------------------------------------------------------------------


def build_peer(model, tok, layers, ffn_dim):
    """A model of transformers of width 128 with 8 heads, for rows of T tokens."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        ModernBertConfig,
        ModernBertForMaskedLM,
    )
    common = dict(vocab_size=tok.vocab_size, hidden_size=128, num_hidden_layers=layers,
                  num_attention_heads=8, intermediate_size=ffn_dim, pad_token_id=tok.pad_id,
                  max_position_embeddings=T)
    if model == "hf_bert":
        return BertForMaskedLM(BertConfig(
            **common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    ends = {name: tok.eot_id for name in (
        "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")}
    return ModernBertForMaskedLM(ModernBertConfig(**common, **ends, sparse_prediction=True))


class Interface(nn.Module):
    """The methods of ours that lib.evaluation.evaluate calls, on a masked model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model, self.cfg = model, SimpleNamespace(causal=False)

    def encode(self, ids, real):
        return None, self.model(input_ids=ids.long()).logits

    def documents(self, ids, real):
        return None

    def decode(self, concepts, logits_BTV, positions, documents, real):
        return logits_BTV.gather(1, positions[..., None].expand(-1, -1, logits_BTV.shape[-1]))

    def logits(self, states):
        return states


def train_peer(model, data_dir, out_dir, minutes, device, dtype, layers, ffn_dim, learning_rate,
               mlm_probability, max_steps=0):
    """Trains by Trainer for so many minutes -> out_dir/race.json. max_steps: instead of minutes."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import WordLevel
    from transformers import (
        DataCollatorForLanguageModeling,
        PreTrainedTokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    machine = find_machine(device, T)
    dtype, _ = choose_dtype(dtype, machine.device)
    data, val = (TokenData(data_dir, split, T, 1337) for split in ("train", "val"))
    tok = Tokenizer.load(os.path.join(data_dir, "tokenizer"))
    names = {("[MASK]" if i == tok.mask_id else "[PAD]" if i == tok.pad_id else f"t{i}"): i
             for i in range(tok.vocab_size)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=FastTokenizer(WordLevel(names, unk_token="t0")), mask_token="[MASK]",
        pad_token="[PAD]")
    torch.manual_seed(1337)
    net = build_peer(model, tok, layers, ffn_dim)
    n_params = sum(p.numel() for p in net.parameters())
    begin = {name: t.clone() for name, t in net.state_dict().items()}

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return data.n_blocks

        def __getitem__(self, i):
            return dict(input_ids=data.block([i])[0].long())

    class Clock(TrainerCallback):
        """Stops at the end of the time, and evaluates EVALUATIONS times on the way."""

        def __init__(self, seconds):
            self.seconds, self.spent, self.curve = seconds, 0.0, []

        def on_train_begin(self, args, state, control, **_):
            self.since = time.monotonic()

        def on_step_end(self, args, state, control, **_):
            now = self.spent + time.monotonic() - self.since
            self.steps, share = state.global_step, state.global_step / state.max_steps
            if self.seconds:
                share = max(share, now / self.seconds)
            if share >= min(1, (len(self.curve) + 1) / EVALUATIONS):
                self.spent = now
                loss = evaluate(Interface(net), val, tok, machine, dtype)["loss"]
                self.curve.append((round(now, 1), loss))
                net.train()
                self.since = time.monotonic()
            control.should_training_stop |= share >= 1

    class Pace(TrainerCallback):
        """When each step has ended."""

        def __init__(self):
            self.ends = []

        def on_step_end(self, args, state, control, **_):
            self.ends.append(time.monotonic())

    def train(n_steps, callback):
        Trainer(model=net, train_dataset=Rows(), callbacks=[callback],
                data_collator=DataCollatorForLanguageModeling(
                    fast, mlm_probability=mlm_probability),
                args=TrainingArguments(
                    out_dir, per_device_train_batch_size=ROWS, max_steps=n_steps,
                    learning_rate=learning_rate, lr_scheduler_type="linear",
                    warmup_steps=max(1, min(100, n_steps // 10)), weight_decay=0.01,
                    adam_beta2=0.98, bf16=dtype == "bf16", fp16=dtype == "fp16",
                    use_cpu=machine.device.type == "cpu", save_strategy="no", report_to="none",
                    logging_strategy="no", disable_tqdm=True, seed=1337)).train()

    if not max_steps:  # how many steps fit into the time
        pace = Pace()
        train(30, pace)
        a_step = (pace.ends[-1] - pace.ends[9]) / 20  # the first ones are slow
        max_steps = max(10, int(60 * minutes / a_step))
        net.load_state_dict(begin)
    clock = Clock(60 * minutes)
    train(max_steps, clock)
    with open(os.path.join(out_dir, "race.json"), "w") as file:
        json.dump(dict(params=n_params, tokens=clock.steps * ROWS * T, curve=clock.curve), file)


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    kinds = dict(layers=int, ffn_dim=int, learning_rate=float, mlm_probability=float,
                 minutes=float, max_steps=int)
    train_peer(**{key: kinds.get(key, str)(value) for key, value in given.items()})
