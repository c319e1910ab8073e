"""Writes a run to TensorBoard's event files in RUN/tensorboard, for `tensorboard --logdir`. No other file imports tensorboard."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..expert_stats.alerts import TITLES
from ..expert_stats.heatmap import load_map, load_ratio, png
from .base import AbstractTracker, summary_text
from .sections import charted


class TensorboardTracker(AbstractTracker):
    """Writes scalars by step, the load as picture and histogram, alerts and samples as text. A resumed run adds another file."""

    name = "tensorboard"

    def __init__(self, run_dir: Path):
        self._folder = run_dir / "tensorboard"
        self._writer: Any = None
        self._step = 0

    def start(self, facts: Mapping[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(self._folder), flush_secs=10)
        self._text("run", summary_text(facts), 0)

    def log(self, record: Mapping[str, Any]) -> None:
        self._step = record["step"]
        numbers = {key: float(value) for key, value in charted(record).items() if isinstance(value, int | float)}
        self._write([{"tag": key, "simple_value": number} for key, number in numbers.items()], self._step)

    def telemetry(self, record: Mapping[str, Any]) -> None:
        rgb = load_map(record["counts_LE"])
        height, width, _ = rgb.shape
        picture = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": png(rgb)}
        ratio = load_ratio(record["counts_LE"]).ravel()
        counts, edges = np.histogram(ratio, bins=32)
        histogram = {
            "min": ratio.min(),
            "max": ratio.max(),
            "num": ratio.size,
            "sum": ratio.sum(),
            "sum_squares": (ratio**2).sum(),
            "bucket_limit": edges[1:].tolist(),
            "bucket": counts.tolist(),
        }
        values = [{"tag": "experts/load", "image": picture}, {"tag": "experts/load_over_even", "histo": histogram}]
        self._write(values, record["step"])

    def alert(self, kind: str, text: str) -> None:
        self._text(f"alerts/{kind}", f"**{TITLES.get(kind, kind)}**: {text}", self._step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._text("sample", "\n".join(f"    {line}" for line in (prompt + text).splitlines()), step)

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        self._text("outcome", summary_text({"exit_code": exit_code, **summary}), self._step)
        self._writer.close()

    def _write(self, values: list[dict[str, Any]], step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        summaries: Any = summary_pb2  # its names are created on import, so type checkers see none
        summary = summaries.Summary(value=[summaries.Summary.Value(**value) for value in values])
        self._writer.add_event(vars(event_pb2)["Event"](summary=summary, step=step, wall_time=time.time()))

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.compat.proto import summary_pb2, tensor_pb2

        metadata_of = vars(summary_pb2)["SummaryMetadata"]
        metadata = metadata_of(plugin_data=metadata_of.PluginData(plugin_name="text"))
        tensor = vars(tensor_pb2)["TensorProto"](dtype="DT_STRING", string_val=[text.encode()])
        self._write([{"tag": tag, "metadata": metadata, "tensor": tensor}], step)
