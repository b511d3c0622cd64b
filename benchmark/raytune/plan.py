"""From the command line to a plan: typed settings, chosen configurations, tasks; and all checks that need no model weights."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.settings import Settings, SparseConfig, as_sparse_configs
from benchmark.storage.results import safe_name
from benchmark.tasks import expand_task, get_task
from benchmark.tasks.base import ContextTooShortError, SampleRequest, build_prompt
from benchmark.tasks.limits import fitted
from sparse_attention_hub.errors import UserError

if TYPE_CHECKING:
    from benchmark.search.config_search import SampleKeys
    from benchmark.search.evaluator import TuningSample

#: Flags whose value must be greater than 0 and finite.
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
    "attention_backend": ("auto", "reference", "cpu", "torch", "triton"),
    "dense_backend": ("auto", "sdpa", "flash"),
}
#: Folders that a run writes into: name -> phase.
FOLDERS = {"optimal_configs_dir": 1, "ray_results_dir": 1, "benchmark_results_dir": 2}
OBJECTIVES = ("default", "sparsity_5", "sparsity_10", "sparsity_15", "sparsity_20", "sparsity_25", "sparsity_50")


def make_settings(options: argparse.Namespace, configuration: dict[str, Any]) -> Settings:
    """Settings from flags, then the run configuration, then defaults. UserError names the flag at fault."""
    names = {field.name for field in fields(Settings)} - {"phases"}
    values: dict[str, Any] = {}
    for name in names:
        given = getattr(options, name, None)
        if given is None or (given is False and name in configuration):
            given = configuration.get(name)
        if given is not None:
            values[name] = tuple(dict.fromkeys(given)) if name in ("models", "tasks") else given
    values["phases"] = (options.phase,) if options.phase else (1, 2)
    settings = Settings(**values)
    for name in COUNTS:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be a number greater than 0, got {value:g}")
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"--seed must be in 0 .. {2**32 - 1}, got {settings.seed}")
    for name, allowed in CHOICES.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise UserError(f"--{name.replace('_', '-')} must be one of {', '.join(allowed)}, got {value!r}")
    if settings.objective not in OBJECTIVES:
        raise UserError(f"--objective must be one of {', '.join(OBJECTIVES)}, got {settings.objective!r}")
    if settings.device == "sharded" and 1 in settings.phases:
        raise UserError(
            "--device sharded is for Phase 2: a search needs the model on one GPU; search with --phase 1 where it fits, then "
            "give --phase 2 --device sharded"
        )
    if settings.sparse_from == "decode" and settings.search_max_new_tokens == 1 and 1 in settings.phases:
        raise UserError("--search-max-new-tokens 1 leaves no sparse row with --sparse-from decode: give at least 2")
    if settings.data_dir is not None and not settings.data_dir.is_dir():
        raise UserError(f"--data-dir {settings.data_dir}: no such folder")
    if settings.rescore and 1 in settings.phases:
        raise UserError("--rescore works on Phase 2 results: give --phase 2 with it")
    if settings.config_run is not None and 1 in settings.phases:
        raise UserError("--config-run chooses what Phase 2 runs: give --phase 2 with it")
    for name in FOLDERS:
        folder = getattr(settings, name)
        if os.path.exists(folder) and not folder.is_dir():
            raise UserError(f"--{name.replace('_', '-')} {folder}: is a file, not a folder")
    owners: dict[str, str] = {}
    for model in settings.models:
        if owners.setdefault(safe_name(model), model) != model:
            raise UserError(
                f"--models {owners[safe_name(model)]} and {model} would write into one folder, {safe_name(model)}: "
                "run them one at a time, each with folders of its own"
            )
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
    """(tasks without repeats, groups replaced by their members; notes on groups that are incomplete)."""
    tasks: list[str] = []
    notes: list[str] = []
    for name in settings.tasks:
        selection = expand_task(name, settings.data_dir)
        tasks.extend(task for task in selection.names if task not in tasks)
        if selection.note:
            notes.append(f"{name}: {selection.note}")
    return tasks, notes


def check_folders(settings: Settings) -> None:
    """Check that the folders of the chosen phases can be written into. UserError otherwise.

    Writes a file to find out: permission bits do not tell for root, or on a read-only disk.
    """
    for name, phase in FOLDERS.items():
        folder: Path = getattr(settings, name)
        if phase in settings.phases:
            there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
            try:
                with tempfile.TemporaryDirectory(dir=there, prefix=".probe_"):
                    pass
            except OSError as error:
                raise UserError(
                    f"--{name.replace('_', '-')} {folder}: cannot be written ({error.strerror}); choose another folder"
                ) from None


def check_models(settings: Settings) -> dict[str, Any]:
    """Check that every model, the device and its kernels are available, before anything is written. UserError otherwise.

    Returns the tokenizers by model.
    """
    from sparse_attention_hub.models import check_place, load_tokenizer

    # The machines of a cluster have their own devices, and --rescore needs none.
    if not settings.ray_address and not settings.rescore:
        check_place(settings.device, settings.dtype, settings.dense_backend)
        _check_kernels(settings)
    return {model: load_tokenizer(model, trust_remote_code=settings.trust_remote_code) for model in settings.models}


def _check_kernels(settings: Settings) -> None:
    """Check that the sparse kernels run on the CPU. On a GPU the check would start CUDA, which only workers may."""
    import torch

    from sparse_attention_hub.kernels import choose_backend

    wanted, device = settings.attention_backend, settings.device
    if device.startswith(("cuda", "sharded")) or (device == "auto" and torch.cuda.is_available()):
        return
    try:
        choose_backend(wanted, torch.empty(0))
    except ValueError as error:
        raise UserError(f"--attention-backend {wanted}: {error}; use auto, or a --device that has it") from None


@dataclass(frozen=True)
class SampleCheck:
    """tasks: those whose samples can be made; missing: why the others cannot. tuning_keys: (model, task) -> `samples_key` of
    its tuning samples, for Phase 1."""

    tasks: list[str]
    missing: dict[str, str]
    tuning_keys: SampleKeys


def check_samples(settings: Settings, tasks: list[str], tokenizers: dict[str, Any]) -> SampleCheck:
    """Make the tuning samples of Phase 1 and a prompt of Phase 2, before anything is written.

    tokenizers: as check_models returns them. UserError if a context length is too short for a prompt of a task, if
    --trace-budget-gb is too small for a trace, or if no task is left.
    """
    from benchmark.search.evaluator import samples_key, tuning_samples

    usable: list[str] = []
    missing: dict[str, str] = {}
    tuned: dict[tuple[str, str], list[TuningSample]] = {}
    for name in tasks:
        try:
            for model, tokenizer in tokenizers.items():
                if 2 in settings.phases:
                    _check_one_prompt(name, model, tokenizer, settings)
                if 1 in settings.phases:
                    with _named("--search-max-context-length", settings.search_max_context_length):
                        tuned[model, name] = tuning_samples(tokenizer, name, settings)
            usable.append(name)
        except ContextTooShortError:
            raise
        except UserError as error:
            missing[name] = str(error)
    if not usable:
        raise UserError("; ".join(dict.fromkeys(missing.values())))
    if settings.trace_budget_gb is not None:
        _check_trace_budget(settings.trace_budget_gb, tuned, settings)
    return SampleCheck(usable, missing, {pair: samples_key(samples) for pair, samples in tuned.items()})


def _check_trace_budget(budget: float, tuned: dict[tuple[str, str], list[TuningSample]], settings: Settings) -> None:
    """UserError if one layer of a (model, task)'s traces exceeds the budget. A model of unknown shape is not checked."""
    shapes = _shapes(settings)
    for (model, task), samples in tuned.items():
        tokens = max(len(s.prompt.context_ids) + len(s.prompt.question_ids) + s.max_new_tokens for s in samples)
        layer = shapes[model][1] * tokens * len(samples) / 1e9 if model in shapes else 0.0
        if layer > budget:
            raise UserError(
                f"--trace-budget-gb {budget:g} is less than one layer of {task}'s {len(samples)} traces on {model} "
                f"({layer:.2g} GB): raise it, or lower --search-max-requests or --search-max-context-length"
            )


@contextmanager
def _named(flag: str, value: int) -> Iterator[None]:
    """Name the flag that made a context too short."""
    try:
        yield
    except ContextTooShortError as error:
        raise ContextTooShortError(f"{flag} {value}: {error}") from None


def _check_one_prompt(name: str, model: str, tokenizer: Any, settings: Settings) -> None:
    """Check that the first test sample's prompt fits --max-context-length and the model's positions."""
    task = get_task(name)
    request = SampleRequest(
        tokenizer=tokenizer,
        seed=settings.seed,
        max_samples=1,
        max_context_length=settings.max_context_length,
        data_dir=settings.data_dir,
        trust_remote_code=settings.trust_remote_code,
    )
    request = fitted(request, task, model)
    with _named("--max-context-length", settings.max_context_length):
        for sample in task.samples(request)[:1]:
            build_prompt(
                sample,
                tokenizer,
                max_context_length=request.max_context_length,
                max_new_tokens=min(sample.max_new_tokens, settings.max_new_tokens),
                use_chat_template=task.use_chat_template,
            )


def describe(settings: Settings, configs: list[SparseConfig], tasks: list[str], notes: list[str]) -> str:
    """The plan of a run as text: combinations, samples, trials, memory, files."""
    from benchmark.search.spec import plan_studies

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
        lines.append(f"{model}: about {size / 1e9:.2f} GB of keys and values a task{bound}")
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
