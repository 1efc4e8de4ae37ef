"""What a layer-wise reconstruction did, block by block, as a dict, as JSON and as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from trisparse.sparsity.report import as_text


@dataclass(frozen=True)
class BlockReport:
    """One block.

    Attributes:
        name: of the block's module.
        trainable: parameters that trained.
        error_before, error_after: |output - target|² / |target|² of the block, a mean over the tokens of the
            calibration data, on the inputs that it gets from the reconstructed blocks before it.
        seconds: wall time.
        kept: whether the trained parameters were kept; a block whose error did not fall is left as it was.
    """

    name: str
    trainable: int
    error_before: float
    error_after: float
    seconds: float
    kept: bool


@dataclass(frozen=True)
class ReconstructReport:
    """Outcome of :func:`trisparse.retrain.reconstruct.reconstruct`.

    Attributes:
        groups, targets: as they were asked for.
        samples: calibration sequences.
        seconds: wall time of the whole call.
        peak_memory_bytes: see :class:`trisparse.retrain.report.PeakMemory`.
        total_parameters: parameters of the model, a shared one counted once.
        blocks: one row a block, in order.
        missing: groups asked for that the blocks have nothing of.
        not_covered: pruned parameters of the blocks that no LoRA reaches, each with the reason.
    """

    groups: tuple[str, ...]
    targets: str
    samples: int
    seconds: float
    peak_memory_bytes: int
    total_parameters: int
    blocks: list[BlockReport] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)

    @property
    def error_before(self) -> float:
        """Mean over the blocks of their error before."""
        return sum(block.error_before for block in self.blocks) / len(self.blocks)

    @property
    def error_after(self) -> float:
        """Mean over the blocks of their error after."""
        return sum(block.error_after for block in self.blocks) / len(self.blocks)

    @property
    def trainable(self) -> int:
        """Parameters that trained, over all blocks; only one block's do at a time."""
        return sum(block.trainable for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Every attribute and property, as plain Python values."""
        totals = {name: getattr(self, name) for name in ("error_before", "error_after", "trainable")}
        return {**asdict(self), "groups": list(self.groups), **totals}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        table = Table("block", show_edge=False)
        for heading in ("trained", "error before", "after", "ratio", "s"):
            table.add_column(heading, justify="right")
        for block in self.blocks:
            ratio = f"{block.error_after / block.error_before:.3f}" if block.error_before else "-"
            note = "" if block.kept else " (left as it was)"
            before, after = f"{block.error_before:.4g}", f"{block.error_after:.4g}"
            table.add_row(block.name + note, f"{block.trainable:,}", before, after, ratio, f"{block.seconds:.1f}")
        total = (
            f"{', '.join(self.groups)} on {self.samples:,} samples in {self.seconds:.1f} s: mean error "
            f"{self.error_before:.4g} -> {self.error_after:.4g}, peak memory {self.peak_memory_bytes / 2**20:,.0f} MiB"
        )
        missing = [f"missing: the blocks have no {', no '.join(self.missing)}"] if self.missing else []
        return as_text(table, total, *missing, *(f"not covered: {line}" for line in self.not_covered))
