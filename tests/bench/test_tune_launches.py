"""Tuning of launch configurations, with the kernels interpreted or emulated and the times made up."""

import os

import pytest
import torch
from torch import nn

from trisparse.kernels import linear24, linear_config, tuned
from trisparse.kernels.launch import Emulator, ptxsim, using
from trisparse.kernels.linear import linear
from trisparse.kernels.tuned import bucket, launch_config, trying
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.sparsify import sparsify

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels", allow_module_level=True)
from trisparse.bench.tune_launches import tune_launches

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path))
    launch_config.cache_clear()


def layer(pattern="2:4", rows=32, cols=128):
    torch.manual_seed(0)
    dense = nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16)
    sparsify(dense, pattern, include="weight", progress=False)
    return SparseLinear.from_dense(dense)


def emulated():
    try:
        ptxsim()
    except ImportError:
        pytest.skip("needs ptxsim")
    return using(Emulator())


def test_alternatives_begin_with_the_computed_configuration():
    case = {"format": "2:4", "rank": 16, "backward": False}
    for tokens in (1, 64):
        for cc in (80, 90):
            found = linear_config.alternatives((4096, 4096), torch.bfloat16, cc, tokens, **case)
            assert found[0] == linear_config.config((4096, 4096), torch.bfloat16, cc, tokens, **case)
            assert len(set(found)) == len(found) > 10
        assert linear24.alternatives(4096, 4096, tokens, 16, 80)[0] == linear24.config(4096, 4096, tokens, 16, 80)


def test_token_counts_share_powers_of_two():
    assert [bucket(tokens) for tokens in (0, 1, 2, 3, 4, 5, 2048, 2049)] == [1, 1, 2, 4, 4, 8, 2048, 4096]


@pytest.mark.ptx
def test_the_fastest_is_kept_and_used(monkeypatch):
    monkeypatch.setattr(linear_config, "alternatives", some(linear_config.alternatives))
    monkeypatch.setattr(linear24, "alternatives", some(linear24.alternatives))

    def timer(runs, device, repeats):
        return {name: 1.0 if name != "2" else 0.5 for name in runs}

    sparse = layer()
    with emulated():
        rows = tune_launches([sparse], tokens=(3,), timer=timer)
        assert tune_launches([sparse], tokens=(4,), timer=lambda *_: pytest.fail("measured again")) == []
    assert [row["kernel"] for row in rows] == ["linear", "linear", "linear24"]
    for row in rows:
        assert (row["tried"], row["seconds"], row["computed_seconds"]) == (3, 0.5, 1.0)
        assert launch_config(CPU, row["kernel"], row["case"]) == row["config"]


@pytest.mark.ptx
def test_a_tie_keeps_the_computed_one(monkeypatch):
    monkeypatch.setattr(linear_config, "alternatives", some(linear_config.alternatives))
    with emulated():
        rows = tune_launches([layer("4:8")], tokens=(1,), timer=lambda runs, *_: {n: 1 - int(n) / 150 for n in runs})
    for row in rows:
        assert row["seconds"] == row["computed_seconds"] == 1
        assert row["config"]["reason"] != "measured"


def some(alternatives):
    """The computed configuration and two others of a list."""

    def three(*args, **kwargs):
        found = alternatives(*args, **kwargs)
        return [found[0], found[1], found[-1]]

    return three


def test_what_was_measured_replaces_what_is_computed(monkeypatch):
    x = torch.randn(1, 128, dtype=torch.bfloat16)
    key = "a case"
    assert tuned.tuned(x, "linear", key) is None
    tuned.keep(CPU, "configs", f"linear {key}", {"tokens": 16})
    assert tuned.tuned(x, "linear", key) is None  # not on CUDA
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert tuned.tuned(x, "linear", key) == {"tokens": 16}
    assert tuned.tuned(x, "linear24", key) is None
    with using(Emulator()):
        assert tuned.tuned(x, "linear", key) is None  # repeatable
        with trying("linear", {"tokens": 32}):
            assert tuned.tuned(x, "linear", key) == {"tokens": 32}


@pytest.mark.ptx
def test_alternatives_on_sparse_tensor_cores_are_right():
    weight, x = layer("2:4", 64, 256).compressed(), torch.randn(5, 256, dtype=torch.bfloat16)
    packed = linear24.pack24(weight.values, weight.meta)
    with emulated():
        expected = linear24.linear24(x, *packed)
        for config in linear24.alternatives(64, 256, 5, 0, 80)[1::4]:
            with trying("linear24", vars(config)):
                assert (linear24.linear24(x, *packed) - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.ptx
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_alternatives_are_right(pattern):
    sparse = layer(pattern, 64, 256)
    weight, x = sparse.compressed(), torch.randn(5, 256, dtype=torch.bfloat16)
    case = {"format": sparse.format, "rank": 0, "backward": False}
    found = linear_config.alternatives(weight.shape, torch.bfloat16, 80, 5, **case)
    with emulated():
        expected = linear(x, weight)
        for config in found[1::17]:
            with trying("linear", vars(config)):
                assert (linear(x, weight) - expected).abs().max() <= 2**-7 * expected.abs().max()
