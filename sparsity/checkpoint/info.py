"""What a checkpoint says of itself beside its tensors: the pruned weights, the hash of the masks and the recipe.

It stands in ``trisparse.json`` (dense weights, or a plain module), and for a compressed transformers model in
``config.json`` as ``quantization_config``, which ``save_pretrained`` writes too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trisparse.sparsity.checkpoint.files import (
    ADAPTERS_FILE,
    INFO_FILE,
    CheckpointError,
    compressed_config,
    read_json,
)
from trisparse.sparsity.checkpoint.target import VERSION, Target, TargetError, targets_sha256
from trisparse.sparsity.mask import Mask

_DENSE_VERSION = 1  # of trisparse.json beside dense weights
_PLAIN_VERSION = 2  # of trisparse.json beside the compressed weights of a module that is not transformers'


@dataclass(frozen=True)
class Manifest:
    """The compressed form's list of weights.

    Attributes:
        targets: every pruned weight, by its name in the model.
        recipe: what was done to the model, step by step.
        trisparse: the version that wrote it.
    """

    targets: Mapping[str, Target]
    recipe: Sequence[Mapping[str, Any]] = ()
    trisparse: str = ""

    def content(self) -> dict[str, Any]:
        """As JSON: ``pattern`` is that of the weights that do not name another."""
        patterns = Counter(str(target.pattern) for target in self.targets.values())
        pattern = patterns.most_common(1)[0][0] if patterns else ""
        return {
            "version": VERSION,
            "trisparse": self.trisparse or version("trisparse"),
            "pattern": pattern,
            "masks_sha256": targets_sha256(self.targets),
            "targets": {name: target.entry(pattern) for name, target in sorted(self.targets.items())},
            "recipe": [dict(step) for step in self.recipe],
        }

    @classmethod
    def parse(cls, content: Mapping[str, Any], file: str | Path) -> Manifest:
        """Inverse of :meth:`content`, which stands in ``file``.

        Raises:
            CheckpointError: it is damaged, of another version, or the hash of the masks does not fit theirs.
        """
        if content.get("version") != VERSION:
            raise CheckpointError(f"{file} has version {content.get('version')!r}, this trisparse reads {VERSION}")
        entries, pattern, recipe = content.get("targets"), content.get("pattern", ""), content.get("recipe", [])
        if not isinstance(entries, Mapping) or not isinstance(pattern, str):
            raise CheckpointError(f"{file} is damaged: it lists no targets")
        targets = {}
        for name, entry in entries.items():
            try:
                targets[str(name)] = Target.from_entry(entry, pattern)
            except TargetError as error:
                raise CheckpointError(f"{file} is damaged at {str(name)[:200]}: {error}") from error
        if targets_sha256(targets) != content.get("masks_sha256"):
            raise CheckpointError(f"the masks in {file} do not match their hash")
        return cls(targets, read_recipe(recipe, file), str(content.get("trisparse", ""))[:100])


def read_recipe(recipe: Any, file: str | Path) -> list[dict[str, Any]]:
    """``recipe`` as a list of steps, or a CheckpointError that names ``file``."""
    if not isinstance(recipe, list) or not all(isinstance(step, Mapping) for step in recipe):
        raise CheckpointError(f"{file} is damaged: its recipe is no list of steps")
    return [dict(step) for step in recipe]


def mask_entry(mask: Mask) -> dict[str, Any]:
    """What ``trisparse.json`` says of the mask of a dense weight."""
    return {
        "pattern": str(mask.pattern),
        "shape": list(mask.shape),
        "cols": mask.cols,
        "transposed": mask.transposed,
        "kept": mask.kept,
    }


def checkpoint_info(
    model_class: str, entries: Mapping[str, Mapping[str, Any]], sha256: str, recipe: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Content of ``trisparse.json``: ``entries`` are the masks' (:func:`mask_entry`), ``sha256`` is over them all."""
    return {
        "version": _DENSE_VERSION,
        "trisparse": version("trisparse"),
        "model_class": model_class,
        "masks_sha256": sha256,
        "targets": dict(entries),
        "recipe": [dict(step) for step in recipe],
    }


def plain_info(model_class: str, manifest: Manifest) -> dict[str, Any]:
    """Content of ``trisparse.json`` beside the compressed weights of a module that is not transformers'."""
    return {"version": _PLAIN_VERSION, "model_class": model_class, "compressed": manifest.content()}


def read_manifest(path: str | Path) -> Manifest | None:
    """The list of weights of a compressed checkpoint; None where the folder holds dense weights.

    Raises:
        CheckpointError: the folder is not ours, or damaged.
    """
    path = Path(path)
    if (found := compressed_config(path)) is not None:
        return Manifest.parse(found, path / "config.json")
    info = _read_info_file(path)
    if info.get("version") != _PLAIN_VERSION:
        return None
    content = info.get("compressed")
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path / INFO_FILE} is damaged: it lists no targets")
    return Manifest.parse(content, path / INFO_FILE)


def read_info(path: str | Path) -> dict[str, Any]:
    """What the checkpoint in the folder ``path`` says of itself, in the same words for every form.

    Returns:
        ``version``, ``trisparse``, ``masks_sha256``, ``targets`` (name to pattern, shape, cols, transposed, kept and,
        of a compressed checkpoint, format and sha256) and ``recipe``.

    Raises:
        CheckpointError: it is missing, unreadable or of a newer version.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest is None:
        return _read_info_file(path)
    content = manifest.content()
    targets = {
        name: {
            "pattern": str(target.pattern),
            "shape": list(target.shape),
            "cols": target.cols,
            "transposed": target.transposed,
            "kept": target.kept,
            "format": target.format,
            "sha256": target.sha256,
        }
        for name, target in manifest.targets.items()
    }
    return {**content, "targets": targets}


def _read_info_file(path: Path) -> dict[str, Any]:
    file = path / INFO_FILE
    try:
        info = read_json(file)
    except FileNotFoundError:
        if (path / ADAPTERS_FILE).is_file():
            raise CheckpointError(
                f"{path} holds adapters and not a whole model: trisparse.retrain.adapter_folder.load_adapted_model("
                "path) puts them on theirs"
            ) from None
        raise CheckpointError(f"{path} is not a trisparse checkpoint: it has no {INFO_FILE}") from None
    if info.get("version") == _PLAIN_VERSION:
        return info
    if not isinstance(info.get("targets"), dict):
        raise CheckpointError(f"{file} is damaged: it lists no targets")
    if info.get("version") != _DENSE_VERSION:
        raise CheckpointError(f"{file} has version {info.get('version')!r}, this trisparse reads {_DENSE_VERSION}")
    return {**info, "recipe": read_recipe(info.get("recipe", []), file)}
