"""The figures of a small replay, search and benchmark are pinned: where they move, a version must be raised, or old results
would be reused beside new ones.

`python tests/test_versions.py` pins them again, after the version was raised.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.execution.jobs import BenchmarkUnit
from benchmark.execution.runner import run_benchmarks
from benchmark.search.space import CombinationSpace
from benchmark.search.study import Study
from benchmark.search.trial import Level
from benchmark.settings import Settings
from benchmark.speed.toy import save_tiny_model
from benchmark.storage.results import Journal
from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.attention import ENGINE_VERSION
from sparse_attention_hub.maskers.base import create_masker
from sparse_attention_hub.maskers.drawing import example_configs, example_inputs
from tests.toy import ToyTask, toy_configs

PINNED = Path(__file__).parent / "data" / "pinned_figures.json"
METHODS = (
    *("causal", "sink", "local", "oracle_top_k", "oracle_top_p", "quest", "double_sparsity", "hash_attention"),
    *("pq_cache", "random_sampling", "adaptive_sampling", "magic_pig"),
    *("landmarks", "sparq", "loki", "clusters"),
    *("twilight", "duo_attention", "socket_lsh"),
    *("snap_kv", "expected_attention", "key_diff", "knorm", "h2o", "tova"),
)


def method_figures(name: str, folder: Path) -> dict[str, Any]:
    """Version, density, KV bytes and error of a method on the example that it draws."""
    config = example_configs(name, folder)[-1]
    result = ResearchAttention(ResearchAttentionConfig([config])).attend_inputs(example_inputs())
    figures = [result.density, result.kv_fraction, float(result.error_rows().nanmean())]
    return {"version": create_masker(config).version, "figures": figures}


def search_figures(folder: Path) -> list[float]:
    """Errors and densities of a search by replay of the example, and of its best."""

    class Replay:
        key = "example"

        def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Any]:
            from benchmark.storage.search_records import Evaluation

            found = []
            for config in configs:
                result = ResearchAttention(config).attend_inputs(example_inputs())
                error = float(result.error_rows().nanmean())
                found.append(Evaluation(error=error, density=result.density, seconds=0.0, score=0.0, sample_scores=[0.0]))
            return found

    template = ResearchAttentionConfig(example_configs("oracle_top_k", folder))
    levels = [Level("top_25pct", 0.25, template), Level("top_50pct", 0.5, template)]
    journal = Journal(folder / "journal.jsonl")
    study = Study(CombinationSpace(template, "t"), levels, Replay(), journal, num_samples=8, timeout=60.0, seed=0)
    for _ in study.run():
        pass
    figures = [trial.last for trial in study.trials] + [study.trials[best.trial].last for best in study.best()]
    return [number for evaluation in figures for number in (evaluation.error or 0.0, evaluation.density)]


def benchmark_figures(folder: Path) -> dict[str, list[float]]:
    """Scores, densities, errors and likelihoods of a benchmark of the tiny model on the toy task."""
    import benchmark.execution.jobs as jobs

    model = str(save_tiny_model(folder / "tiny"))
    settings = Settings(
        models=(model,), tasks=("toy/count",), device="cpu", max_new_tokens=8, max_requests=4, max_context_length=512,
        max_concurrent_benchmarks=1, benchmark_results_dir=folder / "results",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "get_task", lambda name: ToyTask())
        run_benchmarks([BenchmarkUnit(model, "toy/count", tuple(toy_configs()), {})], settings, in_process=True)
    found = {}
    for path in sorted((folder / "results").glob("*/*/*/metrics.json")):
        metrics = json.loads(path.read_text())
        found[path.parent.parent.name] = [metrics[name] for name in ("score", "density", "error", "reference_nll")]
    return found


def measure(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    methods = {name: method_figures(name, folder) for name in METHODS}
    return {
        "engine": ENGINE_VERSION, "methods": methods, "search": search_figures(folder), "benchmark": benchmark_figures(folder)
    }  # fmt: skip


def test_figures_move_with_their_versions_only(tmp_path: Path) -> None:
    pinned, found = json.loads(PINNED.read_text()), measure(tmp_path)
    again = f"then pin the new figures: python {Path(__file__).name}"
    assert found["engine"] == pinned["engine"], f"ENGINE_VERSION was raised: {again}"
    moved = []
    for name, method in found["methods"].items():
        before = pinned["methods"][name]
        if method["version"] != before["version"]:
            pytest.fail(f"the version of {name} was raised: {again}")
        if method["figures"] != pytest.approx(before["figures"], rel=1e-4, abs=1e-5):
            moved.append(name)
    if len(moved) == 1:
        pytest.fail(f"the figures of {moved[0]} moved: raise `version` of its masker, {again}")
    assert not moved, f"the figures of {', '.join(moved)} moved: raise ENGINE_VERSION, {again}"
    assert found["search"] == pytest.approx(pinned["search"], rel=1e-4, abs=1e-5), (
        f"a search found others: raise ENGINE_VERSION, {again}"
    )
    for name, figures in found["benchmark"].items():
        assert figures == pytest.approx(pinned["benchmark"][name], rel=1e-4, abs=1e-5), (
            f"{name} moved: raise ENGINE_VERSION, {again}"
        )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        PINNED.write_text(json.dumps(measure(Path(scratch)), indent=1) + "\n")
