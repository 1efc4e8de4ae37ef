"""The operations as torch.compile, autograd and torch.library.opcheck see them."""

import os
import subprocess
import sys

import pytest
import torch

from trisparse.kernels import bitmask, nm, obs, select, threshold
from trisparse.kernels.launch import using
from trisparse.kernels.nm import meta_2_4, select_nm
from trisparse.kernels.select import select_rows
from trisparse.kernels.threshold import select_global

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles graphs", allow_module_level=True)
COMPILED = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def packed_of(weight):
    return bitmask.pack_bits(weight > 0)


def fullgraph(function, backend, dynamic=None):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def registered():
    """(operation, arguments) of every registered operation."""
    w, x = normal(6, 48), normal(48).abs()
    packed = packed_of(w)
    values, offsets = bitmask.compress_bits(w, packed)
    strided = normal(6, 60)[:, 4:52]
    yield select._FUNCTIONAL, (w, 20, x, True, "mask")
    yield select._FUNCTIONAL, (strided.half(), 0, None, False, "packed")
    yield select._IN_PLACE, (strided.clone(), 20, x, True, "packed")
    yield nm._FUNCTIONAL, (w.bfloat16(), 2, 4, None, True, "mask", False)
    yield nm._FUNCTIONAL, (strided, 2, 3, x, True, "packed", True)
    yield nm._IN_PLACE, (w.clone(), 2, 4, x, True, "packed", False)
    yield nm._COMPRESS, (w, 2, 4, x, True)
    yield nm._COMPRESS, (w.clone().requires_grad_(), 3, 8, None, True)
    yield nm._COMPRESS, (w.clone().requires_grad_(), 2, 4, None, True)
    yield nm._COMPRESS_IN_PLACE, (w.clone(), 2, 4, x, True)
    yield threshold._FUNCTIONAL, ([w, strided.double()], 99, [x, None], True, "mask")
    yield threshold._FUNCTIONAL, ([w[:0], w[:, :0]], 0, [None, None], True, "packed")
    masks = [torch.empty(6, 6, dtype=torch.uint8) for _ in range(2)]
    yield threshold._IN_PLACE, ([w.clone(), strided.half()], masks, 99, [x, None], True, "packed")
    factor = torch.eye(48) + 0.1 * normal(48, 48).triu(1)
    yield obs._FUNCTIONAL, (strided, factor, w > 0, 0, 0)
    yield obs._FUNCTIONAL, (normal(48, 6).t(), factor, None, 2, 4)
    yield obs._IN_PLACE, (strided.clone(), factor, None, 2, 4)
    yield obs._IN_PLACE, (w.clone(), factor, strided > 0, 0, 0)
    yield bitmask._PACK, (strided > 0,)
    yield bitmask._UNPACK, (packed, 47)
    yield bitmask._COUNT, (packed,)
    yield bitmask._APPLY, (w.clone(), packed)
    yield bitmask._COMPRESS, (w.clone().requires_grad_(), packed)
    yield bitmask._GATHER, (w.clone().requires_grad_(), packed, offsets, values.shape[0])
    yield bitmask._DECOMPRESS, (values.clone().requires_grad_(), packed, offsets, 48)
    yield bitmask._DECOMPRESS_TRUSTED, (values, packed, offsets, 48)


@pytest.mark.parametrize(("operation", "arguments"), list(registered()))
def test_opcheck(operation, arguments):
    torch.library.opcheck(operation.registered, arguments)


def public():
    """What each public operation returns for a weight [rows, 48] and x [48]; and the weight, where it is changed."""

    def in_place(operation):
        def run(w, x):
            w = w.clone()
            return operation(w, x), w

        return run

    for out in ("mask", "packed"):
        yield f"rows {out}", lambda w, x, out=out: select_rows(w, 20, x=x, out=out)
        yield f"rows {out} in place", in_place(lambda w, x, out=out: select_rows(w, 20, x=x, out=out, apply=True))
        yield f"global {out}", lambda w, x, out=out: select_global([w, w * 2], 99, xs=[x, None], out=out)
    yield "global in place", in_place(lambda w, x: select_global([w[:1], w[1:]], 37, xs=[x, None], apply=True))
    for out in ("mask", "packed", "compressed"):
        yield f"2:4 {out}", lambda w, x, out=out: select_nm(w, 2, 4, x=x, out=out)
        yield f"2:4 {out} in place", in_place(lambda w, x, out=out: select_nm(w, 2, 4, x=x, out=out, apply=True))
    yield "3:8 compressed", lambda w, x: select_nm(w, 3, 8, x=x, out="compressed")
    yield "2:3 along out", lambda w, x: select_nm(w, 2, 3, x=x, along_out=True)
    yield "meta", lambda w, x: meta_2_4(select_nm(w, 2, 4))
    yield "pack", lambda w, x: bitmask.pack_bits(w > 0)
    yield "unpack", lambda w, x: bitmask.unpack_bits(bitmask.pack_bits(w > 0), 48)
    yield "count", lambda w, x: bitmask.count_bits(bitmask.pack_bits(w > 0))
    yield "apply", in_place(lambda w, x: bitmask.apply_bits(w, bitmask.pack_bits(w > 0)))
    yield "compress", lambda w, x: bitmask.compress_bits(w, bitmask.pack_bits(w > 0))

    def there_and_back(w, x):
        packed = bitmask.pack_bits(w > 0)
        values, offsets = bitmask.compress_bits(w, packed)
        return bitmask.decompress_bits(values * 2, packed, offsets, 48)

    yield "decompress", there_and_back


PUBLIC = dict(public())


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return len(one) == len(other) and all(map(equal, one, other))


@COMPILED
@pytest.mark.parametrize("name", PUBLIC)
def test_compiled_equals_eager(name, backend):
    operation, x = PUBLIC[name], normal(48).abs()
    compiled = fullgraph(operation, backend)
    for rows in (6, 3, 9):  # the second size makes the rows dynamic
        weight = normal(rows, 48)
        assert equal(compiled(weight, x), operation(weight, x)), rows


@COMPILED
def test_one_graph_for_every_shape(backend):
    compiled = fullgraph(lambda w, k: select_rows(w, k, out="packed", apply=True), backend, dynamic=True)
    for rows, cols, k in ((6, 48, 20), (7, 33, 5), (2, 1024, 1000)):
        weight = normal(rows, cols)
        expected = weight.clone()
        assert torch.equal(compiled(weight, k), select_rows(expected, k, out="packed", apply=True))
        assert torch.equal(weight, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(normal(5, 77), 30)


@COMPILED
def test_a_parameter_is_zeroed_in_a_compiled_graph(backend):
    parameter = torch.nn.Parameter(normal(4, 32))
    before = parameter.detach().clone()
    version = parameter._version

    def prune(weight):
        packed = select_nm(weight, 2, 4, out="packed", apply=True)
        return packed, weight.detach() * 2

    packed, doubled = fullgraph(prune, backend)(parameter)
    expected = before.masked_fill(~nm.select_nm_ref(before, 2, 4), 0)
    assert torch.equal(packed, bitmask.pack_bits(nm.select_nm_ref(before, 2, 4)))
    assert torch.equal(parameter.detach(), expected)
    assert torch.equal(doubled, expected * 2)  # what follows sees the zeros
    assert parameter.requires_grad
    assert parameter._version > version


@pytest.mark.parametrize("apply", [False, True])
def test_weights_that_require_grad(apply):
    for run in (
        lambda w: select_rows(w, 3, apply=apply),
        lambda w: select_nm(w, 2, 4, apply=apply),
        lambda w: select_nm(w, 2, 4, out="compressed", apply=apply)[1],
        lambda w: select_global([w], 9, apply=apply)[0],
    ):
        leaf, plain = normal(4, 16).requires_grad_(), normal(4, 16)
        assert torch.equal(run(leaf), run(plain))
        assert torch.equal(leaf.detach(), plain)
        assert leaf.is_leaf
        assert leaf.requires_grad


def test_a_change_in_place_is_noticed_by_autograd():
    leaf = normal(4, 16).requires_grad_()
    loss = (leaf * leaf).sum()
    bitmask.apply_bits(leaf, packed_of(leaf))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients():
    weight = normal(3, 16).double().requires_grad_()
    packed = packed_of(weight.detach())
    values, offsets = bitmask.compress_bits(weight.detach(), packed)
    values.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda w: bitmask.compress_bits(w, packed)[0], weight)
    assert check(lambda v: bitmask.decompress_bits(v, packed, offsets, 16), values)
    for n, m in ((2, 4), (3, 8)):
        assert check(lambda w, n=n, m=m: select_nm(w, n, m, out="compressed")[0], weight)
    twice = torch.autograd.gradgradcheck
    assert twice(lambda w: bitmask.compress_bits(w, packed)[0] ** 3, weight)
    assert twice(lambda v: bitmask.decompress_bits(v, packed, offsets, 16) ** 3, values)


@COMPILED
def test_gradients_in_a_compiled_graph(backend):
    packed = packed_of(normal(3, 16))

    def loss(weight):
        values, offsets = bitmask.compress_bits(weight, packed)
        two_four, _ = select_nm(weight, 2, 4, out="compressed")
        return (bitmask.decompress_bits(values**2, packed, offsets, 16) * 3).sum() + (two_four**3).sum()

    gradients = []
    for run in (loss, fullgraph(loss, backend)):
        weight = normal(3, 16).requires_grad_()
        run(weight).backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


@COMPILED
def test_wrong_input_raises_in_a_compiled_graph(backend):
    nan = torch.full((2, 8), torch.nan)
    with pytest.raises(ValueError, match="weight gives NaN"):
        fullgraph(lambda w: select_rows(w, 2), backend)(nan)
    with pytest.raises(ValueError, match=r"weights\[1\] gives NaN"):
        fullgraph(lambda w: select_global([w * 0 if False else torch.ones_like(w), w], 2), backend)(nan)
    for run, message in (
        (lambda w: select_rows(w, 9), "k is 9"),
        (lambda w: select_nm(w, 2, 3), "multiple of m = 3"),
        (lambda w: select_rows(w.T, 1), "weight has strides"),
        (lambda w: select_rows(w, 2, out="bits"), "out is 'bits'"),
    ):
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=message):
            fullgraph(run, backend)(torch.ones(2, 8))


def test_meta_tensors_and_export():
    weight = torch.empty(6, 48, dtype=torch.bfloat16, device="meta")
    assert select_rows(weight, 20).shape == (6, 48)
    assert select_rows(weight, 20, out="packed").shape == (6, 6)
    values, meta = select_nm(weight, 2, 4, out="compressed")
    assert (values.shape, values.dtype) == ((6, 24), torch.bfloat16)
    assert (meta.shape, meta.dtype) == ((6, 3), torch.int16)

    class Prune(torch.nn.Module):
        def forward(self, weight):
            return select_rows(weight, 20, out="packed")

    weight = normal(6, 48)
    program = torch.export.export(Prune(), (weight,))
    assert any("trisparse.select_rows" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(weight), select_rows(weight, 20, out="packed"))


def test_a_runner_is_given_the_implementation():
    pytest.importorskip("triton")
    launched = []

    def runner(kernel, grid, args, options, constexprs):
        launched.append(kernel.__name__)

    weight = torch.empty(6, 48, device="meta")
    with using(runner):
        select_rows(weight, 20, apply=True)
        select_nm(weight, 2, 4, out="compressed")
        bitmask.compress_bits(weight, torch.empty(6, 6, dtype=torch.uint8, device="meta"))
    assert launched == ["select_rows_kernel", "select_nm_kernel", "count_kernel", "move_kernel"]


def test_importing_is_lean():
    code = (
        "import sys, trisparse.kernels.nm, trisparse.kernels.threshold, trisparse.kernels.select, torch;"
        "assert not torch.cuda.is_initialized();"
        "print(sorted({'triton', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
