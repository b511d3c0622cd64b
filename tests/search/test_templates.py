"""The templates of get_all_sparse_configs on the debug model: a search must not start from what cannot win."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmark.raytune.run_full_benchmark import DEBUG_MODEL, get_all_sparse_configs
from benchmark.search.evaluator import TraceEvaluator
from benchmark.search.spec import plan_studies
from benchmark.settings import Settings, as_sparse_configs
from sparse_attention_hub.models import load_model

TASKS = ("ruler/1024/niah_single_1", "infinite_bench/passkey", "ruler/1024/fwe")


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[TraceEvaluator]]:
    lm = load_model(DEBUG_MODEL, device="cpu")
    settings = Settings(
        models=(DEBUG_MODEL,),
        tasks=TASKS,
        search_max_requests=1,
        search_max_context_length=1024,
        search_max_new_tokens=8,
        trace_budget_gb=0.02,  # four layers: densities differ little between layers
    )
    yield [TraceEvaluator(lm, task, settings, tmp_path_factory.mktemp("traces")) for task in TASKS]


def families() -> list[str]:
    """Without DuoAttention: its density is that of all layers, a share of the heads, and differs between them."""
    found = {config.family for config in as_sparse_configs(get_all_sparse_configs()) if config.config is not None}
    return sorted(found - {"sink_local_duo_attention"})


def test_retrieval_heads_and_edges_are_within_the_budget() -> None:
    for config in as_sparse_configs(get_all_sparse_configs([0.5, 5, 10, 25, 50, 100])):
        if config.family == "sink_local_duo_attention":
            sink, local, duo = config.config.masker_configs  # type: ignore[union-attr]
            assert config.budget is not None and 0.8 * config.budget < duo.retrieval_share + sink.sink_size + local.window_size
            assert duo.retrieval_share + sink.sink_size + local.window_size <= config.budget


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("budgets", [(5, 10, 25, 50), (7, 15, 20, 35)])
def test_templates_keep_within_their_budgets_at_1k(
    budgets: tuple[int, ...], family: str, evaluators: list[TraceEvaluator]
) -> None:
    chosen = [config for config in as_sparse_configs(get_all_sparse_configs(budgets)) if config.family == family]
    studies, left_out = plan_studies([DEBUG_MODEL], ["t"], chosen)
    levels = [level for study in studies for level in study.levels]
    assert len(levels) == 4 and not left_out
    for evaluator in evaluators:
        found = evaluator.evaluate([level.template for level in levels], 1, 300.0)
        for level, figures in zip(levels, found, strict=True):
            assert level.budget is not None and figures.density <= level.budget, f"{level.name} on {evaluator.task.name}"
            assert figures.density > 0.2 * level.budget, "a template is to be near its budget"
