"""Metrics compiled: what the kernels need, and their PTX under emulation, exact and free of races."""

import os
from random import Random

import pytest
import torch

from trisparse.bench.bounds.selection import bound, cases
from trisparse.kernels.aot import resources
from trisparse.kernels.launch import Emulator, ptxsim, using
from trisparse.kernels.metric import compile_metric, score
from trisparse.kernels.nm import select_nm
from trisparse.kernels.select import select_rows
from trisparse.kernels.threshold import select_global

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels", allow_module_level=True)


def has_ptxsim():
    try:
        ptxsim()
    except ImportError:
        return False
    return True


emulated = [pytest.mark.ptx, pytest.mark.skipif(not has_ptxsim(), reason="needs ptxsim")]


def ptx(test):
    for mark in emulated:
        test = mark(test)
    return test


def checked():
    return Emulator(options={"race_check": True, "check_uninit": True})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ["pruner-zero", "ria", "nested"])
def test_gate(library, name, dtype):
    w, g, x = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((4096, 4096), (4096, 4096), (4096,)))
    given = {"score": compile_metric(library[name]), "x": x, "g": g}

    def operations():
        select_rows(w, 2048, out="packed", apply=True, **given)
        select_nm(w, 2, 4, out="packed", apply=True, **given)
        select_global([w], 1, xs=[x], gs=[g], score=given["score"], apply=True)

    rows = resources(operations)
    assert {row.kernel for row in rows} >= {"select_rows_kernel", "select_nm_kernel", "bracket_kernel", "write_kernel"}
    for row in rows:
        assert not row.problems(), row
        assert row.load_bytes == 16, row


@ptx
def test_library_emulated(library, inputs, same_score, same_mask):
    w, g, x = given = inputs(4, 1100, 0, torch.bfloat16)
    for name, tree in library.items():
        metric = compile_metric(tree)
        with using(checked()):
            found = score(metric, w, g=g, x=x)
            rows = select_rows(w, 500, x=x, score=metric, g=g)
            groups = select_nm(w, 2, 4, x=x, score=metric, g=g)
            (layer,) = select_global([w], 2000, xs=[x], score=metric, gs=[g])
        same_score(found, tree, given)
        equal = [
            same_mask(rows, tree, given, 500, 1100),
            same_mask(groups, tree, given, 2, 4),
            same_mask(layer, tree, given, 2000, w.numel()),
        ]
        assert all(equal) or name not in ("magnitude", "wanda", "pruner-zero", "gblm", "snip"), name


@ptx
def test_random_trees_emulated(trees, inputs, same_score, same_mask):
    for number in Random(1).sample(range(len(trees)), 6):
        tree = trees[number]
        w, g, x = given = inputs(3, 72, number)
        with using(checked()):
            found = score(compile_metric(tree), w, g=g, x=x)
        same_score(found, tree, given)
        if not bool(found.isnan().any()):
            with using(checked()):
                mask = select_nm(w, 2, 4, x=x, score=compile_metric(tree), g=g)
            same_mask(mask, tree, given, 2, 4)


@ptx
@pytest.mark.parametrize(
    ("name", "bytes_limit"),
    [
        ("rows 50%, metric |W|*X, in place + packed", 1.01),
        ("rows 50%, metric |W*G|, in place + packed", 1.01),
        ("rows 50%, metric |W*W|*mms(G), in place + packed", 1.01),
        ("2:4, metric |W*W|*mms(G), in place + packed", 1.01),
    ],
)
def test_inputs_are_read_once(name, bytes_limit):
    figures = bound(cases()[name], 4096, 4096)
    assert figures["dram_over_compulsory"] <= bytes_limit
    assert figures["local_bytes"] == figures["spill_bytes"] == 0
