"""The benchmarks by name: a decorated function each, which yields what is to be timed or what it measured itself.

    @benchmark("select", "masks of one weight, against the usual", devices=("cpu", "cuda"), takes=("dtype", "repeats"))
    def select(options: Options) -> Iterator[Case | Measured]: ...

The runner (bench/runner.py) checks, times and records what they yield.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["measurement", "bound"]
Check = Callable[[Any, Any], None]

# Where the functions are: importing these registers them.
_MODULES: tuple[str, ...] = (
    "trisparse.bench.families.checkpoint",
    "trisparse.bench.families.linear",
    "trisparse.bench.families.prune",
    "trisparse.bench.families.roofline",
    "trisparse.bench.families.select",
    "trisparse.bench.families.tokens",
    "trisparse.bench.papers.registered",
    "trisparse.bench.studies.allocations",
    "trisparse.bench.studies.digits",
    "trisparse.bench.studies.masked_lora",
    "trisparse.bench.studies.metric_comparison",
    "trisparse.bench.studies.obs_block",
    "trisparse.bench.studies.obs_updates",
    "trisparse.bench.studies.perp_quality",
    "trisparse.bench.studies.perplexity_curve",
    "trisparse.bench.studies.reconstruction",
    "trisparse.bench.studies.stream_kills",
    "trisparse.bench.studies.stream_memory",
    "trisparse.bench.studies.train_speed",
)


@dataclass(frozen=True)
class Options:
    """What a user may say; each benchmark names those that it reads.

    Attributes:
        quick: small shapes and few repeats, minutes on a CPU.
        device: where to run.
        dtype: of weights and activations; None is the benchmark's own choice.
        model: a Hugging Face id, a folder or ``smollm2``; None is the benchmark's own choice.
        repeats: timed calls of each contestant; None is the benchmark's own choice.
        only: run the cases alone whose name contains this.
        scale: how much of a paper its tables run: "tiny", "small" or "paper" (:mod:`trisparse.bench.papers.scale`).
        out: the folder that the rows go to, if it was named; the runner fills it in, and ``command``.
        command: that is run, for what a benchmark writes beside its rows.
    """

    quick: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None
    model: str | None = None
    repeats: int | None = None
    only: str = ""
    scale: str = "small"
    out: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")

    def wants(self, case: str) -> bool:
        """Whether ``only`` lets a case of this name run: asked before anything expensive is done for it."""
        return self.only in case


@dataclass(frozen=True)
class Case:
    """Contestants that do the same, for the runner to check against the reference and to time in turn.

    Attributes:
        name: of the case, with its shape: "row 50%, |W|, 4096x4096 fp32".
        parameters: what a plot or a comparison groups by: rows, cols, tokens, dtype, pattern.
        contestants: name to a function that does the work once and returns its result.
        reference: returns what is right; called once, before anything is timed.
        check: ``check(result, expected)`` raises an AssertionError where a contestant's result is wrong; by default
            both are tensors that must be equal. A contestant that is wrong is not timed.
        baseline: the contestant that speed-ups are relative to.
        bytes: compulsory traffic of the work (inputs read once, outputs written once), for GB/s; None leaves it out.
        flops: of the work, for TFLOP/s; None leaves it out.
        peak: which of the device's peaks ``flops`` are compared with: a dtype's name ("float32", "bfloat16").
        repeats: timed calls of each contestant.
        metrics: more numbers by contestant, known without timing: bytes held, sparsity.
        tokens: that one call handles, for tokens/s; None leaves it out.
    """

    name: str
    parameters: Mapping[str, Any]
    contestants: Mapping[str, Callable[[], Any]]
    reference: Callable[[], Any]
    baseline: str
    check: Check | None = None
    bytes: int | None = None
    flops: int | None = None
    peak: str = "float32"
    repeats: int = 20
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tokens: int | None = None


@dataclass(frozen=True)
class Origin:
    """Where and when numbers were measured that a benchmark read from a record.

    Attributes:
        device: "cpu" or the GPU's name.
        time: UTC, ISO 8601.
        environment: of :func:`trisparse.env.environment`, with the commit and the dirty flag of that time.
    """

    device: str
    time: str
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """What a benchmark measured by itself, because it takes processes of its own, or states that change.

    Attributes:
        name, parameters, baseline: as in :class:`Case`; the baseline may be None.
        seconds: contestant to seconds of each repeat, in the order of the rounds; contestants may be missing.
        metrics: contestant to other numbers: tokens_per_s, perplexity, peak_bytes, model_bytes, published.
        kind: ``"bound"`` where the numbers were counted or computed and not measured.
        origin: of numbers from a record; None is here and now.
    """

    name: str
    parameters: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    baseline: str | None = None
    kind: Kind = "measurement"
    origin: Origin | None = None


def equal(result: Any, expected: Any) -> None:
    """The check of a case that has none of its own: both are the same tensor, bit by bit of a value."""
    if not torch.equal(result, expected):
        raise AssertionError("not equal to the reference")


Run = Callable[[Options], Iterator[Case | Measured]]


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark.

    Attributes:
        name: of it.
        about: one line of help.
        run: the function.
        devices: types of those that it can measure; on any other machine it measures the CPU.
        takes: the options that it reads besides ``quick``, ``only`` and ``device``; another one is an error.
    """

    name: str
    about: str
    run: Run
    devices: tuple[str, ...] = ("cpu",)
    takes: tuple[str, ...] = ()

    def check(self, options: Options) -> None:
        """Refuse what would be ignored.

        Raises:
            ValueError: an option is not one of its own.
        """
        for one in fields(options):
            if one.name in _OWN and one.name not in self.takes and getattr(options, one.name) != one.default:
                own = " ".join(f"--{name}" for name in ("quick", "only", *self.takes))
                raise ValueError(f"benchmark {self.name} does not read --{one.name}; its options are {own}")


_OWN = ("dtype", "model", "repeats", "scale")  # not of every benchmark
_REGISTERED: dict[str, Benchmark] = {}


def benchmark(
    name: str, about: str, *, devices: tuple[str, ...] = ("cpu",), takes: tuple[str, ...] = ()
) -> Callable[[Run], Run]:
    """Register the decorated function as benchmark ``name``; the others are of :class:`Benchmark`.

    Raises:
        ValueError: the name is taken.
    """

    def register(run: Run) -> Run:
        if name in _REGISTERED:
            raise ValueError(f"benchmark {name!r} is registered twice")
        _REGISTERED[name] = Benchmark(name, about, run, devices, takes)
        return run

    return register


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name, sorted."""
    for module in _MODULES:
        import_module(module)
    return dict(sorted(_REGISTERED.items()))
