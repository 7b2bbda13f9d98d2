"""Folders of an SDXL decoder: written and read again, in every published form, and broken ones."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_sdxl import SDXL_UNET, tiny_decoder

from clipflow.models.blip3o import sdxl_folder
from clipflow.models.blip3o.sdxl_config import (
    SDXL_SCHEDULER,
    build_part,
    check_depth,
    check_unet,
)
from clipflow.models.blip3o.sdxl_decoder import SDXLDecoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
NARROW = "diffusion_pytorch_model.bf16.safetensors"


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder({"prediction_type": "v_prediction"})


@pytest.fixture(scope="module")
def saved(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "diffusion-decoder"
    decoder.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "diffusion-decoder")


def picture(decoder):
    features, null = torch.linspace(-1, 1, 24).view(1, 4, 6), torch.zeros(4, 6)
    noise = torch.linspace(-2, 2, 64).view(1, 4, 4, 4)
    options = {"num_inference_steps": 2, "height": 8, "width": 8, "latents": noise}
    return decoder.draw(features, null, **options)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_written_and_read_again(decoder, folder):
    """Weights, settings and pictures are the same; nothing else is left in the folder."""
    read = SDXLDecoder.from_folder(folder)
    assert torch.equal(picture(read), picture(decoder))
    assert read.scheduler == decoder.scheduler
    assert read.unet.config.block_out_channels == decoder.unet.config.block_out_channels
    assert not read.training
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{WEIGHTS}",
        "vae/config.json",
        f"vae/{WEIGHTS}",
    ]
    assert not list(folder.parent.glob(".saving*"))


def test_the_published_form(decoder, folder):
    """Names with bf16, an encoder, other files of the pipeline: one of Python is never run."""
    for part in ("unet", "vae"):
        state = {k: v.bfloat16() for k, v in load_file(folder / part / WEIGHTS).items()}
        if part == "vae":
            state |= {"encoder.conv_in.bias": torch.ones(3), "quant_conv.bias": torch.ones(8)}
        save_file(state, folder / part / NARROW)
        (folder / part / WEIGHTS).write_bytes(b"the variant goes first")
    (folder / "pipeline_llava_gen.py").write_text("raise SystemExit('this was run')")
    (folder / "feature_extractor").mkdir()
    change(folder / "model_index.json", _class_name=["pipeline_llava_gen", "Pipeline"])
    change(folder / "scheduler/scheduler_config.json", skip_prk_steps=True, clip_sample=False)
    read = SDXLDecoder.from_folder(folder)
    assert read.dtype == read.vae.dtype == torch.bfloat16
    expected = tiny_decoder({"prediction_type": "v_prediction"}, torch.bfloat16)
    assert torch.equal(picture(read), picture(expected))
    wide = SDXLDecoder.from_folder(folder, dtype=torch.float32)
    torch.testing.assert_close(picture(wide), picture(decoder), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("variant", ["", ".bf16"])
def test_shards(decoder, folder, variant):
    state = load_file(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    names = sorted(state)
    owners = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model{variant}-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in some}, folder / "unet" / shard)
        owners |= dict.fromkeys(some, shard)
    index = folder / "unet" / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": owners}))
    assert torch.equal(picture(SDXLDecoder.from_folder(folder)), picture(decoder))
    (folder / "unet" / shard).unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        SDXLDecoder.from_folder(folder)


def test_names_of_old_attention(decoder, folder):
    path = folder / "vae" / WEIGHTS
    old = {own: name for name, own in sdxl_folder.OLD_ATTENTION.items()}

    def renamed(name):
        for own, before in old.items():
            name = name.replace(f"attentions.0.{own}.", f"attentions.0.{before}.")
        return name

    state = {renamed(name): tensor for name, tensor in load_file(path).items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, path)
    assert torch.equal(picture(SDXLDecoder.from_folder(folder)), picture(decoder))
    again = "decoder.mid_block.attentions.0.to_q.bias"
    save_file({**state, again: torch.ones(4)}, path)
    with pytest.raises(ValueError, match="every weight must be there once"):
        SDXLDecoder.from_folder(folder)


def test_without_a_scheduler_it_is_that_of_sdxl(folder):
    shutil.rmtree(folder / "scheduler")
    assert SDXLDecoder.from_folder(folder).scheduler == SDXL_SCHEDULER


def test_half_precision_keeps_a_wide_autoencoder(folder):
    """float16 overflows in SDXL's; its settings say so."""
    read = SDXLDecoder.from_folder(folder, dtype=torch.float16)
    assert (read.dtype, read.vae.dtype) == (torch.float16, torch.float32)
    change(folder / "vae/config.json", force_upcast=False)
    assert SDXLDecoder.from_folder(folder, dtype=torch.float16).vae.dtype == torch.float16


def test_meta_reads_headers(decoder, folder):
    meta = SDXLDecoder.meta(folder)
    count = {"unet": sum(p.numel() for p in decoder.unet.parameters())}
    count["vae"] = sum(p.numel() for p in decoder.vae.parameters())
    assert meta.parameters == count
    assert meta.dtypes == {"unet": (torch.float32,), "vae": (torch.float32,)}
    assert meta.unet.device.type == "meta"


def test_saving_takes_the_place_of_what_is_there(saved, tmp_path):
    """Weights of both variants would be two models; other files stay."""
    narrow = tiny_decoder(dtype=torch.bfloat16)
    target = shutil.copytree(saved, tmp_path / "decoder")
    (target / "README.md").write_text("kept")
    narrow.save(target)
    assert [p.name for p in (target / "unet").iterdir() if p.suffix != ".json"] == [NARROW]
    assert (target / "README.md").exists()
    assert torch.equal(picture(SDXLDecoder.from_folder(target)), picture(narrow))


def test_a_save_that_fails_leaves_the_folder(decoder, folder, monkeypatch):
    def full(path, value):
        raise OSError("no space left on device")

    monkeypatch.setattr(sdxl_folder, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        tiny_decoder().save(folder)
    monkeypatch.undo()
    assert torch.equal(picture(SDXLDecoder.from_folder(folder)), picture(decoder))
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    (folder.parent / "file").touch()
    with pytest.raises(NotADirectoryError, match="got the file"):
        decoder.save(folder.parent / "file")


SETTINGS = [
    ("unet/config.json", {"_class_name": "UNet3D"}, "_class_name UNet2DConditionModel, got 'UNet"),
    ("unet/config.json", {"script": "run.py"}, "unknown keys 'script'"),
    ("unet/config.json", {"act_fn": {"path": "x"}}, "numbers, words and lists of them, got act_fn"),
    ("unet/config.json", {"norm_eps": 1e400}, "numbers, words and lists of them, got norm_eps"),
    ("unet/config.json", {"layers_per_block": 10**6}, "unet/config.json must have at most"),
    ("unet/config.json", {"norm_num_groups": 3}, "sizes that fit together"),
    ("unet/config.json", {"down_block_types": ["os.system"] * 2}, "sizes that fit together"),
    ("unet/config.json", {"cross_attention_dim": 7}, "projection_class_embeddings_input_dim"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type None, got 'timestep'"),
    ("unet/config.json", {"out_channels": 8}, r"as many channels as it takes, got \[4, 8\]"),
    ("unet/config.json", {"layers_per_block": 2}, "must hold the model's parameters, got"),
    ("vae/config.json", {"latent_channels": 8}, "latent_channels 4 as the UNet, got 8"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor above 0, got 0"),
    ("vae/config.json", {"norm_num_groups": True}, "norm_num_groups above 0, got True"),
    ("unet/config.json", {"norm_eps": "small"}, "norm_eps above 0, got 'small'"),
    (
        "unet/config.json",
        {"attention_head_dim": [1, -1]},
        r"head_dim above 0, got \[1, -",
    ),
    ("unet/config.json", {"freq_shift": "linear"}, "must have a freq_shift, got 'linear'"),
    ("unet/config.json", {"downsample_padding": 2}, "downsample_padding 1, got 2"),
    ("vae/config.json", {"shift_factor": 0.5}, "shift_factor None, got 0.5"),
    (
        "vae/config.json",
        {"block_out_channels": [4, 6]},
        "vae must hold the model's parameters",
    ),
    (
        "scheduler/scheduler_config.json",
        {"_class_name": "DDIMScheduler"},
        "_class_name EulerDiscreteScheduler, got 'DDIMScheduler'",
    ),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type of epsilon"),
    ("scheduler/scheduler_config.json", {"beta_end": 2.0}, "betas between 0 and 1, got 2.0"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "from 1 to 100000, got 0"),
    ("scheduler/scheduler_config.json", {"steps_offset": 1000}, "below 1000, got 1000"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "1000 trained_betas, got 1"),
    ("scheduler/scheduler_config.json", {"trained_betas": []}, "1000 trained_betas, got 0"),
    ("scheduler/scheduler_config.json", {"use_karras_sigmas": "no"}, "true or false, got"),
    (
        "scheduler/scheduler_config.json",
        {"use_karras_sigmas": True, "use_exponential_sigmas": True},
        "sizes that fit together: Only one of",
    ),
    (
        "model_index.json",
        {"unet": ["pipeline_llava_gen", "UNet"]},
        "must have a unet of diffusers' UNet2DConditionModel, got",
    ),
]


@pytest.mark.parametrize(("file", "values", "message"), SETTINGS)
def test_odd_settings(folder, file, values, message):
    change(folder / file, **values)
    with pytest.raises(ValueError, match=message) as error:
        SDXLDecoder.from_folder(folder)
    text = str(error.value)
    assert text.startswith("load: ") and "\n" not in text and str(folder) in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("unet/config.json", b"{", "config.json must be JSON"),
        ("unet/config.json", b"[1]", "must be a JSON object, got list"),
        (f"unet/{WEIGHTS}", b"12345678", "must be a whole safetensors file, got 8 bytes"),
        ("scheduler/scheduler_config.json", b"\xff", "must be JSON"),
        ("model_index.json", b"null", "must be a JSON object"),
    ],
)
def test_broken_files(folder, file, content, message):
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SDXLDecoder.from_folder(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("unet/config.json", r"unet/config.json must be there, got no such file"),
        (f"vae/{WEIGHTS}", rf"vae must hold {NARROW} or {WEIGHTS}, got config.json"),
    ],
)
def test_missing_files(folder, file, message):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        SDXLDecoder.from_folder(folder)


def test_missing_folders(folder):
    shutil.rmtree(folder / "vae")
    with pytest.raises(FileNotFoundError, match="vae must be there, got no such folder"):
        SDXLDecoder.from_folder(folder)
    with pytest.raises(FileNotFoundError, match="the decoder must be a folder, got"):
        SDXLDecoder.from_folder(folder / "unet/config.json")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((4,), float("nan")), "must hold finite weights"),
        (torch.ones(4, dtype=torch.int8), "float32, bfloat16 or float16, got others in conv_in"),
        (torch.ones(5), r"conv_in.bias: must have shape \[4\], got \[5\]"),
    ],
)
def test_odd_weights(folder, tensor, message):
    path = folder / "unet" / WEIGHTS
    save_file({**load_file(path), "conv_in.bias": tensor}, path)
    with pytest.raises(ValueError, match=message):
        SDXLDecoder.from_folder(folder)


@pytest.mark.parametrize(
    ("width", "pooled", "count"),
    [(2048, 1280, 2_567_463_684), (1792, 1792, 2_525_520_644)],
    ids=["SDXL-base", "Emu2-Gen"],
)
def test_sizes_of_sdxl(width, pooled, count):
    """The second is SDXL's with features in the place of text; the first's count is well known."""
    widths = {"cross_attention_dim": width, "projection_class_embeddings_input_dim": pooled + 1536}
    values = {**SDXL_UNET, **widths}
    check_depth(values, 1680, "unet")
    unet = build_part(UNet2DConditionModel, values, "unet")
    assert len(unet.state_dict()) == 1680
    assert sum(p.numel() for p in unet.parameters()) == count
    if width == pooled:
        check_unet(unet, "unet")
