"""Maskers: one file a method. Importing this registers them all."""

import warnings

# `python -m sparse_attention_hub.maskers.quest` draws a mask: Python imports this package first, and would warn of it.
warnings.filterwarnings("ignore", message="'sparse_attention_hub.maskers", category=RuntimeWarning, module="runpy")

# ruff: noqa: E402
from .adaptive_sampling import AdaptiveSamplingMasker, AdaptiveSamplingMaskerConfig
from .base import Masker, MaskerConfig, register_masker
from .causal import CausalMasker, CausalMaskerConfig
from .double_sparsity import DoubleSparsityTopKMasker, DoubleSparsityTopKMaskerConfig
from .hash_attention import HashAttentionTopKMasker, HashAttentionTopKMaskerConfig
from .local import LocalMasker, LocalMaskerConfig
from .magic_pig import MagicPigConfig, MagicPigMasker
from .oracle_top_k import OracleTopK, OracleTopKConfig
from .oracle_top_p import OracleTopP, OracleTopPMaskerConfig
from .pq_cache import PQCacheConfig, PQCacheMasker
from .quest import QuestTopKMasker, QuestTopKMaskerConfig
from .random_sampling import RandomSamplingMasker, RandomSamplingMaskerConfig
from .sink import SinkMasker, SinkMaskerConfig

__all__ = [
    "AdaptiveSamplingMasker",
    "AdaptiveSamplingMaskerConfig",
    "CausalMasker",
    "CausalMaskerConfig",
    "DoubleSparsityTopKMasker",
    "DoubleSparsityTopKMaskerConfig",
    "HashAttentionTopKMasker",
    "HashAttentionTopKMaskerConfig",
    "LocalMasker",
    "LocalMaskerConfig",
    "MagicPigConfig",
    "MagicPigMasker",
    "Masker",
    "MaskerConfig",
    "OracleTopK",
    "OracleTopKConfig",
    "OracleTopP",
    "OracleTopPMaskerConfig",
    "PQCacheConfig",
    "PQCacheMasker",
    "QuestTopKMasker",
    "QuestTopKMaskerConfig",
    "RandomSamplingMasker",
    "RandomSamplingMaskerConfig",
    "SinkMasker",
    "SinkMaskerConfig",
    "register_masker",
]
