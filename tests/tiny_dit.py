"""Small transformers with random weights, and specs of their sampling plans."""

import torch

from clipflow.models.dits.lumina import LuminaConfig, LuminaTransformer
from clipflow.models.dits.sana import SanaConfig, SanaTransformer
from clipflow.sampling import PlanSpec, SamplingPlan, flow_schedule, sample

CHANNELS, GRID, CAPTION = 8, (6, 4), 40
CPU = torch.device("cpu")


def tiny_dit(seed=0, layers=2):
    torch.manual_seed(seed)
    config = SanaConfig(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=layers,
        num_attention_heads=3,
        attention_head_dim=32,
        num_cross_attention_heads=2,
        cross_attention_head_dim=48,
        caption_channels=CAPTION,
        mlp_ratio=2.5,
        sample_size=8,
        norm_eps=1e-6,
        position_table=True,
        interpolation_scale=1.0,
    )
    return SanaTransformer(config).eval()


def tiny_lumina(seed=0, layers=2, **changes):
    """With two key heads for four heads; every parameter is random."""
    torch.manual_seed(seed)
    values = {
        "in_channels": CHANNELS,
        "hidden_size": 96,
        "num_layers": layers,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 128,
        "condition_channels": CAPTION,
        "patch_size": 1,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    dit = LuminaTransformer(LuminaConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return dit


DITS = {"sana": tiny_dit, "lumina": tiny_lumina}


def tiny_spec(samples=2, conditions=(1, 2), steps=3, guided=True, **more):
    schedule = flow_schedule(steps)
    values = {
        "sigmas": tuple(schedule.sigmas.tolist()),
        "timesteps": tuple(schedule.timesteps.tolist()),
        "solver": "dpmpp_2m",
        "samples": samples,
        "guided": guided,
        "latent_shape": (CHANNELS, *GRID),
        "conditions": conditions if guided else (0, conditions[1]),
        "condition_length": 32,
        "dtype": torch.float32,
        "device": CPU,
    }
    return PlanSpec(**{**values, **more})


def make_plan(dit, spec):
    return SamplingPlan(spec, dit.denoiser(spec))


def inputs_of(spec, seed=1, dtype=torch.float32):
    """(noise, null, cond) with conditions of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    noise = draw(spec.samples, *spec.latent_shape)
    null = [draw(5 + 2 * k, CAPTION) for k in range(spec.conditions[0])]
    cond = [draw(20 - 3 * k, CAPTION) for k in range(spec.conditions[1])]
    return noise, null, cond


def reference_run(dit, spec, noise, null, cond, guidance, schedule=None):
    """The same run by calling the module in every step, with padded conditions and masks."""
    rows = [half[b * len(half) // spec.samples] for half in (null, cond) if half
            for b in range(spec.samples)]  # fmt: skip
    hidden = torch.zeros(len(rows), 32, CAPTION, dtype=noise.dtype)
    mask = torch.zeros(len(rows), 32)
    for row, tokens in enumerate(rows):
        hidden[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    schedule = schedule or flow_schedule(len(spec.timesteps))
    return sample(
        lambda latents, times: dit(latents, times, hidden, mask),
        noise,
        schedule,
        solver=spec.solver,
        guidance_scale=guidance,
    )
