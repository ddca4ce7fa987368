"""How a token is drawn from a model's logits, whichever way the model makes texts."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

SAMPLERS = ("ancestral", "confidence")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Values out of range raise ValueError, all of them at once."""
    sampler: str = "ancestral"
    steps: int = 64  # forward passes for a text, or for each block of it
    temperature: float = 1.0  # logits are divided by it; 0: always the likeliest token
    top_p: float = 1.0  # draws only from the likeliest tokens that together have this probability
    top_k: int = 0  # draws only from so many of the likeliest tokens; 0: from all
    block_tokens: int = 0  # tokens of a block; 0: the whole text is one
    seed: int = 0

    def __post_init__(self):
        problems = []
        if self.sampler not in SAMPLERS:
            problems.append(f"sampler={self.sampler!r}: expected {' or '.join(SAMPLERS)}")
        if self.steps < 1:
            problems.append(f"steps={self.steps}: expected 1 forward pass or more; as many "
                            "as tokens are best")
        if not 0 <= self.temperature < math.inf:  # false for nan
            problems.append(f"temperature={self.temperature}: expected 0 (always the likeliest "
                            "token) or more, such as 1.0")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: expected a probability above 0, up to 1 (all "
                            "tokens)")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k}: expected a number of tokens, or 0 for all")
        for name, neutral in (("top_p", 1), ("top_k", 0)):
            value = getattr(self, name)
            if self.temperature == 0 and value != neutral:
                problems.append(f"temperature=0 draws nothing, so {name}={value} has no effect; "
                                f"leave it at {neutral}")
        if self.block_tokens < 0:
            problems.append(f"block_tokens={self.block_tokens}: expected a number of tokens, or 0 "
                            "for the whole text at once")
        if problems:
            raise ValueError("; ".join(problems))


class Sample(NamedTuple):
    text: str  # with the prompt
    ids: list  # what was drawn, without the mark that ends the text
    steps: int  # forward passes


def draw(logits, uniform, temperature=1.0, top_p=1.0, top_k=0):
    """Logits (...,V) float64, random numbers (...) in [0,1) -> index (...), its p at temperature 1.

    The index is the inverse of the distribution function at the random number.
    """
    p_model = logits.softmax(-1)
    if temperature == 0:
        p, index = p_model.max(-1)
        return index, p
    # The largest logit becomes 0 first, so that no temperature is too small to divide by.
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    order = None
    if top_k and top_k < p.shape[-1]:
        least = p.topk(top_k).values[..., -1:]
        p = p.masked_fill(p < least, 0)
        p = p / p.sum(-1, keepdim=True)
    if top_p < 1:
        p, order = p.sort(dim=-1, descending=True, stable=True)
    cdf = p.cumsum(-1)
    # top_p keeps the tokens before which the others have less than top_p. mass: all that is kept.
    mass = cdf.masked_fill(cdf - p >= top_p, 0).amax(-1, keepdim=True)
    index = torch.searchsorted(cdf, uniform[..., None] * mass, right=True)
    index = index.clamp(max=logits.shape[-1] - 1)  # for numerical safety
    if order is not None:
        index = order.gather(-1, index)
    return index[..., 0], p_model.gather(-1, index)[..., 0]
