"""The form vision of the command retrain: image classifiers on folders of images."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from trisparse.cli.config_file import read_settings
from trisparse.cli.retrain_vision import _transform, schedule_of, section
from trisparse.retrain import vision
from trisparse.retrain.estimate import counting_saved
from trisparse.retrain.images import Images, ImageTransform
from trisparse.retrain.plans import vision_plan
from trisparse.retrain.schedule import ALLR, CLR, FT, LLR, LRW, SLR, Linear, Original, pruning_change
from trisparse.retrain.vision import VisionConfig, retrain_vision
from trisparse.sparsity.checkpoint import load, read_info, save
from trisparse.sparsity.mask import check_masks, masks
from trisparse.sparsity.sparsify import sparsify

GREY = ["--image-size", 8, "--mean", 0.5, "--std", 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``dense``, a ResNet for grey images of 8 x 8 pixels, and ``images`` of two classes: 24 to train, 8 to test on."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    shape = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=2, **shape)).save_pretrained(folder / "dense")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("left", "right")):
            (folder / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 60, (8, 8), dtype=np.uint8)
                pixels[:, 4 * label : 4 * label + 4] += 150
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def invoke(trisparse_command):
    return lambda *args: trisparse_command("retrain", *args, "--form", "vision")


@pytest.fixture(scope="module")
def trained(folder, invoke):
    """The dense model after some training, by the same command."""
    out = folder / "trained"
    options = ["--groups", "full", "--epochs", 8, "--batch-size", 6, "--peak", 0.1, "--weight-decay", 0]
    shown = json.loads(
        invoke(folder / "dense", "--data", folder / "images", "--out", out, *options, *GREY, "--json",
               "--validation", f"{folder / 'images'}:test")
    )  # fmt: skip
    assert shown["accuracy"][1] > 0.9
    return out


def test_pruned_here_and_retrained_by_a_file(folder, trained, invoke, tmp_path):
    file = tmp_path / "vision.yaml"
    file.write_text(
        f"form: vision\nsparsity: 70% global\ndata: {folder / 'images'}\nvalidation: {folder / 'images'}:test\n"
        f"image_size: 8\nmean: 0.5\nstd: [0.5]\nepochs: 2\nbatch_size: 6\ngroups: norms\nout: {tmp_path / 'r'}\n"
        "schedule: {name: ALLR, peak: 1e-1, original_epochs: 8, warmup_ratio: 0.1}\n"
    )
    out = json.loads(invoke(trained, "--config", file, "--groups", "only:norms", "--augment", "--json"))
    assert (list(out["trainable"]), out["steps"]) == (["norms"], 2 * 24 // 6)
    model = load(tmp_path / "r")
    check_masks(model)
    found = masks(model)
    assert not any("normalization" in name for name in found)
    total = sum(mask.shape.numel() for mask in found.values())
    assert sum(mask.kept for mask in found.values()) == total - round(0.7 * total)
    prune, step = read_info(tmp_path / "r")["recipe"][-2:]
    assert (prune["step"], prune["pattern"]) == ("prune", "70% global")
    change = pruning_change(load(trained), model)
    assert step["change"] == pytest.approx(change)
    assert step["schedule"].startswith("ALLR from")
    assert "rank" not in step

    # the same change, told by the model before pruning
    options = ["--schedule", "allr", "--peak", 0.1, "--original-epochs", 8, "--dense", trained, "--batch-size", 6]
    data = ["--data", folder / "images", "--out", tmp_path / "again", *GREY]
    shown = invoke(tmp_path / "r", *data, *options, "--groups", "perp", "--rank", 1)
    assert "lora" in shown
    again = read_info(tmp_path / "again")["recipe"][-1]
    assert again["change"] == pytest.approx(change, rel=1e-3)  # the norms, which have no masks, do not count
    assert again["rank"] == 1


def test_images_are_augmented_to_train_on_alone(folder, trained, invoke, tmp_path, monkeypatch):
    given = {}

    def watch(model, data, config, *, validation):
        given.update(data=data, validation=validation)
        return retrain_vision(model, data, config, validation=validation, progress=False)

    monkeypatch.setattr(vision, "retrain_vision", watch)
    images = ["--data", folder / "images", "--validation", f"{folder / 'images'}:test", *GREY, "--augment"]
    invoke(trained, *images, "--groups", "norms", "--batch-size", 12, "--out", tmp_path / "r")
    assert (len(given["data"]), given["data"].transform) == (24, ImageTransform(8, (0.5,), (0.5,), augment=True))
    assert (len(given["validation"]), given["validation"].transform) == (8, ImageTransform(8, (0.5,), (0.5,)))


def test_dry_run(folder, trained, invoke, monkeypatch):
    options = ["--data", folder / "images", "--sparsity", "50%", "--groups", "perp", "--rank", 2, "--epochs", 3]
    command = [trained, *options, "--batch-size", 6, *GREY, "--dry-run"]
    out = json.loads(invoke(*command, "--json"))
    assert (out["steps"], out["epochs"], out["batch"]) == (3 * 24 // 6, 3, [6, 1])
    assert out["memory"]["optimizer"] == out["memory"]["gradients"] == 4 * sum(out["trainable"].values())
    assert out["memory"]["total"] == sum(value for name, value in out["memory"].items() if name != "total")
    assert "estimated" in invoke(*command)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    assert invoke(*command) == ""  # the first process prints


def test_a_plan_is_what_retraining_does(trained, folder):
    model = load(trained)
    sparsify(model, "50%", "magnitude", include="*", progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = Images.from_folder(folder / "images", ImageTransform(8, (0.5,), (0.5,)))
    for groups, momentum in (("perp", 0.9), ("norms", 0.0), ("bn-recalibrate", 0.9)):
        config = VisionConfig(groups, batch_size=8, momentum=momentum, nesterov=momentum > 0)
        plan = vision_plan(model, images, config)
        assert all((before[name] == value).all() for name, value in model.state_dict().items())
        trainable = sum(plan.trainable.values())
        assert plan.memory.optimizer == (4 * trainable if momentum else 0)
        report = retrain_vision(copy.deepcopy(model), images, config, progress=False)
        assert (plan.trainable, plan.steps, plan.epochs) == (report.trainable, report.steps, report.epochs)
        assert (plan.missing, plan.trainable_share) == (report.missing, report.trainable_share)


def test_the_activations_of_a_plan_are_those_of_a_forward(trained, folder):
    model = load(trained)
    images = Images.from_folder(folder / "images", ImageTransform(8, (0.5,), (0.5,)))
    planned = vision_plan(model, images, VisionConfig("full", batch_size=24)).memory.activations
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    pixels = torch.stack([images[index][0] for index in range(24)])
    with counting_saved(own) as kept:
        logits = model.train()(pixels).logits
    assert planned == pytest.approx(sum(kept.values()), rel=0.02)
    del logits
    fewer = vision_plan(model, images, VisionConfig(("head",), batch_size=24)).memory.activations
    assert fewer < 0.5 * planned  # nothing below the head needs a gradient


ORIGINAL = {"peak": 0.1, "original_epochs": 8}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, None),
        ({"peak": 0.2}, Linear(0.2, 0.0)),
        ({"name": "linear", "warmup_ratio": 0.1}, Linear(0.1, 0.1)),
        ({"name": "FT", "rates": (0.1, 0.01), "original_epochs": 2}, FT(Original((0.1, 0.01), 2))),
        ({"name": "LRW", **ORIGINAL}, LRW(Original.linear(0.1, 8), 2)),
        ({"name": "SLR", **ORIGINAL}, SLR(Original.linear(0.1, 8))),
        ({"name": "CLR", **ORIGINAL, "warmup_ratio": 0.2}, CLR(Original.linear(0.1, 8), 0.2)),
        ({"name": "LLR", **ORIGINAL, "milestones": (4, 6)}, LLR(Original.stepped(0.1, 8, (4, 6)))),
        (
            {"name": "LLR", **ORIGINAL, "milestones": (4,), "gamma": 0.5},
            LLR(Original.stepped(0.1, 8, (4,), 0.5)),
        ),
        ({"name": "ALLR", **ORIGINAL}, ALLR(Original.linear(0.1, 8), 0.3, 2)),
    ],
)
def test_schedules(settings, expected):
    assert schedule_of(settings, 2, change=0.3) == expected


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"name": "cosine"}, "schedule must be one of Linear, FT, LRW, SLR, CLR, LLR, ALLR, got 'cosine'"),
        ({"name": "FT", **ORIGINAL, "warmup_ratio": 0.1}, "schedule FT takes no warmup_ratio, it takes gamma"),
        ({"name": "Linear", "original_epochs": 3}, "schedule Linear takes no original_epochs"),
        ({"name": "LLR", **ORIGINAL, "change": 0.5}, "schedule LLR takes no change"),
        ({"name": "LLR", "peak": 0.1}, "give --original-epochs and --peak"),
        ({"name": "LLR", "original_epochs": 8}, "give --original-epochs and --peak"),
        ({"name": "LLR", **ORIGINAL, "rates": (0.1,)}, "give --original-epochs and --peak"),
        ({"name": "LLR", "rates": (0.1,), "original_epochs": 8, "gamma": 0.1}, "leave milestones and gamma out"),
        ({"name": "LLR", **ORIGINAL, "gamma": 0.1}, "gamma needs milestones"),
        ({"name": "ALLR", **ORIGINAL}, "ALLR needs to know what pruning changed"),
        ({"name": "FT", **ORIGINAL, "original_epochs": 0}, "epochs must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_schedules(settings, match):
    with pytest.raises(ValueError, match=match):
        schedule_of(settings, 2, change=None)


def test_pixels_as_the_processor_says():
    colour, grey = SimpleNamespace(config=ResNetConfig()), SimpleNamespace(config=ResNetConfig(num_channels=1))
    said = {"size": {"shortest_edge": 64}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    assert _transform(colour, said, {}) == ImageTransform(64, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert _transform(colour, {**said, "size": {"height": 32, "width": 32}}, {"augment": True}).size == 32
    assert _transform(colour, {**said, "size": 16}, {"image_size": 8}).size == 8
    assert _transform(colour, {**said, "crop_size": {"height": 48, "width": 48}}, {}).size == 48
    assert _transform(colour, {**said, "crop_size": 48, "do_center_crop": False}, {}).size == 64
    assert _transform(grey, {"do_normalize": False}, {}) == ImageTransform(mean=(0.0,), std=(1.0,))
    assert _transform(colour, {}, {}) == ImageTransform()
    for other in ({"do_flip_channel_order": True}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}):
        with pytest.raises(ValueError, match=f"the model's image processor .*{next(iter(other))}"):
            _transform(colour, {**said, **other}, {})
    with pytest.raises(ValueError, match="images of 1 channels, and mean and std have 3 values: give --mean and --std"):
        _transform(grey, {}, {})


def test_the_processor_comes_along(folder, trained, invoke, tmp_path):
    processor = {"size": {"height": 8, "width": 8}, "image_mean": [0.5], "image_std": [0.5]}
    (tmp_path / "model").mkdir()
    for file in (folder / "dense").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    options = ["--data", folder / "images", "--groups", "bn-recalibrate", "--batch-size", 6]
    out = json.loads(invoke(tmp_path / "model", *options, "--out", tmp_path / "r", "--json"))
    assert (out["steps"], out["recalibrated"]) == (0, 6)
    assert json.loads((tmp_path / "r" / "preprocessor_config.json").read_text()) == processor


def test_a_nested_file(tmp_path):
    file = tmp_path / "vision.yaml"
    file.write_text("schedule: ALLR\nmean: 0.5\n")
    assert read_settings(file, section()) == {"schedule": {"name": "ALLR"}, "mean": (0.5,)}
    file.write_text("schedule: {name: LLR, milestones: '30, 60', rates: [1e-1]}\n")
    settings = read_settings(file, section())
    assert settings == {"schedule": {"name": "LLR", "milestones": (30, 60), "rates": (0.1,)}}
    for text in ("mean:\n", "std:\n", "sparsity:\n", "augment:\n", "schedule: {peak: }\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"(mean|std|sparsity|augment|schedule\.peak) has no value: give one"):
            read_settings(file, section())
    file.write_text("peak: 0.1\n")
    with pytest.raises(ValueError, match="'peak' is a setting of 'schedule'"):
        read_settings(file, section())


NEW = ["--data", "IMAGES", "--out", "NEW", "--batch-size", 6, *GREY]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "retrain needs --data and --out"),
        (["--dry-run"], "the dry run of vision needs --data"),
        ([*NEW, "--groups", "perpp"], "groups must be one of bn-recalibrate, biases, norms"),
        (
            [*NEW, "--schedule", "ALLR", "--peak", 0.1, "--original-epochs", 8],
            "ALLR needs to know what pruning changed",
        ),
        ([*NEW, "--schedule", "FT", "--peak", 0.1], "give --original-epochs and --peak"),
        ([*NEW, "--sparsity", "50%", "--dense", "DENSE"], "leave it out where sparsity prunes the model here"),
        ([*NEW, "--sparsity", "150%"], "sparsity"),
        ([*NEW, "--include", "*"], "include and exclude need sparsity"),
        ([*NEW, "--validation", "IMAGES"], "split must be one of train, test"),
        ([*NEW, "--validation", "IMAGES:dev"], "split must be one of train, test"),
        (["--data", "NOWHERE", "--out", "NEW", *GREY], "folder must be a folder of images"),
        (["--data", "IMAGES", "--out", "NEW", *GREY], "data is shorter than one batch: 24 images, and batch_size=256"),
        (["--data", "IMAGES", "--out", "NEW"], "images of 1 channels"),
        ([*NEW, "--steps", 3], "--steps is for --form perp or cycles or reconstruct, not for vision"),
    ],
)
def test_errors_are_short(folder, tmp_path, args, message, trisparse_error):
    names = {"IMAGES": folder / "images", "NEW": tmp_path / "new", "DENSE": folder / "dense"}
    names |= {"NOWHERE": tmp_path / "nowhere", "IMAGES:dev": f"{folder / 'images'}:dev"}
    shown = trisparse_error("retrain", folder / "dense", "--form", "vision", *(names.get(arg, arg) for arg in args))
    assert message in shown
    assert shown.startswith("error: ")
    assert not (tmp_path / "new").exists()


def test_a_pruned_classifier_is_not_pruned_anew(folder, tmp_path, trisparse_error):
    model = ResNetForImageClassification.from_pretrained(folder / "dense")
    sparsify(model, "70% global", "magnitude", include="*", progress=False)
    save(model, tmp_path / "pruned")
    for dry in ((), ("--dry-run",)):
        options = ["--form", "vision", "--sparsity", "50%", *NEW[2:], *dry, "--data", folder / "images"]
        new = [tmp_path / "new" if option == "NEW" else option for option in options]
        shown = trisparse_error("retrain", tmp_path / "pruned", *new)
        assert "is pruned already, and pruning anew may bring weights back: leave sparsity out" in shown
    assert not (tmp_path / "new").exists()


def test_a_language_model_is_no_classifier(tiny_llama, folder, trained, tmp_path, trisparse_error):
    new = ["--form", "vision", "--data", folder / "images", "--out", tmp_path / "new"]
    assert "is a LlamaForCausalLM and no image classifier" in trisparse_error("retrain", tiny_llama / "pruned", *new)
    new = ["--data", tiny_llama / "text.txt", "--out", tmp_path / "new"]
    assert "is a ResNetForImageClassification and no language model" in trisparse_error("retrain", trained, *new)
