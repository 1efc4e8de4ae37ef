"""Which weights of a model are pruned: found by structure, never by a list of model names.

Targets are the weights of ``nn.Linear``, ``nn.Conv1d/2d/3d``, transformers' ``Conv1D`` and fused experts (3-D
parameters) inside the repeated blocks of the model. Embeddings, the output head and whatever stands outside the
blocks are left out by default, as in PERP (section 2.3) and Wanda (section 4). All that is not a target is
listed with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trisparse.sparsity.mask import to_matrix

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Target:
    """One weight to prune.

    Attributes:
        name: full parameter name, as in ``named_parameters``.
        module, param: the owner and the attribute that holds the parameter.
        cols: inputs of an output, the width of the weight's matrix (in·kh·kw for a convolution).
        transposed: whether the parameter is stored as [..., in, out].
        parts: consecutive, equally tall row blocks of the matrix that see different inputs (one for each
            expert, or for each group of a grouped convolution).
        block: index into :attr:`Targets.blocks`, or None outside the repeated blocks.
    """

    name: str
    module: nn.Module
    param: str
    cols: int
    transposed: bool = False
    parts: int = 1
    block: int | None = None

    @property
    def weight(self) -> Tensor:
        """The parameter as it is now."""
        weight: Tensor = getattr(self.module, self.param)
        return weight

    def matrix(self) -> Tensor:
        """Weight as [rows = outputs, cols = inputs]; contiguous, a view of the parameter where possible."""
        return to_matrix(self.weight.detach(), self.cols, transposed=self.transposed).contiguous()


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not pruned, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Block:
    """One repeated block; ``stack`` numbers the list of blocks that it belongs to."""

    name: str
    module: nn.Module
    stack: int


@dataclass(frozen=True, eq=False)
class Targets:
    """What :func:`find_targets` found: the weights to prune, the blocks in calling order, and all the rest."""

    found: list[Target]
    skipped: list[Skipped]
    blocks: list[Block] = field(default_factory=list)


def find_targets(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    on_meta: bool = False,
) -> Targets:
    """Find the weights of ``model`` to prune.

    Args:
        model: any module.
        include: shell-style patterns of parameter or module names. Given, exactly the matching weights are
            targets, also outside the blocks.
        exclude: patterns of names to leave out.
        on_meta: take a model on the meta device, whose weights come later.

    Raises:
        ValueError: a pattern that matches no parameter, a target on the meta device, or no target at all.
    """
    blocks = find_blocks(model)
    block_of = {f"{block.name}.": index for index, block in enumerate(blocks)}
    head = _output_head(model)
    hidden_size = getattr(getattr(model, "config", None), "hidden_size", None)
    included = _Patterns("include", include)
    excluded = _Patterns("exclude", exclude)
    first_name: dict[int, str] = {}
    found: list[Target] = []
    skipped: list[Skipped] = []
    small: list[Tensor] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for param, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{param}" if prefix else param
            wanted, refused = included.match(name), excluded.match(name)
            if (first := first_name.setdefault(id(weight), name)) != name:
                skipped.append(Skipped(name, tuple(weight.shape), f"tied to {first}"))
                continue
            block = next((i for start, i in block_of.items() if name.startswith(start)), None)
            target = _as_target(name, module, param, weight, block, hidden_size)
            if isinstance(target, str):
                if weight.ndim < 2 and not wanted:
                    small.append(weight)
                else:
                    skipped.append(Skipped(name, tuple(weight.shape), target))
            elif refused:
                skipped.append(Skipped(name, tuple(weight.shape), "excluded"))
            elif include is not None:
                if wanted:
                    found.append(target)
                else:
                    skipped.append(Skipped(name, tuple(weight.shape), "not included"))
            elif module is head:
                skipped.append(Skipped(name, tuple(weight.shape), "output head"))
            elif blocks and block is None:
                skipped.append(Skipped(name, tuple(weight.shape), "outside the repeated blocks"))
            else:
                found.append(target)
    if small:
        count = sum(weight.numel() for weight in small)
        skipped.append(Skipped(f"({len(small)} biases and norms)", (count,), "1-D parameters"))
    included.check_used()
    excluded.check_used()
    if not found:
        raise ValueError("model has no weight to prune" + ("" if include is None else " among include"))
    empty = [target.name for target in found if target.weight.is_meta]
    if empty and not on_meta:
        raise ValueError(f"model is on the meta device ({empty[0]} and {len(empty) - 1} more): load it first")
    return Targets(found, skipped, blocks)


def is_peft_wrapped(model: nn.Module) -> bool:
    """Whether ``model`` carries PEFT adapters, whose weights are no targets and whose layers hide theirs."""
    return hasattr(model, "peft_config") or any(hasattr(module, "base_layer") for module in model.modules())


def find_blocks(model: nn.Module) -> list[Block]:
    """The repeated blocks: members of the outermost module lists whose members hold several modules.

    A ``ModuleList`` counts whatever its members are (hybrid models mix classes), a ``Sequential`` only if
    they are all of one class.
    """
    blocks: list[Block] = []
    stacks = 0

    def visit(prefix: str, module: nn.Module) -> None:
        nonlocal stacks
        members = list(module.children())
        listed = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and len({type(member) for member in members}) == 1
        )
        if listed and prefix and members and all(_holds_weights(member) for member in members):
            for name, member in module.named_children():
                blocks.append(Block(f"{prefix}.{name}", member, stacks))
            stacks += 1
            return
        for name, child in module.named_children():
            visit(f"{prefix}.{name}" if prefix else name, child)

    visit("", model)
    return blocks


def _holds_weights(block: nn.Module) -> bool:
    """Whether ``block`` is made of parts, at least one of which is a prunable layer."""
    return any(isinstance(part, (nn.Linear, Conv1D, *_CONVS)) for part in block.modules() if part is not block)


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _as_target(
    name: str, module: nn.Module, param: str, weight: Tensor, block: int | None, hidden_size: int | None
) -> Target | str:
    """The target that ``weight`` is, or the reason why it is none."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if weight.ndim < 2:
        return "1-D parameter"
    if not weight.is_floating_point():
        return f"dtype {weight.dtype} cannot be pruned"
    if param == "weight" and weight.ndim == 2:
        if isinstance(module, nn.Linear):
            return Target(name, module, param, weight.shape[1], block=block)
        if isinstance(module, Conv1D):
            return Target(name, module, param, weight.shape[0], transposed=True, block=block)
    if isinstance(module, _CONVS) and param == "weight":
        return Target(name, module, param, weight[0].numel(), parts=module.groups, block=block)
    if weight.ndim == 3 and (hasattr(module, "num_experts") or type(module).__name__.endswith("Experts")):
        transposed = _experts_transposed(module, param, weight, hidden_size)
        if transposed is None:
            return "fused experts whose layout is unknown"
        cols = weight.shape[-2] if transposed else weight.shape[-1]
        return Target(name, module, param, cols, transposed, parts=weight.shape[0], block=block)
    return f"not a weight of a Linear, Conv, Conv1D or fused experts ({type(module).__name__})"


def _experts_transposed(module: nn.Module, param: str, weight: Tensor, hidden_size: int | None) -> bool | None:
    """Whether fused experts are stored [experts, in, out]; None if the model does not tell."""
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", hidden_size))
    first, last = weight.shape[-2:]
    if first == last or hidden not in (first, last):
        return None
    hidden_is_last = last == hidden
    return hidden_is_last if "down" in param else not hidden_is_last  # down projects into the hidden size


class _Patterns:
    """Shell-style name patterns that remember which of them matched."""

    def __init__(self, argument: str, patterns: str | Iterable[str] | None) -> None:
        self.argument = argument
        self.unused = dict.fromkeys([patterns] if isinstance(patterns, str) else patterns or ())
        self.patterns = tuple(self.unused)

    def match(self, name: str) -> bool:
        matched = [pattern for pattern in self.patterns if name_matches(name, pattern)]
        for pattern in matched:
            self.unused.pop(pattern, None)
        return bool(matched)

    def check_used(self) -> None:
        if self.unused:
            raise ValueError(f"{self.argument} matches no parameter: {', '.join(self.unused)}")


def name_matches(name: str, pattern: str) -> bool:
    """Whether the shell-style ``pattern`` matches the parameter ``name`` or a module that it is in."""
    return any(fnmatchcase(part, pattern) for part in _prefixes(name))


def _prefixes(name: str) -> Iterator[str]:
    """A parameter's name and the names of all modules that it is in: a, a.b, a.b.weight."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])
