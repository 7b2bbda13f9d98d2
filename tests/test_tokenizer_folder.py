"""Tokenizer checkpoints: to folders that encode and decode, or into the parts of a whole model."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from unilip_fixture import load_fixture, parity_dir, recorded_weights

from clipflow import CLIPFlowPipeline, UniLIPTokenizer
from clipflow.cli import main
from clipflow.errors import InputError
from clipflow.models.unilip import tokenizer_checkpoint
from clipflow.models.unilip.image_codec import ImageTokenizer, TokenizerConfig
from clipflow.models.unilip.tokenizer_checkpoint import convert_tokenizer
from clipflow.pipelines.families.unilip import FAMILY as UNILIP
from clipflow.pipelines.offload import Offload
from clipflow.testing import size_config, write_unilip_folder

RENAMED = {
    "vision_tower.": "encoder.",
    "multi_modal_projector.": "mlp1.",
    "vae_decoder.": "",
}


def checkpoint_tensors() -> dict[str, Tensor]:
    """The fixture's tokenizer under the names of section 5.2, written out here by themselves."""
    state = recorded_weights(parity_dir())
    found = {}
    for name, tensor in state.items():
        own = name.removeprefix("model.")
        for ours, theirs in RENAMED.items():
            if own.startswith(ours):
                found[theirs + own.removeprefix(ours)] = tensor
    return found | {"regressor.weight": torch.ones(2), "encoder.regressor.bias": torch.ones(1)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "1b_unilip.pth"
    torch.save(checkpoint_tensors(), path)
    return path


@pytest.fixture(scope="module")
def folder(source):
    convert_tokenizer(source, source.parent / "tokenizer")
    return source.parent / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return UniLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    extra = {"model.gen_vision_tower.x": (3,), "model.dcae.encoder.y": (2, 2)}
    return write_unilip_folder(
        folder, "tiny", torch.bfloat16, 1, prefixes="reverse_mapped", extra_tensors=extra
    )


def picture(side: int = 300) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(source, message, out=None, **options) -> str:
    out = out or source.parent / "refused"
    with pytest.raises(InputError) as caught:
        convert_tokenizer(source, out, **options)
    text = str(caught.value)
    assert message in text and "\n" not in text and not out.exists(), text
    return text


class TestFolder:
    def test_its_files_and_its_sizes(self, folder, tokenizer):
        assert names(folder) == ["config.json", "model.safetensors"]
        values = json.loads((folder / "config.json").read_text())
        assert values["model_type"] == "clipflow_unilip_tokenizer"
        assert values["text_width"] == 64 and values["vision"]["num_attention_heads"] == 4
        assert tokenizer.model.config == TokenizerConfig.of_model(load_fixture().model.config)
        stored = load_file(folder / "model.safetensors")
        state = load_fixture().model.state_dict()
        assert len(stored) == len(checkpoint_tensors()) - 2
        for name, tensor in stored.items():
            assert torch.equal(tensor, state[name]), name

    def test_the_sizes_of_the_published_checkpoints(self):
        for size in ("1b", "3b"):
            config = TokenizerConfig.of_model(size_config(size))
            with torch.device("meta"):
                state = ImageTokenizer(config).state_dict()
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            assert tokenizer_checkpoint.config_from_shapes(shapes) == config

    @torch.no_grad()
    def test_the_recorded_latents(self, tokenizer):
        recorded = load_fixture().tensors
        for pixels, latents in [
            ("image.pixel_values", "tokenizer.latent"),
            ("image224.pixel_values", "tokenizer224.latent"),
        ]:
            model = tokenizer.model
            found = model.clip_down(model.encode_image(recorded[pixels]))
            torch.testing.assert_close(found, recorded[latents], rtol=0, atol=2e-5)

    @pytest.mark.parametrize("resolution", [224, 150])
    def test_it_reconstructs_as_the_whole_model(self, tokenizer, resolution):
        whole = load_fixture().model
        factor = whole.config.unilip_factor
        pipe = CLIPFlowPipeline.__new__(CLIPFlowPipeline)  # without a tokenizer of texts
        pipe.model, pipe.image_processor = whole, tokenizer.image_processor
        pipe.family, pipe.offload = UNILIP, Offload(whole, {})
        wanted = pipe.reconstruct(picture(), resolution=resolution, output_type="pt").images
        found = tokenizer.reconstruct(picture(), resolution=resolution, output_type="pt").images
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        latents = tokenizer.encode([picture()], resolution=resolution)
        again = tokenizer.decode(latents, resolution=resolution, output_type="pt")
        assert torch.equal(again, found)
        scaled = pipe.reconstruct(picture(), resolution=resolution, output_type="latent").images
        torch.testing.assert_close(latents * factor, scaled)
        same = tokenizer.reconstruct(picture(), resolution=resolution, output_type="latent").images
        assert torch.equal(same, latents)

    def test_decode_refuses_what_encode_does_not_give(self, tokenizer):
        for shape in ((1, 32, 5, 5), (32, 8, 8), (1, 3, 8, 8)):
            with pytest.raises(InputError, match="latents must be"):
                tokenizer.decode(torch.zeros(shape), resolution=224)
        with pytest.raises(InputError, match="must be one of pil, np, pt"):
            tokenizer.decode(torch.zeros(1, 32, 8, 8), resolution=224, output_type="latent")

    def test_saved_and_moved(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path / "again")
        narrow = UniLIPTokenizer.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
        kinds = {n.split(".")[0]: p.dtype for n, p in narrow.model.named_parameters()}
        assert kinds == {
            "vision_tower": torch.bfloat16,
            "multi_modal_projector": torch.bfloat16,
            "vae_decoder": torch.float32,
        }
        assert narrow.dtype == torch.bfloat16
        assert narrow.image_processor == tokenizer.image_processor
        narrow.to(dtype=torch.float32)
        assert {p.dtype for p in narrow.model.parameters()} == {torch.float32}
        assert narrow.encode(picture(), resolution=28).shape == (1, 32, 1, 1)

    def test_the_tokenizer_of_a_whole_model(self, base):
        found = UniLIPTokenizer.from_pretrained(base, dtype="auto")
        assert found.dtype == torch.bfloat16
        wanted = CLIPFlowPipeline.from_pretrained(base).model
        for name, tensor in found.model.state_dict().items():
            assert torch.equal(tensor.float(), wanted.get_parameter(name)), name
        scenes = UniLIPTokenizer.from_pretrained("scenes")
        pipe = CLIPFlowPipeline.from_pretrained("scenes")
        for resolution in (None, 40, 33):
            options = {"resolution": resolution, "output_type": "np"}
            ours, theirs = (x.reconstruct(picture(64), **options).images for x in (scenes, pipe))
            assert np.array_equal(ours, theirs)

    @pytest.mark.parametrize("command", ["generate", "info", "ask", "classify", "edit"])
    def test_it_is_no_whole_model(self, folder, command, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        picture().save("in.png")
        calls = {
            "generate": ["a star", "-o", "out.png"], "info": [str(folder)],
            "ask": ["in.png", "what?"], "classify": ["in.png", "--labels", "a,b"],
            "edit": ["in.png", "more", "-o", "out.png"],
        }  # fmt: skip
        model = [] if command == "info" else ["--model", str(folder), "--device", "cpu"]
        assert main([command, *calls[command], *model]) == 2
        assert "clipflow.UniLIPTokenizer" in capsys.readouterr().err
        with pytest.raises(InputError, match=r"clipflow\.UniLIPTokenizer\.from_pretrained"):
            CLIPFlowPipeline.from_pretrained(folder)

    def test_the_command_reconstructs_with_it(self, folder, tmp_path, capsys):
        picture().save(tmp_path / "in.png")
        call = ["reconstruct", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")]
        assert main([*call, "--model", str(folder), "--device", "cpu", "--resolution", "100"]) == 0
        assert Image.open(tmp_path / "out.png").size == (100, 100)
        assert "PSNR" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v["vision"].update(num_hidden_layers=10**9), "must be at most"),
            (lambda v: v.update(text_width=10**9), "must be at most"),
            (lambda v: v["vision"].update(hidden_size=63), "must be a multiple"),
            (lambda v: v["decoder"].update(layers_per_block=[1]), "must have 6 entries"),
            (lambda v: v.update(output_size=0), "output_size must be above 0"),
            (lambda v: v.pop("vision"), "missing keys ['vision']"),
            (lambda v: v.update(more=1), "unknown keys ['more']"),
            (lambda v: v["vision"].update(num_hidden_layers=1), "unknown"),
        ],
    )
    def test_broken_configurations(self, folder, tmp_path, change, message):
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (tmp_path / "config.json").write_text(json.dumps(values))
        (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
        with pytest.raises(InputError) as caught:
            UniLIPTokenizer.from_pretrained(tmp_path)
        assert message in str(caught.value) and "\n" not in str(caught.value)


class TestCommand:
    def test_every_form_of_the_file(self, source, folder, tmp_path, capsys):
        wanted = load_file(folder / "model.safetensors")
        tensors = checkpoint_tensors()
        save_file(tensors, tmp_path / "a.safetensors")
        torch.save({"model": tensors, "step": 3}, tmp_path / "b.pt")
        torch.save(tensors, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
        for name, note in [("a.safetensors", ""), ("b.pt", "  taken from 'model'"), ("c.bin", "")]:
            out = tmp_path / f"out-{name[0]}"
            call = ["convert", "--from", "unilip-tokenizer", str(tmp_path / name), "-o", str(out)]
            assert main([*call, "--max-shard-size", "1MB"]) == 0
            printed = capsys.readouterr().out
            assert printed == f"{out}  {len(wanted)} tensors  2 left out (regressor){note}\n"
            found = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
            assert len(list(out.glob("*.safetensors"))) > 2
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
            assert main(call) == 2
            assert "--force replaces it" in capsys.readouterr().err
            assert main([*call, "--force"]) == 0
            assert names(out) == ["config.json", "model.safetensors"]
            capsys.readouterr()

    def test_dtype_leaves_the_decoder(self, source, tmp_path):
        convert_tokenizer(source, tmp_path / "out", dtype=torch.bfloat16)
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
            wide = name.startswith("vae_decoder.")
            assert tensor.dtype == (torch.float32 if wide else torch.bfloat16)


class TestRefusals:
    def write(self, tmp_path, change):
        tensors = checkpoint_tensors()
        change(tensors)
        save_file(tensors, tmp_path / "in.safetensors")
        return tmp_path / "in.safetensors"

    @pytest.mark.parametrize(
        ("change", "messages"),
        [
            (lambda t: t.update(more=torch.ones(1)), ["got 1 unknown names: more"]),
            (lambda t: t.pop("mlp1.3.bias"), ["1 differences: mlp1.3.bias: missing"]),
            (
                lambda t: t.update({"down_mlp.7.bias": t.pop("down_mlp.3.bias")}),
                ["2 differences", "down_mlp.3.bias: missing", "down_mlp.7.bias: unknown"],
            ),
            (
                lambda t: t.update({"decoder.conv_in.bias": torch.ones(7)}),
                ["1 differences: decoder.conv_in.bias: must have shape [64], got [7]"],
            ),
            (lambda t: t.pop("encoder.embeddings.position_embedding"), ["position_embedding"]),
            (lambda t: t.update({"mlp1.1.bias": torch.ones(64).int()}), ["floating point"]),
            (lambda t: t.clear() or t.update(a=torch.ones(1)), ["got 1 unknown names: a"]),
            (
                lambda t: t.update({f"model.{i:02d}": torch.ones(1) for i in range(30)}),
                ["got 30 unknown names: model.00;", "model.09; and 20 more"],
            ),
            (
                lambda t: t.update({"encoder.embeddings.patch_embedding.weight": torch.ones(
                    48, 3, 14, 14)}),
                ["must be of a square grid"],
            ),
        ],
    )  # fmt: skip
    def test_other_names_and_shapes(self, tmp_path, change, messages):
        source = self.write(tmp_path, change)
        for message in messages:
            refused(source, message)

    def test_places(self, source, tmp_path):
        refused(source, "must be a folder for a tokenizer", tmp_path / "out.safetensors")
        refused(source, "no folder", tmp_path / "none" / "out")
        refused(tmp_path / "none.pth", "no such file")


class TestBase:
    def test_a_whole_model_with_the_parts_replaced(self, source, base, tmp_path):
        out = tmp_path / "out"
        call = ["convert", str(source), "--from", "unilip-tokenizer", "--base", str(base)]
        assert main([*call, "-o", str(out), "--max-shard-size", "1MB"]) == 0
        assert {n for n in names(base) if "safetensors" not in n} == {
            n for n in names(out) if "safetensors" not in n
        }
        for path in base.iterdir():
            if "safetensors" not in path.name:
                assert (out / path.name).read_bytes() == path.read_bytes()
        before = load_file(base / "model.safetensors")
        after = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
        assert after.keys() == before.keys()
        fixture = load_fixture().model.state_dict()
        replaced = 0
        for name, tensor in after.items():
            own = name.removeprefix("model.")
            if own.startswith("vae_decoder."):
                assert tensor.dtype == torch.float32 and torch.equal(tensor, fixture[own])
            elif own.startswith(("vision_tower.", "multi_modal_projector.")):
                assert torch.equal(tensor, fixture[own].bfloat16())
            else:
                assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
                continue
            replaced += 1
        assert replaced == len(checkpoint_tensors()) - 2
        pipe = CLIPFlowPipeline.from_pretrained(out, dtype="auto")
        assert pipe.dtype == torch.bfloat16
        tokenizer = UniLIPTokenizer.from_pretrained(out, dtype="auto")
        options = {"resolution": 56, "output_type": "np"}
        found = pipe.reconstruct(picture(), **options).images
        np.testing.assert_allclose(
            tokenizer.reconstruct(picture(), **options).images, found, atol=1e-4
        )

    def test_bases_that_do_not_fit(self, source, base, folder, tmp_path):
        refused(source, "clipflow.UniLIPTokenizer", base=folder)
        refused(source, "must be a folder", base=tmp_path / "none")
        CLIPFlowPipeline.from_pretrained("scenes").save_pretrained(tmp_path / "scenes")
        text = refused(source, "differences", base=tmp_path / "scenes")
        assert "--base" in text and "and" in text and "more" in text


def test_the_page_is_true(source, base, tmp_path, monkeypatch, capsys):
    """Every command and every line of Python in docs/convert.md runs, on small files."""
    page = (Path(__file__).parents[1] / "docs" / "convert.md").read_text()
    monkeypatch.chdir(tmp_path)
    picture().save("photo.png")
    shutil.copy(source, "1b_unilip.pth")
    shutil.copy(source, "pytorch_model.bin")
    shutil.copytree(base, "UniLIP-1B")
    Path("pickled-model").mkdir()
    for name in names(base):
        if "safetensors" not in name:
            shutil.copy(base / name, "pickled-model")
    state = load_file(base / "model.safetensors")
    torch.save(state, "pickled-model/pytorch_model.bin")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page, re.S)
    assert [kind for kind, _ in blocks] == ["sh", "sh", "python", "sh"]
    values: dict = {}
    for kind, text in blocks:
        if kind == "python":
            exec(text, values)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "clipflow" and main(arguments) == 0, capsys.readouterr().err
    assert values["latents"].shape == (1, 32, 16, 16)
    assert values["picture"].size == (448, 448) and values["small"].size == (256, 256)
    assert Image.open("again.png").size == (256, 256)
    assert CLIPFlowPipeline.from_pretrained("model", dtype="auto").dtype == torch.bfloat16
    assert load_file("model.safetensors").keys() == checkpoint_tensors().keys()
