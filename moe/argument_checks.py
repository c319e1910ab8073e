"""Refuses arguments of a model or a layer that are of another kind or shape than they must be, each in one line.

B sequences, S tokens of each, D width.
"""

from typing import Any

import torch
from torch import Tensor

from ..ranges import check_kinds, check_ranges
from .config import AttentionKind, ModelConfig, MoEConfig

IDS = (torch.int64, torch.int32)


def check_config(config: ModelConfig, owner: str) -> None:
    """Raises TypeError if `config`, an argument of `owner`, is no ModelConfig, and ValueError if its experts make no layer.

    What is checked are kinds and ranges of all fields, and what the shapes of weights need; a run checks all rules of
    train/config/rules/ before it makes a model.
    """
    if not isinstance(config, ModelConfig):
        nearest = f"{owner}(ModelConfig(width=64, layers=2))"
        if isinstance(config, MoEConfig):
            nearest = f"{owner}(ModelConfig(width=128, moe=MoEConfig(experts={config.experts}, top_k={config.top_k})))"
        if isinstance(config, dict):
            nearest = f"{owner}(ModelConfig({', '.join(f'{key}={value!r}' for key, value in config.items())}))"
        if isinstance(config, str):
            nearest = f"tokenyard.load_model({config!r}) if this is a run, a checkpoint or a Hugging Face folder"
        raise wrong_kind("config", config, "must be a ModelConfig", nearest)
    for section in _sections(config):
        check_kinds(section)
    check_ranges(config)
    top_k, experts = config.moe.top_k, config.moe.experts
    if experts and top_k > experts:
        raise ValueError(f"moe.top_k={top_k}: must be at most moe.experts={experts}; nearest valid: moe.top_k={experts}")


def _sections(section: Any) -> list[Any]:
    """Returns a configuration and those in it."""
    inner = [value for value in vars(section).values() if hasattr(value, "__dataclass_fields__")]
    return [section, *(found for each in inner for found in _sections(each))]


def check_heads(c: ModelConfig) -> None:
    """Raises ValueError if the width cannot be cut into the heads of grouped-query attention."""
    if c.attention.kind is not AttentionKind.gqa:
        return
    if c.head_width is None and c.width % (2 * c.heads):
        fitting = [heads for heads in range(1, c.width // 2 + 1) if c.width % (2 * heads) == 0] or [c.heads]
        nearest = min(fitting, key=lambda heads: (heads % c.kv_heads > 0, abs(heads - c.heads)))
        with_them = "" if nearest % c.kv_heads == 0 else f", kv_heads={nearest}"
        rule = f"must divide width={c.width} into heads of an even width"
        raise ValueError(f"heads={c.heads}: {rule}; nearest valid: heads={nearest}{with_them}")
    if c.heads % c.kv_heads:
        nearest = min((n for n in range(1, c.heads + 1) if c.heads % n == 0), key=lambda n: abs(n - c.kv_heads))
        raise ValueError(f"kv_heads={c.kv_heads}: must divide heads={c.heads}; nearest valid: kv_heads={nearest}")


def check_dtype(name: str, dtype: Any) -> None:
    """Raises TypeError for a `dtype` that is not one of floating-point numbers."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        known = {"bf16": "bfloat16", "fp64": "float64", "bfloat16": "bfloat16", "float64": "float64"}
        rule = "must be a torch.dtype of floating-point numbers"
        raise wrong_kind(name, dtype, rule, f"{name}=torch.{known.get(str(dtype), 'float32')}")


def check_ids(ids_BS: Any) -> None:
    """Raises TypeError for ids that are no tensor of integers, and ValueError for another shape than (B, S)."""
    if not isinstance(ids_BS, Tensor):
        raise wrong_kind("ids_BS", ids_BS, "must be a tensor of token ids, (B, S)", "ids_BS=torch.tensor([[1, 2, 3]])")
    if ids_BS.dtype not in IDS:
        raise TypeError(f"ids_BS: has dtype {ids_BS.dtype}, must be torch.int64 or int32; nearest valid: ids_BS.long()")
    if ids_BS.ndim != 2:
        nearest = "ids_BS.unsqueeze(0)" if ids_BS.ndim == 1 else f"ids_BS.view(-1, {ids_BS.shape[-1] if ids_BS.ndim else 1})"
        raise ValueError(f"ids_BS: has shape {tuple(ids_BS.shape)}, must be (B, S); nearest valid: {nearest}")


def check_hidden(x_BSD: Any, width: int) -> None:
    """Raises TypeError for hidden states that are no tensor of floating-point numbers, and ValueError if not (B, S, width)."""
    if not isinstance(x_BSD, Tensor):
        raise wrong_kind("x_BSD", x_BSD, f"must be a tensor (B, S, {width})", f"x_BSD=torch.randn(2, 16, {width})")
    if not x_BSD.is_floating_point():
        raise TypeError(f"x_BSD: has dtype {x_BSD.dtype}, must be one of floating-point numbers; nearest valid: x_BSD.float()")
    if x_BSD.ndim != 3 or x_BSD.shape[-1] != width:
        nearest = "x_BSD.unsqueeze(0)" if x_BSD.ndim == 2 and x_BSD.shape[-1] == width else f"torch.randn(2, 16, {width})"
        raise ValueError(f"x_BSD: has shape {tuple(x_BSD.shape)}, must be (B, S, {width}); nearest valid: {nearest}")


def wrong_kind(key: str, value: Any, rule: str, nearest: str) -> TypeError:
    """Returns the error, of one line."""
    said = " ".join(repr(value).split())
    said = said if len(said) <= 60 else f"{said[:60]}..."
    return TypeError(f"{key}={said}, {type(value).__name__}: {rule}; nearest valid: {' '.join(nearest.split())[:200]}")
