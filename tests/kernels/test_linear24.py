"""The 2:4 product on sparse tensor cores: the packed form, the CPU route, the tiles, and the messages of bad input."""

import pytest
import torch
from torch.nn import functional as F
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from trisparse.kernels.linear24 import Config, config, dense24, linear24, linear24_ref, pack24, unpack24
from trisparse.kernels.nm import select_nm

DTYPES = [torch.bfloat16, torch.float16]


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def pruned(rows, cols, dtype=torch.bfloat16):
    """A 2:4 weight, and its packed form."""
    weight = normal(rows, cols, dtype=dtype)
    values, meta = select_nm(weight, 2, 4, out="compressed")
    return weight * select_nm(weight, 2, 4), pack24(values, meta)


def error(y, exact):
    return (y.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_form_bit_by_bit(dtype):
    rows, cols = 48, 192
    weight, (values, meta) = pruned(rows, cols, dtype)
    for row, col in [(0, 0), (9, 70), (47, 191), (24, 100), (35, 45), (16, 128)]:
        group = weight[row, col // 4 * 4 : col // 4 * 4 + 4]
        kept = [place for place in range(4) if group[place] != 0]
        # the metadata: lane 4 g + t of tile (i, u) has 16 columns of rows g (low half) and g + 8 (high half)
        i, g, half, u, t, q = row // 16, row % 8, row % 16 // 8, col // 64, col % 64 // 16, col % 16 // 4
        word = int(meta.view(torch.int32)[i, u, 4 * g + t, 0]) >> 16 * half >> 4 * q
        assert [word & 3, word >> 2 & 3] == kept
        # the values: register r of lane 4 g + t has row g + 8 (r % 2) and compressed columns 2 t + 8 (r // 2), next
        for order, place in enumerate(kept):
            compressed = col // 4 * 2 + order
            t, r = compressed % 8 // 2, compressed % 16 // 8 * 2 + half
            assert values[i, compressed // 16, 4 * g + t, 2 * r + compressed % 2] == group[place]


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_torchs_semi_structured(dtype):
    weight, packed = pruned(96, 256, dtype)
    theirs = sparse_semi_structured_from_dense_cutlass(weight)
    values, meta = unpack24(*packed)
    assert torch.equal(values, theirs[0])
    assert torch.equal(dense24(*packed), sparse_semi_structured_to_dense_cutlass(*theirs))
    assert torch.equal(dense24(*packed), weight)
    assert all(map(torch.equal, pack24(values, meta), packed))
    assert packed[0].numel() * 2 + packed[1].numel() * 2 == 96 * 256 * 9 // 8  # no byte more than compressed


def test_kept_zeros_and_special_values_survive():
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40, 2.0]).repeat(16 * 32)[: 16 * 32]
    values = values.bfloat16().reshape(16, 32)
    meta = select_nm(normal(16, 64), 2, 4, out="compressed")[1]
    unpacked = unpack24(*pack24(values, meta))
    assert torch.equal(unpacked[0].view(torch.int16), values.view(torch.int16))
    assert torch.equal(unpacked[1], meta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 16])
@pytest.mark.parametrize("shape", [(5,), (0, 3), (2, 3), ()])
def test_cpu_route(dtype, rank, shape, monkeypatch):
    monkeypatch.setattr("trisparse.kernels.linear24.CHUNK", 16 * 192)  # several chunks
    weight, packed = pruned(48, 192, dtype)
    x, bias = normal(*shape, 192, dtype=dtype), normal(48, dtype=dtype)
    lora = (normal(rank, 192, dtype=dtype), normal(48, rank, dtype=dtype), 0.5) if rank else None
    y = linear24(x, *packed, bias, lora)
    plain = F.linear(x, weight, bias)
    exact = x.double() @ weight.double().T + bias.double()
    if lora is not None:
        plain = plain + 0.5 * F.linear(F.linear(x, lora[0]), lora[1])
        exact = exact + 0.5 * x.double() @ lora[0].double().T @ lora[1].double().T
    assert y.shape == (*shape, 48)
    assert y.dtype == dtype
    if y.numel():
        assert error(y, exact) <= 2 * error(plain, exact)
        assert error(linear24_ref(x, *packed, bias, lora), exact) <= error(plain, exact)


def test_registered():
    _, packed = pruned(32, 128)
    x, bias = normal(3, 128), normal(32)
    lora = normal(4, 128), normal(32, 4)
    for operands in ((x, *packed, None, None, None, 1.0), (x, *packed, bias, *lora, 0.5)):
        torch.library.opcheck(torch.ops.trisparse.linear24.default, operands)
    compiled = torch.compile(linear24, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *packed, bias, (*lora, 0.5)), linear24(x, *packed, bias, (*lora, 0.5)))


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(shape, compiled):
    weight, packed = pruned(48, 192)
    dy = normal(*shape, 48) if shape else normal(48)
    inputs = [normal(*shape, 192), normal(48), normal(4, 192), normal(48, 4)]

    def gradients(product, dtype):
        x, bias, a, b = (tensor.to(dtype).requires_grad_() for tensor in inputs)
        return torch.autograd.grad(product(x, bias, a, b), (x, bias, a, b), dy.to(dtype))

    def plain(x, bias, a, b):
        return F.linear(x, weight.to(x.dtype), bias) + 0.5 * F.linear(F.linear(x, a), b)

    def sparse(x, bias, a, b):
        return linear24(x, *packed, bias, (a, b, 0.5))

    run = torch.compile(sparse, fullgraph=True, backend="aot_eager") if compiled else sparse
    exact = gradients(plain, torch.float64)
    for given, usual, true in zip(gradients(run, torch.bfloat16), gradients(plain, torch.bfloat16), exact, strict=True):
        assert given.shape == true.shape
        assert error(given, true) <= 2 * error(usual, true)


def test_gradients_of_some_inputs():
    _, packed = pruned(32, 128)
    a, b = normal(4, 128), normal(32, 4)
    for place in range(2):
        factors = [a.clone(), b.clone()]
        factors[place].requires_grad_()
        linear24(normal(3, 128), *packed, lora=(*factors, 1.0)).sum().backward()
        assert factors[place].grad.shape == factors[place].shape
    x = normal(3, 128).requires_grad_()
    linear24(x, *packed).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 32).bfloat16() @ dense24(*packed))


def test_tiles():
    # one token at 4096 x 4096: 256 CTAs of 16 rows fill 108 SMs without a second kernel
    assert config(4096, 4096, 1, 0, 80) == Config(16, 8, 4, 1, 1, 1, 3)
    # few rows: k is split, up to two CTAs an SM; never into less than four stages
    assert config(1024, 4096, 1, 0, 80).splits == 3
    assert config(1024, 256, 1, 0, 80).splits == 1
    # partial sums stay below a quarter of the weight's bytes
    for tokens in range(1, 65):
        c = config(512, 4096, tokens, 0, 80)
        assert c.splits == 1 or 8 * c.splits * tokens * 512 <= 1.125 * 512 * 4096 / 4 * 1.02
    # the busiest SM decides: 512 CTAs take 5 rounds of 108, 256 larger ones take 3
    assert config(4096, 4096, 2048, 0, 80).tokens == 64
    assert config(11008, 4096, 2048, 0, 80).tokens == 128
    # x A^T takes rank * tokens / 32 registers a thread
    for rank in (1, 16, 17, 64, 65, 128):
        for tokens in (1, 16, 64, 65, 5000):
            c = config(4096, 4096, tokens, rank, 80)
            assert rank * c.tokens / (32 * c.row_warps * c.token_warps) <= 32


def test_bad_input_is_named():
    weight = normal(32, 128)
    values, meta = select_nm(weight, 2, 4, out="compressed")
    packed = pack24(values, meta)
    x, a, b = normal(3, 128), normal(4, 128), normal(32, 4)
    other = torch.empty(3, 128, dtype=torch.bfloat16, device="meta")
    cases = [
        (lambda: pack24(values.float(), meta), r"values is torch.float32"),
        (lambda: pack24(values[:24], meta[:24]), r"values is \[24, 64\].*multiple of 16"),
        (lambda: pack24(values[:0], meta[:0]), r"values is \[0, 64\]"),
        (lambda: pack24(values[:, :48], meta), r"values is \[32, 48\]"),
        (lambda: pack24(values, meta[:, :4]), r"meta is torch.int16 \[32, 4\]; it must be int16 \[32, 8\]"),
        (lambda: pack24(values, meta.int()), r"meta is torch.int32"),
        (lambda: pack24(values, meta.to("meta")), r"meta is on meta"),
        (lambda: pack24(values, torch.zeros_like(meta)), r"meta has a group"),
        (lambda: unpack24(values, meta), r"values is torch.bfloat16 \[32, 64\]"),
        (lambda: unpack24(packed[0], meta), r"meta is torch.int16 \[32, 8\]"),
        (lambda: linear24(x[:, :64], *packed), r"x is \[3, 64\].*128"),
        (lambda: linear24(x.half(), *packed), r"x is torch.float16, values torch.bfloat16"),
        (lambda: linear24(other, *packed), r"x is on meta, values on cpu"),
        (lambda: linear24(x, *packed, b), r"bias is \[32, 4\]; it must be \[32\]"),
        (lambda: linear24(x, *packed, None, (a[:0], b[:, :0], 1.0)), r"lora has rank 0"),
        (lambda: linear24(x, *packed, None, (normal(129, 128), normal(32, 129), 1.0)), r"lora has rank 129"),
        (lambda: linear24(x, *packed, None, (a, b.T, 1.0)), r"lora's B is \[4, 32\]; it must be \[32, 4\]"),
        (lambda: linear24(x, *packed, None, (a.float(), b, 1.0)), r"lora's A is torch.float32"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
