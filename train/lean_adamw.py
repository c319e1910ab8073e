"""AdamW with moments in fewer bytes or in the memory of the host: the numbers of torch's fused AdamW, chunk by chunk.

A chunk is a range of rows of a parameter. Its moments are read into wide ones (train/moments.py), the fused kernel updates them
with the weights, and they are written back rounded. So only the moments of a chunk are ever wide, and with `optimizer.offload` few
chunks are on the device: the next one comes while one is updated and the one before goes.

R rows: all dimensions but the last. C columns.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import (
    Tensor,
    _fused_adamw_,  # pyright: ignore[reportPrivateImportUsage]
)

from ..parallel.apply import ShardedParameter, local
from ..parallel.progress import waiting_for_device
from ..parallel.shard import LocalShard
from ..parallel.streams import (
    Event,
    SideStream,
    copy_to_device,
    copy_to_host,
    host_buffer,
    record_event,
    stream_waits,
)
from .config.config import OptimizerConfig
from .moments import Moments, in_rows


class Chunk(NamedTuple):
    """Rows of a parameter."""

    parameter: torch.nn.Parameter
    rows: slice

    def of(self, tensor: Tensor) -> Tensor:
        """Returns these rows of the parameter, its gradient, or a tensor of its state: (R, columns), a view."""
        return in_rows(tensor)[self.rows]


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) for `optimizer.states`, `gradients` and `offload`. `groups`: as of torch's optimizers."""

    def __init__(self, groups: list[dict[str, Any]], parameters: Mapping[str, ShardedParameter], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.epsilon})
        self.states = config.states
        self.moments = {sharded.parameter: Moments.of(name, sharded, config.states) for name, sharded in parameters.items()}
        self.device = next(local(parameter).device for parameter in self.moments)
        self.offload = _Offload(self.device) if config.offload else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates all parameters that have a gradient."""
        assert closure is None
        groups = [(group, [each for each in group["params"] if each.grad is not None]) for group in self.param_groups]
        for _, parameters in groups:
            for parameter in parameters:
                self.state_of(parameter)["step"] += 1
        work = [(group, chunk) for group, parameters in groups for each in parameters for chunk in self.chunks(each)]
        coming = (self._kept(chunk) for _, chunk in work)
        if self.offload is not None:
            coming = self.offload.ahead(coming)
        for (group, chunk), kept in zip(work, coming, strict=True):
            self._update(group, chunk, kept)
            if self.offload is not None:
                self.offload.give_back(self._kept(chunk), kept)

    def _update(self, group: dict[str, Any], chunk: Chunk, kept: dict[str, Tensor]) -> None:
        moments, step = self.moments[chunk.parameter], self.state_of(chunk.parameter)["step"]
        first, second = moments.read(kept)
        assert chunk.parameter.grad is not None
        weights = chunk.of(local(chunk.parameter.detach()))
        gradients = chunk.of(local(chunk.parameter.grad).contiguous()).to(weights.dtype)
        _fused_adamw_(
            *([weights], [gradients], [first], [second], []),
            [torch.full((), float(step), device=weights.device)],
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        moments.write(kept, first, second, step, chunk.rows.start)

    def chunks(self, parameter: torch.nn.Parameter) -> Iterator[Chunk]:
        """Yields the chunks of a parameter."""
        return (Chunk(parameter, rows) for rows in self.moments[parameter].chunks(self.device))

    def state_of(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        """Returns the state of a parameter, created before the first step: the number of updates, and the kept tensors."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for key, kept in self.moments[parameter].kept().items():
                state[key] = self._zeros(kept.metadata.sizes, kept.dtype)
        return state

    def _zeros(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.offload is None:
            return torch.zeros(sizes, dtype=dtype, device=self.device)
        return host_buffer(torch.Size(sizes).numel() * dtype.itemsize, self.device).view(dtype).view(sizes).zero_()

    def wide_chunks(self, parameter: torch.nn.Parameter) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields weights and both moments, wide, on the device, of each chunk of a parameter."""
        self.wait()
        for chunk in self.chunks(parameter):
            kept = {key: tensor.to(self.device) for key, tensor in self._kept(chunk).items()}
            yield chunk.of(local(parameter.detach())), *self.moments[parameter].read(kept)

    def shards(self) -> dict[str, LocalShard]:
        """Returns the kept tensors in use, by their names in a checkpoint."""
        self.wait()
        return {
            f"optimizer.{moments.name}.{key}": LocalShard(kept.metadata, self.state_of(parameter)[key])
            for parameter, moments in self.moments.items()
            for key, kept in moments.kept().items()
        }

    def wait(self) -> None:
        """Waits until the host's memory has the moments of the last step."""
        if self.offload is not None:
            with waiting_for_device():
                self.offload.returned.wait()

    def _kept(self, chunk: Chunk) -> dict[str, Tensor]:
        state = self.state_of(chunk.parameter)
        return {key: chunk.of(state[key]) for key in self.moments[chunk.parameter].kept()}


class _Offload:
    """Copies of chunks from the host to the device and back, each way on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.coming, self.going = device, SideStream(device), SideStream(device)
        self.returned = record_event(device)

    def ahead(self, chunks: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Yields each chunk on the device, with the copy of the next one under way. No more than these two are there."""
        following = None
        for chunk in chunks:
            here, following = following, self._fetch(chunk)
            if here is not None:
                yield self._arrived(*here)
        if following is not None:
            yield self._arrived(*following)

    def _fetch(self, chunk: dict[str, Tensor]) -> tuple[dict[str, Tensor], Event]:
        with self.coming.behind(self.returned):
            found = {key: torch.empty(host.shape, dtype=host.dtype, device=self.device) for key, host in chunk.items()}
            for key, host in chunk.items():
                copy_to_device(host, found[key])
            return found, record_event(self.device)

    def _arrived(self, chunk: dict[str, Tensor], event: Event) -> dict[str, Tensor]:
        stream_waits(event, *chunk.values())
        return chunk

    def give_back(self, host: dict[str, Tensor], chunk: dict[str, Tensor]) -> None:
        """Starts the copies to the host. The host waits for those of the chunk before, so that its memory is free."""
        with waiting_for_device():
            self.returned.wait()
        with self.going.behind(record_event(self.device), *chunk.values()):
            for key, tensor in chunk.items():
                copy_to_host(tensor, host[key])
            self.returned = record_event(self.device)
