"""What mask_lora and scale_lora ask of an A100, counted from their PTX: bounds, not measurements.

Each launch runs under emulation of its PTX on a few of its programs, and is scaled to the whole. Bytes are the distinct
ones of each launch; the partial sums of dA and dB count twice, as one launch writes and the next one reads them.

``over_compulsory`` is, for the gradients of A and B (three launches), their bytes over x + dy + W + A + B + dA + dB;
for a product over its own operands and result. ``over_read`` of the gradients leaves W out where only the mask is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trisparse.bench.bounds.record import Study, bounded, figures
from trisparse.bench.registry import Measured
from trisparse.kernels import masked_lora
from trisparse.kernels.launch import Emulator, ptxsim, using

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (512, 2048)
_PARTS = ("forward", "dx", "dA, dB")


def bound(variant: str, tokens: int, out: int, inputs: int, rank: int = 16) -> dict[str, Any]:
    """Bytes and bounds of "mask" or "scale": the forward product, dx, and the gradients of A and B; bf16."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, dtype=torch.bfloat16)

    x, dy, weight, a = normal(tokens, inputs), normal(tokens, out), normal(out, inputs), normal(rank, inputs)
    b = normal(out, rank)
    packed = torch.full((out, -(-inputs // 8)), 0x5A, dtype=torch.uint8) if variant == "mask" else None
    small = 2 * (a.numel() + b.numel())
    w_bytes, mask_bytes = 2 * weight.numel(), 0 if packed is None else packed.numel()
    activations = 2 * (x.numel() + dy.numel())
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "forward": (
            lambda: masked_lora.PRODUCT(x, weight, packed, b, a, None, False),
            activations + w_bytes + mask_bytes + small,
        ),
        "dx": (
            lambda: masked_lora.PRODUCT(dy, weight, packed, b, a, None, True),
            activations + w_bytes + mask_bytes + small,
        ),
        "dA, dB": (
            lambda: masked_lora.FACTOR_GRADIENTS(dy, x, weight if packed is None else None, packed, b, a),
            activations + w_bytes + 2 * small,
        ),
    }
    figures: dict[str, Any] = {}
    for name, (run, compulsory) in runs.items():
        # Two neighbours: in a chain one waits for the other. What they share is counted twice, up to a buffer's size.
        emulator = Emulator(options={"ctas": [0, 1]})
        with using(emulator):
            run()
        moved = sum(p.unique_read_sector_bytes + p.unique_write_sector_bytes for _, p in emulator.profiles)
        estimates = [ptxsim().estimate(p, "A100-SXM-80GB") for _, p in emulator.profiles]
        figures[name] = {
            "bytes": round(moved),
            "over_compulsory": round(moved / compulsory, 3),
            "programs": emulator.profiles[0][1].num_ctas,
            "bound_us": round(sum(e.microseconds for e in estimates), 1),
            "binding": estimates[0].binding.resource,
            "resources_us": {b.resource: round(b.microseconds, 1) for b in estimates[0].bounds},
            "spill_bytes": sum(
                (p.static.spill_stores or 0) + (p.static.spill_loads or 0) for _, p in emulator.profiles
            ),
        }
    read = activations + 2 * small + (mask_bytes or w_bytes)
    figures["dA, dB"]["over_read"] = round(figures["dA, dB"]["bytes"] / read, 3)
    whole = activations + 2 * x.numel() + w_bytes + mask_bytes + 2 * small
    figures["whole backward over x + dy + dx + W + mask + A + B + dA + dB"] = round(
        (figures["dx"]["bytes"] + figures["dA, dB"]["bytes"]) / whole, 3
    )
    return figures


def _cases() -> Iterator[dict[str, Any]]:
    for out, inputs in SHAPES:
        for tokens in TOKENS:
            for variant in ("mask", "scale"):
                yield {"variant": variant, "out": out, "in": inputs, "tokens": tokens, "rank": 16}


def _count(case: dict[str, Any]) -> dict[str, Any]:
    return bound(case["variant"], case["tokens"], case["out"], case["in"], case["rank"])


def _names(case: Mapping[str, Any]) -> tuple[str, ...]:
    shape = f"{case['out']}x{case['in']}, {case['tokens']} tokens, rank {case['rank']}"
    return tuple(f"{case['variant']}_lora {part} {shape}" for part in _PARTS)


def _rows(row: Mapping[str, Any]) -> Iterator[Measured]:
    about = {"rows": row["out"], "cols": row["in"], "tokens": row["tokens"], "rank": row["rank"]}
    for name, part in zip(_names(row), _PARTS, strict=True):
        times = {f"{resource.lower()}_us": us for resource, us in row[part]["resources_us"].items()}
        flops = 2 * row["out"] * row["in"] * row["tokens"]  # of each part: x W^T, dy W, dy^T x
        own = figures({**times, **row[part], "flops": flops}, bytes_over_compulsory="over_compulsory")
        yield bounded(name, {**about, "part": part, "binding": row[part]["binding"]}, {f"{row['variant']}_lora": own})


STUDY = Study("masked_lora", "masked-lora-bounds-a100.json", _cases, _count, _names, _rows, {"dtype": "bfloat16"})
