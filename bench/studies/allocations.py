"""Perplexity of SmolLM2-135M at one model-wide sparsity, spread over its layers by different allocations.

X comes from one pass over the dense model that all rows share, so each mask is that of
``sparsify(..., propagate="dense")``. Perplexity is computed in bf16.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trisparse.bench.demo import FULL
from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.bench.smollm2 import load_smollm2
from trisparse.sparsity.allocation import find_allocation
from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.calibration import walk
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.mask import detach, masks
from trisparse.sparsity.metric import METRICS
from trisparse.sparsity.pattern import Unstructured, parse_pattern
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.progress import progress_bar
from trisparse.sparsity.pruning import Pruning
from trisparse.sparsity.targets import find_targets
from trisparse.sparsity.text import pydoc_text

_SPREAD = ("uniform", "owl:M=5,lambda=0.08", "owl:M=5,lambda=0.15", "owl:M=7,lambda=0.08", "erk", "lamp")
CASES = (
    *(("wanda", sparsity, allocation) for sparsity in ("60%", "70%") for allocation in _SPREAD),
    ("wanda", "60%", "global"),
    *(("magnitude", "60% layer", allocation) for allocation in ("uniform", "erk", "lamp")),
    *(("wanda", "4:8", allocation) for allocation in ("uniform", "owl:M=5,lambda=0.15")),
)


@dataclass(frozen=True)
class Outcome:
    """What one allocation gave.

    Attributes:
        sparsity: pruned share of all targets.
        least, greatest: sparsity of the densest and of the sparsest target.
        seconds: of the allocation itself, without the pass that measures X.
    """

    perplexity: float
    sparsity: float
    least: float
    greatest: float
    seconds: float


class AllocatedModel:
    """A causal language model that is measured once and then pruned anew for each case.

    Args:
        model: in fp32; left in fp32 with its own weights after each case.
        tokenizer: for the text.
        calibration, test: text, or token ids.
        samples, seq_len: calibration sequences, and tokens of each and of a test window.
        windows: test windows.
    """

    def __init__(
        self, model: Any, tokenizer: Any, calibration: Any, test: Any, *, samples: int, seq_len: int, windows: int
    ) -> None:
        self.model = model
        self.seq_len = seq_len
        self._dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._test = token_windows(test, tokenizer=tokenizer, seq_len=seq_len, samples=windows)
        self.test_tokens = self._test.numel()
        self.targets = find_targets(model)
        batches = calibration_batches(model, calibration, tokenizer=tokenizer, samples=samples, seq_len=seq_len)
        self._steps = list(walk(model, self.targets, batches, propagate="dense"))
        self._inputs = {target.name: statistics for group, statistics in self._steps for target in group}

    def dense(self) -> float:
        """Perplexity of the dense model."""
        return self._perplexity()

    def measure(self, method: str, sparsity: str, allocation: str) -> Outcome:
        """Prune, measure, and put the dense weights back."""
        spread = find_allocation(allocation)
        pattern = spread.check(parse_pattern(sparsity))
        start = time.perf_counter()
        patterns = spread.patterns(self.model, self.targets.found, pattern, self._inputs)
        seconds = time.perf_counter() - start
        pruned = {name: one for name, one in patterns.items() if one is not None}
        pruning = Pruning(pattern, METRICS[method], 0, None, pruned)
        reads_inputs = "X" in METRICS[method].uses
        steps = [
            ([target for target in group if target.name in pruned], statistics if reads_inputs else None)
            for group, statistics in self._steps
        ]
        if isinstance(pattern, Unstructured) and pattern.scope == "global":
            with progress_bar(allocation, len(self.targets.found), enabled=False) as advance:
                pruning.prune_together(steps, advance)
        else:
            for group, statistics in steps:
                pruning.prune(group, statistics)
        found = masks(self.model)
        shares = [found[target.name].sparsity if target.name in found else 0.0 for target in self.targets.found]
        sizes = [target.weight.numel() for target in self.targets.found]
        sparsity_of_all = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
        return Outcome(self._perplexity(), sparsity_of_all, min(shares), max(shares), seconds)

    def _perplexity(self) -> float:
        """Of the weights as they are; then the dense ones come back."""
        try:
            return perplexity(self.model.to(torch.bfloat16), self._test, seq_len=self.seq_len)
        finally:
            self.model.float().load_state_dict(self._dense)
            for module in self.model.modules():
                detach(module)


@benchmark("allocations", "perplexity of SmolLM2 at one sparsity, spread over its layers in different ways")
def allocations(options: Options) -> Iterator[Measured]:
    """One row for each method, sparsity and allocation, and the dense model's."""
    model, tokenizer = load_smollm2()
    smollm2 = AllocatedModel(
        model,
        tokenizer,
        pydoc_text("calibration"),
        pydoc_text("test"),
        samples=FULL.calibration // (4 if options.quick else 1),
        seq_len=FULL.seq_len,
        windows=FULL.test // (4 if options.quick else 1),
    )
    shared = {"model": "SmolLM2-135M", "test_tokens": smollm2.test_tokens}
    if options.wants("dense"):
        yield Measured("dense", shared | {"sparsity": 0.0}, {"dense": {"perplexity": smollm2.dense()}})
    for method, sparsity, allocation in CASES:
        case = f"{method} {sparsity} {allocation}"
        if not options.wants(case):
            continue
        outcome = smollm2.measure(method, sparsity, allocation)
        parameters = {"method": method, "pattern": sparsity, "allocation": allocation}
        metrics = {
            "perplexity": outcome.perplexity,
            "sparsity": outcome.sparsity,
            "least_sparsity": outcome.least,
            "greatest_sparsity": outcome.greatest,
            "allocation_seconds": outcome.seconds,
        }
        yield Measured(case, shared | parameters, {f"{method}, {allocation}": metrics})
