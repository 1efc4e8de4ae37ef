"""transformers' side of the format: ``from_pretrained`` and ``save_pretrained`` of a compressed model.

    import trisparse                                                # registers quant_method "trisparse"
    model = AutoModelForCausalLM.from_pretrained("pruned")          # SparseLinear layers
    model = AutoModelForCausalLM.from_pretrained("pruned", quantization_config=TrisparseConfig(dense=True))

transformers calls every compressed form a quantization and its code a quantizer. What this file imports at the top must
be light and independent of transformers' models: it is imported while transformers is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers.quantizers.auto as table
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from trisparse.sparsity.checkpoint.info import Manifest

METHOD = "trisparse"


class TrisparseConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed checkpoint; as an argument of ``from_pretrained`` it says how to load it.

    Args:
        dense: decompress into ordinary layers, with their masks attached.
        manifest: the pruned weights; read from the file, not given.
    """

    def __init__(self, *, dense: bool = False, manifest: Manifest | None = None) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # an enumeration of transformers' own
        self.dense = dense
        self.manifest = manifest

    def __deepcopy__(self, memo: dict[int, Any]) -> TrisparseConfig:
        return type(self)(dense=self.dense, manifest=self.manifest)  # a manifest does not change

    @property
    def dequantize(self) -> bool:
        """transformers' word for ``dense``: after loading, the model counts as an ordinary one."""
        return self.dense

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config in a ``config.json``.

        Raises:
            CheckpointError: it is damaged.
        """
        from trisparse.sparsity.checkpoint.info import Manifest

        config = cls(
            dense=config_dict.get("dense") is True, manifest=Manifest.parse(config_dict, "quantization_config")
        )
        return (config, kwargs) if return_unused_kwargs else config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of ``from_pretrained`` may change."""
        return {"dense": self.dense}

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``config.json``."""
        content = {} if self.manifest is None else self.manifest.content()
        return {"quant_method": METHOD, **content}


class TrisparseQuantizer(HfQuantizer):
    """Turns the linear layers of an empty model into empty SparseLinear, and checks what was loaded into them."""

    quantization_config: TrisparseConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from trisparse.sparsity.checkpoint.files import CheckpointError, is_checkpoint
        from trisparse.sparsity.checkpoint.loading import Loading

        if self.quantization_config.manifest is None:
            folder = str(getattr(model.config, "name_or_path", "") or "")
            if folder and is_checkpoint(folder):
                raise ValueError(
                    f"{folder} holds ordinary weights with the masks beside them: trisparse.load(folder) opens it with "
                    "its masks, and from_pretrained without a quantization_config as a dense model"
                )
            raise ValueError(
                "quantization_config is a TrisparseConfig, which says how our checkpoints are loaded, but the model is "
                "no trisparse checkpoint: trisparse.sparsify prunes a model"
            )
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if not files:
            raise CheckpointError("a compressed checkpoint is loaded from its files, and none were given")
        self._loading = Loading(model, self.quantization_config.manifest, files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        loading = self._loading
        del self._loading
        loading.finish(dense=self.quantization_config.dense)
        # A sparse weight is of the model's own dtype: .half(), .to(dtype) and training do what they always do.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element for the device map, with the indices, which are not in the model while it is planned."""
        from trisparse.sparsity.checkpoint.packing import EmptyLayer

        size: float = super().param_element_size(model, param_name, param)
        path, _, name = param_name.rpartition(".")
        if name == "values" and param.numel() and isinstance(layer := model.get_submodule(path), EmptyLayer):
            size += layer.target.rows * layer.target.cols / 8 / param.numel()
        return size

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The tensors to save, as :func:`trisparse.save` writes them; brings the model's config up to date.

        Raises:
            MaskError: a pruned weight is not zero: what is written could not be loaded.
        """
        from trisparse.sparsity.checkpoint.info import Manifest
        from trisparse.sparsity.checkpoint.packing import pack
        from trisparse.sparsity.mask import check_masks

        check_masks(model)
        earlier = self.quantization_config.manifest
        state, targets = pack(model)
        self.quantization_config.manifest = Manifest(targets, () if earlier is None else earlier.recipe)
        model.config.quantization_config = self.quantization_config
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from trisparse.sparsity.compression import decompress

        decompress(model)
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]

    @property
    def is_trainable(self) -> bool:
        """Biases, norms and adapters train; compressed weights have no gradient."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile takes the layers."""
        return True

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the compressed form."""
        return True


def mark_compressed(model: nn.Module) -> None:
    """Have ``save_pretrained`` of a transformers model write the compressed form."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and not isinstance(getattr(model, "hf_quantizer", None), TrisparseQuantizer):
        model.hf_quantizer = TrisparseQuantizer(TrisparseConfig())  # type: ignore[assignment]


def unmark_compressed(model: nn.Module) -> None:
    """Have ``save_pretrained`` write an ordinary model again."""
    from transformers import PreTrainedModel

    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(model, PreTrainedModel) and isinstance(quantizer, TrisparseQuantizer):
        quantizer.remove_quantization_config(model)  # type: ignore[no-untyped-call]


if METHOD not in table.AUTO_QUANTIZER_MAPPING:
    table.register_quantization_config(METHOD)(TrisparseConfig)
    table.register_quantizer(METHOD)(TrisparseQuantizer)
    # Without this, transformers ignores the TrisparseConfig that is given to from_pretrained.
    table.LOADING_ATTRIBUTES_CONFIG_TYPES += (TrisparseConfig,)  # type: ignore[assignment]
