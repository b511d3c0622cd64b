"""Where this library keeps files between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_root() -> Path:
    """SPARSE_ATTENTION_HUB_CACHE, else the platform's cache folder. RuntimeError if the user has no home folder."""
    chosen = os.environ.get("SPARSE_ATTENTION_HUB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ".cache"
    return base / "sparse-attention-hub"
