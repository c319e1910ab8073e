"""Two GPUs over NCCL: each layout of two ranks against one process, in fp64 to rounding and in bf16 to its tolerance.

On a CPU the two ranks meet over gloo.
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import sleep

import torch

from ...parallel.config import Exchange, ParallelConfig
from .tell import Absent, Teller

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


def run(teller: Teller) -> None:
    if teller.cuda and torch.cuda.device_count() < 2:
        raise Absent(f"{torch.cuda.device_count()} GPU: two ranks need two")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [teller.device.type, str(folder / "meeting"), str(max(5.0, teller.remaining - 5.0))]
        program = [sys.executable, "-P", "-m", f"{__package__}.rank"]
        first = subprocess.Popen([*program, "0", *words], stdout=subprocess.PIPE)
        second = subprocess.Popen([*program, "1", *words], stdout=subprocess.DEVNULL)
        threading.Thread(target=_end_with, args=[second, first], daemon=True).start()
        assert first.stdout is not None
        for line in first.stdout:
            teller.below(**json.loads(line))
        codes = [first.wait(), second.wait()]
        teller.check("both ranks came to their end", codes == [0, 0], f"exit codes {codes}")


def _end_with(one: subprocess.Popen[bytes], other: subprocess.Popen[bytes]) -> None:
    """A rank that failed leaves the other one waiting."""
    if one.wait() != 0:
        sleep(GRACE_SECONDS)
        other.kill()
