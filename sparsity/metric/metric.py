"""A pruning metric: an expression over W, G and X with a name, and the score that it gives a weight."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trisparse.kernels.metric import compile_metric
from trisparse.sparsity.metric.expression import Node, shape_problem
from trisparse.sparsity.metric.fingerprint import fingerprint
from trisparse.sparsity.metric.parser import parse
from trisparse.sparsity.metric.score import Score
from trisparse.sparsity.metric.simplify import simplify
from trisparse.sparsity.metric.text import infix, latex
from trisparse.sparsity.metric.tree_json import from_json, to_json

_W, _X = Node("W"), Node("X")
_ABS_W = Node("abs", (_W,))


@dataclass(frozen=True)
class Metric:
    """A pruning metric; greater scores are kept.

    Attributes:
        name: what reports show; for one of the library, what ``sparsify(method=...)`` takes.
        root: the expression tree, or None for uniform random scores.
        source: where the metric comes from.
        summary: one line on what it is.
    """

    name: str
    root: Node | None
    source: str = ""
    summary: str = ""

    def __post_init__(self) -> None:
        if self.root is not None and (problem := shape_problem(self.root)):
            raise ValueError(f"metric {self.name!r}: {problem}")

    @classmethod
    def parse(cls, text: str, *, name: str | None = None, source: str = "", summary: str = "") -> Metric:
        """The metric of an expression such as ``"abs(W) * X"``; it is its own name unless ``name`` is given.

        Raises:
            MetricSyntaxError: points at the character that is wrong.
        """
        root = parse(text)
        return cls(infix(root) if name is None else name, root, source, summary)

    @classmethod
    def from_json(cls, content: Any) -> Metric:
        """The metric of a tree of nested dicts, as in Pruner-Zero's ``best_tree.json``.

        "name", "source" and "summary" beside the root's "data" are read too.

        Raises:
            ValueError: names the wrong node.
        """
        described = {}
        if isinstance(content, dict):
            described = {key: content[key] for key in ("name", "source", "summary") if key in content}
            content = {key: value for key, value in content.items() if key not in described}
        if wrong := [key for key, value in described.items() if not isinstance(value, str)]:
            raise ValueError(f"root: {wrong[0]!r} must be a text")
        root = from_json(content)
        return cls(**{"name": infix(root), **described}, root=root)

    @classmethod
    def load(cls, path: str | Path) -> Metric:
        """The metric of a JSON file.

        Raises:
            ValueError: names the file and what is wrong with it.
        """
        try:
            content = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{path}: cannot be read as a metric: {error.strerror}") from None
        try:
            return cls.from_json(json.loads(content))
        except RecursionError:
            raise ValueError(f"{path}: no metric: nested too deep") from None
        except ValueError as error:
            raise ValueError(f"{path}: no metric: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The tree as nested dicts, with name, source and summary; Pruner-Zero's code reads it as well.

        Raises:
            ValueError: for random scores, which have no tree.
        """
        described = {"name": self.name, "source": self.source, "summary": self.summary}
        return {**{key: value for key, value in described.items() if value}, **to_json(self._tree())}

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file, which ``sparsify(method=path)`` and :meth:`load` read."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @property
    def infix(self) -> str:
        """The expression as text, which reads back as the same tree."""
        return "random" if self.root is None else infix(self.root)

    @property
    def latex(self) -> str:
        """The expression as LaTeX."""
        return r"\mathrm{random}" if self.root is None else latex(self.root)

    @property
    def uses(self) -> frozenset[str]:
        """Which of W, G and X it reads."""
        return frozenset() if self.root is None else self.root.inputs

    def __str__(self) -> str:
        return self.infix if self.name == self.infix else f"{self.name}: {self.infix}"

    def evaluate(self, w: Tensor, g: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        """The score in fp32, [rows, cols]; see :meth:`Node.evaluate`."""
        return self._tree().evaluate(w, g, x)

    def simplified(self) -> Metric:
        """The same metric with a simpler expression that orders each row alike."""
        if self.root is None:
            return self
        root = simplify(self.root)
        return Metric(infix(root) if self.name == self.infix else self.name, root, self.source, self.summary)

    def fingerprint(self) -> str:
        """Hex digest of the masks of its simplified form on a fixed sample: equal, and a search has it already.

        A search evaluates :meth:`simplified`: what merges scores by rounding, as exp does, has the digest of what
        does not.
        """
        return hashlib.sha256(b"random").hexdigest() if self.root is None else fingerprint(simplify(self.root))

    def score(
        self, weight: Tensor, x: Tensor | None, g: Tensor | None, generator: torch.Generator, *, fused: bool = False
    ) -> Score:
        """What the selection kernels rank for one weight.

        |W|, W and |W| · X, however they are written, are ranked without forming the score; only rules that keep its
        bits decide, so every pattern gets the mask of :meth:`evaluate`.

        Args:
            weight: [rows, cols].
            x: [cols], the rms of each input; needed if the metric reads X.
            g: [rows, cols], the norm of each gradient; needed if it reads G.
            generator: a CPU generator, of random scores.
            fused: leave any other metric to be computed inside the kernels, where they select by one.

        Raises:
            ValueError: an input is missing, of a wrong shape, not finite or negative, or a score is NaN.
        """
        if self.root is None:
            return Score(torch.rand(weight.shape, generator=generator).to(weight.device), absolute=False)
        for name, value in (("X", x), ("G", g)):
            if value is not None and name in self.uses:
                self._check(name, value)
        root = simplify(self.root, rowwise=False)
        if root in (_W, _ABS_W):
            return Score(weight, absolute=root == _ABS_W)
        if root == Node("mul", (_ABS_W, _X)) and x is not None:
            return Score(weight, x)
        if fused:
            return Score(
                weight,
                x if "X" in root.inputs else None,
                metric=compile_metric(root),
                g=g if "G" in root.inputs else None,
            )
        score = root.evaluate(weight, g, x)
        if bool(score.isnan().any()):
            raise ValueError(f"metric {self} gives NaN: a value overflows fp32 on the way")
        return Score(score, absolute=False)

    def _check(self, name: str, value: Tensor) -> None:
        low, high = torch.aminmax(value.detach())  # a NaN comes through
        if not (low >= 0 and torch.isfinite(high)):
            raise ValueError(f"metric {self}: {name} must be finite and not negative, got {low:g} to {high:g}")

    def _tree(self) -> Node:
        if self.root is None:
            raise ValueError(f"metric {self.name!r} has no expression")
        return self.root
