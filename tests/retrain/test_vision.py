"""Image classifiers after global magnitude pruning: a small ResNet on scikit-learn's digits, trained here."""

from __future__ import annotations

import copy
import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification

import trisparse
from trisparse.bench.studies import digits as bench
from trisparse.retrain import vision_loop
from trisparse.retrain.groups import VISION_PRESETS
from trisparse.retrain.schedule import ALLR, Linear, pruning_change
from trisparse.retrain.vision import VisionConfig, accuracy, retrain_vision
from trisparse.retrain.vision_groups import vision_groups
from trisparse.sparsity.mask import check_masks, masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify

EPOCHS = bench.EPOCHS


@pytest.fixture(scope="module")
def pruned(trained_resnet):
    return bench.prune(trained_resnet, "95%")


def test_each_preset_brings_back_more(trained_resnet, pruned, digits):
    dense, (train, test) = trained_resnet, digits
    assert accuracy(dense, test) > 0.94
    assert accuracy(pruned, test) < 0.4
    assert {name for name, _ in dense.named_parameters() if "convolution" in name} < set(masks(pruned))
    assert "classifier.1.weight" in masks(pruned)
    schedule = ALLR(bench.ORIGINAL, pruning_change(dense, pruned), epochs=2)
    assert schedule.discount > 2 / EPOCHS
    after, share = {}, {}
    for preset in VISION_PRESETS:
        model = copy.deepcopy(pruned)
        config = VisionConfig(preset, schedule, epochs=2, batch_size=64)
        report = retrain_vision(model, train, config, validation=test, progress=False)
        check_masks(model)
        assert masks_sha256(model) == masks_sha256(pruned)
        assert report.accuracy == (accuracy(pruned, test), accuracy(model, test))
        assert report.steps == (0 if preset == "bn-recalibrate" else 2 * (1400 // 64))
        assert report.recalibrated == 6
        after[preset], share[preset] = report.accuracy[1], report.trainable_share
    assert after["bn-recalibrate"] > accuracy(pruned, test) + 0.25
    assert after["biases"] >= after["bn-recalibrate"] - 0.02
    assert after["norms"] > after["bn-recalibrate"] + 0.08
    assert after["linear-probing"] > max(after["norms"] - 0.02, after["bn-recalibrate"] + 0.08)
    assert after["full"] > 0.9
    assert after["full"] > after["norms"] + 0.03
    assert list(share.values()) == sorted(share.values())
    assert share["bn-recalibrate"] == 0
    assert share["norms"] < 0.02
    assert share["full"] == 1


@pytest.mark.parametrize("preset", VISION_PRESETS)
def test_only_the_group_changes(pruned, digits, preset):
    model = copy.deepcopy(pruned)
    model.resnet.encoder.requires_grad_(False)
    model.resnet.embedder.eval()
    flags = [param.requires_grad for param in model.parameters()]
    modes = [module.training for module in model.modules()]
    retrain_vision(model, digits[0], VisionConfig(preset, Linear(0.05, 0.0), batch_size=128), progress=False)
    changed = {
        name
        for (name, new), (_, old) in zip(model.named_parameters(), pruned.named_parameters(), strict=True)
        if not torch.equal(new, old)
    }
    names = [name for name, _ in model.named_parameters()]
    expected = {
        "bn-recalibrate": set(),
        "biases": {"classifier.1.bias"},
        "norms": {"classifier.1.bias", *(name for name in names if "normalization" in name)},
        "linear-probing": {*(name for name in names if "normalization" in name or "classifier" in name)},
        "perp": set(names),
        "full": set(names),
    }[preset]
    assert changed == expected
    statistics = [name for name, _ in model.named_buffers() if "running" in name]
    assert all(not torch.equal(model.get_buffer(n), pruned.get_buffer(n)) for n in statistics)
    assert flags == [param.requires_grad for param in model.parameters()]
    assert modes == [module.training for module in model.modules()]
    assert all(param.grad is None for param in model.parameters())
    check_masks(model)


def test_a_saved_file_keeps_its_zeros(pruned, digits, tmp_path):
    model = copy.deepcopy(pruned)
    retrain_vision(model, digits[0], VisionConfig("full", batch_size=128), progress=False)
    trisparse.save(model, tmp_path / "saved")
    loaded = trisparse.load(tmp_path / "saved")
    check_masks(loaded)
    assert masks_sha256(loaded) == masks_sha256(pruned)
    assert accuracy(loaded, digits[1]) == accuracy(model, digits[1])


def test_the_masks_hold_after_every_step(pruned, digits, monkeypatch):
    model = copy.deepcopy(pruned)
    checked = []
    real = vision_loop._Trainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        check_masks(model)
        checked.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(vision_loop._Trainer, "compute_loss", compute_loss)
    report = retrain_vision(model, digits[0], VisionConfig(("head", "norms"), batch_size=128), progress=False)
    assert len(checked) == report.steps == 10
    assert list(report.trainable) == ["norms", "head"]


def test_the_paper_s_shares_of_resnet_50():
    # Section 3.1: about 0.004%, 0.21% and 8.25% of ResNet-50's 26 million parameters
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    total = sum(param.numel() for param in model.parameters())
    assert total == 25_557_032
    shares = {}
    for preset in ("biases", "norms", "linear-probing"):
        groups = vision_groups(model, preset, torch.zeros(1, 3, 32, 32))
        assert groups.head == "classifier.1"
        assert groups.classes == 1000
        shares[preset] = sum(param.numel() for param in groups.parameters(model).values()) / total
    assert round(shares["biases"], 5) == 0.00004
    assert round(shares["norms"], 4) == 0.0021
    assert shares["linear-probing"] == pytest.approx(0.0825, abs=0.0005)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_steps_are_those_of_sgd(digits, clip):
    """Two steps by hand: Nesterov momentum, weight decay, the pruned weights at zero, and the norm of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    sparsify(model, "50% global", "magnitude", progress=False)
    keep = masks(model)["1.weight"].dense()
    batches = [(digits[0][0][i : i + 8], digits[0][1][i : i + 8]) for i in (0, 8)]
    params = [param.detach().clone().requires_grad_() for param in model.parameters()]
    velocity = [torch.zeros_like(param) for param in params]
    for step, (images, labels) in enumerate(batches):
        loss = nn.functional.cross_entropy(nn.functional.linear(images.flatten(1), *params), labels)
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            grads = [grads[0] * keep, grads[1]]
            norm = torch.cat([grad.flatten() for grad in grads]).norm()
            if clip:
                assert norm > clip
                grads = [grad * clip / norm for grad in grads]
            for param, grad, speed in zip(params, grads, velocity, strict=True):
                grad = grad + 0.01 * param
                speed.mul_(0.9).add_(grad)
                param -= 0.2 * (1 - step / 2) * (grad + 0.9 * speed)
    config = VisionConfig("full", Linear(0.2, 0.0), weight_decay=0.01, max_grad_norm=clip)
    report = retrain_vision(model, batches, config, progress=False)
    for param, expected in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(param, expected)
    assert report.losses[1] == pytest.approx(float(loss.detach()))
    assert report.recalibrated == 0


def test_forms_of_data(pruned, digits):
    """Batches in the same order give the same weights, whatever they come in."""
    images, labels = digits[0][0][:256], digits[0][1][:256]
    config = VisionConfig("norms", Linear(0.05, 0.0), batch_size=64)
    batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 256, 64)]
    forms = [
        batches,
        DataLoader(TensorDataset(images, labels), batch_size=64),
        [{"pixel_values": image, "labels": label} for image, label in batches],
    ]
    weights = []
    for form in forms:
        model = copy.deepcopy(pruned)
        retrain_vision(model, form, config, progress=False)
        weights.append(model.state_dict())
        assert accuracy(model, form) == accuracy(model, (images, labels))
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in weights[0])


def test_shuffled_examples_follow_the_seed(pruned, digits):
    pairs = TensorDataset(*digits[0])
    runs = []
    for data, seed in ((digits[0], 1), (pairs, 1), (digits[0], 2)):
        model = copy.deepcopy(pruned)
        before = torch.get_rng_state()
        runs.append(retrain_vision(model, data, VisionConfig(batch_size=256, seed=seed), progress=False).losses)
        assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]


def test_a_plain_network_without_batch_norm(digits):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10, bias=False)
    )
    sparsify(model, "90% global", "magnitude", include="*", progress=False)
    config = VisionConfig("linear-probing", Linear(0.1), epochs=2, batch_size=64)
    report = retrain_vision(model, digits[0], config, validation=digits[1], progress=False)
    assert report.missing == ["biases"]
    assert "not in the model" in str(report)
    assert report.trainable == {"norms": 16, "head": 2880}
    assert report.recalibrated == 0
    assert report.accuracy[1] > report.accuracy[0] + 0.2
    check_masks(model)


def test_a_network_that_pools_its_last_convolution(digits):
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.BatchNorm2d(10), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert vision_groups(model, "norms", digits[0][0][:2]).head is None
    with pytest.raises(ValueError, match=r"asks for head, .*; it has biases, norms, full"):
        vision_groups(model, "linear-probing", digits[0][0][:2])


def test_bf16_autocast(pruned, digits):
    reached = {}
    for dtype in ("fp32", "bf16"):
        model = copy.deepcopy(pruned)
        config = VisionConfig("full", Linear(0.1), epochs=2, batch_size=64, dtype=dtype, max_grad_norm=1.0)
        report = retrain_vision(model, digits[0], config, validation=digits[1], progress=False)
        reached[dtype] = report.accuracy[1], report.losses
        assert {param.dtype for param in model.parameters()} == {torch.float32}
        check_masks(model)
    assert reached["bf16"][1] != reached["fp32"][1]
    assert reached["bf16"][0] == pytest.approx(reached["fp32"][0], abs=0.03)


def test_the_report(pruned, digits):
    model = copy.deepcopy(pruned)
    report = retrain_vision(model, digits[0], VisionConfig(batch_size=256), validation=digits[1], progress=False)
    values = json.loads(report.to_json())
    assert values["trainable"] == {"biases": 10, "norms": 288}
    assert values["trainable_share"] == 298 / 20_346
    assert values["accuracy"] == list(report.accuracy)
    assert len(values["losses"]) == report.steps == 5
    text = str(report)
    assert "1.465% of 20,346 (biases 10, norms 288)" in text
    assert "6 batch norms" in text
    assert "not in the model" not in text


_TWO_PROCESSES = """
import json, sys, torch
from torch import nn
from trisparse.retrain.groups import VISION_PRESETS
from trisparse.retrain.schedule import Linear
from trisparse.retrain.vision import VisionConfig, retrain_vision
from trisparse.sparsity.mask import check_masks
from trisparse.sparsity.sparsify import sparsify

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
sparsify(model, "80% global", "magnitude", include="*", progress=False)
images, labels = torch.randn(48, 1, 6, 6), torch.arange(48) % 4
config = VisionConfig("full", Linear(0.1, 0.0), epochs=2, batch_size=int(sys.argv[1]))
report = retrain_vision(model, (images, labels), config, validation=(images, labels), progress=False)
check_masks(model)
weights = [param.flatten()[:20].tolist() for param in model.parameters()]

normed = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
other = VisionConfig("norms", Linear(0.1, 0.0), batch_size=int(sys.argv[1]), recalibrate=False)
accuracies = retrain_vision(normed, (images, labels), other, validation=(images, labels), progress=False).accuracy
state = {name: value.flatten().tolist() for name, value in normed.state_dict().items()}
with open(f"{sys.argv[2]}/{torch.distributed.get_rank() if torch.distributed.is_initialized() else 'one'}", "w") as out:
    json.dump([report.losses, weights, report.accuracy, state, accuracies], out)
"""


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """DDP over gloo: 2 x 8 images a step are one process's 16, the masks hold, and both end with the same model.

    With batch norms, too, which are not recalibrated and have seen different images in each process.
    """
    script = tmp_path / "train.py"
    script.write_text(_TWO_PROCESSES)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, script, "8", tmp_path], check=True, env=env, capture_output=True, timeout=300)
    monkeypatch.setattr(sys, "argv", [str(script), "16", str(tmp_path)])
    runpy.run_path(str(script))
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("one", "0", "1"))
    assert first == second
    assert len(first[0]) == 6
    assert first[0] == pytest.approx(one[0], abs=1e-5)
    for ours, theirs in zip(first[1], one[1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert first[2] == one[2]
    assert first[3]["1.num_batches_tracked"] == [3]
    assert any(abs(mean) > 1e-3 for mean in first[3]["1.running_mean"])


def test_a_scheduler_may_set_world_size_alone(digits, monkeypatch):
    """Without a launcher there is one process, which takes all the steps."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setenv("WORLD_SIZE", "4")
    report = retrain_vision(model, digits[0], VisionConfig("full", batch_size=280), progress=False)
    assert report.steps == len(report.losses) == 5


def test_sharded_weights_are_refused(digits, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP"):
        retrain_vision(model, digits[0], progress=False)
