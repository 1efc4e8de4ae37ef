"""Explicit sparsities: what each layer gets is written down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml  # type: ignore[import-untyped]
from torch import nn

from trisparse.sparsity.allocation.base import Allocation, Patterns
from trisparse.sparsity.pattern import Pattern, Unstructured, parse_pattern
from trisparse.sparsity.selection import check_pattern
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import Target, name_matches

DENSE = "dense"


@dataclass(frozen=True)
class PerLayer(Allocation):
    """A sparsity or pattern for the weights that a shell-style pattern of names matches.

    ``PerLayer({"*.mlp.*": "2:4", "*.self_attn.*": "4:8", "*.0.*": "dense"})``: the last pattern that matches a weight
    or a module that it is in decides. Weights that none matches get the sparsity of the call.

    Attributes:
        values: by name pattern: what ``sparsify`` takes as ``sparsity``, or ``"dense"``.

    Raises:
        ValueError: no entry, or a value that is neither; names its key.
    """

    name: ClassVar[str] = "per-layer"
    values: Mapping[str, float | str | Pattern]

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping) or not self.values:
            raise ValueError(f"values must map name patterns to sparsities, got {self.values!r}")
        object.__setattr__(self, "values", dict(self.values))
        for key, value in self.values.items():
            if not isinstance(key, str):
                raise ValueError(f"values must have name patterns as keys, got {key!r}")
            try:
                _parse(value)
            except ValueError as error:
                raise ValueError(f"allocation of {key!r}: {error}, or 'dense'") from None

    def __hash__(self) -> int:
        return hash(tuple(self.values.items()))

    def __str__(self) -> str:
        return f"{self.name}:{json.dumps({key: str(_parse(value) or DENSE) for key, value in self.values.items()})}"

    @classmethod
    def read(cls, file: str | Path) -> PerLayer:
        """From a JSON or YAML file that maps name patterns (quoted: YAML gives ``*`` a meaning) to sparsities.

        Raises:
            ValueError: no such mapping.
            OSError: the file cannot be read.
        """
        try:
            # Every value as text: YAML 1.1 reads 2:4 as a number of base 60. JSON is YAML.
            content = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is neither JSON nor YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
            raise ValueError(
                f"{file} must map name patterns to sparsities, such as '\"*.mlp.*\": 2:4', got {content!r}"
            )
        try:
            return cls(content)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def patterns(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        pattern: Pattern,
        inputs: Mapping[str, InputStatistics] | None = None,
    ) -> Patterns:
        """See :meth:`Allocation.patterns`."""
        found: Patterns = {target.name: pattern for target in targets}
        unused = []
        for key, value in self.values.items():
            matched = [target.name for target in targets if name_matches(target.name, key)]
            found |= dict.fromkeys(matched, _parse(value))
            if not matched:
                unused.append(key)
        if unused:
            raise ValueError(f"allocation matches none of the weights to prune: {', '.join(unused)}")
        for one in {value for value in found.values() if value is not None}:
            check_pattern([target for target in targets if found[target.name] == one], one)
        return found


def _parse(value: float | str | Pattern) -> Pattern | None:
    if isinstance(value, str) and value.strip() == DENSE:
        return None
    pattern = parse_pattern(value)
    if isinstance(pattern, Unstructured) and pattern.scope == "global":
        raise ValueError(f"{pattern} ranks all layers together: use a sparsity of one layer")
    return pattern
