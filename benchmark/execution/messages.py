"""What the parent process hands to a worker: batches of samples. Plain data, cheap to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.storage.records import Answer
from benchmark.tasks.base import Sample
from sparse_attention_hub.errors import UserError

if TYPE_CHECKING:
    from sparse_attention_hub import ResearchAttentionConfig


@dataclass(frozen=True)
class Request:
    """One sample and the configurations (keys of Batch.configs) that it has no answer under yet."""

    sample: Sample
    sample_hash: str
    seed: int
    limit: int  # new tokens
    configs: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """The fields of Settings that a worker needs, equal for all batches of a run."""

    device: str = "auto"
    dtype: str = "auto"
    dense_backend: str = "auto"
    attention_backend: str = "auto"
    trust_remote_code: bool = False
    max_context_length: int = 64000
    sparse_from: str = "question"
    micro_metrics: str = "sample"
    workers: int = 1  # that share this machine's memory


@dataclass(frozen=True)
class Batch:
    """Some samples of one (model, task). Pickled to the worker, which appends one line per sample to `journal`.

    status: the file in which the worker says what it is doing. stop: no sample is started once this file exists.
    deadline: time.monotonic() after which no sample is started, for a worker inside the parent's own process.
    most: configurations asked at once, None = as many as fit into memory.
    """

    model: str
    task: str
    use_chat_template: bool
    configs: dict[str, ResearchAttentionConfig | None]
    requests: tuple[Request, ...]
    options: Options
    journal: Path | None = None
    status: Path | None = None
    stop: Path | None = None
    deadline: float | None = None
    most: int | None = None


def failure(error: BaseException | str, status: str = "failed") -> Answer:
    """The failure that is journalled in place of an answer."""
    return Answer(status=status, error_message=error_message(error))


def error_message(error: BaseException | str) -> str:
    """One line of at most 500 characters, with the type of errors that are no UserError."""
    text = error if isinstance(error, str) else (" ".join(str(error).split()) or "no message")
    name = "" if isinstance(error, (str, UserError)) else f"{type(error).__name__}: "
    return f"{name}{text}".encode(errors="backslashreplace").decode()[:500]
