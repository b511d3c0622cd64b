"""Evaluates configurations on the tuning samples of a (model, task): replay of traces, then confirmation by the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmark.search.samples import samples_key, tuning_samples
from benchmark.settings import Settings
from benchmark.storage.results import fingerprint
from benchmark.storage.search_records import Evaluation
from benchmark.tasks import get_task
from benchmark.workers.limits import time_limit, watch_masks
from benchmark.workers.memory import free_memory
from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.errors import NonFiniteError, UserError
from sparse_attention_hub.head_budgets import FittedBudgets, fit_spending, replay_curves
from sparse_attention_hub.kernels import choose_backend
from sparse_attention_hub.maskers.shared_states import SharedStates
from sparse_attention_hub.micro_metrics import Meter
from sparse_attention_hub.models import Answer, LanguageModel, Prefilled, answer_many, forced_and_answered, prefill
from sparse_attention_hub.models.heap import trim_heap
from sparse_attention_hub.models.model_files import complete
from sparse_attention_hub.models.observer import observed_by
from sparse_attention_hub.models.probe import layer_calls
from sparse_attention_hub.models.prompts import opens_thinking, without_thinking
from sparse_attention_hub.models.session import sparse_layers
from sparse_attention_hub.models.trace import HeldLayers, Trace, layer_bytes, record_trace, trace_key
from sparse_attention_hub.replay import replay, spread

RUNG0_ROWS = 6
RUNG0_LAYER_STEP = 4
#: Share of a GPU's free memory in which layers of traces stay from one replay to the next.
HELD_SHARE = 0.3
#: Head budgets are fitted on at most so many rows of each sample. All of 48 to 72 rows give tables with 1% less error, at 1k.
FIT_ROWS = 16


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
    head_densities: list[list[float]] | None = None


class TraceEvaluator:
    """Evaluates configurations of one (model, task) on traces. Rungs 2 and 3 run the model on the traces' KV caches, or prefill
    the samples again where the traces do not contain all layers.

    samples: the tuning samples. traces: empty until `record()` has finished. layers: those that traces contain. key: a hash of
    everything that determines the figures of a configuration. trace_bytes: upper bound of the traces' size on disk.
    """

    def __init__(self, lm: LanguageModel, task_name: str, settings: Settings, traces_dir: Path) -> None:
        """Records nothing yet.

        UserError if no layer can be sparse, --trace-budget-gb is less than one layer of the traces, or the sparse backend
        cannot run on the model's device.
        """
        _check_backend(settings.attention_backend, lm)
        self.lm, self.task, self.settings = lm, get_task(task_name), settings
        self.samples = tuning_samples(lm.tokenizer, task_name, settings)
        self._opens_thinking = self.task.use_chat_template and opens_thinking(lm.tokenizer)
        self.traces: list[Trace] = []
        self._states = SharedStates()
        self._held: HeldLayers | None = None
        # (configuration, sample number) -> its answer, which a forced forward finds on its way.
        self._answers: dict[tuple[str, int], Answer] = {}
        usable = sparse_layers(lm)
        self._kv = settings.budget_on == "kv"
        self._calls = layer_calls(lm)
        names, bytes_per_layer = [], 0
        for entry in self.samples:
            context, question, answer = entry.prompt.context_ids, entry.prompt.question_ids, entry.max_new_tokens
            names.append(trace_key(lm, context, question, answer, settings.sparse_from))
            rows = answer + (len(question) if settings.sparse_from == "question" else 0)
            bytes_per_layer += layer_bytes(lm, len(context) + len(question) + answer, rows)
        self.layers = usable
        if settings.trace_budget_gb is not None:
            fit = int(settings.trace_budget_gb * 1e9 / bytes_per_layer)
            if fit < 1:
                raise UserError(
                    f"--trace-budget-gb {settings.trace_budget_gb:g} is less than one layer of {len(self.samples)} traces "
                    f"({bytes_per_layer / 1e9:.2f} GB): raise it, or lower --search-max-requests"
                )
            self.layers = [usable[index] for index in spread(len(usable), fit)]
        self._thinned = self.layers != usable
        if self._thinned:
            names = [f"{name}-{fingerprint(self.layers)[:8]}" for name in names]
        self._folders = [traces_dir / name for name in names]
        self.trace_bytes = bytes_per_layer * len(self.layers)
        key = [names, samples_key(self.samples, self.task), settings.attention_backend]
        self.key = fingerprint([*key, "kv"] if self._kv else key)  # with "kv" replays measure KV bytes, too

    def record(self, observe: frozenset[str] = frozenset()) -> Iterator[str]:
        """Open or record the traces, one per step; yields a line for each. UserError if no answer has a sparse row.

        observe: what they must hold of the contexts' queries, see `prefill`; a trace that lacks it is recorded again.
        Studies of one task run in several processes: a trace that another process is recording is skipped and opened at the
        end.
        """
        found: dict[int, Trace] = {}
        for wait in (False, True):
            for number, folder in enumerate(self._folders):
                if number in found:
                    continue
                folder.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with FileLock(folder.parent / f".{folder.name}.lock", timeout=-1 if wait else 0):
                        found[number], done = self._open_or_record(number, folder, observe)
                except Timeout:
                    continue
                yield f"trace {len(found)}/{len(self.samples)} {done} ({found[number].nbytes / 1e6:.0f} MB)"
        if not any(trace.rows for trace in found.values()):
            raise UserError(
                f"no tuning sample of {self.task.name} has a sparse row, since every answer is one token long: "
                "use --sparse-from question or raise --search-max-new-tokens"
            )
        self.traces = [found[number] for number in range(len(self.samples))]
        self._held = _held_layers(self.lm)

    def _open_or_record(self, number: int, folder: Path, observe: frozenset[str]) -> tuple[Trace, str]:
        entry = self.samples[number]
        trace, done = Trace.open(folder), "reused"
        try:
            if trace is None or not observe <= trace.observed:
                trace = record_trace(
                    self.lm,
                    entry.prompt.context_ids,
                    entry.prompt.question_ids,
                    entry.max_new_tokens,
                    folder,
                    sparse_from=self.settings.sparse_from,
                    layers=self.layers,
                    observe=observe if trace is None else observe | trace.observed,
                )
                done = "recorded"
                trim_heap()
            for layer in trace.layers:
                if not trace.layer(layer).dense.isfinite().all():
                    raise NonFiniteError(f"dense attention of layer {layer} is not finite: check the weights and --dtype")
        except NonFiniteError as error:
            raise UserError(f"tuning sample {entry.sample.sample_id} has no dense answer on {self.lm.id}: {error}") from None
        return trace, done

    def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
        """See `trial.Evaluator`."""
        attentions = [self._attention(config) for config in configs]
        observe = observed_by(attentions)
        if not self.traces or not all(observe <= trace.observed for trace in self.traces):
            for _ in self.record(observe):
                pass
        measure = (self._replay_some, self._replay, self._force, self._generate)[rung]
        started = time.perf_counter()
        end = started + timeout * len(configs)
        # Of one sample: an endless loop is noticed before the time of all samples has passed.
        limit = timeout * max(1.0, len(configs) / len(self.traces))
        by_sample = []
        try:
            for number, trace in enumerate(self.traces):
                if trace.rows or rung >= 2:
                    with time_limit(min(limit, end - time.perf_counter())):
                        by_sample.append(measure(number, attentions))
                    if rung >= 2:
                        trim_heap()
        except BaseException:
            self._states = SharedStates()  # one of them may be half made
            raise
        trim_heap()
        seconds = (time.perf_counter() - started) / len(configs)
        return [_over_samples(column, seconds) for column in zip(*by_sample, strict=True)]

    def fit_head_budgets(self, configs: list[ResearchAttentionConfig], by: str, timeout: float) -> list[FittedBudgets | None]:
        """See `trial.Evaluator`. There is none for sampling maskers, for sizes in tokens, and on traces that lack layers. With
        fewer than three samples each half of a sample's rows is a group of its own."""
        attentions = [self._attention(config) for config in configs]
        sampling = any(masker.is_sampling for attention in attentions for masker in attention.maskers)
        kept = [number for number, trace in enumerate(self.traces) if trace.rows > 1]
        if sampling or self._thinned or not kept:
            return [None] * len(configs)
        call = self._calls[self.layers[0]]
        columns = {"layer": 1, "kv_head": call.kv_heads, "head": call.heads}[by]
        middle = attentions.pop((len(configs) - 1) // 2)
        with time_limit(timeout * len(configs)):
            curves, spent = replay_curves(
                [self.traces[number] for number in kept],
                middle.config,
                [attention.config for attention in attentions],
                layers=self.lm.num_layers,
                seeds=[self.samples[number].seed for number in kept],
                parts=2 if len(kept) < 3 else 1,
                most_rows=FIT_ROWS,
                device=self.lm.device,
                states=self._states,
                kv=self._kv,
            )
        trim_heap()
        spent.insert(len(spent) // 2, float(curves.densities[:, curves.unscaled].mean()))
        return [self._on_all_layers(fit_spending(curves, own, columns)) for own in spent]

    def _on_all_layers(self, fitted: FittedBudgets | None) -> FittedBudgets | None:
        if fitted is None:
            return None
        table = [[1.0] * len(fitted.table[0]) for _ in range(self.lm.num_layers)]
        for layer, row in zip(self.layers, fitted.table, strict=True):
            table[layer] = row
        return fitted._replace(table=table)

    def _attention(self, config: ResearchAttentionConfig) -> ResearchAttention:
        attention = ResearchAttention(replace(complete(config, self.lm), backend=self.settings.attention_backend))
        watch_masks(attention)
        return attention

    # -- rungs: figures of every attention on one sample ------------------------------------------------------------------

    def _replay_some(self, number: int, attentions: list[ResearchAttention]) -> list[_Measured]:
        rows = spread(self.traces[number].rows, RUNG0_ROWS)
        varied = any(masker.varies_by_layer for attention in attentions for masker in attention.maskers)
        return self._replay(number, attentions, rows, self.layers[:: 1 if varied else RUNG0_LAYER_STEP])

    def _replay(
        self,
        number: int,
        attentions: list[ResearchAttention],
        rows: list[int] | None = None,
        layers: list[int] | None = None,
    ) -> list[_Measured]:
        seed, device = self.samples[number].seed, self.lm.device
        latent = self._calls[self.layers[0]].rule.latent
        results = replay(
            self.traces[number],
            attentions,
            rows=rows,
            layers=layers,
            seed=seed,
            device=device,
            states=self._states,
            held=self._held,
            kv=self._kv,
            latent=latent,
        )
        if layers is not None:
            return [_Measured(error=result.error, density=result.density, kv_fraction=result.kv_fraction) for result in results]
        return [
            _Measured(
                error=result.error,
                density=result.density,
                kv_fraction=result.kv_fraction,
                layer_errors=result.errors.mean(-1).tolist(),
                layer_densities=result.densities.mean(-1).tolist(),
                head_densities=_by_column(result.densities, attention.config.head_budgets),
            )
            for attention, result in zip(attentions, results, strict=True)
        ]

    def _prefilled(self, number: int) -> Prefilled:
        """The sample's KV cache, with the room that its trace had: rotary factors may depend on the whole length."""
        prompt = self.samples[number].prompt
        room = len(prompt.question_ids) + self.samples[number].max_new_tokens
        trace = self.traces[number]
        return trace.prefilled(self.lm, room, self._states) or prefill(self.lm, prompt.context_ids, room, trace.observed)

    def _force(self, number: int, attentions: list[ResearchAttention]) -> list[_Measured]:
        """Question and dense answer through the model, token by token: errors compound through the layers as in generation. Where
        a configuration would generate another token than the dense one, its own answer continues beside it, for rung 3."""
        entry, answer_ids = self.samples[number], self.traces[number].answer_ids
        meters = [ErrorMeter() for _ in attentions]
        results = forced_and_answered(
            self.lm,
            self._prefilled(number),
            entry.prompt.question_ids,
            answer_ids,
            attentions,
            entry.max_new_tokens,
            sparse_from=self.settings.sparse_from,
            seed=entry.seed,
            recorders=meters,
        )
        measured = []
        for attention, meter, (result, answer) in zip(attentions, meters, results, strict=True):
            self._answers[_name(attention), number] = answer
            measured.append(
                _Measured(
                    error=meter.error,
                    density=result.density,
                    kv_fraction=result.kv_fraction,
                    reference_nll=result.nll,
                    reproduced=float(result.reproduced),
                )
            )
        return measured

    def _generate(self, number: int, attentions: list[ResearchAttention]) -> list[_Measured]:
        """Real sparse generation, scored by the task. The error is not measured: the generated tokens diverge from the dense
        answer, so it would add little to that of rung 2."""
        entry = self.samples[number]
        names = [(_name(attention), number) for attention in attentions]
        unknown = {name: way for name, way in zip(names, attentions, strict=True) if name not in self._answers}
        if unknown:  # their rung 2 was found in a journal
            found = answer_many(
                self.lm,
                self._prefilled(number),
                entry.prompt.question_ids,
                [*unknown.values()],
                entry.max_new_tokens,
                sparse_from=self.settings.sparse_from,
                seed=entry.seed,
            )
            self._answers |= zip(unknown, found, strict=True)
        measured = []
        for name in names:
            answer = self._answers[name]
            answered = without_thinking(answer.text, self._opens_thinking) or ""
            score = self.task.score(answered, entry.sample).get(self.task.metric)
            measured.append(_Measured(density=answer.density, kv_fraction=answer.kv_fraction, score=score))
        return measured


def _name(attention: ResearchAttention) -> str:
    """Equal for equal configurations."""
    return fingerprint(attention.config.to_dict())


def _by_column(densities: torch.Tensor, table: list[list[float]] | None) -> list[list[float]] | None:
    """Densities (layers, H) as means over the heads that share a column of a table; None without a table."""
    return None if table is None else densities.reshape(len(densities), len(table[0]), -1).mean(-1).tolist()


class ErrorMeter(Meter):
    """A recorder of the mean error over rows, heads and layers."""

    def __init__(self) -> None:
        self._rows = 0
        self._total: float | torch.Tensor = 0.0  # on the device, which is read at the end

    def __call__(self, *, result: Any, queries: Any, **_: Any) -> None:
        if result is not None:
            rows = queries.shape[2]
            self.add(0, 0, rows, rows, (0.0, result.error_rows().mean().double(), 0.0))

    def due(self, layer_idx: int, total: int, length: int) -> list[int]:
        return list(range(length))

    def add(self, layer_idx: int, step: int, length: int, measured: int, figures: tuple[Any, ...]) -> None:
        self._rows, self._total = self._rows + measured, self._total + figures[1] * measured

    @property
    def error(self) -> float | None:
        """None before the first sparse row."""
        return float(self._total) / self._rows if self._rows else None


def _over_samples(column: Sequence[_Measured], seconds: float) -> Evaluation | None:
    """The means of one configuration over samples, which have equal weight however many rows they have. A figure that a sample
    does not have (it has no sparse row if its answer ended at once, with --sparse-from decode) is a mean over the others; the
    score is None unless every sample has one. None if a figure is not finite, or no sample has a density."""
    means = {field.name: _mean([getattr(sample, field.name) for sample in column]) for field in fields(_Measured)}
    scores = [sample.score for sample in column if sample.score is not None]
    if len(scores) < len(column):
        scores, means["score"] = [], None
    try:
        return Evaluation(seconds=seconds, sample_scores=scores or None, **means)
    except ValueError:  # the record takes finite numbers only, and needs a density
        return None


def _mean(values: Sequence[Any]) -> Any:
    """The mean of those values that were measured: a number, or a list with a number per layer."""
    measured = [value for value in values if value is not None]
    if measured and isinstance(measured[0], list):
        return [_mean(layer) for layer in zip(*measured, strict=True)]
    return sum(measured) / len(measured) if measured else None


def _held_layers(lm: LanguageModel) -> HeldLayers | None:
    """Room for layers of traces on a GPU. On a CPU they are views of mapped files, which need no copy."""
    free = free_memory(lm.device, 1) if lm.device.type == "cuda" else None
    return None if free is None else HeldLayers(int(HELD_SHARE * free))


def _check_backend(backend: str, lm: LanguageModel) -> None:
    """UserError if the sparse backend cannot run on the model's device: otherwise every confirmation would fail alike."""
    try:
        choose_backend(backend, torch.empty(0, dtype=lm.dtype, device=lm.device))
    except ValueError as error:
        raise UserError(f"--attention-backend {backend}: {error}; use auto") from None
