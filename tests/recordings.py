"""Where the recorded outputs of the references are.

The repository holds small ones. CLIPFLOW_PARITY_DIR names larger ones: a folder with a folder for
each recording, or one of those folders, beside which the others are.
"""

import os
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"


def recording(name: str) -> Path:
    """The folder of the recording `name`: the larger one where there is one, else our own."""
    larger = os.environ.get("CLIPFLOW_PARITY_DIR")
    if larger is not None:
        for folder in (Path(larger) / name, Path(larger).resolve().parent / name):
            if folder.is_dir():
                return folder
    return FIXTURES / name
