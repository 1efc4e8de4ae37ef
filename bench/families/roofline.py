"""``trisparse bench run roofline``: what each kernel asks of an A100, without one. Bounds; nothing here is measured.

Two kinds of rows, all of ``kind="bound"``:

- counts of the PTX under emulation (bench/bounds): DRAM, tensor and shared memory times with published peaks.
  ``bound_us`` is the least time that they allow, and of a linear layer ``speedup`` is the bound of the dense product
  over it. They are counted anew where ptxsim can be imported; with ``--quick``, or without ptxsim, they are read from
  the records in bench/results, and the parameter ``source`` names the file.
- resources of the compiled kernels: registers, spilled bytes and shared memory, for sm_80, compiled each
  time by Triton's own ptxas.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from trisparse.bench.bounds.record import GPU, Study
from trisparse.bench.bounds.studies import STUDIES
from trisparse.bench.compile_gate import SHAPES, operations
from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.kernels import masked_lora
from trisparse.kernels.aot import resources
from trisparse.kernels.launch import ptxsim

CC = 80
QUICK = ("rows", "2:4 compressed", "linear24, 1 tokens", "mask_lora, forward", "OBS, 2:4")


@benchmark("roofline", "bounds of the kernels on an A100, counted without one, and what they compile to")
def roofline(options: Options) -> Iterator[Measured]:
    """Counts of every study, then the resources of every operation; ``--quick`` reads the counts and compiles few."""
    anew = not options.quick and emulator_found()
    for study in STUDIES.values():
        yield from bounds(study, anew=anew, only=options.only)
    if find_spec("triton") is None:
        print("roofline: Triton is not installed, so that no kernel is compiled", file=sys.stderr)
        return
    for shape in SHAPES[:1] if options.quick else SHAPES:
        yield from compiled(shape, QUICK if options.quick else None, options.only)


def emulator_found() -> bool:
    """Whether ptxsim can be imported."""
    try:
        ptxsim()
    except ImportError:
        return False
    return True


def bounds(study: Study, *, anew: bool, only: str = "") -> Iterator[Measured]:
    """The rows of a study: counted ``anew``, or of its record."""
    source = "counted by ptxsim" if anew else f"bench/results/{study.file}"
    for case in study.counted(only) if anew else study.recorded():
        for row in study.rows(case):
            yield replace(row, parameters={**row.parameters, "source": source})


def compiled(shape: tuple[int, int], wanted: tuple[str, ...] | None = None, only: str = "") -> Iterator[Measured]:
    """A row for each operation on a weight of ``shape``, a contestant for each kernel that it launches.

    Args:
        shape: (rows, cols).
        wanted: names of operations; None is all.
        only: a part of the row's name.
    """
    rows, cols = shape
    for name, operation in operations_of(rows, cols).items():
        title = f"sm_{CC}: {name}, {rows}x{cols}"
        if (wanted is not None and name not in wanted) or only not in title:
            continue
        metrics: dict[str, dict[str, float]] = {}
        seen: Counter[str] = Counter()
        for kernel in resources(operation, (CC,)):
            seen[kernel.kernel] += 1
            again = f" ({seen[kernel.kernel]})" if seen[kernel.kernel] > 1 else ""
            metrics[kernel.kernel + again] = {
                "registers": float(kernel.registers),
                "spill_bytes": float(kernel.spill_bytes),
                "shared_bytes": float(kernel.shared_bytes),
            }
        parameters = {"gpu": GPU, "rows": rows, "cols": cols, "operation": name, "source": "compiled by Triton"}
        yield Measured(title, parameters, metrics, kind="bound")


def operations_of(rows: int, cols: int) -> dict[str, Callable[[], Any]]:
    """Every operation at one shape on meta tensors, in bf16, and the OBS update in fp32."""
    found = {name: run for name, (run, _) in operations(rows, cols, torch.bfloat16).items()}
    found |= {name: run for name, (run, _) in operations(rows, cols, torch.float32).items() if name.startswith("OBS")}
    return found | _masked_lora(rows, cols)


def _masked_lora(rows: int, cols: int, tokens: int = 2048, rank: int = 16) -> dict[str, Callable[[], Any]]:
    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    x, dy, weight = empty(tokens, cols), empty(tokens, rows), empty(rows, cols)
    a, b, packed = empty(rank, cols), empty(rows, rank), empty(rows, -(-cols // 8), dtype=torch.uint8)
    return {
        "mask_lora, forward": lambda: masked_lora.PRODUCT(x, weight, packed, b, a, None, False),
        "mask_lora, dx": lambda: masked_lora.PRODUCT(dy, weight, packed, b, a, None, True),
        "mask_lora, dA and dB": lambda: masked_lora.FACTOR_GRADIENTS(dy, x, None, packed, b, a),
        "scale_lora, forward": lambda: masked_lora.PRODUCT(x, weight, None, b, a, None, False),
        "scale_lora, dx": lambda: masked_lora.PRODUCT(dy, weight, None, b, a, None, True),
        "scale_lora, dA and dB": lambda: masked_lora.FACTOR_GRADIENTS(dy, x, weight, None, b, a),
    }
