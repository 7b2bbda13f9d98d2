"""The pixel decoder of BLIP3-o: an SDXL UNet and VAE that are conditioned on CLIP features.

    u = null + g * (cond - null),   x <- x + (s' - s) * u,   picture = VAE(x / scaling factor)

Source: specs of BLIP3-o, section A.8; Podell et al., "SDXL" (2023); Sun et al., "Emu2" (2023). The
networks and the noise schedule are diffusers' own classes.
"""

# Shape suffixes: B = batch, N = feature tokens, D = their width, C = latent channels.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from clipflow.errors import InputError, SamplingError, ShapeError
from clipflow.models.blip3o.memory import unet_activations, vae_activations
from clipflow.models.blip3o.sdxl_config import (
    SDXL_SCHEDULER,
    check_scheduler,
    check_settings,
    check_unet,
    check_vae,
)
from clipflow.models.blip3o.sdxl_folder import (
    SDXLFolder,
    load_parts,
    open_folder,
    save_parts,
    without_encoder,
)
from clipflow.sampling.memory import require_bytes

if TYPE_CHECKING:  # diffusers takes a second to import
    from diffusers import EulerDiscreteScheduler

NATIVE_SIZE = 1024
Generators = torch.Generator | Sequence[torch.Generator] | None


class SDXLDecoder(nn.Module):
    """Draws pictures from CLIP features, with guidance away from `null_features`.

    Args:
        unet: diffusers' `UNet2DConditionModel`, with SDXL's text_time embedding.
        vae: diffusers' `AutoencoderKL`; its encoder is taken out.
        scheduler: settings of diffusers' `EulerDiscreteScheduler`; SDXL-base's when not given.

    Attributes:
        guided: whether `draw` looks at null features; it does.
        tiling: draw large pictures in tiles that overlap, which takes less memory and changes them
            a little (diffusers' `enable_tiling`).

    Raises:
        ValueError: the parts do not fit together.
    """

    guided: ClassVar[bool] = True

    def __init__(
        self, unet: nn.Module, vae: nn.Module, scheduler: Mapping[str, object] | None = None
    ) -> None:
        from diffusers import EulerDiscreteScheduler

        super().__init__()
        check_unet(unet, "unet")
        check_vae(vae, unet, "vae")
        settings = SDXL_SCHEDULER if scheduler is None else scheduler
        self.scheduler = check_settings(settings, EulerDiscreteScheduler, "scheduler")
        check_scheduler(self.scheduler, "scheduler")
        self.unet, self.vae = unet, without_encoder(vae)
        self.tiling = False

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> SDXLDecoder:
        """The decoder in a `diffusion-decoder` folder, whose form `sdxl_folder` describes.

        Args:
            folder: with `unet`, `vae` and `scheduler`; nothing in it is run.
            dtype: of the weights; as stored when not given. With float16 the VAE is float32 if its
                settings say that it overflows.
            device: of the weights.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a file is broken, of another class, or has other sizes than its weights.
        """
        found = open_folder(folder)
        unet, vae = load_parts(found, dtype=dtype, device=device)
        return cls(unet, vae, found.scheduler).eval()

    @staticmethod
    def meta(folder: str | Path) -> SDXLFolder:
        """What is in a folder, by its files' headers; raises as `from_folder`."""
        return open_folder(folder)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `from_folder` reads, in place of the one that is there.

        Raises:
            OSError: it cannot be written; what was there is left.
        """
        save_parts(Path(folder), self.unet, self.vae, self.scheduler)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def feature_width(self) -> int:
        """D, the width of features."""
        return self.unet.config.cross_attention_dim

    @property
    def upscale(self) -> int:
        """Picture pixels per latent cell and axis."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def native_size(self) -> int:
        """Side of the pictures that it was trained with, as its settings say."""
        side = self.unet.config.sample_size
        return side * self.upscale if type(side) is int else NATIVE_SIZE

    def activation_bytes(
        self, pictures: int, height: int, width: int, *, guided: bool = True
    ) -> int:
        """What `draw` needs at most beside the weights, without libraries' work space."""
        size = (height // self.upscale, width // self.upscale)
        rows = 2 * pictures if guided else pictures
        sampling = unet_activations(self.unet.config, rows, size, self.dtype)
        config, dtype = self.vae.config, self.vae.dtype
        return max(sampling, vae_activations(config, pictures, size, dtype, tiling=self.tiling))

    def forward(self, features: Tensor, null_features: Tensor | None = None, **options) -> Tensor:
        """The same as `draw`."""
        return self.draw(features, null_features, **options)

    @torch.no_grad()
    def draw(
        self,
        features: Tensor,
        null_features: Tensor | None = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Pictures [B, 3, height, width] in about [-1, 1], in the dtype of the VAE.

        Args:
            features: [B, N, D], or [B, D, h, w] with h * w = N; any dtype and device.
            null_features: [N, D], or of any form of `features`; not looked at without guidance.
            num_inference_steps: calls of the UNet, each on 2B rows [cond, null] with guidance.
            guidance_scale: guidance is on above 1.
            height: of the pictures in pixels, a multiple of `upscale`; `native_size` (1024 for
                published ones) when not given.
            width: as `height`.
            generator: of the starting noise, drawn in the decoder's dtype on the generator's
                device; with one for each picture, a picture does not depend on the others.
            latents: starting noise [B, C, height / upscale, width / upscale] instead, standard
                normal.
            progress: called with the number of steps done since it was last called.

        Raises:
            ShapeError: a tensor has another shape.
            InputError: an option is out of range, or there is guidance and no `null_features`.
            NotEnoughMemory: the device has no room for them.
            SamplingError: the pictures are not finite.
        """
        height, width = (self.native_size if side is None else side for side in (height, width))
        size = self._latent_size(height, width)
        scheduler = self._schedule(num_inference_steps)
        guided = _check_guidance(guidance_scale) > 1
        cond = self._tokens("features", features)
        null = self._null(null_features, cond) if guided else None
        needed = self.activation_bytes(len(cond), height, width, guided=guided)
        what = f"drawing {len(cond)} pictures of {height} x {width} pixels"
        require_bytes(needed, self.device, what)
        x = self._noise(len(cond), size, generator, latents) * scheduler.init_noise_sigma
        hidden = cond if null is None else torch.cat([cond, null])
        # The published pipeline's order: height, width, crop (0, 0), height, width.
        sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device).float()
        added = {
            "text_embeds": hidden.mean(dim=1),
            "time_ids": sizes.expand(len(hidden), -1),
        }
        for timestep in scheduler.timesteps:
            rows = scheduler.scale_model_input(x, timestep)
            rows = rows if null is None else torch.cat([rows, rows])
            (noise,) = self.unet(rows, timestep, hidden, added_cond_kwargs=added, return_dict=False)
            if null is not None:
                noise, away = noise.chunk(2)
                noise = away + guidance_scale * (noise - away)
            x = scheduler.step(noise, timestep, x, return_dict=False)[0]
            if progress is not None:
                progress(1)
        return self._picture(x)

    def _picture(self, latents: Tensor) -> Tensor:
        self.vae.use_tiling = self.tiling
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        pictures = self.vae.decode(scaled, return_dict=False)[0]
        if not pictures.isfinite().all():
            raise SamplingError(
                f"draw: the decoder gave pictures that are not finite in {self.dtype}"
            )
        return pictures

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        for name, side in (("height", height), ("width", width)):
            if (
                isinstance(side, bool)
                or not isinstance(side, int)
                or side < 1
                or side % self.upscale
            ):
                raise InputError(f"{name} must be a multiple of {self.upscale}, got {side!r}")
        return height // self.upscale, width // self.upscale

    def _schedule(self, steps: int) -> EulerDiscreteScheduler:
        """diffusers' scheduler, made for one call: it counts the steps."""
        from diffusers import EulerDiscreteScheduler

        most = self.scheduler.get("num_train_timesteps", 1000)
        if type(steps) is not int or not 1 <= steps <= most:
            raise InputError(f"num_inference_steps must be from 1 to {most}, got {steps!r}")
        scheduler = EulerDiscreteScheduler(**self.scheduler)
        scheduler.set_timesteps(steps, device=self.device)
        scheduler.set_begin_index(0)
        return scheduler

    def _tokens(self, name: str, features: Tensor) -> Tensor:
        """[B, N, D] of features in either form, as the UNet wants them."""
        tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        if tokens.ndim != 3 or tokens.shape[2] != self.feature_width or 0 in tokens.shape:
            raise ShapeError(
                f"draw: {name} must be [B, N, {self.feature_width}] or "
                f"[B, {self.feature_width}, h, w], got {list(features.shape)}"
            )
        return tokens.to(self.device, self.dtype)

    def _null(self, null: Tensor | None, cond: Tensor) -> Tensor:
        if null is None:
            raise InputError("null_features must be given with a guidance_scale above 1, got None")
        tokens = self._tokens("null_features", null[None] if null.ndim == 2 else null)
        if tokens.shape[1] != cond.shape[1] or len(tokens) not in (1, len(cond)):
            raise ShapeError(
                f"draw: null_features must be {list(cond.shape[1:])} or {list(cond.shape)} as the "
                f"features, got {list(null.shape)}"
            )
        return tokens.expand(len(cond), -1, -1)

    def _noise(
        self, B: int, size: tuple[int, int], generator: Generators, latents: Tensor | None
    ) -> Tensor:
        shape = (B, self.unet.config.in_channels, *size)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ShapeError(f"draw: latents must be {list(shape)}, got {list(latents.shape)}")
            return latents.to(self.device, self.dtype)
        if not isinstance(generator, list | tuple):
            return self._draw_noise(shape, generator)
        if len(generator) != B:
            raise InputError(f"generator must be one, or {B} as pictures, got {len(generator)}")
        return torch.cat([self._draw_noise((1, *shape[1:]), each) for each in generator])

    def _draw_noise(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise InputError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        source = self.device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=source, dtype=self.dtype)
        return noise.to(self.device)


def _check_guidance(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InputError(f"guidance_scale must be a finite number, got {scale!r}")
    return scale
