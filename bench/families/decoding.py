"""Greedy decoding with a static cache: the loop that ``tokens`` times, and the logits that it is held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trisparse.bench.families.accuracy import Expected, check, expected, wider

_WARM_UP = 3  # steps before a CUDA graph is captured, as torch's documentation asks for: libraries allocate in them


class Decoder:
    """Greedy decoding of ``new_tokens`` after ``prompt`` [batch, tokens]; each call starts behind the prompt again.

    On a CUDA device a step (the model, the greedy token, the cache's position) is captured once as a CUDA graph and
    replayed, so that Python's time does not count. On a CPU it runs eagerly.

    Attributes:
        first: logits [batch, vocabulary] after the prompt.

    Raises:
        ValueError: the model has layers with another cache than a static one for all positions.
    """

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int) -> None:
        from transformers.cache_utils import StaticCache, StaticLayer

        self.model, self.prompt, self.new_tokens = model, prompt, new_tokens
        self.cache: Any = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
        if any(type(layer) is not StaticLayer for layer in self.cache.layers):
            raise ValueError(f"{type(model).__name__} has layers whose cache slides; decoding here needs a static one")
        with torch.no_grad():
            self.first: Tensor = model(prompt, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]
            self._token = self.first.argmax(-1, keepdim=True)
            self._logits = torch.empty_like(self.first)
        self._graph = self._captured() if prompt.is_cuda else None

    def __call__(self, steps: int | None = None) -> Tensor:
        """Decode all the new tokens, or the first ``steps``; the last logits [batch, vocabulary], not a copy."""
        self._start()
        for _ in range(self.new_tokens if steps is None else min(steps, self.new_tokens)):
            self._step()
        return self._logits

    def transcript(self) -> tuple[Tensor, Tensor]:
        """(prompt and tokens that were fed [batch, all], logits [batch, 1 + new_tokens, vocabulary] behind each)."""
        self._start()
        fed, logits = [self.prompt], [self.first]
        for _ in range(self.new_tokens):
            fed.append(self._token.clone())
            self._step()
            logits.append(self._logits.clone())
        return torch.cat(fed, 1), torch.stack(logits, 1)

    def _start(self) -> None:
        # What the cache holds behind the prompt is masked until it is written again.
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt.shape[1])
        self._token.copy_(self.first.argmax(-1, keepdim=True))

    def _step(self) -> None:
        if self._graph is None:
            self._eager()
        else:
            self._graph.replay()

    @torch.no_grad()
    def _eager(self) -> None:
        self._logits.copy_(self.model(self._token, past_key_values=self.cache).logits[:, -1])
        self._token.copy_(self._logits.argmax(-1, keepdim=True))

    def _captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self.prompt.device)
        stream.wait_stream(torch.cuda.current_stream(self.prompt.device))
        with torch.cuda.stream(stream):
            for _ in range(min(_WARM_UP, self.new_tokens)):
                self._eager()
        torch.cuda.current_stream(self.prompt.device).wait_stream(stream)
        self._start()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._eager()
        return graph


@torch.no_grad()
def wide_logits(model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [batch, tokens, vocabulary] with every module's weights cast to ``dtype`` while it runs.

    One module at a time is wide, so that a model fits where twice its size would not; casting up and back is exact.
    """
    own = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    before = {module: next(module.parameters(recurse=False)).dtype for module in own}

    def widen(module: nn.Module, _: Any) -> None:
        module.to(dtype)

    def narrow(module: nn.Module, _: Any, output: Any) -> None:
        module.to(before[module])

    handles = [module.register_forward_pre_hook(widen) for module in own]
    handles += [module.register_forward_hook(narrow, always_call=True) for module in own]
    try:
        logits: Tensor = model(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


class Gate:
    """Refuses what gives other logits than the masked dense model.

    The exact logits are the masked dense model's in a wider dtype; allowed is twice the error of its own plain forward
    (no cache, all tokens at once) in the contestants' dtype.

    Args:
        masked: the pruned model, dense.
    """

    def __init__(self, masked: Any) -> None:
        self.masked = masked
        self._known: list[tuple[Tensor, Expected]] = []

    def logits(self, name: str, tokens: Tensor, found: Tensor) -> None:
        """Check logits ``found`` [batch, n, vocabulary] behind the last n of ``tokens`` [batch, all].

        Raises:
            RuntimeError: their error is more than twice torch's own.
        """
        right, last = self._expected(tokens), found.shape[1]
        try:
            check((found,), Expected((right.exact[0][:, -last:],), right.allowed))
        except AssertionError as error:
            raise RuntimeError(f"{name} is wrong and is not timed: its logits: {error}") from error

    def decoding(self, name: str, decoder: Decoder) -> Tensor:
        """Check every step of a decoder; returns prompt and fed tokens [batch, all].

        Near a tie two right models may choose different tokens, so that each is held to the logits at its own.
        """
        tokens, logits = decoder.transcript()
        self.logits(name, tokens, logits)
        return tokens

    def _expected(self, tokens: Tensor) -> Expected:
        for known, found in self._known:
            if torch.equal(known, tokens):
                return found
        device = tokens.device
        exact = wide_logits(self.masked, tokens, wider(next(self.masked.parameters()).dtype, device))
        with torch.no_grad():
            usual = self.masked(tokens, use_cache=False).logits
        found = expected((exact,), (usual,))
        self._known.append((tokens, found))
        return found
