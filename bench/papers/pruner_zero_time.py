"""Pruner-Zero's Table 23: how long pruning takes, with the gradients measured before."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from typing import ClassVar

from trisparse.bench.papers.cell import Cell, Session, machine_name
from trisparse.bench.papers.language import Pruning, Texts, dense_model, evaluate
from trisparse.bench.papers.pruner_zero_models import LLAMA_7B, METHODS, PERPLEXITY, pruned, texts
from trisparse.bench.papers.scale import Scale
from trisparse.bench.papers.table import Entry, Layout, Place, entry, paper_table
from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.gradient_cache import cached_gradient_norms
from trisparse.sparsity.metric import find_metric
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.targets import find_targets
from trisparse.sparsity.text import load_text


@dataclass(frozen=True)
class PruningTimeCell(Cell):
    """``seconds`` of pruning alone, the median of ``repeats``, and the ``perplexity`` after it.

    Reading the data, the gradients and the evaluation are not counted, as in the paper (E.5).

    Attributes:
        machine: where, of :func:`trisparse.bench.papers.cell.machine_name`: seconds are of no other.
    """

    kind: ClassVar[str] = "pruning-time"

    model: str
    texts: Texts
    pruning: Pruning
    repeats: int
    machine: str

    def measure(self, wanted: frozenset[str], session: Session) -> dict[str, float]:
        """Prune the dense model ``repeats`` times.

        Raises:
            ValueError: the session is on another machine than the cell's.
        """
        if (here := machine_name(session.device)) != self.machine:
            raise ValueError(f"the cell is of {self.machine or 'no machine'}, the session of {here}")
        how = self.pruning
        seconds = []
        model, tokenizer = dense_model(self.model, session)
        batches, gradients = None, None
        if how.samples:
            data = load_text(self.texts.calibration, "calibration")
            batches = calibration_batches(
                model, data, tokenizer=tokenizer, samples=how.samples, seq_len=self.texts.seq_len, seed=how.seed
            )
            if "G" in find_metric(how.method, has_data=True).uses:
                gradients = cached_gradient_norms(model, find_targets(model), batches, progress=False)
        for repeat in range(self.repeats):
            if session.keep_copies:
                model = copy.deepcopy(dense_model(self.model, session)[0])
            elif repeat:
                del model  # before the next one is loaded
                model, _ = dense_model(self.model, session)
            report = sparsify(
                model,
                how.pattern,
                how.method,
                batches,
                gradients=gradients,
                propagate=how.propagate,
                update=how.update,
                seed=how.seed,
                progress=False,
            )
            seconds.append(report.seconds)
        metrics = {"seconds": statistics.median(seconds)}
        return metrics | evaluate(model, tokenizer, self.model, self.texts, wanted, session)


@paper_table(
    "pruner-zero-table-23",
    "seconds to prune to 50%, without those of the gradients",
    models=(LLAMA_7B,),
    metric="seconds, perplexity",
    plot="dots",
)
def table_23(model: str, scale: Scale) -> Layout:
    """Table 2's methods."""
    repeats = scale.choose(tiny=1, small=3, paper=1)
    entries: dict[Place, Entry] = {}
    for name, method in METHODS.items():
        pruning = Pruning.of(scale, method, "50%")
        one = PruningTimeCell(model, texts(scale, model, method), pruning, repeats, scale.machine)
        entries |= {(name, "seconds"): entry(one, metric="seconds"), (name, PERPLEXITY): entry(one)}
    times = f"Seconds are the median of {repeats} runs" if repeats > 1 else "Seconds are of one run"
    notes = (f"{times}; the machine and the model are others than the paper's: what can be compared is the order.",)
    return pruned("table-23", model, scale, entries, notes=notes)
