"""Softmax attention of diffusion transformers: key lengths instead of masks, grouped key heads.

    y_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j < key_lengths[b]

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1; grouped heads: Ainslie et
al., "GQA" (2023); computed in blocks by the "triton" backend: Dao, "FlashAttention-2" (2023).
"""

# Shape suffixes: B = batch, L = queries, S = keys, H = heads, G = heads of keys, K = head width.

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipflow.errors import ShapeError, check_dims, check_floating, check_like, check_shape
from clipflow.registry import Case, Implementation, Op, eager, register, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
TRITON_WIDEST = 128
# PyTorch 2.13's CPU kernel gives 0 instead of NaN for a query with a NaN when the keys do not fill
# a register (8 with AVX2, 16 with AVX-512).
FEWEST_KEYS = 16


def dit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from `q` to the first `key_lengths[b]` keys of each sample.

    Args:
        q: queries, [B, L, H, K]; float32, bfloat16 or float16 (float64 on CPU and eager). Any
            strides do; views of one packed projection are fine.
        k: keys, [B, S, G, K], where H is a multiple of G; head h attends to head h // (H / G).
        v: values, as `k`.
        key_lengths: [B], int64 or int32, each in 0..S, on the device of `q`; None where all S keys
            are real. A sample without keys gives 0. Keys and values past the length must be finite:
            some backends multiply them by 0.
        scale: of the scores before the softmax; None for K ** -0.5.
        backend: "auto", or one of "eager", "native" (PyTorch's own scaled_dot_product_attention),
            "triton", or "flash-attn" and "xformers", where those packages are installed.

    Returns:
        [B, L, H, K], contiguous, dtype of `q`. Scores, softmax and sums are float32. Differentiable
        in `q`, `k` and `v`. How a sum over keys is split is the backend's choice and may depend on
        the batch, so a sample's last bits may differ from batch to batch.

    Raises:
        ShapeError: `q` is not [B, L, H, K], `k` or `v` is not [B, S, G, K] with H a multiple of G,
            or `key_lengths` is not [B].
        TypeError: a dtype or device is not one of the above.
        BackendUnavailable: the named backend cannot run this call.
    """
    _check(q, k, v, key_lengths)
    width = q.shape[3]
    name = OP.select(q, backend, width)
    scale = width**-0.5 if scale is None else scale
    implementation = OP.backends[name]
    if (
        implementation.backward is not None
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
    ):
        return _DitAttention.apply(q, k, v, key_lengths, scale, name)[0]
    y = implementation.forward(q, k, v, key_lengths, scale)
    return y if isinstance(y, Tensor) else y[0]


def _check(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None) -> None:
    check_dims("dit_attention", "q", q, "[B, L, H, K]")
    check_floating("dit_attention", "q", q)
    B, _, H, K = q.shape
    check_dims("dit_attention", "k", k, "[B, S, G, K]")
    G = k.shape[2]
    if k.shape[0] != B or k.shape[3] != K or G == 0 or H % G:
        raise ShapeError(
            f"dit_attention: k must be [{B}, S, G, {K}] with H = {H} a multiple of G, "
            f"got {list(k.shape)}"
        )
    check_shape("dit_attention", "v", v, k.shape)
    check_like("dit_attention", "k", k, "q", q)
    check_like("dit_attention", "v", v, "q", q)
    if key_lengths is not None:
        check_shape("dit_attention", "key_lengths", key_lengths, (B,))
        if key_lengths.dtype not in INTEGERS:
            raise TypeError(
                f"dit_attention: key_lengths must be int64 or int32, got {key_lengths.dtype}"
            )
        if key_lengths.device != q.device:
            raise TypeError(
                f"dit_attention: key_lengths must be on {q.device} as q is, "
                f"got {key_lengths.device}"
            )


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The meaning of the op, in float32 (float64 inputs stay float64)."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2).to(wide) for t in (q, k, v))  # [B, H, L, K], [B, G, S, K]
    if heads > 1:
        k, v = k.repeat_interleave(heads, dim=1), v.repeat_interleave(heads, dim=1)
    scores = (q * scale) @ k.transpose(-1, -2)
    if key_lengths is not None:
        real = _real_keys(key_lengths, k.shape[2])
        scores = scores.masked_fill(~real, float("-inf"))
        # A sample without keys would have 0 / 0.
        weights = scores.softmax(dim=-1).masked_fill(~real, 0.0)
    else:
        weights = scores.softmax(dim=-1)
    return (weights @ v).transpose(1, 2).to(dtype).contiguous()


def _real_keys(key_lengths: Tensor, S: int) -> Tensor:
    """[B, 1, 1, S] bool, True at the first `key_lengths[b]` keys."""
    return (torch.arange(S, device=key_lengths.device) < key_lengths[:, None])[:, None, None]


class _DitAttention(torch.autograd.Function):
    """Gradients of the backend that autograd cannot look into."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        return OP.backends[backend].forward(q, k, v, key_lengths, scale)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        q, k, v, key_lengths, ctx.scale, ctx.backend = inputs
        y, log_sum = output
        ctx.mark_non_differentiable(log_sum)
        ctx.save_for_backward(q, k, v, key_lengths, y, log_sum)

    @staticmethod
    @once_differentiable  # a second derivative raises; backend="eager" has it
    def backward(ctx, grad: Tensor, _: Tensor):
        backward = OP.backends[ctx.backend].backward
        return *backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` with contiguous heads; all other strides stay free."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _native(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float) -> Tensor:
    S = k.shape[1]
    if S < FEWEST_KEYS and q.is_cpu:
        return reference(q, k, v, key_lengths, scale)
    mask = None if key_lengths is None else _real_keys(key_lengths, S)
    q, k, v = (_rows(t).transpose(1, 2) for t in (q, k, v))
    if q.shape[1] == k.shape[1]:
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).contiguous()


def _triton(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithms of the softmax sums [B, H, L], which the gradients need."""
    from clipflow.kernels.triton import dit_attention as kernel  # Triton is optional

    return kernel.forward(_rows(q), _rows(k), _rows(v), key_lengths, scale)


def _triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    y: Tensor,
    log_sum: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from clipflow.kernels.triton import dit_attention as kernel  # Triton is optional

    rows = (_rows(t) for t in (grad, q, k, v))
    return kernel.backward(*rows, key_lengths, y, log_sum, scale)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float
) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # optional

    if key_lengths is None:
        return flash_attn_func(_rows(q), _rows(k), _rows(v), softmax_scale=scale)
    B, L, H, K = q.shape
    real = _real_keys(key_lengths, k.shape[1])[:, 0, 0]
    first_key = F.pad(key_lengths.cumsum(0), (1, 0)).int()
    first_query = torch.arange(0, (B + 1) * L, L, dtype=torch.int32, device=q.device)
    y = flash_attn_varlen_func(
        q.reshape(B * L, H, K),
        k[real],
        v[real],
        cu_seqlens_q=first_query,
        cu_seqlens_k=first_key,
        max_seqlen_q=L,
        max_seqlen_k=k.shape[1],
        softmax_scale=scale,
    )
    return y.view(B, L, H, K)


def _xformers(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention  # optional
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    B, L, H, K = q.shape
    if H != k.shape[2]:
        k, v = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (k, v))
    if key_lengths is None:
        return memory_efficient_attention(q, k, v, scale=scale).contiguous()
    real = _real_keys(key_lengths, k.shape[1])[:, 0, 0]
    bias = BlockDiagonalMask.from_seqlens([L] * B, key_lengths.tolist())
    y = memory_efficient_attention(
        q.reshape(1, B * L, H, K), k[real][None], v[real][None], attn_bias=bias, scale=scale
    )
    return y.view(B, L, H, K).masked_fill((key_lengths == 0)[:, None, None, None], 0.0)


def _package(
    forward: Callable[..., Tensor], package: str, dtypes: tuple[torch.dtype, ...], widest: int
) -> Implementation:
    """A package that may be installed; autograd sees through it."""
    installed = importlib.util.find_spec(package.replace("-", "_")) is not None

    def refusal(x: Tensor, width: int = 8, *_: object) -> str | None:
        if not installed:
            return f"needs the package {package}, which is not installed"
        if not x.is_cuda:
            return f"needs a CUDA tensor, got one on {x.device.type!r}"
        if x.dtype not in dtypes:
            return f"has no kernel for {x.dtype}"
        if width > widest or width % 8:
            return f"needs a head width that is a multiple of 8, up to {widest}, got {width}"
        return None

    return Implementation(forward=forward, backward=None, refusal=refusal)


def _triton_up_to(widest: int) -> Implementation:
    whole = triton(_triton, _triton_backward)

    def refusal(x: Tensor, width: int = 1, *_: object) -> str | None:
        if width > widest:
            return f"has kernels for head widths up to {widest}, got {width}"
        return whole.refusal(x)

    return Implementation(forward=_triton, backward=_triton_backward, refusal=refusal)


def _case(
    B: int, L: int, S: int, H: int, G: int, K: int, *, lengths: tuple[int, ...] | None = None
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q = torch.randn(B, L, H, K, device=device, dtype=dtype)
        k, v = torch.randn(B, S, 2, G, K, device=device, dtype=dtype).unbind(2)
        return q, k, v

    def options(device: torch.device) -> dict[str, object]:
        return {} if lengths is None else {"key_lengths": torch.tensor(lengths, device=device)}

    name = f"B{B}-L{L}-S{S}-H{H}-G{G}-K{K}" + ("" if lengths is None else "-lengths")
    return Case(name=name, inputs=inputs, options=options)


def _any_case(rng: random.Random) -> Case:
    K = rng.choice([32, 64, 72, 112, 128, rng.randint(1, 128)])
    G = rng.randint(1, max(1, min(8, 1024 // K)))
    H = G * rng.randint(1, 3)
    most = max(2, min(300, 2**15 // (H * K)))
    L, B = rng.randint(0, most), rng.randint(0, 3)
    # With one key the gradient of q is 0, and what comes out is rounding: no measure.
    S = rng.choice([0, *[rng.randint(2, most)] * 9])
    lengths = None
    if B and S and rng.random() < 0.5:
        lengths = tuple(rng.choice([0, S, rng.randint(2, S)]) for _ in range(B))
    return _case(B, L, S, H, G, K, lengths=lengths)


OP = register(
    Op(
        name="dit_attention",
        schemas={},  # PyTorch's own op is the native one
        fakes={},
        public=dit_attention,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": Implementation(forward=_native, backward=None, refusal=lambda x, *_: None),
            "triton": _triton_up_to(TRITON_WIDEST),
            "flash-attn": _package(_flash_attn, "flash-attn", DTYPES[1:], 256),
            "xformers": _package(_xformers, "xformers", DTYPES, 256),
        },
        order=("native", "triton", "eager", "flash-attn", "xformers"),
        # One query; odd sizes and lengths; a sample without keys, grouped heads; more keys than a
        # block; the widest heads.
        cases=(
            _case(1, 1, 5, 1, 1, 32),
            _case(3, 17, 37, 3, 3, 72, lengths=(20, 30, 37)),
            _case(2, 33, 40, 4, 2, 64, lengths=(0, 31)),
            _case(1, 70, 150, 2, 2, 32),
            _case(2, 40, 130, 2, 1, 112, lengths=(129, 70)),
            _case(1, 66, 66, 4, 2, 128),
        ),
        timed=(
            _case(2, 64, 40, 3, 3, 64),
            _case(2, 256, 300, 16, 16, 72),
            _case(2, 256, 300, 20, 20, 112),
            _case(2, 256, 300, 20, 20, 112, lengths=(300, 270)),
            _case(2, 1024, 300, 20, 20, 112, lengths=(300, 270)),
            _case(2, 1024, 1024, 24, 8, 96),
            _case(2, 256, 256, 18, 18, 64),
        ),
        of_length=lambda L: _case(2, L, L + 20, 2, 1, 32, lengths=(L, 3)),
        any_case=_any_case,
        traffic="read q, k, v, write y",
        flops=lambda q, k, *_, **__: 4 * q.numel() * k.shape[1],
        batch_invariant=False,  # PyTorch's kernels split the work by the number of threads
    )
)
