"""The metric language: expressions over the weight W, its gradient's norm G and its inputs' size X.

``Metric.parse("abs(W) * X")`` reads one, ``METRICS`` has the known ones by name.
"""

from trisparse.sparsity.metric.expression import Node
from trisparse.sparsity.metric.library import METRICS, SPARSEGPT, Method, find_metric, shown_name
from trisparse.sparsity.metric.metric import Metric
from trisparse.sparsity.metric.parser import MetricSyntaxError, parse
from trisparse.sparsity.metric.score import Score

__all__ = [
    "METRICS",
    "SPARSEGPT",
    "Method",
    "Metric",
    "MetricSyntaxError",
    "Node",
    "Score",
    "find_metric",
    "parse",
    "shown_name",
]
