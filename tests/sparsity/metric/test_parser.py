import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trisparse.sparsity.metric.expression import Node, number
from trisparse.sparsity.metric.operations import OPERATIONS
from trisparse.sparsity.metric.parser import MetricSyntaxError, parse
from trisparse.sparsity.metric.text import infix, latex
from trisparse.sparsity.metric.tree_json import from_json, to_json

W, G, X = Node("W"), Node("G"), Node("X")
BEST_TREE = {
    "data": "mul",
    "left": {"data": "abs", "left": {"data": "mul", "left": {"data": "W"}, "right": {"data": "W"}}},
    "right": {"data": "mms", "left": {"data": "G"}},
}


def call(name, *operands):
    return Node(name, operands)


def combined(trees):
    return st.one_of(
        *(
            st.tuples(*[trees] * operation.arity).map(lambda operands, name=name: Node(name, operands))
            for name, operation in OPERATIONS.items()
        )
    )


LEAVES = st.sampled_from([W, G, X]) | st.floats(width=32, allow_nan=False, allow_infinity=False).map(number)
TREES = st.recursive(LEAVES, combined, max_leaves=12)


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("abs(W)*X", call("mul", call("abs", W), X)),
        ("W + G * X", call("add", W, call("mul", G, X))),
        ("(W + G) * X", call("mul", call("add", W, G), X)),
        ("W - G - X", call("sub", call("sub", W, G), X)),
        ("W - (G - X)", call("sub", W, call("sub", G, X))),
        ("W / G * X", call("mul", call("ratio", W, G), X)),
        ("div(W, G)", call("div", W, G)),
        ("add( W ,G )", call("add", W, G)),
        ("-W * X", call("mul", call("neg", W), X)),
        ("-(W * X)", call("neg", call("mul", W, X))),
        ("W - -G", call("sub", W, call("neg", G))),
        ("--W", call("neg", call("neg", W))),
        ("-2 * W", call("mul", number(-2), W)),
        ("neg(2) * W", call("mul", call("neg", number(2)), W)),
        ("W - 2", call("sub", W, number(2))),
        (".5*W + 1.e-3 + 2E+1", call("add", call("add", call("mul", number(0.5), W), number(0.001)), number(20))),
        ("((W))\n", W),
        ("pow(W)", call("pow", W)),
        ("abs(W*W) * mms(G)", from_json(BEST_TREE)),
    ],
)
def test_grammar(text, node):
    assert parse(text) == node


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("", 0, "empty"),
        ("  ", 0, "empty"),
        ("W +", 3, "the expression ends"),
        ("W * * X", 4, "expected a value, but found '*'"),
        ("abs(W", 5, "expected ')' to close the '(' at character 4"),
        ("(W * (G + X) + 1", 16, "expected ')' to close the '(' at character 1"),
        ("W)", 1, "unmatched ')'"),
        ("W G", 2, "expected an operator before 'G'"),
        ("2 W", 2, "expected an operator before 'W'"),
        ("W $ X", 2, "unexpected character '$'"),
        ("__import__(W)", 0, "unknown name '__import__'"),
        ("W.abs()", 1, "unexpected character '.'"),
        ("mss(G) * W", 0, "unknown name 'mss'; did you mean 'mms'?"),
        ("W * x", 4, "unknown name 'x'; did you mean 'X'?"),
        ("qqqq(W)", 0, "unknown name 'qqqq'; known are W, G, X, sqr"),
        ("abs W", 0, "abs is an operation: write abs(x)"),
        ("W(2)", 1, "W is an input"),
        ("X * abs(W, G)", 4, "abs(x) takes 1 operand, got 2"),
        ("div(W)", 0, "div(x, y) takes 2 operands, got 1"),
        ("abs()", 0, "abs(x) takes 1 operand, got 0"),
        ("abs(W,)", 6, "expected a value"),
        ("pow(W, 2)", 0, "it squares, as in the published code"),
        ("W * 1e39", 4, "1e+39 is no fp32 number"),
        ("W * 1" + "0" * 400, 4, "inf is no fp32 number"),
        (" abs(X)", 1, "one number a column"),
        ("norm2(W)", 0, "one number"),
        ("rowsum(W)", 0, "one number a row"),
        ("(" * 1000 + "W" + ")" * 1000, 128, "nested more than 128 deep"),
        ("-" * 1000 + "W", 128, "nested more than 128 deep"),
        ("abs(" * 100_000, 512, "nested more than 128 deep"),
        ("W" + "+W" * 100, 127, "more than 64 levels"),
    ],
)
def test_errors_point_at_the_character(text, position, reason):
    with pytest.raises(MetricSyntaxError) as caught:
        parse(text)
    assert reason in str(caught.value)
    assert caught.value.position == position
    assert str(caught.value).splitlines()[-1] == f"  {' ' * position}^"


def test_text_over_two_lines_keeps_its_caret():
    with pytest.raises(MetricSyntaxError) as caught:
        parse("abs(W)\n\t* Y")
    assert str(caught.value).splitlines()[1:] == ["  abs(W)  * Y", "            ^"]


@given(TREES)
def test_infix_reads_back_as_the_same_tree(node):
    if all(node.shape):
        assert parse(infix(node)) == node
    else:  # the parser wants W's shape at the root only
        assert parse(f"W + rowsum({infix(node)})").right.left == node


@given(TREES)
def test_json_reads_back_as_the_same_tree(node):
    assert from_json(json.loads(json.dumps(to_json(node)))) == node


@pytest.mark.parametrize(
    "text",
    [
        "W + G + X",
        "W + (G + X)",
        "W - (G - X)",
        "W * G / X",
        "W * (G / X)",
        "-(W + G) * X",
        "-(W * G)",
        "--W",
        "W * -X",
        "W - -2",
        "neg(-2) * W",
        "sqr(W + G) * 0.001",
        "div(W, G)",
        "1e-08 * W",
        "maximum(W, -G)",
    ],
)
def test_infix_has_no_needless_parentheses(text):
    assert infix(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abs(W) * X", r"\left|W\right| \cdot X"),
        ("(W + G) * X", r"\left(W + G\right) \cdot X"),
        ("W - (G + X)", r"W - \left(G + X\right)"),
        ("(W + G) / (W * X)", r"\frac{W + G}{W \cdot X}"),
        ("div(W, G)", r"\frac{W}{\left\|G\right\|_2}"),
        ("W * -X", r"W \cdot \left(-X\right)"),
        ("-(W + G)", r"-\left(W + G\right)"),
        ("W - -2", r"W - \left(-2\right)"),
        ("log(W)", r"\log\left(\left|W\right| + 0.001\right)"),
        ("1e-08 * W", r"1 \cdot 10^{-8} \cdot W"),
        ("sqr(W)", r"\left(W\right)^2"),
    ],
)
def test_latex(text, expected):
    assert latex(parse(text)) == expected


@given(TREES)
def test_latex_is_balanced(node):
    text = latex(node)
    assert text.count("{") == text.count("}")
    assert text.count(r"\left") == text.count(r"\right")


def test_published_tree_both_ways():
    node = call("mul", call("abs", call("mul", W, W)), call("mms", G))
    assert from_json(BEST_TREE) == node
    assert to_json(node) == BEST_TREE


def deep(levels):
    tree = {"data": "W"}
    for _ in range(levels):
        tree = {"data": "neg", "left": tree}
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "root: a node must be an object with a text as 'data'"),
        ({"left": {"data": "W"}}, "root: a node must be an object"),
        ({"data": 2}, "root: a node must be an object"),
        ({"data": "mul", "left": {"data": "W"}}, "root: 'mul' has left and right, but left is given"),
        ({"data": "abs", "right": {"data": "W"}}, "root: 'abs' has left, but right is given"),
        ({"data": "W", "left": {"data": "W"}}, "root: 'W' has no operand, but left is given"),
        ({"data": "abs", "left": {"data": "Y"}}, "root.left: 'Y' is neither a number nor one of W"),
        ({"data": "abs", "left": {"data": "nan"}}, "root.left: 'nan' is neither"),
        ({"data": "add", "left": {"data": "W"}, "right": {"data": "abs", "left": None}}, "root.right.left: a node"),
        ({"data": "abs", "left": {"data": "W"}, "op": "x"}, "root: unknown key 'op'"),
        ({"data": "2.0", "left": {"data": "W"}}, "root: '2.0' has no operand, but left is given"),
        (deep(64), "root: the tree has more than 64 levels"),
    ],
)
def test_wrong_json_names_the_node(tree, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        from_json(tree)
    assert str(caught.value).startswith(message)
