"""What a run does when copies of a weight differ: copies them from the majority once, and stops if that does not help."""

import torch.distributed as dist

from ...parallel.apply import local
from ..config.config import OnDivergence
from ..engine import TorchEngine
from ..reporter import Reporter
from ..session import Session
from ..state import MOMENTS, optimizer_state
from .exit_codes import ExitCode
from .replicas import Difference, differences
from .stop import RunStop


class Replicas:
    """Compares them every few steps, and before a checkpoint is written."""

    def __init__(self, session: Session, reporter: Reporter) -> None:
        self.session, self.reporter = session, reporter
        self.every = session.config.debug.replicas_every
        self.compared = session.step
        self.repaired: set[int] = set()
        """Ranks that had a wrong value before."""

    def due(self) -> bool:
        return self.every > 0 and self.session.step % self.every == 0

    def compare(self) -> None:
        """RunStop if they differ and cannot be made equal. Collective."""
        if not self.every or self.compared == self.session.step:
            return
        self.compared = self.session.step
        found = differences(self.session.parallel)
        if not found:
            return
        ranks = sorted({rank for difference in found for rank in difference.ranks})
        text = f"{found[0].name}{f' and {len(found) - 1} more' if len(found) > 1 else ''} of rank {', '.join(map(str, ranks))}"
        text += " is not what its copies are"
        again = self.repaired & set(ranks)
        possible = all(difference.source is not None for difference in found) and not again
        possible = possible and isinstance(self.session.engine, TorchEngine)
        repair = possible and self.session.config.debug.on_divergence is OnDivergence.repair
        self.reporter.event(
            "replicas_differ", step=self.session.step, ranks=ranks, tensors=[d.name for d in found], repaired=repair
        )
        self.reporter.alert("replicas", f"{text}; {'copied from the others' if repair else 'the run stops'}")
        if not repair:
            why = "; it was so before, so the device may be broken" if again else ""
            raise RunStop(f"{text}{why}", ExitCode.ranks_differ, saves=False)
        self.repaired |= set(ranks)
        self.session.saver.release()  # a step that was skipped has not waited for the copies of a save
        for difference in found:
            self._repair(difference)

    def _repair(self, difference: Difference) -> None:
        """Weights and moments, on the ranks that hold copies of this piece."""
        assert difference.source is not None
        if self.session.parallel.mesh.rank not in difference.copies:
            return
        placed = self.session.parallel.placed[difference.name]
        moments = optimizer_state(self.session.engine.optimizer, placed.parameter)
        for tensor in (placed.parameter.detach(), *(moments[moment] for moment in MOMENTS)):
            dist.broadcast(local(tensor), difference.source, group=placed.copies.group)
