#!/usr/bin/env python3
"""Which sparse attention keeps your model's answers, at which budget? Search settings (Phase 1), then benchmark (Phase 2).

    python benchmark/raytune/run_full_benchmark.py --debug                          # a real small run: no GPU, no network
    python benchmark/raytune/run_full_benchmark.py                                  # what get_run_configuration() says
    python benchmark/raytune/run_full_benchmark.py --phase 1 --tasks ruler/4096     # search only
    python benchmark/raytune/run_full_benchmark.py --phase 2 --config-run run_20240315_143022
    python benchmark/raytune/run_full_benchmark.py --dry-run                        # the plan, without running it

What to run is edited in get_run_configuration() and get_all_sparse_configs() below, or chosen with --models, --tasks and
--configs. Exit code: 0 all done; 1 something failed (the summary says what); 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

DEBUG_MODEL = "embedded/SmolLM2-135M-Instruct"
LEVELS = (5, 10, 25, 50)
DEBUG_CONFIGS = [
    "dense",
    "sink_local_10pct",
    "sink_local_random_sampling_25pct",
    "sink_local_oracle_top_k_10pct",
    "sink_local_oracle_top_k_adaptive_sampling_10pct",
]


def get_run_configuration(debug: bool) -> dict[str, Any]:
    """What runs when the command line does not say otherwise. Edit here."""
    if debug:
        return {
            "models": [DEBUG_MODEL],
            "tasks": ["infinite_bench/passkey", "ruler/1024/niah_single_1", "ruler/1024/fwe"],
            "configs": DEBUG_CONFIGS,
            "num_samples": 12,
            "search_max_requests": 2,
            "search_max_context_length": 1024,
            "search_max_new_tokens": 16,
            "max_requests": 3,
            "max_context_length": 1024,
            "max_new_tokens": 32,
        }
    return {
        "models": ["meta-llama/Llama-3.1-8B-Instruct"],
        "tasks": [
            "infinite_bench/passkey",
            "ruler/4096",
            "loogle/longdep_qa",
            "loogle/shortdep_qa",
            "loogle/shortdep_cloze",
            "loogle/longdep_summarization",
            "zero_scrolls/default",
        ],
    }


def get_all_sparse_configs() -> list[tuple[str, Any, Any]]:
    """(name, template, masker classes) of every configuration. A `_Npct` in the name is its density budget.

    Templates are what a search tries first; what a masker's search space does not vary stays as the template has it.
    """
    from sparse_attention_hub import (
        AdaptiveSamplingMaskerConfig,
        DoubleSparsityTopKMaskerConfig,
        HashAttentionTopKMaskerConfig,
        LocalMaskerConfig,
        MagicPigConfig,
        OracleTopKConfig,
        OracleTopPMaskerConfig,
        PQCacheConfig,
        QuestTopKMaskerConfig,
        RandomSamplingMaskerConfig,
        ResearchAttentionConfig,
        SinkMaskerConfig,
    )

    def hash_attention(heavy: float) -> HashAttentionTopKMaskerConfig:
        # Without a hat_weight_file the model's own weights are used, and these sizes become theirs.
        return HashAttentionTopKMaskerConfig(heavy, 32, 3, 128, "silu")

    def pq_cache(heavy: float) -> PQCacheConfig:
        return PQCacheConfig(heavy, pq_group_factor=4, pq_bits=6, kmeans_iter=10, init_offset=4, metric="euclidean")

    configs: list[tuple[str, Any, Any]] = [("dense", None, None)]
    for level in LEVELS:
        # Sizes are fractions of what the last row sees. Earlier rows see less and attend to as much, so that their density is
        # higher: a twentieth is left for that, which keeps a template within its budget from 1k of context on.
        size = 0.95 * level / 100
        rest = size - 0.02  # what sink and local leave
        sink, local = SinkMaskerConfig(sink_size=0.01), LocalMaskerConfig(window_size=0.01)
        half = rest / 2  # base samples take a third, the samples that follow from them some of the last sixth
        adaptive = AdaptiveSamplingMaskerConfig(rest / 3, epsilon=0.3, delta=0.3, init_offset=0, local_offset=0)
        top_p = OracleTopPMaskerConfig(top_p={5: 0.4, 10: 0.55, 25: 0.75, 50: 0.9}[level])
        magic_pig = MagicPigConfig(lsh_l={5: 16, 10: 64, 25: 16, 50: 32}[level], lsh_k={5: 10, 10: 10, 25: 6, 50: 6}[level])
        # At least three pages are kept: of 1k keys, larger ones would be more than 5%.
        quest = QuestTopKMaskerConfig(heavy_size=rest, page_size=8 if level == 5 else 16)
        combinations: dict[str, list[Any]] = {
            "sink_local": [sink, LocalMaskerConfig(window_size=size - 0.01)],
            "sink_local_random_sampling": [sink, local, RandomSamplingMaskerConfig(sampling_rate=rest)],
            "sink_local_oracle_top_k": [sink, local, OracleTopKConfig(heavy_size=rest)],
            "sink_local_oracle_top_p": [sink, local, top_p],
            "sink_local_quest_top_k": [sink, local, quest],
            "sink_local_double_sparsity_top_k": [sink, local, DoubleSparsityTopKMaskerConfig(rest, sorted_channel_file=None)],
            "sink_local_hash_attention_top_k": [sink, local, hash_attention(rest)],
            "sink_local_pq_cache": [sink, local, pq_cache(rest)],
            "sink_local_magic_pig": [sink, local, magic_pig],
            "sink_local_oracle_top_k_adaptive_sampling": [sink, local, OracleTopKConfig(heavy_size=half), adaptive],
            "sink_local_hash_attention_top_k_adaptive_sampling": [sink, local, hash_attention(half), adaptive],
            "sink_local_pq_cache_adaptive_sampling": [sink, local, pq_cache(half), adaptive],
        }
        for name, maskers in combinations.items():
            config = ResearchAttentionConfig(masker_configs=maskers)
            configs.append((f"{name}_{level}pct", config, [type(masker) for masker in maskers]))
    return configs


def main(argv: list[str] | None = None) -> int:
    """Plan, Phase 1, Phase 2; the exit code."""
    options = parse_arguments(argv)
    from benchmark.command_line import fail
    from sparse_attention_hub.errors import UserError

    try:
        return run(options)
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:  # outside the two phases, which end in an order of their own
        print("\ninterrupted; the same command continues from what was finished", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """The whole story: settings, the plan, the search, the benchmark."""
    from benchmark.raytune import phases, plan

    settings = plan.make_settings(options, get_run_configuration(options.debug))
    configs = plan.choose_configs(
        get_all_sparse_configs(), options.configs or get_run_configuration(options.debug).get("configs")
    )
    tasks, notes = plan.expand_tasks(settings)
    if options.dry_run:
        print(plan.describe(settings, configs, tasks, notes))
        return 0
    plan.check_folders(settings)
    tokenizers = plan.check_models(settings)
    named = frozenset(options.configs or ())
    if settings.phases == (2,):
        phases.check_found(settings, configs, tasks, named)
    samples = plan.check_samples(settings, tasks, tokenizers)
    for name, why in samples.missing.items():
        print(f"left out {name}: {why}", file=sys.stderr)
        notes.append(f"FAILED {name}: {why}")
    search: phases.SearchResult | None = None
    failed = bool(samples.missing)
    if 1 in settings.phases:
        search = phases.search(settings, configs, samples, notes)
        if search.interrupted:
            return 130
        failed = failed or bool(search.failures)
    if 2 in settings.phases:
        outcome = phases.benchmark(settings, configs, samples.tasks, notes, named, search, tokenizers)
        if outcome.interrupted:
            return 130
        failed = failed or bool(outcome.failures)
    return 1 if failed else 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. None = not given: the run configuration, then the default in the help, decides."""
    from benchmark.command_line import Parser

    parser = Parser(prog="run_full_benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to run")
    what.add_argument("--phase", type=int, choices=(1, 2), help="1 = search, 2 = benchmark (both)")
    what.add_argument("--debug", action="store_true", help="a small real run: embedded model, no GPU, no network")
    what.add_argument("--models", nargs="+", metavar="ID", help="hub ids, local folders or embedded/...")
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="see `python -m benchmark.tasks list`; ruler/4096 is a group")
    what.add_argument("--configs", nargs="+", metavar="NAME", help="names or patterns (sink_local_*_10pct) of configurations")
    what.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    what.add_argument("--seed", type=int, help="of samples, searches and sampling maskers (0)")
    what.add_argument("--sparse-from", choices=("question", "decode"), help="from where attention is sparse (question)")

    search = parser.add_argument_group("Phase 1, search")
    search.add_argument("--force-search", action="store_true", help="search again what an earlier run found")
    search.add_argument("--num-samples", type=int, help="trials a budget level (50)")
    search.add_argument("--search-timeout", type=float, help="seconds a trial may take (900)")
    search.add_argument("--search-max-new-tokens", type=int, help="answer tokens of a tuning sample (20)")
    search.add_argument("--search-max-context-length", type=int, help="context tokens of a tuning sample (8192)")
    search.add_argument("--search-max-requests", type=int, help="tuning samples of a task (10)")
    search.add_argument("--objective", help="what configurations without a _Npct minimise: default, sparsity_5 ... sparsity_50")
    search.add_argument("--trace-budget-gb", type=float, help="disk for a (model, task)'s traces; layers are thinned to fit")

    bench = parser.add_argument_group("Phase 2, benchmark")
    bench.add_argument("--config-run", metavar="RUN", help="which search's results to use (the newest), as run_20240315_143022")
    bench.add_argument("--max-concurrent-benchmarks", type=int, help="workers, one a GPU (4); on a CPU one for every two cores")
    bench.add_argument(
        "--benchmark-timeout", type=float, help="seconds a (model, task) may take, then its workers are killed (7200)"
    )
    bench.add_argument("--max-new-tokens", type=int, help="answer tokens at most (200)")
    bench.add_argument("--max-context-length", type=int, help="prompt tokens at most; longer ones lose their middle (64000)")
    bench.add_argument("--max-requests", type=int, help="samples a task (all)")
    bench.add_argument("--micro-metrics", choices=("off", "sample", "full"), help="attention records a layer (sample)")
    bench.add_argument("--rescore", action="store_true", help="score recorded answers again without running a model")
    bench.add_argument("--force-benchmark", action="store_true", help="run again what is finished")

    places = parser.add_argument_group("where")
    places.add_argument("--optimal-configs-dir", type=Path, metavar="DIR", help="Phase 1 results (./optimal_configs)")
    places.add_argument("--benchmark-results-dir", type=Path, metavar="DIR", help="Phase 2 results (./benchmark_results)")
    places.add_argument("--ray-results-dir", type=Path, metavar="DIR", help="Ray's artefacts, journals, traces (./ray_results)")
    places.add_argument("--data-dir", type=Path, metavar="DIR", help="data sets as DIR/<benchmark>/<subset>.jsonl")
    places.add_argument("--ray-address", metavar="ADDRESS", help="of a Ray cluster to run on (a local one is started)")
    places.add_argument("--device", help="auto, cpu, cuda, cuda:N or sharded (auto)")
    places.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (auto: bfloat16 on a GPU, float32 on a CPU)")
    places.add_argument("--attention-backend", help="sparse kernels: auto, cpu, torch, triton or reference (auto)")
    places.add_argument("--dense-backend", help="dense prefill: auto, flash or sdpa (auto)")
    places.add_argument("--trust-remote-code", action="store_true", help="let models and data sets run code of their own")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
