"""mask_lora on the CPU against PERP's own way: seconds and memory of a forward and a backward.

PERP's own layer forms B A, zeroes it where W is zero, adds it to W and leaves the rest to autograd. ``peak_bytes`` is
the most that torch allocates during forward and backward, counted by its profiler; the results (y and the gradients)
are part of it for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from trisparse.bench.peak_memory import peak_bytes
from trisparse.bench.registry import Case, Options, benchmark
from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.masked_lora import mask_lora

Step = Callable[[], tuple[Tensor, ...]]


def steps(tokens: int, out: int, inputs: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Step, Step]:
    """(ours, PERP's own way): each returns the gradients of x, A and B; bf16 runs under autocast."""
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(out, inputs, generator=g) < 0.5
    weight = torch.randn(out, inputs, generator=g).masked_fill_(~keep, 0) * 0.02
    packed = pack_bits(weight != 0)  # for this once, so that both ways have the same mask
    a, b = torch.randn(rank, inputs, generator=g) * 0.02, torch.randn(out, rank, generator=g) * 0.02
    x, dy = torch.randn(tokens, inputs, generator=g).to(dtype), torch.randn(tokens, out, generator=g).to(dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)

    def ours() -> tuple[Tensor, ...]:
        with autocast():
            y = mask_lora(x, weight, packed, a, b, scale=2.0)
        return torch.autograd.grad(y, leaves, dy)

    def usual() -> tuple[Tensor, ...]:
        with autocast():
            update = (b @ a).masked_fill_(weight == 0, 0)
            y = linear(x, weight + 2.0 * update)
        return torch.autograd.grad(y, leaves, dy)

    return ours, usual


def same_gradients(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], *, relative: float) -> None:
    """Every gradient differs by less than ``relative`` in norm."""
    for mine, other in zip(found, expected, strict=True):
        difference = float((mine - other).norm() / other.norm())
        assert difference < relative, f"the two ways differ by {difference:.1e}"


def case(tokens: int, out: int, inputs: int, rank: int, dtype: torch.dtype) -> Case:
    """A forward and a backward of one layer."""
    ours, usual = steps(tokens, out, inputs, rank, dtype)
    return Case(
        f"{tokens} tokens, {out}x{inputs}, rank {rank}, {str(dtype)[6:]}",
        {"tokens": tokens, "rows": out, "cols": inputs, "rank": rank, "dtype": str(dtype)[6:]},
        {"ours": ours, "PERP's own": usual},
        reference=usual,
        baseline="PERP's own",
        check=partial(same_gradients, relative=1e-5 if dtype == torch.float32 else 2e-2),
        metrics={
            "ours": {"peak_bytes": peak_bytes(ours)},
            "PERP's own": {"peak_bytes": peak_bytes(usual)},
        },
        repeats=10,
        tokens=tokens,
    )


@benchmark("masked-lora", "forward and backward of mask_lora on the CPU, against PERP's own layer", takes=("repeats",))
def masked_lora(options: Options) -> Iterator[Case]:
    """In fp32 and in bf16, at the shape of a layer of 2048."""
    size = 512 if options.quick else 2048
    for dtype in (torch.float32, torch.bfloat16):
        yield case(1024, size, size, 16, dtype)
