"""Every name and shape of the published checkpoints, on models built without memory."""

import dataclasses
import gzip
import json

import pytest
import torch
from safetensors.torch import save_file
from unilip_fixture import FIXTURES, TINY, fixture_config, recorded_weights

from clipflow.models.folders.checkpoint import WEIGHTS_FILE
from clipflow.models.unilip import UniLIPConfig, UniLIPModel, published
from clipflow.models.unilip.keys import map_names, own_name
from clipflow.models.unilip.published import (
    VOCABULARY,
    config_from_published,
    unilip_1b_config,
    unilip_3b_config,
)
from clipflow.models.unilip.sizes import PARTS, parameter_counts

CONFIGS = {"1b": unilip_1b_config, "3b": unilip_3b_config}
HF_CONFIG = {"model_type": "unilip_internvl", "architectures": ["UniLIP_InternVLForCausalLM"]}

# Million parameters, specs section 0; connector + projector, and decoder + clip_down, are summed.
MILLIONS = {
    "1b": {
        "vision tower": 304.0,
        "projector": 4.48,
        "language model": 493.8,
        "lm_head": 135.9,
        "queries": 0.23,
        "connector": 89.5 + 2.07,
        "DiT": 591.7,
        "decoder and clip_down": 164.1,
    },
    "3b": {
        "vision tower": 304.0,
        "projector": 8.66,
        "language model": 1543.3,
        "lm_head": 233.0,
        "queries": 0.39,
        "connector": 280.8 + 3.54,
        "DiT": 1604.5,
        "decoder and clip_down": 173.5,
    },
}


def reference_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Name in the reference's checkpoint -> shape."""
    with gzip.open(FIXTURES / f"unilip_keys_{size}.json.gz", "rt") as file:
        return {name: tuple(shape) for name, shape in json.load(file).items()}


def own_shapes(names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {own: names[found] for own, found in map_names(names).items()}


def reverse_mapped(name: str) -> str:
    """The name that transformers' reverse key mapping gives to an in-memory name."""
    rules = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    for found, written in rules.items():
        if name.startswith(found):
            return written + name.removeprefix(found)
    return name


def meta_model(config: UniLIPConfig) -> UniLIPModel:
    with torch.device("meta"):
        return UniLIPModel(config)


@pytest.mark.parametrize("size", CONFIGS)
def test_every_name_and_shape(size):
    reference = reference_shapes(size)
    model = meta_model(CONFIGS[size]())
    actual = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(reference) == {"1b": 1481, "3b": 1377}[size]
    assert actual == own_shapes(reference)


@pytest.mark.parametrize("size", CONFIGS)
def test_both_prefixes_and_our_own_mean_the_same(size):
    reference = reference_shapes(size)
    wanted = {own_name(name) for name in reference}
    assert len(wanted) == len(reference)
    assert {own_name(reverse_mapped(name)) for name in reference} == wanted
    assert {own_name(name) for name in wanted} == wanted


@pytest.mark.parametrize("size", CONFIGS)
def test_config_is_read_from_the_shapes(size):
    """A published config.json does not say how the DiT and the decoder are built."""
    shapes = own_shapes(reference_shapes(size))
    assert config_from_published(HF_CONFIG, shapes) == CONFIGS[size]()
    factor = config_from_published({**HF_CONFIG, "unilip_factor": 7}, shapes).unilip_factor
    assert factor == 7.0


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("rename", [str, reverse_mapped])
def test_published_folder(tmp_path, rename, with_head):
    """The tiny fixture as a published checkpoint."""
    tiny = fixture_config(TINY)
    state = dict(recorded_weights(TINY))
    if not with_head:
        del state["lm_head.weight"]
    save_file({rename(name): tensor for name, tensor in state.items()}, tmp_path / WEIGHTS_FILE)
    values = {
        **HF_CONFIG,
        "image_token_id": tiny.tokens.img_context,
        "pad_token_id": tiny.tokens.pad,
        "vision_config": {"num_attention_heads": tiny.vision.num_attention_heads},
        "unilip_factor": tiny.unilip_factor,
        "dit_path": "elsewhere",
    }
    (tmp_path / "config.json").write_text(json.dumps(values))

    model = UniLIPModel.from_pretrained(tmp_path)
    wanted = dataclasses.replace(
        tiny,
        text=dataclasses.replace(tiny.text, tie_word_embeddings=not with_head),
        tokens=dataclasses.replace(tiny.tokens, im_end=tiny.tokens.img_context - 22),
        system_message=published.SYSTEM_MESSAGE,
    )
    assert model.config == wanted
    assert (model.lm_head is not None) == with_head
    loaded = model.state_dict()
    assert len(loaded) == len(state)
    for name, tensor in state.items():
        assert torch.equal(loaded[own_name(name)], tensor), name


def test_missing_head_means_tied_embeddings():
    shapes = own_shapes(reference_shapes("1b"))
    del shapes["lm_head.weight"]
    config = config_from_published(HF_CONFIG, shapes)
    assert config.text.tie_word_embeddings
    model = meta_model(config)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes


def test_vocabulary_is_read_from_the_tensor():
    shapes = own_shapes(reference_shapes("1b"))
    for name in ("language_model.embed_tokens.weight", "lm_head.weight"):
        shapes[name] = (VOCABULARY + 3, shapes[name][1])
    assert config_from_published(HF_CONFIG, shapes).text.vocab_size == VOCABULARY + 3


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "patch_embedding.weight must have 4 dimensions, got no such tensor"),
        (
            own_shapes(reference_shapes("1b")) | {"dit.scale_shift_table": (2, 1024)},
            r"the DiT must be one of \[64, 1152, 2240\] wide, .* got 1024",
        ),
    ],
)
def test_unknown_checkpoints_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        config_from_published(HF_CONFIG, shapes)


def test_two_names_of_one_parameter():
    with pytest.raises(ValueError, match=r"must be there once, got 'model\.dit\.a' and 'dit\.a'"):
        map_names(["model.dit.a", "dit.a"])


@pytest.mark.parametrize("size", CONFIGS)
def test_parameter_counts(size):
    counts = parameter_counts(CONFIGS[size]())
    assert list(counts) == list(PARTS)
    summed = {name: count for name, count in counts.items() if name in MILLIONS[size]}
    summed["decoder and clip_down"] = counts["decoder"] + counts["clip_down"]
    for name, millions in MILLIONS[size].items():
        assert summed[name] / 1e6 == pytest.approx(millions, rel=0.02), name
    total = sum(torch.Size(shape).numel() for shape in reference_shapes(size).values())
    assert sum(counts.values()) == total
