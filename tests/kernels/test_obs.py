"""The OBS update of a block: by hand, against the definition in fp64, and route against reference."""

import pytest
import torch

from trisparse.kernels.obs import obs_block, obs_block_ref

BOTH = pytest.mark.parametrize("update", [obs_block_ref, obs_block])


@BOTH
def test_by_hand(update):
    weight = torch.tensor([[4.0, 3.0, 1.0, 2.0], [1.0, 8.0, 6.0, 2.0]])
    factor = torch.tensor([[2.0, 1.0, 0.0, 1.0], [9.0, 1.0, 2.0, 0.0], [9.0, 9.0, 0.5, 1.0], [9.0, 9.0, 9.0, 1.0]])
    # Scores of the first pair: 4/2 < 3/1, 1/2 < 8/1. Errors 2 and 0.5 go to columns 1 and 3.
    # Then: 1/0.5 > 0/1 keeps column 2; 6/0.5 > 1.5/1, too.
    updated, errors, mask = update(weight, factor, None, 1, 2)
    assert mask.tolist() == [[False, True, True, False], [False, True, True, False]]
    assert errors.tolist() == [[2.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 1.5]]
    assert updated.tolist() == [[0.0, 1.0, 1.0, 0.0], [0.0, 7.5, 6.0, 0.0]]
    given = torch.tensor([[True, False, True, False], [False, False, False, False]])
    updated, errors, mask = update(weight, factor, given)
    assert mask is given
    # Row 0: column 1 loses 3: e = 3, column 2: 1 - 6 = -5; column 3 loses 2.
    # Row 1: e = .5; 8 - .5 = 7.5; 6 - 15 = -9, e = -18; 2 - .5 + 18 = 19.5
    assert errors.tolist() == [[0.0, 3.0, 0.0, 2.0], [0.5, 7.5, -18.0, 19.5]]
    assert updated.tolist() == [[4.0, 0.0, -5.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


STORAGE = ["rows", "columns", "slice of rows", "slice of columns"]


@BOTH
def test_ties_keep_the_lower_column(update):
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, -0.0, 2.0, -2.0]])
    mask = update(weight, torch.eye(8), None, 2, 4)[2]
    assert mask.tolist() == [[True, True, False, False, False, False, True, True]]
    assert update(weight * 0, torch.eye(8), None, 3, 4)[2].tolist() == [[True, True, True, False] * 2]


@BOTH
def test_one_pruned_weight_gives_the_optimal_update(update):
    # Optimal Brain Surgeon: pruning w_0 changes the weights by - w_0 / H⁻¹[0, 0] * H⁻¹[0].
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    inverse = torch.linalg.inv(x.T @ x)
    weight = torch.randn(5, 16, generator=generator)
    mask = torch.arange(16).expand(5, 16) > 0
    new, _, _ = update(weight, torch.linalg.cholesky(inverse).T.float().contiguous(), mask)
    expected = weight.double() - weight[:, :1].double() * inverse[0] / inverse[0, 0]
    torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_errors_carry_one_block_to_the_next(update, obs_inputs):
    weight, factor = obs_inputs(9, 64, "exact")
    whole, errors, mask = update(weight, factor, None, 2, 4)
    first, lost, kept = update(weight[:, :32], factor[:32, :32], None, 2, 4)
    second = update(weight[:, 32:] - lost @ factor[:32, 32:], factor[32:, 32:], None, 2, 4)
    assert torch.equal(torch.cat([first, second[0]], 1), whole)
    assert torch.equal(torch.cat([lost, second[1]], 1), errors)
    assert torch.equal(torch.cat([kept, second[2]], 1), mask)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("rows", "block", "nm"),
    [
        (33, 128, None), (5, 40, None), (1, 1, None), (0, 8, None), (7, 127, None), (3, 9, None),
        (33, 128, (2, 4)), (6, 120, (4, 8)), (5, 36, (1, 3)), (4, 126, (3, 7)), (3, 128, (8, 16)), (2, 96, (31, 32)),
        (0, 8, (2, 4)), (1, 4, (2, 4)), (1, 128, (1, 2)), (9, 20, (2, 4)), (5, 100, (13, 20)),
    ],
)  # fmt: skip
def test_route_equals_reference(obs_inputs, check_obs_block, rows, block, nm, storage, in_place):
    weight, factor = obs_inputs(rows, block, "exact", storage)
    mask = None if nm else (weight.roll(1, 0) - weight).round() % 2 == 0
    check_obs_block((weight, factor), (mask, *(nm or ())), exact=True, in_place=in_place)


@pytest.mark.parametrize("nm", [None, (2, 4), (4, 8), (5, 6), (8, 16)])
@pytest.mark.parametrize("storage", ["rows", "columns"])
def test_rounding(obs_inputs, check_obs_block, nm, storage):
    block = 126 if nm == (5, 6) else 128
    weight, factor = obs_inputs(300, block, "random", storage)
    mask = None if nm else torch.rand(300, block, generator=torch.Generator().manual_seed(0)) < 0.5
    check_obs_block((weight, factor), (mask, *(nm or ())))


def test_masks_stored_by_columns_and_sliced(obs_inputs, check_obs_block):
    given = obs_inputs(21, 48, "exact")
    mask = torch.rand(60, 80, generator=torch.Generator().manual_seed(0)) < 0.5
    for one in (mask[:21, :48].contiguous(), mask[:21, 3:51], mask.t()[:21, :48]):
        check_obs_block(given, (one,), exact=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3, 8).double()}, r"weight is torch.float64 \(3, 8\); it must be torch.float32 \[rows"),
        ({"weight": torch.ones(8)}, r"weight is torch.float32 \(8,\)"),
        ({"weight": torch.ones(3, 132), "factor": torch.eye(132)}, r"weight has 132 columns; a block has 1\.\.128"),
        ({"weight": torch.ones(3, 0), "factor": torch.eye(0)}, "weight has 0 columns"),
        ({"weight": torch.ones(6, 16)[::2, ::2]}, "weight has strides"),
        ({"weight": torch.ones(1, 8).expand(3, 8), "in_place": True}, "its rows overlap"),
        ({"factor": torch.eye(9)}, r"factor is torch.float32 \(9, 9\); it must be torch.float32 \(8, 8\)"),
        ({"factor": torch.eye(8).double()}, "factor is torch.float64"),
        ({"factor": torch.ones(8, 8).t()}, "factor has strides"),
        ({"n": None}, "mask is None and n:m is None:4; one of them must be given"),
        ({"m": 3}, "multiple of m = 3"),
        ({"n": 4}, r"n is 4; it must be in 1\.\.3"),
        ({"mask": torch.ones(3, 8, dtype=torch.bool)}, "mask is given and n:m is 2:4; only one of them may be"),
        ({"mask": torch.ones(3, 8), "n": None, "m": None}, r"mask is torch.float32 \(3, 8\); it must be torch.bool"),
        ({"mask": torch.ones(4, 8, dtype=torch.bool), "n": None, "m": None}, r"mask is torch.bool \(4, 8\)"),
        ({"factor": torch.empty(8, 8, device="meta")}, "factor is on meta"),
    ],
)
def test_wrong_input(change, message):
    arguments = {"weight": torch.ones(3, 8), "factor": torch.eye(8), "n": 2, "m": 4}
    with pytest.raises(ValueError, match=message):
        obs_block(**{**arguments, **change})


def test_weights_that_ask_for_a_gradient(obs_inputs):
    weight, factor = obs_inputs(4, 8)
    parameter = torch.nn.Parameter(weight.clone())
    new, _, _ = obs_block(parameter, factor, None, 2, 4)
    assert not new.requires_grad
    obs_block(parameter, factor, None, 2, 4, in_place=True)
    assert torch.equal(parameter.detach(), new)
