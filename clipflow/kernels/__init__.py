"""Where the Triton kernels are installed: `clipflow.kernels.triton`.

In the repository they lie in the top-level folder `kernels/`, which is put on this package's path.
"""

from pathlib import Path

_in_repository = Path(__file__).resolve().parents[2] / "kernels"
if (_in_repository / "triton").is_dir():
    __path__.append(str(_in_repository))
