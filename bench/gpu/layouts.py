"""Compares each layout of two ranks with one process, on two GPUs over NCCL or on a CPU over gloo, in fp64 and in bf16.

`python -m tokenyard.bench.gpu.layouts RANK DEVICE MEETING SECONDS` is one of the two ranks. Rank 0 prints a line of JSON for each
check.
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import monotonic, sleep

import torch

from ...parallel.config import OWN_EXCHANGES, ParallelConfig, Recompute
from ...parallel.mesh import build_mesh
from ...parallel.object_collectives import from_all
from ...parity.choose_layouts import Layout
from ...parity.command import explained
from ...parity.compare import Reference, assemble, compare, reference_of
from ...parity.diagnose import judge, place
from ...parity.observe import ObservedTensor, observe
from ...train.config.config import Config, Precision
from .exchanges import MODEL, world
from .presets import configured
from .recorder import Recorder, Unavailable
from .row_error import worst_row
from .worker import exact_products

GRACE_SECONDS = 5.0
LAYOUTS = {
    "replicate": ParallelConfig(),
    **{f"shard, ZeRO-{zero}": ParallelConfig(shard=2, zero=zero) for zero in (3, 2, 1)},
    "tensor": ParallelConfig(tensor=2),
    **{f"expert, {one.value}": ParallelConfig(expert=2, exchange=one, node_ranks=1) for one in OWN_EXCHANGES},
    "expert, plain in 2 chunks": ParallelConfig(expert=2, overlap_chunks=2),
    "expert_tensor": ParallelConfig(expert_tensor=2),
    "shard x expert, recompute": ParallelConfig(shard=2, expert=2, recompute=Recompute.block),
    "shard x expert, selective": ParallelConfig(shard=2, expert=2, recompute=Recompute.selective),
    "tensor x expert": ParallelConfig(tensor=2, expert=2),
}


def run(recorder: Recorder) -> None:
    if recorder.cuda and torch.cuda.device_count() < 2:
        raise Unavailable(f"{torch.cuda.device_count()} GPU: two ranks need two")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [recorder.device.type, str(folder / "meeting"), str(max(5.0, recorder.remaining - 5.0))]
        program = [sys.executable, "-P", "-m", f"{__package__}.layouts"]
        first = subprocess.Popen([*program, "0", *words], stdout=subprocess.PIPE)
        second = subprocess.Popen([*program, "1", *words], stdout=subprocess.DEVNULL)
        threading.Thread(target=_end_with, args=[second, first], daemon=True).start()
        assert first.stdout is not None
        for line in first.stdout:
            recorder.below(**json.loads(line))
        codes = [first.wait(), second.wait()]
        recorder.check("both ranks came to their end", codes == [0, 0], f"exit codes {codes}")


def _end_with(one: subprocess.Popen[bytes], other: subprocess.Popen[bytes]) -> None:
    """Kill the other rank if `one` fails, because it would wait forever."""
    if one.wait() != 0:
        sleep(GRACE_SECONDS)
        other.kill()


# One of the two ranks. It first trains as one process, as the reference, and then its part of each layout.

EXACT, NARROW = 1e-9, 3e-2
"""Limits in fp64, and of the losses in bf16, where ranks may choose other experts at near ties."""
STEPS, LEAST_SECONDS = 3, 2.0


def main(rank: int, kind: str, meeting: Path, seconds: float) -> int:
    """Returns the exit code."""
    end = monotonic() + seconds
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    exact_products()
    torch.set_num_threads(1)
    exact = reference_of(seen(on(Precision.fp64), device))
    narrow = assemble(seen(on(Precision.bf16), device))
    with world(device, rank, 2, meeting):
        for name, parallel in LAYOUTS.items():
            if has_time(end):
                print_check(rank, f"{name}, fp64", *against(exact, parallel, device))
        for name, parallel in LAYOUTS.items():
            if has_time(end):
                losses = assemble(one for one in seen(on(Precision.bf16, parallel), device) if one.key.kind == "cross entropy")
                value = max(worst_row(loss, narrow[key]) for key, loss in losses.items())
                print_check(rank, f"{name}, bf16, losses", value, NARROW)
        print_check(rank, "every layout had its time", 0.0 if has_time(end) else float("inf"), 0.0)
    return 0


def has_time(end: float) -> bool:
    """Whether both ranks have time for another layout. Collective."""
    return min(from_all(end - monotonic())) > LEAST_SECONDS


def on(precision: Precision, parallel: ParallelConfig | None = None) -> Config:
    """The configuration of a layout of two ranks, or of one process (None)."""
    config = configured(MODEL, precision)
    return config if parallel is None else Layout(2, parallel).applied(config)


def seen(config: Config, device: torch.device) -> list[ObservedTensor]:
    """What this rank observes, copied to the host."""
    return [one._replace(tensor=one.tensor.cpu()) for one in observe(config, STEPS, device=device)]


def against(reference: Reference, parallel: ParallelConfig, device: torch.device) -> tuple[float, float, str]:
    """Returns the largest difference (infinite if copies disagree), the limit, and a text on the first that differs. Collective."""
    config, layout = on(Precision.fp64, parallel), Layout(2, parallel)
    by_rank = from_all(compare(seen(config, device), reference))
    sizes = build_mesh(config.parallel).sizes
    verdict = judge(layout, by_rank, [place(sizes, rank) for rank in range(2)])
    largest = max(verdict.differences.values())
    value = largest if verdict.equal or largest > EXACT else float("inf")
    return value, EXACT, "" if verdict.equal else " ".join(explained(verdict, set()))


def print_check(rank: int, name: str, value: float, limit: float, text: str = "") -> None:
    if rank == 0:
        print(json.dumps({"name": name, "value": min(value, 1e300), "limit": limit, "text": text}), flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])))
