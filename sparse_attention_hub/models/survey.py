"""Which models are right: tiny random ones of every causal kind, held against transformers' own attention in one pass.

python -m sparse_attention_hub.models.survey                      # all kinds, a few minutes; writes docs/models.md
python -m sparse_attention_hub.models.survey llama "phi3 with longrope"   # these kinds, printed

A model is right if, with all keys selected, answers are the same tokens and likelihoods agree to 1e-3, through a prefill in parts,
`answer_many`, `forced_many`, a trace and its replay, and the plug-in's `generate`; and if sinks and a window of keys give what
transformers gives under that mask. Otherwise it must be refused, in one line and before its weights are loaded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from ..attention import ResearchAttention, ResearchAttentionConfig
from ..errors import UserError, quoted
from ..maskers import LocalMaskerConfig, OracleTopKConfig, SinkMaskerConfig
from ..replay import replay
from . import session
from .config_checks import check_config
from .load import LanguageModel
from .notices import quiet_transformers
from .plugin import sparse_attention
from .probe import calls_without_weights, layer_calls, sparse_of
from .session import answer_many, forced_many, prefill
from .survey_models import VARIANTS, VOCABULARY, causal_kinds, tiny_config, tiny_model
from .trace import record_trace

CONTEXT, QUESTION, ANSWER = 150, 11, 7
SINK, LOCAL = 4, 16
TOLERANCE = 1e-3


class Finding(NamedTuple):
    """status: "right", "refused", "wrong" or "not made" (transformers has no small model of the kind)."""

    kind: str
    status: str
    why: str


class Letters:
    """The least a tokenizer must do."""

    eos_token_id: int | None = None
    bos_token_id: int | None = None

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(200 + i) for i in ids)


def check_kind(kind: str) -> Finding:
    """Make a small model of a kind and check it."""
    model_type = VARIANTS.get(kind, (kind,))[0]
    try:
        with quiet_transformers():
            config = tiny_config(kind)
            model = tiny_model(kind)
            with torch.no_grad():
                model(torch.tensor([[3, 4, 5]]), use_cache=False)
    except Exception as error:
        return _not_made(kind, model_type, error)
    try:
        with quiet_transformers():
            calls = calls_without_weights(config, kind)
            if calls is not None:
                sparse_of(calls, kind)
    except UserError as error:
        return Finding(kind, "refused", _reason(error, kind))
    try:
        with quiet_transformers():
            return Finding(kind, "right", check_model(model))
    except Exception as error:  # a UserError too: a refusal comes before weights are loaded
        return Finding(kind, "wrong", f"{type(error).__name__}: {quoted(error, 300)}")


def _not_made(kind: str, model_type: str, error: Exception) -> Finding:
    """A kind without a small model: refused, where its usual config says enough."""
    try:
        with quiet_transformers():
            default = CONFIG_MAPPING[model_type]()
            for part in (default, default.get_text_config(decoder=True)):
                check_config(part, kind)
    except UserError as refusal:
        return Finding(kind, "refused", _reason(refusal, kind))
    except Exception as reason:
        error = reason
    return Finding(kind, "not made", f"{type(error).__name__}: {quoted(error, 100)}")


def _reason(error: UserError, kind: str) -> str:
    text = str(error).removeprefix(f"model {kind!r} ")
    return text.partition(") ")[2] if text.startswith("(") else text


def check_model(model: Any) -> str:
    """What is special about a model that is right. AssertionError with the figures for one that is wrong."""
    lm = LanguageModel.wrap(model, Letters(), name="tiny")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (CONTEXT + QUESTION,), generator=generator).tolist()
    context, question = ids[:CONTEXT], ids[CONTEXT:]
    expected, nll = reference(lm, ids)
    prefilled = prefill(lm, context, QUESTION + ANSWER)
    ways = [None, _attention(), _attention(OracleTopKConfig(1.0))]
    for start in ("question", "decode"):
        found = answer_many(lm, prefilled, question, ways, ANSWER, sparse_from=start)
        for answered in found:
            _equal(f"tokens from {start}", answered.token_ids, expected)
        for forced in forced_many(lm, prefilled, question, expected, ways, sparse_from=start):
            _near(f"nll from {start}", forced.nll, nll)
    with masked(CONTEXT):
        _, sparse_nll = reference(lm, ids, expected)
    way = _attention(SinkMaskerConfig(SINK), LocalMaskerConfig(LOCAL))
    _near("nll under sinks and a window", forced_many(lm, prefilled, question, expected, [way])[0].nll, sparse_nll)
    if abs(sparse_nll - nll) < TOLERANCE:
        raise AssertionError("sinks and a window change nothing: the model is too plain to check")
    with tempfile.TemporaryDirectory() as folder:
        trace = record_trace(lm, context, question, ANSWER, Path(folder) / "trace")
        _equal("the trace's answer", trace.answer_ids, expected)
        _near("the error of a replay of all keys", replay(trace, [_attention(OracleTopKConfig(1.0))])[0].error, 0.0)
    _equal("the plug-in's tokens", *_generated(lm, ids))
    return _special(lm)


def _attention(*maskers: Any) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig(list(maskers)))


@torch.no_grad()
def reference(lm: LanguageModel, ids: list[int], answer: list[int] | None = None) -> tuple[list[int], float]:
    """(greedy answer, or the one given; its mean negative log-likelihood) by transformers' attention, without a cache."""
    length = len(ids) + ANSWER
    text = ids + (answer or [])
    while len(text) < length:
        text.append(int(_logits(lm, text, length)[len(text) - 1].argmax()))
    logits = _logits(lm, text, length)[len(ids) - 1 : -1]
    target = torch.tensor(text[len(ids) :])
    return text[len(ids) :], float(torch.nn.functional.cross_entropy(logits.float(), target))


def _logits(lm: LanguageModel, text: list[int], length: int) -> Tensor:
    """Logits (length, V) of a text that is filled up to a length: what follows a token does not change its logits."""
    padded = torch.tensor([text + [2] * (length - len(text))])
    logits: Tensor = lm.model(padded, use_cache=False).logits[0]
    return logits


@contextmanager
def masked(rows_from: int) -> Iterator[None]:
    """Inside, transformers' eager attention sees SINK first and LOCAL last keys in rows from `rows_from` on, in layers that see
    all keys otherwise."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    plain = ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def restricted(*args: Any, mask_function: Any, local_size: int | None = None, **kwargs: Any) -> Any:
        def allowed(batch: Any, head: Any, row: Any, key: Any) -> Any:
            near = (row < rows_from) | (key < SINK) | (key > row - LOCAL)
            return mask_function(batch, head, row, key) & near

        return plain(*args, mask_function=mask_function if local_size else allowed, local_size=local_size, **kwargs)

    AttentionMaskInterface.register("eager", restricted)
    try:
        yield
    finally:
        AttentionMaskInterface.register("eager", plain)


def _generated(lm: LanguageModel, ids: list[int]) -> tuple[list[int], list[int]]:
    """Greedy answers by `generate`: with the plug-in and all keys, and without it."""
    options: dict[str, Any] = {"max_new_tokens": ANSWER, "do_sample": False}
    prompt = torch.tensor([ids])
    dense = lm.model.generate(prompt, **options)[0, len(ids) :].tolist()
    with sparse_attention(lm.model, _attention(OracleTopKConfig(1.0))) as used:
        sparse = lm.model.generate(prompt, **options)[0, len(ids) :].tolist()
    if not used.sparse_calls:
        raise AssertionError("the plug-in's attention was not called")
    return sparse, dense


def _equal(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise AssertionError(f"{what} are {found}, not {expected}")


def _near(what: str, found: float, expected: float) -> None:
    if not abs(found - expected) <= TOLERANCE:
        raise AssertionError(f"{what} is {found:.5f}, not {expected:.5f}")


def _special(lm: LanguageModel) -> str:
    calls, cache = layer_calls(lm), lm.new_cache(1)
    rules = [call.rule for call in calls.values()]
    dense = sum(rule.limited for rule in rules)
    parts = [
        f"{dense} of {len(rules)} attention layers have {'a window' if rules[0].chunk is None else 'chunks'} and stay dense"
        if dense
        else "",
        "soft-capped scores" if any(rule.softcap for rule in rules) else "",
        "learned sinks" if any(rule.sinks is not None for rule in rules) else "",
        "a latent for keys and values" if any(rule.latent for rule in rules) else "",
        f"{len(cache.recurrent)} of {lm.num_layers} layers keep a state" if cache.recurrent else "",
        "questions are read token by token" if cache.recurrent and not lm.continues else "",
        "rotary factors of the whole text" if lm.length_dependent else "",
    ]
    return "; ".join(part for part in parts if part)


def survey(kinds: Sequence[str]) -> list[Finding]:
    """Check kinds, each with its context prefilled in parts."""
    before = dict(session._CHUNKS)
    session._CHUNKS["cpu"] = 64
    try:
        findings = []
        for kind in kinds:
            findings.append(check_kind(kind))
            print(f"{findings[-1].status:9} {kind:28} {findings[-1].why}", flush=True)
        return findings
    finally:
        session._CHUNKS.update(before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sparse_attention_hub.models.survey", description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types, or variants of them (default: all, written to --out)")
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    findings = survey(options.kinds or [*causal_kinds(), *VARIANTS])
    if not options.kinds:
        options.out.write_text(page(findings), encoding="utf-8")
    return int(any(finding.status == "wrong" for finding in findings))


def page(findings: Sequence[Finding]) -> str:
    """docs/models.md."""
    import transformers

    count = {status: sum(f.status == status for f in findings) for status in ("right", "refused", "wrong", "not made")}
    lines = [
        "# Models",
        "",
        f"Every causal language model of transformers {transformers.__version__}, tried as a tiny random model against transformers'",
        "own attention: with all keys selected the same tokens and likelihoods, and under a mask of sinks and a window what",
        f"transformers gives under that mask. {count['right']} kinds are right, {count['refused']} are refused in one line before",
        f"weights are loaded, {count['not made']} could not be made small. `python -m sparse_attention_hub.models.survey` repeats it.",
        "",
        "| kind | status | what |",
        "|---|---|---|",
    ]
    order = {"wrong": 0, "right": 1, "refused": 2, "not made": 3}
    for kind, status, why in sorted(findings, key=lambda f: (order[f.status], f.kind)):
        lines.append(f"| {kind} | {status} | {why.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
