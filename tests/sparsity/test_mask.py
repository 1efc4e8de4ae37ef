import copy

import pytest
import torch
from torch import nn

from trisparse.kernels.launch import using
from trisparse.sparsity.mask import (
    Mask,
    MaskError,
    attach,
    check_masks,
    detach,
    from_matrix,
    mask_of,
    masks,
    masks_sha256,
    to_matrix,
)
from trisparse.sparsity.metric import Score
from trisparse.sparsity.pattern import NM, Rows, parse_pattern
from trisparse.sparsity.selection import select
from trisparse.sparsity.targets import find_targets

KEEP = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.bool)


def linear():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.arange(1.0, 9.0).view(2, 4)
    return layer


def mask(keep=KEEP, **options):
    return Mask.from_matrix(keep, torch.Size(options.pop("shape", keep.shape)), NM(2, 4), **options)


@pytest.fixture
def launched():
    """Names of the kernels launched, none of which runs."""
    pytest.importorskip("triton")
    names = []
    with using(lambda kernel, *_: names.append(kernel.__name__)):
        yield names


def random_keep(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "cols", "transposed"),
    [((5, 9), 9, False), ((9, 5), 9, True), ((3, 9, 5), 9, True), ((3, 5, 9), 9, False), ((4, 3, 2, 2), 12, False)],
)
def test_attach_zeroes_every_layout(shape, cols, transposed, dtype):
    module = nn.Module()
    keep = random_keep(torch.Size(shape).numel() // cols, cols)
    weight = torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape).to(dtype)
    layouts = [weight.clone(), torch.stack([weight, weight], -1)[..., 0]]
    if len(shape) == 4:
        layouts.append(weight.to(memory_format=torch.channels_last))
    for layout in layouts:
        module.weight = nn.Parameter(layout)
        mask = Mask.from_matrix(keep, module.weight.shape, NM(2, 4), transposed=transposed)
        attach(module, "weight", mask)
        assert torch.equal(layout, weight.masked_fill(~mask.dense(), 0))


def test_attach_zeroes_by_the_bits_where_kernels_run(launched):
    layer, kept = linear(), mask()
    launched.clear()
    attach(layer, "weight", kept)
    assert launched == ["unpack_kernel"]


def test_attach_is_noticed_by_autograd():
    layer = linear()
    loss = (layer.weight**2).sum()
    attach(layer, "weight", mask())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("pattern", "kernels"),
    [
        ("2:4", ["select_nm_kernel"]),
        ("50%", ["select_rows_kernel"]),
        (Rows(0.5), ["select_rows_kernel", "pack_kernel"]),
    ],
)
def test_selection_makes_no_bool_matrix_where_kernels_run(launched, pattern, kernels):
    (target,) = find_targets(nn.Sequential(nn.Linear(16, 8, bias=False))).found
    select(target, [Score(target.matrix())], parse_pattern(pattern))
    assert launched == [*kernels, "count_kernel"]


def test_pruned_rows_are_whole():
    (target,) = find_targets(nn.Sequential(nn.Linear(13, 6, bias=False))).found
    weight = torch.arange(6.0)[:, None] + torch.zeros(6, 13)
    chosen = select(target, [Score(weight[:2]), Score(weight[2:])], Rows(0.5))
    assert torch.equal(chosen.matrix(), torch.tensor([False] * 3 + [True] * 3)[:, None].expand(6, 13))
    assert chosen.kept == 39


def test_attach_zeroes_the_pruned_weights_and_only_them():
    layer = linear()
    attach(layer, "weight", mask())
    assert torch.equal(layer.weight.data, torch.tensor([[1.0, 0, 0, 4], [0, 6, 7, 0]]))
    assert mask_of(layer) is masks(nn.Sequential(layer))["0.weight"]


def test_bits_are_packed_lowest_column_first():
    assert mask().bits.tolist() == [[0b1001], [0b0110]]
    assert mask().kept == 4
    assert mask().sparsity == 0.5


def test_state_dict_stays_as_it_was():
    layer = linear()
    before = list(layer.state_dict())
    attach(layer, "weight", mask())
    assert list(layer.state_dict()) == before


def test_transposed_and_flattened_parameters_round_trip():
    conv1d = mask(KEEP, shape=(4, 2), transposed=True)
    assert torch.equal(conv1d.dense(), KEEP.t())
    experts = torch.rand(2, 4, 3)  # [experts, in, out]
    flat = to_matrix(experts, 4, transposed=True)
    assert flat.shape == (6, 4)
    assert torch.equal(flat[1], experts[0, :, 1])
    assert torch.equal(from_matrix(flat, experts.shape, transposed=True), experts)
    filters = torch.rand(2, 3, 2, 2)
    assert torch.equal(from_matrix(to_matrix(filters, 12), filters.shape), filters)


def test_check_names_the_weight_and_counts_what_came_back():
    model = nn.Sequential(linear())
    attach(model[0], "weight", mask())
    check_masks(model)
    with torch.no_grad():
        model[0].weight[0, 1] = 1e-30
        model[0].weight[1, 0] = float("nan")
    with pytest.raises(MaskError, match=r"0\.weight: 2 pruned weights are not zero"):
        check_masks(model)


def test_a_kept_zero_is_no_pruned_weight():
    layer = linear()
    attach(layer, "weight", mask())
    with torch.no_grad():
        layer.weight[0, 0] = 0
    check_masks(layer)
    assert mask_of(layer).kept == 4


def test_check_notices_a_replaced_parameter():
    layer = linear()
    attach(layer, "weight", mask())
    layer.weight = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(MaskError, match="shape"):
        check_masks(layer)


def test_mask_of_another_shape_is_refused():
    with pytest.raises(MaskError, match="does not fit weight"):
        attach(linear(), "weight", mask(KEEP.t().contiguous()))
    with pytest.raises(MaskError, match="mask bits must be uint8"):
        Mask(torch.zeros(2, 2, dtype=torch.uint8), torch.Size((2, 4)), 4, False, NM(2, 4))


def test_hash_depends_on_bits_layout_and_name():
    other = KEEP.clone()
    other[0, :2] = other[0, :2].flip(0)
    assert mask().sha256 == mask().sha256
    assert len({mask().sha256, mask(other).sha256, mask(KEEP, shape=(4, 2), transposed=True).sha256}) == 3
    one, two = nn.Sequential(linear()), nn.ModuleDict({"a": linear()})
    attach(one[0], "weight", mask())
    attach(two["a"], "weight", mask())
    assert masks_sha256(one) != masks_sha256(two)


def test_masks_survive_deepcopy_and_detach_forgets_them():
    model = nn.Sequential(linear())
    attach(model[0], "weight", mask())
    clone = copy.deepcopy(model)
    assert masks_sha256(clone) == masks_sha256(model)
    detach(clone[0])
    assert masks(clone) == {}
    assert len(masks(model)) == 1
