"""BLIP3o-NEXT: configuration, model, folders."""

from clipflow.models.blip3o_next.config import BLIP3oNextConfig
from clipflow.models.blip3o_next.model import BLIP3oNextModel

__all__ = ["BLIP3oNextConfig", "BLIP3oNextModel"]
