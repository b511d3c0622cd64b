"""What a Phase 2 worker does: load a model once, then answer batches of samples, each journalled as soon as it is done.

Importing this module is cheap: torch is imported with the first batch, after a worker process has set its threads and
its devices.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from benchmark.execution.answer_sample import LoadedModel, Prefix, answer_sample
from benchmark.execution.messages import Batch, Request, failure
from benchmark.storage.records import SampleLine, WorkerStatus, to_json
from benchmark.storage.results import Journal
from benchmark.tasks.base import Prompt, build_prompt
from benchmark.workers.errors import check_device
from benchmark.workers.memory import free_unused

if TYPE_CHECKING:
    from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig
    from sparse_attention_hub.models import LanguageModel

logger = logging.getLogger("benchmark.phase2")

_loaded: LoadedModel | None = None


@dataclass(frozen=True)
class BatchJob:
    """A batch as a pool runs it: a `workers.pools.Job`."""

    batch: Batch

    @property
    def parts(self) -> int:
        return len(self.batch.requests)

    def run(self, deadline: float | None = None, on_record: Callable[[], None] | None = None) -> int:
        return run_batch(replace(self.batch, deadline=deadline), on_record)

    def records(self) -> Iterator[Any]:
        prepare(self.batch)
        yield os.getpid()
        yield from answer_batch(self.batch)

    def portable(self) -> BatchJob:
        return BatchJob(replace(self.batch, journal=None, status=None, stop=None))

    def stopped(self) -> bool:
        return self.batch.stop is not None and self.batch.stop.exists()

    def begin(self, part: int | None, pid: int | None = None) -> None:
        sample = None if part is None else self.batch.requests[part].sample.sample_id
        write_status(self.batch, "loading" if part is None else "answering", sample, pid)

    def keep(self, record: SampleLine) -> None:
        self._journal.append(to_json(record))

    @cached_property
    def _journal(self) -> Journal:
        assert self.batch.journal is not None
        return Journal(self.batch.journal)


def run_batch(batch: Batch, on_record: Callable[[], None] | None = None) -> int:
    """Answer a batch and journal each sample as soon as it is done. Returns how many samples were answered: fewer than all
    where the deadline passed or the run is being stopped."""
    job, done = BatchJob(batch), 0
    for line in answer_batch(batch):
        job.keep(line)
        done += 1
        if on_record is not None:
            on_record()
    return done


def answer_batch(batch: Batch) -> Iterator[SampleLine]:
    """One journal line per sample. Raises UserError if the model cannot be loaded."""
    write_status(batch, "loading", None)
    loaded = prepare(batch)
    prefix = Prefix(loaded.lm)
    for _, group in groupby(batch.requests, key=lambda request: request.sample.context):
        prompts = [(request, _prompt(request, batch, loaded.lm)) for request in group]
        room = max((len(p.question_ids) + r.limit for r, p in prompts if isinstance(p, Prompt)), default=0)
        for request, prompt in prompts:
            if _should_stop(batch):
                return
            write_status(batch, "answering", request.sample.sample_id)
            started = time.perf_counter()
            line = answer_sample(request, prompt, batch, loaded, prefix, room)
            line.wall_seconds = time.perf_counter() - started
            yield line
    prefix.drop()


def prepare(batch: Batch) -> LoadedModel:
    """Load the batch's model and build the attention of each of its configurations, unless that is done already.

    A configuration that cannot be built (its weight file is gone) has its failure in `broken`; the others are answered.
    Raises UserError if the model cannot be loaded.
    """
    loaded = _load(batch)
    loaded.attentions = {key: value for key, value in loaded.attentions.items() if key in batch.configs}
    loaded.broken = {}
    for key, config in batch.configs.items():
        if key not in loaded.attentions:
            try:
                loaded.attentions[key] = _attention(config, batch.options.attention_backend, loaded.lm)
            except Exception as error:
                check_device(error)
                loaded.broken[key] = failure(error)
                logger.warning("%s: a configuration cannot be built: %s", batch.task, loaded.broken[key].error_message)
                error.__traceback__ = None
                free_unused()
    return loaded


def forget_model() -> None:
    """Free the model held by this process."""
    global _loaded
    _loaded = None
    free_unused()


def _load(batch: Batch) -> LoadedModel:
    global _loaded
    options = batch.options
    key = (batch.model, options.device, options.dtype, options.dense_backend, str(options.trust_remote_code))
    if _loaded is None or _loaded.key != key:
        forget_model()  # before the next one is loaded: two may not fit
        from sparse_attention_hub.models import load_model

        started = time.perf_counter()
        lm = load_model(
            batch.model,
            device=options.device,
            dtype=options.dtype,
            dense_backend=options.dense_backend,
            trust_remote_code=options.trust_remote_code,
        )
        logger.info("%s loaded on %s in %.1f s", batch.model, lm.device, time.perf_counter() - started)
        _loaded = LoadedModel(key, lm)
    return _loaded


def _attention(config: ResearchAttentionConfig | None, backend: str, lm: LanguageModel) -> ResearchAttention | None:
    if config is None:
        return None
    from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig
    from sparse_attention_hub.models.model_files import complete

    whole = complete(config, lm)  # with the model's own files for parameters that the configuration leaves out
    return ResearchAttention(ResearchAttentionConfig(whole.masker_configs, backend=backend))


def _prompt(request: Request, batch: Batch, lm: LanguageModel) -> Prompt | Exception:
    longest = batch.options.max_context_length
    if lm.max_positions is not None:
        longest = min(longest, lm.max_positions)
    try:
        return build_prompt(
            request.sample,
            lm.tokenizer,
            max_context_length=longest,
            max_new_tokens=request.limit,
            use_chat_template=batch.use_chat_template,
        )
    except Exception as error:
        return error


def _should_stop(batch: Batch) -> bool:
    return (batch.deadline is not None and time.monotonic() > batch.deadline) or BatchJob(batch).stopped()


def write_status(batch: Batch, state: Literal["loading", "answering"], sample_id: str | None, pid: int | None = None) -> None:
    """Record what this worker, or the one with `pid`, is doing: the parent shows it, and after a crash it tells which sample
    was being answered. Losing the file does no harm."""
    if batch.status is None:
        return
    status = WorkerStatus(pid=pid or os.getpid(), state=state, model=batch.model, task=batch.task, sample=sample_id)
    temporary = batch.status.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(status.model_dump_json())
        os.replace(temporary, batch.status)
