"""The kernels compile for Hopper and Blackwell, without a GPU: no spilled registers, and loads of 16 bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILDER = Path(__file__).with_name("kernel_builds.py")
MOST_REGISTERS = 64
"""With 4 warps, 8 programs fit on a multiprocessor, which is enough to keep its loads busy."""
COMPUTING = {"_count_lower", "_scan_counts", "_place_rows", "_route", "_sum_chunks", "_route_backward"}
"""Kernels that compare and sum numbers, which they have in registers, rather than move rows."""
MULTIPLYING = {"_product_of_blocks"}
"""Kernels with products."""
TENSOR_CORES = {"sm_90": ["QGMMA"], "sm_100": ["UTCQMMA"]}
"""Their instructions, of e4m3: wgmma and tcgen05."""
MOST_COMPUTING = 255
"""All that a thread has."""
MOST_OF_A_BLOCK = 128
"""With 8 warps, 2 programs fit on a multiprocessor: each thread holds 64 numbers."""
MOST_SHARED = 227 * 1024
"""Bytes of shared memory of a program, on both."""


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    built = subprocess.run([sys.executable, BUILDER], capture_output=True, text=True, env=environment, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    return [json.loads(line) for line in built.stdout.splitlines()]


def test_every_kernel_is_built_for_both(builds: list[dict]) -> None:
    kernels = {"_copy_rows", "_sum_rows", "_unpermute_backward", "_zero_empty_groups", "_activate", "_activate_backward", "_rotate"}
    kernels |= {"_add_narrow", "_bf16_parts", "_reduce_logits", "_cross_entropy_gradient", "_put_rows"} | COMPUTING
    kernels |= {"_scale_rows", "_scale_blocks"} | MULTIPLYING
    assert {(one["kernel"], one["architecture"]) for one in builds} == {(k, a) for k in kernels for a in ("sm_90", "sm_100")}


def test_nothing_is_spilled(builds: list[dict]) -> None:
    assert [one for one in builds if one["stack"] or one["local"]] == []
    most = {**dict.fromkeys(COMPUTING | MULTIPLYING, MOST_COMPUTING), "_scale_blocks": MOST_OF_A_BLOCK}
    assert [one for one in builds if one["registers"] > most.get(one["kernel"], MOST_REGISTERS)] == []


def test_products_are_made_on_tensor_cores(builds: list[dict]) -> None:
    multiplying = [one for one in builds if one["kernel"] in MULTIPLYING]
    assert [one for one in multiplying if one["tensor_core"] != TENSOR_CORES[one["architecture"]]] == []
    assert [one for one in multiplying if one["shared"] > MOST_SHARED] == []


def test_rows_move_16_bytes_at_a_time(builds: list[dict]) -> None:
    moving = [one for one in builds if one["kernel"] not in COMPUTING]
    assert [one for one in moving if not one["wide_stores"] and one["kernel"] != "_reduce_logits"] == []  # it stores one number
    assert [one for one in moving if not one["wide_loads"] and one["kernel"] != "_zero_empty_groups"] == []
