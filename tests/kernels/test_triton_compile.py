"""The Triton kernels compile for real GPUs. That needs no GPU, and the interpreter would not notice if they did not."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("with TRITON_INTERPRET=1 there is nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sparse_attention_hub.kernels.triton import (  # noqa: E402
    groups_constants,
    merge_constants,
    rows_constants,
)
from sparse_attention_hub.kernels.triton_kernels import forks_kernel, groups_kernel, merge_kernel, rows_kernel  # noqa: E402

#: What a GPU of compute capability 8.6 gives a program, the least of those with tensor cores for bfloat16.
SHARED_LIMIT = 99 * 1024
#: Registers of a multiprocessor, and how many programs of a kernel should find room in them.
REGISTERS, PROGRAMS = 65536, {"rows": 4, "forks": 3, "groups": 1}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
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


def check(compiled) -> None:
    assert compiled.asm["cubin"], "nothing came out of the assembler"
    assert compiled.metadata.shared <= SHARED_LIMIT
    assert WIDE_LOAD.search(compiled.asm["ptx"]), "keys and values are not read 16 bytes at a time"


class Resources(NamedTuple):
    """registers of a thread; stack: bytes of a thread that did not fit the registers, and go through memory."""

    registers: int
    stack: int


def resources(compiled, folder: Path) -> Resources:
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    shown = subprocess.run([CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found is not None, shown
    return Resources(int(found[1]), int(found[2]))


def check_resources(compiled, warps: int, programs: int, folder: Path) -> None:
    found = resources(compiled, folder)
    assert found.stack == 0, f"{found.stack} bytes of a thread go through memory"
    assert found.registers * 32 * warps * programs <= REGISTERS, (
        f"{found.registers} registers: less than {programs} programs fit"
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "weighted"),
    [
        (80, torch.bfloat16, 128, False),
        (86, torch.bfloat16, 128, True),
        (90, torch.bfloat16, 128, True),
        (90, torch.float32, 128, True),
        (80, torch.float16, 80, True),
        (90, torch.bfloat16, 64, True),
        (80, torch.bfloat16, 256, True),
        (90, torch.bfloat16, 256, True),
    ],
)
def test_rows_kernel_compiles(capability, dtype, dim, weighted, tmp_path):
    queries, values = shapes(dtype, 32, 1, dim)
    constants = rows_constants(queries, values, weighted)
    compiled = compile_kernel(rows_kernel, constants, gather_pointers(dtype, "i32"), capability)
    check(compiled)
    check_resources(compiled, 4, PROGRAMS["rows"], tmp_path)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim"), [(80, torch.bfloat16, 128), (86, torch.float32, 128), (90, torch.bfloat16, 64)]
)
def test_forks_kernel_compiles(capability, dtype, dim, tmp_path):
    queries, values = shapes(dtype, 32, 1, dim)
    pointers = gather_pointers(dtype, "i32") | {f"own_{name}_ptr": f"*{NAMES[dtype]}" for name in "kv"}
    pointers |= {"p_ptr": "*fp32", "table_ptr": "*i64"}
    compiled = compile_kernel(forks_kernel, rows_constants(queries, values, True), pointers, capability)
    check(compiled)
    check_resources(compiled, 4, PROGRAMS["forks"], tmp_path)


#: Rows of a kv head with four query heads: tiles of 16, 32 and 64 rows.
TILES = [*itertools.product((torch.bfloat16, torch.float32), (1, 8, 16), (64, 128, 256))]


@pytest.mark.parametrize(
    ("capability", "dtype", "rows", "dim"),
    [
        *((80, *tile) for tile in TILES if tile[0] == torch.bfloat16),
        *((86, *tile) for tile in TILES if tile[0] == torch.float32),
        *((90, *tile) for tile in TILES if tile[0] == torch.bfloat16),
        *((86, *tile) for tile in TILES if tile[0] == torch.bfloat16 and tile[2] == 128),
        (80, torch.float16, 32, 96),
        (86, torch.float16, 5, 80),
    ],
)
def test_groups_kernel_compiles(capability, dtype, rows, dim, tmp_path):
    """With weights and a softcap, which take the most registers. No tile may spill: what does not fit goes through memory."""
    queries, values = shapes(dtype, 32, rows, dim)
    constants, options = groups_constants(queries, values, 8, True, True)
    compiled = compile_kernel(groups_kernel, constants, gather_pointers(dtype, "i32"), capability, **options)
    check(compiled)
    check_resources(compiled, options["num_warps"], PROGRAMS["groups"], tmp_path)
    if dtype != torch.float32:
        assert re.search(r"mma\.sync|wgmma", compiled.asm["ptx"]), "the tensor cores are not used"
        assert not re.search(r"cvt\.f32\.bf16", re.split(r"mma", compiled.asm["ptx"])[0]), "keys are widened before the product"


def test_groups_kernel_compiles_without_weights(tmp_path):
    queries, values = shapes(torch.bfloat16, 32, 1, 128)
    constants, options = groups_constants(queries, values, 8, False)
    compiled = compile_kernel(groups_kernel, constants, gather_pointers(torch.bfloat16, "i32"), 80, **options)
    check(compiled)
    check_resources(compiled, options["num_warps"], PROGRAMS["groups"], tmp_path)


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_merge_kernel_compiles(capability, tmp_path):
    pointers = dict.fromkeys(["partial_ptr", "top_ptr", "total_ptr", "sink_ptr", "lse_ptr"], "*fp32") | {"out_ptr": "*bf16"}
    compiled = compile_kernel(merge_kernel, merge_constants(17, 128, sinks=True), pointers, capability)
    check(compiled)
    check_resources(compiled, 4, 4, tmp_path)
