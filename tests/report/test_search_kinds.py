"""Methods by kind: what the names of maskers say, and the plot."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.raytune.analyze_trials import main
from benchmark.raytune.run_full_benchmark import get_all_sparse_configs
from benchmark.report.chart import density_axis, panel_grid
from benchmark.report.search_kinds import EVICTIONS, LEAST, SAMPLERS, kind_of
from sparse_attention_hub.maskers.base import _REGISTRY
from sparse_attention_hub.maskers.eviction import Eviction
from tests.raytune.test_analyze_trials import MODEL, make_trials
from tests.search.search_files import best_config, write_level


def test_the_names_are_those_of_the_library() -> None:
    own = {
        config.__name__: masker for config, masker in _REGISTRY.items() if masker.__module__.startswith("sparse_attention_hub.")
    }
    assert {name for name, masker in own.items() if issubclass(masker, Eviction)} == EVICTIONS
    assert {name for name, masker in own.items() if masker.is_sampling} == SAMPLERS


def test_kinds_of_combinations() -> None:
    assert kind_of(["SinkMaskerConfig", "LocalMaskerConfig"]) == "retrieval"
    assert kind_of(["SinkMaskerConfig", "QuestTopKMaskerConfig", "TwilightConfig"]) == "retrieval"
    assert kind_of(["LocalMaskerConfig", "SnapKVConfig"]) == "eviction"
    assert kind_of(["OracleTopKConfig"]) == "oracle"
    assert kind_of(["OracleTopKConfig", "AdaptiveSamplingMaskerConfig"]) == "sampling"


def test_a_panel_that_is_left_over_is_hidden() -> None:
    figure, panels = panel_grid(3, 2, (3.0, 2.0), 1.0)
    assert len(panels) == 3 and [panel.get_visible() for panel in figure.axes] == [True, True, True, False]


@pytest.mark.parametrize("count", [LEAST - 1, LEAST])
def test_the_plot_is_drawn_for_many_combinations(count: int, tmp_path: Path) -> None:
    found = [(name, config) for name, config, _ in get_all_sparse_configs([5, 10]) if config is not None]
    families = sorted({name.rpartition("_")[0] for name, _ in found})
    kept = [family for family in families if "snap_kv" in family or "top_k" in family or "random" in family][:count]
    assert len(kept) == count
    for name, config in found:
        family, _, level = name.rpartition("_")
        if family in kept:
            budget = float(level.removesuffix("pct")) / 100
            trials = make_trials(family, 0.5)
            best = best_config(
                model=MODEL,
                task="t/a",
                masker_name=name,
                budget=budget,
                best_trial_id=f"{family}_00002",
                sparse_config=config.to_dict(),
            )
            write_level(tmp_path / "optimal_configs" / "run_20240101_000000", best, trials)
    out = tmp_path / "out"
    assert main(["--optimal-configs-dir", str(tmp_path / "optimal_configs"), "--output-dir", str(out)]) == 0
    assert (out / "methods.png").is_file() == (count == LEAST)


def test_a_configuration_without_a_budget_has_no_line(tmp_path: Path) -> None:
    run = tmp_path / "optimal_configs" / "run_20240101_000000"
    for number in range(LEAST):
        for level in (5, 10):
            best = best_config(model=MODEL, task="t/a", masker_name=f"way{number}_{level}pct", budget=level / 100)
            write_level(run, best, make_trials(f"way{number}", 0.5))
    write_level(run, best_config(model=MODEL, task="t/a", masker_name="free", budget=None), make_trials("free", 0.5))
    out = tmp_path / "out"
    assert main(["--optimal-configs-dir", str(run.parent), "--output-dir", str(out)]) == 0
    assert (out / "methods.png").is_file()


def test_what_reads_more_than_dense_is_within_the_axis() -> None:
    (panel,) = panel_grid(1, 1, (3.0, 2.0), 1.0)[1]
    density_axis(panel, [0.1, 1.3])
    assert panel.get_xlim()[1] > 1.3
