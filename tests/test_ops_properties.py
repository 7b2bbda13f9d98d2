"""Every registered op at working points and memory layouts drawn at random.

100 examples an op, 3 in Triton's interpreter. For 2,000 of them:

    pytest tests/test_ops_properties.py --hypothesis-profile thorough
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_calls import assert_as_close_as_eager, backends_under_test, outputs, results, run

from clipflow.ops import all_ops

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRID = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in all_ops()
    for backend in backends_under_test(op)
    if op.refusal(torch.empty(1), backend) is None
]


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, elsewhere in memory."""
    if layout == "every other value":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "inside a wider row":
        return torch.nn.functional.pad(tensor, (3, 2))[..., 3 : 3 + tensor.shape[-1]]
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


LAYOUTS = ["contiguous", "every other value", "inside a wider row", "transposed"]


@pytest.mark.parametrize(("op", "backend"), GRID)
@given(rng=st.randoms(use_true_random=False), data=st.data())
def test_any_working_point(op, backend, rng, data):
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    case = op.any_case(rng)
    torch.manual_seed(0)
    inputs = tuple(laid_out(t, layout) for t in case.inputs(CPU, dtype))
    actual = results(op, case, inputs, backend)
    assert_as_close_as_eager(actual, op, case, inputs, steps=8)
    if op.exact and dtype == torch.float32:
        for name, value in outputs(op, run(op, case, inputs, "eager")).items():
            assert torch.equal(value, actual[name]), (case.name, name)
