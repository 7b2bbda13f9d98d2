"""`clipflow convert`: any file of plain tensors comes out the same; any other is refused, unrun."""

import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from converted import assert_same, names, refused, some_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clipflow
from clipflow.cli.convert import size
from clipflow.cli.main import main
from clipflow.errors import InputError
from clipflow.models.folders import conversion
from clipflow.models.folders.conversion import convert_checkpoint, open_checkpoint
from clipflow.models.folders.pickle_files import read_pickle
from clipflow.sampling import memory


class TestWhatComesOut:
    @pytest.mark.parametrize("new_format", [True, False])
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
    def test_equal_tensors(self, tmp_path, suffix, new_format):
        state = some_tensors()
        path = tmp_path / f"in{suffix}"
        torch.save(state, path, _use_new_zipfile_serialization=new_format)
        convert_checkpoint(path, tmp_path / "out.safetensors")
        assert_same(load_file(tmp_path / "out.safetensors"), state)
        assert names(tmp_path) == [f"in{suffix}", "out.safetensors"]

    def test_state_dict_of_a_module(self, tmp_path):
        """Its OrderedDict has `_metadata`, its values may be parameters."""
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        torch.save(module.state_dict(keep_vars=True), tmp_path / "in.pth")
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors")
        assert_same(load_file(tmp_path / "out.safetensors"), module.state_dict())

    def test_ties_and_views_are_written_once_each(self, tmp_path):
        table = torch.randn(8, 4)
        state = {"embed": table, "head": table, "row": table[3], "turned": table.T}
        torch.save(state, tmp_path / "in.pth")
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors")
        found = load_file(tmp_path / "out.safetensors")
        assert_same(found, state)
        found["embed"].zero_()
        assert torch.equal(found["head"], table)

    @pytest.mark.parametrize("max_bytes", [1, 100, 500, 10**9])
    def test_shards(self, tmp_path, max_bytes):
        state = some_tensors()
        torch.save(state, tmp_path / "in.pth")
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out", max_shard_bytes=max_bytes)
        files = [name for name in names(tmp_path / "out") if name.endswith(".safetensors")]
        found = {}
        for file in files:
            part = load_file(tmp_path / "out" / file)
            assert sum(t.nbytes for t in part.values()) <= max_bytes or len(part) == 1
            found |= part
        assert_same(found, state)
        if max_bytes == 10**9:
            assert names(tmp_path / "out") == ["model.safetensors"]
        else:
            index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
            assert sorted(set(index["weight_map"].values())) == files
            assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
        again = tmp_path / "again.safetensors"
        convert_checkpoint(tmp_path / "out", again)
        assert_same(load_file(again), state)

    def test_the_file_is_as_the_library_writes_it(self, tmp_path):
        state = {k: v.contiguous() for k, v in some_tensors().items()}
        torch.save(state, tmp_path / "in.pth")
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "ours.safetensors")
        save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in ("ours", "theirs")]
        assert sizes[0] == sizes[1]
        with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtype(self, tmp_path, dtype):
        state = some_tensors() | {"infinite": torch.tensor([1.0, float("inf"), float("nan")])}
        torch.save(state, tmp_path / "in.pth")
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors", dtype=dtype)
        found = load_file(tmp_path / "out.safetensors")
        assert found.pop("infinite").isfinite().tolist() == [True, False, False]
        del state["infinite"]
        wanted = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        assert_same(found, wanted)

    def test_a_value_too_large_for_the_dtype(self, tmp_path):
        torch.save({"a": torch.ones(3), "b": torch.tensor([1.0, 7e4])}, tmp_path / "in.pth")
        refused(tmp_path / "in.pth", "b: values must fit into torch.float16", dtype=torch.float16)

    def test_files_are_opened_anew_to_let_their_pages_go(self, tmp_path, monkeypatch):
        monkeypatch.setattr(conversion, "MAPPED_BYTES", 100)
        for new_format in (True, False):
            torch.save(
                state := some_tensors(),
                tmp_path / "in.pth",
                _use_new_zipfile_serialization=new_format,
            )
            convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors", force=True)
            assert_same(load_file(tmp_path / "out.safetensors"), state)


class TestWrappers:
    @pytest.mark.parametrize("key", ["state_dict", "model", "ema"])
    def test_one_level(self, tmp_path, key, capsys):
        state = {"a": torch.ones(2)}
        torch.save({key: state, "epoch": 3, "best": 0.5, "log": [1, 2]}, tmp_path / "in.pth")
        call = ["convert", str(tmp_path / "in.pth"), "-o", str(tmp_path / "out.safetensors")]
        assert main(call) == 0
        assert f"1 tensors  taken from '{key}'" in capsys.readouterr().out
        assert_same(load_file(tmp_path / "out.safetensors"), state)

    def test_several(self, tmp_path):
        both = {"model": {"a": torch.ones(2)}, "ema": {"a": torch.zeros(2)}}
        torch.save(both, tmp_path / "in.pth")
        refused(tmp_path / "in.pth", "(see --key), got ['model', 'ema']")
        assert torch.equal(read_pickle(tmp_path / "in.pth", key="ema").tensors["a"], torch.zeros(2))
        refused(tmp_path / "in.pth", "'none' must hold tensors by name", key="none")

    def test_no_further_levels(self, tmp_path):
        torch.save({"model": {"net": {"a": torch.ones(2)}}}, tmp_path / "in.pth")
        refused(tmp_path / "in.pth", "net: a mapping of 1")


class Runs:
    """Pickles to a call that makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def zip_with(path: Path, pickled: bytes, *, compress: bool = False, twice: bool = False) -> None:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("archive/data.pkl", pickled)
        if twice:
            archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


class Subclass(torch.Tensor):
    pass


ODD_VALUES = {
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a sparse tensor ": lambda: torch.eye(3).to_sparse_csr(),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "a tensor of a subclass": lambda: torch.ones(3).as_subclass(Subclass),
    "a complex tensor": lambda: torch.ones(3, dtype=torch.complex64),
    "a tensor without data": lambda: torch.ones(3, device="meta"),
    "a: a value of type int": lambda: 3,
    "a: a value of type list": lambda: [torch.ones(3)],
    "numpy": lambda: np.ones(3),
    "pathlib": lambda: Path("x"),
    "_codecs.encode": lambda: b"bytes \xff",
    "__builtin__.set": lambda: {1, 2},
}


@pytest.mark.filterwarnings("ignore")
class TestRefusals:
    @pytest.mark.parametrize("what", ODD_VALUES)
    @pytest.mark.parametrize("new_format", [True, False])
    def test_other_values(self, tmp_path, what, new_format):
        state = {"a": ODD_VALUES[what](), "b": torch.ones(2)}
        try:
            torch.save(state, tmp_path / "in.pth", _use_new_zipfile_serialization=new_format)
        except (RuntimeError, NotImplementedError):
            pytest.skip("torch.save writes no such tensor in this format")
        refused(tmp_path / "in.pth", what.strip())

    def test_quantized(self, tmp_path):
        with torch.no_grad():
            quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        torch.save({"a": quantized}, tmp_path / "in.pth")
        refused(tmp_path / "in.pth", "a quantized tensor")

    @pytest.mark.parametrize("value", [torch.ones(3), [torch.ones(3)], 7, {}, None])
    def test_no_mapping(self, tmp_path, value):
        torch.save(value, tmp_path / "in.pth")
        refused(tmp_path / "in.pth", "must hold plain tensors by name")

    @pytest.mark.parametrize("name", [1, "", "__metadata__", "a\nb", ("a",)])
    def test_other_names(self, tmp_path, name):
        torch.save({name: torch.ones(3)}, tmp_path / "in.pth")
        refused(tmp_path / "in.pth", "got the name")

    def test_a_module(self, tmp_path):
        torch.save(torch.nn.Linear(2, 2), tmp_path / "in.pth")
        refused(tmp_path / "in.pth", "torch.nn.modules.linear.Linear")

    @pytest.mark.parametrize("protocol", range(6))
    def test_nothing_is_run(self, tmp_path, protocol):
        (tmp_path / "work").mkdir()
        marker = tmp_path / "marker"
        evil = {"a": Runs(marker), "b": torch.ones(2)}
        pickled = pickle.dumps({"a": Runs(marker)}, protocol=protocol)
        files = {name: tmp_path / "work" / f"{name}.pth" for name in ("new", "old", "zip", "raw")}
        torch.save(evil, files["new"], pickle_protocol=max(protocol, 1))
        torch.save(
            evil,
            files["old"],
            pickle_protocol=max(protocol, 1),
            _use_new_zipfile_serialization=False,
        )
        zip_with(files["zip"], pickled)
        files["raw"].write_bytes(pickled)
        for kind, path in files.items():
            text = refused(path, "")
            if kind in ("new", "zip") or (kind == "old" and protocol in (2, 3)):
                assert f"{os.mkdir.__module__}.mkdir" in text
            else:
                assert "must be a file that torch.save wrote" in text
            safe = path.with_suffix(".safetensors")
            path.rename(safe)
            refused(safe, "must be a whole safetensors file")
        assert not marker.exists()

    @pytest.mark.parametrize("call", ["bytearray", "bytearray\n(I1000000000000\ntR", "set"])
    def test_calls_that_pytorch_allows(self, tmp_path, call):
        zip_with(tmp_path / "in.pth", f"(dS'a'\nc__builtin__\n{call}\n".encode() + b"s.")
        refused(tmp_path / "in.pth", "__builtin__." + call.split("\n")[0])

    def test_a_zip_bomb(self, tmp_path):
        zip_with(tmp_path / "in.pth", b"\x80\x02" + b"0" * 50_000_000, compress=True)
        assert (tmp_path / "in.pth").stat().st_size < 100_000
        refused(tmp_path / "in.pth", "must be stored as they are, got compressed archive/data.pkl")

    def test_a_pickle_without_end(self, tmp_path):
        zip_with(tmp_path / "in.pth", b"\x80\x02" + b"N0" * 10_000_000 + b".")
        refused(tmp_path / "in.pth", "pickle of over 16 MiB")

    def test_twice_in_an_archive(self, tmp_path):
        zip_with(tmp_path / "in.pth", pickle.dumps({}, protocol=2), twice=True)
        refused(tmp_path / "in.pth", "must be there once")

    def test_repeated_values_do_not_fill_the_disk(self, tmp_path):
        """A tensor of a terabyte in a kilobyte: every element is the same."""
        torch.save({"a": torch.ones(1).expand(2**19, 2**19)}, tmp_path / "in.pth")
        refused(tmp_path / "in.pth", "of more values than the file has")
        shared = torch.randn(1000)
        torch.save({f"{i}": shared for i in range(1000)}, tmp_path / "in.pth")
        refused(tmp_path / "in.pth", "bytes of tensors that share a file of")

    def test_declared_sizes_of_the_old_format(self, tmp_path):
        torch.save(
            {"a": torch.ones(1234)}, tmp_path / "in.pth", _use_new_zipfile_serialization=False
        )
        data = (tmp_path / "in.pth").read_bytes()
        assert data.count(struct.pack("<BH", ord("M"), 1234)) >= 2
        number = struct.pack("<BH", ord("M"), 1234), b"\x8a\x06" + (2**40).to_bytes(6, "little")
        (tmp_path / "in.pth").write_bytes(data.replace(*number))
        refused(tmp_path / "in.pth", "must hold what it declares, got 1099511627776 values")

    @pytest.mark.parametrize("new_format", [True, False])
    def test_truncated_and_damaged(self, tmp_path, new_format):
        path = tmp_path / "in.pth"
        torch.save(some_tensors(), path, _use_new_zipfile_serialization=new_format)
        data = path.read_bytes()
        for keep in (0, 1, 3, 10, 100, len(data) // 2, len(data) - 100, len(data) - 1):
            path.write_bytes(data[:keep])
            refused(path, "must")
        generator = np.random.default_rng(0)
        for _ in range(60):
            broken = bytearray(data)
            for place in generator.integers(0, len(data), 8):
                broken[place] = generator.integers(0, 256)
            path.write_bytes(broken)
            try:
                convert_checkpoint(path, tmp_path / "out.safetensors", force=True)
            except (InputError, memory.NotEnoughMemory) as error:
                assert "\n" not in str(error)

    def test_other_files(self, tmp_path):
        path = tmp_path / "in.pth"
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
        refused(path, "the tar format")
        path.write_text("words")
        refused(path, "something else")
        save_file({"a": torch.ones(2)}, path)
        refused(path, "call it .safetensors")
        path.unlink()
        refused(path, "no such file")
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
        refused(path, "TorchScript")
        path.unlink()
        os.mkfifo(path)
        refused(path, "no such file")

    def test_memory_for_the_old_format(self, tmp_path, monkeypatch):
        torch.save({"a": torch.ones(99)}, tmp_path / "in.pth", _use_new_zipfile_serialization=False)
        monkeypatch.setattr(memory, "available_bytes", lambda device: 100)
        with pytest.raises(memory.NotEnoughMemory, match=r"reading in\.pth needs"):
            read_pickle(tmp_path / "in.pth")


class TestShardedPickles:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        for k in (1, 2, 3):
            file = folder / f"pytorch_model-{k:05d}-of-00003.bin"
            torch.save({f"layer.{k}": torch.full((k,), float(k))}, file)
        (folder / "config.json").write_text('{"model_type": "mine"}')
        (folder / "vocab.json").write_text("{}")
        return folder

    def index(self, folder, change=lambda owners: None):
        owners = {f"layer.{k}": f"pytorch_model-{k:05d}-of-00003.bin" for k in (1, 2, 3)}
        change(owners)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": owners}))

    def test_to_a_folder(self, folder, tmp_path):
        for with_index in (False, True):
            if with_index:
                self.index(folder)
            out = tmp_path / f"out{with_index}"
            convert_checkpoint(folder, out)
            assert names(out) == ["config.json", "model.safetensors", "vocab.json"]
            found = load_file(out / "model.safetensors")
            assert {name: len(tensor) for name, tensor in found.items()} == {
                f"layer.{k}": k for k in (1, 2, 3)
            }

    def test_in_place(self, folder):
        convert_checkpoint(folder, folder, force=True)
        assert "model.safetensors" in names(folder) and "vocab.json" in names(folder)
        assert json.loads((folder / "config.json").read_text()) == {"model_type": "mine"}

    def test_a_single_file(self, folder, tmp_path):
        torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
        assert list(open_checkpoint(folder).specs) == ["a"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda owners: owners.pop("layer.2"), "all"),
            (lambda owners: owners.update(more="pytorch_model-00001-of-00003.bin"), "more"),
            (lambda owners: owners.update({"layer.1": owners["layer.2"]}), "layer.1"),
            (lambda owners: owners.update({"layer.1": "none.bin"}), "no such file"),
            (lambda owners: owners.update({"layer.1": "../x.bin"}), "weight_map of file names"),
            (lambda owners: owners.update({"layer.1": 3}), "weight_map of file names"),
            (lambda owners: owners.clear(), "weight_map of file names"),
        ],
    )
    def test_broken_indices(self, folder, change, message):
        self.index(folder, change)
        if message == "all":  # a shard that no tensor is said to be in is not read
            assert sorted(open_checkpoint(folder).specs) == ["layer.1", "layer.3"]
        else:
            refused(folder, message)

    def test_missing_shard_and_nothing(self, folder):
        (folder / "pytorch_model-00002-of-00003.bin").unlink()
        refused(folder, "must hold all 3 shards")
        for path in folder.glob("*.bin"):
            path.unlink()
        refused(folder, "got none of them")

    def test_the_same_name_twice(self, folder):
        torch.save({"layer.1": torch.ones(1)}, folder / "pytorch_model-00003-of-00003.bin")
        refused(folder, "must be in one file, got layer.1 in two")


def test_nothing_else_unpickles():
    """PyTorch's unpickler is called in one place, and Python's own nowhere."""
    package = Path(clipflow.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert "torch.load(" not in text or path.name == "pickle_files.py", path
        assert not re.search(r"\bpickle\.(loads?|Unpickler)\b|trust_remote_code=True", text), path


@pytest.mark.parametrize(
    ("text", "found"),
    [("2GB", 2 * 10**9), ("1.5 mb", 1_500_000), ("7", 7), ("7B", 7), ("3KB", 3000)],
)
def test_sizes(text, found):
    assert size(text) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-shard-size", "0"], "must be a size"),
        (["--max-shard-size", "2 parsecs"], "must be a size"),
        (["--max-shard-size", "2GB"], "goes with a folder"),
        (["--base", "x"], "--base goes with --from"),
        (["--from", "llama"], "invalid choice"),
        (["--dtype", "int8"], "invalid choice"),
        ([], "no such file"),
    ],
)
def test_usage(tmp_path, capsys, options, message):
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "in.pth"), "-o", str(out), *options]) == 2
    assert message in capsys.readouterr().err and not out.exists()
