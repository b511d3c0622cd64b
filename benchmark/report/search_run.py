"""A Phase 1 run read back from its folder: studies with their trials, levels with their best. Needs no torch, Ray or Optuna."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.settings import SparseConfig
from sparse_attention_hub.errors import UserError

_RUN = re.compile(r"^run_\d{8}_\d{6}$")
#: The rung of the forced forward: the last that measures error on inputs that all configurations share.
FORCED = 2


@dataclass(frozen=True)
class Trial:
    """One configuration. rungs: rung -> its figures as the trials file has them (error, density, seconds, score, ...)."""

    trial_id: str
    number: int
    params: dict[str, Any]
    status: str
    error_message: str | None
    pruned_at: int | None
    rungs: dict[int, dict[str, Any]]

    def figure(self, name: str, rung: int) -> float | None:
        """A figure of one rung; None if it was not measured there."""
        value = self.rungs.get(rung, {}).get(name)
        return None if value is None else float(value)

    def last(self, name: str) -> float | None:
        """A figure of the highest rung up to the forced forward."""
        rungs = [rung for rung in self.rungs if rung <= FORCED]
        return self.figure(name, max(rungs)) if rungs else None

    @property
    def reached(self) -> int | None:
        return max(self.rungs, default=None)

    @property
    def confirmed(self) -> bool:
        return FORCED in self.rungs

    @property
    def seconds(self) -> float:
        return sum(float(figures["seconds"]) for figures in self.rungs.values())


@dataclass
class Level:
    """The best of one budget. record: what `{key}.json` holds."""

    name: str
    budget: float | None
    record: dict[str, Any]
    trial: Trial | None

    @property
    def label(self) -> str:
        return "-" if self.budget is None else f"{100 * self.budget:g}%"


@dataclass
class Study:
    """All trials of one (model, task, masker combination), with the levels that share them."""

    model: str
    task: str
    combination: str
    trials: list[Trial]
    levels: list[Level] = field(default_factory=list)

    @property
    def search_seconds(self) -> float:
        return max((float(level.record.get("search_time") or 0.0) for level in self.levels), default=0.0)


@dataclass
class Run:
    """A run's folder. rung_names: what each rung is called. pairs: the (model, task) in it, in order."""

    folder: Path
    studies: list[Study]
    rung_names: list[str]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((study.model, study.task) for study in self.studies))

    @property
    def combinations(self) -> list[str]:
        return sorted({study.combination for study in self.studies}, key=lambda name: (name.count("_"), name))

    @property
    def budgets(self) -> list[float | None]:
        """Budgets of the levels, smallest first; None (levels without one) last."""
        found = {level.budget for study in self.studies for level in study.levels}
        return sorted(found, key=lambda budget: (budget is None, budget or 0.0))

    def of(self, model: str, task: str) -> list[Study]:
        return [study for study in self.studies if (study.model, study.task) == (model, task)]


def choose_run(folder: Path, name: str | None) -> Path:
    """The run of this name, or a path to one; without a name the newest with trials. UserError if there is none."""
    if name is not None:
        for candidate in (folder / name, Path(name)):
            if candidate.is_dir():
                return candidate
        known = [run.name for run in _runs(folder)]
        listed = f"there are {', '.join(known[:5])}" if known else "there is none yet: run --phase 1 first"
        raise UserError(f"no run {name!r} in {folder}; {listed}")
    if not folder.is_dir():
        raise UserError(f"--optimal-configs-dir {folder}: no such folder; run --phase 1 first, or name the folder of a search")
    for run in _runs(folder):
        if any(run.glob("*_trials.json")):
            return run
    raise UserError(f"no run with finished trials in {folder}: run --phase 1 first, or give --optimal-configs-dir")


def read_run(folder: Path) -> Run:
    """Read every level of a run. UserError names the file that is missing or not as Phase 1 writes it."""
    studies: dict[tuple[str, str, str], Study] = {}
    rung_names: list[str] = []
    for path in sorted(folder.glob("*_trials.json")):
        content = _load(path)
        record = _load(path.with_name(f"{path.name.removesuffix('_trials.json')}.json"))
        try:
            rung_names, best_id = [str(rung) for rung in content["rungs"]], content["best_trial_id"]
            trials = [_trial(number, entry) for number, entry in enumerate(content["trials"])]
            name = str(record["masker_name"])
            key = (str(record["model"]), str(record["task"]), _identity(content, name))
            if key not in studies:
                studies[key] = Study(key[0], key[1], SparseConfig(name, None, None).family, trials)
            best = next((trial for trial in trials if trial.trial_id == best_id), None)
            studies[key].levels.append(Level(name, record["budget"], record, best))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: is not a trials file of a search ({type(error).__name__}: {error}); search again"
            ) from None
    if not studies:
        raise UserError(f"{folder}: holds no finished search (no *_trials.json)")
    for study in studies.values():
        study.levels.sort(key=lambda level: (level.budget is None, level.budget or 0.0, level.name))
        twins = [
            s for s in studies.values() if (s.model, s.task, s.combination) == (study.model, study.task, study.combination)
        ]
        if len(twins) > 1:  # levels that could not share a study
            for twin in twins:
                twin.combination += f" ({', '.join(level.label for level in twin.levels)})"
    return Run(folder, list(studies.values()), rung_names)


def _runs(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("run_*") if path.is_dir() and _RUN.match(path.name)), reverse=True)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); search again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; search again")
    return content


def _identity(content: dict[str, Any], name: str) -> str:
    """What levels of one study share: the part of their trials' ids before the number."""
    return str(content["trials"][0]["trial_id"]).rpartition("_")[0] if content["trials"] else name


def _trial(number: int, entry: dict[str, Any]) -> Trial:
    return Trial(
        trial_id=str(entry["trial_id"]),
        number=number,
        params=dict(entry["config"]),
        status=str(entry["status"]),
        error_message=entry.get("error_message"),
        pruned_at=entry.get("pruned_at"),
        rungs={int(rung): dict(figures) for rung, figures in entry["figures"].items()},
    )
