"""What a model's queries and keys look like on some text: the raw material of calibration and training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from .load import LanguageModel

#: {layer: (queries (H, n - 1, D), keys (Hkv, n, D))}
Recording = dict[int, tuple[Tensor, Tensor]]

_FACTS = (
    ("The special {kind} for {name} is {number}.", "What is the special {kind} for {name}?", "{number}"),
    ("{name} keeps the {kind} {number} in the blue drawer.", "Which {kind} does {name} keep?", "{number}"),
    ("On that day {name} wrote down the {kind}: {number}.", "What {kind} did {name} write down?", "{number}"),
)
_NAMES = (
    *("amber", "birch", "cedar", "delta", "ember", "falcon", "garnet", "harbor"),
    *("indigo", "juniper", "kestrel", "lagoon", "meadow", "nectar", "orchid"),
)
_KINDS = ("magic number", "pass key", "room code", "account number")


def sample_texts(count: int, seed: int = 0, characters: int = 12_000) -> list[str]:
    """Texts that every Python installation can make: English prose (Python's own manual pages) with facts strewn in, and
    questions about the facts with their answers at the end. The same for the same seed and Python version."""
    from pydoc_data.topics import topics

    pages = [topics[name] for name in sorted(topics)]
    texts = []
    for index in range(count):
        chance = random.Random(f"{seed} {index}")
        prose: list[str] = []
        while sum(map(len, prose)) < characters:
            page = chance.choice(pages)
            start = chance.randrange(max(1, len(page) - 3000))
            prose += [part for part in page[start : start + 3000].split("\n\n") if part.strip()]
        known = []
        for name in chance.sample(_NAMES, 6):
            fact = {
                "name": name.capitalize(),
                "kind": chance.choice(_KINDS),
                "number": str(chance.randrange(10**5, 10**7)),
            }
            told, asked, answer = (line.format(**fact) for line in chance.choice(_FACTS))
            known.append(f"Question: {asked}\nAnswer: {answer}")
            prose.insert(chance.randrange(len(prose)), told)
        texts.append("\n\n".join(prose) + "\n\n" + "\n".join(known))
    return texts


def read_texts(path: str) -> list[str]:
    """The texts of a user's file: separated by lines of "---", or the whole file as one. UserError if there is none."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--text must be an existing text file, got {path!r}")
    texts = [part.strip() for part in file.read_text(encoding="utf-8", errors="replace").split("\n---\n")]
    if not any(texts):
        raise UserError(f"{path} holds no text")
    return [text for text in texts if text]


def record(lm: LanguageModel, texts: list[str], tokens: int) -> Iterator[Recording]:
    """Run each text through the model, densely: for every layer, post-RoPE queries (H, n - 1, D) and keys (Hkv, n, D) in
    the model's dtype; query i stands at position i + 1. A text is cut in its middle to n <= `tokens` tokens.

    UserError for a text that is too short (8 tokens), or a model that has sliding-window layers only.
    """
    from .session import forced, prefill

    for text in texts:
        ids = lm.tokenizer.encode(text, add_special_tokens=False)
        if lm.tokenizer.bos_token_id is not None:
            ids = [lm.tokenizer.bos_token_id, *ids]
        limit = min(tokens, lm.max_positions or tokens)
        if len(ids) > limit:
            ids = ids[: limit // 2] + ids[len(ids) - (limit - limit // 2) :]
        if len(ids) < 8:
            raise UserError(f"a text must have 8 tokens or more, got {len(ids)}")
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(
            *, layer_idx: int, queries: Tensor, keys: Tensor, found: dict[int, tuple[Tensor, Tensor]] = found, **_: Any
        ) -> None:
            found[layer_idx] = (queries[0].clone(), keys[0].clone())

        forced(lm, prefill(lm, ids[:1], len(ids)), ids[1:], ids[-1:], None, recorder=keep)
        if not found:
            raise UserError(f"model {lm.id!r} has no layer with full attention to record: take another model")
        yield dict(sorted(found.items()))
