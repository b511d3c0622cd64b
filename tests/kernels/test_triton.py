"""The Triton kernels against the float64 reference and the compiled loops: on the GPU, or interpreted without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, FORKS, HALF, UNIFORMS, answer, exactly, make_call, make_forks

from sparse_attention_hub import Mask
from sparse_attention_hub.maskers.uniforms import keyed_uniforms

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What run_triton.py gives: (case, kernel) to (output, log-sum-exp)."""
    if torch.cuda.is_available():
        from run_triton import answer_all

        return answer_all("cuda")
    path = tmp_path_factory.mktemp("triton") / "answers.pt"
    folders = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, str(HERE / "run_triton.py"), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def assert_close(answer, expected, tolerance: float) -> None:
    output, lse = answer
    torch.testing.assert_close(output.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference(answers, case):
    expected = exactly(make_call(case))
    kernels = [kernel for kernel in ("rows", "groups") if (case.name, kernel) in answers]
    assert kernels == (["rows", "groups"] if case.rows <= 3 else ["groups"])
    for kernel in kernels:
        # Tensor cores take the softmax terms in the values' dtype; everything else is float32.
        tolerance = 3e-6 if kernel == "rows" else {torch.float32: 3e-6, HALF: 1e-3}.get(case.dtype, 8e-3)
        assert answers[case.name, kernel][0].dtype == torch.float32
        assert_close(answers[case.name, kernel], expected, tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_own_choice_equals_loops(answers, case):
    output, lse = answer(make_call(case), "cpu")
    found = answers[case.name, "own choice"]
    assert found[0].dtype == case.dtype and found[0].shape == (case.batch, case.rows, case.heads, case.dim)
    assert_close(found, (output.double(), lse.double()), {torch.float32: 3e-6, HALF: 2e-3}.get(case.dtype, 1.6e-2))


def test_row_without_keys_is_zero(answers):
    sinks = [case.name for case in CASES if case.sinks]
    for (name, _), (output, lse) in answers.items():
        if name not in ("far", "short", "forks", "uniforms"):
            assert output[:, -1, 0].abs().max() == 0
            assert torch.isneginf(lse[:, 0, -1]).all() != (name in sinks)


@pytest.mark.parametrize("place", range(len(FORKS)))
def test_forks_equal_their_own_calls(answers, place):
    output, lse = answers["forks", str(place)]
    for row, call in enumerate(make_forks(*FORKS[place]).calls):
        assert_close((output[row : row + 1], lse[row : row + 1]), exactly(call), 3e-6)


def test_uniforms_are_the_same_bits_as_on_a_cpu(answers):
    assert torch.equal(answers["uniforms", ""][0], keyed_uniforms(*UNIFORMS))


@pytest.mark.parametrize("kernel", ["rows", "groups"])
def test_rows_beyond_32_bit_offsets(answers, kernel):
    for far, short in zip(answers["far", kernel], answers["short", kernel], strict=True):
        torch.testing.assert_close(far, short, rtol=1e-3, atol=1e-3)
        assert far.abs().max() > 0


def lists(held: int, rows: int = 1, heads: int = 8, kv_heads: int = 2) -> Mask:
    indices = torch.zeros(1, held, rows, 1, dtype=torch.int64)
    return Mask.from_indices(indices, (1, heads, rows, 4), kv_heads=kv_heads)


@pytest.mark.parametrize(
    ("mask", "kernel"),
    [
        (lists(8), "rows"),
        (lists(2), "groups"),
        (lists(1), "groups"),
        (lists(2, heads=2), "rows"),
        (lists(1, heads=2), "rows"),
        (lists(8, rows=3), "groups"),
        (lists(2, rows=3, heads=2), "groups"),
    ],
)
def test_choice_of_kernel(mask, kernel):
    from sparse_attention_hub.kernels.triton import choose_kernel

    assert choose_kernel(mask, mask.shape[2], 2) == kernel


@pytest.mark.parametrize(
    ("programs", "width", "processors", "splits"),
    [(8, 1638, 132, 25), (32, 1638, 132, 17), (8, 100_000, 132, 66), (528, 1638, 132, 1), (1, 10, 132, 1)],
)
def test_choice_of_splits(programs, width, processors, splits):
    from sparse_attention_hub.kernels.triton import choose_splits

    assert choose_splits(programs, width, processors) == splits


def test_faulty_calls_are_refused():
    from sparse_attention_hub.kernels.triton import attend_triton

    call = make_call(CASES[0])
    with pytest.raises(ValueError, match="kernel must be one of rows, groups, got 'fast'"):
        attend_triton(call, kernel="fast")
    with pytest.raises(ValueError, match=r"got torch\.float16, torch\.float32"):
        attend_triton(call._replace(queries=call.queries.half()))
    doubles = {name: getattr(call, name).double() for name in ("queries", "keys", "values")}
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        attend_triton(call._replace(**doubles))


def test_backend_triton_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = make_call(CASES[0])
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        answer(call, "triton")
