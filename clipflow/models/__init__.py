"""What a checkpoint is: configurations, modules, key maps, folders. Loaded when first named."""

import importlib

# Public name -> the module that defines it; importing a model imports transformers.
_EXPORTS = {
    "BLIP3oNextConfig": "clipflow.models.blip3o_next.config",
    "BLIP3oNextModel": "clipflow.models.blip3o_next.model",
    "UniLIPConfig": "clipflow.models.unilip.config",
    "UniLIPModel": "clipflow.models.unilip.model",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'clipflow.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
