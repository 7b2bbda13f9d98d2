"""Folders of the published forms with random weights, to try and test things without any.

`python -m clipflow.testing FOLDER --family blip3o --size tiny` writes one from the shell.
"""

from clipflow.testing.blip3o_folder import (
    BLIP3O_SIZES,
    published_blip3o_config,
    write_blip3o_folder,
)
from clipflow.testing.blip3o_next_folder import NEXT_SIZES, next_config, write_blip3o_next_folder
from clipflow.testing.published_config import SIZES, published_config, size_config
from clipflow.testing.tokenizer_files import write_tokenizer
from clipflow.testing.unilip_folder import plan_tensors, write_unilip_folder

__all__ = [
    "BLIP3O_SIZES",
    "NEXT_SIZES",
    "SIZES",
    "next_config",
    "plan_tensors",
    "published_blip3o_config",
    "published_config",
    "size_config",
    "write_blip3o_folder",
    "write_blip3o_next_folder",
    "write_tokenizer",
    "write_unilip_folder",
]
