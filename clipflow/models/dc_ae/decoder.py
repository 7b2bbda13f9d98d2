"""Pictures of latents: diffusers' DC-AE decoder, fused, drawn within a budget of memory.

Source: Chen et al., "Deep Compression Autoencoder" (2024).
"""

# Shape suffixes: B = batch, C = latent channels, h, w = the latent grid.

import warnings
from functools import partial

import torch
from torch import Tensor, nn

from clipflow.acceleration.replace import accelerate
from clipflow.errors import AccelerationError, InputError
from clipflow.models.dc_ae.config import DecoderConfig
from clipflow.models.dc_ae.memory import DECODE_BUDGET, WORK_BYTES, choose_parts, decode_bytes
from clipflow.models.dc_ae.tiling import decode_tiled
from clipflow.sampling.memory import available_bytes, require_bytes


class DCAEDecoder(nn.Module):
    """The decoder as the child `decoder`, under diffusers' names.

    It is accelerated in place where diffusers is as we know it, else a warning says so;
    `clipflow.Acceleration.of(dc_ae.decoder).undo()` makes it stock again.

    Attributes:
        decode_budget: bytes of activations above which `decode` goes part by part, 1 GiB.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_dc import Decoder

        self.config = config
        self.decoder = Decoder(
            in_channels=3,
            latent_channels=config.latent_channels,
            attention_head_dim=config.attention_head_dim,
            block_type=config.block_types,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            qkv_multiscales=tuple(tuple(scales) for scales in config.qkv_multiscales),
            norm_type="rms_norm",
            act_fn="silu",
            upsample_block_type="interpolate",
        )
        try:
            accelerate(self.decoder)
        except AccelerationError as error:  # another diffusers: slower, the same pictures
            warnings.warn(f"decoder: runs as diffusers has it; {error}", stacklevel=2)
        self.decode_budget = DECODE_BUDGET

    def decode(self, latents: Tensor, *, tile_size: int | None = None) -> Tensor:
        """Pictures [B, 3, S, S] in about [-1, 1] of `latents` [B, C, h, w], float32 or as given.

        Args:
            latents: [B, C, h, w]; sampled ones divided by the factor that they were trained with.
            tile_size: side in pixels of the tiles that the picture is drawn in, which saves memory
                and gives the same picture up to rounding. When not given, pictures are drawn whole
                and at once as long as `decode_bytes` stays within `decode_budget` and the free
                memory, else one by one, else in tiles. With a gradient, always whole.

        Raises:
            InputError: `tile_size` is below 1.
            NotEnoughMemory: not even the smallest tiles fit.
        """
        if tile_size is not None and tile_size < 1:
            raise InputError(f"decode: tile_size must be at least 1, got {tile_size}")
        rows = len(latents)
        if tile_size is None and not torch.is_grad_enabled():
            rows, tile_size = self._parts(latents)
        if tile_size is None and rows >= len(latents):
            return self.decoder(latents)
        draw = self.decoder if tile_size is None else partial(self._draw_tiled, tile_size)
        return torch.cat([draw(part) for part in latents.split(rows)])

    def _parts(self, latents: Tensor) -> tuple[int, int | None]:
        """(pictures at a time, tile size or None) that the free memory has room for."""
        B, _, h, w = latents.shape
        dtype, device = latents.dtype, latents.device
        free = available_bytes(device)
        budget = self.decode_budget if free is None else min(self.decode_budget, free)
        rows, tile_size = choose_parts(self.config, (B, h, w), dtype, budget)
        needed = decode_bytes(self.config, h, w, min(rows, B), tile_size=tile_size, dtype=dtype)
        height, width = h * self.config.upscale, w * self.config.upscale
        drawn = max(0, B - rows) * 3 * height * width * dtype.itemsize
        # Work space is a bound for large models; for it alone nothing is refused.
        needed += drawn - WORK_BYTES
        require_bytes(needed, device, f"drawing {B} pictures of {height} x {width} pixels")
        return rows, tile_size

    def _draw_tiled(self, tile_size: int, latents: Tensor) -> Tensor:
        return decode_tiled(self.decoder, latents, tile_size)
