"""``trisparse bench run linear``: a linear layer, dense by torch, against every backend that can run it compressed.

| direction                | what is timed                                           | FLOPs (dense equivalent) |
|--------------------------|---------------------------------------------------------|--------------------------|
| ``forward``              | y = x Wᵀ, with ``rank`` above 0 + s (x Aᵀ) Bᵀ           | 2 tokens rows cols       |
| ``LoRA training``        | the same and the gradients of x, A and B                | 4 tokens rows cols       |
| ``masked LoRA training`` | y = x (W + M ⊙ s B A)ᵀ and the gradients of x, A and B  | 6 tokens rows cols       |

x [tokens, cols], W [rows, cols] pruned by magnitude, its mask M, A [rank, cols], B [rows, rank]. Contestants are named
as the backends in sparsity/backends.py; "dense" is torch's product with the masked weight (cuBLAS on a GPU), which for
masked LoRA forms W + M ⊙ s B A and leaves the rest to autograd, as PERP's own code does. "mask_lora" is
kernels/masked_lora.py on the dense weight, "compressed" there retrain/masked_product.py on the compressed layer.

Bytes are those of the *dense* weight, x and y (and in training dy and dx), each once, so that FLOP/s, GB/s and the
share of the roofline have one scale for all contestants: a compressed weight may pass the dense roofline, above 1.
``weight_bytes`` is what each contestant holds of the weight. A result is right by the rule of families/accuracy.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trisparse.bench.families.accuracy import Expected, Results, check, expected, wider
from trisparse.bench.families.models import layer_shapes
from trisparse.bench.registry import Case, Options, benchmark
from trisparse.kernels.masked_lora import mask_lora, mask_lora_ref
from trisparse.retrain.masked_product import masked_product
from trisparse.sparsity.backends import BACKENDS, Plan, candidates
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.pattern import parse_pattern
from trisparse.sparsity.sparsify import sparsify

MODELS: dict[str, tuple[tuple[int, int], ...]] = {
    "Llama-2-7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "Llama-2-13B": ((5120, 5120), (13824, 5120), (5120, 13824)),
    "Llama-2-70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "OPT-125m": ((768, 768), (3072, 768), (768, 3072)),
    "OPT-6.7B": ((4096, 4096), (16384, 4096), (4096, 16384)),
    "OPT-13B": ((5120, 5120), (20480, 5120), (5120, 20480)),
}
QUICK_MODELS: dict[str, tuple[tuple[int, int], ...]] = {
    "SmolLM2-135M": ((576, 576), (1536, 576), (576, 1536)),
    "Llama-3.2-1B": ((2048, 2048),),
}
TOKENS, QUICK_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192), (1, 16, 256)
PATTERNS, QUICK_PATTERNS = ("2:4", "4:8", "50%"), ("2:4", "50%")
TRAINING_TOKENS = 128  # training has at least so many
RANK, SCALE = 16, 2.0

Direction = Literal["forward", "LoRA training", "masked LoRA training"]
Contestants = tuple[dict[str, Callable[[], Results]], Callable[[], Expected]]
_PRODUCTS: dict[Direction, int] = {"forward": 1, "LoRA training": 2, "masked LoRA training": 3}


class Weights:
    """A random weight pruned to ``pattern``, in every form that some backend reads.

    Attributes:
        dense: [rows, cols], zero where pruned.
        rows, fragments: compressed, in the two layouts of sparsity/linear.py.
    """

    def __init__(self, shape: tuple[int, int], pattern: str, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        layer = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(self.normal(*shape, seed=0))
        sparsify(layer, parse_pattern(pattern), "magnitude", include="weight", progress=False)
        self.dense = layer.weight.detach()
        self.rows = self._compressed(layer)
        self._layer = layer

    @cached_property
    def packed(self) -> Tensor:
        """The mask, packed."""
        return self.rows.compressed().packed

    @cached_property
    def fragments(self) -> SparseLinear:
        """In the order of the sparse tensor cores."""
        made = self._compressed(self._layer)
        made.adopt(Plan("fragments", ((None, "mma.sp"),)))
        return made

    @staticmethod
    def _compressed(layer: nn.Linear) -> SparseLinear:
        return SparseLinear.from_dense(layer, plan=Plan("rows", ((None, "compressed"),)))

    def normal(self, *size: int, seed: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the weight's dtype."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*size, generator=generator, device=self.device).mul_(scale).to(self.dtype)

    def backends(self, rank: int, *, backward: bool) -> dict[str, SparseLinear]:
        """Each backend that can run here, besides "dense", with the layer in the layout and with the copy it needs."""
        found = {}
        for name, why in candidates(self.rows, rank).items():
            if why is None and name != "dense" and (BACKENDS[name].backward or not backward):
                found[name] = self.fragments if BACKENDS[name].layout == "fragments" else self.rows
        if "semi-structured" in found and self.rows.semi_structured is None:
            self.rows.adopt(Plan("rows", ((0, "semi-structured"), (None, "compressed"))))
        return found


def forward_case(weights: Weights, tokens: int, rank: int) -> Contestants:
    """(contestants, reference) of y; all are given the same x, A and B."""
    x = weights.normal(tokens, weights.shape[1], seed=1)
    lora = _adapter(weights, rank) if rank else None

    def dense(x: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor, float] | None) -> Results:
        y = F.linear(x, weight)
        return (y if lora is None else y + lora[2] * F.linear(F.linear(x, lora[0]), lora[1]),)

    def backend(name: str, layer: SparseLinear) -> Results:
        return (BACKENDS[name].run(layer, x, lora),)

    usual = _without_gradient(partial(dense, x, weights.dense, lora))
    runs = {"dense": usual}
    for name, layer in weights.backends(rank, backward=False).items():
        runs[name] = _without_gradient(partial(backend, name, layer))
    wide = wider(weights.dtype, weights.device)

    def reference() -> Expected:
        wide_lora = None if lora is None else (lora[0].to(wide), lora[1].to(wide), lora[2])
        with torch.no_grad():
            return expected(dense(x.to(wide), weights.dense.to(wide), wide_lora), usual())

    return runs, reference


def training_case(weights: Weights, tokens: int, rank: int, *, masked: bool) -> Contestants:
    """(contestants, reference) of y and the gradients of x, A and B, for plain or masked LoRA."""
    rows, cols = weights.shape
    a, b, scale = _adapter(weights, rank)
    inputs = (weights.normal(tokens, cols, seed=1), a, b)
    dy = weights.normal(tokens, rows, seed=4)
    keep = weights.dense.new_tensor(1).where(weights.rows.mask.dense().to(weights.device), 0)

    def plain(weight: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, weight) + scale * F.linear(F.linear(x, a), b)

    def materialised(weight: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, weight + scale * (keep * (b @ a)))

    def by_kernel(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return mask_lora(x, weights.dense, weights.packed, a, b, scale=scale)

    def under_mask(layer: SparseLinear, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return masked_product(x, layer, a, scale * b)

    def backend(name: str, layer: SparseLinear, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return BACKENDS[name].run(layer, x, (a, b, scale))

    usual = _with_gradients(partial(materialised if masked else plain, weights.dense), inputs, dy)
    runs = {"dense": usual}
    if masked:
        runs["mask_lora"] = _with_gradients(by_kernel, inputs, dy)
        runs["compressed"] = _with_gradients(partial(under_mask, weights.rows), inputs, dy)
    else:
        for name, layer in weights.backends(rank, backward=True).items():
            runs[name] = _with_gradients(partial(backend, name, layer), inputs, dy)
    wide = wider(weights.dtype, weights.device)

    def exact(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        weight = weights.dense.to(wide)
        return mask_lora_ref(x, weight, weights.packed, a, b, scale=scale) if masked else plain(weight, x, a, b)

    def reference() -> Expected:
        run = _with_gradients(exact, tuple(tensor.to(wide) for tensor in inputs), dy.to(wide))
        return expected(run(), usual())

    return runs, reference


def _adapter(weights: Weights, rank: int) -> tuple[Tensor, Tensor, float]:
    rows, cols = weights.shape
    return weights.normal(rank, cols, seed=2, scale=0.05), weights.normal(rows, rank, seed=3, scale=0.05), SCALE


def _without_gradient(run: Callable[[], Results]) -> Callable[[], Results]:
    def call() -> Results:
        with torch.no_grad():
            return run()

    return call


def _with_gradients(product: Callable[..., Tensor], inputs: Results, dy: Tensor) -> Callable[[], Results]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def call() -> Results:
        y = product(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    return call


def kinds(tokens: int) -> Iterator[tuple[Direction, int]]:
    """(direction, rank) of every case with so many tokens."""
    yield "forward", 0
    yield "forward", RANK
    if tokens >= TRAINING_TOKENS:
        yield "LoRA training", RANK
        yield "masked LoRA training", RANK


def case(
    weights: Weights, pattern: str, tokens: int, direction: Direction, rank: int, models: str, repeats: int
) -> Case:
    """The case of one weight, direction, number of tokens and rank."""
    (rows, cols), size = weights.shape, weights.dtype.itemsize
    if direction == "forward":
        runs, reference = forward_case(weights, tokens, rank)
    else:
        runs, reference = training_case(weights, tokens, rank, masked=direction == "masked LoRA training")
    dtype = str(weights.dtype).removeprefix("torch.")
    passes = 1 if direction == "forward" else 2  # x and y, and in training dx and dy
    moved = rows * cols + passes * (tokens * (rows + cols) + rank * (rows + cols))
    dense_bytes = float(weights.dense.nbytes)
    held = {name: float(weights.rows.compressed().bytes) for name in runs}
    held["dense"] = dense_bytes
    if "mask_lora" in held:
        held["mask_lora"] = dense_bytes + weights.packed.nbytes
    return Case(
        name=case_name(direction, (rows, cols), pattern, tokens, rank, dtype),
        parameters={
            "direction": direction,
            "rows": rows,
            "cols": cols,
            "pattern": pattern,
            "tokens": tokens,
            "rank": rank,
            "dtype": dtype,
            "models": models,
        },
        contestants=runs,
        reference=reference,
        check=check,
        baseline="dense",
        bytes=size * moved,
        flops=2 * tokens * rows * cols * _PRODUCTS[direction],
        peak=dtype,
        repeats=repeats,
        metrics={name: {"weight_bytes": bytes} for name, bytes in held.items()},
        tokens=tokens,
    )


def case_name(direction: str, shape: tuple[int, int], pattern: str, tokens: int, rank: int, dtype: str) -> str:
    """As rows and ``--only`` have it."""
    adapter = f", rank {rank}" if rank else ""
    return f"{direction} {shape[0]}x{shape[1]} {pattern}, {tokens} tokens{adapter}, {dtype}"


@benchmark(
    "linear",
    "dense against compressed linear layers: 1 to 8192 tokens, with and without LoRA, training too",
    devices=("cpu", "cuda"),
    takes=("dtype", "model", "repeats"),
)
def linear(options: Options) -> Iterator[Case]:
    """All shapes of the models above; ``--quick`` those of small ones, ``--model`` those of its layers."""
    table = QUICK_MODELS if options.quick else MODELS
    if options.model is not None:
        table = {options.model: layer_shapes(options.model)}
    dtype = options.dtype or (torch.bfloat16 if options.device.type == "cuda" else torch.float32)
    repeats = options.repeats or (5 if options.quick else 20)
    name = str(dtype).removeprefix("torch.")
    for shape in dict.fromkeys(shape for shapes in table.values() for shape in shapes):
        models = ", ".join(model for model, shapes in table.items() if shape in shapes)
        for pattern in QUICK_PATTERNS if options.quick else PATTERNS:
            weights: Weights | None = None  # made for the first case that runs
            for tokens in QUICK_TOKENS if options.quick else TOKENS:
                for direction, rank in kinds(tokens):
                    if options.only not in case_name(direction, shape, pattern, tokens, rank, name):
                        continue
                    weights = weights or Weights(shape, pattern, dtype, options.device)
                    yield case(weights, pattern, tokens, direction, rank, models=models, repeats=repeats)
