"""Times forward and backward of MoE layers with the sizes of known models, of dense products with the same FLOPs, and of others.

The others are the layers of transformers, SonicMoE and MegaBlocks, if installed. All take turns. Inputs and routers are random, so
the load is nearly even.
"""

import gc
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host_reads import host_reads
from ..layer import LayerShape, our_layer
from ..timing import Spread, peak_bytes, spread, take_turns
from .contenders import WITHOUT_KERNELS, DenseProducts, Forward, contenders, without_kernels
from .recorder import Recorder, Unavailable

SHAPES = {
    "full": {
        "qwen3_30b": LayerShape(width=2048, hidden=768, experts=128, top_k=8, shared=0, tokens=32768),
        "mixtral": LayerShape(width=4096, hidden=14336, experts=8, top_k=2, shared=0, tokens=16384),
        "olmoe": LayerShape(width=2048, hidden=1024, experts=64, top_k=8, shared=0, tokens=32768),
        "deepseek_v3": LayerShape(width=7168, hidden=2048, experts=32, top_k=8, shared=2048, tokens=16384),
    },
    "tiny": {
        "qwen3_30b": LayerShape(width=64, hidden=32, experts=16, top_k=8, shared=0, tokens=128),
        "mixtral": LayerShape(width=64, hidden=128, experts=4, top_k=2, shared=0, tokens=128),
        "olmoe": LayerShape(width=64, hidden=32, experts=8, top_k=4, shared=0, tokens=128),
        "deepseek_v3": LayerShape(width=64, hidden=32, experts=8, top_k=4, shared=32, tokens=128),
    },
}
"""The sizes of those models; for DeepSeek-V3, the 32 of 256 experts that one of 8 ranks holds."""

REPEATS = {"full": (5, 1), "tiny": (2, 1)}
"""Repeats, and warm-up repeats before them."""
IN_A_ROW = 3
"""Passes that are timed together: as in a model of several layers, the host launches the next one while one runs."""
DENSE = "dense products"


class LayerLine(NamedTuple):
    """Forward and backward of one layer; `note` says why there are no times."""

    shape: str
    name: str
    seconds: Spread | None = None
    teraflops: float = 0.0
    of_dense: float = 0.0
    """Median time of the dense products over that of the layer."""
    peak_bytes: int | None = None
    host_reads: dict[str, int] | None = None
    off: float | None = None
    """Norm of the difference between its output and ours, over the norm of ours."""
    note: str = ""


def run(recorder: Recorder) -> None:
    """Measures each layer; with fewer tokens if the remaining time may be too short for one like the last."""
    before = 0.0
    for name, shape in SHAPES[recorder.scale].items():
        if before > recorder.remaining / 2:
            shape = shape._replace(tokens=shape.tokens // 4)
        if before > recorder.remaining:
            recorder.skip(name, f"{recorder.remaining:.0f} s are left, and the layer before took {before:.0f} s")
            continue
        begin = monotonic()
        for line in measure_layer(name, shape, recorder.device, *REPEATS[recorder.scale]):
            recorder.row("layers, forward and backward", **cells(line, shape.tokens))
        forget(recorder.device)
        before = monotonic() - begin


def measure_layer(
    name: str, shape: LayerShape, device: torch.device, repeats: int, warm_up: int, dtype: torch.dtype = torch.bfloat16
) -> list[LayerLine]:
    """Measures the dense products and each contender."""
    ours = our_layer(shape, device, dtype)
    x = torch.randn(1, shape.tokens, shape.width, device=device).to(dtype).requires_grad_()
    gradient, expected = torch.randn_like(x), ours(x)[0].detach()
    works: dict[str, Any] = {DENSE: DenseProducts(shape, x.detach())}
    lines: dict[str, LayerLine] = {DENSE: LayerLine(name, DENSE)}
    for contender, make in contenders(ours, shape).items():
        try:
            forward = make()
            wide, y = expected.float(), forward(x).detach().float()
            off = ((y - wide).norm() / wide.norm()).item()
            forward(x).backward(gradient)
        except Unavailable as reason:
            lines[contender] = LayerLine(name, contender, note=str(reason))
        except Exception as error:  # of another library: its row has the error, and the others are measured
            lines[contender] = LayerLine(name, contender, note=" ".join(f"{type(error).__name__}: {error}".split())[:120])
        else:
            work = partial(_forward_and_backward, forward, x, gradient)
            works[contender] = without_kernels(work) if contender == WITHOUT_KERNELS else work
            lines[contender] = LayerLine(name, contender, off=off if "dense" not in contender else None)
    taken = take_turns(works, device, repeats, warm_up, partial(_reset, x), IN_A_ROW)
    limit = spread(taken[DENSE]).median
    return [_filled(line, works.get(line.name), taken.get(line.name), shape, limit, device) for line in lines.values()]


def _filled(
    line: LayerLine, work: Any, taken: list[float] | None, shape: LayerShape, limit: float, device: torch.device
) -> LayerLine:
    if taken is None:
        return line
    seconds = spread(taken)
    rates = {"teraflops": shape.flops / seconds.median / 1e12, "of_dense": limit / seconds.median}
    memory = None if line.name == DENSE else peak_bytes(work, device)
    return line._replace(seconds=seconds, peak_bytes=memory, host_reads=dict(host_reads(work, device)), **rates)


def _forward_and_backward(forward: Forward, x: Tensor, gradient: Tensor) -> None:
    """Weight gradients accumulate over the repeats, as over micro-batches."""
    forward(x).backward(gradient)


def _reset(x: Tensor) -> None:
    x.grad = None


def forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cells(line: LayerLine, tokens: int) -> dict[str, Any]:
    """The cells of a table row. Milliseconds are medians; waits are host synchronisations."""
    found: dict[str, Any] = {"layer": line.shape, "tokens": tokens, "by": line.name}
    if line.seconds is None:
        return found | {"ms (least, most)": line.note}
    return found | {
        "ms (least, most)": milliseconds(line.seconds),
        "TFLOP/s": line.teraflops,
        "of dense products": line.of_dense,
        "peak MiB": mebibytes(line.peak_bytes),
        "waits": waits(line.host_reads),
        "output off by": "" if line.off is None else f"{line.off:.0e}",
    }


def milliseconds(seconds: Spread) -> str:
    return f"{1e3 * seconds.median:.2f} ({1e3 * seconds.least:.2f}, {1e3 * seconds.most:.2f})"


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def waits(found: dict[str, int] | None) -> str:
    return ", ".join(f"{count} x {place}" for place, count in (found or {}).items()) or "0"
