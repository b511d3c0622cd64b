"""What uneven budgets save: replayed and forced-forward errors of fitted head budgets against even ones, at equal density.

    python benchmark/speed/head_budgets.py [--lengths 1024 4096] [--families oracle_top_k quest] [--requests 3] [--json]

Tables per layer, kv head and query head are fitted on the first half of each task's requests, as a search fits them (those of all
levels from the curves of one), and judged on the other half, and on the requests of the other task. Figures are changes of an
error, the fitted table's over the even one's at the same density minus 1: `kv_head_oracle_top_k_10pct` is replayed on held-out
requests of all tasks, `..._transfer` on the tasks that the table was not fitted on, `forced_...` and `nll_...` (a difference) are
of a forced forward over the dense answers. A search takes a table only if a forced forward of the requests that it was fitted on
has a smaller error and no less likely answers; where it would not, even budgets stay, and `forced_...` and `nll_...` are 0.
`any_forced_...` and `any_nll_...` are of all tables.
`search_longer` is the CPU time of a search with head budgets over that of one without, minus 1: searches as a user starts them,
with the default number of trials, four levels, and the recording of their traces, on half of a task's requests. Fitting and
confirming cost the same however many trials there are, so `search_longer_debug`, of searches with the few trials of a debug run,
shows their largest share. Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sparse_attention_hub as hub
from benchmark.speed.common import Figures, report, run_command
from benchmark.speed.search_setup import new_study, search_parser, search_settings, template
from sparse_attention_hub import models

if TYPE_CHECKING:
    from benchmark.search.evaluator import TraceEvaluator
    from benchmark.settings import Settings
    from sparse_attention_hub.head_budgets import Curves

TASKS = ("niah_single_1", "fwe")
FAMILIES = ("oracle_top_k", "quest", "double_sparsity")
LEVELS = (5, 10, 25)
QUEST_PAGE = 8
#: Forced forwards are taken at this level and with these tables only.
FORCED_LEVEL, FORCED_BY = 10, "kv_head"
#: Trials per level of a debug run.
DEBUG_TRIALS = 12


def columns_of(lm: models.LanguageModel) -> dict[str, int]:
    config = lm.model.config
    return {"layer": 1, "kv_head": config.num_key_value_heads, "head": config.num_attention_heads}


def curves_of(
    evaluator: TraceEvaluator,
    config: hub.ResearchAttentionConfig,
    which: Sequence[int],
    rows: int | None = None,
    others: Sequence[hub.ResearchAttentionConfig] = (),
) -> tuple[Curves, list[float]]:
    """Curves of a configuration and densities of others on some of the requests, on at most so many rows of each."""
    from sparse_attention_hub.head_budgets import replay_curves

    traces, seeds = zip(*[(evaluator.traces[i], evaluator.samples[i].seed) for i in which], strict=True)
    return replay_curves(traces, config, others, layers=evaluator.lm.num_layers, seeds=seeds, most_rows=rows)


def replayed(evaluator: TraceEvaluator, which: Sequence[int], config: hub.ResearchAttentionConfig) -> tuple[float, float]:
    """(error, density) of a configuration, mean over some of the requests."""
    from sparse_attention_hub.replay import replay

    results = [replay(evaluator.traces[i], [hub.ResearchAttention(config)], seed=evaluator.samples[i].seed)[0] for i in which]
    return fmean(result.error for result in results), fmean(result.density for result in results)


def forced(
    evaluator: TraceEvaluator, which: Sequence[int], configs: list[hub.ResearchAttentionConfig]
) -> list[tuple[float, float]]:
    """(error, nll) of each configuration in a forced forward over the dense answers, mean over some of the requests."""
    from benchmark.search.evaluator import ErrorMeter

    meters = [ErrorMeter() for _ in configs]
    losses: list[list[float]] = [[] for _ in configs]
    attentions = [hub.ResearchAttention(config) for config in configs]
    for number in which:
        entry, trace = evaluator.samples[number], evaluator.traces[number]
        question = entry.prompt.question_ids
        prefilled = trace.prefilled(evaluator.lm, len(question) + entry.max_new_tokens + 1)
        assert prefilled is not None, "these traces hold all layers"
        found = models.forced_many(
            evaluator.lm, prefilled, question, trace.answer_ids, attentions, seed=entry.seed, recorders=meters, stepwise=True
        )
        for index, result in enumerate(found):
            losses[index].append(result.nll)
    return [(meter.error or 0.0, fmean(own)) for meter, own in zip(meters, losses, strict=True)]


def would_take(
    evaluator: TraceEvaluator, which: Sequence[int], fitted: hub.ResearchAttentionConfig, even: hub.ResearchAttentionConfig
) -> bool:
    """Whether a search that confirms both on these requests takes the table."""
    from benchmark.search.ranking import LESS_LIKELY

    (error, nll), (even_error, even_nll) = forced(evaluator, which, [fitted, even])
    print(f"  where fitted: {error / even_error - 1:+.4f}, nll {nll - even_nll:+.4f}", file=sys.stderr, flush=True)
    return error < even_error and nll <= even_nll + LESS_LIKELY


def measure_family(
    lm: models.LanguageModel, evaluators: dict[str, TraceEvaluator], family: str, changes: dict[str, list[float]]
) -> None:
    """Adds the changes of one family, by name of the figure: one for each task that a table was judged on."""
    from benchmark.search.evaluator import FIT_ROWS
    from sparse_attention_hub.head_budgets import even_factor, fit_spending
    from sparse_attention_hub.models.model_files import complete

    configs = [complete(template(family, level / 100), lm) for level in LEVELS]
    if family == "quest":
        for config in configs:
            config.masker_configs[-1].page_size = QUEST_PAGE  # type: ignore[attr-defined]
    count = len(next(iter(evaluators.values())).samples)
    fitted_on, held_out = range(count // 2), range(count // 2, count)
    own = {
        task: curves_of(fit_on, configs[len(LEVELS) // 2], fitted_on, FIT_ROWS, configs) for task, fit_on in evaluators.items()
    }
    for place, (level, config) in enumerate(zip(LEVELS, configs, strict=True)):
        judged = {task: curves_of(evaluator, config, held_out)[0] for task, evaluator in evaluators.items()}
        for task, (curves, spent) in own.items():
            for by, columns in columns_of(lm).items():
                fit = fit_spending(curves, spent[place], columns)
                table = [[1.0] * columns] * lm.num_layers if fit is None else fit.table
                fitted = replace(config, head_budgets=table)
                in_forced = level == FORCED_LEVEL and by == FORCED_BY
                taken = in_forced and would_take(evaluators[task], fitted_on, fitted, config)
                print(f"{family} {level}% {task} by {by}: strength {fit and fit.strength}", file=sys.stderr, flush=True)
                for other, evaluator in evaluators.items():
                    error, density = replayed(evaluator, held_out, fitted)
                    factor, even = even_factor(judged[other], density)
                    name = f"{by}_{family}_{level}pct" + ("" if other == task else "_transfer")
                    changes[name].append(error / even - 1)
                    print(f"  {other}: {changes[name][-1]:+.3f}", file=sys.stderr, flush=True)
                    if in_forced:
                        flat = replace(config, head_budgets=[[factor]] * len(table))
                        (error, nll), (even_error, even_nll) = forced(evaluator, held_out, [fitted, flat])
                        for kind, change in (("forced", error / even_error - 1), ("nll", nll - even_nll)):
                            changes[f"any_{kind}_{name}"].append(change)
                            changes[f"{kind}_{name}"].append(change if taken else 0.0)
                            print(f"  {kind}: {change:+.4f}{'' if taken else ', not taken'}", file=sys.stderr, flush=True)


def longer(lm: models.LanguageModel, settings: Settings, folder: Path, family: str, trials: int, recording: float) -> float:
    """How much longer a search takes with head budgets. trials: per level. recording: CPU seconds of its traces, which exist."""
    from benchmark.search.evaluator import TraceEvaluator

    seconds = {}
    for by in ("off", "kv_head"):
        evaluator = TraceEvaluator(lm, settings.tasks[0], settings, folder)  # of its own: one search warms up no other
        list(evaluator.record())
        with tempfile.TemporaryDirectory() as journal:
            study = new_study(family, evaluator, Path(journal), num_samples=trials, seed=0, head_budgets=by)
            started = time.process_time()
            list(study.run())
            seconds[by] = recording + time.process_time() - started
    print(f"search of {family} on {settings.tasks[0]}, {trials} trials a level: {seconds}", file=sys.stderr, flush=True)
    return seconds["kv_head"] / seconds["off"] - 1


def measure(options: argparse.Namespace) -> Figures:
    import torch

    from benchmark.search.evaluator import TraceEvaluator

    torch.set_num_threads(1)
    lm = models.load_model(options.model, device="cpu")
    changes: dict[str, list[float]] = defaultdict(list)
    for length in options.lengths:
        with tempfile.TemporaryDirectory() as traces:
            folder = Path(traces)
            evaluators = {}
            for task in (f"ruler/{length}/{name}" for name in TASKS):
                sizes = {"search_max_requests": 2 * options.requests, "search_max_context_length": length}
                settings = search_settings(options, tasks=(task,), **sizes)
                evaluators[task] = TraceEvaluator(lm, task, settings, folder)
                started = time.process_time()
                list(evaluators[task].record())
                recording = (time.process_time() - started) / 2
            searched = replace(settings, search_max_requests=options.requests)  # half of the last task's requests
            for family in options.families:
                measure_family(lm, evaluators, family, changes)
                if not options.searches:
                    continue
                # All is compiled and loaded by then.
                changes["search_longer"].append(longer(lm, searched, folder, family, settings.num_samples, recording))
                changes["search_longer_debug"].append(longer(lm, searched, folder, family, DEBUG_TRIALS, recording))
    return {name: fmean(values) for name, values in changes.items()}


def main(argv: list[str] | None = None) -> int:
    parser = search_parser(__doc__, task="niah_single_1 and fwe", requests=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="context lengths (1024 4096)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES[:2]), help="masker families")
    parser.add_argument("--searches", action=argparse.BooleanOptionalAction, default=True, help="time whole searches")
    options = parser.parse_args(argv)
    options.length = options.lengths[0]
    at_most = {
        "kv_head_oracle_top_k_10pct": -0.14,
        "kv_head_quest_10pct": -0.07,
        "head_oracle_top_k_10pct": -0.20,
        "head_quest_10pct": -0.10,
        "kv_head_oracle_top_k_25pct": -0.25,
        "kv_head_quest_25pct": -0.12,
        "forced_kv_head_oracle_top_k_10pct": -0.08,
        **{f"forced_kv_head_{family}_10pct": 0.0 for family in FAMILIES[1:]},
        **{f"nll_kv_head_{family}_10pct": 0.0 for family in FAMILIES},
        "search_longer": 0.20,
    }
    return report(measure(options), options.json, at_most=at_most, precision=".4g")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
