import copy

import pytest
import torch
from torch import nn

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
from trisparse.sparsity.pattern import NM

KEEP = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.bool)


def linear():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.arange(1.0, 9.0).view(2, 4)
    return layer


def mask(keep=KEEP, **options):
    return Mask.from_matrix(keep, torch.Size(options.pop("shape", keep.shape)), NM(2, 4), **options)


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
