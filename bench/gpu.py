"""MoE layers and a whole training step on one GPU: `python -m tokenyard.bench.gpu`; without one `--device cpu --scale tiny`.

Layers: forward and backward in bf16 as a share of dense products of the same FLOPs, beside transformers, SonicMoE and MegaBlocks
where these are installed. All take turns. Inputs are random and the router is as well, so the load is nearly even. Then training
steps of a model of about 1B active parameters: MFU, memory, and where the host waits for the device.
"""

import argparse
import gc
import json
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .figures import Spread, markdown, spread
from .gpu_layers import Absent, DenseProducts, Forward, contenders
from .gpu_step import SIZES, StepLine, measure_steps
from .host_reads import host_reads
from .shapes import Shape, our_layer
from .turns import peak_bytes, take_turns

SHAPES = {
    "full": {
        "mixtral": Shape(width=4096, hidden=14336, experts=8, top_k=2, shared=0, tokens=16384),
        "qwen3_30b": Shape(width=2048, hidden=768, experts=128, top_k=8, shared=0, tokens=32768),
        "olmoe": Shape(width=2048, hidden=1024, experts=64, top_k=8, shared=0, tokens=32768),
        "deepseek_v3": Shape(width=7168, hidden=2048, experts=32, top_k=8, shared=2048, tokens=16384),
    },
    "tiny": {
        "mixtral": Shape(width=64, hidden=128, experts=4, top_k=2, shared=0, tokens=128),
        "qwen3_30b": Shape(width=64, hidden=32, experts=16, top_k=8, shared=0, tokens=128),
        "olmoe": Shape(width=64, hidden=32, experts=8, top_k=4, shared=0, tokens=128),
        "deepseek_v3": Shape(width=64, hidden=32, experts=8, top_k=4, shared=32, tokens=128),
    },
}
"""As those models have them; of DeepSeek-V3's 256 experts the 32 of one of 8 ranks."""

DENSE = "dense products"


class LayerLine(NamedTuple):
    """Forward and backward of one layer; without times where `note` says why."""

    shape: str
    name: str
    seconds: Spread | None = None
    teraflops: float = 0.0
    of_dense: float = 0.0
    """The dense products' median time over its own."""
    peak_bytes: int | None = None
    host_reads: dict[str, int] | None = None
    off: float | None = None
    """Norm of the difference of the output from ours, over the norm of ours."""
    note: str = ""


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("tokenyard.bench.gpu: there is no GPU here; --device cpu --scale tiny tries the code")
    layers, steps = list[LayerLine](), list[StepLine]()
    for name in arguments.shapes:
        shape = SHAPES[arguments.scale][name]
        layers += measure_layer(name, shape, device, arguments.repeats, arguments.warm_up, arguments.compile)
        _forget(device)
    if not arguments.no_step:
        steps = measure_steps(SIZES[arguments.scale], device, arguments.repeats, arguments.warm_up, arguments.compile)
    print(as_json(layers, steps, device) if arguments.json else f"{device_name(device)}\n\n{table(layers, steps)}")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=SHAPES, default="full")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES["full"], default=list(SHAPES["full"]), help="layers to measure")
    parser.add_argument("--no-step", action="store_true", help="layers only")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile, which takes minutes")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5, help="repeats before those")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def measure_layer(
    name: str, shape: Shape, device: torch.device, repeats: int, warm_up: int, compiled: bool, dtype: torch.dtype = torch.bfloat16
) -> list[LayerLine]:
    """A line for the dense products and for each contender."""
    ours = our_layer(shape, device, dtype)
    x = torch.randn(1, shape.tokens, shape.width, device=device).to(dtype).requires_grad_()
    gradient, expected = torch.randn_like(x), ours(x)[0].detach()
    works: dict[str, Any] = {DENSE: DenseProducts(shape, x.detach())}
    lines: dict[str, LayerLine] = {DENSE: LayerLine(name, DENSE)}
    for contender, make in contenders(ours, shape).items():
        if "compiled" in contender and not compiled:
            continue
        try:
            forward = make()
            off = _off(forward(x).detach(), expected)
            forward(x).backward(gradient)
        except Absent as reason:
            lines[contender] = LayerLine(name, contender, note=str(reason))
        except Exception as error:  # of somebody else's kernels: a row says so, the others are measured
            lines[contender] = LayerLine(name, contender, note=" ".join(f"{type(error).__name__}: {error}".split())[:120])
        else:
            works[contender] = partial(_forward_and_backward, forward, x, gradient)
            lines[contender] = LayerLine(name, contender, off=off if "dense" not in contender else None)
    taken = take_turns(works, device, repeats, warm_up, partial(_reset, x))
    limit = spread(taken[DENSE]).median
    return [_filled(line, works.get(line.name), taken.get(line.name), shape, limit, device) for line in lines.values()]


def _filled(line: LayerLine, work: Any, taken: list[float] | None, shape: Shape, limit: float, device: torch.device) -> LayerLine:
    if taken is None:
        return line
    seconds = spread(taken)
    rates = {"teraflops": shape.flops / seconds.median / 1e12, "of_dense": limit / seconds.median}
    memory = None if line.name == DENSE else peak_bytes(work, device)
    return line._replace(seconds=seconds, peak_bytes=memory, host_reads=dict(host_reads(work, device)), **rates)


def _forward_and_backward(forward: Forward, x: Tensor, gradient: Tensor) -> None:
    """Gradients of weights add to those of the repeat before, as in a step of several micro-batches."""
    forward(x).backward(gradient)


def _reset(x: Tensor) -> None:
    x.grad = None


def _off(y: Tensor, expected: Tensor) -> float:
    return ((y.float() - expected.float()).norm() / expected.float().norm()).item()


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """And the version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def as_json(layers: list[LayerLine], steps: list[StepLine], device: torch.device) -> str:
    lines = [[line._asdict() for line in part] for part in (layers, steps)]
    return json.dumps({"device": device_name(device), "layers": lines[0], "steps": lines[1]}, indent=1)


def table(layers: list[LayerLine], steps: list[StepLine]) -> str:
    """Markdown; milliseconds are medians, and waits are how often the host waits for the device."""
    heads = ["layer", "by", "ms (least, most)", "TFLOP/s", "of dense products", "peak MiB", "waits", "output off by"]
    parts = [markdown(heads, map(_layer_cells, layers))] if layers else []
    heads = ["step", "ms (least, most)", "MFU", "tokens/s", "peak MiB", "waits"]
    parts += [markdown(heads, map(_step_cells, steps))] if steps else []
    return "\n\n".join(parts)


def _layer_cells(line: LayerLine) -> list[str]:
    if line.seconds is None:
        return [line.shape, line.name, line.note, *[""] * 5]
    off = "" if line.off is None else f"{line.off:.0e}"
    rates = [f"{line.teraflops:.1f}", f"{line.of_dense:.2f}", _mebibytes(line.peak_bytes), _waits(line.host_reads)]
    return [line.shape, line.name, _milliseconds(line.seconds), *rates, off]


def _step_cells(line: StepLine) -> list[str]:
    rates = [f"{line.mfu:.1%}", f"{line.tokens_per_second:.0f}", _mebibytes(line.peak_bytes), _waits(line.host_reads)]
    return [line.name, _milliseconds(line.seconds), *rates]


def _milliseconds(seconds: Spread) -> str:
    return f"{1e3 * seconds.median:.2f} ({1e3 * seconds.least:.2f}, {1e3 * seconds.most:.2f})"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"


def _waits(found: dict[str, int] | None) -> str:
    places = ", ".join(f"{count} x {place}" for place, count in (found or {}).items())
    return places or "0"


if __name__ == "__main__":
    main()
