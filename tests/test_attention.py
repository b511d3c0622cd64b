"""ResearchAttention: the pipeline, its figures, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import (
    AdaptiveSamplingMaskerConfig,
    CausalMaskerConfig,
    LandmarksConfig,
    LocalMaskerConfig,
    MagicPigConfig,
    MaskerConfig,
    OracleTopKConfig,
    OracleTopPMaskerConfig,
    QuestTopKMaskerConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    dense_attention,
)
from sparse_attention_hub.maskers.call_cache import CallCache
from sparse_attention_hub.maskers.inputs import AttentionInputs


def tensors(rows: int = 5, n: int = 60, batch: int = 2, heads: int = 8, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(batch, heads, rows, 16, generator=generator)
    keys = torch.randn(batch, kv_heads, n, 16, generator=generator)
    return queries, keys, torch.randn(batch, kv_heads, n, 16, generator=generator)


def make(*configs: MaskerConfig, backend: str = "auto") -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig(list(configs), backend))


@pytest.mark.parametrize("rows", [1, 5, 60])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_dense_is_softmax_attention(rows: int, kv_heads: int) -> None:
    queries, keys, values = tensors(rows, kv_heads=kv_heads)
    causal = torch.arange(60) <= torch.arange(60 - rows, 60).unsqueeze(-1)
    repeated = (tensor.repeat_interleave(8 // kv_heads, 1) for tensor in (keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(queries, *repeated, attn_mask=causal).transpose(1, 2)
    torch.testing.assert_close(dense_attention(queries, keys, values), expected, atol=1e-5, rtol=1e-4)
    for attention in (make(), make(CausalMaskerConfig()), make(CausalMaskerConfig(), backend="reference")):
        result = attention(queries, keys, values)
        torch.testing.assert_close(result.output, expected, atol=1e-5, rtol=1e-4)
        assert result.density == pytest.approx(1.0) and float(result.error_rows().max()) < 1e-5


def test_additive_boolean_and_no_mask_mean_the_same() -> None:
    queries, keys, values = tensors()
    causal = (torch.arange(60) <= torch.arange(55, 60).unsqueeze(-1)).expand(2, 1, 5, 60)
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    attention = make(SinkMaskerConfig(2), OracleTopKConfig(0.2), RandomSamplingMaskerConfig(0.1))
    plain = attention(queries, keys, values)
    for mask in (causal, additive, additive[:1, :, :, :], torch.cat([additive, additive[..., :3]], -1)):
        result = attention(queries, keys, values, attention_mask=mask)
        assert torch.equal(result.mask.inclusion_probability(), plain.mask.inclusion_probability())
        torch.testing.assert_close(result.output, plain.output)


def test_scaling_changes_the_output_not_the_top_k() -> None:
    queries, keys, values = tensors()
    attention = make(OracleTopKConfig(5))
    first, second = attention(queries, keys, values), attention(queries, keys, values, scaling=2.0)
    assert torch.equal(first.mask.inclusion_probability(), second.mask.inclusion_probability())
    assert not torch.allclose(first.output, second.output)


@pytest.mark.parametrize("rows", [1, 5, 60])
def test_window_is_exact_however_short_the_text(rows: int) -> None:
    result = make(LocalMaskerConfig(4))(*tensors(rows))
    row, key = torch.arange(60 - rows, 60).unsqueeze(-1), torch.arange(60)
    assert torch.equal(result.mask.inclusion_probability()[0, 0].bool(), (key <= row) & (key > row - 4))


def test_sinks_are_the_first_allowed_keys() -> None:
    queries, keys, values = tensors(1)
    mask = torch.ones(2, 1, 1, 60, dtype=torch.bool)
    mask[1, ..., :13] = False
    chosen = make(SinkMaskerConfig(3))(queries, keys, values, attention_mask=mask).mask.inclusion_probability()[:, 0, 0].bool()
    assert chosen[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert chosen[1].nonzero().flatten().tolist() == [13, 14, 15]


def test_top_k_comes_beside_what_was_chosen() -> None:
    result = make(SinkMaskerConfig(4), LocalMaskerConfig(6), OracleTopKConfig(10))(*tensors(1))
    assert bool((result.mask.counts() == 20).all())


def test_top_p_is_the_shortest_prefix_of_the_mass_left() -> None:
    queries, keys, values = tensors(1, batch=1)
    p = make(SinkMaskerConfig(4), OracleTopPMaskerConfig(0.6))(queries, keys, values).mask.inclusion_probability()
    weights = (queries @ keys.repeat_interleave(4, 1).transpose(-1, -2) * 0.25).softmax(-1)[0, :, 0, 4:]
    for head in range(8):
        chosen = p[0, head, 0, 4:].bool()
        share = weights[head] / weights[head].sum()
        assert float(share[chosen].sum()) > 0.6 >= float(share[chosen].sum() - share[chosen].min())
        assert float(share[chosen].min()) >= float(share[~chosen].max())


def test_density_counts_allowed_keys_and_skips_dead_rows() -> None:
    queries, keys, values = tensors(3, n=10)
    mask = torch.zeros(2, 1, 3, 10, dtype=torch.bool)
    mask[0, 0, 1, :5] = True
    mask[0, 0, 2, :10] = True
    result = make(SinkMaskerConfig(2))(queries, keys, values, attention_mask=mask)
    assert result.dead_rows == 4
    torch.testing.assert_close(
        result.density_rows, torch.tensor([[float("nan"), 0.4, 0.2], [float("nan")] * 3]), equal_nan=True
    )
    assert result.density == pytest.approx(0.3)
    error = result.error_rows()
    assert error.shape == (2, 8, 3) and bool(error[1].isnan().all()) and bool(error[0, :, 1:].isfinite().all())
    assert not result.output[1].any()


def test_rows_that_attend_to_nothing_get_their_last_key() -> None:
    queries, keys, values = tensors(2, n=30, batch=1)
    mask = torch.ones(1, 1, 2, 30, dtype=torch.bool)
    mask[0, 0, 0, :8] = False  # the row sees none of the sinks
    mask[0, 0, 0, 25:] = False
    result = make(SinkMaskerConfig(4))(queries, keys, values, attention_mask=mask)
    assert result.empty_rows == 8
    assert bool((result.mask.inclusion_probability()[0, :, 0].argmax(-1) == 24).all())
    torch.testing.assert_close(result.output[0, 0], values[0, :, 24].repeat_interleave(4, 0))


def test_kv_fraction_counts_a_groups_key_once_and_adds_the_selector() -> None:
    args = tensors(1, n=100)
    assert make(SinkMaskerConfig(10))(*args).kv_fraction == pytest.approx(0.1)
    top = make(OracleTopKConfig(10))(*args)
    assert 0.5 + 0.1 < top.kv_fraction <= 0.5 + 0.4


def test_a_full_result_has_no_error_and_a_small_one_has() -> None:
    args = tensors()
    small, large = (make(OracleTopKConfig(size))(*args).error_rows().mean() for size in (3, 40))
    assert float(large) < float(small)


def test_backends_agree() -> None:
    args = tensors()
    configs = (SinkMaskerConfig(2), OracleTopKConfig(6), AdaptiveSamplingMaskerConfig(6, 0.3, 0.3, 0, 0))
    loops, portable, reference = (make(*configs, backend=name)(*args, seeds=3) for name in ("cpu", "torch", "reference"))
    torch.testing.assert_close(loops.output, reference.output, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(portable.output, reference.output, atol=1e-5, rtol=1e-4)


def test_one_instance_serves_many_layers() -> None:
    attention = make(MagicPigConfig(8, 4))
    state = attention.new_state()
    queries, keys, values = tensors(1)
    apart = [attention(queries, keys * (layer + 1), values, layer_idx=layer).output for layer in range(3)]
    for layer in (2, 0, 1):
        attention.prepare(keys * (layer + 1), layer, state)
    for layer in range(3):
        result = attention(queries, keys * (layer + 1), values, layer_idx=layer, state=state)
        assert torch.equal(result.output, apart[layer])


def test_two_of_a_kind_keep_their_own_state() -> None:
    from sparse_attention_hub import PQCacheConfig

    queries, keys, values = tensors(1)
    pair = (PQCacheConfig(5, 2, 3, 3, 0, "euclidean"), PQCacheConfig(5, 4, 4, 3, 0, "ip"))
    attention = make(*pair)
    state = attention.new_state()
    attention.prepare(keys, 0, state)
    assert torch.equal(attention(queries, keys, values, state=state).output, attention(queries, keys, values).output)


def test_a_state_that_is_ahead_says_what_to_do() -> None:
    attention = make(MagicPigConfig(8, 4))
    queries, keys, values = tensors(1)
    state = attention.new_state()
    attention.prepare(keys, 0, state)
    with pytest.raises(ValueError, match=r"rewind\(40\)"):
        attention(queries, keys[:, :, :40], values[:, :, :40], state=state)
    state.rewind(40)
    assert attention(queries, keys[:, :, :40], values[:, :, :40], state=state).output.isfinite().all()
    with pytest.raises(ValueError, match="length must be >= 0, got -1"):
        state.rewind(-1)


def test_generator_seeds_and_batches() -> None:
    args = tensors()
    attention = make(RandomSamplingMaskerConfig(0.2))
    pair = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    first = attention(*args, generator=pair).mask.inclusion_probability()
    swapped = [torch.Generator().manual_seed(seed) for seed in (1, 3)]
    second = attention(*args, generator=swapped).mask.inclusion_probability()
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(*(attention(*args, generator=generator).mask.inclusion_probability() for _ in range(2)))
    with pytest.raises(ValueError, match="generator or seeds, not both"):
        attention(*args, generator=generator, seeds=1)
    with pytest.raises(ValueError, match=r"one torch.Generator an item \(2\), got 1"):
        attention(*args, generator=[generator])
    with pytest.raises(ValueError, match=r"one seed an item \(2\), got 3"):
        attention(*args, seeds=[1, 2, 3])


def test_what_a_pipeline_refuses() -> None:
    sampler = RandomSamplingMaskerConfig(0.1)
    with pytest.raises(ValueError, match="at most one sampling masker is allowed, got 2"):
        make(sampler, AdaptiveSamplingMaskerConfig(4, 0.1, 0.1, 0, 0))
    with pytest.raises(ValueError, match="must come last, got RandomSamplingMaskerConfig at place 1"):
        make(sampler, SinkMaskerConfig(1))
    with pytest.raises(TypeError, match="must hold MaskerConfig objects, got str"):
        ResearchAttention(ResearchAttentionConfig(["sink"]))
    with pytest.raises(ValueError, match="no masker is registered for MaskerConfig"):
        make(MaskerConfig())
    with pytest.raises(ValueError, match="backend must be one of"):
        make(backend="fast")


def test_bad_tensors() -> None:
    queries, keys, values = tensors()
    attention = make(SinkMaskerConfig(1))
    with pytest.raises(ValueError, match="queries must be"):
        attention(queries[0], keys, values)
    with pytest.raises(ValueError, match="multiple of kv heads"):
        attention(queries[:, :7], keys, values)
    with pytest.raises(ValueError, match="5 queries cannot be the last of 3 keys"):
        attention(queries, keys[:, :, :3], values[:, :, :3])


@pytest.mark.parametrize("bad", [0, -1, 0.0, 1.5, -0.1, True, "x", None])
@pytest.mark.parametrize("config", [SinkMaskerConfig, LocalMaskerConfig, OracleTopKConfig])
def test_bad_sizes(config: type[MaskerConfig], bad: object) -> None:
    with pytest.raises(ValueError, match="size must be"):
        config(bad)


def test_sizes_mean_what_they_are() -> None:
    import numpy as np

    args = tensors(1)
    for size, keys in ((3, 3), (0.1, 6), (np.float32(0.1), 6), (np.int64(3), 3), (1, 1), (1.0, 60), (500, 60), (0.001, 1)):
        assert int(make(OracleTopKConfig(size))(*args).mask.counts().max()) == keys


def test_config_round_trip() -> None:
    config = ResearchAttentionConfig([SinkMaskerConfig(4), OracleTopKConfig(0.1), MagicPigConfig(8, 4, min_matches=2)])
    again = ResearchAttentionConfig.from_dict(config.to_dict())
    assert again.masker_configs == config.masker_configs
    with pytest.raises(ValueError, match="unknown masker type 'Nothing'"):
        ResearchAttentionConfig.from_dict({"masker_configs": [{"type": "Nothing", "params": {}}]})
    with pytest.raises(ValueError, match="parameters of SinkMaskerConfig do not fit"):
        ResearchAttentionConfig.from_dict({"masker_configs": [{"type": "SinkMaskerConfig", "params": {"size": 1}}]})


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_bias_counts_in_the_output_as_it_does_in_the_scores(rows: int, backend: str) -> None:
    queries, keys, values = tensors(rows, 50)
    bias = 3 * torch.randn(queries.shape[0], 1, rows, 50, generator=torch.Generator().manual_seed(3))
    bias = bias.masked_fill(~torch.ones(rows, 50, dtype=torch.bool).tril(50 - rows), -1e9)
    expected = dense_attention(queries, keys, values, bias)
    assert not torch.allclose(expected, dense_attention(queries, keys, values), atol=1e-2)
    for masker_configs in ([], [SinkMaskerConfig(1.0)], [OracleTopKConfig(1.0)], [RandomSamplingMaskerConfig(1.0)]):
        attention = ResearchAttention(ResearchAttentionConfig(masker_configs, backend))
        torch.testing.assert_close(attention(queries, keys, values, bias).output, expected, atol=1e-5, rtol=1e-5)


def test_fixed_maskers_under_a_band() -> None:
    """Rows that may not see the last row's keys, nor it theirs: positions count what any row may see."""
    queries, keys, values = tensors(3, 30)
    row, key = torch.arange(3).unsqueeze(-1), torch.arange(30)
    band = ((key >= 10 + row) & (key < 28 + row) | ((row == 0) & (key < 10)))[None, None]

    def chosen(config: MaskerConfig) -> list[list[int]]:
        mask = ResearchAttention(ResearchAttentionConfig([config]))(queries, keys, values, band).mask
        return [mask.inclusion_probability()[0, 0, r].nonzero().flatten().tolist() for r in range(3)]

    assert chosen(LocalMaskerConfig(2)) == [[26, 27], [27, 28], [28, 29]]
    assert chosen(SinkMaskerConfig(12)) == [list(range(12)), [11], [29]]  # the last row sees none of them


def test_sinks_around_a_hole() -> None:
    queries, keys, values = tensors(1, 10)
    allowed = torch.ones(1, 1, 1, 10, dtype=torch.bool)
    allowed[..., 1] = False
    mask = ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(3)]))(queries, keys, values, allowed).mask
    assert mask.inclusion_probability()[0, 0, 0].nonzero().flatten().tolist() == [0, 2, 3]


def test_a_state_made_for_inference_goes_on_outside_it() -> None:
    queries, keys, values = tensors(1, 80)
    attention = ResearchAttention(ResearchAttentionConfig([QuestTopKMaskerConfig(8, 8)]))
    state = attention.new_state()
    with torch.inference_mode():
        attention.prepare(keys[:, :, :60], 0, state)
    assert attention(queries, keys, values, state=state).output.isfinite().all()


def test_what_is_no_config_is_told() -> None:
    with pytest.raises(TypeError, match="takes a ResearchAttentionConfig, got list"):
        ResearchAttention([SinkMaskerConfig(4)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, 5, 60, dtype=torch.long),  # a tokenizer's: it would be added to the scores
        torch.ones(2, 60, dtype=torch.bool),
        torch.ones(2, 8, 5, 60, dtype=torch.bool),
        torch.ones(2, 1, 5, 59, dtype=torch.bool),
        torch.ones(3, 1, 5, 60, dtype=torch.bool),
    ],
)
def test_masks_that_would_be_misread_are_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask must be bool") as told:
        make(SinkMaskerConfig(2))(*tensors(), attention_mask=mask)
    assert str(tuple(mask.shape)) in str(told.value)


def test_queries_and_keys_have_one_width() -> None:
    queries, keys, values = tensors()
    with pytest.raises(ValueError, match="one width, got 8 and 16"):
        make(SinkMaskerConfig(2))(queries[..., :8], keys, values)


def test_a_kernel_without_gradients_is_not_taken_where_some_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_attention_hub.kernels import choose_backend

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    queries, keys, _ = tensors()
    assert choose_backend("triton", queries, keys) == "triton"
    with pytest.raises(ValueError, match="triton has no gradients"):
        choose_backend("triton", queries, keys.requires_grad_())
    with torch.no_grad():
        assert choose_backend("triton", queries, keys) == "triton"


def test_exact_moments_are_charged_for_every_key() -> None:
    tail = {"base_rate_sampling": 0.1, "epsilon": 0.2, "delta": 0.2, "init_offset": 0, "local_offset": 0}
    sampled = make(AdaptiveSamplingMaskerConfig(**tail))(*tensors(1))
    exact = make(AdaptiveSamplingMaskerConfig(**tail, use_exact_estimation=True))(*tensors(1))
    assert exact.kv_fraction >= 0.5 and exact.kv_fraction - exact.density > sampled.kv_fraction - sampled.density


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_calls_that_share_their_positions_give_what_each_gives_alone(rows: int, masked: bool) -> None:
    """Other queries, layers and seeds, some calls of another shape between them; bit for bit, whoever came first."""
    ends = SinkMaskerConfig(3), LocalMaskerConfig(0.1)
    adaptive = AdaptiveSamplingMaskerConfig(0.1, 0.2, 0.2, 0, 0)
    pipelines = [
        make(*ends),
        make(*ends, OracleTopKConfig(0.1)),
        make(*ends, adaptive),
        make(SinkMaskerConfig(3), OracleTopKConfig(0.1), LocalMaskerConfig(0.1)),
        make(*ends, OracleTopKConfig(0.1), RandomSamplingMaskerConfig(0.1)),
        make(CausalMaskerConfig()),
        make(SinkMaskerConfig(1), LocalMaskerConfig(0.1)),
        make(SinkMaskerConfig(1.0), LocalMaskerConfig(0.1)),
    ]
    layouts: dict = {}
    for layer in range(3):
        for n in (60, 70):
            tensors_of = tensors(rows, n)
            mask = torch.ones(2, 1, rows, n, dtype=torch.bool) if masked else None
            if mask is not None:
                mask[0, :, :, :7] = False
            for pipeline in pipelines:
                call = (tensors_of[0] * (1 + layer), *tensors_of[1:], mask, None, layer, [layer, 5])
                shared = pipeline.attend_inputs(AttentionInputs(*call, CallCache(layouts=layouts)))
                alone = pipeline.attend_inputs(AttentionInputs(*call))
                assert torch.equal(shared.output, alone.output)
                assert torch.equal(shared.mask.inclusion_probability(), alone.mask.inclusion_probability())
                assert (shared.density, shared.kv_fraction) == (alone.density, alone.kv_fraction)


@pytest.mark.parametrize("selector", [OracleTopKConfig(0.2), QuestTopKMaskerConfig(0.2, 8), RandomSamplingMaskerConfig(0.2)])
def test_rows_of_padding_at_the_end_change_no_other_row(selector: MaskerConfig) -> None:
    attention = ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(0.05), LocalMaskerConfig(0.1), selector]))
    queries, keys, values = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60, 16)
    causal = torch.ones(6, 60, dtype=torch.bool).tril(54).expand(2, 1, 6, 60).clone()
    causal[..., 58:] = False
    whole = attention(queries[:, :, :4], keys[:, :, :58], values[:, :, :58], causal[:, :, :4, :58])
    blank = causal.clone()
    blank[:, :, 4:] = False
    padded = attention(queries, keys, values, blank)
    assert torch.allclose(padded.output[:, :4], whole.output, atol=1e-6)
    assert padded.density == pytest.approx(whole.density) and padded.dead_rows == 4


def test_adaptive_sampling_behind_shared_lists_with_a_budget_per_query_head() -> None:
    table = [[0.5 + 0.25 * head for head in range(8)]]
    maskers = [LandmarksConfig(16, 8), AdaptiveSamplingMaskerConfig(0.1, 0.3, 0.3, 0, 0)]
    attention = ResearchAttention(ResearchAttentionConfig(maskers, head_budgets=table))
    result = attention(torch.randn(1, 8, 1, 16), torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16))
    assert 0 < result.density < 1


def test_slips_are_one_clear_line() -> None:
    with pytest.raises(TypeError, match="masker_configs must be a list of MaskerConfigs, got OracleTopKConfig"):
        ResearchAttentionConfig(OracleTopKConfig(0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lm must be a LanguageModel, as load_model returns, got int"):
        ResearchAttention.from_file("found.json", 3)  # type: ignore[arg-type]
