"""What swiglu says of bad input, and whose bits it has, beside the tests of every op."""

import pytest
import torch
import torch.nn.functional as F

from clipflow import extension, ops
from clipflow.errors import BackendUnavailable, ShapeError

FUSED = {"avx2", "avx512"}  # instruction sets with fused multiply-add


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"a": torch.zeros(()), "b": torch.zeros(())}, ShapeError, r"a must be \[..., D\], got"),
        ({"b": torch.zeros(2, 7)}, ShapeError, r"b must be \[2, 8\], got \[2, 7\]"),
        ({"b": torch.zeros(8)}, ShapeError, r"b must be \[2, 8\], got \[8\]"),
        ({"a": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"b": torch.zeros(2, 8).double()}, TypeError, "b must be torch.float32 on cpu as a is"),
        ({"b": torch.zeros(2, 8, device="meta")}, TypeError, "on meta"),
        ({"backend": "cuda"}, BackendUnavailable, "'cuda' is not one of"),
    ],
)
def test_swiglu_says_what_is_wrong(change, error, words):
    call = {"a": torch.zeros(2, 8), "b": torch.zeros(2, 8)}
    with pytest.raises(error, match=words):
        ops.swiglu(**call | change)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fused_pytorch() -> bool:
    return extension.LOADED and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def every_exponent() -> torch.Tensor:
    """Floats of both signs and all sizes, infinities and NaNs among them."""
    bits = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64)
    bits = bits[: bits.numel() // 32 * 32].to(torch.int32)
    return bits.view(torch.float32)


@pytest.mark.skipif(not fused_pytorch(), reason="needs a CPU with fused multiply-add")
@pytest.mark.parametrize("name", sorted(FUSED))
def test_bits_are_those_of_whole_registers_in_eager(name, one_thread):
    best = extension.build_facts()["instruction_set"]
    if not extension._C.use_instruction_set(name):
        pytest.skip(f"this machine does not run {name}")
    try:
        a = every_exponent()
        b = torch.randn(a.shape)
        actual, eager = ops.swiglu(a, b, backend="native"), F.silu(a) * b
        same = (actual == eager) | (actual.isnan() & eager.isnan())
        assert same.all()
    finally:
        extension._C.use_instruction_set(best)


@pytest.mark.skipif(not extension.LOADED, reason="needs the compiled extension")
def test_elsewhere_bits_are_within_4_ulp(one_thread):
    a, b = torch.randn(2, 4001, 13).unbind()
    short = torch.cat([F.silu(row) * other for row, other in zip(a, b, strict=True)])  # scalar code
    actual = ops.swiglu(a, b, backend="native").flatten()
    ulp = (actual.view(torch.int32) - short.view(torch.int32)).abs()
    assert ulp.max() <= 4


@pytest.mark.skipif(not extension.LOADED, reason="needs the compiled extension")
@pytest.mark.parametrize("shape", [(7, 5000), (1, 2**23)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_past_the_caches_are_complete(shape, dtype):
    """Large outputs are streamed: each value must have been written, with the same bits."""
    projection = torch.randn(shape[0], 2 * shape[1], dtype=dtype)
    a, b = projection.chunk(2, dim=-1)
    whole = ops.swiglu(a, b, backend="native")
    for part in (slice(0, 33), slice(shape[1] // 2, shape[1] // 2 + 33)):
        alone = ops.swiglu(a[:, part], b[:, part], backend="native")
        assert torch.equal(whole[:, part], alone)
    assert torch.allclose(whole.float(), F.silu(a.float()) * b.float(), atol=0.02, rtol=0.01)


def test_halves_of_a_projection_are_not_copied():
    if not extension.LOADED:
        pytest.skip("needs the compiled extension")
    a, b = torch.randn(3, 5, 64).chunk(2, dim=-1)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        y = ops.swiglu(a, b, backend="native")
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert taken <= y.nbytes + 4096
