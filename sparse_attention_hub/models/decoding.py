"""Decoding: rows of a batch that follow their own choices or a given answer, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .load import LanguageModel
from .lockstep import Lockstep, Row
from .step_graphs import StepGraphs


@dataclass(frozen=True)
class Answer:
    """token_ids end with the EOS token if stopped == "eos"; text leaves special tokens out. seconds: from
    the start of the batch to this answer's last token. density and kv_fraction: means over query rows and
    sparse layers (None where no row was sparse)."""

    token_ids: list[int]
    text: str
    stopped: Literal["eos", "length"]
    seconds: float
    density: float | None
    kv_fraction: float | None


@dataclass(frozen=True)
class Forced:
    """nll: mean negative log-likelihood of the answer's tokens, in nats. reproduced: every argmax is the answer's token."""

    nll: float
    reproduced: bool
    density: float | None
    kv_fraction: float | None


def decode(
    batch: Lockstep, logits: Tensor, max_new_tokens: int, *, given: Sequence[int] = (), forking: bool = False
) -> tuple[list[tuple[Tensor, Tensor]], dict[int, Row]]:
    """Feed each row the tokens that it chooses, until EOS or the last one; with a given answer, feed the rows its tokens instead.

    forking: where a row first chooses another token than the given one, a fork of it follows its own choices.
    Returns what `predicted` says of each given token, and the forks, by the index of the row that they left.
    """
    lm, cache, count = batch.lm, batch.prefilled.cache, len(batch.rows)
    target = torch.tensor(given, device=lm.device)
    predictions: list[tuple[Tensor, Tensor]] = []
    forks: dict[int, Row] = {}
    graphs = StepGraphs(batch)
    while True:
        check_finite(logits, batch)
        chosen = logits[:, -1].argmax(dim=-1)
        place, choices = len(predictions), chosen.tolist()
        forced = count if place < len(given) else 0  # rows; forks come after them
        fed: list[tuple[int, int, Row]] = []  # (index in the batch, token, row) of the next step
        if forced:
            predictions.append(predicted(logits[:forced], target[place : place + 1]))
            for index, row in enumerate(batch.rows[:forced]):
                if place + 1 < len(given):
                    fed.append((index, given[place], row))
                row.seconds = batch.elapsed()
        for index, (row, token) in enumerate(zip(batch.rows, choices, strict=True)):
            if index < forced:
                if not forking or index in forks or token == given[place]:
                    continue
                row = forks[index] = row.fork(given[:place], cache.get_seq_length())
            row.tokens.append(token)
            if token in lm.eos_token_ids or len(row.tokens) == max_new_tokens:
                row.seconds = batch.elapsed()
            else:
                fed.append((index, token, row))
        if not fed:
            return predictions, forks
        indices, tokens, rows = (list(part) for part in zip(*fed, strict=True))
        if indices != list(range(len(batch.rows))):
            cache.select(indices)
        batch.rows = rows
        batch.step += 1
        ids = chosen if tokens == choices else torch.tensor(tokens, device=lm.device)
        logits = graphs.forward(ids[:, None])


def answer_of(lm: LanguageModel, row: Row) -> Answer:
    return Answer(
        token_ids=row.tokens,
        text=lm.tokenizer.decode(row.tokens, skip_special_tokens=True),
        stopped="eos" if row.tokens[-1] in lm.eos_token_ids else "length",
        seconds=row.seconds,
        density=row.density,
        kv_fraction=row.kv_fraction,
    )


def forced_of(rows: Sequence[Row], predictions: Sequence[tuple[Tensor, Tensor]]) -> list[Forced]:
    """What `predicted` said of all tokens of an answer, for each row."""
    losses, hits = (torch.cat(parts, 1) for parts in zip(*predictions, strict=True))
    return [
        Forced(float(nll), bool(hit), row.density, row.kv_fraction)
        for row, nll, hit in zip(rows, losses.mean(1), hits.all(1), strict=True)
    ]


def predicted(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood, whether the argmax is the token), both (rows, n), of the n target tokens
    under logits (rows, n, V). One row at a time, because float32 copies of logits are large."""
    target = target.to(logits.device)
    losses = [torch.nn.functional.cross_entropy(scores.float(), target, reduction="none") for scores in logits]
    return torch.stack(losses), logits.argmax(dim=-1) == target


def check_finite(logits: Tensor, batch: Lockstep) -> None:
    """NonFiniteError if a row of a step's logits (rows, n, V) has NaN or infinite numbers."""
    finite = logits.isfinite().flatten(1).all(1).tolist()
    if all(finite):
        return
    row = batch.rows[finite.index(False)]
    names = "dense" if row.memory is None else repr([type(masker.config).__name__ for masker in row.memory.attention.maskers])
    raise NonFiniteError(
        f"logits are not finite under {names} attention after {batch.step} tokens: check the weights for NaN; if the dtype is "
        "float16, take bfloat16 or float32"
    )
