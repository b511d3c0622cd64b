"""Will it be faster? A roofline of one decode step, dense and sparse: bytes over bandwidths, plus kernel launches.

    python -m benchmark.cost optimal_configs/run_20260131_120000/NAME_10pct.json --gpu h100 --context 131072 --batch 8

Prints the formula, what it assumes, and a table: KV cache in the GPU's memory, and offloaded to the host's. It is a bound from
bytes, not a measurement; benchmark/speed/cost_model.py holds the same formula against measured steps of the CPU kernels.
Exit code: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.command_line import Parser, folder, run_command
from sparse_attention_hub.errors import UserError

if TYPE_CHECKING:
    from benchmark.storage.search_records import BestConfig
    from sparse_attention_hub import MaskerConfig
    from sparse_attention_hub.models.lockstep import LayerCall

#: Share of a peak bandwidth that kernels reach.
REACHED = 0.8
#: Kernels of a layer: dense attention is one; sparse attention is two (parts, then their sum), and each masker that
#: looks at keys or codes adds three (scores, selection, lists).
DENSE_LAUNCHES, ATTEND_LAUNCHES, SELECTOR_LAUNCHES = 1, 2, 3
LAUNCH_SECONDS = 3e-6

FORMULA = """step = weights / memory + KV / memory or link + selector / memory + launches x {launch:.0f} us
KV = batch x context x KV bytes per token x share of the keys that is read; dense reads all of them
assumed: bandwidths at {reached:.0%} of their peaks; all weights are read once per step (no mixture of experts); arithmetic,
  activations and sampling cost nothing; the share of keys is that of the search, whatever the context; launches per layer: dense {dense},
  sparse {attend} and {selector} for each masker that looks at keys; layers with a window are dense; of an offloaded cache, selectors' codes
  stay in GPU memory, but an oracle reads all keys over the link"""


@dataclass(frozen=True)
class Machine:
    """memory, link: bytes per second, of the GPU's memory and from the host; capacity: bytes of memory."""

    memory: float
    link: float
    capacity: float
    launch: float = LAUNCH_SECONDS

    def seconds(self, read: float, launches: float = 0.0, *, over_link: float = 0.0) -> float:
        """Time to read so many bytes from memory and over the link, and to launch kernels."""
        return read / self.memory + over_link / self.link + launches * self.launch


def _gpu(memory: float, link: float, capacity: float) -> Machine:
    """Peaks in GB/s and GB."""
    return Machine(REACHED * memory * 1e9, REACHED * link * 1e9, capacity * 1e9)


#: Vendors' peaks: memory, PCIe per direction, capacity.
GPUS = {
    "a100": _gpu(2039, 32, 80),
    "h100": _gpu(3350, 64, 80),
    "h200": _gpu(4800, 64, 141),
    "b200": _gpu(8000, 64, 180),
    "l40s": _gpu(864, 32, 48),
    "rtx4090": _gpu(1008, 32, 24),
}


@dataclass(frozen=True)
class Model:
    """Bytes of the weights that a step reads, and how each attention layer calls its attention."""

    weights: int
    calls: dict[int, LayerCall]
    itemsize: int

    def token_bytes(self, context: int, *, sparse: bool) -> float:
        """KV bytes of a context over its tokens: of the layers that can be sparse, or of those with a window, which hold fewer."""
        kept = [call for call in self.calls.values() if call.rule.limited != sparse]
        keys = [context if sparse else context - max(0, call.rule.first_key(context - 1)) for call in kept]
        return sum(n * call.token_numbers for n, call in zip(keys, kept, strict=True)) * self.itemsize / context

    @property
    def sparse_layers(self) -> int:
        return sum(not call.rule.limited for call in self.calls.values())


@dataclass(frozen=True)
class Method:
    """keys: share of the dense KV bytes that attention reads; selector: that choosing reads. selectors: maskers that look at keys.
    oracle: the selector reads keys, not codes."""

    keys: float
    selector: float
    selectors: int
    oracle: bool


@dataclass(frozen=True)
class Step:
    """Seconds of one decode step."""

    weights: float
    keys: float
    selector: float
    launches: float

    @property
    def total(self) -> float:
        return self.weights + self.attention

    @property
    def attention(self) -> float:
        return self.keys + self.selector + self.launches


def decode_steps(model: Model, method: Method, machine: Machine, context: int, batch: int) -> dict[str, Step]:
    """The four kinds of step: dense and sparse, with the KV cache in memory and offloaded."""
    tokens = batch * context
    windows, full = (tokens * model.token_bytes(context, sparse=sparse) for sparse in (False, True))
    weights = machine.seconds(model.weights)
    launches = machine.seconds(0, DENSE_LAUNCHES * len(model.calls))
    added = ATTEND_LAUNCHES + SELECTOR_LAUNCHES * method.selectors - DENSE_LAUNCHES
    sparse_launches = launches + machine.seconds(0, added * model.sparse_layers)
    picked, chosen = windows + method.keys * full, method.selector * full
    choosing = machine.seconds(0, over_link=chosen) if method.oracle else machine.seconds(chosen)
    return {
        "dense": Step(weights, machine.seconds(windows + full), 0.0, launches),
        "sparse": Step(weights, machine.seconds(picked), machine.seconds(chosen), sparse_launches),
        "dense, offloaded": Step(weights, machine.seconds(0, over_link=windows + full), 0.0, launches),
        "sparse, offloaded": Step(weights, machine.seconds(0, over_link=picked), choosing, sparse_launches),
    }


def read_method(best: BestConfig, model: Model, path: Path) -> Method:
    """The shares of bytes that a search measured, the selector's for the model's dtype here. UserError without a measurement."""
    import torch

    from sparse_attention_hub import ResearchAttentionConfig
    from sparse_attention_hub.maskers.base import masker_class

    if best.kv_fraction is None:
        raise UserError(f"{path}: has no kv_fraction, the search did not confirm it: give a confirmed configuration")
    configs = ResearchAttentionConfig.from_file(path).masker_configs
    searched = getattr(torch, best.provenance.dtype.removeprefix("torch."), torch.float32)
    here = {2: torch.bfloat16, 4: torch.float32}[model.itemsize]
    # One that narrows reads of the keys that it is given alone: what it read counts with them.
    selectors = [config for config in configs if not masker_class(config).narrows]
    before, after = (sum(selector_share(c, model, best.model, dtype) for c in selectors) for dtype in (searched, here))
    return Method(
        keys=max(0.0, best.kv_fraction - before),
        selector=after,
        selectors=sum(not masker_class(c).by_position and not type(c).__name__.startswith("RoundToPages") for c in configs),
        oracle=any(type(c).__name__.startswith("Oracle") for c in configs),
    )


def selector_share(config: MaskerConfig, model: Model, name: str, dtype: Any) -> float:
    """Bytes that a masker reads to choose, over all KV bytes of a layer."""
    import torch

    from sparse_attention_hub import DoubleSparsityTopKMaskerConfig, HashAttentionTopKMaskerConfig
    from sparse_attention_hub.maskers.base import create_masker, masker_class
    from sparse_attention_hub.maskers.hat_weights import hat_weights_for
    from sparse_attention_hub.maskers.inputs import AttentionInputs

    if isinstance(config, HashAttentionTopKMaskerConfig) and config.hat_weight_file is None:
        config = replace(config, hat_weight_file=hat_weights_for(name))
    if isinstance(config, DoubleSparsityTopKMaskerConfig):  # without its channels: its bytes follow from its config
        masker = object.__new__(masker_class(config))
        masker.config = config
    else:
        masker = create_masker(config)
    layer, call = next((layer, call) for layer, call in model.calls.items() if not call.rule.limited)
    shapes = (call.heads, call.key_width), (call.kv_heads, call.key_width), (call.kv_heads, call.value_width)
    queries, keys, values = (torch.zeros((1, heads, 1, width), dtype=dtype) for heads, width in shapes)
    return masker.selector_fraction(AttentionInputs(queries, keys, values, layer_idx=layer))


def read_model(name: str, dtype: str) -> Model:
    """A model's bytes, without loading its weights. UserError as load_model, or if its code needs weights to run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparse_attention_hub.models.probe import calls_without_weights
    from sparse_attention_hub.models.sources import model_files

    itemsize = getattr(torch, dtype).itemsize
    with model_files(name, False) as (path, options):
        config = AutoConfig.from_pretrained(path, **options)
        config._attn_implementation = None
        calls = calls_without_weights(config, name)
        if calls is None:
            raise UserError(f"model {name!r}: its code needs weights to run, so its bytes are not known: take another model")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    read = sum(parameter.numel() for parameter in model.parameters())
    if not config.get_text_config(decoder=True).tie_word_embeddings:
        read -= model.get_input_embeddings().weight.numel()  # one row per token
    return Model(read * itemsize, calls, itemsize)


def describe(steps: dict[str, Step], batch: int) -> str:
    """The steps as a table, and how many times faster the sparse ones are."""
    lines = [f"{'ms per step':<18} {'weights':>9} {'keys':>9} {'selector':>9} {'launches':>9} {'step':>9} {'tokens/s':>9}"]
    for name, step in steps.items():
        parts = (step.weights, step.keys, step.selector, step.launches, step.total)
        lines.append(f"{name:<18} " + " ".join(f"{1e3 * part:>9.2f}" for part in parts) + f" {batch / step.total:>9.0f}")
    for place in ("", ", offloaded"):
        dense, sparse = steps[f"dense{place}"], steps[f"sparse{place}"]
        attention = dense.attention / sparse.attention
        lines.append(f"sparse over dense{place}: {dense.total / sparse.total:.2f}x a step, {attention:.2f}x attention alone")
    return "\n".join(lines)


def estimate(path: Path, gpu: str, context: int, batch: int, dtype: str, as_json: bool) -> int:
    """Print the estimate for a configuration; the exit code."""
    from benchmark.storage.records import read_record
    from benchmark.storage.search_records import BestConfig

    for flag, value in (("--context", context), ("--batch", batch)):
        if not 0 < value <= 10**9:
            raise UserError(f"{flag} must be greater than 0 and at most {10**9}, got {value}")
    best = read_record(path, BestConfig, "give a best configuration of a search")
    model, machine = read_model(best.model, dtype), GPUS[gpu]
    method = read_method(best, model, path)
    steps = decode_steps(model, method, machine, context, batch)
    cache = batch * context * sum(model.token_bytes(context, sparse=sparse) for sparse in (False, True))
    if as_json:
        print(json.dumps({"steps": {name: vars(step) for name, step in steps.items()}, "method": vars(method)}))
        return 0
    numbers = {"dense": DENSE_LAUNCHES, "attend": ATTEND_LAUNCHES, "selector": SELECTOR_LAUNCHES, "reached": REACHED}
    print(f"{best.masker_name} of {best.task} on {best.model}, {dtype}")
    print(FORMULA.format(**numbers, launch=1e6 * machine.launch))
    peaks = f"{machine.memory / REACHED / 1e9:.0f} GB/s memory, {machine.link / REACHED / 1e9:.0f} GB/s link"
    print(f"{gpu}: {peaks}; {batch} request{'s' * (batch != 1)} of {context} keys")
    print(f"reads {method.keys:.1%} of the KV bytes, and {method.selector:.1%} of them to choose\n")
    print(describe(steps, batch))
    fits = model.weights + cache <= machine.capacity
    verdict = "fits into" if fits else "does not fit into: offload, or lower --batch or --context;"
    print(f"weights {model.weights / 1e9:.1f} GB and KV cache {cache / 1e9:.1f} GB: {verdict} {machine.capacity / 1e9:.0f} GB")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmark.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=folder, metavar="FILE", help="a best configuration of a search")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="default: %(default)s")
    parser.add_argument("--context", type=int, default=131072, help="keys of each request (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="requests per step (%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a text")
    given = parser.parse_args(arguments)
    return run_command(lambda: estimate(given.file, given.gpu, given.context, given.batch, given.dtype, given.json))


if __name__ == "__main__":
    sys.exit(main())
