"""Embeddings of time and place for diffusion transformers."""

# Shape suffixes: B = batch, D = channels.

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIME_FREQUENCIES = 256


def sinusoidal_time(timestep: Tensor, channels: int = TIME_FREQUENCIES) -> Tensor:
    """Sinusoids of `timestep` [B] (0..999) in the order [cos | sin]; float32 [B, channels]."""
    half = channels // 2
    exponent = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
    angle = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_position_table(
    height: int, width: int, channels: int, *, base_size: int, scale: float = 1.0
) -> Tensor:
    """Fixed 2-D sin-cos table: the first half of the channels tells the column, the second the row.

    Args:
        height, width: the token grid.
        channels: D, a multiple of 4.
        base_size: side of the training grid; larger grids are squeezed into its range.
        scale: divides the coordinates further ("interpolation scale").

    Returns:
        float32 [height * width, D], row-major; computed in float64.

    Source: specification of the SANA position table (sin before cos, columns first).
    """
    frequency = 10000.0 ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))

    def encode(size: int) -> Tensor:
        place = torch.arange(size, dtype=torch.float64) / (size / base_size) / scale
        angle = place[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    column = encode(width)[None, :, :].expand(height, width, -1)
    row = encode(height)[:, None, :].expand(height, width, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()


def rope_table_1d(length: int, width: int, *, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Angles of rotary embedding by position, for `clipflow.ops.qk_norm_rope`.

    Args:
        length: positions 0 .. length - 1.
        width: K, of a head; even.
        base: pair m turns by position * base ** (-2 m / K).

    Returns:
        (cos, sin), float32 [length, K / 2] each; computed in float64.

    Source: Su et al., "RoFormer" (2021), section 3.2.2.
    """
    frequency = base ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rope_table_2d(
    height: int,
    grid_width: int,
    width: int,
    *,
    base: float = 10000.0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Angles of rotary embedding by place on a grid: even pairs turn by row, odd ones by column.

    Args:
        height, grid_width: the token grid, row-major.
        width: K, of a head; a multiple of 4.
        base: pairs 2 i and 2 i + 1 turn by row and column times base ** (-4 i / K).
        device: where the table is made.

    Returns:
        (cos, sin), float32 [height * grid_width, K / 2] each; computed in float64.

    Source: Zhuo et al., "Lumina-Next" (2024), section 2.1, without its third axis.
    """
    kind = {"dtype": torch.float64, "device": device}
    frequency = base ** (-torch.arange(width // 4, **kind) / (width // 4))
    row = torch.arange(height, **kind)[:, None, None] * frequency
    column = torch.arange(grid_width, **kind)[None, :, None] * frequency
    pairs = torch.stack(torch.broadcast_tensors(row, column), dim=-1)
    angle = pairs.reshape(height * grid_width, width // 2)
    return angle.cos().float(), angle.sin().float()


class TimestepEmbedding(nn.Module):
    """Sinusoids, then Linear - SiLU - Linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIME_FREQUENCIES, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed `timestep` [B] (0..999); returns [B, D] in the dtype of the weights."""
        waves = sinusoidal_time(timestep).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class AdaLNSingle(nn.Module):
    """One time embedding and the six modulation rows that every block shares.

    Source: Chen et al., "PixArt-alpha" (2023), section 2.3, adaLN-single.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedding(channels)})
        self.linear = nn.Linear(channels, 6 * channels)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return (modulation [B, 6, D], embedding [B, D]) of `timestep` [B]."""
        embedding = self.emb["timestep_embedder"](timestep)
        return self.linear(F.silu(embedding)).unflatten(-1, (6, -1)), embedding
