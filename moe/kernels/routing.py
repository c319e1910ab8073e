"""Triton kernels of the router: scores, the choice of experts, weights and statistics from logits, and the gradient of the logits.

B sequences, S tokens of each, E router columns, K choices of a token. All is computed in fp32. A program owns what it writes:
every run gives the same bits.
"""

# Launches pass numbers where kernels declare constants.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ranking import leave_groups, pack, ranks

ELEMENTS, MOST_TOKENS = 1024, 32
"""Logits, and tokens, that a program has in registers at a time."""
CHUNK = 64
"""Tokens of a program, a multiple of MOST_TOKENS."""
SUMMED, COLUMNS = 64, 32
"""Chunks and columns that a program sums at a time."""
TINY = tl.constexpr(1e-20)  # as in scoring.py


@triton.jit
def _softmax(logits):
    """The softmax, and its logsumexp [TOKENS]."""
    largest = tl.max(logits, 1)
    powers = tl.exp(logits - largest[:, None])
    total = tl.sum(powers, 1)
    return powers / total[:, None], largest + tl.log(total)


@triton.jit
def _score(logit_ptr, token, exists, column, E, SIGMOID: tl.constexpr):
    """The logits of tokens, -inf after the last column, their softmax, the scores, and the logsumexp [TOKENS]."""
    logits = tl.load(logit_ptr + token[:, None] * E + column, mask=exists, other=0.0)
    logits = tl.where(column < E, logits, float("-inf"))
    softmax, logsumexp = _softmax(logits)
    scores = softmax
    if SIGMOID:
        scores = tl.where(column < E, 1 / (1 + tl.exp(-logits)), 0.0)
    return logits, softmax, scores, logsumexp


@triton.jit
def _given_ranks(given_ptr, token, there, column, K: tl.constexpr):
    """The place of each column among the K columns given for its token, from 0; K for the other columns."""
    rank = tl.zeros(column.shape, tl.int32) + K
    for k in range(K):
        given = tl.load(given_ptr + token * K + k, mask=there, other=-1)
        rank = tl.where(column == given[:, None], k, rank)
    return rank


@triton.jit
def _weigh(logits, scores, chosen, AFTER: tl.constexpr, NORMALIZE: tl.constexpr):
    """The weights of the chosen columns, 0 for the others."""
    if AFTER:
        weights = _softmax(tl.where(chosen, logits, float("-inf")))[0]
    else:
        weights = tl.where(chosen, scores, 0.0)
        if NORMALIZE:
            weights /= tl.sum(weights, 1)[:, None] + TINY
    return weights


@triton.jit
def _route(
    logit_ptr,
    bias_ptr,
    valid_ptr,
    given_ptr,
    expert_ptr,
    weight_ptr,
    score_ptr,
    z_ptr,
    counts_ptr,
    best_ptr,
    tokens_ptr,
    S,
    E,
    scale,
    group_size,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    AFTER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    GIVEN: tl.constexpr,
    BEST: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    column = tl.arange(0, COLUMNS)[None, :]
    scores_sum, z_sum = tl.zeros([TOKENS, COLUMNS], tl.float32), tl.zeros([TOKENS], tl.float32)
    counts, tokens = tl.zeros([TOKENS, COLUMNS], tl.int32), tl.zeros([TOKENS], tl.int32)
    best_counts = tl.zeros([TOKENS, COLUMNS], tl.int32)
    for start in range(0, CHUNK, TOKENS):
        place = chunk * CHUNK + start + tl.arange(0, TOKENS)
        there, token = place < S, sequence * S + place
        exists = there[:, None] & (column < E)
        logits, _, scores, logsumexp = _score(logit_ptr, token, exists, column, E, SIGMOID)
        if GIVEN:
            rank = _given_ranks(given_ptr, token, there, column + tl.zeros([TOKENS, COLUMNS], tl.int32), K)
        else:
            ranked = logits if AFTER else scores
            if BIASED:
                ranked += tl.load(bias_ptr + column, mask=column < E, other=0.0)
            if GROUPS > 1:
                ranked = leave_groups(ranked, column, column < E, group_size, GROUPS, TOP_GROUPS, TOP2)
            rank = ranks(pack(ranked, column, column < E), K)
        chosen = rank < K
        weights = _weigh(logits, scores, chosen, AFTER, NORMALIZE)
        at = token[:, None] * K + rank
        tl.store(weight_ptr + at, weights * scale, mask=chosen & exists)
        tl.store(expert_ptr + at, column + tl.zeros_like(rank), mask=chosen & exists)
        valid = there
        if MASKED:
            valid = tl.load(valid_ptr + token, mask=there, other=0) != 0
        counted = valid.to(tl.float32)
        if SIGMOID:
            scores_sum += scores / (tl.sum(scores, 1)[:, None] + TINY) * counted[:, None]
        else:
            scores_sum += scores * counted[:, None]
        z_sum += logsumexp * logsumexp * counted
        tokens += valid.to(tl.int32)
        counts += (chosen & valid[:, None]).to(tl.int32)
        if BEST:
            best_counts += ((ranks(pack(scores, column, column < E), K) < K) & valid[:, None]).to(tl.int32)
    part = sequence * tl.num_programs(0) + chunk
    columns, inside = part * E + tl.arange(0, COLUMNS), tl.arange(0, COLUMNS) < E
    tl.store(score_ptr + columns, tl.sum(scores_sum, 0), mask=inside)
    tl.store(counts_ptr + columns, tl.sum(counts, 0), mask=inside)
    if BEST:
        tl.store(best_ptr + columns, tl.sum(best_counts, 0), mask=inside)
    tl.store(z_ptr + part, tl.sum(z_sum, 0))
    tl.store(tokens_ptr + part, tl.sum(tokens, 0))


@triton.jit
def _sum_chunks(
    score_part_ptr,
    z_part_ptr,
    counts_part_ptr,
    best_part_ptr,
    tokens_part_ptr,
    score_ptr,
    z_ptr,
    count_ptr,
    best_count_ptr,
    token_ptr,
    chunks,
    parts,
    E,
    BEST: tl.constexpr,
    SUMMED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums the chunks of a sequence for some columns. The first program sums z over all sequences."""
    sequence, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    scores, counts = tl.zeros([SUMMED, COLUMNS], tl.float32), tl.zeros([SUMMED, COLUMNS], tl.int64)
    best, tokens = tl.zeros([SUMMED, COLUMNS], tl.int64), tl.zeros([SUMMED], tl.int64)
    for start in range(0, chunks, SUMMED):
        chunk = start + tl.arange(0, SUMMED)
        part = sequence * chunks + chunk
        at, inside = part[:, None] * E + column[None, :], (chunk < chunks)[:, None] & (column < E)[None, :]
        scores += tl.load(score_part_ptr + at, mask=inside, other=0.0)
        counts += tl.load(counts_part_ptr + at, mask=inside, other=0).to(tl.int64)
        if BEST:
            best += tl.load(best_part_ptr + at, mask=inside, other=0).to(tl.int64)
        tokens += tl.load(tokens_part_ptr + part, mask=chunk < chunks, other=0).to(tl.int64)
    at = sequence * E + column
    tl.store(score_ptr + at, tl.sum(scores, 0), mask=column < E)
    tl.store(count_ptr + at, tl.sum(counts, 0), mask=column < E)
    if BEST:
        tl.store(best_count_ptr + at, tl.sum(best, 0), mask=column < E)
    if tl.program_id(1) == 0:
        tl.store(token_ptr + sequence, tl.sum(tokens, 0))
        if sequence == 0:
            z = tl.zeros([SUMMED], tl.float32)
            for start in range(0, parts, SUMMED):
                part = start + tl.arange(0, SUMMED)
                z += tl.load(z_part_ptr + part, mask=part < parts, other=0.0)
            tl.store(z_ptr, tl.sum(z, 0))


def tile(columns: int) -> tuple[int, int]:
    """The tokens and, from 16 on, a power of two of columns that a program has in registers."""
    block = max(16, 1 << (columns - 1).bit_length())
    return max(1, min(MOST_TOKENS, ELEMENTS // block)), block


def route(
    logits_BSE: Tensor,
    bias_E: Tensor | None,
    valid_BS: Tensor | None,
    given_BSK: Tensor | None,
    top_k: int,
    flags: tuple[bool, bool, bool],
    scale: float,
    groups: tuple[int, int, bool],
    counts_best: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `operators.route`.

    flags: sigmoid, softmax_after, normalize.
    groups: their number, those that are chosen, and whether their best two columns rank them.
    """
    logits_BSE, (sequences, length, columns) = logits_BSE.contiguous(), logits_BSE.shape
    experts_BSK = logits_BSE.new_empty(sequences, length, top_k, dtype=torch.int64)
    weights_BSK = logits_BSE.new_empty(sequences, length, top_k)
    new = logits_BSE.new_zeros if not logits_BSE.numel() else logits_BSE.new_empty
    counts_BE, tokens_B = new(sequences, columns, dtype=torch.int64), new(sequences, dtype=torch.int64)
    scores_BE, z = new(sequences, columns), new(())
    best_BE = new((sequences, columns) if counts_best else 0, dtype=torch.int64)
    outputs = experts_BSK, weights_BSK, counts_BE, tokens_B, scores_BE, z, best_BE
    if not logits_BSE.numel():
        return outputs
    chunks = triton.cdiv(length, CHUNK)
    parts = sequences * chunks
    score_parts, z_parts = logits_BSE.new_empty(parts, columns), logits_BSE.new_empty(parts)
    counts_parts, tokens_parts = (
        counts_BE.new_empty(parts, columns, dtype=torch.int32),
        counts_BE.new_empty(parts, dtype=torch.int32),
    )
    best_parts = counts_BE.new_empty((parts, columns) if counts_best else 0, dtype=torch.int32)
    given = tuple(None if x is None else x.contiguous() for x in (bias_E, valid_BS, given_BSK))
    partial = score_parts, z_parts, counts_parts, best_parts, tokens_parts
    given_flags = *(x is not None for x in given), counts_best
    sizes = length, columns, scale, columns // groups[0], top_k
    _route[chunks, sequences](
        logits_BSE, *given, experts_BSK, weights_BSK, *partial, *sizes, *flags, *groups, *given_flags, CHUNK, *tile(columns)
    )
    sums = scores_BE, z, counts_BE, best_BE, tokens_B
    grid = sequences, triton.cdiv(columns, COLUMNS)
    _sum_chunks[grid](*partial, *sums, chunks, parts, columns, counts_best, SUMMED, COLUMNS)
    return outputs


@triton.jit
def _route_backward(
    logit_ptr,
    expert_ptr,
    valid_ptr,
    grad_weight_ptr,
    grad_score_ptr,
    grad_z_ptr,
    grad_logit_ptr,
    tokens,
    S,
    E,
    scale,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    AFTER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BALANCED: tl.constexpr,
    Z: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column, there = tl.arange(0, COLUMNS)[None, :], token < tokens
    exists = there[:, None] & (column < E)
    logits, softmax, scores, logsumexp = _score(logit_ptr, token, exists, column, E, SIGMOID)
    counted = there.to(tl.float32)
    if MASKED:
        counted = (tl.load(valid_ptr + token, mask=there, other=0) != 0).to(tl.float32)
    grad_scores, grad_logits = tl.zeros([TOKENS, COLUMNS], tl.float32), tl.zeros([TOKENS, COLUMNS], tl.float32)
    if WEIGHTED:
        grad, chosen = tl.zeros([TOKENS, COLUMNS], tl.float32), tl.zeros([TOKENS, COLUMNS], tl.int32)
        for k in range(K):
            expert = tl.load(expert_ptr + token * K + k, mask=there, other=-1)[:, None]
            grad = tl.where(column == expert, tl.load(grad_weight_ptr + token * K + k, mask=there, other=0.0)[:, None], grad)
            chosen = tl.where(column == expert, 1, chosen)
        grad *= scale
        if AFTER:
            weights = _softmax(tl.where(chosen > 0, logits, float("-inf")))[0]
            grad_logits += weights * (grad - tl.sum(weights * grad, 1)[:, None])
        elif NORMALIZE:
            of_chosen = tl.where(chosen > 0, scores, 0.0)
            total = tl.sum(of_chosen, 1)[:, None] + TINY
            grad_scores += tl.where(chosen > 0, (grad - tl.sum(grad * of_chosen, 1)[:, None] / total) / total, 0.0)
        else:
            grad_scores += grad
    if BALANCED:
        grad = tl.load(grad_score_ptr + (token // S)[:, None] * E + column, mask=exists, other=0.0) * counted[:, None]
        if SIGMOID:
            total = tl.sum(scores, 1)[:, None] + TINY
            grad = tl.where(exists, (grad - tl.sum(grad * scores, 1)[:, None] / total) / total, 0.0)
        grad_scores += grad
    if SIGMOID:
        grad_logits += grad_scores * scores * (1 - scores)
    else:
        grad_logits += softmax * (grad_scores - tl.sum(softmax * grad_scores, 1)[:, None])
    if Z:
        grad_logits += softmax * (2 * tl.load(grad_z_ptr) * logsumexp * counted)[:, None]
    tl.store(grad_logit_ptr + token[:, None] * E + column, grad_logits, mask=exists)


def route_backward(
    logits_BSE: Tensor,
    experts_BSK: Tensor,
    valid_BS: Tensor | None,
    grad_weights_BSK: Tensor | None,
    grad_scores_BE: Tensor | None,
    grad_z: Tensor | None,
    flags: tuple[bool, bool, bool],
    scale: float,
) -> Tensor:
    """(B, S, E): the gradient of the logits of `route` from those of its weights, scores and z, where there are any."""
    logits_BSE, (sequences, length, columns) = logits_BSE.contiguous(), logits_BSE.shape
    grad_logits_BSE, top_k = torch.empty_like(logits_BSE), experts_BSK.shape[2]
    if logits_BSE.numel():
        given = [None if x is None else x.contiguous() for x in (valid_BS, grad_weights_BSK, grad_scores_BE, grad_z)]
        tokens, block = sequences * length, tile(columns)
        tensors, there = (logits_BSE, experts_BSK, *given, grad_logits_BSE), [x is not None for x in given]
        sizes = tokens, length, columns, scale, top_k
        grid = (triton.cdiv(tokens, block[0]),)
        _route_backward[grid](*tensors, *sizes, *flags, *there, *block)
    return grad_logits_BSE
