"""What pages cost: a found configuration as it is, and rounded to the whole pages that an engine reads.

    python -m benchmark.rounding optimal_configs/run_20260131_120000/NAME_10pct.json [FILE ...]

Each configuration runs on the tuning samples of its search: error, density and KV bytes are those of a forced forward, the score
is that of generated answers. "for each kv head": one page table for the query heads of a kv head; "layer": one for all heads.
Traces of the search are reused if they are still there, else recorded again. Exit code: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.command_line import Parser, folder, run_command
from sparse_attention_hub.errors import UserError

if TYPE_CHECKING:
    from benchmark.search.evaluator import TraceEvaluator
    from benchmark.settings import Settings
    from benchmark.storage.search_records import BestConfig, Evaluation
    from sparse_attention_hub import ResearchAttentionConfig

PAGE_SIZES = (1, 8, 16, 64)
SHARES = ("kv_head", "layer")
_FORCED, _GENERATED, _SECONDS = 2, 3, 900.0


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmark.rounding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=folder, metavar="FILE", help="best configurations of a search")
    parser.add_argument(
        "--ray-results-dir", type=folder, default="ray_results", metavar="DIR", help="where traces are (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--data-dir", type=folder, metavar="DIR", help="data of your own, as in the search")
    parser.add_argument("--plugin", nargs="+", default=[], metavar="FILE", help="plugins of the search")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code of the model's repository")
    options = vars(parser.parse_args(arguments))
    files, results = options.pop("files"), options.pop("ray_results_dir")
    return run_command(lambda: print_tables(files, results, **options))


def print_tables(files: list[Path], results: Path, plugin: Sequence[str] = (), **options: Any) -> int:
    """Print a table for each file, as Markdown. options: fields of Settings. Returns the exit code."""
    from benchmark.plugins import load_plugins
    from benchmark.storage.records import read_record
    from benchmark.storage.search_records import BestConfig

    load_plugins(plugin)
    bests = [read_record(file, BestConfig, "give a best configuration of a search") for file in files]
    variants = [page_variants(file) for file in files]
    evaluator: TraceEvaluator | None = None
    for best, configs in zip(bests, variants, strict=True):
        settings = search_settings(best, results, **options)
        if evaluator is None or evaluator.settings != settings:
            evaluator = _evaluator(settings, evaluator)
        if [entry.sample.sample_id for entry in evaluator.samples] != best.provenance.samples:
            raise UserError(
                f"{best.masker_name} was searched on other samples of {best.task} than there are now: give the search's --data-dir, "
                "or search again"
            )
        print(table(best, evaluator, configs), flush=True)
    return 0


def page_variants(file: Path) -> dict[tuple[int, str] | None, ResearchAttentionConfig]:
    """(page size, share) -> the configuration rounded to such pages; None -> as found, without any rounding.

    UserError for a file that holds no configuration, or one that samples.
    """
    from sparse_attention_hub import ResearchAttentionConfig, RoundToPagesConfig
    from sparse_attention_hub.maskers.base import masker_class

    config = ResearchAttentionConfig.from_file(file)
    maskers = [entry for entry in config.masker_configs if not isinstance(entry, RoundToPagesConfig)]
    sampler = next((type(entry).__name__ for entry in maskers if masker_class(entry).is_sampling), None)
    if sampler:
        raise UserError(f"{file}: {sampler} weights the keys that it samples, which pages cannot: give a configuration without")
    if not maskers:
        raise UserError(f"{file}: has no maskers, so there is nothing to round")
    rounded = {(size, share): [*maskers, RoundToPagesConfig(size, share)] for size in PAGE_SIZES for share in SHARES}
    return {None: replace(config, masker_configs=maskers)} | {
        key: replace(config, masker_configs=entries) for key, entries in rounded.items()
    }


def search_settings(best: BestConfig, results: Path, **options: Any) -> Settings:
    """The settings under which a configuration was searched, as far as they determine its samples and figures. options: others."""
    from benchmark.settings import Settings

    found = best.provenance
    return Settings(
        models=(best.model,),
        tasks=(best.task,),
        seed=found.seed,
        sparse_from="decode" if found.sparse_from == "decode" else "question",
        thinking=found.thinking,  # type: ignore[arg-type]
        **options,
        dtype=found.dtype.removeprefix("torch."),
        dense_backend=found.dense_backend,
        attention_backend=found.attention_backend,
        search_max_new_tokens=found.max_new_tokens,
        search_max_context_length=found.max_context_length,
        search_max_requests=len(found.samples),
        ray_results_dir=results,
    )


def _evaluator(settings: Settings, earlier: TraceEvaluator | None) -> TraceEvaluator:
    from benchmark.search.evaluator import TraceEvaluator
    from sparse_attention_hub.models import load_model

    (model,), (task,) = settings.models, settings.tasks
    lm = earlier.lm if earlier and earlier.settings.models == settings.models else None
    if lm is None or str(lm.dtype).removeprefix("torch.") != settings.dtype:
        lm = load_model(
            model,
            device=settings.device,
            dtype=settings.dtype,
            dense_backend=settings.dense_backend,
            trust_remote_code=settings.trust_remote_code,
        )
    return TraceEvaluator(lm, task, settings, settings.ray_results_dir.resolve() / "traces")


def table(best: BestConfig, evaluator: TraceEvaluator, configs: dict[tuple[int, str] | None, ResearchAttentionConfig]) -> str:
    """The figures of each variant on the evaluator's samples, as a Markdown table."""
    forced = evaluator.evaluate(list(configs.values()), _FORCED, _SECONDS)
    generated = evaluator.evaluate(list(configs.values()), _GENERATED, _SECONDS)
    count = len(evaluator.samples)
    lines = [
        f"\n{best.masker_name}, {best.task}, {count} tuning sample{'s' * (count != 1)}, {best.model}\n",
        "| pages of | for each | density | KV bytes | error | score |",
        "|---|---|---|---|---|---|",
    ]
    for key, inputs, answers in zip(configs, forced, generated, strict=True):
        size, share = ("as found", "-") if key is None else (f"{key[0]} keys", key[1].replace("_", " "))
        lines.append(f"| {size} | {share} | {_cells(inputs, answers)} |")
    return "\n".join(lines)


def _cells(forced: Evaluation | None, generated: Evaluation | None) -> str:
    if forced is None:
        return "no finite figures | | |"
    score = None if generated is None else generated.score
    share = "-" if forced.kv_fraction is None else f"{forced.kv_fraction:.1%}"
    figures = ["-" if value is None else f"{value:.3f}" for value in (forced.error, score)]
    return " | ".join([f"{forced.density:.1%}", share, *figures])


if __name__ == "__main__":
    sys.exit(main())
