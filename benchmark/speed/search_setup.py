"""What the scripts that measure Phase 1 share: arguments, configurations, settings and studies."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparse_attention_hub as hub
from benchmark.settings import Settings
from benchmark.speed.common import MODEL, new_parser

if TYPE_CHECKING:
    from benchmark.search.study import Study
    from benchmark.search.trial import Evaluator

LEVELS = (5, 10, 25, 50)
BATCH = 8


def search_parser(docstring: str | None, *, task: str, requests: int, tokens: int = 20) -> argparse.ArgumentParser:
    parser = new_parser(docstring)
    parser.add_argument("--model", default=MODEL, help="model id (default: %(default)s)")
    parser.add_argument("--task", help=f"task (default: ruler/LENGTH/{task})")
    parser.add_argument("--requests", type=int, default=requests, help="recorded requests (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=tokens, help="new tokens at most (default: %(default)s)")
    return parser


def search_settings(options: argparse.Namespace, **changes: Any) -> Settings:
    settings = Settings(
        models=(options.model,),
        tasks=(options.task,),
        device="cpu",
        search_max_requests=options.requests,
        search_max_context_length=options.length,
        search_max_new_tokens=options.tokens,
    )
    return dataclasses.replace(settings, **changes)


def template(family: str, budget: float) -> hub.ResearchAttentionConfig:
    """The configuration that a search of this family starts from at a density budget."""
    from sparse_attention_hub.maskers.hat_weights import hat_config_fields, hat_weights_for

    ends = [hub.SinkMaskerConfig(sink_size=0.01), hub.LocalMaskerConfig(window_size=0.01)]
    rest = budget - 0.02
    sampler = hub.AdaptiveSamplingMaskerConfig(
        base_rate_sampling=rest / 3, epsilon=0.2, delta=0.2, init_offset=0, local_offset=0
    )
    sizes: dict[str, Any] = hat_config_fields(hat_weights_for(MODEL) or "")
    tails: dict[str, list[Any]] = {
        "oracle_top_k": [hub.OracleTopKConfig(heavy_size=rest)],
        "adaptive_sampling": [hub.OracleTopKConfig(heavy_size=rest / 3), sampler],
        "random_sampling": [hub.RandomSamplingMaskerConfig(sampling_rate=rest)],
        "oracle_top_p": [hub.OracleTopPMaskerConfig(top_p=min(0.9, 0.3 + 1.5 * budget))],
        "quest": [hub.QuestTopKMaskerConfig(heavy_size=rest, page_size=16)],
        "double_sparsity": [hub.DoubleSparsityTopKMaskerConfig(rest, sorted_channel_file=None)],
        "hash_attention": [hub.HashAttentionTopKMaskerConfig(heavy_size=rest, **sizes)],
        "pq_cache": [hub.PQCacheConfig(rest, 4, 6, 10, 4, "euclidean")],
        "magic_pig": [hub.MagicPigConfig(lsh_l=32, lsh_k=8)],
    }
    return hub.ResearchAttentionConfig([*ends, *tails[family]])


def random_configs(family: str, count: int, seed: int) -> list[hub.ResearchAttentionConfig]:
    """Configurations drawn from the family's search space, the same for the same seed."""
    import numpy as np

    from benchmark.search.space import CombinationSpace

    space = CombinationSpace(template(family, 0.25), "task")
    domains = space.ray_space()
    state = np.random.RandomState(seed)
    return [space.build({name: domain.sample(random_state=state) for name, domain in domains.items()}) for _ in range(count)]


def new_study(
    family: str, evaluator: Evaluator, folder: Path, *, num_samples: int, seed: int, head_budgets: str = "off"
) -> Study:
    """A study of all LEVELS, without a time limit; its journal is written into the folder."""
    from benchmark.search.space import CombinationSpace
    from benchmark.search.study import Study
    from benchmark.search.trial import Level
    from benchmark.storage.results import Journal

    levels = [Level(f"{family}_{level}pct", level / 100, template(family, level / 100)) for level in LEVELS]
    space = CombinationSpace(levels[0].template, "task")
    sizes: dict[str, Any] = {"num_samples": num_samples, "timeout": 1e9, "seed": seed, "head_budgets": head_budgets}
    return Study(space, levels, evaluator, Journal(folder / "journal.jsonl"), **sizes)


def figures_of(evaluator: Evaluator, configs: Sequence[hub.ResearchAttentionConfig], rung: int) -> list[tuple[float, float]]:
    """(error, density) of each configuration on a rung of the replay."""
    figures = []
    for found in evaluator.evaluate(list(configs), rung, 1e9):
        assert found is not None and found.error is not None, "a figure is not finite"
        figures.append((found.error, found.density))
    return figures
