"""Memory settings that must stand in the environment before a process starts."""

import os
import sys

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**35),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""glibc keeps freed activations instead of giving them back to the kernel, which would clear them again in every step."""


CUDA_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Torch 2.11 to 2.13 read either, the second first."""
CUDA_SETTING = "expandable_segments:True"
"""Torch maps memory of a GPU where it is needed: with all-to-alls whose sizes change at every step, blocks of fixed sizes leave
gaps that nothing fits into. Without a GPU nothing reads it."""


def restart_with_kept_memory() -> None:
    """Put this program in its own place with SETTINGS, unless the environment has one of them already. Linux alone has them.

    The same for CUDA_SETTING, which is read when CUDA starts and needs no new start.
    """
    if sys.platform != "linux":
        return
    if not any(name in os.environ for name in CUDA_VARIABLES):
        os.environ[CUDA_VARIABLES[0]] = CUDA_SETTING
    if not any(name in os.environ for name in SETTINGS):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SETTINGS})
