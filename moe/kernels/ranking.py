"""The order of columns within a Triton program: the largest first, of equal ones that on the left, NaN before all numbers."""

# Launches pass numbers where kernels declare constants.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**63))


@triton.jit
def _sortable(x):
    """int32 in the order of fp32, which NaN heads; both zeros are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _number(packed):
    """The fp32 number that heads `packed`."""
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(x, column, exists):
    """int64 in the order of the numbers, of equal ones the first column largest; no two of a row are equal."""
    return tl.where(exists, (_sortable(x).to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64), LOWEST)


@triton.jit
def ranks(packed, COUNT: tl.constexpr):
    """The place of each column among the COUNT largest of its row, from 0; COUNT for the other columns."""
    rank = tl.zeros(packed.shape, tl.int32) + COUNT
    for place in range(COUNT):
        found = packed == tl.max(packed, 1)[:, None]
        rank = tl.where(found, place, rank)
        packed = tl.where(found, LOWEST, packed)
    return rank


@triton.jit
def leave_groups(ranked, column, exists, SIZE, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr):
    """`ranked` with -inf outside the best groups of each token: see `scoring.mask_other_groups`."""
    packed, group_of = pack(ranked, column, exists), column // SIZE
    score = tl.zeros(ranked.shape, tl.float32)
    for index in range(GROUPS):
        members = tl.where(group_of == index, packed, LOWEST)
        best = tl.max(members, 1)
        worth = _number(best)
        if TOP2:
            worth += _number(tl.max(tl.where(members == best[:, None], LOWEST, members), 1))
        score = tl.where(column == index, worth[:, None], score)  # of a group, in the column of its index
    outside = ranks(pack(score, column, column < GROUPS), TOP_GROUPS) == TOP_GROUPS
    for index in range(GROUPS):
        left = tl.max(tl.where((column == index) & outside, 1, 0), 1)[:, None]
        ranked = tl.where((group_of == index) & (left > 0), float("-inf"), ranked)
    return ranked
