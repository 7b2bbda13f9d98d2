"""BLIP3o-NEXT against tensors that the reference's own classes recorded, in float32.

CLIPFLOW_PARITY_DIR names a folder of whole recordings, where the connector is compared, too.
"""

from functools import cache

import pytest
import torch
from blip3o_next_fixture import has_connector, recorded, recorded_model
from torch import Tensor

from clipflow.models.blip3o_next.image_tokens import DrawnTokens, TokenDraw, draw_image_tokens
from clipflow.sampling import PlanSpec, SamplingPlan, euler_schedule, sample

TOLERANCE = 1e-5
STEPS, GUIDANCE = 3, 2.0


class Given:
    """Tokens that were drawn elsewhere, one after the other, as a `TokenSampling`."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = list(tokens.unbind(1))

    def choose(self, logits: Tensor, dice: object) -> Tensor:
        return self.tokens.pop(0)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Largest difference relative to the largest value."""
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"largest difference {error:.2e} of the largest value"


@cache
def drawn() -> DrawnTokens:
    """The recorded tokens, read one by one."""
    prompt, ids = recorded()["in.prompt_ids"], recorded()["out.gen_ids"]
    tokens = ids[:, prompt.shape[1] :]
    draw = TokenDraw(sampling=Given(tokens), dice=[], count=tokens.shape[1], allow_any_token=True)
    return draw_image_tokens(recorded_model(), prompt, torch.ones_like(prompt), draw)


@cache
def conditions() -> tuple[Tensor, Tensor]:
    """(null [1, C], cond [L, C]): ours where the connector is recorded."""
    if not has_connector():
        return recorded()["mid.connector_out.null"], recorded()["mid.connector_out.cond"]
    with torch.no_grad():
        model = recorded_model()
        return model.null_condition(), model.diffusion_connector(drawn().hidden)[0]


def test_selected_states():
    prompt = recorded()["in.prompt_ids"]
    assert torch.equal(torch.cat([prompt, drawn().tokens], dim=1), recorded()["out.gen_ids"])
    assert bool(drawn().mask.all())
    assert_close(drawn().hidden, recorded()["mid.selected_hidden"])


def test_connector():
    null, cond = conditions()
    assert_close(null, recorded()["mid.connector_out.null"])
    assert_close(cond, recorded()["mid.connector_out.cond"])


@torch.no_grad()
def test_velocities_and_latents():
    """Of the module in each step, with the null condition as often as the reference has it."""
    model, (null, cond) = recorded_model(), conditions()
    hidden = torch.stack([null.expand_as(cond), cond])
    velocities, times = [], []

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        times.append(timestep)
        velocities.append(model.dit(latents, timestep, hidden))
        return velocities[-1]

    schedule = euler_schedule(STEPS, shift=model.config.flow_shift, truncate=False)
    noise = recorded()["in.noise_bf16"].float()
    latents = sample(velocity, noise, schedule, solver="euler", guidance_scale=GUIDANCE)
    for step in range(STEPS):
        torch.testing.assert_close(times[step], recorded()[f"mid.step{step}.timestep"])
        assert_close(velocities[step], recorded()[f"mid.step{step}.sana_out"])
    assert_close(latents, recorded()["out.latents"])


@pytest.mark.parametrize("times", [1, 9])
def test_the_plan_with_one_null_token(times):
    """Attention to equal tokens is the same whatever their number."""
    model, (null, cond) = recorded_model(), conditions()
    schedule = euler_schedule(STEPS, shift=model.config.flow_shift, truncate=False)
    spec = PlanSpec(
        sigmas=tuple(schedule.sigmas.tolist()),
        timesteps=tuple(schedule.timesteps.tolist()),
        solver="euler",
        samples=1,
        guided=True,
        latent_shape=model.latent_shape,
        conditions=(1, 1),
        condition_length=len(cond),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    plan = SamplingPlan(spec, model.dit.denoiser(spec))
    noise = recorded()["in.noise_bf16"].float()
    found = plan.run(noise, [null.expand(times, -1)], [cond], guidance=GUIDANCE)
    assert_close(found, recorded()["out.latents"])
