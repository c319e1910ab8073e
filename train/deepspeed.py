"""engine=deepspeed: a training step through DeepSpeed, and its sharded optimizer state as named pieces of tensors."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..moe.token_info import Place
from ..parallel.apply import Parallel, Placed
from ..parallel.collectives import sum_over
from ..parallel.deepspeed import Fragment, Zero, own_group
from ..parallel.shard import Held, Piece
from .config.config import Config
from .config.deepspeed import deepspeed_settings
from .engine import Engine
from .optimizer import build_optimizer, set_learning_rate
from .state import MOMENTS, held_state, held_weights, optimizer_state, set_optimizer_steps
from .step import Rows, StepNumbers, add_up, clip_factor, count_totals, forward, update_expert_biases
from .survival.flags import NOTHING, Telling, Told, is_sound


def build_zero_engine(config: Config, parallel: Parallel) -> Engine:
    """Collective."""
    optimizer = build_optimizer(config.optimizer, parallel, own_group(parallel))
    settings = deepspeed_settings(config, parallel.mesh.world)
    return ZeroEngine(parallel, optimizer, Zero(parallel, optimizer, settings, functools.partial(forward, parallel)))


class ZeroEngine(Engine):
    """With ZeRO 1 and 2 a rank has the moments of a run of elements of some parameters: a `Fragment` of each."""

    def __init__(self, parallel: Parallel, optimizer: torch.optim.Optimizer, zero: Zero) -> None:
        super().__init__(parallel, optimizer)
        self.zero = zero

    def step(
        self,
        rows: list[Rows],
        lr: float,
        clip_norm: float | None,
        place: Place | None = None,
        telling: Telling = NOTHING,
        accepts: Callable[[Told], bool] = is_sound,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> StepNumbers:
        """What `train_step` does, in the same order."""
        totals = count_totals(self.parallel, rows)
        shares = [self.zero.compute(part, totals, place, last=part is rows[-1]) for part in rows]
        squared = self.zero.squared_norm()
        meanwhile()
        numbers = add_up(self.parallel, shares, totals, squared, telling)
        if not accepts(numbers.told):
            self.zero.drop()
            return numbers._replace(updated=False)
        if clip_norm is not None:
            self.zero.scale(clip_factor(numbers.gradient_norm, clip_norm))
        set_learning_rate(self.optimizer, lr)
        self.zero.update()
        update_expert_biases(self.parallel, numbers.counts_LE)
        return numbers

    def held(self) -> dict[str, Held]:
        """Moments are gathered one by one, and each stays on one of the ranks that hold the parameter, in turns."""
        if not self.zero.stage:
            return held_state(self.parallel, self.optimizer)
        held = held_weights(self.parallel)
        for turn, (name, placed, fragment) in enumerate(self.zero.fragments()):
            for moment in MOMENTS:
                whole = self._gather(placed, fragment, moment)
                if turn % placed.copies.size == placed.copies.rank:
                    held[f"optimizer.{name}.{moment}"] = Held(placed.piece, whole)
        return held

    def wanted(self) -> dict[str, Held]:
        """Of the moments, the rows that this rank has an element of."""
        if not self.zero.stage:
            return held_state(self.parallel, self.optimizer)
        held = held_weights(self.parallel)
        for name, placed, fragment in self.zero.fragments():
            if fragment is not None:
                rows = rows_around(placed.piece, fragment)
                for moment in MOMENTS:
                    held[f"optimizer.{name}.{moment}"] = Held(rows, torch.empty(rows.sizes, device=self.parallel.device))
        return held

    def take(self, loaded: dict[str, Held], step: int) -> None:
        if not self.zero.stage:
            set_optimizer_steps(self.optimizer, [placed.parameter for placed in self.parallel.placed.values()], step)
            return
        for name, placed, fragment in self.zero.fragments():
            if fragment is not None:
                weights = placed.parameter.detach().flatten()
                fragment.of(fragment.partition.data).copy_(weights.narrow(0, fragment.start, fragment.size))
                for moment in MOMENTS:
                    piece, rows = loaded[f"optimizer.{name}.{moment}"]
                    first = (piece.offsets[0] - placed.piece.offsets[0]) * row_size(piece)
                    wanted = rows.flatten().narrow(0, fragment.start - first, fragment.size)
                    self._moment(fragment, moment).copy_(wanted)
        partitions = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        set_optimizer_steps(self.optimizer, partitions, step)

    def _gather(self, placed: Placed, fragment: Fragment | None, moment: str) -> Tensor:
        whole = torch.zeros(placed.piece.sizes, device=self.parallel.device)
        if fragment is not None:
            whole.view(-1).narrow(0, fragment.start, fragment.size).copy_(self._moment(fragment, moment))
        return sum_over(whole, placed.copies)

    def _moment(self, fragment: Fragment, moment: str) -> Tensor:
        return fragment.of(optimizer_state(self.optimizer, fragment.partition)[moment])


def rows_around(piece: Piece, fragment: Fragment) -> Piece:
    """The smallest run of rows of the piece that has all elements of the fragment in it."""
    row = row_size(piece)
    first, end = fragment.start // row, -(-(fragment.start + fragment.size) // row)
    return Piece(piece.shape, (piece.offsets[0] + first, *piece.offsets[1:]), (end - first, *piece.sizes[1:]))


def row_size(piece: Piece) -> int:
    """Elements of one row."""
    return math.prod(piece.sizes[1:])
