"""Models: load one, prefill a context once, ask it many times under different attentions; the transformers plug-in.

Importing this package is cheap: transformers is imported when a model is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .load import LanguageModel as LanguageModel
    from .load import check_place as check_place
    from .load import load_model as load_model
    from .load import load_shape as load_shape
    from .load import load_tokenizer as load_tokenizer
    from .plugin import SparseSession as SparseSession
    from .plugin import sparse_attention as sparse_attention
    from .session import Answer as Answer
    from .session import Forced as Forced
    from .session import Prefilled as Prefilled
    from .session import answer as answer
    from .session import answer_many as answer_many
    from .session import estimate_bytes as estimate_bytes
    from .session import forced as forced
    from .session import forced_many as forced_many
    from .session import prefill as prefill

_NAMES = {
    "embedded": ("EMBEDDED_MODEL",),
    "load": ("LanguageModel", "check_place", "load_model", "load_shape", "load_tokenizer"),
    "plugin": ("SparseSession", "sparse_attention"),
    "session": ("Answer", "Forced", "Prefilled", "answer", "answer_many", "estimate_bytes", "forced", "forced_many", "prefill"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
