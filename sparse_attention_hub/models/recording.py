"""Records a model's queries and keys for calibration and training; the arguments of these commands, and calibration's whole one."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, check_writable, print_any_text
from .load import LanguageModel, load_model

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


def add_model_arguments(parser: argparse.ArgumentParser, text: str) -> None:
    """The arguments for the model and its texts. text: help of --text."""
    parser.add_argument("--model", required=True, help="model id or folder, e.g. embedded/SmolLM2-135M-Instruct")
    parser.add_argument("--text", help=text)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each text at most (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")


def load_asked_model(options: argparse.Namespace) -> LanguageModel:
    """The model that these arguments name."""
    return load_model(options.model, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code)


def calibrate_command(
    masker: str,
    what: str,
    file: str,
    calibrate: Callable[[LanguageModel, list[str] | None, int, Path], str],
    arguments: Sequence[str] | None,
) -> int:
    """The command line of a masker module whose method is calibrated: with --model it finds `what` and writes a `file` of it;
    without, it draws the masker's mask as every masker module does. calibrate(lm, texts, tokens, out) writes the file and
    says what is in it. The exit code: 0, or 2 for bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not any(word in ("-h", "--help", "--model") or word.startswith("--model=") for word in given):
        from ..maskers.drawing import main as draw_main

        draw_main(masker, given)
        return 0
    parser = argparse.ArgumentParser(
        prog=f"python -m sparse_attention_hub.maskers.{masker}",
        description=f"Find {what}. Without --model: draw the masker's mask to --out, a PNG file.",
    )
    add_model_arguments(parser, text='a text file to calibrate on, texts separated by lines of "---" (default: generated)')
    parser.add_argument("--out", required=True, type=Path, help=f"the {file} file to write")
    options = parser.parse_args(given)
    print_any_text()
    try:
        check_writable(options.out)
        texts = read_texts(options.text) if options.text else None
        lm = load_asked_model(options)
        with torch.inference_mode():
            found = calibrate(lm, texts, options.tokens, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: {found}")
    return 0


def sample_texts(count: int, seed: int = 0, characters: int = 12_000) -> list[str]:
    """English prose (Python's own manual pages) with facts inserted, and questions with answers about the
    facts at the end. Equal for equal seed and Python version."""
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
        questions = []
        for name in chance.sample(_NAMES, 6):
            kind, number = chance.choice(_KINDS), str(chance.randrange(10**5, 10**7))
            templates = chance.choice(_FACTS)
            fact, question, answer = (line.format(name=name.capitalize(), kind=kind, number=number) for line in templates)
            questions.append(f"Question: {question}\nAnswer: {answer}")
            prose.insert(chance.randrange(len(prose)), fact)
        texts.append("\n\n".join(prose) + "\n\n" + "\n".join(questions))
    return texts


def read_texts(path: str) -> list[str]:
    """The texts of a file, separated by lines of "---". UserError if there is none."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--text must be an existing text file, got {path!r}")
    texts = [part.strip() for part in file.read_text(encoding="utf-8-sig", errors="replace").split("\n---\n")]
    if not any(texts):
        raise UserError(f"{path} holds no text")
    return [text for text in texts if text]


def encode_text(lm: LanguageModel, text: str, tokens: int) -> list[int]:
    """A text's token ids, BOS included. Longer texts lose their middle: at most `tokens`. UserError for less than 8 tokens."""
    ids: list[int] = lm.tokenizer.encode(text, add_special_tokens=False)
    if lm.tokenizer.bos_token_id is not None:
        ids = [lm.tokenizer.bos_token_id, *ids]
    limit = min(tokens, lm.max_positions or tokens)
    if len(ids) > limit:
        ids = ids[: limit // 2] + ids[len(ids) - (limit - limit // 2) :]
    if len(ids) < 8:
        raise UserError(f"a text must have 8 tokens or more, got {len(ids)}")
    return ids


def record(lm: LanguageModel, texts: list[str], tokens: int) -> Iterator[Recording]:
    """Run each text through the model, densely. Queries and keys are post-RoPE, in the model's dtype; query
    i is at position i + 1. Longer texts lose their middle: n <= `tokens`.

    UserError for a text of less than 8 tokens, or a model that has sliding-window layers only.
    """
    from .session import forced_many, prefill

    for text in texts:
        ids = encode_text(lm, text, tokens)
        recording: Recording = {}

        def keep(*, layer_idx: int, queries: Tensor, keys: Tensor, into: Recording = recording, **_: Any) -> None:
            into[layer_idx] = (queries[0].clone(), keys[0].clone())

        forced_many(lm, prefill(lm, ids[:1], len(ids)), ids[1:], ids[-1:], [None], recorders=[keep])
        if not recording:
            raise UserError(f"model {lm.id!r} has no layer with full attention to record: take another model")
        yield dict(sorted(recording.items()))
