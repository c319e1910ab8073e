"""tokenyard: Mixture-of-Experts pretraining with expert, data and tensor parallelism."""

from pathlib import Path
from typing import TYPE_CHECKING

# Not relative: pytest imports this file by the name of its folder, and fresh-clone is the name of no package.
from tokenyard.version import __version__  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:
    from .moe.model import Transformer

__all__ = ["__version__", "load_model"]


def load_model(path: str | Path, precision: str = "fp32", device: str = "cpu") -> "Transformer":
    """Returns the model of a checkpoint (or of the newest one of a run folder) or of a Hugging Face folder, whole on one device.

    `path` may be a name, as mistralai/Mixtral-8x7B-v0.1, of a model in the cache of the Hugging Face hub. Nothing is downloaded.

    `model(ids_BS)` gives logits of shape (B, S, V). precision: fp32, bf16 or fp64, of the activations. Raises ValueError, one
    line, for what is neither, is damaged or cannot be expressed.
    """
    from .train.weight_source import hf_folder

    if hf := hf_folder(path):
        from .interop.load_weights import load_folder

        return load_folder(hf, precision, device)
    from .train.load import load_model as load_checkpoint

    return load_checkpoint(path, precision, device)
