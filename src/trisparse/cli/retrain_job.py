"""What every form of retraining is asked for besides its own settings: the model, data, where the result goes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# keys of the YAML file and options, beside those of the form
COMMON = {"data": "str | None", "out": "str | None", "device": "str | None"}
RECOVER = {"recover_masks": "bool"}
HELD_OUT = {"validation": "str | None", "validation_windows": "int"}


@dataclass(frozen=True)
class Job:
    """One call of ``trisparse retrain``.

    Attributes:
        model: as it was given: a folder, or an id.
        settings: of the form, nested as in its YAML file, without those below.
        data, validation: as they were given.
        validation_windows: of the validation text.
        out: folder of the result.
        device: to work on.
        recover_masks: whether the masks are taken from the model's zeros.
        dry_run, as_json: what to print.
    """

    model: str
    settings: dict[str, Any]
    data: str | None
    validation: str | None
    validation_windows: int
    out: Path | None
    device: str | None
    recover_masks: bool
    dry_run: bool
    as_json: bool

    @classmethod
    def of(cls, model: str, settings: Mapping[str, Any], *, dry_run: bool, as_json: bool) -> Job:
        """Take what is common out of ``settings``."""
        own = dict(settings)
        out = own.pop("out", None)
        return cls(
            model=model,
            data=own.pop("data", None),
            validation=own.pop("validation", None),
            validation_windows=own.pop("validation_windows", 100),
            out=None if out is None else Path(out),
            device=own.pop("device", None),
            recover_masks=own.pop("recover_masks", False),
            settings=own,
            dry_run=dry_run,
            as_json=as_json,
        )

    def where(self) -> Any:
        """The torch device to work on."""
        import torch

        from trisparse.retrain.processes import local_device

        return local_device() if self.device is None else torch.device(self.device)

    def check(self, output_dir: str | Path | None = None, report_to: Sequence[str] = ()) -> None:
        """Check, before anything is read, that the result can be written, and that what is reported to is there.

        Raises:
            ValueError: no data or no ``out``, a folder that holds something else, or checkpoints inside of ``out``,
                which is replaced as a whole, as is a model that it is made from.
        """
        from trisparse.cli.options import local_models
        from trisparse.sparsity.checkpoint import check_output

        if not self.dry_run and (self.data is None or self.out is None):
            raise ValueError("retrain needs --data and --out (only --dry-run does without them)")
        if self.out is not None:
            sources = (self.settings.get(name) for name in ("teacher", "dense"))
            check_output(self.out, sources=local_models(self.model, *sources))
            if output_dir is not None:
                _check_apart(self.out, Path(output_dir))
        _check_integrations(report_to)

    def finished(self, content: Mapping[str, Any], text: str) -> None:
        """Print what was done, and where it is."""
        from trisparse.cli.options import show

        show({**content, "out": str(self.out)}, f"{text}\nsaved to {self.out}", self.as_json)


def _check_apart(out: Path, output_dir: Path) -> None:
    one, other = out.resolve(), output_dir.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(
            f"--out {out} and --output-dir {output_dir} must lie apart: the result replaces the one, and the other "
            "holds the checkpoints"
        )


def _check_integrations(names: Sequence[str]) -> None:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in set(names) - {"all", "none"}:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to must be of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: {name} is not installed here (or switched off): install it, or leave it out")


def chosen_groups(value: Any, presets: Collection[str], groups: Collection[str]) -> Any:
    """The parameter groups of ``--groups``: a preset; ``only:norms`` or one that is no preset's name: that one alone.

    A name that is neither stays as it is, for the message that lists the presets.
    """
    if not isinstance(value, str):
        return value
    if value.startswith("only:"):
        return tuple(word.strip() for word in value.removeprefix("only:").split(",") if word.strip())
    return (value,) if value in groups and value not in presets else value


def with_groups(settings: Mapping[str, Any], presets: Collection[str], groups: Collection[str]) -> dict[str, Any]:
    """``settings`` with its ``groups`` as :func:`chosen_groups` has them."""
    found = dict(settings)
    if isinstance(value := found.get("groups"), tuple) and value and str(value[0]).startswith("only:"):
        found["groups"] = chosen_groups(",".join(value), presets, groups)
    elif value is not None:
        found["groups"] = chosen_groups(value, presets, groups)
    return found


def as_options(message: str, names: Collection[str]) -> str:
    """The settings that ``message`` spells as Python does, ``merge=False``, as options: ``--no-merge``."""
    found = []
    for name, value in re.findall(r"\b(\w+)=('[^']*'|[\w.+-]*[\w])", message):
        if name in names:
            option = name.replace("_", "-")
            shown = value.strip("'")
            if (name, value) == ("resume", "'auto'"):
                value = "True"  # as the option has it
            found.append(
                {"True": f"--{option}", "False": f"--no-{option}", "None": f"no --{option}"}.get(
                    value, f"--{option} {shown}"
                )
            )
    return ", ".join(dict.fromkeys(found))


def used_settings(config: Any, *, dropped: Collection[str] = ()) -> dict[str, Any]:
    """The fields of the dataclass ``config`` as a recipe keeps them: not where a run wrote, nor what it did not use."""
    import dataclasses

    values = dataclasses.asdict(config)
    left_out = {"output_dir", "save_steps", "report_to", "resume", "guard_every", *dropped}
    return {name: value for name, value in values.items() if name not in left_out}


def unused(config: Any, *, teacher: bool) -> set[str]:
    """Fields of a PERPConfig that a run by it does not read."""
    names = set()
    if config.learning_rate != "grid":
        names |= {"learning_rates", "grid_steps"}
    if not teacher:
        names |= {"distillation_weight", "temperature"}
    if not {"lora", "head"} & set(config.groups):
        names |= {"rank", "alpha"}
    if "lora" not in config.groups:
        names |= {"variant", "targets"}
    return names
