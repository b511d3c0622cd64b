"""What a study of all budgets at once gives up against a search for each budget alone: nothing, it should.

    python benchmark/speed/search_quality.py [--seeds 5] [--num-samples 50] [--json]

Every evaluation is a replay (rung 0) of two recorded requests of the embedded model. For each masker combination and seed:
- a study of all budgets as the program runs it, and with NSGA-II in place of its two-objective quarter's TPE: levels x num-samples
  trials;
- a single-objective search for each level with num-samples trials of its own (TPE, error plus ten times the density above
  the level, started from that level's template).
Compared is the smallest error within each level's density, as the ratio of the study's to the single search's. The goal: its
geometric mean over the seeds is at most 1 at every level of every combination, and that the study finds something within
a level wherever the single search does. A search of a space without a minimum can
always be a hair luckier, so the worst single ratio is printed and not held.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__" and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmark.speed.search_speed import LEVELS, MODEL, template  # noqa: E402

COMBINATIONS = ("oracle_top_k", "random_sampling", "adaptive_sampling")
GOAL = 1.0


class Remembering:
    """An evaluator that answers every rung with the figures of rung 0, and each configuration once."""

    def __init__(self, evaluator: Any) -> None:
        self.evaluator, self.key = evaluator, evaluator.key
        self._known: dict[str, Any] = {}

    def evaluate(self, configs: list[Any], rung: int, timeout: float) -> list[Any]:
        waiting = {repr(config): config for config in configs if repr(config) not in self._known}
        if waiting:
            found = self.evaluator.evaluate(list(waiting.values()), 0, timeout)
            self._known.update(zip(waiting, found, strict=True))
        return [self._known[repr(config)] for config in configs]


@contextmanager
def nsga2() -> Iterator[None]:
    """Inside, studies ask NSGA-II for their two-objective quarter."""
    import optuna

    def make(*, seed: int, startup: int) -> Any:
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=startup)

    with mock.patch("benchmark.search.proposals.front_sampler", make):
        yield


def two_objectives(evaluator: Remembering, family: str, num_samples: int, seed: int) -> tuple[list[float], int]:
    """(the smallest error within each level, trials)."""
    from benchmark.search.space import CombinationSpace
    from benchmark.search.study import Study
    from benchmark.search.trial import Level
    from benchmark.storage.results import Journal

    levels = [Level(f"{family}_{level}pct", level / 100, template(family, level / 100)) for level in LEVELS]
    space = CombinationSpace(levels[0].template, "task")
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.jsonl")
        study = Study(space, levels, evaluator, journal, num_samples=num_samples, timeout=1e9, seed=seed)
        for _ in study.run():
            pass
    figures = [trial.rungs[0] for trial in study.trials if 0 in trial.rungs]
    return [_best(figures, level) for level in LEVELS], len(figures)


def one_objective(evaluator: Remembering, family: str, level: int, num_samples: int, seed: int) -> float:
    """The smallest error within one level, of a search for that level alone."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    from benchmark.search.space import CombinationSpace

    start = template(family, level / 100)
    space = CombinationSpace(start, "task")
    distributions = OptunaSearch.convert_search_space(space.ray_space())
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    study.enqueue_trial(space.template_values(start))
    figures = []
    for _ in range(num_samples):
        trial = study.ask(distributions)
        (found,) = evaluator.evaluate([space.build(dict(trial.params))], 0, 1e9)
        figures.append(found)
        study.tell(trial, found.error + 10 * max(0.0, found.density - level / 100))
    return _best(figures, level)


def _best(figures: list[Any], level: int) -> float:
    return min((entry.error for entry in figures if entry.density <= level / 100), default=math.inf)


def measure(options: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    import optuna
    import torch

    from benchmark.search.evaluator import TraceEvaluator
    from benchmark.settings import Settings
    from sparse_attention_hub.models import load_model

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")  # Optuna marks multivariate sampling as experimental
    settings = Settings(
        models=(options.model,),
        tasks=(options.task,),
        device="cpu",
        search_max_requests=options.requests,
        search_max_context_length=options.length,
        search_max_new_tokens=8,
    )
    figures: dict[str, float] = {}
    goals: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        recorded = TraceEvaluator(load_model(options.model, device="cpu"), options.task, settings, Path(folder))
        for _ in recorded.record():
            pass
        ratios: dict[tuple[str, str, int], list[float]] = {}
        missed = 0  # levels within which the single search found something and the study nothing
        for family in options.combinations:
            evaluator = Remembering(recorded)
            for seed in range(options.seeds):
                alone = [one_objective(evaluator, family, level, options.num_samples, seed) for level in LEVELS]
                tpe, trials = two_objectives(evaluator, family, options.num_samples, seed)
                with nsga2():
                    genetic, _ = two_objectives(evaluator, family, options.num_samples, seed)
                figures[f"{family}_seed_{seed}_trials"] = float(trials)
                for place, level in enumerate(LEVELS):
                    missed += math.isfinite(alone[place]) and math.isinf(tpe[place])
                    if math.isfinite(alone[place]) and math.isfinite(tpe[place]):
                        ratios.setdefault(("tpe", family, level), []).append(tpe[place] / alone[place])
                    if math.isfinite(alone[place]) and math.isfinite(genetic[place]):
                        ratios.setdefault(("nsga2", family, level), []).append(genetic[place] / alone[place])
                print(f"{family} seed {seed}: {trials} trials", file=sys.stderr, flush=True)
    for (sampler, family, level), found in ratios.items():
        name = f"{sampler}_over_single_{family}_{level}pct"
        figures[name] = _geometric_mean(found)
        if sampler == "tpe":
            goals.append({"name": name, "value": figures[name], "at_most": GOAL})
    for sampler in ("tpe", "nsga2"):
        every = [ratio for key, found in ratios.items() if key[0] == sampler for ratio in found]
        figures[f"{sampler}_over_single"] = _geometric_mean(every)
        figures[f"{sampler}_over_single_worst"] = max(every)
        figures[f"{sampler}_at_least_as_good_share"] = sum(ratio <= 1.0 + 1e-9 for ratio in every) / len(every)
    goals.append({"name": "tpe_over_nsga2", "value": figures["tpe_over_single"] / figures["nsga2_over_single"], "at_most": 1.0})
    figures["tpe_over_nsga2"] = goals[-1]["value"]
    figures["missed"] = float(missed)
    goals.append({"name": "missed", "value": figures["missed"], "at_most": 0.0})
    return figures, goals


def _geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(math.log(max(ratio, 1e-9)) for ratio in ratios) / len(ratios))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="model id (default: %(default)s)")
    parser.add_argument("--task", help="task (default: ruler/LENGTH/niah_single_1)")
    parser.add_argument("--length", type=int, default=1024, help="context length in tokens (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2, help="recorded requests (default: %(default)s)")
    parser.add_argument("--combinations", nargs="+", default=list(COMBINATIONS), help="masker families (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="searches a combination (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=50, help="trials a level (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv)
    options.task = options.task or f"ruler/{options.length}/niah_single_1"
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    figures, goals = measure(options)
    from benchmark.speed.fault_run import report

    return report({name: float(f"{value:.4g}") for name, value in figures.items()}, goals, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
