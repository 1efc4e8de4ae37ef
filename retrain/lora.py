"""LoRA under the mask of its layer, as a custom module of PEFT.

    y = x (W + M ⊙ s·B A)ᵀ + b        mask_lora (PERP, section 3.2)
    y = x Wᵀ + b + s (x Aᵀ) Bᵀ         the same layer where nothing is pruned (the output head)

W [out, in] is frozen and zero where it is pruned, M [out, in] is its mask, A [rank, in] and B [out, rank]
train. A merge therefore loses no zero. The effective weight lives for one product: the backward forms it
again, and forms the gradient dyᵀ x of the weight by chunks of rows, each masked and reduced into dA and dB at
once, so that neither B A nor the weight's gradient is ever kept.

transformers' Conv1D stores W as [in, out]. Everything below works on the stored layout [p, q], with the
update ``left @ right``: B A for a linear, Aᵀ Bᵀ for a Conv1D.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from trisparse.sparsity.mask import MaskError, mask_of

# Elements of one chunk of rows. On the CPU a chunk and its fp32 sum stay in the caches; on a GPU a chunk must
# be large enough that its launches do not show.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Options of LoraConfig that change the formula, with the one value that this layer implements.
_UNSUPPORTED: dict[str, Any] = {
    "lora_dropout": 0.0,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "alora_invocation_tokens": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
    "layer_replication": None,
}


def mask_lora_ref(
    x: Tensor, weight: Tensor, left: Tensor, right: Tensor, keep: Tensor, bias: Tensor | None = None, *,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """The specification of :func:`mask_lora`, in plain autograd; ``keep`` is bool [p, q], True = kept."""
    effective = weight + keep * (left @ right)
    return nn.functional.linear(x, effective.t() if transposed else effective, bias)


def _chunks(matrix: Tensor, cols: int | None = None) -> list[slice]:
    """Rows of ``matrix`` by chunks, counted as ``cols`` wide (its own width by default)."""
    rows = max(1, _CHUNK_ELEMENTS.get(matrix.device.type, 2**24) // max(1, cols or matrix.shape[1]))
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)]


class _Zeros:
    """Sets a matrix to exactly zero where ``pruned``, also over NaN and Inf; reads the mask once for many uses."""

    def __init__(self, pruned: Tensor | None, element_size: int) -> None:
        # masked_fill_ and a product with a bool tensor are scalar loops on the CPU: 1.9 and 0.6 ms for a bf16
        # matrix of 576x1536, against 0.06 ms for the bits and 0.05 ms for each use of them.
        bits = _BITS[element_size]
        self.pruned = pruned
        self.keep = pruned.to(bits).sub_(1) if pruned is not None and pruned.device.type == "cpu" else None

    def __call__(self, matrix: Tensor, rows: slice) -> None:
        """In place on ``matrix``, which holds ``rows`` of the whole."""
        if self.keep is not None:
            matrix.view(self.keep.dtype).bitwise_and_(self.keep[rows])
        elif self.pruned is not None:
            matrix.masked_fill_(self.pruned[rows], 0)


def _effective(weight: Tensor, left: Tensor, right: Tensor, zero_: _Zeros, dtype: torch.dtype) -> Tensor:
    """M ⊙ (W + left right) [p, q] in ``dtype``; that is W + M ⊙ (left right), as a pruned weight is zero.

    The sum is formed in fp32 or better and rounded once: an update below half a unit of a bf16 weight would
    otherwise be lost.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right = left.to(wide), right.to(wide)
    out = torch.empty_like(weight, dtype=dtype)
    for rows in _chunks(weight):
        if dtype == wide:
            torch.addmm(weight[rows].to(wide), left[rows], right, out=out[rows])
        else:
            out[rows] = torch.addmm(weight[rows].to(wide), left[rows], right)
        zero_(out[rows], rows)
    return out


class _MaskLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, left: Tensor, right: Tensor, pruned: Tensor, bias: Tensor | None,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, left, right, pruned)
        ctx.transposed = transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            effective = _effective(weight, left, right, _Zeros(pruned, x.element_size()), x.dtype)
            effective = effective if transposed else effective.t()
            return x @ effective if bias is None else torch.addmm(bias.to(x.dtype), x, effective)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right, pruned = ctx.saved_tensors
        dx = dleft = dright = dbias = None
        with torch.autocast(x.device.type, enabled=False):
            zero_ = _Zeros(pruned, x.element_size())
            if ctx.needs_input_grad[0]:
                effective = _effective(weight, left, right, zero_, x.dtype)
                dx = dy @ (effective.t() if ctx.transposed else effective)
                del effective
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                rows_side, cols_side = (x, dy) if ctx.transposed else (dy, x)
                dleft, dright = _factor_gradients(rows_side, cols_side, left, right, zero_)
            if ctx.needs_input_grad[5]:
                dbias = dy.sum(0, dtype=ctx.bias_dtype)
        return dx, None, dleft, dright, None, dbias, None


def _factor_gradients(
    rows_side: Tensor, cols_side: Tensor, left: Tensor, right: Tensor, zero_: _Zeros
) -> tuple[Tensor, Tensor]:
    """Gradients of left [p, r] and right [r, q] from G = M ⊙ (rows_sideᵀ cols_side): G rightᵀ and leftᵀ G.

    rows_side is [tokens, p] and cols_side [tokens, q]. G [p, q] exists by chunks of rows only; the sum over
    the chunks is formed in the factors' own dtype (fp32).
    """
    dtype = rows_side.dtype
    narrow_left, narrow_right_t = left.to(dtype).t(), right.to(dtype).t()
    dleft, dright = torch.empty_like(left), None
    for rows in _chunks(dleft, cols_side.shape[1]):
        grad = rows_side[:, rows].t() @ cols_side
        zero_(grad, rows)
        dleft[rows] = grad @ narrow_right_t
        part = (narrow_left[:, rows] @ grad).to(right.dtype)
        dright = part if dright is None else dright.add_(part)
    assert dright is not None  # a matrix has rows
    return dleft, dright


def mask_lora(
    x: Tensor, weight: Tensor, left: Tensor, right: Tensor, pruned: Tensor, bias: Tensor | None = None, *,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """x (W + M ⊙ left right)ᵀ + b without keeping the update or the gradient of the weight.

    Args:
        x: [..., in]. Under autocast it is cast to autocast's dtype, otherwise to the dtype of ``weight``.
        weight: [p, q] = [out, in], or [in, out] if ``transposed``; zero where pruned; gets no gradient.
        left: [p, rank], the scaling s included.
        right: [rank, q].
        pruned: bool [p, q], True = pruned (the complement of M).
        bias: [out].
        transposed: whether ``weight`` is stored as [in, out].

    Returns:
        [..., out] in the dtype that ``x`` was cast to.
    """
    x = x.to(_compute_dtype(x, weight))
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _MaskLora.apply(rows, weight, left, right, pruned, bias, transposed)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves fp64 alone
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _low_rank(x: Tensor, layer: nn.Module, left: Tensor, right: Tensor, *, transposed: bool) -> Tensor:
    """layer(x) + x (left right)ᵀ through the factors; adds into the layer's own output (the head's is large)."""
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = layer(rows)
    down, up = (left, right) if transposed else (right.t(), left.t())
    with torch.autocast(x.device.type, enabled=False):
        y = y.addmm_(rows.to(y.dtype) @ down.to(y.dtype), up.to(y.dtype))
    return y.view(*x.shape[:-1], -1)


class MaskLoraLinear(nn.Module, LoraLayer):  # type: ignore[misc]
    """LoRA of an ``nn.Linear`` or a transformers ``Conv1D`` that keeps the zeros of its mask.

    The mask is taken from the base layer, unpacked for as long as the adapter is in place, and is no part of
    the ``state_dict``. Several active adapters add up under the one mask. Use it through
    :func:`mask_lora_modules`.

    Raises:
        ValueError: an option of PEFT's that this layer does not implement.
        MaskError: a pruned weight of the base layer is not zero.
    """

    pruned: Tensor | None
    # PEFT is not typed, and nn.Module's __getattr__ would answer for it
    lora_A: Any  # noqa: N815
    lora_B: Any  # noqa: N815
    scaling: dict[str, float]
    merged_adapters: list[str]
    active_adapters: list[str]
    merged: bool
    disable_adapters: bool
    get_base_layer: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        layer = self.get_base_layer()
        self.transposed = isinstance(layer, Conv1D)
        mask = mask_of(layer)
        pruned = None if mask is None else ~mask.dense(layer.weight.device).contiguous()
        if pruned is not None and bool(((layer.weight != 0) & pruned).any()):
            raise MaskError(f"{kwargs.get('target_name', 'a layer')} has pruned weights that are not zero")
        self.register_buffer("pruned", pruned, persistent=False)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add one adapter (PEFT's protocol)."""
        for option, value in _UNSUPPORTED.items():
            if (given := getattr(config, option, value)) != value and given:
                raise ValueError(f"mask_lora does not implement {option}={given!r}; leave it at {value!r}")
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"mask_lora does not implement init_lora_weights={config.init_lora_weights!r}; use True, False or "
                "'gaussian' (the others change the frozen weight)"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _factors(self, adapters: list[str]) -> tuple[Tensor, Tensor]:
        """left [p, ranks] and right [ranks, q] of the sum of ``adapters``, the scaling in the left one."""
        downs = [self.lora_A[name].weight for name in adapters]
        ups = [self.lora_B[name].weight * self.scaling[name] for name in adapters]
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        up = ups[0] if len(ups) == 1 else torch.cat(ups, dim=1)
        return (down.t(), up.t()) if self.transposed else (up, down)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("mask_lora does not implement adapter_names (a batch with several adapters)")
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        layer = self.get_base_layer()
        if self.disable_adapters or self.merged or not adapters:
            return layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        left, right = self._factors(adapters)
        if self.pruned is None:
            return _low_rank(x, layer, left, right, transposed=self.transposed)
        return mask_lora(x, layer.weight, left, right, self.pruned, layer.bias, transposed=self.transposed)

    @torch.no_grad()
    def _add(self, adapter: str, sign: int) -> Tensor:
        left, right = self._factors([adapter])
        weight = self.get_base_layer().weight
        zero_ = _Zeros(self.pruned, weight.element_size())
        return _effective(weight, sign * left, right, zero_, weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (all active ones by default) to the base weight; every pruned weight stays exactly zero.

        Raises:
            ValueError: with ``safe_merge``, a merged weight is not finite; the weight is as it was.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            merged = self._add(adapter, 1)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"the merged weight is not finite; the adapter {adapter!r} is broken")
            self.get_base_layer().weight.data.copy_(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract every merged adapter from the base weight."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.lora_A:
                self.get_base_layer().weight.data.copy_(self._add(adapter, -1))

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """M ⊙ s·B A of one adapter, in the layout of the base weight and the dtype of the adapter."""
        left, right = self._factors([adapter])
        delta = left @ right
        _Zeros(self.pruned, delta.element_size())(delta, slice(None))
        return delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is of low rank, which a masked one is not."""
        return self.pruned is None

    def __repr__(self) -> str:
        return "trisparse." + super().__repr__()


def mask_lora_modules(config: LoraConfig) -> LoraConfig:
    """Make ``get_peft_model(model, config)`` use :class:`MaskLoraLinear` for every linear and Conv1D target."""
    config._register_custom_module({nn.Linear: MaskLoraLinear, Conv1D: MaskLoraLinear})
    return config
