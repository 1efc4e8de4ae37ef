"""Allocations: how a model-wide sparsity is spread over the layers.

``sparsify(model, "60%", allocation="owl")`` takes a name, text such as ``"owl:M=7,lambda=0.1"``, the file of a
:class:`PerLayer`, or one of the classes here. docs/allocation.md has the formulas.
"""

from trisparse.sparsity.allocation.base import Allocation, Budget, BudgetAllocation, Shares
from trisparse.sparsity.allocation.find import ALLOCATIONS, find_allocation
from trisparse.sparsity.allocation.formulas import ERK, LAMP, Global, Uniform, UniformPlus
from trisparse.sparsity.allocation.owl import OWL
from trisparse.sparsity.allocation.per_layer import PerLayer

__all__ = [
    "ALLOCATIONS",
    "ERK",
    "LAMP",
    "OWL",
    "Allocation",
    "Budget",
    "BudgetAllocation",
    "Global",
    "PerLayer",
    "Shares",
    "Uniform",
    "UniformPlus",
    "find_allocation",
]
