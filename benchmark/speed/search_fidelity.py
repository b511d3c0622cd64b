"""How well replay and the forced forward predict real sparse runs, on requests that no search has seen.

    python benchmark/speed/search_fidelity.py [--families ...] [--configs 40] [--requests 6] [--pool 24] [--json]

Random configurations of each masker family are replayed (full), run through a forced forward, and generated from, on the requests
of a pool that dense attention answers best. Per family:
- ordered: of the pairs whose real errors (forced forward or generation) differ by more than a fifth, the share that replay orders
  alike.
- regret: how much larger the forced error of the chosen best is than the smallest there is, within 5, 10, 25 and 50% density,
  worst level. Chosen as Phase 1 chooses: at most six finalists by replay, the best of them by forced forward; `replay_alone`
  chooses by replay only.
- reproduced: share of answers that the forced forward calls reproduced, and how many of them generation gives token for token.
- right: mean score of the sparse answers, which must be where a task distinguishes configurations, between 0.2 and 0.8.
Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import math
import operator
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sparse_attention_hub as hub
from benchmark.speed import search_setup as setup
from benchmark.speed.common import Figures, report, run_command
from sparse_attention_hub import models

if TYPE_CHECKING:
    from benchmark.search.evaluator import TraceEvaluator

SAMPLING = ("random_sampling", "adaptive_sampling", "magic_pig")
FAMILIES = ("oracle_top_k", "oracle_top_p", "quest", "double_sparsity", "hash_attention", "pq_cache", *SAMPLING)
DIFFERENT = 1.2
LENGTH = 512
#: Most random sampling configurations draw few keys: at shorter lengths they answer too few samples right.
LENGTHS = {"random_sampling": 4096}
FINALISTS = 6


@dataclass
class Outcome:
    """What one configuration gave. Errors and density: means over requests. claims: per request, whether the forced forward
    calls the dense answer reproduced, and whether generation gives it token for token. scores: of the generated answers."""

    replayed: float
    density: float
    forced: float = 0.0
    generated: float = 0.0
    claims: list[tuple[bool, bool]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def run_family(evaluator: TraceEvaluator, family: str, count: int, seed: int) -> list[Outcome]:
    from benchmark.search.evaluator import ErrorMeter
    from sparse_attention_hub.models.model_files import complete

    outcomes: list[Outcome] = []
    lm, task = evaluator.lm, evaluator.task
    configs = setup.random_configs(family, count, seed)
    for start in range(0, count, setup.BATCH):
        batch = configs[start : start + setup.BATCH]
        found = [Outcome(error, density) for error, density in setup.figures_of(evaluator, batch, 1)]
        attentions = [hub.ResearchAttention(complete(config, lm)) for config in batch]
        in_forced, in_real = [ErrorMeter() for _ in batch], [ErrorMeter() for _ in batch]
        for entry, trace in zip(evaluator.samples, evaluator.traces, strict=True):
            question, tokens = entry.prompt.question_ids, entry.max_new_tokens
            prefilled = trace.prefilled(lm, len(question) + tokens + 1)
            assert prefilled is not None, "these traces hold all layers"
            asked = (lm, prefilled, question)
            forced = models.forced_many(
                *asked, trace.answer_ids, attentions, seed=entry.seed, recorders=in_forced, stepwise=True
            )
            real = models.answer_many(*asked, attentions, tokens, seed=entry.seed, recorders=in_real)
            for outcome, predicted, answer in zip(found, forced, real, strict=True):
                outcome.claims.append((predicted.reproduced, answer.token_ids == trace.answer_ids))
                score = task.score(answer.text, entry.sample).get(task.metric)
                if score is not None:
                    outcome.scores.append(score)
        for outcome, forced_meter, real_meter in zip(found, in_forced, in_real, strict=True):
            assert forced_meter.error is not None and real_meter.error is not None
            outcome.forced, outcome.generated = forced_meter.error, real_meter.error
        outcomes += found
    return outcomes


def answered_best(evaluator: TraceEvaluator, count: int) -> float:
    """Keep the `count` samples that dense attention answers best, earlier ones first among equals; their mean score."""
    task, decode = evaluator.task, evaluator.lm.tokenizer.decode
    scores = []
    for entry, trace in zip(evaluator.samples, evaluator.traces, strict=True):
        text = decode(trace.answer_ids, skip_special_tokens=True)
        scores.append(task.score(text, entry.sample).get(task.metric) or 0.0)
    best = sorted(sorted(range(len(scores)), key=lambda number: -scores[number])[:count])
    evaluator.samples = [evaluator.samples[number] for number in best]
    evaluator.traces = [evaluator.traces[number] for number in best]
    return fmean(scores[number] for number in best)


def ordered_alike(outcomes: list[Outcome], real: str) -> list[bool]:
    """For each pair of clearly different real errors ("forced" or "generated"): whether replay orders it alike."""
    error = operator.attrgetter(real)
    pairs = itertools.combinations(sorted(outcomes, key=error), 2)
    return [low.replayed < high.replayed for low, high in pairs if error(high) > DIFFERENT * error(low)]


def regret(outcomes: list[Outcome], finalists: int) -> float:
    """The largest over the levels, as a share of the smallest error; 0 where no level has a configuration."""
    worst = 0.0
    for level in setup.LEVELS:
        within = sorted((o for o in outcomes if o.density <= level / 100), key=lambda outcome: outcome.replayed)
        if within:
            chosen, least = min(o.forced for o in within[:finalists]), min(o.forced for o in within)
            if chosen > least:
                worst = max(worst, chosen / least - 1 if least > 0 else math.inf)
    return worst


def claimed(outcomes: list[Outcome]) -> list[bool]:
    """For each answer that the forced forward calls reproduced: whether generation gives it token for token."""
    return [identical for outcome in outcomes for reproduced, identical in outcome.claims if reproduced]


def scores_of(outcomes: list[Outcome]) -> list[float]:
    return [score for outcome in outcomes for score in outcome.scores]


def means(lists: Mapping[str, Sequence[float]]) -> Figures:
    """The mean of each list that is not empty."""
    return {name: fmean(values) for name, values in lists.items() if values}


def family_figures(outcomes: list[Outcome]) -> Figures:
    ordered = {real: ordered_alike(outcomes, real) for real in ("forced", "generated")}
    identical = claimed(outcomes)
    return {
        **{f"{real}_pairs": float(len(pairs)) for real, pairs in ordered.items()},
        **means({f"{real}_ordered": pairs for real, pairs in ordered.items()}),
        "regret": regret(outcomes, FINALISTS),
        "regret_replay_alone": regret(outcomes, 1),
        "reproduced": len(identical) / sum(len(outcome.claims) for outcome in outcomes),
        **means({"reproduced_identical": identical, "right": scores_of(outcomes)}),
    }


def measure(options: argparse.Namespace) -> Figures:
    import torch

    from benchmark.search.evaluator import TraceEvaluator

    torch.set_num_threads(1)
    lm = models.load_model(options.model, device="cpu")
    figures: Figures = {}
    found: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder:  # families of one length share its traces
        for family in options.families:
            length = options.length or LENGTHS.get(family, LENGTH)
            task = options.task or f"ruler/{length}/fwe"
            sizes = {"search_max_requests": max(options.requests, options.pool), "search_max_context_length": length}
            settings = setup.search_settings(options, tasks=(task,), seed=options.seed, **sizes)
            evaluator = TraceEvaluator(lm, task, settings, Path(folder))
            list(evaluator.record())
            figures[f"dense_right_{length}"] = answered_best(evaluator, options.requests)
            found[family] = run_family(evaluator, family, options.configs, options.seed)
            own = family_figures(found[family])
            figures |= {f"{family}_{name}": value for name, value in own.items()}
            print(f"{family}: done,", {name: f"{value:.3g}" for name, value in own.items()}, file=sys.stderr, flush=True)
    scores = [score for outcomes in found.values() for score in scores_of(outcomes)]
    identical = [same for family in found if family not in SAMPLING for same in claimed(found[family])]
    return figures | means({"right": scores, "reproduced_identical": identical})


def main(argv: list[str] | None = None) -> int:
    parser = setup.search_parser(__doc__, task="fwe", requests=6)
    default_length = f"{LENGTH}; random sampling {LENGTHS['random_sampling']}"
    parser.add_argument("--length", type=int, help=f"context length in tokens (default: {default_length})")
    parser.add_argument("--pool", type=int, default=24, help="samples that requests are chosen from (default: %(default)s)")
    parser.add_argument("--configs", type=int, default=40, help="random configurations per family (default: %(default)s)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="masker families (all)")
    parser.add_argument("--seed", type=int, default=1000, help="of requests and configurations (default: %(default)s)")
    options = parser.parse_args(argv)
    at_least = {f"{family}_{name}": bound for family in FAMILIES for name, bound in (("forced_ordered", 0.95), ("right", 0.2))}
    at_most = {f"{family}_{name}": bound for family in FAMILIES for name, bound in (("regret", 0.1), ("right", 0.8))}
    at_least["reproduced_identical"] = 0.98
    return report(measure(options), options.json, at_least=at_least, at_most=at_most, precision=".4g")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
