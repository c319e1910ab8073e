"""Times forward and backward of attention with the heads of known models, and measures its memory.

FLOPs count the visible pairs of tokens: two products forward and five backward.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...moe.attention import attend
from ...moe.flexible_attention import block_mask
from ...moe.softmax import Softmax
from ..timing import peak_bytes, spread, take_turns
from .layers import forget, mebibytes, milliseconds
from .recorder import Recorder


class Heads(NamedTuple):
    """Query and key-value heads, their widths, and what is special."""

    queries: int
    keys: int
    width: int
    value_width: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    documents: int | None = None
    """Documents packed into the sequence."""


MODELS = {
    "Qwen3-30B": Heads(32, 4, 128, 128),
    "Qwen3-30B, 8 documents": Heads(32, 4, 128, 128, documents=8),
    "gpt-oss, window": Heads(64, 8, 64, 64, window=128, sinks=True),
    "gpt-oss, full": Heads(64, 8, 64, 64, sinks=True),
    "Grok-1, soft cap": Heads(48, 8, 128, 128, softcap=30.0),
    "DeepSeek-V3": Heads(128, 128, 192, 128),
}
LENGTHS = {"full": (8192,), "tiny": (64,)}
REPEATS = {"full": (5, 2), "tiny": (2, 1)}


def run(recorder: Recorder) -> None:
    for length in LENGTHS[recorder.scale]:
        for name, heads in MODELS.items():
            work, pairs = attention(heads, length, recorder.device)
            seconds = spread(take_turns({name: work}, recorder.device, *REPEATS[recorder.scale], in_a_row=2)[name])
            flops = 2 * heads.queries * pairs * (4 * heads.width + 3 * heads.value_width)
            recorder.row(
                "attention, one sequence in bf16, forward and backward",
                heads=name,
                tokens=length,
                **{"ms (least, most)": milliseconds(seconds), "TFLOP/s": round(flops / seconds.median / 1e12)},
                **{"peak MiB": mebibytes(peak_bytes(work, recorder.device))},
            )
            del work
            forget(recorder.device)


def attention(heads: Heads, length: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """Returns forward and backward of one sequence, and the number of visible pairs of tokens."""
    shapes = (heads.queries, heads.width), (heads.keys, heads.width), (heads.keys, heads.value_width)
    inputs = [
        torch.randn(1, length, count, width, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for count, width in shapes
    ]
    sinks_H = torch.randn(heads.queries, device=device, requires_grad=True) if heads.sinks else None
    documents_BS = None
    if heads.documents is not None:
        documents_BS = torch.arange(length, device=device)[None] * heads.documents // length
    special = heads.window or heads.softcap or heads.sinks or heads.documents
    blocks = block_mask(length, heads.window, device, documents_BS) if special and device.type == "cuda" else None
    softmax = Softmax(heads.width**-0.5, heads.softcap, heads.window)
    gradient = torch.randn(1, length, heads.queries, heads.value_width, device=device, dtype=torch.bfloat16).transpose(1, 2)
    query = torch.arange(length)
    seen = query + 1 if heads.window is None else (query + 1).clamp(max=heads.window)
    if heads.documents is not None:
        seen = query - query * heads.documents // length * length // heads.documents + 1
    return partial(_both, inputs, softmax, sinks_H, documents_BS, blocks, gradient), int(seen.sum())


def _both(
    inputs: list[Tensor], softmax: Softmax, sinks_H: Tensor | None, documents_BS: Tensor | None, blocks, gradient: Tensor
) -> None:
    q_BHSh, k_BGSh, v_BGSv = inputs
    y_BHSv = attend(q_BHSh, k_BGSh, v_BGSv, softmax, sinks_H, documents_BS, blocks)
    torch.autograd.grad(y_BHSv, [*inputs, *([] if sinks_H is None else [sinks_H])], gradient)
