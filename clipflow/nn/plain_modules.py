"""A check that a module is what its class says, before its weights are used without calling it."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from clipflow.errors import SamplingError


def check_plain(root: nn.Module, classes: Collection[type[nn.Module]]) -> None:
    """Refuse adapters, hooks and replaced forwards, which a plan would pass over in silence.

    Raises:
        SamplingError: names the first submodule that is of no class in `classes`, or has a hook or
            a forward of its own.
    """
    for name, module in root.named_modules():
        if type(module) not in classes:
            found = f"a {type(module).__name__}"
        elif module._forward_hooks or module._forward_pre_hooks:
            found = "a forward hook"
        elif "forward" in vars(module):
            found = "a replaced forward"
        else:
            continue
        raise SamplingError(
            f"a plan uses the weights of {name or type(root).__name__} itself and must find the "
            f"module as built, got {found}; merge or remove it, or sample with "
            "clipflow.sampling.sample"
        )
