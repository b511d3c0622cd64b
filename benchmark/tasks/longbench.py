"""LongBench (arXiv 2308.14508, github.com/THUDM/LongBench): 21 tasks, English, Chinese and code; 13 in LongBench-E."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.base import PromptParts, Sample, Scores, Task, TaskDescription, UserError
from benchmark.tasks.data import Row, Source
from benchmark.tasks.sources import PROMPT_COLUMNS, DataTask, Form, own_id
from benchmark.tasks.values import as_texts

_PASSAGES = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
_STORY = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.'
)
_MULTI_DOCUMENT = (
    _PASSAGES + "\n\nThe following are given passages.\n{context}\n\n" + _PASSAGES + "\n\n",
    "Question: {input}\n",
    "Answer:",
)


@dataclass(frozen=True)
class Subset:
    """The authors' prompt in three parts, which join to the published one, and how an answer is scored."""

    context: str
    question: str
    answer_prefix: str
    max_new_tokens: int
    metric: str
    num_samples: int = 200
    num_samples_e: int | None = None  # of LongBench-E; None = not in it
    plain: bool = False  # no chat template: the model continues few-shot examples or code
    first_line: bool = False  # only the first line of an answer is scored


SUBSETS: dict[str, Subset] = {
    "narrativeqa": Subset(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        + _STORY + "\n\nStory: {context}\n\nNow, answer the question based on the story " + _STORY + "\n\n",
        "Question: {input}\n\n", "Answer:", 128, "qa_f1",
    ),
    "qasper": Subset(
        "You are given a scientific article and a question. Answer the question " + _ARTICLE
        + "\n\nArticle: {context}\n\n Answer the question based on the above article " + _ARTICLE + "\n\n",
        "Question: {input}\n\n", "Answer:", 128, "qa_f1", num_samples_e=224,
    ),
    "multifieldqa_en": Subset(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on "
        "the above text, only give me the answer and do not output any other words.\n\n",
        "Question: {input}\n", "Answer:", 64, "qa_f1", num_samples=150, num_samples_e=150,
    ),
    "multifieldqa_zh": Subset(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，"
        "只告诉我答案，不要输出任何其他字词。\n\n",
        "问题：{input}\n", "回答：", 64, "qa_f1_zh",
    ),
    "hotpotqa": Subset(*_MULTI_DOCUMENT, 32, "qa_f1", num_samples_e=300),
    "2wikimqa": Subset(*_MULTI_DOCUMENT, 32, "qa_f1", num_samples_e=300),
    "musique": Subset(*_MULTI_DOCUMENT, 32, "qa_f1"),
    "dureader": Subset(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n",
        "问题：{input}\n", "回答：", 128, "rouge_zh",
    ),
    "gov_report": Subset(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n",
        "Now, write a one-page summary of the report.\n\n", "Summary:", 512, "rouge", num_samples_e=300,
    ),
    "qmsum": Subset(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
        "one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting "
        "transcript in one or more sentences.\n\n",
        "Query: {input}\n", "Answer:", 512, "rouge",
    ),
    "multi_news": Subset(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n",
        "Now, write a one-page summary of all the news.\n\n", "Summary:", 512, "rouge", num_samples_e=294,
    ),
    "vcsum": Subset(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n", "", "会议总结：", 512, "rouge_zh",
    ),
    "trec": Subset(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n",
        "{input}", "Type:", 64, "classification", num_samples_e=300, plain=True, first_line=True,
    ),
    "triviaqa": Subset(
        "Answer the question based on the given passage. Only give me the answer and do not output any other "
        "words. The following are some examples.\n\n{context}\n\n",
        "{input}", "Answer:", 32, "qa_f1", num_samples_e=300, plain=True, first_line=True,
    ),
    "samsum": Subset(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n",
        "{input}", "Summary:", 128, "rouge", num_samples_e=300, plain=True, first_line=True,
    ),
    "lsht": Subset(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n", "{input}", "", 64, "classification", plain=True, first_line=True,
    ),
    "passage_count": Subset(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
        "other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\n",
        "Please enter the final count of unique paragraphs after removing duplicates. The output format should "
        "only contain the number, such as 1, 2, 3, and so on.\n\n",
        "The final answer is: ", 32, "count", num_samples_e=300,
    ),
    "passage_retrieval_en": Subset(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
        "abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n",
        "{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer format must be "
        'like "Paragraph 1", "Paragraph 2", etc.\n\n',
        "The answer is: ", 32, "retrieval", num_samples_e=300,
    ),
    "passage_retrieval_zh": Subset(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n",
        '{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n',
        "答案是：", 32, "retrieval_zh",
    ),
    "lcc": Subset(
        "Please complete the code given below. \n{context}", "", "Next line of code:\n", 64, "code_sim",
        num_samples=500, num_samples_e=300, plain=True,
    ),
    "repobench-p": Subset(
        "Please complete the code given below. \n{context}", "{input}", "Next line of code:\n", 64, "code_sim",
        num_samples=500, num_samples_e=300, plain=True,
    ),
}  # fmt: skip

METRICS: dict[str, Callable[[str, str], float]] = {
    "qa_f1": metrics.word_f1,
    "qa_f1_zh": metrics.qa_f1_zh,
    "rouge": metrics.rouge,
    "rouge_zh": metrics.rouge_zh,
    "count": metrics.count,
    "retrieval": metrics.retrieval,
    "retrieval_zh": metrics.retrieval_zh,
    "code_sim": metrics.code_sim,
}

LENGTH_BUCKETS = ("0-4k", "4-8k", "8k+")


def length_bucket(sample: Sample) -> list[str]:
    """LongBench-E's bucket of a context of `length` words."""
    length = sample.columns["length"]
    return [LENGTH_BUCKETS[0 if length < 4000 else 1 if length < 8000 else 2]]


class LongBenchTask(DataTask):
    """longbench/<subset> and longbench/<subset>_e."""

    def __init__(self, subset: str) -> None:
        self.name = f"longbench/{subset}"
        self.extended = subset not in SUBSETS
        spec = self.spec = SUBSETS[subset.removesuffix("_e") if self.extended else subset]
        self.metric = spec.metric
        self.use_chat_template = not spec.plain
        size = spec.num_samples_e if self.extended else spec.num_samples
        self.description = TaskDescription("THUDM/LongBench", spec.metric, spec.max_new_tokens, size, "1k to 20k words")
        shared = {
            "answers": "list of texts",
            "all_classes": "?list of texts",
            "length": "integer" if self.extended else "?integer",
            "_id": "?text",
        }
        self.forms = [Form({"input": "text", "context": "text", **shared}, self._original), Form(PROMPT_COLUMNS | shared)]
        self.sources = [
            Source("longbench", subset, "THUDM/LongBench", archive="data.zip", member=f"{subset}.jsonl"),
            Source("longbench", subset, "Xnhyacinth/LongBench", config=subset),
            Source("longbench", subset, "xAlg-AI/att-hub-longbench", config=subset),
        ]

    def _original(self, row: Row) -> PromptParts:
        prefix, text = self.spec.answer_prefix, row["input"]
        if self.spec.first_line:  # few-shot: the input may end in the label that starts the answer ("Type:")
            prefix = prefix if text.endswith(prefix) else ""
            text = text.removesuffix(prefix)
        return self.spec.context.replace("{context}", row["context"]), self.spec.question.replace("{input}", text), prefix

    def make(self, identity: object, row: Row, prompt: PromptParts) -> Sample:
        classes = row.get("all_classes") or None
        if self.metric == "classification" and not classes:
            raise ValueError("column 'all_classes' is empty; it must name the classes")
        return self.make_sample(own_id(row, identity, "_id"), prompt, row["answers"], columns=row, all_classes=classes)

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> Scores:
        """The best score over the references; `all_classes` is needed for trec and lsht (UserError without)."""
        if self.spec.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        if self.metric != "classification":
            measure = METRICS[self.metric]
        elif all_classes:
            measure = functools.partial(metrics.classification, all_classes=as_texts(all_classes, "all_classes"))
        else:
            raise UserError(f"{self.name} is scored against its classes: all_classes is needed, got {all_classes}")
        return {self.metric: metrics.best(measure, prediction, as_texts(references))}

    def aggregate(self, scores: list[Scores], samples: list[Sample]) -> dict[str, object]:
        """LongBench-E: mean score and size of each length bucket; an empty bucket has no mean."""
        if not self.extended:
            return {}
        return {"length_buckets": metrics.group_means(self.metric, scores, samples, LENGTH_BUCKETS, length_bucket)}


def make_tasks() -> dict[str, Task]:
    names = [*SUBSETS, *(f"{name}_e" for name, spec in SUBSETS.items() if spec.num_samples_e is not None)]
    return {f"longbench/{name}": LongBenchTask(name) for name in names}
