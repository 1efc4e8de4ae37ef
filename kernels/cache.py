"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$TRISPARSE_CACHE``, else ``$XDG_CACHE_HOME/trisparse``, else ``~/.cache/trisparse``; it need not exist."""
    if chosen := os.environ.get("TRISPARSE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trisparse"
