"""What `clipflow convert` writes: files and folders of safetensors, whole or not at all."""

import collections
import json
import os
import resource
import struct

import pytest
import torch
from converted import assert_same, names, refused, some_tensors
from safetensors.torch import load_file

from clipflow.errors import InputError
from clipflow.models.folders import conversion
from clipflow.models.folders.conversion import convert_checkpoint


class TestWriting:
    @pytest.fixture
    def source(self, tmp_path):
        torch.save(some_tensors(), tmp_path / "in.pth")
        return tmp_path / "in.pth"

    def test_taken_places(self, source, tmp_path):
        file, folder = tmp_path / "out.safetensors", tmp_path / "out"
        file.write_text("mine")
        folder.mkdir()
        (folder / "notes").write_text("mine")
        (folder / "model-00001-of-00002.safetensors").write_text("old")
        for out in (file, folder):
            with pytest.raises(InputError, match="--force replaces it"):
                convert_checkpoint(source, out)
        assert file.read_text() == "mine" and len(names(folder)) == 2
        for out in (file, folder):
            convert_checkpoint(source, out, force=True)
        assert names(folder) == ["model.safetensors", "notes"]
        assert_same(load_file(file), load_file(folder / "model.safetensors"))

    def test_impossible_places(self, source, tmp_path):
        (tmp_path / "d.safetensors").mkdir()
        (tmp_path / "f").write_text("")
        for name, message in {
            "none/out": "no folder", "d.safetensors": "must be a file, got a folder",
            "f": "must be a folder, got a file", "out.bin": "got .bin",
        }.items():  # fmt: skip
            with pytest.raises(InputError, match=message):
                convert_checkpoint(source, tmp_path / name, force=True)

    @pytest.mark.parametrize("out", ["out.safetensors", "out", "there"])
    def test_a_full_disk_leaves_nothing(self, source, tmp_path, monkeypatch, out):
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "model.safetensors").write_text("old")
        before = names(tmp_path)
        count = 0

        def fails_late(fd):
            nonlocal count
            count += 1
            if count > (1 if out != "out.safetensors" else 0):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fails_late)
        with pytest.raises(InputError, match="cannot be written: No space left"):
            convert_checkpoint(source, tmp_path / out, max_shard_bytes=300, force=True)
        assert names(tmp_path) == before
        assert (tmp_path / "there" / "model.safetensors").read_text() == "old"
        assert names(tmp_path / "there") == ["model.safetensors"]

    @pytest.mark.parametrize("out", ["out.safetensors", "out"])
    def test_a_disk_that_is_full_for_the_library(self, source, tmp_path, out):
        """Which says so in an error of its own."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
        try:
            with pytest.raises(InputError, match=r"cannot be written: .*File too large"):
                convert_checkpoint(source, tmp_path / out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == ["in.pth"]

    @pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**63, 0]])
    def test_shapes_that_no_memory_has(self, tmp_path, shape):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
        path = tmp_path / "in.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
        refused(path, "a must have a shape that fits into memory")

    def test_a_disk_that_is_too_small(self, source, tmp_path, monkeypatch):
        Usage = collections.namedtuple("Usage", "total used free")
        monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: Usage(9, 9, 9))
        refused(source, "and 9 are free on the disk")

    def test_interrupted(self, source, tmp_path, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, tmp_path / "out")
        assert names(tmp_path) == ["in.pth"]

    def test_files_follow_the_umask(self, source, tmp_path):
        convert_checkpoint(source, tmp_path / "out", max_shard_bytes=100)
        (tmp_path / "out" / "plain").touch()
        assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
