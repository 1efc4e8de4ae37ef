"""The kernels of the sparse linear layer, compiled without a GPU, at the shapes of Llama-2-7B and OPT-6.7B.

    python -m trisparse.bench.linear_gate [--cc 80 90] [--format F ...]

prints what each distinct kernel needs and the first operation that launches it, and fails on a spill or on more
shared memory than the target has. The complete sweep compiles about 250 kernels in three minutes; the tests take
one operation for each configuration (`distinct`), and fewer formats and dtypes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from trisparse.kernels.aot import Compiler, Resources, table
from trisparse.kernels.compressed import TILE, CompressedWeight, tile_dtype
from trisparse.kernels.launch import using
from trisparse.kernels.linear import linear, linear_backward
from trisparse.kernels.linear_config import config

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (16384, 4096), (4096, 16384))
TOKENS = (1, 8, 16, 512, 2048)
FORMATS = (("2:4", 2, 4), ("n:m", 4, 8), ("bitmask", 0, 0), ("masked", 0, 0))
CCS = (80, 90)


class Case(NamedTuple):
    """One call of `linear`, or with ``backward`` of `linear_backward`; a forward call has a bias."""

    format: str
    n: int
    m: int
    rows: int
    cols: int
    tokens: int
    rank: int = 0
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False

    def __str__(self) -> str:
        pattern = f"{self.n}:{self.m}" if self.m else self.format
        way = "backward" if self.backward else "forward"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{way} {pattern} {self.rows}x{self.cols}, {self.tokens} tokens, rank {self.rank}, {dtype}"

    def operation(self) -> Callable[[], Any]:
        """The call, on meta tensors."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=self.dtype, device="meta")

        weight = empty_weight(self.format, self.n, self.m, self.rows, self.cols, self.dtype)
        lora = (empty(self.rank, self.cols), empty(self.rows, self.rank), 2.0) if self.rank else None
        if self.backward:
            return partial(linear_backward, empty(self.tokens, self.rows), weight, lora)
        return partial(linear, empty(self.tokens, self.cols), weight, empty(self.rows), lora)


def empty_weight(format: str, n: int, m: int, rows: int, cols: int, dtype: torch.dtype) -> CompressedWeight:
    """A compressed weight on the meta device, with half of a "bitmask" kept."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    meta = empty(rows, -(-cols // 8), dtype=torch.uint8)
    if format == "bitmask":
        offsets = empty(rows + 1, dtype=torch.int64), empty(rows, -(-cols // TILE), dtype=tile_dtype(cols))
        return CompressedWeight(format, (rows, cols), n, m, empty(rows * cols // 2, dtype=dtype), meta, *offsets)
    if format == "2:4":
        meta = empty(rows, cols // 16, dtype=torch.int16)
    values = empty(rows, cols if format == "masked" else cols * n // m, dtype=dtype)
    return CompressedWeight(format, (rows, cols), n, m, values, meta)


def cases() -> Iterator[Case]:
    """bf16 at every shape with rank 0 and 16; other tokens, ranks and dtypes at one shape."""
    for backward in (False, True):
        for pattern in FORMATS:
            for shape in SHAPES:
                for tokens in TOKENS:
                    for rank in (0, 16):
                        yield Case(*pattern, *shape, tokens, rank, backward=backward)
            for tokens, rank in ((32, 16), (64, 16), (1, 128), (32, 128), (64, 64), (512, 64), (512, 128), (512, 7)):
                yield Case(*pattern, 4096, 4096, tokens, rank, backward=backward)
            for tokens in TOKENS:
                for dtype in (torch.float16, torch.float32):
                    yield Case(*pattern, 4096, 4096, tokens, 16, dtype, backward)


def distinct(wanted: Iterable[Case], ccs: Iterable[int] = CCS) -> Iterator[tuple[int, Case]]:
    """(compute capability, case) of the first case for each configuration, format, dtype, and adapter or none."""
    seen = set()
    for case in wanted:
        for cc in ccs:
            shape = (case.rows, case.cols)
            c = config(shape, case.dtype, cc, case.tokens, format=case.format, rank=case.rank, backward=case.backward)
            tile = c.tokens, c.outer, c.inner, c.num_warps, c.num_stages, c.partial
            padded = 0 if not case.rank else 16 if c.partial else max(16, 1 << (case.rank - 1).bit_length())
            key = cc, case.format, case.n, case.m, case.dtype, case.backward, padded, tile
            if key not in seen:
                seen.add(key)
                yield cc, case


def compiled(wanted: Iterable[tuple[int, Case]]) -> Iterator[tuple[Case, Resources]]:
    """(the case that needs it first, its resources) of each distinct kernel."""
    compilers: dict[int, Compiler] = {}
    for cc, case in wanted:
        compiler = compilers.setdefault(cc, Compiler(cc))
        known = len(compiler.compiled)
        with using(compiler):
            case.operation()()
        for row in compiler.compiled[known:]:
            yield case, row


def main() -> None:
    """Compile everything, print a line a kernel, and exit with 1 if any is over budget."""
    parser = argparse.ArgumentParser(prog="python -m trisparse.bench.linear_gate", description=__doc__)
    parser.add_argument("--cc", type=int, nargs="+", default=CCS, help="compute capabilities")
    parser.add_argument("--format", nargs="+", choices=[name for name, *_ in FORMATS], help="these formats only")
    options = parser.parse_args()
    wanted = [case for case in cases() if options.format is None or case.format in options.format]
    started, problems, count = time.perf_counter(), [], 0
    for case, row in compiled((cc, case) for cc in options.cc for case in wanted):
        count += 1
        head, line = table([row]).splitlines()
        print(f"{head}  first launched by\n" * (count == 1) + f"{line}  {case}", flush=True)
        problems += [f"{case}: {problem}" for problem in row.problems()]
    print(f"{count} kernels of {len(wanted)} operations in {time.perf_counter() - started:.0f} s")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
