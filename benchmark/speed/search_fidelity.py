"""How well replay and the forced forward predict real sparse runs, on requests that no search has seen.

    python benchmark/speed/search_fidelity.py [--families ...] [--configs 40] [--requests 6] [--pool 24] [--json]

Random configurations of each masker family are replayed (full), run through a forced forward, and generated from. Per family:
- ordered: of the pairs whose real errors differ by more than a fifth, the share that replay orders alike. Real error: of the
  forced forward, where errors compound through the layers, or of generation.
- regret: how much larger the real error (forced forward) of the chosen best is than the smallest there is, within 5, 10, 25
  and 50% density, worst level. Chosen as Phase 1 chooses: at most six finalists by replay, the best of them by forced forward;
  `replay_alone` chooses by replay only.
- reproduced: share of answers that the forced forward calls reproduced, and how many of them generation gives token for token
  (a goal for maskers that do not sample).
- right: mean score of the sparse answers. It must be between 0.2 and 0.8, where a task distinguishes configurations.
Samples that dense attention fails carry no signal, so the requests are those of a larger pool that it answers best. Exit code 1
if a goal does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import math
import operator
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.search.evaluator import ErrorMeter, TraceEvaluator
from benchmark.speed.common import Figures, report
from benchmark.speed.search_setup import BATCH, LEVELS, random_configs, search_parser, search_settings
from sparse_attention_hub import ResearchAttention
from sparse_attention_hub.models import answer_many, forced_many, load_model
from sparse_attention_hub.models.model_files import complete

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
            for outcome, predicted, answer in zip(found, forced, real, strict=True):
                outcome.claims.append((predicted.reproduced, answer.token_ids == trace.answer_ids))
                score = evaluator.task.score(answer.text, entry.sample).get(evaluator.task.metric)
                if score is not None:
                    outcome.scores.append(score)
        for outcome, forced_meter, real_meter in zip(found, forced_meters, real_meters, strict=True):
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


def ordered_alike(outcomes: list[Outcome], real: str) -> tuple[float | None, int]:
    """(share of clearly different pairs that replay orders alike, number of such pairs). real: "forced" or "generated"."""
    error = operator.attrgetter(real)
    pairs = itertools.combinations(sorted(outcomes, key=error), 2)
    alike = [low.replayed < high.replayed for low, high in pairs if error(high) > DIFFERENT * error(low)]
    return (fmean(alike) if alike else None), len(alike)


def regret(outcomes: list[Outcome], finalists: int) -> float:
    """The largest over the levels, as a share of the smallest error; 0 where no level has a configuration."""
    worst = 0.0
    for level in LEVELS:
        within = sorted((o for o in outcomes if o.density <= level / 100), key=lambda outcome: outcome.replayed)
        if within:
            chosen, least = min(o.forced for o in within[:finalists]), min(o.forced for o in within)
            if chosen > least:
                worst = max(worst, chosen / least - 1 if least > 0 else math.inf)
    return worst


def claimed(outcomes: list[Outcome]) -> list[bool]:
    """For each answer that the forced forward calls reproduced: whether generation gives it token for token."""
    return [identical for outcome in outcomes for reproduced, identical in outcome.claims if reproduced]


def family_figures(family: str, outcomes: list[Outcome]) -> Figures:
    figures: Figures = {}
    for real in ("forced", "generated"):
        share, pairs = ordered_alike(outcomes, real)
        figures[f"{family}_{real}_pairs"] = float(pairs)
        if share is not None:
            figures[f"{family}_{real}_ordered"] = share
    figures[f"{family}_regret"] = regret(outcomes, FINALISTS)
    figures[f"{family}_regret_replay_alone"] = regret(outcomes, 1)
    identical = claimed(outcomes)
    figures[f"{family}_reproduced"] = len(identical) / sum(len(outcome.claims) for outcome in outcomes)
    if identical:
        figures[f"{family}_reproduced_identical"] = fmean(identical)
    scores = [score for outcome in outcomes for score in outcome.scores]
    if scores:
        figures[f"{family}_right"] = fmean(scores)
    return figures


def measure(options: argparse.Namespace) -> Figures:
    torch.set_num_threads(1)
    lm = load_model(options.model, device="cpu")
    figures: Figures = {}
    found: dict[str, list[Outcome]] = {}
    lengths = {family: options.length or LENGTHS.get(family, LENGTH) for family in options.families}
    for length in sorted(set(lengths.values())):
        task = options.task or f"ruler/{length}/fwe"
        sizes = {"search_max_requests": max(options.requests, options.pool), "search_max_context_length": length}
        settings = search_settings(options, tasks=(task,), seed=options.seed, **sizes)
        with tempfile.TemporaryDirectory() as folder:
            evaluator = TraceEvaluator(lm, task, settings, Path(folder))
            list(evaluator.record())
            figures[f"dense_right_{length}"] = answered_best(evaluator, options.requests)
            for family in (family for family in options.families if lengths[family] == length):
                found[family] = run_family(evaluator, family, options.configs, options.seed)
                own = family_figures(family, found[family])
                figures |= own
                shown = {name: f"{value:.3g}" for name, value in own.items()}
                print(f"{family}: done, {shown}", file=sys.stderr, flush=True)
    scores = [score for outcomes in found.values() for outcome in outcomes for score in outcome.scores]
    if scores:
        figures["right"] = fmean(scores)
    identical = [same for family in found if family not in SAMPLING for same in claimed(found[family])]
    if identical:
        figures["reproduced_identical"] = fmean(identical)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = search_parser(__doc__, task="fwe", requests=6)
    default_length = f"{LENGTH}; random sampling {LENGTHS['random_sampling']}"
    parser.add_argument("--length", type=int, help=f"context length in tokens (default: {default_length})")
    parser.add_argument("--pool", type=int, default=24, help="samples that requests are chosen from (default: %(default)s)")
    parser.add_argument("--configs", type=int, default=40, help="random configurations per family (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="masker families (all)")
    parser.add_argument("--seed", type=int, default=1000, help="of requests and configurations (default: %(default)s)")
    options = parser.parse_args(argv)
    at_least = {f"{family}_{name}": bound for family in FAMILIES for name, bound in (("forced_ordered", 0.95), ("right", 0.2))}
    at_most = {f"{family}_{name}": bound for family in FAMILIES for name, bound in (("regret", 0.1), ("right", 0.8))}
    at_least["reproduced_identical"] = 0.98
    return report(measure(options), options.json, at_least=at_least, at_most=at_most, precision=".4g")


if __name__ == "__main__":
    raise SystemExit(main())
