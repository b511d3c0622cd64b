"""Models: load one, prefill a context once, ask it many times under different attentions; the transformers plug-in.

Importing this package is cheap: transformers is imported when a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .decoding import Answer, Forced
    from .embedded import EMBEDDED_MODEL
    from .load import LanguageModel, check_model, check_place, load_model, load_shape, load_tokenizer
    from .memory import estimate_bytes
    from .plugin import SparseSession, sparse_attention
    from .session import Prefilled, answer, answer_many, forced_and_answered, forced_many, prefill
else:  # hidden from type checkers, for which every unknown name would be Any

    def __getattr__(name: str) -> object:
        from importlib import import_module

        for module in ("embedded", "load", "session", "memory", "plugin") if name in __all__ else ():
            home = import_module(f".{module}", __name__)
            if hasattr(home, name):
                globals()[name] = getattr(home, name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["EMBEDDED_MODEL", "LanguageModel", "check_model", "check_place", "load_model", "load_shape", "load_tokenizer"]
__all__ += ["Answer", "Forced", "Prefilled", "answer", "answer_many", "estimate_bytes"]
__all__ += ["forced_and_answered", "forced_many", "prefill", "SparseSession", "sparse_attention"]
