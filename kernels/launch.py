"""The one place from which every kernel is launched.

    launch(kernel, grid, *args, num_warps=4, num_stages=3, **constexprs)

runs the kernel on the tensors' device. `with using(runner):` replaces how: under an emulator (`Emulator`), by
Triton's interpreter (`interpret`), or compiling only (`trisparse.kernels.aot.Compiler`). Operations ask
`by_kernel(tensor)` whether to take their kernel's route, so that under a runner a public operation runs its
kernel, with its real grid and constants, on CPU tensors (and, compiling only, on meta tensors).

Importing this module imports neither Triton nor anything of CUDA.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

Grid = tuple[int, ...]


class Runner(Protocol):
    """Runs (or compiles, or emulates) one launch."""

    def __call__(
        self, kernel: Any, grid: Grid, args: tuple[Any, ...], options: dict[str, int], constexprs: dict[str, Any]
    ) -> None:
        """``options`` holds num_warps and num_stages; ``constexprs`` the kernel's constants by name."""


def device(kernel: Any, grid: Grid, args: tuple[Any, ...], options: dict[str, int], constexprs: dict[str, Any]) -> None:
    """The default runner: Triton's own launch on the device of the tensors, which need not be the current one."""
    first = next((arg for arg in args if isinstance(arg, Tensor)), None)
    with torch.cuda.device_of(first) if first is not None and first.is_cuda else nullcontext():
        kernel[grid](*args, **options, **constexprs)


def interpret(
    kernel: Any, grid: Grid, args: tuple[Any, ...], options: dict[str, int], constexprs: dict[str, Any]
) -> None:
    """Triton's interpreter on CPU tensors; the process must have been started with TRITON_INTERPRET=1.

    Raises:
        RuntimeError: the kernel was compiled for devices, since the variable was not set when it was
        imported.
    """
    if type(kernel).__name__ != "InterpretedFunction":
        raise RuntimeError("the interpreter needs TRITON_INTERPRET=1 in the environment before Triton is imported")
    kernel[grid](*args, **options, **constexprs)


_runner: ContextVar[Runner] = ContextVar("trisparse_runner", default=device)


def launch(kernel: Any, grid: Grid, *args: Any, num_warps: int = 4, num_stages: int = 3, **constexprs: Any) -> None:
    """Launch a Triton or Gluon kernel through the runner in force; an empty grid launches nothing."""
    if all(grid):
        _runner.get()(kernel, grid, args, {"num_warps": num_warps, "num_stages": num_stages}, constexprs)


@contextmanager
def using(runner: Runner) -> Iterator[Runner]:
    """Replace how kernels are launched, in this context (and thread), and give the runner back."""
    token = _runner.set(runner)
    try:
        yield runner
    finally:
        _runner.reset(token)


def redirected() -> bool:
    """Whether a runner other than the device's is in force."""
    return _runner.get() is not device


def by_kernel(tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` takes its kernel: on CUDA, and anywhere under another runner."""
    return tensor.is_cuda or redirected()


def target(tensor: Tensor) -> int:
    """The compute capability that a launch on ``tensor`` compiles for, as 80; configurations depend on it."""
    if _runner.get() is device and tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    return int(getattr(_runner.get(), "cc", 80))


def ptxsim() -> ModuleType:
    """The PTX emulator: installed, in the folder TRISPARSE_PTXSIM, or in `../shared` beside the checkout.

    Raises:
        ImportError: it is in none of these places.
    """
    places = [os.environ.get("TRISPARSE_PTXSIM"), str(Path(__file__).resolve().parents[2] / "shared")]
    for place in places:
        if place and Path(place, "ptxsim").is_dir() and place not in sys.path:
            sys.path.append(place)
    try:
        return importlib.import_module("ptxsim")
    except ImportError as error:
        message = f"ptxsim is neither installed nor in {places[1]} nor in the folder that TRISPARSE_PTXSIM names"
        raise ImportError(message) from error


@dataclass
class Emulator:
    """A runner that emulates the PTX on CPU tensors, with its checks on, and keeps a profile of each launch.

    Attributes:
        cc: compute capability, 80 for an A100.
        options: what ptxsim.launch takes besides, for instance ``race_check=True`` or ``ctas=8`` (emulate 8
            CTAs of the grid and scale the counts; the outputs are then incomplete).
        profiles: (kernel name, profile), in the order of the launches.
    """

    cc: int = 80
    options: dict[str, Any] = field(default_factory=dict)
    profiles: list[tuple[str, Any]] = field(default_factory=list)

    def __call__(
        self, kernel: Any, grid: Grid, args: tuple[Any, ...], options: dict[str, int], constexprs: dict[str, Any]
    ) -> None:
        """Emulate one launch; what the emulator finds wrong (races, bad addresses) raises."""
        run: Callable[..., Any] = ptxsim().launch
        profile = run(kernel, grid, *args, cc=self.cc, **options, **self.options, **constexprs)
        self.profiles.append((kernel.__name__, profile))
