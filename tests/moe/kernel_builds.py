"""Compiles each Triton kernel for GPUs that are not here, and prints what the machine code uses: one JSON line for each.

`python tests/moe/kernel_builds.py`, without TRITON_INTERPRET; the compilers are in triton's wheel. The first settings of a kernel
are built for every type and GPU, the others for bf16 on Hopper; TOKENYARD_TESTS=all, which `make portable` sets, builds all.
"""

import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from tokenyard.moe.config import Activation
from tokenyard.moe.kernels import activation, blockwise, casts, logits, operators, rotation, routing, row_plan, rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = {"sm_90": 90, "sm_100": 100}
IDS = (
    "target_ptr",
    "slot_ptr",
    "token_ptr",
    "expert_ptr",
    "count_ptr",
    "begin_ptr",
    "before_ptr",
    "rows_ptr",
    "given_ptr",
    "best_count_ptr",
    "index_ptr",
    "rank_ptr",
    "row_ptr",
    "address_ptr",
)
FLAGS = "filled_ptr", "kept_ptr", "valid_ptr"
FP32 = "weight_ptr", "dot_ptr", "cos_ptr", "sin_ptr", "logit_ptr", "bias_ptr", "score_ptr", "z_ptr", "score_part_ptr", "z_part_ptr"
SUMS = "total_ptr", "largest_ptr", "exps_ptr", "target_logit_ptr", "scale_ptr"
SCALES = "row_scale_ptr", "block_scale_ptr"
GRADIENTS = "grad_weight_ptr", "grad_score_ptr", "grad_z_ptr", "grad_logit_ptr"
COUNTS = "counts_ptr", "best_ptr", "tokens_ptr", "counts_part_ptr", "best_part_ptr", "tokens_part_ptr", "ends_ptr", "lower_ptr"
TYPES = {
    "*bf16": ("parts_ptr",),
    "*i64": IDS,
    "*i32": COUNTS,
    "*i1": FLAGS,
    "*fp32": (*FP32, *SUMS, *SCALES, *GRADIENTS),
    "*fp8e4nv": ("value_ptr", "row_value_ptr", "block_value_ptr"),
    "fp32": ("scale",),
}
NARROW = {blockwise._scale_rows, blockwise._scale_blocks, blockwise._product_of_blocks}
"""Kernels that fp32 has no use for."""
OPTIONS = {
    logits._reduce_logits: {"num_warps": 8},
    logits._cross_entropy_gradient: {"num_warps": 8},
    blockwise._scale_blocks: {"num_warps": 8},
    blockwise._product_of_blocks: {"num_warps": 8, "num_stages": blockwise.STAGES},
}


def kernels() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields each kernel with the settings of a wide model, and those of rare branches."""
    yield rows._copy_rows, {"K": 8, "PADDED": False, "BLOCK": 1024}
    yield rows._copy_rows, {"K": 8, "PADDED": True, "BLOCK": 1024}
    yield rows._sum_rows, {"K": 8, "WEIGHTED": True, "BLOCK": 1024}
    yield rows._sum_rows, {"K": 1, "WEIGHTED": False, "BLOCK": 1024}
    yield rows._unpermute_backward, {"PADDED": False, "BLOCK": 1024}
    yield rows._unpermute_backward, {"PADDED": True, "BLOCK": 1024}
    yield rows._zero_empty_groups, {"PROGRAMS": 64, "BLOCK": 1024}
    yield rows._put_rows, {"INDEXED": True, "BLOCK": 1024}
    yield casts._add_narrow, {"BLOCK": 1024}
    yield casts._bf16_parts, {"PARTS": (0, 1, 2), "BLOCK": 1024}
    yield casts._bf16_parts, {"PARTS": (0, 1, 2, 0), "BLOCK": 1024}
    yield logits._reduce_logits, {"BLOCK": 4096}
    yield logits._cross_entropy_gradient, {"BLOCK": 4096}
    yield row_plan._count_lower, {"CHUNK": operators.CHUNK, "LANES": row_plan.LANES, "EXPERTS": row_plan.EXPERTS}
    yield row_plan._scan_counts, {"BLOCK": row_plan.SCANNED}
    for flag in (False, True):
        sizes = {"K": 8, "CHUNK": operators.CHUNK, "OTHERS": row_plan.OTHERS, "BLOCK": row_plan.SCANNED}
        yield row_plan._place_rows, {**sizes, "DROPPING": flag, "PADDED": flag}
    yield from routers()
    yield blockwise._scale_rows, {"ROWS": blockwise.SCALED_ROWS, "BLOCK": 128}
    for transposed in (False, True):
        yield blockwise._scale_blocks, {"TRANSPOSED": transposed, "BLOCK": 128}
    tiles = {"ROWS": blockwise.ROWS, "BLOCK": 128, "TILES": blockwise.TILES_OF_ROWS}
    yield blockwise._product_of_blocks, {**tiles, "LANES": 256}
    for one in Activation:
        shared = {"KIND": one.value, "GATED": one.projections == 2, "BLOCK": 1024}
        yield activation._activate, shared
        yield activation._activate_backward, shared | {"WEIGHTED": True, "KEEPS": True}
        yield activation._activate_backward, shared | {"WEIGHTED": False, "KEEPS": False}
    for interleaved in (False, True):
        for rest in (0, 64):
            yield rotation._rotate, {"INTERLEAVED": interleaved, "INVERSE": True, "HEADS": 16, "PAIRS": 64, "REST": rest}


def routers() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields the router's kernels with the settings of Qwen3, DeepSeek-V3, gpt-oss, and more experts than any has."""
    plain = {"SIGMOID": False, "AFTER": False, "NORMALIZE": True, "GROUPS": 1, "TOP_GROUPS": 1, "TOP2": False, "BIASED": False}
    plain |= {"MASKED": True, "GIVEN": False, "BEST": False, "K": 8}
    v3 = plain | {"SIGMOID": True, "GROUPS": 8, "TOP_GROUPS": 4, "TOP2": True, "BIASED": True, "BEST": True}
    after = plain | {"AFTER": True, "NORMALIZE": False, "K": 4}
    for settings, columns in ((plain, 128), (v3, 256), (after, 32), (plain | {"GIVEN": True, "BIASED": True}, 8), (plain, 1024)):
        tokens, width = routing.tile(columns)
        yield routing._route, {**settings, "CHUNK": routing.CHUNK, "TOKENS": tokens, "COLUMNS": width}
        shared = {name: settings[name] for name in ("SIGMOID", "AFTER", "NORMALIZE", "MASKED", "K")}
        flags = {"WEIGHTED": True, "BALANCED": True, "Z": True}
        yield routing._route_backward, {**shared, **flags, "TOKENS": tokens, "COLUMNS": width}
    for best in (False, True):
        yield routing._sum_chunks, {"BEST": best, "SUMMED": routing.SUMMED, "COLUMNS": routing.COLUMNS}


def build(kernel: Any, settings: dict[str, Any], dtype: str, architecture: str) -> dict[str, Any]:
    """Compiles with widths and addresses that 16 divides, as Triton finds them in a wide model."""
    signature = {name: "constexpr" if name in settings else _type(name, dtype) for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in settings.items()}
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", ARCHITECTURES[architecture], 32), options=OPTIONS.get(kernel, {"num_warps": 4})
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        shown = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", shown)
    assert usage is not None, shown
    registers, stack, _, local = map(int, usage.groups())
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "settings": settings,
        "dtype": dtype,
        "architecture": architecture,
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": compiled.metadata.shared,
        "tensor_core": sorted(set(re.findall(r"\b(?:[HQ]GMMA|UTC\w*MMA)\b", code))),
        "wide_loads": len(re.findall(r"ld\.global[\w.]*\.v[48]|cp\.async\.cg\.shared\.global \[.*, 0x10", ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.]*\.v[48]", ptx)),
    }


def _type(name: str, dtype: str) -> str:
    found = [kind for kind, names in TYPES.items() if name in names]
    return found[0] if found else f"*{dtype}" if name.endswith("_ptr") else "i32"


if __name__ == "__main__":
    seen: set[str] = set()
    for kernel, settings in kernels():
        whole = kernel.__name__ not in seen or os.environ.get("TOKENYARD_TESTS") == "all"
        seen.add(kernel.__name__)
        dtypes = ("bf16",) if kernel in NARROW else ("bf16", "fp32")
        for dtype, architecture in itertools.product(dtypes, ARCHITECTURES) if whole else [("bf16", "sm_90")]:
            print(json.dumps(build(kernel, settings, dtype, architecture)), flush=True)
