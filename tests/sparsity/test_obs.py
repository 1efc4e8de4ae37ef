from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trisparse.sparsity import obs
from trisparse.sparsity.hessian import add_gram, factorise
from trisparse.sparsity.mask import check_masks, masks
from trisparse.sparsity.metric import Score
from trisparse.sparsity.obs import prune_and_update, update_kept
from trisparse.sparsity.pattern import NM, Rows, Unstructured, kept_of, parse_pattern
from trisparse.sparsity.sparsify import sparsify


def run(model, sparsity, method, data, **options):
    return sparsify(model, sparsity, method, data, progress=False, **options)


def linear(*rows, dtype=torch.float32):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False, dtype=dtype)
    layer.weight.data = torch.tensor(rows, dtype=dtype)
    return layer


def problem(rows, cols, seed=0, tokens=None):
    """A weight, correlated inputs and their factor."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    x = torch.randn(tokens or 4 * cols, cols, generator=generator)
    x = x @ mixing + 3 * torch.randn(len(x), 1, generator=generator)
    upper = torch.zeros(cols, cols)
    add_gram(upper, x)
    return torch.randn(rows, cols, generator=generator), x, factorise(upper, 0.01)


def column_loop(weight, x, keep, before_column=None):
    """OBS in fp64 from the formula: each pruned weight is removed from what is left by the inverse of what is left."""
    w = weight.double().clone()
    hessian = x.double().T @ x.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    for j in range(w.shape[1]):
        if before_column is not None:
            before_column(w, j)
        inverse = torch.linalg.inv(hessian[j:, j:])
        change = w[:, j, None] / inverse[0, 0] * inverse[0]
        w[:, j:] -= torch.where(keep[:, j, None], 0, change)
        w[:, j] = torch.where(keep[:, j], w[:, j], 0)
    return w


# H = XᵀX = [[2, 1], [1, 2]]. Pruning w_0 lets w_1 grow by w_0 · H_01 / H_11 = w_0 / 2; w_1 is last, so that nothing
# makes up for it.
CORRELATED = [torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])]


def test_update_by_hand():
    layer = linear([1.0, 3.0], [3.0, 1.0])
    report = run(layer, 0.5, "magnitude", CORRELATED, update="sequential", damping=1e-9)
    torch.testing.assert_close(layer.weight.data, torch.tensor([[0.0, 3.5], [3.0, 0.0]]), rtol=1e-6, atol=0)
    assert (report.update, report.targets[0].damping) == ("sequential", 1e-9)


def test_sparsegpt_by_hand():
    # |w_j| / U_jj with U_00² = 2/3, U_11² = 1/2: [2, 1.8] scores 2.45, 2.55, so that the greater weight goes, which
    # the other can make up for; [3, 2] scores 3.67, 2.83.
    layer = linear([2.0, 1.8], [3.0, 2.0])
    report = run(layer, 0.5, "sparsegpt", CORRELATED, damping=1e-9)
    torch.testing.assert_close(layer.weight.data, torch.tensor([[0.0, 2.8], [3.0, 0.0]]), rtol=1e-6, atol=0)
    assert (report.method, report.update) == ("sparsegpt", "iterative")


def test_dead_inputs_go_first_and_change_nothing():
    x = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    layer = linear([1.0, 9.0, 3.0, 9.0])
    run(layer, 0.5, "sparsegpt", [x])
    assert layer.weight.data.tolist() == [[1, 0, 3, 0]]
    layer = linear([1.0, 9.0, 3.0, 9.0])
    run(layer, 0.25, "sparsegpt", [x])  # one dead weight is kept by the budget: it counts, with the value 0
    assert layer.weight.data.tolist() == [[1, 0, 3, 0]]
    assert masks(layer)["weight"].matrix().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("cols", [5, 128, 150, 300])
def test_update_equals_the_formula_column_by_column(cols):
    weight, x, factor = problem(6, cols)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    updated = weight.clone()
    update_kept([updated], [factor], [keep])
    exact = column_loop(weight, x, keep)
    assert (updated[~keep] == 0).all()
    torch.testing.assert_close(updated.double(), exact, rtol=1e-3, atol=1e-4)
    before, after = (((weight - w) @ x.T).norm() for w in (weight * keep, updated))
    assert after < (0.8 if cols > 5 else 1) * before


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("block", [4, 8, 128])
def test_iterative_choice_equals_a_plain_loop(monkeypatch, scope, block):
    monkeypatch.setattr(obs, "MAX_BLOCK", block)
    weight, x, factor = problem(5, 22)
    size = x.square().mean(0).sqrt()
    updated = weight.clone()
    pattern = Unstructured(0.6, scope)
    (keep,) = prune_and_update([updated], [factor], pattern, lambda *columns: [Score(updated, size).columns(*columns)])
    plain = weight.clone()
    decided = torch.zeros(weight.shape, dtype=torch.bool)
    for first in range(0, 22, block):
        score = plain.abs() * size
        score[:, :first] = torch.where(decided[:, :first], torch.inf, -torch.inf)
        flat = score if scope == "row" else score.reshape(1, -1)
        order = flat.sort(dim=1, descending=True, stable=True).indices[:, : kept_of(flat.shape[1], 0.6)]
        decided = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True).view(weight.shape)
        plain = column_loop(weight, x, decided | (torch.arange(22) >= first + block)).float()
    assert torch.equal(keep, decided)
    torch.testing.assert_close(updated, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (4, 8)])
def test_sparsegpt_chooses_each_group_after_the_update(n, m):
    cols = 6 * 24
    weight, x, factor = problem(4, cols)
    scale = 1 / factor.upper.diagonal()
    found = []
    for forced in (False, True):
        updated = weight.clone()
        (keep,) = prune_and_update(
            [updated],
            [factor],
            NM(n, m),
            lambda first, end, updated=updated: [Score(updated, scale).columns(first, end)],
            by_group=True,
            forced=forced,
        )
        found.append((keep, updated))
    decided = torch.zeros(weight.shape, dtype=torch.bool)

    def choose(w, j):
        if j % m == 0:
            group = slice(j, j + m)
            order = (w[:, group].abs() * scale[group]).sort(dim=1, descending=True, stable=True).indices[:, :n]
            decided[:, group].scatter_(1, order, True)

    exact = column_loop(weight, x, decided, choose)
    for keep, updated in found:
        assert torch.equal(keep, decided)
        torch.testing.assert_close(updated.double(), exact, rtol=1e-3, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    groups=st.integers(1, 40),
    m=st.integers(2, 9),
    sparsity=st.floats(0, 0.99),
    kind=st.sampled_from(["row", "balanced", "layer", "nm", "nm by group"]),
    parts=st.integers(1, 2),
    seed=st.integers(0, 99),
    coarse=st.booleans(),
    gone=st.booleans(),
    block=st.sampled_from([16, 128]),
)
def test_budgets_are_exact(rows, groups, m, sparsity, kind, parts, seed, coarse, gone, block):
    cols = groups * m
    weights, factors = [], []
    for part in range(parts):
        weight, _, factor = problem(rows, cols, seed + part, tokens=3)
        weights.append(weight.round() if coarse else weight)  # zeros and ties
        factors.append(factor)
    pattern = NM(max(1, m // 2), m) if kind.startswith("nm") else Unstructured(sparsity, kind)
    # Weights pruned before have the least of all scores; some have to be kept at a low sparsity.
    before = [weight < -0.2 for weight in weights]

    def score(first, end):
        if not gone:
            return [Score(w).columns(first, end) for w in weights]
        pairs = ((w[:, first:end].abs(), pruned[:, first:end]) for w, pruned in zip(weights, before, strict=True))
        return [Score(w.masked_fill(pruned, -torch.inf), absolute=False) for w, pruned in pairs]

    with mock.patch.object(obs, "MAX_BLOCK", block):
        keeps = prune_and_update(weights, factors, pattern, score, by_group=kind == "nm by group", forced=gone)
    for weight, keep in zip(weights, keeps, strict=True):
        assert (weight[~keep] == 0).all()
        assert torch.isfinite(weight).all()
        if kind == "row":
            assert (keep.sum(1) == kept_of(cols, sparsity)).all()
        if isinstance(pattern, NM):
            assert (keep.view(rows, groups, m).sum(2) == pattern.n).all()
    if kind in ("balanced", "layer"):
        assert sum(int(keep.sum()) for keep in keeps) == kept_of(parts * rows * cols, sparsity)
    if kind == "balanced":
        of_rows = torch.cat([keep.sum(1) for keep in keeps])
        assert (of_rows.diff() <= 0).all()  # the first rows keep one more
        assert of_rows.max() - of_rows.min() <= 1


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_budget_is_exact_where_scores_fall_to_minus_infinity(monkeypatch, scope):
    monkeypatch.setattr(obs, "MAX_BLOCK", 4)
    weight, _, factor = problem(3, 12)
    calls = []

    def score(first, end):
        calls.append((first, end))
        fallen = torch.full_like(weight, -torch.inf) if len(calls) > 1 else weight.abs()
        return [Score(fallen, absolute=False).columns(first, end)]

    (keep,) = prune_and_update([weight], [factor], Unstructured(0.5, scope), score)
    assert calls == [(0, 12), (4, 12), (8, 12)]
    assert keep.sum() == 18


def test_infinite_scores_take_no_more_than_is_left_of_a_layer(monkeypatch):
    # the second row's first weight is decided; the infinite scores of the first row come before it
    monkeypatch.setattr(obs, "MAX_BLOCK", 2)
    weight, _, factor = problem(2, 4)
    first_scores = torch.tensor([[0.0, 0.0, 1.0, 0.5], [9.0, 0.0, 0.0, 0.0]])
    then = torch.tensor([[0.0, 0.0, torch.inf, torch.inf], [9.0, 0.0, 0.0, 0.0]])

    def score(first, end):
        return [Score(then if first else first_scores, absolute=False).columns(first, end)]

    (keep,) = prune_and_update([weight], [factor], Unstructured(0.75, "layer"), score)
    assert keep.int().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


MODES = [
    ("sparsegpt", None, "block"),
    ("sparsegpt", None, "dense"),
    ("wanda", "sequential", "block"),
    ("wanda", "iterative", "dense"),
    ("pruner-zero", "iterative", "block"),
    ("random", "sequential", "block"),
]


@pytest.mark.parametrize("sparsity", ["50%", "25% layer", "2:4"])
@pytest.mark.parametrize(
    ("name", "method", "update", "propagate"),
    [("llama", *mode) for mode in MODES] + [(name, *MODES[0]) for name in ("gpt2", "mixtral", "gpt-oss")],
)
def test_every_mode_meets_every_budget(model_named, tokens, name, method, update, propagate, sparsity):
    model = model_named(name)
    report = run(model, sparsity, method, tokens, samples=8, seq_len=16, update=update, propagate=propagate)
    pattern = parse_pattern(sparsity)
    for mask in masks(model).values():
        keep = mask.matrix()
        if sparsity == "50%":
            assert (keep.sum(1) == keep.shape[1] // 2).all()
        elif sparsity == "2:4":
            assert (keep.view(keep.shape[0], -1, 4).sum(2) == 2).all()
        assert mask.sparsity == pattern.sparsity
    check_masks(model)
    assert report.update == (update or "iterative")
    assert all(row.damping is not None for row in report.targets)
    assert f"{report.update} OBS" in str(report)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens).logits).all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_linear_calibration_sees_updated_weights(model_named, tokens, method):
    model = model_named("llama")
    update = "iterative" if method == "wanda" else None
    run(model, "50%", method, tokens, samples=8, seq_len=16, update=update, propagate="linear", dtype=torch.float32)
    first = model.model.layers[0].self_attn.q_proj.weight.clone()
    dense = model_named("llama")
    run(dense, "50%", method, tokens, samples=8, seq_len=16, update=update, propagate="dense", dtype=torch.float32)
    torch.testing.assert_close(dense.model.layers[0].self_attn.q_proj.weight, first)
    down = "model.layers.0.mlp.down_proj.weight"
    assert not torch.allclose(dense.get_parameter(down), model.get_parameter(down))


def test_sequential_has_the_mask_of_the_metric(model_named, tokens):
    found = []
    for update in (None, "sequential"):
        model = model_named("gpt2")
        run(model, "50%", "wanda", tokens, samples=8, seq_len=16, update=update, propagate="dense")
        found.append(model)
    plain, updated = found
    for name, mask in masks(plain).items():
        assert torch.equal(mask.bits, masks(updated)[name].bits)
        assert not torch.equal(plain.get_parameter(name), updated.get_parameter(name))


def test_layers_answer_better_with_an_update(model_named, tokens):
    errors = {}
    for method, update in (("wanda", None), ("wanda", "sequential"), ("wanda", "iterative"), ("sparsegpt", None)):
        model = model_named("gpt2")
        layer = model.transformer.h[0].mlp.c_proj
        seen = []
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        with torch.no_grad():
            model(input_ids=tokens)
        x, before = seen[0].reshape(-1, layer.weight.shape[0]), layer.weight.detach().clone()
        run(model, "50%", method, tokens, samples=8, seq_len=16, update=update, propagate="dense", dtype=torch.float32)
        errors[method, update] = (x @ (before - layer.weight.detach())).norm()
    plain = errors.pop(("wanda", None))
    assert all(error < 0.9 * plain for error in errors.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_computed_in_fp32_and_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 140, generator=generator).to(dtype)
    x = torch.randint(-2, 3, (300, 140), generator=generator).float()  # their products and sums are exact
    narrow, wide = linear(*weight.tolist(), dtype=dtype), linear(*weight.tolist())
    run(narrow, "50%", "sparsegpt", [x.to(dtype)])
    run(wide, "50%", "sparsegpt", [x])
    assert narrow.weight.dtype == dtype
    assert torch.equal(narrow.weight, wide.weight.to(dtype))
    assert not torch.equal(wide.weight, wide.weight.to(dtype).float())
    check_masks(narrow)


@pytest.mark.parametrize("sparsity", ["50%", "60% layer", "1:4"])
@pytest.mark.parametrize(
    ("method", "update"), [("sparsegpt", None), ("magnitude", "iterative"), ("wanda", "sequential")]
)
def test_weights_pruned_before_stay_pruned(model_named, tokens, monkeypatch, method, update, sparsity):
    monkeypatch.setattr(obs, "MAX_BLOCK", 16)  # so that an update comes before the choice in most columns
    model = model_named("llama")
    run(model, "2:4", "magnitude", None)
    before = {name: mask.matrix() for name, mask in masks(model).items()}
    run(model, sparsity, method, tokens, samples=8, seq_len=16, update=update)
    for name, mask in masks(model).items():
        assert not (mask.matrix() & ~before[name]).any()
    check_masks(model)


def test_convolutions(model_named):
    model = model_named("resnet")
    images = [{"pixel_values": torch.rand(4, 3, 32, 32)}]
    report = run(model, "50%", "sparsegpt", images, propagate="dense")
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    check_masks(model)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(3, 2, 1))
    x = torch.randn(2, 4, 6, 6)
    run(grouped[:1], "50%", "wanda", [x], update="sequential")
    check_masks(grouped)


def test_experts_without_tokens_are_pruned_by_magnitude_and_named(model_named, tokens):
    model = model_named("mixtral")
    experts = model.model.layers[1].mlp.experts
    model.model.layers[1].mlp.gate.forward = lambda x: (
        None,
        torch.full((x.shape[0], 2), 0.5, dtype=x.dtype),
        torch.tensor([[0, 1]]).expand(x.shape[0], 2),
    )
    weight = experts.gate_up_proj.detach().clone()
    report = run(model, "50%", "sparsegpt", tokens, samples=8, seq_len=16)
    note = next(row.note for row in report.targets if row.name == "model.layers.1.mlp.experts.gate_up_proj")
    assert note == "2 of 4 experts saw no calibration token: their X is 1 and their Hessian the identity"
    median = weight[3].abs().sort(dim=1).values[:, 15:16]
    assert torch.equal(experts.gate_up_proj.detach()[3], weight[3].masked_fill(weight[3].abs() <= median, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": Rows(0.5)}, "a pruned row keeps none"),
        ({"sparsity": "50% global", "propagate": "dense"}, "Hessians of all layers at once"),
        ({"data": None}, "pass data"),
        ({"data": None, "method": "magnitude", "update": "iterative"}, "pass data"),
        ({"update": "sequential"}, "'sparsegpt' finds its masks while it updates"),
        ({"update": "obs"}, "update must be one of sequential, iterative or None, got 'obs'"),
        ({"damping": 0}, "damping must be a finite number above 0, got 0"),
        ({"damping": float("nan")}, "damping must be"),
        ({"damping": True}, "damping must be"),
        ({"damping": "0.01"}, "damping must be"),
    ],
)
def test_what_cannot_be_done_is_refused(options, message):
    layer = linear([1.0, 2.0])
    arguments = {"sparsity": 0.5, "method": "sparsegpt", "data": CORRELATED, **options}
    with pytest.raises(ValueError, match=message):
        sparsify(layer, progress=False, **arguments)
    assert layer.weight.data.tolist() == [[1, 2]]
    assert not masks(layer)


def test_volumes_are_refused():
    with pytest.raises(ValueError, match=r"Conv3d, whose inputs torch cannot unfold \(weight\): exclude it"):
        run(nn.Conv3d(2, 2, 2), "50%", "sparsegpt", [torch.rand(1, 2, 3, 3, 3)])


def test_an_update_that_overflows_names_the_layer():
    layer = linear([5.9e4, 6e4], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"weight cannot be updated: a weight overflows torch\.float16"):
        run(layer, 0.5, "magnitude", [torch.tensor([[1.0, 1.0]], dtype=torch.float16)], update="sequential")
    assert layer.weight.data.tolist() == [[59008.0, 60000.0]]
