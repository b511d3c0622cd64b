"""The benchmarks: their samples, prompts and scores.

    from benchmark.tasks import get_task, available_tasks, expand_task, score_prediction
    score_prediction("ruler/4096/vt", "ABCDE FGHIJ", ["ABCDE", "QWERT"])      # {"string_match": 0.5}

A benchmark's module is imported when one of its names is used; base.py says what such a module defines.
"""

import difflib
import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmark.tasks.base import Scores, Task, TaskSelection
from sparse_attention_hub.errors import UserError, quoted

__all__ = ["available_tasks", "expand_task", "get_task", "register_benchmarks", "score_prediction"]

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
_REGISTERED: dict[str, ModuleType] = {}  # of modules outside this package


def register_benchmarks(module: ModuleType) -> None:
    """Add the benchmarks of a module that defines what base.py says. UserError for the name of one that exists."""
    for benchmark in {name.partition("/")[0] for name in module.make_tasks()}:
        if benchmark in MODULES or _REGISTERED.setdefault(benchmark, module) is not module:
            raise UserError(f"{module.__name__}: there is a benchmark {quoted(benchmark)} already: give it another name")


def _module(benchmark: str) -> ModuleType:
    return _REGISTERED.get(benchmark) or importlib.import_module(f"benchmark.tasks.{MODULES[benchmark]}")


@functools.cache
def _listed(benchmark: str) -> dict[str, Task]:
    prefix = benchmark + "/"
    return {name: task for name, task in _module(benchmark).make_tasks().items() if name.startswith(prefix)}


def available_tasks() -> list[str]:
    """Every listed leaf task. More names work: any RULER length, as in "ruler/5000/vt"."""
    return [name for benchmark in [*MODULES, *_REGISTERED] for name in _listed(benchmark)]


def _find(name: str) -> Task | None:
    """The task of this name, listed or not. UserError for an unknown benchmark or one without a subset."""
    benchmark, _, subset = name.partition("/")
    benchmarks = [*MODULES, *_REGISTERED]
    if benchmark not in benchmarks:
        near = difflib.get_close_matches(benchmark[:100], benchmarks, n=3, cutoff=0.5)
        raise UserError(
            f"unknown task {quoted(name)}: no such benchmark, "
            + (f"near names: {', '.join(near)}" if near else f"there are {', '.join(benchmarks)}")
        )
    if not subset:
        examples = list(_listed(benchmark))
        shown = ", ".join(examples[:3]) + (", ..." if len(examples) > 3 else "")
        raise UserError(f"task {name!r} needs a subset: {shown}")
    find_task = getattr(_module(benchmark), "find_task", lambda name: None)
    return _listed(benchmark).get(name) or find_task(name)


def get_task(name: str) -> Task:
    """The leaf task of this name. UserError, with names to use instead, for an unknown name or a group."""
    task = _find(name)
    if task is not None:
        return task
    group, _, last = name[:100].rpartition("/")
    listed = list(_listed(name.partition("/")[0]))
    leaves = {member.rpartition("/")[2]: None for member in listed}
    members = [f"{name}/{leaf}" for leaf in leaves if _find(f"{name}/{leaf}")]
    if members:
        raise UserError(f"{name!r} is a group of {len(members)} tasks: name one of them, such as {members[0]}")
    siblings = [f"{group}/{leaf}" for leaf in difflib.get_close_matches(last, leaves, n=3, cutoff=0.4) or leaves]
    near = (
        (list(filter(_find, siblings)) if "/" in group else [])
        or difflib.get_close_matches(name[:100], listed, n=3, cutoff=0.4)
        or listed
    )
    raise UserError(
        f"unknown task {quoted(name)}: near names are {', '.join(near[:3])}; `python -m benchmark.tasks list` shows all"
    )


def expand_task(name: str, data_dir: Path | None = None) -> TaskSelection:
    """The leaf tasks of a name: itself, or a group's members whose data are available, with a note if some are not."""
    _find(name)  # says what is wrong with a name without benchmark or subset
    expand = getattr(_module(name.partition("/")[0]), "expand", lambda name, data_dir: None)
    selection: TaskSelection | None = expand(name, data_dir)
    return selection or TaskSelection([get_task(name).name])


def score_prediction(task_name: str, prediction: str | None, references: Any, all_classes: list[str] | None = None) -> Scores:
    """The original benchmark's scores of one answer, every value in 0..1.

    `task_name`: a task, or a benchmark whose tasks all have the same score ("aime2024", "longbenchv2").
    `prediction`: None counts as an empty answer. `references`: the gold answers, a list of texts (or its text, as in a CSV
    cell) or the value in the benchmark's own data (an int for infinite_bench/code_run); None is no reference, which scores
    0. Raises UserError for an unknown name and ValueError for gold answers that the benchmark cannot have.
    """
    tasks = list(_listed(task_name).values()) if task_name in MODULES or task_name in _REGISTERED else []
    alike = len({task.description.metric for task in tasks}) == 1
    task = tasks[0] if alike else get_task(task_name)
    return task.score_answer(prediction or "", [] if references is None else references, all_classes)
