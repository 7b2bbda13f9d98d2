"""Every name and shape of the published BLIP3-o checkpoints, on models built without memory."""

import dataclasses
import gzip
import json

import pytest
import torch
from recordings import FIXTURES

from clipflow.errors import InputError
from clipflow.models.blip3o import BLIP3oConfig, BLIP3oModel, blip3o_config
from clipflow.models.blip3o.eva import EVAConfig, EVATower
from clipflow.models.blip3o.keys import map_names, map_names_with_target, skipped_names
from clipflow.models.blip3o.published import config_from_published
from clipflow.models.blip3o.sizes import parameter_counts

HF_CONFIG = {"model_type": "blip3o_qwen", "gen_vision_tower": "eva-clip-E-14-plus"}
COUNTS = {  # specs section A.1
    "4b": {
        "vision tower": 668_684_288,
        "language model": 2_774_771_712 + 310_616_064 + 2048,
        "lm_head": 0,
        "queries": 64 * 2048,
        "DiT": 1_362_257_824,
        "CLIP target": 0,
        "decoder": 0,
    },
    "8b": {
        "vision tower": 676_550_144,
        "language model": 6_525_618_176 + 543_578_112 + 3584,
        "lm_head": 543_578_112,
        "queries": 64 * 3584,
        "DiT": 1_365_010_336,
        "CLIP target": 0,
        "decoder": 0,
    },
}
EVA = "model.gen_vision_tower.vision_tower.model."


def reference_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Name in the reference's checkpoint -> shape; of 4B without the head, which is tied."""
    with gzip.open(FIXTURES / f"blip3o_keys_{size}.json.gz", "rt") as file:
        found = {name: tuple(shape) for name, shape in json.load(file).items()}
    if size == "4b":
        assert found.pop("lm_head.weight") == found["model.embed_tokens.weight"]
    return found


def renamed(name: str) -> str:
    """As transformers from 4.52 on writes it."""
    if name.startswith("visual."):
        return f"model.{name}"
    for part in ("layers.", "embed_tokens.", "norm."):
        if name.startswith(f"model.{part}"):
            return name.replace("model.", "model.language_model.", 1)
    return name


def own_shapes(names, mapping=map_names):
    return {own: names[found] for own, found in mapping(names).items()}


def eva_shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        tower = EVATower(EVAConfig())
    found = {EVA + name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    return found | {f"{EVA}norm.weight": (1792,), f"{EVA}head.weight": (1024, 1792)}


@pytest.mark.parametrize("rename", [str, renamed])
@pytest.mark.parametrize("size", ["4b", "8b"])
def test_all_names_and_shapes(size, rename):
    names = {rename(name): shape for name, shape in reference_shapes(size).items()}
    shapes = own_shapes(names)
    assert len(shapes) == len(names)
    config = config_from_published(HF_CONFIG, shapes)
    assert config == blip3o_config(size)
    with torch.device("meta"):
        model = BLIP3oModel(config)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == shapes


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_parameter_counts(size):
    assert parameter_counts(blip3o_config(size)) == COUNTS[size]


def test_the_tower_is_skipped_unless_it_is_wanted():
    names = reference_shapes("8b") | eva_shapes()
    assert own_shapes(names) == own_shapes(reference_shapes("8b"))
    assert skipped_names(names) == {"gen_vision_tower": len(eva_shapes())}
    shapes = own_shapes(names, map_names_with_target)
    config = config_from_published(HF_CONFIG | {"gen_pooling": "early_pool2d_4"}, shapes)
    assert config == dataclasses.replace(blip3o_config("8b"), target=EVAConfig())
    with torch.device("meta"):
        model = BLIP3oModel(config)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == shapes
    with pytest.raises(ValueError, match="must hold the EVA-CLIP tower"):
        map_names_with_target(reference_shapes("8b"))


def test_names_that_cannot_be():
    with pytest.raises(ValueError, match="every parameter must be there once"):
        map_names(["visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"])
    with pytest.raises(ValueError, match="got none: is it a Qwen2"):
        map_names(["visual.merger.ln_q.weight", "model.norm.weight"])


@pytest.mark.parametrize("size", ["tiny", "4b", "8b"])
def test_configuration_to_json_and_back(size):
    config = blip3o_config(size)
    for found in (config, dataclasses.replace(config, target=EVAConfig())):
        assert BLIP3oConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_no_such_size():
    with pytest.raises(InputError, match="tiny, 4b, 8b"):
        blip3o_config("70b")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model_type": "llama"}, "model_type must be 'clipflow_blip3o'"),
        ({"n_query": None}, "n_query must be int"),
        ({"target": 3}, "target must be an object"),
        ({"target": {"width": 3}}, "unknown keys"),
        ({"default_steps": 0}, "default_steps must be above 0"),
        ({"noise_dtype": "int8"}, "noise_dtype must be one of"),
        ({"image_mean": [0.0, float("nan"), 0.0]}, "image_mean must be finite"),
        ({"target": EVAConfig(pool=8).to_dict()}, "target features must be"),
    ],
)
def test_senseless_configurations(change, error):
    with pytest.raises(ValueError, match=error) as caught:
        BLIP3oConfig.from_dict(blip3o_config("tiny").to_dict() | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change", "error"),
    [
        ("vision", {"window_size": 100}, "vision.window_size must be a multiple of 28"),
        ("vision", {"fullatt_block_indexes": [7]}, "fullatt_block_indexes must be of 0 to 1"),
        ("text", {"mrope_section": [2, 2, 2]}, "text.mrope_section must be of 8 pairs"),
        ("dit", {"condition_channels": 8}, "dit.condition_channels must be 64"),
        ("tokens", {"image_start": 400}, "tokens must be below vocab_size 320"),
    ],
)
def test_parts_that_do_not_fit(part, change, error):
    values = blip3o_config("tiny").to_dict()
    values[part] = values[part] | change
    with pytest.raises(ValueError, match=error):
        BLIP3oConfig.from_dict(values)
