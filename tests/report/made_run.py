"""Run folders as training writes them, made in a moment. Import it as `made_run`: tests/conftest.py puts this on the path."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("identifier", "keyword", "number", "string", "operator", "whitespace", "comment", "other")
WORDS = ("self", "return", " ", "\n", "def", "(", "0", "import", '"', "# ", "None", "if")


def made_run(
    folder: Path,
    layers: int = 8,
    experts: int = 16,
    steps: int = 1000,
    every: int = 10,
    seed: int = 1,
    detailed: bool = True,
    **config: Any,
) -> Path:
    """Writes the run folder: layer 3 is the worst, its expert 5 the busiest; expert 2 of layer 1 dies half way."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    plain = {"steps": steps, "seed": seed, "model": {"layers": layers, "moe": {"experts": experts, "top_k": 2}}, **config}
    (folder / "config.yaml").write_text(json.dumps(plain))
    write(folder / "metrics.jsonl", metrics(random, steps))
    write(folder / "events.jsonl", events(steps))
    write(folder / "telemetry.jsonl", telemetry(random, layers, experts, steps, every, detailed))
    return folder


def write(path: Path, records: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def metrics(random: np.random.Generator, steps: int) -> Any:
    noise = random.standard_normal((steps, 4))
    for step in range(1, steps + 1):
        a, b, c, d = noise[step - 1].tolist()
        record = {
            "step": step,
            "tokens": 4096 * step,
            "loss": 2 + 5 * (1 + 12 * step / steps) ** -1.1 + 0.06 * a,
            "loss_balance": 1.1 + 0.02 * b,
            "loss_z": 3.0 + 0.1 * c,
            "grad_norm": "NaN" if step == steps // 2 else abs(0.7 + 0.2 * b + 3 / step),
            "lr": 5e-3 * min(1.0, 25 * step / steps) * (0.55 + 0.45 * np.cos(np.pi * step / steps)),
            "tokens_per_second": 9000 + 250 * c,
            "step_seconds": 0.45 - 0.01 * c,
            "mfu": 0.31 + 0.01 * c,
            "dropped_fraction": max(0.0, 0.02 - 0.03 * step / steps + 0.002 * d),
            "moe/load_max_over_mean": 2.4 + 0.3 * d,
            "moe/load_max_over_mean_layer": 3,
            "moe/load_max_over_mean_mean": 1.5 + 0.05 * d,
            "moe/load_min_over_mean": 0.4,
            "moe/dead_experts": int(step > steps // 2),
        }
        if step % max(1, steps // 10) == 0:
            record["validation_loss"] = record["loss"] + 0.08
        yield record


def events(steps: int) -> Any:
    clock = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def event(kind: str, step: int, **facts: Any) -> dict[str, Any]:
        return {
            "time": (clock + timedelta(seconds=step / 2)).isoformat(timespec="milliseconds"),
            "event": kind,
            "step": step,
            **facts,
        }

    yield event("start", 0, replicate=1, shard=2, tensor=1, expert=2)
    for step in range(steps // 10, steps, max(1, steps // 10)):
        yield event("checkpoint", step, path=f"checkpoints/step_{step:08d}")
        if step == steps // 2:
            yield event("failed", step + 7, error="RuntimeError: gradient is not finite")
            yield event("resume", step, replicate=1, shard=2, tensor=1, expert=2)
    spike = f"step {steps * 7 // 10}: loss 4.1 is 7.0 sigma above 2.6; repeated, it was there again"
    yield event("spike", steps * 7 // 10, rank=None, tensors=[], again="persistent", text=spike)
    yield event("alert", steps * 7 // 10 - 1, alert="spike", text=spike)
    parts = {"startup": 12.5, "compute": 402.0, "data": 8.1, "evaluation": 16.0, "checkpoint": 9.4, "lost": 21.0}
    yield event("accounting", steps, seconds=parts, productive=402.0 / 469.0)
    yield event("finished", steps, seconds=469.0, validation_loss=2.4321)


def telemetry(random: np.random.Generator, layers: int, experts: int, steps: int, every: int, detailed: bool) -> Any:
    L, E = layers, experts
    taste = np.clip(random.standard_normal((L, E)) * 0.35, -0.6, 0.6)
    taste[min(3, L - 1), min(5, E - 1)] = 1.3
    leaning = random.dirichlet(np.full(len(CLASSES), 0.7), (L, E))
    tokens = max(4096, 8 * E)
    for step in range(every, steps + 1, every):
        settled = min(1.0, 3 * step / steps)
        weights = np.exp(taste * (1.6 - 0.8 * settled) + 0.1 * random.standard_normal((L, E)))
        if step > steps // 2 and L > 1:
            weights[1, 2] = 0.0
        counts = np.floor(weights / weights.sum(axis=1, keepdims=True) * tokens * 2).astype(int)
        record = {
            "step": step,
            "layers": list(range(L)),
            "counts_LE": counts.tolist(),
            "dropped_L": (counts.max(axis=1) * 0.02 * (1 - settled)).astype(int).tolist(),
            "router_entropy_L": (np.log(E) * (0.5 + 0.3 * settled) - 0.02 * np.arange(L)).tolist(),
            "top1_L": (0.2 + 0.4 * settled + 0.01 * np.arange(L)).tolist(),
        }
        if detailed:
            record |= details(random, counts, leaning, settled)
        yield record


def details(random: np.random.Generator, counts: np.ndarray, leaning: np.ndarray, settled: float) -> dict[str, Any]:
    L, E = counts.shape
    together = random.gamma(0.8, 1.0, (E, E))
    together = ((together + together.T) * 40).astype(int)
    vectors = random.standard_normal((E, 24)) + 0.3
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    words = [[[WORDS[(e + i) % len(WORDS)], 500 - 40 * i] for i in range(10)] for e in range(E)]
    share = 0.3 + 0.4 * random.random((L, E))
    return {
        "bias_LE": (0.05 * random.standard_normal((L, E))).tolist(),
        "grad_norm_LE": (0.02 * counts / counts.mean()).tolist(),
        "sources": {"code": (counts * share).astype(int).tolist(), "prose": (counts * (1 - share)).astype(int).tolist()},
        "classes": {name: (counts * leaning[:, :, k]).astype(int).tolist() for k, name in enumerate(CLASSES)},
        "coactivation": {str(layer): together.tolist() for layer in range(L)},
        "similarity": {str(layer): np.round(vectors @ vectors.T, 4).tolist() for layer in range(L)},
        "vocabulary": {str(layer): words for layer in range(L)},
        "stability_L": (0.4 + 0.5 * settled - 0.01 * np.arange(L)).tolist(),
        "saturation_L": (0.3 + 0.6 * settled - 0.02 * np.arange(L)).tolist(),
    }
