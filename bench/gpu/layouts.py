"""Two GPUs over NCCL: each layout of two ranks against one process, in fp64 to rounding and in bf16 to its tolerance.

On a CPU the two ranks meet over gloo.
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import monotonic, sleep

import torch

from ...parallel.config import Exchange, ParallelConfig
from ...parallel.mesh import build_mesh
from ...parallel.object_collectives import from_all
from ...parity.choose_layouts import Layout
from ...parity.command import explained
from ...parity.compare import Reference, assembled, compare, reference_of
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
    **{f"expert, {one.value}": ParallelConfig(expert=2, exchange=one, node_ranks=1) for one in Exchange},
    "expert, plain in 2 chunks": ParallelConfig(expert=2, overlap_chunks=2),
    "expert_tensor": ParallelConfig(expert_tensor=2),
    "shard x expert, recompute": ParallelConfig(shard=2, expert=2, recompute=True),
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
    """A rank that failed leaves the other one waiting."""
    if one.wait() != 0:
        sleep(GRACE_SECONDS)
        other.kill()


# One of the two ranks: first it trains as one process and keeps what it saw, then its part of each layout.

EXACT, NARROW = 1e-9, 3e-2
"""In fp64; and of the losses in bf16, where ranks may choose other experts at near ties."""
STEPS, LEAST_SECONDS = 3, 2.0


def main(rank: int, kind: str, meeting: Path, seconds: float) -> int:
    """Returns the exit code."""
    end = monotonic() + seconds
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    exact_products()
    torch.set_num_threads(1)
    exact = reference_of(seen(on(Precision.fp64), device))
    narrow = assembled(seen(on(Precision.bf16), device))
    with world(device, rank, 2, meeting):
        for name, parallel in LAYOUTS.items():
            if has_time(end):
                tell(rank, f"{name}, fp64", *against(exact, parallel, device))
        for name, parallel in LAYOUTS.items():
            if has_time(end):
                losses = assembled(one for one in seen(on(Precision.bf16, parallel), device) if one.key.kind == "cross entropy")
                value = max(worst_row(loss, narrow[key]) for key, loss in losses.items())
                tell(rank, f"{name}, bf16, losses", value, NARROW)
        tell(rank, "every layout had its time", 0.0 if has_time(end) else float("inf"), 0.0)
    return 0


def has_time(end: float) -> bool:
    """The same on both ranks. Collective."""
    return min(from_all(end - monotonic())) > LEAST_SECONDS


def on(precision: Precision, parallel: ParallelConfig | None = None) -> Config:
    """Of two ranks' layout, or of one process."""
    config = configured(MODEL, precision)
    return config if parallel is None else Layout(2, parallel).applied(config)


def seen(config: Config, device: torch.device) -> list[ObservedTensor]:
    """On this rank, on the host."""
    return [one._replace(tensor=one.tensor.cpu()) for one in observe(config, STEPS, device=device)]


def against(reference: Reference, parallel: ParallelConfig, device: torch.device) -> tuple[float, float, str]:
    """The largest difference, infinite if copies disagree; what is allowed; and the first that differs, in words. Collective."""
    config, layout = on(Precision.fp64, parallel), Layout(2, parallel)
    by_rank = from_all(compare(seen(config, device), reference))
    sizes = build_mesh(config.parallel).sizes
    verdict = judge(layout, by_rank, [place(sizes, rank) for rank in range(2)])
    largest = max(verdict.differences.values())
    value = largest if verdict.equal or largest > EXACT else float("inf")
    return value, EXACT, "" if verdict.equal else " ".join(explained(verdict, set()))


def tell(rank: int, name: str, value: float, limit: float, text: str = "") -> None:
    if rank == 0:
        print(json.dumps({"name": name, "value": min(value, 1e300), "limit": limit, "text": text}), flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])))
