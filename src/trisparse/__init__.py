"""trisparse: prune language models and conv nets, measure, retrain cheaply, save.

report = trisparse.sparsify(model, "2:4", data=texts, tokenizer=tokenizer)
trisparse.retrain(model, texts, tokenizer=tokenizer)
trisparse.save(model, "pruned")
"""

from importlib.metadata import version

from trisparse.retrain.perp import PERPConfig, retrain
from trisparse.retrain.report import RetrainReport
from trisparse.sparsity.calibration import BlocksNotChainedError
from trisparse.sparsity.checkpoint import CheckpointError, load, save
from trisparse.sparsity.mask import Mask, MaskError, check_masks, masks
from trisparse.sparsity.pattern import NM, Pattern, Rows, Unstructured
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.report import SparsityReport
from trisparse.sparsity.sparsify import sparsify

__version__ = version("trisparse")

__all__ = [
    "NM",
    "BlocksNotChainedError",
    "CheckpointError",
    "Mask",
    "MaskError",
    "PERPConfig",
    "Pattern",
    "RetrainReport",
    "Rows",
    "SparsityReport",
    "Unstructured",
    "check_masks",
    "load",
    "masks",
    "perplexity",
    "retrain",
    "save",
    "sparsify",
]
