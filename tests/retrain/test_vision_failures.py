"""What retraining an image classifier refuses, and what a failure in the middle leaves: the model as it was."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trisparse
from trisparse.retrain.loop import RetrainError
from trisparse.retrain.schedule import ALLR, Linear, Original
from trisparse.retrain.vision import VisionConfig, accuracy, retrain_vision
from trisparse.sparsity.mask import MaskError
from trisparse.sparsity.sparsify import sparsify

IMAGES = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 4


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(64, 4)
    )
    sparsify(model, "50% global", "magnitude", include="*", progress=False)
    model[0].requires_grad_(False)
    model[1].eval()
    return model


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [param.requires_grad for param in model.parameters()],
        [module.training for module in model.modules()],
        [param.grad for param in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [getattr(m, "momentum", None) for m in model.modules()],
    )


def assert_same(model, before):
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])


def run(model, data=(IMAGES, LABELS), **changes):
    return retrain_vision(model, data, VisionConfig(**{"groups": "full", "batch_size": 8, **changes}), progress=False)


def test_a_loss_that_is_not_finite_names_its_step():
    model = network()
    before = snapshot(model)
    calls = []

    def sometimes_nan(module, args, output):
        if module.training:
            calls.append(1)
        return output * math.nan if len(calls) == 3 else output

    hook = model.register_forward_hook(sometimes_nan)
    with pytest.raises(RetrainError, match=r"loss is nan at step 3 of 8.*the model is as it was before"):
        run(model, epochs=2)
    hook.remove()
    assert_same(model, before)


def test_a_rate_that_is_too_high_is_noticed():
    model = network()
    before = snapshot(model)
    with pytest.raises(RetrainError, match=r"a learning_rate below 1e\+30 may help"):
        run(model, schedule=Linear(1e30, 0.0))
    assert_same(model, before)


def test_a_parameter_that_the_last_step_breaks_is_noticed():
    model = network()
    before = snapshot(model)
    with pytest.raises(RetrainError, match=r"1.weight is not finite after step 1; the model is as it was before"):
        run(model, schedule=Linear(1e38, 0.0), batch_size=32, weight_decay=1e38, recalibrate=False, groups=("norms",))
    assert_same(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [2, 6])
def test_a_failure_leaves_the_model_as_it_was(error, after):
    """While training (4 batches), and while recalibrating."""
    model = network()
    before = snapshot(model)
    calls = []

    def fails(module, args):
        if model[1].training:
            calls.append(1)
        if len(calls) == after:
            raise error

    hook = model[0].register_forward_pre_hook(fails)
    with pytest.raises(error):
        run(model)
    hook.remove()
    assert len(calls) == after
    assert_same(model, before)


def test_a_wrong_label_in_the_middle_leaves_the_model_as_it_was():
    model = network()
    before = snapshot(model)
    labels = LABELS.clone()
    labels[20] = 4
    with pytest.raises(ValueError, match=r"labels must be from 0 to 3.* got 4"):
        run(model, DataLoader(TensorDataset(IMAGES, labels), batch_size=8))
    assert_same(model, before)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.full((32,), 4), "labels must be from 0 to 3, the model has 4 classes; got 4"),
        (-LABELS, "labels must be from 0 to 3.* got -1"),
        (LABELS.float(), "labels must be integers, got torch.float32"),
    ],
)
def test_wrong_labels_are_refused_before_anything_runs(labels, match):
    model = network()
    before = snapshot(model)
    hook = model.register_forward_hook(lambda module, *_: pytest.fail("ran") if module.training else None)
    with pytest.raises(ValueError, match=match):
        run(model, (IMAGES, labels))
    with pytest.raises(ValueError, match=match):
        retrain_vision(model, (IMAGES, LABELS), validation=(IMAGES, labels), config=VisionConfig(batch_size=8))
    hook.remove()
    with pytest.raises(ValueError, match=match):
        accuracy(model, (IMAGES, labels))
    assert_same(model, before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"groups": "norm"},
            "groups must be one of bn-recalibrate, biases, norms, linear-probing, perp, full, or a seq.*'norm'",
        ),
        ({"groups": ("bias",)}, r"groups must be one or more of biases, norms, head, lora, full, got \('bias',\)"),
        ({"groups": ()}, "groups"),
        ({"groups": ("full", "head")}, "groups must be 'full' alone"),
        ({"groups": "bn-recalibrate", "recalibrate": False}, "recalibrate must be True"),
        ({"schedule": 0.1}, "schedule must be a Schedule such as Linear.0.1., got 0.1"),
        ({"schedule": ALLR(Original.linear(0.1, 90), 0.5, epochs=5)}, "epochs must be those of the schedule, 5, got 1"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"batch_size": True}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"num_workers": 0.5}, "num_workers"),
        ({"momentum": 1.0}, "momentum must be below 1, got 1.0"),
        ({"momentum": -0.1}, "momentum must be a number of at least 0"),
        ({"momentum": 0.0}, "nesterov must be False without momentum"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"max_grad_norm": "1"}, "max_grad_norm"),
        ({"dtype": "fp16"}, "dtype must be one of fp32, bf16, got 'fp16'"),
    ],
)
def test_wrong_options_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        VisionConfig(**changes)


def test_a_learning_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="peak must be a number above 0, got 0"):
        VisionConfig(schedule=Linear(0))


def test_groups_have_an_order_and_no_doubles():
    assert VisionConfig(["head", "norms", "head"]).groups == ("norms", "head")


def test_data_shorter_than_one_batch_is_refused():
    model = network()
    before = snapshot(model)
    with pytest.raises(ValueError, match="data is shorter than one batch: 32 images, and batch_size=33"):
        run(model, batch_size=33)
    assert_same(model, before)


def test_models_without_the_group_are_refused():
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4, bias=False))
    with pytest.raises(ValueError, match="needs a batch norm with running statistics, the model has none"):
        run(plain, groups="bn-recalibrate")
    for groups in ("norms", ("norms",), ("norms", "head")):
        with pytest.raises(ValueError, match=r"asks for .*norms, which the model has nothing of; it has head, full"):
            run(plain, groups=groups)
    assert run(plain, groups="linear-probing").missing == ["biases", "norms"]


def test_wrong_models_are_refused():
    broken = network()
    broken[0].weight.data.fill_(1)
    with pytest.raises(MaskError, match=r"0\.weight"):
        run(broken)
    with pytest.raises(ValueError, match="model must be a torch module with parameters, got Flatten"):
        run(nn.Flatten())
    with pytest.raises(ValueError, match=r"in fp32, this one has torch\.bfloat16"):
        run(network().bfloat16())
    with torch.device("meta"), pytest.raises(ValueError, match="meta"):
        run(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))
    with pytest.raises(ValueError, match="PEFT already"):
        run(get_peft_model(network(), LoraConfig(target_modules=["5"])))
    with pytest.raises(ValueError, match=r"logits \[batch, classes\], got a tensor \[8, 4, 4, 4\]"):
        run(nn.Sequential(nn.Conv2d(1, 4, 3)))
    with pytest.raises(ValueError, match="got dict"):
        run(Dicts(36, 4))


class Dicts(nn.Linear):
    """Gives no logits."""

    def forward(self, x):
        return {"scores": super().forward(x.flatten(1))}


def test_compressed_layers_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 4))
    sparsify(model, "2:4", "magnitude", progress=False)
    trisparse.compress(model)
    with pytest.raises(ValueError, match="compressed layers: decompress"):
        run(model, groups="biases")
