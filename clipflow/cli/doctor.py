"""`clipflow doctor`: what is installed, built and chosen on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform

from clipflow.cli.arguments import add_command

# Module -> its name on the package index.
REQUIRED = {
    "torch": "torch",
    "transformers": "transformers",
    "diffusers": "diffusers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "PIL": "pillow",
}
OPTIONAL = {
    "triton": "triton",
    "flash_attn": "flash-attn",
    "xformers": "xformers",
    "apex": "apex",
}


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "doctor",
        "show what is installed, what is built, and which backend each op uses",
        "clipflow doctor",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else format_facts(facts))
    return 0


def collect() -> dict[str, object]:
    """All facts, as JSON values."""
    from clipflow import __version__, extension

    modules = {**REQUIRED, **OPTIONAL}
    return {
        "clipflow": __version__,
        "python": platform.python_version(),
        "packages": {name: installed_version(module, name) for module, name in modules.items()},
        "machine": _machine(),
        "extension": {"built": extension.LOADED, **extension.build_facts()},
        "backend_variable": os.environ.get("CLIPFLOW_BACKEND"),
        "ops": _backends(),
        "models": _embedded_models(),
    }


def installed_version(module: str, package: str) -> str | None:
    """The version of a package, without importing it; None if it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def _machine() -> dict[str, object]:
    import torch

    gpus = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "torch_cuda": torch.version.cuda,
        "gpus": [
            f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
            for gpu in gpus
        ],
    }


def _backends() -> list[dict[str, object]]:
    """For each op and device: what a float32 call takes, and why others refuse."""
    import torch

    from clipflow.ops import all_ops, explain

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for op in all_ops():
        for device in devices:
            inputs = op.cases[0].inputs(torch.device(device), torch.float32)
            told = explain(op.name, inputs[0])
            refusals = dict(told.refusals)
            rows.append(
                {"op": op.name, "device": device, "uses": told.chosen, "refusals": refusals}
            )
    return rows


def _embedded_models() -> dict[str, str]:
    """Name -> folder and size, or what is wrong."""
    from clipflow.errors import InputError
    from clipflow.pipelines.model_folders import EMBEDDED, find_model

    models = {}
    for name in EMBEDDED:
        try:
            folder = find_model(name)
            size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
            models[name] = f"{folder} ({size / 2**20:.1f} MiB)"
        except InputError as error:
            models[name] = str(error)
    return models


def format_facts(facts: dict) -> str:
    """The facts as text for people."""
    packages = facts["packages"]
    lines = [f"clipflow {facts['clipflow']}, Python {facts['python']}", "", "packages"]
    lines += [f"  {name:<14}{packages[name] or 'MISSING'}" for name in REQUIRED.values()]
    lines += [f"  {name:<14}{packages[name] or 'not installed'}" for name in OPTIONAL.values()]
    lines += ["", "machine", *_lines(facts["machine"])]
    built = facts["extension"]
    lines += ["", "compiled extension"]
    lines += _lines(built) if built["built"] else ["  not built: ops run in PyTorch or Triton"]
    variable = facts["backend_variable"]
    lines += ["", "ops" + (f" (CLIPFLOW_BACKEND={variable})" if variable else "")]
    for row in facts["ops"]:
        lines.append(f"  {row['op']} on {row['device']}: {row['uses'] or 'no backend runs it'}")
        lines += [f"    {name}: {why}" for name, why in row["refusals"].items() if why]
    lines += ["", "embedded models"]
    return "\n".join([*lines, *_lines(facts["models"])])


def _lines(values: dict) -> list[str]:
    return [f"  {name:<20}{_shown(value)}" for name, value in values.items()]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return "none" if value is None or value == "" else str(value)
