"""Tiny diffusers transformers with random weights, and calls of them as pipelines make them."""

from collections.abc import Callable

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

Arguments = dict[str, object]


def sana(**config: object) -> SanaTransformer2DModel:
    sizes = {
        "in_channels": 4, "out_channels": 4, "num_layers": 3, "sample_size": 8,
        "num_attention_heads": 4, "attention_head_dim": 8, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 12,
    }  # fmt: skip
    torch.manual_seed(1)
    return SanaTransformer2DModel(**sizes | config).eval()


def token_mask(*lengths: int, tokens: int) -> Tensor:
    """[B, tokens] int64, 1 where a token is real."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def sana_call(dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] = (5, 9)) -> Arguments:
    """What `SanaPipeline` passes for two samples."""
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, 4, 6, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 9, 12, generator=generator).to(dtype),
        "encoder_attention_mask": token_mask(*lengths, tokens=9),
        "timestep": torch.tensor([700, 30]),
        "attention_kwargs": None,
        "return_dict": False,
    }


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same call with its floating tensors in `dtype`."""
    floating = lambda value: isinstance(value, Tensor) and value.is_floating_point()  # noqa: E731
    return {
        name: value.to(dtype) if floating(value) else value for name, value in arguments.items()
    }


@torch.no_grad()
def errors(
    stock: nn.Module, fused: nn.Module, make: Callable[[], Arguments]
) -> tuple[float, float]:
    """Distance of each from `fused` in float64, relative to that; checks that with stock."""
    import copy

    call = make()
    double = in_dtype(call, torch.float64)
    truth = copy.deepcopy(fused).double()(**double)[0]
    # diffusers computes a few things in float32 whatever the dtype of the model.
    expected = copy.deepcopy(stock).double()(**double)[0]
    assert (truth - expected).norm() <= 2e-6 * truth.norm()
    distance = lambda y: float((y.double() - truth).norm() / truth.norm())  # noqa: E731
    return distance(stock(**call)[0]), distance(fused(**call)[0])
