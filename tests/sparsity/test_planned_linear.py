import pytest
import torch
from torch import nn

from trisparse.sparsity import planned_linear as module
from trisparse.sparsity.backends import Plan
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import Mask, attach
from trisparse.sparsity.pattern import parse_pattern
from trisparse.sparsity.planned_linear import planned_linear

PLANS = {
    "compressed": Plan("rows", ((None, "compressed"),)),
    "dense": Plan("rows", ((4, "compressed"), (None, "dense"))),
    "decompress": Plan("rows", ((4, "compressed"), (None, "decompress"))),
    "mma.sp": Plan("fragments", ((None, "mma.sp"),)),
}


def layer_of(pattern, plan=None, dtype=torch.float32):
    torch.manual_seed(0)
    dense = nn.Linear(64, 32, dtype=dtype)
    keep = (torch.arange(64) % 4 < 2).expand(32, 64)
    attach(dense, "weight", Mask.from_matrix(keep, dense.weight.shape, parse_pattern(pattern)))
    return dense, SparseLinear.from_dense(dense, plan=plan)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("name", ["compressed", "dense", "decompress"])
@torch.no_grad()
def test_every_backend_gives_the_dense_product(pattern, name):
    dense, layer = layer_of(pattern, PLANS[name])
    for shape in ((1, 64), (4, 64), (5, 64), (2, 3, 64), (0, 64)):
        x = torch.randn(shape)
        assert torch.equal(planned_linear(layer, x, layer.bias), dense(x))
        assert torch.equal(planned_linear(layer, x), nn.functional.linear(x, dense.weight))


@torch.no_grad()
def test_sparse_tensor_cores_read_their_own_layout():
    dense, layer = layer_of("2:4", PLANS["mma.sp"], torch.bfloat16)
    assert layer.layout == "fragments"
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(planned_linear(layer, x, layer.bias), layer(x))
    assert torch.allclose(planned_linear(layer, x, layer.bias), dense(x), rtol=2**-7, atol=2**-7)


@torch.no_grad()
def test_the_backend_is_chosen_when_it_runs_and_not_when_it_is_traced(monkeypatch):
    dense, layer = layer_of("50%", PLANS["dense"])
    ran = []
    linear = module.linear
    monkeypatch.setattr(module, "linear", lambda *args: (ran.append(args[0].shape[0]), linear(*args))[1])
    # One graph for every number of tokens: a plan that is read at tracing would compile anew, or keep its branch.
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: planned_linear(layer, x, layer.bias), fullgraph=True, dynamic=True, backend="eager"
    )
    first = torch.randn(9, 64)
    assert torch.equal(compiled(first), dense(first))
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (2, 4, 5, 30):
            x = torch.randn(count, 64)
            assert torch.equal(compiled(x), dense(x))
    assert ran == [2, 4]


def test_a_plan_with_a_copy_that_is_no_tensor_is_refused():
    _, layer = layer_of("2:4")
    layer.plan = Plan("rows", ((None, "semi-structured"),))
    with pytest.raises(ValueError, match="the plan names 'semi-structured'"):
        planned_linear(layer, torch.randn(2, 64))


def test_operation_is_registered_as_it_behaves():
    _, layer = layer_of("50%", PLANS["dense"])
    args = [torch.randn(3, 64), layer.values, layer.positions, layer.row_offsets, layer.tile_offsets, layer.dense]
    rest = [layer.bias.detach(), "bitmask", "rows", 32, 0, 0, [4], "compressed,dense"]
    torch.library.opcheck(module._PLANNED.registered, (*args, *rest), test_utils=["test_schema", "test_faketensor"])
