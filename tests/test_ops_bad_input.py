"""Every registered op refuses what it cannot compute, by name, before anything runs."""

import pytest
import torch

from clipflow.errors import BackendUnavailable, ShapeError
from clipflow.ops import all_ops

CPU = torch.device("cpu")
POSITIONS = [
    pytest.param(op, i, id=f"{op.name}-{i}")
    for op in all_ops()
    for i in range(len(op.cases[1].inputs(CPU, torch.float32)))
]


def call_with(op, position, change):
    """Call `op` at its second case with the input at `position` changed."""
    case = op.cases[1]
    inputs = list(case.inputs(CPU, torch.float32))
    inputs[position] = change(inputs[position])
    return case.of(op.public)(*inputs, **case.options(CPU))


@pytest.mark.parametrize(("op", "position"), POSITIONS)
def test_integers(op, position):
    with pytest.raises(TypeError, match=rf"^{op.name}: \w+ must .*got .*torch\.int64"):
        call_with(op, position, torch.Tensor.long)


@pytest.mark.parametrize(("op", "position"), POSITIONS)
def test_complex_numbers(op, position):
    with pytest.raises(TypeError, match=rf"^{op.name}: \w+ must .*got .*torch\.complex64"):
        call_with(op, position, lambda t: t.to(torch.complex64))


@pytest.mark.parametrize(("op", "position"), POSITIONS)
def test_mixed_devices(op, position):
    if len(op.cases[1].inputs(CPU, torch.float32)) == 1:
        pytest.skip("one tensor is on one device")
    with pytest.raises(TypeError, match=rf"^{op.name}: \w+ must .*(cpu|meta).*got .*(cpu|meta)"):
        call_with(op, position, lambda t: t.to("meta"))


@pytest.mark.parametrize(("op", "position"), POSITIONS)
def test_one_value_too_many_in_a_row(op, position):
    if len(op.cases[1].inputs(CPU, torch.float32)) == 1:
        pytest.skip("a single tensor may have rows of any length")
    with pytest.raises(ShapeError, match=rf"^{op.name}: \w+ must .*got"):
        call_with(op, position, lambda t: torch.nn.functional.pad(t, (0, 1)))


@pytest.mark.parametrize(("op", "position"), POSITIONS)
def test_scalars(op, position):
    with pytest.raises(ShapeError, match=rf"^{op.name}: \w+ must .*got"):
        call_with(op, position, lambda t: t.sum())


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_unknown_backends(op):
    case = op.cases[0]
    with pytest.raises(BackendUnavailable, match=rf"^{op.name}: backend 'cuda' is not one of"):
        case.of(op.public)(*case.inputs(CPU, torch.float32), **case.options(CPU), backend="cuda")
