"""Sparse Attention Hub: composable sparse attention. See README.md for a first example.

Public names load on first use: `import sparse_attention_hub` alone imports neither torch nor numba nor transformers.
"""

# ruff: noqa: I001  (sorted by hand, several names a line)
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention import AttentionResult, ResearchAttention, ResearchAttentionConfig, dense_attention
    from .errors import UserError
    from .found import best_config
    from .mask import Mask
    from .maskers import (
        AdaptiveSamplingMaskerConfig, CausalMaskerConfig, ClustersConfig, DoubleSparsityTopKMaskerConfig,
        DuoAttentionConfig, ExpectedAttentionConfig, H2OConfig, KeyDiffConfig, KnormConfig, SnapKVConfig, TOVAConfig,
        HashAttentionTopKMaskerConfig, LandmarksConfig, LokiConfig, SocketConfig, SparqConfig, TwilightConfig,
        LocalMaskerConfig, MagicPigConfig, OracleTopKConfig, OracleTopPMaskerConfig, PQCacheConfig,
        QuestTopKMaskerConfig, RandomSamplingMaskerConfig, RoundToPagesConfig, SinkMaskerConfig,
    )  # fmt: skip
    from .maskers.base import (
        Masker, MaskerConfig, TopKConfig, check_flag, check_int, check_number, check_size, register_masker,
    )  # fmt: skip
    from .maskers.context_summary import ContextSummary
    from .maskers.inputs import AttentionInputs
    from .maskers.state import AttentionState, MaskerState
    from .presets import Preset, preset
    from .search_space import Choice, IntUniform, LogUniform, Uniform
else:  # hidden from type checkers, for which every unknown name would be Any
    # Cheapest first: the first two import no torch.
    _MODULES = ("errors", "found", "search_space", "mask", "maskers", "maskers.base", "attention", "presets")

    def __getattr__(name: str) -> object:
        from importlib import import_module

        for module in _MODULES if name in __all__ else ():
            home = import_module(f".{module}", __name__)
            if hasattr(home, name):
                globals()[name] = getattr(home, name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__version__ = "0.1.0"
__all__ = [
    "AdaptiveSamplingMaskerConfig", "AttentionInputs", "AttentionResult", "AttentionState", "CausalMaskerConfig", "Choice",
    "ClustersConfig",
    "DoubleSparsityTopKMaskerConfig", "DuoAttentionConfig", "HashAttentionTopKMaskerConfig", "IntUniform", "LandmarksConfig", "LocalMaskerConfig",
    "LogUniform", "LokiConfig",
    "MagicPigConfig", "Mask", "Masker", "MaskerConfig", "MaskerState", "OracleTopKConfig", "OracleTopPMaskerConfig",
    "PQCacheConfig", "Preset", "QuestTopKMaskerConfig", "RandomSamplingMaskerConfig", "ResearchAttention", "ResearchAttentionConfig",
    "RoundToPagesConfig", "SinkMaskerConfig", "SocketConfig", "SparqConfig", "TopKConfig", "TwilightConfig", "Uniform", "UserError", "best_config", "check_flag", "check_int", "check_number", "check_size",
    "dense_attention", "preset", "register_masker", "ContextSummary", "ExpectedAttentionConfig", "H2OConfig", "KeyDiffConfig",
    "KnormConfig", "SnapKVConfig", "TOVAConfig",
]  # fmt: skip
