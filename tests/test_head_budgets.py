"""Head budgets: tables are checked, written and read, and fitted to what the curves say."""

from __future__ import annotations

import pytest
import torch

from sparse_attention_hub import OracleTopKConfig, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.head_budgets import GRID, Curves, even_factor, fit_head_budgets

LAYERS, KV_HEADS, HEADS = 3, 2, 4


def made_curves(samples: int, noise: float = 0.0) -> Curves:
    """Heads of kv head 0 need few keys, those of kv head 1 many: error = need / keys, density = 0.05 x factor."""
    generator = torch.Generator().manual_seed(5)
    need = torch.tensor([0.1, 0.1, 1.0, 1.0]).expand(samples, LAYERS, HEADS).double()
    need = need * (1 + noise * torch.randn(need.shape, generator=generator)).clamp(min=0.1)
    densities = 0.05 * torch.tensor(GRID, dtype=torch.float64)[None, :, None, None].expand(samples, -1, LAYERS, HEADS)
    return Curves(need[:, None] * 0.01 / densities, densities)


@pytest.mark.parametrize("columns", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize("samples", [1, 4])
def test_the_table_meets_the_density_and_gives_more_where_it_helps(columns: int, samples: int) -> None:
    curves = made_curves(samples)
    table, strength = fit_head_budgets(curves, 0.05, columns)
    factors = torch.tensor(table)
    assert factors.shape == (LAYERS, columns)
    # Densities are linear in the factors here, so the mean factor is 1.
    assert factors.mean() == pytest.approx(1.0, rel=0.02)
    if columns == 1:
        assert factors.flatten().tolist() == pytest.approx([1.0] * LAYERS, rel=0.02)
    else:
        ratio = factors[:, -1] / factors[:, 0]
        assert bool((ratio > 1.2).all()) and (samples == 1 or strength == 1.0)
        # Error = need / keys is least where keys go with the square root of the need.
        if samples > 1:
            assert ratio.mean() == pytest.approx(10**0.5, rel=0.35)


def test_what_other_samples_do_not_share_is_not_learned() -> None:
    generator = torch.Generator().manual_seed(1)
    need = torch.rand(6, LAYERS, HEADS, generator=generator).double() ** 4  # of each sample by itself
    plain = made_curves(6)
    _, strength = fit_head_budgets(Curves(need[:, None] * 0.01 / plain.densities, plain.densities), 0.05, HEADS)
    assert strength < 1.0


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


def test_bad_dense_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="dense_layers must be an integer >= 0, got -1"):
        ResearchAttentionConfig([OracleTopKConfig(0.1)], dense_layers=[-1])


@pytest.mark.parametrize(("layer", "columns"), [(2, 2), (0, 3)])
def test_a_table_of_another_model_is_refused(layer: int, columns: int) -> None:
    attention = ResearchAttention(ResearchAttentionConfig([OracleTopKConfig(0.1)], head_budgets=[[1.0] * columns] * 2))
    queries, keys = torch.randn(1, HEADS, 1, 8), torch.randn(1, KV_HEADS, 30, 8)
    with pytest.raises(ValueError, match="fit a table for this model"):
        attention(queries, keys, keys, layer_idx=layer)
