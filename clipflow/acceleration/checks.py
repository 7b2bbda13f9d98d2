"""Whether a module is still the stock one that a recipe was written for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from clipflow.errors import FLOATING, AccelerationError

LIBRARIES = ("torch.nn.modules.", "diffusers.models.")


def refuse(name: str, found: object, wanted: str) -> AccelerationError:
    """The error to raise about submodule `name` ("" for the module itself)."""
    return AccelerationError(f"accelerate: {name or 'the module'} is {found}; wanted {wanted}")


def check_type(name: str, module: object, wanted: type) -> None:
    """Raise unless `module` is exactly of the class `wanted`, not of one derived from it."""
    if type(module) is not wanted:
        raise refuse(name, full_name(type(module)), full_name(wanted))


def check_value(name: str, found: object, *wanted: object) -> None:
    """Raise unless `found` is one of the values `wanted`."""
    if found not in wanted:
        raise refuse(name, repr(found), " or ".join(map(repr, wanted)))


def check_plain_layer_norm(name: str, norm: object) -> None:
    """Raise unless `norm` is a LayerNorm without weight and bias."""
    check_type(name, norm, nn.LayerNorm)
    check_value(f"{name}.elementwise_affine", norm.elementwise_affine, False)


def check_linear_layers(name: str, part: nn.Module, *wanted: str) -> None:
    """Raise unless the submodules `wanted` of `part` are `torch.nn.Linear`."""
    for layer in wanted:
        check_type(f"{name}.{layer}", part.get_submodule(layer), nn.Linear)


def check_parameters(function: Callable[..., object], *wanted: str) -> None:
    """Raise unless a diffusers function still has exactly these parameters, `self` left out."""
    found = tuple(inspect.signature(function).parameters)
    if found != ("self", *wanted):
        import diffusers

        where = (
            f"{function.__module__}.{function.__qualname__} of diffusers {diffusers.__version__}"
        )
        raise refuse(where, f"({', '.join(found)})", f"({', '.join(('self', *wanted))})")


def check_untouched(module: nn.Module) -> None:
    """Raise unless every submodule is a plain layer of PyTorch or diffusers that nobody changed.

    Hooks, forwards set on an instance, LoRA and quantized layers, parametrizations and parameters
    in a storage dtype are such changes.
    """
    for name, part in module.named_modules():
        kind = type(part)
        if not kind.__module__.startswith(LIBRARIES):
            raise refuse(name, full_name(kind), "a layer of torch.nn or diffusers.models")
        if not bare(part):
            raise refuse(name, f"{kind.__name__} with hooks or a forward of its own", "none")
        if part._compiled_call_impl is not None:
            raise refuse(name, f"compiled {kind.__name__}", "compiling after accelerate")
        for parameter_name, parameter in part.named_parameters(name, recurse=False):
            if type(parameter) is not nn.Parameter or parameter.dtype not in FLOATING:
                found = f"{full_name(type(parameter))} in {parameter.dtype}"
                raise refuse(parameter_name, found, "torch.nn.Parameter in a floating dtype")


def hooked(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def bare(*modules: nn.Module) -> bool:
    """Whether none of `modules` has hooks or a forward other than its class's."""
    return not any(hooked(module) or "forward" in module.__dict__ for module in modules)


def carries(module: nn.Module, forward: Callable[..., object]) -> bool:
    """Whether calling `module` runs the replacement `forward` and nothing else."""
    own = module.__dict__.get("forward")
    return type(own) is partial and own.func is forward and not hooked(module)


def plain(wanted: type, *modules: nn.Module) -> bool:
    """Whether each of `modules` is exactly a `wanted` and `bare`, so that its weights are all."""
    return all(type(module) is wanted for module in modules) and bare(*modules)


def full_name(kind: type) -> str:
    """E.g. "torch.nn.modules.linear.Linear"."""
    return f"{kind.__module__}.{kind.__qualname__}"
