"""Where this library keeps files between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import UserError

#: What to do where the cache cannot be written.
SET_CACHE = "set SPARSE_ATTENTION_HUB_CACHE to a writable folder"


def cache_root() -> Path:
    """SPARSE_ATTENTION_HUB_CACHE, else the platform's cache folder. UserError if the user has no home folder."""
    try:
        return _cache_root()
    except RuntimeError as error:
        raise UserError(f"there is no home folder to keep files in ({error}): {SET_CACHE}") from None


def _cache_root() -> Path:
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
