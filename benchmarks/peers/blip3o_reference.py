"""BLIP3-o's own way from a prompt to CLIP features, restated around stock transformers, diffusers.

What it does more often than it needs to is kept: each picture reads its prompt again (all hidden
states and keys kept), the scheduler is read from its file, every step runs both halves of guidance
and projects the condition again; see `lumina_reference` for what the transformer repeats.
"""

# Shape suffixes: T = prompt tokens, Q = queries, H = LM width, C, h, w = latents.

from __future__ import annotations

import tempfile

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from benchmarks.blip3o_models import GUIDANCE, Stage
from benchmarks.peers.lumina_reference import ReferenceLumina


class ReferenceStage:
    """Draws one picture's features a call, with the weights of `stage`.

    Args:
        stage: the parts.
        steps: of the solver.
    """

    def __init__(self, stage: Stage, *, steps: int) -> None:
        self.stage, self.steps = stage, steps
        self.transformer = ReferenceLumina(stage.dit)
        self._files = tempfile.TemporaryDirectory()
        FlowMatchEulerDiscreteScheduler(1000, shift=1.0).save_pretrained(self._files.name)

    def __call__(self, ids: Tensor, noise: Tensor) -> Tensor:
        """The latents [1, C, h, w] of the prompt `ids` [1, T]."""
        return self.sample(self.condition(ids), noise)

    @torch.no_grad()
    def condition(self, ids: Tensor) -> Tensor:
        """Last states of the queries, [1, Q, H]."""
        embeddings = self.stage.embeddings(ids)
        states = self.stage.language_model(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
            output_hidden_states=True,
            use_cache=True,
        ).hidden_states[-1]
        return states[:, -self.stage.queries.shape[1] :]

    @torch.no_grad()
    def sample(self, condition: Tensor, noise: Tensor) -> Tensor:
        """Latents [1, C, h, w] of `condition` [1, Q, H]."""
        solver = FlowMatchEulerDiscreteScheduler.from_pretrained(self._files.name)
        solver.set_timesteps(sigmas=np.linspace(1.0, 1 / self.steps, self.steps))
        rows = torch.cat([torch.zeros_like(condition), condition])
        latents = noise
        for step in solver.timesteps:
            times = step.long().expand(2)  # whole times go to the model, exact ones to the solver
            null, cond = self.transformer(torch.cat([latents] * 2), times, rows).chunk(2)
            velocity = null + GUIDANCE * (cond - null)
            latents = solver.step(velocity, step, latents, return_dict=False)[0]
        return latents
