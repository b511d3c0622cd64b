"""What a configuration costs Phase 1, against trying each one in a process of its own.

    python benchmark/speed/search_speed.py [--trials 100 480] [--baseline-trials 1] [--json]

CPU seconds (user and system of whole process trees) with one thread on both sides, embedded model, one retrieval task.
- the baseline, a trial at a time: a new process, load the model, for every request prefill its context with the LM head over
  all of it, then question and answer under sparse attention, density and error computed at every attention call;
- ours: the same configurations by replay of recorded traces, full and on the cheapest rung: the marginal cost, what each of 8
  further configurations in a pass of 16 adds to one of 8, and, as `in_a_batch`, an eighth of a pass of 8, with the scores and
  their sorting that a pass shares; and whole searches, each in a new process that loads, records, replays and confirms.
  `--trials` names their numbers of trials; the first is searched again on the traces that it left.
Both sides share the tuning samples. The baseline is honest only if a request of it costs 1.4 to 1.8 x our own prefill of that
request, which is timed after it, in the same process, and held like a goal. Exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__" and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

MODEL = "embedded/SmolLM2-135M-Instruct"
LEVELS = (5, 10, 25, 50)
BATCH = 8
#: family -> least ratio of the baseline to the marginal cost on full replay and on the cheapest rung
MARGINAL_GOALS = {"oracle_top_k": (140.0, 1800.0), "adaptive_sampling": (60.0, 850.0)}
#: trials of a whole search -> least ratio of the baseline to it
SEARCH_GOALS = {100: 60.0, 480: 200.0}
MEMORY_GOAL = 1.5
OUR_PREFILL = "our_prefill"
# Passes of the cheapest rung and of full replay: what a pass of 16 adds to one of 8 is lost in the noise of a single cheap one.
REPEATS = (5, 1)


def template(family: str, budget: float) -> Any:
    """What a search of this family starts from at a density budget."""
    import sparse_attention_hub as hub
    from sparse_attention_hub.maskers.hat_weights import hat_config_fields, hat_weights_for

    ends = [hub.SinkMaskerConfig(sink_size=0.01), hub.LocalMaskerConfig(window_size=0.01)]
    rest = budget - 0.02
    sampler = hub.AdaptiveSamplingMaskerConfig(
        base_rate_sampling=rest / 3, epsilon=0.2, delta=0.2, init_offset=0, local_offset=0
    )
    tails: dict[str, list[Any]] = {
        "oracle_top_k": [hub.OracleTopKConfig(heavy_size=rest)],
        "adaptive_sampling": [hub.OracleTopKConfig(heavy_size=rest / 3), sampler],
        "random_sampling": [hub.RandomSamplingMaskerConfig(sampling_rate=rest)],
        "oracle_top_p": [hub.OracleTopPMaskerConfig(top_p=min(0.9, 0.3 + 1.5 * budget))],
        "quest": [hub.QuestTopKMaskerConfig(heavy_size=rest, page_size=16)],
        "double_sparsity": [hub.DoubleSparsityTopKMaskerConfig(rest, sorted_channel_file=None)],
        "hash_attention": [hub.HashAttentionTopKMaskerConfig(heavy_size=rest, **hat_config_fields(hat_weights_for(MODEL)))],
        "pq_cache": [hub.PQCacheConfig(rest, 4, 6, 10, 4, "euclidean")],
        "magic_pig": [hub.MagicPigConfig(lsh_l=32, lsh_k=8)],
    }
    return hub.ResearchAttentionConfig([*ends, *tails[family]])


def random_configs(family: str, count: int, seed: int) -> list[Any]:
    """Configurations drawn from the family's search space, the same for the same seed."""
    import numpy as np

    from benchmark.search.space import CombinationSpace

    space = CombinationSpace(template(family, 0.25), "task")
    domains = space.ray_space()
    state = np.random.RandomState(seed)
    return [space.build({name: domain.sample(random_state=state) for name, domain in domains.items()}) for _ in range(count)]


def settings_of(options: argparse.Namespace) -> Any:
    from benchmark.settings import Settings

    return Settings(
        models=(options.model,),
        tasks=(options.task,),
        device="cpu",
        search_max_requests=options.requests,
        search_max_context_length=options.length,
        search_max_new_tokens=options.tokens,
    )


def cpu_seconds() -> float:
    """User and system seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Parts:
    """CPU seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = 0.0  # from the start of the process

    def done(self, name: str) -> float:
        """All since the last call was spent on `name`."""
        now = cpu_seconds()
        spent, self._last = now - self._last, now
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        return spent


# -- what the processes do -------------------------------------------------------------------------------------------


def baseline_trial(options: argparse.Namespace) -> dict[str, Any]:
    """One configuration tried the plain way; means of its error and density beside its cost in parts."""
    import torch
    from transformers import DynamicCache

    from benchmark.search.evaluator import ErrorMeter, tuning_samples
    from sparse_attention_hub import ResearchAttention
    from sparse_attention_hub.models import load_model, prefill, sparse_attention
    from sparse_attention_hub.models.model_files import complete

    torch.set_num_threads(1)
    parts = Parts()
    parts.done("start")
    lm = load_model(options.model, device="cpu")
    parts.done("load")
    family, number = options.part[1], int(options.part[2])
    config = complete(random_configs(family, BATCH, options.seed)[number], lm)
    samples = tuning_samples(lm.tokenizer, options.task, settings_of(options))
    parts.done("samples")
    meter = ErrorMeter()

    class Logged(ResearchAttention):
        """Density and error of every call are computed as it happens."""

        def __call__(self, queries: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(queries, *args, **kwargs)
            meter(result=result, queries=queries)
            return result

    for entry in samples:
        cache = DynamicCache()
        with torch.inference_mode():
            lm.model(input_ids=torch.tensor([entry.prompt.context_ids]), past_key_values=cache, use_cache=True)
            parts.done("prefill")
            ids = torch.tensor([entry.prompt.question_ids])
            with sparse_attention(lm.model, Logged(config), seed=entry.seed):
                for _ in range(entry.max_new_tokens):
                    logits = lm.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
                    ids = logits[:, -1:].argmax(-1)
                    if int(ids) in lm.eos_token_ids:
                        break
        del cache, logits
        parts.done("ask")
        prefill(lm, entry.prompt.context_ids, len(entry.prompt.question_ids) + entry.max_new_tokens)
        parts.done(OUR_PREFILL)  # no part of the trial: what its request is compared with, at a moment of the same speed
    return {"parts": parts.seconds, "requests": len(samples), "error": meter.error, "density": meter.density}


def marginal_costs(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds a configuration by replay, and what all trials share: recording a request."""
    import torch

    from benchmark.search.evaluator import TraceEvaluator
    from sparse_attention_hub.models import load_model

    torch.set_num_threads(1)
    parts = Parts()
    parts.done("start")
    lm = load_model(options.model, device="cpu")
    parts.done("load")
    evaluator = TraceEvaluator(lm, options.task, settings_of(options), Path(options.folder) / "traces")
    prompt = evaluator.samples[0].prompt
    parts.done("samples")
    found: dict[str, Any] = {"context": len(prompt.context_ids)}
    for _ in evaluator.record():
        pass
    found["capture"] = parts.done("capture") / len(evaluator.traces)
    found["rows"] = sum(trace.rows for trace in evaluator.traces) / len(evaluator.traces)
    for family in options.families:
        configs = random_configs(family, 2 * BATCH, options.seed)
        # Once without the clock: calibration, code that is loaded when first needed.
        evaluator.evaluate(configs[:1], 0, 1e9)
        parts.done("warm up")
        found[family] = {}
        for rung, repeats in enumerate(REPEATS):
            batch = both = 0.0
            for _ in range(repeats):
                few = evaluator.evaluate(configs[:BATCH], rung, 1e9)
                batch += parts.done("replay") / repeats
                evaluator.evaluate(configs, rung, 1e9)
                both += parts.done("replay") / repeats
            found[family][f"rung_{rung}"] = {"batch": batch / BATCH, "further": (both - batch) / BATCH}
            found[family]["error"] = few[0].error
    return found


def whole_search(options: argparse.Namespace) -> dict[str, Any]:
    """A whole study, from the start of the process to the confirmed best of every level; its cost in parts."""
    import torch
    from ray.tune.search import optuna  # noqa: F401  (its code is no memory of a search: loaded before the watch begins)

    from benchmark.search.evaluator import TraceEvaluator
    from benchmark.search.space import CombinationSpace
    from benchmark.search.study import Study
    from benchmark.search.trial import Level
    from benchmark.storage.results import Journal
    from sparse_attention_hub.models import answer, load_model, prefill

    torch.set_num_threads(1)
    parts = Parts()
    parts.done("start")
    lm = load_model(options.model, device="cpu")
    parts.done("load")
    family, trials, folder = options.part[1], int(options.part[2]), Path(options.folder)
    evaluator = TraceEvaluator(lm, options.task, settings_of(options), folder / "traces")
    # Compiled kernels are code, and weights are read from the file when first used, the LM head's too: neither is memory of a
    # search, so both are loaded before the watch begins.
    load_kernels()
    few = prefill(lm, evaluator.samples[0].prompt.context_ids[:64], 2)
    answer(lm, few, evaluator.samples[0].prompt.context_ids[1:2], None, 1)
    parts.done("samples")
    memory = Memory()
    for _ in evaluator.record():
        pass
    parts.done("capture")
    memory.done("capture")
    levels = [Level(f"{family}_{level}pct", level / 100, template(family, level / 100)) for level in LEVELS]
    space = CombinationSpace(levels[0].template, options.task)
    journal = Journal(folder / f"{family}_{trials}_{time.time_ns()}.jsonl")
    evaluate = evaluator.evaluate

    def timed(configs: list[Any], rung: int, timeout: float) -> Any:
        parts.done("sampler and journal")
        try:
            return evaluate(configs, rung, timeout)
        finally:
            names = ("replay of some rows and layers", "full replay", "confirmation", "confirmation")
            parts.done(names[rung])
            memory.done(names[rung])

    evaluator.evaluate = timed  # type: ignore[method-assign]
    per_level = -(-trials // len(levels))
    study = Study(space, levels, evaluator, journal, num_samples=per_level, timeout=1e9, seed=options.seed)
    for _ in study.run():
        pass
    best = study.best()
    parts.done("sampler and journal")
    return {
        "parts": parts.seconds,
        "trials": len(study.trials),
        "rungs": study.progress("")["rungs"],
        "failed": study.progress("")["failed"],
        "best": {b.level: [study.trials[b.trial].last.error, study.trials[b.trial].last.density] for b in best},
        "trace_bytes": evaluator.traces[0].nbytes,
        "memory": memory.peaks,
    }


def load_kernels(options: argparse.Namespace | None = None) -> dict[str, Any]:
    """Use each compiled kernel that a trial, a replay or a search uses. The first process that does so compiles them."""
    import itertools

    import torch

    from sparse_attention_hub import ResearchAttention
    from sparse_attention_hub.maskers.call_cache import CallCache
    from sparse_attention_hub.maskers.inputs import AttentionInputs

    for family, budget, rows, shared in itertools.product(MARGINAL_GOALS, (0.05, 0.5), (1, 8), (False, True)):
        tensors = [torch.zeros(1, heads, length, 8) for heads, length in ((4, rows), (2, 64), (2, 64))]
        inputs = AttentionInputs(*tensors, cache=CallCache(keeps_order=shared))
        if shared:
            inputs.exponentials()
        result = ResearchAttention(template(family, budget)).attend_inputs(inputs)
        assert result.density > 0 and result.kv_fraction > 0
    return {}


class Memory:
    """Peaks of this process's memory beside what it had when the watch began, in bytes, stage by stage."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._reset()
        self._start = _status("VmRSS")

    def done(self, stage: str) -> None:
        peak = _status("VmHWM") - self._start
        self.peaks[stage] = max(self.peaks.get(stage, 0), peak)
        self._reset()

    @staticmethod
    def _reset() -> None:
        """Forget the highest mark so far, where the system lets us; else later stages show at least what earlier ones had."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


# -- running them ----------------------------------------------------------------------------------------------------


def in_process(options: argparse.Namespace, *part: str) -> tuple[dict[str, Any], float]:
    """(what a new process for this part found, the CPU seconds of it and of all that it started)."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", *part, "--folder", options.folder]
    for name in ("model", "task", "requests", "length", "tokens", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--families", *options.families]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(part)} failed with exit code {done.returncode}")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{' '.join(part)}: {spent:.1f} CPU s", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1]), spent


def measure(options: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    figures: dict[str, float] = {}
    goals: list[dict[str, Any]] = []
    in_process(options, "compile")  # once for a machine, and no part of either side
    ours, _ = in_process(options, "marginal")
    figures |= {"context_tokens": ours["context"], "rows": ours["rows"]}
    figures["capture_a_request_s"] = ours["capture"]
    costs: dict[str, float] = {}
    for family in options.families:
        trials = [in_process(options, "baseline", family, str(i)) for i in range(options.baseline_trials)]
        costs[family] = _mean(seconds - found["parts"][OUR_PREFILL] for found, seconds in trials)
        figures[f"{family}_baseline_trial_s"] = costs[family]
        for part in trials[0][0]["parts"]:
            side = "" if part == OUR_PREFILL else "baseline_"
            figures[f"{family}_{side}{part}_s"] = _mean(found["parts"][part] for found, _ in trials)
        request = _mean(f["parts"]["prefill"] + f["parts"]["ask"] for f, _ in trials)
        check = f"{family}_baseline_request_over_prefill"
        figures[check] = request / _mean(f["parts"][OUR_PREFILL] for f, _ in trials)
        if options.length == 4096:
            goals += [{"name": check, "at_least": 1.4}, {"name": check, "at_most": 1.8}]
        for rung, name in enumerate(("full_replay", "cheapest_rung")):
            cost = ours[family][f"rung_{1 - rung}"]
            figures[f"{family}_{name}_s"] = cost["further"]
            figures[f"{family}_{name}_in_a_batch_s"] = cost["batch"]
            figures[f"{family}_{name}_in_a_batch_ratio"] = costs[family] / cost["batch"]
            figures[f"{family}_{name}_ratio"] = costs[family] / cost["further"]
            if family in MARGINAL_GOALS:
                goals.append({"name": f"{family}_{name}_ratio", "at_least": MARGINAL_GOALS[family][rung]})
        # Both sides looked at the same configurations; they differ by what compounds through the layers.
        figures[f"{family}_baseline_error"] = trials[0][0]["error"]
        figures[f"{family}_replayed_error"] = ours[family]["error"]
    family = options.families[0]
    for place, trials_wanted in enumerate(options.trials):
        _forget_traces(options)
        figures |= _search(options, family, trials_wanted, f"search_{trials_wanted}", costs[family])
        if trials_wanted in SEARCH_GOALS:
            goals.append({"name": f"search_{trials_wanted}_ratio", "at_least": SEARCH_GOALS[trials_wanted]})
        goals.append({"name": f"search_{trials_wanted}_memory_over_trace", "at_most": MEMORY_GOAL})
        if place == 0:
            figures |= _search(options, family, trials_wanted, f"search_{trials_wanted}_again", costs[family])
    for goal in goals:
        goal["value"] = figures[goal["name"]]
    return figures, goals


def _search(options: argparse.Namespace, family: str, trials: int, name: str, baseline: float) -> dict[str, float]:
    found, seconds = in_process(options, "search", family, str(trials))
    figures = {f"{name}_trials": float(found["trials"]), f"{name}_s": seconds}
    figures |= {f"{name}_{part.replace(' ', '_')}_s": spent for part, spent in found["parts"].items()}
    figures[f"{name}_ratio"] = found["trials"] * baseline / seconds
    figures[f"{name}_memory_over_trace"] = max(found["memory"].values()) / found["trace_bytes"]
    for stage, peak in found["memory"].items():
        figures[f"{name}_memory_{stage.replace(' ', '_')}_mb"] = peak / 1e6
    figures[f"{name}_trace_mb"] = found["trace_bytes"] / 1e6
    return figures


def _forget_traces(options: argparse.Namespace) -> None:
    import shutil

    shutil.rmtree(Path(options.folder) / "traces", ignore_errors=True)


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="model id (default: %(default)s)")
    parser.add_argument("--task", help="task (default: ruler/LENGTH/niah_single_1)")
    parser.add_argument("--length", type=int, default=4096, help="context length in tokens (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=5, help="tuning samples (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--baseline-trials", type=int, default=1, help="trials of the baseline a family (default: 1)")
    parser.add_argument(
        "--families",
        nargs="+",
        default=list(MARGINAL_GOALS),
        help="masker families, the first is searched (default: %(default)s)",
    )
    parser.add_argument("--trials", type=int, nargs="*", default=[100], help="whole searches of so many trials (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of configurations and searches (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.baseline_trials < 1 or options.baseline_trials > BATCH:
        parser.error(f"--baseline-trials must be 1 to {BATCH}, got {options.baseline_trials}")
    options.task = options.task or f"ruler/{options.length}/niah_single_1"
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.part:
        part = {"compile": load_kernels, "baseline": baseline_trial, "marginal": marginal_costs, "search": whole_search}[
            options.part[0]
        ]
        print(json.dumps(part(options)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        figures, goals = measure(options)
    from benchmark.speed.fault_run import report

    return report({name: float(f"{value:.4g}") for name, value in figures.items()}, goals, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
