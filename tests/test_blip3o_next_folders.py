"""Folders of BLIP3o-NEXT: the published form in its variants, our own, and what is refused."""

import dataclasses
import json

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from clipflow.models.blip3o_next import BLIP3oNextConfig, BLIP3oNextModel
from clipflow.models.blip3o_next.keys import map_names, skipped_names
from clipflow.models.blip3o_next.published import config_from_published
from clipflow.pipelines.blip3o_next_prompts import BLIP3oNextPrompts
from clipflow.pipelines.tokenizer_files import read_tokenizer
from clipflow.testing import next_config, write_blip3o_next_folder
from clipflow.testing.blip3o_next_folder import published_name, published_next_config

TEXT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nPlease generate image based on the following caption: a cat<|im_end|>\n"
    "<|im_start|>assistant\n<im_start><S0>"
)
MORE = {"model.vision_tower.vision_tower.x.weight": (2, 3), "model.sana_vae.encoder.y.bias": (2,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_blip3o_next_folder(tmp_path_factory.mktemp("next") / "tiny", extra_tensors=MORE)


def assert_same(model, other):
    state, wanted = model.state_dict(), other.state_dict()
    assert model.config == other.config and state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_a_published_folder(folder):
    model = BLIP3oNextModel.from_pretrained(folder)
    assert model.config == next_config("tiny")
    assert model.dtype == torch.bfloat16 and model.device == torch.device("cpu")
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    assert model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert not model.language_model.rotary_emb.inv_freq.is_meta
    wide = BLIP3oNextModel.from_pretrained(folder, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_what_is_saved_is_loaded(folder, tmp_path):
    model = BLIP3oNextModel.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert_same(BLIP3oNextModel.from_pretrained(tmp_path), model)
    assert BLIP3oNextConfig.from_dict(model.config.to_dict()) == model.config


@pytest.mark.parametrize(
    "options", [{"tied_head": False}, {"max_shard_size": "200KB"}, {"tokenizer": "slow"}]
)
def test_variants(folder, tmp_path, options):
    found = BLIP3oNextModel.from_pretrained(write_blip3o_next_folder(tmp_path / "a", **options))
    assert (found.lm_head is None) == options.get("tied_head", True)
    whole = BLIP3oNextModel.from_pretrained(folder)
    if found.lm_head is None:
        assert_same(found, whole)
    else:
        assert torch.equal(found.dit.proj_out.weight, whole.dit.proj_out.weight)


@pytest.mark.parametrize("form", ["fast", "slow"])
def test_the_tokenizer(folder, tmp_path, form):
    """Its own template, where it has one, makes the same text; special tokens have the ids."""
    tokenizer = read_tokenizer(write_blip3o_next_folder(tmp_path / form, tokenizer=form))
    config = next_config("tiny")
    prompts = BLIP3oNextPrompts(tokenizer, config)
    text = prompts.text_to_image("a cat")
    if form == "fast":
        assert tokenizer.chat_template is not None
    assert text == TEXT
    tokens = config.tokens
    assert tokenizer(text)["input_ids"][-2:] == [tokens.image_start, tokens.scale]
    assert tokenizer("<I0><I63><im_end>")["input_ids"] == [310, 373, tokens.image_end]
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    other = prompts.text_to_image("a cat")
    assert other.startswith("[system] You are a helpful assistant. [user] Please generate image")
    assert other.endswith("a cat <im_start><S0>")
    tokenizer.chat_template = None
    assert prompts.text_to_image("a cat") == TEXT


def test_names():
    own = ["language_model.layers.0.mlp.up_proj.weight", "dit.proj_out.bias"]
    own += ["vae.decoder.conv_in.weight", "diffusion_connector.3.weight", "lm_head.weight"]
    published = [published_name(name) for name in own]
    assert published[:3] == [
        "model.layers.0.mlp.up_proj.weight", "model.sana.proj_out.bias",
        "model.sana_vae.decoder.conv_in.weight",
    ]  # fmt: skip
    assert list(map_names(published)) == list(map_names(own)) == own
    newer = [name.replace("model.layers", "model.language_model.layers") for name in published]
    assert list(map_names(newer)) == own
    assert skipped_names([*published, *MORE]) == {"vision_tower": 1, "vae.encoder": 1}
    with pytest.raises(ValueError, match="must be there once"):
        map_names([*own, published[0]])


def test_the_published_sizes():
    """Of Qwen3-1.7B with SANA-1.5: everything follows from shapes and config.json."""
    config = next_config("3b")
    with torch.device("meta"):
        model = BLIP3oNextModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    dit = [t for name, t in model.state_dict().items() if name.startswith("dit.")]
    assert len(dit) == 476 and sum(t.numel() for t in dit) == 1_604_641_952
    assert config_from_published(published_next_config(config), shapes) == config
    assert (config.output_size, config.tokens.image_start, config.text.vocab_size) == (
        1024, 151669, 217210,
    )  # fmt: skip


SANA = ("model.sana.", "model.sana_vae.")


def test_sana_that_is_elsewhere(folder, tmp_path):
    """What the checkpoint has not is read from a local folder of diffusers' form."""
    whole = load_file(folder / "model.safetensors")
    for part, begin in (("transformer", SANA[0]), ("vae", SANA[1])):
        held = {n.removeprefix(begin): t for n, t in whole.items() if n.startswith(begin)}
        (tmp_path / "sana" / part).mkdir(parents=True)
        save_file(held, tmp_path / "sana" / part / "diffusion_pytorch_model.safetensors")
    changes = {"diffusion_name_or_path": "../sana"}
    without = write_blip3o_next_folder(tmp_path / "lm", without=SANA, changes=changes)
    assert_same(BLIP3oNextModel.from_pretrained(without), BLIP3oNextModel.from_pretrained(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"without": SANA}, r"model.sana.\*\) and its decoder.*SANA1.5_1.6B.*got none"),
        ({"without": SANA[1:]}, r"must hold its decoder \(model.sana_vae.\*\), or config.json"),
        ({"without": ["model.norm."]}, "norm.weight: missing"),
        ({"changes": {"hidden_size": 65}}, "hidden_size must be 64 as the weights are"),
        ({"changes": {"image_start_tag_id": None}}, "image_start_tag_id must be a whole number"),
        ({"changes": {"num_image_tokens": 65}}, "num_image_tokens must be from 1 to 64"),
        ({"changes": {"use_sliding_window": True}}, "use_sliding_window must be False"),
        ({"changes": {"rope_parameters": {"rope_theta": 0}}}, "rope_theta must be a number above"),
        ({"changes": {"eos_token_id": [999]}}, "eos_token_id must be from 0 to 373"),
        ({"changes": {"n_query": 64}}, "must have the fields of a published BLIP3o-NEXT"),
    ],
)
def test_refusals(tmp_path, options, message):
    broken = write_blip3o_next_folder(tmp_path / "a", **options)
    with pytest.raises(ValueError, match=message) as error:
        BLIP3oNextModel.from_pretrained(broken)
    assert "\n" not in str(error.value)


def test_configurations_that_cannot_be(folder):
    config = next_config("tiny")
    text = dataclasses.replace(config.text, num_key_value_heads=3)
    tokens = dataclasses.replace(config.tokens, image_count=65)
    with pytest.raises(ValueError, match=r"last image token.*num_attention_heads must be"):
        dataclasses.replace(config, text=text, tokens=tokens)
    values = config.to_dict() | {"model_type": "clipflow_unilip"}
    with pytest.raises(ValueError, match="model_type must be 'clipflow_blip3o_next'"):
        BLIP3oNextConfig.from_dict(values)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "blip3o_qwen_inference"


def test_names_and_shapes_are_those_of_the_libraries():
    """Transformers' Qwen3 and diffusers' SANA-1.5 and DC-AE decoder, at their published sizes."""
    config = next_config("3b")
    with torch.device("meta"):
        model = BLIP3oNextModel(config)
        sana = SanaTransformer2DModel(
            qk_norm="rms_norm_across_heads", norm_eps=1e-6, sample_size=32
        )
        vae = AutoencoderDC(
            decoder_block_types=config.decoder.block_types, upsample_block_type="interpolate"
        )
        llm = Qwen3ForCausalLM(model.language_model.config)
    found = {
        **{f"model.sana.{name}": tensor for name, tensor in sana.state_dict().items()},
        **{f"model.sana_vae.{name}": tensor for name, tensor in vae.state_dict().items()},
        **{n: tensor for n, tensor in llm.state_dict().items() if n != "lm_head.weight"},
    }
    names = map_names(found)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    own = {name for name in wanted if not name.startswith("diffusion_connector.")}
    assert names.keys() == own
    assert all(found[theirs].shape == wanted[name] for name, theirs in names.items())
