"""Maskers: one file a method. Importing this registers them all."""

import warnings

# `python -m sparse_attention_hub.maskers.quest` draws a mask: Python imports this package first, and would warn of it.
warnings.filterwarnings("ignore", message="'sparse_attention_hub.maskers", category=RuntimeWarning, module="runpy")

# ruff: noqa: E402
from .adaptive_sampling import AdaptiveSamplingMaskerConfig
from .base import Masker, MaskerConfig, register_masker
from .causal import CausalMaskerConfig
from .clusters import ClustersConfig
from .context_summary import ContextSummary
from .double_sparsity import DoubleSparsityTopKMaskerConfig
from .duo_attention import DuoAttentionConfig
from .expected_attention import ExpectedAttentionConfig
from .h2o import H2OConfig
from .hash_attention import HashAttentionTopKMaskerConfig
from .key_diff import KeyDiffConfig
from .knorm import KnormConfig
from .landmarks import LandmarksConfig
from .local import LocalMaskerConfig
from .loki import LokiConfig
from .magic_pig import MagicPigConfig
from .oracle_top_k import OracleTopKConfig
from .oracle_top_p import OracleTopPMaskerConfig
from .pq_cache import PQCacheConfig
from .quest import QuestTopKMaskerConfig
from .random_sampling import RandomSamplingMaskerConfig
from .round_to_pages import RoundToPagesConfig
from .sink import SinkMaskerConfig
from .snap_kv import SnapKVConfig
from .socket_lsh import SocketConfig
from .sparq import SparqConfig
from .tova import TOVAConfig
from .twilight import TwilightConfig

__all__ = [
    "AdaptiveSamplingMaskerConfig",
    "CausalMaskerConfig",
    "ClustersConfig",
    "ContextSummary",
    "DoubleSparsityTopKMaskerConfig",
    "DuoAttentionConfig",
    "ExpectedAttentionConfig",
    "H2OConfig",
    "HashAttentionTopKMaskerConfig",
    "KeyDiffConfig",
    "KnormConfig",
    "LandmarksConfig",
    "LocalMaskerConfig",
    "LokiConfig",
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
    "SnapKVConfig",
    "SocketConfig",
    "SparqConfig",
    "TOVAConfig",
    "TwilightConfig",
    "register_masker",
]
