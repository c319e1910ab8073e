"""make house: how the code is laid out, and what one step passes through. docs/architecture.md says what the numbers are for."""

import argparse
import ast
import contextlib
import itertools
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("tests", "docs", "build")
PRODUCT = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not (top := path.relative_to(ROOT).parts[0]).startswith(".") and top not in LEFT_OUT
]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trace", action="store_true", help="print each file that the step passes through, with its functions")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    for name, value in [*rooms(), *trace(arguments.trace)]:
        print(f"{name:48} {value}")


def rooms() -> Iterator[tuple[str, str]]:
    files = [path for path in PRODUCT if path.name != "__init__.py"]
    lines = sorted(len(path.read_text().splitlines()) for path in files)
    yield "files, without __init__.py", str(len(files))
    yield "lines of a file: median, p90, max", spread(lines)
    yield "files under 60 lines", share(sum(n < 60 for n in lines), len(lines))
    functions = [node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]
    yield "functions", str(len(functions))
    yield "lines of a function: median, p90, max", spread(sorted(map(function_lines, functions)))
    yield "bodies of at most 3 lines", share(sum(body_lines(node) <= 3 for node in functions), len(functions))
    classes = [node.name for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    yield "names of files that occur twice", twice(path.name for path in files if path.name != "__main__.py")
    yield "names of classes that occur twice", twice(classes)
    graph = import_graph()
    yield "circles of imports", str(len(circles(graph)))


def spread(values: list[int]) -> str:
    return f"{statistics.median(values):.0f}, {values[int(len(values) * 0.9)]}, {values[-1]}"


def share(count: int, of: int) -> str:
    return f"{count / of:.0%}"


def twice(names: Any) -> str:
    found = sorted(name for name, count in Counter(names).items() if count > 1)
    return f"{len(found)} ({', '.join(found)})"


def function_lines(node: Function) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def body_lines(node: Function) -> int:
    """Lines of the body, without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def import_graph() -> dict[str, set[str]]:
    """From each file to the files that it imports, in functions and for type checkers too."""
    from test_layers import imports

    names = {path.relative_to(ROOT).as_posix() for path in PRODUCT}
    return {
        name: {file for item in imports(Path(name), (ROOT / name).read_text()) if (file := file_of(item.module, names))} - {name}
        for name in sorted(names)
    }


def file_of(module: str, names: set[str]) -> str | None:
    """The file that a dotted name, or the name in a module that it may be, is in; None if it is not ours."""
    top, *parts = module.split(".")
    for count in range(len(parts), -1, -1) if top == "tokenyard" else ():
        path = "/".join(parts[:count])
        for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if file in names:
                return file
    return None


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of files each of which reaches all others (Tarjan's components of more than one)."""

    def reach(start: str) -> set[str]:
        seen, waiting = set[str](), [start]
        while waiting:
            for node in graph[waiting.pop()] - seen:
                seen.add(node)
                waiting.append(node)
        return seen

    reached = {node: reach(node) for node in graph}
    found: list[set[str]] = []
    for node in graph:
        ring = {other for other in reached[node] if node in reached[other]}
        if len(ring) > 1 and ring not in found:
            found.append(ring)
    return found


def trace(show: bool) -> Iterator[tuple[str, str]]:
    """What the second step of a tiny run calls in the main thread; it logs and saves a checkpoint."""
    from tokenyard.train.__main__ import main

    seen = Trace()
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"model=tiny steps=3 log.every=2 checkpoint.every=2 run.dir={folder}/run data.cache={folder}/cache"
        sys.setprofile(seen.called)
        with contextlib.redirect_stdout(sys.stderr):
            assert main(arguments.split()) == 0
        sys.setprofile(None)
    yield "functions of a step with log and checkpoint", str(len(set(seen.calls)))
    yield "their files", str(len({file for file, _ in seen.calls}))
    yield "changes of file", str(sum(one[0] != other[0] for one, other in itertools.pairwise(seen.calls)))
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
        if event != "call" or not code.co_filename.startswith(str(ROOT)) or "/.venv/" in code.co_filename:
            return
        self.steps += code.co_name == "next_step"
        if self.steps == 2:
            self.calls.append((str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname))


if __name__ == "__main__":
    main()
