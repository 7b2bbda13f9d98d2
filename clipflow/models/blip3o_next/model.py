"""BLIP3o-NEXT: a language model draws image tokens, whose states condition a SANA-1.5 transformer.

Data flow, specs of BLIP3o-NEXT section B.4:

    condition    prompt -> LM -> 729 image tokens, one by one -> their states -> connector
    generation   noise, condition -> DiT, solver -> latents / scaling_factor -> DC-AE -> pixels
"""

# Shape suffixes: B = batch, T = prompt tokens, L = condition tokens, H = LM width, C = width of the
# condition, V = vocabulary.

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3Model

from clipflow.errors import InputError
from clipflow.models.blip3o_next.config import BLIP3oNextConfig, Qwen3TextConfig
from clipflow.models.blip3o_next.image_tokens import TokenDraw, draw_image_tokens
from clipflow.models.blip3o_next.loading import FORMAT
from clipflow.models.condition import Condition
from clipflow.models.dc_ae.decoder import DCAEDecoder
from clipflow.models.dits.sana import SanaTransformer
from clipflow.models.folders.saved_model import SavedModel
from clipflow.models.language.token_sampling import Generators, TokenSampling, row_dice

CONNECTOR_NORM_EPS = 1e-5
TOP_P, TOP_K, TEMPERATURE = 0.95, 1200, 1.0  # of the reference
NO_UNDERSTANDING = (
    "BLIP3o-NEXT draws only: it would see pictures through TA-Tok (SigLIP2 with a codebook), whose "
    "weights are no part of its checkpoints"
)


class BLIP3oNextModel(SavedModel):
    """All parts of a BLIP3o-NEXT checkpoint that drawing needs."""

    folder_format = FORMAT

    def __init__(self, config: BLIP3oNextConfig) -> None:
        super().__init__()
        self.config = config
        H, C = config.text.hidden_size, config.dit.caption_channels
        self.language_model = Qwen3Model(_qwen3_config(config.text))
        tied = config.text.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(H, config.text.vocab_size, bias=False)
        self.diffusion_connector = nn.Sequential(
            nn.Linear(H, C),
            nn.GELU(approximate="tanh"),
            nn.Linear(C, C),
            nn.RMSNorm(C, eps=CONNECTOR_NORM_EPS),
        )
        self.dit = SanaTransformer(config.dit)
        self.vae = DCAEDecoder(config.decoder)

    @property
    def device(self) -> torch.device:
        """Of the language model."""
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model."""
        return self.language_model.embed_tokens.weight.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one native-size picture."""
        side = self.config.latent_side
        return (self.config.decoder.latent_channels, side, side)

    def encode_condition(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        generators: Generators = None,
        top_p: float = TOP_P,
        top_k: int = TOP_K,
        temperature: float = TEMPERATURE,
        allow_any_token: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> Condition:
        """Draw the image tokens of prompts; the connector's output at `<S0>` and these tokens.

        Args:
            input_ids: [B, T], padded on either side; prompts that end with `<im_start><S0>`. A row
                is conditioned as it would be alone.
            attention_mask: [B, T], 1 where a token is real.
            generators: one for all rows, or one for each; the tokens of a row depend on the seed
                that its generator draws.
            top_p, top_k, temperature: of the tokens, as of `TokenSampling`; temperature 0 takes the
                likeliest.
            allow_any_token: draw from the whole vocabulary as the reference does, where a token
                that ends a text ends the row early; otherwise from the image tokens alone.
            progress: called with 1 after each of `config.tokens_per_image` tokens.

        Returns:
            hidden [B, 1 + tokens_per_image, caption_channels].

        Raises:
            InputError: an option out of range, or a list of generators of another length.
            ShapeError: a prompt has no `<im_start>`.
            SamplingError: a logit is not finite.
        """
        draw = TokenDraw(
            sampling=TokenSampling(temperature=temperature, top_p=top_p, top_k=top_k),
            dice=row_dice(generators, len(input_ids)),
            count=self.config.tokens_per_image,
            allow_any_token=allow_any_token,
            progress=progress,
        )
        drawn = draw_image_tokens(self, input_ids, attention_mask, draw)
        return Condition(self.diffusion_connector(drawn.hidden), drawn.mask)

    def null_condition(self) -> Tensor:
        """[1, caption_channels], what samples without a prompt attend to.

        The reference has it 730 times: attention to equal tokens is the same whatever their number.
        """
        zeros = torch.zeros(1, self.config.text.hidden_size, dtype=self.dtype, device=self.device)
        return self.diffusion_connector(zeros)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in about [-1, 1]; divide sampled latents by `scaling_factor`."""
        return self.vae.decode(latents)

    def encode_image(self, pixel_values: Tensor) -> NoReturn:
        """BLIP3o-NEXT cannot see.

        Raises:
            InputError: always; says why.
        """
        raise InputError(NO_UNDERSTANDING)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the LM's final hidden states [..., H]."""
        return F.linear(hidden, self._head_weight)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Of these the logits of the image tokens, [..., image_count]; nothing else is computed."""
        tokens = self.config.tokens
        weight = self._head_weight.narrow(0, tokens.first_image, tokens.image_count)
        return F.linear(hidden, weight)

    @property
    def _head_weight(self) -> Tensor:
        return (self.language_model.embed_tokens if self.lm_head is None else self.lm_head).weight


def _qwen3_config(text: Qwen3TextConfig) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        tie_word_embeddings=text.tie_word_embeddings,
    )
