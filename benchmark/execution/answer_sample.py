"""One sample under all its configurations: one prefill, then all answers in lockstep, as many at once as memory allows.

A group of configurations that fails, for example out of memory, is halved until it works; a configuration that fails
alone gets a failure instead of an answer.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from benchmark.execution.messages import Request, error_message, failure
from benchmark.execution.prompts import reference_ids
from benchmark.settings import Settings
from benchmark.storage.benchmark_records import Answer, SampleLine
from benchmark.tasks.base import Prompt
from benchmark.workers.errors import check_device, is_out_of_memory
from benchmark.workers.limits import foreign_maskers, memory_limit
from benchmark.workers.memory import free_memory, free_unused
from sparse_attention_hub.errors import NonFiniteError

if TYPE_CHECKING:
    from sparse_attention_hub import ResearchAttention
    from sparse_attention_hub.models import LanguageModel, Prefilled

logger = logging.getLogger("benchmark.phase2")
T = TypeVar("T")

#: Share of the free memory that a lockstep group may be estimated to take.
MEMORY_SHARE = 0.8


@dataclass
class LoadedModel:
    """A model in memory, prepared for a batch.

    settings, workers, most: as of the batch. attentions: configuration key -> its attention; broken: failures of those that
    cannot be built. fits: tokens of a context -> the largest group of configurations that did not run out of memory on it.
    """

    key: tuple[str, ...]
    lm: LanguageModel
    settings: Settings
    workers: int = 1
    most: int | None = None
    attentions: dict[str, ResearchAttention | None] = field(default_factory=dict)
    broken: dict[str, Answer] = field(default_factory=dict)
    fits: dict[int, int] = field(default_factory=dict)


class Prefix:
    """The prefilled context in memory; questions on the same context share it."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.ids: list[int] | None = None
        self.prefilled: Prefilled | None = None
        self.observe: frozenset[str] = frozenset()

    def get(self, ids: list[int], room: int, observe: frozenset[str], text_length: int) -> Prefilled:
        """observe, text_length: see `prefill`."""
        from sparse_attention_hub.models import prefill

        if not self._serves(ids, room, observe, text_length):
            self.drop()
            try:
                self.prefilled = prefill(self.lm, ids, room, observe, text_length)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("out of memory while prefilling %d tokens: cleared memory, trying once more", len(ids))
                error.__traceback__ = None
                free_unused()
                self.prefilled = prefill(self.lm, ids, room, observe, text_length)
            self.ids, self.observe = ids, observe
        assert self.prefilled is not None
        return self.prefilled

    def _serves(self, ids: list[int], room: int, observe: frozenset[str], text_length: int) -> bool:
        from sparse_attention_hub.models.rope import factors_key

        found, modules = self.prefilled, self.lm.length_dependent
        if found is None or self.ids != ids or found.room < room or not observe <= self.observe:
            return False
        return factors_key(modules, found.text_length) == factors_key(modules, text_length)

    def drop(self) -> None:
        self.ids = self.prefilled = None


def answer_sample(request: Request, prompt: Prompt | Exception, loaded: LoadedModel, prefix: Prefix, room: int) -> SampleLine:
    """The journal line of one sample. prompt: an exception if it could not be built; room: tokens after the context that the
    samples on this context need at most."""
    from sparse_attention_hub.models.observer import observed_by

    lm, sample = loaded.lm, request.sample
    line = SampleLine(
        kind="sample",
        sample_id=sample.sample_id,
        sample_hash=request.sample_hash,
        limit=request.limit,
        answers={},
        capped_limit=request.limit < sample.max_new_tokens,
        time=time.time(),
        device=str(lm.device),
        dtype=str(lm.dtype).removeprefix("torch."),
        dense_backend=lm.dense_backend,
    )
    try:
        if isinstance(prompt, Exception):
            raise prompt
        line.truncated_tokens = prompt.truncated_tokens
        line.context_tokens, line.question_tokens = len(prompt.context_ids), len(prompt.question_ids)
        observe = observed_by(loaded.attentions.get(key) for key in request.configs)
        own = len(prompt.question_ids) + request.limit
        prefilled = prefix.get(prompt.context_ids, max(room, own), observe, len(prompt.context_ids) + own)
    except Exception as error:
        check_device(error)
        prefix.drop()
        free_unused()
        line.answers = {key: failure(error) for key in request.configs}
        return line
    line.prefill_seconds = prefilled.seconds
    asked = _PrefilledSample(request, prompt, loaded, prefilled)
    line.answers = asked.answers()
    line.layers, line.sparse_layers = asked.layers, asked.sparse_layers
    asked.add_reference_nll(line.answers)
    return line


class _PrefilledSample:
    def __init__(self, request: Request, prompt: Prompt, loaded: LoadedModel, prefilled: Prefilled) -> None:
        self.request, self.prompt, self.loaded, self.prefilled = request, prompt, loaded, prefilled
        self.layers: int | None = None  # with attention; known once a sparse configuration has answered
        self.sparse_layers: int | None = None

    def answers(self) -> dict[str, Answer]:
        found = dict(self.loaded.broken)
        for key, outcome in self._in_groups([key for key in self.request.configs if key not in found], self._answer):
            found[key] = failure(outcome) if isinstance(outcome, Exception) else outcome
        return {key: found[key] for key in self.request.configs}

    def add_reference_nll(self, answers: dict[str, Answer]) -> None:
        """Mean negative log-likelihood of the first reference answer, of at most as many tokens as an answer may have."""
        answered = [key for key in self.request.configs if answers[key].ok]
        references = self.request.sample.references
        try:
            ids = reference_ids(self.loaded.lm.tokenizer, self.prompt, references[0]) if references else []
        except Exception as error:  # text that cannot be encoded, such as half of a surrogate pair
            for key in answered:
                answers[key].reference_error = error_message(error)
            return
        ids = ids[: self.request.limit]
        if not ids or not answered:
            return

        def ask(keys: list[str]) -> list[float | None]:
            from sparse_attention_hub.models import forced_many

            forced = forced_many(
                self.loaded.lm,
                self.prefilled,
                self.prompt.question_ids,
                ids,
                [self.loaded.attentions[key] for key in keys],
                sparse_from=self.loaded.settings.sparse_from,
                seed=self.request.seed,
            )
            return [_finite(entry.nll) for entry in forced]

        for key, outcome in self._in_groups(answered, ask):
            if isinstance(outcome, NonFiniteError):
                answers[key] = failure(outcome)
            elif isinstance(outcome, Exception):
                answers[key].reference_error = error_message(outcome)
            else:
                answers[key].reference_nll = outcome

    def _answer(self, keys: list[str]) -> list[Answer]:
        from sparse_attention_hub.micro_metrics import MetricRecorder
        from sparse_attention_hub.models import answer_many

        mode = self.loaded.settings.micro_metrics
        attentions = [self.loaded.attentions[key] for key in keys]
        recorders = [
            None if attention is None or mode == "off" else MetricRecorder(mode)  # type: ignore[arg-type]
            for attention in attentions
        ]
        answers = answer_many(
            self.loaded.lm,
            self.prefilled,
            self.prompt.question_ids,
            attentions,
            self.request.limit,
            sparse_from=self.loaded.settings.sparse_from,
            seed=self.request.seed,
            recorders=recorders,
        )
        return [
            Answer(
                status="ok",
                predicted_answer=answer.text,
                tokens=len(answer.token_ids),
                stopped=answer.stopped,
                seconds=answer.seconds,
                # Dense attention attends to every allowed key and has no error, by definition.
                density=1.0 if attention is None else _finite(answer.density),
                error=0.0 if attention is None else _finite(recorder.error if recorder else None),
                kv_fraction=1.0 if attention is None else _finite(answer.kv_fraction),
                model_kv_fraction=1.0 if attention is None else self._of_model(_finite(answer.kv_fraction), answer.token_ids),
                micro=recorder.calls() if recorder else [],
                reference_nll=None,
            )
            for attention, answer, recorder in zip(attentions, answers, recorders, strict=True)
        ]

    def _of_model(self, fraction: float | None, answer: list[int]) -> float | None:
        """KV bytes read over those of dense attention, in all layers. fraction: in the layers that can be sparse; layers with a
        window read its keys. answer: its token ids."""
        from sparse_attention_hub.models.probe import layer_calls

        calls = layer_calls(self.loaded.lm).values()
        keys = len(self.prompt.context_ids) + len(self.prompt.question_ids) + len(answer)
        self.layers, self.sparse_layers = len(calls), sum(not call.rule.limited for call in calls)
        sparse = sum(keys * call.token_numbers for call in calls if not call.rule.limited)
        dense = sum((keys - max(0, call.rule.first_key(keys - 1))) * call.token_numbers for call in calls if call.rule.limited)
        return None if fraction is None else (fraction * sparse + dense) / (sparse + dense)

    def _in_groups(self, keys: list[str], ask: Callable[[list[str]], list[T]]) -> Iterator[tuple[str, T | Exception]]:
        """Run all keys in lockstep and yield what `ask` returns, or its error. A group that fails is halved until it works or
        one configuration fails alone. Keys keep their order within a group."""
        length = self.prefilled.context_length
        known = [most for tokens, most in self.loaded.fits.items() if tokens <= length]  # more tokens take more memory
        most = max(1, min([len(keys), *known, self.loaded.most or len(keys), self._fitting(keys)]))
        groups, retried = _even_groups(keys, most), set[str]()
        while groups:
            group = groups.pop(0)
            try:
                with self._limit(group):
                    found = ask(group)
                yield from zip(group, found, strict=True)
                continue
            except Exception as caught:
                error = caught
            check_device(error)
            short = is_out_of_memory(error)
            if short:
                self.loaded.fits[length] = max(1, len(group) // 2)
                logger.warning("out of memory with %d configurations at once", len(group))
            retry = short and len(group) == 1 and group[0] not in retried
            if len(group) == 1 and not retry:
                name = self.request.sample.sample_id
                logger.warning("%s: %s", name, error_message(error), exc_info=None if short else error)
            error.__traceback__ = None  # its frames hold tensors
            if short:
                self.prefilled.forget()
                free_unused()
            if retry:  # it may fit now that the masker states of the other configurations are freed
                retried.add(group[0])
                groups.insert(0, group)
            elif len(group) == 1:
                yield group[0], error
            else:
                groups[:0] = _even_groups(group, (len(group) + 1) // 2)

    def _limit(self, group: list[str]) -> AbstractContextManager[None]:
        """A bound on the memory of maskers from outside the package, which may take all there is."""
        if not any(foreign_maskers(self.loaded.attentions[key]) for key in group):
            return nullcontext()
        return memory_limit(self.loaded.lm.device, self.loaded.workers)

    def _fitting(self, keys: list[str]) -> int:
        """Size of the largest groups of these configurations that are estimated to fit into the memory that is free now."""
        from sparse_attention_hub.models import estimate_bytes

        lm, held = self.loaded.lm, self.prefilled.nbytes()
        free = free_memory(lm.device, self.loaded.workers)
        if free is None:
            return len(keys)
        room = len(self.prompt.question_ids) + self.request.limit
        asked = [self.loaded.attentions[key] for key in keys]

        def fits(group: list[ResearchAttention | None]) -> bool:
            return estimate_bytes(lm, self.prefilled.context_length, room, group, asked) - held <= free * MEMORY_SHARE

        return next((size for size in range(len(keys), 1, -1) if all(map(fits, _even_groups(asked, size)))), 1)


def _even_groups(items: list[T], most: int) -> list[list[T]]:
    """Consecutive groups of nearly equal size, none above `most`."""
    count = -(-len(items) // most) if items else 0
    bounds = [len(items) * i // count for i in range(count + 1)] if count else []
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
