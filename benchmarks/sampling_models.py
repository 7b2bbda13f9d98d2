"""SANA transformers of true size with random weights, as diffusers' module and as ours.

A workload is what one run is given: noise and the conditions of its prompts, with lengths as
UniLIP's have them: 256 queries after the prompt, padded to 300 tokens for the reference.
"""

# Shape suffixes: B = batch, C = latent channels, L = condition tokens.

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from clipflow import use_backend
from clipflow.models.dits.sana import SanaConfig, SanaTransformer
from clipflow.models.unilip.published import unilip_1b_config, unilip_3b_config
from clipflow.sampling import PlanSpec, flow_schedule

GUIDANCE = 4.5
LENGTH, NULL_LENGTH, LENGTH_STEP = 300, 269, 64

TINY = SanaConfig(
    in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=32,
    num_cross_attention_heads=2, cross_attention_head_dim=32, caption_channels=48, mlp_ratio=2.5,
    sample_size=4, norm_eps=1e-6, position_table=True, interpolation_scale=1.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One size of a model and of what it samples: `batch` pictures of side x side tokens."""

    model: str
    blocks: int
    batch: int
    side: int = 16

    @property
    def config(self) -> SanaConfig:
        return replace(config_of(self.model), num_layers=self.blocks)

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def name(self) -> str:
        return f"{self.model}, {self.blocks} blocks, {self.tokens} tokens, batch {self.batch}"


def config_of(model: str) -> SanaConfig:
    """The transformer of "unilip-1b" or "unilip-3b"; "tiny" is for tests."""
    if model == "tiny":
        return TINY
    return {"unilip-1b": unilip_1b_config, "unilip-3b": unilip_3b_config}[model]().dit


class Models:
    """One transformer as diffusers' module and as ours; both hold the same weights.

    Attributes:
        stock: diffusers' SanaTransformer2DModel.
        ours: SanaTransformer.
    """

    def __init__(self, config: SanaConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.stock = stock_transformer(config)
        randomize(self.stock)
        nn.Module.to(self.stock, device, dtype)  # diffusers' own warns of dtypes
        with torch.device("meta"):
            self.ours = SanaTransformer(config).eval()
        self.ours.load_state_dict(self.stock.state_dict(), assign=True)

    def second_stock(self) -> SanaTransformer2DModel:
        """Another diffusers module over the same parameters, to be changed in place."""
        shared = {id(p): p for p in [*self.stock.parameters(), *self.stock.buffers()]}
        return copy.deepcopy(self.stock, shared)

    @torch.no_grad()
    def truth(self, rows: Tensor, time: int, hidden: Tensor, mask: Tensor) -> Tensor:
        """Velocity of `rows`, computed in float64 by plain PyTorch."""
        exact = copy.deepcopy(self.ours).double()
        times = torch.full((len(rows),), time, device=rows.device)
        with use_backend("eager"):
            return exact(rows.double(), times, hidden.double(), mask)


def stock_transformer(config: SanaConfig) -> SanaTransformer2DModel:
    """diffusers' module; with interpolation_scale=1 it adds the position table, as UniLIP needs."""
    return SanaTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        num_cross_attention_heads=config.num_cross_attention_heads,
        cross_attention_head_dim=config.cross_attention_head_dim,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.caption_channels,
        mlp_ratio=config.mlp_ratio,
        sample_size=config.sample_size,
        norm_eps=config.norm_eps,
        interpolation_scale=config.interpolation_scale,
    ).eval()


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Weights that keep every branch alive: with gates near 0, errors of branches would not show.

    Matrices have variance 1 / fan-in, tables of modulations 0.1, biases 0.0004.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if name.endswith("scale_shift_table"):
            parameter.normal_(0, 0.3, generator=generator)
        elif parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            parameter.normal_(0, fan_in**-0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.02, generator=generator)


class Workload:
    """Noise and conditions of one cell; the null condition is the same for all samples.

    Attributes:
        noise: [B, C, h, w] float32.
        null: [one], cond: [B] conditions [L_i, channels], each of its own length.
        hidden, mask: the same for the reference, [2B, L, channels] and [2B, L], null rows first.
    """

    def __init__(self, cell: Cell, device: torch.device, dtype: torch.dtype) -> None:
        config, B = cell.config, cell.batch
        generator = torch.Generator().manual_seed(cell.batch)
        length, null_length = (12, 9) if cell.model == "tiny" else (LENGTH, NULL_LENGTH)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.noise = draw(B, config.in_channels, cell.side, cell.side).to(device)
        channels = config.caption_channels
        self.null = [draw(null_length, channels).to(device, dtype)]
        # The longest prompt has no padding, others have some, as in a batch of real prompts.
        lengths = [max(null_length, length - 4 * number) for number in range(B)]
        self.cond = [draw(size, channels).to(device, dtype) for size in lengths]
        self.hidden = torch.zeros(2 * B, length, channels, device=device, dtype=dtype)
        self.mask = torch.zeros(2 * B, length, device=device)
        for row, tokens in enumerate([*self.null * B, *self.cond]):
            self.hidden[row, : len(tokens)] = tokens
            self.mask[row, : len(tokens)] = 1


def plan_spec(
    cell: Cell, steps: int, tier: str, device: torch.device, dtype: torch.dtype
) -> PlanSpec:
    """The plan that a pipeline would make for `cell`."""
    schedule = flow_schedule(steps)
    return PlanSpec(
        sigmas=tuple(schedule.sigmas.tolist()),
        timesteps=tuple(schedule.timesteps.tolist()),
        solver="dpmpp_2m",
        samples=cell.batch,
        guided=True,
        latent_shape=(cell.config.in_channels, cell.side, cell.side),
        conditions=(1, cell.batch),
        condition_length=-(-LENGTH // LENGTH_STEP) * LENGTH_STEP,
        dtype=dtype,
        device=device,
        tier=tier,
    )


def step_flops(cell: Cell) -> float:
    """Useful FLOPs of one guided step: GEMMs on image tokens, and attention.

    Left out is what does not change from step to step (times, conditions, their keys and values).
    """
    config = cell.config
    D, N = config.hidden_size, cell.tokens
    gemms = 2 * N * (6 + 3 * config.mlp_ratio) * D**2
    cross = 4 * N * LENGTH * D
    own = 4 * N * D * config.attention_head_dim
    depthwise = 2 * 9 * N * 2 * config.mlp_ratio * D
    ends = 4 * N * D * config.in_channels
    return 2 * cell.batch * (cell.blocks * (gemms + cross + own + depthwise) + ends)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance."""
    difference = torch.linalg.vector_norm(found.double() - wanted.double())
    return float(difference / torch.linalg.vector_norm(wanted.double()))
