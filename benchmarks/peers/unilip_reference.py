"""UniLIP's own way from a prompt to a picture, restated around stock transformers and diffusers.

What it does more often than it needs to is kept: each picture reads its prompt and the null prompt
again (both padded, all hidden states and keys kept, the connector in eager attention with a dense
float32 mask), the scheduler is read from its file, and every step projects the condition again.
"""

# Shape suffixes: B = rows, L = positions, T = prompt tokens, C = latent channels.

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.autoencoders.autoencoder_dc import Decoder
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2Model

from benchmarks.peers.sana_reference import scheduler
from benchmarks.sampling_models import stock_transformer
from clipflow.models.unilip import UniLIPModel
from clipflow.pipelines.prompts import Prompts

MASKED = -100_000.0


@dataclass
class Seconds:
    """Of one picture or call: until the condition is known, sampling, decoding."""

    condition: float = 0.0
    sampling: float = 0.0
    decode: float = 0.0


class ReferencePipeline:
    """Draws one picture a call with the weights of `model`.

    Args:
        model: whose tensors the stock modules use, too.
        prompts: writes the prompts.
        guidance: the scale.
        steps: of the solver.
    """

    def __init__(self, model: UniLIPModel, prompts: Prompts, *, guidance: float, steps: int):
        self.model, self.prompts = model, prompts
        self.guidance, self.steps = guidance, steps
        self.connector = _connector(model)
        self.transformer = stock_transformer(model.config.dit)
        self.transformer.load_state_dict(model.dit.state_dict(), assign=True)
        self.decoder = _decoder(model)
        self._files = tempfile.TemporaryDirectory()
        scheduler().save_pretrained(self._files.name)
        self.seconds = Seconds()

    @torch.no_grad()
    def __call__(self, prompt: str, noise: Tensor) -> tuple[Tensor, Image.Image]:
        """The latents [1, C, h, w] and the picture of one prompt."""
        times = [time.perf_counter()]
        hidden, mask = self.condition(prompt)
        times.append(time.perf_counter())
        latents = self.sample(hidden.flip(0), mask.flip(0), noise)
        times.append(time.perf_counter())
        picture = self.picture(latents)
        times.append(time.perf_counter())
        self.seconds.condition += times[1] - times[0]
        self.seconds.sampling += times[2] - times[1]
        self.seconds.decode += times[3] - times[2]
        return latents, picture

    def condition(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Rows [cond, null]: [2, L, channels] and the mask [2, L]."""
        texts = [self.prompts.text_to_image(text) for text in (prompt, None)]
        ids, mask = self.prompts.rows(texts, torch.device("cpu"))
        model = self.model
        embeddings = model.language_model.embed_tokens(ids)
        queries = model.latent_queries.expand(len(ids), -1, -1)
        embeddings = torch.cat([embeddings, queries], dim=1)
        mask = F.pad(mask, (0, queries.shape[1]), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = model.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask.bool(),
            position_ids=positions,
            output_hidden_states=True,
            use_cache=True,
        ).hidden_states[-1]
        seen = mask.bool()
        seen = (seen[:, None, :, None] & seen[:, None, None, :]).float()
        connected = self.connector(
            inputs_embeds=hidden,
            attention_mask={"full_attention": (1 - seen) * MASKED},
            position_ids=positions,
            output_hidden_states=True,
            use_cache=True,
        ).last_hidden_state
        return model.projector(connected), mask

    def sample(self, hidden: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """Latents [1, C, h, w]; the rows are [null, cond]."""
        solver = DPMSolverMultistepScheduler.from_pretrained(self._files.name)
        solver.set_timesteps(self.steps)
        latents = noise
        for step in solver.timesteps:
            velocity = self.transformer(
                torch.cat([latents] * 2).to(hidden.dtype),
                encoder_hidden_states=hidden,
                encoder_attention_mask=mask,
                timestep=step.expand(2).long(),
                return_dict=False,
            )[0].float()
            null, cond = velocity.chunk(2)
            velocity = null + self.guidance * (cond - null)
            latents = solver.step(velocity, step, latents, return_dict=False)[0]
        return latents

    def picture(self, latents: Tensor) -> Image.Image:
        """Decoded at 512 px, then resized to 448 px."""
        decoded = self.decoder((latents / self.model.config.unilip_factor).float())
        pixels = (decoded.clamp(-1, 1) + 1) / 2
        size = self.model.config.output_size
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
        levels = (pixels[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        return Image.fromarray(levels)


def _connector(model: UniLIPModel) -> Qwen2Model:
    """Stock layers with eager attention; the token embedding is there for form only."""
    values = model.language_model.config.to_dict()
    values |= {"num_hidden_layers": model.config.connect_layer, "vocab_size": 8}
    values |= {"layer_types": ["full_attention"] * model.config.connect_layer, "pad_token_id": None}
    connector = Qwen2Model(Qwen2Config(**values, attn_implementation="eager"))
    weights = {"embed_tokens.weight": connector.embed_tokens.weight}
    connector.load_state_dict(weights | model.llm_connector.state_dict(), assign=True)
    return connector.eval()


def _decoder(model: UniLIPModel) -> Decoder:
    config = model.config.decoder
    decoder = Decoder(
        in_channels=3,
        latent_channels=config.latent_channels,
        attention_head_dim=config.attention_head_dim,
        block_type=config.block_types,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        qkv_multiscales=config.qkv_multiscales,
        norm_type="rms_norm",
        act_fn="silu",
        upsample_block_type="interpolate",
    )
    decoder.load_state_dict(model.vae_decoder.decoder.state_dict(), assign=True)
    return decoder.eval()
