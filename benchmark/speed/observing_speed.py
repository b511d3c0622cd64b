"""What recording the context's queries, which evictions choose by, adds to a dense prefill.

    python benchmark/speed/observing_speed.py [--tokens 2048] [--repeats 3] [--json]

The embedded model on one thread, CPU seconds; the prefills take turns. ratio_...: median of the ratios to a prefill that records
nothing; queries are what SnapKV and TOVA choose by, statistics Expected Attention, attention H2O.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from time import process_time

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.speed.common import MODEL, Figures, new_parser, report, run_command

PARTS = ("queries", "statistics", "attention")


def run(tokens: int, repeats: int) -> Figures:
    """CPU seconds of a prefill, and the ratio of one that records a part to it."""
    from sparse_attention_hub.models import load_model, prefill
    from sparse_attention_hub.models.recording import sample_texts

    lm = load_model(MODEL, device="cpu")
    ids = lm.tokenizer.encode(sample_texts(1, characters=6 * tokens)[0], add_special_tokens=False)[:tokens]

    def seconds(*observe: str) -> float:
        started = process_time()
        prefill(lm, ids, 1, observe=observe)
        return process_time() - started

    for part in PARTS:  # warm up
        prefill(lm, ids[:64], 1, observe=[part])
    seen = [{"plain": seconds(), **{part: seconds(part) for part in PARTS}} for _ in range(repeats)]
    ratios = {f"ratio_{part}": median(times[part] / times["plain"] for times in seen) for part in PARTS}
    return {"tokens": len(ids), "prefill_seconds": median(times["plain"] for times in seen), **ratios}


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="context length (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="prefills of each kind (default: %(default)s)")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    goals = {"ratio_queries": 1.1, "ratio_statistics": 1.1}
    return report(run(options.tokens, options.repeats), options.json, at_most=goals, threads=1)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
