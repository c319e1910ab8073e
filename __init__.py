"""tokenyard: Mixture-of-Experts pretraining with expert, data and tensor parallelism.

Importing it imports neither torch nor anything else: each name below is imported when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Not relative: pytest imports this file by the name of its folder, and fresh-clone is the name of no package.
from tokenyard.version import __version__  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from .moe.config import AttentionConfig as AttentionConfig
    from .moe.config import BalanceConfig as BalanceConfig
    from .moe.config import CapacityConfig as CapacityConfig
    from .moe.config import ModelConfig as ModelConfig
    from .moe.config import MoEConfig as MoEConfig
    from .moe.config import RouterConfig as RouterConfig
    from .moe.layer import MoELayer as MoELayer
    from .moe.model import Transformer as Transformer

__all__ = [
    "AttentionConfig",
    "BalanceConfig",
    "CapacityConfig",
    "MoEConfig",
    "MoELayer",
    "ModelConfig",
    "RouterConfig",
    "Transformer",
    "__version__",
    "generate",
    "load_model",
]


def load_model(path: str | Path, precision: str = "fp32", device: "str | torch.device" = "cpu") -> "Transformer":
    """Returns the model of a checkpoint (or of the newest one of a run folder) or of a Hugging Face folder, whole on one device.

    `path` may be a name, as mistralai/Mixtral-8x7B-v0.1, of a model in the cache of the Hugging Face hub. Nothing is downloaded.

    `model(ids_BS)` gives logits of shape (B, S, V), and `model.tokenizer` is the tokenizer beside the weights. precision: that of
    the activations, fp32, bf16 or fp64. Raises ValueError, one line, for what is neither, is damaged or cannot be expressed.
    """
    from .train.load import load_model as load

    return load(path, precision, device)


def generate(
    model: "Transformer | str | Path",
    prompt: "str | Sequence[int] | Sequence[str] | torch.Tensor",
    tokens: int = 128,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    seed: int = 1,
) -> Any:
    """Returns what a model writes after `prompt`, as `tokenyard generate` does with the same settings.

    Ends early at the end of a document. To open a model once for several calls, pass the model of `load_model`.

    Args:
        model: a model, or the path of a run, a checkpoint or a Hugging Face folder, opened on the best device that there is.
        prompt: a text gives a text; token ids give a list of ids; a list of prompts gives a list, each alone with the same seed.
        tokens: how many tokens follow at most.
        temperature: 0 takes the likeliest token.
        top_p: samples from the likeliest tokens that together have this probability.
        top_k: samples from at most so many of them.
        seed: of the sampling.

    Raises TypeError or ValueError, one line, for an argument of another kind or outside its range.
    """
    from .train.config.config import SampleConfig
    from .train.load import continue_prompts

    return continue_prompts(model, prompt, SampleConfig("", tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k), seed)


def __getattr__(name: str) -> Any:
    modules = {"MoELayer": "moe.layer", "Transformer": "moe.model"}
    if name not in __all__:
        raise AttributeError(f"module 'tokenyard' has no attribute {name!r}")
    return getattr(import_module(f"tokenyard.{modules.get(name, 'moe.config')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
