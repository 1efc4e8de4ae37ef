"""What defines a search: its settings, checked, and the vocabulary of its trees."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from trisparse.sparsity.metric.operations import INPUTS, OPERATIONS
from trisparse.sparsity.pattern import Unstructured, parse_pattern

Strategy = Literal["evolution", "random"]
Mutation = Literal["one-node", "each-node"]
Vocabulary = Literal["published", "extended"]


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search; the defaults are the paper's (Dong et al. 2024, section 4.1).

    The run depends on them, the model and the data alone: neither on time nor on how many workers there are.

    Attributes:
        population: metrics drawn at random at the start, and how many the pool holds.
        iterations: rounds of offspring after that.
        batch: offspring an iteration makes from the pool at its start.
        strategy: "evolution", or "random": every metric is drawn as the first ones are.
        sparsity: share of each row that is pruned for the fitness, such as 0.5 or "50%"; kept as a number.
        top: parents are drawn from so many best metrics.
        least_depth, most_depth: levels of the first trees; a leaf has one. ``most_depth`` also bounds offspring.
        mutation_probability: of the mutation after a crossover.
        mutation: what is mutated with that probability: "one-node", a node at random (section 3.2), or
            "each-node", every node by itself (appendix D).
        operations: "published" (Table 10) or "extended" by those that the published vocabulary lacks.
        inputs: the inputs that trees may read, of W, G and X. Without G no gradients are computed.
        numbers: the share of leaves that are numeric constants; the paper has none.
        start_from: metrics that the first population starts with, as expressions or names of the library; the paper
            has none.
        opposing: cancel opposing operations such as log and exp, though under the published guards they undo each other
            only roughly (section 3.2, OOS).
        race: stop a candidate that is surely not among the best ``top``.
        seed: of every random choice.
    """

    population: int = 50
    iterations: int = 300
    batch: int = 1
    strategy: Strategy = "evolution"
    sparsity: float | str = 0.5
    top: int = 10
    least_depth: int = 3
    most_depth: int = 5
    mutation_probability: float = 0.5
    mutation: Mutation = "one-node"
    operations: Vocabulary = "published"
    inputs: str = "WGX"
    numbers: float = 0.0
    start_from: tuple[str, ...] = ()
    opposing: bool = True
    race: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self._at_least("population", 2)
        self._at_least("iterations", 0)
        self._at_least("batch", 1)
        self._at_least("top", 2)
        self._at_least("least_depth", 2)
        self._at_least("most_depth", self.least_depth)
        self._one_of("strategy", get_args(Strategy))
        self._one_of("mutation", get_args(Mutation))
        self._one_of("operations", get_args(Vocabulary))
        self._share("mutation_probability")
        self._share("numbers")
        pattern = parse_pattern(self.sparsity)
        if not isinstance(pattern, Unstructured) or pattern.scope != "row":
            raise ValueError(f"sparsity must be a share of each row, such as '50%', got {self.sparsity!r}")
        object.__setattr__(self, "sparsity", pattern.sparsity)
        if "W" not in self.inputs or set(self.inputs) - set(INPUTS) or len(set(self.inputs)) != len(self.inputs):
            raise ValueError(f"inputs must be W with or without G and X, such as 'WX', got {self.inputs!r}")

    @property
    def share(self) -> float:
        """The pruned share of each row."""
        return float(self.sparsity)

    @property
    def unary(self) -> tuple[str, ...]:
        """Names of the unary operations."""
        return self._operations(1)

    @property
    def binary(self) -> tuple[str, ...]:
        """Names of the binary operations."""
        return self._operations(2)

    @property
    def evaluations(self) -> int:
        """Evaluations of the whole search, references aside."""
        return self.population + self.iterations * self.batch

    def to_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return asdict(self)

    def _operations(self, arity: int) -> tuple[str, ...]:
        wide = self.operations == "extended"
        return tuple(name for name, o in OPERATIONS.items() if o.arity == arity and (o.published or wide))

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def _share(self, name: str) -> None:
        if not 0 <= getattr(self, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}")
