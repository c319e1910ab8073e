"""Completion in bash, zsh and fish, by Hydra's own: `eval "$(tokenyard -sc install=bash)"`.

Hydra's script calls `tokenyard -sc query=SHELL` with the line in COMP_LINE. Groups, options, settings and values are completed by
Hydra; verbs and flags here.
"""

import io
import os
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress

Verbs = Mapping[str, Callable[[list[str]], int]]

FLAGS = ("-sc", "--shell-completion")
SHELLS = ("bash", "zsh", "fish")
WITH_SETTINGS = ("train", "parity", "params", "plan", "audit", "evaluate", "prepare", "data", "tokenizer")
"""Verbs that take overrides."""
SECOND_WORDS = {
    "checkpoint": ("inspect", "verify", "diff"),
    "data": ("inspect", "verify"),
    "tokenizer": ("train",),
    "plan": ("serve",),
}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def completion_command(argv: list[str], verbs: Verbs) -> int:
    """Prints the script of a shell, or the words that may stand where the cursor is. Returns the exit code."""
    from ..train.config.complain import complain
    from ..train.config.compose import parse_arguments
    from ..train.show import hydra_application

    what, _, shell = (argv[0] if argv else "").partition("=")
    if what not in ("install", "uninstall", "query") or shell not in SHELLS:
        return complain(
            f"-sc {' '.join(argv)}: must be install=, uninstall= or query= and a shell; nearest valid: -sc install=bash"
        )
    if what != "query":
        return hydra_application(lambda config: None, parse_arguments([]), [FLAGS[0], argv[0]], [], "tokenyard")
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT") or "10000")]
    print(" ".join(sorted(choices(line, verbs))))
    return 0


def choices(line: str, verbs: Verbs) -> set[str]:
    """Returns the words that may stand at the end of a command line, those that begin with its last word."""
    _, *words = line.split()
    word = "" if line.endswith(" ") or not words else words.pop()
    if not words:
        return {verb for verb in (*verbs, "--help", "--version") if verb.startswith(word)}
    verb = words[0]
    if word.startswith("-"):
        return {flag for flag in _flags(verb, verbs) if flag.startswith(word)}
    found = {second for second in SECOND_WORDS.get(verb, ()) if len(words) == 1 and second.startswith(word)}
    if verb in WITH_SETTINGS:
        settings = [each for each in words[1:] if "=" in each and not each.startswith("-")]
        found |= {each for each in _settings([*settings, word]) if not each.startswith(("hydra", "cluster"))}
    return found


def _flags(verb: str, verbs: Verbs) -> set[str]:
    """Returns the flags that the help of a verb names."""
    output = io.StringIO()
    with redirect_stdout(output), suppress(SystemExit):
        verbs[verb](["--help"])
    return set(FLAG.findall(output.getvalue()))


def _settings(words: list[str]) -> list[str]:
    """Returns what Hydra has for the last of `words`, after the other ones."""
    from ..train.config.compose import parse_arguments
    from ..train.show import hydra_application

    output, before = io.StringIO(), dict(os.environ)
    os.environ["COMP_LINE"] = line = f"tokenyard {' '.join(words)}"
    os.environ["COMP_POINT"] = str(len(line))
    try:
        with redirect_stdout(output):
            hydra_application(lambda config: None, parse_arguments([]), [FLAGS[0], "query=bash"], [], "tokenyard")
    except Exception:  # of an incomplete line Hydra may raise anything, and completion must stay silent
        return []
    finally:
        os.environ.clear()
        os.environ.update(before)
    return output.getvalue().split()
