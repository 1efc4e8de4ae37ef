"""Weights split over the processes while a model trains, and put together again (FSDP2: torch's ``fully_shard``).

Of a parameter with n rows (dimension 0) each of p processes holds ⌈n/p⌉, and the last ones fewer, with their gradients
and the optimizer's moments. A block's parameters are gathered when its forward or its backward begins and let go of
when it ends, so masks and LoRA see whole weights there. Gradients are the mean over the processes, as under DDP.
Source: Zhao et al. 2023, "PyTorch FSDP" (arXiv:2304.11277); the version by parameter is in PyTorch's documentation.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trisparse.retrain.processes import local_device
from trisparse.sparsity.interrupt import interrupt_after
from trisparse.sparsity.targets import find_blocks

# How long a process that fails waits for the others to fail as well; one that is alone cannot put weights together.
_PATIENCE = timedelta(seconds=30)

# nn.Module's tables of the hooks that fully_shard adds; PyTorch has no call that takes it off a module again
_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


def is_split(tensor: Tensor) -> bool:
    """Whether ``tensor`` is split over the processes."""
    return isinstance(tensor, DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``module``'s parameters are split over the processes."""
    return any(is_split(param) for param in module.parameters())


def held(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``; all of one that is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``; every process must come here."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_held(rows: int) -> slice:
    """Which of ``rows`` this process holds of a tensor that is split."""
    step = -(-rows // distributed.get_world_size())
    start = min(step * distributed.get_rank(), rows)
    return slice(start, min(start + step, rows))


def as_held(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of the whole ``tensor`` where it is split as ``like`` is."""
    return tensor[rows_held(len(tensor))] if isinstance(like, DTensor) else tensor


@torch.no_grad()
def first_not_finite(params: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first of ``params`` that holds a NaN or Inf, the same on every process, or None."""
    listed = list(params)
    broken = (index for index, (_, param) in enumerate(listed) if not bool(torch.isfinite(held(param)).all()))
    first = next(broken, len(listed))
    if any(isinstance(param, DTensor) for _, param in listed):
        found = torch.tensor(first, device=held(listed[0][1]).device)
        distributed.all_reduce(found, distributed.ReduceOp.MIN)
        first = int(found)
    return listed[first][0] if first < len(listed) else None


@torch.no_grad()
def whole_parameters(model: nn.Module, names: Collection[str], *, keep: bool) -> dict[str, Tensor]:
    """The parameters ``names`` whole, on the CPU where they are split; every process must come here.

    Args:
        model: a module, sharded or not.
        names: of parameters.
        keep: whether this process wants them; of split ones the others hold one at a time.
    """
    params = {name: model.get_parameter(name) for name in names}
    if not any(isinstance(param, DTensor) for param in params.values()):
        return {name: param.detach() for name, param in params.items()}
    kept = {}
    for name, param in params.items():
        full = whole(param.detach()).cpu()
        if keep:
            kept[name] = full
    return kept


def training_device(model: nn.Module) -> torch.device:
    """Where a sharded ``model`` trains: on its own device, or one on the CPU on the process's GPU, if there is any."""
    device = next(model.parameters()).device
    return local_device() if device.type == "cpu" else device


def check_can_shard(model: nn.Module) -> None:
    """Check that the parameters of ``model`` can be split.

    Raises:
        ValueError: a parameter without dimensions, or one that blocks share.
    """
    scalar = next((name for name, param in model.named_parameters() if param.dim() == 0), None)
    if scalar is not None:
        raise ValueError(f"sharding='fsdp' splits parameters by rows, and {scalar} has no dimension")
    blocks = tuple(f"{block.name}." for block in find_blocks(model))
    groups: dict[nn.Parameter, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        block = next((prefix for prefix in blocks if name.startswith(prefix)), "")
        if groups.setdefault(param, block) != block:
            raise ValueError(f"sharding='fsdp' gathers weights block by block, and {name} is shared among blocks")


class Shards:
    """Context manager: the parameters of ``module`` are split over all processes while it is open.

    Every process comes with the same weights and gets them back whole, trained, in the parameters that it had and on
    the device where they were. Until then those parameters are empty, and the module has others in their place. A
    failure puts the weights together as well if all processes fail; where one fails alone, a note on the exception
    says that they are lost.

    Args:
        module: to train or to run; :func:`check_can_shard` has passed it, and :func:`~trisparse.retrain.processes.join`
            was called.
        device: where the processes hold their parts.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device

    def __enter__(self) -> Shards:
        # groups of their own, by which processes can talk that were cut off in the middle of something else; that of
        # the roll call has a timeout of its own, as monitored_barrier's holds on the first process alone
        self._group = distributed.new_group(backend="gloo")
        self._roll_call = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        modules = list(self.module.modules())
        blocks = [block.module for block in find_blocks(self.module)]
        self._places = [
            (owner, name, param)
            for owner in modules
            for name, param in owner.named_parameters(recurse=False, remove_duplicate=False)
        ]
        self._devices = [(tensor, tensor.device) for tensor in (*self.module.parameters(), *self.module.buffers())]
        self._kinds = [(owner, type(owner)) for owner in modules]
        self._shards: dict[nn.Parameter, DTensor] = {}
        self._attributes: list[tuple[nn.Module, set[str]]] = []
        self._hooks: list[tuple[dict[int, Any], int]] = []
        known = [(owner, set(vars(owner)), {table: set(vars(owner)[table]) for table in _HOOKS}) for owner in modules]
        try:
            mesh = init_device_mesh(self.device.type, (distributed.get_world_size(),))
            for block in blocks:
                # FSDP2 hangs the gathering for the backward on the output: an operation in place on a view drops it
                block.register_forward_hook(_without_views)
            for part in (*blocks, self.module):
                # the root's, too: what optimizers and checks see between two steps must be the parts
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
                self._let_go()
        except BaseException as error:
            self._note_additions(known)
            self.__exit__(type(error), error, error.__traceback__)
            raise
        self._note_additions(known)
        return self

    def _note_additions(self, known: list[tuple[nn.Module, set[str], dict[str, set[int]]]]) -> None:
        """Keep what is new since ``known``, to take it off again; FSDP2 adds some of its attributes later."""
        names = {name for owner, before, _ in known for name in vars(owner).keys() - before}
        self._attributes = [(owner, names - before) for owner, before, _ in known]
        self._hooks = [
            (vars(owner)[table], key)
            for owner, _, tables in known
            for table, before in tables.items()
            for key in vars(owner)[table].keys() - before
        ]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with interrupt_after():
            try:
                if error is not None:
                    distributed.monitored_barrier(self._roll_call, timeout=_PATIENCE)
                self._gather()
            except RuntimeError:
                if error is None:
                    raise
                error.add_note("the weights are split over processes that do not answer: load the model anew")
            finally:
                self._take_off()
        for group in (self._group, self._roll_call):
            distributed.destroy_process_group(group)

    def _let_go(self) -> None:
        """Empty the parameters that have been split."""
        for owner, name, param in self._places:
            now = getattr(owner, name)
            if now is not param and param not in self._shards:
                self._shards[param] = now
                param.data = torch.empty(0, dtype=param.dtype)

    @torch.no_grad()
    def _gather(self) -> None:
        for param, shard in self._shards.items():
            param.data = self._whole(shard)
        for tensor, device in self._devices:
            tensor.data = tensor.to(device)

    def _whole(self, shard: DTensor) -> Tensor:
        part = held(shard).cpu()
        processes, rows = distributed.get_world_size(self._group), len(shard)
        padded = part.new_zeros(-(-rows // processes), *part.shape[1:])
        padded[: len(part)] = part
        flat = padded.new_empty(processes * padded.numel())
        sent, received = (tensor.reshape(-1).view(torch.uint8) for tensor in (padded, flat))  # gloo lacks some dtypes
        distributed.all_gather_single(received, sent, group=self._group)
        full = flat.view(processes * len(padded), *part.shape[1:])[:rows]
        return full if full.numel() == flat.numel() else full.clone()

    def _take_off(self) -> None:
        """The module's own parameters, classes and hooks back."""
        for owner, name, param in self._places:
            owner.register_parameter(name, param)
        for owner, kind in self._kinds:
            owner.__class__ = kind
            _module_state_mapping.pop(owner, None)
        for owner, names in self._attributes:
            for name in names & vars(owner).keys():
                delattr(owner, name)
        for table, key in self._hooks:
            table.pop(key, None)
        self._shards.clear()


def _without_views(block: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_without_views(block, args, part) for part in output)
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def whole_state(state: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with whole tensors on the CPU; every process must come here.

    Args:
        state: of an optimizer whose parameters are split.
        keep: whether this process wants it; the others hold one tensor at a time, and their result is of no use.
    """
    moments: dict[int, dict[str, Any]] = {}
    for index, of_param in state["state"].items():
        for name, value in of_param.items():
            full = whole(value).cpu() if isinstance(value, Tensor) else value
            if keep:
                moments.setdefault(index, {})[name] = full
    return {**state, "state": moments}


def split_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The reverse of :func:`whole_state`: what this process holds of it, for ``optimizer`` to load."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    moments = {}
    for index, of_param in state["state"].items():
        param = params[index]
        moments[index] = {name: _split_as(value, param) for name, value in of_param.items()}
    return {**state, "state": moments}


def _split_as(value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor) or not isinstance(param, DTensor) or value.shape != param.shape:
        return value
    return DTensor.from_local(
        as_held(value, param).to(param.device, copy=True), param.device_mesh, param.placements, run_check=False,
        shape=param.shape, stride=param.stride(),
    )  # fmt: skip


@contextmanager
def accelerate_left_out() -> Iterator[None]:
    """Inside, accelerate knows nothing of FSDP: the model it is given is sharded already."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name == "ACCELERATE_USE_FSDP"}
    try:
        with warnings.catch_warnings():
            # of the whole model's output, which nothing changes before the backward; those of blocks are no views
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield
    finally:
        os.environ.update(before)
