"""InternViT, the CLIP-like vision tower, with pixel shuffle and the projector to the LM's width.

Source: Chen et al., "InternVL" (2023); parameter names are those of published checkpoints.
"""

# Shape suffixes: B = batch, N = patches, C = vision width.

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.errors import ShapeError
from clipflow.models.unilip.config import VisionConfig


class VisionEmbeddings(nn.Module):
    """Patches, the class token and learned positions (resized for other image sizes)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        C, self.side = config.hidden_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, C, config.patch_size, stride=config.patch_size)
        self.class_embedding = nn.Parameter(torch.randn(1, 1, C))
        self.position_embedding = nn.Parameter(torch.randn(1, self.side**2 + 1, C))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values)
        grid = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + self._positions(grid).to(tokens.dtype)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if tuple(grid) == (self.side, self.side):
            return self.position_embedding
        first, rest = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        table = rest.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2).float()
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([first, table.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class VisionLayer(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel before it is added."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.norm1 = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.ls1 = nn.Parameter(torch.ones(C))
        self.ls2 = nn.Parameter(torch.ones(C))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1 * self.attn(self.norm1(tokens))
        return tokens + self.ls2 * self.mlp(self.norm2(tokens))


class VisionTower(nn.Module):
    """[B, 3, S, S] pixels to [B, 1 + N, C] tokens, class token first; no final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode `pixel_values` [B, 3, S, S]; S must be a multiple of `shuffle` patches.

        Raises:
            ShapeError: the pictures are not square RGB of such a size.
        """
        size, step = pixel_values.shape[-2:], self.config.shuffle * self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or size[0] != size[1]:
            found = list(pixel_values.shape)
            raise ShapeError(f"vision_tower: pixel_values must be [B, 3, S, S], got {found}")
        if size[0] % step or not size[0]:
            raise ShapeError(f"vision_tower: S must be a multiple of {step}, got {size[0]}")
        tokens = self.embeddings(pixel_values)
        for layer in self.encoder["layers"]:
            tokens = layer(tokens)
        return tokens


def pixel_shuffle(tokens: Tensor, factor: int) -> Tensor:
    """Fold each `factor` x `factor` patch square into one token: [B, N, C] -> [B, N/f^2, f^2 C].

    The channel of patch (i, j) in its square is (i * factor + j) * C + c.
    """
    side = int(tokens.shape[1] ** 0.5)
    grid = tokens.unflatten(1, (side // factor, factor, side // factor, factor))
    return grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def make_projector(config: VisionConfig, text_width: int) -> nn.Sequential:
    """LayerNorm - Linear - GELU - Linear from the shuffled vision width to the LM's width."""
    wide = config.shuffle**2 * config.hidden_size
    return nn.Sequential(
        nn.LayerNorm(wide),
        nn.Linear(wide, text_width),
        nn.GELU(),
        nn.Linear(text_width, text_width),
    )
