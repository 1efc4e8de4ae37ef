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
