"""BLIP3-o: Qwen2.5-VL sees and reads, a DiT draws CLIP features, a decoder draws pictures of them.

Data flow, specs of BLIP3-o, sections A.1 and A.4:

    understanding   pixels -> features -> written into the prompt -> LM -> logits
    condition       prompt (+ features) + learned queries -> LM -> the queries' last states
    generation      noise, condition -> DiT, Euler -> CLIP features -> decoder -> pixels
"""

# Shape suffixes: B = batch, T = prompt tokens, Q = queries, L = T + Q, N = features of a picture,
# H = LM width, C = channels of CLIP features, V = vocabulary.

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.errors import InputError, ShapeError
from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.models.blip3o.decoders import FOLDER as DECODER_FOLDER
from clipflow.models.blip3o.decoders import PixelDecoder, load_decoder
from clipflow.models.blip3o.eva import EVATower
from clipflow.models.blip3o.loading import folder_format
from clipflow.models.blip3o.published import MODEL_TYPES as PUBLISHED_TYPES
from clipflow.models.blip3o.qwen import (
    make_language_model,
    make_vision,
    patches_of,
    plain_positions,
)
from clipflow.models.condition import Condition
from clipflow.models.dits.lumina import LuminaTransformer
from clipflow.models.folders import checkpoint
from clipflow.models.folders.loading import load_model
from clipflow.models.language.beginnings import find_places
from clipflow.models.language.positions import Grid, prompt_positions


class BLIP3oModel(nn.Module):
    """All parts of a BLIP3-o checkpoint but for what makes pictures of the features.

    `decoder` makes them; it is None where a checkpoint comes without.
    """

    def __init__(self, config: BLIP3oConfig) -> None:
        super().__init__()
        self.config = config
        H, V = config.text.hidden_size, config.text.vocab_size
        self.visual = make_vision(config.vision, H)
        self.language_model = make_language_model(config.text)
        tied = config.text.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(H, V, bias=False)
        self.latent_queries = nn.Parameter(torch.randn(1, config.n_query, H))
        self.dit = LuminaTransformer(config.dit)
        self.clip_target = None if config.target is None else EVATower(config.target)
        self.decoder: PixelDecoder | None = None

    @property
    def device(self) -> torch.device:
        return self.latent_queries.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model."""
        return self.latent_queries.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the features that are drawn."""
        side = self.config.latent_side
        return (self.config.dit.in_channels, side, side)

    @property
    def image_token(self) -> int:
        """Id of the token that stands where image features go."""
        return self.config.tokens.image_pad

    def save_pretrained(self, directory: str | Path, *, max_shard_size: int | str = "2GB") -> None:
        """Write config.json and safetensors, and the decoder, if there is one, in a folder of it.

        Each of both is written as `checkpoint.save_folder` says; config.json comes last.
        """
        if self.decoder is not None:
            self.decoder.save(Path(directory) / DECODER_FOLDER)
        state = {n: t for n, t in self.state_dict().items() if not n.startswith("decoder.")}
        checkpoint.save_folder(
            directory, self.config.to_dict(), state, max_shard_size=max_shard_size
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        with_target: bool = False,
        with_decoder: bool = True,
    ) -> BLIP3oModel:
        """The model in `directory`, ours or a published one, in evaluation mode.

        Args:
            directory: written by `save_pretrained`, or a BLIP3-o checkpoint in safetensors.
            dtype: of the parameters; as stored when not given. The rotary tables stay float32.
            device: where the parameters go.
            with_target: read the EVA-CLIP tower of a published checkpoint that holds it; training
                needs it, drawing and reading do not.
            with_decoder: read the pixel decoder in `diffusion-decoder`, if that is there.

        Raises:
            FileNotFoundError: no such folder, or no config.json or weights in it.
            ValueError: a damaged file, other keys or shapes than the model's, a weight that is NaN
                or infinite, or a decoder of other features.
        """
        found = folder_format(with_target=with_target)
        model = load_model(cls, directory, found, dtype=dtype, device=device)
        folder = Path(directory) / DECODER_FOLDER
        if with_decoder and folder.is_dir():
            model.decoder = load_decoder(folder, dtype=dtype, device=device)
            _check_decoder(model.decoder, model.config, folder)
            if checkpoint.read_config(directory).get("model_type") in PUBLISHED_TYPES:
                size = model.decoder.native_size  # what published ones say of it is there alone
                model.config = dataclasses.replace(model.config, output_size=size)
        return model

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Features [B, N, H] of `pixel_values` [B, 3, S, S], normalized by mean and std.

        N is (S / 28) squared for published models, row by row; the sides may differ.

        Raises:
            ShapeError: sides that are no multiples of a feature's pixels.
        """
        patches, grid_thw = patches_of(pixel_values, self.config.vision)
        return self.encode_patches(patches, grid_thw).unflatten(0, (len(pixel_values), -1))

    def encode_patches(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """Features [sum of h w / 4, H] of pictures of any sizes, one after the other.

        Args:
            patches: [patches, 3 * temporal_patch_size * P * P], as `patches_of` and Qwen2.5-VL's
                own processor order them.
            grid_thw: [pictures, 3] int64: 1, and the patches per column and row.
        """
        patches = patches.to(self.device, self.visual.dtype)
        return self.visual(patches, grid_thw=grid_thw.to(self.device)).pooler_output

    def embed_prompt(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Token embeddings [B, T, H] with the image features written at the image positions.

        Args:
            input_ids: [B, T].
            image_features: [..., H] of all pictures, row by row; None without pictures.

        Raises:
            ShapeError: the prompts have not as many image positions as there are features.
        """
        embeddings = self.language_model.embed_tokens(input_ids)
        if image_features is None:
            return embeddings
        places = input_ids == self.config.tokens.image_pad
        wanted = image_features.shape[:-1].numel()
        if not torch.compiler.is_compiling() and int(places.sum()) != wanted:
            raise ShapeError(
                f"blip3o: the prompts must have {wanted} image positions for image_features "
                f"{list(image_features.shape)}, got {int(places.sum())}"
            )
        places = places.unsqueeze(-1).expand_as(embeddings)
        return embeddings.masked_scatter(places, image_features.to(embeddings.dtype))

    def encode_condition(
        self, input_ids: Tensor, attention_mask: Tensor, image_features: Tensor | None = None
    ) -> Condition:
        """The language model's last states of the queries after a prompt; all of them count.

        Positions are 0, 1, ... on all three axes, also where the prompt has pictures, as published
        models were trained (specs section A.4).

        Args:
            input_ids: [B, T], ending with the id `image_start`, padded on either side.
            attention_mask: [B, T], 1 where a token is real.
            image_features: [B, N, H] for editing; None for text to image.
        """
        embeddings = self.embed_prompt(input_ids, image_features)
        queries = self.latent_queries.expand(len(input_ids), -1, -1).to(embeddings.dtype)
        mask = F.pad(attention_mask, (0, queries.shape[1]), value=1)
        # Without padding no mask, so that attention can take its fastest kernel.
        padded = torch.compiler.is_compiling() or not bool(attention_mask.all())
        given = torch.cat([embeddings, queries], dim=1)
        hidden = self.read(given, mask if padded else None)[:, -queries.shape[1] :]
        return Condition(hidden, torch.ones_like(hidden[..., 0], dtype=torch.bool))

    def null_condition(self) -> Tensor:
        """The condition [Q, H] of no prompt at all: zeros, for all pictures the same."""
        return self.latent_queries.new_zeros(self.latent_queries.shape[1:])

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor, grids: Sequence[Grid] | None = None
    ) -> Tensor:
        """Positions [3, B, T] for understanding, where pictures have rows and columns.

        Args:
            input_ids: [B, T], padded on either side.
            attention_mask: [B, T], 1 where a token is real.
            grids: (rows, columns) of the features of each picture, in the order of the prompts;
                square ones of the native size when not given.
        """
        image = input_ids == self.image_token
        if grids is None:
            side = self.config.image_size // self.config.vision.feature_pixels
            grids = [(side, side)] * (int(image.sum()) // side**2)
        order = attention_mask.argsort(dim=-1, descending=True, stable=True)  # real tokens first
        places = find_places(image.gather(1, order), [math.prod(grid) for grid in grids], None)
        found = prompt_positions(places, grids, input_ids.shape[1]).to(input_ids.device)
        return found.gather(2, order.argsort(dim=-1).expand(3, -1, -1))

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_features: Tensor | None = None,
        grids: Sequence[Grid] | None = None,
    ) -> Tensor:
        """Next-token logits [B, T, V] of a prompt, with images or without.

        Args:
            input_ids, attention_mask: [B, T].
            image_features: [..., H] of all pictures.
            grids: as of `positions`.
        """
        positions = self.positions(input_ids, attention_mask, grids)
        embeddings = self.embed_prompt(input_ids, image_features)
        return self.head(self.read(embeddings, attention_mask, positions))

    def read(
        self, embeddings: Tensor, attention_mask: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """The LM's final hidden states [B, L, H] of `embeddings` [B, L, H]; causal.

        Args:
            embeddings: of the prompt.
            attention_mask: [B, L], 1 where a position is real; None where all are.
            positions: [3, B, L] of the rotary embedding; 0, 1, ... on all axes when not given.
        """
        if positions is None and attention_mask is not None:
            positions = plain_positions(attention_mask)
        # A dict is a mask that is ready: this one lets attention be causal by itself.
        return self.language_model(
            inputs_embeds=embeddings,
            attention_mask={"full_attention": None} if attention_mask is None else attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the LM's final hidden states [..., H]."""
        weight = self.language_model.embed_tokens.weight if self.lm_head is None else None
        return self.lm_head(hidden) if weight is None else F.linear(hidden, weight)

    def decode(
        self, latents: Tensor, null_features: Tensor | None = None, **options: object
    ) -> Tensor:
        """Pictures [B, 3, S, S] in about [-1, 1] of CLIP features [B, C, h, w].

        Args:
            latents: the features, as sampled.
            null_features: what guidance leads away from; see `SDXLDecoder.draw`.
            options: of the decoder's `draw`.

        Raises:
            InputError: the checkpoint came without a decoder, or an option cannot be.
        """
        if self.decoder is None:
            raise InputError(
                f"this BLIP3-o has no pixel decoder, so it cannot draw; its folder must hold one "
                f"in {DECODER_FOLDER}/"
            )
        return self.decoder.draw(latents, null_features, **options)


def _check_decoder(decoder: PixelDecoder, config: BLIP3oConfig, folder: Path) -> None:
    if decoder.feature_width != config.dit.in_channels:
        raise ValueError(
            f"load: {folder} must draw features {config.dit.in_channels} wide as the diffusion "
            f"transformer's, got {decoder.feature_width}"
        )
