"""The longest prompt: the context length of the request, but no more tokens than the model has positions."""

from __future__ import annotations

import functools
from dataclasses import replace

from benchmark.tasks.base import ContextTooShortError, SampleRequest, Task


def within_model(request: SampleRequest) -> SampleRequest:
    """The request, its context length lowered to the model's positions if its configuration gives their number."""
    positions = _positions(request)
    return request if positions is None else replace(request, max_context_length=min(positions, request.max_context_length))


def fitted(request: SampleRequest, task: Task, model: str) -> SampleRequest:
    """`within_model`, but ContextTooShortError if the task has a fixed length that does not fit: it is never truncated."""
    length, positions = task.fixed_length, _positions(request)
    if length is not None and positions is not None and length > positions:
        raise ContextTooShortError(
            f"{task.name} fills {length} tokens, {model} takes {positions} at most: take a shorter task or another model"
        )
    if length is not None and length > request.max_context_length:
        raise ContextTooShortError(
            f"{task.name} fills {length} tokens, more than --max-context-length {request.max_context_length}: "
            f"give --max-context-length {length} or take a shorter task"
        )
    return within_model(request)


def _positions(request: SampleRequest) -> int | None:
    # The configuration is where the tokenizer came from. A tokenizer's own model_max_length is often not set.
    return _positions_of(getattr(request.tokenizer, "name_or_path", ""), request.trust_remote_code)


@functools.cache
def _positions_of(path: str, trust_remote_code: bool) -> int | None:
    if not path:
        return None
    from sparse_attention_hub.models.notices import quiet_transformers

    try:
        with quiet_transformers():
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config(decoder=True)
    except (OSError, ValueError):  # loading the model will say what is wrong with it
        return None
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions
