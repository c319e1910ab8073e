"""Published measurements of training steps, published.json, as this project's models and layouts. A row has its source and date.

A row is used if its whole layout is published and the model is one that tokenyard can describe.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..moe.config import ModelConfig
from ..parallel.config import Exchange, ParallelConfig, PipelineSchedule
from ..train.config.compose import compose
from ..train.config.gpus import gpus
from .gpu_cluster import Cluster
from .model_work import ModelWork
from .step_time import Launching, Software, Tuning
from .workload import Recomputed, StepBatch, Workload, workload

ROWS = Path(__file__).with_name("published.json")

MODELS = {
    "deepseek_v3": ["model=deepseek_v3", "model.mtp_depth=0"],
    "deepseek_v3+mtp": ["model=deepseek_v3"],
    "gpt_oss_20b": ["model=gpt_oss_20b"],
    "gpt_oss_120b": ["model=gpt_oss_120b"],
    "mixtral_8x7b": ["model=mixtral_8x7b"],
    "qwen3_30b_a3b": ["model=qwen3_30b_a3b"],
    "qwen3_235b_a22b": ["model=qwen3_235b_a22b"],
    "qwen3_next_80b_a3b": ["model=qwen3_next_80b_a3b"],
    # moonshotai/Moonlight-16B-A3B config.json: DeepSeek-V3's layers, smaller.
    "moonlight_16b_a3b": [
        *("model=deepseek_v3", "model.mtp_depth=0", "model.layers=27", "model.width=2048", "model.heads=16", "model.kv_heads=16"),
        *("model.hidden=11264", "model.vocabulary=163840", "model.dense_first=1", "model.attention.mla.q_rank=null"),
        *("model.moe.experts=64", "model.moe.top_k=6", "model.moe.hidden=1408", "model.moe.shared_hidden=2816"),
        *("model.moe.router.groups=1", "model.moe.router.top_groups=1"),
    ],
}
"""The overrides of each published model that tokenyard can describe: none with Mamba layers or compressed sparse attention."""

GPUS = {
    "A100 80GB SXM": "a100",
    "H100 SXM": "h100",
    "H800": "h800",
    "B200": "b200",
    "B300": "b300",
    "GB200": "gb200",
    "GB300": "gb300",
}
PRECISIONS = {"BF16": "bf16", "FP8": "fp8", "MXFP8": "fp8", "FP8-MX": "fp8", "FP8-CS": "fp8"}
EXCHANGES = {"alltoall": Exchange.plain, "DeepEP": Exchange.hierarchical, "HybridEP": Exchange.hierarchical}
"""Vendor rows that name none are taken for HybridEP, which their recipes use."""
MEGATRON_RECOMPUTES = {
    "norm, act": Recomputed(elementwise=0.5),
    "norm, act, shared_expert": Recomputed(elementwise=0.7),
    "moe_act, layernorm": Recomputed(elementwise=0.5),
    "layernorm, moe_act": Recomputed(elementwise=0.5),
    "moe_act": Recomputed(elementwise=0.3),
    "selective": Recomputed(scores=1.0),
    "core_attn": Recomputed(scores=1.0),
    "mla_up_proj": Recomputed(dense=0.2),
    "mla_up_proj, mlp": Recomputed(dense=0.4),
    "layernorm, moe": Recomputed(experts=1.0, exchange=1.0, elementwise=0.8),
    "moe, layernorm": Recomputed(experts=1.0, exchange=1.0, elementwise=0.8),
    "full": Recomputed(1.0, 1.0, 1.0, 1.0, 1.0),
}
"""What Megatron's names of modules compute again, as shares of the forward pass; shares below 1 are estimates."""
VENDOR = (
    "NVIDIA Megatron-Bridge performance summary",
    "Megatron-Bridge model verification card",
    "Megatron-LM recipe index",
    "Megatron-MoE-ModelZoo",
    "Megatron-Core MoE README",
    "NeMo AutoModel performance summary",
)
"""How the sources begin that publish what a vendor tuned on its own GPUs."""


@dataclass(frozen=True)
class Measured:
    """A row. `seconds` are those of its step, or follow from the tokens or FLOPs a second that it has instead."""

    row: dict[str, Any]
    counts: Workload
    cluster: Cluster
    software: Software
    seconds: float

    @property
    def vendor(self) -> bool:
        return self.software.tuning is Tuning.vendor

    @property
    def family(self) -> str:
        """The model, whether or not it predicts several tokens."""
        return self.row["model"].partition("+")[0]

    @property
    def configuration(self) -> str:
        """Model, GPUs and layout, without precision, dispatcher, recomputation and date: rows that share it are never split."""
        names = ("gpus", "tp", "pp", "vpp", "ep", "etp", "cp", "seq", "micro_batch")
        layout = " ".join(f"{name}={self.row.get(name) or 1}" for name in names)
        return f"{self.family} {self.row['gpu']} {layout}"

    @property
    def label(self) -> str:
        """The configuration for people: without degrees of 1 and the usual length."""
        usual = {"seq": 4096}
        names = {
            "tp": "tp",
            "pp": "pp",
            "vpp": "vpp",
            "ep": "ep",
            "etp": "etp",
            "cp": "cp",
            "seq": "length",
            "micro_batch": "micro",
        }
        words = [
            f"{text} {self.row[name]}" for name, text in names.items() if (self.row.get(name) or 1) not in (1, usual.get(name))
        ]
        return ", ".join([self.family, f"{self.row['gpus']} {self.row['gpu']}", *words])

    @property
    def open(self) -> bool:
        """Whether plan/fit.py may look at the row: half of the configurations, by a hash of their text."""
        return hashlib.sha256(self.configuration.encode()).digest()[0] % 2 == 0

    @property
    def microseconds_a_token(self) -> float:
        """Of one GPU."""
        return 1e6 * self.seconds * self.cluster.ranks / self.counts.tokens


@functools.cache
def measured() -> list[Measured]:
    """Returns the rows that can be predicted, in the order of the file."""
    rows = [row for row in json.loads(ROWS.read_text()) if why_left_out(row) is None]
    return [_measured(row) for row in rows]


def why_left_out(row: dict[str, Any]) -> str | None:
    """Returns the reason in words if the row is not used."""
    notes = row.get("notes", "")
    if row["model"] not in MODELS:
        return "a model that tokenyard cannot describe, or of unpublished shape"
    if row.get("precision") not in PRECISIONS or row["gpu"] not in GPUS:
        return "a precision or GPU of which there are too few rows"
    if any(row.get(name) is None for name in ("gpus", "tp", "pp", "ep", "seq", "micro_batch")):
        return "a layout that is not published whole"
    if row.get("global_batch") is None:
        return "a batch that is not published"
    if "regression" in notes or "after a resume" in notes:
        return "a fault of the software, by its own source"
    return None


def _measured(row: dict[str, Any]) -> Measured:
    cluster = Cluster(gpus()[GPUS[row["gpu"]]], row["gpus"])
    work = _work(row["model"], row["seq"])
    counts = workload(
        work,
        layout(row),
        StepBatch(row["global_batch"], row["micro_batch"]),
        cluster,
        MEGATRON_RECOMPUTES.get(row.get("recompute", "")),
    )
    tuning = Tuning.vendor if row["source"].startswith(VENDOR) else Tuning.community
    software = Software(
        PRECISIONS[row["precision"]],
        tuning,
        not row.get("routing", "").startswith("natural"),
        _launching(row),
        "1f1b" in row.get("overlap", ""),
        row.get("dispatcher") == "alltoall",
    )
    if row.get("step_seconds"):
        seconds = row["step_seconds"]
    elif row.get("tokens_per_s_per_gpu"):
        seconds = counts.tokens / row["gpus"] / row["tokens_per_s_per_gpu"]
    else:
        seconds = counts.flops / (1e12 * row["tflops_per_gpu"])
    return Measured(row, counts, cluster, software, seconds)


def _launching(row: dict[str, Any]) -> Launching:
    """Returns how the host starts kernels, which rows do not say.

    From container 26.06 on, NVIDIA's MXFP8 recipes for Blackwell capture the whole step ("full CUDA graph" in Megatron-LM's index
    of recipes, 2026-07-09), and their speed rises by up to a half at once.
    """
    if row["source"].startswith(VENDOR) and row["precision"] == "MXFP8" and row["date"] >= "2026-06":
        return Launching.captured
    return Launching.fixed if row.get("routing", "").startswith("token drop") else Launching.counted


@functools.cache
def _work(model: str, length: int) -> ModelWork:
    return ModelWork(_model(model), length)


@functools.cache
def _model(name: str) -> ModelConfig:
    return compose(MODELS[name]).model


def layout(row: dict[str, Any]) -> ParallelConfig:
    """Returns the row's layout. Megatron's distributed optimizer is zero=1 over its data ranks."""
    chunks, stages = row.get("vpp") or 1, row["pp"]
    ranks = row["gpus"] // row["tp"] // stages
    return ParallelConfig(
        tensor=row["tp"],
        shard=ranks,
        zero=3 if row.get("fsdp") else 1,
        expert=row["ep"],
        expert_tensor=row.get("etp") or 1,
        context=row.get("cp") or 1,
        exchange=EXCHANGES[row.get("dispatcher", "HybridEP")],
        pipeline=stages,
        pipeline_schedule=PipelineSchedule["interleaved" if chunks > 1 and stages > 1 else "1f1b"],
        pipeline_chunks=chunks if chunks > 1 and stages > 1 else None,
        # Megatron counts embedding and head as layers: 94 layers in 96 stages leave the first and the last without one.
        pipeline_layers=[0, *[1] * (stages * chunks - 2), 0]
        if row["model"] == "qwen3_235b_a22b" and stages * chunks == 96
        else None,
    )
