"""What the parent process asks of a worker, and the failures that both record. Plain data, cheap to import."""

from __future__ import annotations

from dataclasses import dataclass

from benchmark.progress import printable
from benchmark.storage.benchmark_records import Answer, AnswerStatus
from benchmark.storage.results import valid_text
from benchmark.tasks.base import Sample
from sparse_attention_hub.errors import UserError


@dataclass(frozen=True)
class Request:
    """One sample, and the configurations (keys of Batch.configs) for which an answer is missing. limit: new tokens."""

    sample: Sample
    sample_hash: str
    seed: int
    limit: int
    configs: tuple[str, ...]


def failure(error: BaseException | str, status: AnswerStatus = "failed") -> Answer:
    """The failure that is journalled instead of an answer."""
    return Answer(status=status, error_message=error_message(error))


def error_message(error: BaseException | str) -> str:
    """One line of at most 500 characters, with the type of errors that are no UserError."""
    text = error if isinstance(error, str) else (" ".join(str(error).split()) or "no message")
    name = "" if isinstance(error, (str, UserError)) else f"{type(error).__name__}: "
    return printable(valid_text(f"{name}{text}"))[:500]
