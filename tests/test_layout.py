"""The rules of the house: imports go down, files and functions are short, ops share one name."""

import ast
from pathlib import Path

import pytest

import clipflow

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "clipflow"
FLOORS = {
    "cli": 6, "evaluation": 6, "serving": 6, "testing": 6, "training": 6,
    "pipelines": 5,
    "models": 4, "scenes": 4, "acceleration": 4,
    "nn": 3, "sampling": 3,
    "ops": 2,
    "registry": 1, "errors": 1, "extension": 1, "modulation": 1,
    "kernels": 0,
}  # fmt: skip
MOST_LINES, MOST_FUNCTION_LINES, MOST_KERNEL_LINES = 500, 60, 100

MODULES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SOURCES = sorted(
    p for kind in ("*.cpp", "*.cu", "*.h", "*.cuh") for p in ROOT.glob(f"csrc/**/{kind}")
)
OPS = {p.stem for p in (PACKAGE / "ops").glob("*.py")} - {"__init__"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Every clipflow module that the file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "clipflow"}


def part(module: str) -> str:
    """The part of the house that `clipflow.x...` belongs to; a public name, where it is defined."""
    name = module.split(".")[1] if "." in module else "clipflow"
    return clipflow._EXPORTS.get(name, f"clipflow.{name}").split(".")[1]


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent != PACKAGE], ids=name_of)
def test_imports_go_down(path):
    own = path.relative_to(PACKAGE).parts[0]
    assert own in FLOORS, f"{own}/ has no floor"
    for module in imports(path):
        other = part(module)
        if other == own or other.startswith("__"):
            continue
        assert other in FLOORS, f"{name_of(path)} imports {module}, which has no floor"
        apart = FLOORS[own] == FLOORS[other] == FLOORS["nn"]
        assert FLOORS[other] <= FLOORS[own] and not apart, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("name", ["registry", "errors", "extension", "modulation"])
def test_floor_one_imports_nothing_above(name):
    assert all(FLOORS[part(module)] <= 1 for module in imports(PACKAGE / f"{name}.py"))


def test_kernels_know_nothing_of_clipflow():
    shared = "clipflow.kernels.triton._"  # what several kernels are made of
    for path in KERNELS:
        assert all(module.startswith(shared) for module in imports(path)), name_of(path)
    for path in SOURCES:
        assert "Python.h" not in path.read_text(), name_of(path)


def test_ops_do_not_import_each_other():
    for path in (PACKAGE / "ops").glob("*.py"):
        others = {f"clipflow.ops.{op}" for op in OPS - {path.stem}}
        if path.stem != "__init__":
            assert not any(m.startswith(o) for m in imports(path) for o in others), name_of(path)


def test_only_ops_reach_for_a_backend():
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] not in ("ops", "kernels", "extension.py"):
            assert not any(m.startswith("clipflow.kernels") for m in imports(path)), name_of(path)
            assert "torch.ops.clipflow" not in path.read_text(), name_of(path)


def test_an_op_has_one_name_on_every_floor():
    backends = [*(ROOT / "kernels/triton").glob("*.py"), *(ROOT / "csrc/cuda").glob("*.cu")]
    backends += (ROOT / "csrc/cpu").glob("*.cpp")
    for path in backends:
        op = path.stem.removesuffix("_rows")
        assert op in OPS or path.stem.startswith("_"), f"{name_of(path)} belongs to no op"
    assert not (ROOT / "kernels/__init__.py").exists(), "it would hide the package `kernels`"


@pytest.mark.parametrize("path", [*MODULES, *KERNELS, *SOURCES], ids=name_of)
def test_files_are_short_and_say_what_they_are(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MOST_LINES, f"{name_of(path)} has {len(lines)} lines"
    assert path.stem not in ("utils", "helpers", "misc", "common"), name_of(path)
    too_wide = [i for i, line in enumerate(lines, 1) if len(line) > 100 and "http" not in line]
    assert not too_wide, f"{name_of(path)}: lines over 100 columns: {too_wide}"


@pytest.mark.parametrize("path", [*MODULES, *KERNELS], ids=name_of)
def test_functions_are_short(path):
    most = MOST_KERNEL_LINES if path in KERNELS else MOST_FUNCTION_LINES
    tree = ast.parse(path.read_text())
    assert not path.read_text().strip() or ast.get_docstring(tree), f"{name_of(path)}: no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None and len(node.body) > 1
            first = node.body[1 if documented else 0].lineno
            length = node.end_lineno - first + 1
            assert length <= most, f"{name_of(path)}: {node.name} has {length} lines"
