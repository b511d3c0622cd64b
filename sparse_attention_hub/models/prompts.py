"""From text to tokens: chat templates rendered safely and alike on every day, and texts encoded as continuations of others."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, tzinfo
from typing import Any, Self

from ..errors import UserError, quoted

#: What a chat template gets as today's date, so that prompts do not depend on the clock. Llama 3.1's own default.
TEMPLATE_DATE = datetime(2024, 7, 26)
#: Seconds after which a chat template counts as one that never ends.
RENDER_SECONDS = 20.0
_RENDERING = threading.Lock()
#: Variables with which chat templates switch thinking on or off.
_THINKING = ("enable_thinking", "thinking")
#: Texts behind which a continuation is encoded; the first that stays apart from it is used.
_MARKERS = ("\n", "=", "|", "0")


def render_chat(tokenizer: Any, content: str, **options: Any) -> str:
    """The text of a conversation with one message of the user, up to where the answer begins. options: for the template, beside
    those of `set_thinking`.

    UserError, one line, for a template that cannot be rendered.
    """
    messages = [{"role": "user", "content": content}]
    options = getattr(tokenizer, "thinking_options", {}) | options
    try:
        with _fixed_date(), _deadline(RENDER_SECONDS):
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except TimeoutError:
        raise UserError(
            f"the tokenizer's chat template does not end within {RENDER_SECONDS:g} s: correct or remove it"
        ) from None
    except Exception as error:  # whatever its code does
        raise UserError(
            f"the tokenizer's chat template cannot be rendered ({type(error).__name__}: {quoted(error)}): correct or remove it"
        ) from None
    return text


def set_thinking(tokenizer: Any, thinking: str) -> None:
    """Choose whether the tokenizer's chat template asks for thinking: "on", "off", or "auto" for the template's own default.
    Templates that do not know the option ignore it."""
    # enable_thinking: Qwen, GLM, SmolLM3. thinking: DeepSeek, Granite.
    tokenizer.thinking_options = {} if thinking == "auto" else dict.fromkeys(_THINKING, thinking == "on")


def knows_thinking(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template reads what `set_thinking` chooses."""
    return re.search(rf"\b({'|'.join(_THINKING)})\b", str(tokenizer.chat_template)) is not None


def opens_thinking(tokenizer: Any) -> bool:
    """Whether a prompt from the tokenizer's chat template ends inside the model's thinking."""
    return bool(getattr(tokenizer, "chat_template", None)) and render_chat(tokenizer, "Hello").rstrip().endswith("<think>")


def without_thinking(answer: str, opened: bool) -> str | None:
    """The answer after its thinking, all of it if there is none; None if the thinking does not end. opened: it begins in the
    prompt."""
    _, end, rest = answer.rpartition("</think>")
    if end:
        return rest.lstrip()
    return None if opened or answer.lstrip().startswith("<think>") else answer


class _FixedDate(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(*TEMPLATE_DATE.timetuple()[:6], tzinfo=tz)


@contextmanager
def _fixed_date() -> Iterator[None]:
    """Inside, the `strftime_now` that transformers gives to chat templates knows TEMPLATE_DATE only."""
    utils: Any = sys.modules.get("transformers.utils.chat_template_utils")
    with _RENDERING:
        if utils is None:  # a tokenizer that is not of transformers
            yield
            return
        before = utils.datetime
        utils.datetime = _FixedDate
        try:
            yield
        finally:
            utils.datetime = before


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """TimeoutError in this thread after so many seconds, at its next Python instruction."""
    raise_in, thread, lock = ctypes.pythonapi.PyThreadState_SetAsyncExc, ctypes.c_ulong(threading.get_ident()), threading.Lock()
    done = False

    def stop() -> None:
        with lock:
            if not done:
                raise_in(thread, ctypes.py_object(TimeoutError))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            done = True


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that follows other text, without special tokens.

    Tokenizers in the manner of SentencePiece put a space before what they encode. Behind a marker, which is then cut off, a text
    gets none.
    """
    if not text:
        return []
    if _adds_space(tokenizer):
        for marker in _MARKERS:
            behind = _behind(tokenizer, marker, text)
            if behind is not None:
                return behind
    return list(tokenizer.encode(text, add_special_tokens=False))


@functools.lru_cache(maxsize=8)
def _adds_space(tokenizer: Any) -> bool:
    """Whether a letter by itself is encoded otherwise than behind another text."""
    alone = list(tokenizer.encode("a", add_special_tokens=False))
    behind = [_behind(tokenizer, marker, "a") for marker in _MARKERS]
    return any(ids is not None and ids != alone for ids in behind)


def _behind(tokenizer: Any, marker: str, text: str) -> list[int] | None:
    """Tokens of the text behind a marker, None if they do not begin with the marker's own."""
    own = list(tokenizer.encode(marker, add_special_tokens=False))
    both = list(tokenizer.encode(marker + text, add_special_tokens=False))
    return both[len(own) :] if own and both[: len(own)] == own else None
