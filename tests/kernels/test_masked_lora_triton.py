"""The kernels of mask_lora and scale_lora, interpreted or on a device; run as test_triton.py."""

import os

import pytest
import torch

from trisparse.kernels import masked_lora as module
from trisparse.kernels.bitmask import pack_bits, unpack_bits_ref
from trisparse.kernels.launch import device, interpret, using

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
WHERE = "cpu" if INTERPRETED else "cuda"
# (tokens, out, in, rank): odd counts, a K that no block divides, several tiles each way, ranks padded and not
SHAPES = [(5, 12, 9, 1), (33, 70, 131, 7), (17, 130, 40, 16), (70, 40, 136, 64)]


def problem(tokens, out, inputs, rank, dtype, transposed):
    """fp64 tensors whose values ``dtype`` holds: x, dy, weight, keep, a, b, bias."""
    g = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype).to(torch.float64).to(WHERE)

    shape = (inputs, out) if transposed else (out, inputs)
    keep = (torch.rand(*shape, generator=g) > 0.5).to(WHERE)
    return (
        normal(tokens, inputs),
        normal(tokens, out),
        normal(*shape) * keep,
        keep,
        normal(rank, inputs) / rank**0.5,
        normal(out, rank),
        normal(out),
    )


def formula(x, dy, weight, keep, left, right, bias, transposed):
    """y, dx, dleft, dright as torch computes them in the dtype of the arguments; keep is None for scale_lora."""
    effective = weight * (left @ right) if keep is None else weight + keep * (left @ right)
    effective = effective.t() if transposed else effective
    y = x @ effective.t() if bias is None else torch.addmm(bias, x, effective.t())
    gradient = (x.t() @ dy if transposed else dy.t() @ x) * (weight if keep is None else keep)
    return y, dy @ effective, gradient @ right.t(), left.t() @ gradient


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", ["mask", "scale"])
def test_kernels(variant, shape, transposed, dtype):
    x, dy, weight, keep, a, b, bias = problem(*shape, dtype, transposed)
    left, right = (a.t(), b.t()) if transposed else (b, a)
    bias = bias if shape[0] % 2 else None
    mask = keep if variant == "mask" else None
    exact = formula(x, dy, weight, mask, left, right, bias, transposed)
    narrow = [None if t is None else t.to(dtype) for t in (x, dy, weight, left, right, bias)]
    x, dy, weight, left, right, bias = narrow
    torchs = formula(x, dy, weight, mask, left, right, bias, transposed)
    packed = None if mask is None else pack_bits(keep)
    u, v = (x, dy) if transposed else (dy, x)
    scaled = weight if packed is None else None
    with using(interpret if INTERPRETED else device):
        y = module.PRODUCT(x, weight, packed, left, right, bias, transposed)
        dx = module.PRODUCT(dy, weight, packed, left, right, None, not transposed)
        dleft, dright = module.FACTOR_GRADIENTS(u, v, scaled, packed, left, right)
        again = module.FACTOR_GRADIENTS(u, v, scaled, packed, left, right)
    assert torch.equal(dleft, again[0])
    assert torch.equal(dright, again[1])
    for name, mine, other, want in zip(
        ("y", "dx", "left", "right"), (y, dx, dleft, dright), torchs, exact, strict=True
    ):
        assert mine.dtype == dtype
        error, bar = (mine.double() - want).norm(), (other.double() - want).norm()
        assert error <= 2 * bar + 1e-7 * want.norm(), name


@pytest.mark.parametrize("chain", [1, 2, 4, 6])  # of 6 rows of tiles
def test_chains(monkeypatch, chain):
    """Chains and programs that do not divide the tiles: partials are added along chains and over them."""
    from trisparse.kernels import masked_lora_triton

    monkeypatch.setattr(masked_lora_triton, "schedule", lambda *_: (2, chain))
    tokens, p, q = 9, 190, 140
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(tokens, p, generator=g).to(WHERE), torch.randn(tokens, q, generator=g).to(WHERE)
    left, right = torch.randn(p, 3, generator=g).to(WHERE), torch.randn(3, q, generator=g).to(WHERE)
    packed = pack_bits(torch.rand(p, q, generator=g).to(WHERE) > 0.5)
    with using(interpret if INTERPRETED else device):
        dleft, dright = module.FACTOR_GRADIENTS(u, v, None, packed, left, right)
    gradient = (u.double().t() @ v.double()) * unpack_bits_ref(packed, q)
    torch.testing.assert_close(dleft.double(), gradient @ right.double().t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dright.double(), left.double().t() @ gradient, rtol=1e-5, atol=1e-4)


def test_fp32_factors_of_a_bf16_product():
    """Autocast: factors and weight in fp32, activations in bf16; a pruned row stays zero over a NaN factor."""
    x, dy, weight, keep, a, b, _ = problem(6, 24, 40, 4, torch.float32, False)
    keep[3] = False
    weight, a, b = (weight * keep).float(), a.float(), b.float()
    packed = pack_bits(keep)
    x, dy = x.bfloat16(), dy.bfloat16()
    with using(interpret if INTERPRETED else device):
        dleft, dright = module.FACTOR_GRADIENTS(dy, x, None, packed, b, a)
        b[3] = float("nan")
        y = module.PRODUCT(x, weight, packed, b, a, None, False)
    assert y.dtype == torch.bfloat16
    assert dleft.dtype == dright.dtype == torch.float32
    assert (y[:, 3] == 0).all()
    assert not y.isnan().any()
    assert (dleft[3] == 0).all()
