"""The file of a benchmark that counts bounds from PTX: what it holds, how it was made, and with which versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

GPU = "A100-SXM-80GB"


def write_bounds(file: Path, module: str, results: Sequence[Any], **about: Any) -> None:
    """Write ``results`` of ``trisparse.bench.<module>`` to ``file``; ``about`` says what they go by, such as peaks."""
    content = {
        "what": f"bounds counted from PTX by emulation, for an {GPU}; nothing was measured on a GPU",
        "how": f"python -m trisparse.bench.{module} --json FILE",
        **about,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "results": results,
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
