"""The weights from before pruning, by name: of a model in memory, or of a checkpoint folder read as needed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class DenseWeights:
    """Weights by the parameter names of the pruned model.

    A folder is one of transformers' with safetensors; its names may lack the model's ``base_model_prefix``, as
    those of checkpoints of a bare model do. Only what is asked for is read.

    Args:
        dense: a module of the same architecture, or the folder.
        model: the pruned model.

    Raises:
        ValueError: ``dense`` is the pruned model itself, on the meta device, of another type, or a folder without
            safetensors.
    """

    def __init__(self, dense: nn.Module | str | Path, model: nn.Module) -> None:
        self._parameters: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        if dense is model:
            raise ValueError("dense is the pruned model itself: pass a copy from before pruning, or its folder")
        if isinstance(dense, nn.Module):
            self._parameters = dict(dense.named_parameters(remove_duplicate=False))
            if any(param.is_meta for param in self._parameters.values()):
                raise ValueError("dense is on the meta device: it has no weights; pass its folder")
        elif isinstance(dense, str | Path):
            self._files = _files_of(Path(dense))
        else:
            raise ValueError(f"dense must be a model or a checkpoint folder, got {type(dense).__name__}")

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the weight called ``name``, or None where there is none."""
        if self._parameters:
            return tuple(self._parameters[name].shape) if name in self._parameters else None
        key = self._key(name)
        if key is None:
            return None
        with safe_open(self._files[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """The weights called ``names``, in fp32 on ``device``; those of an fp32 model are not copied."""
        if self._parameters:
            return {name: self._parameters[name].detach().to(device, torch.float32) for name in names}
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in names:
            key = self._key(name)
            assert key is not None  # check_same_blocks
            by_file.setdefault(self._files[key], []).append((name, key))
        read = {}
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:
                read.update({name: file.get_tensor(key).to(device, torch.float32) for name, key in members})
        return read

    def check_same(self, model: nn.Module, names: Iterable[str]) -> None:
        """Check that every parameter of ``model`` in ``names`` is there, in the same shape.

        Raises:
            ValueError: names the first three that are not.
        """
        wrong = []
        for name in names:
            own, found = tuple(model.get_parameter(name).shape), self.shape(name)
            if own != found:
                wrong.append(f"{name} is {own} in the model and {found or 'missing'} in dense")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"dense is not of the model's architecture: {'; '.join(wrong[:3])}{more}")

    def _key(self, name: str) -> str | None:
        return next((key for key in (name, name.removeprefix(self._prefix)) if key in self._files), None)


def _files_of(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a checkpoint folder."""
    try:
        if (folder / _FILE).is_file():  # first, as transformers has it: an index may be of an earlier save
            with safe_open(folder / _FILE, framework="pt") as file:
                return dict.fromkeys(file.keys(), folder / _FILE)
        if (folder / _INDEX).is_file():
            listed = json.loads((folder / _INDEX).read_text())["weight_map"]
            return {key: folder / file for key, file in listed.items()}
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"dense: the weights in {folder} cannot be read: {error}") from error
    raise ValueError(f"dense: {folder} has neither {_FILE} nor {_INDEX}")


@contextmanager
def holding(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the parameters of ``model`` hold ``weights`` (by name) while open; their own values come back."""
    own = [(model.get_parameter(name), value) for name, value in weights.items()]
    before = [param.data for param, _ in own]
    try:
        for param, value in own:
            param.data = value
        yield
    finally:
        for (param, _), data in zip(own, before, strict=True):
            param.data = data
