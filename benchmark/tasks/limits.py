"""The longest prompt: the context length of the request, but no more tokens than the model has positions."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from benchmark.tasks.base import ContextTooShortError, SampleRequest, Task


def longest_prompt(tokenizer: Any, asked: int, trust_remote_code: bool) -> int:
    """The context length asked for, or the model's positions if its configuration gives a smaller number."""
    # The configuration is where the tokenizer came from. A tokenizer's own model_max_length is often not set.
    positions = _positions(getattr(tokenizer, "name_or_path", ""), trust_remote_code)
    return asked if positions is None else min(positions, asked)


def within_model(request: SampleRequest) -> SampleRequest:
    """The request with `longest_prompt` as its context length."""
    longest = longest_prompt(request.tokenizer, request.max_context_length, request.trust_remote_code)
    return replace(request, max_context_length=longest)


def fitted(request: SampleRequest, task: Task, model: str) -> SampleRequest:
    """`within_model`, but ContextTooShortError if the task has a fixed length that does not fit: it is never truncated."""
    length = task.fixed_length or 0
    positions = longest_prompt(request.tokenizer, length, request.trust_remote_code)
    if length > positions:
        raise ContextTooShortError(
            f"{task.name} fills {length} tokens, {model} takes {positions} at most: take a shorter task or another model"
        )
    if length > request.max_context_length:
        raise ContextTooShortError(
            f"{task.name} fills {length} tokens, more than --max-context-length {request.max_context_length}: "
            f"give --max-context-length {length} or take a shorter task"
        )
    return within_model(request)


@contextmanager
def naming(flag: str, asked: int, allowed: int) -> Iterator[None]:
    """Add to a ContextTooShortError what bounds the context length: the flag, or the model where it allows less than asked."""
    try:
        yield
    except ContextTooShortError as error:
        bound = f"raise {flag}" if allowed >= asked else "the model takes no more"
        raise ContextTooShortError(f"{error}: {bound}") from None


@functools.cache
def _positions(path: str, trust_remote_code: bool) -> int | None:
    if not path:
        return None
    from sparse_attention_hub.models.config_checks import max_positions
    from sparse_attention_hub.models.notices import quiet_transformers

    try:
        with quiet_transformers():
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config(decoder=True)
    except (OSError, ValueError):  # loading the model will say what is wrong with it
        return None
    return max_positions(config)
