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

    `model(ids_BS)` gives logits of shape (B, S, V). precision: fp32, bf16 or fp64, of the activations. Raises ValueError, one
    line, for what is neither, is damaged or cannot be expressed.
    """
    if (Path(path) / "config.json").is_file():
        from .interop.load_weights import load_folder

        return load_folder(path, precision, device)
    from .train.load import load_model as load_checkpoint

    return load_checkpoint(path, precision, device)
