"""Blocks of samples: what the parent hands to a worker, and what both write into journals. Plain data, cheap to
import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.tasks.base import Sample
from sparse_attention_hub.errors import UserError

if TYPE_CHECKING:
    from sparse_attention_hub import ResearchAttentionConfig


@dataclass(frozen=True)
class Request:
    """One sample's work: under which configurations (keys of Block.configs) it is still to be answered."""

    sample: Sample
    sample_hash: str
    seed: int
    limit: int  # new tokens
    configs: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """What is alike for all blocks of a run; the fields of Settings that a worker needs."""

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
class Block:
    """Some samples of one (model, task). Pickled to the worker; records go to `journal`, whole samples at a time.

    deadline: time.monotonic() after which no sample is started, for a worker inside the parent's own process. most: how many
    configurations may be asked at once, None = as many as fit.
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


def failure(error: BaseException | str, status: str = "failed") -> dict[str, Any]:
    """A failure record: what is journalled in the place of an answer."""
    text = error if isinstance(error, str) else (" ".join(str(error).split()) or "no message")
    name = "" if isinstance(error, (str, UserError)) else f"{type(error).__name__}: "
    return {"status": status, "error_message": f"{name}{text}"[:500]}
