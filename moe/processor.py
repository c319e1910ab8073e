"""What this machine's processor can do."""

from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@cache
def multiplies_bf16() -> bool:
    """Whether it has instructions for products of bf16; without them they take many times as long as in fp32. True if not known."""
    return lists_bf16(CPUINFO.read_text(errors="replace")) if CPUINFO.exists() else True


def lists_bf16(cpuinfo: str) -> bool:
    """Whether these flags, of x86 or ARM, have them."""
    return any(name in cpuinfo.split() for name in ("avx512_bf16", "amx_bf16", "bf16"))
