"""How AdamW's moments are kept between steps: as wide as the weights, in bf16 or in 8 bits. The update itself is always wide.

bf16 is rounded stochastically: a random number of 16 bits is added to the bits that are cut off, so the mean of the result is the
number, and an average also moves by steps that are far below its last bit. The random numbers are a hash of the parameter's name,
the step and the place in the GLOBAL tensor (moe/token_info.py), so the bits are the same on every layout and after a resume.
int8 is the dynamic quantisation to the nearest of Dettmers et al. 2022, in blocks of a row of the global tensor, with the largest
magnitude as the scale; of the second moment it is that of its root, whose 7 decades are 14 of its own, and none that is above 0
becomes 0, by which the update would divide.

R rows: all dimensions but the last. C columns, B columns of a block.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..moe.token_info import fold_in
from ..parallel.apply import ShardedParameter, local
from ..parallel.shard import LocalShard, ShardMetadata
from ..parallel.streams import on_device
from .config.config import OptimizerStates
from .config.state_bytes import block_of, states_of

FIRST, SECOND = "exp_avg", "exp_avg_sq"
FIRST_SCALE, SECOND_SCALE = "exp_avg_scale", "exp_avg_sq_scale"

CHUNKS = {"cpu": 2**18}
"""Elements of a chunk, about, by device: on a CPU its moments stay in the cache; elsewhere LARGE, to keep the update small."""
LARGE = 2**22
ROWS = 64
"""Chunks begin at multiples of so many rows, hence where the vectors of a CPU's kernel begin in the whole, too: the same bits."""


class Kept(NamedTuple):
    """A tensor that a rank keeps."""

    metadata: ShardMetadata
    dtype: torch.dtype


class Moments(NamedTuple):
    """How a rank keeps the moments of its shard of a parameter."""

    name: str
    metadata: ShardMetadata
    states: OptimizerStates
    wide: torch.dtype
    """The dtype of the weights, and of moments in the update."""

    @classmethod
    def of(cls, name: str, sharded: ShardedParameter, states: OptimizerStates) -> "Moments":
        """`states`: the setting, which small tensors do not follow."""
        kept_as = states_of(states, name, len(sharded.metadata.shape))
        return cls(name, sharded.metadata, kept_as, local(sharded.parameter).dtype)

    def kept(self) -> dict[str, Kept]:
        """Returns the tensors, by their names in optimizer and checkpoint."""
        if self.states is not OptimizerStates.int8:
            dtype = torch.bfloat16 if self.states is OptimizerStates.bf16 else self.wide
            return dict.fromkeys((FIRST, SECOND), Kept(self.metadata, dtype))
        (shape, offsets, sizes), block = self.metadata, block_of(self.metadata.shape[-1])
        assert offsets[-1] % block == 0 == sizes[-1] % block, f"{self.name}: blocks of {block} do not cover {self.metadata}"
        blocks = ShardMetadata(*((*each[:-1], each[-1] // block) for each in (shape, offsets, sizes)))
        codes, scales = Kept(self.metadata, torch.uint8), Kept(blocks, torch.float32)
        return {FIRST: codes, SECOND: codes, FIRST_SCALE: scales, SECOND_SCALE: scales}

    def on_host(self) -> dict[str, LocalShard]:
        """Returns tensors on the host to read a checkpoint into, by their names there."""
        return {
            f"optimizer.{self.name}.{key}": LocalShard(metadata, torch.empty(metadata.sizes, dtype=dtype, device="cpu"))
            for key, (metadata, dtype) in self.kept().items()
        }

    def chunks(self, device: torch.device) -> Iterator[slice]:
        """Yields ranges of rows that are read and written at a time; none if this rank holds nothing."""
        rows, columns = math.prod(self.metadata.sizes[:-1]), self.metadata.sizes[-1]
        count = max(1, CHUNKS.get(device.type, LARGE) // max(1, columns) // ROWS) * ROWS
        for begin in range(0, rows if columns else 0, count):
            yield slice(begin, min(begin + count, rows))

    def read(self, kept: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns both moments (R, C) of the given rows, wide. Where they are kept wide, they are the kept tensors themselves."""
        if self.states is not OptimizerStates.int8:
            return kept[FIRST].to(self.wide), kept[SECOND].to(self.wide)
        first = decode(kept[FIRST], kept[FIRST_SCALE], signed=True)
        root = decode(kept[SECOND], kept[SECOND_SCALE], signed=False)
        return first.to(self.wide), root.square_().to(self.wide)

    def write(self, kept: Mapping[str, Tensor], first: Tensor, second: Tensor, step: int, begin: int) -> None:
        """Stores both moments of the rows from row `begin` of this rank on, into `kept`. `step`: that of the update."""
        match self.states:
            case OptimizerStates.fp32:
                kept[FIRST].copy_(first)
                kept[SECOND].copy_(second)
            case OptimizerStates.bf16:
                noise = self.noise(step, begin, len(first), first.device)
                for place, (key, moment) in enumerate(((FIRST, first), (SECOND, second))):
                    kept[key].copy_(stochastic_bf16(moment.float(), noise[..., place]))
            case OptimizerStates.int8:
                encode(first.float(), kept[FIRST], kept[FIRST_SCALE], signed=True)
                encode(second.float().sqrt(), kept[SECOND], kept[SECOND_SCALE], signed=False)

    def convert(self, loaded: Mapping[str, LocalShard], after: "Moments", held: Mapping[str, LocalShard], step: int) -> None:
        """Writes the moments in `loaded`, kept as this says, into `held`, to be kept as `after` says, after `step` updates."""

        def rows_of(moments: Moments, shards: Mapping[str, LocalShard]) -> dict[str, Tensor]:
            return {key: in_rows(shards[f"optimizer.{self.name}.{key}"].tensor)[rows] for key in moments.kept()}

        for rows in self.chunks(torch.device("cpu")):
            kept = rows_of(after, held)
            first, second = (moment.to(kept[FIRST].device) for moment in self.read(rows_of(self, loaded)))
            after.write(kept, first, second, step, rows.start)

    def noise(self, step: int, begin: int, rows: int, device: torch.device) -> Tensor:
        """Returns random int16 (rows, C, 2), for both moments of each element. A hash of 64 bits serves two columns."""
        digest = hashlib.blake2b(f"{self.name} {step}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        shape, offsets, sizes = self.metadata
        rest, rows_R = torch.arange(begin, begin + rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
        stride = 1
        for whole, offset, size in zip(reversed(shape[:-1]), reversed(offsets[:-1]), reversed(sizes[:-1]), strict=True):
            rows_R += (rest % size + offset) * stride
            rest, stride = rest // size, stride * whole
        first, last = offsets[-1] // 2, -(-(offsets[-1] + sizes[-1]) // 2)
        words = fold_in(fold_in(rows_R, key)[:, None], torch.arange(first, last, device=device))
        return words.view(torch.int16).view(rows, -1, 2).narrow(1, offsets[-1] - 2 * first, sizes[-1])


def in_rows(tensor: Tensor) -> Tensor:
    """Returns a view (R, columns)."""
    return tensor.view(-1, tensor.shape[-1])


def stochastic_bf16(x: Tensor, noise: Tensor) -> Tensor:
    """Rounds fp32 to one of the two nearest bf16, up in magnitude with the probability of the part that is cut off.

    `noise`: int16, each value equally likely.
    """
    bits = x.view(torch.int32) + noise + 2**15
    return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def encode(x: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None:
    """Quantises fp32 (R, C) into `codes`, uint8 (R, C), with the largest magnitude of each block, fp32 (R, C / B), in `scales`.

    The leading bits of a magnitude narrow it down to two values of the map.
    """
    _, middles, cells = (on_device(torch.tensor(each), x.device) for each in code_map(signed))
    blocks = x.view(*scales.shape, -1)
    sizes = blocks.abs()
    scales.copy_(sizes.amax(-1))
    sizes.div_(scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None])
    places = sizes.view(torch.int32).bitwise_right_shift(CELL_SHIFT).sub_(FIRST_CELL).clamp_(min=0).flatten()
    below = cells.index_select(0, places)
    found = below.add_(sizes.flatten() > middles.index_select(0, below)).view_as(codes)
    if signed:
        negative = x < 0
        found = torch.where(negative, ZERO - found.clamp(max=ZERO), ZERO + found)
    codes.copy_(found)


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Returns fp32 (R, C)."""
    values = on_device(torch.tensor(code_map(signed).values), codes.device)
    blocks = values.index_select(0, codes.flatten().int()).view(*scales.shape, -1)
    return blocks.mul_(scales[..., None]).view(codes.shape)


EXPONENTS = 7
"""Decades of the map."""
ZERO = 127
"""The code of 0 with a sign: as many codes are negative."""
CELL_SHIFT = 15
"""A cell is a range of magnitudes with the same exponent and 8 leading bits: narrower than any two numbers between codes."""
FIRST_CELL = (127 - 25) << (23 - CELL_SHIFT)
"""That of 2^-25, which is nearer to 0 than to the least value."""


class CodeMap(NamedTuple):
    values: list[float]
    """Of the 256 codes, ascending in [-1, 1] or [0, 1]."""
    middles: list[float]
    """Between the magnitudes, ascending from 0; none is above the last one."""
    cells: list[int]
    """For each cell, the number of middles below its least magnitude."""


@functools.cache
def code_map(signed: bool) -> CodeMap:
    """Returns the dynamic map of bitsandbytes (create_dynamic_map).

    Decade d of EXPONENTS has 2^d fractions, or 2^(d + 1) without a sign; 0 and 1 are codes, too. Without a sign only 0 becomes 0.
    """
    sizes = [0.0, 1.0]
    for decade in range(EXPONENTS):
        count = 2**decade if signed else 2 ** (decade + 1)
        sizes += [10.0 ** (decade + 1 - EXPONENTS) * (0.1 + 0.9 * (place + 0.5) / count) for place in range(count)]
    sizes = np.sort(np.array(sizes, np.float32)).tolist()
    middles = [(below + above) / 2 if below or signed else 0.0 for below, above in pairwise(sizes)]
    negative = [-size for size in sizes[ZERO:0:-1]] if signed else []
    bits = np.arange(FIRST_CELL, (127 << (23 - CELL_SHIFT)) + 1, dtype=np.int32) << CELL_SHIFT
    cells = np.searchsorted(np.array(middles, np.float32), bits.view(np.float32)).astype(np.int32)
    cells[0] = 0  # also of all that is less
    return CodeMap(negative + sizes, [*middles, math.inf], cells.tolist())
