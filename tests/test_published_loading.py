"""Published folders of any size: architecture from shapes, dtypes, tokenizers, what is skipped."""

import argparse
import dataclasses
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, Qwen2Tokenizer

from benchmarks import loading as benchmark
from clipflow import CLIPFlowPipeline
from clipflow.cli.arguments import add_model_options, load_pipeline
from clipflow.cli.main import main
from clipflow.errors import InputError
from clipflow.models.folders import safetensors_files
from clipflow.models.folders.checkpoint import open_weights
from clipflow.models.folders.safetensors_files import SafetensorsFile
from clipflow.models.unilip import UniLIPModel
from clipflow.models.unilip.keys import map_names, skipped_names
from clipflow.models.unilip.published import config_from_published
from clipflow.pipelines.families.unilip import FAMILY as UNILIP
from clipflow.pipelines.loading import load_model, load_tokenizer, summarize_folder
from clipflow.pipelines.tokenizer_files import read_tokenizer
from clipflow.testing import write_unilip_folder
from clipflow.testing.published_config import published_config, size_config
from clipflow.testing.tokenizer_files import write_tokenizer
from clipflow.testing.unilip_folder import plan_tensors

TINY = size_config("tiny")
EXTRA = {
    "model.gen_vision_tower.a.weight": (3, 4),
    "model.gen_vision_tower.b": (2,),
    "model.dcae.encoder.conv_in.weight": (2, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny, bfloat16, with tensors that the model has no use for."""
    return write_unilip_folder(tmp_path_factory.mktemp("folder") / "tiny", extra_tensors=EXTRA)


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (shape, _) in plan_tensors(config, torch.bfloat16).items()}


def vary(config, part: str, **changes):
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **changes)}
    )


class TestArchitecture:
    @pytest.mark.parametrize(
        "config",
        [
            TINY,
            size_config("tiny", tied=True, vocab_size=400),
            vary(TINY, "vision", patch_size=16, num_hidden_layers=3, intermediate_size=96),
            vary(TINY, "vision", shuffle=4),
            vary(TINY, "text", num_attention_heads=8, num_key_value_heads=4),
            vary(TINY, "text", hidden_size=96, rope_theta=5e5, rms_norm_eps=1e-5),
            vary(TINY, "dit", num_layers=5, caption_channels=40, mlp_ratio=3.0),
            vary(TINY, "decoder", layers_per_block=(1, 2, 1, 3, 1, 2)),
            vary(TINY, "decoder", qkv_multiscales=((), (), (), (3, 5), (5,), (3,))),
            vary(TINY, "decoder", block_out_channels=(32, 64, 64, 96, 96, 128)),
            dataclasses.replace(TINY, n_query=5, connect_layer=3, unilip_factor=2.5),
        ],
        ids=range(11),
    )
    def test_is_read_from_the_shapes(self, config):
        side = config.latent_side
        config = vary(config, "dit", sample_size=side)
        config = dataclasses.replace(config, output_size=config.vision.image_size)
        assert config_from_published(published_config(config), shapes_of(config)) == config

    @pytest.mark.parametrize(
        ("switch", "table", "scale"), [(None, True, 1.0), (2, True, 2.0), (0, False, 1.0)]
    )
    def test_position_table_is_on_unless_switched(self, switch, table, scale):
        values = published_config(TINY) | {"dit_interpolation_scale": switch}
        dit = config_from_published(values, shapes_of(TINY)).dit
        assert (dit.position_table, dit.interpolation_scale) == (table, scale)

    @pytest.mark.parametrize(
        "text",
        [
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}},
            {"rope_scaling": None, "layer_types": ["full_attention"] * 4},
            {"moe_config": None, "use_moe": False, "_attn_implementation_autoset": True},
        ],
    )
    def test_what_changes_nothing_is_accepted(self, text):
        values = published_config(TINY)
        values["text_config"] |= text
        notes = {"mm_anything": 1, "tune_it": True, "some_path": "/x", "a_lr": 1e-5, "dtype": "x"}
        assert config_from_published(values | notes, shapes_of(TINY)) == TINY

    def test_heads_that_config_does_not_say_are_those_of_the_width(self):
        values = published_config(TINY)
        for part in ("vision_config", "text_config"):
            del values[part]["num_attention_heads"]
        assert config_from_published(values, shapes_of(TINY)) == TINY
        wide = vary(TINY, "vision", hidden_size=96)
        del values["vision_config"]["hidden_size"]
        with pytest.raises(ValueError, match=r"vision_config\.num_attention_heads"):
            config_from_published(values, shapes_of(wide))

    def test_every_field_that_transformers_writes_is_known(self):
        wanted = published_config(TINY)
        stock = InternVLConfig().to_dict()
        for part in ("text_config", "vision_config"):
            stock[part] = {**stock[part], **wanted[part]}
            stock[part].pop("layer_types", None)  # of another number of layers
        assert config_from_published(stock | wanted, shapes_of(TINY)) == TINY

    def test_unknown_fields_are_named(self):
        values = published_config(TINY) | {"speed": 1, "zoom": 2}
        with pytest.raises(ValueError, match=r"got speed and 1 more \(remove what does not change"):
            config_from_published(values, shapes_of(TINY))


class TestKeys:
    def test_skipped_are_counted(self):
        names = [*EXTRA, "model.vae_decoder.decoder.conv_in.bias", "model.dcae.decoder.a"]
        names.append("model.language_model.rotary_emb.inv_freq")
        assert list(map_names(names)) == ["vae_decoder.decoder.conv_in.bias"]
        assert skipped_names(names) == {
            "gen_vision_tower": 2,
            "dcae.encoder": 1,
            "dcae.decoder": 1,
            "rotary_emb.inv_freq": 1,
        }

    def test_first_stage_is_refused(self):
        with pytest.raises(ValueError, match=r"must hold the pixel decoder \(vae_decoder\)"):
            map_names(["model.dcae.decoder.a", "model.projector.bias"])

    def test_info_names_them(self, folder, capsys):
        assert main(["info", str(folder)]) == 0
        out = capsys.readouterr().out
        assert "  skipped: dcae.encoder (1 tensors), gen_vision_tower (2 tensors)\n" in out
        assert main(["info", str(folder), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["skipped"] == {"dcae.encoder": 1, "gen_vision_tower": 2}
        assert set(map(tuple, facts["dtypes"].values())) == {("bfloat16",)}
        assert facts["total"] == sum(p.numel() for p in load_model(folder).parameters())

    def test_skipped_may_be_of_any_dtype(self, folder, tmp_path):
        state = load_file(folder / "model.safetensors")
        state["model.vision_tower.embeddings.position_ids"] = torch.arange(1025)[None]
        state["model.gen_vision_tower.b"] = torch.ones(2).to(torch.float8_e4m3fn)
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        load_model(tmp_path)
        assert "vision_tower.embeddings.position_ids" in summarize_folder(tmp_path).skipped

    def test_info_refuses_what_does_not_load(self, folder, tmp_path, capsys):
        state = load_file(folder / "model.safetensors")
        state["model.more"] = state.pop("model.projector.bias")
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        assert main(["info", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "got 2 differences: projector.bias: missing; more: unknown" in error


class TestDtypes:
    def test_auto_is_as_stored(self, folder):
        stored = load_file(folder / "model.safetensors")
        for dtype in ("auto", None):
            pipe = CLIPFlowPipeline.from_pretrained(folder, dtype=dtype)
            assert pipe.dtype == torch.bfloat16
            for name, tensor in pipe.model.state_dict().items():
                found = stored[name if name.startswith("lm_head") else f"model.{name}"]
                wide = name.startswith("vae_decoder.")
                assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
                assert torch.equal(tensor, found.to(tensor.dtype)), name

    def test_auto_of_mixed_parts_holds_all(self, folder, tmp_path):
        state = load_file(folder / "model.safetensors")
        state = {n: t.half() if ".dit." in n else t for n, t in state.items()}
        save_file(state, tmp_path / "model.safetensors")
        for file in folder.iterdir():
            if not file.name.endswith(".safetensors"):
                (tmp_path / file.name).write_bytes(file.read_bytes())
        assert summarize_folder(tmp_path).dtype == torch.float32
        pipe = CLIPFlowPipeline.from_pretrained(tmp_path, dtype="auto")
        assert {p.dtype for p in pipe.model.parameters()} == {torch.float32}

    def test_decoder_is_float32_always(self, folder):
        model = load_model(folder, dtype=torch.float16)
        assert model.vae_decoder.decoder.conv_in.weight.dtype == torch.float32
        assert model.latent_queries.dtype == torch.float16

    def test_default_is_float32(self, folder):
        pipe = CLIPFlowPipeline.from_pretrained(folder)
        assert {p.dtype for p in pipe.model.parameters()} == {torch.float32}

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "float32", 5])
    def test_others_are_refused(self, folder, dtype):
        with pytest.raises(InputError, match=r"dtype must be a floating point torch\.dtype"):
            CLIPFlowPipeline.from_pretrained(folder, dtype=dtype)

    def test_command_line(self, folder):
        parser = argparse.ArgumentParser()
        add_model_options(parser)
        args = parser.parse_args(["--model", str(folder), "--dtype", "auto", "--device", "cpu"])
        assert load_pipeline(args).dtype == torch.bfloat16

    def test_too_large_for_the_dtype(self, folder, tmp_path):
        state = load_file(folder / "model.safetensors")
        state["model.projector.bias"][3] = 1e6
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        load_model(tmp_path)
        with pytest.raises(InputError, match=r"NaN or infinity in model\.projector\.bias$"):
            load_model(tmp_path, dtype=torch.float16)


class TestWeightFiles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_extremes_tell_what_is_not_finite(self, dtype, value):
        """What the loader relies on, wherever the value stands."""
        for length in (1, 7, 64, 1000):
            for place in {0, length // 2, length - 1}:
                weights = torch.linspace(-1, 1, length).to(dtype)
                assert torch.stack(torch.aminmax(weights)).isfinite().all()
                weights[place] = value
                assert not torch.stack(torch.aminmax(weights)).isfinite().all()

    def test_odd_places(self, tmp_path):
        """A tensor that begins at no multiple of its item size."""
        first, second = torch.randn(3).bfloat16(), torch.randn(5)
        header = {
            "a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
            "b": {"dtype": "F32", "shape": [5], "data_offsets": [6, 26]},
        }
        text = json.dumps(header).encode()
        data = first.view(torch.uint8).numpy().tobytes() + second.numpy().tobytes()
        (tmp_path / "odd").write_bytes(struct.pack("<Q", len(text)) + text + data)
        file = SafetensorsFile(tmp_path / "odd")
        for read in (file.mapped, file.passing):
            assert torch.equal(read("a"), first) and torch.equal(read("b"), second)
            assert read("b").data_ptr() % 4 == 0

    def test_files_are_opened_anew_for_what_is_converted(self, tmp_path, monkeypatch):
        monkeypatch.setattr("clipflow.models.folders.safetensors_files.MAPPED_BYTES", 1000)
        state = {f"{i}": torch.randn(70, i) for i in range(1, 9)}
        save_file(state, tmp_path / "model.safetensors")
        weights, opened = open_weights(tmp_path), []
        real = safetensors_files.safe_open
        monkeypatch.setattr(
            safetensors_files, "safe_open", lambda *a, **k: opened.append(a) or real(*a, **k)
        )
        for name, tensor in state.items():
            assert torch.equal(weights.read(name, torch.bfloat16), tensor.bfloat16())
            assert torch.equal(weights.read(name), tensor)
        assert 5 <= len(opened) <= 8

    def test_mapped_weights_are_private(self, tmp_path):
        save_file({"a": torch.ones(5000)}, tmp_path / "a")
        before = (tmp_path / "a").read_bytes()
        SafetensorsFile(tmp_path / "a").mapped("a").zero_()
        assert (tmp_path / "a").read_bytes() == before


class TestTokenizers:
    TEXT = (
        "<|im_start|>user\nit's a thé, 2024 <img><IMG_CONTEXT></img> <image>\r\n [IMG]<tool_call>"
    )

    def test_slow_fast_and_transformers_agree(self, tmp_path):
        ids = []
        for form in ("slow", "fast"):
            (tmp_path / form).mkdir()
            write_tokenizer(tmp_path / form, image_token_id=303, form=form)
            tokenizer = load_tokenizer(tmp_path / form, UNILIP, TINY)
            ids.append(tokenizer(self.TEXT)["input_ids"])
            assert tokenizer.decode(ids[-1]) == self.TEXT
        stock = Qwen2Tokenizer.from_pretrained(tmp_path / "slow", local_files_only=True)
        assert ids[0] == ids[1] == stock(self.TEXT)["input_ids"]
        shown = stock.decode(ids[0], skip_special_tokens=True)
        slow = read_tokenizer(tmp_path / "slow")
        assert slow.decode(ids[0], skip_special_tokens=True) == shown

    def test_old_files_alone(self, tmp_path):
        """added_tokens.json without flags, ids with gaps."""
        write_tokenizer(tmp_path, image_token_id=303)
        added = json.loads((tmp_path / "added_tokens.json").read_text())
        (tmp_path / "added_tokens.json").write_text(json.dumps(added | {"[IMG]": 317}))
        (tmp_path / "tokenizer_config.json").unlink()
        tokenizer = load_tokenizer(tmp_path, UNILIP, TINY)
        assert tokenizer("[IMG]<img>")["input_ids"] == [317, 301]
        tokenizer.save_pretrained(tmp_path / "saved")
        again = load_tokenizer(tmp_path / "saved", UNILIP, TINY)
        assert again(self.TEXT)["input_ids"] == tokenizer(self.TEXT)["input_ids"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"img_start": 300}, r"must have <img> as the token 300, .* got 301"),
            ({"im_end": 7}, r"must have <\|im_end\|> as the token 7, .* got 281"),
        ],
    )
    def test_must_be_the_models(self, tmp_path, change, message):
        write_tokenizer(tmp_path, image_token_id=303)
        tokens = dataclasses.replace(TINY.tokens, **change)
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path, UNILIP, dataclasses.replace(TINY, tokens=tokens))

    def test_must_fit_into_the_vocabulary(self, tmp_path):
        write_tokenizer(tmp_path, image_token_id=303)
        with pytest.raises(InputError, match=r"below the model's vocabulary of 305, got 312"):
            load_tokenizer(tmp_path, UNILIP, vary(TINY, "text", vocab_size=305))


def test_published_models_keep_their_sizes():
    """True widths without memory: what the loader builds holds every planned tensor."""
    config = size_config("1b")
    with torch.device("meta"):
        model = UniLIPModel(config_from_published(published_config(config), shapes_of(config)))
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == shapes_of(config)


def test_benchmark_compares_paired_runs(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    runs = {
        "plain": {"seconds": 2.0, "peak": 200.0, "final": 100.0},
        "auto": {"seconds": 1.0, "peak": 110.0, "final": 105.0},
        "float32": {"seconds": 3.0, "peak": 260.0, "final": 200.0},
    }
    monkeypatch.setattr(benchmark, "run", lambda what, folder: runs[what])
    result = benchmark.measure(tmp_path, rounds=2)
    assert [row["value"] for row in result["rows"]] == [0.5, 1.1, 1.3]
    assert [row["met"] for row in result["rows"]] == [True, True, False]
    assert result["time_ratio_float32"] == 1.5
