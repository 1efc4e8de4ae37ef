"""torch's own 2:4 tensors: packed weights and metadata as ``torch.sparse.to_sparse_semi_structured`` makes them.

torch packs CUDA tensors alone, and its tensor class is stored by pickle alone. But the packing of its CUTLASS backend
is plain Python that runs anywhere, and gives two ordinary tensors, which safetensors hold: of a weight [rows, cols]

    NAME.packed   [rows, cols / 2], the kept weights, two of every four
    NAME.meta     int16 [rows, cols / 16], their places, 2 bits each, reordered as CUTLASS' sparse kernels read them

The layout is torch's (2.13 was tested; torch calls it a prototype). cuSPARSELt's layout cannot be made without a GPU.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import PreTrainedModel

from trisparse.sparsity.checkpoint import CheckpointError, check_output, replaced_folder
from trisparse.sparsity.checkpoint.files import INDEX_FILE, read_json
from trisparse.sparsity.checkpoint.headers import weight_files
from trisparse.sparsity.foreign.architecture import dense_architecture, filled_model
from trisparse.sparsity.foreign.export import copy_alongside, save_dense
from trisparse.sparsity.foreign.tensor_files import TensorFiles
from trisparse.sparsity.mask import Mask, check_masks, masks

_INFO = "semi_structured.json"
_ROWS, _COLS = 32, 64  # torch's multiples for fp16 and bf16 (_DTYPE_SHAPE_CONSTRAINTS of the CUTLASS class)
_DTYPES = (torch.float16, torch.bfloat16)


def save_semi_structured(
    model: PreTrainedModel, out: str | Path, *, source: str | Path | None = None
) -> dict[str, str]:
    """Write ``model`` to the new folder ``out``, every weight that torch's 2:4 kernels take in their form.

    Args:
        model: dense, with its masks; fp16 or bf16.
        out: a new or empty folder. It gets ``config.json`` and ``semi_structured*.safetensors``.
        source: a folder whose tokenizer is copied.

    Returns:
        Each masked weight that stays dense, and why.

    Raises:
        ValueError: no weight can be packed (the reasons are named), or ``out`` is taken.
        MaskError: a pruned weight is not zero.
    """
    check_output(out)
    check_masks(model)
    dense = {name: reason for name, mask in masks(model).items() if (reason := _reason(model, name, mask))}
    packed = masks(model).keys() - dense.keys()
    if not packed:
        reasons = sorted(set(dense.values())) or ["the model has no masks"]
        raise ValueError(f"no weight can be written as a semi-structured one: {'; '.join(reasons)}")
    with replaced_folder(Path(out)) as unfinished:
        save_dense(model, unfinished)
        if source is not None:
            copy_alongside(Path(source), unfinished)
        shards = weight_files(unfinished)
        with TensorFiles(unfinished) as files:
            for number, file in enumerate(shards):
                shard: dict[str, Tensor] = {}
                for name in (name for name in files if files.stored[name].file == file):
                    shard |= _packed(name, files.read(name)) if name in packed else {name: files.read(name)}
                save_file(shard, unfinished / _shard(number), metadata={"format": "pt"})
        for file in (*shards, unfinished / INDEX_FILE):
            file.unlink(missing_ok=True)
        info = {"layout": "cutlass", "torch": torch.__version__, "shards": len(shards), "packed": sorted(packed)}
        (unfinished / _INFO).write_text(json.dumps(info, indent=2) + "\n")
    return dense


def load_semi_structured(folder: str | Path, device: torch.device | str | None = None) -> PreTrainedModel:
    """Load what :func:`save_semi_structured` wrote.

    Args:
        folder: a local folder.
        device: on a CUDA device the packed weights become torch's ``SparseSemiStructuredTensorCUTLASS``, and its sparse
            kernels run them; on others, which have no such kernels, they are unpacked by torch's own routine.
            By default CUDA where there is one.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: the folder is damaged, or is none of these.
    """
    folder = Path(folder)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        info = read_json(folder / _INFO)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no semi-structured weights: it has no {_INFO}") from None
    shards, names = info.get("shards"), info.get("packed")
    if not isinstance(names, list) or type(shards) is not int or not 1 <= shards <= 10_000:
        raise CheckpointError(f"{folder / _INFO} is damaged: it lacks the number of shards or the packed weights")
    weights: dict[str, Tensor] = {}
    packed: dict[str, tuple[Tensor, Tensor]] = {}
    with TensorFiles(folder, [folder / _shard(number) for number in range(shards)]) as files:
        for name in map(str, names):
            parts = [f"{name}.packed", f"{name}.meta"]
            if name in files or not all(part in files for part in parts):
                raise CheckpointError(f"{folder} is damaged: {name} should be there as {parts[0]} and {parts[1]}")
            packed[name] = (files.read(parts[0]), files.read(parts[1]))
            weights[name] = _unpacked(files.stored[parts[0]].file, name, *packed[name])
        parts_of_packed = {f"{name}.{part}" for name in packed for part in ("packed", "meta")}
        weights |= {name: files.read(name) for name in files if name not in parts_of_packed}
    model_class, config = dense_architecture(folder, len(weights))
    model: PreTrainedModel = filled_model(model_class, config, weights, "auto", folder).eval().to(where)
    if where.type == "cuda":
        for name, (values, meta) in packed.items():
            sparse = sparse_tensor(values.to(where), meta.to(where))
            owner, _, param = name.rpartition(".")
            model.get_submodule(owner).register_parameter(param, nn.Parameter(sparse, requires_grad=False))
    return model


def sparse_tensor(packed: Tensor, meta: Tensor) -> Tensor:
    """torch's semi-structured tensor [rows, cols] of a packed weight and its metadata, without copying them."""
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        made: Any = SparseSemiStructuredTensorCUTLASS
        tensor: Tensor = made(shape, packed, meta, None, None, None)
    return tensor


def _packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    values, meta = sparse_semi_structured_from_dense_cutlass(weight.contiguous())
    return {f"{name}.packed": values.contiguous(), f"{name}.meta": meta.contiguous()}


def _shard(number: int) -> str:
    # Not model.safetensors, in which from_pretrained would miss these weights and draw them at random.
    return f"semi_structured-{number:05d}.safetensors"


def _unpacked(file: Path, name: str, packed: Tensor, meta: Tensor) -> Tensor:
    fits = packed.dim() == 2 and packed.dtype in _DTYPES and meta.dtype == torch.int16
    if not fits or packed.shape[0] % _ROWS or 2 * packed.shape[1] % _COLS or 0 in packed.shape:
        raise CheckpointError(f"{file} is damaged: {name}.packed is {packed.dtype} {tuple(packed.shape)}")
    if tuple(meta.shape) != (packed.shape[0], packed.shape[1] // 8):
        raise CheckpointError(f"{file} is damaged: {name}.meta is {meta.dtype} {tuple(meta.shape)}")
    # Two bits are a place in 0..3 whatever they are, so that what is left to check is that the two of a group differ.
    groups = (meta.to(torch.int32)[:, :, None] >> torch.arange(0, 16, 4)) & 15
    if bool(((groups & 3) >= (groups >> 2)).any()):
        raise CheckpointError(f"{file} is damaged: {name}.meta does not name two ascending places in every group")
    dense: Tensor = sparse_semi_structured_to_dense_cutlass(packed, meta)
    return dense


def _reason(model: nn.Module, name: str, mask: Mask) -> str:
    """Why the weight ``name`` cannot be packed, or ""."""
    owner, _, param = name.rpartition(".")
    layer = model.get_submodule(owner)
    weight = layer.get_parameter(param)
    rows, cols = mask.shape.numel() // mask.cols, mask.cols
    if not isinstance(layer, nn.Linear) or param != "weight":
        return f"a {type(layer).__name__} is none of the layers whose weight torch takes as such"
    if cols % 4 or bool((mask.matrix().reshape(-1, 4).sum(1, dtype=torch.uint8) > 2).any()):
        return f"the pattern {mask.pattern} keeps more than two of four neighbours"
    if weight.dtype not in _DTYPES:
        return f"{weight.dtype} has no 2:4 kernels in torch: choose float16 or bfloat16"
    if rows % _ROWS or cols % _COLS:
        return f"torch needs multiples of {_ROWS} rows and {_COLS} columns, and it is {rows}×{cols}"
    return ""
