"""The kernels of the compressed linear layer fit their GPUs: no spills, no more shared memory than there is.

`python -m trisparse.bench.linear_gate` compiles all shapes, formats, ranks and dtypes; here is one operation for each
configuration, in full for the two formats whose decompression is largest.
"""

import os

import pytest
import torch

from trisparse.bench.linear_gate import FORMATS, SHAPES, TOKENS, Case, cases, compiled, distinct

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels", allow_module_level=True)

FULL = ("2:4", "bitmask")


def chosen(case):
    """Whether the tests compile this case."""
    if case.dtype != torch.bfloat16:
        return case.dtype == torch.float32 and case.format == "2:4" and case.tokens in (1, 512) and not case.backward
    return case.format in FULL or (case.rank == 16 and case.tokens in (1, 512))


def fit(wanted):
    rows = list(compiled(wanted))
    assert rows
    assert not [f"{case}: {problem}" for case, row in rows for problem in row.problems()]
    return {(row.cc, row.kernel) for _, row in rows}


@pytest.mark.parametrize("format", [name for name, *_ in FORMATS])
def test_gate(format):
    wanted = list(distinct(case for case in cases() if case.format == format and chosen(case)))
    assert fit(wanted) == {(cc, kernel) for cc in (80, 90) for kernel in ("product_kernel", "reduce_kernel")}


@pytest.mark.parametrize("cc", [89, 100])
def test_other_architectures_compile(cc):
    fit((cc, Case("bitmask", 0, 0, 4096, 4096, tokens, 16, backward=tokens == 512)) for tokens in (1, 512))


def test_cases_cover_all_and_each_configuration_once():
    listed = list(cases())
    assert {(c.rows, c.cols, c.tokens) for c in listed} >= {(*shape, tokens) for shape in SHAPES for tokens in TOKENS}
    assert {c.format for c in listed} == {name for name, *_ in FORMATS}
    few = list(distinct(listed))
    assert len(few) < len(listed)  # of twice as many, for two compute capabilities
    assert len(set(few)) == len(few)
    assert set(distinct([case for _, case in few])) == set(few)
