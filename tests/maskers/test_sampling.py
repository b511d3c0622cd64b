"""The samplers' statistics: unbiased above every selector, and AdaptiveSampling's bound on the denominator's error.

`python -m tests.maskers.test_sampling` prints the rates that AdaptiveSampling's docstring states.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import (
    AdaptiveSamplingMaskerConfig,
    ClustersConfig,
    DoubleSparsityTopKMaskerConfig,
    HashAttentionTopKMaskerConfig,
    LandmarksConfig,
    LocalMaskerConfig,
    LokiConfig,
    MagicPigConfig,
    Mask,
    OracleTopKConfig,
    OracleTopPMaskerConfig,
    PQCacheConfig,
    QuestTopKMaskerConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    SparqConfig,
)
from sparse_attention_hub.kernels import attend
from sparse_attention_hub.maskers import uniforms
from sparse_attention_hub.maskers.base import MaskerConfig, create_masker
from sparse_attention_hub.maskers.inputs import AttentionInputs
from sparse_attention_hub.maskers.principal_axes import write_axes

HEADS, DIM, KEYS, SEEDS = 4, 32, 512, 400
#: Standard deviations of the scores: terms are exp of them, so that 1 is lively and 3 has a very heavy tail.
TAILS = (1.0, 2.0, 3.0)


def tensors(tail: float, seed: int, n: int = KEYS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (1, 4, 1, 32), keys and values (1, 1, n, 32); scores are normal with deviation `tail`."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(1, HEADS, 1, DIM, generator=generator)
    queries = tail * DIM**0.5 * queries / queries.norm(dim=-1, keepdim=True)
    return queries, torch.randn(1, 1, n, DIM, generator=generator), torch.randn(1, 1, n, DIM, generator=generator)


def selector(name: str, folder: Path, size: int | float) -> list[MaskerConfig]:
    ends: list[MaskerConfig] = [SinkMaskerConfig(8), LocalMaskerConfig(8)]
    if name == "none":
        return ends
    if name == "oracle_top_p":
        return [*ends, OracleTopPMaskerConfig(0.3)]
    if name == "double_sparsity":
        path = folder / "channels.json"
        path.write_text(json.dumps({"model.layers.0.self_attn.qk_proj": [list(range(DIM))] * HEADS}))
        return [*ends, DoubleSparsityTopKMaskerConfig(size, str(path), group_factor=2)]
    if name == "loki":
        write_axes({0: torch.eye(DIM).unsqueeze(0)}, folder / "axes.safetensors")
        return [*ends, LokiConfig(size, str(folder / "axes.safetensors"))]
    if name == "hash_attention":
        generator = torch.Generator().manual_seed(0)
        planes, none = torch.randn(1, DIM, 128, generator=generator), torch.zeros(HEADS, 128)
        query = {"query_matrix": [planes.repeat(HEADS, 1, 1)], "query_bias": [none]}
        weights = {0: query | {"key_matrix": [planes.repeat(HEADS, 1, 1)], "key_bias": [none]}}
        return [*ends, HashAttentionTopKMaskerConfig(size, 128, 1, 0, "relu", hat_weights=weights)]
    simple = {
        "oracle_top_k": OracleTopKConfig(size),
        "quest": QuestTopKMaskerConfig(size, 8),
        "pq_cache": PQCacheConfig(size, 4, 4, 5, 4, "euclidean"),
        "landmarks": LandmarksConfig(size, 8),
        "sparq": SparqConfig(size),
        "clusters": ClustersConfig(size),
    }
    return [*ends, simple[name]]


def ratios(before: list[MaskerConfig], sampler: MaskerConfig, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, float]:
    """Estimated over true denominator, (SEEDS, HEADS), and the mean density. The selectors run once, the sampler per seed."""
    single = AttentionInputs(*args)
    chosen = ResearchAttention(ResearchAttentionConfig(before)).make_mask(single).chosen()
    queries, keys, values = (tensor.expand(SEEDS, -1, -1, -1) for tensor in args)
    inputs = AttentionInputs(queries, keys, values, seeds=list(range(SEEDS)))
    mask = Mask.from_dense(chosen.expand(SEEDS, -1, -1, -1), HEADS, kv_heads=1)
    mask = create_masker(sampler).select(inputs, mask)
    _, estimate = attend(queries, keys, values, mask, inputs.scaling)
    density = float(mask.counts().float().mean()) / keys.shape[2]
    return (estimate - single.scores().logsumexp(-1)).exp()[..., 0], density


def rates(
    name: str, folder: Path, bound: tuple[float, float], base: int, tail: float, exact: bool
) -> tuple[float, float, float]:
    """Violation rate, mean ratio and density over four inputs."""
    found = []
    for seed in range(4):
        sampler = AdaptiveSamplingMaskerConfig(base, *bound, 0, 0, use_exact_estimation=exact)
        ratio, density = ratios(selector(name, folder, 0.02), sampler, tensors(tail, seed))
        found.append((float(((ratio - 1).abs() > bound[0]).float().mean()), float(ratio.mean()), density))
    violation, mean, density = (sum(column) / len(found) for column in zip(*found, strict=True))
    return violation, mean, density


BOUNDS = [(0.1, 0.1), (0.05, 0.05), (0.2, 0.1)]
SELECTORS = [
    *("none", "oracle_top_k", "oracle_top_p", "quest", "double_sparsity", "hash_attention", "pq_cache"),
    *("landmarks", "sparq", "loki", "clusters"),
]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("tail", TAILS)
def test_adaptive_sampling_keeps_its_bound(bound: tuple[float, float], tail: float, tmp_path: Path) -> None:
    """With a top-k of 2% before it and 64 base samples; and not by sampling nearly everything."""
    violation, mean, density = rates("oracle_top_k", tmp_path, bound, 64, tail, exact=False)
    assert violation <= bound[1] + 0.03
    assert abs(mean - 1) <= 0.02
    assert density <= needed_density(bound, tail, tmp_path) + 64 / KEYS + 0.05


def needed_density(bound: tuple[float, float], tail: float, folder: Path) -> float:
    """Density of a sampler that knows the moments and needs no base samples, by the formula; over the same inputs."""
    total = 0.0
    for seed in range(4):
        inputs = AttentionInputs(*tensors(tail, seed))
        before = ResearchAttention(ResearchAttentionConfig(selector("oracle_top_k", folder, 0.02))).make_mask(inputs)
        left = before.residual(inputs.allowed).expand(inputs.shape)[0, :, 0]
        for row, terms in zip(left, inputs.exponentials()[0, :, 0], strict=True):
            pool = terms[row]
            size = float(row.sum())
            quantile = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - bound[1] / 2)))
            draws = (quantile * float(pool.std()) * size / (bound[0] * float(terms.sum()))) ** 2
            total += (draws / (1 + draws / size) + KEYS - size) / KEYS
    return total / (4 * HEADS)


@pytest.mark.parametrize("name", ["none", "oracle_top_k", "hash_attention", "pq_cache"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_exact_moments_keep_the_bound_above_any_selector(name: str, bound: tuple[float, float], tmp_path: Path) -> None:
    violation, mean, _ = rates(name, tmp_path, bound, 24, 1.0, exact=True)
    assert violation <= bound[1] + 0.03
    assert abs(mean - 1) <= 0.02


@pytest.mark.parametrize("name", ["hash_attention", "pq_cache"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_the_bound_above_deployable_selectors(name: str, bound: tuple[float, float], tmp_path: Path) -> None:
    assert rates(name, tmp_path, bound, 64, 1.0, exact=False)[0] <= bound[1] + 0.03


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("kind", ["random", "adaptive"])
def test_unbiased_above_every_selector(name: str, kind: str, tmp_path: Path) -> None:
    adaptive = AdaptiveSamplingMaskerConfig(0.05, 0.1, 0.1, 4, 0.02)
    sampler = RandomSamplingMaskerConfig(0.2) if kind == "random" else adaptive
    means = [ratios(selector(name, tmp_path, 0.1), sampler, tensors(1.0, seed))[0].mean() for seed in range(2)]
    assert abs(float(torch.stack(means).mean()) - 1) <= 0.02


@pytest.mark.parametrize("name", ["none", "oracle_top_k", "pq_cache"])
def test_magic_pig_is_unbiased_above_selectors(name: str, tmp_path: Path) -> None:
    args = tensors(1.0, 0, n=256)
    inputs = AttentionInputs(*args)
    before = ResearchAttention(ResearchAttentionConfig(selector(name, tmp_path, 0.1))).make_mask(inputs)
    true = inputs.scores().logsumexp(-1)
    found = []
    for seed in range(SEEDS):
        mask = create_masker(MagicPigConfig(24, 4, seed=seed)).select(inputs, before)
        found.append((attend(*args, mask, inputs.scaling)[1] - true).exp().mean())
    assert abs(float(torch.stack(found).mean()) - 1) <= 0.02


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_random_sampling_draws_without_replacement(rate: float) -> None:
    """More budget converges to dense: m of R residual keys with p = m / R."""
    args = tensors(1.0, 0)
    attention = ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(12), RandomSamplingMaskerConfig(rate)]))
    result = attention(*args, seeds=5)
    p = result.mask.inclusion_probability()[..., 12:]
    drawn = min(500, int(rate * KEYS))
    assert bool(((p > 0).sum(-1) == drawn).all())
    torch.testing.assert_close(p[p > 0], torch.full_like(p[p > 0], drawn / 500))
    if rate == 1.0:
        assert float(result.error_rows().max()) < 1e-5


def test_each_key_is_drawn_as_often_as_its_probability_says() -> None:
    args = tensors(1.0, 0, n=60)
    queries, keys, values = (tensor.expand(2000, -1, -1, -1) for tensor in args)
    inputs = AttentionInputs(queries, keys, values, seeds=list(range(2000)))
    sampler = create_masker(RandomSamplingMaskerConfig(0.25))
    mask = sampler.select(inputs, Mask.empty(inputs.shape, kv_heads=1))
    often = (mask.inclusion_probability() > 0).float().mean(0)
    assert float((often - 0.25).abs().max()) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_heads_of_a_group_share_their_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, 8, 1, 16, generator=generator), torch.randn(1, 2, 300, 16, generator=generator)
    attention = ResearchAttention(ResearchAttentionConfig([RandomSamplingMaskerConfig(0.1)]))
    result = attention(queries, keys, keys)
    chosen = result.mask.inclusion_probability()[0, :, 0] > 0
    assert bool((chosen[:4] == chosen[0]).all()) and bool((chosen[4:] == chosen[4]).all())
    assert not torch.equal(chosen[0], chosen[4])
    assert result.kv_fraction == pytest.approx(0.1)
    # Samples of different sizes are prefixes of one order, so that they overlap as far as can be.
    adaptive = AdaptiveSamplingMaskerConfig(16, 0.2, 0.2, 0, 0)
    result = ResearchAttention(ResearchAttentionConfig([adaptive]))(queries * 2, keys, keys)
    groups = result.mask.group_counts()[0, :, 0]
    assert torch.equal(groups, result.mask.counts()[0, :, 0].view(2, 4).amax(-1))


def test_samples_depend_on_seed_layer_and_position_alone() -> None:
    queries, keys, values = tensors(1.0, 0)
    attention = ResearchAttention(ResearchAttentionConfig([RandomSamplingMaskerConfig(0.1)]))

    def drawn(**options: int) -> Tensor:
        return attention(queries, keys, values, **options).mask.inclusion_probability()

    assert torch.equal(drawn(seeds=3), drawn(seeds=3))
    assert not torch.equal(drawn(seeds=3), drawn(seeds=4))
    assert not torch.equal(drawn(seeds=3), drawn(seeds=3, layer_idx=1))
    # Another rate draws from the same order: the smaller sample is part of the larger one.
    more = ResearchAttention(ResearchAttentionConfig([RandomSamplingMaskerConfig(0.2)]))
    larger = more(queries, keys, values, seeds=3).mask.inclusion_probability()
    assert bool((larger[drawn(seeds=3) > 0] > 0).all())


def test_no_base_samples_means_no_sampling() -> None:
    args = tensors(1.0, 0)
    attention = ResearchAttention(
        ResearchAttentionConfig([SinkMaskerConfig(7), AdaptiveSamplingMaskerConfig(0, 0.1, 0.1, 0, 0)])
    )
    assert attention(*args).density == pytest.approx(7 / KEYS)


def test_a_looser_bound_draws_fewer_keys() -> None:
    args = tensors(1.0, 0)
    densities = []
    for epsilon, delta in ((0.05, 0.05), (0.1, 0.05), (0.1, 0.5), (0.1, 0.95)):
        config = AdaptiveSamplingMaskerConfig(32, epsilon, delta, 0, 0)
        densities.append(ResearchAttention(ResearchAttentionConfig([OracleTopKConfig(20), config]))(*args).density)
    assert densities == sorted(densities, reverse=True) and densities[0] > densities[-1] + 0.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_rate_sampling": 1.0}, "base_rate_sampling as a fraction must be in [0, 1), got 1.0"),
        ({"base_rate_sampling": -1}, "base_rate_sampling must be >= 0, got -1"),
        ({"base_rate_sampling": "x"}, "base_rate_sampling must be an int (tokens) or a float (fraction), got 'x'"),
        ({"epsilon": 0.0}, "epsilon must be a number in (0.0, 1.0), got 0.0"),
        ({"delta": 1.0}, "delta must be a number in (0.0, 1.0), got 1.0"),
        ({"use_exact_estimation": 1}, "use_exact_estimation must be True or False, got 1"),
        ({"init_offset": 1.5}, "init_offset must be >= 0; as a fraction in [0, 1], got 1.5"),
        ({"local_offset": -2}, "local_offset must be >= 0, got -2"),
    ],
)
def test_bad_values(fields: dict[str, object], message: str) -> None:
    good = {"base_rate_sampling": 0.1, "epsilon": 0.1, "delta": 0.1, "init_offset": 0, "local_offset": 0}
    with pytest.raises(ValueError) as caught:
        AdaptiveSamplingMaskerConfig(**(good | fields))
    assert message in str(caught.value)


def main() -> None:
    """Violation rates over 400 seeds and four inputs of 512 keys, 4 heads."""
    torch.set_num_threads(1)
    print(f"{'selector':16}{'base':>6}{'moments':>11}{'tail':>6}" + "".join(f"{str(bound):>28}" for bound in BOUNDS))
    with tempfile.TemporaryDirectory() as folder:
        for name, base, exact in [
            ("oracle_top_k", 64, False),
            ("hash_attention", 64, False),
            ("pq_cache", 64, False),
            ("none", 64, False),
            ("none", 24, False),
            ("none", 24, True),
        ]:
            for tail in TAILS:
                cells = [rates(name, Path(folder), bound, base, tail, exact) for bound in BOUNDS]
                line = "".join(f"{v:14.3f} (x{m:.3f}, d{d:.2f})" for v, m, d in cells)
                print(f"{name:16}{base:6}{'exact' if exact else 'estimated':>11}{tail:6.1f}{line}", flush=True)


@pytest.mark.parametrize("seeds", [[0, 5], [-7, 2**64 - 1]])
def test_uniforms_are_the_same_bits_on_a_cpu_and_elsewhere(seeds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, keys = torch.tensor([[3, -1, 900], [0, 1, 2]]), torch.arange(-1, 5000).repeat(2, 1)
    drawn = uniforms.keyed_uniforms(seeds, (3,), 3, rows, keys)
    with monkeypatch.context() as patched:
        patched.setattr("sparse_attention_hub.lists.HAS_NUMBA", False)
        assert torch.equal(drawn, uniforms.keyed_uniforms(seeds, (3,), 3, rows, keys))
    assert drawn.shape == (2, 3, 3, 5001) and float(drawn.min()) >= 0 and float(drawn.max()) < 1
    assert drawn.mean((-1,)).sub(0.5).abs().max() < 0.02
    assert drawn.flatten(0, 2).unique(dim=0).shape[0] == 18  # no item, head or row has another's


if __name__ == "__main__":
    main()
