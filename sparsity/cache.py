"""The folder for what is made once and used again: converted models, gradient norms."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$TRISPARSE_CACHE``, else ``$XDG_CACHE_HOME/trisparse``, else ``~/.cache/trisparse``; it may not exist yet."""
    if chosen := os.environ.get("TRISPARSE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trisparse"
