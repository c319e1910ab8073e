"""Small valid files, mutated with seeds, and opened by a child with little memory and time: each is read, or refused in one line.

`python tests/fuzz.py --minutes 10 --seed 3`, or `make fuzz ARGS="..."`. It ends at the first that is neither, and says its seed.
"""

import argparse
import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tiny_files import TINY, tiny_checkpoint, tiny_hugging_face, tiny_run, write_manifest
from tokenyard.checkpoint.inspect import inspect
from tokenyard.interop.load_weights import open_source, read_weights
from tokenyard.launch.params import read_model
from tokenyard.report.payload import payload
from tokenyard.report.run_reader import Run
from tokenyard.train.config.compose import compose
from tokenyard.train.stored_config import read_stored

SECONDS, MEMORY = 5, 500 << 20
"""Limits of a case: processor time, and bytes beyond what the imports take."""
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    0.5,
    2**31,
    10**9,
    10**12,
    2**61,
    10**400,
    -0.1,
    1e308,
    "",
    "../x",
    "a\nb",
    "\x1b[31m",
    "x" * 9999,
]
ODD += [[], {}, [1] * 5000, [[1]], {"a": {}}, ["x"], "${oc.env:HOME}", {"_target_": "os.system"}, [2**61] * 3, "\ud800"]
WORDS = [
    b"NaN",
    b"1e999",
    b"-" + b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"\xff\xfe",
    b"\0",
    b"[" + b"[]," * 99_999 + b"0]",
    b"&a [*a]",
]
READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": lambda path: (inspect(path), read_stored(path)),
    "hf": lambda path: (read_model(path), read_weights(open_source(path))),
    "run": lambda path: payload([Run(path)]),
}


def mutated(content: bytes, chance: random.Random, structured: bool) -> bytes:
    """One to three changes: of a value somewhere in the JSON, or of bytes."""
    for _ in range(chance.randint(1, 3)):
        try:
            content = json.dumps(changed(json.loads(content), chance)).encode() if structured else content
        except (ValueError, RecursionError):
            structured = False
        if not structured or chance.random() < 0.2:
            at = chance.randrange(len(content) + 1)
            content = (
                content[:at] + chance.choice([b"", *WORDS, bytes([chance.randrange(256)])]) + content[at + chance.randrange(9) :]
            )
    return content


def changed(value: Any, chance: random.Random) -> Any:
    """`value` with one value in it replaced, left out or repeated."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return copy.deepcopy(chance.choice(ODD))  # which a later change may change
    key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    action = chance.random()
    if action < 0.1:
        value.pop(key)
    elif action < 0.2 and isinstance(value, dict):
        value[chance.choice(["x", "", "\x1b]0;", "layers", *value])] = value[key]
    else:
        value[key] = changed(value[key], chance)
    return value


def attack(folder: Path, chance: random.Random) -> Callable[[], object]:
    """Mutates one file of what is in `folder`; gives what reads it."""
    kind = chance.choice(["checkpoint", "hf", "run"])
    step = folder / chance.choice(["", "2"]) / "step_00000003"
    path = {"checkpoint": step, "hf": folder / "hf", "run": folder / "run"}[kind]
    file = chance.choice([path / "manifest.json"] * 3 + [*path.rglob("*")] if kind == "checkpoint" else [*path.rglob("*")])
    if file.is_dir():
        return lambda: None
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = mutated(content[8 : 8 + size], chance, True)
        length = len(header) if chance.random() < 0.9 else chance.choice([0, 1, 2**31, 2**63])
        file.write_bytes(length.to_bytes(8, "little") + header + content[8 + size :])
    else:
        file.write_bytes(mutated(content, chance, file.suffix == ".json"))
    if file.name == "manifest.json" and chance.random() < 0.8:
        with suppress(ValueError, RecursionError):
            write_manifest(file, json.loads(file.read_bytes()))
    return lambda: READERS[kind](path)


def case(made: Path, seed: int) -> str | None:
    """What went wrong with the case `seed`, if anything did."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(made, Path(place) / "made"))
        read = attack(folder, random.Random(seed))
        ours, theirs = os.pipe()
        if (child := os.fork()) == 0:
            os.write(theirs, outcome(read).encode(errors="replace")[:4000])
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours) as answer:
            said = answer.read()
        _, status = os.waitpid(child, 0)
    return None if said == "ok" else said or f"ended by {status}: beyond {SECONDS} s of its processor, or killed"


def used() -> int:
    """Bytes of memory that this process has asked for."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def outcome(read: Callable[[], object]) -> str:
    """In the child."""
    signal.alarm(20 * SECONDS)  # a wait that costs no processor time
    resource.setrlimit(resource.RLIMIT_AS, (used() + MEMORY, used() + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        read()
    except ValueError as error:
        return "ok" if "\n" not in str(error) and len(str(error)) < 2000 else f"not one line: {str(error)[:2000]!r}"
    except BaseException:
        return traceback.format_exc()[-3000:]
    return "ok"


def fuzz(seed: int, seconds: float, most: float = math.inf) -> tuple[int, str | None]:
    """How many cases were tried from `seed` on, `most` or as many as `seconds` allow, and the first failure, with its seed."""
    config, end, tried = compose(TINY), time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as place:
        for make in (tiny_hugging_face, lambda made: tiny_checkpoint(made, config), lambda made: tiny_run(made, config)):
            make(Path(place))
        tiny_checkpoint(Path(place) / "2", config, version=2)
        while tried < most and time.monotonic() < end:
            if (wrong := case(Path(place), seed + tried)) is not None:
                return tried, f"seed {seed + tried}: {wrong}"
            tried += 1
    return tried, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    tried, wrong = fuzz(arguments.seed * 1_000_000, arguments.minutes * 60)
    print(wrong or f"{tried} cases: each was read, or refused in one line")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
