"""tokenyard: Mixture-of-Experts pretraining with expert, data and tensor parallelism."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .train.load import load_model

__version__ = "0.1.0"
__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """`tokenyard.load_model`, which imports torch, at first use."""
    if name == "load_model":
        from .train.load import load_model

        return load_model
    raise AttributeError(f"module 'tokenyard' has no attribute {name!r}")
