"""Compiles kernels for sm_80 and sm_90 and prints what came out, as JSON; needs no GPU.

    python compile_kernels.py core|all

Run by test_compiles.py in a process of its own, because TRITON_INTERPRET must not be set. Judges
nothing: the limits are in the test.
"""

import json
import math
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

from offramp_kernels.add_layernorm_kernel import add_layernorm_kernel, norm_config
from offramp_kernels.compact_plan_kernel import SCAN_CONFIGS, compact_plan_kernel
from offramp_kernels.exit_head_kernel import (
    POOLER_SLICE,
    ROW_CONFIG,
    TILE_CONFIG,
    block_of,
    exit_head_kernel,
)
from offramp_kernels.gather_rows_kernel import gather_rows_kernel, tile_config
from offramp_kernels.linear_kernel import (
    GROUP_ROWS,
    LARGE,
    PRECISE,
    SMALL,
    GemmConfig,
    linear_kernel,
)
from offramp_kernels.varlen_attn_kernel import (
    ATTENTION_CONFIGS,
    PRECISE_CONFIGS,
    varlen_attn_kernel,
)

ARCHITECTURES = (80, 90)
WIDTHS = (384, 768)
DTYPES = ("fp16", "bf16", "fp32")  # fp64 is for oracles; nobody serves it
GATE_SIZE = 32


@dataclass(frozen=True)
class Build:
    name: str
    source: ASTSource
    num_warps: int
    num_stages: int = 3
    fp_fusion: bool = False
    max_registers: int | None = None


def compact_plan() -> Iterator[Build]:
    for scan in SCAN_CONFIGS:
        types = {"keep_ptr": "*i1", "n_rows": "i32"}
        constants = {"BLOCK": scan.block}
        source = ast_source(compact_plan_kernel, types, constants)
        yield Build(f"compact_plan-{scan.block}", source, scan.num_warps)


def gather_rows() -> Iterator[Build]:
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


def exit_head() -> Iterator[Build]:
    """Each config at its largest, and a lean one: what all the rest lies between."""
    yield exit_build(768, 2, "bf16", cls=True)
    yield exit_build(384, 32, "fp32", mean=True, cls=True, gate=True)
    yield exit_build(768, 2, "bf16", mean=True, gate=True)
    yield exit_build(768, 150, "bf16", mean=True, gate=True)
    yield exit_build(768, 150, "fp32", mean=True, cls=True, gate=True, pooler=True)


def exit_build(
    width: int,
    labels: int,
    dtype: str,
    *,
    mean: bool = False,
    cls: bool = False,
    gate: bool = False,
    pooler: bool = False,
) -> Build:
    config = ROW_CONFIG if labels <= 32 and not pooler else TILE_CONFIG
    pooled = width * (mean + cls)
    gate_size = GATE_SIZE if gate else 0
    optional = {
        "gate": ("gate_weight_ptr", "gate_bias_ptr", "gate_out_weight_ptr", "gate_out_bias_ptr"),
        "pooler": ("pooled_ptr", "pooler_weight_ptr", "pooler_bias_ptr"),
    }
    floats = ("classifier_weight_ptr", "classifier_bias_ptr", "logits_ptr")
    types = dict.fromkeys((*floats, *optional["gate"], *optional["pooler"]), "*fp32")
    types |= dict.fromkeys(("vote_signals_ptr", "threshold_ptr", "signal_ptr"), "*fp64")
    types |= dict.fromkeys(("keep_ptr", "by_policy_ptr"), "*i1")
    types |= dict.fromkeys(("n_rows", "exit_layer", "exit_number", "is_last"), "i32")
    absent = () if gate else optional["gate"]
    absent += () if pooler else optional["pooler"]
    constants = dict.fromkeys(absent) | {
        "LOG_LABELS": math.log(labels),
        "WIDTH": width,
        "MEAN": mean,
        "CLS": cls,
        "POOLED": pooled,
        "STATE": width if pooler else pooled,
        "N_LABELS": labels,
        "GATE_SIZE": gate_size,
        "MAJORITY": True,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_LABELS": block_of(labels),
        "BLOCK_GATE": block_of(gate_size),
        "BLOCK_STATE": POOLER_SLICE,
    }
    source = ast_source(exit_head_kernel, types | {"hidden_ptr": f"*{dtype}"}, constants)
    parts = (mean and "mean", cls and "cls", gate and "gate", pooler and "pooler")
    name = "-".join(["exit_head", str(width), str(labels), dtype, *filter(None, parts)])
    return Build(name, source, config.num_warps, max_registers=config.max_registers)


def add_layernorm() -> Iterator[Build]:
    for width, dtype in ((128, "fp32"), (384, "bf16"), (768, "bf16"), (1024, "fp32")):
        config = norm_config(width)
        names = ("x_ptr", "residual_ptr", "input_bias_ptr", "weight_ptr", "bias_ptr", "out_ptr")
        constants = {
            "EPS": 1e-12,
            "WIDTH": width,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_COLUMNS": config.block_columns,
        }
        types = dict.fromkeys(names, f"*{dtype}") | {"n_rows": "i32"}
        source = ast_source(add_layernorm_kernel, types, constants)
        yield Build(f"add_layernorm-{width}-{dtype}", source, config.num_warps, fp_fusion=True)


def linear() -> Iterator[Build]:
    """Each tile with each epilogue that an encoder layer has."""
    for width, dtype in ((768, "bf16"), (384, "fp16")):
        yield linear_build("large", LARGE, width, 4 * width, dtype, "gelu")
        yield linear_build("large", LARGE, 4 * width, width, dtype, "none", residual=True)
    yield linear_build("small", SMALL, 768, 3072, "bf16", "gelu_tanh")
    yield linear_build("small", SMALL, 3072, 768, "bf16", "none", residual=True)
    yield linear_build("precise", PRECISE, 768, 3072, "fp32", "gelu")


def linear_build(
    tile: str,
    config: GemmConfig,
    inputs: int,
    outputs: int,
    dtype: str,
    activation: str,
    *,
    residual: bool = False,
) -> Build:
    names = ("x_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "out_ptr")
    constants = {} if residual else {"residual_ptr": None}
    constants |= {
        "ACTIVATION": activation,
        "N_INPUTS": inputs,
        "N_OUTPUTS": outputs,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_OUTPUTS": config.block_outputs,
        "BLOCK_INPUTS": config.block_inputs,
        "GROUP": GROUP_ROWS,
    }
    types = dict.fromkeys(names, f"*{dtype}") | {"n_rows": "i32"}
    source = ast_source(linear_kernel, types, constants)
    name = f"linear-{tile}-{inputs}-{outputs}-{dtype}"
    return Build(name, source, config.num_warps, config.num_stages, fp_fusion=True)


def varlen_attn() -> Iterator[Build]:
    for configs, dtype in ((ATTENTION_CONFIGS, "bf16"), (PRECISE_CONFIGS, "fp32")):
        for config in configs:
            for dim in (32, 64):
                constants = {
                    "HEADS": 12,
                    "DIM": dim,
                    "HEADS_HERE": config.heads,
                    "BLOCK_TOKENS": config.block_tokens,
                    "BLOCK_QUERIES": config.block_queries,
                }
                types = dict.fromkeys(("qkv_ptr", "out_ptr"), f"*{dtype}")
                source = ast_source(varlen_attn_kernel, types, constants)
                name = f"varlen_attn-{config.block_tokens}-{dim}-{dtype}"
                yield Build(name, source, config.num_warps, fp_fusion=True)


# What the fast suite compiles, besides plan and gather, and for sm_90 only: of each op the builds
# that come closest to a limit.
CORE = {
    "exit_head-768-2-bf16-mean-gate",
    "exit_head-768-150-bf16-mean-gate",
    "add_layernorm-768-bf16",
    "linear-large-768-3072-bf16",
    "linear-small-3072-768-bf16",
    "varlen_attn-16-32-bf16",
    "varlen_attn-128-64-bf16",
}


def selected(which: str) -> Iterator[tuple[Build, int]]:
    for op in (compact_plan, gather_rows):
        yield from ((build, architecture) for build in op() for architecture in ARCHITECTURES)
    for op in (exit_head, add_layernorm, linear, varlen_attn):
        for build in op():
            for architecture in ARCHITECTURES:
                if which == "all" or (build.name in CORE and architecture == 90):
                    yield build, architecture


def ast_source(kernel, types: dict[str, str], constants: dict[str, object]) -> ASTSource:
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
    options = {
        "num_warps": build.num_warps,
        "num_stages": build.num_stages,
        "enable_fp_fusion": build.fp_fusion,
        "maxnreg": build.max_registers,
    }
    compiled = triton.compile(build.source, target=target, options=options)
    # Any load or store of global memory, with whatever qualifiers stand between.
    accesses = re.findall(r"\b((?:ld|st)\.global[.\w:]*)", compiled.asm["ptx"])
    products = re.findall(r"\b(wgmma\.mma_async|mma\.sync)\b", compiled.asm["ptx"])
    return {
        "name": build.name,
        "architecture": architecture,
        "num_warps": build.num_warps,
        "shared": compiled.metadata.shared,  # asked for at launch; the cubin states only its own
        "accesses": sorted(set(accesses)),
        "products": sorted(set(products)),
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
    json.dump([inspect(*build) for build in selected(sys.argv[1])], sys.stdout)
