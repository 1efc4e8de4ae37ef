"""Iterative pruning on tiny models: each cycle's sparsity, nested masks, freezing, collapse, wrong input."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers

from trisparse.retrain import cycles as cycles_module
from trisparse.retrain.batch_settings import batch_settings
from trisparse.retrain.cycles import CyclesConfig, LayerCollapseError, prune_cycles
from trisparse.retrain.freezing import GradualFreezing
from trisparse.retrain.loop import RetrainError
from trisparse.retrain.perp import parameter_count, retrain, training_windows
from trisparse.sparsity.compression import compress
from trisparse.sparsity.mask import Mask, MaskError, attach, check_masks, masks, masks_sha256
from trisparse.sparsity.pattern import NM, Unstructured
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.sparsify import sparsify

_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def dense(build):
    """A tiny dense model."""

    def make(kind="llama"):
        model = copy.deepcopy(build(kind))
        torch.manual_seed(3)
        return type(model)(model.config).train()

    return make


@pytest.fixture
def config(quick):
    def make(retraining=None, **changes):
        own = {"groups": ("norms", "lora"), "steps": 2, **(retraining or {})}
        return CyclesConfig(retraining=quick(**own), **changes)

    return make


@pytest.fixture
def watched(monkeypatch):
    """What ``retrain`` was called with, and the masks and weights at the time."""
    seen = []

    def watch(model, data, config, **options):
        weights = {name: model.get_parameter(name).clone() for name in masks(model)}
        seen.append({"config": config, "options": options, "masks": dict(masks(model)), "weights": weights})
        return retrain(model, data, config, **options)

    monkeypatch.setattr(cycles_module, "retrain", watch)
    return seen


def run(model, target, data, config, **options):
    return prune_cycles(model, target, data, config, progress=False, **options)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("target", ["75%", "75% layer", "75% global", "50% rows", "1:4"])
def test_cycles_reach_the_target_by_nested_masks(dense, config, tokens, watched, method, target):
    model = dense()
    together = "global" in target
    settings = config(
        cycles=3,
        schedule="linear",
        method=method,
        propagate="dense" if together else "block",
        allow_collapse=together,  # the inputs of a random model's down_proj are so small that all of it goes
    )
    report = run(model, target, tokens, settings, validation=tokens)
    last = 0.5 if "rows" in target else 0.75
    assert [cycle.sparsity for cycle in report.cycles] == pytest.approx([last / 3, 2 * last / 3, last], abs=0.03)
    assert report.sparsity == last
    if target == "1:4":
        assert [cycle.pattern for cycle in report.cycles] == ["3:4", "2:4", "1:4"]
    assert len(watched) == 3
    for earlier, later in pairwise(watched):
        for name, mask in later["masks"].items():
            assert not (mask.dense() & ~earlier["masks"][name].dense()).any(), name
    assert {name: mask.sha256 for name, mask in masks(model).items()} == {
        name: mask.sha256 for name, mask in watched[-1]["masks"].items()
    }
    check_masks(model)


def test_each_cycle_retrains_what_the_one_before_left(dense, config, tokens, watched):
    model = dense()
    report = run(model, "50%", tokens, config(cycles=2), validation=tokens)
    assert [seen["config"].seed for seen in watched] == [0, 1]
    # the weights that the second cycle prunes are those that the first one had trained
    first, second = (seen["weights"] for seen in watched)
    moved = [
        name for name, mask in watched[1]["masks"].items() if not torch.equal(second[name], first[name] * mask.dense())
    ]
    assert len(moved) == 14
    assert report.cycles[-1].perplexity == perplexity(model, tokens, seq_len=16)
    assert report.perplexity == report.cycles[-1].perplexity
    assert report.perplexity_before == perplexity(_same_start(dense), tokens, seq_len=16)
    assert all(cycle.perplexity < cycle.perplexity_pruned for cycle in report.cycles)


def _same_start(dense):
    return dense()


def test_perplexity_falls_with_retraining_and_the_report_serialises(dense, config, tokens):
    report = run(
        dense(), "2:4", tokens, config(cycles=2, schedule="linear", retraining={"steps": 10}), validation=tokens
    )
    assert all(cycle.perplexity < cycle.perplexity_pruned for cycle in report.cycles)
    assert all(cycle.last_loss < cycle.first_loss for cycle in report.cycles)
    read = json.loads(report.to_json())
    assert read["cycles"][0]["pattern"] == "3:4"
    assert read["perplexity"] == report.perplexity
    assert read["method"] == "magnitude"
    text = str(report)
    assert "3:4" in text
    assert "linear schedule" in text
    assert "50.00%" in text


def test_without_validation_nothing_is_measured(dense, config, tokens):
    report = run(dense(), "50%", tokens, config(cycles=1))
    assert report.perplexity_before is None
    assert report.perplexity is None
    assert "perplexity before" not in str(report)


def test_one_cycle_is_sparsify_and_retrain(dense, config, tokens):
    settings = config(cycles=1, method="wanda")
    one, two = dense(), dense()
    run(one, "50%", tokens, settings)
    own = settings.retraining
    windows = training_windows(two, tokens, None, own, batch_settings(own, parameter_count(two)), None)[0]
    sparsify(two, "50%", "wanda", windows, seq_len=16, progress=False)
    retrain(two, windows, settings.retraining, progress=False)
    assert masks_sha256(one) == masks_sha256(two)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_pruned_model_starts_from_its_own_sparsity(dense, config, tokens):
    model = dense()
    sparsify(model, "50%", "magnitude", progress=False)
    earlier = {name: mask.dense() for name, mask in masks(model).items()}
    report = run(model, "75%", tokens, config(cycles=2, schedule="linear"))
    assert report.start_sparsity == 0.5
    assert [cycle.sparsity for cycle in report.cycles] == pytest.approx([0.625, 0.75], abs=0.01)
    assert all(not (mask.dense() & ~earlier[name]).any() for name, mask in masks(model).items())


@pytest.mark.parametrize(
    ("mode", "start"), [("unfreeze", "output"), ("freeze", "input"), ("unfreeze", "input"), ("freeze", "output")]
)
def test_freezing_trains_a_part_in_each_step(dense, config, tokens, mode, start):
    plain = run(dense(), "50%", tokens, config(cycles=2, retraining={"steps": 4}))
    settings = config(cycles=2, retraining={"steps": 4}, freezing=GradualFreezing(mode, start, stages=4))
    report = run(dense(), "50%", tokens, settings)
    # 14 layers: 3, 7, 10 and 14 are reached; by the layer, LoRAs are of two sizes, norms always train
    reached = (3 + 7 + 10 + 14) / (4 * 14)
    share = reached if mode == "unfreeze" else 1 - reached
    for frozen, whole in zip(report.cycles, plain.cycles, strict=True):
        assert frozen.trainable_share / whole.trainable_share == pytest.approx(share, abs=0.08)
        assert frozen.trainable_share < whole.trainable_share


def test_freezing_leaves_what_is_never_unfrozen(dense, config, tokens, watched):
    settings = config(cycles=1, freezing=GradualFreezing("freeze", "input", stages=1))
    model = dense()
    run(model, "50%", tokens, settings)
    for name, weight in watched[0]["weights"].items():
        assert torch.equal(model.get_parameter(name), weight), name
    assert not torch.equal(model.model.norm.weight, torch.ones(16))


def test_checkpoints_of_each_cycle_have_a_folder(dense, config, tokens, tmp_path):
    run(dense(), "50%", tokens, config(cycles=2, retraining={"output_dir": tmp_path, "save_steps": 1}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cycle-1", "cycle-2", "cycles.json"]
    assert (tmp_path / "cycle-2" / "checkpoint-2").is_dir()


def test_a_teacher_is_distilled_from_in_each_cycle(dense, config, tokens, watched):
    teacher, model, alone = dense().eval(), dense(), dense()
    settings = config(cycles=2, retraining={"distillation_weight": 1.0})
    report = run(model, "50%", tokens, settings, teacher=teacher)
    assert [seen["options"]["teacher"] for seen in watched] == [teacher, teacher]
    without = run(alone, "50%", tokens, settings)
    assert report.cycles[0].first_loss != without.cycles[0].first_loss
    other = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**_SMALL, "vocab_size": 40}))
    model = dense()
    with pytest.raises(ValueError, match="teacher"):
        run(model, "50%", tokens, settings, teacher=other)
    assert not masks(model)


def test_each_cycle_chooses_its_own_rate(dense, config, tokens, watched):
    rates = {"learning_rate": "grid", "learning_rates": (1e-4, 1e-2), "grid_steps": 2}
    report = run(dense(), "50%", tokens, config(cycles=2, retraining=rates), validation=tokens[:4])
    assert [cycle.learning_rate for cycle in report.cycles] == [1e-2, 1e-2]
    assert all(torch.equal(seen["options"]["validation"], watched[0]["options"]["validation"]) for seen in watched)
    model = dense()
    with pytest.raises(ValueError, match="learning_rate='grid' chooses by the loss on validation data"):
        run(model, "50%", tokens, config(cycles=2, retraining=rates))
    assert not masks(model)
    fixed = run(dense(), "50%", tokens, config(cycles=1), validation=tokens[:4])
    assert fixed.cycles[0].learning_rate == 1e-2
    assert watched[-1]["options"]["validation"] is None  # the perplexity is measured once, not the loss beside it


def test_what_retraining_left_out_is_reported(dense, config, tokens, monkeypatch):
    def skips(*args, **options):
        report = retrain(*args, **options)
        return replace(report, skipped_steps=1, not_covered=["a layer: no reason"], learning_rate=report.seconds)

    monkeypatch.setattr(cycles_module, "retrain", skips)
    report = run(dense(), "50%", tokens, config(cycles=2, retraining={"groups": ("biases", "lora")}))
    assert [cycle.missing for cycle in report.cycles] == [["biases"]] * 2
    assert [cycle.skipped_steps for cycle in report.cycles] == [1, 1]
    text = str(report)
    assert "missing: the model has no biases" in text
    assert "not covered: a layer: no reason" in text
    assert "skipped: 2 steps" in text
    assert "learning rates: " in text
    assert json.loads(report.to_json())["cycles"][0]["not_covered"] == ["a layer: no reason"]


def test_sharded_weights_are_refused_before_anything(dense, config, tokens, monkeypatch):
    model = dense()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed"):
        run(model, "50%", tokens, config())
    assert not masks(model)


def small_last_layer(model):
    """Make one layer's weights so small that a budget over all layers takes them all."""
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1e-6)
    return model


def test_a_collapse_by_a_common_budget_raises_and_the_cycle_is_undone(dense, config, tokens, watched):
    model = small_last_layer(dense())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = config(cycles=2, retraining={"groups": ("norms",)})
    with pytest.raises(
        LayerCollapseError, match=r"global would prune model.layers.1.self_attn.k_proj.weight wholly"
    ) as e:
        run(model, "50% global", tokens, settings)
    assert "prune_cycles stopped in cycle 1 of 2" in e.value.__notes__[-1]
    assert not masks(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not watched


def test_a_collapse_brings_earlier_masks_back(dense, config, tokens, watched):
    model = small_last_layer(dense())
    sparsify(model, Unstructured(0.02, "layer"), "magnitude", progress=False)
    digest = masks_sha256(model)
    with pytest.raises(LayerCollapseError):
        run(model, "60% global", tokens, config(cycles=1, retraining={"groups": ("norms",)}))
    assert masks_sha256(model) == digest
    check_masks(model)


def test_a_collapse_may_be_allowed(dense, config, tokens):
    report = run(small_last_layer(dense()), "50% global", tokens, config(cycles=1, allow_collapse=True))
    assert report.cycles[0].collapsed == ["model.layers.1.self_attn.k_proj.weight"]
    assert "wholly pruned: model.layers.1.self_attn.k_proj.weight" in str(report)


@pytest.mark.parametrize("target", ["97%", "99.9% layer", "97% rows"])
def test_a_collapse_by_the_shapes_is_known_before_anything(dense, config, tokens, target):
    model = dense()
    with pytest.raises(LayerCollapseError, match=r"would prune model.layers.0.self_attn.q_proj.weight.* wholly"):
        run(model, target, tokens, config())
    assert not masks(model)


def test_masks_that_have_no_room_are_refused_before_anything(dense, config, tokens):
    model = dense()
    sparsify(model, "25% layer", "magnitude", progress=False)
    digest = masks_sha256(model)
    with pytest.raises(
        ValueError, match=r"first cycle's 2:4 has no room for all that is pruned already in model.layers.0"
    ):
        run(model, "2:4", tokens, config(cycles=1, schedule="linear"))
    assert masks_sha256(model) == digest


def test_a_mask_that_would_come_back_is_never_passed_over(dense, config, tokens, monkeypatch):
    """Whatever selects: a cycle checks that its masks are nested."""
    model = dense()
    sparsify(model, "25%", "magnitude", progress=False)

    def wrong(model, pattern, *args, **options):
        report = sparsify(model, pattern, *args, **options)
        layer = model.model.layers[0].mlp.up_proj
        attach(layer, "weight", Mask.from_matrix(torch.ones(24, 16, dtype=torch.bool), layer.weight.shape, pattern))
        return report

    monkeypatch.setattr(cycles_module, "sparsify", wrong)
    with pytest.raises(MaskError, match=r"up_proj.weight: 50% would keep weights that were pruned before"):
        run(model, "50%", tokens, config(cycles=1))


def test_failed_retraining_says_which_cycle(dense, config, tokens, monkeypatch):
    calls = []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RetrainError("loss is nan")
        return retrain(*args, **options)

    monkeypatch.setattr(cycles_module, "retrain", fail)
    with pytest.raises(RetrainError) as caught:
        run(dense(), "2:4", tokens, config(cycles=2, schedule="linear"))
    assert caught.value.__notes__ == ["prune_cycles stopped in cycle 2 of 2, at 2:4"]


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("40%", {}, r"target must be above the present sparsity 50\.0000%"),
        ("50%", {}, r"target must be above the present sparsity 50\.0000%"),
        ("2:5", {}, "needs inputs divisible by 5"),
        ("1:4", {"cycles": 3, "schedule": "linear"}, "target 1:4 has no 3 ascending steps"),
        ("60%", {"retraining": {"seq_len": 64}}, "seq_len=64 is more than the model's maximum of 32"),
        ("60%", {"retraining": {"batch_size": 9}}, "data is shorter than one batch: 8 windows of seq_len=16"),
        ("nonsense", {}, "sparsity 'nonsense' is not understood"),
        ("75%", {"method": "nonsense"}, "nonsense"),
    ],
)
def test_wrong_input_changes_nothing(dense, config, tokens, target, changes, message):
    model = dense()
    sparsify(model, "50%", "magnitude", progress=False)
    digest, before = masks_sha256(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        run(model, target, tokens, config(**changes))
    assert masks_sha256(model) == digest
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_wrong_models_are_named(dense, config, tokens):
    with pytest.raises(ValueError, match="model must be a transformers causal language model, got Linear"):
        run(torch.nn.Linear(4, 4), "50%", tokens, config())
    model = dense()
    sparsify(model, "2:4", "magnitude", progress=False)
    compress(model)
    with pytest.raises(ValueError, match="model holds compressed layers"):
        run(model, "75%", tokens, config())


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"cycles": 0}, "cycles must be an integer of at least 1, got 0"),
        ({"cycles": 1.5}, "cycles must be an integer of at least 1, got 1.5"),
        ({"schedule": "square"}, "schedule must be one of linear, cubic, geometric, got 'square'"),
        ({"propagate": "none"}, "propagate must be one of block, dense, linear"),
        ({"samples": 0}, "samples must be an integer of at least 1"),
        ({"freezing": "input"}, "freezing must be a GradualFreezing or None, got 'input'"),
        ({"allow_collapse": 1}, "allow_collapse must be True or False, got 1"),
        (
            {"freezing": GradualFreezing(), "retraining": {"groups": ("norms",)}},
            "trains none of their weights: add 'lora'",
        ),
        (
            {"freezing": GradualFreezing("freeze"), "retraining": {"groups": ("lora",)}},
            "leaves nothing to train in the last stage: add 'norms' or 'head'",
        ),
    ],
)
def test_wrong_fields_are_named(config, field, message):
    with pytest.raises(ValueError, match=message):
        config(**field)


def test_text_and_a_method_with_data(dense, config, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters)
    text = "a b b a b a a b " * 20
    report = run(dense(), NM(2, 4), text, config(cycles=1, method="auto"), tokenizer=tokenizer, validation=text)
    assert report.method == "wanda"
    assert report.cycles[0].perplexity > 1
    with pytest.raises(ValueError, match="data is text: pass the model's tokenizer"):
        run(dense(), NM(2, 4), text, config(cycles=1))
