"""Checkpoints that compressed-tensors up to 0.14 wrote in its formats ``sparse-24-bitmask`` and ``sparse-bitmask``.

Later releases have neither, and current transformers and vLLM refuse them. Of a weight W of shape [..., cols] the files
hold four tensors in place of ``NAME.weight``, or ``NAME.weight.*`` in those of the oldest releases:

| tensor             | content                                                                                      |
|--------------------|----------------------------------------------------------------------------------------------|
| `NAME.shape`       | int64, the shape of W: [dims] or [dims, 1]                                                    |
| `NAME.bitmask`     | uint8 [..., ceil(cols / 8)]; bit i of byte j is column 8j + i, 1 = stored                      |
| `NAME.compressed`  | the stored weights in memory order, [stored]; [rows, cols / 2] in `sparse-24-bitmask`          |
| `NAME.row_offsets` | `sparse-bitmask` alone: int64 [...], stored weights before each row (of a matrix)              |

`sparse-24-bitmask` stores two of every four weights in memory order, zeros among them, so that its bits are the mask.
`sparse-bitmask` stores what is not zero, so that its bits are no more than the zeros of a dense file: the mask is what
:func:`~trisparse.sparsity.foreign.recover.zero_pattern` makes of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trisparse.sparsity.checkpoint import CheckpointError
from trisparse.sparsity.checkpoint.files import CONFIG_FILE
from trisparse.sparsity.foreign.architecture import dense_architecture, filled_model
from trisparse.sparsity.foreign.recover import nm_pattern, zero_pattern
from trisparse.sparsity.foreign.tensor_files import TensorFiles, read_config
from trisparse.sparsity.mask import Mask, attach, to_matrix
from trisparse.sparsity.pattern import Pattern, Unstructured
from trisparse.sparsity.targets import Target, find_targets

TWO_FOUR, BITMASK = "sparse-24-bitmask", "sparse-bitmask"
_PARTS = ("shape", "bitmask", "compressed", "row_offsets")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sparse_format(folder: str | Path) -> str | None:
    """The sparse format that the ``config.json`` of ``folder`` names, or None: dense, or not of compressed-tensors.

    Raises:
        CheckpointError: the weights are quantized, or the format is unknown, or ``config.json`` is damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        return None
    content = read_config(folder)
    stored = content.get("quantization_config", content.get("compression_config"))
    if not isinstance(stored, dict) or not isinstance(sparsity := stored.get("sparsity_config"), dict):
        return None
    if stored.get("config_groups"):
        raise CheckpointError(f"{folder} is quantized by compressed-tensors: only its unquantized formats are read")
    if (found := sparsity.get("format", "dense")) == "dense":
        return None
    if found not in (TWO_FOUR, BITMASK):
        raise CheckpointError(
            f"{folder} is in the format {found!r} of compressed-tensors: {TWO_FOUR} and {BITMASK} are read"
        )
    return str(found)


def load_compressed_tensors(folder: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load such a checkpoint as a dense model with its masks.

    Args:
        folder: a local folder.
        dtype: of the model; None keeps that of the file.

    Returns:
        The model, in eval mode. Masks are on the weights that can be pruned (Linear, Conv, Conv1D, fused experts).

    Raises:
        CheckpointError: the folder is damaged, is no such checkpoint, or transformers does not know the architecture.
    """
    folder = Path(folder)
    named = sparse_format(folder)
    if named is None:
        raise CheckpointError(
            f"{folder} is no sparse checkpoint of compressed-tensors: its config.json says nothing of it"
        )
    weights: dict[str, Tensor] = {}
    bits: dict[str, Tensor] = {}
    with TensorFiles(folder) as files:
        for name, parts in grouped(files).items():
            if parts:
                weights[name], bits[name] = decompressed(files, name, parts, named)
            else:
                weights[name] = files.read(name)
    model_class, config = dense_architecture(folder, len(weights))
    model = filled_model(model_class, config, weights, dtype or "auto", folder)
    targets = {target.name: target for target in find_targets(model, include="*").found}
    own = dict(model.named_parameters())
    if any(name not in own or own[name].shape != keep.shape for name, keep in bits.items()):
        # transformers renames weights and stacks experts as it loads them: here it does the same to the masks.
        everything = {
            name: bits.get(name, torch.ones(weight.shape)).to(torch.bfloat16) for name, weight in weights.items()
        }
        kept = filled_model(model_class, config, everything, torch.bfloat16, folder)
        bits = {name: kept.get_parameter(name) != 0 for name in targets}
    for name, target in targets.items():
        if name in bits and (mask := _mask(target, bits[name], named)) is not None:
            attach(target.module, target.param, mask, zero=False)
    model.eval()
    return model


def grouped(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The weights that the tensors ``names`` make up: of a compressed one the tensor of each part, of others nothing.

    Raises:
        CheckpointError: a weight is there twice, or lacks a part.
    """
    names = list(names)
    bases = {name.removesuffix(".bitmask") for name in names if name.endswith(".bitmask")}
    found: dict[str, dict[str, str]] = {}
    plain = []
    for name in names:
        base, _, part = name.rpartition(".")
        if part in _PARTS and base in bases:
            parts = found.setdefault(f"{base.removesuffix('.weight')}.weight", {})
            if part in parts:
                raise CheckpointError(f"the checkpoint is damaged: {name} and {parts[part]} are of one weight")
            parts[part] = name
        else:
            plain.append(name)
    for weight, parts in found.items():
        if lacking := {"shape", "bitmask", "compressed"} - parts.keys():
            raise CheckpointError(f"the checkpoint is damaged: {weight} lacks {', '.join(sorted(lacking))}")
    if twice := [name for name in plain if name in found]:
        raise CheckpointError(f"the checkpoint is damaged: {twice[0]} is there dense and compressed")
    return found | {name: {} for name in plain}


def decompressed(files: TensorFiles, weight: str, parts: Mapping[str, str], named: str) -> tuple[Tensor, Tensor]:
    """A compressed weight and its bits (bool, True = stored), both of the weight's shape.

    Args:
        files: of the checkpoint.
        weight: its name, for errors.
        parts: the tensor of each part.
        named: the format.

    Raises:
        CheckpointError: the tensors do not fit each other, or the format.
    """
    read = {part: files.read(name) for part, name in parts.items()}
    values, bitmask, sizes = read["compressed"], read["bitmask"], read["shape"]

    def check(holds: bool, part: str, what: str) -> None:
        if not holds:
            raise CheckpointError(f"{files.stored[parts[part]].file} is damaged: {parts[part]} of {weight} {what}")

    check(
        sizes.dtype in (torch.int32, torch.int64) and sizes.dim() in (1, 2) and 1 <= sizes.numel() <= 8
        and (sizes.dim() == 1 or sizes.shape[1] == 1),
        "shape",
        f"is {sizes.dtype} {tuple(sizes.shape)} and no shape",
    )  # fmt: skip
    shape = [int(size) for size in sizes.flatten()]
    check(min(shape) >= 1, "shape", f"says {shape}")
    expected = (*shape[:-1], -(-shape[-1] // 8))
    check(
        bitmask.dtype == torch.uint8 and tuple(bitmask.shape) == expected,
        "bitmask",
        f"is {bitmask.dtype} {tuple(bitmask.shape)} and not the bits of {shape}",
    )
    check(values.dtype in _DTYPES, "compressed", f"has dtype {values.dtype}")
    unpacked = np.unpackbits(bitmask.numpy(), axis=-1, bitorder="little")
    check(not unpacked[..., shape[-1] :].any(), "bitmask", "has bits beyond the last column")
    keep = torch.from_numpy(np.ascontiguousarray(unpacked[..., : shape[-1]])).view(torch.bool)
    stored = int(keep.count_nonzero())
    check(values.numel() == stored, "compressed", f"holds {values.numel():,} weights, and its bits {stored:,}")
    if named == TWO_FOUR:
        check("row_offsets" not in parts, "bitmask", f"is with row_offsets, which {TWO_FOUR} has not")
        two_each = keep.numel() % 4 == 0 and bool((keep.reshape(-1, 4).sum(1, dtype=torch.uint8) == 2).all())
        check(two_each, "bitmask", "does not keep two of every four weights")
    else:
        check("row_offsets" in parts, "bitmask", f"is without row_offsets, which {BITMASK} has")
        offsets, counts = read["row_offsets"], keep.sum(-1)
        fits = offsets.dtype == torch.int64 and torch.equal(offsets, counts.cumsum(0) - counts)
        check(fits, "row_offsets", "does not say where the rows of its bits begin")
    dense = values.new_zeros(shape)
    dense[keep] = values.reshape(-1)
    return dense, keep


def _mask(target: Target, keep: Tensor, named: str) -> Mask | None:
    matrix = to_matrix(keep, target.cols, transposed=target.transposed)
    pattern: Pattern | None
    if named == BITMASK:
        pattern, matrix, _ = zero_pattern(matrix)
    elif matrix.all():
        return None
    else:
        pattern = nm_pattern(matrix) or Unstructured(1 - int(matrix.count_nonzero()) / matrix.numel(), scope="layer")
    if pattern is None:
        return None
    return Mask.from_matrix(matrix, target.weight.shape, pattern, transposed=target.transposed)
