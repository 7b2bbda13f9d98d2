"""What people import: one pipeline that draws, edits, answers, classifies and reconstructs.

Loaded when first used: reading a picture (`image_io`) needs none of what a model needs.
"""

import importlib

_EXPORTS = {
    "CLIPFlowPipeline": "clipflow.pipelines.clipflow_pipeline",
    "CLIPFlowPipelineOutput": "clipflow.pipelines.output",
    "FeatureDecoding": "clipflow.pipelines.decoding",
    "ImageTokenSampling": "clipflow.pipelines.decoding",
    "UniLIPTokenizer": "clipflow.pipelines.image_tokenizer",
}

__all__ = [
    "CLIPFlowPipeline",
    "CLIPFlowPipelineOutput",
    "FeatureDecoding",
    "ImageTokenSampling",
    "UniLIPTokenizer",
]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'clipflow.pipelines' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
