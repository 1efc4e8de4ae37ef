"""The kernels of the compressed linear layer against the reference: interpreted, or on a device.

TRITON_INTERPRET=1 pytest tests/kernels/test_linear_triton.py        (test_interpreter.py runs this)
pytest -m gpu tests/kernels/test_linear_triton.py
"""

import os

import pytest
import torch

from trisparse.kernels import linear as module
from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.compressed import compress
from trisparse.kernels.launch import device, interpret, using
from trisparse.kernels.linear import linear, linear_backward, linear_ref
from trisparse.kernels.linear_config import Config
from trisparse.kernels.nm import select_nm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
WHERE = "cpu" if INTERPRETED else "cuda"
# (format, n, m, columns): no columns are a multiple of the tile, and some rows are not whole words of the mask.
WEIGHTS = [
    ("2:4", 2, 4, 144),
    ("n:m", 4, 8, 160),
    ("n:m", 3, 7, 203),
    ("n:m", 1, 32, 160),
    ("bitmask", 0, 0, 160),
    ("bitmask", 0, 0, 173),
    ("masked", 0, 0, 173),
]
ROWS = 37
# The interpreter's product takes bf16 for integers; test_linear_ptx.py has bf16.
DTYPES = [torch.float16, torch.float32, *([] if INTERPRETED else [torch.bfloat16])]


@pytest.fixture(autouse=True)
def runner():
    with using(interpret if INTERPRETED else device):
        yield


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(WHERE)


def compressed(format, n, m, cols, dtype, rows=ROWS):
    weight = normal(rows, cols, dtype=dtype)
    with using(device):
        mask = select_nm(weight, n, m) if n else normal(rows, cols, seed=1) > 0.2
        return compress(weight, pack_bits(mask), format, n, m)


def check(weight, tokens, rank, bias, dtype, strided=False):
    """Result and gradients differ from those in fp64 by at most twice as much as torch's own in this dtype."""
    rows, cols = weight.shape
    x = (
        normal(tokens, 2 * cols, seed=2, dtype=dtype)[:, :cols]
        if strided
        else normal(tokens, cols, seed=2, dtype=dtype)
    )
    inputs = [x, normal(rows, seed=3, dtype=dtype) if bias else None]
    if rank:
        inputs += [normal(rank, cols, seed=4, dtype=dtype) / 8, normal(rows, rank, seed=5, dtype=dtype) / 8]
    dy = normal(tokens, rows, seed=6, dtype=dtype)
    results = []
    with using(device):
        dense = weight.decompress()
        exact_weight = compress(dense.double(), pack_bits(torch.ones_like(dense, dtype=torch.bool)), "masked")
    for operation, w, convert in ((linear, weight, None), (linear_ref, weight, None), (linear_ref, exact_weight, 1)):
        given = [t if t is None else (t.double() if convert else t).detach().requires_grad_() for t in inputs]
        lora = (given[2], given[3], 0.5) if rank else None
        if operation is linear_ref:
            with using(device):
                y = linear_ref(given[0], w, given[1], lora)
        else:
            y = linear(given[0], w, given[1], lora)
        wanted = [t for t in given if t is not None]
        results.append([y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))])
    for ours, torchs, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        allowed = 2 * (torchs.double() - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed


# Few and many tokens take different ways; interpreting one tile takes up to a second.
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_formats_with_few_tokens(weight):
    check(compressed(*weight, torch.float16), 3, rank=7, bias=True, dtype=torch.float16)


@pytest.mark.parametrize("weight", [WEIGHTS[0], WEIGHTS[2], WEIGHTS[5], WEIGHTS[6]], ids=str)
def test_formats_with_many_tokens(weight):
    check(compressed(*weight, torch.float16), 35, rank=7, bias=False, dtype=torch.float16)


@pytest.mark.parametrize("weight", [WEIGHTS[0], WEIGHTS[5]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(weight, dtype):
    check(compressed(*weight, dtype), 3, rank=0, bias=True, dtype=dtype)


@pytest.mark.parametrize(("rank", "tokens"), [(0, 1), (1, 1), (16, 1), (64, 1), (128, 1), (0, 65), (16, 65), (128, 65)])
def test_ranks(rank, tokens):
    check(compressed("2:4", 2, 4, 144, torch.float16), tokens, rank, bias=True, dtype=torch.float16)


@pytest.mark.parametrize("tokens", [17, 129])
def test_token_counts_and_strided_rows(tokens):
    check(compressed(*WEIGHTS[5], torch.float16), tokens, 5, bias=False, dtype=torch.float16, strided=True)


@pytest.mark.parametrize(("weight", "splits"), [(WEIGHTS[0], 3), (WEIGHTS[2], 2), (WEIGHTS[5], 3)], ids=str)
def test_parts_of_the_contraction(weight, splits, monkeypatch):
    monkeypatch.setattr(module, "config", lambda *_, **__: Config(16, 32, 32, splits, 4, 2, True, "forced"))
    check(compressed(*weight, torch.float16, rows=70), 5, 33, bias=True, dtype=torch.float16)


@pytest.mark.parametrize("tokens", [2, 33])
@pytest.mark.parametrize("weight", [WEIGHTS[0], WEIGHTS[6]], ids=str)
def test_an_infinite_weight_in_the_last_row_stays_infinite(weight, tokens):
    w = compressed(*weight, torch.float16)
    w.values[..., -1] = torch.inf  # the last kept weight of a row, or of all
    dy = torch.ones(tokens, ROWS, dtype=torch.float16, device=WHERE)
    with using(device):
        expected = dy.float() @ w.decompress().float()
    assert torch.equal(torch.isinf(linear_backward(dy, w)[0]), torch.isinf(expected))
    assert not torch.isnan(linear_backward(dy, w)[0]).any()


def test_same_bits_again():
    weight = compressed(*WEIGHTS[4], torch.float16)
    x, a, b = normal(9, 160, dtype=torch.float16), normal(8, 160, dtype=torch.float16), normal(37, 8)
    lora = (a, b.half(), 0.5)
    assert torch.equal(linear(x, weight, None, lora), linear(x, weight, None, lora))


def test_no_kernel_for_fp64():
    weight = compressed(*WEIGHTS[0], torch.float64)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64; the kernel takes"):
        linear(normal(2, 144, dtype=torch.float64), weight)
