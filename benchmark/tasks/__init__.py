"""The benchmarks: where samples come from, how they are asked, how answers are scored.

    from benchmark.tasks import get_task, available_tasks, expand_task, score_prediction
    score_prediction("ruler/4096/vt", "ABCDE FGHIJ", ["ABCDE", "QWERT"])      # {"string_match": 0.5}

Benchmark modules are imported when one of their names is asked for; base.py says what such a module defines.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmark.tasks.base import Task, TaskSelection, UserError

__all__ = ["available_tasks", "expand_task", "get_task", "score_prediction"]

# benchmark name -> its module in this package
MODULES: dict[str, str] = {
    "ruler": "ruler",
    "ruler_hf": "ruler",
    "ruler16k": "ruler",
    "ruler32k": "ruler",
    "infinite_bench": "infinite_bench",
    "infinite_bench_hf": "infinite_bench",
    "loogle": "loogle",
    "zero_scrolls": "zero_scrolls",
    "longbench": "longbench",
    "longbenchv2": "longbenchv2",
    "aime2024": "aime",
    "aime2025": "aime",
}


def _module(benchmark: str) -> ModuleType:
    return importlib.import_module(f"benchmark.tasks.{MODULES[benchmark]}")


@functools.cache
def _listed(benchmark: str) -> dict[str, Task]:
    prefix = benchmark + "/"
    return {name: task for name, task in _module(benchmark).make_tasks().items() if name.startswith(prefix)}


def available_tasks() -> list[str]:
    """Every listed leaf task. More names work: any RULER length, as in "ruler/5000/vt"."""
    return [name for benchmark in MODULES for name in _listed(benchmark)]


def _check_benchmark(name: str) -> str:
    benchmark, _, subset = name.partition("/")
    if benchmark not in MODULES:
        near = difflib.get_close_matches(benchmark, MODULES, n=3, cutoff=0.5)
        raise UserError(
            f"unknown task {name!r}: no benchmark {benchmark!r}, "
            + (f"near names: {', '.join(near)}" if near else f"there are {', '.join(MODULES)}")
        )
    if not subset:
        examples = list(_listed(benchmark))
        shown = ", ".join(examples[:3]) + (", ..." if len(examples) > 3 else "")
        raise UserError(f"task {name!r} needs a subset: {shown}")
    return benchmark


def get_task(name: str) -> Task:
    """The leaf task of this name. UserError with near names for an unknown one, or what it expands to for a group."""
    benchmark = _check_benchmark(name)
    listed = _listed(benchmark)
    if name in listed:
        return listed[name]
    module = _module(benchmark)
    found: Task | None = module.find_task(name) if hasattr(module, "find_task") else None
    if found is not None:
        return found
    members = [task for task in listed if task.startswith(name + "/")]
    if members:
        raise UserError(
            f"{name!r} is a group of {len(members)} tasks: name one of them, such as {members[0]}, or expand_task it"
        )
    near = difflib.get_close_matches(name, listed, n=3, cutoff=0.4)
    near = near or list(listed)[:3]
    raise UserError(f"unknown task {name!r}: near names are {', '.join(near)}; `python -m benchmark.tasks list` shows all")


def expand_task(name: str, data_dir: Path | None = None) -> TaskSelection:
    """The leaf tasks behind a name: itself, or a group's members that can be had here, with a note if some cannot."""
    benchmark = _check_benchmark(name)
    module = _module(benchmark)
    if hasattr(module, "expand"):
        selection: TaskSelection | None = module.expand(name, data_dir)
        if selection is not None:
            return selection
    return TaskSelection([get_task(name).name])


def score_prediction(
    task_name: str, prediction: str | None, references: Any, all_classes: list[str] | None = None
) -> dict[str, float]:
    """The original benchmark's scores of one answer, every value in 0..1.

    `task_name`: also a benchmark alone, where all of its tasks are scored alike ("aime2024", "longbenchv2").
    `prediction`: None counts as an empty answer. `references`: the gold answers, a list of texts or the value the
    benchmark's own data hold (an int for infinite_bench/code_run); None is no reference, which scores 0. UserError for an
    unknown name, ValueError for gold answers that the benchmark cannot have.
    """
    task = _alike(task_name) or get_task(task_name)
    return task.score_answer(prediction or "", [] if references is None else references, all_classes)


def _alike(benchmark: str) -> Task | None:
    """Any task of a benchmark whose tasks are all scored alike; None if they are not, or the name is not a benchmark's."""
    tasks = list(_listed(benchmark).values()) if benchmark in MODULES else []
    return tasks[0] if len({task.description.metric for task in tasks}) == 1 else None
