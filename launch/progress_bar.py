"""A progress bar with a total on standard error; nothing where that is no terminal, so that logs stay clean."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """Yields a function of (done, total) and of a text that describes them, else their share. `what`: a few words."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(what), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("0%", total=None)

        def progress(done: int, total: int, text: str = "") -> None:
            share = f"{done / max(total, 1):.0%}"
            bar.update(task, completed=done, total=total, description=f"{share} {text}".rstrip())

        yield progress
