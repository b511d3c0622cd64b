"""Trials near the best one so far, picked by a quadratic response surface of its neighbourhood (Box and Wilson 1951).

TPE finds the region; how close a study then comes to the best that a budget allows is decided in steps that TPE seldom takes. Error
and density are smooth in most settings, so a polynomial fitted to the nearest trials tells which of many steps keep the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmark.search.trial import Evaluation, magnitude

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

CANDIDATES = 64
LONGEST, SHORTEST = 0.3, 0.003  # standard deviations of a step, as shares of a parameter's range
MOVED = 2  # parameters that a step changes, on average
NEIGHBOURS = 8  # trials that the surface is fitted to, for each parameter and one more
RIDGE = 1e-3


class LocalSearch:
    """Seeded. It is told every trial, whoever asked for it; whose best it steps from is said in each question."""

    def __init__(self, distributions: Mapping[str, BaseDistribution], *, seed: int) -> None:
        self._distributions: dict[str, Any] = dict(distributions)
        self._random = np.random.RandomState(seed)
        self._places: list[list[float]] = []  # of the trials, each parameter in [0, 1]
        self._found: list[Evaluation] = []
        self._known: set[str] = set()

    def tell(self, params: Mapping[str, Any], figures: Evaluation | None) -> None:
        """What a trial gave; None if it failed."""
        self._known.add(_key(params))
        if figures is not None:
            self._places.append([_place(kind, params[name]) for name, kind in self._distributions.items()])
            self._found.append(figures)

    def ask(self, value: Callable[[Evaluation], float]) -> dict[str, Any] | None:
        """Parameters never asked for before, a step from the trial of least value; None if there is no such step.

        value: the number to minimise; it is also asked of predicted figures.
        """
        if not self._found:
            return None
        values = [value(figures) for figures in self._found]
        best = values.index(min(values))
        steps = self._steps_from(np.array(self._places[best]))
        predicted = [value(figures) for figures in self._predict(best, steps)]
        for step in np.argsort(predicted, kind="stable"):
            places = zip(self._distributions.items(), steps[step], strict=True)
            params = {name: _value(kind, float(place)) for (name, kind), place in places}
            if (key := _key(params)) not in self._known:
                self._known.add(key)
                return params
        return None

    def _steps_from(self, start: np.ndarray) -> np.ndarray:
        """Places around one (P,), a few parameters moved in each: (CANDIDATES, P). Steps of one call are of one length."""
        shape = (CANDIDATES, len(start))
        moved = self._random.random_sample(shape) < MOVED / len(start)
        moved[np.arange(CANDIDATES), self._random.randint(len(start), size=CANDIDATES)] |= ~moved.any(-1)
        length = LONGEST * (SHORTEST / LONGEST) ** self._random.random_sample()
        steps = length * self._random.standard_normal(shape)
        for column, kind in enumerate(self._distributions.values()):
            if _is_choice(kind):  # to the one before or after
                steps[:, column] = np.sign(steps[:, column]) / max(1, len(kind.choices) - 1)
        reached: np.ndarray = np.abs(start + moved * steps)  # reflected at both ends of a range
        return np.clip(1 - np.abs(1 - reached), 0.0, 1.0)

    def _predict(self, best: int, steps: np.ndarray) -> list[Evaluation]:
        """Figures at places (K, P), by least squares over the trials nearest to the best: a polynomial of the second degree
        through the best's own figures, in orders of magnitude."""
        places = np.array(self._places) - self._places[best]
        figures = np.array([[magnitude(entry.error), magnitude(entry.density)] for entry in self._found])
        distance = np.linalg.norm(places, axis=-1)
        near = np.argsort(distance, kind="stable")[: NEIGHBOURS * (places.shape[1] + 1)]
        width = distance[near].max() / 1.5 + 1e-9
        weight = np.exp(-((distance[near] / width) ** 2))[:, None]
        known = _terms(places[near])
        # Curvature is held back more than slope: of few trials it is the less certain.
        ridge = RIDGE * np.where(np.arange(known.shape[1]) < places.shape[1], RIDGE, 1.0)
        wanted = known.T @ ((figures[near] - figures[best]) * weight)
        surface = np.linalg.solve(known.T @ (known * weight) + np.diag(ridge), wanted)
        logs = np.clip(_terms(steps - self._places[best]) @ surface + figures[best], -6.0, 6.0)
        return [Evaluation(error=10**error, density=10**density, seconds=0.0) for error, density in logs.tolist()]


def _key(params: Mapping[str, Any]) -> str:
    return repr(sorted(params.items()))


def _terms(places: np.ndarray) -> np.ndarray:
    """Places (K, P) and the products of any two of their parameters: (K, P + P (P + 1) / 2)."""
    first, second = np.triu_indices(places.shape[1])
    return np.hstack([places, places[:, first] * places[:, second]])


def _place(kind: Any, value: Any) -> float:
    """A parameter's value as a place in [0, 1], on the scale that it is searched on."""
    if kind.single():
        return 0.0
    if _is_choice(kind):
        return kind.to_internal_repr(value) / (len(kind.choices) - 1)
    low, high, value = (math.log(v) for v in (kind.low, kind.high, value)) if kind.log else (kind.low, kind.high, value)
    return float((value - low) / (high - low))


def _value(kind: Any, place: float) -> Any:
    """The parameter's value at a place in [0, 1], one that its distribution holds."""
    if _is_choice(kind):
        return kind.choices[round(place * (len(kind.choices) - 1))]
    if kind.log:
        value = math.exp(math.log(kind.low) + place * (math.log(kind.high) - math.log(kind.low)))
    else:
        value = kind.low + place * (kind.high - kind.low)
    if kind.step is not None:
        value = kind.low + round((value - kind.low) / kind.step) * kind.step
    value = min(max(value, kind.low), kind.high)
    return type(kind.low)(value)


def _is_choice(kind: Any) -> bool:
    return hasattr(kind, "choices")
