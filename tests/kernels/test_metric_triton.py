"""Metrics compiled to Triton against their evaluation in torch: interpreted, or on a device.

TRITON_INTERPRET=1 pytest tests/kernels/test_metric_triton.py        (test_interpreter.py runs this)
"""

import os

import pytest
import torch

from trisparse.kernels.bitmask import pack_bits_ref
from trisparse.kernels.launch import device, interpret, using
from trisparse.kernels.metric import compile_metric, score
from trisparse.kernels.nm import meta_2_4, select_nm, select_nm_ref
from trisparse.kernels.select import select_rows, select_rows_ref
from trisparse.kernels.threshold import select_global, select_global_ref

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)
# The interpreter computes with NumPy, which warns of what is meant: overflow to Inf, Inf - Inf, log 0.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")] if INTERPRETED else [pytest.mark.gpu]
WHERE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(1, 1), (3, 8), (9, 70)] if INTERPRETED else [(1, 1), (3, 8), (9, 70), (130, 4100), (4096, 4096)]
EXACT = {"magnitude", "wanda", "pruner-zero", "gblm", "snip"}  # no sum and no exp, log or tanh: torch's very bits


@pytest.fixture(autouse=True)
def runner():
    with using(interpret if INTERPRETED else device):
        yield


def there(given):
    return tuple(value.to(WHERE) for value in given)


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_the_library(library, inputs, same_score, dtype, shape):
    g_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    for name, tree in library.items():
        w, g, x = there(inputs(*shape, 0, dtype, g_dtype))
        found = score(compile_metric(tree), w, g=g, x=x)
        same_score(found, tree, (w, g, x))
        if name in EXACT:
            assert torch.equal(found, tree.evaluate(w, g, x)), name


def test_scores_of_random_trees(trees, inputs, same_score):
    for number, tree in enumerate(trees):
        given = there(inputs(5, 12, number))
        found = score(compile_metric(tree), given[0], g=given[1], x=given[2])
        same_score(found, tree, given)


def test_strided_rows(library, inputs, same_score):
    w, g, x = there(inputs(14, 90, 1))
    w, g, x = w[::2, 3:73], g[1::2, 5:75], x[:70]
    for tree in library.values():
        same_score(score(compile_metric(tree), w, g=g, x=x), tree, (w, g, x))


def test_repeats_bit_for_bit(library, inputs):
    w, g, x = there(inputs(9, 70, 2))
    for tree in library.values():
        metric = compile_metric(tree)
        assert torch.equal(score(metric, w, g=g, x=x), score(metric, w, g=g, x=x))


def test_rows(library, inputs, same_mask, dtype):
    for name, tree in library.items():
        w, g, x = there(inputs(5, 65, 3, dtype, dtype))
        metric = compile_metric(tree)
        mask = select_rows(w, 20, x=x, score=metric, g=g)
        assert same_mask(mask, tree, (w, g, x), 20, 65) or name not in EXACT, name
        zeroed = w.clone()
        packed = select_rows(zeroed, 20, x=x, score=metric, g=g, out="packed", apply=True)
        assert torch.equal(packed, pack_bits_ref(mask)), name
        assert torch.equal(zeroed, w.masked_fill(~mask, 0)), name


def test_masks_by_random_trees(trees, inputs, same_mask):
    for number, tree in enumerate(trees):
        w, g, x = given = there(inputs(2, 12, number))
        metric = compile_metric(tree)
        by_row = number % 4 == 0  # the interpreter takes a hundred times as long for the search in a row
        select, k, size = (select_rows, (5,), 12) if by_row else (select_nm, (2, 4), 4)
        if bool(tree.evaluate(*given).isnan().any()):
            with pytest.raises(ValueError, match="of weight gives NaN scores"):
                select(w, *k, x=x, score=metric, g=g)
        else:
            same_mask(select(w, *k, x=x, score=metric, g=g), tree, given, k[0], size)


def test_rows_too_wide_for_registers(monkeypatch, library, inputs, same_mask):
    from trisparse.kernels import select_triton

    monkeypatch.setattr(select_triton, "MAX_HELD", 4)
    for tree in library.values():
        w, g, x = there(inputs(2, 65, 4))
        same_mask(select_rows(w, 20, x=x, score=compile_metric(tree), g=g), tree, (w, g, x), 20, 65)


def test_global(library, inputs, same_mask):
    for name, tree in library.items():
        w, g, x = there(inputs(6, 33, 5, torch.bfloat16, torch.float32))
        (mask,) = select_global([w], 70, xs=[x], score=compile_metric(tree), gs=[g])
        assert same_mask(mask, tree, (w, g, x), 70, w.numel()) or name not in EXACT, name


def test_global_over_tensors_with_an_unlucky_sample(monkeypatch, library, inputs):
    from trisparse.kernels import threshold_triton

    monkeypatch.setattr(threshold_triton, "_SAMPLES", 16)
    monkeypatch.setattr(threshold_triton, "_MARGIN", 1)
    parts = [there(inputs(rows, 30, rows, dtype)) for rows, dtype in ((20, torch.float32), (7, torch.float16))]
    ws, gs, xs = ([part[i] for part in parts] for i in range(3))
    for name in EXACT:
        tree = library[name]
        expected = select_global_ref([tree.evaluate(*part) for part in parts], 300, absolute=False)
        zeroed = [w.clone() for w in ws]
        found = select_global(zeroed, 300, xs=xs, score=compile_metric(tree), gs=gs, out="packed", apply=True)
        for packed, mask, w, after in zip(found, expected, ws, zeroed, strict=True):
            assert torch.equal(packed, pack_bits_ref(mask)), name
            assert torch.equal(after, w.masked_fill(~mask, 0)), name


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 7)])
def test_nm(library, inputs, same_mask, n, m):
    for number, (name, tree) in enumerate(library.items()):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number % 3]
        w, g, x = given = there(inputs(2 * m, 3 * m, 6, dtype, torch.float32))
        metric = compile_metric(tree)
        mask = select_nm(w, n, m, x=x, score=metric, g=g)
        assert same_mask(mask, tree, given, n, m) or name not in EXACT, name
        zeroed = w.clone()
        packed = select_nm(zeroed, n, m, x=x, score=metric, g=g, out="packed", apply=True)
        assert torch.equal(packed, pack_bits_ref(mask)), name
        assert torch.equal(zeroed, w.masked_fill(~mask, 0)), name
        if name in EXACT:
            along = select_nm(w, n, m, x=x, score=metric, g=g, along_out=True)
            expected = select_nm_ref(tree.evaluate(*given).T.contiguous(), n, m, absolute=False).T
            assert torch.equal(along, expected), name


def test_nm_compressed(library, inputs):
    w, g, x = there(inputs(3, 48, 7, torch.bfloat16))
    metric = compile_metric(library["pruner-zero"])
    for n, m in ((2, 4), (3, 8)):
        mask = select_nm_ref(metric.evaluate(w, g, x), n, m, absolute=False)
        zeroed = w.clone()
        values, meta = select_nm(zeroed, n, m, x=x, score=metric, g=g, out="compressed", apply=True)
        assert torch.equal(values, w[mask].reshape(3, 48 * n // m))
        assert torch.equal(meta, meta_2_4(mask) if m == 4 else pack_bits_ref(mask))
        assert torch.equal(zeroed, w.masked_fill(~mask, 0))


def test_signs_that_the_metric_does_not_expect(library, inputs):
    w, g, x = there(inputs(4, 64, 8, torch.float16))
    g, x = g - 0.05, x - 0.6
    for name in EXACT:
        given = {"x": x, "score": compile_metric(library[name]), "g": g}
        scores = library[name].evaluate(w, g, x)
        assert torch.equal(select_rows(w, 40, **given), select_rows_ref(scores, 40, absolute=False)), name
        assert torch.equal(select_nm(w, 4, 8, **given), select_nm_ref(scores, 4, 8, absolute=False)), name
