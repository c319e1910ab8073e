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
from tokenyard.moe.kernels import activation, rotation, rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = {"sm_90": 90, "sm_100": 100}
TABLES = {"slot_ptr": "*i64", "token_ptr": "*i64", "filled_ptr": "*i1", "ends_ptr": "*i32"}
FP32 = ("weight_ptr", "dot_ptr", "cos_ptr", "sin_ptr")


def kernels() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields each kernel with the settings of a wide model, and those of rare branches."""
    yield rows._sum_rows, {"K": 8, "WEIGHTED": True, "BLOCK": 1024}
    yield rows._sum_rows, {"K": 1, "WEIGHTED": False, "BLOCK": 1024}
    yield rows._unpermute_backward, {"PADDED": False, "BLOCK": 1024}
    yield rows._unpermute_backward, {"PADDED": True, "BLOCK": 1024}
    yield rows._zero_empty_groups, {"PROGRAMS": 64, "BLOCK": 1024}
    for one in Activation:
        shared = {"KIND": one.value, "GATED": one.projections == 2, "BLOCK": 1024}
        yield activation._activate, shared
        yield activation._activate_backward, shared | {"WEIGHTED": True, "KEEPS": True}
        yield activation._activate_backward, shared | {"WEIGHTED": False, "KEEPS": False}
    for interleaved in (False, True):
        for rest in (0, 64):
            yield rotation._rotate, {"INTERLEAVED": interleaved, "INVERSE": True, "HEADS": 16, "PAIRS": 64, "REST": rest}


def build(kernel: Any, settings: dict[str, Any], dtype: str, architecture: str) -> dict[str, Any]:
    """Compiles with widths and addresses that 16 divides, as Triton finds them in a wide model."""
    signature = {name: "constexpr" if name in settings else _type(name, dtype) for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in settings.items()}
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[architecture], 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        shown = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
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
        "wide_loads": len(re.findall(r"ld\.global[\w.]*\.v[48]", ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.]*\.v[48]", ptx)),
    }


def _type(name: str, dtype: str) -> str:
    return TABLES.get(name) or ("*fp32" if name in FP32 else f"*{dtype}" if name.endswith("_ptr") else "i32")


if __name__ == "__main__":
    seen: set[str] = set()
    for kernel, settings in kernels():
        whole = kernel.__name__ not in seen or os.environ.get("TOKENYARD_TESTS") == "all"
        seen.add(kernel.__name__)
        for dtype, architecture in itertools.product(("bf16", "fp32"), ARCHITECTURES) if whole else [("bf16", "sm_90")]:
            print(json.dumps(build(kernel, settings, dtype, architecture)), flush=True)
