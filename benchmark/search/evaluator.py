"""Evaluates configurations on the tuning samples of a (model, task): replay of traces, then confirmation by the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from benchmark.search.trial import with_deadline
from benchmark.settings import Settings
from benchmark.storage.records import Evaluation
from benchmark.storage.results import fingerprint
from benchmark.tasks import get_task
from benchmark.tasks.base import Prompt, Sample, SampleRequest, answer_seed, build_prompt
from benchmark.tasks.limits import within_model
from benchmark.workers.memory import trim_heap
from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.errors import UserError

if TYPE_CHECKING:
    from sparse_attention_hub.models import Forced, LanguageModel, Prefilled
    from sparse_attention_hub.models.trace import Trace

RUNG0_ROWS = 6
RUNG0_LAYER_STEP = 4


@dataclass(frozen=True)
class TuningSample:
    """A sample and its prompt. seed: of its sampling maskers, the same for every configuration."""

    sample: Sample
    prompt: Prompt
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class _Measured:
    """Figures of one configuration on one sample; None = not measured."""

    error: float | None = None
    density: float | None = None
    kv_fraction: float | None = None
    score: float | None = None
    reference_nll: float | None = None
    reproduced: float | None = None
    layer_errors: list[float] | None = None
    layer_densities: list[float] | None = None


def tuning_samples(tokenizer: Any, task_name: str, settings: Settings) -> list[TuningSample]:
    """The tuning samples of a task: a split that Phase 2 never scores, at the search's context length or the model's.

    UserError if the task has none, or a question does not fit.
    """
    task = get_task(task_name)
    request = within_model(
        SampleRequest(
            tokenizer=tokenizer,
            split="tuning",
            seed=settings.seed,
            max_samples=settings.search_max_requests,
            max_context_length=settings.search_max_context_length,
            data_dir=settings.data_dir,
            trust_remote_code=settings.trust_remote_code,
        )
    )
    longest = request.max_context_length
    if task.fixed_length is not None:
        request = replace(request, length=min(task.fixed_length, longest))
    prepared = []
    for sample in task.samples(request):
        new_tokens = min(sample.max_new_tokens, settings.search_max_new_tokens)
        prompt = build_prompt(
            sample,
            tokenizer,
            max_context_length=longest,
            max_new_tokens=new_tokens,
            use_chat_template=task.use_chat_template,
        )
        prepared.append(TuningSample(sample, prompt, new_tokens, answer_seed(settings.seed, sample.sample_id)))
    if not prepared:
        raise UserError(
            f"task {task_name!r} has no tuning samples: its data have too few rows; add some or choose another task"
        )
    return prepared


def samples_key(samples: list[TuningSample]) -> str:
    """A hash of the samples: prompts, references and all else that scoring uses, seeds."""
    return fingerprint([repr(sample) for sample in samples])


class TraceEvaluator:
    """Evaluates configurations of one (model, task) on traces. Rungs 2 and 3 run the model on the traces' KV caches, or prefill
    the samples again where the traces do not contain all layers.

    samples: the tuning samples. traces: empty until `record()` has finished. layers: those that traces contain. key: a hash of
    everything that determines the figures of a configuration.
    """

    def __init__(self, lm: LanguageModel, task_name: str, settings: Settings, traces_dir: Path) -> None:
        """Records nothing yet.

        UserError as `tuning_samples`, for a model without a layer that can be sparse, for a --trace-budget-gb below one layer,
        and for an attention backend that cannot run on the model's device.
        """
        from sparse_attention_hub.maskers.shared_states import SharedStates
        from sparse_attention_hub.models.session import sparse_layers
        from sparse_attention_hub.models.trace import layer_bytes, trace_key
        from sparse_attention_hub.replay import spread

        _check_backend(settings.attention_backend, lm)
        self.lm, self.task, self.settings = lm, get_task(task_name), settings
        self.samples = tuning_samples(lm.tokenizer, task_name, settings)
        self.traces: list[Trace] = []
        self._states = SharedStates()
        # (configuration, sample number) -> its forced forward, where that reproduced the dense answer.
        self._reproduced: dict[tuple[str, int], Forced] = {}
        self.bytes_per_layer = 0
        for entry in self.samples:
            rows = entry.max_new_tokens + (len(entry.prompt.question_ids) if settings.sparse_from == "question" else 0)
            tokens = len(entry.prompt.context_ids) + len(entry.prompt.question_ids) + entry.max_new_tokens
            self.bytes_per_layer += layer_bytes(lm, tokens, rows)
        usable = sparse_layers(lm)
        self.layers = usable
        if settings.trace_budget_gb is not None:
            fit = int(settings.trace_budget_gb * 1e9 / self.bytes_per_layer)
            if fit < 1:
                raise UserError(
                    f"--trace-budget-gb {settings.trace_budget_gb:g} is less than one layer of {len(self.samples)} traces "
                    f"({self.bytes_per_layer / 1e9:.2f} GB): raise it, or lower --search-max-requests"
                )
            self.layers = [usable[index] for index in spread(len(usable), fit)]
        thinned = [] if self.layers == usable else self.layers
        self._folders = []
        for entry in self.samples:
            key = trace_key(lm, entry.prompt.context_ids, entry.prompt.question_ids, entry.max_new_tokens, settings.sparse_from)
            self._folders.append(traces_dir / (f"{key}-{fingerprint(thinned)[:8]}" if thinned else key))
        self.key = fingerprint(
            [[folder.name for folder in self._folders], samples_key(self.samples), settings.attention_backend]
        )

    @property
    def trace_bytes(self) -> int:
        """Upper bound of the traces' size on disk."""
        return self.bytes_per_layer * len(self.layers)

    def record(self) -> Iterator[str]:
        """Open or record the traces, one per step; yields a line for each. UserError if no answer has a sparse row.

        Studies of one task run in several processes: a trace that another process is recording is skipped and opened at the
        end.
        """
        found: dict[int, Trace] = {}
        for wait in (False, True):
            for number, folder in enumerate(self._folders):
                if number in found:
                    continue
                with _locked(folder, wait) as held:
                    if not held:
                        continue
                    trace, done = self._open_or_record(number, folder)
                    found[number] = trace
                yield f"trace {len(found)}/{len(self.samples)} {done} ({trace.nbytes / 1e6:.0f} MB)"
        if not any(trace.rows for trace in found.values()):
            raise UserError(
                f"no tuning sample of {self.task.name} has a sparse row, since every answer is one token long: "
                "use --sparse-from question or raise --search-max-new-tokens"
            )
        self.traces = [found[number] for number in range(len(self.samples))]

    def _open_or_record(self, number: int, folder: Path) -> tuple[Trace, str]:
        from sparse_attention_hub.models.trace import Trace, record_trace

        trace = Trace.open(folder)
        if trace is not None:
            return trace, "reused"
        entry = self.samples[number]
        trace = record_trace(
            self.lm,
            entry.prompt.context_ids,
            entry.prompt.question_ids,
            entry.max_new_tokens,
            folder,
            sparse_from=self.settings.sparse_from,
            layers=self.layers,
        )
        trim_heap()
        return trace, "recorded"

    def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
        """See `trial.Evaluator`."""
        if len(self.traces) < len(self.samples):
            for _ in self.record():
                pass
        attentions = [self._attention(config) for config in configs]
        check = with_deadline(timeout * len(configs))
        started = time.perf_counter()
        measure = (self._replay_some, self._replay_all, self._force, self._generate)[rung]
        by_sample = measure(attentions, check)
        trim_heap()
        seconds = (time.perf_counter() - started) / len(configs)
        return [_over_samples(column, seconds) for column in zip(*by_sample, strict=True)]

    def _attention(self, config: ResearchAttentionConfig) -> ResearchAttention:
        from sparse_attention_hub.models.model_files import complete

        return ResearchAttention(replace(complete(config, self.lm), backend=self.settings.attention_backend))

    # -- rungs 0 and 1 -----------------------------------------------------------------------------------------------

    def _replay_some(self, attentions: list[ResearchAttention], check: Callable[[], None]) -> list[list[_Measured]]:
        return self._replay(attentions, check, RUNG0_ROWS, self.layers[::RUNG0_LAYER_STEP])

    def _replay_all(self, attentions: list[ResearchAttention], check: Callable[[], None]) -> list[list[_Measured]]:
        return self._replay(attentions, check, None, None)

    def _replay(
        self, attentions: list[ResearchAttention], check: Callable[[], None], rows: int | None, layers: list[int] | None
    ) -> list[list[_Measured]]:
        """Figures of every sample with sparse rows, in the order of `attentions`; so are those of the other rungs."""
        from sparse_attention_hub.replay import replay, spread

        by_sample = []
        for entry, trace in zip(self.samples, self.traces, strict=True):
            if not trace.rows:
                continue
            kept = None if rows is None else spread(trace.rows, rows)
            results = replay(
                trace, attentions, rows=kept, layers=layers, seed=entry.seed, device=self.lm.device, states=self._states
            )
            by_sample.append(
                [
                    _Measured(
                        error=result.error,
                        density=result.density,
                        layer_errors=result.errors.mean(-1).tolist() if layers is None else None,
                        layer_densities=result.densities.mean(-1).tolist() if layers is None else None,
                    )
                    for result in results
                ]
            )
            check()
        return by_sample

    # -- rungs 2 and 3 -----------------------------------------------------------------------------------------------

    def _prefilled(self, entry: TuningSample, trace: Trace, room: int) -> Prefilled:
        from sparse_attention_hub.models import prefill

        return trace.prefilled(self.lm, room, self._states) or prefill(self.lm, entry.prompt.context_ids, room)

    def _force(self, attentions: list[ResearchAttention], check: Callable[[], None]) -> list[list[_Measured]]:
        """Question and dense answer through the model, token by token: errors compound through the layers as in generation. A
        configuration that reproduces the dense answer here would generate it too, so rung 3 reuses it."""
        from sparse_attention_hub.models import forced_many

        by_sample: list[list[_Measured]] = []
        for number, (entry, trace) in enumerate(zip(self.samples, self.traces, strict=True)):
            room = len(entry.prompt.question_ids) + len(trace.answer_ids)
            meters = [ErrorMeter() for _ in attentions]
            results = forced_many(
                self.lm,
                self._prefilled(entry, trace, room),
                entry.prompt.question_ids,
                trace.answer_ids,
                attentions,
                sparse_from=self.settings.sparse_from,
                seed=entry.seed,
                recorders=meters,
                stepwise=True,
            )
            for attention, result in zip(attentions, results, strict=True):
                if result.reproduced:
                    self._reproduced[repr(attention.config), number] = result
            by_sample.append(
                [
                    _Measured(
                        meter.error,
                        meter.density,
                        meter.kv_fraction,
                        reference_nll=result.nll,
                        reproduced=float(result.reproduced),
                    )
                    for meter, result in zip(meters, results, strict=True)
                ]
            )
            trim_heap()
            check()
        return by_sample

    def _generate(self, attentions: list[ResearchAttention], check: Callable[[], None]) -> list[list[_Measured]]:
        """Real sparse generation, scored by the task. The error is not measured: the generated tokens diverge from the dense
        answer, so it would add little to that of rung 2."""
        from sparse_attention_hub.models import Forced, answer_many

        by_sample: list[list[_Measured]] = []
        for number, (entry, trace) in enumerate(zip(self.samples, self.traces, strict=True)):
            room = len(entry.prompt.question_ids) + entry.max_new_tokens
            known = [self._reproduced.get((repr(attention.config), number)) for attention in attentions]
            unknown = [attention for attention, forced in zip(attentions, known, strict=True) if forced is None]
            generated = iter(
                answer_many(
                    self.lm,
                    self._prefilled(entry, trace, room),
                    entry.prompt.question_ids,
                    unknown,
                    entry.max_new_tokens,
                    sparse_from=self.settings.sparse_from,
                    seed=entry.seed,
                )
                if unknown
                else ()
            )
            column = []
            for forced in known:
                answer = next(generated) if forced is None else forced
                text = trace.meta["answer"] if isinstance(answer, Forced) else answer.text
                score = self.task.score(text, entry.sample).get(self.task.metric)
                column.append(_Measured(density=answer.density, kv_fraction=answer.kv_fraction, score=score))
            by_sample.append(column)
            trim_heap()
            check()
        return by_sample


class ErrorMeter:
    """A recorder of means, over rows, heads and layers, of error, density and fraction of KV bytes read. None before the first
    row."""

    def __init__(self) -> None:
        self._rows = 0
        self._error = self._density = self._kv = 0.0

    def __call__(self, *, result: Any, queries: Any, **_: Any) -> None:
        if result is None:
            return
        rows = queries.shape[2]
        self._rows += rows
        self._error += float(result.error_rows().mean()) * rows
        self._density += result.density * rows
        self._kv += result.kv_fraction * rows

    @property
    def error(self) -> float | None:
        return self._error / self._rows if self._rows else None

    @property
    def density(self) -> float | None:
        return self._density / self._rows if self._rows else None

    @property
    def kv_fraction(self) -> float | None:
        return self._kv / self._rows if self._rows else None


def _over_samples(column: Sequence[_Measured], seconds: float) -> Evaluation | None:
    """The means of one configuration over samples, which have equal weight however many rows they have. None if a figure is not
    finite, or no sample has a density. A sample without a sparse row (its answer ended at once, with --sparse-from decode) has
    none. The score is None unless every sample has one."""
    scores = [sample.score for sample in column if sample.score is not None]
    scored = bool(scores) and len(scores) == len(column)
    sparse = [sample for sample in column if sample.density is not None]
    error, density = _mean(sample.error for sample in sparse), _mean(sample.density for sample in sparse)
    kv_fraction, score = _mean(sample.kv_fraction for sample in sparse), _mean(scores) if scored else None
    nll, reproduced = _mean(sample.reference_nll for sample in column), _mean(sample.reproduced for sample in column)
    layer_errors = _layer_means(sample.layer_errors for sample in column)
    layer_densities = _layer_means(sample.layer_densities for sample in column)
    numbers = [error, density, kv_fraction, score, nll, reproduced, *(layer_errors or ()), *(layer_densities or ())]
    if density is None or not all(math.isfinite(number) for number in numbers if number is not None):
        return None
    return Evaluation(
        error=error,
        density=density,
        seconds=seconds,
        kv_fraction=kv_fraction,
        score=score,
        sample_scores=scores if scored else None,
        reference_nll=nll,
        reproduced=reproduced,
        layer_errors=layer_errors,
        layer_densities=layer_densities,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that were measured."""
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def _layer_means(values: Iterable[list[float] | None]) -> list[float] | None:
    measured = [value for value in values if value is not None]
    return [sum(layer) / len(layer) for layer in zip(*measured, strict=True)] if measured else None


def _check_backend(backend: str, lm: LanguageModel) -> None:
    """UserError if the sparse backend cannot run on the model's device: otherwise every confirmation would fail alike."""
    import torch

    from sparse_attention_hub.kernels import choose_backend

    try:
        choose_backend(backend, torch.empty(0, dtype=lm.dtype, device=lm.device))
    except ValueError as error:
        raise UserError(f"--attention-backend {backend}: {error}; use auto") from None


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Holds the lock of a trace: True; or False, if another process holds it and `wait` is false."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
