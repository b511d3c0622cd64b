"""A tiny random model in a folder and a toy task, so that whole Phase 2 runs take seconds."""

from __future__ import annotations

import os

# Before torch is imported: threads that wait do not spin, which would cost a test run on a shared machine ten times its work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark.execution.jobs import BenchmarkUnit
from benchmark.settings import Settings, SparseConfig
from benchmark.speed.toy import save_tiny_model
from benchmark.storage.benchmark_records import FoundBy
from tests.toy import ToyTask, toy_configs


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest tests first in the part that each worker begins with: so they end at about the same time."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    longest = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        own = longest[worker::workers]
        count = max(0, (len(items) - len(ordered)) // (workers - worker) - len(own))
        ordered += [*own, *others[:count]]
        del others[:count]
    items[:] = ordered


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a saved Llama of two layers with a tokenizer of single characters."""
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama"))


@pytest.fixture
def toy_task(monkeypatch: pytest.MonkeyPatch) -> ToyTask:
    """The task "toy/count": get_task finds it in this process; workers are handed its samples."""
    import benchmark.execution.jobs

    task = ToyTask()
    monkeypatch.setattr(benchmark.execution.jobs, "get_task", lambda name: task)
    return task


@pytest.fixture
def toy_unit(tiny_model: str, toy_task: ToyTask) -> BenchmarkUnit:
    found = FoundBy(
        config_run="run_x", config_file="toy.json", budget=0.25, meets_budget=True, error=0.1, density=0.2, score=None,
        hyperparams={}, identity="x", sparse_from="question",
    )  # fmt: skip
    return BenchmarkUnit(tiny_model, toy_task.name, tuple(toy_configs()), {"sink_local_25pct": found})


@pytest.fixture
def make_settings(tiny_model: str, tmp_path: Path) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        given: dict[str, Any] = {
            "models": (tiny_model,),
            "tasks": ("toy/count",),
            "device": "cpu",
            "max_new_tokens": 8,
            "max_requests": 4,
            "max_context_length": 512,
            "max_concurrent_benchmarks": 1,
            "benchmark_results_dir": tmp_path / "benchmark_results",
        }
        return Settings(**{**given, **changes})

    return make


@pytest.fixture
def configs() -> list[SparseConfig]:
    return toy_configs()
