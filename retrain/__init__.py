"""How to win the accuracy back after pruning: parameter groups, LoRA under masks, training loops.

The package shares its name with the function that users call, so it is callable itself:
``trisparse.retrain(model, data, config)`` is :func:`trisparse.retrain.perp.retrain`, whatever was imported first.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from trisparse.retrain.perp import retrain

        return retrain(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
