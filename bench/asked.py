"""A process that answers lines of JSON with such lines, and sleeps in between. Needs no torch: parents of processes use it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any


class Asked:
    """`python -m WORDS` with more `environment`. Its name is for messages."""

    def __init__(self, name: str, words: list[str], environment: Mapping[str, str]) -> None:
        self.name, self._complaints = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=os.environ | environment,
            text=True,
            bufsize=1,
        )

    def ask(self, call: Any) -> None:
        """Does not wait."""
        assert self._process.stdin is not None
        print(json.dumps(call), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        """The next line. RuntimeError with its last words if it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._complaints.seek(0)
        words = self._complaints.read().strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{self.name} ended with code {self._process.wait()} and said: {words[-1]}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
            assert stream is not None
            stream.close()
