"""Allocator settings that must be in the environment before a process starts."""

import os
import sys

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**35),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""glibc keeps freed activations instead of returning them to the kernel, which would clear them again in every step."""

CUDA_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Torch 2.11 to 2.13 read either, the second first."""
CUDA_SETTING = "expandable_segments:True"
"""Torch then maps GPU memory where it is needed. The sizes of all-to-alls change every step, and blocks of fixed sizes would leave
gaps that nothing fits into."""


def restart_with_kept_memory() -> None:
    """Replaces this process by itself with SETTINGS, unless the environment has one of them already. Only on Linux.

    CUDA_SETTING is set too; it is read when CUDA starts and does not need a restart.
    """
    if sys.platform != "linux":
        return
    if not any(name in os.environ for name in CUDA_VARIABLES):
        os.environ[CUDA_VARIABLES[0]] = CUDA_SETTING
    if not any(name in os.environ for name in SETTINGS):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SETTINGS})
