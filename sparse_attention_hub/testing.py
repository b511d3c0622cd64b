"""Contract tests for maskers. A masker's test class inherits them; needs pytest and hypothesis.

class TestMyMasker(MaskerContract):
    def make_config(self):
        return MyMaskerConfig(heavy_size=0.2)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .attention import AttentionResult, ResearchAttention, ResearchAttentionConfig, dense_attention
from .kernels import attend
from .lists import expand_heads
from .mask import Mask
from .maskers import OracleTopKConfig, SinkMaskerConfig
from .maskers.base import MaskerConfig, create_masker
from .maskers.context_summary import ContextSummary
from .maskers.inputs import AttentionInputs
from .maskers.layout import end_of_allowed
from .maskers.open_layout import OpenLayout
from .maskers.state import AttentionState

_SLOW = [HealthCheck.differing_executors, HealthCheck.too_slow]
_SIZES = ("heavy_size", "sink_size", "window_size", "sampling_rate")


def prepared(attention: ResearchAttention, keys: Tensor, heads: int, allowed: Tensor | None = None) -> AttentionState:
    """A state fitted on a context's keys (B, Hkv, N, D), which are its queries too. heads: of queries; allowed: bool (B, N)."""
    state, end = attention.new_state(), keys.shape[2] if allowed is None else end_of_allowed(allowed)
    if attention.observes:
        mask = None if allowed is None else allowed[:, None, None, :end] & torch.ones(end, end, dtype=torch.bool).tril()
        seen = keys[:, :, :end]
        state.observe(0, ContextSummary.of(AttentionInputs(expand_heads(seen, heads), seen, seen, mask), attention.observes))
    attention.prepare(keys, 0, state, allowed)
    return state


class MaskerContract:
    """Override `make_config`; override the rest only if the defaults do not fit."""

    #: Query heads and channels of every call; kv heads vary.
    heads = 8
    head_dim = 32
    #: Keys of the context in tests of states; more where a method needs a long context.
    context = 200
    #: Seeds over which a sampler's softmax denominator is averaged, and the tolerance of its mean
    #: ratio to the dense denominator.
    bias_seeds = 400
    bias_tolerance = 0.02
    #: Set in each test: a folder for files that a config needs.
    tmp_path: Path

    def make_config(self) -> MaskerConfig:
        """The config under test: a budget that leaves keys out at 200 keys."""
        raise NotImplementedError("a masker's test class overrides make_config()")

    def full_config(self) -> MaskerConfig | None:
        """A config that chooses every key, None if the method cannot. Default: `make_config` with its size at 100%."""
        config = self.make_config()
        field = next((name for name in (*_SIZES, "top_p") if hasattr(config, name)), None)
        return None if field is None else dataclasses.replace(config, **{field: 1.0})

    def max_keys(self, n: int) -> int:
        """The most keys that a row may attend to, of n allowed. Default: the config's size, n if it has none."""
        config = self.make_config()
        size = next((getattr(config, name) for name in _SIZES if hasattr(config, name)), n)
        return min(n, size) if isinstance(size, int) else max(1, int(size * n))

    def config_for_seed(self, seed: int) -> MaskerConfig | None:
        """For a sampler whose randomness comes from its config: the config under test with another seed."""
        return None

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path

    # -- helpers -------------------------------------------------------------------------------------------------------

    def tensors(
        self, n: int, rows: int = 1, batch: int = 2, kv_heads: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """queries (batch, heads, rows, head_dim), keys and values (batch, kv_heads, n, head_dim), standard normal."""
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(batch, self.heads, rows, self.head_dim, generator=generator)
        keys, values = (torch.randn(batch, kv_heads, n, self.head_dim, generator=generator) for _ in range(2))
        return queries.to(dtype), keys.to(dtype), values.to(dtype)

    def attention(self, config: MaskerConfig | None = None) -> ResearchAttention:
        return ResearchAttention(ResearchAttentionConfig([config or self.make_config()]))

    def prepared(self, attention: ResearchAttention, keys: Tensor, allowed: Tensor | None = None) -> AttentionState:
        """A state fitted on the context's keys."""
        return prepared(attention, keys, self.heads, allowed)

    def run(
        self, queries: Tensor, keys: Tensor, values: Tensor, config: MaskerConfig | None = None, **options: Any
    ) -> AttentionResult:
        return self.attention(config)(queries, keys, values, **options)

    # -- the contract --------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("kv_heads", [8, 2, 1])
    @pytest.mark.parametrize("rows", [1, 7, 64])
    def test_mask_and_output(self, kv_heads: int, rows: int, dtype: torch.dtype) -> None:
        """Shapes and ranges, the budget, and attention over the mask as if every kv head were repeated for its query heads."""
        queries, keys, values = self.tensors(200, rows, kv_heads=kv_heads, dtype=dtype)
        result = self.run(queries, keys, values)
        p = result.mask.inclusion_probability()
        assert p.shape == result.mask.shape == (2, self.heads, rows, 200) and p.dtype == torch.float32
        assert bool(((p >= 0) & (p <= 1)).all())
        chosen = (p > 0).sum(-1)
        assert int(chosen.max()) <= self.max_keys(200) and int(chosen.min()) >= 1
        assert 0 < result.density <= 1 and result.kv_fraction > 0
        assert result.output.shape == (2, rows, self.heads, self.head_dim) and result.output.dtype == dtype
        q, k, v = (tensor.double() for tensor in (queries, keys, values))
        expected, _ = attend(q, k, v, result.mask, self.head_dim**-0.5, "reference")
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
        torch.testing.assert_close(result.output.double(), expected, atol=tolerance, rtol=tolerance)

    @pytest.mark.parametrize("rows", [1, 9])
    def test_forbidden_keys(self, rows: int) -> None:
        """What the attention mask forbids is never attended; a row without keys gives zero and stays out of averages."""
        queries, keys, values = self.tensors(120, rows, batch=4)
        allowed = torch.rand(4, 1, rows, 120, generator=torch.Generator().manual_seed(1)) < 0.6
        allowed[0] = allowed[1, :, 0] = allowed[2, :, :, :50] = False
        for mask in (allowed, torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)):
            result = self.run(queries, keys, values, attention_mask=mask)
            assert bool((result.mask.inclusion_probability()[~allowed.expand(result.mask.shape)] == 0).all())
            assert result.output.isfinite().all()
            assert bool((result.output[0] == 0).all()) and bool((result.output[1, 0] == 0).all())
            assert bool((result.output[2:] != 0).any(-1).all())
            assert result.dead_rows == rows + 1
            assert result.density == result.density  # not NaN: dead rows stay out of the average
        last_dead = allowed.clone()
        last_dead[:, :, -1] = False
        for mask in (last_dead, allowed & False):
            result = self.run(queries, keys, values, attention_mask=mask)
            assert result.output.isfinite().all() and bool((result.output[:, -1] == 0).all())
        causal = self.run(queries, keys, values).mask.inclusion_probability()
        future = torch.arange(120) > torch.arange(120 - rows, 120).unsqueeze(-1)
        assert bool((causal[:, :, future] == 0).all())

    @pytest.mark.parametrize("kv_heads", [8, 2, 1])
    @pytest.mark.parametrize("rows", [1, 7])
    def test_full_budget_is_dense(self, kv_heads: int, rows: int) -> None:
        config = self.full_config()
        if config is None:
            return  # some methods, MagicPig among them, have no full budget
        tensors = self.tensors(90, rows, kv_heads=kv_heads)
        result = self.run(*tensors, config=config)
        assert result.density == pytest.approx(1.0)
        torch.testing.assert_close(result.output, dense_attention(*tensors), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("rows", [1, 7])
    def test_earlier_mask_is_unchanged(self, rows: int) -> None:
        inputs = AttentionInputs(*self.tensors(150, rows))
        empty = Mask.empty(inputs.shape, kv_heads=inputs.kv_heads)
        earlier = create_masker(SinkMaskerConfig(sink_size=5)).select(inputs, empty)
        chosen = earlier.inclusion_probability().bool()
        by_group = chosen[:, :: inputs.group_size]
        for mask in (
            earlier,
            Mask.from_dense(chosen, kv_heads=inputs.kv_heads),
            Mask.from_dense(by_group, self.heads, inputs.kv_heads),
            Mask.from_indices(Mask.from_dense(by_group).lists().indices, inputs.shape, kv_heads=inputs.kv_heads),
        ):
            before, masker = mask.inclusion_probability().clone(), create_masker(self.make_config())
            after = masker.select(inputs, mask)
            assert torch.equal(mask.inclusion_probability(), before)
            if masker.narrows:
                assert bool((after.inclusion_probability()[before == 0] == 0).all()), "a masker that narrows chose a key"
            else:
                assert bool((after.inclusion_probability()[before == 1] == 1).all()), "a chosen key was dropped"

    @pytest.mark.parametrize("rows", [1, 7])
    def test_narrowing_keeps_what_position_chose(self, rows: int) -> None:
        """A masker that narrows chooses nothing new, and drops no key that was chosen by its position before the selector."""
        if not create_masker(self.make_config()).narrows:
            return
        tensors = self.tensors(150, rows)
        pipeline = [SinkMaskerConfig(5), OracleTopKConfig(0.5), self.make_config()]
        results = [ResearchAttention(ResearchAttentionConfig(pipeline[:count]))(*tensors) for count in (1, 2, 3)]
        position, candidates, narrowed = (result.mask.inclusion_probability() for result in results)
        assert bool((narrowed >= position).all()) and bool((narrowed <= candidates).all())
        assert narrowed.sum() < candidates.sum()

    @pytest.mark.parametrize("rows", [1, 7])
    def test_by_position_means_by_nothing_else(self, rows: int) -> None:
        masker = create_masker(self.make_config())
        if not masker.by_position:
            return
        calls = [AttentionInputs(*self.tensors(150, rows, seed=i), layer_idx=i, seeds=[i, i + 1]) for i in range(2)]
        one, other = (masker.select(inputs, Mask.empty(inputs.shape, kv_heads=inputs.kv_heads)) for inputs in calls)
        assert torch.equal(one.inclusion_probability(), other.inclusion_probability())

    @pytest.mark.parametrize("padding", [30.0, float("nan"), float("inf")])
    @pytest.mark.parametrize("rows", [1, 4])
    @pytest.mark.parametrize("with_state", [False, True])
    def test_batch_independence(self, rows: int, with_state: bool, padding: float) -> None:
        """An item alone and unpadded, and left-padded among two others, gets the same mask and output. Padding may hold
        anything: random numbers times `padding`."""
        lengths, longest, seeds = [97, 160, 131], 160, [5, 6, 7]
        queries, keys, values = self.tensors(longest, rows, batch=3)
        for item, length in enumerate(lengths):
            keys[item, :, : longest - length] *= padding
            values[item, :, : longest - length] *= padding
        real = torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(-1)
        causal = torch.arange(longest) <= torch.arange(longest - rows, longest).unsqueeze(-1)
        mask = real[:, None, None, :] & causal
        attention, state = self.attention(), None
        if with_state:
            state = self.prepared(attention, keys[:, :, : longest - rows], real[:, : longest - rows])
        together = attention(queries, keys, values, attention_mask=mask, seeds=seeds, state=state)
        for item, length in enumerate(lengths):
            own_keys, own_values = keys[item : item + 1, :, -length:], values[item : item + 1, :, -length:]
            if with_state:
                state = self.prepared(attention, own_keys[:, :, : length - rows])
            alone = attention(queries[item : item + 1], own_keys, own_values, seeds=seeds[item : item + 1], state=state)
            p = together.mask.inclusion_probability()[item]
            assert bool((p[..., : longest - length] == 0).all())
            torch.testing.assert_close(p[..., longest - length :], alone.mask.inclusion_probability()[0])
            torch.testing.assert_close(together.output[item], alone.output[0], atol=1e-5, rtol=1e-4)

    def test_determinism(self) -> None:
        """The generator alone decides: the global random state is neither read nor changed."""
        tensors = self.tensors(150, 3)
        torch.manual_seed(1)
        first = self.run(*tensors, generator=torch.Generator().manual_seed(9))
        torch.manual_seed(2)
        before = torch.get_rng_state()
        second = self.run(*tensors, generator=torch.Generator().manual_seed(9))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first.mask.inclusion_probability(), second.mask.inclusion_probability())
        assert torch.equal(first.output, second.output)
        each = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)]
        assert self.run(*tensors, generator=each).output.isfinite().all()

    def test_unbiased(self) -> None:
        """A sampler's softmax denominator is right on average: mean ratio to the dense one within `bias_tolerance` of 1."""
        config = self.make_config()
        if not create_masker(config).is_sampling:
            return
        tensors = self.tensors(256, 1, batch=1)
        dense = AttentionInputs(*tensors).scores().logsumexp(-1)
        if self.config_for_seed(0) is None:
            queries, keys, values = (tensor.expand(self.bias_seeds, -1, -1, -1) for tensor in tensors)
            estimates = self.run(queries, keys, values, config, seeds=list(range(self.bias_seeds))).log_sum_exp
        else:
            configs = [self.config_for_seed(seed) for seed in range(self.bias_seeds)]
            estimates = torch.cat([self.run(*tensors, config=config).log_sum_exp for config in configs])
        ratio = (estimates - dense).exp().mean()
        assert abs(float(ratio) - 1) <= self.bias_tolerance, f"mean denominator ratio {float(ratio):.4f}"

    def test_decode_steps_are_one_extension(self) -> None:
        """32 decode steps leave what one extension by 32 keys leaves; a rewind forgets what came after it, a fork follows others."""
        context, steps = self.context, 32
        queries, keys, values = self.tensors(context + steps, steps)
        other = torch.randn(2, 2, steps, self.head_dim, generator=torch.Generator().manual_seed(77))
        attention = self.attention()

        def decode(state: AttentionState, keys: Tensor, count: int, first: int = 0) -> Tensor:
            """The last step's inclusion probabilities."""
            for step in range(first, count):
                end = context + step + 1
                result = attention(queries[:, :, step : step + 1], keys[:, :, :end], values[:, :, :end], state=state)
            return result.mask.inclusion_probability()[:, :, 0]

        fitted = keys[:, :, :context]
        stepwise = self.prepared(attention, fitted)
        by_steps = decode(stepwise, keys, steps)
        for rows in (queries[:, :, -1:], queries):
            at_once = attention(rows, keys, values, state=self.prepared(attention, fitted)).mask.inclusion_probability()
            torch.testing.assert_close(by_steps, at_once[:, :, -1])
        stepwise.rewind(context)
        decode(stepwise, torch.cat([fitted, 3 * other], 2), 19)
        stepwise.rewind(context + 3)  # three wrong keys stay until the next line
        stepwise.rewind(context)
        torch.testing.assert_close(decode(stepwise, keys, steps), by_steps)
        for follows in (0, 1):  # of a state and its fork one gets other keys
            pair = [self.prepared(attention, fitted)]
            decode(pair[0], keys, 19)
            pair.append(pair[0].fork(context + 19))
            decode(pair[1 - follows], torch.cat([keys[:, :, : context + 19], 3 * other], 2), 25, 19)
            torch.testing.assert_close(decode(pair[follows], keys, steps, 19), by_steps)
        stepwise.rewind(context // 2)  # below the fit: the next call fits again
        half = context // 2 + 1
        refitted = attention(queries[:, :, :1], keys[:, :, :half], values[:, :, :half], state=stepwise)
        assert refitted.output.isfinite().all()

    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=_SLOW)  # the same sizes in every run
    @given(
        n=st.integers(1, 5000),
        rows=st.sampled_from([1, 7, 64]),
        kv_heads=st.sampled_from([8, 2, 1]),
        padding=st.sampled_from([None, 0.0, 0.5]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    @example(n=1, rows=1, kv_heads=2, padding=None, dtype=torch.float32)
    @example(n=3, rows=1, kv_heads=2, padding=None, dtype=torch.float32)
    @example(n=64, rows=64, kv_heads=2, padding=None, dtype=torch.float32)
    @example(n=5000, rows=1, kv_heads=2, padding=None, dtype=torch.float32)
    def test_any_size(self, n: int, rows: int, kv_heads: int, padding: float | None, dtype: torch.dtype) -> None:
        """padding: share of the first item's keys that is left padding, in a batch of 3; None = a batch of 1."""
        rows, batch = 1 if n > 1000 else min(rows, n), 1 if padding is None else 3
        queries, keys, values = self.tensors(n, rows, batch, kv_heads, dtype=dtype)
        mask = torch.ones(rows, n, dtype=torch.bool).tril(n - rows).repeat(batch, 1, 1, 1)
        mask[0, :, :, : int((padding or 0.0) * n)] = False
        result = self.run(queries, keys, values, attention_mask=mask)
        attended = (result.mask.inclusion_probability() > 0).sum(-1)
        allowed = mask.sum(-1).expand_as(attended)
        assert result.output.isfinite().all() and result.output.dtype == dtype
        assert bool(((attended >= allowed.clamp(max=1)) & (attended <= allowed)).all())

    def test_a_cache_of_fixed_size(self) -> None:
        """A cache that passes all its slots, filled or not, gets the same masks as a growing one; `in_graphs`: also in an open step."""
        context, steps = self.context, 3
        queries, keys, values = self.tensors(context + steps, steps)
        slots = torch.full((2, *keys.shape[:2], context + steps + 9, self.head_dim), 7.0)  # 7: not filled yet
        slots[0, :, :, :context], slots[1, :, :, :context] = keys[:, :, :context], values[:, :, :context]
        attention = self.attention()
        seen = torch.arange(slots.shape[3]) < context
        fixed = self.prepared(attention, slots[0], seen.expand(2, -1))
        growing = self.prepared(attention, keys[:, :, :context])
        known = self.prepared(attention, keys[:1, :, :context]).fork(context)
        for step in range(steps):
            end = context + step + 1
            slots[0, :, :, :end], slots[1, :, :, :end] = keys[:, :, :end], values[:, :, :end]
            row, mask = queries[:, :, step : step + 1], (torch.arange(slots.shape[3]) < end).expand(2, 1, 1, -1)
            one = attention(row, slots[0], slots[1], attention_mask=mask, state=fixed)
            other = attention(row, keys[:, :, :end], values[:, :, :end], state=growing)
            p = one.mask.inclusion_probability()[..., :end]
            torch.testing.assert_close(p, other.mask.inclusion_probability(), msg=f"step {step}")
            if attention.maskers[0].in_graphs:
                inputs = AttentionInputs(row[:1], *slots[:, :1])
                inputs.layout = OpenLayout(inputs.shape, 2, row.device, torch.tensor(end))
                own = attention.choose_keys(inputs, known)[0].inclusion_probability()[..., :end]
                torch.testing.assert_close(own, p[:1], msg=f"step {step}, open")

    def test_gradients_flow_through_the_output(self) -> None:
        for rows in (1, 5):
            queries, keys, values = (tensor.requires_grad_() for tensor in self.tensors(60, rows))
            loss = self.run(queries, keys, values).output.square().sum()
            for gradient in torch.autograd.grad(loss, (queries, keys, values)):
                assert gradient.isfinite().all()

    def test_never_nan(self) -> None:
        """Huge, constant and zero keys: no NaN, no infinity."""
        queries, keys, values = self.tensors(100, 3)
        far = keys.clone()
        far[:, :, 50] *= 300.0
        for odd in (keys * 0, keys[:, :, :1].expand_as(keys).contiguous(), keys * 100, far):
            result = self.run(queries * 10, odd, values)
            assert result.output.isfinite().all()

    @pytest.mark.parametrize("rows", [1, 7])
    @pytest.mark.parametrize("columns", [2, 8])
    def test_head_budgets(self, columns: int, rows: int) -> None:
        """A head with a factor chooses what it chooses where all heads have it. A table of another model is refused."""
        tensors = self.tensors(200, rows, kv_heads=2)
        factors = [0.5 + 0.25 * column for column in range(columns)]

        def chosen(table: list[list[float]]) -> Tensor:
            attention = ResearchAttention(dataclasses.replace(self.attention().config, head_budgets=table))
            return attention(*tensors).mask.inclusion_probability()

        uneven = chosen([factors])
        for column, factor in enumerate(factors):
            heads = slice(column * self.heads // columns, (column + 1) * self.heads // columns)
            assert torch.equal(uneven[:, heads], chosen([[factor]])[:, heads])
        plain = self.run(*tensors).mask.inclusion_probability()
        assert torch.equal(chosen([[1.0]]), plain)
        if any(isinstance(getattr(self.make_config(), name, None), float) for name in _SIZES):
            assert (chosen([[2.0]]) > 0).sum() > (plain > 0).sum()
        with pytest.raises(ValueError, match="fit a table for this model"):
            chosen([[1.0] * 3])

    def test_a_dense_layer(self) -> None:
        """A layer that stays dense attends to every allowed key, and reads no more than these."""
        tensors = self.tensors(120, 3)
        attention = ResearchAttention(ResearchAttentionConfig([self.make_config()], dense_layers=[4]))
        state = attention.new_state()
        attention.prepare(tensors[1], 4, state)
        result = attention(*tensors, layer_idx=4, state=state)
        assert result.density == result.kv_fraction == 1.0
        torch.testing.assert_close(result.output, dense_attention(*tensors), atol=1e-5, rtol=1e-5)

    def test_search_space_names_fields(self) -> None:
        config = self.make_config()
        fields = {field.name for field in dataclasses.fields(config)}
        assert set(type(config).get_search_space("ruler/4096/vt")) <= fields
