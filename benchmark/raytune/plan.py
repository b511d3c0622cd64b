"""From command line to plan: typed settings, chosen configurations, leaf tasks; every check that needs no model."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from benchmark.settings import Settings, SparseConfig, as_sparse_configs
from benchmark.tasks import expand_task, get_task
from benchmark.tasks.base import ContextTooShortError, SampleRequest, build_prompt
from sparse_attention_hub.errors import UserError

#: Flags that must be above zero.
COUNTS = (
    "num_samples",
    "search_timeout",
    "search_max_new_tokens",
    "search_max_context_length",
    "search_max_requests",
    "trace_budget_gb",
    "max_concurrent_benchmarks",
    "benchmark_timeout",
    "max_new_tokens",
    "max_context_length",
    "max_requests",
)
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "attention_backend": ("auto", "reference", "gather", "triton"),
    "dense_backend": ("auto", "sdpa", "flash"),
}
OBJECTIVES = ("default", "sparsity_5", "sparsity_10", "sparsity_15", "sparsity_20", "sparsity_25", "sparsity_50")


def make_settings(options: argparse.Namespace, configuration: dict[str, Any]) -> Settings:
    """Flags given, then the run configuration, then the defaults of Settings. UserError names the flag at fault."""
    names = {field.name for field in fields(Settings)} - {"phases"}
    values: dict[str, Any] = {}
    for name in names:
        given = getattr(options, name, None)
        if given is None or (given is False and name in configuration):
            given = configuration.get(name)
        if given is not None:
            values[name] = tuple(given) if name in ("models", "tasks") else given
    values["phases"] = (options.phase,) if options.phase else (1, 2)
    settings = Settings(**values)
    for name in COUNTS:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be greater than 0, got {value:g}")
    for name, allowed in CHOICES.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise UserError(f"--{name.replace('_', '-')} must be one of {', '.join(allowed)}, got {value!r}")
    if settings.objective not in OBJECTIVES:
        raise UserError(f"--objective must be one of {', '.join(OBJECTIVES)}, got {settings.objective!r}")
    if settings.data_dir is not None and not settings.data_dir.is_dir():
        raise UserError(f"--data-dir {settings.data_dir}: no such folder")
    if settings.rescore and 1 in settings.phases:
        raise UserError("--rescore works on Phase 2 results: give --phase 2 with it")
    if settings.config_run is not None and 1 in settings.phases:
        raise UserError("--config-run chooses what Phase 2 runs: give --phase 2 with it")
    for name in ("optimal_configs_dir", "benchmark_results_dir", "ray_results_dir"):
        folder = getattr(settings, name)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--{name.replace('_', '-')} {folder}: is a file, not a folder")
    return settings


def choose_configs(entries: list[tuple[str, Any, Any]], wanted: list[str] | None) -> list[SparseConfig]:
    """The named configurations, in the list's order; names may be patterns. UserError for a name that matches none."""
    configs = as_sparse_configs(entries)
    if not wanted:
        return configs
    names = [config.name for config in configs]
    chosen: set[str] = set()
    for pattern in wanted:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            raise UserError(f"--configs: unknown configuration {pattern!r}; near: {', '.join(near) or ', '.join(names[:5])}")
        chosen.update(matches)
    return [config for config in configs if config.name in chosen]


def expand_tasks(settings: Settings) -> tuple[list[str], list[str]]:
    """(leaf tasks without repeats, notes on groups that are not whole)."""
    tasks: list[str] = []
    notes: list[str] = []
    for name in settings.tasks:
        selection = expand_task(name, settings.data_dir)
        tasks.extend(task for task in selection.names if task not in tasks)
        if selection.note:
            notes.append(f"{name}: {selection.note}")
    return tasks, notes


def check_models(settings: Settings) -> None:
    """Every model and the device can be had, before anything is written. UserError otherwise."""
    from sparse_attention_hub.models import check_place, load_tokenizer

    if not settings.ray_address:  # a cluster's machines have their own devices
        check_place(settings.device, settings.dtype, settings.dense_backend)
    for model in settings.models:
        load_tokenizer(model, trust_remote_code=settings.trust_remote_code)


def check_samples(settings: Settings, tasks: list[str]) -> tuple[list[str], dict[str, str]]:
    """(tasks whose samples can be made, why the others cannot), before anything is written.

    UserError if a context length holds no prompt of a task (the flag is at fault), or no task is left.
    """
    from sparse_attention_hub.models import load_tokenizer

    from .evaluation import tuning_samples

    usable: list[str] = []
    missing: dict[str, str] = {}
    tokenizers = [load_tokenizer(model, trust_remote_code=settings.trust_remote_code) for model in settings.models]
    for name in tasks:
        try:
            for tokenizer in tokenizers:
                if 2 in settings.phases:
                    with _named("--max-context-length", settings.max_context_length):
                        _check_one_prompt(name, tokenizer, settings)
                if 1 in settings.phases:
                    with _named("--search-max-context-length", settings.search_max_context_length):
                        tuning_samples(tokenizer, name, settings)
            usable.append(name)
        except ContextTooShortError:
            raise
        except UserError as error:
            missing[name] = str(error)
    if not usable:
        raise UserError("; ".join(dict.fromkeys(missing.values())))
    return usable, missing


@contextmanager
def _named(flag: str, value: int) -> Iterator[None]:
    """Tell which flag made a context too short."""
    try:
        yield
    except ContextTooShortError as error:
        raise ContextTooShortError(f"{flag} {value}: {error}") from None


def _check_one_prompt(name: str, tokenizer: Any, settings: Settings) -> None:
    """The first test sample's prompt can be built within --max-context-length."""
    task = get_task(name)
    request = SampleRequest(
        tokenizer=tokenizer,
        seed=settings.seed,
        max_samples=1,
        max_context_length=settings.max_context_length,
        data_dir=settings.data_dir,
        trust_remote_code=settings.trust_remote_code,
    )
    for sample in task.samples(request)[:1]:
        build_prompt(
            sample,
            tokenizer,
            max_context_length=settings.max_context_length,
            max_new_tokens=min(sample.max_new_tokens, settings.max_new_tokens),
            use_chat_template=task.use_chat_template,
        )


def describe(settings: Settings, configs: list[SparseConfig], tasks: list[str], notes: list[str]) -> str:
    """The plan of a run as text: combinations, samples, trials, memory, files."""
    from .study_spec import plan_studies

    lines = [f"models:   {', '.join(settings.models)}", f"tasks:    {', '.join(tasks)}"]
    lines += [f"note:     {note}" for note in notes]
    sparse = [config for config in configs if config.config is not None]
    lines.append(f"configurations: {len(sparse)} sparse" + (" and dense" if len(sparse) < len(configs) else ""))
    pairs = len(tasks) * len(settings.models)
    if 1 in settings.phases:
        studies, left_out = plan_studies(list(settings.models), tasks, configs)
        lines += [f"note:     {note}" for note in left_out]
        trials = sum(len(study.levels) * settings.num_samples if study.space().domains else 1 for study in studies)
        lines.append(
            f"Phase 1:  {len(studies)} studies, at most {trials} trials, {settings.search_max_requests} samples a task"
        )
        for study in studies[:12]:
            levels = ", ".join(f"{level.budget:.0%}" if level.budget else "no budget" for level in study.levels)
            parameters = len(study.space().domains)
            lines.append(f"  {study.model} | {study.task} | {study.name} ({levels}): {parameters} parameters")
        if len(studies) > 12:
            lines.append(f"  ... and {len(studies) - 12} more")
        lines += [f"  traces: {text}" for text in _trace_sizes(settings)]
        lines.append(
            f"  files: {settings.optimal_configs_dir}/run_<date>_<time>/, three for each of {len(sparse) * pairs} levels"
        )
        lines.append(f"  Ray's artefacts, journals and traces: {settings.ray_results_dir}/")
    if 2 in settings.phases:
        samples = "all" if settings.max_requests is None else str(settings.max_requests)
        results = settings.benchmark_results_dir
        lines.append(f"Phase 2:  {pairs} (model, task) pairs x {len(configs)} configurations, {samples} samples a task")
        lines.append(f"  at most {settings.max_new_tokens} new tokens, context at most {settings.max_context_length}")
        lines += [f"  KV cache: {text}" for text in _cache_sizes(settings)]
        lines.append(f"  files: {results}/<model>/<configuration>/<task>/, {results}/benchmark_summary.json")
    return "\n".join(lines)


def _trace_sizes(settings: Settings) -> list[str]:
    lines = []
    for model, (layers, token_bytes) in _shapes(settings).items():
        size = layers * token_bytes * settings.search_max_context_length * settings.search_max_requests
        bound = "" if settings.trace_budget_gb is None else f", thinned to {settings.trace_budget_gb:g} GB"
        lines.append(f"{model}: at most {size / 1e9:.2f} GB a task{bound}")
    return lines


def _cache_sizes(settings: Settings) -> list[str]:
    return [
        f"{model}: at most {layers * token_bytes * settings.max_context_length / 1e9:.2f} GB a worker"
        for model, (layers, token_bytes) in _shapes(settings).items()
    ]


def _shapes(settings: Settings) -> dict[str, tuple[int, int]]:
    """Layers and KV bytes a token and layer of each model whose configuration can be read."""
    from sparse_attention_hub.models import load_shape

    shapes = {}
    for model in settings.models:
        try:
            shapes[model] = load_shape(model, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
        except UserError:
            continue
    return shapes
