"""Documentation that is made from code, or that holds code, says what is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from docs import make_ops

ROOT = make_ops.ROOT


def test_the_page_of_ops_is_up_to_date():
    assert make_ops.PAGE.read_text() == make_ops.page(), "run: python docs/make_ops.py"


def test_every_op_states_formula_and_source():
    for op in make_ops.all_ops():
        assert "Source: " in make_ops.contract(op), op.name
        assert op.traffic and op.public.__doc__, op.name


def test_the_examples_of_understanding_run():
    text = (ROOT / "docs/understanding.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)
    assert names["label"] == "a red circle and a blue square" and names["probability"] > 0.5
    assert names["answers"] == ["square", "red"]


def test_the_example_op_of_contributing_passes_the_tests_of_every_op(tmp_path):
    """The contract printed in CONTRIBUTING.md, put into the table by its one line, is tested."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (contract,) = re.findall(r"`clipflow/ops/rms_scale.py`:\n\n```python\n(.*?)```", text, re.S)
    (line,) = re.findall(r"`clipflow/ops/__init__.py`:\n\n```python\n(.*?)```", text, re.S)
    (tmp_path / "rms_scale.py").write_text(contract)
    # The op's file lies beside the package, so its import here is from the test's folder.
    (tmp_path / "conftest.py").write_text(
        line.replace("clipflow.ops.rms_scale", "rms_scale")
        + "import sys\n"
        + f"sys.path += [{str(ROOT / 'tests')!r}]\n"
    )
    for name in ("test_ops.py", "test_ops_properties.py"):
        (tmp_path / name).write_text((ROOT / "tests" / name).read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ".", "-k", "rms_scale"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20, done.stdout
