"""Head budgets: which layers and heads spend a density budget best.

A table holds factors on a configuration's fractional sizes, one per layer and head. Replays of the configuration at a grid of
sizes give each head's error over its density; the table minimises the mean error at a given mean density. Uneven budgets were
proposed by PyramidKV (layers, https://arxiv.org/abs/2406.02069) and Ada-KV (heads, https://arxiv.org/abs/2407.11550).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .attention import ResearchAttention, ResearchAttentionConfig
from .maskers.shared_states import SharedStates
from .replay import replay, spread

if TYPE_CHECKING:
    from .models.trace import Trace

#: Factors of the grid, ascending: from a 13th of the sizes to 13 times the sizes, so that one configuration reaches all budgets.
GRID = tuple(2.0 ** (0.75 * step) for step in range(-5, 6))
#: How far a fitted table is trusted: 0 = even budgets, 1 = as fitted. The best one is chosen by leaving groups of rows out.
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: A table spends so much less than its configuration with even budgets: sizes are rounded per head, and other rows spend otherwise.
SPENT_SHARE = 0.99
#: Factors that are tried between two of the grid, by interpolation.
_BETWEEN = 4
_BISECTIONS = 30
_STEP = math.log(GRID[1] / GRID[0])


class Curves(NamedTuple):
    """Replayed errors and densities of one configuration at each factor of GRID: float64 (groups, factors, layers, H). A group
    is a sample, or a part of its rows. The densities may be shares of KV bytes instead."""

    errors: Tensor
    densities: Tensor

    @property
    def unscaled(self) -> int:
        """The place of factor 1 in the grid."""
        return GRID.index(1.0)

    def of(self, groups: Sequence[int]) -> Curves:
        """The curves of some of the groups."""
        return Curves(self.errors[list(groups)], self.densities[list(groups)])

    def joined(self, columns: int) -> Curves:
        """Means over groups and over neighbouring heads: (factors, layers, columns)."""
        shape = (*self.errors.shape[1:3], columns, -1)
        return Curves(self.errors.mean(0).reshape(shape).mean(-1), self.densities.mean(0).reshape(shape).mean(-1))


class FittedBudgets(NamedTuple):
    """table: a row of factors per layer of the curves. strength: see STRENGTHS. held_out: the table's replayed error over that of
    even budgets at the same density, minus 1, on groups that it was not fitted on."""

    table: list[list[float]]
    strength: float
    held_out: float


def replay_curves(
    traces: Sequence[Trace],
    config: ResearchAttentionConfig,
    others: Sequence[ResearchAttentionConfig] = (),
    *,
    layers: int,
    seeds: Sequence[int] | None = None,
    parts: int = 1,
    most_rows: int | None = None,
    device: torch.device | str = "cpu",
    states: SharedStates | None = None,
    kv: bool = False,
) -> tuple[Curves, list[float]]:
    """The curves of a configuration on recorded dense runs, and the mean density of each of the others on the same rows.

    layers: of the model. seeds: one per trace. parts: the rows of a trace are cut into so many groups; it must have as many.
    most_rows: replay at most so many rows of a trace, evenly spread. states: masker states to share with other calls. kv: shares
    of KV bytes, without selectors, instead of densities.
    """
    scaled = [replace(config, head_budgets=[[factor]] * layers) for factor in GRID]
    attentions = [ResearchAttention(each) for each in (*scaled, *others)]
    errors: list[list[Tensor]] = [[] for _ in attentions]
    densities: list[list[Tensor]] = [[] for _ in attentions]
    for number, trace in enumerate(traces):
        rows = spread(trace.rows, trace.rows if most_rows is None else most_rows)
        seed = 0 if seeds is None else seeds[number]
        results = replay(trace, attentions, rows=rows, seed=seed, device=device, states=states, kv=kv, parts=parts)
        for index, result in enumerate(results):
            spent = result.densities if result.kv_shares is None else result.kv_shares
            for figures, into in ((result.errors, errors), (spent, densities)):
                into[index] += [figures.double()] if parts == 1 else list(figures.double().unbind(1))
    curves = Curves(_by_group(errors[: len(GRID)]), _by_group(densities[: len(GRID)]))
    return curves, [float(torch.stack(groups).mean()) for groups in densities[len(GRID) :]]


def _by_group(values: list[list[Tensor]]) -> Tensor:
    """[factor][group] of (layers, H) -> (groups, factors, layers, H)."""
    return torch.stack([torch.stack(groups) for groups in values], 1)


def fit_head_budgets(curves: Curves, density: float, columns: int) -> FittedBudgets:
    """The table with the least mean error at a mean density of `density`, and how far it is trusted.

    columns: of the table, 1 = a factor per layer, or as many as kv heads or query heads. The strength is that of STRENGTHS whose
    tables, fitted without a group, have the least error on that group, on average over groups. ValueError for a single group.
    """
    groups = range(curves.errors.shape[0])
    if len(groups) < 2:
        raise ValueError("fitting head budgets takes at least two groups of rows, got 1: cut the rows into parts")
    losses = dict.fromkeys(STRENGTHS, 0.0)
    for left_out in groups:
        allocated = _allocate(curves.of([group for group in groups if group != left_out]).joined(columns), density)
        judge = curves.of([left_out]).joined(columns)
        for tried in STRENGTHS:
            losses[tried] += float(_errors_at(judge.errors, _at_density(allocated * tried, judge.densities, density)).mean())
    strength = min(STRENGTHS, key=lambda tried: losses[tried])
    joined = curves.joined(columns)
    table = _at_density(_allocate(joined, density) * strength, joined.densities, density)
    held_out = losses[strength] / losses[0.0] - 1 if losses[0.0] > 0 else 0.0
    return FittedBudgets(table.exp().tolist(), strength, held_out)


def fit_spending(curves: Curves, spent: float, columns: int) -> FittedBudgets | None:
    """The table of a configuration that spends so much, from the curves of one with sizes in similar proportions; None where even
    budgets do as well, or where sizes are not what sets the spending."""
    reached = curves.densities.mean((0, 2, 3))
    if not float(reached[0]) < SPENT_SHARE * spent < float(reached[-1]):
        return None
    fitted = fit_head_budgets(curves, SPENT_SHARE * spent, columns)
    if fitted.strength == 0:
        return None
    even, _ = even_factor(curves, spent)  # with it, the configuration of the curves is as large as this one
    return fitted._replace(table=[[float(f"{factor / even:.4g}") for factor in row] for row in fitted.table])


def even_factor(curves: Curves, density: float) -> tuple[float, float]:
    """(factor for all heads whose mean density is `density`, mean error with it)."""
    joined = Curves(*(values.mean((0, 2, 3)).view(-1, 1, 1) for values in curves))
    log = _at_density(torch.zeros(1, 1, dtype=torch.float64), joined.densities, density)
    return float(log.exp()), float(_errors_at(joined.errors, log))


def _allocate(curves: Curves, density: float) -> Tensor:
    """Log factors (layers, columns) that minimise error + price x density, at the price that meets the density."""
    logs = torch.linspace(math.log(GRID[0]), math.log(GRID[-1]), _BETWEEN * (len(GRID) - 1) + 1, dtype=torch.float64)
    each = logs.view(-1, 1, 1).expand(-1, *curves.errors.shape[1:])
    errors, densities = _errors_at(curves.errors, each), _densities_at(curves.densities, each)

    def best(price: float) -> Tensor:
        return (errors + price * densities).argmin(0)

    low, high = -30.0, 30.0  # log of the price; a higher one buys fewer keys
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        spent = densities.gather(0, best(math.exp(middle)).unsqueeze(0)).mean()
        low, high = (middle, high) if float(spent) > density else (low, middle)
    return logs[best(math.exp(high))]


def _at_density(logs: Tensor, densities: Tensor, density: float) -> Tensor:
    """Log factors (layers, columns), all moved by one number so that their mean density is `density`."""
    low, high = -10.0, 10.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if float(_densities_at(densities, logs + middle).mean()) > density else (middle, high)
    return logs + low


def _errors_at(errors: Tensor, logs: Tensor) -> Tensor:
    """Errors (factors, layers, columns) at log factors (..., layers, columns). Between two factors of the grid their logarithm is
    linear, as errors nearly are powers of a size; outside the grid they are flat."""
    low, high, part = _beside(errors, logs)
    return (low + part * (high - low)).exp()


def _densities_at(densities: Tensor, logs: Tensor) -> Tensor:
    """Likewise, but a density grows at least as the sizes do, up to where all keys are attended: a table for half of the keys
    would spend 1.5% too much."""
    low, high, part = _beside(densities, logs)
    return torch.minimum(low + part * (high - low).clamp(min=_STEP), high).exp()


def _beside(curves: Tensor, logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log of the curves at the next lower factor of the grid, at the next higher one, which part of the way each log factor is)."""
    shape = logs.shape
    place = ((logs - math.log(GRID[0])) / _STEP).clamp(0, len(GRID) - 1).reshape(-1, *curves.shape[1:])
    left = place.floor().long().clamp(max=len(GRID) - 2)
    known = curves.clamp(min=1e-12).log()  # an error is 0 where all keys are attended
    return known.gather(0, left).reshape(shape), known.gather(0, left + 1).reshape(shape), (place - left).reshape(shape)
