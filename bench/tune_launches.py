"""Which launch configuration of the compressed linear layers is fastest on this GPU, by shape and token count.

What is found is kept (kernels/tuned.py), and every later launch of that kind takes it instead of the computed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from trisparse.kernels import linear24, linear_config
from trisparse.kernels.launch import target
from trisparse.kernels.linear import linear, linear_backward
from trisparse.kernels.tuned import bucket, keep, recall, trying
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.tuning import MARGIN, time_in_turn

Timer = Callable[[dict[str, Callable[[], Any]], torch.device, int], dict[str, float]]


def tune_launches(
    layers: Iterable[SparseLinear],
    *,
    tokens: Sequence[int],
    ranks: Sequence[int] = (0,),
    again: bool = False,
    repeats: int = 10,
    timer: Timer = time_in_turn,
) -> list[dict[str, Any]]:
    """Measure the configurations of every kernel that runs ``layers``; one row for each kernel and case.

    A configuration replaces the computed one if it is faster by more than 2%, and its result is compared with that of
    the computed one before it is timed. One that the device has no room for is passed over.

    Raises:
        RuntimeError: two configurations give results that differ.
    """
    rows = []
    for layer in layers:
        for rank in ranks:
            for count in sorted({bucket(count) for count in tokens}):
                for operation, name, run, configs in _cases(layer, count, rank):
                    device = layer.values.device
                    if not again and recall(device, "configs", f"{operation} {name}") is not None:
                        continue
                    rows.append(_fastest(device, operation, name, run, configs, repeats, timer))
    return rows


def _cases(
    layer: SparseLinear, tokens: int, rank: int
) -> Iterable[tuple[str, str, Callable[[], Any], list[dict[str, Any]]]]:
    """(operation, key, launch, configurations) of the forward, of dx, and of the sparse tensor cores."""
    device, dtype = layer.values.device, layer.values.dtype
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    out, inputs = layer.out_features, layer.in_features
    lora = (normal(rank, inputs), normal(out, rank), 1.0) if rank else None
    weight = layer.compressed()
    x, dy = normal(tokens, inputs), normal(tokens, out)
    cc = target(x)
    runs: list[tuple[bool, Callable[[], Any]]] = [
        (False, lambda: linear(x, weight, None, lora)),
        (True, lambda: linear_backward(dy, weight, lora)[0]),
    ]
    for backward, run in runs:
        case: dict[str, Any] = {"format": layer.format, "rank": rank, "backward": backward}
        name = linear_config.key(weight.shape, dtype, tokens, **case)
        configs = linear_config.alternatives(weight.shape, dtype, cc, tokens, **case)
        yield "linear", name, run, [asdict(config) for config in configs]
    if layer.format == "2:4" and dtype in linear24.DTYPES and out % 16 == 0 and inputs % 64 == 0 and cc >= 80:
        packed = linear24.pack24(weight.values, weight.meta)
        name = linear24.key(out, inputs, dtype, tokens, rank)
        tiles = linear24.alternatives(out, inputs, tokens, rank, cc)
        yield "linear24", name, lambda: linear24.linear24(x, *packed, None, lora), [asdict(tile) for tile in tiles]


def _fastest(
    device: torch.device,
    operation: str,
    key: str,
    run: Callable[[], Any],
    configs: list[dict[str, Any]],
    repeats: int,
    timer: Timer,
) -> dict[str, Any]:
    from triton.errors import TritonError

    def with_config(config: dict[str, Any]) -> Any:
        with trying(operation, config):
            return run()

    runs: dict[str, Callable[[], Any]] = {}
    expected = with_config(configs[0])  # the computed one must run
    scale = float(expected.abs().max())
    for place, config in enumerate(configs):
        try:
            difference = float((with_config(config).float() - expected.float()).abs().max())
        except TritonError:  # no room for it on this device, or a compiler that refuses it
            continue
        # Another order of the same fp32 sums, each rounded once.
        if not difference <= 2 * torch.finfo(expected.dtype).eps * scale:
            raise RuntimeError(f"{operation} {key}: {config} gives a result that differs by {difference:.1e}")
        runs[str(place)] = lambda config=config: with_config(config)  # type: ignore[misc]
    seconds = timer(runs, device, repeats)
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] > (1 - MARGIN) * seconds["0"]:
        best = "0"
    keep(device, "configs", f"{operation} {key}", configs[int(best)])
    return {
        "kernel": operation,
        "case": key,
        "tried": len(runs),
        "computed_seconds": seconds["0"],
        "seconds": seconds[best],
        "config": configs[int(best)],
    }
