"""The settings of papers: `preset("quest")`, `preset("snapkv", budget=2048)`. One function per paper; its docstring says where the
settings are from.

A preset names its budget: keys in tokens (quest_1024), a share of all keys (loki_25pct), or a share beside sizes in tokens, which is
no density (socket_0.0422). A search leaves it as it is. On the command line: `--configs preset:quest preset:cluster_kv:2048`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from . import maskers as hub
from .attention import ResearchAttentionConfig
from .errors import UserError, quoted
from .maskers.base import MaskerConfig, check_int, check_size

Protocol = Literal["question", "decode"]


@dataclass(frozen=True)
class Preset:
    """name: with the budget. paper: its address. sparse_from: the paper's protocol, or of the two the one nearer to it: what is
    attended to sparsely, question and answer, or the answer alone."""

    name: str
    paper: str
    config: ResearchAttentionConfig
    sparse_from: Protocol


def preset(name: str, **options: Any) -> Preset:
    """The settings of a paper. options: those of its function, mostly `budget`. UserError for a name or an option that there is
    not, or a bad budget."""
    if name not in PAPERS:
        raise UserError(f"unknown preset {quoted(name)}; there are {', '.join(PAPERS)}")
    known = inspect.signature(PAPERS[name]).parameters
    for option in options:
        if option not in known:
            raise UserError(f"preset {name} has no {option}; it has {', '.join(known) or 'no options'}")
    try:
        return PAPERS[name](**options)
    except ValueError as error:
        raise UserError(f"preset {name}: {error}") from None


def streaming_llm(budget: int = 1024) -> Preset:
    """StreamingLLM, table 1: 4 sinks and 1020 recent keys. The paper attends sparsely from the first token on."""
    maskers = [hub.SinkMaskerConfig(4), hub.LocalMaskerConfig(_tokens(budget, 5) - 4)]
    return _preset("streaming_llm", budget, "2309.17453", maskers, "question")


def quest(budget: int = 1024) -> Preset:
    """Quest, LongBench: pages of 16 keys, the first two layers dense; its program feeds the question as if it were decoded."""
    maskers = [hub.QuestTopKMaskerConfig(_tokens(budget), page_size=16)]
    return _preset("quest", budget, "2406.10774", maskers, "question", dense=[0, 1])


def double_sparsity(budget: int | float = 1 / 16) -> Preset:
    """Double Sparsity, main results: a sixteenth of the keys by a sixteenth of the channels, in 4 bits."""
    maskers = [hub.DoubleSparsityTopKMaskerConfig(budget, None, group_factor=16, label_bits=4)]
    return _preset("double_sparsity", budget, "2408.07092", maskers, "decode")


def hash_attention(budget: int | float = 1 / 16) -> Preset:
    """HashAttention, abstract: 16 times fewer keys by 32 bits per key. Its authors' later program adds 128 sinks and a window of
    128. The sizes of the networks are those of the model's weights."""
    edges: list[MaskerConfig] = [hub.SinkMaskerConfig(128), hub.LocalMaskerConfig(128)]
    maskers = [*edges, hub.HashAttentionTopKMaskerConfig(budget, 32, 3, 128, "silu")]
    return _preset("hash_attention", f"{budget:g}", "2412.14468", maskers, "question")


def pq_cache(budget: float = 0.2) -> Preset:
    """PQCache, LongBench with a fifth of the keys: half of them recent, half chosen by 2 sub-vectors of 6 bits; 32 sinks (the
    authors' run_mistral.sh). The question is prefilled."""
    half = _half(budget)
    edges: list[MaskerConfig] = [hub.SinkMaskerConfig(32), hub.LocalMaskerConfig(half)]
    maskers = [*edges, hub.PQCacheConfig(half, 2, 6, kmeans_iter=25, init_offset=32, metric="euclidean")]
    return _preset("pq_cache", f"{budget:g}", "2407.12820", maskers, "decode")


def magic_pig(lsh_k: int = 10, lsh_l: int = 150) -> Preset:
    """MagicPIG, Llama-3.1-8B: (K, L) = (10, 150), a match in two tables, 4 sinks and 64 recent keys, layers 0 and 16 dense."""
    edges: list[MaskerConfig] = [hub.SinkMaskerConfig(4), hub.LocalMaskerConfig(64)]
    maskers = [*edges, hub.MagicPigConfig(lsh_l, lsh_k, min_matches=2)]
    return _preset("magic_pig", f"k{lsh_k}_l{lsh_l}", "2410.16179", maskers, "decode", dense=[0, 16])


def vattention(budget: float = 0.1) -> Preset:
    """vAttention, the example of its authors' program: 128 sinks, a window of 128, the oracle's tenth of the keys, then samples
    from a tenth as base for epsilon = delta = 0.25. budget: of the oracle; the samples come on top."""
    check_size("budget", budget)
    edges: list[MaskerConfig] = [hub.SinkMaskerConfig(128), hub.LocalMaskerConfig(128)]
    sampler = hub.AdaptiveSamplingMaskerConfig(0.1, 0.25, 0.25, init_offset=128, local_offset=128)
    maskers = [*edges, hub.OracleTopKConfig(budget), sampler]
    return _preset("vattention", f"{budget:g}", "2510.05688", maskers, "question")


def twilight(budget: int = 8192, top_p: float = 0.85) -> Preset:
    """Twilight on Quest, LongBench with LongChat-7B (the authors' config_quest_twi.json): 8192 candidates in pages of 16, p = 0.85
    by 4-bit keys, the first two layers dense. The paper takes p = 0.95 for Llama."""
    maskers = [hub.QuestTopKMaskerConfig(_tokens(budget), page_size=16), hub.TwilightConfig(top_p, label_bits=4)]
    return _preset("twilight", budget, "2502.02770", maskers, "question", dense=[0, 1])


def duo_attention(budget: float = 0.5, pattern_file: str | None = None) -> Preset:
    """DuoAttention, models with grouped queries: half of the kv heads see everything, the others 64 sinks and 256 recent keys.
    pattern_file: the published full_attention_heads.tsv of the model; None finds the heads by their attention instead. The
    paper's streaming heads are sparse in the prefill too."""
    edges: list[MaskerConfig] = [hub.SinkMaskerConfig(64), hub.LocalMaskerConfig(256)]
    maskers = [*edges, hub.DuoAttentionConfig(budget, pattern_file)]
    return _preset("duo_attention", f"{budget:g}", "2410.10819", maskers, "question")


def socket(budget: int | float = 0.0422) -> Preset:
    """SOCKET, RULER-32k at 20x (the authors' Llama-3.1-8B-Instruct-inference-ruler.json): 60 tables of 10 bits, tau = 0.4, 128 sinks
    and a window of 128; with them the budget makes 5% of 32k keys. The prompt is prefilled."""
    edges: list[MaskerConfig] = [hub.SinkMaskerConfig(128), hub.LocalMaskerConfig(128)]
    maskers = [*edges, hub.SocketConfig(budget, lsh_l=60, lsh_k=10, tau=0.4)]
    return _preset("socket", f"{budget:g}", "2602.06283", maskers, "decode")


def sparq(budget: int = 128) -> Preset:
    """SparQ: k = 128 keys, of which k/4 are recent, chosen by r = 32 channels. Without the mean value that the paper adds."""
    recent = _tokens(budget, 4) // 4
    maskers = [hub.LocalMaskerConfig(recent), hub.SparqConfig(budget - recent, channels=32)]
    return _preset("sparq", budget, "2312.04985", maskers, "decode")


def loki(budget: int | float = 0.25) -> Preset:
    """Loki: a quarter of the keys by a quarter of the principal components (k_f = d_f = 0.25)."""
    return _preset("loki", budget, "2406.02542", [hub.LokiConfig(budget, None, 0.25)], "decode")


def shadow_kv(budget: int = 2048) -> Preset:
    """ShadowKV's choice of keys: 2048 by landmarks of 8 keys, and 32 recent ones. Its keys of low rank and its outliers are no
    choice of keys, and left out."""
    maskers = [hub.LocalMaskerConfig(32), hub.LandmarksConfig(_tokens(budget), page_size=8)]
    return _preset("shadow_kv", budget, "2410.21465", maskers, "decode")


def cluster_kv(budget: int = 1024) -> Preset:
    """ClusterKV: clusters of 80 keys on average, 16 sinks; dense layers and protocol are Quest's, its baseline."""
    maskers = [hub.SinkMaskerConfig(16), hub.ClustersConfig(_tokens(budget, 17) - 16, cluster_size=80)]
    return _preset("cluster_kv", budget, "2412.03213", maskers, "question", dense=[0, 1])


def snapkv(budget: int = 1024) -> Preset:
    """SnapKV, LongBench: 1024 keys of the prompt by its last 32 queries, pooled over 7 neighbours; generated keys all stay."""
    maskers = [hub.SnapKVConfig(_tokens(budget, 33), window_size=32, kernel_size=7)]
    return _preset("snapkv", budget, "2404.14469", maskers, "decode")


def h2o(budget: float = 0.2) -> Preset:
    """H2O: a fifth of the keys, half heavy hitters and half recent. The paper is sparse from the first token on."""
    half = _half(budget)
    maskers = [hub.LocalMaskerConfig(half), hub.H2OConfig(half)]
    return _preset("h2o", budget, "2306.14048", maskers, "question")


def tova(budget: int = 512) -> Preset:
    """TOVA, abstract: an eighth of a cache of 4096 keys. The paper is sparse from the first token on."""
    return _preset("tova", budget, "2401.06104", [hub.TOVAConfig(_tokens(budget))], "question")


def key_diff(budget: int = 8192) -> Preset:
    """KeyDiff, abstract: 8192 keys on LongBench with Llama-3."""
    return _preset("key_diff", budget, "2504.15364", [hub.KeyDiffConfig(_tokens(budget))], "question")


def knorm(budget: float = 0.5) -> Preset:
    """The L2 norm of keys, abstract: half of the cache; the first two layers keep everything."""
    maskers = [hub.KnormConfig(budget)]
    return _preset("knorm", budget, "2406.11430", maskers, "question", dense=[0, 1])


def expected_attention(budget: float = 0.5) -> Preset:
    """Expected Attention (kvpress): half of the context, compressed before the question."""
    return _preset("expected_attention", budget, "2510.00636", [hub.ExpectedAttentionConfig(budget)], "question")


_FUNCTIONS: tuple[Callable[..., Preset], ...] = (
    *(streaming_llm, quest, double_sparsity, hash_attention, pq_cache, magic_pig, vattention, twilight, duo_attention, socket),
    *(sparq, loki, shadow_kv, cluster_kv, snapkv, h2o, tova, key_diff, knorm, expected_attention),
)
PAPERS = {function.__name__: function for function in _FUNCTIONS}


def _preset(
    name: str, budget: int | float | str, paper: str, maskers: list[Any], sparse_from: Protocol, dense: list[int] | None = None
) -> Preset:
    named = f"{100 * budget:g}pct" if isinstance(budget, float) else budget
    config = ResearchAttentionConfig(maskers, dense_layers=dense or [], fixed=True)
    return Preset(f"{name}_{named}", f"https://arxiv.org/abs/{paper}", config, sparse_from)


def _tokens(budget: int, least: int = 1) -> int:
    return check_int("budget (tokens)", budget, least)


def _half(budget: int | float) -> int | float:
    """Half of a budget in tokens, at least two, or of a fraction."""
    return check_int("budget (tokens)", budget, 2) // 2 if isinstance(check_size("budget", budget), int) else budget / 2
