"""``sparsify(allocation=...)``: names, text with parameters, files."""

from __future__ import annotations

from dataclasses import fields
from os import PathLike
from pathlib import Path

from trisparse.sparsity.allocation.base import Allocation
from trisparse.sparsity.allocation.formulas import ERK, LAMP, Global, Uniform, UniformPlus
from trisparse.sparsity.allocation.owl import OWL
from trisparse.sparsity.allocation.per_layer import PerLayer

ALLOCATIONS: dict[str, type[Allocation]] = {cls.name: cls for cls in (Uniform, UniformPlus, Global, ERK, LAMP, OWL)}
_FILES = (".json", ".yaml", ".yml")


def find_allocation(allocation: Allocation | str | PathLike[str]) -> Allocation:
    """An allocation by its name, by text such as ``"owl:M=7,lambda=0.1"``, or from the file of a :class:`PerLayer`.

    Raises:
        ValueError: it is none of these, or has a wrong parameter.
        OSError: the file cannot be read.
    """
    if isinstance(allocation, Allocation):
        return allocation
    if not isinstance(allocation, str | PathLike):
        raise ValueError(f"allocation must be a name, a file or an Allocation, got {allocation!r}")
    if Path(allocation).suffix.lower() in _FILES:
        return PerLayer.read(Path(allocation))
    name, _, parameters = str(allocation).partition(":")
    kind = ALLOCATIONS.get(name.strip().lower())
    if kind is None:
        known = ", ".join(ALLOCATIONS)
        raise ValueError(f"allocation must be one of {known}, or a {'/'.join(_FILES)} file, got {str(allocation)!r}")
    return kind(**_parameters(kind, parameters))


def _parameters(kind: type[Allocation], text: str) -> dict[str, float]:
    """From ``M=7,lambda=0.1``; a trailing underscore of a field's name is not written."""
    known = {field.name.rstrip("_"): field.name for field in fields(kind)}  # type: ignore[arg-type]
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise ValueError(f"allocation {kind.name} has no parameter {key!r}: it has {', '.join(known) or 'none'}")
        try:
            found[known[key]] = float(value)
        except ValueError:
            raise ValueError(f"allocation {kind.name}: {key} must be a number, got {value!r}") from None
    return found
