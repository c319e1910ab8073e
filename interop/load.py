"""A Hugging Face folder as a model on one device."""

from pathlib import Path

import torch

from ..moe.model import Transformer
from .read import open_source, read_weights

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Of activations and products."""


def load_folder(path: str | Path, precision: str = "fp32", device: str = "cpu") -> Transformer:
    """The model of the folder `path`, whole on `device`, in evaluation mode.

    Raises ValueError, one line, for what cannot be expressed or does not match.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: must be one of {', '.join(PRECISIONS)}")
    source = open_source(Path(path))
    with torch.device("meta"):
        model = Transformer(source.model, PRECISIONS[precision])
    model.load_state_dict(read_weights(source, dict(model.state_dict()), device), strict=True, assign=True)
    return model.eval()
