"""Shapes for a budget: counted by the model, near what was asked for, or the nearest is named."""

import pytest
import torch

from lib.allocation import count, embedding_params, model_fields, solve
from lib.settings import build_model, fields_of

PLAIN = dict(arch="transformer", vocab_size=16000, n_mixer=0)


def settings_in(shape):
    return {name: value for name, value in shape.items() if name in fields_of(shape["arch"])
            } | dict(arch=shape["arch"])


@pytest.mark.parametrize("glu", [2, 2.66, 3, 4])
@pytest.mark.parametrize("share", [0.25, 0.35, 0.45])
def test_all_cells_of_the_study_are_met(share, glu):
    """10 million within 0.5 %, the share within 1.5 points, the factor within 7 %."""
    shape = solve(10e6, share, glu, PLAIN)
    assert abs(shape["params"] / 10e6 - 1) < 0.005
    assert abs(shape["embed_share"] - share) < 0.015 and abs(shape["glu"] / glu - 1) < 0.07
    with torch.device("meta"):
        model = build_model(settings_in(shape))
    assert model.num_params() == shape["params"]
    assert embedding_params(model) / model.num_params() == shape["embed_share"]
    # by hand: table, attention, gated FFN, two norms a layer, gains of the heads, the last norm
    d, f, n, h = (shape[name] for name in ("token_dim", "ffn_dim", "n_layer", "n_head"))
    assert shape["params"] == 16000 * d + n * (4 * d * d + 3 * d * f + 2 * d + h) + d


@pytest.mark.parametrize("settings", [
    dict(arch="concept", vocab_size=16000, n_concept=32),
    dict(arch="concept", vocab_size=16000, n_concept=32, concept_dim=384, bottleneck="strict"),
    dict(arch="resonance", vocab_size=16000, n_mixer=1)], ids=["open", "strict", "resonance"])
def test_every_architecture_has_shapes(settings):
    shape = solve(8e6, 0.4, 2.6, settings)
    assert count(settings_in(shape))[0] == shape["params"]
    assert abs(shape["params"] / 8e6 - 1) < 0.005 and abs(shape["embed_share"] - 0.4) < 0.015
    assert shape.get("concept_dim") == settings.get("concept_dim", shape.get("concept_dim"))
    assert set(model_fields(shape)) <= fields_of(settings["arch"])


@pytest.mark.parametrize("budget, share, glu, message", [
    (60_000, 0.3, 3, "below the smallest token table of 16,000 words, 64,000 parameters"),
    (300_000, 0.9, 3, "the smallest model of this kind has|the nearest possible one"),
    (1e6, 0.9, 3, "the nearest possible one, n_layer=.*has glu"),
    (0, 0.3, 3, "budget=0: expected a number of parameters"),
    (1e7, 1.5, 3, "embed_share=1.5: expected a share"),
    (1e7, 0.3, float("nan"), "glu=nan: expected a factor"),
])
def test_an_impossible_budget_names_the_nearest_shape(budget, share, glu, message):
    with pytest.raises(ValueError, match=message):
        solve(budget, share, glu, PLAIN)
