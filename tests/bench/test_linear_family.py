"""The benchmark linear on tiny layers: what it yields is right, and what is wrong is not timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trisparse.bench.families import accuracy, linear
from trisparse.bench.families.accuracy import Expected, check, expected
from trisparse.bench.registry import Options, benchmarks
from trisparse.bench.runner import right_contestants
from trisparse.sparsity.backends import BACKENDS


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(linear, "QUICK_MODELS", {"tiny": ((32, 64), (48, 32)), "same": ((32, 64),)})
    monkeypatch.setattr(linear, "QUICK_TOKENS", (1, 5))
    monkeypatch.setattr(linear, "TRAINING_TOKENS", 5)


def quick(**options):
    return list(benchmarks()["linear"].run(Options(quick=True, **options)))


def named(name):
    (case,) = quick(only=name)
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contestant_of_every_case_is_right(dtype):
    cases = quick(dtype=dtype)
    assert len({case.name for case in cases}) == len(cases) == 2 * 2 * (2 + 4)
    errors = []
    for case in cases:
        assert list(right_contestants(case, errors.append)) == list(case.contestants)
        ways = {"dense", "mask_lora", "compressed"} if "masked" in case.name else {"dense", "compressed"}
        assert set(case.contestants) == set(case.metrics) == ways
    assert not errors


def test_bytes_flops_and_names_by_hand():
    case = named("forward 32x64 2:4, 5 tokens, rank 16, float32")
    assert case.flops == 2 * 5 * 32 * 64
    assert case.bytes == 4 * (32 * 64 + 5 * (32 + 64) + 16 * (32 + 64))
    assert case.tokens == 5
    assert case.metrics["dense"]["weight_bytes"] == 4 * 32 * 64
    assert case.metrics["compressed"]["weight_bytes"] == 4 * 32 * 32 + 2 * 32 * 4
    assert case.parameters["models"] == "tiny, same"
    training = named("masked LoRA training 32x64 2:4")
    assert training.flops == 3 * case.flops
    assert training.bytes == 4 * (32 * 64 + 2 * 5 * (32 + 64) + 2 * 16 * (32 + 64))
    assert training.metrics["mask_lora"]["weight_bytes"] == 4 * 32 * 64 + 32 * 8


def test_a_wrong_backend_is_not_timed(monkeypatch):
    run = BACKENDS["compressed"].run
    wrong = replace(BACKENDS["compressed"], run=lambda layer, x, lora: run(layer, x, lora) * (1 + 1e-4))
    monkeypatch.setitem(BACKENDS, "compressed", wrong)
    for name in ("forward 32x64 50%, 1 tokens, float32", "LoRA training 48x32 2:4"):
        errors = []
        assert list(right_contestants(quick(only=name)[0], errors.append)) == ["dense"]
        assert "compressed is wrong" in errors[0]


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    product = linear.masked_product
    # y is right, and the gradient of B is not: half of it is lost
    monkeypatch.setattr(linear, "masked_product", lambda x, layer, a, b: product(x, layer, a, (b + b.detach()) / 2))
    errors = []
    right = right_contestants(named("masked LoRA training 32x64 50%"), errors.append)
    assert list(right) == ["dense", "mask_lora"]
    assert "result 3 has a relative error of 5.0e-01" in errors[0]


def test_the_rule_of_errors():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    usual = torch.tensor([1.5, -4.0])  # an error of an eighth of the greatest
    right = expected((exact,), (usual,))
    unit = torch.finfo(torch.float32).eps
    assert right.allowed == (0.25 + unit,)
    check((torch.tensor([2.0, -4.0]),), right)
    with pytest.raises(AssertionError, match=r"result 0 has a relative error of 2\.8e-01, allowed are 2\.5e-01"):
        check((torch.tensor([2.125, -4.0]),), right)
    with pytest.raises(AssertionError, match="nan"):
        check((torch.tensor([float("nan"), -4.0]),), right)
    check((torch.zeros(2),), Expected((torch.zeros(2),), (0.0,)))
    assert accuracy.wider(torch.bfloat16, torch.device("cuda")) == torch.float32
    assert accuracy.wider(torch.float32, torch.device("cuda")) == torch.float64


def test_only_prunes_no_other_weights(monkeypatch):
    made = []
    weights = linear.Weights
    monkeypatch.setattr(linear, "Weights", lambda *args: made.append(args) or weights(*args))
    assert not quick(only="no such case")
    assert not made
    assert len(quick(only="48x32 2:4")) == 6
    assert len(made) == 1


def test_shapes_of_a_model(tiny_llama):
    cases = quick(model=str(tiny_llama / "dense"))
    assert {(case.parameters["rows"], case.parameters["cols"]) for case in cases} == {(32, 32), (48, 32), (32, 48)}


def test_full_shapes_are_those_of_the_models():
    shapes = {shape for table in linear.MODELS.values() for shape in table}
    assert {(11008, 4096), (13824, 5120), (28672, 8192), (3072, 768), (16384, 4096), (5120, 20480)} <= shapes
    assert (min(linear.TOKENS), max(linear.TOKENS)) == (1, 8192)
