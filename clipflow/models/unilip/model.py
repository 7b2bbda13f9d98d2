"""UniLIP: one model that sees (vision tower + LM), and draws (LM + connector + DiT + decoder).

Data flow, specs of UniLIP section 1:

    understanding   pixels -> features -> written into the prompt -> LM -> logits
    condition       prompt (+ features) + learned queries -> LM -> connector -> projector
    generation      noise, condition -> DiT, solver -> latents / unilip_factor -> decoder -> pixels
    reconstruction  pixels -> features -> clip_down -> decoder -> pixels
"""

# Shape suffixes: B = batch, T = prompt tokens, Q = queries, L = T + Q, N = image tokens, H = LM
# width, C = latent channels, V = vocabulary.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2Model

from clipflow.errors import ShapeError
from clipflow.models.condition import Condition
from clipflow.models.dits.sana import SanaTransformer
from clipflow.models.folders.saved_model import SavedModel
from clipflow.models.unilip.config import TextConfig, UniLIPConfig
from clipflow.models.unilip.connector import Connector
from clipflow.models.unilip.image_codec import ImageCodec
from clipflow.models.unilip.loading import FORMAT
from clipflow.models.unilip.pixel_decoder import PixelDecoder
from clipflow.models.unilip.vision import VisionTower, make_projector


class UniLIPModel(ImageCodec, SavedModel):
    """All parts of a UniLIP checkpoint, under the reference's parameter names (less "model.")."""

    folder_format = FORMAT

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        self.config = config
        H = config.text.hidden_size
        text = _qwen2_config(config.text)
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = make_projector(config.vision, H)
        self.language_model = Qwen2Model(text)
        tied = config.text.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(H, config.text.vocab_size, bias=False)
        self.latent_queries = nn.Parameter(torch.randn(1, config.n_query, H) * H**-0.5)
        self.llm_connector = Connector(text, config.connect_layer)
        self.projector = nn.Linear(H, config.dit.caption_channels)
        self.dit = SanaTransformer(config.dit)
        self.vae_decoder = PixelDecoder(config.decoder, H)

    @property
    def device(self) -> torch.device:
        """Where the model is; parts of it may wait elsewhere while they do not run."""
        return self.latent_queries.device

    @property
    def dtype(self) -> torch.dtype:
        """What all but the decoder computes in."""
        return self.latent_queries.dtype

    def null_condition(self) -> None:
        """The condition of no prompt is that of the null prompt: no constant."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one native-size picture."""
        side = self.config.latent_side
        return (self.config.decoder.latent_channels, side, side)

    @property
    def image_token(self) -> int:
        """Id of the token that stands where image features go."""
        return self.config.tokens.img_context

    def embed_prompt(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Token embeddings [B, T, H] with the image features written at the image positions.

        Raises:
            ShapeError: the prompt has not as many image positions as there are features.
        """
        embeddings = self.language_model.embed_tokens(input_ids)
        if image_features is None:
            return embeddings
        return self._write_images(embeddings, input_ids, image_features)

    def encode_condition(
        self, input_ids: Tensor, attention_mask: Tensor, image_features: Tensor | None = None
    ) -> Condition:
        """The dual condition: prompt, image and queries through the LM and the connector.

        The connector reads the raw image features where the LM read them: the LM's own hidden
        states at those positions are thrown away (specs section 1c).

        Args:
            input_ids: [B, T], padded on either side.
            attention_mask: [B, T], 1 where a token is real.
            image_features: [B, N, H] for editing; None for text to image.
        """
        embeddings = self.embed_prompt(input_ids, image_features)
        queries = self.latent_queries.expand(len(input_ids), -1, -1).to(embeddings.dtype)
        mask = F.pad(attention_mask, (0, queries.shape[1]), value=1)
        given = torch.cat([embeddings, queries], dim=1)
        # Without padding no mask, so that attention can take its fastest kernel.
        padded = torch.compiler.is_compiling() or not bool(attention_mask.all())
        hidden = self.read(given, mask if padded else None)
        if image_features is not None:
            text = self._write_images(hidden[:, : input_ids.shape[1]], input_ids, image_features)
            hidden = torch.cat([text, hidden[:, input_ids.shape[1] :]], dim=1)
        hidden = self.llm_connector(hidden, mask if padded else None)
        return Condition(self.projector(hidden), mask.bool())

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor, image_features: Tensor | None = None
    ) -> Tensor:
        """Next-token logits [B, T, V] of a prompt, with images or without."""
        embeddings = self.embed_prompt(input_ids, image_features)
        return self.head(self.read(embeddings, attention_mask))

    def read(self, embeddings: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The LM's final hidden states [B, L, H] of `embeddings` [B, L, H]; causal.

        `attention_mask` [B, L] is 1 where a position is real; None where all are.
        """
        if attention_mask is None:
            # A dict is a mask that is ready: this one lets attention be causal by itself.
            return self.language_model(
                inputs_embeds=embeddings,
                attention_mask={"full_attention": None},
                use_cache=False,
            ).last_hidden_state
        return self.language_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the LM's final hidden states [..., H]."""
        weight = self.language_model.embed_tokens.weight if self.lm_head is None else None
        return self.lm_head(hidden) if weight is None else F.linear(hidden, weight)

    def _write_images(self, target: Tensor, input_ids: Tensor, features: Tensor) -> Tensor:
        places = input_ids == self.config.tokens.img_context
        wanted = features.shape[0] * features.shape[1]
        if not torch.compiler.is_compiling() and int(places.sum()) != wanted:
            raise ShapeError(
                f"unilip: the prompts must have {wanted} image positions for image_features "
                f"{list(features.shape)}, got {int(places.sum())}"
            )
        places = places.unsqueeze(-1).expand_as(target)
        return target.masked_scatter(places, features.to(target.dtype))


def _qwen2_config(config: TextConfig) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="sdpa",
    )
