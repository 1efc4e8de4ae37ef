"""Masks from zeros: the pattern that is found, what is refused, and models whose makers saved zeros alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trisparse
from trisparse.sparsity.foreign.recover import nm_pattern, recover_masks, zero_pattern
from trisparse.sparsity.foreign.survey import describe_survey, survey
from trisparse.sparsity.mask import detach, masks
from trisparse.sparsity.sparsify import sparsify


def bits(*rows):
    return torch.tensor([[int(c) for c in row.replace(" ", "")] for row in rows]).bool()


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        (("1100 0101", "0011 1010"), "2:4"),
        (("10 01 10 10", "01 01 10 01"), "1:2"),  # of which two of four are kept too: the smallest m
        (("111000 101010", "010101 000111"), "3:6"),
        (("11110000", "10110010"), "4:8"),
        (("1110 0000", "1111 0000", "1000 0000"), "66.6667% layer"),
        (("1100 0110", "1011 0000"), "56.25% layer"),
        (("1110 0001", "1100 0011"), "4:8"),
        (("1111 1111", "0000 0000", "1111 1111"), "33.3333% rows"),
        (("1111 1111", "1111 1111"), "None"),
        (("0000 0000", "0000 0000"), "None"),
    ],
)
def test_patterns_by_hand(rows, pattern):
    keep = bits(*rows)
    found, mask, note = zero_pattern(keep)
    assert str(found) == pattern
    assert torch.equal(mask, keep)
    assert bool(note) == (not keep.any())


def test_rows_that_keep_as_many_without_groups():
    keep = torch.zeros(6, 37, dtype=torch.bool)  # 37 columns have no groups
    for row in range(6):
        keep[row, torch.randperm(37, generator=torch.Generator().manual_seed(row))[:18]] = True
    assert str(zero_pattern(keep)[0]) == "51.3514%"
    keep[0] = True
    assert str(zero_pattern(keep)[0]).endswith("layer")


def test_kept_weights_that_are_zero_are_kept():
    keep = bits(*["1100 0101 0011 1010"] * 30)
    alive = keep.clone()
    alive[3, 0] = alive[7, 14] = False  # 2 of 240: below 1%
    pattern, mask, note = zero_pattern(alive)
    assert str(pattern) == "2:4"
    assert note == "2 zeros are kept weights"
    assert nm_pattern(mask) == pattern
    assert bool((mask | ~alive).all())  # nothing that is not zero is pruned
    assert mask[3, :4].tolist() == [True, True, False, False]  # the first zero of the group
    assert mask[7, 12:].tolist() == [True, True, False, False]
    alive[8:12] = False  # 34 of 240: no longer an accident
    assert str(zero_pattern(alive)[0]).endswith("layer")


def test_a_few_zeros_are_a_dense_weight():
    keep = torch.ones(10, 10, dtype=torch.bool)
    keep.view(-1)[:4] = False
    assert zero_pattern(keep)[0] is None
    assert str(zero_pattern(keep, 0.04)[0]) == "4% layer"
    with pytest.raises(ValueError, match=r"min_sparsity must be in \(0, 1\], got 0"):
        recover_masks(torch.nn.Linear(2, 2), min_sparsity=0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mask_of_zeros_prunes_nothing_that_is_there(data):
    rows, cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    share = data.draw(st.sampled_from([0.02, 0.3, 0.5, 0.9, 0.99]))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    alive = torch.rand(rows, cols, generator=seed) >= share
    pattern, mask, _ = zero_pattern(alive)
    assert bool((mask | ~alive).all())
    if pattern is None:
        assert mask is alive
    else:
        assert int((mask & ~alive).sum()) <= 0.011 * int(mask.sum())


@pytest.mark.parametrize("sparsity", ["2:4", "50%", "4:8", "30% layer"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_masks_come_back_from_zeros(model_named, name, sparsity):
    model = model_named(name)
    sparsify(model, sparsity, "magnitude", progress=False)
    before = masks(model)
    for module in model.modules():
        detach(module)
    rows = {row.name: row for row in recover_masks(model)}
    found = masks(model)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[n].bits, mask.bits) for n, mask in before.items())
    if ":" in sparsity:
        assert {str(mask.pattern) for mask in found.values()} == {sparsity}
    assert all(rows[n].kept == mask.kept for n, mask in found.items())
    with pytest.raises(ValueError, match="has masks already"):
        recover_masks(model)


def test_a_dense_model_has_nothing_to_recover(model_named):
    model = model_named("llama")
    with pytest.raises(ValueError, match=r"no weight of the model has 5% zeros or more: .* has most, 0\.00%"):
        recover_masks(model)
    assert not masks(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet"])
def test_survey_reads_the_files_alone(model_named, name, tmp_path, monkeypatch):
    model = model_named(name)
    sparsify(model, "2:4", "magnitude", progress=False)
    patterns = {n: str(mask.pattern) for n, mask in masks(model).items()}
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_: pytest.fail("it loaded the model"))
    found = {row.name: row.pattern for row in survey(tmp_path) if row.pattern is not None}
    prefix = "transformer." if name == "gpt2" else ""
    assert {n if n in patterns else prefix + n: p for n, p in found.items()} == patterns
    assert f"{len(patterns)} of " in describe_survey(survey(tmp_path))


def test_recover_masks_is_public():
    assert trisparse.recover_masks is recover_masks
