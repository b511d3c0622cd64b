"""Names and identities of studies: what is searched again, what is read from the journal, what would overwrite what."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark.search.spec import StudySpec, device_and_dtype, plan_studies, study_id
from benchmark.settings import Settings, SparseConfig
from benchmark.speed.toy import save_tiny_model
from sparse_attention_hub import MaskerConfig, OracleTopKConfig, ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.errors import UserError

SETTINGS = Settings(models=("org/m",), tasks=("t",), device="cpu")


def config(name: str, *maskers: MaskerConfig) -> SparseConfig:
    return SparseConfig(name, ResearchAttentionConfig(list(maskers)), tuple(type(masker) for masker in maskers))


def top_k(name: str, heavy: float = 0.05) -> SparseConfig:
    return config(name, SinkMaskerConfig(0.01), OracleTopKConfig(heavy))


def study(model: str = "org/m", *names: str) -> StudySpec:
    studies, _ = plan_studies([model], ["t"], [top_k(name) for name in names or ("x_5pct", "x_10pct")])
    return studies[0]


@pytest.mark.parametrize("changes", [{"num_samples": 7}, {"search_timeout": 5.0}, {"trace_budget_gb": 1.0}])
def test_how_trials_are_read_leaves_the_journal_as_it_is(changes: dict[str, object]) -> None:
    other = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    assert study().identity(other, "s") != study().identity(SETTINGS, "s")
    assert study().journal_identity(other, "s") == study().journal_identity(SETTINGS, "s")


@pytest.mark.parametrize("names", [["x_5pct", "x_10pct"], ["x"], ["x_5pct", "x"]])
def test_an_objective_counts_only_where_a_level_has_no_budget(names: list[str]) -> None:
    found, other = study("org/m", *names), replace(SETTINGS, objective="sparsity_5")
    assert (found.identity(other, "s") == found.identity(SETTINGS, "s")) == ("x" not in names)
    assert found.journal_identity(other, "s") == found.journal_identity(SETTINGS, "s")


@pytest.mark.parametrize(
    "changes",
    [{"attention_backend": "reference"}, {"dense_backend": "sdpa"}, {"dtype": "bfloat16"}, {"sparse_from": "decode"}],
)
def test_what_determines_an_evaluation_begins_a_journal(changes: dict[str, object]) -> None:
    other = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    assert study().journal_identity(other, "s") != study().journal_identity(SETTINGS, "s")
    assert study().identity(other, "s") != study().identity(SETTINGS, "s")


def test_budgets_on_other_figures_and_head_budgets_are_other_searches() -> None:
    kv, off = replace(SETTINGS, budget_on="kv"), replace(SETTINGS, head_budgets="off")
    assert (
        len({study().identity(settings, "s") for settings in (SETTINGS, kv, off, replace(SETTINGS, head_budgets="head"))}) == 4
    )
    assert study().journal_identity(off, "s") == study().journal_identity(SETTINGS, "s")
    assert study().journal_identity(kv, "s") != study().journal_identity(SETTINGS, "s")


def test_sizes_below_the_search_space_are_searched_too() -> None:
    studies, _ = plan_studies(["m"], ["t"], [top_k("x_5pct"), top_k("x_0.5pct", 0.002)])
    (spec,) = studies
    low = spec.space().domains["oracletopk_heavy_size"].low
    assert low == pytest.approx(0.001) and spec.stems()[1].endswith("_x_0.5pct")
    usual, _ = plan_studies(["m"], ["t"], [top_k("x_5pct")])
    assert usual[0].space().domains["oracletopk_heavy_size"].low == 0.005


def test_other_samples_are_another_search() -> None:
    assert study().identity(SETTINGS, "s") != study().identity(SETTINGS, "edited")
    assert study().journal_identity(SETTINGS, "s") != study().journal_identity(SETTINGS, "edited")


def test_other_levels_are_another_search_on_the_same_journal() -> None:
    one, both = study("org/m", "x_5pct"), study()
    assert one.identity(SETTINGS, "s") != both.identity(SETTINGS, "s")
    assert one.journal_identity(SETTINGS, "s") == both.journal_identity(SETTINGS, "s")


def test_auto_is_what_it_means_here() -> None:
    assert device_and_dtype(SETTINGS) == ["cpu", "torch.float32"]
    explicit = replace(SETTINGS, dtype="float32")
    assert study().identity(SETTINGS, "s") == study().identity(explicit, "s")
    # Only the cluster's machines know.
    assert device_and_dtype(replace(SETTINGS, ray_address="head:6379", dtype="auto")) == ["cluster", "cpu", "auto"]


def test_new_weights_in_an_old_folder_are_another_search(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    before = study(str(folder)).identity(SETTINGS, "s")
    assert study(str(folder)).identity(SETTINGS, "s") == before
    os.utime(folder / "model.safetensors", (1, 1))
    assert study(str(folder)).identity(SETTINGS, "s") != before


def test_levels_that_cannot_share_a_study_have_names_of_their_own() -> None:
    words = [f"{place}_{word}" for place in ("x", "x_2") for word in ("5pct", "10pct")]
    configs = [config(word, SinkMaskerConfig(0.01), OracleTopKConfig(0.05)) for word in words]
    apart = [config("x_25pct", OracleTopKConfig(0.05), SinkMaskerConfig(0.01))]
    studies, _ = plan_studies(["m"], ["t"], [*configs, *apart])
    assert [(s.name, len(s.levels)) for s in studies] == [("x_5pct", 2), ("x_2", 2), ("x_25pct", 1)]
    assert len({study_id(s) for s in studies}) == 3


@pytest.mark.parametrize(("models", "names"), [(["org/m", "org_m"], ["x_5pct"]), (["m"], ["a/b_5pct", "a_b_5pct"])])
def test_names_that_meet_in_one_file_are_refused(models: list[str], names: list[str]) -> None:
    with pytest.raises(UserError, match="the same files"):
        plan_studies(models, ["t"], [top_k(name) for name in names])
