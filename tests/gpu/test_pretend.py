"""The pretended GPU itself: what tensors claim, what is refused, and what is counted."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from cases import CASES, HALF, Case, answer, exactly, make_call
from pretend import CUDA, PretendedGPU, is_on_device

from sparse_attention_hub import Mask


def test_tensors_claim_to_be_on_the_device() -> None:
    gpu = PretendedGPU()
    host = torch.arange(6.0)
    with gpu:
        own = host.to("cuda")
        made = torch.zeros(3, device=own.device)
        for tensor in (own, made, own[2:], own + 1, own.view(2, 3) @ own.view(3, 2), torch.zeros_like(own), own.half()):
            assert tensor.is_cuda and tensor.device == CUDA and not tensor.is_cpu and tensor.get_device() == 0
        back = own.cpu()
        assert not host.is_cuda and not back.is_cuda and back.numpy().sum() == 15
        assert own.to(torch.int32).is_cuda and not own.to(host).is_cuda and host.to(own).is_cuda
    assert not own.is_cuda  # outside, they are what they are


def test_what_a_gpu_refuses_is_refused() -> None:
    with PretendedGPU() as gpu:
        own, host = gpu.move(torch.ones(3)), torch.ones(3)
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            own.numpy()
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            own + host
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            torch.cat([own, host])
        assert (own + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a number of the host may join


def test_waits_operations_and_launches_are_counted() -> None:
    gpu = PretendedGPU()
    with gpu:
        own = gpu.move(torch.arange(6.0))
        (own.view(2, 3)[1:] + 1).sum()
        assert gpu.totals() == {"waits": 0, "operations": 2, "launches": 0}
        assert gpu.operations == {"add": 1, "sum": 1}
        for wait in (
            lambda: own.sum().item(),
            lambda: bool(own[0]),
            lambda: own.tolist(),
            lambda: own[own > 2],
            lambda: own.nonzero(),
            lambda: own.cpu(),
            lambda: torch.tensor([1, 2], device="cuda"),
            lambda: torch.ones(2).to("cuda"),
            lambda: own[[1, 2]],
            lambda: own[torch.tensor([1, 2])],
            lambda: own.unique(),
        ):
            gpu.clear()
            wait()
            assert gpu.totals()["waits"] == 1, gpu.waits
        gpu.clear()
        host = torch.ones(3)
        assert int(host.sum()) == 3 and host.tolist() and not gpu.waits and not gpu.operations
        torch.ones(2).to("cuda", non_blocking=True)
        assert not gpu.waits


def test_waits_are_named_by_line_and_warned_of() -> None:
    gpu = PretendedGPU()
    with gpu, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        flags = gpu.move(torch.tensor([[[[True, False], [True, True]]]]))
        Mask.from_dense(flags).lists()
    assert all(place.startswith("sparse_attention_hub/lists.py:") for place in gpu.waits) and gpu.waits
    assert {f"{warning.filename}:{warning.lineno}" for warning in seen} == {place.split(" ")[0] for place in gpu.waits}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stand_ins_compute_what_the_kernels_do(case: Case) -> None:
    """So that what is tested on the pretended device is tested with the kernels' own lists and weights."""
    expected = exactly(make_call(case))
    with PretendedGPU() as gpu:
        call = make_call(case)
        gpu.move([call.queries, call.keys, call.values, call.sinks, call.mask._dense, call.mask._lists])
        output, lse = answer(call, "auto")
        assert is_on_device(output) and gpu.launches.total() in (0, 2)
        output, lse = output.cpu(), lse.cpu()
    tolerance = {torch.float32: 3e-6, HALF: 1e-3}.get(case.dtype, 8e-3)
    torch.testing.assert_close(output.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=3e-6, atol=3e-6)
