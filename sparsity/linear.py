"""A linear layer whose pruned weight is stored compressed: smaller in memory and on disk, and on a GPU faster.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ        x [..., in], W [out, in], b [out]; A [rank, in] and B [out, rank] if given

The kept weights and where they stood are buffers, whose names in the ``state_dict`` are those of the checkpoint format:

| pattern                            | buffers                            | bytes of a bf16 weight at 50% |
|------------------------------------|------------------------------------|-------------------------------|
| 2:4, inputs a multiple of 16       | ``values``, ``meta``               | 0.56 of dense                 |
| any other n:m                      | ``values``, ``bitmask``            | 0.56                          |
| every other                        | ``values``, ``bitmask``, ``row_offsets`` | 0.56                    |

Their layout is that of kernels/compressed.py. In memory a 2:4 weight may be in the order of the sparse tensor cores
instead (kernels/linear24.py); a ``state_dict`` always holds the former. Which code runs is decided by
sparsity/backends.py.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trisparse.kernels.bitmask import count_bits
from trisparse.kernels.compressed import TILE, CompressedWeight, compress, places_2_4, tile_dtype, tile_offsets
from trisparse.kernels.linear24 import pack24, unpack24
from trisparse.sparsity.backends import BACKENDS, Plan, Prefer, default_plan
from trisparse.sparsity.mask import HoldsMask, Mask, attach, mask_of
from trisparse.sparsity.pattern import NM, Pattern

Layout = Literal["rows", "fragments"]
Lora = tuple[Tensor, Tensor, float]

_ASCENDING = 0x4444  # metadata of 2:4 that keeps the first two of every four


def storage_format(pattern: Pattern, in_features: int) -> tuple[str, int, int]:
    """The (format, n, m) of kernels/compressed.py that holds a weight pruned to ``pattern``."""
    if isinstance(pattern, NM) and in_features % pattern.m == 0:
        two_four = (pattern.n, pattern.m) == (2, 4) and in_features % 16 == 0
        return "2:4" if two_four else "n:m", pattern.n, pattern.m
    return "bitmask", 0, 0


class SparseLinear(nn.Module, HoldsMask):
    """A linear layer with a compressed weight, to be filled by ``load_state_dict``; `from_dense` makes one of a layer.

    The weight gets no gradient; x, the bias and the factors of an adapter do.

    Args:
        in_features, out_features: of the layer.
        pattern: what the weight was pruned to; decides the form that it is stored in.
        kept: weights that are kept; only for the patterns stored with ``row_offsets``.
        bias: whether there is one.
        kind: the class that `to_dense` gives back, ``"Linear"`` or transformers' ``"Conv1D"``.
        device, dtype: of the values; the dtype is bf16, fp16, fp32 or (on the CPU) fp64.

    Attributes:
        format, n, m: the stored form, as in kernels/compressed.py.
        layout: ``"rows"``, or ``"fragments"`` (the order of the sparse tensor cores).
        plan: which backend runs up to how many tokens.
        prefer: ``"speed"`` or ``"memory"``: what a new plan is made for when the layer moves to another device.
        tune_for: ``"speed"`` or ``"memory"``: measure at the next use outside of torch.compile, and plan for that.
        values, row_offsets, bias: as above; the last two may be None.

    Raises:
        ValueError: ``kept`` is missing, or given where the pattern decides it.
    """

    values: Tensor
    row_offsets: Tensor | None
    tile_offsets: Tensor | None
    dense: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: Pattern,
        *,
        kept: int | None = None,
        bias: bool = True,
        kind: str = "Linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        format, n, m = storage_format(pattern, in_features)
        if (kept is None) == (format == "bitmask"):
            raise ValueError(f"kept is {kept}; it must be given for pattern {pattern} if and only if it is stored "
                             f"with row offsets, and the format here is {format!r}")  # fmt: skip
        if kind not in ("Linear", "Conv1D"):
            raise ValueError(f"kind is {kind!r}; it must be 'Linear' or 'Conv1D'")
        self.in_features, self.out_features, self.pattern, self.kind = in_features, out_features, pattern, kind
        self.format, self.n, self.m = format, n, m
        self.layout: Layout = "rows"
        rows, cols = out_features, in_features
        dtype = dtype or torch.get_default_dtype()
        # On the meta device torch.zeros is many times slower than torch.empty, and there is nothing to set to zero.
        zeros = torch.empty if device is not None and torch.device(device).type == "meta" else torch.zeros
        shape = (kept,) if format == "bitmask" else (rows, cols * n // m)
        self.register_buffer("values", zeros(shape, dtype=dtype, device=device))  # type: ignore[arg-type]
        if format == "2:4":
            meta = zeros(rows, cols // 16, dtype=torch.int16, device=device)
            self.register_buffer("meta", meta if meta.is_meta else meta.fill_(_ASCENDING))
        else:
            bitmask = zeros(rows, -(-cols // 8), dtype=torch.uint8, device=device)
            self.register_buffer("bitmask", bitmask)
        offsets = tiles = None
        if format == "bitmask":
            offsets = zeros(rows + 1, dtype=torch.int64, device=device)
            tiles = zeros(rows, -(-cols // TILE), dtype=tile_dtype(cols), device=device)
        self.register_buffer("row_offsets", offsets)
        self.register_buffer("tile_offsets", tiles, persistent=False)
        self.register_buffer("dense", None, persistent=False)
        self.bias = nn.Parameter(zeros(rows, dtype=dtype, device=device)) if bias else None
        self.semi_structured: Tensor | None = None  # torch's own compressed tensor, no buffer: it cannot be moved
        self.prefer: Prefer = "speed"
        self.tune_for: Prefer | None = None
        self.adopt(default_plan(self))

    @classmethod
    def from_dense(cls, layer: nn.Module, mask: Mask | None = None, *, plan: Plan | None = None) -> SparseLinear:
        """Compress an ``nn.Linear`` or a ``Conv1D`` by ``mask`` (that of the layer by default); shares its bias.

        ``plan`` is the default plan if it is None.

        Raises:
            ValueError: another layer, no mask, or a mask without its pattern.
        """
        if not isinstance(layer, nn.Linear | Conv1D):
            raise ValueError(f"layer is a {type(layer).__name__}; only Linear and Conv1D are compressed")
        mask = mask_of(layer) if mask is None else mask
        if mask is None:
            raise ValueError("layer has no mask: prune it with sparsify, or attach one")
        stored: Tensor = layer.weight
        if mask.shape != stored.shape:
            raise ValueError(f"mask is of shape {tuple(mask.shape)}, the weight of {tuple(stored.shape)}")
        kind = "Conv1D" if isinstance(layer, Conv1D) else "Linear"
        rows, cols = mask.bits.shape[0], mask.cols
        unsized = storage_format(mask.pattern, cols)[0] == "bitmask"
        made = cls(
            cols,
            rows,
            mask.pattern,
            kept=mask.kept if unsized else None,
            bias=layer.bias is not None,
            kind=kind,
            device="meta",  # what it allocates is replaced at once
            dtype=stored.dtype,
        )
        made.bias = layer.bias
        made.training = layer.training
        made._store(compress(made._rows(stored), mask.bits.to(stored.device), made.format, *made._groups()))
        made.adopt(default_plan(made) if plan is None else plan)
        return made

    def _rows(self, stored: Tensor) -> Tensor:
        weight = stored.detach()
        return (weight.t() if self.kind == "Conv1D" else weight).contiguous()

    def _groups(self) -> tuple[int, int]:
        return (self.n, self.m) if self.format != "bitmask" else (0, 0)

    def _store(self, weight: CompressedWeight) -> None:
        self.layout, self.values, self.positions = "rows", weight.values, weight.meta
        self.row_offsets, self.tile_offsets = weight.row_offsets, weight.tile_offsets
        self.semi_structured = self.dense = None

    @property
    def positions(self) -> Tensor:
        """The buffer that says which weights are kept: ``meta`` or ``bitmask``."""
        return self.meta if self.format == "2:4" else self.bitmask  # type: ignore[return-value]

    @positions.setter
    def positions(self, value: Tensor) -> None:
        setattr(self, "meta" if self.format == "2:4" else "bitmask", value)

    def compressed(self) -> CompressedWeight:
        """W in the form of kernels/compressed.py; shares memory unless the layout is ``"fragments"``."""
        values, positions = self.values, self.positions
        if self.layout == "fragments":
            values, positions = unpack24(values, positions)
        shape = (self.out_features, self.in_features)
        return CompressedWeight(
            self.format, shape, *self._groups(), values, positions, self.row_offsets, self.tile_offsets
        )

    @property
    def weight(self) -> Tensor:
        """W [out, in], dense, to read only: decompressed at each use unless the plan keeps it; 0 where pruned."""
        return self.compressed().decompress() if self.dense is None else self.dense

    @property
    def qweight(self) -> Tensor:
        """The stored values; PEFT asks a layer for its device here before it asks ``weight``, which decompresses."""
        return self.values

    @property
    def mask(self) -> Mask:
        """Which weights are kept."""
        packed = self.compressed().packed
        transposed = self.kind == "Conv1D"
        shape = (self.in_features, self.out_features) if transposed else (self.out_features, self.in_features)
        return Mask(packed.cpu(), torch.Size(shape), self.in_features, transposed, self.pattern)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is held, with every copy that the plan asks for, without the bias."""
        tensors = [self.values, self.positions, self.row_offsets, self.tile_offsets, self.dense]
        held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return held + (self.compressed().bytes if self.semi_structured is not None else 0)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Replace the kept weights by those of ``weight`` [out, in]; the mask stays, what it prunes is ignored.

        Raises:
            ValueError: another shape.
        """
        shape = (self.out_features, self.in_features)
        if tuple(weight.shape) != shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be {shape}")
        packed = self.mask.bits.to(self.values.device)
        matrix = weight.detach().to(self.values).contiguous()
        self._store(compress(matrix, packed, self.format, *self._groups()))
        self.adopt(self.plan)

    def to_dense(self) -> nn.Module:
        """An ``nn.Linear`` (or ``Conv1D``) of the same weight, with the mask attached; shares the bias."""
        rows, cols, weight = self.out_features, self.in_features, self.weight
        with torch.device("meta"):  # the parameters are replaced
            layer = Conv1D(rows, cols) if self.kind == "Conv1D" else nn.Linear(cols, rows, bias=False)
        weight = weight.t().contiguous() if self.kind == "Conv1D" else weight
        layer.weight = nn.Parameter(weight.clone() if weight is self.dense else weight)
        layer.register_parameter("bias", self.bias)
        layer.training = self.training
        attach(layer, "weight", self.mask, zero=False)
        return layer

    def adopt(self, plan: Plan) -> None:
        """Store what ``plan`` reads: the layout of the values, and the dense weight if a backend needs it."""
        if self.layout != plan.layout:
            weight = self.compressed()
            self._store(weight)
            if plan.layout == "fragments":
                self.values, self.positions = pack24(weight.values, weight.meta)
            self.layout = plan.layout
        copies = {BACKENDS[name].copy for _, name in plan.steps}
        self.semi_structured = None
        if "dense" not in copies:
            self.dense = None
        elif self.dense is None:
            self.dense = self.compressed().decompress()
        if "semi-structured" in copies:
            self.semi_structured = torch.sparse.to_sparse_semi_structured(self.weight)
        self.plan = plan

    def forward(self, x: Tensor, lora: Lora | None = None) -> Tensor:
        """x [..., in] -> [..., out]; ``lora`` is (A [rank, in], B [out, rank], s).

        Under autocast everything is cast to its dtype, as for an ``nn.Linear``.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        if self.tune_for is not None and not torch.compiler.is_compiling():
            from trisparse.sparsity.tuning import tune_on_use

            prefer, self.tune_for = self.tune_for, None
            tune_on_use(self, prefer)
        tokens = x.numel() // max(x.shape[-1], 1) if x.dim() else 0
        grad = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (x, self.bias, *(lora or ())[:2])
        )
        return BACKENDS[self.plan.backend(tokens, grad=grad)].run(self, x, lora)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        before = self.values.device, self.values.dtype
        if self.layout != "rows":  # fragments are of half precision
            self._store(self.compressed())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        same = before == (self.values.device, self.values.dtype)
        self.adopt(self.plan if same else default_plan(self, self.prefer))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout == "fragments":
            values, meta = unpack24(self.values, self.positions)
            destination[prefix + "values"], destination[prefix + "meta"] = values, meta

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        before, device = len(errors), self.values.device
        if self.layout != "rows":
            self._store(self.compressed())
        given = state_dict.get(prefix + "values")
        if self.format == "bitmask" and given is not None and given.shape != self.values.shape and given.dim() == 1:
            self.values = self.values.new_empty(given.shape)  # another mask of the same pattern
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.dense = self.semi_structured = None
        if self.values.device.type == "meta":
            return
        try:
            self._check()
            if self.format == "bitmask":
                self.tile_offsets = tile_offsets(self.positions, self.in_features)
            self.adopt(self.plan if self.values.device == device else default_plan(self, self.prefer))
        except ValueError as error:
            self.plan = Plan("rows", ((None, "compressed"),))
            if len(errors) == before:
                errors.append(f"{prefix}weight is damaged: {error}")

    def _check(self) -> None:
        """Raise a ValueError unless the positions keep as many weights as there are values, where they may."""
        if self.format == "2:4":
            places = places_2_4(self.positions)
            if bool((places[..., 0] >= places[..., 1]).any()):
                raise ValueError("meta has a group whose two places do not ascend")
            return
        kept = count_bits(self.positions)
        beyond = self.in_features % 8
        if beyond and bool((self.positions[:, -1] >> beyond).any()):
            raise ValueError("bitmask has bits beyond the last column")
        if self.format == "n:m":
            if bool((kept != self.in_features * self.n // self.m).any()):
                raise ValueError(f"bitmask is not {self.n}:{self.m}")
            return
        assert self.row_offsets is not None
        expected = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        if not torch.equal(self.row_offsets, expected.to(torch.int64)) or int(expected[-1]) != self.values.numel():
            raise ValueError("row_offsets and values do not fit the bitmask")

    def extra_repr(self) -> str:
        """As torch prints it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, backend={self.plan}"
        )
