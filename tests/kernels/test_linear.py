"""The compressed linear layer on the CPU: against torch's own operations, its gradients, and what it refuses."""

import os

import pytest
import torch
from torch.nn import functional as F

from trisparse.bench.peak_memory import peak_bytes
from trisparse.kernels import linear as module
from trisparse.kernels.bitmask import pack_bits
from trisparse.kernels.compressed import FORMATS, TILE, CompressedWeight, compress, tile_offsets
from trisparse.kernels.linear import linear, linear_backward, linear_ref
from trisparse.kernels.linear_config import config
from trisparse.kernels.nm import meta_2_4, select_nm

PATTERNS = {"2:4": (2, 4), "n:m": (3, 7), "bitmask": (0, 0), "masked": (0, 0)}
ROWS, COLS = 24, 336

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles graphs", allow_module_level=True)


def normal(*shape, seed=0, dtype=torch.float32, grad=False):
    out = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return out.requires_grad_() if grad else out


def compressed(format, dtype=torch.float32, rows=ROWS, cols=COLS):
    """(the dense weight with its zeros, its compressed form)."""
    weight, (n, m) = normal(rows, cols, dtype=dtype), PATTERNS[format]
    mask = select_nm(weight, n, m) if n else normal(rows, cols, seed=1) > 0.3
    return torch.where(mask, weight, 0), compress(weight, pack_bits(mask), format, n, m)


def adapter(rank, dtype=torch.float32, rows=ROWS, cols=COLS, grad=False):
    a = normal(rank, cols, seed=2, dtype=dtype, grad=grad)
    return a, normal(rows, rank, seed=3, dtype=dtype, grad=grad), 0.5


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(format, dtype):
    dense, weight = compressed(format, dtype)
    assert torch.equal(weight.decompress(), dense)
    assert torch.equal(weight.part(5, 11).decompress(), dense[5:11])


def test_bytes_by_hand():
    assert compressed("2:4", torch.bfloat16)[1].bytes == ROWS * COLS * 2 // 2 + ROWS * COLS // 16 * 2
    assert compressed("n:m", torch.bfloat16)[1].bytes == ROWS * COLS * 2 * 3 // 7 + ROWS * COLS // 8
    weight = compressed("bitmask", torch.bfloat16)[1]
    kept = weight.values.numel()
    assert weight.bytes == 2 * kept + ROWS * COLS // 8 + 8 * (ROWS + 1) + 2 * 3 * ROWS
    # A mask of four columns, by hand: 1 0 0 1 | 0 1 1 0 keeps the first and the last, then those between.
    packed = torch.tensor([[0b1001], [0b0110]], dtype=torch.uint8)
    tiny = compress(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), packed, "n:m", 2, 4)
    assert tiny.values.tolist() == [[1, 4], [6, 7]]
    assert tiny.decompress().tolist() == [[1, 0, 0, 4], [0, 6, 7, 0]]


def test_tile_offsets_are_read_unsigned_and_widen():
    wide = torch.full((1, 65536 // 8), 255, dtype=torch.uint8)
    offsets = tile_offsets(wide, 65536)
    assert offsets.dtype == torch.int16
    assert ((offsets.int() & 0xFFFF) == torch.arange(0, 65536, TILE)).all()
    assert tile_offsets(torch.nn.functional.pad(wide, (0, 1)), 65544).dtype == torch.int32


def test_masked_keeps_the_weight_and_shares_it():
    weight = normal(4, 16)
    packed = pack_bits(weight > 0)
    masked = compress(weight, packed, "masked")
    assert masked.values.data_ptr() == weight.data_ptr()
    assert torch.equal(linear(torch.eye(16), masked), weight.clamp(min=0).T)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("shape", [(COLS,), (0, COLS), (5, COLS), (2, 3, COLS)])
def test_equals_torch(format, rank, shape, dtype, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7 * COLS)  # several chunks, the last shorter
    monkeypatch.setattr(module, "_WHOLE", 0)
    dense, weight = compressed(format, dtype)
    x, bias = normal(*shape, seed=4, dtype=dtype), normal(ROWS, seed=5, dtype=dtype)
    lora = adapter(rank, dtype) if rank else None
    y, reference = linear(x, weight, bias, lora), linear_ref(x, weight, bias, lora)
    exact = F.linear(x.double(), dense.double(), bias.double())
    if rank:
        exact += 0.5 * (x.double() @ lora[0].double().T) @ lora[1].double().T
    assert y.dtype == dtype
    assert y.shape == reference.shape == (*shape[:-1], ROWS)
    if y.numel():
        allowed = 2 * (reference.double() - exact).abs().max()
        assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients(format, rank, biased, monkeypatch):
    rows, cols = 5, 112
    monkeypatch.setattr(module, "_CHUNK", 2 * cols)
    monkeypatch.setattr(module, "_WHOLE", 0)
    dense, weight = compressed(format, torch.float64, rows, cols)
    inputs = [normal(1, 2, cols, seed=4, dtype=torch.float64, grad=True)]
    if biased:
        inputs.append(normal(rows, seed=5, dtype=torch.float64, grad=True))
    if rank:
        inputs += adapter(rank, torch.float64, rows, cols, grad=True)[:2]

    def ours(x, *rest):
        return linear(x, weight, rest[0] if biased else None, (*rest[-2:], 0.5) if rank else None)

    def formula(x, *rest):
        y = x @ dense.T
        if biased:
            y = y + rest[0]
        return y + 0.5 * (x @ rest[-2].T) @ rest[-1].T if rank else y

    assert torch.autograd.gradcheck(ours, inputs)
    dy = normal(1, 2, rows, seed=6, dtype=torch.float64)
    torch.testing.assert_close(ours(*inputs), formula(*inputs))
    expected = torch.autograd.grad(formula(*inputs), inputs, dy)
    torch.testing.assert_close(torch.autograd.grad(ours(*inputs), inputs, dy), expected)


def test_gradients_of_the_adapter_alone():
    _, weight = compressed("2:4", torch.float64)
    x, (a, b, scale) = normal(3, COLS, dtype=torch.float64), adapter(2, torch.float64, grad=True)
    for wanted in ((a,), (b,), (a, b)):
        given = torch.autograd.grad(linear(x, weight, None, (a, b, scale)).square().sum(), wanted)
        expected = torch.autograd.grad(linear_ref(x, weight, None, (a, b, scale)).square().sum(), wanted)
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_half_precision_gradients_are_as_exact_as_torch(format, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7 * COLS)
    dense, weight = compressed(format, torch.bfloat16)
    dy = normal(9, ROWS, dtype=torch.bfloat16)
    dx, low = linear_backward(dy, weight)
    exact = dy.double() @ dense.double()
    assert (dx.double() - exact).abs().max() <= 2 * ((dy @ dense).double() - exact).abs().max()
    assert low.shape == (9, 0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_tile(format, precision, monkeypatch):
    tile, (rows, cols) = 1 << 14, (2048, 560)
    monkeypatch.setattr(module, "_CHUNK", tile)
    monkeypatch.setattr(module, "_WHOLE", 0)
    _, weight = compressed(format, precision, rows, cols)
    x, dy = normal(4, cols, dtype=precision), normal(4, rows, dtype=precision)
    # 16 bytes a weight of the tile: itself, where it lies as int64, and in between.
    allowed = 17 * tile + 4 * 4 * (rows + cols) * 4
    assert allowed < rows * cols * precision.itemsize / 3
    assert peak_bytes(lambda: linear(x, weight)) <= allowed
    assert peak_bytes(lambda: linear_backward(dy, weight)) <= allowed


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_layer_gives_the_bits_of_a_dense_one_and_takes_its_bytes(format, precision, monkeypatch):
    rows, cols, chunk = 200, 560, 13 * 560
    dense, weight = compressed(format, precision, rows, cols)
    bias = normal(rows, seed=5, dtype=precision)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    xs = [normal(tokens, cols, seed=tokens, dtype=precision) for tokens in (1, 3, 16, 100)]
    for x in xs:
        assert torch.equal(linear(x, weight, bias), F.linear(x, dense, bias))
        assert torch.equal(linear(x, weight, bias, conv1d=True), torch.addmm(bias, x, dense.t().contiguous()))
    assert peak_bytes(lambda: linear(xs[0], weight)) <= dense.nbytes + 17 * chunk + 4 * 4 * (rows + cols) * 4
    monkeypatch.setattr(module, "_WHOLE", 0)
    if all(torch.equal(linear(x, weight), F.linear(x, dense)) for x in xs):
        pytest.skip("on this CPU a product by parts has the bits of the whole")


@pytest.mark.parametrize(("format", "rank"), [("2:4", 0), ("bitmask", 3)])
def test_registered(format, rank):
    _, weight = compressed(format)
    a, b, _ = adapter(rank, grad=True) if rank else (None, None, 0.0)
    parts = weight.values, weight.meta, weight.row_offsets, weight.tile_offsets, format, COLS, weight.n, weight.m
    x, bias = normal(3, COLS, grad=True), normal(ROWS, grad=True)
    torch.library.opcheck(torch.ops.trisparse.linear.default, (x, *parts, bias, a, b, 0.5, False))
    torch.library.opcheck(torch.ops.trisparse.linear_backward.default, (normal(3, ROWS), *parts, *_detached(a, b), 0.5))


def _detached(*tensors):
    return [t if t is None else t.detach() for t in tensors]


@pytest.mark.parametrize("format", ["2:4", "bitmask"])
def test_compiles_to_one_graph(format):
    _, weight = compressed(format)
    x, bias, (a, b, _) = normal(3, COLS, grad=True), normal(ROWS, grad=True), adapter(3, grad=True)

    def layer(x, bias, a, b):
        return linear(x, weight, bias, (a, b, 0.5)).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, bias, a, b), layer(x, bias, a, b)
    torch.testing.assert_close(y, expected)
    inputs = x, bias, a, b
    given = torch.autograd.grad(y.square().sum(), inputs)
    torch.testing.assert_close(given, torch.autograd.grad(expected.square().sum(), inputs))


def test_wrong_inputs():
    _, weight = compressed("2:4")
    x, (a, b, scale) = normal(3, COLS), adapter(3)
    cases = {
        "x has shape": (normal(3, COLS - 1), weight),
        "x has dtype": (x.double(), weight),
        "x is on meta": (x.to("meta"), weight),
        "bias has shape": (x, weight, normal(ROWS + 1)),
        "bias has dtype": (x, weight, normal(ROWS).double()),
        "A has shape": (x, weight, None, (a[:0], b[:, :0], scale)),
        r"rank in 1\.\.128": (x, weight, None, (normal(129, COLS), normal(ROWS, 129), scale)),
        "B has shape": (x, weight, None, (a, b.T, scale)),
        "B has dtype": (x, weight, None, (a, b.half(), scale)),
        "A is on meta": (x, weight, None, (a.to("meta"), b, scale)),
        "scale is": (x, weight, None, (a, b, None)),
    }
    for message, arguments in cases.items():
        for operation in (linear, linear_ref):
            with pytest.raises(ValueError, match=message):
                operation(*arguments)


def test_no_gradient_for_the_weight():
    _, weight = compressed("2:4")
    with pytest.raises(ValueError, match="values requires a gradient"):
        CompressedWeight("2:4", weight.shape, 2, 4, weight.values.clone().requires_grad_(), weight.meta)
    weight.values.requires_grad_()
    with pytest.raises(ValueError, match=r"weight\.values requires a gradient"):
        linear(normal(3, COLS), weight)


def test_wrong_compression():
    weight = normal(4, 32)
    mask = select_nm(weight, 2, 4)
    packed = pack_bits(mask)
    for message, arguments in {
        "format is 'csr'": (weight, packed, "csr"),
        "n and m are 0 and 0|m is 0": (weight, packed, "n:m"),
        "leave them out": (weight, packed, "bitmask", 2, 4),
        "n and m are 1 and 4": (weight, packed, "2:4", 1, 4),
        "multiple of 16": (weight[:, :24], packed[:, :3], "2:4"),
        "multiple of m": (weight, packed, "n:m", 2, 5),
        "does not keep exactly 1 of every 4": (weight, packed, "n:m", 1, 4),
        "does not keep exactly 2 of every 4": (weight, ~pack_bits(mask & (weight < 9) & (normal(4, 32) > 0)), "2:4"),
        "packed has shape": (weight, packed[:, :2], "bitmask"),
        "meta is": (weight, packed[:, :2], "masked"),
    }.items():
        with pytest.raises(ValueError, match=message):
            compress(*arguments)
    values = weight[mask].reshape(4, 16)
    for message, arguments in {
        "meta is torch.uint8": ("2:4", (4, 32), 2, 4, values, packed),
        "values is": ("2:4", (4, 32), 2, 4, values[:, :8], meta_2_4(mask)),
        "values has strides": ("2:4", (16, 32), 2, 4, values.new_ones(16, 16).T, meta_2_4(mask).repeat(4, 1)),
        "values has dtype": ("2:4", (4, 32), 2, 4, values.int(), meta_2_4(mask)),
        "meta is on meta": ("2:4", (4, 32), 2, 4, values, meta_2_4(mask).to("meta")),
        "both must be 0": ("masked", (4, 32), 2, 4, weight, packed),
        "must be given": ("bitmask", (4, 32), 0, 0, weight[mask], packed),
        "must be None": ("masked", (4, 32), 0, 0, weight, packed, torch.zeros(5, dtype=torch.int64)),
    }.items():
        with pytest.raises(ValueError, match=message):
            CompressedWeight(*arguments)


def test_configurations_give_reasons_and_fill_the_device():
    few = config((4096, 4096), torch.bfloat16, 80, 1)
    many = config((4096, 4096), torch.bfloat16, 80, 2048)
    assert few.partial
    assert few.splits * 4096 // few.outer >= 2 * 108
    assert not many.partial
    assert many.splits == 1
    assert "few tokens" in few.reason
    assert "99% busy" in few.reason
    assert "many tokens" in many.reason
    assert "FMA" in config((4096, 4096), torch.float32, 80, 1).reason
