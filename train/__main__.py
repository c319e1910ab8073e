"""`python -m tokenyard.train`, also behind torchrun and the launcher of deepspeed."""

import sys

from .allocator import restart_with_kept_memory
from .command import train_command
from .redact import redact_tracebacks
from .survival.signals import listen


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; `argv` is by default the process's."""
    if argv is None:
        restart_with_kept_memory()
        redact_tracebacks()
        listen()  # a signal while torch is imported is heard, too
    return train_command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
