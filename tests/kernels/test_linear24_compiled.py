"""The compiled 2:4 product: it fits its GPUs, is right and free of races under emulation, and meets its bounds.

`pytest -m gpu tests/kernels/test_linear24_compiled.py` runs it on a GPU.
"""

import os

import pytest
import torch
from torch.nn import functional as F

from trisparse.bench.bounds.linear24 import SHAPES, bound, product
from trisparse.kernels.aot import resources, table
from trisparse.kernels.launch import Emulator, ptxsim, using
from trisparse.kernels.launch import device as cuda
from trisparse.kernels.linear24 import config, dense24, linear24, linear24_ref, pack24
from trisparse.kernels.nm import select_nm

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels", allow_module_level=True)


def emulated():
    try:
        ptxsim()
    except ImportError:
        return False
    return True


ptx = [pytest.mark.ptx, pytest.mark.skipif(not emulated(), reason="needs ptxsim")]


def ptx_test(test):
    for mark in ptx:
        test = mark(test)
    return test


def fits(operation, ccs):
    rows = resources(operation, ccs)
    assert {row.cc for row in rows} == set(ccs)
    for row in rows:
        assert not row.problems(), row
        assert row.load_bytes == 16, table(rows)


@pytest.mark.parametrize("tokens", [1, 8, 16, 512, 2048])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_gate(shape, tokens):
    for rank in (0, 16):
        fits(product(*shape, tokens, rank, "meta"), (80, 90))


@pytest.mark.parametrize("rank", [7, 32, 64, 128])
def test_gate_at_other_ranks(rank):
    for tokens in (1, 16, 64, 2048):
        fits(product(4096, 4096, tokens, rank, "meta"), (80, 90))


@pytest.mark.parametrize("cc", [89, 100])
def test_other_architectures_compile(cc):
    for tokens, rank in ((1, 0), (16, 16), (64, 128), (2048, 16)):
        fits(product(4096, 4096, tokens, rank, "meta"), (cc,))


def test_older_architectures_are_named():
    with pytest.raises(ValueError, match=r"compute capability 7\.5"):
        resources(product(64, 128, 3, device="meta"), (75,))


def normal(*shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


CASES = [
    # rows, columns, tokens, rank, dtype
    (128, 256, 128, 0, torch.bfloat16),
    (128, 256, 128, 16, torch.float16),
    (128, 256, 1, 0, torch.float16),
    (128, 256, 13, 7, torch.bfloat16),
    (48, 320, 5, 1, torch.bfloat16),  # a tail of columns for the four warps along k, and one of rows
    (272, 192, 130, 40, torch.bfloat16),  # tails of rows and tokens, a rank that is padded
    (48, 64, 70, 65, torch.float16),
    (64, 4096, 16, 16, torch.bfloat16),  # k split over four CTAs
    (256, 4096, 65, 0, torch.bfloat16),
]


def check(rows, cols, tokens, rank, dtype, device="cpu"):
    """The product is in error by at most twice what torch's own operations are in the same dtype."""
    weight = normal(rows, cols, dtype=dtype).to(device)
    packed = pack24(*select_nm(weight, 2, 4, out="compressed"))
    x, bias = normal(tokens, cols, dtype=dtype).to(device), normal(rows, dtype=dtype).to(device)
    lora = None
    if rank:
        a, b = normal(rank, cols, dtype=dtype) / cols**0.5, normal(rows, rank, dtype=dtype)
        lora = (a.to(device), b.to(device), 2.0)
    with using(Emulator(options={"race_check": True, "check_uninit": True}) if device == "cpu" else cuda) as runner:
        y = linear24(x, *packed, bias, lora)
    dense = dense24(*packed)
    exact = x.double() @ dense.double().T + bias.double()
    plain = F.linear(x, dense, bias)
    if lora is not None:
        exact += 2 * x.double() @ lora[0].double().T @ lora[1].double().T
        plain = plain + 2 * F.linear(F.linear(x, lora[0]), lora[1])
    assert y.dtype == dtype
    assert y.device == x.device
    assert (y.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()
    reference = linear24_ref(x, *packed, bias, lora)
    assert (reference.double() - exact).abs().max() <= (plain.double() - exact).abs().max()
    return runner


@ptx_test
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_with_checks(case):
    splits = config(*case[:4], 80).splits
    launches = [name for name, _ in check(*case).profiles]
    assert launches == ["linear24_kernel", "add_splits_kernel"][: 1 + (splits > 1)]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU from sm_80 on"
)
@pytest.mark.parametrize(
    "case", [*CASES, *((*shape, tokens, 16, torch.bfloat16) for shape in SHAPES for tokens in (1, 16, 513))], ids=str
)
def test_on_a_gpu(case):
    check(*case, device="cuda")


@ptx_test
@pytest.mark.parametrize("tokens", [3, 70])
def test_special_values_stay_in_their_row_and_token(tokens):
    rows, cols = 32, 320
    weight = normal(rows, cols, dtype=torch.bfloat16)
    x = normal(tokens, cols + 1, dtype=torch.bfloat16)[:, 1:]  # not from a 16-byte boundary
    x[1, 7] = torch.inf
    x[2, 319] = torch.nan
    packed = pack24(*select_nm(weight, 2, 4, out="compressed"))
    with using(Emulator()):
        y = linear24(x, *packed)
    kept = dense24(*packed) != 0
    assert torch.equal(y[1].isinf(), kept[:, 7])
    assert y[2].isnan()[kept[:, 319]].all()
    assert y[[token for token in range(tokens) if token not in (1, 2)]].isfinite().all()


@ptx_test
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_decode_bounds_counted_from_ptx(shape, tokens):
    plain, lora = bound(*shape, tokens), bound(*shape, tokens, rank=16)
    assert plain["dram_over_compressed"] <= 1.10
    assert lora["dram_bytes"] <= 1.05 * plain["dram_bytes"]
    for figures in (plain, lora):
        assert figures["bound_over_dense"] <= 0.62
        assert figures["bank_conflicts"] == figures["local_bytes"] == figures["spill_bytes"] == 0


@ptx_test
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_prefill_bounds_counted_from_ptx(shape):
    plain, lora = bound(*shape, 2048, sampled=1), bound(*shape, 2048, rank=16, sampled=1)
    assert plain["bound_over_dense"] <= 0.70
    assert lora["bound_us"] <= 1.15 * plain["bound_us"]
    for figures in (plain, lora):
        assert figures["binding"] == "tensor"
        assert figures["bank_conflicts"] == figures["local_bytes"] == figures["spill_bytes"] == 0
