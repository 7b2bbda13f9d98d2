"""Flow-matching schedules, solvers, the sampling loop and sampling plans; no model inside."""

from clipflow.sampling.flow_matching import (
    FlowTimes,
    draw_times,
    draw_uniform_times,
    drop_conditions,
    flow_matching_loss,
    interpolate,
)
from clipflow.sampling.plan import TIERS, Denoiser, PlanSpec, SamplingPlan
from clipflow.sampling.plan_cache import PlanCache
from clipflow.sampling.sample import sample
from clipflow.sampling.schedule import FlowSchedule, euler_schedule, flow_schedule
from clipflow.sampling.solvers import SOLVERS, Evaluation, solver_table
from clipflow.sampling.step_cache import FirstBlockCache, StepCache, TaylorForecast

__all__ = [
    "SOLVERS",
    "TIERS",
    "Denoiser",
    "Evaluation",
    "FirstBlockCache",
    "FlowSchedule",
    "FlowTimes",
    "PlanCache",
    "PlanSpec",
    "SamplingPlan",
    "StepCache",
    "TaylorForecast",
    "draw_times",
    "draw_uniform_times",
    "drop_conditions",
    "euler_schedule",
    "flow_matching_loss",
    "flow_schedule",
    "interpolate",
    "sample",
    "solver_table",
]
