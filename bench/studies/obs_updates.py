"""Perplexity of SmolLM2-135M with and without an OBS update, by its mode and by how calibration goes on."""

from __future__ import annotations

from collections.abc import Iterator

from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.bench.studies.pruned_smollm2 import PrunedSmolLM2
from trisparse.sparsity.calibration import Propagate
from trisparse.sparsity.obs import Update

PATTERNS = ("50%", "2:4")
CASES: tuple[tuple[str, Update | None, Propagate], ...] = (
    ("sparsegpt", None, "block"),
    ("sparsegpt", None, "linear"),
    ("sparsegpt", None, "dense"),
    ("wanda", "sequential", "block"),
    ("wanda", "iterative", "block"),
    ("wanda", None, "block"),
)


@benchmark("obs-updates", "perplexity of SmolLM2 with and without OBS updates of the kept weights")
def obs_updates(options: Options) -> Iterator[Measured]:
    """One row for each method, mode of the update, way of calibrating and pattern."""
    smollm2 = PrunedSmolLM2(quick=options.quick)
    for method, update, propagate in CASES:
        for pattern in PATTERNS:
            case = f"{method} update={update or 'default'} {propagate} {pattern}"
            if not options.wants(case):
                continue
            report = smollm2.prune(method, pattern, update=update, propagate=propagate)
            parameters = {
                **smollm2.parameters,
                "update": report.update,
                "propagate": propagate,
                "pattern": pattern,
                "sparsity": report.sparsity,
            }
            metrics = {"perplexity": smollm2.perplexity()}
            dampings = [target.damping for target in report.targets if target.damping is not None]
            if dampings:
                metrics["damping"] = max(dampings)
            yield Measured(case, parameters, {method: metrics})
