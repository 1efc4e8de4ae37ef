"""The compiled kernel of the OBS update under emulation of its PTX: equal, free of races, within its counted bounds.

The same figures, for more cases, go to bench/results by `python -m trisparse.bench.bounds obs`.
"""

import os

import pytest

pytest.importorskip("triton")
from trisparse.bench.bounds.obs import bound
from trisparse.kernels.launch import Emulator, ptxsim, using

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels", allow_module_level=True)
try:
    ptxsim()
except ImportError:
    pytest.skip("needs ptxsim", allow_module_level=True)
pytestmark = pytest.mark.ptx


@pytest.mark.parametrize(
    ("rows", "block", "nm", "storage"),
    [(33, 12, None, "slice of rows"), (33, 16, (2, 4), "columns"), (3, 24, (4, 8), "rows")],
)
def test_exact(obs_inputs, check_obs_block, rows, block, nm, storage):
    weight, factor = obs_inputs(rows, block, "exact", storage)
    mask = None if nm else (weight.roll(1, 0) - weight).round() % 2 == 0
    with using(Emulator(options={"race_check": True, "check_uninit": True, "schedule": "random"})):
        check_obs_block((weight, factor), (mask, *(nm or ())), exact=True, in_place=storage == "slice of rows")


def test_rounding(obs_inputs, check_obs_block):
    with using(Emulator(options={"race_check": True, "check_uninit": True})):
        check_obs_block(obs_inputs(32, 40, storage="columns"), (None, 2, 4))


@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4)])
def test_counted_bounds(n, m):
    counts = bound(4096, n, m, ctas=2)
    assert counts["spill_bytes"] == 0
    # Beside the compulsory bytes, the lower half of U by sectors: half of 64 KiB.
    assert counts["bytes_over_compulsory"] <= 1.006
    assert counts["issue_us"] <= 7.7
