"""Text metrics as the original benchmarks compute them. Every function returns a float in 0..1.

Details such as what counts as punctuation and which exceptions score 0 are the originals': without them, scores are not
comparable with published ones. Packages that are slow to import are imported by the functions that need them.
"""

import difflib
import logging
import math
import re
import string
import sys
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from benchmark.tasks.base import Sample, Scores

logger = logging.getLogger(__name__)

T = TypeVar("T")

ASCII_PUNCTUATION = frozenset(string.punctuation)
# LongBench's and InfiniteBench's list, which lacks the opening book-title mark (but has the closing one).
CHINESE_PUNCTUATION = ASCII_PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def best(measure: Callable[[str, str], float], prediction: str, references: Iterable[str]) -> float:
    """The highest score over the references; 0 without any."""
    return max((measure(prediction, reference) for reference in references), default=0.0)


def group_means(
    metric: str, scores: list[Scores], samples: list[Sample], names: Iterable[str], groups_of: Callable[[Sample], Iterable[str]]
) -> dict[str, Scores]:
    """Size (`n`) and mean score of each group of samples; an empty group has no mean, a sample without a score no group."""
    groups: dict[str, list[float]] = {name: [] for name in names}
    for score, sample in zip(scores, samples, strict=True):
        for name in groups_of(sample) if metric in score else ():
            groups[name].append(score[metric])
    return {name: {"n": len(group)} | ({metric: sum(group) / len(group)} if group else {}) for name, group in groups.items()}


def normalise(text: str) -> str:
    """SQuAD normalisation: lower case, no ASCII punctuation, no articles, single blanks. "The U.S.A." -> "usa"."""
    text = "".join(character for character in text.lower() if character not in ASCII_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalise_zh(text: str) -> str:
    """Lower case without ASCII and Chinese punctuation and without white space."""
    return "".join("".join(character for character in text.lower() if character not in CHINESE_PUNCTUATION).split())


def multiset_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of tokens; 0 when they share nothing, also when both are empty."""
    common = sum((Counter(prediction) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def word_f1(prediction: str, reference: str) -> float:
    """Word F1 after SQuAD normalisation (LongBench's qa_f1, InfiniteBench's longbook_qa)."""
    return multiset_f1(normalise(prediction).split(), normalise(reference).split())


def word_f1_ascii(prediction: str, reference: str) -> float:
    """Word F1 after transliteration to ASCII and SQuAD normalisation (ZeroSCROLLS, arXiv 2305.14196)."""
    return word_f1(to_ascii(prediction), to_ascii(reference))


# Letters and marks that do not decompose into an ASCII letter and an accent.
_TRANSLITERATION = str.maketrans({
    "ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D", "ð": "d",
    "Ð": "D", "þ": "th", "Þ": "Th", "ł": "l", "Ł": "L", "ı": "i", "‘": "'", "’": "'", "‚": ",", "“": '"', "”": '"', "„": '"',
    "‐": "-", "‑": "-", "–": "-", "—": "--", "…": "...", "×": "x", "€": "EUR", "£": "PS", "©": "(c)", "®": "(r)",
})  # fmt: skip


def to_ascii(text: str) -> str:
    """Transliterate Latin text to ASCII; characters without a Latin equivalent are dropped."""
    decomposed = unicodedata.normalize("NFKD", text.translate(_TRANSLITERATION))
    return decomposed.encode("ascii", "ignore").decode("ascii")


def character_f1_zh(prediction: str, reference: str) -> float:
    """F1 over characters after Chinese normalisation (InfiniteBench's longbook_qa_chn)."""
    return multiset_f1(normalise_zh(prediction), normalise_zh(reference))


def chinese_words(text: str) -> list[str]:
    """jieba's precise-mode segmentation. The first call takes about a second to build its dictionary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba's own source has escapes that newer Pythons warn about
        import jieba
    jieba.setLogLevel(logging.WARNING)  # it reports the dictionary's loading on stderr
    return list(jieba.cut(text, cut_all=False))


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 over jieba words, each normalised, empty ones dropped (LongBench's multifieldqa_zh)."""
    words, gold = ([word for word in map(normalise_zh, chinese_words(text)) if word] for text in (prediction, reference))
    return multiset_f1(words, gold)


# The `rouge` package rebuilds the longest common subsequence by recursion, one level per word. LongBench ran it under
# Python's default limit and scores a RecursionError as 0; LooGLE has no such rule, so its limit is never reached.
PUBLISHED_RECURSION_LIMIT = 1000
AMPLE_RECURSION_LIMIT = 100_000
_recursion_lock = threading.Lock()


def _with_recursion_limit(limit: int, call: Callable[[], T]) -> T:
    """Call under `limit` in a new thread: the depth of the caller's stack must not decide whether it overflows."""
    before, limit = sys.getrecursionlimit(), limit + 1  # the executor's own call
    with _recursion_lock, ThreadPoolExecutor(1, initializer=sys.setrecursionlimit, initargs=(limit,)) as thread:
        try:
            return thread.submit(call).result()
        finally:
            sys.setrecursionlimit(before)


def _rouge(names: list[str], limit: int, prediction: str, reference: str) -> dict[str, dict[str, float]]:
    """Scores of the PyPI package `rouge` 1.0.1: metric -> {"r", "p", "f"}; 0 where it raises.

    It does for a text of nothing but full stops, and under `limit` for many words without one.
    """
    from rouge import Rouge

    scorer = Rouge(metrics=names)
    try:
        scores: dict[str, dict[str, float]] = _with_recursion_limit(
            limit, lambda: scorer.get_scores([prediction], [reference])[0]
        )
    except (ValueError, RecursionError):
        return {name: {"r": 0.0, "p": 0.0, "f": 0.0} for name in names}
    return scores


def rouge(prediction: str, reference: str) -> float:
    """ROUGE-L F as LongBench uses it: texts are split at full stops, case matters, repeated words count once."""
    return float(_rouge(["rouge-l"], PUBLISHED_RECURSION_LIMIT, prediction, reference)["rouge-l"]["f"])


def rouge_zh(prediction: str, reference: str) -> float:
    """`rouge` over jieba words joined by blanks (LongBench's dureader and vcsum)."""
    return rouge(" ".join(chinese_words(prediction)), " ".join(chinese_words(reference)))


def rouge_recall(prediction: str, reference: str) -> Scores:
    """ROUGE-1, -2 and -L recall (LooGLE)."""
    scores = _rouge(["rouge-1", "rouge-2", "rouge-l"], AMPLE_RECURSION_LIMIT, prediction, reference)
    return {name: float(score["r"]) for name, score in scores.items()}


@lru_cache(maxsize=4)
def _rouge_scorer(types: tuple[str, ...]) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(types), use_stemmer=False)


def rouge_lsum(prediction: str, reference: str) -> float:
    """rougeLsum F of `rouge_score` without stemming; sentences are lines (InfiniteBench's longbook_sum_eng)."""
    return float(_rouge_scorer(("rougeLsum",)).score(reference, prediction)["rougeLsum"].fmeasure)


def rouge_triple(prediction: str, references: Iterable[str]) -> Scores:
    """rouge1, rouge2 and rougeL F of `rouge_score` without stemming, each the best over the references (SCROLLS)."""
    names = ("rouge1", "rouge2", "rougeL")
    scores = [_rouge_scorer(names).score(reference, prediction) for reference in references]
    return {name: max((float(score[name].fmeasure) for score in scores), default=0.0) for name in names}


def geometric_mean(values: Sequence[float]) -> float:
    """n-th root of the product."""
    return math.prod(values) ** (1 / len(values)) if values else 0.0


def classification(prediction: str, reference: str, all_classes: Sequence[str]) -> float:
    """1 / (number of classes named in the prediction) if the right one is among them, else 0.

    Classes that are part of the right class's name do not count.
    """
    named = [name for name in all_classes if name in prediction]
    for name in named:  # removing skips the next class: published scores have this quirk of the original
        if name in reference and name != reference:
            named.remove(name)
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str) -> float:
    """Share of the numbers in the prediction that equal the reference, compared as strings."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, pattern: str = r"Paragraph (\d+)") -> float:
    """Share of the numbers in the prediction that are the reference's paragraph number; 0 if the reference has none."""
    wanted = re.search(pattern, reference)
    return count(prediction, wanted[1]) if wanted else 0.0


def retrieval_zh(prediction: str, reference: str) -> float:
    """`retrieval` with references like 段落3."""
    return retrieval(prediction, reference, r"段落(\d+)")


def code_sim(prediction: str, reference: str) -> float:
    """Similarity to the reference of the first line, blank or not, without a backtick or a comment mark.

    A whole percent: fuzzywuzzy's `ratio` with its pure-Python backend, difflib.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")
    if line == reference:  # difflib finds no similarity in long texts of few different characters
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def bleu(prediction: str, reference: str) -> Scores:
    """bleu1 (1-grams only) and bleu4 (4-grams only, not the usual mean): words by white space, case matters, no smoothing."""
    from nltk.translate.bleu_score import sentence_bleu

    words, reference_words = prediction.split(), reference.split()
    scores = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns at every zero count
        for name, weights in (("bleu1", (1, 0, 0, 0)), ("bleu4", (0, 0, 0, 1))):
            value = float(sentence_bleu([reference_words], words, weights=weights))
            scores[name] = 0.0 if value < 1e-50 else min(value, 1.0)  # nltk scores a zero count as the smallest float
    return scores


@lru_cache(maxsize=1)
def wordnet() -> Any | None:
    """nltk's WordNet if its data are installed, else None (with one log line). Nothing is downloaded."""
    from nltk.corpus import wordnet as corpus

    try:
        corpus.ensure_loaded()
    except LookupError:
        logger.warning("METEOR is not reported: nltk has no WordNet data here (python -m nltk.downloader wordnet)")
        return None
    return corpus


def meteor(prediction: str, reference: str, synonyms: Any | None = None) -> float | None:
    """nltk's METEOR over the distinct words of each text; `synonyms` defaults to WordNet, None without it.

    LooGLE passes sets, whose order, and with it the score, changes from run to run. Here the order is that of first
    occurrence: one of LooGLE's values, always the same.
    """
    from nltk.translate.meteor_score import single_meteor_score

    synonyms = synonyms or wordnet()
    if synonyms is None:
        return None
    words, reference_words = (list(dict.fromkeys(text.split())) for text in (prediction, reference))
    return float(single_meteor_score(reference_words, words, wordnet=synonyms))


@lru_cache(maxsize=1)
def _bert_scorer() -> Any | None:
    try:
        from bert_score import BERTScorer

        return BERTScorer(lang="en")
    except ImportError:
        logger.warning("BERTScore is not reported: install the extra `bertscore`")
    except Exception as error:  # no weights or no network: of many types
        logger.warning("BERTScore is not reported: its model could not be loaded (%s)", error)
    return None


def bert(prediction: str, reference: str) -> float | None:
    """BERTScore as LooGLE reports it: recall with the texts swapped, that is, precision. None if not installed."""
    scorer = _bert_scorer()
    if scorer is None:
        return None
    value = float(scorer.score([reference], [prediction])[1][0])
    return min(max(value, 0.0), 1.0)
