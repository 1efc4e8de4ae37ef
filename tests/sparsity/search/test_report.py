"""What a search's log tells, by hand-made logs, and the page with its figures."""

import json
import math

import pytest
import torch

from trisparse.sparsity.metric.parser import parse
from trisparse.sparsity.search.analysis import (
    convergence,
    correlation,
    has_opposing,
    mean_and_deviation,
    opposing_in_log,
    opposing_in_random_trees,
    read_history,
)
from trisparse.sparsity.search.log import LogError
from trisparse.sparsity.search.report import write_report
from trisparse.sparsity.search.sensitivity import metrics_to_compare, sensitivity
from trisparse.sparsity.search.settings import SearchSettings

HEADER = {
    "kind": "header",
    "settings": SearchSettings().to_dict(),
    "model": {"name": "tiny", "sha256": "0" * 64, "targets": []},
    "data": {"calibration": "1", "evaluation": "2", "windows": [2, 8]},
}


def evaluation(simplified, perplexity, operations, *, stopped=None):
    return {
        "kind": "evaluation",
        "expression": simplified.replace("abs(W)", "sqrt(sqr(W))"),
        "simplified": simplified,
        "perplexity": perplexity,
        "operations": operations,
        "stopped": stopped,
        "dropped": None,
        "tokens": 8 if stopped else 16,
        "full_tokens": 16,
        "skipped": {"form": 1},
        "seconds": 1.5,
    }


RECORDS = [
    {"kind": "reference", "name": "wanda", "expression": "abs(W) * X", "perplexity": 9.0},
    {"kind": "reference", "name": "magnitude", "expression": "abs(W)", "perplexity": None},
    evaluation("W + G", None, {"add": 1}, stopped="paired"),
    evaluation("abs(W)", math.e**3, {"abs": 1}),
    evaluation("abs(W) * X", math.e**2, {"abs": 1, "mul": 1}),
    evaluation("abs(W) * G * X", math.e**1, {"abs": 1, "mul": 2}),
    evaluation("W * G", math.e**2.5, {"mul": 1}),
]


def write_log(path, records=RECORDS, header=HEADER, end=""):
    path.write_text("\n".join(json.dumps(record) for record in (header, *records)) + "\n" + end)
    return path


def test_history_by_hand(tmp_path):
    history = read_history(write_log(tmp_path / "log.jsonl", end='{"kind": "evalu'))
    assert not history.finished
    assert [record["simplified"] for record in history.measured] == ["abs(W) * G * X", "abs(W) * X", "W * G", "abs(W)"]
    line = convergence(history)
    assert math.isnan(line[0])
    assert line[1:] == pytest.approx([math.e**3, math.e**2, math.e, math.e])
    assert opposing_in_log(history) == {2: (0, 2), 3: (1, 1), 4: (1, 1), 5: (1, 1)}
    assert list(metrics_to_compare(history)) == ["searched", "wanda"]
    assert metrics_to_compare(history)["searched"] == parse("abs(W) * G * X")


def test_correlation_by_hand(tmp_path):
    found = correlation(read_history(write_log(tmp_path / "log.jsonl")))
    assert found.names == ["mul", "abs", "perplexity"]
    assert found.metrics == 4
    # mul occurs 2, 1, 1 and 0 times at log perplexity 1, 2, 2.5 and 3
    assert found.matrix[0, 2] == pytest.approx(-2 / math.sqrt(2 * 2.1875), rel=1e-6)
    assert found.matrix[0, 0] == pytest.approx(1)


def test_correlation_is_nan_where_a_count_never_varies(tmp_path):
    records = [evaluation("abs(W)", 3.0, {"abs": 1}), evaluation("abs(W) * X", 2.0, {"abs": 1, "mul": 1})]
    found = correlation(read_history(write_log(tmp_path / "log.jsonl", records)))
    assert math.isnan(found.matrix[found.names.index("abs"), -1])
    assert found.matrix[found.names.index("mul"), -1] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("text", "opposing"),
    [
        ("exp(log(W))", True),
        ("tanh(log(exp(W)))", True),
        ("sqrt(sqr(W)) * X", True),
        ("pow(sqrt(W))", True),
        ("neg(neg(W * X))", True),
        ("W + G - G", True),
        ("G + W - G", True),
        ("W - G + G", True),
        ("W - neg(G)", True),
        ("div(W, G) * G", True),
        ("div(W * G, G)", True),
        ("abs(W) * X", False),
        ("G - (W - G)", False),
        ("W - G + X", False),
        ("exp(W) * log(G)", False),
    ],
)
def test_opposing_operations(text, opposing):
    assert has_opposing(parse(text)) is opposing


def test_share_of_opposing_trees_is_reproducible_and_grows_with_depth():
    first = opposing_in_random_trees(SearchSettings(), (3, 7), trials=2, trees=100)
    assert first == opposing_in_random_trees(SearchSettings(), (3, 7), trials=2, trees=100)
    assert len(set(first[3])) + len(set(first[7])) > 2  # trials differ
    assert mean_and_deviation(first[3])[0] < mean_and_deviation(first[7])[0]
    assert mean_and_deviation([1.0, 3.0]) == pytest.approx((2, math.sqrt(2)))


def test_report_page(tmp_path):
    history = read_history(write_log(tmp_path / "log.jsonl", [*RECORDS, {"kind": "summary"}]))
    header = json.loads(json.dumps(HEADER))
    header["settings"]["strategy"] = "random"
    baseline = read_history(write_log(tmp_path / "random.jsonl", RECORDS[:4], header))
    results = {
        "metrics": ["searched"],
        "at": 0.5,
        "windows": 2,
        "seq_len": 8,
        "samples": [{"value": 1, "perplexity": {"searched": 4.0}}, {"value": 2, "perplexity": {"searched": None}}],
        "sparsity": [{"value": 50.0, "perplexity": {"searched": 3.5}}],
    }
    page = write_report(history, tmp_path / "out", baseline=baseline, sensitivity=results)
    text = page.read_text()
    assert "`abs(W) * G * X`, perplexity 2.718" in text
    assert "| tokens | 72; without racing 80 (1.1 times as many) |" in text
    assert "5 with the form of an earlier one" in text
    assert "random: 20.086 after 2." in text
    assert "| 2 | not finite |" in text
    assert r"$\left\vert W\right\vert " in text
    for name in ("convergence", "operations", "sensitivity"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"({name}.png)" in text


def test_report_refuses_what_it_cannot_show(tmp_path):
    empty = read_history(write_log(tmp_path / "empty.jsonl", RECORDS[:3]))
    with pytest.raises(ValueError, match="no metric that was measured on the whole text"):
        write_report(empty, tmp_path / "out")
    with pytest.raises(ValueError, match="no metric that was measured"):
        metrics_to_compare(empty)
    header = json.loads(json.dumps(HEADER))
    header["data"]["evaluation"] = "other"
    other = read_history(write_log(tmp_path / "other.jsonl", RECORDS, header))
    with pytest.raises(ValueError, match="baseline is the log of a search on another"):
        write_report(read_history(write_log(tmp_path / "log.jsonl")), tmp_path / "out", baseline=other)
    (tmp_path / "no.jsonl").write_text('{"kind": "evaluation"}\n')
    with pytest.raises(LogError, match="first line is no header"):
        read_history(tmp_path / "no.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"kind": "header"\n{}\n')
    with pytest.raises(LogError, match="line 1 is no JSON"):
        read_history(tmp_path / "torn.jsonl")


def test_sensitivity_by_samples_and_sparsity(model):
    calibration, text = (torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    metrics = {"wanda": parse("abs(W) * X"), "magnitude": parse("abs(W)")}
    found = sensitivity(
        model,
        metrics,
        calibration,
        text,
        samples=(2, 1),
        sparsity=(0.0, 0.5),
        seq_len=32,
        windows=4,
        progress=False,
    )
    assert [row["value"] for row in found["samples"]] == [1, 2]
    assert [row["value"] for row in found["sparsity"]] == [0.0, 50.0]
    dense = found["sparsity"][0]["perplexity"]
    assert dense["wanda"] == dense["magnitude"]  # nothing is pruned
    assert found["sparsity"][1]["perplexity"] == found["samples"][1]["perplexity"]
    by_samples = [row["perplexity"] for row in found["samples"]]
    assert by_samples[0]["magnitude"] == by_samples[1]["magnitude"]  # reads no calibration data
    assert by_samples[0]["wanda"] != by_samples[1]["wanda"]
