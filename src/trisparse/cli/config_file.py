"""Settings of a command from a YAML file: the fields of a config class, checked by name, in the class's types."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


def read_settings(file: Path, config: type) -> dict[str, Any]:
    """The fields of the dataclass ``config`` that ``file`` gives.

    YAML 1.1 reads ``5e-4`` as a string, for want of a point: what is a number to Python is one here.

    Raises:
        ValueError: no YAML, no mapping, or a key that is no field; names the closest one.
        OSError: the file cannot be read.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    names = [field.name for field in dataclasses.fields(config)]
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold keys and values, such as 'steps: 100', got {content!r}")
    for key in content:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
            raise ValueError(f"{file}: {key!r} is no setting, {meant}")
    numbers = {field.name for field in dataclasses.fields(config) if "float" in str(field.type)}
    return {key: _value(value, number=key in numbers) for key, value in content.items()}


def _value(value: Any, *, number: bool) -> Any:
    if isinstance(value, list):
        return tuple(_value(one, number=number) for one in value)
    if number and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value
