"""Compiles every kernel for sm_80 and sm_90 and prints what came out, as JSON; needs no GPU.

Run by test_compiles.py in a process of its own, because TRITON_INTERPRET must not be set. Judges
nothing: the limits are in the test.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offramp_kernels.compact_plan_kernel import SCAN_CONFIGS, compact_plan_kernel
from offramp_kernels.gather_rows_kernel import gather_rows_kernel, tile_config

ARCHITECTURES = (80, 90)
WIDTHS = (384, 768)
DTYPES = ("fp16", "bf16", "fp32")  # fp64 is for oracles; nobody serves it


@dataclass(frozen=True)
class Build:
    name: str
    source: ASTSource
    num_warps: int


def builds() -> Iterator[Build]:
    for scan in SCAN_CONFIGS:
        types = {"keep_ptr": "*i1", "n_rows": "i32"}
        constants = {"BLOCK": scan.block}
        source = ast_source(compact_plan_kernel, types, constants)
        yield Build(f"compact_plan-{scan.block}", source, scan.num_warps)
    for width in WIDTHS:
        tile = tile_config(width)
        for dtype in DTYPES:
            types = {"values_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "out_rows": "i32"}
            constants = {
                "WIDTH": width,
                "BLOCK_ROWS": tile.block_rows,
                "BLOCK_COLUMNS": tile.block_columns,
            }
            source = ast_source(gather_rows_kernel, types, constants)
            yield Build(f"gather_rows-{width}-{dtype}", source, tile.num_warps)


def ast_source(kernel, types: dict[str, str], constants: dict[str, int]) -> ASTSource:
    """Pointers divisible by 16, as the launchers guarantee; int32 unless ``types`` says else."""
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*i32")
        for name in kernel.arg_names
    }
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )


def inspect(build: Build, architecture: int) -> dict[str, object]:
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": build.num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(build.source, target=target, options=options)
    # Any load or store of global memory, with whatever qualifiers stand between.
    accesses = re.findall(r"\b((?:ld|st)\.global[.\w:]*)", compiled.asm["ptx"])
    return {
        "name": build.name,
        "architecture": architecture,
        "num_warps": build.num_warps,
        "shared": compiled.metadata.shared,  # asked for at launch; the cubin states only its own
        "accesses": sorted(set(accesses)),
        "usage": resource_usage(compiled.asm["cubin"]),
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL as the bundled cuobjdump reports them."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {
        name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report)
    }


if __name__ == "__main__":
    json.dump([inspect(b, arch) for b in builds() for arch in ARCHITECTURES], sys.stdout)
