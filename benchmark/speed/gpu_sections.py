"""The sections of gpu_acceptance.py that measure, and what they share."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import sparse_attention_hub as hub

if TYPE_CHECKING:
    from sparse_attention_hub.models import LanguageModel, Prefilled

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
#: Tokens of two answers that differ by four steps: a graph of a step is made in the second one of both.
GRAPH_STEPS = (4, 8)


@dataclass(frozen=True)
class Sizes:
    """keys: of kernels and of 9 rows in lockstep; long: of 41 rows. model: of LlamaConfig, beside its defaults."""

    keys: int = 32768
    long: int = 65536
    short: int = 4096
    prefill: tuple[int, ...] = (8192, 32768, 65536)
    copied: int = GIB
    rounds: int = 20
    model: dict[str, int] = field(default_factory=dict)


LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
}  # fmt: skip
TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL = Sizes(256, 320, 128, (48, 96), 2**16, 1, TINY)


class NoWords:
    """The least that a tokenizer must do."""

    eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def make_model(sizes: dict[str, Any]) -> Any:
    """A Llama of random weights in bfloat16, made on the GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


class Sections:
    """Sections yield (name of a figure, value). details: what is longer than a number. machine: what was measured on."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        self.details: dict[str, Any] = {}
        self.machine: dict[str, Any] = {}

    @cached_property
    def lm(self) -> LanguageModel:
        from sparse_attention_hub.models import LanguageModel

        return LanguageModel.wrap(make_model(self.sizes.model), NoWords(), name="random-llama")

    def tokens(self, count: int) -> list[int]:
        return [2 + 7919 * place % (self.sizes.model["vocab_size"] - 2) for place in range(count)]

    def prefilled(self, length: int, room: int = 32) -> Prefilled:
        from sparse_attention_hub.models import prefill

        return prefill(self.lm, self.tokens(length), room)

    # -- the sections --------------------------------------------------------------------------------------------------

    def device(self) -> Iterator[tuple[str, float]]:
        """The card, its bandwidth, and what a launch and a wait cost."""
        import torch
        import transformers
        import triton

        self.machine |= {"gpu": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
        self.machine |= {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
        source = torch.zeros(self.sizes.copied, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        yield "copy_gb_per_s", 2 * self.sizes.copied / self.seconds(lambda: target.copy_(source)) / 1e9
        number = torch.zeros(1, device="cuda")

        def launch() -> None:
            for _ in range(1000):
                number.add_(1)

        def wait() -> None:
            for _ in range(100):
                number.item()

        yield "launch_us", self.seconds(launch) * 1e3
        yield "wait_us", self.seconds(wait) * 1e4

    def kernels(self) -> Iterator[tuple[str, float]]:
        """The kernel tests on this card, and a long context against float64."""
        import torch

        sys.path.insert(0, str(ROOT / "tests" / "kernels"))
        from cases import CASES, FORKS, HALF, exactly, make_call, make_forks  # type: ignore[import-not-found]
        from run_triton import kernels_for  # type: ignore[import-not-found]

        from sparse_attention_hub import Mask
        from sparse_attention_hub.kernels.reference import Call, attend_reference
        from sparse_attention_hub.kernels.triton import attend_forks, attend_triton

        worst: dict[str, float] = {}
        for case in CASES:
            call, expected = make_call(case, "cuda"), exactly(make_call(case))
            for kernel in kernels_for(case):
                tolerance = 3e-6 if kernel == "rows" else {torch.float32: 3e-6, HALF: 1e-3}.get(case.dtype, 8e-3)
                output, _ = attend_triton(call, kernel=kernel, splits=case.splits, output_dtype=torch.float32)
                off = (output.cpu().double() - expected[0]).abs() / (tolerance * (1 + expected[0].abs()))
                worst[f"{case.name}, {kernel}"] = float(off.max())
        for place, kind in enumerate(FORKS):
            forks = make_forks(*kind, device="cuda")
            call, expected = forks.calls[0], torch.cat([exactly(own)[0] for own in forks.calls])
            given = forks.queries, forks.shared, forks.own, forks.lists
            output, _ = attend_forks(*given, call.scaling, call.softcap, call.sinks)
            off = (output.double() - expected).abs() / (3e-6 * (1 + expected.abs()))
            worst[f"forks {place}"] = float(off.max())
        self.details["kernel_cases"] = worst
        yield "kernels_worst_error_over_tolerance", max(worst.values())
        heads, kv_heads, keys = 32, 8, self.sizes.keys
        queries, cache, values = (
            torch.randn(1, count, length, 128, device="cuda", dtype=torch.bfloat16)
            for count, length in ((heads, 1), (kv_heads, keys), (kv_heads, keys))
        )
        for kernel, held in (("rows", heads), ("groups", kv_heads)):
            chosen = torch.rand(1, held, 1, keys, device="cuda").topk(keys // 20, dim=-1).indices
            mask = Mask.from_indices(chosen, (1, heads, 1, keys), kv_heads=kv_heads)
            call = Call(queries, cache, values, mask, 128**-0.5)
            doubles = call._replace(queries=queries.double(), keys=cache.double(), values=values.double())
            output, _ = attend_triton(call, kernel=kernel, output_dtype=torch.float32)
            expected = attend_reference(doubles)[0]
            yield f"kernels_long_{kernel}_error", float((output - expected).norm() / expected.norm())

    def pipelines(self) -> Iterator[tuple[str, float]]:
        """Every masker's example on the GPU and on the CPU."""
        import torch

        from sparse_attention_hub.maskers.base import registered_configs
        from sparse_attention_hub.maskers.drawing import DIM, HEADS, example_configs

        modules = {config.__module__ for config in registered_configs().values()}
        names = sorted(module.rpartition(".")[2] for module in modules if module.startswith("sparse_attention_hub.maskers."))
        generator, keys = torch.Generator().manual_seed(0), self.sizes.short
        found: dict[str, float] = {}
        for name in names:
            attention = hub.ResearchAttention(hub.ResearchAttentionConfig(example_configs(name, self.folder)))
            if attention.observes:  # chooses by the context's queries, which only a prefill has
                continue
            for rows in (1, 5):
                shapes = ((HEADS, rows), (1, keys), (1, keys))
                host = [torch.randn(1, heads, length, DIM, generator=generator) for heads, length in shapes]
                try:
                    one, other = (
                        self._attend(attention, tensors) for tensors in (host, [tensor.to("cuda") for tensor in host])
                    )
                except ModuleNotFoundError as missing:  # scipy, which the adaptive sampler needs
                    self.details.setdefault("pipelines_not_compared", {})[name] = str(missing)
                    continue
                found[f"{name}, {rows} rows"] = float((one - other).norm() / one.norm())
        self.details["pipelines"] = found
        yield "pipelines_compared", len(found)
        yield "pipelines_that_differ", sum(difference > 1e-3 for difference in found.values())

    def _attend(self, attention: hub.ResearchAttention, tensors: list[Any]) -> Any:
        state, context = attention.new_state(), tensors[1].shape[2] - tensors[0].shape[2]
        attention.prepare(tensors[1][:, :, :context], 0, state)
        queries, keys, values = tensors
        return attention(queries, keys, values, state=state, seeds=1).output.cpu()

    def waits(self) -> Iterator[tuple[str, float]]:
        """What a decode step of nine rows makes the host wait for, by file and line, and how much it launches."""
        import torch

        prefilled, ways = self.prefilled(self.sizes.short), [None, *self.attentions(8)]
        self.answer(prefilled, ways, 2)  # compiles the kernels
        seen: list[Counter[str]] = []
        for tokens in GRAPH_STEPS:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    self.answer(prefilled, ways, tokens)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            named = (f"{one.filename}:{one.lineno}" for one in warned if "synchronizing" in str(one.message))
            seen.append(Counter(named))
        each = {place: (seen[1][place] - seen[0][place]) / 4 for place in sorted(seen[1])}
        self.details["waits_of_a_step"] = {place: count for place, count in each.items() if count}
        yield "step_of_9_rows_waits", sum(each.values())
        yield from self.step_costs("step_of_9_rows", prefilled, ways)

    def step_costs(self, name: str, prefilled: Prefilled, ways: Sequence[Any]) -> Iterator[tuple[str, float]]:
        """Operations and kernel launches of one step, which a graph does."""
        found = []
        for tokens in GRAPH_STEPS:
            with counted() as counts:
                self.answer(prefilled, ways, tokens)
            found.append(counts)
        for kind in ("operations", "launches"):
            yield f"{name}_{kind}", (found[1][kind] - found[0][kind]) / 4

    def dense(self) -> Iterator[tuple[str, float]]:
        """One layer's dense decode, the first call of each of eight new lengths, under each of torch's choices."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from sparse_attention_hub.models.dense import dense_rows
        from sparse_attention_hub.models.switch import without_cudnn

        heads, kv_heads = 32, 8
        queries, cache = (
            torch.randn(1, count, length, 128, device="cuda", dtype=torch.bfloat16)
            for count, length in ((heads, 1), (kv_heads, self.sizes.keys + 64))
        )

        def decode(start: int) -> float:
            lengths = range(self.sizes.keys + start, self.sizes.keys + start + 8)
            steps = [lambda n=n: dense_rows(queries, cache[:, :, :n], cache[:, :, :n], 128**-0.5) for n in lengths]
            return median(self.once(step) for step in steps)

        decode(0)
        yield "dense_torch_default_ms", 1e3 * decode(8)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            flash = decode(16)
        yield "dense_flash_ms", 1e3 * flash
        with without_cudnn():
            own = decode(24)
        yield "dense_without_cudnn_ms", 1e3 * own
        yield "dense_own_over_flash", own / flash

    def prefill(self) -> Iterator[tuple[str, float]]:
        """Dense prefill of the model."""
        numbers = sum(weight.numel() for weight in self.lm.model.model.parameters())
        self.prefilled(self.sizes.prefill[0])
        for place, length in enumerate(self.sizes.prefill):
            seconds = self.prefilled(length).seconds
            yield f"prefill_{length}_s", seconds
            if place == 1:
                yield "prefill_middle_tflop_per_s", 2 * numbers * length / seconds / 1e12

    def lockstep(self) -> Iterator[tuple[str, float]]:
        """Nine rows, and 41 over the long context: milliseconds per step, as a CUDA graph and without; memory against the estimate."""
        import torch

        from sparse_attention_hub.models.memory import estimate_bytes
        from sparse_attention_hub.models.step_graphs import SWITCH

        weights = sum(weight.nbytes for weight in self.lm.model.parameters())
        for count, length in ((9, self.sizes.keys), (41, self.sizes.long)):
            ways = [None, *self.attentions(count - 1)]
            torch.cuda.reset_peak_memory_stats()
            prefilled = self.prefilled(length)
            self.answer(prefilled, ways, 2)  # compiles the kernels
            few, more = (self.answer(prefilled, ways, tokens) for tokens in GRAPH_STEPS)
            yield f"lockstep_{count}_rows_step_ms", 1e3 * (more - few) / 4
            with patch.dict(os.environ, {SWITCH: "0"}):
                few, more = (self.answer(prefilled, ways, tokens) for tokens in GRAPH_STEPS)
            yield f"lockstep_{count}_rows_step_without_graph_ms", 1e3 * (more - few) / 4
            peak = torch.cuda.max_memory_allocated()
            yield f"lockstep_{count}_rows_peak_gib", peak / GIB
            yield f"lockstep_{count}_rows_peak_over_estimate", (peak - weights) / estimate_bytes(self.lm, length, 32, ways)
            if count == 41:
                yield from self.step_costs("step_of_41_rows", prefilled, ways)
            del prefilled
        yield "graphs_failed", float(self.lm.graphs_failed)

    def replay(self) -> Iterator[tuple[str, float]]:
        """A recorded run, replayed under eight configurations."""
        from sparse_attention_hub.models.trace import record_trace
        from sparse_attention_hub.replay import replay

        context, question = self.tokens(self.sizes.prefill[0]), self.tokens(32)
        trace = record_trace(self.lm, context, question, 20, self.folder / "trace")
        ways = self.attentions(8)
        replay(trace, ways, device="cuda")  # compiles the kernels, also for as many layers at once
        yield "replay_seconds", self.seconds(lambda: replay(trace, ways, device="cuda"), 1)
        with counted() as counts:
            replay(trace, ways, device="cuda")
        yield "replay_operations", counts["operations"]

    def bandwidth(self) -> Iterator[tuple[str, float]]:
        """The share of a copy's bandwidth that the kernels reach."""
        from benchmark.speed.decode_step import measure_gpu

        yield from measure_gpu([self.sizes.keys, self.sizes.long], 8, 0.05).items()

    # -- what they share -----------------------------------------------------------------------------------------------

    def attentions(self, count: int) -> list[hub.ResearchAttention]:
        """Pipelines of eight families, at as many densities as are needed."""
        return [way for density in (0.05, 0.1, 0.25, 0.02, 0.5) for way in self._families(density)][:count]

    def _families(self, density: float) -> list[hub.ResearchAttention]:
        from sparse_attention_hub.maskers.channel_file import write_channels

        sizes, path = self.sizes.model, self.folder / "channels.json"
        channels = [list(range(sizes["head_dim"]))] * sizes["num_attention_heads"]
        write_channels({f"model.layers.{i}.self_attn.qk_proj": channels for i in range(sizes["num_hidden_layers"])}, path)
        ends = [hub.SinkMaskerConfig(0.001), hub.LocalMaskerConfig(0.002)]
        sampler: Any = hub.AdaptiveSamplingMaskerConfig(density / 4, 0.3, 0.3, 0, 0)
        if find_spec("scipy") is None:
            sampler = hub.RandomSamplingMaskerConfig(density / 2)
        own: list[list[Any]] = [
            [hub.LocalMaskerConfig(density)],
            [hub.RandomSamplingMaskerConfig(density)],
            [hub.OracleTopKConfig(density)],
            [hub.OracleTopPMaskerConfig(density**0.5)],
            [hub.QuestTopKMaskerConfig(density, 16)],
            [hub.DoubleSparsityTopKMaskerConfig(density, str(path), 4)],
            [hub.PQCacheConfig(density, 4, 6, 3, 4, "euclidean")],
            [hub.OracleTopKConfig(density / 2), sampler],
        ]
        return [hub.ResearchAttention(hub.ResearchAttentionConfig([*ends, *configs])) for configs in own]

    def answer(self, prefilled: Prefilled, ways: Sequence[Any], tokens: int) -> float:
        """Seconds of an answer of so many tokens to a question of eight."""
        from sparse_attention_hub.models import answer_many

        return self.once(lambda: answer_many(self.lm, prefilled, self.tokens(8), ways, tokens))

    def seconds(self, step: Callable[[], object], rounds: int | None = None) -> float:
        """The median over rounds, after one to warm up."""
        self.once(step)
        return median(self.once(step) for _ in range(rounds or self.sizes.rounds))

    def once(self, step: Callable[[], object]) -> float:
        """Seconds with the launches, and until the device is done."""
        import torch

        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - started


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Inside, counts aten operations that start work on the device, and launches of the Triton kernels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from sparse_attention_hub.kernels import triton as kernels

    counts: Counter[str] = Counter()
    names = "rows_kernel", "forks_kernel", "groups_kernel", "merge_kernel", "uniforms_kernel"
    compiled = {name: getattr(kernels, name) for name in names}

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            views = any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns)
            counts["operations"] += not views and "empty" not in function.name() and "_local_scalar" not in function.name()
            return function(*args, **(kwargs or {}))

    class Counting:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            counts["launches"] += 1
            return self.kernel[grid]

    for name, kernel in compiled.items():
        setattr(kernels, name, Counting(kernel))
    try:
        with Operations():  # type: ignore[no-untyped-call]
            yield counts
    finally:
        for name, kernel in compiled.items():
            setattr(kernels, name, kernel)
