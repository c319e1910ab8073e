"""Triton kernels of the plan of rows: a stable counting sort of the choices by expert, in three launches.

A = T * K choices of T tokens, E experts, C chunks of choices. A program owns what it writes, and the sums are of integers, so every
run gives the same bits. A choice of the id E is dropped.
"""

# Launches pass numbers where kernels declare constants.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 16
"""Choices that a program compares with all experts at a time."""
OTHERS = 8
"""Choices that a program compares with all of its chunk at a time."""
EXPERTS = 128
"""Experts of a program that counts."""
SCANNED = 512
"""Chunks, or rows of padding, that a program takes at a time."""


@triton.jit
def _count_lower(expert_ptr, lower_ptr, choices, E, CHUNK: tl.constexpr, LANES: tl.constexpr, EXPERTS: tl.constexpr):
    """lower[c, e] is the number of choices of chunk c whose expert is less than e, for e from 0 to E."""
    chunk = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    lower = tl.zeros([LANES, EXPERTS], tl.int32)
    for start in range(0, CHUNK, LANES):
        choice = chunk * CHUNK + start + tl.arange(0, LANES)
        chosen = tl.load(expert_ptr + choice, mask=choice < choices, other=E).to(tl.int32)
        lower += (chosen[:, None] < expert[None, :]).to(tl.int32)
    tl.store(lower_ptr + chunk * (E + 1) + expert, tl.sum(lower, 0), mask=expert <= E)


@triton.jit
def _scan_counts(lower_ptr, count_ptr, begin_ptr, before_ptr, chunks, E, BLOCK: tl.constexpr):
    """Counts the choices of an expert, of those before it (begin), and of the same one in the chunks before each (before)."""
    expert = tl.program_id(0)
    begin, count = tl.zeros([BLOCK], tl.int64), tl.zeros([], tl.int64)
    for start in range(0, chunks, BLOCK):
        chunk = (start + tl.arange(0, BLOCK)).to(tl.int64)
        lower_chunk = lower_ptr + chunk * (E + 1) + expert
        lower = tl.load(lower_chunk, mask=chunk < chunks, other=0).to(tl.int64)
        here = tl.load(lower_chunk + 1, mask=chunk < chunks, other=0).to(tl.int64) - lower
        tl.store(before_ptr + chunk * E + expert, count + tl.cumsum(here, 0) - here, mask=chunk < chunks)
        begin += lower
        count += tl.sum(here, 0)
    tl.store(begin_ptr + expert, tl.sum(begin, 0))
    tl.store(count_ptr + expert, count)


def count_rows(experts_TK: Tensor, experts: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the choices of each expert, int64 (E,). For `place_rows`: those of the experts before it, (E,), and those of the same
    expert in the chunks before each, (C, E).
    """
    choices = experts_TK.numel()
    chunks = triton.cdiv(choices, chunk)
    lower_CE = experts_TK.new_empty(chunks, experts + 1, dtype=torch.int32)
    count_E, begin_E, before_CE = (experts_TK.new_empty(shape) for shape in (experts, experts, (chunks, experts)))
    if choices:
        grid = chunks, triton.cdiv(experts + 1, EXPERTS)
        _count_lower[grid](experts_TK.contiguous(), lower_CE, choices, experts, chunk, LANES, EXPERTS)
    _scan_counts[experts,](lower_CE, count_E, begin_E, before_CE, chunks, experts, SCANNED)
    return count_E, begin_E, before_CE


@triton.jit
def _place_rows(
    expert_ptr,
    count_ptr,
    begin_ptr,
    before_ptr,
    slot_ptr,
    token_ptr,
    kept_ptr,
    filled_ptr,
    rows_ptr,
    choices,
    chunks,
    E,
    padded_rows,
    K: tl.constexpr,
    DROPPING: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    OTHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first programs place a chunk of choices each; with padding, the others fill up the rows of an expert each."""
    chunk = tl.program_id(0).to(tl.int64)
    if chunk < chunks:
        index = tl.arange(0, CHUNK)
        choice = chunk * CHUNK + index
        inside = choice < choices
        chosen = tl.load(expert_ptr + choice, mask=inside, other=E).to(tl.int32)
        earlier = tl.zeros([CHUNK], tl.int32)
        for start in range(0, CHUNK, OTHERS):
            lane = start + tl.arange(0, OTHERS)
            other = tl.load(expert_ptr + chunk * CHUNK + lane, mask=chunk * CHUNK + lane < choices, other=E).to(tl.int32)
            same = (other[None, :] == chosen[:, None]) & (lane[None, :] < index[:, None])
            earlier += tl.sum(same.to(tl.int32), 1)
        kept = inside & (chosen < E)
        begin = chosen.to(tl.int64) * padded_rows if PADDED else tl.load(begin_ptr + chosen, mask=kept, other=0)
        slot = begin + tl.load(before_ptr + chunk * E + chosen, mask=kept, other=0) + earlier
        tl.store(slot_ptr + choice, tl.where(kept, slot, -1), mask=inside)
        tl.store(token_ptr + slot, choice // K, mask=kept)
        if DROPPING:
            tl.store(kept_ptr + choice, kept, mask=inside)
    else:
        expert = chunk - chunks
        count = tl.load(count_ptr + expert)
        tl.store(rows_ptr + expert, padded_rows)
        for start in range(0, padded_rows, BLOCK):
            nth = start + tl.arange(0, BLOCK)
            row = expert * padded_rows + nth
            tl.store(filled_ptr + row, nth < count, mask=nth < padded_rows)
            tl.store(token_ptr + row, tl.zeros([BLOCK], tl.int64), mask=(nth >= count) & (nth < padded_rows))


def place_rows(
    experts_TK: Tensor, count_E: Tensor, begin_E: Tensor, before_CE: Tensor, padded_rows: int | None, dropping: bool, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the tensors of a `dispatch.RowPlan` from the results of `count_rows`: token_R, slot_TK, kept_TK, filled_R and rows_E.

    kept_TK is empty without dropping, the last two without padding. Without padding, token_R has A elements: zeros behind the last
    kept row, which a dry run reads.
    """
    (tokens, top_k), (chunks, experts) = experts_TK.shape, before_CE.shape
    padded = padded_rows is not None
    rows = tokens * top_k if padded_rows is None else experts * padded_rows
    slot_TK, rows_E = experts_TK.new_empty(tokens, top_k), experts_TK.new_empty(experts if padded else 0)
    token_R = experts_TK.new_zeros(rows) if dropping and not padded else experts_TK.new_empty(rows)
    kept_TK = experts_TK.new_empty((tokens, top_k) if dropping else 0, dtype=torch.bool)
    filled_R = experts_TK.new_empty(rows if padded else 0, dtype=torch.bool)
    programs = chunks + experts if padded else chunks
    if programs:
        tensors = experts_TK.contiguous(), count_E, begin_E, before_CE, slot_TK, token_R, kept_TK, filled_R, rows_E
        sizes = tokens * top_k, chunks, experts, padded_rows or 0, top_k
        _place_rows[programs,](*tensors, *sizes, dropping, padded, chunk, OTHERS, SCANNED)
    return token_R, slot_TK, kept_TK, filled_R, rows_E
