"""One study of all budgets against one search per budget: the study's smallest errors should not be larger.

    python benchmark/speed/search_quality.py [--seeds 5] [--num-samples 50] [--json]

Every evaluation is a replay (rung 0) of two recorded requests. For each masker combination and seed:
- a study of all budgets as the program runs it, with levels x num-samples trials; and the same with NSGA-II for the
  two-objective quarter of its trials, where the program uses TPE;
- a single-objective search for each level with num-samples trials of its own (TPE, error plus ten times the density above
  the level, started from that level's template).
Compared are the smallest errors within each level's density, as the study's over the single search's. Goals: the geometric mean
over the seeds is at most 1 at every level, the study finds a configuration wherever the single search does, and TPE is no worse
than NSGA-II. Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sparse_attention_hub as hub
from benchmark.speed import search_setup as setup
from benchmark.speed.common import Figures, report, run_command
from sparse_attention_hub import models

if TYPE_CHECKING:
    import optuna

    from benchmark.search.evaluator import TraceEvaluator
    from benchmark.storage.search_records import Evaluation
    from sparse_attention_hub.head_budgets import FittedBudgets

LEVELS = setup.LEVELS
COMBINATIONS = ("oracle_top_k", "random_sampling", "adaptive_sampling")


class RungZero:
    """An evaluator that answers every rung with the figures of rung 0, and evaluates each configuration once."""

    def __init__(self, evaluator: TraceEvaluator) -> None:
        self.evaluator, self.key = evaluator, evaluator.key
        self._known: dict[str, Evaluation | None] = {}

    def evaluate(self, configs: list[hub.ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
        waiting = {repr(config): config for config in configs if repr(config) not in self._known}
        if waiting:
            found = self.evaluator.evaluate(list(waiting.values()), 0, timeout)
            self._known.update(zip(waiting, found, strict=True))
        return [self._known[repr(config)] for config in configs]

    def fit_head_budgets(
        self, configs: list[hub.ResearchAttentionConfig], by: str, timeout: float
    ) -> list[FittedBudgets | None]:
        return [None for _ in configs]


def nsga2(*, seed: int, startup: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.NSGAIISampler(seed=seed, population_size=startup)


def two_objectives(evaluator: RungZero, family: str, num_samples: int, seed: int) -> tuple[list[float], int]:
    """(the smallest error within each level, number of trials)."""
    with tempfile.TemporaryDirectory() as folder:
        study = setup.new_study(family, evaluator, Path(folder), num_samples=num_samples, seed=seed)
        list(study.run())
    figures = [(trial.rungs[0].error, trial.rungs[0].density) for trial in study.trials if 0 in trial.rungs]
    return [_smallest_error(figures, level) for level in LEVELS], len(figures)


def one_objective(evaluator: RungZero, family: str, level: int, num_samples: int, seed: int) -> float:
    """The smallest error within one level, of a search for that level alone."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    from benchmark.search.space import CombinationSpace

    start = setup.template(family, level / 100)
    space = CombinationSpace(start, "task")
    distributions = OptunaSearch.convert_search_space(space.ray_space())
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    study.enqueue_trial(space.template_values(start))
    figures = []
    for _ in range(num_samples):
        trial = study.ask(distributions)
        figures += setup.figures_of(evaluator, [space.build(trial.params)], 0)
        error, density = figures[-1]
        study.tell(trial, error + 10 * max(0.0, density - level / 100))
    return _smallest_error(figures, level)


def _smallest_error(figures: Iterable[tuple[float | None, float]], level: int) -> float:
    return min((error for error, density in figures if error is not None and density <= level / 100), default=math.inf)


def measure(options: argparse.Namespace) -> Figures:
    import optuna
    import torch

    from benchmark.search.evaluator import TraceEvaluator

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")  # Optuna marks multivariate sampling as experimental
    figures: Figures = {}
    ratios: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
    missed = 0  # levels within which the single search found a configuration and the study none
    with tempfile.TemporaryDirectory() as folder:
        lm = models.load_model(options.model, device="cpu")
        recorded = TraceEvaluator(lm, options.task, setup.search_settings(options), Path(folder))
        list(recorded.record())
        for family in options.combinations:
            evaluator = RungZero(recorded)
            for seed in range(options.seeds):
                alone = [one_objective(evaluator, family, level, options.num_samples, seed) for level in LEVELS]
                tpe, trials = two_objectives(evaluator, family, options.num_samples, seed)
                with mock.patch("benchmark.search.proposals.front_sampler", nsga2):
                    genetic, _ = two_objectives(evaluator, family, options.num_samples, seed)
                figures[f"{family}_seed_{seed}_trials"] = float(trials)
                missed += sum(math.isfinite(a) and math.isinf(b) for a, b in zip(alone, tpe, strict=True))
                for sampler, errors in (("tpe", tpe), ("nsga2", genetic)):
                    for level, single, error in zip(LEVELS, alone, errors, strict=True):
                        if math.isfinite(single) and math.isfinite(error):
                            ratios[sampler, family, level].append(max(error / single, 1e-9))
                print(f"{family} seed {seed}: {trials} trials", file=sys.stderr, flush=True)
    for (sampler, family, level), found in ratios.items():
        figures[f"{sampler}_over_single_{family}_{level}pct"] = geometric_mean(found)
    for sampler in ("tpe", "nsga2"):
        every = [ratio for key, found in ratios.items() if key[0] == sampler for ratio in found]
        figures[f"{sampler}_over_single"] = geometric_mean(every)
        figures[f"{sampler}_over_single_worst"] = max(every)
        figures[f"{sampler}_at_least_as_good_share"] = sum(ratio <= 1.0 + 1e-9 for ratio in every) / len(every)
    figures["tpe_over_nsga2"] = figures["tpe_over_single"] / figures["nsga2_over_single"]
    figures["missed"] = float(missed)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = setup.search_parser(__doc__, task="niah_single_1", requests=2, tokens=8)
    parser.add_argument("--length", type=int, default=1024, help="context length in tokens (default: %(default)s)")
    parser.add_argument("--combinations", nargs="+", default=list(COMBINATIONS), help="masker families (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="searches per combination (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=50, help="trials per level (default: %(default)s)")
    options = parser.parse_args(argv)
    options.task = options.task or f"ruler/{options.length}/niah_single_1"
    goals = {f"tpe_over_single_{family}_{level}pct": 1.0 for family in options.combinations for level in LEVELS}
    goals |= {"tpe_over_nsga2": 1.0, "missed": 0.0}
    return report(measure(options), options.json, at_most=goals, precision=".4g")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
