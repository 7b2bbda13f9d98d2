"""Sizes of a DC-AE decoder."""

from __future__ import annotations

from dataclasses import dataclass

from clipflow.models.folders.rules import Rule

BLOCKS = ("ResBlock", "EfficientViTBlock")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """DC-AE decoder; stages go from the largest picture to the smallest, as in diffusers."""

    latent_channels: int
    attention_head_dim: int
    block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    qkv_multiscales: tuple[tuple[int, ...], ...]

    @property
    def upscale(self) -> int:
        """Picture pixels per latent cell and axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    def rules(self) -> list[Rule]:
        """What must fit together."""
        stages = len(self.block_out_channels)
        lengths = [len(self.block_types), len(self.layers_per_block), len(self.qkv_multiscales)]
        blocks = sorted(set(self.block_types) - set(BLOCKS))
        return [
            (
                f"decoder lists must have {stages} entries as block_out_channels, got {lengths}",
                lengths != [stages] * 3,
            ),
            (f"decoder.block_types must be of {list(BLOCKS)}, got {blocks}", bool(blocks)),
        ]
