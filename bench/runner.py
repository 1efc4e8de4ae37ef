"""Run benchmarks: check each contestant against the reference, time those that are right in turn, record every row.

A contestant that is wrong is an error and is never timed; the others go on. Rows are written after each case, so that
a run that is killed keeps what it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trisparse.bench.clocks import clocks
from trisparse.bench.peaks import Peaks, peaks_of, roofline_share
from trisparse.bench.registry import Benchmark, Case, Measured, Options, benchmarks, equal
from trisparse.bench.rows import RESULTS, Row, append_rows, rows_file
from trisparse.bench.timing import Call, Timer, interleave, speedup, summary, timer_for
from trisparse.env import checkout, environment

# What a row has a place of its own for, by the unit in which it is given; among the metrics before that.
_UNITS = {"gb_per_s": 1e9, "tflop_per_s": 1e12, "tokens_per_s": 1.0, "roofline_share": 1.0, "speedup": 1.0}
OUTSIDE = Path("bench-results")  # where rows go without a checkout


@dataclass
class Outcome:
    """What a run found: rows in the order of the cases, one line for each error, and the files that hold the rows."""

    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


class Listener:
    """Told of each case and each error as it happens; this one says nothing."""

    def case(self, benchmark: str, case: str, rows: Sequence[Row]) -> None:
        """A case is over; ``rows`` are written."""

    def error(self, text: str) -> None:
        """Something went wrong; the run goes on."""


@dataclass(frozen=True)
class Machine:
    """Where a run measures.

    Attributes:
        device: as torch knows it.
        name: "cpu" or the GPU's name.
        timer: of its calls.
        peaks: of the roofline.
        environment: of :func:`trisparse.env.environment`.
    """

    device: torch.device
    name: str
    timer: Timer
    peaks: Peaks
    environment: Mapping[str, Any]


def this_machine(device: torch.device) -> Machine:
    """The machine with ``device``.

    Raises:
        ValueError: the device is neither the CPU nor a CUDA device that is there.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device here")
    timer = timer_for(device)
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Machine(device, name, timer, peaks_of(device), environment())


def chosen(names: Sequence[str], device: str | None = None) -> list[Benchmark]:
    """The benchmarks of these names; ``papers/`` or any other name that ends in a slash takes all that begin so.

    Args:
        names: of them.
        device: that was asked for by name; None is any.

    Raises:
        ValueError: a name is unknown, or there is none, or one of them does not measure that device.
    """
    known = benchmarks()
    found: dict[str, Benchmark] = {}
    for name in names:
        fitting = [key for key in known if key == name or (name.endswith("/") and key.startswith(name))]
        if not fitting:
            raise ValueError(f"there is no benchmark {name!r}; known are {', '.join(known) or 'none'}")
        found |= {key: known[key] for key in fitting}
    if not found:
        raise ValueError(f"name at least one benchmark of {', '.join(known)}")
    for item in found.values():
        if device is not None and torch.device(device).type in {"cpu", "cuda"} - {*item.devices}:
            raise ValueError(f"benchmark {item.name} measures {' and '.join(item.devices)}, not {device}")
    return list(found.values())


def run(
    selected: Sequence[Benchmark],
    options: Options,
    *,
    command: str,
    out: Path | None = None,
    machine: Machine | None = None,
    listener: Listener | None = None,
) -> Outcome:
    """Run benchmarks one after the other.

    Args:
        selected: from :func:`chosen`.
        options: for all of them; one that does not measure their device is given the CPU.
        command: that is run, for the record.
        out: folder for the rows; None is ``bench/results/runs`` or ``dirty`` of the checkout, ``bench-results`` of
            the working directory where there is no checkout.
        machine: None is this one with the options' device.
        listener: told of each case and error.

    Raises:
        ValueError: as :func:`this_machine`; an option is not one of a benchmark's.
    """
    for item in selected:
        item.check(options)
    machine = machine or this_machine(options.device)
    listener = listener or Listener()
    begun = datetime.now(UTC)
    commit = machine.environment.get("commit")
    number = f"{begun:%Y%m%dT%H%M%SZ}" + (f"-{commit[:7]}" if commit else "")
    about = {"run": number, "time": begun.isoformat(timespec="seconds"), "command": command}
    options = replace(options, out=out, command=command)
    outcome = Outcome()

    def error(text: str) -> None:
        outcome.errors.append(text)
        listener.error(text)

    def record(name: str, found: Case | Measured, machine: Machine) -> None:
        where = f"{name}: {found.name}"
        if isinstance(found, Case):
            try:
                timed = measure(
                    found, options.repeats or found.repeats, machine, lambda text: error(f"{where}: {text}")
                )
            except Exception as problem:  # of the reference, or of a contestant while it was timed
                error(f"{where}: {_said(problem)}")
                return
        else:
            timed = found
        if timed is not None:
            timed = replace(timed, parameters={**timed.parameters, "quick": options.quick})
        now = _now(machine, found)
        origin = found.origin if isinstance(found, Measured) else None
        rows = [] if timed is None else rows_of(name, timed, now, about | ({"time": origin.time} if origin else {}))
        if rows:
            file = _file(name, out, now)
            append_rows(rows, file)
            outcome.rows += rows
            outcome.files += [file] if file not in outcome.files else []
        listener.case(name, found.name, rows)

    any_case = False
    for item in selected:
        here = machine if machine.device.type in item.devices else this_machine(torch.device("cpu"))
        try:
            for found in item.run(replace(options, device=here.device)):
                if options.wants(found.name):
                    any_case = True
                    record(item.name, found, here)
        except Exception as problem:
            error(f"{item.name}: {_said(problem)}")
    if options.only and not any_case and not outcome.errors:
        error(f"no case of {', '.join(item.name for item in selected)} has {options.only!r} in its name")
    return outcome


def right_contestants(case: Case, error: Callable[[str], None]) -> dict[str, Call]:
    """The contestants whose result is the reference's; ``error`` takes a line for each of the others."""
    expected = case.reference()
    check = case.check or equal
    right: dict[str, Call] = {}
    for name, call in case.contestants.items():
        try:
            check(call(), expected)
        except Exception as problem:
            error(f"{name} is wrong and not timed: {_said(problem)}")
        else:
            right[name] = call
    return right


def measure(case: Case, repeats: int, machine: Machine, error: Callable[[str], None]) -> Measured | None:
    """Check and time a case; None where no contestant is right.

    Args:
        case: what to measure.
        repeats: timed calls of each contestant.
        machine: where.
        error: takes a line for each contestant that is wrong.
    """
    right = right_contestants(case, error)
    if not right:
        return None
    seconds = interleave(right, repeats, machine.timer)
    metrics = {}
    for name, times in seconds.items():
        found = dict(case.metrics.get(name, {}))
        median = summary(times)["median"]
        for key, work in (("gb_per_s", case.bytes), ("tflop_per_s", case.flops), ("tokens_per_s", case.tokens)):
            if work is not None:
                found[key] = work / median / _UNITS[key]
        share = roofline_share(machine.peaks, median, bytes=case.bytes, flops=case.flops, dtype=case.peak)
        if share is not None:
            found["roofline_share"] = share
        metrics[name] = found
    return Measured(case.name, case.parameters, metrics, seconds, case.baseline)


def rows_of(benchmark: str, found: Measured, machine: Machine, about: Mapping[str, str]) -> list[Row]:
    """One row for each contestant.

    Args:
        benchmark: its name.
        found: what was measured.
        machine: where.
        about: ``run``, ``time`` and ``command`` of the row.
    """
    rows = []
    for name in dict.fromkeys([*found.seconds, *found.metrics]):
        metrics = dict(found.metrics.get(name, {}))
        own = {key: metrics.pop(key) for key in _UNITS if key in metrics}
        times, usual = found.seconds.get(name), found.seconds.get(found.baseline or "")
        if times and usual:
            own["speedup"] = speedup(usual, times)
        elif "tokens_per_s" in own and "tokens_per_s" in found.metrics.get(found.baseline or "", {}):
            own.setdefault("speedup", own["tokens_per_s"] / found.metrics[found.baseline or ""]["tokens_per_s"])
        rows.append(
            Row(
                benchmark=benchmark,
                case=found.name,
                contestant=name,
                parameters=dict(found.parameters),
                kind=found.kind,
                device=machine.name,
                environment=dict(machine.environment),
                baseline=found.baseline,
                seconds=summary(times) if times else {},
                metrics=metrics,
                **own,  # type: ignore[arg-type]
                **about,  # type: ignore[arg-type]
            )
        )
    return rows


def _now(machine: Machine, found: Case | Measured) -> Machine:
    """The machine with what is known of it right after ``found`` was measured: its clocks, and the peaks that count.

    Of numbers from a record it is the machine of that.
    """
    if isinstance(found, Measured) and found.origin is not None:
        return replace(machine, name=found.origin.device, environment=found.origin.environment)
    more: dict[str, Any] = {}
    if (now := clocks(machine.device)) is not None:
        more["clocks"] = now
    if isinstance(found, Case) and (found.bytes or found.flops):
        peaks = {"bytes_per_s": machine.peaks.bytes_per_s() if found.bytes else None}
        peaks["flops_per_s"] = machine.peaks.flops_per_s(found.peak) if found.flops else None
        more["peaks"] = {**peaks, "dtype": found.peak, "source": machine.peaks.source}
    return replace(machine, environment={**machine.environment, **more})


def _file(benchmark: str, out: Path | None, machine: Machine) -> Path:
    root = checkout()
    if out is None and root is not None:
        return rows_file(benchmark, dirty=bool(machine.environment["dirty"]), results=root / RESULTS)
    return (out or OUTSIDE) / f"{benchmark.replace('/', '-')}.jsonl"


def _said(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__
