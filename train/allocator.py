"""Memory settings that must stand in the environment before a process starts."""

import os
import sys

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**35),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""glibc keeps freed activations instead of giving them back to the kernel, which would clear them again in every step."""


def restart_with_kept_memory() -> None:
    """Put this program in its own place with SETTINGS, unless the environment has one of them already. Linux alone has them."""
    if sys.platform == "linux" and not any(name in os.environ for name in SETTINGS):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SETTINGS})
