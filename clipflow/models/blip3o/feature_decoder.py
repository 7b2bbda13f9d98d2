"""A pixel decoder for small models: CLIP features are the latents of a DC-AE, after a projection.

It has the calls of `SDXLDecoder`, so that a model can hold either, and nothing to sample.
"""

# Shape suffixes: B = batch, N = h*w feature tokens, D = their width, C = latent channels.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.errors import InputError, ShapeError
from clipflow.models.dc_ae.config import DecoderConfig
from clipflow.models.dc_ae.decoder import DCAEDecoder
from clipflow.models.folders.checkpoint import Weights, save_folder
from clipflow.models.folders.loading import FolderFormat, load_model, open_model
from clipflow.models.folders.rules import check_rules, positive
from clipflow.models.folders.saved_config import SavedConfig

MODEL_TYPE = "clipflow_feature_decoder"


@dataclass(frozen=True, kw_only=True)
class FeatureDecoderConfig(SavedConfig):
    """Sizes of a `FeatureDecoder`.

    Attributes:
        feature_width: D.
        grid_side: of the features that it was trained with; `native_size` follows from it.
        spread: a feature is projected to spread x spread latents.
        decoder: of the DC-AE decoder.

    Raises:
        ValueError: sizes that do not fit together; one error names them all.
    """

    model_type: ClassVar = MODEL_TYPE
    called: ClassVar = "feature decoder config"

    feature_width: int
    grid_side: int
    decoder: DecoderConfig
    spread: int = 1

    def __post_init__(self) -> None:
        channels, latent = self.decoder.block_out_channels, self.decoder.latent_channels
        numbers = {
            "feature_width": self.feature_width,
            "grid_side": self.grid_side,
            "spread": self.spread,
            "decoder.latent_channels": latent,
            "decoder.attention_head_dim": self.decoder.attention_head_dim,
        }
        whole = latent > 0 and bool(channels) and channels[-1] % latent == 0
        text = f"decoder's smallest stage must be a multiple of {latent} wide, got {list(channels)}"
        rules = [*positive(numbers), *self.decoder.rules(), (text, not whole)]
        check_rules(rules, "feature decoder config")


class FeatureDecoder(DCAEDecoder):
    """Draws features at once: Linear(D, C) on each token, then the DC-AE decoder.

    Where features are spread, it is Linear(D, C * spread^2), whose outputs are ordered channel,
    row, column.

    Attributes:
        guided: whether `draw` looks at null features; it does not.
    """

    guided: ClassVar[bool] = False

    def __init__(self, config: FeatureDecoderConfig) -> None:
        super().__init__(config.decoder)
        self.sizes = config
        values = config.decoder.latent_channels * config.spread**2
        self.proj = nn.Linear(config.feature_width, values)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> FeatureDecoder:
        """The decoder in a folder that `save` wrote, in evaluation mode.

        Args:
            folder: config.json and safetensors.
            dtype: not looked at: weights are float32 always, as half precision shows.
            device: of the weights.

        Raises:
            FileNotFoundError: no such folder, or no config.json or weights in it.
            ValueError: a damaged file, other keys or shapes, or a weight that is not finite.
        """
        return load_model(cls, folder, _FORMAT, device=device)

    @classmethod
    def meta(cls, folder: str | Path) -> tuple[FeatureDecoder, Weights]:
        """The decoder in a folder on the meta device, and its weights; raises as `from_folder`."""
        model, weights, _ = open_model(cls, folder, _FORMAT)
        return model, weights

    def save(self, folder: str | Path) -> None:
        """Write a folder that `from_folder` reads; see `save_folder` for what it promises."""
        save_folder(folder, self.sizes.to_dict(), self.state_dict())

    @property
    def device(self) -> torch.device:
        return self.proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.proj.weight.dtype

    @property
    def feature_width(self) -> int:
        """D, the width of features."""
        return self.sizes.feature_width

    @property
    def upscale(self) -> int:
        """Picture pixels per feature and axis."""
        return self.config.upscale * self.sizes.spread

    @property
    def native_size(self) -> int:
        """Side of pictures of as many features as it was trained with."""
        return self.sizes.grid_side * self.upscale

    def forward(self, features: Tensor) -> Tensor:
        """`draw` with a gradient; without one it is the same."""
        return self.draw(features)

    def draw(
        self,
        features: Tensor,
        null_features: Tensor | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Pictures [B, 3, h * upscale, w * upscale] in about [-1, 1], float32.

        Args:
            features: [B, D, h, w], or [B, N, D] of a square grid; any dtype and device.
            null_features, generator, progress: not looked at; nothing is sampled here.
            num_inference_steps, guidance_scale, latents: must be None.
            height, width: must be None or what comes out.

        Raises:
            ShapeError: `features` have another shape.
            InputError: an option is given that a decoder without sampling does not have.
            NotEnoughMemory: the pictures do not fit; see `DCAEDecoder.decode`.
        """
        sampling = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "latents": latents,
        }
        given = [name for name, value in sampling.items() if value is not None]
        if given:
            raise InputError(
                f"{given[0]}: this model's decoder draws at once; it must not be given"
            )
        tokens, grid = self._tokens(features)
        sizes = {"height": (height, grid[0]), "width": (width, grid[1])}
        for name, (side, cells) in sizes.items():
            if side is not None and side != cells * self.upscale:
                raise InputError(
                    f"{name} must be {cells * self.upscale} for these features, got {side!r}"
                )
        tokens = self.proj(tokens.to(self.device, self.dtype))
        latents = F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), self.sizes.spread)
        return self.decode(latents.contiguous())

    def _tokens(self, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(features [B, N, D], their grid)."""
        grid = tuple(features.shape[2:])
        tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        if features.ndim == 3:
            grid = (math.isqrt(features.shape[1]),) * 2
        if tokens.ndim != 3 or tokens.shape[1:] != (math.prod(grid), self.feature_width):
            D = self.feature_width
            raise ShapeError(
                f"draw: features must be [B, {D}, h, w] or [B, side * side, {D}], "
                f"got {list(features.shape)}"
            )
        return tokens, grid


def _bounds(config: FeatureDecoderConfig) -> dict[str, object]:
    """Numbers of a configuration that tensors have."""
    channels, depths = config.decoder.block_out_channels, config.decoder.layers_per_block
    return {
        "feature_width": config.feature_width,
        "spread": config.spread,
        "decoder.latent_channels": config.decoder.latent_channels,
        **{f"decoder.block_out_channels[{i}]": width for i, width in enumerate(channels)},
        **{f"decoder.layers_per_block[{i}]": depth for i, depth in enumerate(depths)},
    }


_FORMAT = FolderFormat(
    map_names=lambda names: {name: name for name in names},
    read_config=lambda values, shapes: FeatureDecoderConfig.from_dict(values),
    sizes=_bounds,
    finish=lambda model, device: None,
    wide=("",),
)
