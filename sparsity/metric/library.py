"""Named metrics, each with its source, and how ``sparsify(method=...)`` finds one.

G is the l2 norm over calibration sequences of the gradient of the mean token loss, X the root mean square over all
calibration tokens; published code often has ‖X‖2 in another normalisation. A constant factor on G or X leaves the mask
alone in a product and changes it in a sum or under a nonlinear function, so each sum below says where its balance
comes from.

Not here: the formulas of Pruner-Zero's Tables 1, 9 and 11, whose rows beyond those below the paper gives as images
only. SparseGPT's w² / [H⁻¹]_jj is apart: it takes the factor of an OBS update for X.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from os import PathLike, fspath
from pathlib import Path

from trisparse.sparsity.metric.metric import Metric

Method = str | PathLike[str] | Metric


def _metric(name: str, expression: str, source: str, summary: str) -> Metric:
    return Metric.parse(expression, name=name, source=source, summary=summary)


METRICS = {
    metric.name: metric
    for metric in (
        _metric("magnitude", "abs(W)", "Han et al., 2015, https://arxiv.org/abs/1506.02626", "size of the weight"),
        _metric(
            "wanda",
            "abs(W) * X",
            "Sun et al., 2023, Eq. 1, https://arxiv.org/abs/2306.11695",
            "size of the weight times that of its input",
        ),
        _metric(
            "pruner-zero",
            "abs(W * W) * mms(G)",
            "Dong et al., 2024, Eq. 2 as in its best_tree.json, https://arxiv.org/abs/2406.02924",
            "squared weight times the gradient, scaled to 0..1 in each matrix; found by search on LLaMA-2-7B",
        ),
        # The published code adds |W| · 100 ‖G‖2 to Wanda's score, where Wanda's ‖X‖2 is the root of the sum of squares
        # over the tokens of a sequence, averaged over 128 sequences of 2048 tokens: sqrt(2048) times the rms. ‖G‖2
        # sums over sequences there as here, so that with n of them G is sqrt(n / 128) times as great as there.
        _metric(
            "gblm",
            "abs(W) * (100 * G + sqrt(2048) * X)",
            "Das et al., 2023, https://arxiv.org/abs/2311.04902, factor 100 and 2048-token balance of its code",
            "Wanda plus the weight times its gradient",
        ),
        _metric(
            "snip",
            "abs(W * G)",
            "after Lee et al., 2019, https://arxiv.org/abs/1810.02340, with the norm of the gradient over sequences",
            "first-order change of the loss",
        ),
        _metric(
            "ria",
            "(abs(W) / colsum(abs(W)) + abs(W) / rowsum(abs(W))) * sqrt(X)",
            "Zhang et al., ICLR 2024 (Plug-and-Play), with the root of X, a = 0.5",
            "share of the weight in its row and column, times the root of the input's size",
        ),
        _metric(
            "searched-smollm2",
            "abs(sqrt(W * X) + (sqr(G) - G))",
            "trisparse search on SmolLM2-135M-Instruct with pydoc text, 1000 iterations, seed 0; bench/results/search",
            "best of 1,050 metrics at 50% of each row of that model; not known to be good on others",
        ),
        Metric("random", None, "a lower bound", "uniform random numbers"),
    )
}


# X is 1 / U_jj there, of the Cholesky factor U of the inverse Hessian: see trisparse.sparsity.obs.
SPARSEGPT = _metric(
    "sparsegpt",
    "abs(W) * X",
    "Frantar & Alistarh, 2023, algorithm 1, https://arxiv.org/abs/2301.00774",
    "what pruning the weight costs once those after it in its row make up for it",
)


def shown_name(metric: Metric) -> str:
    """What reports call ``metric``: the name of one that has one here, the expression of any other."""
    return metric.name if {**METRICS, SPARSEGPT.name: SPARSEGPT}.get(metric.name) == metric else str(metric)


def find_metric(method: Method, *, has_data: bool, has_gradients: bool = False) -> Metric:
    """The metric of a name in ``METRICS``, an expression, a JSON file or a Metric itself.

    ``"auto"`` is Wanda with data and magnitude without; ``"sparsegpt"`` is :data:`SPARSEGPT`.

    Args:
        method: what the user gave.
        has_data: whether there is calibration data, which X and G are measured on.
        has_gradients: whether G was measured before.

    Raises:
        ValueError: it is none of these, or needs data where there is none.
    """
    metric = _find(method, has_data)
    if "X" in metric.uses and not has_data:
        raise ValueError(f"method {metric.name!r} ranks by the layers' inputs: pass data (and a tokenizer for text)")
    if "G" in metric.uses and not has_data and not has_gradients:
        raise ValueError(
            f"method {metric.name!r} ranks by gradients: pass data (and a tokenizer for text) or gradients"
        )
    return metric


def _find(method: Method, has_data: bool) -> Metric:
    if isinstance(method, Metric):
        return method
    if not isinstance(method, (str, PathLike)):
        raise ValueError(f"method must be a name, an expression, a JSON file or a Metric, got {method!r}")
    if isinstance(method, PathLike) or method.endswith(".json"):
        return Metric.load(Path(fspath(method)))
    if method == "auto":
        return METRICS["wanda" if has_data else "magnitude"]
    if method in METRICS:
        return METRICS[method]
    if method == SPARSEGPT.name:
        return SPARSEGPT
    if re.fullmatch(r"[\w-]{2,}", method) and not method[0].isdigit():  # a name, not a formula
        close = get_close_matches(method, ("auto", *METRICS, SPARSEGPT.name), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(["auto", *METRICS, SPARSEGPT.name])
        raise ValueError(
            f"method must be one of {known}, an expression such as 'abs(W) * X' or a JSON file, got {method!r}{hint}"
        )
    try:
        return Metric.parse(method)
    except ValueError as error:
        raise ValueError(f"method: {error}") from None
