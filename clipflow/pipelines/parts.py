"""What every call of a pipeline shares: the model's parts, folders, device and progress bar."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from clipflow.errors import InputError
from clipflow.pipelines.conditions import ConditionCache, ConditionEncoder
from clipflow.pipelines.families import family_of_model
from clipflow.pipelines.generation_defaults import FILE_NAME as GENERATION_FILE
from clipflow.pipelines.generation_defaults import GenerationDefaults
from clipflow.pipelines.image_io import write_atomically
from clipflow.pipelines.image_processor import FILE_NAME as PROCESSOR_FILE
from clipflow.pipelines.image_processor import ImageProcessor
from clipflow.pipelines.loading import load_model, load_tokenizer, summarize_folder
from clipflow.pipelines.memory_estimate import MemoryEstimator
from clipflow.pipelines.model_folders import find_model
from clipflow.pipelines.offload import DECODER, LANGUAGE, Offload
from clipflow.pipelines.options import check_tier
from clipflow.pipelines.placement import execution_device, should_offload
from clipflow.pipelines.sampler import Sampler
from clipflow.sampling import PlanCache

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


class PipelineParts:
    """A model of any family with its tokenizer, image processor and defaults.

    Attributes:
        family: what is the model's own way of doing things.
        progress: options of tqdm bars; see `set_progress_bar_config`.
    """

    memory_estimate = MemoryEstimator()

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_processor: ImageProcessor | None = None,
        defaults: GenerationDefaults | None = None,
        tier: str = "faithful",
    ) -> None:
        """Put a pipeline together from its parts; `from_pretrained` reads them from a folder.

        Raises:
            TypeError: `model` is of no family.
        """
        check_tier(tier)
        self.family = family = family_of_model(model)
        self.model = model.eval()
        self.tier = tier
        self.tokenizer = tokenizer
        self.image_processor = image_processor or family.image_processor(None, model.config)
        self.defaults = defaults or family.generation_defaults(None, model.config)
        self.prompts = family.prompts(tokenizer, model.config)
        self.offload = Offload(model, {LANGUAGE: family.language, DECODER: family.decoder})
        self.conditions = ConditionEncoder(
            model, self.prompts, family.condition_parts, self.offload
        )
        self.sampler = Sampler(model, family.schedule)
        self.reader = family.reader(self)
        self.progress: dict[str, object] = {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = torch.float32,
        tier: str = "faithful",
        offload: str = "auto",
        local_files_only: bool = True,
    ) -> Self:
        """Load a model.

        Args:
            name: "scenes" (embedded), a folder, or a hub name "owner/model".
            device: where to put it; the CPU when not given.
            dtype: of the weights; "auto" or None leaves them as they are stored, or in the dtype
                that holds all where parts are stored in several. DC-AE decoders are float32 always.
            tier: of sampling where a call names none: "faithful", or "fast", which trades exactness
                for speed (int8 on CPU, fp8 on GPUs that have it).
            offload: "always" or "never" use `enable_model_cpu_offload`, or "auto": where a picture
                fits into the memory of `device` only so.
            local_files_only: False allows a hub name to be downloaded.

        Raises:
            InputError: there is no such model, or its folder is not complete.
            NotEnoughMemory: the weights do not fit; found out before they are read.
        """
        folder = find_model(name, local_files_only=local_files_only)
        dtype = _weight_dtype(folder, dtype)
        device = torch.device(device or "cpu")
        offloaded = should_offload(folder, device, dtype, tier, offload)
        summary = summarize_folder(folder)
        family, config = summary.family, summary.config
        others: dict[str, Any] = {  # quick to refuse, so before the weights
            "tokenizer": load_tokenizer(folder, family, config),
            "image_processor": family.image_processor(folder, config),
            "defaults": family.generation_defaults(folder, config),
        }
        model = load_model(folder, dtype=dtype, device="cpu" if offloaded else device)
        pipeline = cls(model, tier=tier, **others)
        if offloaded:
            pipeline.enable_model_cpu_offload(device)
        return pipeline

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything that `from_pretrained` reads; weights come back bitwise."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        texts = {GENERATION_FILE: self.defaults.to_json()}
        if self.image_processor is not None:
            texts[PROCESSOR_FILE] = self.image_processor.to_json()
        for name, text in texts.items():
            write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))

    @property
    def condition_cache(self) -> ConditionCache:
        """Conditions of the prompts used last: `max_bytes`, `clear()` and `statistics()`."""
        return self.conditions.cache

    @property
    def feature_cache(self) -> ConditionCache:
        """Features of the pictures asked about last: as `condition_cache`.

        Raises:
            InputError: the model sees no pictures.
        """
        self.family.require("ask", self.model)
        return self.reader.cache

    @property
    def plans(self) -> PlanCache:
        """The sampling plans in use: `plans()`, each with `explain()`; `max_bytes`, `clear()`."""
        return self.sampler.plans

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move the model and set its dtype, in place; `to(dtype)` works too.

        The pixel decoder stays float32: it is a small part of the time, and half precision shows.
        A move to a device ends offloading.

        Raises:
            InputError: an offloaded part is running.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        self.offload.check_idle()
        if device is not None:
            self.offload.disable()
        wide = self.family.wide_modules
        for name, part in self.model.named_children():
            part.to(device=device, dtype=torch.float32 if name in wide else dtype)
        for parameter in self.model.parameters(recurse=False):
            parameter.data = parameter.data.to(device=device, dtype=dtype)
        # Rotary tables in half precision would turn late positions by the wrong angle.
        self.family.finish(self.model, self.device)
        return self

    def enable_model_cpu_offload(self, device: str | torch.device | None = None) -> None:
        """Keep all but the diffusion transformer on the CPU, on `device` only while it runs.

        The pictures are the same. What is needed at once falls from all weights to the transformer
        and the larger of the two others, the language side and the decoder; each call moves those
        that it uses. `to(device)` ends it.

        Args:
            device: where to run; when not given, where the pipeline is, or else the GPU.

        Raises:
            InputError: `device` is the CPU or there is no GPU, or an offloaded part is running.
            NotEnoughMemory: the CPU has no room for what was on the device.
        """
        device = execution_device(device, self.device)
        with self.conditions.kept() if device == self.device else nullcontext():
            self.offload.enable(device)
        self.model.dit.to(device)
        for parameter in self.model.parameters(recurse=False):
            parameter.data = parameter.data.to(device)

    def set_progress_bar_config(self, **config: object) -> None:
        """Options of the tqdm bar of later calls, e.g. `disable=True`."""
        self.progress = config


def _weight_dtype(folder: Path, dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype that the argument `dtype` of `from_pretrained` means for the model in `folder`."""
    if dtype is None or dtype == "auto":
        return summarize_folder(folder).dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f'dtype must be a floating point torch.dtype or "auto", got {dtype!r}')
    return dtype
