"""Model folders: bitwise round trips, one clear error for anything broken, nothing half-written."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from clipflow.models.folders.checkpoint import INDEX_FILE, WEIGHTS_FILE
from clipflow.models.folders.loading import load_config, load_names
from clipflow.models.unilip import UniLIPConfig, UniLIPModel, scenes_config
from clipflow.models.unilip.config import TokenIds
from clipflow.models.unilip.loading import FORMAT

TOKENS = TokenIds(pad=0, img_start=1, img_end=2, img_context=3, im_end=4)
SHARD = "1MB"  # the small model makes several shards of it


def small_config(*, tied: bool = False) -> UniLIPConfig:
    full = scenes_config(64, TOKENS)
    return dataclasses.replace(
        full,
        vision=dataclasses.replace(full.vision, num_hidden_layers=1),
        text=dataclasses.replace(full.text, num_hidden_layers=1, tie_word_embeddings=tied),
        dit=dataclasses.replace(full.dit, num_layers=1),
        connect_layer=1,
    )


@pytest.fixture(scope="module")
def model() -> UniLIPModel:
    return UniLIPModel(small_config()).eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size=SHARD)
    return tmp_path / "sharded"


def assert_same(actual: UniLIPModel, expected: UniLIPModel) -> None:
    assert actual.config == expected.config
    state = expected.state_dict()
    assert actual.state_dict().keys() == state.keys()
    for name, tensor in actual.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name
    buffers = dict(expected.named_buffers())
    assert dict(actual.named_buffers()).keys() == buffers.keys()
    for name, tensor in actual.named_buffers():
        assert torch.equal(tensor, buffers[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_config(folder: Path, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def error_of(folder: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        UniLIPModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRoundTrip:
    def test_one_file(self, model, folder):
        assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS_FILE]
        assert_same(UniLIPModel.from_pretrained(folder), model)

    def test_shards(self, model, sharded):
        names = sorted(path.name for path in sharded.glob("model-*.safetensors"))
        assert len(names) > 2
        assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
        index = json.loads((sharded / INDEX_FILE).read_text())
        assert set(index["weight_map"].values()) == set(names)
        assert index["weight_map"].keys() == model.state_dict().keys()
        assert_same(UniLIPModel.from_pretrained(str(sharded)), model)

    def test_config_alone(self, model, sharded):
        assert load_config(sharded, FORMAT) == model.config

    def test_tied_head(self, tmp_path):
        tied = UniLIPModel(small_config(tied=True)).eval()
        tied.save_pretrained(tmp_path)
        loaded = UniLIPModel.from_pretrained(tmp_path)
        assert loaded.lm_head is None
        assert_same(loaded, tied)

    def test_mixed_dtypes_come_back_as_stored(self, folder, tmp_path):
        mixed = UniLIPModel.from_pretrained(folder)
        mixed.dit.bfloat16()
        mixed.save_pretrained(tmp_path / "mixed")
        assert_same(UniLIPModel.from_pretrained(tmp_path / "mixed"), mixed)

    def test_dtype(self, model, folder):
        """Parameters are cast, but for the decoder's; the rotary tables are not."""
        loaded = UniLIPModel.from_pretrained(folder, dtype=torch.bfloat16)
        for name, parameter in loaded.named_parameters():
            wide = name.startswith("vae_decoder.")
            assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert torch.equal(loaded.projector.weight, model.projector.weight.bfloat16())
        for name, table in loaded.named_buffers():
            assert torch.equal(table, model.get_buffer(name)), name

    def test_loaded_models_can_be_trained(self, folder):
        """Weights are the model's own: changing them changes neither the file nor another model."""
        first = UniLIPModel.from_pretrained(folder)
        assert all(parameter.requires_grad for parameter in first.parameters())
        before = contents(folder)
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.zero_()
        assert contents(folder) == before
        assert UniLIPModel.from_pretrained(folder).projector.weight.any()

    def test_results_are_the_same(self, model, folder):
        ids = torch.randint(5, 64, (2, 7))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = model.encode_condition(ids, mask).hidden
            loaded = UniLIPModel.from_pretrained(folder)
            assert torch.equal(loaded.encode_condition(ids, mask).hidden, expected)


class TestSaving:
    def test_replaces_weights_and_leaves_other_files(self, model, sharded):
        (sharded / "tokenizer.json").write_text("{}")
        (sharded / "preprocessor_config.json").write_text("{}")
        model.save_pretrained(sharded)
        assert sorted(os.listdir(sharded)) == [
            "config.json",
            WEIGHTS_FILE,
            "preprocessor_config.json",
            "tokenizer.json",
        ]
        assert_same(UniLIPModel.from_pretrained(sharded), model)

    @pytest.mark.parametrize("fails_at", [0, 1])
    def test_full_disk_leaves_the_folder_as_it_was(self, model, folder, monkeypatch, fails_at):
        before, calls, real = contents(folder), [], safetensors.torch.save_file

        def save_or_fail(tensors, path, metadata):
            calls.append(path)
            if len(calls) > fails_at:
                Path(path).write_bytes(b"half")
                raise OSError(28, "No space left on device")
            real(tensors, path, metadata=metadata)

        monkeypatch.setattr(safetensors.torch, "save_file", save_or_fail)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(folder, max_shard_size=SHARD)
        assert contents(folder) == before

    def test_failed_save_leaves_no_new_folder(self, model, tmp_path, monkeypatch):
        def fail(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_interrupted_moves_do_not_load(self, model, sharded, monkeypatch):
        """Between the first and the last move the folder is refused, not loaded as a mixture."""
        real, calls = os.replace, []

        def replace_twice(source, target):
            calls.append(target)
            if len(calls) > 2:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", replace_twice)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(sharded, max_shard_size=SHARD)
        assert "config.json" in error_of(sharded, FileNotFoundError)

    def test_files_follow_the_umask(self, sharded):
        (sharded / "plain").touch()
        assert len({path.stat().st_mode for path in sharded.iterdir()}) == 1

    def test_a_file_is_no_folder(self, model, tmp_path):
        (tmp_path / "taken").write_text("mine")
        with pytest.raises(NotADirectoryError, match="must be a folder"):
            model.save_pretrained(tmp_path / "taken")
        assert (tmp_path / "taken").read_text() == "mine"


class TestBrokenFolders:
    def test_missing_folder(self, tmp_path):
        assert "must be a folder" in error_of(tmp_path / "nowhere", FileNotFoundError)

    def test_missing_config(self, folder):
        (folder / "config.json").unlink()
        assert "config.json" in error_of(folder, FileNotFoundError)

    @pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff"])
    def test_broken_config(self, folder, text):
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        assert "config.json must be" in error_of(folder)

    def test_missing_weights(self, folder):
        (folder / WEIGHTS_FILE).unlink()
        assert "got neither" in error_of(folder, FileNotFoundError)

    def test_missing_shard(self, sharded):
        (sharded / sorted(os.listdir(sharded))[2]).unlink()
        assert "got no such file" in error_of(sharded, FileNotFoundError)

    @pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
    def test_truncated_weights(self, folder, keep):
        data = (folder / WEIGHTS_FILE).read_bytes()
        size = keep if isinstance(keep, int) else int(keep * len(data))
        (folder / WEIGHTS_FILE).write_bytes(data[:size])
        assert "whole safetensors file" in error_of(folder)

    def test_text_for_weights(self, folder):
        (folder / WEIGHTS_FILE).write_text("not weights " * 100)
        assert "whole safetensors file" in error_of(folder)

    def test_shard_of_another_split(self, sharded):
        first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
        first.write_bytes(second.read_bytes())
        assert "must hold the tensors that" in error_of(sharded)

    @pytest.mark.parametrize("owners", [None, [], {"a": 1}, {"a": "../model.safetensors"}])
    def test_broken_index(self, sharded, owners):
        (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": owners}))
        assert "weight_map of file names" in error_of(sharded)

    def test_wrong_shape(self, folder):
        edit_config(folder, lambda values: values["dit"].update(caption_channels=96))
        message = error_of(folder)
        assert "3 differences" in message  # the projector's two, the caption's one
        assert "projector.weight: must have shape [96, 128], got [128, 128]" in message

    def test_missing_and_unknown_names(self, folder):
        state = load_file(folder / WEIGHTS_FILE)
        state["dit.extra"] = state.pop("projector.bias")
        save_file(state, folder / WEIGHTS_FILE)
        message = error_of(folder)
        assert "2 differences: projector.bias: missing; dit.extra: unknown" in message

    def test_many_differences_are_counted(self, folder):
        save_file({f"unknown.{i}": torch.zeros(1) for i in range(30)}, folder / WEIGHTS_FILE)
        message = error_of(folder)
        assert len(message) < 1200
        assert message.count("missing") == 10
        assert "more" in message

    def test_parameter_twice(self, folder):
        state = load_file(folder / WEIGHTS_FILE)
        state["model.projector.bias"] = state["projector.bias"].clone()
        save_file(state, folder / WEIGHTS_FILE)
        assert "must be there once" in error_of(folder)

    @pytest.mark.parametrize(
        "change",
        [
            lambda v: v["dit"].update(num_layers=10**6),
            lambda v: v["text"].update(hidden_size=10**9),
            lambda v: v["decoder"].update(block_out_channels=[10**9] * 4),
            lambda v: v["decoder"].update(layers_per_block=[10**6] * 4),
            lambda v: v["dit"].update(mlp_ratio=1e11),
            lambda v: v.update(n_query=10**11),
        ],
    )
    def test_senseless_sizes(self, folder, change):
        """Refused before anything of that size is built."""
        edit_config(folder, change)
        error_of(folder)

    def test_integer_dtype(self, folder):
        with pytest.raises(TypeError, match="dtype must be a floating point type"):
            UniLIPModel.from_pretrained(folder, dtype=torch.int8)


class TestConfig:
    def test_json_round_trip(self):
        config = small_config()
        values = json.loads(json.dumps(config.to_dict()))
        assert UniLIPConfig.from_dict(values) == config
        hash(UniLIPConfig.from_dict(values))  # lists became tuples

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.pop("n_query"), "missing keys ['n_query']"),
            (lambda v: v["dit"].pop("norm_eps"), "missing keys ['dit.norm_eps']"),
            (lambda v: v.update(speed=1), "unknown keys ['speed']"),
            (lambda v: v["text"].update(speed=1), "unknown keys ['text.speed']"),
            (lambda v: v.update(model_type="llama"), "model_type must be 'clipflow_unilip'"),
            (lambda v: v.pop("model_type"), "got None"),
            (lambda v: v.update(n_query="16"), "n_query must be int, got str '16'"),
            (lambda v: v.update(n_query=1.5), "n_query must be int, got float"),
            (lambda v: v.update(n_query=True), "n_query must be int, got bool"),
            (lambda v: v.update(vision=3), "vision must be an object"),
            (lambda v: v.update(image_mean=[0.5]), "image_mean must have 3 entries, got 1"),
            (lambda v: v["decoder"].update(block_types="x"), "block_types must be a list"),
            (lambda v: v["decoder"].update(qkv_multiscales=[1]), "[0] must be a list"),
            (lambda v: v.update(n_query=0), "n_query must be above 0"),
            (lambda v: v.update(unilip_factor=math.inf), "unilip_factor must be above 0 and below"),
            (lambda v: v["dit"].update(norm_eps=math.nan), "dit.norm_eps must be above 0"),
            (lambda v: v.update(output_size=10**12), "output_size must be above 0 and below 1e+12"),
            (lambda v: v.update(image_mean=[0.5, math.nan, 0.5]), "image_mean must be finite"),
            (lambda v: v.update(image_std=[0.5, 0.0, 0.5]), "image_std[1] must be above 0"),
            (lambda v: v["vision"].update(image_size=63), "vision.image_size must be a multiple"),
            (lambda v: v["vision"].update(patch_size=0), "vision.patch_size must be above 0"),
            (lambda v: v["text"].update(num_attention_heads=3), "text.hidden_size must be"),
            (lambda v: v["dit"].update(in_channels=3), "dit in and out channels must be 16"),
            (lambda v: v["decoder"].update(layers_per_block=[1]), "must have 4 entries"),
            (lambda v: v["decoder"].update(block_types=["A"] * 4), "got ['A']"),
            (lambda v: v["tokens"].update(pad=64), "below vocab_size 64, got {'pad': 64}"),
        ],
    )
    def test_errors(self, change, message):
        values = json.loads(json.dumps(small_config().to_dict()))
        change(values)
        with pytest.raises(ValueError, match="unilip config: ") as caught:
            UniLIPConfig.from_dict(values)
        assert message in str(caught.value)

    def test_all_problems_in_one_error(self):
        values = small_config().to_dict()
        del values["n_query"]
        values["dit"]["speed"] = values["text"]["speed"] = 1
        with pytest.raises(ValueError, match="unilip config: ") as caught:
            UniLIPConfig.from_dict(values)
        for name in ("n_query", "dit.speed", "text.speed"):
            assert name in str(caught.value)


def test_load_names_is_strict(model):
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    load_names(UniLIPModel(small_config()), state, FORMAT)
    state.pop("model.projector.bias")
    with pytest.raises(ValueError, match=r"1 differences: projector\.bias: missing"):
        load_names(UniLIPModel(small_config()), state, FORMAT)
