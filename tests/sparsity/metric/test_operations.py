"""Every operation against values computed by hand."""

import math
import pickle
import subprocess
import sys

import pytest
import torch

from trisparse.sparsity.metric.expression import Node, number
from trisparse.sparsity.metric.operations import OPERATIONS, PUBLISHED_BINARY, PUBLISHED_UNARY

W = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
G = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
X = torch.tensor([2.0, 0.5])
E = math.e
DEVIATION = math.sqrt(26 / 3)  # of W: squares 9 + 16 + 0 + 1 about a mean of 0, over n - 1

BY_HAND = {
    "sqr": [[9, 16], [0, 1]],
    "neg": [[-3, 4], [0, -1]],
    "abs": [[3, 4], [0, 1]],
    "log": [[math.log(3.001), math.log(4.001)], [math.log(0.001), math.log(1.001)]],
    "exp": [[E**3, E**-4], [1, E]],
    "sqrt": [[3**0.5, 2], [0, 1]],
    "tanh": [[math.tanh(3), -math.tanh(4)], [0, math.tanh(1)]],
    "pow": [[9, 16], [0, 1]],
    "skp": [[3, -4], [0, 1]],
    "mms": [[1, 0], [4 / 7, 5 / 7]],
    "zsn": [[3 / DEVIATION, -4 / DEVIATION], [0, 1 / DEVIATION]],
    "norm2": [[math.sqrt(26)]],
    "norm1": [[8]],
    "add": [[4, -2], [3, 6]],
    "sub": [[2, -6], [-3, -4]],
    "mul": [[3, -8], [0, 5]],
    "div": [[3 / math.sqrt(39), -4 / math.sqrt(39)], [0, 1 / math.sqrt(39)]],
    "ratio": [[3, -2], [0, 0.2]],
    "maximum": [[3, 2], [3, 5]],
    "minimum": [[1, -4], [0, 1]],
    "rowsum": [[-1], [1]],
    "colsum": [[3, -3]],
    "max": [[3]],
    "min": [[-4]],
    "mean": [[0]],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_by_hand(name):
    value = OPERATIONS[name].compute(*(W, G)[: OPERATIONS[name].arity])
    assert value.dtype == torch.float32
    assert torch.allclose(value, torch.tensor(BY_HAND[name], dtype=torch.float32), rtol=1e-6, atol=1e-7)
    assert value.shape == torch.Size((len(BY_HAND[name]), len(BY_HAND[name][0])))


def test_the_published_vocabulary_is_that_of_the_paper():
    scalar = ("sqr", "neg", "abs", "log", "exp", "sqrt", "tanh", "pow", "skp")
    assert (*scalar, "mms", "zsn", "norm2", "norm1") == PUBLISHED_UNARY
    assert PUBLISHED_BINARY == ("add", "sub", "mul", "div")


@pytest.mark.parametrize(("name", "value"), [("mms", 0.0), ("zsn", 0.0), ("div", 0.0), ("ratio", 0.0)])
def test_guards_of_a_constant_give_zeros(name, value):
    constant = torch.full((2, 3), 0.1)
    operands = (constant,) if name in ("mms", "zsn") else (constant, torch.zeros(2, 3))
    assert (OPERATIONS[name].compute(*operands) == value).all()


@pytest.mark.parametrize("name", ["mms", "zsn", "div", "ratio"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_guards_do_not_hide_an_overflow(name, value):
    broken = torch.tensor([[1.0, 2.0], [3.0, value]])
    operands = (broken,) if OPERATIONS[name].arity == 1 else (broken, broken)
    assert OPERATIONS[name].compute(*operands).isnan().any()


def test_an_infinite_norm_is_no_divisor():
    assert OPERATIONS["div"].compute(W, torch.tensor([[math.inf]])).isnan().all()


def test_exp_stops_at_100():
    assert torch.equal(OPERATIONS["exp"].compute(torch.tensor([[100.0, 200.0]])), torch.full((1, 2), math.inf))


def test_every_combination_of_shapes_is_told_before_and_kept(random_trees, inputs):
    w, g, x = inputs
    full = {(True, True): (16, 24), (True, False): (16, 1), (False, True): (1, 24), (False, False): (1, 1)}
    values = {Node("W"): w, Node("G"): g, Node("X"): x[None]}

    def value(node):
        if node.is_number:
            return torch.full((1, 1), node.number)
        return OPERATIONS[node.data].compute(*map(value, node.operands)) if node.operands else values[node]

    for node in random_trees(100):
        for part in node.walk():
            assert value(part).shape == full[part.shape], part
        assert torch.equal(node.evaluate(w, g, x).nan_to_num(), value(node).nan_to_num())


def test_nodes_refuse_what_is_no_tree():
    with pytest.raises(ValueError, match="abs takes 1 operand, got 2"):
        Node("abs", (Node("W"), Node("W")))
    with pytest.raises(ValueError, match="unknown operation 'relu'"):
        Node("relu", (Node("W"),))
    with pytest.raises(ValueError, match="W takes no operands"):
        Node("W", (Node("W"),))
    for value in (math.nan, math.inf, 1e39):
        with pytest.raises(ValueError, match="no fp32 number"):
            number(value)
    deep = Node("W")
    for _ in range(63):
        deep = Node("neg", (deep,))
    assert deep.depth == 64
    with pytest.raises(ValueError, match="more than 64 levels"):
        Node("neg", (deep,))


def test_inputs_are_checked():
    product = Node("mul", (Node("G"), Node("X")))
    with pytest.raises(ValueError, match="reads X, which is missing"):
        product.evaluate(W, G)
    with pytest.raises(ValueError, match=r"G has shape \(1, 2\); it must be \(2, 2\)"):
        product.evaluate(W, G[:1], X)
    with pytest.raises(ValueError, match=r"X has shape \(1, 3\); it must be \(1, 2\)"):
        product.evaluate(W, G, torch.ones(3))
    with pytest.raises(ValueError, match="one number a column"):
        Node("X").evaluate(W, G, X)
    assert product.evaluate(W.double(), G.bfloat16(), X).tolist() == [[2, 1], [6, 2.5]]
    assert Node("add", (Node("rowsum", (Node("G"),)), Node("X"))).evaluate(W, G, X).tolist() == [[5, 3.5], [10, 8.5]]


def test_an_equal_tree_hashes_alike_in_another_process():
    node = Node("mul", (Node("abs", (Node("W"),)), number(-0.0)))
    assert node == Node("mul", (Node("abs", (Node("W"),)), number(0.0)))
    code = (
        "import pickle, sys; from trisparse.sparsity.metric import parse; "
        "assert {pickle.loads(sys.stdin.buffer.read()): 1}[parse('abs(W) * 0')]"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(node), check=True)
