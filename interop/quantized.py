"""Quantized tensors of Hugging Face folders, read as the bf16 tensors that they stand for, by rectangle.

mxfp4, as in gpt-oss: numbers of 4 bits, e2m1, two a byte with the first in the low bits; 32 neighbours share an exponent, e8m0 (OCP
Microscaling Formats 1.0, sections 5.3 and 6.3). `NAME_blocks` of (E, R, C / 32, 16) and `NAME_scales` of (E, R, C / 32) are NAME of
(E, C, R).
fp8, as in DeepSeek-V3 (arXiv:2412.19437, section 3.3): numbers of 8 bits, e4m3; each block of 128 x 128 shares the factor in
`NAME_scale_inv`, also a block that the last rows or columns cut off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.bounded import brief
from .hf_folder import Encoding, HFFolder, TensorHeader, open_file

GROUP, BLOCK = 32, 128
BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([sign * number for sign in (1.0, -1.0) for number in MAGNITUDES], dtype=torch.bfloat16)
PAIRS = torch.stack([E2M1.repeat(16), E2M1.repeat_interleave(16)], -1)
"""(256, 2): the two numbers of each byte."""
FACTORS = ("F32", "BF16", "F16")
"""Types that the factors of fp8 may have, by safetensors' codes."""


def dequantized(folder: HFFolder) -> HFFolder:
    """Returns the folder with quantized tensors in `tensors` as what they stand for, without the tensors of their scales.

    Raises ValueError, one line, for one whose scales do not fit.
    """
    about = folder.config.get("quantization_config") or {}
    found = dict(folder.tensors)
    try:
        for name in folder.tensors if about else ():
            FORMATS[about["quant_method"]](folder.tensors, name, found)
    except ValueError as error:
        raise ValueError(f"{folder.path}: {error}") from None
    return folder._replace(tensors=found)


def _mxfp4(stored: dict[str, TensorHeader], blocks: str, found: dict[str, TensorHeader]) -> None:
    """Replaces `blocks`, if that is what it is, and its scales by what they stand for in `found`."""
    name = blocks.removesuffix(BLOCKS)
    scales = name + SCALES
    if not blocks.endswith(BLOCKS) or scales not in stored:
        return
    given, exponents = stored[blocks], stored[scales]
    fits = len(given.shape) == 4 and given.shape[3] == GROUP // 2 and exponents.shape == given.shape[:3]
    if not fits or (given.code, exponents.code) != ("U8", "U8"):
        raise ValueError(
            f"tensor {brief(blocks)} of {given.code} {given.shape} with scales of {exponents.code} {exponents.shape}: "
            f"must be of U8 (E, R, C / {GROUP}, {GROUP // 2}) with scales of U8 (E, R, C / {GROUP})"
        )
    experts, rows, groups, _ = given.shape
    del found[blocks], found[scales]
    encoding = Encoding(Mxfp4View, (given.file, blocks), (exponents.file, scales))
    found[name] = TensorHeader(given.file, "BF16", (experts, groups * GROUP, rows), encoding)


def _fp8(stored: dict[str, TensorHeader], name: str, found: dict[str, TensorHeader]) -> None:
    """Replaces `name`, if it has scales, and these by what they stand for in `found`."""
    scales = name + SCALE_INV
    if scales not in stored or stored[name].code != "F8_E4M3":
        return
    given, factors = stored[name], stored[scales]
    wanted = (*given.shape[:-2], *(-(-size // BLOCK) for size in given.shape[-2:]))
    if len(given.shape) < 2 or factors.shape != wanted or factors.code not in FACTORS:
        raise ValueError(
            f"tensor {brief(scales)} of {factors.code} {factors.shape}: must be of {', '.join(FACTORS)} and {wanted}, "
            f"one number for each {BLOCK} x {BLOCK} of {given.shape}"
        )
    del found[scales]
    encoding = Encoding(Fp8View, (given.file, name), (factors.file, scales))
    found[name] = TensorHeader(given.file, "BF16", given.shape, encoding)


FORMATS = {"mxfp4": _mxfp4, "fp8": _fp8}
"""By quantization_config.quant_method."""


@contextmanager
def open_tensor(folder: HFFolder, name: str) -> Iterator[Any]:
    """A tensor of the folder, of which `[ranges]`, a slice for each dimension, reads a rectangle.

    The file is opened each time: an open one keeps all pages that were read from it in memory.
    """
    header = folder.tensors[name]
    if header.encoding is None:
        with open_file(folder.path / header.file) as file:
            yield file.get_slice(header.key or name)
        return
    view, values, scales = header.encoding
    with open_file(folder.path / values[0]) as file, open_file(folder.path / scales[0]) as other:
        yield view(file.get_slice(values[1]), other.get_slice(scales[1]))


class Mxfp4View:
    """(E, C, R) of the stored (E, R, C / 32, 16) and (E, R, C / 32). Reads whole groups of 32 columns."""

    def __init__(self, blocks: Any, scales: Any) -> None:
        self._blocks, self._scales = blocks, scales

    def __getitem__(self, ranges: tuple[slice, slice, slice]) -> Tensor:
        experts, columns, rows = ranges
        groups = _covering(columns, GROUP)
        stored = self._blocks[experts, rows, groups, slice(None)]
        exponents = self._scales[experts, rows, groups].contiguous().view(torch.float8_e8m0fnu)
        numbers = PAIRS[stored.int()].flatten(-2)
        numbers *= exponents.bfloat16().unsqueeze(-1)  # exact: a power of two
        first = columns.start - groups.start * GROUP
        return numbers.flatten(2)[..., first : first + columns.stop - columns.start].mT


class Fp8View:
    """A tensor of (..., rows, columns) and its factors of (..., rows / 128, columns / 128), rounded up."""

    def __init__(self, values: Any, scales: Any) -> None:
        self._values, self._scales = values, scales

    def __getitem__(self, ranges: tuple[slice, ...]) -> Tensor:
        *leading, rows, columns = ranges
        above, beside = _covering(rows, BLOCK), _covering(columns, BLOCK)
        numbers = self._values[tuple(ranges)].float()
        factors = self._scales[(*leading, above, beside)].float()
        by_column = factors[..., torch.arange(columns.start, columns.stop) // BLOCK - beside.start]
        for index in range(above.stop - above.start):
            begin = (above.start + index) * BLOCK - rows.start
            numbers[..., max(0, begin) : begin + BLOCK, :] *= by_column[..., index, None, :]
        return numbers.bfloat16()


def _covering(numbers: slice, unit: int) -> slice:
    """The whole units that `numbers` lie in."""
    return slice(numbers.start // unit, -(-numbers.stop // unit))
