"""Which parameters a recipe trains, and the optimizers that train them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clipflow.training.muon import Muon
from clipflow.training.recipe import Recipe


def has_prefix(name: str, prefix: str) -> bool:
    """Whether `prefix` is `name` or a dotted part at its start ("a.1" is none of "a.10.weight")."""
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")


def select_trainable(model: nn.Module, prefixes: Iterable[str]) -> dict[str, nn.Parameter]:
    """Set `requires_grad` on every parameter of `model`; return those that train, by name.

    Args:
        model: any module; shared parameters go by their first name.
        prefixes: parameter-name prefixes to train; empty trains all.

    Raises:
        ValueError: a prefix matches no parameter.
    """
    parameters = dict(model.named_parameters())
    prefixes = tuple(prefixes)
    _check_prefixes("trainable", prefixes, parameters)
    chosen = {
        name: p
        for name, p in parameters.items()
        if not prefixes or any(has_prefix(name, prefix) for prefix in prefixes)
    }
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    return chosen


def build_optimizers(
    model: nn.Module, trained: Mapping[str, nn.Parameter], recipe: Recipe
) -> list[Optimizer]:
    """AdamW alone, or Muon for the hidden matrices and AdamW for the rest.

    Every parameter group carries its `lr_scale` for `set_lr`.

    Raises:
        ValueError: an `lr_scale` prefix of the recipe matches no parameter of the model.
    """
    _check_prefixes("lr_scale", recipe.lr_scale, dict(model.named_parameters()))
    hidden = _hidden_matrices(model, trained) if recipe.optimizer == "muon" else set()
    optimizers: list[Optimizer] = []
    adamw = _groups({n: p for n, p in trained.items() if n not in hidden}, recipe)
    if adamw:
        # fused: 4x faster than foreach on one CPU core (4 M parameters in 300 tensors).
        optimizers.append(torch.optim.AdamW(adamw, lr=recipe.lr, betas=recipe.betas, fused=True))
    muon = _groups({n: p for n, p in trained.items() if n in hidden}, recipe)
    if muon:
        optimizers.append(Muon(muon, lr=recipe.lr))
    return optimizers


def set_lr(optimizers: Iterable[Optimizer], lr: float) -> None:
    """Set the learning rate of every group: `lr` times the group's `lr_scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


def optimizer_state(
    optimizers: Iterable[Optimizer], trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """All optimizer state as named tensors, "<parameter name>/<state name>"."""
    return {
        f"{name}/{key}": value
        for optimizer in optimizers
        for name, parameter in trained.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizers: Iterable[Optimizer],
    trained: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
) -> None:
    """Take over state that `optimizer_state` gave, bit for bit.

    Raises:
        ValueError: the state names a parameter that is not trained here.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full_name, value in state.items():
        name, _, key = full_name.rpartition("/")
        if name not in trained:
            raise ValueError(f"optimizer state: {name!r} is not a trained parameter")
        by_parameter.setdefault(name, {})[key] = value
    for optimizer in optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if name in by_parameter:
                    optimizer.state[parameter] = {
                        key: value.to(parameter.device).clone()
                        for key, value in by_parameter[name].items()
                    }


def _groups(parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> list[dict]:
    """One parameter group for each pair of learning-rate factor and weight decay."""
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in parameters.items():
        matches = [prefix for prefix in recipe.lr_scale if has_prefix(name, prefix)]
        factor = recipe.lr_scale[max(matches, key=len)] if matches else 1.0
        decay = recipe.weight_decay if parameter.ndim >= 2 else 0.0
        group = groups.setdefault(
            (factor, decay), {"params": [], "names": [], "lr_scale": factor, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


# First and last layers: they map between spaces of their own, where AdamW's step sizes fit.
_OUTER_LAYERS = (
    "lm_head.weight",
    "proj_out.weight",
    "patch_embed.proj.weight",
    "patch_embedding.weight",
    "decoder.conv_in.weight",
    "decoder.conv_out.weight",
    "patch_embedder.proj.weight",
    "norm_out.linear_2.weight",
)


def _hidden_matrices(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the weights that Muon suits: hidden linear layers and full convolutions."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, p in trained.items()
        if name.endswith("weight")
        and p.ndim in (2, 4)
        and p.shape[1] > 1  # a depthwise kernel is no matrix
        and id(p) not in tables
        and not name.endswith(_OUTER_LAYERS)
    }


def _check_prefixes(
    key: str, prefixes: Iterable[str], parameters: Mapping[str, nn.Parameter]
) -> None:
    for prefix in prefixes:
        if not any(has_prefix(name, prefix) for name in parameters):
            tops = ", ".join(sorted({name.split(".")[0] for name in parameters}))
            raise ValueError(
                f"recipe: {key} must name parameters of the model (under {tops}), got {prefix!r}"
            )
