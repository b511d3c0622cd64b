"""Sparse Attention Hub: composable sparse attention. See README.md for a first example.

Names load when first used, so that importing the package for its small parts stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "ResearchAttention": "attention",
    "ResearchAttentionConfig": "attention",
    "AttentionResult": "attention",
    "dense_attention": "attention",
    "Mask": "mask",
    "Masker": "maskers",
    "MaskerConfig": "maskers",
    "register_masker": "maskers",
    "Choice": "search_space",
    "Uniform": "search_space",
    "LogUniform": "search_space",
    "IntUniform": "search_space",
    "SinkMaskerConfig": "maskers",
    "LocalMaskerConfig": "maskers",
    "CausalMaskerConfig": "maskers",
    "OracleTopKConfig": "maskers",
    "OracleTopPMaskerConfig": "maskers",
    "QuestTopKMaskerConfig": "maskers",
    "DoubleSparsityTopKMaskerConfig": "maskers",
    "HashAttentionTopKMaskerConfig": "maskers",
    "PQCacheConfig": "maskers",
    "MagicPigConfig": "maskers",
    "RandomSamplingMaskerConfig": "maskers",
    "AdaptiveSamplingMaskerConfig": "maskers",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
