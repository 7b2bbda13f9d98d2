"""Random folders of published form: names, bytes, tokenizers, and what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_unilip_keys import reference_shapes, reverse_mapped
from transformers import Qwen2TokenizerFast

from clipflow.errors import InputError
from clipflow.models.unilip.published import VOCABULARY, config_from_published
from clipflow.testing import (
    plan_tensors,
    published_config,
    size_config,
    write_tokenizer,
    write_unilip_folder,
)
from clipflow.testing.__main__ import main
from clipflow.testing.published_config import PUBLISHED_ROWS
from clipflow.testing.random_weights import BLOCK, RandomWeights, scale_of
from clipflow.testing.unilip_folder import published_name

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_unilip_folder(tmp_path_factory.mktemp("folders") / "tiny")


@pytest.fixture(scope="module", params=["slow", "fast"])
def full(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"full_{request.param}")
    write_tokenizer(folder, form=request.param)
    return Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", ["1b", "3b"])
def test_names_and_shapes_are_those_of_the_published_files(size):
    """By plan alone: nothing of the size of the weights is made."""
    reference = reference_shapes(size)
    tensors = plan_tensors(size_config(size, vocab_size=VOCABULARY), torch.bfloat16)
    shapes = {own: shape for own, (shape, _) in tensors.items()}
    assert {published_name(own): shape for own, shape in shapes.items()} == reference
    mapped = {reverse_mapped(name): shape for name, shape in reference.items()}
    found = {published_name(own, "reverse_mapped"): shape for own, shape in shapes.items()}
    assert found == mapped
    assert {dtype for _, dtype in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("size", "tied"), [("tiny", False), ("tiny", True), ("1b", False), ("3b", True)]
)
def test_the_written_config_and_shapes_say_what_the_model_is(size, tied):
    config = size_config(size, tied=tied)
    shapes = {name: shape for name, (shape, _) in plan_tensors(config, torch.float16).items()}
    values = json.loads(json.dumps(published_config(config)))
    assert config_from_published(values, shapes) == config


def test_rows_of_the_embeddings():
    assert size_config("3b").text.vocab_size == PUBLISHED_ROWS == VOCABULARY + 3
    assert size_config("tiny").text.vocab_size == 320


def test_the_folder_has_the_published_files(tiny):
    assert sorted(path.name for path in tiny.iterdir()) == [
        "added_tokens.json", "config.json", "merges.txt", WEIGHTS,
        "special_tokens_map.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    values = json.loads((tiny / "config.json").read_text())
    assert values["model_type"] == "unilip_internvl" and values["image_token_id"] == 303
    assert values["n_query"] == 16 and values["downsample_ratio"] == 0.5
    assert values["torch_dtype"] == "bfloat16" and values["text_config"]["vocab_size"] == 320


def test_the_weights_file_is_what_safetensors_writes(tiny, tmp_path):
    state = load_file(tiny / WEIGHTS)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).read_bytes() == (tiny / WEIGHTS).read_bytes()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_same_seed_same_bytes(tiny, tmp_path):
    again = write_unilip_folder(tmp_path / "again", "tiny", torch.bfloat16, 0)
    assert contents(again) == contents(tiny)
    other = load_file(write_unilip_folder(tmp_path / "other", seed=1) / WEIGHTS)
    same = [name for name, t in load_file(tiny / WEIGHTS).items() if torch.equal(t, other[name])]
    assert not same


def test_weights_have_the_scale_of_their_kind(tiny):
    for name, tensor in load_file(tiny / WEIGHTS).items():
        mean, std = scale_of(name, tuple(tensor.shape))
        values = tensor.double()
        error = 6 * std / values.numel() ** 0.5 + 2e-3 * (abs(mean) + std)
        assert values.isfinite().all() and abs(values.mean() - mean) < error, name
        if values.numel() >= 1000:
            assert values.std().item() == pytest.approx(std, rel=0.1), name


def test_a_tensor_longer_than_the_block_goes_around_its_end():
    weights = RandomWeights(0)
    rows = weights.tensor("a.weight", (3, BLOCK), torch.float16)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    begin = weights.tensor("a.weight", (1, 40), torch.float16)[0].double() * 40**0.5
    torch.testing.assert_close(begin, rows[0, :40].double() * BLOCK**0.5, rtol=2e-2, atol=2e-2)


def test_shards_prefixes_head_and_dtypes(tiny, tmp_path):
    folder = write_unilip_folder(
        tmp_path / "other", max_shard_size="1MB", prefixes="reverse_mapped", tied_head=True,
        decoder_dtype=torch.float32, extra_tensors={"model.gen_vision_tower.a": (2, 3)},
        preprocessor=True,
    )  # fmt: skip
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    state = {name: t for file in files for name, t in load_file(folder / file).items()}
    assert index["weight_map"].keys() == state.keys()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert index["metadata"]["total_size"] == size
    assert state.pop("model.gen_vision_tower.a").shape == (2, 3)
    for name, tensor in load_file(tiny / WEIGHTS).items():
        if name != "lm_head.weight":
            other = state.pop(reverse_mapped(name))
            wide = name.startswith("model.vae_decoder.")
            assert other.dtype == (torch.float32 if wide else torch.bfloat16)
            assert torch.equal(other.bfloat16(), tensor), name  # the same values, whatever the form
    assert not state
    assert json.loads((folder / "config.json").read_text())["text_config"]["tie_word_embeddings"]
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"]["height"] == 448


class TestTokenizer:
    def test_published_ids(self, full):
        ids = full.convert_tokens_to_ids
        assert len(full) == PUBLISHED_ROWS and full.pad_token_id == 151643
        assert ids(["<|im_start|>", "<|im_end|>"]) == [151644, 151645]
        assert ids(["<img>", "</img>", "<IMG_CONTEXT>"]) == [151665, 151666, 151667]
        assert ids(["<quad>", "</box>", "[IMG]", "<image>"]) == [151668, 151673, 151674, 151676]
        assert full.decode([279]) == " w279" and full.decode([151642]) == " w151642"

    @pytest.mark.parametrize(
        "text", ["the rain in Spain  falls", "a\tb\n\nc 1234 w279", "你是书生·万象", "🦊\x00é"]
    )
    def test_every_text_comes_back(self, full, text):
        ids = full(text).input_ids
        assert max(ids) < 279 and full.decode(ids) == text

    def test_special_tokens_in_a_prompt(self, full):
        prompt = "<|im_start|>user\nthe<img><IMG_CONTEXT></img><|im_end|>\n"
        ids = full(prompt).input_ids
        assert ids[0] == 151644 and ids[-5:-1] == [151665, 151667, 151666, 151645]
        assert full.decode(ids) == prompt
        assert full.decode(ids, skip_special_tokens=True) == "user\nthe\n"

    def test_both_forms_agree_in_a_small_vocabulary(self, tmp_path):
        rows = []
        for form in ("slow", "fast"):
            (tmp_path / form).mkdir()
            write_tokenizer(tmp_path / form, image_token_id=303, form=form)
            small = Qwen2TokenizerFast.from_pretrained(tmp_path / form, local_files_only=True)
            assert len(small) == 313 and small.convert_tokens_to_ids("<IMG_CONTEXT>") == 303
            rows.append(small("<|im_start|>it's the other one, 12 times\n <|im_end|>").input_ids)
        assert rows[0] == rows[1] and rows[0][0] == 280 and rows[0][-1] == 281

    def test_refuses(self, tmp_path):
        with pytest.raises(InputError, match="tokenizer must be one of slow, fast, got 'wordy'"):
            write_tokenizer(tmp_path, form="wordy")
        with pytest.raises(InputError, match="must be at least 303, got 300"):
            write_tokenizer(tmp_path, image_token_id=300)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": "7b"}, "size must be one of tiny, 1b, 3b, got '7b'"),
            ({"dtype": torch.int8}, "dtype must be one of torch.float32.*got torch.int8"),
            ({"decoder_dtype": torch.float64}, "got torch.float64"),
            ({"prefixes": "none"}, "prefixes must be one of in_memory, reverse_mapped, got 'none'"),
            ({"tokenizer": "wordy"}, "tokenizer must be one of slow, fast, got 'wordy'"),
        ],
    )
    def test_arguments(self, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            write_unilip_folder(tmp_path / "new", **options)
        assert not list(tmp_path.iterdir())

    def test_a_folder_with_files_is_left_alone(self, tmp_path):
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(InputError, match="new or empty folder, got a folder with files"):
            write_unilip_folder(tmp_path)
        with pytest.raises(InputError, match="new or empty folder, got a file"):
            write_unilip_folder(tmp_path / "mine")
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_an_empty_folder_is_filled(self, tmp_path):
        (tmp_path / "empty").mkdir()
        write_unilip_folder(tmp_path / "empty")
        assert [path.name for path in tmp_path.iterdir()] == ["empty"]
        assert (tmp_path / "empty" / WEIGHTS).is_file()

    def test_a_small_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000_000))
        message = r"size '1b' must have 3\.\d\d GB on the disk, got 3\.00 GB free"
        with pytest.raises(InputError, match=message):
            write_unilip_folder(tmp_path / "new", "1b")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
    def test_an_error_on_the_way_leaves_nothing(self, tmp_path, monkeypatch, kind):
        calls = []

        def fail(self, name, *_):
            calls.append(name)
            if len(calls) > 100:
                raise kind(28, "No space left on device")

        monkeypatch.setattr(RandomWeights, "tensor", fail)
        with pytest.raises(kind):
            write_unilip_folder(tmp_path / "new")
        assert not list(tmp_path.iterdir())


def test_command(tmp_path, capsys):
    assert main([str(tmp_path / "a"), "--size", "tiny", "--dtype", "float32", "--seed", "5"]) == 0
    assert capsys.readouterr().out.endswith("UniLIP tiny, random weights, seed 5\n")
    assert load_file(tmp_path / "a" / WEIGHTS)["lm_head.weight"].dtype == torch.float32
    assert main([str(tmp_path / "a")]) == 2
    assert "must be a new or empty folder" in capsys.readouterr().err
