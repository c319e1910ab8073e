"""What the tests of this folder run in a process of their own, by the fixture `apart`: steps of single ranks as numbers.

Import it as `dry_steps`: tests/conftest.py puts this folder on the path.
"""

import composed_once
from tokenyard.plan.dry_run import StepFacts, step_facts
from tokenyard.train.config.compose import compose

composed_once.install()


def facts_of(words: str, rank: int = 0, world: int = 1, in_full: bool = True, hot: float = 1.0) -> StepFacts:
    """A step of a rank."""
    return step_facts(compose(words.split()), rank, world, hot, in_full)
