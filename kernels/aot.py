"""Compile kernels for GPUs that need not be there, and read what they need.

`Compiler` is a runner (see kernels/launch.py) that compiles each launch of a public operation and launches
nothing; meta tensors will do, so a shape costs no memory. From the cubin come registers, spilled bytes and
shared bytes; from the PTX the widest global load. `resources` runs an operation under it.

Limits per CTA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from trisparse.kernels.launch import Grid, using

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
        spill_bytes: local memory per thread, for spills and for arrays that are not held in registers; 0
        when no
            instruction touches it, since the assembler for sm_89 and later may reserve a frame that it never
            uses.
        shared_bytes: shared memory per CTA.
        load_bytes: the widest global load of one thread, in bytes.
    """

    kernel: str
    cc: int
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    load_bytes: int

    def problems(self) -> list[str]:
        """What is over budget: any spill, or more shared memory than a CTA of the target can have."""
        out = []
        if self.spill_bytes:
            out.append(f"{self.kernel} for sm_{self.cc} spills {self.spill_bytes} bytes a thread")
        if self.shared_bytes > SHARED_LIMIT[self.cc]:
            limit = SHARED_LIMIT[self.cc]
            out.append(f"{self.kernel} for sm_{self.cc} needs {self.shared_bytes} shared bytes, over {limit}")
        return out


class _Proxy:
    """What Triton's binder asks of a tensor: its dtype, and an address aligned as the device's would be."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = 512 + int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


@dataclass
class Compiler:
    """A runner that compiles only. ``compiled`` holds the resources of each distinct kernel."""

    cc: int = 80
    compiled: list[Resources] = field(default_factory=list)
    _seen: set[Any] = field(default_factory=set)

    def __call__(
        self, kernel: Any, grid: Grid, args: tuple[Any, ...], options: dict[str, int], constexprs: dict[str, Any]
    ) -> None:
        """Specialise as a launch with these arguments would, compile, and note the resources."""
        binary, key = _compile(kernel, args, {**options, **constexprs}, self.cc)
        if key in self._seen:
            return
        self._seen.add(key)
        usage = _usage(binary.asm["cubin"])
        self.compiled.append(
            Resources(
                kernel=kernel.__name__,
                cc=self.cc,
                num_warps=options["num_warps"],
                registers=usage["REG"],
                spill_bytes=usage["STACK"] + usage["LOCAL"] if usage["local accesses"] else 0,
                shared_bytes=binary.metadata.shared,
                load_bytes=_widest_load(binary.asm["ptx"]),
            )
        )


def resources(operation: Callable[[], Any], ccs: Iterable[int] = (80, 90)) -> list[Resources]:
    """Compile all that ``operation()`` launches, for each compute capability."""
    out = []
    for cc in ccs:
        compiler = Compiler(cc)
        with using(compiler):
            operation()
        out += compiler.compiled
    return out


def table(rows: Iterable[Resources]) -> str:
    """The resources as text, a line per kernel, with what is over budget marked."""
    head = f"{'kernel':24} {'sm':>3} {'warps':>5} {'registers':>9} {'spill B':>7} {'shared B':>8} {'load B':>6}"
    lines = [head]
    for r in rows:
        mark = "  OVER BUDGET" if r.problems() else ""
        lines.append(
            f"{r.kernel:24} {r.cc:3} {r.num_warps:5} {r.registers:9} {r.spill_bytes:7} {r.shared_bytes:8} "
            f"{r.load_bytes:6}{mark}"
        )
    return "\n".join(lines)


def _compile(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], cc: int) -> tuple[Any, str]:
    """(compiled kernel, key of the specialisation), by Triton's own binder."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", cc, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, bound_options = binder(
        *(_Proxy(a) if isinstance(a, Tensor) else a for a in args), debug=kernel.debug, **options
    )
    packed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, bound_options)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    key = str((kernel.cache_key, signature, constants, attributes, packed))
    return triton.compile(source, target=target, options=packed.__dict__), key


@cache
def _cuobjdump() -> str:
    """The path of cuobjdump, which Triton's wheel holds."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("cuobjdump is neither in Triton's package nor on the path; it reads the cubin")
    return found


@cache
def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, and the local loads and stores, of the only function of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _dump("--dump-resource-usage", file.name)
        usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        accesses = 0
        if usage["STACK"] + usage["LOCAL"]:
            accesses = len(re.findall(r"\b(?:STL|LDL)\b", _dump("--dump-sass", file.name)))
    return {**usage, "local accesses": accesses}


def _dump(what: str, path: str) -> str:
    return subprocess.run([_cuobjdump(), what, path], capture_output=True, text=True, check=True).stdout


def _widest_load(ptx: str) -> int:
    """Bytes of the widest ld.global of one thread."""
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in loads), default=0)
