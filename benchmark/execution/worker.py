"""What a Phase 2 worker does: load a model once, then answer blocks of samples, each journalled as soon as it is done.

Importing this module is cheap: torch is imported with the first block, after a worker process has set its threads and
its devices.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmark.execution.answer_sample import LoadedModel, Prefix, answer_sample
from benchmark.execution.messages import Block, Request, failure
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
class BlockJob:
    """A block as a pool runs it: a `workers.pools.Job`."""

    block: Block

    @property
    def parts(self) -> int:
        return len(self.block.requests)

    def run(self, deadline: float | None = None, on_record: Callable[[], None] | None = None) -> int:
        return run_block(replace(self.block, deadline=deadline), on_record)

    def records(self) -> Iterator[Any]:
        prepare(self.block)
        yield os.getpid()
        yield from answer_block(self.block)

    def portable(self) -> BlockJob:
        return BlockJob(replace(self.block, journal=None, status=None, stop=None))

    def stopped(self) -> bool:
        return self.block.stop is not None and self.block.stop.exists()

    def begin(self, part: int | None, pid: int | None = None) -> None:
        sample = None if part is None else self.block.requests[part].sample.sample_id
        tell(self.block, "loading" if part is None else "answering", sample, pid)

    def keep(self, record: dict[str, Any]) -> None:
        self._journal.append(record)

    @cached_property
    def _journal(self) -> Journal:
        assert self.block.journal is not None
        return Journal(self.block.journal)


def run_block(block: Block, on_record: Callable[[], None] | None = None) -> int:
    """Answer a block, journal each sample as soon as it is done, return how many were. Stops early when told to."""
    assert block.journal is not None
    journal = Journal(block.journal)
    done = 0
    for record in answer_block(block):
        journal.append(record)
        done += 1
        if on_record is not None:
            on_record()
    return done


def answer_block(block: Block) -> Iterator[dict[str, Any]]:
    """One journal record a sample. Raises UserError if the model cannot be loaded."""
    tell(block, "loading", None)
    loaded = prepare(block)
    prefix = Prefix(loaded.lm)
    for group in _same_context(block.requests):
        prompts = [_prompt(request, block, loaded.lm) for request in group]
        room = max(
            (len(p.question_ids) + r.limit for p, r in zip(prompts, group, strict=True) if isinstance(p, Prompt)),
            default=0,
        )
        for request, prompt in zip(group, prompts, strict=True):
            if _should_stop(block):
                return
            tell(block, "answering", request.sample.sample_id)
            started = time.perf_counter()
            record = answer_sample(request, prompt, block, loaded, prefix, room)
            record["wall_seconds"] = time.perf_counter() - started
            yield record
    prefix.drop()


def prepare(block: Block) -> LoadedModel:
    """Load the block's model and make its configurations' attentions, where that is not done yet.

    A configuration that cannot be made (a file of its weights is gone) has its failure in `broken` and keeps nobody else
    from being answered. Raises UserError if the model cannot be loaded.
    """
    loaded = _load(block)
    loaded.attentions = {key: value for key, value in loaded.attentions.items() if key in block.configs}
    loaded.broken = {}
    for key, config in block.configs.items():
        if key not in loaded.attentions:
            try:
                loaded.attentions[key] = _attention(config, block.options.attention_backend, loaded.lm)
            except Exception as error:
                check_device(error)
                loaded.broken[key] = failure(error)
                logger.warning("%s: a configuration cannot be made: %s", block.task, loaded.broken[key]["error_message"])
                error.__traceback__ = None
                free_unused()
    return loaded


def forget_model() -> None:
    """Free the model held by this process."""
    global _loaded
    _loaded = None
    free_unused()


def _load(block: Block) -> LoadedModel:
    global _loaded
    options = block.options
    key = (block.model, options.device, options.dtype, options.dense_backend, str(options.trust_remote_code))
    if _loaded is None or _loaded.key != key:
        forget_model()  # before the next one comes: two may not fit
        from sparse_attention_hub.models import load_model

        started = time.perf_counter()
        lm = load_model(
            block.model,
            device=options.device,
            dtype=options.dtype,
            dense_backend=options.dense_backend,
            trust_remote_code=options.trust_remote_code,
        )
        logger.info("%s loaded on %s in %.1f s", block.model, lm.device, time.perf_counter() - started)
        _loaded = LoadedModel(key, lm)
    return _loaded


def _attention(config: ResearchAttentionConfig | None, backend: str, lm: LanguageModel) -> ResearchAttention | None:
    if config is None:
        return None
    from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig
    from sparse_attention_hub.models.model_files import complete

    whole = complete(config, lm)  # with the model's own files, where a configuration leaves them out
    return ResearchAttention(ResearchAttentionConfig(whole.masker_configs, backend=backend))


def _prompt(request: Request, block: Block, lm: LanguageModel) -> Prompt | Exception:
    longest = block.options.max_context_length
    if lm.max_positions is not None:
        longest = min(longest, lm.max_positions)
    try:
        return build_prompt(
            request.sample,
            lm.tokenizer,
            max_context_length=longest,
            max_new_tokens=request.limit,
            use_chat_template=block.use_chat_template,
        )
    except Exception as error:
        return error


def _same_context(requests: Sequence[Request]) -> Iterator[list[Request]]:
    group: list[Request] = []
    for request in requests:
        if group and group[-1].sample.context != request.sample.context:
            yield group
            group = []
        group.append(request)
    if group:
        yield group


def _should_stop(block: Block) -> bool:
    if block.deadline is not None and time.monotonic() > block.deadline:
        return True
    return block.stop is not None and block.stop.exists()


def tell(block: Block, state: str, sample_id: str | None, pid: int | None = None) -> None:
    """Say what this worker (or that of `pid`) is doing, for the progress lines and for judging a death. Lost at a crash
    without harm."""
    if block.status is None:
        return
    text = json.dumps(
        {"pid": pid or os.getpid(), "state": state, "model": block.model, "task": block.task, "sample": sample_id}
    )
    temporary = block.status.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(text)
        os.replace(temporary, block.status)
