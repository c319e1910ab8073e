"""Named points where a test can make a run fail. Nothing happens unless TOKENYARD_FAILPOINTS is set.

    TOKENYARD_FAILPOINTS=checkpoint.shard_written:rank=1:step=6:SIGKILL,step.begin:rank=0:sleep=0.05

A missing condition always holds. `times=N` limits the failpoint to its first N hits; `restart=N` to the N-th start of the ranks by
torch's elastic launcher, counted from 0.
"""

import errno
import functools
import os
import signal
import time
from dataclasses import dataclass, field

VARIABLE = "TOKENYARD_FAILPOINTS"


def failpoint(name: str, step: int | None = None) -> bool:
    """Runs the action of the failpoint `name`, if it is set for this rank and `step`, and returns whether it is.

    Actions: the name of a signal, sent to this process; `raise` (RuntimeError); `enospc` (OSError, as from a full disk);
    `sleep=SECONDS`; `on`, if the caller acts on the result itself.
    """
    if not os.environ.get(VARIABLE):
        return False
    acting = [one for one in _parse(os.environ[VARIABLE]) if one.name == name and one.holds(step)]
    for one in acting:
        one.act()
    return bool(acting)


@dataclass
class Failpoint:
    """One entry of TOKENYARD_FAILPOINTS."""

    name: str
    action: str
    conditions: dict[str, int] = field(default_factory=dict)
    acted: int = 0

    def holds(self, step: int | None) -> bool:
        rank, restart = (int(os.environ.get(name, 0)) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
        here = {"rank": rank, "restart": restart, "step": step, "times": self.acted}
        return all(here[key] < value if key == "times" else here[key] == value for key, value in self.conditions.items())

    def act(self) -> None:
        self.acted += 1
        if self.action == "raise":
            raise RuntimeError(f"failpoint {self.name}")
        if self.action == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"failpoint {self.name}")
        if self.action.startswith("sleep="):
            time.sleep(float(self.action.removeprefix("sleep=")))
        elif self.action != "on":
            os.kill(os.getpid(), signal.Signals[self.action])


@functools.cache
def _parse(text: str) -> list[Failpoint]:
    failpoints = []
    for entry in text.split(","):
        name, *conditions, action = entry.split(":")
        pairs = (condition.split("=") for condition in conditions)
        failpoints.append(Failpoint(name, action, {key: int(value) for key, value in pairs}))
    return failpoints
