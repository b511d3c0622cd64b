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
from .replay import replay

if TYPE_CHECKING:
    from .models.trace import Trace

#: Factors of the grid, ascending: from an eighth of the sizes to eight times the sizes.
GRID = tuple(2.0 ** (step / 2.5) for step in range(-8, 8))
#: How far a fitted table is trusted: 0 = even budgets, 1 = as fitted. The best one is chosen by leaving samples out.
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: The strength where there is one sample only, so that none can be left out.
ONE_SAMPLE_STRENGTH = 0.5
_BISECTIONS = 50


class Curves(NamedTuple):
    """Replayed errors and densities of one configuration at each factor of GRID: float64 (samples, factors, layers, H)."""

    errors: Tensor
    densities: Tensor

    @property
    def unscaled(self) -> int:
        """The place of factor 1 in the grid."""
        return GRID.index(1.0)

    def of(self, samples: Sequence[int]) -> Curves:
        """The curves of some of the samples."""
        return Curves(self.errors[list(samples)], self.densities[list(samples)])

    def joined(self, columns: int) -> Curves:
        """Means over samples and over neighbouring heads: (factors, layers, columns)."""
        shape = (*self.errors.shape[1:3], columns, -1)
        return Curves(self.errors.mean(0).reshape(shape).mean(-1), self.densities.mean(0).reshape(shape).mean(-1))


def replay_curves(traces: Sequence[Trace], config: ResearchAttentionConfig, seeds: Sequence[int] | None = None) -> Curves:
    """The curves of a configuration on recorded dense runs, which must hold all layers of the model."""
    errors, densities = [], []
    for number, trace in enumerate(traces):
        layers = max(trace.layers) + 1
        attentions = [ResearchAttention(replace(config, head_budgets=[[factor]] * layers)) for factor in GRID]
        results = replay(trace, attentions, seed=0 if seeds is None else seeds[number])
        errors.append(torch.stack([result.errors.double() for result in results]))
        densities.append(torch.stack([result.densities.double() for result in results]))
    return Curves(torch.stack(errors), torch.stack(densities))


def fit_head_budgets(curves: Curves, density: float, columns: int) -> tuple[list[list[float]], float]:
    """(table with `columns` factors per layer, its strength): least mean error at a mean density of `density`.

    columns: 1 = per layer, kv heads, or query heads. The strength is that of STRENGTHS whose tables, fitted without a sample,
    have the least error on that sample, on average over samples.
    """
    samples = range(curves.errors.shape[0])
    strength = ONE_SAMPLE_STRENGTH
    if len(samples) > 1:
        losses = dict.fromkeys(STRENGTHS, 0.0)
        for left_out in samples:
            fitted = curves.of([sample for sample in samples if sample != left_out]).joined(columns)
            judge = curves.of([left_out]).joined(columns)
            allocated = _allocate(fitted, density)
            for tried in STRENGTHS:
                table = _at_density(allocated * tried, judge.densities, density)
                losses[tried] += float(_at(judge.errors, table).mean())
        strength = min(STRENGTHS, key=lambda tried: losses[tried])
    joined = curves.joined(columns)
    table = _at_density(_allocate(joined, density) * strength, joined.densities, density)
    return table.exp().tolist(), strength


def even_factor(curves: Curves, density: float) -> tuple[float, float]:
    """(factor for all heads whose mean density is `density`, mean error with it)."""
    joined = Curves(*(values.mean((0, 2, 3)).view(-1, 1, 1) for values in curves))
    log = _at_density(torch.zeros(1, 1, dtype=torch.float64), joined.densities, density)
    return float(log.exp()), float(_at(joined.errors, log))


def _allocate(curves: Curves, density: float) -> Tensor:
    """Log factors (layers, columns) of the grid that minimise error + price x density, at the price that meets the density."""
    grid = torch.tensor(GRID, dtype=torch.float64).log()

    def best(price: float) -> Tensor:
        return (curves.errors + price * curves.densities).argmin(0)

    low, high = -30.0, 30.0  # log of the price; a higher one buys fewer keys
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        spent = curves.densities.gather(0, best(math.exp(middle)).unsqueeze(0)).mean()
        low, high = (middle, high) if float(spent) > density else (low, middle)
    return grid[best(math.exp(high))]


def _at_density(logs: Tensor, densities: Tensor, density: float) -> Tensor:
    """Log factors (layers, columns), all moved by one number so that their mean density is `density`."""
    low, high = -10.0, 10.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if float(_at(densities, logs + middle).mean()) > density else (middle, high)
    return logs + low


def _at(curves: Tensor, logs: Tensor) -> Tensor:
    """Curves (factors, layers, columns) at log factors (layers, columns), linear between the grid's, flat outside it."""
    grid = torch.tensor(GRID, dtype=torch.float64).log()
    place = ((logs - grid[0]) / (grid[1] - grid[0])).clamp(0, len(GRID) - 1)
    left = place.floor().long().clamp(max=len(GRID) - 2)
    share = place - left
    low, high = (curves.gather(0, index.unsqueeze(0))[0] for index in (left, left + 1))
    return low + share * (high - low)
