"""Operations as torch.compile and torch.export see them: registered with torch.library.custom_op.

A registered operation is one node of a graph, whose result's shape and dtype come from its fake kernel. Of an
operation that can also work in place there are two: a functional one, and one that says what it mutates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from trisparse.kernels.launch import redirected

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Operation(Generic[Arguments, Result]):
    """``torch.ops.trisparse.<name>``, from its implementation and its fake kernel (which have one signature).

    Args:
        name: in torch.ops.trisparse.
        run: the implementation, for every device; it may raise.
        fake: gives tensors of the right shape, stride, dtype and device without reading any.
        mutates: the arguments that are changed in place.
        reads_back: whether the host waits for a result of the device (a flag, a count); CUDA graphs must
            then leave the operation out.
    """

    def __init__(
        self,
        name: str,
        run: Callable[Arguments, Result],
        fake: Callable[Arguments, Result],
        *,
        mutates: tuple[str, ...] = (),
        reads_back: bool = False,
    ) -> None:
        tags = (torch.Tag.cudagraph_unsafe,) if reads_back else ()
        self.run: Callable[..., Result] = run
        self.registered = torch.library.custom_op(f"trisparse::{name}", run, mutates_args=mutates, tags=tags)
        self.registered.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Give the operation a gradient, also where a runner passes the dispatcher by.

        Args:
            backward: (ctx, *gradients of the outputs) -> a gradient or None for each input.
            setup_context: (ctx, inputs, output) saves what ``backward`` needs.
        """
        self.registered.register_autograd(backward, setup_context=setup_context)
        members = {
            "forward": staticmethod(self.run),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        }
        direct: Any = type("Direct", (torch.autograd.Function,), members)
        self.run = direct.apply

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Through torch's dispatcher; under a runner straight to the implementation.

        The runner that only compiles is given meta tensors, which the dispatcher would send to the fake
        kernel.
        """
        if not torch.compiler.is_compiling() and redirected():
            return self.run(*args, **kwargs)
        result: Result = self.registered(*args, **kwargs)
        return result
