import json
import math

import pytest
import torch
from torch import nn

from trisparse.kernels import tuned
from trisparse.kernels.tuned import tune_file
from trisparse.sparsity import tuning
from trisparse.sparsity.backends import Backend, Plan, default_plan
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.tuning import cached_times, choose_plan, key, plan_from, time_in_turn, tune, tune_on_use


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path))


def layer(pattern="50%", rows=32, cols=64, dtype=torch.float32):
    torch.manual_seed(0)
    dense = nn.Linear(cols, rows).to(dtype)
    sparsify(dense, pattern, include="weight", progress=False)
    return SparseLinear.from_dense(dense)


def test_plan_takes_the_fastest_and_dense_wins_ties():
    times = {
        1: {"dense": 10.0, "compressed": 6.0, "decompress": 20.0},
        8: {"dense": 10.0, "compressed": 7.0, "decompress": 20.0},
        64: {"dense": 10.0, "compressed": 9.81, "decompress": 20.0},  # less than 2% faster
        512: {"dense": 80.0, "compressed": 120.0, "decompress": 90.0},
    }
    assert plan_from(times) == Plan("rows", ((8, "compressed"), (None, "dense")))
    times[64]["compressed"] = 9.79
    assert plan_from(times) == Plan("rows", ((64, "compressed"), (None, "dense")))
    assert plan_from(times, "memory") == Plan("rows", ((64, "compressed"), (None, "decompress")))
    times[512]["decompress"] = 70.0
    assert plan_from(times) == Plan("rows", ((64, "compressed"), (None, "decompress")))


def test_plan_is_never_slower_than_dense_by_more_than_the_margin():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        names = ["dense", "compressed", "decompress", "mma.sp", "semi-structured"]
        times = {
            tokens: dict(zip(names, torch.rand(5, generator=generator).add(0.1).tolist(), strict=True))
            for tokens in (1, 16, 128)
        }
        plan = plan_from(times)
        for tokens, row in times.items():
            assert plan is None or row[plan.backend(tokens)] <= row["dense"]


def test_plan_chooses_the_layout_by_all_token_counts():
    times = {
        1: {"dense": 10.0, "compressed": 6.0, "mma.sp": 6.1, "semi-structured": 12.0},
        2048: {"dense": 100.0, "compressed": 150.0, "mma.sp": 60.0, "semi-structured": 70.0},
    }
    assert plan_from(times) == Plan("fragments", ((None, "mma.sp"),))
    times[2048]["mma.sp"] = 99.0
    assert plan_from(times) == Plan("rows", ((1, "compressed"), (None, "semi-structured")))
    assert plan_from(times, "memory") == Plan("fragments", ((None, "mma.sp"),))


def test_no_plan_where_dense_always_wins():
    times = {1: {"dense": 1.0, "compressed": 1.0}, 64: {"dense": 1.0, "compressed": 3.0}}
    assert plan_from(times) is None
    assert plan_from(times, "memory") == Plan("rows", ((None, "compressed"),))


def test_times_are_measured_once_and_kept(monkeypatch):
    sparse = layer()
    assert cached_times(sparse) is None
    times = tune(sparse, tokens=(1, 4), repeats=2)
    assert times.keys() == {1, 4}
    assert times[1].keys() == {"compressed", "dense"}
    assert all(0 < seconds < math.inf for row in times.values() for seconds in row.values())
    assert cached_times(sparse) == times
    assert cached_times(layer("2:4")) is None
    monkeypatch.setattr(tuning, "time_in_turn", lambda *_: pytest.fail("measured again"))
    assert tune(sparse, tokens=(4,)) == {4: times[4]}
    content = json.loads(tune_file(torch.device("cpu")).read_text())
    assert list(content["backends"]) == ["32x64 float32 50% kept rank 0"]
    monkeypatch.setattr(tuned, "_versions", lambda: {"torch": "another"})
    assert cached_times(sparse) is None


def test_measuring_again_keeps_other_entries():
    tune(layer(), tokens=(1,), repeats=1)
    tune(layer("2:4", dtype=torch.bfloat16), tokens=(1,), rank=4, repeats=1)
    tune(layer(), tokens=(1,), repeats=1, again=True)
    content = json.loads(tune_file(torch.device("cpu")).read_text())
    assert sorted(content["backends"]) == ["32x64 bfloat16 2:4 rank 4", "32x64 float32 50% kept rank 0"]


def test_the_layer_itself_is_not_changed():
    sparse = layer("2:4")
    before, plan = sparse.weight.clone(), sparse.plan
    tune(sparse, tokens=(1,), repeats=1)
    assert torch.equal(sparse.weight, before)
    assert (sparse.plan, sparse.dense) == (plan, None)


def test_a_wrong_result_is_never_timed(monkeypatch):
    wrong = Backend(lambda layer, x, lora: tuning.BACKENDS["dense"].run(layer, x, lora) * 1.01, lambda layer: None)
    monkeypatch.setitem(tuning.BACKENDS, "compressed", wrong)
    with pytest.raises(RuntimeError, match=r"wrong results at 32x64 float32 50% kept rank 0: .*compressed"):
        tune(layer(), tokens=(1,), repeats=1)
    assert cached_times(layer()) is None


def test_contestants_take_turns():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert time_in_turn(runs, torch.device("cpu"), 3).keys() == {"a", "b"}
    assert order == ["a", "b"] * 4  # the first round warms up


def test_the_cpu_keeps_its_plan():
    sparse = layer()
    times = {1: {"dense": 1.0, "compressed": 5.0}}
    assert choose_plan(sparse, "speed", times) == default_plan(sparse) == Plan("rows", ((None, "compressed"),))


def test_tuned_on_first_use(monkeypatch):
    sparse = layer()
    sparse.tune_for = "memory"
    asked = []
    monkeypatch.setattr(tuning, "tune_on_use", lambda layer, prefer: asked.append((layer, prefer)))
    x = torch.randn(3, 64)
    for _ in range(2):
        assert torch.equal(sparse(x), layer()(x))
    assert asked == [(sparse, "memory")]


def test_the_cpu_is_not_measured_on_use():
    sparse = layer()
    tune_on_use(sparse, "speed")
    assert cached_times(sparse) is None


def test_other_token_counts_are_added():
    tune(layer(), tokens=(1, 4), repeats=1)
    tune(layer(), tokens=(2,), repeats=1)
    assert list(cached_times(layer())) == [1, 2, 4]


def test_inference_mode_and_autocast_change_nothing():
    sparse = layer("2:4")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        tune(sparse, tokens=(1,), repeats=1)
    assert not sparse.values.is_inference()
    assert cached_times(sparse).keys() == {1}


def test_a_weight_of_zeros_can_be_tuned():
    sparse = layer()
    sparse.bias = None
    sparse.values.zero_()
    assert tune(sparse, tokens=(1,), repeats=1)


def test_key_names_what_the_time_depends_on():
    assert key(layer("2:4", dtype=torch.bfloat16), 16) == "32x64 bfloat16 2:4 rank 16"
    assert key(layer("25%")) == "32x64 float32 75% kept rank 0"


def test_wrong_inputs():
    with pytest.raises(ValueError, match=r"tokens is \(0,\)"):
        tune(layer(), tokens=(0,))
    with pytest.raises(ValueError, match=r"rank is 129; it must be in 0\.\.128"):
        tune(layer(), rank=129)
    file = tune_file(torch.device("cpu"))
    file.parent.mkdir(parents=True)
    for content in ("{", "[]", "{}"):
        file.write_text(content)
        with pytest.raises(ValueError, match="is damaged, remove it"):
            cached_times(layer())
