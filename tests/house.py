"""make house: how the code is laid out, and what one step passes through. docs/architecture.md says what the numbers are for."""

import argparse
import ast
import contextlib
import dataclasses
import functools
import itertools
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

from test_layers import circles, import_graph, sources, upward_arrows, wrong_arrows
from tokenyard.train.__main__ import main as train
from tokenyard.train.config.schema import settings

ROOT = Path(__file__).resolve().parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trace", action="store_true", help="print each file that the step passes through, with its functions")
    arguments = parser.parse_args()
    for name, value in [*rooms(), *trace(arguments.trace)]:
        print(f"{name:44} {value}")


def rooms() -> Iterator[tuple[str, object]]:
    """What the files say, without running them."""
    code = {path: path.read_text() for path in sources() if path.name != "__init__.py"}
    lines = sorted(len(text.splitlines()) for text in code.values())
    nodes = [node for text in code.values() for node in ast.walk(ast.parse(text))]
    functions = [node for node in nodes if isinstance(node, Function)]
    graph = import_graph()
    yield "files, without __init__.py", len(code)
    yield "lines of a file: median, p90, max", spread(lines)
    yield "files under 60 lines", share(sum(count < 60 for count in lines), len(lines))
    yield "functions", len(functions)
    yield "lines of a function: median, p90, max", spread(sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions))
    yield "bodies of at most 3 lines", share(sum(body_lines(node) <= 3 for node in functions), len(functions))
    yield "names of files that occur twice", twice(path.name for path in code if path.name != "__main__.py")
    yield "names of classes that occur twice", twice(node.name for node in nodes if isinstance(node, ast.ClassDef))
    yield "circles of imports", len(circles(graph))
    yield "arrows up between folders", sum(len(wrong_arrows(path.relative_to(ROOT), text)) for path, text in code.items())
    yield "arrows up inside train", len(upward_arrows(graph))
    yield "settings", sum(not dataclasses.is_dataclass(kind) for kind, _ in settings().values())


def spread(values: list[int]) -> str:
    return f"{statistics.median(values):.0f}, {values[int(len(values) * 0.9)]}, {values[-1]}"


def share(count: int, of: int) -> str:
    return f"{count / of:.0%}"


def twice(names: Iterable[str]) -> str:
    found = sorted(name for name, count in Counter(names).items() if count > 1)
    return f"{len(found)} ({', '.join(found)})"


def body_lines(node: Function) -> int:
    """Lines of the body, without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def trace(show: bool) -> Iterator[tuple[str, object]]:
    """What the second step of a tiny run calls in the main thread; it logs and saves a checkpoint."""
    seen = Trace()
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"model=tiny steps=3 log.every=2 checkpoint.every=2 run.dir={folder}/run data.cache={folder}/cache"
        sys.setprofile(seen.called)
        with contextlib.redirect_stdout(sys.stderr):
            assert train(arguments.split()) == 0
        sys.setprofile(None)
    yield "functions of a step with log and checkpoint", len(set(seen.calls))
    yield "their files", len({file for file, _ in seen.calls})
    yield "changes of file", sum(one[0] != other[0] for one, other in itertools.pairwise(seen.calls))
    if show:
        for file, functions in itertools.groupby(sorted(set(seen.calls)), key=lambda call: call[0]):
            yield file, ", ".join(name for _, name in functions)


class Trace:
    """The calls of our functions from the second to the third call of `next_step`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.steps = 0

    def called(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or (file := our_file(code.co_filename)) is None:
            return
        self.steps += code.co_name == "next_step"
        if self.steps == 2:
            self.calls.append((file, code.co_qualname))


@functools.cache
def our_file(name: str) -> str | None:
    """The path in the repository; None if the code is somebody else's."""
    path = Path(name).resolve()
    return path.relative_to(ROOT).as_posix() if path in set(sources()) else None


if __name__ == "__main__":
    main()
