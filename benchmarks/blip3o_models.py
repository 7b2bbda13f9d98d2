"""BLIP3-o's first stage with random weights: language model, queries and transformer, cut short.

Widths are those of the published sizes; the language model has 2 layers, the transformer `blocks`.
"""

# Shape suffixes: B = samples, T = prompt tokens, Q = queries, H = LM width, C, h, w = latents.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.sampling_models import randomize
from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.models.blip3o.published import blip3o_config
from clipflow.models.blip3o.qwen import make_language_model
from clipflow.models.dits.lumina import LuminaConfig, LuminaTransformer
from clipflow.sampling import PlanSpec, euler_schedule

GUIDANCE = 3.0
PROMPT, QUERIES = 40, 64  # tokens: a caption of 15 words in its template; what follows it
LM_LAYERS, VOCABULARY = 2, 1000  # embeddings of other ids would only take memory
BARS = {"one": {"faithful": 1.5, "fast": 2.5}, "four": {"faithful": 3.0}}


def dit_config(size: str, *, blocks: int) -> LuminaConfig:
    """The transformer of "4b" or "8b", or a small one ("tiny"), with so many blocks."""
    return replace(blip3o_config(size).dit, num_layers=blocks)


@torch.no_grad()
def random_dit(config: LuminaConfig) -> LuminaTransformer:
    """Every branch alive: gates and norms too are random."""
    dit = LuminaTransformer(config).eval().requires_grad_(False)
    randomize(dit)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in dit.named_parameters():
        if parameter.ndim == 1 and not name.endswith("bias"):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return dit


@dataclass(frozen=True, eq=False)
class Stage:
    """What makes latents of a prompt.

    Attributes:
        config: whose parts were cut short.
        language_model: transformers' Qwen2.5-VL without its head.
        queries: [1, Q, H].
        dit: ours; the reference calls the same weights.
    """

    config: BLIP3oConfig
    language_model: nn.Module
    queries: Tensor
    dit: LuminaTransformer

    @classmethod
    @torch.no_grad()
    def random(cls, size: str, *, blocks: int) -> Stage:
        config = blip3o_config(size)
        text = replace(config.text, num_hidden_layers=LM_LAYERS, vocab_size=VOCABULARY)
        language_model = make_language_model(text).eval().requires_grad_(False)
        randomize(language_model)
        generator = torch.Generator().manual_seed(2)
        queries = torch.randn(1, QUERIES, text.hidden_size, generator=generator)
        return cls(config, language_model, queries, random_dit(dit_config(size, blocks=blocks)))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.config.latent_side
        return (self.dit.config.in_channels, side, side)

    def embeddings(self, ids: Tensor) -> Tensor:
        """What the language model reads of the prompt `ids` [1, T]: [1, T + Q, H]."""
        return torch.cat([self.language_model.embed_tokens(ids), self.queries], dim=1)

    def plan_spec(self, steps: int, samples: int, tier: str) -> PlanSpec:
        """The plan that a pipeline would make for pictures of one prompt."""
        schedule = euler_schedule(steps)
        return PlanSpec(
            sigmas=tuple(schedule.sigmas.tolist()),
            timesteps=tuple(schedule.timesteps.tolist()),
            solver="euler",
            samples=samples,
            guided=True,
            latent_shape=self.latent_shape,
            conditions=(1, 1),
            condition_length=QUERIES,
            dtype=torch.float32,
            device=torch.device("cpu"),
            tier=tier,
        )


def drawn_prompt(number: int) -> Tensor:
    """Token ids [1, T] of the prompt of round `number`."""
    return torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(number))


def step_work(config: LuminaConfig, tokens: int, rows: int) -> dict[str, float]:
    """What one step cannot do without: useful GFLOP, and GB of float32 weights to read once.

    Left out is what does not change from step to step (times, conditions, their keys and values,
    modulations).
    """
    D, M, G = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    block = D * (3 * D + 2 * G) + 3 * D * M
    ends = 2 * config.in_channels * D
    attention = 4 * tokens * (tokens + QUERIES) * D
    weights = config.num_layers * block + ends
    return {
        "gflop": rows * (2 * tokens * weights + config.num_layers * attention) / 1e9,
        "weights_gb": 4 * weights / 1e9,
    }
