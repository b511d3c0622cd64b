"""The prompts of Phase 2, and the identity of a sample: the tokens that are sent, not the text before the chat template."""

from __future__ import annotations

from typing import Any

from benchmark.settings import Settings
from benchmark.storage.results import fingerprint
from benchmark.tasks.base import Prompt, Sample, SampleRequest, Task, build_prompt
from benchmark.tasks.limits import fitted, naming
from sparse_attention_hub.models.prompts import encode_continuation


def sample_request(tokenizer: Any, task: Task, model: str, settings: Settings) -> SampleRequest:
    """The test samples of a task, no longer than the model takes. ContextTooShortError as `fitted`."""
    request = SampleRequest(
        tokenizer,
        seed=settings.seed,
        max_samples=settings.max_requests,
        max_context_length=settings.max_context_length,
        data_dir=settings.data_dir,
        trust_remote_code=settings.trust_remote_code,
    )
    return fitted(request, task, model)


def make_prompt(
    sample: Sample, tokenizer: Any, settings: Settings, *, longest: int, limit: int, use_chat_template: bool
) -> tuple[Prompt | Exception, str]:
    """(the prompt, or why there is none; `sample_hash`). longest: tokens at most, answer included; limit: of the answer."""
    prompt: Prompt | Exception
    try:
        with naming("--max-context-length", settings.max_context_length, longest):
            prompt = build_prompt(
                sample, tokenizer, max_context_length=longest, max_new_tokens=limit, use_chat_template=use_chat_template
            )
    except Exception as error:
        prompt = error
    return prompt, sample_hash(sample, prompt, tokenizer, limit)


def sample_hash(sample: Sample, prompt: Prompt | Exception, tokenizer: Any, limit: int) -> str:
    """A hash of everything in a sample that determines an answer and its reference_nll: the token ids of context, question and
    first reference answer, and the answer's length. Text takes the place of what cannot be encoded."""
    if isinstance(prompt, Exception):
        sent: list[Any] = [sample.context, sample.question, sample.answer_prefix, sample.references[:1]]
    else:
        sent = [prompt.context_ids, prompt.question_ids]
        try:
            sent += [reference_ids(tokenizer, prompt, reference) for reference in sample.references[:1]]
        except Exception:  # recorded as reference_error with each answer
            sent += sample.references[:1]
    return fingerprint([sample.sample_id, *sent, limit])


def reference_ids(tokenizer: Any, prompt: Prompt, reference: str) -> list[int]:
    """Tokens of a reference answer as it would follow the prompt: after a space, unless the prompt ends with white
    space or a special token."""
    end = tokenizer.decode(list(prompt.question_ids[-1:]), skip_special_tokens=True)
    text = reference if not end or end[-1:].isspace() else " " + reference.lstrip()
    return encode_continuation(tokenizer, text)
