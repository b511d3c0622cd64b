"""Head budgets: tables are checked, written and read, and fitted to what the curves say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "models"))

from tiny_models import build, tokens, wrap

from sparse_attention_hub import OracleTopKConfig, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig, UserError
from sparse_attention_hub.head_budgets import GRID, Curves, even_factor, fit_head_budgets, fit_spending, replay_curves
from sparse_attention_hub.maskers import AdaptiveSamplingMaskerConfig, KnormConfig
from sparse_attention_hub.maskers.layout import on_device
from sparse_attention_hub.models import answer_many, prefill, sparse_attention
from sparse_attention_hub.models.trace import record_trace

LAYERS, KV_HEADS, HEADS = 3, 2, 4


def made_curves(samples: int, noise: float = 0.0) -> Curves:
    """Heads of kv head 0 need few keys, those of kv head 1 many: error = need / keys, density = 0.05 x factor."""
    generator = torch.Generator().manual_seed(5)
    need = torch.tensor([0.1, 0.1, 1.0, 1.0]).expand(samples, LAYERS, HEADS).double()
    need = need * (1 + noise * torch.randn(need.shape, generator=generator)).clamp(min=0.1)
    densities = 0.05 * torch.tensor(GRID, dtype=torch.float64)[None, :, None, None].expand(samples, -1, LAYERS, HEADS)
    return Curves(need[:, None] * 0.01 / densities, densities)


@pytest.mark.parametrize("columns", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize("samples", [2, 4])
def test_the_table_meets_the_density_and_gives_more_where_it_helps(columns: int, samples: int) -> None:
    curves = made_curves(samples)
    fitted = fit_head_budgets(curves, 0.05, columns)
    factors = torch.tensor(fitted.table)
    assert factors.shape == (LAYERS, columns)
    # Densities are linear in the factors here, so the mean factor is 1.
    assert factors.mean() == pytest.approx(1.0, rel=0.02)
    if columns == 1:
        assert factors.flatten().tolist() == pytest.approx([1.0] * LAYERS, rel=0.02)
        assert fitted.held_out == pytest.approx(0.0, abs=0.02)
    else:
        ratio = factors[:, -1] / factors[:, 0]
        assert fitted.strength == 1.0 and fitted.held_out < -0.1
        # Error = need / keys is least where keys go with the square root of the need.
        assert ratio.mean() == pytest.approx(10**0.5, rel=0.35)


def test_one_group_leaves_nothing_to_judge_by() -> None:
    with pytest.raises(ValueError, match="at least two groups of rows, got 1"):
        fit_head_budgets(made_curves(1), 0.05, 1)


def test_what_other_samples_do_not_share_is_not_learned() -> None:
    generator = torch.Generator().manual_seed(1)
    need = torch.rand(6, LAYERS, HEADS, generator=generator).double() ** 4  # of each sample by itself
    plain = made_curves(6)
    fitted = fit_head_budgets(Curves(need[:, None] * 0.01 / plain.densities, plain.densities), 0.05, HEADS)
    assert fitted.strength < 1.0


def test_curves_of_a_configuration_give_the_table_of_a_larger_one() -> None:
    curves = made_curves(3)  # densities are linear: the table of a configuration of twice the sizes has a mean factor of 1, too
    found = {spent: fit_spending(curves, spent, KV_HEADS) for spent in (0.05, 0.1)}
    for spent, fitted in found.items():
        assert fitted is not None and torch.tensor(fitted.table).mean() * spent == pytest.approx(0.99 * spent, rel=0.02)
    for spent in (0.05 * GRID[0], 0.06 * GRID[-1]):
        assert fit_spending(curves, spent, KV_HEADS) is None, "no size reaches it"


def test_an_even_budget_of_a_density() -> None:
    factor, error = even_factor(made_curves(2), 0.1)
    assert factor == pytest.approx(2.0, rel=0.02)
    assert error == pytest.approx(0.55 * 0.01 / 0.1, rel=0.05)


def test_a_configuration_is_written_and_read() -> None:
    config = ResearchAttentionConfig(
        [SinkMaskerConfig(0.02), OracleTopKConfig(0.1)], dense_layers=[1, 0, 1], head_budgets=[[1, 2.0]]
    )
    assert config.dense_layers == [0, 1]
    assert ResearchAttentionConfig.from_dict(config.to_dict()) == config
    plain = ResearchAttentionConfig([OracleTopKConfig(0.1)])
    assert set(plain.to_dict()) == {"type", "masker_configs"}  # identities of results without a table stay


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (3, "a row of factors per layer, got int"),
        ([], "a row of factors per layer"),
        ([[1.0], [1.0, 2.0]], r"rows of one length, got \[1, 2\]"),
        ([[0.0]], "factors > 0, got 0.0"),
        ([[float("nan")]], "factors > 0, got nan"),
        ([[float("inf")]], "factors > 0, got inf"),
        ([["1"]], "factors > 0, got '1'"),
        ([[True]], "factors > 0, got True"),
    ],
)
def test_a_bad_table_is_refused(table: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResearchAttentionConfig([OracleTopKConfig(0.1)], head_budgets=table)  # type: ignore[arg-type]


def test_factors_of_1_are_what_they_were_before_another_call() -> None:
    """Sizes in tokens and factors meet in one cache, where 1 equals 1.0."""
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(1, heads, length, 16, generator=generator) for heads, length in ((4, 3), (2, 1000), (2, 1000))]
    sampling = AdaptiveSamplingMaskerConfig(0.29, 0.3, 0.3, 0, 0)
    budgets = ResearchAttention(ResearchAttentionConfig([sampling], head_budgets=[[1.0, 1.0]]))
    wanted = ResearchAttention(ResearchAttentionConfig([sampling]))(*tensors).mask.inclusion_probability()
    ResearchAttention(ResearchAttentionConfig([KnormConfig(1)], head_budgets=[[1.0, 1.0]]))(*tensors)
    assert torch.equal(budgets(*tensors).mask.inclusion_probability(), wanted)
    assert on_device((1, 1), torch.int64, tensors[0].device).dtype == torch.int64
    assert on_device((1.0, 1.0), torch.float64, tensors[0].device).dtype == torch.float64


def test_bad_dense_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="dense_layers must be an integer >= 0, got -1"):
        ResearchAttentionConfig([OracleTopKConfig(0.1)], dense_layers=[-1])


@pytest.mark.parametrize(("layer", "columns"), [(2, 2), (0, 3)])
def test_a_table_of_another_model_is_refused(layer: int, columns: int) -> None:
    attention = ResearchAttention(ResearchAttentionConfig([OracleTopKConfig(0.1)], head_budgets=[[1.0] * columns] * 2))
    queries, keys = torch.randn(1, HEADS, 1, 8), torch.randn(1, KV_HEADS, 30, 8)
    with pytest.raises(ValueError, match="fit a table for this model"):
        attention(queries, keys, keys, layer_idx=layer)


TABLE = ResearchAttentionConfig([OracleTopKConfig(0.1)], head_budgets=[[1.0, 2.0]] * 5)


@pytest.mark.parametrize("layers", [4, 6])
def test_a_table_of_another_number_of_layers_is_refused(layers: int) -> None:
    with pytest.raises(UserError, match=f"a table of 5 layers, this model has {layers}: fit a table for this model"):
        TABLE.check_layers(layers)
    with pytest.raises(UserError, match=r"dense_layers must be in 0 \.\. 3 for this model, got 7"):
        ResearchAttentionConfig([OracleTopKConfig(0.1)], dense_layers=[0, 7]).check_layers(4)
    TABLE.check_layers(5)


def test_a_model_refuses_the_table_of_another_one_before_it_answers() -> None:
    lm = wrap(build("llama"))
    attention = ResearchAttention(TABLE)
    with pytest.raises(UserError, match="this model has 4"):
        answer_many(lm, prefill(lm, tokens(20), 8), tokens(3), [attention], 2)
    with pytest.raises(UserError, match="this model has 4"), sparse_attention(lm, attention):
        pass
    with pytest.raises(UserError, match="this model has 4"):
        lm.complete(TABLE)


def test_a_file_of_another_model_is_refused_by_its_name(tmp_path: Path) -> None:
    lm = wrap(build("llama"))
    config = replace(TABLE, head_budgets=[[1.0, 2.0]] * 4)
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"model": "org/other-1B", "sparse_config": config.to_dict()}))
    with pytest.raises(UserError, match=f"head_budgets were fitted for org/other-1B, this model is {lm.id}: search with it"):
        ResearchAttention.from_file(path, lm)
    path.write_text(json.dumps({"model": f"/some/folder/{lm.id}", "sparse_config": config.to_dict()}))
    assert ResearchAttention.from_file(path, lm).config == config


@pytest.mark.parametrize("parts", [1, 2])
def test_curves_say_what_other_configurations_spend_too(parts: int, tmp_path: Path) -> None:
    lm = wrap(build("llama"))
    traces = [record_trace(lm, tokens(60, seed=n), tokens(5, seed=9 + n), 6, tmp_path / str(n)) for n in range(2)]
    small, large = (ResearchAttentionConfig([SinkMaskerConfig(2), OracleTopKConfig(size)]) for size in (0.1, 0.2))
    curves, (spent,) = replay_curves(traces, small, [large], layers=lm.num_layers, parts=parts)
    assert curves.errors.shape == curves.densities.shape == (2 * parts, len(GRID), 4, lm.model.config.num_attention_heads)
    by_factor = curves.densities.mean((0, 2, 3))
    assert bool((by_factor.diff() >= 0).all()) and float(by_factor[-1]) > 4 * float(by_factor[0])
    assert curves.errors.mean((0, 2, 3))[0] > curves.errors.mean((0, 2, 3))[-1]
    assert float(by_factor[GRID.index(1.0)]) < spent < float(by_factor[GRID.index(1.0) + 2])
    alone, nothing = replay_curves(traces, small, layers=lm.num_layers, parts=parts, kv=True)
    assert nothing == [] and torch.equal(alone.errors, curves.errors)
    assert bool((alone.densities >= curves.densities - 1e-9).all())
