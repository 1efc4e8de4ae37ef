"""Opening the tokenizer of a model that somebody else may have made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder, or of a model id, without code of its own.

    Args:
        model: a folder, from which alone it is read then; or a model id.

    Raises:
        ValueError: it is code of its own, which is not run.
        OSError: there is none.
    """
    try:
        # False, for what is not given is asked of the user, who may wait for a prompt that nobody sees.
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=Path(model).is_dir())
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"the tokenizer of {model} is code of its own, which is not run") from error
