"""The search for a pruning metric (Pruner-Zero, Dong et al. 2024, https://arxiv.org/abs/2406.02924): ``search``."""

from trisparse.sparsity.search.result import SearchResult
from trisparse.sparsity.search.run import search
from trisparse.sparsity.search.settings import SearchSettings

__all__ = ["SearchResult", "SearchSettings", "search"]
