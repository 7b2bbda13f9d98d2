"""EVA-CLIP's vision tower: it makes the features that BLIP3-o's generator learns to draw.

Source: Sun et al., "EVA-CLIP" (2023); specs of BLIP3-o, section A.6. Parameter names are those of
published towers.
"""

# Shape suffixes: B = batch, N = h*w patches, D = width, H = heads.

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.errors import ShapeError
from clipflow.models.folders.parsing import build
from clipflow.ops import clip_normalize, dit_attention

# What pixels in [0, 1] are normalized with, per channel, by all of OpenAI's and EVA's CLIPs.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class EVAConfig:
    """Sizes of an `EVATower`; `EVAConfig()` is EVA-CLIP-E/14-plus at 448 pixels.

    `pool` is the side of the squares of patches whose average is one feature of `target`.

    Raises:
        ValueError: sizes that do not fit together; one error names them all.
    """

    image_size: int = 448
    patch_size: int = 14
    hidden_size: int = 1792
    num_hidden_layers: int = 64
    num_attention_heads: int = 16
    intermediate_size: int = 15360
    layer_norm_eps: float = 1e-6
    pool: int = 4

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        problems = [
            f"{name} must be above 0 and finite, got {value}"
            for name, value in values.items()
            if not 0 < value < math.inf
        ]
        multiples = () if problems else (
            ("image_size", self.patch_size * self.pool),
            ("hidden_size", self.num_attention_heads),
        )  # fmt: skip
        problems += [
            f"{name} must be a multiple of {of}, got {values[name]}"
            for name, of in multiples
            if values[name] % of
        ]
        if problems:
            raise ValueError("eva config: " + "; ".join(problems))

    @property
    def grid_side(self) -> int:
        """Patches per side of a picture."""
        return self.image_size // self.patch_size

    @property
    def target_side(self) -> int:
        """Features per side of a pooled target."""
        return self.grid_side // self.pool

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> EVAConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ValueError: unknown or missing keys, values of a wrong type; one error names them all.
        """
        return build(cls, values, "eva config")


class PatchEmbedding(nn.Module):
    """[B, 3, S, S] pixels to [B, N, D]."""

    def __init__(self, config: EVAConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Softmax attention of all tokens with all; q, k and v are one projection."""

    def __init__(self, config: EVAConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.proj(dit_attention(q, k, v).flatten(2))


class MLP(nn.Module):
    """Linear - exact GELU - Linear."""

    def __init__(self, config: EVAConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """x + LN(attention(x)), then x + LN(MLP(x)): the norms come after what they follow."""

    def __init__(self, config: EVAConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.norm1(self.attn(tokens))
        return tokens + self.norm2(self.mlp(tokens))


class EVATower(nn.Module):
    """Pixels [B, 3, S, S] to the features of their patches [B, N, D], without the class token.

    Pixels are RGB in [0, 1], normalized with `CLIP_MEAN` and `CLIP_STD`; S is `config.image_size`,
    for which alone the table of positions was learned. There is no final norm and no scaling.
    """

    def __init__(self, config: EVAConfig) -> None:
        super().__init__()
        self.config, D = config, config.hidden_size
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid_side**2, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random matrices, biases of zero, norms that only normalize."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features [B, N, D], row by row, in the dtype of the tower.

        Raises:
            ShapeError: the pictures are not RGB of the tower's size.
        """
        S = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, S, S):
            found = list(pixel_values.shape)
            raise ShapeError(f"eva_tower: pixel_values must be [B, 3, {S}, {S}], got {found}")
        patches = self.patch_embed(pixel_values)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = tokens + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return tokens[:, 1:]

    def target(self, pixel_values: Tensor) -> Tensor:
        """What the generator draws: features [B, D, h, w], averages of `config.pool` squared.

        Raises:
            ShapeError: as `forward`.
        """
        return pooled_grid(self(pixel_values), self.config.pool)


def pooled_grid(features: Tensor, pool: int) -> Tensor:
    """[B, D, h, w] of features [B, N, D] on a square grid, the average of `pool` x `pool` each.

    Nothing is normalized: a mean of 0 and a spread of 1 leave every float as it is.

    Raises:
        ShapeError: N is no square number, or `pool` does not divide its root.
    """
    zeros = features.new_zeros(features.shape[-1])
    pooled = clip_normalize(
        features, mode="standardize", mean=zeros, std=zeros + 1, pool=pool, eps=0.0
    )
    side = math.isqrt(pooled.shape[1])
    return pooled.transpose(1, 2).unflatten(2, (side, side))
