"""A trained model in a notebook or a script: load, fill, generate, embed, evaluate, finetune.

    from lib.notebook import Sampling, embed, evaluate, fill, finetune, generate, load

    run = load("out/demo")
    fill(run, "The [MASK] of a function is its documentation string.")
    generate(run, "If the file", n_samples=3, sampling=Sampling(top_p=0.9))
    embed(run, ["one text", "another"])                  # float32 (2, width)
    evaluate(run, "data/pydocs")                         # {"loss": ..., "accuracy": ...}
    finetune(run, texts, labels).predict(["a new text"])

Importing this module, or one that it imports, starts nothing and reads no command line.
"""

import os
from typing import NamedTuple

from data.reader import TokenData
from data.tokenizer import Tokenizer
from lib.embed import choose_pooling, embed_rows, rows_of
from lib.evaluation import evaluate as evaluate_model
from lib.evaluation import token_frequency
from lib.fill import fill_texts
from lib.finetune import finetune
from lib.generate import generate as generate_samples
from lib.machine import Machine, autocast, choose_dtype, find_machine
from lib.run import load_run
from lib.sampling import Sampling

__all__ = ["Run", "Sampling", "embed", "evaluate", "fill", "finetune", "generate", "load"]

BATCH_TOKENS = 4096  # tokens, or concepts, of a batch


class Run(NamedTuple):
    """A trained model and what belongs to it."""
    model: object  # ConceptEncoder or Transformer, in eval mode
    tok: Tokenizer
    checkpoint: dict  # "step", "tokens", "settings" of the training run, ...
    machine: Machine
    dtype: str  # "bf16", "fp16" or "fp32", in which it computes


def load(out_dir, checkpoint="auto", device="auto", dtype="auto"):
    """Loads the run of a folder, or of a checkpoint file -> Run.

    checkpoint: auto | best | last | path, see lib.run.checkpoint_paths. Raises ValueError or
    FileNotFoundError saying what is missing.
    """
    machine = find_machine(device)
    dtype, _ = choose_dtype(dtype, machine.device)
    model, tok, loaded = load_run(os.path.expanduser(out_dir), machine.device, checkpoint)
    return Run(model, tok, loaded, machine, dtype)


def fill(run, texts, top=5):
    """Fills the [MASK]s of a text, or of a list of texts -> dict(text, filled, masks), or a list.

    masks: for each mask the `top` likeliest tokens, as a list of dict(token, p).
    """
    several = not isinstance(texts, str)
    with autocast(run.machine.device, run.dtype):
        results = fill_texts(run.model, run.tok, list(texts) if several else [texts], top,
                             BATCH_TOKENS, run.machine.device)
    return results if several else results[0]


def generate(run, text="", n_samples=1, length=0, sampling=None):
    """Generates n_samples texts that begin with `text` -> list of texts.

    The arguments are those of lib.generate.generate.
    """
    with autocast(run.machine.device, run.dtype):
        samples = list(generate_samples(run.model, run.tok, text, n_samples, length, sampling,
                                        BATCH_TOKENS, run.machine.device))
    return [sample.text for sample in samples]


def embed(run, texts, pooling="auto"):
    """Texts -> numpy float32 (len(texts), width), as tools/sample.py --embed writes them.

    pooling: auto | max | concept_mean | concepts | mean, see lib/embed.py. Longer texts than the
    model reads are cut. Raises ValueError for a single string: its letters would be embedded.
    """
    if isinstance(texts, str):
        raise ValueError("embed takes a list of texts, found one string; put it into brackets")
    _, name = choose_pooling(pooling, run.model)
    if not len(texts):
        raise ValueError("embed takes a list of texts, found an empty one")
    rows, _ = rows_of(list(texts), run.tok, run.model.cfg.longest)
    with autocast(run.machine.device, run.dtype):
        found = embed_rows(run.model, rows, [name], BATCH_TOKENS, run.machine.device)
    return found[name].numpy()


def evaluate(run, data_dir, masking_type="token", mlm_probability=0.15, rows=256, split="val"):
    """Loss of the first `rows` rows of prepared data on fixed masks -> dict.

    Keys: loss (nats a predicted token), accuracy, perplexity, bits_per_byte, predicted (tokens),
    splits. Raises ValueError for data of another tokenizer.
    """
    folder, T = os.path.expanduser(data_dir), run.model.cfg.block_size
    data = TokenData(folder, split, T)
    if data.meta["fingerprint"] != run.tok.fingerprint:
        raise ValueError(f"{data_dir} was prepared with another tokenizer than the run's")
    frequency = token_frequency(TokenData(folder, "train", T), run.tok)
    return evaluate_model(run.model, data, run.tok, run.machine, run.dtype, masking_type,
                          mlm_probability, rows=rows, frequency=frequency)
