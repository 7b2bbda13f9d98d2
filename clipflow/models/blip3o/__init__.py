"""BLIP3-o: a language model whose queries condition a DiT over CLIP features."""

from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.models.blip3o.model import BLIP3oModel
from clipflow.models.blip3o.published import blip3o_config

__all__ = ["BLIP3oConfig", "BLIP3oModel", "blip3o_config"]
