"""Settings of a command: from a YAML file and from options, checked by name, in the types of the config classes.

A ``Section`` says what may stand where: the name of each setting with its type as a dataclass spells it
(``"int | None"``, ``"Sequence[float]"``), or another section for what is nested. The text of an option and a value of
the file are read by the same rules: ``--learning-rates 1e-4,1e-3`` is ``learning_rates: [1e-4, 1e-3]``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml  # type: ignore[import-untyped]

Section = Mapping[str, Any]

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 without its numbers of base 60: ``2:4`` is a pattern, and not 124."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, number) for tag, number in found if tag not in (_INT, _FLOAT)]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    _INT, re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def section_of(config: type) -> dict[str, Any]:
    """The fields of the dataclass ``config`` with their types."""
    return {field.name: str(field.type) for field in dataclasses.fields(config)}


def read_settings(file: Path, section: Section) -> dict[str, Any]:
    """What ``file`` gives of ``section``, nested as it is.

    A section may be given by the value of its first setting alone: ``schedule: ALLR`` is ``schedule: {name: ALLR}``.

    Raises:
        ValueError: no YAML, no mapping, a value of a wrong kind, or a key that is no setting; names the closest one.
        OSError: the file cannot be read.
    """
    content = read_yaml(file)
    try:
        return _checked(content, section, "")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_yaml(file: Path) -> dict[Any, Any]:
    """The mapping in ``file``; an empty one for an empty file.

    Raises:
        ValueError: no YAML, or no mapping.
        OSError: the file cannot be read.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold keys and values, such as 'steps: 100', got {content!r}")
    return content


def _checked(content: Mapping[Any, Any], section: Section, prefix: str) -> dict[str, Any]:
    settings = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in section:
            raise ValueError(_unknown(key, name, section))
        kind = section[key]
        if not isinstance(kind, Mapping):
            settings[key] = value_of(name, kind, value)
        elif value is not None:  # a section with nothing below it is no section
            nested = value if isinstance(value, dict) else {next(iter(kind)): value}
            settings[key] = _checked(nested, kind, f"{name}.")
    return settings


def _unknown(key: Any, name: str, section: Section) -> str:
    nested = [outer for outer, kind in section.items() if isinstance(kind, Mapping) and key in kind]
    if nested:
        return f"{name!r} is a setting of {nested[0]!r}: put it below that key"
    close = difflib.get_close_matches(str(key), section, n=1)
    return f"{name!r} is no setting, " + (
        f"did you mean {close[0]!r}?" if close else f"there are {', '.join(map(str, section))}"
    )


def value_of(name: str, kind: str, value: Any) -> Any:
    """``value`` as a field of the type ``kind`` takes it: a text is cut at its commas for a sequence, and is a number
    where one is wanted.

    YAML 1.1 reads ``5e-4`` and ``1e3`` as texts, for want of a point or a sign: what is a number to Python is one here.
    What is no text where one belongs is refused, as is a list where one value belongs, and nothing (YAML's null) where
    the setting has no None.

    Raises:
        ValueError: names the setting.
    """
    several = "Sequence" in kind
    if isinstance(value, Path) or (value is None and re.search(r"\bNone\b", kind)):
        return value
    if isinstance(value, list | tuple):
        if not several:
            raise ValueError(f"{name} must be one value, got {list(value)!r}")
        return tuple(_one(name, kind, item) for item in value)
    if several and isinstance(value, str):
        items = tuple(word.strip() for word in value.split(",") if word.strip())
        if "," not in value and re.search(r"\bstr \|", kind):  # one name, which may be that of a preset
            return value
        return tuple(_one(name, kind, item) for item in items)
    found = _one(name, kind, value)
    return (found,) if several and not isinstance(found, str) else found


def _one(name: str, kind: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"{name} has no value: give one, or leave it out")
    number, whole = re.search(r"\bfloat\b", kind), re.search(r"\bint\b", kind)
    if isinstance(value, str) and (number or whole):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and whole and not number and value.is_integer():
        return int(value)
    if re.search(r"\bstr\b", kind) and not number and not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    if isinstance(value, Mapping):
        raise ValueError(f"{name} must be one value, got {dict(value)!r}")
    return value


def place_of(option: str, section: Section) -> tuple[str, ...] | None:
    """The keys that lead to the setting which ``option`` gives, or None where there is none of that name.

    An option stands for a setting of the section, for the first one of a nested section that is called so, or for a
    nested setting, by its own name or by both: ``freezing_stages`` is ``freezing: {stages: ...}``.
    """
    if option in section:
        kind = section[option]
        return (option, next(iter(kind))) if isinstance(kind, Mapping) else (option,)
    for outer, kind in section.items():
        if isinstance(kind, Mapping):
            for key in kind:
                if option in (key, f"{outer}_{key}"):
                    return outer, key
    return None


def with_options(settings: Mapping[str, Any], options: Iterable[tuple[str, Any]], section: Section) -> dict[str, Any]:
    """``settings`` of a file with the ``options`` that were given, which win.

    Raises:
        ValueError: an option has no place in ``section``, or has a value of a wrong kind.
    """
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for option, value in options:
        place = place_of(option, section)
        if place is None:
            raise ValueError(f"{option} is no setting here")
        if len(place) == 1:
            merged[place[0]] = value_of(option, section[place[0]], value)
        else:
            outer, key = place
            merged.setdefault(outer, {})[key] = value_of(option, section[outer][key], value)
    return merged
