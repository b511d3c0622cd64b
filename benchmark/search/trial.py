"""What a study speaks of: levels, trials, their figures on each rung, and what is asked of the one who measures them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from sparse_attention_hub import ResearchAttentionConfig

RUNGS = ("replay of some rows and layers", "full replay", "forced forward", "generation")


class TrialTimeout(Exception):
    """An evaluation took longer than it may."""


@dataclass
class Evaluation:
    """Figures of one configuration on one rung, means over the tuning samples. None = this rung does not tell it."""

    error: float | None
    density: float
    seconds: float
    kv_fraction: float | None = None
    score: float | None = None
    sample_scores: list[float] | None = None
    reference_nll: float | None = None
    reproduced: float | None = None
    layer_errors: list[float] | None = None
    layer_densities: list[float] | None = None


class Evaluator(Protocol):
    """What a study needs of the world. `key` changes whenever its figures might."""

    key: str

    def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation]:
        """Evaluations in order. TrialTimeout if it takes longer than timeout * len(configs) seconds."""
        ...


@dataclass(frozen=True)
class Level:
    """One budget of a combination: its full name, the budget (None = no budget, the objective decides), its template."""

    name: str
    budget: float | None
    template: ResearchAttentionConfig


@dataclass
class Trial:
    """One configuration. status: "completed", "failed" or "timeout"; passing: it failed by a fault of the machine that may be
    gone another time; rungs: what each rung said; finished: when the last of them did, in seconds since 1970."""

    number: int
    params: dict[str, Any]
    status: str = "completed"
    error_message: str | None = None
    passing: bool = False
    rungs: dict[int, Evaluation] = field(default_factory=dict)
    pruned_at: int | None = None
    finished: float | None = None

    @property
    def seconds(self) -> float:
        """What all its rungs took."""
        return sum(figures.seconds for figures in self.rungs.values())

    @property
    def reached(self) -> int | None:
        """The highest rung evaluated."""
        return max(self.rungs, default=None)

    def at_most(self, rung: int) -> Evaluation:
        return self.rungs[max(r for r in self.rungs if r <= rung)]

    @property
    def last(self) -> Evaluation:
        """The figures of the highest rung that measures error and density."""
        return self.at_most(2)


@dataclass
class Best:
    """What was found for one level. meets_budget False: no configuration met it, this is the closest. confirmed False: its
    figures are a replay's, since nothing confirmed met the budget."""

    level: str
    budget: float | None
    trial: int
    meets_budget: bool
    confirmed: bool


def objective_value(objective: str, figures: Evaluation) -> float:
    """A trial's one number under --objective, smaller is better. "default": error + 0.1 density, above half the keys + 5;
    "sparsity_T": 0.99 error + 0.01 density, + 10 for each unit of density above T percent."""
    if objective == "default":
        return figures.error + 0.1 * figures.density + (5.0 if figures.density > 0.5 else 0.0)
    target = int(objective.removeprefix("sparsity_")) / 100
    return 0.99 * figures.error + 0.01 * figures.density + 10 * max(0.0, figures.density - target)


def magnitude(value: float | None) -> float:
    """Orders of magnitude, so that a search looks as closely at 5% as at 50%."""
    assert value is not None
    return math.log10(value + 1e-6)


def finite(evaluation: Evaluation) -> bool:
    """Whether every figure is a number."""
    try:
        json.dumps(asdict(evaluation), allow_nan=False)
    except ValueError:
        return False
    return True


def with_deadline(seconds: float) -> Callable[[], None]:
    """A check that raises TrialTimeout once `seconds` have passed."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise TrialTimeout(f"took longer than {seconds:g} s")

    return check
