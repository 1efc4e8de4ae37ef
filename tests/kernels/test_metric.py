"""Metrics on the CPU, what a tree compiles to, its file, and wrong input."""

import sys

import pytest
import torch

from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.metric import compile_metric, score
from trisparse.kernels.nm import meta_2_4, select_nm, select_nm_ref
from trisparse.kernels.select import select_rows, select_rows_ref
from trisparse.kernels.threshold import select_global, select_global_ref
from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.metric.parser import parse


def test_cpu_ranks_torchs_scores(library, inputs):
    w, g, x = inputs(8, 32, 0, torch.bfloat16)
    for tree in library.values():
        metric, scores = compile_metric(tree), tree.evaluate(w, g, x)
        given = {"x": x, "score": metric, "g": g}
        assert torch.equal(score(metric, w, g=g, x=x), scores)
        expected = select_rows_ref(scores, 11, absolute=False)
        zeroed = w.clone()
        assert torch.equal(select_rows(zeroed, 11, out="packed", apply=True, **given), pack_bits(expected))
        assert torch.equal(zeroed, w.masked_fill(~expected, 0))
        expected = select_nm_ref(scores, 2, 4, absolute=False)
        assert torch.equal(select_nm(w, 2, 4, **given), expected)
        values, meta = select_nm(w, 2, 4, out="compressed", **given)
        assert torch.equal(values, w[expected].reshape(8, 16))
        assert torch.equal(meta, meta_2_4(expected))
        along = select_nm_ref(scores.T.contiguous(), 2, 4, absolute=False).T
        assert torch.equal(select_nm(w, 2, 4, along_out=True, **given), along)
        masks = select_global([w, w[:3]], 100, xs=[x, x], gs=[g, g[:3]], score=metric)
        scores = [tree.evaluate(w, g, x), tree.evaluate(w[:3], g[:3], x)]
        assert all(map(torch.equal, masks, select_global_ref(scores, 100, absolute=False)))


@pytest.mark.parametrize(
    ("text", "passes", "over_weights"),
    [
        ("abs(W) * X", 0, 0),
        ("abs(W * G)", 0, 0),
        ("abs(W * W) * mms(G)", 1, 1),
        ("div(mms(W), G) + zsn(G) * norm1(W)", 1, 1),
        ("W * norm2(X)", 1, 0),
        ("zsn(mms(W) * G)", 2, 2),
        ("mms(W * norm2(X)) + mms(G)", 2, 1),
        ("W * mms(rowsum(W)) + norm2(G)", 2, 1),
        ("mms(zsn(mms(W)))", 3, 3),
    ],
)
def test_passes(text, passes, over_weights):
    metric = compile_metric(parse(text))
    assert (len(metric.passes), metric.reads_over_weights) == (passes, over_weights)


def test_equal_trees_and_subtrees_are_compiled_once():
    metric = compile_metric(parse("abs(W * W) * mms(G) + mms(G)"))
    assert compile_metric(parse("abs(W * W) * mms(G) + mms(G)")) is metric
    assert metric.source.count("= min_max_scaled(") == 1
    assert metric.statistics == (("min", (False, False)), ("max", (False, False)))
    assert metric.reads == {"W", "G"}


def test_signs():
    for text, negative in (("abs(W) * X", False), ("W * W + mms(W) * G", False), ("log(W)", True), ("W * G", True)):
        assert compile_metric(parse(text)).negative is negative, text


def test_the_file_is_written_once_and_mended(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path))
    metric = compile_metric(parse("abs(W) * 0.123456"))
    assert not list(tmp_path.iterdir())
    module = metric.module
    (file,) = (tmp_path / "metrics").iterdir()
    assert module.__file__ == str(file)
    assert file.read_text() == metric.source
    assert sys.modules.pop(module.__name__) is module
    file.write_text("raise SystemExit")
    del metric.__dict__["module"]
    assert callable(metric.function)
    assert file.read_text() == metric.source


def test_wrong_trees():
    class Raw:
        number = 0.0

        def __init__(self, data, *operands):
            self.data, self.operands = data, operands

    with pytest.raises(ValueError, match="unknown operation 'sin'"):
        compile_metric(Raw("sin", Raw("W")))
    with pytest.raises(ValueError, match="add takes 2 operands, got 1"):
        compile_metric(Raw("add", Raw("W")))
    with pytest.raises(ValueError, match="W takes no operands"):
        compile_metric(Raw("W", Raw("W")))
    with pytest.raises(ValueError, match=r"norm2\(W\) has not the shape of W"):
        compile_metric(Node("norm2", (Node("W"),)))


@pytest.mark.parametrize("select", [lambda w, **by: select_rows(w, 2, **by), lambda w, **by: select_nm(w, 2, 4, **by)])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"g is missing; the metric mul\(mul\(W, G\), X\) reads G"),
        ({"g": torch.ones(2, 8)}, "x is missing"),
        ({"g": torch.ones(2, 4)}, r"g has shape \(2, 4\); it must be the weight's, \(2, 8\)"),
        ({"g": torch.ones(2, 8, dtype=torch.int8)}, "g has dtype torch.int8"),
        ({"g": torch.ones(8, 2).T}, "g has strides"),
        ({"g": torch.ones(2, 8, device="meta")}, "g is on meta"),
        ({"g": torch.ones(2, 8), "x": torch.ones(7)}, r"x has shape \(7,\)"),
        ({"g": torch.full((2, 8), torch.nan), "x": torch.ones(8)}, r"mul\(mul\(W, G\), X\) of weight gives NaN"),
        ({"g": torch.ones(2, 8), "score": None}, "g is given without a score"),
    ],
)
def test_wrong_input(select, given, message):
    with pytest.raises(ValueError, match=message):
        select(torch.ones(2, 8), **{"score": compile_metric(parse("W * G * X")), **given})
    if "score" not in given and "NaN" not in message:
        with pytest.raises(ValueError, match=message):
            score(compile_metric(parse("W * G * X")), torch.ones(2, 8), **given)


def test_wrong_input_over_all():
    metric = compile_metric(parse("W * G"))
    with pytest.raises(ValueError, match="gs has 2 entries; it must have one per weight, 1"):
        select_global([torch.ones(2, 8)], 1, score=metric, gs=[None, None])
    with pytest.raises(ValueError, match=r"gs\[0\] is missing"):
        select_global([torch.ones(2, 8)], 1, score=metric)
    nan = torch.full((2, 8), torch.nan)
    with pytest.raises(ValueError, match=r"mul\(W, G\) of weights\[1\] gives NaN"):
        select_global([torch.ones(2, 8)] * 2, 1, score=metric, gs=[torch.ones(2, 8), nan])
    weight = torch.ones(2, 8)
    with pytest.raises(ValueError, match="gs"):
        select_global([weight], 1, score=metric, gs=[weight], apply=True)
