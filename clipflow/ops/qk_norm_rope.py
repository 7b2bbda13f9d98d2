"""Normalization of queries and keys, then rotary embedding, in one pass.

    rms:    n = x / sqrt(mean(x^2) + eps) * weight + bias
    layer:  n = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    rope:   y_i = n_i * cos_m - n_j * sin_m,   y_j = n_j * cos_m + n_i * sin_m

over a head, or over all heads of a token at once. Pair m is (i, j) = (m, m + K/2), the halves of a
head, or (2m, 2m + 1), neighbors.

Source: Su et al., "RoFormer" (2021), section 3.4.2, for the rotation; Henry et al., "Query-Key
Normalization for Transformers" (2020), for the normalization.
"""

# Shape suffixes: B = batch, L = queries, S = keys, H = heads, K = width of a head.

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipflow.errors import (
    ShapeError,
    check_dims,
    check_floating,
    check_like,
    check_no_gradient,
    check_results,
    check_shape,
)
from clipflow.registry import (
    Case,
    Op,
    eager,
    fake_out,
    into,
    native,
    out_schema,
    register,
    triton,
)

NORMS = ("none", "rms", "layer")
Rope = tuple[Tensor, Tensor]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    *,
    q_rope: Rope | None = None,
    k_rope: Rope | None = None,
    norm: str = "rms",
    across_heads: bool = False,
    interleaved: bool = False,
    eps: float = 1e-6,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalize queries and keys and rotate them by their positions.

    Args:
        q: queries, [B, L, H, K], K even; float32, bfloat16 or float16 (float64 on CPU and eager).
            Views of a packed projection are read without a copy, if K is contiguous and, with
            `across_heads`, the heads are.
        k: keys, [B, S, Hk, K], dtype and device of `q`. Hk may differ from H and S from L; S = 0
            where there are no keys to prepare.
        q_weight: [K], or [H * K] with `across_heads`; dtype and device of `q`. None is 1.
        k_weight: as `q_weight`, [K] or [Hk * K].
        q_bias, k_bias: as the weights; None is 0.
        q_rope: (cos, sin), float32 [L, K/2] each, of each query's position, such as
            `clipflow.nn.embeddings.rope_table_1d` makes; a constant. None does not rotate.
        k_rope: as `q_rope`, [S, K/2]. None in cross-attention, where only queries have a place.
        norm: "rms", "layer", or "none", which only rotates.
        across_heads: normalize over all heads of a token jointly, not each by itself.
        interleaved: rotate neighbors (2m, 2m + 1), not halves (m, m + K/2).
        eps: added to the mean square or the variance, in squared units of `q`.
        out: (q', k'), tensors to write the results into and to return, like `q` and `k`,
            contiguous, apart from each other and from all inputs; None for new ones. "eager"
            computes elsewhere and copies.
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        (q', k'), contiguous, shapes and dtype of `q` and `k`; computed in float32 and rounded once.
        Differentiable in `q`, `k`, the weights and the biases; gradients are deterministic.

    Raises:
        ShapeError: a shape is not one of the above.
        TypeError: a dtype or device is not one of the above.
        ValueError: there is no such norm, weights or biases without one, or `out` is not two
            contiguous tensors.
        RuntimeError: `out` is given where a gradient would be needed.
        BackendUnavailable: the named backend cannot run this call.
    """
    if q.ndim != 4 or k.ndim != 4:
        check_dims("qk_norm_rope", "q", q, "[B, L, H, K]")
        check_dims("qk_norm_rope", "k", k, "[B, S, Hk, K]")
    B, L, H, K = q.shape
    k_B, S, Hk, k_K = k.shape
    if k_B != B or k_K != K:
        check_shape("qk_norm_rope", "k", k, (B, S, Hk, K))
    if K % 2 or not K:
        raise ShapeError(f"qk_norm_rope: q must be [B, L, H, K] with K even, got {list(q.shape)}")
    check_floating("qk_norm_rope", "q", q)
    check_like("qk_norm_rope", "k", k, "q", q)
    if norm not in NORMS:
        raise ValueError(f"qk_norm_rope: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    group, k_group = (H * K, Hk * K) if across_heads else (K, K)
    if q_weight is not None:
        _check_parameter("q_weight", q_weight, group, norm, q)
    if k_weight is not None:
        _check_parameter("k_weight", k_weight, k_group, norm, q)
    if q_bias is not None:
        _check_parameter("q_bias", q_bias, group, norm, q)
    if k_bias is not None:
        _check_parameter("k_bias", k_bias, k_group, norm, q)
    q_cos, q_sin = (None, None) if q_rope is None else _tables("q_rope", q_rope, L, K // 2, q)
    k_cos, k_sin = (None, None) if k_rope is None else _tables("k_rope", k_rope, S, K // 2, q)

    affine = (q_weight, k_weight, q_bias, k_bias)
    if out is not None:
        check_results("qk_norm_rope", out, (q, k), q.device)
        check_no_gradient("qk_norm_rope", q, k, *affine, *out)
    name = OP.select(q, backend)
    if name == "eager":
        found = reference(q, k, *affine, q_rope, k_rope, norm, across_heads, interleaved, eps)
        return into(out, found)
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, *affine)
    )
    if training and k_cos is not None and k_cos is q_cos:
        # torch.compile refuses an autograd function that is given one tensor twice.
        k_cos, k_sin = k_cos.view_as(k_cos), k_sin.view_as(k_sin)
    options = (q_cos, q_sin, k_cos, k_sin, NORMS.index(norm), across_heads, interleaved, eps)
    if training:
        return _QKNormRope.apply(q, k, *affine, *options, name)
    return OP.backends[name].forward(q, k, *affine, *options, out=out)


def _check_parameter(name: str, parameter: Tensor, group: int, norm: str, q: Tensor) -> None:
    if norm == "none":
        raise ValueError(f"qk_norm_rope: {name} must be None with norm 'none', got a tensor")
    check_shape("qk_norm_rope", name, parameter, (group,))
    check_like("qk_norm_rope", name, parameter, "q", q)


def _tables(name: str, rope: Rope, tokens: int, pairs: int, q: Tensor) -> Rope:
    """`rope` as the kernels want it: checked, contiguous, and without a gradient."""
    cos, sin = rope
    wanted, device = (tokens, pairs), q.device
    for table in rope:
        if table.shape != wanted:
            part = "cos" if table is cos else "sin"
            check_shape("qk_norm_rope", f"{name} {part}", table, wanted)
        if table.dtype is not torch.float32 or table.device != device:
            part = "cos" if table is cos else "sin"
            raise TypeError(
                f"qk_norm_rope: {name} {part} must be torch.float32 on {device}, "
                f"got {table.dtype} on {table.device}"
            )
    if cos.requires_grad or sin.requires_grad:
        cos, sin = cos.detach(), sin.detach()
    return cos.contiguous(), sin.contiguous()


def reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    q_rope: Rope | None = None,
    k_rope: Rope | None = None,
    norm: str = "rms",
    across_heads: bool = False,
    interleaved: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The meaning of the op, in float32 (float64 inputs stay float64)."""
    sides = []
    for x, weight, bias, rope in ((q, q_weight, q_bias, q_rope), (k, k_weight, k_bias, k_rope)):
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
        y = x.to(wide)
        groups = y.flatten(2) if across_heads else y
        width = groups.shape[-1:]
        if norm == "layer":
            y = F.layer_norm(groups, width, weight, bias, eps).view(x.shape)
        elif norm == "rms":
            y = F.rms_norm(groups, width, weight, eps)
            y = (y if bias is None else y + bias).view(x.shape)
        if rope is not None:
            y = _rotate(y, *(table.detach().to(wide)[:, None] for table in rope), interleaved)
        sides.append(y.to(x.dtype).contiguous())
    return sides[0], sides[1]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of `x` [.., L, H, K] by the angles of `cos` and `sin` [L, 1, K/2]."""
    if interleaved:
        i, j = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((i * cos - j * sin, j * cos + i * sin), dim=-1).flatten(-2)
    i, j = x.chunk(2, dim=-1)
    return torch.cat((i * cos - j * sin, j * cos + i * sin), dim=-1)


class _QKNormRope(torch.autograd.Function):
    """Gradients of every backend that autograd cannot look into."""

    @staticmethod
    def forward(q, k, q_weight, k_weight, q_bias, k_bias, *rest) -> tuple[Tensor, Tensor]:
        *options, backend = rest
        affine = (q_weight, k_weight, q_bias, k_bias)
        return OP.backends[backend].forward(q, k, *affine, *options)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:10])
        *ctx.options, ctx.backend = inputs[10:]

    @staticmethod
    @once_differentiable  # a second derivative raises; backend="eager" has it
    def backward(ctx, d_q: Tensor, d_k: Tensor):
        q, k, q_weight, k_weight, q_bias, k_bias, q_cos, q_sin, k_cos, k_sin = ctx.saved_tensors
        side = OP.backends[ctx.backend].backward
        q_grads = side(d_q, q, q_weight, q_bias, q_cos, q_sin, *ctx.options)
        k_grads = side(d_k, k, k_weight, k_bias, k_cos, k_sin, *ctx.options)
        both = (grad for pair in zip(q_grads, k_grads, strict=True) for grad in pair)
        return *both, *(None,) * 9


def _laid_out(x: Tensor, across_heads: bool) -> Tensor:
    """`x` with K contiguous, and with all heads of a token contiguous where they are one group."""
    if x.stride(3) == 1 and not (across_heads and x.stride(2) != x.shape[3]):
        return x
    return x.contiguous()


def _native(q, k, q_weight, k_weight, q_bias, k_bias, *rest, out=None) -> tuple[Tensor, Tensor]:
    q, k = _laid_out(q, rest[5]), _laid_out(k, rest[5])
    if q_weight is not None:
        q_weight = q_weight.contiguous()
    if k_weight is not None:
        k_weight = k_weight.contiguous()
    if q_bias is not None:
        q_bias = q_bias.contiguous()
    if k_bias is not None:
        k_bias = k_bias.contiguous()
    operands = (q, k, q_weight, k_weight, q_bias, k_bias, *rest)
    if out is None:
        return _forward_op(*operands)
    _out_op(*operands, *out)
    return tuple(out)


def _plain_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: int,
    across_heads: bool,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(d_x, d_weight, d_bias) of queries or keys, in plain PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    d_normed, wide_x = grad.contiguous().to(wide), x.contiguous().to(wide)
    if cos is not None:  # back by the same angle
        d_normed = _rotate(d_normed, cos.to(wide)[:, None], -sin.to(wide)[:, None], interleaved)
    if NORMS[norm] == "none":
        return d_normed.to(x.dtype), None, None
    if across_heads:
        d_normed, wide_x = d_normed.flatten(2), wide_x.flatten(2)
    if NORMS[norm] == "layer":
        wide_x = wide_x - wide_x.mean(-1, keepdim=True)
    rstd = (wide_x.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = wide_x * rstd
    d_weight = None if weight is None else _total(d_normed * xhat).to(x.dtype)
    d_bias = None if bias is None else _total(d_normed).to(x.dtype)
    g = d_normed if weight is None else d_normed * weight.to(wide)
    d_x = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if NORMS[norm] == "layer":
        d_x = d_x - g.mean(-1, keepdim=True)
    return (d_x * rstd).view(x.shape).to(x.dtype), d_weight, d_bias


def _total(x: Tensor) -> Tensor:
    """Sum over all but the last dimension; in float64, as its terms may cancel each other."""
    return x.flatten(0, -2).sum(0, dtype=torch.float64)


def _triton(q, k, q_weight, k_weight, q_bias, k_bias, *rest, out=None) -> tuple[Tensor, Tensor]:
    from clipflow.kernels.triton import qk_norm_rope as kernel  # Triton is an optional dependency

    q_cos, q_sin, k_cos, k_sin, norm, across_heads, *options = rest
    q, k = _laid_out(q, across_heads), _laid_out(k, across_heads)
    q_affine = tuple(None if t is None else t.contiguous() for t in (q_weight, q_bias))
    k_affine = tuple(None if t is None else t.contiguous() for t in (k_weight, k_bias))
    options = (NORMS[norm], across_heads, *options)
    q_out, k_out = (None, None) if out is None else out
    return (
        kernel.forward(q, *q_affine, q_cos, q_sin, *options, q_out),
        kernel.forward(k, *k_affine, k_cos, k_sin, *options, k_out),
    )


def _triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, cos, sin, norm, *options
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from clipflow.kernels.triton import qk_norm_rope as kernel  # Triton is an optional dependency

    d_x, d_weight, d_bias = kernel.backward(
        grad.contiguous(),
        _laid_out(x, options[0]),
        None if weight is None else weight.contiguous(),
        cos,
        sin,
        NORMS[norm],
        *options,
        parameters=weight is not None or bias is not None,
    )
    d_weight = None if weight is None else d_weight.to(x.dtype)
    return d_x, d_weight, None if bias is None else d_bias.to(x.dtype)


def _fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _case(
    B: int,
    L: int,
    H: int,
    K: int,
    *,
    S: int | None = None,
    Hk: int | None = None,
    norm: str = "rms",
    affine: int = 1,
    across_heads: bool = False,
    interleaved: bool = False,
    rope: str = "qk",
) -> Case:
    """`affine` counts the affine parameters of the norm: 1 a weight, 2 a bias as well."""
    S, Hk = L if S is None else S, H if Hk is None else Hk

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        if S == L:  # views of a packed projection: queries, keys and values
            packed = normal(B, L, H + 2 * Hk, K)
            q, k = packed[:, :, :H], packed[:, :, H : H + Hk]
        else:
            q, k = normal(B, L, H, K), normal(B, S, Hk, K)
        widths = (H * K, Hk * K) if across_heads else (K, K)
        parameters = tuple(normal(width) for _ in range(affine) for width in widths)
        return (q, k, *(1 + p for p in parameters[:2]), *parameters[2:])

    def options(device: torch.device) -> dict[str, object]:
        def table(length: int) -> Rope:
            angle = torch.arange(length * (K // 2), device=device, dtype=torch.float32)
            angle = angle.view(length, K // 2) * 0.37
            return angle.cos(), angle.sin()

        chosen = {"norm": norm, "across_heads": across_heads, "interleaved": interleaved}
        chosen |= {"eps": 1e-5} if norm == "layer" else {}
        chosen |= {"q_rope": table(L)} if "q" in rope else {}
        return chosen | ({"k_rope": table(S)} if "k" in rope else {})

    name = f"B{B}-L{L}-S{S}-{H}+{Hk}x{K}-{norm}{affine}" + ("-across" if across_heads else "")
    name += f"-rope{'-' if rope else '0'}{rope}" + ("-interleaved" if interleaved else "")
    return Case(name=name, inputs=inputs, options=options, shared=frozenset(range(2, 6)))


def _any_case(rng: random.Random) -> Case:
    K = 2 * rng.choice([rng.randint(1, 8), rng.randint(1, 128)])
    H, Hk = rng.randint(1, 12), rng.randint(1, 4)
    norm = rng.choice(NORMS)
    most = max(1, min(64, 2**14 // (2 * K * (H + 2 * Hk))))
    L, S = rng.randint(0, most), rng.randint(0, most)
    return _case(
        rng.randint(0, 2),
        L,
        H,
        K,
        S=rng.choice([L, S]),
        Hk=Hk,
        norm=norm,
        affine=0 if norm == "none" else rng.randint(0, 2),
        across_heads=rng.random() < 0.5,
        interleaved=rng.random() < 0.5,
        rope=rng.choice(["qk", "q", "k", ""]),
    )


def _lumina(L: int, **options: object) -> Case:
    """BLIP3-o's diffusion transformer."""
    wide = {"norm": "layer", "affine": 2, "across_heads": True, "interleaved": True}
    return _case(2, L, 28, 64, **wide | options)


SCHEMA = (
    "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias,"
    " Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin, int norm, bool across_heads,"
    " bool interleaved, float eps) -> (Tensor, Tensor)"
)

OP = register(
    Op(
        name="qk_norm_rope",
        schemas={
            "qk_norm_rope": SCHEMA,
            "qk_norm_rope_out": out_schema(SCHEMA, "q_out", "k_out"),
        },
        fakes={"qk_norm_rope": _fake, "qk_norm_rope_out": fake_out},
        public=qk_norm_rope,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": native("qk_norm_rope", _native, _plain_backward),
            "triton": triton(_triton, _triton_backward),
        },
        order=("native", "triton", "eager"),
        # One token; odd sizes that leave a tail; each norm, grouping, rotation and absence.
        cases=(
            _case(1, 1, 1, 8),
            _case(3, 5, 3, 14, S=7, Hk=2, norm="layer", affine=2),
            _case(2, 10, 3, 14, Hk=1, norm="layer", affine=2, across_heads=True, interleaved=True),
            _case(2, 4, 5, 32, S=6, affine=1, across_heads=True, rope="q", interleaved=True),
            _case(2, 16, 4, 64, Hk=2, affine=2),
            _case(2, 3, 2, 72, affine=0, norm="none", rope="k", interleaved=True),
            _case(2, 3, 2, 6, affine=0, rope=""),
        ),
        timed=(
            *(_lumina(L) for L in (64, 256, 1024)),
            _lumina(256, S=64, rope="q"),
            *(_case(B, L, 14, 64, Hk=2) for B, L in ((1, 128), (2, 1024))),
            *(_case(B, L, 28, 128, Hk=4) for B, L in ((1, 128), (2, 1024))),
            *(_case(2, L, 70, 32, across_heads=True, rope="") for L in (256, 1024)),
        ),
        of_length=lambda L: _case(2, L, 2, 24, Hk=1),
        any_case=_any_case,
        traffic="read q and k, write q' and k'; tables are 2 * L * K values, read once a sample",
        flops=lambda q, k, *_, **__: 8 * (q.numel() + k.numel()),
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_forward_op = torch.ops.clipflow.qk_norm_rope.default
_out_op = torch.ops.clipflow.qk_norm_rope_out.default
