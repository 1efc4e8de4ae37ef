"""The gradient statistic G of each target, in memory or in a safetensors file that is read a target at a time."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trisparse.sparsity.targets import Target

_FORMAT = "trisparse gradient norms"
_VERSION = 1
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class GradientFileError(RuntimeError):
    """A file does not hold gradient norms of ours, or is damaged."""


@dataclass(frozen=True)
class GradientInfo:
    """What gradient norms were made from.

    Attributes:
        loss: the loss that was differentiated, in words.
        sequences, tokens: of the calibration data; tokens of padding are not counted.
        dtype: that the norms are stored in, ``"float32"`` or ``"bfloat16"``.
        compute_dtype: of the matrix products behind them.
        mode: of the backward pass, ``"whole"`` or ``"block"``.
        unreached: targets that got no gradient from any sequence.
    """

    loss: str
    sequences: int
    tokens: int
    dtype: str
    compute_dtype: str
    mode: str = "block"
    unreached: tuple[str, ...] = ()


class GradientStatistics:
    """G [rows, cols] of targets: the l2 norm over calibration sequences of the gradient of the loss.

    Attributes:
        info: what they were made from.
    """

    def __init__(self, norms: Mapping[str, Tensor] | Path, shapes: Mapping[str, torch.Size], info: GradientInfo):
        self._norms = norms
        self._shapes = dict(shapes)
        self.info = info

    def norm(self, target: Target) -> Tensor | None:
        """G of ``target`` in the orientation of ``target.matrix()``, on its device, in the dtype of storage.

        Returns:
            [rows, cols] (fused experts: all parts along the rows), or None if no gradient reached the target.

        Raises:
            ValueError: the statistics have no such weight, or one of another shape.
            GradientFileError: the file that they are in is damaged.
        """
        self.check([target])
        if target.name in self.info.unreached:
            return None
        return self._read(target.name).to(target.weight.device)

    def check(self, targets: Sequence[Target]) -> None:
        """Check that the statistics are of these targets (they may hold more).

        Raises:
            ValueError: names the first target that they lack, or have in another shape.
        """
        for target in targets:
            shape = torch.Size((target.weight.numel() // target.cols, target.cols))
            found = self._shapes.get(target.name)
            if found is None:
                raise ValueError(
                    f"the gradient norms are of another model or choice of layers: they have no {target.name} "
                    f"(they have {next(iter(self._shapes))} and {len(self._shapes) - 1} more)"
                )
            if found != shape:
                raise ValueError(
                    f"the gradient norms are of another model: {target.name} is {list(shape)}, theirs {list(found)}"
                )

    def save(self, path: str | Path) -> Path:
        """Write to the safetensors file ``path``, a target at a time; it appears whole or not at all."""
        with writing(Path(path), self._shapes, self.info) as file:
            for name in self._shapes:
                if name not in self.info.unreached:
                    file.write(name, self._read(name))
        return Path(path)

    @staticmethod
    def load(path: str | Path, targets: Sequence[Target] = ()) -> GradientStatistics:
        """Open a file that :meth:`save` or ``gradient_norms(path=...)`` wrote; norms are read when asked for.

        Args:
            path: the safetensors file; it must stay where it is.
            targets: of the model that the statistics are for, to :meth:`check`; none checks nothing yet.

        Raises:
            FileNotFoundError: there is none.
            GradientFileError: it is damaged, or not of this kind and version.
            ValueError: it is of another model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file of gradient norms: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise GradientFileError(f"{path} is damaged, or no safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise GradientFileError(f"{path} holds no gradient norms, but {', '.join(list(shapes)[:3]) or 'nothing'}")
        if metadata.get("version") != str(_VERSION):
            raise GradientFileError(
                f"{path} has version {metadata.get('version')}, this trisparse reads {_VERSION}: make it anew"
            )
        content: dict[str, Any] = json.loads(metadata["info"])
        statistics = GradientStatistics(
            path, shapes, GradientInfo(**(content | {"unreached": tuple(content["unreached"])}))
        )
        statistics.check(targets)
        return statistics

    def _read(self, name: str) -> Tensor:
        if not isinstance(self._norms, Path):
            return self._norms[name]
        try:
            with safe_open(self._norms, framework="pt") as file:
                norm: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise GradientFileError(f"{self._norms} cannot be read any more: {error}") from error
        return norm


class NormsWriter:
    """Writes norms in any order into a safetensors file whose header says beforehand where each one goes.

    (``safetensors.torch.save_file`` takes all tensors at once and copies them.)
    """

    def __init__(self, file: BinaryIO, shapes: Mapping[str, torch.Size], info: GradientInfo) -> None:
        self._file = file
        self._shapes = shapes
        self._dtype: torch.dtype = getattr(torch, info.dtype)
        # Room for the longest header that can come: all targets unreached. Readers skip the spaces behind it.
        self._header_length = len(self._header(replace(info, unreached=tuple(shapes)))) + 8
        self.finish(info)
        file.truncate(8 + self._header_length + sum(shape.numel() for shape in shapes.values()) * self._dtype.itemsize)

    def write(self, name: str, norm: Tensor) -> None:
        """Put the norms of one target [rows, cols] in their place; those never written stay zero."""
        if norm.shape != self._shapes[name] or norm.dtype != self._dtype:
            raise ValueError(f"{name} is {norm.dtype} {list(norm.shape)}, the file has {self._shapes[name]}")
        self._file.seek(8 + self._header_length + self._offsets()[name][0])
        self._file.write(norm.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    def finish(self, info: GradientInfo) -> None:
        """Write the header, with what is known by now."""
        self._file.seek(0)
        self._file.write(self._header_length.to_bytes(8, "little"))
        self._file.write(self._header(info).ljust(self._header_length))

    def _offsets(self) -> dict[str, tuple[int, int]]:
        offsets, start = {}, 0
        for name, shape in self._shapes.items():
            end = start + shape.numel() * self._dtype.itemsize
            offsets[name], start = (start, end), end
        return offsets

    def _header(self, info: GradientInfo) -> bytes:
        metadata = {"format": _FORMAT, "version": str(_VERSION), "info": json.dumps(asdict(info))}
        entries = {
            name: {"dtype": _DTYPES[self._dtype], "shape": list(self._shapes[name]), "data_offsets": span}
            for name, span in self._offsets().items()
        }
        return json.dumps({"__metadata__": metadata, **entries}).encode()


@contextmanager
def writing(path: Path, shapes: Mapping[str, torch.Size], info: GradientInfo) -> Iterator[NormsWriter]:
    """A writer of the file ``path``, which appears when the block closes, unless it failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield NormsWriter(file, shapes, info)
        os.chmod(unfinished, 0o644)  # mkstemp's files are private
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
