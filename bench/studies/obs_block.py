"""How fast one block of columns takes its OBS update on the CPU, against the loop over its columns.

The loop is the reference, `obs_block_ref`, which is SparseGPT's. Masks must be its masks (random weights have no ties)
and the weights within 1e-4. Weights are stored by rows, as a slice of a wider weight, and by columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trisparse.bench.registry import Case, Options, benchmark
from trisparse.kernels.obs import MAX_BLOCK, obs_block, obs_block_ref

ROWS = (576, 1536, 4096)
PATTERNS: tuple[tuple[int, int] | None, ...] = (None, (2, 4), (4, 8))  # None: the mask is given


def random_factor(block: int) -> Tensor:
    """The upper Cholesky factor of the inverse of a random, damped Hessian."""
    x = torch.randn(2 * block, block, generator=torch.Generator().manual_seed(0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(x.T @ x / block + 0.1 * torch.eye(block)))
    factor: Tensor = torch.linalg.cholesky(inverse)
    return factor.T.contiguous()


def same_update(found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """Equal masks, and weights within 1e-4."""
    assert torch.equal(found[2], expected[2]), "the masks differ"
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


def case(rows: int, pattern: tuple[int, int] | None, by_columns: bool) -> Case:
    """One block of a random weight with ``rows`` rows."""
    block = MAX_BLOCK
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, 4 * block + 64, generator=generator)[:, block : 2 * block]
    weight = weight.t().contiguous().t() if by_columns else weight
    mask = torch.rand(rows, block, generator=generator) < 0.5 if pattern is None else None
    factor = random_factor(block)
    n, m = pattern or (None, None)
    name = "mask" if pattern is None else f"{pattern[0]}:{pattern[1]}"

    def loop() -> tuple[Tensor, Tensor, Tensor]:
        return obs_block_ref(weight, factor, mask, n, m)

    return Case(
        f"{rows} rows, {name}, stored by {'columns' if by_columns else 'rows'}",
        {"rows": rows, "block": block, "pattern": name, "by_columns": by_columns},
        {"ours": lambda: obs_block(weight, factor, mask, n, m), "loop": loop},
        reference=loop,
        baseline="loop",
        check=same_update,
    )


@benchmark(
    "obs-block",
    "the OBS update of one block of columns on the CPU, against the loop over its columns",
    takes=("repeats",),
)
def obs_blocks(options: Options) -> Iterator[Case]:
    """All sizes, patterns and layouts."""
    for rows in ROWS[:1] if options.quick else ROWS:
        for pattern in PATTERNS:
            for by_columns in (False, True):
                yield case(rows, pattern, by_columns)
