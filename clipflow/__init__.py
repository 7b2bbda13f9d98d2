"""clipflow: unified vision-language models that diffuse CLIP features, sampled fast.

Public names are loaded when first used, so that `import clipflow` costs next to nothing.
"""

import importlib

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "Acceleration": "clipflow.acceleration",
    "AccelerationError": "clipflow.errors",
    "CLIPFlowPipeline": "clipflow.pipelines",
    "FeatureDecoding": "clipflow.pipelines",
    "FirstBlockCache": "clipflow.sampling",
    "ImageTokenSampling": "clipflow.pipelines",
    "TaylorForecast": "clipflow.sampling",
    "UniLIPTokenizer": "clipflow.pipelines",
    "accelerate": "clipflow.acceleration",
    "BackendUnavailable": "clipflow.errors",
    "ShapeError": "clipflow.errors",
    "explain": "clipflow.ops",
    "use_backend": "clipflow.ops",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'clipflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
