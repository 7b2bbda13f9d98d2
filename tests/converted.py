"""What tests of `clipflow convert` begin with, and what they hold its results to."""

from pathlib import Path

import pytest
import torch

from clipflow.errors import InputError
from clipflow.models.folders.conversion import convert_checkpoint

KINDS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def some_tensors() -> dict[str, torch.Tensor]:
    state = {f"kind.{k}": (torch.randn(3, 5) * 9).to(kind) for k, kind in enumerate(KINDS)}
    state["scalar"] = torch.tensor(2.5)
    state["empty"] = torch.empty(0, 4)
    state["transposed"] = torch.randn(6, 4).T
    state["part"] = torch.randn(10, 10)[2:5, ::2]
    state["ünïcode 名"] = torch.ones(1)
    return state


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(path: Path, message: str, **options) -> str:
    """The error's text; nothing is written for it."""
    before = names(path.parent)
    for out in (path.parent / "out.safetensors", path.parent / "out"):
        with pytest.raises(InputError) as caught:
            convert_checkpoint(path, out, **options)
        text = str(caught.value)
        assert message in text and "\n" not in text and len(text) < 1500, text
    assert names(path.parent) == before
    return text
