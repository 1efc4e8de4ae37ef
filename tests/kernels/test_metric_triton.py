"""Metrics compiled to Triton against their evaluation in torch: interpreted, or on a device.

    TRITON_INTERPRET=1 pytest tests/kernels/test_metric_triton.py        (test_interpreter.py runs this)
"""

import os

import pytest
import torch

from trisparse.kernels.launch import device, interpret, using
from trisparse.kernels.metric import compile_metric, score

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
