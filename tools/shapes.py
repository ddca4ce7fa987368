"""Models for a budget of parameters: from shares of it to settings of train.py.

Used by tools/sweep.py, for axes of its arms and for --solve. lib/allocation.py finds the shapes.
"""

import os
from functools import cache
from types import SimpleNamespace

from data.reader import folders
from data.tokenizer import Tokenizer
from lib import allocation
from lib.files import print_result, say
from lib.settings import ARCHS, model_settings
from tools.arms import SOLVED, resolve, split, train_defaults

CHOSEN = ("ffn_dim", "n_head", "n_layer", "token_dim")  # by the solver, whatever they are set to


@cache
def solved(budget, embed_share, glu, fixed):
    """fixed: ((name, value), ...) of the model -> the shape of lib/allocation.py."""
    return allocation.solve(budget, embed_share, glu, dict(fixed))


def shape_for(given, tok, budget, embed_share, glu):
    """Settings of train.py -> (shape of lib/allocation.py, {name: value} of the settings in it).

    The solver chooses concept_dim too, unless `given` has another one than train.py's default.
    """
    chosen = {*CHOSEN}
    if given["concept_dim"] == train_defaults()["concept_dim"]:
        chosen.add("concept_dim")
    fixed = model_settings(given["arch"], given, tok)
    shape = solved(budget, embed_share, glu, tuple(sorted(
        (name, value) for name, value in fixed.items() if name not in chosen)))
    return shape, allocation.model_fields(shape)


def with_shape(arguments, budget, embed_share, glu):
    """Arguments with --embed_share or --glu -> those of the shape in their place, and its shares;
    others -> the same and {}. Raises ValueError where there is no such shape.
    """
    asked, others = dict(embed_share=embed_share, glu=glu), []
    for word in arguments:
        name, _, value = word.lstrip("-").partition("=")
        if name not in SOLVED:
            others.append(word)
            continue
        try:
            asked[name] = float(value)
        except ValueError:
            raise ValueError(f"{name}={value}: expected a number") from None
    if len(others) == len(arguments):
        return arguments, {}
    given = resolve(others)
    tok = Tokenizer.load(os.path.join(folders(given["data_dir"])[0], "tokenizer"))
    shape, found = shape_for(given, tok, budget, **asked)
    return (others + [f"--{name}={value}" for name, value in found.items()],
            {name: shape[name] for name in SOLVED})


def print_shape(arch, base, vocab_size, budget, embed_share, glu):
    """--solve: the shape as a config and as JSON. Raises ValueError where there is none.

    base: further settings of train.py, as arguments.
    """
    if arch not in ARCHS or vocab_size < 2:
        raise ValueError(f"arch={arch!r}, vocab_size={vocab_size}: expected {', '.join(ARCHS)}, "
                         "and 2 or more")
    words = split("base", base)
    # A plain Transformer, without the local mixers of this repository, unless base has any.
    plain = [] if arch == "concept" else ["--n_mixer=0"]
    defaults, given = train_defaults(), resolve([f"--arch={arch}", *plain, *words])
    fixed = [f"--{name}={given[name]}" for name in CHOSEN if given[name] != defaults[name]]
    if fixed:
        raise ValueError(f"base: {', '.join(fixed)}: the solver finds these; leave them out")
    for name, own in (("arch", arch), ("vocab_size", defaults["vocab_size"])):
        if given[name] != own:
            raise ValueError(f"base: {name}={given[name]}: give it to this command, "
                             f"--{name}={given[name]}")
    tok = SimpleNamespace(vocab_size=vocab_size, n_vocab=vocab_size, mask_id=0, eot_id=1)
    shape, found = shape_for(given, tok, budget, embed_share, glu)
    lines = {"arch": arch} | {name: value for name, value in given.items() if name != "arch"
                              and value != defaults[name] and name not in found} | found
    say(f"# {shape['params']:,} parameters with a {vocab_size:,}-word vocabulary, "
        f"{shape['embed_share']:.1%} of them the token table, ffn_dim {shape['glu']:.2f} x the "
        "width")
    say("\n".join(f"{name} = {value!r}" for name, value in lines.items()))
    width = found.get("concept_dim", found["token_dim"])
    print_result(dict(params=shape["params"], embed_share=round(shape["embed_share"], 4),
                      glu=round(shape["glu"], 4), n_layer=found["n_layer"], dim=width,
                      ffn_dim=found["ffn_dim"], n_head=found["n_head"])
                 | {name: found[name] for name in found
                    if name in ("token_dim", "concept_dim", "n_concept")})
