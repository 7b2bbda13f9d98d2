"""Features of the pictures that the language model reads; those of the last ones are kept.

The vision tower is most of the work of a question, and the same pictures come again in every turn
of a conversation.
"""

# Shape suffixes: N = image tokens of a picture, H = LM width.

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from clipflow.pipelines.conditions import ConditionCache
from clipflow.pipelines.offload import LANGUAGE, Offload
from clipflow.pipelines.picture_sets import PictureSet
from clipflow.sampling.weights import WeightsWatch

MAX_BYTES = 64 * 2**20


class PictureEncoder:
    """Encodes pictures, through a cache that forgets when the weights change (as `WeightsWatch`).

    Attributes:
        cache: features of the pictures used last, [N, H] each.
    """

    def __init__(self, model: nn.Module, offload: Offload, parts: Sequence[str]) -> None:
        self.cache = ConditionCache(MAX_BYTES)
        self._model = model
        self._parts = tuple(parts)
        self._offload = offload
        self._watch = WeightsWatch(self._parameters)
        self._state = self._watch.state()  # stands for the weights as they are

    @torch.no_grad()
    def encode(self, pictures: PictureSet) -> list[Tensor]:
        """Features [N, H] of each of `pictures`; some are encoded at a time."""
        weights, processor = self._weights(), pictures.processor
        keys = [(*weights, processor, digest) for digest in pictures.digests]
        found = [self.cache.get(key) for key in keys]
        missing = [place for place, features in enumerate(found) if features is None]
        with self._offload.running(LANGUAGE):
            for start in range(0, len(missing), pictures.at_once):
                places = missing[start : start + pictures.at_once]
                new = pictures.features(self._model, places)
                for place, features in zip(places, new, strict=True):
                    found[place] = features.clone()  # a view would keep all of them
                    self.cache.put(keys[place], found[place])
        # Offloading changes the device and not the weights.
        return [features.to(self._model.device) for features in found]

    def _weights(self) -> tuple[Hashable, ...]:
        """Names the state of the weights, and the autocast dtype; drops what older ones made."""
        device = self._model.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        now = self._watch.state()
        if now is not self._state:
            self.cache.clear()
            self._state = now
        return now, autocast

    def _parameters(self) -> list[Tensor]:
        parts = [getattr(self._model, name) for name in self._parts]
        return self._offload.at_rest([p for part in parts for p in part.parameters()])
