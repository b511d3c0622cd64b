"""The Triton kernels compile for real GPUs. That needs no GPU, and the interpreter would not notice if they did not."""

from __future__ import annotations

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("with TRITON_INTERPRET=1 there is nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sparse_attention_hub.kernels.triton import (  # noqa: E402
    GROUPS_STAGES,
    groups_constants,
    groups_warps,
    merge_constants,
    rows_constants,
)
from sparse_attention_hub.kernels.triton_kernels import groups_kernel, merge_kernel, rows_kernel  # noqa: E402

#: What a GPU of compute capability 8.6 gives a program, the least of those with tensor cores for bfloat16.
SHARED_LIMIT = 99 * 1024
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
#: Loads of 16 bytes at once, into registers or straight into shared memory.
WIDE_LOAD = re.compile(r"ld\.global[^;]*\.v4\.b32|ld\.global[^;]*\.v2\.b64|cp\.async\.cg\.shared\.global[^;]*0x10")


def compile_kernel(kernel, constants: dict, pointers: dict[str, str], capability: int, **options):
    """The kernel compiled as its launcher would: pointers and K/V strides divisible by 16, innermost strides 1."""
    constants = dict(constants)
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("sq_d", "sk_d", "sv_d"):
            signature[name], constants[name] = "constexpr", 1
        elif name in ("scaling", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = pointers.get(name, "i32")
            if name in pointers or name[:2] in ("sq", "sk", "sv"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": 4, "enable_fp_fusion": True} | options
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def shapes(dtype: torch.dtype, heads: int, rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(1, heads, rows, dim, dtype=dtype), torch.empty(1, 8, 1, dim, dtype=dtype)


def gather_pointers(dtype: torch.dtype, index: str) -> dict[str, str]:
    floats = {"w_ptr": "*fp32", "partial_ptr": "*fp32", "top_ptr": "*fp32", "total_ptr": "*fp32"}
    return {f"{name}_ptr": f"*{NAMES[dtype]}" for name in "qkv"} | {"i_ptr": f"*{index}"} | floats


def check(compiled, *, wide: bool) -> None:
    assert compiled.asm["cubin"], "nothing came out of the assembler"
    assert compiled.metadata.shared <= SHARED_LIMIT
    if wide:
        assert WIDE_LOAD.search(compiled.asm["ptx"]), "keys and values are not read 16 bytes at a time"


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "weighted"),
    [
        (80, torch.bfloat16, 128, False),
        (90, torch.bfloat16, 128, True),
        (90, torch.float32, 128, True),
        (80, torch.float16, 80, True),
    ],
)
def test_rows_kernel_compiles(capability, dtype, dim, weighted):
    queries, values = shapes(dtype, 32, 1, dim)
    constants = rows_constants(queries, values, weighted)
    check(compile_kernel(rows_kernel, constants, gather_pointers(dtype, "i32"), capability), wide=True)


@pytest.mark.parametrize(
    ("capability", "dtype", "rows", "dim", "weighted", "capped"),
    [
        (80, torch.bfloat16, 1, 128, False, False),
        (90, torch.bfloat16, 1, 128, True, True),
        (90, torch.bfloat16, 32, 128, True, False),
        (80, torch.float16, 32, 96, True, False),
        (80, torch.float32, 8, 128, True, True),
        (90, torch.bfloat16, 8, 256, True, False),
    ],
)
def test_groups_kernel_compiles(capability, dtype, rows, dim, weighted, capped):
    queries, values = shapes(dtype, 32, rows, dim)
    constants = groups_constants(queries, values, 8, weighted, capped)
    options = {"num_warps": groups_warps(constants), "num_stages": GROUPS_STAGES}
    compiled = compile_kernel(groups_kernel, constants, gather_pointers(dtype, "i32"), capability, **options)
    check(compiled, wide=True)
    if dtype != torch.float32:
        assert re.search(r"mma\.sync|wgmma", compiled.asm["ptx"]), "the tensor cores are not used"


@pytest.mark.parametrize("capability", [80, 90])
def test_merge_kernel_compiles(capability):
    pointers = dict.fromkeys(["partial_ptr", "top_ptr", "total_ptr", "sink_ptr", "lse_ptr"], "*fp32") | {"out_ptr": "*bf16"}
    check(compile_kernel(merge_kernel, merge_constants(17, 128, sinks=True), pointers, capability), wide=True)
