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

_HOME = {
    "LanguageModel": "load",
    "load_model": "load",
    "check_place": "load",
    "load_shape": "load",
    "load_tokenizer": "load",
    "EMBEDDED_MODEL": "embedded",
    "SparseSession": "plugin",
    "sparse_attention": "plugin",
    "Answer": "session",
    "Forced": "session",
    "Prefilled": "session",
    "answer": "session",
    "answer_many": "session",
    "estimate_bytes": "session",
    "forced": "session",
    "forced_many": "session",
    "prefill": "session",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
