"""Runs `tokenyard train` on a larger model, and the bare step of the same model: what data, telemetry, log and tracker add."""

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from time import monotonic

from ..timing import spread, take_turns
from .command import require_packages, start
from .layers import forget
from .recorder import Recorder
from .steps import BATCHES, NARROW, REPEATS, WIDE, build
from .waits import random_rows

MODELS = {"full": replace(WIDE, layers=2), "tiny": replace(NARROW, vocabulary=264)}
"""The initial weights are drawn on the host, so the model is not as large as in `steps`."""
STEPS = {"full": 80, "tiny": 4}


def run(recorder: Recorder) -> None:
    require_packages()
    model, (sequences, length) = MODELS[recorder.scale], BATCHES[recorder.scale][0]
    trained = build(model, recorder.device)
    step = trained.step(random_rows(trained.parallel, sequences, length))
    bare = sequences * length / spread(take_turns({"": step}, recorder.device, *REPEATS[recorder.scale], in_a_row=4)[""]).median
    del trained, step
    forget(recorder.device)
    moe = model.moe
    words = [
        *(f"model.{name}={getattr(model, name)}" for name in ("layers", "width", "heads", "kv_heads", "vocabulary")),
        *(f"model.moe.{name}={getattr(moe, name)}" for name in ("experts", "top_k", "hidden")),
        *("data=synthetic", "data.synthetic_documents=2000", "tokenizer=bytes", "tracker=jsonl", "evaluate.every=0"),
        *("sample.prompt=''", "checkpoint.every=0", "precision=bf16", f"sequence_length={length}"),
        *(f"batch.sequences={sequences}", f"steps={STEPS[recorder.scale]}", f"device={recorder.device.type}"),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name) / "run", monotonic()
        process = start([*words, f"data.cache={Path(name) / 'cache'}"], folder)
        output = process.communicate()[0].decode(errors="replace")
        recorder.check("tokenyard train", process.returncode == 0, f"exit code {process.returncode}: {output.strip()[-600:]}")
        recorder.fact(f"seconds of {STEPS[recorder.scale]} steps, start included", round(monotonic() - begin, 1))
        if process.returncode == 0:
            report_speed(recorder, folder, bare)


def report_speed(recorder: Recorder, folder: Path, bare: float) -> None:
    """Compares the tokens/s in metrics.jsonl, their median without the first half of the lines, with those of the bare step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    logged = statistics.median(speeds[len(speeds) // 2 :])
    recorder.row("tokens/s", **{"bare step": round(bare), "tokenyard train": round(logged), "share": round(logged / bare, 3)})
