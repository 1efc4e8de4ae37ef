"""Weights that break selections, and an oracle that shares no code with them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
from torch import Tensor

from trisparse.kernels.obs import obs_block, obs_block_ref
from trisparse.kernels.select import select_rows_ref
from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.metric.library import METRICS
from trisparse.sparsity.metric.operations import OPERATIONS
from trisparse.sparsity.metric.parser import parse

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _awkward(rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    special = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 2.0**-24, -(2.0**-24), 1e-40, 2e-45])
    picks = torch.randint(0, len(special), (rows, cols), generator=generator)
    return {
        "normal": normal(rows, cols),
        "strided rows": normal(rows, cols + 5)[:, 2 : 2 + cols],
        "every other row": normal(2 * rows, cols)[::2],
        "all equal": torch.full((rows, cols), -1.5, dtype=dtype),
        "all zero": torch.zeros(rows, cols, dtype=dtype),
        "zeros of both signs": torch.zeros(rows, cols, dtype=dtype) * normal(rows, cols),
        "few values": (normal(rows, cols) * 2).round() / 2,
        "special values": special[picks].to(dtype),
        "subnormals": (normal(rows, cols).float() * 1e-39).to(dtype),
    }


@pytest.fixture(scope="session")
def awkward() -> Callable[[int, int, torch.dtype], dict[str, Tensor]]:
    """Named weights [rows, cols] of a dtype: ties, zeros of both signs, infinities, subnormals, strides."""
    return functools.cache(_awkward)


@pytest.fixture(scope="session")
def greatest() -> Callable[[Sequence[float], int], list[bool]]:
    """Which of some scores are among the k greatest, ties to the lower index: a sort in plain Python."""

    def mark(scores: Sequence[float], k: int) -> list[bool]:
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        kept = set(order[:k])
        return [i in kept for i in range(len(scores))]

    return mark


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """fp32, fp16 and bf16."""
    value = request.param
    assert isinstance(value, torch.dtype)
    return value


Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="session")
def library() -> dict[str, Node]:
    """The trees of the metrics of the library, but for random, and some that reduce in every way."""
    trees = {name: metric.root for name, metric in METRICS.items() if metric.root is not None}
    more = {
        "nested": "zsn(mms(W) * G) * (div(W, exp(X)) + tanh(norm2(rowsum(W))))",
        "vectors": "W + zsn(X) * mms(rowsum(exp(-W))) - colsum(mean(X) * W)",
        "numbers": "maximum(minimum(log(W), 0.25 * norm1(G)), min(W) / max(sqr(W))) + skp(pow(W))",
    }
    return {**trees, **{name: parse(text) for name, text in more.items()}}


def _tree(random: Random, depth: int) -> Node:
    if depth == 1 or random.random() < 0.08:
        leaf = random.choice(["W", "W", "G", "X", ""])
        return Node(leaf, number=0.0 if leaf else round(random.uniform(-2, 2), 2))
    name = random.choice(sorted(OPERATIONS))
    return Node(name, tuple(_tree(random, depth - 1) for _ in range(OPERATIONS[name].arity)))


@pytest.fixture(scope="session")
def trees() -> list[Node]:
    """200 different random trees of all operations, of depth 2 to 5, whose value has the shape of W."""
    random, found = Random(0), dict[Node, None]()
    while len(found) < 200:
        tree = _tree(random, random.randint(2, 5))
        if all(tree.shape) and tree.depth > 1:
            found[tree] = None
    assert {node.data for tree in found for node in tree.walk()} >= set(OPERATIONS)
    return list(found)


@pytest.fixture(scope="session")
def inputs() -> Callable[..., Inputs]:
    """(W, G, X): W normal, G and X positive as the norms that they are; by shape, seed and the dtypes of W and G."""

    def make(rows: int, cols: int, seed: int, w: torch.dtype = torch.float32, g: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, cols, generator=generator)
        gradient = torch.rand(rows, cols, generator=generator) * 0.1
        return weight.to(w), gradient.to(g), torch.rand(cols, generator=generator) + 0.1

    return make


def _in_fp64(node: Node, values: dict[str, Tensor]) -> Tensor:
    if node.data in values:
        return values[node.data]
    if node.is_number:
        return torch.full((1, 1), node.number, dtype=torch.float64)
    return OPERATIONS[node.data].compute(*(_in_fp64(operand, values) for operand in node.operands))


def _rounding(tree: Node, given: Inputs) -> float:
    values = {name: value.double().cpu() for name, value in zip("WGX", given, strict=True)}
    exact = _in_fp64(tree, {**values, "X": values["X"][None]})
    error = (tree.evaluate(*given).double().cpu() - exact).abs()
    return float(error[error.isfinite()].max()) if bool(error.isfinite().any()) else 0.0


@pytest.fixture(scope="session")
def same_score() -> Callable[[Tensor, Node, Inputs], None]:
    """Assert that a score is torch's: it errs by no more than 4 times what torch does in fp32, and 4 units.

    Torch's error, E, is the greatest in the matrix against fp64. NaN and Inf must be at the same places.
    """

    def check(score: Tensor, tree: Node, given: Inputs) -> None:
        expected = tree.evaluate(*given)
        assert score.shape == expected.shape
        assert score.dtype == torch.float32
        assert torch.equal(score.isnan(), expected.isnan()), tree
        differ = (score != expected) & ~score.isnan()
        if bool(differ.any()):
            apart = (score[differ] - expected[differ]).abs()
            bound = 4 * _rounding(tree, given) + 4 * 2.0**-23 * expected[differ].abs()
            assert bool((apart <= bound).all()), (tree, float((apart / bound).max()))

    return check


@pytest.fixture(scope="session")
def same_mask() -> Callable[[Tensor, Node, Inputs, int, int], bool]:
    """Assert that a mask keeps the k greatest scores of each group of ``size``, as torch scores them, up to ties.

    The budget is exact; and where the mask differs from that of torch's scores, the score differs from the k-th of
    its group by at most twice the bound of `same_score`: 8 E + 8 units. Returns whether the masks are equal.
    """

    def check(mask: Tensor, tree: Node, given: Inputs, k: int, size: int) -> bool:
        score = tree.evaluate(*given)
        expected = select_rows_ref(score.reshape(-1, size), k, absolute=False)
        got = mask.reshape(-1, size)
        assert bool((got.sum(1) == k).all()), tree
        if torch.equal(got, expected):
            return True
        groups = score.reshape(-1, size)
        kth = groups.sort(1, descending=True).values[:, k - 1 : k].expand_as(groups)
        wrong = got != expected
        apart = (groups[wrong] - kth[wrong]).abs()
        bound = 8 * _rounding(tree, given) + 8 * 2.0**-23 * kth[wrong].abs()
        assert bool((apart <= bound).all()), (tree, float((apart / bound).max()))
        return False

    return check


ObsInputs = tuple[Tensor, Tensor]


@pytest.fixture(scope="session")
def obs_inputs() -> Callable[..., ObsInputs]:
    """(weight [rows, block], U [block, block]) of an OBS update, by rows, block, kind and storage.

    "random" has the factor of a random Hessian. "exact" has small integers and few powers of two, so that an update
    rounds nothing and has many ties. Below its diagonal U is NaN. The weight is stored by "rows", by "columns", or
    either way as a "slice of rows" or "slice of columns" of a wider one.
    """

    def make(rows: int, block: int, kind: str = "random", storage: str = "rows") -> ObsInputs:
        generator = torch.Generator().manual_seed(1000 * rows + block)
        wide = torch.randn(rows, block + 12, generator=generator)
        if kind == "exact":
            wide = (wide * 3).round()
            few = torch.rand(block, block, generator=generator) < 2 / block
            sign = 2.0 * torch.randint(0, 2, (block, block), generator=generator) - 1
            factor = few * sign * 0.5 ** torch.randint(0, 2, (block, block), generator=generator)
            factor.diagonal().copy_(0.5 ** torch.randint(-1, 2, (block,), generator=generator))
        else:
            x = torch.randn(2 * block, block, generator=generator)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(x.T @ x / block + 0.1 * torch.eye(block)))
            factor = torch.linalg.cholesky(inverse).T
        below = torch.ones(block, block, dtype=torch.bool).tril(-1)
        stored = {
            "rows": wide[:, 8 : 8 + block].contiguous(),
            "columns": wide[:, 8 : 8 + block].t().contiguous().t(),
            "slice of rows": wide[:, 8 : 8 + block],
            "slice of columns": wide.t().contiguous()[8 : 8 + block].t(),
        }
        return stored[storage], factor.contiguous().masked_fill_(below, torch.nan)

    return make


def _check_choice(weight: Tensor, factor: Tensor, mask: Tensor, n: int, m: int) -> None:
    """Replay the updates in fp64: what is kept of each group has no lesser score than what is not, up to rounding."""
    w, u = weight.double(), factor.double()
    for j in range(w.shape[1]):
        if j % m == 0:
            scores, kept = (w / u.diagonal())[:, j : j + m].abs(), mask[:, j : j + m]
            assert bool((kept.sum(1) == n).all())
            least = scores.masked_fill(~kept, math.inf).amin(1)
            assert bool((scores.masked_fill(kept, 0).amax(1) <= least * (1 + 1e-5) + 1e-6).all()), j
        error = w[:, j] * ~mask[:, j] / u[j, j]
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]


@pytest.fixture(scope="session")
def check_obs_block() -> Callable[..., Tensor]:
    """Assert that `obs_block` gives what its reference does, from (weight, U), the arguments after U, and the kind.

    Returns its mask.

    Of exact inputs all is equal. Of random ones the mask may be another one where scores are equal up to rounding; for
    the mask that was chosen, weights and errors err by at most twice what the reference in fp32 does against fp64.
    """

    def check(given: ObsInputs, arguments: Sequence[object], exact: bool = False, in_place: bool = False) -> Tensor:
        weight, factor = given
        before = weight.clone()
        new, errors, mask = obs_block(weight, factor, *arguments, in_place=in_place)
        assert (new is weight) == in_place
        assert in_place or torch.equal(weight, before)
        assert not bool((new[~mask]).any())
        torch_new, torch_errors, expected = obs_block_ref(before, factor, *(arguments if exact else (mask,)))
        wide = obs_block_ref(before.double(), factor.double(), mask)
        for mine, torchs, true in ((new, torch_new, wide[0]), (errors, torch_errors, wide[1])):
            if exact:
                assert torch.equal(mine.double(), true)
            else:
                assert float((mine - true).abs().max()) <= 2 * float((torchs - true).abs().max())
        assert torch.equal(mask, expected)
        if not exact and arguments[0] is None:
            _check_choice(before, factor, mask, arguments[1], arguments[2])
        return mask

    return check
