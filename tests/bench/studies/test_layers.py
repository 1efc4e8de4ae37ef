"""The comparisons of one layer: right results pass their check, wrong ones do not."""

import pytest
import torch

from trisparse.bench.studies import masked_lora, obs_block


def test_mask_lora_gives_the_gradients_of_the_usual_way():
    case = masked_lora.case(32, 24, 16, 4, torch.float32)
    expected = case.reference()
    case.check(case.contestants["ours"](), expected)
    x, a, b = case.contestants["ours"]()
    with pytest.raises(AssertionError, match="differ by"):
        case.check((x, a * 1.001, b), expected)
    assert case.metrics["ours"]["peak_bytes"] > 0


@pytest.mark.parametrize("pattern", obs_block.PATTERNS)
def test_the_update_of_a_block_is_the_loops(pattern):
    case = obs_block.case(16, pattern, by_columns=True)
    expected = case.reference()
    weight, error, mask = case.contestants["ours"]()
    case.check((weight, error, mask), expected)
    with pytest.raises(AssertionError, match="masks"):
        case.check((weight, error, ~mask), expected)
    with pytest.raises(AssertionError):
        case.check((weight + 1e-2, error, mask), expected)
