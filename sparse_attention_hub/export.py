"""What an engine needs of a configuration: policy.json, and the page tables of a text where the method chooses whole pages.

    python -m sparse_attention_hub.export FILE --to DIR [--context 32768] [--page-size 16] [--text FILE]

FILE: a best configuration of a search, or the config.json of a benchmark's result. docs/using_a_result.md explains what is
written. Exit code: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, check_writable, print_any_text
from .found import read_json

if TYPE_CHECKING:
    from .attention import ResearchAttentionConfig

SCHEMA, VERSION = "sparse-attention-hub/policy", 1
#: Fields of maskers that are sizes in keys, or fractions of all keys.
SIZES = ("heavy_size", "sink_size", "window_size", "sampling_rate", "init_offset", "local_offset")
#: Decode steps in the page tables: the last tokens of the text.
STEPS = 8
_LEAST_TOKENS = 64


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_attention_hub.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="optimal_configs/run_.../NAME.json, or a result's config.json")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="the folder to write into")
    parser.add_argument("--context", type=int, default=32768, help="keys for which sizes are given in tokens (%(default)s)")
    parser.add_argument("--page-size", type=int, help="round the choice to whole pages of so many keys, per kv head")
    parser.add_argument("--text", type=Path, metavar="FILE", help="write the page tables of this text's last tokens")
    parser.add_argument("--model", help="whose keys the text gets (the model in FILE)")
    options = parser.parse_args(arguments)
    print_any_text()
    try:
        export(options.file, options.to, options.context, options.page_size, options.text, options.model)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(
    file: str | Path,
    to: Path,
    context: int = 32768,
    page_size: int | None = None,
    text: Path | None = None,
    model: str | None = None,
) -> None:
    """Write the policy of a configuration and, with a text, its page tables into the folder `to`; print what was written.

    context: keys for which sizes are resolved. page_size: ends the configuration with RoundToPagesConfig(page_size). model: id of
    the model that reads the text, default the one in the file. UserError for bad input.
    """
    from .attention import ResearchAttentionConfig
    from .maskers.base import check_int

    record, config = read_json(file), ResearchAttentionConfig.from_file(file)
    try:
        check_int("context", context, 1)
        config = rounded(config, page_size)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    to.mkdir(parents=True, exist_ok=True)
    check_writable(to / "policy.json")
    found = policy(Path(file), record, config, context)
    why_not = found["pages"]["why_not"]
    if why_not:
        print(f"{found['name']} does not map onto pages: {why_not}")
    elif text is None:
        print("no page tables: give --text FILE, a text whose last tokens they are made for")
    else:
        if not (model or found["model"]):
            raise UserError(f"{file}: names no model to read the text: give --model")
        found["pages"]["sample"] = _write_tables(config, model or found["model"], text, to / "page_tables.safetensors")
    (to / "policy.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"policy: {to / 'policy.json'}")


def rounded(config: ResearchAttentionConfig, page_size: int | None) -> ResearchAttentionConfig:
    """The configuration with its choice rounded to pages that a kv head's query heads share; None leaves it as it is.

    ValueError if it chooses nothing, is rounded already, or the page size is bad. One that samples stays as it is.
    """
    from .maskers import RoundToPagesConfig

    if not config.masker_configs:
        raise ValueError("has no maskers: dense attention chooses no keys, take a sparse configuration")
    if page_size is None or _samples(config):
        return config
    if isinstance(config.masker_configs[-1], RoundToPagesConfig):
        raise ValueError(f"is rounded to pages of {config.masker_configs[-1].page_size} already: leave --page-size out")
    return dataclasses.replace(config, masker_configs=[*config.masker_configs, RoundToPagesConfig(page_size)])


def _samples(config: ResearchAttentionConfig) -> bool:
    from .maskers.base import masker_class

    return masker_class(config.masker_configs[-1]).is_sampling


def why_no_pages(config: ResearchAttentionConfig) -> str | None:
    """Why page tables cannot hold what a configuration chooses; None if they can."""
    from .maskers import RoundToPagesConfig

    last = config.masker_configs[-1]
    if _samples(config):
        return f"sampling weights: {type(last).__name__} weights keys by 1/p, and a page table has no weights"
    if not isinstance(last, RoundToPagesConfig):
        return (
            "token granularity: it is not rounded to pages that an engine's tables can hold; --page-size 16 rounds the choice"
        )
    if last.share == "head":
        return "head granularity: each query head has pages of its own; take share='kv_head' or 'layer' in RoundToPagesConfig"
    return None


def policy(file: Path, record: dict[str, Any], config: ResearchAttentionConfig, context: int) -> dict[str, Any]:
    """The contents of policy.json for a record that a search or a benchmark wrote."""
    last = config.masker_configs[-1]
    found_by = record.get("provenance") or {}
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "name": record.get("masker_name") or record.get("configuration") or file.stem,
        "model": record.get("model"),
        "task": record.get("task"),
        "protocol": {"sparse_from": record.get("sparse_from") or found_by.get("sparse_from"), "prefill": "dense"},
        "context_length": context,
        "maskers": [_masker(entry, context) for entry in config.masker_configs],
        "dense_layers": config.dense_layers,
        "head_budgets": config.head_budgets,
        "pages": {
            "page_size": getattr(last, "page_size", None),
            "share": getattr(last, "share", None),
            "why_not": why_no_pages(config),
            "sample": None,
        },
        "figures": _figures(file, record),
        "provenance": {"file": file.name, "versions": record.get("versions"), **found_by},
    }


def _masker(config: Any, context: int) -> dict[str, Any]:
    """A masker's type and parameters, and each of its sizes in tokens, see docs/numbers.md."""
    from .maskers.base import config_to_dict

    written = config_to_dict(config)
    names = [field.name for field in dataclasses.fields(config) if field.name in SIZES]
    return written | {"tokens": {name: _tokens(written["params"][name], context) for name in names}}


def _tokens(size: int | float, context: int) -> int:
    if isinstance(size, int) or size == 0:
        return min(int(size), context)
    return min(context, max(1, int(size * context)))


def _figures(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What was measured of the configuration as found, before any rounding here; None = not known."""
    metrics = file.with_name("metrics.json")
    benchmarked = "masker_name" not in record and metrics.is_file()
    measured = read_json(metrics) if benchmarked else record
    names = ("error", "density", "kv_fraction", "score", "difference_to_dense", "budget")
    samples = measured.get("samples" if benchmarked else "confirmation") or {}
    return {
        "measured_by": "benchmark" if benchmarked else "search" if "masker_name" in record else None,
        **{name: measured.get(name) for name in names},
        "score_interval": measured.get("interval"),  # a search has none: its samples chose the configuration
        "samples": samples.get("ok" if benchmarked else "samples"),
    }


def _write_tables(config: ResearchAttentionConfig, model: str, text: Path, path: Path) -> dict[str, Any]:
    """Page tables of the text's last tokens on every layer that can be sparse, and figures of the rounded choice on them."""
    import torch

    from .attention import ResearchAttention, relative_error
    from .kernels import attend
    from .maskers.shared_states import SharedStates
    from .models import load_model
    from .models.trace import record_trace
    from .page_tables import page_tables, write_page_tables

    words = text.read_text(encoding="utf-8-sig")
    lm = load_model(model)
    try:
        attention = ResearchAttention(lm.complete(config))
    except ValueError as error:
        raise UserError(f"{model}: {error}") from None
    ids = lm.tokenizer.encode(words)
    if len(ids) < _LEAST_TOKENS:
        raise UserError(f"--text {text}: must have {_LEAST_TOKENS} tokens or more, got {len(ids)}")
    tables, densities, errors, differences = {}, [], [], []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        trace = record_trace(lm, ids[:-STEPS], ids[-STEPS:], 1, Path(folder) / "trace", observe=attention.observes)
        for layer_idx in trace.layers:
            stored = trace.layer(layer_idx)
            context = stored.keys[:, :, : trace.context_length]
            state = SharedStates().of(attention.maskers_of(layer_idx), trace.key, context, layer_idx, stored.summary)
            call = stored.queries, stored.keys, stored.values
            result = attention(*call, None, stored.scaling, layer_idx, state, softcap=stored.softcap, sinks=stored.sinks)
            last = config.masker_configs[-1]
            table = tables[layer_idx] = page_tables(result.mask, last.page_size)  # type: ignore[attr-defined]
            mask = table.mask(stored.queries.shape[1])
            through, _ = attend(*call, mask, stored.scaling, softcap=stored.softcap, sinks=stored.sinks)
            differences.append(float((through - result.unrounded).abs().max()))
            densities.append(result.density)
            errors.append(float(relative_error(result.unrounded, stored.dense).mean()))
    write_page_tables(path, tables)
    density, deviation = sum(densities) / len(densities), sum(errors) / len(errors)
    print(f"page tables: {path}, {len(tables)} layers, {STEPS} steps, density {density:.3f}, error {deviation:.3f}")
    return {
        "file": path.name,
        "model": model,
        "text": text.name,
        "keys": len(ids),
        "steps": STEPS,
        "density": density,
        "error": deviation,
        "largest_difference": max(differences),
    }


if __name__ == "__main__":
    sys.exit(main())
