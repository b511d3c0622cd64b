"""A tokenizer small enough to see through: one token a word, mark or white-space character, or special text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


class FakeTokenizer:
    def __init__(
        self,
        template: Callable[[str], str] | None = None,
        bos: str | None = None,
        adds_bos: bool = False,
    ) -> None:
        self.name_or_path = ""
        self.template = template
        self.chat_template = "yes" if template else None
        self.adds_bos = adds_bos
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []
        self.bos_token_id = None if bos is None else self._id(bos)
        self.encodes = 0

    def _id(self, text: str) -> int:
        if text not in self._ids:
            self._ids[text] = len(self._texts)
            self._texts.append(text)
        return self._ids[text]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.encodes += 1
        ids = [self._id(piece) for piece in re.findall(r"<\|?\w+\|?>|\w+|[^\w\s]|\s", text)]
        if add_special_tokens and self.adds_bos and self.bos_token_id is not None:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self._texts[i] for i in ids)

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool = True, add_generation_prompt: bool = False, **_: Any
    ) -> Any:
        assert self.template is not None and not tokenize and add_generation_prompt
        (message,) = messages
        assert message["role"] == "user"
        return self.template(message["content"])


def tokenizer_of(folder: Path, positions: int, **config: Any) -> FakeTokenizer:
    """The tokenizer of a model with so many positions, whose configuration is written into the folder."""
    config |= {"model_type": "llama", "max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = FakeTokenizer()
    tokenizer.name_or_path = str(folder)
    return tokenizer


def chatml(content: str) -> str:
    return f"<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def stripping(content: str) -> str:
    """Renders BOS itself and strips the message."""
    return f"<s>[INST] {content.strip()} [/INST]"
