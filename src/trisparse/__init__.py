"""trisparse: prune language models and conv nets, measure, retrain cheaply, save.

    report = trisparse.sparsify(model, "2:4", data=texts, tokenizer=tokenizer)
    trisparse.retrain(model, texts, tokenizer=tokenizer)
    trisparse.save(model, "pruned")

Names are imported when they are first used, so that ``import trisparse`` and the command line start at once.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from trisparse.retrain.peft_registration import register_with_peft
from trisparse.sparsity.checkpoint.registration import register_on_import

if TYPE_CHECKING:
    from trisparse.retrain.cycles import CyclesConfig, LayerCollapseError, prune_cycles
    from trisparse.retrain.cycles_report import CyclesReport
    from trisparse.retrain.effective_sparsity import EffectiveSparsity, effective_sparsity
    from trisparse.retrain.freezing import GradualFreezing
    from trisparse.retrain.loop import RetrainError
    from trisparse.retrain.perp import PERPConfig, retrain
    from trisparse.retrain.reconstruct import ReconstructConfig, reconstruct
    from trisparse.retrain.reconstruct_report import ReconstructReport
    from trisparse.retrain.report import RetrainReport
    from trisparse.retrain.sparse_lora_config import SparseLoraConfig, load_adapters, sparse_lora_modules
    from trisparse.retrain.vision import VisionConfig, accuracy, retrain_vision
    from trisparse.retrain.vision_report import VisionReport
    from trisparse.sparsity.allocation import ERK, LAMP, OWL, PerLayer, UniformPlus
    from trisparse.sparsity.capture import BlocksNotChainedError
    from trisparse.sparsity.checkpoint import CheckpointError, TrisparseConfig, load, save
    from trisparse.sparsity.compression import CompressionReport, compress, decompress
    from trisparse.sparsity.foreign.recover import recover_masks
    from trisparse.sparsity.linear import SparseLinear
    from trisparse.sparsity.mask import Mask, MaskError, check_masks, masks
    from trisparse.sparsity.metric import Metric
    from trisparse.sparsity.pattern import NM, Pattern, Rows, Unstructured
    from trisparse.sparsity.perplexity import perplexity
    from trisparse.sparsity.report import SparsityReport
    from trisparse.sparsity.sparsify import sparsify
    from trisparse.sparsity.streaming.stream import stream_sparsify
    from trisparse.sparsity.zero_shot import zero_shot
    from trisparse.sparsity.zero_shot_report import ZeroShotReport

__version__ = version("trisparse")

_HOME = {
    "ERK": "sparsity.allocation",
    "LAMP": "sparsity.allocation",
    "NM": "sparsity.pattern",
    "OWL": "sparsity.allocation",
    "BlocksNotChainedError": "sparsity.capture",
    "CheckpointError": "sparsity.checkpoint",
    "CompressionReport": "sparsity.compression",
    "EffectiveSparsity": "retrain.effective_sparsity",
    "CyclesConfig": "retrain.cycles",
    "CyclesReport": "retrain.cycles_report",
    "GradualFreezing": "retrain.freezing",
    "LayerCollapseError": "retrain.cycles",
    "Mask": "sparsity.mask",
    "MaskError": "sparsity.mask",
    "Metric": "sparsity.metric",
    "PERPConfig": "retrain.perp",
    "Pattern": "sparsity.pattern",
    "PerLayer": "sparsity.allocation",
    "ReconstructConfig": "retrain.reconstruct",
    "ReconstructReport": "retrain.reconstruct_report",
    "RetrainError": "retrain.loop",
    "RetrainReport": "retrain.report",
    "Rows": "sparsity.pattern",
    "SparseLinear": "sparsity.linear",
    "SparseLoraConfig": "retrain.sparse_lora_config",
    "SparsityReport": "sparsity.report",
    "TrisparseConfig": "sparsity.checkpoint",
    "UniformPlus": "sparsity.allocation",
    "Unstructured": "sparsity.pattern",
    "VisionConfig": "retrain.vision",
    "VisionReport": "retrain.vision_report",
    "ZeroShotReport": "sparsity.zero_shot_report",
    "accuracy": "retrain.vision",
    "check_masks": "sparsity.mask",
    "compress": "sparsity.compression",
    "decompress": "sparsity.compression",
    "effective_sparsity": "retrain.effective_sparsity",
    "load": "sparsity.checkpoint",
    "load_adapters": "retrain.sparse_lora_config",
    "masks": "sparsity.mask",
    "perplexity": "sparsity.perplexity",
    "retrain_vision": "retrain.vision",
    "prune_cycles": "retrain.cycles",
    "reconstruct": "retrain.reconstruct",
    "recover_masks": "sparsity.foreign.recover",
    "save": "sparsity.checkpoint",
    "sparse_lora_modules": "retrain.sparse_lora_config",
    "sparsify": "sparsity.sparsify",
    "stream_sparsify": "sparsity.streaming.stream",
    "zero_shot": "sparsity.zero_shot",
}

__all__ = [
    "ERK",
    "LAMP",
    "NM",
    "OWL",
    "BlocksNotChainedError",
    "CheckpointError",
    "CompressionReport",
    "CyclesConfig",
    "CyclesReport",
    "EffectiveSparsity",
    "GradualFreezing",
    "LayerCollapseError",
    "Mask",
    "MaskError",
    "Metric",
    "PERPConfig",
    "Pattern",
    "PerLayer",
    "ReconstructConfig",
    "ReconstructReport",
    "RetrainError",
    "RetrainReport",
    "Rows",
    "SparseLinear",
    "SparseLoraConfig",
    "SparsityReport",
    "TrisparseConfig",
    "UniformPlus",
    "Unstructured",
    "VisionConfig",
    "VisionReport",
    "ZeroShotReport",
    "accuracy",
    "check_masks",
    "compress",
    "decompress",
    "effective_sparsity",
    "load",
    "load_adapters",
    "masks",
    "perplexity",
    "prune_cycles",
    "reconstruct",
    "recover_masks",
    "retrain",
    "retrain_vision",
    "save",
    "sparse_lora_modules",
    "sparsify",
    "stream_sparsify",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    if name == "retrain":  # the package itself, which is callable
        return import_module("trisparse.retrain")
    if name in _HOME:
        return getattr(import_module(f"trisparse.{_HOME[name]}"), name)
    raise AttributeError(f"module 'trisparse' has no attribute {name!r}")


register_on_import()  # from_pretrained opens checkpoints of ours from now on
register_with_peft()  # and PeftModel.from_pretrained their adapters
