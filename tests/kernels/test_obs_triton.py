"""The kernel of the OBS update against its reference: interpreted, or on a device; as in test_triton.py."""

import os

import pytest
import torch

from trisparse.kernels.launch import device, interpret, using

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
WHERE = "cpu" if INTERPRETED else "cuda"
# Blocks of 1, 2 and 3 sub-blocks, the last one narrower; groups as wide as a sub-block, wider, and of no power of two.
CASES = [
    (5, 8, None), (33, 20, None), (1, 1, None), (3, 17, None),
    (33, 20, (2, 4)), (4, 24, (4, 8)), (3, 21, (1, 3)), (2, 20, (3, 5)), (2, 32, (8, 16)), (0, 8, (2, 4)),
]  # fmt: skip
if not INTERPRETED:
    CASES += [
        (4096, 128, None),
        (4096, 128, (2, 4)),
        (1000, 128, (4, 8)),
        (999, 126, (3, 7)),
        (77, 128, (15, 16)),
        (77, 128, (31, 32)),
    ]


@pytest.fixture(autouse=True)
def runner():
    with using(interpret if INTERPRETED else device):
        yield


def moved(given):
    """On the device, stored as before."""
    return tuple(one if WHERE == "cpu" else torch.empty_like(one, device=WHERE).copy_(one) for one in given)


def is_as_asked(found, mask, nm):
    """The mask that was given, or n of every m columns."""
    if nm is None:
        return torch.equal(found, mask)
    n, m = nm
    return bool((found.reshape(len(found), found.shape[1] // m, m).sum(2) == n).all())


@pytest.mark.parametrize(("rows", "block", "nm"), CASES)
@pytest.mark.parametrize(("storage", "in_place"), [("slice of rows", True), ("columns", False)])
def test_equals_reference(obs_inputs, check_obs_block, rows, block, nm, storage, in_place):
    weight, factor = moved(obs_inputs(rows, block, "exact", storage))
    mask = None if nm else (weight.roll(1, 0) - weight).round() % 2 == 0
    found = check_obs_block((weight, factor), (mask, *(nm or ())), exact=True, in_place=in_place)
    assert is_as_asked(found, mask, nm)


@pytest.mark.parametrize(("block", "nm"), [(24, None), (64, (2, 4)), (24, (4, 8))])
def test_rounding(obs_inputs, check_obs_block, block, nm):
    weight, factor = moved(obs_inputs(32, block))
    mask = None if nm else weight > 0
    found = check_obs_block((weight, factor), (mask, *(nm or ())))
    assert is_as_asked(found, mask, nm)
