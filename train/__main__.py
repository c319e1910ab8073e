"""`python -m tokenyard.train`, which torchrun and the launcher of deepspeed start too."""

import sys

from .fault_tolerance.signals import block_signals, install_handlers

if __name__ == "__main__":
    block_signals()  # from the first line: a signal that comes while torch is imported, or during the restart, is handled later

from .allocator import restart_with_kept_memory
from .config.redact import redact_tracebacks
from .fault_tolerance.processes import end_with_launcher
from .rank_command import run_rank


def main(argv: list[str] | None = None) -> int:
    """Runs one rank. Returns the exit code. `argv`: by default that of the process."""
    if argv is None:
        end_with_launcher()
        restart_with_kept_memory()
        redact_tracebacks()
        install_handlers()
    return run_rank(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
