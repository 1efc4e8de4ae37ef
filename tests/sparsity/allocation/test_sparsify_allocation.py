"""Allocations end to end: through ``sparsify``, with every method, and what comes after pruning."""

import json

import pytest
import torch
from torch import nn

import trisparse
from trisparse.sparsity import sparsify as sparsify_module
from trisparse.sparsity.allocation import ERK, LAMP, OWL, PerLayer, UniformPlus
from trisparse.sparsity.calibration import walk
from trisparse.sparsity.checkpoint import load, save
from trisparse.sparsity.compression import compress, decompress
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import check_masks, masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify

MIXED = {"*.mlp.*": "2:4", "*.self_attn.*": "4:8", "*.0.*": "dense"}


def run(model, *args, **options):
    return sparsify(model, *args, progress=False, samples=8, seq_len=16, **options)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return not masks(model) and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 16, 3)
        self.classifier = nn.Linear(16, 10)

    def forward(self, pixels):
        hidden = torch.relu(self.second(torch.relu(self.first(pixels))))
        return self.classifier(hidden.mean((2, 3)))


@pytest.mark.parametrize("sparsity", ["60%", "60% layer", "4:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "random", "abs(W) * G", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["uniform", "erk", "lamp", "owl:M=3,lambda=0.2"])
def test_every_method_meets_every_budget(model_named, tokens, allocation, method, sparsity):
    model = model_named("llama")
    report = run(model, sparsity, method, tokens, allocation=allocation)
    budget = report.total + report.left_dense
    pruned = round(budget * (0.5 if sparsity == "4:8" else 0.6))
    assert report.total - report.kept == pruned
    assert report.allocated_sparsity == pytest.approx(pruned / budget)
    found = masks(model)
    assert {row.name: row.pattern for row in report.targets} == {n: str(mask.pattern) for n, mask in found.items()}
    if allocation != "uniform":
        assert len({round(mask.sparsity, 2) for mask in found.values()}) > 1
    for mask in found.values():
        per_row = mask.matrix().sum(1)
        if sparsity != "60% layer":
            assert per_row.max() - per_row.min() <= 1
        if sparsity == "4:8":
            groups = mask.matrix().view(per_row.numel(), -1, 8).sum(2)
            assert (groups == mask.pattern.n).all()
    check_masks(model)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens).logits).all()


@pytest.mark.parametrize("name", ["opt", "mixtral", "gpt2", "gpt-oss"])
@pytest.mark.parametrize("allocation", [OWL(M=3, lambda_=0.1), ERK(), LAMP()], ids=str)
def test_other_architectures(model_named, tokens, name, allocation):
    model = model_named(name)
    report = run(model, "70%", "wanda", tokens, allocation=allocation, propagate="dense")
    assert report.total - report.kept == round((report.total + report.left_dense) * 0.7)
    check_masks(model)


@pytest.mark.parametrize("allocation", ["uniform+", "erk", "lamp", "owl", "global", "uniform"])
def test_a_conv_net(allocation):
    model = ConvNet()
    data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    report = run(model, "80%", "wanda", data, allocation=allocation, propagate="dense")
    assert report.total - report.kept == round((report.total + report.left_dense) * 0.8)
    if allocation == "uniform+":
        assert set(masks(model)) == {"second.weight", "classifier.weight"}
        assert masks(model)["classifier.weight"].kept == 32  # a fifth of 160
        assert ("first.weight", "dense by allocation") in [(row.name, row.reason) for row in report.skipped]
    check_masks(model)


def test_lamp_by_magnitude_is_one_threshold_over_its_scores(model_named):
    model, dense = model_named("llama"), model_named("llama")
    run(model, "60% layer", "magnitude", allocation="lamp")
    scores = []
    for name in masks(model):
        square = dense.get_parameter(name).detach().double().square().flatten()
        order = square.argsort(descending=True)
        score = torch.empty_like(square)
        score[order] = square[order] / square[order].cumsum(0)
        scores.append((name, score))
    total = torch.cat([score for _, score in scores])
    threshold = total.sort(descending=True).values[round(0.4 * len(total)) - 1]
    for name, score in scores:
        assert torch.equal(masks(model)[name].dense().flatten(), score >= threshold)


def test_global_is_the_scope(model_named, tokens):
    model, other = model_named("llama"), model_named("llama")
    report = run(model, "60%", "wanda", tokens, allocation="global", propagate="dense")
    run(other, "60% global", "wanda", tokens, propagate="dense")
    assert masks_sha256(model) == masks_sha256(other)
    assert (report.pattern, report.allocation) == ("60% global", "global")
    with pytest.raises(ValueError, match="it needs propagate='dense'"):
        run(model_named("llama"), "60%", "wanda", tokens, allocation="global")


def test_uniform_is_what_every_layer_gets_anyway_where_rows_divide(model_named, tokens):
    model, other = model_named("llama"), model_named("llama")
    run(model, "50%", "wanda", tokens, allocation="uniform")
    run(other, "50%", "wanda", tokens)
    assert masks_sha256(model) == masks_sha256(other)
    assert {str(mask.pattern) for mask in masks(model).values()} == {"50%"}


def test_explicit_patterns(model_named, tokens):
    model = model_named("llama")
    report = run(model, "50%", "wanda", tokens, allocation=PerLayer(MIXED))
    patterns = {name: str(mask.pattern) for name, mask in masks(model).items()}
    assert len(patterns) == 14
    assert all(pattern == ("2:4" if ".mlp." in name else "4:8") for name, pattern in patterns.items())
    dense = [row for row in report.skipped if row.reason == "dense by allocation"]
    assert len(dense) == 7
    assert all(".0." in row.name for row in dense)
    assert report.left_dense == sum(row.parameters for row in dense)
    assert report.sparsity == 0.5
    assert report.allocated_sparsity == pytest.approx(1 / 3)
    assert report.pattern == "mixed"


def test_dense_layers_are_neither_measured_nor_pruned(model_named, tokens):
    model, dense = model_named("llama"), model_named("llama")
    run(model, "50%", "wanda", tokens, allocation=PerLayer({"*.0.*": "dense", "*.down_proj": "dense"}))
    for name in masks(model):
        assert ".0." not in name
        assert "down_proj" not in name
    for name, value in model.state_dict().items():
        if name not in masks(model):
            assert torch.equal(value, dense.state_dict()[name])


@pytest.mark.parametrize("propagate", ["block", "dense", "linear"])
def test_owl_measures_the_dense_model_once(model_named, tokens, monkeypatch, propagate):
    passes = []

    def counted(*args, **options):
        passes.append(options["propagate"])
        return walk(*args, **options)

    monkeypatch.setattr("trisparse.sparsity.sparsify.walk", counted)
    monkeypatch.setattr("trisparse.sparsity.allocation.allocate.walk", counted)
    model = model_named("llama")
    run(model, "60%", "wanda", tokens, allocation="owl", propagate=propagate)
    assert passes == (["dense"] if propagate == "dense" else ["dense", propagate])
    assert len(masks(model)) == 21


def test_one_pass_gives_the_masks_of_two(model_named, tokens):
    one, two = model_named("llama"), model_named("llama")
    run(one, "60%", "wanda", tokens, allocation="owl", propagate="dense")
    patterns = {name: mask.pattern for name, mask in masks(one).items()}
    run(two, "60%", "wanda", tokens, allocation=PerLayer(patterns), propagate="dense")
    assert masks_sha256(one) == masks_sha256(two)


def test_one_pass_leaves_dense_layers_alone(model_named, tokens):
    model = model_named("llama")
    report = run(model, "10%", "wanda", tokens, allocation="owl:M=3,lambda=0.2", propagate="dense")
    assert report.left_dense > 0  # at S = 10%, a block may be at 0%
    assert report.total - report.kept == round(0.1 * (report.total + report.left_dense))
    assert not {row.name for row in report.skipped if row.reason == "dense by allocation"} & set(masks(model))


def test_updates_of_the_dense_model_measure_hessians_of_their_own(model_named, tokens):
    model = model_named("llama")
    report = run(model, "60%", "sparsegpt", tokens, allocation="owl:M=3,lambda=0.2", propagate="dense")
    assert report.allocated_sparsity == pytest.approx(0.6, abs=1e-4)
    assert all(row.damping == 0.01 for row in report.targets)
    rows = run(model_named("llama"), "60%", "wanda", tokens, allocation="owl:M=3,lambda=0.2", propagate="dense").targets
    assert [row.pattern for row in rows] == [row.pattern for row in report.targets]
    with pytest.raises(ValueError, match="a pruned row keeps none"):
        run(model_named("llama"), "60%", "sparsegpt", tokens, allocation=PerLayer({"*.mlp.*": "50% rows"}))


def test_owl_with_magnitude_reads_the_data_for_the_allocation_alone(model_named, tokens):
    model = model_named("llama")
    report = run(model, "60%", "magnitude", tokens, allocation="owl")
    assert (report.method, report.propagate, report.samples) == ("magnitude", None, 8)


def test_report_shows_the_allocation(model_named, tokens):
    report = run(model_named("llama"), "60%", "wanda", tokens, allocation="owl:M=3,lambda=0.1")
    content = json.loads(report.to_json())
    assert content["allocation"] == "owl:M=3,lambda=0.1"
    assert content["allocated_sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert "wanda 60%, allocation owl:M=3,lambda=0.1" in str(report)
    erk = run(model_named("llama"), "30%", "magnitude", allocation=ERK())
    assert erk.left_dense > 0
    assert "dense by allocation" in str(erk)
    assert "with the layers that the allocation leaves dense" in str(erk)
    assert run(model_named("llama"), "30%", "magnitude").allocation is None


@pytest.mark.parametrize(
    ("sparsity", "options", "message"),
    [
        ("60%", {"allocation": "owl"}, "owl:M=5,lambda=0.08 weighs the layers' inputs: pass data"),
        ("60%", {"allocation": "erks"}, "allocation must be one of"),
        ("60% global", {"allocation": "erk"}, "60% global is itself an allocation"),
        ("25% rows", {"allocation": "lamp"}, "prunes whole rows"),
        ("60%", {"allocation": UniformPlus()}, "neither is pruned"),
        ("99.99%", {"allocation": "erk"}, "keeps 2 weights of 21 layers"),
        (0.0, {"allocation": "erk"}, "leaves every weight dense"),
        ("60%", {"allocation": PerLayer({"*": "dense"})}, "leaves every weight dense"),
        ("60%", {"allocation": PerLayer({"*.router": 0.5})}, "matches none of the weights"),
        ("3:5", {"allocation": "erk"}, "divisible by 5"),
    ],
)
def test_wrong_input_changes_nothing(model_named, sparsity, options, message):
    model = model_named("llama")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        run(model, sparsity, "magnitude", **options)
    assert unchanged(model, before)


def test_a_layer_that_was_pruned_before_cannot_be_left_dense(model_named):
    model = model_named("llama")
    run(model, "50%", "magnitude")
    before = masks_sha256(model)
    with pytest.raises(ValueError, match=r"leaves .*layers\.0.* dense, which was pruned before"):
        run(model, "50%", "magnitude", allocation=PerLayer(MIXED))
    assert masks_sha256(model) == before


def test_pruned_further_with_another_allocation(model_named):
    model = model_named("llama")
    run(model, "30%", "magnitude", allocation="lamp")
    first = {name: mask.matrix() for name, mask in masks(model).items()}
    run(model, "80%", "magnitude", allocation="erk")
    for name, mask in masks(model).items():
        if name in first and mask.kept <= first[name].sum():
            assert (mask.matrix().sum(1) > first[name].sum(1)).any() or not (mask.matrix() & ~first[name]).any()
    check_masks(model)


def test_mixed_patterns_are_saved_loaded_and_compressed(model_named, tokens, tmp_path):
    model = model_named("llama")
    values = {"*.mlp.*": "2:4", "*.self_attn.*": "4:8", "*.v_proj": "61% balanced", "*.o_proj": "62% layer"}
    run(model, "50%", "wanda", tokens, allocation=PerLayer({**values, "*.0.*": "dense"}))
    patterns = {name: str(mask.pattern) for name, mask in masks(model).items()}
    assert set(patterns.values()) == {"2:4", "4:8", "61% balanced", "62% layer"}
    save(model, tmp_path / "mixed")
    again = load(tmp_path / "mixed")
    assert {name: str(mask.pattern) for name, mask in masks(again).items()} == patterns
    assert masks_sha256(again) == masks_sha256(model)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    report = compress(model, prefer="memory")
    made = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    assert {layer.format for layer in made.values()} == {"2:4", "n:m", "bitmask"}
    assert len(made) + sum(bool(row.note) for row in report.layers) == len(patterns) == len(report.layers)
    assert not any(".0." in name for name in made)
    assert {row.name: row.pattern for row in report.layers} == patterns
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)
    assert decompress(model) == len(made)
    assert masks_sha256(model) == masks_sha256(again)


def test_public_names():
    assert trisparse.OWL is OWL
    assert trisparse.PerLayer is PerLayer
    assert sparsify_module.sparsify is trisparse.sparsify
