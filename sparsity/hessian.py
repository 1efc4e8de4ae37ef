"""Hessians of layer-wise reconstruction, H = Σ xᵀx over the calibration tokens, and their damped factorisation.

An OBS update minimises ‖X (W - W')ᵀ‖² for each layer, whose Hessian is XᵀX for every row of W alike (SparseGPT,
Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, section 3). Layers that read the same tensor share it,
and its factorisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trisparse.sparsity.distributed import Processes

_CHUNK = 512  # tokens that are multiplied at once: their fp32 copy stays in the cache
_PANEL = 384  # columns of the upper triangle that are summed at once
_GROWTHS = 6  # to a million times the damping that was asked for: rounding, which is what fails, is far below that

Unit = tuple[str, int]  # a part (an expert, a group of a convolution) of a target, by its name


@dataclass(frozen=True)
class Factor:
    """Upper Cholesky factor U of the inverse of a damped Hessian, UᵀU = (H + λI)⁻¹.

    Attributes:
        upper: U, fp32 [cols, cols], upper triangular with a positive diagonal.
        dead: bool [cols], inputs that were 0 on all tokens; U is 1 on their diagonal before damping, 0 beside it.
        damping: λ as a share of the mean of H's diagonal over the inputs that are not dead.
    """

    upper: Tensor
    dead: Tensor
    damping: float


class FactorisationError(ValueError):
    """A Hessian has no Cholesky factorisation, whatever the damping."""


@dataclass(eq=False)
class Hessian:
    """The sum of xᵀx; only its upper triangle, in panels of columns, is summed: below them is nothing of use.

    Attributes:
        upper: fp32 [cols, cols].
    """

    upper: Tensor
    _factors: dict[float, Factor] = field(default_factory=dict)

    def add(self, rows: Tensor) -> None:
        """Add xᵀx of ``rows`` [tokens, cols] of any floating dtype, accumulated in fp32."""
        self._factors.clear()
        add_gram(self.upper, rows)

    def merge(self, other: Hessian) -> None:
        """Add the sum of ``other``."""
        self._factors.clear()
        self.upper += other.upper

    def factor(self, damping: float) -> Factor:
        """Its :func:`factorise`, made once."""
        if damping not in self._factors:
            self._factors[damping] = factorise(self.upper, damping)
        return self._factors[damping]


class HessianSums:
    """Hessians of the inputs of targets, one for all that are fed by the same tensors in every call."""

    def __init__(self) -> None:
        self._sums: dict[frozenset[Unit], Hessian] = {}
        self._open: list[_Open] = []

    def share(self, unit: Unit, x: Tensor) -> bool:
        """Count ``x`` for ``unit``, too, if another one has passed the same tensor in this call."""
        for seen in self._open:
            if seen.x is x and seen.version == x._version:
                seen.units.add(unit)
                return True
        return False

    def add(self, unit: Unit, rows: Tensor, x: Tensor | None = None) -> None:
        """Count ``rows`` [tokens, cols] for ``unit``; they are those of ``x``, which others may :meth:`share`."""
        cols = rows.shape[1]
        hessian = Hessian(torch.zeros(cols, cols, dtype=torch.float32, device=rows.device))
        hessian.add(rows)
        self._open.append(_Open(x, 0 if x is None else x._version, hessian, {unit}))

    def close(self) -> None:
        """End a call: no later input is the same tensor as one of those before."""
        for seen in self._open:
            key = frozenset(seen.units)
            if key in self._sums:
                self._sums[key].merge(seen.hessian)
            else:
                self._sums[key] = seen.hessian
        self._open.clear()

    def of(self, unit: Unit) -> Hessian | None:
        """The Hessian of ``unit`` so far, or None if no input reached it; the same object where it is shared."""
        found = [hessian for units, hessian in self._sums.items() if unit in units]
        found += [seen.hessian for seen in self._open if unit in seen.units]
        if len(found) < 2:
            return found[0] if found else None
        total = Hessian(found[0].upper.clone())  # layers that share their input in some calls only
        for hessian in found[1:]:
            total.merge(hessian)
        return total

    def add_up(self, processes: Processes, cols: Mapping[str, int], device: torch.device) -> None:
        """Add what the other processes have summed, in fp32; ``cols`` are the widths of the targets by name."""
        own = [sorted(units) for units in self._sums]
        for key in sorted({tuple(units) for found in processes.gather(own) for units in found}):
            units = frozenset(key)
            if units not in self._sums:  # an expert that another process's tokens were routed to
                width = cols[key[0][0]]
                self._sums[units] = Hessian(torch.zeros(width, width, dtype=torch.float32, device=device))
            processes.add_up(self._sums[units].upper)

    def clear(self) -> None:
        """Forget all of them: they are the largest thing that calibration holds."""
        self._sums.clear()


@dataclass
class _Open:
    """An input of the call that runs; it is held, so that its identity cannot be taken over."""

    x: Tensor | None
    version: int
    hessian: Hessian
    units: set[Unit]


def add_gram(upper: Tensor, rows: Tensor) -> None:
    """``upper`` += rowsᵀ rows in fp32 on and above the diagonal; rows [tokens, cols] of any floating dtype.

    Products of two bf16 numbers are exact in fp32, so bf16 rows lose nothing in a bf16 product that accumulates and
    answers in fp32. torch has that for CUDA (``out_dtype``), and for CPUs as the precision of fp32 products.
    """
    cols = rows.shape[1]
    on_cpu = rows.device.type == "cpu"
    exact_in_bf16 = rows.dtype == torch.bfloat16
    with product_precision("bf16" if exact_in_bf16 and on_cpu else "ieee"):
        for chunk in rows.split(_CHUNK if on_cpu else max(len(rows), 1)):
            by_tensor_core = rows.device.type == "cuda" and rows.dtype in (torch.bfloat16, torch.float16)
            chunk = chunk if by_tensor_core else chunk.float()
            for start in range(0, cols, _PANEL):
                end = min(start + _PANEL, cols)
                panel = upper[:end, start:end]
                if by_tensor_core:
                    panel += torch.mm(chunk[:, :end].T, chunk[:, start:end], out_dtype=torch.float32)
                else:
                    panel.addmm_(chunk[:, :end].T, chunk[:, start:end])


def factorise(upper: Tensor, damping: float) -> Factor:
    """Factorise H + λI, λ = ``damping`` times the mean of H's diagonal, with more damping where that fails.

    With R Rᵀ = H, R upper triangular, U = R⁻¹ has UᵀU = H⁻¹: one Cholesky factorisation (of H with rows and columns
    reversed, whose factor is lower) and one triangular inverse, where H⁻¹ and a second factorisation are common.

    Args:
        upper: fp32 [cols, cols]; read on and above the diagonal.
        damping: more than 0; grows tenfold until the factorisation succeeds.

    Raises:
        FactorisationError: H is not finite, or a million times ``damping`` does not help.
    """
    cols = upper.shape[0]
    diagonal = upper.diagonal()
    if not bool(torch.isfinite(diagonal).all()):  # |H_ij| is at most the greater of H_ii and H_jj
        raise FactorisationError("its Hessian is not finite: the inputs overflow on the calibration data")
    dead = diagonal == 0
    mean = diagonal.double().sum() / (~dead).sum().clamp(min=1)
    identity = torch.eye(cols, dtype=upper.dtype, device=upper.device)
    for growth in range(_GROWTHS + 1):
        used = damping * 10.0**growth
        damped = upper.flip(0, 1)  # lower triangular from here on
        damped.diagonal().add_((used * mean + dead.flip(0)).to(upper.dtype))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed):
            continue
        with product_precision("ieee"):
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).contiguous()
        if bool(torch.isfinite(inverse).all()):
            return Factor(inverse, dead, used)
    raise FactorisationError(
        f"its Hessian [{cols}, {cols}] has no Cholesky factorisation, with a damping of up to {used:g} times "
        f"the mean of its diagonal ({mean:g})"
    )


def identity_factor(cols: int, device: torch.device) -> Factor:
    """U of an input that no token reached: nothing is known of it, as with an X of 1."""
    return Factor(torch.eye(cols, device=device), torch.zeros(cols, dtype=torch.bool, device=device), 0.0)


def unfolded(x: Tensor, module: nn.Conv1d | nn.Conv2d) -> list[Tensor]:
    """What each group of a convolution multiplies its weight with: [samples · places, in/groups · kh · kw] each."""
    batched = x if x.ndim == len(module.kernel_size) + 2 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    batched = F.pad(batched, module._reversed_padding_repeated_twice, mode)
    height: tuple[int, ...] = ()
    if isinstance(module, nn.Conv1d):
        batched, height = batched.unsqueeze(-2), (1,)
    places = F.unfold(  # [samples, in · kh · kw, places]
        batched.float(),
        height + module.kernel_size,
        dilation=height + module.dilation,
        stride=height + module.stride,
    )
    return [part.movedim(1, 2).reshape(-1, part.shape[1]) for part in places.chunk(module.groups, dim=1)]


@contextmanager
def product_precision(precision: str) -> Iterator[None]:
    """How fp32 matrix products are computed while open: "ieee", or "bf16" (factors rounded to bf16; CPUs only).

    It is a setting of the whole process, as torch has it; "ieee" also where its user allows less.
    """
    settings: list[Any] = [torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    if torch.backends.cuda.is_built():
        settings.append(torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = precision if setting is settings[0] else "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
