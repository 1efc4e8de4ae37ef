"""Telling transformers of ``quant_method: "trisparse"``, once, without importing transformers for it.

``import trisparse`` must stay light, and ``from_pretrained`` must know the format afterwards, whichever package is
imported first. So :func:`register_on_import` waits for transformers to import its table of quantizers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Add the quantizer and its config to transformers' tables; a second call does nothing.

    The module does it when it is imported, which may be under way: it imports transformers' table itself.
    """
    import_module("trisparse.sparsity.checkpoint.quantizer")


def register_on_import() -> None:
    """:func:`register` now if transformers has its table already, else as soon as it is imported."""
    when_imported(_TABLE, register)


def when_imported(module: str, action: Callable[[], None]) -> None:
    """Call ``action`` now if ``module`` is imported already, else as soon as it is; once, however often it is asked."""
    if module in sys.modules:
        action()
    elif not any(isinstance(finder, _Finder) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(module, action))


class _Finder(MetaPathFinder):
    """Finds one module, as the usual finder does, and calls ``action`` once it is executed."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module, self._action = module, action

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, self._action)
        return spec


class _ActingLoader(Loader):
    def __init__(self, loader: Loader, action: Callable[[], None]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever looks at the module later sees the loader that it would have had.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._action()
