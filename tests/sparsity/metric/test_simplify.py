"""Each rule on its own, and all of them on random trees."""

import pytest
import torch

from trisparse.sparsity.metric import exact_rules, opposing_rules, rank_rules
from trisparse.sparsity.metric.exact_rules import EXACT_RULES
from trisparse.sparsity.metric.fingerprint import fingerprint
from trisparse.sparsity.metric.interval import interval
from trisparse.sparsity.metric.opposing_rules import OPPOSING_RULES
from trisparse.sparsity.metric.parser import parse
from trisparse.sparsity.metric.rank_rules import EQUAL_RULES, ROOT_RULES
from trisparse.sparsity.metric.simplify import simplify
from trisparse.sparsity.metric.text import infix

# (rule, an expression whose root it rewrites, what becomes of it)
EXACT = [
    ("drop_skip", "skp(W)", "W"),
    ("neutral_element", "W + 0", "W"),
    ("neutral_element", "0 + W", "W"),
    ("neutral_element", "W - 0", "W"),
    ("neutral_element", "0 - W", "-W"),
    ("neutral_element", "W * 1", "W"),
    ("neutral_element", "-1 * W", "-W"),
    ("neutral_element", "W / 1", "W"),
    ("neutral_element", "W + 0 * X", "W"),
    ("zero", "G - G", "0 * W"),
    ("zero", "sqr(0 * G)", "0 * W"),
    ("zero", "div(W, 0)", "0 * W"),
    ("zero", "W / (0 * X)", "0 * W"),
    ("double_negation", "--W", "W"),
    ("double_negation", "-(W - G)", "G - W"),
    ("sign_of_sum", "W + -G", "W - G"),
    ("sign_of_sum", "-W + G", "G - W"),
    ("sign_of_sum", "W - -G", "W + G"),
    ("sign_of_sum", "-W - G", "-(W + G)"),
    ("sign_of_product", "-W * G", "-(W * G)"),
    ("sign_of_product", "G * -W", "-(G * W)"),
    ("sign_of_product", "G / -W", "-(G / W)"),
    ("sign_of_product", "div(-W, G)", "-div(W, G)"),
    ("sign_of_product", "div(G, -W)", "div(G, W)"),
    ("sign_of_product", "div(G, abs(W))", "div(G, W)"),
    ("even_function", "abs(-W)", "abs(W)"),
    ("even_function", "abs(abs(W))", "abs(W)"),
    ("even_function", "sqr(-W)", "sqr(W)"),
    ("even_function", "log(abs(W))", "log(W)"),
    ("even_function", "sqrt(abs(W))", "sqrt(W)"),
    ("absolute_of_nonnegative", "abs(sqr(W))", "sqr(W)"),
    ("absolute_of_nonnegative", "abs(W * W)", "W * W"),
    ("absolute_of_nonnegative", "abs(mms(W) + G / X)", "mms(W) + G / X"),
    ("absolute_of_product", "abs(W * X)", "abs(W) * abs(X)"),
    ("absolute_of_product", "abs(W / X)", "abs(W) / abs(X)"),
    ("absolute_of_product", "abs(div(W, X))", "div(abs(W), X)"),
    ("square", "pow(W)", "sqr(W)"),
    ("square", "W * W", "sqr(W)"),
    ("idempotent", "mms(mms(W))", "mms(W)"),
    ("idempotent", "W + W", "2 * W"),
    ("dominated", "maximum(W, W)", "W"),
    ("dominated", "minimum(W - G, W - G)", "W - G"),
    ("dominated", "maximum(tanh(W), 1)", "1"),
    ("dominated", "maximum(-1, mms(W))", "mms(W)"),
    ("dominated", "minimum(mms(W), exp(G))", "mms(W)"),
    ("operand_order", "G * W", "W * G"),
    ("operand_order", "W * 2", "2 * W"),
    ("operand_order", "X + G", "G + X"),
    ("operand_order", "W * (G * X)", "G * X * W"),
]
EQUAL = [
    ("square_of_root", "sqr(sqrt(W))", "abs(W)"),
    ("square_of_root", "sqrt(sqr(W))", "abs(W)"),
    ("exp_of_log", "exp(log(W))", "0.001 + abs(W)"),
    ("add_and_subtract", "W + G - G", "W"),
    ("add_and_subtract", "W + G - W", "G"),
    ("add_and_subtract", "W - G + G", "W"),
    ("add_and_subtract", "G + (W - G)", "W"),
    ("add_and_subtract", "W - (W - G)", "G"),
    ("add_and_subtract", "W - G - W", "-G"),
    ("odd_function", "tanh(-W)", "-tanh(W)"),
    ("odd_function", "zsn(-W)", "-zsn(W)"),
    ("odd_function", "abs(tanh(W))", "tanh(abs(W))"),
    ("scaling_of_affine", "mms(2 * W + 3)", "mms(W)"),
    ("scaling_of_affine", "zsn(div(W, G))", "zsn(W)"),
    ("scaling_of_affine", "zsn(norm2(G) * W - mean(W))", "zsn(W)"),
    ("scaling_of_affine", "mms(1 - W / 4)", "mms(-W)"),
    ("chain", "G * (W * X)", "W * G * X"),
    ("chain", "X + (2 + (G + W))", "2 + W + G + X"),
]
ROOT = [
    ("increasing", "mms(W)", "W"),
    ("increasing", "zsn(W)", "W"),
    ("increasing", "exp(mms(W))", "mms(W)"),
    ("increasing", "tanh(3 * mms(W))", "3 * mms(W)"),
    ("increasing_in_magnitude", "sqr(W)", "abs(W)"),
    ("increasing_in_magnitude", "sqrt(W)", "abs(W)"),
    ("increasing_in_magnitude", "log(W)", "abs(W)"),
    ("product_of_powers", "sqr(W) * sqr(G)", "abs(W * G)"),
    ("product_of_powers", "sqrt(W) / sqrt(G)", "abs(W / G)"),
    ("affine", "2 * W", "W"),
    ("affine", "-3 * W", "-W"),
    ("affine", "W / norm2(G) + rowsum(W)", "W"),
    ("affine", "W * rowsum(abs(W)) - 1", "W"),
    ("affine", "exp(norm2(W) * 0) * W", "W"),
    ("affine", "5 - W", "-W"),
    ("affine", "abs(4 * W) * X", "abs(W) * X"),
    ("affine", "div(W, G) * G", "W * G"),
    ("affine", "G / (2 * sqr(W / mean(abs(W))))", "G / sqr(W)"),
]
OPPOSING = [
    ("log_of_exp", "log(exp(W))", "W"),
    ("exp_of_log", "exp(log(W))", "abs(W)"),
    ("divide_and_multiply", "div(W, G) * G", "W"),
    ("divide_and_multiply", "G * (W / G)", "W"),
    ("multiply_and_divide", "W * G / G", "W"),
    ("multiply_and_divide", "div(G * W, G)", "W"),
]
# What a rule must leave: (rule, expression)
LEFT = [
    ("increasing", "tanh(W)"),  # flat beyond 9
    ("increasing", "exp(W)"),  # infinite beyond 88
    ("increasing", "exp(20 * mms(W))"),
    ("absolute_of_nonnegative", "abs(W * G)"),
    ("affine", "W * mean(W)"),  # may be negative
    ("affine", "W * rowsum(mms(G))"),
    ("affine", "W + X"),
    ("affine", "W * colsum(abs(W))"),
    ("scaling_of_affine", "mms(W + rowsum(W))"),
    ("scaling_of_affine", "zsn(W * -mean(G))"),
    ("square_of_root", "sqrt(sqrt(W))"),
    ("product_of_powers", "sqr(W) * sqrt(G)"),
    ("neutral_element", "1 / W"),
    ("dominated", "maximum(W, G)"),
    ("zero", "W - G"),
    ("even_function", "exp(abs(W))"),
]
MODULES = (exact_rules, rank_rules, opposing_rules)


def rule_named(name, modules=MODULES):
    return next(vars(module)[name] for module in modules if name in vars(module))


def mask(score):
    best = torch.sort(score, dim=1, descending=True, stable=True).indices[:, : score.shape[1] // 2]
    return torch.zeros(score.shape, dtype=torch.bool).scatter_(1, best, True)


def test_every_rule_is_tried():
    tried = {name for name, _, _ in (*EXACT, *EQUAL, *ROOT)} | {"fold_constants", "reduction_of_one"}
    assert tried == {rule.__name__ for rule in (*EXACT_RULES, *EQUAL_RULES, *ROOT_RULES)}
    assert {name for name, _, _ in OPPOSING} == {rule.__name__ for rule in OPPOSING_RULES}


@pytest.mark.parametrize(("name", "text", "expected"), EXACT)
def test_exact_rules_keep_every_bit(name, text, expected, inputs):
    before = parse(text)
    after = rule_named(name)(before)
    assert infix(after) == expected
    if after.shape == before.shape:  # else simplify() refuses it
        assert torch.equal(before.evaluate(*inputs), after.evaluate(*inputs))


@pytest.mark.parametrize(("name", "text", "expected"), [*EQUAL, *ROOT])
def test_rank_rules_keep_the_mask_of_each_row(name, text, expected, inputs):
    before = parse(text)
    after = rule_named(name, (rank_rules,))(before)
    assert infix(after) == expected
    assert torch.equal(mask(before.evaluate(*inputs)), mask(after.evaluate(*inputs)))


@pytest.mark.parametrize(("name", "text", "expected"), OPPOSING)
def test_opposing_rules_have_the_papers_form(name, text, expected):
    assert infix(rule_named(name, (opposing_rules,))(parse(text))) == expected
    assert infix(simplify(parse(text), opposing=True)) == expected


@pytest.mark.parametrize(("name", "text"), LEFT)
def test_rules_leave_what_they_would_change(name, text):
    assert rule_named(name)(parse(text)) is None


def test_opposing_pairs_stay_without_the_papers_approximation():
    assert infix(simplify(parse("log(exp(W))"))) == "exp(W)"
    assert infix(simplify(parse("mms(W / G * G)"))) == "W / G * G"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("W * sqrt(2 + 2)", "2 * W"),
        ("W * (1 / 0)", "0 * W"),
        ("W * exp(100)", "W * exp(100)"),  # infinite: left for the evaluation to refuse
        ("W * max(2)", "2 * W"),
        ("W * mean(norm1(W))", "W * norm1(W)"),
        ("W * rowsum(rowsum(W))", "W * rowsum(W)"),
        ("W * colsum(X)", "W * X"),
        ("W * rowsum(X)", "W * rowsum(X)"),
        ("W * mms(mean(W)) + X", "W * 0 + X"),
    ],
)
def test_constants_and_reductions_of_one(text, expected, inputs):
    result = simplify(parse(text), rowwise=False)
    assert result == simplify(parse(expected), rowwise=False)
    assert torch.equal(result.evaluate(*inputs).nan_to_num(), parse(text).evaluate(*inputs).nan_to_num())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mul(abs(mul(W, W)), mms(G))", "sqr(W) * mms(G)"),
        ("X * abs(W)", "abs(W) * X"),
        ("log(sqr(W * X)) / 3", "abs(W) * X"),
        ("-(-sqr(W) * sqr(X)) / norm2(W) + rowsum(W)", "abs(W) * X"),
        ("sqrt(abs(W) * abs(W) * mms(G))", "sqr(W) * mms(G)"),
        ("neg(zsn(exp(mms(abs(W)))))", "-abs(W)"),
        ("norm2(G) * 0 + W", "W"),
        ("W * norm1(G - G)", "0 * W"),
    ],
)
def test_simplify(text, expected):
    assert infix(simplify(parse(text))) == expected


def test_shape_is_kept_where_a_value_of_another_shape_would_do(inputs):
    for text in ("0 * W + X", "colsum(X + 0 * W) * W", "zsn(0 * W + X) * G", "maximum(0 * W + 9, mms(X))"):
        node = parse(text)
        for rowwise in (False, True):
            assert simplify(node, rowwise=rowwise).shape == (True, True)
        assert torch.equal(simplify(node, rowwise=False).evaluate(*inputs), node.evaluate(*inputs))


def test_constant_matrices_keep_their_masks(inputs):
    w, _, x = inputs
    for text in ("mms(G)", "zsn(G)", "mms(G) * 2 + 1", "exp(mms(G))", "mms(abs(W)) + mms(G)", "mms(2 * G + 1) * W"):
        node = parse(text)
        for g in (torch.full_like(w, 0.1), torch.zeros_like(w)):
            after = simplify(node).evaluate(w, g, x)
            assert torch.equal(mask(node.evaluate(w, g, x)), mask(after))


def test_random_trees_keep_bits_and_order(random_trees, inputs):
    changed = 0
    for node in random_trees(1500, seed=1):
        score = node.evaluate(*inputs)
        exact, ranked = simplify(node, rowwise=False), simplify(node)
        assert simplify(ranked) == ranked
        if not score.isfinite().all():
            continue
        assert torch.equal(exact.evaluate(*inputs), score), node
        kept = mask(ranked.evaluate(*inputs))
        worst_kept = score.masked_fill(~kept, torch.inf).amin(1)
        best_dropped = score.masked_fill(kept, -torch.inf).amax(1)
        # Scores that rounding merged in the long form may change places, others not: a sum rounds by its greatest
        # term, which the row's greatest score does not always show.
        room = 1e-5 * (score.abs().amax(1) + 1)
        assert (worst_kept >= best_dropped - room).all(), (infix(node), infix(ranked))
        changed += ranked != node
    assert changed > 700


def test_intervals_hold_on_random_trees(random_trees, inputs):
    w, g, x = inputs
    for node in random_trees(300, seed=2):
        value = node.evaluate(w, g, x).double()
        low, high = interval(node)
        value = value[value.isfinite()]
        assert (value >= low - 1e-5 * abs(low)).all(), node
        assert (value <= high + 1e-5 * abs(high)).all(), node


def test_equal_metrics_have_equal_fingerprints(random_trees):
    trees = random_trees(300, seed=3)
    same = sum(fingerprint(node) == fingerprint(simplify(node, rowwise=False)) for node in trees)
    assert same == len(trees)
