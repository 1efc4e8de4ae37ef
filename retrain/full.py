"""Retrain every parameter with the masks held: full retraining, the costly method that PERP is measured against."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trisparse.retrain.held_masks import held_masks
from trisparse.retrain.model_state import ModelState
from trisparse.sparsity.interrupt import interrupt_after


class FullWeights:
    """A model whose parameters all train under its masks, with what it takes to restore it.

    The weights from before lie in an unnamed temporary file, in no memory. Those of a half-precision model train in
    fp32 and are rounded at the end.

    Args:
        model: a model without compressed layers.
        folder: where the temporary file is made; the system's place for such files by default.
        kept: False for a model that will not train, which then has no file.

    Attributes:
        module: the model, to train.
        trainable: parameters that train.
    """

    module: nn.Module
    trainable: dict[str, int]

    def __init__(self, model: Any, folder: str | Path | None = None, *, kept: bool = True) -> None:
        self.module = model
        self._state = ModelState(model)
        self._params: list[tuple[nn.Parameter, torch.dtype]] = [(param, param.dtype) for param in model.parameters()]
        self._held = ExitStack()
        if kept and folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder) if kept else None  # noqa: SIM115 (closed by merge or discard)
        try:
            if self._file is not None:
                for param, _ in self._params:
                    self._file.write(_bytes(param.detach().cpu()))
                self._file.flush()
            for param, _ in self._params:
                param.data = param.data.float()
                param.requires_grad_(True)
            self._held.enter_context(held_masks(model, model.parameters()))
        except BaseException:
            self.discard()
            raise
        self.trainable = {"full": sum(param.numel() for param, _ in self._params)}

    def switch_cache_off(self) -> None:
        """No key/value cache while training; the configs are put back at the end."""
        self._state.switch_cache_off()

    def first_not_finite(self) -> str | None:
        """Name of a parameter that holds a NaN or Inf, or None."""
        for name, param in self.module.named_parameters():
            if not bool(torch.isfinite(param).all()):
                return str(name)
        return None

    def as_merged(self) -> None:
        """The model computes what it will compute already."""

    def merge(self) -> int:
        """Round to the dtypes from before and end; no parameter is added."""
        with interrupt_after(), torch.no_grad():
            for param, dtype in self._params:
                param.data = param.data.to(dtype)
            self._release()
        return 0

    def discard(self) -> None:
        """Put every weight back as it was."""
        with interrupt_after(), torch.no_grad():
            if self._file is None:
                for param, dtype in self._params:
                    param.data = param.data.to(dtype)
            elif self._file.tell() == sum(param.numel() * dtype.itemsize for param, dtype in self._params):
                self._file.seek(0)
                for param, dtype in self._params:
                    before = torch.empty(param.shape, dtype=dtype)
                    self._file.readinto(_bytes(before))
                    param.data = param.data.to(dtype)
                    param.copy_(before)
            self._release()

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
        self._held.close()
        self._state.restore()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; of another one, that of a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
