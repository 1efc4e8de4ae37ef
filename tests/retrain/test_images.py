"""Folders of images, and what becomes of them."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trisparse.retrain.images import Images, ImageTransform, batches_of
from trisparse.retrain.vision import VisionConfig, accuracy, retrain_vision
from trisparse.sparsity.mask import check_masks
from trisparse.sparsity.sparsify import sparsify


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """train/ and test/ with 8 and 2 PNGs of each of two classes, dark and light, of different sizes."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for name, level in (("dark", 60), ("light", 180)):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 40, level + 40, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "data"


def test_a_folder_end_to_end(folder):
    transform = ImageTransform(size=16)
    train = Images.from_folder(folder, ImageTransform(size=16, augment=True))
    test = Images.from_folder(folder, transform, split="test")
    assert (len(train), len(test)) == (16, 4)
    assert train.classes == ["dark", "light"]
    assert sorted(train.labels) == [0] * 8 + [1] * 8
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    sparsify(model, "50% global", "magnitude", include="*", progress=False)
    report = retrain_vision(model, train, VisionConfig("full", epochs=4, batch_size=8), validation=test, progress=False)
    assert report.steps == 8
    assert report.accuracy[1] == accuracy(model, test) == 1.0
    check_masks(model)


def test_pixels_by_hand():
    transform = ImageTransform(size=7, mean=(0.5,), std=(0.25,))
    image = Image.fromarray(np.full((8, 16), 255, dtype=np.uint8))
    pixels = transform(image)
    assert pixels.shape == (1, 7, 7)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.full((1, 7, 7), 2.0))  # (1 - 0.5) / 0.25
    # the centre of the wider side: columns 4.5 to 11.5 of 16, at their own scale
    ramp = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (8, 1)))
    middle = ImageTransform(size=7, mean=(0,), std=(1,))(ramp) * 255
    torch.testing.assert_close(middle[0, 0], torch.arange(5.0, 12), atol=0.51, rtol=0)
    colour = Image.fromarray(np.array([[[255, 0, 51]]], dtype=np.uint8).repeat(8, 0).repeat(8, 1))
    rgb = ImageTransform(size=2, mean=(0.5, 0, 0), std=(0.5, 1, 0.1))(colour)
    torch.testing.assert_close(rgb[:, 0, 0], torch.tensor([1.0, 0.0, 2.0]))


def test_augmentation_follows_the_seed():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    transform = ImageTransform(size=8, augment=True)
    torch.manual_seed(1)
    first = [transform(image) for _ in range(4)]
    torch.manual_seed(1)
    assert all(torch.equal(transform(image), other) for other in first)
    assert len({float(pixels.sum()) for pixels in first}) == 4
    narrow = Image.fromarray(np.zeros((1000, 2, 3), dtype=np.uint8))
    assert transform(narrow).shape == (3, 8, 8)


def test_flips_half_of_the_time():
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1)))
    transform = ImageTransform(size=4, mean=(0,), std=(1,), augment=True)
    torch.manual_seed(0)
    flipped = sum(bool(p[0, 0, 0] > p[0, 0, -1]) for p in (transform(ramp) for _ in range(200)))
    assert 70 < flipped < 130


def test_the_incomplete_batch_is_left_out_in_training_alone():
    images, labels = torch.zeros(10, 1, 2, 2), torch.arange(10)
    train = list(batches_of((images, labels), 4, train=True, seed=3))
    assert [len(batch["labels"]) for batch in train] == [4, 4]
    assert [batch["labels"].tolist() for batch in train] == [
        batch["labels"].tolist() for batch in batches_of((images, labels), 4, train=True, seed=3)
    ]
    evaluate = list(batches_of((images, labels), 4, train=False))
    assert torch.cat([batch["labels"] for batch in evaluate]).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ImageTransform(size=0), "size must be an integer of at least 1, got 0"),
        (lambda: ImageTransform(mean=(0.5, 0.5)), "mean must have one value"),
        (lambda: ImageTransform(std=(1.0,)), "std must have 3 values above 0"),
        (lambda: ImageTransform(std=(1.0, 0.0, 1.0)), "std must have 3 values above 0"),
        (lambda: Images.from_folder("nowhere", ImageTransform()), "folder must be a folder of images, got 'nowhere'"),
        (
            lambda: Images(datasets.Dataset.from_dict({"image": [1]}), ImageTransform()),
            "data must have a column of labels, label or labels; it has image",
        ),
        (
            lambda: Images(datasets.Dataset.from_dict({"x": [1]}), ImageTransform()),
            "data must have a column of images, image or img; it has x",
        ),
    ],
)
def test_wrong_options_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_an_unknown_split_is_refused(folder):
    with pytest.raises(ValueError, match=r"split must be one of train, test of .*, got 'validation'"):
        Images.from_folder(folder, ImageTransform(), split="validation")


IMAGES, LABELS = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (
            iter([]),
            "data must be a pair of tensors, a dataset with a length, a DataLoader or a list, got list_iterator",
        ),
        ("folder", "got str"),
        ({"a": 1}, "got dict"),
        ([], "data is empty"),
        ((IMAGES, LABELS[:3]), "as many labels as images, got 3 and 4"),
        ((IMAGES, LABELS), "data is shorter than one batch: 4 images, and batch_size=8"),
        ([IMAGES], r"data must give \(pixel values, label\), got Tensor"),
        ([{"image": IMAGES}], "data must give pixel_values and labels, got image"),
        ([(Image.new("L", (2, 2)), 0)], r"data must give tensors, got Image: Images\(data, ImageTransform"),
    ],
)
def test_wrong_data_is_refused(data, match):
    with pytest.raises(ValueError, match=match):
        batches_of(data, 8, train=True)


def test_wrong_batches_are_refused():
    for batch in ((IMAGES, LABELS[:2]), (IMAGES[:, 0], LABELS)):
        with pytest.raises(ValueError, match="data must give pixel values"):
            list(batches_of([(IMAGES, LABELS), batch], 8, train=True))
