"""Putting fused ops into a module that diffusers made, and taking them out again.

A `Recipe` knows one class of diffusers. It checks that an instance is what it was written for and
names what to set on which submodule: a `forward`, or the `processor` of an attention layer. Only
attributes of instances are set. Classes, parameters, buffers, submodules and their names stay, so
that the state dict, `save_pretrained`, optimizers and everything else see the stock module.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from clipflow.acceleration.checks import check_type, check_untouched, full_name, refuse
from clipflow.errors import AccelerationError
from clipflow.registry import chosen_backend, use_backend

TIERS = ("faithful", "fast")
MARK = "_clipflow_acceleration"
SAME = 1e-4  # relative L2: a thousand times the rounding of float32, less than any other formula

# Class of diffusers -> module:name of its recipe; diffusers is imported by that module.
RECIPES = {
    "AutoencoderDC": "clipflow.acceleration.dc_ae:AUTOENCODER",
    "Decoder": "clipflow.acceleration.dc_ae:DECODER",
    "Encoder": "clipflow.acceleration.dc_ae:ENCODER",
    "Lumina2Transformer2DModel": "clipflow.acceleration.lumina2:RECIPE",
    "LuminaNextDiT2DModel": "clipflow.acceleration.lumina_next:RECIPE",
    "SanaTransformer2DModel": "clipflow.acceleration.sana:RECIPE",
}


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """What is set on one submodule.

    Attributes:
        name: of the submodule, "" for the module itself.
        module: the submodule.
        by: for "forward" a function of the submodule and the arguments of its stock forward;
            for "processor" the processor.
        ops: the ops of clipflow that it calls, in a few words for the report.
        attribute: "forward" or "processor".
    """

    name: str
    module: nn.Module
    by: Callable[..., object]
    ops: str
    attribute: str = "forward"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one class of diffusers is accelerated.

    Attributes:
        kind: the class; instances of derived classes are refused.
        replacements: checks an instance and names what to replace; raises AccelerationError.
        int8_layers: names the linear layers and 1x1 convolutions that the fast tier quantizes;
            without it there is no such tier.
        specimen: makes a tiny model of the class and the arguments of a call, on the CPU in
            float32, to try on it whether the installed diffusers computes what the recipe does.
    """

    kind: type[nn.Module]
    replacements: Callable[[nn.Module], Iterable[Replacement]]
    int8_layers: Callable[[nn.Module], Iterable[str]] | None = None
    specimen: Callable[[], tuple[nn.Module, dict[str, object]]] | None = None


@dataclass
class _Set:
    """A replacement in place: `new` is the attribute's value now, `old` was it before."""

    part: Replacement
    new: object
    old: object
    what: str

    @classmethod
    def put(cls, part: Replacement) -> _Set:
        if part.attribute == "forward":
            # A partial, unlike a bound method, is copied and pickled with its module.
            new, old = partial(part.by, part.module), None
            what = f"{type(part.module).__name__}.forward"
        else:
            new, old = part.by, getattr(part.module, part.attribute)
            what = type(old).__name__
        setattr(part.module, part.attribute, new)
        return cls(part, new, old, what)

    def in_place(self) -> bool:
        return self.part.module.__dict__.get(self.part.attribute) is self.new

    def take_out(self) -> None:
        if self.part.attribute == "forward":
            del self.part.module.forward
        else:
            setattr(self.part.module, self.part.attribute, self.old)


class Acceleration:
    """What `accelerate` did to one module; `print` it, or `undo` it.

    A deep copy of the module has its own: `Acceleration.of(copy)`.

    Attributes:
        module: the accelerated module.
        tier: "faithful" or "fast".
    """

    def __init__(self, module: nn.Module, tier: str, parts: Iterable[Replacement]) -> None:
        self.module, self.tier = module, tier
        self._set = [_Set.put(part) for part in parts]
        setattr(module, MARK, self)

    @staticmethod
    def of(module: nn.Module) -> Acceleration | None:
        """The acceleration that `module` is under, None for a stock module."""
        return module.__dict__.get(MARK)

    @property
    def replaced(self) -> dict[str, int]:
        """How often each part was replaced, e.g. {"SanaTransformerBlock.forward": 20}."""
        return dict(Counter(done.what for done in self._set))

    @property
    def stays(self) -> dict[str, str]:
        """Class of each submodule that neither is nor has a replaced part, by its name.

        Inside of replaced parts all linear layers stay, but for those of the fast tier.
        """
        replaced = {id(done.part.module) for done in self._set}
        stays: dict[str, str] = {}
        todo = [("", self.module)]
        while todo:
            outer, part = todo.pop()
            for name, child in part.named_children():
                name = f"{outer}.{name}" if outer else name
                if not replaced & {id(inner) for inner in child.modules()}:
                    stays[name] = type(child).__name__
                elif id(child) not in replaced:
                    todo.append((name, child))
        return stays

    def undo(self) -> None:
        """Make the module stock again. Copies of it keep their own acceleration.

        Raises:
            AccelerationError: already undone, or somebody replaced a part since; nothing is
                changed.
        """
        if Acceleration.of(self.module) is not self:
            raise AccelerationError("undo: this acceleration is undone already")
        for done in self._set:
            if not done.in_place():
                name = f"{done.part.attribute} of {done.part.name or 'the module'}"
                raise AccelerationError(
                    f"undo: {name} was replaced after accelerate; wanted that taken out first"
                )
        for done in self._set:
            done.take_out()
        delattr(self.module, MARK)

    def explain(self) -> str:
        """The report line by line: each replaced part by its name, and the ops it calls."""
        lines = [str(self), ""]
        lines += [
            f"{done.part.name or '(the module)'}: {done.what} -> {done.part.ops}"
            for done in self._set
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        ops = {done.what: done.part.ops for done in self._set}
        name = type(self.module).__name__
        lines = [f"{name}, tier {self.tier}: {len(self._set)} parts replaced"]
        lines += [f"  {count:4} x {what}: {ops[what]}" for what, count in self.replaced.items()]
        stays = ", ".join(f"{name} ({kind})" for name, kind in self.stays.items())
        return "\n".join([*lines, f"  stays: {stays}"])

    def __repr__(self) -> str:
        return f"<Acceleration of {type(self.module).__name__}, tier {self.tier!r}>"


def accelerate(module: nn.Module, tier: str = "faithful") -> Acceleration:
    """Put the fused ops into a stock diffusers model, in place, so that it runs faster.

    State dict, parameters, signature and outputs stay: the module goes on working in its pipeline,
    in training, under autocast, deep-copied and compiled. Where a call asks for what the ops do not
    do (gradient checkpointing, `attention_kwargs`, a float attention bias), and where hooks, LoRA
    layers or attention processors are installed later, diffusers' own code runs for these parts.

    Args:
        module: an instance of one of `RECIPES`, such as `SanaPipeline.transformer`, on any device.
        tier: "faithful": the error against float64 is that of diffusers' own code or less.
            "fast": also runs the linear layers of all blocks in int8, on the CPU and where no
            gradient is needed (under `torch.no_grad()`); all around the blocks stays in float. The
            int8 weights take a quarter of the memory of float32 ones, beside these. A layer whose
            weight is changed or cast later runs in float.

    Returns:
        What was replaced, with `undo()`.

    Raises:
        AccelerationError: `module` is not what we know how to accelerate, in every detail, or is
            accelerated already; names the submodule, what was found and what is wanted. Nothing is
            changed then.
        ValueError: there is no such tier.
    """
    if tier not in TIERS:
        raise ValueError(f"accelerate: tier must be one of {', '.join(TIERS)}, got {tier!r}")
    recipe = _recipe_for(module)
    if (before := Acceleration.of(module)) is not None:
        raise AccelerationError(
            f"accelerate: {before!r} is in place; wanted a stock module: undo() it first"
        )
    check_untouched(module)
    parts = list(recipe.replacements(module))
    check_specimen(recipe)
    if tier == "fast":
        from clipflow.acceleration import int8  # itself made of replacements

        if recipe.int8_layers is None:
            raise refuse("", f"{type(module).__name__} with tier 'fast'", "tier 'faithful'")
        parts += int8.replacements(module, recipe.int8_layers(module))
    return Acceleration(module, tier, parts)


@functools.cache
def check_specimen(recipe: Recipe) -> None:
    """Raise unless the recipe's tiny model computes the same with and without the recipe.

    Tried once per process: a later version of diffusers may keep a signature and change the sense.
    """
    if recipe.specimen is None:
        return
    # A backend is chosen for all threads: only one that may not run on a CPU is changed.
    backend = "eager" if chosen_backend() == "triton" else chosen_backend()
    with torch.random.fork_rng([]), torch.device("cpu"), torch.no_grad(), use_backend(backend):
        model, call = recipe.specimen()
        expected = model(**call)[0]
        Acceleration(model, "faithful", recipe.replacements(model))
        got = model(**call)[0]
    error = float((got - expected).norm() / expected.norm())
    if not error < SAME:
        import diffusers

        found = f"off by {error:.1e} from what diffusers {diffusers.__version__} computes"
        raise AccelerationError(
            f"accelerate: {recipe.kind.__name__} on fused ops is {found}; wanted a version of "
            f"diffusers that computes as the one this recipe is for"
        )


def _recipe_for(module: object) -> Recipe:
    kind = type(module)
    if kind.__name__ not in RECIPES or kind.__module__.partition(".")[0] != "diffusers":
        hint = " (of a pipeline, its transformer)" if hasattr(module, "components") else ""
        raise refuse("", full_name(kind), f"one of diffusers' {', '.join(RECIPES)}{hint}")
    where, _, name = RECIPES[kind.__name__].partition(":")
    recipe = getattr(importlib.import_module(where), name)
    check_type("", module, recipe.kind)
    return recipe
