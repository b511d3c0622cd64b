"""Tuning samples: the samples of a task on which Phase 1 tries configurations. Phase 2 never scores them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmark.settings import Settings
from benchmark.storage.fingerprints import code_of
from benchmark.storage.results import fingerprint
from benchmark.tasks import get_task
from benchmark.tasks.base import Prompt, Sample, SampleRequest, Task, answer_seed, build_prompt
from benchmark.tasks.limits import within_model
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models.prompts import set_thinking


@dataclass(frozen=True)
class TuningSample:
    """A sample and its prompt. seed: of its sampling maskers, the same for every configuration."""

    sample: Sample
    prompt: Prompt
    max_new_tokens: int
    seed: int


def tuning_samples(tokenizer: Any, task_name: str, settings: Settings) -> list[TuningSample]:
    """The tuning samples of a task, at the search's context length or the model's if that is shorter.

    UserError if the task has none, or a question does not fit.
    """
    set_thinking(tokenizer, settings.thinking)
    task = get_task(task_name)
    request = within_model(
        SampleRequest(
            tokenizer=tokenizer,
            split="tuning",
            seed=settings.seed,
            max_samples=settings.search_max_requests,
            max_context_length=settings.search_max_context_length,
            data_dir=settings.data_dir,
            trust_remote_code=settings.trust_remote_code,
        )
    )
    longest = request.max_context_length
    if task.fixed_length is not None:
        request = replace(request, length=min(task.fixed_length, longest))
    prepared = []
    for sample in task.samples(request):
        new_tokens = min(sample.max_new_tokens, settings.search_max_new_tokens)
        prompt = build_prompt(
            sample,
            tokenizer,
            max_context_length=longest,
            max_new_tokens=new_tokens,
            use_chat_template=task.use_chat_template,
        )
        prepared.append(TuningSample(sample, prompt, new_tokens, answer_seed(settings.seed, sample.sample_id)))
    if not prepared:
        raise UserError(
            f"task {task_name!r} has no tuning samples: its data have too few rows; add some or choose another task"
        )
    return prepared


def samples_key(samples: list[TuningSample], task: Task) -> str:
    """A hash of the samples: prompts, references and all else that scoring uses, seeds, and the code of a user's task."""
    code = code_of(type(task))
    return fingerprint([*(repr(sample) for sample in samples), *([] if code is None else [code])])
