"""Models that are read from folders and written to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from clipflow.models.folders.checkpoint import save_folder
from clipflow.models.folders.loading import FolderFormat, load_model
from clipflow.models.folders.saved_config import SavedConfig

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


class SavedModel(nn.Module):
    """What the models of all families have in common.

    Attributes:
        config: sizes; alone it builds the model.
        folder_format: how folders of the family are read.
    """

    config: SavedConfig
    folder_format: ClassVar[FolderFormat]

    def save_pretrained(self, directory: str | Path, *, max_shard_size: int | str = "2GB") -> None:
        """Write config.json and safetensors; see `checkpoint.save_folder` for what it promises."""
        state = self.state_dict()
        save_folder(directory, self.config.to_dict(), state, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The model in `directory`, ours or a published one, in evaluation mode.

        Args:
            directory: written by `save_pretrained`, or a checkpoint of the family in safetensors.
            dtype: of the parameters, but for a DC-AE decoder, which is float32 always; as stored
                when not given. Rotary tables stay float32.
            device: where the parameters go.

        Raises:
            FileNotFoundError: no such folder, or no config.json or weights in it.
            ValueError: a damaged file, other keys or shapes than the model's, or a weight that is
                NaN or infinite.
        """
        return load_model(cls, directory, cls.folder_format, dtype=dtype, device=device)
