import pytest
import torch
from torch import nn

from trisparse.sparsity import hessian as module
from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.calibration import walk
from trisparse.sparsity.hessian import FactorisationError, add_gram, factorise, product_precision, unfolded
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import find_targets


def gram(rows):
    upper = torch.zeros(rows.shape[1], rows.shape[1])
    add_gram(upper, rows)
    return upper.triu()


def hessian_of(statistics, target, part=0):
    found = statistics._hessians.of((target.name, part))
    return None if found is None else found.upper.triu()


def test_gram_by_hand():
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    assert gram(rows).tolist() == [[10.0, -1.0], [0.0, 5.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "cols"), [(0, 3), (1, 1), (513, 5), (2500, 401), (20_000, 64)])
def test_gram_is_accumulated_in_fp32(dtype, tokens, cols):
    rows = (torch.randn(tokens, cols, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    exact = (rows.double().T @ rows.double()).triu()
    plain = (rows.float().T @ rows.float()).triu()
    error, allowed = ((value - exact).norm() for value in (gram(rows), plain))
    assert error <= 2 * allowed + 1e-12


def test_precision_of_products_comes_back():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "bf16"
        with product_precision("ieee"):
            assert setting.fp32_precision == "ieee"
        assert setting.fp32_precision == "bf16"
        rows = torch.randn(600, 40)
        exact = (rows.double().T @ rows.double()).triu()
        assert (gram(rows) - exact).norm() / exact.norm() < 1e-6  # fp32 inputs stay fp32, whatever the user allows
    finally:
        setting.fp32_precision = before


def test_factor_by_hand():
    # H = [[2, 1], [1, 2]], H⁻¹ = [[2, -1], [-1, 2]] / 3: U_00² = 2/3, U_01 = -1/3 / U_00, U_11² = 2/3 - U_01² = 1/2
    upper = torch.tensor([[2.0, 1.0], [torch.nan, 2.0]])
    factor = factorise(upper, 1e-9)
    expected = torch.tensor([[(2 / 3) ** 0.5, -((1 / 6) ** 0.5)], [0.0, 0.5**0.5]])
    torch.testing.assert_close(factor.upper, expected, rtol=1e-6, atol=1e-7)
    assert not factor.dead.any()


def test_factor_of_a_random_hessian():
    rows = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))  # rank 50: only damping makes it definite
    factor = factorise(gram(rows), 0.01)
    assert factor.damping == 0.01
    damped = rows.double().T @ rows.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    product = factor.upper.double().T @ factor.upper.double() @ damped
    torch.testing.assert_close(product, torch.eye(200, dtype=torch.double), rtol=0, atol=2e-3)
    assert torch.equal(factor.upper, factor.upper.triu())


def test_damping_grows_until_the_factorisation_succeeds():
    upper = torch.tensor([[1.0, 1.05], [0.0, 1.0]])  # eigenvalue -0.05, as rounding may leave one
    factor = factorise(upper, 0.01)
    assert factor.damping == pytest.approx(0.1)
    product = factor.upper.T @ factor.upper @ torch.tensor([[1.1, 1.05], [1.05, 1.1]])
    torch.testing.assert_close(product, torch.eye(2), rtol=0, atol=1e-4)


def test_dead_inputs_stand_alone():
    upper = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    factor = factorise(upper, 1e-9)
    assert factor.dead.tolist() == [False, True, False]
    alive = factor.upper[[0, 2]][:, [0, 2]]
    torch.testing.assert_close(alive, factorise(torch.tensor([[2.0, 1.0], [0.0, 2.0]]), 1e-9).upper)
    assert factor.upper[1].tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(factorise(torch.zeros(3, 3), 0.01).upper, torch.eye(3))


@pytest.mark.parametrize(
    ("upper", "message"),
    [
        ([[1.0, 1e9], [0.0, 1.0]], "no Cholesky factorisation, with a damping of up to 10000 times"),
        ([[torch.inf, 1.0], [0.0, 1.0]], "not finite"),
        ([[torch.nan, 1.0], [0.0, 1.0]], "not finite"),
    ],
)
def test_what_cannot_be_factorised_is_an_error(upper, message):
    with pytest.raises(FactorisationError, match=message):
        factorise(torch.tensor(upper), 0.01)


def test_a_failure_names_the_layer_and_changes_nothing(model_named, tokens, monkeypatch):
    model = model_named("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def indefinite(upper, rows):
        upper += 1
        upper[0, 1] += 1e12

    monkeypatch.setattr(module, "add_gram", indefinite)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight cannot be updated: .*Cholesky"):
        sparsify(model, "50%", "sparsegpt", tokens, samples=8, seq_len=16, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_damping_that_grew_is_reported(model_named, tokens, monkeypatch):
    real = module.factorise
    # As if rounding had made every Hessian indefinite by 5% of its diagonal.
    monkeypatch.setattr(
        module,
        "factorise",
        lambda upper, damping: real(upper - 0.05 * upper.diagonal().mean() * torch.eye(len(upper)), damping),
    )
    report = sparsify(model_named("llama"), "50%", "sparsegpt", tokens[:1, :8], samples=1, seq_len=8, progress=False)
    grown = [row for row in report.targets if row.damping > 0.01]
    assert grown
    assert all(row.note == f"its Hessian took a damping of {row.damping:g}" for row in grown)
    assert grown[0].note in str(report)
    assert report.to_dict()["targets"][0]["damping"] == report.targets[0].damping


def test_shared_input_is_summed_and_factorised_once(model_named, tokens, monkeypatch):
    grams, factors = [], []
    real_gram, real_factorise = module.add_gram, module.factorise
    monkeypatch.setattr(module, "add_gram", lambda upper, rows: grams.append(1) or real_gram(upper, rows))
    monkeypatch.setattr(module, "factorise", lambda upper, d: factors.append(1) or real_factorise(upper, d))
    for propagate in ("block", "linear"):
        grams.clear()
        factors.clear()
        sparsify(
            model_named("llama"), "2:4", "sparsegpt", tokens, samples=8, seq_len=16, propagate=propagate, progress=False
        )
        assert len(grams) == len(factors) == 3 * 4  # q = k = v, o, gate = up, down


def test_overwritten_input_is_another_one():
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)])
    targets = find_targets(model).found
    statistics = InputStatistics(targets, hessians=True)
    x = torch.tensor([[1.0, 2.0]])
    with torch.no_grad(), statistics.observing(), statistics.call():
        model[0](x)
        model[1](x)
        x.mul_(2)
        model[2](x)
    first, second, third = (statistics._hessians.of((t.name, 0)) for t in targets)
    assert first is second
    assert first.upper.triu().tolist() == [[1, 2], [0, 4]]
    assert third.upper.triu().tolist() == [[4, 8], [0, 16]]


def test_inputs_shared_in_some_calls_only():
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    targets = find_targets(model).found
    statistics = InputStatistics(targets, hessians=True)
    one, two, three = (torch.tensor([[float(value)]]) for value in (1, 2, 3))
    with torch.no_grad(), statistics.observing():
        for inputs in ((one, one), (two, three), (three, three)):
            with statistics.call():
                for layer, x in zip(model, inputs, strict=True):
                    layer(x)
    assert [hessian_of(statistics, target).item() for target in targets] == [1 + 4 + 9, 1 + 9 + 9]
    statistics.forget_hessians()
    assert hessian_of(statistics, targets[0]) is None


def test_padding_does_not_count(model_named, tokens):
    padded = torch.cat([tokens[:2], torch.zeros(2, 4, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(2, 16), torch.zeros(2, 4)], dim=1).long()
    found = []
    for batch in ({"input_ids": tokens[:2]}, {"input_ids": padded, "attention_mask": mask}):
        model = model_named("llama")
        steps = walk(
            model,
            find_targets(model),
            calibration_batches(model, [batch]),
            dtype=torch.float32,
            hessians=True,
        )
        found.append([hessian_of(s, t) for group, s in steps for t in group])
    for plain, with_padding in zip(*found, strict=True):
        torch.testing.assert_close(with_padding, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, bias=False),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", groups=4, bias=False),
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
        nn.Conv1d(4, 2, 4, padding="same", dilation=2, bias=False),
    ],
    ids=str,
)
def test_unfolded_rows_times_the_weight_are_the_convolution(layer):
    x = torch.randn(2, 4, *([7] * len(layer.kernel_size)))
    weight = layer.weight.detach().reshape(layer.groups, -1, layer.weight[0].numel())
    with torch.no_grad():
        expected = layer(x).flatten(2)
    places = expected.shape[2]
    parts = [rows.view(2, places, -1) @ weight[group].T for group, rows in enumerate(unfolded(x, layer))]
    torch.testing.assert_close(torch.cat(parts, dim=2).movedim(1, 2), expected, rtol=1e-4, atol=1e-5)


def test_experts_have_hessians_of_their_own_tokens(model_named, tokens):
    model = model_named("mixtral")
    targets = find_targets(model)
    group, statistics = next(
        walk(model, targets, calibration_batches(model, [{"input_ids": tokens}]), dtype=torch.float32, hessians=True)
    )
    target = next(t for t in group if t.name.endswith("gate_up_proj"))
    squares = statistics.rms(target).square() * statistics._counts[target.name][:, None]
    for part in range(target.parts):
        diagonal = hessian_of(statistics, target, part).diagonal()
        torch.testing.assert_close(diagonal.double(), squares[part], rtol=1e-4, atol=1e-6)
