"""What the tests of this folder run in a process of their own, by the fixture `apart`: steps of single ranks as numbers.

Import it as `dry_steps`: tests/conftest.py puts this folder on the path.
"""

import contextlib
import io

import composed_once
from tokenyard.launch.main import main
from tokenyard.plan.dry_run import StepFacts, step_facts
from tokenyard.train.config.compose import compose

composed_once.install()


def facts_of(words: str, rank: int = 0, world: int = 1, in_full: bool = True, hot: float = 1.0) -> StepFacts:
    """A step of a rank."""
    return step_facts(compose(words.split()), rank, world, hot, in_full)


def printed(words: str) -> tuple[int, str]:
    """Exit code and output of `tokenyard plan --dry-run`."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["plan", "--dry-run", *words.split()])
    return code, out.getvalue()
