"""Iterative pruning of a model whose layers have patterns of their own."""

from __future__ import annotations

import copy

import pytest

from trisparse.retrain.cycles import CyclesConfig, prune_cycles
from trisparse.retrain.perp import retrain
from trisparse.sparsity.allocation import PerLayer
from trisparse.sparsity.mask import check_masks, detach, masks
from trisparse.sparsity.sparsify import sparsify


@pytest.fixture
def allocated(build):
    """A tiny model pruned with an allocation."""

    def make(sparsity, allocation):
        model = copy.deepcopy(build("llama"))
        for module in model.modules():
            detach(module)
        model = type(model)(model.config).train()
        sparsify(model, sparsity, "magnitude", allocation=allocation, progress=False)
        return model

    return make


@pytest.fixture
def config(quick):
    return CyclesConfig(retraining=quick(groups=("norms", "lora"), steps=2), cycles=1)


@pytest.mark.parametrize("allocation", ["lamp", "erk", PerLayer({"*.mlp.*": "2:4", "*.self_attn.*": "25% balanced"})])
def test_cycles_go_on_from_mixed_patterns(allocated, config, tokens, allocation):
    model = allocated("30%", allocation)
    before = {name: mask.matrix() for name, mask in masks(model).items()}
    report = prune_cycles(model, "80% layer", tokens, config, progress=False)
    assert report.cycles[-1].sparsity == pytest.approx(0.8, abs=0.002)  # each layer's count is rounded
    assert all(not (mask.matrix() & ~before[name]).any() for name, mask in masks(model).items() if name in before)
    check_masks(model)


def test_a_target_without_room_for_what_is_pruned_is_refused(allocated, config, tokens):
    model = allocated("50%", PerLayer({"*.mlp.*": "2:4", "*.self_attn.*": "90% layer"}))
    with pytest.raises(ValueError, match=r"has no room for all that is pruned already in .*self_attn"):
        prune_cycles(model, "75% layer", tokens, config, progress=False)


def test_retraining_holds_mixed_patterns(allocated, quick, tokens):
    model = allocated("50%", PerLayer({"*.mlp.*": "2:4", "*.self_attn.*": "61% balanced", "*.k_proj": "50% rows"}))
    before = {name: mask.sha256 for name, mask in masks(model).items()}
    retrain(model, tokens, quick(groups=("norms", "lora"), steps=2), progress=False)
    assert {name: mask.sha256 for name, mask in masks(model).items()} == before
    check_masks(model)
