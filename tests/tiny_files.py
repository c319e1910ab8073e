"""The smallest valid files that the project reads: a checkpoint, a Hugging Face folder and a run's, of zeros."""

import json
from pathlib import Path
from typing import Any

import xxhash
from tokenyard.data.tokenizer_types import BytesTokenizer
from tokenyard.moe.param_shapes import shapes
from tokenyard.train.config.config import Config
from tokenyard.train.config.serialize import plain_config, write_config

TINY = ["model.layers=2", "model.width=16", "model.heads=2", "model.kv_heads=1", "model.hidden=16", "model.vocabulary=264"]
TINY += ["model.moe.experts=2", "model.moe.top_k=1", "model.moe.hidden=8", "tokenizer=bytes"]


def safetensors(path: Path, found: dict[str, tuple[int, ...]]) -> None:
    """A file of zeros in fp32."""
    header, end = {}, 0
    for name, shape in found.items():
        begin, end = end, end + 4 * product(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def product(shape: tuple[int, ...]) -> int:
    return shape[0] * product(shape[1:]) if shape else 1


def record(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "hash": xxhash.xxh3_128_hexdigest(path.read_bytes())}


def tiny_checkpoint(folder: Path, config: Config, version: int = 1) -> Path:
    """As a run writes it, of zeros. `version`: of the manifest."""
    path = folder / "step_00000003"
    BytesTokenizer().save(path / "tokenizer")
    found = {f"model.{name}": shape for name, shape in shapes(config.model).items()}
    shard = "shard_00000.safetensors"
    safetensors(path / shard, found)
    chunk = {name: {"offsets": [0] * len(shape), "sizes": shape, "file": shard, "key": name} for name, shape in found.items()}
    facts = {"config": plain_config(config), "step": 3, "tokens": 9, "ranks": 1, "layout": {"data": 1}, "extra": {}, "torch": "2"}
    content = {
        "format": "tokenyard checkpoint",
        "version": 1,
        "step": 3,
        "facts": facts,
        "tensors": {name: {"dtype": "F32", "shape": shape, "chunks": [chunk[name]]} for name, shape in found.items()},
        "files": {shard: record(path / shard)},
        "attachments": {"tokenizer/tokenizer_about.json": record(path / "tokenizer" / "tokenizer_about.json")},
        "experts": {},
    }
    if version == 2:
        cuts = {name: [[0, size] for size in shape] for name, shape in found.items()}
        groups = [
            {"dtype": "F32", "shape": shape, "cuts": cuts[name], "files": [0], "names": [name]} for name, shape in found.items()
        ]
        content |= {"version": 2, "tensors": groups}
    write_manifest(path / "manifest.json", content)
    return path


def write_manifest(path: Path, content: Any) -> None:
    """With the hash that fits, where it can have one."""
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != "hash"}
        content["hash"] = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps(content))


def tiny_hugging_face(folder: Path) -> Path:
    """A Mixtral of zeros."""
    path = folder / "hf"
    path.mkdir()
    about = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    about |= {"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 1, "num_experts_per_tok": 2, "vocab_size": 264}
    (path / "config.json").write_text(json.dumps(about))
    layer = "model.layers.0."
    found = {"model.embed_tokens.weight": (264, 16), "model.norm.weight": (16,), "lm_head.weight": (264, 16)}
    found |= {f"{layer}{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
    found |= {
        f"{layer}self_attn.{name}_proj.weight": size
        for name, size in zip("qkvo", [(16, 16), (8, 16), (8, 16), (16, 16)], strict=True)
    }
    found[f"{layer}block_sparse_moe.gate.weight"] = (2, 16)
    for expert in range(2):
        for name, size in (("w1", (8, 16)), ("w2", (16, 8)), ("w3", (8, 16))):
            found[f"{layer}block_sparse_moe.experts.{expert}.{name}.weight"] = size
    safetensors(path / "model-1.safetensors", found)
    index = {"metadata": {}, "weight_map": dict.fromkeys(found, "model-1.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def tiny_run(folder: Path, config: Config) -> Path:
    """A run folder as `report` reads it."""
    path = folder / "run"
    path.mkdir()
    write_config(config, path / "config.yaml")
    steps = [{"step": step, "loss": 5.0, "tokens": step, "seconds": 1.0, "lr": 0.1, "grad_norm": 1.0} for step in (1, 2, 3)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (path / "events.jsonl").write_text(json.dumps({"time": "2026-01-01T00:00:00", "event": "start"}) + "\n")
    return path
