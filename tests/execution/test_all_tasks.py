"""Every benchmark goes through Phase 2 on small data in its hub's schema: asked, answered, scored, written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmark.execution.jobs import BenchmarkUnit
from benchmark.execution.runner import run_benchmarks
from benchmark.raytune.run_full_benchmark import main
from benchmark.settings import Settings
from benchmark.tasks import expand_task
from tests.toy import toy_configs

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


@pytest.fixture(scope="module")
def short_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with 2,000 positions."""
    folder = tmp_path_factory.mktemp("short") / "tiny-llama"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2000}))
    return str(folder)


def test_generated_samples_fit_the_model(short_model: str, tmp_path: Path) -> None:
    task = "infinite_bench/passkey"
    settings = Settings((short_model,), (task,), device="cpu", max_requests=3, benchmark_results_dir=tmp_path, max_new_tokens=2)
    outcome = run_benchmarks([BenchmarkUnit(short_model, task, tuple(toy_configs()[:1]))], settings, in_process=True)
    assert outcome.failures == []
    (path,) = tmp_path.glob("*/dense/*/metrics.json")
    assert (samples := json.loads(path.read_text())["samples"])["ok"] == 3 and samples["truncated"] == 0


def test_samples_of_a_length_that_does_not_fit_are_not_cut(short_model: str, tmp_path: Path) -> None:
    task = "ruler/1800/niah_single_1"
    settings = Settings((short_model,), (task,), device="cpu", max_context_length=1500, benchmark_results_dir=tmp_path)
    outcome = run_benchmarks([BenchmarkUnit(short_model, task, tuple(toy_configs()[:1]))], settings, in_process=True)
    (failure,) = outcome.failures
    assert "ruler/1800/niah_single_1 fills 1800 tokens, more than --max-context-length 1500" in str(failure)


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("ruler/1800", ["--max-context-length", "1500"], "fills 1800 tokens, more than --max-context-length 1500: give"),
        ("ruler/2200", [], "/tiny-llama takes 2000 at most: take a shorter task or another model"),
    ],
)
def test_a_length_that_does_not_fit_is_refused_before_any_work(
    task: str, flags: list[str], message: str, short_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run = ["--models", short_model, "--device", "cpu", "--configs", "dense", "--phase", "2", "--tasks", task, *flags]
    assert main(run) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {task}/niah_single_1 fills") and message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ruler/4096", "infinite_bench/passkey", *[t for t in TASKS if "ruler" not in t]])
def test_the_documented_names_are_tasks(name: str) -> None:
    assert expand_task(name, DATA).names
