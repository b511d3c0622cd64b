"""What a Phase 2 worker does: load a model once, then answer batches of samples and journal each sample at once.

Importing this module is cheap: torch is imported with the first batch, after the worker process has set its threads and devices.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.execution.answer_sample import LoadedModel, Prefix, answer_sample
from benchmark.execution.messages import Request, failure
from benchmark.execution.prompts import make_prompt
from benchmark.plugins import load_plugins
from benchmark.settings import Settings
from benchmark.storage.benchmark_records import SampleLine, WorkerStatus
from benchmark.storage.records import to_json
from benchmark.storage.results import Journal
from benchmark.tasks.base import Prompt
from benchmark.workers.errors import check_device
from benchmark.workers.limits import watch_masks
from benchmark.workers.memory import free_unused
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models.prompts import set_thinking

if TYPE_CHECKING:
    from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig
    from sparse_attention_hub.models import LanguageModel

logger = logging.getLogger("benchmark.phase2")

#: Seconds that a call of `select` may always take in a masker from outside the package; it may take a tenth of
#: --benchmark-timeout too. A masker that hangs leaves time for the other configurations.
SELECT_SECONDS = 60.0

_loaded: LoadedModel | None = None


@dataclass(frozen=True)
class Batch:
    """Some samples of one (model, task), as a pool runs them: a `workers.pools.Job`. Pickled to the worker.

    configs: key -> configuration. device: of the worker; workers: how many share the memory of its machine. most:
    configurations answered at once, None = as many as fit into memory. journal: the file that gets one line per sample.
    status: the file in which the worker writes what it is doing. stop: no sample is started once this file exists.
    """

    model: str
    task: str
    use_chat_template: bool
    configs: dict[str, ResearchAttentionConfig | None]
    requests: tuple[Request, ...]
    settings: Settings
    device: str
    workers: int = 1
    most: int | None = None
    journal: Path | None = None
    status: Path | None = None
    stop: Path | None = None

    @property
    def parts(self) -> int:
        return len(self.requests)

    def run(self, after_each: Callable[[], None] | None = None) -> int:
        done = 0
        for line in answer_batch(self):
            self.keep(line)
            done += 1
            if after_each is not None:
                after_each()
        return done

    def records(self) -> Iterator[SampleLine | None]:
        prepare(self)
        yield None
        yield from answer_batch(self)

    def portable(self) -> Batch:
        return replace(self, journal=None, status=None, stop=None)

    def stopped(self) -> bool:
        return self.stop is not None and self.stop.exists()

    def begin(self, part: int | None) -> None:
        """Write the status: the parent shows it, and after a crash it tells which sample was being answered. Losing it does
        no harm."""
        if self.status is None:
            return
        status = WorkerStatus(sample=None if part is None else self.requests[part].sample.sample_id)
        temporary = self.status.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            temporary.write_text(status.model_dump_json())
            os.replace(temporary, self.status)

    def keep(self, record: SampleLine) -> None:
        self._lines.append(to_json(record))

    @cached_property
    def _lines(self) -> Journal:
        assert self.journal is not None
        return Journal(self.journal)


def answer_batch(batch: Batch) -> Iterator[SampleLine]:
    """One journal line per sample. Raises UserError if the model cannot be loaded."""
    batch.begin(None)
    loaded = prepare(batch)
    prefix, part = Prefix(loaded.lm), itertools.count()
    for _, group in groupby(batch.requests, key=lambda request: request.sample.context):
        prompts = [(request, _prompt(request, batch, loaded.lm)) for request in group]
        room = max((len(p.question_ids) + r.limit for r, p in prompts if isinstance(p, Prompt)), default=0)
        for request, prompt in prompts:
            if batch.stopped():
                return
            batch.begin(next(part))
            started = time.perf_counter()
            line = answer_sample(request, prompt, loaded, prefix, room)
            line.wall_seconds = time.perf_counter() - started
            yield line
    prefix.drop()


def prepare(batch: Batch) -> LoadedModel:
    """Load the batch's model and build the attention of each configuration, where that is not done yet.

    A configuration that cannot be built (its weight file is gone) gets a failure in `broken`; the others are answered.
    Raises UserError if the model cannot be loaded.
    """
    load_plugins(batch.settings.plugin)
    loaded = _load(batch)
    loaded.settings, loaded.workers, loaded.most = batch.settings, batch.workers, batch.most
    loaded.attentions = {key: value for key, value in loaded.attentions.items() if key in batch.configs}
    loaded.broken = {}
    for key, config in batch.configs.items():
        if key not in loaded.attentions:
            try:
                loaded.attentions[key] = _attention(config, batch.settings, loaded.lm)
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
    settings = batch.settings
    key = (batch.model, batch.device, settings.dtype, settings.dense_backend, str(settings.trust_remote_code))
    if _loaded is None or _loaded.key != key:
        forget_model()  # before the next one is loaded: two may not fit
        from sparse_attention_hub.models import load_model

        started = time.perf_counter()
        lm = load_model(
            batch.model,
            device=batch.device,
            dtype=settings.dtype,
            dense_backend=settings.dense_backend,
            trust_remote_code=settings.trust_remote_code,
        )
        logger.info("%s loaded on %s in %.1f s", batch.model, lm.device, time.perf_counter() - started)
        _loaded = LoadedModel(key, lm, settings)
    set_thinking(_loaded.lm.tokenizer, settings.thinking)
    return _loaded


def _attention(config: ResearchAttentionConfig | None, settings: Settings, lm: LanguageModel) -> ResearchAttention | None:
    if config is None:
        return None
    from sparse_attention_hub import ResearchAttention
    from sparse_attention_hub.models.model_files import complete

    whole = complete(config, lm)  # with the model's own files for parameters that the configuration leaves out
    attention = ResearchAttention(replace(whole, backend=settings.attention_backend))
    watch_masks(attention, max(SELECT_SECONDS, settings.benchmark_timeout / 10), "a tenth of --benchmark-timeout")
    return attention


def _prompt(request: Request, batch: Batch, lm: LanguageModel) -> Prompt | Exception:
    settings, longest = batch.settings, batch.settings.max_context_length
    if lm.max_positions is not None:
        longest = min(longest, lm.max_positions)
    prompt, digest = make_prompt(
        request.sample, lm.tokenizer, settings, longest=longest, limit=request.limit, use_chat_template=batch.use_chat_template
    )
    if isinstance(prompt, Prompt) and digest != request.sample_hash:
        return UserError(
            "the worker encodes this prompt or its reference otherwise than the program that started it: use one version of "
            "transformers and tokenizers, and the same model files, on all machines, and start the run again"
        )
    return prompt
