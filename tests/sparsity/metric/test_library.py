"""Named metrics by hand, scores for the kernels, JSON files, and what a method can be."""

import json
import math
from pathlib import Path

import pytest
import torch

from trisparse.sparsity.metric import METRICS, Metric, MetricSyntaxError, Node, find_metric
from trisparse.sparsity.metric.listing import list_metrics, list_operations
from trisparse.sparsity.metric.operations import OPERATIONS

W = torch.tensor([[3.0, -4.0], [1.0, 2.0]])
G = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
X = torch.tensor([4.0, 0.25])
ROOT = math.sqrt(2048)
BY_HAND = {
    "magnitude": [[3, 4], [1, 2]],
    "wanda": [[12, 1], [4, 0.5]],
    "pruner-zero": [[0, 16 / 4], [1 / 2, 4]],
    "gblm": [[3 * (100 + 4 * ROOT), 4 * (200 + ROOT / 4)], [300 + 4 * ROOT, 2 * (500 + ROOT / 4)]],
    "snip": [[3, 8], [3, 10]],
    "searched-smollm2": [[math.sqrt(12) + 1 - 1, 1 + 4 - 2], [math.sqrt(4) + 9 - 3, math.sqrt(0.5) + 25 - 5]],
    "ria": [[(3 / 4 + 3 / 7) * 2, (4 / 6 + 4 / 7) / 2], [(1 / 4 + 1 / 3) * 2, (2 / 6 + 2 / 3) / 2]],
}
USES = {
    "magnitude": "",
    "wanda": "X",
    "pruner-zero": "G",
    "gblm": "GX",
    "snip": "G",
    "ria": "X",
    "random": "",
    "searched-smollm2": "GX",
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_metric_is_tried():
    assert set(METRICS) == {*BY_HAND, "random"} == set(USES)


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    expected = torch.tensor(BY_HAND[name], dtype=torch.float32)
    metric = METRICS[name]
    assert torch.allclose(metric.evaluate(W, G, X), expected, rtol=1e-6)
    assert torch.allclose(metric.score(W, X, G, generator()).materialise(), expected, rtol=1e-6)
    assert torch.allclose(metric.simplified().evaluate(W, G, X), expected, rtol=1e-6)
    assert metric.uses - {"W"} == set(USES[name])
    assert metric.source
    assert metric.summary


def test_random_has_no_expression():
    metric = METRICS["random"]
    first, second = metric.score(W, None, None, generator()), metric.score(W, None, None, generator())
    assert torch.equal(first.weight, second.weight)
    assert not first.absolute
    assert metric.simplified() is metric
    assert (metric.infix, metric.uses) == ("random", frozenset())
    with pytest.raises(ValueError, match="'random' has no expression"):
        metric.to_json()


@pytest.mark.parametrize("text", ["abs(W)", "abs(-W)", "skp(abs(W)) + 0", "abs(W) / 1"])
def test_magnitude_is_ranked_in_place(text):
    score = Metric.parse(text).score(W, None, None, generator())
    assert score.weight is W
    assert score.x is None
    assert score.absolute


@pytest.mark.parametrize("text", ["abs(W) * X", "X * abs(W)", "abs(W * X)", "abs(-X * W)", "abs(W) * abs(X)"])
def test_wanda_is_ranked_in_place(text):
    score = Metric.parse(text).score(W, X, None, generator())
    assert score.weight is W
    assert score.x is X
    assert score.absolute


def test_signed_weights_are_ranked_in_place():
    score = Metric.parse("--W").score(W, None, None, generator())
    assert score.weight is W
    assert not score.absolute


@pytest.mark.parametrize("text", ["sqr(W)", "2 * abs(W)", "sqr(W) * sqr(X)", "abs(W) * X * X", "mms(abs(W))", "W * X"])
def test_what_ranks_alike_only_up_to_rounding_is_formed(text):
    score = Metric.parse(text).score(W, X, None, generator())
    assert torch.equal(score.weight, Metric.parse(text).evaluate(W, G, X))
    assert not score.absolute
    tiny = torch.tensor([[1e-30, 2e-30]])
    if text == "sqr(W)":  # underflows to a tie, which |W| is not
        assert Metric.parse(text).score(tiny, None, None, generator()).weight.tolist() == [[0, 0]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["G", "X"])
def test_broken_statistics_are_named(name, value):
    metric = METRICS["gblm"]
    given = {"G": G.clone(), "X": X.clone()}
    given[name].view(-1)[1] = value
    with pytest.raises(ValueError, match=rf"gblm: abs\(W\) .*: {name} must be finite and not negative"):
        metric.score(W, given["X"], given["G"], generator())
    METRICS["magnitude"].score(W, given["X"], given["G"], generator())  # which reads neither


def test_an_overflow_on_the_way_is_an_error_not_zeros():
    metric = Metric.parse("W * mms(exp(1000 * G))")
    with pytest.raises(ValueError, match=r"metric W \* mms\(exp\(1000 \* G\)\) gives NaN: a value overflows"):
        metric.score(W, None, G, generator())
    with pytest.raises(ValueError, match="gives NaN"):
        Metric.parse("div(W, exp(1000 * G))").score(W, None, G, generator())


def test_missing_inputs_are_named():
    with pytest.raises(ValueError, match="reads X, which is missing"):
        METRICS["wanda"].score(W, None, None, generator())
    with pytest.raises(ValueError, match="reads G, which is missing"):
        METRICS["snip"].score(W, None, None, generator())


def test_file_round_trip(tmp_path):
    metric = Metric.parse("abs(W) * X / 2", name="mine", source="here")
    metric.save(tmp_path / "mine.json")
    content = json.loads((tmp_path / "mine.json").read_text())
    assert content["data"] == "ratio"
    assert content["right"] == {"data": "2.0"}
    assert Metric.load(tmp_path / "mine.json") == metric
    assert str(metric) == "mine: abs(W) * X / 2"
    plain = Metric.from_json({"data": "abs", "left": {"data": "W"}})
    assert (plain.name, str(plain), plain.latex) == ("abs(W)", "abs(W)", r"\left|W\right|")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no metric: Expecting"),
        ('{"data": "abs"}', "no metric: root: 'abs' has left, but no operand is given"),
        ('{"data": "X"}', "no metric: metric 'X': the value is one number a column"),
        ('{"name": 3, "data": "W"}', "no metric: root: 'name' must be a text"),
        ('{"data": "neg", "left": ' * 100_000, "no metric: "),
        ("[]", "no metric: root: a node must be an object"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Metric.load(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: cannot be read as a metric: No such file"):
        find_metric(str(tmp_path / "none.json"), has_data=True)


def test_a_method_is_a_name_an_expression_a_file_or_a_metric(tmp_path):
    metric = Metric.parse("W * W * X")
    metric.save(tmp_path / "a.json")
    assert find_metric("auto", has_data=False) is METRICS["magnitude"]
    assert find_metric("auto", has_data=True) is METRICS["wanda"]
    assert find_metric("ria", has_data=True) is METRICS["ria"]
    for method in (metric, "W * W * X", str(tmp_path / "a.json"), tmp_path / "a.json"):
        assert find_metric(method, has_data=True) == metric
    assert find_metric("W", has_data=False).infix == "W"
    assert find_metric("snip", has_data=False, has_gradients=True) is METRICS["snip"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("wandaa", "got 'wandaa'; did you mean 'wanda'?"),
        (
            "optimal",
            "method must be one of auto, magnitude, wanda, pruner-zero, gblm, snip, ria, searched-smollm2, random, "
            "sparsegpt, an expression",
        ),
        ("sparse-gpt", "got 'sparse-gpt'; did you mean 'sparsegpt'?"),
        ("sparsegpt", "'sparsegpt' ranks by the layers' inputs: pass data"),
        ("abs(W", "method: expected ')' to close"),
        ("", "method: the expression is empty"),
        ("wanda", "'wanda' ranks by the layers' inputs: pass data"),
        ("snip", "'snip' ranks by gradients: pass data (and a tokenizer for text) or gradients"),
        ("W * X", "'W * X' ranks by the layers' inputs"),
        (3, "method must be a name, an expression, a JSON file or a Metric, got 3"),
    ],
)
def test_wrong_methods(method, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        find_metric(method, has_data=False)
    assert message in str(caught.value)


def test_metrics_check_themselves():
    with pytest.raises(ValueError, match="metric 'bad': the value is one number"):
        Metric("bad", Node("norm2", (Node("W"),)))
    with pytest.raises(MetricSyntaxError):
        Metric.parse("X")


def test_lists():
    rows, table = list_metrics()
    assert [row["name"] for row in rows] == list(METRICS)
    assert next(row for row in rows if row["name"] == "gblm")["needs"] == "X, G"
    assert table.row_count == len(METRICS)
    rows, table = list_operations()
    assert [row["operation"].partition("(")[0] for row in rows] == list(OPERATIONS)
    assert {row["operation"]: row["infix"] for row in rows}["ratio(x, y)"] == "x / y"
    assert {row["origin"] for row in rows} == {"Pruner-Zero", "extension"}


def test_the_page_for_users_has_every_metric_and_operation():
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    for row in list_metrics()[0]:
        assert f"| `{row['name']}` | {'`' + row['expression'] + '`' if row['expression'] else 'uniform'}" in page
    for row in list_operations()[0]:
        assert f"| `{row['operation']}` | " in page
