"""Flow-matching schedules, solvers, guidance and the sampling loop; no model inside."""

from clipflow.sampling.flow_matching import FlowTimes, draw_times, flow_matching_loss, interpolate
from clipflow.sampling.guidance import combine, model_rows
from clipflow.sampling.sample import sample
from clipflow.sampling.schedule import FlowSchedule, flow_schedule
from clipflow.sampling.solvers import SOLVERS, Solver, make_solver

__all__ = [
    "SOLVERS",
    "FlowSchedule",
    "FlowTimes",
    "Solver",
    "combine",
    "draw_times",
    "flow_matching_loss",
    "flow_schedule",
    "interpolate",
    "make_solver",
    "model_rows",
    "sample",
]
