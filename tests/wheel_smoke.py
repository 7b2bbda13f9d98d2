"""What an installed wheel must do; `make wheel` runs this outside the repository."""

import importlib.util
import subprocess
import sys
from pathlib import Path


def main() -> None:
    sys.path.pop(0)  # this folder, so that nothing of the repository can be imported
    import torch

    import clipflow
    from clipflow import extension, ops

    package = Path(clipflow.__file__).parent
    assert package.is_relative_to(sys.prefix), f"imported {package}, not the wheel in {sys.prefix}"
    x, modulation = torch.randn(2, 5, 24), torch.randn(2, 48)
    shift, scale = modulation.chunk(2, dim=-1)
    eager = ops.adaln_norm(x, shift, scale, backend="eager")
    torch.testing.assert_close(ops.adaln_norm(x, shift, scale), eager)
    assert extension.LOADED, "the wheel has no compiled extension"
    assert ops.explain("adaln_norm", x).chosen == "native"
    assert importlib.util.find_spec("clipflow.kernels.triton.adaln_norm"), "no Triton kernels"
    assert list(package.glob("recipes/**/*.yaml")), "no recipes"
    command = Path(sys.executable).with_name("clipflow")
    subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
    print(f"wheel works: {package}, {extension.build_facts()}")


if __name__ == "__main__":
    main()
