"""What Phase 1 measures: tuning samples of a (model, task), recorded as traces, replayed and confirmed."""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.search.trial import Evaluation, with_deadline
from benchmark.settings import Settings
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
    """A sample and its prompt; `seed` is what its sampling maskers draw from, in every configuration."""

    sample: Sample
    prompt: Prompt
    max_new_tokens: int
    seed: int


def tuning_samples(tokenizer: Any, task_name: str, settings: Settings) -> list[TuningSample]:
    """The samples Phase 1 tunes on: a split that Phase 2 never scores, at the search's context length or the model's.

    UserError if the task has none, or its question does not fit.
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
        raise UserError(f"task {task_name!r} has no tuning samples: its data hold too few rows, add some or take another task")
    return prepared


def samples_key(samples: list[TuningSample]) -> str:
    """A hash of the samples' whole content, whatever file it came from: what is asked, how it is scored, the seeds."""
    return fingerprint([repr(sample) for sample in samples])


class TraceEvaluator:
    """Evaluates configurations of one (model, task) on traces; rung 2 and 3 run the model on the traces' KV caches, or on the
    samples prefilled again where the traces do not hold all layers."""

    def __init__(self, lm: LanguageModel, task_name: str, settings: Settings, traces_dir: Path) -> None:
        """Nothing is recorded yet: iterate `record()` first. UserError as `tuning_samples`, for a model without a layer that
        can be sparse, or a backend that cannot run here."""
        from sparse_attention_hub.maskers.shared_states import SharedStates
        from sparse_attention_hub.models.session import sparse_layers
        from sparse_attention_hub.models.trace import layer_bytes, trace_key
        from sparse_attention_hub.replay import spread

        _check_backend(settings.attention_backend, lm)
        self.lm, self.task, self.settings = lm, get_task(task_name), settings
        self.samples = tuning_samples(lm.tokenizer, task_name, settings)
        self.traces: list[Trace] = []
        self._states = SharedStates()
        self._reproduced: dict[tuple[str, int], Forced] = {}  # by configuration and sample, what rung 2 saw of dense answers
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
            self.layers = [usable[place] for place in spread(len(usable), fit)]
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
        """What all traces of this (model, task) take on disk at most."""
        return self.bytes_per_layer * len(self.layers)

    def record(self) -> Iterator[str]:
        """Record what is not there yet, one sample a step; yields what was done. Studies of one task run side by side: what
        another process is recording is left to it and read at the end."""
        found: dict[int, Trace] = {}
        for patient in (False, True):
            for number, folder in enumerate(self._folders):
                if number in found:
                    continue
                with _locked(folder, patient) as mine:
                    if not mine:
                        continue
                    trace, done = self._open_or_record(number, folder)
                    found[number] = trace
                yield f"trace {len(found)}/{len(self.samples)} {done} ({trace.nbytes / 1e6:.0f} MB)"
        if not any(trace.rows for trace in found.values()):
            raise UserError(
                f"no answer to a tuning sample of {self.task.name} has a sparse row, all are of one token: "
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

    def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation]:
        """See study.Evaluator."""
        if len(self.traces) < len(self.samples):
            for _ in self.record():
                pass
        attentions = [self._attention(config) for config in configs]
        check = with_deadline(timeout * len(configs))
        started = time.perf_counter()
        measure = (self._replay_some, self._replay_all, self._force, self._generate)[rung]
        evaluations = measure(attentions, check)
        trim_heap()
        seconds = (time.perf_counter() - started) / len(configs)
        for evaluation in evaluations:
            evaluation.seconds = seconds
        return evaluations

    def _attention(self, config: ResearchAttentionConfig) -> ResearchAttention:
        from sparse_attention_hub.models.model_files import complete

        return ResearchAttention(replace(complete(config, self.lm), backend=self.settings.attention_backend))

    # -- rungs 0 and 1 -----------------------------------------------------------------------------------------------

    def _replay_some(self, attentions: list[ResearchAttention], check: Any) -> list[Evaluation]:
        return self._replay(attentions, check, RUNG0_ROWS, self.layers[::RUNG0_LAYER_STEP])

    def _replay_all(self, attentions: list[ResearchAttention], check: Any) -> list[Evaluation]:
        return self._replay(attentions, check, None, None)

    def _replay(
        self, attentions: list[ResearchAttention], check: Any, rows: int | None, layers: list[int] | None
    ) -> list[Evaluation]:
        from sparse_attention_hub.replay import replay, spread

        per_sample = []
        for entry, trace in zip(self.samples, self.traces, strict=True):
            if not trace.rows:
                continue
            kept = None if rows is None else spread(trace.rows, rows)
            results = replay(
                trace, attentions, rows=kept, layers=layers, seed=entry.seed, device=self.lm.device, states=self._states
            )
            per_sample.append(
                [
                    Evaluation(
                        error=result.error,
                        density=result.density,
                        seconds=0.0,
                        layer_errors=result.errors.mean(-1).tolist() if layers is None else None,
                        layer_densities=result.densities.mean(-1).tolist() if layers is None else None,
                    )
                    for result in results
                ]
            )
            check()
        return [_over_samples(column) for column in zip(*per_sample, strict=True)]

    # -- rungs 2 and 3 -----------------------------------------------------------------------------------------------

    def _prefilled(self, entry: TuningSample, trace: Trace, room: int) -> Prefilled:
        from sparse_attention_hub.models import prefill

        return trace.prefilled(self.lm, room, self._states) or prefill(self.lm, entry.prompt.context_ids, room)

    def _force(self, attentions: list[ResearchAttention], check: Any) -> list[Evaluation]:
        """Question and dense answer through the model, token by token: errors compound through the layers as in a real run,
        and a configuration that would reproduce an answer does so when it generates, which need not be done again."""
        from sparse_attention_hub.models import forced_many

        per_sample: list[list[Evaluation]] = []
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
            per_sample.append(
                [
                    meter.evaluation(reference_nll=result.nll, reproduced=float(result.reproduced))
                    for meter, result in zip(meters, results, strict=True)
                ]
            )
            trim_heap()
            check()
        return [_over_samples(column) for column in zip(*per_sample, strict=True)]

    def _generate(self, attentions: list[ResearchAttention], check: Any) -> list[Evaluation]:
        """Real sparse generation, scored as the task scores. Its inputs differ from dense attention's more with every token, so
        its error says little that rung 2 does not, and is not measured."""
        from sparse_attention_hub.models import Forced, answer_many

        per_sample: list[list[Evaluation]] = []
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
                column.append(
                    Evaluation(
                        error=None,
                        density=float("nan") if answer.density is None else answer.density,
                        seconds=0.0,
                        kv_fraction=answer.kv_fraction,
                        score=self.task.score(text, entry.sample).get(self.task.metric),
                    )
                )
            per_sample.append(column)
            trim_heap()
            check()
        return [_over_samples(column) for column in zip(*per_sample, strict=True)]


class ErrorMeter:
    """A recorder that keeps running means over rows, heads and layers of error, density and KV bytes read."""

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
    def error(self) -> float:
        return self._error / self._rows if self._rows else float("nan")

    @property
    def density(self) -> float:
        return self._density / self._rows if self._rows else float("nan")

    @property
    def kv_fraction(self) -> float:
        return self._kv / self._rows if self._rows else float("nan")

    def evaluation(self, **more: float | None) -> Evaluation:
        return Evaluation(self.error, self.density, 0.0, self.kv_fraction, **more)  # type: ignore[arg-type]


def _over_samples(column: Sequence[Evaluation]) -> Evaluation:
    """One configuration's means over samples, which count alike however many rows they have. A sample without a sparse row
    (its answer ended at once under "decode") tells no density; a score that one sample lacks is no score."""
    told = [e for e in column if not math.isnan(e.density)]
    scores = [e.score for e in column if e.score is not None]
    scored = bool(scores) and len(scores) == len(column)
    return Evaluation(
        error=_mean_told(e.error for e in told),
        density=_mean(e.density for e in told),
        seconds=0.0,
        kv_fraction=_mean_told(e.kv_fraction for e in told),
        score=_mean(scores) if scored else None,
        sample_scores=scores if scored else None,
        reference_nll=_mean_told(e.reference_nll for e in column),
        reproduced=_mean_told(e.reproduced for e in column),
        layer_errors=_mean_layers(e.layer_errors for e in column),
        layer_densities=_mean_layers(e.layer_densities for e in column),
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else float("nan")


def _mean_told(values: Iterable[float | None]) -> float | None:
    """The mean of a figure that all samples tell, or none."""
    told = [value for value in values if value is not None]
    return _mean(told) if told else None


def _mean_layers(values: Iterable[list[float] | None]) -> list[float] | None:
    told = [value for value in values if value is not None]
    return [_mean(layer) for layer in zip(*told, strict=True)] if told else None


def _check_backend(backend: str, lm: LanguageModel) -> None:
    """UserError if the sparse kernel asked for cannot run where the model is: else every confirmation would fail alike."""
    import torch

    from sparse_attention_hub.kernels import choose_backend

    try:
        choose_backend(backend, torch.empty(0, dtype=lm.dtype, device=lm.device))
    except ValueError as error:
        raise UserError(f"--attention-backend {backend}: {error}; take auto") from None


@contextmanager
def _locked(folder: Path, patient: bool) -> Iterator[bool]:
    """Hold a trace's lock, True; False if another process holds it and we are not to wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
