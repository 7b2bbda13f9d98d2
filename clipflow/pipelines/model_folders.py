"""Find a model by name or folder, without loading anything of it."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from clipflow.errors import InputError

EMBEDDED = ("scenes", "scenes-blip3o")


def find_model(name: str | Path, *, local_files_only: bool = True) -> Path:
    """The folder of a model.

    Args:
        name: an embedded model's name, a folder, or (only if asked for) a hub name "owner/model".
        local_files_only: False allows a download of a hub name.

    Raises:
        InputError: there is no such model; says what was found.
    """
    if str(name) in EMBEDDED:
        return _embedded(str(name))
    folder = Path(name).expanduser()
    if folder.exists():
        return check_model_folder(folder)
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return _from_hub(str(name), local_files_only)
    raise InputError(
        f"model {str(name)!r} is unknown: must be one of {', '.join(EMBEDDED)}, or a folder"
    )


def check_model_folder(folder: Path) -> Path:
    """Refuse a folder that holds no model.

    Raises:
        InputError: it has no config.json or no safetensors; lists what it has.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: a model must be a folder, got a file")
    found = sorted(entry.name for entry in folder.iterdir())
    weights = any(entry.endswith(".safetensors") for entry in found)
    if "config.json" in found and weights:
        return folder
    listed = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    raise InputError(
        f"{folder}: a model folder must hold config.json and *.safetensors, "
        f"got {listed or 'an empty folder'}"
    )


def _embedded(name: str) -> Path:
    folder = Path(str(importlib.resources.files("clipflow"))) / "assets" / name
    if not folder.is_dir():
        raise InputError(f"model {name!r} is not in this installation: no folder {folder}")
    return check_model_folder(folder)


def _from_hub(name: str, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt"]
    try:
        folder = snapshot_download(name, local_files_only=local_files_only, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if local_files_only:
            raise InputError(
                f"model {name!r} is unknown: no such folder, and not in the local hub cache "
                "(local_files_only=False allows a download)"
            ) from error
        raise InputError(f"model {name!r}: the download failed: {error}") from error
    return check_model_folder(Path(folder))
