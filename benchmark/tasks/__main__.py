"""Look at the benchmarks.

Every task with its samples, length, source and metric:
    python -m benchmark.tasks list
One sample, of the first task if the name is a group, exactly as the model sees it:
    python -m benchmark.tasks show ruler/4096/vt --model embedded/SmolLM2-135M-Instruct
"""

import argparse
import sys
from pathlib import Path

from benchmark.command_line import Parser, run_command
from benchmark.plugins import load_plugins
from benchmark.progress import printable
from benchmark.tasks import available_tasks, expand_task, get_task
from benchmark.tasks.base import SampleRequest, build_prompt
from benchmark.tasks.limits import fitted, naming
from sparse_attention_hub.errors import UserError, quoted


def list_tasks() -> None:
    rows = [("task", "samples", "length", "answer tokens", "source", "metric")]
    for name in available_tasks():
        about = get_task(name).description
        samples = "all" if about.num_samples is None else str(about.num_samples)
        rows.append((name, samples, about.length, str(about.max_new_tokens), about.source, about.metric))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\nRULER has any other length too: ruler/1024/vt, or ruler/1024 for its 13 tasks. ruler_hf/4096 is such a group, too."
    )


def show(options: argparse.Namespace) -> None:
    selection = expand_task(options.task, options.data_dir)
    task = get_task(selection.names[0])
    if not 0 <= options.index < 10_000:  # as many samples are made
        raise UserError(f"--index counts from 0 to 9999, got {quoted(options.index)}")
    from sparse_attention_hub.models import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    request = SampleRequest(
        tokenizer=tokenizer,
        split=options.split,
        seed=options.seed,
        max_samples=options.index + 1,
        max_context_length=options.max_context_length,
        data_dir=options.data_dir,
    )
    request = fitted(request, task, options.model)
    with naming("--max-context-length", options.max_context_length, request.max_context_length):
        samples = task.samples(request)
        if options.index >= len(samples):
            raise UserError(f"--index {options.index}: {task.name} has {len(samples)} samples here")
        sample = samples[options.index]
        answer = min(sample.max_new_tokens, options.max_new_tokens)
        prompt = build_prompt(
            sample,
            tokenizer,
            max_context_length=request.max_context_length,
            max_new_tokens=answer,
            use_chat_template=task.use_chat_template,
        )
    print(printable(tokenizer.decode(prompt.context_ids + prompt.question_ids, skip_special_tokens=False)))
    total = len(prompt.context_ids) + len(prompt.question_ids)
    print(
        f"\n--- {sample.sample_id}: {len(prompt.context_ids)} context + {len(prompt.question_ids)} question tokens = {total}, "
        f"cut {prompt.truncated_tokens}, answer up to {answer} tokens; references: {sample.references}",
        file=sys.stderr,
    )
    if len(selection.names) > 1:
        print(f"--- {options.task} is a group, its first task is shown: {', '.join(selection.names)}", file=sys.stderr)
    if selection.note:
        print(f"--- {options.task}: {selection.note}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmark.tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("list", help="every task with its samples, length, source and metric")
    shown = commands.add_parser("show", help="one sample exactly as the model sees it")
    for command in (listed, shown):
        command.add_argument("--plugin", action="append", metavar="FILE", help="a .py file or module with tasks of your own")
    shown.add_argument("task")
    shown.add_argument("--model", required=True, help="hub id, local folder or embedded/SmolLM2-135M-Instruct")
    shown.add_argument("--index", type=int, default=0)
    shown.add_argument("--seed", type=int, default=0)
    shown.add_argument("--split", choices=("test", "tuning"), default="test")
    shown.add_argument("--max-context-length", type=int, default=64000)
    shown.add_argument(
        "--max-new-tokens", type=int, default=200, help="an answer's tokens at most, as in Phase 2 (%(default)s)"
    )
    shown.add_argument("--data-dir", type=Path)
    options = parser.parse_args(arguments)

    def run() -> int:
        load_plugins(options.plugin or ())
        list_tasks() if options.command == "list" else show(options)
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
