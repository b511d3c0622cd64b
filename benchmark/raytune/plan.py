"""From the command line to a plan: typed settings, chosen configurations, tasks; and all checks that need no model weights."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from benchmark.command_line import check_folder, flag_of
from benchmark.execution.prompts import sample_request
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.results import safe_name
from benchmark.tasks import expand_task, get_task
from benchmark.tasks.base import ContextTooShortError, build_prompt
from benchmark.tasks.limits import longest_prompt, naming
from benchmark.workers.pools import plan_slots, visible_gpus
from sparse_attention_hub.errors import UserError, quoted
from sparse_attention_hub.models.prompts import knows_thinking, set_thinking

if TYPE_CHECKING:
    from benchmark.search.config_search import SampleKeys
    from benchmark.search.samples import TuningSample
    from sparse_attention_hub.models.load import ModelShape

#: Flags that count something (tokens, seconds, ...): greater than 0 and at most MOST.
COUNTS = [f.name for f in fields(Settings) if str(f.type).removesuffix(" | None") in ("int", "float") and f.name != "seed"]
MOST = 10**9
#: Workers of a machine at most.
MOST_WORKERS = 1024
CHOICES = {
    "objective": ("default", *(f"sparsity_{percent}" for percent in (5, 10, 15, 20, 25, 50))),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "attention_backend": ("auto", "reference", "cpu", "torch", "triton"),
    "dense_backend": ("auto", "sdpa", "flash"),
    "thinking": ("auto", "off", "on"),
    "budget_on": ("density", "kv"),
    "head_budgets": ("off", "layer", "kv_head", "head"),
}
#: Folders that a run writes into: name -> phase.
FOLDERS = {"optimal_configs_dir": 1, "ray_results_dir": 1, "benchmark_results_dir": 2}


def make_settings(options: argparse.Namespace, configuration: dict[str, Any]) -> Settings:
    """Settings from flags, then the run configuration, then defaults. UserError names the flag at fault."""
    values: dict[str, Any] = {}
    for name in {field.name for field in fields(Settings)} - {"phases"}:
        given = getattr(options, name, None)
        if given is None or (given is False and name in configuration):
            given = configuration.get(name)
        if given is not None:
            values[name] = tuple(dict.fromkeys(given)) if isinstance(given, list) else given
    values["models"] = tuple(dict.fromkeys(map(_model_name, values["models"])))
    settings = Settings(**values, phases=(options.phase,) if options.phase else (1, 2))
    for name in COUNTS:
        value = getattr(settings, name)
        if value is not None and not 0 < value <= MOST:
            raise UserError(f"{flag_of(name)} must be a number greater than 0 and at most {MOST}, got {quoted(value)}")
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"--seed must be in 0 .. {2**32 - 1}, got {quoted(settings.seed)}")
    for name, allowed in CHOICES.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise UserError(f"{flag_of(name)} must be one of {', '.join(allowed)}, got {quoted(value)}")
    if (settings.max_concurrent_benchmarks or 1) > MOST_WORKERS:
        raise UserError(f"--max-concurrent-benchmarks is at most {MOST_WORKERS}, got {settings.max_concurrent_benchmarks}")
    if settings.device == "sharded" and 1 in settings.phases:
        raise UserError(
            "--device sharded is for Phase 2: a search needs the model on one GPU; search with --phase 1 where it fits, then "
            "give --phase 2 --device sharded"
        )
    if settings.sparse_from == "decode" and settings.search_max_new_tokens == 1 and 1 in settings.phases:
        raise UserError("--search-max-new-tokens 1 leaves no sparse row with --sparse-from decode: give at least 2")
    if settings.rescore and 1 in settings.phases:
        raise UserError("--rescore works on Phase 2 results: give --phase 2 with it")
    if settings.config_run is not None and 1 in settings.phases:
        raise UserError("--config-run chooses what Phase 2 runs: give --phase 2 with it")
    owners: dict[str, str] = {}
    for model in settings.models:
        if owners.setdefault(safe_name(model), model) != model:
            raise UserError(
                f"--models {owners[safe_name(model)]} and {model} would write into one folder, {safe_name(model)}: "
                "run them one at a time, each with folders of its own"
            )
    return settings


def _model_name(given: str) -> str:
    """A local folder without "./" in front: folders of results, which bear its name, would be hidden."""
    if not given.startswith("."):
        return given
    name = os.path.normpath(given)
    return os.path.abspath(name) if name.startswith(".") else name


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
    """UserError unless the folders exist or can be made, and those of the chosen phases can be written into."""
    for name, phase in FOLDERS.items():
        check_folder(flag_of(name), getattr(settings, name), write=phase in settings.phases)
    if settings.data_dir is not None:
        check_folder("--data-dir", settings.data_dir, write=False)
        if not settings.data_dir.is_dir():
            raise UserError(f"--data-dir {quoted(str(settings.data_dir))}: no such folder")


def check_models(settings: Settings) -> dict[str, Any]:
    """Check that every model, the device and its kernels are available, before anything is written. UserError otherwise.

    Returns the tokenizers by model.
    """
    from sparse_attention_hub.models import check_model, check_place, load_tokenizer

    if not re.fullmatch(r"auto|cpu|sharded|cuda(:\d+)?", settings.device):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or sharded, got {quoted(settings.device)}")
    # The machines of a cluster have their own devices, and --rescore needs none.
    if not settings.ray_address and not settings.rescore:
        check_place(settings.device, settings.dtype, settings.dense_backend)
        _check_kernels(settings)
    load = load_tokenizer if settings.rescore else check_model
    tokenizers = {model: load(model, trust_remote_code=settings.trust_remote_code) for model in settings.models}
    for tokenizer in tokenizers.values():
        set_thinking(tokenizer, settings.thinking)
    return tokenizers


def template_notes(settings: Settings, tasks: list[str], tokenizers: dict[str, Any]) -> list[str]:
    """One note for each model without a chat template, or whose template ignores --thinking."""
    notes = []
    if not any(get_task(task).use_chat_template for task in tasks):
        return []
    for model, tokenizer in tokenizers.items():
        if not tokenizer.chat_template:
            notes.append(f"{model} has no chat template: prompts are plain text")
        elif settings.thinking != "auto" and not knows_thinking(tokenizer):
            notes.append(
                f"the chat template of {model} has no switch for thinking: --thinking {settings.thinking} does nothing"
            )
    return notes


def length_notes(settings: Settings, tasks: list[str], tokenizers: dict[str, Any]) -> list[str]:
    """One note for each model and phase whose context length is more than the model takes. Tasks of a fixed length are refused
    there."""
    notes: list[str] = []
    if all(get_task(task).fixed_length for task in tasks):
        return notes
    asked = {
        1: ("--search-max-context-length", settings.search_max_context_length),
        2: ("--max-context-length", settings.max_context_length),
    }
    for model, tokenizer in tokenizers.items():
        for flag, length in (asked[phase] for phase in settings.phases):
            allowed = longest_prompt(tokenizer, length, settings.trust_remote_code)
            if allowed < length:
                notes.append(f"{model} takes {allowed} tokens: prompts are at most that long, not {flag} {length}")
    return notes


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
    """tasks: those whose samples can be made; missing: why the others cannot. For Phase 1, by (model, task): tuning_keys,
    `samples_key` of its tuning samples; tuning_tokens: how many tokens their traces have."""

    tasks: list[str]
    missing: dict[str, str]
    tuning_keys: SampleKeys
    tuning_tokens: dict[tuple[str, str], int]


def check_samples(settings: Settings, tasks: list[str], tokenizers: dict[str, Any]) -> SampleCheck:
    """Make the tuning samples of Phase 1 and a prompt of Phase 2, before anything is written.

    tokenizers: as check_models returns them. UserError if a context length is too short for a prompt of a task, if
    --trace-budget-gb is too small for a trace, or if no task is left.
    """
    from benchmark.search.samples import samples_key, tuning_samples

    usable: list[str] = []
    missing: dict[str, str] = {}
    tuned: dict[tuple[str, str], list[TuningSample]] = {}
    for name in tasks:
        try:
            for model, tokenizer in tokenizers.items():
                if 2 in settings.phases:
                    _check_one_prompt(name, model, tokenizer, settings)
                if 1 in settings.phases:
                    asked = settings.search_max_context_length
                    allowed = longest_prompt(tokenizer, asked, settings.trust_remote_code)
                    with naming("--search-max-context-length", asked, allowed):
                        tuned[model, name] = tuning_samples(tokenizer, name, settings)
            usable.append(name)
        except ContextTooShortError:
            raise
        except UserError as error:
            missing[name] = str(error)
    if not usable:
        raise UserError("; ".join(dict.fromkeys(missing.values())))
    keys = {pair: samples_key(samples, get_task(pair[1])) for pair, samples in tuned.items()}
    tokens = {
        pair: sum(len(s.prompt.context_ids) + len(s.prompt.question_ids) + s.max_new_tokens for s in samples)
        for pair, samples in tuned.items()
    }
    if settings.trace_budget_gb is not None:
        _check_trace_budget(settings.trace_budget_gb, tokens, settings)
    return SampleCheck(usable, missing, keys, tokens)


def _check_trace_budget(budget: float, tokens: dict[tuple[str, str], int], settings: Settings) -> None:
    """UserError if one layer of a (model, task)'s traces exceeds the budget."""
    shapes = _shapes(settings)
    for (model, task), count in tokens.items():
        layer = shapes[model].sparse_layer_bytes * count / 1e9
        if layer > budget:
            raise UserError(
                f"--trace-budget-gb {budget:g} is less than one layer of {task}'s traces on {model} ({layer:.2g} GB): raise it, "
                "or lower --search-max-requests or --search-max-context-length"
            )


def _check_one_prompt(name: str, model: str, tokenizer: Any, settings: Settings) -> None:
    """Check that the first test sample's prompt fits --max-context-length and the model's positions."""
    task = get_task(name)
    request = sample_request(tokenizer, task, model, replace(settings, max_requests=1))
    with naming("--max-context-length", settings.max_context_length, request.max_context_length):
        for sample in task.samples(request)[:1]:
            build_prompt(
                sample,
                tokenizer,
                max_context_length=request.max_context_length,
                max_new_tokens=min(sample.max_new_tokens, settings.max_new_tokens),
                use_chat_template=task.use_chat_template,
            )


def describe(settings: Settings, configs: list[SparseConfig], samples: SampleCheck, notes: list[str]) -> str:
    """The plan of a run as text: combinations, samples, trials, memory, files."""
    from benchmark.search.spec import plan_studies

    tasks, shapes = samples.tasks, _shapes(settings)
    lines = [f"models:   {', '.join(settings.models)}", f"tasks:    {', '.join(tasks)}"]
    lines += [f"note:     {note}" for note in notes]
    sparse = [config for config in configs if config.config is not None]
    lines.append(f"configurations: {len(sparse)} sparse" + (" and dense" if len(sparse) < len(configs) else ""))
    pairs = len(tasks) * len(settings.models)
    if 1 in settings.phases:
        studies, left_out = plan_studies(list(settings.models), tasks, configs)
        lines += [f"note:     {note}" for note in left_out]
        trials = sum(len(study.levels) * settings.num_samples if study.space().domains else 1 for study in studies)
        most = settings.search_max_requests
        lines.append(f"Phase 1:  {len(studies)} studies, at most {trials} trials, at most {most} samples per task")
        for study in studies[:12]:
            levels = ", ".join(f"{100 * level.budget:g}%" if level.budget else "no budget" for level in study.levels)
            parameters = len(study.space().domains)
            lines.append(f"  {study.model} | {study.task} | {study.name} ({levels}): {parameters} parameters")
        if len(studies) > 12:
            lines.append(f"  ... and {len(studies) - 12} more")
        for model, shape in shapes.items():
            recorded = sum(count for pair, count in samples.tuning_tokens.items() if pair[0] == model)
            size = shape.sparse_layers * shape.sparse_layer_bytes * recorded
            bound = "" if settings.trace_budget_gb is None else f", thinned to {settings.trace_budget_gb:g} GB per task"
            lines.append(f"  traces: {model}: about {size / 1e9:.2f} GB of keys and values{bound}")
        lines.append(
            f"  files: {settings.optimal_configs_dir}/run_<date>_<time>/, three for each of {len(sparse) * pairs} levels"
        )
        lines.append(f"  Ray's artefacts, journals and traces: {settings.ray_results_dir}/")
    if 2 in settings.phases:
        requests = "all" if settings.max_requests is None else f"at most {settings.max_requests}"
        results = settings.benchmark_results_dir
        lines.append(f"Phase 2:  {pairs} (model, task) pairs x {len(configs)} configurations, {requests} samples per task")
        lines.append(f"  at most {settings.max_new_tokens} new tokens, context at most {settings.max_context_length}")
        lines.append(f"  workers: {_workers(settings)}")
        for model, shape in shapes.items():
            size = shape.kv_bytes * settings.max_context_length
            lines.append(f"  KV cache: {model}: at most {size / 1e9:.2f} GB per worker")
        lines.append(f"  files: {results}/<model>/<configuration>/<task>/, {results}/benchmark_summary.json")
    return "\n".join(lines)


def _workers(settings: Settings) -> str:
    """How many workers Phase 2 starts, and where."""
    most = settings.max_concurrent_benchmarks
    if settings.ray_address:
        return "one per GPU of the Ray cluster, or per two CPUs" + (f", at most {most}" if most else "")
    slots = plan_slots(settings.device, most)
    if slots[0].env:
        return f"{len(slots)}, one per GPU (of {len(visible_gpus())})"
    return f"{len(slots)} on {slots[0].device}, {slots[0].threads} CPU threads each"


def _shapes(settings: Settings) -> dict[str, ModelShape]:
    """Model -> what it keeps of a token."""
    from sparse_attention_hub.models import load_shape

    remote = settings.trust_remote_code
    return {model: load_shape(model, dtype=settings.dtype, trust_remote_code=remote) for model in settings.models}
