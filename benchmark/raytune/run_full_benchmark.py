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
import math
import signal
import sys
import threading
from collections.abc import Sequence
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
    "sink_local_quest_top_k_10pct",
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


def get_all_sparse_configs(levels: Sequence[float] = LEVELS, page_sizes: Sequence[int] = ()) -> list[tuple[str, Any, Any]]:
    """(name, template, masker classes) of every configuration. A `_Npct` in the name is its budget, one of `levels` (--levels).
    page_sizes: those that --configs names, as in sink_local_quest_top_k_pages16_10pct.

    Templates are what a search tries first; what a masker's search space does not vary stays as the template has it.
    """
    import sparse_attention_hub as hub

    def hash_attention(heavy: float) -> hub.HashAttentionTopKMaskerConfig:
        # Without a hat_weight_file the model's own weights are used, and these sizes become theirs.
        return hub.HashAttentionTopKMaskerConfig(heavy, 32, 3, 128, "silu")

    def pq_cache(heavy: float) -> hub.PQCacheConfig:
        return hub.PQCacheConfig(heavy, pq_group_factor=4, pq_bits=6, kmeans_iter=10, init_offset=4, metric="euclidean")

    def magic_pig(share: float) -> hub.MagicPigConfig:
        # So many tables that a key matches by chance in a share of one; the rarer, the more bits.
        bits = 12 if share < 0.05 else 10 if share < 0.25 else 6
        tables = min(share, 6.25 * share**2) * 2**bits
        return hub.MagicPigConfig(lsh_l=max(8, min(64, 2 ** int(math.log2(tables)))), lsh_k=bits)

    configs: list[tuple[str, Any, Any]] = [("dense", None, None)]
    for level in levels:
        # Sizes are fractions of the last row's keys. Earlier rows have fewer keys and attend to as many, so their density is
        # higher: a twentieth is reserved for that, which keeps a template within its budget from 1k of context on.
        size = 0.95 * level / 100
        edge = min(0.01, size / 4)
        rest = size - 2 * edge  # what sink and local leave
        sink, local = hub.SinkMaskerConfig(sink_size=edge), hub.LocalMaskerConfig(window_size=edge)
        evicted = max(rest / 4, rest - 0.02)  # evictions also keep all that follows the context: some 20 of 1k keys
        half = rest / 2  # base samples take a third, the samples that follow from them some of the last sixth
        adaptive = hub.AdaptiveSamplingMaskerConfig(rest / 3, epsilon=0.3, delta=0.3, init_offset=0, local_offset=0)
        odds = 7 * (size / (1 - size)) ** 0.8  # of the mass that the highest keys of this share hold
        top_p = hub.OracleTopPMaskerConfig(top_p=odds / (1 + odds))
        # At least three pages are kept: of 1k keys, larger ones would be more than 5%.
        quest = hub.QuestTopKMaskerConfig(heavy_size=rest, page_size=8 if level <= 5 else 16)
        many = hub.QuestTopKMaskerConfig(heavy_size=min(0.95, 3 * rest), page_size=16)  # candidates, of which few stay
        dropped = min(0.005 / size, 0.0006 / size**2)  # the mass that Twilight drops: little of it is in the lowest keys
        double_sparsity = hub.DoubleSparsityTopKMaskerConfig(rest, sorted_channel_file=None)
        combinations: dict[str, list[Any]] = {
            "sink_local": [sink, hub.LocalMaskerConfig(window_size=size - edge)],
            "sink_local_random_sampling": [sink, local, hub.RandomSamplingMaskerConfig(sampling_rate=rest)],
            "sink_local_oracle_top_k": [sink, local, hub.OracleTopKConfig(heavy_size=rest)],
            "sink_local_oracle_top_p": [sink, local, top_p],
            "sink_local_quest_top_k": [sink, local, quest],
            "sink_local_double_sparsity_top_k": [sink, local, double_sparsity],
            "sink_local_hash_attention_top_k": [sink, local, hash_attention(rest)],
            "sink_local_pq_cache": [sink, local, pq_cache(rest)],
            "sink_local_landmarks": [sink, local, hub.LandmarksConfig(heavy_size=rest, page_size=8)],
            "sink_local_sparq": [sink, local, hub.SparqConfig(heavy_size=rest, channels=0.25)],
            "sink_local_loki": [sink, local, hub.LokiConfig(heavy_size=rest, axes_file=None, components=0.25)],
            "sink_local_clusters": [sink, local, hub.ClustersConfig(heavy_size=rest, cluster_size=16)],
            "sink_local_snap_kv": [sink, local, hub.SnapKVConfig(evicted, window_size=8 if level <= 5 else 32)],
            "sink_local_expected_attention": [sink, local, hub.ExpectedAttentionConfig(evicted)],
            "sink_local_key_diff": [sink, local, hub.KeyDiffConfig(evicted)],
            "sink_local_knorm": [sink, local, hub.KnormConfig(evicted)],
            "sink_local_h2o": [sink, local, hub.H2OConfig(evicted)],
            "sink_local_tova": [sink, local, hub.TOVAConfig(evicted)],
            "sink_local_duo_attention": [sink, local, hub.DuoAttentionConfig(retrieval_share=rest, pattern_file=None)],
            "sink_local_socket": [sink, local, hub.SocketConfig(heavy_size=rest, tau=0.1)],
            "sink_local_quest_top_k_twilight": [sink, local, many, hub.TwilightConfig(top_p=max(0.5, 1 - dropped))],
            "sink_local_magic_pig": [sink, local, magic_pig(level / 100)],
            "sink_local_oracle_top_k_adaptive_sampling": [sink, local, hub.OracleTopKConfig(heavy_size=half), adaptive],
            "sink_local_hash_attention_top_k_adaptive_sampling": [sink, local, hash_attention(half), adaptive],
            "sink_local_pq_cache_adaptive_sampling": [sink, local, pq_cache(half), adaptive],
        }
        for name, maskers in combinations.items():
            config = hub.ResearchAttentionConfig(masker_configs=maskers)
            configs.append((f"{name}_{level:g}pct", config, [type(masker) for masker in maskers]))
    if page_sizes:
        from benchmark.raytune.configurations import pages_of

        configs += pages_of(get_all_sparse_configs([level / 4 for level in levels]), page_sizes)
    return configs


def main(argv: list[str] | None = None) -> int:
    """Plan, Phase 1, Phase 2; the exit code."""
    from benchmark.command_line import run_command

    options = parse_arguments(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; the two phases handle both themselves
    try:
        return run_command(lambda: run(options))
    except KeyboardInterrupt:  # outside the two phases, which handle it themselves
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Settings, the plan, the search, the benchmark."""
    from benchmark.plugins import load_plugins
    from benchmark.raytune import configurations, plan

    configuration = get_run_configuration(options.debug)
    levels = configurations.check_levels(options.levels or configuration.get("levels", LEVELS))
    entries = get_all_sparse_configs(levels, configurations.page_sizes(options.configs or configuration.get("configs") or ()))
    for plugin in load_plugins(options.plugin or ()):
        entries += configurations.configs_of_plugin(plugin, levels)
    if options.configs == ["list"]:
        from sparse_attention_hub.presets import PAPERS

        print("\n".join([*(name for name, _, _ in entries), *(f"preset:{paper}" for paper in PAPERS)]))
        return 0
    presets, protocol = configurations.take_presets(options)
    entries += presets
    settings = plan.make_settings(options, configuration)
    wanted = configuration.get("configs")
    configs = configurations.choose_configs(
        entries, options.configs or (configurations.at_levels(wanted, levels) if options.levels else wanted)
    )
    configs, notes = configurations.leave_out_oracles(configs, settings)
    tasks, incomplete = plan.expand_tasks(settings)
    notes += [*protocol, *incomplete]
    plan.check_folders(settings)
    tokenizers = plan.check_models(settings)
    notes += plan.template_notes(settings, tasks, tokenizers) + plan.length_notes(settings, tasks, tokenizers)
    named = frozenset(options.configs or ())
    if settings.phases == (2,):
        from benchmark.execution.search_results import find_units

        find_units(settings, configs, tasks, named)
    samples = plan.check_samples(settings, tasks, tokenizers)
    for name, why in samples.missing.items():
        print(f"left out {name}: {why}", file=sys.stderr)
        notes.append(f"FAILED {name}: {why}")
    failed = bool(samples.missing)
    if options.dry_run:
        print(plan.describe(settings, configs, samples, notes))
        return int(failed)
    from benchmark.raytune import phases

    search: phases.SearchResult | None = None
    if 1 in settings.phases:
        search = phases.search(settings, configs, samples, notes)
        if search.interrupted:
            return 130
        failed = failed or bool(search.failures)
    if 2 in settings.phases:
        summary = phases.benchmark(settings, configs, samples.tasks, notes, named, search, tokenizers)
        if summary.interrupted:
            return 130
        failed = failed or bool(summary.failures)
    return int(failed)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. None = not given: the run configuration, then the default in the help, decides."""
    from benchmark.command_line import Parser, folder, text

    parser = Parser(prog="run_full_benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to run").add_argument
    add("--phase", type=int, choices=(1, 2), help="1 = search, 2 = benchmark (both)")
    add("--debug", action="store_true", help="a small real run: embedded model, no GPU, no network")
    add("--models", type=text, nargs="+", metavar="ID", help="hub ids, local folders or embedded/...")
    add("--tasks", type=text, nargs="+", metavar="TASK", help="see `python -m benchmark.tasks list`; ruler/4096 is a group")
    add(
        "--configs",
        type=text,
        nargs="+",
        metavar="NAME",
        help="names or patterns (sink_local_*_10pct), preset:quest; list = print all names",
    )
    add("--levels", type=float, nargs="+", metavar="PERCENT", help="budgets of the configurations (5 10 25 50); 0.5 is allowed")
    add("--budget-on", choices=("density", "kv"), help="_10pct = 10%% of the keys, or of the dense KV bytes (density)")
    add("--plugin", type=text, action="append", metavar="FILE", help="a .py file or module of your own; can be repeated")
    add("--dry-run", action="store_true", help="check everything, print the plan and stop")
    add("--seed", type=int, help="of samples, searches and sampling maskers (0)")
    add("--sparse-from", choices=("question", "decode"), help="from where attention is sparse (question)")
    add("--thinking", choices=("auto", "off", "on"), help="for chat templates that know it (auto: the template's default)")

    add = parser.add_argument_group("Phase 1, search").add_argument
    add("--force-search", action="store_true", help="search again what an earlier run found")
    add("--num-samples", type=int, help="trials per budget level (50)")
    add("--search-timeout", type=float, help="seconds per trial (900)")
    add("--search-max-new-tokens", type=int, help="answer tokens of a tuning sample (20)")
    add("--search-max-context-length", type=int, help="context tokens of a tuning sample (8192)")
    add("--search-max-requests", type=int, help="tuning samples per task (10)")
    add("--objective", help="what configurations without _Npct minimise: default, sparsity_5 ... sparsity_50")
    add(
        "--head-budgets",
        choices=("off", "layer", "kv_head", "head"),
        help="fit uneven budgets, a factor for each ... (kv_head)",
    )
    add("--trace-budget-gb", type=float, help="disk for the traces of a (model, task); layers are thinned to fit")

    add = parser.add_argument_group("Phase 2, benchmark").add_argument
    add("--config-run", type=text, metavar="RUN", help="which search to use (the newest of each), as run_20240315_143022")
    add("--max-concurrent-benchmarks", type=int, help="workers at most; default one per GPU, on a CPU one per two cores")
    add("--benchmark-timeout", type=float, help="seconds per (model, task), then its workers are killed (7200)")
    add("--max-new-tokens", type=int, help="answer tokens at most, thinking included (200)")
    add("--max-context-length", type=int, help="prompt tokens at most; longer ones lose their middle (64000)")
    add("--max-requests", type=int, help="samples per task (all)")
    add("--micro-metrics", choices=("off", "sample", "full"), help="attention records per layer (sample)")
    add("--rescore", action="store_true", help="score recorded answers again without running a model")
    add("--force-benchmark", action="store_true", help="run again what is finished")

    add = parser.add_argument_group("where").add_argument
    add("--optimal-configs-dir", type=folder, metavar="DIR", help="Phase 1 results (./optimal_configs)")
    add("--benchmark-results-dir", type=folder, metavar="DIR", help="Phase 2 results (./benchmark_results)")
    add("--ray-results-dir", type=folder, metavar="DIR", help="Ray's artefacts, journals, traces (./ray_results)")
    add("--data-dir", type=folder, metavar="DIR", help="data sets as DIR/<benchmark>/<subset>.jsonl")
    add("--ray-address", type=text, metavar="ADDRESS", help="of a Ray cluster to run on (a local one is started)")
    add("--device", help="auto, cpu, cuda, cuda:N or sharded (auto)")
    add("--dtype", help="auto, float32, bfloat16 or float16 (auto: bfloat16 on a GPU, float32 on a CPU)")
    add("--attention-backend", help="sparse kernels: auto, cpu, torch, triton or reference (auto)")
    add("--dense-backend", help="dense prefill: auto, flash or sdpa (auto)")
    add("--trust-remote-code", action="store_true", help="let models and data sets run code of their own")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
