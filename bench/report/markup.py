"""HTML and SVG by nested calls, in which text is escaped unless it is markup already.

What is written here is well formed as XML too, so that a test can parse it strictly.
"""

from __future__ import annotations

from html import escape

_VOID = {"meta", "link", "br"}  # of HTML; elements of SVG are closed like all others


class Markup(str):
    """Text that is HTML already; any other string is escaped where it enters an element."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """``<name attributes>children</name>``.

    Args:
        name: of the element.
        children: text, escaped unless it is :class:`Markup`; None is left out.
        attributes: escaped; None is left out. A trailing ``_`` goes (``class_``), other ``_`` become ``-``
            (``aria_label``).
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*parts: str | None) -> Markup:
    """The parts in a row, escaped unless they are markup."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts if part is not None))


def _number(value: str | float) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
