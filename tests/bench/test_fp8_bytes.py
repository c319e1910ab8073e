"""The count of bytes of products in FP8."""

import pytest
from tokenyard.bench.fp8_bytes import product_bytes, scaling_bytes, tiles
from tokenyard.moe.kernels.blockwise import TILES_OF_ROWS


def test_a_large_cache_reads_each_operand_once_and_a_small_one_again_in_each_wave() -> None:
    rows, outputs, inputs = 2 * TILES_OF_ROWS * 128, 4 * 128, 256
    least, moved = product_bytes(rows, 1, outputs, inputs, 2**30, 16)
    assert least == moved == rows * inputs + outputs * inputs + 2 * rows * outputs
    strip = 128 * inputs
    waves = [(16, 1)] * 8  # strips of rows and of weights of each
    assert product_bytes(rows, 1, outputs, inputs, 0, 16)[1] - 2 * rows * outputs == strip * sum(map(sum, waves))


def test_fine_grained_experts_read_little_twice() -> None:
    """With 40 MiB of cache and 132 programs: a layer of Qwen3-30B."""
    for outputs, inputs in ((1536, 2048), (2048, 768)):
        least, moved = product_bytes(32768, 16, outputs, inputs, 40 * 2**20, 132)
        assert least <= moved <= 1.1 * least


def test_every_tile_is_computed_once() -> None:
    found = list(tiles(5, 7, 3))
    assert len(found) == len(set(found)) == 5 * 7 * 3


def test_scaling_moves_three_bytes_a_number_and_the_scales() -> None:
    assert scaling_bytes(1280, 10) == 3 * 1280 + 4 * 10
    assert scaling_bytes(2 * 128**2, 0) == pytest.approx(2 * (3 * 128**2 + 4))
