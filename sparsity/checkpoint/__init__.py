"""Checkpoints: ``save``, ``load``, and the format ``trisparse-v1`` that transformers' ``from_pretrained`` opens too.

The names are imported when they are first used: transformers asks for the quantizer while it is being imported itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trisparse.sparsity.checkpoint.files import (
        ADAPTERS_FILE,
        INFO_FILE,
        MASKS_FILE,
        CheckpointError,
        check_output,
        is_checkpoint,
        replaced_folder,
    )
    from trisparse.sparsity.checkpoint.info import checkpoint_info, mask_entry, read_info
    from trisparse.sparsity.checkpoint.quantizer import TrisparseConfig, TrisparseQuantizer
    from trisparse.sparsity.checkpoint.reader import load
    from trisparse.sparsity.checkpoint.writer import save

_HOME = {
    "ADAPTERS_FILE": "files",
    "INFO_FILE": "files",
    "MASKS_FILE": "files",
    "CheckpointError": "files",
    "TrisparseConfig": "quantizer",
    "TrisparseQuantizer": "quantizer",
    "check_output": "files",
    "checkpoint_info": "info",
    "is_checkpoint": "files",
    "load": "reader",
    "mask_entry": "info",
    "read_info": "info",
    "replaced_folder": "files",
    "save": "writer",
}

__all__ = [
    "ADAPTERS_FILE",
    "INFO_FILE",
    "MASKS_FILE",
    "CheckpointError",
    "TrisparseConfig",
    "TrisparseQuantizer",
    "check_output",
    "checkpoint_info",
    "is_checkpoint",
    "load",
    "mask_entry",
    "read_info",
    "replaced_folder",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
