"""Tiny diffusers transformers with random weights, and calls of them as pipelines make them."""

from collections.abc import Callable

import torch
from diffusers import Lumina2Transformer2DModel, LuminaNextDiT2DModel, SanaTransformer2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
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


def lumina2(**config: object) -> Lumina2Transformer2DModel:
    sizes = {
        "patch_size": 2, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "multiple_of": 16,
        "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "cap_feat_dim": 12,
        "axes_dim_rope": (4, 4, 4), "axes_lens": (30, 32, 32),
    }  # fmt: skip
    return _noisy(Lumina2Transformer2DModel(**sizes | config))


def lumina_next(**config: object) -> LuminaNextDiT2DModel:
    sizes = {
        "patch_size": 2, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "multiple_of": 16,
        "num_attention_heads": 4, "num_kv_heads": 2, "cross_attention_dim": 12,
    }  # fmt: skip
    return _noisy(LuminaNextDiT2DModel(**sizes | config))


def _noisy(model: nn.Module) -> nn.Module:
    """Norm weights and zero gates start where mistakes would not be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def lumina2_call(
    dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] = (5, 9)
) -> Arguments:
    """What `Lumina2Pipeline` passes for two samples."""
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, 4, 8, 12, generator=generator).to(dtype),
        "timestep": torch.tensor([0.3, 0.7]).to(dtype),
        "encoder_hidden_states": torch.randn(2, 9, 12, generator=generator).to(dtype),
        "encoder_attention_mask": token_mask(*lengths, tokens=9),
        "attention_kwargs": None,
        "return_dict": False,
    }


def lumina_next_call(
    dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] = (5, 9)
) -> Arguments:
    """What `LuminaPipeline` passes for two samples."""
    call = lumina2_call(dtype, lengths)
    call["encoder_mask"] = call.pop("encoder_attention_mask")
    del call["attention_kwargs"]
    rope = get_2d_rotary_pos_embed_lumina(12, 32, 32, linear_factor=1.0, ntk_factor=1.0)
    return call | {"image_rotary_emb": rope, "cross_attention_kwargs": {}}


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
