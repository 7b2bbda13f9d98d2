"""UniLIP: configuration, model, folders."""

from clipflow.models.unilip.config import UniLIPConfig
from clipflow.models.unilip.model import UniLIPModel
from clipflow.models.unilip.scenes import scenes_config, scenes_model

__all__ = ["UniLIPConfig", "UniLIPModel", "scenes_config", "scenes_model"]
