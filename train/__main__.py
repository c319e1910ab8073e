"""`python -m tokenyard.train`, also behind torchrun and the launcher of deepspeed."""

import sys

from .fault_tolerance.signals import hold_back, listen

if __name__ == "__main__":
    hold_back()  # from the first line: a signal while torch is imported, or this program starts anew, is heard later

from .allocator import restart_with_kept_memory
from .config.redact import redact_tracebacks
from .fault_tolerance.processes import end_with_launcher
from .rank_command import train_command


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; `argv` is by default the process's."""
    if argv is None:
        end_with_launcher()
        restart_with_kept_memory()
        redact_tracebacks()
        listen()
    return train_command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
