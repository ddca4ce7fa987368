"""Shapes that spend a budget of parameters in given shares: token table, width, depth, GLU.

    solve(10e6, embed_share=0.35, glu=2.66, settings=dict(arch="transformer", vocab_size=16000))

A budget and two shares, over whole numbers, have no exact solution: with 16,000 words one step of
the width is a percent of 10 million parameters, one layer five. So the shapes near the answer are
all counted and the nearest one is taken. What counts is the model itself, built without memory (on
the meta device), so that a new part of a model is counted without a change here.

embed_share   the token table, and what widens it, over all parameters
glu           ffn_dim over the width of the layers: token_dim of a Transformer, concept_dim of a
              ConceptEncoder
"""

import math
from dataclasses import fields

import torch

from lib.settings import ARCHS, build_model

BUDGET_WITHIN = 0.005  # of the budget
SHARE_WITHIN = 0.015  # of all parameters
GLU_WITHIN = 0.07  # of the factor that was asked for
UNIT = 8  # widths are multiples of it, ffn_dim where that is fine enough
MOST_LAYERS = 64
HEAD_WIDTH = 48  # of the two nearest numbers of heads, the one whose heads are nearer to this wins


def embedding_params(model):
    """Parameters of the token table, and of what widens a narrow one."""
    expansion = getattr(model, "expansion", None)
    widening = sum(p.numel() for p in expansion.parameters()) if expansion else 0
    return model.wte.numel() + widening


def count(settings):
    """Model settings -> all parameters, those of the token table."""
    with torch.device("meta"):
        model = build_model(settings)
    return model.num_params(), embedding_params(model)


def heads_for(width, step):
    """The number of heads, each of a multiple of `step`, whose width is nearest to HEAD_WIDTH."""
    possible = [n for n in range(1, width // step + 1) if width % (n * step) == 0]
    return min(possible, key=lambda n: abs(math.log(width / n / HEAD_WIDTH)))


def solve(budget, embed_share, glu, settings):
    """-> the shape whose shares are nearest: model settings, with "params", "embed_share", "glu".

    settings: those of the model that are fixed, arch and vocab_size at least. concept_dim may be
    among them; otherwise it is chosen, too. Raises ValueError, naming the nearest shape, where none
    is within BUDGET_WITHIN, SHARE_WITHIN and GLU_WITHIN.
    """
    check(budget, embed_share, glu, settings)
    found = []
    for is_fine in (False, True):  # few widths of concepts first, because each has to be built
        found += [shape for widths in candidate_widths(budget, embed_share, settings, is_fine)
                  for shape in shapes(budget, glu, settings | widths)]
        found.sort(key=lambda shape: distance(shape, budget, embed_share, glu))
        for shape in found:
            if not misses(shape, budget, embed_share, glu):
                return shape
    if not found:
        smallest = settings | smallest_widths(settings) | dict(n_layer=1, ffn_dim=UNIT)
        raise ValueError(
            f"no shape of {budget:,.0f} parameters has a token table of about {embed_share:.0%} "
            f"with vocab_size={settings['vocab_size']:,}; the smallest model of this kind has "
            f"{count(smallest)[0]:,}. Give a larger budget, another embed_share or fewer words")
    best = found[0]
    shape = ", ".join(f"{name}={best[name]}" for name in SHAPE if name in best)
    raise ValueError(f"no shape comes close enough; the nearest possible one, {shape}, has "
                     f"{', '.join(misses(best, budget, embed_share, glu))}")


def misses(shape, budget, embed_share, glu):
    """What of a shape is too far from what was asked for -> list of texts."""
    return [f"{name} {has} instead of {asked}" for name, has, asked, is_far in (
        ("parameters", f"{shape['params']:,}", f"{budget:,.0f}",
         abs(shape["params"] / budget - 1) > BUDGET_WITHIN),
        ("embed_share", f"{shape['embed_share']:.3f}", embed_share,
         abs(shape["embed_share"] - embed_share) > SHARE_WITHIN),
        ("glu", f"{shape['glu']:.2f}", glu, abs(shape["glu"] / glu - 1) > GLU_WITHIN)) if is_far]


SHAPE = ("n_layer", "n_head", "token_dim", "concept_dim", "n_concept", "ffn_dim")


def check(budget, embed_share, glu, settings):
    problems = []
    if not 0 < budget < math.inf:
        problems.append(f"budget={budget}: expected a number of parameters, such as 10e6")
    if not 0 < embed_share < 1:
        problems.append(f"embed_share={embed_share}: expected a share above 0 and below 1")
    if not 0 < glu < math.inf:
        problems.append(f"glu={glu}: expected a factor above 0, such as 2.66")
    table = settings["vocab_size"] * 4
    if not problems and budget <= table:
        problems.append(f"budget={budget:,.0f} is below the smallest token table of "
                        f"{settings['vocab_size']:,} words, {table:,} parameters")
    if problems:
        raise ValueError("; ".join(problems))


def smallest_widths(settings):
    if settings["arch"] == "concept":
        D = settings.get("concept_dim", UNIT)
        return dict(token_dim=UNIT, concept_dim=D, n_head=heads_for(D, 1))
    return dict(token_dim=UNIT, n_head=heads_for(UNIT, 2))


def candidate_widths(budget, embed_share, settings, is_fine):
    """Yields the widths and heads whose token tables have about the share; is_fine: further ones.
    """
    middle = embed_share * budget / settings["vocab_size"]
    # In a small budget a step of eight would be too much of the share.
    is_small = UNIT * settings["vocab_size"] / budget > 1.4 * SHARE_WITHIN
    unit = UNIT // 2 if is_small else UNIT
    low = max(unit, math.floor(middle * 0.95 / unit) * unit)
    high = math.ceil(middle * 1.05 / unit) * unit
    for d in range(low, high + 1, unit):
        if settings["arch"] != "concept" or "concept_dim" in settings:
            if is_fine:
                continue
        if settings["arch"] != "concept":
            yield dict(token_dim=d, n_head=heads_for(d, 2))
            continue
        given = settings.get("concept_dim")
        # from as wide as the tokens to four times
        widths = {-(-round(d * times) // 32) * 32 for times in (1, 1.5, 2, 3, 4)}
        if is_fine:
            widths = set(range(-(-d // 16) * 16, 4 * d + 1, 16)) - widths
        for D in [given] if given else sorted(widths):
            yield dict(token_dim=d, concept_dim=D, n_head=heads_for(D, 1))


def shapes(budget, glu, settings):
    """Yields the shapes of these widths that meet the budget, one for each depth at most.

    Parameters are linear in the depth and in ffn_dim: four models tell all.
    """
    few, more = UNIT, 2 * UNIT
    (p11, table), (p12, _), (p21, _), (p22, _) = (
        count(settings | dict(n_layer=layers, ffn_dim=ffn))
        for layers, ffn in ((1, few), (1, more), (2, few), (2, more)))
    width = settings.get("concept_dim", settings["token_dim"])
    for n_layer in range(1, MOST_LAYERS + 1):
        with_few = p11 + (n_layer - 1) * (p21 - p11)
        with_more = p12 + (n_layer - 1) * (p22 - p12)
        a_number = (with_more - with_few) / (more - few)  # parameters for one of ffn_dim
        for unit in (UNIT, 2, 1):  # a deep and narrow model has no room for steps of eight
            ffn_dim = few + round((budget - with_few) / a_number / unit) * unit
            params = round(with_few + (ffn_dim - few) * a_number)
            if abs(params / budget - 1) <= BUDGET_WITHIN:
                break
        if ffn_dim < UNIT:
            return
        if abs(params / budget - 1) <= 2 * BUDGET_WITHIN:
            yield settings | dict(n_layer=n_layer, ffn_dim=ffn_dim, params=params,
                                  embed_share=table / params, glu=ffn_dim / width)


def distance(shape, budget, embed_share, glu):
    """How far a shape is from what was asked for; 1 is at the limit of one of the three."""
    return (abs(shape["params"] / budget - 1) / BUDGET_WITHIN / 4
            + abs(shape["embed_share"] - embed_share) / SHARE_WITHIN
            + abs(math.log(shape["glu"] / glu)) / GLU_WITHIN)


def model_fields(shape):
    """The settings of train.py in a shape."""
    names = {field.name for field in fields(ARCHS[shape["arch"]][0])}
    return {name: shape[name] for name in SHAPE if name in names and name in shape}
