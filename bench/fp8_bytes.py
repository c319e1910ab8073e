"""Bytes that the kernels of products in FP8 by blocks move, over the least: each input once, each output once.

`python -m tokenyard.bench.fp8_bytes [--cache 40] [--programs 132]`

Scaling kernels read and write each number once. Of a product, a program reads whole strips of rows and of weights; from memory come
those that the cache of the GPU, which drops the least recently used, does not have. Experts have equal rows.
"""

import argparse
from collections import OrderedDict
from collections.abc import Iterator

from ..moe.config import SCALE_BLOCK
from ..moe.kernels.blockwise import ROWS, TILES_OF_ROWS

LAYERS = {  # rows, experts of a rank, width, hidden width of an expert
    "Qwen3-30B, 128 experts": (262144, 128, 2048, 768),
    "Qwen3-30B, 16 experts": (32768, 16, 2048, 768),
    "DeepSeek-V3, 8 experts": (32768, 8, 7168, 2048),
    "Mixtral, 8 experts": (32768, 8, 4096, 14336),
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m tokenyard.bench.fp8_bytes", description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--cache", type=float, default=40.0, help="MiB of the GPU's cache that strips may take")
    arguments.add_argument("--programs", type=int, default=132, help="programs that run at a time, one a multiprocessor")
    return arguments.parse_args(words)


def main() -> None:
    settings = parse()
    print("layer | gate and up: product, with scaling | down: product, with scaling | bytes/FLOP, over those of an H100's peaks")
    for name, (rows, experts, width, hidden) in LAYERS.items():
        cells, bound = [], []
        for outputs, inputs in ((2 * hidden, width), (width, hidden)):
            least, moved = product_bytes(rows, experts, outputs, inputs, settings.cache * 2**20, settings.programs)
            scaling = scaling_bytes(rows * inputs, rows) + scaling_bytes(experts * outputs * inputs, 0)
            cells.append(f"{moved / least:.2f}, {(moved + scaling) / (least + scaling):.2f}")
            bound.append(f"{moved / (2 * rows * outputs * inputs) * 1979e12 / 3.35e12:.2f}")
        print(f"{name} | {' | '.join(cells)} | {', '.join(bound)}")


def scaling_bytes(numbers: int, rows: int) -> float:
    """bf16 in, e4m3 out, and a scale for 128 numbers of a row, or for 128 x 128 weights if there are no rows."""
    return numbers * (2 + 1 + 4 / (SCALE_BLOCK if rows else SCALE_BLOCK**2))


def product_bytes(rows: int, experts: int, outputs: int, inputs: int, cache: float, programs: int) -> tuple[float, float]:
    """Returns the least bytes of a product, and those that move."""
    strip, held, read = SCALE_BLOCK * inputs, OrderedDict[tuple[str, int, int], None](), 0
    order = list(tiles(rows // experts // ROWS, experts, outputs // SCALE_BLOCK))
    for first in range(0, len(order), programs):
        wave = order[first : first + programs]
        strips = {("rows", group, tile): None for group, tile, _ in wave} | {
            ("weights", group, column): None for group, _, column in wave
        }
        for each in strips:
            read += strip * (each not in held)
            held[each] = None
            held.move_to_end(each)
        while len(held) * strip > cache:
            held.popitem(last=False)
    written = 2 * rows * outputs
    return rows * inputs + experts * outputs * inputs + written, read + written


def tiles(tiles_of_group: int, experts: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """Yields group, tile of rows and block of columns of each program in the order of `_product_of_blocks`."""
    rows = [(group, tile) for group in range(experts) for tile in range(tiles_of_group)]
    for first in range(0, len(rows), TILES_OF_ROWS):
        for column in range(columns):
            for group, tile in rows[first : first + TILES_OF_ROWS]:
                yield group, tile, column


if __name__ == "__main__":
    main()
