"""Weights of several linear layers in one block of memory, so that one GEMM computes them all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def packed(parameters: Sequence[Tensor]) -> Tensor:
    """The rows of all `parameters`, [sum of rows, ...], in memory that they share from now on.

    The parameters become views of the block: their names, shapes and values stay, and a change of
    them, by an optimizer or `load_state_dict`, is a change of the block. Nothing is kept twice.
    Moving a module gives each parameter memory of its own again; then pack again.

    Args:
        parameters: at least one, of one dtype and device, alike but for their first dimension.
    """
    if _adjacent(parameters):
        first = parameters[0].detach()
        rows = sum(len(p) for p in parameters)
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    with torch.no_grad():
        block = torch.cat([p.detach() for p in parameters])
        for parameter, rows in zip(
            parameters, block.split([len(p) for p in parameters]), strict=True
        ):
            parameter.data = rows
    return block


def _adjacent(parameters: Sequence[Tensor]) -> bool:
    if not all(p.is_contiguous() for p in parameters):
        return False
    storages = {p.untyped_storage().data_ptr() for p in parameters}
    return len(storages) == 1 and all(
        before.data_ptr() + before.nbytes == after.data_ptr()
        for before, after in itertools.pairwise(parameters)
    )
