"""SmolLM2-135M, pruned anew by each method and measured on the demo's held-out text."""

from __future__ import annotations

from trisparse.bench.demo import FULL
from trisparse.bench.smollm2 import load_smollm2
from trisparse.sparsity.calibration import Propagate
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.obs import Update
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.report import SparsityReport
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.text import pydoc_text


class PrunedSmolLM2:
    """Prunes SmolLM2 anew each time, and measures it on the test split, with the demo's data.

    Args:
        quick: a quarter of the calibration sequences and of the test windows.

    Attributes:
        parameters: of every row: model, calibration_tokens and test_tokens.
    """

    def __init__(self, *, quick: bool = False) -> None:
        self._model, self._tokenizer = load_smollm2()
        self._dense = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._samples = FULL.calibration // (4 if quick else 1)
        windows = FULL.test // (4 if quick else 1)
        self._test = token_windows(pydoc_text("test"), tokenizer=self._tokenizer, seq_len=FULL.seq_len, samples=windows)
        self.parameters = {
            "model": "SmolLM2-135M",
            "calibration_tokens": self._samples * FULL.seq_len,
            "test_tokens": self._test.numel(),
        }

    def dense(self) -> float:
        """Perplexity of the dense model."""
        self._model.load_state_dict(self._dense)
        return self.perplexity()

    def prune(
        self, method: str, pattern: str, *, update: Update | None = None, propagate: Propagate = "block"
    ) -> SparsityReport:
        """Prune the dense model by ``method``."""
        self._model.load_state_dict(self._dense)
        return sparsify(
            self._model,
            pattern,
            method,
            pydoc_text("calibration"),
            tokenizer=self._tokenizer,
            samples=self._samples,
            seq_len=FULL.seq_len,
            update=update,
            propagate=propagate,
            progress=False,
        )

    def perplexity(self) -> float:
        """Perplexity of the model as it is."""
        return perplexity(self._model, self._test, seq_len=FULL.seq_len)
