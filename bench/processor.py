"""What this machine's processor can do."""

from pathlib import Path


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether it has instructions for products of bf16; without them they take many times as long as in fp32. True if not known."""
    flags = cpuinfo.read_text(errors="replace").split() if cpuinfo.exists() else ["bf16"]
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", "bf16"))
