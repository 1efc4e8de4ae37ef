"""The plugin of vLLM (entry point ``vllm.general_plugins``): it opens compressed checkpoints. See docs/vllm.md.

vLLM calls :func:`register` in each of its processes; nothing here imports vLLM before.
"""

from __future__ import annotations

METHOD = "trisparse"  # quant_method in the checkpoint's config.json


def register() -> None:
    """Tell vLLM of ``quant_method: "trisparse"``; a second call does nothing.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if METHOD not in QUANTIZATION_METHODS:
        from trisparse.vllm_layers import TrisparseConfig

        register_quantization_config(METHOD)(TrisparseConfig)
