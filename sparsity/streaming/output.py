"""The folder that a streamed prune writes: a shard for each part as it is finished, and all the rest at the end.

It grows in a folder of its own beside the one that was asked for, and is renamed when it is whole. The form is that of
:func:`trisparse.sparsity.checkpoint.save`, with one shard of weights for each part of the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trisparse.sparsity.checkpoint import INFO_FILE, MASKS_FILE, check_output, checkpoint_info, mask_entry
from trisparse.sparsity.mask import Mask, combined_sha256
from trisparse.sparsity.progress import quiet_transformers
from trisparse.sparsity.streaming.journal import JOURNAL_FILE, sync, write_file


class Output:
    """Work on the folder ``path``, in ``.NAME.streaming`` beside it."""

    def __init__(self, path: Path, parts: int) -> None:
        self.path = path
        self.work = work_folder(path)
        self._result = self.work / "result"
        self._parts = parts

    def shard(self, part: int) -> Path:
        """The file of the weights of a part."""
        return self._result / f"model-{part + 1:05}-of-{self._parts:05}.safetensors"

    def write_part(self, part: int, tensors: Mapping[str, Tensor], masks: Mapping[str, Mask]) -> dict[str, Any]:
        """Write the weights and the masks of a part, and say what a journal must remember of them."""
        self._result.mkdir(exist_ok=True)
        write_file(self.shard(part), lambda file: save_file(dict(tensors), file, metadata={"format": "pt"}))
        if masks:
            bits = {name: mask.bits for name, mask in masks.items()}
            write_file(self._masks(part), lambda file: save_file(bits, file))
        return {
            "weights": {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()},
            "masks": {name: {**mask_entry(mask), "sha256": mask.sha256} for name, mask in masks.items()},
        }

    def finish(
        self,
        model: PreTrainedModel,
        lines: Mapping[int, Mapping[str, Any]],
        *,
        tokenizer: Any,
        recipe: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write what stands beside the shards, and put the folder in place. ``lines`` are the journal's, by part.

        It may be done again after it was cut off.
        """
        lines = dict(sorted(lines.items()))
        weight_map = {name: self.shard(part).name for part, line in lines.items() for name in line["weights"]}
        total = sum(size for line in lines.values() for size in line["weights"].values())
        _write_json(
            self._result / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        # As save_pretrained leaves them.
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        with quiet_transformers():
            model.config.save_pretrained(self._result)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(self._result)
            if tokenizer is not None:
                tokenizer.save_pretrained(self._result)
        entries = {name: dict(entry) for line in lines.values() for name, entry in line["masks"].items()}
        sha256 = combined_sha256({name: entry.pop("sha256") for name, entry in entries.items()})
        files = [self._masks(part) for part, line in lines.items() if line["masks"]]
        write_file(self._result / MASKS_FILE, lambda file: join_safetensors(files, file))
        _write_json(self._result / INFO_FILE, checkpoint_info(type(model).__name__, entries, sha256, recipe))
        self._put_in_place()

    def is_in_place(self) -> bool:
        """Once all parts are written: whether :meth:`finish` has ended, in a run that was cut off right after."""
        return not self._result.exists()

    def clear(self) -> None:
        """Remove all work but the journal."""
        for file in self.work.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name != JOURNAL_FILE:
                file.unlink()

    def clean_up(self) -> None:
        """Remove the folder of work, its journal last."""
        self.clear()
        shutil.rmtree(self.work)

    def _put_in_place(self) -> None:
        replaced = self.work / "replaced"
        if not self.path.exists():
            self._result.rename(self.path)
            return
        self.path.rename(replaced)
        try:
            self._result.rename(self.path)
        except BaseException:
            replaced.rename(self.path)
            raise
        finally:
            sync(self.path.parent)

    def _masks(self, part: int) -> Path:
        return self.work / f"masks-{part:05}.safetensors"


def check_place(path: Path, source: Path) -> None:
    """Check that the resolved ``path`` can be replaced by a folder that is pruned from ``source``.

    Raises:
        ValueError: ``path`` holds something else, a run that goes on after a kill would not find its source, or
            ``path`` cannot be renamed.
    """
    if path.is_mount():
        raise ValueError(f"out {path} is a mount point, and a folder is renamed into place: choose a folder inside it")
    if Path.cwd().is_relative_to(path):
        raise ValueError(f"out {path} is the current directory, or holds it, and is replaced: choose another folder")
    check_output(path, sources=[source])


def work_folder(path: Path) -> Path:
    """Where the work on the folder ``path`` is kept until it is finished."""
    return path.parent / f".{path.name}.streaming"


def join_safetensors(files: Sequence[Path], into: Path) -> None:
    """Write the tensors of all ``files`` into one, without reading them into memory; names must not repeat."""
    with into.open("wb") as target:
        sources: list[BufferedReader] = []
        try:
            header: dict[str, Any] = {}
            start = 0
            for file in files:
                source = file.open("rb")
                sources.append(source)
                content = json.loads(source.read(int.from_bytes(source.read(8), "little")))
                content.pop("__metadata__", None)
                for name, entry in content.items():
                    begin, end = entry["data_offsets"]
                    header[name] = {**entry, "data_offsets": [start + begin, start + end]}
                start += max((entry["data_offsets"][1] for entry in content.values()), default=0)
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # the data is aligned, as the format asks
            target.write(len(text).to_bytes(8, "little") + text)
            for source in sources:
                shutil.copyfileobj(source, target, 2**20)
        finally:
            for source in sources:
                source.close()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, lambda file: file.write_text(json.dumps(content, indent=2) + "\n"))
