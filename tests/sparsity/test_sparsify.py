import json

import datasets
import pytest
import torch
from torch import nn

from trisparse.sparsity import pruning
from trisparse.sparsity.mask import check_masks, masks, masks_sha256
from trisparse.sparsity.metric import METRICS
from trisparse.sparsity.pattern import Rows, Unstructured
from trisparse.sparsity.sparsify import sparsify


def run(model, *args, **options):
    return sparsify(model, *args, progress=False, **options)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return not masks(model) and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def matrix_zeros(model, name, mask):
    weight = model.get_parameter(name).detach()
    return (weight.transpose(-1, -2) if mask.transposed else weight).reshape(-1, mask.cols) == 0


@pytest.mark.parametrize("sparsity", ["50%", "2:4", "25% rows", "62.5% layer", "50% global"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "random"])
def test_every_method_meets_every_budget_on_every_language_model(language_model, tokens, method, sparsity):
    data = tokens if "X" in METRICS[method].uses else None
    propagate = "dense" if "global" in sparsity else "block"
    report = run(language_model, sparsity, method, data, samples=8, seq_len=16, propagate=propagate)
    found = masks(language_model)
    assert [row.name for row in report.targets] == list(found) or set(found) == {row.name for row in report.targets}
    for name, mask in found.items():
        keep = mask.matrix()
        if sparsity == "50%":
            assert (keep.sum(1) == keep.shape[1] // 2).all()
        elif sparsity == "2:4":
            assert (keep.view(keep.shape[0], -1, 4).sum(2) == 2).all()
        elif sparsity == "25% rows":
            assert keep.any(1).sum() == keep.shape[0] * 3 // 4
            assert (keep.all(1) == keep.any(1)).all()
        elif sparsity == "62.5% layer":
            assert keep.sum() == keep.numel() * 3 // 8
        assert (matrix_zeros(language_model, name, mask) | keep).all()
    expected = {"50%": 0.5, "2:4": 0.5, "25% rows": 0.25, "62.5% layer": 0.625, "50% global": 0.5}[sparsity]
    assert report.kept == round(report.total * (1 - expected))
    check_masks(language_model)
    with torch.no_grad():
        assert torch.isfinite(language_model(input_ids=tokens).logits).all()


def test_magnitude_by_hand():
    model = nn.Linear(4, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, -4, 3, 0.5], [2.0, 2.0, -2.0, 2.0]])
    run(model, "2:4")
    assert model.weight.data.tolist() == [[0, -4, 3, 0], [2, 2, 0, 0]]


def test_wanda_by_hand():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[4.0, 3, 2, 1]])
    x = torch.tensor([[0.1, 1.0, 1.0, 5.0]])  # scores 0.4, 3, 2, 5
    report = run(model, 0.5, data=[x])
    assert report.method == "wanda"
    assert model.weight.data.tolist() == [[0, 3, 0, 1]]


def test_rows_by_hand():
    model = nn.Linear(2, 4, bias=False)
    model.weight.data = torch.tensor([[3.0, 4.0], [5.0, 0.5], [1.0, 1.0], [0.0, 9.0]])
    run(model, Rows(0.5))
    assert model.weight.data.tolist() == [[0, 0], [5, 0.5], [0, 0], [0, 9]]


def test_global_budget_by_hand():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 9.0]])
    model[1].weight.data = torch.tensor([[2.0], [3.0]])
    run(model, Unstructured(0.5, scope="global"))
    assert model[0].weight.data.tolist() == [[0, 9]]
    assert model[1].weight.data.tolist() == [[0], [3]]


def test_resnet_with_and_without_data(model_named):
    images = [{"pixel_values": torch.rand(2, 3, 32, 32)} for _ in range(2)]
    for options in (
        {"method": "magnitude"},
        {"data": images},
        {"data": images, "sparsity": "2:4", "include": "*.layer"},
    ):
        model = model_named("resnet")
        report = run(model, **{"sparsity": "50%", **options})
        assert report.sparsity == 0.5
        assert report.samples == (4 if "data" in options else 0)
        assert torch.isfinite(model(**images[0]).logits).all()


def test_outside_the_blocks_on_request(model_named):
    model = model_named("resnet")
    data = [{"pixel_values": torch.rand(2, 3, 32, 32)}]
    report = run(model, "50%", "wanda", data, include=["*embedder*", "classifier", "*.stages.1"])
    names = [row.name for row in report.targets]
    assert "classifier.1.weight" in names
    assert "resnet.embedder.embedder.convolution.weight" in names
    assert not any("stages.0" in name for name in names)


def test_forms_of_data_give_the_same_masks(model_named, tokens):
    class Words:
        """Each character is a token."""

        def __call__(self, texts, **options):
            flat = [[ord(c) % 96 for c in text] for text in ([texts] if isinstance(texts, str) else texts)]
            return {"input_ids": flat if not isinstance(texts, str) else flat[0]}

    rows = [{"input_ids": row.tolist()} for row in tokens]
    sources = [
        tokens,
        datasets.Dataset.from_list(rows),
        [{"input_ids": part} for part in tokens.split(4)],
        tokens.split(2),
    ]
    hashes = set()
    for data in sources:
        model = model_named("llama")
        run(model, "2:4", "wanda", data, samples=8, seq_len=16, dtype=torch.float32)
        hashes.add(masks_sha256(model))
    assert len(hashes) == 1


def test_same_seed_same_mask(model_named, tokens):
    hashes = []
    for seed in (1, 1, 2):
        model = model_named("llama")
        run(model, "50%", "random", seed=seed)
        hashes.append(masks_sha256(model))
    assert hashes[0] == hashes[1] != hashes[2]


def test_tied_weight_is_pruned_once(model_named):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    report = run(model, "50%")
    assert [row.name for row in report.targets] == ["0.weight"]
    assert [(row.name, row.share) for row in report.skipped if "tied" in row.reason] == [("1.weight", 0)]


def test_a_layer_that_is_never_called_is_left_and_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    report = run(model := Model(), "50%", data=[torch.rand(2, 4)])
    assert [row.name for row in report.targets] == ["used.weight"]
    assert {row.name: row.reason for row in report.skipped}["unused.weight"] == "no calibration input reached it"
    assert (model.unused.weight != 0).all()


def test_report_adds_up_and_serialises(model_named, tokens):
    model = model_named("mixtral")
    report = run(model, "2:4", "wanda", tokens, samples=4, seq_len=16)
    assert (report.samples, report.tokens, report.propagate) == (4, 64, "block")
    assert report.parameters == model.num_parameters()
    shares = sum(row.share for row in report.skipped)
    assert report.total / report.parameters + shares == pytest.approx(1)
    content = json.loads(report.to_json())
    assert content == json.loads(json.dumps(report.to_dict()))
    assert content["targets"][0]["sparsity"] == 0.5
    text = str(report)
    assert "model.layers.*.mlp.experts.gate_up_proj (3)" in text
    assert "50.00% of" in text
    assert "embedding" in text


def test_bf16_compute_is_close_to_fp32(model_named, tokens):
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model_named("llama")
        run(model, "50%", "wanda", tokens, samples=8, seq_len=16, dtype=dtype)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        kept.append(torch.cat([mask.dense().flatten() for mask in masks(model).values()]))
    assert (kept[0] != kept[1]).float().mean() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": "4:2"}, "n of an n:m pattern"),
        ({"sparsity": "2:5"}, r"divisible by 5.*q_proj\.weight \(32\)"),
        (
            {"method": "best"},
            "method must be one of auto, magnitude, wanda, pruner-zero, gblm, snip, ria, searched-smollm2, random",
        ),
        ({"method": "wanda"}, "pass data"),
        ({"propagate": "all"}, "propagate must be one of"),
        ({"data": []}, "data"),
        ({"data": ""}, "data"),
        ({"data": ["some text"]}, "tokenizer"),
        ({"data": torch.zeros(5, dtype=torch.long)}, "too short"),
        ({"data": torch.rand(8, 16)}, "data"),
        ({"data": torch.full((2, 16), 96)}, "vocab_size=96"),
        ({"data": [{"input_ids": torch.full((2, 16), -1)}]}, "must not be negative"),
        ({"data": [{"inputs_embeds": torch.full((1, 4, 32), float("nan"))}]}, "NaN"),
        ({"data": [object()]}, "data"),
        ({"data": torch.zeros(2, 16, dtype=torch.long), "samples": 0}, "samples must be at least 1"),
        ({"data": torch.zeros(2, 99, dtype=torch.long), "seq_len": 65}, "seq_len must be at most"),
        ({"data": torch.zeros(2, 16, dtype=torch.long), "seq_len": 1}, "seq_len must be at least 2"),
        (
            {"sparsity": "50% global", "method": "wanda", "data": torch.zeros(2, 16, dtype=torch.long)},
            "propagate='dense'",
        ),
        ({"include": "nope"}, "include matches no parameter"),
        ({"data": [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}] * 2, "propagate": "linear"}, "as one batch"),
    ],
)
def test_wrong_input_is_named_and_changes_nothing(model_named, options, message):
    model = model_named("llama")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        run(model, **({"seq_len": 16} | options if "data" in options else options))
    assert unchanged(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(model_named, value):
    model = model_named("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = value
    with pytest.raises(ValueError, match=r"NaN or Inf weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        run(model, "50%")
    assert not masks(model)


def test_fused_experts_refuse_what_they_cannot_do(model_named, tokens):
    model = model_named("mixtral")
    with pytest.raises(ValueError, match="cannot prune fused experts"):
        run(model, "50%", "wanda", tokens, seq_len=16, propagate="linear")
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens).index_fill(1, torch.tensor([15]), 0)}
    with pytest.raises(ValueError, match="padded"):
        run(model, "50%", "wanda", [batch])
    assert not masks(model)


@pytest.mark.parametrize("propagate", ["block", "dense", "linear"])
def test_failure_in_the_middle_leaves_whole_blocks(model_named, tokens, monkeypatch, propagate):
    model = model_named("llama")
    before = state(model)
    real, count = pruning.select, [0]

    def fails_in_the_second_block(*args):
        count[0] += 1
        if count[0] == 10:
            raise MemoryError("no more")
        return real(*args)

    monkeypatch.setattr(pruning, "select", fails_in_the_second_block)
    with pytest.raises(MemoryError) as caught:
        run(model, "50%", "wanda", tokens, samples=8, seq_len=16, propagate=propagate)
    assert "pruned up to model.layers.0." in caught.value.__notes__[0]
    assert {name.split(".")[2] for name in masks(model)} == {"0"}
    assert len(masks(model)) == 7
    check_masks(model)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert name in masks(model) or torch.equal(value, before[name])


def test_pruning_again_replaces_the_masks(model_named, tokens):
    model = model_named("llama")
    run(model, "50%")
    run(model, "1:4")
    assert all(mask.sparsity == 0.75 for mask in masks(model).values())
    check_masks(model)
