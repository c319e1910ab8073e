"""The process that runs parts: `python -m tokenyard.bench.gpu.worker DEVICE SCALE`.

A line `{"part": NAME, "seconds": LIMIT}` on standard input is answered on standard output by the records of the part, then by
`{"kind": "end"}`, which says whether the process `stays`. A part that raises ends the process, since the state of the GPU cannot be
trusted then; the next part gets a new process.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import sys
import traceback

import torch

from .recorder import Recorder, Unavailable
from .runner import BY_NAME


def main(device: str, scale: str) -> int:
    """Serve until standard input ends. Returns the exit code."""
    # Libraries print to standard output, NCCL from C; keep that apart from the records.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)  # references are small, and threads on a busy machine wait for each other
    for line in sys.stdin:
        call = json.loads(line)
        recorder = Recorder(out, torch.device(device), scale, call["seconds"])
        faulthandler.dump_traceback_later(max(0.1, call["seconds"] - 1.0))
        ok = run(call["part"], recorder)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"kind": "end", "stays": ok}), file=out, flush=True)
        if not ok:
            return 1
    return 0


def run(name: str, recorder: Recorder) -> bool:
    """Run a part. Returns whether it finished."""
    try:
        exact_products()
        importlib.import_module(f"{__package__}.{BY_NAME[name].module}").run(recorder)
    except Unavailable as reason:
        recorder.skip(name, str(reason))
    except Exception as error:
        recorder.check(f"{name} came to its end", False, " ".join(f"{type(error).__name__}: {error}".split())[:500])
        traceback.print_exc()
        return False
    finally:
        forget(recorder)
    return True


def exact_products() -> None:
    """Compute fp32 products in fp32, not TF32, until a part that measures speed changes this."""
    torch.set_float32_matmul_precision("highest")


def forget(recorder: Recorder) -> None:
    gc.collect()
    if recorder.cuda:
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
