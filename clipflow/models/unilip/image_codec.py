"""The parts of UniLIP that see pictures and draw them: a tokenizer of pictures.

    pixels -> vision tower -> projector -> features -> clip_down -> latents -> decoder -> pixels

`UniLIPModel` has them among others; `ImageTokenizer` is them alone, as the tokenizer checkpoints
are (specs of UniLIP, sections 1d and 5.2).
"""

# Shape suffixes: B = batch, N = image tokens, H = LM width, C = latent channels.

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from clipflow.models.folders.saved_config import SavedConfig
from clipflow.models.unilip.config import DecoderConfig, UniLIPConfig, VisionConfig
from clipflow.models.unilip.pixel_decoder import PixelDecoder
from clipflow.models.unilip.vision import VisionTower, make_projector, pixel_shuffle

MODEL_TYPE = "clipflow_unilip_tokenizer"
# The children of a codec, and what their parameters' names begin with.
PARTS = ("vision_tower", "multi_modal_projector", "vae_decoder")


class ImageCodec(nn.Module):
    """What a module with the three `PARTS` and a configuration of them can do with pictures."""

    config: UniLIPConfig | TokenizerConfig
    vision_tower: VisionTower
    multi_modal_projector: nn.Sequential
    vae_decoder: PixelDecoder

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """CLIP features [B, N, H] of `pixel_values` [B, 3, S, S] (normalized by mean and std)."""
        patches = self.vision_tower(pixel_values)[:, 1:]
        return self.multi_modal_projector(pixel_shuffle(patches, self.config.vision.shuffle))

    def clip_down(self, features: Tensor) -> Tensor:
        """Latents [B, C, h, w] of `features` [B, N, H]; multiply by `unilip_factor` to train."""
        return self.vae_decoder.clip_down(features)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, S', S'] in about [-1, 1]; divide sampled latents by `unilip_factor`."""
        return self.vae_decoder.decode(latents)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(SavedConfig):
    """Sizes of an `ImageTokenizer`; the fields are those of `UniLIPConfig`.

    `text_width` is the width of the features: the language model's that they are made for.

    Raises:
        ValueError: sizes that do not fit together.
    """

    model_type: ClassVar = MODEL_TYPE
    called: ClassVar = "tokenizer config"

    vision: VisionConfig
    decoder: DecoderConfig
    text_width: int
    output_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def __post_init__(self) -> None:
        vision, stages = self.vision, len(self.decoder.block_out_channels)
        lists = (self.decoder.block_types, self.decoder.layers_per_block)
        whole = {
            **{f"vision.{k}": v for k, v in dataclasses.asdict(vision).items()},
            **{f"image_std[{i}]": v for i, v in enumerate(self.image_std)},
            "text_width": self.text_width,
            "output_size": self.output_size,
            "decoder.latent_channels": self.decoder.latent_channels,
        }
        problems = [f"{name} must be above 0, got {v}" for name, v in whole.items() if v <= 0]
        if not problems and vision.image_size % (vision.shuffle * vision.patch_size):
            problems.append("vision.image_size must be a multiple of shuffle x patch_size")
        if not problems and vision.hidden_size % vision.num_attention_heads:
            problems.append("vision.hidden_size must be a multiple of num_attention_heads")
        if any(len(entries) != stages for entries in (*lists, self.decoder.qkv_multiscales)):
            problems.append(f"decoder lists must have {stages} entries as block_out_channels")
        if problems:
            raise ValueError("tokenizer config: " + "; ".join(problems))

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @classmethod
    def of_model(cls, config: UniLIPConfig) -> TokenizerConfig:
        """That of the tokenizer inside a whole model."""
        return cls(
            vision=config.vision,
            decoder=config.decoder,
            text_width=config.text.hidden_size,
            output_size=config.output_size,
            image_mean=config.image_mean,
            image_std=config.image_std,
        )


class ImageTokenizer(ImageCodec):
    """The three `PARTS` alone, under the names that they have in a whole model."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = make_projector(config.vision, config.text_width)
        self.vae_decoder = PixelDecoder(config.decoder, config.text_width)
