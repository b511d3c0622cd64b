"""Every benchmark goes through Phase 2 on small data in its hub's schema: asked, answered, scored, written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark.execution import run_benchmarks
from benchmark.jobs import BenchmarkUnit
from benchmark.settings import Settings
from benchmark.speed.toy import toy_configs
from benchmark.tasks import expand_task

DATA = Path(__file__).parents[1] / "data"
TASKS = [
    "infinite_bench/passkey",
    "infinite_bench/kv_retrieval",
    "infinite_bench/code_debug",
    "infinite_bench/longbook_choice_eng",
    "ruler/3000/niah_single_1",
    "ruler/3000/fwe",
    "loogle/longdep_qa",
    "loogle/shortdep_qa",
    "loogle/shortdep_cloze",
    "loogle/longdep_summarization",
    "zero_scrolls/default",
    "longbench/passage_retrieval_en",
    "longbench/qasper",
    "longbench/trec",
    "longbench/qasper_e",
    "longbench/dureader",
    "longbenchv2/0shot",
    "longbenchv2/cot",
    "aime2024/aime2024",
    "aime2025/aime2025",
]


def test_every_benchmark_runs(tiny_model: str, tmp_path: Path) -> None:
    settings = Settings(
        models=(tiny_model,),
        tasks=tuple(TASKS),
        device="cpu",
        max_requests=2,
        max_new_tokens=6,
        max_context_length=4000,
        data_dir=DATA,
        benchmark_results_dir=tmp_path / "benchmark_results",
    )
    leaves = [leaf for name in TASKS for leaf in expand_task(name, DATA).names]
    configs = tuple(toy_configs()[:2])
    outcome = run_benchmarks([BenchmarkUnit(tiny_model, leaf, configs) for leaf in leaves], settings, in_process=True)
    assert outcome.failures == []
    for leaf in leaves:
        for config in configs:
            (folder,) = (tmp_path / "benchmark_results").glob(f"*/{config.name}/{leaf.replace('/', '_')}")
            metrics = json.loads((folder / "metrics.json").read_text())
            assert metrics["samples"]["ok"] >= 1, leaf
            assert metrics["score"] is not None and 0 <= metrics["score"] <= 1, leaf
            assert (folder / "raw_results.csv").stat().st_size > 0


@pytest.mark.parametrize("name", ["ruler/4096", "infinite_bench/passkey", *[t for t in TASKS if "ruler" not in t]])
def test_the_documented_names_are_tasks(name: str) -> None:
    assert expand_task(name, DATA).names
