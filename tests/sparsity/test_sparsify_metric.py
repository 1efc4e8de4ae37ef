"""``sparsify(method=...)`` with expressions, files and gradients."""

import json

import pytest
import torch
from torch import nn

from trisparse import Metric, sparsify
from trisparse.kernels.launch import Emulator, ptxsim, using
from trisparse.sparsity.gradient_statistics import GradientInfo, GradientStatistics
from trisparse.sparsity.mask import check_masks, masks, masks_sha256
from trisparse.sparsity.metric import METRICS
from trisparse.sparsity.targets import find_targets


def statistics_of(norms, unreached=None):
    """Gradient norms as if they had been measured, and the shapes of weights that no gradient reached."""
    shapes = {name: torch.Size(norm.shape) for name, norm in norms.items()} | (unreached or {})
    info = GradientInfo("by hand", 1, 1, "float32", "float32", unreached=tuple(unreached or ()))
    return GradientStatistics(norms, shapes, info)


def norms_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return statistics_of({t.name: torch.rand(t.matrix().shape, generator=generator) for t in find_targets(model).found})


def run(model, *args, **options):
    return sparsify(model, *args, progress=False, **options)


def linear(rows):
    model = nn.Linear(len(rows[0]), len(rows), bias=False)
    model.weight.data = torch.tensor(rows)
    return model


def gradient_of(model, rows):
    return statistics_of({t.name: torch.tensor(rows) for t in find_targets(model).found})


def test_expression_by_hand():
    model = linear([[4.0, 3, 2, 1]])
    report = run(model, 0.5, "abs(W) * sqr(X)", [torch.tensor([[0.1, 1.0, 1.0, 5.0]])])  # 0.04, 3, 2, 25
    assert model.weight.data.tolist() == [[0, 3, 0, 1]]
    assert report.method == "abs(W) * sqr(X)"
    assert report.propagate == "block"


def test_gradients_by_hand_need_no_data():
    model = linear([[4.0, 3, 2, 1]])
    report = run(model, 0.5, "snip", gradients=gradient_of(model, [[0.1, 1.0, 2.0, 9.0]]))  # 0.4, 3, 4, 9
    assert model.weight.data.tolist() == [[0, 0, 2, 1]]
    assert (report.method, report.propagate, report.samples) == ("snip", None, 0)


@pytest.mark.parametrize("form", ["expression", "metric", "file", "name"])
def test_forms_of_a_method_give_the_same_masks(model_named, tokens, tmp_path, form):
    Metric.parse("X * abs(W)", name="mine").save(tmp_path / "mine.json")
    method = {
        "expression": "abs(W * X)",
        "metric": Metric.parse("abs(W) * X + 0"),
        "file": tmp_path / "mine.json",
        "name": "wanda",
    }[form]
    model, wanda = model_named("llama"), model_named("llama")
    report = run(model, "2:4", method, tokens, samples=4, seq_len=16)
    run(wanda, "2:4", "wanda", tokens, samples=4, seq_len=16)
    assert masks_sha256(model) == masks_sha256(wanda)
    assert (
        report.method
        == {
            "expression": "abs(W * X)",
            "metric": "abs(W) * X + 0",
            "file": "mine: X * abs(W)",
            "name": "wanda",
        }[form]
    )


@pytest.mark.parametrize("sparsity", ["50%", "2:4", "50% layer", "50% global", "25% rows"])
@pytest.mark.parametrize("method", ["pruner-zero", "gblm", "ria"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_metrics_of_the_library_meet_the_budget(model_named, tokens, name, method, sparsity):
    model = model_named(name)
    options = {"gradients": norms_of(model)} if "G" in METRICS[method].uses else {}
    if "X" in METRICS[method].uses:
        options |= {"data": tokens, "samples": 8, "seq_len": 16}
    report = run(model, sparsity, method, propagate="dense", **options)
    assert report.sparsity == (0.25 if "25" in sparsity else 0.5)
    check_masks(model)


def test_fused_experts_get_their_own_gradients(model_named):
    model = model_named("mixtral")
    given = norms_of(model)
    scores = {t.name: (t.matrix() * given.norm(t)).abs() for t in find_targets(model).found}
    run(model, "50%", "snip", gradients=given)
    for name, mask in masks(model).items():
        score = scores[name]
        kept = mask.matrix()
        assert (score.masked_fill(~kept, torch.inf).amin(1) >= score.masked_fill(kept, 0).amax(1)).all()


_SCORES = ["random", "exp(-abs(W))"]
_NEGATIVE_SCORES = ["-sqr(W)", "W", "-abs(W) * G"]  # refused for rows, which are ranked by a norm


@pytest.mark.parametrize(
    ("sparsity", "method"),
    [(s, m) for s in ("50%", "2:4", "50% layer", "50% global") for m in (*_SCORES, *_NEGATIVE_SCORES)]
    + [("50% rows", m) for m in _SCORES],
)
def test_pruned_weights_go_first_again_whatever_a_zero_scores(model_named, sparsity, method):
    model = model_named("llama")
    run(model, "25% rows" if "rows" in sparsity else "25%" if ":" not in sparsity else "3:4")
    before = {name: mask.matrix() for name, mask in masks(model).items()}
    run(model, sparsity, method, gradients=norms_of(model))
    for name, mask in masks(model).items():
        assert not (mask.matrix() & ~before[name]).any()


def test_weights_that_were_put_back_are_ranked_like_all_others(model_named):
    model, fresh = model_named("llama"), model_named("llama")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, "2:4")
    model.load_state_dict(dense)
    for one in (model, fresh):
        run(one, "2:4", "-abs(W) * G", gradients=norms_of(one))
    assert masks_sha256(model) == masks_sha256(fresh)


def test_rows_refuse_negative_scores():
    model = linear([[1.0, -2], [3, 4]])
    with pytest.raises(
        ValueError, match=r"weight: metric W gives negative scores, and 50% rows ranks rows by the norm"
    ):
        run(model, "50% rows", "W")
    assert not masks(model)


def test_a_layer_without_gradient_is_left_and_named():
    model = nn.Sequential(linear([[1.0, 2]]), linear([[3.0], [4]]))
    report = run(
        model, 0.5, "snip", gradients=statistics_of({"0.weight": torch.ones(1, 2)}, {"1.weight": torch.Size([2, 1])})
    )
    assert [row.name for row in report.targets] == ["0.weight"]
    assert {row.name: row.reason for row in report.skipped}["1.weight"] == "no gradient reached it"


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (torch.ones(3, 2), r"of another model: weight is \[2, 2\], theirs \[3, 2\]"),
        (torch.tensor([[1.0, 2], [3, float("inf")]]).half(), "weight: metric snip: .* G must be finite"),
        (torch.tensor([[1.0, 2], [3, float("nan")]]), "weight: metric snip: .* G must be finite"),
    ],
)
def test_broken_gradients_are_named(norm, message):
    model = linear([[1.0, 2], [3, 4]])
    with pytest.raises(ValueError, match=message):
        run(model, 0.5, "snip", gradients=statistics_of({"weight": norm}))
    assert not masks(model)
    assert (model.weight != 0).all()


@pytest.mark.parametrize("given", [{"weight": torch.ones(2, 2)}, torch.ones(2, 2)])
def test_gradients_of_another_kind_are_refused(given):
    model = linear([[1.0, 2], [3, 4]])
    with pytest.raises(ValueError, match="gradients must be GradientStatistics or a file"):
        run(model, 0.5, "snip", gradients=given)
    assert not masks(model)


def test_gradients_that_lack_a_layer_change_nothing(model_named):
    model = model_named("llama")
    some = {t.name: torch.ones(t.matrix().shape) for t in find_targets(model).found[:9]}
    with pytest.raises(ValueError, match="another model or choice of layers"):
        run(model, 0.5, "snip", gradients=statistics_of(some))
    assert not masks(model)


def test_weights_pruned_before_go_before_live_ones_whose_input_is_zero():
    model = linear([[0.1, 5, 6, 7]])
    run(model, "25%")
    model.weight.data[0, 0] = 0
    run(model, "25%", "wanda", [torch.tensor([[1.0, 0, 1, 1]])])
    assert model.weight.data.tolist() == [[0, 5, 6, 7]]


def test_overflow_names_metric_and_layer():
    model = linear([[1.0, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"^weight: metric W \* mms\(exp\(90 \* W\)\) gives NaN: a value overflows"):
        run(model, 0.5, "W * mms(exp(90 * W))")
    assert not masks(model)


def test_a_metric_with_gradients_and_inputs_needs_data(model_named):
    model = model_named("llama")
    with pytest.raises(ValueError, match="'gblm' ranks by the layers' inputs: pass data"):
        run(model, 0.5, "gblm", gradients=norms_of(model))


def test_the_report_keeps_the_formula(tmp_path):
    model = linear([[1.0, 2], [3, 4]])
    report = run(model, 0.5, Metric.parse("sqr(W)", name="wanda"))  # a name that the library has otherwise
    assert json.loads(report.to_json())["method"] == "wanda: sqr(W)"


def test_gradients_are_measured_once_and_then_read_from_the_cache(model_named, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path))
    first, second, given = (model_named("llama") for _ in range(3))
    run(first, "2:4", "pruner-zero", tokens, samples=4, seq_len=16)
    (file,) = (tmp_path / "gradients").glob("*.safetensors")
    monkeypatch.setattr("trisparse.sparsity.gradient_cache.gradient_norms", None)  # a second measurement would fail
    run(second, "2:4", "pruner-zero", tokens, samples=4, seq_len=16)
    run(given, "2:4", "pruner-zero", gradients=file)
    assert masks_sha256(first) == masks_sha256(second) == masks_sha256(given)
    magnitude = model_named("llama")
    run(magnitude, "2:4", "magnitude")
    assert masks_sha256(first) != masks_sha256(magnitude)


def test_a_damaged_or_unwritable_cache_is_no_obstacle(model_named, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path))
    first, second, third = (model_named("llama") for _ in range(3))
    run(first, "2:4", "snip", tokens, samples=2, seq_len=16)
    (file,) = (tmp_path / "gradients").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    run(second, "2:4", "snip", tokens, samples=2, seq_len=16)
    assert file.stat().st_size > 100
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="kept in memory: the cache cannot be written"):
        run(third, "2:4", "snip", tokens, samples=2, seq_len=16)
    assert masks_sha256(first) == masks_sha256(second) == masks_sha256(third)


def test_a_file_of_another_models_gradients_is_refused(model_named, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path))
    run(model_named("llama"), "2:4", "snip", tokens, samples=2, seq_len=16)
    (file,) = (tmp_path / "gradients").glob("*.safetensors")
    other = model_named("gpt2")
    before = masks_sha256(other)
    with pytest.raises(ValueError, match=r"transformer\.h\.0"):
        run(other, "2:4", "snip", gradients=file)
    assert masks_sha256(other) == before


@pytest.fixture
def emulator():
    try:
        ptxsim()
    except ImportError:
        pytest.skip("needs ptxsim")
    return Emulator()


@pytest.mark.ptx
@pytest.mark.parametrize("sparsity", ["50%", "2:4", "50% global"])
def test_kernels_select_by_the_metric_itself(model_named, sparsity, emulator):
    emulated, on_cpu = model_named("llama-tied"), model_named("llama-tied")
    run(on_cpu, sparsity, "pruner-zero", gradients=norms_of(on_cpu), include="*layers.0.self_attn.k_proj*")
    with using(emulator):
        run(emulated, sparsity, "pruner-zero", gradients=norms_of(emulated), include="*layers.0.self_attn.k_proj*")
    assert masks_sha256(emulated) == masks_sha256(on_cpu)
    assert emulator.profiles[0][0] == "statistics_kernel"  # mms(G) needs G's least and greatest; no score was formed
