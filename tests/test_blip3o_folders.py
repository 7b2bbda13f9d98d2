"""Folders of BLIP3-o: the published form in its variants, our own, and what is refused."""

import dataclasses
import json
import warnings
from pathlib import Path

import folder_mutations as break_by
import pytest
import torch
from safetensors.torch import load_file

from clipflow.cli.main import main as clipflow
from clipflow.errors import InputError
from clipflow.models.blip3o import BLIP3oConfig, BLIP3oModel, blip3o_config
from clipflow.models.blip3o.keys import map_names
from clipflow.models.blip3o.sizes import parameter_counts
from clipflow.pipelines.loading import summarize_folder
from clipflow.pipelines.tokenizer_files import read_tokenizer
from clipflow.testing import write_blip3o_folder
from clipflow.testing.__main__ import main as write
from clipflow.testing.blip3o_folder import published_blip3o_name

TOWER = {"model.gen_vision_tower.vision_tower.model.cls_token": (1, 1, 1792)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("blip3o")


@pytest.fixture(scope="module")
def folder(root):
    return write_blip3o_folder(root / "tiny", extra_tensors=TOWER)


@pytest.fixture(scope="module")
def plain(root):
    """Without a decoder."""
    return write_blip3o_folder(root / "plain", decoder=False)


@pytest.fixture(scope="module")
def model(folder):
    return BLIP3oModel.from_pretrained(folder)


def assert_same(found, wanted):
    state, others = found.state_dict(), wanted.state_dict()
    assert found.config == wanted.config and state.keys() == others.keys()
    assert all(torch.equal(state[name], others[name]) for name in others)


def test_a_published_folder(model, folder):
    assert model.config == dataclasses.replace(blip3o_config("tiny"), output_size=128)
    assert model.dtype == torch.bfloat16 and model.device == torch.device("cpu")
    assert not model.training and not model.decoder.training
    rotary = (model.language_model.rotary_emb, model.visual.rotary_pos_emb)
    assert all(table.inv_freq.dtype == torch.float32 for table in rotary)
    assert not any(table.inv_freq.is_meta for table in rotary)
    wide = BLIP3oModel.from_pretrained(folder, dtype=torch.float32, with_decoder=False)
    assert {p.dtype for p in wide.parameters()} == {torch.float32} and wide.decoder is None


@torch.no_grad()
def test_what_it_computes(model):
    config, tokens = model.config, model.config.tokens
    pixels = torch.randn(1, 3, 448, 448, dtype=torch.bfloat16)
    features = model.encode_image(pixels)
    assert features.shape == (1, 256, config.text.hidden_size)
    image = [tokens.vision_start, *[tokens.image_pad] * 256, tokens.vision_end]
    ids = torch.tensor([[1, *image, 2, tokens.image_start]])
    given = model.encode_condition(ids, torch.ones_like(ids), features)
    assert given.hidden.shape == (1, 64, 64) and given.mask.shape == (1, 64)
    assert model.null_condition().shape == (64, 64) and not model.null_condition().any()
    latents = torch.randn(1, *model.latent_shape, dtype=torch.bfloat16)
    velocity = model.dit(latents, torch.tensor([999]), given.hidden, given.mask)
    assert velocity.shape == latents.shape and bool(velocity.isfinite().all())
    pictures = model.decode(latents, latents * 0, num_inference_steps=1)
    assert pictures.shape == (1, 3, 128, 128)


def test_what_is_saved_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(BLIP3oModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "options",
    [
        {"names": "new"},
        {"max_shard_size": "200KB"},
        {"tied_head": True},
        {"changes": {"text_config": {"rope_theta": 1e6}, "rope_scaling": None}},
        {"changes": {"vision_config": {"fullatt_block_indexes": [1]}, "pad_token_id": None}},
        {"changes": {"vocab_size": 384, "edits": False}},
    ],
)
def test_variants(plain, tmp_path, options):
    found = BLIP3oModel.from_pretrained(
        write_blip3o_folder(tmp_path / "a", decoder=False, **options)
    )
    wanted = BLIP3oModel.from_pretrained(plain)
    if options.get("tied_head"):
        assert found.lm_head is None
        assert torch.equal(found.latent_queries, wanted.latent_queries)
    else:
        assert_same(found, wanted)


def test_left_overs_of_training_are_ignored(plain, tmp_path):
    folder = break_by.Folder(tmp_path / "a", plain)
    for name in ("mm_projector.bin", "gen_projector.bin"):
        folder.write(name, b"")
    assert_same(BLIP3oModel.from_pretrained(folder.path), BLIP3oModel.from_pretrained(plain))


@pytest.mark.parametrize("form", ["fast", "slow"])
def test_the_tokenizer(tmp_path, form):
    tokenizer = read_tokenizer(write_blip3o_folder(tmp_path / "a", decoder=False, tokenizer=form))
    tokens = blip3o_config("tiny").tokens
    wanted = {
        "<|endoftext|>": tokens.pad,
        "<|im_end|>": tokens.im_end,
        "<|image_pad|>": tokens.image_pad,
        "<|vision_start|>": tokens.vision_start,
        "<|vision_end|>": tokens.vision_end,
        "[IMG]": tokens.image_start,
    }
    assert {text: tokenizer(text)["input_ids"] for text in wanted} == {
        text: [number] for text, number in wanted.items()
    }


def test_the_command_that_writes_folders(tmp_path, capsys):
    assert write([str(tmp_path / "a"), "--family", "blip3o", "--seed", "3"]) == 0
    assert "BLIP3-o tiny, random weights, seed 3" in capsys.readouterr().out
    assert BLIP3oModel.from_pretrained(tmp_path / "a").decoder is not None
    with pytest.raises(SystemExit):
        write([str(tmp_path / "b"), "--family", "blip3o", "--size", "1b"])
    with pytest.raises(InputError, match="names must be one of old, new"):
        published_blip3o_name("dit.x", "others")


def test_pickled_shards_are_converted(plain, tmp_path):
    """`clipflow convert` of the folder as training leaves it, with PyTorch's own files."""
    state = load_file(plain / "model.safetensors")
    source = break_by.Folder(tmp_path / "bin", plain)
    source.remove("model.safetensors")
    names = sorted(state)
    halves = {"1": names[::2], "2": names[1::2]}
    files = {half: f"pytorch_model-0000{half}-of-00002.bin" for half in halves}
    for half, held in halves.items():
        torch.save({name: state[name] for name in held}, source.path / files[half])
    owners = {name: files[half] for half, held in halves.items() for name in held}
    source.write_json("pytorch_model.bin.index.json", {"metadata": {}, "weight_map": owners})
    source.write("mm_projector.bin", b"")
    with pytest.raises((ValueError, OSError), match=r"must hold model\.safetensors"):
        BLIP3oModel.from_pretrained(source.path)
    assert clipflow(["convert", str(source.path), "-o", str(tmp_path / "out")]) == 0
    assert_same(BLIP3oModel.from_pretrained(tmp_path / "out"), BLIP3oModel.from_pretrained(plain))
    assert (tmp_path / "out" / "tokenizer_config.json").exists()


FIELDS = {
    "model_type": ("llama", None),
    "edits": ("yes", 1.5),
    "hidden_size": (65, "64", 10**12),
    "num_attention_heads": (3, 0),
    "num_key_value_heads": (3, 4),
    "vocab_size": (10**9,),
    "n_query": (63, True),
    "gen_hidden_size": (1024,),
    "gen_pooling": ("early_pool2d_2",),
    "rope_scaling": ([], {"type": "yarn"}, {"type": "mrope", "mrope_section": [2, 2, 2]}),
    "rope_theta": (0, "1e6"),
    "image_token_id": (-1, 315, 5, "303"),
    "vision_start_token_id": (5,),
    "pad_token_id": (10**9, -1),
    "use_sliding_window": (True,),
    "hidden_act": ("relu",),
    "speed": (1,),
    "text_config": (5, {"hidden_size": 65}),
    "vision_config": (
        5,
        {"hidden_size": 1280},
        {"depth": 3},
        {"num_heads": 3},
        {"window_size": 100},
        {"fullatt_block_indexes": [7]},
        {"fullatt_block_indexes": "1"},
        {"out_hidden_size": 65},
        {"patch_size": 16},
    ),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in FIELDS.items() for value in values]
)
def test_broken_configurations(plain, tmp_path, name, value):
    folder = break_by.Folder(tmp_path / "a", plain)
    folder.write_json("config.json", folder.json("config.json") | {name: value})
    check_refused(folder.path)


WEIGHTS = {
    f"{table.__name__}: {name}": mutation
    for table in (break_by.truncations, break_by.header_lengths, break_by.header_texts)
    for name, mutation in list(table().items())[::5]
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_broken_weights(plain, tmp_path, name):
    folder = break_by.Folder(tmp_path / "a", plain)
    WEIGHTS[name](folder)
    check_refused(folder.path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"without": ["model.dit."]}, "must hold the diffusion transformer"),
        ({"without": ["model.latent_queries"]}, "latent_queries must have 3 dimensions, got no"),
        ({"without": ["model.norm."]}, "language_model.norm.weight: missing"),
        ({"without": ["visual.blocks.1."]}, "vision_config.depth must be 1 as the weights are"),
        ({"without": ["model.dit.model.layers.0."]}, "dit.layers.0.gate must have 1 dimensions"),
        ({"extra_tensors": {"model.visual.merger.ln_q.weight": (32,)}}, "must be there once"),
        ({"extra_tensors": {"model.dit.model.layers.0.bias": (2,)}}, "layers.0.bias: unknown"),
        ({"extra_tensors": {"model.gen_projector.weight": (2,)}}, "gen_projector.weight: unknown"),
    ],
)
def test_broken_names(tmp_path, options, message):
    folder = write_blip3o_folder(tmp_path / "a", decoder=False, **options)
    assert message in check_refused(folder)


def test_a_decoder_of_other_features(folder, tmp_path):
    broken = write_blip3o_folder(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "blip3o_qwen_inference"
    unet = broken / "diffusion-decoder" / "unet" / "config.json"
    values = json.loads(unet.read_text())
    unet.write_text(json.dumps(values | {"cross_attention_dim": 1024}))
    check_refused(broken)
    (broken / "diffusion-decoder" / "vae" / "config.json").unlink()
    check_refused(broken)


def test_the_tower_that_is_not_there(folder, plain):
    with pytest.raises(ValueError, match="must hold the EVA-CLIP tower"):
        BLIP3oModel.from_pretrained(plain, with_target=True)
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight must have 4 dimensions"):
        BLIP3oModel.from_pretrained(folder, with_target=True)  # its class token alone


def test_a_model_without_a_decoder(plain):
    found = BLIP3oModel.from_pretrained(plain)
    with pytest.raises(InputError, match="has no pixel decoder"):
        found.decode(torch.zeros(1, *found.latent_shape))


def test_names_of_both_versions():
    own = ["visual.merger.ln_q.weight", "language_model.norm.weight", "latent_queries"]
    own += ["dit.layers.0.gate", "lm_head.weight", "language_model.layers.1.mlp.up_proj.weight"]
    old, new = ([published_blip3o_name(n, form) for n in own] for form in ("old", "new"))
    assert old[0] == own[0] and new[0] == f"model.{own[0]}" and old[3] == new[3]
    assert list(map_names(old)) == list(map_names(new)) == list(map_names(own)) == own
    assert BLIP3oConfig.from_dict(blip3o_config("tiny").to_dict()) == blip3o_config("tiny")


def check_refused(folder: Path) -> str:
    """One line that says what is wrong, and nothing else."""
    with warnings.catch_warnings(), pytest.raises((ValueError, OSError)) as caught:
        warnings.simplefilter("error")
        BLIP3oModel.from_pretrained(folder)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 2500, text
    return text


def test_what_the_headers_say(folder, plain, model):
    """Of the decoder, too, whose dtype does not decide that of the model."""
    summary, without = summarize_folder(folder), summarize_folder(plain)
    assert summary.counts == parameter_counts(model)
    assert summary.counts["decoder"] > 0 == without.counts["decoder"]
    assert summary.skipped == {"gen_vision_tower": 1} and without.skipped == {}
    assert summary.dtypes["decoder"] == {torch.bfloat16: summary.counts["decoder"]}
    assert summary.dtype == torch.bfloat16
