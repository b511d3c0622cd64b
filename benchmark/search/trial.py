"""What a study works with: levels, the evaluator's interface, progress, and the objective."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from benchmark.storage.records import Params
from benchmark.storage.search_records import Evaluation
from sparse_attention_hub import ResearchAttentionConfig

if TYPE_CHECKING:
    from sparse_attention_hub.head_budgets import FittedBudgets

#: Increased when head budgets are fitted or chosen in another way: fits in journals are not reused, nor results that may have them.
FIT_VERSION = 3
RUNGS = ("replay of some rows and layers", "full replay", "forced forward", "generation")


class Evaluator(Protocol):
    """Evaluates configurations for a study. key: changes whenever the figures may change."""

    key: str

    def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
        """Evaluations in the order of `configs`; None where a figure is not a finite number.

        TimeLimitError if all of them take longer than timeout * len(configs) seconds.
        """
        ...

    def fit_head_budgets(self, configs: list[ResearchAttentionConfig], by: str, timeout: float) -> list[FittedBudgets | None]:
        """A table of head budgets for each configuration; None where even budgets do as well, or where none can be fitted.

        configs: ascending in what they spend; all tables may be fitted on replays of the middle one. by: "layer", "kv_head" or
        "head". TimeLimitError if it takes longer than timeout * len(configs) seconds.
        """
        ...


@dataclass(frozen=True)
class Level:
    """One budget of a combination: its full name, the budget (None = no budget, the objective decides), its template."""

    name: str
    budget: float | None
    template: ResearchAttentionConfig


@dataclass(frozen=True)
class Progress:
    """State of a study.

    stage: what it is doing. trials: how many there are, None before the search; known: how many of them an earlier start
    evaluated; failed: how many failed or timed out; rungs: trials evaluated on each rung. best: level -> error of its best within
    its budget. announce: print the stage even where progress is a bar.
    """

    stage: str
    trials: int | None = None
    known: int = 0
    failed: int = 0
    rungs: tuple[int, ...] = ()
    best: dict[str, float | None] = field(default_factory=dict)
    announce: bool = False


def objective_value(objective: str, error: float | None, density: float) -> float:
    """The value of --objective, smaller is better. "default": error + 0.1 density, plus 5 above a density of one half;
    "sparsity_T": 0.99 error + 0.01 density, plus 10 per unit of density above T percent."""
    assert error is not None
    if objective == "default":
        return error + 0.1 * density + (5.0 if density > 0.5 else 0.0)
    target = int(objective.removeprefix("sparsity_")) / 100
    return 0.99 * error + 0.01 * density + 10 * max(0.0, density - target)


def magnitude(value: float | None) -> float:
    """Order of magnitude: a search distinguishes values near 5% as finely as values near 50%."""
    assert value is not None
    return math.log10(value + 1e-6)


def plain_params(params: Mapping[str, Any]) -> Params:
    """Parameters as JSON values: NumPy scalars as numbers, tuples as lists, other objects as text."""
    plain: Params = json.loads(json.dumps(params, default=lambda value: value.item() if hasattr(value, "item") else str(value)))
    return plain
