"""BLIP3-o's first stage: the reference's loop against ours, paired and in turn.

"one": from a condition to the features of one picture; "four": from a prompt to those of four. The
prompt is new in every round; null prompts are known.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.blip3o_models import BARS, GUIDANCE, Stage, drawn_prompt, step_work
from benchmarks.peers.blip3o_reference import ReferenceStage
from benchmarks.peers.lumina_reference import ReferenceLumina
from benchmarks.ratios import paired_ratio
from benchmarks.sampling_models import relative_error
from clipflow.sampling import SamplingPlan

Result = dict[str, object]
PICTURES = 4
TIERS = ("faithful", "fast")
RUN_BAR, FAST_BAR = 1e-3, 3e-2  # relative L2 of a faithful run's latents; of a fast velocity
# Above it a fast velocity is another one, and no timing means anything.
FAST_WRONG = 0.1


class OurStage:
    """The same with plans: a prompt is read once, and all of its pictures are one run."""

    def __init__(self, stage: Stage, *, steps: int, samples: int, tier: str) -> None:
        spec = stage.plan_spec(steps, samples, tier)
        self.stage, self.plan = stage, SamplingPlan(spec, stage.dit.denoiser(spec))
        width = stage.dit.config.condition_channels
        self.null = torch.zeros(stage.queries.shape[1], width)

    @torch.no_grad()
    def condition(self, ids: Tensor) -> Tensor:
        """As `ReferenceStage.condition`."""
        states = self.stage.language_model(
            inputs_embeds=self.stage.embeddings(ids),
            attention_mask={"full_attention": None},
            use_cache=False,
        ).last_hidden_state
        return states[:, -self.stage.queries.shape[1] :]

    def sample(self, condition: Tensor, noise: Tensor) -> Tensor:
        """Latents [B, C, h, w] of `condition` [1, Q, H]."""
        return self.plan.run(noise, [self.null], [condition[0]], guidance=GUIDANCE)

    def __call__(self, ids: Tensor, noise: Tensor) -> Tensor:
        return self.sample(self.condition(ids), noise)


def race(stage: Stage, *, steps: int, rounds: int, pictures: int = PICTURES) -> Result:
    """Both races; results are compared before anything is timed."""
    reference = ReferenceStage(stage, steps=steps)
    noise = torch.randn(pictures, *stage.latent_shape, generator=torch.Generator().manual_seed(0))
    errors = velocity_errors(stage, reference.transformer, noise[:1], steps)
    wrong = wrong_velocities(errors)
    singles, groups = (
        {tier: OurStage(stage, steps=steps, samples=n, tier=tier) for tier in TIERS}
        for n in (1, pictures)
    )
    conditions = [reference.condition(drawn_prompt(number)) for number in range(rounds + 1)]

    def all_by_reference(number: int) -> Tensor:
        return torch.cat([reference(drawn_prompt(number), one[None]) for one in noise])

    one = {"reference": lambda n: reference.sample(conditions[n], noise[:1])}
    one |= {tier: lambda n, s=s: s.sample(conditions[n], noise[:1]) for tier, s in singles.items()}
    four = {"reference": all_by_reference}
    four |= {tier: lambda n, s=s: s(drawn_prompt(n), noise) for tier, s in groups.items()}
    rows = []
    for name, contenders in (("one", one), ("four", four)):
        wrong += check_runs(name, contenders, rounds)
        if not wrong:
            rows += timed(name, contenders, rounds)
    tokens = stage.config.latent_side**2
    work = step_work(stage.dit.config, tokens, rows=2)
    return {"pictures": pictures, "blocks": len(stage.dit.layers), "steps": steps, "rounds": rounds,
            "step": work, "velocities": errors, "rows": rows, "wrong": wrong}  # fmt: skip


@torch.no_grad()
def velocity_errors(
    stage: Stage, reference: ReferenceLumina, noise: Tensor, steps: int
) -> dict[str, dict[str, float]]:
    """Of each tier in the middle of a run: relative L2 from float64, and the bar."""
    dit, width = stage.dit, stage.dit.config.condition_channels
    generator = torch.Generator().manual_seed(3)
    cond = torch.randn(stage.queries.shape[1], width, generator=generator)
    null, index = torch.zeros_like(cond), steps // 2
    spec = stage.plan_spec(steps, 1, "faithful")
    given = (noise.repeat(2, 1, 1, 1), torch.tensor([spec.timesteps[index]] * 2))
    rows = torch.stack([null, cond])
    exact = reference_in_float64(stage)(given[0].double(), given[1], rows.double())
    bars = {"faithful": 2 * relative_error(reference(*given, rows), exact), "fast": FAST_BAR}
    errors = {}
    for tier in TIERS:
        denoiser = dit.denoiser(stage.plan_spec(steps, 1, tier))
        denoiser.set_condition([null], [cond])
        error = relative_error(denoiser.velocity(given[0], index), exact)
        print(f"velocity, {tier:<10}{error:.1e} from float64, bar {bars[tier]:.1e}")
        errors[tier] = {"error": error, "bar": bars[tier]}
    return errors


def wrong_velocities(errors: dict[str, dict[str, float]]) -> list[str]:
    """Lines about what is wrong: a faithful error above its bar, or a fast one far above."""
    limits = {"faithful": errors["faithful"]["bar"], "fast": FAST_WRONG}
    return [
        f"velocity, {tier}: {found['error']:.1e}, allowed {limits[tier]:.1e}"
        for tier, found in errors.items()
        if not found["error"] <= limits[tier]
    ]


def reference_in_float64(stage: Stage) -> ReferenceLumina:
    from clipflow.models.dits.lumina import LuminaTransformer

    with torch.device("meta"):
        exact = LuminaTransformer(stage.dit.config)
    state = {name: tensor.double() for name, tensor in stage.dit.state_dict().items()}
    exact.load_state_dict(state, assign=True)
    return ReferenceLumina(exact.eval())


def check_runs(name: str, contenders: dict[str, Callable], number: int) -> list[str]:
    """Whole runs of a prompt that is not timed; warms everybody up."""
    wanted = contenders["reference"](number)
    errors = {tier: relative_error(contenders[tier](number), wanted) for tier in TIERS}
    print(f"{name}: latents {errors['faithful']:.1e} (faithful), {errors['fast']:.1e} (fast)")
    if errors["faithful"] <= RUN_BAR:
        return []
    return [f"{name}, faithful: latents {errors['faithful']:.1e} from the reference's"]


def timed(name: str, contenders: dict[str, Callable], rounds: int) -> list[Result]:
    """A row for each contender: its seconds in every round, and its paired ratio."""
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    errors = dict.fromkeys(TIERS, 0.0)
    for number in range(rounds):
        found = {}
        for who in contenders if number % 2 == 0 else reversed(contenders):
            start = time.perf_counter()
            found[who] = contenders[who](number)
            seconds[who].append(time.perf_counter() - start)
        for tier in TIERS:
            error = relative_error(found[tier], found["reference"])
            errors[tier] = max(errors[tier], error)
    rows = []
    for who, times in seconds.items():
        row: Result = {"race": name, "name": who, "seconds": times, "error": errors.get(who)}
        if who != "reference":
            ratio = paired_ratio(seconds["reference"], times)
            row |= {"times_faster": vars(ratio), "bar": BARS[name].get(who)}
            print(f"{name}, {who:<10}{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]")
        rows.append(row)
    return rows
