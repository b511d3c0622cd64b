"""Text generated under the attention that a search found, token by token as it comes.

    python examples/generate.py [FILE] [--question TEXT] [--text FILE] [--max-new-tokens 40]

FILE: a best configuration of a search, optimal_configs/run_.../..._10pct.json; by default the best of your searches of --task at
--budget, of the sample search until you have one, without oracles, which read every key to choose. The text is prefilled densely, question and answer are sparse: what Phase 1 and
Phase 2 measure by default.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_attention_hub import ResearchAttention, UserError, best_config
from sparse_attention_hub.errors import print_any_text
from sparse_attention_hub.found import read_json
from sparse_attention_hub.models.prompts import encode_continuation, render_chat

SEARCHES = Path(__file__).resolve().parents[1] / "optimal_configs"
MODEL = "embedded/SmolLM2-135M-Instruct"
TEXT = "The harbour of Vell has nine piers. " * 60 + "The code of the lighthouse is 7431. " + "Gulls circle above. " * 60


def generate(
    lm: Any, attention: ResearchAttention, context_ids: list[int], question_ids: list[int], tokens: int, streamer: Any = None
) -> list[int]:
    """The greedy answer's token ids: the context dense, question and answer under the attention."""
    import torch
    from transformers import DynamicCache

    from sparse_attention_hub.models import sparse_attention

    cache = DynamicCache()
    context, whole = (torch.tensor([ids], device=lm.device) for ids in (context_ids, context_ids + question_ids))
    with sparse_attention(lm, attention) as session:
        with torch.no_grad():  # the first pass over an empty cache is dense; some methods choose by what they see of it
            lm.model(input_ids=context, past_key_values=cache, logits_to_keep=1)
        answer = lm.model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
            streamer=streamer,
        )
    print(f"density {session.density:.3f}, KV bytes read {session.kv_fraction:.3f} of dense", file=sys.stderr)
    return answer[0, whole.shape[1] :].tolist()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a best configuration of a search (default: the best of --task at --budget)")
    parser.add_argument("--model", help="default: that of FILE, without one " + MODEL)
    parser.add_argument("--task", default="ruler/1024/niah_single_1", help="what was searched (%(default)s)")
    parser.add_argument("--budget", type=float, default=0.10, help="the largest density (%(default)s)")
    parser.add_argument("--text", type=Path, help="a file with a long text (default: a page about a harbour)")
    parser.add_argument("--question", default="What is the code of the lighthouse?")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args(argv)
    print_any_text()
    try:
        from transformers import TextStreamer

        from sparse_attention_hub.models import load_model

        model = options.model or MODEL
        file = options.file or best_config(SEARCHES, model=model, task=options.task, budget=options.budget)
        lm = load_model(options.model or read_json(file).get("model", MODEL))
        print(f"attention: {file}", file=sys.stderr)
        attention = ResearchAttention.from_file(file, lm)
        text = TEXT if options.text is None else options.text.read_text(encoding="utf-8-sig")
        context_ids, question_ids = prompt(lm.tokenizer, text, options.question)
        generate(lm, attention, context_ids, question_ids, options.max_new_tokens, TextStreamer(lm.tokenizer, skip_prompt=True))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def prompt(tokenizer: Any, text: str, question: str) -> tuple[list[int], list[int]]:
    """Token ids of the chat-templated prompt in two parts: up to the end of the text, and the question with what follows it."""
    asked = f"\n\n{question}"
    if tokenizer.chat_template is None:
        return tokenizer.encode(text), encode_continuation(tokenizer, f"{asked}\n")
    before, _, after = render_chat(tokenizer, text + asked).partition(asked)
    return tokenizer.encode(before, add_special_tokens=False), encode_continuation(tokenizer, asked + after)


if __name__ == "__main__":
    raise SystemExit(main())
