"""A model whose weights stay on disk: built on the meta device, filled and emptied a part at a time.

A part is one repeated block, or all that stands outside of the blocks (embeddings, final norm, head). Names and
layouts in a checkpoint are not always those of the module: transformers renames weights, adds or drops the base
model's prefix, and stacks experts. Its own loader does that here too, on the weights of one part, and its inverse when
the part is written. Neither is public (transformers 5.23 is what was tested), and this is the one file that uses them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict

from trisparse.sparsity.checkpoint import INFO_FILE, MASKS_FILE, CheckpointError, is_checkpoint, read_info
from trisparse.sparsity.checkpoint.target import check_kept
from trisparse.sparsity.checkpoint.validation import check_pattern
from trisparse.sparsity.hardware import return_freed_memory
from trisparse.sparsity.mask import Mask, attach, check_masks, combined_sha256, detach
from trisparse.sparsity.pattern import parse_pattern
from trisparse.sparsity.progress import quiet_transformers
from trisparse.sparsity.targets import find_blocks

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass
class Part:
    """A block, or (``prefix`` None) all that is outside of the blocks.

    Attributes:
        name: of the block, as in ``named_modules``.
        prefix: what the names of its parameters start with.
        files: the source's file of each of its weights, by the name in the file.
    """

    name: str
    prefix: str | None
    files: dict[str, Path] = field(default_factory=dict)


class ModelOnDisk:
    """A folder with safetensors, and the model on the meta device that they are loaded into.

    Attributes:
        model: transformers model in eval mode. Its buffers that are computed (rotary frequencies) are real.
        parts: first what is outside of the blocks, then the blocks in the order of ``find_blocks``.
        recipe: of a checkpoint of ours: what was done to it.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        """Read the config and the names of all weights; no weights yet.

        Raises:
            ValueError: the folder holds no model of transformers' with safetensors, or one that cannot be streamed.
            CheckpointError: a checkpoint of ours whose masks are damaged.
        """
        self.folder = Path(folder)
        self.device = device
        self._files = _weight_files(self.folder)
        self.model = self._build()
        self._conversions = get_model_conversion_mapping(self.model, None, None)
        self.parts = [Part("(outside of the blocks)", None)]
        self.parts += [Part(block.name, f"{block.name}.") for block in find_blocks(self.model)]
        if len(self.parts) == 1:
            raise ValueError(f"{type(self.model).__name__} has no repeated blocks to stream: prune it in memory")
        self._assign_files()
        self._check_ties()
        self._empty = dict(self.model.named_parameters(remove_duplicate=False))
        self._buffers = dict(self.model.named_buffers(remove_duplicate=False))
        self._masks, self.recipe = self._earlier_masks()

    @property
    def files(self) -> list[Path]:
        """The files of weights."""
        return sorted(set(self._files.values()))

    @property
    def masked(self) -> Collection[str]:
        """Names of the weights that have masks already, in a checkpoint of ours."""
        return self._masks.keys()

    def part_of(self, name: str) -> int:
        """Index of the part that the parameter ``name`` belongs to."""
        for index, part in enumerate(self.parts):
            if part.prefix is not None and name.startswith(part.prefix):
                return index
        return 0

    @contextmanager
    def loaded(self, index: int, shard: Path | None = None) -> Iterator[None]:
        """The weights (and earlier masks) of a part while open, from the source or from a ``shard`` that was written.

        Raises:
            ValueError: a weight is missing, or of another shape.
        """
        part = self.parts[index]
        try:
            self._load(part, part.files if shard is None else dict.fromkeys(_names(shard), shard))
            if shard is None:
                self._attach_masks(part)
            yield
        finally:
            self._free(part)
            return_freed_memory()

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The weights of a loaded part, contiguous, by their names in a checkpoint."""
        part = self.parts[index]
        ignored = self.model._keys_to_ignore_on_save or ()
        state = self.model.state_dict()
        state = {name: value for name, value in state.items() if self._owns(part, name) and name not in ignored}
        state = revert_weight_conversion(self.model, remove_tied_weights_from_state_dict(state, self.model))
        return {name: value.detach().contiguous() for name, value in state.items()}

    def _build(self) -> PreTrainedModel:
        try:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} has no config.json of a model that transformers knows: {error}") from error
        if is_checkpoint(self.folder) and not (self.folder / INFO_FILE).is_file():
            raise ValueError(
                f"{self.folder} holds compressed weights, and streaming reads dense ones: write them with "
                "trisparse.save(trisparse.load(folder), other, form='dense')"
            )
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{self.folder} is quantized: only dense weights can be pruned")
        architecture = (config.architectures or ["none"])[0]
        model_class = getattr(transformers, architecture, None)
        if model_class is None:
            raise ValueError(f"transformers has no {architecture}, which {self.folder} was saved from")
        dtype = getattr(config, "dtype", None) or _first_dtype(self._files)
        with quiet_transformers(), init_empty_weights(include_buffers=False), no_init_weights():
            model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
        model.tie_weights()  # becoming empty has untied them
        if (self.folder / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        model.eval()
        return model

    def _assign_files(self) -> None:
        """Find the part of every weight in the files, by the name that transformers' loader gives it."""
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        own = self.model.state_dict()
        prefix = self.model.base_model_prefix
        for key, file in self._files.items():
            name, _ = rename_source_key(key, renamings, converters, prefix, own)
            if name not in own and key in own:
                name, _ = rename_source_key(key, [], [], prefix, own)
            if name in own:  # else the model does not use it, as transformers' loader has it
                self.parts[self.part_of(name)].files[key] = file

    def _check_ties(self) -> None:
        first: dict[int, str] = {}
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            other = first.setdefault(id(weight), name)
            if self.part_of(other) != self.part_of(name) or (other != name and self.part_of(name)):
                raise ValueError(f"{name} is tied to {other}, and blocks share no weights here: prune it in memory")

    def _earlier_masks(self) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """Entries of the masks of a checkpoint of ours, and its recipe, once the masks match their hash."""
        if not (self.folder / INFO_FILE).is_file():
            return {}, []
        info = read_info(self.folder)
        entries: dict[str, dict[str, Any]] = info["targets"]
        if combined_sha256({name: self._mask(name, entries[name]).sha256 for name in entries}) != info["masks_sha256"]:
            raise CheckpointError(f"the masks in {self.folder} do not match their hash")
        return entries, list(info["recipe"])

    def _mask(self, name: str, entry: Mapping[str, Any]) -> Mask:
        file = self.folder / MASKS_FILE
        try:
            with safe_open(file, framework="pt", backend="pread") as opened:
                bits = opened.get_tensor(name)
            pattern = parse_pattern(entry["pattern"])
            mask = Mask(bits, torch.Size(entry["shape"]), int(entry["cols"]), bool(entry["transposed"]), pattern)
            check_kept(pattern, bits.shape[0], mask.cols, mask.kept)
            check_pattern(pattern, bits, mask.cols)
            return mask
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the mask of {name} in {self.folder} cannot be read: {error}") from error

    def _attach_masks(self, part: Part) -> None:
        for name, entry in self._masks.items():
            if self._owns(part, name):
                owner, _, param = name.rpartition(".")
                module = self.model.get_submodule(owner)
                attach(module, param, self._mask(name, entry), zero=False)
                check_masks(module)

    def _owns(self, part: Part, name: str) -> bool:
        return self.parts[self.part_of(name)] is part

    def _load(self, part: Part, files: Mapping[str, Path]) -> None:
        dtype = self.model.dtype
        config = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            device_map={"": self.device},
            weight_mapping=self._conversions,  # type: ignore[arg-type]  # typed narrower than its sources
        )
        weights: dict[str, Tensor] = {}
        for file in sorted(set(files.values())):
            # Not by mmap, whose pages would count as memory of this process, and not by the loader's threads, whose
            # heaps would keep what they free.
            with safe_open(file, framework="pt", backend="pread") as opened:
                weights |= {key: opened.get_tensor(key) for key in files if files[key] == file}
        with quiet_transformers():
            found, _ = convert_and_load_state_dict_in_model(self.model, weights, config)
        if part.prefix is None:
            self.model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        lacking = [name for name in found.missing_keys if self._owns(part, name)]
        wrong = [name for name, *_ in found.mismatched_keys]
        broken = list(found.conversion_errors)
        for what, names in (("lacks", lacking), ("has another shape of", wrong), ("cannot be converted to", broken)):
            if names:
                raise ValueError(f"the checkpoint {self.folder} {what} {', '.join(sorted(map(str, names))[:3])}")
        for name, buffer in self._buffers.items():
            if self._owns(part, name) and self.device.type != "cpu":
                owner, _, attribute = name.rpartition(".")
                module = self.model.get_submodule(owner)
                if module._buffers[attribute] is buffer:  # else it came from the file
                    module._buffers[attribute] = buffer.to(self.device)

    def _free(self, part: Part) -> None:
        for values, where in ((self._empty, "_parameters"), (self._buffers, "_buffers")):
            for name, value in values.items():
                if self._owns(part, name):
                    owner, _, attribute = name.rpartition(".")
                    getattr(self.model.get_submodule(owner), where)[attribute] = value
        for name, module in self.model.named_modules():
            if self._owns(part, f"{name}." if name else name):
                detach(module)


def _weight_files(folder: Path) -> dict[str, Path]:
    """The file of every weight in ``folder``, by its name there."""
    if (folder / _ONE_FILE).is_file():  # first, as transformers has it: an index may be of an earlier save
        return dict.fromkeys(_names(folder / _ONE_FILE), folder / _ONE_FILE)
    if (folder / _INDEX).is_file():
        try:
            index: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / _INDEX} is damaged: {error!r}") from error
        if absent := sorted({file for file in index.values() if not (folder / file).is_file()}):
            raise ValueError(f"{folder} lacks {', '.join(absent[:3])}, which {_INDEX} names")
        return {name: folder / file for name, file in index.items()}
    raise ValueError(f"{folder} holds no {_ONE_FILE} and no {_INDEX}: streaming reads safetensors only")


def _names(file: Path) -> Sequence[str]:
    try:
        with safe_open(file, framework="pt", backend="pread") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _first_dtype(files: Mapping[str, Path]) -> torch.dtype:
    """dtype of the first floating-point weight, as transformers takes it where the config has none."""
    for name, path in files.items():
        with safe_open(path, framework="pt", backend="pread") as opened:
            dtype: torch.dtype = opened.get_slice(name)[:0].dtype if opened.get_slice(name).get_shape() else torch.int64
        if dtype.is_floating_point:
            return dtype
    return torch.get_default_dtype()
