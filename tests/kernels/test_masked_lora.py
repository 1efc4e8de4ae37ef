"""The CPU route of mask_lora and scale_lora against hand-computed values, the plain formula and torch's checks."""

import os

import pytest
import torch

from trisparse.kernels import masked_lora as module
from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.masked_lora import effective_weight, mask_lora, mask_lora_ref, scale_lora, scale_lora_ref

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles graphs", allow_module_level=True)
VARIANTS = ["mask", "scale"]
LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])


def problem(out=12, inputs=9, rank=3, tokens=5, dtype=torch.float64, transposed=False, seed=0):
    """x, weight, packed, a, b, bias; the weight is zero where pruned."""
    g = torch.Generator().manual_seed(seed)
    shape = (inputs, out) if transposed else (out, inputs)
    keep = torch.rand(*shape, generator=g) > 0.5
    weight = torch.randn(*shape, generator=g, dtype=dtype) * keep
    a, b = torch.randn(rank, inputs, generator=g, dtype=dtype), torch.randn(out, rank, generator=g, dtype=dtype)
    x = torch.randn(2, tokens, inputs, generator=g, dtype=dtype)
    return x, weight, pack_bits(keep), a, b, torch.randn(out, generator=g, dtype=dtype)


def run(variant, x, weight, packed, a, b, bias, transposed=False, reference=False):
    if variant == "mask":
        function = mask_lora_ref if reference else mask_lora
        return function(x, weight, packed, a, b, bias, scale=0.5, transposed=transposed)
    return (scale_lora_ref if reference else scale_lora)(x, weight, a, b, bias, transposed=transposed)


def outputs_and_grads(variant, x, weight, packed, a, b, bias, **kwargs):
    leaves = [t.clone().requires_grad_() for t in (x, a, b, bias)]
    y = run(variant, leaves[0], weight, packed, *leaves[1:], **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def test_hand_computed_forward_and_gradient():
    # 2 outputs, 4 inputs, rank 1, 2:4 kept positions
    weight = torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 4]])
    packed = pack_bits(weight != 0)
    b = torch.tensor([[1.0], [2.0]], requires_grad=True)
    a = torch.tensor([[1.0, 10, 100, 1000]], requires_grad=True)
    x = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 2]], requires_grad=True)
    y = mask_lora(x, weight, packed, a, b)
    # effective weight [[1+1, 0, 2+100, 0], [0, 3+20, 0, 4+2000]]
    assert y.tolist() == [[104.0, 2027.0], [2.0, 4008.0]]
    y.backward(torch.tensor([[1.0, 0], [0, 1]]))
    assert x.grad.tolist() == [[2.0, 0, 102, 0], [0, 23, 0, 2004]]
    # dyᵀx = [[1, 1, 1, 1], [1, 0, 0, 2]], masked [[1, 0, 1, 0], [0, 0, 0, 2]]
    assert b.grad.tolist() == [[101.0], [2000.0]]
    assert a.grad.tolist() == [[1.0, 0, 1, 4]]
    # scaled: effective weight [[1, 0, 200, 0], [0, 60, 0, 8000]]; W ⊙ dyᵀx = [[1, 0, 2, 0], [0, 0, 0, 8]]
    x.grad, a.grad, b.grad = None, None, None
    y = scale_lora(x, weight, a, b)
    assert y.tolist() == [[201.0, 8060.0], [1.0, 16000.0]]
    y.backward(torch.tensor([[1.0, 0], [0, 1]]))
    assert x.grad.tolist() == [[1.0, 0, 200, 0], [0, 60, 0, 8000]]
    assert b.grad.tolist() == [[201.0], [8000.0]]
    assert a.grad.tolist() == [[1.0, 0, 2, 16]]


@LAYOUTS
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, transposed):
    x, weight, packed, a, b, bias = problem(transposed=transposed)
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: run(variant, x, weight, packed, a, b, bias, transposed=transposed), leaves
    )


@LAYOUTS
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("elements", [1, 72, 95, 96, 107, 108, 1000])  # of 108: 8 rows at a time, a ragged rest, all
def test_equals_the_formula_at_every_tile_boundary(monkeypatch, elements, variant, transposed):
    monkeypatch.setitem(module._TILE_BYTES, "cpu", 8 * elements)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 27)  # 2 or 3 rows, also where they do not divide a tile
    case = problem(transposed=transposed)
    got = outputs_and_grads(variant, *case, transposed=transposed)
    want = outputs_and_grads(variant, *case, transposed=transposed, reference=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@LAYOUTS
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_error_at_most_twice_that_of_torch(variant, autocast, transposed):
    case64 = problem(96, 63, 4, 40, transposed=transposed)
    exact = outputs_and_grads(variant, *case64, transposed=transposed, reference=True)
    case = [t.float() if t.is_floating_point() else t for t in case64]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = outputs_and_grads(variant, *case, transposed=transposed)
        torchs = outputs_and_grads(variant, *case, transposed=transposed, reference=True)
    assert got[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert all(grad.dtype == torch.float32 for grad in got[1:])
    for name, mine, other, want in zip(("y", "x", "a", "b", "bias"), got, torchs, exact, strict=True):
        assert (mine.double() - want).norm() <= 2 * (other.double() - want).norm(), name


def test_a_bf16_update_below_half_a_unit_is_not_lost():
    # bf16 has 1 + 2^-7 after 1. W rounds to 1, and so would 1 + update; their exact sum is nearer to 1 + 2^-7.
    weight, update = torch.tensor([[1 + 2**-8 - 2**-10]]), torch.tensor([[2**-9]])
    with torch.autocast("cpu", torch.bfloat16):
        y = mask_lora(torch.ones(1, 1), weight, torch.ones(1, 1, dtype=torch.uint8), torch.ones(1, 1), update)
    assert float(y) == float((weight + update).bfloat16()) != float(weight.bfloat16() + update.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_factors_leave_pruned_weights_zero(dtype):
    _, weight, packed, a, b, _ = problem(dtype=dtype)
    b[0, 0] = float("nan")
    merged = effective_weight(weight, packed, b, a)
    keep = module.unpack_bits(packed, weight.shape[1])
    assert (merged[~keep] == 0).all()
    assert merged[0][keep[0]].isnan().all()


def test_saves_neither_the_update_nor_the_effective_weight():
    x, weight, packed, a, b, _ = problem(64, 64, 2, 4)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t):
        mask_lora(x.requires_grad_(), weight, packed, a.requires_grad_(), b.requires_grad_())
    large = [t for t in sizes if t.numel() == weight.numel()]
    assert {t.data_ptr() for t in large} == {weight.data_ptr()}


def test_gradients_of_an_expanded_output_and_of_no_tokens():
    for tokens in (5, 0):
        x, weight, packed, a, b, bias = problem(tokens=tokens)
        leaves = [t.requires_grad_() for t in (x, a, b, bias)]
        got = torch.autograd.grad(run("mask", x, weight, packed, a, b, bias).sum(), leaves)
        want = torch.autograd.grad(run("mask", x, weight, packed, a, b, bias, reference=True).sum(), leaves)
        torch.testing.assert_close(got, want)


@LAYOUTS
def test_opcheck(transposed):
    x, weight, packed, a, b, bias = problem(dtype=torch.float32, transposed=transposed)
    left, right = (a.t(), b.t()) if transposed else (b, a)
    x = x.reshape(-1, x.shape[-1])
    for mask in (packed, None):
        leaves = [t.clone().requires_grad_() for t in (x, left, right, bias)]
        arguments = (leaves[0], weight, mask, *leaves[1:], transposed)
        torch.library.opcheck(module.PRODUCT.registered, arguments)
        u, v = (x, x[:, :1].expand(-1, right.shape[1])) if transposed else (x[:, :1].expand(-1, left.shape[0]), x)
        scaled = weight if mask is None else None
        torch.library.opcheck(
            module.FACTOR_GRADIENTS.registered, (u.contiguous(), v.contiguous(), scaled, mask, left, right)
        )


@LAYOUTS
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_one_graph(variant, autocast, transposed):
    torch._dynamo.reset()

    def gradients(function):
        x, weight, packed, a, b, bias = problem(dtype=torch.float32, transposed=transposed)
        leaves = [t.requires_grad_() for t in (x, a, b, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(variant, x, weight, packed, a, b, bias, transposed=transposed)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(run))


def test_wrong_input_is_named():
    x, weight, packed, a, b, bias = problem()
    for change, message in (
        ({"x": x[..., :3]}, "x has shape"),
        ({"x": x.to(torch.int32)}, "x has dtype"),
        ({"weight": weight[0]}, "weight has shape"),
        ({"weight": weight.clone().requires_grad_()}, "weight asks for a gradient"),
        ({"packed": packed[:, :1]}, "packed is"),
        ({"packed": packed.bool()}, "packed is"),
        ({"a": a[:0], "b": b[:, :0]}, "rank of at least 1"),
        ({"a": a[:, 1:]}, "a has shape"),
        ({"b": b[:, 1:]}, "b has shape"),
        ({"bias": bias[1:]}, "bias has shape"),
        ({"a": a.to("meta")}, "a is on meta"),
    ):
        arguments = {"x": x, "weight": weight, "packed": packed, "a": a, "b": b, "bias": bias, **change}
        with pytest.raises(ValueError, match=message):
            mask_lora(**arguments)
        arguments.pop("packed")
        if "packed" not in change:
            with pytest.raises(ValueError, match=message):
                scale_lora(**arguments)
