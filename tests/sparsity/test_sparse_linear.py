import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from trisparse.sparsity import linear as linear_module
from trisparse.sparsity.backends import BACKENDS, Plan
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import Mask, attach, check_masks, mask_of, masks
from trisparse.sparsity.pattern import NM, Unstructured, parse_pattern
from trisparse.sparsity.sparsify import sparsify

PATTERNS = ["2:4", "4:8", "1:3", "50%", "70% layer", "25% rows"]
ROWS, COLS = 32, 192


def pruned(pattern="2:4", *, dtype=torch.float32, bias=True, kind="Linear", rows=ROWS, cols=COLS):
    torch.manual_seed(0)
    layer = nn.Linear(cols, rows, bias=bias) if kind == "Linear" else Conv1D(rows, cols)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    layer = layer.to(dtype)
    sparsify(layer, pattern, include="weight", progress=False)
    return layer


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def error(y, exact):
    return float((y.detach().double() - exact).abs().max())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("kind", "bias"), [("Linear", True), ("Linear", False), ("Conv1D", True)])
def test_there_and_back(pattern, kind, bias):
    layer = pruned(pattern, kind=kind, bias=bias)
    mask, weight = mask_of(layer), layer.weight.detach().clone()
    sparse = SparseLinear.from_dense(layer)
    dense = weight.t() if kind == "Conv1D" else weight
    assert torch.equal(sparse.weight, dense)
    assert torch.equal(sparse.mask.bits, mask.bits)
    assert sparse.mask.sha256 == mask.sha256
    assert sparse.bias is layer.bias
    again = sparse.to_dense()
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    assert torch.equal(again.weight, weight)
    assert mask_of(again).sha256 == mask.sha256
    x = normal(3, 5, COLS)
    torch.testing.assert_close(sparse(x), layer(x))
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_is_as_good_as_denses(pattern, dtype):
    layer = pruned(pattern, dtype=dtype)
    x = normal(7, COLS, dtype=dtype)
    exact = F.linear(x.double(), layer.weight.detach().double(), layer.bias.detach().double())
    assert error(SparseLinear.from_dense(layer)(x), exact) <= 2 * error(layer(x), exact)


def test_stored_form_by_hand():
    layer = nn.Linear(8, 2, bias=False)
    keep = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0], [0, 1, 0, 1, 1, 1, 0, 0]]).bool()
    layer.weight.data = torch.arange(1.0, 17).reshape(2, 8)
    attach(layer, "weight", Mask.from_matrix(keep, layer.weight.shape, NM(2, 4)))
    state = SparseLinear.from_dense(layer).state_dict()  # 2:4 has words of metadata only for 16 inputs
    assert state["values"].tolist() == [[1, 4, 6, 7], [10, 12, 13, 14]]
    assert state["bitmask"].tolist() == [[0b01101001], [0b00111010]]
    assert state.keys() == {"values", "bitmask"}

    attach(layer, "weight", Mask.from_matrix(keep & (torch.arange(8) != 3), layer.weight.shape, Unstructured(0.5)))
    state = SparseLinear.from_dense(layer).state_dict()
    assert state["values"].tolist() == [1, 6, 7, 10, 13, 14]
    assert state["row_offsets"].tolist() == [0, 3, 6]
    assert state.keys() == {"values", "bitmask", "row_offsets"}

    layer = nn.Linear(16, 1, bias=False)
    layer.weight.data = torch.arange(16.0)[None]
    keep = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1]]).bool()
    attach(layer, "weight", Mask.from_matrix(keep, layer.weight.shape, NM(2, 4)))
    state = SparseLinear.from_dense(layer).state_dict()
    assert state["values"].tolist() == [[0, 1, 5, 7, 10, 11, 12, 15]]  # a kept zero is a kept weight
    assert [state["meta"].item() >> shift & 15 for shift in (0, 4, 8, 12)] == [0b0100, 0b1101, 0b1110, 0b1100]


@pytest.mark.parametrize(("pattern", "most"), [("2:4", 0.5625), ("4:8", 0.5625), ("50%", 0.58)])
def test_bytes(pattern, most):
    layer = pruned(pattern, dtype=torch.bfloat16, rows=256, cols=512)
    sparse = SparseLinear.from_dense(layer)
    assert sparse.nbytes <= most * layer.weight.nbytes
    stored = {name: tensor for name, tensor in sparse.state_dict().items() if name != "bias"}
    assert sum(tensor.nbytes for tensor in stored.values()) <= sparse.nbytes


@pytest.mark.parametrize("pattern", PATTERNS)
def test_state_dict_fills_another_layer(pattern):
    one = SparseLinear.from_dense(pruned(pattern))
    kept = one.mask.kept if one.format == "bitmask" else None
    two = SparseLinear(COLS, ROWS, parse_pattern(pattern), kept=kept)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.weight, one.weight)
    assert two.mask.sha256 == one.mask.sha256
    x = normal(3, COLS)
    assert torch.equal(two(x), one(x))
    on_meta = SparseLinear(COLS, ROWS, parse_pattern(pattern), kept=kept, device="meta")
    on_meta.load_state_dict(one.state_dict(), assign=True)
    assert torch.equal(on_meta(x), one(x))


def test_a_mask_with_another_count_is_loaded():
    one, other = SparseLinear.from_dense(pruned("50%")), SparseLinear.from_dense(pruned("70%"))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.weight, other.weight)


def damage(state, name, change):
    tensor = state[name].clone()
    change(tensor)
    return {**state, name: tensor}


@pytest.mark.parametrize(
    ("pattern", "name", "change", "message"),
    [
        ("2:4", "meta", lambda t: t.zero_(), "do not ascend"),
        ("4:8", "bitmask", lambda t: t.fill_(7), "not 4:8"),
        ("50%", "bitmask", lambda t: t.fill_(255), "do not fit"),
        ("50%", "row_offsets", lambda t: t.add_(1), "do not fit"),
        ("50%", "row_offsets", lambda t: t.fill_(2**60), "do not fit"),
    ],
)
def test_damaged_state_is_refused(pattern, name, change, message):
    layer = SparseLinear.from_dense(pruned(pattern))
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(damage(layer.state_dict(), name, change))


def test_bits_beyond_the_last_column_are_refused():
    layer = SparseLinear.from_dense(pruned("50%", cols=12))
    state = damage(layer.state_dict(), "bitmask", lambda t: t[:, 1].bitwise_or_(0x80))
    with pytest.raises(RuntimeError, match="beyond the last column"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_gradients_reach_x_and_bias_only(pattern):
    layer = pruned(pattern)
    sparse = SparseLinear.from_dense(layer)
    x, dy = normal(6, COLS).requires_grad_(), normal(6, ROWS)
    given = torch.autograd.grad(sparse(x), (x, sparse.bias), dy)
    expected = torch.autograd.grad(layer(x), (x, layer.bias), dy)
    torch.testing.assert_close(given, expected)
    assert [name for name, _ in sparse.named_parameters()] == ["bias"]


def test_lora_beside_the_weight():
    layer = pruned("50%")
    sparse, x, a, b = SparseLinear.from_dense(layer), normal(4, COLS), normal(3, COLS), normal(ROWS, 3)
    expected = layer(x) + 0.5 * F.linear(F.linear(x, a), b)
    for plan in (sparse.plan, Plan("rows", ((None, "dense"),)), Plan("rows", ((None, "decompress"),))):
        sparse.adopt(plan)
        torch.testing.assert_close(sparse(x, lora=(a, b, 0.5)), expected)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_autocast_as_a_linear(pattern):
    layer = pruned(pattern)
    sparse, x = SparseLinear.from_dense(layer), normal(4, COLS).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = sparse(x), layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32


def test_fragments_hold_the_same_weight():
    layer = pruned("2:4", dtype=torch.bfloat16)
    sparse = SparseLinear.from_dense(layer)
    state, nbytes = copy.deepcopy(sparse.state_dict()), sparse.nbytes
    sparse.adopt(Plan("fragments", ((None, "mma.sp"),)))
    assert sparse.values.shape == (ROWS // 16, COLS // 32, 32, 8)
    assert sparse.nbytes == nbytes
    assert torch.equal(sparse.weight, layer.weight)
    assert sparse.mask.sha256 == mask_of(layer).sha256
    assert sparse.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in sparse.state_dict().items())
    x = normal(3, COLS, dtype=torch.bfloat16)
    exact = F.linear(x.double(), layer.weight.detach().double(), layer.bias.detach().double())
    assert error(sparse(x), exact) <= 2 * error(layer(x), exact)
    sparse.load_state_dict({name: 2 * t if name == "values" else t for name, t in state.items()})
    assert sparse.layout == "fragments"
    assert torch.equal(sparse.weight, 2 * layer.weight)


def test_plan_by_token_count():
    sparse = SparseLinear.from_dense(pruned("50%"))
    alone = sparse.nbytes
    sparse.adopt(Plan("rows", ((2, "compressed"), (4, "decompress"), (None, "dense"))))
    assert [sparse.plan.backend(tokens) for tokens in (0, 1, 2, 3, 4, 5, 9000)] == [
        *["compressed"] * 3,
        *["decompress"] * 2,
        *["dense"] * 2,
    ]
    assert sparse.nbytes == alone + sparse.weight.nbytes
    assert "dense" not in sparse.state_dict()
    x = normal(9, COLS)
    for tokens in (1, 3, 9):
        torch.testing.assert_close(sparse(x[:tokens]), F.linear(x[:tokens], sparse.weight, sparse.bias))
    sparse.adopt(Plan("rows", ((None, "compressed"),)))
    assert sparse.nbytes == alone


def test_backends_without_a_backward_step_aside():
    plan = Plan("rows", ((None, "semi-structured"),))
    assert plan.backend(8) == "semi-structured"
    assert plan.backend(8, grad=True) == "compressed"


def test_what_cannot_run_here_says_why():
    layer = SparseLinear.from_dense(pruned("2:4", dtype=torch.bfloat16))
    other = SparseLinear.from_dense(pruned("50%"))
    assert BACKENDS["compressed"].refuses(layer) is None
    assert "CUDA" in BACKENDS["mma.sp"].refuses(layer)
    assert "2:4" in BACKENDS["mma.sp"].refuses(other)
    assert "2:4" in BACKENDS["semi-structured"].refuses(other)
    odd = SparseLinear.from_dense(pruned("2:4", dtype=torch.bfloat16, cols=48))
    assert "multiples of 64" in BACKENDS["mma.sp"].refuses(odd)
    assert "float32" in BACKENDS["mma.sp"].refuses(SparseLinear.from_dense(pruned("2:4")))


def test_moves_copies_and_pickles():
    sparse = SparseLinear.from_dense(pruned("50%"))
    half = copy.deepcopy(sparse).bfloat16()
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight, sparse.weight.bfloat16())
    assert half.mask.sha256 == sparse.mask.sha256
    assert torch.equal(pickle.loads(pickle.dumps(sparse)).weight, sparse.weight)
    kept = copy.deepcopy(sparse)
    kept.adopt(Plan("rows", ((None, "dense"),)))
    assert torch.equal(kept.half().weight, sparse.weight.half())


def test_fragments_move_to_any_dtype():
    sparse = SparseLinear.from_dense(pruned("2:4", dtype=torch.bfloat16))
    weight = sparse.weight
    sparse.adopt(Plan("fragments", ((None, "mma.sp"),)))
    assert torch.equal(sparse.float().weight, weight.float())
    assert (sparse.layout, str(sparse.plan)) == ("rows", "compressed")


def test_a_move_keeps_what_the_plan_was_made_for(monkeypatch):
    asked = []
    monkeypatch.setattr(
        linear_module,
        "default_plan",
        lambda layer, prefer="speed": asked.append(prefer) or Plan("rows", ((None, "compressed"),)),
    )
    sparse = SparseLinear.from_dense(pruned("50%"), plan=Plan("rows", ((None, "compressed"),)))
    sparse.prefer = "memory"
    asked.clear()
    sparse.half()
    assert asked == ["memory"]


def test_a_failed_load_leaves_a_layer_that_runs():
    layer = pruned("2:4", dtype=torch.bfloat16)
    sparse, x = SparseLinear.from_dense(layer), normal(3, COLS, dtype=torch.bfloat16)
    expected = sparse(x)
    for plan in (Plan("rows", ((None, "dense"),)), Plan("fragments", ((None, "mma.sp"),))):
        sparse.adopt(plan)
        with pytest.raises(RuntimeError, match="size mismatch for bias"):
            sparse.load_state_dict({**sparse.state_dict(), "bias": torch.zeros(3)})
        assert sparse.plan == plan
        torch.testing.assert_close(sparse(x), expected)


def test_decompressing_keeps_no_dense_weight_for_the_backward():
    sparse = SparseLinear.from_dense(pruned("50%"))
    sparse.adopt(Plan("rows", ((None, "decompress"),)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sparse(normal(3, COLS).requires_grad_())
    assert kept
    assert (ROWS, COLS) not in {tuple(tensor.shape) for tensor in kept}


def test_set_weight_keeps_the_mask():
    sparse = SparseLinear.from_dense(pruned("2:4", dtype=torch.bfloat16))
    sparse.adopt(Plan("fragments", ((None, "mma.sp"),)))
    mask, new = sparse.mask, normal(ROWS, COLS)
    sparse.set_weight(new)
    assert sparse.layout == "fragments"
    assert sparse.mask.sha256 == mask.sha256
    assert torch.equal(sparse.weight, (new * mask.matrix()).bfloat16())
    with pytest.raises(ValueError, match=r"weight has shape \(192, 32\); it must be \(32, 192\)"):
        sparse.set_weight(new.t())


def test_masks_of_a_model_are_found():
    model = nn.Sequential(SparseLinear.from_dense(pruned("2:4")), nn.ReLU(), pruned("50%", rows=8, cols=ROWS))
    assert {name: str(mask.pattern) for name, mask in masks(model).items()} == {"0.weight": "2:4", "2.weight": "50%"}
    check_masks(model)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_compiles_to_one_graph_for_any_token_count(pattern):
    sparse = SparseLinear.from_dense(pruned(pattern))
    sparse.adopt(Plan("rows", ((4, "compressed"), (None, "dense"))))
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 3, 9):
        x = normal(tokens, COLS).requires_grad_()
        y, expected = compiled(x), sparse(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_wrong_inputs():
    layer = pruned("2:4")
    sparse = SparseLinear.from_dense(layer)
    with pytest.raises(ValueError, match=r"x has shape \(3, 191\); its last dimension must be the weight's 192"):
        sparse(normal(3, COLS - 1))
    with pytest.raises(ValueError, match=r"x has dtype torch.bfloat16; it must be the weight's, torch.float32"):
        sparse(normal(3, COLS).bfloat16())
    with pytest.raises(ValueError, match="x is on meta; it must be on the weight's device, cpu"):
        sparse(normal(3, COLS).to("meta"))
    with pytest.raises(ValueError, match="rank"):
        sparse(normal(3, COLS), (normal(0, COLS), normal(ROWS, 0), 1.0))
    with pytest.raises(ValueError, match="layer is a ReLU; only Linear and Conv1D"):
        SparseLinear.from_dense(nn.ReLU())
    with pytest.raises(ValueError, match="layer has no mask"):
        SparseLinear.from_dense(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="mask is of shape"):
        SparseLinear.from_dense(nn.Linear(4, 4), mask_of(layer))
    with pytest.raises(ValueError, match="kept is None"):
        SparseLinear(16, 16, Unstructured(0.5))
    with pytest.raises(ValueError, match="kept is 3"):
        SparseLinear(16, 16, NM(2, 4), kept=3)
    with pytest.raises(ValueError, match="kind is 'Conv2d'"):
        SparseLinear(16, 16, NM(2, 4), kind="Conv2d")
    wrong = Mask.from_matrix(torch.ones(32, 192).bool(), layer.weight.shape, NM(2, 4))
    with pytest.raises(ValueError, match="exactly 2 of every 4"):
        SparseLinear.from_dense(layer, wrong)
