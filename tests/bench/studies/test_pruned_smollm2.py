"""The perplexities of SmolLM2 pruned in different ways, on a tiny model in its place."""

import pytest

from trisparse.bench.registry import Options
from trisparse.bench.rows import Row
from trisparse.bench.studies import metric_comparison, obs_updates, perplexity_curve

pytestmark = pytest.mark.usefixtures("tiny_smollm2")


def row_of(measured):
    """What the runner makes of a benchmark's row with one contestant."""
    (contestant,) = measured.metrics
    shared = {"kind": "measurement", "device": "cpu", "run": "", "time": "", "command": "", "environment": {}}
    return Row(
        "test", measured.name, contestant, dict(measured.parameters), metrics=measured.metrics[contestant], **shared
    )


def test_curve_is_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity_curve, "SPARSITIES", ("50%",))
    rows = [row_of(measured) for measured in perplexity_curve.perplexity_curve(Options())]
    assert [(row.contestant, row.parameters.get("pattern")) for row in rows] == [
        ("dense", None),
        *((method, pattern) for method in ("magnitude", "wanda") for pattern in ("50%", "2:4", "4:8")),
    ]
    assert all(row.parameters["sparsity"] == 0.5 for row in rows[1:])
    assert rows[0].parameters["test_tokens"] == 128
    perplexity_curve.draw(rows, tmp_path / "docs" / "curve.png")
    assert (tmp_path / "docs" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_every_metric_but_random_is_compared():
    rows = [row_of(measured) for measured in metric_comparison.metric_comparison(Options(only="2:4"))]
    assert {"magnitude", "wanda", "pruner-zero"} <= {row.contestant for row in rows}
    assert "random" not in {row.contestant for row in rows}
    assert len({row.metrics["perplexity"] for row in rows}) == len(rows)
    assert rows[0].parameters["expression"]


def test_updates_differ_in_perplexity():
    rows = {row.case: row for row in map(row_of, obs_updates.obs_updates(Options(only="block 50%")))}
    assert list(rows) == [
        "sparsegpt update=default block 50%",
        "wanda update=sequential block 50%",
        "wanda update=iterative block 50%",
        "wanda update=default block 50%",
    ]
    found = list(rows.values())
    assert "damping" in found[0].metrics
    assert "damping" not in found[3].metrics
    assert found[3].parameters["update"] is None
    sparsegpt, sequential, iterative, without = (row.metrics["perplexity"] for row in found)
    assert sequential == iterative  # the tiny layers are one block of columns
    assert len({sparsegpt, sequential, without}) == 3
