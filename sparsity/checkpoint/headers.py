"""Which tensors the safetensors files of a checkpoint hold: their headers, read and checked before any data.

The format: 8 bytes, little endian, the length of the header; the header, JSON of name to dtype, shape and the range of
its bytes; then the data, which the ranges cover without gaps and without overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trisparse.sparsity.checkpoint.files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    check_regular,
    parse_json,
    read_json,
)

_MAX_HEADER_BYTES = 100_000_000  # as in safetensors itself
_MAX_DIMENSIONS = 16
# The dtypes that a pruned model may have; others are left to transformers.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()} | {
    **{"U64": 8, "U32": 4, "U16": 2, "C64": 8},
    **{"F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its name there, its dtype (None where it is none of torch's usual ones), its shape and the
    byte of the file that it begins at.
    """

    file: Path
    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own: what was checked in it cannot change with the file.

        Raises:
            CheckpointError: the file is shorter than its header says, or the dtype is unknown.
        """
        if self.dtype is None:
            raise CheckpointError(f"{self.file} is damaged at {self.name}: its dtype is unknown")
        read = torch.empty(self.shape, dtype=self.dtype)
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.begin)
                count = stream.readinto(read.reshape(-1).view(torch.uint8).numpy().data) if read.numel() else 0
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}") from error
        if count != read.nbytes:
            raise CheckpointError(f"{self.file} is damaged at {self.name}: it ends too early")
        return read


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor in ``files`` by name.

    Raises:
        CheckpointError: a file is missing or damaged, or two hold the same name.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in found:
                raise CheckpointError(f"{file} and {found[name].file.name} both hold {name}")
            found[name] = tensor
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of the model in ``folder``: one, or the shards that the index names.

    One that is there comes first, as transformers has it: it saves into a folder without removing an earlier index.

    Raises:
        CheckpointError: the index is damaged, or names a file that is not in the folder itself.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    try:
        index = read_json(folder / INDEX_FILE)
    except FileNotFoundError:
        return [folder / WEIGHTS_FILE]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE} is damaged: it has no weight_map")
    shards = set()
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or "\\" in shard
            or not shard.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{folder / INDEX_FILE} puts {name[:200]} in {str(shard)[:200]!r}, which is no safetensors file of the "
                "folder"
            )
        shards.add(shard)
    return [folder / shard for shard in sorted(shards)]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    check_regular(file)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size - 8
            if not 2 <= length <= min(size, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} cannot be read: its header of {length} bytes does not fit the file")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if text[:1] != b"{":
        raise CheckpointError(f"{file} cannot be read: its header is no JSON object")
    header = parse_json(text, file)
    header.pop("__metadata__", None)
    found, ranges = {}, []
    for name, entry in header.items():
        tensor, begin, end = _read_entry(file, name, entry, 8 + length)
        found[name] = tensor
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise CheckpointError(f"{file} is damaged at {name}: its bytes begin at {begin} and not at {position}")
        position = end
    if position != size - length:
        raise CheckpointError(f"{file} is damaged: it holds {size - length} bytes of tensors and not {position}")
    return found


def _read_entry(file: Path, name: str, entry: Any, data: int) -> tuple[StoredTensor, int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file} is damaged at {name[:200]}: {str(entry)[:200]} describes no tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{file} is damaged at {name[:200]}: {str(entry)[:200]} describes no tensor")
    size = 1
    for count in shape:
        size *= count
    if not isinstance(dtype, str) or (dtype in _BYTES and size * _BYTES[dtype] != offsets[1] - offsets[0]):
        raise CheckpointError(f"{file} is damaged at {name[:200]}: {str(entry)[:200]} does not fit its bytes")
    return StoredTensor(file, name, _DTYPES.get(dtype), tuple(shape), data + offsets[0]), offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
