"""Folders of the published form that are broken in hundreds of ways: one clear error for each.

No other exception gets out, nothing in the folder is executed, and no memory is taken for sizes
that a file only claims.
"""

import resource
import sys
import warnings
from pathlib import Path

import config_mutations
import folder_mutations as break_by
import pytest
import torch

from clipflow import CLIPFlowPipeline
from clipflow.errors import InputError
from clipflow.testing import write_unilip_folder

MOST_MEMORY = 150 * 2**20
SPARE, MARKER = "outside.safetensors", "executed"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Good folders, in one file and in several, beside a spare shard and a marker's place."""
    root = tmp_path_factory.mktemp("broken")
    write_unilip_folder(root / "good", preprocessor=True)
    write_unilip_folder(root / "shards", max_shard_size="500KB")
    first = sorted((root / "shards").glob("model-*.safetensors"))[0]
    (root / SPARE).write_bytes(first.read_bytes())
    CLIPFlowPipeline.from_pretrained(root / "good")  # imports all that loading needs
    return root


def peak() -> int:
    """Bytes that the process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_refused(folder: break_by.Folder, mutation: break_by.Mutation, dtype) -> None:
    mutation(folder)
    before = peak()
    with warnings.catch_warnings(), pytest.raises(InputError) as caught:
        warnings.simplefilter("error")
        CLIPFlowPipeline.from_pretrained(folder.path, dtype=dtype)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 2500, text
    assert peak() - before < MOST_MEMORY


ONE_FILE = {
    f"{table.__name__}: {name}": mutation
    for table in (
        break_by.truncations,
        break_by.header_lengths,
        break_by.header_texts,
        break_by.entries,
        break_by.names,
        break_by.values,
        config_mutations.configs,
        config_mutations.tokenizers,
        break_by.others,
    )
    for name, mutation in table().items()
}


@pytest.mark.parametrize("name", ONE_FILE)
def test_one_file(place, tmp_path, name):
    dtype = "auto" if len(name) % 2 else torch.float32  # mapped, or converted
    check_refused(break_by.Folder(tmp_path / "model", place / "good"), ONE_FILE[name], dtype)


@pytest.mark.parametrize("name", break_by.files(Path()))
def test_files(place, tmp_path, name):
    marker = tmp_path / MARKER
    mutation = break_by.files(marker)[name]
    check_refused(break_by.Folder(tmp_path / "model", place / "good"), mutation, "auto")
    assert not marker.exists()


@pytest.mark.parametrize("name", break_by.indexes(Path()))
def test_several_files(place, tmp_path, name):
    mutation = break_by.indexes(place / SPARE)[name]
    check_refused(break_by.Folder(tmp_path / "model", place / "shards"), mutation, torch.float32)


@pytest.mark.parametrize("name", break_by.harmless())
def test_what_changes_nothing(place, tmp_path, name):
    folder = break_by.Folder(tmp_path / "model", place / "good")
    break_by.harmless()[name](folder)
    found = CLIPFlowPipeline.from_pretrained(folder.path, dtype="auto").model.state_dict()
    good = CLIPFlowPipeline.from_pretrained(place / "good", dtype="auto").model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in good.items())


def test_there_are_many(place, tmp_path):
    """And what they are made of loads."""
    assert len(ONE_FILE) + len(break_by.files(Path())) + len(break_by.indexes(Path())) > 350
    for good in ("good", "shards"):
        whole = break_by.Folder(tmp_path / good, place / good)
        assert CLIPFlowPipeline.from_pretrained(whole.path, dtype="auto").dtype == torch.bfloat16
