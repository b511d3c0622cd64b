"""What Phase 1 measures: tuning samples of a (model, task), recorded as traces, replayed and confirmed."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.blocks import sample_seed
from benchmark.results import fingerprint
from benchmark.settings import Settings
from benchmark.tasks import get_task
from benchmark.tasks.base import Prompt, Sample, SampleRequest, build_prompt
from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.errors import UserError

from .study import Evaluation, with_deadline

if TYPE_CHECKING:
    from sparse_attention_hub.models import LanguageModel, Prefilled
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
    """The samples Phase 1 tunes on: a split that Phase 2 never scores, at the search's context length.

    UserError if the task has none, or its question does not fit.
    """
    task = get_task(task_name)
    own_length: int | None = getattr(task, "fixed_length", None)
    length = min(own_length, settings.search_max_context_length) if own_length else None
    request = SampleRequest(
        tokenizer=tokenizer,
        split="tuning",
        seed=settings.seed,
        max_samples=settings.search_max_requests,
        max_context_length=settings.search_max_context_length,
        data_dir=settings.data_dir,
        trust_remote_code=settings.trust_remote_code,
        length=length,
    )
    prepared = []
    for sample in task.samples(request):
        new_tokens = min(sample.max_new_tokens, settings.search_max_new_tokens)
        prompt = build_prompt(
            sample,
            tokenizer,
            max_context_length=settings.search_max_context_length,
            max_new_tokens=new_tokens,
            use_chat_template=task.use_chat_template,
        )
        prepared.append(TuningSample(sample, prompt, new_tokens, sample_seed(settings.seed, sample.sample_id)))
    if not prepared:
        raise UserError(f"task {task_name!r} has no tuning samples: its data hold too few rows, add some or take another task")
    return prepared


class TraceEvaluator:
    """Evaluates configurations of one (model, task) on traces; rung 2 and 3 run the model on the traces' KV caches."""

    def __init__(self, lm: LanguageModel, task_name: str, settings: Settings, traces_dir: Path) -> None:
        """Nothing is recorded yet: iterate `record()` first. UserError as `tuning_samples`."""
        from sparse_attention_hub.models.trace import layer_bytes, thinned_layers, trace_key
        from sparse_attention_hub.replay import SharedStates

        self.lm, self.task, self.settings = lm, get_task(task_name), settings
        self.samples = tuning_samples(lm.tokenizer, task_name, settings)
        self.traces: list[Trace] = []
        self._states = SharedStates()
        tokens = max(len(s.prompt.context_ids) + len(s.prompt.question_ids) + s.max_new_tokens for s in self.samples)
        self.bytes_per_layer = layer_bytes(lm, tokens) * len(self.samples)
        self.layers = list(range(lm.num_layers))
        if settings.trace_budget_gb is not None:
            fit = int(settings.trace_budget_gb * 1e9 / self.bytes_per_layer)
            if fit < 1:
                raise UserError(
                    f"--trace-budget-gb {settings.trace_budget_gb:g} is less than one layer of {len(self.samples)} traces "
                    f"({self.bytes_per_layer / 1e9:.2f} GB): raise it, or lower --search-max-requests"
                )
            self.layers = thinned_layers(lm.num_layers, fit)
        thinned = [] if len(self.layers) == lm.num_layers else self.layers
        self._folders = []
        for entry in self.samples:
            key = trace_key(lm, entry.prompt.context_ids, entry.prompt.question_ids, entry.max_new_tokens, settings.sparse_from)
            self._folders.append(traces_dir / (f"{key}-{fingerprint(thinned)[:8]}" if thinned else key))
        self.key = fingerprint(
            [
                [folder.name for folder in self._folders],
                [s.seed for s in self.samples],
                [s.sample.sample_id for s in self.samples],
            ]
        )

    @property
    def trace_bytes(self) -> int:
        """What all traces of this (model, task) take on disk, about."""
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
            layers=None if len(self.layers) == self.lm.num_layers else self.layers,
        )
        return trace, "recorded"

    def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation]:
        """See study.Evaluator."""
        if len(self.traces) < len(self.samples):
            for _ in self.record():
                pass
        from sparse_attention_hub.models.model_files import complete

        attentions = [ResearchAttention(complete(config, self.lm)) for config in configs]
        check = with_deadline(timeout * len(configs))
        started = time.perf_counter()
        measure = (self._replay_some, self._replay_all, self._force, self._generate)[rung]
        evaluations = measure(attentions, check)
        seconds = (time.perf_counter() - started) / len(configs)
        for evaluation in evaluations:
            evaluation.seconds = seconds
        return evaluations

    # -- rungs 0 and 1 -----------------------------------------------------------------------------------------------

    def _replay_some(self, attentions: list[ResearchAttention], check: Any) -> list[Evaluation]:
        return self._replay(attentions, check, RUNG0_ROWS, self.layers[::RUNG0_LAYER_STEP])

    def _replay_all(self, attentions: list[ResearchAttention], check: Any) -> list[Evaluation]:
        return self._replay(attentions, check, None, None)

    def _replay(
        self, attentions: list[ResearchAttention], check: Any, rows: int | None, layers: list[int] | None
    ) -> list[Evaluation]:
        from sparse_attention_hub.replay import replay, spread_rows

        per_sample = []
        for entry, trace in zip(self.samples, self.traces, strict=True):
            kept = None if rows is None else spread_rows(trace.rows, rows)
            per_sample.append(
                replay(trace, attentions, rows=kept, layers=layers, seed=entry.seed, device=self.lm.device, states=self._states)
            )
            check()
        evaluations = []
        for results in zip(*per_sample, strict=True):
            errors = sum(r.errors.mean(-1) for r in results) / len(results)
            densities = sum(r.densities.mean(-1) for r in results) / len(results)
            evaluations.append(
                Evaluation(
                    error=_mean(r.error for r in results),
                    density=_mean(r.density for r in results),
                    seconds=0.0,
                    layer_errors=errors.tolist() if layers is None else None,
                    layer_densities=densities.tolist() if layers is None else None,
                )
            )
        return evaluations

    # -- rungs 2 and 3 -----------------------------------------------------------------------------------------------

    def _prefilled(self, entry: TuningSample, trace: Trace, room: int) -> Prefilled:
        from sparse_attention_hub.models import prefill

        return trace.prefilled(self.lm, room) or prefill(self.lm, entry.prompt.context_ids, room)

    def _force(self, attentions: list[ResearchAttention], check: Any) -> list[Evaluation]:
        """Question and dense answer in one forward: errors compound through the layers as in a real run."""
        from sparse_attention_hub.models import forced_many

        per_sample: list[list[Evaluation]] = []
        for entry, trace in zip(self.samples, self.traces, strict=True):
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
            )
            per_sample.append(
                [
                    Evaluation(
                        error=meter.error,
                        density=meter.density,
                        kv_fraction=meter.kv_fraction,
                        seconds=0.0,
                        reference_nll=result.nll,
                        reproduced=float(result.reproduced),
                    )
                    for meter, result in zip(meters, results, strict=True)
                ]
            )
            check()
        return [
            Evaluation(
                error=_mean(e.error for e in column),
                density=_mean(e.density for e in column),
                kv_fraction=_mean(e.kv_fraction or 0.0 for e in column),
                seconds=0.0,
                reference_nll=_mean(e.reference_nll or 0.0 for e in column),
                reproduced=_mean(e.reproduced or 0.0 for e in column),
            )
            for column in zip(*per_sample, strict=True)
        ]

    def _generate(self, attentions: list[ResearchAttention], check: Any) -> list[Evaluation]:
        """Real sparse generation, scored as the task scores. Its error is attention's own, on the way it went."""
        from sparse_attention_hub.models import answer_many

        meters = [ErrorMeter() for _ in attentions]
        scores: list[list[float | None]] = [[] for _ in attentions]
        for entry, trace in zip(self.samples, self.traces, strict=True):
            room = len(entry.prompt.question_ids) + entry.max_new_tokens
            answers = answer_many(
                self.lm,
                self._prefilled(entry, trace, room),
                entry.prompt.question_ids,
                attentions,
                entry.max_new_tokens,
                sparse_from=self.settings.sparse_from,
                seed=entry.seed,
                recorders=meters,
            )
            for place, answer in enumerate(answers):
                scores[place].append(self.task.score(answer.text, entry.sample).get(self.task.metric))
            check()
        evaluations = []
        for meter, column in zip(meters, scores, strict=True):
            told = [score for score in column if score is not None]
            complete = len(told) == len(column)
            evaluations.append(
                Evaluation(
                    error=meter.error,
                    density=meter.density,
                    kv_fraction=meter.kv_fraction,
                    seconds=0.0,
                    score=_mean(told) if complete else None,
                    sample_scores=told if complete else None,
                )
            )
        return evaluations


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


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


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
