"""vLLM's side of a compressed checkpoint: which layers are compressed, and how they are loaded and run.

vLLM calls every compressed form a quantization. This is the protocol of vLLM 0.33: a layer asks the quantization config
for a method, which creates parameters with a ``weight_loader``, is called when all is loaded, and is applied. The
loaders that vLLM's layers bring would cut our tensors as if they were dense, so the parameters have their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

from trisparse.sparsity.backends import Prefer
from trisparse.sparsity.checkpoint.files import CheckpointError
from trisparse.sparsity.checkpoint.info import Manifest
from trisparse.sparsity.checkpoint.parts import EXPORT, LayerParts, Share, share_of_rank
from trisparse.sparsity.checkpoint.target import MASKS_PREFIX, Target
from trisparse.sparsity.planned_linear import planned_linear
from trisparse.vllm_plugin import METHOD

_QKV = {"q": 0, "k": 1, "v": 2}


class TrisparseConfig(QuantizationConfig):  # type: ignore[misc]
    """``quantization_config`` of a compressed checkpoint.

    Args:
        targets: the pruned weights, by their names in the checkpoint.
    """

    def __init__(self, targets: Mapping[str, Target]) -> None:
        super().__init__()
        self.targets = dict(targets)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TrisparseConfig:
        """The config in a ``config.json``.

        Raises:
            CheckpointError: it is damaged.
        """
        return cls(Manifest.parse(config, "config.json").targets)

    def get_name(self) -> str:
        """As in ``quant_method``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere, the oldest that the kernels are compiled for in the tests."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all stands in ``config.json``."""
        return []

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Leaves out the masks of weights that are stored dense: running the model does not need them."""
        return WeightsMapper(orig_to_new_prefix={f"{MASKS_PREFIX}.": None})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename the weights as vLLM's model does."""
        self.targets = hf_to_vllm_mapper.apply_dict(self.targets)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What loads and runs ``layer``; vLLM's own method where nothing of it is compressed.

        Raises:
            ValueError: the checkpoint holds a compressed form that vLLM's layer cannot have.
        """
        if isinstance(layer, LinearBase):
            stored = {name: self.targets.get(name) for name in self._stored_names(prefix)}
            compressed = {name: target for name, target in stored.items() if target and target.format != "dense"}
            if not compressed:
                return UnquantizedLinearMethod()
            if len(compressed) != len(stored):
                dense = ", ".join(name for name in stored if name not in compressed)
                raise ValueError(f"vLLM fuses {prefix}, but {dense} is not compressed as the rest is; {EXPORT}")
            return TrisparseLinearMethod(compressed, _prefer())
        if isinstance(layer, VocabParallelEmbedding | RoutedExperts) and prefix:
            for name, target in self.targets.items():
                if name.startswith(f"{prefix}.") and target.format != "dense":
                    raise ValueError(f"{name} is compressed, and vLLM's {type(layer).__name__} cannot be; {EXPORT}")
        return None

    def _stored_names(self, prefix: str) -> list[str]:
        """The weights in the checkpoint that make up vLLM's layer ``prefix``: one, or those that vLLM fuses."""
        parent, dot, name = prefix.rpartition(".")
        if f"{prefix}.weight" in self.targets:
            return [f"{prefix}.weight"]
        return [f"{parent}{dot}{part}.weight" for part in self.packed_modules_mapping.get(name, [name])]


class TrisparseLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads a linear layer from compressed weights and runs it with the kernels of this package.

    Args:
        targets: the weights of the layer, from its first output to its last.
        prefer: ``"speed"`` or ``"memory"``, as of ``trisparse.compress``.
    """

    def __init__(self, targets: Mapping[str, Target], prefer: Prefer) -> None:
        self.targets, self.prefer = dict(targets), prefer

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create an empty parameter for each tensor of the format; its loader gives what arrives to ``LayerParts``.

        How many values a device gets depends on the mask, so that the parameters have no size before.

        Raises:
            ValueError: the weights do not fit the layer, or cannot be split over the devices.
        """
        shares = _shares(layer, self.targets, input_size_per_partition, output_partition_sizes)
        parts = LayerParts(shares, device=torch.get_default_device(), dtype=params_dtype)
        for name, dtype in parts.tensors.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(_load, parts, name)})
            layer.register_parameter(name, parameter)
        layer.trisparse_parts = parts  # type: ignore[assignment]  # no module

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put the parts together as ``layer.sparse``, a SparseLinear.

        Raises:
            CheckpointError: tensors have not come.
            ValueError: the layer was finished before: vLLM's reloading of weights is not supported.
        """
        parts = layer.__dict__.pop("trisparse_parts", None)
        if parts is None:
            raise ValueError("a compressed layer is loaded once: start vLLM anew for other weights")
        layer.sparse = parts.finish(self.prefer)
        for name in parts.tensors:
            delattr(layer, name)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias."""
        return planned_linear(layer.sparse, x, bias)  # type: ignore[arg-type]


def _shares(
    layer: Any, targets: Mapping[str, Target], input_size_per_partition: int, output_partition_sizes: Sequence[int]
) -> list[Share]:
    sizes = list(output_partition_sizes)
    if len(targets) == 1 and len(sizes) > 1:
        (name, target), whole = next(iter(targets.items())), sum(sizes)
        if target.rows != whole:
            raise ValueError(
                f"{name} is fused in the checkpoint, and a device has {whole} of its {target.rows} rows: it runs on "
                f"one device only; {EXPORT}"
            )
        sizes = [whole]
    if len(sizes) != len(targets):
        raise ValueError(f"{', '.join(targets)} are not the {len(sizes)} parts of vLLM's layer; {EXPORT}")
    shares = []
    for (name, target), held in zip(targets.items(), sizes, strict=True):
        try:
            rows = share_of_rank(target.rows, held, layer.tp_rank, layer.tp_size)
            cols = share_of_rank(target.cols, input_size_per_partition, layer.tp_rank, layer.tp_size)
        except ValueError as error:
            raise ValueError(f"{name} does not fit vLLM's layer: {error}; {EXPORT}") from error
        shares.append(Share(name, target, rows, cols))
    return shares


def _load(
    parts: LayerParts,
    name: str,
    param: nn.Parameter,
    loaded_weight: Tensor,
    loaded_shard_id: str | int | tuple[int, ...] | None = None,
) -> None:
    """The ``weight_loader`` of the parameter ``name``; the shard is None, "q", "k", "v" or the number of a part."""
    index = _QKV.get(loaded_shard_id) if isinstance(loaded_shard_id, str) else loaded_shard_id
    if index is None and loaded_shard_id is None and len(parts.shares) == 1:
        index = 0
    if not isinstance(index, int) or not 0 <= index < len(parts.shares):
        listed = ", ".join(share.name for share in parts.shares)
        raise CheckpointError(f"vLLM gives {name} of {listed} as shard {loaded_shard_id!r}, which none of them is")
    parts.add(index, name, loaded_weight)


def _prefer() -> Prefer:
    """``additional_config={"trisparse": {"prefer": "memory"}}`` of vLLM, "speed" by default."""
    given = getattr(get_current_vllm_config_or_none(), "additional_config", None)
    options = given.get(METHOD, {}) if isinstance(given, Mapping) else {}
    if not isinstance(options, Mapping) or options.keys() - {"prefer"}:
        raise ValueError(f"additional_config has {METHOD!r}: {options!r}; it may be {{'prefer': 'speed' or 'memory'}}")
    prefer: Prefer = options.get("prefer", "speed")
    if prefer not in get_args(Prefer):
        raise ValueError(f"prefer in additional_config is {prefer!r}; it may be 'speed' or 'memory'")
    return prefer
