"""The benchmark of image classifiers, cut short, and the example in docs/vision.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from trisparse.bench.registry import Options
from trisparse.bench.studies import digits

DOCS = Path(__file__).resolve().parents[3] / "docs" / "vision.md"


def test_one_row_for_each_group_and_schedule(monkeypatch):
    monkeypatch.setattr(digits, "SPARSITIES", ("95%",))
    monkeypatch.setattr(digits, "VISION_PRESETS", ("bn-recalibrate", "norms"))
    threads = torch.get_num_threads()
    rows = list(digits.digits_accuracy(Options(quick=True)))
    assert torch.get_num_threads() == threads
    assert [row.name for row in rows] == [
        "0% dense", "95% pruned", "95% bn-recalibrate ALLR", "95% norms ALLR", "95% full FT", "95% full LRW",
        "95% full SLR", "95% full CLR", "95% full LLR",
    ]  # fmt: skip
    accuracies = [metrics["accuracy"] for row in rows for metrics in row.metrics.values()]
    assert accuracies[1] < min(accuracies[2:]) <= max(accuracies[2:]) <= accuracies[0] + 0.02
    assert rows[3].metrics["norms ALLR"]["trainable_share"] == pytest.approx(0.0146, abs=5e-5)
    assert (rows[3].parameters["sparsity"], rows[3].parameters["seeds"]) == (0.95, 1)


def test_the_example_in_the_docs_runs(capsys):
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL).group(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        exec(compile(code, str(DOCS), "exec"), {})
    torch.set_num_threads(threads)
    shown = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert list(shown) == ["dense", "pruned", "bn-recalibrate", "biases", "norms", "linear-probing", "full"]
    assert float(shown["full"].rstrip("%")) > float(shown["bn-recalibrate"].rstrip("%")) + 10
