"""The compiled kernels of mask_lora and scale_lora under emulation, their resources and their counted bounds."""

import os

import pytest
import torch

pytest.importorskip("triton")
from trisparse.bench.bounds.masked_lora import bound
from trisparse.kernels import masked_lora as module
from trisparse.kernels import masked_lora_triton
from trisparse.kernels.aot import resources
from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.launch import Emulator, ptxsim, using

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels", allow_module_level=True)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


# Shapes that are multiples of 16 compile to the same kernels; bench/bounds/masked_lora.py has the others.
@pytest.mark.parametrize(("tokens", "rank", "dtype"), [(16, 128, torch.float32), (512, 16, torch.bfloat16)])
def test_no_kernel_spills(tokens, rank, dtype):
    x, dy, weight = meta(tokens, 4096), meta(tokens, 4096), meta(4096, 4096)
    packed = meta(4096, 512, dtype=torch.uint8)
    a, b = meta(rank, 4096, dtype=dtype), meta(4096, rank, dtype=dtype)  # fp32 under autocast
    for mask, scaled in ((packed, None), (None, weight)):

        def both(mask=mask, scaled=scaled):
            module.PRODUCT(x, weight, mask, b, a, None, False)
            module.PRODUCT(dy, weight, mask, b, a, None, True)
            module.FACTOR_GRADIENTS(dy, x, scaled, mask, b, a)

        assert [problem for row in resources(both) for problem in row.problems()] == []


@pytest.mark.ptx
class TestEmulated:
    @pytest.fixture(autouse=True)
    def needs_ptxsim(self):
        try:
            ptxsim()
        except ImportError:
            pytest.skip("needs ptxsim")

    def check(self, variant, options, sizes=(40, 136, 144, 16)):
        g = torch.Generator().manual_seed(0)
        tokens, out, inputs, rank = sizes
        x, dy = torch.randn(tokens, inputs, generator=g).bfloat16(), torch.randn(tokens, out, generator=g).bfloat16()
        keep = torch.rand(out, inputs, generator=g) > 0.5
        weight = (torch.randn(out, inputs, generator=g) * keep).bfloat16()
        a, b = torch.randn(rank, inputs, generator=g).bfloat16() / 4, torch.randn(out, rank, generator=g).bfloat16()
        packed = pack_bits(keep) if variant == "mask" else None
        with using(Emulator(options=options)):
            y = module.PRODUCT(x, weight, packed, b, a, None, False)
            dx = module.PRODUCT(dy, weight, packed, b, a, None, True)
            db, da = module.FACTOR_GRADIENTS(dy, x, None if variant == "mask" else weight, packed, b, a)
        x, dy, weight, a, b = (tensor.double() for tensor in (x, dy, weight, a, b))
        effective = weight + keep * (b @ a) if variant == "mask" else weight * (b @ a)
        gradient = (dy.t() @ x) * (keep if variant == "mask" else weight)
        wanted = (x @ effective.t(), dy @ effective, gradient @ a.t(), b.t() @ gradient)
        for mine, want in zip((y, dx, db, da), wanted, strict=True):
            assert (mine.double() - want).norm() <= 2**-7 * want.norm()

    @pytest.mark.parametrize("variant", ["mask", "scale"])
    def test_right_and_free_of_races(self, variant, monkeypatch):
        # Programs of a chain write to one place in turn, which the check of races does not know.
        monkeypatch.setattr(masked_lora_triton, "schedule", lambda *_: (1, 1))
        self.check(variant, {"race_check": True, "check_uninit": True})

    def test_chain_in_any_order_of_execution(self, monkeypatch):
        monkeypatch.setattr(masked_lora_triton, "schedule", lambda *_: (2, 3))
        self.check("mask", {"schedule": "random", "seed": 1, "batch": 6}, (16, 264, 136, 16))

    def test_bytes_of_the_backward(self):
        figures = bound("scale", 512, 4096, 4096)
        assert figures["dA, dB"]["over_compulsory"] <= 1.15
        assert figures["dx"]["over_compulsory"] <= 1.15
        assert all(figures[name]["spill_bytes"] == 0 for name in ("forward", "dx", "dA, dB"))
