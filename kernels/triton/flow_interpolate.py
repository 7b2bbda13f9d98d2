"""Noisy data and target velocity in Triton; the op is defined in clipflow/ops/flow_interpolate.py.

    noisy = (1 - s) * data + s * noise,   target = noise - data

Bytes moved: reads data and noise, writes noisy and target. Products and sums are rounded each for
itself, as in eager PyTorch: the launch says so to the compiler, which would contract them.
"""

# Shape suffixes: B = samples, N = values of a sample.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values a program: 16 bytes a thread and operand in float32, with 8 warps
WARPS = 8


@triton.jit
def flow_interpolate_fwd_kernel(
    data_ptr,  # [B, N]
    noise_ptr,  # [B, N]
    sigmas_ptr,  # [B]
    noisy_ptr,  # [B, N]
    target_ptr,  # [B, N]
    values,  # N
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # int64: B * N can pass 2**31
    blocks = tl.cdiv(values, BLOCK)
    sample = program // blocks
    n = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = n < values
    at = sample * values + n
    sigma = tl.load(sigmas_ptr + sample)
    data = tl.load(data_ptr + at, mask=inside, other=0.0).to(tl.float32)
    noise = tl.load(noise_ptr + at, mask=inside, other=0.0).to(tl.float32)
    noisy = (1.0 - sigma) * data + sigma * noise
    tl.store(noisy_ptr + at, noisy.to(noisy_ptr.dtype.element_ty), mask=inside)
    tl.store(target_ptr + at, (noise - data).to(target_ptr.dtype.element_ty), mask=inside)


def forward(data: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Mix `data` and `noise`, and take their difference.

    Args:
        data: [B, ...]; float32, bfloat16 or float16.
        noise: as `data`.
        sigmas: [B] float32.

    Returns:
        (noisy, target), as `data`. Arguments are contiguous and were checked by clipflow.ops.
    """
    noisy, target = torch.empty_like(data), torch.empty_like(data)
    if data.numel() == 0:
        return noisy, target
    B = data.shape[0]
    N = data.numel() // B
    with torch.cuda.device(data.get_device()):  # the CPU's -1, in the interpreter, does nothing
        flow_interpolate_fwd_kernel[(B * triton.cdiv(N, BLOCK),)](
            data, noise, sigmas, noisy, target, N,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return noisy, target
