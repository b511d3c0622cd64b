"""Whether cheap rungs tell the truth: replay against real sparse runs, on requests that no search has seen.

    python benchmark/speed/search_fidelity.py [--families ...] [--configs 40] [--requests 6] [--pool 24] [--json]

Random configurations of each masker family are replayed (full), run through a forced forward and really generated from. For
each family:
- ordered: of the pairs whose real errors differ by more than a fifth, the share that replay orders alike; real = the forced
  forward, where errors compound through the layers, and real = generation;
- regret: how much larger the real error (forced forward) of the chosen best is than the smallest there is, within 5, 10, 25
  and 50% density, worst level. Chosen as the program chooses: at most six finalists by replay, the best by forced forward;
  `replay_alone` chooses by replay only;
- reproduced: of the answers that the forced forward says are reproduced, the share that generation gives token for token
  (held to a goal for maskers that do not sample).
`right` is the mean score of the sparse answers, held between 0.2 and 0.8 in each family: there the task tells good configurations
from bad. What dense attention cannot answer tells nothing, so the requests are those of a larger pool that it answers best.
Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__" and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmark.speed.search_speed import BATCH, LEVELS, MODEL, random_configs  # noqa: E402

FAMILIES = (
    *("oracle_top_k", "oracle_top_p", "quest", "double_sparsity", "hash_attention", "pq_cache"),
    *("random_sampling", "adaptive_sampling", "magic_pig"),
)
SAMPLING = ("random_sampling", "adaptive_sampling", "magic_pig")
DIFFERENT = 1.2
LENGTH = 512
#: Where the task tells its configurations from each other: most of them draw few keys, too few at shorter lengths.
LENGTHS = {"random_sampling": 4096}
FINALISTS = 6


class Outcome:
    """What one configuration gave, means over requests."""

    def __init__(self, error: float, density: float) -> None:
        self.replayed, self.density = error, density
        self.forced = self.generated = 0.0
        self.reproduced: list[bool] = []
        self.identical: list[bool] = []
        self.right: list[float] = []


def run_family(evaluator: Any, family: str, count: int, seed: int) -> list[Outcome]:
    from benchmark.search.evaluator import ErrorMeter
    from sparse_attention_hub import ResearchAttention
    from sparse_attention_hub.models import answer_many, forced_many
    from sparse_attention_hub.models.model_files import complete

    outcomes: list[Outcome] = []
    configs = random_configs(family, count, seed)
    for start in range(0, count, BATCH):
        batch = configs[start : start + BATCH]
        found = [Outcome(entry.error, entry.density) for entry in evaluator.evaluate(batch, 1, 1e9)]
        attentions = [ResearchAttention(complete(config, evaluator.lm)) for config in batch]
        forced_meters, real_meters = [ErrorMeter() for _ in batch], [ErrorMeter() for _ in batch]
        for entry, trace in zip(evaluator.samples, evaluator.traces, strict=True):
            question = entry.prompt.question_ids
            prefilled = trace.prefilled(evaluator.lm, len(question) + entry.max_new_tokens + 1)
            asked = (evaluator.lm, prefilled, question)
            forced = forced_many(*asked, trace.answer_ids, attentions, seed=entry.seed, recorders=forced_meters, stepwise=True)
            real = answer_many(*asked, attentions, entry.max_new_tokens, seed=entry.seed, recorders=real_meters)
            for outcome, told, given in zip(found, forced, real, strict=True):
                outcome.reproduced.append(told.reproduced)
                outcome.identical.append(given.token_ids == trace.answer_ids)
                score = evaluator.task.score(given.text, entry.sample).get(evaluator.task.metric)
                if score is not None:
                    outcome.right.append(score)
        for outcome, forced_meter, real_meter in zip(found, forced_meters, real_meters, strict=True):
            outcome.forced, outcome.generated = forced_meter.error, real_meter.error
        outcomes += found
    return outcomes


def answered_best(evaluator: Any, count: int) -> float:
    """Leave the evaluator the `count` samples that dense attention answers best, earlier ones first; their mean score."""
    task, decode = evaluator.task, evaluator.lm.tokenizer.decode
    scores = []
    for entry, trace in zip(evaluator.samples, evaluator.traces, strict=True):
        text = decode(trace.answer_ids, skip_special_tokens=True)
        scores.append(task.score(text, entry.sample).get(task.metric) or 0.0)
    best = sorted(sorted(range(len(scores)), key=lambda place: -scores[place])[:count])
    evaluator.samples = [evaluator.samples[place] for place in best]
    evaluator.traces = [evaluator.traces[place] for place in best]
    return sum(scores[place] for place in best) / len(best)


def ordered_alike(outcomes: list[Outcome], real: str) -> tuple[float | None, int]:
    """(share of clearly different pairs that replay orders alike, how many pairs are clearly different)."""
    alike = pairs = 0
    for a, b in itertools.combinations(outcomes, 2):
        low, high = (a, b) if getattr(a, real) <= getattr(b, real) else (b, a)
        if getattr(high, real) > DIFFERENT * getattr(low, real):
            pairs += 1
            alike += low.replayed < high.replayed
    return (alike / pairs if pairs else None), pairs


def regret(outcomes: list[Outcome], finalists: int) -> float:
    """The largest over the levels, as a share of the smallest error; 0 where no level has a configuration."""
    worst = 0.0
    for level in LEVELS:
        within = [outcome for outcome in outcomes if outcome.density <= level / 100]
        if within:
            climbed = sorted(within, key=lambda outcome: outcome.replayed)[:finalists]
            chosen, least = min(o.forced for o in climbed), min(o.forced for o in within)
            worst = max(worst, chosen / least - 1 if least > 0 else math.inf if chosen > 0 else 0.0)
    return worst


def measure(options: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    import torch

    from benchmark.search.evaluator import TraceEvaluator
    from benchmark.settings import Settings
    from sparse_attention_hub.models import load_model

    torch.set_num_threads(1)
    lm = load_model(options.model, device="cpu")
    figures: dict[str, float] = {}
    goals: list[dict[str, Any]] = []
    told = certain = 0
    right: list[float] = []
    lengths = {family: options.length or LENGTHS.get(family, LENGTH) for family in options.families}
    for length in sorted(set(lengths.values())):
        task = options.task or f"ruler/{length}/fwe"
        settings = Settings(
            models=(options.model,),
            tasks=(task,),
            device="cpu",
            seed=options.seed,
            search_max_requests=max(options.requests, options.pool),
            search_max_context_length=length,
            search_max_new_tokens=options.tokens,
        )
        with tempfile.TemporaryDirectory() as folder:
            evaluator = TraceEvaluator(lm, task, settings, Path(folder))
            for _ in evaluator.record():
                pass
            figures[f"dense_right_{length}"] = answered_best(evaluator, options.requests)
            for family in (family for family in options.families if lengths[family] == length):
                outcomes = run_family(evaluator, family, options.configs, options.seed)
                for real in ("forced", "generated"):
                    share, pairs = ordered_alike(outcomes, real)
                    figures[f"{family}_{real}_pairs"] = float(pairs)
                    if share is not None:
                        figures[f"{family}_{real}_ordered"] = share
                        if real == "forced":
                            goals.append({"name": f"{family}_{real}_ordered", "at_least": 0.95})
                figures[f"{family}_regret"] = regret(outcomes, FINALISTS)
                figures[f"{family}_regret_replay_alone"] = regret(outcomes, 1)
                goals.append({"name": f"{family}_regret", "at_most": 0.1})
                pairs_of = [pair for o in outcomes for pair in zip(o.reproduced, o.identical, strict=True)]
                claimed = [identical for reproduced, identical in pairs_of if reproduced]
                figures[f"{family}_reproduced"] = len(claimed) / len(pairs_of)
                if claimed:
                    figures[f"{family}_reproduced_identical"] = sum(claimed) / len(claimed)
                if family not in SAMPLING:
                    told, certain = told + len(claimed), certain + sum(claimed)
                scores = [score for o in outcomes for score in o.right]
                right += scores
                if scores:
                    figures[f"{family}_right"] = sum(scores) / len(scores)
                    goals += [{"name": f"{family}_right", bound: at} for bound, at in (("at_least", 0.2), ("at_most", 0.8))]
                told_of = {name: f"{value:.3g}" for name, value in figures.items() if name.startswith(f"{family}_")}
                print(f"{family}: done, {told_of}", file=sys.stderr, flush=True)
    if right:
        figures["right"] = sum(right) / len(right)
    if told:
        figures["reproduced_identical"] = certain / told
        goals.append({"name": "reproduced_identical", "at_least": 0.98})
    for goal in goals:
        goal["value"] = figures[goal["name"]]
    return figures, goals


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="model id (default: %(default)s)")
    parser.add_argument("--task", help="task (default: ruler/LENGTH/fwe)")
    parser.add_argument(
        "--length", type=int, help=f"context length in tokens ({LENGTH}; random sampling {LENGTHS['random_sampling']})"
    )
    parser.add_argument("--requests", type=int, default=6, help="held-out requests (default: %(default)s)")
    parser.add_argument(
        "--pool", type=int, default=24, help="of which the requests are the best answered (default: %(default)s)"
    )
    parser.add_argument("--configs", type=int, default=40, help="random configurations a family (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="masker families (all)")
    parser.add_argument("--seed", type=int, default=1000, help="of requests and configurations (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv)
    figures, goals = measure(options)
    from benchmark.speed.fault_run import report

    return report({name: float(f"{value:.4g}") for name, value in figures.items()}, goals, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
