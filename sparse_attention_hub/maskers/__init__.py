"""Maskers: one file a method. Importing this registers them all."""

import warnings

# `python -m sparse_attention_hub.maskers.quest` draws a mask: Python imports this package first, and would warn of it.
warnings.filterwarnings("ignore", message="'sparse_attention_hub.maskers", category=RuntimeWarning, module="runpy")

# ruff: noqa: E402
from .adaptive_sampling import AdaptiveSamplingMaskerConfig
from .base import Masker, MaskerConfig, register_masker
from .causal import CausalMaskerConfig
from .double_sparsity import DoubleSparsityTopKMaskerConfig
from .hash_attention import HashAttentionTopKMaskerConfig
from .local import LocalMaskerConfig
from .magic_pig import MagicPigConfig
from .oracle_top_k import OracleTopKConfig
from .oracle_top_p import OracleTopPMaskerConfig
from .pq_cache import PQCacheConfig
from .quest import QuestTopKMaskerConfig
from .random_sampling import RandomSamplingMaskerConfig
from .round_to_pages import RoundToPagesConfig
from .sink import SinkMaskerConfig

__all__ = [
    "AdaptiveSamplingMaskerConfig",
    "CausalMaskerConfig",
    "DoubleSparsityTopKMaskerConfig",
    "HashAttentionTopKMaskerConfig",
    "LocalMaskerConfig",
    "MagicPigConfig",
    "Masker",
    "MaskerConfig",
    "OracleTopKConfig",
    "OracleTopPMaskerConfig",
    "PQCacheConfig",
    "QuestTopKMaskerConfig",
    "RandomSamplingMaskerConfig",
    "RoundToPagesConfig",
    "SinkMaskerConfig",
    "register_masker",
]
