"""Input statistics of targets, collected while a model or a block runs.

X is the root mean square of each input channel over all calibration tokens (Wanda's ‖X_j‖2 up to a constant
factor per layer). Each call is summed in fp32 whatever the dtype of the activations, and calls are added in fp64: fp64
sums of fp32 numbers are exact as long as the numbers lie within a factor of 2^29 / calls of each other, so the order of
the calls, and the process that made them, do not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trisparse.sparsity.distributed import Processes
from trisparse.sparsity.hessian import Factor, FactorisationError, HessianSums, identity_factor, unfolded
from trisparse.sparsity.targets import Target

_CHUNK = 256  # rows that are squared at once: the fp32 copy stays in the cache


class InputStatistics:
    """Sums of squares of the inputs of ``targets``; :meth:`observing` collects while it is open.

    Layers that are fed by the same tensor (q, k and v) are measured once: the tensor is held while its block
    runs, so that its identity cannot be taken over by another one. With ``hessians`` their Hessians are summed, too:
    4 cols² bytes for each input that is not shared, and as much again while a batch runs.
    """

    def __init__(self, targets: Iterable[Target], *, hessians: bool = False) -> None:
        self._targets = {target.name: target for target in targets}
        self._squares: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._seen: list[tuple[Tensor, int, Tensor, int]] = []
        self._valid: Tensor | None = None
        self._hessians = HessianSums() if hessians else None

    def rms(self, target: Target) -> Tensor | None:
        """X of ``target``, fp32 [parts, cols], or None if no input reached it.

        A part that no token reached (an expert that was never routed to) gets ones.
        """
        if target.name not in self._squares:
            return None
        squares, counts = self._squares[target.name], self._counts[target.name]
        rms = (squares / counts.clamp(min=1)[:, None]).sqrt().float()
        return torch.where(counts[:, None] > 0, rms, torch.ones_like(rms))

    def reached(self, target: Target) -> Tensor:
        """Which parts (experts) of ``target`` saw a token, bool [parts]."""
        counts = self._counts.get(target.name)
        return torch.zeros(target.parts, dtype=torch.bool) if counts is None else counts > 0

    def unreached_parts(self, target: Target) -> int:
        """How many parts (experts) of ``target`` saw no token."""
        return int((self._counts[target.name] == 0).sum()) if target.name in self._counts else target.parts

    def factors(self, target: Target, damping: float) -> list[Factor]:
        """The factorised Hessian of each part of ``target``; that of a part that no token reached is 1.

        Raises:
            ValueError: it has none; names the target.
        """
        assert self._hessians is not None
        found = []
        for part in range(target.parts):
            hessian = self._hessians.of((target.name, part))
            try:
                found.append(
                    identity_factor(target.cols, target.weight.device) if hessian is None else hessian.factor(damping)
                )
            except FactorisationError as error:
                raise ValueError(f"{target.name} cannot be updated: {error}") from None
        return found

    @property
    def has_hessians(self) -> bool:
        """Whether Hessians are summed."""
        return self._hessians is not None

    def forget_hessians(self) -> None:
        """Free the Hessians; what else was measured stays."""
        if self._hessians is not None:
            self._hessians.clear()

    def add_up(self, processes: Processes) -> None:
        """Add what the other processes have seen; all of them must call this, with the same targets."""
        if processes.count == 1:
            return
        rows = []
        for target in self._targets.values():
            squares, counts = self._sums(target, target.weight.device)
            reached = counts.new_tensor([target.name in self._squares])
            rows.append(torch.cat([squares.flatten(), counts, reached]))
        if not rows:
            return
        everything = torch.cat(rows)
        processes.add_up(everything)
        for target, row in zip(self._targets.values(), everything.split([len(row) for row in rows]), strict=True):
            if row[-1]:
                self._squares[target.name] = row[: -1 - target.parts].view(target.parts, target.cols)
                self._counts[target.name] = row[-1 - target.parts : -1]
        if self._hessians is not None:
            self._hessians.add_up(
                processes, {target.name: target.cols for target in self._targets.values()}, everything.device
            )

    @contextmanager
    def observing(self, before_use: Callable[[Target], None] | None = None) -> Iterator[None]:
        """Collect from every call of a target's module; ``before_use`` runs after its input was measured."""
        experts = [t for t in self._targets.values() if is_fused_experts(t)]
        with ExitStack() as stack:
            for target in self._targets.values():
                if not is_fused_experts(target):
                    hook = self._hook(target, before_use)
                    handle = target.module.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            if experts:
                stack.enter_context(_ExpertCalls(experts, self._add))
            yield

    @contextmanager
    def call(self, valid: Tensor | None = None) -> Iterator[None]:
        """One call of the block or model; ``valid`` [batch, tokens] is False where a batch is padded.

        Raises:
            ValueError: in the call, where it is not known which inputs of a target are padded; names the target.
        """
        self._valid = valid
        try:
            yield
        finally:
            self._seen.clear()
            self._valid = None
            if self._hessians is not None:
                self._hessians.close()

    def _hook(self, target: Target, before_use: Callable[[Target], None] | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            self._add(target, x)
            if before_use is not None:
                before_use(target)

        return hook

    def _add(self, target: Target, x: Tensor, part: int | None = None) -> None:
        squares, count = self._measure(x, target)
        self._squares[target.name], self._counts[target.name] = self._sums(target, x.device)
        where = slice(None) if part is None else slice(part, part + 1)
        self._squares[target.name][where] += squares
        self._counts[target.name][where] += count
        if self._hessians is not None:
            self._add_hessian(self._hessians, target, x, part)

    def _add_hessian(self, hessians: HessianSums, target: Target, x: Tensor, part: int | None) -> None:
        if isinstance(target.module, nn.Conv1d | nn.Conv2d):  # not shared: it depends on the kernel's size
            if self._valid is not None:  # a window may hold both
                raise _padding_stays(target)
            for group, rows in enumerate(unfolded(x, target.module)):
                hessians.add((target.name, group), rows)
        elif not hessians.share((target.name, part or 0), x):
            hessians.add((target.name, part or 0), self._rows(x, target), x)

    def _sums(self, target: Target, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sums of squares [parts, cols] and counts [parts] so far; zeros before the first call."""
        if target.name in self._squares:
            return self._squares[target.name], self._counts[target.name]
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no fp64
        squares = torch.zeros(target.parts, target.cols, dtype=dtype, device=device)
        return squares, squares.new_zeros(target.parts)

    def _measure(self, x: Tensor, target: Target) -> tuple[Tensor, int]:
        """Sum of squares of each input (broadcasts to [parts, cols]) and number of tokens."""
        for held, version, squares, count in self._seen:
            if held is x and version == x._version:
                return squares, count
        module = target.module
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            batched = x if x.ndim == len(module.kernel_size) + 2 else x[None]
            places = batched.movedim(1, -1)
            if self._valid is not None and places.shape[:-1] != self._valid.shape:
                raise _padding_stays(target)
            rows = self._rows(places, target)
            channels, count = _sum_of_squares(rows), rows.shape[0]
            kernel = target.cols * module.groups // module.in_channels
            squares = channels.view(module.groups, -1).repeat_interleave(kernel, dim=1)
            return squares, count  # not shared: another kernel size needs another expansion
        rows = self._rows(x, target)
        squares, count = _sum_of_squares(rows), rows.shape[0]
        self._seen.append((x, x._version, squares, count))
        return squares, count

    def _rows(self, x: Tensor, target: Target) -> Tensor:
        """The inputs [tokens, cols] in ``x`` without padded ones."""
        rows = x.reshape(-1, x.shape[-1])
        if self._valid is not None:
            if rows.shape[0] != self._valid.numel():  # routed to an expert, pooled, or of another sequence
                raise _padding_stays(target)
            rows = rows[self._valid.flatten()]
        return rows


def _padding_stays(target: Target) -> ValueError:
    return ValueError(f"data is padded, and calibration cannot leave padding out of {target.name}: pack it")


def _sum_of_squares(rows: Tensor) -> Tensor:
    """Column sums of squares of [tokens, cols] in fp32."""
    if rows.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
        return norm.square_()
    total = torch.zeros(rows.shape[1])
    for chunk in rows.split(_CHUNK):
        total += chunk.float().square().sum(0)
    return total


def is_fused_experts(target: Target) -> bool:
    """Whether the target is a 3-D parameter with a slice for each expert."""
    return target.weight.ndim == 3 and not isinstance(target.module, nn.Conv1d)


_MATMULS = {
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
}  # fmt: skip


class _ExpertCalls(TorchFunctionMode):
    """Sees each matrix product with one expert's slice (or the whole) of a fused parameter."""

    def __init__(self, targets: Iterable[Target], add: Callable[[Target, Tensor, int | None], None]) -> None:
        super().__init__()
        self.targets = list(targets)
        self.add = add

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (func is F.linear or func in _MATMULS) and len(args) >= 2:
            self.inspect(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def inspect(self, x: Tensor, weight: Tensor) -> None:
        storage = weight.untyped_storage().data_ptr()
        for target in self.targets:
            fused = target.weight
            if fused.untyped_storage().data_ptr() != storage:
                continue
            if weight.ndim == 2:
                self.add(target, x, (weight.storage_offset() - fused.storage_offset()) // fused[0].numel())
            else:  # all experts in one batched product: x is [experts, tokens, in]
                for part in range(target.parts):
                    self.add(target, x[part], part)
            return


@contextmanager
def experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Let transformers compute fused experts one at a time while open, so that each one's inputs are seen."""
    setter = getattr(model, "set_experts_implementation", None)
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if setter is None or before is None:
        yield
        return
    setter("eager")
    try:
        yield
    finally:
        setter(before)
