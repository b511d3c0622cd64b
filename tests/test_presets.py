"""Presets: the papers' settings build, are named after their budget, are not searched, and run from the command line."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.raytune import configurations
from benchmark.raytune.run_full_benchmark import main, parse_arguments
from benchmark.search.space import CombinationSpace
from benchmark.settings import as_sparse_configs
from sparse_attention_hub import ResearchAttention, preset
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.maskers.drawing import example_configs
from sparse_attention_hub.presets import PAPERS


@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_has_settings_that_a_search_leaves_as_they_are(paper: str) -> None:
    found = preset(paper)
    assert found.name.startswith(paper) and found.paper.startswith("https://arxiv.org/abs/2")
    assert found.sparse_from in ("question", "decode") and inspect.getdoc(PAPERS[paper])
    assert CombinationSpace(found.config, "ruler/4096/vt").domains == {}
    classes: list[Any] = [type(masker) for masker in found.config.masker_configs]
    (entry,) = as_sparse_configs([(f"preset_{found.name}", found.config, classes)])
    only_tokens = all(
        isinstance(value, int)
        for masker in found.config.masker_configs
        for name in ("heavy_size", "sink_size", "window_size", "retrieval_share")
        if (value := getattr(masker, name, None)) is not None
    )
    assert not (only_tokens and entry.budget), "sizes in tokens have no share of the keys as a budget"


@pytest.mark.parametrize("paper", [paper for paper in PAPERS if paper not in ("double_sparsity", "hash_attention", "loki")])
def test_every_preset_attends(paper: str, tmp_path: Path) -> None:
    """At the budget that is asked for. The three that are left out need files of a model."""
    config = preset(paper, **({} if paper == "magic_pig" else {"budget": 0.25 if _is_share(paper) else 128})).config
    if paper == "duo_attention":
        config.masker_configs[-1] = example_configs("duo_attention", tmp_path)[-1]
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(1, heads, 1, 64, generator=generator) for heads in (2, 1, 1)]
    keys, values = (tensor.expand(-1, -1, 1000, -1) + torch.randn(1, 1, 1000, 64, generator=generator) for tensor in args[1:])
    result = ResearchAttention(config)(args[0], keys, values, layer_idx=1)
    assert (result.density == 1.0) == (1 in config.dense_layers) or paper in EVICTIONS
    assert result.output.isfinite().all()


#: They keep what follows the context, and a single call without a state has no context but its own keys.
EVICTIONS = ("snapkv", "h2o", "tova", "key_diff", "knorm", "expected_attention")


def _is_share(paper: str) -> bool:
    return isinstance(inspect.signature(PAPERS[paper]).parameters["budget"].default, float)


def test_names_say_the_budget() -> None:
    names = {paper: preset(paper).name for paper in ("quest", "loki", "socket", "magic_pig", "h2o")}
    assert names == {
        "quest": "quest_1024",
        "loki": "loki_25pct",
        "socket": "socket_0.0422",
        "magic_pig": "magic_pig_k10_l150",
        "h2o": "h2o_20pct",
    }
    assert preset("snapkv", budget=2048).name == "snapkv_2048" and preset("quest").config.dense_layers == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qest", {}), "unknown preset 'qest'; there are streaming_llm, quest,"),
        (("quest", {"budgt": 1}), "preset quest has no budgt; it has budget"),
        (("magic_pig", {"budget": 4}), "preset magic_pig has no budget; it has lsh_k, lsh_l"),
        (("quest", {"budget": 0.1}), r"preset quest: budget \(tokens\) must be an integer >= 1, got 0.1"),
        (("loki", {"budget": 1.5}), "preset loki: heavy_size must be > 0; as a fraction in"),
        (("h2o", {"budget": "much"}), "preset h2o: budget must be an int"),
    ],
)
def test_what_there_is_not(arguments: tuple[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        preset(arguments[0], **arguments[1])
    assert len(str(caught.value).splitlines()) == 1


def test_on_the_command_line_they_bring_their_protocol() -> None:
    options = parse_arguments(["--configs", "dense", "preset:loki", "preset:snapkv:256"])
    entries, notes = configurations.take_presets(options)
    assert options.configs == ["dense", "preset_loki_25pct", "preset_snapkv_256"] and options.sparse_from == "decode"
    assert [name for name, _, _ in entries] == options.configs[1:] and "protocol of loki_25pct, snapkv_256" in notes[0]
    assert [config.budget for config in as_sparse_configs(entries)] == [0.25, None]
    given = parse_arguments(["--configs", "preset:loki", "preset:quest", "preset:quest", "--sparse-from", "question"])
    entries, notes = configurations.take_presets(given)
    assert len(entries) == 2 and not notes and given.sparse_from == "question"
    assert configurations.take_presets(parse_arguments(["--configs", "dense"])) == ([], [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preset:qest"], "unknown preset 'qest'"),
        (["preset:quest:many"], "must be an integer"),
        (["preset:magic_pig:5"], "has no budget"),
        (["preset:quest", "preset:loki"], "presets of two protocols"),
    ],
)
def test_bad_words_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "--dry-run", "--configs", *words]) == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed and "--configs" in printed and len(printed.splitlines()) == 1


def test_they_are_listed_and_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--configs", "list"]) == 0
    assert "preset:quest" in capsys.readouterr().out.splitlines()
    assert main(["--debug", "--dry-run", "--configs", "dense", "preset:quest", "preset:twilight"]) == 0
    printed = capsys.readouterr().out
    assert "preset_quest_1024 (no budget): 0 parameters" in printed


@pytest.mark.parametrize("paper", ["h2o", "pq_cache"])
def test_half_of_a_budget_in_tokens_is_tokens(paper: str) -> None:
    sizes = [size for masker in preset(paper, budget=1024).config.masker_configs for size in vars(masker).values()]
    assert sizes.count(512) == 2
    with pytest.raises((UserError, ValueError), match="budget .tokens. must be an integer >= 2"):
        preset(paper, budget=1)
