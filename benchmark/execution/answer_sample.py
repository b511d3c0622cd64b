"""One sample under all its configurations: one prefill, then answers in lockstep, as many at once as memory allows.

Where a batch fails, as on an out-of-memory error, it is halved until it works; a configuration that fails alone has a
failure record in the place of its answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from benchmark.execution.messages import Block, Request, failure
from benchmark.tasks.base import Prompt
from benchmark.workers.errors import check_device, is_out_of_memory
from benchmark.workers.memory import free_memory, free_unused

if TYPE_CHECKING:
    from sparse_attention_hub import ResearchAttention
    from sparse_attention_hub.models import LanguageModel, Prefilled

logger = logging.getLogger("benchmark.phase2")
T = TypeVar("T")

#: Share of the free memory that a lockstep batch may be estimated to take.
MEMORY_SHARE = 0.8


@dataclass
class LoadedModel:
    """The model in memory, and what was learned about it: the largest batch that did not run out of memory."""

    key: tuple[str, ...]
    lm: LanguageModel
    most: int = 2**30
    attentions: dict[str, ResearchAttention | None] = field(default_factory=dict)
    broken: dict[str, dict[str, Any]] = field(default_factory=dict)  # the failures of those that cannot be made


class Prefix:
    """The prefilled context in memory; questions on the same context share it."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.ids: list[int] | None = None
        self.prefilled: Prefilled | None = None

    def get(self, ids: list[int], room: int) -> Prefilled:
        from sparse_attention_hub.models import prefill

        if self.prefilled is None or self.ids != ids or self.prefilled.room < room:
            self.drop()
            try:
                self.prefilled = prefill(self.lm, ids, room)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("out of memory while prefilling %d tokens; memory is cleared for one more try", len(ids))
                error.__traceback__ = None
                free_unused()
                self.prefilled = prefill(self.lm, ids, room)
            self.ids = ids
        return self.prefilled

    def drop(self) -> None:
        self.ids = self.prefilled = None


def answer_sample(
    request: Request, prompt: Prompt | Exception, block: Block, loaded: LoadedModel, prefix: Prefix, room: int
) -> dict[str, Any]:
    lm, sample = loaded.lm, request.sample
    record: dict[str, Any] = {
        "kind": "sample",
        "sample_id": sample.sample_id,
        "sample_hash": request.sample_hash,
        "limit": request.limit,
        "capped_limit": request.limit < sample.max_new_tokens,
        "time": time.time(),
        "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "dense_backend": lm.dense_backend,
    }
    try:
        if isinstance(prompt, Exception):
            raise prompt
        record |= {
            "truncated_tokens": prompt.truncated_tokens,
            "context_tokens": len(prompt.context_ids),
            "question_tokens": len(prompt.question_ids),
        }
        prefilled = prefix.get(prompt.context_ids, max(room, len(prompt.question_ids) + request.limit))
    except Exception as error:
        check_device(error)
        prefix.drop()
        free_unused()
        record["answers"] = {key: failure(error) for key in request.configs}
        return record
    record["prefill_seconds"] = prefilled.seconds
    asked = _Asked(request, prompt, block, loaded, prefilled)
    answers = asked.answers()
    asked.add_reference_nll(answers)
    record["answers"] = answers
    return record


class _Asked:
    """A prefilled sample, asked under its configurations."""

    def __init__(self, request: Request, prompt: Prompt, block: Block, loaded: LoadedModel, prefilled: Prefilled) -> None:
        self.request, self.prompt, self.block, self.loaded, self.prefilled = request, prompt, block, loaded, prefilled
        self.room = len(prompt.question_ids) + request.limit

    def answers(self) -> dict[str, dict[str, Any]]:
        broken = self.loaded.broken
        able = [key for key in self.request.configs if key not in broken]
        found = dict(self._in_parts(able, self._answer))
        return {key: dict(broken[key]) if key in broken else found[key] for key in self.request.configs}

    def add_reference_nll(self, answers: dict[str, dict[str, Any]]) -> None:
        """Mean negative log-likelihood of the first reference, of as many of its tokens as an answer may have."""
        for answer in answers.values():
            answer.setdefault("reference_nll", None)
        answered = [key for key in self.request.configs if answers[key]["status"] == "ok"]
        try:
            ids = self._reference_ids()
        except Exception as error:  # text that cannot be encoded, as half of a surrogate pair
            for key in answered:
                answers[key]["reference_error"] = failure(error)["error_message"]
            return
        if not ids or not answered:
            return

        def ask(keys: list[str]) -> list[dict[str, Any]]:
            from sparse_attention_hub.models import forced_many

            forced = forced_many(
                self.loaded.lm,
                self.prefilled,
                self.prompt.question_ids,
                ids,
                [self.loaded.attentions[key] for key in keys],
                sparse_from=self.block.options.sparse_from,  # type: ignore[arg-type]
                seed=self.request.seed,
            )
            return [{"reference_nll": _finite(entry.nll)} for entry in forced]

        for key, outcome in self._in_parts(answered, ask):
            if "reference_nll" in outcome:
                answers[key]["reference_nll"] = outcome["reference_nll"]
            else:
                answers[key]["reference_error"] = outcome["error_message"]

    def _reference_ids(self) -> list[int]:
        references = self.request.sample.references
        if not references:
            return []
        return reference_ids(self.loaded.lm.tokenizer, self.prompt, references[0])[: self.request.limit]

    def _answer(self, keys: list[str]) -> list[dict[str, Any]]:
        from sparse_attention_hub.micro_metrics import MetricRecorder
        from sparse_attention_hub.models import answer_many

        mode = self.block.options.micro_metrics
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
            sparse_from=self.block.options.sparse_from,  # type: ignore[arg-type]
            seed=self.request.seed,
            recorders=recorders,
        )
        found = []
        for attention, answer, recorder in zip(attentions, answers, recorders, strict=True):
            dense = attention is None
            found.append(
                {
                    "status": "ok",
                    "predicted_answer": answer.text,
                    "tokens": len(answer.token_ids),
                    "stopped": answer.stopped,
                    "seconds": answer.seconds,
                    # Dense attention attends to every allowed key and differs from itself by nothing, by definition.
                    "density": 1.0 if dense else _finite(answer.density),
                    "error": 0.0 if dense else _finite(recorder.error if recorder else None),
                    "kv_fraction": 1.0 if dense else _finite(answer.kv_fraction),
                    "micro": recorder.calls() if recorder else [],
                }
            )
        return found

    def _in_parts(
        self, keys: list[str], ask: Callable[[list[str]], list[dict[str, Any]]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Ask all keys in lockstep; what fails is halved until it works or fails alone. Keys keep their order in a
        batch."""
        most = max(1, min(self.loaded.most, self.block.most or len(keys), self._fitting(len(keys))))
        if most < len(keys):
            logger.debug("%s: lockstep of %d instead of %d, as memory allows", self.block.task, most, len(keys))
        parts, tried = _even_parts(keys, most), set[str]()
        while parts:
            part = parts.pop(0)
            error: Exception
            try:
                yield from zip(part, ask(part), strict=True)
                continue
            except Exception as caught:
                error = caught
            check_device(error)
            short = is_out_of_memory(error)
            if short:
                self.loaded.most = max(1, len(part) // 2)
                logger.warning("out of memory with %d configurations at once", len(part))
            outcome = failure(error)
            again = short and len(part) == 1 and part[0] not in tried
            if len(part) == 1 and not again:
                name = self.request.sample.sample_id
                logger.warning("%s: %s", name, outcome["error_message"], exc_info=None if short else error)
            error.__traceback__ = None  # its frames hold tensors
            if short:
                self.prefilled.forget()
                free_unused()
            if again:  # with what maskers remember of the others' forgotten, it may fit
                tried.add(part[0])
                parts.insert(0, part)
            elif len(part) == 1:
                yield part[0], outcome
            else:
                parts[:0] = _even_parts(part, (len(part) + 1) // 2)

    def _fitting(self, wanted: int) -> int:
        """The largest batch, at most `wanted`, that is estimated to fit into the memory that is free now."""
        from sparse_attention_hub.models import estimate_bytes

        lm, held = self.loaded.lm, self.prefilled.cache.nbytes()
        free = free_memory(lm.device, self.block.options.workers)
        if free is None:
            return wanted
        count = wanted
        while count > 1:
            needed = estimate_bytes(lm, self.prefilled.context_length, self.room, count) - held
            if needed <= free * MEMORY_SHARE:
                break
            count -= 1
        return count


def reference_ids(tokenizer: Any, prompt: Prompt, reference: str) -> list[int]:
    """Tokens of a reference answer as it would follow the prompt: after a space, unless the prompt ends with white
    space or a special token."""
    end = tokenizer.decode(list(prompt.question_ids[-1:]), skip_special_tokens=True)
    text = reference if not end or end[-1:].isspace() else " " + reference.lstrip()
    return list(tokenizer.encode(text, add_special_tokens=False))


def _even_parts(items: list[T], most: int) -> list[list[T]]:
    """Consecutive parts of nearly equal size, none above `most`."""
    count = -(-len(items) // most) if items else 0
    bounds = [len(items) * i // count for i in range(count + 1)] if count else []
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and value - value == 0 else None
