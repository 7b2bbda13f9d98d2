"""Conditions of prompts, computed once: the language model's side of drawing and editing.

A condition depends on the prompt (and the picture, when editing) and on the weights, never on the
noise, so those of the prompts used last are kept. The null prompt of guidance is one of them.
"""

# Shape suffixes: B = batch, L = positions of one prompt and the queries, C = caption channels.

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipflow.errors import ShapeError
from clipflow.pipelines.offload import LANGUAGE, Offload
from clipflow.pipelines.prompts import Prompts
from clipflow.sampling.weights import WeightsWatch

Key = tuple[Hashable, ...]

MAX_BYTES = 256 * 2**20
# In place of a written prompt and the digest of its picture.
NULL = (None, b"")


@dataclass(frozen=True)
class CacheStatistics:
    """Look-ups that found a condition and that did not; what was dropped; what is held now."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int


class ConditionCache:
    """The conditions used last, within a budget of bytes; for any number of threads.

    A tensor that comes out is the one that is kept: read it only.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        """Hold at most `max_bytes` of tensors; 0 keeps nothing."""
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, Tensor] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._max_bytes = max_bytes

    @property
    def max_bytes(self) -> int:
        """The budget; setting a smaller one drops what was used longest ago."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        with self._lock:
            self._max_bytes = value
            self._shrink()

    def get(self, key: Key) -> Tensor | None:
        """What is kept under `key`, now the one used last; None where there is nothing."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self._misses += 1
            else:
                self._hits += 1
                self._entries.move_to_end(key)
            return found

    def put(self, key: Key, value: Tensor) -> None:
        """Keep `value`, unless it alone is over the budget."""
        with self._lock:
            self._remove(key)
            if value.nbytes <= self._max_bytes:
                self._entries[key] = value
                self._bytes += value.nbytes
                self._shrink()

    def clear(self, owner: object = None) -> None:
        """Forget every condition, or those whose key begins with `owner`; counts go on."""
        with self._lock:
            for key in list(self._entries):
                if owner is None or key[0] is owner:
                    self._remove(key)

    def statistics(self) -> CacheStatistics:
        """Counts since the cache was made, and what it holds now."""
        with self._lock:
            held = len(self._entries), self._bytes
            return CacheStatistics(self._hits, self._misses, self._evictions, *held)

    def _remove(self, key: Key) -> None:
        value = self._entries.pop(key, None)
        if value is not None:
            self._bytes -= value.nbytes

    def _shrink(self) -> None:
        while self._bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))
            self._evictions += 1


class ConditionEncoder:
    """Prompts to conditions, through a cache that forgets when the weights change.

    A change is any new or resized parameter, `load_state_dict`, an optimizer's step, `to`; all that
    PyTorch counts as written. Writes behind its back (`parameter.data.copy_(...)`) need a
    `cache.clear()`.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        parts: Sequence[str],
        offload: Offload,
    ) -> None:
        """Encode for `model` what `prompts` writes; conditions depend on its children `parts`."""
        self.model = model
        self.prompts = prompts
        self.cache = ConditionCache()
        self._parts = tuple(parts)
        self._offload = offload
        self._watch = WeightsWatch(self._parameters)
        self._state = self._watch.state()  # stands for the weights as they are

    @torch.no_grad()
    def text_to_image(
        self, texts: Sequence[str | None], *, one_by_one: bool = False
    ) -> list[Tensor]:
        """Conditions [L_i, C] of the prompts `texts`, each of its own length, not padded.

        Args:
            texts: what to draw; None or blank is the null prompt. Equal ones are encoded once.
            one_by_one: run the language model on each prompt alone, so that its bits do not depend
                on the others; otherwise on all that are not in the cache, in one batch.

        Raises:
            InputError: a text is longer than the model can read.
        """
        write = self.prompts.text_to_image
        wanted = [None if self._is_constant(text) else write(text) for text in texts]
        return self.written(wanted, one_by_one=one_by_one)

    @torch.no_grad()
    def edit(
        self, pixel_values: Tensor, texts: Sequence[str | None], *, one_by_one: bool = False
    ) -> list[Tensor]:
        """Conditions [L_i, C] of edits: instruction `texts[i]` on picture `pixel_values[i]`.

        Args:
            pixel_values: [B, 3, S, S], as the image processor makes them; equal pictures go
                through the vision tower once, those whose conditions are known not at all.
            texts: B instructions; None or blank is the null prompt.
            one_by_one: as of `text_to_image`; the vision tower sees each picture alone, too.

        Raises:
            InputError: a text is longer than the model can read.
            ShapeError: there are not as many pictures as texts.
        """
        if len(pixel_values) != len(texts):
            raise ShapeError(
                f"edit: pixel_values must be [{len(texts)}, 3, S, S], got "
                f"{list(pixel_values.shape)}"
            )
        write = self.prompts.edit
        wanted = [None if self._is_constant(text) else write(text) for text in texts]
        return self.written(wanted, pixel_values=pixel_values, one_by_one=one_by_one)

    @torch.no_grad()
    def written(
        self,
        prompts: Sequence[str | None],
        *,
        pixel_values: Tensor | None = None,
        one_by_one: bool = False,
    ) -> list[Tensor]:
        """Conditions [L_i, C] of prompts that are written already; None is the constant null.

        The other arguments are those of `edit`; without pictures, `pixel_values` is None.
        """
        if pixel_values is None:
            wanted = [NULL if prompt is None else (prompt, b"") for prompt in prompts]

            def encode_texts(missing: list[int]) -> list[Tensor]:
                return self._encode([wanted[i][0] for i in missing], None)

            return self._through_cache(wanted, encode_texts, one_by_one)
        digests = [_digest(picture) for picture in pixel_values]
        wanted = [
            NULL if prompt is None else (prompt, digest)
            for prompt, digest in zip(prompts, digests, strict=True)
        ]

        def encode(missing: list[int]) -> list[Tensor]:
            first = {digests[i]: i for i in reversed(missing)}
            rows = {digest: row for row, digest in enumerate(first)}
            pictures = pixel_values[list(first.values())].to(self.model.device, self.model.dtype)
            features = self.model.encode_image(pictures)[[rows[digests[i]] for i in missing]]
            return self._encode([wanted[i][0] for i in missing], features)

        return self._through_cache(wanted, encode, one_by_one)

    def constant(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, made once for the weights as they are and kept under `name`."""
        key = (*self._weights(), name)
        found = self.cache.get(key)
        if found is None:
            found = make()
            self.cache.put(key, found)
        return found

    def _through_cache(
        self,
        wanted: list[tuple[str | None, bytes]],
        encode: Callable[[list[int]], list[Tensor]],
        one_by_one: bool,
    ) -> list[Tensor]:
        """The condition of each (written prompt, digest); `encode` those at the missing places."""
        weights = self._weights()
        found: dict[tuple[str | None, bytes], Tensor] = {}
        missing: dict[tuple[str | None, bytes], int] = {}
        for place, key in enumerate(wanted):
            if key in found or key in missing:
                continue
            known = self.cache.get((*weights, one_by_one, *key))
            if known is None and key == NULL:
                found[key] = self.model.null_condition()
                self.cache.put((*weights, one_by_one, *key), found[key])
            elif known is None:
                missing[key] = place
            elif key == NULL:
                found[key] = known
            else:
                self.prompts.ids(key[0])  # warns of unknown words in every call
                found[key] = known
        if missing:
            batches = [[key] for key in missing] if one_by_one else [list(missing)]
            with self._offload.running(LANGUAGE):
                new = [row for batch in batches for row in encode([missing[k] for k in batch])]
            for key, condition in zip(missing, new, strict=True):
                self.cache.put((*weights, one_by_one, *key), condition)
                found[key] = condition
        return [found[key] for key in wanted]

    def _encode(self, texts: list[str], features: Tensor | None) -> list[Tensor]:
        ids, mask = self.prompts.rows(texts, self.model.device)
        condition = self.model.encode_condition(ids, mask, features)
        # Copies: a view would keep the rows of the whole batch.
        rows = zip(condition.hidden, condition.mask, strict=True)
        return [hidden[real] for hidden, real in rows]

    def _is_constant(self, text: str | None) -> bool:
        """Whether `text` stands for the null condition of a family in which that is a constant."""
        blank = text is None or not text.strip()
        return blank and self.model.null_condition() is not None

    def _weights(self) -> Key:
        """Names the state of the weights, and the autocast dtype; drops what older ones made."""
        device = self.model.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        now = self._watch.state()
        if now is not self._state:
            self.cache.clear(self._state)
            self._state = now
        return now, autocast

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Weights that move in the `with` block, and only move, forget nothing."""
        self._weights()
        yield
        self._watch.accept()

    def _parameters(self) -> list[Tensor]:
        parts = [getattr(self.model, name) for name in self._parts]
        lists = [[p] if isinstance(p, Tensor) else list(p.parameters()) for p in parts]
        return self._offload.at_rest([p for parameters in lists for p in parameters])


def _digest(picture: Tensor) -> bytes:
    """Of the shape, dtype and values of `picture`."""
    values = picture.detach().cpu().contiguous()
    described = f"{list(values.shape)} {values.dtype} ".encode()
    return hashlib.blake2b(described + values.view(torch.uint8).numpy().tobytes()).digest()
